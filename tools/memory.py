"""The memory that training takes on a GPU: `python tools/memory.py [--option value ...]`.

It needs no GPU and computes nothing: the model, its optimizer and a pass of every stage are made of
tensors that have a shape and no memory, and the bytes of those that live at once are summed up.
Further options are those of train_gpt.py. Prints a column for every number of GPUs:

    n-grams     this GPU's part of the table of hashed n-grams, and what a step reads of it
    weights     all others, their gradients, and this GPU's part of the optimizer's state
    warm-up     copies of weights and state, from which prepare() puts everything back
    pass        what a forward and backward pass adds at its peak, at the stage where it is largest

Not counted are the temporary tensors of an update, the workspaces of libraries, and what the driver
and NCCL hold: leave 4 GiB for them.
"""

import argparse
import contextlib
import functools
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import console

if __name__ == "__main__":
    console.end_on_signals()

import torch
from profiler import table
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt
from train_gpt import GPT, Batch, Config, Log, Optimizer, Runtime, Stage

GIB = 2**30


class Live(TorchDispatchMode):
    """Sums up the bytes of all tensors that were made in it and still are: `now`, and the most so
    far."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()  # addresses of storages

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.count(x.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        # of a few small tensors the size depends on numbers, which are not there
        if key not in self.known and isinstance(size, int):
            self.known.add(key)
            weakref.finalize(storage, self.forget, key, size)
            self.now += size
            self.most = max(self.most, self.now)

    def forget(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size


class Attention(torch.autograd.Function):
    """The tensors that an attention kernel makes and keeps; with fp32 sums of dq, as
    flash-attn-4."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        _sums = q.new_empty(q.shape, dtype=torch.float32)
        return tuple(map(torch.empty_like, (q, k, v)))


class NoLaunch:
    """In place of a kernel."""

    def __getitem__(self, grid: object) -> object:
        return lambda *args, **options: None


@contextlib.contextmanager
def without_memory() -> Iterator[Live]:
    """Tensors without memory, on which train_gpt.py goes the way of a GPU and launches nothing."""
    kernels = {
        name: NoLaunch()
        for name, value in vars(train_gpt).items()
        if isinstance(value, JITFunction | InterpretedFunction)
    }
    kernels["has_kernels"] = lambda device: True
    kernels["attention"] = lambda q, k, v, *options: Attention.apply(q, k, v)
    address = mock.patch.object(FakeTensor, "data_ptr", lambda x: 0)  # descriptors ask for it
    fake = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    train_gpt.unreadable.cache_clear()
    try:
        with mock.patch.multiple(train_gpt, **kernels), address, fake, Live() as live:
            yield live
    finally:
        train_gpt.unreadable.cache_clear()


class Memory(NamedTuple):
    """Bytes on one GPU of several."""

    ngrams: int
    weights: int
    warm_up: int


def memory_of(config: Config, world_size: int) -> Memory:
    """What is there before the first pass."""
    with without_memory() as live:
        model = GPT(config, Runtime(0, world_size, torch.device("cpu"), Log(None)))
        optimizer, ngrams = Optimizer(model, config, model.ngrams.runtime), model.ngrams
        parts = ngrams.table, ngrams.sum_squares, ngrams.rows, ngrams.grads, ngrams.pulled
        of_ngrams = sum(x.nbytes for x in parts)
        copied = [*model.parameters(), *optimizer.tensors()]
        return Memory(of_ngrams, live.now - of_ngrams, sum(x.nbytes for x in copied))


def pass_memory(config: Config, stage: Stage, sequences: int) -> int:
    """What a pass of so many sequences adds at its peak."""
    with without_memory() as live:
        model = GPT(config, Runtime(0, 1, torch.device("cpu"), Log(None)))
        num_tokens = sequences * stage.tokens_per_step // config.sequences_per_step
        tokens = torch.zeros(num_tokens, dtype=torch.int32)
        starts = torch.zeros(num_tokens // config.min_mean_doc_len + 1, dtype=torch.int32)
        batch = Batch(tokens, tokens.long(), starts, stage.max_seq_len, sequences)
        before = live.most = live.now
        weights = torch.tensor([1.0, stage.second])
        loss, _ = model.training_loss(batch, stage.windows, weights, stage.candidates)
        loss.backward()
        return live.most - before


def report(config: Config) -> str:
    """A column for each number of GPUs, up to 8, that shares out the sequences of a step evenly."""
    counts = [n for n in (1, 2, 4, 8) if config.sequences_per_step % n == 0]
    memory, largest, peak_of = {}, {}, functools.cache(functools.partial(pass_memory, config))
    for n in counts:
        train_gpt.check_config(config, n, kernels=True)
        memory[n], passes = memory_of(config, n), []
        for stage in dict.fromkeys(config.all_stages):
            length = stage.tokens_per_step // config.sequences_per_step
            sequences = config.sequences_per_pass(length, n)
            candidates = f"{stage.candidates:,} candidates" if stage.candidates else "all tokens"
            kind = f"{sequences} of {length:,} tokens, {candidates}"
            passes.append((peak_of(stage, sequences), kind))
        largest[n] = max(passes)
    names = "n-grams", "weights", "warm-up"
    rows = {name: [own[i] for own in memory.values()] for i, name in enumerate(names)}
    rows["pass"] = [peak for peak, _ in largest.values()]
    rows["sum"] = [sum(column) for column in zip(*rows.values())]
    lines = [["GiB a GPU, on", *map(str, counts)]]
    lines += [[name, *(f"{size / GIB:.1f}" for size in sizes)] for name, sizes in rows.items()]
    notes = [f"largest pass on {n}: {kind}" for n, (_, kind) in largest.items()]
    return "\n".join([table(lines), *notes])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python tools/memory.py",
        description=__doc__.split("\n")[0],
        epilog="All options are those of train_gpt.py.",
        allow_abbrev=False,
    )
    _, options = parser.parse_known_args(arguments)
    train_gpt.open_streams()
    try:
        print(report(train_gpt.parse_args(options)))
    except train_gpt.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
