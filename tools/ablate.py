"""Train variants of the script one after the other in one process, which compiles only once:
`./run.sh ablate FILE [NAME ...] [-- --option value ...]`.

FILE is in TOML, a table a variant: the options that it has more, and texts of the script with what
takes their place, each of which must occur there once.

    [hotter]
    options = ["--muon_lr", "0.03"]
    [no_offset]
    replace = [["// batch.sequences if is_long else 0", "* 0"]]

"base" is the script as it is, hotter+no_offset has the changes of both. Without names base and then
all of FILE are trained, with what stands behind -- in every run. Every variant is tried on before
the first is trained; one that fails is reported and the next one begins. A line a variant goes to
the screen and to logs/ablate/<FILE>.txt, its script is kept beside that as <NAME>.py.
"""

import argparse
import contextlib
import gc
import importlib.util
import itertools
import re
import statistics
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import console

if __name__ == "__main__":
    console.end_on_signals()

import torch

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("logs/ablate")
SPANS = (0.2, 0.33), (0.5, 0.66), (0.7, 0.85), (0.92, 1.0)  # of the steps, in a row's mean losses


class AblateError(Exception):
    """Something the user can fix. The message names the file or variant and the remedy."""


@dataclass
class Variant:
    """Changes of the script."""

    options: list[str] = field(default_factory=list)
    replace: list[list[str]] = field(default_factory=list)


def are_texts(value: object, count: int | None = None) -> bool:
    """Whether it is a list of texts, of this many if any number is given."""
    texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
    return texts and count in (None, len(value))


def read_variants(path: Path) -> dict[str, Variant]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise AblateError(f"{path}: cannot be read as TOML: {error}") from None
    variants = {"base": Variant()}
    for name, fields in tables.items():
        if (
            name == "base"
            or not re.fullmatch(r"[\w-][\w.-]*", name)
            or not isinstance(fields, dict)
        ):
            found = f"{path}: {name!r}: call a table of options and replace otherwise"
            raise AblateError(f"{found}, by letters, digits, '_', '-' and '.'")
        unknown = fields.keys() - {"options", "replace"}
        if unknown:
            raise AblateError(f"{path}: [{name}] has {', '.join(unknown)}, not options or replace")
        variant = variants[name] = Variant(**fields)
        pairs = variant.replace if isinstance(variant.replace, list) else [None]
        if not are_texts(variant.options) or not all(are_texts(pair, 2) for pair in pairs):
            form = 'options = ["--name", "value"], replace = [["old", "new"]]'
            raise AblateError(f"{path}: [{name}] is not of the form {form}")
    return variants


def make(
    script: Path, name: str, variants: dict[str, Variant], options: list[str], out: Path
) -> tuple[ModuleType, object]:
    """The script with these changes as a module, and its config."""
    try:
        text, options = script.read_text(encoding="utf-8"), list(options)
    except (OSError, UnicodeDecodeError) as error:
        raise AblateError(f"{script}: cannot be read: {error}") from None
    for part in name.split("+"):
        if part not in variants:
            raise AblateError(f"{part}: no such variant: there are {', '.join(variants)}")
        for old, new in variants[part].replace:
            if text.count(old) != 1:
                found = f"{old!r} occurs {text.count(old)} times in {script}"
                raise AblateError(f"[{part}]: {found}: replace takes what occurs once")
            text = text.replace(old, new)
        options += variants[part].options
    path = out / f"{name}.py"
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AblateError(f"{path}: cannot be written: {error}") from None
    spec = importlib.util.spec_from_file_location(f"variant_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever the change does)
        raise AblateError(f"[{name}]: {type(error).__name__} on import: {error}") from None
    try:
        config = module.parse_args(options)
        module.check_config(config, 1)
    except SystemExit:
        raise AblateError(f"[{name}]: these options cannot be read, as said above") from None
    except module.UserError as error:
        raise AblateError(f"[{name}]: {error}") from None
    return module, config


def summary(module: ModuleType, config: object, data: dict) -> str:
    """What a run came to: step:loss@time of every validation; the training loss in four spans;
    median ms a step of each row of the stages; preparation and memory."""
    schedule, steps, end = module.Schedule(config), data["steps"], data["summary"]
    scores = [(row["step"], row["val_loss"], row["train_time_s"]) for row in data["validations"]]
    text = " ".join(f"{step}:{loss:.4f}@{seconds:.2f}s" for step, loss, seconds in scores)
    spans = [(int(a * len(steps)), int(b * len(steps))) for a, b in SPANS]
    spans = (steps[a : max(a + 1, b)] for a, b in spans)
    losses = (statistics.fmean(row["train_loss"] for row in span) for span in spans)
    stages = itertools.groupby(steps, key=lambda row: schedule.stage(row["step"] - 1))
    ms = (statistics.median(row["step_ms"] for row in rows) for _, rows in stages)
    text += " | train " + " ".join(f"{loss:.4f}" for loss in losses)
    text += " | " + "/".join(f"{number:.1f}" for number in ms) + " ms"
    return f"{text} | prep {end['preparation_s']:.0f} s, {end['peak_memory_gib']:.1f} GiB"


def run(module: ModuleType, config: object) -> str:
    """Train; gives the summary, or what went wrong. The log's .json is written either way."""
    log = None
    try:
        runtime = module.start_runtime(config, None)
        log = runtime.log
        module.train(config, runtime)
        return summary(module, config, log.data)
    except BaseException as error:
        if log is not None:
            with contextlib.suppress(OSError):
                log.write_json()
        if isinstance(error, KeyboardInterrupt):
            raise
        message = str(error).strip().partition("\n")[0]
        return f"failed: {type(error).__name__}: {message}"


def append(table: Path, text: str) -> None:
    try:
        with table.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise AblateError(f"{table}: cannot be written: {error}") from None


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = console.Parser(
        prog="./run.sh ablate", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--script", type=Path, default=ROOT / "train_gpt.py", metavar="SCRIPT")
    args, options = parser.parse_intermixed_args(arguments[:split]), arguments[split + 1 :]
    try:
        variants = read_variants(args.file)
        names = args.names or list(variants)
        made = [make(args.script, name, variants, options, OUT) for name in names]
        table = OUT / f"{args.file.stem}.txt"
        append(table, "")
    except AblateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    failures, width, lost = 0, max(map(len, names)), ""
    for count, name in enumerate(names):
        try:
            line = run(*made.pop(0))  # so that nothing of it stays
        except KeyboardInterrupt:
            kept = f"; {table} keeps the lines of the {count} variants before it" if count else ""
            raise KeyboardInterrupt(kept) from None
        gc.collect()
        failures += line.startswith("failed")
        line = f"{name:{width}} {line}"
        print(line, flush=True)
        try:
            append(table, line + "\n")
        except AblateError as error:  # the screen has it
            lost = str(error)
            print(f"warning: {lost}", file=sys.stderr)
        if torch.cuda.is_available():
            try:
                torch._dynamo.reset()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            except RuntimeError:
                print("error: the GPU takes no more work of this process", file=sys.stderr)
                return 1
    keeps = f"{table} does not keep all lines" if lost else f"{table} keeps the lines"
    print(f"{len(names)} variants, {failures} failed; {keeps}")
    return 1 if failures or lost else 0


if __name__ == "__main__":
    sys.exit(console.run_tool(main))
