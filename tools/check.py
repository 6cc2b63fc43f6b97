"""Judges a script by what its own validation computes, on the CPU: `./run.sh check SCRIPT`.

The script's validate() is given small files of tokens, and its GPT, with random numbers for all
that it learns, the rows that validate() makes of them. The loss of one position is that of a row
whose other targets are IGNORED_TARGET. Then the script trains a few steps, twice, with different
validation files. What predicts by other means than the layers, such as matches in what was read
and the canonical mask, is judged with and without it. A script of the optimization track is also
judged by its rules: the fixed part, one pass over each batch of a step, the tokens of the stream in
order, and the same weights on all ranks. One line a check; exit code 1 when one fails or the script
cannot be judged.
"""

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
import tempfile
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import wait
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
    """Of the optimization track: outside its Optimizer section a script is train_gpt_simple.py."""
    sys.path.append(str(SIMPLE_SCRIPT.parent))
    import submission

    texts = [Path(path).read_text(encoding="utf-8") for path in (script.__file__, SIMPLE_SCRIPT)]
    try:
        theirs, ours = (submission.fixed_part(text, "the script") for text in texts)
    except submission.SubmissionError as error:
        raise Failed(str(error)) from None
    where = "train_gpt_simple.py outside the Optimizer section"
    require(theirs == ours, f"the script differs from {where}")
    return f"the script is that of {where}"


# Training -----------------------------------------------------------------------------------------


def start_training(
    script: ModuleType, folder: Path, processes: list[multiprocessing.Process]
) -> None:
    """Two runs of the script, with the validation files a.bin and b.bin; two more with EXTRAS, or
    of the optimization track one more, on two ranks. Every process that has been started is in the
    list, whenever a signal comes."""
    rng = np.random.default_rng(6)
    for name in ("train", "a", "b"):
        tokens = rng.choice(free_tokens(script)[:256], 2000)
        tokens[rng.integers(0, 2000, 50)] = tokens[0] = START_TOKEN
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
    before = signal.pthread_sigmask(signal.SIG_BLOCK, console.SIGNALS)
    try:
        for run in runs:
            process = fork.Process(target=train_watched, args=run, daemon=True)
            process.start()
            processes.append(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_training(script: ModuleType, folder: Path, runs: list[multiprocessing.Process]) -> str:
    """Runs with different validation files train alike, read them for scoring only, and log the
    loss that their weights have. Of the optimization track: a step is one pass over its part of the
    stream, and ranks have the same weights."""
    names = [f"{name}{i}" for i in range(len(variants(script))) for name in "ab"]
    if is_simple(script):
        names += ["rank0", "rank1"]
    for name in await_all(dict(zip(names, runs, strict=True))):
        output = (folder / f"{name}.out").read_text(encoding="utf-8")
        raise Failed(f"a few steps of training ended with:\n{output[-2000:]}")
    for i in range(len(variants(script))):
        seen = compare_training(script, folder / f"a{i}", folder / f"b{i}")
    seen = f"equal to the bit with two files; {seen}"
    if is_simple(script):
        seen += f"; {check_passes(folder)}; {compare_ranks(folder)}"
    return seen


def await_all(runs: dict[str, multiprocessing.Process]) -> list[str]:
    """The names of those that failed. Where one has, the others are ended: they may wait for it."""
    while running := [run.sentinel for run in runs.values() if run.exitcode is None]:
        wait(running)
        failed = [name for name, run in runs.items() if run.exitcode]
        if failed:
            for run in runs.values():
                run.kill()
            return failed
    return []


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
    weights = [torch.load(folder / f"rank{rank}.weights", weights_only=True) for rank in range(2)]
    same = all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    require(same, "two ranks have other weights, each its own")
    one, two = (json.loads((folder / f"{name}.json").read_text()) for name in ("a0", "rank0"))
    names = "train_losses", "val_losses"
    moved = max(abs(a - b) for name in names for a, b in zip(one[name], two[name], strict=True))
    seen = f"the losses of two ranks are within {moved:.1g} of one's"
    return require(moved < 2e-3, seen)


def watch_steps(script: ModuleType, when: list[str]) -> dict:
    """Of a script of the optimization track that trains from now on: what its model is called with
    in the steps, how many blocks run there, and the model. `when` gets what it does."""
    seen = {"tokens": [], "targets": [], "blocks": 0, "blocks_of_passes": 0}
    GPT, honest_validate = script.GPT, script.validate
    start, forward, block_forward = GPT.__init__, GPT.forward, script.Block.forward

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
        loss = honest_validate(*arguments)
        when.append("in a step")
        return loss

    GPT.__init__, GPT.forward, script.Block.forward = watched_start, watched_forward, watched_block
    script.validate = watched_validate
    return seen


def train_watched(
    script: ModuleType, run: Path, val_file: Path, changes: dict, place: dict | None = None
) -> None:
    """Train a few steps; <run>.json gets the losses, and when the validation file was opened. place
    is what torchrun tells one of several ranks; of the optimization track, <run>.weights gets the
    weights of each."""
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
        seen = watch_steps(script, when)
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
    options |= {"sequence_tokens": ROW, "micro_batch_tokens": 2 * ROW}  # of the optimization track
    options |= {"val_file": glob.escape(str(val_file)), "checkpoint": f"{run}.pt"}
    options |= {name: script.format_value(value) for name, value in changes.items()}
    options = renamed(script, options | {"log_dir": f"{run}_logs"})
    arguments = [f"--{name}={value}" for name, value in options.items() if name in known]
    code = script.main(["--preset=tiny", *arguments])
    if code:
        sys.exit(code)
    if seen:
        torch.save(seen.pop("model").state_dict(), f"{run}.weights")
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


def judge(path: Path, names: list[str] | None = None) -> dict[str, tuple[bool, str]]:
    """Whether each of these checks, or of all, went well, and what was seen, printed as it comes.
    With training it takes several processes."""
    script, results = load_script(path), {}
    names = names or [*CHECKS, *(["fixed part"] if is_simple(script) else []), "training"]
    with tempfile.TemporaryDirectory(prefix="speedrun_") as name:
        folder = Path(name)
        runs: list[multiprocessing.Process] = []
        training = functools.partial(check_training, runs=runs)
        all_checks = CHECKS | {"fixed part": check_fixed_part, "training": training}
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
