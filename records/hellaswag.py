"""Scores a saved model on HellaSwag's validation split: `./run.sh eval CHECKPOINT [--limit N]`.

The model reads the context and each of four endings, and chooses the ending with the highest log
probability: in sum (accuracy) or as the mean over the ending's tokens (acc_norm). Chance is 0.25.
Data: Zellers et al. 2019, arXiv 1905.07830, 10,042 questions. The context is taken as it stands.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from check import ROOT, Unjudgeable, as_windows, load_checkpoint, load_script
from generate import Tokenizer

REPOSITORY, FILE = "Rowan/hellaswag", "data/validation-00000-of-00001.parquet"
NUM_QUESTIONS = 10_042  # in it; another number would be another split


class EvalError(Exception):
    """Something the user can mend."""


def read_questions(path: Path | None) -> list[dict]:
    """Rows with ctx, endings and label, from a .parquet or .jsonl file, or else from the hub."""
    from_hub = path is None
    if from_hub:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(REPOSITORY, FILE, repo_type="dataset"))
        except Exception as error:  # noqa: BLE001 (whatever the missing network makes it raise)
            raise EvalError(
                f"HellaSwag cannot be had ({REPOSITORY} from the hub: {type(error).__name__}): "
                "check the network, or give a copy with --data FILE"
            ) from None
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            rows = parquet.read_table(path).to_pylist()
        else:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if from_hub and len(rows) != NUM_QUESTIONS:
            raise ValueError(f"{len(rows)} questions, expected {NUM_QUESTIONS}")
        return [
            {"ctx": row["ctx"], "endings": list(row["endings"]), "label": int(row["label"])}
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvalError(
            f"{path}: not HellaSwag's validation split ({type(error).__name__}: {error})"
        ) from None


class Scorer:
    """A saved model and what it takes to ask it for the log-probability of a text."""

    def __init__(self, script, checkpoint: Path, device: str):
        self.model, self.config, byte_tokens = load_checkpoint(script, str(checkpoint), device)
        self.script, self.device = script, device
        self.encode = Tokenizer(byte_tokens).encode
        short, long = self.config.extension[0].window_short, self.config.final_window_long
        self.windows = as_windows(script, short, long)

    @torch.no_grad()
    def log_probability(self, context: str, ending: str) -> tuple[float, int]:
        """Of the ending behind the context, in nats, and the ending's number of tokens."""
        start, longest = self.script.START_TOKEN, self.config.val_row_tokens
        before, after = [start, *self.encode(context)], self.encode(" " + ending)
        before = before[-(longest - len(after)) :]
        tokens = np.array(before + after[:-1])
        # few shapes; what is behind the tokens is a document of its own
        size = self.script.round_up(len(tokens), 16)
        row = np.full(size, start)
        row[: len(tokens)] = tokens
        targets = np.full(size, self.script.IGNORED_TARGET)
        targets[len(before) - 1 : len(tokens)] = after
        batch = self.script.Batch(
            torch.tensor(row, dtype=torch.int32, device=self.device),
            torch.tensor(targets, dtype=torch.int64, device=self.device),
            torch.tensor([0, len(tokens), size], dtype=torch.int32, device=self.device),
            size,
        )
        return -float(self.model(batch, *self.windows)), len(after)


def report(correct: list[bool]) -> str:
    share = sum(correct) / len(correct)
    return f"{share:.4f} ± {math.sqrt(share * (1 - share) / len(correct)):.4f}"


def evaluate(scorer: Scorer, questions: list[dict]) -> str:
    """A line of accuracy and acc_norm, with standard errors."""
    from tqdm import tqdm

    by_sum, by_mean = [], []
    for question in tqdm(questions, disable=None):
        scores = [scorer.log_probability(question["ctx"], end) for end in question["endings"]]
        sums, means = [total for total, _ in scores], [total / count for total, count in scores]
        by_sum.append(sums.index(max(sums)) == question["label"])
        by_mean.append(means.index(max(means)) == question["label"])
    return (
        f"HellaSwag, {len(questions):,} of {NUM_QUESTIONS:,} questions: accuracy {report(by_sum)}, "
        f"acc_norm {report(by_mean)} (± standard error)"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run.sh eval", description=__doc__.split("\n")[0])
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="what --checkpoint wrote"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="score the first N questions only")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help=".parquet or .jsonl [from the hub]"
    )
    script = "that wrote the checkpoint [train_gpt.py]"
    parser.add_argument("--script", type=Path, default=ROOT / "train_gpt.py", help=script)
    args = parser.parse_args(arguments)
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        scorer = Scorer(load_script(args.script), args.checkpoint, device)
        print(evaluate(scorer, read_questions(args.data)[: args.limit]))
    except (EvalError, Unjudgeable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
