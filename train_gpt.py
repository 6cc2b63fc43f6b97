"""Train a GPT to 3.28 validation loss on FineWeb in the least wall-clock time.

Claim:   none on 8 x H100 and FineWeb yet. On 4 x H100 and the proxy corpus: validation loss 3.374
         after 750 of 1285 steps, 108.7 s, one run, 2026-11-22, records/2026-11-22_whole_recipe.
Launch:  ./run.sh, or torchrun --nproc_per_node=8 train_gpt.py [--option value ...], or --help.
Rooms:   1 this claim, 2 config and tables, 3 runtime and log, 4 operations, 5 model, 6 optimizer,
         7 data, 8 schedule, 9 train and validate, 10 command line. Later rooms call earlier ones.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import glob
import importlib.util
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ==================================================================================================
# 2. Config and tables
# ==================================================================================================

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
START_TOKEN = 50256  # GPT-2's <|endoftext|>; it begins every document
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
    #     share     tokens  seq_len  short   long    lr  second     third      prefix
    Stage(1 / 3,     131_072,      896,   128,   384, 1.00,  0.5, 0.5,  0.25, 0.0, 0.25, 0.25),
    Stage(1 / 3,     262_144,     2048,   384,   896, 1.52,  0.5, 0.0,  0.0,  0.0, 0.25, 0.0),
    Stage(1 / 3,     393_216,     2048,   640,  1408, 1.73,  0.0, 0.0,  0.0,  0.0, 0.0,  0.0),
)
SPEEDRUN_EXTENSION = (  # after num_steps: longer windows at the final learning rate
    Stage(1.0,       393_216,     2048,   768,  1664, 1.73,  0.0, 0.0,  0.0,  0.0, 0.0,  0.0),
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
    Stage(1 / 2,       1_024,      256,    64,   128, 1.00,  0.2, 0.0,  0.1,  0.0, 0.0,  0.0),
    Stage(1 / 2,       1_024,      512,   128,   256, 1.00,  0.0, 0.0,  0.0,  0.0, 0.0,  0.0),
)
TINY_EXTENSION = (
    Stage(1.0,         1_024,      512,   128,   512, 1.00,  0.0, 0.0,  0.0,  0.0, 0.0,  0.0),
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
    prefix_file: str = "data/gpt2_prefix_tokens.npy"  # prefix token of every token
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
    adam_eps: float = 1e-10  # added to the root of Adam's second moment
    lr_decay_start: float = 0.4  # share of num_steps after which the learning rate falls
    lr_end: float = 0.15  # learning rate multiplier at num_steps
    # Run
    seed: int = 1337  # of the initial weights
    val_every: int = 250  # steps between validations; 0: only the final one
    val_row_tokens: int = 32_768  # tokens of one validation row
    compile: str = "block"  # block: small graphs that layers share; full: all layers in one; none
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
        require(
            not (row.window == "none" and extras), f"--layers: layer {i} has no attention to change"
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
        torch._dynamo.config.recompile_limit = 64  # one graph a kind of layer and row length
        # flash-attn-4's compiler warns of an argument left out here, inductor of fp32 products,
        # which here have 12 columns
        warnings.filterwarnings("ignore", message="Argument aux_data|TensorFloat32 tensor cores")
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


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


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
    if torch.cuda.get_device_capability(device)[0] >= 9 and importlib.util.find_spec(
        "flash_attn.cute"
    ):
        return "flash-attn-4"
    return "varlen"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seq_len: int,
    window: int,
    scale: float,
    backend: str,
) -> Tensor:
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
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seq_len: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
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


def remove_own_value(y: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
    """XSA: y - tanh(alpha)·(y·v / |v|²)·v a head. y, v: (T, heads, head_dim), alpha: (T, heads)."""
    y32, v32 = y.float(), v.float()
    share = (y32 * v32).sum(-1) / v32.square().sum(-1).clamp_min(1e-12)
    return (y32 - (alpha.tanh() * share)[:, :, None] * v32).type_as(y)


def mix_heads(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, scale: float, weights: Tensor
) -> Tensor:
    """Attention with probabilities mixed over the heads: sum_s (sum_j w_j p_j[t, s]) v_h[s].

    p_j is head j's own softmax over the last `window` tokens of the document and the query's token.
    q, k, v: (T, heads, head_dim); weights: (T, heads). Returns (T, heads, head_dim). Works on
    blocks of queries with the block before as keys, so `window` is at most the block.
    """
    weights = rms_norm(weights)
    num_tokens, heads, head_dim = q.shape
    block = max(128, round_up(window, 16))
    padding = -num_tokens % block
    position = torch.arange(num_tokens + padding, device=q.device)
    document = torch.searchsorted(cu_seqlens, position.int(), right=True)

    def blocks(x: Tensor, value: int = 0) -> Tensor:
        return F.pad(x, (0, 0) * (x.dim() - 1) + (0, padding), value=value).unflatten(
            0, (-1, block)
        )

    def with_block_before(x: Tensor) -> Tensor:
        return torch.cat([F.pad(x, (0, 0) * (x.dim() - 1) + (1, 0))[:-1], x], dim=1)

    query, keys = position.unflatten(0, (-1, block)), position.unflatten(0, (-1, block))
    keys = torch.cat([keys - block, keys], dim=1)
    distance = query[:, :, None] - keys[:, None, :]
    visible = (distance >= 0) & (distance <= window) & (keys >= 0)[:, None, :]
    visible &= document[query][:, :, None] == document[keys.clamp_min(0)][:, None, :]

    k, v = with_block_before(blocks(k)), with_block_before(blocks(v))
    scores = torch.einsum("nqhd,nkhd->nhqk", blocks(q), k).float() * scale
    probabilities = scores.masked_fill(~visible[:, None], -math.inf).softmax(dim=-1)
    mixed = (probabilities * blocks(weights.float()).transpose(1, 2)[:, :, :, None]).sum(1)
    out = torch.bmm(mixed.type_as(v), v.flatten(2)).flatten(0, 1)[:num_tokens]
    return out.unflatten(1, (heads, head_dim))


def softcap(logits: Tensor) -> Tensor:
    """Logits between 0 and 23, fp32."""
    return 23 * torch.sigmoid((logits.float() + 5) / 7.5)


def target_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (T, vocab) at targets (T, n), 0 where a target is IGNORED_TARGET."""
    if logits.is_cuda:  # sums that the compiler folds into the softmax, forward and backward
        column = torch.arange(logits.size(1), device=logits.device)
        picked = [
            torch.where(column == target[:, None], logits, 0.0).sum(1)
            for target in targets.unbind(1)
        ]
        return torch.stack(picked, dim=1)
    return logits.gather(1, targets.clamp_min(0)) * (targets != IGNORED_TARGET)


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
    values: Tensor  # (T, tables, dim)
    bigram: Tensor  # (T, dim)
    sign: Tensor  # (T,) rows of the sign table


class Windows(NamedTuple):
    """How many earlier tokens a query sees in short and in long layers."""

    short: int
    long: int


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
    if enabled:
        return functools.partial(torch.compile, fullgraph=True, dynamic=False)
    return lambda function: function


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
        self.skip_from = config.skip_from
        self.num_value_tables = config.num_value_tables
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
        self.value_embed = zeros(self.num_value_tables * vocab, dim)  # one table behind the other
        self.bigram = zeros(config.bigram_rows, dim)
        num_small = sum(math.prod(row.shape) for row in self.small_layout.values())
        self.small = nn.Parameter(torch.zeros(num_small, device=device))
        generator = torch.Generator(device).manual_seed(config.seed)
        signs = torch.randint(0, 2, (8192, dim), generator=generator, device=device)
        self.register_buffer("bigram_signs", (2 * signs - 1).to(dtype), persistent=False)
        self.init_weights(generator)

        self.backend = attention_backend(device, dtype)
        self.rotary = self.make_rotary(device)
        per_block = compiler(config.compile == "block")
        self.start_stream = per_block(start_stream)
        self.gate_mlp = per_block(gate_mlp)
        self.before_attention = per_block(before_attention)
        self.mix_heads = per_block(mix_heads)
        self.after_attention = per_block(after_attention)
        self.skip_mlp = per_block(skip_mlp)
        self.enter_last_layer = per_block(enter_last_layer)
        self.leave_layers = per_block(leave_layers)
        self.run_layers = compiler(config.compile == "full")(self.run_layers)
        self.head_loss = compiler(config.compile != "none")(head_loss)

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

    def unpack_small(self) -> dict[str, Tensor]:
        """The slices of self.small by name, in their shapes."""
        shapes = [row.shape for row in self.small_layout.values()]
        pieces = self.small.split([math.prod(shape) for shape in shapes])
        return {
            name: piece.view(shape)
            for name, piece, shape in zip(self.small_layout, pieces, shapes, strict=True)
        }

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

    def look_up(self, tokens: Tensor) -> Lookups:
        """Rows of the embedding tables for tokens (T,)."""
        embedded = F.embedding(tokens, self.head if self.tied else self.embed)
        starts = torch.arange(self.num_value_tables, device=tokens.device)
        rows = tokens[:, None] + starts * self.config.padded_vocab_size
        hashed, sign = bigram_hash(tokens, self.config.bigram_rows)
        # The gradient of so large a table is kept as the rows it touches.
        bigram = F.embedding(hashed, self.bigram, sparse=True)
        return Lookups(embedded, F.embedding(rows, self.value_embed), bigram, sign)

    def hidden(self, batch: Batch, windows: Windows) -> Tensor:
        """The residual stream in front of the head, (T, dim)."""
        return self.run_layers(self.look_up(batch.tokens), batch, windows)

    def run_layers(self, lookups: Lookups, batch: Batch, windows: Windows) -> Tensor:
        """From the embeddings to the residual stream in front of the head, (T, dim)."""
        config, num_tokens, last = self.config, batch.tokens.size(0), len(self.config.layers) - 1
        small = self.unpack_small()
        attention_weights = dict(zip(self.attention_layers, self.attention_bank.unbind(0)))
        mlp_weights = self.mlp_bank.unbind(0)
        *turns, scale = self.rotary[windows.long]
        values = lookups.values.unbind(1)

        def gates_of(name: str, x: Tensor) -> dict[str, Tensor]:
            weights = [small[f"{name} {part}"] for part in ("w_1", "b_1", "w_2", "b_2")]
            outputs = self.gate_mlp(x, *weights, small.get(f"{name} scale"))
            widths = [width for width, _ in self.gate_layouts[name].values()]
            return dict(zip(self.gate_layouts[name], outputs.split(widths, dim=1)))

        x0, bigram = self.start_stream(
            lookups.embedded,
            small["smear"],
            small["smear_gate"],
            lookups.bigram,
            self.bigram_signs,
            lookups.sign,
        )
        gates = gates_of("early", x0)
        x = first = x0 + (gates["bigram 0"] * bigram).type_as(x0)
        kept = {}  # outputs of layers

        for i, row in enumerate(config.layers):
            w_1, w_2 = mlp_weights[i], mlp_weights[len(config.layers) + i]
            mlp_scales = small["mlp_residual"][i], small["mlp_project"][i]
            if row.window == "none":
                skipped = None if row.skip_from is None else kept[row.skip_from]
                x = self.skip_mlp(
                    x, skipped, small["skip"], gates.get(f"skip {i}"), w_1, w_2, *mlp_scales
                )
                kept[i] = x
                continue
            scales = small["residual"][i], small["project"][i]
            value = value_gate = value_share = extra_value = None
            if row.value_table is not None:
                value, value_gate = values[row.value_table], small["value_gate"][row.value_table]
            if i < last:
                injections = [(gates[f"first {i}"], x0)]
                if i > 0:  # layer 0 has had its share of the bigram
                    injections.append((gates[f"bigram {i}"], bigram))
            else:
                kept |= {"attend": kept[row.attend_from], "last": x}
                own = gates_of("last", x)
                x, extra_value = self.enter_last_layer(x, first, kept["attend"], own)
                value_share = own["value_gate"].repeat_interleave(config.num_heads // 2, dim=1)
                injections = [(own["first"], first), (own["bigram"], bigram)]
                scales = own["residual"], own["project"]
                mlp_scales = own["mlp_residual"], own["mlp_project"]

            copies = 2 if row.paired else 1  # positions a token
            q, k, v = self.before_attention(
                x if row.attend_from is None else kept[row.attend_from],
                attention_weights[i],
                small["attention_in"][i],
                *(table[: num_tokens * copies] for table in turns),
                value,
                value_gate,
                value_share,
                extra_value,
                row.paired,
                row.window == "long",
                config.head_dim,
            )
            documents = batch.cu_seqlens * copies, batch.max_seq_len * copies
            window = windows.long if row.window == "long" else windows.short
            y = attention(q, k, v, *documents, window, scale, self.backend)
            mixed = None
            if i == last:
                read, write = gates[f"mix_in {i}"], gates[f"mix_out {i}"]
                mixed = (
                    self.mix_heads(q, k, v, batch.cu_seqlens, config.mix_window, scale, read),
                    write,
                )
            x = self.after_attention(
                x,
                y,
                attention_weights[i],
                small["attention_out"][i],
                mixed,
                (v, gates[f"xsa {i}"]) if row.xsa else None,
                gates.get(f"head {i}"),
                row.paired,
                injections,
                scales,
                w_1,
                w_2,
                mlp_scales,
            )
            kept[i] = x
            if i == self.skip_from:
                kept["skip"] = x
                gates |= gates_of("late", x)
        own = gates_of("output", x)
        sources = {"first": first, "value": values[0], **kept}
        return self.leave_layers(x, [(own[name], sources[name]) for name in OUTPUT_GATES])

    def forward(
        self,
        batch: Batch,
        windows: Windows,
        loss_weights: Tensor | None = None,
        prefixes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss to train on and the plain next-token loss (one tensor without loss_weights),
        both fp32 sums over the row in nats. loss_weights and prefixes: see head_loss."""
        return self.head_loss(
            self.hidden(batch, windows), self.head, batch.targets, loss_weights, prefixes
        )


def bigram_hash(tokens: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Rows of the bigram and of the sign table for each token (int32) and its predecessor."""
    previous = F.pad(tokens, (1, 0))[:-1]
    rows = ((36313 * tokens) ^ (27191 * previous)) % (num_rows - 1)
    no_previous = torch.arange(len(tokens), device=tokens.device) == 0
    return torch.where(no_previous, num_rows - 1, rows), (previous ^ tokens) % 8192


def start_stream(
    embedded: Tensor, smear: Tensor, smear_gate: Tensor, bigram: Tensor, signs: Tensor, sign: Tensor
) -> tuple[Tensor, Tensor]:
    """Normed, smeared embedding and signed bigram embedding, (T, dim) each."""
    share = smear * torch.sigmoid(F.linear(embedded[1:, :12].float(), smear_gate))
    smeared = embedded[1:] + (share * embedded[:-1]).type_as(embedded)
    return rms_norm(torch.cat([embedded[:1], smeared])), bigram * signs[sign]


def gate_mlp(
    x: Tensor, w_1: Tensor, b_1: Tensor, w_2: Tensor, b_2: Tensor, scale: Tensor | None
) -> Tensor:
    """Per-token coefficients, (T, outputs) fp32; scale None is the constant GATE_SCALE."""
    hidden = F.gelu(F.linear(x, w_1.type_as(x), b_1.type_as(x)))
    outputs = F.linear(hidden, w_2.type_as(x)).float() + b_2
    return outputs * (GATE_SCALE if scale is None else scale)


def before_attention(
    x: Tensor,
    weights: Tensor,
    scale: Tensor,
    cos: Tensor,
    sin: Tensor,
    value: Tensor | None,
    value_gate: Tensor | None,
    value_share: Tensor | None,
    extra_value: Tensor | None,
    paired: bool,
    key_offset: bool,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of x (T, dim): (T, heads, head_dim), or as pair_heads makes them.

    value (T, dim) is added to the values times a share a token and head: value_share (T, heads),
    or made with the weights value_gate (heads, 12). extra_value (T, dim) is added as it is.
    """
    dim = x.size(1)
    x = rms_norm(x)
    q, k, v = (scale * F.linear(x, weights[: 3 * dim])).type_as(x).view(-1, 3, dim).unbind(1)
    q, k, v = (heads.unflatten(1, (-1, head_dim)) for heads in (q, k, v))
    q, k = rms_norm(q), rms_norm(k)
    if key_offset:
        k = torch.cat([k[..., : head_dim // 2], shift(k[..., head_dim // 2 :])], dim=-1)
    if value is not None:
        if value_share is None:
            features = torch.cat([x[:, :6], value[:, :6]], dim=1)
            value_share = 2 * torch.sigmoid(F.linear(features.float(), value_gate))
        v = v + (value_share[:, :, None] * value.view_as(v)).type_as(v)
    if extra_value is not None:
        v = v + extra_value.view_as(v)
    if paired:
        q, k, v = pair_heads(q), pair_heads(k), pair_heads(v)
    return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v


def after_attention(
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    scale: Tensor,
    mixed: tuple[Tensor, Tensor] | None,
    own_value: tuple[Tensor, Tensor] | None,
    head_gate: Tensor | None,
    paired: bool,
    injections: list[tuple[Tensor, Tensor]],
    scales: tuple[Tensor, Tensor],
    w_1: Tensor,
    w_2: Tensor,
    mlp_scales: tuple[Tensor, Tensor],
) -> Tensor:
    """The rest of a layer: the residual stream x (T, dim) behind its attention y and its MLP."""
    dim = x.size(1)
    if paired:
        y = unpair_heads(y)
    if mixed is not None:
        correction, gate = mixed
        y = y + (gate[:, :, None] * correction).type_as(y)
    if own_value is not None:
        y = remove_own_value(y, *own_value)
    if head_gate is not None:
        y = (head_gate[:, :, None] * y).type_as(y)
    projected = scale * F.linear(y.flatten(1), weights[3 * dim :])
    residual, project = scales
    x = residual * x + project * projected + sum(gate * tensor for gate, tensor in injections)
    return mlp(x.type_as(y), w_1, w_2, *mlp_scales)


def mlp(x: Tensor, w_1: Tensor, w_2: Tensor, residual: Tensor, project: Tensor) -> Tensor:
    """Add the ReLU² MLP to the residual stream."""
    return (residual * x + project * (F.linear(rms_norm(x), w_1).relu().square() @ w_2)).type_as(x)


def skip_mlp(
    x: Tensor,
    skipped: Tensor | None,
    scale: Tensor,
    gate: Tensor | None,
    w_1: Tensor,
    w_2: Tensor,
    residual: Tensor,
    project: Tensor,
) -> Tensor:
    """A layer without attention; it may take in an earlier layer's output instead."""
    if skipped is not None:
        x = (x + torch.sigmoid(scale) * gate * skipped).type_as(x)
    return mlp(x, w_1, w_2, residual, project)


def enter_last_layer(
    x: Tensor, first: Tensor, attend: Tensor, gates: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Dynamic skips into the residual stream and the values of the last layer, (T, dim) each."""
    value = gates["value_first"] * first + gates["value_attend"] * attend + gates["value_last"] * x
    stream = (1 + gates["x_last"]) * x + gates["x_first"] * first + gates["x_attend"] * attend
    return stream.type_as(x), value.type_as(x)


def leave_layers(x: Tensor, skips: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Dynamic skips to the end: adds gate (T, 1) times tensor (T, dim) of each pair."""
    return (x + sum(gate * tensor for gate, tensor in skips)).type_as(x)


def head_loss(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    loss_weights: Tensor | None = None,
    prefixes: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropies of the softcapped logits; x (T, dim), head (vocab, dim), targets (T,).

    Without loss_weights the sum of next-token losses. loss_weights, (4,): of the next token, of the
    two after it, and of the next token's prefix token, prefixes[target] (IGNORED_TARGET where there
    is none); returns the sums of the weighted and of the next-token losses.
    """
    logits = softcap(F.linear(rms_norm(x), head))
    if loss_weights is None:
        return F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="sum")
    later = [F.pad(targets, (0, n), value=IGNORED_TARGET)[n:] for n in (1, 2)]
    terms = torch.stack([targets, *later, prefixes[targets]], dim=1)
    losses = torch.logsumexp(logits, dim=1, keepdim=True) - target_logits(logits, terms)
    losses = (losses * (terms != IGNORED_TARGET)).sum(0)
    return losses @ loss_weights, losses[0].detach()


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


def polar_express(x: Tensor) -> Tensor:
    """Nearly the polar factor UVᵀ of each matrix USVᵀ in x, (batch, rows, cols)."""
    tall = x.size(1) > x.size(2)
    if tall:  # the Gram matrix on the smaller side
        x = x.mT
    x = x / (1.02 * x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).type_as(x)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def normuon_direction(
    grad: Tensor, momentum: Tensor, mean_square: Tensor, mu: float | Tensor, beta2: float
) -> Tensor:
    """Orthogonalised Nesterov momentum, rows evened out; changes momentum and mean_square.

    grad: (batch, rows, cols); momentum: the same, fp32; mean_square: fp32, (batch, rows, 1), or
    (batch, 1, cols) for wide matrices. Source: NorMuon, Li et al. 2025, arXiv 2510.05491, algorithm
    1.
    """
    grad = grad.float()
    momentum.lerp_(grad, 1 - mu)
    work_dtype = torch.bfloat16 if grad.device.type == "cuda" else torch.float32
    direction = polar_express(grad.lerp(momentum, mu).to(work_dtype)).float()
    norm = direction.norm(dim=(1, 2), keepdim=True)
    across = 2 if mean_square.size(2) == 1 else 1
    mean_square.lerp_(direction.square().mean(dim=across, keepdim=True), 1 - beta2)
    direction = direction * mean_square.clamp_min(1e-12).rsqrt()
    return direction * (norm / direction.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12))


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
    high: Tensor, low: Tensor | None, direction: Tensor, lr: Tensor, decay: Tensor
) -> None:
    """weights -= lr·direction, and decay·weights where that has the same sign (cautious decay)."""
    weights = join_mantissa(high, low)
    shrinks = direction * weights > 0
    split_mantissa_(high, low, weights - lr * direction - decay * weights * shrinks)


def adam_update_(
    high: Tensor,
    low: Tensor | None,
    grad: Tensor,
    mean: Tensor,
    mean_square: Tensor,
    betas: tuple[float, float] | tuple[Tensor, Tensor],
    corrections: tuple[Tensor, Tensor],
    eps: float,
    lr: Tensor,
    decay: Tensor,
) -> None:
    """One step of Adam (Kingma & Ba 2015, algorithm 1), in place.

    betas, lr and decay are for all weights or one a weight. corrections: 1 - beta**t, both moments.
    """
    grad = grad.float()
    mean.lerp_(grad, 1 - betas[0])
    mean_square.lerp_(grad.square(), 1 - betas[1])
    direction = (mean / corrections[0]) / ((mean_square / corrections[1]).sqrt() + eps)
    apply_update_(high, low, direction, lr, decay)


def sum_rows(rows: Tensor, values: Tensor, num_rows: int) -> Tensor:
    """A table, (num_rows, dim), of values (n, dim) added up at rows (n,); others are left out."""
    rows = torch.where((rows >= 0) & (rows < num_rows), rows, num_rows)
    # The gradient of an embedding does just this: in a fixed order, summed in fp32.
    return torch.ops.aten.embedding_dense_backward(values, rows, num_rows + 1, num_rows, False)[:-1]


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
            lr_scales = torch.ones(entries)
        else:  # W_1 as it is, W_2 with twice the step
            self.blocks = [(slice(0, height), height)]
            index = torch.arange(entries) + self.rank * entries  # in the whole bank
            lr_scales = torch.where(index < len(config.layers), 1.0, 2.0)
        for rows_of_entry, matrix_rows in self.blocks:
            count = entries * (rows_of_entry.stop - rows_of_entry.start) // matrix_rows
            shape = (count, matrix_rows, 1) if matrix_rows >= width else (count, 1, width)
            self.mean_squares.append(torch.zeros(shape, device=param.device))
        shape_scales = torch.ones(height)
        for rows_of_entry, matrix_rows in self.blocks:
            shape_scales[rows_of_entry] = math.sqrt(max(1.0, matrix_rows / width))
        self.lr_scales = (lr_scales[:, None] * shape_scales)[:, :, None].to(param.device)

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
        compile = compiler(config.compile != "none")
        self.adam_update_, self.apply_update_ = compile(adam_update_), compile(apply_update_)

    @torch.no_grad()
    def split_embedding(self) -> None:
        """Make the embedding a matrix of its own, which starts as the head, Adam state included."""
        head, embed = (
            next(state for state in self.states if state.group.name == name)
            for name in ("head", "embed")
        )
        embed.param.copy_(head.param)
        if head.param.grad is not None:
            # The head's gradient so far is also the embedding's: the update due next takes it for
            # both.
            embed.param.grad = head.param.grad.clone()
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
        due = [
            state
            for state in self.states
            if (step + 1) % state.group.every == 0 and state.param.grad is not None
        ]
        reductions = [self._launch_reduction(state) for state in due]
        gathers = []
        for state, finish_reduction in reversed(list(zip(due, reductions))):
            self._update(state, finish_reduction(), step, lr_scale, momentum)
            state.param.grad = None
            if state.num_shards > 1:
                gathers.append(
                    dist.all_gather_into_tensor(state.param.detach(), state.shard, async_op=True)
                )
        for work in gathers:
            work.wait()

    def _launch_reduction(self, state: ParamState) -> Callable[[], Tensor]:
        """Start to sum a gradient over the ranks. The function returned waits for the sum and gives
        this rank's rows of it."""
        grad, world_size = state.param.grad, self.runtime.world_size
        if grad.is_sparse:
            rows, values = grad._indices()[0].int(), grad._values()
            if world_size > 1 and not values.is_cuda:
                # The CPU merges neighbouring rows as it adds gradients up: as many on every rank.
                count = torch.tensor(len(rows))
                dist.all_reduce(count, dist.ReduceOp.MAX)
                missing = int(count) - len(rows)
                rows, values = F.pad(rows, (0, missing)), F.pad(values, (0, 0, 0, missing))
            # On 4 H100s the whole table took 2.6 ms, 65,536 rows a rank alone 4.6 ms: they pay when
            # all ranks together touch less than about a quarter of it.
            if 1 < world_size and 4 * world_size * values.nbytes < state.param.nbytes:
                return self._launch_touched_rows(state, rows, values)
            grad = sum_rows(rows, values, len(state.param))
        if world_size == 1:
            return lambda: grad
        if state.num_shards == 1:
            work = dist.all_reduce(grad, async_op=True)
        else:
            whole, grad = grad.contiguous(), torch.empty_like(state.shard)
            work = dist.reduce_scatter_tensor(grad, whole, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return grad

        return finish

    def _launch_touched_rows(
        self, state: ParamState, rows: Tensor, values: Tensor
    ) -> Callable[[], Tensor]:
        """_launch_reduction where the rows that all ranks touch are less than the table."""
        world_size, num_rows = self.runtime.world_size, len(state.shard)
        all_rows = rows.new_empty(world_size * len(rows))
        all_values = values.new_empty(world_size * len(rows), values.size(1))
        works = [
            dist.all_gather_into_tensor(all_rows, rows, async_op=True),
            dist.all_gather_into_tensor(all_values, values, async_op=True),
        ]

        def finish() -> Tensor:
            for work in works:
                work.wait()
            return sum_rows(all_rows - state.rank * num_rows, all_values, num_rows)

        return finish

    def _update(
        self, state: ParamState, grad: Tensor, step: int, lr_scale: float, momentum: float
    ) -> None:
        config, group = self.config, state.group
        if group.rule == "adam":
            lr = torch.as_tensor(config.adam_lr * lr_scale * state.lr)
            decay = lr * lr * config.adam_weight_decay * state.weight_decay
            updates = (step + 1) // group.every
            corrections = tuple(torch.as_tensor(1 - beta**updates) for beta in state.betas)
            self.adam_update_(
                state.shard,
                state.low,
                grad,
                state.mean,
                state.mean_squares[0],
                state.betas,
                corrections,
                config.adam_eps,
                lr,
                decay,
            )
            return
        lr = config.muon_lr * group.lr * lr_scale
        decay = lr * lr * config.muon_weight_decay * group.weight_decay
        direction = torch.empty_like(state.mean)
        for (rows, matrix_rows), mean_square in zip(state.blocks, state.mean_squares):
            matrices = (-1, matrix_rows, grad.size(2))
            # a copy where a bank entry has several kinds of block
            part = state.mean[:, rows].reshape(matrices)
            direction[:, rows] = normuon_direction(
                grad[:, rows].reshape(matrices), part, mean_square, momentum, config.muon_beta2
            ).view_as(state.mean[:, rows])
            state.mean[:, rows] = part.view_as(state.mean[:, rows])
        direction *= state.lr_scales
        self.apply_update_(state.shard, state.low, direction, torch.tensor(lr), torch.tensor(decay))


@contextlib.contextmanager
def nothing_changes(model: GPT, optimizer: Optimizer) -> Iterator[None]:
    """Put every weight and optimizer state back, bit for bit, and drop the gradients at the end."""
    tied = model.tied
    tensors = [param.detach() for param in model.parameters()] + optimizer.tensors()
    copies = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, copy in zip(tensors, copies):
            tensor.copy_(copy)
        model.tied = tied
        model.zero_grad(set_to_none=True)


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
    stream = TokenStream(files, config.vocab_size, config.repeat_data)
    for num_tokens, max_seq_len in shapes:
        for owner in range(world_size):
            documents = stream.next_row(num_tokens, max_seq_len)
            if owner == rank:
                starts = np.cumsum([0] + [len(document) for document in documents[:-1]])
                yield make_batch(
                    np.concatenate(documents), starts, max_seq_len, config.min_mean_doc_len, pin
                )


def read_prefixes(config: Config, device: torch.device) -> Tensor:
    """The longest other token that each token's bytes begin with, or IGNORED_TARGET; (vocab,)."""
    path, padded = config.prefix_file, np.full(config.padded_vocab_size, IGNORED_TARGET, np.int64)
    remedy = "make it again with data/prefix_tokens.py"
    try:
        table = np.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--prefix_file {path}: cannot be read ({error}): {remedy}") from None
    if table.ndim != 1 or table.dtype != np.int32 or len(table) > len(padded):
        raise UserError(
            f"--prefix_file {path}: {table.dtype} {table.shape} is no such table: {remedy}"
        )
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
                "lower --muon_lr or --adam_lr, or check the data of --train_files"
            )
        step_ms, self.last_time = 1000 * (now - self.last_time), now
        self.runtime.log.step(step + 1, value, now, step_ms)
        self.bar.set_postfix_str(
            f"loss {value:.3f} · {1000 * now / (step + 1):.1f} ms/step", refresh=False
        )
        self.bar.update()


def prepare(
    model: GPT,
    optimizer: Optimizer,
    schedule: Schedule,
    loss_weights: Tensor,
    prefixes: Tensor,
    runtime: Runtime,
) -> None:
    """Compile and warm up on every shape with random tokens, then put everything back."""
    config, begin = model.config, time.perf_counter()
    steps = {  # the last step of every combination of shape and tied head
        (schedule.row_tokens(step), schedule[step].tied): step for step in range(schedule.end_step)
    }
    random = np.random.default_rng(runtime.rank)

    def random_batch(num_tokens: int, max_seq_len: int) -> Batch:
        tokens = random.integers(0, START_TOKEN, num_tokens + 1).astype(np.uint16)
        starts = np.arange(0, num_tokens, max_seq_len)
        return to_device(
            make_batch(tokens, starts, max_seq_len, config.min_mean_doc_len, False), runtime.device
        )

    def report(what: str) -> None:
        runtime.synchronize()
        runtime.log.line(f"prepared {what} · {time.perf_counter() - begin:.1f} s")

    with nothing_changes(model, optimizer):
        for (num_tokens, tied), last in steps.items():
            plan = schedule[last]
            if model.tied and not tied:
                optimizer.split_embedding()
            for step in range(2):  # an even and an odd one, so that every update runs
                batch = random_batch(num_tokens, plan.stage.max_seq_len)
                loss, _ = model(batch, plan.windows, loss_weights[last], prefixes)
                (loss / num_tokens).backward()
                optimizer.step(step, plan.lr_scale, plan.momentum)
            head = "tied" if tied else "untied"
            report(f"training rows of {num_tokens:,} tokens, embedding and head {head}")
        with torch.no_grad():
            batch = random_batch(config.val_row_tokens, config.val_row_tokens)
            model(batch, plan.windows)
        report(f"validation rows of {config.val_row_tokens:,} tokens")


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
    log.line(Path(__file__).read_text(encoding="utf-8") + "=" * 100, screen=False)
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
    log.line(
        f"{millions:.1f} M parameters, {len(config.layers)} layers, attention by {model.backend}"
    )
    loss_weights = torch.tensor(schedule.loss_weights(), device=runtime.device)
    prefixes = read_prefixes(config, runtime.device)
    prepare(model, optimizer, schedule, loss_weights, prefixes, runtime)
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
    clock.start()
    for step in range(schedule.end_step):
        plan = schedule[step]
        if model.tied and not plan.tied:
            optimizer.split_embedding()
        train_loss = torch.zeros((), device=runtime.device)
        for _ in range(grad_accum_steps):
            batch = to_device(next(rows), runtime.device)
            loss, next_token_loss = model(batch, plan.windows, loss_weights[step], prefixes)
            # summed over tokens, averaged over ranks and micro-steps
            (loss / config.rows_per_step).backward()
            train_loss += next_token_loss / (batch.tokens.numel() * grad_accum_steps)
        optimizer.step(step, plan.lr_scale, plan.momentum)
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
        logits = softcap(F.linear(rms_norm(x[-1]), model.head))[: trained.vocab_size]
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
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{text!r} is neither true nor false")
        return text.lower() == "true"
    if kind == int | None:
        return None if text == "none" else int(text)
    return float(Fraction(text)) if kind is float else kind(text)


def format_value(value: object) -> str:
    """The inverse of parse_value."""
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
        "1/3:131072:896:128:384:1:.5:.5:.25:0:.25:.25, a layer "
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
