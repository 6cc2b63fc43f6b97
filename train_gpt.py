"""Train a GPT to 3.28 validation loss on FineWeb in the least wall-clock time.

Claim:     none on 8 x H100 and FineWeb yet. On 2 x H200 and the proxy corpus: validation loss
           3.1887 after 870 + 10 steps (--preset half), 57.1 s, three runs, 2026-11-30,
           records/2026-11-30_half_race_870_steps.
Launch:    ./run.sh, or torchrun --nproc_per_node=8 train_gpt.py [--option value ...], or --help.
Lineage:   the task, its data and most techniques are those of modded-nanogpt's speedrun (Jordan et
           al. 2024), which began with llm.c's GPT-2. GPT says which, and what differs.
Sections:  1 this claim, 2 config and tables, 3 runtime and log, 4 operations, 5 model, 6 optimizer,
           7 data, 8 schedule, 9 train and validate, 10 command line. Later ones call earlier ones.
           To see the model first, read GPT.hidden; to see a step, Trainer.run_step.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import gc
import glob
import hashlib
import importlib.metadata
import itertools
import json
import math
import mmap
import os
import platform
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import typing
import unicodedata
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

# Asked for before the imports that take long: both may change
LAUNCHER, SOURCE = os.getppid(), Path(__file__).read_text(encoding="utf-8")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during them Ctrl-C ends without a traceback

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from tqdm import tqdm
from triton.tools.tensor_descriptor import TensorDescriptor

# ==================================================================================================
# 2. Config and tables
# ==================================================================================================

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
START_TOKEN = 50256  # GPT-2's <|endoftext|>; it begins every document
IGNORED_TARGET = -1  # a target that is not scored: padding behind the last validation token
MAX_CHOICES = 9  # sets of weights that choose_weights scores
MOST_SLOTS = 2**32  # of a table of the n-gram lookup: the hash has bits for no more


class UserError(Exception):
    """Something the user can fix. The message names the file or option and the remedy."""


class Windows(NamedTuple):
    """How many earlier tokens a query sees in short and in long layers."""

    short: int
    long: int


@dataclass(frozen=True)
class Stage:
    """One row of the schedule. Sizes are in tokens."""

    share: float  # of num_steps
    tokens_per_step: int  # over all GPUs and micro-steps
    max_seq_len: int  # longer documents are cut
    window_short: int  # how many earlier tokens a query sees
    window_long: int
    lr: float  # multiplier
    second: float  # loss weight of the token after the next one
    candidates: int  # tokens of the vocabulary that a loss is computed on, sampled; 0: all

    @property
    def windows(self) -> Windows:
        return Windows(self.window_short, self.window_long)


@dataclass(frozen=True)
class Layer:
    """One row of the layer plan. Layers are named by their number, from 0."""

    window: str  # short or long (with the partial key offset)
    value_table: int | None  # value embedding added to v
    ngrams: bool  # the n-grams enter the stream again
    attend_from: int | None  # attention reads the output of that earlier layer


# The recipe. records/ablations/README.md says what was tried in place of these numbers, and
# records/techniques.md what each technique brings and where it comes from.
# fmt: off
SPEEDRUN_STAGES = (
    #     share tokens  seq_len  short  long    lr    second candidates
    Stage(0.30,  65_536,    640,   128,  384, 0.75, 0.42,  6_656),
    Stage(0.25, 131_072,    896,   128,  384, 1.00, 0.30,  5_888),
    Stage(0.15, 196_608,    896,   384,  896, 1.30, 0.12,  7_168),
    Stage(0.20, 262_144,   2048,   640, 1408, 1.52, 0.0,   8_192),
    Stage(0.10, 262_144,   2048,   640, 1408, 1.52, 0.0,  12_800),
)
SPEEDRUN_EXTENSION = (  # after num_steps: longer windows at the final learning rate
    Stage(1.0,  262_144,   2048,   768, 1664, 1.52, 0.0,  0),
)
SPEEDRUN_LAYERS = (
    #     window   value  ngrams  attend_from
    Layer("short", 0,     False,  None),  # 0
    Layer("short", 1,     False,  None),  # 1
    Layer("long",  None,  True,   None),  # 2
    Layer("short", None,  False,  None),  # 3
    Layer("short", None,  False,  None),  # 4
    Layer("short", None,  True,   None),  # 5
    Layer("short", 2,     False,  5),     # 6
    Layer("short", 3,     False,  5),     # 7
    Layer("long",  4,     True,   5),     # 8, with the dynamic skips
)
# The medium track's, 2.92 in place of 3.28; records/medium.md says how these follow from the above.
MEDIUM_STAGES = (
    #     share tokens  seq_len  short  long    lr    second candidates
    Stage(0.20, 131_072,    896,   128,  384, 1.00, 0.42,  8_192),
    Stage(0.20, 262_144,   2048,   256,  896, 1.52, 0.30,  8_192),
    Stage(0.20, 262_144,   2048,   640, 1408, 1.52, 0.12,  8_192),
    Stage(0.25, 393_216,   4096,   896, 2176, 1.73, 0.0,  12_800),
    Stage(0.15, 393_216,   4096,   896, 2176, 1.73, 0.0,  16_384),
)
MEDIUM_EXTENSION = (
    Stage(1.0,  393_216,   4096,  1280, 2944, 1.73, 0.0,  0),
)
MEDIUM_LAYERS = (
    #     window   value  ngrams  attend_from
    Layer("short", 0,     False,  None),  # 0
    Layer("short", 1,     False,  None),  # 1
    Layer("short", 2,     False,  None),  # 2
    Layer("long",  None,  True,   None),  # 3
    Layer("short", None,  False,  None),  # 4
    Layer("short", None,  False,  None),  # 5
    Layer("short", None,  False,  None),  # 6
    Layer("long",  None,  True,   None),  # 7
    Layer("short", None,  False,  None),  # 8
    Layer("short", None,  False,  None),  # 9
    Layer("short", None,  False,  None),  # 10
    Layer("long",  None,  True,   None),  # 11
    Layer("short", 3,     False,  11),    # 12
    Layer("short", 4,     False,  11),    # 13
    Layer("short", 5,     False,  11),    # 14
    Layer("long",  6,     True,   11),    # 15, with the dynamic skips
)
TINY_STAGES = (
    Stage(1 / 2,  1_024,    256,    64,  128, 1.00, 0.1,  0),
    Stage(1 / 2,  1_024,    512,   128,  256, 1.00, 0.0,  0),
)
TINY_EXTENSION = (
    Stage(1.0,    1_024,    512,   128,  512, 1.00, 0.0,  0),
)
TINY_LAYERS = (
    #     window   value  ngrams  attend_from
    Layer("short", 0,     False,  None),  # 0
    Layer("long",  None,  True,   None),  # 1
    Layer("short", None,  False,  None),  # 2
    Layer("short", None,  True,   None),  # 3
    Layer("long",  1,     True,   3),     # 4
)

# Factors of the last layer, one a token, that a small MLP makes of the stream: name, start.
LAST_LAYER_GATES = {
    "value": 2.0,  # on the value embedding
    # three streams whose sum the layer takes as its input
    "x_first": 0.0,  # the stream entering layer 0
    "x_attend": 0.0,  # the output of the layer in attend_from (5)
    "x_last": 1.0,  # the stream arriving here
    # in place of the learned scalars of the other layers
    "residual": math.sqrt(1.1),
    "project": 0.5,
    "first": 0.0,  # the stream entering layer 0 once more, behind the attention
    "ngrams": 0.05,
    "mlp_residual": math.sqrt(1.1),
    "mlp_project": 1.0,
}
GATE_SCALE = 0.1  # of the MLP's outputs
# fmt: on


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. A field is an option (--num_steps 100), its comment the help."""

    # Data
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"  # training shards, a glob pattern
    val_file: str = "data/fineweb10B/fineweb_val_000000.bin"  # validation shard
    val_tokens: int = 10_485_760  # targets scored, from the start of val_file
    repeat_data: bool = False  # start over when the training shards run out
    min_mean_doc_len: int = 224  # where documents are shorter on average, there is no CUDA graph
    # Model
    layers: tuple[Layer, ...] = SPEEDRUN_LAYERS  # layer plan, rows of the fields of Layer
    model_dim: int = 768  # width of the residual stream
    num_heads: int = 4  # attention heads
    head_dim: int = 128  # width of an attention head
    mlp_dim: int = 3840  # hidden width of the MLP
    vocab_size: int = 50_257  # token ids are below this; the tables are padded to a multiple of 128
    gate_dim: int = 64  # hidden width of the MLP of the last layer's gates
    ngram_orders: tuple[int, ...] = (2, 3, 4)  # lengths of n-grams with hashed rows, as 2:3:4
    ngram_rows: int = 2**24  # table rows of each length, 24.1 GiB, which the GPUs share out
    match_orders: tuple[int, ...] = ()  # n-gram lookup: lengths of context, as 3:4:6; none: off
    match_slots: int = 2**27  # of each length, a power of two; 8 bytes each, shared out by GPUs
    match_shards: int = 0  # of train_files, the last ones: only looked up, from the first steps on
    attention_scale: float = 0.1  # factor on q.k before the softmax
    dtype: str = "bfloat16"  # of weights and activations: bfloat16 or float32
    # Schedule
    num_steps: int = 1560  # scheduled steps; the learning rate reaches its end here
    stages: tuple[Stage, ...] = SPEEDRUN_STAGES  # rows of the fields of Stage
    extension_steps: int = 20  # steps after the scheduled ones, at the final learning rate
    extension: tuple[Stage, ...] = SPEEDRUN_EXTENSION  # their one row, in the format of stages
    final_window_long: int = 2560  # long window of the final validation
    sequences_per_step: int = 8  # packed sequences of a step, shared out over the GPUs
    tokens_per_pass: int = 131_072  # micro-batch of a GPU, but at least one sequence
    tokens_per_sampling: int = 8192  # of a sequence, whose loss shares sampled candidates
    stop_step: int = 0  # end after so many steps, with the weights as they are; 0 runs them all
    # Optimizer
    muon_lr: float = 0.023  # NorMuon, all attention and MLP matrices
    muon_weight_decay: float = 0.6  # times lr²; cautious
    muon_beta2: float = 0.9  # decay of NorMuon's running mean squares
    momentum_start: float = 0.85  # Muon momentum at the first and the last step
    momentum_peak: float = 0.95  # and in between
    momentum_warmup_steps: int = 300  # steps from start to peak
    momentum_cooldown_steps: int = 50  # steps back at the end
    slow_start: float = 0.43  # share of num_steps after which a slow mean joins the momentum
    slow_share: float = 0.5615  # its weight; the other mean then decays by momentum_start
    slow_decay: float = 0.98  # of the slow mean, which is kept from the first step on
    adam_lr: float = 0.008  # Adam, embeddings and gates
    adam_weight_decay: float = 0.005  # times lr²; cautious
    adam_eps: float = 1e-10  # added to the root of Adam's second moment, and of n-grams' Adagrad
    ngram_lr: float = 3.0  # rms of an n-gram row's first step; Adam's of a value row is 2.9
    lr_decay_start: float = 0.4  # share of num_steps after which the learning rate falls
    lr_end: float = 0.4  # learning rate multiplier at num_steps
    average_shares: tuple[float, ...] = (0.1,)  # time constants of weight averages, of num_steps
    average_blends: tuple[float, ...] = (0.25, 0.5)  # how far to move toward an average
    # Run
    seed: int = 1337  # of the initial weights
    val_every: int = 250  # steps between validations; 0: only the final one
    val_sequence_tokens: int = 32_768  # tokens of one validation sequence
    canonical_mask: bool = True  # validation leaves out what GPT-2's tokenizer never makes
    fp8: bool = True  # QKV, MLP and head by kernels in fp8 where the GPU has it
    cuda_graphs: bool = True  # replay forward and backward pass as one CUDA graph
    self_check: bool = True  # compare every kernel with its reference before training, on a GPU
    log_dir: str = "logs"  # where <run id>.txt, .json and .png go
    checkpoint: str = ""  # file the final weights are written to

    @property
    def attention_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size + 1, 128)  # the pointer needs an unused entry

    @property
    def num_value_tables(self) -> int:
        return len({row.value_table for row in self.layers} - {None})

    def ngram_rows_per_rank(self, world_size: int) -> int:
        return -(-len(self.ngram_orders) * self.ngram_rows // world_size)

    @property
    def all_stages(self) -> tuple[Stage, ...]:
        return *self.stages, *self.extension

    @property
    def sequence_lengths(self) -> set[int]:
        """Of training, in tokens."""
        return {stage.tokens_per_step // self.sequences_per_step for stage in self.all_stages}

    def longest_pass(self, world_size: int) -> int:
        """Tokens of a GPU's largest micro-batch, or of a validation sequence if that has more."""
        lengths = self.sequence_lengths
        passes = (self.sequences_per_pass(length, world_size) * length for length in lengths)
        return max(*passes, self.val_sequence_tokens)

    def sequences_per_pass(self, num_tokens: int, world_size: int) -> int:
        """How many sequences of as many tokens make a micro-batch: a divisor of those a GPU has."""
        per_rank = max(1, self.sequences_per_step // world_size)
        most = max(1, self.tokens_per_pass // num_tokens)
        counts = range(1, min(per_rank, most) + 1)
        return max(count for count in counts if per_rank % count == 0)


# fmt: off
PRESETS = {
    "speedrun": Config(),
    "half": Config(num_steps=870, extension_steps=10),  # the schedule of the claim above
    "matching": Config(
        match_orders=(2, 3, 4, 5, 6, 8, 12, 16, 24), match_shards=2, tokens_per_pass=65_536
    ),
    "medium": Config(  # another track: 2.92 with 0.6 B parameters
        layers=MEDIUM_LAYERS, model_dim=1024, num_heads=8, mlp_dim=4096, ngram_orders=(2, 3),
        num_steps=6000, stages=MEDIUM_STAGES, extension_steps=40, extension=MEDIUM_EXTENSION,
        final_window_long=3456, sequences_per_step=16, tokens_per_pass=65_536, muon_lr=0.015,
        lr_decay_start=0.3,
    ),
    "tiny": Config(
        train_files="data/sample/sample_train_*.bin", val_file="data/sample/sample_val_*.bin",
        val_tokens=16_384, repeat_data=True, min_mean_doc_len=8,
        layers=TINY_LAYERS, model_dim=64, num_heads=2, head_dim=16, mlp_dim=256, gate_dim=16,
        ngram_orders=(2, 3), ngram_rows=4096, dtype="float32",
        num_steps=80, stages=TINY_STAGES, extension_steps=4, extension=TINY_EXTENSION,
        final_window_long=512, sequences_per_step=2, momentum_warmup_steps=25,
        momentum_cooldown_steps=10, val_every=40, val_sequence_tokens=512, canonical_mask=False,
        ngram_lr=30.0,
        adam_lr=0.035,  # few tokens, each of them often; at 0.07 the loss leapt and stayed there
    ),
}
# fmt: on


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


# fmt: off
def check_config(config: Config, world_size: int, kernels: bool = False) -> None:
    """Raise UserError for values that cannot work together, or not with the kernels."""
    c, count, vocab = config, config.sequences_per_step, config.padded_vocab_size
    positive = ("num_steps sequences_per_step tokens_per_pass tokens_per_sampling "
                "final_window_long momentum_warmup_steps val_tokens val_sequence_tokens "
                "min_mean_doc_len model_dim num_heads head_dim mlp_dim gate_dim ngram_rows "
                "adam_eps")
    not_negative = ("extension_steps stop_step val_every momentum_cooldown_steps ngram_lr "
                    "match_shards muon_lr muon_weight_decay adam_lr adam_weight_decay lr_end")
    for name in positive.split():
        require(getattr(c, name) > 0, f"--{name} {getattr(c, name)} must be positive")
    for name in not_negative.split():
        require(getattr(c, name) >= 0, f"--{name} {getattr(c, name)} must not be negative")
    for name in ("muon_beta2", "momentum_start", "momentum_peak", "slow_decay"):
        require(0 <= getattr(c, name) < 1, f"--{name} {getattr(c, name)} must be from 0 to below 1")
    require(c.num_steps + c.extension_steps <= 10**6,
            f"--num_steps {c.num_steps} and --extension_steps {c.extension_steps} are more than a "
            "million steps: lower them")
    for name in ("slow_start", "slow_share"):
        require(0 <= getattr(c, name) <= 1, f"--{name} {getattr(c, name)} must be from 0 to 1")
    require(0 <= c.lr_decay_start < 1,
            f"--lr_decay_start {c.lr_decay_start} must be a share of num_steps below 1")
    require(count % world_size == 0,
            f"--sequences_per_step {count} is not divisible by the {world_size} processes: start "
            f"1, 2, 4 or 8 of them, or pass --sequences_per_step {round_up(count, world_size)}")
    for option, stages in ("--stages", c.stages), ("--extension", c.extension):
        require(len(stages) > 0, f"{option} has no row: give at least one")
        shares = sum(stage.share for stage in stages)
        require(abs(shares - 1) < 1e-6,
                f"{option}: the shares add up to {shares:g}: make them add up to 1")
        for stage in stages:
            require(stage.tokens_per_step % (16 * count) == 0,
                    f"{option}: {stage.tokens_per_step} tokens a step do not make {count} "
                    "sequences of a multiple of 16 tokens: change them or --sequences_per_step")
            sizes = stage.tokens_per_step, stage.max_seq_len, stage.window_short, stage.window_long
            require(min(stage.share, *sizes, stage.lr) > 0,
                    f"{option}: share, tokens, max_seq_len, windows and lr must be > 0: {stage}")
            require(stage.candidates in range(0, vocab + 1, 16),
                    f"{option}: {stage.candidates} candidates: take 0, for all, or 16, 32, … to "
                    f"{vocab}")
    for name in ("average_shares", "average_blends"):
        numbers = getattr(c, name)
        require(numbers == tuple(sorted({*numbers})) and all(0 < x <= 1 for x in numbers),
                f"--{name} {format_value(numbers)}: give numbers above 0 and up to 1 in ascending "
                "order")
    require(c.average_blends or not c.average_shares,
            "--average_blends none goes with --average_shares none: give some, as 0.5:1")
    require(len((*c.average_shares, *c.average_blends)) <= MAX_CHOICES,
            f"--average_shares and --average_blends: more than {MAX_CHOICES} numbers, each of "
            "which is scored on the clock: give fewer")
    require(len(c.extension) == 1, f"--extension takes one row, found {len(c.extension)}")
    # a long window has one rotary table, which follows from that of the window before
    long = tuple(window for window, _ in itertools.groupby(s.window_long for s in c.all_stages))
    require(len(long) == len({*long}),
            f"--stages and --extension: of the long windows {format_value(long)} one comes twice, "
            "with another between: change one")
    require(c.final_window_long not in long[:-1],
            f"--final_window_long {c.final_window_long} is the long window of an earlier stage: "
            f"give {long[-1]} or more")
    require(c.head_dim % 8 == 0, f"--head_dim {c.head_dim} is no multiple of 8")
    require(c.num_heads % 2 == 0,  # Muon takes query and key heads in pairs
            f"--num_heads {c.num_heads} must be even")
    check_layers(c.layers)
    for name in ("match_orders", "ngram_orders"):
        orders = getattr(c, name)
        require(orders == tuple(sorted({*orders} & {*range(1, 32)})),
                f"--{name} {format_value(orders)}: give lengths from 1 to 31 in ascending order")
    require(0 < c.match_slots <= MOST_SLOTS and c.match_slots.bit_count() == 1,
            f"--match_slots {c.match_slots} is no power of two up to {MOST_SLOTS}")
    require(not c.match_orders or c.match_slots % world_size == 0,
            f"--match_slots {c.match_slots} cannot be shared out evenly over {world_size} "
            "processes: start 1, 2, 4 or 8 of them, or take more slots")
    count = len(c.ngram_orders)
    require(count > 0, "--ngram_orders none: give at least one length, as 2")
    require(c.ngram_rows > 1, "--ngram_rows 1 leaves no row to hash into: take more")
    require(count * c.ngram_rows < 2**31,
            f"--ngram_rows {c.ngram_rows}: {count} of them, one for each of --ngram_orders, must "
            "be below 2^31")
    require(c.vocab_size > START_TOKEN,
            f"--vocab_size {c.vocab_size} leaves out the start token {START_TOKEN}: raise it")
    require(not c.canonical_mask or c.vocab_size == START_TOKEN + 1,
            f"--canonical_mask true is for the {START_TOKEN + 1} tokens of GPT-2, not for "
            f"--vocab_size {c.vocab_size}: pass --canonical_mask false")
    require(c.dtype in ("bfloat16", "float32"),
            f"--dtype {c.dtype!r} is not one of bfloat16, float32")
    require(c.val_sequence_tokens % 16 == 0, "--val_sequence_tokens must be a multiple of 16")
    require(c.match_orders or not c.match_shards,
            f"--match_shards {c.match_shards} goes with --match_orders: give some, as 3:4:6")
    if kernels:
        check_kernel_sizes(c, world_size)


def check_kernel_sizes(c: Config, world_size: int) -> None:
    """Raise UserError for sizes that the kernels cannot take."""
    tokens = c.longest_pass(world_size)
    width = max(c.model_dim, c.mlp_dim, 3 * c.attention_dim)
    require(tokens * width < 2**31,
            f"a pass of {tokens} tokens, {width} numbers wide, is beyond the 2^31 numbers that the "
            "kernels can address: lower --tokens_per_pass or raise --sequences_per_step")
    if not c.fp8 or c.dtype != "bfloat16":
        return
    require(c.head_dim.bit_count() == 1,
            f"--head_dim {c.head_dim} is no power of two, as the fp8 kernels need it: take 64 or "
            "128, or pass --fp8 false")
    heads = f"--num_heads {c.num_heads} times --head_dim {c.head_dim}"
    for option, size in ((f"--model_dim {c.model_dim}", c.model_dim),
                         (f"--mlp_dim {c.mlp_dim}", c.mlp_dim), (heads, c.attention_dim)):
        require(size % 16 == 0,
                f"{option}: {size} is no multiple of 16, as fp8 matmuls need it: take "
                f"{round_up(size, 16)}, or pass --fp8 false")


def check_layers(layers: tuple[Layer, ...]) -> None:
    """The shape that GPT.hidden expects of a plan."""
    require(len(layers) > 0, "--layers has no row: give at least one")
    last, attended = layers[-1], {row.attend_from for row in layers} - {None}
    for i, row in enumerate(layers):
        require(row.window in ("short", "long"),
                f"--layers: window {row.window!r} is neither short nor long")
        require(row.attend_from is None or 0 <= row.attend_from < i,
                f"--layers: attend_from of layer {i} names {row.attend_from}, no earlier one")
    tables = sorted({row.value_table for row in layers} - {None})
    require(len(tables) > 0 and tables == [*range(len(tables))],
            f"--layers: value tables {tables} are not numbered 0, 1, 2, … in a row")
    require(len(attended) == 1, f"--layers: attend_from names {len(attended)} layers, not one")
    complete = last.ngrams and last.value_table is not None and last.attend_from is not None
    require(last.window == "long" and complete,
            "--layers: the last one must be long, with value table, ngrams and attend_from")
# fmt: on


# ==================================================================================================
# 3. Runtime and log
# ==================================================================================================


def show(text: str, stream: typing.TextIO | None = None) -> None:
    """Print a line at once, above a progress bar, to stdout unless it says otherwise. A run goes on
    when nobody reads the stream any more: a closed pipe, a terminal that is gone."""
    stream = stream or sys.stdout
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def unfinished_path(path: str | Path) -> Path:
    """Where a file is written until it is whole: next to it, where a link points."""
    return Path(f"{os.path.realpath(path)}.part")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, which becomes this file or, when writing fails, goes."""
    unfinished = unfinished_path(path)
    try:
        yield unfinished
        os.replace(unfinished, os.path.realpath(path))
    finally:
        unfinished.unlink(missing_ok=True)


def check_output(option: str, path: str | Path, num_bytes: int) -> None:
    """Raise UserError unless a file of so many bytes can be written there, or take the place of the
    one that is there: before training, not after it."""
    name, unfinished = f"{option} {path}", unfinished_path(path)
    is_file = os.path.isfile(path) and os.access(path, os.W_OK)
    usable = is_file if os.path.exists(path) else os.path.basename(path) != ""
    require(usable, f"{name}: no file that can be replaced: choose another name")
    try:
        unfinished.touch()
        unfinished.unlink()
        free = shutil.disk_usage(unfinished.parent).free
    except OSError as error:
        raise UserError(f"{name}: cannot be written ({error.strerror}): choose another") from None
    sizes = f"{num_bytes / 2**20:,.1f} MiB will be written, {free / 2**20:,.1f} MiB are free"
    require(num_bytes <= free, f"{name}: {sizes}: make room or choose another folder")


class Log:
    """Writes the run down as it goes: <run id>.txt line by line, <run id>.json at the end.

    Only the main rank has one that writes; those of the others write nothing. When the disk is
    full the run goes on: that is told once, and `failed` makes it the exit code.
    """

    def __init__(self, folder: str | None, run_id: str = ""):
        self.path, self.file, self.failed = None, None, False
        self.data: dict = {"run_id": run_id, "steps": [], "validations": []}
        if folder is not None:
            self.path = Path(folder, f"{run_id}.txt")
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                options = {"encoding": "utf-8", "errors": "replace"}
                self.file = self.path.open("w", buffering=1, **options)  # line by line
            except OSError as error:
                raise UserError(
                    f"--log_dir {folder}: cannot write there ({error}): choose another"
                ) from None

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.failed:
                found = f"error: {self.path}: cannot be written ({error.strerror or error})"
                show(f"{found}: the run goes on, its log has gaps", sys.stderr)
            self.failed = True

    def line(self, text: str, screen: bool = True) -> None:
        if self.file is not None:
            if screen:
                show(text)
            with self.writing():
                self.file.write(text + "\n")

    def step(self, step: int, train_loss: float, train_time: float, step_ms: float) -> None:
        """Times in seconds since the clock started, and milliseconds for this step."""
        row = {"step": step, "train_loss": train_loss, "train_time_s": train_time}
        self.data["steps"].append(row | {"step_ms": step_ms})
        loss_and_time = f"train_loss {train_loss:.4f} train_time {train_time:.3f} s"
        self.line(f"step {step} {loss_and_time} step {step_ms:.1f} ms", screen=False)

    def write_json(self) -> None:
        if self.path is not None:
            with self.writing(), replacing(self.path.with_suffix(".json")) as unfinished:
                unfinished.write_text(json.dumps(self.data, indent=1))


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

    def all_gather(self, gathered: Tensor, part: Tensor) -> None:
        """Fill `gathered` with the part of each rank, behind one another in the first dimension."""
        if self.world_size > 1:
            dist.all_gather_into_tensor(gathered, part)
        else:
            gathered.copy_(part)

    def all_to_all(
        self, received: Tensor, sent: Tensor, from_each: list[int], to_each: list[int]
    ) -> dist.Work:
        """Start to send rows to all ranks, rank 0's in front, as many as these numbers say."""
        return dist.all_to_all_single(received, sent, from_each, to_each, async_op=True)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def connect() -> dist.Store | None:
    """The key-value store that torchrun's processes share; None for a process started alone."""
    names = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    if torch.cuda.is_available():
        names.append("LOCAL_RANK")  # the number of the GPU
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return None
    found = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
    remedy = "start several processes by run.sh or torchrun, and one after unset RANK WORLD_SIZE"
    require(
        all(map(os.environ.get, names)), f"the environment of this process has {found}: {remedy}"
    )
    try:
        return next(dist.rendezvous("env://"))[0]
    except (ValueError, dist.DistError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes cannot meet by {found} ({reason}): give a port of MASTER_ADDR that "
            f"is free, or {remedy}"
        ) from None


def first_error(store: dist.Store | None, message: str) -> tuple[bool, str]:
    """Whether this rank is the first to say what stopped the run, and so the one that tells the
    user; and the message of the first."""
    rank = os.environ.get("RANK", "0")
    if store is None:
        return True, message
    try:
        first = json.loads(store.compare_set("speedrun/error", "", json.dumps([rank, message])))
    except RuntimeError:  # the store is gone with the launcher
        return rank == "0", message
    return first[0] == rank, first[1]


def check_ranks(config: Config, store: dist.Store, rank: int, world_size: int) -> None:
    """Raise UserError, on every rank, unless all have the same options, script and shards: they
    would train something else or wait for each other for good. Folders may differ."""
    options = config_as_text(config) | {"checkpoint": Path(config.checkpoint).name}
    for name in "train_files", "val_file", "log_dir":
        del options[name]
    facts = {f"--{name}": text for name, text in options.items()}
    facts["the script"] = f"SHA-256 {hashlib.sha256(SOURCE.encode()).hexdigest()}"
    try:
        paths = [find_val_file(config), *find_files("--train_files", config.train_files)]
        shards = [f"{Path(path).name} with {read_shard_header(path):,} tokens" for path in paths]
    except UserError as error:  # where all ranks have the same one, train() raises it
        shards = [str(error)]
    facts |= {f"shard {i} of the data": text for i, text in enumerate(shards)}
    store.set(f"speedrun/rank {rank}", json.dumps(facts))
    first, *others = (json.loads(store.get(f"speedrun/rank {i}")) for i in range(world_size))
    for i, other in enumerate(others, 1):
        for name in first | other:
            a, b = first.get(name) or "missing", other.get(name) or "missing"
            remedy = "start all ranks with the same options, script and data"
            require(a == b, f"{name} is {a} on rank 0, but {b} on rank {i}: {remedy}")


def start_runtime(config: Config, store: dist.Store | None) -> Runtime:
    """Choose the device, join the other processes, open the log."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    on_gpu = torch.cuda.is_available()
    if store is not None:
        check_ranks(config, store, rank, world_size)
    check_config(config, world_size, on_gpu and has_kernels(torch.device("cuda", 0)))
    device, backend, options = torch.device("cpu"), "gloo", {}
    if on_gpu:
        local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        require(
            local_rank < count,
            f"process {local_rank} of this machine has no GPU: {count} are visible. Start as many "
            "processes as GPUs (NPROC for run.sh, --nproc_per_node for torchrun)",
        )
        device = torch.device("cuda", local_rank)
        backend, options = "nccl", {"device_id": device}
        torch.cuda.set_device(device)
        # flash-attn-4 keeps what it compiled on disk only if asked; its compiler warns of an
        # argument left out here
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        warnings.filterwarnings("ignore", message="Argument aux_data")
        # an import of many seconds, which is waited for when the model asks for its attention
        wanted = device, getattr(torch, config.dtype)
        threading.Thread(target=attention_backend, args=wanted, daemon=True).start()
    else:
        keep_freed_memory()
    if store is not None:
        # torch 2.13 has new names for the two collectives, which 2.11 does not know
        warnings.filterwarnings("ignore", r"`torch\.distributed\.(reduce_scatter|all_gather)")
        options |= {"store": store, "rank": rank, "world_size": world_size}
        dist.init_process_group(backend, timeout=timedelta(minutes=10), **options)
    run_id = f"{datetime.now(UTC):%Y-%m-%d_%H%M%S}_{uuid.uuid4().hex[:8]}"
    return Runtime(rank, world_size, device, Log(config.log_dir if rank == 0 else None, run_id))


def keep_freed_memory() -> None:
    """Stop glibc from giving large freed buffers back to the system: mapping the logits anew in
    every step costs several times what computing them does."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        mallopt(-4, 0)  # M_MMAP_MAX: take large buffers from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and leave them there


def package_version(name: str) -> str | None:
    """Of an installed package; None if it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# what nvidia-smi tells of a GPU: its names for it
GPU_FACTS = {
    "driver": "driver_version",
    "power_limit": "power.limit",
    "sm_clock": "clocks.sm",
    "max_sm_clock": "clocks.max.sm",
    "memory_clock": "clocks.mem",
}


def gpu_facts(device: torch.device) -> dict[str, str | None]:
    """GPU_FACTS of this GPU with their units, None where nvidia-smi cannot tell."""
    query = f"--query-gpu={','.join(GPU_FACTS.values())}"
    chosen = f"--id={torch.cuda.get_device_properties(device).uuid}"
    if not chosen.startswith("--id=GPU-"):
        chosen = chosen.replace("--id=", "--id=GPU-")
    try:
        command = ["nvidia-smi", query, chosen, "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        values = [value.strip() for value in done.stdout.strip().split(",")]
    except (OSError, subprocess.SubprocessError):
        values = []
    return dict(itertools.zip_longest(GPU_FACTS, values[: len(GPU_FACTS)]))


def describe_environment(runtime: Runtime) -> dict:
    """What the run depends on besides its config: versions, machine, and the state of the GPU."""
    device, gpu = f"CPU {platform.machine()}", {"cuda": None}
    if runtime.device.type == "cuda":
        device = torch.cuda.get_device_name(runtime.device)
        gpu = {"cuda": torch.version.cuda, **gpu_facts(runtime.device)}
        gpu["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S %z}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "flash_attn": package_version("flash-attn-4"),
        **gpu,
        "devices": device,
        "world_size": runtime.world_size,
        "cpu_threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


# ==================================================================================================
# 4. Operations
# ==================================================================================================
#
# A fused operation is one name with two bodies: kernels where has_kernels says so, those of QKV,
# MLP and head in fp8 alone, and a few lines of plain PyTorch, which define it, elsewhere.

LOG2_E = tl.constexpr(math.log2(math.e))
EPS = tl.constexpr(torch.finfo(torch.float32).eps)  # of every RMS norm, what F.rms_norm takes
MIX_1, MIX_2 = -7046029254386353131, -4658895280553007687  # a hash's
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels of this file run here: they are written for Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@contextlib.contextmanager
def recorded(name: str) -> Iterator[None]:
    """A range of this name in the trace of a profiler; without one it costs a few microseconds. As
    a decorator it records every call. tools/profiler.py knows all names."""
    running = torch.autograd.profiler._is_profiler_enabled
    with torch.profiler.record_function(name) if running else contextlib.nullcontext():
        yield


def takes_kernel(x: Tensor) -> bool:
    """Whether an operation on x runs by its kernel. fp64 always takes the reference implementation,
    so that a kernel can be compared with it on the same device."""
    return x.dtype != torch.float64 and has_kernels(x.device)


def compiled(function: Callable, dynamic: bool = False) -> Callable:
    """Decorator: torch.compile at the first call with a first argument on a GPU, and the function
    as it is on a CPU. torch compiles anew for every other number among the arguments and, unless
    `dynamic`, for every other length, so what changes from step to step is given as a tensor. A
    compiled function that calls another one inlines it."""
    options = {"fullgraph": True, "dynamic": dynamic}
    compile_once = functools.cache(lambda: torch.compile(function, **options))

    @functools.wraps(function)
    def call(first: Tensor, *others: object, **named: object) -> object:
        inlined = torch.compiler.is_compiling()
        run = compile_once() if first.is_cuda and not inlined else function
        return run(first, *others, **named)

    return call


def widen(x: Tensor) -> Tensor:
    """fp32, or fp64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def packed(x: Tensor | None) -> Tensor | None:
    """x as the kernels read it, all dimensions adjacent: nearly always x itself."""
    return None if x is None else x.contiguous()


def row_stride(x: Tensor) -> int:
    """Elements from one row of x to the next; a kernel takes the columns of a row as adjacent."""
    assert x.stride(1) == 1 or x.size(1) == 1, f"columns {x.stride(1)} elements apart"
    return x.stride(0)


def mix(key: Tensor) -> Tensor:
    """A round of a hash, int64, of numpy's arrays too: spreads what tells keys apart over the
    bits."""
    key = key * MIX_1
    return key ^ (key >> 29)


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=EPS.value)


# --- fp8 ------------------------------------------------------------------------------------------
#
# The scheme. A matrix in fp8 has one scale, what 1.0 in it stands for. Weights have that of their
# own largest number, measured after every update. Normed rows and the head have fixed scales, for
# their size is known. What a pass makes on its way (the square of ReLU, three gradients) has a
# delayed scale, one a layer: that of the largest number of the step before, with HEADROOM, so that
# no pass waits for a maximum. What does not fit is clipped and counted. All are e4m3 but the
# gradient of the logits, which is e5m2. cuBLAS multiplies rows by rows, so what is multiplied from
# both sides is written both ways round, by the kernel that makes it.


class Fp8(NamedTuple):
    """A matrix in fp8. A matmul reads rows of both factors, so what is multiplied from both sides
    is kept both ways round."""

    rows: Tensor
    columns: Tensor  # its transpose
    scale: Tensor  # what 1.0 stands for: fp32, padded to the 16 bytes at which cuBLAS wants it

    @property
    def T(self) -> "Fp8":
        return Fp8(self.columns, self.rows, self.scale)


def fp8_empty(shape: Sequence[int], scale: Tensor, dtype: torch.dtype | None = None) -> Fp8:
    """A buffer for a matrix, or a batch of them with a scale each, in e4m3 unless it says
    otherwise."""
    *batch, rows, columns = shape
    shapes = shape, (*batch, columns, rows)
    return Fp8(*(scale.new_empty(shape, dtype=dtype or E4M3) for shape in shapes), scale)


def fp8_matmul(a: Fp8, b: Fp8) -> Tensor:
    """a bᵀ in bf16 for a (rows, inner) and b (cols, inner)."""
    return torch._scaled_mm(a.rows, b.rows.mT, a.scale[0], b.scale[0], out_dtype=torch.bfloat16)


@triton.jit
def _transposed(tile):
    """The transpose of a tile, exact. fp8 moves as fp16: of single bytes Triton 3.6 and 3.7.1 have
    stored garbage, depending on the layout of the tile."""
    if tile.dtype.primitive_bitwidth != 8:
        return tl.trans(tile)
    return tl.trans(tile.to(tl.float16)).to(tl.float32).to(tile.dtype)


@triton.jit
def _largest(tile):
    """The largest absolute value of a tile, infinite if one is NaN, which a maximum would lose."""
    return tl.max(tl.where(tile == tile, tl.abs(tile), float("inf")))  # noqa: PLR0124


@triton.jit(do_not_specialize_on_alignment=["largest", "clipped"])
def _quantize_kernel(
    x, scale, out, out_t, largest, clipped, num_rows, num_columns, matrix_stride,
    LIMIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64) * num_rows * num_columns
    x += tl.program_id(2).to(tl.int64) * matrix_stride - matrix
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    at = matrix + row[:, None] * num_columns + column[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if largest is not None:
        tl.atomic_max(largest, _largest(values))
    values *= 1 / tl.load(scale + 4 * tl.program_id(2))
    if clipped is not None:
        count = tl.sum((tl.abs(values) > LIMIT).to(tl.int32))
        tl.atomic_add(clipped, count.to(tl.int64), mask=count > 0)
    values = tl.clamp(values, -LIMIT, LIMIT).to(out.dtype.element_ty)
    tl.store(out + at, values, mask=inside)
    at_t = matrix + column[:, None] * num_rows + row[None, :]
    tl.store(out_t + at_t, _transposed(values), mask=tl.trans(inside))


def quantize(
    x: Tensor, out: Fp8, largest: Tensor | None = None, clipped: Tensor | None = None
) -> Fp8:
    """Write x to `out`, saturated; raise largest (1,) to that of |x|, and add to clipped (1,) int64
    how many numbers did not fit.

    x: (rows, cols) with one scale (4,), or (batch, rows, cols), the first rows of larger matrices
    or all, with scales (batch, 4).
    """
    *batch, rows, columns = x.shape
    grid = (triton.cdiv(rows, 64), triton.cdiv(columns, 128), math.prod(batch))
    x = x.flatten(-2) if batch else packed(x)  # a view
    _quantize_kernel[grid](
        x, out.scale, out.rows, out.columns, largest, clipped, rows, columns, x.stride(0),
        LIMIT=torch.finfo(out.rows.dtype).max, ROWS=64, COLUMNS=128, num_warps=4,
    )  # fmt: skip
    return out


class DelayedScale(NamedTuple):
    """A scale that follows the largest number of the step before."""

    scale: Tensor  # (4,), like Fp8's
    largest: Tensor  # (1,) fp32, raised by the kernels; what they have seen since the last update


class QkvFp8(NamedTuple):
    """The factors of the QKV matmul, and what its gradient in fp8 takes."""

    x: Fp8  # (T, dim)
    w: Fp8  # (3 attention_dim, dim)
    grad: DelayedScale  # of the matmul's result


class MlpFp8(NamedTuple):
    """The input and the weights of an MLP, and what the rest in fp8 takes."""

    x: Fp8  # (T, dim)
    w_1: Fp8  # (hidden, dim)
    w_2: Fp8
    square: DelayedScale
    grad: DelayedScale  # of the MLP's result
    grad_hidden: DelayedScale  # in front of relu


class HeadFp8(NamedTuple):
    """The head, and the scales of its input and of the gradient of the logits."""

    weight: Fp8  # (vocab, dim)
    scale_x: Tensor
    scale_grad: Tensor
    clipped: Tensor | None = None  # (1,) int64, how many numbers of its input did not fit so far


FP8_MAX = 448.0  # the largest e4m3 number
HEADROOM = 1.8  # a delayed scale fits numbers so many times as large as those of the step before

# What they are of: the number that the scale fits in the first step. A layer has one of each.
DELAYED_SCALES = {
    "the square of ReLU": 16.0,
    "the gradient of the MLP's result": 2.0**-6,
    "the gradient in front of ReLU": 2.0**-6,
    "the gradient of QKV": 2.0**-6,
}


class BankCopy(NamedTuple):
    """Weights, (entries, rows, dim), and their copy in fp8 with a scale an entry."""

    bank: Tensor
    copy: Fp8

    def entry(self, number: int) -> Fp8:
        return Fp8(*(tensor[number] for tensor in self.copy))


class Fp8Copies:
    """fp8 copies of the MLP bank and of the QKV rows, made anew after every update, and of the
    head's rows for each sample of candidates; and all scales, as the scheme above has them."""

    def __init__(self, mlp_bank: Tensor, attention_bank: Tensor, head: Tensor, num_layers: int):
        self.num_layers, self.head_weight = num_layers, head.detach()
        qkv_rows, device = attention_bank.size(1) // 4 * 3, head.device

        def scale_for(largest: float, *shape: int) -> Tensor:
            return torch.full((*shape, 4), largest / FP8_MAX, device=device)

        def copy_of(bank: Tensor) -> BankCopy:
            return BankCopy(bank.detach(), fp8_empty(bank.shape, scale_for(1.0, len(bank))))

        self.mlp_weights = copy_of(mlp_bank[: 2 * num_layers])
        self.qkv_weights = copy_of(attention_bank[:num_layers, :qkv_rows])
        # no number of a normed row is above √dim, 27.7 of 768; the head's norm is rounded to bf16
        root = math.sqrt(head.size(1))
        self.scale_x = scale_for(math.ceil(root))
        # these three as in the public record: 1.6, 100 and 0.75
        self.head_scale, self.head_input_scale = scale_for(1.6), scale_for(max(100.0, 1.01 * root))
        self.logits_grad_scale = scale_for(0.75)  # in e5m2, which goes further than FP8_MAX
        # The delayed scales, (layers, kinds, 4), and the numbers that they follow.
        self.scales = scale_for(0.0, num_layers, len(DELAYED_SCALES))
        self.largest = torch.zeros(num_layers, len(DELAYED_SCALES), device=device)
        # numbers of the head's weights and of its input, and delayed scales of a layer and step
        self.clipped = torch.zeros(3, dtype=torch.int64, device=device)
        # The largest number of each weight matrix and behind each delayed scale, after a step.
        self.health = torch.zeros(3 * num_layers + self.largest.numel(), device=device)
        self.reset()

    @property
    def banks(self) -> tuple[BankCopy, BankCopy]:
        return self.mlp_weights, self.qkv_weights

    def reset(self) -> None:
        """As before the first step: nothing is known of a layer's numbers yet."""
        for scales, guess in zip(self.scales.unbind(1), DELAYED_SCALES.values()):
            scales.fill_(guess / FP8_MAX)
        self.largest.zero_()
        self.refresh()
        self.clipped.zero_()

    @recorded("fp8 refresh")
    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights as they are now."""
        of_banks = []
        for bank, copy in self.banks:
            largest = torch.linalg.vector_norm(bank, math.inf, dim=(1, 2), dtype=torch.float32)
            copy.scale.copy_(largest.clamp_min(1e-12)[:, None] / FP8_MAX)
            quantize(bank, copy)
            of_banks.append(largest)
        torch.cat([*of_banks, self.largest.flatten()], out=self.health)
        self.clipped[2] += (self.largest > FP8_MAX * self.scales[:, :, 0]).sum()
        largest = self.largest[:, :, None]
        self.scales.copy_(torch.where(largest > 0, HEADROOM / FP8_MAX * largest, self.scales))
        self.largest.zero_()

    def count_clipped(self, runtime: "Runtime") -> dict[str, int]:
        """How many numbers have not fit their scale since the start, on all ranks."""
        counts = runtime.all_reduce(self.clipped.clone()).tolist()
        names = "numbers of the head", "numbers of the head's input", "scales of the step before"
        return dict(zip(names, counts))

    def not_finite(self, health: Tensor) -> list[str]:
        """What of `health`, copied to the CPU, is infinite or NaN."""
        layers = [f"layer {i}" for i in range(self.num_layers)]
        names = [f"W_{k} of {layer}" for k in (1, 2) for layer in layers]
        names += [f"the attention weights of {layer}" for layer in layers]
        names += [f"{scale} in {layer}" for layer in layers for scale in DELAYED_SCALES]
        return [name for name, value in zip(names, health.tolist()) if not math.isfinite(value)]

    def delayed(self, layer: int) -> list[DelayedScale]:
        """Of a layer, in the order of DELAYED_SCALES."""
        return [*map(DelayedScale, self.scales[layer], self.largest[layer].split(1))]

    def qkv(self, layer: int, x: Fp8) -> QkvFp8:
        """For this layer, given a copy of the stream."""
        *_, grad = self.delayed(layer)
        return QkvFp8(x, self.qkv_weights.entry(layer), grad)

    def mlp(self, layer: int, x: Fp8) -> MlpFp8:
        """For this layer, given a copy of the stream."""
        square, grad, grad_hidden, _ = self.delayed(layer)
        w_1, w_2 = map(self.mlp_weights.entry, (layer, self.num_layers + layer))
        return MlpFp8(x, w_1, w_2, square, grad, grad_hidden)

    def head(self, tokens: Tensor | None = None) -> HeadFp8:
        """Of these rows of the head, or of all."""
        weight = self.head_weight if tokens is None else self.head_weight[tokens]
        copy = fp8_empty(weight.shape, self.head_scale)
        quantize(weight, copy, clipped=self.clipped[:1])
        return HeadFp8(copy, self.head_input_scale, self.logits_grad_scale, self.clipped[1:2])


# --- Sums of streams ------------------------------------------------------------------------------


def combine(
    sources: Sequence[Tensor], coefficients: Sequence[Tensor], norm: bool = False,
    fp8: Fp8 | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The sum of coefficient·source; its RMS norm, None unless `norm`; the sources. (T, dim) each.

    sources: (T, dim). coefficients: fp32, one number or, (T,) or (T, 1), one a token. What
    happens on the residual stream is such a sum; it is formed in fp32 and rounded once. Whoever
    reads a source again takes it from here: its gradient from there is added in the pass that makes
    the one from here, for which autograd would need another pass. Given a buffer in fp8, the norm
    is written there; the one returned has its shape and its gradient, but all its numbers are NaN.
    """
    if takes_kernel(sources[0]):
        return Combine.apply(norm, fp8, *sources, *coefficients)
    total = sum(c.view(-1, 1) * source for c, source in zip(coefficients, sources))
    normed = rms_norm(total).type_as(sources[0]) if norm else None
    return total.type_as(sources[0]), normed, *sources


# A coefficient is one number, or one a token: a stride of 0 or more. It is passed as
# 3 + 2 · stride. For arguments that are 0, 1 or multiples of 16 Triton makes kernels of their own,
# for odd numbers from 3 on it does not, and one kernel shall serve sums of all kinds.


def encode_stride(coefficient: Tensor) -> int:
    return 3 + 2 * (0 if coefficient.numel() == 1 else coefficient.stride(0))


@triton.jit
def _decode_stride(code):
    return code // 2 - 1


@functools.cache
def unreadable(dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN, (1,). What must not be read is an expanded view of it."""
    return torch.full((1,), math.nan, dtype=dtype, device=device)


@triton.jit
def _combine_tile(sources, coefficients, rows, strides, t, real, column, inside):
    """The sum, fp32 in the shape of `inside`, for tokens t, where they are real, and columns."""
    total = tl.zeros(inside.shape, tl.float32)
    for i in tl.static_range(len(sources)):
        source = tl.load(sources[i] + t * rows[i] + column, mask=inside, other=0.0)
        place = coefficients[i] + t * _decode_stride(strides[i])
        coefficient = tl.load(place, mask=real, other=0.0)
        total += coefficient * source.to(tl.float32)
    return total


@triton.jit(do_not_specialize_on_alignment=["coefficients"])
def _combine_kernel(
    sources, coefficients, rows, strides, stream, normed, normed_t, scale, num_tokens, dim,
    LIMIT: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    real, squares = t < num_tokens, tl.zeros((TOKENS,), tl.float32)
    for start in range(0, dim, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = real & (column < dim)
        total = _combine_tile(sources, coefficients, rows, strides, t, real, column, inside)
        tl.store(stream + t * dim + column, total, mask=inside)
        squares += tl.sum(total * total, 1)
    if normed is not None:
        factor = tl.rsqrt(squares / dim + EPS)  # (TOKENS,)
        if scale is not None:
            factor /= tl.load(scale)
        tl.debug_barrier()  # the stream is read as other threads may have stored it
        for start in range(0, dim, COLUMNS):
            column = start + tl.arange(0, COLUMNS)[None, :]
            inside = real & (column < dim)
            tile = tl.load(stream + t * dim + column, mask=inside, other=0.0).to(tl.float32)
            tile *= factor[:, None]
            if normed_t is not None:
                tile = tl.clamp(tile, -LIMIT, LIMIT)
            tile = tile.to(normed.dtype.element_ty)
            tl.store(normed + t * dim + column, tile, mask=inside)
            if normed_t is not None:
                at_t = tl.trans(column) * num_tokens + tl.trans(t)
                tl.store(normed_t + at_t, _transposed(tile), mask=tl.trans(inside))


@triton.jit(do_not_specialize=["later"], do_not_specialize_on_alignment=["coefficients"])
def _combine_backward_kernel(
    sources, coefficients, rows, strides, grad_stream, grad_normed, grad_later, grad_sources,
    grad_coefficients, later, dim, BLOCK: tl.constexpr,
):  # fmt: skip
    """later: bit i is set if source i has a gradient from later on. It is no constant, so that one
    kernel serves all sums of as many sources."""
    t, num_tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    grad = tl.zeros(column.shape, tl.float32)
    if grad_stream is not None:
        grad += tl.load(grad_stream + t * dim + column, mask=inside, other=0.0).to(tl.float32)
    if grad_normed is not None:
        total = _combine_tile(sources, coefficients, rows, strides, t, True, column, inside)
        scale = tl.rsqrt(tl.sum(total * total) / dim + EPS)
        total *= scale
        outer = tl.load(grad_normed + t * dim + column, mask=inside, other=0.0).to(tl.float32)
        grad += scale * (outer - total * (tl.sum(outer * total) / dim))
    for i in tl.static_range(len(sources)):
        source = tl.load(sources[i] + t * rows[i] + column, mask=inside, other=0.0)
        coefficient = tl.load(coefficients[i] + t * _decode_stride(strides[i]))
        grad_source = coefficient * grad
        if (later >> i) & 1:
            added = tl.load(grad_later[i] + t * dim + column, mask=inside, other=0.0)
            grad_source += added.to(tl.float32)
        tl.store(grad_sources[i] + t * dim + column, grad_source, mask=inside)
        tl.store(grad_coefficients + i * num_tokens + t, tl.sum(grad * source.to(tl.float32)))


def combine_arguments(tensors: Sequence[Tensor]) -> tuple[tuple, ...]:
    """Sources, coefficients, and how far apart the rows of each are."""
    sources, coefficients = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
    strides = tuple(map(encode_stride, coefficients))
    return sources, coefficients, tuple(map(row_stride, sources)), strides


class Combine(torch.autograd.Function):
    """combine by kernels; sources and coefficients come one by one, as autograd sees them."""

    @staticmethod
    def forward(ctx, norm: bool, fp8: Fp8 | None, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        sources, *_ = arguments = combine_arguments(tensors)
        num_tokens, dim = sources[0].shape
        stream = sources[0].new_empty(num_tokens, dim)
        normed = torch.empty_like(stream) if norm and fp8 is None else None
        out = fp8 or Fp8(normed, None, None)
        _combine_kernel[(triton.cdiv(num_tokens, 32),)](
            *arguments, stream, *out, num_tokens, dim, LIMIT=torch.finfo(E4M3).max, TOKENS=32,
            COLUMNS=256, num_warps=8,
        )  # fmt: skip
        if fp8 is not None:
            normed = unreadable(stream.dtype, stream.device).expand(num_tokens, dim)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)  # an output that nothing reads has no gradient
        return stream, normed, *sources

    @staticmethod
    def backward(
        ctx, grad_stream: Tensor | None, grad_normed: Tensor | None, *later: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        sources, coefficients, *_ = arguments = combine_arguments(ctx.saved_tensors)
        num_tokens, dim = sources[0].shape
        grads = tuple(source.new_empty(num_tokens, dim) for source in sources)
        per_token = sources[0].new_empty((len(sources), num_tokens), dtype=torch.float32)
        present = sum(1 << i for i, grad in enumerate(later) if grad is not None)
        later = tuple(grad if x is None else packed(x) for grad, x in zip(grads, later))
        # a row a warp: its sums need no shared memory
        _combine_backward_kernel[(num_tokens,)](
            *arguments, packed(grad_stream), packed(grad_normed), later, grads, per_token, present,
            dim, BLOCK=triton.next_power_of_2(dim), num_warps=1,
        )  # fmt: skip
        needed = ctx.needs_input_grad[-len(sources) :]
        terms = (
            (term if c.numel() > 1 else term.sum()).view_as(c) if need else None
            for term, c, need in zip(per_token, coefficients, needed)
        )
        return None, None, *grads, *terms


# --- Attention ------------------------------------------------------------------------------------


def rotary_frequencies(head_dim: int) -> Tensor:
    """(head_dim / 4,) fp64, from 1 down to 1/1024 radians a position."""
    return (1 / 1024) ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float64)


def rotary_tables(
    frequencies: Tensor, num_positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position times frequency, each (num_positions, 1, head_dim / 4) fp32."""
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None, None] * frequencies
    return angles.cos().float().to(device), angles.sin().float().to(device)


def stretch_rotary(frequencies: Tensor, old: int, new: int) -> tuple[Tensor, float]:
    """Frequencies for a window of `new` tokens after one of `old`, and a factor on the softmax
    scale. What makes 32 turns or more in the old window stays, what makes one or fewer is slowed
    down by old / new, the rest is in between.
    Source: YaRN, Peng et al. 2023, arXiv 2309.00071, whose 1 + 0.1 ln is a factor on q and on k."""
    turns = old * frequencies / (2 * math.pi)
    kept = ((turns - 1) / 31).clamp(0, 1)
    return frequencies * (old / new + kept * (1 - old / new)), 1 + 0.2 * math.log(new / old)


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
    return "varlen" if why_no_flash_attention() else "flash-attn-4"


@functools.cache
def why_no_flash_attention() -> str:
    """What importing flash-attn-4 fails with; empty if it can be used."""
    try:
        from flash_attn.cute import flash_attn_varlen_func  # noqa: F401
    except (ImportError, OSError) as error:  # missing, or without a library that it needs
        return f"{type(error).__name__}: {error}"
    return ""


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
        from flash_attn.cute import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seq_len,
            max_seqlen_k=max_seq_len, softmax_scale=scale, causal=True, window_size=(window, 0),
        )[0]  # fmt: skip
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        lengths = (cu_seqlens, cu_seqlens, max_seq_len, max_seq_len)
        return varlen_attn(q, k, v, *lengths, window_size=(window, 0), scale=scale)
    # the definition, a block of queries at a time so that memory grows with T and not with T²
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


def shift(x: Tensor, length: int) -> Tensor:
    """x (T, ...) of the previous position in sequences of that length; the first keep their own."""
    sequences = x.unflatten(0, (-1, length))
    return torch.cat([sequences[:, :1], sequences[:, :-1]], dim=1).flatten(0, 1)


# --- Around attention -----------------------------------------------------------------------------


def prepare_qkv(
    x: Tensor, w_qkv: Tensor, cos: Tensor, sin: Tensor, value: Tensor | None, fp8: QkvFp8 | None,
    key_offset: int, head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys and values, (T, heads, head_dim), of the normed stream x (T, dim) and the
    weights w_qkv (3 A, dim), where A is heads · head_dim. What follows their matmul is computed in
    fp32; results are in x's dtype.

    cos, sin: (positions, 1, head_dim / 4) fp32. value: (T, A), added to the values. key_offset: the
    tokens of a sequence, in which the half of a key that rotary leaves is that of the token before;
    0 for none. With fp8 all of it runs in kernels, and the matmuls, forward and backward, in fp8.
    """
    if fp8 is not None:
        return PrepareQkv.apply(x, w_qkv, cos, sin, value, fp8, key_offset, head_dim)
    q, k, v = widen(x @ w_qkv.mT).view(len(x), 3, -1, head_dim).unbind(1)
    q, k = rms_norm(q), rms_norm(k)
    if key_offset:
        k = torch.cat([k[..., : head_dim // 2], shift(k[..., head_dim // 2 :], key_offset)], dim=-1)
    if value is not None:
        v = v + value.view_as(v)
    q, k = (apply_rotary(z, cos[: len(x)], sin[: len(x)]) for z in (q, k))
    return q.type_as(x), k.type_as(x), v.type_as(x)


@triton.jit
def _load_head(pointer, row, stride, column, mask):
    """Columns of a head for some tokens, (tokens, HEAD_DIM) fp32."""
    return tl.load(pointer + row * stride + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _turn(x, cos, sin, row, mask, SIGN: tl.constexpr):
    """x (tokens, HEAD_DIM) with adjacent pairs in the first half of the head turned, those of the
    other half by 0; SIGN -1 turns them back."""
    PAIRS: tl.constexpr = x.shape[1] // 2
    pair = tl.arange(0, PAIRS)[None, :]
    angles, turns = row * (PAIRS // 2) + pair, mask & (pair < PAIRS // 2)
    cos_tile = tl.load(cos + angles, mask=turns, other=1.0)
    sin_tile = SIGN * tl.load(sin + angles, mask=turns, other=0.0)
    even, odd = tl.split(tl.reshape(x, (x.shape[0], PAIRS, 2)))
    pairs = tl.join(even * cos_tile - odd * sin_tile, even * sin_tile + odd * cos_tile)
    return tl.reshape(pairs, x.shape)


@triton.jit
def _norm_factor(x):
    """What takes heads to their RMS norm, (tokens, 1)."""
    return tl.rsqrt(tl.sum(x * x, 1) / x.shape[1] + EPS)[:, None]


@triton.jit
def _norm_gradient(grad, x):
    """Gradient of heads from that of their RMS norm."""
    factor = _norm_factor(x)
    x *= factor
    return factor * (grad - x * (tl.sum(grad * x, 1) / x.shape[1])[:, None])


@triton.jit
def _prepare_qkv_kernel(
    qkv, cos, sin, value, q, k, v, num_tokens, length, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    KEY_OFFSET: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    DIM: tl.constexpr = HEADS * HEAD_DIM
    row = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
    part = tl.arange(0, HEAD_DIM)[None, :]
    mask, column = row < num_tokens, tl.program_id(0) * HEAD_DIM + part
    out = row * DIM + column

    tile = _load_head(qkv, row, 3 * DIM, 2 * DIM + column, mask)
    if value is not None:
        tile += _load_head(value, row, DIM, column, mask)
    tl.store(v + out, tile, mask=mask)

    tile = _load_head(qkv, row, 3 * DIM, column, mask)
    tile *= _norm_factor(tile)
    tl.store(q + out, _turn(tile, cos, sin, row, mask, 1), mask=mask)

    tile = _load_head(qkv, row, 3 * DIM, DIM + column, mask)
    tile *= _norm_factor(tile)
    if KEY_OFFSET:
        before = tl.where(row % length == 0, row, row - 1)
        earlier = _load_head(qkv, before, 3 * DIM, DIM + column, mask)
        tile = tl.where(part < HEAD_DIM // 2, tile, earlier * _norm_factor(earlier))
    tl.store(k + out, _turn(tile, cos, sin, row, mask, 1), mask=mask)


@triton.jit
def _store_gradient(tile, column, target, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """Write columns of a head both ways round. Gives the largest."""
    dqkv, dqkv_t, row, mask, num_tokens = target
    values = tl.clamp(tile, -LIMIT, LIMIT).to(dqkv.dtype.element_ty)
    tl.store(dqkv + row * WIDTH + column, values, mask=mask)
    at_t = tl.trans(column) * num_tokens + tl.trans(row)
    tl.store(dqkv_t + at_t, _transposed(values), mask=tl.trans(mask))
    return _largest(tile)


@triton.jit(do_not_specialize_on_alignment=["largest"])
def _prepare_qkv_backward_kernel(
    dq, dk, dv, qkv, cos, sin, dqkv, dqkv_t, scale, largest, num_tokens, length,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, KEY_OFFSET: tl.constexpr, LIMIT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    DIM: tl.constexpr = HEADS * HEAD_DIM
    row = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
    part = tl.arange(0, HEAD_DIM)[None, :]
    mask, column = row < num_tokens, tl.program_id(0) * HEAD_DIM + part
    inverse, target = 1 / tl.load(scale), (dqkv, dqkv_t, row, mask, num_tokens)

    grad = inverse * _load_head(dv, row, DIM, column, mask)
    top = _store_gradient(grad, 2 * DIM + column, target, 3 * DIM, LIMIT)

    grad = _turn(inverse * _load_head(dq, row, DIM, column, mask), cos, sin, row, mask, -1)
    grad = _norm_gradient(grad, _load_head(qkv, row, 3 * DIM, column, mask))
    top = tl.maximum(top, _store_gradient(grad, column, target, 3 * DIM, LIMIT))

    grad = inverse * _load_head(dk, row, DIM, column, mask)
    if KEY_OFFSET:  # the still half went to the next token, the first one's to itself too
        still = part >= HEAD_DIM // 2
        grad = tl.where(still & (row % length > 0), 0.0, grad)
        follows = mask & still & ((row + 1) % length > 0)
        grad += inverse * _load_head(dk, row + 1, DIM, column, follows)
    grad = _turn(grad, cos, sin, row, mask, -1)
    grad = _norm_gradient(grad, _load_head(qkv, row, 3 * DIM, DIM + column, mask))
    top = tl.maximum(top, _store_gradient(grad, DIM + column, target, 3 * DIM, LIMIT))
    tl.atomic_max(largest, top * tl.load(scale))


def qkv_gradient(
    grads: Sequence[Tensor], qkv: Tensor, cos: Tensor, sin: Tensor, fp8: QkvFp8, key_offset: int
) -> Fp8:
    """The gradient of QKV's matmul (T, 3 A) in fp8, from those of queries, keys and values."""
    num_tokens, heads, head_dim = grads[0].shape
    dqkv = fp8_empty(qkv.shape, fp8.grad.scale)
    # a row of a transposed tile is a sector of memory
    _prepare_qkv_backward_kernel[heads, triton.cdiv(num_tokens, 32)](
        *map(packed, grads), qkv, cos, sin, *dqkv, fp8.grad.largest, num_tokens, key_offset,
        heads, head_dim, key_offset > 0, LIMIT=torch.finfo(dqkv.rows.dtype).max, TILE=32,
    )  # fmt: skip
    return dqkv


class PrepareQkv(torch.autograd.Function):
    """prepare_qkv by kernels."""

    @staticmethod
    def forward(
        ctx, x: Tensor, w_qkv: Tensor, cos: Tensor, sin: Tensor, value: Tensor | None,
        fp8: QkvFp8, key_offset: int, head_dim: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        qkv = fp8_matmul(fp8.x, fp8.w)
        num_tokens, heads = qkv.size(0), qkv.size(1) // (3 * head_dim)
        q, k, v = (x.new_empty(num_tokens, heads, head_dim) for _ in range(3))
        # heads of 128, 16 tokens: two loads of 16 bytes for each thread of 4 warps
        _prepare_qkv_kernel[heads, triton.cdiv(num_tokens, 16)](
            qkv, cos, sin, packed(value), q, k, v, num_tokens, key_offset, heads, head_dim,
            key_offset > 0, TILE=16,
        )  # fmt: skip
        ctx.save_for_backward(qkv, cos, sin)
        ctx.fp8, ctx.key_offset, ctx.has_value = fp8, key_offset, value is not None
        return q, k, v

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        fp8 = ctx.fp8
        dqkv = qkv_gradient(grads, *ctx.saved_tensors, fp8, ctx.key_offset)
        dx, dw = fp8_matmul(dqkv, fp8.w.T), fp8_matmul(dqkv.T, fp8.x.T)
        d_value = grads[2].flatten(1) if ctx.has_value else None
        return dx, dw, None, None, d_value, None, None, None


# --- MLP ------------------------------------------------------------------------------------------


def mlp(x: Tensor, w_1: Tensor, w_2: Tensor, fp8: MlpFp8 | None = None) -> Tensor:
    """relu(x w_1ᵀ)² w_2 for x (T, dim) and weights (hidden, dim). With fp8 all of it runs in
    kernels and in fp8, forward and backward."""
    if fp8 is not None:
        return Mlp.apply(x, w_1, w_2, fp8)
    return (x @ w_1.mT).relu().square() @ w_2


# Of the MLP's matmul. Two programs of 4 warps fit on each of an H100's 132 SMs: while one stores a
# tile the other multiplies.
MLP_TILE, MLP_PROGRAMS = 128, 264


@triton.jit(do_not_specialize_on_alignment=["largest"])
def _mlp_matmul_kernel(
    a, b, square, out, out_t, scale_a, scale_b, scale_square, scale_out, largest, num_rows,
    num_columns, inner, BACKWARD: tl.constexpr, TILE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # One factor for all scales: the arithmetic on a tile takes as long as its stores.
    scale, top = tl.load(scale_a) * tl.load(scale_b), 0.0
    if BACKWARD:
        scale *= 2 * tl.sqrt(tl.load(scale_square))
    else:
        scale *= scale
    to_out = scale / tl.load(scale_out)
    across, down = tl.cdiv(num_columns, TILE), tl.cdiv(num_rows, TILE)
    # Flattened, the next tile's first loads pass by the stores; the square would want that memory.
    for tile in tl.range(tl.program_id(0), across * down, tl.num_programs(0), flatten=not BACKWARD):
        # Programs that run together share the rows of eight tiles.
        group = tile // (8 * across)
        height = tl.minimum(8, down - group * 8)
        row = (group * 8 + tile % (8 * across) % height) * TILE
        column = tile % (8 * across) // height * TILE
        total = tl.zeros((TILE, TILE), tl.float32)
        for k in range(0, inner, INNER):
            total = tl.dot(a.load([row, k]), b.load([column, k]).T, total)
        if BACKWARD:
            total *= tl.sqrt(square.load([row, column]).to(tl.float32))
            top = tl.maximum(top, tl.max(tl.abs(total)))
        else:
            total = tl.maximum(total, 0.0)
            total *= total
            top = tl.maximum(top, tl.max(total))
        values = (total * to_out).to(out.dtype)  # fp8 saturates
        out.store([row, column], values)
        # as bytes: right with Triton 3.6 and 3.7.1 in this layout, and 2 to 14 % faster than fp16
        out_t.store([column, row], tl.trans(values))
    tl.atomic_max(largest, top * scale)


def mlp_matmul(a: Fp8, b: Fp8, result: DelayedScale, square: Fp8 | None = None) -> Fp8:
    """relu(a bᵀ)² or, given that square, its gradient a bᵀ·2·sqrt(square), in fp8 with the scale of
    `result`, whose `largest` it raises. a: (rows, inner), b: (columns, inner)."""
    (rows, inner), columns = a.rows.shape, len(b.rows)
    out = fp8_empty((rows, columns), result.scale)
    tile, tile_inner = [MLP_TILE, MLP_TILE], 128 // a.rows.element_size()
    programs = min(MLP_PROGRAMS, triton.cdiv(rows, MLP_TILE) * triton.cdiv(columns, MLP_TILE))
    describe = TensorDescriptor.from_tensor
    _mlp_matmul_kernel[(programs,)](
        describe(a.rows, [MLP_TILE, tile_inner]), describe(b.rows, [MLP_TILE, tile_inner]),
        describe((square or out).rows, tile), describe(out.rows, tile), describe(out.columns, tile),
        a.scale, b.scale, (square or out).scale, *result, rows, columns, inner,
        BACKWARD=square is not None, TILE=MLP_TILE, INNER=tile_inner, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


class Mlp(torch.autograd.Function):
    """mlp by kernels; the backward rebuilds relu from its square."""

    @staticmethod
    def forward(ctx, x: Tensor, w_1: Tensor, w_2: Tensor, fp8: MlpFp8) -> Tensor:
        ctx.fp8 = fp8
        ctx.square = mlp_matmul(fp8.x, fp8.w_1, fp8.square)
        return fp8_matmul(ctx.square, fp8.w_2.T)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        fp8, square = ctx.fp8, ctx.square
        grad = quantize(grad, fp8_empty(grad.shape, fp8.grad.scale), fp8.grad.largest)
        hidden = mlp_matmul(grad, fp8.w_2, fp8.grad_hidden, square)
        d_x, d_w_1 = fp8_matmul(hidden, fp8.w_1.T), fp8_matmul(hidden.T, fp8.x.T)
        return d_x, d_w_1, fp8_matmul(square.T, grad.T), None


# --- Pointer --------------------------------------------------------------------------------------
#
# The next token is often one that the document already has. So an attention head points at earlier
# tokens, and the model predicts a mixture: with α, the share that the softmax of the logits gives
# to an entry of the vocabulary that no token has, the copy entry,
#
#     p(y) = p_rest(y) · (1 - α (1 - a_sink)) + α · a(y)
#
# p_rest is the softmax without the copy entry. a(y) is the head's attention to all earlier tokens
# that are y, and a_sink that to the sink, a learned key that stands for no token. As a(y) and
# a_sink sum to 1 over all y, so does p(y). Only the target's a(y) is ever computed in training.
# With canonical_mask, validation leaves the tokens that cannot follow out of the softmax and out of
# the keys that a query sees: then p(y) sums to 1 over those that can.
# Sources: Merity et al. 2016, arXiv 1609.07843; modded-nanogpt, pull request 379.

POINTER_DIM = 128  # of queries and keys
POINTER_REACH = 8192  # how many tokens back it sees; training documents are shorter


class PointerShares(NamedTuple):
    """What parts of a position's attention go to earlier tokens that are its target, and to the
    sink."""

    target: Tensor  # (T,) fp32
    sink: Tensor  # (T,) fp32


class ExtraKeys(NamedTuple):
    """Keys of a position besides those of its document, by what its query makes of them."""

    scores: Tensor  # (T, n) fp32, -inf where there is no key
    tokens: Tensor  # (T, n) int64, which each stands for


def document_bounds(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Where the document of each token begins and ends, (T,) int32."""
    position = torch.arange(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
    following = torch.searchsorted(cu_seqlens, position, right=True)
    return cu_seqlens[following - 1], cu_seqlens[following]


def pointer_shares(
    q: Tensor, k: Tensor, sink: Tensor, tokens: Tensor, targets: Tensor, starts: Tensor,
    ends: Tensor, reach: int, impossible: Tensor | None = None, extra: ExtraKeys | None = None,
) -> PointerShares:  # fmt: skip
    """Attention of every position to the sink, to strictly earlier tokens of its document, at most
    `reach` back, and to keys of its own; a key at j stands for token j.

    q, k: (T, dim), dim a power of two. sink: (dim,) fp32, its key. tokens: (T,) int32; targets:
    (T,) int64; starts, ends: (T,) int32, as document_bounds gives them. impossible: as
    cannot_follow takes it; keys whose token cannot follow the query's are then not seen either.
    With it the kernel has no gradient.
    """
    if takes_kernel(q):
        inputs = q, k, sink, tokens, targets, starts, ends, reach, impossible
        target_share, sink_share, lse = Pointer.apply(*inputs)
        if extra is None:
            return PointerShares(target_share, sink_share)
        attention = torch.cat([lse[:, None], extra.scores], 1).softmax(1)
        of_document, of_extra = attention[:, 0], attention[:, 1:]
        on_target = (of_extra * (extra.tokens == targets[:, None])).sum(1)
        return PointerShares(of_document * target_share + on_target, of_document * sink_share)
    shares = []
    for begin in range(0, len(q), 256):  # queries at once, so that memory grows with T, not T²
        queries, keys = slice(begin, begin + 256), slice(max(0, begin - reach), begin + 256)
        own = queries, keys, impossible, extra
        attention = pointer_attention(q, k, sink, tokens, starts, reach, *own)
        stands_for = tokens[None, keys].long().expand(len(attention), -1)
        if extra is not None:
            stands_for = torch.cat([stands_for, extra.tokens[queries]], 1)
        is_target = stands_for == targets[queries, None]
        shares.append(((attention[:, 1:] * is_target).sum(1), attention[:, 0]))
    return PointerShares(*map(torch.cat, zip(*shares)))


def pointer_attention(
    q: Tensor, k: Tensor, sink: Tensor, tokens: Tensor, starts: Tensor, reach: int,
    queries: slice, keys: slice, impossible: Tensor | None = None, extra: ExtraKeys | None = None,
) -> Tensor:  # fmt: skip
    """How the attention of these queries is divided among the sink, which comes first, these keys,
    and at the end n keys of their own; (queries, 1 + keys + n), fp32 or fp64."""
    position = torch.arange(len(q), device=q.device)
    query, key, start = position[queries, None], position[None, keys], starts[queries, None]
    visible = (key < query) & (key >= start) & (query - key <= reach)
    if impossible is not None:
        visible &= ~cannot_follow(impossible, tokens[queries, None], tokens[None, keys])
    scores = widen(q[queries] @ k[keys].mT).masked_fill(~visible, -math.inf)
    of_sink = widen(q[queries]) @ sink
    scores = torch.cat([of_sink[:, None], scores], 1) / math.sqrt(q.size(1))
    if extra is not None:
        scores = torch.cat([scores, extra.scores[queries]], 1)
    return scores.softmax(1)


@triton.jit
def _load_tile(x, row, stride, num_rows, DIM: tl.constexpr):
    """Rows of x, (rows, DIM); zeros behind its end."""
    place = row[:, None] * stride + tl.arange(0, DIM)[None, :]
    return tl.load(x + place, mask=(row < num_rows)[:, None], other=0.0)


@triton.jit
def _is_visible(query, key, start, reach):
    """Whether a query sees a key, both by position; start: of the query's document."""
    return (key < query) & (key >= start) & (query - key <= reach)


@triton.jit
def _score_gradient(scores, visible, is_target, lse, d_target, mean):
    """Of the softmax: share · (gradient of the share - the mean of these)."""
    gradient = tl.exp2(scores - lse) * (tl.where(is_target, d_target, 0.0) - mean)
    return tl.where(visible, gradient, 0.0)


# Scores are to base 2, so that exp2 takes them.


@triton.jit(do_not_specialize_on_alignment=["sink"])
def _pointer_kernel(
    q, k, sink, tokens, targets, starts, impossible, target_share, sink_share, lse, num_tokens,
    stride_q, stride_k, reach, row_bytes, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of queries, and the keys from the start of the first one's document on. row_bytes: of
    impossible, which may be None."""
    SCALE: tl.constexpr = LOG2_E / DIM**0.5
    begin = tl.program_id(0) * TILE
    row = begin + tl.arange(0, TILE)
    real = row < num_tokens
    q_tile = _load_tile(q, row, stride_q, num_tokens, DIM)
    start = tl.load(starts + row, mask=real, other=num_tokens)[:, None]
    target = tl.load(targets + row, mask=real, other=-1)[:, None]
    sink_key = tl.load(sink + tl.arange(0, DIM))[None, :]
    of_sink = tl.sum(q_tile.to(tl.float32) * sink_key, 1) * SCALE
    own_token = tl.load(tokens + row, mask=real, other=0).to(tl.int64)[:, None]
    # sums over the sink and the keys so far, of 2^(score - highest)
    highest, total = of_sink, tl.full((TILE,), 1.0, tl.float32)
    on_target = tl.zeros((TILE,), tl.float32)
    for first in range(tl.maximum(tl.load(starts + begin), begin - reach), begin + TILE, TILE):
        column = first + tl.arange(0, TILE)
        k_tile = _load_tile(k, column, stride_k, num_tokens, DIM)
        token = tl.load(tokens + column, mask=column < num_tokens, other=-2)[None, :]
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3") * SCALE
        visible = _is_visible(row[:, None], column[None, :], start, reach)
        if impossible is not None:
            place, visible = own_token * row_bytes + token // 8, visible & real[:, None]
            bits = tl.load(impossible + place, mask=visible, other=0) >> token % 8
            visible &= (bits & 1) == 0
        scores = tl.where(visible, scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrink, shares = tl.exp2(highest - higher), tl.exp2(scores - higher[:, None])
        on_target = on_target * shrink + tl.sum(tl.where(token == target, shares, 0.0), 1)
        total = total * shrink + tl.sum(shares, 1)
        highest = higher
    tl.store(target_share + row, on_target / total, mask=real)
    tl.store(sink_share + row, tl.exp2(of_sink - highest) / total, mask=real)
    tl.store(lse + row, highest + tl.log2(total), mask=real)


@triton.jit(do_not_specialize_on_alignment=["sink"])
def _pointer_queries_kernel(
    q, k, sink, tokens, targets, starts, lse, d_target, mean, d_of_sink, d_q, num_tokens, stride_q,
    stride_k, reach, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries, from the same keys as _pointer_kernel."""
    SCALE: tl.constexpr = LOG2_E / DIM**0.5
    begin = tl.program_id(0) * TILE
    row = begin + tl.arange(0, TILE)
    real = row < num_tokens
    q_tile = _load_tile(q, row, stride_q, num_tokens, DIM)
    start = tl.load(starts + row, mask=real, other=num_tokens)[:, None]
    target = tl.load(targets + row, mask=real, other=-1)[:, None]
    own_lse = tl.load(lse + row, mask=real, other=0.0)[:, None]
    own_d_target = tl.load(d_target + row, mask=real, other=0.0)[:, None]
    own_mean = tl.load(mean + row, mask=real, other=0.0)[:, None]
    own_d_of_sink = tl.load(d_of_sink + row, mask=real, other=0.0)[:, None]
    total = own_d_of_sink * tl.load(sink + tl.arange(0, DIM))[None, :]
    for first in range(tl.maximum(tl.load(starts + begin), begin - reach), begin + TILE, TILE):
        column = first + tl.arange(0, TILE)
        k_tile = _load_tile(k, column, stride_k, num_tokens, DIM)
        token = tl.load(tokens + column, mask=column < num_tokens, other=-2)[None, :]
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3") * SCALE
        visible = _is_visible(row[:, None], column[None, :], start, reach)
        slope = _score_gradient(
            scores, visible, token == target, own_lse, own_d_target, own_mean
        ).to(k_tile.dtype)
        total = tl.dot(slope, k_tile, total, input_precision="tf32x3")
    place = row[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(d_q + place, total / DIM**0.5, mask=real[:, None])


@triton.jit
def _pointer_keys_kernel(
    q, k, tokens, targets, starts, ends, lse, d_target, mean, d_k, num_tokens, stride_q, stride_k,
    reach, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of keys, from the queries up to the end of the last one's document."""
    SCALE: tl.constexpr = LOG2_E / DIM**0.5
    begin = tl.program_id(0) * TILE
    column = begin + tl.arange(0, TILE)
    k_tile = _load_tile(k, column, stride_k, num_tokens, DIM)
    token = tl.load(tokens + column, mask=column < num_tokens, other=-2)[:, None]
    total = tl.zeros((TILE, DIM), tl.float32)
    last = tl.minimum(begin + TILE, num_tokens) - 1
    for first in range(begin, tl.minimum(tl.load(ends + last), last + reach + 1), TILE):
        row = first + tl.arange(0, TILE)
        real = row < num_tokens
        q_tile = _load_tile(q, row, stride_q, num_tokens, DIM)
        start = tl.load(starts + row, mask=real, other=num_tokens)[None, :]
        target = tl.load(targets + row, mask=real, other=-1)[None, :]
        own_lse = tl.load(lse + row, mask=real, other=0.0)[None, :]
        own_d_target = tl.load(d_target + row, mask=real, other=0.0)[None, :]
        own_mean = tl.load(mean + row, mask=real, other=0.0)[None, :]
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="tf32x3") * SCALE
        visible = _is_visible(row[None, :], column[:, None], start, reach)
        slope = _score_gradient(
            scores, visible, token == target, own_lse, own_d_target, own_mean
        ).to(q_tile.dtype)
        total = tl.dot(slope, q_tile, total, input_precision="tf32x3")
    place = column[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(d_k + place, total / DIM**0.5, mask=(column < num_tokens)[:, None])


class Pointer(torch.autograd.Function):
    """pointer_shares by kernels, without extra keys, and the log of the sum over the sink and the
    keys of exp(score). A tile of queries visits the keys of its documents alone, and a tile of keys
    likewise; all sums are made in a fixed order."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, sink: Tensor, tokens: Tensor, targets: Tensor, starts: Tensor,
        ends: Tensor, reach: int, impossible: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        num_tokens, dim = q.shape
        target_share, sink_share, lse = (
            q.new_empty(num_tokens, dtype=torch.float32) for _ in range(3)
        )
        ctx.sizes = num_tokens, row_stride(q), row_stride(k), reach
        ctx.grid, ctx.kinds = (triton.cdiv(num_tokens, 64),), {"DIM": dim, "TILE": 64}
        row_bytes = 0 if impossible is None else row_stride(impossible)
        _pointer_kernel[ctx.grid](
            q, k, sink, tokens, targets, starts, impossible, target_share, sink_share, lse,
            *ctx.sizes, row_bytes, **ctx.kinds,
            num_warps=4 if impossible is None else 8,  # with it 4 would lack registers
        )  # fmt: skip
        outputs = target_share, sink_share, lse / LOG2_E.value
        if impossible is not None:  # the other kernels would see the keys that this one leaves out
            ctx.mark_non_differentiable(*outputs)
        inputs = q, k, sink, tokens, targets, starts, ends
        ctx.save_for_backward(*inputs, target_share, sink_share, lse)
        return outputs

    @staticmethod
    def backward(ctx, d_target: Tensor, d_sink: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, sink, tokens, targets, starts, ends, target_share, sink_share, lse = ctx.saved_tensors
        mean = d_target * target_share + d_sink * sink_share - d_lse
        d_of_sink = sink_share * (d_sink - mean)
        d_q, d_k = (x.new_empty(x.shape) for x in (q, k))
        own = lse, packed(d_target), mean
        _pointer_queries_kernel[ctx.grid](
            q, k, sink, tokens, targets, starts, *own, d_of_sink, d_q, *ctx.sizes, **ctx.kinds
        )
        _pointer_keys_kernel[ctx.grid](
            q, k, tokens, targets, starts, ends, *own, d_k, *ctx.sizes, **ctx.kinds
        )
        d_sink_key = (d_of_sink.type_as(q) @ q).type_as(sink) / math.sqrt(q.size(1))
        return d_q, d_k, d_sink_key, *[None] * 6


# --- Head -----------------------------------------------------------------------------------------


CAP, CAP_SHIFT, CAP_SCALE = map(tl.constexpr, (23.0, 5.0, 7.5))


def softcap(logits: Tensor) -> Tensor:
    """Logits between 0 and CAP, fp32."""
    return CAP.value * torch.sigmoid((widen(logits) + CAP_SHIFT.value) / CAP_SCALE.value)


def head_loss(
    x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, fp8: HeadFp8 | None,
    offsets: Tensor | None, shares: PointerShares,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums over tokens of cross-entropies of the softcapped logits, 0-d fp32, in nats: of all terms
    by weight, and of the first alone, which has no gradient.

    x: (T, dim), head: (vocab, dim). targets: (T, terms + 1) int64, IGNORED_TARGET where there is
    none, the last column the copy entry; weights: (terms,) fp32. offsets: (vocab,) fp32, added to
    the logits in the softmax's denominator alone. shares: the pointer's, whose mixture the first
    term predicts by. With fp8 all of it runs in kernels, and all matmuls in fp8, forward and
    backward.
    """
    if fp8 is not None:
        return HeadLoss.apply(x, head, targets, weights, fp8, offsets, *shares)
    losses = token_losses(x @ head.mT, targets, offsets, shares).sum(0)
    return losses @ weights, losses[0].detach()


def cannot_follow(impossible: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Whether tokens `second` are impossible behind tokens `first`; bool of the shape that the two
    broadcast to. impossible: (vocab, vocab / 8) uint8, as impossible_pairs gives it."""
    return (impossible[first, second // 8] >> (second % 8).to(torch.uint8) & 1).bool()


def token_losses(
    logits: Tensor, targets: Tensor, offsets: Tensor | None, shares: PointerShares,
    left_out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Cross-entropies of the softcapped logits, (T, terms) in nats, 0 where there is no target;
    targets, offsets and shares as head_loss takes them. left_out: (T, vocab) bool, entries whose
    probability is 0; as a target they have an infinite loss."""
    logits, scored = softcap(logits), targets >= 0
    if left_out is not None:
        logits = logits.masked_fill(left_out, -math.inf)
    of_entries = logits if offsets is None else logits + offsets
    # The copy entry is added to a sum of the others: of few tokens that are not left out it may be
    # all but 1, and 1 - copy nothing.
    is_copy = torch.arange(logits.size(1), device=logits.device) == targets[:, -1:]
    lse_rest = of_entries.masked_fill(is_copy, -math.inf).logsumexp(1)
    columns = targets.clamp_min(0)
    of_copy = of_entries.gather(1, columns[:, -1:]).masked_fill(~scored[:, -1:], -math.inf)
    lse = torch.logaddexp(lse_rest, of_copy[:, 0])
    chosen = logits.gather(1, columns)
    losses = (lse[:, None] - chosen).masked_fill(~scored, 0.0)
    copy, rest = (-losses[:, -1]).exp(), (lse_rest - lse).exp()
    p_rest = (chosen[:, 0] - lse_rest).exp()
    mixture = p_rest * (rest + copy * shares.sink) + copy * shares.target
    mixture = mixture.masked_fill(~scored[:, 0], 1.0)
    return torch.cat([-mixture.log()[:, None], losses[:, 1:-1]], 1)


@triton.jit
def _sigmoid_of_logits(logits, APPROXIMATE: tl.constexpr):
    """softcap / CAP; APPROXIMATE: by the GPU's own tanh, with an error of 2^-11."""
    x = (logits.to(tl.float32) + CAP_SHIFT) * (0.5 / CAP_SCALE)
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
        # The sum of 50,000 times e^CAP at most: fp32 needs no maximum taken out.
        tile = CAP * _sigmoid_of_logits(tile, APPROXIMATE)
        if offsets is not None:
            tile += tl.load(offsets + column, mask=column < vocab, other=0.0)
        tile = tl.exp(tile)
        total += tl.where(column < vocab, tile, 0.0)
    tl.store(lse + row, tl.log(tl.sum(total)))


@triton.jit
def _share_of(logits, lse, row, vocab, column, mask, APPROXIMATE: tl.constexpr):
    """Of a column of each row in the softmax."""
    tile = tl.load(logits + row * vocab + column, mask=mask, other=0.0)
    return tl.exp(_sigmoid_of_logits(tile, APPROXIMATE) * CAP - lse)


@triton.jit
def _mixture_kernel(
    logits, lse, targets, weights, target_share, sink_share, row_weights, weight_sum, losses,
    d_target_share, d_sink_share, num_rows, vocab, TERMS: tl.constexpr, APPROXIMATE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The losses, weighted and of the first term, and their gradients by the pointer's shares. The
    gradient by the logits is that of cross-entropies of all columns of targets, the copy entry
    among them, with weights that differ from row to row: these it leaves in row_weights, and their
    sums in weight_sum."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = row < num_rows
    own_lse = tl.load(lse + row, mask=real, other=0.0)
    to_target = tl.load(target_share + row, mask=real, other=0.0)
    to_sink = tl.load(sink_share + row, mask=real, other=0.0)
    target = tl.load(targets + row * TERMS, mask=real, other=-1)
    copy = tl.load(targets + row * TERMS + (TERMS - 1), mask=real, other=0)
    scored = target >= 0
    p = _share_of(logits, own_lse, row, vocab, target, scored, APPROXIMATE)
    copy = _share_of(logits, own_lse, row, vocab, copy, real, APPROXIMATE)
    # 1 - copy is at least 5e-6 in a vocabulary of 50,000, as logits go from 0 to CAP
    odds = copy / (1 - copy)
    from_logits = p * (1 + odds * to_sink)
    mixture = from_logits + copy * to_target
    loss = tl.where(scored, -tl.log(mixture), 0.0)
    weight = tl.where(scored, tl.load(weights), 0.0)
    by_mixture = weight / mixture
    of_first = by_mixture * from_logits
    of_copy = by_mixture * (copy * to_target + p * odds * to_sink / (1 - copy))
    tl.store(row_weights + row * TERMS, of_first, mask=real)
    tl.store(row_weights + row * TERMS + (TERMS - 1), of_copy, mask=real)
    tl.store(d_target_share + row, -by_mixture * copy, mask=real)
    tl.store(d_sink_share + row, -by_mixture * p * odds, mask=real)
    weighted, total = weight * loss, of_first + of_copy
    for term in tl.static_range(1, TERMS - 1):
        target = tl.load(targets + row * TERMS + term, mask=real, other=-1)
        p = _share_of(logits, own_lse, row, vocab, target, target >= 0, APPROXIMATE)
        weight = tl.where(target >= 0, tl.load(weights + term), 0.0)
        tl.store(row_weights + row * TERMS + term, weight, mask=real)
        weighted -= weight * tl.log(p)
        total += weight
    tl.store(weight_sum + row, total, mask=real)
    tl.store(losses + row, weighted, mask=real)
    tl.store(losses + num_rows + row, loss, mask=real)


@triton.jit
def _logits_gradient_kernel(
    logits, offsets, lse, weight_sum, grad, grad_t, scale, num_rows, vocab,
    APPROXIMATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All of the gradient but what the targets add to it."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = row < num_rows
    inside = real[:, None] & (column < vocab)[None, :]
    factor = tl.load(weight_sum + row, mask=real, other=0.0) * (CAP / CAP_SCALE) / tl.load(scale)
    shift = tl.load(lse + row, mask=real, other=0.0)
    tile = tl.load(logits + row[:, None] * vocab + column[None, :], mask=inside, other=0.0)
    tile = _sigmoid_of_logits(tile, APPROXIMATE)
    tile = tl.exp2(tile * (CAP * LOG2_E) - (shift * LOG2_E)[:, None]) * (tile - tile * tile)
    if offsets is not None:
        tile *= tl.exp(tl.load(offsets + column, mask=column < vocab, other=0.0))[None, :]
    tile *= factor[:, None]
    tile = tile.to(grad.dtype.element_ty)
    tl.store(grad + row[:, None] * vocab + column[None, :], tile, mask=inside)
    at_t = column[:, None].to(tl.int64) * num_rows + row[None, :]
    tl.store(grad_t + at_t, _transposed(tile), mask=tl.trans(inside))


@triton.jit
def _targets_kernel(
    logits, offsets, lse, targets, weights, weight_sum, grad, grad_t, scale, num_rows, vocab,
    TERMS: tl.constexpr, APPROXIMATE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient in the targets' columns."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = row < num_rows
    shift = tl.load(lse + row, mask=real, other=0.0)
    all_weights = tl.load(weight_sum + row, mask=real, other=0.0)
    for term in tl.static_range(TERMS):
        target = tl.load(targets + row * TERMS + term, mask=real, other=-1).to(tl.int64)
        scored = target >= 0
        tile = tl.load(logits + row * vocab + target, mask=scored, other=0.0)
        tile = _sigmoid_of_logits(tile, APPROXIMATE)
        likely = CAP * tile - shift
        if offsets is not None:
            likely += tl.load(offsets + target, mask=scored, other=0.0)
        values = all_weights * tl.exp(likely)
        for other in tl.static_range(TERMS):  # two terms may have the same target
            same = tl.load(targets + row * TERMS + other, mask=real, other=-1) == target
            weight = tl.load(weights + row * TERMS + other, mask=real, other=0.0)
            values -= tl.where(same, weight, 0.0)
        values = values * (CAP / CAP_SCALE) / tl.load(scale) * tile * (1 - tile)
        values = values.to(grad.dtype.element_ty)
        tl.store(grad + row * vocab + target, values, mask=scored)
        tl.store(grad_t + target * num_rows + row, values, mask=scored)


def losses_and_slope(
    logits: Tensor, targets: Tensor, weights: Tensor, scale: Tensor, offsets: Tensor | None,
    shares: PointerShares,
) -> tuple[Tensor, Fp8, PointerShares]:  # fmt: skip
    """The losses of every row, (2, T) fp32: of all terms by weight, and of the first alone; and the
    gradients of the former by the logits (T, vocab), in fp8 with this scale, and by the shares."""
    (num_rows, terms), vocab = targets.shape, logits.size(1)
    slope = fp8_empty(logits.shape, scale, E5M2)
    losses, row_weights, lse, weight_sum = (
        logits.new_empty(size, dtype=torch.float32)
        for size in ((2, num_rows), (num_rows, terms), num_rows, num_rows)
    )
    d_shares = PointerShares(*(share.new_empty(num_rows) for share in shares))
    kinds = {"APPROXIMATE": logits.is_cuda, "ROWS": 128}
    # 128 rows of a transposed fp8 tile are whole lines of memory.
    grid = (triton.cdiv(num_rows, 128), triton.cdiv(vocab, 64))
    targets, result = packed(targets), (*slope, num_rows, vocab)
    _lse_kernel[(num_rows,)](
        logits, offsets, lse, vocab, APPROXIMATE=logits.is_cuda, BLOCK=2048, num_warps=8
    )
    _mixture_kernel[grid[:1]](
        logits, lse, targets, weights, *shares, row_weights, weight_sum, losses, *d_shares,
        num_rows, vocab, TERMS=terms, **kinds,
    )  # fmt: skip
    _logits_gradient_kernel[grid](
        logits, offsets, lse, weight_sum, *result, COLUMNS=64, num_warps=4, **kinds
    )
    _targets_kernel[grid[:1]](
        logits, offsets, lse, targets, row_weights, weight_sum, *result, TERMS=terms, **kinds
    )
    return losses, slope, d_shares


class HeadLoss(torch.autograd.Function):
    """head_loss by kernels; the forward makes the gradient of the logits too."""

    @staticmethod
    def forward(
        ctx, x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, fp8: HeadFp8,
        offsets: Tensor | None, *shares: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x8 = quantize(x, fp8_empty(x.shape, fp8.scale_x), clipped=fp8.clipped)
        logits = fp8_matmul(x8, fp8.weight)
        losses, slope, ctx.d_shares = losses_and_slope(
            logits, targets, weights, fp8.scale_grad, offsets, PointerShares(*shares)
        )
        ctx.factors = slope, x8, fp8.weight
        weighted, first = losses.sum(1).unbind()
        ctx.mark_non_differentiable(first)
        ctx.set_materialize_grads(False)
        return weighted, first

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
        slope, x, weight = ctx.factors
        slope = slope._replace(scale=slope.scale * grad)  # the loss's own gradient
        d_x, d_head = fp8_matmul(slope, weight.T), fp8_matmul(slope.T, x.T)
        return d_x, d_head, None, None, None, None, *(share * grad for share in ctx.d_shares)


class Candidates(NamedTuple):
    """The tokens of the vocabulary that the loss of some positions is computed on."""

    tokens: Tensor | None  # (candidates,) int64, each once; None for all
    offsets: Tensor | None  # (candidates,) fp32, as head_loss takes them
    targets: Tensor  # like those given, as places among the candidates


def sample_candidates(targets: Tensor, proposal: Tensor, count: int) -> Candidates:
    """`count` candidates: all targets, and other tokens, of which those with a large proposal,
    (vocab,) fp32, come more often.

    Those with the largest priorities are taken: a token's proposal over a number from 0 to 1 that
    is a hash of the targets and the token, the same on whichever rank. A candidate stands for as
    many tokens as the largest priority that is left out is above its proposal, for itself at least;
    with the log of that as its offset the softmax's denominator is estimated without bias. `count`
    or more distinct targets give NaN. Sources: Jean et al. 2015, arXiv 1412.2007, section 3;
    Duffield et al. 2007, JACM 54, Priority sampling, theorem 1.
    """
    vocab, device = len(proposal), targets.device
    token = torch.arange(vocab, device=device)
    # IGNORED_TARGET, -1, becomes vocab: a place behind the end, which is cut off
    flat = targets.flatten() % (vocab + 1)
    is_target = torch.zeros(vocab + 1, device=device).scatter_(0, flat, 1.0)[:vocab] > 0
    # one number above 0 and below 1 a token, from 24 bits of a hash
    seed = (flat * torch.arange(1, len(flat) + 1, device=device)).sum()
    key = mix(token * MIX_2 + seed) * MIX_2
    uniform = ((key >> 40).float() + 2**23 + 0.5) / 2**24
    # targets come first; a last priority of 0 is left out when all tokens are taken
    priority = F.pad(torch.where(is_target, math.inf, proposal / uniform), (0, 1))
    priority, tokens = priority.sort(descending=True, stable=True)
    tokens, threshold = tokens[:count], priority[count]
    # a target is certain to be taken, and stands for itself
    offsets = (threshold / proposal[tokens]).clamp_min(1.0).log()
    offsets = torch.where(is_target[tokens], 0.0, offsets)
    if count < vocab:  # too many targets leave nothing to estimate the others by
        offsets = torch.where(priority[count - 1] < math.inf, offsets, math.nan)
    # of IGNORED_TARGET, -1, the last entry: IGNORED_TARGET again
    candidate_of_token = torch.full((vocab + 1,), IGNORED_TARGET, device=device)
    candidate_of_token.scatter_(0, tokens, torch.arange(count, device=device))
    return Candidates(tokens, offsets, candidate_of_token[targets])


@compiled
def next_token_loss(
    x: Tensor, head: Tensor, targets: Tensor, shares: PointerShares, tokens: Tensor | None = None,
    impossible: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The sum over tokens of the mixture's cross-entropy, fp32; x (T, dim), targets (T, 2) int64,
    the second column the copy entry, and the pointer's shares.

    impossible: as cannot_follow takes it. The softmax is then over what can follow the tokens, (T,)
    int32, and the shares are of that too; a target that cannot makes the sum infinite.
    """
    left_out, total, column = None, 0.0, torch.arange(len(head), device=x.device)
    for begin in range(0, len(x), 4096):  # of logits, 0.8 GB
        chunk = slice(begin, begin + 4096)
        own = PointerShares(*(share[chunk] for share in shares))
        if impossible is not None:
            left_out = cannot_follow(impossible, tokens[chunk, None], column)
        losses = token_losses(x[chunk] @ head.mT, targets[chunk], None, own, left_out)
        total += losses[:, 0].sum()
    return total


# --- Tables ---------------------------------------------------------------------------------------


class SortedRows(NamedTuple):
    """Row numbers in order, so that all that goes to one row of a table is together: a run. Of the
    rows 7 2 7 9 7, for instance:

        rows       2  7  7  7  9
        order      1  0  2  4  3       values[1] goes to row 2, values[0], [2] and [4] to row 7
        run_start  0  1  4  5  5  5    run 1 is 1 to 4
        run_of     0  1  1  1  2
        num_runs   3
    """

    rows: Tensor  # (n,) sorted
    order: Tensor  # (n,) where each came from
    run_start: Tensor  # (n + 1,) of the runs of equal rows; n behind the last one
    run_of: Tensor  # (n,) which run each is in
    num_runs: Tensor  # (1,)

    @classmethod
    def of_distinct(cls, rows: Tensor, place: Tensor) -> "SortedRows":
        """Of rows that come once each, in any order; place: 0 … n."""
        return cls(rows, place[:-1], place, place[:-1], place[-1:])


def sort_rows(rows: Tensor) -> SortedRows:
    rows, order = rows.sort(stable=True)
    begins = F.pad(rows[1:] != rows[:-1], (1, 0), value=True)
    run_of, position = begins.cumsum(0) - 1, torch.arange(len(rows), device=rows.device)
    run_start = torch.full((len(rows) + 1,), len(rows), device=rows.device)
    # what begins no run goes behind the end, where n stands anyway
    places = torch.where(begins, run_of, len(rows))
    run_start.scatter_(0, places, torch.where(begins, position, len(rows)))
    return SortedRows(rows, order, run_start, run_of, num_runs=run_of[-1:] + 1)


@triton.jit
def _add_run(total, values, order, at, end, stride, column, inside, ROWS: tl.constexpr):
    """total, (BLOCK,) fp32, with the values of a run from its place `at` on; ROWS at a time."""
    while at < end:
        place = at + tl.arange(0, ROWS)
        source = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
        mask = (place < end)[:, None] & inside[None, :]
        tile = tl.load(values + source[:, None] * stride + column[None, :], mask=mask, other=0)
        total += tl.sum(tile.to(tl.float32), axis=0)
        at += ROWS
    return total


@triton.jit
def _add_to_row(table, rows, order, values, stride, at, end, dim, column, ROWS: tl.constexpr):
    """Add a run's values to its row, in these columns."""
    inside = column < dim
    target = table + tl.load(rows + at).to(tl.int64) * dim + column
    total = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    total = _add_run(total, values, order, at, end, stride, column, inside, ROWS)
    tl.store(target, total, mask=inside)


@triton.jit
def _add_rows_kernel(
    tables, rows, order, values, strides, run_start, run_of, num_runs, dim, SHORT: tl.constexpr,
    LONG: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Two kinds of programs. The first SHORT take every SHORT-th run, if it is shorter than LONG,
    and whole rows. Of those behind them there is one for every multiple of LONG among the places
    and every PART of a row: a run of LONG or more covers such a place, and the first that it covers
    takes the run. With SHORT 4096, LONG 32 and two parts a row, run 1 of places 5 to 80 covers 32
    and 64: program 4096 + 2 adds the left half of its row and 4096 + 3 the right one, and the two
    of place 64 do nothing; program 1 leaves it to them."""
    program = tl.program_id(0)
    for i in tl.static_range(len(tables)):
        if tl.program_id(1) == i:
            if program < SHORT:
                for run in range(program, tl.load(num_runs), SHORT):
                    at, end = tl.load(run_start + run), tl.load(run_start + run + 1)
                    if end - at < LONG:
                        column = tl.arange(0, BLOCK)
                        _add_to_row(
                            tables[i], rows, order, values[i], strides[i], at, end, dim, column, 4
                        )
            else:
                parts = tl.cdiv(dim, PART)
                place, part = (program - SHORT) // parts * LONG, (program - SHORT) % parts
                run = tl.load(run_of + place)
                at, end = tl.load(run_start + run), tl.load(run_start + run + 1)
                if (end - at >= LONG) & (place - at < LONG):
                    column = part * PART + tl.arange(0, PART)
                    _add_to_row(
                        tables[i], rows, order, values[i], strides[i], at, end, dim, column, 32
                    )


def add_rows_(tables: Sequence[Tensor], rows: SortedRows, values: Sequence[Tensor]) -> None:
    """Add values (n, dim), of which rows.order names one for each of the sorted rows, to rows of a
    table (rows, dim) each, tables as wide as one another; all that goes to one row is summed in
    fp32."""
    if not takes_kernel(tables[0]):
        for table, value in zip(tables, values):
            table.index_add_(0, rows.rows, value[rows.order])
        return
    count, dim = len(rows.rows), values[0].size(1)
    # Most runs are a few rows, for which a program adds whole ones; a frequent token is a run of
    # thousands, shared out by columns over programs behind those.
    short, long, part = min(count, 4096), 32, 128
    programs = short + triton.cdiv(count, long) * triton.cdiv(dim, part)
    _add_rows_kernel[programs, len(tables)](
        tuple(tables), rows.rows, rows.order, tuple(values), tuple(map(row_stride, values)),
        rows.run_start, rows.run_of, rows.num_runs, dim, SHORT=short, LONG=long,
        BLOCK=triton.next_power_of_2(dim), PART=part, num_warps=1,
    )  # fmt: skip


class TableRows(torch.autograd.Function):
    """Rows of tables that are read at the same places. Their gradients are added to table.grad in
    place, all by one kernel: no table-sized tensor is made for them."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: SortedRows | None, *tables: Tensor) -> tuple[Tensor, ...]:
        ctx.tables, ctx.order = tables, order
        ctx.rows = rows  # kept alive: the side stream, which makes `order`, may yet read them
        return tuple(F.embedding(rows, table) for table in tables)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[None, ...]:
        add_rows_([table.grad for table in ctx.tables], ctx.order, grads)
        return None, None, *(None for _ in grads)


# --- N-gram lookup --------------------------------------------------------------------------------
#
# What was read, as hash tables, one an order: the slot of the last n tokens of a document holds two
# tokens that followed contexts, with counts up to 15. Both may have followed one context, or each
# another one of those that share the slot. A token that comes again is counted. Another one takes
# away from the second one's count or, when that is used up, its place (Boyer & Moore's majority
# vote), and changes places with the first one when it has come more often. What is inserted at once
# counts once for a slot: for the token whose entry is then the largest.
#
# An entry is one int64, first << 31 | second, each half count << 27 | check << 16 | token, and 0 if
# there is none. The check is more of the context's hash: token 1,234 that came twice behind a
# context of check 5 is 268,764,370.

MAX_COUNT, CHECKS = 2**4 - 1, 2**11
SPARE_PLACES = 4096  # behind the slots of a table, always 0: read in place of what is no context
HALF_BITS, COUNT_BIT, CHECK_BIT = 31, 27, 16


def pack_half(count: Tensor | int, check: Tensor, token: Tensor) -> Tensor:
    return count << COUNT_BIT | check << CHECK_BIT | token


def count_of(half: Tensor) -> Tensor:
    return half >> COUNT_BIT


def check_of(half: Tensor) -> Tensor:
    return half >> CHECK_BIT & (CHECKS - 1)


def token_of(half: Tensor) -> Tensor:
    return half & (2**CHECK_BIT - 1)


def pack_entry(first: Tensor, second: Tensor) -> Tensor:
    return first << HALF_BITS | second


def halves_of(entry: Tensor) -> tuple[Tensor, Tensor]:
    return entry >> HALF_BITS, entry & (2**HALF_BITS - 1)


def document_starts(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Where the document of each token begins, (T,) int32."""
    position = torch.arange(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
    return cu_seqlens[torch.searchsorted(cu_seqlens, position, right=True) - 1]


@functools.partial(compiled, dynamic=True)
def context_keys(
    tokens: Tensor, starts: Tensor, orders: tuple[int, ...], slots: int
) -> tuple[Tensor, ...]:
    """Of the last n tokens, (orders, T) each: the slot, the check bits, and whether the document is
    that long yet."""
    position, key, keys = torch.arange(len(tokens), device=tokens.device), 0, []
    for done, order in itertools.pairwise((0, *orders)):
        for back in range(done, order):
            token = F.pad(tokens.long(), (back, 0))[: len(tokens)]
            key = mix((token + 1) ^ key)
        mixed = key * MIX_2
        slot, check = (mixed >> 20) & (slots - 1), (mixed >> 53) & (CHECKS - 1)
        keys.append((slot, check, position - starts >= order - 1))
    return tuple(torch.stack(of_orders) for of_orders in zip(*keys))


@torch.no_grad()
@functools.partial(compiled, dynamic=True)
def find_matches(
    tokens: Tensor, starts: Tensor, table: Tensor, orders: tuple[int, ...], slots: int,
    rank: int = 0,
) -> Tensor:  # fmt: skip
    """What has followed the contexts, (T, orders) int64: entries that have this very context alone,
    in the first place if there is one token, 0 without any; and 0 where another rank has the slot.

    tokens, starts: (T,) int32, as document_starts gives them. table: as Matches has it.
    """
    place, check, ours = match_places(tokens, starts, table, orders, slots, rank)
    first, second = (
        torch.where(check_of(half) == check, half, 0) for half in halves_of(table[place])
    )
    first, second = torch.where(first > 0, first, second), torch.where(first > 0, second, 0)
    return torch.where(ours, pack_entry(first, second), 0).mT.contiguous()


def match_places(
    tokens: Tensor, starts: Tensor, table: Tensor, orders: tuple[int, ...], slots: int, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the contexts of all orders: where they are in the table, their check bits, and whether
    they are there; (orders, T) each. Those that are not have places behind the slots."""
    slot, check, long_enough = context_keys(tokens, starts, orders, slots)
    share = (len(table) - SPARE_PLACES) // len(orders)
    number = torch.arange(len(orders), device=tokens.device)[:, None]
    ours = long_enough & (slot // share == rank)
    place = torch.where(ours, number * share + slot % share, len(table) - 1 - slot % SPARE_PLACES)
    return place, check, ours


def count_followers(entry: Tensor, check: Tensor, targets: Tensor) -> Tensor:
    """Entries, (orders, T), when each of these tokens has followed once more."""
    first, second = halves_of(entry)
    wanted = pack_half(1, check, targets)
    is_first, is_second = ((half ^ wanted) << (64 - COUNT_BIT) == 0 for half in (first, second))

    def once_more(half: Tensor) -> Tensor:
        return half + ((count_of(half) < MAX_COUNT).long() << COUNT_BIT)

    less = second - (1 << COUNT_BIT)
    others = torch.where(count_of(second) > 1, less, wanted)
    second = torch.where(is_first, second, torch.where(is_second, once_more(second), others))
    first = torch.where(is_first, once_more(first), first)
    swap = count_of(second) > count_of(first)
    return pack_entry(torch.where(swap, second, first), torch.where(swap, first, second))


@functools.partial(compiled, dynamic=True)
def counted_entries(
    tokens: Tensor, starts: Tensor, targets: Tensor, table: Tensor, orders: tuple[int, ...],
    slots: int, rank: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of the contexts of all orders, (orders · T,) each: their places in the table, what is there,
    and what is to be there for each of them alone."""
    place, check, _ = match_places(tokens, starts, table, orders, slots, rank)
    before = table[place]
    after = count_followers(before, check, targets)
    return place.flatten(), before.flatten(), after.flatten()


@triton.jit
def _write_largest_kernel(
    table, places, entries, slots, count, EMPTY: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + i, mask=i < count, other=slots)
    written = place < slots
    if EMPTY:
        tl.store(table + place, tl.zeros_like(place), mask=written)
    else:
        entry = tl.load(entries + i, mask=written, other=0)
        tl.atomic_max(table + place, entry, mask=written, sem="relaxed")


def write_largest_(table: Tensor, places: Tensor, entries: Tensor) -> None:
    """Write to each of these places in the table the largest of its entries, and leave spare places
    0. places, entries: (n,) int64."""
    slots = len(table) - SPARE_PLACES
    if not takes_kernel(table):
        table.index_fill_(0, places, 0)
        table.scatter_reduce_(0, places, entries.masked_fill(places >= slots, 0), "amax")
        return
    grid = (triton.cdiv(len(places), 1024),)
    for empty in True, False:
        _write_largest_kernel[grid](table, places, entries, slots, len(places), empty, BLOCK=1024)


@torch.no_grad()
def insert_matches_(
    table: Tensor, tokens: Tensor, starts: Tensor, targets: Tensor, orders: tuple[int, ...],
    slots: int, rank: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Count what followed each context of sequences that were read together. Of what is written to
    one slot the largest entry counts, in whichever order threads write. Gives the places of all
    contexts and what they had before."""
    read = tokens, starts, targets
    place, before, after = counted_entries(*read, table, orders, slots, rank)
    write_largest_(table, place, after)
    return place, before


COUNTS = 1, 2, 3, 5, 9  # the least of each class of counts
CELLS = 5 * len(COUNTS)  # of an order


@torch.no_grad()
@functools.partial(compiled, dynamic=True)
def read_matches(matched: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two tokens of every entry, (T, orders, 2) int64; their cells, int64; and whether there is
    such a token.

    A cell is a kind of prediction, for which weights are learned: by order, by the class of its
    count in COUNTS, and by what the other token of the entry counts. Of the first token there is no
    other, or one with at most half its count, or with more; of the second, it has at most half of
    the first one's count, or more. matched: (T, orders), as find_matches gives it. own: (T,) int32,
    taken where there is no token.
    """
    halves = halves_of(matched)
    both, counts = torch.stack(halves, 2), [count_of(half) for half in halves]
    close = 2 * counts[1] > counts[0]
    relations = torch.where(counts[1] > 0, 1 + close.long(), 0), 3 + close.long()
    number, cells = torch.arange(matched.size(1), device=matched.device), []
    for count, relation in zip(counts, relations):
        kind = sum((count >= least).long() for least in COUNTS[1:])
        cells.append((number * 5 + relation) * len(COUNTS) + kind)
    tokens = torch.where(both > 0, token_of(both), own[:, None, None].long())
    return tokens, torch.stack(cells, 2), both > 0


@torch.no_grad()
@functools.partial(compiled, dynamic=True)
def best_match(matched: Tensor) -> Tensor:
    """The number of the context to go by, (T,): with the first token's count d above the second's,
    at most 3, that with the largest number + 2 · d, of equals the longest. In text a count tells as
    much as two orders."""
    first, second = map(count_of, halves_of(matched))
    number = torch.arange(matched.size(1), device=matched.device)
    score = number + 2 * (first - second).clamp_max(3)
    return ((first > 0) * (len(number) * score + number + 1)).argmax(1)


# --- Hashed n-grams -------------------------------------------------------------------------------
#
# Rows for hashes of the last n tokens, in one table. A token has a row of each order n, whose sum
# enters the stream. For a gradient of its size and Adam's states the table is too large: a step
# changes the rows that it has read. Several ranks share the table out: what they read of each
# other's rows in a step is known before the step begins, from its tokens alone.


@functools.partial(compiled, dynamic=True)
def ngram_hash(tokens: Tensor, orders: tuple[int, ...], num_rows: int, parts: int = 1) -> Tensor:
    """The row of the n-gram that ends at each token, of whichever documents, in each of as many
    equal parts of the tokens; (T, orders) int32.

    Rows of the orders take turns: row k of the i-th one, from 0, is row k · orders + i of the
    table, so that any part of it has as many of each. Of the num_rows of an order the last one is
    for positions with fewer than n tokens up to there.
    """
    starts = torch.arange(len(tokens), device=tokens.device)
    starts -= starts % (len(tokens) // parts)
    slot, _, fits = context_keys(tokens, starts, orders, 2**44)  # all its bits
    row = torch.where(fits, slot % (num_rows - 1), num_rows - 1)
    return (row.mT * len(orders) + torch.arange(len(orders), device=row.device)).int()


def ngram_hash_on_host(tokens: np.ndarray, orders: tuple[int, ...], num_rows: int) -> np.ndarray:
    """ngram_hash of one sequence (T,), bit for bit, in numpy: for the thread that makes batches, in
    a quarter of the time that torch takes on a CPU."""
    tokens = tokens.astype(np.int64) + 1
    key, rows = np.zeros_like(tokens), np.empty((len(orders), len(tokens)), np.int32)
    for back in range(orders[-1]):
        later = key[back:]
        later[:] = mix(tokens[: len(later)] ^ later)
        if back + 1 in orders:
            i = orders.index(back + 1)
            slot = (key * MIX_2).view(np.uint64) >> 20
            row = slot - slot // (num_rows - 1) * (num_rows - 1)  # faster than % in numpy
            row[:back] = num_rows - 1
            rows[i] = row * len(orders) + i
    return rows.T


def sort_ngrams(rows: Tensor) -> SortedRows:
    """Of rows (T, orders), whose gradients are those of their tokens, (T, dim)."""
    in_order = sort_rows(rows.flatten())
    return in_order._replace(order=in_order.order // rows.size(1))


@triton.jit
def _update_ngrams_kernel(
    table, sum_squares, rows, order, grads, run_start, num_runs, lr, eps, dim, BLOCK: tl.constexpr
):
    column = tl.arange(0, BLOCK)
    inside = column < dim
    for run in range(tl.program_id(0), tl.load(num_runs), tl.num_programs(0)):
        at, end = tl.load(run_start + run), tl.load(run_start + run + 1)
        row = tl.load(rows + at).to(tl.int64)
        target, few = table + row * dim + column, tl.minimum(at + 2, end)
        # most n-grams come once in a step, the most frequent ones thousands of times
        grad = tl.zeros((BLOCK,), tl.float32)
        grad = _add_run(grad, grads, order, at, few, dim, column, inside, 2)
        grad = _add_run(grad, grads, order, few, end, dim, column, inside, 4096 // BLOCK)
        total = tl.load(sum_squares + row) + tl.sum(grad * grad) / dim
        value = tl.load(target, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_squares + row, total)
        tl.store(target, value - lr * grad / (tl.sqrt(total) + eps), mask=inside)


def update_ngrams_(
    table: Tensor, sum_squares: Tensor, rows: SortedRows, grads: Tensor, lr: float, eps: float
) -> None:
    """One step of row-wise Adagrad, in place, for the rows of a table (rows, dim) that have
    gradients g: s += mean(g²), then row -= lr·g / (√s + eps). sum_squares, s: (rows,) fp32.

    grads: (n, dim), of which rows.order names one for each of the sorted rows; those of a row are
    summed in fp32, in that order. A sum of squares and no running mean: a row's k-th gradient moves
    it by about lr/√k whenever it comes, with no bias to correct. Source: Duchi et al. 2011, JMLR
    12, with one sum a row.
    """
    if takes_kernel(table):
        dim = table.size(1)
        _update_ngrams_kernel[(min(len(rows.rows), 16384),)](
            table, sum_squares, rows.rows, rows.order, packed(grads), rows.run_start, rows.num_runs,
            lr, eps, dim, BLOCK=triton.next_power_of_2(dim), num_warps=1,
        )  # fmt: skip
        return
    touched, lengths = rows.rows.unique_consecutive(return_counts=True)
    grad = torch.segment_reduce(widen(grads[rows.order]), "sum", lengths=lengths)
    sum_squares[touched] += grad.square().mean(1)
    steps = lr * grad / (sum_squares[touched].sqrt() + eps)[:, None]
    table[touched] = (widen(table[touched]) - steps).type_as(table)


# ==================================================================================================
# 5. Model
# ==================================================================================================


class RowExchange(NamedTuple):
    """The rows of n-grams that ranks read of each other in a step, each once a rank. Of rows a to f
    rank 0 owns a b c and rank 1 the others; if one reads b e f and the other b c e, then

                from_each  to_each  rows, counted from the first own one
        rank 0  [1, 2]     [1, 2]   1     1 2      it receives b e f and sends b to itself, b c
        rank 1  [2, 1]     [2, 1]   1 2   1        it receives b c e and sends e f, e to itself
    """

    from_each: list[int]  # how many rows this rank reads of each rank
    to_each: list[int]  # how many of its own each rank reads
    rows: Tensor  # (sum of to_each,) int32: which these are, rank 0's first


def plan_exchange(rows: np.ndarray, rank: int, share: int) -> tuple[RowExchange, np.ndarray]:
    """What each rank reads, (ranks, n) int32 of a table of which it owns `share` rows, rank 0 the
    first ones, says what they exchange. Also gives, for each of the n, where this rank's row is in
    what it receives."""
    received, places = np.unique(rows[rank], return_inverse=True)
    first, asked = rank * share, []
    for x in np.sort(rows):  # faster than to choose first
        own = x[slice(*np.searchsorted(x, (first, first + share)))] - first
        asked.append(own[np.diff(own, prepend=-1) > 0])  # np.unique, but faster
    from_each = np.diff(np.searchsorted(received, share * np.arange(len(rows) + 1)))
    exchange = from_each.tolist(), [*map(len, asked)], torch.from_numpy(np.concatenate(asked))
    return RowExchange(*exchange), places.astype(np.int32)


class Batch(NamedTuple):
    """Sequences that are computed at once: whole documents packed behind one another."""

    tokens: Tensor  # (T,) int32
    targets: Tensor  # (T,) int64, the next tokens
    cu_seqlens: Tensor  # int32: document starts, padded with T to the length that graphs take
    max_seq_len: int  # no document is longer
    sequences: int = 1  # how many, each as long
    # with several ranks:
    rows: Tensor | None = None  # (T, orders) int32, where Ngrams.pulled has the rows of its n-grams
    exchange: RowExchange | None = None  # what brings them there; of all passes of a step
    # with n-gram lookup, in training: (T, orders) int64, what find_matches gives
    matched: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """With its tensors changed."""
        return Batch(*(change(x) if isinstance(x, Tensor) else x for x in self))


class Lookups(NamedTuple):
    """What the tables hold for the tokens of a batch."""

    embedded: Tensor  # (T, dim)
    values: Sequence[Tensor]  # (T, attention_dim) of each value table
    ngrams: Tensor  # (T, dim), with those of the tokens that the lookup predicts


class Ngrams(nn.Module):
    """The table of hashed n-grams and what its updates need. It is no parameter: its gradients are
    those of the rows that were read.

    One process reads its table. Of several each has a share of it, consecutive rows. For a step
    every rank pulls the rows that it reads from their owners, each once; behind the last pass it
    sums the gradients of each, and the owner adds up what comes back, in the order of the ranks.
    """

    def __init__(self, config: Config, runtime: Runtime):
        super().__init__()
        self.orders, self.num_rows = config.ngram_orders, config.ngram_rows
        self.runtime, dim, ranks = runtime, config.model_dim, runtime.world_size
        zeros = functools.partial(torch.zeros, device=runtime.device)
        table = zeros(config.ngram_rows_per_rank(ranks), dim, dtype=getattr(torch, config.dtype))
        self.register_buffer("table", table)
        self.sum_squares = zeros(len(table))
        # of the tokens of this rank in a step, pass behind pass
        most = max(stage.tokens_per_step for stage in config.all_stages) // ranks
        self.rows = zeros(most, len(self.orders), dtype=torch.int32)
        self.grads = zeros(most, dim, dtype=table.dtype)
        self.filled = 0  # of how many tokens these are so far
        self.pending = None  # rows and grads of the last backward pass, to be gathered
        # Several ranks: the rows that were pulled, at one place because graphs read them
        most = max(most, config.sequences_per_step // ranks * config.val_sequence_tokens)
        self.pulled = zeros(most * len(self.orders) * (ranks > 1), dim, dtype=table.dtype)
        self.exchange: RowExchange | None = None  # by which they came
        self.asked = None  # its rows, on the device
        self.received = None  # gradients of these
        self.works: list[dist.Work] = []  # what is on its way

    @recorded("hashing")
    def hash(self, tokens: Tensor, sequences: int) -> Tensor:
        """The table rows of each token's n-grams, (T, orders) int32, in as many sequences."""
        return ngram_hash(tokens, self.orders, self.num_rows, sequences)

    def locate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A table that has the rows of a batch's n-grams, and which they are, (T, orders) int32."""
        if self.runtime.world_size == 1:
            return self.table, self.hash(batch.tokens, batch.sequences)
        assert batch.rows is not None, "several ranks take batches from rank_batches"
        return self.pulled, batch.rows

    # NCCL's stream runs collectives in the order in which they are launched, each behind all that
    # the main stream was given before it. So rows are sent behind the update that they come from,
    # and arrive in `pulled` behind the passes that have read it. wait() makes the main stream wait
    # for what has been launched here; it stands in front of whatever reads that.

    @recorded("n-gram exchange")
    def pull(self, exchange: RowExchange | None) -> None:
        """Start to bring the rows of an exchange, unless they are here since the last update. All
        ranks call it."""
        if self.runtime.world_size == 1 or exchange is None or exchange is self.exchange:
            return
        self.wait()
        self.exchange, device = exchange, self.runtime.device
        self.asked = exchange.rows.to(device, non_blocking=True)
        sent, counts = F.embedding(self.asked, self.table), (exchange.from_each, exchange.to_each)
        received = self.pulled[: sum(exchange.from_each)]
        self.works.append(self.runtime.all_to_all(received, sent, *counts))

    def wait(self) -> None:
        while self.works:
            self.works.pop().wait()

    @recorded("n-gram gather")
    def gather(self, rows: Tensor, grads: Tensor) -> None:
        """Put what a backward pass left, (T, orders) and (T, dim), behind what the step has."""
        part = slice(self.filled, self.filled + len(rows))
        self.rows[part].copy_(rows)
        self.grads[part].copy_(grads)
        self.filled = part.stop

    @recorded("n-gram exchange")
    def send_gradients(self) -> None:
        """Start to send the owners the sums of what was gathered since the last update."""
        if self.runtime.world_size == 1 or not self.filled:
            return
        rows, grads = self.rows[: self.filled], self.grads[: self.filled]
        sums = grads.new_zeros(sum(self.exchange.from_each), grads.size(1))
        add_rows_([sums], sort_ngrams(rows), [grads])
        self.received = grads.new_empty(len(self.asked), grads.size(1))
        counts = self.exchange.to_each, self.exchange.from_each
        self.works.append(self.runtime.all_to_all(self.received, sums, *counts))

    @recorded("update ngrams")
    def update(self, lr: float, eps: float) -> None:
        """With all that was gathered since the last one; several ranks have sent it."""
        if not self.filled:
            return
        rows, grads = self.rows[: self.filled], self.grads[: self.filled]
        if self.runtime.world_size > 1:
            self.wait()
            rows, grads = self.asked[:, None], self.received
        if len(rows):
            update_ngrams_(self.table, self.sum_squares, sort_ngrams(rows), grads, lr, eps)
        self.filled, self.exchange, self.received = 0, None, None

    def reset(self) -> None:
        self.wait()
        self.table.zero_()
        self.sum_squares.zero_()
        self.filled, self.exchange = 0, None

    def whole_table(self) -> Tensor | None:
        """The rows of all ranks, for rank 0 alone and with several ranks on its CPU. All ranks call
        it."""
        parts = on_main(self.table, self.runtime)
        count = len(self.orders) * self.num_rows
        return None if parts is None else parts.flatten(0, 1)[:count]


class Matches(nn.Module):
    """The tables of the n-gram lookup. Of several ranks each has an equal part of the slots of
    every order, consecutive ones. All see all that a step reads: each counts what followed the
    contexts of its slots, and tells the others what it has found for theirs."""

    def __init__(self, config: Config, runtime: Runtime):
        super().__init__()
        self.orders, self.slots, self.runtime = config.match_orders, config.match_slots, runtime
        size = len(self.orders) * self.slots // runtime.world_size + SPARE_PLACES
        table = torch.zeros(size, dtype=torch.int64, device=runtime.device)
        self.register_buffer("table", table)
        # the next step's batches, and what look_up gives for them
        self.ahead: tuple[list[Batch], list[Batch], Tensor] | None = None

    # Whatever compiled functions are given is no view: for views they would be compiled anew.

    def find(self, tokens: Tensor, starts: Tensor) -> Tensor:
        """find_matches in the slots of this rank."""
        kinds = self.table, self.orders, self.slots, self.runtime.rank
        return find_matches(tokens.clone(), starts.clone(), *kinds)

    @recorded("matches")
    def insert(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """insert_matches_ of what gather_sequences gives, in the slots of this rank."""
        kinds = self.orders, self.slots, self.runtime.rank
        return insert_matches_(self.table, *(x.clone() for x in read), *kinds)

    @recorded("matches")
    @torch.no_grad()
    def look_up(self, batches: list[Batch]) -> tuple[list[Batch], Tensor]:
        """Batches of a step with what matches them, unless that was done ahead, and what all ranks
        read, as gather_sequences gives it. All ranks call it."""
        if self.ahead is not None and self.ahead[0] is batches:
            return self.ahead[1:]
        read, ranks = gather_sequences(batches, self.runtime), self.runtime.world_size
        found = self.find(*read[:2])  # pass by pass, in each rank by rank
        found = found.unflatten(0, (len(batches), ranks, -1))
        if ranks == 1:
            found = found[:, 0]
        else:  # what is not here is 0, so a sum has what the one owner knows
            sent = found.transpose(0, 1).contiguous()
            received, counts = torch.empty_like(sent), [1] * ranks
            self.runtime.all_to_all(received, sent, counts, counts).wait()
            found = received.sum(0)
        matched = [b._replace(matched=own.clone()) for b, own in zip(batches, found)]
        return matched, read

    def look_up_ahead(self, batches: list[Batch] | None) -> None:
        """For the next step; it sees what has been inserted so far."""
        self.ahead = None
        if batches is not None:
            self.ahead = batches, *self.look_up(batches)

    def reset(self) -> None:
        self.table.zero_()
        self.ahead = None

    def undo(self, inserted: list[tuple[Tensor, Tensor]]) -> None:
        """Put back what insert() has given, the last one first."""
        for place, before in reversed(inserted):
            self.table[place] = before

    @torch.no_grad()
    def whole_table(self) -> Tensor | None:
        """As one process has it, for rank 0 alone. All ranks call it."""
        if self.runtime.world_size == 1:
            return self.table
        parts = on_main(self.table[:-SPARE_PLACES], self.runtime)
        if parts is None:
            return None
        by_order = parts.unflatten(1, (len(self.orders), -1)).transpose(0, 1)
        whole = parts.new_zeros(parts.numel() + SPARE_PLACES)
        whole[:-SPARE_PLACES].view(by_order.shape).copy_(by_order)
        return whole


@torch.no_grad()
def on_main(part: Tensor, runtime: Runtime) -> Tensor | None:
    """The parts of all ranks, (ranks, n, …), for rank 0 alone and with several ranks on its CPU.
    All ranks call it."""
    ranks, size = runtime.world_size, max(1, 2**26 // max(1, part[:1].numel()))
    if ranks == 1:
        return part[None]
    whole = None
    if runtime.is_main:
        whole = torch.empty(ranks, *part.shape, dtype=part.dtype)
    for begin in range(0, len(part), size):
        piece = part[begin : begin + size]
        gathered = piece.new_empty(ranks * len(piece), *piece.shape[1:])
        runtime.all_gather(gathered, piece)
        if whole is not None:
            whole[:, begin : begin + size] = gathered.unflatten(0, (ranks, -1))
    return whole


class NgramRows(torch.autograd.Function):
    """The sum of the table rows of a token's n-grams, (T, dim), which needs a gradient as
    `embedded`, (T, dim), does. The backward pass leaves it in `ngrams.pending`."""

    @staticmethod
    def forward(ctx, embedded: Tensor, batch: Batch, ngrams: Ngrams) -> Tensor:
        table, ctx.rows = ngrams.locate(batch)
        ctx.ngrams = ngrams
        return F.embedding(ctx.rows, table).sum(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None, None]:
        ctx.ngrams.pending = ctx.rows, packed(grad)
        return None, None, None


@dataclass(frozen=True)
class SmallParam:
    """A slice of GPT.small: the parameters that fit in a few rows, kept in one fp32 vector."""

    shape: tuple[int, ...]
    start: float | list[float] | None  # None: uniform with std 0.5/sqrt(columns)
    betas: tuple[float, float]
    lr: float  # multiplier of adam_lr
    weight_decay: float  # multiplier of adam_weight_decay


def small_params(config: Config) -> dict[str, SmallParam]:
    """The layout of GPT.small."""
    earlier, slow, fast, root = config.layers[:-1], (0.9, 0.99), (0.9, 0.95), math.sqrt(1.1)
    layers = len(earlier)
    entries = 1 + sum(row.ngrams for row in earlier)  # of n-grams, one in front of the layers
    gates, hidden = [start / GATE_SCALE for start in LAST_LAYER_GATES.values()], config.gate_dim
    # fmt: off
    table = {
        #                           shape       start     betas   lr    weight_decay
        "residual":     SmallParam((layers,),   root,     fast,   5.0,  0.0),
        "project":      SmallParam((layers,),   0.5,      slow,   2.5,  0.0),
        "mlp_residual": SmallParam((layers,),   root,     fast,   5.0,  0.0),
        "mlp_project":  SmallParam((layers,),   1.0,      fast,   1.0,  0.0),
        "ngrams":       SmallParam((entries,),  0.05,     slow,   1.0,  0.0),
        "attended":     SmallParam((1,),        -0.5,     slow,   1.0,  0.0),
        "gate_w_1":     SmallParam((hidden, config.model_dim), None, slow, 0.25, 1.0),
        "gate_b_1":     SmallParam((hidden,),   0.0,      slow,   0.25, 0.0),
        "gate_w_2":     SmallParam((len(gates), hidden), 0.0, slow, 0.25, 1.0),
        "gate_b_2":     SmallParam((len(gates),), gates,  slow,   0.25, 0.0),
        # of queries, then of keys
        "pointer":      SmallParam((2 * POINTER_DIM, config.model_dim), None, slow, 1.0, 0.0),
        "pointer_sink": SmallParam((POINTER_DIM,), 0.0,   slow,   1.0,  0.0),
        "pointer_gain": SmallParam((1,),        1.0,      slow,   1.0,  0.0),
    }
    if config.match_orders:  # of every kind of token that the lookup predicts
        cells = CELLS * len(config.match_orders)
        table |= {
            "match":      SmallParam((cells,),  0.5,      slow,   5.0,  0.0),
            "match_keys": SmallParam((cells, POINTER_DIM), 0.0, slow, 1.0, 0.0),
            "match_bias": SmallParam((cells,),  0.0,      slow,   5.0,  0.0),
        }
    # fmt: on
    return table


@dataclass
class Stream:
    """A (T, dim) tensor that several sums read, and its RMS norm where one was made.

    Every sum that reads it puts what combine gives back in its place. The next one reads that, and
    its gradient is then added in the kernel that makes the gradient of the earlier one.
    """

    tensor: Tensor
    normed: Tensor | None = None
    normed_fp8: Fp8 | None = None  # where it is, `normed` is NaN and has only a gradient


def add_streams(
    *terms: tuple[Stream | Tensor, Tensor], fp8: Fp8Copies | None, norm: bool = True
) -> Stream:
    """The sum of factor · source of (source, factor) pairs, with its norm. A Stream among them is
    given the tensor that combine hands back, which the next sum reads."""
    tensors = [s.tensor if isinstance(s, Stream) else s for s, _ in terms]
    copy = fp8_empty(tensors[0].shape, fp8.scale_x) if fp8 and norm else None
    total, normed, *again = combine(tensors, [factor for _, factor in terms], norm, copy)
    for (source, _), tensor in zip(terms, again):
        if isinstance(source, Stream):
            source.tensor = tensor
    return Stream(total, normed, copy)


class GPT(nn.Module):
    """Decoder-only transformer.

    From the records of modded-nanogpt, up to number 89, it has ReLU² MLPs, RMS norms without
    weights, rotary positions on half of a head, stretched in long layers as their window grows,
    windowed attention to packed documents, a key offset in long layers, value embeddings, hashed
    n-grams in the stream, factors on everything that is added to it, made token by token by an MLP
    in the last layer, attention of late layers to the stream of an earlier one, softcapped logits,
    and early on a loss on the token after the next one. Ours are nine layers and four heads in
    place of eleven and six, one tied table for head and embedding throughout, row-wise Adagrad for
    a large table of n-grams, a loss on sampled candidates, a pointer to earlier tokens, QKV, MLP
    and head in fp8 forward and backward, and one option: the n-gram lookup.

    Weights of one kind are stacked in a bank, so that the optimizer can share a whole kind out over
    the ranks at once; banks are padded with zeros to a multiple of the ranks.
    """

    def __init__(self, config: Config, runtime: Runtime):
        super().__init__()
        self.config, self.runtime = config, runtime
        dim, device, dtype = config.model_dim, runtime.device, getattr(torch, config.dtype)
        vocab, attention_dim = config.padded_vocab_size, config.attention_dim
        self.small_layout = small_params(config)

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

        def bank(entries: int, rows: int) -> nn.Parameter:
            return zeros(round_up(entries, runtime.world_size), rows, dim)

        # rows of q, k, v and of the transpose of o
        self.attention_bank = bank(len(config.layers), 4 * attention_dim)
        self.mlp_bank = bank(2 * len(config.layers), config.mlp_dim)  # W_1 of every layer, then W_2
        self.head = zeros(vocab, dim)  # and the embedding
        # one table behind the other, the last for the tokens that the lookup predicts
        num_tables = config.num_value_tables + bool(config.match_orders)
        self.value_embed = zeros(num_tables * vocab, attention_dim)
        self.matches = Matches(config, runtime) if config.match_orders else None
        self.ngrams = Ngrams(config, runtime)
        num_small = sum(math.prod(row.shape) for row in self.small_layout.values())
        self.small = nn.Parameter(torch.zeros(num_small, device=device))
        self.init_weights(torch.Generator(device).manual_seed(config.seed))

        # What the model computes with: parts of the parameters as leaves of their own, whose
        # gradients are parts of the parameters', so that autograd adds to those in place.
        for param in self.parameters():
            param.grad = torch.zeros_like(param)
        qkv_rows = 3 * attention_dim
        w_qkv = leaves(self.attention_bank, lambda bank: [entry[:qkv_rows] for entry in bank])
        w_o = leaves(self.attention_bank, lambda bank: [entry[qkv_rows:] for entry in bank])
        self.attention_weights = [*zip(w_qkv, w_o)]
        self.mlp_weights = leaves(self.mlp_bank, list)
        self.value_tables = leaves(
            self.value_embed, lambda table: list(table.unflatten(0, (-1, vocab)))
        )
        self.small_weights = dict(zip(self.small_layout, leaves(self.small, self.cut_small)))

        self.side_stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.backend = attention_backend(device, dtype)
        stages, longest = config.all_stages, config.longest_pass(runtime.world_size)
        frequencies, scale = rotary_frequencies(config.head_dim), config.attention_scale
        self.rotary = rotary_tables(frequencies, longest, device)
        # of long layers by their window: cosines, sines, softmax scale
        self.long_rotary = {stages[0].window_long: (*self.rotary, scale)}
        for before, stage in itertools.pairwise(stages):
            old, new = before.window_long, stage.window_long
            frequencies, factor = stretch_rotary(frequencies, old, new)
            scale *= factor
            if new not in self.long_rotary:
                tables = rotary_tables(frequencies, longest, device)
                self.long_rotary[new] = *tables, scale
        last = self.long_rotary[stages[-1].window_long]
        self.long_rotary.setdefault(config.final_window_long, last)
        self.fp8 = None
        if config.fp8 and dtype == torch.bfloat16 and has_kernels(device):
            banks = self.mlp_bank, self.attention_bank, self.head
            self.fp8 = Fp8Copies(*banks, len(config.layers))
        self.register_buffer("one", torch.ones(1, device=device), persistent=False)
        self.register_buffer("proposal", torch.ones(vocab, device=device), persistent=False)
        impossible = None
        if config.canonical_mask:  # filled while training goes on
            impossible = torch.zeros(vocab, vocab // 8, dtype=torch.uint8, device=device)
        self.register_buffer("impossible", impossible, persistent=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """What training starts from:

            attention_bank   uniform with std 0.5/√model_dim
            mlp_bank         W_1 likewise; W_2 zero, so that at first an MLP adds nothing
            head             normal with std 0.005; as embedding it is normed when it is read
            value_embed      normal with std 0.01
            rows of n-grams  zero
            small            the column `start` of small_params

        Entries that pad a bank are zero, and stay so.
        """
        config = self.config

        def uniform_(weights: Tensor) -> None:  # std 0.5/sqrt(columns)
            bound = math.sqrt(3) * 0.5 / math.sqrt(weights.size(-1))
            weights.uniform_(-bound, bound, generator=generator)

        uniform_(self.attention_bank[: len(config.layers)])
        uniform_(self.mlp_bank[: len(config.layers)])  # W_2 stays zero
        self.head.normal_(0, 0.005, generator=generator)
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

    # What depends on the tokens alone, many small kernels, runs on a side stream, while the main
    # one has the layers and the optimizer. Three rules make that safe, in a graph and without one:
    # 1. The side stream waits for all that the main one was given before (on_side_stream), so what
    #    it reads is written. Whatever it makes is read only behind wait_for_side_stream(), by which
    #    the main stream waits for it. The end of hidden() is such a place, so a backward pass,
    #    which reads the sorted rows, never runs ahead of them; training_loss() has one for the
    #    candidates too.
    # 2. A tensor of the one stream that the other reads must outlive that read: the allocator would
    #    give its memory to the next tensor of its own stream. All of them live in the batch, in
    #    `sampled` or in a ctx until the pass has ended, which is behind the wait.
    # 3. In a graph both streams' tensors come from one pool, which no eager kernel uses; a replay
    #    begins when the one before has ended, as all are launched on the main stream.

    def on_side_stream(self) -> contextlib.AbstractContextManager:
        """The side stream, behind what the main one was given so far;
        wait_for_side_stream() waits for it."""
        if self.side_stream is None:
            return contextlib.nullcontext()
        self.side_stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.side_stream)

    def wait_for_side_stream(self) -> None:
        """The main stream goes on when the side stream has done what it was given."""
        if self.side_stream is not None:
            torch.cuda.current_stream().wait_stream(self.side_stream)

    @recorded("lookups")
    def look_up(self, batch: Batch) -> Lookups:
        """Rows of the embedding tables."""
        tokens = batch.tokens

        def read(*tables: list[Tensor], rows: Tensor) -> list[tuple[Tensor, ...]]:
            order = None
            if torch.is_grad_enabled():
                with self.on_side_stream():
                    order = sort_rows(rows)
            return [TableRows.apply(rows, order, *alike) for alike in tables]

        tables = self.value_tables[: self.config.num_value_tables]
        (embedded,), values = read([self.head], tables, rows=tokens)
        ngrams = NgramRows.apply(embedded, batch, self.ngrams)
        if self.matches is not None:
            best = best_match(batch.matched)[:, None, None].expand(-1, 1, 2)
            predicted, cells, found = (  # (2, T) each, the first token and the second
                x.gather(1, best)[:, 0].mT.contiguous() for x in read_matches(batch.matched, tokens)
            )
            gains = self.small_weights["match"].expand(2, len(tokens), -1)
            gains = gains.gather(2, cells[:, :, None])[:, :, 0] * found
            ((match,),) = read(self.value_tables[-1:], rows=predicted.flatten())
            match = combine(match.unflatten(0, (2, -1)).unbind(), gains.unbind())[0]
            match = F.pad(match, (0, ngrams.size(1) - match.size(1)))
            ngrams = combine([ngrams, match], [self.one, self.one])[0]
        return Lookups(embedded, values, ngrams)

    def hidden(self, batch: Batch, windows: Windows, fp8: Fp8Copies | None = None) -> Tensor:
        """The forward pass up to the head: the normed residual stream, (T, dim). In layer i

            x = residual · x + project · attention(norm(x)) [+ first · x_first] [+ ngrams · e]
            x = mlp_residual · x + mlp_project · mlp(norm(x))

        where x_first is the stream that enters layer 0, added in the last layer alone, and e the
        rows of the n-grams, in layers with `ngrams`. A layer with `attend_from` takes queries, keys
        and values from norm(x_attend), the stream that this earlier layer has left. The factors are
        learned scalars, and in the last layer numbers of each token from last_gates. That layer
        begins with a sum of x_first, x_attend and x; behind it attended · x_attend is added.
        """
        lookups, layers = self.look_up(self.with_matches(batch)), self.config.layers
        last, attend_from = len(layers) - 1, layers[-1].attend_from
        enter, factors = self.layer_factors(len(batch.tokens))
        add = functools.partial(add_streams, fp8=fp8)

        ngrams, x_attend = Stream(lookups.ngrams), None
        x = x_first = add((rms_norm(lookups.embedded), self.one), (ngrams, enter))  # (T, dim)
        for i, row in enumerate(layers):
            value = None if row.value_table is None else lookups.values[row.value_table]
            if i == last:  # mixes three streams before it begins
                gates = self.last_gates(x.tensor)
                factors.append(gates)
                value = combine([value], [gates["value"]])[0]  # (T, attention_dim)
                shares = (
                    (x_first, gates["x_first"]),
                    (x_attend, gates["x_attend"]),
                    (x, gates["x_last"]),
                )
                x = add(*shares, norm=False)
            factor = factors[i]

            source = x if row.attend_from is None else x_attend
            fp8_qkv = fp8.qkv(i, source.normed_fp8) if fp8 else None
            y = self.attend(i, source.normed, value, batch, windows, fp8_qkv)  # (T, dim)
            terms = [(x, factor["residual"]), (y, factor["project"])]
            if i == last:
                terms.append((x_first, factor["first"]))
            if row.ngrams:
                terms.append((ngrams, factor["ngrams"]))
            x = add(*terms)

            w_1, w_2 = self.mlp_weights[i], self.mlp_weights[len(layers) + i]  # (mlp_dim, dim)
            y = mlp(x.normed, w_1, w_2, fp8.mlp(i, x.normed_fp8) if fp8 else None)
            is_read = i == attend_from or (i < last and layers[i + 1].attend_from is None)
            x = add((x, factor["mlp_residual"]), (y, factor["mlp_project"]), norm=is_read)
            if i == attend_from:
                x_attend = x
        self.wait_for_side_stream()
        attended = self.small_weights["attended"]
        return combine([x.tensor, x_attend.tensor], [self.one, attended], True)[1]

    def layer_factors(self, num_tokens: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The factor of the n-grams in front of layer 0, and those of every layer but the last, by
        name; (num_tokens,) each, so that one kernel sums the gradients of them all. They are 16
        bytes apart: of a pointer to a multiple of that Triton makes another kernel."""
        names = "residual", "project", "mlp_residual", "mlp_project", "ngrams"
        parts = [self.small_weights[name] for name in names]
        aligned = F.pad(torch.cat(parts)[:, None], (0, 3))[:, :1]
        rows, begin, by_name = aligned.expand(-1, num_tokens).unbind(), 0, {}
        for name, part in zip(names, parts):
            by_name[name] = rows[begin : begin + len(part)]
            begin += len(part)
        enter, *ngrams = by_name["ngrams"]
        plan = self.config.layers[:-1]
        factors = [{name: by_name[name][i] for name in names[:-1]} for i in range(len(plan))]
        for i, factor in zip([i for i, row in enumerate(plan) if row.ngrams], ngrams):
            factors[i]["ngrams"] = factor
        return enter, factors

    def last_gates(self, x: Tensor) -> dict[str, Tensor]:
        """Coefficients of the last layer, (T,) fp32 each, from the stream that enters it."""
        names = ("gate_w_1", "gate_b_1", "gate_w_2", "gate_b_2")
        w_1, b_1, w_2, b_2 = (self.small_weights[name] for name in names)
        hidden = F.gelu(F.linear(x, w_1.type_as(x), b_1.type_as(x)))
        # (gates, T), so that each is adjacent in memory
        outputs = GATE_SCALE * ((w_2.type_as(x) @ hidden.mT).float() + b_2[:, None])
        return dict(zip(LAST_LAYER_GATES, outputs.unbind()))

    def attend(
        self, i: int, normed: Tensor, value: Tensor | None, batch: Batch, windows: Windows,
        fp8: QkvFp8 | None,
    ) -> Tensor:  # fmt: skip
        """Attention of layer i to the normed stream (T, dim), with its projections; (T, dim).
        value (T, attention_dim) is added to the values."""
        config, is_long = self.config, self.config.layers[i].window == "long"
        w_qkv, w_o = self.attention_weights[i]
        offset = len(normed) // batch.sequences if is_long else 0
        cos, sin, scale = *self.rotary, config.attention_scale
        if is_long:
            cos, sin, scale = self.long_rotary[windows.long]
        # (T, num_heads, head_dim) each
        q, k, v = prepare_qkv(normed, w_qkv, cos, sin, value, fp8, offset, config.head_dim)
        lengths = batch.cu_seqlens, batch.max_seq_len, windows.long if is_long else windows.short
        y = attention(q, k, v, *lengths, scale, self.backend)
        return y.flatten(1) @ w_o

    def pointer_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The pointer's queries and keys from the normed stream (T, dim); (T, POINTER_DIM)."""
        weights, gain = (self.small_weights[name] for name in ("pointer", "pointer_gain"))
        q, k = rms_norm((x @ weights.type_as(x).mT).unflatten(1, (2, -1))).unbind(1)
        return q * gain.type_as(q), k

    def with_matches(self, batch: Batch) -> Batch:
        """With what the n-gram lookup finds for it, unless it has that; then of one process."""
        if self.matches is None or batch.matched is not None:
            return batch
        assert self.runtime.world_size == 1, "several ranks look up together, by Matches.look_up"
        starts = document_starts(batch.cu_seqlens, len(batch.tokens))
        return batch._replace(matched=self.matches.find(batch.tokens, starts))

    def match_keys(self, q: Tensor, batch: Batch, impossible: Tensor | None) -> ExtraKeys | None:
        """What the n-gram lookup predicts, as keys of the pointer. The key of a token, and what is
        added to its score, are learned for each kind of it."""
        if batch.matched is None:
            return None
        keys, bias = self.small_weights["match_keys"], self.small_weights["match_bias"]
        predicted, cells, found = (x.flatten(1) for x in read_matches(batch.matched, batch.tokens))
        if impossible is not None:
            found = found & ~cannot_follow(impossible, batch.tokens[:, None], predicted)
        root = math.sqrt(q.size(1))
        scores = torch.addmm((root * bias).type_as(q), q, keys.type_as(q).mT)  # (T, cells)
        scores = widen(scores.gather(1, cells)) / root
        return ExtraKeys(scores.masked_fill(~found, -math.inf), predicted)

    @recorded("pointer")
    def point(self, x: Tensor, batch: Batch, impossible: Tensor | None = None) -> PointerShares:
        """At the targets, from the normed stream (T, dim)."""
        sink, bounds = self.small_weights["pointer_sink"], document_bounds(batch.cu_seqlens, len(x))
        reach, (q, k) = min(batch.max_seq_len, POINTER_REACH), self.pointer_keys(x)
        extra = self.match_keys(q, batch, impossible)
        inputs = q, k, sink, batch.tokens, batch.targets
        return pointer_shares(*inputs, *bounds, reach, impossible, extra)

    def training_loss(
        self, batch: Batch, windows: Windows, loss_weights: Tensor, num_candidates: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The loss to train on and the plain next-token loss, both fp32 sums over tokens in nats.

        loss_weights, (2,): of the next token and of the one after it. num_candidates: how many
        tokens of the vocabulary estimate the softmax's denominator, sampled anew for every
        tokens_per_sampling tokens of a sequence; 0 takes the whole vocabulary.
        """
        batch, size = self.with_matches(batch), self.config.tokens_per_sampling
        sequences = batch.targets.unflatten(0, (batch.sequences, -1))
        sizes = [len(part) for sequence in sequences for part in sequence.split(size)]
        with self.on_side_stream(), recorded("candidates"):
            second = F.pad(sequences[:, 1:], (0, 1), value=IGNORED_TARGET)
            targets = torch.stack([sequences, second], dim=2).flatten(0, 1)  # (T, 2)
            targets = self.with_copy_entry(targets)  # (T, 3)
            sampled = [self.sample(part, num_candidates) for part in targets.split(sizes)]
        x = self.hidden(batch, windows, self.fp8)
        self.wait_for_side_stream()
        losses, place = [], torch.arange(num_candidates + 1, device=x.device)
        shares = zip(*(share.split(sizes) for share in self.point(x, batch)))
        for part, (candidates, fp8), own in zip(x.split(sizes), sampled, shares):
            head = self.head  # (vocab, dim)
            if candidates.tokens is not None:
                rows = SortedRows.of_distinct(candidates.tokens, place)
                (head,) = TableRows.apply(candidates.tokens, rows, head)  # (candidates, dim)
            inputs = part, head, candidates.targets, loss_weights, fp8, candidates.offsets
            losses.append(head_loss(*inputs, PointerShares(*own)))
        weighted, plain = zip(*losses)
        return sum(weighted), sum(plain)

    def validation_loss(self, batch: Batch, windows: Windows) -> Tensor:
        """The next-token loss on the whole vocabulary, or with canonical_mask on what can follow
        each token, a sum over tokens in nats, without fp8. All ranks call it, each for its part of
        an exchange."""
        self.ngrams.pull(batch.exchange)
        self.ngrams.wait()
        batch = self.with_matches(batch)
        x, targets = self.hidden(batch, windows), self.with_copy_entry(batch.targets[:, None])
        shares = self.point(x, batch, self.impossible)
        return next_token_loss(x, self.head, targets, shares, batch.tokens, self.impossible)

    def probabilities(self, batch: Batch, windows: Windows, positions: slice) -> Tensor:
        """Of all tokens behind these positions, (positions, vocab) fp32, in plain PyTorch, as
        validation_loss scores them."""
        batch = self.with_matches(batch)
        x, tokens = self.hidden(batch, windows), batch.tokens
        logits = softcap(x[positions] @ self.head.mT)
        if self.impossible is not None:
            column = torch.arange(logits.size(1), device=x.device)
            left_out = cannot_follow(self.impossible, tokens[positions, None], column)
            logits = logits.masked_fill(left_out, -math.inf)
        entry, starts = self.config.vocab_size, document_starts(batch.cu_seqlens, len(x))
        copy, rest = logits.softmax(1)[:, entry, None], logits.clone()
        rest[:, entry] = -math.inf
        (q, k), sink = self.pointer_keys(x), self.small_weights["pointer_sink"]
        extra = self.match_keys(q, batch, self.impossible)
        own = POINTER_REACH, positions, slice(None), self.impossible, extra
        attention = pointer_attention(q, k, sink, tokens, starts, *own)
        copied = torch.zeros_like(rest).index_add(1, tokens, attention[:, 1 : 1 + len(tokens)])
        if extra is not None:
            copied = copied.scatter_add(1, extra.tokens[positions], attention[:, 1 + len(tokens) :])
        return rest.softmax(1) * (1 - copy * (1 - attention[:, :1])) + copy * copied

    def with_copy_entry(self, targets: Tensor) -> Tensor:
        """Targets (T, terms), and a column of the pointer's copy entry, the first unused id."""
        return F.pad(targets, (0, 1), value=self.config.vocab_size)

    def sample(self, targets: Tensor, count: int) -> tuple[Candidates, HeadFp8 | None]:
        """Candidates for targets (n, terms), `count` or all, and the head's rows for these in
        fp8."""
        candidates = Candidates(None, None, targets)
        if count:
            candidates = sample_candidates(targets, self.proposal, count)
        return candidates, self.fp8.head(candidates.tokens) if self.fp8 else None


def leaves(param: nn.Parameter, cut: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
    """Parts of a parameter as leaves of their own, whose gradients are parts of its gradient."""
    parts = cut(param.detach())
    for part, grad in zip(parts, cut(param.grad)):
        part.requires_grad_()
        part.grad = grad
    return parts


# ==================================================================================================
# 6. Optimizer
# ==================================================================================================


@dataclass(frozen=True)
class ParamGroup:
    """How one parameter is updated."""

    name: str  # of the parameter in GPT
    rule: str  # normuon or adam
    sharded: bool  # each rank updates its own rows and sends them round; else every rank all rows
    every: int  # steps whose gradients make one update; those of a last odd step make none
    lr: float = 1.0  # multiplier of muon_lr or adam_lr
    weight_decay: float = 1.0  # multiplier
    betas: tuple[float, float] = (0.9, 0.99)  # Adam only

    def is_due(self, step: int) -> bool:
        """Whether this step ends with an update of it."""
        return (step + 1) % self.every == 0


# fmt: off
# In the order in which their gradients travel: while one is on its way, the one before it makes its
# update. The new rows follow behind the last gradient.
PARAM_GROUPS = (
    #          name              rule       sharded  every  lr    weight_decay  betas
    ParamGroup("value_embed",    "adam",    True,    2,     75.0,   5.0,        (0.75, 0.95)),
    ParamGroup("mlp_bank",       "normuon", True,    1),
    ParamGroup("head",           "adam",    True,    2,      1.0, 150.0,        (0.50, 0.95)),
    ParamGroup("attention_bank", "normuon", True,    1),
    ParamGroup("small",          "adam",    False,   2),  # numbers are in small_params
)

# (a, b, c) of X <- aX + (bA + cA²)X with A = XXᵀ; Amsel et al. 2025, arXiv 2505.16932. The numbers
# are those of record 92 of modded-nanogpt: singular values from 0.003 to 1/1.05 end between 0.995
# and 1.0004.
POLAR_EXPRESS = (
    (3.923798038567, -6.095026865488, 3.905234618423),
    (3.278126713798, -3.328923386476, 0.989127286973),
    (3.505298394150, -5.137358782410, 1.968325560615),
    (2.815058591845, -3.685181239622, 1.417196497642),
    (2.245503932403, -2.443826979899, 0.963091710461),
    (2.256537145403, -2.166840097229, 0.929501253245),
)
# fmt: on


class Momentum(NamedTuple):
    """Muon's momentum in one step: update = grad + look_ahead · (mixed - grad)."""

    decay: float | Tensor  # of the mean of the gradients
    slow_share: float | Tensor  # of the slow mean in the mixed mean
    look_ahead: float | Tensor  # of Nesterov's momentum


class MuonBlock(NamedTuple):
    """Some rows of every entry of a bank, cut in matrices that Muon updates one by one."""

    rows: slice
    matrix_rows: int
    # Multipliers of its step: of the first len(layers) entries, and of those behind them
    steps: tuple[float, float] = (1.0, 1.0)

    def cut(self, bank: Tensor | None) -> Tensor | None:
        """(entries, matrices of an entry, matrix_rows, cols)"""
        return None if bank is None else bank[:, self.rows].unflatten(1, (-1, self.matrix_rows))


def muon_blocks(config: Config) -> dict[str, tuple[MuonBlock, ...]]:
    """How Muon sees each bank."""
    width, pair, hidden = config.attention_dim, 2 * config.head_dim, config.mlp_dim
    return {
        "attention_bank": (
            MuonBlock(slice(0, 2 * width), pair),  # q and k in pairs of heads
            MuonBlock(slice(2 * width, 4 * width), width),  # v and o whole
        ),
        "mlp_bank": (MuonBlock(slice(0, hidden), hidden, (1.0, 2.0)),),  # W_1, and twice for W_2
    }


def polar_express(x: Tensor) -> Tensor:
    """Nearly the polar factor UVᵀ of each matrix USVᵀ in x, (batch, rows, cols)."""
    norm, tall = widen(x).norm(dim=(1, 2), keepdim=True), x.size(1) > x.size(2)
    x = x / (1.05 * norm + 1e-6).type_as(x)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        first, second = (x, polynomial) if tall else (polynomial, x)
        x = torch.baddbmm(x, first, second, beta=a)
    return x


def apply_update_(
    weights: Tensor, copy: Tensor | None, direction: Tensor, lr: Tensor, decay: Tensor
) -> None:
    """weights -= lr·direction, and decay·weights where that has the same sign (cautious decay)."""
    shrinks = direction * weights > 0
    weights.sub_(lr * direction + decay * weights * shrinks)
    if copy is not None:
        copy.copy_(weights)


@compiled
def normuon_update_(
    weights: Tensor, copy: Tensor | None, grad: Tensor, mean: Tensor, slow_mean: Tensor,
    mean_square: Tensor, step_scale: Tensor, momentum: Momentum, slow_decay: float, beta2: float,
    lr: Tensor, decay: Tensor,
) -> None:  # fmt: skip
    """One step of NorMuon, in place, for a bank's matrices of one kind.

    weights and means in fp32, the weights' copy that the model reads, if it has another dtype, and
    grad: (entries, matrices of an entry, rows, cols). mean_square: fp32, (matrices, rows, 1), or
    (matrices, 1, cols) to even out columns. step_scale: fp32, (entries,), of the direction.
    momentum: of 0-d tensors, as are lr and decay.
    Source: NorMuon, Li et al. 2025, arXiv 2510.05491, algorithm 1. The slow mean is that of record
    92 of modded-nanogpt.
    """
    grad = grad.float()
    mean.lerp_(grad, 1 - momentum.decay)
    slow_mean.lerp_(grad, 1 - slow_decay)
    mixed = mean.lerp(slow_mean, momentum.slow_share)
    update = grad.lerp(mixed, momentum.look_ahead).flatten(0, 1)  # Nesterov's look ahead
    update = update.bfloat16() if update.is_cuda else update
    direction = polar_express(update).float()
    # Even out the rows, and keep the norm.
    across = 2 if mean_square.size(2) == 1 else 1
    squares = direction.square().sum(dim=across, keepdim=True)
    mean_square.lerp_(squares / direction.size(across), 1 - beta2)
    scale = mean_square.clamp_min(1e-12).rsqrt()
    norm, evened = (x.sum((1, 2), keepdim=True).sqrt() for x in (squares, squares * scale.square()))
    direction = direction * (scale * norm / evened.clamp_min(1e-12))
    direction = direction.view(weights.shape) * step_scale.view(-1, 1, 1, 1)
    apply_update_(weights, copy, direction, lr, decay)


@compiled
def adam_update_(
    weights: Tensor, copy: Tensor | None, grad: Tensor, mean: Tensor, mean_square: Tensor,
    betas: tuple[float, float] | tuple[Tensor, Tensor], updates: Tensor, eps: float, lr: Tensor,
    decay: Tensor,
) -> None:  # fmt: skip
    """One step of Adam (Kingma & Ba 2015, algorithm 1), in place; weights and copy as above.

    betas, lr and decay are for all weights or one a weight. updates: with this one, 0-d.
    """
    grad = grad.float()
    mean.lerp_(grad, 1 - betas[0])
    mean_square.lerp_(grad.square(), 1 - betas[1])
    first, second = (1 - beta**updates for beta in betas)
    direction = (mean / first) / ((mean_square / second).sqrt() + eps)
    apply_update_(weights, copy, direction, lr, decay)


class ParamState:
    """What one rank keeps for one parameter: its rows, in fp32 too, the moments, and averages.

    A sharded parameter has an exponential average of its weights for each time constant of
    --average_shares, which begins as a copy of them three time constants before the end. It takes 4
    bytes a weight, of which a rank has its share: in the speedrun 0.8 GiB in all, and as much again
    during the warm-up.
    """

    def __init__(self, group: ParamGroup, param: nn.Parameter, config: Config, runtime: Runtime):
        self.group, self.param = group, param
        self.num_shards = runtime.world_size if group.sharded else 1
        rows, rest = divmod(len(param), self.num_shards)
        require(
            rest == 0,
            f"{group.name} has {len(param)} rows, which {self.num_shards} processes cannot share "
            "evenly: start a number of processes that divides them",
        )
        first = (runtime.rank if group.sharded else 0) * rows
        self.rows = slice(first, first + rows)
        self.shard = param.detach()[self.rows]
        self.weights = self.shard.float()  # itself if it is fp32
        self.copy = None if self.weights is self.shard else self.shard
        constants = [x * config.num_steps for x in config.average_shares if group.sharded]  # steps
        end = config.num_steps + config.extension_steps
        self.averages = [self.weights.clone() for _ in constants]
        self.average_begins = [max(0.0, end - max(group.every, 3 * steps)) for steps in constants]
        self.average_rates = [-math.expm1(-group.every / steps) for steps in constants]
        self.mean = torch.zeros_like(self.weights)
        self.slow_mean = torch.zeros_like(self.weights) if group.rule == "normuon" else None
        self.mean_squares: list[Tensor] = []
        self.blocks: tuple[MuonBlock, ...] = ()
        self.step_scales: list[Tensor] = []  # of each block, one an entry
        self.lr, self.weight_decay, self.betas = group.lr, group.weight_decay, group.betas
        if group.name == "small":
            layout = small_params(config).values()
            sizes = torch.tensor([math.prod(row.shape) for row in layout])

            def spread(numbers: Iterable[float]) -> Tensor:  # one a parameter to one a weight
                return torch.tensor(list(numbers)).repeat_interleave(sizes).to(param.device)

            self.lr = spread(row.lr for row in layout)
            self.weight_decay = spread(row.weight_decay for row in layout)
            self.betas = tuple(spread(row.betas[i] for row in layout) for i in range(2))
        if group.rule == "adam":
            self.mean_squares = [torch.zeros_like(self.mean)]
            return
        entries, _, width = self.shard.shape
        self.blocks = muon_blocks(config)[group.name]
        is_first = torch.arange(first, first + rows) < len(config.layers)
        for block in self.blocks:
            height = block.matrix_rows
            count = entries * (block.rows.stop - block.rows.start) // height
            shape = (count, height, 1) if height >= width else (count, 1, width)
            self.mean_squares.append(torch.zeros(shape, device=param.device))
            step_scale = torch.where(is_first, *block.steps) * math.sqrt(max(1.0, height / width))
            self.step_scales.append(step_scale.to(param.device))

    def tensors(self) -> list[Tensor]:
        weights = [] if self.copy is None else [self.weights]  # else they are the parameter's
        means = [self.mean] if self.slow_mean is None else [self.mean, self.slow_mean]
        return [*weights, *means, *self.mean_squares, *self.averages]

    def average(self, step: int) -> None:
        """Bring the averages on, behind the update of this step."""
        for average, begin, rate in zip(self.averages, self.average_begins, self.average_rates):
            if step >= begin:
                is_first = step - self.group.every < begin
                average.copy_(self.weights) if is_first else average.lerp_(self.weights, rate)


class Optimizer:
    """NorMuon and Adam over PARAM_GROUPS, the large parameters shared out over the ranks.

    A step reduce-scatters the gradients of a sharded parameter, updates this rank's rows and
    all-gathers the new rows; small parameters are all-reduced and updated everywhere. All
    collectives are asynchronous, and NCCL runs them in the order of their launches:

        gradients of the parameters
        sums of the gradients of n-grams    made while the first of those travel
        new rows of the first parameter     the value tables or the MLPs, most of what is gathered
        n-grams of the next step            their rows are updated while those travel
        new rows of the other parameters    updated while the n-grams travel
    """

    def __init__(self, model: GPT, config: Config, runtime: Runtime):
        self.model, self.config, self.runtime = model, config, runtime
        params = dict(model.named_parameters())
        assert params.keys() == {group.name for group in PARAM_GROUPS}, (
            "PARAM_GROUPS and GPT disagree"
        )
        self.states = [
            ParamState(group, params[group.name], config, runtime) for group in PARAM_GROUPS
        ]

    def tensors(self) -> list[Tensor]:
        """Every tensor a step changes, parameters and n-grams left out."""
        return [tensor for state in self.states for tensor in state.tensors()]

    @recorded("optimizer")
    @torch.no_grad()
    def step(
        self, step: int, lr_scale: float, momentum: Momentum, following: RowExchange | None = None
    ) -> None:
        """Update with the gradients in .grad, summed over ranks here. Parameters with every = 2
        keep theirs on even steps and are updated on odd ones. following: of the next step, whose
        n-grams are pulled here."""
        due = [state for state in self.states if state.group.is_due(step)]
        reductions = [self._launch_reduction(state) for state in due]
        ngrams, gathers = self.model.ngrams, []
        ngrams.send_gradients()
        for state, finish_reduction in zip(due, reductions):
            with recorded(f"update {state.group.name}"):
                self._update(state, finish_reduction(), step, lr_scale, momentum)
            if state.num_shards > 1:
                gathers.append(
                    dist.all_gather_into_tensor(state.param.detach(), state.shard, async_op=True)
                )
            if state is due[0]:
                ngrams.update(self.config.ngram_lr * lr_scale, self.config.adam_eps)
                ngrams.pull(following)
        for state in due:  # while these travel
            state.param.grad.zero_()
            state.average(step)
        for work in gathers:
            work.wait()
        if self.model.fp8 is not None:
            self.model.fp8.refresh()

    @recorded("reductions")
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
        self, state: ParamState, grad: Tensor, step: int, lr_scale: float, momentum: Momentum
    ) -> None:
        config, group = self.config, state.group

        def rates(base: float, weight_decay: float) -> tuple[Tensor, Tensor]:
            lr = torch.full((), base * lr_scale, device=grad.device) * state.lr
            return lr, lr * lr * weight_decay * state.weight_decay

        if group.rule == "adam":
            updates = torch.full((), (step + 1) // group.every, device=grad.device)
            lr, decay = rates(config.adam_lr, config.adam_weight_decay)
            adam_update_(
                state.weights, copy=state.copy, grad=grad, mean=state.mean,
                mean_square=state.mean_squares[0], betas=state.betas, updates=updates,
                eps=config.adam_eps, lr=lr, decay=decay,
            )  # fmt: skip
            return
        momentum = Momentum(*(torch.full((), x, device=grad.device) for x in momentum))
        lr, decay = rates(config.muon_lr, config.muon_weight_decay)
        blocks = zip(state.blocks, state.mean_squares, state.step_scales, strict=True)
        for block, mean_square, step_scale in blocks:
            normuon_update_(
                block.cut(state.weights), copy=block.cut(state.copy), grad=block.cut(grad),
                mean=block.cut(state.mean), slow_mean=block.cut(state.slow_mean),
                mean_square=mean_square, step_scale=step_scale, momentum=momentum,
                slow_decay=config.slow_decay, beta2=config.muon_beta2, lr=lr, decay=decay,
            )  # fmt: skip

    @torch.no_grad()
    def keep_last_weights(self) -> None:
        """Once behind the last update, for write_blend: in place of the first moments, which no
        update needs any more."""
        for state in self.states:
            state.mean.copy_(state.weights)

    @torch.no_grad()
    def write_blend(self, number: int, blend: float) -> None:
        """Make the weights W + blend · (average - W), where W is the last weights and `number` that
        of a time constant.

        Each matrix, an entry of a bank or a whole table, is scaled to the Frobenius norm that it
        has in W, as averaging makes it smaller. A blend of 0 gives W, bit for bit.
        """
        for state in self.states:
            if not state.averages:
                continue
            torch.lerp(state.mean, state.averages[number], blend, out=state.weights)
            height = 1 if state.param.dim() == 3 else self.config.padded_vocab_size  # of a matrix
            squares = state.mean.new_zeros(2, len(state.param))  # of every row, in W and now
            for part, weights in zip(squares[:, state.rows], (state.mean, state.weights)):
                part.copy_(torch.linalg.vector_norm(weights.flatten(1), dim=1).square())
            last, now = self.runtime.all_reduce(squares.unflatten(1, (-1, height)).sum(2))
            scale = (last / now.clamp_min(1e-30)).sqrt().repeat_interleave(height)[state.rows]
            state.weights.mul_(scale.view(-1, *[1] * (state.param.dim() - 1)))
            if state.copy is not None:
                state.copy.copy_(state.weights)
            if state.num_shards > 1:
                dist.all_gather_into_tensor(state.param.detach(), state.shard)
        if self.model.fp8 is not None:
            self.model.fp8.refresh()


@contextlib.contextmanager
def nothing_changes(model: GPT, optimizer: Optimizer) -> Iterator[None]:
    """At the end put every weight and optimizer state back, bit for bit, drop the gradients, forget
    what was read, and empty the table of n-grams."""
    tensors = [param.detach() for param in model.parameters()] + optimizer.tensors()
    copies = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, copy in zip(tensors, copies):
            tensor.copy_(copy)
        for param in model.parameters():
            param.grad.zero_()
        if model.matches is not None:
            model.matches.reset()
        model.ngrams.reset()
        if model.fp8 is not None:
            model.fp8.reset()


# ==================================================================================================
# 7. Data
# ==================================================================================================

GET_DATA = "data/cached_fineweb.py fetches one, data/tokenize_text.py or data/sample.py makes one"
GPT2_TOKENS = "data/gpt2_tokens.npz"  # GPT-2's vocabulary, made by data/token_table.py
MORE_DATA = (
    "add shards (data/cached_fineweb.py), lower --num_steps or --match_shards, as those are not "
    "trained on, or pass --repeat_data true, which is not for runs with --match_orders"
)


def read_shard_header(path: str) -> int:
    """Number of tokens in a shard. Raises UserError unless header and file length agree."""
    header_bytes = 4 * SHARD_HEADER_INTS
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS).tolist()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}): check --train_files and --val_file"
        ) from None
    magic, version, num_tokens = header[:3] if len(header) == SHARD_HEADER_INTS else (0, 0, 0)
    expected = header_bytes + 2 * num_tokens
    for holds, found in (
        (size >= header_bytes, f"{size} bytes, shorter than a shard's header of {header_bytes}"),
        (magic == SHARD_MAGIC, f"not a token shard (magic {magic}, expected {SHARD_MAGIC})"),
        (version == SHARD_VERSION, f"shard version {version}, expected {SHARD_VERSION}"),
        (size == expected, f"{size} bytes, expected {expected} for its {num_tokens} tokens"),
    ):
        require(holds, f"{path}: {found}: {GET_DATA}")
    return num_tokens


def read_tokens(path: str, count: int, vocab_size: int) -> np.ndarray:
    """The first `count` tokens of a checked shard, uint16."""
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=4 * SHARD_HEADER_INTS)
    if len(tokens) and tokens.max() >= vocab_size:
        index = int(np.argmax(tokens >= vocab_size))
        found = f"token {tokens[index]} at position {index} is outside the vocabulary"
        raise UserError(f"{path}: {found} of {vocab_size} (GPT-2's): {GET_DATA}")
    return tokens


def find_files(option: str, pattern: str) -> list[str]:
    """The files of a glob pattern, sorted. What exists is taken by its name, be it the whole path
    or the folders it begins with: a name may have [ ] in it."""
    path = Path(pattern)
    named = next(part for part in (path, *path.parents) if os.path.exists(part))
    files = sorted(glob.glob(str(Path(glob.escape(str(named)), path.relative_to(named)))))
    require(len(files) > 0, f"{option} {pattern}: no such file: {GET_DATA}")
    return files


def find_val_file(config: Config) -> str:
    files, pattern = find_files("--val_file", config.val_file), config.val_file
    require(len(files) == 1, f"--val_file {pattern}: {len(files)} files have such a name: give one")
    return files[0]


class TrainFiles(NamedTuple):
    """The shards of --train_files. A run asks for them once, so that files that come or go make
    none of the one kind into the other."""

    read: list[str]  # by training, in this order
    looked_up: list[str]  # only, the last ones, as many as --match_shards says


def find_train_files(config: Config) -> TrainFiles:
    files, count = find_files("--train_files", config.train_files), config.match_shards
    few = f"--match_shards {count}: --train_files {config.train_files} has {len(files)} shards, "
    require(count < len(files), few + "which leaves none to train on: add shards or take less")
    return TrainFiles(files[: len(files) - count], files[len(files) - count :])


def prefetch(items: Iterator, depth: int) -> Iterator:
    """The items, made by a thread, `depth` of them ahead, and then what making them raises."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    pending = deque(thread.submit(next, items, None) for _ in range(depth))

    def hand_on() -> Iterator:
        while (item := pending.popleft().result()) is not None:
            pending.append(thread.submit(next, items, None))
            yield item

    return hand_on()


def load_shard(path: str, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Its tokens, and where in them documents start."""
    tokens = read_tokens(path, read_shard_header(path), vocab_size)
    starts = np.flatnonzero(tokens == START_TOKEN)
    found = f"no document begins in it (start token {START_TOKEN})"
    require(len(starts) > 0, f"{path}: {found}: {GET_DATA}")
    return tokens, starts


class TokenStream:
    """The training shards as one stream of documents, read once, in order.

    Each sequence is a run of whole documents, cut at max_seq_len; the last one is cut so that the
    sequence holds exactly T + 1 tokens: T inputs and their next tokens. The next sequence begins
    with the next document. With T 4, max_seq_len 3 and S for the start token, the documents
    S a b, S c d e and S f g h make

        S a b S c    of the second document 2 tokens fit; d e is not read
        S f g ...    the third one is cut at max_seq_len

    While one shard is used, the next one is loaded.
    """

    def __init__(self, files: list[str], vocab_size: int, repeat: bool):
        files = itertools.cycle(files) if repeat else iter(files)
        self.shards = prefetch((load_shard(path, vocab_size) for path in files), depth=1)
        self.tokens, self.starts = next(self.shards)  # tokens, where unread documents start
        self.sequences_read, self.ended = 0, False

    def _append_shard(self) -> None:
        """Put the next shard behind the unread documents: the last one may go on in it. Behind the
        last shard comes an empty one with one start, at which the last document ends."""
        require(
            not self.ended,
            f"--train_files: the training data ran out after {self.sequences_read} sequences, "
            "before the schedule did (what max_seq_len cuts off a document is not read): "
            f"{MORE_DATA}",
        )
        rest, first = self.tokens[self.starts[0] :], self.starts[0]
        tokens, starts = next(self.shards, (rest[:0], np.zeros(1, np.int64)))
        self.ended = len(tokens) == 0
        self.tokens = np.concatenate([rest, tokens])
        self.starts = np.concatenate([self.starts - first, starts + len(rest)])

    def next_sequence(self, num_tokens: int, max_seq_len: int) -> list[np.ndarray]:
        """Documents of the next sequence, num_tokens + 1 tokens in all; UserError at the end."""
        while True:
            lengths = np.minimum(np.diff(self.starts[: num_tokens + 2]), max_seq_len)
            filled = np.cumsum(lengths)
            count = int(np.searchsorted(filled, num_tokens, side="right")) + 1
            if count <= len(lengths):
                break
            self._append_shard()
        lengths[count - 1] -= filled[count - 1] - (num_tokens + 1)  # cuts the last one
        begins, self.starts = self.starts[:count], self.starts[count:]
        self.sequences_read += 1
        return [self.tokens[begin : begin + length] for begin, length in zip(begins, lengths)]


def make_batch(
    sequences: list[tuple[np.ndarray, np.ndarray]], max_seq_len: int, min_mean_doc_len: int,
    pin: bool,
) -> Batch:  # fmt: skip
    """Batch of sequences, T + 1 tokens and the positions where their documents start each.

    cu_seqlens is as long as a document in min_mean_doc_len tokens asks for, or longer if there are
    more. Two sequences of 4 + 1 tokens whose documents start at 0, 3 and at 0, 1, with
    min_mean_doc_len 2, have the 8 inputs behind one another and cu_seqlens 0 3 4 5 8 8.
    """
    tokens = np.stack([tokens for tokens, _ in sequences])
    inputs, targets = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int64)
    length, num_tokens = inputs.shape[1], inputs.size
    starts = [starts[starts < length] + i * length for i, (_, starts) in enumerate(sequences)]
    starts = np.concatenate(starts)
    most_documents = max(num_tokens // min_mean_doc_len + 1, len(starts))
    cu_seqlens = np.full(most_documents + 1, num_tokens, dtype=np.int32)
    cu_seqlens[: len(starts)] = starts
    batch = [torch.from_numpy(array) for array in (inputs.ravel(), targets.ravel(), cu_seqlens)]
    if pin:  # torch keeps pinned buffers and reuses one only when the copy out of it is done
        batch = [tensor.pin_memory() for tensor in batch]
    return Batch(*batch, max_seq_len, len(sequences))


def random_tokens(random: np.random.Generator, count: int) -> np.ndarray:
    """Ids below START_TOKEN, uint16, each as rare as it is high: of evenly drawn ones a sequence
    would have more different ones than candidates."""
    return (START_TOKEN ** random.random(count)).astype(np.uint16) - 1


def rank_batches(
    sequences: list[tuple[np.ndarray, np.ndarray]], count: int, max_seq_len: int, config: Config,
    runtime: Runtime,
) -> list[Batch]:  # fmt: skip
    """This rank's micro-batches, of `count` sequences, of those that all ranks compute: in each the
    ranks take what follows one another.

    sequences: as make_batch takes them. As every rank reads all of them, it knows without asking
    which n-grams the others will read: of several ranks the batches have rows and an exchange.
    """
    ranks, pin, orders = runtime.world_size, runtime.device.type == "cuda", config.ngram_orders
    firsts = range(runtime.rank * count, len(sequences), ranks * count)
    parts = [sequences[first : first + count] for first in firsts]
    batches = [make_batch(part, max_seq_len, config.min_mean_doc_len, pin) for part in parts]
    if ranks == 1:
        return batches
    hashed = (ngram_hash_on_host(x[:-1], orders, config.ngram_rows) for x, _ in sequences)
    rows = np.stack([*hashed])
    # (sequences, T, orders) to (ranks, passes, sequences of a pass, T, orders)
    rows = rows.reshape(len(parts), ranks, count, *rows.shape[1:]).swapaxes(0, 1)
    share = config.ngram_rows_per_rank(ranks)
    exchange, places = plan_exchange(rows.reshape(ranks, -1), runtime.rank, share)
    places = torch.from_numpy(places.reshape(len(parts), -1, len(orders)))
    if pin:
        exchange, places = exchange._replace(rows=exchange.rows.pin_memory()), places.pin_memory()
    return [batch._replace(rows=x, exchange=exchange) for batch, x in zip(batches, places)]


def training_batches(
    config: Config, runtime: Runtime, shapes: Iterable, unread: Iterable = (),
    files: TrainFiles | None = None,
) -> Iterator[list[Batch]]:  # fmt: skip
    """This rank's sequences of every step, micro-batch by micro-batch. shapes: (T, max_seq_len) of
    a sequence, for each step; unread: of what follows the steps, where each is a micro-batch of its
    own, as in validation. files: where find_train_files was asked before."""

    def with_starts(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate(documents), np.cumsum([0, *map(len, documents[:-1])])

    files = files or find_train_files(config)
    # what is read twice could be predicted
    stream = TokenStream(
        files.read, config.vocab_size, config.repeat_data and not config.match_orders
    )
    counts = ((shape, config.sequences_per_pass(shape[0], runtime.world_size)) for shape in shapes)
    for shape, count in itertools.chain(counts, zip(unread, itertools.repeat(1))):
        sequences = [stream.next_sequence(*shape) for _ in range(config.sequences_per_step)]
        yield rank_batches([*map(with_starts, sequences)], count, shape[1], config, runtime)


def read_proposal(config: Config, path: str) -> Tensor:
    """How often sample_candidates takes a token: the root of how often it comes in the first four
    million training tokens, which halves the variance of even draws; (vocab,) fp32. path: of the
    first training shard."""
    tokens = read_tokens(path, 2**22, config.vocab_size)
    counts = np.bincount(tokens, minlength=config.padded_vocab_size)
    return torch.from_numpy(counts + 2).float().sqrt()


def check_data(
    config: Config, shapes: list[tuple[int, int]], files: TrainFiles | None = None
) -> int:
    """See that the data lasts, and is whole wherever it will be read, before anything is compiled;
    gives the number of targets that validation scores. shapes: (T, max_seq_len) of every sequence
    of all ranks. files: where find_train_files was asked before."""
    files, val_file = files or find_train_files(config), find_val_file(config)
    everything = (*files.read, *files.looked_up)
    sizes = [read_shard_header(path) for path in everything]  # a bad one is found here
    total = sum(sizes[: len(files.read)])
    needed = sum(num_tokens for num_tokens, _ in shapes)
    require(
        needed < total or config.repeat_data,
        f"--train_files {config.train_files}: {total} tokens to train on, but the schedule reads "
        f"at least {needed}: {MORE_DATA}",
    )
    require(
        needed < total or not config.match_orders,
        f"--match_orders: the schedule reads {needed} tokens, more than the {total} of "
        "--train_files, which the lookup would predict when they are repeated: add shards or lower "
        "--num_steps",
    )
    num_targets = min(config.val_tokens, read_shard_header(val_file) - 1)
    require(num_targets > 0, f"{val_file}: too short to validate on: make a longer one")
    for path in everything:
        require(not os.path.samefile(path, val_file),
                f"--train_files {config.train_files} has the validation file {path} too: give a "
                "pattern without it")  # fmt: skip
    read_tokens(val_file, num_targets + 1, config.vocab_size)
    for path in files.looked_up:
        load_shard(path, config.vocab_size)
    stream = TokenStream(files.read, config.vocab_size, repeat=False)
    try:
        for shape in shapes:  # five seconds for all of the speedrun
            stream.next_sequence(*shape)
    except UserError:
        if not stream.ended or not config.repeat_data or config.match_orders:
            raise
    return num_targets


def validation_batches(config: Config, runtime: Runtime, num_targets: int) -> Iterator[Batch]:
    """This rank's sequences of the validation stream as it is; every target once, documents
    masked. All ranks have as many: at the end some have one without a target."""
    path, size = find_val_file(config), config.val_sequence_tokens
    tokens = read_tokens(path, num_targets + 1, config.vocab_size)

    def sequence(begin: int) -> tuple[np.ndarray, np.ndarray]:
        part = tokens[begin : begin + size + 1]
        real = max(len(part) - 1, 0)
        part = np.pad(part, (0, size + 1 - len(part)), constant_values=START_TOKEN)  # the last one
        starts = np.union1d([0], np.flatnonzero(part[: min(real + 1, size)] == START_TOKEN))
        return part, starts

    for begin in range(0, num_targets, runtime.world_size * size):
        begins = [begin + rank * size for rank in range(runtime.world_size)]
        (batch,) = rank_batches([*map(sequence, begins)], 1, size, config, runtime)
        batch.targets[max(0, num_targets - begins[runtime.rank]) :] = IGNORED_TARGET
        yield batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    return batch.map(lambda tensor: tensor.to(device, non_blocking=True))


# --- GPT-2's tokens -------------------------------------------------------------------------------


class TokenTable(NamedTuple):
    """GPT-2's vocabulary: byte pair encoding's merges make a token of two earlier ones each."""

    tokens: list[bytes]  # of every id but START_TOKEN, which has none
    merges: np.ndarray  # (50000, 2): the two halves of tokens 256, 257, …


def read_token_table() -> TokenTable:
    """From GPT2_TOKENS, which lies in the repository of this script or of the current folder."""
    folders = (*Path(__file__).resolve().parents, Path())
    path = next(p for f in folders if (p := f / GPT2_TOKENS).exists() or f == Path())
    remedy = "get it from the repository, or make it again with data/token_table.py"
    try:
        with np.load(path) as arrays:
            single_bytes, merges = arrays["single_bytes"], arrays["merges"].astype(np.int64)
    except Exception as error:  # noqa: BLE001 (whatever a torn file makes numpy raise)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}): {remedy}") from None
    whole = np.array_equal(np.sort(single_bytes), np.arange(256))
    whole = whole and merges.shape == (START_TOKEN - 256, 2) and merges.min() >= 0
    whole = whole and (merges.max(1) < np.arange(256, START_TOKEN)).all()  # halves come first
    require(whole, f"{path}: is not the table of GPT-2's tokens: {remedy}")
    tokens = [bytes([byte]) for byte in single_bytes]
    for left, right in merges.tolist():
        tokens.append(tokens[left] + tokens[right])
    return TokenTable(tokens, merges)


# Which token may follow which. GPT-2's tokenizer cuts a text into pre-tokens by this pattern,
#
#     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
#
# and makes tokens of each one by byte pair encoding: it starts from single bytes and merges two
# neighbours, those whose merge has the lowest id first, of equal ones the leftmost. So "th" and "e"
# are never behind one another: they would have been merged. SEAMS says what the seam of two tokens
# can be, by the kinds of the last character of the one (rows) and of the first of the other:
#
#     +  inside of a pre-token in every text: the merges decide
#     -  in no text
#     ?  perhaps the border of two pre-tokens: the other may follow
#
# The first column and row are UTF-8's. A contraction is one after a letter, a digit or a line end;
# after a blank or other punctuation its ' belongs to that. A blank before anything else but white
# space is in one pre-token with it. Where a run of white space is cut depends on what ends it.
CONTRACTIONS = {b"'s", b"'t", b"'re", b"'ve", b"'m", b"'ll", b"'d"}  # a token each
# fmt: off
FIRST_KINDS = ("inside", "letter", "number", "other", "contraction", "blank", "else")
SEAMS = {
    "open":    ("+",     "-",      "-",      "-",     "-",           "-",     "-"),  # half of one
    "unknown": ("+",     "?",      "?",      "?",     "?",           "?",     "?"),  # its end
    "letter":  ("-",     "+",      "?",      "?",     "?",           "?",     "?"),
    "number":  ("-",     "?",      "+",      "?",     "?",           "?",     "?"),
    "other":   ("-",     "?",      "?",      "+",     "-",           "?",     "?"),
    "blank":   ("-",     "+",      "+",      "+",     "-",           "?",     "?"),
    "else":    ("-",     "?",      "?",      "?",     "?",           "?",     "?"),
}
# fmt: on


@functools.cache
def character_kind(character: str) -> str:
    if character == " ":
        return "blank"
    if not character or character.isspace():
        return "else"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "other")


def token_edges(token: bytes) -> tuple[str, str]:
    """The kinds of its first and its last character: a column and a row of SEAMS."""
    if token in CONTRACTIONS:
        return "contraction", "else"
    whole, last = token.lstrip(bytes(range(0x80, 0xC0))), None  # without the end of a character
    try:
        text = whole.decode()
    except UnicodeDecodeError as error:
        text = whole[: error.start].decode()
        last = "open" if error.reason == "unexpected end of data" else "unknown"
    first = "inside" if len(whole) < len(token) else character_kind(text[:1])
    return first, last or (character_kind(text[-1]) if text else "unknown")


def pieces_at_edge(halves: np.ndarray) -> tuple[np.ndarray, ...]:
    """The pieces that lie at one edge of each token while merges make it. halves: (tokens,), the
    half of a token at that edge, -1 for a single byte. Returns (n,) each: the token, the piece, and
    the merge that takes the piece up, len(halves) where it is the token itself."""
    token = piece = np.arange(len(halves))
    until, found = np.full(len(halves), len(halves)), []
    while len(token):
        found.append((token, piece, until))
        merged = halves[piece] >= 0
        token, piece, until = token[merged], halves[piece[merged]], piece[merged]
    return tuple(map(np.concatenate, zip(*found)))


def expand(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All numbers of the ranges from begin to end, and which range each one is of: for 3 and 7 to 5
    and 8 they are 3 4 7, of 0 0 1."""
    lengths = end - begin
    which = np.repeat(np.arange(len(begin)), lengths)
    return np.arange(len(which)) + np.repeat(end - np.cumsum(lengths), lengths), which


def impossible_pairs(table: TokenTable, vocab: int) -> np.ndarray:
    """The pairs of tokens that GPT-2's tokenizer never puts behind one another, in any text:
    (vocab, vocab / 8) uint8, bit t % 8 of byte t // 8 in row s for t behind s.

    Inside of a pre-token s t are what merges leave only if none joins a piece x at the right edge
    of s with a piece y at the left edge of t. Merge m, of x and y, does if both lie there when it
    is its turn: m < p, the merge that takes x up in s, and m <= q, the one that takes y up in t
    (of equal merges the one further left comes first). What stands around s and t changes nothing,
    as it merges with neither.
    """
    count, (left, right) = len(table.tokens), table.merges.T
    merge, bytes_have_none = np.arange(256, count), np.full(256, -1)

    # The merges of x below p are neighbours where all are sorted by left half, then by themselves.
    by_left, by_right = np.argsort(left, kind="stable"), np.argsort(right, kind="stable")
    token, piece, until = pieces_at_edge(np.concatenate([bytes_have_none, right]))
    keys = (left * count + merge)[by_left]
    begin, end = (np.searchsorted(keys, piece * count + bound) for bound in (0, until))
    # So are the tokens behind them: for one merge after the other, those that have its y in time.
    follower, piece, until = pieces_at_edge(np.concatenate([bytes_have_none, left]))
    keys = (right * count + merge)[by_right]
    which, of = expand(*(np.searchsorted(keys, piece * count + bound) for bound in (0, until + 1)))
    place = np.argsort(by_left)[by_right[which]]
    followers = follower[of][np.argsort(place, kind="stable")]
    starts = np.cumsum(np.bincount(place + 1, minlength=count))
    runs: list[list[slice]] = [[] for _ in range(count)]  # of followers, for every token
    for s, *run in zip(*(x[begin < end].tolist() for x in (token, starts[begin], starts[end]))):
        runs[s].append(slice(*run))

    def packed_bits(x: np.ndarray) -> np.ndarray:
        return np.packbits(x, axis=1, bitorder="little")

    kinds = [*SEAMS]
    first, last = zip(*map(token_edges, table.tokens))
    first, last = map(FIRST_KINDS.index, first), np.array([*map(kinds.index, last)])
    seams = np.full((len(kinds), vocab), "?")  # of every kind and token
    seams[:, :count] = np.array([*SEAMS.values()])[:, [*first]]
    decided, never = packed_bits(seams == "+"), packed_bits(seams == "-")
    impossible = np.zeros((vocab, vocab // 8), np.uint8)
    for i in range(0, count, 256):  # tokens at once
        tokens = slice(i, min(i + 256, count))
        merged = np.zeros((tokens.stop - i, vocab), np.bool_)
        for row, of_row in zip(merged, runs[tokens]):
            for run in of_row:
                row[followers[run]] = True
        kind = last[tokens]
        impossible[tokens] = packed_bits(merged) & decided[kind] | never[kind]
    return impossible


# ==================================================================================================
# 8. Schedule
# ==================================================================================================


class Schedule:
    """The stages laid out over the steps."""

    def __init__(self, config: Config):
        self.config = config
        self.total_steps = config.num_steps + config.extension_steps
        self.end_step = min(config.stop_step or self.total_steps, self.total_steps)
        edges = np.cumsum([stage.share for stage in config.stages])
        self.stage_ends = [round(float(edge) * config.num_steps) for edge in edges]

    def stage(self, step: int) -> Stage:
        stages = zip(self.stage_ends, self.config.stages)
        return next((stage for end, stage in stages if step < end), self.config.extension[0])

    def windows(self, step: int) -> Windows:
        return self.stage(step).windows

    def sequence_shape(self, step: int) -> tuple[int, int]:
        """Tokens of a sequence, and of the longest document in it."""
        stage = self.stage(step)
        return stage.tokens_per_step // self.config.sequences_per_step, stage.max_seq_len

    def describe(self, step: int) -> str:
        """What tells its sequences from others of their length."""
        stage = self.stage(step)
        counted = f", {stage.candidates:,} candidates" if stage.candidates else ""
        return f"windows {stage.window_short} and {stage.window_long}{counted}"

    def rates(self, step: int) -> tuple[float, Momentum]:
        """The learning rate's multiplier and Muon's momentum."""
        return self.lr_scale(step), self.momentum(step)

    def lr_scale(self, step: int) -> float:
        """The stage's multiplier, falling linearly to lr_end from lr_decay_start on."""
        config, lr = self.config, self.stage(step).lr
        remaining = max(0.0, 1 - step / config.num_steps) / (1 - config.lr_decay_start)
        return lr if remaining >= 1 else lr * remaining + config.lr_end * (1 - remaining)

    def momentum(self, step: int) -> Momentum:
        """Linear warm-up, plateau, linear cool-down over the last steps; from slow_start on the
        decay of the mean is that of the start again, and the slow mean has its share."""
        config = self.config
        start, cooldown = config.momentum_start, config.momentum_cooldown_steps
        up = step / config.momentum_warmup_steps
        down = (self.total_steps - step) / cooldown if cooldown else 1.0
        look_ahead = start + min(up, down, 1.0) * (config.momentum_peak - start)
        if step < config.slow_start * config.num_steps:
            return Momentum(look_ahead, 0.0, look_ahead)
        return Momentum(start, config.slow_share, look_ahead)


# ==================================================================================================
# 9. Train and validate
# ==================================================================================================


class Clock:
    """Training time in seconds; validation stops it."""

    def __init__(self, runtime: Runtime):
        self.runtime, self.total = runtime, 0.0

    def start(self) -> None:
        self.runtime.synchronize()
        self.begin = self.total, self.mark()
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.runtime.synchronize()
        self.total += time.perf_counter() - self.started

    def mark(self) -> torch.cuda.Event | None:
        """What the device reaches when it has done all that was launched so far."""
        if self.runtime.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def at(self, mark: torch.cuda.Event | None) -> float:
        """When the device reached a mark made since the last start: the host may look later. None
        is now, while the clock runs."""
        total, begin = self.begin
        if mark is None:
            return total + time.perf_counter() - self.started
        mark.synchronize()
        return total + begin.elapsed_time(mark) / 1000


def not_finite_error(
    model: GPT, what: str, first: tuple[int, list[str]] | None = None
) -> UserError:
    """Says what is not finite, where that was seen first, and what to try in which order.

    first: a step, and what of Fp8Copies.health is not finite behind it.
    """
    config = model.config
    seen = "nothing else was seen before it"
    if first is not None:
        step, names = first
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        seen = f"not finite behind step {step}: {', '.join(names[:3])}{more}"
    else:
        bad = [name for name, param in model.named_parameters() if not param.isfinite().all()]
        if bad:
            seen = f"not finite by now: {', '.join(bad)}"
    tries = [] if config.self_check else ["--self_check true"]
    if model.fp8 is not None:
        tries.append("--fp8 false, which tells whether a scale is at fault")
    tries.append(f"lower --muon_lr {config.muon_lr} and --adam_lr {config.adam_lr}")
    if any(stage.candidates for stage in config.stages):
        tries.append("more candidates in --stages (fewer than the different targets give NaN)")
    tries.append("the data of --train_files and --val_file")
    return UserError(f"{what}; {seen}. Try in this order: {'; '.join(tries)}")


class Progress:
    """Reports steps as they complete on the device, without waiting for the one just launched.

    The loss of a step is copied to pinned memory behind the step's own work; it is read a few steps
    later, which also keeps the host from running further ahead than that.
    """

    MAX_IN_FLIGHT = 3
    NOT_LEARNING = 50  # steps, in which the loss of a run that learns falls by some nats

    def __init__(self, model: GPT, runtime: Runtime, clock: Clock, total_steps: int):
        self.model, self.runtime, self.clock, self.last_time = model, runtime, clock, 0.0
        self.pending: deque[tuple[int, list[Tensor], torch.cuda.Event | None]] = deque()
        self.first_loss = math.nan
        self.first_bad: tuple[int, list[str]] | None = None  # a step, and what is not finite in it
        self.bar = tqdm(
            total=total_steps,
            disable=None if runtime.is_main else True,  # None: only on a terminal
            bar_format="{desc}{bar} step {n_fmt}/{total_fmt}{postfix} · {remaining} left",
            dynamic_ncols=True,
        )

    def warn_of_no_learning(self, step: int, loss: float) -> None:
        """Once, if the loss is where it was at first after NOT_LEARNING steps."""
        if step == 0:
            self.first_loss = loss
        if step == self.NOT_LEARNING and loss > self.first_loss - 0.5:
            self.runtime.log.line(
                f"warning: this run does not learn: its loss is {loss:.2f} at step {step + 1}, "
                f"after {self.first_loss:.2f} at step 1. Try in this order: --self_check true; "
                "--fp8 false; other --muon_lr and --adam_lr; the data of --train_files"
            )

    def launched(self, step: int, loss: Tensor) -> None:
        """loss: mean training loss of this rank's tokens, a scalar on the device."""
        numbers = [loss] if self.model.fp8 is None else [loss, self.model.fp8.health]
        copies = [x.to("cpu", non_blocking=True) for x in numbers]
        self.pending.append((step, copies, self.clock.mark()))
        self.report(self.MAX_IN_FLIGHT)

    def report(self, in_flight: int = 0) -> None:
        """The steps that are done; waits for them if more than that many are not."""
        while self.pending:
            step, (loss, *health), mark = self.pending[0]
            if len(self.pending) <= in_flight and mark is not None and not mark.query():
                return
            self.pending.popleft()
            now, value = self.clock.at(mark), loss.item()
            if health and not self.first_bad and not health[0].isfinite().all():
                self.first_bad = step + 1, self.model.fp8.not_finite(health[0])
            if not math.isfinite(value):
                where = f"the training loss is {value} at step {step + 1}"
                raise not_finite_error(
                    self.model, f"{where} (rank {self.runtime.rank})", self.first_bad
                )
            self.warn_of_no_learning(step, value)
            step_ms, self.last_time = 1000 * (now - self.last_time), now
            self.runtime.log.step(step + 1, value, now, step_ms)
            mean_ms = f"{1000 * now / (step + 1):.1f} ms/step"
            self.bar.set_postfix_str(f"loss {value:.3f} · {mean_ms}", refresh=False)
            self.bar.update()


# --- Self-check -----------------------------------------------------------------------------------
#
# A compiler can get a kernel wrong, and then the model does not learn: with Triton 3.7.1 the
# transposed copy of an fp8 tile has been garbage. So before training every kernel of the run works
# on a few random tokens, at the run's own widths, and so does its reference in fp64. What
# selects a variant of a kernel is as in the run, so that it is compiled here for the run as well.

CHECK_SEQUENCES, CHECK_LENGTH = 3, 112  # do not fill the last tile of 32 or of 128 tokens
CHECK_ROWS = 4096  # of tables; the kernel that adds fewer is another one


class Result(NamedTuple):
    """Something that a kernel has computed."""

    name: str
    value: Tensor
    reference: Tensor
    # How far it may be off, by `disagreement`. Rounding gives up to 0.01 in bf16, 0.04 in e4m3 and
    # 0.1 in e5m2; a row that is missing, zeros and twice the scale give 0.5 and more.
    limit: float = 0.05


def disagreement(value: Tensor, reference: Tensor) -> float:
    """The largest relative error of a row or column: the norm of the error over the norm of the
    reference or, where that is more, over the rms of all such norms. Infinite if anything is not
    finite."""
    exact, worst = reference.detach().double(), 0.0
    exact = exact.reshape(-1, exact.size(-1)) if exact.dim() > 1 else exact.reshape(1, -1)
    error = value.detach().double().reshape(exact.shape) - exact
    for dim in (0, 1):
        norms = exact.norm(dim=dim)
        norms = norms.maximum(norms.square().mean().sqrt()).clamp_min(1e-30)
        worst = max(worst, (error.norm(dim=dim) / norms).nan_to_num(math.inf).max().item())
    return worst


def dequantized(copy: Fp8) -> Tensor:
    """The numbers of a matrix in fp8, or of a batch of them, in fp64."""
    scale = copy.scale[..., :1, None] if copy.rows.dim() == 3 else copy.scale[0]
    return copy.rows.float().double() * scale.double()


def fp8_results(name: str, copy: Fp8, reference: Tensor, limit: float = 0.1) -> list[Result]:
    """A matrix in fp8, and whether its transpose holds the same numbers."""
    transposed = f"{name}, transposed", copy.columns.float().mT, copy.rows.float(), 0.0
    return [Result(name, dequantized(copy), reference, limit), Result(*transposed)]


class SelfCheck:
    """Runs every Triton kernel of a model's training, and its attention, beside the reference
    implementation: a method for each. What torch.compile makes is compiled, not compared."""

    def __init__(self, model: "GPT"):
        self.config, self.backend = model.config, model.backend
        self.uses_fp8 = model.fp8 is not None
        self.dtype, self.device = model.head.dtype, model.head.device
        self.tokens, self.dim = CHECK_SEQUENCES * CHECK_LENGTH, self.config.model_dim
        self.generator = torch.Generator(self.device).manual_seed(0)

    def methods(self) -> dict[str, Callable[[], list[Result]]]:
        """The checks, by what messages call their kernels."""
        fp8 = "fp8 copies", "QKV", "MLP", "head and loss"
        methods = dict(zip(fp8, (self.fp8_copies, self.qkv, self.mlp, self.head)))
        return {
            **({"attention": self.attention} if self.backend != "plain" else {}),
            **(methods if self.uses_fp8 else {}),
            "pointer": self.pointer,
            "sums of streams": self.sums,
            "rows of tables": self.table_rows,
            "updates of n-grams": self.ngram_updates,
            **({"n-gram lookup": self.matches} if self.config.match_orders else {}),
        }

    def random(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device)
        return (std * x).to(dtype or self.dtype)

    def leaf(self, *shape: int, std: float = 1.0) -> Tensor:
        return self.random(*shape, std=std).requires_grad_()

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def scale_for(self, largest: float | Tensor) -> Tensor:
        """The fp8 scale, with HEADROOM, of a matrix with this largest number, or of a batch."""
        largest = torch.as_tensor(largest, dtype=torch.float32, device=self.device)
        return (HEADROOM / FP8_MAX * largest)[..., None].repeat_interleave(4, dim=-1)

    def in_fp8(self, x: Tensor) -> Fp8:
        x = x.detach()
        return quantize(x, fp8_empty(x.shape, self.scale_for(x.abs().max())))

    def none_yet(self, count: int) -> Tensor:
        """A buffer for the largest numbers that kernels see."""
        return torch.zeros(count, device=self.device)

    def delayed_for(self, largest: Tensor) -> DelayedScale:
        return DelayedScale(self.scale_for(largest), self.none_yet(1))

    def compare(
        self, op: Callable[..., Sequence], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> list[Result]:
        """Outputs that have a gradient here, and gradients of all inputs, with those in fp64."""
        found = []
        for values in inputs, [x.detach().double() for x in inputs]:
            leaves = [x.detach().requires_grad_() for x in values]
            outputs = [x for x, grad in zip(op(*leaves), grads) if grad is not None]
            given = [x for x in grads if x is not None]
            given = [grad.type_as(x) for grad, x in zip(given, outputs)]
            found.append([*outputs, *torch.autograd.grad(outputs, leaves, given)])
        names = [f"output {i}" for i in range(len(outputs))]
        names += [f"gradient of input {i}" for i in range(len(inputs))]
        return [*map(Result, names, *found)]

    def fp8_copies(self) -> list[Result]:
        """Of a batch of weights, of a gradient whose largest number is asked for, and of a head
        with numbers that do not fit."""
        w, x = (
            self.random(2, self.config.mlp_dim, self.dim, std=0.02),
            self.random(self.tokens, self.dim),
        )
        copy = quantize(w, fp8_empty(w.shape, self.scale_for(w.abs().amax((1, 2)))))
        results, largest = fp8_results("weights", copy, w), self.none_yet(1)
        copy = quantize(x, fp8_empty(x.shape, self.scale_for(x.abs().max())), largest)
        results += fp8_results("gradient", copy, x)
        results.append(Result("largest number", largest, x.abs().max()[None], 1e-3))
        scale = self.scale_for(1.0 / HEADROOM)
        clipped = torch.zeros(1, dtype=torch.int64, device=self.device)
        copy = quantize(x, fp8_empty(x.shape, scale), clipped=clipped)
        limit = torch.finfo(copy.rows.dtype).max * scale[0].double()
        results += fp8_results("head", copy, x.double().clamp(-limit, limit))
        too_large = (x.double().abs() > limit).sum()[None]
        return [*results, Result("count of numbers that do not fit", clipped, too_large, 1e-3)]

    def sums(self) -> list[Result]:
        """Of one to four streams, with and without a norm, the first of which a later sum reads."""
        results, norms = [], ["no norm", "norm in fp8" if self.uses_fp8 else "norm"]
        # the last, whose stream nothing reads, and those of validation
        cases = [(1, "no norm"), *itertools.product((2, 3, 4), ("norm", *norms))]
        for terms, kind in dict.fromkeys(cases):
            sources = [self.random(self.tokens, self.dim) for _ in range(terms)]
            # one number, one a token, and one that all tokens share
            coefficients = [1 + self.random(self.tokens, dtype=torch.float32) for _ in sources]
            coefficients[-1] = coefficients[-1][:1].expand(self.tokens)
            coefficients[0] = coefficients[0][:1].clone()
            copy, norm = None, kind != "no norm"
            if kind == "norm in fp8":
                copy = fp8_empty(sources[0].shape, self.scale_for(math.sqrt(self.dim)))
            grads = [self.random(self.tokens, self.dim) for _ in range(3)]
            grads = grads[0], grads[1] if norm else None, grads[2], *[None] * (terms - 1)
            if kind == "norm" and self.uses_fp8:
                grads = None, *grads[1:]

            def op(*tensors, norm=norm, copy=copy) -> tuple:
                half = len(tensors) // 2
                return combine(tensors[:half], tensors[half:], norm, copy)

            found = self.compare(op, [*sources, *coefficients], grads)
            if copy is not None:  # what came back in place of the norm has no memory
                found[1:2] = fp8_results("norm", copy, found[1].reference)
            results += [r._replace(name=f"{terms} with {kind}: {r.name}") for r in found]
        return results

    def qkv(self) -> list[Result]:
        """With and without key offset and value rows, as the layers have them."""
        config, width = self.config, self.config.attention_dim
        x, w = self.leaf(self.tokens, self.dim), self.leaf(3 * width, self.dim, std=self.dim**-0.5)
        x8, w8 = self.in_fp8(x), self.in_fp8(w)
        qkv = fp8_matmul(x8, w8)
        results = [Result("matmul", qkv, dequantized(x8) @ dequantized(w8).mT)]
        rotary = rotary_tables(rotary_frequencies(config.head_dim), self.tokens, self.device)
        eye = torch.eye(3 * width, dtype=torch.float64, device=self.device)
        shape = self.tokens, config.num_heads, config.head_dim
        for is_long, has_value in sorted(
            {(row.window == "long", row.value_table is not None) for row in config.layers}
        ):
            offset = CHECK_LENGTH if is_long else 0, config.head_dim
            value = self.random(self.tokens, width) if has_value else None
            grads = [self.random(*shape) for _ in range(3)]
            doubles = qkv.double().requires_grad_(), eye, *(table.double() for table in rotary)
            exact = prepare_qkv(*doubles, value.double() if has_value else None, None, *offset)
            (slope,) = torch.autograd.grad(exact, doubles[:1], [grad.double() for grad in grads])
            fp8 = QkvFp8(x8, w8, self.delayed_for(slope.abs().max()))
            found = prepare_qkv(x, w, *rotary, value, fp8, *offset)
            d_x, d_w = torch.autograd.grad(found, (x, w), grads)
            slope8 = qkv_gradient(grads, qkv, *rotary, fp8, offset[0])
            own = [*map(Result, ("queries", "keys", "values"), found, exact)]
            own += fp8_results("gradient of QKV", slope8, slope)
            own.append(Result("largest gradient", fp8.grad.largest, slope.abs().max()[None]))
            own.append(Result("gradient of x", d_x, dequantized(slope8) @ dequantized(w8)))
            own.append(Result("gradient of W", d_w, dequantized(slope8).mT @ dequantized(x8)))
            kind = f"key offset {is_long}, value rows {has_value}".lower()
            results += [r._replace(name=f"{r.name} ({kind})") for r in own]
        return results

    def mlp(self) -> list[Result]:
        hidden, std = self.config.mlp_dim, self.dim**-0.5
        x, grad = self.leaf(self.tokens, self.dim), self.random(self.tokens, self.dim)
        w_1, w_2 = self.leaf(hidden, self.dim, std=std), self.leaf(hidden, self.dim, std=std)
        x8, grad8, w_18, w_28 = map(self.in_fp8, (x, grad, w_1, w_2))
        exact_square = (dequantized(x8) @ dequantized(w_18).mT).relu().square()
        fp8_square = self.delayed_for(exact_square.max())
        square = mlp_matmul(x8, w_18, fp8_square)
        exact_slope = 2 * dequantized(square).sqrt() * (dequantized(grad8) @ dequantized(w_28).mT)
        fp8_slope = self.delayed_for(exact_slope.abs().max())
        slope = mlp_matmul(grad8, w_28, fp8_slope, square)
        delayed = fp8_square, DelayedScale(grad8.scale, self.none_yet(1)), fp8_slope
        fp8 = MlpFp8(x8, w_18, w_28, *delayed)
        out = mlp(x, w_1, w_2, fp8)
        d_x, d_w_1, d_w_2 = torch.autograd.grad(out, (x, w_1, w_2), grad)
        seen = torch.stack([z.abs().max() for z in (exact_square, grad.double(), exact_slope)])
        return [
            *fp8_results("square of ReLU", square, exact_square),
            *fp8_results("gradient in front of ReLU", slope, exact_slope),
            Result("result", out, dequantized(square) @ dequantized(w_28)),
            Result("gradient of x", d_x, dequantized(slope) @ dequantized(w_18)),
            Result("gradient of W_1", d_w_1, dequantized(slope).mT @ dequantized(x8)),
            Result("gradient of W_2", d_w_2, dequantized(square).mT @ dequantized(grad8)),
            Result("largest numbers", torch.cat([d.largest for d in delayed]), seen),
        ]

    def head(self) -> list[Result]:
        """On sampled candidates, with offsets, and on all tokens, as the stages have it."""
        counts, results = {stage.candidates for stage in self.config.all_stages}, []
        for count in sorted({min(counts), max(counts)}):
            vocab = count or self.config.padded_vocab_size
            offsets = self.random(vocab, dtype=torch.float32) if count else None
            x, head = (
                self.leaf(self.tokens, self.dim),
                self.leaf(vocab, self.dim, std=self.dim**-0.5),
            )
            targets = self.integers(vocab - 1, self.tokens, 2)
            targets[::5, 1], targets[1::5, 1] = IGNORED_TARGET, targets[1::5, 0]
            targets = F.pad(targets, (0, 1), value=vocab - 1)  # the last entry is the copy entry
            weights = torch.tensor([1.0, 0.5], device=self.device)
            shares = PointerShares(*self.random(3, self.tokens, dtype=torch.float32).softmax(0)[:2])
            doubles = PointerShares(*(share.double().requires_grad_() for share in shares))
            x8, head8 = self.in_fp8(x), self.in_fp8(head)
            logits = fp8_matmul(x8, head8)
            exact_logits = logits.double().requires_grad_()
            exact = token_losses(exact_logits, targets, offsets, doubles)
            exact = torch.stack([exact @ weights.double(), exact[:, 0]])
            exact_slope, *exact_d_shares = torch.autograd.grad(
                exact[0].sum(), (exact_logits, *doubles)
            )
            scale = self.scale_for(exact_slope.abs().max())
            losses, slope, d_shares = losses_and_slope(
                logits, targets, weights, scale, offsets, shares
            )
            fp8 = HeadFp8(head8, x8.scale, scale)
            total, _ = head_loss(x, head, targets, weights, fp8, offsets, shares)
            d_x, d_head = torch.autograd.grad(total, (x, head))
            own = [
                Result("logits", logits, dequantized(x8) @ dequantized(head8).mT),
                Result("losses", losses, exact, 0.01),
                *fp8_results("gradient of the logits", slope, exact_slope, 0.2),
                Result("gradient of x", d_x, dequantized(slope) @ dequantized(head8)),
                Result("gradient of the head", d_head, dequantized(slope).mT @ dequantized(x8)),
                Result("gradient of shares", torch.stack(d_shares), torch.stack(exact_d_shares)),
            ]
            kind = f"{count:,} candidates" if count else "the whole vocabulary"
            results += [r._replace(name=f"{r.name} on {kind}") for r in own]
        return results

    def attention(self) -> list[Result]:
        """In documents of several lengths, with the windows of the first stage."""
        config, stage, results = self.config, self.config.stages[0], []
        ends = [0, 1, self.tokens // 3, self.tokens, self.tokens]
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=self.device)
        shape = self.tokens, config.num_heads, config.head_dim
        for window in stage.window_short, stage.window_long:
            q, k, v, grad = (self.random(*shape) for _ in range(4))

            def op(q: Tensor, k: Tensor, v: Tensor, window: int = window) -> list[Tensor]:
                backend = "plain" if q.dtype == torch.float64 else self.backend
                options = stage.max_seq_len, window, config.attention_scale, backend
                return [attention(q, k, v, cu_seqlens, *options)]

            inputs = rms_norm(q), rms_norm(k), v
            found = self.compare(op, inputs, [grad])
            with torch.no_grad():  # as in validation, by another kernel
                found.append(Result("output without gradient", *op(*inputs), found[0].reference))
            results += [r._replace(name=f"{r.name}, window {window}", limit=0.1) for r in found]
        return results

    def pointer(self) -> list[Result]:
        """In documents of several lengths, to tokens of which many are the target."""
        ends = [0, 1, self.tokens // 3, self.tokens, self.tokens]
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=self.device)
        tokens, targets = self.integers(3, 2, self.tokens)
        batch = tokens.int(), targets, *document_bounds(cu_seqlens, self.tokens)

        def op(
            q: Tensor, k: Tensor, sink: Tensor, scores: Tensor | None = None,
            mask: Tensor | None = None,
        ) -> PointerShares:  # fmt: skip
            extra = None
            if scores is not None:
                scores = scores.masked_fill(missing, -math.inf)
                extra = ExtraKeys(scores, extra_tokens)
            return pointer_shares(q, k, sink, *batch, self.tokens // 2, mask, extra)

        q, k = rms_norm(self.random(self.tokens, 2, POINTER_DIM)).unbind(1)
        inputs = [q.contiguous(), k, self.random(POINTER_DIM, dtype=torch.float32)]
        if self.config.match_orders:
            extra_tokens = self.integers(3, self.tokens, 4)
            missing = self.integers(2, self.tokens, 4) > 0
            inputs.append(self.random(self.tokens, 4, dtype=torch.float32))
        grads = [self.random(self.tokens, dtype=torch.float32) for _ in range(2)]
        results = self.compare(op, inputs, grads)
        if self.config.canonical_mask:  # in validation; here no 1 behind 0, no 2 behind 1, …
            mask = torch.tensor([[0b010], [0b100], [0b001]], dtype=torch.uint8, device=self.device)
            kinds = Tensor.clone, Tensor.double
            shares = [op(*map(kind, inputs), mask=mask) for kind in kinds]
            results.append(Result("shares of what can follow", *map(torch.stack, shares)))
        return results

    def table_rows(self) -> list[Result]:
        """Added to one table and to all value tables, some to one row very often; and each once."""
        config, count, results = self.config, CHECK_ROWS, []
        often, place = self.integers(count // 4, count).int(), torch.arange(count + 1)
        often[::4] = often[0]
        distinct = torch.randperm(2 * count, generator=self.generator, device=self.device)[:count]
        for tables, dim, rows in (
            (1, self.dim, sort_rows(often)),
            (config.num_value_tables, config.attention_dim, sort_rows(often)),
            (1, self.dim, SortedRows.of_distinct(distinct, place.to(self.device))),
        ):
            values = [self.random(count, dim) for _ in range(tables)]
            starts = [self.random(2 * count, dim) for _ in range(tables)]
            found = [start.clone() for start in starts]
            add_rows_(found, rows, values)
            for start, value, own in zip(starts, values, found):
                exact = start.double().index_add(0, rows.rows.long(), value[rows.order].double())
                results.append(Result(f"{tables} of {dim} columns", own, exact))
        return results

    def ngram_updates(self) -> list[Result]:
        config, count = self.config, CHECK_ROWS
        rows, grads = self.integers(count // 2, count).int(), self.random(count, self.dim)
        rows[::4] = rows[0]
        table = self.random(count, self.dim, std=0.01)
        sums = self.random(count, dtype=torch.float32).square()
        doubles, order = (table.double(), sums.double()), sort_rows(rows)
        update_ngrams_(table, sums, order, grads, 1.0, config.adam_eps)
        update_ngrams_(*doubles, order, grads.double(), 1.0, config.adam_eps)
        return [*map(Result, ("table", "sums of squares"), (table, sums), doubles)]

    def matches(self) -> list[Result]:
        """Entries that fp64 has exactly, several for most places; half of the places are spare."""
        table = self.integers(2**52, CHECK_ROWS + SPARE_PLACES) << 10
        table[CHECK_ROWS:] = 0
        places = self.integers(2 * CHECK_ROWS, 4 * CHECK_ROWS + 5)
        places[0], places[1] = CHECK_ROWS - 1, CHECK_ROWS  # the last slot, the first spare place
        entries, reference = self.integers(2**52, len(places)) << 10, table.double()
        write_largest_(table, places, entries)
        write_largest_(reference, places, entries.double())
        return [Result("table", table, reference, 0.0)]


def self_check(model: "GPT", name: str) -> list[str]:
    """What is wrong with the kernels of one of SelfCheck's methods, a sentence each."""
    try:
        results = SelfCheck(model).methods()[name]()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever a compiler raises)
        reason = str(error).strip().partition("\n")[0]
        return [f"{name} do not run: {type(error).__name__}: {reason}"]
    errors = [disagreement(result.value, result.reference) for result in results]
    return [
        f"{name}, {result.name}: off by {error:.2g}, more than {result.limit:g}"
        for result, error in zip(results, errors)
        if not error <= result.limit
    ]


def self_check_error(problems: list[str]) -> UserError:
    versions = {"torch": torch.__version__, "Triton": triton.__version__}
    versions["flash-attn-4"] = package_version("flash-attn-4")
    ran_on = ", ".join(f"{name} {version}" for name, version in versions.items())
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return UserError(
        f"the self-check found kernels that disagree with their reference implementation: "
        f"{problems[0]}{more}, with {ran_on}: install the versions of requirements.txt and clear "
        "Triton's cache (~/.triton/cache, or TRITON_CACHE_DIR); --fp8 false does without most "
        "kernels; --self_check false trains all the same"
    )


@dataclass
class CapturedPass:
    """Forward and backward pass as a CUDA graph, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Batch  # on the device; a replay computes what is in it
    loss: Tensor  # of the last replay
    ngrams: tuple[Tensor, Tensor]  # rows and gradients that it leaves for Ngrams.gather

    def fits(self, batch: Batch) -> bool:
        """Whether its documents fit: cu_seqlens is longer if they are more than expected."""
        return len(batch.cu_seqlens) == len(self.inputs.cu_seqlens)

    def replay(self, batch: Batch) -> None:
        for own, given in zip(self.inputs, batch):
            if isinstance(own, Tensor):
                own.copy_(given, non_blocking=True)
        self.graph.replay()


class Trainer:
    """A model and what brings it on: optimizer, schedule, and the passes of micro-batches.

    On a GPU the forward and backward pass of a micro-batch is a CUDA graph, whose replay costs the
    host one launch in place of a thousand. Every stage has its graph and its own buffers for
    inputs; the rest of their memory is shared, as replays follow one another on one stream.
    """

    def __init__(self, model: GPT, runtime: Runtime):
        self.model, self.config, self.runtime = model, model.config, runtime
        self.optimizer = Optimizer(model, self.config, runtime)
        self.schedule = Schedule(self.config)
        self.loss_weights = {  # of the next token and of the one after it
            stage: torch.tensor([1.0, stage.second], device=runtime.device)
            for stage in self.config.all_stages
        }
        self.uses_graphs = self.config.cuda_graphs and runtime.device.type == "cuda"
        self.graphs: dict[Stage, CapturedPass] = {}
        if self.uses_graphs:  # memory is shared by graphs of one pool and one stream
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.passes, self.passes_without_graph = 0, 0
        # of the shards of --match_shards, what is not inserted yet
        self.pieces: Iterator[Tensor] = iter(())
        self.pieces_per_step = 0

    def begin_insertion(self, paths: list[str]) -> None:
        """Begin to read shards that are only looked up. All ranks insert each piece of them, beside
        the same step, which --stop_step does not change."""
        count = sum(-(-read_shard_header(path) // PIECE_TOKENS) for path in paths)
        steps = max(1, int(INSERTION_SHARE * self.schedule.total_steps))
        self.pieces_per_step = -(-count // steps)
        pin, vocab_size = self.runtime.device.type == "cuda", self.config.vocab_size
        pieces = shard_pieces(paths, vocab_size, pin)
        self.pieces = prefetch(pieces, depth=min(2 * self.pieces_per_step, MOST_PIECES))

    @recorded("matches")
    def insert_pieces(self, is_last: bool) -> None:
        """Insert the next pieces of these shards, in the last step all that are left."""
        for piece in itertools.islice(self.pieces, None if is_last else self.pieces_per_step):
            piece = piece.to(self.runtime.device, non_blocking=True)
            self.model.matches.insert(read_piece(piece))

    def compute(self, batch: Batch, stage: Stage) -> Tensor:
        """Forward and backward pass, added to the gradients; gives the next-token loss."""
        with recorded("forward"):
            loss, next_token_loss = self.model.training_loss(
                batch, stage.windows, self.loss_weights[stage], stage.candidates
            )
        with recorded("backward"):  # summed over tokens, averaged over ranks and micro-steps
            (loss / self.config.sequences_per_step).backward()
        return next_token_loss

    def micro_step(self, batch: Batch, stage: Stage) -> Tensor:
        """Forward and backward pass of a micro-batch, added to the gradients. Gives the sum of its
        next-token losses, fp32, valid until the next call."""
        self.passes += 1
        self.model.ngrams.pull(batch.exchange)
        self.model.ngrams.wait()
        captured = self.graphs[stage] if self.uses_graphs else None
        if captured is not None and captured.fits(batch):
            captured.replay(batch)
            loss, ngrams = captured.loss, captured.ngrams
        else:
            if captured is not None:
                self.report_pass_without_graph(batch)
            loss = self.compute(to_device(batch, self.runtime.device), stage)
            ngrams = self.model.ngrams.pending
        self.model.ngrams.gather(*ngrams)
        return loss

    def report_pass_without_graph(self, batch: Batch) -> None:
        self.passes_without_graph += 1
        if self.passes_without_graph == 1:
            self.runtime.log.line(
                f"a pass of {len(batch.tokens):,} tokens runs without its CUDA graph, which takes "
                "fewer documents; the end of the log says how often. If often, lower "
                f"--min_mean_doc_len {self.config.min_mean_doc_len}"
            )

    def with_matches(self, batch: Batch) -> Batch:
        """As a batch of a step is, with what the n-gram lookup finds. All ranks call it."""
        if self.model.matches is not None:
            ((batch,), _) = self.model.matches.look_up([batch])
        return batch

    def warm_up(self, batch: Batch, stage: Stage) -> None:
        """Compile kernels and make workspaces for batches like this, without a graph; changes the
        gradients."""
        batch = self.with_matches(batch)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.compute(to_device(batch, self.runtime.device), stage)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # graphs keep memory of their own

    def capture(self, batch: Batch, stage: Stage) -> None:
        """Make the graph of a stage, for batches like this, once it is warmed up."""
        inputs = to_device(self.with_matches(batch), self.runtime.device).map(torch.clone)
        graph = torch.cuda.CUDAGraph()
        # other threads, such as NCCL's, may do what a capture forbids
        options = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, **options):
            loss = self.compute(inputs, stage)
        # What these hold no later graph of the pool gets. The rest of a graph's memory is scratch
        # that the replays of other graphs overwrite, and so do those of earlier ones with what lies
        # in theirs: loss and n-grams must be read before the next replay, as micro_step says.
        self.graphs[stage] = CapturedPass(graph, inputs, loss, self.model.ngrams.pending)

    def prepare(self) -> None:
        """Compile, warm up and capture on random sequences of every stage, then put everything
        back."""
        config, schedule, begin = self.config, self.schedule, time.perf_counter()
        random = np.random.default_rng(0)

        def random_batch(num_tokens: int, max_seq_len: int, count: int) -> Batch:
            starts, number = np.arange(0, num_tokens, max_seq_len), count * self.runtime.world_size
            sequences = [(random_tokens(random, num_tokens + 1), starts) for _ in range(number)]
            return rank_batches(sequences, count, max_seq_len, config, self.runtime)[0]

        def report(what: str) -> None:
            self.runtime.synchronize()
            self.runtime.log.line(f"{what} · {time.perf_counter() - begin:.1f} s")

        last_steps = {schedule.stage(step): step for step in range(schedule.end_step)}
        batches = {}
        for stage, last_step in last_steps.items():
            length, max_seq_len = schedule.sequence_shape(last_step)
            count = config.sequences_per_pass(length, self.runtime.world_size)
            batches[stage] = random_batch(length, max_seq_len, count)
        # the longest first: graphs of shorter ones fit in memory that they have left
        visited = sorted(batches, key=lambda stage: -len(batches[stage].tokens))
        with nothing_changes(self.model, self.optimizer):
            self.compile_side_by_side(report)
            for stage in visited if self.uses_graphs else ():
                batch = batches[stage]
                self.warm_up(batch, stage)
                length = len(batch.tokens) // batch.sequences
                kind = schedule.describe(last_steps[stage])
                report(f"warmed up {batch.sequences} sequences of {length:,} tokens, {kind}")
            for stage in visited:
                if self.uses_graphs:
                    self.capture(batches[stage], stage)
                for update in range(2):  # an even and an odd one, so that every update runs
                    self.run_step(last_steps[stage], [batches[stage]], update)
            report("captured graphs and " * self.uses_graphs + "warmed up updates")
            with torch.no_grad():
                batch = random_batch(config.val_sequence_tokens, config.val_sequence_tokens, 1)
                batch = to_device(self.with_matches(batch), self.runtime.device)
                self.model.validation_loss(batch, visited[-1].windows)
            if config.average_shares:
                choose_weights(self, [batch], visited[-1].windows, Log(None))
            report(f"warmed up validation sequences of {config.val_sequence_tokens:,} tokens")
        self.passes, self.passes_without_graph = 0, 0  # of training alone

    def compile_side_by_side(self, report: Callable[[str], None]) -> None:
        """Check the kernels, which compiles them, while torch compiles its functions: the updates,
        validation's loss and the hashing. The checks have a thread each. The functions share one,
        as torch compiles one at a time; the ranks, which share its cache on disk, begin with
        different ones."""
        device, model = self.model.head.device, self.model
        if not has_kernels(device):
            return
        checks = SelfCheck(model).methods() if self.config.self_check else ()
        problems: list[str] = []

        def check(name: str) -> None:
            problems.extend(self_check(model, name))

        def update(state: ParamState) -> None:
            self.optimizer._update(state, torch.zeros_like(state.shard), 1, *self.schedule.rates(0))

        def validation_loss() -> None:
            size = self.config.val_sequence_tokens
            x = torch.zeros(size, self.config.model_dim, dtype=model.head.dtype, device=device)
            tokens = torch.zeros(size, dtype=torch.int32, device=device)
            targets = model.with_copy_entry(tokens.long()[:, None])
            shares = PointerShares(*x.new_zeros(2, size, dtype=torch.float32))
            next_token_loss(x, model.head, targets, shares, tokens, model.impossible)

        def hashing() -> None:
            length = self.schedule.sequence_shape(0)[0]
            tokens = torch.zeros(2 * length, dtype=torch.int32, device=device)
            model.ngrams.hash(tokens, 2)

        def lookups() -> None:
            tokens = torch.zeros(2 * self.schedule.sequence_shape(0)[0] + 1, device=device).int()
            read = read_piece(tokens.to(torch.uint16))
            matched = model.matches.find(*read[:2])
            read_matches(matched, read[0].clone())
            best_match(matched)
            model.matches.insert(read)

        functions = {
            f"update of {state.group.name}": functools.partial(update, state)
            for state in self.optimizer.states
        } | {"validation's loss": validation_loss, "hashing": hashing}
        if model.matches is not None:
            functions["n-gram lookup"] = lookups
        names, first = [*functions], self.runtime.rank % len(functions)
        threads = [{name: functions[name] for name in names[first:] + names[:first]}]
        threads += [{f"check of {name}": functools.partial(check, name)} for name in checks]
        seconds: dict[str, float] = {}

        def run(jobs: dict[str, Callable[[], None]]) -> None:
            # A thread has its own device and gradient mode: checks differentiate, functions do not.
            torch.cuda.set_device(device)
            with torch.set_grad_enabled(jobs is not threads[0]):
                for name, job in jobs.items():
                    begin = time.perf_counter()
                    job()
                    seconds[name] = time.perf_counter() - begin

        what = f"compiling {len(functions)} functions"
        if checks:
            what += f", compiling and checking the kernels of {', '.join(checks)}"
        self.runtime.log.line(f"{what} (the first time up to a minute)")
        with ThreadPoolExecutor(len(threads)) as pool:
            list(pool.map(run, threads))  # raises what a job has raised
        took = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        self.runtime.log.line(f"side by side: {took}", screen=False)
        if problems:
            raise self_check_error(problems)
        report("compiled functions" + " and checked kernels" * bool(checks))

    def run_step(
        self, step: int, batches: list[Batch], update: int | None = None,
        following: list[Batch] | None = None,
    ) -> Tensor:  # fmt: skip
        """Train on this rank's micro-batches of a step; gives the mean of their next-token losses,
        0-d. update: the step's number for the optimizer, where it is not `step`. following: the
        micro-batches of the next step, whose n-grams are pulled as soon as they are updated."""
        model, stage = self.model, self.schedule.stage(step)
        matches = model.matches
        if matches is not None:
            with model.on_side_stream():
                batches, read = matches.look_up(batches)  # done ahead but for the first step
            model.wait_for_side_stream()
            # While the passes run. These have what was found for them, so that nothing of this step
            # can be in it; the next step looks up this one and what was read before.
            with model.on_side_stream():
                matches.insert(read)
                self.insert_pieces(is_last=step + 1 == self.schedule.end_step)
                matches.look_up_ahead(following)
        total = torch.zeros((), device=self.runtime.device)
        for batch in batches:
            total += self.micro_step(batch, stage)
        rates = self.schedule.rates(step)
        exchange = following[0].exchange if following else None
        self.optimizer.step(step if update is None else update, *rates, exchange)
        model.wait_for_side_stream()
        return total / sum(len(batch.tokens) for batch in batches)


@torch.no_grad()
def gather_sequences(batches: list[Batch], runtime: Runtime) -> Tensor:
    """Tokens, document starts and targets, (3, T) int32, of what all ranks read in a step, as many
    batches on each and of one length, in the order of the stream."""
    batches = [to_device(batch, runtime.device) for batch in batches]
    length = len(batches[0].tokens)
    parts = ((b.tokens, document_starts(b.cu_seqlens, length), b.targets.int()) for b in batches)
    local = torch.stack([torch.stack(part) for part in parts])  # (batches, 3, length)
    gathered = local.new_empty(runtime.world_size, *local.shape)
    runtime.all_gather(gathered.flatten(0, 1), local)
    stream = gathered.transpose(0, 1).flatten(0, 1)  # pass by pass, rank by rank
    begins = length * torch.arange(len(stream), device=stream.device)
    stream[:, 1] += begins.int()[:, None]
    return stream.transpose(0, 1).flatten(1)


PIECE_TOKENS = 2**20  # of shards that are only looked up, inserted at once
INSERTION_SHARE = 1 / 16  # of all steps, the first ones, beside which they are inserted
MOST_PIECES = 16  # that wait in memory, pinned: 4 MiB each


def shard_pieces(paths: list[str], vocab_size: int, pin: bool) -> Iterator[Tensor]:
    """Shards in pieces, (T + 1,) uint16 on the host: each begins with the last token of the one
    before."""
    for path in paths:
        tokens, _ = load_shard(path, vocab_size)
        end = (len(tokens) - 1) // 16 * 16  # of other lengths kernels would be compiled anew
        for begin in range(0, end, PIECE_TOKENS):
            piece = torch.from_numpy(tokens[begin : min(begin + PIECE_TOKENS, end) + 1])
            yield piece.pin_memory() if pin else piece


@torch.no_grad()
def read_piece(piece: Tensor) -> Tensor:
    """As gather_sequences gives a step: tokens, document starts and targets, (3, T) int32."""
    piece = piece.int()
    begins = piece[:-1] == START_TOKEN
    position = torch.arange(len(begins), dtype=torch.int32, device=piece.device)
    document = begins.cumsum(0)  # 0 if it began in an earlier piece
    # where each begins; behind them all, one place for whatever begins none
    places = torch.where(begins, document, len(begins) + 1)
    start_of = position.new_zeros(len(begins) + 2).scatter_(0, places, position)
    return torch.stack([piece[:-1], start_of[document], piece[1:]])


@torch.no_grad()
def validate(
    model: GPT, config: Config, runtime: Runtime, num_targets: int, windows: Windows
) -> float:
    """Mean cross-entropy in nats over the first `num_targets` targets of the validation file.
    Raises UserError if it is not finite.

    With n-gram lookup, sequences that have been scored are inserted, like those of a training step,
    and at the end its tables are as they were.
    """
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    batches, matches, inserted = validation_batches(config, runtime, num_targets), model.matches, []
    size = config.sequences_per_step * config.val_sequence_tokens
    for end in range(size, num_targets + size, size):
        scored = list(itertools.islice(batches, config.sequences_per_step // runtime.world_size))
        if matches is not None:
            scored, read = matches.look_up(scored)
        for batch in scored:
            total += model.validation_loss(to_device(batch, runtime.device), windows)
        if matches is not None and end < num_targets:
            inserted.append(matches.insert(read))
    if matches is not None:
        matches.undo(inserted)
    loss = runtime.all_reduce(total).item() / num_targets
    if not math.isfinite(loss):
        raise not_finite_error(model, f"the validation loss is {loss}, training losses were finite")
    return loss


@torch.no_grad()
def choose_weights(trainer: Trainer, batches: list[Batch], windows: Windows, log: Log) -> None:
    """Replace the weights by a blend of them and one of their averages where that has a lower
    next-token loss on these batches of all ranks: text behind all that was trained on, which only
    --repeat_data can have read before. Validation text has no part in it. Every rank chooses the
    same, as the losses are summed over ranks. Targets that the canonical mask calls impossible,
    whose loss is infinite, are left out with a warning, so that a trained model is not lost.

    Every time constant is scored at the middle one of --average_blends, and the best one at the
    others too. In the speedrun a score takes 8 sequences of 32,768 tokens, a fortieth of a
    validation, so MAX_CHOICES of them take less than a quarter of one.
    """
    model, optimizer, runtime = trainer.model, trainer.optimizer, trainer.runtime
    shares, blends = trainer.config.average_shares, trainer.config.average_blends
    if model.matches is not None:
        batches, _ = model.matches.look_up(batches)
    batches = [to_device(batch, runtime.device) for batch in batches]
    num_tokens = runtime.world_size * sum(len(batch.tokens) for batch in batches)
    if model.impossible is not None:
        left_out = [cannot_follow(model.impossible, x.tokens, x.targets) for x in batches]
        count = int(runtime.all_reduce(sum(mask.sum() for mask in left_out)).item())
        if count:
            targets = [x.targets.masked_fill(m, IGNORED_TARGET) for x, m in zip(batches, left_out)]
            batches = [x._replace(targets=own) for x, own in zip(batches, targets)]
            log.line(
                f"warning: {count:,} of {num_tokens:,} tokens of unread training text are not "
                "scored, as GPT-2's tokenizer never makes them behind the token before: tokenize "
                "the text of --train_files by data/tokenize_text.py, or pass --canonical_mask false"
            )
            num_tokens -= count
    losses: dict[tuple[int, float], float] = {}  # by number of the time constant, and blend

    def score(number: int, blend: float) -> float:
        if (number, blend) not in losses:
            optimizer.write_blend(number, blend)
            total = sum(model.validation_loss(batch, windows).double() for batch in batches)
            losses[number, blend] = runtime.all_reduce(total).item() / max(num_tokens, 1)
        return losses[number, blend]

    optimizer.keep_last_weights()
    score(0, 0.0)  # the last weights
    middle = blends[(len(blends) - 1) // 2]
    best = min(range(len(shares)), key=lambda number: score(number, middle))
    for blend in blends:
        score(best, blend)
    chosen = min(losses, key=losses.get)  # of equal losses the first
    optimizer.write_blend(*chosen)

    rows = [
        {"share": shares[number], "blend": blend, "loss": loss, "chosen": (number, blend) == chosen}
        for (number, blend), loss in losses.items()
    ]
    log.data["averages"] = {"tokens": num_tokens, "blends": rows}

    def describe(share: float, blend: float, loss: float, chosen: bool) -> str:
        name = f"{blend:g} of the {share:g} average" if blend else "last weights"
        return f"{name} {loss:.4f}" + " (chosen)" * chosen

    table = ", ".join(describe(**row) for row in rows)
    log.line(f"loss on {num_tokens:,} tokens of unread training text: {table}")


def first_impossible(pairs: np.ndarray, tokens: np.ndarray) -> tuple[int, ...]:
    """The first of these tokens (n,) that cannot stand in front of the next one, that next one, and
    the position of the first; () if all can. pairs: as impossible_pairs gives them."""
    for begin in range(0, len(tokens) - 1, 2**20):
        part = tokens[begin : begin + 2**20 + 1]
        first, second = part[:-1], part[1:]
        found = np.flatnonzero(pairs[first, second // 8] >> second % 8 & 1)
        if len(found):
            return int(first[found[0]]), int(second[found[0]]), begin + int(found[0])
    return ()


class PairFinder:
    """Finds the impossible pairs of tokens, and whether validation has one, in a process of its own
    with the lowest priority: a thread would hold up the launches of training, which need the
    interpreter as well."""

    def __init__(self, table: TokenTable, config: Config, num_targets: int):
        self.path, self.seconds = find_val_file(config), None
        tokens = read_tokens(self.path, num_targets + 1, config.vocab_size)
        vocab = config.padded_vocab_size
        memory = mmap.mmap(-1, vocab * vocab // 8)  # of both processes
        self.pairs = np.frombuffer(memory, np.uint8).reshape(vocab, vocab // 8)
        (told, tell), (answer, say) = os.pipe(), os.pipe()
        # newer versions of Python warn of forks: a thread may hold a lock that the child wants
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        # No collection in the child: it would destroy the parent's unreachable objects as well, and
        # those of CUDA end a process that did not make them. Off before the fork, as hooks that run
        # in the child before anything else could set one off.
        collects = gc.isenabled()
        gc.disable()
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        try:
            self.process = os.fork()
            if self.process == 0:
                try:
                    if prctl is not None:  # other systems than Linux have none
                        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: comes when the parent ends
                    os.close(tell)  # so that read ends when the main process does
                    self._find(table, tokens, told, say)
                finally:
                    os._exit(1)
        finally:
            if collects:
                gc.enable()
        os.close(told)
        os.close(say)
        # they close with this object, and then the process ends if it was not told to start
        self.tell, self.answer = open(tell, "wb", 0), open(answer, "rb", 0)  # noqa: SIM115

    def _find(self, table: TokenTable, tokens: np.ndarray, told: int, say: int) -> None:
        """In the other process. It has one thread and takes no lock of torch's. It says in JSON how
        long finding the pairs took (s) and what first_impossible gives, or else how it failed."""
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.nice(19)
        if not os.read(told, 1):
            return
        try:
            begin = time.perf_counter()
            self.pairs[:] = impossible_pairs(table, len(self.pairs))
            seconds = time.perf_counter() - begin
            answer = {"seconds": seconds, "found": first_impossible(self.pairs, tokens)}
        except Exception as error:  # noqa: BLE001 (check() raises it)
            answer = {"error": f"failed with {error!r}"}
        os.write(say, json.dumps(answer).encode())

    def start(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # check() says that the process is gone
            self.tell.write(b"1")

    def check(self, wait: bool = False) -> None:
        """Raise UserError if the process was ended or failed, or has found a pair in the validation
        text."""
        if self.seconds is not None or not (wait or select.select([self.answer], [], [], 0)[0]):
            return
        text, (_, status) = self.answer.read(), os.waitpid(self.process, 0)
        code = os.waitstatus_to_exitcode(status)
        how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
        answer = json.loads(text) if text else {"error": f"was ended by {how}"}
        if "error" in answer:
            raise UserError(
                f"the process that finds the impossible pairs of tokens {answer['error']}: free "
                "some memory, or pass --canonical_mask false"
            )
        self.seconds = answer["seconds"]
        if answer["found"]:
            first, second, position = answer["found"]
            raise UserError(
                f"{self.path}: token {first} and behind it {second}, at position {position}, are "
                "no tokens that GPT-2's tokenizer makes of any text: tokenize its text by "
                "data/tokenize_text.py, or, if its tokens are single bytes or another tokenizer's, "
                "pass --canonical_mask false"
            )

    def fill(self, impossible: Tensor) -> float:
        """Wait for the pairs and copy them there, beside what the device has to do; gives the
        seconds that finding them took."""
        self.check(wait=True)
        pairs = torch.from_numpy(self.pairs)
        if impossible.is_cuda:
            stream = torch.cuda.Stream(impossible.device)
            with torch.cuda.stream(stream):
                impossible.copy_(pairs)
            stream.synchronize()
        else:
            impossible.copy_(pairs)
        return self.seconds


@contextlib.contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """An error of memory says what needed it and what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if found := lack_of_memory(error):
            raise UserError(f"{found}, for {what}: {remedy}") from None
        raise


def lack_of_memory(error: BaseException) -> str:
    """What could not be allocated; empty for another error. On a CPU torch raises RuntimeError."""
    match = re.search(r"can't allocate memory: you tried to allocate \d+ bytes", str(error))
    if match:
        return match[0]
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return (str(error).partition(". ")[0] or "out of memory") if out_of_memory else ""


def tables_remedy(config: Config, world_size: int = 1) -> str:
    """What makes the largest table smaller."""
    element, gib = getattr(torch, config.dtype).itemsize, 2**30
    ngrams = config.ngram_rows_per_rank(world_size) * (config.model_dim * element + 4) / gib
    matches = len(config.match_orders) * config.match_slots * 8 / world_size / gib
    if max(ngrams, matches) < 1:
        return f"lower --model_dim {config.model_dim}, --mlp_dim {config.mlp_dim} or --layers"
    if ngrams >= matches:
        share = f"which take {ngrams:.1f} GiB a process, or start more processes, which share them"
        return f"lower --ngram_rows {config.ngram_rows}, {share}"
    share = f"which take {matches:.1f} GiB a process, or start more processes, which share them"
    return f"lower --match_slots {config.match_slots}, {share}"


def passes_remedy(config: Config, world_size: int) -> str:
    """What makes a pass smaller: fewer sequences at once or, where there is one, shorter ones."""
    lengths = config.sequence_lengths
    if any(config.sequences_per_pass(length, world_size) > 1 for length in lengths):
        return f"lower --tokens_per_pass {config.tokens_per_pass}, to {max(lengths)} at the least"
    more, smaller = 2 * config.sequences_per_step, tables_remedy(config, world_size)
    return f"pass --sequences_per_step {more}, which are half as long; or {smaller}"


def train(config: Config, runtime: Runtime) -> None:
    log, schedule = runtime.log, Schedule(config)
    shapes = [schedule.sequence_shape(step) for step in range(schedule.end_step)]
    unread = []  # sequences like those of validation, behind the last step unless that is left out
    if config.average_shares and schedule.end_step == schedule.total_steps:
        unread = [(config.val_sequence_tokens, config.val_sequence_tokens)]
    all_shapes = [shape for shape in shapes for _ in range(config.sequences_per_step)]
    files = find_train_files(config)
    num_targets = check_data(config, all_shapes + unread * config.sequences_per_step, files)
    finder = None
    if config.canonical_mask:
        finder = PairFinder(read_token_table(), config, num_targets)
    check_outputs(config, log, len(shapes))
    environment = describe_environment(runtime)
    tables = {"environment": environment, "config": config_as_text(config)}
    log.data |= tables
    log.line(SOURCE + "=" * 100, screen=False)
    log.line(json.dumps(tables, indent=1), screen=False)
    hardware = f"{runtime.world_size} x {environment['devices']}"
    log.line(f"{hardware}, torch {environment['torch']}, log {log.path}")
    if num_targets < config.val_tokens:
        wanted = f"not {config.val_tokens:,}"
        log.line(f"validation scores {num_targets:,} targets, all that --val_file has, {wanted}")

    begin = time.perf_counter()
    with memory_for("the tables and weights", tables_remedy(config, runtime.world_size)):
        model = GPT(config, runtime)
        trainer = Trainer(model, runtime)
    check_outputs(config, log, len(shapes), model)
    millions = sum(param.numel() for param in model.parameters()) / 1e6
    kernels = "Triton kernels" if has_kernels(runtime.device) else "plain PyTorch"
    dtype = f"QKV, MLP and head in fp8, the rest in {config.dtype}" if model.fp8 else config.dtype
    log.line(f"{millions:.1f} M parameters, {len(config.layers)} layers")
    log.line(f"{kernels}, {dtype}, attention by {model.backend}")
    count, dim = len(config.ngram_orders) * config.ngram_rows, config.model_dim
    log.line(f"{count:,} rows of hashed n-grams, {dim} wide: {count * dim / 1e6:.1f} M weights")
    trainer.prepare()
    preparation = time.perf_counter() - begin

    batches = prefetch(training_batches(config, runtime, shapes, unread, files), depth=2)
    clock = Clock(runtime)
    progress = Progress(model, runtime, clock, schedule.end_step)
    clock.start()
    if finder is not None:
        finder.start()
    model.proposal.copy_(read_proposal(config, files.read[0]))
    if files.looked_up:
        trainer.begin_insertion(files.looked_up)
    following = next(batches)
    for step in range(schedule.end_step):
        step_batches, following = following, next(batches, None)
        loss = trainer.run_step(step, step_batches, following=following)
        progress.launched(step, loss)
        if finder is not None and runtime.is_main:
            finder.check()  # so that a run does not end in its first validation

        done = step + 1
        if done == schedule.end_step or (config.val_every and done % config.val_every == 0):
            begin = time.perf_counter()
            if finder is not None:
                seconds, finder = finder.fill(model.impossible), None
                log.line(f"found the impossible pairs of tokens in {seconds:.1f} s of training")
            if done == schedule.total_steps and unread:  # on the clock
                choose_weights(trainer, following, schedule.windows(step), log)
            behind_step = time.perf_counter() - begin  # on the clock, beside steps under way
            clock.stop()
            progress.report()
            windows = schedule.windows(step)
            if done == schedule.total_steps:
                windows = windows._replace(long=config.final_window_long)
            smaller = f"lower --val_sequence_tokens {config.val_sequence_tokens}; "
            smaller += f"or {tables_remedy(config, runtime.world_size)}"
            with memory_for("validation", smaller):
                val_loss = validate(model, config, runtime, num_targets, windows)
            row = {
                "step": done,
                "val_loss": val_loss,
                "train_time_s": clock.total,
                "behind_step_s": behind_step,
            }
            log.data["validations"].append(row)
            log.line(f"step {done} val_loss {val_loss:.4f} train_time {clock.total:.3f} s")
            if model.fp8 is not None:
                row["clipped_in_fp8"] = clipped = model.fp8.count_clipped(runtime)
                counts = ", ".join(f"{count:,} {what}" for what, count in clipped.items())
                log.line(f"clipped in fp8 so far: {counts}", screen=any(clipped.values()))
            clock.start()
    progress.bar.close()
    counts = torch.tensor([trainer.passes_without_graph, trainer.passes], device=runtime.device)
    without_graph, passes = runtime.all_reduce(counts).tolist()
    if without_graph:
        log.line(
            f"{without_graph:,} of {passes:,} passes ran without a CUDA graph, which is slower: "
            "their documents are shorter on average than --min_mean_doc_len "
            f"{config.min_mean_doc_len}"
        )

    step_ms, peak = 1000 * clock.total / done, peak_memory(runtime)
    speed = sum(num_tokens for num_tokens, _ in all_shapes) / clock.total
    log.data["summary"] = {
        "val_loss": val_loss,
        "steps": done,
        "train_time_s": clock.total,
        "mean_step_ms": step_ms,
        "tokens_per_s": speed,
        "preparation_s": preparation,
        "peak_memory_gib": peak,
        "passes_without_graph": without_graph,
    }
    log.line(f"val loss {val_loss:.4f} after {done} steps, on {num_targets:,} targets")
    log.line(
        f"trained {clock.total:.2f} s, {step_ms:.1f} ms a step, {speed:,.0f} tokens/s, "
        f"after {preparation:.0f} s of preparation; peak memory {peak:.1f} GiB a process"
    )
    if config.checkpoint:  # first of all: the rest is of no use without
        with memory_for("the checkpoint", tables_remedy(config, runtime.world_size)):
            save_checkpoint(model, config, runtime)
    log.write_json()
    if runtime.is_main:
        try:
            log.line(f"log {log.path}, curve {draw_curve(log)}")
        except Exception as error:  # noqa: BLE001 (whatever it is, the run went well)
            log.line(f"log {log.path}; warning: no curve, drawing it failed: {error}")


def check_outputs(config: Config, log: Log, num_steps: int, model: GPT | None = None) -> None:
    """See that what the run is to leave can be written, and the weights of the model once there is
    one; of the ranks the main one does."""
    if log.path is None:
        return
    # a step has a line and a row of the JSON; the rest is the picture
    log_bytes = len(SOURCE.encode()) + 300 * num_steps + 2**18
    check_output("--log_dir", log.path.with_suffix(".json"), log_bytes)
    if config.checkpoint:
        tensors = [] if model is None else [*model.state_dict().values()]
        if model is not None:  # and what the other ranks have of the tables
            tables = [x.table for x in (model.ngrams, model.matches) if x is not None]
            tensors += tables * (model.runtime.world_size - 1)
        weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        check_output("--checkpoint", config.checkpoint, weights + 2**18)


def peak_memory(runtime: Runtime) -> float:
    """GiB: the most any rank's allocator held on its GPU, or any process resident on the CPU."""
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if runtime.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(runtime.device)
    peaks = torch.zeros(runtime.world_size, dtype=torch.float64, device=runtime.device)
    peaks[runtime.rank] = peak / 2**30
    return runtime.all_reduce(peaks).max().item()


def draw_curve(log: Log) -> Path:
    """Training and validation loss against steps, as a PNG next to the log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, summary = figure.subplots(), log.data["summary"]
    steps, losses = zip(*((row["step"], row["train_loss"]) for row in log.data["steps"]))
    axes.plot(steps, losses, color="0.7", linewidth=0.8, label="training (sequences of rank 0)")
    scored = [(row["step"], row["val_loss"]) for row in log.data["validations"]]
    axes.plot(*zip(*scored), "o-", color="C0", label="validation")
    losses = sorted([*losses, *(loss for _, loss in scored)])
    top = losses[int(0.97 * (len(losses) - 1))]  # leaves the first steps' fall out of the picture
    margin = 0.05 * (top - losses[0]) + 0.02
    axes.set_ylim(losses[0] - margin, top + margin)
    result = f"{summary['val_loss']:.4f} in {summary['train_time_s']:.1f} s"
    axes.set_title(f"{log.path.stem}: {result}", fontsize=10)
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = log.path.with_suffix(".png")
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    return path


def save_checkpoint(model: GPT, config: Config, runtime: Runtime) -> None:
    """Weights, tables of the n-gram lookup, config, and whether the training text was cut in bytes
    (then so are prompts)."""
    tables = {"ngrams.table": model.ngrams.whole_table()}
    if model.matches is not None:
        tables["matches.table"] = model.matches.whole_table()
    if not runtime.is_main:
        return
    path = find_files("--train_files", config.train_files)[0]
    head = read_tokens(path, 100_000, config.vocab_size)
    weights = model.state_dict() | tables
    saved = {
        "config": config_as_text(config),
        "weights": {name: tensor.cpu() for name, tensor in weights.items()},
        "byte_tokens": bool(((head < 256) | (head == START_TOKEN)).all()),
    }
    try:
        with replacing(config.checkpoint) as unfinished, unfinished.open("wb") as file:
            torch.save(saved, file)
    except (OSError, RuntimeError) as error:
        found = f"cannot be written ({error.__context__ or error})"  # what torch met
        raise UserError(f"--checkpoint {config.checkpoint}: {found}: choose another") from None
    runtime.log.line(f"weights saved in {config.checkpoint}")


# ==================================================================================================
# 10. Command line
# ==================================================================================================


def parse_value(kind: object, text: str) -> object:
    """The value of an option or of a table's field from text; ValueError when it cannot be read."""
    for rows_of in Stage, Layer:
        if kind == tuple[rows_of, ...]:
            hints = typing.get_type_hints(rows_of)
            rows = [row.strip().split(":") for row in text.split(",")]
            for row in rows:
                if len(row) != len(hints):
                    count = f"row {':'.join(row)!r} has {len(row)} fields"
                    raise ValueError(f"{count}, not {':'.join(hints)}")
            return tuple(rows_of(*map(parse_value, hints.values(), row)) for row in rows)
    if kind in (tuple[int, ...], tuple[float, ...]):
        of = typing.get_args(kind)[0]
        return tuple(parse_value(of, part) for part in text.split(":") if part != "none")
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{text!r} is neither true nor false")
        return text.lower() == "true"
    if kind == int | None:
        return None if text == "none" else parse_value(int, text)
    value = float(Fraction(text)) if kind is float and "/" in text else kind(text)
    if kind is float and not math.isfinite(value):
        raise ValueError("no finite number")
    if kind is int and not -(2**63) <= value < 2**63:
        raise ValueError("more than 64 bits")
    return value


def format_value(value: object) -> str:
    """The inverse of parse_value."""
    if isinstance(value, tuple) and all(isinstance(number, int | float) for number in value):
        return ":".join(map(str, value)) or "none"
    if isinstance(value, tuple):
        return ", ".join(":".join(map(format_value, dataclasses.astuple(row))) for row in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def config_as_text(config: Config) -> dict[str, str]:
    """Every field as it would be written on the command line."""
    return {name: format_value(value) for name, value in vars(config).items()}


def config_from_text(fields: dict[str, str]) -> Config:
    kinds = typing.get_type_hints(Config)
    return Config(**{name: parse_value(kinds[name], text) for name, text in fields.items()})


# What --help shows for the values of an option, by their type.
METAVARS = {int: "N", float: "X", bool: "true|false", str: "TEXT"}
METAVARS |= {tuple[int, ...]: "N:N:N", tuple[float, ...]: "X:X:X"}


def option_groups() -> dict[str, dict[str, str]]:
    """The fields of Config by its headings, `# Data` for instance, with the comments behind them,
    empty where there is none."""
    # inspect.getsource would parse the whole script, which takes a quarter of a second
    fields = SOURCE.partition("\nclass Config:\n")[2].partition("\n    @property\n")[0]
    groups, heading = {}, "Options"
    for line in fields.splitlines():
        if begins := re.fullmatch(r"    # (\w+)", line):
            heading = begins[1]
        elif option := re.match(r"    (\w+): [^#]*(?:# (.*))?$", line):
            groups.setdefault(heading, {})[option[1]] = option[2] or ""
    return groups


def parse_args(arguments: list[str] | None = None, to_train: bool = False) -> Config:
    """Config from the command line; exits with code 2 and a message on what it cannot read, and on
    the user's training data with a preset's validation data or the reverse if it is to train."""

    class Parser(argparse.ArgumentParser):
        def _print_message(self, message: str, file=None) -> None:
            if os.environ.get("RANK", "0") == "0":  # once, not once a process
                show(message.removesuffix("\n"), file)

        def error(self, message: str) -> typing.NoReturn:
            self.exit(2, f"{self.prog}: error: {message}; --help lists the options\n")

    def read(kind: object, text: str) -> object:
        try:
            return parse_value(kind, text)
        except (ValueError, ArithmeticError) as error:
            raise argparse.ArgumentTypeError(f"{text!r} cannot be read: {error}") from None

    tables = "Tables are rows of colon-separated fields with commas between the rows: a stage is "
    tables += "1/3:131072:896:128:384:1:.5:0, a layer short:none:false:none"
    parser = Parser(
        usage="%(prog)s [--preset NAME] [--option VALUE ...]",
        description=__doc__.split("\n")[0],
        epilog=tables,
        allow_abbrev=False,
    )
    preset = "speedrun" if torch.cuda.is_available() else "tiny"
    text = "where the options not given come from"
    parser.add_argument("--preset", choices=PRESETS, default=preset, help=text)
    defaults = config_as_text(PRESETS["speedrun"])
    others = {name: config_as_text(PRESETS[name]) for name in ("tiny", "medium")}
    kinds = typing.get_type_hints(Config)
    for heading, comments in option_groups().items():
        group = parser.add_argument_group(heading.lower())
        for name, comment in comments.items():
            default = defaults[name] or "none"
            for preset_name, values in others.items():
                if values[name] != defaults[name] and METAVARS.get(kinds[name]) is not None:
                    default += f"; {preset_name}: {values[name]}"
            group.add_argument(
                f"--{name}",
                default=argparse.SUPPRESS,
                type=functools.partial(read, kinds[name]),
                metavar=METAVARS.get(kinds[name], "TABLE"),
                help=f"{comment} [{default}]".replace("%", "%%"),
            )
    given = vars(parser.parse_args(arguments))
    config = dataclasses.replace(PRESETS[given.pop("preset")], **given)
    folders = {Path(name).resolve().parent for name in (config.train_files, config.val_file)}
    alone = {"train_files", "val_file"} & given.keys()
    if to_train and len(alone) == 1 and len(folders) == 2:
        (name,), (other,) = alone, {"train_files", "val_file"} - alone
        found = f"--{name} {given[name]} is given without --{other}, whose default is elsewhere"
        parser.error(f"{found}: give both")
    return config


def open_streams() -> None:
    """Make stdout and stderr take all that is printed: characters that they lack become ?, and a
    slow reader is waited for."""
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        if hasattr(getattr(sys, name), "reconfigure"):  # a notebook's has not
            getattr(sys, name).reconfigure(errors="replace")
        with contextlib.suppress(OSError):  # not every stream has a file descriptor
            os.set_blocking(getattr(sys, name).fileno(), True)


def end_with_launcher() -> None:
    """Have Linux send SIGTERM when torchrun dies, even if it is killed: a rank holds a GPU."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        require(os.getppid() == LAUNCHER, "torchrun ended while this process started")


def watch_signals(end: Callable[[int], object]) -> None:
    """Raise KeyboardInterrupt, with the number of the first signal that asks this process to end;
    call end, from a thread, if that has not ended it in two seconds: the main thread may be
    waiting for a rank that is gone."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    numbers = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]  # nohup
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def stop(number: int, frame: object) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    def watch() -> None:
        number = os.read(reader, 1)[0]
        time.sleep(2)
        end(number)

    for number in numbers:
        signal.signal(number, stop)
    # whoever started this may ignore it, and then there is no exit code of a child
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.set_wakeup_fd(writer)  # is written to even while the main thread runs no Python
    threading.Thread(target=watch, name="signals", daemon=True).start()


def main(arguments: list[str] | None = None) -> int:
    """Run, and end every failure on all ranks with one message and a non-zero exit code."""
    open_streams()
    config, store, log = parse_args(arguments, to_train=True), None, Log(None)
    ending = threading.RLock()

    def end(code: int, message: str, speaks: bool) -> typing.NoReturn:
        """At once: other ranks may be waiting for this one in a collective."""
        ending.acquire()  # for good: one thread ends the process
        try:
            if speaks:
                is_first, message = first_error(store, message)
                if is_first:
                    show("\n" + message, sys.stderr)
                log.line(message, screen=False)
            log.write_json()
        finally:
            os._exit(code)

    def interrupted(number: int) -> typing.NoReturn:
        """Every rank is, and the main one speaks, unless a rank failed and that is why."""
        name = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        so_far = f"; the log so far is {log.path}" if log.path is not None else ""
        if log.path is not None and config.checkpoint:
            with contextlib.suppress(OSError):
                unfinished_path(config.checkpoint).unlink()
        speaks = os.environ.get("RANK", "0") == "0"
        end(128 + number, f"interrupted{name}{so_far}", speaks)

    try:
        try:
            watch_signals(interrupted)
            end_with_launcher()
            store = connect()
            # end() has a connection of its own: in the other one this thread may be waiting
            runtime = start_runtime(config, store and store.clone())
            log = runtime.log
            train(config, runtime)
            if store is not None:
                dist.destroy_process_group()
            return int(log.failed)
        except UserError as error:
            message = f"error: {error}"
        except Exception as error:  # noqa: BLE001 (reported with its traceback)
            message = traceback.format_exc()
            if found := lack_of_memory(error):
                remedy = passes_remedy(config, int(os.environ.get("WORLD_SIZE", "1")))
                message = f"error: {found}, for the passes of a step: {remedy}"
        end(1, message, speaks=True)
    except KeyboardInterrupt as signalled:
        interrupted(*signalled.args or [signal.SIGINT])


if __name__ == "__main__":
    sys.exit(main())
