"""Makes gpt2_prefix_tokens.npy from GPT-2's vocabulary: python data/prefix_tokens.py [FILE]

For every token id the id of its prefix token: the longest vocabulary entry that is a proper prefix
of the token's bytes, -1 where there is none. int32, shape (50257,). Scripts of records up to
2026-11-23 train on it too and read this table; it is kept in the repository because making it needs
tiktoken and its vocabulary files.
"""

import sys
from pathlib import Path

import numpy as np


def prefix_tokens(vocabulary: dict[bytes, int]) -> np.ndarray:
    """vocabulary: token bytes to id, the ids 0 to n - 1. Returns prefix ids, int32 (n,)."""
    table = np.full(len(vocabulary), -1, dtype=np.int32)
    for token, index in vocabulary.items():
        prefixes = (token[:length] for length in range(len(token) - 1, 0, -1))
        table[index] = next((vocabulary[p] for p in prefixes if p in vocabulary), -1)
    return table


def main() -> int:
    path = Path(
        sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "gpt2_prefix_tokens.npy"
    )
    try:
        import tiktoken

        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # noqa: BLE001 (whatever the missing network makes it raise)
        print(f"error: tiktoken cannot get the GPT-2 vocabulary ({error})", file=sys.stderr)
        return 1
    special = {token.encode() for token in encoding.special_tokens_set}
    tokens = {encoding.decode_single_token_bytes(i): i for i in range(encoding.n_vocab)}
    table = np.full(encoding.n_vocab, -1, dtype=np.int32)
    ordinary = {token: i for token, i in tokens.items() if token not in special}
    table[: len(ordinary)] = prefix_tokens(ordinary)
    np.save(path, table)
    print(f"{path}: {(table >= 0).sum()} of {len(table)} tokens have a prefix token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
