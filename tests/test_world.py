"""Eight processes over gloo train what one process trains: main() runs that of train_gpt.py and
records what each rank reads, computes and ends with."""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_data import reference_rows, row_of
from test_train import fork, log_of, read_shard, validation_losses, write_data

sys.path.insert(0, str(ROOT))
import train_gpt

RANKS = 8
LENGTHS = {32: 48, 64: 64}  # max_seq_len by the tokens of a row; four steps of each
CHANGES = {
    "sequences_per_step": RANKS,
    "model_dim": 16,  # for speed, like the tables' rows and the few steps
    "head_dim": 8,
    "ngram_rows": 512,
    "num_steps": 8,
    "stages": "1/2:256:48:8:16:1:.25:0,1/2:512:64:16:32:1.2:.15:0",
    "extension_steps": 0,
    "val_every": 4,
    "average_shares": "none",
}


def digest(model: train_gpt.GPT) -> str:
    """Of every bit of the weights."""
    whole = hashlib.sha256()
    for param in model.parameters():
        whole.update(param.detach().numpy().tobytes())
    return whole.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """train_gpt.main(); when it went well, the records of this rank go to rank<n>.json."""
    seen: dict[str, list] = {"rows": [], "losses": [], "val_losses": [], "weights": []}
    ahead, launched = train_gpt.prefetch, train_gpt.Progress.launched
    validate = train_gpt.validate

    def note_rows(items, depth):
        for item in ahead(items, depth):
            if isinstance(item, list):  # of a step, and not a shard
                seen["rows"] += map(row_of, item)
            yield item

    def note_loss(self, step, loss):
        assert step == len(seen["losses"])
        seen["losses"].append(loss.item())
        launched(self, step, loss)

    def note_validation(model, *arguments):
        seen["weights"].append(digest(model))
        seen["val_losses"].append(validate(model, *arguments))
        return seen["val_losses"][-1]

    train_gpt.prefetch = note_rows
    train_gpt.Progress.launched = note_loss
    train_gpt.validate = note_validation
    code = train_gpt.main(arguments)
    if code == 0:
        Path(f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
    return code


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The log of one process."""
    folder = write_data(tmp_path_factory.mktemp("alone"))
    result = fork(folder, **CHANGES)
    assert result.returncode == 0, result.stderr
    return log_of(folder)[1]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of eight, with its log and the records of every rank."""
    folder = write_data(tmp_path_factory.mktemp("together"))
    result = fork(folder, RANKS, timeout=240, script=sys.modules[__name__], **CHANGES)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("val loss") == 1
    return folder


@pytest.fixture(scope="module")
def ranks(together: Path) -> list[dict]:
    """The records of each. A rank that did not end has left none."""
    return [json.loads((together / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def test_eight_ranks_have_the_losses_of_one_process(alone, together, ranks):
    """The log has rank 0's losses; a step's is the mean over the ranks."""
    record = log_of(together)[1]
    assert record["environment"]["world_size"] == RANKS
    steps = [row["train_loss"] for row in record["steps"]]
    assert steps == ranks[0]["losses"]
    means = np.mean([rank["losses"] for rank in ranks], axis=0)
    expected = [row["train_loss"] for row in alone["steps"]]
    assert len(expected) == CHANGES["num_steps"]
    assert means.tolist() == pytest.approx(expected, abs=1e-3)
    assert steps != pytest.approx(expected, abs=1e-3), "the rows must differ, or this shows little"


def test_eight_ranks_validate_like_one_process(alone, together, ranks):
    expected = [row["val_loss"] for row in alone["validations"]]
    assert [row["step"] for row in alone["validations"]] == [4, 8]
    assert expected[1] < expected[0] - 0.1, "it must learn, or this shows little"
    assert validation_losses(together) == pytest.approx(expected, abs=1e-3)
    for rank in ranks:
        assert rank["val_losses"] == validation_losses(together)


def test_eight_ranks_have_the_same_weights(ranks):
    """To the bit, though each updates an eighth of them."""
    for before, last in (rank["weights"] for rank in ranks):
        assert [before, last] == ranks[0]["weights"]
        assert before != last


def test_eight_ranks_read_the_stream_once(together, ranks):
    """Step by step, one rank's sequence after the other's; two shards."""
    shards = [read_shard(path) for path in sorted(together.glob("train_*.bin"))]
    shapes = [shape for shape in LENGTHS.items() for _ in range(4 * RANKS)]
    expected = [row for row, _ in reference_rows(np.concatenate(shards).tolist(), shapes)]
    assert len(expected) == len(shapes)
    assert len(list(reference_rows(shards[0].tolist(), shapes))) < len(shapes), "one is enough"
    steps = zip(*(rank["rows"] for rank in ranks), strict=True)
    assert [row for step in steps for row in step] == expected


if __name__ == "__main__":
    sys.exit(main())
