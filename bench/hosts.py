"""fastattn inside other libraries' models: how far outputs and gradients are from the host's own attention, and the route.

Every model runs twice with the same weights: as it is, and after `fastattn.convert(model)` inside `fastattn.use()`. Then
the conversion is undone, and the first outputs must come back bit for bit.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..integrations import Conversion, convert, use
from .host_models import MODELS, Case, Model

PACKAGES = {"x_transformers": "x-transformers", "open_clip": "open_clip_torch"}  # where it is not the module's name
ROUTES = {"interface": "attention interface", "replaced": "module replaced", "sdpa": "under F.sdpa"}


@dataclass(frozen=True)
class Row:
    """One model. Differences are largest absolute values; a gradient's is divided by the largest entry of that gradient.

    Attributes:
        routes: how many attention modules go which way. calls: attention calls of one pass that fastattn computed.
        left: what stayed with the host, with the reason.
        restored: whether undoing gave the first outputs back, bit for bit.
    """

    library: str
    model: str
    routes: dict[str, int]
    calls: int
    forward: float
    gradient: float | None
    restored: bool
    left: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        return dict(vars(self))


def run(models: tuple[Model, ...] = MODELS, notes: list[str] | None = None) -> Iterator[Row]:
    """Rows as they are ready; why a model is left out goes into `notes`."""
    for model in models:
        missing = model.missing()
        if missing is None:
            try:
                yield compare(model)
                continue
            except ImportError as error:  # a package that is there, without one that it needs
                missing = str(error)
        if notes is not None:
            notes.append(f"{model.name} left out: {missing}")


def libraries() -> list[str]:
    """The libraries of MODELS, each once."""
    return list(dict.fromkeys(model.library for model in MODELS))


def compare(model: Model) -> Row:
    """Build a model, run it both ways, and undo."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = model.build()
        before, grads_before = results(case)
        found = convert(case.model)
        with use() as seen:
            after, grads_after = results(case)
        found.undo()
        again, _ = results(case)
    report = seen.report()
    left = [f"{entry.kind}: {entry.why}" for entry in found.left if entry.state == "left"]
    return Row(
        model.library, model.name, routes(found), sum(report.taken.values()), largest(after - before),
        gradient_difference(grads_before, grads_after) if case.gradients else None, torch.equal(before, again),
        left + [f"{n} calls, {reason}" for reason, n in report.left.items()],
    )  # fmt: skip


def results(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """The compared output, and the gradient of a fixed random projection of it for every parameter."""
    case.model.zero_grad()
    with torch.set_grad_enabled(case.gradients):
        out = case.run()
    if case.gradients:
        generator = torch.Generator().manual_seed(3)
        (out * torch.randn(out.shape, generator=generator)).sum().backward()
    grads = {name: x.grad.clone() for name, x in case.model.named_parameters() if x.grad is not None}
    return out.detach(), grads


def routes(found: Conversion) -> dict[str, int]:
    """How many attention modules go which way."""
    return dict(Counter(ROUTES.get(entry.state, entry.state) for entry in found.entries))


def gradient_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of any parameter's gradient, over that gradient's largest entry.

    Gradients that are zero up to rounding, a key bias's say, are measured against the largest gradient of all.
    """
    if a.keys() != b.keys():
        return float("inf")
    top = max(largest(x) for x in a.values())
    return max(largest(a[name] - b[name]) / max(largest(a[name]), 1e-3 * top) for name in a)


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
