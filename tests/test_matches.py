"""What was read before, as the model finds it: against dictionaries, and what a row may see."""

import dataclasses
import datetime
import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    cpu_runtime,
    random_batch,
    random_documents,
    tiny_config,
    trained_like,
    write_shard,
)
from test_check import check
from test_train import log_of, run, write_data
from torch import Tensor
from transcription import ngram_rows

import train_gpt
from train_gpt import (
    GPT,
    START_TOKEN,
    Batch,
    Config,
    Optimizer,
    Trainer,
    UserError,
    Windows,
    check_config,
    check_data,
    config_as_text,
    config_from_text,
    document_starts,
    find_matches,
    note_matches_,
    note_rows,
    nothing_changes,
    parse_args,
    train,
    training_rows,
    validate,
    validation_rows,
)

ORDERS, SLOTS = (1, 2, 4), 2**20  # slots for few collisions
WINDOWS = Windows(8, 24)


class Memory:
    """What followed each context, as dictionaries, an order each."""

    def __init__(self, orders: tuple[int, ...]):
        self.followers: dict[int, dict[tuple, int]] = {order: {} for order in orders}

    def contexts(self, batch: Batch, order: int) -> list[tuple | None]:
        """Of each position, the last tokens of its document; None where it has not as many yet."""
        tokens, ends, contexts = batch.tokens.tolist(), batch.cu_seqlens.tolist(), []
        for t in range(len(tokens)):
            start = max(end for end in ends if end <= t)
            first = t - order + 1
            contexts.append(tuple(tokens[first : t + 1]) if first >= start else None)
        return contexts

    def note(self, batch: Batch) -> None:
        for order, followers in self.followers.items():
            for context, target in zip(self.contexts(batch, order), batch.targets.tolist()):
                if context is not None:
                    followers[context] = target

    def find(self, batch: Batch) -> tuple[list[int], list[int]]:
        found, which = batch.tokens.tolist(), [0] * len(batch.tokens)
        for number, (order, followers) in enumerate(self.followers.items(), 1):
            for t, context in enumerate(self.contexts(batch, order)):
                if context in followers:
                    found[t], which[t] = followers[context], number
        return found, which


def few_tokens(seed: int, lengths: list[int]) -> Batch:
    """A row over four ids and the start token, so that contexts come again."""
    return random_batch(seed, lengths, num_ids=4)


def starts_of(batch: Batch) -> Tensor:
    return document_starts(batch.cu_seqlens, len(batch.tokens))


def empty_tables(orders: tuple[int, ...] = ORDERS, slots: int = SLOTS) -> Tensor:
    return torch.full((len(orders), slots), -1)


def find(tables: Tensor, batch: Batch, orders: tuple[int, ...] = ORDERS) -> tuple[list, list]:
    found, which = find_matches(batch.tokens, starts_of(batch), tables, orders)
    assert found.dtype == which.dtype == torch.int64
    return found.tolist(), which.tolist()


def note(
    tables: Tensor, rows: Iterable[Batch], orders: tuple[int, ...] = ORDERS, base: int = 0
) -> None:
    for batch in rows:
        note_matches_(tables, batch.tokens, starts_of(batch), batch.targets, orders, base)
        base += len(batch.tokens)


def matching_config(**changes: object) -> Config:
    return tiny_config(**{"match_orders": ORDERS, "match_slots": SLOTS, **changes})


def fill(model: GPT, seeds: Iterable[int]) -> list[Batch]:
    """Let a model have read a row for every seed; the second document has but one token, a 5."""
    rows = [few_tokens(seed, [40, 1, 23]) for seed in seeds]
    for batch in rows:
        batch.tokens[39:41] = torch.tensor([1, 5])
    note_rows(model, rows, cpu_runtime())
    return rows


# Tables ------------------------------------------------------------------------------------------

STREAM = [[64], [1, 20, 2, 41], [1] * 10, [3, 1, 130], [7]]


@pytest.mark.parametrize(
    ("num_tokens", "starts"),
    [(1, (0,)), (63, (0, 5, 6)), (65, (0, 64)), (200, (0, 128, 131)), (333, (0, 1, 17, 192, 200))],
)
def test_document_starts(num_tokens, starts):
    """Also where the list is padded with the end of the row."""
    cu_seqlens = torch.tensor([*starts, num_tokens, num_tokens], dtype=torch.int32)
    expected = [max(start for start in starts if start <= t) for t in range(num_tokens)]
    assert document_starts(cu_seqlens, num_tokens).tolist() == expected


def test_matches_are_those_of_dictionaries():
    """The longest context, its latest occurrence, and none that crosses the start of a document;
    also for a row that begins within a document, as one of the validation does."""
    tables, memory, seen = empty_tables(), Memory(ORDERS), set()
    assert find(tables, few_tokens(0, [9])) == (few_tokens(0, [9]).tokens.tolist(), [0] * 9)
    rows = [few_tokens(seed, lengths) for seed, lengths in enumerate(STREAM)]
    base = 0
    for batch in rows:
        reader = few_tokens(100 + len(batch.tokens), [30, 1, 33])
        reader.tokens[0] = 2
        for reads in (batch, reader):
            found = find(tables, reads)
            assert found == memory.find(reads)
            seen |= set(found[1])
        note(tables, [batch], base=base)
        memory.note(batch)
        base += len(batch.tokens)
        assert find(tables, batch) == memory.find(batch)
    assert seen == {0, 1, 2, 3}


def test_latest_occurrence_stays_in_whichever_order_rows_are_entered():
    rows = [few_tokens(seed, lengths) for seed, lengths in enumerate(STREAM)]
    bases = np.cumsum([0] + [sum(lengths) for lengths in STREAM]).tolist()
    forward, backward = empty_tables(), empty_tables()
    note(forward, rows)
    for base, batch in reversed(list(zip(bases, rows))):
        note(backward, [batch], base=base)
    assert torch.equal(forward, backward)
    assert ((forward >= 0).sum(1) > 0).all()


def test_shared_slots_forget_but_do_not_mix_contexts_up():
    """What is found is what followed this very context, of a shorter order at most."""
    tables, memory = empty_tables(slots=16), Memory(ORDERS)
    rows = [random_batch(seed, [30, 34], num_ids=50) for seed in range(20)]
    note(tables, rows)
    for batch in rows:
        memory.note(batch)
    by_order, forgotten = [Memory((order,)) for order in ORDERS], 0
    for one, order in zip(by_order, ORDERS):
        one.followers = {order: memory.followers[order]}
    for batch in rows:
        expected = [one.find(batch)[0] for one in by_order]
        longest = memory.find(batch)[1]
        for t, (token, number) in enumerate(zip(*find(tables, batch))):
            assert number <= longest[t]
            assert token == (expected[number - 1][t] if number else batch.tokens[t])
            forgotten += number < longest[t]
    assert forgotten > 100
    assert ((tables >= 0).sum(1) > 10).all()


# What a row may see ------------------------------------------------------------------------------


def test_later_tokens_change_no_earlier_prediction(runtime):
    """With tables of earlier rows, in which most contexts match; targets change none at all."""
    config = matching_config()
    model = trained_like(config, runtime)
    fill(model, range(5))
    before, batch = model.matches.clone(), few_tokens(9, [1, 30, 2, 31])
    log_probabilities = {}
    for name, tables in (("empty", empty_tables()), ("filled", before)):
        model.matches.copy_(tables)
        with torch.no_grad():
            logits = 23 * torch.sigmoid((model.hidden(batch, WINDOWS) @ model.head.T + 5) / 7.5)
        log_probabilities[name] = logits.log_softmax(1)
    assert (log_probabilities["empty"] != log_probabilities["filled"]).any(1).all()
    assert sum(find(before, batch)[1]) > 64
    changes = 0
    for t in range(0, 64, 3):
        tokens = batch.tokens.clone()
        tokens[t] = (tokens[t] + 1) % 4
        other = batch._replace(tokens=tokens, targets=batch.targets.flip(0))
        with torch.no_grad():
            logits = 23 * torch.sigmoid((model.hidden(other, WINDOWS) @ model.head.T + 5) / 7.5)
        assert torch.equal(logits.log_softmax(1)[:t], log_probabilities["filled"][:t])
        changes += find(before, other)[0][t + 1 :] != find(before, batch)[0][t + 1 :]
    assert changes > 5
    assert torch.equal(model.matches, before)


def write_few_tokens(folder: Path) -> dict[str, str]:
    """Shards of documents over four ids, and the options that name them."""
    lengths = np.random.default_rng(0).integers(2, 30, 100).tolist()
    write_shard(folder / "train.bin", random_documents(1, lengths, num_ids=4))
    write_shard(folder / "val.bin", random_documents(2, lengths[:20], num_ids=4))
    return {"train_files": str(folder / "train.bin"), "val_file": str(folder / "val.bin")}


def test_training_matches_earlier_steps_only(tmp_path, runtime, monkeypatch):
    """Of every row of a run what it matched is what dictionaries of the rows of earlier steps have:
    nothing of the preparation, of validations, of itself and of the rows beside it."""
    config = matching_config(
        **write_few_tokens(tmp_path), num_steps=4, extension_steps=1, rows_per_step=4, val_every=1
    )
    seen, matches, compute = [], [], Trainer.micro_step

    def find_and_keep(*args: object) -> tuple[Tensor, Tensor]:
        matches.append(find_matches(*args))
        return matches[-1]

    def compute_and_keep(self: Trainer, batch: Batch, step: int) -> Tensor:
        loss = compute(self, batch, step)
        seen.append((batch, *(x.tolist() for x in matches[-1])))
        return loss

    monkeypatch.setattr(train_gpt, "find_matches", find_and_keep)
    monkeypatch.setattr(Trainer, "micro_step", compute_and_keep)
    monkeypatch.setattr(train_gpt, "draw_curve", lambda log: "not drawn")
    train(config, runtime)
    assert all(math.isfinite(row["train_loss"]) for row in runtime.log.data["steps"])
    validated = len(runtime.log.data["validations"]) * math.ceil(200 / config.val_row_tokens)
    assert len(matches) == len(seen) + validated + 1  # the preparation's row of a validation
    shapes = [(64, 48)] * 16 + [(64, 64)] * 4
    memory, stream, others = Memory(ORDERS), training_rows(config, cpu_runtime(), shapes), 0
    for step in range(5):
        rows = seen[len(seen) - 20 + 4 * step :][:4]
        for batch, found, which in rows:
            assert torch.equal(batch.tokens, next(stream).tokens)
            assert (found, which) == memory.find(batch)
            assert any(which) == (step > 0)
        for batch, *_ in rows[:-1]:
            memory.note(batch)
        batch, found, _ = rows[-1]
        others += memory.find(batch)[0] != found
        memory.note(batch)
    assert others == 5  # had rows seen those beside them, it would show


def test_validation_matches_what_it_has_scored(tmp_path, runtime, monkeypatch):
    """And what training had read: of every row what dictionaries have of earlier groups of rows."""
    config, matches = matching_config(**write_few_tokens(tmp_path), rows_per_step=2), []
    model, memory = trained_like(config, runtime), Memory(ORDERS)
    for batch in fill(model, range(2)):
        memory.note(batch)
    monkeypatch.setattr(
        train_gpt, "find_matches", lambda *x: matches.append(find_matches(*x)) or matches[-1]
    )
    validate(model, config, runtime, 280, WINDOWS)
    rows, differ = list(validation_rows(config, runtime, 280)), 0
    assert len(rows) == len(matches) == 5
    for i, (batch, found) in enumerate(zip(rows, matches)):
        assert tuple(x.tolist() for x in found) == memory.find(batch)
        if i % 2:
            before = memory.find(batch)
            for scored in rows[i - 1 : i + 1]:
                memory.note(scored)
            differ += memory.find(batch) != before
    assert differ == 2


def test_validation_forgets_what_it_has_scored(tmp_path, runtime):
    config = matching_config(**write_few_tokens(tmp_path), rows_per_step=1)
    model = trained_like(config, runtime)
    empty = validate(model, config, runtime, 200, WINDOWS)
    assert (model.matches == -1).all()
    fill(model, range(3))
    before = model.matches.clone()
    assert validate(model, config, runtime, 200, WINDOWS) != pytest.approx(empty, abs=1e-4)
    assert torch.equal(model.matches, before) and model.num_noted == 3 * 64


def test_nothing_that_was_read_in_between_stays(runtime):
    config = matching_config()
    model = GPT(config, runtime)
    assert (model.matches == -1).all()
    with nothing_changes(model, Optimizer(model, config, runtime)):
        fill(model, range(2))
        assert ((model.matches >= 0).sum(1) > 0).all()
    assert (model.matches == -1).all()
    assert GPT(tiny_config(), runtime).matches is None


# Ranks -------------------------------------------------------------------------------------------

STEPS = [(64, 48), (64, 48), (96, 64)]  # tokens and longest documents of the rows of a step


def read_stream(folder: str, rank: int, world_size: int) -> tuple[Tensor, int]:
    """The tables behind three steps of four rows, and how many tokens they are of."""
    config = matching_config(train_files=f"{folder}/train.bin", match_slots=64)
    count = 4 // world_size
    shapes = [shape for shape in STEPS for _ in range(count)]
    rows = training_rows(config, cpu_runtime(rank, world_size), shapes)
    model = SimpleNamespace(config=config, matches=empty_tables(slots=64))
    model.num_noted = torch.zeros(1, dtype=torch.int64)
    runtime = cpu_runtime(rank, world_size)
    for _ in STEPS:
        note_rows(model, [next(rows) for _ in range(count)], runtime)
    return model.matches, model.num_noted.item()


def validation_loss(folder: str, rank: int, world_size: int) -> float:
    """Of five rows of which two are scored at a time."""
    files = {"train_files": f"{folder}/train.bin", "val_file": f"{folder}/val.bin"}
    config, runtime = matching_config(**files, rows_per_step=2), cpu_runtime(rank, world_size)
    return validate(trained_like(config, runtime), config, runtime, 280, WINDOWS)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    saved = *read_stream(folder, rank, 2), validation_loss(folder, rank, 2)
    torch.save(saved, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_have_the_tables_of_one_process(tmp_path):
    """Of the rows in the order of the stream, in slots that many contexts share. And the same loss
    in validation, where the last group has a row on one rank alone."""
    write_few_tokens(tmp_path)
    tables, count = read_stream(str(tmp_path), 0, 1)
    loss = validation_loss(str(tmp_path), 0, 1)
    assert count == 4 * 64 + 4 * 64 + 4 * 96
    assert (tables >= 0).sum() > 60
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        *read, found = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(read[0], tables)
        assert read[1] == count
        assert found == pytest.approx(loss, rel=1e-6)


# Lookups and their gradients ---------------------------------------------------------------------


def match_gains(model: GPT, vector: Tensor) -> Tensor:
    return dict(zip(model.small_layout, model.cut_small(vector)))["match"]


@pytest.mark.parametrize("read", [True, False], ids=["matches", "none"])
def test_match_embedding_and_its_gradients(runtime, read):
    """The row of the last table of values for what is found, by the gain of its order; where
    nothing is, of the token itself, by the first gain."""
    config = matching_config()
    model = trained_like(config, runtime)
    memory, vocab = Memory(ORDERS), config.padded_vocab_size
    for batch in fill(model, range(2)) if read else []:
        memory.note(batch)
    batch = random_batch(7, [30, 2, 32], num_ids=7)
    batch.tokens[10:12] = torch.tensor([1, 5])  # read in two documents
    batch.tokens[29:31] = torch.tensor([1, 2])  # and the other way round
    found, which = memory.find(batch)
    assert [which[11], which[30]] == [int(read)] * 2
    assert set(which) == ({0, 1, 2, 3} if read else {0})
    grad = torch.randn(64, 32, generator=torch.manual_seed(0), dtype=torch.float64)
    for param in model.parameters():
        param.grad.fill_(2.0)
    lookups = model.look_up(batch)
    (lookups.ngrams * grad).sum().backward()

    table = model.value_embed.detach()[2 * vocab :].double().requires_grad_()
    gains = match_gains(model, model.small).detach().double().requires_grad_()
    assert len(table) == vocab and len(lookups.values) == 2 and gains.shape == (4,)
    rows = ngram_rows(batch.tokens.tolist(), (2,), config.ngram_rows)
    ngrams = model.ngrams.table[torch.tensor(rows)[:, 0]].double().requires_grad_()
    expected = torch.stack(
        [
            ngram + gains[number] * F.pad(table[token], (0, 16))  # as wide as values are
            for ngram, token, number in zip(ngrams, found, which, strict=True)
        ]
    )
    torch.testing.assert_close(lookups.ngrams.double(), expected, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad((expected * grad).sum(), (table, gains, ngrams))
    grads = model.value_embed.grad[2 * vocab :], match_gains(model, model.small.grad)
    for value, reference in zip(grads, expected):
        torch.testing.assert_close(value.double() - 2, reference, rtol=1e-4, atol=1e-5)
    assert model.ngrams.left[0][:, None].tolist() == rows
    torch.testing.assert_close(model.ngrams.left[1].double(), expected[2], rtol=1e-4, atol=1e-5)
    assert (model.value_embed.grad[: 2 * vocab] == 2).all()
    touched = (grads[0] != 2).any(1).nonzero().flatten().tolist()
    assert touched == sorted(set(found))


def test_gains_start_with_none_for_no_match(runtime):
    """So that the first rows are those of a model without matches."""
    model = GPT(matching_config(), runtime)
    assert match_gains(model, model.small).tolist() == [0, 1, 1, 1]
    assert len(model.value_embed) == 3 * model.config.padded_vocab_size
    with torch.no_grad():
        table = model.ngrams.table.normal_(generator=torch.manual_seed(0))
        batch = few_tokens(3, [64])
        ngrams = model.look_up(batch).ngrams
        rows = ngram_rows(batch.tokens.tolist(), (2,), model.config.ngram_rows)
        assert torch.equal(ngrams, table[torch.tensor(rows)[:, 0]])
        fill(model, [3])  # the same tokens
        difference = model.look_up(batch).ngrams - ngrams
    assert (difference != 0).any(1).all()


# Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match_orders": (3, 2)}, "--match_orders 3:2: .*ascending"),
        ({"match_orders": (3, 3)}, "--match_orders 3:3: .*ascending"),
        ({"match_orders": (0, 3)}, "--match_orders 0:3: .*from 1 to 31"),
        ({"match_orders": (-2,)}, "--match_orders -2: .*from 1 to 31"),
        ({"match_orders": (3, 32)}, "--match_orders 3:32: .*from 1 to 31"),
        ({"match_slots": 0}, "--match_slots 0 is no power of two"),
        ({"match_slots": -4}, "--match_slots -4 is no power of two"),
        ({"match_slots": 1000}, "--match_slots 1000 is no power of two"),
    ],
)
def test_check_config_names_what_cannot_match(changes, message):
    for orders in ((), (1,), (1, 31), (3, 4, 5)):
        check_config(matching_config(match_orders=orders, match_slots=1), 1)
    with pytest.raises(UserError, match=message):
        check_config(matching_config(**changes), 1)


@pytest.mark.parametrize(("text", "orders"), [("3:4:6", (3, 4, 6)), ("5", (5,)), ("none", ())])
def test_orders_on_the_command_line(text, orders):
    config = parse_args(["--match_orders", text, "--match_slots", "64"])
    assert (config.match_orders, config.match_slots) == (orders, 64)
    fields = config_as_text(config)
    assert fields["match_orders"] == text
    assert config_from_text(fields) == config


@pytest.mark.parametrize("text", ["3:x", "3.5", "3,4", "3::4", "true"])
def test_orders_that_cannot_be_read_are_named(text, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(["--match_orders", text])
    assert ended.value.code == 2
    assert "argument --match_orders:" in capsys.readouterr().err


def test_check_data_refuses_matches_of_what_is_repeated(tmp_path, monkeypatch):
    """Which would foretell it; and a stream longer than its positions."""
    write_shard(tmp_path / "train.bin", [START_TOKEN] * 1000)
    write_shard(tmp_path / "val.bin", [START_TOKEN] * 50)
    files = {"train_files": str(tmp_path / "train.bin"), "val_file": str(tmp_path / "val.bin")}
    config = matching_config(**files, repeat_data=True)
    assert check_data(config, [(999, 1000)]) == 49
    with pytest.raises(UserError, match="--match_orders: the schedule reads 1000 tokens"):
        check_data(config, [(1000, 1000)])
    assert check_data(dataclasses.replace(config, match_orders=()), [(1000, 1000)]) == 49
    monkeypatch.setattr(train_gpt, "read_shard_header", lambda path: 2**33)
    config = dataclasses.replace(config, repeat_data=False)
    assert check_data(config, [(2**31 - 201, 1000)]) == 200
    with pytest.raises(UserError, match=r"--match_orders: the schedule reads .*2\^31"):
        check_data(config, [(2**31 - 200, 1000)])


# A whole run -------------------------------------------------------------------------------------


def test_run_with_matches(tmp_path):
    options = {"match_orders": "2:3", "match_slots": 4096, "stop_step": 13}
    result = run(write_data(tmp_path), **options, checkpoint=tmp_path / "model.pt")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    _, record = log_of(tmp_path)
    assert record["config"]["match_orders"] == "2:3"
    losses = [row["train_loss"] for row in record["steps"]]
    losses += [row["val_loss"] for row in record["validations"]]
    assert len(losses) == 13 + 2
    assert all(0 < loss < 12 for loss in losses)
    # what was read goes with the weights: they score the same
    model, config, _ = check.load_checkpoint(train_gpt, str(tmp_path / "model.pt"), "cpu")
    windows = Windows(config.stages[-1].window_short, config.stages[-1].window_long)
    scored = model, config, cpu_runtime(), check_data(config, []), windows
    assert validate(*scored) == pytest.approx(losses[-1], abs=1e-5)
    model.matches.fill_(-1)
    assert validate(*scored) != pytest.approx(losses[-1], abs=1e-3)


class Filled(check.Judge):
    """A judge whose model has read every token, and has seen the judge's own documents."""

    def __init__(self, script: object, folder: Path, **changes: object):
        super().__init__(script, folder, **changes)
        vocab, orders = self.config.vocab_size, self.config.match_orders
        tokens = torch.arange(vocab, dtype=torch.int32)
        targets = torch.randperm(vocab, generator=torch.manual_seed(0))
        note_matches_(self.model.matches, tokens, torch.zeros_like(tokens), targets, orders, 0)
        for seed in (1, 2, 3, 4):
            known = torch.from_numpy(check.random_tokens(script, seed, 33)) % vocab
            starts = torch.zeros(32, dtype=torch.int32)
            row = known[:-1].int(), starts, known[1:]
            note_matches_(self.model.matches, *row, orders, vocab + 32 * seed)


@pytest.mark.parametrize("name", check.CHECKS)
def test_model_with_matches_passes_the_check(name, tmp_path, monkeypatch):
    sizes = check.SIZES | {"match_orders": (1, 2, 3), "match_slots": 2**20}
    monkeypatch.setattr(check, "SIZES", sizes)
    monkeypatch.setattr(check, "Judge", Filled)
    matched = []

    def find_and_keep(*args: object) -> tuple[Tensor, Tensor]:
        matched.append(find_matches(*args))
        return matched[-1]

    monkeypatch.setattr(train_gpt, "find_matches", find_and_keep)
    check.CHECKS[name](train_gpt, tmp_path)
    if name != "coverage":  # which runs no model
        share = torch.cat([which for _, which in matched]).bool().float().mean()
        assert share > 0.5
