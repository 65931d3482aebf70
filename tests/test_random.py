"""Random calls against float64: shapes, strides, masks, scores, sinks, GQA, dropout and dtypes together."""

import gc
import resource

import pytest
import torch
from bars import assert_within
from cases import MASKS, SCORES, leaf, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn as fa

CASES = 250  # per family; there are nine of them
FAMILIES = ["tiny", "plain", "masks", "scores", "float32", "bfloat16", "float16", "dropout", "long"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SETTINGS = settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def calls(draw, family):
    """Keyword arguments of `check`."""
    most = {"tiny": 5, "long": 130}.get(family, 40)
    n_q, n_k = draw(st.integers(0, most)), draw(st.integers(0, most))
    square = draw(st.booleans())
    n_kv, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (1, 3)]))
    plain = family == "plain"
    return {
        "mask": "full" if plain else draw(st.sampled_from(sorted(MASKS))),
        "score": "none" if plain or family == "masks" else draw(st.sampled_from(sorted(SCORES))),
        "sinks": draw(st.booleans()),
        "n_b": draw(st.integers(1, 3)),
        "n_h": n_kv * group,
        "n_kv": n_kv,
        "n_q": n_q,
        "n_k": n_q if square else n_k,
        "head_dim": draw(st.integers(1, 9)),
        "v_dim": draw(st.integers(1, 9)),
        "dtype": DTYPES.get(family, torch.float64),
        "strided": draw(st.booleans()),
        "dropout_p": draw(st.sampled_from([0.1, 0.5])) if family == "dropout" else 0.0,
        "scale": draw(st.sampled_from([None, 0.3, 1.0])),
        "with_lse": draw(st.booleans()),
        "seed": draw(st.integers(0, 3)),
    }


def check(mask, score, sinks, n_b, n_h, n_kv, n_q, n_k, head_dim, v_dim, dtype, strided, dropout_p, scale, with_lse, seed):
    if n_q == 0 or n_k == 0:  # these masks and tables are made for at least one of each
        mask, score = "full", "none"
    q, k, v = tensors(n_b, n_h, n_kv, n_q, n_k, head_dim, v_dim, dtype, strided)
    masking = MASKS[mask](n_b, n_h, n_q, n_k)
    chain = SCORES[score](n_b, n_h, n_q, n_k, dtype)
    params = [x for item in chain for x in item.params]
    leaves = [q, k, v, *params, *([leaf(n_h, dtype=dtype)] if sinks else [])]
    g = torch.Generator().manual_seed(seed)
    do = torch.randn(n_b, n_h, n_q, v_dim, generator=g, dtype=torch.float64)
    dlse = torch.randn(n_b, n_h, n_q, generator=g, dtype=torch.float64)

    def run(backend, dtype):
        own = [x.detach().to(dtype).requires_grad_() for x in leaves] if backend == "reference" else leaves
        rest = iter(own[3:])
        scores = [item.with_params(tuple(next(rest) for _ in item.params)) for item in chain]
        torch.manual_seed(seed)
        out, lse = fa.attention(
            *own[:3], mask=masking, score=scores, sinks=own[-1] if sinks else None, dropout_p=dropout_p,
            scale=scale, return_lse=True, backend=backend,
        )  # fmt: skip
        loss = (out.double() * do).sum()
        if with_lse:
            loss = loss + (lse.masked_fill(lse == -torch.inf, 0.0).double() * dlse).sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(loss, own)]

    before = [x.detach().clone() for x in leaves]
    ours = run(None, dtype)
    assert all(torch.equal(x, y) for x, y in zip(leaves, before, strict=True))  # nothing is written into
    exact, naive = run("reference", torch.float64), run("reference", dtype)
    largest = max([x.abs().max().item() for x in exact[2:5] if x.numel()], default=0.0)
    terms = max(largest, 3 * v_dim**0.5) * max(n_q, n_k, 1)
    for index, (x, y, z) in enumerate(zip(ours, exact, naive, strict=True)):
        name = (["out", "lse", "dq", "dk", "dv"] + ["dparam"] * len(params) + ["dsinks"])[index]
        if index < 2:
            assert_within(x, y, [z], 2, name)
        else:
            assert_within(x, y, [z], 3, name, terms if index > 4 else largest)


@pytest.mark.parametrize("family", FAMILIES)
def test_against_float64(family):
    @SETTINGS
    @given(calls(family))
    def run(call):
        check(**call)

    run()


def test_the_cases_are_many():
    assert CASES * len(FAMILIES) >= 2000


@pytest.mark.parametrize("order", ["forward over reverse", "reverse over reverse"])
def test_second_order_against_float64(order):
    """Random calls twice differentiated, against the reference by the same transforms."""

    @settings(SETTINGS, max_examples=100)
    @given(calls("tiny"))
    def run(call):
        n_q, n_k = max(call["n_q"], 1), max(call["n_k"], 1)
        q, k, v = tensors(call["n_b"], call["n_h"], call["n_kv"], n_q, n_k, 3, 2, torch.float64, call["strided"])
        chain = SCORES[call["score"]](call["n_b"], call["n_h"], n_q, n_k, torch.float64)
        masking = MASKS[call["mask"]](call["n_b"], call["n_h"], n_q, n_k)
        leaves = [q, k, v, *(x for item in chain for x in item.params)]
        g = torch.Generator().manual_seed(call["seed"])
        tangents = tuple(torch.randn(x.shape, generator=g, dtype=torch.float64) for x in leaves)

        def loss(backend):
            def value(*x):
                rest = iter(x[3:])
                scores = [item.with_params(tuple(next(rest) for _ in item.params)) for item in chain]
                return fa.attention(*x[:3], mask=masking, score=scores, backend=backend).sin().sum()

            return value

        def second(backend):
            everything = tuple(range(len(leaves)))
            gradient = torch.func.grad(loss(backend), argnums=everything)
            x = tuple(x.detach() for x in leaves)
            if order == "forward over reverse":
                return torch.func.jvp(gradient, x, tangents)[1]

            def dot(*x):
                return sum((a * b).sum() for a, b in zip(gradient(*x), tangents))

            return torch.func.grad(dot, argnums=everything)(*x)

        for ours, exact in zip(second(None), second("reference"), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-9)

    run()


def test_ten_thousand_masks_leave_nothing_behind():
    """Caches are bounded: neither objects nor resident memory grow with the number of distinct masks."""
    q, k, v = (torch.randn(1, 1, 16, 4) for _ in range(3))

    def use(first, last):
        for n in range(first, last):
            if n % 2:
                mask = fa.SlidingWindow(n, n // 3) & fa.SinkTokens(n % 17)
            else:
                mask = fa.Spans(torch.full((16,), n % 5), torch.arange(16) + n % 7)
            fa.attention(q, k, v, mask=mask)

    use(0, 3000)
    gc.collect()
    objects, resident = len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    use(3000, 13000)
    gc.collect()
    assert len(gc.get_objects()) < objects + 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < resident + 4000  # kilobytes; a float a mask and key is 640
