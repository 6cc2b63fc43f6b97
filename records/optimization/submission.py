"""Makes a submission: train_gpt_simple.py with another Optimizer section, as one whole script.

    python records/optimization/submission.py NAME [FILE]

NAME is that of a file in optimizers/ (soap) or the path of a file of the same shape (mine.py): what
follows its line "begin of the Optimizer section" becomes the section. The imports above that line
serve readers and lint alone; the script has them already. FILE is where the script is written. If
none is given it is logs/optimization_NAME.py in the repository, or optimization_NAME_HASH.py where
that has another script, which a run may be about to read. The path is printed.

`./run.sh optimization NAME [--option value ...]` makes the script and runs it.
"""

import argparse
import ast
import hashlib
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SCRIPT, OPTIMIZERS = HERE / "train_gpt_simple.py", HERE / "optimizers"
# Records with an earlier fixed part that trains the same. What has changed since is what is told of
# bad input, and that the log comes before the checkpoint.
EARLIER = [HERE / "2026-11-30_muon" / "train_gpt.py"]
GIVES = {"NUM_STEPS", "initialize", "Optimizer"}  # the names that a section defines
METHODS = {"step", "validation_weights"}  # of Optimizer
BEGIN, END = (
    f"# --- {word} of the Optimizer section ".ljust(100, "-") + "\n" for word in ("begin", "end")
)


class SubmissionError(Exception):
    """Something the user can fix. The message names the file and the remedy."""


def split(source: str, name: str) -> tuple[str, str, str]:
    """A whole script: what is before its Optimizer section, the section, and what is behind."""
    if source.count(BEGIN) != 1 or source.count(END) != 1:
        found = "the two lines that mark the Optimizer section are not there once each"
        raise SubmissionError(f"{name}: {found}: put them back as in train_gpt_simple.py")
    before, rest = source.split(BEGIN)
    section, behind = rest.split(END)
    return before + BEGIN, section, END + behind


def fixed_part(source: str, name: str) -> str:
    """The code outside the Optimizer section, in a form that no comment, docstring or blank line
    changes: two scripts of one track have the same."""
    before, _, behind = split(source, name)
    tree = ast.parse(before + behind)
    for node in ast.walk(tree):
        can_have = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if can_have and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree, indent=1)


def fixed_parts() -> set[str]:
    """Those that a submission may have: of train_gpt_simple.py, as it is and as it was."""
    paths = [SCRIPT, *filter(Path.is_file, EARLIER)]
    return {fixed_part(path.read_text(encoding="utf-8"), str(path)) for path in paths}


def imported_names(source: str) -> set[str]:
    """What the import statements at the top level of this source name."""
    statements = (
        node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)
    )
    return {alias.asname or alias.name for node in statements for alias in node.names}


def find_section(name: str) -> Path:
    """The file of an optimizer by its name or its path."""
    known = sorted(path.stem for path in OPTIMIZERS.glob("*.py"))
    path = OPTIMIZERS / f"{name}.py" if name in known else Path(name)
    if not path.is_file():
        raise SubmissionError(
            f"{name}: no such optimizer: give one of {', '.join(known)}, or a file"
        )
    return path


def defined(body: list[ast.stmt]) -> dict[str, ast.AST]:
    """What statements at one level define, by name: functions, classes, and values of names."""
    names: dict[str, ast.AST] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [part for target in targets for part in ast.walk(target)]
            names |= {part.id: node.value for part in found if isinstance(part, ast.Name)}
    return names


def check_section(path: Path, section: str) -> None:
    """SubmissionError unless the section gives what the script asks of it."""
    names = defined(ast.parse(section).body)
    if missing := sorted(GIVES - set(names)):
        raise SubmissionError(f"{path}: its section has no {missing[0]}: give it one")
    optimizer = names["Optimizer"]
    is_plain = isinstance(optimizer, ast.ClassDef) and not optimizer.bases
    missing = sorted(METHODS - set(defined(optimizer.body))) if is_plain else []
    if missing:
        raise SubmissionError(f"{path}: its Optimizer has no {missing[0]}(): give it one")
    try:
        steps = ast.literal_eval(names["NUM_STEPS"])
    except ValueError:  # computed
        return
    presets = sorted(defined_presets())
    if not isinstance(steps, dict) or any(type(steps.get(preset)) is not int for preset in presets):
        example = ", ".join(f'"{preset}": 1000' for preset in presets)
        raise SubmissionError(f"{path}: NUM_STEPS needs a number for each preset: {{{example}}}")


def defined_presets() -> list[str]:
    """Those of train_gpt_simple.py, which may be imported only by those who have PyTorch."""
    return [*ast.literal_eval(defined(ast.parse(SCRIPT.read_text("utf-8")).body)["NUM_STEPS"])]


def make_submission(path: Path) -> str:
    """The whole script with the section of this file, which may be a whole script itself."""
    script, source = SCRIPT.read_text(encoding="utf-8"), path.read_text(encoding="utf-8")
    if source.count(BEGIN) != 1:
        line = BEGIN.strip("\n")
        raise SubmissionError(f"{path}: it needs this line once, before the section:\n{line}")
    imports, section = source.split(BEGIN)
    try:
        missing = imported_names(imports) - imported_names(script)
        is_whole = END in section
        changed = is_whole and fixed_part(source, str(path)) not in fixed_parts()
        check_section(path, section.split(END)[0])
    except SyntaxError as error:
        raise SubmissionError(f"{path}, line {error.lineno}: {error.msg}: correct it") from None
    if changed:
        found = f"{path}: differs from {SCRIPT.name} outside the Optimizer section, which would go"
        raise SubmissionError(f"{found}: change the section alone, or run the script by itself")
    if missing:
        names = ", ".join(sorted(missing))
        raise SubmissionError(f"{path}: train_gpt_simple.py does not import {names}: do without")
    before, _, behind = split(script, SCRIPT.name)
    return before + section.split(END)[0].rstrip("\n") + "\n\n\n" + behind


def free_target(name: str, text: str) -> Path:
    """A path for this script that no other script has."""
    target = ROOT / "logs" / f"optimization_{name}.py"
    if target.is_file() and target.read_text(encoding="utf-8") != text:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return target.with_name(f"optimization_{name}_{digest}.py")
    return target


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda text: parser.exit(2, f"error: {text}; --help says more\n")
    parser.add_argument("name", metavar="NAME", help="of a file in optimizers/, or a path")
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, help="where the script goes")
    args = parser.parse_args(arguments)
    try:
        path = find_section(args.name)
        text = make_submission(path)
        target = args.file or free_target(path.stem, text)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{os.getpid()}_{target.name}")  # whole, or not at all
        part.write_text(text, encoding="utf-8")
        os.replace(part, target)
    except (SubmissionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
