"""Train a fixed GPT to a validation loss of 3.28 on FineWeb in the fewest optimizer steps.

Track:     model, data and batch are fixed, wall clock is free. A submission replaces section 1 and
           nothing else; README.md in this folder has the rules and the table.
Launch:    ./run.sh optimization [NAME] [--option value ...], or by itself
           torchrun --nproc_per_node=8 train_gpt_simple.py [--option value ...], 1 to 8 GPUs.
Lineage:   task, model and the numbers of the Muon baseline: modded-nanogpt's optimization track.
"""

import argparse
import contextlib
import dataclasses
import glob
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

SOURCE = Path(__file__).read_text(encoding="utf-8")  # as it runs: the file may change later
# --- 1. Optimizer ---------------------------------------------------------------------------------
# What a submission gives: NUM_STEPS, the length of the run by preset; initialize(model), the first
# weights; and Optimizer, whose step() updates the parameters from their gradients. These are means
# over the whole batch on every rank, so every rank computes the same update. The parameters:
#   embedding.weight (50304, 768), bf16     head.weight (50304, 768), fp32 like all that follow
#   blocks.N.{q, k, v, out}.weight (768, 768), blocks.N.up.weight (3072, 768): (outputs, inputs)
#   blocks.N.down.weight (768, 3072)        every .bias, and the .weight of every norm: vectors
# --- begin of the Optimizer section ---------------------------------------------------------------
# Muon for the matrices of the blocks (Jordan et al. 2024), AdamW for all else (Loshchilov and
# Hutter 2019, arXiv:1711.05101), with the values of the track's tuned baseline.

NUM_STEPS = {"speedrun": 3250, "proxy": 1000, "tiny": 120}
COOLDOWN = 0.7  # share of the steps over which the learning rates fall linearly to 0
MUON_LR, MUON_MOMENTUM, MUON_WEIGHT_DECAY = 0.025, 0.95, 0.05
ADAM_BETAS, ADAM_EPS, ADAM_WEIGHT_DECAY = (0.8, 0.95), 1e-10, 0.001
EMBEDDING_LR, HEAD_LR, VECTOR_LR = 0.7, 0.004, 0.015  # AdamW


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """The weights before the first step. torch's generator already has the seed of the run."""
    stds = {"embedding.weight": 1.0, "head.weight": 0.005}
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):
            param.fill_(1)
        elif name.endswith((".bias", ".out.weight", ".down.weight")):
            param.zero_()  # so that a block starts as the identity
        else:  # embedding, head, q, k, v, up
            param.normal_(std=stds.get(name, 0.5 / math.sqrt(param.size(1))))


def orthogonalize(x: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix: U Vᵀ where x = U S Vᵀ.

    Twelve Newton-Schulz steps take every singular value s to 2s - 1.5s³ + 0.5s⁵, which doubles a
    small one and has a fixed point of zero slope at 1.
    """
    y = x / (x.norm() + 1e-7)  # no singular value above 1
    y = y.bfloat16() if y.is_cuda else y
    y = y.mT if x.size(0) > x.size(1) else y  # the smaller side first
    for _ in range(12):
        a = y @ y.mT
        y = 2 * y + (0.5 * a @ a - 1.5 * a) @ y
    return (y.mT if x.size(0) > x.size(1) else y).type_as(x)


class Muon:
    """Nesterov momentum, orthogonalised, for one matrix."""

    def __init__(self, param: nn.Parameter):
        self.param, self.momentum = param, torch.zeros_like(param)

    def step(self, step: int, lr_factor: float) -> None:
        lr, grad = lr_factor * MUON_LR, self.param.grad
        self.momentum.lerp_(grad, 1 - MUON_MOMENTUM)
        update = orthogonalize(grad.lerp(self.momentum, MUON_MOMENTUM))
        rows, columns = update.shape
        self.param.mul_(1 - lr * MUON_WEIGHT_DECAY)
        self.param.sub_(lr * math.sqrt(max(1, rows / columns)) * update)


class AdamW:
    """AdamW for one parameter, in fp32 whatever its dtype is."""

    def __init__(self, param: nn.Parameter, lr: float):
        self.param, self.lr = param, lr
        self.mean = torch.zeros_like(param, dtype=torch.float32)
        self.mean_square = torch.zeros_like(self.mean)

    def step(self, step: int, lr_factor: float) -> None:
        lr, grad = lr_factor * self.lr, self.param.grad.float()
        self.mean.lerp_(grad, 1 - ADAM_BETAS[0])
        self.mean_square.lerp_(grad.square(), 1 - ADAM_BETAS[1])
        mean = self.mean / (1 - ADAM_BETAS[0] ** (step + 1))
        mean_square = self.mean_square / (1 - ADAM_BETAS[1] ** (step + 1))
        decayed = (1 - lr * ADAM_WEIGHT_DECAY) * self.param.float()
        self.param.copy_(decayed - lr * mean / (mean_square.sqrt() + ADAM_EPS))


class Optimizer:
    def __init__(self, model: nn.Module, num_steps: int):
        lrs = {"embedding.weight": EMBEDDING_LR, "head.weight": HEAD_LR}
        self.num_steps, self.rules = num_steps, []
        for name, param in model.named_parameters():
            is_hidden = name.startswith("blocks.") and param.ndim == 2
            self.rules.append(Muon(param) if is_hidden else AdamW(param, lrs.get(name, VECTOR_LR)))

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update all parameters; step counts from 0."""
        lr_factor = min(1.0, (self.num_steps - step) / (COOLDOWN * self.num_steps))
        for rule in self.rules:
            rule.step(step, lr_factor)

    def validation_weights(self) -> contextlib.AbstractContextManager:
        """Inside this context the model has the weights to validate: here the current ones."""
        return contextlib.nullcontext()


# --- end of the Optimizer section -----------------------------------------------------------------
# --- 2. Config ------------------------------------------------------------------------------------
def option(default: object, text: str) -> object:
    """A field of Config, explained by --help in these words."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on besides section 1. Every field is an option."""

    # Fixed by the rules: a run in which they are not those of its preset is no submission.
    layers: int = option(12, "blocks of attention and MLP")
    model_dim: int = option(768, "width of the model; the MLP is four times as wide")
    head_dim: int = option(128, "width of an attention head")
    vocab_size: int = option(50_304, "token ids are below this")
    sequence_tokens: int = option(1024, "tokens of a sequence")
    sequences_per_step: int = option(512, "sequences of an optimizer step, over all GPUs")
    dtype: str = option("bfloat16", "of the embedding and the activations: bfloat16 or float32")
    val_tokens: int = option(10_485_760, "targets scored, from the start of --val_file")
    # Free
    num_steps: int = option(NUM_STEPS["speedrun"], "optimizer steps, chosen by the submission")
    seed: int = option(1, "of the first weights")
    train_files: str = option("data/fineweb10B/fineweb_train_*.bin", "shards, a glob pattern")
    val_file: str = option("data/fineweb10B/fineweb_val_000000.bin", "validation shard")
    val_every: int = option(25, "steps between the last ten validations; ten times as many before")
    micro_batch_tokens: int = option(32_768, "tokens of a pass on a GPU; fewer take less memory")
    log_dir: str = option("logs", "where <run id>.txt, .json and .png go")
    checkpoint: str = option("", "file for the validated weights at the end")


PRESETS = {  # proxy: the race in minutes on one GPU; tiny: shows on a CPU that all works
    "speedrun": Config(),
    "proxy": Config(layers=8, model_dim=512, sequences_per_step=128, num_steps=NUM_STEPS["proxy"]),
    "tiny": Config(
        layers=2, model_dim=64, head_dim=16, sequence_tokens=64, sequences_per_step=4,
        dtype="float32", val_tokens=4096, num_steps=NUM_STEPS["tiny"], micro_batch_tokens=256,
        train_files="data/sample/sample_train_*.bin", val_file="data/sample/sample_val_*.bin",
    ),
}  # fmt: skip


class UserError(Exception):
    """Something the user can fix. The message names the file or option and the remedy."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check_config(c: Config, world_size: int) -> None:
    """Raise UserError for values that cannot work, alone or together."""
    for name, value in vars(c).items():
        least = 0 if name == "seed" else 1
        fits = not isinstance(value, int) or least <= value < 2**63
        require(fits, f"--{name} {value}: give a number from {least} up")
    require(c.dtype in ("bfloat16", "float32"), f"--dtype {c.dtype}: give bfloat16 or float32")
    fits = c.head_dim % 4 == 0 and c.model_dim % c.head_dim == 0
    require(fits, f"--head_dim {c.head_dim}: give a multiple of 4 that divides --model_dim")
    count, length, size = c.sequences_per_step, c.sequence_tokens, c.micro_batch_tokens
    require(count % world_size == 0, f"--sequences_per_step {count}: not for {world_size} ranks")
    part = count * length // world_size  # tokens of a step on a GPU
    fits = size % length == 0 and part % min(size, part) == 0
    require(fits, f"--micro_batch_tokens {size}: give a multiple of {length} that divides {part}")
    fits = Path(c.checkpoint).parent.is_dir() and not os.path.isdir(c.checkpoint)
    require(fits, f"--checkpoint {c.checkpoint}: give a file in a folder that exists")


# --- 3. Model, in shapes of B sequences of T tokens, H heads of D dimensions, width C = H D -------
IGNORED_TARGET = -1  # a target that is not scored: padding behind the last validation token


class Batch(NamedTuple):
    tokens: Tensor  # (B T,) int64, whole sequences behind one another
    targets: Tensor  # (B T,) int64, the next tokens


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.type_as(x), self.bias.type_as(x))  # fp32 parameters


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:  # x / sqrt(mean(x²)) times a gain
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), eps=1e-6)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first half of each head. x: (B, H, T, D); cos, sin: (T, D / 4)."""
    quarter = cos.size(-1)
    a, b, unrotated = x.split([quarter, quarter, 2 * quarter], dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, unrotated], dim=-1)


class Block(nn.Module):
    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.attention_norm, self.mlp_norm = RMSNorm(dim), RMSNorm(dim)
        self.q, self.k, self.v, self.out = (Linear(dim, dim) for _ in range(4))
        self.q_norm, self.k_norm = RMSNorm(head_dim), RMSNorm(head_dim)
        self.up, self.down = Linear(dim, 4 * dim), Linear(4 * dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)  # (B, T, H, D)
        y = self.attention_norm(x)
        q, k, v = (part(y).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.12)
        x = x + self.out(y.transpose(1, 2).flatten(-2))  # (B, T, C)
        return x + self.down(F.relu(self.up(self.mlp_norm(x))).square())


class GPT(nn.Module):
    def __init__(self, config: Config, runtime: "Runtime"):
        super().__init__()
        dim, dtype = config.model_dim, getattr(torch, config.dtype)
        self.length = config.sequence_tokens
        self.embedding = nn.Embedding(config.vocab_size, dim, dtype=dtype)
        self.embedding_norm, self.head_norm = RMSNorm(dim), RMSNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, config.head_dim) for _ in range(config.layers))
        self.head = Linear(dim, config.vocab_size)
        # D / 4 frequencies, geometric from 1 to 1 / 1024 radians a position
        frequencies = (1 / 1024) ** torch.linspace(0, 1, config.head_dim // 4)
        angles = torch.outer(torch.arange(self.length), frequencies)  # (T, D / 4)
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)
        self.to(runtime.device)

    def logits(self, tokens: Tensor) -> Tensor:
        """Of the next token, for each of (B T,) tokens: (B T, vocabulary), fp32, from -15 to 15."""
        x = self.embedding_norm(self.embedding(tokens.view(-1, self.length)))  # (B, T, C)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        z = self.head(self.head_norm(x)).float().flatten(0, 1)
        return 15 * z * torch.rsqrt(z.square() + 15**2)

    def forward(self, batch: Batch) -> Tensor:
        """Cross-entropy of all targets in nats, their sum and not their mean, fp32."""
        logits, targets = self.logits(batch.tokens), batch.targets
        return F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="sum")


# --- 4. Data --------------------------------------------------------------------------------------
class Tokens:
    """Shards as one stream. A shard is 256 int32 (magic 20240520, version 1, number of tokens, and
    zeros), then the tokens as uint16."""

    def __init__(self, name: str, pattern: str, vocab_size: int):
        self.vocab_size, self.paths, self.shards = vocab_size, sorted(glob.glob(pattern)), []
        require(len(self.paths) > 0, f"--{name} {pattern}: no such file: give the path of shards")
        for path in self.paths:
            header = np.fromfile(path, dtype="<i4", count=256).tolist()
            fits = header[:3] == [20240520, 1, (os.path.getsize(path) - 1024) / 2] and header[2] > 0
            require(fits, f"{path}: no whole shard of tokens: get it again, or leave it out")
            self.shards.append(np.memmap(path, dtype="<u2", mode="r", offset=1024))
        self.size = sum(map(len, self.shards))

    def read(self, begin: int, end: int) -> Tensor:
        """Tokens begin to end - 1 of the stream, int64."""
        parts = []
        for path, shard in zip(self.paths, self.shards):
            part = shard[max(begin, 0) : max(end, 0)]
            known = part.max(initial=0) < self.vocab_size
            require(known, f"{path}: has tokens outside the vocabulary of {self.vocab_size}")
            parts.append(part)
            begin, end = begin - len(shard), end - len(shard)
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def batches(self, begin: int, end: int, size: int, stride: int) -> Iterator[Batch]:
        """Batches of `size` targets, the first of them the target of token `begin`, and then every
        `stride` tokens; targets from that of token `end` on are ignored."""
        for first in range(begin, end, stride):
            tokens = self.read(first, min(first + size, end) + 1)
            padding = (0, size + 1 - len(tokens))
            targets = F.pad(tokens[1:], padding, value=IGNORED_TARGET)
            yield Batch(F.pad(tokens[:-1], padding), targets)


# --- 5. Training ----------------------------------------------------------------------------------
@dataclasses.dataclass
class Runtime:
    rank: int  # of this process
    world_size: int
    device: torch.device
    log: "Log"

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor)  # to the sum over the ranks, in place
        return tensor


def start_runtime(config: Config) -> Runtime:
    """Join the processes that torchrun started, and choose this one's device."""
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_config(config, world_size)
    device, count = torch.device("cpu"), torch.cuda.device_count()
    if count > 0:
        require(local_rank < count, f"start at most {count} processes here, one for each GPU")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if count > 0 else "gloo")
    return Runtime(rank, world_size, device, Log(config.log_dir if rank == 0 else None))


@torch.no_grad()
def validate(model: nn.Module, config: Config, runtime: Runtime, num_targets: int) -> float:
    """Mean cross-entropy in nats of the first num_targets targets of the validation file."""
    c, data = config, Tokens("val_file", config.val_file, config.vocab_size)
    size = min(c.micro_batch_tokens, c.sequences_per_step * c.sequence_tokens // runtime.world_size)
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for batch in data.batches(runtime.rank * size, num_targets, size, runtime.world_size * size):
        total += model(Batch(*(x.to(runtime.device) for x in batch)))
    return runtime.all_reduce(total).item() / num_targets


def train(config: Config, runtime: Runtime) -> None:
    log, device, seconds = runtime.log, runtime.device, 0.0
    data = Tokens("train_files", config.train_files, config.vocab_size)
    step_tokens = config.sequences_per_step * config.sequence_tokens
    found = f"--train_files {config.train_files}: {data.size:,} tokens are too few"
    require(config.num_steps * step_tokens < data.size, f"{found}: add shards or lower --num_steps")
    val_size = Tokens("val_file", config.val_file, config.vocab_size).size
    num_targets = min(config.val_tokens, val_size - 1)
    log.begin(config, runtime)

    torch.manual_seed(config.seed)
    model = GPT(config, runtime)
    initialize(model)
    optimizer = Optimizer(model, config.num_steps)
    fast_model = torch.compile(model, dynamic=False) if device.type == "cuda" else model

    part = step_tokens // runtime.world_size  # tokens of a step on this rank
    size = min(config.micro_batch_tokens, part)
    for step in range(1, config.num_steps + 1):
        started, loss = time.perf_counter(), torch.zeros((), device=device)
        begin = (step - 1) * step_tokens + runtime.rank * part
        for batch in data.batches(begin, begin + part, size, size):
            # the mean over the step is the sum of these over micro-batches and ranks
            term = fast_model(Batch(*(x.to(device) for x in batch))) / step_tokens
            term.backward()
            loss += term.detach()
        for param in model.parameters():
            runtime.all_reduce(param.grad)
        optimizer.step(step - 1)
        model.zero_grad()
        train_loss = runtime.all_reduce(loss).item()  # waits for the GPU
        seconds += time.perf_counter() - started
        log.loss("steps", step, train_loss, seconds)

        every = config.val_every * (1 if step > config.num_steps - 10 * config.val_every else 10)
        if step % every == 0 or step == config.num_steps:
            with optimizer.validation_weights():
                val_loss = validate(fast_model, config, runtime, num_targets)
            log.loss("validations", step, val_loss, seconds)

    log.end(num_targets)  # first, as it has what took long
    if config.checkpoint and runtime.rank == 0:
        head = data.read(0, 100_000)
        are_bytes = ((head < 256) | (head == 50_256)).all().item()  # then prompts are bytes too
        with optimizer.validation_weights():
            saved = {"config": vars(config), "byte_tokens": are_bytes}
            torch.save(saved | {"weights": model.state_dict()}, config.checkpoint)


# --- 6. Log ---------------------------------------------------------------------------------------
class Log:
    """Writes <run id>.txt line by line, .json and .png at the end; nothing where folder is None."""

    def __init__(self, folder: str | None):
        run_id = f"{datetime.now(UTC):%Y-%m-%d_%H%M%S_%f}"
        self.path, self.data = None, {"run_id": run_id, "steps": [], "validations": []}
        if folder is not None:
            self.path = Path(folder, f"{run_id}.txt")
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def line(self, text: str, screen: bool = True) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
            if screen:
                print(text, flush=True)

    def begin(self, config: Config, runtime: Runtime) -> None:
        """The whole script, the environment and the config."""
        on_gpu = runtime.device.type == "cuda"
        environment = {
            "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S %z}",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if on_gpu else None,
            "devices": torch.cuda.get_device_name() if on_gpu else f"CPU {platform.machine()}",
            "world_size": runtime.world_size,
        }
        # for the tools: a table of one stage, which is the whole run, and no extension
        row = f"1:{config.sequences_per_step * config.sequence_tokens}"
        more = {"track": "optimization", "stages": row, "extension": row, "extension_steps": "0"}
        tables = {"environment": environment, "config": config_as_text(config) | more}
        self.data |= tables
        self.line(SOURCE + "=" * 100, screen=False)
        self.line(json.dumps(tables, indent=1), screen=False)

    def loss(self, table: str, step: int, loss: float, seconds: float) -> None:
        """Behind a step: table is steps or validations, seconds are those of training so far."""
        name = {"steps": "train_loss", "validations": "val_loss"}[table]
        row = {"step": step, name: loss, "train_time_s": seconds}
        text = f"step {step} {name} {loss:.4f} train_time {seconds:.3f} s"
        if table == "steps":
            before = self.data["steps"][-1]["train_time_s"] if step > 1 else 0.0
            row["step_ms"] = 1000 * (seconds - before)
            text += f" step {row['step_ms']:.1f} ms"
        self.data[table].append(row)
        self.line(text)
        require(math.isfinite(loss), f"{name} is {loss} at step {step}: lower the learning rates")

    def end(self, num_targets: int) -> None:
        """The result, which is the last validation, and the other two files."""
        step, loss, seconds = self.data["validations"][-1].values()
        self.line(f"val loss {loss:.4f} after {step} steps, on {num_targets:,} targets")
        summary = {"val_loss": loss, "steps": step, "train_time_s": seconds}
        self.data["summary"] = summary | {"mean_step_ms": 1000 * seconds / step}
        if self.path is not None:
            self.path.with_suffix(".json").write_text(json.dumps(self.data, indent=1))
            axes = Figure().subplots()
            for table, name in ("steps", "train_loss"), ("validations", "val_loss"):
                axes.plot(*zip(*((row["step"], row[name]) for row in self.data[table])), label=name)
            axes.set(title=self.path.stem, xlabel="step", ylabel="nats per token")
            axes.legend()
            axes.figure.savefig(self.path.with_suffix(".png"))


# --- 7. Command line ------------------------------------------------------------------------------
def config_as_text(config: Config) -> dict[str, str]:
    """Every field as on the command line."""
    return {name: str(value) for name, value in vars(config).items()}


def parse_args(arguments: list[str] | None) -> Config:
    how = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], **how)
    parser.error = lambda text: parser.exit(2, f"error: {text}; --help lists the options\n")
    preset = "speedrun" if torch.cuda.is_available() else "tiny"
    parser.add_argument("--preset", choices=PRESETS, default=preset, help=f"[{preset}]")
    for field in dataclasses.fields(Config):
        text = f"{field.metadata['help']} [{field.default}]"
        parser.add_argument(f"--{field.name}", type=field.type, metavar="X", help=text)
    given = vars(parser.parse_args(arguments))
    return dataclasses.replace(PRESETS[given.pop("preset")], **given)


def main(arguments: list[str] | None = None) -> int:
    config = parse_args(arguments)
    try:
        train(config, start_runtime(config))
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except (UserError, OSError, KeyboardInterrupt) as error:
        is_error = not isinstance(error, KeyboardInterrupt)
        print(f"error: {error}" if is_error else "interrupted", file=sys.stderr)
        return 1 if is_error else 130


if __name__ == "__main__":
    sys.exit(main())
