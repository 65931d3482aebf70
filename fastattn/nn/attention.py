"""A modern attention block: one packed projection, read in place.

    out = Wo attention(rope(norm(Wq x)), rope(norm(Wk x)), Wv x)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..coords import Coordinates
from ..functional import MaskLike, attention, checked_scale, lowered_mask
from ..masks import Bound, Causal, LoweredMask, Mask, SlidingWindow
from ..masks.algebra import intersect
from ..scores import Score, Softcap
from ..weights import attention_weights
from .cache import Cache, DynamicCache
from .errors import check_sizes
from .positions import Rotary


class Attention(nn.Module):
    """Self-attention, or with `context_dim` attention to another sequence, of (B, L, dim).

    Args:
        dim: features of the input and the output.
        n_heads: query heads. n_kv_heads: key and value heads, a divisor; n_heads by default.
        head_dim: features of a head; dim // n_heads by default.
        context_dim: features of the sequence attended to; None for self-attention.
        causal: whether rows see no keys behind themselves. window: how many keys to each side a row sees, itself included.
        rotary: a `Rotary` for queries and keys.
        qk_norm: whether the queries and keys of every head are divided by their root mean square, with a learned scale.
        softcap: cap * tanh(s / cap) on every logit, before other scores.
        score: a Score, or a module that gives one when called (`ALiBiSlopes`, `T5Buckets`), or several.
        sinks: whether every head has a learned logit that joins the softmax's denominator.
        scale: of the logits; 1 / sqrt(head_dim) by default.
        dropout: of the weights, while training.
        bias: whether the projections have biases.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: a size is no positive int, sizes do not fit each other, or an option excludes another.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        causal: bool = False,
        window: int | None = None,
        rotary: Rotary | None = None,
        qk_norm: bool = False,
        softcap: float | None = None,
        score: Any = (),
        sinks: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        check_sizes(dim=dim, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, context_dim=context_dim, window=window)
        if n_heads % n_kv_heads:
            raise ValueError(f"n_heads must be a multiple of n_kv_heads, got {n_heads} and {n_kv_heads}")
        if head_dim is None and dim % n_heads:
            raise ValueError(f"dim must be divisible by n_heads where head_dim is not given, got {dim} and {n_heads}")
        head_dim = dim // n_heads if head_dim is None else head_dim
        if not isinstance(causal, bool):
            raise TypeError(f"causal must be True or False, got {causal!r}")
        if rotary is not None and not isinstance(rotary, Rotary):
            raise TypeError(f"rotary must be a Rotary or None, got {type(rotary).__name__}")
        if rotary is not None and rotary.head_dim != head_dim:
            raise ValueError(f"rotary must be for head_dim {head_dim}, got {rotary.head_dim}")
        if context_dim is not None and (causal or window is not None or rotary is not None):
            raise ValueError("causal, window and rotary are for self-attention; with context_dim they must be left out")
        if not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")
        checked_scale(scale, head_dim)
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.dim, self.n_heads, self.n_kv_heads, self.head_dim = dim, n_heads, n_kv_heads, head_dim
        self.context_dim, self.causal, self.window = context_dim, causal, window
        self.scale, self.dropout = scale, dropout
        n_q, n_kv = n_heads * head_dim, 2 * n_kv_heads * head_dim
        if context_dim is None:
            self.qkv = nn.Linear(dim, n_q + n_kv, bias, **factory)
        else:
            self.q, self.kv = nn.Linear(dim, n_q, bias, **factory), nn.Linear(context_dim, n_kv, bias, **factory)
        self.out = nn.Linear(n_q, dim, bias, **factory)
        self.rotary = rotary
        self.q_norm = nn.RMSNorm(head_dim, **factory) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, **factory) if qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(n_heads, **factory)) if sinks else None
        self.softcap = None if softcap is None else Softcap(softcap)
        items = list(score) if isinstance(score, Sequence) else [score]
        for item in items:
            if not isinstance(item, (Score, nn.Module)):
                raise TypeError(f"score must hold Scores or modules that give one, got {type(item).__name__}")
        self.score_modules = nn.ModuleList(item for item in items if isinstance(item, nn.Module))
        self._scores = [item if isinstance(item, Score) else None for item in items]  # None: the next module's

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: MaskLike = None,
        score: Score | Sequence[Score] = (),
        positions: Tensor | None = None,
        is_causal: bool | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, L, dim).
            context: (B, Lk, context_dim), for attention to another sequence. May be None where `cache` holds it already.
            mask: as in `fastattn.attention`, over all keys, cached ones included; what `causal` and `window` hide stays hidden.
            score: further scores, after the module's.
            positions: (L,) or (B, L) for `rotary`, without which they must be left out; by default the rows follow what is
                cached.
            is_causal: in place of the module's `causal`.
            cache: takes this call's keys and values, and gives those of all before. With a context it must be a
                DynamicCache: filled by the first call, and read by those after it.

        Returns:
            (B, L, dim)
        """
        q, k, v, options = self._operands(x, context, mask, score, positions, is_causal, cache)
        dropout_p = self.dropout if self.training else 0.0
        o = attention(q, k, v, dropout_p=dropout_p, **options)
        return self.out(o.transpose(1, 2).flatten(2))

    def weights(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        rows: slice | Tensor | None = None,
        reduce: str | None = None,
        mask: MaskLike = None,
        score: Score | Sequence[Score] = (),
        positions: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The weights that `forward` uses for some rows, without dropout; see `fastattn.attention_weights`."""
        q, k, _, options = self._operands(x, context, mask, score, positions, is_causal, None)
        return attention_weights(q, k, rows=rows, reduce=reduce, **options)

    def _operands(self, x, context, mask, score, positions, is_causal, cache) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """q, k, v (B, H, L, D) and the other arguments of `attention`."""
        if not isinstance(x, Tensor) or x.is_nested or x.dim() != 3 or x.shape[2] != self.dim:
            got = f"{'nested ' if x.is_nested else ''}{tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a dense tensor of shape (batch, length, {self.dim}), got {got}")
        if positions is not None and self.rotary is None:
            raise ValueError("positions must be None without a rotary: nothing would depend on them")
        if cache is not None and (isinstance(cache, type) or not hasattr(cache, "update")):
            got = f"the class {cache.__name__}" if isinstance(cache, type) else type(cache).__name__
            raise TypeError(f"cache must be a Cache or None, got {got}")
        if is_causal is not None and not isinstance(is_causal, bool):
            raise TypeError(f"is_causal must be True, False or None, got {is_causal!r}")
        if not isinstance(score, (Score, Sequence)):
            raise TypeError(f"score must be a Score or several, got {type(score).__name__}")
        q, k, v, offset = self._cross(x, context, cache) if self.context_dim else self._self(x, context, positions, cache)
        causal = self.causal if is_causal is None else is_causal
        if causal and self.context_dim:
            raise ValueError("is_causal must be left out with context_dim: rows and keys are of different sequences")
        modules = iter(self.score_modules)
        chain: list[Score] = [] if self.softcap is None else [self.softcap]
        chain += [next(modules)() if item is None else item for item in self._scores]
        chain += [score] if isinstance(score, Score) else list(score)
        coords = None
        if isinstance(offset, Tensor):
            coords = Coordinates(q=offset[:, None] + torch.arange(q.shape[2], device=q.device, dtype=torch.int32))
        elif offset:
            coords = Coordinates(q=offset)
        options: dict[str, Any] = dict(
            mask=self._mask(mask, causal, q, k, offset), score=chain, sinks=self.sinks, scale=self.scale, coords=coords
        )
        return q, k, v, options

    def _self(self, x: Tensor, context: Tensor | None, positions: Tensor | None, cache: Cache | None):
        if context is not None:
            raise ValueError("context must be None for self-attention; build the module with context_dim to take one")
        heads = self.qkv(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, Hq + 2 Hkv, L, D), a view
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), 1)
        offset = 0 if cache is None else cache.offset
        q, k = self._prepared(q, self.q_norm, positions, offset), self._prepared(k, self.k_norm, positions, offset)
        if cache is None:
            return q, k, v, 0
        k, v, offset = cache.update(k, v)
        return q, k, v, offset

    def _cross(self, x: Tensor, context: Tensor | None, cache: Cache | None):
        q = self.q(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        q = q if self.q_norm is None else self.q_norm(q)
        if cache is not None and not isinstance(cache, DynamicCache):
            raise TypeError(f"cache must be a DynamicCache where there is a context, got {type(cache).__name__}")
        if cache is not None and cache.k is not None:
            return q, cache.k, cache.v, 0
        given = context if isinstance(context, Tensor) else None
        if given is None or given.dim() != 3 or given.shape[2] != self.context_dim or len(given) != len(x):
            got = tuple(given.shape) if given is not None else None if context is None else type(context).__name__
            raise ValueError(f"context must have shape ({len(x)}, length, {self.context_dim}), got {got}")
        k, v = self.kv(given).unflatten(2, (-1, self.head_dim)).transpose(1, 2).chunk(2, 1)
        k = k if self.k_norm is None else self.k_norm(k)
        if cache is not None:
            cache.update(k, v)
        return q, k, v, 0

    def _prepared(self, x: Tensor, norm: nn.Module | None, positions: Tensor | None, offset: int | Tensor) -> Tensor:
        x = x if norm is None else norm(x)
        return x if self.rotary is None else self.rotary(x, positions, offset)

    def _mask(self, mask: MaskLike, causal: bool, q: Tensor, k: Tensor, offset: int | Tensor) -> MaskLike:
        """What is visible of the keys that `mask` shows: no later ones where causal, those of the window, and of a cache those
        that are there."""
        n_q, n_k = q.shape[2], k.shape[2]
        left = None if self.window is None else self.window - 1
        right = 0 if causal else left
        own: Mask | LoweredMask | None = None
        if isinstance(offset, Tensor):
            start = Bound(0, 0) if left is None else Bound(1, offset - left)
            own = LoweredMask(n_q, n_k, ((start, Bound(0, offset + n_q) if right is None else Bound(1, offset + right + 1)),))
            if right:  # a row may not look past the tokens that are there
                filled = LoweredMask(n_q, n_k, ((Bound(0, 0), Bound(0, offset + n_q)),))
                own = intersect(own, filled, q.device)
        elif left is not None:
            own = SlidingWindow(left, right, align=offset)
        elif causal:
            own = Causal("top_left") if offset == 0 else Causal(offset)
        if mask is None or own is None:
            return own if mask is None else mask
        given = lowered_mask(mask, q.shape[0], q.shape[1], n_q, n_k, q.device)
        own = own.lower(n_q, n_k, q.device) if isinstance(own, Mask) else own
        return intersect(given, own, q.device)

    def extra_repr(self) -> str:
        parts = [f"{self.dim}, {self.n_heads}, n_kv_heads={self.n_kv_heads}, head_dim={self.head_dim}"]
        for name in ("causal", "window", "softcap", "scale", "dropout"):
            value = getattr(self, name)
            parts += [f"{name}={value}"] if value else []
        return ", ".join(parts)
