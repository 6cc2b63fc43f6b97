"""Makes gpt2_tokens.npz: python data/token_table.py [FILE]

GPT-2's vocabulary as it was made, one token after the other, in two arrays:

    single_bytes  (256,) uint8       the byte that each of the first 256 tokens stands for
    merges        (50000, 2) uint16  the two tokens that merge into token 256, 257, …, in this order

The token behind the last merge, 50256, is <|endoftext|>. The table is kept in the repository, as
training reads it and making it needs tiktoken and its vocabulary files.
"""

import command

if __name__ == "__main__":
    command.begin()

from itertools import pairwise
from pathlib import Path

import numpy as np
from shards import DataError, check_replaceable, load_gpt2, staging

GPT2_SECONDS = 60  # how long to wait for the vocabulary


def last_merge(token: bytes, ids: dict[bytes, int]) -> tuple[int, int]:
    """The ids of the two tokens that byte pair encoding merges into this one at last: it joins the
    neighbours whose token has the lowest id, again and again. Raises DataError if there are none.
    """
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        pairs = [ids.get(a + b, ids[token]) for a, b in pairwise(pieces)]
        lowest = min(pairs)
        if lowest >= ids[token]:
            break
        i = pairs.index(lowest)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    if len(pieces) != 2:
        raise DataError(f"token {ids[token]}, {token!r}, is no merge of two earlier tokens")
    left, right = pieces
    return ids[left], ids[right]


def make_table(path: Path) -> str:
    """Write the table; return the line that says what it is. Raises DataError."""
    check_replaceable(path)
    with staging(path.parent) as unfinished:
        encoding = load_gpt2(GPT2_SECONDS)
        count = encoding.n_vocab - len(encoding.special_tokens_set)
        tokens = [encoding.decode_single_token_bytes(i) for i in range(count)]
        ids = {token: i for i, token in enumerate(tokens)}
        table = {
            "single_bytes": np.frombuffer(b"".join(tokens[:256]), np.uint8),
            "merges": np.array([last_merge(token, ids) for token in tokens[256:]], np.uint16),
        }
        with open(unfinished / path.name, "wb") as file:  # by its name numpy may add an ending
            np.savez_compressed(file, **table)
    return f"{path}: {len(table['merges'])} merges of {len(table['single_bytes'])} bytes"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (0 done, 1 not possible, 2 by argparse)."""
    parser = command.Parser(description="Make the table of GPT-2's tokens.")
    parser.add_argument("file", nargs="?", default=Path(__file__).parent / "gpt2_tokens.npz")
    args = parser.parse_args(argv)
    if not Path(args.file).name:
        parser.error(f"{args.file!r}: expected the name of a file")
    try:
        print(make_table(Path(args.file)))
    except (DataError, OSError) as error:
        command.report(error)
        return 1
    return 0


if __name__ == "__main__":
    command.run(main, "nothing unfinished is left")
