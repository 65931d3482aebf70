"""Pictures of a run: times beside the peers', rates, memory and errors against length, ratios as a map, loss curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cells import Row
from .passes import PASSES, SHORT
from .peers import OURS, PEERS
from .training import Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {p.name: "black" if p is OURS else f"C{i % 10}" for i, p in enumerate(PEERS, start=-1)}
MARKS = {p.name: "osv^D<>pP*Xhd|_1"[i % 16] for i, p in enumerate(PEERS)}
Value = Callable[[Row, str], float | None]


def draw(rows: Sequence[Row], training: Training | None, path: Path) -> None:
    """Models' ratios and both loss curves, written to path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    panels = [direction for direction in PASSES if any(row.direction == direction for row in rows)]
    n = len(panels) + (training is not None)
    figure = Figure(figsize=(5.2 * n, 4.6), layout="constrained")
    axes = figure.subplots(1, n, squeeze=False)[0]
    for axis, direction in zip(axes, panels):
        _ratios(axis, [row for row in rows if row.direction == direction], direction)
    if training is not None:
        axis = axes[-1]
        for who, style in (("torch", "-"), ("fastattn", "--")):
            axis.plot(range(1, len(training.losses[who]) + 1), training.losses[who], style, label=who)
        axis.set(title="character GPT, same weights and batches", xlabel="step", ylabel="loss")
        axis.legend()
    figure.savefig(path, dpi=130)


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """What the rows have to show, by name: speed, memory and error against length by pass, and a map of all ratios."""
    found: dict[str, Figure] = {}
    for direction in ("forward", "backward"):
        grid = [row for row in rows if row.suite == direction]
        if not grid:
            continue
        rated = f"{'T' if _largest(grid) > 1e13 else 'G'}FLOP/s"
        unit = 1e12 if rated[0] == "T" else 1e9
        found[f"speed-{direction}"] = _by_length(grid, f"{direction}: {rated}", _rate(unit), top=_matrix_rate(grid, unit))
        if any(found is not None for row in grid for found in row.memory.values()):
            title = "forward" if direction == "forward" else "forward and backward"
            found[f"memory-{direction}"] = _by_length(grid, f"{title}: peak MB beyond the inputs", _megabytes, log=True)
        found[f"error-{direction}"] = _by_length(grid, f"{direction}: relative error against float64", _error, log=True)
    if rows:
        found["ratios"] = _map(rows)
    return found


def _largest(rows: Sequence[Row]) -> float:
    return max((row.flops / t.median for row in rows for t in row.times.values() if row.flops), default=0.0)


def _rate(unit: float) -> Value:
    return lambda row, who: row.flops / row.times[who].median / unit if who in row.times and row.flops else None


def _megabytes(row: Row, who: str) -> float | None:
    found = row.memory.get(who)
    return None if found is None else max(found, 1 << 10) / (1 << 20)


def _error(row: Row, who: str) -> float | None:
    return {OURS.name: row.error, "plain": row.plain_error}.get(who)


def _matrix_rate(rows: Sequence[Row], unit: float) -> float | None:
    """What products alone reach here, from rows whose roof is arithmetic."""
    return max((row.flops / row.roof / unit for row in rows if row.flops and row.roof), default=None)


def _by_length(rows: Sequence[Row], title: str, value: Value, log: bool = False, top: float | None = None) -> Figure:
    """A panel per head_dim and mask, a line per implementation."""
    from matplotlib.figure import Figure

    dims = sorted({row.head_dim for row in rows})
    kinds = list(dict.fromkeys(row.model for row in sorted(rows, key=lambda row: row.model)))
    figure = Figure(figsize=(1 + 3.4 * len(dims), 0.9 + 2.7 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), len(dims), squeeze=False, sharex=True, sharey=True)
    drawn: dict[str, Any] = {}
    for i, kind in enumerate(kinds):
        for j, dim in enumerate(dims):
            axis = axes[i][j]
            mine = sorted((row for row in rows if (row.model, row.head_dim) == (kind, dim)), key=lambda row: row.length)
            for peer in PEERS:
                points = [(row.length, y) for row in mine if (y := value(row, peer.name)) is not None]
                if points:
                    width = 2.4 if peer is OURS else 1.2
                    style = dict(marker=MARKS[peer.name], color=COLOURS[peer.name], linewidth=width, markersize=4)
                    [drawn[peer.name]] = axis.plot(*zip(*points), **style, zorder=3 if peer is OURS else 2)
            if top is not None:
                drawn["matrix products alone"] = axis.axhline(top, color="grey", linestyle=":", linewidth=1)
            axis.set_title(f"head_dim {dim}, {kind}", fontsize="medium")
            axis.set_xscale("log", base=2)
            lengths = sorted({row.length for row in rows})
            axis.set_xticks(lengths, [str(n) for n in lengths])
            axis.grid(alpha=0.3)
            if log:
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
            if i == len(kinds) - 1:
                axis.set_xlabel("length")
    names = [name for name in (*COLOURS, "matrix products alone") if name in drawn]
    figure.legend([drawn[name] for name in names], names, loc="outside right center", fontsize="small")
    figure.suptitle(title)
    return figure


def _map(rows: Sequence[Row]) -> Figure:
    """Every cell's ratios as colours: how many times longer each peer took."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    shown = [p.name for p in PEERS if p is not OURS and any(row.ratio(p.name) for row in rows)]
    found = [[row.ratio(name) for name in shown] for row in rows]
    logs = [[math.nan if r is None else math.log2(r.value) for r in line] for line in found]
    figure = Figure(figsize=(3.4 + 0.85 * max(1, len(shown)), 1.0 + 0.21 * len(rows)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(logs or [[0.0]], cmap="RdYlGn", norm=TwoSlopeNorm(0.0, -3.0, 3.0), aspect="auto")
    for y, line in enumerate(found):
        for x, r in enumerate(line):
            if r is not None:
                axis.text(x, y, str(r), ha="center", va="center", fontsize=6)
    axis.set_yticks(range(len(rows)), [f"{row.workload} {SHORT[row.direction]}" for row in rows], fontsize=6)
    axis.set_xticks(range(len(shown)), shown, rotation=30, ha="right", fontsize=8)
    bar = figure.colorbar(image, ticks=[-3, -2, -1, 0, 1, 2, 3])
    bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axis.set_title("times longer than fastattn took", fontsize="medium")
    return figure


def _ratios(axis, rows: Sequence[Row], direction: str) -> None:
    shown = [p.name for p in PEERS if p is not OURS and any(p.name in row.times for row in rows)]
    height = 0.8 / max(1, len(shown))
    for i, name in enumerate(shown):
        found = [(y, row.ratio(name)) for y, row in enumerate(rows)]
        bars = [(y + (i - (len(shown) - 1) / 2) * height, r) for y, r in found if r is not None]
        values = [r.value for _, r in bars]
        errors = [[r.value - r.low for _, r in bars], [r.high - r.value for _, r in bars]]
        axis.barh([y for y, _ in bars], values, height, label=name, color=COLOURS[name], xerr=errors)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [row.workload for row in rows])
    axis.invert_yaxis()
    axis.set(title=direction, xlabel="times longer than fastattn", xscale="log")
    axis.xaxis.set_major_formatter("{x:g}x")
    axis.xaxis.set_minor_formatter("")
    axis.legend(fontsize="small")
