"""Every Python block of the pages runs, in order, as a reader would paste it."""

import re
import sys
import types
from pathlib import Path

import pytest

import fastattn as fa

ROOT = Path(fa.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md", ROOT / "examples" / "README.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)")


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.name)
def test_blocks_run(page, monkeypatch):
    module = types.ModuleType(f"page_{page.stem}")  # functions and classes of a page can be found by their names
    monkeypatch.setitem(sys.modules, module.__name__, module)
    text = page.read_text()
    for block in BLOCK.finditer(text):
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(page), "exec"), module.__dict__)


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_links_resolve(page):
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


def test_pictures_are_real():
    shown = ((fa.SinkTokens(2) | fa.SlidingWindow(3, 0)) & fa.Causal()).show(8, 8)
    assert shown in (ROOT / "docs" / "masks.md").read_text()


def test_every_public_name_is_on_a_page():
    text = "".join(page.read_text() for page in PAGES)
    assert not [name for name in fa.__all__ if name not in text]


def test_first_screen_of_the_readme():
    first = (ROOT / "README.md").read_text().splitlines()[:20]
    assert any("make bench" in line for line in first)
    assert any("make test" in line for line in first)
