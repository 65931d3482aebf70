"""Results as Markdown tables: numbers a reader can compare, a ratio only where it stands clear of the noise."""

from __future__ import annotations

from collections.abc import Sequence

from .cells import Row
from .features import WHO
from .features import Row as FeatureRow
from .hosts import Row as HostRow
from .numerics import Row as NumericsRow
from .passes import SHORT
from .peers import OURS, PEERS
from .targets import Row as TargetRow
from .timing import Times
from .training import Training

MB = 1 << 20


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (head, rule, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seconds(t: Times) -> str:
    """Median and spread."""
    ms = t.median * 1e3
    if ms < 1:
        return f"{ms:.3f} ±{t.spread:.0%}"
    return f"{ms:.{2 if ms < 10 else 1 if ms < 100 else 0}f} ±{t.spread:.0%}"


def megabytes(n: int | None) -> str:
    return "" if n is None else f"{n / MB:.{1 if n < 10 * MB else 0}f}"


KEY = (
    "error, plain's: relative L2 against float64, of the output or of the worst gradient, ours and plain PyTorch's. "
    "ms: our median, with half the interquartile range. rate: floating point operations a second in the field's convention; "
    "roof: the share of what this machine's matrix products or memory would allow. Under a peer's name: how many times longer "
    'it took; "same" where the run cannot tell; "-" where it has no number. MB: peak memory beyond the inputs.'
)


def cells(rows: Sequence[Row]) -> str:
    """Errors, our time and rate, every peer's time as a multiple of ours, and peak memory of ours and of torch's default."""
    shown = [p.name for p in PEERS if p is not OURS and any(p.name in row.times for row in rows)]
    rated, sized = any(row.flops for row in rows), any(row.memory for row in rows)
    sizes = (OURS.name, "sdpa", "plain") if sized else ()
    head = ["workload", "pass", "error", "plain's", "ms", *(("rate", "roof") if rated else ()), *shown]
    head += ["MB" if who == OURS.name else f"{who} MB" for who in sizes]
    lines, last = [], ""
    for row in rows:
        mine = row.times.get(OURS.name)
        line = ["" if row.workload == last else row.workload, SHORT[row.direction]]
        line += [f"{row.error:.1e}", f"{row.plain_error:.1e}"]
        line.append("-" if mine is None else seconds(mine))
        if rated:
            line += ["-", "-"] if mine is None or row.flops is None else [rate(row.flops / mine.median), share(row, mine)]
        line += [str(row.ratio(name) or "-") for name in shown]
        lines.append(line + [megabytes(row.memory.get(name)) for name in sizes])
        last = row.workload
    return markdown(head, lines)


def rate(flops: float) -> str:
    """Of operations a second."""
    return f"{flops / 1e12:.0f} T" if flops >= 1e13 else f"{flops / 1e9:.3g} G"


def share(row: Row, mine: Times) -> str:
    """Of the roof."""
    return "-" if row.roof is None else f"{row.roof / mine.median:.0%}"


def shapes(rows: Sequence[Row]) -> str:
    """What each workload is."""
    seen = {row.workload: (row.model, row.shape) for row in rows}
    if all(name.startswith("d") and model in ("causal", "full") for name, (model, _) in seen.items()):
        return ""  # a sweep: the names say it
    return "\n".join(f"- {name}: {model}: {shape}" for name, (model, shape) in seen.items())


def reasons(rows: Sequence[Row]) -> str:
    """Why a peer has no number, each reason once."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for peer, reason in row.reasons.items():
            where.setdefault((peer, reason), []).append(row.name)
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (peer, reason), found in where.items():
        alike.setdefault((reason, tuple(found)), []).append(peer)
    lines = []
    for (reason, names), peers in alike.items():
        places = "everywhere" if len(names) == len(rows) else ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        lines.append(f"- {', '.join(peers)}: {reason} ({places})")
    return "\n".join(lines)


def targets(rows: Sequence[TargetRow]) -> str:
    """Each promise with what was measured."""
    head = ["case", "L", "dtype", "pass", "fastattn ms", "torch ms", "torch / fastattn", "2 threads, wall", "target", ""]
    lines = []
    for row in rows:
        t = row.target
        times = [f"{x.median * 1e6:.0f} us" if t.overhead else f"{x.median * 1e3:.1f}" for x in (row.ours, row.torchs)]
        value = f"{row.value:+.1f} us" if t.overhead else f"{row.value:.2f}x"
        bound = "" if row.bound is None else f"<= {row.bound:.0f} us" if t.overhead else f">= {row.bound:g}x"
        wall = "" if row.wall is None else f"{row.wall.value:.2f}x"
        direction = "fwd+bwd" if t.gradients else "fwd"
        lines.append([t.name, str(t.length), str(t.dtype)[6:], direction, *times, value, wall, bound, row.verdict])
    return markdown(head, lines)


def features(rows: Sequence[FeatureRow]) -> str:
    """Peak memory beside torch's."""
    head = ["feature", *(f"{who} MB" for who in WHO), "torch / fastattn"]
    lines = []
    for row in rows:
        ours, torchs = (row.memory[who] for who in WHO)
        factor = f"{torchs / ours:.1f}x" if ours and torchs else "-"
        lines.append([row.feature, megabytes(ours), megabytes(torchs), factor])
    return markdown(head, lines)


def numerics(rows: Sequence[NumericsRow]) -> str:
    """Every implementation's errors, by the data."""
    lines, last = [], ""
    for row in rows:
        errors = (f"{row.errors[name]:.1e}" if name in row.errors else "" for name in rows[0].errors)
        lines.append(["" if row.data == last else row.data, row.who, *errors])
        last = row.data
    return markdown(["bf16, causal", "", *rows[0].errors], lines)


def hosts(rows: Sequence[HostRow]) -> str:
    """Every model's route and its differences from the host's own attention."""
    head = ["model", "library", "route: modules", "calls", "output", "gradient", "undo"]
    lines = []
    for row in rows:
        routes = ", ".join(f"{route}: {n}" for route, n in sorted(row.routes.items()))
        gradient = "-" if row.gradient is None else f"{row.gradient:.1e}"
        undo = "same bits" if row.restored else "DIFFERS"
        lines.append([row.model, row.library, routes, str(row.calls), f"{row.forward:.1e}", gradient, undo])
    return markdown(head, lines)


def training(t: Training) -> str:
    """Both runs side by side, every tenth step."""
    steps = len(t.losses["torch"])
    marks = sorted({0, *range(9, steps, 10), steps - 1})
    lines = [[str(i + 1), *(f"{t.losses[who][i]:.4f}" for who in t.losses)] for i in marks]
    lines.append(["seconds", *(f"{sum(t.seconds[who]):.1f}" for who in t.seconds)])
    return markdown(["step", *(f"loss on {who}" for who in t.losses)], lines)
