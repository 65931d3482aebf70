"""What the compiler makes of the default configurations may not get worse than fastattn/devtools/baseline.json has it."""

import json

import pytest
from test_triton import needs_compiler

from fastattn import cli
from fastattn.devtools import baseline, offline
from fastattn.devtools.offline import Report

GOOD = Report("forward", 8, 2, 255, 0, 0, 99 * 1024, 24)


@needs_compiler
@pytest.mark.parametrize(("arch", "head_dim"), baseline.CELLS)
def test_nothing_got_worse(arch, head_dim, tmp_path, monkeypatch):
    """Compiles what changed since the baseline was written, and nothing else."""
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    written_with = json.loads(baseline.PAGE.read_text())["triton"]
    if triton.__version__ != written_with:
        pytest.skip(f"the baseline is that of triton {written_with}, this is {triton.__version__}")
    found, _ = baseline.regressions(arch, head_dim)
    assert not found, "\n".join([*found, "if this is meant: python -m fastattn compile --baseline"])


@needs_compiler
def test_the_baseline_is_complete_and_clean():
    entries = baseline.read()
    for arch, dim in baseline.CELLS:
        assert {name for name, _ in baseline.launches(arch, dim)} <= set(entries)
    for name, entry in entries.items():
        assert (entry["warning"], entry["loop_spills"]) == ("", 0), name


@needs_compiler
def test_a_changed_key_compiles_and_is_held_against_the_entry(tmp_path, monkeypatch):
    """The smallest kernel of a cell, with a key that does not fit and fewer matrix instructions than before."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name, launch = next((n, x) for n, x in baseline.launches("sm_80", 64) if n.endswith("row_delta"))
    monkeypatch.setattr(baseline, "launches", lambda arch, dim: iter([(name, launch)]))
    entry = {**baseline.read()[name], "key": baseline.key(launch, "sm_80")}  # of the Triton at hand
    monkeypatch.setattr(baseline, "read", lambda: {name: entry})
    assert baseline.regressions("sm_80", 64) == ([], 0)
    monkeypatch.setattr(baseline, "read", lambda: {name: {**entry, "key": "", "products": 1}})
    (fault,), compiled = baseline.regressions("sm_80", 64)
    assert "no matrix instructions any more" in fault
    assert compiled == 1


def test_what_counts_as_worse():
    assert baseline.faults(GOOD, "sm_86", {}) == []
    assert "3 accesses" in baseline.faults(GOOD._replace(loop_spills=3), "sm_86", {"loop_spills": 2})[0]
    assert baseline.faults(GOOD._replace(loop_spills=3), "sm_86", {"loop_spills": 3}) == []
    assert "sm_86 has 99 K" in baseline.faults(GOOD._replace(shared=99 * 1024 + 1), "sm_86", {})[0]
    assert baseline.faults(GOOD._replace(warning="wgmma"), "sm_90", {}) == ["wgmma"]


def test_the_assemblers_warning_is_read():
    log = "ptxas info : Used 96 registers\nptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions " \
          "are serialized due to insufficient register resources in function 'forward'\n"  # fmt: skip
    assert "C7510" in offline.serialised(log)
    assert offline.serialised(log.splitlines()[0]) == ""


@needs_compiler
def test_the_assembler_is_heard(tmp_path, monkeypatch):
    """Also where the binary is in the cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch = next(x for n, x in baseline.launches("sm_90", 64) if n.endswith("row_delta"))
    for _ in range(2):
        assert "registers" in offline._logged(launch, "sm_90")[1]


def test_the_command_that_writes_it(monkeypatch, capsys):
    monkeypatch.setattr(baseline, "write", lambda: iter([("sm_90, d 64, causal: forward", GOOD)]))
    assert cli.main(["compile", "--baseline"]) == 0
    assert "sm_90, d 64, causal: forward" in capsys.readouterr().out
