"""The tutorial of docs/kernels.md: its mask and its score, one file each, work everywhere, and nothing else has to change."""

import ast
import dataclasses
import hashlib
import shutil

import cases
import pytest
import torch
import tutorial_cases
from processes import ROOT, python
from test_covering import check
from test_triton import needs_compiler
from torch.testing import assert_close
from tutorial_cases import FOLDER, MASKS, SCORES

import fastattn as fa
from fastattn import functional
from fastattn.devtools import offline

FILES = sorted(FOLDER.glob("*.py"))
# what such a file may import: torch, the public names, and these
EXTENDING = {
    "fastattn.kernels.shim": {"jit", "tl"},
    "fastattn.scores.base": {"DeviceGradient", "lead_strides", "leading"},
}


@pytest.fixture
def registered(monkeypatch):
    for name, score in SCORES.items():
        monkeypatch.setitem(cases.SCORES, name, score)


PAIRS = [(mask, "mine") for mask in cases.MASKS] + [("both", score) for score in cases.SCORES]
PAIRS += [(mask, score) for mask in MASKS for score in SCORES]


@pytest.mark.parametrize(("mask", "score"), PAIRS)
def test_with_every_mask_and_every_score(mask, score, registered):
    """out, lse and every gradient against float64, in tiles of torch operations."""
    every = {**cases.MASKS, **MASKS}
    check(mask, score, True, (4, 2), 0.0, torch.float64, 43, 59, 8, 8, True, masks=every, lse=(True,))


@pytest.mark.parametrize("score", SCORES)
def test_in_float32_beyond_one_tile(score, registered):
    check("both", score, False, (2, 1), 0.3, torch.float32, 203, 150, 19, 8, True, masks=MASKS, lse=(True,))


def penalty(backend, mask, score):
    """The gradients of a gradient penalty, and a second derivative along two directions."""
    q, k, v = (x.detach().requires_grad_() for x in cases.tensors(1, 2, 1, 13, 17, 4, 4, torch.float64))
    chain = SCORES[score](1, 2, 13, 17, torch.float64)
    params = [x.detach().requires_grad_() for item in chain for x in item.params]
    masking = MASKS[mask](1, 2, 13, 17)

    def attend(q, k, v, *params):
        tail = iter(params)
        own = [item.with_params(tuple(next(tail) for _ in item.params)) for item in chain]
        return fa.attention(q, k, v, mask=masking, score=own, backend=backend)

    grads = torch.autograd.grad(attend(q, k, v, *params).sin().sum(), (q, k, v, *params), create_graph=True)
    found = list(torch.autograd.grad(sum(x.square().sum() for x in grads), (q, k, v, *params)))
    once = lambda *x: torch.func.jvp(attend, x, tuple(torch.cos(y) for y in x))[1]
    x = tuple(y.detach() for y in (q, k, v, *params))
    return [*found, *torch.func.jvp(once, x, tuple(torch.sin(y) for y in x))]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("mask", MASKS)
def test_second_order(mask, score):
    for ours, exact in zip(penalty(None, mask, score), penalty("reference", mask, score), strict=True):
        assert_close(ours, exact, atol=1e-10, rtol=1e-10)


def test_the_masks_are_what_they_say():
    row, key = torch.arange(19)[:, None], torch.arange(23)
    chunks = (key // 5 <= row // 5) & (key // 5 >= row // 5 - 2)
    assert torch.equal(MASKS["chunks_back"](1, 1, 19, 23).to_dense(19, 23)[0, 0], chunks)
    lowered = MASKS["strided_heads"](1, 3, 19, 23).lower(19, 23)
    for h, plane in enumerate(lowered.to_dense(n_h=3)[0]):
        assert torch.equal(plane, (key <= row) & ((row - key) % (h + 1) == 0))
    with pytest.raises(ValueError, match="got 0 and 1"):
        tutorial_cases.my_mask.ChunksBack(0, 1)


def test_the_cap_holds_at_infinity():
    s = torch.tensor([-torch.inf, -1e30, 0.0, 3.0, torch.inf], dtype=torch.float64)
    value, first, second = SCORES["root_cap"](1, 1, 1, 1, None)[0].derivs(s)
    assert_close(value, torch.tensor([-2.0, -2.0, 0.0, 3.0 / (1 + 2.25) ** 0.5, 2.0], dtype=torch.float64))
    assert first.isfinite().all()
    assert second.isfinite().all()


@needs_compiler
def test_the_compiler_takes_them(tmp_path, monkeypatch):
    """The forward with both masks and both scores, for sm_90: an interpreter's pass is not a compiler's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    q = torch.empty(1, 2, 64, 64, dtype=torch.bfloat16)
    chain = SCORES["mine"](1, 2, 64, 64, torch.float32)
    p = functional.problem(q, q, q, MASKS["both"](1, 2, 64, 64), chain, None, None, 0.0, "tiled", None, None)
    forward, *_ = offline.recorded(dataclasses.replace(p, param_grads=True), "sm_90", 0)
    found = offline.report(forward, "sm_90")
    assert found.kernel == "forward"
    assert found.products > 0
    assert found.shared <= offline.SHARED["sm_90"] * 1024


# What a reader sees, and what had to change for it: nothing


def test_the_page_shows_the_files():
    page = (ROOT / "docs" / "kernels.md").read_text()
    for file in FILES:
        assert f"```python\n{file.read_text()}```" in page, f"docs/kernels.md does not show {file.name} as it is"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_needs_public_names_and_those_of_extensions(file):
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert [(x.name, x.asname) for x in node.names] in ([("torch", None)], [("fastattn", "fa")])
        if isinstance(node, ast.ImportFrom):
            assert {x.name for x in node.names} <= EXTENDING[node.module]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fa":
            assert node.attr in fa.__all__


def package():
    """{path: digest} of everything that a user installs."""
    folders = (ROOT / "fastattn", ROOT / "kernels", ROOT / "bench")
    files = (x for folder in folders for x in folder.rglob("*") if x.is_file() and "__pycache__" not in x.parts)
    return {x: hashlib.sha256(x.read_bytes()).hexdigest() for x in files}


USE = """
import torch, fastattn as fa, my_mask, my_score
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (20, 26, 26))
slopes = torch.rand(2, dtype=torch.float64, requires_grad=True)
mask = my_mask.strided_heads() & my_mask.ChunksBack(4, 2)
print(fa.explain(q, k, v, mask=mask, score=(my_score.LogDistance(slopes), my_score.RootCap(5.0))))
print(my_mask.ChunksBack(4, 2).show(8, 8))

def attend(q, k, v, slopes):
    return fa.attention(q, k, v, mask=mask, score=(my_score.LogDistance(slopes), my_score.RootCap(5.0)))

inputs = q, k, v, slopes
distance = (torch.arange(20)[:, None] - torch.arange(26)).abs().double()
s = q @ k.mT / 8**0.5 - slopes[:, None, None] * (1 + distance).log()
s = s / (1 + (s / 5.0) ** 2).sqrt()
exact = s.masked_fill(~mask.lower(20, 26).to_dense(n_h=2), -torch.inf).softmax(-1) @ v
for run in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
    out = run(*inputs)
    torch.testing.assert_close(out, exact)
    grads = torch.autograd.grad(out.sin().sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(exact.sin().sum(), inputs, retain_graph=True))
print("done")
"""


def test_nothing_else_had_to_change(tmp_path):
    """In a process and a folder of their own: eager and compiled, with gradients, explained and drawn; the package is what it
    was, byte for byte, and names nothing of theirs."""
    before = package()
    for file in FILES:
        shutil.copy(file, tmp_path)
    done = python("-c", USE, path=[tmp_path], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 predicate(s)" in done.stdout
    assert "LogDistance, RootCap" in done.stdout
    assert "ChunksBack(4, 2)  8 x 8" in done.stdout
    assert done.stdout.endswith("done\n")
    changed = [str(x) for x in package().keys() | before.keys() if package().get(x) != before.get(x)]
    assert len(changed) == 0, changed
    own = {x.name for file in FILES for x in ast.parse(file.read_text()).body if isinstance(x, (ast.ClassDef, ast.FunctionDef))}
    assert own >= {"ChunksBack", "strided_heads", "RootCap", "LogDistance"}
    text = "".join(x.read_text() for x in before if x.suffix in (".py", ".json"))
    assert not [name for name in (*own - {"ratio"}, "my_mask", "my_score") if name in text]
