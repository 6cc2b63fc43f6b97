"""The table of hashed n-grams shared out over ranks: what they exchange against brute force, and
training, validation and checkpoints on several ranks against one process."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    cpu_runtime,
    on_ranks,
    random_documents,
    split_sequences,
    tiny_config,
    trained_like,
)
from test_kernels import DEVICE, single
from test_train import command, environment, fork, free_port, log_of, write_data
from torch import Tensor
from transcription import ngram_rows

from train_gpt import (
    GPT,
    Config,
    Ngrams,
    Optimizer,
    Runtime,
    Stage,
    Trainer,
    Windows,
    add_rows_,
    ngram_hash,
    ngram_hash_on_host,
    passes_remedy,
    plan_exchange,
    rank_batches,
    sort_ngrams,
    tables_remedy,
    training_batches,
    update_ngrams_,
    validate,
)

sys.path.insert(0, str(ROOT / "tools"))
import check

import train_gpt

ORDERS, ROWS, DIM = (2, 3), 401, 32
WINDOWS = Windows(8, 24)


def sharded_config(**changes: object) -> Config:
    """Of steps of eight sequences of 64 tokens."""
    fields = {"ngram_orders": ORDERS, "ngram_rows": ROWS, "ngram_lr": 0.1, "sequences_per_step": 8}
    fields |= {"stages": (Stage(1.0, 512, 48, 8, 24, 1.0, 0.5, 0),)}
    return tiny_config(**{**fields, **changes})


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Rows --------------------------------------------------------------------------------------------

LENGTHS_ORDERS_ROWS = [
    (64, (2, 3), 2**24),
    (200, (1, 3, 7), 1000),
    (2, (3,), 2),
    (17, (31,), 17),
    (4, (2, 31), 2**30 - 1),
]


@pytest.mark.parametrize(("length", "orders", "num_rows"), LENGTHS_ORDERS_ROWS)
def test_host_finds_the_rows_of_the_device(length, orders, num_rows):
    """And those of the definition."""
    tokens = np.random.default_rng(length).integers(0, 50_304, length).astype(np.uint16)
    tokens[:2] = 50_303, 0  # the largest that the tables have, and the smallest
    rows = ngram_hash_on_host(tokens, orders, num_rows)
    assert rows.dtype == np.int32
    on_device = ngram_hash(torch.from_numpy(tokens.astype(np.int32)), orders, num_rows)
    assert torch.equal(torch.from_numpy(rows), on_device)
    assert rows.tolist() == ngram_rows(tokens.tolist(), orders, num_rows)


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "orders", "num_rows"), LENGTHS_ORDERS_ROWS)
def test_host_finds_the_rows_of_a_gpu(length, orders, num_rows):
    sequences = np.random.default_rng(0).integers(0, 50_304, (4, length)).astype(np.int32)
    rows = [ngram_hash_on_host(tokens, orders, num_rows) for tokens in sequences]
    tokens = torch.from_numpy(sequences).flatten().cuda()
    assert ngram_hash(tokens, orders, num_rows, 4).tolist() == np.concatenate(rows).tolist()


# Plans -------------------------------------------------------------------------------------------


def check_plans(rows: list[list[int]], share: int) -> list[tuple]:
    """Of all ranks, what they send and receive when they follow them."""
    read, ranks = np.array(rows, dtype=np.int32), range(len(rows))
    plans = [plan_exchange(read, rank, share) for rank in ranks]
    sent = [  # from each rank to each rank
        (rank * share + exchange.rows.numpy()).tolist() for rank, (exchange, _) in enumerate(plans)
    ]
    for rank, (exchange, places) in enumerate(plans):
        received = []
        for owner, (other, _) in enumerate(plans):
            begin = sum(other.to_each[:rank])
            part = sent[owner][begin : begin + other.to_each[rank]]
            assert len(part) == exchange.from_each[owner]
            assert all(owner * share <= row < (owner + 1) * share for row in part)
            received += part
        assert received == sorted({*rows[rank]})
        assert [received[place] for place in places] == rows[rank]
    return [exchange for exchange, _ in plans]


def test_plan_of_the_docstring():
    _, b, c, _, e, f = range(6)
    first, second = check_plans([[b, e, f], [b, c, e]], 3)
    assert (first.from_each, first.to_each, first.rows.tolist()) == ([1, 2], [1, 2], [b, b, c])
    assert (second.from_each, second.to_each) == ([2, 1], [2, 1])
    assert (second.rows + 3).tolist() == [e, f, e]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_plans_are_those_of_brute_force(ranks):
    random = np.random.default_rng(ranks)
    for rows in (40, 1000):
        check_plans(random.integers(0, rows, (ranks, 100)).tolist(), -(-rows // ranks))


def test_plans_of_ranks_that_ask_nothing_of_others():
    own = check_plans([[0, 1, 0], [4, 3, 3]], 3)
    assert [plan.to_each for plan in own] == [[2, 0], [0, 2]]
    crossed = check_plans([[3, 4, 5], [0, 0, 2]], 3)
    assert [plan.from_each for plan in crossed] == [[0, 3], [2, 0]]
    of_one = check_plans([[4, 4, 4]] * 3, 3)  # all tokens the same: rank 1 has their row
    assert [plan.to_each for plan in of_one] == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert of_one[0].rows.dtype == torch.int32 and len(of_one[0].rows) == 0


@pytest.mark.parametrize(("ranks", "count"), [(2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)])
def test_batches_name_the_rows_of_their_tokens(ranks, count):
    """In every pass of every rank; for one process they name none."""
    config = sharded_config()
    starts = np.array([0, 40])
    sequences = [(random_documents(seed, [40, 25], num_ids=6), starts) for seed in range(8)]
    for rank in range(ranks):
        batches = rank_batches(sequences, count, 64, config, cpu_runtime(rank, ranks))
        assert len(batches) == 8 // ranks // count
        assert len({id(batch.exchange) for batch in batches}) == 1
        rows = [ngram_hash(batch.tokens, ORDERS, ROWS, count) for batch in batches]
        received = torch.cat(rows).unique()
        for batch, expected in zip(batches, rows):
            assert torch.equal(received[batch.rows.long()], expected)
        assert len(received) == sum(batches[0].exchange.from_each)
        ngrams = Ngrams(config, cpu_runtime(rank, ranks))
        assert len(ngrams.table) == -(-2 * ROWS // ranks)
        assert len(ngrams.pulled) == 2 * 8 * 64 // ranks  # validation's sequences, all different
        parts = [part for batch in batches for part in split_sequences(batch)]
        assert all(part.exchange is batches[0].exchange for part in parts)
        together = (torch.cat([part.rows for part in some]) for some in (parts, batches))
        assert torch.equal(*together)
    alone = rank_batches(sequences, count, 64, config, cpu_runtime())
    assert all(batch.rows is batch.exchange is None for batch in alone)
    assert len(Ngrams(config, cpu_runtime()).pulled) == 0


def test_kernels_take_the_gradient_of_a_token_for_each_of_its_rows(monkeypatch):
    """More places than tokens, which is what the sums of a rank and updates go by."""
    rows, grads = torch.randint(0, 60, (1500, 3), device=DEVICE).int(), single(1500, 136)
    rows[::2, 0] = 7  # a long run
    order, touched = sort_ngrams(rows), rows.flatten().unique()
    sums = torch.zeros(60, 136, device=DEVICE, dtype=torch.float64)
    for part in rows.mT:
        sums.index_add_(0, part, grads.double())
    for kernel in (True, False):
        monkeypatch.setattr(train_gpt, "has_kernels", lambda device, kernel=kernel: kernel)
        found = torch.zeros(60, 136, device=DEVICE)
        add_rows_([found], order, [grads])
        torch.testing.assert_close(found.double(), sums, rtol=1e-4, atol=1e-4)
        table, squares = torch.zeros(60, 136, device=DEVICE), torch.zeros(60, device=DEVICE)
        update_ngrams_(table, squares, order, grads, 0.1, 1e-10)
        expected = -0.1 * sums[touched] / sums[touched].square().mean(1, keepdim=True).sqrt()
        torch.testing.assert_close(table[touched].double(), expected, rtol=1e-4, atol=1e-5)


# Ranks -------------------------------------------------------------------------------------------


# Of each of eight sequences, the ids that it draws from.
TEXTS = {
    "few n-grams": [range(3)] * 8,
    "one token": [[7]] * 8,
    "others on every rank": [range(10 * i, 10 * i + 10) for i in range(8)],
    "the same, and others": [[1, 2]] * 4 + [range(50, 400)] * 4,
}


def exact_updates(runtime: Runtime, folder: Path) -> dict[str, Tensor | None]:
    """The table after three steps with gradients of small integers, whose sums are exact in bf16,
    and sums of squares of this rank."""
    results = {}
    for name, ids in TEXTS.items():
        for dtype in ("float32", "bfloat16"):
            config = sharded_config(dtype=dtype)
            ngrams = Ngrams(config, runtime)
            for step in range(3):
                random = np.random.default_rng(step)
                tokens = [random.choice([*own], 65).astype(np.uint16) for own in ids]
                sequences = [(own, np.array([0])) for own in tokens]
                batches = rank_batches(sequences, 1, 64, config, runtime)
                ngrams.pull(batches[0].exchange)
                ngrams.wait()
                for number, batch in enumerate(batches):
                    seed = 100 * step + number * runtime.world_size + runtime.rank
                    table, rows = ngrams.locate(batch)
                    number_of_row = ngram_hash(batch.tokens, ORDERS, ROWS)
                    results[name, dtype, step, seed] = number_of_row, table[rows.long()].clone()
                    generator = torch.Generator().manual_seed(seed)
                    grads = torch.randint(-1, 2, (64, DIM), generator=generator)
                    ngrams.gather(rows, grads.type_as(table))
                ngrams.send_gradients()
                ngrams.update(0.1, 1e-10)
                assert ngrams.filled == 0 and ngrams.exchange is None
            results[name, dtype] = ngrams.whole_table()
    return results


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_shared_tables_are_that_of_one_process(world_size, tmp_path):
    """To the bit, what is read in every step too."""
    alone = exact_updates(cpu_runtime(), tmp_path)
    ranks = on_ranks(exact_updates, world_size, tmp_path)
    for name in TEXTS:
        for dtype in ("float32", "bfloat16"):
            assert alone[name, dtype].any()
            assert torch.equal(ranks[0][name, dtype], alone[name, dtype])
            assert all(found[name, dtype] is None for found in ranks[1:])
    read = {key: value for found in ranks for key, value in found.items() if len(key) == 4}
    expected = {key: value for key, value in alone.items() if len(key) == 4}
    assert read.keys() == expected.keys() and len(read) == 4 * 2 * 3 * 8
    for key, (rows, values) in read.items():
        assert torch.equal(rows, expected[key][0]) and torch.equal(values, expected[key][1]), key
    assert any(values.any() for _, values in read.values())


def train_some(
    runtime: Runtime, folder: Path, ahead: bool = True, prepared: bool = False
) -> dict[str, object]:
    """Four steps of two micro-batches, on up to four ranks, with a validation behind the second."""
    files = {"train_files": f"{folder}/train_*.bin", "val_file": f"{folder}/val.bin"}
    config = sharded_config(**files, val_sequence_tokens=32)
    model = trained_like(config, runtime)
    model.ngrams.reset()
    trainer, losses, pulled = Trainer(model, runtime), [], []
    if prepared:
        trainer.prepare()
        assert model.ngrams.exchange is None and not model.ngrams.works
        assert not model.ngrams.table.any() and not model.ngrams.sum_squares.any()
    steps = [*training_batches(config, runtime, [(64, 48)] * 4)]
    for step, (batches, following) in enumerate(zip(steps, [*steps[1:], None])):
        loss = trainer.run_step(step, batches, following=following if ahead else None)
        losses.append(runtime.all_reduce(loss.clone()).item() / runtime.world_size)
        if following is not None and runtime.world_size > 1:
            pulled.append(model.ngrams.exchange is following[0].exchange)
        if step == 1:
            losses.append(validate(model, config, runtime, 300, WINDOWS))
    weights = [param.detach().clone() for param in model.parameters()]
    table = model.ngrams.whole_table()
    return {"losses": losses, "pulled": pulled, "weights": weights, "table": table}


def train_in_some_ways(runtime: Runtime, folder: Path) -> list[dict[str, object]]:
    """On four ranks, which share the tests' cores, in one."""
    ways = [{}] if runtime.world_size == 4 else [{}, {"ahead": False}, {"prepared": True}]
    return [train_some(runtime, folder, **way) for way in ways]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_train_like_one_process(world_size, tmp_path):
    """With rows that are pulled as soon as they are updated, or when they are read, and with a
    validation in between: to the bit the same. Preparation changes nothing."""
    write_data(tmp_path)
    alone = train_some(cpu_runtime(), tmp_path)
    assert 50 < alone["table"].any(1).sum() < 2 * ROWS
    assert alone["losses"][-1] < alone["losses"][0]
    ranks = on_ranks(train_in_some_ways, world_size, tmp_path)
    first, *_ = ranks[0]
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    for found in ranks:
        assert [way["pulled"] for way in found] == [[True] * 3, [False] * 3, [True] * 3][
            : len(found)
        ]
        for way in found:
            assert way["losses"] == first["losses"]
            assert all(map(torch.equal, way["weights"], first["weights"]))
    assert all(torch.equal(way["table"], first["table"]) for way in ranks[0])
    difference = (first["table"] - alone["table"]).abs()
    assert difference.max() < 0.1 and difference.mean() < 1e-4  # of steps of 0.1


# Runs --------------------------------------------------------------------------------------------


def test_two_nodes_of_two_ranks_leave_the_checkpoint_of_one_process(tmp_path):
    """Through run.sh, as a user of several machines starts it; here both are this one. The ranks
    cannot share the table evenly, and there is one validation sequence more than they can."""
    alone, together = (tmp_path / name for name in ("alone", "together"))
    changes = {"ngram_orders": "2:3", "ngram_rows": 2001, "stop_step": 6, "val_tokens": 560}
    changes |= {"val_every": 3, "sequences_per_step": 4}
    for folder in (alone, together):
        folder.mkdir()
        write_data(folder)
    result = fork(alone, **changes, checkpoint=alone / "model.pt")
    assert result.returncode == 0, result.stderr
    variables = environment() | {"NNODES": "2", "NPROC": "2", "MASTER_ADDR": "127.0.0.1"}
    variables |= {"MASTER_PORT": str(free_port()), "PYTHON": sys.executable}
    options = command(together, 1, **changes, checkpoint=together / "model.pt")[2:]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    nodes = [
        subprocess.Popen(
            [str(ROOT / "run.sh"), *options], env=variables | {"NODE_RANK": str(node)}, **pipes
        )
        for node in range(2)
    ]
    try:
        results = [node.communicate(timeout=150) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], results
    assert [out.count("val loss") for out, _ in results] == [1, 0]
    records = [log_of(folder)[1] for folder in (alone, together)]
    assert records[1]["environment"]["world_size"] == 4
    scores = [[row["val_loss"] for row in record["validations"]] for record in records]
    assert len(scores[0]) == 2 and scores[1] == pytest.approx(scores[0], abs=1e-4)
    tables = []
    for folder, record in zip((alone, together), records):
        model, config, _ = check.load_checkpoint(train_gpt, str(folder / "model.pt"), "cpu")
        windows = Windows(config.stages[0].window_short, config.stages[0].window_long)
        loss = validate(model, config, cpu_runtime(), 560, windows)
        assert loss == pytest.approx(record["summary"]["val_loss"], abs=1e-5)
        assert model.ngrams.table.shape == (4002, 32)
        tables.append(model.ngrams.table)
    assert torch.equal(*(table.any(1) for table in tables)) and tables[0].any()
    assert (tables[1] - tables[0]).norm() < 0.01 * tables[0].norm()


# Sizes -------------------------------------------------------------------------------------------


def test_optimizer_of_a_rank_keeps_no_table(runtime):
    """A rank's memory for n-grams is its share and what a step reads."""
    config = sharded_config(ngram_rows=10_000)
    model = GPT(config, cpu_runtime(1, 4))
    assert model.ngrams.table.shape == (5000, DIM) and model.ngrams.sum_squares.shape == (5000,)
    largest = max(x.numel() for x in vars(model.ngrams).values() if isinstance(x, Tensor))
    assert largest <= max(5000, len(model.ngrams.pulled) * DIM)
    sizes = {tensor.shape for tensor in Optimizer(model, config, cpu_runtime(1, 4)).tensors()}
    assert model.ngrams.table.shape not in sizes


def test_memory_has_the_remedies_of_a_rank():
    config = dataclasses.replace(Config(), ngram_orders=(2, 3), ngram_rows=2**24)
    for ranks, gib in ((1, "48.1"), (2, "24.1"), (8, "6.0")):
        found = tables_remedy(config, ranks)
        assert found.startswith(f"lower --ngram_rows 16777216, which take {gib} GiB a process, or")
        assert "start more processes, which share them" in found
    assert passes_remedy(config, 8).endswith(tables_remedy(config, 8))
