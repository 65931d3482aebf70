"""A pytest plugin for a Triton that is only to read the kernels: whatever a suite launches goes to its front end, once, and the
numbers come from the tiled backend, so that what follows is launched as well.

READ=path: there a line says what could not be read, and how many variants could."""

import contextlib
import os
from unittest import mock

ARCH = "sm_90"
VERBS = ("forward", "backward", "forward_jvp", "backward_jvp", "forward_jvp2")
AROUND = contextlib.ExitStack()


def pytest_configure():
    from fastattn.backends import tiled, triton, triton_call
    from fastattn.devtools import offline

    read = set()

    def run(kernel, grid, how, *arguments):
        launch = offline.Recorded(kernel, arguments, how.num_warps, how.num_stages)
        variant = offline.variant(launch, ARCH)
        if variant not in read and min(grid if isinstance(grid, tuple) else (grid,)):
            read.add(variant)
            try:
                offline.parsed(launch, ARCH)
            except Exception as error:
                say(f"{kernel.__name__}: {type(error).__name__}: {str(error).splitlines()[-1]}")

    def both(name):
        reading, computing = getattr(triton, name), getattr(tiled, name)

        def verb(p, *arguments):
            reading(p, *arguments)
            return computing(p, *arguments)

        return verb

    patches = dict(run=run, architecture=lambda device: ARCH, launches_on=lambda device: True)
    AROUND.enter_context(mock.patch.multiple(triton_call, **patches))
    AROUND.enter_context(mock.patch.multiple(triton, **{name: both(name) for name in VERBS}))
    AROUND.callback(lambda: say(f"{len(read)} read"))


def pytest_unconfigure():
    AROUND.close()


def say(line):
    where = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
    with open(os.environ["READ"], "a") as file:
        file.write(f"{where}: {line}\n" if where else f"{line}\n")
