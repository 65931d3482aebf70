"""The benchmark's own judgement: what it calls equal, wrong or slower, and what it writes."""

import importlib
import itertools
import json
import os
import re
from dataclasses import replace
from importlib import metadata

import pytest
import torch

from fastattn import cli
from fastattn.bench import (
    SUITES,
    accuracy,
    cells,
    checks,
    compare,
    features,
    memory,
    numerics,
    page,
    passes,
    plot,
    rates,
    report,
    revisions,
    roof,
    suite,
    sweeps,
    table,
    targets,
    timing,
    training,
    workers,
    workloads,
)
from fastattn.bench.peers import OURS, PEERS, PLAIN, Peer

linux = pytest.mark.skipif(not memory.measurable("cpu"), reason="peak memory is known on Linux only")


def small(w, length=40):
    """A workload of the same kind that takes no time."""
    window = None if w.window is None else 7
    few = dict(documents=min(w.documents, 3), prefix=min(w.prefix, 5))
    return replace(w, batch=min(w.batch, 2), length=length, head_dim=8, window=window, **few)


SMALL = tuple(small(w) for w in workloads.MODELS)
KINDS = tuple(small(w) for w in {c.workload for name in ("masks", "bias") for c in sweeps.SWEEPS[name]("cpu")})
each = pytest.mark.parametrize("w", sorted(SMALL + KINDS, key=lambda w: w.name), ids=lambda w: w.name)


def times(*seconds):
    return timing.Times(seconds, seconds)


def test_a_planted_slow_down_is_found():
    ours = [1.0 + 0.01 * (i % 3) for i in range(21)]
    found = timing.ratio(times(*ours), times(*(1.2 * s for s in ours)))
    assert found.clear
    assert str(found) == "1.20x"


def test_noise_is_no_ratio():
    ours = [1.0 + 0.1 * (i % 3) for i in range(21)]
    found = timing.ratio(times(*ours), times(*ours[1:], ours[0]))
    assert not found.clear
    assert str(found) == "same"


def test_the_interval_covers_the_true_ratio():
    """95 of 100 runs of exponential noise around 1.1, within what chance allows."""
    g = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        noise = 1.1 * (1 + 0.3 * torch.randn(31, generator=g).clamp(-3, 3))
        found = timing.ratio(times(*[1.0] * 31), times(*noise.tolist()))
        covered += found.low <= 1.1 <= found.high
    assert covered >= 182


def test_candidates_take_turns():
    calls = []
    timing.interleave({name: (lambda name=name: calls.append(name)) for name in "abc"}, 0.0, rounds=3)
    assert calls[3:] == list("abc" "bca" "cab")  # after a call each to warm up


def test_a_slow_candidate_stops_early(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing, "MAX_ROUNDS", 20)

    def taking(seconds):
        def call():
            clock[0] += seconds

        return call

    found = timing.interleave({"a": taking(0.01), "b": taking(2.0)}, 10.0)
    assert len(found["b"].seconds) == timing.SLOW_ROUNDS
    assert len(found["a"].seconds) == timing.MAX_ROUNDS


def test_a_call_known_to_be_long_is_run_twice():
    calls = []
    who = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    found = timing.interleave(who, 200.0, known={"a": 30.0, "b": 59.0, "c": 61.0})
    assert len(found["c"].seconds) == calls.count("c") == timing.LONG_ROUNDS
    assert len(found["b"].seconds) == timing.MAX_ROUNDS
    assert timing.ratio(found["a"], found["c"]).value > 0


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@each
def test_the_same_mask_for_every_peer(w):
    x = workloads.inputs(w)
    dense = x.mask.to_dense(w.length, w.length).expand(w.batch, 1, -1, -1)
    visible = workloads.mask_mod(w, x)
    if visible is None:
        assert dense.all()
        return
    b, h, q_idx, k_idx = torch.meshgrid(*(torch.arange(n) for n in (w.batch, 1, w.length, w.length)), indexing="ij")
    assert torch.equal(visible(b, h, q_idx, k_idx), dense)


@pytest.mark.parametrize("direction", passes.PASSES)
@each
def test_every_peer_computes_the_workload(w, direction):
    x = workloads.inputs(w)
    exact = accuracy.exact(w, x, direction)
    assert exact[0].dtype == torch.float64
    computed = 0
    for peer in PEERS:
        if peer.compiles or peer.unavailable("cpu") or peer.cannot(w, "cpu", direction):
            continue
        found = peer.results(peer.build(w, x), x, direction)
        assert accuracy.worst(found, exact) < (3e-2 if w.dtype == torch.bfloat16 else 3e-5), peer.name
        computed += 1
    assert computed >= 2


@each
def test_exact_head_by_head(w):
    """The oracle in slices is the oracle in one piece."""
    wide = workloads.inputs(w).double()
    for direction in passes.PASSES:
        whole = passes.results(PLAIN.build(w, wide), wide, direction)
        for a, b in zip(accuracy.textbook(w, wide, direction), whole, strict=True):
            torch.testing.assert_close(a, b)


def test_nan_is_infinitely_wrong():
    assert accuracy.distance(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")


QUICK = cells.Limits(compiled=False)


def both(w):
    return [sweeps.Cell(w, direction) for direction in ("forward", "forward+backward")]


class Liar(Peer):
    """Fast and wrong."""

    name = "liar"

    def build(self, w, x):
        return lambda x: x.q + (x.k * x.v).repeat_interleave(w.heads // w.kv_heads, 1)


class Broken(Peer):
    name = "broken"

    def build(self, w, x):
        raise RuntimeError("no such kernel\nand more")


def rows(chosen):
    return cells.run("models", list(cells.check("models", chosen, "cpu", QUICK)), "cpu", QUICK)


def among(monkeypatch, ours, *peers):
    for module in (cells, checks):
        monkeypatch.setattr(module, "OURS", ours)
        monkeypatch.setattr(module, "PEERS", (ours, *peers))


def rows_with(monkeypatch, *peers):
    among(monkeypatch, OURS, *peers)
    return list(rows(both(SMALL[1])))


def test_a_wrong_peer_is_wrong_not_fast(monkeypatch):
    for row in rows_with(monkeypatch, Liar(), Broken()):
        assert set(row.times) == {"fastattn"}
        assert row.reasons["liar"].startswith("wrong: error")
        assert row.reasons["broken"] == "RuntimeError: no such kernel"
        assert row.error < 1e-5
        assert "wrong: error" in table.reasons([row])


def test_we_are_judged_alike(monkeypatch):
    class Ours(Liar):
        name = OURS.name

    among(monkeypatch, Ours(), PLAIN)
    [row, _] = rows(both(SMALL[1]))
    assert row.reasons["fastattn"].startswith("wrong")
    assert row.times == {}
    assert "|  - |" in table.cells([row])


@linux
def test_cells_are_checked_in_other_processes():
    """As in this one, with peak memory; in whatever order they are ready."""
    [cell] = [c for c in sweeps.masks("cpu") if (c.workload.name, c.direction) == ("sinks", "forward")]
    told = {}
    for index, found in checks.run("masks", [cell, cell], "cpu", False, 2):
        told[index] = found
    [(_, here)] = checks.run("masks", [cell], "cpu", False, 0)
    assert set(told) == {0, 1}
    for found in told.values():
        assert (found.error, found.plain_error, found.reasons) == (here.error, here.plain_error, here.reasons)
        matrix = 4 * cell.workload.heads * cell.workload.length**2
        assert found.memory["plain"] > matrix > 8 * found.memory["fastattn"]
        assert set(found.seconds) == {"fastattn", "plain"}
    assert here.memory == {}


ECHO = """
import json, os, sys
for line in sys.stdin:
    value = json.loads(line)
    if value == "end":
        sys.stderr.write("this is the end\\n\\n")
        sys.stderr.flush()
        os._exit(3)
    print("said by what it calls")
    print(json.dumps([value, os.getpid()]), flush=True)
    if value == "spoil":
        os._exit(4)
"""


@pytest.fixture
def echo(tmp_path, monkeypatch):
    (tmp_path / "echo_lines.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "echo_lines"


def test_a_process_that_ends_costs_one_answer(echo):
    found = dict(workers.answers(echo, ["a", "end", "b", "c"], 1))
    assert [x.last if isinstance(x, workers.Ended) else x[0] for x in found.values()] == ["a", "this is the end", "b", "c"]
    assert found[0][1] != found[2][1] == found[3][1]


def test_a_process_that_a_value_spoils_costs_no_other_its_answer(echo):
    found = dict(workers.answers(echo, ["a", "spoil", "b"], 1))
    assert [x[0] for x in found.values()] == ["a", "spoil", "b"]
    assert found[0][1] == found[1][1] != found[2][1]


def test_processes_share_the_work(echo):
    found = dict(workers.answers(echo, list(range(20)), 3))
    assert [found[i][0] for i in range(20)] == list(range(20))
    assert 1 <= len({process for _, process in found.values()}) <= 3
    assert list(workers.answers(echo, [])) == []


def test_nothing_is_begun_after_the_time(echo):
    assert [index for index, _ in workers.answers(echo, ["a", "b"], 2, until=0.0)] == [0]


def test_processes_end_with_who_asked(echo):
    asked = workers.answers(echo, ["a", "b", "c"], 1)
    _, (_, process) = next(asked)
    asked.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_lost_cell_says_so(monkeypatch):
    monkeypatch.setattr(checks.workers, "answers", lambda *args: iter([(0, workers.Ended("killed"))]))
    known = list(cells.check("models", both(SMALL[1])[:1], "cpu", replace(QUICK, workers=1)))
    [row] = cells.run("models", known, "cpu", QUICK)
    assert row.reasons == {"fastattn": "the process that checked it ended without an answer: killed"}
    assert row.times == {}
    assert "|   nan |     nan |  - |" in table.cells([row])


def test_unknown_names():
    with pytest.raises(ValueError, match="no workload is named bertt; there are bert-base, gpt2"):
        suite.run(suite.Options(suites=("models",), only=("bertt",)))
    with pytest.raises(ValueError, match="no suite is named model; there are models"):
        suite.run(suite.Options(suites=("model",)))


def test_cuda_lengths():
    on_cuda = {cell.workload.name: cell.workload for cell in sweeps.models("cuda")}
    assert on_cuda["gpt2"].length == 4 * next(w for w in workloads.MODELS if w.name == "gpt2").length
    assert on_cuda["gpt2"].dtype == torch.bfloat16


def test_training_is_the_same_model_twice():
    *_, last = training.run("cpu", steps=2)
    assert last.losses["torch"][0] == pytest.approx(last.losses["fastattn"][0])
    assert last.drift < 1e-4
    assert len(last.seconds["torch"]) == 2


def test_training_without_the_text(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match="pydoc_data"):
        training.text()


BUILDERS = {(t.build, t.dtype, t.gradients): t for t in targets.targets() if not t.overhead}


@pytest.mark.parametrize("target", BUILDERS.values(), ids=lambda t: f"{t.name}-{t.dtype}-{t.direction}")
def test_targets_compare_the_same_thing(target):
    ours, torchs = target.build(64, target.dtype, target.gradients)
    a, b = ours(), torchs()
    bar = 3e-2 if target.dtype == torch.bfloat16 else 1e-4
    for x, y in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (a, b)), strict=True):
        torch.testing.assert_close(x, y, atol=bar, rtol=bar)


def test_verdicts():
    first = targets.targets()[0]
    assert (first.name, first.length, first.bound) == ("full", 512, 0.95)
    for found, verdict in ((times(0.96, 0.96, 0.96), "met"), (times(0.9, 0.9, 0.9), "missed"), (times(0.9, 0.9, 1.0), "noise")):
        assert targets.Row(first, times(1.0, 1.0, 1.0), found, None).verdict == verdict
    overhead = next(t for t in targets.targets() if t.overhead)
    row = targets.Row(overhead, times(30e-6, 30e-6), times(5e-6, 5e-6), None)
    assert row.value == pytest.approx(25.0)
    assert (row.bound, row.verdict) == (20.0, "missed")
    slow = targets.Row(overhead, times(131e-6, 131e-6), times(106e-6, 106e-6), None)  # the same difference on half the speed
    assert (slow.bound, slow.verdict) == (pytest.approx(40.0), "met")
    shown = next(t for t in targets.targets() if t.bound is None)
    assert targets.Row(shown, times(1.0, 1.0), times(0.1, 0.1), None).verdict == ""
    assert "missed" in table.targets([row])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_rates_need_a_gpu(capsys):
    assert rates.main(["triton"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


@linux
def test_peak_memory_of_a_known_size():
    """In a process of its own, as the benchmark does it."""
    import subprocess
    import sys

    code = (
        "import torch; from fastattn.bench import memory; memory.settle()\n"
        "print(memory.peak(lambda: (torch.ones(64 << 20, dtype=torch.uint8), None)[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 63 << 20 <= int(done.stdout) <= 72 << 20


@linux
def test_a_cell_that_fails_has_a_reason():
    [bad, good] = features.measured([("feature", "backward", who, n, "cpu") for who, n in (("nobody", "x"), ("torch", 64))])
    assert bad["bytes"] is None
    assert "TypeError" in bad["reason"]
    assert good["bytes"] >= 0


def test_markdown():
    assert table.markdown(["a", "b"], [["x", "1"], ["yy", "22"]]) == "| a  |  b |\n| -- | -: |\n| x  |  1 |\n| yy | 22 |"


def test_report(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:targets -->\nold\n<!-- /bench:targets -->\nafter\n")
    assert report.insert(page, {"targets": r"| \1 new |", "memory": "m"}, "Measured.") == ["targets"]
    assert page.read_text() == "before\n<!-- bench:targets -->\n| \\1 new |\n\nMeasured.\n<!-- /bench:targets -->\nafter\n"
    with pytest.raises(ValueError, match="none of the marks"):
        report.insert(page, {"memory": "m"}, "")


def test_a_whole_run(monkeypatch, tmp_path):
    monkeypatch.setattr(sweeps, "MODELS", SMALL[:2])
    monkeypatch.setattr(training, "LENGTH", 16)
    results = suite.run(suite.Options(suites=("models", "training"), quick=True, workers=0))
    assert {row.workload for row in results.cells["models"]} == {w.name for w in SMALL[:2]}
    files = suite.write(results, tmp_path / "out")
    data = json.loads(files[0].read_text())
    assert set(SUITES) <= set(data)
    assert data["models"][0]["peers"]["fastattn"]["ratio"] == [1.0, 1.0, 1.0]
    assert data["environment"]["torch"] == torch.__version__
    assert files[1].read_text().startswith("## models")


def test_the_first_call_is_told():
    text = cells.first_call(SMALL[0], "cpu")
    assert re.fullmatch(rf"the first forward and backward of {SMALL[0].name} took [\d.]+ s, the second [\d.]+ ms", text)


@pytest.mark.parametrize("by", [KeyboardInterrupt, RuntimeError("CUDA error: an illegal memory access")])
def test_an_interrupted_run_keeps_what_it_has(by, monkeypatch, tmp_path):
    real = cells.run

    def interrupted(*args):
        yield next(iter(real(*args)))
        raise by

    monkeypatch.setattr(sweeps, "MODELS", SMALL[:2])
    monkeypatch.setattr(cells, "run", interrupted)
    if by is KeyboardInterrupt:
        assert cli.main(["bench", "models", "--quick", "--out", str(tmp_path)]) == 0
    else:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            cli.main(["bench", "models", "--quick", "--out", str(tmp_path)])
    kept = json.loads((tmp_path / "results.json").read_text())
    assert len(kept["models"]) == 1
    assert "interrupted" in kept["notes"][-1]
    assert ("illegal memory access" in kept["notes"][-1]) == (by is not KeyboardInterrupt)


def test_numerics_tell_a_mean_from_none():
    """Few rows suffice: torch's fused bf16 gradients lose digits to the keys' mean, ours keep them. So with tangents."""
    rows = {(row.data, row.who): row.errors for row in numerics.run("cpu", 256)}
    mean = "key mean 3, value mean 3"
    assert rows[mean, "fastattn tiled"]["dq"] < 2.5e-3
    assert rows[mean, "sdpa"]["dq"] > 10 * rows["no mean", "sdpa"]["dq"]
    ours, formula = rows[mean, "fastattn tiled"], rows[mean, numerics.FORMULA]
    assert ours["out'"] < 2.5e-3 < formula["out'"] / 10
    assert ours["dq'"] < formula["dq'"] / 3
    assert set(rows[mean, "sdpa"]) == set(numerics.FIRST)
    assert "fastattn tiled" in table.numerics([numerics.Row(mean, "fastattn tiled", {"dq": 1e-3})])


def test_numerics_of_the_second_order_are_those_of_a_difference():
    *leaves, do = (x.double() for x in numerics.inputs(numerics.DATA[2], 40))
    *_, moved, again = numerics._all(numerics._plain, leaves, do)
    along = numerics.directions(leaves)
    ends = [[x + step * y for x, y in zip(leaves, along, strict=True)] for step in (1e-6, -1e-6)]
    outs = [numerics._plain(*x) for x in ends]
    dqs = [numerics._gradients(numerics._plain, x, do)[0] for x in ends]
    for found, (after, before) in ((moved, outs), (again, dqs)):
        torch.testing.assert_close(found, (after - before) / 2e-6, atol=1e-6, rtol=1e-6)


def test_hosts_quick(tmp_path):
    found = suite.run(suite.Options(suites=("hosts",), quick=True))
    assert [row.model for row in found.hosts][:2] == ["nn.MultiheadAttention", "nn.TransformerEncoder"]
    section = found.sections()["hosts"]
    assert "module replaced: 2" in section
    assert f"torch {metadata.version('torch')}" in section
    assert "DIFFERS" not in section
    suite.write(found, tmp_path)
    assert '"restored": true' in (tmp_path / "results.json").read_text()


def test_rates_are_counted_as_everyone_counts_them():
    w = workloads.Workload("", "", 2, 16, 16, 4096, 128)
    assert sweeps.flops(w, 1.0, 1.0) == 4 * 2 * 16 * 4096**2 * 128
    assert sweeps.flops(replace(w, causal=True), 2.5, 0.501) == 2.5 * 2 * 2 * 16 * 4096**2 * 128  # half, by convention
    assert sweeps.flops(replace(w, causal=True, window=512), 1.0, 0.11) == pytest.approx(0.11 * 4 * 2 * 16 * 4096**2 * 128)
    assert sweeps.flops(w, passes.PASSES["double backward"], 1.0) is None


def test_the_sweep_is_in_flash_attentions_terms():
    for cell in sweeps.forward("cuda"):
        w = cell.workload
        assert (w.batch * w.length, w.heads * w.head_dim, w.dtype) == (16384, 2048, torch.bfloat16)
    assert {c.workload.length for c in sweeps.forward("cuda")} == {512, 1024, 2048, 4096, 8192, 16384}
    assert len(sweeps.backward("cuda")) == 36


@pytest.mark.parametrize("suite_name", sweeps.SWEEPS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_of_cells_are_unique(suite_name, device):
    found = [(c.workload.name, c.direction) for c in sweeps.SWEEPS[suite_name](device)]
    assert len(found) == len(set(found))


def test_the_roof():
    found = roof.Roof({"float32": 1e9}, 1e8)
    assert found.seconds("float32", 2e9, 1.0) == 2.0
    assert found.seconds("float32", 1.0, 3e8) == 3.0
    assert roof.Roof({"float32": 1e9, "bfloat16": 1e6}, 1e8).seconds("bfloat16", 2e9, 1.0) == 2.0
    assert roof.Roof({"float32": 1e9, "bfloat16": 1e10}, 1e8).seconds("bfloat16", 2e10, 1.0) == 2.0
    w = workloads.Workload("", "", 1, 4, 2, 10, 8)
    assert roof.bytes_moved(w, "forward") == 4 * 10 * 8 * (4 + 2 + 2 + 4)


def test_the_roof_is_measured(monkeypatch):
    monkeypatch.setitem(roof.MATRIX, "cpu", 64)
    monkeypatch.setitem(roof.MEMORY, "cpu", 1 << 20)
    found = roof.measure("cpu", {torch.float32, torch.bfloat16})
    assert set(found.flops) == {"float32", "bfloat16"}
    assert min(*found.flops.values(), found.bandwidth) > 0


def test_what_does_not_fit_the_time_is_named(monkeypatch):
    monkeypatch.setattr(sweeps, "MODELS", SMALL[:3])
    monkeypatch.setattr(suite.roof, "measure", lambda device, dtypes: None)
    found = suite.run(suite.Options(suites=("models",), minutes=1e-9, compiled=False, workers=0))
    assert len(found.cells["models"]) == 1
    assert found.notes == [
        f"models: 5 of 6 left out, the time was up: {SMALL[0].name} forward+backward, "
        + ", ".join(f"{w.name} {d}" for w in SMALL[1:3] for d in ("forward", "forward+backward"))
    ]


def test_minutes_are_shared_out():
    options = suite.Options(suites=("forward", "backward"), minutes=10)
    assert options.seconds("forward") == pytest.approx(240)
    assert options.seconds("backward") == pytest.approx(360)
    for device, seconds in (("cpu", (180, 360, 120)), ("cuda", (396, 0, 264))):  # targets are the CPU's alone
        options = suite.Options(suites=("backward", "targets", "masks"), minutes=11, device=device)
        assert tuple(map(options.seconds, options.suites)) == pytest.approx(seconds)


def test_several_calls_in_one_time():
    calls = []
    found = timing.interleave({"a": lambda: calls.append(1)}, 0.0, rounds=3, repeat=10)
    assert len(calls) == 40
    assert len(found["a"].seconds) == 3


SEED = torch.Generator().manual_seed(7)


def planted(slower=1.0, machine=1.0, noise=0.01, only=None):
    """A run of twelve cells: ours, and peers that take 1.5 and 3 times as long."""
    found = {"environment": {"cpu": "x", "gpu": None, "device": "cpu", "threads": 1}}

    def rounds(seconds):
        return tuple((seconds * (1 + noise * torch.randn(15, generator=SEED))).tolist())

    rows = []
    for i in range(12):
        row = cells.Row("forward", f"w{i}", "", "", "forward", 128, 64, 0.0, 0.0)
        factor = slower if only is None or i == only else 1.0
        for name, share in (("fastattn", factor), ("sdpa", 1.5), ("plain", 3.0)):
            taken = rounds(machine * (i + 1) * 1e-3 * share)
            row.times[name] = timing.Times(taken, taken)
        rows.append(row)
    return json.loads(json.dumps({**found, "forward": [row.json() for row in rows]}))


def test_the_same_code_twice_shows_no_change():
    for _ in range(20):
        assert {c.verdict for c in compare.compare(planted(), planted(machine=1.4))} == {"same"}


def test_a_slower_cell_is_found_between_runs():
    changes = compare.compare(planted(), planted(1.2, machine=0.8, only=4))
    assert {c.cell: c.verdict for c in changes if c.verdict != "same"} == {"forward w4 forward": "slower"}
    assert next(c for c in changes if c.verdict == "slower").factor == pytest.approx(1.2, rel=0.03)
    faster = compare.compare(planted(1.2), planted())
    assert {c.verdict for c in faster} == {"faster"}
    assert "faster" in compare.text(faster)
    assert "12 of 12 cells show no change" in compare.text(compare.compare(planted(), planted()))


def test_peers_that_disagree_tell_nothing():
    """One peer alone became slower, as where memory is short: ours did not become faster."""
    after = planted(1.2)
    for row in after["forward"]:
        peer = row["peers"]["plain"]
        peer["rounds"] = [1.6 * s for s in peer["rounds"]]
    assert {c.verdict for c in compare.compare(planted(), after)} == {"same"}


def test_noise_hides_a_change_rather_than_making_one():
    assert {c.verdict for c in compare.compare(planted(noise=0.3), planted(1.05, noise=0.3))} == {"same"}


def test_runs_that_cannot_be_compared():
    other = planted()
    other["environment"]["cpu"] = "y"
    with pytest.raises(ValueError, match="cpu is 'x' in the first and 'y' in the second"):
        compare.compare(planted(), other)
    empty = {**planted(), "forward": []}
    with pytest.raises(ValueError, match="have no cells"):
        compare.compare(planted(), empty)
    old = planted()
    del old["forward"][0]["length"]
    with pytest.raises(ValueError, match="another version of the benchmark: 'length' is missing"):
        compare.compare(planted(), old)


def test_turns_are_joined():
    whole = revisions.merged([planted(), planted(), planted()])
    assert len(whole["forward"]) == 12
    assert {len(p["rounds"]) for p in whole["forward"][0]["peers"].values()} == {45}
    runs = [planted(), planted()]
    runs[1]["forward"][0]["peers"]["plain"]["rounds"] = [1.0]  # it was too slow for more
    assert set(revisions.merged(runs)["forward"][0]["peers"]) == {"fastattn", "sdpa"}
    runs[1]["forward"][0]["peers"]["sdpa"]["rounds"] = [1.0, 2.0]  # nobody kept up: the rounds that all took part in
    whole = revisions.merged(runs)["forward"][0]["peers"]
    assert {name: len(peer["rounds"]) for name, peer in whole.items()} == {"fastattn": 16, "sdpa": 16, "plain": 16}


def test_another_revision_runs_this_benchmark(monkeypatch, tmp_path):
    """In a repository of its own: the library is the other revision's, the benchmark is the one at hand."""
    import subprocess

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e@x", *arguments], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "library.py").write_text("old")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "suite.py").write_text("old")
    git("add", ".")
    git("commit", "-qm", "one")
    (tmp_path / "library.py").write_text("new")
    (tmp_path / "bench" / "suite.py").write_text("new")
    monkeypatch.setattr(revisions, "HERE", tmp_path / "bench")
    seen = []

    def run(tree, told):
        seen.append(((tree / "library.py").read_text(), (tree / "bench" / "suite.py").read_text(), told["minutes"]))
        return planted(1.5 if tree == tmp_path else 1.0)

    monkeypatch.setattr(revisions, "_run", run)
    before, after = revisions.against("HEAD", suite.Options(suites=("forward",), minutes=6))
    assert sorted(seen) == [("new", "new", 1.0)] * 3 + [("old", "new", 1.0)] * 3
    assert [what[0] for what in seen] == ["old", "new", "new", "old", "old", "new"]
    assert {c.verdict for c in compare.compare(before, after)} == {"slower"}
    assert subprocess.check_output(["git", "worktree", "list"], cwd=tmp_path, text=True).count("\n") == 1
    with pytest.raises(ValueError, match=r"git worktree add: .*nowhere"):
        revisions.against("nowhere", suite.Options(suites=("forward",)))
    with pytest.raises(ValueError, match=r"only models, .* can be compared with another revision, not training"):
        revisions.against("HEAD", suite.Options(suites=("training",)))


def test_a_run_in_a_process_of_its_own():
    told = vars(suite.Options(suites=("overhead",), only=("tiny",), quick=True))
    found = revisions._run(revisions.HERE.parent, told)
    assert [row["workload"] for row in found["overhead"]] == ["tiny", "tiny"]
    assert cells.Row.read(found["overhead"][0]).ratio("sdpa") is not None


def test_the_page_needs_nothing_beside_it():
    pytest.importorskip("matplotlib")
    data = planted()
    data["environment"] |= {"fastattn": "0", "date": "d", "command": "c <&>"}
    data["notes"] = ["a note"]
    for i, row in enumerate(data["forward"]):
        row |= {"model": "causal", "length": 2 ** (7 + i % 3), "head_dim": 64 * (1 + i // 6), "flops": 1e9, "roof": 1e-4}
        row |= {"error": 1e-7, "plain_error": 1e-7}
    section = "| a | b |\n| - | -: |\n|  | <1 |\n\nwords\n\n- one\n- two"
    text = page.html(data, page.read_sections(f"## forward\n\n{section}\n"))
    assert text.count("<svg") == len(plot.figures(page.rows(data))) == 3
    assert "<tr><td></td><td>&lt;1</td></tr>" in text
    assert "<li>one</li><li>two</li>" in text
    assert "<code>c &lt;&amp;&gt;</code>" in text
    assert not re.search(r'(src|href)="(?!#)', text.replace("xlink:href", ""))


CUDA_PEERS = [p for p in PEERS if (p.cuda and p.package is not None and not p.compiles) or p.name == "flash-attn 4"]


def by_torch(q, k, v, scale, causal=False, window=None, softcap=0.0, slopes=None, sink=None, bias=None):
    """(B, L, H, D) attention in float32, as the fakes below compute it."""
    q, k, v = (t.transpose(1, 2).float() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    s = q @ k.mT * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if slopes is not None:
        s = s - slopes[:, None, None] * distance.abs()
    if bias is not None:
        s = s + bias.float()
    if causal:
        s = s.masked_fill(distance < 0, -torch.inf)
    if window is not None:
        s = s.masked_fill(distance >= window, -torch.inf)
    if sink is not None:
        s = torch.cat([s, sink.float()[:, None, None].expand(*s.shape[:1], -1, *s.shape[2:3], 1)], -1)
    return (s.softmax(-1)[..., : v.shape[2]] @ v).transpose(1, 2)


def documents(q, k, v, cu_seqlens, attend):
    cuts = cu_seqlens.tolist()
    return torch.cat([attend(*(t[:, a:b] for t in (q, k, v))) for a, b in itertools.pairwise(cuts)], 1)


def stand_ins():
    """Modules of the peers' names that have their signatures and compute with torch, in the inputs' dtype."""
    from types import SimpleNamespace

    def flash(q, k, v, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, learnable_sink=None):
        window = None if window_size == (-1, -1) else window_size[0] + 1
        return by_torch(q, k, v, softmax_scale, causal, window, softcap, alibi_slopes, learnable_sink).to(q.dtype)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, **rest):
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        x = (t[None] for t in (q, k, v))
        return documents(*x, cu_seqlens_q, lambda *x: flash(*x, softmax_scale, causal, **rest))[0]

    def fla(q, k, v, scale, window_size=None, cu_seqlens=None):
        def one(*x):
            return by_torch(*x, scale, True, window_size).to(q.dtype)

        return one(q, k, v) if cu_seqlens is None else documents(q, k, v, cu_seqlens, one)

    def fast(q, k, v, is_causal):
        return by_torch(*(t.transpose(1, 2) for t in (q, k, v)), q.shape[-1] ** -0.5, is_causal).transpose(1, 2).to(q.dtype)

    def efficient(q, k, v, attn_bias, scale):
        if isinstance(attn_bias, tuple):
            kind, cu = attn_bias
            return documents(q, k, v, cu, lambda *x: by_torch(*x, scale, kind == "causal").to(q.dtype))
        if attn_bias == "lower":
            return by_torch(q, k, v, scale, True).to(q.dtype)
        return by_torch(q, k, v, scale, bias=attn_bias).to(q.dtype)

    def blocks(kind):
        return SimpleNamespace(from_seqlens=lambda ns: (kind, torch.tensor([0, *ns]).cumsum(0)))

    both = SimpleNamespace(flash_attn_func=flash, flash_attn_varlen_func=varlen)
    with_lse = SimpleNamespace(
        flash_attn_func=lambda *a, **b: (flash(*a, **b), None), flash_attn_varlen_func=lambda *a, **b: (varlen(*a, **b), None)
    )
    biases = SimpleNamespace(
        BlockDiagonalCausalMask=blocks("causal"), BlockDiagonalMask=blocks("full"), LowerTriangularMask=lambda: "lower"
    )
    jvp = SimpleNamespace(JVPAttn=SimpleNamespace(fwd_dual=lambda q, k, v, causal: fast(q, k, v, causal)))
    return {
        "flash_attn": both, "fa3_fwd_interface": both, "flash_attn.cute": with_lse,
        "fla.ops.attn": SimpleNamespace(parallel_attn=fla),
        "fastflash_attention": SimpleNamespace(fast_attention=fast), "jvp_flash_attention.jvp_attention": jvp,
        "xformers.ops": SimpleNamespace(memory_efficient_attention=efficient), "xformers.ops.fmha.attn_bias": biases,
    }  # fmt: skip


@pytest.mark.parametrize("peer", CUDA_PEERS, ids=lambda p: p.name)
def test_peers_that_need_cuda_are_called_as_they_want_it(monkeypatch, peer):
    """Layouts, scale, windows and packing reach a stand-in of each peer's signature as they should."""
    known, real = stand_ins(), importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, package=None: known.get(name) or real(name, package))
    called = 0
    for w in sorted(set(SMALL + KINDS), key=lambda w: w.name):
        w = replace(w, dtype=torch.bfloat16, head_dim=16)
        x = workloads.inputs(w)
        for direction in ("forward", "forward+backward", "forward mode"):
            if peer.cannot(w, "cpu", direction):
                continue
            found = peer.results(peer.build(w, x), x, direction)
            assert accuracy.worst(found, accuracy.exact(w, x, direction)) < 3e-2, (w.name, direction)
            called += 1
    assert called >= 2
