"""Makes, reproduces and compares records, and draws their history. `./run.sh` dispatches to it.

    ./run.sh record NAME [--runs N] [-- OPTION ...]   train N times, write records/<date>_<NAME>/;
                                                      where it exists, add N runs (0: only rewrite)
    ./run.sh record NAME --logs FILE ...              the same with logs that there are already
    ./run.sh record NAME --track TRACK ...            train for another track than main
    ./run.sh reproduce FOLDER [--runs N] [--fineweb]  run a record's script, beside its figures
    ./run.sh compare A B [--runs N] [--fineweb] [-- OPTION ...]
                                                      run two scripts or records, interleaved
    ./run.sh compare A B --logs [--page FILE]         compare the logs that there are of them
    ./run.sh history                                  write records/README.md and its pictures

A record is of one track: main, medium or optimization (see TRACKS below), as its log or --track
says. Those of the optimization track are in records/optimization/, and judged by its rules.py.

The record NAME_reference is the baseline of NAME and NAME_... of the same date: runs of one session
on one machine, interleaved.

Losses are in nats per token, times in seconds of training unless a name says otherwise, dates in
UTC. Deviations are those of a sample (n - 1).
"""

import argparse
import contextlib
import difflib
import fnmatch
import functools
import glob
import itertools
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import console
import slim

ROOT = Path(__file__).resolve().parent.parent
RECORDS, LOGS = ROOT / "records", ROOT / "logs"
ALPHA = 0.01  # a claim's p is below this
CLAIM_GPUS, CLAIM_TARGETS = 8, 10_485_760
BASELINE = "_reference"  # what the name of a session's baseline ends with
MEMORY = {  # classes of non-parametric memory: what is looked up while a token is predicted
    "none": "nothing: embeddings and rows of hashed n-grams are weights, learned by gradients",
    "document": "the tokens before it in its document, which the pointer can copy",
    "n-gram lookup": "tables of which token followed which n-gram, in all text that was trained "
    "on, in shards that are only looked up (`match_shards`), and in the validation text scored "
    "before it; near-duplicates between what is read and what is scored count towards its loss, "
    "and `data/near_duplicates.py` counts them",
}
CORPORA = {"fineweb": "FineWeb", "proxy": "proxy corpus"}
TOY_TOKENS = 30e6  # a schedule of fewer is a toy
MEDIUM_WIDTH = 1024  # a model at least as wide is one of the medium track, unless --track says else
# Seconds of modded-nanogpt on 8 x H100 and FineWeb to a loss of 3.28: name, day, memory, merged.
PUBLIC_BASELINE = 73.889  # record 89, July 2026
PUBLIC = (
    ("record 92", date(2026, 9, 28), 39.914, "none", True),
    ("#379, open", date(2026, 10, 3), 36.009, "none", False),
    ("#367, open, retrieval", date(2026, 10, 3), 21.555, "retrieval", False),
)
DIFF_LINES = 100  # shown at most
INSETS = (0.46, 0.3, 0.52, 0.34), (0.09, 0.07, 0.36, 0.22)  # in a picture: left, bottom, size
SCREEN = 160  # and characters of an option
SEPARATOR = "=" * 100 + "\n"  # between the script and the log proper
OWN_FIELDS = ("seed", "log_dir", "checkpoint")  # what the runs of one record may differ in
OUTPUT_OPTIONS = "--log_dir", "--checkpoint"
DATA_FIELDS = ("train_files", "val_file")  # the runs have them in any folder, by the same names
DATA_OPTIONS = "--train_files", "--val_file"
COUNTED_FIELDS = (*DATA_FIELDS, "num_steps", "val_every")  # of those that optimization rules free
MOST_RUNS = 10_000
RUN_ID = re.compile(r"\d{4}-\d\d-\d\d_\d{6}")  # what one begins with
DATED = re.compile(r"\d{4}-\d\d-\d\d_(.+)", re.DOTALL)  # the folder of a record
SECTION_BEGIN, SECTION_END = (  # lines of a script of the optimization track
    re.compile(f"^# --- {word} of the Optimizer section -", re.MULTILINE)
    for word in ("begin", "end")
)
RUN_BYTES = 2**21  # more than the files of a run need
SLACK_S = 0.25  # between a step and the clock that is stopped behind it, and to score a blend
TABLE = "<!-- the table: written by ./run.sh history -->"  # in records/optimization/README.md
TABLE_END = "<!-- the end of the table -->"
NO_RUNS = "No runs have been made yet."
AUTHOR = "<!-- the author's words: kept when this file is written again -->"
AUTHOR_END = "<!-- the end of the author's words -->"
PLACEHOLDER = "What changed against the previous record, and why."


class Track(NamedTuple):
    """What records compete in."""

    goal: str  # with the target
    target: float  # validation loss
    picture: str  # of its records, in records/
    folder: str = "."  # of its records, in records/
    script: str = "train_gpt.py"  # that is trained for it
    options: tuple[str, ...] = ()  # and how
    whole_tokens: float = 0.0  # a schedule of fewer is
    shortened: str = "shortened schedule"  # this


TRACKS = {
    "main": Track(
        "least training time to a validation loss of 3.28",
        3.28,
        "history.png",
        whole_tokens=250e6,
        shortened="short schedule",
    ),
    "medium": Track(
        "least training time to a validation loss of 2.92, with a larger model",
        2.92,
        "history_medium.png",
        options=("--preset", "medium"),
        whole_tokens=1e9,
    ),
    "optimization": Track(
        "fewest optimizer steps to a validation loss of 3.28, with model, data and batch fixed",
        3.28,
        "history_optimization.png",
        folder="optimization",
        script="records/optimization/train_gpt_simple.py",
    ),
}
RACES = {  # of the optimization track, by preset
    "speedrun": "the race, 524,288 tokens a step",
    "proxy": "the proxy race, 131,072 tokens a step",
}


class ReportError(Exception):
    """Something the user can fix. The message names the file or option and the remedy."""


class OptionError(ReportError):
    """The same of what stands on the command line: exit code 2."""


def shown(path: Path) -> str:
    """Relative to the repository where it lies inside."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def warn(text: str) -> None:
    print(text, file=sys.stderr)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ReportError(f"{shown(path)}: no text in UTF-8: leave it out") from None


def check_replaceable(path: Path) -> None:
    """Raise ReportError for what is there and no file."""
    if path.exists() and not path.is_file():
        raise ReportError(f"{shown(path)}: is no file, and not replaced: move it away")


def replace(path: Path, make: Callable[[Path], object]) -> None:
    """Have the file made under another name, and put it in its place once it is whole."""
    check_replaceable(path)
    part = path.with_name(f".part_{path.name}")
    try:
        make(part)
        os.replace(part, path.resolve())
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    replace(path, lambda part: part.write_text(text, encoding="utf-8"))


def draw(picture: Callable[[Path], None], path: Path) -> None:
    """A picture that fails ends nothing."""
    try:
        replace(path, picture)
    except Exception as error:  # noqa: BLE001 (whatever the library or the disk does)
        warn(f"warning: {shown(path)} is not drawn: {type(error).__name__}: {error}")


def try_folder(folder: Path, runs: int) -> None:
    """Raise ReportError unless the folder, made if missing, can take the files of so many runs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        found = f"cannot be written to ({error.strerror})"
        raise ReportError(f"{shown(folder)}: {found}: make it a folder that can") from None
    if free < runs * RUN_BYTES:
        need = f"{runs * RUN_BYTES / 2**20:.0f} MiB for the logs"
        raise ReportError(
            f"{shown(folder)}: {free / 2**20:.1f} MiB are free, not {need}: make room"
        )


@functools.cache
def optimization_rules() -> ModuleType:
    """The rules of the optimization track; imported late, as they take torch."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "records" / "optimization"))
    import rules

    return rules


# ==================================================================================================
# 1. Runs: what train_gpt.py and train_gpt_simple.py leave behind
# ==================================================================================================


class Run:
    """One run: <run id>.json, and from <run id>.txt the script's source and the log behind it."""

    def __init__(self, path: Path, source: str, text: str, data: dict):
        self.path, self.source, self.run_id = path, source, str(data["run_id"])  # path: the .json
        self.environment, self.config = environment, config = data["environment"], data["config"]
        started = datetime.strptime(environment["date"], "%Y-%m-%d %H:%M:%S %z")
        self.started = started.astimezone(UTC)
        self.seed = int(config["seed"])
        self.steps: list[dict] = data["steps"]  # step, train_loss, train_time_s, step_ms
        self.validations: list[dict] = data["validations"]  # step, val_loss, train_time_s
        names = "val_loss", "steps", "train_time_s"
        self.loss, self.num_steps, self.time = (data["summary"][name] for name in names)
        blends = data.get("averages", {}).get("blends", ())  # scored on the clock, in the end
        self.check_times(data["summary"]["mean_step_ms"], SLACK_S * len(blends))
        scheduled = int(config["num_steps"]) + int(config["extension_steps"])
        self.finished = self.num_steps == scheduled
        self.steps_text = f"{self.num_steps}" + ("" if self.finished else f" of {scheduled}")

        world_size, devices = environment["world_size"], environment["devices"]
        self.machine = f"{world_size} × {devices.removeprefix('NVIDIA ')}"
        self.gpus = 0 if environment["cuda"] is None else world_size
        backend = re.search(r"attention by (\S+)", text)
        self.torch = environment["torch"]
        self.versions = f"torch {self.torch}, Python {environment['python']}"
        self.versions += f", attention by {backend[1]}" if backend else ""

        # fineweb, proxy, sample, …: what the names of the shards begin with, if they agree; a part
        # of a validation shard has neither a number nor * behind that
        train, val = (Path(config[name]).name for name in ("train_files", "val_file"))
        train, val = re.match(r"(.+)_train_", train), re.fullmatch(r"(.+)_val_(?:\d+|\*)\.bin", val)
        self.data_name = train[1] if train and val and train[1] == val[1] else "other"
        # targets scored, which are fewer than val_tokens where the shard has no more
        targets = re.search(r"^val loss .* on ([\d,]+) targets$", text, re.MULTILINE)
        self.num_targets = int(targets[1].replace(",", "") if targets else config["val_tokens"])

        is_wide = int(config.get("model_dim", 0)) >= MEDIUM_WIDTH
        self.track = config.get("track", "medium" if is_wide else "main")
        if self.track not in TRACKS:
            raise ValueError(f"{self.track!r} is no track")

        # older scripts have no lookup and no pointer, or have the pointer as an option
        matches = config.get("match_orders", "none") not in ("none", "")
        pointer = "def pointer_shares(" in source and config.get("pointer", "true") == "true"
        self.memory = "n-gram lookup" if matches else "document" if pointer else "none"

        stages = [row.split(":") for row in [*config["stages"].split(","), config["extension"]]]
        shares = itertools.accumulate(float(share) for share, *_ in stages[:-1])
        ends = [round(edge * int(config["num_steps"])) for edge in shares]
        counts = [end - begin for begin, end in itertools.pairwise([0, *ends, scheduled])]
        self.tokens = sum(n * int(size) for n, (_, size, *_) in zip(counts, stages, strict=True))
        names = [f"stage {i + 1}" for i in range(len(ends))] + ["extension"]
        if ends == [scheduled]:
            names[0] = "all steps"
        self.stage_begins = [0, *ends]
        self.stage_ms: dict[str, float] = {}  # mean milliseconds a step of the stages it reached
        for name, begin, end in zip(names, self.stage_begins, [*ends, scheduled], strict=True):
            times = [row["step_ms"] for row in self.steps if begin < row["step"] <= end]
            if times:
                self.stage_ms[name] = statistics.fmean(times)

    def length(self, track: Track) -> str:
        """A class of runs: only those of one have losses that compare."""
        if self.gpus == 0 or self.data_name == "sample" or self.tokens < TOY_TOKENS:
            return "toy"
        if not self.finished:
            return "stopped early"
        return track.shortened if self.tokens < track.whole_tokens else "whole schedule"

    def check_times(self, mean_step_ms: float, behind_last: float) -> None:
        """Raise ValueError unless the times (s) of steps, validations and summary add up.
        behind_last: seconds on the clock behind the last step, of older logs, which do not say it.
        """
        if [row["step"] for row in self.steps] != [*range(1, self.num_steps + 1)]:
            raise ValueError(f"its steps are not 1 to {self.num_steps}")
        losses = [row["train_loss"] for row in self.steps] + [self.loss]
        if not all(map(math.isfinite, losses)):
            raise ValueError("a loss is not finite")
        ends = [0.0, *(row["train_time_s"] for row in self.steps)]
        for (begin, end), row in zip(itertools.pairwise(ends), self.steps):
            if not abs(row["step_ms"] - 1000 * (end - begin)) < 0.01:
                took = f"step {row['step']} took {1000 * (end - begin):.2f} ms by its train_time_s"
                raise ValueError(f"{took}, {row['step_ms']:.2f} by its step_ms")
        if not abs(mean_step_ms * self.num_steps / 1000 - self.time) < 0.001:
            raise ValueError(f"mean_step_ms is {mean_step_ms}, of {self.num_steps} steps")
        for row in self.validations:  # the last is the result
            step, time = row["step"], row["train_time_s"]
            behind = row.get("behind_step_s", behind_last if step == self.num_steps else 0.0)
            if not -SLACK_S <= time - ends[step] <= SLACK_S + behind:
                found = f"step_ms add up to {ends[step]:.3f} s by step {step}"
                raise ValueError(f"{found}, the train_time_s of its val_loss is {time:.3f}")

    def agrees_with(self, text: str) -> bool:
        """Whether the log has the .json's tables, steps, validations and result."""
        tables, _ = json.JSONDecoder().raw_decode(text)
        last = {"step": self.num_steps, "val_loss": self.loss, "train_time_s": self.time}
        time = "train_time {train_time_s:.3f} s"
        forms = {
            "train_loss": (f"{{train_loss:.4f}} {time} step {{step_ms:.1f}} ms", self.steps),
            "val_loss": (f"{{val_loss:.4f}} {time}", self.validations),
        }
        return (
            tables == {"environment": self.environment, "config": self.config}
            and self.run_id == self.path.stem
            and {name: self.validations[-1][name] for name in last} == last
            and all(
                re.findall(rf"^step \d+ {name} .*$", text, re.MULTILINE)
                == [f"step {row['step']} {name} {form.format(**row)}" for row in rows]
                for name, (form, rows) in forms.items()
            )
        )

    def is_copy_of(self, other: "Run") -> bool:
        files = [[read_text(run.path), read_log(run.path)] for run in (self, other)]
        return files[0] == files[1]


def read_log(path: Path) -> str:
    """The log of a run from any of its files, in full where tools/slim.py has shortened it."""
    text_path = path.with_suffix(".txt")
    text = read_text(text_path)
    if not text.startswith(slim.FIRST_WORD):
        return text
    try:
        return slim.restore(slim.read(text_path), text_path)
    except slim.SlimError as error:
        raise ReportError(f"{shown(text_path)}: is a short log and not restored: {error}") from None
    except (OSError, RecursionError) as error:
        found = f"is a short log, and what it names cannot be read ({error})"
        raise ReportError(f"{shown(text_path)}: {found}: put the script back beside it") from None


def read_run(path: Path) -> Run:
    """From any of a run's files. ReportError unless both are there, whole, and of one run."""
    text_path, json_path = path.with_suffix(".txt"), path.with_suffix(".json")
    for needed in (text_path, json_path):
        if not needed.is_file():
            found = "no such file, but a run has a .txt and a .json"
            raise ReportError(f"{shown(needed)}: {found}: put it back, or leave the run out")
    source, separator, text = read_log(path).partition(SEPARATOR)
    if not separator:
        raise ReportError(
            f"{shown(text_path)}: no line of 100 '=' behind a script: not a log of a training run"
        )
    try:
        run = Run(json_path, source, text, json.loads(read_text(json_path)))
        agrees = run.agrees_with(text)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ReportError(
            f"{shown(json_path)}: not the log of a whole run ({type(error).__name__}: {error}): "
            "leave it out"
        ) from None
    if not agrees:
        raise ReportError(
            f"{shown(json_path)}: does not say what {text_path.name} says of config, steps, "
            "validations or result: copy both again as the run left them"
        )
    return run


def check_runs(script: Path | None, runs: list[Run]) -> None:
    """Raise ReportError unless all runs are of this script, or of any one, and of one config."""
    source = read_text(script) if script else runs[0].source
    script = script or runs[0].path.with_suffix(".txt")
    for run in runs:
        if run.source != source:
            path = run.path.with_suffix(".txt")
            lines = short_diff(source, run.source, shown(script), shown(path), limit=30)
            raise ReportError(
                f"{shown(path)} was not made by {shown(script)}, it begins with another script: "
                "leave it out, or put back the script that ran\n" + "\n".join(lines)
            )
        changes = config_changes(runs[0], run, of_one_record=True)
        if changes:
            raise ReportError(
                f"{shown(runs[0].path)} and {shown(run.path)} have different options: "
                "make a record of each\n" + "\n".join(changes)
            )


def check_rules(runs: list[Run]) -> str:
    """The preset of these runs of one method, by the rules of the optimization track. Raise
    ReportError for what they do not allow."""
    rules = optimization_rules()
    try:
        rules.check_script(runs[0].source)
        preset = rules.preset_of(runs[0].config)
    except rules.RuleError as error:
        raise ReportError(f"{shown(runs[0].path)}: {error}") from None
    by_seed: dict[int, Run] = {}
    for run in runs:
        if not run.finished:
            raise ReportError(f"{shown(run.path)}: the run is not finished: run it again")
        if run.num_targets != int(run.config["val_tokens"]):
            found = f"validated on {run.num_targets:,} targets: run it with a larger shard"
            raise ReportError(f"{shown(run.path)}: {found}")
        other = by_seed.setdefault(run.seed, run)
        if other is not run:
            found = f"has the seed of {other.path.name}: leave one of them out"
            raise ReportError(f"{shown(run.path)}: {found}")
    return preset


def check_whole(script: Path) -> None:
    """Raise ReportError for a file that is the section of a submission without the rest."""
    text = read_text(script)
    if SECTION_BEGIN.search(text) and not SECTION_END.search(text):
        raise ReportError(
            f"{shown(script)}: is the Optimizer section of a submission alone: make the script by "
            f"python records/optimization/submission.py {shown(script)}, which prints its path"
        )


def check_plan(script: Path, track: str | None, options: list[str]) -> None:
    """Raise ReportError, before anything is run, for a script and options of the optimization track
    that its rules do not allow. The track is the one that was named, if any, and else is told by
    the script."""
    is_submission = SECTION_BEGIN.search(read_text(script)) is not None
    if is_submission and track not in (None, "optimization"):
        found = "a script of the optimization track"
        raise ReportError(f"{shown(script)}: {found}: give --track optimization, or another script")
    if not is_submission and track != "optimization":
        return
    rules = optimization_rules()
    try:
        rules.check_script(read_text(script))
    except rules.RuleError as error:
        raise ReportError(f"{shown(script)}: {error}") from None
    simple = rules.train_gpt_simple  # the options are read in its fixed part
    config = simple.config_as_text(simple.parse_args(options))  # or exit code 2 with a line
    try:
        rules.preset_of(config)
    except rules.RuleError as error:
        raise OptionError(f"options after --: {error}") from None


def config_changes(a: Run, b: Run, of_one_record: bool = False) -> list[str]:
    """A line for every option that differs; with of_one_record, that sets two records apart: the
    rules of the optimization track leave some options free, as the size of a micro-batch."""
    ignored = set(OWN_FIELDS)
    if of_one_record and a.track == b.track == "optimization":
        ignored |= optimization_rules().FREE.difference(COUNTED_FIELDS)
    lines = []
    for name in a.config | b.config:
        first, second = values = [run.config.get(name) for run in (a, b)]
        same = first == second
        if name in DATA_FIELDS and None not in values:
            names = [Path(value).name for value in values]
            same = names[0] == names[1]
            if name == "val_file":  # one shard, which a pattern may stand for
                same |= any(itertools.starmap(fnmatch.fnmatchcase, (names, names[::-1])))
        if name not in ignored and not same:
            lines.append(f"  {name}: {first!r} and {second!r}")
    return lines


# ==================================================================================================
# 2. Records: a script and its runs
# ==================================================================================================


class Record:
    """A folder with a script, its logs and, once it is written, a README."""

    def __init__(self, folder: Path):
        """With all checks of its logs."""
        self.folder, self.script = folder, folder / "train_gpt.py"
        readme = folder / "README.md"
        self.readme = read_text(readme) if readme.exists() else ""
        # a run that has lost a file must not be missing from the figures
        names = {path.stem for path in folder.glob("[!.]*.json")}
        names |= {path.stem for path in folder.glob("*.txt") if RUN_ID.match(path.name)}
        names |= set(re.findall(r"\[log\]\(([^/)]+)\.txt\)", self.readme))
        runs = [read_run(folder / f"{name}.json") for name in names]
        self.runs = sorted(runs, key=lambda run: (run.started, run.run_id))
        if not self.runs:
            raise ReportError(f"{shown(folder)}: no record, it has no log (<run id>.json and .txt)")
        if not self.script.is_file():
            raise ReportError(f"{shown(self.script)}: no such file: put back the script that ran")
        check_runs(self.script, self.runs)
        self.first = self.runs[0]
        self.stated_memory: str | None = None
        self.stated_track: str | None = None
        self.preset = check_rules(self.runs) if self.in_steps else ""

    @property
    def title(self) -> str:
        heading = re.search(r"^# (.+)$", self.readme, re.MULTILINE)
        return heading[1] if heading else self.folder.name[11:].replace("_", " ")

    @property
    def words(self) -> str:
        """The author's section of the README."""
        parts = re.split(f"{re.escape(AUTHOR)}|{re.escape(AUTHOR_END)}", self.readme)
        if self.readme and len(parts) != 3:
            raise ReportError(
                f"{shown(self.folder / 'README.md')}: was not written by this tool, and would be "
                f"lost: put what is to stay between the lines {AUTHOR!r} and {AUTHOR_END!r}"
            )
        return parts[1].strip() if self.readme else PLACEHOLDER

    def kept(self, figure: str, known: Iterable[str]) -> str | None:
        """What the README says in this row, if it is one of those known."""
        row = re.search(rf"^\| {figure} \| (.+) \|$", self.readme, re.MULTILINE)
        return row[1] if row and row[1] in known else None

    @property
    def memory(self) -> str:
        """The class of non-parametric memory: what --memory stated, or script and options say."""
        kept = self.kept("non-parametric memory", MEMORY)
        return self.stated_memory or kept or self.first.memory

    @property
    def track(self) -> str:
        """By name: what --track stated, or what the log says."""
        return self.stated_track or self.kept("track", TRACKS) or self.first.track

    @property
    def in_steps(self) -> bool:
        """Whether steps count, and not time: on the optimization track."""
        return self.first.track == "optimization"

    @property
    def length(self) -> str:
        return joined(run.length(TRACKS[self.track]) for run in self.runs)

    @property
    def is_toy(self) -> bool:
        if self.in_steps:
            return self.preset not in RACES
        return self.first.length(TRACKS[self.track]) == "toy"

    @property
    def kind(self) -> str:
        """The class: machine, data, length and memory, or race and data. Only within one do times
        and losses compare."""
        data = CORPORA.get(self.first.data_name, f"{self.first.data_name} data")
        if self.in_steps:
            return f"{RACES.get(self.preset, self.preset)}, {data}"
        machine = joined(run.machine for run in self.runs)
        return f"{machine}, {data}, {self.length}, non-parametric memory: {self.memory}"

    @property
    def is_baseline(self) -> bool:
        if self.in_steps:
            return optimization_rules().is_baseline(self.first.source, self.first.config)
        return self.folder.name.endswith(BASELINE)

    @property
    def target(self) -> float | None:
        """The target of the track, where the losses compare with it: on FineWeb."""
        is_open = self.first.data_name == "fineweb" and self.preset in ("", "speedrun")
        return TRACKS[self.track].target if is_open else None

    @property
    def time(self) -> float:
        return statistics.fmean(run.time for run in self.runs)

    @property
    def loss(self) -> float:
        return statistics.fmean(run.loss for run in self.runs)

    @property
    def curves(self) -> list[dict[int, float]]:
        """Validation losses by step, a run each."""
        return [{row["step"]: row["val_loss"] for row in run.validations} for run in self.runs]

    def stop(self, target: float):
        """The Result of the rules: where a record of the optimization track reaches the target."""
        return optimization_rules().stop(self.curves, target)

    @property
    def shortfalls(self) -> list[str]:
        """Why this is no claim; empty for one."""
        run, reasons, target = self.first, [], TRACKS[self.track].target
        if run.data_name != "fineweb":
            reasons.append(f"{run.data_name} data, not FineWeb")
        if self.in_steps:
            least = optimization_rules().CLAIM_RUNS
            if self.preset != "speedrun":
                reasons.append(f"preset {self.preset}")
            if len(self.runs) < least:
                reasons.append(f"fewer than {least} runs")
            if not reasons and not self.stop(target).reached:
                reasons.append(f"mean loss not below {target} by the rules")
            return reasons
        for count in dict.fromkeys(run.num_targets for run in self.runs):
            if run.data_name == "fineweb" and count != CLAIM_TARGETS:
                reasons.append(f"scored on {count:,} targets, not {CLAIM_TARGETS:,}")
        if len({run.machine for run in self.runs}) > 1:
            reasons.append("runs of different machines")
        gpus = min(run.gpus for run in self.runs)
        if gpus < CLAIM_GPUS:
            reasons.append(f"{gpus or 'no'} GPU{'s' * (gpus > 1)}, not {CLAIM_GPUS}")
        if not all(run.finished for run in self.runs):
            reasons.append("schedule not finished")
        if len(self.runs) < 2:
            reasons.append("one run")
        p = p_at_most([run.loss for run in self.runs], target)
        if not reasons and (p is None or not p < ALPHA):
            reasons.append(f"p not below {ALPHA}")
        return reasons


def record_folders(pattern: str) -> list[Path]:
    """Folders of this name, of records of all tracks."""
    parents = dict.fromkeys(RECORDS / track.folder for track in TRACKS.values())
    return [path for parent in parents for path in parent.glob(pattern) if path.name[0] != "."]


def all_records(skip: bool = False) -> list[Record]:
    """By the time of their first run. One that is not whole is an error, or skipped with a line."""
    folders = [folder for folder in record_folders("*_*") if folder.is_dir()]
    records = []
    for folder in sorted(folders):
        if DATED.fullmatch(folder.name) or (folder / "train_gpt.py").exists():
            try:
                records.append(Record(folder))
            except ReportError as error:
                if not skip:
                    raise
                warn(f"left out: {error}")
    return sorted(records, key=lambda record: record.first.started)


def check_apart(runs: Iterable[Run]) -> None:
    """Raise ReportError if one of these runs, of all records, is there twice."""
    by_id: dict[str, Run] = {}
    for run in runs:
        first = by_id.setdefault(run.run_id, run)
        if first is not run and run.is_copy_of(first):
            both = f"{shown(first.path)} and {shown(run.path)}"
            raise ReportError(
                f"{both}: are one run, and would count twice: leave it out of one record"
            )


def baseline_of(record: Record, records: list[Record]) -> Record | None:
    """The baseline of its session, where machine, data and targets are the same."""

    def conditions(of: Record) -> set:
        return {(run.machine, run.data_name, run.num_targets) for run in of.runs}

    def begin(of: Record) -> str:
        return of.folder.name.removesuffix(BASELINE)

    name = record.folder.name
    found = [r for r in records if r.is_baseline and f"{name}_".startswith(f"{begin(r)}_")]
    if record.is_baseline or not found:
        return None
    nearest = max(found, key=lambda other: len(begin(other)))
    return nearest if conditions(nearest) == conditions(record) else None


def last_of_class(record: Record, records: list[Record]) -> Record | None:
    """The one before it of its class; before a baseline, the baseline before."""
    same = [
        other
        for other in records
        if (other.track, other.kind, other.is_baseline)
        == (record.track, record.kind, record.is_baseline)
        and other.first.started < record.first.started
    ]
    return same[-1] if same else None


# Figures ------------------------------------------------------------------------------------------


def spread(values: Iterable[float], digits: int) -> str:
    """Mean and, of several, standard deviation."""
    values = list(values)
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def are_equal(losses: list[float]) -> bool:
    """One alone, or several that only rounding may tell apart: there is no deviation to test by."""
    return max(losses) - min(losses) < 1e-9


def p_at_most(losses: list[float], target: float) -> float | None:
    """One-sided t-test: probability of losses this low if their mean were above the target. None
    for one loss, or equal ones: they allow no test."""
    from scipy import stats

    if are_equal(losses):
        return None
    return float(stats.ttest_1samp(losses, target, alternative="less").pvalue)


def p_different(a: list[float], b: list[float]) -> float | None:
    """Welch's two-sided t-test: probability of means this far apart if they were the same. None
    where one side has one loss, or equal ones: they allow no test."""
    from scipy import stats

    if are_equal(a) or are_equal(b):
        return None
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def format_p(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def target_test(losses: list[float], target: float) -> str:
    p = p_at_most(losses, target)
    what = f"one-sided t-test that the mean is at most {target}"
    if p is None:
        return f"{what}: {'one run allows' if len(losses) < 2 else 'equal losses allow'} no test"
    return f"{what}: p = {format_p(p)}, {'' if p < ALPHA else 'not '}under {ALPHA}"


def stage_spread(runs: list[Run]) -> dict[str, list[float]]:
    """Milliseconds a step of every run, by stage."""
    tables = [run.stage_ms for run in runs]
    return {name: [table[name] for table in tables if name in table] for name in tables[0]}


def counted(number: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{number} {noun}{'s' * (number != 1)}"


def joined(values: Iterable[object]) -> str:
    """The distinct ones, in order."""
    return " and ".join(dict.fromkeys(map(str, values)))


# Races of the optimization track ------------------------------------------------------------------


def race_baseline(records: Iterable[Record]) -> Record | None:
    """Of records of one race, by time: the first Muon baseline with enough runs for a claim, or
    else the first one."""
    baselines = [record for record in records if record.is_baseline]
    least = optimization_rules().CLAIM_RUNS
    whole = (record for record in baselines if len(record.runs) >= least)
    return next(whole, baselines[0] if baselines else None)


class Race:
    """Records of the optimization track with one preset and data, the fewest steps last."""

    def __init__(self, records: list[Record]):
        """Records of one class, by time. Where their losses do not compare with the target of the
        track, the target is the loss of the Muon baseline at its end, and None without that."""
        self.kind, self.baseline = records[0].kind, race_baseline(records)
        self.target, self.target_setter = records[0].target, None
        if self.target is None and self.baseline:
            self.target, self.target_setter = self.baseline.loss, self.baseline
        self.records, self.results = records, {}
        if self.target is not None:
            self.results = {record: self.result(record) for record in records}
            self.records = sorted(records, key=self.rank)

    @property
    def provisional(self) -> str:
        """What to say behind a target that too few runs have set; empty for another."""
        count = len(self.target_setter.runs) if self.target_setter else math.inf
        few = count < optimization_rules().CLAIM_RUNS
        return f", provisional: {counted(count, 'run')}" if few else ""

    def result(self, record: Record):
        """Where its runs stop, a Result of the rules."""
        if record is self.target_setter:
            losses = [run.loss for run in record.runs]
            return optimization_rules().Result(record.first.num_steps, losses, True)
        return record.stop(self.target)

    def rank(self, record: Record) -> tuple:
        result = self.results[record]
        return result.reached, -result.step, -result.mean

    def steps(self, record: Record) -> str:
        result = self.results[record]
        return f"{result.step}" if result.reached else f"not by {result.step}"

    def against(self, old: Record, new: Record) -> tuple[str, str]:
        """The statistic of the rules' test of two methods, and whether the new one is better."""
        rules = optimization_rules()
        value = rules.pairwise_statistic(self.results[old], self.results[new])
        return signed(value), "yes" if value >= rules.MARGIN else "no"


def all_races(records: Iterable[Record]) -> list[Race]:
    """Of those records that are of the optimization track, in the order of RACES."""
    groups: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        if record.in_steps and not record.is_toy:
            groups.setdefault(([*RACES].index(record.preset), record.kind), []).append(record)
    return [Race(groups[key]) for key in sorted(groups)]


# ==================================================================================================
# 3. Differences between scripts
# ==================================================================================================


def owners(source: str) -> list[str]:
    """For every line, whose it is: a function, Class.method, class, table, or the top level."""
    names, name = [], "top level"
    for line in source.splitlines():
        found = re.match(r"(?:def|class) (\w+)|(\w+)(?:: \S+)? = |(    )def (\w+)|(\S)", line)
        if found and found[3]:
            name = f"{name.split('.')[0]}.{found[4]}"
        elif found and (found[1] or found[2]):
            name = found[1] or found[2]
        elif found and found[5] not in ")]}":
            name = "top level"
        names.append(name)
    return names


def describe_changes(old: str, new: str) -> list[str]:
    """Lines added and removed in all, then what is new, gone and changed, a line each."""
    before, after = owners(old), owners(new)
    added, removed = Counter(), Counter()
    matcher = difflib.SequenceMatcher(None, old.splitlines(), new.splitlines())
    for kind, old_begin, old_end, new_begin, new_end in matcher.get_opcodes():
        if kind != "equal":
            removed.update(before[old_begin:old_end])
            added.update(after[new_begin:new_end])
    parts: dict[str, list[str]] = {"new": [], "gone": [], "changed": []}
    for name in dict.fromkeys([*after, *before]):
        if added[name] or removed[name]:
            kind = "new" if name not in before else "gone" if name not in after else "changed"
            counts = " ".join(f"{s}{n[name]}" for s, n in (("+", added), ("−", removed)) if n[name])
            parts[kind].append(f"{name if name == 'top level' else f'`{name}`'} {counts}")
    if not any(parts.values()):
        return ["The scripts are the same."]
    lines = [f"{added.total()} lines added, {removed.total()} removed."]
    return lines + [f"{kind}: {', '.join(names)}" for kind, names in parts.items() if names]


def short_diff(old: str, new: str, old_name: str, new_name: str, limit: int) -> list[str]:
    """A unified diff cut after `limit` lines."""
    texts = old.splitlines(), new.splitlines()
    lines = list(difflib.unified_diff(*texts, old_name, new_name, n=1, lineterm=""))
    more = len(lines) - limit
    rest = f"… {more} more lines: diff {old_name} {new_name}"
    return lines[:limit] + ([rest] if more > 0 else [])


# ==================================================================================================
# 4. Running scripts
# ==================================================================================================


def take_seed(options: list[str], default: int | None) -> tuple[list[str], int | None]:
    """The options without --seed, and its value."""
    parser = console.Parser(usage=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    number = console.number(int, 0, 2**63 - 1 - MOST_RUNS)
    parser.add_argument("--seed", type=number, default=default)
    for name in OUTPUT_OPTIONS:
        parser.add_argument(name)
    known, rest = parser.parse_known_args(options)
    if rest and not rest[0].startswith("--"):
        raise OptionError(f"options after -- are those of train_gpt.py: {rest[0]!r} is none")
    for name in OUTPUT_OPTIONS:
        if getattr(known, name[2:]) is not None:
            found = "the runs write to a folder of their own, and their logs go to logs/"
            raise OptionError(f"{name} after --: {found}: leave it out")
    return rest, known.seed


def default_seed(script: Path) -> int:
    found = re.search(r"^    seed: int = (\d+)", read_text(script), re.MULTILINE)
    return int(found[1]) if found else 1


def portable(path: str) -> str:
    """What a page says of a file of data: relative to the repository where it lies inside."""
    return shown(Path(path)) if os.path.isabs(path) else path


def options_of(run: Run, script: Path) -> list[str]:
    """The options, less the seed, that make the script train with the config of this run: a preset
    and what differs from it, or everything where the script has no presets to tell."""
    code = "import json, train_gpt as t; tables = t.PRESETS.items(); "
    code += "print(json.dumps({name: t.config_as_text(config) for name, config in tables}))"
    command = [sys.executable, "-B", "-c", code]
    result = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, check=False)
    presets = {"": {}}
    if result.returncode == 0:  # behind what the script itself may print
        presets = json.loads(result.stdout.splitlines()[-1])
    candidates = []
    for preset, defaults in presets.items():
        options = ["--preset", preset] if preset else []
        for name, value in run.config.items():
            is_option = name not in OWN_FIELDS and name in (defaults or run.config)
            value = portable(value) if name in DATA_FIELDS else value
            if is_option and value != defaults.get(name):
                options += [f"--{name}", value]
        candidates.append(options)
    return min(candidates, key=len)


def take_data(options: list[str]) -> tuple[list[str], list[str]]:
    """The files of data that options name, and the options without them: with none of them run.sh
    fetches FineWeb, which is what scripts train on."""
    parser = console.Parser(usage=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    for name in DATA_OPTIONS:
        parser.add_argument(name)
    known, rest = parser.parse_known_args(options)
    return [path for path in vars(known).values() if path is not None], rest


def moves_to_fineweb(run: Run) -> bool:
    """Whether --fineweb changes what the run trains on: not FineWeb, nor the built-in sample."""
    return run.data_name not in ("fineweb", "sample")


def put_on_fineweb(command: str, records: Iterable[Record]) -> list[list[str]]:
    """The options of each record's runs, for the command with --fineweb: without the record's
    files, so that FineWeb is fetched. Raise OptionError where that changes nothing."""
    records = list(records)
    moved = [record for record in records if moves_to_fineweb(record.first)]
    if not moved:
        found = "scripts that are no records have no data of their own"
        if records:
            names = joined(record.first.data_name for record in records)
            found = f"the record's own data is {names}, which is there"
        raise OptionError(f"{command}: --fineweb: {found}: leave it out")
    options = [options_of(record.first, record.script) for record in records]
    for record, own in zip(records, options, strict=True):
        if record in moved and own[:2] == ["--preset", "tiny"]:  # run.sh then takes the sample
            found = "has the tiny preset, whose data is the built-in sample"
            remedy = f"leave it out, or give shards behind --, as {' and '.join(DATA_OPTIONS)}"
            raise OptionError(f"{command}: --fineweb: {shown(record.folder)} {found}: {remedy}")
    compares = "times compare with the record's, losses do not"
    print(f"on FineWeb in place of the record's data: {compares}")
    if any(int(record.first.config.get("match_shards", 0)) for record in moved):
        print("its shards hold more tokens, so reading some ahead takes longer than recorded")
    return [take_data(own)[1] if record in moved else own for record, own in zip(records, options)]


def check_data(own: list[str], options: list[str], offer: bool) -> None:
    """Raise ReportError where this machine lacks shards that a record's own options or those behind
    -- name; for a record's, offer FineWeb."""
    others = f"give others behind --, as {DATA_OPTIONS[0]} and {DATA_OPTIONS[1]}"
    check_shards(options, others)
    fineweb = "add --fineweb to run on FineWeb in its place (times then compare with the record's, "
    check_shards(own + options, f"{fineweb}losses do not)" if offer else others)


def check_shards(options: list[str], remedy: str) -> None:
    """Raise ReportError where the options name shards that this machine lacks."""
    for pattern in take_data(options)[0]:
        if not glob.glob(pattern, root_dir=ROOT):
            found = "this machine has no such shards"
            if Path(pattern).name.startswith("proxy_"):
                found += ", and the proxy corpus cannot be downloaded"
            raise ReportError(f"{pattern}: {found}: {remedy}")


@contextlib.contextmanager
def clean_copy(script: Path) -> Iterator[Path]:
    """A temporary folder with this script, the launcher, and the repository's data. It stays where
    logs could not be copied from it."""
    folder = Path(tempfile.mkdtemp(prefix="speedrun_"))
    try:
        shutil.copyfile(script, folder / "train_gpt.py")
        shutil.copy(ROOT / "run.sh", folder / "run.sh")
        (folder / "data").symlink_to(ROOT / "data")
        yield folder
    finally:
        if all((LOGS / path.name).exists() for path in folder.glob("logs/*")):
            shutil.rmtree(folder)
        else:
            warn(f"logs that could not be copied to {shown(LOGS)} stay in {folder / 'logs'}")


def launch(folder: Path, options: list[str], seed: int) -> Run:
    """Train like a user in that clean copy; the logs go to logs/, those of a run that fails too."""
    command = ["./run.sh", *options, "--seed", str(seed), "--log_dir", "logs"]
    environment = {**os.environ, "PYTHON": sys.executable}
    before = set(folder.glob("logs/*.txt"))
    sys.stdout.flush()
    try:
        code = console.call(command, cwd=folder, env=environment)
    finally:
        new = [copy_logs(path, LOGS) for path in set(folder.glob("logs/*.txt")) - before]
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        raise ReportError(f"the run ended with exit code {code}: {shlex.join(command)}")
    if len(new) != 1:
        raise ReportError(
            f"the run left {'no log' if not new else f'{len(new)} logs'}, not one: is its script "
            f"one that trains? {shlex.join(command)}"
        )
    return read_run(new[0])


def copy_logs(path: Path, folder: Path) -> Path:
    """Copy a run's files where they are not there yet, a short log in full, without its curve to a
    record, whose picture has those of all runs; returns the .json's new path."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in (".txt", ".json", ".png") if folder == LOGS else (".txt", ".json"):
        source = path.with_suffix(suffix)
        target = folder / source.name
        if not source.exists() or source.resolve().parent == folder.resolve():
            continue
        if suffix != ".txt":
            replace(target, functools.partial(shutil.copyfile, source))
            continue
        log = read_log(source)
        if not target.is_file() or read_log(target) != log:  # what is there may be short
            write_text(target, log)
    return folder / path.with_suffix(".json").name


# ==================================================================================================
# 5. Pictures
# ==================================================================================================


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label_point(axes, point: tuple, text: str, **place: object):
    place = {"xytext": (0, 8), "ha": "center", "fontsize": 8} | place
    return axes.annotate(text, point, textcoords="offset points", **place)


def part_labels(figure, labels: list, level: float | None = None) -> None:
    """Put each label beside its point, where it hides no other label, no point, and no line drawn
    at this level."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # settles where points are
    taken = []
    for axes in {label.axes for label in labels if level is not None}:
        y = axes.transData.transform((0, level))[1]
        taken.append(Bbox.from_extents(axes.bbox.x0, y - 1, axes.bbox.x1, y + 1))
    for label in labels:
        x, y = label.axes.transData.transform(label.xy)
        taken.append(Bbox.from_extents(x - 6, y - 6, x + 6, y + 6))
    for label in sorted(labels, key=lambda label: -label.xy[1]):
        for y, side in itertools.product((8, -8, 0, 17, -17, 26, -26, 35, -35), ("left", "right")):
            label.xyann = (7 if side == "left" else -7, y)
            label.set_horizontalalignment(side)
            box = Text.get_window_extent(label)  # without the line to its point
            outside = box.x0 < label.axes.bbox.x0 or box.x1 > label.axes.bbox.x1
            if not outside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def smoothed(run: Run, x: str = "train_time_s") -> tuple:
    """Seconds or steps and training losses, both as moving averages over a thirtieth of the run."""
    import numpy as np

    width = max(1, len(run.steps) // 30)
    columns = ([row[name] for row in run.steps] for name in (x, "train_loss"))
    return tuple(np.convolve(column, np.ones(width) / width, "valid") for column in columns)


def validated(run: Run, x: str = "train_time_s") -> tuple[list, list]:
    """Seconds or steps and validation losses."""
    return tuple([row[name] for row in run.validations] for name in (x, "val_loss"))


def fit_losses(axes, losses: list[float], share: float) -> None:
    """Limits of the axis that leave out the first fall: of the losses, show this share."""
    losses = sorted(losses)
    bottom, top = losses[0], losses[int(share * (len(losses) - 1))]
    margin = 0.05 * (top - bottom) + 0.02
    axes.set_ylim(bottom - margin, top + margin)


def draw_losses(record: Record, path: Path) -> None:
    """Losses of all runs against seconds, or steps where they count, a color a seed."""
    from matplotlib import colormaps

    figure, axes = new_figure(8, 5)
    losses, few = [], len(record.runs) <= 10
    x = "step" if record.in_steps else "train_time_s"
    for i, run in enumerate(record.runs):
        color = f"C{i}" if few else colormaps["turbo"](i / (len(record.runs) - 1))
        times, means = smoothed(run, x)
        axes.plot(times, means, color=color, linewidth=1, alpha=0.6, zorder=1)
        rows = validated(run, x)
        label = f"seed {run.seed}: {run.loss:.4f} in {run.time:.2f} s"
        if record.in_steps:
            label = f"seed {run.seed}: {run.loss:.4f} after {run.num_steps} steps"
        axes.plot(*rows, "oDs^v"[i % 5], linestyle="", color=color, markersize=6, label=label)
        losses += [*means, *rows[1]]
    if record.target is not None:
        style = {"color": "black", "linestyle": "--", "linewidth": 1}
        axes.axhline(record.target, label=f"target {record.target}", **style)
        losses.append(record.target)
    fit_losses(axes, losses, 0.93)
    for begin in record.first.stage_begins[1:]:
        if 0 < begin < record.first.num_steps:
            end = record.first.steps[begin - 1]["train_time_s"]
            axes.axvline(end, color="0.85", linewidth=1, zorder=0)
    axes.set_title(f"{record.title}\n{record.kind}", fontsize=9)
    axes.set_xlabel("training time (s); vertical lines: a new stage of the schedule")
    if record.in_steps:
        axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    columns = 1 + (len(record.runs) - 1) // 12
    legend = "markers: validation, lines: training, smoothed"
    how = {"frameon": False, "fontsize": 9, "title_fontsize": 9}
    axes.legend(ncols=columns, title=legend, loc="upper right", **how)
    if len(record.runs) > 1:
        draw_end(record, axes, x)
    figure.savefig(path, dpi=120)


def free_place(axes) -> tuple[float, float, float, float]:
    """The one of INSETS in which the fewest points of lines and markers would be hidden."""
    axes.get_xlim(), axes.get_ylim()  # as they will be drawn
    points = [point for line in axes.get_lines() for point in zip(*line.get_data(), strict=True)]
    places = axes.transAxes.inverted().transform(axes.transData.transform(points))

    def hidden(place: tuple[float, float, float, float]) -> int:
        left, bottom, width, height = place
        return sum(left <= x <= left + width and bottom <= y <= bottom + height for x, y in places)

    return min(INSETS, key=hidden)


def draw_end(record: Record, axes, x: str) -> None:
    """The end of the same lines and markers once more, so large that seeds are told apart."""
    inset = axes.inset_axes(free_place(axes))
    for line in axes.get_lines():
        inset.plot(*line.get_data(), color=line.get_color(), marker=line.get_marker(),
                   linestyle=line.get_linestyle(), linewidth=1, markersize=6)  # fmt: skip
    times, losses = zip(*((run.validations[-1][x], run.loss) for run in record.runs))
    begin = 0.9 * min(times)
    for run in record.runs:
        losses += tuple(loss for second, loss in zip(*smoothed(run, x)) if second >= begin)
    inset.set_xlim(begin, 1.01 * max(times))
    margin = 0.1 * (max(losses) - min(losses)) + 0.001
    inset.set_ylim(min(losses) - margin, max(losses) + margin)
    inset.tick_params(labelsize=8)
    inset.grid(alpha=0.3)


def newest_session(records: list[Record]) -> list[Record]:
    """The baseline that was run last together with other records, and these; or nothing."""
    for baseline in reversed(records):
        others = [record for record in records if baseline_of(record, records) is baseline]
        if others:
            return [baseline, *sorted(others, key=lambda record: -record.time)]
    return []


# The palette of both pictures of all records.
BASELINE_COLOR = "0.35"
MEMORY_COLORS = {"none": "#1f6fb4", "n-gram lookup": "#e07b1a", "document": "#3a923a"}
MORE_COLORS = "#8a5fb0", "#c03d3e", "#7d6a4f"  # for a second series of a class of memory, and so on


def series_colors(memories: Iterable[str]) -> list[str]:
    """A color for each series: that of its class of memory, if no series before it has it."""
    colors: list[str] = []
    more = itertools.cycle(MORE_COLORS)
    for memory in memories:
        color = MEMORY_COLORS[memory]
        colors.append(next(more) if color in colors else color)
    return colors


def draw_race(records: list[Record], path: Path) -> None:
    """Loss against seconds of the newest session: the baseline and what ran with it."""
    session = newest_session(records)
    figure, axes = new_figure(8, 4.5)
    losses, baseline = [], session[0]
    colors = [BASELINE_COLOR, *series_colors(record.memory for record in session[1:])]
    for record, color in zip(session, colors, strict=True):
        name = "baseline (record-89 recipe)" if record is baseline else "this project"
        name += f", {record.memory}" if record.memory != "none" else ""
        label = f"{name}: loss {record.loss:.3f} in {record.time:.1f} s"
        for run in record.runs:
            times, means = smoothed(run)
            axes.plot(times, means, color=color, linewidth=1.1, alpha=0.55, label=label)
            label = None
            losses += [*means]
        for run in record.runs:  # on top of all lines
            points = validated(run)
            axes.plot(*points, "o", color=color, markersize=7, markeredgecolor="white", zorder=4)
            losses += points[1]
        faster = "" if record is baseline else f"\n{baseline.time / record.time:.2f}×"
        place = {"xytext": (0, -9), "va": "top", "color": color, "fontsize": 12}
        text, lowest = f"{record.time:.1f} s{faster}", min(run.loss for run in record.runs)
        label_point(axes, (record.time, lowest), text, fontweight="bold", **place)
    axes.axhline(baseline.loss, color=BASELINE_COLOR, linestyle=":", linewidth=1.2, zorder=1)
    fit_losses(axes, losses, 0.8)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom - 0.1 * (top - bottom), top)  # for what stands below the dots
    axes.set_xlim(0, 1.05 * max(run.time for record in session for run in record.runs))
    run = baseline.first
    seeds = f"{len(baseline.runs)} seed{'s' * (len(baseline.runs) > 1)} each"
    data = CORPORA.get(run.data_name, run.data_name)
    axes.set_title("Loss against training time", loc="left", fontweight="bold", fontsize=13, pad=24)
    where = f"{run.machine}, {data}, {baseline.length}, {seeds}"
    axes.text(0, 1.02, where, transform=axes.transAxes, fontsize=11, va="bottom")
    axes.set_xlabel("training time (s)", fontsize=12)
    axes.set_ylabel("loss (nats per token)", fontsize=12)
    axes.tick_params(labelsize=11)
    title = "dots: validation loss; lines: training loss, smoothed"
    how = {"fontsize": 11, "title_fontsize": 11, "alignment": "left", "framealpha": 0.9}
    for handle in axes.legend(title=title, **how).legend_handles:
        handle.set(linewidth=2.5, alpha=1)
    figure.savefig(path, dpi=200)


def classes(records: list[Record]) -> dict[str, list[tuple[int, Record]]]:
    """Records by class, the class of the newest first, each with its number in order of time."""
    groups: dict[str, list[tuple[int, Record]]] = {}
    for number, record in enumerate(records, 1):
        groups.setdefault(record.kind, []).append((number, record))
    newest = sorted(groups, key=lambda kind: groups[kind][-1][0], reverse=True)
    return {kind: groups[kind] for kind in newest}


MARKERS = {"none": "o", "n-gram lookup": "D"}  # other memory: a square


def draw_history(records: list[Record], path: Path) -> None:
    """Speed-up over the baseline of its session against date; on the left the public frontier, in
    the same unit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    public, own = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2.3))
    for axes in (public, own):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    public.set_ylabel("speed-up over the baseline of the same session")
    frontier = draw_public(public)
    style = {"color": "black", "linewidth": 1.5, "linestyle": ":"}
    own.axhline(frontier, label="the public frontier, merged", **style)
    labels = draw_speed_ups(records, own)
    own.set_ylim(0.8, 1.12 * own.get_ylim()[1])
    figure.legend(loc="outside lower left", frameon=False, fontsize=9)
    part_labels(figure, labels, frontier)
    figure.savefig(path, dpi=120)


def draw_public(axes) -> float:
    """The public records and proposals; returns the speed-up of the last record that is merged."""
    days, speeds = [PUBLIC[0][1] - timedelta(days=7)], [1.0]
    for name, day, seconds, memory, merged in PUBLIC:
        speed = PUBLIC_BASELINE / seconds
        color = "black" if merged else "white"
        marker = MARKERS.get(memory, "s")
        axes.plot(day, speed, marker, color="black", markerfacecolor=color, markersize=7, zorder=3)
        place = {"xytext": (6, -26), "ha": "left"} if merged else {"xytext": (0, 9)}
        text = f"{name}\n{seconds:.1f} s = {speed:.2f}×"
        label_point(axes, (day, speed), text, fontsize=9, **place)
        if merged:
            days += [day, day]
            speeds += [speeds[-1], speed]
    last = max(day for _, day, *_ in PUBLIC) + timedelta(days=5)
    axes.plot([*days, last], [*speeds, speeds[-1]], color="black", linewidth=1.5)
    text = f"record 89\n{PUBLIC_BASELINE:.1f} s"
    label_point(axes, (days[0], 1), text, xytext=(5, 8), ha="left", fontsize=9)
    axes.set_xlim(days[0], last)
    axes.set_xticks([PUBLIC[0][1], PUBLIC[1][1]], ["28 Sep", "early Oct"])
    axes.set_title(
        f"modded-nanogpt, 8 × H100,\nFineWeb, to a loss of {TRACKS['main'].target}", fontsize=10
    )
    return speeds[-1]


def draw_speed_ups(records: list[Record], axes) -> list:
    """Those of our records that have a baseline, a series a class; returns the labels."""
    from matplotlib import dates

    labels, starts, series = [], [], {}
    for kind, members in classes(records).items():
        points = [(n, record, baseline_of(record, records)) for n, record in members]
        points = [(n, record, base) for n, record, base in points if base]
        if points:
            series[kind] = points
    memories = [points[0][1].memory for points in series.values()]
    colors = series_colors(memories)
    for (kind, points), memory, color in zip(series.items(), memories, colors, strict=True):
        days = [dates.date2num(record.first.started) for _, record, _ in points]
        speeds = [base.time / record.time for _, record, base in points]
        marker = MARKERS.get(memory, "s")
        axes.plot(days, speeds, f":{marker}", color=color, label=kind)
        for (number, record, base), day, speed in zip(points, days, speeds):
            if record.loss > base.loss:
                axes.plot(day, speed, marker, color=color, markerfacecolor="white")
            line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0}
            style = {"arrowprops": line, "bbox": {"facecolor": "white", "linewidth": 0, "pad": 0.5}}
            text = f"#{number}: {speed:.2f}×"
            labels.append(label_point(axes, (day, speed), text, va="center", **style))
            starts.append(record.first.started)
    if starts:
        margin = max((max(starts) - min(starts)) / 6, timedelta(days=1))
        axes.set_xlim(min(starts) - margin, max(starts) + margin)
    locator = dates.AutoDateLocator(minticks=3, maxticks=6)
    locator.intervald[dates.HOURLY] = [24]  # days are fine enough
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(dates.DateFormatter("%d %b"))
    title = "this project (# as in the table);\nhollow: the loss is above the baseline's"
    axes.set_title(title, fontsize=10)
    return labels


def draw_medium(records: list[Record], path: Path) -> None:
    """Losses of the medium track's records against seconds, a color a record."""
    figure, axes = new_figure(9, 5.5)
    losses = []
    for i, record in enumerate(records):
        label = f"#{i + 1} {record.title}: {record.loss:.3f} in {record.time:.1f} s\n{record.kind}"
        for run in record.runs:
            times, means = smoothed(run)
            axes.plot(times, means, color=f"C{i}", linewidth=1, alpha=0.55, label=label)
            points = validated(run)
            axes.plot(*points, "o", color=f"C{i}", markeredgecolor="white", zorder=4)
            label = None
            losses += [*means, *points[1]]
    targets = {record.target for record in records} - {None}
    for target in targets:
        axes.axhline(target, color="black", linestyle="--", linewidth=1, label=f"target {target}")
    fit_losses(axes, [*losses, *targets], 0.9)
    axes.set_title("Medium track (# as in the table)", loc="left", fontweight="bold")
    axes.set_xlabel("training time (s)")
    axes.set_ylabel("loss (nats per token); dots: validation, lines: training, smoothed")
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    figure.savefig(path, dpi=120)


def draw_optimization(records: list[Record], path: Path) -> None:
    """Mean validation losses of every race's methods against steps, and where they reach the
    target; a panel a race."""
    from matplotlib.figure import Figure

    races = all_races(records)
    figure = Figure(figsize=(9, 5 * len(races)), layout="constrained")
    for race, axes in zip(races, figure.subplots(len(races), squeeze=False)[:, 0], strict=True):
        losses = []
        for i, record in enumerate(reversed(race.records)):
            common = sorted(set.intersection(*map(set, record.curves)))
            means = [statistics.fmean(curve[step] for curve in record.curves) for step in common]
            label, result = f"{record.title}, mean of {len(record.runs)}", race.results.get(record)
            if result:
                label += f": {race.steps(record)} steps"
            color = BASELINE_COLOR if record is race.baseline else f"C{i}"
            style = {"linewidth": 1.2, "marker": "o", "markersize": 3}
            axes.plot(common, means, color=color, label=label, **style)
            if result and result.reached:
                axes.plot(result.step, result.mean, "o", color=color, markersize=7, zorder=3)
            losses += means
        if race.target is not None:
            style = {"color": "black", "linestyle": "--", "linewidth": 1}
            axes.axhline(race.target, label=f"target {race.target:.4f}", **style)
        losses = sorted(losses)
        fit_losses(axes, losses, 0.7)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(race.kind, fontsize=10)
        axes.set_xlabel("optimizer step; dots: validations, large where the target is reached")
        axes.set_ylabel("validation loss (nats per token)")
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


# ==================================================================================================
# 6. Pages
# ==================================================================================================


def markdown_table(header: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def folded(title: str, text: str) -> str:
    """What a page shows on a click alone."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def fenced(lines: list[str], language: str = "") -> str:
    fence = "`" * 4  # more than a script has in a row
    return "\n".join([fence + language, *lines, fence])


def signed(number: float) -> str:
    return f"{number:+.4f}".replace("-", "−")


def link(record: Record, page: Path) -> str:
    """To its folder, for a page in this one."""
    return Path(os.path.relpath(record.folder, page)).as_posix()


def difference(record: Record, records: list[Record]) -> str:
    """What the script changed against the last record of its class, or the baseline of its race,
    folded."""
    if record.in_steps:
        same = (each for each in records if (each.track, each.kind) == (record.track, record.kind))
        old = race_baseline(same)
        if old is None or old.folder == record.folder:
            return "This is the baseline." if old else "The baseline has no runs in this race."
    else:
        old = last_of_class(record, records)
        if old is None:
            return "This is the first of its class."
    texts = read_text(old.script), read_text(record.script)
    summary, *parts = describe_changes(*texts)
    found = f"[{old.title}]({link(old, record.folder)}): {summary}"
    if not parts:
        return found
    lines = short_diff(*texts, shown(old.script), shown(record.script), limit=DIFF_LINES)
    changes = folded("by function", "\n".join(f"- {part}" for part in parts))
    return "\n\n".join([found, changes, folded("the diff", fenced(lines, "diff"))])


def without_links(text: str) -> str:
    return re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text)


def speed_up(record: Record, records: list[Record]) -> str:
    """Over the baseline of its session, in words."""
    baseline = baseline_of(record, records)
    if record.is_baseline:
        return "this is the baseline of its session"
    if not baseline:
        return "no baseline in its session"
    p = p_different(*([run.loss for run in each.runs] for each in (record, baseline)))
    test = "" if p is None else f" (Welch's two-sided t-test: p = {format_p(p)})"
    there = f"[the baseline of its session]({link(baseline, record.folder)})"
    loss = signed(record.loss - baseline.loss)
    return f"{baseline.time / record.time:.2f}× over {there}, loss {loss}{test}"


def race_figures(record: Record, records: list[Record]) -> dict[str, str]:
    """Of a record of the optimization track, beside the records of its race."""
    if record.is_toy:
        return {"race": f"none: {record.kind}"}
    race = next(race for race in all_races(records) if race.kind == record.kind)
    (record,) = (each for each in race.records if each.folder == record.folder)
    figures = {"race": race.kind}
    if race.target is None:
        return figures | {"steps to the target": "no target: the Muon baseline has no runs here"}
    result, rules = race.results[record], optimization_rules()
    loss = f"loss {spread(result.losses, 4)} there, target {race.target:.4f}"
    figures["steps to the target"] = f"{race.steps(record)}, {loss}"
    if record is race.target_setter:
        figures["steps to the target"] += f", which this record sets{race.provisional}"
    else:
        value = signed(rules.target_statistic(result.losses, race.target))
        figures["test"] = f"(target − loss) · √n = {value}, to be at least {rules.MARGIN}"
    if race.baseline not in (None, record):
        value, better = race.against(race.baseline, record)
        there = f"[the Muon baseline]({link(race.baseline, record.folder)})"
        sign = "≥" if better == "yes" else "<"
        figures["pairwise test"] = f"better than {there}: {better} ({value} {sign} {rules.MARGIN})"
    return figures


def write_page(folder: Path, memory: str | None = None, track: str | None = None) -> Record:
    """Write loss.png and README.md of a record, keeping title, author's words, and what was stated
    of memory and track."""
    record = Record(folder)
    record.stated_memory, record.stated_track = memory, track
    words, runs, run = record.words, record.runs, record.first
    losses = [run.loss for run in runs]
    seeds = ", ".join(str(run.seed) for run in runs)
    begin, source = ["./run.sh"], "with `train_gpt.py` of this folder"
    if record.in_steps:
        begin += ["optimization", shown(record.script)]
        source = "in the root of the repository"
    command = shlex.join([*begin, *options_of(run, record.script)])
    marks = f" ({'; '.join(record.shortfalls)}: no claim)" if record.shortfalls else ""
    several = " (mean ± standard deviation)" if len(runs) > 1 else ""
    ended = "" if run.finished else f", ended after {run.num_steps}"
    stages = stage_spread(runs).items()
    corpus = CORPORA.get(run.data_name, run.data_name)
    data = f"{corpus}: `{portable(run.config['train_files'])}`; "
    data += f"validation on {run.num_targets:,} targets"
    records = all_records(skip=True)
    schedule = run.config["num_steps"]
    if int(run.config["extension_steps"]):
        schedule += f" + {run.config['extension_steps']}"
    figures = {
        "track": record.track,
        "machine": joined(run.machine for run in runs),
        "versions": joined(run.versions for run in runs),
        "data": data,
        "non-parametric memory": record.memory,
        "schedule": f"{schedule} steps{ended}",
        "runs": f"{len(runs)}, seed{'s' * (len(runs) > 1)} {seeds}{marks}",
        "time": f"{spread((run.time for run in runs), 2)} s{several}",
        "validation loss": f"{spread(losses, 4)}{several}",
    }
    if record.in_steps:
        del figures["non-parametric memory"]  # the model is fixed
        figures |= race_figures(record, records)
    else:
        figures["speed-up"] = speed_up(record, records)
        figures["test"] = target_test(losses, TRACKS[record.track].target)
    figures["ms a step"] = ", ".join(f"{name} {spread(ms, 1)}" for name, ms in stages)
    rows = [
        [str(r.seed), f"{r.loss:.4f}", f"{r.time:.2f} s", f"[log]({r.run_id}.txt)"] for r in runs
    ]
    before = "baseline of its race" if record.in_steps else "last record of its class"
    on_fineweb = ""
    if run.data_name == "proxy":
        on_fineweb = (
            "; add `--fineweb` where there is no proxy corpus (times compare, losses do not)"
        )
    page = f"""# {record.title}

{AUTHOR}
{words}
{AUTHOR_END}

{markdown_table(["figure", "value"], figures.items())}

{markdown_table(["seed", "validation loss", "time", "log"], rows)}

![losses of all runs](loss.png)

## Against the {before}

{difference(record, records)}

## Command

For every seed ({seeds}), {source}:

```bash
{command} --seed SEED
```

`./run.sh reproduce {shown(folder)}` runs it again beside these figures{on_fineweb}.
"""
    write_text(folder / "README.md", page)
    draw(functools.partial(draw_losses, record), folder / "loss.png")
    return Record(folder)


PROXY = """**The data.** {count} of these records use a proxy corpus that is not public: 160
to 220 million GPT-2 tokens of English prose, in documents about as long as FineWeb's, with a
held-out validation shard. Their losses compare with each other, and with no loss on FineWeb or
elsewhere. Their times compare: `./run.sh reproduce records/FOLDER --fineweb` runs a record on
FineWeb.

"""


SPEED_UP = """**Speed-up** is the baseline's time over the record's, of one session on one machine
with interleaved runs; Δ loss is the record's loss less the baseline's.
"""
MAIN = """The baseline is the recipe of record 89 of modded-nanogpt with this project's kernels,
on a short schedule of its own. A result on a short schedule need not hold on a whole one.
"""
STEPS = """Wall clock is free, so records of all machines compare. The page of the track has its
[rules](optimization/README.md#rules) and [methods](optimization/README.md#baselines).
"""
HISTORY = """Speed-ups over the baseline against the date. Right: the records of this project that
have a baseline in their session, by the # of the tables below, a color a class; hollow points have
a loss above the baseline's. Left: the public records of modded-nanogpt as multiples of record 89,
hollow where proposed and not merged. The two sides have other machines, data and schedules.
"""
CURVES = """![loss against seconds of the newest session](loss_against_seconds.png)

The newest session with a baseline: {names}.

A line is the training loss of one run, averaged over a thirtieth of its steps, and on sampled
candidates where a stage has these. All runs read the same shards in the same order, so that lines
rise where text of another kind begins. Dots are validation losses, on the whole vocabulary; the
dotted line is that of the baseline.
"""
MEMORIES = """**Non-parametric memory** is what a model looks up while it predicts a token, besides
the weights that it has learned. A record belongs to the last of these classes that applies:
"""


def class_table(members: list[tuple[int, Record]], records: list[Record]) -> str:
    """The records of one class of the main or the medium track, and why they are no claim."""
    first, *others = (record.shortfalls for _, record in members)
    common = [reason for reason in first if all(reason in reasons for reasons in others)]
    rows = []
    for number, record in members:
        reasons = [reason for reason in record.shortfalls if reason not in common]
        claim = ": ".join(["no", *filter(None, ["; ".join(reasons)])])
        if not record.shortfalls:
            p = p_at_most([run.loss for run in record.runs], TRACKS[record.track].target)
            claim = f"p = {format_p(p)}"
        base = baseline_of(record, records)
        speed, above = "baseline" if record.is_baseline else "", ""
        if base:
            speed, above = f"{base.time / record.time:.2f}×", signed(record.loss - base.loss)
        rows.append(
            [
                str(number),
                f"{record.first.started:%Y-%m-%d}",
                f"[{record.title}]({link(record, RECORDS)})".replace("|", "\\|"),
                speed,
                spread((run.time for run in record.runs), 2),
                spread((run.loss for run in record.runs), 4),
                above,
                record.first.steps_text,
                str(len(record.runs)),
                claim,
            ]
        )
    header = ["#", "date", "record", "speed-up", "time (s)", "loss", "Δ loss", "steps", "runs"]
    header += ["claim"]
    used = [any(row[i] not in ("", "no") for row in rows) for i in range(len(header))]
    table = [list(itertools.compress(row, used)) for row in [header, *rows]]
    reasons = f"No claim: {'; '.join(common)}.\n\n" if common else ""
    return f"{reasons}{markdown_table(table[0], table[1:])}\n"


def race_table(race: Race, page: Path) -> str:
    """The methods of a race, and the pairwise tests of each with the baseline and the one before
    it, for a page in this folder."""
    if race.target is None:
        return "No target yet: the Muon baseline has no runs on this data.\n"
    rules = optimization_rules()
    rows, pairs = [], []
    for i, record in enumerate(race.records):
        result, title = race.results[record], record.title.replace("|", "\\|")
        by_seed = [rules.first_below(curve, race.target) for curve in record.curves]
        by_seed = " ".join("–" if step is None else str(step) for step in by_seed)
        sets_target = record is race.target_setter  # so that some seeds are above their own mean
        statistic = signed(rules.target_statistic(result.losses, race.target))
        count = len(record.runs)
        rows.append(
            [
                f"[{title}]({link(record, page)})" + " (baseline)" * (record is race.baseline),
                race.steps(record),
                "–" if sets_target else by_seed,
                spread(result.losses, 4),
                "sets the target" if sets_target else statistic,
                f"{count}" if count >= rules.CLAIM_RUNS else f"{count}: no claim",
            ]
        )
        others = [race.baseline, race.records[i - 1] if i else None]
        for other in dict.fromkeys(others):
            if other not in (None, record):
                pairs.append([title, other.title.replace("|", "\\|"), *race.against(other, record)])
    header = ["method", "steps", "steps, by seed", "loss there", "(target − loss)·√n", "runs"]
    parts = [f"Target: {race.target:.4f}{race.provisional}.", markdown_table(header, rows)]
    if pairs:
        header = ["method", "against", "statistic", f"better (at least {rules.MARGIN})"]
        parts.append(markdown_table(header, pairs))
    return "\n\n".join(parts) + "\n"


def race_tables(records: list[Record], page: Path) -> str:
    """Of all races, each with a heading."""
    parts = [
        f"### {race.kind[:1].upper()}{race.kind[1:]}\n\n{race_table(race, page)}"
        for race in all_races(records)
    ]
    return "\n".join(parts) or f"{NO_RUNS}\n"


def track_part(name: str, members: list[Record]) -> str:
    """The part of a track that has records: what counts there, its picture and its tables."""
    track = TRACKS[name]
    title = f"## {name.capitalize()} track: {track.goal}\n"
    picture = f"![all records of the {name} track]({track.picture})\n"
    if name == "optimization":
        return "\n".join([title, STEPS, picture, race_tables(members, RECORDS)])
    claim = f"""**A claim** is a mean loss of at most {track.target} (p < {ALPHA}) at the end of the
schedule, on FineWeb with {CLAIM_GPUS} GPUs or more. A {track.shortened} is one of fewer than
{track.whole_tokens / 1e6:,.0f} M tokens.
"""
    parts = [title, SPEED_UP + MAIN * (name == "main") + claim, picture]
    if name == "main":
        parts.append(HISTORY)
    if name == "main" and (session := newest_session(members)):
        links = (f"[{record.title}]({record.folder.name})" for record in session)
        parts.append(CURVES.format(names="; ".join(links)))
    for kind, numbered in classes(members).items():
        parts.append(f"### {kind}\n\n{class_table(numbered, members)}")
    return "\n".join(parts)


def history_page(records: list[Record]) -> str:
    """The records by track and class, toy runs left out."""
    groups = {name: [record for record in records if record.track == name] for name in TRACKS}
    rows = [
        [name, track.goal, str(len(groups[name]) or "none yet")] for name, track in TRACKS.items()
    ]
    count = sum(record.first.data_name == "proxy" for record in records)
    proxy = PROXY.format(count="All" if count == len(records) else count) if count else ""
    parts = [track_part(name, members) for name, members in groups.items() if members]
    return f"""# Records

Written by `./run.sh history` from the records' logs: a part for each track, and in it a section for
each class: machine, data, length of the schedule and non-parametric memory, or the race of the
optimization track. A record's own page has its logs; `python tools/slim.py restore LOG` prints one
whole that is shortened and begins with `script:`. Runs on a CPU and toy schedules are left out.

{markdown_table(["track", "goal", "records"], rows)}

{MEMORIES}
{markdown_table(["non-parametric memory", "looks up"], MEMORY.items())}

{proxy}{chr(10).join(parts)}"""


def with_table(page: str, text: str) -> str:
    """records/optimization/README.md with this in place of its table."""
    if page.count(TABLE) != 1 or page.count(TABLE_END) != 1:
        found = f"needs the lines {TABLE!r} and {TABLE_END!r}, once each: put them back"
        raise ReportError(f"records/optimization/README.md: {found}")
    before, rest = page.split(TABLE)
    return f"{before}{TABLE}\n\n{text}\n{TABLE_END}{rest.split(TABLE_END)[1]}"


# ==================================================================================================
# 7. Commands
# ==================================================================================================


def record_command(args: argparse.Namespace, options: list[str]) -> None:
    if not re.fullmatch(r"[\w.-]+", args.name):
        raise OptionError(f"record: the name {args.name!r} makes no folder: use letters, digits, _")
    if args.logs and (options or args.runs is not None):
        raise OptionError("record: --logs takes runs that there are: leave out --runs and options")
    num_runs = 0 if args.logs else 1 if args.runs is None else args.runs
    same = re.compile(rf"\d{{4}}-\d\d-\d\d_{re.escape(args.name)}")
    folder = next((path for path in record_folders("*") if same.fullmatch(path.name)), None)
    try_folder(folder or RECORDS, num_runs + 1)
    old = Record(folder) if folder else None
    track = TRACKS[args.track or (old.track if old else "main")]
    own = old.script if old and old.in_steps else None  # there every method has its own script
    script = args.script or own or ROOT / track.script
    runs, seed = [], default_seed(script) if num_runs else None
    if num_runs:
        check_whole(script)
    if num_runs and (options or not old):
        options = [*track.options, *options]
    if old:
        _ = old.words  # or an error, before anything is run
        check_replaceable(folder / "README.md")
        changes = num_runs and describe_changes(read_text(old.script), read_text(script))
        if num_runs and len(changes) > 1:
            raise ReportError(
                f"{shown(folder)} has another script than {shown(script)}: choose another name, or "
                f"give --script {shown(old.script)}\n" + "\n".join(changes)
            )
        script, runs, seed = old.script, old.runs, max(run.seed for run in old.runs) + 1
        if num_runs and not options:
            options = options_of(old.first, script)
    options, seed = take_seed(options, seed)
    new = [read_run(path) for path in args.logs or []]
    if num_runs:
        check_plan(script, args.track or (old.track if old else None), options)
        seeds = range(seed, seed + num_runs)
        taken = sorted({run.seed for run in runs} & {*seeds})
        if old and old.in_steps and taken:
            raise OptionError(f"--seed after --: the record has seed {taken[0]}: give another")
        with clean_copy(script) as copy:
            (new,) = run_in_turn({"": (copy, options)}, seeds)
    by_id: dict[str, Run] = {}
    for run in [*runs, *new]:
        first = by_id.setdefault(run.run_id, run)
        if not run.is_copy_of(first):
            both = f"{shown(first.path)} and {shown(run.path)}"
            raise ReportError(f"{both}: are two logs of one run: leave out the wrong one")
    runs = list(by_id.values())
    if not runs:
        raise OptionError("record: a new record needs runs: --runs N, or --logs FILE ...")
    by_log = runs[0].track
    if args.track not in (None, by_log) and "optimization" in (args.track, by_log):
        found = f"a log of the {by_log} track: give --track {by_log}, or other logs"
        raise ReportError(f"{shown(runs[0].path)}: {found}")
    any_script = args.logs and not old and by_log == "optimization"  # each method has its own
    check_runs(None if any_script else script, runs)
    if by_log == "optimization":
        check_rules(runs)
    if args.logs:
        others = [record for record in all_records(skip=True) if record.folder != folder]
        check_apart([*(run for record in others for run in record.runs), *runs])
    started = min(run.started for run in runs)
    parent = RECORDS / TRACKS[by_log].folder
    folder = folder or parent / f"{started:%Y-%m-%d}_{args.name}"
    for run in new:
        copy_logs(run.path, folder)
    if not (folder / "train_gpt.py").exists():
        write_text(folder / "train_gpt.py", runs[0].source)
    record = write_page(folder, args.memory, args.track)
    print(f"\n{shown(folder)}: {counted(len(runs), 'run')}, {runs[0].machine}")
    print(f"time {spread((run.time for run in runs), 2)} s")
    print(f"validation loss {spread((run.loss for run in runs), 4)}")
    if record.in_steps:
        for name, value in race_figures(record, all_records(skip=True)).items():
            print(f"{name}: {without_links(value)}")
    else:
        print(target_test([run.loss for run in runs], TRACKS[record.track].target))
    if record.words == PLACEHOLDER:
        print(f"now say what changed in {shown(folder / 'README.md')}, then ./run.sh history")


def print_columns(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def beside(heads: tuple[str, str], a: list[Run], b: list[Run]) -> tuple[list[list[str]], str]:
    """A table of conditions and figures, with the ratio second / first of what compares; and what
    does not."""
    conditions = {
        "machine": [joined(run.machine for run in runs) for runs in (a, b)],
        "data": [joined(CORPORA.get(r.data_name, r.data_name) for r in runs) for runs in (a, b)],
    }
    rows = [["figure", *heads, "ratio"], *([name, *both, ""] for name, both in conditions.items())]
    same_data = len(set(conditions["data"])) == 1
    figures = {
        ("time (s)", 3): [[run.time for run in runs] for runs in (a, b)],
        ("validation loss", 4): [[run.loss for run in runs] for runs in (a, b)],
    }
    if a[0].track == b[0].track == "optimization":
        figures["steps", 0] = [[run.num_steps for run in runs] for runs in (a, b)]
    stages = stage_spread(a), stage_spread(b)
    for name in stages[0] | stages[1]:
        figures[f"ms a step, {name}", 2] = [table.get(name, []) for table in stages]
    for (name, digits), (first, second) in figures.items():
        comparable = first and second and (same_data or name != "validation loss")
        ratio = f"{statistics.fmean(second) / statistics.fmean(first):.4f}" if comparable else ""
        cells = [spread(values, digits) if values else "none" for values in (first, second)]
        rows.append([name, *cells, ratio])
    notes = []
    if len(set(conditions["machine"])) > 1:
        notes.append("These are times of different machines.")
    if not same_data:
        notes.append("These are losses on different data: the times compare, the losses do not.")
    return rows, "\n".join(notes)


def run_in_turn(jobs: dict[str, tuple[Path, list[str]]], seeds: Iterable[int]) -> list[list[Run]]:
    """Jobs (name: folder of a clean copy, options) one after the other with every seed; the runs of
    each. The logs are kept in logs/."""
    results: dict[str, list[Run]] = {name: [] for name in jobs}
    seeds = list(seeds)
    try_folder(LOGS, len(seeds) * len(jobs))
    try:
        for i, seed in enumerate(seeds, 1):
            for name, (folder, options) in jobs.items():
                print(f"run {i}{name}, seed {seed}")
                results[name].append(launch(folder, options, seed))
    except (ReportError, OSError, KeyboardInterrupt) as stop:
        logs = [shown(run.path.with_suffix(".txt")) for runs in results.values() for run in runs]
        kept = f"; the runs before it are kept, for --logs: {' '.join(logs)}" if logs else ""
        kind = ReportError if isinstance(stop, OSError) else type(stop)
        raise kind(f"{stop}{kept}") from None
    return list(results.values())


def reproduce_command(args: argparse.Namespace, options: list[str]) -> None:
    record = Record(args.folder)
    options, seed = take_seed(options, None)
    seeds = [run.seed for run in record.runs] if seed is None else [seed]
    seeds = itertools.chain(seeds, itertools.count(max(seeds) + 1))
    if args.fineweb:
        (own,) = put_on_fineweb("reproduce", [record])
    else:
        own = options_of(record.first, record.script)
    check_data(own, options, offer=moves_to_fineweb(record.first))
    with clean_copy(record.script) as copy:
        jobs = {"": (copy, own + options)}
        (here,) = run_in_turn(jobs, itertools.islice(seeds, args.runs))
    print(f"\n{shown(args.folder)}")
    recorded = record.first.torch.partition("+")[0]
    if here[0].torch.partition("+")[0] != recorded:
        found = f"it ran on torch {recorded}, and here on {here[0].torch}"
        print(f"{found}: if losses differ, install torch=={recorded} (records/stacks says why)")
    heads = f"recorded ({len(record.runs)})", f"here ({len(here)})"
    rows, notes = beside(heads, record.runs, here)
    print_columns(rows)
    print(notes, end="\n" * bool(notes))


def logs_of(path: Path) -> list[Run]:
    """Of a record its runs, of a script those in logs/ that it made; others of these that are not
    whole are left out with a line."""
    if path.is_dir():
        return Record(path).runs
    source, runs = read_text(path) + SEPARATOR, []
    for log in sorted(LOGS.glob("[!.]*.txt")):
        try:
            if read_log(log).startswith(source):
                runs.append(read_run(log))
        except (ReportError, OSError) as error:
            warn(f"left out: {error}")
    if not runs:
        raise ReportError(f"{shown(path)}: logs/ has no log of it: compare without --logs runs it")
    check_runs(path, runs)
    return runs


def compare_methods(a: list[Run], b: list[Run]) -> list[str]:
    """A line for the pairwise test of the optimization track, at the ends of the runs, if these are
    of one race."""
    if not a[0].track == b[0].track == "optimization":
        return []
    rules, name = optimization_rules(), "test of two methods, at the ends of their runs"
    try:
        presets = {rules.preset_of(run.config) for run in (a[0], b[0])}
    except rules.RuleError as error:
        return [f"{name}: none ({error})"]
    if len(presets) > 1 or a[0].data_name != b[0].data_name:
        return [f"{name}: none, as preset or data differ"]
    ends = [rules.Result(r[0].num_steps, [run.loss for run in r], True) for r in (a, b)]
    value = rules.pairwise_statistic(*ends)
    better = "better" if value >= rules.MARGIN else "not better"
    return [f"{name}: {value:+.4f}, B is {better} than A (at least {rules.MARGIN})"]


def compare_command(args: argparse.Namespace, options: list[str]) -> None:
    if args.logs and (options or args.runs is not None or args.fineweb):
        found = "--logs takes runs that there are: leave out --runs, --fineweb and options"
        raise OptionError(f"compare: {found}")
    if args.page:
        check_replaceable(args.page)
        try_folder(args.page.parent, 0)
    paths = args.a, args.b
    scripts = [path / "train_gpt.py" if path.is_dir() else path for path in paths]
    for script in scripts:
        check_whole(script)
    texts, names = [read_text(script) for script in scripts], list(map(shown, scripts))
    if args.logs:
        results = [sorted(logs_of(path), key=lambda run: run.seed) for path in paths]
    else:
        # A record runs with its own command, a bare script with that of the other's record, and
        # both with the options given here.
        records = {i: Record(path) for i, path in enumerate(paths) if path.is_dir()}
        model = next(iter(records.values())).first if records else None
        options, seed = take_seed(options, model.seed if model else default_seed(scripts[0]))
        if args.fineweb:
            known = dict(zip(records, put_on_fineweb("compare", records.values()), strict=True))
        else:
            known = {i: options_of(r.first, r.script) for i, r in records.items()}
        own = [known.get(i, known.get(1 - i, [])) for i in range(2)]
        for i, each in enumerate(own):
            record = records.get(i, records.get(1 - i))  # whose options these are
            check_data(each, options, offer=record is not None and moves_to_fineweb(record.first))
        with clean_copy(scripts[0]) as first, clean_copy(scripts[1]) as second:
            jobs = {"A": (first, own[0] + options), "B": (second, own[1] + options)}
            results = run_in_turn(jobs, range(seed, seed + (args.runs or 1)))
    heads = f"A ({len(results[0])})", f"B ({len(results[1])})"
    table, notes = beside(heads, *results)
    pairs = [["pair", "seed A", "seed B", "time A", "time B", "B / A", "loss A", "loss B"]]
    ratios = []
    for i, (a, b) in enumerate(zip(*results), 1):
        ratios.append(b.time / a.time)
        times = f"{a.time:.3f} s", f"{b.time:.3f} s", f"{ratios[-1]:.4f}"
        pairs.append([str(i), str(a.seed), str(b.seed), *times, f"{a.loss:.4f}", f"{b.loss:.4f}"])
    losses = [[run.loss for run in runs] for runs in results]
    difference = statistics.fmean(losses[1]) - statistics.fmean(losses[0])
    p = p_different(*losses)
    test = "too few runs, or equal losses: no test"
    if p is not None:
        count = joined(map(len, losses))
        test = (
            f"p = {format_p(p)}: {'' if p < ALPHA else 'not '}significant at {ALPHA} (n = {count})"
        )
    found = [f"time B / A, pair by pair: {spread(ratios, 4)}"]
    found += [f"loss B - A: {difference:+.4f}; Welch's two-sided t-test: {test}"]
    found += compare_methods(*results)
    options = config_changes(results[0][0], results[1][0])
    changes, diff = describe_changes(*texts), short_diff(*texts, *names, limit=DIFF_LINES)

    print(f"\nA  {shown(args.a)}\nB  {shown(args.b)}\n")
    print_columns(table)
    print(notes, end="\n" * bool(notes))
    print()
    print_columns(pairs)
    print("\n" + "\n".join(found))
    if options:
        short = [line if len(line) <= SCREEN else f"{line[:SCREEN]}…" for line in options]
        print("\noptions that differ, in A and in B:\n" + "\n".join(short))
    print("\nFrom A to B: " + "\n".join(changes).replace("`", ""))
    print("\n".join(diff))
    if args.page:
        versions = [
            f"{name}: {joined(r.versions for r in runs)}" for name, runs in zip("AB", results)
        ]
        dumps = {"versions": versions, "options that differ, in A and in B": options}
        dumps |= {"what changed from A to B, by function": changes, "the diff": diff}
        parts = [f"# A and B\n\n- A: {shown(args.a)}\n- B: {shown(args.b)}"]
        parts += [markdown_table(rows[0], rows[1:]) for rows in (table, pairs)]
        parts += [line for line in [*notes.splitlines(), *found]]
        parts += [folded(name, fenced(lines)) for name, lines in dumps.items() if lines]
        write_text(args.page, "\n\n".join(parts) + "\n")
        print(f"{shown(args.page)} has this as a page")


def history_command(args: argparse.Namespace, options: list[str]) -> None:
    if options:
        raise OptionError(f"history: takes no options, found {shlex.join(options)}")
    records = all_records()
    if not records:
        raise ReportError(f"{shown(RECORDS)}: has no record: make one with ./run.sh record NAME")
    check_apart(run for record in records for run in record.runs)
    listed = [record for record in records if not record.is_toy]
    groups = {name: [record for record in listed if record.track == name] for name in TRACKS}
    write_text(RECORDS / "README.md", history_page(listed))
    page = RECORDS / TRACKS["optimization"].folder / "README.md"
    if page.exists():
        tables = race_tables(groups["optimization"], page.parent)
        write_text(page, with_table(read_text(page), tables))
    drawn = []

    def picture(function: Callable, members: list[Record], name: str) -> None:
        draw(functools.partial(function, members), RECORDS / name)
        drawn.append(name)

    functions = {"main": draw_history, "medium": draw_medium, "optimization": draw_optimization}
    for name, members in groups.items():
        if members:
            picture(functions[name], members, TRACKS[name].picture)
    if newest_session(groups["main"]):
        picture(draw_race, groups["main"], "loss_against_seconds.png")
    toys, left = sorted(shown(record.folder) for record in records if record.is_toy), ""
    if toys:
        left = f", {counted(len(toys), 'toy run')} left out: {', '.join(toys)}"
    files = ", ".join(["README.md", *drawn])
    print(f"{shown(RECORDS)}: {files}: {counted(len(listed), 'record')}{left}")


# Command line -------------------------------------------------------------------------------------


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = console.Parser(
        prog="./run.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(function=function)
        return added

    record = command("record", record_command, "train, and write or extend the record's folder")
    record.add_argument("name", metavar="NAME", help="of the folder, after the date")
    number = console.number(int, 0, MOST_RUNS)
    record.add_argument("--runs", type=number, help="with seeds in a row [1, with --logs none]")
    logs = "take these runs (.txt or .json) instead of training"
    record.add_argument("--logs", nargs="+", type=Path, metavar="FILE", help=logs)
    memory = "class of non-parametric memory [by script and options]; kept when written again"
    record.add_argument("--memory", choices=MEMORY, help=memory)
    track = (
        "what it competes in, and so what is trained [by the logs; main for a new record without "
    )
    track += f"logs]; of those, a model {MEDIUM_WIDTH} wide or wider is of the medium track"
    record.add_argument("--track", choices=TRACKS, help=track)
    script = "to train, as a submission of the optimization track [that of the track]"
    record.add_argument("--script", type=Path, metavar="FILE", help=script)
    reproduce = command("reproduce", reproduce_command, "run a record's script again")
    reproduce.add_argument("folder", type=Path, metavar="FOLDER", help="of the record")
    compare = command("compare", compare_command, "run two scripts or records, interleaved")
    for name in ("a", "b"):
        compare.add_argument(name, type=Path, metavar=name.upper(), help="a script or a record")
    number = console.number(int, 1, MOST_RUNS)
    reproduce.add_argument("--runs", type=number, default=1, help="of its script [1]")
    compare.add_argument("--runs", type=number, help="of each script [1]")
    compare.add_argument("--logs", action="store_true", help="compare logs that there are")
    page = "write it as Markdown too, what is long folded away"
    compare.add_argument("--page", type=Path, metavar="FILE", help=page)
    fineweb = "train on FineWeb in place of a record's data, where that is not on this machine"
    for parser_with_it in (reproduce, compare):
        parser_with_it.add_argument("--fineweb", action="store_true", help=fineweb)
    command("history", history_command, "write records/README.md and the tracks' pictures")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Exit code 0, 1 with a message, or 2 for the command line."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    args = parse_args(arguments[:split])
    try:
        args.function(args, arguments[split + 1 :])
    except (ReportError, OSError) as error:
        warn(f"\nerror: {error}")
        return 2 if isinstance(error, OptionError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(console.run_tool(main))
