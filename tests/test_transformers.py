"""hosted/models.py under two versions of transformers, which `make test` installs beside the environment where it can."""

import importlib.util

import pytest
from processes import ROOT, overlay, suite

from fastattn.bench import hosts
from fastattn.bench.host_models import MODELS, Model

WITHIN = "the_way_back or generation or packed or weights_where or does_not_ask or padding or each_model or more_rows"
VERSIONS = {"transformers523": (), "transformers517": ("-k", WITHIN)}


@pytest.mark.slow
@pytest.mark.parametrize("name", VERSIONS)
def test_suite_under_transformers(name):
    path = [overlay(name)] if (overlay(name) / "transformers").is_dir() else []
    if not path and (name == "transformers517" or importlib.util.find_spec("transformers") is None):
        pytest.skip(f"{name} is not installed here: make test installs it where it can")
    done = suite(ROOT, "hosted/models.py", *VERSIONS[name], "-rs", path=[*path, overlay("hosts")], HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_a_package_that_is_missing_is_named():
    notes = []
    assert list(hosts.run((Model("a model", "no_such_package", lambda: None),), notes)) == []
    assert notes == ["a model left out: no_such_package is not installed"]


@pytest.mark.parametrize("model", [m for m in MODELS if m.library == "torch"], ids=lambda m: m.name)
def test_modules_of_torch(model):
    row = hosts.compare(model)
    assert row.calls > 0
    assert row.restored
    assert not row.left
    assert row.forward < 1e-6
    assert row.gradient < 1e-5
