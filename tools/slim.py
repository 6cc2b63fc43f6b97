"""Shortens logs of train_gpt.py: the diff against a script in place of the source at their head.

    python tools/slim.py slim LOG ... [--base FILE ...]   rewrite logs, each against the closest
                                                            of these scripts and short logs
    python tools/slim.py restore LOG                      print the full log, equal to the byte

A log begins with the source of its script, up to a line of 100 '='. A short log has there

    script: ../2026-11-24_rows_at_once_two_gpus/train_gpt.py sha256: <of the full log>

and a unified diff from that script to its own with one line of context, which is empty where the
two are equal. The path is relative to the log. It names a script, or another short log for the
script of that one; `none` stands for a head that is shorter than any diff and stays. Below, lines
of training steps have lost their words and stand as a table. Everything else stays. Lines end in
LF: a short log whose lines end in CRLF is refused, as the scripts beside it will then have that
too.
"""

import argparse
import difflib
import hashlib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from console import Parser, end_on_signals

RECORDS = Path(__file__).resolve().parent.parent / "records"
SEPARATOR = "=" * 100 + "\n"
NO_BASE = "none"
HEAD = re.compile(r"script: (?P<base>.+) sha256: (?P<digest>[0-9a-f]{64})\n")
FIRST_WORD = "script: "  # of a short log, and of no script
HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,\d+)? @@")
STEP = "step {} train_loss {} train_time {} s step {} ms\n"
COLUMNS = "step train_loss train_time_s step_ms\n"
STEP_LINE = re.compile("^" + STEP.replace("{}", r"(\S+)"), re.MULTILINE)
STEP_LINES = re.compile(f"(?:{STEP_LINE.pattern})+", re.MULTILINE)
TABLE = re.compile(rf"^{COLUMNS}((?:^\d+ \S+ \S+ \S+\n)+)", re.MULTILINE)


class SlimError(Exception):
    """A log that cannot be shortened or restored: one line that names it and the remedy."""


def read(path: Path) -> str:
    """The text with its line ends as they are."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise SlimError(
            f"{path}: no text in UTF-8: put it back as it was, or leave it out"
        ) from None


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def apply_diff(base: str, diff: str) -> str:
    """The text that difflib.unified_diff(base, text) was made from."""
    lines, result, at = base.splitlines(keepends=True), [], 0
    for line in diff.splitlines(keepends=True)[2:]:  # behind --- and +++
        if hunk := HUNK.match(line):
            # Lines count from 1, but a hunk that takes none away names the line in front of it.
            start = int(hunk[1]) - (hunk[2] != "0")
            result += lines[at:start]
            at = start
        else:
            result += [line[1:]] if line[0] in " +" else []
            at += line[0] in " -"
    return "".join(result + lines[at:])


def source_of(path: Path) -> str:
    """The source of a script, or of the script at the head of a log, short or full."""
    text = read(path)
    return text if path.suffix == ".py" else restore(text, path).partition(SEPARATOR)[0]


def restore(text: str, path: Path) -> str:
    """The full log from the text of a short one that has this path; a full one as it is. Raises
    SlimError, and OSError where a script is missing."""
    if not text.startswith(FIRST_WORD):
        return text
    if text.partition("\n")[0].endswith("\r"):
        found = "a short log whose lines end in CRLF"
        raise SlimError(f"{path}: {found}: check it out again with core.autocrlf=false")
    head = HEAD.match(text)
    if not head:
        raise SlimError(
            f"{path}: the first line of a short log, but damaged: put it back as it was"
        )
    diff, _, body = text[head.end() :].partition(SEPARATOR)
    body = TABLE.sub(lambda m: "".join(STEP.format(*r.split()) for r in m[1].splitlines()), body)
    if head["base"] == NO_BASE:
        changed, source = "it has changed since: put it back as it was", diff
    else:
        base = Path(os.path.normpath(path.parent / head["base"]))
        changed = f"it or {base} has changed since: put both back as they were"
        source = apply_diff(source_of(base), diff)
    full = source + SEPARATOR + body
    if digest(full) != head["digest"]:
        raise SlimError(f"{path}: this short log cannot be restored: {changed}")
    return full


def is_base(path: Path) -> bool:
    """A script, or a short log that leads to one without a full log between, so never to itself."""
    head = path.suffix == ".py" or HEAD.match(read(path))
    return head is True or bool(
        head and head["base"] != NO_BASE and is_base(path.parent / head["base"])
    )


def slim(path: Path, bases: Iterable[Path]) -> str:
    """The short text of a full log, with the smallest diff that these scripts and logs give."""
    full = read(path)
    source, separator, body = full.partition(SEPARATOR)
    if not separator or HEAD.match(full):
        raise SlimError(f"{path}: does not begin with a script and a line of 100 '=': leave it out")
    lines, diffs = source.splitlines(keepends=True), {NO_BASE: source}
    for base in bases:
        name = os.path.relpath(base, path.parent)
        base_lines = source_of(base).splitlines(keepends=True)
        diffs[name] = "".join(difflib.unified_diff(base_lines, lines, name, path.name, n=1))
    name = min(diffs, key=lambda name: len(diffs[name]))
    body = STEP_LINES.sub(lambda m: COLUMNS + STEP_LINE.sub(r"\1 \2 \3 \4\n", m[0]), body)
    short = f"script: {name} sha256: {digest(full)}\n{diffs[name]}{SEPARATOR}{body}"
    try:
        restore(short, path)
    except SlimError:
        raise SlimError(f"{path}: would not come back to the byte: leave it as it is") from None
    return short


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shorten, lengthen = commands.add_parser("slim"), commands.add_parser("restore")
    shorten.add_argument("logs", metavar="LOG", type=Path, nargs="+")
    shorten.add_argument(
        "--base", metavar="FILE", type=Path, nargs="+", help="default: all there are"
    )
    lengthen.add_argument("logs", metavar="LOG", type=Path, nargs=1)
    args = parser.parse_args()
    end_on_signals()
    try:
        for log in args.logs:
            if args.command == "restore":
                sys.stdout.buffer.write(restore(read(log), log).encode())
                continue
            scripts = sorted(RECORDS.glob("*/train_gpt.py"))
            bases = [*filter(is_base, args.base or [*scripts, *sorted(log.parent.glob("*.txt"))])]
            if wrong := [str(base) for base in args.base or () if base not in bases]:
                found = "is no script (.py), and no short log that leads to one"
                raise SlimError(f"--base {wrong[0]}: {found}: shorten it first, or leave it out")
            log.write_bytes(slim(log, bases).encode())
    except RecursionError:
        print(f"error: {log}: short logs lead to one another: restore one of them", file=sys.stderr)
        return 1
    except (SlimError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
