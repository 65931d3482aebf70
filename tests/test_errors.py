"""Bad input raises before any work, and the message names the argument, what came and what is accepted."""

import functools
import math

import cases
import numpy as np
import pytest
import torch
from torch.nn.attention.bias import causal_lower_right

import fastattn as fa
from fastattn.backends import tiled


def q(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape or (2, 4, 5, 8), dtype=dtype, device=device)


def call(**kwargs):
    arguments = dict(q=q(), k=q(2, 2, 6, 8), v=q(2, 2, 6, 8)) | kwargs
    return fa.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def jagged(layout=torch.jagged):
    return torch.nested.nested_tensor([torch.zeros(3, 4, 8), torch.zeros(5, 4, 8)], layout=layout).transpose(1, 2)


class InAFunction:
    @staticmethod
    def make():
        class Local(fa.Pointwise):
            def value(self, s):
                return s

        return Local()


class Optioned(fa.Pointwise):
    static = "a/b"


class Plain(fa.Additive):
    params = (torch.zeros(4),)


def returns_int(b, h, q_idx, k_idx):
    return q_idx - k_idx


def returns_row(b, h, q_idx, k_idx):
    return k_idx.flatten() > 1


def q_after_k(q_idx, k_idx):
    return q_idx >= k_idx


def same_parity(*where):
    return (where[2] + where[3]) % 2 == 0


def everywhere(fn):
    @functools.wraps(fn)
    def visible(b, h, q_idx, k_idx):
        return fn(q_idx, k_idx)

    return visible


@everywhere
def diagonal(q_idx, k_idx):
    return q_idx == k_idx


BAD = {
    "rank": (dict(q=q(4, 5, 8)), ValueError, r"q must have 4 dimensions.*got shape \(4, 5, 8\)"),
    "not a tensor": (dict(k=[1]), TypeError, "k must be a Tensor, got list"),
    "dtype": (dict(q=q(dtype=torch.int64)), TypeError, "q must be float16.*got torch.int64"),
    "dtype mix": (dict(k=q(2, 2, 6, 8, dtype=torch.float64)), TypeError, "k must have q's dtype torch.float32, got torch.float64"),
    "device mix": (dict(v=q(2, 2, 6, 8, device="meta")), ValueError, "v must be on q's device cpu, got meta"),
    "heads": (dict(k=q(2, 3, 6, 8), v=q(2, 3, 6, 8)), ValueError, "q's heads must be a multiple of k's, got 4 and 3"),
    "k and v": (dict(v=q(2, 2, 7, 8)), ValueError, r"k and v must have the same.*\(2, 2, 6, 8\).*\(2, 2, 7, 8\)"),
    "head_dim": (dict(q=q(2, 4, 5, 9)), ValueError, "q and k must have the same head_dim"),
    "batch": (dict(k=q(3, 2, 6, 8)), ValueError, "k must have q's batch size 2, got"),
    "dropout 1": (dict(dropout_p=1.0), ValueError, r"dropout_p must be a number in \[0, 1\), got 1.0"),
    "dropout negative": (dict(dropout_p=-0.1), ValueError, "dropout_p"),
    "scale": (dict(scale=float("nan")), ValueError, "scale must be finite, got nan"),
    "scale type": (dict(scale="1"), TypeError, "scale must be a number or None, got '1'"),
    "backend": (dict(backend="cuda"), ValueError, "backend must be None or one of 'tiled', 'triton', 'hopper', 'reference', got 'cuda'"),
    "deterministic": (dict(deterministic=1), TypeError, "deterministic must be None, True, False or 'batch_invariant', got 1"),
    "mask dtype": (dict(mask=torch.zeros(5, 6)), TypeError, "mask must be a bool tensor.*score=Bias"),
    "mask type": (dict(mask="causal"), TypeError, "mask must be a Mask.*got 'causal'"),
    "sparse": (dict(q=q().to_sparse()), TypeError, "q must be a dense Tensor, got one of layout torch.sparse_coo"),
    "sparse v": (dict(v=q(2, 2, 6, 8).to_sparse()), TypeError, "v must be a dense Tensor, got one of layout torch.sparse_coo"),
    "jagged": (dict(q=jagged(), k=jagged(), v=jagged()), TypeError, "q must be a dense Tensor, got a nested one of layout torch.jagged: varlen_attention"),
    "dropout None": (dict(dropout_p=None), ValueError, r"dropout_p must be a number in \[0, 1\), got None"),
    "return_lse": (dict(return_lse="no"), TypeError, "return_lse must be True or False, got 'no'"),
    "mask class": (dict(mask=fa.Causal), TypeError, "mask must be a Mask.*got Causal"),
    "mask on meta": (dict(mask=torch.ones(5, 6, dtype=torch.bool, device="meta")), ValueError, r"a mask's tensor must be on cpu or the CPU, got <bool \(5, 6\)> on meta"),
    "sparse mask": (dict(mask=torch.ones(5, 6).bool().to_sparse()), TypeError, "Dense takes a dense tensor, got one of layout torch.sparse_coo"),
    "mask shape": (dict(mask=torch.ones(5, 7, dtype=torch.bool)), ValueError, r"5, 7"),
    "mask batch": (dict(mask=torch.ones(3, 1, 5, 6, dtype=torch.bool)), ValueError, "mask must have batch size 1 or 2, got 3"),
    "mask heads": (dict(mask=torch.ones(1, 3, 5, 6, dtype=torch.bool)), ValueError, "mask must have 1 or 4 heads, got 3"),
    "lowered mask": (dict(mask=fa.Full().lower(5, 7)), ValueError, "mask was lowered for 5 rows and 7 keys, the call has 5 and 6"),
    "alignment": (dict(mask=fa.Causal()), ValueError, "top_left.*bottom_right"),
    "lengths batch": (dict(mask=fa.Lengths(torch.tensor([1, 2, 3]))), ValueError, "batch size 1 or 2, got 3"),
    "score type": (dict(score=[lambda s: s]), TypeError, "score must be a Score or a sequence of Scores, got one of <lambda>"),
    "score is a tensor": (dict(score=torch.zeros(5, 6)), TypeError, r"score must be a Score or a sequence of Scores, got <float32 \(5, 6\)>"),
    "score is a class": (dict(score=fa.Softcap), TypeError, "score must be a Score or a sequence of Scores, got Softcap"),
    "sparse bias": (dict(score=fa.Bias(torch.ones(5, 6).to_sparse())), TypeError, "every tensor of Bias must be a dense Tensor, got one of layout torch.sparse_coo"),
    "sparse slopes": (dict(score=fa.ALiBi(torch.ones(4).to_sparse())), TypeError, "every tensor of ALiBi must be a dense Tensor"),
    "sparse sinks": (dict(sinks=torch.ones(4).to_sparse()), TypeError, "sinks must be a dense Tensor, got one of layout torch.sparse_coo"),
    "far coords": (dict(coords=fa.Coordinates(q=1 << 62)), ValueError, "coords.q must lie within"),
    "score static": (dict(score=Optioned()), ValueError, "static of Optioned must be a string without any of , / | =, got 'a/b'"),
    "score without canonical": (dict(score=Plain()), ValueError, r"canonical\(\) of Plain must give its parameters leading dimensions \(2 or 1, 4 or 1\), got shape \(4,\)"),
    "larger bias": (dict(score=fa.Bias(torch.zeros(50, 60))), ValueError, r"bias must broadcast to \(2, 4, 5, 6\), got shape \(50, 60\)"),
    "bias and coords": (dict(score=fa.Bias(torch.zeros(7, 6)), coords=fa.Coordinates(q=3)), ValueError, "bias must hold the rows that coords.q names, 3 to 7"),
    "bias and tensor coords": (dict(score=fa.Bias(torch.zeros(5, 6)), coords=fa.Coordinates(k=torch.arange(6) - 1)), ValueError, "bias must hold the keys that coords.k names, -1 to 4"),
    "coords device": (dict(coords=fa.Coordinates(q=torch.arange(5, device="meta"))), ValueError, "coords.q must be on q's device cpu, got meta"),
    "huge scale": (dict(scale=10**400), ValueError, "scale must be finite, got inf"),
    "custom type": (dict(mask=fa.Custom(returns_int)), TypeError, "Custom torch_fn returns_int must return a bool tensor, got torch.int64"),
    "custom shape": (dict(mask=fa.Custom(returns_row)), ValueError, r"Custom torch_fn returns_row must return a shape that broadcasts to .*, got \(6,\)"),
    "score in a function": (dict(score=InAFunction.make()), ValueError, "cannot be imported by that name; define it at the top level"),
    "bias shape": (dict(score=fa.Bias(torch.zeros(5, 5))), ValueError, r"bias must broadcast to \(2, 4, 5, 6\), got shape \(5, 5\)"),
    "slopes": (dict(score=fa.ALiBi(torch.zeros(3))), ValueError, r"slopes must have one entry for each of 4 heads, got shape \(3,\)"),
    "table": (dict(score=fa.RelativeBias(torch.zeros(3, 9))), ValueError, r"table must have leading dimensions.*got \(3, 9\)"),
    "score device": (dict(score=fa.Bias(torch.zeros(5, 6, device="meta"))), ValueError, "parameters of bias must be on q's device cpu, got meta"),
    "sinks shape": (dict(sinks=torch.zeros(3)), ValueError, r"sinks must have shape \(4,\) or \(2, 4\), got \(3,\)"),
    "sinks dtype": (dict(sinks=torch.zeros(4, dtype=torch.int32)), TypeError, "sinks must be floating point, got torch.int32"),
    "coords type": (dict(coords=(0, 0, 0, 0)), TypeError, "coords must be Coordinates or None, got tuple"),
    "coords shape": (dict(coords=fa.Coordinates(q=torch.arange(4))), ValueError, r"coords.q must be an int or have one of.*got \(4,\)"),
    "coords dtype": (dict(coords=fa.Coordinates(k=torch.zeros(6))), TypeError, "coords.k must be an int or an int32 or int64 tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_attention(name, monkeypatch):
    if not name.startswith("custom"):  # what a function returns is known when it has run
        monkeypatch.setattr(tiled, "forward", lambda *a: pytest.fail("work was done"))
    kwargs, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(**kwargs)


CONSTRUCTORS = {
    "negative window": (lambda: fa.SlidingWindow(-1, 0), ValueError, "-1"),
    "chunk": (lambda: fa.Chunked(0), ValueError, "0"),
    "unsorted": (lambda: fa.Documents(cu_seqlens=torch.tensor([0, 5, 3])), ValueError, "cu_seqlens"),
    "not from 0": (lambda: fa.Documents(cu_seqlens=torch.tensor([1, 5])), ValueError, "cu_seqlens"),
    "float cu_seqlens": (lambda: fa.Documents(cu_seqlens=torch.tensor([0.0, 5.0])), TypeError, "cu_seqlens"),
    "ids and cu_seqlens": (lambda: fa.Documents(), ValueError, "ids and cu_seqlens"),
    "float mask": (lambda: fa.Dense(torch.zeros(3, 3)), TypeError, "bool"),
    "lambda": (lambda: fa.Custom(lambda b, h, q, k: q >= k), ValueError, "importable"),
    "built-in as a mask": (lambda: fa.Custom(max), TypeError, r"Custom torch_fn must be a function of \(b, h, q_idx, k_idx\), got a built-in function, max"),
    "class as a mask": (lambda: fa.Custom(fa.Causal), TypeError, "Custom torch_fn must be a function of .*, got a class, Causal"),
    "mask of two": (lambda: fa.Custom(q_after_k), TypeError, r"Custom torch_fn must take \(b, h, q_idx, k_idx\), got q_after_k\(q_idx, k_idx\)"),
    "triton_fn of two": (lambda: fa.Custom(returns_int, q_after_k), TypeError, r"Custom triton_fn must take \(b, h, q_idx, k_idx\), got q_after_k"),
    "triton_fn is a name": (lambda: fa.Custom(returns_int, "visible"), TypeError, "Custom triton_fn must be a function defined in a module, got 'visible'"),
    "scattered padding": (lambda: fa.Padding(torch.tensor([[True, False, True]])), ValueError, "Dense"),
    "union with a predicate": (lambda: fa.Dense(torch.ones(3, 3, dtype=torch.bool)) | fa.Full(), ValueError, "Dense"),
    "cap": (lambda: fa.Softcap(0.0), ValueError, "cap must be a positive finite number, got 0.0"),
    "distance": (lambda: fa.ALiBi(torch.zeros(2), distance="l2"), ValueError, "distance must be"),
    "int bias": (lambda: fa.Bias(torch.zeros(2, 2, dtype=torch.int32)), TypeError, "floating point Tensor, got torch.int32"),
    "bias rank": (lambda: fa.Bias(torch.zeros(1, 1, 1, 2, 2)), ValueError, "at most 4 dimensions"),
    "n_heads of a word": (lambda: fa.alibi_slopes("8"), TypeError, "n_heads must be an int, got '8'"),
    "distance of a list": (lambda: fa.t5_bucket([1]), TypeError, "distance must be an integer Tensor, got list"),
    "distance of floats": (lambda: fa.t5_bucket(torch.zeros(2)), TypeError, "distance must be an integer Tensor, got torch.float32"),
    "num_buckets": (lambda: fa.t5_bucket(torch.arange(2), num_buckets="a"), TypeError, "num_buckets must be an int, got 'a'"),
    "far offset": (lambda: fa.RelativeBias(torch.ones(9), offset=2**70), ValueError, "offset must lie within"),
    "max_distance": (lambda: fa.t5_bucket(torch.arange(2), max_distance=8), ValueError, "max_distance more than num_buckets // 4, got 32 and 8"),
    "n_heads": (lambda: fa.alibi_slopes(0), ValueError, "n_heads must be at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructor(name):
    make, error, message = CONSTRUCTORS[name]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("fn", [same_parity, diagonal, math.hypot])
def test_custom_takes_what_may_be_a_condition(fn):
    """Any number of arguments, a wrapper around fewer, a compiled function that does not say."""
    assert fa.Custom(fn).torch_fn is fn


LOWERED = {
    **{name: make for name, make in cases.MASKS.items() if name not in ("documents", "lengths", "spans", "dense")},
    "documents": lambda *_: fa.Documents(cu_seqlens=torch.tensor([0, 2])),
    "ids": lambda *_: fa.Documents(torch.tensor([0, 0, 1])),
    "lengths": lambda *_: fa.Lengths(torch.tensor([2])),
    "spans": lambda *_: fa.Spans(torch.tensor([0, 0, 0]), torch.tensor([1, 2, 3])),
    "dense": lambda *_: fa.Dense(torch.ones(3, 3, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lengths_of_a_lowered_mask(name):
    mask = LOWERED[name](2, 1, 3, 3)
    for lengths, error, message in (
        ((-1, 3), ValueError, "^n_q must be at least 0, got -1"), ((3, -1), ValueError, "^n_k must be at least 0, got -1"),
        ((3.0, 3), TypeError, "^n_q must be an int, got 3.0"), ((3, True), TypeError, "^n_k must be an int, got True"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            mask.lower(*lengths)
    assert mask.lower(np.int64(3), 3).n_q == 3


def test_too_long_cu_seqlens():
    with pytest.raises(ValueError, match=r"^cu_seqlens_q must not exceed q's length 4, got 9 at its end"):
        fa.varlen_attention(q(4, 2, 8), q(4, 2, 8), q(4, 2, 8), torch.tensor([0, 9]))


def test_varlen_rank():
    with pytest.raises(ValueError, match=r"k must have 3 dimensions \(total, heads, head_dim\), got \(2, 4, 5, 8\)"):
        fa.varlen_attention(q(4, 2, 8), q(), q(4, 2, 8), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="cu_seqlens_k is needed"):
        fa.varlen_attention(q(4, 2, 8), q(5, 2, 8), q(5, 2, 8), torch.tensor([0, 4]))


def test_varlen_names_its_own_arguments():
    x, cu = q(4, 2, 8), torch.tensor([0, 4])
    for kwargs, error, message in (
        (dict(cu_seqlens_q=None), TypeError, "^cu_seqlens_q must be an int32 or int64 tensor, got None"),
        (dict(cu_seqlens_q=torch.tensor([0, 3, 2])), ValueError, "^cu_seqlens_q must never decrease"),
        (dict(cu_seqlens_k=torch.tensor([0, 9])), ValueError, "^cu_seqlens_k must not exceed k's length 4, got 9"),
        (dict(cu_seqlens_q=torch.tensor([0, 4], device="meta")), ValueError, "^cu_seqlens_q must be on q's device cpu.*got meta"),
        (dict(cu_seqlens_k=torch.tensor([0, 1, 2])), ValueError, "^cu_seqlens_k must describe as many documents"),
        (dict(return_lse="x"), TypeError, "^return_lse must be True or False, got 'x'"),
        (dict(mask=fa.Lengths(torch.tensor([3]))), ValueError, "^mask must be Full, Causal"),
        (dict(mask=fa.Causal(), cu_seqlens_k=cu), ValueError, "^mask Causal.* needs align="),
    ):
        with pytest.raises(error, match=message):
            fa.varlen_attention(x, x, x, **({"cu_seqlens_q": cu} | kwargs))


def test_autocast_does_not_hide_the_message():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="k must be a Tensor, got list"):
        call(k=[1])


def test_merge_types():
    with pytest.raises(TypeError, match=r"o1 must be a floating point Tensor, got \[1\]"):
        fa.merge([1], q(2, 4, 5), q(), q(2, 4, 5))
    with pytest.raises(TypeError, match="must have one dtype"):
        fa.merge(q(), q(2, 4, 5), q(dtype=torch.float64), q(2, 4, 5))


def test_merge_devices():
    with pytest.raises(ValueError, match="o2 must be on o1's device cpu, got meta"):
        fa.merge(q(), q(2, 4, 5), q(device="meta"), q(2, 4, 5))


def test_warmup():
    with pytest.raises(TypeError, match="gradients must be True or False, got 'x'"):
        fa.warmup(q(), q(), q(), gradients="x")


def test_jagged_with_holes():
    x = torch.nested.nested_tensor_from_jagged(torch.zeros(10, 4, 8), torch.tensor([0, 4, 10]), torch.tensor([2, 5]))
    x = x.transpose(1, 2)
    with pytest.raises(ValueError, match="query must be a jagged nested tensor without holes"):
        fa.scaled_dot_product_attention(x, x, x)


def test_merge_shapes():
    with pytest.raises(ValueError, match="o1 and o2 must have one shape"):
        fa.merge(q(), q(2, 4, 5), q(2, 4, 6, 8), q(2, 4, 5))


SDPA = {
    "mask and causal": (dict(attn_mask=torch.ones(5, 6, dtype=torch.bool), is_causal=True), ValueError, "attn_mask must be None where is_causal"),
    "lengths": (dict(value=q(2, 4, 7, 8)), ValueError, "key and value must have the same length"),
    "last dimension": (dict(key=q(2, 4, 6, 9)), ValueError, "query and key must have the same last dimension"),
    "heads": (dict(key=q(2, 2, 6, 8), value=q(2, 2, 6, 8)), ValueError, "must broadcast.*enable_gqa"),
    "gqa heads": (dict(key=q(2, 3, 6, 8), value=q(2, 3, 6, 8), enable_gqa=True), ValueError, "multiple of key's with enable_gqa, got 4 and 3"),
    "mask dtype": (dict(attn_mask=torch.ones(5, 6, dtype=torch.int32)), TypeError, "attn_mask must be bool, query's dtype.*got torch.int32"),
    "mask shape": (dict(attn_mask=torch.ones(5, 5, dtype=torch.bool)), ValueError, r"attn_mask must broadcast to \(2, 4, 5, 6\), got shape \(5, 5\)"),
    "sparse mask": (dict(attn_mask=torch.ones(5, 6).to_sparse()), TypeError, "attn_mask must be a dense Tensor, got one of layout torch.sparse_coo"),
    "mask device": (dict(attn_mask=torch.ones(5, 6, device="meta")), ValueError, "attn_mask must be on query's device cpu, got meta"),
    "dtype": (dict(key=q(2, 4, 6, 8, dtype=torch.float64)), TypeError, "must have one dtype"),
    "nested": (dict(query=jagged(torch.strided)), TypeError, "query must be a dense Tensor, got a nested one of layout torch.strided: one of layout torch.jagged"),
    "sparse": (dict(key=q(2, 4, 6, 8).to_sparse()), TypeError, "key must be a dense Tensor, got one of layout torch.sparse_coo"),
    "rank": (dict(query=q(8)), ValueError, "query must have at least 2 dimensions"),
    "dropout": (dict(dropout_p=1.5), ValueError, r"dropout_p must be a number in \[0, 1\], got 1.5"),
    "scale": (dict(scale=float("inf")), ValueError, "scale must be finite, got inf"),
    "is_causal": (dict(is_causal=None), TypeError, "is_causal must be True or False, got None"),
    "is_causal 1": (dict(is_causal=1), TypeError, "is_causal must be True or False, got 1"),
    "enable_gqa": (dict(enable_gqa=1), TypeError, "enable_gqa must be True or False, got 1"),
    "causal bias": (dict(attn_mask=causal_lower_right(7, 9)), ValueError, "attn_mask is a CausalBias for 7 rows and 9 keys, the call has 5 and 6"),
}  # fmt: skip


@pytest.mark.parametrize("name", SDPA)
def test_sdpa(name):
    kwargs, error, message = SDPA[name]
    arguments = dict(query=q(), key=q(2, 4, 6, 8), value=q(2, 4, 6, 8)) | kwargs
    with pytest.raises(error, match=message):
        fa.scaled_dot_product_attention(**arguments)


class FirstOrderOnly(fa.General):
    def value(self, s, tile):
        return s * 2

    def derivs(self, s, tile):
        return s * 2, torch.full_like(s, 2.0)


def test_first_order_score_says_so():
    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    out = fa.attention(x, x, x, score=FirstOrderOnly())
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"FirstOrderOnly.*first derivatives only"):
        torch.autograd.grad(dx.sum(), x)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.func.jvp(lambda y: fa.attention(y, y, y, score=FirstOrderOnly()), (x.detach(),), (x.detach(),))
