"""The Triton backend as seen from outside, its launch tables, and its suites, each in an interpreting process of its own."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import fastattn as fa
from fastattn import dispatch, functional
from fastattn.backends import triton, triton_call
from fastattn.backends.facts import load_of
from fastattn.backends.triton_call import PAD
from fastattn.devtools import offline, sass, tune
from fastattn.kernels import launch, shim
from fastattn.scores.base import apart

HERE = Path(__file__).parent
ROOT = HERE.parent
SUITES = sorted(path.stem for path in (HERE / "interpreted").glob("*.py"))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_compiler = pytest.mark.skipif(not shim.PRESENT or shim.INTERPRETED, reason="needs triton and its compiler")


def python(*arguments, **environment):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=env, check=False)


def run_suite(name, **environment):
    arguments = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/interpreted/{name}.py")
    done = python(*arguments, **environment)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


@needs_triton
@pytest.mark.parametrize("suite", SUITES)
def test_suite_in_the_interpreter(suite):
    run_suite(suite, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("suite", SUITES)
def test_suite_on_the_gpu(suite):
    run_suite(suite, TRITON_INTERPRET="0")


def call(**changes):
    arguments = dict(dtype=torch.float32, head_dim=8, mask=None, score=(), name=None, device="cpu")
    arguments.update(changes)
    q = torch.zeros(1, 2, 4, arguments["head_dim"], dtype=arguments["dtype"])
    p = functional.problem(q, q, q, arguments["mask"], arguments["score"], None, None, 0.0, "tiled", None, None)
    return dataclasses.replace(p, backend="triton")


class Plain(fa.Pointwise):
    """Has no Triton functions."""

    def value(self, s):
        return s


class Doubled(fa.Softcap):
    """Changes the operations and inherits Triton functions that do not."""

    def value(self, s):
        return super().value(s) * 2


def visible(b, h, q_idx, k_idx):
    return q_idx >= k_idx


def test_by_name_on_the_cpu_lists_every_reason():
    q = torch.zeros(1, 2, 4, 600, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot run this call") as error:
        fa.attention(q, q, q, mask=fa.Custom(visible), score=(Plain(), Doubled(2.0)), backend="triton")
    for reason in ("TRITON_INTERPRET=1", "not float64", "1 to 512, not 600", "Plain", "Doubled", "has no triton_fn"):
        assert reason in str(error.value)


def test_the_tiled_backend_stays_the_default_on_the_cpu():
    q = torch.zeros(1, 2, 4, 8)
    assert fa.explain(q, q, q).backend == "tiled"


def test_what_the_kernels_refuse_goes_to_the_tiled_backend():
    """`settled` for a call that `choose` gave to Triton, as on cuda."""
    assert dispatch.choose(None, torch.device("cuda")) == "triton"
    if shim.PRESENT:
        assert dispatch.settled(call(dtype=torch.float64), None).backend == "tiled"
        with pytest.raises(ValueError, match="not float64"):
            dispatch.settled(call(dtype=torch.float64), "triton")


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(ImportError, match=r'triton cannot be imported: pip install triton.*backend="tiled"'):
        dispatch.settled(call(), None)
    monkeypatch.undo()
    monkeypatch.setattr(shim, "PRESENT", False)  # one that is there and broken, too
    with pytest.raises(ImportError, match="triton cannot be imported"):
        dispatch.settled(call(), None)


def test_kernels_import_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastattn as fa\n"
        "from fastattn.backends import triton\n"
        "from fastattn.kernels import backward, chain, dense, dropout, forward, grads, launch, masks, scores, shim, tangents\n"
        "from fastattn.kernels import tangents2, tiles, walk\n"
        "from fastattn.backends import hopper\n"
        "from fastattn.kernels.hopper import backward, forward, gluon, schedule, softmax\n"
        "assert not gluon.PRESENT\n"
        "assert not shim.PRESENT\n"
        "q = torch.zeros(1, 1, 2, 8)\n"
        "try: fa.attention(q, q, q, backend='triton')\n"
        "except ValueError as error: assert 'triton is not installed' in str(error)\n"
        "else: raise AssertionError\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_cpu_does_not_import_the_kernels():
    code = (
        "import sys, torch, fastattn as fa\n"
        "x = torch.ones(1, 1, 2, 4)\n"
        "fa.attention(x, x, x, score=fa.Softcap(2.0))\n"
        "assert 'fastattn.backends.triton' not in sys.modules\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


# Launch tables


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_head_dim_has_a_launch(arch, itemsize):
    for kernel in launch.KERNELS:
        for dim in (1, 8, 40, 64, 80, 96, 128, 192, 256, 320, 512):
            for load in ("", "chain", "heavy"):
                found = launch.launch(kernel, dim, dim // 2 + 1, itemsize, arch, load)
                assert found.block_q >= 16
                assert found.block_k >= 16
                assert all(n & (n - 1) == 0 for n in found[:3])
                assert found.block_q <= PAD


def test_launch_is_by_the_larger_head_dim_and_small_for_few_rows():
    wide = launch.launch("forward", 64, 256, 2, "sm_90")
    assert wide == launch.launch("forward", 256, 64, 2, "sm_90") != launch.launch("forward", 64, 64, 2, "sm_90")
    assert launch.launch("forward", 64, 64, 2, "sm_90", n_q=1).block_q == 16
    assert launch.launch("forward", 64, 64, 2, "sm_90", n_q=17) == launch.launch("forward", 64, 64, 2, "sm_90")


def test_an_architecture_takes_the_nearest_older_table():
    assert launch.table_of("sm_90") == "sm_90"
    assert launch.table_of("sm_89") == "sm_86"
    assert launch.table_of("sm_103") == "sm_100"
    with pytest.raises(ValueError, match="no launch table for 'sm_70'"):
        launch.table_of("sm_70")


def test_a_kernel_without_an_entry_takes_that_of_its_like(monkeypatch):
    tables = {"sm_90": {"jvp dkdv": {"16": {"64": [32, 64, 8, 1]}}, "jvp dkdv, heavy": {"16": {"64": [16, 64, 8, 1]}}}}
    monkeypatch.setattr(launch, "tables", lambda: tables)
    launch.launch.cache_clear()
    try:
        assert launch.launch("jvp grads", 64, 64, 2, "sm_90") == launch.Launch(32, 64, 8, 1)
        assert launch.launch("jvp grads", 64, 64, 2, "sm_90", "heavy") == launch.Launch(16, 64, 8, 1)
        tables["sm_90"]["jvp grads"] = {"16": {"64": [64, 64, 8, 1]}}
        launch.launch.cache_clear()
        assert launch.launch("jvp grads", 64, 64, 2, "sm_90", "heavy") == launch.Launch(64, 64, 8, 1)
        assert launch.launch("jvp dkdv", 64, 64, 2, "sm_90") == launch.Launch(32, 64, 8, 1)
    finally:
        launch.launch.cache_clear()


def test_what_does_not_fit_has_no_launch():
    with pytest.raises(ValueError, match="the forward kernel does not fit sm_90 at a head_dim of 513 in 16 bits"):
        launch.launch("forward", 513, 8, 2, "sm_90")


@needs_compiler
def test_explain_names_the_tile_and_that_nobody_measured_it(monkeypatch):
    monkeypatch.setattr(triton_call, "architecture", lambda device: "sm_89")
    plan = dispatch.plan(call(score=fa.Softcap(2.0)))
    assert (plan.backend, plan.reasons) == ("triton", ())
    assert "tiles of 16 x 32, 4 warps, 2 stages (unmeasured on sm_89, with the tiles of sm_86)" in plan.kernel


@needs_compiler
def test_explain_tells_what_was_timed_from_what_was_not(monkeypatch):
    monkeypatch.setattr(triton_call, "architecture", lambda device: "sm_90")
    timed = lambda **options: "timed on an H200" in triton.description(offline.example(n=64, **options))
    assert timed(head_dim=64, dtype=torch.bfloat16, mask=fa.Causal())
    assert timed(head_dim=128, dtype=torch.bfloat16, mask=fa.Full())
    assert not timed(head_dim=64, dtype=torch.float16, mask=fa.Causal())
    assert not timed(head_dim=96, dtype=torch.bfloat16, mask=fa.Causal())
    assert not timed(head_dim=64, dtype=torch.bfloat16, mask=fa.SlidingWindow(9, 0))
    assert not timed(head_dim=64, dtype=torch.bfloat16, mask=fa.Causal(), chain=True)


@needs_compiler
@pytest.mark.parametrize("kernel", ["forward", "backward_dq", "backward_dkdv", "score_grads"])
def test_a_bias_is_read_in_wide_loads(kernel, tmp_path, monkeypatch):
    """Where the tensor has all coordinates, full tiles are; the tiles at the edges and clamped coordinates go one by one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    narrow = {}
    for name, coords in (("inside", None), ("clamped", fa.Coordinates(q=torch.arange(64)[None]))):
        q = torch.zeros(1, 2, 64, 64, dtype=torch.bfloat16)
        score = fa.Bias(torch.zeros(2, 64, 64, dtype=torch.bfloat16)), fa.Softcap(3.0)
        p = functional.problem(q, q, q, None, score, None, None, 0.0, "tiled", None, coords)
        (one,) = (x for x in offline.recorded(p, "sm_90") if x.kernel.__name__ == kernel)
        narrow[name] = offline.compiled(one, "sm_90").asm["ptx"].count("ld.global.b16")
    assert 0 < 2 * narrow["inside"] <= narrow["clamped"]


@needs_compiler
@pytest.mark.parametrize(
    ("arch", "head_dim", "n_b"), [("sm_80", 64, 1), ("sm_80", 128, 2), ("sm_90", 64, 2), ("sm_90", 128, 1), ("sm_90", 128, 2)]
)
def test_the_gradient_of_a_bias_spills_nothing_in_loops(arch, head_dim, n_b):
    """By itself, and beside dq, where it is written in wide stores but for tiles at the edge. Added up over entries at 128, a
    tile that spills nothing has twice the instructions of the one with a few accesses. Triton 3.6 has a few more."""
    older = metadata.version("triton").startswith("3.6.")
    alone = int(older and (arch, head_dim) == ("sm_80", 128))
    known = {("sm_80", 128, 2): 3, ("sm_90", 128, 2): 5}
    if older:
        known = {("sm_80", 64, 1): 9, ("sm_80", 128, 2): 19, ("sm_90", 128, 2): 10}
    q = torch.zeros(n_b, 2, 256, head_dim, dtype=torch.bfloat16)

    def launched(*more):
        score = (fa.Bias(torch.zeros(2, 256, 256, dtype=torch.bfloat16)), *more)
        p = functional.problem(q, q, q, None, score, None, None, 0.0, "tiled", None, None)
        return {x.kernel.__name__: x for x in offline.recorded(dataclasses.replace(p, param_grads=True), arch)}

    report = offline.report(launched(fa.Softcap(3.0))["score_grads"], arch)
    assert report.loop_spills <= alone, report
    launches = launched()
    assert "score_grads" not in launches
    report = offline.report(launches["backward_dq"], arch)
    assert report.loop_spills <= known.get((arch, head_dim, n_b), 0), report
    ptx = offline.compiled(launches["backward_dq"], arch).asm["ptx"]
    assert ptx.count("st.global.v4.b32") >= 2 * ptx.count("st.global.b16") // 8


# Tuning


@pytest.fixture
def sm_90(monkeypatch):
    """This machine with the tables of sm_90, which may be changed."""
    monkeypatch.setattr(triton_call, "architecture", lambda device: "sm_90")
    yield "sm_90"
    launch.tables.cache_clear()
    launch.launch.cache_clear()


def test_every_kernel_of_the_tables_is_tuned():
    assert set(tune.KERNEL) == set(launch.KERNELS)
    assert {entry.kernel for entry in tune.entries([64], [torch.bfloat16])} == set(launch.KERNELS)


@needs_triton
@pytest.mark.parametrize("kernel", launch.KERNELS)
def test_tuning_launches_the_entrys_kernel_with_the_entrys_configuration(kernel, sm_90):
    """And that kernel alone: others of the same run keep theirs."""
    entry = tune.Entry(kernel, "", 16, 64)
    p, launched = tune._problem(entry, 40, "cpu"), []
    record = lambda kernel, programs, how, *args, **constants: launched.append((kernel.__name__, how))
    planted = launch.Launch(16, 128, 2, 5)
    with tune._table(sm_90, entry, planted):
        tune._run(entry, p, record)
    assert [name for name, how in launched if how == planted] == [tune.KERNEL[kernel]]
    assert triton_call.config(p, kernel) != planted


@needs_triton
def test_tuning_says_what_it_leaves_out(sm_90):
    """Where a table has no entry, torch operations take over: nothing to tune."""
    del launch.tables()[sm_90]["jvp2"]["32"]["256"]
    launch.launch.cache_clear()
    (left,) = tune.tune([256], [torch.float32], minutes=1, n=32, device="cpu", only=("jvp2",))
    assert "jvp2" in str(left)
    assert "left out: the jvp2 kernel does not fit sm_90 at a head_dim of 256 in 32 bits" in str(left)


def test_every_load_has_a_call_to_tune():
    """What is timed for an entry of a table is a call that takes that entry."""
    loads = list(dict.fromkeys(entry.load for entry in tune.entries([64], [torch.bfloat16])))
    assert [*loads, "sums"] == list(launch.LOADS)
    for load in loads:
        assert load_of(tune._problem(tune.Entry("forward", load, 16, 64), 64, "cpu")) == load
    both = offline.example(64, torch.bfloat16, n=64, score=[fa.Bias(torch.zeros(64, 64))], **DENSE)
    assert load_of(both) == "bias"
    assert load_of(dataclasses.replace(both, invariant=True)) == "heavy"


# The real compiler, which needs no GPU


@needs_compiler
@pytest.mark.parametrize(
    ("arch", "head_dim", "options"),
    [
        ("sm_90", 128, {}),
        ("sm_90", 64, {"chain": True}),
        ("sm_80", 128, {"chain": True}),
        ("sm_80", 64, {"mask": fa.Chunked(64, "top_left")}),
    ],
)
def test_defaults_compile_without_spilling_in_loops(arch, head_dim, options, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = set()
    for recorded in offline.recorded(offline.example(head_dim, torch.bfloat16, **options), arch):
        found = offline.report(recorded, arch)
        names.add(found.kernel)
        assert found.loop_spills == 0, str(found)
        assert found.shared <= offline.SHARED[arch] * 1024, str(found)
        assert found.products > 0 or found.kernel in ("row_delta", "span_bounds")
    assert names >= {"forward", "row_delta", "backward_dq", "backward_dkdv"}


@needs_compiler
def test_a_split_head_dim_compiles_without_spilling_in_loops(tmp_path, monkeypatch):
    """A first derivative, a second and a tangent, at a head_dim whose rows fit no tile of this architecture."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = {x.kernel.__name__: x for x in offline.recorded(offline.example(320, torch.float32), "sm_120", 2)}
    reports = [offline.report(found[x], "sm_120") for x in ("backward_dkdv", "backward_dq_jvp", "forward_jvp2")]
    assert [str(x) for x in reports if x.loop_spills or x.shared > offline.SHARED["sm_120"] * 1024] == []


def everything():
    """Gradients of parameters, dropout, dense and custom masks, float32, sinks, coordinates, a head_dim that is padded."""
    import device_cases

    mask = fa.Dense(torch.ones(64, 64, dtype=torch.bool)) & device_cases.MASKS["custom"](1, 4, 64, 64)
    p = offline.example(40, torch.float32, mask=mask, dropout=0.1, n=64, params=True)
    p = dataclasses.replace(p, scores=(fa.Softcap(3.0), fa.RelativeBias(torch.zeros(1, 4, 9))))
    return dataclasses.replace(p, sinks=torch.zeros(1, 4), coords=fa.Coordinates(h=1, q=torch.arange(64)[None]))


def ones():
    """The compiler takes an argument of 1 for a constant: every size, stride and offset that can be 1 is 1 here."""
    q = torch.zeros(1, 1, 1, 1, dtype=torch.float16)
    scores = (fa.Bias(torch.zeros(1, 1, 1, 1)), fa.RelativeBias(torch.zeros(1), offset=1), fa.ALiBi(torch.zeros(1)))
    coords = fa.Coordinates(b=1, h=1, q=1, k=1)
    mask = fa.Dense(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    p = functional.problem(q, q, q, mask, scores, torch.zeros(1), None, 1e-9, "tiled", None, coords)
    return dataclasses.replace(p, dropout_p=1.5 / 2**32, param_grads=True)  # a threshold of 1


@needs_compiler
def test_everything_compiles(tmp_path, monkeypatch):
    """With tangents, and tangents of tangents."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = offline.recorded(everything(), "sm_80", 2)
    for recorded in found:
        offline.compiled(recorded, "sm_80")
    names = [recorded.kernel.__name__ for recorded in found]
    assert {"forward_jvp", "backward_dq_jvp", "backward_dkdv_jvp", "forward_jvp2"} <= set(names)
    assert names.count("score_grads") == 2  # the gradient and its tangent


def bias_of_its_own():
    """The pass over dq writes the gradient of such a bias."""
    score = [fa.Bias(torch.zeros(1, 4, 64, 64, dtype=torch.bfloat16))]
    return offline.example(64, torch.bfloat16, n=64, score=score, params=True)


def bias_of_all_entries():
    """Several batch entries share its gradient, which is summed in float32."""
    q = torch.zeros(2, 4, 64, 64, dtype=torch.bfloat16)
    score = [fa.Bias(torch.zeros(1, 4, 64, 64, dtype=torch.bfloat16))]
    return dataclasses.replace(functional.problem(q, q, q, None, score, None, None, 0.0, "tiled", None, None), param_grads=True)


@needs_compiler
@pytest.mark.parametrize("p", [everything, ones, bias_of_its_own, bias_of_all_entries])
def test_is_read(p):
    """What a Triton cannot read of a kernel's Python it refuses before it optimises anything."""
    for recorded in offline.recorded(p(), "sm_80", 2):
        assert f"tt.func public @{recorded.kernel.__name__}(" in offline.parsed(recorded, "sm_80")


DENSE = {"mask": fa.Dense(torch.ones(64, 64, dtype=torch.bool))}
ONCE = {
    "dense": ("sm_90", 128, DENSE, ("forward", "backward_dq", "backward_dkdv")),
    "dense, mma": ("sm_80", 64, DENSE, ("forward", "backward_dkdv")),
    "bias": ("sm_90", 64, {"score": [fa.Bias(torch.zeros(4, 64, 64, dtype=torch.bfloat16))]}, ("forward",)),
    "slopes": ("sm_90", 64, {"score": [fa.ALiBi(torch.zeros(4))]}, ("forward",)),
    "tangents": ("sm_90", 64, {}, ("forward_jvp", "backward_dq_jvp")),
    "dropout": ("sm_80", 128, {"dropout": 0.1}, ("forward",)),
}


@needs_compiler
@pytest.mark.parametrize("name", ONCE)
def test_exponentials_are_computed_once_and_registers_suffice(name, tmp_path, monkeypatch):
    """A loop has one exponential for each pair of its tile and thread, and in the forward one a row: twice as many are there
    where the softmax is computed in two layouts, or where more warps than the tile has rows for compute the same. A bool mask
    is bits: it takes fewer instructions than the rest of the loop. No value is converted by itself."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arch, head_dim, options, kernels = ONCE[name]
    p = offline.example(head_dim, torch.bfloat16, n=64, **options)
    launches = {x.kernel.__name__: x for x in offline.recorded(p, arch, 2 if name == "tangents" else 1)}
    for each in (launches[kernel] for kernel in kernels):
        seen = offline.inspect(each, arch)
        block_q, block_k = each.args[each.kernel.arg_names.index("BLOCKS")]
        pairs = block_q * block_k / (32 * each.num_warps)
        assert [loop for loop in seen.loops if loop.overlapped[1] > 1.6 * pairs] == [], str(seen.report)
        assert seen.loops
        assert seen.report.loop_spills == 0, str(seen.report)
        assert seen.report.shared <= offline.SHARED[arch] * 1024, str(seen.report)
        loops = sass.loops(sass.instructions(offline._dump(offline.compiled(each, arch).asm["cubin"], "-sass")))
        assert not [one for body in loops for one in body if one.name.startswith("F2F.")], "conversions one by one"
        if name.startswith("dense"):
            plain, masked = seen.loops
            assert masked.instructions < 2 * plain.instructions


HEADS = 4
LENGTHS = (17, 31, 32, 33, 48, 50, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 500, 512, 1000)
VARYING = {  # by lengths: (score, mask)
    "nothing": lambda n_q, n_k: ((), None),
    "softcap and window": lambda n_q, n_k: (fa.Softcap(3.0), fa.SlidingWindow(9, 0, "top_left")),
    "slopes": lambda n_q, n_k: (fa.ALiBi(torch.zeros(HEADS)), fa.Causal("top_left")),
    "bias": lambda n_q, n_k: (fa.Bias(torch.zeros(HEADS, n_q, n_k)), None),
    "bias of entries": lambda n_q, n_k: (fa.Bias(torch.zeros(2, HEADS, n_q, n_k)), None),
    "bias of all heads": lambda n_q, n_k: (fa.Bias(torch.zeros(n_q, n_k)), None),
    "bias of keys": lambda n_q, n_k: (fa.Bias(torch.zeros(2, 1, 1, n_k)), None),
    "bias of rows": lambda n_q, n_k: (fa.Bias(torch.zeros(HEADS, n_q, 1)), None),
    "table": lambda n_q, n_k: (fa.RelativeBias(torch.zeros(HEADS, n_q + n_k - 1)), None),
    "table and bias": lambda n_q, n_k: ((fa.RelativeBias(torch.zeros(n_q)), fa.Bias(torch.zeros(1, n_q, n_k))), None),
    "row spans": lambda n_q, n_k: ((), fa.Chunked(9, "top_left")),
    "two row spans": lambda n_q, n_k: ((), fa.SinkTokens(4) | fa.SlidingWindow(255, 0, "top_left")),
    "lengths": lambda n_q, n_k: ((), fa.Lengths(torch.tensor([1, n_k]))),
    "padding": lambda n_q, n_k: ((), fa.Padding(torch.ones(2, n_k, dtype=torch.bool))),
    "dense": lambda n_q, n_k: ((), fa.Dense(torch.ones(n_q, n_k, dtype=torch.bool))),
    "dense of heads": lambda n_q, n_k: ((), fa.Dense(torch.ones(2, HEADS, n_q, n_k, dtype=torch.bool))),
    "dense of keys": lambda n_q, n_k: (fa.Softcap(3.0), fa.Dense(torch.ones(2, 1, 1, n_k, dtype=torch.bool))),
}


@needs_compiler
@pytest.mark.parametrize("head_dim", [64, 40])
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("name", VARYING)
def test_lengths_beyond_16_are_two_variants_of_every_kernel(name, square, head_dim):
    """Of every launch of a call, its backward with the parameters' gradients, its tangent and its second order."""
    variants = {}
    for n in LENGTHS:
        n_k = n if square else 2 * n + 1
        shapes = (2, n, HEADS, head_dim), (2, n_k, 2, head_dim)
        q, k = (torch.empty(shape, dtype=torch.bfloat16).transpose(1, 2) for shape in shapes)
        score, mask = VARYING[name](n, n_k)
        p = functional.problem(q, k, k, mask, score, None, None, 0.0, "tiled", None, None)
        for i, recorded in enumerate(offline.recorded(dataclasses.replace(p, param_grads=True), "sm_90", 2)):
            kernel, key = offline.variant(recorded, "sm_90")
            variants.setdefault((i, kernel), set()).add(key)
    assert len(variants) >= 8
    assert max(map(len, variants.values())) <= 2, {at: len(keys) for at, keys in variants.items()}


def test_an_integer_apart_is_never_special():
    """Neither 1 nor a multiple of 16, for which Triton compiles anew, and the same number."""
    for n in (*range(100), 1 << 20, (1 << 31) - 1, 1 << 31):
        a, b = apart(n)
        assert a + b == n
        assert all(x != 1 and x % 16 for x in (a, b))
        assert n < (1 << 31) - 5 or a >= 1 << 31  # the sum has 64 bits where n needs them


@needs_compiler
@pytest.mark.parametrize("mask", [fa.Full(), fa.Causal("top_left"), fa.SlidingWindow(9, 0, "top_left"), fa.Chunked(9)])
def test_twenty_lengths_are_two_variants(mask):
    variants = {}
    for n in (1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 200, 256, 1000):
        for recorded in offline.recorded(offline.example(64, torch.bfloat16, mask=mask, n=n), "sm_90"):
            name, key = offline.variant(recorded, "sm_90")
            variants.setdefault(name, set()).add(key)
    assert max(map(len, variants.values())) <= 2, {name: len(keys) for name, keys in variants.items()}


@needs_compiler
def test_lengths_of_a_dense_mask_are_two_variants():
    """Few rows or many; what the mask's own strides are matters to the pass that packs it alone, and lists are made for the
    tiles of several passes."""
    variants = {}
    for n in (2, 7, 16, 17, 31, 32, 48, 63, 64, 100, 128, 129, 200, 1000):
        mask = fa.Dense(torch.ones(n, n, dtype=torch.bool))
        for recorded in offline.recorded(offline.example(64, torch.bfloat16, mask=mask, n=n), "sm_90"):
            name, key = offline.variant(recorded, "sm_90")
            variants.setdefault(name, set()).add(key)
    counts = {name: len(keys) for name, keys in variants.items()}
    assert max(counts[name] for name in counts if name != "tile_lists") == 2, counts
    assert (counts["cell_map"], counts["turn_bits"], counts["tile_lists"]) == (1, 1, 3)


WAITING = {  # masks of tensors whose values are on the device
    "causal": lambda on: fa.Causal(),
    "lengths": lambda on: fa.Lengths(on(2)),
    "documents": lambda on: fa.Documents(on(40)) & fa.Causal(),
    "padding": lambda on: fa.Padding(on(2, 40).bool()),
    "dense": lambda on: fa.Dense(on(1, 40).bool()) & fa.SlidingWindow(9, 0),
    "spans": lambda on: fa.Spans(on(40), on(40)) | fa.SinkTokens(3),
    "prefix": lambda on: fa.PrefixLM(on(2)),
}


@needs_triton
@pytest.mark.parametrize("name", WAITING)
def test_no_call_waits_for_the_device(name):
    """With tensors that have no values to wait for: masks, coordinates, scores, sinks and dropout, to the second order."""
    make = lambda *shape: torch.empty(*shape, device="meta")
    on = lambda *shape: torch.empty(*shape, device="meta", dtype=torch.int32)
    with pytest.raises(RuntimeError, match="meta"):
        on(1).item()
    q, k = make(2, 4, 40, 16), make(2, 2, 40, 16)
    scores = (fa.ALiBi(make(4)), fa.Bias(make(1, 1, 80, 80)), fa.Softcap(3.0), fa.RelativeBias(make(4, 9)))
    coords = fa.Coordinates(q=on(40), k=2)
    p = functional.problem(q, k, k, WAITING[name](on), scores, make(4), None, 0.1, "tiled", None, coords, draw=False)
    rng = torch.empty(1, 2, dtype=torch.int64, device="meta")
    found = offline.recorded(dataclasses.replace(p, rng=rng, param_grads=True), "sm_90", 2)
    assert {"forward", "backward_dq", "forward_jvp2", "score_grads"} <= {launch.kernel.__name__ for launch in found}


@needs_triton
@pytest.mark.parametrize(("setting", "products"), [("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32")])
def test_float32_products_follow_torchs_setting(setting, products):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        found = offline.recorded(offline.example(16, torch.float32, n=32, params=True, chain=True), "sm_90", 2)
    finally:
        torch.set_float32_matmul_precision(before)
    used = [launch for launch in found if launch.kernel.__name__ not in ("row_delta", "span_bounds")]
    assert len(used) >= 8
    assert all(products in launch.args for launch in used)


def test_what_an_offset_inside_a_tile_cannot_span_is_copied():
    apart = lambda stride: torch.empty_strided((1, 1, 4, 8), (0, 0, stride, 1), device="meta")
    assert triton_call.reachable(apart(1 << 23)).stride(2) == 8
    assert triton_call.reachable(apart((1 << 23) - 1)).stride(2) == (1 << 23) - 1
    assert max(high for _, high in tune.LIMITS[:2]) <= triton_call.TALLEST
