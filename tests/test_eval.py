"""records/hellaswag.py on questions made here, with a model that is rigged to say the alphabet."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, cpu_runtime, tiny_config, trained_like, write_shard
from test_train import BYTE_TO_ID, environment

import train_gpt
from train_gpt import GPT, START_TOKEN, save_checkpoint

sys.path.insert(0, str(ROOT / "records"))
import hellaswag

LETTERS = "abcdefghijklmnop"
QUESTIONS = [
    {"ctx": "abc", "endings": ["defgh", "hgfed", "dddee", "acegi"], "label": 0},
    {"ctx": "mno", "endings": ["pnljh", "ppppp", "fghij", "cbapo"], "label": "2"},
    # every letter costs some nats: in sum the two wrong ones cost less than the twelve right ones
    {"ctx": "a", "endings": ["ba", "abcdefghijkl", "lkjihgfedcba", "aaaaaaaaaaaa"], "label": 1},
    {"ctx": "a", "endings": ["bcdef", "fedcb", "aabba", "mlkji"], "label": 3},  # not so
]
ACCURACY, ACC_NORM = "accuracy 0.5000 ± 0.2500", "acc_norm 0.7500 ± 0.2165"


def checkpoint_of(model: GPT, folder: Path, tokens: list[int]) -> Path:
    """As a run on these training tokens saves it."""
    write_shard(folder / "train.bin", tokens)
    files = {"train_files": str(folder / "train.bin"), "checkpoint": str(folder / "model.pt")}
    save_checkpoint(model, dataclasses.replace(model.config, **files), cpu_runtime())
    return folder / "model.pt"


@pytest.fixture
def alphabet(tmp_path: Path) -> Path:
    """A checkpoint whose model finds the letter behind this one likeliest, and all others alike:
    embeddings are one-hot, attention adds nothing to them, the last MLP the next letter's."""
    model = GPT(tiny_config(val_row_tokens=256), cpu_runtime())
    ids = [int(BYTE_TO_ID[ord(letter)]) for letter in LETTERS]
    with torch.no_grad():
        for table in (model.attention_bank, model.mlp_bank, model.value_embed, model.head):
            table.zero_()
        for i, token in enumerate(ids):
            model.head[token, i] = 100
            model.mlp_bank[4, i, i] = 1
            model.mlp_bank[9, i, i + 1] = 1e4
    return checkpoint_of(model, tmp_path, [START_TOKEN, *ids])


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n", encoding="utf-8")
    return path


def test_right_answers_are_counted(alphabet, questions):
    result = subprocess.run(
        [sys.executable, "records/hellaswag.py", alphabet, "--data", questions],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    expected = f"HellaSwag, 4 of 10,042 questions: {ACCURACY}, {ACC_NORM} (± standard error)\n"
    assert result.stdout == expected


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is not loaded again: it would register its operations anew."""
    monkeypatch.setattr(hellaswag, "load_script", lambda path: train_gpt)


def test_parquet_and_limit(loaded, alphabet, tmp_path, capsys):
    import pyarrow
    from pyarrow import parquet

    rows = [{**question, "label": str(question["label"])} for question in QUESTIONS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "questions.parquet")
    data = ["--data", str(tmp_path / "questions.parquet"), "--limit", "2"]
    assert hellaswag.main([str(alphabet), *data]) == 0
    assert "HellaSwag, 2 of 10,042 questions: accuracy 1.0000" in capsys.readouterr().out


def test_log_probability_is_that_of_the_ending_alone(tmp_path):
    """By the models loss with one target at a time, in a row without padding."""
    model = trained_like(tiny_config(val_row_tokens=64), cpu_runtime())
    ids = BYTE_TO_ID.tolist()
    path = checkpoint_of(model, tmp_path, [START_TOKEN, *ids])
    scorer = hellaswag.Scorer(train_gpt, path, "cpu")
    context, ending = "Some context.", "An end"
    tokens = [START_TOKEN, *(ids[byte] for byte in f"{context} {ending}".encode())]
    row = torch.tensor(tokens[:-1], dtype=torch.int32)
    ends = torch.tensor([0, len(row)], dtype=torch.int32)
    expected = 0.0
    for position in range(len(context), len(row)):
        targets = torch.full((len(row),), -1)
        targets[position] = tokens[position + 1]
        batch = scorer.script.Batch(row, targets, ends, len(row))
        expected -= float(scorer.model(batch, *scorer.windows).detach())
    total, count = scorer.log_probability(context, ending)
    assert count == len(" " + ending)
    assert total == pytest.approx(expected, abs=1e-4)
    # the beginning of a context that is too long for a row is left out
    assert scorer.log_probability("x" * 99, ending) == scorer.log_probability("x" * 80, ending)


def test_other_tokens_than_bytes_are_gpt2s(tmp_path, monkeypatch):
    import tiktoken

    path = checkpoint_of(GPT(tiny_config(), cpu_runtime()), tmp_path, [START_TOKEN, 1000])

    class Words:
        def encode_ordinary(self, text: str) -> list[int]:
            return [300 + len(word) for word in text.split()]

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: Words())
    assert hellaswag.Scorer(train_gpt, path, "cpu").log_probability("a bc", "d e f")[1] == 3

    def unreachable(name: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(hellaswag.Unjudgeable, match=r"tiktoken fetches once: no network"):
        hellaswag.Scorer(train_gpt, path, "cpu")


def test_one_line_says_what_is_missing(loaded, alphabet, tmp_path, capsys, monkeypatch):
    import huggingface_hub

    def unreachable(*arguments: str, **options: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    (tmp_path / "bad.pt").write_text("no weights")
    (tmp_path / "bad.jsonl").write_text('{"ctx": "a"}\n')
    for arguments, message in (
        ([alphabet], "HellaSwag cannot be had (Rowan/hellaswag from the hub: OSError): "),
        ([alphabet, "--data", tmp_path / "bad.jsonl"], "bad.jsonl: not HellaSwag's validation"),
        ([tmp_path / "gone.pt"], "gone.pt: cannot be read (No such file or directory)"),
        ([tmp_path / "bad.pt"], "bad.pt: not a checkpoint of"),
    ):
        assert hellaswag.main(list(map(str, arguments))) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
