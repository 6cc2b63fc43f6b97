"""records/check.py on the script itself, on scripts that cheat, and on what cannot be judged. A
cheat is a copy of the script with a few lines before its last, which wrap one of its functions."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from test_train import environment

sys.path.insert(0, str(ROOT / "records"))
import check

SCRIPT, TOOL = ROOT / "train_gpt.py", ROOT / "records" / "check.py"
MAIN = '\nif __name__ == "__main__":\n'
# Name: the check that is to catch it, and the lines.
CHEATS = {
    "inputs are the targets, one further on": (
        "targets",
        """
honest = GPT.hidden
def hidden(self, batch, *more):
    return honest(self, batch._replace(tokens=batch.targets.clamp_min(0).int()), *more)
GPT.hidden = hidden
""",
    ),
    "a window that looks ahead": (
        "causality",
        """
honest = attention
def attention(q, k, v, *more):
    return honest(q, k.roll(-1, 0), v.roll(-1, 0), *more)
""",
    ),
    "embeddings with a share of the next token's": (
        "causality",
        """
honest = GPT.look_up
def look_up(self, *arguments):
    found = honest(self, *arguments)
    return found._replace(embedded=found.embedded + 0.01 * found.embedded.roll(-1, 0))
GPT.look_up = look_up
""",
    ),
    "n-grams that end in the next token": (
        "causality",
        """
honest = ngram_hash
def ngram_hash(tokens, *more):
    return honest(tokens.roll(-1, 0), *more)
""",
    ),
    "a normaliser over the row": (
        "causality",
        """
honest = GPT.hidden
def hidden(self, *arguments):
    x = honest(self, *arguments)
    return x / x.std(0)
GPT.hidden = hidden
""",
    ),
    "a head that has seen the whole file, until it is scored": (
        "causality",
        """
honest = validate
@torch.no_grad()
def validate(model, config, runtime, num_targets, windows):
    head, rows = model.head.clone(), validation_rows(config, runtime, num_targets)
    seen = torch.cat([batch.targets for batch in rows]).clamp_min(0)
    model.head.mul_(1 + 0.01 * seen.bincount(minlength=len(head))[:, None])
    loss = honest(model, config, runtime, num_targets, windows)
    model.head.copy_(head)
    return loss
""",
    ),
    "probabilities normalised over the row": (
        "normalisation",
        """
def forward(self, batch, *windows):
    logits = softcap(F.linear(rms_norm(self.hidden(batch, *windows)), self.head))
    losses = logits.logsumexp(1).mean() - logits.gather(1, batch.targets.clamp_min(0)[:, None])
    return (losses[:, 0] * (batch.targets != IGNORED_TARGET)).sum()
GPT.forward = forward
""",
    ),
    "the last row is not scored": (
        "coverage",
        """
honest = validation_rows
def validation_rows(*arguments):
    yield from list(honest(*arguments))[:-1]
""",
    ),
    "the mean is over more targets than are scored": (
        "mean",
        """
honest = validate
def validate(model, config, runtime, num_targets, windows):
    return honest(model, config, runtime, num_targets, windows) * num_targets / (num_targets + 1)
""",
    ),
    "a check that the script cannot stand": ("mean", "def validate(): ...\n"),
    "training on the validation file": (
        "training",
        """
honest = training_rows
def training_rows(config, *more):
    return honest(dataclasses.replace(config, train_files=config.val_file), *more)
""",
    ),
    "reading the validation file in a training step": (
        "training",
        """
honest = Optimizer.step
def step(self, *arguments):
    read_tokens(self.config.val_file, 10, 50257)
    honest(self, *arguments)
Optimizer.step = step
""",
    ),
}
SEEN = {
    "a check that the script cannot stand": "cannot be judged: TypeError",
    "a head that has seen the whole file, until it is scored": "moved the loss of row 0 by",
    "training on the validation file": "another validation file makes other training losses",
    "reading the validation file in a training step": "opened 4 times while the clock ran",
}
# All cheats in one process, for the sake of time, but not in this one: they register operations.
JUDGE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import check
results = {}
for cheat, (name, path) in json.loads(sys.argv[2]).items():
    results[cheat] = check.judge(Path(path), [name])[name]
print("\\n" + json.dumps(results))
"""


def start(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


def test_the_script_passes_every_check():
    lines = [line.split()[:2] for line in start(TOOL, SCRIPT).stdout.splitlines()]
    assert lines == [["ok", name] for name in (*check.CHECKS, "training")]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bool, str]]:
    """What the check of each cheat has to say."""
    source = SCRIPT.read_text(encoding="utf-8")
    assert source.count(MAIN) == 1
    paths = {}
    for i, (cheat, (name, lines)) in enumerate(CHEATS.items()):
        path = tmp_path_factory.mktemp("cheats") / f"cheat_{i}.py"
        path.write_text(source.replace(MAIN, lines + MAIN), encoding="utf-8")
        paths[cheat] = name, str(path)
    out = start("-c", JUDGE, TOOL.parent, json.dumps(paths)).stdout
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("cheat", CHEATS)
def test_cheat_is_caught(cheat, judged):
    good, seen = judged[cheat]
    assert not good
    assert SEEN.get(cheat, "") in seen
    assert cheat in SEEN or "cannot be judged" not in seen


def test_what_is_no_trainer_is_told_from_one(tmp_path, capsys):
    path = tmp_path / "script.py"
    path.write_text("class GPT: ...")
    assert check.main([str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: cannot be judged, it has no PRESETS, Config, ")
    assert check.main([str(tmp_path / "gone.py")]) == 1
    assert "gone.py: no such Python script" in capsys.readouterr().err
