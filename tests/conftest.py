"""For all suites: the ones that take minutes begin first, so that several workers fill in the rest around them and none is left
alone at the end; every test draws the same random numbers in every run; the interpreter wastes no time; and on a GPU a test
after which nothing works there any more is named, and is the last one of its process.

With EMULATE=sm_90 in the environment the kernels run as compiled for that architecture (fastattn/devtools/emulate.py)."""

import contextlib
import os
import sys

import pytest
import torch

LONG = (
    "test_suite_in_the_interpreter",
    "test_suite_under_ttsem",
    "test_suite_as_compiled",
    "test_default_kernels_touch_no_register_of_a_product_in_flight",
    "test_other_tritons_compile_it",
    "test_the_oldest_triton_compiles_the_kernels",
)


AROUND = contextlib.ExitStack()


def pytest_configure():
    if "EMULATE" in os.environ:
        from fastattn.devtools import emulate

        AROUND.enter_context(emulate.on(os.environ["EMULATE"]))
    if "ttsem" in sys.modules:  # it executes Triton's operations, and PTX is none of them
        from fastattn.backends import triton_call

        triton_call.pairs = lambda device: False
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.install()


def pytest_unconfigure():
    AROUND.close()


def pytest_runtest_setup():
    torch.manual_seed(0)


def lost():
    """What torch says of a CUDA context in which nothing works any more, since a kernel of it did what it must not; or None."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return str(error)
    return None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Ends a process that has lost its GPU: every later test would fail in it, and it would take the others' tests too."""
    report = (yield).get_result()
    if report.failed and (reason := lost()):
        print(f"{report.longreprtext}\n\n{item.nodeid} lost the GPU: {reason}", file=sys.__stderr__, flush=True)
        os._exit(1)  # pytest-xdist names the test, and goes on in a new process


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.name.startswith(LONG))
