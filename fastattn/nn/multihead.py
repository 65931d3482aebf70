"""torch.nn.MultiheadAttention with fastattn inside.

    MultiHead(Q, K, V) = concat_h(attention(Q Wq_h, K Wk_h, V Wv_h)) Wo

Parameters, their initialisation, state_dict and attributes are inherited; the forward pass is ours in every mode.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import _run, autocasting, problem
from ..masks import Mask
from ..problem import Problem
from ..scores import Score
from ..weights import dropped, shares
from .errors import RANK_OF_QUERY, ArgumentError
from .ragged import ragged_forward
from .torch_masks import check_dtype, converted


class MultiheadAttention(nn.MultiheadAttention):
    """Drop-in for `torch.nn.MultiheadAttention`: the same arguments, parameters, draws from the generator and state_dict.

    What differs: a row whose keys are all masked gives zeros, with weights of zero, instead of NaN; everything has two
    derivatives; the output costs O(L) memory whether or not weights are asked for; nested tensors are accepted in every mode.
    Dropout draws its own bits.

    Args:
        embed_dim: total size of the model, a multiple of num_heads.
        num_heads: heads; each has embed_dim // num_heads features.
        dropout: probability that a weight is dropped while training, in [0, 1].
        bias: whether the projections have biases.
        add_bias_kv: whether a learned key and value is added to every sequence.
        add_zero_attn: whether a key and value of zeros is added.
        kdim, vdim: features of key and of value; embed_dim by default.
        batch_first: whether tensors are (N, L, E) instead of (L, N, E).
        device, dtype: of the parameters.

    Raises:
        ValueError: a size is not positive, embed_dim is no multiple of num_heads, or dropout is no probability.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, n in (("embed_dim", embed_dim), ("num_heads", num_heads), ("kdim", kdim), ("vdim", vdim)):
            if n is not None and not isinstance(n, int):
                raise TypeError(f"{name} must be an int, got {n!r}")
            if n is not None and n <= 0:
                raise ArgumentError(f"{name} must be greater than 0, got {n}")
        if embed_dim % num_heads:
            raise ArgumentError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}")
        if not 0.0 <= dropout <= 1.0:
            raise ArgumentError(f"dropout must be a probability, got {dropout}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the projected query to the projected key and value.

        Args:
            query: (L, N, E), with batch_first (N, L, E), or (L, E) without a batch; or nested, of N entries (L, E).
            key: (S, N, kdim) or as query. value: (S, N, vdim) or as query.
            key_padding_mask: (N, S), or (S,) without a batch: bool, True hides the key, or float, added to the scores.
            need_weights: also return the weights. They never change the output, and cost nothing in the backward pass
                unless they are used.
            attn_mask: (L, S) or (N * num_heads, L, S): bool, True hides, or float, added to the scores.
            average_attn_weights: return the weights averaged over heads.
            is_causal: says that attn_mask is the causal mask. On the CPU the mask itself decides, since it can be read; on
                other devices and under torch.compile the word is taken for it, and the mask not looked at.
                Of nested tensors, which take no attn_mask: hide what follows a row in its own sequence.

        Returns:
            (output, weights): output as query, with embed_dim features; weights None, (N, L, S), or (N, num_heads, L, S)
            without averaging, less N where there is no batch, after dropout. Keys that add_bias_kv and add_zero_attn add
            come last. Of nested tensors, the weights are padded with zeros.

        Raises:
            TypeError: query, key or value is no tensor.
            ValueError: an argument's shape or dtype does not fit, or is_causal came without attn_mask. It is an
                AssertionError and a RuntimeError too, which are torch's errors for these.
            NotImplementedError: torch.jit.trace is recording.
        """
        if torch.jit.is_tracing():
            raise NotImplementedError(
                "torch.jit.trace cannot record fastattn.nn.MultiheadAttention; torch.export.export and torch.compile can"
            )
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        if query.is_nested or key.is_nested or value.is_nested:
            return ragged_forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = self._check_inputs(query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise ArgumentError("attn_mask must be given where is_causal is True: is_causal only says what it holds")
        if not batched:
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        q, k, v = self.projected(query, key, value, 0 if self.batch_first and batched else 1 if batched else None)
        n_b, n_h, n_q, _ = q.shape
        mask, scores = converted(
            attn_mask, key_padding_mask, is_causal, n_b, n_h, n_q, k.shape[2], 0 if self.bias_k is None else 1
        )
        if self.bias_k is not None and self.bias_v is not None:
            added = (self.heads(x).expand(n_b, -1, -1, -1).to(q.dtype) for x in (self.bias_k, self.bias_v))
            k, v = (torch.cat((x, last), 2) for x, last in zip((k, v), added))
        p, out = self.attended(q, k, v, mask, scores)
        out = out.transpose(1, 2).flatten(2)  # (N, L, E)
        if not batched:
            out = out[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        w = None
        if need_weights:
            w = self.shown(p, average_attn_weights).to(p.q.dtype)
            w = w if batched else w[0]
        return self.out_proj(out), w

    def attended(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scores: tuple[Score, ...] = ()
    ) -> tuple[Problem, Tensor]:  # fmt: skip
        """(problem, output (N, H, L, D)) of projected and split q, k, v."""
        # a key of zeros has the logit 0 and the value 0: a sink
        sinks = q.new_zeros(self.num_heads) if self.add_zero_attn else None
        dropout_p = self.dropout if self.training else 0.0
        p = problem(q, k, v, mask, scores, sinks, None, dropout_p if dropout_p < 1.0 else 0.0, None, None, None)
        out, _ = _run(p)
        return p, out if dropout_p < 1.0 else out * 0.0

    def shown(self, p: Problem, average: bool) -> Tensor:
        """The weights of a problem after dropout, that of zeros behind those of the keys: (N, H, L, S), averaged (N, L, S)."""
        w = shares(p)
        w, zero = dropped(p, w[..., : p.n_k]), w[..., p.n_k :]
        if self.training and self.dropout >= 1.0:
            w = w * 0.0
        if p.sinks is not None:  # its value is zero: dropping it would change nothing
            w = torch.cat((w, zero), 3)
        return w.mean(1) if average else w

    def projected(self, query: Tensor, key: Tensor, value: Tensor, batch_dim: int | None) -> list[Tensor]:
        """q, k and v as (N, H, L, D): views of the projections, one for all where the inputs are one."""
        n = self.embed_dim
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is None:
            weights_ = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            flat = [_linear(x, w, b) for x, w, b in zip((query, key, value), weights_, biases)]
        elif query is key and key is value:
            flat = list(_linear(query, weight, bias).chunk(3, -1))
        elif key is value:
            parts = (None, None) if bias is None else bias.split((n, 2 * n))
            w_q, w_kv = weight.split((n, 2 * n))
            flat = [_linear(query, w_q, parts[0]), *_linear(key, w_kv, parts[1]).chunk(2, -1)]
        else:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            flat = [_linear(x, w, b) for x, w, b in zip((query, key, value), weight.chunk(3), biases)]
        if batch_dim is None:
            flat, batch_dim = [x[None] for x in flat], 0
        return [self.heads(x if batch_dim == 0 else x.transpose(0, 1)) for x in flat]

    def heads(self, x: Tensor) -> Tensor:
        """(N, L, E) as (N, H, L, D), a view."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _check_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> bool:
        """Whether the call has a batch dimension.

        Raises:
            ArgumentError: shapes or dtypes do not fit each other or the module.
        """
        rank = query.dim()
        if rank not in (2, 3):
            raise ArgumentError(f"{RANK_OF_QUERY} but received {rank}-D query tensor")
        given = f"with a {rank}-D query, expected"
        if key.dim() != rank or value.dim() != rank:
            got = f"{key.dim()}-D and {value.dim()}-D"
            raise ArgumentError(f"{given} `key` and `value` to be {rank}-D but found {got} tensors respectively")
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None:
                check_dtype(name, mask)
        if key_padding_mask is not None and key_padding_mask.dim() != rank - 1:
            got = f"{key_padding_mask.dim()}-D"
            raise ArgumentError(f"{given} `key_padding_mask` to be `None` or {rank - 1}-D but found {got} tensor instead")
        if attn_mask is not None and attn_mask.dim() not in (2, 3):
            got = f"{attn_mask.dim()}-D"
            raise ArgumentError(f"{given} `attn_mask` to be `None`, 2-D or 3-D but found {got} tensor instead")
        inputs = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        dtype = self.out_proj.weight.dtype
        for name, x, features in inputs:
            if x.shape[-1] != features:
                raise ArgumentError(f"{name} must have {features} features, got shape {tuple(x.shape)}")
            if x.dtype != dtype and not autocasting(x.device):
                raise ArgumentError(f"{name} must have the parameters' dtype {dtype}, got {x.dtype}")
        if key.shape[:-1] != value.shape[:-1]:
            got = f"{tuple(key.shape)} and {tuple(value.shape)}"
            raise ArgumentError(f"key and value must have one length and batch, got {got}")
        batch_dim = 0 if self.batch_first else 1
        if rank == 3 and query.shape[batch_dim] != key.shape[batch_dim]:
            raise ArgumentError(f"query and key must have one batch size, got {tuple(query.shape)} and {tuple(key.shape)}")
        return rank == 3


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None and bias.dtype != x.dtype and not autocasting(x.device):
        return F.linear(x, weight) + bias
    return F.linear(x, weight, bias)

