"""Counts near-duplicates: python data/near_duplicates.py --train_files PATTERN --val_file FILE

Tells how many documents of a validation shard are near-duplicates of text in training shards, and
with `--out` writes a validation shard without them. A run is `--run` consecutive tokens of one
document, its start token left out. A validation document is a near-duplicate if at least `--runs`
of its runs, no two of which overlap, occur anywhere in the training shards. Documents shorter than
`--runs` runs never count. 16 is meant for GPT-2's tokens; of bytes take 64 or more.

The training shards are read as one stream, in parts, so memory does not grow with them; a
validation token takes at most 40 bytes. Runs are compared by hashes of 64 bits: two different runs
have the same hash in about one of 2^64 pairs, so 10 M validation tokens and 1,000 M training tokens
lead to 0.0005 false hits.
"""

import command

if __name__ == "__main__":
    command.begin()

import argparse
import fnmatch
import glob
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from shards import (
    HEADER_BYTES,
    START_TOKEN,
    DataError,
    ShardWriter,
    check_room,
    staging,
    verify_shard,
)
from tqdm import tqdm

CHUNK_TOKENS = 1 << 21  # tokens hashed at once, about 100 MB
MAX_RUN = 1024  # the time to hash grows with the length of a run
TABLE_ROWS = (1, 2, 4, 8)  # numbers of runs that have a row in the table

TOKEN_HASHES = np.random.PCG64(0).random_raw(1 << 16)  # (65536,) uint64, the same on every machine
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that a product keeps all 64 bits


# ---- Runs ----


def hash_runs(tokens: np.ndarray, run: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the runs of `tokens`, (n,) uint16, begin, and their hashes: (m,) int64, (m,) uint64.

    The hash is a polynomial modulo 2^64: that of the tokens a b c is h[a] M² + h[b] M + h[c], with
    h = TOKEN_HASHES and M = MULTIPLIER.
    """
    values = TOKEN_HASHES[tokens]
    count = max(len(tokens) - run + 1, 0)
    hashes = values[:count].copy()
    for i in range(1, run):
        hashes *= MULTIPLIER
        hashes += values[i : i + count]
    num_starts = np.concatenate([[0], np.cumsum(tokens == START_TOKEN)])  # before each position
    begins = np.flatnonzero(num_starts[run:] == num_starts[:-run])
    return begins, hashes[begins]


def search(known: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first place of each hash in `known`, and whether it is there: (n,) int64, (n,) bool.

    Both arrays are sorted: `known` has to be, and sorted `hashes` are found ten times faster,
    because what they are compared with stays in the cache.
    """
    places = np.searchsorted(known, hashes)
    found = places < len(known)
    found[found] = known[places[found]] == hashes[found]
    return places, found


def find_hits(val: np.ndarray, train: Iterable[np.ndarray], run: int) -> np.ndarray:
    """Where the validation runs that occur in training begin, (hits,) int64, sorted.

    val: the tokens, (n,) uint16. train: parts of the training tokens, (any,) uint16; they overlap,
    so that each run is whole in one of them. Raises DataError if no document is as long as a run.
    """

    def val_runs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, len(val), CHUNK_TOKENS):
            begins, hashes = hash_runs(val[first : first + CHUNK_TOKENS + run - 1], run)
            yield first + begins, hashes

    known = np.concatenate([hashes for _, hashes in val_runs()])
    if len(known) == 0:
        raise DataError(f"--run {run}: every validation document is shorter; lower it")
    known.sort()
    occurs = np.zeros(len(known), bool)
    for tokens in train:
        _, hashes = hash_runs(tokens, run)
        hashes.sort()
        places, found = search(known, hashes)
        occurs[places[found]] = True
    known = known[occurs]

    hits = []
    for begins, hashes in val_runs():  # hashed again, which takes less memory than positions
        order = np.argsort(hashes)
        _, found = search(known, hashes[order])
        hits.append(begins[order[found]])
    return np.sort(np.concatenate(hits))


def count_runs(
    hits: np.ndarray, begins: np.ndarray, ends: np.ndarray, run: int, most: int
) -> np.ndarray:
    """How many hits without overlap each document has, counted up to `most`: (documents,) int64.

    hits: (hits,), sorted. begins, ends: (documents,), the first position of each and that behind
    its last. Taking the first hit, then the first one behind it, and so on, finds the most.
    """
    counts = np.zeros(len(begins), np.int64)
    hits = np.append(hits, ends[-1])  # so that there is always a next one
    position = begins
    for _ in range(most):
        following = hits[np.searchsorted(hits, position)]
        more = following < ends
        if not more.any():
            break
        counts += more
        position = np.where(more, following + run, ends)
    return counts


# ---- Shards ----


def find_shards(pattern: str) -> list[Path]:
    """The files of a glob pattern, sorted, as find_files of train_gpt.py finds them, which would
    load PyTorch: what exists is taken by its name, be it the whole path or the folders it begins
    with, so a name may have [ ] in it. Raises DataError if there are none."""
    path = Path(pattern)
    named = next(part for part in (path, *path.parents) if part.exists())
    files = sorted(glob.glob(str(Path(glob.escape(str(named)), path.relative_to(named)))))
    if not files:
        raise DataError(f"--train_files {pattern}: no such file; fetch or make training shards")
    return [Path(name) for name in files]


def read_part(path: Path, first: int, count: int) -> np.ndarray:
    """At most `count` tokens of a shard from position `first` on, uint16. Raises DataError."""
    try:
        return np.fromfile(path, "<u2", count, offset=HEADER_BYTES + 2 * first)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the disk") from error


def read_stream(
    paths: list[Path], sizes: list[int], overlap: int, bar: tqdm
) -> Iterator[np.ndarray]:
    """The tokens of the shards, `sizes` of them each, in parts of at most CHUNK_TOKENS, uint16.

    In front of each part are the last `overlap` tokens before it, also where these are of another
    shard, as a document may run on from there.
    """
    before = np.empty(0, np.uint16)
    for path, size in zip(paths, sizes, strict=True):
        for first in range(0, size, CHUNK_TOKENS):
            part = read_part(path, first, CHUNK_TOKENS)
            tokens = np.concatenate([before, part])
            yield tokens
            before = tokens[max(len(tokens) - overlap, 0) :]
            bar.update(len(part))


def read_val(path: Path, val_tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The first `val_tokens` tokens of a shard, or all, (n,) uint16, and where its documents begin,
    (documents,) int64: at start tokens and at 0, even if that is inside a document.

    Raises DataError for a file that is no shard, has too few tokens or no start token.
    """
    size = verify_shard(path)
    if val_tokens is not None and val_tokens > size:
        found = f"more than the {size} tokens of {path}"
        raise DataError(f"--val_tokens {val_tokens}: {found}; lower it, or leave it out")
    tokens = read_part(path, 0, size if val_tokens is None else val_tokens)
    starts = np.flatnonzero(tokens == START_TOKEN)
    if len(starts) == 0:
        raise DataError(
            f"{path}: no document begins in its first {len(tokens)} tokens (start token "
            f"{START_TOKEN}); raise --val_tokens, or make it with data/tokenize_text.py"
        )
    return tokens, np.union1d([0], starts)


def check_new(out: Path) -> None:
    """Raise DataError if there is something of this name."""
    if out.exists() or out.is_symlink():
        raise DataError(f"{out}: is there already; move it away, or choose another --out")


# ---- The count ----


def format_table(lengths: np.ndarray, counts: np.ndarray, run: int, runs: int) -> str:
    """Documents by how many of their runs occur. lengths: their tokens; counts: such runs."""

    def row(name: str, documents: str, share: str, tokens: str, token_share: str) -> str:
        return f"{name:<28}{documents:>12}{share:>9}{tokens:>15}{token_share:>9}"

    lines = [row(f"runs of {run} that occur", "documents", "share", "tokens", "share")]
    for least in (0, *sorted({*TABLE_ROWS, runs})):
        chosen = counts >= least
        documents, tokens = int(chosen.sum()), int(lengths[chosen].sum())
        name = f"{least} or more" + (", near-duplicates" if least == runs else "")
        shares = f"{documents / len(counts):.2%}", f"{tokens / int(lengths.sum()):.2%}"
        lines.append(row(name, f"{documents:,}", shares[0], f"{tokens:,}", shares[1]))
    return "\n".join(lines)


def near_duplicates(args: argparse.Namespace) -> None:
    """Do what the command line says. Raises DataError and OSError."""
    paths = find_shards(args.train_files)
    sizes = [verify_shard(path) for path in paths]
    val, begins = read_val(args.val_file, args.val_tokens)
    if any(path.samefile(args.val_file) for path in paths):
        raise DataError(
            f"--train_files {args.train_files}: {args.val_file}, the validation shard, is among "
            "them; choose a pattern without it"
        )
    if sum(sizes) == 0:
        raise DataError(f"--train_files {args.train_files}: no tokens; choose other shards")
    if args.out is not None:
        check_new(args.out)
        if fnmatch.fnmatch(str(args.out.absolute()), str(Path(args.train_files).absolute())):
            raise DataError(
                f"--out {args.out}: --train_files {args.train_files} has this name too, so that a "
                "run would train on it; choose another"
            )
        check_room(args.out.parent, HEADER_BYTES + 2 * len(val))
    ends = np.append(begins[1:], len(val))
    lengths = ends - begins

    # The folder of --out is tried before the work.
    with nullcontext() if args.out is None else staging(args.out.parent) as folder:
        with tqdm(total=sum(sizes), unit=" tokens", unit_scale=True, disable=None) as bar:
            train = read_stream(paths, sizes, args.run - 1, bar)
            hits = find_hits(val, train, args.run)
        counts = count_runs(hits, begins, ends, args.run, max(*TABLE_ROWS, args.runs))
        shards = f"{len(paths)} training shard{'s' if len(paths) > 1 else ''}"
        print(f"{args.val_file}, compared with {sum(sizes):,} tokens of {shards}")
        print(format_table(lengths, counts, args.run, args.runs))
        share = f"{len(hits) / len(val):.2%}"
        print(
            f"positions that end a run that occurs, overlaps counted: {len(hits):,} of "
            f"{len(val):,}, {share}"
        )
        if args.out is None:
            return

        kept = counts < args.runs
        if not kept.any():
            raise DataError(
                f"{args.val_file}: all of its {len(kept):,} documents are near-duplicates, so "
                f"{args.out} would be empty; raise --run or --runs, or take another shard"
            )
        with ShardWriter(folder / args.out.name) as writer:
            writer.write(val[np.repeat(kept, lengths)])
        check_new(args.out)  # again, as it may have been made meanwhile
    print(
        f"{args.out}: {kept.sum():,} documents, {writer.num_tokens:,} tokens; "
        f"{(~kept).sum():,} near-duplicates, {len(val) - writer.num_tokens:,} tokens, left out"
    )


# ---- Command line ----


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (0 done, 1 can't write, 2 bad arguments or input)."""
    parser = command.Parser(
        description="Count the validation documents that occur, nearly, in training shards."
    )
    add = parser.add_argument
    add("--train_files", required=True, metavar="PATTERN", help="training shards, a glob in quotes")
    add("--val_file", required=True, metavar="FILE", help="validation shard")
    add("--val_tokens", type=int, metavar="N", help="its first N tokens alone (default all)")
    add("--run", type=int, default=16, metavar="N", help="tokens of a run (default 16)")
    add("--runs", type=int, default=2, metavar="N", help="runs of a near-duplicate (default 2)")
    add("--out", metavar="FILE", help="write a shard without the near-duplicates")
    args = parser.parse_args(argv)
    if "" in (args.train_files, args.val_file, args.out):
        parser.error("an empty name: expected a file")
    if args.val_tokens is not None and args.val_tokens < 1:
        parser.error(f"--val_tokens {args.val_tokens}: expected at least 1")
    if not 1 <= args.run <= MAX_RUN:
        parser.error(f"--run {args.run}: expected 1 to {MAX_RUN}")
    if args.runs < 1:
        parser.error(f"--runs {args.runs}: expected at least 1")
    args.val_file = Path(args.val_file)
    args.out = None if args.out is None else Path(args.out)
    try:
        near_duplicates(args)
    except DataError as error:
        command.report(error)
        return 2
    except MemoryError:
        command.report(DataError("out of memory; free some, or lower --val_tokens"))
        return 1
    except OSError as error:  # a full disk, no permission to write
        command.report(error)
        return 1
    return 0


if __name__ == "__main__":
    command.run(main, "nothing unfinished is left")
