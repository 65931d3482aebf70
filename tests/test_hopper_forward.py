"""The forward of sm_90: its launches executed by the simulator against float64, how it is reached, and what the compiler
makes of it."""

import dataclasses
import gc
import weakref

import pytest
import torch
from bars import UNIT, assert_within, errors
from processes import overlay, python
from test_hopper_backward import problem
from test_triton import needs_compiler

import fastattn as fa
from fastattn import dispatch, environment, functional
from fastattn.backends import hopper, hopper_call, hopper_fit, reference, tiled, triton_call
from fastattn.devtools import offline, sass
from fastattn.kernels.hopper.schedule import key_step, key_walks, work_item

if hopper.gluon.PRESENT:
    from device_cases import Square, Tilt
    from gluon_simulator import simulate

# name -> (mask, score, (B, Hq, Hkv, Lq, Lk, head_dim, v's), options)
CALLS = {
    "full": ("full", "none", (1, 2, 2, 130, 200, 64, 64), {}),
    "causal, grouped heads": ("causal", "none", (2, 4, 2, 150, 150, 64, 64), dict(apart=True)),
    "shifted": ("shifted", "none", (1, 1, 1, 200, 70, 64, 64), {}),
    "bottom right": ("bottom_right", "none", (1, 2, 1, 70, 300, 64, 64), {}),
    "rows that see nothing": ("bottom_right", "none", (1, 2, 1, 300, 70, 64, 64), dict(sinks=True)),
    "window": ("window", "none", (1, 2, 1, 290, 290, 64, 64), dict(sinks=True)),
    "two sided": ("two_sided", "none", (1, 1, 1, 300, 500, 64, 64), {}),
    "documents": ("documents", "none", (1, 2, 2, 290, 270, 64, 64), {}),
    "sinks of keys": ("sinks_window", "none", (1, 2, 1, 400, 400, 64, 64), {}),
    "lengths": ("lengths", "none", (3, 2, 1, 140, 140, 64, 64), dict(sinks=True)),
    "left padding": ("left_padding", "none", (2, 1, 1, 140, 140, 64, 64), {}),
    "spans in any order": ("spans", "none", (1, 1, 1, 200, 300, 64, 64), {}),
    "prefix": ("prefix", "none", (1, 1, 1, 200, 200, 64, 64), {}),
    "softcap": ("window", "softcap", (1, 2, 1, 150, 150, 64, 64), {}),
    "alibi": ("causal", "alibi", (2, 2, 2, 150, 150, 64, 64), {}),
    "relative": ("causal", "relative", (1, 2, 2, 150, 150, 64, 64), {}),
    "head_dim 128": ("causal", "none", (1, 2, 1, 300, 300, 128, 128), dict(dtype=torch.float16)),
    "head_dim 256": ("causal", "none", (1, 2, 1, 200, 200, 256, 256), {}),
    "head_dim 256, chain": ("causal", "softcap", (1, 1, 1, 140, 140, 256, 256), dict(dtype=torch.float16)),
    "head_dims 72 and 40": ("two_sided", "none", (1, 1, 1, 140, 140, 72, 40), {}),
    "head_dims 8 and 200": ("full", "none", (1, 1, 1, 70, 70, 8, 200), dict(dtype=torch.float16)),
    "head_dims 192 and 128": ("causal", "none", (1, 1, 1, 140, 140, 192, 128), {}),
    "one row": ("full", "none", (1, 2, 1, 1, 300, 64, 64), {}),
    "one key": ("full", "none", (1, 2, 1, 140, 1, 64, 64), dict(sinks=True)),
}  # fmt: skip


@pytest.fixture
def simulated(monkeypatch):
    """Launches run in the simulator, with few programs; outputs begin as NaN."""

    def run(kernel, count, how, *args):
        simulate(kernel, (count,), *args, seed=run.seed, num_warps=how.num_warps)

    run.seed = 0
    monkeypatch.setattr(triton_call, "run", run)
    monkeypatch.setattr(triton_call, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(hopper_call, "processors", lambda device: 3)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield run
    torch.use_deterministic_algorithms(before)


def exact(p):
    """(out, lse) in float64."""
    wide = [x.double() for x in (p.q, p.k, p.v)]
    scores = tuple(s.with_params(tuple(x.double() for x in s.params)) for s in p.scores)
    sinks = None if p.sinks is None else p.sinks.double()
    return reference.attention(
        *wide, mask=p.mask, scores=scores, sinks=sinks, scale=p.scale, dropout_p=0.0, rng=None, coords=p.coords
    )


def apart(x):
    """x as (B, L, H, D) storage with NaN between its rows."""
    wide = torch.full((x.shape[0], x.shape[2], x.shape[1], x.shape[3] + 8), torch.nan, dtype=x.dtype)
    wide[..., 8:] = x.transpose(1, 2)
    return wide[..., 8:].transpose(1, 2)


@needs_compiler
@pytest.mark.parametrize("name", CALLS)
def test_against_float64(name, simulated):
    *call, options = CALLS[name]
    p = problem(*call, **options)
    if "apart" in options:
        p = dataclasses.replace(p, q=apart(p.q), k=apart(p.k), v=apart(p.v))
    assert hopper_fit.misfits(p) == []
    out, lse, low = hopper.forward(p, True)
    truth, true_lse = exact(p)
    assert_within(out, truth, [truth.to(out.dtype)], 2, "out")
    assert_within(lse, true_lse, [true_lse.float()], 2, "lse")
    assert out.stride() == tiled.forward(p, False)[0].stride()
    both = out.double() + low.double()  # what is left is the rounding of the weights
    assert errors(both, truth)[1] <= errors(out, truth)[1]
    assert (low.abs() <= out.abs() * (UNIT[out.dtype] / 2) + 1e-7).all()
    assert torch.equal(hopper.forward(p, False)[0], out)
    assert hopper.forward(p, False)[2].shape == (0,)


@needs_compiler
@pytest.mark.parametrize("bad", ["query", "key", "sink"])
def test_nan_reaches_the_rows_that_it_belongs_to(bad, simulated):
    p = problem("causal", "none", (1, 1, 1, 140, 140, 64, 64), sinks=True)
    if bad == "sink":
        p = dataclasses.replace(p, sinks=torch.full_like(p.sinks, torch.nan))
    else:
        {"query": p.q, "key": p.k}[bad][0, 0, 70] = torch.nan
    out, lse, _ = hopper.forward(p, True)
    rows = {"query": slice(70, 71), "key": slice(70, 140), "sink": slice(0, 140)}[bad]
    wrong = torch.zeros(140, dtype=torch.bool)
    wrong[rows] = True
    assert torch.equal(lse[0, 0].isnan(), wrong)
    assert torch.equal(out[0, 0].isnan().all(-1), wrong)
    assert torch.equal(out[0, 0].isnan().any(-1), wrong)


LARGE = {  # more work items than multiprocessors, more steps than stages
    "large, causal": ("causal", "none", (4, 16, 4, 2000, 2000, 128, 128), {}),
    "large, window": ("window", "none", (2, 16, 16, 3000, 3000, 64, 64), dict(sinks=True)),
    "large, documents": ("documents", "none", (1, 8, 8, 4000, 4000, 128, 128), dict(dtype=torch.float16)),
    "large, softcap": ("causal", "softcap", (2, 8, 2, 2000, 2000, 256, 256), {}),
}
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of architecture sm_90")
@pytest.mark.parametrize("name", [*CALLS, *LARGE])
def test_on_the_gpu(name):
    *call, options = {**CALLS, **LARGE}[name]
    p = problem(*call, **options)
    q, k, v = ((apart(x) if "apart" in options else x).cuda() for x in (p.q, p.k, p.v))
    scores = tuple(s.with_params(tuple(x.cuda() for x in s.params)) for s in p.scores)
    sinks = None if p.sinks is None else p.sinks.cuda()
    p = dataclasses.replace(p, q=q, k=k, v=v, mask=p.mask.to("cuda"), scores=scores, sinks=sinks)
    assert hopper.supports(p) is None
    out, lse, low = hopper.forward(p, True)
    truth, true_lse = exact(p)
    assert_within(out, truth, [truth.to(out.dtype)], 2, "out")
    assert_within(lse, true_lse, [true_lse.float()], 2, "lse")
    assert errors(out.double() + low.double(), truth)[1] <= errors(out, truth)[1]
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip((out, lse, low), hopper.forward(p, True), strict=True))


@needs_compiler
def test_scores_of_users(simulated):
    p = problem("window", "none", (2, 2, 1, 150, 150, 64, 64))
    p = dataclasses.replace(p, scores=(Square(0.1), Tilt(torch.full((1, 1), 0.01))))
    out, lse, _ = hopper.forward(p, True)
    truth, true_lse = exact(p)
    assert_within(out, truth, [truth.to(out.dtype)], 2, "out")
    assert_within(lse, true_lse, [true_lse.float()], 2, "lse")


@needs_compiler
def test_coordinates(simulated):
    coords = fa.Coordinates(h=1, q=torch.arange(150)[None] * 2, k=5)
    p = problem("causal", "alibi", (1, 2, 1, 150, 150, 64, 64))
    p = dataclasses.replace(p, coords=functional.checked_coords(coords, 1, 2, 150, 150, p.q.device))
    out, _, _ = hopper.forward(p, True)
    truth, _ = exact(p)
    assert_within(out, truth, [truth.to(out.dtype)], 2, "out")


@needs_compiler
@pytest.mark.parametrize("mask", ["causal", "sinks_window"])
def test_equal_bits_with_any_number_of_programs_any_seed_and_without_turns(mask, simulated, monkeypatch):
    p = problem(mask, "none", (2, 2, 1, 300, 300, 64, 64))
    first = hopper.forward(p, True)
    monkeypatch.setattr(hopper_call, "processors", lambda device: 1)
    monkeypatch.setattr(hopper_call, "section", lambda p: 3)  # does not divide four heads
    monkeypatch.setattr(hopper, "ping_pong", lambda p: False)
    simulated.seed = 5
    assert all(torch.equal(a, b) for a, b in zip(first, hopper.forward(p, True), strict=True))


@needs_compiler
def test_a_constant_v_comes_out_exact(simulated):
    """out is divided by the sum of the weights as they were rounded."""
    p = problem("causal", "none", (1, 1, 1, 200, 200, 64, 64))
    out, _, low = hopper.forward(dataclasses.replace(p, v=torch.full_like(p.v, 3.0)), True)
    assert torch.equal(out, torch.full_like(out, 3.0))
    assert low.abs().max() < 1e-6


@needs_compiler
def test_keys_that_nobody_sees_may_hold_anything(simulated):
    p = problem("lengths", "none", (2, 1, 1, 128, 400, 64, 64))
    poisoned = [x.clone() for x in (p.k, p.v)]
    for x in poisoned:
        x[0] = torch.nan  # the first entry has no keys
        x[1, :, 256:] = torch.nan  # the second 200, which end inside its second tile
    out, lse, _ = hopper.forward(dataclasses.replace(p, k=poisoned[0], v=poisoned[1]), True)
    assert torch.equal(out, hopper.forward(p, True)[0])
    assert lse[0].eq(-torch.inf).all()


@needs_compiler
@pytest.mark.parametrize("mask", ["causal", "shifted", "bottom_right", "two_sided", "sinks_window", "spans", "lengths"])
def test_the_walk_has_every_visible_key_once_and_says_which_tiles_are_full(mask, simulated):
    """Both from the function that producer and consumers share, for every tile of rows."""
    n_q, n_k, block_k = 300, 500, 128
    p = problem(mask, "none", (2, 1, 1, n_q, n_k, 64, 64))
    dense = p.mask.to_dense().expand(2, 1, n_q, n_k)
    call = triton_call.prepare(p)
    how = hopper.config(p, "hopper forward")
    data = hopper_call.row_pass(p, call, how)
    steps = torch.zeros(2, 3, 64, 4, dtype=torch.int32)
    simulate(_walker, (6,), data[0], steps, *call.ints, call.flags, call.spans, (128, block_k))
    for b in range(2):
        for tile in range(3):
            rows = dense[b, 0, tile * 128 : tile * 128 + 128]
            seen = torch.zeros_like(rows, dtype=torch.int32)
            found = [x.tolist() for x in steps[b, tile] if x[3]]
            assert found
            for k0, partial, r, _ in found:
                if k0 < 0:
                    assert partial
                    assert len(found) == 1
                    continue
                assert rows[:, k0 : k0 + block_k].any()
                spans = p.mask.rows_tensors()
                start, stop = (x.expand(2, 1, -1, n_q)[b, 0, r, tile * 128 : tile * 128 + 128, None] for x in spans)
                assert partial != ((start <= k0) & (stop >= k0 + block_k)).all()
                keys = torch.arange(k0, min(k0 + block_k, n_k))
                seen[:, k0 : k0 + block_k] += ((keys >= start) & (keys < stop)).int()
            assert torch.equal(seen, rows.int())


if hopper.gluon.PRESENT:
    gl = hopper.gluon.gl

    @hopper.gluon.jit
    def _walker(
        mask, out, n_q, n_k, start, stop, q_at, k_at, FLAGS: gl.constexpr, SPANS: gl.constexpr, BLOCKS: gl.constexpr
    ):
        size = (n_q, n_k, start, stop, q_at, k_at)
        b, tile = gl.program_id(0) // 3, gl.program_id(0) % 3
        steps, walks = key_walks(mask, b, b * 0, tile * BLOCKS[0], size, FLAGS, SPANS, BLOCKS)
        for j in range(steps):
            k0, partial, r = key_step(walks, j, FLAGS, SPANS, BLOCKS[1])
            at = out + (gl.program_id(0) * 64 + j) * 4
            gl.store(at, k0)
            gl.store(at + 1, partial)
            gl.store(at + 2, r)
            gl.store(at + 3, 1)

    @hopper.gluon.jit
    def _worker(out, n_q, n_h, heads, section, BLOCK_Q: gl.constexpr):
        t = gl.program_id(0)
        item = work_item(t, n_q, n_h, heads, section, BLOCK_Q)
        for i in gl.static_range(3):
            gl.store(out + t * 3 + i, item[i])


@needs_compiler
def test_work_items_are_every_tile_once_and_the_last_rows_of_a_section_first():
    out = torch.zeros(60, 3, dtype=torch.int32)
    simulate(_worker, (60,), out, 700, 5, 10, 4, 128)
    items = [tuple(x) for x in out.tolist()]
    assert sorted(items) == sorted((q0, b, h) for q0 in range(0, 700, 128) for b in range(2) for h in range(5))
    assert items[:5] == [(640, 0, 0), (640, 0, 1), (640, 0, 2), (640, 0, 3), (512, 0, 0)]
    assert [x[1:] for x in items[48:50]] == [(1, 3), (1, 4)]  # what is left is a smaller section


# How it is reached


@pytest.fixture
def on_sm_90(monkeypatch):
    """The CPU passes for an sm_90 GPU."""
    real = hopper.refusals
    pretend = lambda device, *rest: real(torch.device("cuda"), *rest)
    monkeypatch.setattr(triton_call, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(hopper, "refusals", pretend)


def test_by_name_on_the_cpu_lists_every_reason():
    q = torch.zeros(1, 2, 4, 300, dtype=torch.float32)[..., ::2]
    with pytest.raises(ValueError, match=r'^backend="hopper" cannot run this call: ') as error:
        fa.attention(
            q, q, q, mask=fa.Dense(torch.ones(4, 4, dtype=torch.bool)), score=fa.Bias(torch.zeros(4, 4)), dropout_p=0.1,
            scale=-1.0, backend="hopper",
        )  # fmt: skip
    for reason in (
        "architecture sm_90", "on cpu", "float16 and bfloat16, not float32", "multiple of 8 up to 256, not 150", "dense bias",
        "dropout runs in the portable", "Dense and Custom masks", "the scale must be positive, not -1.0",
        "q's last stride must be 1, not 2", "v's last stride",
    ):  # fmt: skip
        assert reason in str(error.value), reason


@needs_compiler
def test_another_architecture_is_refused(on_sm_90, monkeypatch):
    x = torch.zeros(1, 1, 4, 64, dtype=torch.float16)
    monkeypatch.setattr(triton_call, "architecture", lambda device: "sm_100")
    with pytest.raises(ValueError, match=r"it needs a GPU of architecture sm_90 \(H100, H200\)"):
        fa.attention(x, x, x, backend="hopper")


@needs_compiler
def test_it_runs_by_name(on_sm_90, simulated):
    q = torch.randn(1, 2, 130, 64).bfloat16()
    out, lse = fa.attention(q, q, q, mask=fa.Causal(), backend="hopper", return_lse=True)
    assert torch.equal(out, fa.attention(q, q, q, mask=fa.Causal(), backend="hopper"))
    truth, true_lse = fa.attention(q.double(), q.double(), q.double(), mask=fa.Causal(), return_lse=True)
    assert_within(out, truth, [truth.to(out.dtype)], 2, "out")
    assert_within(lse, true_lse, [true_lse.float()], 2, "lse")


@needs_compiler
def test_long_plain_calls_come_here_unasked(on_sm_90, monkeypatch):
    """What was timed, and nothing beside it: a length, a mask, a score, a dtype or a promise that nobody has timed."""

    def chosen(
        mask="causal", score="none", n_q=2048, n_k=2048, head_dim=64, v_dim=64, name=None, sinks=False, dtype=torch.bfloat16,
        **changes,
    ):  # fmt: skip
        p = problem(mask, score, (1, 2, 1, n_q, n_k, head_dim, v_dim), dtype, sinks=sinks, deterministic=True)
        p = dataclasses.replace(p, **changes)
        monkeypatch.setattr(dispatch, "_against_triton", lambda *facts: ())
        return dispatch.settled(dataclasses.replace(p, backend="triton"), name).backend

    assert chosen() == chosen("full") == chosen(head_dim=128, v_dim=128) == chosen("full", n_k=5000) == "hopper"
    others = (
        dict(n_q=2047), dict(n_k=2047), dict(mask="window"), dict(score="softcap"), dict(head_dim=128),
        dict(head_dim=96, v_dim=96), dict(dtype=torch.float16), dict(dtype=torch.float32),
        dict(sinks=True), dict(deterministic=False), dict(invariant=True), dict(dropout_p=0.1, rng=torch.zeros(1, 2)),
        dict(scale=-1.0), dict(name="triton"), dict(q=torch.zeros(1, 2, 2048, 65, dtype=torch.bfloat16)[..., :64]),
    )  # fmt: skip
    for changes in others:
        assert chosen(**changes) == "triton", changes
    monkeypatch.setattr(triton_call, "architecture", lambda device: "sm_100")
    assert chosen() == "triton"


@needs_compiler
@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_graphs_run_it(dynamic, on_sm_90, simulated):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    run = lambda q, k: fa.attention(q, k, k, mask=fa.Causal("bottom_right"), backend="hopper")
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=counter)
    for n in (40, 130, 75, 200):
        q, k = torch.randn(1, 2, n, 64).bfloat16(), torch.randn(1, 1, n + 3, 64).bfloat16()
        assert torch.equal(compiled(q, k), run(q, k))
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1]


@needs_compiler
@pytest.mark.parametrize("mask", ["causal", "sinks_window"])
def test_lengths_do_not_compile_anew(mask, monkeypatch):
    """Two variants of every kernel serve all lengths; heads come in sections of 117, 16, 2 and 1 among others."""
    monkeypatch.setattr(hopper_call, "CACHE", 1 << 20)
    variants = {}
    for n in (17, 48, 64, 100, 127, 129, 256, 1000, 2048):
        p = problem(mask, "none", (1, 4, 4, n, 2 * n + 1, 64, 64))
        for launch in offline.own_launches(p, "sm_90", 0):
            kernel, key = offline.variant(launch, "sm_90")
            variants.setdefault(kernel, set()).add(key)
    assert max(map(len, variants.values())) <= 2, {kernel: len(keys) for kernel, keys in variants.items()}


@needs_compiler
def test_gradients_go_on_from_its_results(on_sm_90, simulated):
    """The whole way: the operators, this forward and the fused backward."""
    q, k, v = (torch.randn(1, h, 40, 64).bfloat16().requires_grad_() for h in (2, 1, 1))
    out = fa.attention(q, k, v, mask=fa.Causal(), sinks=torch.zeros(2), backend="hopper", deterministic=False)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = fa.attention(*wide, mask=fa.Causal(), sinks=torch.zeros(2, dtype=torch.float64))
    do = torch.randn(out.shape).bfloat16()
    found, exact = torch.autograd.grad(out, (q, k, v), do), torch.autograd.grad(truth, wide, do.double())
    for what, x, y in zip(("dq", "dk", "dv"), found, exact, strict=True):
        assert_within(x, y, [y.to(x.dtype)], 3, what)


@needs_compiler
def test_explain_says_which_kernel_runs_what(on_sm_90):
    q = torch.zeros(1, 2, 512, 128, dtype=torch.bfloat16)
    plan = fa.explain(q, q, q, mask=fa.Causal(), score=fa.Softcap(20.0), backend="hopper")
    assert plan.backend == "hopper"
    text = str(plan)
    for part in ("warp-specialised forward for sm_90", "tiles of 128 x 128, 2 stages, two warp groups, which take turns",
                 "1.3 to 1.6 times the portable forward's rate on an H200", "tangents for sm_90",
                 "the portable Triton kernels run them"):  # fmt: skip
        assert part in text, (part, text)


@needs_compiler
def test_explain_names_it_beside_the_portable_kernels(on_sm_90):
    p = dataclasses.replace(problem("causal", "none", (1, 1, 1, 4, 4, 64, 64)), backend="triton")
    (found,) = (why for what, why in dispatch.plan(p).reasons if what == "hopper")
    assert found.startswith('only where it is named, backend="hopper"; by default it takes plain and causal bfloat16 calls')
    (found,) = (why for what, why in dispatch.plan(dataclasses.replace(p, scale=-1.0)).reasons if what == "hopper")
    assert found == "the scale must be positive, not -1.0"


def test_info_names_it():
    assert "sm_90" in environment.backends()["hopper"]


def test_batch_invariant_calls_and_empty_ones_are_refused():
    p = problem("full", "none", (1, 1, 1, 4, 0, 64, 64))
    assert any("nothing to do" in reason for reason in hopper_fit.misfits(p))
    p = dataclasses.replace(problem("full", "none", (1, 1, 1, 4, 4, 64, 64)), invariant=True)
    assert any("batch-invariant" in reason for reason in hopper_fit.misfits(p))


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float16)


STRIDES = {
    "q's stride 2 must be a positive multiple of 8, not 65": lambda: zeros(1, 1, 4, 65)[..., :64],
    "q's stride 1 must be a positive multiple of 8, not 0": lambda: zeros(1, 1, 4, 64).expand(1, 2, 4, 64),
    None: lambda: zeros(1, 4, 2, 72).transpose(1, 2)[..., :64],
}


@pytest.mark.parametrize("reason", STRIDES)
def test_strides(reason):
    assert hopper_fit.unreachable("q", STRIDES[reason]()) == reason


@needs_compiler
def test_what_no_descriptor_reaches_is_copied_inside_an_operator(simulated):
    """A base that is not a multiple of 16 bytes; a batch that is expanded, as vmap hands it on."""
    p = problem("causal", "none", (2, 2, 2, 40, 40, 64, 64))
    k = torch.zeros(2 * 2 * 40 * 64 + 1, dtype=p.k.dtype)[1:].view(p.k.shape).copy_(p.k)
    v = p.v[:1].expand_as(p.v)
    moved, plain = (dataclasses.replace(p, k=a, v=b) for a, b in ((k, v), (p.k, v.contiguous())))
    assert torch.equal(hopper.forward(moved, False)[0], hopper.forward(plain, False)[0])


@needs_compiler
def test_descriptors_are_checked_once_and_keep_no_tensor():
    x = torch.zeros(2, 2, 40, 64, dtype=torch.float16)
    first, alive = hopper_call.descriptor(x, 64, 64), weakref.ref(x)
    hits = hopper_call._template.cache_info().hits
    second = hopper_call.descriptor(x.clone(), 64, 64)
    assert hopper_call._template.cache_info().hits == hits + 1
    assert first.base is x
    assert second.base is not x
    assert (first.shape, first.strides, first.block_shape) == ([2, 2, 40, 64], [5120, 2560, 64, 1], [1, 1, 64, 64])
    del x, first
    gc.collect()
    assert alive() is None


# What the compiler makes of it

KINDS = {
    "head_dim 64": (64, {}),
    "head_dim 128": (128, {}),
    "head_dim 256": (256, {}),
    "row spans": (128, dict(mask=fa.SinkTokens(4) | fa.SlidingWindow(255, 0, "top_left"))),
}


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_defaults_spill_nothing_and_hide_every_exponential(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    head_dim, options = KINDS[kind]
    p = offline.example(head_dim, torch.float16 if head_dim == 64 else torch.bfloat16, **options)
    (launch,) = (x for x in offline.own_launches(p, "sm_90") if x.kernel.__name__ == "hopper_forward")
    kept, read = [], sass.instructions
    monkeypatch.setattr(sass, "instructions", lambda listing: kept.append(read(listing)) or kept[-1])
    found = offline.inspect(launch, "sm_90")
    assert (found.report.local, found.report.warning, found.hazards) == (0, "", []), str(found.report)
    assert found.report.shared <= offline.SHARED["sm_90"] * 1024
    loops = [loop for loop in found.loops if loop.overlapped[1]]
    assert len(loops) >= 2
    for loop in loops:
        assert loop.overlapped[0] == loop.overlapped[1]
    for body, loop in zip(sass.loops(kept[0])[:2], loops):  # of the two consumers
        shown, masked = (sum(one.name.startswith("ISETP") for one in x) for x in (sass.without_mask(body), body))
        assert shown < masked / 10  # a tile that hides nothing passes over the mask
        assert loop.bound.peak > (0.8 if head_dim == 64 else 0.99)


@needs_compiler
def test_one_stage_is_refused(tmp_path, monkeypatch):
    """It would wait for ever."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (launch,) = offline.own_launches(offline.example(64, torch.bfloat16), "sm_90", 0)
    *rest, stages, ping_pong, apart = launch.args
    assert stages == 3
    with pytest.raises(Exception, match="the next keys are waited for before the last values are released"):
        offline.compiled(launch._replace(args=(*rest, 1, ping_pong, apart)), "sm_90")


OTHER = """
import torch, triton
from fastattn.devtools import offline, sass
launch, = offline.own_launches(offline.example(128, torch.bfloat16), "sm_90", 0)
found = offline.inspect(launch, "sm_90")
print(triton.__version__, found.report)
assert not (found.report.local or found.report.warning or found.hazards)
assert all(inside == total for inside, total in (loop.overlapped for loop in found.loops))
"""


@pytest.mark.parametrize(("folder", "version"), [("triton36", "3.6.0"), ("ttsem", "3.8.0")])
def test_other_tritons_compile_it(folder, version, tmp_path):
    path = overlay(folder)
    if not (path / "triton").is_dir():
        pytest.skip(f"triton {version} is not installed here: make test installs it where it can")
    done = python("-c", OTHER, path=[path], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert version in done.stdout
