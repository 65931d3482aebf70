"""The masks of torch.nn.MultiheadAttention, where True hides, as fastattn's masks and scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import compat
from ..masks import Causal, Dense, Mask
from ..masks.checks import readable
from ..scores import Bias, Score
from .errors import ArgumentError


def converted(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool, n_b: int, n_h: int, n_q: int, n_k: int,
    extra: int,
) -> tuple[Mask | None, tuple[Score, ...]]:  # fmt: skip
    """The two masks of a batched call as (mask, scores).

    Args:
        attn_mask: (L, S) or (N * H, L, S), bool (True hides) or float (added). key_padding_mask: (N, S), the same.
        is_causal: whether the caller says that attn_mask is the causal mask; believed where that cannot be read for free.
        n_b, n_h, n_q, n_k: sizes of the call. extra: keys behind the n_k that the masks know, which every row sees.

    Raises:
        ArgumentError: a mask's shape does not fit.
    """
    mask: Mask | None = None
    scores: list[Score] = []
    if attn_mask is not None:
        _check_attn_mask(attn_mask, n_b, n_h, n_q, n_k)
        if is_causal and extra == 0 and not _is_known(attn_mask):
            mask = Causal("top_left")
        else:
            leading = (n_b, n_h) if attn_mask.dim() == 3 else (1, 1)
            mask = _add(attn_mask.reshape(*leading, n_q, n_k), extra, mask, scores)
    if key_padding_mask is not None:
        if key_padding_mask.shape != (n_b, n_k):
            raise ArgumentError(f"key_padding_mask must have shape {(n_b, n_k)}, got {tuple(key_padding_mask.shape)}")
        mask = _add(key_padding_mask[:, None, None], extra, mask, scores)
    return mask, tuple(scores)


def _add(x: Tensor, extra: int, mask: Mask | None, scores: list[Score]) -> Mask | None:
    """`mask` joined with what x (N|1, H|1, L|1, S) hides; what x adds goes into `scores`."""
    visible = x.logical_not() if x.dtype == torch.bool else _as_visible(x)
    if visible is None:
        scores.append(Bias(F.pad(x, (0, extra)) if extra else x))
        return mask
    shown = Dense(F.pad(visible, (0, extra), value=True) if extra else visible)
    return shown if mask is None else mask & shown


def _as_visible(x: Tensor) -> Tensor | None:
    """A float mask of zeros and -inf as a bool one, True where visible; None for any other, and where looking costs."""
    if not _is_known(x) or (x.requires_grad and torch.is_grad_enabled()):
        return None
    hidden = x == -torch.inf
    return hidden.logical_not() if bool(((x == 0.0) | hidden).all()) else None


def _is_known(x: Tensor) -> bool:
    """Whether x's values can be read here and now, and are all there is to it."""
    return readable(x) and not compat.in_functorch() and not compat.in_forward_mode()


def check_dtype(name: str, x: Tensor) -> None:
    """Raise unless a mask is a bool or a float tensor."""
    if not isinstance(x, Tensor) or not (x.dtype == torch.bool or x.is_floating_point()):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentError(f"{name} must be a bool or floating point Tensor, got {got}")


def _check_attn_mask(x: Tensor, n_b: int, n_h: int, n_q: int, n_k: int) -> None:
    accepted = ((n_q, n_k), (n_b * n_h, n_q, n_k))
    if not any(len(shape) == x.dim() and all(a == b for a, b in zip(x.shape, shape)) for shape in accepted):
        raise ArgumentError(f"Expected `attn_mask` shape to be {accepted[1]} or {accepted[0]} but got {tuple(x.shape)}")
