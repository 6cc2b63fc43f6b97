"""Links in the README and the pages about records and tools: each leads to a file, a folder or a
heading that there is."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "records").glob("**/*.md"))]
PAGES += sorted((ROOT / "tools").glob("**/*.md"))
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\[(?:[^][]|\[[^][]*\])*\]\(([^()\s]*)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them; a file that is no page has none."""
    if page.suffix != ".md":
        return set()
    headings = HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in LINK.findall(CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        there = target.exists() and (not anchor or anchor in anchors(target))
        if not there and not re.match(r"\w+:", link):  # on the web
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`, three\n[a](page.md) [b](#one-two-three) ![c [d]](gone.png) [e](#four)\n"
        "`[f](code.md)` [g](https://example.org/x) [h](..#two)\n```\n# Four\n[i](code)\n```\n"
    )
    assert broken_links(page) == ["gone.png", "#four", "..#two"]
