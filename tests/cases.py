"""The registry that the suites share: every mask and every score by name, for calls of any size."""

import torch

import fastattn as fa


def everything_but_diagonal_stripes(b, h, q_idx, k_idx):
    return (q_idx + k_idx + h) % 3 != 0


def ids(n):
    """Documents of lengths 1, 2, 3, ... over n positions."""
    cuts = torch.arange(1, n + 2).cumsum(0)
    return torch.bucketize(torch.arange(n), cuts, right=True)


def cu_seqlens(n, parts=4):
    """`parts` documents of unequal length (one empty) that leave the last position out where n > 4."""
    last = n - 1 if n > 4 else n
    inner = [last * i * i // (parts * parts) for i in range(parts)]
    return torch.tensor([0, *inner, last], dtype=torch.int32)


def left_padding(n_b, n_k):
    start = torch.arange(n_b)[:, None] * n_k // (2 * n_b)
    return torch.arange(n_k)[None] >= start


def generator(*seed):
    return torch.Generator().manual_seed(hash(seed) % (2**31))


def dense(n_b, n_h, n_q, n_k):
    visible = torch.rand(n_b, n_h, n_q, n_k, generator=generator(n_q, n_k)) > 0.4
    visible[:, :, n_q // 2] = False  # a row that sees nothing
    return visible


# name -> (n_b, n_h, n_q, n_k) -> Mask
MASKS = {
    "full": lambda b, h, q, k: fa.Full(),
    "causal": lambda b, h, q, k: fa.Causal("top_left"),
    "shifted": lambda b, h, q, k: fa.Causal(-2),
    "bottom_right": lambda b, h, q, k: fa.Causal("bottom_right"),
    "window": lambda b, h, q, k: fa.SlidingWindow(q // 3, 0, "bottom_right"),
    "two_sided": lambda b, h, q, k: fa.SlidingWindow(q // 4, q // 5, "top_left"),
    "chunked": lambda b, h, q, k: fa.Chunked(max(1, q // 3), "top_left"),
    "prefix": lambda b, h, q, k: fa.PrefixLM(k // 3, "top_left"),
    "documents": lambda b, h, q, k: fa.Documents(
        cu_seqlens=cu_seqlens(q), cu_seqlens_k=cu_seqlens(k), within=fa.Causal("bottom_right")
    ),
    "lengths": lambda b, h, q, k: fa.Lengths(torch.arange(b) * k // b, torch.full((b,), max(q - 1, 1))),
    "left_padding": lambda b, h, q, k: fa.Padding(left_padding(b, k), "left") & fa.Causal("bottom_right"),
    "sinks_window": lambda b, h, q, k: (fa.SinkTokens(3) | fa.SlidingWindow(q // 4, 0, "top_left"))
    & fa.Causal("top_left"),
    "spans": lambda b, h, q, k: fa.Spans(torch.arange(q) * 7 % (k + 1) // 2, torch.arange(q) * 5 % (k + 1)),
    "dense": lambda b, h, q, k: fa.Dense(dense(b, h, q, k)),
    "key_padding": lambda b, h, q, k: fa.Dense(dense(b, 1, 2, k)[:, :, :1]),
    "custom": lambda b, h, q, k: fa.Custom(everything_but_diagonal_stripes) & fa.Causal("top_left"),
}

# name -> (n_b, n_h, n_q, n_k, dtype) -> tuple of Scores with parameters that want gradients
SCORES = {
    "none": lambda b, h, q, k, t: (),
    "softcap": lambda b, h, q, k, t: (fa.Softcap(2.0),),
    "alibi": lambda b, h, q, k, t: (fa.ALiBi(leaf(b, h, dtype=t, positive=True)),),
    "bias": lambda b, h, q, k, t: (fa.Bias(leaf(h, q, k, dtype=t)),),
    "key_bias": lambda b, h, q, k, t: (fa.Bias(leaf(b, 1, 1, k, dtype=t)),),
    "row_bias": lambda b, h, q, k, t: (fa.Bias(leaf(q, 1, dtype=t)),),
    "relative": lambda b, h, q, k, t: (fa.RelativeBias(leaf(h, 13, dtype=t)),),
    "chain": lambda b, h, q, k, t: (
        fa.Bias(leaf(q, k, dtype=t)),
        fa.Softcap(3.0),
        fa.ALiBi(leaf(h, dtype=t, positive=True), distance="rel"),
        fa.RelativeBias(leaf(5, dtype=t), offset=1),
    ),
}


def leaf(*shape, dtype, positive=False):
    """A small random tensor that wants a gradient; slopes are positive, so that logits stay small at any distance."""
    x = torch.randn(*shape, dtype=torch.float64, generator=generator(*shape)) * 0.3
    x = x.abs() if positive else x
    return x.to(dtype).requires_grad_()


def tensors(n_b, n_h, n_kv, n_q, n_k, head_dim, v_dim, dtype, strided=False):
    """q, k, v that want gradients; `strided`: as views of (B, L, H, D) storage and of a wider tensor."""
    g = generator(n_b, n_h, n_q, n_k, head_dim)

    def make(n_heads, n, d):
        if strided:
            wide = torch.randn(n_b, n, n_heads, d + 1, dtype=torch.float64, generator=g).to(dtype)
            return wide.requires_grad_().transpose(1, 2)[..., 1:]
        return torch.randn(n_b, n_heads, n, d, dtype=torch.float64, generator=g).to(dtype).requires_grad_()

    return make(n_h, n_q, head_dim), make(n_kv, n_k, head_dim), make(n_kv, n_k, v_dim)
