"""Scores a saved model on HellaSwag's validation split: `./run.sh eval CHECKPOINT [--limit N]`.

The rule is that of the task hellaswag of EleutherAI's lm-evaluation-harness. The model reads the
query and each of four endings, and chooses the ending with the highest log-probability: as it is
(accuracy), or divided by the number of the ending's characters (acc_norm). Chance is 0.25.
Data: Zellers et al. 2019, arXiv 1905.07830, 10,042 questions.
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

from console import Parser, end_on_signals, number, show

if __name__ == "__main__":
    end_on_signals()

import numpy as np
import torch
from check import (
    START_TOKEN,
    Unjudgeable,
    document_batch,
    final_windows,
    load_checkpoint,
    load_script,
    longest_sequence,
    loss_of,
    script_of,
)
from generate import Tokenizer

REPOSITORY, FILE = "Rowan/hellaswag", "data/validation-00000-of-00001.parquet"
NUM_QUESTIONS = 10_042  # in it; another number would be another split


class EvalError(Exception):
    """Something the user can correct, in the questions."""


class Question(NamedTuple):
    place: str  # file and line
    query: str
    endings: list[str]
    label: int  # the right ending


def clean(text: str) -> str:
    """Without the marks of the how-to articles that a part of the questions is taken from."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read_question(row: dict, place: str) -> Question:
    """Its context is activity_label, ctx_a and ctx_b, or else ctx alone. Raises EvalError."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise EvalError(f"{place}: {message}: correct it or leave it out")

    def is_text(value: object) -> bool:  # and no half of a surrogate pair, which JSON can have
        return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)

    require(isinstance(row, dict), "a question is a table with ctx, endings and label")
    parts = "activity_label", "ctx_a", "ctx_b"
    names = parts if any(name in row for name in parts) else ("ctx",)
    for name in names:
        require(is_text(row.get(name)), f"{name} is no text")
    context = row.get("ctx")
    if names == parts:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings, label = row.get("endings"), str(row.get("label"))
    is_list = isinstance(endings, list) and len(endings) > 1
    require(is_list and all(map(is_text, endings)), "endings is no list of two or more texts")
    require(all(endings), "an ending is empty")
    labels = [str(number) for number in range(len(endings))]
    require(label in labels, f"label {label} is none of {', '.join(labels)}")
    return Question(place, clean(context), [clean(ending) for ending in endings], int(label))


def read_questions(path: Path) -> list[Question]:
    """From a .parquet or a .jsonl file. Raises EvalError."""
    rows, place = [], str(path)
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            for number, row in enumerate(parquet.read_table(path).to_pylist(), 1):
                rows.append((row, f"{path}, row {number}"))
        else:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            for number, line in enumerate(lines, 1):
                place = f"{path}, line {number}"
                if line.strip():
                    rows.append((json.loads(line), place))
    except (ValueError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        raise EvalError(f"{place}: not HellaSwag's validation split ({found})") from None
    except OSError as error:
        raise EvalError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not rows:
        raise EvalError(f"{path}: no question in it: give a .parquet or .jsonl file with some")
    return [read_question(row, place) for row, place in rows]


def download() -> Path:
    """The validation split, from the hub. Raises Unjudgeable."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(REPOSITORY, FILE, repo_type="dataset"))
    except Exception as error:  # noqa: BLE001 (whatever the missing network makes it raise)
        raise Unjudgeable(
            f"HellaSwag cannot be had ({REPOSITORY} from the hub: {type(error).__name__}): "
            "check the network, or give a copy with --data FILE"
        ) from None


class Scorer:
    """A saved model and what it takes to ask it for the log-probability of a text."""

    def __init__(self, script, checkpoint: Path, device: str):
        self.model, self.config, byte_tokens = load_checkpoint(script, str(checkpoint), device)
        self.script, self.device = script, device
        self.encode = Tokenizer(byte_tokens).encode
        self.windows = final_windows(script, self.config)

    def tokens(self, context: str, ending: str) -> tuple[list[int], list[int]]:
        """Of the context, behind the start token, and of the blank and the ending behind it, to
        which blanks at the context's end go. Raises EvalError for an ending longer than a row."""
        before = self.encode(context.rstrip())
        after = self.encode(f"{context} {ending}")[len(before) :]
        longest = longest_sequence(self.config)
        if len(after) > longest:
            raise EvalError(f"an ending has {len(after)} tokens, a row of this model {longest}")
        return [START_TOKEN, *before], after

    @torch.no_grad()
    def log_probability(self, before: list[int], after: list[int]) -> float:
        """Of the tokens after those before, in nats. The end of a long context counts."""
        before = before[-(longest_sequence(self.config) + 1 - len(after)) :]
        tokens, targets = before + after[:-1], dict(enumerate(after, len(before) - 1))
        how = self.script, self.config, tokens, targets, self.device
        batch = document_batch(*how, multiple=16)  # few shapes
        return -float(loss_of(self.model)(batch, *self.windows))


def report(correct: list[bool]) -> str:
    share = sum(correct) / len(correct)
    return f"{share:.4f} ± {math.sqrt(share * (1 - share) / len(correct)):.4f}"


def choices(log_probabilities: list[float], endings: list[str]) -> tuple[int, int]:
    """The ending that accuracy and the one that acc_norm takes; the first of equals."""
    sums = np.array(log_probabilities)
    with np.errstate(divide="ignore"):  # of an ending that was all marks
        means = sums / [len(ending) for ending in endings]
    return int(sums.argmax()), int(means.argmax())


def evaluate(scorer: Scorer, questions: list[Question]) -> str:
    """A line of accuracy and acc_norm, with standard errors."""
    from tqdm import tqdm

    rows = []
    for question in questions:  # all, before the first is scored
        try:
            rows.append([scorer.tokens(question.query, ending) for ending in question.endings])
        except EvalError as error:
            raise EvalError(f"{question.place}: {error}: leave it out") from None
    chosen = [
        choices([scorer.log_probability(*tokens) for tokens in row], question.endings)
        for row, question in zip(tqdm(rows, disable=None), questions)
    ]
    by_sum, by_mean = ([x[i] == q.label for x, q in zip(chosen, questions)] for i in (0, 1))
    return (
        f"HellaSwag, {len(questions):,} of {NUM_QUESTIONS:,} questions: accuracy {report(by_sum)}, "
        f"acc_norm {report(by_mean)} (± standard error)"
    )


def main(arguments: list[str]) -> int:
    parser = Parser(prog="./run.sh eval", description=__doc__.split("\n")[0])
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="what --checkpoint wrote"
    )
    text, kind = "score the first N questions only", number(int, 1, sys.maxsize)
    parser.add_argument("--limit", type=kind, metavar="N", help=text)
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help=".parquet or .jsonl [from the hub]"
    )
    script = "that wrote the checkpoint [train_gpt.py or train_gpt_simple.py, as it says]"
    parser.add_argument("--script", type=Path, help=script)
    args = parser.parse_args(arguments)
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        script = load_script(args.script or script_of(args.checkpoint))
        scorer = Scorer(script, args.checkpoint, device)  # before a download, as it may be refused
        questions = read_questions(args.data or download())
        if args.data is None and len(questions) != NUM_QUESTIONS:
            found = f"{REPOSITORY} has {len(questions)} questions"
            raise Unjudgeable(f"{found}, expected {NUM_QUESTIONS}: give a copy with --data FILE")
        return show(evaluate(scorer, questions[: args.limit]))
    except (EvalError, Unjudgeable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, EvalError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
