"""train() as a whole on a GPU: it learns with fp8 and graphs, as well without either, on two GPUs
and without flash-attn; and its kernels touch no memory but their own."""

import contextlib
import dataclasses
import gc
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, write_shard
from test_kernels import (
    DEVICE,
    agree,
    combine_inputs,
    exact_head_loss,
    head_inputs,
    in_fp8,
    prepare_inputs,
    quantized,
    random,
    random_offsets,
    reference_of,
    relative_error,
    scale_of,
    single,
)

import train_gpt
from train_gpt import (
    START_TOKEN,
    Config,
    DelayedScale,
    HeadFp8,
    Log,
    MlpFp8,
    QkvFp8,
    Runtime,
    Schedule,
    Stage,
    Trainer,
    add_rows_,
    attention_backend,
    check_config,
    config_as_text,
    fp8_empty,
    sort_rows,
    train,
    training_batches,
    update_ngrams_,
)

pytestmark = pytest.mark.gpu

# Text that can be learned ------------------------------------------------------------------------

NUM_IDS, SUCCESSORS = 300, (0.70, 0.15, 0.10, 0.05)


def chain_documents(seed: int, lengths: np.ndarray) -> np.ndarray:
    """Documents of these lengths from a Markov chain, the same for every seed: each of NUM_IDS ids
    has four that follow it, with the probabilities SUCCESSORS, of 0.91 nats."""
    chain, draw = np.random.default_rng(0), np.random.default_rng(seed)
    ids = chain.choice(START_TOKEN, NUM_IDS, replace=False)
    follows = chain.integers(NUM_IDS, size=(NUM_IDS, len(SUCCESSORS)))
    states = np.empty((len(lengths), lengths.max()), dtype=np.int64)
    states[:, 0] = draw.integers(NUM_IDS, size=len(lengths))
    for i in range(1, states.shape[1]):
        which = draw.choice(len(SUCCESSORS), len(lengths), p=SUCCESSORS)
        states[:, i] = follows[states[:, i - 1], which]
    tokens = ids[states]
    tokens[:, 0] = START_TOKEN
    return tokens[np.arange(tokens.shape[1]) < lengths[:, None]]


def write_data(folder: Path, lengths: np.ndarray) -> Path:
    """Two training shards of documents of these lengths, and one for validation."""
    half = len(lengths) // 2
    write_shard(folder / "train_0.bin", chain_documents(1, lengths[:half]))
    write_shard(folder / "train_1.bin", chain_documents(2, lengths[half:]))
    write_shard(folder / "val.bin", chain_documents(3, np.full(40, 450)))
    return folder


def run_config(folder: Path, **changes: object) -> Config:
    """The speedrun's model for 40 steps of eight sequences of 4,096 tokens, in three stages: with
    and without sampled candidates, with and without the second loss term."""
    fields = {
        "train_files": str(folder / "train_*.bin"),
        "val_file": str(folder / "val.bin"),
        "val_tokens": 4 * 4096,
        "val_sequence_tokens": 4096,
        "val_every": 4,
        "ngram_rows": 2**14,
        "num_steps": 38,
        "stages": (
            Stage(0.5, 32_768, 512, 128, 384, 0.75, 0.42, 3072),
            Stage(0.5, 32_768, 512, 256, 512, 1.0, 0.1, 0),
        ),
        "extension_steps": 2,
        "extension": (Stage(1.0, 32_768, 512, 256, 512, 1.0, 0.0, 3072),),
        "final_window_long": 512,
        "canonical_mask": False,  # GPT-2's tokenizer makes no such text
        "log_dir": str(folder / "logs"),
    }
    return Config(**{**fields, **changes})


class Losses(NamedTuple):
    train: np.ndarray  # of each step
    val: np.ndarray  # of each validation


def losses_of(data: dict) -> Losses:
    """What a log's .json contains."""
    steps = [row["train_loss"] for row in data["steps"]]
    return Losses(np.array(steps), np.array([row["val_loss"] for row in data["validations"]]))


def train_here(config: Config, run_id: str) -> tuple[Losses, Log]:
    """Train in this process."""
    check_config(config, 1)
    log = Log(config.log_dir, run_id)
    train(config, Runtime(0, 1, torch.device("cuda", 0), log))
    gc.collect()  # graphs and their memory
    torch.cuda.empty_cache()
    return losses_of(log.data), log


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = np.random.default_rng(0).integers(200, 700, 5000)  # some are cut at 512
    return write_data(tmp_path_factory.mktemp("chain"), lengths)


@pytest.fixture(scope="module")
def losses(folder: Path) -> Callable[..., Losses]:
    """Those of a run with these changes, which is trained once."""
    done = {}

    def run(**changes: object) -> Losses:
        name = "-".join(f"{key}-{value}" for key, value in changes.items()) or "plain"
        if name not in done:
            done[name], _ = train_here(run_config(folder, **changes), name)
        return done[name]

    return run


def assert_near(found: np.ndarray, expected: np.ndarray, largest: float, mean: float) -> None:
    """Differences in nats, at most and on average."""
    difference = np.abs(found - expected)
    assert difference.max() < largest, f"{difference.round(4)}"
    assert difference.mean() < mean, f"{difference.round(4)}"


# The whole run -----------------------------------------------------------------------------------


def test_training_learns(folder, losses):
    """With fp8 and graphs, from even guesses to what follows what. In fp32 on a CPU a model a third
    as wide came to 2.4 with an eighth of the tokens, from 6.2 in the tenth step."""
    shard = np.frombuffer((folder / "val.bin").read_bytes()[1024:], dtype="<u2")
    shares = np.unique(shard, return_counts=True)[1] / len(shard)
    assert -(shares * np.log(shares)).sum() > 5, "who knows only how frequent ids are"
    train_losses, val_losses = losses()
    assert len(train_losses) == 40 and len(val_losses) == 10
    assert np.isfinite(train_losses).all() and np.isfinite(val_losses).all()
    assert abs(train_losses[0] - math.log(50_304)) < 0.1
    assert train_losses[10] < 8
    assert train_losses[-4:].mean() < 4
    assert val_losses[-1] < 4 and val_losses[-1] == val_losses.min()


def test_graphs_train_as_passes_without_them(losses):
    """fp8 takes the scales of the step before in both, and the kernels' only atomics are maxima, so
    the first step's loss is the same to fp32's rounding. flash-attn adds up the gradient of queries
    in no fixed order, which moves a few bf16 roundings in every step from there on."""
    found, expected = losses(), losses(cuda_graphs=False)
    assert abs(found.train[0] - expected.train[0]) < 1e-4
    for values, references in zip(found, expected):
        assert_near(values, references, 0.05, 0.01)


def test_fp8_trains_as_bf16(losses):
    """Two to three percent of error in every matmul are noise, which steps average; first scales
    are guesses, so a few steps may go by before it learns as fast."""
    found, expected = losses(), losses(fp8=False)
    assert abs(found.train[0] - expected.train[0]) < 1e-2
    for values, references in zip(found, expected):
        assert_near(values, references, 0.5, 0.1)
    assert abs(found.val[-1] - expected.val[-1]) < 0.1


def test_two_gpus_train_as_one(folder, losses, tmp_path):
    """By torchrun and NCCL. Validation scores the same text; what differs are roundings of bf16, of
    gradients that are summed in two parts and of Muon's matmuls in other batches. A step's
    training loss is that of the first GPU's sequences, half of them: if a token's spreads by 2
    nats, the mean of 16,384 spreads by 0.016."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    config = run_config(folder, log_dir=str(tmp_path))
    taken = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [f"--{name}={text}" for name, text in config_as_text(config).items()]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "train_gpt.py"), *options],
        check=False,
        cwd=tmp_path,
        env={name: text for name, text in os.environ.items() if name not in taken},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (log,) = tmp_path.glob("*.json")
    data = json.loads(log.read_text())
    assert data["environment"]["world_size"] == 2
    found, expected = losses_of(data), losses()
    assert len(found.train) == 40 and len(found.val) == 10
    assert_near(found.train, expected.train, 0.15, 0.04)
    assert_near(found.val, expected.val, 0.1, 0.03)


# What may be missing -----------------------------------------------------------------------------


@contextlib.contextmanager
def without_module(name: str) -> Iterator[None]:
    """As if it were not installed: importing it fails, and so does looking for parts of it."""
    why = train_gpt.why_no_flash_attention  # which remembers the answer
    with pytest.MonkeyPatch.context() as patch:
        for part in [part for part in sys.modules if part.startswith(f"{name}.")]:
            patch.delitem(sys.modules, part)
        patch.setitem(sys.modules, name, None)
        patch.setattr(train_gpt, why.__name__, why.__wrapped__)
        yield


@pytest.mark.parametrize("module", ["flash_attn", "flash_attn.cute"])
def test_varlen_attention_takes_over_from_flash_attn(module):
    """Where there is no such package, and where an older one has no such part."""
    with without_module(module):
        assert attention_backend(torch.device("cuda"), torch.bfloat16) == "varlen"


def test_training_without_flash_attn(folder, losses):
    """The same losses but for bf16's roundings, which fall otherwise in every layer."""
    expected = losses().train[:12]
    with without_module("flash_attn"):
        found, log = train_here(run_config(folder, stop_step=12), "varlen")
    assert "attention by varlen" in log.path.read_text()
    assert_near(found.train, expected, 0.1, 0.03)


def test_steps_that_do_not_fit_their_graph_run_without_it(monkeypatch, tmp_path):
    """Now and then sequences have more documents than their graph was captured for: those passes
    run eagerly, the others as graphs, and all as if there were no graphs."""
    draw, lengths = np.random.default_rng(0), []
    for _ in range(8):
        lengths += [draw.integers(200, 700, 150), draw.integers(16, 60, 1000)]
    config = run_config(write_data(tmp_path, np.concatenate(lengths)), stop_step=12)
    shapes = [Schedule(config).sequence_shape(step) for step in range(12)]
    runtime = Runtime(0, 1, torch.device("cuda", 0), Log(None))
    passes = [batch for rows in training_batches(config, runtime, shapes) for batch in rows]
    room = len(passes[0].tokens) // config.min_mean_doc_len + 1
    too_many = sum(len(batch.cu_seqlens) > room + 1 for batch in passes)
    assert len(passes) == 12 and 2 < too_many < 10

    eager, compute, prepare = [], Trainer.compute, Trainer.prepare

    def computing(trainer: Trainer, *args: object) -> torch.Tensor:
        eager.append(args)
        return compute(trainer, *args)

    def preparing(trainer: Trainer) -> None:
        prepare(trainer)
        eager.clear()

    monkeypatch.setattr(Trainer, "compute", computing)
    monkeypatch.setattr(Trainer, "prepare", preparing)
    found, log = train_here(config, "graphs")
    assert len(eager) == log.data["summary"]["passes_without_graph"] == too_many
    expected, _ = train_here(dataclasses.replace(config, cuda_graphs=False), "eager")
    assert len(eager) == 12
    assert found.train[-1] < found.train[0] - 2
    for values, references in zip(found, expected):
        assert_near(values, references, 0.05, 0.01)  # as with and without graphs above


# The memory of kernels ---------------------------------------------------------------------------


def test_kernels_at_odd_sizes():
    """Sizes that fill no tile: multiples of 16 where fp8 matmuls require these, of nothing where
    they do not. test_kernels_stay_in_their_memory runs it once more."""
    torch.manual_seed(0)
    for shape in ((70, 150), (3, 33, 140)):
        x, scales = random(*shape), torch.full((*shape[:-2], 4), 5 / 448, device=DEVICE)
        rows, columns, _ = in_fp8(x, scales)
        assert torch.equal(columns.float(), rows.mT.float())
        assert relative_error(rows.float() * 5 / 448, x) < 4e-2

    agree(train_gpt.combine, combine_inputs(37, 136, 5, True))
    copy, inputs = fp8_empty((37, 136), scale_of(28 / 448)), combine_inputs(37, 136, 3, True)
    train_gpt.combine(*inputs, copy)
    normed = quantized(reference_of(train_gpt.combine)(*inputs)[1], copy[2])
    for values in copy[0], copy[1].mT:
        assert relative_error(values.float() * copy[2][0], normed) < 3e-2

    # heads of 64, sequences of 48: neither 16 nor 32 tokens a program come out even
    for case in ((80, 2, 64, ""), (144, 2, 64, "value offset rows")):
        inputs = prepare_inputs(case)
        scales = [scale_of(value / 448) for value in (5.0, 0.5, 16.0)]
        copies = map(in_fp8, inputs[:2], scales)
        inputs[5] = QkvFp8(*copies, DelayedScale(scales[2], torch.zeros(1, device=DEVICE)))
        agree(train_gpt.prepare_qkv, inputs, (2, 3, 5), 0.12)

    x, w_1, w_2 = random(80, 144), random(208, 144, std=0.1), random(208, 144, std=0.1)
    scales = [scale_of(value / 448) for value in (5.0, 0.5, 0.5, 48.0, 5.0, 64.0)]
    copies = map(in_fp8, (x, w_1, w_2), scales)
    fp8 = MlpFp8(*copies, *map(DelayedScale, scales[3:], torch.zeros(3, device=DEVICE).split(1)))
    agree(train_gpt.mlp, [x, w_1, w_2, fp8], (3,), 0.15)

    for offsets in (None, random_offsets(272)):
        x, head, targets, weights, shares = head_inputs(80, 272, 144, 0.05)
        leaves = x.requires_grad_(), head.requires_grad_()
        scales = [scale_of(value / 448) for value in (0.25, 100.0, 0.75)]
        fp8 = HeadFp8(in_fp8(head.detach(), scales[0]), *scales[1:])
        found = train_gpt.head_loss(*leaves, targets, weights, fp8, offsets, shares)
        exact = exact_head_loss(*leaves, targets, weights, offsets, shares)
        assert relative_error(torch.stack(found), exact[0]) < 1e-2
        for value, reference in zip(torch.autograd.grad(found[0], leaves), exact[1:]):
            assert relative_error(value, reference) < 0.1

    index = torch.randint(0, 90, (71,), device=DEVICE, dtype=torch.int32)
    index[36:] = 89  # a long run, of the table's last row
    table, values, order = random(90, 130), random(71, 2, 130)[:, 1], sort_rows(index)
    expected = table.double().index_add(0, index, values.double())
    add_rows_([table], order, [values])
    assert relative_error(table, expected) < 1e-2

    table, sums, grads = random(90, 24), single(90).square(), random(71, 24)
    total = torch.zeros_like(table).double().index_add(0, index, grads.double())
    squares = sums + total.square().mean(1)
    expected = table.double() - 0.1 * total / (squares.sqrt() + 1e-3)[:, None]
    update_ngrams_(table, sums, order, grads, 0.1, 1e-3)
    assert relative_error(table, expected) < 1e-2
    assert relative_error(sums, squares) < 1e-4


def test_kernels_stay_in_their_memory():
    """memcheck sees every access; each tensor has an allocation of its own."""
    memcheck = shutil.which("compute-sanitizer")
    if memcheck is None:
        pytest.skip("needs compute-sanitizer of the CUDA toolkit")
    test = f"{Path(__file__).relative_to(ROOT)}::{test_kernels_at_odd_sizes.__name__}"
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "86"]
    pytest_alone = ["-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", test]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [memcheck, *options, sys.executable, *pytest_alone],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    output = done.stdout + done.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not work on this machine")
    assert done.returncode == 0, output[-6000:]
    assert "1 passed" in output and "ERROR SUMMARY: 0 errors" in output, output[-2000:]
