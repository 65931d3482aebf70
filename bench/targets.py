"""What the CPU backend promises, one line each: torch's fused attention takes `bound` times as long, or about as long.

B 1, H 8, head_dim 64. The judged figure is process CPU time on one thread; wall time on two threads stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import Causal, Documents, Mask, SlidingWindow, attention, scaled_dot_product_attention
from . import timing

HEADS, HEAD_DIM = 8, 64
YARDSTICK = 53.0  # microseconds of torch's smallest call with gradient on the processor for which overheads are bounded
FP32, BF16 = torch.float32, torch.bfloat16
Call = Callable[[], Any]


@dataclass(frozen=True)
class Target:
    """bound: the least ratio torch / ours; the most microseconds of difference where `overhead`, and on a processor on which
    torch's own call takes longer than YARDSTICK in proportion more, since all of it is host work; None: shown, not judged."""

    name: str
    length: int
    dtype: torch.dtype
    gradients: bool
    bound: float | None
    build: Callable[[int, torch.dtype, bool], tuple[Call, Call]]
    overhead: bool = False

    @property
    def direction(self) -> str:
        return "forward+backward" if self.gradients else "forward"


@dataclass(frozen=True)
class Row:
    """A target and what was measured; for overhead, microseconds that ours takes longer."""

    target: Target
    ours: timing.Times
    torchs: timing.Times
    wall: timing.Ratio | None

    @property
    def value(self) -> float:
        if self.target.overhead:
            return (self.ours.median - self.torchs.median) * 1e6
        return timing.ratio(self.ours, self.torchs).value

    @property
    def bound(self) -> float | None:
        """The target's, for the processor that was measured."""
        bound = self.target.bound
        if bound is None or not self.target.overhead:
            return bound
        return bound * max(1.0, self.torchs.median * 1e6 / YARDSTICK)

    @property
    def verdict(self) -> str:
        """met, missed, "noise" where the run cannot tell, or nothing where there is no bound."""
        bound = self.bound
        if bound is None:
            return ""
        if self.value <= bound if self.target.overhead else self.value >= bound:
            return "met"
        reach = timing.ratio(self.ours, self.torchs).high
        return "noise" if not self.target.overhead and reach >= bound else "missed"

    def json(self) -> dict[str, Any]:
        t = self.target
        interval = timing.ratio(self.ours, self.torchs)
        return {
            "name": t.name, "length": t.length, "dtype": str(t.dtype)[6:], "direction": t.direction, "bound": self.bound,
            "overhead": t.overhead, "value": self.value, "verdict": self.verdict, "interval": [interval.low, interval.high],
            "fastattn": self.ours.median, "torch": self.torchs.median,
            "wall2": None if self.wall is None else self.wall.value,
        }  # fmt: skip


def tensors(n: int, dtype: torch.dtype, gradients: bool, shape: tuple[int, ...] = (1, HEADS)) -> tuple[Tensor, ...]:
    """q, k, v and do, (*shape, n, HEAD_DIM)."""
    g = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(*shape, n, HEAD_DIM, generator=g).to(dtype) for _ in range(4))
    return (*(x.requires_grad_(gradients) for x in (q, k, v)), do)


def _pair(ours: Callable[..., Tensor], torchs: Callable[..., Tensor], x: tuple[Tensor, ...]) -> tuple[Call, Call]:
    q, k, v, do = x

    def call(attend: Callable[..., Tensor]) -> Call:
        if q.requires_grad:
            return lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), do)
        return lambda: attend(q, k, v)

    return call(ours), call(torchs)


def full(n: int, dtype: torch.dtype, gradients: bool) -> tuple[Call, Call]:
    return _pair(attention, F.scaled_dot_product_attention, tensors(n, dtype, gradients))


def causal(n: int, dtype: torch.dtype, gradients: bool) -> tuple[Call, Call]:
    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return _pair(lambda q, k, v: attention(q, k, v, mask=Causal()), torchs, tensors(n, dtype, gradients))


def _masked(mask: Mask, n: int, dtype: torch.dtype, gradients: bool) -> tuple[Call, Call]:
    """A mask that torch takes as a dense bool tensor, made before anything is timed."""
    dense = mask.to_dense(n, n)

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense)

    return _pair(lambda q, k, v: attention(q, k, v, mask=mask), torchs, tensors(n, dtype, gradients))


def window(n: int, dtype: torch.dtype, gradients: bool) -> tuple[Call, Call]:
    return _masked(SlidingWindow(255, 0), n, dtype, gradients)


def documents(n: int, dtype: torch.dtype, gradients: bool) -> tuple[Call, Call]:
    cu_seqlens = torch.arange(0, n + 1, n // 8)
    return _masked(Documents(cu_seqlens=cu_seqlens, within=Causal("top_left")), n, dtype, gradients)


def three_dims(n: int, dtype: torch.dtype, gradients: bool) -> tuple[Call, Call]:
    x = tensors(n, dtype, gradients, (HEADS,))
    return _pair(scaled_dot_product_attention, F.scaled_dot_product_attention, x)


def mask_of_three_dims(n: int, dtype: torch.dtype, gradients: bool) -> tuple[Call, Call]:
    mask = torch.ones(HEADS, n, n, dtype=torch.bool).tril()

    def with_mask(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: attend(q, k, v, attn_mask=mask)

    ours, torchs = with_mask(scaled_dot_product_attention), with_mask(F.scaled_dot_product_attention)
    return _pair(ours, torchs, tensors(n, dtype, gradients))


def tiny(n: int, dtype: torch.dtype, gradients: bool) -> tuple[Call, Call]:
    """A hundred calls of the smallest size, so that the clock's own cost does not show."""
    x = tensors(n, dtype, gradients)
    ours, torchs = _pair(scaled_dot_product_attention, F.scaled_dot_product_attention, x)

    def hundred(call: Call) -> Call:
        def run() -> None:
            for _ in range(100):
                call()

        return run

    return hundred(ours), hundred(torchs)


def targets() -> list[Target]:
    """All of them, in the order of the page."""
    found = []
    for name, build in (("full", full), ("causal", causal)):
        for n in (512, 1024, 2048, 4096):
            par = 0.95 if n <= 1024 else 0.98
            found += [Target(name, n, FP32, False, par, build), Target(name, n, FP32, True, par, build)]
            found += [Target(name, n, BF16, False, par, build), Target(name, n, BF16, True, 0.8, build)]
    for n, forward, both in ((2048, 4.0, 3.5), (4096, 8.5, 6.0)):
        found += [Target("window 256", n, FP32, False, forward, window), Target("window 256", n, FP32, True, both, window)]
    found += [Target("8 documents", 2048, FP32, False, 7.0, documents)]
    found += [Target("8 documents", 2048, FP32, True, 6.0, documents)]
    for name, build in (("3-D inputs", three_dims), ("3-D mask", mask_of_three_dims)):
        for n in (1024, 2048, 4096):  # torch holds whole score matrices here: the longer, the more they cost
            bound = 2.5 if n == 4096 else None
            found.append(Target(name, n, FP32, False, bound, build))
            found.append(Target(name, n, FP32, True, bound if build is mask_of_three_dims else None, build))
    found += [Target("tiny call", 8, FP32, gradients, 20.0, tiny, overhead=True) for gradients in (False, True)]
    return found


def run(chosen: list[Target], seconds: float) -> Iterator[Row]:
    """Rows as they are ready; about `seconds` in all."""
    share = seconds / len(chosen)
    for t in chosen:
        ours, torchs = t.build(t.length, t.dtype, t.gradients)
        with torch.set_grad_enabled(t.gradients):
            with timing.threads(1):
                times = timing.interleave({"fastattn": ours, "torch": torchs}, share * 0.7)
            wall = None
            if not t.overhead:
                with timing.threads(2):
                    both = timing.interleave({"fastattn": ours, "torch": torchs}, share * 0.3)
                wall = timing.ratio(both["fastattn"], both["torch"], wall=True)
        found = Row(t, times["fastattn"], times["torch"], wall)
        if t.overhead:
            per_call = [timing.Times(*(tuple(s / 100 for s in xs) for xs in (x.seconds, x.wall))) for x in times.values()]
            found = Row(t, per_call[0], per_call[1], None)
        yield found
