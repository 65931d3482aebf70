"""What the kernels' suites share. Importing this needs Triton."""

import cases
import torch
import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it in a function's module

import fastattn as fa

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def stripes(b, h, q_idx, k_idx):
    return (q_idx + k_idx + h) % 3 != 0


MASKS = {
    **cases.MASKS,
    "custom": lambda b, h, q, k: fa.Custom(cases.everything_but_diagonal_stripes, stripes) & fa.Causal("top_left"),
}
