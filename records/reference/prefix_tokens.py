"""Makes gpt2_prefix_tokens.npy: python records/reference/prefix_tokens.py [FILE]

For every token id the id of its prefix token: the longest entry of GPT-2's vocabulary that is a
proper prefix of the token's bytes, -1 where there is none. int32, shape (50257,). The baseline
beside this file trains on it too. It is kept in the repository because making it needs tiktoken and
its vocabulary files; data/ has a link to it, where the scripts of records up to 28 November 2026
look for it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
import command

if __name__ == "__main__":
    command.begin()

import numpy as np
from shards import DataError, check_replaceable, load_gpt2, staging

GPT2_SECONDS = 60  # how long to wait for the vocabulary


def prefix_tokens(vocabulary: dict[bytes, int]) -> np.ndarray:
    """vocabulary: token bytes to id, the ids 0 to n - 1. Returns prefix ids, int32 (n,)."""
    table = np.full(len(vocabulary), -1, dtype=np.int32)
    for token, index in vocabulary.items():
        prefixes = (token[:length] for length in range(len(token) - 1, 0, -1))
        table[index] = next((vocabulary[p] for p in prefixes if p in vocabulary), -1)
    return table


def make_table(path: Path) -> str:
    """Write the table; return the line that says what it is. Raises DataError."""
    check_replaceable(path)
    with staging(path.parent) as unfinished:
        encoding = load_gpt2(GPT2_SECONDS)
        special = {token.encode() for token in encoding.special_tokens_set}
        tokens = {encoding.decode_single_token_bytes(i): i for i in range(encoding.n_vocab)}
        table = np.full(encoding.n_vocab, -1, dtype=np.int32)
        ordinary = {token: i for token, i in tokens.items() if token not in special}
        table[: len(ordinary)] = prefix_tokens(ordinary)
        with open(unfinished / path.name, "wb") as file:  # by its name np.save may add an ending
            np.save(file, table)
    return f"{path}: {(table >= 0).sum()} of {len(table)} tokens have a prefix token"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (0 done, 1 not possible, 2 by argparse)."""
    parser = command.Parser(description="Make the table of prefix tokens.")
    parser.add_argument("file", nargs="?", default=Path(__file__).parent / "gpt2_prefix_tokens.npy")
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
