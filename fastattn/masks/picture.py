"""Pictures of one (n_q, n_k) plane of a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VISIBLE, HIDDEN, PARTIAL = "█", "·", "▒"


def text(plane: Tensor, width: int) -> str:
    """Characters for the tiles of a bool plane (n_q, n_k), at most `width` per line; rows use the same tile size.

    Visible, hidden, or, where a tile holds both, partial.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    n_q, n_k = plane.shape
    tile = max(1, -(-max(n_q, n_k) // width))
    lines = []
    for rows in plane.split(tile):
        tiles = [(bool(x.all()), bool(x.any())) for x in rows.split(tile, 1)] if n_q and n_k else []
        lines.append("".join(VISIBLE if all_ else PARTIAL if any_ else HIDDEN for all_, any_ in tiles))
    legend = f"{VISIBLE} visible  {HIDDEN} hidden"
    if tile > 1:
        legend += f"  {PARTIAL} both  ({tile} x {tile} per character)"
    share = plane.double().mean().item() if plane.numel() else 0.0
    return "\n".join([*lines, f"{legend}  {share:.1%} visible"])


def plot(plane: Tensor, ax: Any = None, title: str = "") -> Any:
    """Draw a bool plane (n_q, n_k) on a matplotlib axis."""
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots()
    ax.imshow(
        plane.to(torch.uint8).cpu().numpy(), cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest", aspect="auto"
    )
    ax.set(xlabel="k_idx", ylabel="q_idx", title=title)
    return ax
