"""Downloads FineWeb shards that are already tokenized: python data/cached_fineweb.py [NAME] [N]

Fetches the validation shard and N training shards (100 M tokens, 200 MB each) of a hub dataset
into data/NAME/. Complete files are kept, interrupted ones are resumed, broken ones fetched again.
"""

import argparse
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import logging as hub_logging
from shards import DataError, verify_shard
from tqdm import tqdm

# name -> (hub dataset, prefix of its files)
DATASETS = {
    "fineweb10B": ("kjj0/fineweb10B-gpt2", "fineweb"),
    "fineweb100B": ("kjj0/fineweb100B-gpt2", "fineweb"),
    "finewebedu10B": ("kjj0/finewebedu10B-gpt2", "finewebedu"),
}
NUM_THREADS = 8
LOOKUP_TIMEOUT = 10  # seconds the hub gets to answer a question about a file


class RemoteFile(NamedTuple):
    """One file of the hub: its name, address, version (etag) and size in bytes."""

    name: str
    url: str
    etag: str
    size: int


def look_up(repo: str, name: str) -> RemoteFile:
    """Ask the hub for a file's version and size. Raises DataError if it can't be had."""
    url = hf_hub_url(repo, name, repo_type="dataset")
    try:
        metadata = get_hf_file_metadata(url, timeout=LOOKUP_TIMEOUT)
    except Exception as error:  # which classes the hub's HTTP client raises varies by its version
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 404:
            raise DataError(f"{repo} has no file {name}; ask for fewer shards") from error
        raise DataError(f"can't reach {url} ({first_line(error)}); check the network") from error
    if metadata.etag is None or metadata.size is None:
        raise DataError(f"{url} answered without ETag or size; check HF_ENDPOINT and proxies")
    return RemoteFile(name, url, metadata.etag, metadata.size)


def fetch(remote: RemoteFile, folder: Path, bar: tqdm) -> None:
    """Download a file to folder/.parts, going on where an earlier run stopped, check it, move it.

    Raises DataError if the connection fails for good or the file is no valid shard.
    """
    # The version in the name keeps a resumed file from being put together of two versions.
    part = folder / ".parts" / f"{remote.name}.{remote.etag}"
    try:
        with open(part, "ab") as file:
            if file.tell() > remote.size:  # spoilt, say by two runs at once
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
    except Exception as error:  # as above
        raise DataError(
            f"{remote.url} broke off ({first_line(error)}); run this again to go on from there"
        ) from error
    try:
        check_hash(part, remote.etag)
        verify_shard(part)
    except DataError as error:
        part.unlink()
        raise DataError(f"{remote.url} did not give a valid shard: {error}") from error
    os.replace(part, folder / remote.name)


def check_hash(path: Path, etag: str) -> None:
    """Compare a file with its version on the hub, a SHA-256 for large files. Raises DataError."""
    if len(etag) != 64:  # small files have a git hash
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != etag:
        raise DataError(f"{path}: found SHA-256 {found}, expected {etag}; fetch it again")


def first_line(error: Exception) -> str:
    """An exception as one line: its class and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def is_complete(path: Path) -> bool:
    """Whether a valid shard is there; a broken one is reported and deleted."""
    if not path.exists():
        return False
    try:
        verify_shard(path)
    except DataError as error:
        print(f"{error} (deleted, will be fetched)", file=sys.stderr)
        path.unlink()
        return False
    return True


def download(repo: str, names: list[str], folder: Path) -> int:
    """Bring the named shards into `folder`; return how many had to be fetched.

    Raises DataError; what is complete by then stays, what is not stays in folder/.parts.
    """
    missing = [name for name in names if not is_complete(folder / name)]
    if not missing:
        return 0
    parts = folder / ".parts"
    parts.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        try:
            remotes = list(pool.map(lambda name: look_up(repo, name), missing))
            total = sum(remote.size for remote in remotes)
            with tqdm(total=total, unit="B", unit_scale=True, desc=repo, disable=None) as bar:
                list(pool.map(lambda remote: fetch(remote, folder, bar), remotes))
        except KeyboardInterrupt:
            # Leaving the pool would wait for the downloads under way; their parts can be resumed.
            print("\ninterrupted; run this again to go on from there", file=sys.stderr)
            os._exit(130)
    if not any(parts.iterdir()):
        parts.rmdir()
    return len(missing)


def count(text: str) -> int:
    """A number of shards, 0 or more."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (0 done, 1 not fetched, 2 by argparse)."""
    parser = argparse.ArgumentParser(description="Download tokenized FineWeb shards.")
    parser.add_argument("name", nargs="?", default="fineweb10B", choices=DATASETS, help="dataset")
    parser.add_argument(
        "n", nargs="?", default=9, type=count, help="train shards of 100 M tokens (default 9)"
    )
    parser.add_argument("--out", type=Path, help="folder (default NAME next to this script)")
    args = parser.parse_args(argv)

    repo, prefix = DATASETS[args.name]
    folder = args.out or Path(__file__).resolve().parent / args.name
    names = [f"{prefix}_val_000000.bin"]
    names += [f"{prefix}_train_{i:06d}.bin" for i in range(1, args.n + 1)]
    hub_logging.set_verbosity_error()
    try:
        num_fetched = download(repo, names, folder)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {len(names)} shards, {num_fetched} of them fetched now")
    return 0


if __name__ == "__main__":
    sys.exit(main())
