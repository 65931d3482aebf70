"""A run as one HTML page that needs nothing beside it: machine, pictures and tables."""

from __future__ import annotations

import html as escape
import io
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import plot
from .cells import Row
from .sweeps import SWEEPS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1em 1em; font-size: 13px; }
dt { color: #666; }
dd { margin: 0; }
"""

CAPTIONS = {
    "speed": "Higher is better. Operations are counted in the field's convention; the dotted line is what matrix products "
    "alone reach on this machine.",
    "memory": "Lower is better: the highest memory during the call beyond its inputs.",
    "error": "Lower is better: relative L2 error against float64 on the same rounded inputs; of gradients, the worst.",
    "ratios": 'Green: the peer took longer than fastattn; red: it took less; "same": the run cannot tell; empty: it cannot '
    "compute this, or gave wrong numbers.",
}


def rows(results: dict[str, Any]) -> list[Row]:
    """The cells of a results.json."""
    return [Row.read(cell) for suite in SWEEPS for cell in results.get(suite, [])]


def html(results: dict[str, Any], sections: dict[str, str]) -> str:
    """The page.

    Args:
        results: what results.json holds. sections: Markdown by suite, as tables.md holds it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    facts = results["environment"]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        f"<title>fastattn {facts['fastattn']} on {_text(facts.get('gpu') or facts['cpu'])}</title><style>{STYLE}</style>",
        f"<h1>fastattn on {_text(facts.get('gpu') or facts['cpu'])}</h1>",
        f"<p>Measured {facts['date']} by <code>{_text(facts['command'])}</code>. Every result was compared with float64 before "
        "it was timed; implementations took turns, round by round; figures are medians.</p>",
        *(f"<p>{_text(note)}</p>" for note in results["notes"]),
    ]
    for name, figure in plot.figures(rows(results)).items():
        caption = CAPTIONS[name.split("-")[0]]
        parts += [f"<h2 id='{name}'>{name.replace('-', ', ')}</h2>", _svg(figure, name), f"<p>{caption}</p>"]
    for suite, section in sections.items():
        parts += [f"<h2 id='{suite}'>{suite}</h2>", *_markdown(section)]
    parts += ["<h2>machine</h2><dl>", *(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items()), "</dl></html>"]
    return "\n".join(parts) + "\n"


def read_sections(text: str) -> dict[str, str]:
    """The sections of a tables.md."""
    found = {}
    for part in text.split("## ")[1:]:
        name, _, section = part.partition("\n")
        found[name.strip()] = section.strip()
    return found


def save(figure: Figure, target: Any, salt: str = "fastattn") -> None:
    """As SVG, the same bytes for the same figure. target: a path or a text file."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(target, format="svg", metadata={"Date": None})


def _svg(figure: Figure, salt: str) -> str:
    target = io.StringIO()
    save(figure, target, salt)
    text = target.getvalue()
    return text[text.index("<svg") :]


def _markdown(section: str) -> Iterator[str]:
    """Paragraphs, lists and tables, which is all that sections have."""
    for _, lines in itertools.groupby(section.splitlines(), key=_kind):
        block = [line for line in lines if line.strip()]
        if not block:
            continue
        kind = _kind(block[0])
        if kind == "table":
            cells = [[c.strip() for c in line.split("|")[1:-1]] for line in block]
            yield "<table><tr>" + "".join(f"<th>{_text(c)}</th>" for c in cells[0]) + "</tr>"
            yield from ("<tr>" + "".join(f"<td>{_text(c)}</td>" for c in line) + "</tr>" for line in cells[2:])
            yield "</table>"
        elif kind == "list":
            yield "<ul>" + "".join(f"<li>{_text(line[2:])}</li>" for line in block) + "</ul>"
        else:
            yield f"<p>{_text(' '.join(block))}</p>"


def _kind(line: str) -> str:
    return "table" if line.startswith("|") else "list" if line.startswith("- ") else "text" if line.strip() else ""


def _text(value: Any) -> str:
    return escape.escape("no" if value is None else str(value))
