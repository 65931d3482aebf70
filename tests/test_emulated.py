"""The kernels as compiled for a GPU, executed on the CPU: their suite, faults that must be found, and the machine itself."""

import pytest
import torch
from processes import ROOT, copied, forked_suite, suite
from test_triton import needs_compiler

import fastattn as fa
from fastattn.backends import triton_call
from fastattn.devtools import emulate
from fastattn.devtools.machine import Fault, Memory
from fastattn.devtools.ptx import Program
from fastattn.kernels.launch import Launch

pytestmark = needs_compiler
SUITE = "sanitized/kernels.py"
PARTS = {  # of the suite: what the others do not show as well
    "sm_90": (
        "test_every_mask[full]", "test_every_mask[dense_documents]", "test_nothing_is_looked_up_beyond_the_last_key[bias]",
        "test_nothing_is_looked_up_beyond_the_last_key[coordinates]", "test_the_gradient_of_a_bias_that_entries_share[full]",
        "test_one_tangent[dense]",
    ),
    "sm_80": ("test_every_mask[causal]", "test_the_gradient_of_a_bias_that_entries_share[causal]"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("arch", PARTS)
def test_suite_as_compiled(arch):
    tests = [f"{SUITE}::{test}" for test in PARTS[arch]]
    done = suite(ROOT, *tests, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="", EMULATE=arch)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"{len(tests)} passed" in done.stdout


FAULTS = {
    "a mask that shows a tile too many": (
        "masks.py", "last = tl.max(tl.where(some, stop, 0))", "last = tl.max(tl.where(some, stop, 0)) + BLOCK_K",
        "test_every_mask[causal]", "access memory that is no tensor's",
    ),
    "keys looked up that do not exist": (
        "masks.py", "tl.where(k0 + BLOCK_K <= size[1], full_hi, full_lo)", "full_hi",
        "test_nothing_is_looked_up_beyond_the_last_key[coordinates]", "access memory that is no tensor's",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_stops_at(fault, tmp_path):
    *change, test, message = FAULTS[fault]
    environment = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "EMULATE": "sm_90"}
    done = forked_suite(copied(tmp_path, [change]), f"{SUITE}::{test}", **environment)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]
    assert message in done.stdout, done.stdout[-3000:]


if triton_call.shim.PRESENT:
    import triton
    import triton.language as tl

    @triton.jit
    def shifted(x, y, by, N: tl.constexpr):
        tl.store(y + tl.arange(0, N), tl.load(x + tl.arange(0, N) + by))

    @triton.jit
    def reversed_in_place(x, N: tl.constexpr, WAIT: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(x + at, at)
        if WAIT:
            tl.debug_barrier()
        tl.store(x + at, tl.load(x + N - 1 - at))

    @triton.jit
    def counted(x):
        tl.store(x, tl.program_id(0))

    @triton.jit
    def passed_on(x, N: tl.constexpr):
        at, here = tl.arange(0, N), tl.program_id(0)
        tl.store(x + (1 - here) * N + at, tl.load(x + at) + 1)

    @triton.jit
    def masked_product(x, mask, y, out):
        """Bytes that are interleaved decide which of a (16, 16) and b (16, 16) are multiplied."""
        at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        half = tl.arange(0, 16)[:, None] * 8 + tl.arange(0, 8)[None, :]
        shown = tl.interleave(tl.load(mask + half), tl.load(mask + 128 + half))
        weights = tl.where(shown != 0, tl.load(x + at), 0.0)
        tl.store(out + at, tl.dot(weights, tl.load(y + at)))

    @triton.jit
    def by_parts(x, y, N: tl.constexpr):
        at = tl.arange(0, N)
        if tl.load(x) > 0:
            y += N
        tl.store(y + at, tl.sort(tl.load(x + at)))

    @triton.jit
    def arithmetic(x, y, f, g, N: tl.constexpr):
        at = tl.arange(0, N)
        a, b = tl.load(x + at), tl.load(y + at)
        tl.store(x + at, (a // b) * 3 + a % b - (a >> 3) + (a & 0xFF ^ b))
        u = tl.load(f + at)
        tl.store(f + at, tl.maximum(tl.abs(u), 0.5) * tl.exp2(-u) / (1.0 + u * u) + tl.cumsum(u, 0))
        tl.store(g + at, u.to(tl.bfloat16).to(tl.float32) - u.to(tl.float16).to(tl.float32) + u.to(tl.int8).to(tl.float32))

    @triton.jit
    def functions(x, y, N: tl.constexpr):
        u = tl.load(x + tl.arange(0, N))
        tl.store(y + tl.arange(0, N), tl.sqrt(u) + tl.rsqrt(u) * tl.log2(u) - tl.log(u) + tl.exp(-u))


ONE_WARP, FOUR = Launch(0, 0, 1, 1), Launch(0, 0, 4, 1)


def run(kernel, grid, *args, how=FOUR, arch="sm_90"):
    with emulate.on(arch):
        triton_call.run(kernel, grid, how, *args)


def test_a_load_beyond_a_tensor():
    x, y = torch.arange(128.0), torch.zeros(128)
    run(shifted, 1, x, y, 0, 128)
    assert torch.equal(x, y)
    with pytest.raises(Fault, match=r"test_emulated.py:\d+, block \(0, 0, 0\): 3 threads .* 0 bytes behind .* of 512 bytes"):
        run(shifted, 1, x, y, 3, 128)
    with pytest.raises(Fault, match="no tensor's"):
        run(shifted, 1, x, y[:100].clone(), 0, 128)


def test_a_thread_reads_what_another_one_wrote():
    x = torch.zeros(64, dtype=torch.int32)
    run(reversed_in_place, 1, x, 64, True)
    assert x.tolist() == list(range(63, -1, -1))
    with pytest.raises(Fault, match="no barrier"):
        run(reversed_in_place, 1, torch.zeros(64, dtype=torch.int32), 64, False)


def test_blocks_that_write_one_word():
    run(counted, 1, torch.zeros(1, dtype=torch.int32))
    with pytest.raises(Fault, match="what another block writes"):
        run(counted, 2, torch.zeros(1, dtype=torch.int32))


def test_a_block_writes_what_another_one_read():
    x = torch.zeros(256, dtype=torch.int32)
    run(passed_on, 1, x, 128)
    assert x.tolist() == [0] * 128 + [1] * 128
    with pytest.raises(Fault, match="a store to what another block reads"):
        run(passed_on, 2, torch.zeros(256, dtype=torch.int32), 128)


def test_a_product_that_triton_gets_wrong_is_refused(monkeypatch):
    """By versions before 3.8."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, 16, generator=g).half() for _ in range(2))
    mask, out = torch.randint(0, 2, (2, 16, 8), generator=g).to(torch.int8), torch.zeros(16, 16)
    exact = torch.where(torch.stack(tuple(mask), -1).reshape(16, 16) != 0, x, 0).float() @ y.float()
    if wrong := tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
        with pytest.raises(Fault, match="masked_product: a product over 16 elements has operands for 32"):
            run(masked_product, 1, x, mask, y, out)
        monkeypatch.setattr(emulate, "miscounted", lambda ttgir: "")
    run(masked_product, 1, x, mask, y, out)
    error = (out - exact).norm() / exact.norm()
    assert error > 0.5 if wrong else error < 1e-3


@pytest.mark.parametrize("arch", emulate.ARCHITECTURES)
@pytest.mark.parametrize("how", [ONE_WARP, FOUR])
def test_arithmetic(how, arch):
    torch.manual_seed(1)
    a, b = torch.randint(-9999, 9999, (256,), dtype=torch.int32), torch.randint(1, 99, (256,), dtype=torch.int32)
    u = torch.randn(256) * 3
    f, g, x = u.clone(), torch.zeros(256), a.clone()
    run(arithmetic, 1, x, b, f, g, 256, how=how, arch=arch)
    quotient = torch.div(a, b, rounding_mode="trunc")
    assert torch.equal(x, quotient * 3 + torch.fmod(a, b) - (a >> 3) + (a & 0xFF ^ b))
    wide = u.double()
    exact = wide.abs().clamp(min=0.5) * torch.exp2(-wide) / (1 + wide * wide) + wide.cumsum(0)
    torch.testing.assert_close(f.double(), exact, atol=1e-4, rtol=1e-5)
    assert torch.equal(g, u.bfloat16().float() - u.half().float() + u.to(torch.int8).float())


def test_functions_that_scores_may_use():
    x, y = torch.rand(128, generator=torch.Generator().manual_seed(0)) * 3 + 0.1, torch.zeros(128)
    run(functions, 1, x, y, 128)
    u = x.double()
    exact = u.sqrt() + u.rsqrt() * u.log2() - u.log() + (-u).exp()
    torch.testing.assert_close(y.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", [1.0, -1.0])
def test_branches_lanes_and_shared_memory(first):
    x, y = torch.randn(128, generator=torch.Generator().manual_seed(0)), torch.zeros(256)
    x[0] = first
    run(by_parts, 1, x, y, 128)
    assert torch.equal(y[128:] if first > 0 else y[:128], x.sort().values)


def test_the_front_with_autograd():
    q, k, v = (torch.randn(1, 2, 40, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with emulate.on("sm_90"):
        assert fa.explain(q, k, v, mask=fa.Causal(), backend="triton").backend == "triton"
        grads = torch.autograd.grad(fa.attention(q, k, v, mask=fa.Causal(), backend="triton").float().square().sum(), (q, k, v))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(fa.attention(*wide, mask=fa.Causal()).square().sum(), wide)
    for x, y in zip(grads, exact, strict=True):
        assert (x.double() - y).norm() < 1e-2 * y.norm()
    with pytest.raises(ValueError, match="these are on cpu"):
        fa.attention(q, k, v, backend="triton")


UNKNOWN = (
    "fma.rn.bf16x2 %r1, %r2, %r3, %r4", "add.cc.u32 %r1, %r2, %r3", "red.global.add.f32 [%rd1], %r1",
    "add.f64 %rd1, %rd2, %rd3", "cvt.rn.sat.f16.f32 %rs1, %r1", "cvt.rna.tf32.f32 %r1, %r2",
    "setp.lt.f16 %p1, %rs1, %rs2", "bar.sync 1, 64", "sin.approx.f32 %r1, %r2",
)  # fmt: skip


@pytest.mark.parametrize("instruction", UNKNOWN)
def test_an_unknown_instruction_is_named(instruction):
    with pytest.raises(NotImplementedError, match=instruction.split()[0].replace(".", r"\.")):
        Program(f".visible .entry f() .reqntid 32 {{ {instruction}; ret; }}")


@pytest.mark.parametrize(("bound", "all_leave"), [(32, True), (0, False), (7, None)])
def test_some_threads_leave(bound, all_leave):
    program = Program(f""".visible .entry f(.param .u64 f_param_0) .reqntid 32 {{
        ld.param.u64 %rd1, [f_param_0]; mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, {bound}; @%p1 ret;
        mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; st.global.b32 [%rd3], %r1; ret; }}""")
    x = torch.full((32,), -1, dtype=torch.int32)
    launch = lambda: program.launch((1,), [x.data_ptr()], 0, Memory({x.data_ptr(): 128}))
    if all_leave is None:
        with pytest.raises(Fault, match="some threads branch"):
            launch()
    else:
        launch()
        assert x.tolist() == ([-1] * 32 if all_leave else list(range(32)))


def test_what_cannot_be_emulated_is_named():
    with pytest.raises(ValueError, match="tensors on the CPU, got one on meta"):
        run(counted, 1, torch.zeros(1, dtype=torch.int32, device="meta"))
    with pytest.raises(ValueError, match=r"arch must be one of sm_80, .*, got 'sm_100'"), emulate.on("sm_100"):
        pass


STORE, LOAD = "st.shared.b32 [%r2], %r1;", "ld.shared.b32 %r4, [%r3];"  # a thread's own place, that of another warp
COPY = "cp.async.ca.shared.global [%r2], [%rd3], 4; cp.async.commit_group;"
MULTIPLY = (
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r10, %r11, %r12, %r13}, %rd4, %rd5, 0, 1, 1, 0, 0;"
    "wgmma.commit_group.sync.aligned;"
)
FENCE, BARRIER, COPIED = "fence.proxy.async.shared::cta;", "bar.sync 0;", "cp.async.wait_group 0;"
MULTIPLIED = "wgmma.wait_group.sync.aligned 0;"
NEEDED = {  # what comes before, what must stand between, what comes after, what is said without it
    "a barrier before a load": (STORE, BARRIER, LOAD, "another warp wrote what is read"),
    "a barrier before a store": (LOAD, BARRIER, STORE, "that another warp has read"),
    "a barrier before another store": (STORE, BARRIER, "st.shared.b32 [%r3], %r1;", "another warp wrote something else"),
    "a wait before a load": (COPY, COPIED, "ld.shared.b32 %r4, [%r2];", "read while a copy writes it"),
    "a wait for the first of two copies": (
        COPY + COPY.replace("%r2", "%r5"), "cp.async.wait_group 1;", "ld.shared.b32 %r4, [%r2];",
        "read while a copy writes it"),
    "a wait for both of two copies": (
        COPY + COPY.replace("%r2", "%r5") + "cp.async.wait_group 1;", COPIED, "ld.shared.b32 %r4, [%r5];",
        "read while a copy writes it"),
    "a wait before a store": (COPY, COPIED, STORE, "written while a copy writes it"),
    "a barrier after a wait": (COPY + COPIED, BARRIER, LOAD, "another warp wrote what is read"),
    "a barrier before a copy": (LOAD, BARRIER, COPY, "that another warp has read"),
    "a fence before a product": (STORE, FENCE, BARRIER + MULTIPLY, "no fence of its proxy"),
    "a barrier before a product": (STORE + FENCE, BARRIER, MULTIPLY, "a product reads what was written"),
    "a wait before a product": (COPY, COPIED + BARRIER, MULTIPLY, "a product reads shared memory while a copy"),
    "a wait before a product's operand is written": (MULTIPLY, MULTIPLIED, BARRIER + STORE, "while a product reads it"),
    "a barrier before a product's operand is written": (MULTIPLY + MULTIPLIED, BARRIER, STORE, "that another warp has read"),
    "a wait before a result": (MULTIPLY, MULTIPLIED, "add.f32 %r4, %r10, %r11;", "used before its wait"),
    "a wait before a result that was moved": (MULTIPLY + "mov.b32 %r6, %r10;", MULTIPLIED, "add.f32 %r4, %r6, %r6;",
                                              "used before its wait"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDED)
def test_order_in_shared_memory(name):
    before, needed, after, message = NEEDED[name]
    x = torch.zeros(128, dtype=torch.int32)

    def launch(body):
        Program(f""".visible .entry f(.param .u64 f_param_0) .reqntid 128 {{
            ld.param.u64 %rd1, [f_param_0]; mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; xor.b32 %r3, %r2, 128;
            add.s32 %r5, %r2, 512; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;
            mov.b64 %rd4, {8 << 16 | 16 << 32}; mov.b64 %rd5, {2048 >> 4 | 8 << 16 | 16 << 32};
            {body} ret; }}""").launch((1,), [x.data_ptr()], 4096, Memory({x.data_ptr(): 512}))

    launch(before + needed + after)
    with pytest.raises(Fault, match=message):
        launch(before + after)
