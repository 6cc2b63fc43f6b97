"""The table of prefix tokens, which the baseline and scripts of older records read."""

import importlib
import os
import sys
from types import ModuleType

import numpy as np
import pytest
import tiktoken
from conftest import ROOT

from train_gpt import START_TOKEN

REFERENCE = ROOT / "records" / "reference"
sys.path.insert(0, str(REFERENCE))


@pytest.fixture(scope="module")
def prefix_tool() -> ModuleType:
    return importlib.import_module("prefix_tokens")


@pytest.mark.parametrize("seed", range(3))
def test_prefix_tokens_by_brute_force(prefix_tool, seed):
    """A vocabulary of random byte strings over two letters, in random order: many prefixes."""
    random = np.random.default_rng(seed)
    words = {
        bytes(random.integers(0, 2, random.integers(1, 7)).astype(np.uint8)) for _ in range(60)
    }
    words = sorted(words)
    random.shuffle(words)
    vocabulary = {word: index for index, word in enumerate(words)}
    table = prefix_tool.prefix_tokens(vocabulary)
    assert table.dtype == np.int32
    assert table.shape == (len(words),)
    found = 0
    for index, word in enumerate(words):
        longest = -1
        for other, candidate in enumerate(words):
            begins = len(candidate) < len(word) and word[: len(candidate)] == candidate
            if begins and (longest < 0 or len(candidate) > len(words[longest])):
                longest = other
        assert table[index] == longest
        found += longest >= 0
    assert found > 10


def shipped_table() -> np.ndarray:
    return np.load(REFERENCE / "gpt2_prefix_tokens.npy")


def test_shipped_prefix_table():
    """What is true of it without the vocabulary: single bytes are the ids below 256 and begin
    with nothing; every other token begins with its first byte, so the way there ends with one."""
    table = shipped_table()
    assert table.shape == (50_257,)
    assert table.dtype == np.int32
    assert table.min() == -1
    assert table.max() < START_TOKEN
    assert (table[:256] == -1).all()
    assert table[START_TOKEN] == -1
    assert (table[256:START_TOKEN] >= 0).all()
    ends, hops = np.arange(256, START_TOKEN), 0
    while (ends >= 256).any():
        ends = np.where(ends >= 256, table[ends], ends)
        hops += 1
        assert hops < 130  # no token is longer than 128 bytes
    assert (ends >= 0).all()
    assert hops > 10
    assert len(np.unique(table)) > 5000


def test_shipped_prefix_table_for_tokens_known_by_heart():
    """Some of GPT-2's first merges: 256 is a space and t, 257 a space and a, 258 he, 262 a space
    and the, 284 a space and to, 294 a space and th."""
    table = shipped_table()
    space, h = 220, 71
    assert table[[256, 257, 258, 262, 284, 294]].tolist() == [space, space, h, 294, 256, 256]


def test_table_of_a_small_vocabulary(prefix_tool, tmp_path, monkeypatch, capsys):
    """Special tokens neither have nor are prefix tokens."""
    words = [bytes([i]) for i in range(256)] + [b"<|", b"<|x|>y", b"ab", b"abc"]
    ranks = {word: index for index, word in enumerate(words)}
    encoding = tiktoken.Encoding(
        "small", pat_str=".", mergeable_ranks=ranks, special_tokens={"<|x|>": len(words)}
    )
    monkeypatch.setattr(prefix_tool, "load_gpt2", lambda timeout: encoding)
    path = tmp_path / "new" / "table"  # np.save would add an ending
    assert prefix_tool.main([str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 4 of 261 tokens have a prefix token\n"
    assert np.load(path).tolist() == [-1] * 256 + [ord("<"), 256, ord("a"), 258, -1]
    assert list(path.parent.iterdir()) == [path]


def test_table_that_cannot_be_made(prefix_tool, tmp_path, monkeypatch, capsys):
    def load_gpt2(timeout):
        raise prefix_tool.DataError("no vocabulary")

    monkeypatch.setattr(prefix_tool, "load_gpt2", load_gpt2)
    path = tmp_path / "new" / "table.npy"
    assert prefix_tool.main([str(path)]) == 1
    assert capsys.readouterr().err == "error: no vocabulary\n"
    assert prefix_tool.main([str(tmp_path)]) == 1
    assert "is no regular file" in capsys.readouterr().err
    for arguments in (["--tabel"], ["a", "b"], [""]):
        with pytest.raises(SystemExit) as exit_info:
            prefix_tool.main(arguments)
        assert exit_info.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_shipped_prefix_table_is_that_of_the_vocabulary(prefix_tool, tmp_path):
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary")
    if prefix_tool.main([str(tmp_path / "fresh.npy")]) != 0:
        pytest.skip("tiktoken cannot load GPT-2's vocabulary")
    assert np.array_equal(np.load(tmp_path / "fresh.npy"), shipped_table())
