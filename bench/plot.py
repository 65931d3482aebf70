"""The run as one picture: how many times longer the peers took, workload by workload, and the two loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .models import PASSES, Row
from .peers import OURS, PEERS
from .training import Training


def draw(rows: Sequence[Row], training: Training | None, path: Path) -> None:
    """Write the picture to path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    panels = [direction for direction in PASSES if any(row.direction == direction for row in rows)]
    n = len(panels) + (training is not None)
    figure = Figure(figsize=(5.2 * n, 4.6), layout="constrained")
    axes = figure.subplots(1, n, squeeze=False)[0]
    colours = {p.name: f"C{i}" for i, p in enumerate(p for p in PEERS if p is not OURS)}
    for axis, direction in zip(axes, panels):
        _ratios(axis, [row for row in rows if row.direction == direction], direction, colours)
    if training is not None:
        axis = axes[-1]
        for who, style in (("torch", "-"), ("fastattn", "--")):
            axis.plot(range(1, len(training.losses[who]) + 1), training.losses[who], style, label=who)
        axis.set(title="character GPT, same weights and batches", xlabel="step", ylabel="loss")
        axis.legend()
    figure.savefig(path, dpi=130)


def _ratios(axis, rows: Sequence[Row], direction: str, colours: dict[str, str]) -> None:
    shown = [name for name in colours if any(name in row.times for row in rows)]
    height = 0.8 / max(1, len(shown))
    for i, name in enumerate(shown):
        found = [(y, row.ratio(name)) for y, row in enumerate(rows)]
        bars = [(y + (i - (len(shown) - 1) / 2) * height, r) for y, r in found if r is not None]
        values = [r.value for _, r in bars]
        errors = [[r.value - r.low for _, r in bars], [r.high - r.value for _, r in bars]]
        axis.barh([y for y, _ in bars], values, height, label=name, color=colours[name], xerr=errors)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [row.workload for row in rows])
    axis.invert_yaxis()
    axis.set(title=direction, xlabel="times longer than fastattn", xscale="log")
    axis.xaxis.set_major_formatter("{x:g}x")
    axis.xaxis.set_minor_formatter("")
    axis.legend(fontsize="small")
