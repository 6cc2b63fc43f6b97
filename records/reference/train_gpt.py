"""The baseline: the recipe of the public modded-nanogpt record 89 (July 2026), rebuilt here.

It is what train_gpt.py at the top of the repository is compared with, and where the techniques of
the public record stay that it has left behind; README.md beside this file names them. This is the
script of 23 November 2026 as these records ran it, the same in all of them, with torch 2.11:
2026-11-23_short_schedule_one_gpu_reference, 2026-11-23_short_schedule_two_gpus_reference,
2026-11-23_seven_layers_two_gpus_reference, 2026-11-24_rows_at_once_two_gpus_reference,
2026-11-28_three_runs_two_gpus_reference. They keep it as it ran.

Launch:  ./run.sh reference, or torchrun --nproc_per_node=8 records/reference/train_gpt.py from the
         top of the repository [--option value ...], or --help.

Changed since, nearly all of it so that it runs on torch 2.13 and Triton 3.7.1; not one number of
the recipe is, and losses on a CPU are the same to the last bit:
- _transposed: in _quantize_kernel, _mlp_product_kernel and _logits_gradient_kernel fp8 tiles are
  transposed as fp16. Of single bytes Triton 3.7.1 stores garbage, and the model does not learn.
- attention_backend: flash-attn is imported, not searched for. Searching raises where none of it is
  installed, and finds one that cannot be imported.
- Config.prefix_file, read_prefixes, PREFIX_TABLE, prefix_table: the table of prefix tokens and the
  tool that makes it stand beside this file.
- SOURCE, train: the log has the script as it was read when it started.

Sections: 1 this, 2 config and tables, 3 runtime and log, 4 operations, 5 model, 6 optimizer,
          7 data, 8 schedule, 9 train and validate, 10 command line. Later ones call earlier ones.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import glob
import inspect
import itertools
import json
import math
import os
import platform
import queue
import re
import signal
import sys
import threading
import time
import traceback
import typing
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).read_text(encoding="utf-8")  # as it runs: the file may change later

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.tools.tensor_descriptor import TensorDescriptor

# ==================================================================================================
# 2. Config and tables
# ==================================================================================================

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
START_TOKEN = 50256  # GPT-2's <|endoftext|>; it begins every document
PREFIX_TABLE = "gpt2_prefix_tokens.npy"
IGNORED_TARGET = -1  # a target that is not scored: padding behind the last validation token


class UserError(Exception):
    """Something the user can mend. The message names the file or option and the remedy."""


@dataclass(frozen=True)
class Stage:
    """One row of the schedule. Sizes are in tokens; loss weights change from start to end."""

    share: float  # of num_steps
    tokens_per_step: int  # over all GPUs and micro-steps
    max_seq_len: int  # longer documents are cut
    window_short: int  # how many earlier tokens a query sees
    window_long: int
    lr: float  # multiplier
    second_start: float  # loss weight of the token after the next one
    second_end: float
    third_start: float  # and of the one after that
    third_end: float
    prefix_start: float  # loss weight of the next token's prefix token
    prefix_end: float
    columns: int  # of the vocabulary that a row's training loss is computed on; 0: all


@dataclass(frozen=True)
class Layer:
    """One row of the layer plan. Layers are named by their number, from 0."""

    window: str  # short, long (with the partial key offset), or none: no attention, an MLP alone
    paired: bool  # heads 2j and 2j + 1 interleaved into one stream of twice the positions
    value_table: int | None  # value embedding added to v
    xsa: bool  # takes out of a head's output what lies along the token's own value
    head_gate: bool  # scales each head's output per token
    skip_from: int | None  # adds the gated output of that earlier layer
    attend_from: int | None  # attention reads the output of that earlier layer


# fmt: off
SPEEDRUN_STAGES = (
    #     share   tokens  seq_len  short  long    lr    second     third      prefix      columns
    Stage(1 / 3,  131_072,    896,   128,  384, 1.00, 0.5, 0.5,  0.25, 0.0, 0.25, 0.25, 0),
    Stage(1 / 3,  262_144,   2048,   384,  896, 1.52, 0.5, 0.0,  0.0,  0.0, 0.25, 0.0,  0),
    Stage(1 / 3,  393_216,   2048,   640, 1408, 1.73, 0.0, 0.0,  0.0,  0.0, 0.0,  0.0,  0),
)
SPEEDRUN_EXTENSION = (  # after num_steps: longer windows at the final learning rate
    Stage(1.0,    393_216,   2048,   768, 1664, 1.73, 0.0, 0.0,  0.0,  0.0, 0.0,  0.0,  0),
)
SPEEDRUN_LAYERS = (
    #     window   paired  value  xsa    head_gate  skip_from  attend_from
    Layer("short", True,   None,  False, False,     None,      None),  # 0
    Layer("short", False,  0,     True,  False,     None,      None),  # 1
    Layer("short", True,   1,     False, False,     None,      None),  # 2
    Layer("long",  False,  None,  True,  True,      None,      None),  # 3
    Layer("short", False,  None,  True,  False,     None,      None),  # 4
    Layer("short", True,   None,  False, False,     None,      None),  # 5
    Layer("none",  False,  None,  False, False,     3,         None),  # 6
    Layer("short", False,  None,  True,  False,     None,      None),  # 7
    Layer("short", False,  2,     False, False,     None,      7),     # 8
    Layer("short", True,   3,     False, False,     None,      7),     # 9
    Layer("long",  False,  4,     False, True,      None,      7),     # 10, with the dynamic skips
)
TINY_STAGES = (
    Stage(1 / 2,    1_024,    256,    64,  128, 1.00, 0.2, 0.0,  0.1,  0.0, 0.0,  0.0,  0),
    Stage(1 / 2,    1_024,    512,   128,  256, 1.00, 0.0, 0.0,  0.0,  0.0, 0.0,  0.0,  0),
)
TINY_EXTENSION = (
    Stage(1.0,      1_024,    512,   128,  512, 1.00, 0.0, 0.0,  0.0,  0.0, 0.0,  0.0,  0),
)
TINY_LAYERS = (
    #     window   paired  value  xsa    head_gate  skip_from  attend_from
    Layer("short", True,   0,     False, False,     None,      None),  # 0
    Layer("long",  False,  None,  True,  True,      None,      None),  # 1
    Layer("none",  False,  None,  False, False,     1,         None),  # 2
    Layer("short", False,  None,  True,  False,     None,      None),  # 3
    Layer("long",  False,  1,     False, True,      None,      3),     # 4
)

# Outputs of the two dynamic MLPs, name: (width, start). "first" is the residual stream entering
# layer 0, "skip" and "attend" the outputs of the layers in skip_from and attend_from (3 and 7),
# "last" the stream entering the last layer.
LAST_LAYER_GATES = {
    "value_first":  (1, 0.0),  # added to the values
    "value_attend": (1, 0.0),
    "value_last":   (1, 0.0),
    "x_first":      (1, 0.0),  # added to the residual stream before the layer
    "x_attend":     (1, 0.0),
    "x_last":       (1, 0.0),
    "value_gate":   (2, 2.0),  # on the value embedding, one a half of the heads
    "residual":     (1, math.sqrt(1.1)),  # in place of the learned scalars of the other layers
    "project":      (1, 1.0),
    "first":        (1, 0.0),
    "bigram":       (1, 0.05),
    "mlp_residual": (1, math.sqrt(1.1)),
    "mlp_project":  (1, 1.0),
}
GATE_SCALE = 0.1  # of the gate MLPs outputs; learned in two of them
OUTPUT_GATES = {
    "first":  (1, 0.0),
    "attend": (1, -0.5),
    "last":   (1, 0.0),
    "value":  (1, 0.0),  # the first value embedding
    "skip":   (1, 0.0),
}
# fmt: on


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. A field is an option (--num_steps 100), its comment the help."""

    # Data
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"  # training shards, a glob pattern
    val_file: str = "data/fineweb10B/fineweb_val_000000.bin"  # validation shard
    val_tokens: int = 10_485_760  # targets scored, from the start of val_file
    repeat_data: bool = False  # start over when the training shards run out
    min_mean_doc_len: int = 128  # sizes cu_seqlens: a row of T tokens may hold T / this documents
    # Model
    layers: tuple[Layer, ...] = SPEEDRUN_LAYERS  # layer plan, rows of the fields of Layer
    model_dim: int = 768  # width of the residual stream
    head_dim: int = 128  # width of an attention head
    mlp_dim: int = 3072  # hidden width of the MLP
    vocab_size: int = 50_257  # token ids are below this; the tables are padded to a multiple of 128
    gate_dim: int = 64  # hidden width of the gate MLPs
    bigram_rows: int = 377_280  # rows of the hashed bigram table
    ngram_orders: tuple[int, ...] = ()  # lengths of n-grams with hashed rows beside it, as 3:4
    ngram_rows: int = 2**23  # of the table of each length; 2.03 GiB a GPU at 2^23 rows of 128
    ngram_dim: int = 128  # width of these rows; each length adds to other columns of the bigram's
    match_orders: tuple[int, ...] = ()  # lengths of context looked up in what was read, as 3:4:6
    match_slots: int = 2**26  # of the table of each length, 8 bytes each, a power of two
    even: bool = False  # gradient scaled by tokens
    often: float = 0.0  # share of columns that are the most frequent ids
    match_embed: bool = False  # matches read the normed embedding
    average: bool = False  # score averaged weights at the end
    mix_window: int = 112  # how many earlier tokens the head mixing of the last layer sees
    attention_scale: float = 0.1  # factor on q.k before the softmax, grows with the long window
    dtype: str = "bfloat16"  # of weights and activations: bfloat16 or float32
    # Schedule
    num_steps: int = 1270  # scheduled steps; the learning rate reaches its end here
    stages: tuple[Stage, ...] = SPEEDRUN_STAGES  # rows of the fields of Stage
    extension_steps: int = 15  # steps after the scheduled ones, at the final learning rate
    extension: tuple[Stage, ...] = SPEEDRUN_EXTENSION  # their one row, in the format of stages
    final_window_long: int = 2560  # long window of the final validation
    rows_per_step: int = 8  # rows a step is cut in: one a GPU and micro-step
    tied_share: float = 2 / 3  # share of num_steps in which embedding and head are one matrix
    prefix_file: str = ""  # prefix token of every token; by default the table beside this script
    stop_step: int = 0  # end after this many steps of the schedule; 0 runs it whole
    # Optimizer
    muon_lr: float = 0.023  # NorMuon, all attention and MLP matrices
    muon_weight_decay: float = 1.2  # times lr²; cautious
    muon_beta2: float = 0.9  # decay of NorMuon's running mean squares
    momentum_start: float = 0.85  # Muon momentum at the first and the last step
    momentum_peak: float = 0.95  # and in between
    momentum_warmup_steps: int = 300  # steps from start to peak
    momentum_cooldown_steps: int = 50  # steps back at the end
    adam_lr: float = 0.008  # Adam, embeddings and gates
    adam_weight_decay: float = 0.005  # times lr²; cautious
    adam_eps: float = 1e-10  # added to the root of Adam's second moment, and of the n-grams'
    ngram_lr: float = 3.0  # of n-gram rows, the length of a first step; Adam gives a bigram row 2.9
    lr_decay_start: float = 0.4  # share of num_steps after which the learning rate falls
    lr_end: float = 0.15  # learning rate multiplier at num_steps
    # Run
    seed: int = 1337  # of the initial weights
    val_every: int = 250  # steps between validations; 0: only the final one
    val_row_tokens: int = 32_768  # tokens of one validation row
    fp8: bool = True  # products of MLP and head in fp8 where the GPU has it
    cuda_graphs: bool = True  # replay a row's forward and backward pass as one graph on a GPU
    compile: str = "none"  # by torch.compile: none; block: the gate MLPs; full: all layers in one
    log_dir: str = "logs"  # where <run id>.txt, .json and .png go
    checkpoint: str = ""  # file the final weights are written to, or, with --sample, read from
    sample: str = ""  # continue this text with the weights of --checkpoint instead of training
    sample_tokens: int = 128  # length of the continuation
    temperature: float = 0.8  # of the continuation; 0 takes the likeliest token

    @property
    def num_heads(self) -> int:
        return self.model_dim // self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, 128)

    @property
    def num_value_tables(self) -> int:
        return len({row.value_table for row in self.layers} - {None})

    @property
    def skip_from(self) -> int:
        """The layer whose output a later one takes in; behind it the late gates are made."""
        return next(row.skip_from for row in self.layers if row.skip_from is not None)


PRESETS = {
    "speedrun": Config(),
    "matching": Config(match_orders=(3, 4, 5, 6, 8, 12, 16, 24)),
    "tiny": Config(
        train_files="data/sample/sample_train_*.bin",
        val_file="data/sample/sample_val_*.bin",
        val_tokens=16_384,
        repeat_data=True,
        min_mean_doc_len=8,
        layers=TINY_LAYERS,
        model_dim=64,
        head_dim=16,
        mlp_dim=256,
        gate_dim=16,
        bigram_rows=4096,
        ngram_rows=4096,
        ngram_dim=16,
        mix_window=48,
        dtype="float32",
        num_steps=80,
        stages=TINY_STAGES,
        extension_steps=4,
        extension=TINY_EXTENSION,
        final_window_long=512,
        rows_per_step=2,
        momentum_warmup_steps=25,
        momentum_cooldown_steps=10,
        adam_lr=0.1,  # few tokens, each of them often
        val_every=40,
        val_row_tokens=512,
        compile="none",
    ),
}


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def check_config(config: Config, world_size: int) -> None:
    """Raise UserError for values that cannot work together."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    positive = "num_steps rows_per_step final_window_long momentum_warmup_steps val_tokens "
    positive += "val_row_tokens min_mean_doc_len model_dim head_dim mlp_dim "
    positive += "gate_dim bigram_rows mix_window"
    for name in positive.split():
        value = getattr(config, name)
        require(value > 0, f"--{name} {value} must be positive")
    for name in ("extension_steps", "stop_step", "val_every", "momentum_cooldown_steps"):
        value = getattr(config, name)
        require(value >= 0, f"--{name} {value} must not be negative")
    require(
        0 <= config.lr_decay_start < 1,
        f"--lr_decay_start {config.lr_decay_start} must be a share of num_steps below 1",
    )
    require(
        config.rows_per_step % world_size == 0,
        f"--rows_per_step {config.rows_per_step} is not divisible by the {world_size} processes: "
        "start 1, 2, 4 or 8 of them, or pass "
        f"--rows_per_step {round_up(config.rows_per_step, world_size)}",
    )
    for option, stages in ("--stages", config.stages), ("--extension", config.extension):
        require(len(stages) > 0, f"{option} has no row: give at least one")
        shares = sum(stage.share for stage in stages)
        require(
            abs(shares - 1) < 1e-6,
            f"{option}: the shares add up to {shares:g}: make them add up to 1",
        )
        for stage in stages:
            require(
                stage.tokens_per_step % (16 * config.rows_per_step) == 0,
                f"{option}: {stage.tokens_per_step} tokens a step do not make "
                f"{config.rows_per_step} rows of a multiple of 16 tokens: change them or "
                "--rows_per_step",
            )
            require(
                min(dataclasses.astuple(stage)[:6]) > 0,
                f"{option}: share, tokens, max_seq_len, windows and lr must be positive: {stage}",
            )
            require(
                stage.columns % 16 == 0 and 0 <= stage.columns <= config.padded_vocab_size,
                f"{option}: {stage.columns} columns: make them 0, for all, or a multiple of 16 up "
                f"to {config.padded_vocab_size}",
            )
    require(len(config.extension) == 1, f"--extension takes one row, found {len(config.extension)}")
    require(
        config.model_dim % config.head_dim == 0 and config.head_dim % 8 == 0,
        f"--head_dim {config.head_dim} must be a multiple of 8 that divides "
        f"--model_dim {config.model_dim}",
    )
    require(
        config.num_heads % 2 == 0,
        f"--model_dim {config.model_dim} holds {config.num_heads} heads: Muon takes query and key "
        "heads in pairs, so make it an even number",
    )
    check_layers(config.layers, require)
    orders = config.match_orders
    require(
        orders == tuple(sorted(set(orders))) and all(0 < order < 32 for order in orders),
        f"--match_orders {format_value(orders)}: give lengths from 1 to 31 in ascending order",
    )
    slots = config.match_slots
    require(slots > 0 and slots & (slots - 1) == 0, f"--match_slots {slots} is no power of two")
    require(config.bigram_rows > 1, "--bigram_rows 1 leaves no row to hash into: take more")
    if config.ngram_orders:
        check_ngrams(config, require)
    windows = [stage.window_long for stage in (*config.stages, *config.extension)]
    windows = [window for window, _ in itertools.groupby([*windows, config.final_window_long])]
    require(
        len(set(windows)) == len(windows),
        f"--stages, --extension, --final_window_long: the long window returns to an earlier one "
        f"({', '.join(map(str, windows))}), for which the rotary frequencies were others",
    )
    require(
        config.vocab_size > START_TOKEN,
        f"--vocab_size {config.vocab_size} leaves out the start token {START_TOKEN}: raise it",
    )
    for name, choices in (
        ("dtype", ("bfloat16", "float32")),
        ("compile", ("block", "full", "none")),
    ):
        value = getattr(config, name)
        require(value in choices, f"--{name} {value!r} is not one of {', '.join(choices)}")
    require(config.val_row_tokens % 16 == 0, "--val_row_tokens must be a multiple of 16")


def check_ngrams(config: Config, require: Callable) -> None:
    orders, rows, dim = config.ngram_orders, config.ngram_rows, config.ngram_dim
    count, option = len(orders), f"--ngram_orders {format_value(orders)}"
    require(
        orders == tuple(sorted(set(orders))) and all(1 < order < 32 for order in orders),
        f"{option}: give lengths from 2 to 31 in ascending order",
    )
    require(
        dim > 0 and dim % 8 == 0 and count * dim <= config.model_dim,
        f"--ngram_dim {dim} must be a multiple of 8 that fits {count} times, once for each of "
        f"{option}, in --model_dim {config.model_dim}",
    )
    require(
        1 < rows and count * rows < 2**31,
        f"--ngram_rows {rows} must be above 1 and, times the {count} of {option}, below 2^31",
    )
    require(config.ngram_lr >= 0, f"--ngram_lr {config.ngram_lr} must not be negative")


def check_layers(layers: tuple[Layer, ...], require: Callable) -> None:
    """The shape that GPT.hidden expects of a plan."""
    require(len(layers) > 0, "--layers has no row: give at least one")
    last = layers[-1]
    for i, row in enumerate(layers):
        known = ("short", "long", "none")
        require(
            row.window in known, f"--layers: window {row.window!r} is none of {', '.join(known)}"
        )
        for name in ("skip_from", "attend_from"):
            source = getattr(row, name)
            require(
                source is None or 0 <= source < i,
                f"--layers: {name} of layer {i} is no earlier one",
            )
        extras = row.paired or row.xsa or row.head_gate or row.value_table is not None
        extras = extras or row.attend_from is not None or i == 0  # whose gates start the stream
        require(
            not (row.window == "none" and extras),
            f"--layers: layer {i} has window none, but what only attention can have, or is the "
            "first: give it a window",
        )
        require(
            not (row.paired and (row.xsa or row.head_gate)),
            f"--layers: layer {i} is paired and gated",
        )
    tables = sorted({row.value_table for row in layers} - {None})
    numbered = tables == list(range(len(tables))) and len(tables) > 0
    require(numbered, f"--layers: value tables {tables} are not numbered 0, 1, 2, … in a row")
    for name in ("skip_from", "attend_from"):
        sources = {getattr(row, name) for row in layers} - {None}
        require(len(sources) == 1, f"--layers: {name} names {len(sources)} layers, not one")
    complete = last.window == "long" and last.head_gate and not last.paired and not last.xsa
    complete = complete and last.value_table is not None and last.attend_from is not None
    require(
        complete, "--layers: the last one must be long, with value table, head gate and attend_from"
    )


# ==================================================================================================
# 3. Runtime and log
# ==================================================================================================


class Log:
    """Writes the run down as it goes: <run id>.txt line by line, <run id>.json at the end.

    Only the main rank has one that writes; on the others every method does nothing.
    """

    def __init__(self, folder: str | None, run_id: str = ""):
        self.path = None if folder is None else Path(folder) / f"{run_id}.txt"
        self.data: dict = {"run_id": run_id, "steps": [], "validations": []}
        self.file = None
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = self.path.open("w", encoding="utf-8", buffering=1)  # a line at a time
            except OSError as error:
                raise UserError(
                    f"--log_dir {folder}: cannot write there ({error}): choose another"
                ) from None

    def line(self, text: str, screen: bool = True) -> None:
        if self.file is None:
            return
        self.file.write(text + "\n")
        if screen:
            from tqdm import tqdm  # its write() leaves a progress bar below the text

            tqdm.write(text)

    def step(self, step: int, train_loss: float, train_time: float, step_ms: float) -> None:
        """Times in seconds since the clock started, and milliseconds for this step."""
        self.data["steps"].append(
            {"step": step, "train_loss": train_loss, "train_time_s": train_time, "step_ms": step_ms}
        )
        loss_and_time = f"train_loss {train_loss:.4f} train_time {train_time:.3f} s"
        self.line(f"step {step} {loss_and_time} step {step_ms:.1f} ms", screen=False)

    def write_json(self) -> None:
        if self.path is not None:
            self.path.with_suffix(".json").write_text(json.dumps(self.data, indent=1))


@dataclass
class Runtime:
    """Who this process is. Passed to whatever communicates, allocates or reports."""

    rank: int
    world_size: int
    device: torch.device
    log: Log

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def connect() -> dist.Store | None:
    """The key-value store that torchrun's processes share; None for a process started alone."""
    return next(dist.rendezvous("env://"))[0] if "WORLD_SIZE" in os.environ else None


def speaks_for_error(store: dist.Store | None) -> bool:
    """True on the first rank that asks: the one that tells the user what stopped the run."""
    if store is None:
        return True
    try:
        return store.add("speedrun/errors", 1) == 1
    except RuntimeError:  # the store is gone with the launcher, so somebody has spoken
        return False


def start_runtime(config: Config, store: dist.Store | None) -> Runtime:
    """Choose the device, join the other processes, open the log."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    check_config(config, world_size)
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} are "
                "visible. Start as many processes as GPUs (NPROC for run.sh, --nproc_per_node "
                "for torchrun)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        if not has_kernels(device):
            use_twins(device)
        # flash-attn-4 keeps what it compiled on disk only if asked; its compiler warns of an
        # argument left out here
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        warnings.filterwarnings("ignore", message="Argument aux_data")
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if store is not None:
        # torch 2.13 has new names for the two collectives, which 2.11 does not know
        warnings.filterwarnings("ignore", r"`torch\.distributed\.(reduce_scatter|all_gather)")
        backend = "nccl" if device.type == "cuda" else "gloo"
        options = {"device_id": device} if device.type == "cuda" else {}
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=10),
            **options,
        )
    run_id = f"{datetime.now():%Y-%m-%d_%H%M%S}_{uuid.uuid4().hex[:8]}"
    writes_log = rank == 0 and not config.sample
    return Runtime(rank, world_size, device, Log(config.log_dir if writes_log else None, run_id))


def keep_freed_memory() -> None:
    """Stop glibc from giving large freed buffers back to the system: mapping the logits anew in
    every step costs several times what computing them does."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        mallopt(-4, 0)  # M_MMAP_MAX: take large buffers from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and leave them there


def describe_environment(runtime: Runtime) -> dict:
    cuda = runtime.device.type == "cuda"
    return {
        "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "devices": torch.cuda.get_device_name(runtime.device)
        if cuda
        else f"CPU {platform.machine()}",
        "world_size": runtime.world_size,
        "cpu_threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


# ==================================================================================================
# 4. Operations
# ==================================================================================================

EPS = tl.constexpr(torch.finfo(torch.float32).eps)  # of every RMS norm, what F.rms_norm takes
MIX_1, MIX_2 = tl.constexpr(-7046029254386353131), tl.constexpr(-4658895280553007687)  # a hash's
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LIBRARY = torch.library.Library("speedrun", "FRAGMENT")
TWINS: dict[str, Callable] = {}  # plain PyTorch of every fused op, by name


def fused_op(
    twin: Callable | None = None, fake: Callable | None = None, mutates: tuple[str, ...] = ()
) -> Callable:
    """Make a launcher of kernels the op speedrun::<its name>, which full-graph compilation takes.

    On the CPU the op is its twin, a few lines of plain PyTorch of the same signature that define
    it, differentiated by autograd. Ops of a backward have none. fake gives the outputs' shapes.
    """

    def register(launcher: Callable) -> Callable:
        name = launcher.__name__
        op = torch.library.custom_op(
            f"speedrun::{name}", launcher, mutates_args=mutates, device_types="cuda"
        )
        op.register_fake(fake or twin)
        if twin is not None:
            TWINS[name] = twin
            op.register_kernel("cpu")(twin)
            LIBRARY.impl(name, twin, "AutogradCPU")
        op.launcher = launcher
        return op

    return register


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels of this file run here: they are written for Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def use_twins(device: torch.device) -> None:
    """Run plain PyTorch in place of every kernel on a GPU that they are not made for."""
    for name, twin in TWINS.items():
        LIBRARY.impl(name, twin, f"Autograd{device.type.upper()}")


def widen(x: Tensor) -> Tensor:
    """fp32, or fp64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def packed(x: Tensor | None) -> Tensor | None:
    """x as the kernels read it, all dimensions adjacent: nearly always x itself."""
    return None if x is None else x.contiguous()


def row_stride(x: Tensor | None) -> int:
    """Elements from one row of x to the next; a kernel takes the columns of a row as adjacent."""
    assert x is None or x.stride(1) == 1 or x.size(1) == 1, f"columns {x.stride(1)} elements apart"
    return 0 if x is None else x.stride(0)


def like(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Uninitialised contiguous gradients of these tensors, empty for None."""
    some = next(x for x in tensors if x is not None)
    return tuple(
        some.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in tensors
    )


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=EPS.value)


# --- Sums of streams ------------------------------------------------------------------------------


def plain_combine(
    sources: list[Tensor],
    coefficients: list[Tensor],
    norm: bool,
    sums: list[Tensor],
    collect: bool,
) -> tuple[Tensor, Tensor]:
    total = sum(c.view(-1, 1) * source for c, source in zip(coefficients, sources))
    normed = rms_norm(total) if norm else total[:0]
    return total.to(sources[0].dtype, copy=True), normed.to(sources[0].dtype, copy=True)


@triton.jit
def _combine_row(sources, coefficients, rows, steps, t, column, inside):
    total = tl.zeros(column.shape, tl.float32)
    for i in tl.static_range(len(sources)):
        source = tl.load(sources[i] + t * rows[i] + column, mask=inside, other=0.0)
        coefficient = tl.load(coefficients[i] + t * (steps[i] // 2 - 1))
        total += coefficient * source.to(tl.float32)
    return total


@triton.jit
def _combine_kernel(
    sources, coefficients, rows, steps, stream, normed, dim, BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    total = _combine_row(sources, coefficients, rows, steps, t, column, inside)
    tl.store(stream + t * dim + column, total, mask=inside)
    if NORM:
        scale = tl.rsqrt(tl.sum(total * total) / dim + EPS)
        tl.store(normed + t * dim + column, total * scale, mask=inside)


@triton.jit
def _combine_backward_kernel(
    sources, coefficients, rows, steps, sums, grad_stream, grad_normed, grad_sources,
    grad_coefficients, dim, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    t, num_tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    grad = tl.load(grad_stream + t * dim + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        total = _combine_row(sources, coefficients, rows, steps, t, column, inside)
        scale = tl.rsqrt(tl.sum(total * total) / dim + EPS)
        total *= scale
        outer = tl.load(grad_normed + t * dim + column, mask=inside, other=0.0).to(tl.float32)
        grad += scale * (outer - total * (tl.sum(outer * total) / dim))
    for i in tl.static_range(len(sources)):
        source = tl.load(sources[i] + t * rows[i] + column, mask=inside, other=0.0)
        coefficient = tl.load(coefficients[i] + t * (steps[i] // 2 - 1))
        grad_source = coefficient * grad
        if i >= len(sources) - len(sums):
            summed = sums[i - len(sources) + len(sums)] + t * dim + column
            grad_source += tl.load(summed, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_sources[i] + t * dim + column, grad_source, mask=inside)
        tl.store(grad_coefficients + i * num_tokens + t, tl.sum(grad * source.to(tl.float32)))


def combine_arguments(sources: list[Tensor], coefficients: list[Tensor]) -> tuple[tuple, ...]:
    # Odd numbers from 3 on: of 0, 1 and multiples of 16 Triton would make kernels of their own.
    steps = tuple(3 + 2 * (0 if c.numel() == 1 else c.stride(0)) for c in coefficients)
    return tuple(sources), tuple(coefficients), tuple(map(row_stride, sources)), steps


@fused_op(plain_combine)
def combine(
    sources: list[Tensor],
    coefficients: list[Tensor],
    norm: bool,
    sums: list[Tensor],
    collect: bool,
) -> tuple[Tensor, Tensor]:
    """The sum of coefficient·source, and its RMS norm (empty unless `norm`); (T, dim) each.

    sources: (T, dim). coefficients: fp32, one number or, (T, 1), one a token. Everything that
    happens on the residual stream is such a sum; it is formed in fp32 and rounded once.
    sums: for the last sources, which many sums share. Their gradients are added to these buffers
    and leave them where `collect` says so, in the first of these sums: autograd would make a
    tensor of each and add it in another pass. Plain PyTorch leaves it to autograd.
    """
    num_tokens, dim = sources[0].shape
    stream = sources[0].new_empty(num_tokens, dim)
    normed = sources[0].new_empty(num_tokens if norm else 0, dim)
    # a row a warp: its sums need no shared memory
    _combine_kernel[(num_tokens,)](
        *combine_arguments(sources, coefficients), stream, normed, dim,
        BLOCK=triton.next_power_of_2(dim), NORM=norm, num_warps=1,
    )  # fmt: skip
    return stream, normed


def launch_combine_backward(
    sources: list[Tensor], coefficients: list[Tensor], grad_stream: Tensor, grad_normed: Tensor,
    norm: bool, sums: list[Tensor], collect: bool,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Gradients of the sources (of those without a sum unless `collect`) and, (terms, T) fp32, of
    their coefficients token by token."""
    num_tokens, dim = sources[0].shape
    own = len(sources) if collect else len(sources) - len(sums)
    grad_sources = [source.new_empty(num_tokens, dim) for source in sources[:own]]
    per_token = sources[0].new_empty((len(sources), num_tokens), dtype=torch.float32)
    _combine_backward_kernel[(num_tokens,)](
        *combine_arguments(sources, coefficients), tuple(sums), packed(grad_stream),
        packed(grad_normed), (*grad_sources, *sums)[: len(sources)], per_token, dim,
        BLOCK=triton.next_power_of_2(dim), NORM=norm, num_warps=1,
    )  # fmt: skip
    return grad_sources, per_token


def combine_backward_fake(sources, coefficients, *_):
    per_token = sources[0].new_empty((len(sources), len(sources[0])), dtype=torch.float32)
    return [source.new_empty(source.shape) for source in sources], per_token


@fused_op(fake=combine_backward_fake)
def combine_backward(
    sources: list[Tensor], coefficients: list[Tensor], grad_stream: Tensor, grad_normed: Tensor,
    norm: bool,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Without sums, and without effects: the one that full-graph compilation takes."""
    return launch_combine_backward(sources, coefficients, grad_stream, grad_normed, norm, [], False)


def _combine_context(ctx, inputs, output):
    sources, coefficients, ctx.norm, ctx.sums, ctx.collect = inputs
    ctx.save_for_backward(*sources, *coefficients)


def _combine_gradients(ctx, grad_stream, grad_normed):
    half = len(ctx.saved_tensors) // 2
    sources, coefficients = list(ctx.saved_tensors[:half]), list(ctx.saved_tensors[half:])
    arguments = sources, coefficients, grad_stream, grad_normed, ctx.norm
    if ctx.sums:
        grad_sources, per_token = launch_combine_backward(*arguments, ctx.sums, ctx.collect)
    else:
        grad_sources, per_token = combine_backward(*arguments)
    grad_sources += [None] * (half - len(grad_sources))
    total = per_token.sum(1) if any(c.numel() == 1 for c in coefficients) else per_token
    grads = [(total if c.numel() == 1 else per_token)[i] for i, c in enumerate(coefficients)]
    grads = [grad.view_as(c) for grad, c in zip(grads, coefficients)]
    return grad_sources, grads, None, [None] * len(ctx.sums), None


combine.register_autograd(_combine_gradients, setup_context=_combine_context)


# --- Attention ------------------------------------------------------------------------------------


def rotary_frequencies(head_dim: int) -> Tensor:
    """Radians a position, (head_dim / 4,) fp64: from 1 down to 1/1024."""
    return (1 / 1024) ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float64)


def yarn(frequencies: Tensor, scale: float, old: int, new: int) -> tuple[Tensor, float]:
    """Frequencies and attention scale after the long window went from `old` to `new` tokens.

    Frequencies that turn fewer than 1 time in the old window stretch with it, those that turn more
    than 32 times stay. Source: YaRN, Peng et al. 2023, arXiv 2309.00071, section 3.2.
    """
    stretch = old / new
    ramp = ((old * frequencies / (2 * math.pi) - 1) / 31).clamp(0, 1)
    return frequencies * (stretch + ramp * (1 - stretch)), scale * (1 + 0.2 * math.log(new / old))


def rotary_tables(
    frequencies: Tensor, num_positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position times frequency, each (num_positions, 1, head_dim / 4) fp32."""
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None, None] * frequencies
    return angles.cos().float().to(device), angles.sin().float().to(device)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, heads, head_dim) with adjacent pairs in the first half of the head turned."""
    turned, still = x.chunk(2, dim=-1)
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return torch.cat([pairs.flatten(-2).type_as(x), still], dim=-1)


def attention_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest attention here: flash-attn-4, varlen (FlashAttention-2 in torch) or plain."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "plain"
    if torch.cuda.get_device_capability(device)[0] < 9:
        return "varlen"
    try:
        import flash_attn.cute.interface  # noqa: F401
    except (ImportError, OSError):  # missing, or without a library that it needs
        return "varlen"
    return "flash-attn-4"


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seq_len: int, window: int,
    scale: float, backend: str,
) -> Tensor:  # fmt: skip
    """Causal attention over packed documents, each query seeing itself and `window` earlier tokens.

    q, k, v: (T, heads, head_dim). cu_seqlens: int32 document starts, padded at the end with T, so
    that document i is cu_seqlens[i] to cu_seqlens[i + 1]. max_seq_len: no document is longer.
    Returns (T, heads, head_dim).
    """
    if backend == "flash-attn-4":
        return flash_attention(q, k, v, cu_seqlens, max_seq_len, window, scale)[0]
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        lengths = (cu_seqlens, cu_seqlens, max_seq_len, max_seq_len)
        return varlen_attn(q, k, v, *lengths, window_size=(window, 0), scale=scale)
    return plain_attention(q, k, v, cu_seqlens, window, scale)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, scale: float
) -> Tensor:
    """The definition, a block of queries at a time so that memory grows with T and not with T²."""
    position = torch.arange(q.size(0), device=q.device)
    document = torch.searchsorted(cu_seqlens, position.int(), right=True)
    outputs = []
    for start in range(0, q.size(0), 256):
        queries = slice(start, start + 256)
        keys = slice(max(0, start - window), start + 256)
        distance = position[queries, None] - position[None, keys]
        visible = (distance >= 0) & (distance <= window)
        visible &= document[queries, None] == document[None, keys]
        scores = torch.einsum("qhd,khd->hqk", q[queries], k[keys]).float() * scale
        probabilities = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", probabilities.type_as(v), v[keys]))
    return torch.cat(outputs)


@torch.library.custom_op("speedrun::flash_attention", mutates_args=())
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seq_len: int, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """flash-attn-4 as one opaque op, which full-graph compilation takes; also gives the LSEs."""
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seq_len,
        max_seqlen_k=max_seq_len,
        softmax_scale=scale,
        causal=True,
        window_size_left=window,
        window_size_right=0,
        return_lse=True,
    )
    return out, lse


@flash_attention.register_fake
def _(q, k, v, cu_seqlens, max_seq_len, window, scale):
    return q.new_empty(q.shape), q.new_empty((q.size(1), q.size(0)), dtype=torch.float32)


@torch.library.custom_op("speedrun::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
    max_seq_len: int, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from flash_attn.cute.interface import _flash_attn_bwd

    return _flash_attn_bwd(
        q,
        k,
        v,
        out,
        grad.contiguous(),
        lse,
        softmax_scale=scale,
        causal=True,
        window_size_left=window,
        window_size_right=0,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seq_len,
        max_seqlen_k=max_seq_len,
        dq=q.new_empty(q.shape),
        dk=k.new_empty(k.shape),
        dv=v.new_empty(v.shape),
    )


@flash_attention_backward.register_fake
def _(grad, q, k, v, out, lse, cu_seqlens, max_seq_len, window, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _flash_attention_context(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.numbers = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)


def _flash_attention_gradients(ctx, grad, _grad_lse):
    return *flash_attention_backward(grad, *ctx.saved_tensors, *ctx.numbers), None, None, None, None


flash_attention.register_autograd(
    _flash_attention_gradients, setup_context=_flash_attention_context
)


def shift(x: Tensor) -> Tensor:
    """x of the previous position, (T, ...); the first position keeps its own."""
    return torch.cat([x[:1], x[:-1]])


def pair_heads(x: Tensor) -> Tensor:
    """(T, heads, head_dim) to (2T, heads / 2, head_dim): heads 2j and 2j + 1 take turns."""
    return x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(0, 1)


def unpair_heads(x: Tensor) -> Tensor:
    """The inverse of pair_heads."""
    return x.unflatten(0, (-1, 2)).transpose(1, 2).flatten(1, 2)


# --- Around attention -----------------------------------------------------------------------------

TILE_TOKENS = 16  # a program: half a head of 128 is a 16-byte load for each thread of 4 warps


def plain_prepare_qkv(
    qkv: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, value: Tensor | None, value_share: Tensor
    | None, extra_value: Tensor | None, paired: bool, key_offset: bool, head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys and values, (T, heads, head_dim) or as pair_heads makes them, of the product
    qkv (T, 3 dim). Arithmetic in fp32, results in qkv's dtype.

    scale: fp32 scalar on qkv. cos, sin: (positions, 1, head_dim / 4) fp32. value (T, dim), its rows
    any stride apart, is added to the values times value_share (T, heads) fp32, extra_value (T, dim)
    as it is.
    """
    q, k, v = (scale * widen(qkv)).view(len(qkv), 3, -1, head_dim).unbind(1)
    q, k = rms_norm(q), rms_norm(k)
    if key_offset:
        k = torch.cat([k[..., : head_dim // 2], shift(k[..., head_dim // 2 :])], dim=-1)
    if value is not None:
        v = v + value_share[:, :, None] * value.view_as(v)
    if extra_value is not None:
        v = v + extra_value.view_as(v)
    if paired:
        q, k, v = pair_heads(q), pair_heads(k), pair_heads(v)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    return q.type_as(qkv), k.type_as(qkv), v.type_as(qkv).contiguous()


@triton.jit
def _load_halves(pointer, offsets, mask, HALF: tl.constexpr):
    """The half of a head that rotary turns and the one that stays, (tokens, HALF) fp32."""
    turned = tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    return turned, tl.load(pointer + HALF + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _turn(x, cos, sin, TILE: tl.constexpr, HALF: tl.constexpr):
    """x (TILE, HALF) with adjacent pairs turned; loads stay 16 bytes wide this way."""
    even, odd = tl.split(tl.reshape(x, (TILE, HALF // 2, 2)))
    pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(pairs, (TILE, HALF))


@triton.jit
def _norm_factor(turned, still, scale):
    """What takes the halves of a head to its RMS norm, (tokens, 1)."""
    mean = (tl.sum(turned * turned, 1) + tl.sum(still * still, 1)) / (2 * turned.shape[1])
    return (scale * tl.rsqrt(scale * scale * mean + EPS))[:, None]


@triton.jit
def _norm_gradient(d_turned, d_still, turned, still, scale):
    """Gradient of the halves of a head from that of their RMS norm."""
    factor = _norm_factor(turned, still, scale)
    turned, still = turned * factor, still * factor
    along = (tl.sum(d_turned * turned, 1) + tl.sum(d_still * still, 1)) / (2 * turned.shape[1])
    along = along[:, None]
    return factor * (d_turned - turned * along), factor * (d_still - still * along)


@triton.jit
def _prepare_qkv_kernel(
    qkv, scale, cos, sin, value, value_share, extra_value, q, k, v, num_tokens, value_stride,
    share_stride, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRED: tl.constexpr,
    KEY_OFFSET: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    DIM: tl.constexpr = HEADS * HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.program_id(0)
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_row = tokens < num_tokens
    mask, row = in_row[:, None], tokens[:, None]
    lanes, columns = tl.arange(0, HALF)[None, :], tl.arange(0, HEAD_DIM)[None, :]
    slot, position = head, row  # of the head in its token's output, of the angle
    if PAIRED:
        slot, position = head % 2 * (HEADS // 2) + head // 2, 2 * row + head % 2

    inputs = row * (3 * DIM) + head * HEAD_DIM + lanes
    q_turned, q_still = _load_halves(qkv, inputs, mask, HALF)
    k_turned, k_still = _load_halves(qkv + DIM, inputs, mask, HALF)
    angles = position * (HALF // 2) + tl.arange(0, HALF // 2)[None, :]
    cos_tile = tl.load(cos + angles, mask=mask, other=0.0)
    sin_tile = tl.load(sin + angles, mask=mask, other=0.0)
    factor = tl.load(scale)
    inputs = row * (3 * DIM) + 2 * DIM + head * HEAD_DIM + columns
    v_tile = factor * tl.load(qkv + inputs, mask=mask, other=0.0).to(tl.float32)
    if value is not None:
        share = tl.load(value_share + tokens * share_stride + head, mask=in_row, other=0.0)
        inputs = row * value_stride + head * HEAD_DIM + columns
        v_tile += share[:, None] * tl.load(value + inputs, mask=mask, other=0.0).to(tl.float32)
    if extra_value is not None:
        inputs = row * DIM + head * HEAD_DIM + columns
        v_tile += tl.load(extra_value + inputs, mask=mask, other=0.0).to(tl.float32)
    tl.store(v + row * DIM + slot * HEAD_DIM + columns, v_tile, mask=mask)

    outputs = row * DIM + slot * HEAD_DIM + lanes
    norm = _norm_factor(q_turned, q_still, factor)
    tl.store(q + outputs, _turn(norm * q_turned, cos_tile, sin_tile, TILE, HALF), mask=mask)
    tl.store(q + outputs + HALF, norm * q_still, mask=mask)
    norm = _norm_factor(k_turned, k_still, factor)
    tl.store(k + outputs, _turn(norm * k_turned, cos_tile, sin_tile, TILE, HALF), mask=mask)
    if KEY_OFFSET:
        inputs = tl.maximum(row - 1, 0) * (3 * DIM) + head * HEAD_DIM + lanes
        k_turned, k_still = _load_halves(qkv + DIM, inputs, mask, HALF)
        norm = _norm_factor(k_turned, k_still, factor)
    tl.store(k + outputs + HALF, norm * k_still, mask=mask)


@triton.jit
def _prepare_qkv_backward_kernel(
    dq, dk, dv, qkv, scale, cos, sin, value, value_share, dqkv, dscale, dvalue, dvalue_share,
    num_tokens, value_stride, share_stride, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAIRED: tl.constexpr, KEY_OFFSET: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    DIM: tl.constexpr = HEADS * HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.program_id(0)
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_row = tokens < num_tokens
    mask, row = in_row[:, None], tokens[:, None]
    lanes, columns = tl.arange(0, HALF)[None, :], tl.arange(0, HEAD_DIM)[None, :]
    slot, position = head, row
    if PAIRED:
        slot, position = head % 2 * (HEADS // 2) + head // 2, 2 * row + head % 2

    factor = tl.load(scale)
    grads = row * DIM + slot * HEAD_DIM + columns
    dv_tile = tl.load(dv + grads, mask=mask, other=0.0).to(tl.float32)
    inputs = row * (3 * DIM) + 2 * DIM + head * HEAD_DIM + columns
    v_tile = tl.load(qkv + inputs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dqkv + inputs, factor * dv_tile, mask=mask)
    partial = tl.sum(tl.sum(dv_tile * v_tile, 1), 0)
    tl.store(dscale + tl.program_id(1) * HEADS + head, partial)
    if value is not None:
        share = tl.load(value_share + tokens * share_stride + head, mask=in_row, other=0.0)
        inputs = row * value_stride + head * HEAD_DIM + columns
        value_tile = tl.load(value + inputs, mask=mask, other=0.0).to(tl.float32)
        dshare = tl.sum(dv_tile * value_tile, 1)
        tl.store(dvalue + row * DIM + head * HEAD_DIM + columns, share[:, None] * dv_tile, mask)
        tl.store(dvalue_share + tokens * HEADS + head, dshare, mask=in_row)

    angles = position * (HALF // 2) + tl.arange(0, HALF // 2)[None, :]
    cos_tile = tl.load(cos + angles, mask=mask, other=0.0)
    sin_tile = tl.load(sin + angles, mask=mask, other=0.0)
    inputs = row * (3 * DIM) + head * HEAD_DIM + lanes
    grads = row * DIM + slot * HEAD_DIM + lanes
    d_turned, d_still = _load_halves(dq, grads, mask, HALF)
    turned, still = _load_halves(qkv, inputs, mask, HALF)
    d_turned = _turn(d_turned, cos_tile, -sin_tile, TILE, HALF)
    d_turned, d_still = _norm_gradient(d_turned, d_still, turned, still, factor)
    tl.store(dqkv + inputs, d_turned, mask=mask)
    tl.store(dqkv + inputs + HALF, d_still, mask=mask)
    d_turned, d_still = _load_halves(dk, grads, mask, HALF)
    if KEY_OFFSET:  # the still half went to the next token, the first one's to itself too
        d_still = tl.where(row == 0, d_still, 0.0)
        follows = row + 1 < num_tokens
        d_still += tl.load(dk + grads + DIM + HALF, mask=follows, other=0.0).to(tl.float32)
    turned, still = _load_halves(qkv + DIM, inputs, mask, HALF)
    d_turned = _turn(d_turned, cos_tile, -sin_tile, TILE, HALF)
    d_turned, d_still = _norm_gradient(d_turned, d_still, turned, still, factor)
    tl.store(dqkv + DIM + inputs, d_turned, mask=mask)
    tl.store(dqkv + DIM + inputs + HALF, d_still, mask=mask)


@fused_op(plain_prepare_qkv)
def prepare_qkv(
    qkv: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, value: Tensor | None, value_share: Tensor
    | None, extra_value: Tensor | None, paired: bool, key_offset: bool, head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    num_tokens, heads = qkv.size(0), qkv.size(1) // (3 * head_dim)
    shape = (2 * num_tokens, heads // 2, head_dim) if paired else (num_tokens, heads, head_dim)
    q, k, v = (torch.empty(shape, dtype=qkv.dtype, device=qkv.device) for _ in range(3))
    _prepare_qkv_kernel[heads, triton.cdiv(num_tokens, TILE_TOKENS)](
        packed(qkv), scale, cos, sin, value, value_share, packed(extra_value), q, k, v, num_tokens,
        row_stride(value), row_stride(value_share), heads, head_dim, paired, key_offset,
        TILE_TOKENS,
    )  # fmt: skip
    return q, k, v


@fused_op(
    fake=lambda dq, dk, dv, qkv, scale, cos, sin, value, value_share, *_: like(
        qkv, scale, value, value_share
    )
)
def prepare_qkv_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, scale: Tensor, cos: Tensor, sin: Tensor,
    value: Tensor | None, value_share: Tensor | None, paired: bool, key_offset: bool, head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv, scale, value and value_share, the last two empty without a value.

    The norm takes scale out of q and k again, so its gradient comes from v alone: what q and k
    would add is EPS / (mean square of the scaled head) of the size of their own terms.
    """
    num_tokens, heads = qkv.size(0), qkv.size(1) // (3 * head_dim)
    tiles = triton.cdiv(num_tokens, TILE_TOKENS)
    dqkv, dvalue, dvalue_share = like(qkv, value, value_share)
    partial = torch.empty((tiles, heads), dtype=torch.float32, device=qkv.device)
    _prepare_qkv_backward_kernel[heads, tiles](
        packed(dq), packed(dk), packed(dv), packed(qkv), scale, cos, sin, value, value_share, dqkv,
        partial, dvalue, dvalue_share, num_tokens, row_stride(value), row_stride(value_share),
        heads, head_dim, paired, key_offset, TILE_TOKENS,
    )  # fmt: skip
    return dqkv, partial.sum().view_as(scale), dvalue, dvalue_share


def _prepare_qkv_context(ctx, inputs, output):
    *tensors, extra_value, ctx.paired, ctx.key_offset, ctx.head_dim = inputs
    ctx.save_for_backward(*tensors)
    ctx.extra = extra_value is not None


def _prepare_qkv_gradients(ctx, dq, dk, dv):
    options = ctx.paired, ctx.key_offset, ctx.head_dim
    dqkv, dscale, *d_value = prepare_qkv_backward(dq, dk, dv, *ctx.saved_tensors, *options)
    if ctx.saved_tensors[-1] is None:
        d_value = None, None
    d_extra = (unpair_heads(dv) if ctx.paired else dv).flatten(1) if ctx.extra else None
    return dqkv, dscale, None, None, *d_value, d_extra, None, None, None


prepare_qkv.register_autograd(_prepare_qkv_gradients, setup_context=_prepare_qkv_context)


def paired_columns(weights: Tensor, head_dim: int) -> Tensor:
    """W_o (rows, dim) with its columns in the order in which a paired y, viewed as (T, dim), has
    the heads of a token: a copy of the small operand in place of unpair_heads on the large one."""
    return weights.unflatten(1, (-1, 2, head_dim)).transpose(1, 2).flatten(1)


def plain_finish_attention(
    y: Tensor, v: Tensor | None, alpha: Tensor | None, correction: Tensor | None,
    mix_gate: Tensor | None, head_gate: Tensor | None,
) -> Tensor:  # fmt: skip
    """What comes between attention and W_o, (T, dim), of y (T, heads, head_dim), of which at least
    one is there: mix_gate times correction added; then XSA with the values v, which takes
    tanh(alpha)·(y·v / |v|²)·v out; then head_gate times all. v and correction are shaped like y,
    the gates (T, heads) fp32 with rows any stride apart. Arithmetic in fp32."""
    out = widen(y)
    if correction is not None:
        out = out + mix_gate[:, :, None] * correction
    if alpha is not None:
        v = widen(v)
        share = (out * v).sum(-1) / v.square().sum(-1).clamp_min(1e-12)
        out = out - (alpha.tanh() * share)[:, :, None] * v
    if head_gate is not None:
        out = head_gate[:, :, None] * out
    return out.type_as(y).flatten(1)


@triton.jit
def _finish_attention_kernel(
    y, v, alpha, correction, mix_gate, head_gate, out, num_tokens, alpha_stride, mix_stride,
    head_stride, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_row = tokens < num_tokens
    mask = in_row[:, None]
    offsets = (tokens[:, None] * HEADS + head) * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    kept = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    if correction is not None:
        mix = tl.load(mix_gate + tokens * mix_stride + head, mask=in_row, other=0.0)
        kept += mix[:, None] * tl.load(correction + offsets, mask=mask, other=0.0).to(tl.float32)
    if alpha is not None:
        v_tile = tl.load(v + offsets, mask=mask, other=0.0).to(tl.float32)
        # tanh by way of the sigmoid, which Triton has without a library
        tanh = tl.load(alpha + tokens * alpha_stride + head, mask=in_row, other=0.0)
        tanh = 2 * tl.sigmoid(2 * tanh) - 1
        share = tl.sum(kept * v_tile, 1) / tl.maximum(tl.sum(v_tile * v_tile, 1), 1e-12)
        kept -= (tanh * share)[:, None] * v_tile
    if head_gate is not None:
        gate = tl.load(head_gate + tokens * head_stride + head, mask=in_row, other=0.0)
        kept *= gate[:, None]
    tl.store(out + offsets, kept, mask=mask)


@triton.jit
def _finish_attention_backward_kernel(
    grad, y, v, alpha, correction, mix_gate, head_gate, dy, dv, d_alpha, d_correction, d_mix,
    d_gate, num_tokens, alpha_stride, mix_stride, head_stride, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_row = tokens < num_tokens
    mask = in_row[:, None]
    gates = tokens * HEADS + head
    offsets = gates[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    dy_tile = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    kept = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    if correction is not None:
        mix = tl.load(mix_gate + tokens * mix_stride + head, mask=in_row, other=0.0)
        correction_tile = tl.load(correction + offsets, mask=mask, other=0.0).to(tl.float32)
        kept += mix[:, None] * correction_tile
    if alpha is not None:
        mixed = kept
        v_tile = tl.load(v + offsets, mask=mask, other=0.0).to(tl.float32)
        tanh = tl.load(alpha + tokens * alpha_stride + head, mask=in_row, other=0.0)
        tanh = 2 * tl.sigmoid(2 * tanh) - 1
        inverse = 1 / tl.maximum(tl.sum(v_tile * v_tile, 1), 1e-12)
        share = tl.sum(mixed * v_tile, 1) * inverse
        kept = mixed - (tanh * share)[:, None] * v_tile
    if head_gate is not None:
        gate = tl.load(head_gate + tokens * head_stride + head, mask=in_row, other=0.0)
        tl.store(d_gate + gates, tl.sum(dy_tile * kept, 1), mask=in_row)
        dy_tile *= gate[:, None]
    if alpha is not None:
        along = tl.sum(dy_tile * v_tile, 1)
        tl.store(d_alpha + gates, (tanh * tanh - 1) * along * share, mask=in_row)
        along *= inverse
        dv_tile = (2 * along * share)[:, None] * v_tile - along[:, None] * mixed
        dv_tile = tanh[:, None] * (dv_tile - share[:, None] * dy_tile)
        tl.store(dv + offsets, dv_tile, mask=mask)
        dy_tile -= (tanh * along)[:, None] * v_tile
    if correction is not None:
        tl.store(d_correction + offsets, mix[:, None] * dy_tile, mask=mask)
        tl.store(d_mix + gates, tl.sum(dy_tile * correction_tile, 1), mask=in_row)
    tl.store(dy + offsets, dy_tile, mask=mask)


@fused_op(plain_finish_attention)
def finish_attention(
    y: Tensor, v: Tensor | None, alpha: Tensor | None, correction: Tensor | None,
    mix_gate: Tensor | None, head_gate: Tensor | None,
) -> Tensor:  # fmt: skip
    num_tokens, heads, head_dim = y.shape
    out = y.new_empty(num_tokens, heads * head_dim)
    _finish_attention_kernel[heads, triton.cdiv(num_tokens, TILE_TOKENS)](
        packed(y), packed(v), alpha, packed(correction), mix_gate, head_gate, out, num_tokens,
        row_stride(alpha), row_stride(mix_gate), row_stride(head_gate), heads, head_dim,
        TILE_TOKENS,
    )  # fmt: skip
    return out


@fused_op(fake=lambda grad, *inputs: like(*inputs))
def finish_attention_backward(
    grad: Tensor, y: Tensor, v: Tensor | None, alpha: Tensor | None, correction: Tensor | None,
    mix_gate: Tensor | None, head_gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the inputs in their order, empty for those that are not there."""
    num_tokens, heads, head_dim = y.shape
    inputs = (packed(y), packed(v), alpha, packed(correction), mix_gate, head_gate)
    grads = like(*inputs)
    _finish_attention_backward_kernel[heads, triton.cdiv(num_tokens, TILE_TOKENS)](
        packed(grad), *inputs, *grads, num_tokens, row_stride(alpha), row_stride(mix_gate),
        row_stride(head_gate), heads, head_dim, TILE_TOKENS,
    )  # fmt: skip
    return grads


def _finish_attention_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _finish_attention_gradients(ctx, grad):
    grads = finish_attention_backward(grad, *ctx.saved_tensors)
    return tuple(
        None if x is None else grad for x, grad in zip(ctx.saved_tensors, grads, strict=True)
    )


finish_attention.register_autograd(
    _finish_attention_gradients, setup_context=_finish_attention_context
)


# --- Head mixing ----------------------------------------------------------------------------------
#
# A program takes one block of MIX_BLOCK tokens and, as one wider tile, the `reach` tokens that a
# window can add to it: keys before a block of queries, or queries after a block of keys. All the
# keys of a query are thus in registers and its softmax is exact in one go. What the backward keeps
# of the forward is the log-sum-exp of every head and the mixed probabilities, as narrow as a tile.

# One warpgroup's tensor core rows. With 128 keys before it a tile takes 96 registers a thread in
# fp32; the kernels hold two such tiles, and more rows would spill.
MIX_BLOCK = 64
# One stage, 48 to 66 KB of shared memory, leaves room for two programs a multiprocessor, as many as
# the registers allow: one computes while the other loads.
MIX_STAGES = 1


def mix_reach(window: int) -> int:
    """Keys before a block of queries that a tile holds: whole blocks, and a power of two."""
    return max(MIX_BLOCK, triton.next_power_of_2(window))


def plain_mix_heads(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, weights: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with probabilities mixed over the heads: sum_s (sum_j w_j[t] p_j[t, s]) v_h[s].

    p_j is head j's own softmax over the last `window` tokens of the document and the query's token.
    q, k, v: (T, heads, head_dim); starts: (T,) int32, where the document of each token begins;
    weights: (T, heads) fp32. Returns the output like v and what the kernels keep for the backward:
    log-sum-exps (heads, T) fp32 and the mixed probabilities (T, keys of a tile); here nothing.
    Works on blocks of queries with the block before as keys.
    """
    num_tokens, heads, head_dim = q.shape
    block = max(128, round_up(window, 16))
    padding = -num_tokens % block

    def blocks(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0) * (x.dim() - 1) + (0, padding)).unflatten(0, (-1, block))

    def with_block_before(x: Tensor) -> Tensor:
        return torch.cat([F.pad(x, (0, 0) * (x.dim() - 1) + (1, 0))[:-1], x], dim=1)

    query = torch.arange(num_tokens + padding, device=q.device).unflatten(0, (-1, block))
    keys = torch.cat([query - block, query], dim=1)
    first = torch.maximum(blocks(starts), query - window).clamp_min(0)
    visible = (keys[:, None, :] <= query[:, :, None]) & (keys[:, None, :] >= first[:, :, None])
    k, v = with_block_before(blocks(k)), with_block_before(blocks(v))
    scores = widen(torch.einsum("nqhd,nkhd->nhqk", blocks(q), k)) * scale
    probabilities = scores.masked_fill(~visible[:, None], -math.inf).softmax(dim=-1)
    mixed = (probabilities * blocks(weights).transpose(1, 2)[:, :, :, None]).sum(1)
    out = torch.bmm(mixed.type_as(v), v.flatten(2)).flatten(0, 1)[:num_tokens]
    return out.unflatten(1, (heads, head_dim)), q.new_empty(0), q.new_empty(0)


@triton.jit
def _mix_visible(starts_ptr, query, key, num_tokens, window):
    """Which keys each query sees: those of its document, the window and itself."""
    start = tl.load(starts_ptr + query, mask=query < num_tokens, other=0)
    first = tl.maximum(start, query - window)
    return (first[:, None] <= key[None, :]) & (key[None, :] <= query[:, None])


@triton.jit
def _mix_heads_kernel(
    q, k, k_before, v, v_before, starts_ptr, weights_ptr, out, lse_ptr, mixed_ptr, num_tokens,
    window, scale, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    REACH: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK
    query = start + tl.arange(0, BLOCK)
    inside = query < num_tokens
    before = start - REACH + tl.arange(0, REACH)
    sees_before = _mix_visible(starts_ptr, query, before, num_tokens, window)
    sees_own = _mix_visible(starts_ptr, query, query, num_tokens, window)
    mixed_before = tl.zeros((BLOCK, REACH), tl.float32)
    mixed_own = tl.zeros((BLOCK, BLOCK), tl.float32)
    for head in range(HEADS):
        column = head * HEAD_DIM
        q_tile = q.load([start, column])
        p_before = tl.dot(q_tile, k_before.load([start - REACH, column]).T) * scale
        p_own = tl.dot(q_tile, k.load([start, column]).T) * scale
        p_before = tl.where(sees_before, p_before, float("-inf"))
        p_own = tl.where(sees_own, p_own, float("-inf"))
        largest = tl.maximum(tl.max(p_before, 1), tl.max(p_own, 1))
        p_before = tl.exp(p_before - largest[:, None])
        p_own = tl.exp(p_own - largest[:, None])
        total = tl.sum(p_before, 1) + tl.sum(p_own, 1)
        tl.store(lse_ptr + head * num_tokens + query, largest + tl.log(total), mask=inside)
        weight = tl.load(weights_ptr + query * HEADS + head, mask=inside, other=0.0) / total
        mixed_before += weight[:, None] * p_before
        mixed_own += weight[:, None] * p_own
    mixed_before = mixed_before.to(q.dtype)
    mixed_own = mixed_own.to(q.dtype)
    rows = mixed_ptr + query[:, None] * (REACH + BLOCK)
    tl.store(rows + tl.arange(0, REACH)[None, :], mixed_before, mask=inside[:, None])
    tl.store(rows + REACH + tl.arange(0, BLOCK)[None, :], mixed_own, mask=inside[:, None])
    for head in range(HEADS):
        column = head * HEAD_DIM
        tile = tl.dot(mixed_before, v_before.load([start - REACH, column]))
        tile = tl.dot(mixed_own, v.load([start, column]), tile)
        out.store([start, column], tile.to(q.dtype))


@triton.jit
def _mix_probabilities(q_tile, k_tile, lse, visible, scale):
    scores = tl.dot(q_tile, k_tile.T) * scale
    return tl.where(visible, tl.exp(scores - lse[:, None]), 0.0)


@triton.jit
def _mix_query_gradients_kernel(
    grad, q, k, k_before, v, v_before, starts_ptr, weights_ptr, lse_ptr, d_q, d_mixed_ptr,
    d_weights_ptr, num_tokens, window, scale, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK
    query = start + tl.arange(0, BLOCK)
    inside = query < num_tokens
    before = start - REACH + tl.arange(0, REACH)
    sees_before = _mix_visible(starts_ptr, query, before, num_tokens, window)
    sees_own = _mix_visible(starts_ptr, query, query, num_tokens, window)
    d_before = tl.zeros((BLOCK, REACH), tl.float32)
    d_own = tl.zeros((BLOCK, BLOCK), tl.float32)
    for head in range(HEADS):
        column = head * HEAD_DIM
        grad_tile = grad.load([start, column])
        d_before = tl.dot(grad_tile, v_before.load([start - REACH, column]).T, d_before)
        d_own = tl.dot(grad_tile, v.load([start, column]).T, d_own)
    rows = d_mixed_ptr + query[:, None] * (REACH + BLOCK)
    tl.store(rows + tl.arange(0, REACH)[None, :], d_before, mask=inside[:, None])
    tl.store(rows + REACH + tl.arange(0, BLOCK)[None, :], d_own, mask=inside[:, None])
    for head in range(HEADS):
        column = head * HEAD_DIM
        weight = tl.load(weights_ptr + query * HEADS + head, mask=inside, other=0.0) * scale
        lse = tl.load(lse_ptr + head * num_tokens + query, mask=inside, other=0.0)
        q_tile, k_tile = q.load([start, column]), k.load([start, column])
        k_before_tile = k_before.load([start - REACH, column])
        p_before = _mix_probabilities(q_tile, k_before_tile, lse, sees_before, scale)
        p_own = _mix_probabilities(q_tile, k_tile, lse, sees_own, scale)
        d_weight = tl.sum(p_before * d_before, 1) + tl.sum(p_own * d_own, 1)
        tl.store(d_weights_ptr + query * HEADS + head, d_weight, mask=inside)
        p_before *= weight[:, None] * (d_before - d_weight[:, None])
        p_own *= weight[:, None] * (d_own - d_weight[:, None])
        tile = tl.dot(p_before.to(q.dtype), k_before_tile)
        tile = tl.dot(p_own.to(q.dtype), k_tile, tile)
        d_q.store([start, column], tile.to(q.dtype))


@triton.jit
def _mix_score_gradients(
    q_tile, k_tile, d_mixed, weights_ptr, lse_ptr, d_weights_ptr, row, inside, visible, scale
):
    """Of the scores of one head, whose entries of (T, heads) and (heads, T) are given."""
    weight = tl.load(weights_ptr + row, mask=inside, other=0.0) * scale
    d_weight = tl.load(d_weights_ptr + row, mask=inside, other=0.0)
    lse = tl.load(lse_ptr, mask=inside, other=0.0)
    p = _mix_probabilities(q_tile, k_tile, lse, visible, scale)
    return (p * weight[:, None] * (d_mixed - d_weight[:, None])).to(q_tile.dtype)


@triton.jit
def _mix_key_gradients_kernel(
    grad, grad_after, q, q_after, k, starts_ptr, weights_ptr, lse_ptr, mixed_ptr, d_mixed_ptr,
    d_weights_ptr, d_k, d_v, num_tokens, window, scale, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK
    key = start + tl.arange(0, BLOCK)
    after = start + BLOCK + tl.arange(0, REACH)
    own_inside, after_inside = key < num_tokens, after < num_tokens
    sees_own = _mix_visible(starts_ptr, key, key, num_tokens, window)
    sees_after = _mix_visible(starts_ptr, after, key, num_tokens, window)
    # Column 0 of a query's row of mixed is key REACH before the query's block.
    own = key[:, None] * (REACH + BLOCK) + REACH + tl.arange(0, BLOCK)[None, :]
    column_0 = after // BLOCK * BLOCK - REACH
    later = after[:, None] * (REACH + BLOCK) + key[None, :] - column_0[:, None]
    mixed_own = tl.load(mixed_ptr + own, mask=own_inside[:, None], other=0.0)
    mixed_after = tl.load(mixed_ptr + later, mask=after_inside[:, None], other=0.0)
    for head in range(HEADS):
        column = head * HEAD_DIM
        tile = tl.dot(mixed_own.T, grad.load([start, column]))
        tile = tl.dot(mixed_after.T, grad_after.load([start + BLOCK, column]), tile)
        d_v.store([start, column], tile.to(q.dtype))
    d_own = tl.load(d_mixed_ptr + own, mask=own_inside[:, None], other=0.0)
    d_after = tl.load(d_mixed_ptr + later, mask=after_inside[:, None], other=0.0)
    for head in range(HEADS):
        column = head * HEAD_DIM
        k_tile, q_tile = k.load([start, column]), q.load([start, column])
        q_after_tile = q_after.load([start + BLOCK, column])
        lse_row = lse_ptr + head * num_tokens
        ds_own = _mix_score_gradients(
            q_tile, k_tile, d_own, weights_ptr, lse_row + key, d_weights_ptr,
            key * HEADS + head, own_inside, sees_own, scale,
        )  # fmt: skip
        ds_after = _mix_score_gradients(
            q_after_tile, k_tile, d_after, weights_ptr, lse_row + after, d_weights_ptr,
            after * HEADS + head, after_inside, sees_after, scale,
        )  # fmt: skip
        tile = tl.dot(ds_own.T, q_tile)
        tile = tl.dot(ds_after.T, q_after_tile, tile)
        d_k.store([start, column], tile.to(q.dtype))


def mix_rows(x: Tensor, rows: int = MIX_BLOCK) -> TensorDescriptor:
    """x (T, heads, head_dim) in tiles of `rows` tokens of one head, with zeros outside."""
    return TensorDescriptor.from_tensor(x.flatten(1), [rows, x.size(2)])


def mix_fake(q, k, v, starts, weights, window, scale):
    lse = q.new_empty((q.size(1), q.size(0)), dtype=torch.float32)
    return q.new_empty(q.shape), lse, q.new_empty(q.size(0), mix_reach(window) + MIX_BLOCK)


@fused_op(plain_mix_heads, mix_fake)
def mix_by_weights(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, weights: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, heads, head_dim = q.shape
    reach = mix_reach(window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, num_tokens), dtype=torch.float32, device=q.device)
    mixed = torch.empty((num_tokens, reach + MIX_BLOCK), dtype=q.dtype, device=q.device)
    _mix_heads_kernel[(triton.cdiv(num_tokens, MIX_BLOCK),)](
        mix_rows(q), mix_rows(k), mix_rows(k, reach), mix_rows(v), mix_rows(v, reach), starts,
        weights.contiguous(), mix_rows(out), lse, mixed, num_tokens, window, scale, heads, head_dim,
        MIX_BLOCK, reach, num_warps=4, num_stages=MIX_STAGES,
    )  # fmt: skip
    return out, lse, mixed


@fused_op(fake=lambda grad, q, k, v, starts, weights, *_: like(q, k, v, weights))
def mix_by_weights_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, weights: Tensor, lse: Tensor,
    mixed: Tensor, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    num_tokens, heads, head_dim = q.shape
    reach = mix_reach(window)
    d_q, d_k, d_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    d_weights = torch.empty(weights.shape, dtype=torch.float32, device=q.device)
    d_mixed = torch.empty(mixed.shape, dtype=torch.float32, device=q.device)
    sizes = num_tokens, window, scale, heads, head_dim, MIX_BLOCK, reach
    grid = (triton.cdiv(num_tokens, MIX_BLOCK),)
    grad, weights = packed(grad), packed(weights)
    _mix_query_gradients_kernel[grid](
        mix_rows(grad), mix_rows(q), mix_rows(k), mix_rows(k, reach), mix_rows(v),
        mix_rows(v, reach), starts, weights, lse, mix_rows(d_q), d_mixed, d_weights, *sizes,
        num_warps=4, num_stages=MIX_STAGES,
    )  # fmt: skip
    _mix_key_gradients_kernel[grid](
        mix_rows(grad), mix_rows(grad, reach), mix_rows(q), mix_rows(q, reach), mix_rows(k), starts,
        weights, lse, mixed, d_mixed, d_weights, mix_rows(d_k), mix_rows(d_v), *sizes, num_warps=4,
        num_stages=MIX_STAGES,
    )  # fmt: skip
    return d_q, d_k, d_v, d_weights


def _mix_heads_context(ctx, inputs, output):
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _mix_heads_gradients(ctx, grad, _grad_lse, _grad_mixed):
    d_q, d_k, d_v, d_weights = mix_by_weights_backward(
        grad, *ctx.saved_tensors, ctx.window, ctx.scale
    )
    return d_q, d_k, d_v, None, d_weights, None, None


mix_by_weights.register_autograd(_mix_heads_gradients, setup_context=_mix_heads_context)


def document_starts(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Where the document of each token begins, (T,) int32."""
    position = torch.arange(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
    return cu_seqlens[torch.searchsorted(cu_seqlens, position, right=True) - 1]


def mix_heads(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, scale: float, weights: Tensor
) -> Tensor:
    """plain_mix_heads with weights (T, heads) RMS-normalised over the heads."""
    starts = document_starts(cu_seqlens, q.size(0))
    # F.rms_norm is slow on rows of six
    weights = weights * (weights.square().mean(1, keepdim=True) + EPS.value).rsqrt()
    return mix_by_weights(q, k, v, starts, weights, window, scale)[0]


# --- fp8 ------------------------------------------------------------------------------------------
#
# A unit is what 1.0 in fp8 stands for: fp32, padded to the 16 bytes at which cuBLAS wants each to
# begin. Products in fp8 read rows of both factors, so whatever is multiplied from both sides is
# kept both ways round.


@triton.jit
def _transposed(tile):
    """The transpose of a tile. fp8 moves as fp16, which holds all of its numbers: of single bytes
    Triton 3.6 and 3.7.1 have stored garbage, depending on the layout of the tile."""
    if tile.dtype.primitive_bitwidth != 8:
        return tl.trans(tile)
    return tl.trans(tile.to(tl.float16)).to(tl.float32).to(tile.dtype)


@triton.jit
def _quantize_kernel(
    x, unit, out, out_t, largest, num_rows, num_columns, LIMIT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64) * num_rows * num_columns
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    at = matrix + row[:, None] * num_columns + column[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if largest is not None:
        tl.atomic_max(largest, tl.max(tl.abs(values)))
    values /= tl.load(unit + 4 * tl.program_id(2))
    values = tl.clamp(values, -LIMIT, LIMIT).to(out.dtype.element_ty)
    tl.store(out + at, values, mask=inside)
    at_t = matrix + column[:, None] * num_rows + row[None, :]
    tl.store(out_t + at_t, _transposed(values), mask=tl.trans(inside))


def quantize_(
    x: Tensor, unit: Tensor, out: Tensor, out_t: Tensor, largest: Tensor | None = None
) -> None:
    """Write x/unit, saturated, to out, and transposed to out_t; raise largest (1,) to that of |x|.

    x: (rows, cols) with unit (4,), or (batch, rows, cols) with units (batch, 4).
    """
    *batch, rows, columns = x.shape
    grid = (triton.cdiv(rows, 64), triton.cdiv(columns, 128), math.prod(batch))
    _quantize_kernel[grid](
        packed(x), unit, out, out_t, largest, rows, columns,
        LIMIT=torch.finfo(out.dtype).max, ROWS=64, COLUMNS=128, num_warps=4,
    )  # fmt: skip


def quantize(
    x: Tensor, unit: Tensor, dtype: torch.dtype = E4M3, largest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """quantize_ with new outputs."""
    out, out_t = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.mT.shape, dtype=dtype)
    quantize_(x, unit, out, out_t, largest)
    return out, out_t


def fp8_product(a: Tensor, b: Tensor, unit_a: Tensor, unit_b: Tensor) -> Tensor:
    """a bᵀ in bf16 for fp8 a (rows, inner) and b (cols, inner)."""
    return torch._scaled_mm(a, b.mT, unit_a[0], unit_b[0], out_dtype=torch.bfloat16)


class MlpFp8(NamedTuple):
    """The weights of an MLP in fp8, and the units of all that is fp8 in it."""

    w_1: Tensor  # (hidden, dim)
    w_1_t: Tensor
    w_2: Tensor
    w_2_t: Tensor
    unit_w_1: Tensor
    unit_w_2: Tensor
    unit_x: Tensor
    unit_square: Tensor
    unit_grad: Tensor  # of the MLP's result
    unit_hidden: Tensor  # of the gradient in front of relu
    largest: Tensor  # (2,) of these two gradients, seen since the last update


class HeadFp8(NamedTuple):
    """The head in fp8, and the units of all that is fp8 there."""

    weight: Tensor  # (vocab, dim)
    weight_t: Tensor
    unit_w: Tensor
    unit_x: Tensor
    unit_grad: Tensor


class Fp8Copies:
    """fp8 copies of the MLP bank and of the head, made anew after every update."""

    def __init__(self, mlp_bank: Tensor, head: Tensor, num_layers: int):
        self.bank, self.head_weight = mlp_bank.detach()[: 2 * num_layers], head.detach()
        self.num_layers = num_layers

        def unit(value: float, *shape: int) -> Tensor:
            return torch.full((*shape, 4), value, device=head.device)

        def copies(x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.empty_like(x, dtype=E4M3), x.new_empty(x.mT.shape, dtype=E4M3)

        self.mlp_copies, self.head_copies = copies(self.bank), copies(self.head_weight)
        self.unit_w = unit(1.0, 2 * num_layers)
        self.unit_x = unit(28 / 448)  # a normed row reaches sqrt(768) = 28 at most, e4m3 448
        # The others' units follow from the largest in the step before, with room to grow: of each
        # layer's squares, gradients of its result and of what is in front of relu.
        self.units = unit(0.0, 3, num_layers)
        self.largest = torch.zeros(3, num_layers, device=head.device)
        self.head_units = unit(1.6 / 448), unit(100 / 448), unit(0.75 / 448)
        self.reset()

    def reset(self) -> None:
        """As before the first step: nothing is known of a layer's numbers yet."""
        for units, guess in zip(self.units, (16.0, 2.0**-6, 2.0**-6)):
            units.fill_(guess / 448)
        self.largest.zero_()
        self.refresh()

    @torch.no_grad()
    def refresh(self, head: bool = True) -> None:
        """Copy the weights as they are now, the head only if it has changed."""
        largest = torch.linalg.vector_norm(self.bank, math.inf, dim=(1, 2), dtype=torch.float32)
        self.unit_w.copy_(largest.clamp_min(1e-12)[:, None] / 448)
        quantize_(self.bank, self.unit_w, *self.mlp_copies)
        if head:
            quantize_(self.head_weight, self.head_units[0], *self.head_copies)
        largest = self.largest[:, :, None]
        self.units.copy_(torch.where(largest > 0, 1.8 / 448 * largest, self.units))
        self.largest.zero_()

    @torch.no_grad()
    def saw_squares(self, largest: list[Tensor]) -> None:
        """Note the largest squares of every layer in one micro-step, any number of them each."""
        self.largest[0].copy_(torch.maximum(self.largest[0], torch.stack(largest).amax(1)))

    def mlp(self, layer: int) -> list[Tensor]:
        """The fields of MlpFp8."""
        first, second = layer, self.num_layers + layer
        copy, copy_t = self.mlp_copies
        weights = copy[first], copy_t[first], copy[second], copy_t[second]
        units = self.unit_w[first], self.unit_w[second], self.unit_x, *self.units[:, layer]
        return [*weights, *units, self.largest[1:, layer]]

    def head(self, tokens: Tensor | None = None) -> list[Tensor]:
        """The fields of HeadFp8, of these rows of the head or of all."""
        copy, copy_t = self.head_copies
        if tokens is not None:
            rows = copy.view(torch.uint8)[tokens]
            copy, copy_t = rows.view(E4M3), rows.mT.contiguous().view(E4M3)
        return [copy, copy_t, *self.head_units]


# --- MLP ------------------------------------------------------------------------------------------


def plain_mlp(
    x: Tensor, w_1: Tensor, w_2: Tensor, fp8: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (x @ w_1.mT).relu().square() @ w_2, *(x.new_empty(0) for _ in range(4))


@triton.jit
def _mlp_product_kernel(
    a, b, square, out, out_t, unit_a, unit_b, unit_square, unit_out, largest, num_rows,
    num_columns, inner, LIMIT: tl.constexpr, BACKWARD: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # Programs that run together share the rows of eight tiles.
    program, tiles = tl.program_id(0), tl.cdiv(num_columns, COLUMNS)
    group = program // (8 * tiles)
    height = tl.minimum(8, tl.cdiv(num_rows, ROWS) - group * 8)
    row = (group * 8 + program % (8 * tiles) % height) * ROWS
    column = program % (8 * tiles) // height * COLUMNS
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, inner, INNER):
        total = tl.dot(a.load([row, k]), b.load([column, k]).T, total)
    total *= tl.load(unit_a) * tl.load(unit_b)
    if BACKWARD:
        total *= 2 * tl.sqrt(square.load([row, column]).to(tl.float32) * tl.load(unit_square))
        if TRANSPOSED:
            tl.atomic_max(largest, tl.max(tl.abs(total)))
    else:
        total = tl.maximum(total, 0.0)
        total *= total
        tl.store(largest + program, tl.max(total))
    values = tl.clamp(total / tl.load(unit_out), -LIMIT, LIMIT).to(out.dtype)
    out.store([row, column], values)
    if TRANSPOSED:
        out_t.store([column, row], _transposed(values))


def mlp_product(
    a: Tensor,
    b: Tensor,
    units: Sequence[Tensor],
    square: Tensor | None = None,
    largest: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(a bᵀ)² or, given the square, its gradient a bᵀ·2·sqrt(square); a, b: rows of `inner`.

    units: of a, b, the square and the result. Returns the result, its transpose if it is fp8, and
    the largest value of every tile; for a gradient in fp8, largest (1,) is raised to it instead.
    """
    (rows, inner), columns, fp8 = a.shape, b.size(0), a.element_size() == 1
    out = a.new_empty(rows, columns)
    out_t = a.new_empty(columns, rows) if fp8 else out
    # Two programs of 4 warps fit on an SM: one multiplies while the other stores.
    tile, tile_inner = [128, 128], 128 // a.element_size()
    programs = triton.cdiv(rows, 128) * triton.cdiv(columns, 128)
    largest = a.new_empty(programs, dtype=torch.float32) if largest is None else largest
    describe = TensorDescriptor.from_tensor
    _mlp_product_kernel[(programs,)](
        describe(a, [128, tile_inner]), describe(b, [128, tile_inner]),
        describe(out if square is None else square, tile), describe(out, tile),
        describe(out_t, tile), *units, largest, rows, columns, inner,
        LIMIT=torch.finfo(a.dtype).max, BACKWARD=square is not None, TRANSPOSED=fp8, ROWS=128,
        COLUMNS=128, INNER=tile_inner, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out, out_t, largest


def mlp_fake(x, w_1, w_2, fp8):
    square, dtype = (len(x), len(w_1)), E4M3 if fp8 else x.dtype
    return (
        x.new_empty(x.shape),
        x.new_empty(square, dtype=dtype),
        x.new_empty(square[::-1] if fp8 else 0, dtype=dtype),
        x.new_empty(x.mT.shape if fp8 else 0, dtype=dtype),
        x.new_empty(triton.cdiv(len(x), 128) * triton.cdiv(len(w_1), 128), dtype=torch.float32),
    )


@fused_op(plain_mlp, mlp_fake)
def mlp(
    x: Tensor, w_1: Tensor, w_2: Tensor, fp8: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """relu(x w_1ᵀ)² w_2 for x (T, dim) and weights (hidden, dim).

    With the fields of MlpFp8 all products run in fp8, forward and backward. Returns the result and,
    for the backward, the square, in fp8 also its transpose and that of x; then the largest squares.
    """
    if not fp8:
        ones = torch.ones(4, device=x.device)
        square, _, largest = mlp_product(x, w_1, [ones] * 4)
        return square @ w_2, square, x.new_empty(0), x.new_empty(0), largest
    fp8 = MlpFp8(*fp8)
    x8, x8_t = quantize(x, fp8.unit_x)
    units = fp8.unit_x, fp8.unit_w_1, fp8.unit_square, fp8.unit_square
    square, square_t, largest = mlp_product(x8, fp8.w_1, units)
    out = fp8_product(square, fp8.w_2_t, fp8.unit_square, fp8.unit_w_2)
    return out, square, square_t, x8_t, largest


@fused_op(fake=lambda grad, x, w_1, w_2, *_: like(x, w_1, w_2), mutates=("largest",))
def mlp_backward(
    grad: Tensor, x: Tensor, w_1: Tensor, w_2: Tensor, square: Tensor, square_t: Tensor,
    x_t: Tensor, fp8: list[Tensor], largest: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, w_1 and w_2; relu is rebuilt from its square. fp8: MlpFp8 but its largest."""
    if not fp8:
        grad, ones = packed(grad), torch.ones(4, device=x.device)
        grad_hidden = mlp_product(grad, w_2, [ones] * 4, square)[0]
        return grad_hidden @ w_1, grad_hidden.mT @ x, square.mT @ grad
    fp8 = MlpFp8(*fp8, largest)
    grad8, grad8_t = quantize(grad, fp8.unit_grad, largest=largest[:1])
    units = fp8.unit_grad, fp8.unit_w_2, fp8.unit_square, fp8.unit_hidden
    hidden8, hidden8_t, _ = mlp_product(grad8, fp8.w_2, units, square, largest[1:])
    return (
        fp8_product(hidden8, fp8.w_1_t, fp8.unit_hidden, fp8.unit_w_1),
        fp8_product(hidden8_t, x_t, fp8.unit_hidden, fp8.unit_x),
        fp8_product(square_t, grad8_t, fp8.unit_square, fp8.unit_grad),
    )


def _mlp_context(ctx, inputs, output):
    x, w_1, w_2, fp8 = inputs
    ctx.save_for_backward(x, w_1, w_2, *output[1:4], *fp8[:-1])
    ctx.largest, ctx.fp8_count = (fp8 or [None])[-1], len(fp8)
    ctx.set_materialize_grads(False)


def _mlp_gradients(ctx, grad, *_):
    tensors, fp8 = ctx.saved_tensors[:6], list(ctx.saved_tensors[6:])
    return *mlp_backward(grad, *tensors, fp8, ctx.largest), [None] * ctx.fp8_count


mlp.register_autograd(_mlp_gradients, setup_context=_mlp_context)


# --- Head -----------------------------------------------------------------------------------------

HEAD_ROWS = 16_384  # logits formed at a time: 1.6 GB; chunks small enough for the L2 are slower


def softcap(logits: Tensor) -> Tensor:
    """Logits between 0 and 23, fp32."""
    return 23 * torch.sigmoid((widen(logits) + 5) / 7.5)


@triton.jit
def _sigmoid_of_logits(logits, APPROXIMATE: tl.constexpr):
    """softcap / 23; APPROXIMATE: by the GPU's own tanh, with an error of 2^-11."""
    x = (logits.to(tl.float32) + 5) * (0.5 / 7.5)
    if APPROXIMATE:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 + 0.5 * tanh
    return tl.sigmoid(2 * x)


@triton.jit
def _lse_kernel(logits, offsets, lse, vocab, APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tile = tl.load(logits + row * vocab + column, mask=column < vocab, other=0.0)
        # The sum of 50,000 times e^23 at most: fp32 needs no maximum taken out.
        tile = 23 * _sigmoid_of_logits(tile, APPROXIMATE)
        if offsets is not None:
            tile += tl.load(offsets + column, mask=column < vocab, other=0.0)
        tile = tl.exp(tile)
        total += tl.where(column < vocab, tile, 0.0)
    tl.store(lse + row, tl.log(tl.sum(total)))


@triton.jit
def _sum_weights(targets, weights, row, real, TERMS: tl.constexpr):
    """Of the terms that each row has."""
    total = tl.zeros(row.shape, tl.float32)
    for term in tl.static_range(TERMS):
        target = tl.load(targets + row * TERMS + term, mask=real, other=-1)
        total += tl.where(target >= 0, tl.load(weights + term), 0.0)
    return total


@triton.jit
def _logits_gradient_kernel(
    logits, offsets, lse, targets, weights, unit, grad, grad_t, num_rows, vocab, stride_t,
    TERMS: tl.constexpr, APPROXIMATE: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """All of the gradient but what the targets add to it."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = row < num_rows
    inside = real[:, None] & (column < vocab)[None, :]
    scale = _sum_weights(targets, weights, row, real, TERMS) * (23 / 7.5) / tl.load(unit)
    shift = tl.load(lse + row, mask=real, other=0.0)
    tile = tl.load(logits + row[:, None] * vocab + column[None, :], mask=inside, other=0.0)
    tile = _sigmoid_of_logits(tile, APPROXIMATE)
    # in this order it takes 128 registers, or 168 with offsets: others take more
    tile = tl.exp(23 * tile - shift[:, None]) * tile * (1 - tile)
    if offsets is not None:
        tile *= tl.exp(tl.load(offsets + column, mask=column < vocab, other=0.0))[None, :]
    tile *= scale[:, None]
    tile = tile.to(grad.dtype.element_ty)
    tl.store(grad + row[:, None] * vocab + column[None, :], tile, mask=inside)
    if TRANSPOSED:
        at_t = column[:, None].to(tl.int64) * stride_t + row[None, :]
        tl.store(grad_t + at_t, _transposed(tile), mask=tl.trans(inside))


@triton.jit
def _targets_kernel(
    logits, offsets, lse, targets, weights, losses, unit, grad, grad_t, num_rows, vocab, stride_t,
    TERMS: tl.constexpr, APPROXIMATE: tl.constexpr, GRADIENT: tl.constexpr,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The losses, weighted and of the first term, and the gradient in the targets' columns."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = row < num_rows
    shift = tl.load(lse + row, mask=real, other=0.0)
    all_weights = _sum_weights(targets, weights, row, real, TERMS)
    weighted = tl.zeros((ROWS,), tl.float32)
    for term in tl.static_range(TERMS):
        target = tl.load(targets + row * TERMS + term, mask=real, other=-1).to(tl.int64)
        scored = target >= 0
        tile = tl.load(logits + row * vocab + target, mask=scored, other=0.0)
        tile = _sigmoid_of_logits(tile, APPROXIMATE)
        loss = tl.where(scored, shift - 23 * tile, 0.0)
        if term == 0:
            tl.store(losses + stride_t + row, loss, mask=real)
        weighted += tl.load(weights + term) * loss
        if GRADIENT:
            likely = 23 * tile - shift
            if offsets is not None:
                likely += tl.load(offsets + target, mask=scored, other=0.0)
            values = all_weights * tl.exp(likely)
            for other in tl.static_range(TERMS):  # two terms may have the same target
                same = tl.load(targets + row * TERMS + other, mask=real, other=-1) == target
                values -= tl.where(same, tl.load(weights + other), 0.0)
            values = values * (23 / 7.5) / tl.load(unit) * tile * (1 - tile)
            values = values.to(grad.dtype.element_ty)
            tl.store(grad + row * vocab + target, values, mask=scored)
            if TRANSPOSED:
                tl.store(grad_t + target * stride_t + row, values, mask=scored)
    tl.store(losses + row, weighted, mask=real)


def plain_head_loss(
    x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, fp8: list[Tensor],
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    logits, scored = softcap(x @ head.mT), targets >= 0
    lse = (logits if offsets is None else logits + offsets).logsumexp(1, keepdim=True)
    losses = lse - logits.gather(1, targets.clamp_min(0))
    losses = (losses * scored).sum(0)
    return torch.stack([losses @ weights, losses[0]]), x.new_empty(0), x.new_empty(0)


def head_loss_fake(x, head, targets, weights, fp8, offsets):
    return weights.new_empty(2), *like(x, head)


@fused_op(plain_head_loss, head_loss_fake)
def head_loss(
    x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, fp8: list[Tensor],
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sums over a row of cross-entropies of the softcapped logits, and the gradients of the first.

    x: (T, dim), head: (vocab, dim). targets: (T, terms) int64, IGNORED_TARGET where there is none;
    weights: (terms,) fp32. fp8: nothing or the fields of HeadFp8. offsets: (vocab,) fp32, added to
    the logits in the softmax's denominator alone. Returns (2,) fp32, in nats: all terms by weight,
    and the first alone; then what x and head would get from the former. The fp8 gradient of the
    logits is written in the two layouts that the products behind it read.
    """
    num_rows, vocab, device, targets = len(x), len(head), x.device, packed(targets)
    losses, lse = torch.empty(2, num_rows, device=device), torch.empty(num_rows, device=device)
    grad = x.new_empty((num_rows, vocab), dtype=E5M2 if fp8 else x.dtype)
    unit, grad_t, flags = torch.ones_like(losses[:, 0]), None, {"APPROXIMATE": x.is_cuda}
    if fp8:
        fp8 = HeadFp8(*fp8)
        x8, x8_t = quantize(x, fp8.unit_x)
        unit, grad_t = fp8.unit_grad, x.new_empty((vocab, num_rows), dtype=E5M2)
    for start in range(0, num_rows, HEAD_ROWS):
        rows = slice(start, min(start + HEAD_ROWS, num_rows))
        count = rows.stop - start
        if fp8:
            logits = fp8_product(x8[rows], fp8.weight, fp8.unit_x, fp8.unit_w)
        else:
            logits = x[rows] @ head.mT
        _lse_kernel[(count,)](logits, offsets, lse[rows], vocab, **flags, BLOCK=2048, num_warps=8)
        inputs, outputs = (lse[rows], targets[rows], weights), (unit, grad[rows])
        outputs += (grad_t[:, rows] if fp8 else None, count, vocab, num_rows)
        kinds = flags | {"TERMS": targets.size(1), "TRANSPOSED": bool(fp8)}
        # 128 rows of a transposed fp8 tile are whole lines of memory.
        grid = (triton.cdiv(count, 128), triton.cdiv(vocab, 64))
        _logits_gradient_kernel[grid](
            logits, offsets, *inputs, *outputs, **kinds, ROWS=128, COLUMNS=64, num_warps=4
        )
        _targets_kernel[grid[:1]](
            logits, offsets, *inputs, losses[:, rows], *outputs, **kinds, GRADIENT=True, ROWS=128
        )
    if fp8:
        grad_x = fp8_product(grad, fp8.weight_t, fp8.unit_grad, fp8.unit_w)
        return losses.sum(1), grad_x, fp8_product(grad_t, x8_t, fp8.unit_grad, fp8.unit_x)
    return losses.sum(1), grad @ head, grad.mT @ x


def _head_loss_context(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.fp8_count = len(inputs[4])


def _head_loss_gradients(ctx, grad, *_):
    d_x, d_head = (grad[0] * saved for saved in ctx.saved_tensors)
    return d_x, d_head, None, None, [None] * ctx.fp8_count, None


head_loss.register_autograd(_head_loss_gradients, setup_context=_head_loss_context)


class Columns(NamedTuple):
    """The part of the vocabulary that the loss of one row is computed on."""

    tokens: Tensor  # (columns,) int64, ascending
    offsets: Tensor  # (columns,) fp32, as head_loss takes them
    targets: Tensor  # like the row's targets, as places among the columns


def draw_columns(targets: Tensor, vocab: int, count: int, often: float = 0.0) -> Columns:
    """Every token that is a target, and others, drawn evenly, that make up `count` columns.

    A drawn column stands for (vocab - distinct targets) / (count - distinct targets) tokens; with
    the log of that as its offset the softmax's denominator is estimated without bias. Rows with
    `count` or more distinct targets give NaN. The draw is a hash of the row: the same on whichever
    rank. Source: Jean et al. 2015, arXiv 1412.2007, section 3.
    """
    token = torch.arange(vocab, device=targets.device)
    flat = targets.flatten() % (vocab + 1)  # IGNORED_TARGET goes behind the end
    is_target = torch.zeros(vocab + 1, device=targets.device).scatter_(0, flat, 1.0)[:vocab]
    is_target[: int(count * often)] = 1.0  # frequent ones
    seed = (flat * torch.arange(1, len(flat) + 1, device=targets.device)).sum()
    drawn = (token + seed) * MIX_1.value
    drawn = (drawn ^ (drawn >> 31)) * MIX_2.value
    drawn = ((drawn ^ (drawn >> 27)) & 0xFFFFFF).float() / 2**24
    tokens = (is_target + drawn).topk(count, sorted=False).indices.sort().values
    place = torch.full_like(F.pad(token, (0, 1)), IGNORED_TARGET)
    place[tokens] = token[:count]
    num_targets = is_target.sum()
    offset = torch.log((vocab - num_targets) / (count - num_targets))
    offsets = torch.where(is_target[tokens] > 0, 0.0, offset)
    if count < vocab:
        offsets = torch.where(num_targets < count, offsets, math.nan)
    return Columns(tokens, offsets, place[targets])


def plain_next_token_loss(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = softcap(F.linear(x, head))
    return F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="sum")


@fused_op(plain_next_token_loss)
def next_token_loss(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The sum over a row of the plain cross-entropy, fp32; x (T, dim), targets (T,) int64."""
    num_rows, vocab, targets = len(x), len(head), packed(targets)
    losses, lse = torch.empty(2, num_rows, device=x.device), torch.empty(num_rows, device=x.device)
    for start in range(0, num_rows, HEAD_ROWS):
        rows = slice(start, min(start + HEAD_ROWS, num_rows))
        logits, count = x[rows] @ head.mT, rows.stop - start
        _lse_kernel[(count,)](
            logits, None, lse[rows], vocab, APPROXIMATE=False, BLOCK=2048, num_warps=8
        )
        _targets_kernel[(triton.cdiv(count, 128),)](
            logits, None, lse[rows], targets[rows], torch.ones_like(lse[:1]), losses[:, rows], None,
            None, None, count, vocab, num_rows, TERMS=1, APPROXIMATE=False, GRADIENT=False,
            TRANSPOSED=False, ROWS=128,
        )  # fmt: skip
    return losses[0].sum()


# --- Tables ---------------------------------------------------------------------------------------


class SortedRows(NamedTuple):
    """Row numbers in order, so that all that goes to one row of a table is together."""

    rows: Tensor  # (n,) sorted
    order: Tensor  # (n,) where each came from
    starts: Tensor  # (n + 1,) of the runs of equal rows; n behind the last one
    count: Tensor  # (1,) how many runs


def sort_rows(rows: Tensor) -> SortedRows:
    rows, order = rows.sort(stable=True)
    begins = F.pad(rows[1:] != rows[:-1], (1, 0), value=True)
    run, position = begins.cumsum(0), torch.arange(len(rows), device=rows.device)
    starts = torch.full((len(rows) + 1,), len(rows), device=rows.device)
    # what begins no run goes behind the end, where n stands anyway
    places = torch.where(begins, run - 1, len(rows))
    starts.scatter_(0, places, torch.where(begins, position, len(rows)))
    return SortedRows(rows, order, starts, run[-1:])


@triton.jit
def _add_run(total, values, order, at, end, stride, column, inside, ROWS: tl.constexpr):
    """total, (BLOCK,) fp32, and the values of one run."""
    while at < end:
        place = at + tl.arange(0, ROWS)
        source = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
        mask = (place < end)[:, None] & inside[None, :]
        tile = tl.load(values + source[:, None] * stride + column[None, :], mask=mask, other=0)
        total += tl.sum(tile.to(tl.float32), axis=0)
        at += ROWS
    return total


@triton.jit
def _add_rows_kernel(
    table, rows, order, values, stride, starts, count, dim, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    for run in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        at, end = tl.load(starts + run), tl.load(starts + run + 1)
        target = table + tl.load(rows + at).to(tl.int64) * dim + column
        total = tl.load(target, mask=inside, other=0.0).to(tl.float32)
        total = _add_run(total, values, order, at, end, stride, column, inside, ROWS)
        tl.store(target, total, mask=inside)


def add_rows_kernel_(table: Tensor, rows: SortedRows, values: Tensor) -> None:
    dim = table.size(1)
    # Many small programs: a frequent token is one long run, the others must not wait for it.
    _add_rows_kernel[min(len(values), 4096), triton.cdiv(dim, 128)](
        table, rows.rows, rows.order, values, row_stride(values), rows.starts, rows.count, dim,
        BLOCK=128, ROWS=16, num_warps=1,
    )  # fmt: skip


def add_rows_(table: Tensor, rows: SortedRows, values: Tensor) -> None:
    """Add values (n, dim), in their first order, to rows of the table; each is summed in fp32."""
    if has_kernels(table.device):
        add_rows_kernel_(table, rows, values)
    else:
        table.index_add_(0, rows.rows, values[rows.order])


class TableRows(torch.autograd.Function):
    """Rows of a table, whose gradient is added to table.grad in place: no table-sized tensor is
    made for it, and tables that are read at the same rows share their order."""

    @staticmethod
    def forward(ctx, table: Tensor, rows: Tensor, order: SortedRows | None) -> Tensor:
        ctx.table, ctx.order = table, order
        return F.embedding(rows, table)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None, None]:
        add_rows_(ctx.table.grad, ctx.order, grad)
        return None, None, None


class FirstColumns(torch.autograd.Function):
    """x (T, dim) itself, and a few of its columns in fp32. Their gradient is added to that of x in
    place, which spares two passes over all columns: x must have one user, one that makes a new
    gradient, as products and prepare_qkv do."""

    @staticmethod
    def forward(ctx, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        ctx.count = count
        # a copy in fp32 too: a view would have no gradient where torch 2.11 compiles this
        return x.view_as(x), x[:, :count].to(torch.float32, copy=True)

    @staticmethod
    def backward(ctx, grad: Tensor, grad_columns: Tensor) -> tuple[Tensor, None]:
        grad[:, : ctx.count] += grad_columns
        return grad, None


# --- Exact match ----------------------------------------------------------------------------------
#
# What was read, as hash tables, one an order: the slot of the last n tokens of a document holds the
# token that followed them when they were last seen, as position << 32 | check << 16 | token, so
# that the largest entry is the latest. Empty slots are -1.


def match_keys(
    tokens: Tensor, starts: Tensor, orders: Sequence[int], slots: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each order, (T,): the slot, the check bits, and whether the document is that long yet."""
    position, key = torch.arange(len(tokens), device=tokens.device), torch.zeros_like(tokens).long()
    done = 0
    for order in orders:
        for back in range(done, order):
            token = F.pad(tokens.long(), (back, 0))[: len(tokens)]
            key = (key ^ (token + 1)) * MIX_1.value
            key = key ^ (key >> 29)
        done, mixed = order, key * MIX_2.value
        long_enough = position - starts >= order - 1
        yield (mixed >> 20) & (slots - 1), (mixed >> 48) & 0xFFFF, long_enough


def plain_find_matches(
    tokens: Tensor, starts: Tensor, tables: Tensor, orders: Sequence[int]
) -> tuple[Tensor, Tensor]:
    found, which = tokens.clone(), torch.zeros_like(tokens)
    keys = match_keys(tokens, starts, orders, tables.size(1))
    for i, (slot, check, long_enough) in enumerate(keys):
        entry = tables[i, slot]
        hit = long_enough & (entry >= 0) & ((entry >> 16 & 0xFFFF) == check)
        found = torch.where(hit, (entry & 0xFFFF).int(), found)
        which = torch.where(hit, i + 1, which)
    return found, which


@triton.jit
def _match_kernel(
    tokens, starts, targets, tables, found, which, base, num_tokens, slots, ORDERS: tl.constexpr,
    LONGEST: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ORDERS: bit n is set for order n."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < num_tokens
    length = position - tl.load(starts + position, mask=inside, other=0) + 1
    key, number = tl.zeros((BLOCK,), tl.int64), 0
    if WRITE:
        following = tl.load(targets + position, mask=inside, other=0)
    else:
        token = tl.load(tokens + position, mask=inside, other=0)
        order = tl.zeros((BLOCK,), tl.int32)
    for n in tl.static_range(1, LONGEST + 1):
        place = position - (n - 1)
        earlier = tl.load(tokens + place, mask=inside & (place >= 0), other=0).to(tl.int64)
        key = (key ^ (earlier + 1)) * MIX_1
        key = key ^ (key >> 29)
        if (ORDERS >> n) & 1:
            mixed = key * MIX_2
            slot, check = (mixed >> 20) & (slots - 1), (mixed >> 48) & 0xFFFF
            mask = inside & (length >= n)
            if WRITE:
                entry = (base + position).to(tl.int64) << 32 | check << 16 | following
                tl.atomic_max(tables + slot, entry, mask=mask)
            else:
                entry = tl.load(tables + slot, mask=mask, other=-1)
                hit = (entry >= 0) & (((entry >> 16) & 0xFFFF) == check)
                token = tl.where(hit, (entry & 0xFFFF).to(tl.int32), token)
                order = tl.where(hit, number + 1, order)
            tables += slots
            number += 1
    if not WRITE:
        tl.store(found + position, token, mask=inside)
        tl.store(which + position, order, mask=inside)


def launch_match_kernel(
    tokens: Tensor, starts: Tensor, targets: Tensor | None, tables: Tensor, found: Tensor | None,
    which: Tensor | None, base: int, orders: Sequence[int],
) -> None:  # fmt: skip
    slots, bits = tables.size(1), sum(1 << order for order in orders)
    _match_kernel[(triton.cdiv(len(tokens), 128),)](
        tokens, starts, targets, tables, found, which, base, len(tokens), slots,
        ORDERS=bits, LONGEST=max(orders), WRITE=targets is not None, BLOCK=128, num_warps=4,
    )  # fmt: skip


@fused_op(plain_find_matches, lambda tokens, *_: like(tokens, tokens))
def find_matches(
    tokens: Tensor, starts: Tensor, tables: Tensor, orders: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The token that followed the longest context seen before, and 1 + the number of its order.

    tokens, starts: (T,) int32, as document_starts gives them. tables: (orders, slots) int64, slots
    a power of two. orders: ascending. Returns (T,) int32 each; the token itself and 0 without one.
    """
    found, which = torch.empty_like(tokens), torch.empty_like(tokens)
    launch_match_kernel(tokens, starts, None, tables, found, which, 0, orders)
    return found, which


def note_matches_(
    tables: Tensor, tokens: Tensor, starts: Tensor, targets: Tensor, orders: Sequence[int],
    base: int,
) -> None:  # fmt: skip
    """Write down what followed each context of a row, read from position `base` of the stream on.
    The latest stays, in whichever order rows and threads write."""
    if has_kernels(tables.device):
        launch_match_kernel(tokens, starts, targets, tables, None, None, base, orders)
        return
    position = base + torch.arange(len(tokens), device=tokens.device)
    keys = match_keys(tokens, starts, orders, tables.size(1))
    for table, (slot, check, long_enough) in zip(tables, keys):
        entry = position << 32 | check << 16 | targets
        table.scatter_reduce_(0, slot[long_enough], entry[long_enough], "amax")


# --- Hashed n-grams -------------------------------------------------------------------------------
#
# A row for every hash of the last n tokens, which may be of two documents, in narrow tables that
# are too large for dense gradients and optimizer states: a step changes the rows it has read. The
# tables of all orders are one, one behind the other; the last row of each is for positions that
# have fewer than n tokens up to there.


def ngram_rows(tokens: Tensor, orders: Sequence[int], num_rows: int) -> Tensor:
    """Rows of the n-grams that end at each token, (T, orders) int32; num_rows: of each order."""
    keys = match_keys(tokens, torch.zeros_like(tokens), orders, 2**44)
    rows = [torch.where(fits, slot % (num_rows - 1), num_rows - 1) for slot, _, fits in keys]
    return torch.stack([i * num_rows + row for i, row in enumerate(rows)], dim=1).int()


@triton.jit
def _add_ngrams_kernel(
    x, tokens, table, rows, num_tokens, num_rows, stride, dim, ORDERS: tl.constexpr,
    LONGEST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """ORDERS: bit n is set for order n, COUNT bits are."""
    position = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK)
    mask = (position < num_tokens)[:, None] & (column < dim)[None, :]
    key, number = tl.zeros((TILE,), tl.int64), 0
    for n in tl.static_range(1, LONGEST + 1):
        place = position - (n - 1)
        inside = (position < num_tokens) & (place >= 0)
        key = (key ^ (tl.load(tokens + place, mask=inside, other=0).to(tl.int64) + 1)) * MIX_1
        key = key ^ (key >> 29)
        if (ORDERS >> n) & 1:
            slot = ((key * MIX_2) >> 20) & 0xFFFFFFFFFFF
            row = tl.where(place >= 0, slot % (num_rows - 1), num_rows - 1)
            row += number * num_rows
            tl.store(rows + position * COUNT + number, row.to(tl.int32), mask=position < num_tokens)
            target = x + position.to(tl.int64)[:, None] * stride + number * dim + column[None, :]
            added = tl.load(table + row[:, None] * dim + column[None, :], mask=mask, other=0.0)
            total = tl.load(target, mask=mask, other=0.0).to(tl.float32) + added.to(tl.float32)
            tl.store(target, total, mask=mask)
            number += 1


def add_ngrams_kernel_(x: Tensor, tokens: Tensor, table: Tensor, orders: Sequence[int]) -> Tensor:
    rows = tokens.new_empty(len(tokens), len(orders))
    bits, dim = sum(1 << order for order in orders), table.size(1)
    _add_ngrams_kernel[(triton.cdiv(len(tokens), 8),)](
        x, tokens, table, rows, len(tokens), len(table) // len(orders), row_stride(x), dim,
        ORDERS=bits, LONGEST=max(orders), COUNT=len(orders), BLOCK=triton.next_power_of_2(dim),
        TILE=8, num_warps=1,
    )  # fmt: skip
    return rows


def add_ngrams_(x: Tensor, tokens: Tensor, table: Tensor, orders: Sequence[int]) -> Tensor:
    """Add to x (T, dim), from column i·width on, the rows of order i; gives their numbers, as
    ngram_rows has them. tokens: (T,) int32. table: (orders · rows, width)."""
    if has_kernels(x.device):
        return add_ngrams_kernel_(x, tokens, table, orders)
    rows = ngram_rows(tokens, orders, len(table) // len(orders))
    added = F.embedding(rows, table).flatten(1)
    x[:, : added.size(1)] += added
    return rows


@triton.jit
def _update_ngrams_kernel(
    table, sum_squares, rows, order, grads, starts, count, lr, eps, dim, BLOCK: tl.constexpr,
    FEW: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < dim
    for run in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        at, end = tl.load(starts + run), tl.load(starts + run + 1)
        row = tl.load(rows + at).to(tl.int64)
        target = table + row * dim + column
        value = tl.load(target, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(sum_squares + row)
        # most runs have one gradient; of 393,216 trigrams 2,900 were the same
        few, grad = tl.minimum(at + FEW, end), tl.zeros((BLOCK,), tl.float32)
        grad = _add_run(grad, grads, order, at, few, dim, column, inside, FEW)
        grad = _add_run(grad, grads, order, few, end, dim, column, inside, MANY)
        total += tl.sum(grad * grad) / dim
        tl.store(sum_squares + row, total)
        tl.store(target, value - lr * grad / (tl.sqrt(total) + eps), mask=inside)


def update_ngrams_kernel_(
    table: Tensor, sum_squares: Tensor, rows: SortedRows, grads: Tensor, lr: float, eps: float
) -> None:
    dim = table.size(1)
    _update_ngrams_kernel[(min(len(grads), 16384),)](
        table, sum_squares, rows.rows, rows.order, packed(grads), rows.starts, rows.count, lr, eps,
        dim, BLOCK=triton.next_power_of_2(dim), FEW=2, MANY=16, num_warps=1,
    )  # fmt: skip


def update_ngrams_(
    table: Tensor, sum_squares: Tensor, rows: SortedRows, grads: Tensor, lr: float, eps: float
) -> None:
    """One step of row-wise Adagrad, in place, for the rows that have gradients: (n, dim), in their
    first order. Those of one row are summed in fp32, in the same order on every rank.

    table (rows, dim) and sum_squares (rows,) fp32: row -= lr·g / (√s + eps), s += mean(g²) before.
    A sum and no running mean, because every row has a clock of its own: its first gradient moves
    it by lr, its k-th by about lr/√k, whenever they come, and no start has to be corrected.
    Source: Adagrad, Duchi et al. 2011, JMLR 12, with one sum a row in place of one a weight.
    """
    if has_kernels(table.device):
        update_ngrams_kernel_(table, sum_squares, rows, grads, lr, eps)
        return
    touched, lengths = rows.rows.unique_consecutive(return_counts=True)
    grad = torch.segment_reduce(widen(grads[rows.order]), "sum", lengths=lengths)
    sum_squares[touched] += grad.square().mean(1)
    direction = grad / (sum_squares[touched].sqrt() + eps)[:, None]
    table[touched] = (widen(table[touched]) - lr * direction).type_as(table)


# ==================================================================================================
# 5. Model
# ==================================================================================================


class Batch(NamedTuple):
    """One row: whole documents packed behind one another."""

    tokens: Tensor  # (T,) int32
    targets: Tensor  # (T,) int64, the next tokens
    cu_seqlens: Tensor  # int32, fixed length: document starts, padded with T
    max_seq_len: int  # no document of the row is longer


class Lookups(NamedTuple):
    """What the tables hold for a row of tokens."""

    embedded: Tensor  # (T, dim)
    values: list[Tensor]  # (T, dim) of each value table
    bigram: Tensor  # (T, dim), with the n-grams and the matches


class Windows(NamedTuple):
    """How many earlier tokens a query sees in short and in long layers."""

    short: int
    long: int


class Ngrams:
    """The tables of all orders, (orders · rows, width), and what their updates need; the same on
    every rank. Not parameters: no gradient of a table's size is ever made."""

    def __init__(self, config: Config, runtime: Runtime):
        self.orders, dim, stages = config.ngram_orders, config.ngram_dim, config.stages
        self.world_size = runtime.world_size
        most = max(stage.tokens_per_step for stage in (*stages, *config.extension))
        longest = max(most // config.rows_per_step, config.val_row_tokens)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, device=runtime.device, dtype=dtype)

        dtype, count = getattr(torch, config.dtype), len(self.orders)
        self.table = zeros(count * config.ngram_rows, dim, dtype=dtype)
        self.sum_squares = zeros(len(self.table), dtype=torch.float32)
        # Row numbers and gradients of the last backward pass, at one place for all CUDA graphs,
        # and of all rows of a step
        self.own_rows = zeros(longest * count, dtype=torch.int32)
        self.own_grads = zeros(len(self.own_rows), dim, dtype=dtype)
        self.rows = zeros(most * count, dtype=torch.int32)
        self.grads = zeros(len(self.rows), dim, dtype=dtype)
        self.filled = 0

    def leave(self, rows: Tensor, grad: Tensor) -> None:
        """Keep the numbers (T, orders) of what was added, and its gradient, the first columns."""
        self.own_rows[: rows.numel()].view_as(rows).copy_(rows)
        width = rows.size(1) * self.own_grads.size(1)
        self.own_grads[: rows.numel()].view(-1, width).copy_(grad[:, :width])

    def gather(self, num_tokens: int) -> None:
        """Put what the backward pass of a row left on every rank behind what the step has so far:
        in the end in the order of the stream, however many ranks read it."""
        count = num_tokens * len(self.orders)
        part = slice(self.filled, self.filled + count * self.world_size)
        for everyone, own in (self.rows, self.own_rows), (self.grads, self.own_grads):
            if self.world_size > 1:
                dist.all_gather_into_tensor(everyone[part], own[:count])
            else:
                everyone[part].copy_(own[:count])
        self.filled = part.stop

    def update(self, lr: float, eps: float) -> None:
        """With the gradients gathered since the last one."""
        if self.filled:
            rows, grads = sort_rows(self.rows[: self.filled]), self.grads[: self.filled]
            update_ngrams_(self.table, self.sum_squares, rows, grads, lr, eps)
        self.filled = 0

    def reset(self) -> None:
        self.table.zero_()
        self.sum_squares.zero_()
        self.filled = 0


class AddNgrams(torch.autograd.Function):
    """x (T, dim) with the rows of its n-grams added in place. Their gradient is the one of x, of
    which the backward pass leaves a copy in `ngrams`: nothing else is written for the tables."""

    @staticmethod
    def forward(ctx, x: Tensor, tokens: Tensor, ngrams: Ngrams) -> Tensor:
        ctx.mark_dirty(x)
        ctx.ngrams, ctx.rows = ngrams, add_ngrams_(x, tokens, ngrams.table, ngrams.orders)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.ngrams.leave(ctx.rows, grad)
        return grad, None, None


@dataclass(frozen=True)
class SmallParam:
    """A slice of GPT.small: the parameters that fit in a few rows, kept in one fp32 vector."""

    shape: tuple[int, ...]
    start: float | list[float] | None  # None: uniform with std 0.5/sqrt(columns)
    betas: tuple[float, float]
    lr: float  # multiplier of adam_lr
    weight_decay: float  # multiplier of adam_weight_decay


def gate_layouts(config: Config) -> dict[str, dict[str, tuple[int, float]]]:
    """Outputs of the four gate MLPs, name: (width, start).

    "early" reads the normed embedding and serves the layers up to the one in skip_from; "late"
    reads the stream behind that layer and serves the others; "last" serves the last layer, "output"
    comes behind it.
    """
    heads, last = config.num_heads, len(config.layers) - 1
    layouts = {"early": {}, "late": {}, "last": LAST_LAYER_GATES, "output": OUTPUT_GATES}
    for i, row in enumerate(config.layers):
        layout = layouts["early" if i <= config.skip_from else "late"]
        if row.xsa:
            layout[f"xsa {i}"] = (heads, 0.0)
        if row.head_gate:
            layout[f"head {i}"] = (heads, 0.25)
        if row.window != "none" and i != last:
            layout[f"first {i}"] = (1, 0.0)
            layout[f"bigram {i}"] = (1, 0.05)
        if row.skip_from is not None:
            layout[f"skip {i}"] = (1, 0.5)
        if i == last:
            layout[f"mix_in {i}"] = (heads, 1.0)
            layout[f"mix_out {i}"] = (heads, 0.0)
    return layouts


def small_params(config: Config) -> dict[str, SmallParam]:
    """The layout of GPT.small."""
    layers, dim, slow = len(config.layers), config.model_dim, (0.9, 0.99)
    gates, root = (config.num_value_tables, config.num_heads, 12), math.sqrt(1.1)
    # fmt: off
    table = {
        #                            shape      start  betas        lr    weight_decay
        "smear":         SmallParam((1,),        0.0,  slow,        0.01, 0.0),
        "smear_gate":    SmallParam((1, 12),     0.0,  slow,        0.01, 0.0),
        "attention_in":  SmallParam((layers,),   0.5,  slow,        5.0,  0.0),
        "attention_out": SmallParam((layers,),   1.0,  slow,        5.0,  0.0),
        "skip":          SmallParam((1,),       -1.5,  slow,        5.0,  0.0),
        "residual":      SmallParam((layers,),   root, (0.9, 0.95), 5.0,  0.0),
        "mlp_residual":  SmallParam((layers,),   root, (0.9, 0.95), 5.0,  0.0),
        "project":       SmallParam((layers,),   1.0,  (0.9, 0.95), 1.0,  0.0),
        "mlp_project":   SmallParam((layers,),   1.0,  (0.9, 0.95), 1.0,  0.0),
        "value_gate":    SmallParam(gates,       0.0,  slow,        1.0,  1.0),
    }
    # fmt: on
    if config.match_orders:  # of no match, and of each order
        starts = [0.0] + [1.0] * len(config.match_orders)
        table["match"] = SmallParam((len(starts),), starts, slow, 5.0, 0.0)
    for name, layout in gate_layouts(config).items():
        learned_scale = name in ("early", "late")
        lr = 0.1 if learned_scale else 0.25
        starts = [start / GATE_SCALE for width, start in layout.values() for _ in range(width)]
        table[f"{name} w_1"] = SmallParam((config.gate_dim, dim), None, slow, lr, 1.0)
        table[f"{name} b_1"] = SmallParam((config.gate_dim,), 0.0, slow, lr, 0.0)
        table[f"{name} w_2"] = SmallParam((len(starts), config.gate_dim), 0.0, slow, lr, 1.0)
        table[f"{name} b_2"] = SmallParam((len(starts),), starts, slow, lr, 0.0)
        if learned_scale:
            table[f"{name} scale"] = SmallParam((1,), GATE_SCALE, slow, lr, 0.0)
    return table


def compiler(enabled: bool) -> Callable[[Callable], Callable]:
    """torch.compile with fixed shapes, or what leaves a function as it is."""
    if not enabled:
        return lambda function: function
    from torch._inductor.exc import OperatorIssue

    # Up to torch 2.12 inductor spells out all that led to the arguments of an op when it first
    # meets it, for a log that is off: ten times as much a layer, without end at the last one.
    OperatorIssue.operator_str = staticmethod(lambda target, *_: str(target))
    return functools.partial(torch.compile, fullgraph=True, dynamic=False)


class GPT(nn.Module):
    """Decoder-only transformer. Weights of one kind are stacked in a bank, so that the optimizer
    can share a whole kind out over the ranks at once; banks are padded with zeros to a multiple
    of the ranks."""

    def __init__(self, config: Config, runtime: Runtime):
        super().__init__()
        self.config = config
        dim, device, dtype = config.model_dim, runtime.device, getattr(torch, config.dtype)
        vocab = config.padded_vocab_size
        self.attention_layers = [i for i, row in enumerate(config.layers) if row.window != "none"]
        self.small_layout = small_params(config)
        self.gate_layouts = gate_layouts(config)
        self.tied = True  # the head is also the embedding; Optimizer.split_embedding ends it

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

        def bank(entries: int, rows: int) -> nn.Parameter:
            # A multiple of 8 keeps the shapes the same on 1, 2, 4 and 8 ranks.
            return zeros(round_up(entries, math.lcm(8, runtime.world_size)), rows, dim)

        self.attention_bank = bank(len(self.attention_layers), 4 * dim)  # rows of q, k, v, o
        self.mlp_bank = bank(2 * len(config.layers), config.mlp_dim)  # W_1 of every layer, then W_2
        self.head = zeros(vocab, dim)
        self.embed = zeros(vocab, dim)
        # one table behind the other, the last for the tokens that matches foretell
        num_tables = config.num_value_tables + bool(config.match_orders)
        self.value_embed = zeros(num_tables * vocab, dim)
        self.matches = None
        if config.match_orders:
            shape = len(config.match_orders), config.match_slots
            self.matches = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.bigram = zeros(config.bigram_rows, dim)
        self.ngrams = Ngrams(config, runtime) if config.ngram_orders else None
        num_small = sum(math.prod(row.shape) for row in self.small_layout.values())
        self.small = nn.Parameter(torch.zeros(num_small, device=device))
        generator = torch.Generator(device).manual_seed(config.seed)
        signs = torch.randint(0, 2, (8192, dim), generator=generator, device=device)
        self.register_buffer("bigram_signs", (2 * signs - 1).to(dtype), persistent=False)
        self.init_weights(generator)

        # What the model computes with: parts of the parameters as leaves of their own, whose
        # gradients are parts of the parameters', so that autograd adds to those in place.
        for param in self.parameters():
            param.grad = torch.zeros_like(param)
        halves = leaves(  # of every entry q, k, v and o
            self.attention_bank,
            lambda bank: [w for e in bank for w in (e[: 3 * dim], e[3 * dim :])],
        )
        pairs = zip(halves[::2], halves[1::2])
        self.attention_weights = dict(zip(self.attention_layers, pairs))
        self.mlp_weights = leaves(self.mlp_bank, list)
        self.value_tables = leaves(
            self.value_embed, lambda table: list(table.unflatten(0, (-1, vocab)))
        )
        self.small_weights = dict(zip(self.small_layout, leaves(self.small, self.cut_small)))

        self.backend = attention_backend(device, dtype)
        self.rotary = self.make_rotary(device)
        self.fp8 = None
        if config.fp8 and dtype == torch.bfloat16 and has_kernels(device):
            self.fp8 = Fp8Copies(self.mlp_bank, self.head, len(config.layers))
        self.register_buffer("one", torch.ones(1, device=device), persistent=False)
        self.gate_mlp = compiler(config.compile == "block")(gate_mlp)
        self.run_layers = compiler(config.compile == "full")(self.run_layers)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        config = self.config

        def uniform_(weights: Tensor) -> None:  # std 0.5/sqrt(columns)
            bound = math.sqrt(3) * 0.5 / math.sqrt(weights.size(-1))
            weights.uniform_(-bound, bound, generator=generator)

        uniform_(self.attention_bank[: len(self.attention_layers)])
        uniform_(self.mlp_bank[: len(config.layers)])  # W_2 stays zero
        self.head.normal_(0, 0.005, generator=generator)
        self.embed.copy_(self.head)
        self.value_embed.normal_(0, 0.01, generator=generator)
        for name, weights in self.unpack_small().items():
            start = self.small_layout[name].start
            if start is None:
                uniform_(weights)
            else:
                weights.copy_(torch.as_tensor(start, device=weights.device).expand_as(weights))

    def cut_small(self, vector: Tensor) -> list[Tensor]:
        """The slices of a vector like self.small, in their shapes."""
        shapes = [row.shape for row in self.small_layout.values()]
        pieces = vector.split([math.prod(shape) for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def unpack_small(self) -> dict[str, Tensor]:
        """The slices of self.small by name."""
        return dict(zip(self.small_layout, self.cut_small(self.small)))

    def make_rotary(self, device: torch.device) -> dict[int, tuple[Tensor, Tensor, float]]:
        """Cosines, sines and attention scale for each long window of the schedule, by YaRN."""
        config = self.config
        stages = (*config.stages, *config.extension)
        longest = max(stage.tokens_per_step // config.rows_per_step for stage in stages)
        positions = 2 * max(longest, config.val_row_tokens)  # paired heads use two a token
        windows = [stage.window_long for stage in stages] + [config.final_window_long]
        frequencies, scale = rotary_frequencies(config.head_dim), config.attention_scale
        tables = {windows[0]: (*rotary_tables(frequencies, positions, device), scale)}
        for old, new in itertools.pairwise(windows):
            frequencies, scale = yarn(frequencies, scale, old, new)
            tables[new] = (*rotary_tables(frequencies, positions, device), scale)
        return tables

    def look_up(self, batch: Batch) -> Lookups:
        """Rows of the embedding tables."""
        tokens, orders = batch.tokens, self.config.match_orders

        def read(tables: list[Tensor], rows: Tensor) -> list[Tensor]:
            order = sort_rows(rows) if torch.is_grad_enabled() else None
            return [TableRows.apply(table, rows, order) for table in tables]

        embed = self.head if self.tied else self.embed
        tables = self.value_tables[: self.config.num_value_tables]
        embedded, *values = read([embed, *tables], tokens)
        hashed, sign = bigram_hash(tokens, self.config.bigram_rows)
        bigram = read([self.bigram], hashed)[0] * F.embedding(sign, self.bigram_signs)
        if self.ngrams is not None:
            bigram = AddNgrams.apply(bigram, tokens, self.ngrams)
        if orders:
            starts = document_starts(batch.cu_seqlens, len(tokens))
            found, order = find_matches(tokens, starts, self.matches, orders)
            which = order[:, None] == torch.arange(len(orders) + 1, device=tokens.device)
            gain = (which.float() @ self.small_weights["match"])[:, None]
            match = read([embed if self.config.match_embed else self.value_tables[-1]], found)[0]
            if self.config.match_embed:
                match = rms_norm(match)
            bigram = combine([bigram, match], [self.one, gain], False, [], False)[0]
        return Lookups(embedded, values, bigram)

    def hidden(self, batch: Batch, windows: Windows, fp8: Fp8Copies | None = None) -> Tensor:
        """The normed residual stream in front of the head, (T, dim)."""
        return self.run_layers(self.look_up(batch), batch, windows, fp8)

    def run_layers(
        self, lookups: Lookups, batch: Batch, windows: Windows, fp8: Fp8Copies | None
    ) -> Tensor:
        """From the embeddings to the normed stream in front of the head, (T, dim)."""
        layers, small, one = self.config.layers, self.small_weights, self.one
        bigram = lookups.bigram
        last, attended = len(layers) - 1, {row.attend_from for row in layers}
        residual, mlp_residual = small["residual"].unbind(), small["mlp_residual"].unbind()
        project = (small["project"] * small["attention_out"]).unbind()
        mlp_project = small["mlp_project"].unbind()

        def gates_of(name: str, x: Tensor) -> dict[str, Tensor]:
            weights = [small[f"{name} {part}"] for part in ("w_1", "b_1", "w_2", "b_2")]
            outputs = self.gate_mlp(x, *weights, small.get(f"{name} scale"))
            widths = [width for width, _ in self.gate_layouts[name].values()]
            return dict(zip(self.gate_layouts[name], outputs.split(widths, dim=1)))

        embedded, start = FirstColumns.apply(lookups.embedded, 12)
        smear = small["smear"] * torch.sigmoid(F.linear(start, small["smear_gate"]))
        before = F.pad(embedded, (0, 0, 1, 0))[:-1]
        x0 = combine([embedded, before], [one, smear], True, [], False)[1]
        gates = gates_of("early", x0)
        sums = []
        # full's compiler wants functions without effects
        if has_kernels(x0.device) and torch.is_grad_enabled() and self.config.compile != "full":
            sums = [torch.zeros_like(x0), torch.zeros_like(x0)]
        x, normed = combine([x0, bigram], [one, gates["bigram 0"]], True, sums, True)
        first, kept, kept_normed = x, {}, {}  # outputs of layers
        squares = []

        for i, row in enumerate(layers):
            scales, mlp_scales = [residual[i], project[i]], [mlp_residual[i], mlp_project[i]]
            value_share = extra_value = None
            if row.skip_from is not None:
                gate = torch.sigmoid(small["skip"]) * gates[f"skip {i}"]
                x, normed = combine([x, kept[row.skip_from]], [one, gate], True, [], False)
            if i == last:
                kept |= {"attend": kept[row.attend_from], "last": x}
                own = gates_of("last", x)
                skips = [first, kept["attend"], x]
                shares = [own["value_first"], own["value_attend"], own["value_last"]]
                extra_value, _ = combine(skips, shares, False, [], False)
                shares = [own["x_first"], own["x_attend"], 1 + own["x_last"]]
                x, _ = combine(skips, shares, False, [], False)
                value_share = own["value_gate"].repeat_interleave(self.config.num_heads // 2, dim=1)
                scales = [own["residual"], own["project"] * small["attention_out"][i]]
                mlp_scales = [own["mlp_residual"], own["mlp_project"]]
            if row.window != "none":
                source = normed if row.attend_from is None else kept_normed[row.attend_from]
                value = None if row.value_table is None else lookups.values[row.value_table]
                y = self.attend(i, source, value, value_share, extra_value, gates, batch, windows)
                if i == last:
                    sources, shares = [first, bigram], [own["first"], own["bigram"]]
                elif i == 0:  # which has had its share of the bigram
                    sources, shares = [x0], [gates["first 0"]]
                else:
                    sources, shares = [x0, bigram], [gates[f"first {i}"], gates[f"bigram {i}"]]
                shared = sums[1:] if i == last else sums[: len(sources)]
                x, normed = combine([x, y, *sources], [*scales, *shares], True, shared, False)
            w_1, w_2 = self.mlp_weights[i], self.mlp_weights[len(layers) + i]
            y, *_, largest = mlp(normed, w_1, w_2, fp8.mlp(i) if fp8 else [])
            squares.append(largest)
            behind = layers[i + 1] if i < last else row
            norm = behind.attend_from is None and behind.skip_from is None or i in attended
            x, normed = combine([x, y], mlp_scales, norm, [], False)
            kept[i], kept_normed[i] = x, normed
            if i == self.config.skip_from:
                kept["skip"] = x
                gates |= gates_of("late", x)
        if fp8:
            fp8.saw_squares(squares)
        own = gates_of("output", x)
        sources = {"first": first, "value": lookups.values[0], **kept}
        sources, shares = zip(*((sources[name], own[name]) for name in OUTPUT_GATES))
        return combine([x, *sources], [one, *shares], True, [], False)[1]

    def attend(
        self,
        i: int,
        normed: Tensor,
        value: Tensor | None,
        value_share: Tensor | None,
        extra_value: Tensor | None,
        gates: dict[str, Tensor],
        batch: Batch,
        windows: Windows,
    ) -> Tensor:
        """Attention of layer i to the normed stream (T, dim), with its projections; (T, dim).

        value (T, dim) is added to the values times value_share (T, heads), by default times what
        the value gates make of the first columns; extra_value (T, dim) as it is.
        """
        config, small, row = self.config, self.small_weights, self.config.layers[i]
        w_qkv, w_o = self.attention_weights[i]
        if value is not None and value_share is None:
            normed, start = FirstColumns.apply(normed, 6)
            value, value_start = FirstColumns.apply(value, 6)
            features = torch.cat([start, value_start], dim=1)
            value_share = 2 * torch.sigmoid(
                F.linear(features, small["value_gate"][row.value_table])
            )
        *turns, scale = self.rotary[windows.long]
        window = windows.long if row.window == "long" else windows.short
        copies = 2 if row.paired else 1  # positions a token
        turns = (table[: len(normed) * copies] for table in turns)
        options = row.paired, row.window == "long", config.head_dim
        qkv = F.linear(normed, w_qkv)
        q, k, v = prepare_qkv(
            qkv, small["attention_in"][i], *turns, value, value_share, extra_value, *options
        )
        documents = batch.cu_seqlens * copies, batch.max_seq_len * copies
        y = attention(q, k, v, *documents, window, scale, self.backend)
        if row.paired:
            return F.linear(y.reshape(normed.shape), paired_columns(w_o, config.head_dim))
        alpha, head_gate, read = (gates.get(f"{name} {i}") for name in ("xsa", "head", "mix_in"))
        mixed = None
        if read is not None:
            mixed = mix_heads(q, k, v, batch.cu_seqlens, config.mix_window, scale, read)
        if alpha is not None or head_gate is not None:
            v = None if alpha is None else v
            y = finish_attention(y, v, alpha, mixed, gates.get(f"mix_out {i}"), head_gate)
        return F.linear(y.flatten(1) if y.dim() == 3 else y, w_o)

    def forward(
        self,
        batch: Batch,
        windows: Windows,
        loss_weights: Tensor | None = None,
        prefixes: Tensor | None = None,
        columns: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The loss to train on and the plain next-token loss, both fp32 sums over the row in nats.

        loss_weights, (4,): of the next token, of the two after it, and of the next token's prefix
        token, prefixes[target] (IGNORED_TARGET where there is none). columns: how many of the
        vocabulary estimate the softmax, 0 for all. Without weights, as validation has it, the
        next-token loss alone, in bf16.
        """
        if loss_weights is None:
            return next_token_loss(self.hidden(batch, windows), self.head, batch.targets)
        x, targets = self.hidden(batch, windows, self.fp8), batch.targets
        later = [F.pad(targets, (0, n), value=IGNORED_TARGET)[n:] for n in (1, 2)]
        terms = torch.stack([targets, *later, prefixes[targets]], dim=1)
        head, tokens, offsets = self.head, None, None
        if columns:
            tokens, offsets, terms = draw_columns(terms, len(head), columns, self.config.often)
            place = torch.arange(columns + 1, device=tokens.device)  # each is a run of its own
            order = SortedRows(tokens, place[:-1], place, place[-1:])
            head = TableRows.apply(head, tokens, order)
        fp8 = self.fp8.head(tokens) if self.fp8 else []
        losses, *_ = head_loss(x, head, terms, loss_weights, fp8, offsets)
        return losses[0], losses[1].detach()


def leaves(param: nn.Parameter, cut: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
    """Parts of a parameter as leaves of their own, whose gradients are parts of its gradient."""
    parts = cut(param.detach())
    for part, grad in zip(parts, cut(param.grad)):
        part.requires_grad_()
        part.grad = grad
    return parts


def bigram_hash(tokens: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Rows of the bigram and of the sign table for each token (int32) and its predecessor."""
    previous = F.pad(tokens, (1, 0))[:-1]
    rows = ((36313 * tokens) ^ (27191 * previous)) % (num_rows - 1)
    no_previous = torch.arange(len(tokens), device=tokens.device) == 0
    return torch.where(no_previous, num_rows - 1, rows), (previous ^ tokens) % 8192


def gate_mlp(
    x: Tensor, w_1: Tensor, b_1: Tensor, w_2: Tensor, b_2: Tensor, scale: Tensor | None
) -> Tensor:
    """Per-token coefficients, (T, outputs) fp32; scale None is the constant GATE_SCALE."""
    hidden = F.gelu(F.linear(x, w_1.type_as(x), b_1.type_as(x)))
    outputs = F.linear(hidden, w_2.type_as(x)).float() + b_2
    return outputs * (GATE_SCALE if scale is None else scale)


# ==================================================================================================
# 6. Optimizer
# ==================================================================================================


@dataclass(frozen=True)
class ParamGroup:
    """How one parameter is updated."""

    name: str  # of the parameter in GPT
    rule: str  # normuon or adam
    sharded: bool  # each rank updates its own rows and sends them round; else every rank all rows
    every: int  # steps whose gradients make one update
    lr: float = 1.0  # multiplier of muon_lr or adam_lr
    weight_decay: float = 1.0  # multiplier
    betas: tuple[float, float] = (0.9, 0.99)  # Adam only

    def is_due(self, step: int, tied: bool) -> bool:
        """Whether this step ends with an update of it; tied: embedding and head are one matrix."""
        return (step + 1) % self.every == 0 and not (tied and self.name == "embed")


# fmt: off
# In the order in which their gradients start to travel; the updates finish in the reverse order.
PARAM_GROUPS = (
    #          name              rule       sharded  every  lr    weight_decay  betas
    ParamGroup("bigram",         "adam",    True,    2,     75.0,   5.0,        (0.75, 0.95)),
    ParamGroup("value_embed",    "adam",    True,    2,     75.0,   5.0,        (0.75, 0.95)),
    ParamGroup("mlp_bank",       "normuon", True,    1),
    ParamGroup("head",           "adam",    True,    2,      1.0, 150.0,        (0.50, 0.95)),
    ParamGroup("embed",          "adam",    True,    2,      1.0, 150.0,        (0.50, 0.95)),
    ParamGroup("attention_bank", "normuon", True,    1),
    ParamGroup("small",          "adam",    False,   2),  # numbers are in small_params
)

# (a, b, c) of X <- aX + (bA + cA²)X with A = XXᵀ; Amsel et al. 2025, arXiv 2505.16932
POLAR_EXPRESS = (
    (8.1566, -22.4833, 15.8788),
    (4.0429,  -2.8089,  0.5000),
    (3.8917,  -2.7725,  0.5061),
    (3.2858,  -2.3681,  0.4645),
    (2.3465,  -1.7098,  0.4232),
)
# fmt: on


@triton.jit
def _symmetric_kernel(
    x_ptr, out_ptr, size, inner, stride_batch, stride_row, stride_inner, linear, quadratic,
    LINEAR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """out = quadratic·x xᵀ (+ linear·x if LINEAR: x is symmetric) for x (batch, size, inner).

    Grid: (blocks on and above the diagonal, batch); a block off the diagonal is stored twice. The
    blocks of one matrix run together, so that it is read from L2 after the first time.
    """
    # Rows r and blocks - 1 - r of the triangle have blocks + 1 places together: count along both.
    blocks = tl.cdiv(size, BLOCK)
    pair, place = tl.program_id(0) // (blocks + 1), tl.program_id(0) % (blocks + 1)
    in_first = place < blocks - pair
    row_block = tl.where(in_first, pair, blocks - 1 - pair)
    col_block = tl.where(in_first, pair + place, place - 1)
    rows = row_block * BLOCK + tl.arange(0, BLOCK)
    cols = col_block * BLOCK + tl.arange(0, BLOCK)
    along = tl.arange(0, BLOCK_INNER)
    x_ptr += tl.program_id(1) * stride_batch
    left = x_ptr + rows[:, None] * stride_row + along[None, :] * stride_inner
    right = x_ptr + cols[None, :] * stride_row + along[:, None] * stride_inner
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        inside = start + along < inner
        a = tl.load(left, mask=(rows < size)[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=(cols < size)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(a, b, total)
        left += BLOCK_INNER * stride_inner
        right += BLOCK_INNER * stride_inner
    total *= quadratic
    mask = (rows < size)[:, None] & (cols < size)[None, :]
    if LINEAR:
        tile = x_ptr + rows[:, None] * stride_row + cols[None, :] * stride_inner
        total += linear * tl.load(tile, mask=mask, other=0.0).to(tl.float32)
    total = total.to(out_ptr.dtype.element_ty)
    out_ptr += tl.program_id(1) * size * size
    tl.store(out_ptr + rows[:, None] * size + cols[None, :], total, mask=mask)
    if row_block != col_block:
        mirrored = out_ptr + cols[:, None] * size + rows[None, :]
        tl.store(mirrored, tl.trans(total), mask=tl.trans(mask))


def symmetric_product(
    x: Tensor, transpose: bool, linear: float | None = None, quadratic: float = 1.0
) -> Tensor:
    """quadratic·x xᵀ + linear·x of x (batch, rows, cols), contiguous; of xᵀ if transpose."""
    assert x.is_contiguous()
    batch, rows, cols = x.shape
    size, inner, strides = (cols, rows, (1, cols)) if transpose else (rows, cols, (cols, 1))
    out = torch.empty((batch, size, size), dtype=x.dtype, device=x.device)

    def programs(block: int) -> int:
        blocks = triton.cdiv(size, block)
        return blocks * (blocks + 1) // 2

    # Blocks of 128 read half as much of L2 as blocks of 64, but must busy half or so of the 132
    # SMs: on 8 GPUs a rank's three MLP matrices make 63, its twelve pairs of heads 36.
    block = 128 if batch * programs(128) >= 60 else 64
    _symmetric_kernel[programs(block), batch](
        x, out, size, inner, rows * cols, *strides, linear or 0.0, quadratic,
        LINEAR=linear is not None, BLOCK=block, BLOCK_INNER=64,
        num_warps=8 if block == 128 else 4, num_stages=3 if block == 128 else 4,
    )  # fmt: skip
    return out


def gram(x: Tensor) -> Tensor:
    """The smaller of XXᵀ and XᵀX of each matrix in x, (batch, rows, cols), in its dtype."""
    tall = x.size(1) > x.size(2)
    if has_kernels(x.device):
        return symmetric_product(x, transpose=tall)
    return x.mT @ x if tall else x @ x.mT


def symmetric_polynomial(a: Tensor, linear: float, quadratic: float) -> Tensor:
    """linear·A + quadratic·A² of symmetric matrices, (batch, size, size)."""
    if has_kernels(a.device):
        return symmetric_product(a, False, linear, quadratic)
    return torch.baddbmm(a, a, a, beta=linear, alpha=quadratic)


def polar_express(x: Tensor, norm: Tensor) -> Tensor:
    """Nearly the polar factor UVᵀ of each matrix USVᵀ in x, (batch, rows, cols).

    norm: of Frobenius, (batch, 1, 1), fp32.
    """
    x = x / (1.02 * norm + 1e-7).type_as(x)
    for a, b, c in POLAR_EXPRESS:
        product = symmetric_polynomial(gram(x), b, c)
        left, right = (x, product) if x.size(1) > x.size(2) else (product, x)
        x = torch.baddbmm(x, left, right, beta=a)
    return x


@triton.jit
def _apply_update(high_ptr, low_ptr, at, mask, direction, lr, decay):
    """apply_update_ to the weights at these places."""
    high = tl.load(high_ptr + at, mask=mask, other=0).to(tl.int32) << 16
    low = tl.load(low_ptr + at, mask=mask, other=0).to(tl.int32) & 0xFFFF
    weights = (high | low).to(tl.float32, bitcast=True)
    shrinks = tl.where(direction * weights > 0, decay, 0.0)
    weights = weights - lr * direction - shrinks * weights
    bits = weights.to(tl.int32, bitcast=True)
    tl.store(high_ptr + at, (bits >> 16).to(tl.int16), mask=mask)
    tl.store(low_ptr + at, bits.to(tl.int16), mask=mask)


# A view of a bank (entries, height, width) as its matrices is (entries, matrices of an entry, rows,
# width): bank[:, first:last].unflatten(1, (-1, rows)), which copies nothing. The kernels read such
# views in place and number the matrices through; what they make is (matrices, rows, cols).


@triton.jit
def _bank_offset(matrix, per_entry, stride_entry, numel):
    """Where the matrix-th of a bank's matrices, of numel weights each, begins."""
    return (matrix // per_entry) * stride_entry + (matrix % per_entry) * numel


@triton.jit
def _nesterov_kernel(
    grad_ptr, momentum_ptr, update_ptr, norm_ptr, mu_ptr, per_entry, stride_entry, numel,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (parts of a matrix, matrices). norm_ptr: the norm of every part."""
    part, matrix = tl.program_id(0), tl.program_id(1)
    offsets = part * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    bank = _bank_offset(matrix, per_entry, stride_entry, numel) + offsets
    grad = tl.load(grad_ptr + bank, mask=mask, other=0.0).to(tl.float32)
    momentum = tl.load(momentum_ptr + bank, mask=mask, other=0.0)
    weight = 1 - tl.load(mu_ptr)
    momentum += weight * (grad - momentum)
    tl.store(momentum_ptr + bank, momentum, mask=mask)
    update = (momentum + weight * (grad - momentum)).to(update_ptr.dtype.element_ty)
    tl.store(update_ptr + matrix * numel + offsets, update, mask=mask)
    update = update.to(tl.float32)
    tl.store(norm_ptr + matrix * tl.num_programs(0) + part, tl.sqrt(tl.sum(update * update)))


def nesterov_kernel_(grad: Tensor, momentum: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    entries, per_entry, rows, cols = momentum.shape
    matrices, numel, block = entries * per_entry, rows * cols, 4096
    assert grad.stride() == momentum.stride() == (momentum.stride(0), numel, cols, 1)
    parts, device = triton.cdiv(numel, block), momentum.device
    update = torch.empty((matrices, rows, cols), dtype=torch.bfloat16, device=device)
    norms = torch.empty((matrices, parts, 1), dtype=torch.float32, device=device)
    _nesterov_kernel[parts, matrices](
        grad, momentum, update, norms, mu, per_entry, momentum.stride(0), numel,
        BLOCK=block, num_warps=8,
    )  # fmt: skip
    return update, norms.norm(dim=1, keepdim=True)


def nesterov_(grad: Tensor, momentum: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """Momentum, updated in place, then Nesterov's look ahead and its Frobenius norms.

    grad, and momentum in fp32: a bank's matrices, (entries, matrices of an entry, rows, cols). mu:
    0-d. Gives (matrices, rows, cols), in bf16 on a GPU, and (matrices, 1, 1) in fp32.
    """
    if has_kernels(grad.device):
        return nesterov_kernel_(grad, momentum, mu)
    grad = grad.float()
    momentum.lerp_(grad, 1 - mu)
    update = grad.lerp(momentum, mu).flatten(0, 1)
    update = update.bfloat16() if grad.is_cuda else update
    return update, update.float().norm(dim=(1, 2), keepdim=True)


@triton.jit
def _sum_squares_kernel(
    x_ptr, out_ptr, numel, kept, summed, stride_kept, stride_summed,
    BLOCK_KEPT: tl.constexpr, BLOCK_SUMMED: tl.constexpr,
):  # fmt: skip
    """Of each row, or each column, by the strides. Grid: (blocks of kept, matrices)."""
    matrix = tl.program_id(1)
    keep = tl.program_id(0) * BLOCK_KEPT + tl.arange(0, BLOCK_KEPT)
    along = tl.arange(0, BLOCK_SUMMED)
    x_ptr += matrix * numel + keep[:, None] * stride_kept + along[None, :] * stride_summed
    squares = tl.zeros((BLOCK_KEPT, BLOCK_SUMMED), dtype=tl.float32)
    for start in range(0, summed, BLOCK_SUMMED):
        mask = (keep < kept)[:, None] & (start + along < summed)[None, :]
        x = tl.load(x_ptr + start * stride_summed, mask=mask, other=0.0).to(tl.float32)
        squares += x * x
    tl.store(out_ptr + matrix * kept + keep, tl.sum(squares, axis=1), mask=keep < kept)


@triton.jit
def _normuon_scale_kernel(
    squares_ptr, mean_square_ptr, step_scale_ptr, per_entry, kept, summed, beta2,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of squares to what each row (or column) is multiplied by, in place. Grid: (matrices,)"""
    matrix = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < kept
    squares_ptr += matrix * kept + offsets
    mean_square_ptr += matrix * kept + offsets
    squares = tl.load(squares_ptr, mask=mask, other=0.0)
    mean_square = tl.load(mean_square_ptr, mask=mask, other=0.0)
    mean_square += (1 - beta2) * (squares / summed - mean_square)
    tl.store(mean_square_ptr, mean_square, mask=mask)
    scale = tl.rsqrt(tl.maximum(mean_square, 1e-12))
    norm, evened_norm = tl.sqrt(tl.sum(squares)), tl.sqrt(tl.sum(squares * scale * scale))
    restore = norm / tl.maximum(evened_norm, 1e-12) * tl.load(step_scale_ptr + matrix // per_entry)
    tl.store(squares_ptr, scale * restore, mask=mask)


@triton.jit
def _normuon_apply_kernel(
    direction_ptr, high_ptr, low_ptr, scale_ptr, lr_ptr, decay_ptr,
    per_entry, stride_entry, num_rows, num_cols,
    BY_ROW: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """apply_update_ with the direction times its scales. Grid: (blocks across, down, matrices)."""
    matrix = tl.program_id(2)
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    offsets = rows[:, None] * num_cols + cols[None, :]
    numel = num_rows * num_cols
    if BY_ROW:
        scale = tl.load(scale_ptr + matrix * num_rows + rows, mask=rows < num_rows)[:, None]
    else:
        scale = tl.load(scale_ptr + matrix * num_cols + cols, mask=cols < num_cols)[None, :]
    direction = tl.load(direction_ptr + matrix * numel + offsets, mask=mask).to(tl.float32) * scale
    bank = _bank_offset(matrix, per_entry, stride_entry, numel) + offsets
    lr, decay = tl.load(lr_ptr), tl.load(decay_ptr)
    _apply_update(high_ptr, low_ptr, bank, mask, direction, lr, decay)


def normuon_apply_kernel_(
    high: Tensor, low: Tensor, direction: Tensor, mean_square: Tensor, step_scale: Tensor,
    lr: Tensor, decay: Tensor, beta2: float,
) -> None:  # fmt: skip
    per_entry, (matrices, rows, cols) = high.size(1), direction.shape
    numel, stride_entry = rows * cols, high.stride(0)
    assert high.stride() == low.stride() == (stride_entry, numel, cols, 1)
    assert direction.is_contiguous() and mean_square.is_contiguous()
    by_row = mean_square.size(2) == 1
    if by_row:
        kept, summed, strides, blocks = rows, cols, (cols, 1), (16, 256)
    else:
        kept, summed, strides, blocks = cols, rows, (1, cols), (64, 64)
    scale = torch.empty((matrices, kept), dtype=torch.float32, device=high.device)
    _sum_squares_kernel[triton.cdiv(kept, blocks[0]), matrices](
        direction, scale, numel, kept, summed, *strides,
        BLOCK_KEPT=blocks[0], BLOCK_SUMMED=blocks[1], num_warps=8,
    )  # fmt: skip
    _normuon_scale_kernel[(matrices,)](
        scale, mean_square, step_scale, per_entry, kept, summed, beta2,
        BLOCK=triton.next_power_of_2(kept), num_warps=8,
    )  # fmt: skip
    _normuon_apply_kernel[triton.cdiv(cols, 256), triton.cdiv(rows, 16), matrices](
        direction, high.view(torch.int16), low, scale, lr, decay,
        per_entry, stride_entry, rows, cols,
        BY_ROW=by_row, BLOCK_ROWS=16, BLOCK_COLS=256, num_warps=8,
    )  # fmt: skip


def normuon_apply_(
    high: Tensor, low: Tensor | None, direction: Tensor, mean_square: Tensor, step_scale: Tensor,
    lr: Tensor, decay: Tensor, beta2: float,
) -> None:  # fmt: skip
    """Even out the rows of the polar factors at their old norm, and move the weights by them.

    high, and low int16 or None: a bank's matrices as in nesterov_. direction: (matrices, rows,
    cols). mean_square: fp32, (matrices, rows, 1), or (matrices, 1, cols) to even out columns.
    step_scale: fp32, (entries,), of the direction. lr, decay: 0-d. Changes high, low, mean_square.
    """
    if has_kernels(high.device) and low is not None:
        normuon_apply_kernel_(high, low, direction, mean_square, step_scale, lr, decay, beta2)
        return
    direction = direction.float()
    norm = direction.norm(dim=(1, 2), keepdim=True)
    across = 2 if mean_square.size(2) == 1 else 1
    mean_square.lerp_(direction.square().mean(dim=across, keepdim=True), 1 - beta2)
    direction = direction * mean_square.clamp_min(1e-12).rsqrt()
    direction = direction * (norm / direction.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12))
    direction = direction.view(high.shape) * step_scale[:, None, None, None]
    apply_update_(high, low, direction, lr, decay)


def normuon_update_(
    high: Tensor, low: Tensor | None, grad: Tensor, momentum: Tensor, mean_square: Tensor,
    step_scale: Tensor, mu: Tensor, beta2: float, lr: Tensor, decay: Tensor,
) -> None:  # fmt: skip
    """One step of NorMuon, in place, for a bank's matrices of one kind; see the ops it calls.

    Source: NorMuon, Li et al. 2025, arXiv 2510.05491, algorithm 1.
    """
    direction = polar_express(*nesterov_(grad, momentum, mu))
    normuon_apply_(high, low, direction, mean_square, step_scale, lr, decay, beta2)


def join_mantissa(high: Tensor, low: Tensor | None) -> Tensor:
    """fp32 weights from their upper 16 bits, a bf16 number, and their lower 16 bits, int16."""
    if low is None:
        return high.float()
    return ((high.view(torch.int16).int() << 16) | (low.int() & 0xFFFF)).view(torch.float32)


def split_mantissa_(high: Tensor, low: Tensor | None, weights: Tensor) -> None:
    """Store fp32 weights as join_mantissa reads them: exact, though the model reads bf16."""
    if low is None:
        high.copy_(weights)
    else:
        bits = weights.view(torch.int32)
        high.copy_((bits >> 16).short().view(torch.bfloat16))
        low.copy_(bits.short())  # keeps the lower 16 bits


def apply_update_(
    high: Tensor, low: Tensor | None, direction: Tensor, lr: float | Tensor, decay: float | Tensor
) -> None:
    """weights -= lr·direction, and decay·weights where that has the same sign (cautious decay)."""
    weights = join_mantissa(high, low)
    shrinks = direction * weights > 0
    split_mantissa_(high, low, weights - lr * direction - decay * weights * shrinks)


@triton.jit
def _adam_kernel(
    high, low, grad, mean, mean_square, numbers, count, beta_1: tl.constexpr, beta_2: tl.constexpr,
    eps: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    lr, decay = tl.load(numbers), tl.load(numbers + 1)
    correction_1, correction_2 = tl.load(numbers + 2), tl.load(numbers + 3)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(mean + at, mask=inside, other=0.0)
    m += (1 - beta_1) * (g - m)
    v = tl.load(mean_square + at, mask=inside, other=0.0)
    v += (1 - beta_2) * (g * g - v)
    tl.store(mean + at, m, mask=inside)
    tl.store(mean_square + at, v, mask=inside)
    direction = (m / correction_1) / (tl.sqrt(v / correction_2) + eps)
    _apply_update(high, low, at, inside, direction, lr, decay)


def adam_kernel_(
    high: Tensor, low: Tensor, grad: Tensor, mean: Tensor, mean_square: Tensor,
    betas: tuple[float, float], corrections: tuple[float, float], eps: float, lr: float,
    decay: float,
) -> None:  # fmt: skip
    """adam_update_ in one pass."""
    numbers = torch.tensor([lr, decay, *corrections])
    if high.is_cuda:
        numbers = numbers.pin_memory().to(high.device, non_blocking=True)
    _adam_kernel[(triton.cdiv(high.numel(), 1024),)](
        high.view(torch.int16), low, grad, mean, mean_square, numbers, high.numel(), *betas, eps,
        BLOCK=1024, num_warps=4,
    )  # fmt: skip


def adam_update_(
    high: Tensor, low: Tensor | None, grad: Tensor, mean: Tensor, mean_square: Tensor,
    betas: tuple[float, float] | tuple[Tensor, Tensor],
    corrections: tuple[float, float] | tuple[Tensor, Tensor], eps: float, lr: float | Tensor,
    decay: float | Tensor,
) -> None:  # fmt: skip
    """One step of Adam (Kingma & Ba 2015, algorithm 1), in place.

    betas, lr and decay are for all weights or one a weight. corrections: 1 - beta**t, both moments.
    """
    if has_kernels(high.device) and low is not None:
        adam_kernel_(high, low, grad, mean, mean_square, betas, corrections, eps, lr, decay)
        return
    grad = grad.float()
    mean.lerp_(grad, 1 - betas[0])
    mean_square.lerp_(grad.square(), 1 - betas[1])
    direction = (mean / corrections[0]) / ((mean_square / corrections[1]).sqrt() + eps)
    apply_update_(high, low, direction, lr, decay)


class ParamState:
    """What one rank keeps for one parameter: its rows, their low mantissa bits, and the moments."""

    def __init__(self, group: ParamGroup, param: nn.Parameter, config: Config, runtime: Runtime):
        self.group, self.param = group, param
        self.num_shards = runtime.world_size if group.sharded else 1
        rows = param.size(0) // self.num_shards
        if param.size(0) % self.num_shards:
            raise UserError(
                f"{group.name} has {param.size(0)} rows, which {self.num_shards} processes cannot "
                "share evenly: start a number of processes that divides them"
            )
        self.rank = runtime.rank if group.sharded else 0
        self.shard = param.detach()[self.rank * rows : (self.rank + 1) * rows]
        self.low = (
            torch.zeros_like(self.shard, dtype=torch.int16)
            if param.dtype == torch.bfloat16
            else None
        )
        self.mean = torch.zeros_like(self.shard, dtype=torch.float32)
        self.mean_squares: list[Tensor] = []
        # NorMuon: rows of a bank entry, rows of a matrix in them
        self.blocks: list[tuple[slice, int]] = []
        self.step_scales: list[Tensor] = []  # of each block, one an entry
        self.lr, self.weight_decay, self.betas = group.lr, group.weight_decay, group.betas
        if group.name == "small":
            rows = small_params(config).values()
            sizes = torch.tensor([math.prod(row.shape) for row in rows])

            def spread(numbers: Iterable[float]) -> Tensor:  # one a parameter to one a weight
                return torch.tensor(list(numbers)).repeat_interleave(sizes).to(param.device)

            self.lr = spread(row.lr for row in rows)
            self.weight_decay = spread(row.weight_decay for row in rows)
            self.betas = tuple(spread(row.betas[i] for row in rows) for i in range(2))
        if group.rule == "adam":
            self.mean_squares = [torch.zeros_like(self.mean)]
            return
        dim, (entries, height, width) = config.model_dim, self.shard.shape
        if group.name == "attention_bank":  # q and k in pairs of heads, v and o whole
            self.blocks = [(slice(0, 2 * dim), 2 * config.head_dim), (slice(2 * dim, 4 * dim), dim)]
            scales = torch.ones(entries)
        else:  # W_1 as it is, W_2 with twice the step
            self.blocks = [(slice(0, height), height)]
            index = torch.arange(entries) + self.rank * entries  # in the whole bank
            scales = torch.where(index < len(config.layers), 1.0, 2.0)
        for rows_of_entry, matrix_rows in self.blocks:
            count = entries * (rows_of_entry.stop - rows_of_entry.start) // matrix_rows
            shape = (count, matrix_rows, 1) if matrix_rows >= width else (count, 1, width)
            self.mean_squares.append(torch.zeros(shape, device=param.device))
            step_scale = scales * math.sqrt(max(1.0, matrix_rows / width))
            self.step_scales.append(step_scale.to(param.device))

    def tensors(self) -> list[Tensor]:
        return [
            tensor for tensor in (self.low, self.mean, *self.mean_squares) if tensor is not None
        ]


class Optimizer:
    """NorMuon and Adam over PARAM_GROUPS, the large parameters shared out over the ranks.

    A step reduce-scatters the gradients of a sharded parameter, updates this rank's rows and
    all-gathers the new rows; small parameters are all-reduced and updated everywhere. All
    collectives are asynchronous.
    """

    def __init__(self, model: GPT, config: Config, runtime: Runtime):
        self.model, self.config, self.runtime = model, config, runtime
        params = dict(model.named_parameters())
        assert params.keys() == {group.name for group in PARAM_GROUPS}, (
            "PARAM_GROUPS and GPT disagree"
        )
        self.states = [
            ParamState(group, params[group.name], config, runtime)
            for group in PARAM_GROUPS
            if params[group.name].numel() > 0
        ]

    @torch.no_grad()
    def split_embedding(self) -> None:
        """Make the embedding a matrix of its own, which starts as the head, Adam state included."""
        head, embed = (
            next(state for state in self.states if state.group.name == name)
            for name in ("head", "embed")
        )
        embed.param.copy_(head.param)
        # The head's gradient so far is also the embedding's: the update due next takes it for both.
        embed.param.grad.copy_(head.param.grad)
        for mine, heads in zip(embed.tensors(), head.tensors()):
            mine.copy_(heads)
        self.model.tied = False

    def tensors(self) -> list[Tensor]:
        """Every tensor a step changes, the parameters left out."""
        return [tensor for state in self.states for tensor in state.tensors()]

    @torch.no_grad()
    def step(self, step: int, lr_scale: float, momentum: float) -> None:
        """Update with the gradients in .grad, summed over ranks here. Parameters with every = 2
        keep theirs on even steps and are updated on odd ones."""
        due = [state for state in self.states if state.group.is_due(step, self.model.tied)]
        reductions = [self._launch_reduction(state) for state in due]
        if self.model.ngrams is not None:  # while these travel
            self.model.ngrams.update(self.config.ngram_lr * lr_scale, self.config.adam_eps)
        gathers = []
        for state, finish_reduction in reversed(list(zip(due, reductions))):
            self._update(state, finish_reduction(), step, lr_scale, momentum)
            state.param.grad.zero_()
            if state.num_shards > 1:
                gathers.append(
                    dist.all_gather_into_tensor(state.param.detach(), state.shard, async_op=True)
                )
        for work in gathers:
            work.wait()
        if self.model.fp8 is not None:
            self.model.fp8.refresh(any(state.group.name == "head" for state in due))

    def _launch_reduction(self, state: ParamState) -> Callable[[], Tensor]:
        """Start to sum a gradient over the ranks. The function returned waits for the sum and gives
        this rank's rows of it."""
        whole = state.param.grad
        if self.runtime.world_size == 1:
            return lambda: whole
        if state.num_shards == 1:
            part, work = whole, dist.all_reduce(whole, async_op=True)
        else:
            part = torch.empty_like(state.shard)
            work = dist.reduce_scatter_tensor(part, whole, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return part

        return finish

    def _update(
        self, state: ParamState, grad: Tensor, step: int, lr_scale: float, momentum: float
    ) -> None:
        config, group = self.config, state.group
        if group.rule == "adam":
            lr = config.adam_lr * lr_scale * state.lr
            decay = lr * lr * config.adam_weight_decay * state.weight_decay
            updates = (step + 1) // group.every
            corrections = tuple(1 - beta**updates for beta in state.betas)
            moments = state.mean, state.mean_squares[0]
            rates = state.betas, corrections, config.adam_eps, lr, decay
            adam_update_(state.shard, state.low, grad, *moments, *rates)
            return
        lr = config.muon_lr * group.lr * lr_scale
        decay = lr * lr * config.muon_weight_decay * group.weight_decay
        mu, lr, decay = (torch.full((), x, device=grad.device) for x in (momentum, lr, decay))
        for (rows, matrix_rows), mean_square, step_scale in zip(
            state.blocks, state.mean_squares, state.step_scales
        ):
            high, low, grads, mean = (
                None if bank is None else bank[:, rows].unflatten(1, (-1, matrix_rows))
                for bank in (state.shard, state.low, grad, state.mean)
            )
            normuon_update_(
                high, low, grads, mean, mean_square, step_scale, mu, config.muon_beta2, lr, decay
            )


@contextlib.contextmanager
def nothing_changes(model: GPT, optimizer: Optimizer) -> Iterator[None]:
    """At the end put every weight and optimizer state back, bit for bit, drop the gradients and
    forget what was read; n-grams start anew."""
    tied = model.tied
    tensors = [param.detach() for param in model.parameters()] + optimizer.tensors()
    copies = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, copy in zip(tensors, copies):
            tensor.copy_(copy)
        for param in model.parameters():
            param.grad.zero_()
        model.tied = tied
        if model.matches is not None:
            model.matches.fill_(-1)
        if model.ngrams is not None:
            model.ngrams.reset()
        if model.fp8 is not None:
            model.fp8.reset()


# ==================================================================================================
# 7. Data
# ==================================================================================================


def read_shard_header(path: str) -> int:
    """Number of tokens in a shard. Raises UserError unless header and file length agree."""
    header_bytes = 4 * SHARD_HEADER_INTS
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}): check --train_files and --val_file"
        ) from None
    remedy = "fetch it again with data/cached_fineweb.py or make it with data/tokenize_text.py"
    if len(header) < SHARD_HEADER_INTS:
        raise UserError(
            f"{path}: {size} bytes, shorter than a shard's header of {header_bytes}: {remedy}"
        )
    magic, version, num_tokens = (int(number) for number in header[:3])
    if magic != SHARD_MAGIC:
        raise UserError(
            f"{path}: not a token shard (magic {magic}, expected {SHARD_MAGIC}): {remedy}"
        )
    if version != SHARD_VERSION:
        raise UserError(f"{path}: shard version {version}, expected {SHARD_VERSION}: {remedy}")
    if size != header_bytes + 2 * num_tokens:
        expected = (
            f"{header_bytes + 2 * num_tokens} bytes for the {num_tokens} tokens of its header"
        )
        raise UserError(f"{path}: {size} bytes, expected {expected}: {remedy}")
    return num_tokens


def read_tokens(path: str, count: int, vocab_size: int) -> np.ndarray:
    """The first `count` tokens of a checked shard, uint16."""
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=4 * SHARD_HEADER_INTS)
    if len(tokens) and tokens.max() >= vocab_size:
        index = int(np.argmax(tokens >= vocab_size))
        raise UserError(
            f"{path}: token {tokens[index]} at position {index} is outside the vocabulary of "
            f"{vocab_size}: it needs GPT-2 tokens (data/tokenize_text.py makes them)"
        )
    return tokens


def find_files(option: str, pattern: str) -> list[str]:
    files = sorted(glob.glob(pattern))
    if not files:
        raise UserError(
            f"{option} {pattern}: no such file. Fetch FineWeb with data/cached_fineweb.py, make "
            "shards with data/tokenize_text.py, or the built-in sample with data/sample.py"
        )
    return files


class TokenStream:
    """The training shards as one stream of documents, read once, in order.

    Each row is a run of whole documents, cut at max_seq_len; the last one is cut so that the row
    holds exactly T + 1 tokens: T inputs and their next tokens. The next row begins with the next
    document. While one shard is used, the next one is loaded and its start tokens are found in the
    background.
    """

    def __init__(self, files: list[str], vocab_size: int, repeat: bool):
        self.files, self.vocab_size, self.repeat = files, vocab_size, repeat
        self.loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard")
        self.next_file = 0
        self.pending: Future | None = self._load_next()
        self.tokens = np.empty(0, dtype=np.uint16)
        self.starts = np.empty(0, dtype=np.int64)  # where the unread documents begin in tokens
        self._append_shard()

    def _load_next(self) -> Future | None:
        if self.next_file == len(self.files):
            if not self.repeat:
                return None
            self.next_file = 0
        path = self.files[self.next_file]
        self.next_file += 1
        return self.loader.submit(self._load, path)

    def _load(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        tokens = read_tokens(path, read_shard_header(path), self.vocab_size)
        starts = np.flatnonzero(tokens == START_TOKEN)
        if len(starts) == 0:
            raise UserError(
                f"{path}: no document begins in it (start token {START_TOKEN}): make it again with "
                "data/tokenize_text.py"
            )
        return tokens, starts

    def _append_shard(self) -> None:
        """Put the next shard behind the unread documents: the last one may go on in it."""
        assert self.pending is not None
        tokens, starts = self.pending.result()
        self.pending = self._load_next()
        first = self.starts[0] if len(self.starts) else len(self.tokens)
        rest = self.tokens[first:]
        self.tokens = np.concatenate([rest, tokens])
        self.starts = np.concatenate([self.starts - first, starts + len(rest)])

    def next_row(self, num_tokens: int, max_seq_len: int) -> list[np.ndarray]:
        """Documents of the next row, num_tokens + 1 tokens in all; UserError at the end."""
        while True:
            ends = self.starts[1 : num_tokens + 2]
            if self.pending is None and len(ends) < num_tokens + 1:
                # the last document ends with the stream
                ends = np.append(ends, len(self.tokens))
            begins = self.starts[: len(ends)]
            lengths = np.minimum(ends - begins, max_seq_len)
            filled = np.cumsum(lengths)
            if len(filled) and filled[-1] > num_tokens:
                break
            if self.pending is None:
                raise UserError(
                    "--train_files: the training data ran out before the schedule did: add shards "
                    "(data/cached_fineweb.py), lower --num_steps, or pass --repeat_data true"
                )
            self._append_shard()
        count = int(np.searchsorted(filled, num_tokens, side="right")) + 1
        lengths = lengths[:count].copy()
        lengths[-1] -= filled[count - 1] - (num_tokens + 1)
        self.starts = self.starts[count:]
        return [self.tokens[begin : begin + length] for begin, length in zip(begins, lengths)]


def make_batch(
    tokens: np.ndarray, starts: np.ndarray, max_seq_len: int, min_mean_doc_len: int, pin: bool
) -> Batch:
    """Batch of T + 1 tokens and the positions where their documents start."""
    num_tokens = len(tokens) - 1
    length = num_tokens // min_mean_doc_len + 2
    starts = starts[starts < num_tokens]
    if len(starts) >= length:
        raise UserError(
            f"a row of {num_tokens} tokens holds {len(starts)} documents, more than the "
            f"{length - 1} that cu_seqlens has room for: set --min_mean_doc_len "
            f"below {min_mean_doc_len}"
        )
    cu_seqlens = np.full(length, num_tokens, dtype=np.int32)
    cu_seqlens[: len(starts)] = starts
    batch = (
        torch.from_numpy(tokens[:-1].astype(np.int32)),
        torch.from_numpy(tokens[1:].astype(np.int64)),
        torch.from_numpy(cu_seqlens),
    )
    if pin:  # torch keeps pinned buffers and reuses one only when the copy out of it is done
        batch = tuple(tensor.pin_memory() for tensor in batch)
    return Batch(*batch, max_seq_len)


def training_rows(
    config: Config, rank: int, world_size: int, shapes: Iterable[tuple[int, int]], pin: bool
) -> Iterator[Batch]:
    """This rank's rows, one of every world_size. shapes: (T, max_seq_len) of each micro-step."""
    files = find_files("--train_files", config.train_files)
    # what is read twice could be foretold
    stream = TokenStream(files, config.vocab_size, config.repeat_data and not config.match_orders)
    for num_tokens, max_seq_len in shapes:
        for owner in range(world_size):
            documents = stream.next_row(num_tokens, max_seq_len)
            if owner == rank:
                starts = np.cumsum([0] + [len(document) for document in documents[:-1]])
                yield make_batch(
                    np.concatenate(documents), starts, max_seq_len, config.min_mean_doc_len, pin
                )


def prefix_table() -> str:
    """The table beside this script, or, for a copy of the script alone, the link to it in data/."""
    beside = Path(__file__).with_name(PREFIX_TABLE)
    return str(beside) if beside.exists() else f"data/{PREFIX_TABLE}"


def read_prefixes(config: Config, device: torch.device) -> Tensor:
    """The longest other token that each token's bytes begin with, or IGNORED_TARGET; (vocab,)."""
    path = config.prefix_file or prefix_table()
    padded = np.full(config.padded_vocab_size, IGNORED_TARGET, np.int64)
    remedy = "make it again with records/reference/prefix_tokens.py"
    try:
        table = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--prefix_file {path}: cannot be read ({error}): {remedy}") from None
    if not isinstance(table, np.ndarray) or table.ndim != 1 or table.dtype != np.int32:
        raise UserError(f"--prefix_file {path}: is no list of int32: {remedy}")
    if not 0 < len(table) <= len(padded):
        raise UserError(f"--prefix_file {path}: {len(table)} tokens, not {len(padded)}: {remedy}")
    if table.min() < IGNORED_TARGET or table.max() >= len(table):
        raise UserError(f"--prefix_file {path}: holds ids outside the vocabulary: {remedy}")
    padded[: len(table)] = table
    return torch.from_numpy(padded).to(device)


def check_data(config: Config, tokens_needed: int) -> int:
    """Look at every header first; returns the number of targets that validation scores."""
    total = sum(read_shard_header(path) for path in find_files("--train_files", config.train_files))
    if total <= tokens_needed and not config.repeat_data:
        raise UserError(
            f"--train_files {config.train_files}: {total} tokens, but the schedule reads at least "
            f"{tokens_needed}: add shards (data/cached_fineweb.py), lower --num_steps, or pass "
            "--repeat_data true"
        )
    if config.match_orders and not tokens_needed < min(total, 2**31):
        raise UserError(
            f"--match_orders: the schedule reads {tokens_needed} tokens, more than the {total} of "
            "--train_files or than 2^31: matches would foretell what is repeated; add shards or "
            "lower --num_steps"
        )
    path = find_files("--val_file", config.val_file)[0]
    available = read_shard_header(path) - 1
    if available < 1:
        raise UserError(f"{path}: too short to validate on: make a longer one")
    return min(config.val_tokens, available)


def validation_rows(
    config: Config, rank: int, world_size: int, num_targets: int
) -> Iterator[Batch]:
    """This rank's rows of the validation stream as it is; every target once, documents masked."""
    path = find_files("--val_file", config.val_file)[0]
    tokens = read_tokens(path, num_targets + 1, config.vocab_size)
    size = config.val_row_tokens
    for index in range(rank, -(-num_targets // size), world_size):
        row = tokens[index * size : (index + 1) * size + 1]
        real = len(row) - 1
        padding = np.full(size - real, START_TOKEN, dtype=row.dtype)  # of the last row
        row = np.concatenate([row, padding])
        starts = np.flatnonzero(row[: min(real + 1, size)] == START_TOKEN)
        batch = make_batch(
            row, np.union1d([0], starts), size, min(config.min_mean_doc_len, 32), pin=False
        )
        batch.targets[real:] = IGNORED_TARGET
        yield batch


class Prefetcher:
    """Runs an iterator in a thread, a few items ahead, and hands on what it raises."""

    def __init__(self, items: Iterator, depth: int = 8):
        self.queue: queue.Queue = queue.Queue(depth)
        self.stopped = threading.Event()
        threading.Thread(target=self._fill, args=(items,), name="prefetch", daemon=True).start()

    def _put(self, item: object) -> None:
        while not self.stopped.is_set():
            with contextlib.suppress(queue.Full):
                return self.queue.put(item, timeout=0.1)

    def _fill(self, items: Iterator) -> None:
        try:
            for item in items:
                self._put(item)
                if self.stopped.is_set():
                    return
            self._put(StopIteration())
        except Exception as error:  # noqa: BLE001 (raised again where the item is taken)
            self._put(error)

    def __next__(self) -> Batch:
        item = self.queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def stop(self) -> None:
        self.stopped.set()


def to_device(batch: Batch, device: torch.device) -> Batch:
    tensors = (tensor.to(device, non_blocking=True) for tensor in batch[:3])
    return Batch(*tensors, batch.max_seq_len)


# ==================================================================================================
# 8. Schedule
# ==================================================================================================


@dataclass(frozen=True)
class StepPlan:
    """What one step does."""

    stage: Stage
    lr_scale: float
    momentum: float
    tied: bool  # embedding and head are one matrix

    @property
    def windows(self) -> Windows:
        return Windows(self.stage.window_short, self.stage.window_long)


class Schedule:
    """The stages laid out over the steps."""

    def __init__(self, config: Config):
        self.config = config
        self.total_steps = config.num_steps + config.extension_steps
        self.end_step = min(config.stop_step or self.total_steps, self.total_steps)
        edges = np.cumsum([stage.share for stage in config.stages])
        self.stage_ends = [round(float(edge) * config.num_steps) for edge in edges]

    def stage(self, step: int) -> Stage:
        for end, stage in zip(self.stage_ends, self.config.stages):
            if step < end:
                return stage
        return self.config.extension[0]

    def lr_scale(self, step: int) -> float:
        """The stage's multiplier, falling linearly to lr_end from lr_decay_start on."""
        config, stage = self.config, self.stage(step)
        left = max(0.0, 1 - step / config.num_steps) / (1 - config.lr_decay_start)
        return stage.lr if left >= 1 else stage.lr * left + config.lr_end * (1 - left)

    def momentum(self, step: int) -> float:
        """Linear warm-up, plateau, linear cool-down over the last steps."""
        config = self.config
        up = step / config.momentum_warmup_steps
        down = (
            (self.total_steps - step) / config.momentum_cooldown_steps
            if config.momentum_cooldown_steps
            else 1
        )
        return config.momentum_start + min(up, down, 1.0) * (
            config.momentum_peak - config.momentum_start
        )

    def __getitem__(self, step: int) -> StepPlan:
        tied = step < round(self.config.tied_share * self.config.num_steps)
        return StepPlan(self.stage(step), self.lr_scale(step), self.momentum(step), tied)

    def loss_weights(self) -> list[list[float]]:
        """Weights of next, second, third and prefix token for every step, linear in a stage."""
        rows, begin = [], 0
        ends = [*self.stage_ends, self.total_steps]
        for end, stage in zip(ends, (*self.config.stages, *self.config.extension)):
            for step in range(begin, end):
                done = (step - begin) / (end - begin)
                pairs = (stage.second_start, stage.second_end), (stage.third_start, stage.third_end)
                pairs += ((stage.prefix_start, stage.prefix_end),)
                rows.append([1.0] + [start + done * (stop - start) for start, stop in pairs])
            begin = end
        return rows

    def row_tokens(self, step: int) -> int:
        return self.stage(step).tokens_per_step // self.config.rows_per_step

    def tokens_needed(self) -> int:
        return sum(self.stage(step).tokens_per_step for step in range(self.end_step))


# ==================================================================================================
# 9. Train and validate
# ==================================================================================================


class Clock:
    """Training time in seconds; validation stops it."""

    def __init__(self, runtime: Runtime):
        self.runtime, self.total = runtime, 0.0
        self.started: float | None = None

    def start(self) -> None:
        self.runtime.synchronize()
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.runtime.synchronize()
        self.total, self.started = self.now(), None

    def now(self) -> float:
        return self.total + (0.0 if self.started is None else time.perf_counter() - self.started)


class Progress:
    """Reports steps as they complete on the device, without waiting for the one just launched.

    The loss of a step is copied to pinned memory behind the step's own work; it is read a few steps
    later, which also keeps the host from running further ahead than that.
    """

    MAX_IN_FLIGHT = 3

    def __init__(self, runtime: Runtime, clock: Clock, total_steps: int):
        from tqdm import tqdm

        self.runtime, self.clock = runtime, clock
        self.pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self.last_time = 0.0
        self.bar = tqdm(
            total=total_steps,
            disable=None if runtime.is_main else True,  # None: only on a terminal
            bar_format="{desc}{bar} step {n_fmt}/{total_fmt}{postfix} · {remaining} left",
            dynamic_ncols=True,
        )

    def launched(self, step: int, loss: Tensor) -> None:
        """loss: mean training loss of this rank's tokens, a scalar on the device."""
        event = None
        if loss.device.type == "cuda":
            loss, event = loss.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self.pending.append((step, loss, event))
        while self.pending and (
            len(self.pending) > self.MAX_IN_FLIGHT
            or self.pending[0][2] is None
            or self.pending[0][2].query()
        ):
            self._report()

    def drain(self) -> None:
        while self.pending:
            self._report()

    def _report(self) -> None:
        step, loss, event = self.pending.popleft()
        if event is not None:
            event.synchronize()
        now, value = self.clock.now(), loss.item()
        if not math.isfinite(value):
            raise UserError(
                f"the training loss is {value} at step {step + 1} (rank {self.runtime.rank}): "
                "lower --muon_lr or --adam_lr, check the data of --train_files, or raise the "
                "columns of --stages if rows have more different targets than that"
            )
        step_ms, self.last_time = 1000 * (now - self.last_time), now
        self.runtime.log.step(step + 1, value, now, step_ms)
        self.bar.set_postfix_str(
            f"loss {value:.3f} · {1000 * now / (step + 1):.1f} ms/step", refresh=False
        )
        self.bar.update()


class MicroStep:
    """Forward and backward pass of one row, added to the gradients; on a GPU a CUDA graph.

    A replay costs the host one launch in place of a thousand. Every kind of row (length, windows,
    tied or not) has its graph and its own buffers for inputs; their memory is shared.
    """

    def __init__(self, model: GPT, prefixes: Tensor, config: Config, runtime: Runtime):
        self.model, self.prefixes, self.config = model, prefixes, config
        self.first_row_tokens = config.stages[0].tokens_per_step // config.rows_per_step
        self.uses_graphs = config.cuda_graphs and runtime.device.type == "cuda"
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        if self.uses_graphs:  # memory is shared by graphs of one pool and one stream
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def kind(self, batch: Batch, windows: Windows, columns: int) -> tuple:
        """What a graph is captured for."""
        return len(batch.tokens), batch.max_seq_len, windows, columns, self.model.tied

    def compute(
        self, batch: Batch, windows: Windows, loss_weights: Tensor, columns: int = 0
    ) -> Tensor:
        loss, next_token_loss = self.model(batch, windows, loss_weights, self.prefixes, columns)
        # summed over tokens, averaged over ranks and micro-steps
        # a sum over tokens, of which later stages have more
        scale = self.first_row_tokens / len(batch.tokens) if self.config.even else 1.0
        (loss * scale / self.config.rows_per_step).backward()
        return next_token_loss

    def __call__(
        self, batch: Batch, windows: Windows, loss_weights: Tensor, columns: int = 0
    ) -> Tensor:
        """The sum of next-token losses, fp32, valid until the next call."""
        if not self.uses_graphs:
            batch = to_device(batch, loss_weights.device)
            loss = self.compute(batch, windows, loss_weights, columns)
        else:
            kind = self.kind(batch, windows, columns)
            if kind not in self.graphs:
                raise RuntimeError(f"no graph was captured for rows of {kind}")
            graph, inputs, loss = self.graphs[kind]
            for mine, given in zip(inputs, (*batch[:3], loss_weights)):
                mine.copy_(given, non_blocking=True)
            graph.replay()
        if self.model.ngrams is not None:  # before the next row's gradients take this one's place
            self.model.ngrams.gather(len(batch.tokens))
        return loss

    def capture(
        self, batch: Batch, windows: Windows, loss_weights: Tensor, columns: int = 0
    ) -> None:
        """Make the graph for rows like this one; changes the gradients."""
        batch = to_device(batch, loss_weights.device)
        inputs = [tensor.clone() for tensor in (*batch[:3], loss_weights)]
        mine = Batch(*inputs[:3], batch.max_seq_len)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # compiles kernels, makes workspaces
            self.compute(mine, windows, inputs[3], columns)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph keeps memory of its own
        graph = torch.cuda.CUDAGraph()
        # other threads, such as NCCL's, may do what a capture forbids
        how = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, **how):
            loss = self.compute(mine, windows, inputs[3], columns)
        self.graphs[self.kind(batch, windows, columns)] = graph, inputs, loss


def compile_kernels(
    model: GPT,
    optimizer: Optimizer,
    micro_step: MicroStep,
    batch: Batch,
    windows: Windows,
    loss_weights: Tensor,
    columns: int,
    runtime: Runtime,
) -> None:
    """Run every kernel once on a short row; changes weights and gradients.

    Each rank begins at another place of the round and finds in the cache on disk what the others
    have compiled by then.
    """
    config, count = model.config, len(batch.tokens)
    batch = to_device(batch, runtime.device)

    def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=runtime.device, dtype=dtype, requires_grad=True)

    x = noise(count, config.model_dim, dtype=model.head.dtype)
    layouts = model.gate_layouts.values()
    gates = {name: noise(count, size) for row in layouts for name, (size, _) in row.items()}

    # flash-attn-4 has a kernel of its own for more than 256 documents, as long rows have room for
    many = batch._replace(cu_seqlens=F.pad(batch.cu_seqlens, (0, 256), value=count))

    def run_attention(i: int, batch: Batch) -> None:
        row, extra = config.layers[i], (None, None)
        if i == len(config.layers) - 1:
            extra = noise(count, config.num_heads), x
        value = None if row.value_table is None else x
        model.attend(i, x, value, *extra, gates, batch, windows).sum().backward()

    def run_update(state: ParamState) -> None:
        optimizer._update(state, torch.zeros_like(state.shard), 1, 1.0, 0.9)

    def run_ngram_update() -> None:
        ngrams = model.ngrams
        rows, grads = sort_rows(ngrams.own_rows[:count]), ngrams.own_grads[:count]
        update_ngrams_(ngrams.table, ngrams.sum_squares, rows, grads, 1.0, config.adam_eps)

    attentions = itertools.product(model.attention_layers, (batch, many))
    round_trip = [functools.partial(run_attention, *attention) for attention in attentions]
    round_trip.append(lambda: micro_step.compute(batch, windows, loss_weights, columns))
    round_trip += [functools.partial(run_update, state) for state in optimizer.states]
    if model.ngrams is not None:
        round_trip.append(run_ngram_update)
    start = runtime.rank * len(round_trip) // runtime.world_size
    for run in round_trip[start:] + round_trip[:start]:
        run()


def prepare(
    model: GPT,
    optimizer: Optimizer,
    micro_step: MicroStep,
    schedule: Schedule,
    loss_weights: Tensor,
    runtime: Runtime,
) -> None:
    """Compile, capture and warm up on every shape with random tokens, then put everything back."""
    config, begin = model.config, time.perf_counter()
    kinds = {}  # the last step of every kind of row
    for step in range(schedule.end_step):
        plan = schedule[step]
        stage = plan.stage
        kinds[stage.tokens_per_step, stage.max_seq_len, stage.columns, *plan.windows, plan.tied] = (
            step
        )
    random = np.random.default_rng(runtime.rank)

    def random_batch(num_tokens: int, max_seq_len: int) -> Batch:
        tokens = random.integers(0, START_TOKEN, num_tokens + 1).astype(np.uint16)
        starts = np.arange(0, num_tokens, max_seq_len)
        return make_batch(tokens, starts, max_seq_len, config.min_mean_doc_len, False)

    def report(what: str) -> None:
        runtime.synchronize()
        runtime.log.line(f"prepared {what} · {time.perf_counter() - begin:.1f} s")

    with nothing_changes(model, optimizer):
        if micro_step.uses_graphs:
            plan = schedule[0]
            row = random_batch(256, 256), plan.windows, loss_weights[0], plan.stage.columns
            compile_kernels(model, optimizer, micro_step, *row, runtime)
            report("kernels")
        for last in kinds.values():
            plan, num_tokens = schedule[last], schedule.row_tokens(last)
            if model.tied and not plan.tied:
                optimizer.split_embedding()
            batch = random_batch(num_tokens, plan.stage.max_seq_len)
            row = batch, plan.windows, loss_weights[last], plan.stage.columns
            if micro_step.uses_graphs:
                micro_step.capture(*row)
            for step in range(2):  # an even and an odd one, so that every update runs
                micro_step(*row)
                if model.matches is not None:
                    note_rows(model, [batch], 0, runtime)
                optimizer.step(step, plan.lr_scale, plan.momentum)
            head = "tied" if plan.tied else "untied"
            report(f"rows of {num_tokens:,} tokens, windows {plan.windows}, head {head}")
        with torch.no_grad():
            batch = random_batch(config.val_row_tokens, config.val_row_tokens)
            model(to_device(batch, runtime.device), plan.windows)
        report(f"validation rows of {config.val_row_tokens:,} tokens")


@torch.no_grad()
def note_rows(model: GPT, rows: list[Batch], position: int, runtime: Runtime) -> int:
    """Enter the rows that all ranks read in a step, from `position` of the stream on, in what the
    model can match. Later steps see them, this one did not. Gives the position behind them."""
    for row in rows:
        row = to_device(row, runtime.device)
        starts = document_starts(row.cu_seqlens, len(row.tokens))
        own = torch.stack([row.tokens, starts, row.targets.int()])
        everyone = own[None]
        if runtime.world_size > 1:
            everyone = own.new_empty(runtime.world_size, *own.shape)
            dist.all_gather_into_tensor(everyone.flatten(0, 1), own)
        for tokens, starts, targets in everyone:
            note_matches_(
                model.matches, tokens, starts, targets, model.config.match_orders, position
            )
            position += len(tokens)
    return position


def run_step(
    step: int, plan: StepPlan, loss_weights: Tensor, rows: Iterator[Batch], position: int,
    micro_step: MicroStep, optimizer: Optimizer, runtime: Runtime,
) -> tuple[Tensor, int]:  # fmt: skip
    """Train on this rank's next rows; gives the mean of their next-token losses, 0-d, and the next
    step's position.

    loss_weights: (4,), as GPT.forward takes them. position: of the step's first row in the stream;
    it moves only where matches are noted.
    """
    model, read = micro_step.model, []
    if model.tied and not plan.tied:
        optimizer.split_embedding()
    grad_accum_steps = model.config.rows_per_step // runtime.world_size
    train_loss = torch.zeros((), device=runtime.device)
    for _ in range(grad_accum_steps):
        row = next(rows)
        loss = micro_step(row, plan.windows, loss_weights, plan.stage.columns)
        train_loss += loss / (len(row.tokens) * grad_accum_steps)
        read.append(row)
    optimizer.step(step, plan.lr_scale, plan.momentum)
    if model.matches is not None:
        position = note_rows(model, read, position, runtime)
    return train_loss, position


@torch.no_grad()
def validate(
    model: GPT, config: Config, runtime: Runtime, num_targets: int, windows: Windows
) -> float:
    """Mean cross-entropy in nats over the first `num_targets` targets of the validation file."""
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for batch in validation_rows(config, runtime.rank, runtime.world_size, num_targets):
        total += model(to_device(batch, runtime.device), windows)
    loss = runtime.all_reduce(total).item() / num_targets
    if not math.isfinite(loss):
        raise UserError(f"the validation loss is {loss}: lower --muon_lr or --adam_lr")
    return loss


def train(config: Config, runtime: Runtime) -> None:
    log, schedule = runtime.log, Schedule(config)
    num_targets = check_data(config, schedule.tokens_needed())
    folder = Path(config.checkpoint).parent
    if config.checkpoint and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(
            f"--checkpoint {config.checkpoint}: cannot be written, {folder} is no writable folder"
        )
    log.data |= {"environment": describe_environment(runtime), "config": config_as_text(config)}
    log.line(SOURCE + "=" * 100, screen=False)
    log.line(
        json.dumps({key: log.data[key] for key in ("environment", "config")}, indent=1),
        screen=False,
    )
    environment = log.data["environment"]
    hardware = f"{runtime.world_size} x {environment['devices']}"
    log.line(f"{hardware}, torch {environment['torch']}, log {log.path}")
    if num_targets < config.val_tokens:
        wanted = f"not {config.val_tokens:,}"
        log.line(f"validation scores {num_targets:,} targets, all that --val_file has, {wanted}")

    begin = time.perf_counter()
    model = GPT(config, runtime)
    optimizer = Optimizer(model, config, runtime)
    millions = sum(param.numel() for param in model.parameters()) / 1e6
    kernels = "Triton kernels" if has_kernels(runtime.device) else "plain PyTorch"
    dtype = f"MLP and head in fp8, the rest in {config.dtype}" if model.fp8 else config.dtype
    log.line(f"{millions:.1f} M parameters, {len(config.layers)} layers")
    log.line(f"{kernels}, {dtype}, attention by {model.backend}")
    if model.ngrams is not None:
        rows, dim = model.ngrams.table.shape
        log.line(f"{rows:,} hashed rows of n-grams, {dim} wide: {rows * dim / 1e6:.1f} M numbers")
    loss_weights = torch.tensor(schedule.loss_weights(), device=runtime.device)
    prefixes = read_prefixes(config, runtime.device)
    micro_step = MicroStep(model, prefixes, config, runtime)
    prepare(model, optimizer, micro_step, schedule, loss_weights, runtime)
    preparation = time.perf_counter() - begin

    grad_accum_steps = config.rows_per_step // runtime.world_size
    shapes = (
        (schedule.row_tokens(step), schedule.stage(step).max_seq_len)
        for step in range(schedule.end_step)
        for _ in range(grad_accum_steps)
    )
    pin = runtime.device.type == "cuda"
    rows = Prefetcher(training_rows(config, runtime.rank, runtime.world_size, shapes, pin))
    clock = Clock(runtime)
    progress = Progress(runtime, clock, schedule.end_step)
    position = 0  # in the stream, of the rows of all ranks
    averages = {8: {}, 24: {}}
    clock.start()
    for step in range(schedule.end_step):
        plan = schedule[step]
        now = step, plan, loss_weights[step], rows, position
        train_loss, position = run_step(*now, micro_step, optimizer, runtime)
        with torch.no_grad():
            for horizon in averages if config.average else ():
                left = schedule.end_step - step
                if left <= 3 * horizon:
                    for name, param in model.named_parameters():
                        if name not in averages[horizon]:
                            averages[horizon][name] = param.detach().clone().float()
                        else:
                            averages[horizon][name].lerp_(param.detach().float(), 1 / horizon)
        progress.launched(step, train_loss)

        done = step + 1
        if done == schedule.end_step or (config.val_every and done % config.val_every == 0):
            clock.stop()
            progress.drain()
            windows = plan.windows
            if done == schedule.total_steps:
                windows = windows._replace(long=config.final_window_long)
            val_loss = validate(model, config, runtime, num_targets, windows)
            log.data["validations"].append(
                {"step": done, "val_loss": val_loss, "train_time_s": clock.total}
            )
            log.line(f"step {done} val_loss {val_loss:.4f} train_time {clock.total:.3f} s")
            if done == schedule.end_step and config.average:
                params, last = dict(model.named_parameters()), {}
                with torch.no_grad():
                    for name, param in params.items():
                        last[name] = param.detach().clone()
                    for horizon, average in averages.items():
                        for name, param in params.items():
                            param.copy_(average[name])
                        value = validate(model, config, runtime, num_targets, windows)
                        log.line(f"average of {horizon} steps: val_loss {value:.4f}")
                    for name, param in params.items():
                        param.copy_(last[name])
            clock.start()
    progress.bar.close()
    rows.stop()

    peak = peak_memory(runtime)
    tokens_per_second = schedule.tokens_needed() / clock.total
    log.data["summary"] = {
        "val_loss": val_loss,
        "steps": done,
        "train_time_s": clock.total,
        "mean_step_ms": 1000 * clock.total / done,
        "tokens_per_s": tokens_per_second,
        "preparation_s": preparation,
        "peak_memory_gib": peak,
    }
    log.write_json()
    log.line(f"val loss {val_loss:.4f} after {done} steps, on {num_targets:,} targets")
    log.line(
        f"trained {clock.total:.2f} s, {1000 * clock.total / done:.1f} ms a step, "
        f"{tokens_per_second:,.0f} tokens/s, after {preparation:.0f} s of preparation; "
        f"peak memory {peak:.1f} GiB a process"
    )
    if runtime.is_main:
        log.line(f"log {log.path}, curve {draw_curve(log)}")
    if config.checkpoint:
        save_checkpoint(model, config, runtime)


def peak_memory(runtime: Runtime) -> float:
    """GiB: the most any rank's allocator held on its GPU, or any process resident on the CPU."""
    if runtime.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(runtime.device)
    else:
        import resource

        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks = torch.zeros(runtime.world_size, dtype=torch.float64, device=runtime.device)
    peaks[runtime.rank] = peak / 2**30
    return runtime.all_reduce(peaks).max().item()


def draw_curve(log: Log) -> Path:
    """Training and validation loss against steps, as a PNG beside the log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    steps, validations = log.data["steps"], log.data["validations"]
    axes.plot(
        [row["step"] for row in steps],
        [row["train_loss"] for row in steps],
        color="0.7",
        linewidth=0.8,
        label="training (rows of rank 0)",
    )
    val_steps, val_losses = (
        [row["step"] for row in validations],
        [row["val_loss"] for row in validations],
    )
    axes.plot(val_steps, val_losses, "o-", color="C0", label="validation")
    labelled = math.inf
    for step, loss in reversed(list(zip(val_steps, val_losses))):
        if labelled - step > 0.06 * val_steps[-1]:  # room for its label
            offset = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{loss:.3f}", (step, loss), **offset)
            labelled = step
    losses = sorted([row["train_loss"] for row in steps] + val_losses)
    top = losses[int(0.97 * (len(losses) - 1))]  # leaves the first steps' fall out of the picture
    axes.set_ylim(
        losses[0] - 0.05 * (top - losses[0]) - 0.02, top + 0.05 * (top - losses[0]) + 0.02
    )
    summary = log.data["summary"]
    axes.set_title(
        f"{log.path.stem}: {summary['val_loss']:.4f} in {summary['train_time_s']:.1f} s",
        fontsize=10,
    )
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = log.path.with_suffix(".png")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def byte_token_ids() -> list[int]:
    """GPT-2's token of each single byte: printable bytes come first in its vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    return [order.index(byte) for byte in range(256)]


def save_checkpoint(model: GPT, config: Config, runtime: Runtime) -> None:
    """Weights, config, and whether the training text was cut in bytes (then so are prompts)."""
    if not runtime.is_main:
        return
    head = read_tokens(
        find_files("--train_files", config.train_files)[0], 100_000, config.vocab_size
    )
    byte_tokens = bool(((head < 256) | (head == START_TOKEN)).all())
    weights = {name: param.detach().cpu() for name, param in model.named_parameters()}
    if model.tied:
        weights["embed"] = weights["head"]
    if model.matches is not None:
        weights["matches"] = model.matches.cpu()
    if model.ngrams is not None:
        weights["ngrams"] = model.ngrams.table.cpu()
    temporary = f"{config.checkpoint}.part"
    try:
        torch.save(
            {"config": config_as_text(config), "weights": weights, "byte_tokens": byte_tokens},
            temporary,
        )
        os.replace(temporary, config.checkpoint)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--checkpoint {config.checkpoint}: cannot be written ({error}): choose another"
        ) from None
    runtime.log.line(f"weights saved in {config.checkpoint}")


@torch.no_grad()
def continue_text(config: Config, runtime: Runtime) -> None:
    """Load --checkpoint and print --sample with its continuation."""
    if not config.checkpoint:
        raise UserError(
            "--sample needs --checkpoint FILE, the weights that a training run saved there"
        )
    if runtime.world_size > 1:
        raise UserError(
            f"--sample runs in one process, not in {runtime.world_size}: start it with python"
        )
    try:
        saved = torch.load(config.checkpoint, map_location=runtime.device, weights_only=True)
        trained = config_from_text(saved["config"] | {"compile": "none"})
        weights, byte_tokens = saved["weights"], saved["byte_tokens"]
    except OSError as error:
        raise UserError(
            f"--checkpoint {config.checkpoint}: cannot be read ({error.strerror})"
        ) from None
    except Exception:  # noqa: BLE001 (whatever the file does to the unpickler)
        raise UserError(
            f"--checkpoint {config.checkpoint}: not a checkpoint of this script: make one with "
            "--checkpoint in a training run"
        ) from None
    model = GPT(trained, runtime)
    for name, param in model.named_parameters():
        rows = min(len(param), len(weights[name]))  # banks are padded to the number of ranks
        param[:rows] = weights[name][:rows]
    if model.matches is not None:
        model.matches.copy_(weights["matches"])
    if model.ngrams is not None:
        model.ngrams.table.copy_(weights["ngrams"])
    model.tied = False

    ids = byte_token_ids()
    if byte_tokens:
        tokens = [ids[byte] for byte in config.sample.encode()]
    else:
        import tiktoken

        try:
            tokenizer = tiktoken.get_encoding("gpt2")
        except Exception as error:  # noqa: BLE001 (whatever the missing network makes it raise)
            raise UserError(f"--sample needs GPT-2's vocabulary, and tiktoken: {error}") from None
        tokens = tokenizer.encode_ordinary(config.sample)
    tokens = [START_TOKEN, *tokens]
    prompt_length = len(tokens)
    generator = torch.Generator(runtime.device).manual_seed(config.seed)
    windows = Windows(trained.extension[0].window_short, trained.final_window_long)
    context = trained.val_row_tokens
    while len(tokens) < prompt_length + config.sample_tokens:
        row = torch.tensor(tokens[-context:], dtype=torch.int32, device=runtime.device)
        ends = torch.tensor([0, len(row)], dtype=torch.int32, device=runtime.device)
        x = model.hidden(Batch(row, row.long(), ends, len(row)), windows)
        logits = softcap(F.linear(x[-1], model.head))[: trained.vocab_size]
        if config.temperature > 0:
            probabilities = (logits / config.temperature).softmax(dim=-1)
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == START_TOKEN:  # the document has ended
            break
        tokens.append(token)
    if byte_tokens:
        byte_of = {token: byte for byte, token in enumerate(ids)}
        text = bytes(byte_of.get(token, ord("?")) for token in tokens[1:]).decode(errors="replace")
    else:
        text = tokenizer.decode(tokens[1:])
    print(text)


# ==================================================================================================
# 10. Command line
# ==================================================================================================


def parse_value(kind: object, text: str) -> object:
    """The value of an option or of a table's field from text; ValueError when it cannot be read."""
    rows_of = next((row for row in (Stage, Layer) if kind == tuple[row, ...]), None)
    if rows_of is not None:
        hints = typing.get_type_hints(rows_of)
        table = []
        for row in text.split(","):
            fields = row.strip().split(":")
            if len(fields) != len(hints):
                raise ValueError(
                    f"row {row.strip()!r} has {len(fields)} fields, not {':'.join(hints)}"
                )
            table.append(rows_of(*map(parse_value, hints.values(), fields)))
        return tuple(table)
    if kind == tuple[int, ...]:
        return tuple(int(number) for number in text.split(":") if number != "none")
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{text!r} is neither true nor false")
        return text.lower() == "true"
    if kind == int | None:
        return None if text == "none" else int(text)
    return float(Fraction(text)) if kind is float else kind(text)


def format_value(value: object) -> str:
    """The inverse of parse_value."""
    if isinstance(value, tuple) and all(isinstance(number, int) for number in value):
        return ":".join(map(str, value)) or "none"
    if isinstance(value, tuple):
        return ", ".join(":".join(map(format_value, dataclasses.astuple(row))) for row in value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def config_as_text(config: Config) -> dict[str, str]:
    """Every field as it would be written on the command line."""
    return {name: format_value(value) for name, value in vars(config).items()}


def config_from_text(fields: dict[str, str]) -> Config:
    kinds = typing.get_type_hints(Config)
    return Config(**{name: parse_value(kinds[name], text) for name, text in fields.items()})


def parse_args(arguments: list[str] | None = None) -> Config:
    """Config from the command line; exits with code 2 and a message on what it cannot read."""

    class Parser(argparse.ArgumentParser):
        def _print_message(self, message: str, file=None) -> None:
            if os.environ.get("RANK", "0") == "0":  # once, not once a process
                super()._print_message(message, file)

    def reader(name: str, kind: object) -> Callable:
        def read(text: str) -> object:
            try:
                return parse_value(kind, text)
            except (ValueError, ArithmeticError) as error:
                raise argparse.ArgumentTypeError(f"{text!r} cannot be read: {error}") from None

        return read

    default_preset = "speedrun" if torch.cuda.is_available() else "tiny"
    parser = Parser(
        description=__doc__.split("\n")[0],
        epilog="Tables are rows of colon-separated fields with commas between the rows: a stage is "
        "1/3:131072:896:128:384:1:.5:.5:.25:0:.25:.25:0, a layer "
        "short:true:none:false:false:none:none",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default=default_preset,
        help="where the options not given come from",
    )
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    for name, kind in typing.get_type_hints(Config).items():
        values = {preset: format_value(getattr(PRESETS[preset], name)) for preset in PRESETS}
        default = values["speedrun"] or "none"
        if values["tiny"] != values["speedrun"] and name not in ("layers", "stages", "extension"):
            default += f"; tiny: {values['tiny']}"
        text = f"{comments[name]} [{default}]".replace("%", "%%")
        parser.add_argument(
            f"--{name}",
            type=reader(name, kind),
            default=argparse.SUPPRESS,
            metavar=name.upper(),
            help=text,
        )
    given = vars(parser.parse_args(arguments))
    return dataclasses.replace(PRESETS[given.pop("preset")], **given)


def main(arguments: list[str] | None = None) -> int:
    """Run, and end every failure on all ranks with one message and a non-zero exit code."""
    config = parse_args(arguments)
    store, log = None, Log(None)
    try:
        store = connect()
        runtime = start_runtime(config, store)
        log = runtime.log
        (continue_text if config.sample else train)(config, runtime)
        if store is not None:
            dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code, message = 130, f"interrupted; the log so far is {log.path}"
        speaks = log.path is not None
    except UserError as error:
        code, message = 1, f"error: {error}"
        speaks = speaks_for_error(store)
    except Exception:  # noqa: BLE001 (reported with its traceback)
        code, message = 1, traceback.format_exc()
        speaks = speaks_for_error(store)
    if speaks:
        print("\n" + message, file=sys.stderr, flush=True)
        log.line(message, screen=False)
    log.write_json()
    os._exit(code)  # at once: other ranks may be waiting for this one in a collective


if __name__ == "__main__":
    sys.exit(main())
