"""Planted faults of synchronisation in the kernels for sm_90: each is seen by the simulator, as the fault that it is.

A change that moves the text a fault replaces fails here too, and says which text is gone.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from bars import assert_within
from test_hopper_backward import cotangents, exact, problem
from test_triton import needs_compiler

from fastattn.backends import hopper, hopper_backward, hopper_call, tiled, triton_call
from fastattn.kernels import launch

pytestmark = needs_compiler
if hopper.gluon.PRESENT:
    from gluon_simulator import simulate
HOPPER = Path(launch.__file__).parent / "hopper"
SEEDS = 8
WAIT = "            acc, p = warpgroup_mma_wait(0, deps=(acc, ahead))\n"
RELEASE = "            mbarrier.arrive(v_free.index(v_slot), count=1)\n"

# name -> (what stands there, the fault, what the simulator says)
FORWARD = {
    "keys are never released": (
        "            mbarrier.arrive(k_free.index(k_slot), count=1)\n", "", "nobody can go on: .*produce. waits for phase"),
    "values are never released": (
        "            mbarrier.arrive(v_free.index(v_slot), count=1)\n            acc = acc", "            acc = acc",
        "nobody can go on: .*produce. waits for phase"),
    "queries are never released": (
        "            mbarrier.arrive(q_free.index(W), count=1)  # its last product is done\n", "            pass\n",
        "nobody can go on: .*produce. waits for phase"),
    "queries are released before they are read": (
        "        mbarrier.wait(q_full.index(W), parity)\n",
        "        mbarrier.wait(q_full.index(W), parity)\n        mbarrier.arrive(q_free.index(W), count=1)\n",
        "written while it is read|while a copy writes it"),
    "values are released before their product is done": (
        WAIT + RELEASE, RELEASE + WAIT, "written while it is read"),
    "the wrong phase of the values": (
        "            mbarrier.wait(v_full.index(v_slot), v_phase)\n            acc =",
        "            mbarrier.wait(v_full.index(v_slot), v_phase ^ 1)\n            acc =",
        "while a copy writes it|NaN|nobody can go on"),
    "the producer waits for a first release": (
        "    mbarrier.wait(free.index(slot), phase ^ 1)\n", "    mbarrier.wait(free.index(slot), phase)\n",
        "nobody can go on"),
    "nobody begins the turns": (
        "named_barrier_arrive(TURN, BOTH)  # the first consumer begins", "pass",
        "nobody can go on: .*waits for named barrier 8"),
    "a turn that nobody takes": (
        "named_barrier_wait(TURN, BOTH)  # the turn that nobody took", "pass", "named barrier 8 ends with 128 threads"),
    "the tile is stored over an earlier one": (
        "        tma_store_wait(0)  # what was stored before has left its tile\n", "", "written while it is read"),
    "the low half over the high half": (
        "            tma_store_wait(0)\n            o_tile.store(low)", "            o_tile.store(low)",
        "written while it is read"),
    "out is stored without a fence": (
        "        o_tile.store(high)\n        fence_async_shared()\n", "        o_tile.store(high)\n", "without a fence"),
    "out is stored before its last product is done": (
        "        acc = warpgroup_mma_wait(0, deps=(acc,))\n        mbarrier", "        mbarrier",
        "unsupported operand|products in flight"),
    "a product too few is waited for": (
        "s = warpgroup_mma_wait(1, deps=(s,))", "s = warpgroup_mma_wait(2, deps=(s,))", "used before its wait"),
    "nobody waits for the last store": (
        "the turn that nobody took\n    tma_store_wait(0)\n", "the turn that nobody took\n", "ends with stores"),
}  # fmt: skip

BACKWARD = {
    "queries are never released": (
        "            mbarrier.arrive(q_empty.index(stage), count=1)\n", "",
        "nobody can go on: .*producer. waits for phase .*q_empty"),
    "cotangents are never released": (
        "            if OVERLAP == 2:\n                mbarrier.arrive(do_empty.index(stage), count=1)\n", "",
        "nobody can go on: .*producer. waits for phase .*do_empty"),
    "cotangents are released twice": (
        "            if OVERLAP < 2:\n                mbarrier.arrive(do_empty.index(stage), count=1)\n",
        "            mbarrier.arrive(do_empty.index(stage), count=1)\n",
        "written while it is read|too many arrivals|nobody can go on"),
    "dp is used before it is waited for": (
        "dp = warpgroup_mma_wait(1, deps=(dp,))", "dp = warpgroup_mma_wait(2, deps=(dp,))", "used before its wait"),
    "one group alone releases the queries": (
        "mbarrier.init(q_empty.index(i), count=2)", "mbarrier.init(q_empty.index(i), count=1)",
        "written while it is read|too many arrivals|while a copy writes it"),
    "queries are released before dk is done": (
        "            columns = keys",
        "            mbarrier.arrive(q_empty.index(stage), count=1)\n            columns = keys",
        "written while it is read|too many arrivals"),
    "the wrong phase": (
        "            phase = (count // STAGES) & 1\n", "            phase = ((count // STAGES) & 1) ^ 1\n",
        "while a copy writes it|nobody can go on|NaN"),
    "the producer waits for a first release": (
        "            phase = ((count // STAGES) & 1) ^ 1\n", "            phase = (count // STAGES) & 1\n", "nobody can go on"),
    "bytes of the statistics are not expected": (
        "q.block_type.nbytes + BLOCK_Q * 4", "q.block_type.nbytes", "while a copy writes it|inside a phase|nobody can go on"),
    "values are not waited for": (
        "    mbarrier.wait(kv_full.index(1), 0)\n", "", "while a copy writes it|nobody waited for a load|NaN"),
    "no barrier between the halves of x": (
        "            named_barrier_wait(8, 256)  # both halves of x' are there\n", "",
        "written while it is read|without a fence|largest error|NaN"),
    "one buffer of x": ("x_s.index(count % 2)", "x_s.index(0)", "written while it is read"),
    "copies do not see the barriers": (
        "    fence_async_shared()  # copies see the barriers\n", "", "initialised without a fence"),
    "x is stored without a fence": (
        "            fence_async_shared()\n            dk = ", "            dk = ", "without a fence"),
    "dq over the tile before": (
        "            tma_store_wait(0)  # the copy of the tile before has read what dq is about to overwrite\n", "",
        "written while it is read"),
    "dq is stored before its product is done": (
        "            dq = warpgroup_mma_wait(0, deps=(dq,))\n", "", "has no attribute|used before its wait"),
    "row sums are used before their product is done": (
        "dk, dv, sums = warpgroup_mma_wait(1, ", "dk, dv, sums = warpgroup_mma_wait(2, ",
        "used before its wait"),
    "keys are overwritten while the other group reads them": (
        "    named_barrier_wait(9, 256)  # the other group has read the keys for its last dq\n", "",
        "written while it is read|largest error"),
    "nobody waits for dk and dv to be stored": (
        "keys.slice(W * KEYS, KEYS, 2))\n    tma_store_wait(0)\n", "keys.slice(W * KEYS, KEYS, 2))\n", "ends with stores"),
}  # fmt: skip


@pytest.fixture
def mutant(tmp_path):
    """(file, what stands there, the fault) -> the file's module with the fault."""

    def load(file, old, new):
        text = (HOPPER / file).read_text()
        assert text.count(old) == 1, f"{file} holds this {text.count(old)} times: {old}"
        path = tmp_path / file
        path.write_text(text.replace(old, new))
        spec = importlib.util.spec_from_file_location(f"fastattn.kernels.hopper.mutant_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def launches(monkeypatch):
    """Sets the seed with which launches are simulated; a program has many work items."""

    def of(seed):
        def run(kernel, count, how, *args):
            simulate(kernel, (count,), *args, seed=seed, num_warps=how.num_warps)

        monkeypatch.setattr(triton_call, "run", run)

    monkeypatch.setattr(triton_call, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(hopper_call, "processors", lambda device: 1)
    return of


def forward(head_dim=64):
    p = problem("causal", "none", (1, 1, 1, 560, 560, head_dim, head_dim))
    out, lse, low = hopper.forward(p, True)
    exact_out, exact_lse, _ = tiled.forward(p, True)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.float() + low.float(), exact_out.float(), rtol=1e-2, atol=1e-2)


def backward(head_dim=64):
    p = problem("causal", "none", (1, 2, 1, 140, 140, head_dim, head_dim))
    do, _ = cotangents(p)
    found = hopper_backward.backward(p, do, None, *tiled.forward(p, True))
    for what, x, truth in zip(("dq", "dk", "dv"), found, exact(p, do, None)):
        assert_within(x, truth, [truth.to(x.dtype)], 3, what)


def seen(launches, run):
    """What the first seed says that sees a fault."""
    for seed in range(SEEDS):
        launches(seed)
        try:
            run()
        except (AssertionError, AttributeError, TypeError) as error:  # the last two: a product used as if it were a tile
            return str(error)
    return "nothing"


@pytest.mark.parametrize("run", [forward, backward])
def test_without_a_fault_every_seed_passes(run, launches):
    for head_dim in (64, 128):
        assert seen(launches, lambda head_dim=head_dim: run(head_dim)) == "nothing"


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name, mutant, launches, monkeypatch):
    *change, found = FORWARD[name]
    monkeypatch.setattr(hopper, "kernels", mutant("forward.py", *change))
    assert re.search(found, seen(launches, forward))


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name, mutant, launches, monkeypatch):
    *change, found = BACKWARD[name]
    monkeypatch.setattr(hopper_backward, "kernels", mutant("backward.py", *change))
    assert re.search(found, seen(launches, backward))
