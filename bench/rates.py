"""Raw rates on a GPU, back to back on a warm cache: python -m fastattn.bench.rates [BACKEND ...]

Causal and full attention in bfloat16, 16k tokens of hidden size 2048, forward and backward, by torch's two fused kernels and by
backends of ours ("triton" by default); then a learned bias beside torch's memory-efficient kernel. A figure is the middle one
of three averages over up to 60 calls. Everything is compared with float64 on short inputs first. The suites of
`python -m fastattn bench` measure more carefully and take longer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import Bias, Causal, Full, attention
from .accuracy import distance

TORCHS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
TOKENS, SIZES, LENGTHS = 16384, ((128, 16), (64, 32)), (8192, 2048)  # sizes: head_dim and heads


def seconds(call: Callable[[], Any]) -> float:
    """Of one call, once it is compiled."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def average(n: int) -> float:
        begin.record()
        for _ in range(n):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / n / 1e3

    call()
    torch.cuda.synchronize()
    n = max(3, min(60, int(0.12 / max(average(2), 1e-6))))
    return sorted(average(n) for _ in range(3))[1]


def tensors(n_b: int, n: int, n_h: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and do, (n_b, n_h, n, head_dim) over (n_b, n, n_h, head_dim) storage."""
    q, k, v, do = (torch.randn(n_b, n, n_h, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do


def attend(who: str, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """What is timed."""
    if who in TORCHS:
        with sdpa_kernel(TORCHS[who]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return attention(q, k, v, mask=Causal() if causal else Full(), backend=who)


def errors(who: str, head_dim: int, causal: bool) -> list[str]:
    """Relative L2 errors of o, dq, dk and dv against float64."""
    q, k, v, do = tensors(2, 300, 4, head_dim)

    def all_four(q: Tensor, k: Tensor, v: Tensor, do: Tensor, own: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        o = own(q, k, v)
        return (o, *torch.autograd.grad(o, (q, k, v), do))

    def textbook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT / head_dim**0.5
        hidden = torch.ones_like(s[0, 0], dtype=torch.bool).triu(1)
        return (s.masked_fill(hidden, -torch.inf) if causal else s).softmax(-1) @ v

    wide_q, wide_k, wide_v = (x.detach().double().requires_grad_() for x in (q, k, v))
    exact = all_four(wide_q, wide_k, wide_v, do.double(), textbook)
    found = all_four(q, k, v, do, lambda q, k, v: attend(who, q, k, v, causal))
    return [f"{distance(a, b):.1e}" for a, b in zip(found, exact, strict=True)]


def rates(who: str, head_dim: int, n_h: int, n: int, causal: bool) -> str:
    """TFLOP/s of forward and backward, in the field's convention."""
    n_b = TOKENS // n
    q, k, v, do = tensors(n_b, n, n_h, head_dim)
    work = 4.0 * n_b * n_h * n * n * head_dim * (0.5 if causal else 1.0)
    with torch.no_grad():
        forward = seconds(lambda: attend(who, q, k, v, causal))
    o = attend(who, q, k, v, causal)
    backward = seconds(lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True))
    return f"forward {work / forward / 1e12:6.1f} TFLOP/s  backward {2.5 * work / backward / 1e12:6.1f} TFLOP/s"


def with_bias(who: str) -> str:
    """Milliseconds with a learned bias (1, 16, 4096, 4096), and of the backward with its gradient."""
    n_b, n_h, n, head_dim = 2, 16, 4096, 64
    q, k, v, do = tensors(n_b, n, n_h, head_dim)
    bias = torch.randn(1, n_h, n, n, device="cuda", dtype=torch.bfloat16).requires_grad_()

    def call() -> Tensor:
        if who == "triton":
            return attention(q, k, v, score=Bias(bias), backend=who)
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(n_b, n_h, n, n))

    with torch.no_grad():
        forward = seconds(call)
    o = call()
    backward = seconds(lambda: torch.autograd.grad(o, (q, k, v, bias), do, retain_graph=True))
    return f"forward {1e3 * forward:.2f} ms  backward {1e3 * backward:.2f} ms"


def main(backends: list[str]) -> int:
    """Print a line per figure; 2 without a GPU."""
    if not torch.cuda.is_available():
        print("fastattn.bench.rates needs a CUDA device", file=sys.stderr)
        return 2
    print(torch.__version__, torch.cuda.get_device_name())
    for who in backends:
        for head_dim, _ in SIZES:
            for causal in (True, False):
                print(f"{who} d{head_dim} {_kind(causal)}: errors of o, dq, dk, dv", *errors(who, head_dim, causal), flush=True)
    for head_dim, n_h in SIZES:
        for n in LENGTHS:
            for causal in (False, True):
                for who in (*TORCHS, *backends):
                    print(f"d{head_dim} L{n} {_kind(causal)} {who:10}", rates(who, head_dim, n_h, n, causal), flush=True)
    for who in ("efficient", "triton"):
        print(f"bias d64 L4096 {who:10}", with_bias(who), flush=True)
    return 0


def _kind(causal: bool) -> str:
    return "causal" if causal else "full"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:] or ["triton"]))
