"""Turns text into token shards: python data/tokenize_text.py INPUT... --out FOLDER

An input is a file, a folder, or the name of a hub dataset. A .txt or .md file is one document; in
.jsonl and .parquet every line or row is one, its text in the field `--field`. Documents keep their
order; every `--val-every`-th, from the first on, goes to the validation shards. All files are read
as streams, so only single .txt and .md files need to fit into memory.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from shards import MAX_SHARD_TOKENS, DataError, ShardWriter, encode_document, get_encoder
from tqdm import tqdm

ENDINGS = (".txt", ".md", ".jsonl", ".parquet")
BATCH_CHARS = 1_000_000  # text that goes to a worker at once
PARQUET_ROWS = 1024  # rows decoded at once


class Document(NamedTuple):
    """A document and the share of its file that it makes up (0 to 1, for the progress bar)."""

    text: str
    share: float


class HubFile(NamedTuple):
    """A file of a hub dataset, downloaded only when its turn comes."""

    repo: str
    name: str


# ---- What to read ----


def list_sources(inputs: list[str], match: str) -> list[Path | HubFile]:
    """The files behind the inputs, folders and hub datasets in sorted order.

    `match` is a pattern for the file names in a hub dataset. Raises DataError.
    """
    sources: list[Path | HubFile] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            sources += list_folder(path)
        elif path.suffix.lower() not in ENDINGS and path.exists():
            raise DataError(f"{name}: unknown ending, expected one of {', '.join(ENDINGS)}")
        elif path.exists():
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


def list_folder(folder: Path) -> list[Path]:
    """All files under a folder that can be read; the others are counted on stderr."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    known = [path for path in files if path.suffix.lower() in ENDINGS]
    if not known:
        raise DataError(f"{folder}: no {', '.join(ENDINGS)} files in this folder; check the path")
    if len(known) < len(files):
        others = len(files) - len(known)
        print(f"{folder}: leaving out {others} files with other endings", file=sys.stderr)
    return known


def list_hub(repo: str, match: str) -> list[HubFile]:
    """The .parquet and .jsonl files of a hub dataset whose names fit `match`."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(repo, timeout=10)  # fails at once; the listing would retry for long
        names = HfApi().list_repo_files(repo, repo_type="dataset")
    except Exception as error:  # which classes the hub's HTTP client raises varies by its version
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(
            f"{repo}: no such file or folder, and no such dataset on the hub could be listed "
            f"({reason}); check the name and the network"
        ) from error
    names = [name for name in names if name.endswith((".parquet", ".jsonl"))]
    fitting = sorted(name for name in names if fnmatch(name, match))
    if not fitting:
        raise DataError(
            f"{repo}: none of its {len(names)} .parquet and .jsonl files fits --match '{match}'"
        )
    return [HubFile(repo, name) for name in fitting]


# ---- Documents of a file ----


def read_source(source: Path | HubFile, field: str) -> Iterator[Document]:
    """Yield the documents of a file in order. Raises DataError naming file and line or row."""
    if isinstance(source, Path):
        yield from read_file(source, field)
        return
    from huggingface_hub import hf_hub_download

    with tempfile.TemporaryDirectory() as folder:  # so that one file at a time takes disk space
        try:
            path = hf_hub_download(source.repo, source.name, repo_type="dataset", local_dir=folder)
        except Exception as error:  # as above
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(
                f"{source.repo}: {source.name} could not be downloaded ({reason}); "
                "check the network and run this again"
            ) from error
        yield from read_file(Path(path), field)


def read_file(path: Path, field: str) -> Iterator[Document]:
    """Yield the documents of a local file. Raises DataError naming file and line or row."""
    readers = {".jsonl": read_jsonl, ".parquet": read_parquet}
    reader = readers.get(path.suffix.lower(), read_text)
    is_empty = True
    try:
        for document in reader(path, field):
            is_empty = False
            yield document
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error}); check the file") from error
    if is_empty:
        raise DataError(f"{path}: has no documents; leave it out")


def read_text(path: Path, field: str) -> Iterator[Document]:
    """The whole file as one document; `field` is not used."""
    text = decode(path.read_bytes(), str(path))
    if text:
        yield Document(text, 1.0)


def read_jsonl(path: Path, field: str) -> Iterator[Document]:
    """One document a line, an object whose `field` is text; blank lines hold none."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            text = decode(line, place)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                raise DataError(f"{place}: is no JSON ({error}); mend or remove it") from error
            if not isinstance(record, dict) or field not in record:
                found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise DataError(f"{place}: no field '{field}' (found {found}); set --field")
            yield Document(check_text(record[field], field, place), len(line) / size)


def read_parquet(path: Path, field: str) -> Iterator[Document]:
    """One document a row, the text in the column `field`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # By default pyarrow buffers the whole column of all row groups while it goes along.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                found = ", ".join(columns)
                raise DataError(f"{path}: no column '{field}' (found {found}); set --field")
            row = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    text = check_text(value.as_py(), field, f"{path}, row {row}")
                    yield Document(text, 1 / file.metadata.num_rows)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, row {row}: is no valid UTF-8 ({error}); mend it") from error
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: can't be read as parquet ({reason}); get it again") from error


def decode(data: bytes, place: str) -> str:
    """UTF-8 to text. Raises DataError."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is no valid UTF-8 ({error}); convert it to UTF-8") from error


def check_text(value: object, field: str, place: str) -> str:
    """The value if it is text that UTF-8 can hold. Raises DataError."""
    if not isinstance(value, str):
        found = type(value).__name__
        raise DataError(f"{place}: '{field}' is {found}, expected text; set --field or mend it")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape halves of surrogate pairs
        raise DataError(f"{place}: is no valid Unicode ({error}); mend it") from error
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


def encode_batch(tokenizer: str, batch: list[Document]) -> tuple[list[np.ndarray], float]:
    """Tokens of every document, each (n,) uint16, and the batch's share of its files."""
    encoder = get_encoder(tokenizer)
    tokens = [encode_document(encoder, document.text) for document in batch]
    return tokens, sum(document.share for document in batch)


def encode_in_order(
    documents: Iterable[Document], tokenizer: str, num_workers: int
) -> Iterator[tuple[list[np.ndarray], float]]:
    """Encode on several processes, results in the order of the documents.

    At most 2 * num_workers batches are under way, which bounds the memory.
    """
    pending = deque()
    # Spawned, not forked: pyarrow and tqdm have threads, and a fork copies their locks as held.
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        for batch in make_batches(documents):
            pending.append(pool.submit(encode_batch, tokenizer, batch))
            if len(pending) == 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


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


def tokenize(args: argparse.Namespace) -> str:
    """Do what the command line says; return the line that sums it up. Raises DataError."""
    prefix = args.prefix or args.out.resolve().name
    if any(args.out.glob(f"{prefix}_*.bin")):
        raise DataError(
            f"{args.out}: already has shards named {prefix}_*.bin; delete them, or choose another "
            "--out or --prefix"
        )
    sources = list_sources(args.inputs, args.match)
    get_encoder(args.tokenizer)  # fetches the vocabulary once, before the workers want it

    args.out.mkdir(parents=True, exist_ok=True)
    # Shards move to the output folder together, so that a run that fails leaves none behind.
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=args.out) as folder:
        train = ShardSeries(f"{folder}/{prefix}_train_", 1, args.shard_tokens)
        val = ShardSeries(f"{folder}/{prefix}_val_", 0, args.shard_tokens)
        documents = (doc for source in sources for doc in read_source(source, args.field))
        num_documents = 0
        bar = tqdm(
            total=len(sources),
            bar_format="{percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]",
            disable=None,
        )
        with bar:
            for batch, share in encode_in_order(documents, args.tokenizer, args.workers):
                for tokens in batch:
                    is_val = args.val_every > 0 and num_documents % args.val_every == 0
                    (val if is_val else train).write(tokens)
                    num_documents += 1
                bar.set_postfix_str(f"{(train.num_tokens + val.num_tokens) / 1e6:.1f} M tokens")
                bar.update(share)
        train.close()
        val.close()
        if train.num_tokens == 0:
            raise DataError(
                "the input is a single document, which went to validation; add documents, or use "
                "--val-every 0 for training shards only"
            )
        for path in sorted(Path(folder).iterdir()):
            os.replace(path, args.out / path.name)
    return (
        f"{args.out}: {num_documents:,} documents, {train.num_tokens:,} train tokens in "
        f"{train.num_shards} shards, {val.num_tokens:,} val tokens in {val.num_shards} shards"
    )


# ---- Command line ----


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (0 done, 1 can't write, 2 bad arguments or input)."""
    parser = argparse.ArgumentParser(description="Turn text into token shards.")
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file, folder or hub dataset (user/name)")
    add("--out", type=Path, required=True, help="folder for the shards")
    add("--prefix", help="first part of the file names (default: the folder's name)")
    add("--tokenizer", choices=("gpt2", "bytes"), default="gpt2", help="default gpt2")
    add("--field", default="text", help="field or column that holds the text (default text)")
    add("--match", default="*", help="which files of a hub dataset, such as 'sample/10BT/*'")
    add("--shard-tokens", type=int, default=100_000_000, help="default 100,000,000")
    add("--val-every", type=int, default=100, help="every k-th document is val (100; 0: none)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    args = parser.parse_args(argv)
    if not 1 <= args.shard_tokens <= MAX_SHARD_TOKENS:
        parser.error(f"--shard-tokens {args.shard_tokens}: expected 1 to {MAX_SHARD_TOKENS}")
    if args.val_every < 0 or args.val_every == 1:
        parser.error(f"--val-every {args.val_every}: expected 0 (no validation) or at least 2")
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected at least 1")
    try:
        print(tokenize(args))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, no permission to write
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
