"""tools/generate.py with the weights of a short run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, cpu_runtime, tiny_config
from test_eval import simple_alphabet
from test_token_tables import downloaded_gpt2
from test_train import BYTE_TO_ID, environment, fork, load, write_data

import train_gpt
from train_gpt import START_TOKEN, Batch, Windows, config_as_text

sys.path.insert(0, str(ROOT / "tools"))
import generate as tool

LENGTH, PROMPT = 24, "dins"


def generate(
    checkpoint: Path, text: str = PROMPT, code: int = 0, **options: object
) -> subprocess.CompletedProcess:
    """As a user starts it."""
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    result = subprocess.run(
        ["./run.sh", "generate", checkpoint, text, *words],
        cwd=ROOT,
        env=environment() | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_data(tmp_path_factory.mktemp("trained"))
    result = fork(folder, checkpoint=folder / "weights.pt", val_every=0)
    assert result.returncode == 0, result.stderr
    return folder / "weights.pt"


def likeliest_next_letters(checkpoint: Path, text: str) -> str:
    """What the saved weights find likeliest at each place of the text, the start token's included;
    a new document is a line feed."""
    config, model = load(checkpoint)
    ids = BYTE_TO_ID.tolist()
    tokens = torch.tensor([START_TOKEN] + [ids[byte] for byte in text.encode()])
    ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
    windows = Windows(config.extension[0].window_short, config.final_window_long)
    batch = Batch(tokens.int(), tokens, ends, len(tokens))
    with torch.no_grad():
        best = model.probabilities(batch, windows, slice(None)).argmax(dim=1).tolist()
    return "".join("\n" if token == START_TOKEN else chr(ids.index(token)) for token in best)


def test_a_text_is_continued(weights):
    """With temperature 0 by what the saved weights find likeliest, otherwise by chance and seed."""
    (text,) = generate(weights, tokens=LENGTH, temperature=0).stdout.splitlines()
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT)
    likeliest = likeliest_next_letters(weights, text)[len(PROMPT) :]
    assert likeliest[:-1] == text[len(PROMPT) :]
    assert len(text) == len(PROMPT) + LENGTH or likeliest[-1] == "\n"  # a document's end
    how = train_gpt, str(weights), PROMPT, LENGTH, 0.8
    texts = [tool.continue_text(*how, seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_checkpoint_of_the_optimization_track_is_known(tmp_path, capsys):
    """By its options. The text is longer than the model's sequences, or shorter."""
    path = simple_alphabet(tmp_path, sequence_tokens=8)
    for text in ("abc", "ponmlkjihgfedcbabc"):
        assert tool.main([str(path), text, "--tokens", "4", "--temperature", "0"]) == 0
        assert capsys.readouterr().out == f"{text}defg\n"


def test_a_bad_checkpoint_is_reported(weights, tmp_path):
    for path, message in (
        (tmp_path / "none.pt", "none.pt: cannot be read (No such file or directory)"),
        (weights.parent / "val.bin", "val.bin: not a checkpoint of "),
    ):
        error = generate(path, code=1).stderr
        assert error.startswith(f"error: {path.parent}") and message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "-1"], "--tokens: '-1' is no whole number from 0 up"),
        (["--tokens", "2.5"], "--tokens: '2.5' is no whole number"),
        (["--temperature", "-0.1"], "--temperature: '-0.1' is no number from 0 up"),
        (["--temperature", "nan"], "--temperature: 'nan' is no number"),
        (["--temperature", "inf"], "--temperature: 'inf' is no number"),
        (["--seed", "-1"], "--seed: '-1' is no whole number from 0 to 9223372036854775806"),
        (["--seed", "1" + "0" * 19], "--seed: '10000000000000000000' is no whole number"),
        (["--seed", "1" * 5000], "--seed: "),
        (["\udcff"], "TEXT: '\\udcff' is not UTF-8"),
        (["--temprature", "1"], "unrecognized arguments"),
    ],
)
def test_what_is_out_of_range_ends_with_code_2_and_one_line(capsys, options, message):
    text = [] if len(options) == 1 else ["text"]
    with pytest.raises(SystemExit) as stop:
        tool.main(["model.pt", *text, *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


class Model:
    """Finds `favourite` likeliest by far behind any text, of ids that stand for nothing as well,
    and then the ids from 0 on, each 1 less than the one before. Notes what it is given."""

    def __init__(self, config: train_gpt.Config, favourite: int):
        self.logits = torch.zeros(config.padded_vocab_size)
        self.logits[:4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
        self.logits[favourite] = 20.0
        self.given: list[list[int]] = []

    def probabilities(self, batch: Batch, windows: Windows, positions: slice) -> torch.Tensor:
        self.given.append(batch.tokens.tolist())
        return self.logits.softmax(0).expand(len(batch.tokens), -1)[positions]


@pytest.fixture
def rigged(monkeypatch):
    """Continues a text with a Model; gives it and the text's tokens."""

    def run(text: str, favourite: int, count: int, temperature: float) -> tuple[Model, list[int]]:
        config = train_gpt.Config(val_sequence_tokens=16)
        model, seen = Model(config, favourite), []
        monkeypatch.setattr(tool, "load_checkpoint", lambda *how: (model, config, True))
        monkeypatch.setattr(tool.Tokenizer, "decode", lambda self, tokens: seen.extend(tokens))
        tool.continue_text(train_gpt, "", text, count, temperature, seed=1)
        return model, seen

    return run


@pytest.mark.parametrize("temperature", [0, 0.8, 1e9])
def test_ids_that_stand_for_nothing_are_never_drawn(rigged, temperature):
    """Those that pad the vocabulary to a multiple of 128."""
    _, tokens = rigged("a", train_gpt.Config().vocab_size, 20, temperature)
    assert len(tokens) == 21
    assert max(tokens) < train_gpt.Config().vocab_size


@pytest.mark.parametrize("temperature", [0, 1e-9, 1e-320])
def test_low_temperatures_take_the_likeliest(rigged, temperature):
    assert rigged("a", 50_300, 5, temperature)[1][1:] == [0] * 5


def test_a_long_text_keeps_its_end(rigged):
    """The model is given as many of the last tokens as a sequence has, new ones too."""
    model, tokens = rigged("abcdefghijklmnopqrstuvwxyz", 7, 3, 0)
    assert tokens[-3:] == [7, 7, 7] and len(tokens) == 29
    assert model.given == [tokens[-19:-3], tokens[-18:-2], tokens[-17:-1]]


@pytest.mark.parametrize(("mask", "expected"), [(False, "...."), (True, "a.a."), (None, "....")])
def test_pointer_and_mask_take_part(tmp_path, mask, expected):
    """With all weights zero the logits are alike, and the pointer's shares of earlier tokens too.
    So the most frequent token of the text is likeliest; with the mask no "." behind another, which
    would be the token "..". None: of a script that had no mask yet, so that it is off as it was in
    training, though it is on by default.
    """
    config = tiny_config(canonical_mask=bool(mask))
    weights = train_gpt.GPT(config, cpu_runtime()).state_dict()
    saved = {"config": config_as_text(config), "byte_tokens": True}
    if mask is None:
        del saved["config"]["canonical_mask"]
        assert train_gpt.Config().canonical_mask
    saved["weights"] = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    torch.save(saved, tmp_path / "model.pt")
    text = tool.continue_text(train_gpt, str(tmp_path / "model.pt"), "a...a.", 4, 0, seed=1)
    assert text == "a...a." + expected


def test_a_documents_end_stops_it(rigged):
    assert rigged("ab", START_TOKEN, 9, 0)[1] == BYTE_TO_ID[list(b"ab")].tolist()


SHOW = f"""
import sys
sys.path.insert(0, {str(ROOT / "tools")!r})
import console
sys.exit(console.show(chr(0xe9) + "bb"))
"""


def test_an_output_that_ends_or_lacks_characters_is_no_failure(tmp_path):
    """A closed pipe, ASCII; a full disk is a failure, in one line."""
    command, kept = [sys.executable, "-c", SHOW], os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, env=kept, capture_output=True, check=False)
    assert (result.returncode, result.stdout[:3], result.stderr) == (0, b"?bb", b"")
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")
    with open("/dev/full", "wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert result.returncode == 1
    assert result.stderr == b"error: the output cannot be written (No space left on device)\n"


@pytest.mark.parametrize("tool", ["generate", "hellaswag", "check", "ablate", "bench", "profiler"])
def test_ctrl_c_during_the_imports_is_one_line(tool):
    """It comes while torch is imported."""
    script = f"""
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.path.insert(0, {str(ROOT / "tools")!r})
runpy.run_path({str(ROOT / "tools" / tool)!r} + ".py", run_name="__main__")
"""
    result = subprocess.run(
        [sys.executable, "-c", script, "model.pt", "text"], capture_output=True, check=False
    )
    assert (result.returncode, result.stderr) == (130, b"\ninterrupted\n")


SIGNALLED = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT / "tools")!r})
import console
signal.signal(signal.SIGHUP, signal.SIG_IGN)
console.end_on_signals()
for number in map(int, sys.argv[1:]):
    os.kill(os.getpid(), number)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_tool_but_not_one_that_is_ignored(number):
    command = [sys.executable, "-c", SIGNALLED, str(int(signal.SIGHUP)), str(int(number))]
    result = subprocess.run(command, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (128 + number, b"\ninterrupted\n")


def test_a_panic_of_the_tokenizer_is_one_line(monkeypatch):
    class Panic(BaseException):
        pass

    class Library:
        def encode_ordinary(self, text: str) -> list[int]:
            raise Panic("stack overflow")

    monkeypatch.setattr(tool, "gpt2_encoding", Library)
    with pytest.raises(tool.Unjudgeable, match="cannot read 'a{40}' ...: stack overflow"):
        tool.Tokenizer(byte_tokens=False).encode("a" * 99)


# Ids of GPT-2's tokens, as they are known.
KNOWN = {
    "Hello world": [15496, 995],
    "The quick brown fox": [464, 2068, 7586, 21831],
    "it's  42\n\n": [270, 338, 220, 5433, 628],
}


def test_gpt2s_tokens_need_no_network(monkeypatch):
    """Not even once. A token that ends within a character is no failure."""
    import tiktoken

    def unreachable(name: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    tokenizer = tool.Tokenizer(byte_tokens=False)
    for text, tokens in KNOWN.items():
        assert tokenizer.encode(text) == tokens and tokenizer.decode(tokens) == text
    text = "Naïve 日本語, and <|endoftext|> as text."
    tokens = tokenizer.encode(text)
    assert START_TOKEN not in tokens and tokenizer.decode(tokens) == text
    japanese = tokenizer.encode("本")
    assert tokenizer.decode(japanese[:-1]) == "\ufffd"


def test_gpt2s_tokens_are_those_of_tiktoken():
    downloaded = downloaded_gpt2()
    tokenizer = tool.Tokenizer(byte_tokens=False)
    text = (ROOT / "README.md").read_text(encoding="utf-8") + "  \n\t é ½ 日本 \xa0 'll'LL 's\n \n"
    assert tokenizer.encode(text) == downloaded.encode_ordinary(text)
    ids = range(START_TOKEN)
    assert all(tokenizer.decode([i]) == downloaded.decode([i]) for i in ids)


def test_a_missing_table_of_tokens_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / "train_gpt.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tool.Unjudgeable, match=r"gpt2_tokens\.npz: cannot be read \(No such file"):
        tool.Tokenizer(byte_tokens=False)
