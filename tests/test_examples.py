"""The examples run in a short form, and both attentions give the same: losses, predictions, gradients, hidden states."""

import importlib
import importlib.util
import re
import sys

import pytest
import torch
from processes import ROOT, overlay, python, suite

pytest.importorskip("pydoc_data.topics", reason="this Python has no pydoc_data to train on")

FOLDER = ROOT / "examples"
SHARED = {"__init__", "common", "words"}
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED)


def main(name, *arguments):
    """What main() of an example returns; skipped where a package is missing, which the reason names."""
    module = importlib.import_module(f"examples.{name}")
    try:
        return module.main(*arguments)
    except importlib.import_module("examples.common").Missing as missing:
        pytest.skip(str(missing))


def gap(curves, stop=None):
    """The largest difference of two loss curves."""
    return max(abs(a - b) for a, b in zip(*(losses[:stop] for losses in curves.losses.values()), strict=True))


def test_textbook():
    differences, empty_rows = main("textbook", 33)
    assert set(differences) == {"no mask", "padding", "causal", "cross"}
    assert max(differences.values()) < 1e-6
    assert empty_rows


@pytest.mark.parametrize("name", ["speech", "tabular", "translate", "vit"])
def test_trains(name):
    curves, found = main(name, 3, torch.float64)
    assert gap(curves) < 1e-10
    assert found["eager"] == found["fastattn"]


def test_gpt():
    curves, found = main("gpt", 3, torch.float64)
    assert gap(curves) < 1e-10
    for whole, chained, same_text in found.values():
        assert whole == pytest.approx(chained, rel=1e-10)
        assert same_text
    assert found["eager"][0] == pytest.approx(found["fastattn"][0], rel=1e-10)


@pytest.mark.parametrize("name", ["bert_sentences", "bert_tokens"])
def test_fine_tuning(name):
    for scores in main(name, 3):
        assert scores["eager"] == pytest.approx(scores["fastattn"], abs=0.02)


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_loss_curves(name, monkeypatch):
    """Training on fastattn is training on eager: 100 steps from one seed."""
    monkeypatch.setattr(importlib.import_module(f"examples.{name}"), "BATCH", 4)
    curves, _ = main(name, 100, torch.float64)
    assert gap(curves) < 1e-8
    curves, _ = main(name, 100, torch.float32)
    assert gap(curves, 20) < 1e-4
    first, last = ([losses[i] for losses in curves.losses.values()] for i in (0, -1))
    assert last[1] == pytest.approx(last[0], rel=0.01)
    assert last[1] < 0.9 * first[1]  # and something was learned


def test_loss_curves_see_a_difference(monkeypatch):
    """The bars above are not so wide that another scale of the scores, by a millionth, would pass."""
    common = importlib.import_module("examples.common")
    attend = common.ATTENTIONS["fastattn"]
    monkeypatch.setitem(common.ATTENTIONS, "fastattn", lambda q, k, v, mask=None: attend(q * (1 + 1e-6), k, v, mask))
    curves, _ = main("bert", 10, torch.float64)
    assert gap(curves) > 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers_models", "real_weights", "whisper"])
def test_examples_of_transformers(name):
    """hosted/examples.py, with the packages that `make test` installs beside the environment where it can."""
    path = [x for x in map(overlay, ("transformers523", "hosts", "speech")) if x.is_dir()]
    done = suite(ROOT, "hosted/examples.py", f"-k{name}", "-rs", path=path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    if " passed" not in done.stdout:
        pytest.skip(" ".join(re.findall(r"needs [^:\n]*", done.stdout)))


def test_from_the_command_line():
    done = python("-m", "examples.textbook", "--steps", "16")
    assert done.returncode == 0, done.stderr
    assert "a row without keys" in done.stdout


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("vit", "sklearn", "scikit-learn"), ("transformers_models", "transformers", "transformers")],
)
def test_a_missing_package_is_named(name, module, package, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == module else find(n, *a))
    monkeypatch.setattr(sys, "argv", [name])
    example, common = (importlib.import_module(f"examples.{x}") for x in (name, "common"))
    with pytest.raises(SystemExit, match=f"needs {package}, which is not installed"):
        common.command(example.main)


def test_pages():
    """Each example is a page, and the README has a line and the tests a name for it."""
    readme, tests = (FOLDER / "README.md").read_text(), (ROOT / "tests" / "test_examples.py").read_text()
    for name in NAMES:
        text = (FOLDER / f"{name}.py").read_text()
        assert text.count("\n") < 120
        assert f"python -m examples.{name}\n" in text
        assert f"[{name}.py]({name}.py)" in readme
        assert f'"{name}"' in tests
