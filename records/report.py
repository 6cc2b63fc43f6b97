"""Makes, reproduces and compares records, and draws their history. `./run.sh` dispatches to it.

    ./run.sh record NAME [--runs N] [-- OPTION ...]   train N times, write records/<date>_<NAME>/;
                                                      where it exists, add N runs (0: only rewrite)
    ./run.sh record NAME --logs FILE ...              the same with logs that there are already
    ./run.sh reproduce FOLDER [--runs N]              run a record's script, beside its figures
    ./run.sh compare A B [--runs N] [-- OPTION ...]   run two scripts or records in turn
    ./run.sh compare A B --logs                       compare the logs that there are of them
    ./run.sh history                                  write records/README.md and history.png

Losses are in nats per token, times in seconds of training unless a name says otherwise, dates in
UTC. Deviations are those of a sample (n - 1).
"""

import argparse
import contextlib
import difflib
import functools
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
from datetime import UTC, datetime, timedelta
from pathlib import Path

import terminal

RECORDS = Path(__file__).resolve().parent
ROOT = RECORDS.parent
LOGS = ROOT / "logs"
TARGET = 3.28  # validation loss
ALPHA = 0.01  # a claim's p is below this
CLAIM_GPUS, CLAIM_TARGETS = 8, 10_485_760
PUBLIC_SECONDS = 73.8  # the public record on 8 x H100
DIFF_LINES = 100  # shown at most
SEPARATOR = "=" * 100 + "\n"  # between the script and the log proper
OWN_FIELDS = ("seed", "log_dir")  # what the runs of one record may differ in
OUTPUT_FIELDS = ("checkpoint",)  # and what repeating a run leaves out besides
OUTPUT_OPTIONS = "--log_dir", "--checkpoint"
MOST_RUNS = 10_000
RUN_ID = re.compile(r"\d{4}-\d\d-\d\d_\d{6}")  # what one begins with
DATED = re.compile(r"\d{4}-\d\d-\d\d_(.+)", re.DOTALL)  # the folder of a record
RUN_BYTES = 2**21  # more than the files of a run need
SLACK_S = 0.25  # between a step and the clock that is stopped behind it
AUTHOR = "<!-- the author's words: kept when this file is written again -->"
AUTHOR_END = "<!-- the end of the author's words -->"
PLACEHOLDER = "What changed against the previous record, and why."


class ReportError(Exception):
    """Something the user can mend. The message names the file or option and the remedy."""


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


# ==================================================================================================
# 1. Runs: what train_gpt.py leaves behind
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
        self.check_times(data["summary"]["mean_step_ms"])
        scheduled = int(config["num_steps"]) + int(config["extension_steps"])
        self.finished = self.num_steps == scheduled
        self.steps_text = f"{self.num_steps}" + ("" if self.finished else f" of {scheduled}")

        world_size, devices = environment["world_size"], environment["devices"]
        self.machine = f"{world_size} × {devices.removeprefix('NVIDIA ')}"
        self.gpus = 0 if environment["cuda"] is None else world_size
        backend = re.search(r"attention by (\S+)", text)
        self.versions = f"torch {environment['torch']}, Python {environment['python']}"
        self.versions += f", attention by {backend[1]}" if backend else ""

        # fineweb, proxy, sample, …: what the names of the shards begin with, if they agree
        files = [Path(config[name]).name for name in ("train_files", "val_file")]
        names = [re.split(r"_(?:train|val)_", file)[:-1] for file in files]
        self.data_name = names[0][0] if names[0] and names[0] == names[1] else "other"
        # targets scored, which are fewer than val_tokens where the shard has no more
        targets = re.search(r"^val loss .* on ([\d,]+) targets$", text, re.MULTILINE)
        self.num_targets = int(targets[1].replace(",", "") if targets else config["val_tokens"])

        shares = [float(row.split(":")[0]) for row in config["stages"].split(",")]
        ends = [round(edge * int(config["num_steps"])) for edge in itertools.accumulate(shares)]
        names = [f"stage {i + 1}" for i in range(len(ends))] + ["extension"]
        self.stage_begins = [0, *ends]
        self.stage_ms: dict[str, float] = {}  # mean milliseconds a step of the stages it reached
        for name, begin, end in zip(names, self.stage_begins, [*ends, scheduled], strict=True):
            times = [row["step_ms"] for row in self.steps if begin < row["step"] <= end]
            if times:
                self.stage_ms[name] = statistics.fmean(times)

    def check_times(self, mean_step_ms: float) -> None:
        """Raise ValueError unless the times of steps, validations and summary add up."""
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
            if not abs(time - ends[step]) <= SLACK_S:
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
            and self.validations[-1] == last
            and all(
                re.findall(rf"^step \d+ {name} .*$", text, re.MULTILINE)
                == [f"step {row['step']} {name} {form.format(**row)}" for row in rows]
                for name, (form, rows) in forms.items()
            )
        )

    def is_copy_of(self, other: "Run") -> bool:
        files = [[run.path, run.path.with_suffix(".txt")] for run in (self, other)]
        return [*map(read_text, files[0])] == [*map(read_text, files[1])]


def read_run(path: Path) -> Run:
    """From any of a run's files. ReportError unless both are there, whole, and of one run."""
    text_path, json_path = path.with_suffix(".txt"), path.with_suffix(".json")
    for needed in (text_path, json_path):
        if not needed.is_file():
            found = "no such file, but a run has a .txt and a .json"
            raise ReportError(f"{shown(needed)}: {found}: put it back, or leave the run out")
    source, separator, text = read_text(text_path).partition(SEPARATOR)
    if not separator:
        raise ReportError(
            f"{shown(text_path)}: no line of 100 '=' behind a script: not a log of train_gpt.py"
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


def check_runs(script: Path, runs: list[Run]) -> None:
    """Raise ReportError unless all runs are of this script and of one config."""
    source = read_text(script)
    for run in runs:
        if run.source != source:
            path = run.path.with_suffix(".txt")
            lines = short_diff(source, run.source, shown(script), shown(path), limit=30)
            raise ReportError(
                f"{shown(path)} was not made by {shown(script)}, it begins with another script: "
                "leave it out, or put back the script that ran\n" + "\n".join(lines)
            )
        changes = config_changes(runs[0], run)
        if changes:
            raise ReportError(
                f"{shown(runs[0].path)} and {shown(run.path)} have different options: "
                "make a record of each\n" + "\n".join(changes)
            )


def config_changes(a: Run, b: Run) -> list[str]:
    """A line for every option that differs."""
    values = {name: [run.config.get(name) for run in (a, b)] for name in a.config | b.config}
    return [
        f"  {name}: {first!r} and {second!r}"
        for name, (first, second) in values.items()
        if name not in OWN_FIELDS and first != second
    ]


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

    @property
    def what_changed(self) -> str:
        """The first sentence of the author's section, or else the title."""
        words = " ".join(self.words.split()) if AUTHOR in self.readme else PLACEHOLDER
        sentence = re.match(r".+?[.!?](?=\s|$)", words)
        return self.title if words in (PLACEHOLDER, "") else sentence[0] if sentence else words

    @property
    def memory(self) -> str:
        """What the model keeps of what it read, a class that records state."""
        row = re.search(r"^\| memory \| (.+) \|$", self.readme, re.MULTILINE)
        return row[1] if row else "not stated"

    @property
    def shortfalls(self) -> list[str]:
        """Why this is no claim; empty for one."""
        run, reasons = self.first, []
        if run.data_name != "fineweb":
            reasons.append(f"{run.data_name} data, not FineWeb")
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
        p = p_at_most([run.loss for run in self.runs])
        if not reasons and (p is None or not p < ALPHA):
            reasons.append(f"p not below {ALPHA}")
        return reasons


def all_records(skip: bool = False) -> list[Record]:
    """By the time of their first run. One that is not whole is an error, or skipped with a line."""
    folders = [folder for folder in RECORDS.glob("[!.]*_*") if folder.is_dir()]
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


# Figures ------------------------------------------------------------------------------------------


def spread(values: Iterable[float], digits: int) -> str:
    """Mean and, of several, standard deviation."""
    values = list(values)
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def are_equal(losses: list[float]) -> bool:
    """One alone, or several that only rounding may tell apart: there is no deviation to test by."""
    return max(losses) - min(losses) < 1e-9


def p_at_most(losses: list[float]) -> float | None:
    """One-sided t-test: probability of losses this low if their mean were above the target. None
    for one loss, or equal ones: they allow no test."""
    from scipy import stats

    if are_equal(losses):
        return None
    return float(stats.ttest_1samp(losses, TARGET, alternative="less").pvalue)


def p_different(a: list[float], b: list[float]) -> float | None:
    """Welch's two-sided t-test: probability of means this far apart if they were the same. None
    where one side has one loss, or equal ones: they allow no test."""
    from scipy import stats

    if are_equal(a) or are_equal(b):
        return None
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def format_p(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def target_test(losses: list[float]) -> str:
    p = p_at_most(losses)
    what = f"one-sided t-test that the mean is at most {TARGET}"
    if p is None:
        return f"{what}: {'one run allows' if len(losses) < 2 else 'equal losses allow'} no test"
    return f"{what}: p = {format_p(p)}, {'' if p < ALPHA else 'not '}under {ALPHA}"


def stage_spread(runs: list[Run]) -> dict[str, list[float]]:
    """Milliseconds a step of every run, by stage."""
    tables = [run.stage_ms for run in runs]
    return {name: [table[name] for table in tables if name in table] for name in tables[0]}


def joined(values: Iterable[object]) -> str:
    """The distinct ones, in order."""
    return " and ".join(dict.fromkeys(map(str, values)))


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


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A type of options."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,30}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return read


def take_seed(options: list[str], default: int | None) -> tuple[list[str], int | None]:
    """The options without --seed, and its value."""
    parser = argparse.ArgumentParser(
        prog="options after --", usage=argparse.SUPPRESS, allow_abbrev=False, add_help=False
    )
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1 - MOST_RUNS), default=default)
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
            if name not in OWN_FIELDS + OUTPUT_FIELDS and value != defaults.get(name):
                options += [f"--{name}", value]
        candidates.append(options)
    return min(candidates, key=len)


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
        code = terminal.call(command, cwd=folder, env=environment)
    finally:
        new = [copy_logs(path, LOGS) for path in set(folder.glob("logs/*.txt")) - before]
    if code == 130:
        raise KeyboardInterrupt
    if code != 0 or len(new) != 1:
        raise ReportError(f"the run ended with exit code {code}: {shlex.join(command)}")
    return read_run(new[0])


def copy_logs(path: Path, folder: Path) -> Path:
    """Copy a run's files where they are not there yet; returns the .json's new path."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in (".txt", ".json", ".png"):
        source = path.with_suffix(suffix)
        if source.exists() and source.resolve().parent != folder.resolve():
            replace(folder / source.name, functools.partial(shutil.copyfile, source))
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
    place = {"xytext": (0, 8), "ha": "center"} | place
    return axes.annotate(text, point, fontsize=8, textcoords="offset points", **place)


def part_labels(figure, labels: list) -> None:
    """Put each label beside its point, where it hides no other label and no point."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # settles where points are
    taken = []
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


def draw_losses(record: Record, path: Path) -> None:
    """Training loss of all runs in the background, validation loss of each in colour."""
    figure, axes = new_figure(8, 5)
    losses = []
    for i, run in enumerate(record.runs):
        columns = [[row[name] for row in run.steps] for name in ("step", "train_loss")]
        label = None if i else "training"
        axes.plot(*columns, color="0.7", linewidth=0.8, zorder=1, label=label)
        losses += columns[1]
        columns = [[row[name] for row in run.validations] for name in ("step", "val_loss")]
        label = f"validation, seed {run.seed}: {run.loss:.4f}" if i < 10 else None
        axes.plot(*columns, "o-", color=f"C{i % 10}", markersize=4, linewidth=1, label=label)
        losses += columns[1]
    for rows in zip(*(run.validations for run in record.runs)):
        values = [row["val_loss"] for row in rows]
        label_point(axes, (rows[0]["step"], max(values)), f"{statistics.fmean(values):.3f}")
    losses.sort()
    bottom, top = losses[0], losses[int(0.97 * (len(losses) - 1))]  # leaves out the first fall
    if record.first.data_name == "fineweb":
        axes.axhline(TARGET, color="black", linestyle="--", linewidth=1, label=f"target {TARGET}")
        bottom = min(bottom, TARGET)
    margin = 0.05 * (top - bottom) + 0.02
    axes.set_ylim(bottom - margin, top + margin)
    for begin in record.first.stage_begins[1:]:
        if begin < record.first.num_steps:
            axes.axvline(begin, color="0.8", linewidth=1, zorder=0)
    axes.set_title(f"{record.title}: {record.first.machine}, {record.first.data_name} data")
    axes.set_xlabel("step (vertical lines: a new stage)")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def history_series(records: list[Record]) -> dict[str, list[tuple[int, Record]]]:
    """What may be joined by a line: the claims of a machine, or runs of one machine, data and
    number of steps. Members come with their number in the table."""
    series: dict[str, list[tuple[int, Record]]] = {}
    for number, record in enumerate(records, 1):
        run, kind = record.first, "claims"
        if record.shortfalls:
            kind = f"{run.data_name} data, {run.steps_text} steps (no claim)"
        series.setdefault(f"{run.machine}, {kind}", []).append((number, record))
    return series


def draw_history(records: list[Record], path: Path) -> None:
    """Time against date: claims filled and joined by machine, the others hollow, a series each."""
    from matplotlib import dates, ticker

    series, labels = history_series(records), []
    line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0}  # to its point
    figure, axes = new_figure(9, 5 + 0.25 * len(series))
    for i, (name, members) in enumerate(series.items()):
        days = [record.first.started for _, record in members]
        times = [[run.time for run in record.runs] for _, record in members]
        means = [statistics.fmean(values) for values in times]
        deviations = [statistics.stdev(v) if len(v) > 1 else 0 for v in times]
        style = {"linestyle": "-", "marker": "oD^v"[i // 10 % 4]}  # there are ten colors
        if members[0][1].shortfalls:
            style = {"linestyle": ":", "marker": "sd<>"[i // 10 % 4], "markerfacecolor": "white"}
        axes.errorbar(days, means, deviations, color=f"C{i % 10}", capsize=3, label=name, **style)
        for (number, record), day, mean in zip(members, days, means):
            unfinished = "" if record.first.finished else ", unfinished"
            text = f"{number}: {mean:.1f} s{unfinished}"
            labels.append(
                label_point(axes, (dates.date2num(day), mean), text, va="center", arrowprops=line)
            )
    label = f"public record on 8 × H100: {PUBLIC_SECONDS} s"
    axes.axhline(PUBLIC_SECONDS, color="black", linestyle="--", linewidth=1, label=label)
    starts = [record.first.started for record in records]
    room = max((starts[-1] - starts[0]) / 10, timedelta(days=1))
    axes.set_xlim(starts[0] - room, starts[-1] + room)
    means = [statistics.fmean(run.time for run in record.runs) for record in records]
    if max(*means, PUBLIC_SECONDS) > 10 * min(*means, PUBLIC_SECONDS):
        axes.set_yscale("log")
        formatter = ticker.LogFormatter(minor_thresholds=(2, 0.5))  # 20, not 2 × 10¹
        axes.yaxis.set_major_formatter(formatter)
        axes.yaxis.set_minor_formatter(formatter)
    axes.margins(y=0.2)
    locator = dates.AutoDateLocator(minticks=3, maxticks=8)
    locator.intervald[dates.HOURLY] = [24]  # days are fine enough
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(dates.DateFormatter("%Y-%m-%d"))
    axes.set_title("Training time of the records (numbers: rows of the table)")
    axes.set_ylabel("training time (s)")
    figure.legend(loc="outside lower left", frameon=False)
    part_labels(figure, labels)
    figure.savefig(path, dpi=120)


# ==================================================================================================
# 6. Pages
# ==================================================================================================


def markdown_table(header: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def write_page(folder: Path, memory: str | None) -> Record:
    """Write loss.png and README.md of a record, keeping title, author's words and memory class."""
    record = Record(folder)
    words, runs, run = record.words, record.runs, record.first
    losses = [run.loss for run in runs]
    seeds = ", ".join(str(run.seed) for run in runs)
    command = shlex.join(["./run.sh", *options_of(run, record.script)])
    marks = f" ({'; '.join(record.shortfalls)}: no claim)" if record.shortfalls else ""
    several = " (mean ± standard deviation)" if len(runs) > 1 else ""
    ended = "" if run.finished else f", ended after {run.num_steps}"
    stages = stage_spread(runs).items()
    data = (
        f"{run.data_name}: `{run.config['train_files']}`; validation on {run.num_targets:,} targets"
    )
    figures = {
        "machine": joined(run.machine for run in runs),
        "versions": joined(run.versions for run in runs),
        "data": data,
        "memory": " ".join((memory or record.memory).split()),
        "schedule": f"{run.config['num_steps']} + {run.config['extension_steps']} steps{ended}",
        "runs": f"{len(runs)}, seed{'s' * (len(runs) > 1)} {seeds}{marks}",
        "time": f"{spread((run.time for run in runs), 2)} s{several}",
        "validation loss": f"{spread(losses, 4)}{several}",
        "test": target_test(losses),
        "ms a step": ", ".join(f"{name} {spread(ms, 1)}" for name, ms in stages),
    }
    rows = [
        [str(r.seed), f"{r.loss:.4f}", f"{r.time:.2f} s", f"[log]({r.run_id}.txt)"] for r in runs
    ]
    difference = "There is none."
    earlier = [other for other in all_records(skip=True) if other.first.started < run.started]
    if earlier:
        old = earlier[-1]
        summary, *parts = describe_changes(read_text(old.script), read_text(record.script))
        lines = [f"[{old.title}](../{old.folder.name}): {summary}"] + [f"- {x}" for x in parts]
        lines += ["", f"`diff {shown(old.script)} {shown(record.script)}` shows them."]
        difference = "\n".join(lines)
    page = f"""# {record.title}

{AUTHOR}
{words}
{AUTHOR_END}

{markdown_table(["", ""], figures.items())}

{markdown_table(["seed", "validation loss", "time", "log"], rows)}

![loss of all runs](loss.png)

## Against the previous record

{difference}

## Command

For every seed ({seeds}), with `train_gpt.py` of this folder:

```bash
{command} --seed SEED
```

`./run.sh reproduce {shown(folder)}` runs it again beside these figures.
"""
    write_text(folder / "README.md", page)
    draw(functools.partial(draw_losses, record), folder / "loss.png")
    return Record(folder)


def history_page(records: list[Record]) -> str:
    rows = []
    for number, record in enumerate(records, 1):
        run, name = record.first, record.folder.name
        names = ["log"] if len(record.runs) == 1 else map(str, itertools.count(1))
        links = [f"[{text}]({name}/{r.run_id}.txt)" for text, r in zip(names, record.runs)]
        p = p_at_most([run.loss for run in record.runs])
        reasons = "; ".join(record.shortfalls)
        rows.append(
            [
                f"[{number}]({name})",
                f"{run.started:%Y-%m-%d}",
                f"{spread((run.time for run in record.runs), 2)} s",
                spread((run.loss for run in record.runs), 4),
                run.steps_text,
                joined(run.machine for run in record.runs),
                run.data_name,
                record.memory,
                record.what_changed.replace("|", "\\|").replace("](../", "]("),  # a folder up
                " ".join(links),
                f"no: {reasons}" if reasons else f"p = {format_p(p)}",
            ]
        )
    header = "number,date,time,loss,steps,machine,data,memory,what changed,log,claim"
    return f"""# Records

Written by `./run.sh history` from the records' logs. A claim is a mean loss of at most {TARGET}
(p < {ALPHA}) after a whole schedule on FineWeb with {CLAIM_GPUS} GPUs or more. Times compare on one
machine, data and number of steps only.

{markdown_table(header.split(","), rows)}

![training time of the records by date](history.png)
"""


# ==================================================================================================
# 7. Commands
# ==================================================================================================


def record_command(args: argparse.Namespace, options: list[str]) -> None:
    if not re.fullmatch(r"[\w.-]+", args.name):
        raise OptionError(f"record: the name {args.name!r} makes no folder: use letters, digits, _")
    if args.logs and (options or args.runs is not None):
        raise OptionError("record: --logs takes runs that there are: leave out --runs and options")
    num_runs = 0 if args.logs else 1 if args.runs is None else args.runs
    script, same = ROOT / "train_gpt.py", re.compile(rf"\d{{4}}-\d\d-\d\d_{re.escape(args.name)}")
    folder = next((path for path in RECORDS.glob("*") if same.fullmatch(path.name)), None)
    try_folder(folder or RECORDS, num_runs + 1)
    runs, seed = [], default_seed(script)
    if folder:
        old = Record(folder)
        _ = old.words  # or an error, before anything is run
        check_replaceable(folder / "README.md")
        changes = describe_changes(read_text(old.script), read_text(script))
        if num_runs and len(changes) > 1:
            raise ReportError(
                f"{shown(folder)} has another script than train_gpt.py: choose another name, or "
                "put its script back\n" + "\n".join(changes)
            )
        script, runs, seed = old.script, old.runs, max(run.seed for run in old.runs) + 1
        if num_runs and not options:
            options = options_of(old.first, script)
    options, seed = take_seed(options, seed)
    new = [read_run(path) for path in args.logs or []]
    if num_runs:
        with clean_copy(script) as copy:
            (new,) = run_in_turn({"": (copy, options)}, range(seed, seed + num_runs))
    by_id: dict[str, Run] = {}
    for run in [*runs, *new]:
        first = by_id.setdefault(run.run_id, run)
        if not run.is_copy_of(first):
            both = f"{shown(first.path)} and {shown(run.path)}"
            raise ReportError(f"{both}: are two logs of one run: leave out the wrong one")
    runs = list(by_id.values())
    if not runs:
        raise OptionError("record: a new record needs runs: --runs N, or --logs FILE ...")
    check_runs(script, runs)
    started = min(run.started for run in runs)
    folder = folder or RECORDS / f"{started:%Y-%m-%d}_{args.name}"
    for run in new:
        copy_logs(run.path, folder)
    if not (folder / "train_gpt.py").exists():
        write_text(folder / "train_gpt.py", runs[0].source)
    record = write_page(folder, args.memory)
    print(f"\n{shown(folder)}: {len(runs)} run{'s' * (len(runs) > 1)}, {runs[0].machine}")
    print(f"time {spread((run.time for run in runs), 2)} s")
    print(f"validation loss {spread((run.loss for run in runs), 4)}")
    print(target_test([run.loss for run in runs]))
    if record.words == PLACEHOLDER:
        print(f"now say what changed in {shown(folder / 'README.md')}, then ./run.sh history")


def print_columns(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def print_beside(heads: tuple[str, str], a: list[Run], b: list[Run]) -> None:
    """Machine, time, loss and ms a step by stage in two columns, with the ratio second / first."""
    machines = [joined(run.machine for run in runs) for runs in (a, b)]
    rows = [["", *heads, "ratio"], ["machine", *machines, ""]]
    figures = {
        ("time (s)", 3): [[run.time for run in runs] for runs in (a, b)],
        ("validation loss", 4): [[run.loss for run in runs] for runs in (a, b)],
    }
    stages = stage_spread(a), stage_spread(b)
    for name in stages[0] | stages[1]:
        figures[f"ms a step, {name}", 2] = [table.get(name, []) for table in stages]
    for (name, digits), (first, second) in figures.items():
        both = first and second
        ratio = f"{statistics.fmean(second) / statistics.fmean(first):.4f}" if both else ""
        cells = [spread(values, digits) if values else "none" for values in (first, second)]
        rows.append([name, *cells, ratio])
    print_columns(rows)
    if machines[0] != machines[1]:
        print("These are times of different machines.")


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
    options = options_of(record.first, record.script) + options
    with clean_copy(record.script) as copy:
        (here,) = run_in_turn({"": (copy, options)}, itertools.islice(seeds, args.runs))
    print(f"\n{shown(args.folder)}")
    print_beside((f"recorded ({len(record.runs)})", f"here ({len(here)})"), record.runs, here)


def logs_of(path: Path) -> list[Run]:
    """Of a record its runs, of a script those in logs/ that it made; others of these that are not
    whole are left out with a line."""
    if path.is_dir():
        return Record(path).runs
    source, runs = read_text(path) + SEPARATOR, []
    for log in sorted(LOGS.glob("[!.]*.txt")):
        try:
            if read_text(log).startswith(source):
                runs.append(read_run(log))
        except (ReportError, OSError) as error:
            warn(f"left out: {error}")
    if not runs:
        raise ReportError(f"{shown(path)}: logs/ has no log of it: compare without --logs runs it")
    check_runs(path, runs)
    return runs


def compare_command(args: argparse.Namespace, options: list[str]) -> None:
    if args.logs and (options or args.runs is not None):
        raise OptionError("compare: --logs takes runs that there are: leave out --runs and options")
    paths = args.a, args.b
    scripts = [path / "train_gpt.py" if path.is_dir() else path for path in paths]
    texts, names = [read_text(script) for script in scripts], list(map(shown, scripts))
    if args.logs:
        results = [sorted(logs_of(path), key=lambda run: run.seed) for path in paths]
    else:
        # A record runs with its own command, a bare script with that of the other's record, and
        # both with the options given here.
        records = {i: Record(path) for i, path in enumerate(paths) if path.is_dir()}
        model = next(iter(records.values())).first if records else None
        options, seed = take_seed(options, model.seed if model else default_seed(scripts[0]))
        known = {i: options_of(r.first, r.script) for i, r in records.items()}
        own = [known.get(i, known.get(1 - i, [])) + options for i in range(2)]
        with clean_copy(scripts[0]) as first, clean_copy(scripts[1]) as second:
            jobs = {"A": (first, own[0]), "B": (second, own[1])}
            results = run_in_turn(jobs, range(seed, seed + (args.runs or 1)))
    print(f"\nA  {shown(args.a)}\nB  {shown(args.b)}\n")
    print_beside((f"A ({len(results[0])})", f"B ({len(results[1])})"), *results)
    rows = [["pair", "seed A", "seed B", "time A", "time B", "B / A", "loss A", "loss B"]]
    ratios = []
    for i, (a, b) in enumerate(zip(*results), 1):
        ratios.append(b.time / a.time)
        times = f"{a.time:.3f} s", f"{b.time:.3f} s", f"{ratios[-1]:.4f}"
        rows.append([str(i), str(a.seed), str(b.seed), *times, f"{a.loss:.4f}", f"{b.loss:.4f}"])
    print()
    print_columns(rows)
    print(f"\ntime B / A, pair by pair: {spread(ratios, 4)}")
    losses = [[run.loss for run in runs] for runs in results]
    difference = statistics.fmean(losses[1]) - statistics.fmean(losses[0])
    p = p_different(*losses)
    test = "too few runs, or equal losses: no test"
    if p is not None:
        count = joined(map(len, losses))
        test = (
            f"p = {format_p(p)}: {'' if p < ALPHA else 'not '}significant at {ALPHA} (n = {count})"
        )
    print(f"loss B - A: {difference:+.4f}; Welch's two-sided t-test: {test}")
    changes = config_changes(results[0][0], results[1][0])
    if changes:
        print("\noptions that differ, in A and in B:\n" + "\n".join(changes))
    print("\nFrom A to B: " + "\n".join(describe_changes(*texts)).replace("`", ""))
    print("\n".join(short_diff(*texts, *names, limit=DIFF_LINES)))


def history_command(args: argparse.Namespace, options: list[str]) -> None:
    if options:
        raise OptionError(f"history: takes no options, found {shlex.join(options)}")
    records = all_records()
    if not records:
        raise ReportError(f"{shown(RECORDS)}: has no record: make one with ./run.sh record NAME")
    write_text(RECORDS / "README.md", history_page(records))
    draw(functools.partial(draw_history, records), RECORDS / "history.png")
    print(f"{shown(RECORDS / 'README.md')} and history.png: {len(records)} records")


# Command line -------------------------------------------------------------------------------------


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
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
    number = whole_number(0, MOST_RUNS)
    record.add_argument("--runs", type=number, help="with seeds in a row [1, with --logs none]")
    logs = "take these runs (.txt or .json) instead of training"
    record.add_argument("--logs", nargs="+", type=Path, metavar="FILE", help=logs)
    memory = "none beyond embeddings, hashed n-gram rows, or exact match; kept when written again"
    record.add_argument("--memory", help=memory)
    reproduce = command("reproduce", reproduce_command, "run a record's script again")
    reproduce.add_argument("folder", type=Path, metavar="FOLDER", help="of the record")
    compare = command("compare", compare_command, "run two scripts or records in turn")
    for name in ("a", "b"):
        compare.add_argument(name, type=Path, metavar=name.upper(), help="a script or a record")
    number = whole_number(1, MOST_RUNS)
    reproduce.add_argument("--runs", type=number, default=1, help="of its script [1]")
    compare.add_argument("--runs", type=number, help="of each script [1]")
    compare.add_argument("--logs", action="store_true", help="compare logs that there are")
    command("history", history_command, "write records/README.md and records/history.png")
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
    sys.exit(terminal.run_tool(main))
