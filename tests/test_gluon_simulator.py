"""The simulator of Gluon kernels: small kernels that are right, and each fault that it promises to see."""

import re

import pytest
import torch
from test_triton import needs_compiler

from fastattn.kernels.hopper import gluon as hopper
from fastattn.kernels.shim import jit as portable
from fastattn.kernels.shim import tl

gl, mbarrier = hopper.gl, hopper.mbarrier
pytestmark = needs_compiler
SEEDS = range(12)

if hopper.PRESENT:
    from gluon_simulator import Fault, simulate

    from fastattn.kernels.hopper.gluon import (
        fence_async_shared,
        jit,
        named_barrier_arrive,
        named_barrier_wait,
        tma_load,
        tma_reduce_add,
        tma_store,
        tma_store_wait,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    @portable
    def scaled(x, factor):
        return x * tl.maximum(factor, 1.0)

    @jit
    def producer(a, b, a_s, b_s, full, empty, n, FAULT: gl.constexpr):
        for j in range(n):
            s = j % 2
            if FAULT != "no wait for the release":
                mbarrier.wait(empty.index(s), ((j // 2) & 1) ^ 1)
            mbarrier.expect(full.index(s), a.block_type.nbytes + b.block_type.nbytes)
            tma_load(a, [0, j * 16], full.index(s), a_s.index(s))
            if FAULT != "a load too few":
                tma_load(b, [j * 16, 0], full.index(s), b_s.index(s))
        if FAULT == "a load too many":
            s = n % 2
            mbarrier.wait(empty.index(s), ((n // 2) & 1) ^ 1)
            mbarrier.expect(full.index(s), a.block_type.nbytes)
            tma_load(a, [0, 0], full.index(s), a_s.index(s))

    @jit
    def consumer(out, total, a_s, b_s, out_s, full, empty, n, factor, FAULT: gl.constexpr):
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
        acc = gl.zeros([64, 16], gl.float32, layout)
        for j in range(n):
            s = j % 2
            phase = (j // 2) & 1
            if FAULT == "the wrong phase":
                phase = phase ^ 1
            if FAULT != "no wait for the load":
                mbarrier.wait(full.index(s), phase)
            acc = warpgroup_mma(a_s.index(s), b_s.index(s), acc, is_async=True)
            if FAULT == "released before the product is done":
                mbarrier.arrive(empty.index(s), count=1)
            if FAULT != "no wait for the product":
                acc = warpgroup_mma_wait(0, deps=(acc,))
            if FAULT != "released before the product is done" and FAULT != "no release":
                mbarrier.arrive(empty.index(s), count=1)
            if FAULT == "released twice":
                mbarrier.arrive(empty.index(s), count=1)
        if FAULT == "waits for one product too few":
            acc = warpgroup_mma(a_s.index(0), b_s.index(0), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
        out_s.store(scaled(acc, factor))
        if FAULT != "no fence":
            fence_async_shared()
        tma_store(out, [0, 0], out_s)
        if FAULT == "stored over a store":
            out_s.store(acc)
            fence_async_shared()
        tma_reduce_add(total, [0, 0], out_s)
        if FAULT != "no wait for the store":
            tma_store_wait(0)
        if FAULT == "a named barrier for two":
            named_barrier_arrive(8, 256)

    @jit
    def product(a, b, out, total, n, factor, FAULT: gl.constexpr):
        """out = factor a b in steps of 16 columns of a, and total += out."""
        a_s = gl.allocate_shared_memory(a.dtype, [2, 64, 16], a.layout)
        b_s = gl.allocate_shared_memory(b.dtype, [2, 16, 16], b.layout)
        out_s = gl.allocate_shared_memory(gl.float32, [64, 16], out.layout)
        full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=1)
        if FAULT != "barriers without a fence":
            fence_async_shared()
        gl.warp_specialize(
            [
                (consumer, (out, total, a_s, b_s, out_s, full, empty, n, factor, FAULT)),
                (producer, (a, b, a_s, b_s, full, empty, n, FAULT)),
            ],
            [1],
            [24],
        )

    @jit
    def two_turns(out_ptr, FAULT: gl.constexpr):
        gl.warp_specialize([(first, (out_ptr, FAULT)), (second, (out_ptr, FAULT))], [4], [24])

    @jit
    def first(out_ptr, FAULT: gl.constexpr):
        gl.store(out_ptr + gl.arange(0, 4), gl.full([4], 1.0, gl.float32))
        named_barrier_arrive(8, 256)
        named_barrier_wait(9, 256)

    @jit
    def second(out_ptr, FAULT: gl.constexpr):
        if FAULT != "early":
            named_barrier_wait(8, 256)
        at = out_ptr + gl.arange(0, 4)
        gl.store(at, gl.load(at) * 2.0)
        if FAULT == "early":
            named_barrier_wait(8, 256)
        if FAULT != "no token":
            named_barrier_arrive(9, 256)


def descriptor(x, block):
    bits = 8 * x.element_size()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=min(128, block[1] * bits // 8), element_bitwidth=bits, rank=2)
    return hopper.TensorDescriptor(x, list(x.shape), list(x.stride()), list(block), layout)


def run(fault="", seed=0, n=4):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=g).to(torch.bfloat16) for shape in ((50, 16 * n), (16 * n, 16)))
    out, total = torch.full((50, 16), float("nan")), torch.ones(50, 16)
    simulate(
        product, (1,), descriptor(a, (64, 16)), descriptor(b, (16, 16)), descriptor(out, (64, 16)),
        descriptor(total, (64, 16)), n, 3.0, fault, seed=seed, num_warps=4,
    )  # fmt: skip
    exact = 3 * (a.float() @ b.float())
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(total, exact + 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_pipelined_product(seed):
    """50 rows of a tile of 64: what is outside of a tensor is read as zero and not stored."""
    run(seed=seed)


FAULTS = {
    "no wait for the release": "too many arrivals|written while it is read|used while a copy writes it",
    "a load too few": "nobody can go on: .*partition 0 .consumer. waits for phase 0 of mbarrier 0 at consumer:.*full.index",
    "a load too many": "nobody waited for a load",
    "the wrong phase": "used while a copy writes it|not close",
    "no wait for the load": "used while a copy writes it|not close",
    "released before the product is done": "written while it is read",
    "no wait for the product": "written while it is read",
    "no release": "nobody can go on: .*partition 1 .producer. waits for phase 0 of mbarrier 2",
    "released twice": "too many arrivals|written while|used while|ends inside a phase|not close|nobody can go on",
    "waits for one product too few": "used before its wait",
    "no fence": "without a fence",
    "barriers without a fence": "mbarrier 0 was initialised without a fence",
    "stored over a store": "written while it is read",
    "no wait for the store": "ends with stores",
    "a named barrier for two": "named barrier 8 ends with 128 threads",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault):
    """By some seed; where it is not a matter of timing by every one."""
    found = []
    for seed in SEEDS:
        try:
            run(fault, seed)
        except (AssertionError, TypeError) as error:
            found.append(str(error))
    assert any(re.search(FAULTS[fault], text) for text in found), set(found)
    if fault not in ("no wait for the release", "released before the product is done", "released twice"):
        assert len(found) == len(SEEDS)


def test_named_barriers():
    for seed in SEEDS:
        out = torch.zeros(4)
        simulate(two_turns, (1,), out, "", seed=seed)
        assert out.tolist() == [2.0] * 4
    with pytest.raises(Fault, match="waits for named barrier 9"):
        simulate(two_turns, (1,), torch.zeros(4), "no token")
    early = []
    for seed in SEEDS:
        out = torch.zeros(4)
        simulate(two_turns, (1,), out, "early", seed=seed)
        early.append(out.tolist() != [2.0] * 4)
    assert any(early)


def test_a_pointer_stays_in_its_tensor():
    with pytest.raises(Fault, match="a pointer leaves its tensor"):
        simulate(two_turns, (1,), torch.zeros(3), "")


def test_a_seed_is_an_order():
    texts = set()
    for _ in range(2):
        with pytest.raises(Fault) as error:
            run("no release", 5)
        texts.add(str(error.value))
    assert len(texts) == 1
