"""For all suites: the ones that take minutes begin first, so that several workers fill in the rest around them and none is left
alone at the end; every test draws the same random numbers in every run, and float32 products are float32's; the interpreter
wastes no time; and on a GPU a failure is told at once, and a test after which nothing works there any more is the last one of
its process.

EMULATE=sm_90 in the environment runs the kernels as compiled for that architecture (fastattn/devtools/emulate.py).
OUTCOMES=path has a line of JSON appended there for every test as soon as it is over (fastattn/devtools/gpu_check.py)."""

import contextlib
import json
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


def pytest_configure(config):
    if "OUTCOMES" in os.environ and not hasattr(config, "workerinput"):  # in the process that has all reports
        config.pluginmanager.register(Outcomes(os.environ["OUTCOMES"]), "outcomes")
    torch.set_float32_matmul_precision("highest")  # an environment variable may have it otherwise on a GPU
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


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Ends a process that has lost its GPU: every later test would fail in it, and it would take the others' tests too."""
    report = (yield).get_result()
    if report.failed and torch.cuda.is_initialized():
        print(f"\n{item.nodeid} failed\n{report.longreprtext[-4000:]}", file=sys.__stderr__, flush=True)
        from fastattn import environment

        if reason := environment.lost_gpu():
            print(f"{item.nodeid} lost the GPU: {reason}", file=sys.__stderr__, flush=True)
            if "OUTCOMES" in os.environ:  # nobody else will hear of it
                Outcomes(os.environ["OUTCOMES"]).pytest_runtest_logreport(report)
            os._exit(1)  # pytest-xdist names the test, and goes on in a new process


class Outcomes:
    """A line per report."""

    def __init__(self, path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.passed and report.when != "call":
            return
        line = {"test": report.nodeid, "outcome": report.outcome}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = str(report.longrepr) if crash is None else crash.message
            line["reason"] = (text.splitlines() or [""])[0][:300]
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.name.startswith(LONG))
