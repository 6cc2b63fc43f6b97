"""records/techniques.md names what is in the scripts and links to what there is."""

import ast
import re

from conftest import ROOT

PAGE = ROOT / "records" / "techniques.md"
COLUMNS = ["technique", "what it does", "code", "in or out", "measured here", "credit"]
OURS, REFERENCE = "train_gpt.py", "records/reference/train_gpt.py"


def defined(script: str) -> set[str]:
    """Functions, classes, tables, and Class.member for methods and fields."""
    found = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            found.update(prefix + t.id for t in targets if isinstance(t, ast.Name))

    visit(ast.parse((ROOT / script).read_text()).body, "")
    return found


def table_rows() -> list[dict[str, str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = [row for row in cells if row != COLUMNS and set(row) != {"---"}]
    assert rows and all(len(row) == len(COLUMNS) and all(row) for row in rows)
    return [dict(zip(COLUMNS, row)) for row in rows]


def named(row: dict[str, str]) -> tuple[set[str], set[str]]:
    """The names in train_gpt.py and in the reference that a row gives."""
    ours, _, reference = row["code"].partition("reference:")
    assert re.sub(r"`[\w.]+`|[,; —]", "", ours + reference) == "", row["code"]
    return tuple({*re.findall(r"`([\w.]+)`", part)} for part in (ours, reference))


def test_names_are_in_the_scripts() -> None:
    ours, reference = defined(OURS), defined(REFERENCE)
    missing = {}
    for row in table_rows():
        here, there = named(row)
        if gone := (here - ours) | (there - reference):
            missing[row["technique"]] = sorted(gone)
    assert not missing


def test_every_row_is_in_or_out() -> None:
    for row in table_rows():
        here, _ = named(row)
        assert row["in or out"] in ("in", "out"), row
        assert here or row["in or out"] == "out", f"in, but not in {OURS}: {row}"


def test_every_row_has_a_measurement_or_none() -> None:
    for row in table_rows():
        measured = row["measured here"]
        assert "](" in measured or measured.startswith("not tried"), row
        assert "](" in measured or not re.search(r"[+−][\d.]", measured), f"no log: {row}"


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE.read_text())
    inside = {link.partition("#")[0] for link in links if not link.startswith("https://")}
    assert len(inside) > 40
    records = PAGE.parent
    paths = {link: str((records / link).resolve().relative_to(ROOT)) for link in inside}
    assert not [link for link, path in paths.items() if not (ROOT / path).is_file()]


def test_every_technique_is_listed_once() -> None:
    names = [row["technique"] for row in table_rows()]
    assert len(names) == len({*names})
