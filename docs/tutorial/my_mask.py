"""Two masks in one file: chunks that look back, as row spans, and keys at a stride of each head's own, as a predicate."""

import torch

import fastattn as fa
from fastattn.kernels.shim import jit, tl  # noqa: F401  (Triton's interpreter wants tl in the module)


class ChunksBack(fa.Mask):
    """A row sees its own chunk of keys, to the chunk's end, and `back` chunks before it: streaming speech.

    Args:
        size: keys per chunk, at least 1. back: at least 0.
    """

    def __init__(self, size, back):
        if size < 1 or back < 0:
            raise ValueError(f"ChunksBack takes a size of at least 1 and a back of at least 0, got {size} and {back}")
        self._set(size=size, back=back)

    def span_of(self, row, n_q, n_k):
        chunk = row // self.size
        return (chunk - self.back) * self.size, (chunk + 1) * self.size

    def lower(self, n_q, n_k, device="cpu"):
        row = torch.arange(n_q, dtype=torch.int32, device=device)
        start, stop = self.span_of(row, n_q, n_k)
        return fa.Spans(start, stop).lower(n_q, n_k, device)


def every_nth(b, h, q_idx, k_idx):
    return (q_idx - k_idx) % (h + 1) == 0


@jit
def every_nth_on_device(b, h, q_idx, k_idx):
    return (q_idx - k_idx) % (h + 1) == 0


def strided_heads():
    """Causal, and head h sees every (h + 1)-th key back from the row itself."""
    return fa.Custom(every_nth, every_nth_on_device, bounds=fa.Causal("top_left"))
