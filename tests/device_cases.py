"""What the kernels' suites share. Importing this needs Triton."""

import cases
import torch
import triton
import triton.language as tl

import fastattn as fa

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def stripes(b, h, q_idx, k_idx):
    return (q_idx + k_idx + h) % 3 != 0


@triton.jit
def square(s, args):
    return s + s * s * args[0]


@triton.jit
def square_first(s, args):
    return 1 + 2 * s * args[0]


@triton.jit
def square_second(s, args):
    return s * 0 + 2 * args[0]


class Square(fa.Pointwise):
    """s + c s^2"""

    def __init__(self, c):
        self.floats = (c,)

    def value(self, s):
        return s + s * s * self.floats[0]

    def device_functions(self):
        return square, square_first, square_second


@triton.jit
def tilt(at, args):
    return tl.load(args[0]).to(tl.float32) * (at[2] + at[3]).to(tl.float32)


class Tilt(fa.Additive):
    """weight (q + k)"""

    def __init__(self, weight):
        self.params = (weight,)

    def canonical(self, n_b, n_h):
        return self.with_params((self.params[0].reshape(1, 1),))

    def term(self, tile):
        return self.params[0].to(tile.dtype)[..., None, None] * (tile.q + tile.k).to(tile.dtype)

    def device_functions(self):
        return (tilt,)


def checkerboard(n_h, n_q, n_k, size=64):
    """Squares of a board, visible and hidden in turn, the other way round for every second head."""
    h, q, k = torch.arange(n_h)[:, None, None], torch.arange(n_q)[:, None], torch.arange(n_k)
    return ((q // size + k // size + h) % 2 == 0)[None]


def documents(n_q, n_k):
    """Three documents as a bool tensor; the last rows are in none, and the keys of the second are seen by no row."""
    cut = torch.tensor([0.3, 0.45, 0.9])
    row, key = (torch.bucketize(torch.arange(n) / n, cut, right=True) for n in (n_q, n_k))
    return (row[:, None] == key) & (row != 3)[:, None] & (key != 1)


MASKS = {
    **cases.MASKS,
    "custom": lambda b, h, q, k: fa.Custom(cases.everything_but_diagonal_stripes, stripes) & fa.Causal("top_left"),
    "dense_documents": lambda b, h, q, k: fa.Dense(documents(q, k)) & fa.Causal("bottom_right"),
    "checkerboard": lambda b, h, q, k: fa.Dense(checkerboard(h, q, k))
    & (fa.SinkTokens(3) | fa.SlidingWindow(q // 2, 9, "top_left")),
    "dense_custom": lambda b, h, q, k: fa.Dense(checkerboard(1, q, k, 48))
    & fa.Custom(cases.everything_but_diagonal_stripes, stripes),
}
