"""For all suites: the ones that take minutes begin first, so that several workers fill in the rest around them and none is left
alone at the end; every test draws the same random numbers in every run; and the interpreter wastes no time.

With EMULATE=sm_90 in the environment the kernels run as compiled for that architecture (fastattn/devtools/emulate.py)."""

import contextlib
import os

import torch

LONG = (
    "test_suite_in_the_interpreter",
    "test_suite_under_ttsem",
    "test_suite_as_compiled",
    "test_default_kernels_touch_no_register_of_a_product_in_flight",
    "test_other_tritons_compile_it",
    "test_the_oldest_triton_compiles_everything",
)


AROUND = contextlib.ExitStack()


def pytest_configure():
    if "EMULATE" in os.environ:
        from fastattn.devtools import emulate

        AROUND.enter_context(emulate.on(os.environ["EMULATE"]))
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.install()


def pytest_unconfigure():
    AROUND.close()


def pytest_runtest_setup():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.name.startswith(LONG))
