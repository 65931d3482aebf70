"""deterministic="batch_invariant" over the kernels: bits that know nothing of what stands beside a document."""

import itertools

import cases
import pytest
import torch
from device_cases import DEVICE
from torch.testing import assert_close

import fastattn as fa

MODE = "batch_invariant"
CAUSAL, WINDOW = fa.Causal("top_left"), fa.SlidingWindow(9, 4, "top_left")


def make(n_b, n, dtype=torch.float32):
    """q, k, v and the cotangent of out."""
    g = cases.generator(n_b, n)
    return [torch.randn(n_b, h, n, 16, generator=g).to(DEVICE, dtype) for h in (2, 1, 1, 2)]


def run(x, deterministic=MODE, **options):
    """[out, lse, dq, dk, dv] with the cotangent x[3]."""
    leaves = [y.detach().clone().requires_grad_() for y in x[:3]]
    out, lse = fa.attention(*leaves, return_lse=True, backend="triton", deterministic=deterministic, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out * x[3]).sum(), leaves)]


def assert_same(ours, theirs):
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), ours, theirs, strict=True):
        assert torch.equal(a, b), f"{name}: {(a.double() - b.double()).abs().max():.1e}"


def part(x, entries, rows):
    return [y[entries, :, rows] for y in x]


@pytest.mark.parametrize("deterministic", [None, MODE])
@pytest.mark.parametrize("mask", [CAUSAL, fa.SinkTokens(4) | WINDOW])
def test_batch_size_and_position_in_the_batch(mask, deterministic):
    """Programs of the kernels know one batch entry: their bits are the same in every mode."""
    x = make(3, 40, torch.float16)
    order = torch.tensor([2, 0])
    whole = run(x, deterministic, mask=mask)
    assert_same(part(whole, order, slice(None)), run(part(x, order, slice(None)), deterministic, mask=mask))
    one = slice(2, 3)
    assert_same(part(whole, one, slice(None)), run(part(x, one, slice(None)), deterministic, mask=mask))


@pytest.mark.parametrize(
    ("padded", "plain"),
    [
        (CAUSAL, CAUSAL),
        (fa.Lengths(torch.tensor([45, 45])), None),
        (WINDOW & fa.Lengths(torch.tensor([45, 45])), WINDOW),
    ],
)
def test_padding_behind(padded, plain):
    x = make(2, 70)
    x[3][:, :, 45:] = 0
    ours = part(run(x, mask=padded), slice(1, 2), slice(45))
    assert_same(ours, run(part(x, slice(1, 2), slice(45)), mask=plain))


def test_padding_in_front():
    x = make(2, 70)
    keep = torch.arange(70, device=DEVICE).expand(2, -1) >= 25
    document = slice(25, None)
    ours = run(x, mask=CAUSAL & fa.Padding(keep, "left"), score=fa.Softcap(2.0))
    theirs = run(part(x, slice(1, 2), document), mask=CAUSAL, score=fa.Softcap(2.0))
    assert_same(part(ours, slice(1, 2), document), theirs)


def test_packed_neighbours():
    documents = {"a": make(1, 13), "b": make(1, 50)}
    alone = {name: run(x, mask=CAUSAL) for name, x in documents.items()}
    for order in ("ab", "ba"):
        packed = [torch.cat([documents[name][i] for name in order], 2)[0].transpose(0, 1) for i in range(4)]
        ends = [0, *itertools.accumulate(documents[name][0].shape[2] for name in order)]
        leaves = [y.detach().clone().requires_grad_() for y in packed[:3]]
        out, lse = fa.varlen_attention(
            *leaves, torch.tensor(ends, dtype=torch.int32, device=DEVICE), mask=CAUSAL, return_lse=True, backend="triton",
            deterministic=MODE,
        )  # fmt: skip
        grads = torch.autograd.grad((out * packed[3]).sum(), leaves)
        for name, (first, last) in zip(order, itertools.pairwise(ends)):
            ours = [y[first:last].transpose(0, 1)[None] for y in (out.detach(), lse.transpose(0, 1).detach(), *grads)]
            assert_same(ours, alone[name])


@pytest.mark.parametrize("mask", ["documents", "dense"])
def test_the_same_function(mask):
    """With sinks, a chain of scores and their gradients."""
    found = []
    for mode in (MODE, None):
        q, k, v = (y.to(DEVICE) for y in cases.tensors(1, 2, 1, 40, 50, 8, 8, torch.float32))
        scores = cases.SCORES["chain"](1, 2, 40, 50, torch.float32)
        scores = tuple(s.with_params(tuple(y.detach().to(DEVICE).requires_grad_() for y in s.params)) for s in scores)
        sinks = torch.ones(2, device=DEVICE, requires_grad=True)
        out, lse = fa.attention(
            q, k, v, mask=cases.MASKS[mask](1, 2, 40, 50), score=scores, sinks=sinks, return_lse=True, backend="triton",
            deterministic=mode,
        )  # fmt: skip
        wanted = [q, k, v, sinks, *(y for s in scores for y in s.params)]
        found.append([out, lse, *torch.autograd.grad(out.sum() + lse.sum(), wanted)])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, atol=5e-5, rtol=5e-5)
