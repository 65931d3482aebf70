"""The kernels under other Tritons than the installed one: executed by ttsem through the front end, compiled by an older one.

`make test` installs both beside the environment, where it can.
"""

import pytest
import torch
from processes import ROOT, TESTS, copied, overlay, python, suite
from test_emulated import PARTS, SUITE

SANITIZER = ("ttsem.sanitize", "pytest")


@pytest.fixture(scope="module")
def ttsem(tmp_path_factory):
    path = overlay("ttsem")
    if python("-c", "import ttsem.sanitize", path=[path]).returncode:
        pytest.skip("ttsem is not installed here: make test installs it where it can")
    cache = str(tmp_path_factory.mktemp("cache"))  # lines of another checkout would be named otherwise
    environment = dict(TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="", TRITON_CACHE_DIR=cache)
    return lambda package, *arguments: suite(package, *arguments, module=SANITIZER, path=[path], **environment)


@pytest.mark.slow
def test_suite_under_ttsem(ttsem):
    """But for what test_emulated.py runs as compiled, and what others of its tests show as well."""
    alike = [f"test_every_mask[{name}]" for name in ("checkerboard", "dense_custom", "chunked")]
    left_out = *(test for part in PARTS.values() for test in part), *alike, "test_everything_at_once[float32]"
    elsewhere = [f"--deselect=tests/{SUITE}::{test}" for test in left_out]
    done = ttsem(ROOT, SUITE, *elsewhere)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f" passed, {len(elsewhere)} deselected" in done.stdout
    assert "too large to be checked" not in done.stdout, done.stdout[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_suite_on_the_gpu():
    done = suite(ROOT, "sanitized/kernels.py", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


FAULTS = {
    "a store past the last row": (
        "tiles.py", "(first + tl.arange(0, ROWS) < n)[:, None] &", "(first + tl.arange(0, ROWS) >= 0)[:, None] &", "writes",
    ),
    "two heads that write one row": (
        "forward.py", "lse + (b * n_h + h) * n_q + q_idx", "lse + b * n_h * n_q + q_idx", "Program instances run in any order",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_ttsem_stops_at(fault, ttsem, tmp_path):
    *change, message = FAULTS[fault]
    done = ttsem(copied(tmp_path, [change]), "sanitized/kernels.py::test_every_mask[causal]")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]
    assert "KernelFault" in done.stdout
    assert message in done.stdout, done.stdout[-3000:]


OLDER = """
import torch, triton
from fastattn.devtools import offline
assert triton.__version__ == "3.6.0", triton.__version__
for launch in offline.recorded(offline.example(64, torch.bfloat16), "sm_90", 2):
    found = offline.report(launch, "sm_90")
    print(found)
    assert found.loop_spills == 0 and found.shared <= offline.SHARED["sm_90"] * 1024 and not found.warning
"""


@pytest.fixture
def oldest():
    path = overlay("triton36")
    if not (path / "triton").is_dir():
        pytest.skip("triton 3.6.0 is not installed here: make test installs it where it can")
    return path


def test_the_oldest_triton_compiles_the_kernels(oldest, tmp_path):
    done = python("-c", OLDER, path=[oldest], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for kernel in ("forward", "backward_dq", "backward_dkdv", "forward_jvp", "backward_dq_jvp", "backward_dkdv_jvp"):
        assert f"{kernel} " in done.stdout


def test_the_oldest_triton_reads_everything(oldest):
    """Parameters' gradients, dropout and predicates too; and every number that can be 1 as a constant."""
    done = suite(ROOT, "test_triton.py::test_is_read", path=[oldest], TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "4 passed" in done.stdout


WAYS = "parameters or of_a_table or beside or users or coordinates or strides or front or alone"  # from a call to its launches


def test_the_oldest_triton_reads_what_a_suite_launches(oldest, tmp_path):
    """Gradients of every kind of parameter among it. Some tests ask for more than the numbers, and fail here."""
    report = tmp_path / "read.txt"
    arguments = ("-preader", f"-k{WAYS}", "--maxfail=1000", "interpreted/features.py")
    done = suite(ROOT, *arguments, path=[oldest, TESTS], TRITON_INTERPRET="0", READ=str(report))
    told = report.read_text().splitlines()
    assert len(told) == 1, "\n".join(told)
    assert int(told[0].removesuffix(" read")) > 100, done.stdout[-3000:]
