"""What the backward's kernels of the Triton backend know of rows beside their operands."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import backward as backward_kernels
from ..kernels.launch import Launch, padded
from ..problem import Problem
from . import triton_call
from .triton_call import PAD, cdiv, on_device, reachable, strides_of


class Statistics(NamedTuple):
    """What the backward's kernels know of rows beside their operands."""

    do: Tensor
    delta: Tensor  # (B, H, n_pad)
    lse2: Tensor
    dlse: Tensor | None


def statistics(p: Problem, do: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, out_lo: Tensor) -> Statistics:
    """delta and lse in base 2, by kernel."""
    do = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape) if do is None else reachable(do)
    n_pad = cdiv(p.n_q, PAD) * PAD
    delta, lse2 = (torch.empty(p.n_b, p.n_h, n_pad, dtype=torch.float32, device=out.device) for _ in range(2))
    low = out_lo if out_lo.numel() else None
    out = reachable(out)
    dlse = None if dlse is None else dlse.contiguous()
    strides = (do.stride(), out.stride(), strides_of(low, 4))
    block = 16 if padded(p.v_dim) >= 256 else 64
    with on_device(p.q):
        triton_call.run(
            backward_kernels.row_delta, n_pad // block * p.n_b * p.n_h, Launch(block, 0, 4, 1),
            do, out, low, lse.contiguous(), dlse, delta, lse2, strides, p.n_q, n_pad, p.n_h, p.v_dim, padded(p.v_dim), block,
        )  # fmt: skip
    return Statistics(do, delta, lse2, dlse)
