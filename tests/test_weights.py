"""attention_weights against the reference's formula, whole, by rows and summed."""

import dataclasses

import pytest
import torch
from cases import MASKS, SCORES, leaf, tensors
from torch.testing import assert_close

import fastattn as fa
from fastattn import weights as module
from fastattn.functional import problem

D = torch.float64
N_B, N_H, N_KV, N_Q, N_K = 2, 4, 2, 29, 37


def exact(q, k, p):
    """The weights, as what attention gives values that are unit vectors."""
    unit = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return fa.functional._run(dataclasses.replace(p, v=unit, backend="reference"))


def call(mask, score, sinks, dtype=D, n_q=N_Q, n_k=N_K):
    q, k, _ = tensors(N_B, N_H, N_KV, n_q, n_k, 16, 16, dtype)
    options = dict(
        mask=MASKS[mask](N_B, N_H, n_q, n_k), score=SCORES[score](N_B, N_H, n_q, n_k, dtype),
        sinks=leaf(N_H, dtype=dtype) if sinks else None, scale=0.3,
    )  # fmt: skip
    return q, k, options


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("mask", MASKS)
def test_whole_and_rows(mask, score, sinks, monkeypatch):
    q, k, options = call(mask, score, sinks)
    p = problem(q, k, k, options["mask"], options["score"], options["sinks"], 0.3, 0.0, None, None, None)
    expected, lse = exact(q, k, p)
    w = fa.attention_weights(q, k, **options)
    assert_close(w, expected, rtol=1e-9, atol=1e-12)
    assert_close(fa.attention_weights(q, k, lse=lse, **options), expected, rtol=1e-9, atol=1e-12)
    rows = torch.tensor([3, 28, 0, 3])
    assert_close(fa.attention_weights(q, k, rows=rows, **options), expected[:, :, rows], rtol=1e-9, atol=1e-12)
    last = fa.attention_weights(q, k, rows=slice(-4, None), lse=lse, **options)
    assert_close(last, expected[:, :, -4:], rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(module, "SLICE", 5 * N_B * N_H * N_K)  # five rows at a time
    entropy = -torch.special.xlogy(expected, expected).sum(-1)
    assert_close(fa.attention_weights(q, k, reduce="entropy", **options), entropy, rtol=1e-9, atol=1e-12)
    assert_close(fa.attention_weights(q, k, reduce="key_sums", **options), expected.sum(2), rtol=1e-9, atol=1e-12)
    some = fa.attention_weights(q, k, rows=rows, reduce="key_sums", **options)
    assert_close(some, expected[:, :, rows].sum(2), rtol=1e-9, atol=1e-12)


def test_coordinates():
    q, k, _ = tensors(1, 4, 4, 12, 12, 8, 8, D)
    options = dict(score=fa.ALiBi(fa.alibi_slopes(4)))
    whole = fa.attention_weights(q, k, **options)
    part = fa.attention_weights(q[:, :, 6:], k, coords=fa.Coordinates(q=6), rows=slice(1, 4), **options)
    assert_close(part, whole[:, :, 7:10])
    by_tensor = fa.Coordinates(q=torch.arange(6, 12)[None])
    assert_close(fa.attention_weights(q[:, :, 6:], k, coords=by_tensor, rows=slice(1, 4), **options), whole[:, :, 7:10])


@pytest.mark.parametrize("reduce", [None, "entropy", "key_sums"])
def test_derivatives(reduce):
    q, k = (torch.randn(1, 2, n, 3, dtype=D, requires_grad=True) for n in (3, 4))
    bias = torch.randn(2, 3, 4, dtype=D, requires_grad=True)

    def fn(q, k, bias):
        return fa.attention_weights(q, k, mask=fa.Causal("top_left"), score=fa.Bias(bias), reduce=reduce)

    assert torch.autograd.gradcheck(fn, (q, k, bias))
    assert torch.autograd.gradgradcheck(fn, (q, k, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision(dtype):
    q, k, options = call("causal", "alibi", True, dtype)
    w = fa.attention_weights(q, k, **options)
    assert w.dtype == torch.float32
    wide = fa.attention_weights(q.double(), k.double(), **options)
    assert_close(w.double(), wide, rtol=1e-4, atol=1e-5)


def test_memory_is_that_of_the_rows():
    """At length 8192 a whole matrix would be 256 MiB for each head."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    q = torch.randn(1, 1, 8192, 8)
    with Watch():
        w = fa.attention_weights(q, q, rows=slice(4000, 4016), mask=fa.Causal() & fa.SlidingWindow(99, 0))
    assert w.shape == (1, 1, 16, 8192)
    assert_close(w.sum(-1), torch.ones(1, 1, 16))
    assert largest <= 16 * 8192


def test_sizes_of_zero():
    for n_q, n_k in ((0, 3), (3, 0)):
        q, k = torch.randn(2, 2, n_q, 4), torch.randn(2, 2, n_k, 4)
        assert fa.attention_weights(q, k).shape == (2, 2, n_q, n_k)
        assert not fa.attention_weights(q, k, reduce="key_sums").any()
        assert not fa.attention_weights(q, k, reduce="entropy").any()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(reduce="mean"), ValueError, "reduce must be one of None, 'entropy', 'key_sums', got 'mean'"),
        (dict(rows=torch.tensor([0.5])), TypeError, "rows must be None, a slice or an integer tensor"),
        (dict(rows=[1]), TypeError, "rows must be None, a slice or an integer tensor"),
        (dict(rows=torch.tensor([5])), ValueError, r"rows must lie in \[0, 5\), got 5 to 5"),
        (dict(lse=torch.zeros(1, 2, 4)), ValueError, r"lse must have shape \(1, 2, 5\), got \(1, 2, 4\)"),
    ],
)
def test_what_does_not_fit(kwargs, error, message):
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(error, match=message):
        fa.attention_weights(q, q, **kwargs)
