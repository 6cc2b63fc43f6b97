"""Downloads FineWeb shards that are already tokenized: python data/cached_fineweb.py [NAME] [N]

Fetches the validation shard and N training shards (100 M tokens, 200 MB each) of a hub dataset
into data/NAME/. Complete files are kept, interrupted ones are resumed, broken ones fetched again.
The hub is asked only for what is missing, so nothing needs the network when all is there.
"""

import command

if __name__ == "__main__":
    command.begin()

import functools
import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hub import explain, http_status
from shards import (
    HEADER_BYTES,
    MAGIC,
    VERSION,
    DataError,
    check_replaceable,
    check_room,
    verify_shard,
)
from tqdm import tqdm

# name -> (hub dataset, prefix of its files)
DATASETS = {
    "fineweb10B": ("kjj0/fineweb10B-gpt2", "fineweb"),
    "fineweb100B": ("kjj0/fineweb100B-gpt2", "fineweb"),
    "finewebedu10B": ("kjj0/finewebedu10B-gpt2", "finewebedu"),
}
NUM_THREADS = 8
LOOKUP_TIMEOUT = 10  # seconds the hub gets to answer a question about a file
MAX_SHARDS = 999_999  # file names have six digits

LOGIN_PAGE = "a login page of the network or a proxy may stand between; open it in a browser"


class RemoteFile(NamedTuple):
    """One file of the hub: its name, address, version (etag) and size in bytes."""

    name: str
    url: str
    etag: str
    size: int


def look_up(repo: str, name: str) -> RemoteFile:
    """Ask the hub for a file's version and size. Raises DataError if it can't be had."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo, name, repo_type="dataset")
    try:
        metadata = get_hf_file_metadata(url, timeout=LOOKUP_TIMEOUT)
    except Exception as error:
        if http_status(error) == 404:
            raise DataError(f"{repo} has no file {name}; ask for fewer shards") from error
        raise DataError(f"can't get {url}: {explain(error)}") from error
    if None in (metadata.commit_hash, metadata.etag, metadata.size):  # every hub gives these
        raise DataError(f"{url} did not answer as a hub does: {LOGIN_PAGE}, and check HF_ENDPOINT")
    return RemoteFile(name, url, metadata.etag, metadata.size)


def fetch(remote: RemoteFile, folder: Path, bar: tqdm) -> None:
    """Download a file to folder/.parts, going on where an earlier run stopped, check it, move it.

    Raises DataError if the connection fails for good or the file is no valid shard.
    """
    from huggingface_hub.file_download import http_get

    # The version in the name keeps a resumed file from being put together of two versions.
    part = folder / ".parts" / f"{remote.name}.{remote.etag}"
    try:
        with open(part, "ab") as file:
            if not is_start(part, remote.size):  # spoilt, say by two runs at once
                file.truncate(0)
                file.seek(0)
            done = file.tell()
            bar.update(done)
            http_get(
                remote.url,
                file,
                resume_size=done,
                # A compressed answer could be neither measured nor resumed.
                headers={"Accept-Encoding": "identity"},
                expected_size=remote.size,
                _tqdm_bar=bar,  # one for all files
            )
    except Exception as error:
        if part.exists() and not is_start(part, remote.size):
            part.unlink()
            raise DataError(
                f"{remote.url} gave something else than a shard: {LOGIN_PAGE}"
            ) from error
        raise DataError(f"{remote.url} broke off: {explain(error)}; what came is kept") from error
    try:
        check_hash(part, remote.etag)
        verify_shard(part)
    except DataError as error:
        part.unlink()
        raise DataError(f"{remote.url} did not give a valid shard: {error}") from error
    check_replaceable(folder / remote.name)
    os.replace(part, folder / remote.name)
    for stale in part.parent.glob(f"{remote.name}.*"):  # of other versions
        stale.unlink()


def is_start(part: Path, size: int) -> bool:
    """Whether a file can be the beginning of a shard of `size` bytes, by its length and header."""
    header = np.array([MAGIC, VERSION, (size - HEADER_BYTES) // 2], "<i4").tobytes()
    with open(part, "rb") as file:
        return part.stat().st_size <= size and header.startswith(file.read(len(header)))


def check_hash(path: Path, etag: str) -> None:
    """Compare a file with its version on the hub, a SHA-256 for large files. Raises DataError."""
    if len(etag) != 64:  # small files have a git hash
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != etag:
        raise DataError(f"{path}: found SHA-256 {found}, expected {etag}; fetch it again")


def is_complete(path: Path) -> bool:
    """Whether a valid shard is there; a broken one is reported, and may be replaced.

    Raises OSError if something else has its name.
    """
    if path.is_file():
        try:
            verify_shard(path)
            return True
        except DataError as error:
            print(f"{error} (will be fetched)", file=sys.stderr)
    check_replaceable(path)
    return False


def download(repo: str, names: list[str], folder: Path) -> int:
    """Bring the named shards into `folder`; return how many had to be fetched.

    Raises DataError; what is complete by then stays, what is not stays in folder/.parts.
    """
    missing = [name for name in names if not is_complete(folder / name)]
    if not missing:
        return 0
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()
    parts = folder / ".parts"
    # Leaving the pool by an exception waits for no download; their parts can be resumed.
    with command.thread_pool(NUM_THREADS) as pool:
        remotes = list(pool.map(functools.partial(look_up, repo), missing))
        total = sum(remote.size for remote in remotes)
        done = sum(path.stat().st_size for path in parts.glob("*"))
        check_room(folder, total - done)
        parts.mkdir(parents=True, exist_ok=True)
        try:
            with tqdm(total=total, unit="B", unit_scale=True, desc=repo, disable=None) as bar:
                list(pool.map(lambda remote: fetch(remote, folder, bar), remotes))
        finally:
            with suppress(OSError):  # where there are parts, or a thread still makes one
                for part in parts.iterdir():
                    if part.stat().st_size == 0:
                        part.unlink()
                parts.rmdir()
    return len(missing)


def count(text: str) -> int:
    """A number of shards, 0 or more."""
    number = int(text)
    if not 0 <= number <= MAX_SHARDS:
        raise ValueError
    return number


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (0 done, 1 not fetched, 2 by argparse)."""
    parser = command.Parser(description="Download tokenized FineWeb shards.")
    parser.add_argument("name", nargs="?", default="fineweb10B", choices=DATASETS, help="dataset")
    parser.add_argument(
        "n", nargs="?", default=9, type=count, help="train shards of 100 M tokens (default 9)"
    )
    parser.add_argument("--out", help="folder (default NAME next to this script)")
    args = parser.parse_args(argv)
    if args.out == "":
        parser.error("--out is empty: expected a folder")

    repo, prefix = DATASETS[args.name]
    folder = Path(args.out or Path(__file__).resolve().parent / args.name)
    names = [f"{prefix}_val_000000.bin"]
    names += [f"{prefix}_train_{i:06d}.bin" for i in range(1, args.n + 1)]
    try:
        num_fetched = download(repo, names, folder)
    except (DataError, OSError) as error:
        command.report(error)
        return 1
    print(f"{folder}: {len(names)} shards, {num_fetched} of them fetched now")
    return 0


if __name__ == "__main__":
    command.run(main, "run this again to go on from there")
