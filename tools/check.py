"""Judges a script by what its own validation computes, on the CPU: `./run.sh check SCRIPT`.

The script's validate() is given small files of tokens, and its GPT, with random numbers for all
that it learns, the rows that validate() makes of them. The loss of one position is that of a row
whose other targets are IGNORED_TARGET. Then the script trains a few steps, twice, with different
validation files. What predicts by other means than the layers, such as matches in what was read
and the canonical mask, is judged with and without it. A script of the optimization track is also
judged by its rules: the fixed part, what its Optimizer section uses, the model, one pass over each
batch of a step, the tokens of the stream in order, and the same weights on all ranks. One line a
check; exit code 1 when one fails or the script cannot be judged.
"""

import ast
import builtins
import contextlib
import dataclasses
import functools
import glob
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType

import console

if __name__ == "__main__":
    console.end_on_signals()

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gpt.py"  # of the main and the medium track
SIMPLE_SCRIPT = ROOT / "records" / "optimization" / "train_gpt_simple.py"
sys.path.append(str(SIMPLE_SCRIPT.parent))
import submission

NAMES = "PRESETS Config Runtime Log GPT validate IGNORED_TARGET"
START_TOKEN = 50256
ROW, ROWS = 16, 8  # tokens of a validation row, rows of a step on all of up to 8 ranks
TOLERANCE = 1e-5  # nats: what rounding may change in a loss of about ten
# How large the judged model is; its layer plan is the speedrun's.
SIZES = {"model_dim": 32, "head_dim": 8, "mlp_dim": 64, "gate_dim": 8}
SIZES |= {"ngram_rows": 512}
SIZES |= {"dtype": "float32", "min_mean_doc_len": 1}
SIZES |= {"bigram_rows": 512, "compile": "none"}  # of scripts of older records
# Options by the names that they had in scripts of older records.
RENAMED = {"rows_per_step": "sequences_per_step", "val_row_tokens": "val_sequence_tokens"}
RENAMED |= {"tokens_per_draw": "tokens_per_sampling"}
GONE = "compile", "sample", "sample_tokens", "temperature"  # options that checkpoints may have
# Judged without and with what predicts, or chooses weights, by other means than the layers: the
# values of PLAIN and of EXTRAS, as far as a script has them. Lookups are off by default.
PLAIN = {"canonical_mask": False, "average_shares": ()}
EXTRAS = {"match_orders": (2, 3), "match_slots": 2**12, "canonical_mask": True}
EXTRAS |= {"average_shares": (0.5,)}
WINDOWS = 3, 7  # short, long
DOCUMENTS = 5, 10, 11, 20  # where documents start in the tokens of a Judge
# A run of the optimization track is small, so that it can have many steps.
SIMPLE_STEPS, SIMPLE_VAL_EVERY, SIMPLE_VOCAB = 25, 10, 1024
COMPARED_STEPS = 0, 13, SIMPLE_STEPS - 1  # whose gradients are compared with the fixed model's

# What an Optimizer section may use of the script's imports, and what it may not use of Python.
USABLE = {"contextlib", "dataclasses", "math", "np", "torch", "dist", "F", "nn", "Tensor"}
USABLE |= {"Iterator", "NamedTuple"}
USABLE_PACKAGES = {"contextlib", "dataclasses", "math", "numpy", "torch"}
REFUSED_NAMES = {"open", "exec", "eval", "compile", "globals", "locals", "vars"}
REFUSED_NAMES |= {"breakpoint", "__import__", "__builtins__", "__file__", "__loader__", "__spec__"}
REFUSED_ATTRIBUTES = {"fromfile", "from_file", "memmap", "open_memmap", "loadtxt", "genfromtxt"}
REFUSED_ATTRIBUTES |= {"hub", "_getframe", "f_locals", "f_globals", "f_back", "tb_frame"}
REFUSED_ATTRIBUTES |= {"gi_frame", "_modules", "_parameters", "_buffers"}
REFUSED_PARTS = {"load", "save", "optim"}  # of torch and numpy; classes may have methods so named
SPECIAL_METHODS = {"__init__", "__post_init__", "__enter__", "__exit__", "__call__", "__name__"}
# Files that Python and torch may open while code of the section runs are in these folders.
LIBRARY_FOLDERS = {*map(os.path.realpath, sysconfig.get_paths().values()), "/dev", "/proc", "/sys"}
TORCH = os.path.dirname(os.path.realpath(torch.__file__))
LIBRARY_FOLDERS.add(TORCH)
COMPILERS = f"{TORCH}/_dynamo/", f"{TORCH}/_inductor/"  # of torch.compile: open sources and caches


class Unjudgeable(Exception):
    """The script, or what it saved, lacks what is needed. The message names the file."""


class Failed(Exception):
    """A check went wrong. The message says what was seen."""


def load_script(path: Path) -> ModuleType:
    """The script as a module; Unjudgeable if it has not all of NAMES."""
    spec = importlib.util.spec_from_file_location("judged_script", path)
    if spec is None or not path.is_file():
        raise Unjudgeable(f"{path}: no such Python script")
    script = sys.modules["judged_script"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(script)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever the script does)
        raise Unjudgeable(f"{path}: {type(error).__name__} on import: {error}") from None
    missing = [name for name in NAMES.split() if not hasattr(script, name)]
    if missing:
        raise Unjudgeable(f"{path}: cannot be judged, it has no {', '.join(missing)}")
    return script


def field_names(script: ModuleType) -> set[str]:
    return {field.name for field in dataclasses.fields(script.Config)}


def renamed(script: ModuleType, options: dict) -> dict:
    """Options by the names that they have in the script, be it older or newer than they."""
    known, other = field_names(script), RENAMED | {new: old for old, new in RENAMED.items()}
    return {name if name in known else other.get(name, name): x for name, x in options.items()}


def loss_of(model: torch.nn.Module) -> Callable[..., Tensor]:
    """What scores a batch: a method, or the model itself in scripts of older records."""
    return getattr(model, "validation_loss", model)


def is_simple(script: ModuleType) -> bool:
    """Whether it is one of the optimization track."""
    return "sequence_tokens" in field_names(script)


def longest_sequence(config: object) -> int:
    """How many tokens the model of a config is asked about at once."""
    names = "val_sequence_tokens", "val_row_tokens", "sequence_tokens"
    return next(getattr(config, name) for name in names if hasattr(config, name))


def variants(script: ModuleType) -> list[dict]:
    """Changes of the config that a script is judged with: those of PLAIN and of EXTRAS that it
    has."""
    known = field_names(script)
    plain, extras = ({n: x for n, x in table.items() if n in known} for table in (PLAIN, EXTRAS))
    return [plain, extras] if extras else [{}]


def token_table(script: ModuleType):
    """GPT-2's tokens as the script reads them; Unjudgeable if it cannot."""
    try:
        return script.read_token_table()
    except script.UserError as error:
        raise Unjudgeable(str(error)) from None


@functools.cache
def impossible_pairs(script: ModuleType) -> Tensor:
    """Of tokens, in bits, as a script with the canonical mask finds them in training."""
    table, vocab = token_table(script), script.Config().padded_vocab_size
    return torch.from_numpy(script.impossible_pairs(table, vocab))


def fill_mask(script: ModuleType, model: torch.nn.Module) -> None:
    """Of a model with the canonical mask, which is neither learned nor in a checkpoint."""
    if getattr(model, "impossible", None) is not None:
        rows, row_bytes = model.impossible.shape
        model.impossible.copy_(impossible_pairs(script)[:rows, :row_bytes])


@functools.cache
def free_tokens(script: ModuleType) -> np.ndarray:
    """Tokens any of which can follow any other: all, or words of the canonical mask's table, each
    with a blank before it."""
    if "canonical_mask" not in field_names(script):
        return np.arange(START_TOKEN)
    tokens = token_table(script).tokens
    return np.array([i for i, token in enumerate(tokens) if re.fullmatch(rb" [A-Za-z]+", token)])


def start_runtime(script: ModuleType, device: str, rank: int = 0, world_size: int = 1):
    """One process of world_size that communicates with no other and logs nothing."""

    class Alone(script.Runtime):
        def all_reduce(self, tensor: Tensor) -> Tensor:
            return tensor

        def all_gather(self, gathered: Tensor, part: Tensor) -> None:
            gathered.unflatten(0, (world_size, -1)).copy_(part)

    return Alone(rank, world_size, torch.device(device), script.Log(None))


def script_of(checkpoint: Path | str) -> Path:
    """The script in this repository whose options a checkpoint has; train_gpt.py for no checkpoint,
    which load_checkpoint then says."""
    try:
        config = torch.load(checkpoint, mmap=True, weights_only=True)["config"]
        return SIMPLE_SCRIPT if "sequence_tokens" in config else SCRIPT
    except Exception:  # noqa: BLE001 (whatever the file does to the unpickler)
        return SCRIPT


def load_checkpoint(script: ModuleType, path: str, device: str):
    """The model that --checkpoint saved, its config, and whether its tokens are bytes."""
    known = field_names(script)
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        fields = renamed(script, saved["config"]) | {"compile": "none"}
        fields = {name: text for name, text in fields.items() if name in known or name not in GONE}
        if "canonical_mask" in known:  # without the field it was trained and scored without a mask
            fields = {"canonical_mask": "false"} | fields
        read = getattr(script, "config_from_text", lambda values: script.Config(**values))
        config, byte_tokens = read(fields), saved.get("byte_tokens", False)
        model, weights = script.GPT(config, start_runtime(script, device)), saved["weights"]
    except OSError as error:
        raise Unjudgeable(f"{path}: cannot be read ({error.strerror})") from None
    except Exception:  # noqa: BLE001 (whatever the file does to the unpickler)
        raise Unjudgeable(
            f"{path}: not a checkpoint of {script.__file__}: make one with --checkpoint in a "
            "training run, or see whether ./run.sh eval --script has the script that did"
        ) from None
    for name, tensor in model.state_dict().items():
        found = weights.get(name, tensor.new_empty(0))
        first = int(name.endswith("_bank"))  # whose entries are padded to the number of ranks
        if found.shape[first:] != tensor.shape[first:]:
            raise Unjudgeable(
                f"{path}: {name} is {list(found.shape)}, its options ask for "
                f"{list(tensor.shape)}: make it again with --checkpoint in a training run"
            )
        rows = min(len(tensor), len(found))
        tensor[:rows] = found[:rows]
    if hasattr(model, "tied"):  # scripts of older records part embedding and head
        model.tied = False  # a checkpoint has both matrices
    fill_mask(script, model)
    return model, config, byte_tokens


def as_windows(script: ModuleType, short: int, long: int) -> tuple:
    """What the script's validate() takes behind num_targets, and its model behind the row."""
    if "window_short" in inspect.signature(script.validate).parameters:
        return short, long
    return (script.Windows(short, long),) if hasattr(script, "Windows") else ()


def final_windows(script: ModuleType, config: object) -> tuple:
    """The same for a model with its final weights."""
    if is_simple(script):  # has no windows
        return ()
    return as_windows(script, config.extension[0].window_short, config.final_window_long)


def document_batch(
    script: ModuleType, config: object, tokens: list[int], targets: dict[int, int], device: str,
    multiple: int = 1,
):  # fmt: skip
    """The script's Batch of one document, with these targets by position, all others ignored. It is
    filled up, behind the document, to a multiple of tokens or the length that the model takes."""
    count = len(tokens)
    size = config.sequence_tokens if is_simple(script) else -(-count // multiple) * multiple
    row = torch.full((size,), START_TOKEN, dtype=torch.int32)
    row[:count] = torch.tensor(tokens)
    chosen = torch.full((size,), script.IGNORED_TARGET)
    for position, target in targets.items():
        chosen[position] = target
    row, chosen = row.to(device), chosen.to(device)
    if is_simple(script):
        return script.Batch(row, chosen)
    ends = torch.tensor([0, count, size], dtype=torch.int32, device=device)
    return script.Batch(row, chosen, ends, size)


def probabilities(
    script: ModuleType, model: torch.nn.Module, batch, windows: tuple, position: int
) -> Tensor:
    """Of all tokens behind this position, (vocabulary,)."""
    if is_simple(script):
        return model.logits(batch.tokens)[position].softmax(-1)
    return model.probabilities(batch, *windows, slice(position, position + 1))[0]


def write_shard(path: Path, tokens: np.ndarray) -> Path:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    return path


class Probe:
    """Stands in for the model in validate() and keeps the rows that it is called with, and their
    losses: of one rank's rows, and the tokens before position `until` alone where it is given."""

    def __init__(
        self, model: torch.nn.Module, ignored: int, silent: bool = False, until: int | None = None
    ):
        self.model, self.ignored, self.silent, self.until = model, ignored, silent, until
        self.rows, self.losses = [], []

    def __call__(self, row, *windows) -> Tensor:
        if hasattr(self.model, "validation_loss"):  # what single losses are taken from
            raise Failed("validate() does not score by the model's validation_loss")
        return self.score(self.model, row, *windows)

    def validation_loss(self, row, *windows) -> Tensor:
        return self.score(self.model.validation_loss, row, *windows)

    def score(self, loss_of_row: Callable[..., Tensor], row, *windows) -> Tensor:
        self.rows.append(row)
        if self.until is not None:  # the target of a position is the next token
            end = max(0, self.until - 1 - ROW * (len(self.rows) - 1))
            targets = row.targets.clone()
            targets[end:] = self.ignored
            row = row._replace(targets=targets)
        loss = torch.zeros(()) if self.silent else loss_of_row(row, *windows)
        self.losses.append(float(loss))
        return loss

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)


class Judge:
    """A script's model with random weights, and its validation on files made here."""

    def __init__(self, script: ModuleType, folder: Path, **changes: object):
        self.script, self.file = script, folder / "judged_val.bin"
        tiny, plan = script.PRESETS["tiny"], {"layers": script.PRESETS["speedrun"].layers}
        known = field_names(script)
        fields = {**SIZES, **plan, "val_sequence_tokens": ROW, "final_window_long": WINDOWS[1]}
        fields |= {"sequences_per_step": ROWS, "sequence_tokens": ROW, "micro_batch_tokens": ROW}
        # mix_window: of the head mixing that scripts of older records have
        fields |= {"mix_window": WINDOWS[0], "val_file": glob.escape(str(self.file)), **changes}
        fields = renamed(script, fields)
        self.config = dataclasses.replace(
            tiny, **{name: value for name, value in fields.items() if name in known}
        )
        self.windows = as_windows(script, *WINDOWS)
        self.model = script.GPT(self.config, start_runtime(script, "cpu"))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            # A fresh model has zero gates and projections, behind which a leak would not show.
            saved = self.model.state_dict().values()  # parameters, and the rows of n-grams
            for weights in filter(torch.is_floating_point, saved):
                noise = torch.randn(weights.shape, generator=generator)
                if weights.dim() > 1:
                    weights.copy_(noise / math.sqrt(weights.size(-1)))
                else:
                    weights.add_(0.2 * noise)
        if hasattr(self.model, "tied"):
            self.model.tied = False
        fill_mask(script, self.model)

    def validate(
        self, tokens: np.ndarray, num_targets: int, rank: int = 0, world_size: int = 1, **options
    ) -> tuple[float, Probe]:
        """validate() on a file of these tokens: its result, and what the model was called with."""
        write_shard(self.file, tokens)
        probe = Probe(self.model, self.script.IGNORED_TARGET, **options)
        runtime = start_runtime(self.script, "cpu", rank, world_size)
        loss = self.script.validate(probe, self.config, runtime, num_targets, *self.windows)
        return float(loss), probe

    @torch.no_grad()
    def score(self, row, targets: dict[int, int]) -> float:
        """The loss of the row with these targets by position, all others ignored."""
        chosen = torch.full_like(row.targets, self.script.IGNORED_TARGET)
        for position, target in targets.items():
            chosen[position] = target
        return float(loss_of(self.model)(row._replace(targets=chosen), *self.windows))

    def single_losses(self, rows: list, num_targets: int) -> list[float]:
        places = [(rows[t // ROW], t % ROW) for t in range(num_targets)]
        return [self.score(row, {t: int(row.targets[t])}) for row, t in places]


def random_tokens(script: ModuleType, seed: int, count: int) -> np.ndarray:
    tokens = np.random.default_rng(seed).choice(free_tokens(script), count)
    tokens[[start for start in DOCUMENTS if start < count]] = START_TOKEN
    return tokens


# ==================================================================================================
# The checks: each returns what was seen, or raises Failed
# ==================================================================================================


def require(condition: bool, seen: str) -> str:
    if not condition:
        raise Failed(seen)
    return seen


def check_coverage(script: ModuleType, folder: Path) -> str:
    """validate() scores each of the first targets of the file once, on any number of ranks."""
    judge, num_targets = Judge(script, folder), (ROWS + 5) * ROW + 13  # of two steps
    tokens = np.arange(num_targets + 50)  # so that a target tells its position
    tokens[[30, 31, 64, 100]] = START_TOKEN
    expected = Counter(zip(tokens[:num_targets].tolist(), tokens[1 : num_targets + 1].tolist()))
    for world_size in (1, 2, 4, 8):
        seen = Counter()
        for rank in range(world_size):
            for row in judge.validate(tokens, num_targets, rank, world_size, silent=True)[1].rows:
                kept = row.targets != script.IGNORED_TARGET
                seen.update(zip(row.tokens[kept].tolist(), row.targets[kept].tolist()))
        if seen != expected:
            missing, surplus = (expected - seen).total(), (seen - expected).total()
            raise Failed(f"{world_size} ranks: {missing} targets missing, {surplus} too many")
    return f"{num_targets} targets, each scored once by 1, 2, 4 and 8 ranks"


def check_mean(script: ModuleType, folder: Path) -> str:
    """What validate() returns is the mean of the losses of the single targets."""
    num_targets = ROW + 13
    tokens = random_tokens(script, 1, num_targets + 1)
    for changes in variants(script):
        judge = Judge(script, folder, **changes)
        loss, probe = judge.validate(tokens, num_targets)
        mean = sum(judge.single_losses(probe.rows, num_targets)) / num_targets
        seen = f"validate() gives {loss:.6f}, the mean of the single losses is {mean:.6f}"
        require(abs(loss - mean) < TOLERANCE, seen)
        for ranks in (2, 4, 8):  # each gives its share of the sum
            loss = sum(judge.validate(tokens, num_targets, rank, ranks)[0] for rank in range(ranks))
            require(abs(loss - mean) < TOLERANCE, f"{ranks} ranks: {seen}, theirs {loss:.6f}")
    return f"{seen}, on 1, 2, 4 and 8 ranks"


def check_causality(script: ModuleType, folder: Path) -> str:
    """Another token later in the file changes no earlier loss; some later one it does."""
    worst, count, free = 0.0, 0, free_tokens(script)
    # What has been scored may help with later rows, so whole validations. Contexts recur in a step,
    # each with a few tokens of its own; the other token is the one that tables would keep.
    step = ROWS * ROW
    num_targets = 2 * step
    tokens = np.random.default_rng(7).integers(0, 3, num_targets + 1)
    tokens = free[tokens + 3 * (np.arange(num_targets + 1) // step)]
    for changes in variants(script):
        judge = Judge(script, folder, **changes)
        for k in 14, step + 3, step + 110:
            changed = tokens.copy()
            changed[k] = free[9000]
            before, after = (
                judge.validate(text, num_targets, until=k)[1].losses for text in (tokens, changed)
            )
            for row in range(k // ROW + 1):
                moved = abs(after[row] - before[row]) / ROW
                worst, count = max(worst, moved), count + 1
                require(moved <= TOLERANCE, f"token {k} moved the loss of row {row} by {moved:.2g}")
    num_targets, other = 2 * ROW, free[7]
    tokens = random_tokens(script, 2, num_targets + 1)
    for changes in variants(script):
        judge = Judge(script, folder, **changes)
        rows = judge.validate(tokens, num_targets)[1].rows
        before = judge.single_losses(rows, num_targets)
        # within documents, at their starts (the token becomes another), and a start where none was
        for k in 3, 5, 8, 11, 15, 20, 24:
            changed = tokens.copy()
            changed[k] = START_TOKEN if k == 8 else other
            changed_rows = judge.validate(changed, num_targets)[1].rows
            for t in sorted({*range(max(0, k - 5), k), 0, k // 2}):
                row, target = changed_rows[t // ROW], int(rows[t // ROW].targets[t % ROW])
                moved = abs(judge.score(row, {t % ROW: target}) - before[t])
                worst, count = max(worst, moved), count + 1
                seen = f"token {k} moved the loss of the prediction behind token {t} by {moved:.2g}"
                require(moved <= TOLERANCE, seen)
            own = judge.score(changed_rows[k // ROW], {k % ROW: int(tokens[k + 1])})
            require(own != before[k], f"token {k} has no influence on the prediction behind it")
    return f"{count} earlier losses moved by at most {worst:.1g}"


def check_targets(script: ModuleType, folder: Path) -> str:
    """A target matters for its own loss alone: losses of any targets add up."""
    worst = 0.0
    for changes in variants(script):
        judge, rng = Judge(script, folder, **changes), np.random.default_rng(3)
        row = judge.validate(random_tokens(script, 3, ROW + 1), ROW)[1].rows[0]
        targets = dict(enumerate(rng.choice(free_tokens(script), ROW).tolist()))
        single = {t: judge.score(row, {t: target}) for t, target in targets.items()}
        whole, total = judge.score(row, targets), math.fsum(single.values())
        worst = max(worst, abs(whole - total) / ROW)
        for t in range(0, ROW - 1, 4):
            pair = judge.score(row, {t: targets[t], t + 1: targets[t + 1]})
            worst = max(worst, abs(pair - single[t] - single[t + 1]))
    seen = f"losses of random targets add up within {worst:.1g} a target"
    return require(worst <= 2 * TOLERANCE, seen)


def check_normalisation(script: ModuleType, folder: Path) -> str:
    """Probabilities sum to 1: with a vocabulary of 128 all of them, of the whole one a sample. With
    the canonical mask those are 0 that the table rules out behind the token of their position."""
    tiny, position, seen = script.PRESETS["tiny"], 11, ""
    padded = getattr(dataclasses.replace(tiny, vocab_size=128), "padded_vocab_size", 128)
    size = 128 if padded == 128 else 127  # where a pointer needs an unused entry
    for changes in variants(script):
        judge = Judge(script, folder, **changes, vocab_size=size, layers=tiny.layers)
        tokens = np.random.default_rng(4).integers(0, size, ROW + 1)
        row = judge.validate(tokens, ROW, silent=True)[1].rows[0]
        losses = [judge.score(row, {position: token}) for token in range(size)]
        total = math.fsum(math.exp(-loss) for loss in losses)
        require(abs(total - 1) < 1e-4, f"the probabilities of {size} tokens sum to {total:.6g}")
        if changes.get("canonical_mask"):
            bits = impossible_pairs(script)[tokens[position]].numpy()
            ruled_out = np.unpackbits(bits, bitorder="little")[:size] > 0
            wrong = int((np.isinf(losses) != ruled_out).sum())
            require(wrong == 0, f"{wrong} of {size} tokens are masked otherwise than by the table")
        judge = Judge(script, folder, **changes, layers=tiny.layers)
        row = judge.validate(random_tokens(script, 4, ROW + 1), ROW)[1].rows[0]
        sample = np.random.default_rng(5).choice(tiny.vocab_size, 80, replace=False).tolist()
        losses = [judge.score(row, {position: token}) for token in sample]
        shares = [tiny.vocab_size * math.exp(-loss) for loss in losses]
        mean, error = float(np.mean(shares)), float(np.std(shares)) / math.sqrt(len(shares))
        seen = f"sum {total:.6f}; of the whole vocabulary, from a sample, {mean:.2f} ± {error:.2f}"
        require(abs(mean - 1) < 5 * error, seen)
    return seen


def check_fixed_part(script: ModuleType, folder: Path) -> str:
    """Of the optimization track: outside its Optimizer section a script is train_gpt_simple.py, as
    it is or as records have it."""
    text = Path(script.__file__).read_text(encoding="utf-8")
    try:
        known = submission.fixed_part(text, "the script") in submission.fixed_parts()
    except submission.SubmissionError as error:
        raise Failed(str(error)) from None
    where = "train_gpt_simple.py outside the Optimizer section"
    require(known, f"the script differs from {where}")
    return f"the script is that of {where}"


def check_section(script: ModuleType, folder: Path) -> str:
    """Of the optimization track: the Optimizer section uses and changes nothing but its own."""
    text = Path(script.__file__).read_text(encoding="utf-8")
    try:
        before, section, behind = submission.split(text, "the script")
    except submission.SubmissionError as error:
        raise Failed(str(error)) from None
    faults = sorted(set(section_faults(ast.parse(section), before + behind, vars(script))))
    first_line = before.count("\n")  # of the section, less 1
    texts = [f"line {first_line + line} {what}" for line, what in faults]
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    require(not texts, "; ".join(texts[:3]) + more)
    size = section.count("\n")
    return f"{size} lines without imports, files, names of the fixed part or changes of modules"


def section_faults(tree: ast.Module, fixed: str, namespace: dict) -> Iterator[tuple[int, str]]:
    """Line in the section, and what is wrong there, for what an Optimizer section may not do.

    tree: the section; fixed: source of the fixed part; namespace: names of the script, of which
    those of its imports are followed through dots.
    """
    fixed_tree, imported = ast.parse(fixed), submission.imported_names(fixed)
    defined = {getattr(node, "name", None) for node in fixed_tree.body}
    names = [node for statement in fixed_tree.body for node in getattr(statement, "targets", ())]
    defined |= {node.id for node in names if isinstance(node, ast.Name)}
    refused = REFUSED_NAMES | defined | (imported - USABLE)
    model_attributes = {"cos", "sin", "weight", "bias"}  # and all that the model's classes set
    for kind in fixed_tree.body:
        bases = map(ast.unparse, getattr(kind, "bases", ()))
        if any(base.startswith("nn.") for base in bases):
            model_attributes |= {x.name for x in kind.body if isinstance(x, ast.FunctionDef)}
            set_here = (x for x in ast.walk(kind) if isinstance(x, ast.Attribute))
            model_attributes |= {x.attr for x in set_here if isinstance(x.ctx, ast.Store)}

    def resolve(node: ast.AST) -> object:
        """The module or class that a name or names behind dots stand for; None for all else."""
        if isinstance(node, ast.Name):
            return namespace.get(node.id) if node.id in imported else None
        if isinstance(node, ast.Attribute):
            owner = resolve(node.value)
            found = None if owner is None else getattr(owner, node.attr, None)
            return found if isinstance(found, ModuleType | type) else None
        return None

    def is_own(node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == "self"

    def root(node: ast.AST) -> str:
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        return node.id if isinstance(node, ast.Name) else ""

    def is_refused(name: str) -> bool:
        special = re.fullmatch("__.*__", name) and name not in SPECIAL_METHODS
        return special or name in REFUSED_ATTRIBUTES or name.startswith("register_")

    nodes = [*ast.walk(tree)]
    before_dot = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        line = getattr(node, "lineno", 0)
        match node:
            case ast.Import() | ast.ImportFrom():
                yield line, f"imports: {ast.unparse(node)}"
            case ast.Name(id=name) if name in refused:
                whose = " of the fixed part" if name in defined else ""
                yield line, f"uses {name}{whose}"
            case ast.Name(id="getattr" | "setattr" | "delattr") if id(node) not in called:
                yield line, f"uses {node.id} without calling it"
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()) if name in imported:
                yield line, f"changes what {name} is"
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name) if (
                name in imported
            ):
                yield line, f"changes what {name} is"
            case ast.Global(names=names):
                for name in {*names} & (refused | imported):
                    yield line, f"changes what {name} is"
            case ast.Attribute(attr=name) if is_refused(name):
                yield line, f"uses .{name}"
            case ast.Attribute(attr=name) if name in REFUSED_PARTS and root(node) in imported:
                yield line, f"uses {ast.unparse(node)}"
            case ast.Attribute() | ast.Subscript() if not isinstance(node.ctx, ast.Load):
                of_model = isinstance(node, ast.Attribute) and node.attr in model_attributes
                if root(node) in imported or of_model and not is_own(node.value):
                    yield line, f"changes {ast.unparse(node)}"
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "delattr" as how)):
                name = node.args[1] if len(node.args) > 1 else None
                known = isinstance(name, ast.Constant) and not is_refused(str(name.value))
                if not known or how != "getattr" and not is_own(node.args[0]):
                    yield line, f"uses {ast.unparse(node)}"
        found = resolve(node) if isinstance(node, ast.Name | ast.Attribute) else None
        if isinstance(found, ModuleType):
            if found.__name__.partition(".")[0] not in USABLE_PACKAGES:
                yield line, f"uses {ast.unparse(node)}"
            elif id(node) not in before_dot:
                yield line, f"uses the module {ast.unparse(node)} other than before a dot"
    for statement in tree.body:  # names of the script, which the fixed part sees
        match statement:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                bound = {name}
            case _:
                stored = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
                bound = {node.id for node in stored if isinstance(node.ctx, ast.Store)}
        for name in bound & {*dir(builtins)}:
            yield statement.lineno, f"changes what {name} is"


def section_lines(script: ModuleType) -> range:
    """The lines of the script that are its Optimizer section; none if it marks no section."""
    try:
        text = Path(script.__file__).read_text(encoding="utf-8")
        before, section, _ = submission.split(text, "the script")
    except submission.SubmissionError:
        return range(0)
    first = before.count("\n") + 1
    return range(first, first + section.count("\n"))


# Training -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Those that end the check wait, so that none comes between a start and what notes it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, console.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_training(
    script: ModuleType, folder: Path, processes: list[multiprocessing.Process]
) -> None:
    """Two runs of the script, with the validation files a.bin and b.bin; two more with EXTRAS, or
    of the optimization track one more, on two ranks. Every process that has been started is in the
    list, whenever a signal comes."""
    rng = np.random.default_rng(6)
    start_token = SIMPLE_VOCAB - 1 if is_simple(script) else START_TOKEN
    for name in ("train", "a", "b"):
        tokens = rng.choice(free_tokens(script)[:256], 2000)
        tokens[rng.integers(0, 2000, 50)] = tokens[0] = start_token
        write_shard(folder / f"{name}.bin", tokens)
    runs: list[tuple] = []  # what train_watched takes
    for i, changes in enumerate(variants(script)):
        for name in "ab":
            runs.append((script, folder / f"{name}{i}", folder / f"{name}.bin", changes))
    if is_simple(script):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for rank in range(2):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
            place |= {"MASTER_ADDR": "localhost"}
            runs.append((script, folder / f"rank{rank}", folder / "a.bin", {}, place))
    fork = multiprocessing.get_context("fork")  # spares them the imports
    with signals_blocked():
        for run in runs:
            process = fork.Process(target=train_watched, args=run, daemon=True)
            process.start()
            processes.append(process)


def check_training(
    script: ModuleType, folder: Path, runs: list[multiprocessing.Process], fixed: Connection
) -> str:
    """Runs with different validation files train alike, read them for scoring only, and log the
    loss that their weights have. Of the optimization track: the section reads nothing, the model is
    the fixed one (whose process answers on `fixed`), a step is one pass over its part of the
    stream, and ranks have the same weights."""
    names = [f"{name}{i}" for i in range(len(variants(script))) for name in "ab"]
    if is_simple(script):
        names += ["rank0", "rank1"]
    for name in await_all(dict(zip(names, runs, strict=True))):
        output = (folder / f"{name}.out").read_text(encoding="utf-8")
        raise Failed(f"a few steps of training ended with:\n{output[-2000:]}")
    for i in range(len(variants(script))):
        for name in "ab":
            check_finite(folder / f"{name}{i}")
    if is_simple(script):
        for name in names:
            reads = json.loads((folder / f"{name}.reads").read_text())
            require(not reads, "; ".join([*dict.fromkeys(reads)][:3]))
        of_passes = check_passes(folder)
        fixed.send([folder / "a0", folder / "b0"])
        good, of_model = fixed.recv()
        require(good, of_model)
    for i in range(len(variants(script))):
        seen = compare_training(script, folder / f"a{i}", folder / f"b{i}")
    seen = f"equal to the bit with two files; {seen}"
    if is_simple(script):
        seen += f"; {of_model}; {of_passes}; {compare_ranks(folder)}"
    return seen


def await_all(runs: dict[str, multiprocessing.Process]) -> list[str]:
    """The names of those that failed. Where one has, the others are ended: they may wait for it."""
    while True:
        running = [run.sentinel for run in runs.values() if run.exitcode is None]
        failed = [name for name, run in runs.items() if run.exitcode]
        if failed:
            for run in runs.values():
                run.kill()
        if failed or not running:
            return failed
        wait(running)


def check_finite(run: Path) -> None:
    """The losses and the saved weights of a run are numbers, without which nothing compares."""
    result = json.loads(Path(f"{run}.json").read_text())
    for name, text in ("train_losses", "training loss"), ("val_losses", "validation loss"):
        for i, loss in enumerate(result[name], 1):
            require(math.isfinite(loss), f"{text} {i} of {len(result[name])} is {loss}")
    for name, tensor in torch.load(f"{run}.pt", weights_only=True)["weights"].items():
        require(bool(tensor.isfinite().all()), f"{name} has entries that are inf or nan at the end")


def compare_training(script: ModuleType, *runs: Path) -> str:
    results = [json.loads(Path(f"{run}.json").read_text()) for run in runs]
    saved = [torch.load(f"{run}.pt", weights_only=True)["weights"] for run in runs]
    same = results[0]["train_losses"] == results[1]["train_losses"]
    require(same, "another validation file makes other training losses")
    same = all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())
    require(same, "another validation file makes other weights")
    times = Counter(results[0]["opened"])
    for when in ("while the clock ran", "in a step"):
        peeks = times[when]
        require(not peeks, f"the validation file was opened {peeks} times {when}")
    for run, result in zip(runs, results):
        model, config, _ = load_checkpoint(script, f"{run}.pt", "cpu")
        windows, runtime = final_windows(script, config), start_runtime(script, "cpu")
        loss = script.validate(model, config, runtime, config.val_tokens, *windows)
        for logged in (result["val_losses"][-1], result["val_loss"]):
            found = f"logged loss {logged:.5f}, the weights have {loss:.5f}"
            require(abs(logged - loss) < 1e-4, found)
    return "opened " + ", ".join(f"{count} × {when}" for when, count in times.items())


def check_passes(folder: Path) -> str:
    """In its steps the model was called with the stream, each token once and in order."""
    result = json.loads((folder / "a0.json").read_text())
    stream = np.fromfile(folder / "train.bin", dtype="<u2", offset=1024).tolist()
    wanted = len(result["train_losses"]) * result["step_tokens"]
    found = len(result["tokens"]) * result["blocks"] / result["blocks_of_passes"]
    seen = f"the steps of {wanted} tokens passed over {found:g}"
    require(found == wanted, seen)
    same = (result["tokens"], result["targets"]) == (stream[:wanted], stream[1 : wanted + 1])
    require(same, "the steps passed over other tokens than the first of the stream, in order")
    return seen


def compare_ranks(folder: Path) -> str:
    """Two ranks train as one process does, and have the same weights in the end."""
    ends = [torch.load(folder / f"rank{rank}.end", weights_only=True) for rank in range(2)]
    weights = [end["weights"] for end in ends]
    same = all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    require(same, "two ranks have other weights, each its own")
    one, two = (json.loads((folder / f"{name}.json").read_text()) for name in ("a0", "rank0"))
    names = "train_losses", "val_losses"
    moved = max(abs(a - b) for name in names for a, b in zip(one[name], two[name], strict=True))
    seen = f"the losses of two ranks are within {moved:.1g} of one's"
    return require(moved < 2e-3, seen)


# The fixed model of the optimization track --------------------------------------------------------


@torch.no_grad()
def answer(model: torch.nn.Module) -> Tensor:
    """The logits of a model whose parameters all become random ones here, on random tokens. They
    are larger than a few steps make them, as are the values in the blocks."""
    generator = torch.Generator().manual_seed(8)
    for tensor in model.state_dict().values():
        size = tensor.size(-1) if tensor.dim() > 1 else 1
        tensor.copy_(2 * torch.randn(tensor.shape, generator=generator) / math.sqrt(size))
    return model.logits(torch.randint(0, SIMPLE_VOCAB, (2 * ROW,), generator=generator))


def compare_with_fixed_model(fixed: ModuleType, run: Path) -> str:
    """The model of a run is that of `fixed`, the module of train_gpt_simple.py: names, shapes and
    memory of its parameters, its buffers, its logits, its gradients and its losses."""
    saved = torch.load(f"{run}.pt", weights_only=True)
    config, runtime = fixed.Config(**saved["config"]), start_runtime(fixed, "cpu")
    model, result = fixed.GPT(config, runtime), json.loads(Path(f"{run}.json").read_text())
    end = torch.load(f"{run}.end", weights_only=True)
    for weights in (end["weights"], saved["weights"]):
        compare_parameters(model, weights)
    buffers = dict(model.named_buffers())
    for name, buffer in end["buffers"].items():
        same = name in buffers and torch.equal(buffers[name], buffer)
        require(same, f"the buffer {name} is not that of the fixed model")

    validated = [
        torch.load(f"{run}.validated{i}", weights_only=True) for i in range(end["validations"])
    ]
    for weights, logged in zip(
        [*validated, saved["weights"]], [*result["val_losses"], result["val_loss"]], strict=True
    ):
        compare_parameters(model, weights)
        model.load_state_dict(weights)
        loss = fixed.validate(model, config, runtime, config.val_tokens)
        found = f"logged loss {logged:.5f}, the fixed model has {loss:.5f} with these weights"
        require(abs(logged - loss) < 1e-4, found)

    for i in COMPARED_STEPS:
        step = torch.load(f"{run}.step{i}", weights_only=True)
        model.load_state_dict(step["weights"])
        model.zero_grad()
        batch = fixed.Batch(step["tokens"], step["targets"])
        (model(batch) / len(step["tokens"])).backward()
        norm = torch.stack([param.grad.norm() for param in model.parameters()]).norm()
        for name, param in model.named_parameters():
            grad = step["grads"][name]
            require(grad is not None, f"step {i + 1}: {name} has no gradient")
            size = param.grad.norm().clamp_min(1e-4 * norm)  # less is rounding
            moved = float((grad - param.grad).norm() / size)
            found = f"step {i + 1}: the gradient of {name} is not that of the fixed model"
            require(moved < 1e-3, f"{found}, {moved:.2g} of its norm away")

    moved = float((answer(model) - torch.load(f"{run}.answer", weights_only=True)).abs().max())
    found = f"with random parameters its logits are up to {moved:.2g} from the fixed model's"
    require(moved < 1e-4, found)
    return "the model is the fixed one"


def compare_parameters(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """weights: a state_dict, to have the names and shapes of the model's, and memory for each."""
    wanted, found = (
        {name: f"{list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}
        for tensors in (model.state_dict(), weights)
    )
    for name in sorted(wanted.keys() | found.keys()):
        shapes = f"{found.get(name, 'missing')}, in the fixed model {wanted.get(name, 'missing')}"
        require(found.get(name) == wanted.get(name), f"the parameter {name} is {shapes}")
    owners: dict[int, str] = {}
    for name, tensor in weights.items():
        other = owners.setdefault(tensor.untyped_storage().data_ptr(), name)
        require(other == name, f"the parameters {other} and {name} are one tensor")


def serve_fixed_model(connection: Connection) -> None:
    """In a process that never loads the judged script, which may change torch where it is loaded.
    It is told whether that is one of the optimization track, and then a list of runs, and says
    whether their model is the fixed one, and what was seen."""
    for which in console.SIGNALS:  # a terminal sends them to the parent too, which ends this one
        signal.signal(which, signal.SIG_DFL if which == signal.SIGTERM else signal.SIG_IGN)
    console.end_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, console.SIGNALS)
    torch.set_num_threads(1)
    if not connection.recv():
        return
    try:
        fixed = load_script(SIMPLE_SCRIPT)
        texts = [compare_with_fixed_model(fixed, run) for run in connection.recv()]
        connection.send((True, texts[-1]))
    except Failed as failure:
        connection.send((False, str(failure)))
    except Exception as error:  # noqa: BLE001 (whatever the script has left)
        connection.send((False, f"cannot be compared: {type(error).__name__}: {error}"))


def start_fixed_model() -> tuple[multiprocessing.Process, Connection]:
    """serve_fixed_model() in a process, and the end of its connection that is for this one."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=serve_fixed_model, args=(there,), daemon=True)
    with signals_blocked():
        process.start()
    there.close()  # so that recv() ends when the process does
    return process, here


# In the processes that train ----------------------------------------------------------------------


def watch_section(script: ModuleType) -> list[str]:
    """What code of the Optimizer section opens or reads from now on, gets a line each."""
    reads: list[str] = []
    lines, file, read = section_lines(script), script.__spec__.origin, script.Tokens.read

    def active_line() -> int | None:
        """The innermost line of the section on the stack, unless torch compiles it."""
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_filename == file and frame.f_lineno in lines:
                return frame.f_lineno
            if os.path.realpath(frame.f_code.co_filename).startswith(COMPILERS):
                return None
            frame = frame.f_back
        return None

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, line = os.path.realpath(os.fsdecode(arguments[0])), active_line()
            in_library = any(path.startswith(f"{folder}/") for folder in LIBRARY_FOLDERS)
            if line is not None and not in_library:
                reads.append(f"line {line}, of the Optimizer section, opened {path}")

    def watched_read(self, begin: int, end: int) -> Tensor:
        line = active_line()
        if line is not None:
            reads.append(f"line {line}, of the Optimizer section, read tokens of {self.paths[0]}")
        return read(self, begin, end)

    sys.addaudithook(hook)
    script.Tokens.read = watched_read
    return reads


def watch_steps(script: ModuleType, when: list[str], run: Path) -> dict:
    """Of a script of the optimization track that trains from now on: what its model is called with
    in the steps, how many blocks run there, and the model. `when` gets what it does. Files of the
    run get the weights of validations, and weights and gradients of some steps."""
    seen = {"tokens": [], "targets": [], "blocks": 0, "blocks_of_passes": 0, "validations": 0}
    GPT, honest_validate, honest_step = script.GPT, script.validate, script.Optimizer.step
    start, forward, block_forward = GPT.__init__, GPT.forward, script.Block.forward
    step_start = [0]  # where the tokens of the step begin

    def watched_start(self, *arguments) -> None:
        start(self, *arguments)
        seen["model"] = self

    def watched_forward(self, batch) -> Tensor:
        if when[-1] != "in a validation":
            when.append("in a step")
            seen["tokens"] += batch.tokens.tolist()
            seen["targets"] += batch.targets.tolist()
            seen["blocks_of_passes"] += len(self.blocks)
        return forward(self, batch)

    def watched_block(self, *arguments) -> Tensor:
        seen["blocks"] += when[-1] != "in a validation"
        return block_forward(self, *arguments)

    def watched_validate(*arguments) -> float:
        when.append("in a validation")
        torch.save(seen["model"].state_dict(), f"{run}.validated{seen['validations']}")
        seen["validations"] += 1
        loss = honest_validate(*arguments)
        when.append("in a step")
        return loss

    def watched_step(self, step: int) -> None:
        if step in COMPARED_STEPS:
            parts = {n: torch.tensor(seen[n][step_start[0] :]) for n in ("tokens", "targets")}
            params = dict(seen["model"].named_parameters(remove_duplicate=False))
            parts |= {"grads": {name: param.grad for name, param in params.items()}}
            torch.save(parts | {"weights": seen["model"].state_dict()}, f"{run}.step{step}")
        step_start[0] = len(seen["tokens"])
        honest_step(self, step)

    GPT.__init__, GPT.forward, script.Block.forward = watched_start, watched_forward, watched_block
    script.validate, script.Optimizer.step = watched_validate, watched_step
    return seen


def train_watched(
    script: ModuleType, run: Path, val_file: Path, changes: dict, place: dict | None = None
) -> None:
    """Train a few steps; <run>.json gets the losses, and when the validation file was opened. place
    is what torchrun tells one of several ranks. Of the optimization track, <run>.end gets the
    weights and buffers of each rank's model, <run>.answer its answer(), <run>.reads what the
    section read."""
    console.end_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, console.SIGNALS)
    with open(f"{run}.out", "w") as out:
        os.dup2(out.fileno(), sys.stdout.fileno())
        os.dup2(out.fileno(), sys.stderr.fileno())
    os.chdir(ROOT)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ |= {name: str(value) for name, value in (place or {}).items()}
    torch.set_num_threads(1)  # sums in one order
    when, opened, seen = ["before the clock"], [], {}

    def noting(method: Callable, state: str) -> Callable:
        def wrapped(self) -> None:
            when.append(state)
            method(self)

        return wrapped

    script.draw_curve = lambda log: "not drawn"  # which takes as long as the steps
    if is_simple(script):  # time does not count
        script.Figure.savefig, when = lambda *how: None, ["before the steps"]
        seen, reads = watch_steps(script, when, run), watch_section(script)
    else:
        script.Clock.start = noting(script.Clock.start, "while the clock ran")
        script.Clock.stop = noting(script.Clock.stop, "while it stood")

    def hook(event: str, arguments: tuple) -> None:
        is_path = event == "open" and isinstance(arguments[0], str | bytes | os.PathLike)
        if is_path and os.path.abspath(os.fsdecode(arguments[0])) == os.path.abspath(val_file):
            opened.append(when[-1])

    sys.addaudithook(hook)
    known = field_names(script)
    tiny = script.PRESETS["tiny"]
    options = {}
    for name in ("stages", "extension"):
        table = getattr(tiny, name, ())
        short = tuple(dataclasses.replace(stage, tokens_per_step=32) for stage in table)
        options |= {name: script.format_value(short)} if short else {}
    options |= {**SIZES, "num_steps": 3, "extension_steps": 1, "val_every": 2, "val_tokens": 200}
    train_file = run.parent / "train.bin"
    options |= {"val_sequence_tokens": 64, "train_files": glob.escape(str(train_file))}
    if is_simple(script):
        options |= {"sequence_tokens": ROW, "micro_batch_tokens": 2 * ROW}
        options |= {"num_steps": SIMPLE_STEPS, "val_every": SIMPLE_VAL_EVERY}
        options |= {"vocab_size": SIMPLE_VOCAB}
    options |= {"val_file": glob.escape(str(val_file)), "checkpoint": f"{run}.pt"}
    options |= {name: script.format_value(value) for name, value in changes.items()}
    options = renamed(script, options | {"log_dir": f"{run}_logs"})
    arguments = [f"--{name}={value}" for name, value in options.items() if name in known]
    code = script.main(["--preset=tiny", *arguments])
    if code:
        sys.exit(code)
    if seen:
        Path(f"{run}.reads").write_text(json.dumps(reads))
        model = seen.pop("model")
        end = {"weights": model.state_dict(), "buffers": dict(model.named_buffers())}
        torch.save(end | {"validations": seen.pop("validations")}, f"{run}.end")
        when.append("in a validation")  # no pass of a step
        torch.save(answer(model), f"{run}.answer")  # which changes the weights
    logs = [*run.with_name(f"{run.name}_logs").glob("*.json")]
    if place and place["RANK"] and not logs:  # the first rank has the log
        return
    (log,) = logs
    data = json.loads(log.read_text())
    result = {"train_losses": [row["train_loss"] for row in data["steps"]], "opened": opened}
    result["val_losses"] = [row["val_loss"] for row in data["validations"]]
    result["val_loss"] = data["summary"]["val_loss"]
    if seen:
        sizes = (int(data["config"][n]) for n in ("sequences_per_step", "sequence_tokens"))
        result |= seen | {"step_tokens": math.prod(sizes)}
    Path(f"{run}.json").write_text(json.dumps(result))


# ==================================================================================================
# Command line
# ==================================================================================================

CHECKS: dict[str, Callable[[ModuleType, Path], str]] = {
    "coverage": check_coverage,
    "mean": check_mean,
    "causality": check_causality,
    "targets": check_targets,
    "normalisation": check_normalisation,
}
SIMPLE_CHECKS = {"fixed part": check_fixed_part, "section": check_section}  # optimization track


def judge(path: Path, names: list[str] | None = None) -> dict[str, tuple[bool, str]]:
    """Whether each of these checks, or of all, went well, and what was seen, printed as it comes.
    With training it takes several processes."""
    fixed_model, connection = start_fixed_model()  # before the script can change anything
    try:
        return judge_with(path, names, fixed_model, connection)
    finally:
        fixed_model.kill()
        fixed_model.join()
        connection.close()


def judge_with(
    path: Path, names: list[str] | None, fixed_model: multiprocessing.Process, fixed: Connection
) -> dict[str, tuple[bool, str]]:
    script, results = load_script(path), {}
    names = names or [*CHECKS, *(SIMPLE_CHECKS if is_simple(script) else []), "training"]
    fixed.send(is_simple(script))
    if not is_simple(script):  # of no use then, and it ends
        fixed_model.join()
    with tempfile.TemporaryDirectory(prefix="speedrun_") as name:
        folder = Path(name)
        runs: list[multiprocessing.Process] = []
        training = functools.partial(check_training, runs=runs, fixed=fixed)
        all_checks = CHECKS | SIMPLE_CHECKS | {"training": training}
        try:
            if "training" in names:
                start_training(script, folder, runs)
            for name in names:
                check = all_checks[name]
                try:
                    results[name] = True, check(script, folder)
                except Failed as failure:
                    results[name] = False, str(failure)
                except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever the script does)
                    results[name] = False, f"cannot be judged: {type(error).__name__}: {error}"
                good, seen = results[name]
                print(f"{'ok' if good else 'FAILED':8}{name:15}{seen}", flush=True)
        finally:  # before the folder goes
            for run in runs:
                run.kill()
                run.join()
    return results


def main(arguments: list[str]) -> int:
    parser = console.Parser(prog="./run.sh check", description=__doc__.split("\n")[0])
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="script, or folder of a record")
    path = parser.parse_args(arguments).script
    torch.set_num_threads(1)  # for tensors this small several take longer
    try:
        results = judge(path / "train_gpt.py" if path.is_dir() else path)
    except Unjudgeable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if all(good for good, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(console.run_tool(main))
