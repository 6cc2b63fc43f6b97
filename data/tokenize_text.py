"""Turns text into token shards: python data/tokenize_text.py INPUT... --out FOLDER

An input is a file, a folder, or the name of a hub dataset. A .txt or .md file is one document; in
.jsonl and .parquet every line or row is one, its text in the field `--field`. Documents keep their
order; every `--val-every`-th, from the first on, goes to the validation shards. All files are read
as streams, so only single .txt and .md files need to fit into memory.

Hidden files of a folder are left out, its empty ones too, with a count on the screen; an empty file
that was named is an error. The first document of every file is read before the work starts.
"""

import command

if __name__ == "__main__":
    command.begin()

import argparse
import codecs
import json
import os
import re
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hub import explain
from shards import (
    MAX_SHARD_TOKENS,
    DataError,
    Encoder,
    ShardWriter,
    check_room,
    encode_document,
    get_encoder,
    staging,
)
from tqdm import tqdm

ENDINGS = (".txt", ".md", ".jsonl", ".parquet")
BATCH_CHARS = 1_000_000  # text that goes to a thread at once
PARQUET_ROWS = 1024  # rows decoded at once
MAX_SHARDS = 999_999  # of a kind; file names have six digits
MAX_WORKERS = 1024
# Bytes of tokens for a byte of text: exact, and well below what prose comes to (0.4 to 0.5).
LEAST_ROOM = {"bytes": 2.0, "gpt2": 0.2}


class Document(NamedTuple):
    """A document, its share of its file (0 to 1, for the progress bar), and where it is from."""

    text: str
    share: float
    place: str = ""


class HubFile(NamedTuple):
    """A file of a hub dataset, downloaded only when its turn comes."""

    repo: str
    name: str


@dataclass
class LeftOut:
    """What is skipped on the way. Bad rows are so only if `allowed`; else the first is raised."""

    allowed: bool
    bad_rows: int = 0
    first: str = ""
    empty_files: int = 0

    def add(self, error: DataError) -> None:
        """Count a bad row, or raise its error."""
        if not self.allowed:
            raise DataError(f"{error}, or leave such rows out by --skip_bad") from error
        self.bad_rows += 1
        self.first = self.first or str(error)


# ---- What to read ----


def list_sources(inputs: list[str], match: str, field: str, skip_bad: bool) -> list[Path | HubFile]:
    """The files behind the inputs, folders and hub datasets in sorted order.

    Of every local file the first document is read. `match` is a pattern for the file names in a
    hub dataset. Raises DataError.
    """
    sources: list[Path | HubFile] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            sources += list_folder(path, field, skip_bad)
        elif path.suffix.lower() not in ENDINGS and path.exists():
            raise DataError(f"{name}: unknown ending, expected one of {', '.join(ENDINGS)}")
        elif path.exists():
            if not path.is_file():
                raise DataError(f"{name}: is no regular file; save its text in one first")
            if is_empty(path, field, skip_bad):
                raise DataError(f"{name}: has no documents; leave it out")
            sources.append(path)
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix.lower() not in ENDINGS:
            sources += list_hub(name, match)
        else:
            raise DataError(f"{name}: no such file or folder; check the path")
    keys = [s.resolve() if isinstance(s, Path) else s for s in sources]
    for key, number in Counter(keys).items():
        if number > 1:
            raise DataError(f"{key}: given {number} times; name every file once")
    return sources


def walk(folder: Path) -> Iterator[Path]:
    """The files under a folder that are not hidden, links followed, nothing twice."""

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: can't be read ({error.strerror}); check the folder")

    seen = set()
    for parent, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()  # a link to a folder that was read, maybe to one above
            continue
        seen.add(real)
        for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            if path.is_file() and (real := os.path.realpath(path)) not in seen:
                seen.add(real)
                yield path


def list_folder(folder: Path, field: str, skip_bad: bool) -> list[Path]:
    """All files under a folder that can be read; the others are counted on stderr."""
    files = sorted(walk(folder))
    known = [path for path in files if path.suffix.lower() in ENDINGS]
    if not known:
        raise DataError(f"{folder}: no {', '.join(ENDINGS)} files in this folder; check the path")
    if len(known) < len(files):
        others = len(files) - len(known)
        print(f"{folder}: leaving out {others} files with other endings", file=sys.stderr)
    full = [path for path in known if not is_empty(path, field, skip_bad)]
    if not full:
        raise DataError(f"{folder}: its {len(known)} files have no documents; check the path")
    if len(full) < len(known):
        print(f"{folder}: leaving out {len(known) - len(full)} empty files", file=sys.stderr)
    return full


def is_empty(path: Path, field: str, skip_bad: bool) -> bool:
    """Whether a file has no document, nor a bad row to be counted. Raises DataError."""
    left_out = LeftOut(skip_bad)
    return next(read_file(path, str(path), field, left_out), None) is None and not left_out.bad_rows


def list_hub(repo: str, match: str) -> list[HubFile]:
    """The .parquet and .jsonl files of a hub dataset whose names fit `match`."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(repo, timeout=10)  # fails at once; the listing would retry for long
        names = HfApi().list_repo_files(repo, repo_type="dataset")
    except Exception as error:
        message = f"{repo}: no such file or folder, nor could the hub list it: {explain(error)}"
        raise DataError(message) from error
    names = [name for name in names if name.endswith((".parquet", ".jsonl"))]
    fitting = sorted(name for name in names if name == match or fnmatch(name, match))
    if not fitting:
        raise DataError(
            f"{repo}: none of its {len(names)} .parquet and .jsonl files fits --match '{match}'"
        )
    return [HubFile(repo, name) for name in fitting]


# ---- Documents of a file ----


def read_sources(
    sources: list[Path | HubFile], field: str, left_out: LeftOut
) -> Iterator[Document]:
    """Yield the documents of all files in order. Raises DataError naming file and line or row."""
    for source in sources:
        if isinstance(source, Path):
            yield from read_file(source, str(source), field, left_out)
            continue
        from huggingface_hub import hf_hub_download

        with tempfile.TemporaryDirectory() as folder:  # so that one file at a time takes disk space
            repo, name = source
            try:
                path = hf_hub_download(repo, name, repo_type="dataset", local_dir=folder)
            except Exception as error:
                message = f"{repo}: {name} could not be downloaded: {explain(error)}"
                raise DataError(message) from error
            num_documents = 0
            for document in read_file(Path(path), f"{repo}: {name}", field, left_out):
                num_documents += 1
                yield document
            left_out.empty_files += num_documents == 0


def read_file(path: Path, name: str, field: str, left_out: LeftOut) -> Iterator[Document]:
    """Yield the documents of a local file, which messages call `name`. Raises DataError."""
    if path.stat().st_size == 0:  # also a parquet file, which then has no header
        return
    kinds = {".jsonl": (read_lines, parse_line), ".parquet": (read_rows, parse_row)}
    read, parse = kinds.get(path.suffix.lower(), (read_whole, parse_whole))
    try:
        for position, data, share in read(path, name, field):
            place = name + position
            try:
                text = parse(data, field, place)
            except DataError as error:
                left_out.add(error)
            else:
                if text is not None:
                    yield Document(text, share, place)
    except OSError as error:
        raise DataError(f"{name}: can't be read ({error}); check the file") from error


# Each kind of file has a reader, which yields (position for messages, data of a row, share of the
# file), and a parser of such data, which returns the text, or None where there is none.


def read_whole(path: Path, name: str, field: str) -> Iterator[tuple[str, bytes, float]]:
    """The whole file as one document; `field` is not used."""
    yield "", path.read_bytes(), 1.0


def parse_whole(data: bytes, field: str, place: str) -> str | None:
    return decode(data, place) or None


def read_lines(path: Path, name: str, field: str) -> Iterator[tuple[str, bytes, float]]:
    """One document a line; only a line feed ends one."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield f", line {number}", line, len(line) / size


def parse_line(data: bytes, field: str, place: str) -> str | None:
    """The text of a JSON object; blank lines have none."""
    text = decode(data, place)
    if not text.strip():
        return None
    try:
        record = json.loads(text)
    except RecursionError as error:
        raise DataError(f"{place}: JSON nested too deep; fix or remove it") from error
    except ValueError as error:
        raise DataError(f"{place}: is no JSON ({error}); fix or remove it") from error
    if not isinstance(record, dict) or field not in record:
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{place}: no field '{field}' (found {found}); set --field")
    return check_text(record[field], field, place)


def read_rows(path: Path, name: str, field: str) -> Iterator[tuple[str, object, float]]:
    """One document a row, the text in the column `field`, as pyarrow's scalars."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # By default pyarrow buffers the whole column of all row groups while it goes along.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                found = ", ".join(columns)
                raise DataError(f"{name}: no column '{field}' (found {found}); set --field")
            row = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    yield f", row {row}", value, 1 / file.metadata.num_rows
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{name}: can't be read as parquet ({reason}); get it again") from error


def parse_row(data: object, field: str, place: str) -> str:
    try:
        value = data.as_py()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is no valid UTF-8 ({error}); fix or remove it") from error
    return check_text(value, field, place)


def decode(data: bytes, place: str) -> str:
    """UTF-8 to text, without a byte order mark. Raises DataError."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is no valid UTF-8 ({error}); convert it to UTF-8") from error


def check_text(value: object, field: str, place: str) -> str:
    """The value if it is text that UTF-8 can hold. Raises DataError."""
    if not isinstance(value, str):
        found = type(value).__name__
        raise DataError(f"{place}: '{field}' is {found}, expected text; set --field or fix it")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape halves of surrogate pairs
        raise DataError(f"{place}: is no valid Unicode ({error}); fix or remove it") from error
    return value


# ---- Tokens ----


def make_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents into batches of about BATCH_CHARS characters."""
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document.text) + 1  # so that empty documents count too
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def encode_batch(encoder: Encoder, batch: list[Document]) -> list[np.ndarray | DataError]:
    """Tokens of every document, (n,) uint16, or what the tokenizer said of it."""
    found: list[np.ndarray | DataError] = []
    for document in batch:
        try:
            found.append(encode_document(encoder, document.text))
        except MemoryError:
            raise
        except BaseException as error:  # noqa: BLE001 (tiktoken's panics are no Exceptions)
            reason = f"{type(error).__name__}: {error}"
            message = f"{document.place}: the tokenizer fails on this text ({reason}); cut it up"
            found.append(DataError(message))
    return found


def encode_in_order(
    documents: Iterable[Document], tokenizer: str, num_workers: int
) -> Iterator[tuple[list[np.ndarray | DataError], float]]:
    """Encode on several threads, results in the order of the documents, each with the batch's share
    of its files.

    At most 2 * num_workers batches are under way, which bounds the memory. Threads do, as tiktoken
    holds no lock while it works, and they end with the process however that ends.
    """
    encoder = get_encoder(tokenizer)
    pending = deque()
    with command.thread_pool(num_workers) as pool:
        for batch in make_batches(documents):
            share = sum(document.share for document in batch)
            pending.append((pool.submit(encode_batch, encoder, batch), share))
            if len(pending) == 2 * num_workers:
                future, share = pending.popleft()
                yield future.result(), share
        for future, share in pending:
            yield future.result(), share


class ShardSeries:
    """Writes one stream of tokens into shards of `shard_tokens` tokens, the last one shorter.

    File names are `stem` + a six-digit number counting from `first`. As in FineWeb's shards, a
    document that meets the end of a shard goes on in the next.
    """

    def __init__(self, stem: str, first: int, shard_tokens: int) -> None:
        self.stem = stem
        self.first = first
        self.shard_tokens = shard_tokens
        self.num_shards = 0
        self.num_tokens = 0
        self._writer: ShardWriter | None = None

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, shape (n,), uint16."""
        self.num_tokens += len(tokens)
        while len(tokens):
            if self._writer is None:
                if self.num_shards == MAX_SHARDS:
                    raise DataError(f"more than {MAX_SHARDS:,} shards; raise --shard-tokens")
                path = Path(f"{self.stem}{self.first + self.num_shards:06d}.bin")
                self._writer = ShardWriter(path)
                self.num_shards += 1
            space = self.shard_tokens - self._writer.num_tokens
            self._writer.write(tokens[:space])
            tokens = tokens[space:]
            if self._writer.num_tokens == self.shard_tokens:
                self.close()

    def close(self) -> None:
        """Complete the shard under way."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def check_new(out: Path, prefix: str) -> None:
    """Raise DataError if `out` has shards of this prefix."""
    names = os.listdir(out) if out.is_dir() else []
    if any(name.startswith(f"{prefix}_") and name.endswith(".bin") for name in names):
        raise DataError(
            f"{out}: already has shards named {prefix}_*.bin; delete them, or choose another "
            "--out or --prefix"
        )


def tokenize(args: argparse.Namespace) -> str:
    """Do what the command line says; return the line that sums it up. Raises DataError."""
    prefix = args.prefix or Path(os.path.abspath(args.out)).name
    check_new(args.out, prefix)
    # Shards move to the output folder together, so that a run that fails leaves none behind.
    with staging(args.out) as folder:
        sources = list_sources(args.inputs, args.match, args.field, args.skip_bad)
        texts = [s for s in sources if isinstance(s, Path) and s.suffix.lower() in (".txt", ".md")]
        num_bytes = sum(path.stat().st_size for path in texts)
        check_room(args.out, int(LEAST_ROOM[args.tokenizer] * num_bytes))
        get_encoder(args.tokenizer)  # fetches the vocabulary, before anything is read

        train = ShardSeries(f"{folder}/{prefix}_train_", 1, args.shard_tokens)
        val = ShardSeries(f"{folder}/{prefix}_val_", 0, args.shard_tokens)
        left_out = LeftOut(args.skip_bad)
        num_documents = 0
        bar = tqdm(
            total=len(sources),
            bar_format="{percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]",
            disable=None,
        )
        with (
            bar,
            closing(read_sources(sources, args.field, left_out)) as documents,
            closing(encode_in_order(documents, args.tokenizer, args.workers)) as batches,
        ):
            for batch, share in batches:
                for tokens in batch:
                    if isinstance(tokens, DataError):
                        left_out.add(tokens)
                        continue
                    is_val = args.val_every > 0 and num_documents % args.val_every == 0
                    (val if is_val else train).write(tokens)
                    num_documents += 1
                bar.set_postfix_str(f"{(train.num_tokens + val.num_tokens) / 1e6:.1f} M tokens")
                bar.update(share)
        train.close()
        val.close()
        if left_out.bad_rows:
            note = f"left out {left_out.bad_rows} bad rows, the first: {left_out.first}"
            print(command.one_line(note), file=sys.stderr)
        if left_out.empty_files:
            print(f"left out {left_out.empty_files} empty files", file=sys.stderr)
        if num_documents == 0:
            raise DataError("the input has no documents; check --field and the files")
        if train.num_tokens == 0:
            raise DataError(
                "the input is a single document, which went to validation; add documents, or use "
                "--val-every 0 for training shards only"
            )
        check_new(args.out, prefix)  # again, as another run may have ended meanwhile
    return (
        f"{args.out}: {num_documents:,} documents, {train.num_tokens:,} train tokens in "
        f"{train.num_shards} shards, {val.num_tokens:,} val tokens in {val.num_shards} shards"
    )


# ---- Command line ----


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (0 done, 1 can't write, 2 bad arguments or input)."""
    parser = command.Parser(description="Turn text into token shards.")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file, folder or hub dataset (user/name)")
    add("--out", required=True, help="folder for the shards")
    add("--prefix", help="first part of the file names (default: the folder's name)")
    add("--tokenizer", choices=("gpt2", "bytes"), default="gpt2", help="default gpt2")
    add("--field", default="text", help="field or column that holds the text (default text)")
    add("--match", default="*", help="which files of a hub dataset, such as 'sample/10BT/*'")
    add("--shard-tokens", type=int, default=100_000_000, help="default 100,000,000")
    add("--val-every", type=int, default=100, help="every k-th document is val (100; 0: none)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: all cores)")
    add(
        "--skip-bad",
        "--skip_bad",
        action="store_true",
        help="leave out rows that can't be read, and count them",
    )
    args = parser.parse_args(argv)
    if not args.out or "" in args.inputs:
        parser.error("an empty name: expected a file or folder")
    if args.prefix is None and not Path(os.path.abspath(args.out)).name:
        parser.error(f"--out {args.out}: has no name to call shards after; give --prefix")
    if args.prefix is not None and (args.prefix in ("", "..") or "/" in args.prefix):
        parser.error(f"--prefix {args.prefix!r}: expected the first part of a file name")
    if not 1 <= args.shard_tokens <= MAX_SHARD_TOKENS:
        parser.error(f"--shard-tokens {args.shard_tokens}: expected 1 to {MAX_SHARD_TOKENS}")
    if args.val_every < 0 or args.val_every == 1:
        parser.error(f"--val-every {args.val_every}: expected 0 (no validation) or at least 2")
    if not 1 <= args.workers <= MAX_WORKERS:
        parser.error(f"--workers {args.workers}: expected 1 to {MAX_WORKERS}")
    args.out = Path(args.out)
    try:
        print(tokenize(args))
    except DataError as error:
        command.report(error)
        return 2
    except OSError as error:  # a full disk, no permission to write
        command.report(error)
        return 1
    return 0


if __name__ == "__main__":
    command.run(main, "nothing unfinished is left")
