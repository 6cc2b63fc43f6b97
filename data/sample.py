"""Makes the built-in sample: python data/sample.py [FOLDER] [--tokenizer bytes|gpt2]

Its text comes with every CPython: the documentation topics behind help(), the licence, and the
docstrings of the standard library. Good for trying things out where there is no network; the text
differs a little between Python versions, so losses compare only within one. By default its tokens
are single bytes, of which a small model learns something in two minutes.
"""

import command

if __name__ == "__main__":
    command.begin()

import ast
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from shards import (
    DataError,
    ShardWriter,
    check_replaceable,
    encode_document,
    get_encoder,
    staging,
)

VAL_SHARE = 0.07
# Installed packages, and folders of the library without prose of its own.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}


def topics() -> list[str]:
    """Documentation topics, one document each."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError:  # some distributions leave it out
        return []
    return [texts[name].strip() for name in sorted(texts)]


def licences() -> list[str]:
    """Python's licence, if the installation has it."""
    library = Path(sysconfig.get_path("stdlib"))
    folders = (library, library.parent, Path(sys.base_prefix))
    paths = [folder / name for folder in folders for name in ("LICENSE.txt", "LICENSE")]
    return [path.read_text("utf-8", "replace") for path in paths if path.is_file()][:1]


def docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    """The docstrings of a module, its classes and their functions, in source order."""
    if text := ast.get_docstring(node):
        yield text
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
            yield from docstrings(child)


def modules() -> list[str]:
    """The standard library's docstrings, one document a module."""
    library = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(library.rglob("*.py")):
        if LEFT_OUT.intersection(path.relative_to(library).parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of old escapes in the sources
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
            continue  # templates and inputs of tests, files that can't be read
        if text := "\n\n".join(docstrings(tree)):
            documents.append(text.encode("utf-8", "replace").decode())
    return documents


def make_sample(folder: Path, tokenizer: str) -> str:
    """Write the sample's two shards; return the line that says what it is. Raises DataError."""
    names = ("sample_train_000001.bin", "sample_val_000000.bin")
    for name in names:
        check_replaceable(folder / name)
    with staging(folder) as unfinished:
        encoder = get_encoder(tokenizer)
        # Some modules repeat a text; no document may be in both shards.
        documents = list(dict.fromkeys(topics() + licences() + modules()))
        if not documents:
            raise DataError("this Python came without its sources and documentation; use another")
        random.Random(0).shuffle(documents)  # so that both shards hold all kinds
        train, val = (ShardWriter(unfinished / name) for name in names)
        for text in documents:
            is_val = val.num_tokens < VAL_SHARE * (train.num_tokens + val.num_tokens)
            (val if is_val else train).write(encode_document(encoder, text))
        train.close()
        val.close()
    return (
        f"{folder}: {len(documents)} documents, {train.num_tokens:,} train and "
        f"{val.num_tokens:,} val tokens, tokenizer {tokenizer}"
    )


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (0 done, 1 not possible, 2 by argparse)."""
    parser = command.Parser(description="Make the built-in sample.")
    parser.add_argument("folder", nargs="?", default=Path(__file__).resolve().parent / "sample")
    parser.add_argument("--tokenizer", choices=("bytes", "gpt2"), default="bytes")
    args = parser.parse_args(argv)
    if not args.folder:
        parser.error("an empty name: expected a folder")
    try:
        print(make_sample(Path(args.folder), args.tokenizer))
    except (DataError, OSError) as error:
        command.report(error)
        return 1
    return 0


if __name__ == "__main__":
    command.run(main, "nothing unfinished is left")
