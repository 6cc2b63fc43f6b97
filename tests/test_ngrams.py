"""Hashed n-grams: their rows against brute force, their training against dictionaries in float64,
and what a prediction may see of them; several ranks are in test_sharded_table.py."""

import dataclasses
import math
import sys
from collections import defaultdict

import pytest
import torch
from conftest import MOMENTUM, ROOT, cpu_runtime, random_batch, tiny_config, trained_like
from test_check import check
from test_train import fork, log_of, write_data
from torch import Tensor
from transcription import ngram_rows

import train_gpt
from train_gpt import (
    GPT,
    Batch,
    Config,
    Ngrams,
    Optimizer,
    Runtime,
    Trainer,
    UserError,
    Windows,
    check_config,
    config_as_text,
    config_from_text,
    gather_sequences,
    ngram_hash,
    nothing_changes,
    parse_args,
    validate,
)

sys.path.insert(0, str(ROOT / "tools"))
from generate import continue_text

ORDERS, ROWS, DIM = (3, 4), 1001, 32
WINDOWS = Windows(8, 24)


def ngram_config(**changes: object) -> Config:
    fields = {"ngram_orders": ORDERS, "ngram_rows": ROWS, "ngram_lr": 0.1}
    return tiny_config(**{**fields, **changes})


def few_tokens(seed: int, lengths: list[int], num_ids: int = 4) -> Batch:
    """A sequence over few ids and the start token, so that n-grams occur again."""
    return random_batch(seed, lengths, num_ids=num_ids)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def empty_model(config: Config, runtime: Runtime) -> GPT:
    """With every parameter random, and no rows of n-grams yet."""
    model = trained_like(config, runtime)
    model.ngrams.reset()
    return model


def fill(model: GPT, seed: int = 5) -> None:
    model.ngrams.table.copy_(gaussian(*model.ngrams.table.shape, seed=seed))


# Rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "orders", "num_rows"),
    [
        ([30, 1, 33], (3, 4), 2**23),
        ([64], (1, 3, 7), 1000),
        ([2], (3,), 2),
        ([1, 1, 1, 5, 20], (31,), 17),
        ([40], (2, 31), 2**30 - 1),
    ],
)
def test_rows_are_those_of_brute_force(lengths, orders, num_rows):
    tokens = random_batch(1, lengths).tokens
    tokens[-2:] = torch.tensor([50_303, 0])  # the largest that the tables have, and the smallest
    rows = ngram_hash(tokens, orders, num_rows)
    assert rows.dtype == torch.int32
    assert rows.tolist() == ngram_rows(tokens.tolist(), orders, num_rows)
    for i, order in enumerate(orders):
        begins = torch.arange(len(tokens)) < order - 1
        assert torch.equal(rows[:, i] == (num_rows - 1) * len(orders) + i, begins)


def test_row_is_of_the_last_n_tokens_alone():
    """Wherever they are, also across the start of a document."""
    tokens = few_tokens(2, [30, 1, 200], num_ids=3).tokens
    rows = ngram_hash(tokens, (2, 3, 4), 2**23)
    for i, order in enumerate((2, 3, 4)):
        found = defaultdict(set)
        for t in range(order - 1, len(tokens)):
            found[tuple(tokens[t - order + 1 : t + 1].tolist())].add(rows[t, i].item())
        assert all(len(kinds) == 1 for kinds in found.values())
        assert len(set().union(*found.values())) == len(found) > 9  # no two share a row


def test_rows_are_spread_evenly():
    """As balls in urns: n-grams of frequent tokens, in 2^16 rows."""
    tokens = torch.randint(0, 100, (2**16,), generator=torch.manual_seed(0), dtype=torch.int32)
    for order in ORDERS:
        grams = tokens.unfold(0, order, 1).long() @ (100 ** torch.arange(order))
        rows = ngram_hash(tokens, (order,), 2**16)[order - 1 :, 0]
        expected = 2**16 * (1 - math.exp(-len(grams.unique()) / 2**16))
        assert len(rows.unique()) == pytest.approx(expected, rel=0.01)


# Lookups and gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("match_orders", [(), (2,)], ids=["alone", "with matches"])
def test_lookup_and_its_gradients(runtime, match_orders):
    """The rows of a token are summed, with the lookup's; gradients of the rows and of everything
    next to them are those of the definition."""
    config = ngram_config(match_orders=match_orders, match_slots=64)
    model, empty = empty_model(config, runtime), empty_model(config, runtime)
    fill(model)
    batch, grad = few_tokens(3, [30, 2, 32]), gaussian(64, 32)
    if match_orders:
        empty.matches.insert(gather_sequences([batch], runtime))
        batch = empty.with_matches(batch)
    rows = torch.tensor(ngram_rows(batch.tokens.tolist(), ORDERS, ROWS))
    looked_up = model.look_up(batch).ngrams
    expected = empty.look_up(batch).ngrams
    (looked_up * grad).sum().backward()
    (expected * grad).sum().backward()
    expected = expected.detach().clone()
    assert expected.any() == bool(match_orders)
    expected += model.ngrams.table[rows].sum(1)
    torch.testing.assert_close(looked_up.detach(), expected, rtol=1e-6, atol=1e-6)
    assert model.ngrams.pending[0].tolist() == rows.tolist()
    assert torch.equal(model.ngrams.pending[1], grad)
    for name, other in empty.named_parameters():
        assert torch.equal(getattr(model, name).grad, other.grad), name


def test_gradient_is_the_slope_of_the_loss(runtime):
    """Central differences of a micro-step's share of the loss along random changes of the rows."""
    config = ngram_config()
    model = empty_model(config, runtime)
    fill(model)
    trainer, weights = Trainer(model, runtime), torch.tensor([1.0, 0.5])
    batch, ngrams = few_tokens(4, [20, 44], num_ids=30), model.ngrams
    trainer.micro_step(batch, trainer.schedule.stage(0))
    assert ngrams.filled == 64
    total = torch.zeros_like(ngrams.table)
    for rows in ngrams.rows[:64].mT:
        total.index_add_(0, rows, ngrams.grads[:64])
    before = ngrams.table.clone()
    for seed in range(4):
        change, losses = gaussian(*before.shape, seed=100 + seed), []
        for sign in (1, -1):
            ngrams.table.copy_(before + sign * 1e-2 * change)
            with torch.no_grad():
                loss, _ = model.training_loss(batch, WINDOWS, weights)
            losses.append(loss.item() / config.sequences_per_step)
        slope = (losses[0] - losses[1]) / 2e-2
        assert slope == pytest.approx((total * change).sum().item(), rel=2e-2, abs=2e-2)


class Reference:
    """Tables as dictionaries of float64 rows, an update as its definition says."""

    def __init__(self, eps: float):
        self.eps, self.sums = eps, defaultdict(float)
        self.rows = defaultdict(lambda: torch.zeros(DIM, dtype=torch.float64))

    def update(self, rows: list[list[int]], grads: Tensor, lr: float) -> None:
        total = defaultdict(lambda: 0)
        for of_token, grad in zip(rows, grads.double(), strict=True):
            for row in of_token:
                total[row] = total[row] + grad
        for row, grad in total.items():
            self.sums[row] += grad.square().mean().item()
            self.rows[row] = self.rows[row] - lr * grad / (math.sqrt(self.sums[row]) + self.eps)


def test_steps_update_rows_as_dictionaries_do(runtime, monkeypatch):
    """Three steps of four sequences, whose n-grams occur again within and between them."""
    config = ngram_config(ngram_rows=101)
    model = empty_model(config, runtime)
    trainer = Trainer(model, runtime)
    reference, gathered, ngrams, again = Reference(config.adam_eps), [], model.ngrams, 0
    gather = Ngrams.gather

    def gather_and_keep(self: Ngrams, rows: Tensor, grads: Tensor) -> None:
        gathered.append((rows.tolist(), grads.clone()))
        gather(self, rows, grads)

    monkeypatch.setattr(Ngrams, "gather", gather_and_keep)
    for step in range(3):
        gathered.clear()
        batches = [few_tokens(10 * step + i, [20, 1, 43], num_ids=5) for i in range(4)]
        for batch in batches:
            trainer.micro_step(batch, trainer.schedule.stage(0))
        for batch, (rows, _) in zip(batches, gathered, strict=True):
            assert rows == ngram_rows(batch.tokens.tolist(), ORDERS, 101)
        trainer.optimizer.step(step, 1.0 + step, MOMENTUM)
        assert ngrams.filled == 0
        rows = [of_token for rows, _ in gathered for of_token in rows]
        again += 2 * len(rows) - len({row for of_token in rows for row in of_token})
        reference.update(rows, torch.cat([grads for _, grads in gathered]), 0.1 * (1.0 + step))
        expected = torch.stack([reference.rows[row] for row in range(202)])
        torch.testing.assert_close(ngrams.table.double(), expected, rtol=1e-3, atol=1e-5)
        assert expected.any(1).sum() > 100
    assert again > 500
    sums = torch.tensor([reference.sums[row] for row in range(202)])
    torch.testing.assert_close(ngrams.sum_squares, sums, rtol=1e-4, atol=1e-12)
    trainer.optimizer.step(3, 1.0, MOMENTUM)  # nothing was read since
    torch.testing.assert_close(ngrams.table.double(), expected, rtol=1e-3, atol=1e-5)


def test_rows_alone_learn_a_text(runtime):
    """With everything else as it is."""
    config = ngram_config(ngram_rows=4096)
    model = empty_model(config, runtime)
    trainer, losses = Trainer(model, runtime), []
    batch = few_tokens(6, [30, 34], num_ids=1000)
    for _ in range(20):
        losses.append(trainer.micro_step(batch, trainer.schedule.stage(0)).item() / 64)
        model.ngrams.update(0.3, 1e-10)
    assert losses[-1] < losses[0] - 1


def test_table_is_no_parameter(runtime):
    """Nor has the optimizer a state of its size; it starts with zeros, and the other weights as
    with any other table."""
    config = ngram_config()
    model, other = GPT(config, runtime), GPT(tiny_config(), runtime)
    assert not model.ngrams.table.any() and not model.ngrams.sum_squares.any()
    for name, param in other.named_parameters():
        assert torch.equal(getattr(model, name), param), name
    sizes = {tensor.shape for tensor in Optimizer(model, config, runtime).tensors()}
    assert model.ngrams.table.shape not in sizes and not model.ngrams.table.requires_grad


# What a row may see ------------------------------------------------------------------------------


def test_later_tokens_change_no_earlier_prediction(runtime):
    model = empty_model(ngram_config(), runtime)
    batch = few_tokens(9, [1, 30, 2, 31])

    @torch.no_grad()
    def predictions(batch: Batch) -> Tensor:
        return (model.hidden(batch, WINDOWS) @ model.head.T).log_softmax(1)

    empty = predictions(batch)
    fill(model)
    filled, rows = predictions(batch), ngram_hash(batch.tokens, ORDERS, ROWS)
    assert (empty != filled).any(1).all()
    for t in range(3, 64, 4):
        tokens = batch.tokens.clone()
        tokens[t] = (tokens[t] + 1) % 4
        mine = predictions(batch._replace(tokens=tokens, targets=batch.targets.flip(0)))
        assert torch.equal(mine[:t], filled[:t])
        assert (mine[t] != filled[t]).any()
        different = (ngram_hash(tokens, ORDERS, ROWS) != rows).nonzero()[:, 0]
        assert different.min() == t and different.max() == min(t + 3, 63)


def test_validation_reads_only(tmp_path, runtime):
    write_data(tmp_path)
    config = ngram_config(val_file=str(tmp_path / "val.bin"))
    model = empty_model(config, runtime)
    empty = validate(model, config, runtime, 200, WINDOWS)
    fill(model)
    before = model.ngrams.table.clone()
    assert validate(model, config, runtime, 200, WINDOWS) != pytest.approx(empty, abs=1e-4)
    assert torch.equal(model.ngrams.table, before)
    assert model.ngrams.pending is None and model.ngrams.filled == 0


def test_preparation_leaves_no_rows(runtime, monkeypatch):
    """Which updates rows, two times for each of two kinds of sequences; a run begins with none."""
    config = ngram_config()
    model = GPT(config, runtime)
    trainer = Trainer(model, runtime)
    seen, update = [], Ngrams.update

    def update_and_look(self: Ngrams, lr: float, eps: float) -> None:
        update(self, lr, eps)
        seen.append(self.table.any().item() and self.sum_squares.any().item())

    monkeypatch.setattr(Ngrams, "update", update_and_look)
    trainer.prepare()
    assert seen == [True] * 4
    with nothing_changes(model, trainer.optimizer):
        trainer.micro_step(few_tokens(0, [64]), trainer.schedule.stage(0))
        assert model.ngrams.filled == 64
    assert not model.ngrams.table.any() and not model.ngrams.sum_squares.any()
    assert model.ngrams.filled == 0


@pytest.mark.parametrize("name", ["causality", "targets"])
def test_model_with_rows_passes_the_check(name, tmp_path, monkeypatch):
    """The judge fills them."""
    sizes = {"ngram_orders": (2, 3), "ngram_rows": 500}
    monkeypatch.setattr(check, "SIZES", check.SIZES | sizes)
    assert check.Judge(train_gpt, tmp_path).model.ngrams.table.any(1).all()
    check.CHECKS[name](train_gpt, tmp_path)


# Options and checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ngram_orders": ()}, "--ngram_orders none: give at least one length, as 2"),
        ({"ngram_orders": (4, 3)}, "--ngram_orders 4:3: .*ascending"),
        ({"ngram_orders": (3, 3)}, "--ngram_orders 3:3: .*ascending"),
        ({"ngram_orders": (0, 3)}, "--ngram_orders 0:3: .*from 1 to 31"),
        ({"ngram_orders": (3, 32)}, "--ngram_orders 3:32: .*from 1 to 31"),
        ({"ngram_rows": -1}, "--ngram_rows -1 must be positive"),
        ({"ngram_rows": 1}, "--ngram_rows 1 leaves no row"),
        ({"ngram_rows": 2**30}, "--ngram_rows 1073741824: 2 of them, .* must be below 2.31"),
        ({"ngram_lr": -0.1}, "--ngram_lr -0.1 must not be negative"),
    ],
)
def test_check_config_names_what_cannot_work(changes, message):
    check_config(ngram_config(), 1)
    check_config(ngram_config(ngram_orders=(1, 31), ngram_rows=2, ngram_lr=0.0), 1)
    check_config(ngram_config(ngram_orders=(3,), ngram_rows=2**31 - 1), 1)
    with pytest.raises(UserError, match=message):
        check_config(ngram_config(**changes), 1)


def test_options_on_the_command_line():
    options = ["--ngram_orders", "3:4", "--ngram_rows", "384", "--ngram_lr", "1.5"]
    config = parse_args(["--preset", "speedrun", *options])
    assert (config.ngram_orders, config.ngram_rows, config.ngram_lr) == ((3, 4), 384, 1.5)
    assert config_from_text(config_as_text(config)) == config
    check_config(config, 8)
    for preset in train_gpt.PRESETS.values():
        check_config(dataclasses.replace(preset, ngram_orders=(2, 3, 4)), 1)


def test_run_and_its_checkpoint(tmp_path):
    """The rows go with the weights: they score the same, and continue a text."""
    path = tmp_path / "model.pt"
    options = {"ngram_orders": "3:4", "ngram_lr": 0.3}
    result = fork(write_data(tmp_path), **options, stop_step=6, checkpoint=path)
    assert result.returncode == 0, result.stderr
    text, record = log_of(tmp_path)
    assert "8,192 rows of hashed n-grams, 32 wide: 0.3 M weights" in text
    losses = [row["train_loss"] for row in record["steps"]]
    assert len(losses) == 6 and losses[-1] < losses[0] - 1
    model, config, _ = check.load_checkpoint(train_gpt, str(path), "cpu")
    windows = Windows(config.stages[0].window_short, config.stages[0].window_long)
    scored = model, config, cpu_runtime(), config.val_tokens, windows
    assert 20 < model.ngrams.table.any(1).sum() < 8192
    assert validate(*scored) == pytest.approx(record["summary"]["val_loss"], abs=1e-5)
    model.ngrams.table.zero_()
    assert validate(*scored) != pytest.approx(record["summary"]["val_loss"], abs=1e-3)

    saved, texts = torch.load(path), []
    table = saved["weights"].pop("ngrams.table")

    def continue_with(rows: Tensor | None) -> str:
        tables = {} if rows is None else {"ngrams.table": rows}
        torch.save(saved | {"weights": saved["weights"] | tables}, path)
        return continue_text(train_gpt, str(path), "afkp", 5, 0.0, seed=1)

    for rows in (table, gaussian(*table.shape) * 1e4):
        texts.append(continue_with(rows))
    assert texts[0].startswith("afkp") and texts[0] != texts[1]
    for rows, found in ((table[1:], r"\[8191, 32\]"), (None, r"\[0\]")):
        message = rf"model.pt: ngrams.table is {found}, .* ask for \[8192, 32\]"
        with pytest.raises(check.Unjudgeable, match=message):
            continue_with(rows)
