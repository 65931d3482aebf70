"""What only O(L) memory makes possible on long inputs: peak memory at length 4096, beside torch's, feature by feature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import Bias, attention, scaled_dot_product_attention
from . import memory, workers

HEADS, LENGTH, HEAD_DIM = 2, 4096, 64
WHO = ("fastattn", "torch")


@dataclass(frozen=True)
class Row:
    """Peak bytes beyond the inputs."""

    feature: str
    memory: dict[str, int | None]

    def json(self) -> dict[str, Any]:
        return {"feature": self.feature, **self.memory}


def make(n: int = LENGTH, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, (1, HEADS, n, HEAD_DIM), wanting gradients."""
    g = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, n, HEAD_DIM, generator=g, device=device).requires_grad_() for _ in range(3))
    return q, k, v


def backward(who: str, n: int, device: str) -> Callable[[], Any]:
    """Forward and backward of a causal call."""
    q, k, v = make(n, device)
    attend = _sdpa(who)
    return lambda: torch.autograd.grad(attend(q, k, v, is_causal=True).sum(), (q, k, v))


def dropout(who: str, n: int, device: str) -> Callable[[], Any]:
    """Forward and backward with dropout 0.1."""
    q, k, v = make(n, device)
    attend = _sdpa(who)
    return lambda: torch.autograd.grad(attend(q, k, v, dropout_p=0.1, is_causal=True).sum(), (q, k, v))


def bias_gradient(who: str, n: int, device: str) -> Callable[[], Any]:
    """Forward and backward with a learned bias per key, (HEADS, 1, n)."""
    q, k, v = make(n, device)
    bias = torch.randn(HEADS, 1, n, device=device).requires_grad_()
    if who == "torch":
        return lambda: torch.autograd.grad(
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].expand(1, HEADS, n, n)).sum(), (q, k, v, bias)
        )
    return lambda: torch.autograd.grad(attention(q, k, v, score=Bias(bias)).sum(), (q, k, v, bias))


def double_backward(who: str, n: int, device: str) -> Callable[[], Any]:
    """The gradient of a gradient penalty."""
    q, k, v = make(n, device)
    attend = _second_order(who)

    def run() -> Any:
        grads = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v), create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), (q, k, v))

    return run


def forward_mode(who: str, n: int, device: str) -> Callable[[], Any]:
    """A directional derivative by forward-mode differentiation."""
    q, k, v = (x.detach() for x in make(n, device))
    tangents = [torch.ones_like(x) for x in (q, k, v)]
    attend = _second_order(who)

    def run() -> Any:
        with forward_ad.dual_level():
            out = attend(*(forward_ad.make_dual(x, t) for x, t in zip((q, k, v), tangents)))
            return forward_ad.unpack_dual(out).tangent

    return run


FEATURES: dict[str, Callable[[str, int, str], Callable[[], Any]]] = {
    "backward": backward,
    "dropout": dropout,
    "bias gradient": bias_gradient,
    "double backward": double_backward,
    "forward mode": forward_mode,
}


def run(device: str) -> list[Row]:
    """Every feature's peak memory, ours and torch's.

    Raises:
        RuntimeError: this machine does not tell a process's peak memory.
    """
    if not memory.measurable(device):
        raise RuntimeError("peak memory is known on Linux and on CUDA only")
    cells = [("feature", name, who, LENGTH, device) for name in FEATURES for who in WHO]
    found = measured(cells, workers.count(device))
    peaks = {(name, who): cell and cell["bytes"] for (_, name, who, *_), cell in zip(cells, found, strict=True)}
    return [Row(name, {who: peaks[name, who] for who in WHO}) for name in FEATURES]


def measured(cells: list[Any], n: int = 1) -> list[Any]:
    """What probe.py answers to each, in n processes; None where a process ended over it."""
    found = dict(workers.answers("fastattn.bench.probe", cells, n))
    return [None if isinstance(found[index], workers.Ended) else found[index] for index in range(len(cells))]


def _sdpa(who: str) -> Callable[..., Tensor]:
    return F.scaled_dot_product_attention if who == "torch" else scaled_dot_product_attention


def _second_order(who: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Causal attention that can be differentiated twice and forwards: torch's needs its math path."""
    if who != "torch":
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)

    def math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return math
