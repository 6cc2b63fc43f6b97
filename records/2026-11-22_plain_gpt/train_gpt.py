"""Train a GPT to 3.28 validation loss on FineWeb in the least wall-clock time.

Claim:    none yet on 8 x H100. The runs made so far, with their machines and logs, are in records/.
Launch:   ./run.sh, or torchrun --nproc_per_node=8 train_gpt.py [--option value ...], or --help.
Rooms:    1 config and tables, 2 runtime and log, 3 operations, 4 model, 5 optimizer, 6 data,
          7 schedule, 8 train and validate, 9 command line. Later rooms call earlier ones.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import glob
import importlib.util
import inspect
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
# 1. Config and tables
# ==================================================================================================

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
START_TOKEN = 50256  # GPT-2's <|endoftext|>; it begins every document
IGNORED_TARGET = -1  # a target that is not scored: padding behind the last validation token


class UserError(Exception):
    """Something the user can mend. The message names the file or option and the remedy."""


@dataclass(frozen=True)
class Stage:
    """One row of the schedule; sizes are in tokens."""

    share: float  # of num_steps
    tokens_per_step: int  # over all GPUs and micro-steps
    max_seq_len: int  # longer documents are cut
    window_short: int  # how many earlier tokens a query sees
    window_long: int
    lr: float  # multiplier


@dataclass(frozen=True)
class Layer:
    """One row of the layer plan."""

    window: str  # short or long
    value_table: int | None  # value embedding added to v, or none


# fmt: off
SPEEDRUN_STAGES = (
    #     share  tokens_per_step  max_seq_len  short   long   lr
    Stage(1 / 3,         131_072,         896,   128,   384, 1.00),
    Stage(1 / 3,         262_144,        2048,   384,   896, 1.52),
    Stage(1 / 3,         393_216,        2048,   640,  1408, 1.73),
)
SPEEDRUN_EXTENSION = (  # after num_steps: longer windows at the final learning rate
    Stage(1.0,           393_216,        2048,   768,  1664, 1.73),
)
SPEEDRUN_LAYERS = (
    #     window   value_table
    Layer("short", None),  # 0
    Layer("short", 0),     # 1
    Layer("short", 1),     # 2
    Layer("long",  None),  # 3
    Layer("short", None),  # 4
    Layer("short", None),  # 5
    Layer("short", None),  # 6
    Layer("short", None),  # 7
    Layer("short", 2),     # 8
    Layer("short", 3),     # 9
    Layer("long",  4),     # 10
)
TINY_STAGES = (
    Stage(1 / 2,           1_024,         256,    64,   128, 1.00),
    Stage(1 / 2,           1_024,         512,   128,   256, 1.00),
)
TINY_EXTENSION = (
    Stage(1.0,             1_024,         512,   128,   512, 1.00),
)
TINY_LAYERS = (
    Layer("short", 0),     # 0
    Layer("long",  None),  # 1
    Layer("short", None),  # 2
    Layer("long",  None),  # 3
)
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
    layers: tuple[Layer, ...] = SPEEDRUN_LAYERS  # layer plan, rows window:value_table
    model_dim: int = 768  # width of the residual stream
    head_dim: int = 128  # width of an attention head
    mlp_dim: int = 3072  # hidden width of the MLP
    vocab_size: int = 50_257  # token ids are below this; the tables are padded to a multiple of 128
    attention_scale: float = 0.1  # factor on q.k before the softmax
    dtype: str = "bfloat16"  # of weights and activations: bfloat16 or float32
    # Schedule
    num_steps: int = 1270  # scheduled steps; the learning rate reaches its end here
    stages: tuple[Stage, ...] = SPEEDRUN_STAGES  # share:tokens:max_seq_len:short:long:lr, …
    extension_steps: int = 15  # steps after the scheduled ones, at the final learning rate
    extension: tuple[Stage, ...] = SPEEDRUN_EXTENSION  # their one row, in the format of stages
    final_window_long: int = 2560  # long window of the final validation
    rows_per_step: int = 8  # rows a step is cut in: one a GPU and micro-step
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
    compile: str = "block"  # block: one graph reused by all layers; full: the whole model; none
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
        dtype="float32",
        num_steps=100,
        stages=TINY_STAGES,
        extension_steps=4,
        extension=TINY_EXTENSION,
        final_window_long=512,
        rows_per_step=2,
        momentum_warmup_steps=30,
        momentum_cooldown_steps=10,
        adam_lr=0.1,  # few tokens, each of them often
        val_every=50,
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
    positive += "val_row_tokens min_mean_doc_len model_dim head_dim mlp_dim"
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
        f"start 1, 2, 4 or 8 of them, or pass --rows_per_step {round_up(config.rows_per_step, world_size)}",
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
                f"{option}: {stage.tokens_per_step} tokens a step do not make {config.rows_per_step} rows "
                "of a multiple of 16 tokens: change the tokens or --rows_per_step",
            )
            require(
                min(dataclasses.astuple(stage)[:6]) > 0,
                f"{option}: share, tokens, max_seq_len, windows and lr must be positive: {stage}",
            )
    require(len(config.extension) == 1, f"--extension takes one row, found {len(config.extension)}")
    require(
        config.model_dim % config.head_dim == 0 and config.head_dim % 8 == 0,
        f"--head_dim {config.head_dim} must be a multiple of 8 that divides --model_dim {config.model_dim}",
    )
    require(
        config.num_heads % 2 == 0,
        f"--model_dim {config.model_dim} holds {config.num_heads} heads: Muon takes query and key heads in "
        "pairs, so make it an even number",
    )
    require(len(config.layers) > 0, "--layers has no row: give at least one")
    for row in config.layers:
        require(
            row.window in ("short", "long"),
            f"--layers: window {row.window!r} is neither short nor long",
        )
    tables = sorted({row.value_table for row in config.layers} - {None})
    require(
        tables == list(range(len(tables))),
        f"--layers: value tables {tables} are not numbered 0, 1, 2, … without a gap",
    )
    require(
        config.vocab_size > START_TOKEN,
        f"--vocab_size {config.vocab_size} leaves out the start token: use at least {START_TOKEN + 1}",
    )
    for name, choices in (
        ("dtype", ("bfloat16", "float32")),
        ("compile", ("block", "full", "none")),
    ):
        value = getattr(config, name)
        require(value in choices, f"--{name} {value!r} is not one of {', '.join(choices)}")
    require(config.val_row_tokens % 16 == 0, "--val_row_tokens must be a multiple of 16")


# ==================================================================================================
# 2. Runtime and log
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
        text = f"step {step} train_loss {train_loss:.4f} train_time {train_time:.3f} s step {step_ms:.1f} ms"
        self.line(text, screen=False)

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
                f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} are visible. "
                "Start as many processes as GPUs (NPROC for run.sh, --nproc_per_node for torchrun)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch._dynamo.config.recompile_limit = 64  # one graph a kind of layer and row length
        # flash-attn-4 makes its compiler say this once a kernel; it concerns an argument we leave out
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
    """Stop glibc from giving large freed buffers back to the system: mapping the logits anew in every
    step costs several times what computing them does."""
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
# 3. Operations
# ==================================================================================================


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(num_positions: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (num_positions, 1, head_dim / 4) fp32: frequencies from 1 down to 1/1024."""
    frequencies = (1 / 1024) ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float64)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None, None] * frequencies
    return angles.cos().float().to(device), angles.sin().float().to(device)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent pairs in the first half of the head; the second half stays. x: (T, heads, head_dim)."""
    turned, still = x.chunk(2, dim=-1)
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return torch.cat([pairs.flatten(-2).type_as(x), still], dim=-1)


def attention_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest attention this device has: flash-attn-4, varlen (FlashAttention-2 in torch) or plain."""
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

    q, k, v: (T, heads, head_dim). cu_seqlens: int32 document starts, padded at the end with T, so that
    document i is cu_seqlens[i] to cu_seqlens[i + 1]. max_seq_len: no document is longer.
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
    """flash-attn-4 as one opaque op, so that full-graph compilation takes it. Also returns the row LSEs."""
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


def softcap(logits: Tensor) -> Tensor:
    """Logits between 0 and 23, fp32."""
    return 23 * torch.sigmoid((logits.float() + 5) / 7.5)


# ==================================================================================================
# 4. Model
# ==================================================================================================


class Batch(NamedTuple):
    """One row: whole documents packed behind one another."""

    tokens: Tensor  # (T,) int32
    targets: Tensor  # (T,) int64, the next tokens
    cu_seqlens: Tensor  # int32, fixed length: document starts, padded with T
    max_seq_len: int  # no document of the row is longer


class GPT(nn.Module):
    """Decoder-only transformer. Weights of one kind are stacked in a bank, so that the optimizer can share a
    whole kind out over the ranks at once; banks are padded with zeros to a multiple of the ranks."""

    def __init__(self, config: Config, runtime: Runtime):
        super().__init__()
        self.config = config
        dim, device, dtype = config.model_dim, runtime.device, getattr(torch, config.dtype)
        num_layers, vocab = len(config.layers), config.padded_vocab_size
        value_tables = {row.value_table for row in config.layers} - {None}
        self.num_value_tables = len(value_tables)
        # A multiple of 8 keeps the shapes the same on 1, 2, 4 and 8 ranks.
        shards = math.lcm(8, runtime.world_size)
        factory = {"device": device, "dtype": dtype}
        # q, k, v and o stacked in rows, one layer an entry
        self.attention_bank = nn.Parameter(
            torch.zeros(round_up(num_layers, shards), 4 * dim, dim, **factory)
        )
        # W_1 of every layer, then W_2 of every layer, both (mlp_dim, dim)
        self.mlp_bank = nn.Parameter(
            torch.zeros(round_up(2 * num_layers, shards), config.mlp_dim, dim, **factory)
        )
        # Embedding and head are one matrix.
        self.embed = nn.Parameter(torch.zeros(vocab, dim, **factory))
        # Value tables behind one another in one matrix
        self.value_embed = nn.Parameter(torch.zeros(self.num_value_tables * vocab, dim, **factory))
        self.value_gate = nn.Parameter(
            torch.zeros(self.num_value_tables, config.num_heads, 12, device=device)
        )
        self.init_weights()

        self.backend = attention_backend(device, dtype)
        stages = (*config.stages, *config.extension)
        longest_row = max(stage.tokens_per_step // config.rows_per_step for stage in stages)
        self.rotary = rotary_tables(
            max(longest_row, config.val_row_tokens), config.head_dim, device
        )
        compile = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        per_block = compile if config.compile == "block" else lambda function: function
        self.before_attention = per_block(before_attention)
        self.after_attention = per_block(after_attention)
        self.head_loss = per_block(head_loss)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Inputs of a block uniform with std 0.5/sqrt(dim), its output projections zero."""
        config = self.config
        generator = torch.Generator(self.embed.device).manual_seed(config.seed)
        bound = math.sqrt(3) * 0.5 / math.sqrt(config.model_dim)
        num_layers = len(config.layers)
        self.attention_bank[:num_layers, : 3 * config.model_dim].uniform_(
            -bound, bound, generator=generator
        )
        self.mlp_bank[:num_layers].uniform_(-bound, bound, generator=generator)
        self.embed.normal_(0, 0.005, generator=generator)
        self.value_embed.normal_(0, 0.01, generator=generator)

    def hidden(self, batch: Batch, window_short: int, window_long: int) -> Tensor:
        """The residual stream after the last layer, (T, dim)."""
        config = self.config
        num_layers = len(config.layers)
        windows = {"short": window_short, "long": window_long}
        cos, sin = (table[: batch.tokens.size(0)] for table in self.rotary)
        attention_weights = self.attention_bank.unbind(0)
        mlp_weights = self.mlp_bank.unbind(0)
        value_gates = self.value_gate.unbind(0)

        x = rms_norm(F.embedding(batch.tokens, self.embed))
        offsets = torch.arange(self.num_value_tables, device=x.device) * config.padded_vocab_size
        values = F.embedding(batch.tokens[:, None] + offsets, self.value_embed).unbind(1)
        for i, row in enumerate(config.layers):
            value, gate = None, None
            if row.value_table is not None:
                value, gate = values[row.value_table], value_gates[row.value_table]
            q, k, v = self.before_attention(
                x, attention_weights[i], value, gate, cos, sin, config.head_dim
            )
            y = attention(
                q,
                k,
                v,
                batch.cu_seqlens,
                batch.max_seq_len,
                windows[row.window],
                config.attention_scale,
                self.backend,
            )
            x = self.after_attention(
                x, y, attention_weights[i], mlp_weights[i], mlp_weights[num_layers + i]
            )
        return x

    def forward(self, batch: Batch, window_short: int, window_long: int) -> Tensor:
        """Sum over the row of the next-token cross-entropies in nats, fp32 scalar."""
        return self.head_loss(
            self.hidden(batch, window_short, window_long), self.embed, batch.targets
        )


def before_attention(
    x: Tensor,
    weights: Tensor,
    value: Tensor | None,
    gate: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the residual stream (T, dim) to queries, keys and values, (T, heads, head_dim) each."""
    dim = x.size(1)
    x = rms_norm(x)
    q, k, v = F.linear(x, weights[: 3 * dim]).view(x.size(0), 3, -1, head_dim).unbind(1)
    q, k = (apply_rotary(rms_norm(heads), cos, sin) for heads in (q, k))
    if value is not None:
        share = 2 * torch.sigmoid(
            F.linear(torch.cat([x[:, :6], value[:, :6]], dim=1), gate.type_as(x))
        )
        v = v + share[:, :, None] * value.view_as(v)
    return q, k, v


def after_attention(x: Tensor, y: Tensor, weights: Tensor, w_1: Tensor, w_2: Tensor) -> Tensor:
    """Add the attention output y (T, heads, head_dim) and the ReLU² MLP to the residual stream."""
    dim = x.size(1)
    x = x + F.linear(y.reshape(-1, dim), weights[3 * dim :])
    return x + F.linear(rms_norm(x), w_1).relu().square() @ w_2


def head_loss(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of the softcapped logits; x (T, dim), head (vocab, dim), targets (T,)."""
    logits = softcap(F.linear(rms_norm(x), head))
    return F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="sum")


# ==================================================================================================
# 5. Optimizer
# ==================================================================================================


@dataclass(frozen=True)
class ParamGroup:
    """How one parameter is updated."""

    name: str  # of the parameter in GPT
    rule: str  # normuon or adam
    sharded: (
        bool  # each rank updates its rows and sends them round; otherwise every rank updates all
    )
    every: int  # steps whose gradients make one update
    lr: float = 1.0  # multiplier of muon_lr or adam_lr
    weight_decay: float = 1.0  # multiplier
    betas: tuple[float, float] = (0.9, 0.99)  # Adam only


# fmt: off
PARAM_GROUPS = (  # in the order in which their gradients start to travel; updates finish in the reverse order
    #          name              rule       sharded  every  lr    weight_decay  betas
    ParamGroup("value_embed",    "adam",    True,    2,     75.0,   5.0,        (0.75, 0.95)),
    ParamGroup("mlp_bank",       "normuon", True,    1),
    ParamGroup("embed",          "adam",    True,    2,      1.0, 150.0,        (0.50, 0.95)),
    ParamGroup("attention_bank", "normuon", True,    1),
    ParamGroup("value_gate",     "adam",    False,   2,      1.0,   1.0,        (0.90, 0.99)),
)

POLAR_EXPRESS = (  # (a, b, c) of X <- aX + (bA + cA²)X with A = XXᵀ; Amsel et al. 2025, arXiv 2505.16932
    (8.1566, -22.4833, 15.8788),
    (4.0429,  -2.8089,  0.5000),
    (3.8917,  -2.7725,  0.5061),
    (3.2858,  -2.3681,  0.4645),
    (2.3465,  -1.7098,  0.4232),
)
# fmt: on


def polar_express(x: Tensor) -> Tensor:
    """Nearly the polar factor UVᵀ of each matrix of x = USVᵀ, (batch, rows, cols), in the dtype of x."""
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
    """Orthogonalised Nesterov momentum with evened-out rows; updates `momentum` and `mean_square` in place.

    grad: (batch, rows, cols); momentum: the same, fp32; mean_square: fp32, (batch, rows, 1), or
    (batch, 1, cols) for wide matrices. Source: NorMuon, Li et al. 2025, arXiv 2510.05491, algorithm 1.
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
    """The fp32 weights whose upper 16 bits are the bf16 `high` and whose lower 16 bits are the int16 `low`."""
    if low is None:
        return high.float()
    return ((high.view(torch.int16).int() << 16) | (low.int() & 0xFFFF)).view(torch.float32)


def split_mantissa_(high: Tensor, low: Tensor | None, weights: Tensor) -> None:
    """Store fp32 weights in place as `high` and `low`: an update loses no bit though the model reads bf16."""
    if low is None:
        high.copy_(weights)
    else:
        bits = weights.view(torch.int32)
        high.copy_((bits >> 16).short().view(torch.bfloat16))
        low.copy_(bits.short())  # keeps the lower 16 bits


def apply_update_(
    high: Tensor, low: Tensor | None, direction: Tensor, lr: Tensor, decay: Tensor
) -> None:
    """weights -= lr·direction, and decay·weights where the direction shrinks them anyway (cautious decay)."""
    weights = join_mantissa(high, low)
    shrinks = direction * weights > 0
    split_mantissa_(high, low, weights - lr * direction - decay * weights * shrinks)


def adam_update_(
    high: Tensor,
    low: Tensor | None,
    grad: Tensor,
    mean: Tensor,
    mean_square: Tensor,
    betas: tuple[float, float],
    corrections: tuple[Tensor, Tensor],
    eps: float,
    lr: Tensor,
    decay: Tensor,
) -> None:
    """One Adam step in place. corrections: 1 - beta**t for both moments (Kingma & Ba 2015, algorithm 1)."""
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
                f"{group.name} has {param.size(0)} rows, which {self.num_shards} processes cannot share evenly: "
                "start a number of processes that divides them"
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
        self.blocks: list[
            tuple[slice, int]
        ] = []  # NorMuon: rows of a bank entry, rows of a matrix in them
        if group.rule == "adam":
            self.mean_squares = [torch.zeros_like(self.mean)]
            return
        dim, (entries, height, width) = config.model_dim, self.shard.shape
        if group.name == "attention_bank":  # q and k in pairs of heads, v and o whole
            self.blocks = [(slice(0, 2 * dim), 2 * config.head_dim), (slice(2 * dim, 4 * dim), dim)]
            lr_scales = torch.ones(entries)
        else:  # W_1 as it is, W_2 with twice the step
            self.blocks = [(slice(0, height), height)]
            index = torch.arange(entries) + self.rank * entries
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

    A step reduce-scatters the gradients of a sharded parameter, updates this rank's rows and all-gathers the
    new rows; small parameters are all-reduced and updated everywhere. All collectives are asynchronous.
    """

    def __init__(self, model: GPT, config: Config, runtime: Runtime):
        self.config, self.runtime = config, runtime
        params = dict(model.named_parameters())
        assert params.keys() == {group.name for group in PARAM_GROUPS}, (
            "PARAM_GROUPS and GPT disagree"
        )
        self.states = [
            ParamState(group, params[group.name], config, runtime)
            for group in PARAM_GROUPS
            if params[group.name].numel() > 0
        ]
        compiles = config.compile != "none"
        compile = (
            functools.partial(torch.compile, fullgraph=True, dynamic=False)
            if compiles
            else lambda f: f
        )
        self.adam_update_, self.apply_update_ = compile(adam_update_), compile(apply_update_)

    def tensors(self) -> list[Tensor]:
        """Every tensor a step changes, the parameters left out."""
        return [tensor for state in self.states for tensor in state.tensors()]

    @torch.no_grad()
    def step(self, step: int, lr_scale: float, momentum: float) -> None:
        """Update with the gradients in .grad, summed over ranks here. Parameters with every = 2 keep theirs on
        even steps and are updated on odd ones."""
        due = [state for state in self.states if (step + 1) % state.group.every == 0]
        reductions = [self._launch_reduction(state) for state in due]
        gathers = []
        for state, (grad, work) in reversed(list(zip(due, reductions))):
            if work is not None:
                work.wait()
            self._update(state, grad, step, lr_scale, momentum)
            state.param.grad = None
            if state.num_shards > 1:
                gathers.append(
                    dist.all_gather_into_tensor(state.param.detach(), state.shard, async_op=True)
                )
        for work in gathers:
            work.wait()

    def _launch_reduction(self, state: ParamState) -> tuple[Tensor, dist.Work | None]:
        grad = state.param.grad
        if self.runtime.world_size == 1:
            return grad, None
        if state.num_shards == 1:
            return grad, dist.all_reduce(grad, async_op=True)
        shard = torch.empty_like(state.shard)
        return shard, dist.reduce_scatter_tensor(shard, grad.contiguous(), async_op=True)

    def _update(
        self, state: ParamState, grad: Tensor, step: int, lr_scale: float, momentum: float
    ) -> None:
        config, group = self.config, state.group
        if group.rule == "adam":
            lr = config.adam_lr * group.lr * lr_scale
            decay = lr * lr * config.adam_weight_decay * group.weight_decay
            updates = (step + 1) // group.every
            corrections = tuple(torch.tensor(1 - beta**updates) for beta in group.betas)
            self.adam_update_(
                state.shard,
                state.low,
                grad,
                state.mean,
                state.mean_squares[0],
                group.betas,
                corrections,
                config.adam_eps,
                torch.tensor(lr),
                torch.tensor(decay),
            )
            return
        lr = config.muon_lr * group.lr * lr_scale
        decay = lr * lr * config.muon_weight_decay * group.weight_decay
        direction = torch.empty_like(state.mean)
        for (rows, matrix_rows), mean_square in zip(state.blocks, state.mean_squares):
            matrices = (-1, matrix_rows, grad.size(2))
            part = state.mean[:, rows].reshape(
                matrices
            )  # a copy where a bank entry has several kinds of block
            direction[:, rows] = normuon_direction(
                grad[:, rows].reshape(matrices), part, mean_square, momentum, config.muon_beta2
            ).view_as(state.mean[:, rows])
            state.mean[:, rows] = part.view_as(state.mean[:, rows])
        direction *= state.lr_scales
        self.apply_update_(state.shard, state.low, direction, torch.tensor(lr), torch.tensor(decay))


@contextlib.contextmanager
def nothing_changes(model: GPT, optimizer: Optimizer) -> Iterator[None]:
    """Put every weight and optimizer state back, bit for bit, and drop the gradients at the end."""
    tensors = [param.detach() for param in model.parameters()] + optimizer.tensors()
    copies = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, copy in zip(tensors, copies):
            tensor.copy_(copy)
        model.zero_grad(set_to_none=True)


# ==================================================================================================
# 6. Data
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
            f"{path}: token {tokens[index]} at position {index} is outside the vocabulary of {vocab_size}: "
            "it needs GPT-2 tokens (data/tokenize_text.py makes them)"
        )
    return tokens


def find_files(option: str, pattern: str) -> list[str]:
    files = sorted(glob.glob(pattern))
    if not files:
        raise UserError(
            f"{option} {pattern}: no such file. Fetch FineWeb with data/cached_fineweb.py, make shards from text "
            "with data/tokenize_text.py, or the built-in sample with data/sample.py"
        )
    return files


class TokenStream:
    """The training shards as one stream of documents, read once, in order.

    Each row is a run of whole documents, cut at max_seq_len; the last one is cut so that the row holds exactly
    T + 1 tokens: T inputs and their next tokens. The next row begins with the next document. While one shard is
    used, the next one is loaded and its start tokens are found in the background.
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
        """The documents of the next row, `num_tokens` + 1 tokens in all, as views. UserError at the end."""
        while True:
            ends = self.starts[1 : num_tokens + 2]
            if (
                self.pending is None and len(ends) < num_tokens + 1
            ):  # the last document ends with the stream
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
    """A row of T + 1 tokens and the positions where its documents start, as tensors ready to be copied."""
    num_tokens = len(tokens) - 1
    length = num_tokens // min_mean_doc_len + 2
    starts = starts[starts < num_tokens]
    if len(starts) >= length:
        raise UserError(
            f"a row of {num_tokens} tokens holds {len(starts)} documents, more than the {length - 1} that "
            f"cu_seqlens has room for: set --min_mean_doc_len below {min_mean_doc_len}"
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
    """This rank's rows. shapes: (tokens, max_seq_len) of every micro-step; the ranks take consecutive rows."""
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


def check_data(config: Config, tokens_needed: int) -> int:
    """Look at every header before anything else happens; returns the number of targets validation scores."""
    total = sum(read_shard_header(path) for path in find_files("--train_files", config.train_files))
    if total <= tokens_needed and not config.repeat_data:
        raise UserError(
            f"--train_files {config.train_files}: {total} tokens, but the schedule reads at least {tokens_needed}: "
            "add shards (data/cached_fineweb.py), lower --num_steps, or pass --repeat_data true"
        )
    path = find_files("--val_file", config.val_file)[0]
    available = read_shard_header(path) - 1
    if available < 1:
        raise UserError(f"{path}: too short to validate on: make a longer one")
    return min(config.val_tokens, available)


def validation_rows(
    config: Config, rank: int, world_size: int, num_targets: int
) -> Iterator[Batch]:
    """This rank's rows of the validation stream as it is: every target once, documents masked apart."""
    path = find_files("--val_file", config.val_file)[0]
    tokens = read_tokens(path, num_targets + 1, config.vocab_size)
    size = config.val_row_tokens
    for index in range(rank, -(-num_targets // size), world_size):
        row = tokens[index * size : (index + 1) * size + 1]
        real = len(row) - 1
        row = np.concatenate(
            [row, np.full(size - real, START_TOKEN, dtype=row.dtype)]
        )  # pads the last row
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
# 7. Schedule
# ==================================================================================================


@dataclass(frozen=True)
class StepPlan:
    """What one step does."""

    stage: Stage
    lr_scale: float
    momentum: float


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
        """The stage's multiplier, falling linearly to lr_end from lr_decay_start of num_steps on."""
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
        return StepPlan(self.stage(step), self.lr_scale(step), self.momentum(step))

    def row_tokens(self, step: int) -> int:
        return self.stage(step).tokens_per_step // self.config.rows_per_step

    def tokens_needed(self) -> int:
        return sum(self.stage(step).tokens_per_step for step in range(self.end_step))


# ==================================================================================================
# 8. Train and validate
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

    The loss of a step is copied to pinned memory behind the step's own work; it is read a few steps later,
    which also keeps the host from running further ahead than that.
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
                f"the training loss is {value} at step {step + 1} (rank {self.runtime.rank}): lower --muon_lr or "
                "--adam_lr, or check the data of --train_files"
            )
        step_ms, self.last_time = 1000 * (now - self.last_time), now
        self.runtime.log.step(step + 1, value, now, step_ms)
        self.bar.set_postfix_str(
            f"loss {value:.3f} · {1000 * now / (step + 1):.1f} ms/step", refresh=False
        )
        self.bar.update()


def prepare(
    forward: Callable, model: GPT, optimizer: Optimizer, schedule: Schedule, runtime: Runtime
) -> None:
    """Compile and warm up on every shape of the run with random tokens, then put everything back."""
    config, begin = model.config, time.perf_counter()
    plans = {schedule.row_tokens(step): schedule[step] for step in range(schedule.end_step)}
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
        for num_tokens, plan in plans.items():
            for step in range(2):  # an even and an odd one, so that every update runs
                batch = random_batch(num_tokens, plan.stage.max_seq_len)
                (
                    forward(batch, plan.stage.window_short, plan.stage.window_long) / num_tokens
                ).backward()
                optimizer.step(step, plan.lr_scale, plan.momentum)
            report(f"training rows of {num_tokens:,} tokens")
        with torch.no_grad():
            stage = schedule.stage(schedule.end_step)
            batch = random_batch(config.val_row_tokens, config.val_row_tokens)
            forward(batch, stage.window_short, stage.window_long)
        report(f"validation rows of {config.val_row_tokens:,} tokens")


@torch.no_grad()
def validate(
    forward: Callable,
    config: Config,
    runtime: Runtime,
    num_targets: int,
    window_short: int,
    window_long: int,
) -> float:
    """Mean cross-entropy in nats over the first `num_targets` targets of the validation file."""
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for batch in validation_rows(config, runtime.rank, runtime.world_size, num_targets):
        total += forward(to_device(batch, runtime.device), window_short, window_long)
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
    log.line(
        f"{runtime.world_size} x {environment['devices']}, torch {environment['torch']}, log {log.path}"
    )
    if num_targets < config.val_tokens:
        log.line(
            f"validation scores {num_targets:,} targets, all that --val_file has, not {config.val_tokens:,}"
        )

    begin = time.perf_counter()
    model = GPT(config, runtime)
    optimizer = Optimizer(model, config, runtime)
    millions = sum(param.numel() for param in model.parameters()) / 1e6
    log.line(
        f"{millions:.1f} M parameters, {len(config.layers)} layers, attention by {model.backend}"
    )
    forward = (
        torch.compile(model, fullgraph=True, dynamic=False) if config.compile == "full" else model
    )
    prepare(forward, model, optimizer, schedule, runtime)
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
        windows = plan.stage.window_short, plan.stage.window_long
        train_loss = torch.zeros((), device=runtime.device)
        for _ in range(grad_accum_steps):
            batch = to_device(next(rows), runtime.device)
            loss = forward(batch, *windows)
            (
                loss / config.rows_per_step
            ).backward()  # summed over tokens, averaged over ranks and micro-steps
            train_loss += loss.detach() / (batch.tokens.numel() * grad_accum_steps)
        optimizer.step(step, plan.lr_scale, plan.momentum)
        progress.launched(step, train_loss)

        done = step + 1
        if done == schedule.end_step or (config.val_every and done % config.val_every == 0):
            clock.stop()
            progress.drain()
            if done == schedule.total_steps:
                windows = windows[0], config.final_window_long
            val_loss = validate(forward, config, runtime, num_targets, *windows)
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
        f"trained {clock.total:.2f} s, {1000 * clock.total / done:.1f} ms a step, {tokens_per_second:,.0f} "
        f"tokens/s, after {preparation:.0f} s of preparation; peak memory {peak:.1f} GiB a process"
    )
    if runtime.is_main:
        log.line(f"log {log.path}, curve {draw_curve(log)}")
    if config.checkpoint:
        save_checkpoint(model, config, runtime)


def peak_memory(runtime: Runtime) -> float:
    """GiB: the most that any rank's allocator held on its GPU, or any process resident on the CPU."""
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
    for step, loss in zip(val_steps, val_losses):
        axes.annotate(
            f"{loss:.3f}", (step, loss), xytext=(0, 8), textcoords="offset points", ha="center"
        )
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
    context = len(model.rotary[0])
    while len(tokens) < prompt_length + config.sample_tokens:
        row = torch.tensor(tokens[-context:], dtype=torch.int32, device=runtime.device)
        ends = torch.tensor([0, len(row)], dtype=torch.int32, device=runtime.device)
        stage = trained.extension[0]
        x = model.hidden(
            Batch(row, row.long(), ends, len(row)), stage.window_short, trained.final_window_long
        )
        logits = softcap(F.linear(rms_norm(x[-1]), model.embed))[: trained.vocab_size]
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
# 9. Command line
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
    """Config from the command line; exits with code 2 and a message on what cannot be understood."""

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
        epilog="Tables are rows of colon-separated fields with commas between the rows: --stages "
        "1/2:131072:896:128:384:1.0,1/2:262144:2048:384:896:1.5 --layers short:none,long:0",
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
