"""Writes the table of README.md from the logs of this folder: `./run.sh optimization table`.

Every folder in here that has logs (<run id>.txt and .json) is one method: all its runs have one
script and one config, apart from the seed, and all of them count. What is refused, with the name of
the log: a script whose code differs from train_gpt_simple.py outside the Optimizer section, fixed
options that are no preset's, two runs with one seed, a run that is not finished, and a validation
shard with fewer targets than the preset scores.

Losses are in nats a token. A step counts from 1.
"""

import ast
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "tools")]

import report
import submission
import train_gpt_simple

README = HERE / "README.md"
TABLE = "<!-- the table: written by ./run.sh optimization table -->"
TABLE_END = "<!-- the end of the table -->"
NO_RUNS = "No runs have been made yet."
TARGET = 3.28  # of the race on FineWeb; elsewhere the target is the loss of the Muon baseline
MARGIN = 0.004  # nats: about three standard deviations, of 0.0013, of the loss of a run
LOSS_PER_STEP = 0.0045 / 100  # nats that a step is worth when methods compare
CLAIM_RUNS = 3
FREE = {"num_steps", "seed", "train_files", "val_file", "val_every"}  # options that may vary
FREE |= {"micro_batch_tokens", "log_dir", "checkpoint"}
RACES = {  # preset: its heading
    "speedrun": "The race, 524,288 tokens a step",
    "proxy": "The proxy race, 131,072 tokens a step",
}


class TableError(Exception):
    """Something the user can fix. The message names the file and the remedy."""


# --- The rules of the track -----------------------------------------------------------------------


def passes(losses: list[float], target: float) -> bool:
    """Whether runs with these losses are below the target: the z-test of the rules."""
    return target_statistic(losses, target) >= MARGIN


def target_statistic(losses: list[float], target: float) -> float:
    return (target - statistics.fmean(losses)) * math.sqrt(len(losses))


def pairwise_statistic(old: "Result", new: "Result") -> float:
    """How much better `new` is, in the unit of MARGIN. A step saved counts as LOSS_PER_STEP."""
    gain = old.mean - new.mean + (old.step - new.step) * LOSS_PER_STEP
    return gain / math.sqrt(1 / len(old.losses) + 1 / len(new.losses))


@dataclass
class Result:
    """Where the runs of a method stop: one step for all of them."""

    step: int
    losses: list[float]  # of the runs, there
    reached: bool

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)


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


# --- Methods --------------------------------------------------------------------------------------


class Method:
    """A folder of runs."""

    def __init__(self, folder: Path):
        """With all checks; TableError for what the rules do not allow."""
        self.name = folder.name
        names = {path.stem for path in folder.glob("[!.]*.json")}
        names |= {path.stem for path in folder.glob("*.txt") if report.RUN_ID.match(path.name)}
        runs = [report.read_run(folder / f"{name}.json") for name in names]
        self.runs = sorted(runs, key=lambda run: run.seed)
        first = self.runs[0]
        report_path = f"records/optimization/{folder.name}"
        for run in self.runs:
            path = f"{report_path}/{run.path.name}"
            check_script(run.source, path)
            if run.source != first.source:
                raise TableError(f"{path}: made by another script than {first.path.name}: move it")
            if changes := report.config_changes(first, run):
                found = "\n".join(changes)
                raise TableError(f"{path}: other options than {first.path.name}: move it\n{found}")
            if not run.finished:
                raise TableError(f"{path}: the run is not finished: run it again")
            if run.num_targets != int(run.config["val_tokens"]):
                found = f"validated on {run.num_targets:,} targets: run it with a larger shard"
                raise TableError(f"{path}: {found}")
        seeds = [run.seed for run in self.runs]
        if len(set(seeds)) < len(seeds):
            raise TableError(f"{report_path}: two runs have one seed: leave out a copy")
        self.preset = preset_of(first.config, report_path)
        self.data = first.data_name
        self.curves = [{r["step"]: r["val_loss"] for r in run.validations} for run in self.runs]
        self.is_baseline = is_baseline(first.source, first.config, self.preset)

    @property
    def final_loss(self) -> float:
        return statistics.fmean(run.loss for run in self.runs)


def check_script(source: str, path: str) -> None:
    """TableError unless the code outside the Optimizer section is that of train_gpt_simple.py."""
    ours = submission.SCRIPT.read_text(encoding="utf-8")
    try:
        same = submission.fixed_part(source, path) == submission.fixed_part(ours, "ours")
    except (submission.SubmissionError, SyntaxError) as error:
        raise TableError(f"{path}: its script is no submission ({error}): move it") from None
    if not same:
        found = "its script differs from train_gpt_simple.py outside the Optimizer section"
        raise TableError(f"{path}: {found}: run it again with the fixed part as it is")


def preset_of(config: dict[str, str], path: str) -> str:
    """The preset whose fixed options these are."""
    for name, preset in train_gpt_simple.PRESETS.items():
        fields = train_gpt_simple.config_as_text(preset)
        if all(config[key] == value for key, value in fields.items() if key not in FREE):
            return name
    raise TableError(f"{path}: its fixed options are those of no preset: run a preset")


def is_baseline(source: str, config: dict[str, str], preset: str) -> bool:
    """Whether this is the Muon baseline, run for its own number of steps."""
    sections = (
        submission.split(text, "the script")[1]
        for text in (source, submission.SCRIPT.read_text(encoding="utf-8"))
    )
    old, new = (ast.dump(ast.parse(section)) for section in sections)
    return old == new and int(config["num_steps"]) == train_gpt_simple.NUM_STEPS[preset]


def all_methods() -> list[Method]:
    folders = sorted(path for path in HERE.iterdir() if path.is_dir())
    with_logs = [path for path in folders if any(path.glob("[!.]*.json"))]
    return [Method(folder) for folder in with_logs]


# --- The page -------------------------------------------------------------------------------------


def race_section(methods: list[Method]) -> str:
    """The tables of one preset and data."""
    preset, data = methods[0].preset, report.CORPORA.get(methods[0].data, methods[0].data)
    baseline = next((method for method in methods if method.is_baseline), None)
    heading = f"### {RACES[preset]}: {data}"
    is_open = preset == "speedrun" and methods[0].data == "fineweb"  # else the baseline has to run
    if not is_open and baseline is None:
        return f"{heading}\n\nNo target yet: the Muon baseline has no runs on this data."
    target = TARGET if is_open else baseline.final_loss
    results = {}
    for method in methods:
        results[method] = stop(method.curves, target)
        if not is_open and method is baseline:  # it sets the target, at its last step
            losses = [run.loss for run in method.runs]
            results[method] = Result(method.runs[0].num_steps, losses, True)
    methods = sorted(
        methods, key=lambda m: (results[m].reached, -results[m].step, -results[m].mean)
    )

    rows, pairs = [], []
    for i, method in enumerate(methods):
        result = results[method]
        count = len(result.losses)
        by_seed = (first_below(curve, target) for curve in method.curves)
        statistic = f"{target_statistic(result.losses, target):+.4f}".replace("-", "−")
        rows.append(
            [
                f"[{method.name}]({method.name})" + (" (baseline)" if method is baseline else ""),
                f"{result.step}" if result.reached else f"not by {result.step}",
                " ".join("–" if step is None else str(step) for step in by_seed),
                report.spread(result.losses, 4),
                "sets the target" if not is_open and method is baseline else statistic,
                f"{count}" if count >= CLAIM_RUNS else f"{count}: no claim",
            ]
        )
        others = [baseline, methods[i - 1] if i else None]
        for other in dict.fromkeys(others):
            if other not in (None, method):
                value = pairwise_statistic(results[other], result)
                verdict = "yes" if value >= MARGIN else "no"
                number = f"{value:+.4f}".replace("-", "−")
                pairs.append([method.name, other.name, number, verdict])
    header = ["method", "steps", "steps, by seed", "loss there", "(target − loss)·√n", "runs"]
    parts = [heading, f"Target: {target:.4f}.", report.markdown_table(header, rows)]
    if pairs:
        header = ["method", "against", "statistic", f"better (at least {MARGIN})"]
        parts.append(report.markdown_table(header, pairs))
    return "\n\n".join(parts)


def table(methods: list[Method]) -> str:
    sections = []
    for preset in RACES:
        chosen = [method for method in methods if method.preset == preset]
        for data in sorted({method.data for method in chosen}):
            sections.append(race_section([method for method in chosen if method.data == data]))
    return "\n\n".join(sections) or NO_RUNS


def with_table(page: str, text: str) -> str:
    if page.count(TABLE) != 1 or page.count(TABLE_END) != 1:
        raise TableError(f"{README.name}: needs the lines {TABLE!r} and {TABLE_END!r}, once each")
    before, rest = page.split(TABLE)
    return f"{before}{TABLE}\n\n{text}\n\n{TABLE_END}{rest.split(TABLE_END)[1]}"


def main(arguments: list[str]) -> int:
    if arguments:
        print(f"error: the table takes no options, found {arguments[0]}", file=sys.stderr)
        return 2
    try:
        methods = all_methods()
        text = with_table(README.read_text(encoding="utf-8"), table(methods))
        report.write_text(README, text)
    except (TableError, report.ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"records/optimization/README.md: {len(methods)} methods")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
