"""What the tests share: a small config, shards and sequences of random documents, one CPU
process."""

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Before anything imports Triton: without a GPU its kernels run in its interpreter.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

import train_gpt
from train_gpt import (
    GPT,
    START_TOKEN,
    TINY_LAYERS,
    Batch,
    Config,
    Fp8,
    Log,
    Momentum,
    Runtime,
    Stage,
    keep_freed_memory,
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU")
    # A shell that starts the tests in the background has them, and what they start, ignore Ctrl-C,
    # and nohup has them ignore SIGHUP. A handler, even one that does nothing, is not inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    # Both a good deal faster: threads that share a core with another process wait for each other.
    torch.set_num_threads(1)
    keep_freed_memory()
    # One process compiles functions for the sizes of many tests, which each change a few of them.
    torch._dynamo.config.recompile_limit = 256  # of this thread alone; see compile_anew
    spare_forks_our_garbage()


@pytest.fixture(scope="module", autouse=True)
def compile_anew() -> None:
    """The compiled functions of a file do not count toward torch's limit for the next one. In the
    threads that a Trainer compiles in that is 8, also within a file."""
    torch._dynamo.reset()


def spare_forks_our_garbage() -> None:
    """Keep forks of this process, and forks of those, from collecting what was garbage here when
    they began. It may have threads, which a fork has not: torchrun for instance leaves a TCPStore
    in a cycle. Its destructor joins the thread, and aborts a fork in which another thread has taken
    that one's stack (std::system_error: Invalid argument)."""
    tests = os.getpid()

    def unfreeze() -> None:
        if os.getpid() == tests:  # a fork that forks keeps our garbage frozen
            gc.unfreeze()

    # gc.freeze hides all that there is from the collectors of both processes; a test replaces it,
    # hence the lambda
    os.register_at_fork(before=lambda: gc.freeze(), after_in_parent=unfreeze)


# The files whose tests take longest, the longest first. They begin first, so that what is left for
# the end is short and none of the processes waits long for the others.
LONGEST = """
    check train kernels_compile records averages token_tables sharded_table matches self_check
    optimization_track world ending tools run_sh optimizer generate pointer ablate ngrams
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def cpu_runtime(rank: int = 0, world_size: int = 1) -> Runtime:
    """A process that computes on the CPU and logs nothing; it needs no process group."""
    return Runtime(rank, world_size, torch.device("cpu"), Log(None))


@pytest.fixture
def runtime() -> Runtime:
    return cpu_runtime()


def on_rank(job: Callable, rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    where = f"file://{folder}/store{world_size}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world_size)
    torch.save(job(cpu_runtime(rank, world_size), folder), f"{folder}/{world_size}_{rank}.pt")
    dist.destroy_process_group()


def on_ranks(job: Callable, world_size: int, folder: Path, timeout: float = 120) -> list:
    """What job(runtime, folder) gives on each of several processes of one gloo group. They are
    forks of this one, which spares them the imports; where there is a GPU they are not, as autograd
    refuses to work in a fork. pickle must be able to write the job and its results."""
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    processes = [
        context.Process(target=on_rank, args=(job, rank, world_size, folder), daemon=True)
        for rank in range(world_size)
    ]
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        assert [process.exitcode for process in processes] == [0] * world_size
    finally:
        for process in filter(multiprocessing.Process.is_alive, processes):
            process.kill()
    return [torch.load(folder / f"{world_size}_{rank}.pt") for rank in range(world_size)]


def tiny_config(**changes: object) -> Config:
    """The tiny layer plan with four heads of 8 and sequences of 64 tokens; every loss term is in
    use."""
    fields = {
        "val_tokens": 200,
        "min_mean_doc_len": 4,
        "layers": TINY_LAYERS,
        "model_dim": 32,
        "num_heads": 2,  # not as wide as the stream
        "head_dim": 8,
        "mlp_dim": 64,
        "gate_dim": 8,
        "ngram_orders": (2,),
        "ngram_rows": 512,
        "average_shares": (),
        "dtype": "float32",
        "num_steps": 8,
        "stages": (Stage(1.0, 256, 48, 8, 24, 1.0, 0.5, 0),),
        "extension_steps": 2,
        "extension": (Stage(1.0, 256, 64, 12, 32, 1.0, 0.0, 0),),
        "final_window_long": 64,
        "sequences_per_step": 4,
        "tokens_per_pass": 64,  # one row
        "momentum_warmup_steps": 4,
        "momentum_cooldown_steps": 2,
        "val_sequence_tokens": 64,
        "canonical_mask": False,
    }
    return Config(**{**fields, **changes})


MOMENTUM = Momentum(0.9, 0.0, 0.9)  # of Muon before the slow mean comes in

# How far trained_like moves the slices of GPT.small from their starts; the others move by 0.2.
SPREADS = {"gate_w_1": 0.05, "gate_b_1": 0.3, "gate_w_2": 1.0, "gate_b_2": 1.5}


def trained_like(config: Config, runtime: Runtime, seed: int = 0) -> GPT:
    """A model with every parameter and the rows of n-grams random, the same on any number of ranks,
    so that no gate and no projection is zero; the padding of the banks stays zero. Some positions
    are as likely to copy as can be."""
    model = GPT(config, runtime)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.attention_bank[: len(config.layers)].normal_(0, 0.2, generator=generator)
        model.mlp_bank[: 2 * len(config.layers)].normal_(0, 0.1, generator=generator)
        table = model.ngrams.table
        rows = table.new_empty(len(config.ngram_orders) * config.ngram_rows, table.size(1))
        for weights in (model.head, model.value_embed, rows):
            weights.normal_(0, 0.5, generator=generator)
        model.head[config.vocab_size] *= 8  # the copy entry
        own = rows[runtime.rank * len(table) :][: len(table)]
        table[: len(own)] = own
        for name, weights in model.unpack_small().items():
            weights += SPREADS.get(name, 0.2) * torch.randn(weights.shape, generator=generator)
    return model


def fp32_for_fp8(monkeypatch: pytest.MonkeyPatch, module: ModuleType = train_gpt) -> None:
    """Everything that would be fp8 is fp32, with scales all the same: the casts of Triton's
    interpreter to fp8 are not torch's."""

    def product(a: Fp8, b: Fp8) -> torch.Tensor:
        return a.rows @ b.rows.mT * (a.scale[0] * b.scale[0])

    monkeypatch.setattr(module, "E4M3", torch.float32)
    monkeypatch.setattr(module, "E5M2", torch.float32)
    monkeypatch.setattr(module, "fp8_matmul", product)


def write_shard(path: Path, tokens: np.ndarray | list[int]) -> Path:
    """256 int32 (magic, version, number of tokens, zeros), then the tokens as uint16."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def random_documents(seed: int, lengths: list[int], num_ids: int = START_TOKEN) -> np.ndarray:
    """Documents of these lengths one after another: the start token, then random ids below
    num_ids."""
    tokens = np.random.default_rng(seed).integers(0, num_ids, sum(lengths))
    tokens[np.cumsum([0, *lengths[:-1]])] = START_TOKEN
    return tokens


def random_batch(
    seed: int, lengths: list[int], padding: int = 2, num_ids: int = START_TOKEN
) -> Batch:
    """A sequence of documents of these lengths; its cu_seqlens ends in `padding` more entries of
    T."""
    num_tokens = sum(lengths)
    tokens = torch.from_numpy(random_documents(seed, [*lengths, 1], num_ids))
    cu_seqlens = np.cumsum([0, *lengths, *([0] * padding)])
    return Batch(
        tokens[:-1].int(),
        tokens[1:].long(),
        torch.tensor(cu_seqlens, dtype=torch.int32),
        num_tokens,
    )


def split_sequences(batch: Batch) -> list[Batch]:
    """Its sequences, a batch each."""
    length = len(batch.tokens) // batch.sequences
    starts = [(batch.cu_seqlens - i * length).clamp(0, length) for i in range(batch.sequences)]
    rows = [None] * batch.sequences if batch.rows is None else batch.rows.split(length)
    parts = zip(batch.tokens.split(length), batch.targets.split(length), starts, rows, strict=True)
    options = {"max_seq_len": batch.max_seq_len, "exchange": batch.exchange}
    return [Batch(*part, rows=rows, **options) for *part, rows in parts]
