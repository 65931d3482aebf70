"""Tables of a run put into a page, between the marks <!-- bench:NAME --> and <!-- /bench:NAME -->."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


def check(page: Path, names: Iterable[str]) -> None:
    """Raise what `insert` would raise for sections of these names."""
    text = page.read_text()
    if not any(_between(name).search(text) for name in names):
        marks = ", ".join(f"<!-- bench:{name} -->" for name in names)
        raise ValueError(f"{page} has none of the marks {marks}")


def insert(page: Path, sections: dict[str, str], caption: str) -> list[str]:
    """Replace what stands between the marks of every section that the page has; returns their names.

    Raises:
        ValueError: the page has the marks of none of them.
    """
    text, done = page.read_text(), []
    for name, section in sections.items():
        written = f"{section}\n\n{caption}\n".replace("\\", "\\\\")
        text, count = _between(name).subn(rf"\g<1>{written}\g<2>", text)
        done += [name] * bool(count)
    if not done:
        check(page, sections)
    page.write_text(text)
    return done


def _between(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- bench:{name} -->\n).*?(<!-- /bench:{name} -->)", re.DOTALL)
