"""Derivatives where keys and values have a mean, in bf16: relative L2 errors against float64.

They are dq, dk and dv; of ours and of the plain formula in bf16 also out', its tangent along directions of q, k and v
(forward mode), and dq', the gradient by q of dq, dk and dv times these directions (double backward).

Rounding O to bf16 before delta = dO.O, and P (dP - delta) to bf16 before the product with the keys, leaves row sums that
are exactly 0 a little off 0, and what is off is multiplied by the mean key. Real keys have one.

Rounding the result to bf16 is 1.7e-3 of every figure. The kernels have a row without it too: what they sum, stored in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .. import Causal, attention, dispatch, explain, functional
from ..backends import triton, triton_call
from ..kernels import shim
from .peers import OURS, PEERS, PLAIN, Peer
from .workloads import Inputs, Workload

LENGTH, HEAD_DIM, HEADS = 1024, 64, 2
FIRST = ("dq", "dk", "dv")
NAMES = (*FIRST, "out'", "dq'")
FORMULA = "plain formula"
KERNELS = "fastattn triton"
UNROUNDED = f"{KERNELS}, float32 results"
WITHOUT = {  # which of (O's low half, the zero sum) the same kernels keep
    "without the zero sum": (True, False),
    "without O's low half": (False, True),
    "without either": (False, False),
}
TILES = "sm_90"  # whose tiles the interpreter takes here: it is as slow as they are many

Derivatives = Callable[[list[Tensor], Tensor], tuple[Tensor, ...]]  # ([q, k, v], do) -> the first of NAMES, or all of them


@dataclass(frozen=True)
class Data:
    """What keys and values are made of: noise of variance 1 and an offset, in its standard deviations."""

    name: str
    key: float
    value: float
    drift: bool = False  # the keys' offset runs from -key to key along the sequence


DATA = (
    Data("no mean", 0.0, 0.0),
    Data("key mean 1, value mean 1", 1.0, 1.0),
    Data("key mean 3, value mean 3", 3.0, 3.0),
    Data("key mean drifting -3 to 3, value mean 3", 3.0, 3.0, drift=True),
)


@dataclass(frozen=True)
class Row:
    """The errors of one implementation on one kind of data."""

    data: str
    who: str
    errors: dict[str, float]

    def json(self) -> dict[str, Any]:
        return {"data": self.data, "who": self.who, **self.errors}


def inputs(data: Data, n: int = LENGTH, device: str = "cpu") -> tuple[Tensor, ...]:
    """q, k, v and do in bf16, (1, HEADS, n, HEAD_DIM). The offset of the keys is the same sign for a whole column."""
    g = torch.Generator(device).manual_seed(3)
    q, k, v, do = (torch.randn(1, HEADS, n, HEAD_DIM, generator=g, device=device) for _ in range(4))
    direction = torch.randn(HEAD_DIM, generator=g, device=device)
    along = torch.linspace(-1.0, 1.0, n, device=device)[:, None] if data.drift else 1.0
    return tuple(x.bfloat16() for x in (q, k + data.key * direction * along, v + data.value, do))


def directions(leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Noise of variance 1 for q, k and v each, in their dtype."""
    g = torch.Generator(leaves[0].device).manual_seed(4)
    return tuple(torch.randn(x.shape, generator=g, device=x.device).to(torch.bfloat16).to(x.dtype) for x in leaves)


def candidates(device: str, compiled: bool = True) -> dict[str, Derivatives]:
    """Causal attention by every backend of ours that runs here, by the formula, and by every peer that has a backward."""
    x = torch.empty(1, 1, 1, HEAD_DIM, dtype=torch.bfloat16, device=device)
    found: dict[str, Derivatives] = {}
    for name in dispatch.BACKENDS:
        try:
            explain(x, x, x, backend=name)
        except (ValueError, ImportError):
            continue
        found[f"fastattn {name}"] = partial(_all, partial(attention, mask=Causal(), backend=name))
        if name == "triton":
            found |= {UNROUNDED: unrounded, **{what: partial(dq_without, steps) for what, steps in WITHOUT.items()}}
    found[FORMULA] = partial(_all, _plain)
    w = Workload("", "", 1, HEADS, HEADS, LENGTH, HEAD_DIM, torch.bfloat16, causal=True)
    for peer in PEERS:
        if peer in (OURS, PLAIN) or peer.unavailable(device) or peer.cannot(w, device, "forward+backward"):
            continue
        if compiled or not peer.compiles:
            found[peer.name] = partial(_gradients, partial(_by_peer, peer, w))
    return found


def unrounded(leaves: list[Tensor], do: Tensor) -> tuple[Tensor, ...]:
    """What the Triton kernels sum, in float32: the backward that autograd calls, into wider results."""
    q, k, v = leaves
    p = functional.problem(q, k, v, Causal(), (), None, None, 0.0, "triton", None, None)
    return tuple(triton.backward(p, do, None, *triton.forward(p, True), dtype=torch.float32)[:3])


def dq_without(steps: tuple[bool, bool], leaves: list[Tensor], do: Tensor) -> tuple[Tensor]:
    """The kernels' dq in float32 without a step of WITHOUT; a batch-invariant call has no zero sum."""
    low, zero_sum = steps
    q, k, v = leaves
    p = functional.problem(q, k, v, Causal(), (), None, None, 0.0, "triton", None, None)
    out, lse, out_lo = triton.forward(p, True)
    p, out_lo = replace(p, invariant=not zero_sum), out_lo if low else q.new_empty(0)
    return (triton.gradients(p, do, None, out, lse, out_lo, triton.dq_pass, torch.float32).q,)


def run(device: str, n: int = LENGTH, compiled: bool = True) -> Iterator[Row]:
    """Rows as they are ready: every implementation on every kind of data; errors are nan where it failed."""
    everyone = candidates(device, compiled)
    for data in DATA:
        *leaves, do = inputs(data, n, device)
        exact = _all(_plain, [x.double() for x in leaves], do.double())
        for who, derivatives in everyone.items():
            try:
                with tiles(who):
                    found = derivatives(leaves, do)
                errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact)]
            except Exception:  # a peer's failure is a cell of the table
                errors = [float("nan")] * len(FIRST)
            yield Row(data.name, who, dict(zip(NAMES, errors)))


def tiles(who: str) -> AbstractContextManager[Any]:
    """In the interpreter the kernels have a GPU's tiles here."""
    own = shim.INTERPRETED and who.startswith((KERNELS, "without"))
    return mock.patch.object(triton_call, "architecture", return_value=TILES) if own else nullcontext()


def _by_peer(peer: Peer, w: Workload, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = Inputs(q, k, v, q, {}, Causal())
    return peer.build(replace(w, length=q.shape[2]), x)(x)


def _gradients(attend: Callable[..., Tensor], leaves: list[Tensor], do: Tensor) -> tuple[Tensor, ...]:
    x = [y.detach().requires_grad_() for y in leaves]
    return torch.autograd.grad(attend(*x), x, do)


def _all(attend: Callable[..., Tensor], leaves: list[Tensor], do: Tensor) -> tuple[Tensor, ...]:
    x, along = [y.detach().requires_grad_() for y in leaves], directions(leaves)
    first = torch.autograd.grad(attend(*x), x, do, create_graph=True)
    (again,) = torch.autograd.grad(first, x[0], along)
    moved = torch.func.jvp(attend, tuple(leaves), along)[1]
    return *(y.detach() for y in first), moved, again


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    return ((q @ k.mT) * HEAD_DIM**-0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v
