"""Attention modules of transformers that compute their own softmax and ask no interface: the same with fastattn inside.

    MPNet       s = q . k / sqrt(D) + learned position bias + mask
    XLNet       s = ((q + b_w) . k + shifted (q + b_r) . r + segments) / sqrt(D), in two streams
    DeBERTa-v2  s = q . k / sqrt(n D) + content-to-position and position-to-content, n = 1 + how many of these

What depends on pairs of positions becomes a Bias, whose gradient reaches the model's own parameters. Each class here is a
subclass of the host's, so that an instance changes sides by its class alone: parameters, hooks and names stay.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import _run, problem
from ..masks import Dense, LoweredMask, Mask
from ..scores import Bias, Score
from ..weights import dropped, weights
from . import ledger

PREFIX = "Fastattn"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | LoweredMask | None = None,
    score: Sequence[Score] = (),
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    wanted: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`fastattn.attention` and, if wanted, its weights (B, Hq, Lq, Lk) under the same dropout, in q's dtype."""
    p = problem(q, k, v, mask, score, sinks, scale, dropout_p, None, None, None)
    out, _ = _run(p)
    return out, dropped(p, weights(p)).to(q.dtype) if wanted else None


def dropout_of(module: Any) -> float:
    """The probability with which a module's nn.Dropout drops now."""
    return module.dropout.p if module.training else 0.0


def unexpanded(x: Tensor) -> Tensor:
    """x with size 1 where it was only expanded: the gradient is summed before it is formed."""
    index = tuple(slice(0, 1) if stride == 0 and n > 1 else slice(None) for n, stride in zip(x.shape, x.stride()))
    return x[index]


def mpnet(self, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **kwargs):
    """MPNetSelfAttention.forward."""
    ledger.took("convert MPNetSelfAttention")
    shape = (*hidden_states.shape[:-1], self.num_attention_heads, self.attention_head_size)
    q, k, v = (project(hidden_states).view(shape).transpose(1, 2) for project in (self.q, self.k, self.v))
    chain = [Bias(unexpanded(x)) for x in (position_bias, attention_mask) if x is not None]
    out, w = attend(q, k, v, score=chain, dropout_p=dropout_of(self), wanted=output_attentions)
    out = self.o(out.transpose(1, 2).flatten(2))
    return (out, w) if output_attentions else (out,)


def xlnet(self, q_head, k_head_h, v_head_h, k_head_r, seg_mat=None, attn_mask=None, output_attentions=False):
    """XLNetRelativeAttention.rel_attn_core. Heads are (L, B, H, D), attn_mask (Lq, Lk, B, 1) is 1 where hidden."""
    ledger.took("convert XLNetRelativeAttention")
    n_k = k_head_h.shape[0]
    pairs = torch.einsum("ibnd,jbnd->bnij", q_head + self.r_r_bias, k_head_r)
    pairs = self.rel_shift_bnij(pairs, klen=n_k)
    if seg_mat is not None:
        by_segment = torch.einsum("ibnd,snd->ibns", q_head + self.r_s_bias, self.seg_embed)
        pairs = pairs + torch.einsum("ijbs,ibns->bnij", seg_mat, by_segment)
    chain = [Bias(pairs * self.scale)]
    if attn_mask is not None:
        hidden = 65500.0 if attn_mask.dtype == torch.float16 else 1e30
        chain.append(Bias(-hidden * attn_mask.permute(2, 3, 0, 1)))
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_head + self.r_w_bias, k_head_h, v_head_h))
    out, w = attend(q, k, v, score=chain, scale=self.scale, dropout_p=dropout_of(self), wanted=output_attentions)
    out = out.permute(2, 0, 1, 3)
    return (out, w.permute(2, 3, 0, 1)) if w is not None else out


def deberta_v2(
    self, hidden_states, attention_mask, output_attentions=False, query_states=None, relative_pos=None, rel_embeddings=None
):
    """DebertaV2's DisentangledSelfAttention.forward. attention_mask is (B, 1, Lq, Lk), nonzero where visible."""
    ledger.took("convert DisentangledSelfAttention")
    n_h = self.num_attention_heads
    rows = hidden_states if query_states is None else query_states
    inputs = ((self.query_proj, rows), (self.key_proj, hidden_states), (self.value_proj, hidden_states))
    flat = [self.transpose_for_scores(project(x), n_h) for project, x in inputs]  # (B * H, L, D) each
    q, k, v = (x.unflatten(0, (-1, n_h)) for x in flat)
    parts = 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)
    chain: list[Score] = []
    if self.relative_attention:
        pairs = self.disentangled_attention_bias(flat[0], flat[1], relative_pos, self.pos_dropout(rel_embeddings), parts)
        if isinstance(pairs, Tensor):
            chain.append(Bias(pairs.unflatten(0, (-1, n_h))))
    out, w = attend(
        q, k, v, mask=Dense(attention_mask.bool()), score=chain, scale=(q.shape[-1] * parts) ** -0.5,
        dropout_p=dropout_of(self), wanted=output_attentions,
    )  # fmt: skip
    return out.transpose(1, 2).flatten(2), w


# (module of the host, class, method that is replaced, its replacement)
KNOWN: tuple[tuple[str, str, str, Callable[..., Any]], ...] = (
    ("transformers.models.mpnet.modeling_mpnet", "MPNetSelfAttention", "forward", mpnet),
    ("transformers.models.xlnet.modeling_xlnet", "XLNetRelativeAttention", "rel_attn_core", xlnet),
    ("transformers.models.deberta_v2.modeling_deberta_v2", "DisentangledSelfAttention", "forward", deberta_v2),
)


def replacement(cls: type) -> type | None:
    """The subclass of `cls` that computes the same by fastattn, or None where there is none."""
    for module, name, _, _ in KNOWN:
        if cls.__module__ == module and cls.__qualname__ == name:
            return _made(module, name)
    return None


def _made(module: str, name: str) -> type:
    """The replacement of a known class, made once; found again by its name, so that models can be pickled."""
    key = f"{PREFIX}{name}"
    if key not in globals():
        method, fn = next((method, fn) for m, n, method, fn in KNOWN if (m, n) == (module, name))
        base = getattr(importlib.import_module(module), name)
        globals()[key] = type(key, (base,), {method: fn, "__module__": __name__, "__doc__": f"{name} with fastattn inside."})
    return globals()[key]


def __getattr__(key: str) -> Any:
    for module, name, _, _ in KNOWN:
        if key == f"{PREFIX}{name}":
            return _made(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {key!r}")
