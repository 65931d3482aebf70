"""The benchmark's workloads as regression tests under pytest-benchmark: grouped by cell, comparable between runs.

    pytest bench/ --benchmark-autosave
    pytest bench/ --benchmark-compare --benchmark-compare-fail=median:20%

Every result is compared with float64 before it is timed. `make test` does not come here.
"""

import pytest
import torch

from fastattn.bench import accuracy, passes, sweeps
from fastattn.bench.peers import OURS, PEERS

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CELLS = [(suite, cell) for suite in ("models", "masks", "bias", "second-order") for cell in sweeps.SWEEPS[suite](DEVICE)]
WHO = [peer for peer in PEERS if peer is OURS or peer.name == "sdpa"]


@pytest.mark.parametrize("peer", WHO, ids=lambda p: p.name)
@pytest.mark.parametrize(("suite", "cell"), CELLS, ids=[f"{s}-{c.workload.name}-{c.direction}" for s, c in CELLS])
def test_speed(benchmark, suite, cell, peer):
    from fastattn.bench.workloads import inputs

    w, direction, _ = cell
    reason = peer.unavailable(DEVICE) or peer.cannot(w, DEVICE, direction)
    if reason is not None:
        pytest.skip(f"{peer.name}: {reason}")
    benchmark.group = f"{suite}: {w.name}, {direction}"
    benchmark.extra_info["shape"] = str(w)
    x = inputs(w, DEVICE)
    attend = peer.build(w, x)
    found, exact = peer.results(attend, x, direction), accuracy.exact(w, x, direction)
    yardstick = accuracy.worst(accuracy.textbook(w, x, direction), exact)
    assert accuracy.worst(found, exact) <= 8 * yardstick + 4 * torch.finfo(w.dtype).eps
    call = passes.timed(attend, x, direction)

    def run():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        benchmark.pedantic(run, rounds=7, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads)
