"""tools/hellaswag.py on questions made here, with a model made to continue the alphabet."""

import dataclasses
import itertools
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

sys.path.insert(0, str(ROOT / "tools"))
import check
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
    model = GPT(tiny_config(val_sequence_tokens=256), cpu_runtime())
    ids = [int(BYTE_TO_ID[ord(letter)]) for letter in LETTERS]
    with torch.no_grad():
        for table in (model.attention_bank, model.mlp_bank, model.value_embed, model.head):
            table.zero_()
        for i, token in enumerate(ids):
            model.head[token, i] = 100
            model.mlp_bank[4, i, i] = 1
            model.mlp_bank[9, i, i + 1] = 1e4
    return checkpoint_of(model, tmp_path, [START_TOKEN, *ids])


def simple_alphabet(folder: Path, sequence_tokens: int) -> Path:
    """The same of the optimization track's script: blocks add nothing to the embeddings, which are
    one-hot, and the head has the letter before in the row of each letter."""
    sys.path.append(str(check.SIMPLE_SCRIPT.parent))
    import train_gpt_simple as script

    tiny = script.PRESETS["tiny"]
    config = dataclasses.replace(tiny, sequence_tokens=sequence_tokens, layers=1)
    runtime = script.Runtime(0, 1, torch.device("cpu"), script.Log(None))
    model = script.GPT(config, runtime)
    ids = [int(BYTE_TO_ID[ord(letter)]) for letter in LETTERS]
    weights = {name: torch.zeros_like(x) for name, x in model.state_dict().items()}
    for name, values in weights.items():
        if name.endswith("norm.weight"):
            values.fill_(1)
    for i, (letter, following) in enumerate(itertools.pairwise(ids)):
        weights["embedding.weight"][letter, i] = 1
        weights["head.weight"][following, i] = 1.2  # a logit of 8, and 0 for all other tokens
    saved = {"config": vars(config), "weights": weights, "byte_tokens": True}
    torch.save(saved, folder / "simple.pt")
    return folder / "simple.pt"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n", encoding="utf-8")
    return path


def test_right_answers_are_counted(alphabet, questions):
    result = subprocess.run(
        [sys.executable, "tools/hellaswag.py", alphabet, "--data", questions],
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


def test_a_checkpoint_of_the_optimization_track_is_known(questions, tmp_path, capsys):
    path = simple_alphabet(tmp_path, sequence_tokens=64)
    assert hellaswag.main([str(path), "--data", str(questions)]) == 0
    assert f"{ACCURACY}, {ACC_NORM} (" in capsys.readouterr().out
    other = str(ROOT / "train_gpt.py")
    assert hellaswag.main([str(path), "--data", str(questions), "--script", other]) == 1
    assert f"not a checkpoint of {other}" in capsys.readouterr().err


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
    """By the models loss with one target at a time, in a sequence without padding."""
    model = trained_like(tiny_config(val_sequence_tokens=64), cpu_runtime())
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
        expected -= float(scorer.model.validation_loss(batch, *scorer.windows).detach())
    before, after = scorer.tokens(context, ending)
    assert len(after) == len(" " + ending)
    assert scorer.log_probability(before, after) == pytest.approx(expected, abs=1e-4)


def test_a_long_context_keeps_its_end(tmp_path, monkeypatch):
    """As much of it as a sequence takes: 64 tokens, with all of the ending's but the last."""
    model = trained_like(tiny_config(val_sequence_tokens=64), cpu_runtime())
    path = checkpoint_of(model, tmp_path, [START_TOKEN, *BYTE_TO_ID.tolist()])
    scorer, rows = hellaswag.Scorer(train_gpt, path, "cpu"), []
    monkeypatch.setattr(scorer, "model", lambda batch, *windows: rows.append(batch) or 0.0)
    text = "".join(chr(ord("a") + i % 26) for i in range(99))
    for ending in ("An end", "y" * 63):
        before, after = scorer.tokens(text, ending)
        scorer.log_probability(before, after)
        assert rows[-1].tokens.tolist() == [*before, *after][-65:-1]
        targets = [-1] * (64 - len(after)) + after
        assert rows[-1].targets.tolist() == targets


def test_other_tokens_than_bytes_are_gpt2s(tmp_path):
    path = checkpoint_of(GPT(tiny_config(), cpu_runtime()), tmp_path, [START_TOKEN, 1000])
    scorer = hellaswag.Scorer(train_gpt, path, "cpu")
    assert scorer.tokens("The quick", "brown fox") == ([START_TOKEN, 464, 2068], [7586, 21831])


def test_one_line_says_what_is_missing(loaded, alphabet, questions, tmp_path, capsys, monkeypatch):
    import huggingface_hub

    def unreachable(*arguments: str, **options: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    (tmp_path / "bad.pt").write_text("no weights")
    (tmp_path / "bad.jsonl").write_text('{"ctx": "a"}\n')
    for arguments, code, message in (
        ([alphabet], 1, "HellaSwag cannot be had (Rowan/hellaswag from the hub: OSError): "),
        ([alphabet, "--data", tmp_path / "bad.jsonl"], 2, "bad.jsonl, line 1: endings is no list"),
        ([alphabet, "--data", tmp_path / "no.jsonl"], 2, "no.jsonl: cannot be read (No such file"),
        ([tmp_path / "gone.pt", "--data", questions], 1, "gone.pt: cannot be read (No such file"),
        ([tmp_path / "bad.pt", "--data", questions], 1, "bad.pt: not a checkpoint of"),
        ([tmp_path / "gone.pt"], 1, "gone.pt: cannot be read (No such file"),  # before a download
    ):
        assert hellaswag.main(list(map(str, arguments))) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": no question in it"),
        ("\n \n", ": no question in it"),
        ('{"ctx": "a"', ", line 1: not HellaSwag's validation split (JSONDecodeError: "),
        ("GOOD\n\n{]", ", line 3: not HellaSwag's validation split (JSONDecodeError: "),
        ("[" * 200_000, ", line 1: not HellaSwag's validation split (RecursionError: "),
        ("7", ", line 1: a question is a table"),
        ({"label": 7}, ", line 1: label 7 is none of 0, 1"),
        ({"label": -1}, ", line 1: label -1 is none of 0, 1"),
        ({"label": 1.7}, ", line 1: label 1.7 is none of 0, 1"),
        ({"label": True}, ", line 1: label True is none of 0, 1"),
        ({"label": ""}, ", line 1: label  is none of 0, 1"),
        ({"label": None}, ", line 1: label None is none of 0, 1"),
        ({"endings": None}, ", line 1: endings is no list of two or more texts"),
        ({"endings": []}, ", line 1: endings is no list of two or more texts"),
        ({"endings": ["one"]}, ", line 1: endings is no list of two or more texts"),
        ({"endings": "abcd"}, ", line 1: endings is no list of two or more texts"),
        ({"endings": ["a", 1]}, ", line 1: endings is no list of two or more texts"),
        ({"endings": ["a", "\ud800"]}, ", line 1: endings is no list of two or more texts"),
        ({"endings": ["a", ""]}, ", line 1: an ending is empty"),
        ({"ctx": None}, ", line 1: ctx is no text"),
        ({"ctx_a": "A man"}, ", line 1: activity_label is no text"),
        ({"ctx_a": "A", "ctx_b": None, "activity_label": "b"}, ", line 1: ctx_b is no text"),
        ({"endings": ["b", "x" * 256]}, ", line 1: an ending has 257 tokens, a row of this "),
    ],
)
def test_one_line_names_the_place_of_a_bad_question(
    loaded, alphabet, tmp_path, capsys, text, message
):
    good = {"ctx": "a", "endings": ["b", "c"], "label": 1}
    text = (
        text.replace("GOOD", json.dumps(good)) if isinstance(text, str) else json.dumps(good | text)
    )
    (path := tmp_path / "odd.jsonl").write_text(text, encoding="utf-8")
    assert hellaswag.main([str(alphabet), "--data", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}{message}"), error
    assert error.count("\n") == 1 and error.endswith("\n")


@pytest.mark.parametrize("limit", ["0", "-1", "1.5", "many"])
def test_limit_is_at_least_one(capsys, limit):
    with pytest.raises(SystemExit) as stop:
        hellaswag.main(["model.pt", "--limit", limit])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: argument --limit: {limit!r} is no whole number from 1 up")
    assert error.count("\n") == 1


def test_jsonl_is_read_as_an_editor_shows_it(tmp_path):
    """A byte order mark, blank lines, and a line separator within a text."""
    question = {"ctx": "one\u2028two", "endings": ["a", "b"], "label": "1"}
    text = f"\ufeff{json.dumps(question, ensure_ascii=False)}\r\n\n"
    (path := tmp_path / "q.jsonl").write_text(text, encoding="utf-8", newline="")
    expected = hellaswag.Question(f"{path}, line 1", "one\u2028two", ["a", "b"], 1)
    assert hellaswag.read_questions(path) == [expected]


# The rule of the reference harness, by hand -------------------------------------------------------


def test_query_and_endings_are_the_harnesss():
    """Marks in brackets go, shortest first, " [title]" ends a sentence; ctx_b is capitalized, which
    makes the rest of it small; then two blanks are one, which leaves two of three."""
    row = {
        "activity_label": "Home and Garden",
        "ctx_a": "[header] How to clean a sink [title] Take out the dishes.  [step] Rinse [a] it].",
        "ctx_b": "the Water of New York",
        "ctx": "not read",
        "endings": [" [substeps] Is  warm [x].", "[title] flows", "runs [title] Off"],
        "label": "2",
    }
    query = "Home and Garden: How to clean a sink. Take out the dishes.  Rinse it]. "
    query += "The water of new york"
    endings = [" Is warm .", " flows", "runs. Off"]
    assert hellaswag.read_question(row, "p") == hellaswag.Question("p", query, endings, 2)
    plain = {"ctx": " [step] a  b ", "endings": ["c ", "d"], "label": 0}
    assert hellaswag.read_question(plain, "p") == hellaswag.Question("p", " a b", ["c", "d"], 0)


def test_acc_norm_divides_by_characters():
    """-75.8 / 28, -97.4 / 27, -65.0 / 22 and -21.6 / 5 are -2.71, -3.61, -2.95 and -4.32. By
    tokens of GPT-2 the last would be the highest. Of the next two the first has more bytes."""
    endings = ["sits on the bench and waits.", "unscrews carburettor bolts."]
    endings += ["pirouettes gracefully.", "eats."]
    assert hellaswag.choices([-75.8, -97.4, -65.0, -21.6], endings) == (3, 0)
    assert hellaswag.choices([-9.0, -8.0], ["äöü", "abcd"]) == (1, 1)
    assert hellaswag.choices([-1.0, -9.0, -9.0], ["", "ab", "cd"]) == (0, 1)


def test_blanks_at_the_end_of_a_query_belong_to_the_ending(tmp_path):
    """As the harness cuts the tokens of the whole text, behind those of the context."""
    path = checkpoint_of(GPT(tiny_config(), cpu_runtime()), tmp_path, [START_TOKEN, 5])
    scorer, ids = hellaswag.Scorer(train_gpt, path, "cpu"), BYTE_TO_ID.tolist()
    scorer.encode = encode = lambda text: [ids[byte] for byte in text.encode()]
    assert scorer.tokens("ab  ", "c") == ([START_TOKEN, *encode("ab")], encode("   c"))
    assert scorer.tokens("", "c") == ([START_TOKEN], encode(" c"))
    # merges across the border: the whole text's tokens count
    scorer.encode = lambda text: text.split("|")
    assert scorer.tokens("a|b", "c|d") == ([START_TOKEN, "a", "b"], ["d"])
