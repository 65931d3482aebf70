"""The fused backward of sm_90: its launches executed by the simulator against float64, and what the compiler makes of it."""

import dataclasses
import re
from pathlib import Path

import cases
import pytest
import torch
from bars import assert_within, errors
from processes import overlay, python
from test_triton import needs_compiler

import fastattn as fa
from fastattn import functional
from fastattn.backends import hopper, hopper_backward, reference, tiled, triton, triton_call
from fastattn.devtools import offline

pytestmark = needs_compiler
if hopper.gluon.PRESENT:
    from device_cases import Square, Tilt
    from gluon_simulator import simulate

# name -> (mask, score, (B, Hq, Hkv, Lq, Lk, head_dim, v's), options)
CALLS = {
    "causal, grouped heads": ("causal", "none", (1, 4, 2, 130, 130, 64, 64), {}),
    "full, keys that end inside a tile": ("full", "none", (1, 1, 1, 70, 200, 64, 64), dict(sinks=True, dlse=True)),
    "more rows than keys": ("shifted", "none", (1, 1, 1, 200, 70, 64, 64), {}),
    "bottom right": ("bottom_right", "none", (2, 1, 1, 70, 140, 64, 64), {}),
    "window": ("window", "none", (1, 2, 1, 150, 150, 64, 64), dict(strided=True)),
    "two sided": ("two_sided", "none", (1, 1, 1, 150, 150, 64, 64), {}),
    "documents": ("documents", "none", (1, 2, 2, 150, 150, 64, 64), dict(dlse=True)),
    "sinks of keys": ("sinks_window", "none", (1, 2, 1, 150, 150, 64, 64), {}),
    "lengths": ("lengths", "none", (2, 2, 1, 70, 70, 64, 64), dict(sinks=True)),
    "left padding": ("left_padding", "none", (2, 1, 1, 70, 70, 64, 64), {}),
    "spans in any order": ("spans", "none", (1, 1, 1, 100, 140, 64, 64), {}),
    "softcap": ("causal", "softcap", (1, 2, 1, 100, 100, 64, 64), {}),
    "alibi": ("window", "alibi", (2, 2, 2, 100, 100, 64, 64), {}),
    "relative": ("causal", "relative", (1, 2, 1, 100, 100, 64, 64), {}),
    "scores of users, and coordinates": ("window", "none", (2, 2, 1, 100, 100, 64, 64), dict(own=True)),
    "head_dim 128": ("causal", "none", (1, 2, 1, 130, 130, 128, 128), dict(dtype=torch.float16)),
    "head_dim 72 and 40": ("two_sided", "none", (1, 1, 1, 70, 70, 72, 40), {}),
    "head_dim 8": ("full", "none", (1, 1, 1, 40, 40, 8, 16), dict(dtype=torch.float16)),
    "one row": ("full", "none", (1, 2, 1, 1, 150, 64, 64), {}),
    "no keys": ("full", "none", (1, 1, 1, 70, 0, 64, 64), {}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    """Launches run in the simulator, those of the portable kernels too; programs counts them by name."""
    programs = {}

    def run(kernel, count, how, *args):
        programs[kernel.__name__] = count
        simulate(kernel, (count,), *args, seed=len(programs), num_warps=how.num_warps)

    monkeypatch.setattr(triton_call, "run", run)
    monkeypatch.setattr(triton_call, "architecture", lambda device: "sm_90")
    return programs


def problem(mask, score, sizes, dtype=torch.bfloat16, sinks=False, strided=False, deterministic=False, own=False, **_):
    n_b, n_h, _, n_q, n_k, _, _ = sizes
    q, k, v = (x.detach() for x in cases.tensors(*sizes, dtype, strided))
    made = cases.SCORES[score](n_b, n_h, n_q, n_k, torch.float32)
    chain = tuple(s.with_params(tuple(x.detach() for x in s.params)) for s in made)
    sinks = torch.linspace(-1, 1, n_h) if sinks else None
    p = functional.problem(
        q, k, v, cases.MASKS[mask](n_b, n_h, n_q, n_k), chain, sinks, None, 0.0, "tiled", deterministic, None
    )
    if own:
        coords = fa.Coordinates(h=1, q=torch.arange(n_q)[None] * 2, k=5)
        p = dataclasses.replace(
            p, scores=(Square(0.1), Tilt(torch.full((1, 1), 0.01))),
            coords=functional.checked_coords(coords, n_b, n_h, n_q, n_k, q.device),
        )  # fmt: skip
    return dataclasses.replace(p, param_grads=False)


def exact(p, do, dlse):
    """dq, dk, dv in float64."""
    wide = [x.double().requires_grad_() for x in (p.q, p.k, p.v)]
    scores = tuple(s.with_params(tuple(x.double() for x in s.params)) for s in p.scores)
    sinks = None if p.sinks is None else p.sinks.double()
    out, lse = reference.attention(
        *wide, mask=p.mask, scores=scores, sinks=sinks, scale=p.scale, dropout_p=0.0, rng=None, coords=p.coords
    )
    seen = lse > -torch.inf
    total = (out * do.double()).sum() + (0.0 if dlse is None else torch.where(seen, lse * dlse.double(), 0.0).sum())
    return torch.autograd.grad(total, wide)


def gradients(p, do, dlse):
    return hopper_backward.backward(p, do, dlse, *tiled.forward(p, True))[:3]


def cotangents(p, dlse=False, **_):
    g = torch.Generator().manual_seed(1)
    do = torch.randn(p.n_b, p.n_h, p.n_q, p.v_dim, generator=g).to(p.q.dtype)
    return do, torch.randn(p.n_b, p.n_h, p.n_q, generator=g) if dlse else None


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name, simulated):
    *call, options = CALLS[name]
    p = problem(*call, **options)
    assert hopper_backward.why_not(p) is None
    do, dlse = cotangents(p, **options)
    for what, x, truth in zip(("dq", "dk", "dv"), gradients(p, do, dlse), exact(p, do, dlse), strict=True):
        assert_within(x, truth, [truth.to(x.dtype)], 3, what)
    assert ("hopper_backward" in simulated) == (p.n_k > 0)
    assert "backward_dq" not in simulated


LARGE = {
    "large, causal": ("causal", "none", (2, 8, 2, 2000, 2000, 128, 128), {}),
    "large, bottom right": ("bottom_right", "none", (2, 8, 8, 1000, 3000, 64, 64), {}),
    "large, sinks of keys": ("sinks_window", "none", (1, 4, 1, 4000, 4000, 128, 128), dict(dtype=torch.float16)),
    "large, documents": ("documents", "none", (1, 4, 2, 3000, 3000, 64, 64), dict(dlse=True)),
}  # fmt: skip
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of architecture sm_90")
@pytest.mark.parametrize("name", [*CALLS, *LARGE])
def test_on_the_gpu(name, monkeypatch):
    monkeypatch.undo()
    *call, options = {**CALLS, **LARGE}[name]
    p = problem(*call, **options)
    q, k, v = (x.cuda() for x in (p.q, p.k, p.v))
    scores = tuple(s.with_params(tuple(x.cuda() for x in s.params)) for s in p.scores)
    sinks = None if p.sinks is None else p.sinks.cuda()
    coords = fa.Coordinates(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in p.coords.parts))
    p = dataclasses.replace(p, q=q, k=k, v=v, mask=p.mask.to("cuda"), scores=scores, sinks=sinks, coords=coords)
    do, dlse = (None if x is None else x.cuda() for x in cotangents(p, **options))
    forward, truths = triton.forward(p, True), exact(p, do, dlse)
    for _ in range(3):  # dq's order is not fixed: every time it is within the bar
        found = hopper_backward.backward(p, do, dlse, *forward)
        for what, x, truth in zip(("dq", "dk", "dv"), found, truths):
            assert_within(x, truth, [truth.to(x.dtype)], 3, what)


def test_keys_with_a_mean():
    """Rounding makes the row sums of x something else than zero, which a mean of the keys multiplies: that is taken off."""
    p = problem("causal", "none", (1, 1, 1, 200, 200, 64, 64), sinks=True)
    k, v = (x + 3 * torch.linspace(-1, 1, 64).sign().to(x) for x in (p.k, p.v))
    p = dataclasses.replace(p, k=k, v=v)
    do, dlse = cotangents(p, dlse=True)
    (dq, *_), (truth, *_) = gradients(p, do, dlse), exact(p, do, dlse)
    assert errors(dq, truth)[1] < 2.5e-3
    p = dataclasses.replace(p, sinks=None)
    out, lse, _ = tiled.forward(p, True)
    (dq, *_), (truth, *_) = hopper_backward.backward(p, do, None, out, lse, out.new_empty(0)), exact(p, do, None)
    assert errors(dq, truth)[1] < 1e-2  # the correction alone, without the low half of out; without either about 1e-1


def test_the_gradient_of_sinks():
    p = problem("causal", "none", (1, 2, 1, 70, 70, 64, 64), sinks=True)
    do, _ = cotangents(p)
    found = hopper_backward.backward(p, do, None, *tiled.forward(p, True))
    torch.testing.assert_close(found.sinks, tiled.backward(p, do, None, *tiled.forward(p, True)).sinks)


REFUSED = {
    "in an order that is not fixed": dict(deterministic=None),
    "float16 and bfloat16, not float32": dict(dtype=torch.float32),
    "a head_dim of 136: at most 128": dict(sizes=(1, 1, 1, 8, 8, 136, 64)),
    "a multiple of 8": dict(sizes=(1, 1, 1, 8, 8, 36, 64)),
    "no bool and custom masks": dict(mask="dense"),
    "no dense bias": dict(score="bias"),
    "at a head_dim of 128: at most 64": dict(score="softcap", sizes=(1, 1, 1, 8, 8, 128, 64)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_does_not_take_has_the_portable_passes_and_a_reason(reason, monkeypatch):
    p = problem(**{"mask": "causal", "score": "none", "sizes": (1, 1, 1, 8, 8, 64, 64), **REFUSED[reason]})
    assert reason in hopper_backward.why_not(p)
    ran = []
    monkeypatch.setattr(triton, "gradients", lambda *args: ran.append(args[-1]))
    hopper_backward.backward(p, *[None] * 5)
    assert ran == [triton.two_passes]
    assert any(what == "fused backward for sm_90" and reason in why for what, why in hopper.falls_back(p))


def test_explain_names_it():
    p = problem("causal", "none", (1, 1, 1, 8, 8, 64, 64))
    assert "fused backward for sm_90, tiles of 64 x 128, 2 stages, dq in an order that is not fixed" in hopper.description(p)
    assert all(what != "fused backward for sm_90" for what, _ in hopper.falls_back(p))
    assert "fused backward" not in hopper.description(dataclasses.replace(p, deterministic=True))


# What the compiler makes of it

ROWS = dict(mask=fa.SinkTokens(4) | fa.SlidingWindow(255, 0, "top_left"))
KINDS = {  # name -> (head_dim, options of the example)
    "head_dim 64": (64, {}),
    "head_dim 64, chain": (64, dict(chain=True)),
    "head_dim 128": (128, {}),
    "head_dim 128, row spans": (128, ROWS),
}


def recorded(head_dim, options):
    p = offline.example(head_dim, torch.bfloat16, **options)
    (launch,) = (x for x in offline.own_launches(p, "sm_90") if x.kernel.__name__ == "hopper_backward")
    return launch


def inspected(head_dim, options):
    return offline.inspect(recorded(head_dim, options), "sm_90")


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_have_no_local_memory(kind, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    head_dim, options = KINDS[kind]
    report, _, hazards, loops = inspected(head_dim, options)
    assert (report.local, report.warning, hazards) == (0, "", []), str(report)
    assert report.products == (48 if "chain" in options else 56 if head_dim == 64 else 72)
    assert report.shared <= offline.SHARED["sm_90"] * 1024
    early = [loop for loop in loops if loop.overlapped[0]]
    assert bool(early) == (head_dim == 64)  # dp is in flight during the exponentials


def test_a_newer_assembler_finds_no_hazard_either(tmp_path, monkeypatch):
    import triton

    newer = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"
    if not newer.exists():
        pytest.skip("this Triton brings one assembler")
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(newer))
    report, _, hazards, _ = inspected(128, {})
    assert (report.warning, hazards) == ("", [])
    assert report.local <= 32, str(report)


def test_slices_have_whole_rows_of_their_swizzle(tmp_path, monkeypatch):
    """The matrix instructions are documented for tiles that begin where a row of the swizzle begins, and are as wide."""
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    text = offline.compiled(recorded(64, {}), "sm_90").asm["ttgir"]
    swizzles = {name: int(n) for name, n in re.findall(r"(#\w+) = #ttg.nvmma_shared<{swizzlingByteWidth = (\d+)", text)}
    slice_of = r"memdesc_subslice %\w+\[[\d, ]*?(\d+)\] .*?x(\d+)xbf16.*? -> !ttg.memdesc<[\dx]*?x(\d+)xbf16, (#\w+)"
    slices = re.findall(slice_of, text)
    columns = [(int(first), int(own)) for first, whole, own, _ in slices if own != whole]
    assert sorted(columns) == [(0, 32), (32, 32)]  # of keys, for dq
    assert all(int(own) * 2 % swizzles[layout] == 0 for *_, own, layout in slices)


OTHER = """
import torch, triton
from fastattn.devtools import offline
launches = offline.own_launches(offline.example(64, torch.bfloat16), "sm_90")
found = offline.inspect(next(x for x in launches if x.kernel.__name__ == "hopper_backward"), "sm_90")
print(triton.__version__, found.report)
assert not (found.report.local or found.report.warning or found.hazards)
"""


@pytest.mark.parametrize(("folder", "version"), [("triton36", "3.6.0"), ("ttsem", "3.8.0")])
def test_other_tritons_compile_it(folder, version, tmp_path):
    path = overlay(folder)
    if not (path / "triton").is_dir():
        pytest.skip(f"triton {version} is not installed here: make test installs it where it can")
    done = python("-c", OTHER, path=[path], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{version} hopper_backward" in done.stdout
