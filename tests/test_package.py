"""The package as a whole: imports without Triton, layers that point down only, names that are documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fastattn as fa

PACKAGE = Path(fa.__file__).parent
ROOT = PACKAGE.parent

# a module may import those of its own layer and below
LAYERS = (
    {"__main__"},
    {"cli", "bench"},
    {"devtools"},
    {"environment"},
    {"__init__"},
    {"integrations"},
    {"nn"},
    {"sdpa", "nested", "weights"},
    {"functional"},
    {"express", "batching"},
    {"autograd"},
    {"dispatch"},
    {"backends"},
    {"problem"},
    {"masks", "scores"},
    {"coords", "dropout"},
    {"compat", "kernels", "naming"},
)
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names}


def modules():
    """(path, name of its layer) of every source file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield path, parts[0]
    for name in ("bench", "kernels"):
        for path in sorted((PACKAGE / name).rglob("*.py")):
            yield path, name


def imported(path, name):
    """Names of the layers that a file imports at run time: relative imports as layers."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in guarded:
            base = package[: len(package) - node.level + 1]
            full = (*base, *(node.module.split(".") if node.module else ()))
            if full:
                yield full[0]
            else:
                for alias in node.names:
                    yield alias.name if alias.name in LAYER else "__init__"


def test_every_file_has_a_layer():
    assert {name for _, name in modules()} <= set(LAYER)


def test_imports_point_down():
    upward = [
        f"{path.relative_to(PACKAGE)} imports {target}"
        for path, name in modules()
        for target in imported(path, name)
        if LAYER[target] < LAYER[name]
    ]
    assert not upward


def test_the_check_sees_an_upward_import(tmp_path, monkeypatch):
    folder = tmp_path / "masks"
    folder.mkdir()
    bad = folder / "bad.py"
    bad.write_text("from ..functional import attention\nfrom .. import autograd\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert list(imported(bad, "masks")) == ["functional", "autograd"]


def test_kernels_is_no_package_at_the_root():
    """With the root on sys.path, an __init__.py there would shadow the package `kernels` that transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (PACKAGE / "kernels").is_dir()


@pytest.mark.parametrize("name", fa.__all__)
def test_public_names_are_documented(name):
    thing = getattr(fa, name)
    assert (inspect.getdoc(thing) or "").strip()
    if inspect.isfunction(thing):
        doc = inspect.getdoc(thing)
        missing = [p for p in inspect.signature(thing).parameters if p not in doc]
        assert not missing or "are those of" in doc or "as in `attention`" in doc


def run(code, *flags):
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_import_needs_torch_alone():
    hidden = ("triton", "numpy", "matplotlib", "transformers", "hypothesis", "tqdm")
    code = (
        "import sys\n"
        f"for name in {hidden!r}: sys.modules[name] = None\n"
        "import torch, fastattn as fa\n"
        "x = torch.randn(1, 2, 8, 4, requires_grad=True)\n"
        "fa.attention(x, x, x, mask=fa.Causal(), score=fa.Softcap(3.0)).sum().backward()\n"
        "assert x.grad is not None\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_import_is_quiet_and_light():
    done = run("import torch, sys; before = set(sys.modules); import fastattn; print(sorted(set(sys.modules) - before))")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & {"torch._dynamo", "torch._inductor", "matplotlib", "transformers", "fastattn.bench.suite"}


@pytest.mark.parametrize("name", ["kernels", "bench"])
@pytest.mark.parametrize("left", [False, True])
def test_a_broken_link_is_named(name, left, tmp_path):
    """An archive without symlinks gives an error that says so; git on Windows may leave a text file."""
    import shutil

    shutil.copytree(PACKAGE, tmp_path / "fastattn", ignore=shutil.ignore_patterns(name, "__pycache__"))
    if left:
        (tmp_path / "fastattn" / name).write_text(f"../{name}")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fastattn"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert f"fastattn/{name} does not resolve: it is a symlink" in done.stderr


def test_no_private_torch_names_outside_compat():
    """Private names stand in one file, with a fallback. (torch.ops.aten is public; so are the modules of autograd.)"""
    found = []
    for path, name in modules():
        if name == "compat":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch._"):
                if node.attr == "__version__":
                    continue
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)}")
            if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("torch._"):
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.module}")
    assert not found
