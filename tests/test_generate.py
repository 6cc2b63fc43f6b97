"""records/generate.py with the weights of a short run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_train import BYTE_TO_ID, environment, load, run, write_data

from train_gpt import START_TOKEN, Batch, Windows

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
    result = run(folder, checkpoint=folder / "weights.pt", val_every=0)
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
    with torch.no_grad():
        hidden = model.hidden(Batch(tokens.int(), tokens, ends, len(tokens)), windows)
    best = (hidden @ model.head.T).argmax(dim=1).tolist()
    return "".join("\n" if token == START_TOKEN else chr(ids.index(token)) for token in best)


def test_a_text_is_continued(weights):
    """With temperature 0 by what the saved weights find likeliest, otherwise by chance and seed."""
    (text,) = generate(weights, tokens=LENGTH, temperature=0).stdout.splitlines()
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT)
    likeliest = likeliest_next_letters(weights, text)[len(PROMPT) :]
    assert likeliest[:-1] == text[len(PROMPT) :]
    assert len(text) == len(PROMPT) + LENGTH or likeliest[-1] == "\n"  # a document's end
    texts = [generate(weights, tokens=LENGTH, seed=seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_what_is_no_checkpoint_is_told(weights, tmp_path):
    for path, message in (
        (tmp_path / "none.pt", "none.pt: cannot be read (No such file or directory)"),
        (weights.parent / "val.bin", "val.bin: not a checkpoint of "),
    ):
        error = generate(path, code=1).stderr
        assert error.startswith(f"error: {path.parent}") and message in error
        assert error.count("\n") == 1
