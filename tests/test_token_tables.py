"""GPT-2's tokens: the table in data/, and what training makes of it: classes of tokens for hashed
n-grams."""

import importlib
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiktoken
import torch
from conftest import ROOT, cpu_runtime, random_batch, tiny_config, trained_like, write_shard
from test_check import check
from test_train import command, environment, log_of, read_shard, run, write_data

import train_gpt
from train_gpt import (
    START_TOKEN,
    TokenTable,
    Trainer,
    UserError,
    Windows,
    ngram_hash,
    normalized_text,
    read_token_table,
    token_classes,
    validate,
)

sys.path.insert(0, str(ROOT / "data"))

VOCAB = START_TOKEN + 1


@pytest.fixture(scope="module")
def table() -> TokenTable:
    return read_token_table()


@pytest.fixture(scope="module")
def classes() -> list[int]:
    return token_classes(tiny_config()).tolist()


@pytest.fixture(scope="module")
def table_tool() -> ModuleType:
    return importlib.import_module("token_table")


def gpt2() -> tiktoken.Encoding:
    """GPT-2's tokenizer, where its vocabulary is at hand."""
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
    encoding = gpt2()
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


# Classes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (" The", "the"),
        ("THE", "the"),
        ("é", "e"),
        (" É", "e"),
        ("ß", "ß"),
        ("½", "1\N{FRACTION SLASH}2"),
        ("\N{LATIN SMALL LIGATURE FI}", "fi"),
        ("\N{FULLWIDTH LATIN CAPITAL LETTER A}", "a"),
        ("\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}", "i"),
        (" \N{NO-BREAK SPACE}", " "),
        ("\n\n", " "),
        (" \t\r\n ", " "),
        (" a \n b ", "a b"),
        ("'S", "'s"),
        (" --", "--"),
        ("\x0b", "\x0b"),  # a control character; it is no blank
        ("\N{COMBINING LONG STROKE OVERLAY}", ""),
        ("", ""),
        ("日本", "日本"),
        (b"\xc3", ""),
        (b"a\xe2\x80", ""),
        (b"\x99s", ""),
    ],
)
def test_normalized_text(token, text):
    assert normalized_text(token if isinstance(token, bytes) else token.encode()) == text


def test_classes_by_their_definition(table, classes):
    """Every token has the class of the first token of the same text; those without text keep their
    ids. Figures are those of GPT-2's vocabulary."""
    texts = [*map(normalized_text, table.tokens)]
    for token in range(0, START_TOKEN, 7):
        expected = texts.index(texts[token]) if texts[token] else token
        assert classes[token] == expected
    assert classes[START_TOKEN:] == [*range(START_TOKEN, 50_304)]
    assert len(set(classes[:VOCAB])) == 32_980
    assert sum(token != of for token, of in enumerate(classes)) == 17_277
    alone = [token for token, text in enumerate(texts) if not text]
    assert all(classes[token] == token and classes.count(token) == 1 for token in alone)
    assert len(alone) == 350
    assert [classes[of] for of in classes] == classes


def test_classes_of_tokens_known_by_heart(table, classes):
    ids = {token: i for i, token in enumerate(table.tokens)}
    for tokens in (
        ("the", " the", "The", " The", "THE", " THE"),
        (" ", "\n", "\n\n", "\t", "\N{NO-BREAK SPACE}", "\r"),
        ("e", "E", " e", "é", " é", "É", " É"),
        ("½", " ½"),
    ):
        found = {classes[ids[token.encode()]] for token in tokens}
        assert found == {min(ids[token.encode()] for token in tokens)}, tokens
    apart = "the", "he", " ", "'s", "s", ".", "!", "1"
    assert len({classes[ids[token.encode()]] for token in apart}) == len(apart)


def test_classes_do_not_depend_on_pythons_version(table):
    """What Unicode has settled for good is all that the tokens hold."""
    text = "".join(token.decode(errors="ignore") for token in table.tokens)
    assert not [c for c in set(text) if unicodedata.category(c) == "Cn"]


def test_other_vocabulary_has_no_classes(monkeypatch):
    monkeypatch.setattr(train_gpt, "read_token_table", lambda: pytest.fail("it was read"))
    config = tiny_config(vocab_size=50_300)
    assert token_classes(config).tolist() == [*range(50_304)]


# In hashed n-grams -------------------------------------------------------------------------------


@pytest.mark.parametrize("orders", [(1,), (2,), (2, 3, 4)])
def test_hash_is_that_of_the_classes(classes, orders):
    batch, rows = random_batch(3, [40, 1, 23]), 2**20
    tokens = batch.tokens
    tensor = torch.tensor(classes, dtype=torch.int32)
    found = ngram_hash(tokens, orders, rows, 2, tensor)
    assert torch.equal(found, ngram_hash(tensor[tokens.long()], orders, rows, 2))
    assert not torch.equal(found, ngram_hash(tokens, orders, rows, 2))
    same = torch.arange(len(tensor), dtype=torch.int32)
    assert torch.equal(
        ngram_hash(tokens, orders, rows, 2, same), ngram_hash(tokens, orders, rows, 2)
    )


def test_writings_of_a_bigram_share_a_row(table, classes):
    ids = {token.decode(errors="replace"): i for i, token in enumerate(table.tokens)}

    def row(first: str, second: str, **options) -> int:
        tokens = torch.tensor([ids[first], ids[second]], dtype=torch.int32)
        return ngram_hash(tokens, (2,), 2**22, **options)[1, 0].item()

    options = {"classes": torch.tensor(classes, dtype=torch.int32)}
    written = [(" The", " cat"), (" the", " cat"), ("the", " Cat"), ("THE", "cat")]
    assert len({row(*pair, **options) for pair in written}) == 1
    assert len({row(*pair) for pair in written}) == 4
    assert row(" the", " dog", **options) != row(" the", " cat", **options)
    assert row("the", "re", **options) != row("the", " cat", **options)


def test_model_without_classes_is_as_it_was(runtime):
    """Nor does a checkpoint change; with them it has the table."""
    plain, classed = (trained_like(tiny_config(ngram_classes=on), runtime) for on in (False, True))
    assert {*classed.state_dict()} - {*plain.state_dict()} == {"ngrams.classes"}
    batch = random_batch(4, [64])
    found = [model.look_up(batch).ngrams for model in (plain, classed)]
    assert torch.equal(*found)  # until they are read, every token has its own
    classed.ngrams.classes.copy_(token_classes(classed.config))
    other = classed.look_up(batch).ngrams
    assert not torch.equal(found[0], other)
    tokens = classed.ngrams.classes[batch.tokens.long()]
    assert torch.equal(other, plain.look_up(batch._replace(tokens=tokens)).ngrams)


def test_classes_change_the_n_grams_alone(runtime):
    """Not the embeddings, nor what is looked up by exact match."""
    config = tiny_config(ngram_classes=True, match_orders=(1, 2), match_slots=256)
    model = trained_like(config, runtime)
    model.matches.random_(generator=torch.Generator().manual_seed(0))
    batch = random_batch(5, [64])
    before = model.look_up(batch)
    rest = model.ngrams.table.clone()
    model.ngrams.table.zero_()
    match = model.look_up(batch).ngrams
    model.ngrams.classes.copy_(token_classes(config))
    assert torch.equal(model.look_up(batch).ngrams, match)
    model.ngrams.table.copy_(rest)
    after = model.look_up(batch)
    assert torch.equal(before.embedded, after.embedded)
    assert all(map(torch.equal, before.values, after.values))
    assert not torch.equal(before.ngrams, after.ngrams)


def test_gradients_go_to_the_rows_of_the_classes(runtime):
    config = tiny_config(ngram_classes=True)
    model = trained_like(config, runtime)
    model.ngrams.classes.copy_(token_classes(config))
    trainer, batch = Trainer(model, runtime), random_batch(6, [64])
    trainer.micro_step(batch, trainer.schedule.stage(0))
    expected = ngram_hash(batch.tokens, (2,), config.ngram_rows, 1, model.ngrams.classes)
    assert torch.equal(model.ngrams.rows[:64], expected.flatten())


def upper_case(folder: Path) -> Path:
    """Every third letter of the shards in upper case, which is 32 ids below."""
    for path in folder.glob("*.bin"):
        tokens = read_shard(path).copy()
        chosen = (np.arange(len(tokens)) % 3 == 0) & (tokens >= 64) & (tokens < 90)
        tokens[chosen] -= 32
        write_shard(path, tokens)
    return folder


def test_run_and_its_checkpoint(tmp_path, classes):
    """On one rank and on two, which read the table each; the classes go with the weights."""
    losses = []
    for ranks in (1, 2):
        (folder := tmp_path / f"{ranks}").mkdir()
        upper_case(write_data(folder))
        options = {"ngram_classes": "true", "stop_step": 4, "checkpoint": folder / "model.pt"}
        result = run(folder, ranks, **options)
        assert result.returncode == 0, result.stderr
        text, record = log_of(folder)
        assert "\nn-grams of 32,980 classes of the 50,257 tokens\n" in text
        losses.append(record["summary"]["val_loss"])
        saved = torch.load(folder / "model.pt")["weights"]["ngrams.classes"]
        assert saved.tolist() == classes
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    model, config, _ = check.load_checkpoint(train_gpt, str(folder / "model.pt"), "cpu")
    assert model.ngrams.classes.tolist() == classes
    windows = Windows(config.stages[0].window_short, config.stages[0].window_long)
    scored = model, config, cpu_runtime(), config.val_tokens, windows
    assert validate(*scored) == pytest.approx(losses[1], abs=1e-5)
    model.ngrams.classes.copy_(torch.arange(len(classes)))
    assert validate(*scored) != pytest.approx(losses[1], abs=1e-4)


def test_run_without_the_table_ends_in_one_line(tmp_path):
    """A copy of the script, in a folder without it."""
    folder = write_data(tmp_path)
    script = folder / "train_gpt.py"
    script.write_bytes((ROOT / "train_gpt.py").read_bytes())
    result = subprocess.run(
        command(folder, 1, script, ngram_classes="true", stop_step=2),
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
