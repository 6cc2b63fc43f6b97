"""The rules of the optimization track as code; README.md in this folder has them in words.

`./run.sh record` and `./run.sh history` judge records of the track by it. Losses are in nats a
token. A step counts from 1.
"""

import ast
import functools
import math
import statistics
from dataclasses import dataclass

import submission
import train_gpt_simple

MARGIN = 0.004  # nats: about three standard deviations, of 0.0013, of the loss of a run
LOSS_PER_STEP = 0.0045 / 100  # nats that a step is worth when methods compare
CLAIM_RUNS = 3
FREE = {"num_steps", "seed", "train_files", "val_file", "val_every"}  # options that may vary
FREE |= {"micro_batch_tokens", "log_dir", "checkpoint"}


class RuleError(Exception):
    """What the rules do not allow. The message says what, and the remedy."""


# --- Losses and steps -----------------------------------------------------------------------------


def passes(losses: list[float], target: float) -> bool:
    """Whether runs with these losses are below the target: the z-test of the rules."""
    return target_statistic(losses, target) >= MARGIN


def target_statistic(losses: list[float], target: float) -> float:
    return (target - statistics.fmean(losses)) * math.sqrt(len(losses))


@dataclass
class Result:
    """Where the runs of a method stop: one step for all of them."""

    step: int
    losses: list[float]  # of the runs, there
    reached: bool  # the target

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)


def pairwise_statistic(old: Result, new: Result) -> float:
    """How much better `new` is, in the unit of MARGIN. A step saved counts as LOSS_PER_STEP."""
    gain = old.mean - new.mean + (old.step - new.step) * LOSS_PER_STEP
    return gain / math.sqrt(1 / len(old.losses) + 1 / len(new.losses))


def stop(curves: list[dict[int, float]], target: float) -> Result:
    """The first step at which all runs were validated and their losses pass; the last one at which
    all were validated where none does. curves: loss by step, a run each."""
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    results = [(step, [curve[step] for curve in curves]) for step in common]
    for step, losses in results:
        if passes(losses, target):
            return Result(step, losses, True)
    return Result(*results[-1], False)


def first_below(curve: dict[int, float], target: float) -> int | None:
    """The first validated step of one run with a loss of at most the target."""
    return min((step for step, loss in curve.items() if loss <= target), default=None)


# --- Scripts and options --------------------------------------------------------------------------


@functools.cache
def script_parts(source: str) -> tuple[str, str]:
    """The fixed part and the Optimizer section of a script, each as code without comments."""
    try:
        section = submission.split(source, "the script")[1]
        return submission.fixed_part(source, "the script"), ast.dump(ast.parse(section))
    except (submission.SubmissionError, SyntaxError) as error:
        raise RuleError(f"its script is no submission ({error})") from None


def our_parts() -> tuple[str, str]:
    """Those of train_gpt_simple.py."""
    return script_parts(submission.SCRIPT.read_text(encoding="utf-8"))


def check_script(source: str) -> None:
    """RuleError unless the code outside the Optimizer section is that of train_gpt_simple.py."""
    if script_parts(source)[0] not in submission.fixed_parts():
        found = "its script differs from train_gpt_simple.py outside the Optimizer section"
        raise RuleError(f"{found}: run it again with the fixed part as it is")


def preset_of(config: dict[str, str]) -> str:
    """The preset whose fixed options these are, texts by name. RuleError if there is none."""
    for name, preset in train_gpt_simple.PRESETS.items():
        fields = train_gpt_simple.config_as_text(preset)
        if all(config.get(key) == value for key, value in fields.items() if key not in FREE):
            found = f"--val_every {config['val_every']} gives more chances to pass than the rules'"
            if int(config["val_every"]) < preset.val_every:
                raise RuleError(f"{found} {preset.val_every}: run it again with that or more")
            return name
    raise RuleError("its fixed options are those of no preset: run a preset")


def is_baseline(source: str, config: dict[str, str]) -> bool:
    """Whether this is the Muon baseline, run for its own number of steps."""
    num_steps = train_gpt_simple.NUM_STEPS[preset_of(config)]
    fixed_part, section = script_parts(source)
    is_ours = fixed_part in submission.fixed_parts() and section == our_parts()[1]
    return is_ours and int(config["num_steps"]) == num_steps
