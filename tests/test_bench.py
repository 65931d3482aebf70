"""The benchmark's own judgement: what it calls equal, wrong or slower, and what it writes."""

import json
import re
from dataclasses import replace

import pytest
import torch

from fastattn.bench import (
    SUITES,
    accuracy,
    memory,
    models,
    numerics,
    report,
    suite,
    table,
    targets,
    timing,
    training,
    workloads,
)
from fastattn.bench.peers import OURS, PEERS, PLAIN, Peer

linux = pytest.mark.skipif(not memory.measurable("cpu"), reason="peak memory is known on Linux only")


def small(w, length=40):
    """A workload of the same kind that takes no time."""
    window = None if w.window is None else 7
    return replace(w, batch=min(w.batch, 2), length=length, head_dim=8, window=window, documents=min(w.documents, 3))


SMALL = tuple(small(w) for w in workloads.MODELS)
each = pytest.mark.parametrize("w", SMALL, ids=lambda w: w.name)


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


@each
def test_every_peer_computes_the_workload(w):
    x = workloads.inputs(w)
    exact = accuracy.exact(w, x)
    assert exact[0].dtype == torch.float64
    for peer in PEERS:
        if peer.name == "flex" or peer.unavailable("cpu") or peer.cannot(w, "cpu", True):
            continue
        out, grads = accuracy.results(peer.build(w, x), x)
        bar = 2e-2 if w.dtype == torch.bfloat16 else 2e-5
        assert accuracy.distance(out, exact[0]) < bar
        assert accuracy.worst(grads, exact[1]) < bar


@each
def test_exact_head_by_head(w):
    """The oracle in slices is the oracle in one piece."""
    x = workloads.inputs(w)
    wide = x.double()
    out, grads = accuracy.results(PLAIN.build(w, wide), wide)
    sliced = accuracy.exact(w, x)
    torch.testing.assert_close(sliced[0], out)
    for a, b in zip(sliced[1], grads, strict=True):
        torch.testing.assert_close(a, b)


def test_nan_is_infinitely_wrong():
    assert accuracy.distance(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")


class Liar(Peer):
    """Fast and wrong."""

    name = "liar"

    def build(self, w, x):
        return lambda: x.q + (x.k * x.v).repeat_interleave(w.heads // w.kv_heads, 1)


class Broken(Peer):
    name = "broken"

    def build(self, w, x):
        raise RuntimeError("no such kernel\nand more")


def rows_with(monkeypatch, *peers):
    monkeypatch.setattr(models, "PEERS", (OURS, *peers))
    return list(models.run([small(workloads.MODELS[1])], "cpu", 0.0, False))


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

    ours = Ours()
    monkeypatch.setattr(models, "OURS", ours)
    monkeypatch.setattr(models, "PEERS", (ours, PLAIN))
    [row, _] = models.run([small(workloads.MODELS[1])], "cpu", 0.0, False)
    assert row.reasons["fastattn"].startswith("wrong")
    assert row.times == {}
    assert "|  - |" in table.models([row])


def test_unknown_names():
    with pytest.raises(ValueError, match="no workload is named bertt; there are bert-base, gpt2"):
        models.select(["bertt"], "cpu")
    with pytest.raises(ValueError, match="no suite is named model; there are models"):
        suite.run(suite.Options(suites=("model",)))


def test_cuda_lengths():
    on_cuda = {w.name: w for w in models.select(None, "cuda")}
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
    assert row.verdict == "missed"
    shown = next(t for t in targets.targets() if t.bound is None)
    assert targets.Row(shown, times(1.0, 1.0), times(0.1, 0.1), None).verdict == ""
    assert "missed" in table.targets([row])


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
    [bad, good] = memory.in_process(
        "fastattn.bench.probe", [("feature", "backward", "nobody", "x", "cpu"), ("feature", "backward", "torch", 64, "cpu")]
    )
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
    monkeypatch.setattr(workloads, "MODELS", SMALL[:2])
    monkeypatch.setattr(models, "MODELS", SMALL[:2])
    monkeypatch.setattr(models, "measure_memory", lambda rows, device: None)
    monkeypatch.setattr(training, "LENGTH", 16)
    results = suite.run(suite.Options(suites=("models", "training"), quick=True))
    assert {row.workload for row in results.models} == {w.name for w in SMALL[:2]}
    files = suite.write(results, tmp_path / "out")
    data = json.loads(files[0].read_text())
    assert set(SUITES) <= set(data)
    assert data["models"][0]["peers"]["fastattn"]["ratio"] == [1.0, 1.0, 1.0]
    assert data["environment"]["torch"] == torch.__version__
    assert files[1].read_text().startswith("## models")


def test_the_first_call_is_told():
    text = models.first_call(SMALL[0], "cpu")
    assert re.fullmatch(rf"the first forward and backward of {SMALL[0].name} took [\d.]+ s, the second [\d.]+ ms", text)


def test_an_interrupted_run_keeps_what_it_has(monkeypatch):
    real = models.run

    def interrupted(*args):
        yield next(iter(real([SMALL[1]], "cpu", 0.0, False)))
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "run", interrupted)
    results = suite.run(suite.Options(suites=("models",), quick=True))
    assert len(results.models) == 1
    assert "interrupted" in results.notes[0]


def test_numerics_tell_a_mean_from_none():
    """Few rows suffice: torch's fused bf16 gradients lose digits to the keys' mean, ours keep them."""
    rows = {(row.data, row.who): row.errors["dq"] for row in numerics.run("cpu", 256)}
    mean = "key mean 3, value mean 3"
    assert rows[mean, "fastattn tiled"] < 2.5e-3
    assert rows[mean, "sdpa"] > 10 * rows["no mean", "sdpa"]
    assert "fastattn tiled" in table.numerics([numerics.Row(mean, "fastattn tiled", {"dq": 1e-3})])


def test_hosts_quick(tmp_path):
    found = suite.run(suite.Options(suites=("hosts",), quick=True))
    assert [row.model for row in found.hosts][:2] == ["nn.MultiheadAttention", "nn.TransformerEncoder"]
    section = found.sections()["hosts"]
    assert "module replaced: 2" in section
    assert f"torch {torch.__version__}" in section
    assert "DIFFERS" not in section
    suite.write(found, tmp_path)
    assert '"restored": true' in (tmp_path / "results.json").read_text()
