"""GPT-2's tokens: the table in data/, and the pairs of tokens that validation leaves out."""

import gc
import hashlib
import importlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import regex
import tiktoken
import torch
from conftest import ROOT, random_batch, tiny_config, trained_like, write_shard
from test_train import command, environment, fork, letters, log_of, read_shard, write_data
from torch import Tensor

import train_gpt
from train_gpt import (
    FIRST_KINDS,
    SEAMS,
    START_TOKEN,
    Config,
    PairFinder,
    TokenTable,
    UserError,
    Windows,
    check_config,
    expand,
    first_impossible,
    impossible_pairs,
    next_token_loss,
    pieces_at_edge,
    read_token_table,
    token_edges,
)

sys.path.insert(0, str(ROOT / "data"))

VOCAB = START_TOKEN + 1


@pytest.fixture(scope="module")
def table() -> TokenTable:
    return read_token_table()


@pytest.fixture(scope="module")
def table_tool() -> ModuleType:
    return importlib.import_module("token_table")


def downloaded_gpt2() -> tiktoken.Encoding:
    """GPT-2's tokenizer by tiktoken, where its vocabulary is at hand."""
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # noqa: BLE001 (whatever network and cache make it raise)
        pytest.skip(f"tiktoken cannot load GPT-2's vocabulary: {error}")


# The table ---------------------------------------------------------------------------------------


def test_table_has_tokens_known_by_heart(table):
    """Some of GPT-2's first merges, and what is true of any vocabulary."""
    first = [b" t", b" a", b"he", b"in", b"re", b"on", b" the"]
    assert table.tokens[256:263] == first
    assert table.tokens[0] == b"!" and table.tokens[220] == b" " and table.tokens[198] == b"\n"
    assert len(table.tokens) == START_TOKEN == len(set(table.tokens))
    assert sorted(table.tokens[:256]) == [bytes([byte]) for byte in range(256)]
    assert max(map(len, table.tokens)) == 128


def test_table_is_that_of_tiktoken(table, table_tool, tmp_path, capsys):
    encoding = downloaded_gpt2()
    assert table.tokens == [encoding.decode_single_token_bytes(i) for i in range(START_TOKEN)]
    assert table_tool.main([str(tmp_path / "fresh")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'fresh'}: 50000 merges of 256 bytes\n"
    shipped = np.load(ROOT / train_gpt.GPT2_TOKENS)
    with np.load(tmp_path / "fresh") as fresh:
        for name in ("single_bytes", "merges"):
            assert np.array_equal(fresh[name], shipped[name])


def small_vocabulary(*words: bytes) -> tiktoken.Encoding:
    """The bytes from 255 down, these words, and a special token."""
    tokens = [*(bytes([255 - i]) for i in range(256)), *words]
    ranks = {token: i for i, token in enumerate(tokens)}
    special = {"<|x|>": len(tokens)}
    return tiktoken.Encoding("small", pat_str=".", mergeable_ranks=ranks, special_tokens=special)


def test_table_of_a_small_vocabulary(table_tool, tmp_path, monkeypatch, capsys):
    """abcd is abc and d, as abc comes before cd; bcd is b and cd, as there is no bc."""
    encoding = small_vocabulary(b"ab", b"abc", b"cd", b"abcd", b"bcd")
    monkeypatch.setattr(table_tool, "load_gpt2", lambda timeout: encoding)
    path = tmp_path / "new" / "table"  # numpy would add an ending
    assert table_tool.main([str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 5 merges of 256 bytes\n"
    a, b, c, d = (255 - ord(letter) for letter in "abcd")
    with np.load(path) as made:
        assert made["single_bytes"].tolist() == [*range(255, -1, -1)]
        assert made["merges"].tolist() == [[a, b], [256, c], [c, d], [257, d], [b, 258]]
    assert [*path.parent.iterdir()] == [path]


def test_table_of_no_byte_pair_encoding(table_tool, tmp_path, monkeypatch, capsys):
    encoding = small_vocabulary(b"xy", b"abc")
    monkeypatch.setattr(table_tool, "load_gpt2", lambda timeout: encoding)
    assert table_tool.main([str(tmp_path / "new" / "table")]) == 1
    message = "error: token 257, b'abc', is no merge of two earlier tokens\n"
    assert capsys.readouterr().err == message
    assert [*tmp_path.iterdir()] == []


def test_table_that_cannot_be_made(table_tool, tmp_path, monkeypatch, capsys):
    def load_gpt2(timeout):
        raise table_tool.DataError("no vocabulary")

    monkeypatch.setattr(table_tool, "load_gpt2", load_gpt2)
    assert table_tool.main([str(tmp_path / "new" / "table.npz")]) == 1
    assert capsys.readouterr().err == "error: no vocabulary\n"
    assert table_tool.main([str(tmp_path)]) == 1
    assert "is no regular file" in capsys.readouterr().err
    for arguments in (["--tabel"], ["a", "b"], [""]):
        with pytest.raises(SystemExit) as exit_info:
            table_tool.main(arguments)
        assert exit_info.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def torn_tables() -> dict[str, bytes]:
    whole = (ROOT / train_gpt.GPT2_TOKENS).read_bytes()
    return {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "text": b"no such file\n",
        "changed": whole[:90_000] + bytes([whole[90_000] ^ 1]) + whole[90_001:],
    }


@pytest.mark.parametrize("how", [None, *torn_tables()])
def test_torn_table_ends_in_one_line(how, tmp_path, monkeypatch):
    """It is named by its path."""
    path = tmp_path / train_gpt.GPT2_TOKENS
    path.parent.mkdir()
    if how is not None:
        path.write_bytes(torn_tables()[how])
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / "train_gpt.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        read_token_table()
    message = str(error.value)
    assert "data/gpt2_tokens.npz: cannot be read (" in message
    assert message.endswith("make it again with data/token_table.py")
    assert "\n" not in message


@pytest.mark.parametrize(
    "change",
    [
        {"merges": np.zeros((50_000, 3), np.uint16)},
        {"merges": np.arange(2 * 50_000, dtype=np.int64).reshape(-1, 2)},
        {"merges": np.full((50_000, 2), -1)},
        {"single_bytes": np.zeros(256, np.uint8)},
        {"single_bytes": np.arange(255, dtype=np.uint8)},
    ],
)
def test_other_table_ends_in_one_line(change, tmp_path, monkeypatch):
    path = tmp_path / train_gpt.GPT2_TOKENS
    path.parent.mkdir()
    with np.load(ROOT / train_gpt.GPT2_TOKENS) as shipped:
        np.savez(path, **{**shipped, **change})
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / "train_gpt.py"))
    with pytest.raises(UserError, match=r"gpt2_tokens\.npz: is not the table of GPT-2's tokens: "):
        read_token_table()


def test_copy_of_the_script_finds_the_table(table, tmp_path, monkeypatch):
    """In a folder of the repository by itself, elsewhere in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "__file__", str(ROOT / "records" / "name" / "train_gpt.py"))
    assert read_token_table().tokens == table.tokens
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / "train_gpt.py"))
    monkeypatch.chdir(ROOT)
    assert read_token_table().tokens == table.tokens


def test_run_without_the_table_ends_in_one_line(tmp_path):
    """A copy of the script, in a folder without it."""
    folder = write_data(tmp_path)
    script = folder / "train_gpt.py"
    script.write_bytes((ROOT / "train_gpt.py").read_bytes())
    result = subprocess.run(
        command(folder, 1, script, canonical_mask="true", stop_step=2),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("error: data/gpt2_tokens.npz: cannot be read (No such file")


# Impossible pairs --------------------------------------------------------------------------------

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module")
def gpt2(table) -> tiktoken.Encoding:
    """GPT-2's tokenizer, made of the table, which test_table_is_that_of_tiktoken judges."""
    ranks = {token: i for i, token in enumerate(table.tokens)}
    special = {"<|endoftext|>": START_TOKEN}
    return tiktoken.Encoding("g", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def pairs(table) -> np.ndarray:
    return impossible_pairs(table, 50_304)


@pytest.fixture(scope="module")
def kinds(table) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The tokens by their first character, a column of SEAMS, and by their last one, a row."""
    first, last = zip(*map(token_edges, table.tokens))
    by_first = {kind: np.flatnonzero(np.array(first) == kind) for kind in FIRST_KINDS}
    return by_first, {kind: np.flatnonzero(np.array(last) == kind) for kind in SEAMS}


def is_impossible(pairs: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return pairs[first, second // 8] >> (second % 8).astype(np.uint8) & 1 > 0


def is_impossible_text(pairs: np.ndarray, tokens: list[int]) -> list[tuple[int, int]]:
    """The impossible pairs in it."""
    array = np.array(tokens)
    found = is_impossible(pairs, array[:-1], array[1:])
    return [*zip(array[:-1][found].tolist(), array[1:][found].tolist())]


def texts() -> dict[str, list[str]]:
    """Of many kinds."""
    sys.path.insert(0, str(ROOT / "data"))
    sample = importlib.import_module("sample")
    library = Path(os.__file__).parent
    random = np.random.default_rng(0)
    marks = [
        "'",
        "'s",
        "'re",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        ".",
        "...",
        "-",
        '"',
        "\xa0",
        "(",
        "''",
    ]
    words = ["it", "It", "S", "s", "they", "42", "é", "½", "日本", "e\u0301", "LL", "\u2019s", "ve"]
    pieces = np.array(marks + words)
    alphabets = [(0, 0x80), (0, 0x250), (0x20, 0x3000), (0x1F300, 0x1FA00), (0x4E00, 0x9000)]
    alphabets.append((0xE000, 0x110000))
    return {
        "prose": sample.topics(),
        "code": [path.read_text("utf-8") for path in sorted(library.glob("*.py"))],
        "pieces": ["".join(random.choice(pieces, 200)) for _ in range(1000)],
        "characters": [
            "".join(map(chr, random.integers(begin, end, 300)))
            for begin, end in alphabets
            for _ in range(100)
        ],
        "mixed characters": [
            "".join(
                chr(random.integers(*alphabets[random.integers(len(alphabets))])) for _ in "x" * 99
            )
            for _ in range(500)
        ],
    }


@pytest.mark.parametrize("kind", ["prose", "code", "pieces", "characters", "mixed characters"])
def test_no_text_has_an_impossible_pair(pairs, gpt2, kind):
    count = 0
    for text in texts()[kind]:
        tokens = gpt2.encode_ordinary(text)
        assert not is_impossible_text(pairs, [START_TOKEN, *tokens, START_TOKEN])
        count += len(tokens)
    assert count > 50_000


def test_no_text_of_random_tokens_has_an_impossible_pair(pairs, gpt2, table):
    """Their bytes, as far as they are text, cut anew, in which most tokens are rare ones."""
    random, seen = np.random.default_rng(1), set()
    for _ in range(2000):
        drawn = b"".join(table.tokens[i] for i in random.integers(0, START_TOKEN, 100))
        tokens = gpt2.encode_ordinary(drawn.decode(errors="ignore"))
        assert not is_impossible_text(pairs, tokens)
        seen.update(tokens)
    assert len(seen) > 45_000


@pytest.mark.parametrize(
    ("last", "first"),
    [
        (last, first)
        for last, row in SEAMS.items()
        for first, seam in zip(FIRST_KINDS, row)
        if seam == "+"
    ],
)
def test_inside_of_pre_tokens_merges_decide(pairs, gpt2, table, kinds, last, first):
    """A pair is impossible if, and only if, its bytes are cut in another way."""
    random = np.random.default_rng(2)
    before, behind = kinds[1][last], kinds[0][first]
    before, behind = random.choice(before, 3000), random.choice(behind, 3000)
    found = is_impossible(pairs, before, behind)
    for a, b, impossible in zip(before.tolist(), behind.tolist(), found.tolist()):
        tokens = gpt2._encode_single_piece(table.tokens[a] + table.tokens[b])
        assert (tokens != [a, b]) == impossible, (table.tokens[a], table.tokens[b])
    assert 10 < found.sum() < 3000


def test_frequent_pairs_known_by_heart(pairs, table):
    ids = {token.decode(errors="replace"): i for i, token in enumerate(table.tokens)}

    def impossible(first: str, second: str) -> bool:
        return bool(is_impossible(pairs, np.array(ids[first]), np.array(ids[second])))

    never = [
        ("th", "e"),
        (" ", "the"),
        ("!", "'s"),
        (" ", "'s"),
        ("1", "2"),
        ("a", "b"),
        (".", "."),
    ]
    may = [("it", "'s"), ("'s", "t"), ("\n", "\n"), (" ", " the"), ("\n", "The"), (" the", " cat")]
    may += [("'", "s"), ("1", "st"), (".", "The"), ("\n", "'s"), ("the", "the")]
    assert [pair for pair in never if not impossible(*pair)] == []
    assert [pair for pair in may if impossible(*pair)] == []


def contexts(text: str) -> Iterator[str]:
    for before in ("", " ", "a", "1", "!", "'", "\n", "é", " '"):
        for behind in ("", " ", "a", "1", "!", "'s", "\n", "é"):
            yield before + text + behind


def test_border_of_pre_tokens_is_nowhere_where_none_can_be(gpt2, table, kinds):
    """Wherever two tokens that are text stand behind one another, the pattern finds a border at
    their seam only if SEAMS has a ? for it; if it has a - it never cuts tokens like that."""
    random, borders = np.random.default_rng(3), 0
    for last, row in SEAMS.items():
        for first, seam in zip(FIRST_KINDS, row):
            if last in ("open", "unknown") or first == "inside":
                continue
            for _ in range(40):
                a, b = random.choice(kinds[1][last]), random.choice(kinds[0][first])
                try:
                    before, behind = (table.tokens[i].decode() for i in (a, b))
                except UnicodeDecodeError:
                    continue
                for text in contexts(before + behind):
                    at = text.index(before + behind) + len(before)
                    border = at in {end for *_, end in pre_tokens(text)}
                    tokens = gpt2.encode_ordinary(text)
                    together = (a, b) in itertools.pairwise(tokens)
                    assert not (border and together and seam != "?"), (before, behind, text)
                    assert not (together and seam == "-"), (before, behind, text)
                    borders += border
    assert borders > 10_000


def pre_tokens(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in regex.finditer(PATTERN, text)]


def test_everything_may_stand_around_the_start_token(pairs):
    """And nothing is said of the padding of the tables; else some part is left out everywhere."""
    assert not pairs[START_TOKEN:].any()
    unpacked = np.unpackbits(pairs[:START_TOKEN:50], axis=1, bitorder="little")
    assert not unpacked[:, START_TOKEN:].any()
    assert 0.03 < unpacked.mean() < 0.04


def test_pairs_are_the_same_in_every_process(pairs):
    code = "import hashlib, train_gpt as t\n"
    code += "pairs = t.impossible_pairs(t.read_token_table(), 50_304)\n"
    code += "print(hashlib.sha256(pairs).hexdigest())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment() | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert other.stdout.strip() == hashlib.sha256(pairs).hexdigest()


def test_pieces_at_edge_and_expand():
    """Token 3 is 1 2, token 4 is 0 3."""
    left, right = np.array([-1, -1, -1, 1, 0]), np.array([-1, -1, -1, 2, 3])
    found = {(*map(int, row),) for row in zip(*pieces_at_edge(right))}
    whole = {(i, i, 5) for i in range(5)}
    assert found == whole | {(3, 2, 3), (4, 3, 4), (4, 2, 3)}
    assert {(*map(int, row),) for row in zip(*pieces_at_edge(left))} == whole | {
        (3, 1, 3),
        (4, 0, 4),
    }
    numbers, which = expand(np.array([3, 9, 7]), np.array([5, 9, 8]))
    assert (numbers.tolist(), which.tolist()) == ([3, 4, 7], [0, 0, 2])


# In the loss -------------------------------------------------------------------------------------


@pytest.fixture
def masked(tmp_path) -> Config:
    """A config with validation text that GPT-2's tokenizer can have made."""
    write_shard(tmp_path / "val.bin", [START_TOKEN] * 9)
    return tiny_config(canonical_mask=True, val_file=str(tmp_path / "val.bin"))


def test_finder_works_in_another_process(table, pairs, masked):
    finder = PairFinder(table, masked, 8)
    finder.check()  # nothing is known yet
    finder.start()
    found = torch.ones(50_304, 6288, dtype=torch.uint8)
    assert 0.1 < finder.fill(found) < 300
    finder.check()
    assert np.array_equal(found.numpy(), pairs)
    with pytest.raises(ChildProcessError):  # nobody is left to wait for
        os.waitpid(finder.process, 0)


@pytest.mark.parametrize("started", [False, True])
def test_finder_that_was_ended(table, masked, started):
    finder = PairFinder(table, masked, 8)
    if started:
        finder.start()
    os.kill(finder.process, signal.SIGKILL)
    time.sleep(0.2)
    finder.start()
    found = torch.zeros(50_304, 6288, dtype=torch.uint8)
    message = (
        r"tokens was ended by signal 9 \(Killed\): free some memory, or pass --canonical_mask f"
    )
    with pytest.raises(UserError, match=message):
        finder.fill(found)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda *_: os._exit(3), r"tokens was ended by exit code 3: free some memory, or pass --"),
        (
            lambda *_: [0] * 2**60,
            r"tokens failed with MemoryError\(\): free some memory, or pass --",
        ),
        (lambda *_: 1 // 0, r"tokens failed with ZeroDivisionError\(.* by zero'\): free s"),
    ],
    ids=["end", "lack of memory", "fault"],
)
def test_finder_that_fails_says_how(table, masked, monkeypatch, end, message):
    monkeypatch.setattr(train_gpt, "impossible_pairs", end)
    finder = PairFinder(table, masked, 8)
    finder.start()
    with pytest.raises(UserError, match=message):
        finder.check(wait=True)


class EndsItsFork:
    """An object in a reference cycle, so that only the garbage collector destroys it. Destroyed in
    another process than the one that made it, it ends that one, as those of CUDA do."""

    def __init__(self):
        self.cycle, self.made_by = self, os.getpid()

    def __del__(self):
        if os.getpid() != self.made_by:
            os.kill(os.getpid(), signal.SIGABRT)


def test_finder_destroys_no_garbage_of_its_parent(table, pairs, masked, monkeypatch):
    """What a failed train() leaves behind is such garbage, if it was not collected until the fork.
    What the finder makes here would have any collector run."""

    def find(table: TokenTable, vocab: int) -> np.ndarray:
        assert len([[] for _ in range(10_000)]) == 10_000
        return pairs

    def fork() -> int:
        """With garbage that nobody has collected."""
        enabled = gc.isenabled()
        gc.disable()
        EndsItsFork()
        process = os_fork()
        if enabled:
            gc.enable()
        return process

    os_fork, threshold = os.fork, gc.get_threshold()
    monkeypatch.setattr(train_gpt, "impossible_pairs", find)
    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(gc, "freeze", lambda: None)  # or conftest.py's would hide the garbage
    assert gc.isenabled()
    gc.set_threshold(1)
    try:
        finder = PairFinder(table, masked, 8)
        assert gc.isenabled()  # here it goes on
        finder.start()
        finder.check(wait=True)
    finally:
        gc.set_threshold(*threshold)
    assert np.array_equal(finder.pairs, pairs)


@pytest.mark.parametrize("place", [0, 7, 2**20 - 1, 2**20, 2**20 + 5])
def test_first_impossible_pair(pairs, place):
    """Wherever it is, and not the second one."""
    bits = np.unpackbits(pairs[:300], axis=1, bitorder="little")
    first, second = map(int, np.argwhere(bits)[-1])
    tokens = np.full(2**20 + 9, START_TOKEN, np.uint16)
    assert first_impossible(pairs, tokens) == ()
    tokens[place : place + 2] = first, second
    tokens[-2:] = first, second
    assert first_impossible(pairs, tokens) == (first, second, place)
    assert first_impossible(pairs, tokens[: place + 1]) == ()


def test_finder_ends_with_whoever_made_it(table, masked):
    """Without a start, and without a signal."""
    finder = PairFinder(table, masked, 8)
    process = finder.process
    assert os.waitpid(process, os.WNOHANG) == (0, 0)
    del finder
    until = time.monotonic() + 20
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        assert time.monotonic() < until
        time.sleep(0.05)


def random_mask(vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    """(vocab, vocab) bool, and packed; the first token and the copy entry, which is the last, may
    always follow."""
    mask = torch.rand(vocab, vocab, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[:, [0, -1]] = False
    return mask, torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))


def test_masked_loss_is_that_of_the_definition():
    """Over more tokens than are computed at once, some without a target. A third of the pointer's
    attention is on the target, and a third on the sink."""
    mask, packed = random_mask(64, 0)
    generator = torch.Generator().manual_seed(1)
    x, head = (torch.randn(n, 16, generator=generator) for n in (4100, 64))
    tokens = torch.randint(63, (4100,), generator=generator, dtype=torch.int32)
    can_follow = (~mask[tokens.long(), :-1]).float()
    targets = torch.multinomial(can_follow, 1, generator=generator)[:, 0]
    targets[::7] = train_gpt.IGNORED_TARGET
    shares = train_gpt.PointerShares(*torch.full((2, 4100), 1 / 3))
    logits = train_gpt.softcap(x.double() @ head.mT.double())
    logits[mask[tokens.long()]] = -torch.inf
    p = logits.softmax(1)
    (of_target,), copy = p.gather(1, targets.clamp_min(0)[:, None]).unbind(1), p[:, -1]
    losses = -(of_target / (1 - copy) * (1 - copy * 2 / 3) + copy / 3).log()
    expected = losses[targets >= 0].sum()
    inputs = x, head, torch.nn.functional.pad(targets[:, None], (0, 1), value=63), shares
    found = next_token_loss(*inputs, tokens, packed)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert found < next_token_loss(*inputs) - 100
    none = torch.zeros_like(packed)
    assert torch.equal(next_token_loss(*inputs, tokens, none), next_token_loss(*inputs))


def test_probabilities_of_what_can_follow_sum_to_one():
    """With all of the pointer's attention on the sink."""
    mask, packed = random_mask(64, 2)
    generator = torch.Generator().manual_seed(3)
    x, head = (torch.randn(n, 16, generator=generator) for n in (1, 64))
    shares = train_gpt.PointerShares(torch.zeros(1), torch.ones(1))
    for token in range(0, 63, 5):
        tokens = torch.tensor([token], dtype=torch.int32)
        losses = torch.stack(
            [
                next_token_loss(x, head, torch.tensor([[target, 63]]), shares, tokens, packed)
                for target in range(63)
            ]
        )
        assert torch.equal(losses.isinf(), mask[token, :-1]) and 10 < mask[token].sum() < 50
        assert (-losses).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_model_leaves_out_impossible_tokens(runtime, pairs):
    """Whichever token is the target; without the option it is as it was. Every token is a document,
    so that the pointer finds nothing to copy, and the copy entry alone is left out for it."""
    plain, masked = (trained_like(tiny_config(canonical_mask=on), runtime) for on in (False, True))
    assert plain.impossible is None and {*plain.state_dict()} == {*masked.state_dict()}
    batch, windows = random_batch(7, [64]), Windows(8, 24)
    batch = batch._replace(cu_seqlens=torch.arange(65, dtype=torch.int32))
    assert torch.equal(*(m.validation_loss(batch, windows) for m in (plain, masked)))
    masked.impossible.copy_(torch.from_numpy(pairs))
    with torch.no_grad():
        logits = train_gpt.softcap(masked.hidden(batch, windows) @ masked.head.mT)
        left_out = np.unpackbits(pairs[batch.tokens.numpy()], axis=1, bitorder="little")
        logits[torch.from_numpy(left_out) > 0] = logits[:, VOCAB] = -torch.inf
        for shift in (0, 1, 2, 3):
            targets = logits.topk(4).indices[:, shift]
            found = masked.validation_loss(batch._replace(targets=targets), windows)
            expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            torch.testing.assert_close(found, expected)
            assert found < plain.validation_loss(batch._replace(targets=targets), windows)


def test_mask_is_for_gpt2s_vocabulary_alone():
    check_config(tiny_config(canonical_mask=True), 1)
    message = "--canonical_mask true is for the 50257 tokens of GPT-2, not for --vocab_size 50300: "
    with pytest.raises(UserError, match=message):
        check_config(tiny_config(canonical_mask=True, vocab_size=50_300), 1)


def write_texts(folder: Path, gpt2: tiktoken.Encoding) -> Path:
    """Shards of tokenized prose."""
    folder.mkdir()
    tokens = []
    for text in texts()["prose"]:
        tokens += [START_TOKEN, *gpt2.encode_ordinary(text[:300])]
    write_shard(folder / "val.bin", tokens[:1001])
    write_shard(folder / "train_0.bin", tokens[1001:9001])
    return folder


@pytest.fixture
def known_pairs(pairs) -> Callable[[], None]:
    """Has a fork know the pairs that it would find, which takes longer than the rest of it."""

    def know() -> None:
        train_gpt.impossible_pairs = lambda table, vocab: pairs

    return know


def test_run_with_the_mask(tmp_path, gpt2, known_pairs):
    """The rest of the run is the same; on two ranks the loss is that of one."""
    losses, trained = {}, {}
    for name, ranks, on in (("plain", 1, "false"), ("one", 1, "true"), ("two", 2, "true")):
        folder = write_texts(tmp_path / name, gpt2)
        options = {"canonical_mask": on, "stop_step": 3, "val_every": 2}
        if name == "two":  # "one" finds the pairs itself
            options["prepare"] = known_pairs
        result = fork(folder, ranks, **options)
        assert result.returncode == 0, result.stderr
        text, record = log_of(folder)
        found = r"\nfound the impossible pairs of tokens in \d+\.\d s of training\n"
        assert len(re.findall(found, text)) == (on == "true")
        losses[name] = [row["val_loss"] for row in record["validations"]]
        trained[name] = [row["train_loss"] for row in record["steps"]]
    assert trained["plain"] == trained["one"]
    for plain, one, two in zip(*losses.values(), strict=True):
        assert plain - 0.1 < one < plain - 0.01  # an untrained model: all tokens are as likely
        assert two == pytest.approx(one, abs=2e-3)


def test_text_of_another_tokenizer_ends_in_one_line(tmp_path, known_pairs):
    """Letters as byte tokens, which GPT-2's would have merged; the message names the first pair,
    and the run does not wait for its validation."""
    folder = write_data(tmp_path)
    options = {"canonical_mask": "true", "val_every": 0, "num_steps": 600, "repeat_data": "true"}
    result = fork(folder, **options, prepare=known_pairs)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line and "step" not in line]
    tokens = read_shard(folder / "val.bin")
    assert len(lines) == 1
    found = re.fullmatch(
        rf"error: {folder}/val.bin: token (\d+) and behind it (\d+), at position (\d+), are no "
        r"tokens that .*: tokenize its text by data/tokenize_text.py, or, if its tokens are single "
        r"bytes or another tokenizer's, pass --canonical_mask false",
        lines[0],
    )
    first, second, position = map(int, found.groups())
    assert [first, second] == tokens[position : position + 2].tolist()
    assert len(log_of(folder)[1]["steps"]) < 600


def test_training_text_of_another_tokenizer_loses_no_trained_run(tmp_path, gpt2, known_pairs):
    """Letters as byte tokens to train on, GPT-2's to validate on: what the mask calls impossible
    has no part in the choice of weights, which the log says."""
    folder = write_texts(tmp_path / "run", gpt2)
    write_shard(folder / "train_0.bin", letters(1, 8000))
    options = {"canonical_mask": "true", "average_shares": "0.05:0.2", "val_every": 0}
    result = fork(folder, **options, prepare=known_pairs)
    assert result.returncode == 0, result.stderr
    text, record = log_of(folder)
    text = text.split("=" * 100)[-1]
    found = re.search(
        r"\nwarning: (\d+) of 128 tokens of unread training text are not scored, as GPT-2's "
        r"tokenizer never makes them behind the token before: tokenize the text of --train_files "
        r"by data/tokenize_text.py, or pass --canonical_mask false\n",
        text,
    )
    assert 0 < int(found[1]) < 128
    assert record["averages"]["tokens"] == 128 - int(found[1])
    losses = [row["loss"] for row in record["averages"]["blends"]]
    assert np.isfinite(losses).all() and len({*losses}) > 1
    assert np.isfinite(record["summary"]["val_loss"])
