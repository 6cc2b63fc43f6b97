"""The table of prefix tokens, which scripts of older records read."""

import importlib
import os
import sys
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT

from train_gpt import START_TOKEN

sys.path.insert(0, str(ROOT / "data"))


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
    return np.load(ROOT / "data" / "gpt2_prefix_tokens.npy")


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


def test_shipped_prefix_table_is_that_of_the_vocabulary(prefix_tool, tmp_path, monkeypatch):
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary")
    monkeypatch.setattr(sys, "argv", ["prefix_tokens.py", str(tmp_path / "fresh.npy")])
    if prefix_tool.main() != 0:
        pytest.skip("tiktoken cannot load GPT-2's vocabulary")
    assert np.array_equal(np.load(tmp_path / "fresh.npy"), shipped_table())
