"""Python processes of their own: with another Triton in front of the installed one, or with a changed copy of the package."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def python(*arguments, path=(), cwd=ROOT, **environment):
    """Run this Python with `path` in front of everything that it imports."""
    front = os.pathsep.join(map(str, (*path, ROOT, os.environ.get("PYTHONPATH", ""))))
    env = {**os.environ, "PYTHONPATH": front, **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=env, check=False)


def overlay(name):
    """The folder of packages that `make test` installs beside the environment."""
    return ROOT / ".overlays" / name


def copied(to, changes=()):
    """A copy of the package in the folder `to`, with (file of kernels/, old text, new text) replaced; each must be there.

    What Python has compiled comes along, but for what it is writing just now.
    """
    shutil.copytree(ROOT / "fastattn", to / "fastattn", symlinks=False, ignore=shutil.ignore_patterns("*.pyc.*", "bench"))
    shutil.copytree(ROOT / "bench", to / "fastattn" / "bench", ignore=shutil.ignore_patterns("__pycache__", "results"))
    for file, old, new in changes:
        path = to / "fastattn" / "kernels" / file
        text = path.read_text()
        assert old in text, f"{file} no longer holds: {old}"
        path.write_text(text.replace(old, new))
    return to


def _selected(package, arguments):
    """pytest's arguments for those of `suite`."""
    ini = f"pythonpath={package} {TESTS}"
    where = [str(TESTS / a) if a[0] != "-" else a for a in arguments]
    return ["-q", "-x", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "-o", ini, *where]


def suite(package, *arguments, module=("pytest",), path=(), **environment):
    """pytest over arguments, which are paths below tests/, with fastattn from the folder `package`."""
    return python("-m", *module, *_selected(package, arguments), path=(*path, package), cwd=package, **environment)


def forked_suite(package, *arguments, **environment):
    """`suite` in a process that is forked off one which has imported torch, where that works: importing takes seconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return suite(package, *arguments, **environment)
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["pytest", "numpy", "torch"])  # no Triton, which asks the environment when it is imported
    said = package / "said.txt"
    child = forking.Process(target=_forked, args=(package, _selected(package, arguments), environment, said))
    child.start()
    child.join()
    return subprocess.CompletedProcess(arguments, child.exitcode, said.read_text(), "")


def _forked(package, arguments, environment, said):
    import pytest

    with said.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    os.chdir(package)
    sys.path[:] = [str(package), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    sys.exit(pytest.main(arguments))
