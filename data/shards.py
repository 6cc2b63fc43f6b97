"""Token shards and tokenizers, shared by the data tools.

A shard is one binary file: a header of 256 little-endian int32 (magic 20240520, version 1, number
of tokens, zeros), then the tokens as little-endian uint16. Documents follow each other in one
stream, each beginning with START_TOKEN; a document may run on from one shard into the next.
"""

import functools
import os
import re
import shutil
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from command import hold_signals

if TYPE_CHECKING:
    import tiktoken

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts tokens in an int32

START_TOKEN = 50256  # GPT-2's <|endoftext|>; here it begins every document

# GPT-2 gives its first 256 ids to the single bytes: the printable ones first, then the rest.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHER = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_TO_ID = np.empty(256, np.uint16)
BYTE_TO_ID[_PRINTABLE + _OTHER] = np.arange(256)

# \s in GPT-2's pattern; Python's \s has some control characters more.
_WHITE_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
LONG_RUN = 100_000  # white space that tiktoken gets in one run; a million makes it panic

Encoder = Callable[[str], np.ndarray]


class DataError(Exception):
    """Something the user can fix; the message names the file, what was found and a remedy."""


class ShardWriter:
    """Streams tokens into one shard, which gets its name only when it is complete.

    Used as a context manager: leaving the block normally renames the temporary file to `path`
    (replacing a file already there), leaving it by an exception deletes the temporary file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_tokens = 0
        self._temporary = path.with_name(path.name + ".tmp")
        check_replaceable(path)
        check_replaceable(self._temporary)
        self._file = self._temporary.open("wb")
        self._file.write(bytes(HEADER_BYTES))  # filled in when the count is known

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, shape (n,), dtype uint16. Raises TypeError for another dtype."""
        if tokens.dtype != np.uint16:
            raise TypeError(f"{self.path}: tokens are {tokens.dtype}, expected uint16")
        self._file.write(tokens.astype("<u2", copy=False).tobytes())
        self.num_tokens += len(tokens)

    def close(self) -> None:
        """Write the header and give the shard its name, or discard it if that fails."""
        header = np.zeros(HEADER_INTS, "<i4")
        header[:3] = MAGIC, VERSION, self.num_tokens
        try:
            self._file.seek(0)
            self._file.write(header.tobytes())
            self._file.close()
            os.replace(self._temporary, self.path)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Delete what was written; no file appears under the shard's name."""
        with suppress(OSError):  # a full disk, which has no room for what is buffered either
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder` whose files move to `folder` together when the block ends.

    An exception leaves nothing of them, nor a folder that was made here. Raises OSError, its
    message naming `folder`, also where a file would replace what is no regular file.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as temporary:
            yield Path(temporary)
            files = sorted(Path(temporary).iterdir())
            for path in files:
                check_replaceable(folder / path.name)
            with hold_signals():
                for path in files:
                    os.replace(path, folder / path.name)
    except BaseException as error:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError) and error.strerror:
            message = (
                f"{folder}: cannot be written ({error.strerror}); make room, or choose another"
            )
            raise OSError(message) from error
        raise


def check_replaceable(path: Path) -> None:
    """Raise OSError if something other than a regular file is there: a folder, a device, a link."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OSError(f"{path}: is no regular file, so it is not replaced; move it away")


def check_room(folder: Path, num_bytes: int) -> None:
    """Raise OSError if the disk of `folder`, which need not exist yet, has less room."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        found = f"{num_bytes / 1e6:,.1f} MB are to be written, {free / 1e6:,.1f} MB are free"
        raise OSError(f"{folder}: {found}; make room, or choose another")


def verify_shard(path: Path) -> int:
    """Check a shard's header and length and return its number of tokens.

    Raises DataError naming the file, what was found, what was expected and what to do.
    """

    def broken(found: str, expected: str) -> DataError:
        return DataError(f"{path}: found {found}, expected {expected}; fetch or make it again")

    if not path.is_file():
        raise DataError(f"{path}: found no such file, expected a shard; fetch or make it first")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise broken(f"{size} bytes", f"a header of {HEADER_BYTES} bytes")
    magic, version, num_tokens = np.fromfile(path, "<i4", count=3).tolist()
    if magic != MAGIC:
        raise broken(f"magic number {magic}", f"{MAGIC}")
    if version != VERSION:
        raise broken(f"version {version}", f"{VERSION}")
    if size != HEADER_BYTES + 2 * num_tokens:
        expected = f"{HEADER_BYTES + 2 * num_tokens} for the header's {num_tokens} tokens"
        raise broken(f"{size} bytes", expected)
    return num_tokens


def encode_bytes(text: str) -> np.ndarray:
    """Byte tokens: the GPT-2 id of every single UTF-8 byte, shape (bytes,), uint16."""
    return BYTE_TO_ID[np.frombuffer(text.encode(), np.uint8)]


def load_gpt2(timeout: float) -> "tiktoken.Encoding":
    """GPT-2's byte pair encoding; the first call on a machine downloads the vocabulary (1.5 MB).

    Raises DataError if it can't be had within `timeout` seconds.
    """
    result: list = []

    def load() -> None:
        try:
            import tiktoken

            result.append(tiktoken.get_encoding("gpt2"))
        except Exception as error:  # noqa: BLE001 (whatever network and cache make it raise)
            result.append(error)

    # tiktoken downloads without a time limit; a daemon thread can be left behind if it hangs.
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(timeout)
    found = result[0] if result else TimeoutError(f"no answer within {timeout:g} s")
    if isinstance(found, Exception):
        reason = textwrap.shorten(f"{type(found).__name__}: {found}", 120)
        raise DataError(
            f"the GPT-2 vocabulary could not be loaded by tiktoken ({reason}); connect to the "
            "network once, point TIKTOKEN_CACHE_DIR to a folder that has it, or use "
            "--tokenizer bytes"
        )
    return found


def cut_long_runs(text: str) -> list[str]:
    """Cut a text so that tiktoken can take it, where that changes no token.

    GPT-2's pattern takes all of a run of white space but its last character as one piece, and what
    comes before ends at the run whatever it holds. A run at the end of the text is one piece whole,
    which tiktoken takes at any length.
    """
    if len(text) <= LONG_RUN:
        return [text]
    pieces, start = [], 0
    for run in _WHITE_SPACE.finditer(text):
        last = run.end() - 1
        if last - run.start() >= LONG_RUN and run.end() < len(text):
            pieces += [text[start : run.start()], text[run.start() : last]]
            start = last
    return [*pieces, text[start:]]


def encode_gpt2(encoding: "tiktoken.Encoding", text: str) -> np.ndarray:
    """GPT-2 tokens, shape (n,), uint16; names of special tokens are text like any other."""
    # To numpy: a list would be made under the interpreter's lock, which other threads wait for.
    tokens = [
        encoding.encode_to_numpy(piece, disallowed_special=()) for piece in cut_long_runs(text)
    ]
    return np.concatenate(tokens).astype(np.uint16)


@functools.cache
def get_encoder(tokenizer: str, timeout: float = 60) -> Encoder:
    """The encoder (text -> uint16 tokens, no start token) named `gpt2` or `bytes`.

    Raises DataError if GPT-2's vocabulary can't be had within `timeout` seconds.
    """
    if tokenizer == "bytes":
        return encode_bytes
    return functools.partial(encode_gpt2, load_gpt2(timeout))


def encode_document(encoder: Encoder, text: str) -> np.ndarray:
    """One document's tokens behind its start token, shape (n + 1,), uint16."""
    return np.concatenate([np.array([START_TOKEN], np.uint16), encoder(text)])
