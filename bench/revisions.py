"""The same cells measured on another revision of the library: in a throw-away worktree, the two taking turns.

The benchmark is this one in both: the other revision's `bench` folder is replaced, so that only the library differs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import suite
from .peers import OURS
from .sweeps import SWEEPS

HERE = Path(__file__).resolve().parent
TURNS = 3  # of each revision


def against(ref: str, options: suite.Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results of `ref` and of the code at hand, as results.json has them.

    Raises:
        ValueError: this is no git checkout, it has no such revision, a suite has no cells to compare, or a run failed.
    """
    other = sorted(set(options.suites) - set(SWEEPS))
    if other:
        raise ValueError(f"only {', '.join(SWEEPS)} can be compared with another revision, not {', '.join(other)}")
    share = None if options.minutes is None else options.minutes / (2 * TURNS)
    told = {**vars(options), "minutes": share}
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    with _worktree(ref) as tree:
        for turn in range(TURNS):
            pair = ((tree, found[0]), (HERE.parent, found[1]))
            for where, results in pair if turn % 2 == 0 else reversed(pair):
                results.append(_run(where, told))
    return merged(found[0]), merged(found[1])


def merged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of the same code as one: a cell's rounds one after the other, with the peers that kept up in all of them."""
    whole = dict(runs[0])
    for name in SWEEPS:
        by_cell: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for run in runs:
            for cell in run.get(name, []):
                by_cell.setdefault((cell["workload"], cell["direction"]), []).append(cell)
        whole[name] = [_joined(cells) for cells in by_cell.values() if len(cells) == len(runs)]
    return whole


def _joined(cells: list[dict[str, Any]]) -> dict[str, Any]:
    def rounds(name: str) -> list[int]:
        return [len(cell["peers"][name]["rounds"]) for cell in cells]

    names = [name for name in cells[0]["peers"] if all(name in cell["peers"] for cell in cells)]
    kept_up = [name for name in names if OURS.name in names and rounds(name) == rounds(OURS.name)]
    if len(kept_up) > 1:  # somebody beside us
        names = kept_up
    lengths = [min(found) for found in zip(*(rounds(name) for name in names))]
    peers = {}
    for name in names:
        parts = list(zip(cells, lengths))
        joined = {key: [s for cell, n in parts for s in cell["peers"][name][key][:n]] for key in ("rounds", "walls")}
        peers[name] = {**cells[0]["peers"][name], **joined}
    return {**cells[0], "peers": peers}


@contextmanager
def _worktree(ref: str) -> Iterator[Path]:
    root = HERE.parent
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        _git(root, "worktree", "add", "--detach", "--quiet", str(tree), ref)
        try:
            shutil.rmtree(tree / "bench", ignore_errors=True)
            shutil.copytree(HERE, tree / "bench", ignore=shutil.ignore_patterns("__pycache__", "results"))
            yield tree
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def _git(root: Path, *arguments: str) -> None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except OSError as missing:
        raise ValueError(f"another revision needs git: {missing}") from missing
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments[:2])}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


def _run(tree: Path, options: dict[str, Any]) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, "-m", "fastattn.bench"], cwd=tree, env=environment, input=json.dumps(options), stdout=subprocess.PIPE,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"the benchmark failed on {tree.name}: {done.returncode}; its own words stand above")
    return json.loads(done.stdout.splitlines()[-1])
