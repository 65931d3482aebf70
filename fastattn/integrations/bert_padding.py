"""Between padded batches (B, L, ...) and packed rows (total, ...): the helpers that come with flash-attn, by their names."""

from __future__ import annotations

import torch
from torch import Tensor


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """The rows `indices` (n,) of x (rows, ...). The gradient of rows that are not named is 0."""
    return x.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, one sequence after another. Waits for the device: how many there are is a size.

    Args:
        hidden_states: (B, L, ...).
        attention_mask: (B, L), nonzero where there is a token.
        unused_mask: (B, L), nonzero where room is kept for a token that is not there yet.

    Returns:
        rows (total, ...) of tokens and room; their indices (total,) into (B * L); cu_seqlens int32 (B + 1,); the longest
        sequence, with its room; and int32 (B,) how many tokens a sequence has without it.

    Raises:
        ValueError: a mask has another shape.
    """
    for name, x in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if x is not None and x.shape != hidden_states.shape[:2]:
            raise ValueError(f"{name} must have shape {tuple(hidden_states.shape[:2])}, got {tuple(x.shape)}")
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(1, dtype=torch.int32)
    indices = torch.nonzero(kept.flatten()).flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest,
        attention_mask.sum(1, dtype=torch.int32),
    )  # fmt: skip


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`: rows (total, ...) at their indices of (batch, seqlen, ...), zeros elsewhere."""
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))
