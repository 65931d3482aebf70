"""bench --profile: what it needs, that every pass is in its scope, and the tree that it prints."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from fastattn import cli
from fastattn.bench import profile, workloads

GPT2, WINDOW = (replace(w, length=40, head_dim=8) for w in workloads.MODELS if w.name in ("gpt2", "long-window"))


class Proton:
    """Writes down what the profiler is asked; `finalize` leaves the file that the real one leaves."""

    def __init__(self, children=()):
        self.said, self.children, self.path = [], list(children), None

    def start(self, name):
        self.said.append("start")
        self.path = name + ".hatchet"
        return 3

    @contextmanager
    def scope(self, name):
        self.said.append(f"enter {name}")
        yield
        self.said.append(f"exit {name}")

    def finalize(self, session):
        self.said.append(f"finalize {session}")
        with open(self.path, "w") as file:
            json.dump([node("ROOT", children=self.children), {"CUDA": {}}], file)


def node(name, nanoseconds=None, count=1, children=()):
    metrics = {} if nanoseconds is None else {"time (ns)": nanoseconds, "count": count, "device_type": "CUDA"}
    return {"frame": {"name": name, "type": "function"}, "metrics": metrics, "children": list(children)}


def test_every_pass_is_in_its_scope(tmp_path):
    proton = Proton()
    files = profile.run([GPT2, WINDOW], "cpu", tmp_path / "out", proton)
    passes = ["enter forward", "exit forward", "enter backward", "exit backward"]
    scopes = [x for name in ("gpt2", "long-window") for x in (f"enter {name}", *passes, f"exit {name}")]
    assert proton.said == ["start", *scopes, "finalize 3"]
    assert [path.name for path in files] == ["profile.hatchet", "profile.txt"]
    assert all(path.exists() for path in files)


def test_a_backward_that_fails_still_ends_the_session(tmp_path, monkeypatch):
    proton = Proton()
    plain = profile._passes

    def fails(w, x, proton=None):
        plain(w, x)
        if proton is not None:
            raise RuntimeError("no memory")

    monkeypatch.setattr(profile, "_passes", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        profile.run([GPT2], "cpu", tmp_path, proton)
    assert proton.said[-1] == "finalize 3"


def test_the_backward_runs_in_the_scope_s_thread(monkeypatch):
    seen = []
    plain = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *x: seen.append(torch.autograd.is_multithreading_enabled()) or plain(*x))
    profile._passes(GPT2, workloads.inputs(GPT2), Proton())
    assert seen == [False]
    assert torch.autograd.is_multithreading_enabled()


def test_the_tree():
    kernels = [node("row_delta", 1000), node("backward_dkdv", 3000, children=[node("inside", 500)]), node("fill", 200, 4)]
    found = node("ROOT", children=[node("gpt2", children=[node("forward", children=[node("forward", 2000)]),
                                                          node("backward", children=kernels)])])  # fmt: skip
    lines = list(profile.tree(found, {"gpt2": {"forward": 2e6}}))
    assert [line.split()[0] for line in lines] == [
        "gpt2", "forward", "forward", "backward", "backward_dkdv", "inside", "row_delta", "fill"
    ]  # fmt: skip
    assert "6.7 us" in lines[0]
    assert lines[1].endswith("2.0 us  1.0 TFLOP/s")
    assert lines[3].endswith("4.7 us")
    assert lines[4].endswith("3.5 us")
    assert lines[-1].endswith("0.2 us  4 launches")


def test_which_workloads():
    assert [w.name for w in profile.chosen(["models", "overhead"], ["gpt2", "tiny"], "cpu")] == ["gpt2", "tiny"]
    assert len({w.name for w in profile.chosen(["forward", "backward"], [], "cuda")}) == 36
    with pytest.raises(ValueError, match=r"--profile takes the suites models, .*; got training"):
        profile.chosen(["training"], [], "cpu")
    with pytest.raises(ValueError, match="no workload is named gpt3; there are bert-base, gpt2"):
        profile.chosen(["models"], ["gpt3"], "cpu")


def test_without_a_gpu_the_error_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--profile", "--only", "gpt2", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs a GPU and Triton's profiler" in line
    assert "there is no CUDA device here" in line
    assert not (tmp_path / "out").exists()


def test_without_proton_the_error_says_so(monkeypatch):
    import sys

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "triton.profiler", None)
    with pytest.raises(ValueError, match=r"needs a GPU and Triton's profiler .*; .*triton.profiler"):
        profile.require("cuda")


def test_the_command_prints_the_tree(monkeypatch, capsys, tmp_path):
    pass_node = node("forward", children=[node("forward", 1500)])
    proton = Proton([node("gpt2", children=[pass_node])])
    monkeypatch.setattr(profile, "require", lambda device: proton)
    monkeypatch.setattr(profile, "chosen", lambda suites, names, device: [GPT2])
    assert cli.main(["bench", "--profile", "--device", "cpu", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1.5 us" in out
    assert "TFLOP/s" in out
    assert "profile.hatchet" in out
