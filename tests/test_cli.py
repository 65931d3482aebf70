"""The command line as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastattn as fa
from fastattn import cli, masks, scores

ROOT = Path(fa.__file__).parent.parent


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (fa.__version__, "torch", "backend tiled", "backend reference"):
        assert word in out


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fastattn"] == fa.__version__
    assert set(facts["backends"]) == {"tiled", "triton", "hopper", "reference"}


def test_explain(capsys):
    arguments = ["--q", "1,4,64,16", "--k", "1,2,80,16", "--v", "1,2,80,8", "--dtype", "bfloat16"]
    assert cli.main(["explain", *arguments, "--mask", "Causal('bottom_right') & SlidingWindow(15, 0, 'bottom_right')"]) == 0
    out = capsys.readouterr().out
    assert "v (1, 2, 80, 8) bfloat16 on cpu" in out
    assert "backend: tiled" in out


def test_explain_scores(capsys):
    assert cli.main(["explain", "--q", "1,4,64,16", "--score", "Softcap(30.0)", "--dropout", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "softcap" in out
    assert "dropout 0.1" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--q", "1,4,64,16", "--mask", "Causall()"], "--mask 'Causall()': cannot read Causall()"),
        (["--q", "1,4,64,16", "--mask", "Causll()"], "there are Causal, Chunked,"),
        (["--q", "1,4,64,16", "--mask", "Causal(**{'align': 1})"], "cannot read Causal(**{'align': 1})"),
        (["--q", "1,4,64,16", "--mask", "Causal("], "--mask 'Causal(': cannot read"),
        (["--q", "1,4,64,16", "--mask", "__import__('os')"], "cannot read __import__"),
        (["--q", "1,4,64,16", "--mask", "Causal(align='upper')"], "align"),
        (["--q", "1,4,64,16", "--mask", "Causal(1, 2, 3)"], "--mask 'Causal(1, 2, 3)': "),
        (["--q", "1,4,64,16", "--mask", "SlidingWindow(-1, 0)"], "left must be at least 0, got -1"),
        (["--q", "1,4,64,16", "--mask", "resolve('this:s')"], "cannot read"),
        (["--q", "1,4,64,16", "--mask", "Mask()"], "cannot read"),
        (["--q", "1,4,64,16", "--score", "t5_bucket(3)"], "cannot read"),
        (["--q", "1,4,64,16", "--device", "foo"], "--device 'foo'"),
        (["--q", "1,4,64,16", "--k", "1,3,64,16"], "multiple"),
        (["--q", "4,64,16"], "4 dimensions"),
        (["--q", "1,4,64,16", "--backend", "cuda"], "backend must be None or one of"),
    ],
)
def test_explain_errors(capsys, arguments, words):
    assert cli.main(["explain", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "--q", "1,a"], "a shape is written as 1,8,1024,64, got '1,a'"),
        (["explain", "--q", "1,-2,3,4"], "a shape is written as 1,8,1024,64, got '1,-2,3,4'"),
        (["explain", "--q", f"{10**20},1,1,1"], f"sizes must be below 2^31, got '{10**20},1,1,1'"),
        (["compile", "--head-dim", "0"], "must be an integer of at least 1, got '0'"),
        (["compile", "--arch", "sm_75"], "must be sm_80 or a later one of NVIDIA's, such as sm_90, or one of AMD's"),
        (["compile", "--arch", "interpreter"], "such as gfx942, got 'interpreter'"),
        (["bench", "--threads", "0"], "must be an integer of at least 1, got '0'"),
        (["bench", "--minutes", "-1"], "must be a positive number, got '-1'"),
        (["bench", "--into", "no/page.md"], "must be an existing Markdown page, got 'no/page.md'"),
    ],
)
def test_arguments_are_read_first(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_explain_takes_no_memory():
    assert cli.main(["explain", "--q", "1,8,64000000,1600"]) == 0
    assert cli.main(["explain", "--q", "1,8,64,16", "--device", "meta"]) == 0


def test_written_masks_and_scores():
    mask = cli.written("SinkTokens(4) | SlidingWindow(left=3, right=0)", masks.Mask, masks, "--mask")
    assert mask.to_dense(8, 8).sum() > 8
    assert cli.written("Softcap(2.0)", scores.Score, scores, "--score").floats == (2.0,)


def test_bench_list(capsys):
    assert cli.main(["bench", "--list"]) == 0
    assert "llama3-8b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "modls"], "no suite is named modls"),
        (["bench", "--list", "modls"], "no suite is named modls"),
        (["bench", "--only", "x"], "no workload is named x"),
        (["bench", "--device", "cuda"], "--device cuda: there is no CUDA device here"),
    ],
)
def test_bench_errors(capsys, monkeypatch, arguments, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_report_of_something_else(capsys, tmp_path):
    for text in ("[]", "{}", '{"environment": {}}', '{"environment": []}', '{"environment": {"fastattn": "0.1.0"}}'):
        (tmp_path / "results.json").write_text(text)
        assert cli.main(["report", str(tmp_path)]) == 2
        assert "is no results.json of the benchmark" in capsys.readouterr().err
    (tmp_path / "results.json").write_bytes(b"\xff\x00")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "results.json is no results.json: 'utf-8' codec" in capsys.readouterr().err


def test_where_nothing_can_be_written(capsys, monkeypatch, tmp_path):
    """Said before anything is measured."""
    monkeypatch.setattr("fastattn.bench.suite.run", None)
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", "--out", str(tmp_path / "file" / "x")]) == 2
    assert f"fastattn bench: {tmp_path / 'file' / 'x'}: Not a directory" in capsys.readouterr().err
    assert cli.main(["bench", "--into", str(tmp_path / "file")]) == 2
    assert "has none of the marks <!-- bench:models -->, <!-- bench:training -->" in capsys.readouterr().err
    assert cli.main(["bench", "--into", str(tmp_path / "file"), "--base", "HEAD"]) == 2
    assert "--into must be left out with --base" in capsys.readouterr().err


def test_one_workload_is_the_only_one(monkeypatch):
    class Stop(Exception):
        pass

    def run(options):
        assert options.suites == ("models",)
        raise Stop

    monkeypatch.setattr("fastattn.bench.suite.run", run)
    with pytest.raises(Stop):
        cli.main(["bench", "--only", "gpt2"])


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fastattn", "--help"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0
    for command in ("info", "explain", "bench"):
        assert command in done.stdout
