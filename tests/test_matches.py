"""N-gram lookup in what was read before: against dictionaries, and what a sequence may depend
on."""

import copy
import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    cpu_runtime,
    on_ranks,
    random_batch,
    random_documents,
    tiny_config,
    trained_like,
    write_shard,
)
from test_check import check
from test_data import reference_rows, row_of, write_shards
from test_train import log_of, read_shard, run, write_data
from torch import Tensor
from transcription import ngram_rows

import train_gpt
from train_gpt import (
    GPT,
    MAX_VOTES,
    START_TOKEN,
    Batch,
    Clock,
    Config,
    Optimizer,
    Runtime,
    Trainer,
    UserError,
    Windows,
    check_config,
    check_data,
    config_as_text,
    config_from_text,
    context_keys,
    document_starts,
    find_matches,
    find_train_files,
    insert_matches_,
    insert_sequences,
    insert_shards,
    nothing_changes,
    parse_args,
    train,
    training_batches,
    validate,
    validation_batches,
)

ORDERS, SLOTS = (1, 2, 4), 2**20  # slots for few collisions
WINDOWS = Windows(8, 24)


def vote(held: tuple[object, int] | None, token: object) -> tuple[object, int]:
    """Boyer and Moore's: the candidate and its votes after this one."""
    other, lead = held or (token, 0)
    if other == token:
        return token, min(lead + 1, MAX_VOTES)
    return (other, lead - 1) if lead > 1 else (token, 1)


class Memory:
    """What follows each context by the votes, and how many, as dictionaries, one for each order."""

    def __init__(self, orders: tuple[int, ...]):
        self.held: dict[int, dict[tuple, tuple[int, int]]] = {order: {} for order in orders}

    def contexts(self, batch: Batch, order: int) -> list[tuple | None]:
        """Of each position, the last tokens of its document; None where it has not as many yet."""
        tokens, ends, contexts = batch.tokens.tolist(), batch.cu_seqlens.tolist(), []
        for t in range(len(tokens)):
            start = max(end for end in ends if end <= t)
            first = t - order + 1
            contexts.append(tuple(tokens[first : t + 1]) if first >= start else None)
        return contexts

    def note(self, rows: Iterable[Batch]) -> None:
        """Sequences of one call: each position votes on the entry before the call, and of the
        entries of one context the one with the most votes counts, of these the one for the largest
        token."""
        for order, held in self.held.items():
            votes: dict[tuple | None, list[tuple[int, int]]] = {}
            for batch in rows:
                for context, target in zip(self.contexts(batch, order), batch.targets.tolist()):
                    votes.setdefault(context, []).append(vote(held.get(context), target))
            votes.pop(None, None)
            held |= {context: max(each, key=lambda x: x[::-1]) for context, each in votes.items()}

    def find(self, batch: Batch) -> tuple[list[int], list[int]]:
        """Of the contexts in the table the one with the largest sum of its place among the orders
        and twice its votes, of equals the longest."""
        found, which = batch.tokens.tolist(), [0] * len(batch.tokens)
        best = [(0, 0)] * len(found)
        for i, (order, held) in enumerate(self.held.items()):
            for t, context in enumerate(self.contexts(batch, order)):
                token, lead = held.get(context, (None, 0))
                if lead and (i + 2 * lead, i) > best[t]:
                    best[t] = i + 2 * lead, i
                    found[t], which[t] = token, MAX_VOTES * i + lead
        return found, which


def few_tokens(seed: int, lengths: list[int]) -> Batch:
    """A sequence over four ids and the start token, so that contexts occur again."""
    return random_batch(seed, lengths, num_ids=4)


def starts_of(batch: Batch) -> Tensor:
    return document_starts(batch.cu_seqlens, len(batch.tokens))


def empty_tables(orders: tuple[int, ...] = ORDERS, slots: int = SLOTS) -> Tensor:
    return torch.zeros((len(orders), slots), dtype=torch.int32)


def find(tables: Tensor, batch: Batch, orders: tuple[int, ...] = ORDERS) -> tuple[list, list]:
    found, which = find_matches(batch.tokens, starts_of(batch), tables, orders)
    assert found.dtype == which.dtype == torch.int64
    return found.tolist(), which.tolist()


def note(tables: Tensor, rows: Iterable[Batch], orders: tuple[int, ...] = ORDERS) -> None:
    """A call for each sequence."""
    for batch in rows:
        insert_matches_(tables, batch.tokens, starts_of(batch), batch.targets, orders)


def matching_config(**changes: object) -> Config:
    return tiny_config(**{"match_orders": ORDERS, "match_slots": SLOTS, **changes})


def note_taker(**changes: object) -> SimpleNamespace:
    """What insert_sequences and insert_shards need of a model."""
    config = matching_config(**changes)
    return SimpleNamespace(config=config, matches=empty_tables(slots=config.match_slots))


def fill(model: GPT, seeds: Iterable[int]) -> list[Batch]:
    """Let a model have read a step of one sequence for every seed; the second document has but one
    token, a 5."""
    rows = [few_tokens(seed, [40, 1, 23]) for seed in seeds]
    for batch in rows:
        batch.tokens[39:41] = torch.tensor([1, 5])
    insert_sequences(model, rows, cpu_runtime())
    return rows


# Tables ------------------------------------------------------------------------------------------

STREAM = [[64], [1, 20, 2, 41], [1] * 10, [3, 1, 130], [7]]


@pytest.mark.parametrize(
    ("num_tokens", "starts"),
    [(1, (0,)), (63, (0, 5, 6)), (65, (0, 64)), (200, (0, 128, 131)), (333, (0, 1, 17, 192, 200))],
)
def test_document_starts(num_tokens, starts):
    """Also where the list is padded with the end of the sequence."""
    cu_seqlens = torch.tensor([*starts, num_tokens, num_tokens], dtype=torch.int32)
    expected = [max(start for start in starts if start <= t) for t in range(num_tokens)]
    assert document_starts(cu_seqlens, num_tokens).tolist() == expected


def test_lookup_agrees_with_dictionaries():
    """The context of largest order and votes together, with every number of votes, and none that
    crosses the start of a document; also for a sequence that begins within a document, as in
    validation."""
    tables, memory, seen = empty_tables(), Memory(ORDERS), set()
    assert find(tables, few_tokens(0, [9])) == (few_tokens(0, [9]).tokens.tolist(), [0] * 9)
    rows = [few_tokens(seed, lengths) for seed, lengths in enumerate(STREAM) for _ in range(8)]
    for batch in rows:
        reader = few_tokens(100 + len(batch.tokens), [30, 1, 33])
        reader.tokens[0] = 2
        for reads in (batch, reader):
            found = find(tables, reads)
            assert found == memory.find(reads)
            seen |= set(found[1])
        note(tables, [batch])
        memory.note([batch])
        assert find(tables, batch) == memory.find(batch)
    assert seen == {*range(1 + MAX_VOTES * 3)}


def pair(token: int, target: int = 0) -> Batch:
    """A sequence of one token."""
    ends = torch.tensor([0, 1], dtype=torch.int32)
    return Batch(torch.tensor([token]).int(), torch.tensor([target]), ends, 1)


def test_the_same_token_adds_a_vote_and_another_removes_one():
    """Up to 3; after a single vote the other takes its place."""
    tables = empty_tables((1,))
    expected = [(9, 1), (9, 2), (9, 3), (9, 3), (9, 2), (9, 1), (6, 1), (6, 2), (6, 1), (5, 1)]
    for target in [9] * 4 + [6] * 4 + [5] * 2:
        note(tables, [pair(3, target)], (1,))
        token, lead = expected.pop(0)
        assert find(tables, pair(3), (1,)) == ([token], [lead])
    assert not expected


def test_votes_protect_a_slot_from_other_contexts():
    """In a slot for all of them."""
    tables, held = empty_tables((1,), slots=1), [(3, 1), (3, 2), (3, 3), (3, 2), (3, 1)]
    held += [(4, 1), (4, 2), (4, 1), (3, 1)]
    followers = {3: 9, 4: 8}
    for token in [3] * 3 + [4] * 4 + [3] * 2:
        note(tables, [pair(token, followers[token])], (1,))
        context, lead = held.pop(0)
        assert find(tables, pair(context), (1,)) == ([followers[context]], [lead])
        assert find(tables, pair(7 - context), (1,)) == ([7 - context], [0])  # the other one
    assert not held


def test_entries_of_slots_that_contexts_share():
    """To the bit: all of a call read what was there before it, and of what writes to one slot the
    largest entry counts. What is no context yet empties slot 0."""
    tables, leads, emptied = empty_tables(slots=16), set(), 0
    expected = [[0] * 16 for _ in ORDERS]
    for seed in range(36):
        batch = few_tokens(seed // 4, [30, 1, 33])
        slots, checks, _ = context_keys(batch.tokens, starts_of(batch), ORDERS, 16)
        for i, order in enumerate(ORDERS):
            contexts, written = Memory((order,)).contexts(batch, order), {}
            for t, target in enumerate(batch.targets.tolist()):
                slot, entry = 0, 0
                if contexts[t] is not None:
                    slot, before = slots[i, t].item(), expected[i][slots[i, t].item()]
                    held = (before % 2**29, before >> 29) if before else None
                    fact, lead = vote(held, checks[i, t].item() << 16 | target)
                    entry = lead << 29 | fact
                written.setdefault(slot, []).append(entry)
            for slot, entries in written.items():
                expected[i][slot] = max(entries)
                leads.add(max(entries) >> 29)
                emptied += max(entries) == 0
        note(tables, [batch])
        assert tables.tolist() == expected
    assert leads >= {1, 2, 3} and emptied > 0


def test_shared_slots_lose_contexts_but_do_not_confuse_them():
    """What is found has followed this very context, in at least as many sequences as its votes. Of
    contexts in other sequences one in 8192 has the check bits of what it finds."""
    tables, memory, followed = empty_tables(slots=16), Memory(ORDERS), Counter()
    rows, leads, forgotten = [], set(), 0
    for i in range(80):
        rows.append(random_batch(i // 4, [30, 34], num_ids=50))
        note(tables, rows[-1:])
        memory.note(rows[-1:])
        for order in ORDERS:
            contexts = memory.contexts(rows[-1], order)
            followed.update({*zip(contexts, rows[-1].targets.tolist())})
    for batch in rows[::4]:
        contexts = [memory.contexts(batch, order) for order in ORDERS]
        known = memory.find(batch)[1]
        for t, (token, which) in enumerate(zip(*find(tables, batch))):
            number, lead = -(-which // MAX_VOTES), (which - 1) % MAX_VOTES + 1
            if number:
                assert contexts[number - 1][t] in memory.held[ORDERS[number - 1]]
                assert lead <= followed[contexts[number - 1][t], token]
                leads.add(lead)
            else:
                assert token == batch.tokens[t]
            forgotten += which == 0 < known[t]
    assert forgotten > 100 and leads >= {2, 3}
    assert ((tables > 0).sum(1) > 10).all()


def test_sequences_of_a_step_vote_on_earlier_entries(runtime):
    """Not on one another: a step changes the votes by one, and up if any of its sequences does."""
    model = note_taker()
    for targets, token, lead in (
        ((9, 9, 9, 9), 9, 1),
        ((6, 9, 6, 6), 9, 2),
        ((9, 9, 9, 9), 9, 3),
        ((9, 9, 9, 9), 9, 3),
        ((6, 6, 6, 6), 9, 2),
        ((6, 8, 6, 8), 9, 1),
        ((6, 8, 6, 7), 8, 1),
        ((6, 9, 7, 6), 9, 1),
    ):
        insert_sequences(model, [pair(3, target) for target in targets], runtime)
        assert find(model.matches, pair(3)) == ([token], [lead])


def test_insertion_by_steps_agrees_with_dictionaries(runtime):
    """And not with those of the same sequences one after the other."""
    model, memory, alone = note_taker(), Memory(ORDERS), Memory(ORDERS)
    for step in range(5):
        rows = [few_tokens(10 * step + i, [20, 1, 43]) for i in range(4)]
        insert_sequences(model, rows, runtime)
        memory.note(rows)
        for batch in rows:
            alone.note([batch])
        for batch in (*rows, few_tokens(100 + step, [64])):
            assert find(model.matches, batch) == memory.find(batch) != alone.find(batch)
    filled = [len(held) for held in memory.held.values()]
    assert (model.matches > 0).sum(1).tolist() == filled


# What a row may see ------------------------------------------------------------------------------


def test_later_tokens_change_no_earlier_prediction(runtime):
    """With tables of earlier sequences, in which most contexts are found; targets change none at
    all."""
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


def test_an_entry_holds_votes_check_and_token():
    """As the script's comment has it."""
    votes, check, token = (torch.tensor(x) for x in (2, 5, 1234))
    entry = train_gpt.pack_votes(votes) | train_gpt.pack_content(check, token)
    assert entry == 1_074_070_738
    parts = train_gpt.votes_of(entry), train_gpt.check_of(entry), train_gpt.token_of(entry)
    assert parts == (votes, check, token)
    assert train_gpt.content_of(entry) == train_gpt.pack_content(check, token)


def test_training_looks_up_earlier_steps_only(tmp_path, runtime, monkeypatch):
    """Of every row of a run what it matched is what dictionaries of the rows of earlier steps have:
    nothing of the preparation, of validations, of itself and of the rows beside it."""
    config = matching_config(
        **write_few_tokens(tmp_path),
        num_steps=4,
        extension_steps=1,
        sequences_per_step=4,
        val_every=1,
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
    validated = len(runtime.log.data["validations"]) * math.ceil(200 / config.val_sequence_tokens)
    assert len(matches) == len(seen) + validated + 1  # the preparation's row of a validation
    stream = itertools.chain(*training_batches(config, cpu_runtime(), [(64, 48)] * 4 + [(64, 64)]))
    memory, others = Memory(ORDERS), 0
    for step in range(5):
        rows = seen[len(seen) - 20 + 4 * step :][:4]
        for batch, found, which in rows:
            assert torch.equal(batch.tokens, next(stream).tokens)
            assert (found, which) == memory.find(batch)
            assert any(which) == (step > 0)
        beside = copy.deepcopy(memory)
        beside.note([batch for batch, *_ in rows[:-1]])
        batch, found, _ = rows[-1]
        others += beside.find(batch)[0] != found
        memory.note([batch for batch, *_ in rows])
    assert others == 5  # had rows seen those beside them, it would show


def test_validation_looks_up_what_it_has_scored(tmp_path, runtime, monkeypatch):
    """And what training had read: of every sequence what dictionaries have of earlier groups."""
    config, matches = matching_config(**write_few_tokens(tmp_path), sequences_per_step=2), []
    model, memory = trained_like(config, runtime), Memory(ORDERS)
    memory.note(fill(model, range(2)))
    monkeypatch.setattr(
        train_gpt, "find_matches", lambda *x: matches.append(find_matches(*x)) or matches[-1]
    )
    validate(model, config, runtime, 280, WINDOWS)
    rows, differ = list(validation_batches(config, runtime, 280)), 0
    assert len(rows) == len(matches) == 5
    for i, (batch, found) in enumerate(zip(rows, matches)):
        assert tuple(x.tolist() for x in found) == memory.find(batch)
        if i % 2:
            before = memory.find(batch)
            memory.note(rows[i - 1 : i + 1])
            differ += memory.find(batch) != before
    assert differ == 2


def test_validation_leaves_the_tables_as_they_were(tmp_path, runtime):
    config = matching_config(**write_few_tokens(tmp_path), sequences_per_step=1)
    model = trained_like(config, runtime)
    empty = validate(model, config, runtime, 200, WINDOWS)
    assert not model.matches.any()
    fill(model, range(3))
    before = model.matches.clone()
    assert validate(model, config, runtime, 200, WINDOWS) != pytest.approx(empty, abs=1e-4)
    assert torch.equal(model.matches, before)


def test_nothing_changes_restores_the_tables(runtime):
    config = matching_config()
    model = GPT(config, runtime)
    assert not model.matches.any()
    with nothing_changes(model, Optimizer(model, config, runtime)):
        fill(model, range(2))
        assert model.matches.any(1).all()
    assert not model.matches.any()
    assert GPT(tiny_config(), runtime).matches is None


# Known shards ------------------------------------------------------------------------------------


def write_known_shards(folder: Path) -> dict[str, object]:
    """Two shards to train on and two to insert, all of them cut within documents, and the options
    that name them; a step reads 256 tokens."""
    lengths = np.random.default_rng(0).integers(2, 30, 170).tolist()
    tokens = random_documents(3, lengths, num_ids=4)
    files = {"train_files": write_shards(folder, tokens, [1000, 1600, 1900])}
    files["val_file"] = str(write_shard(folder / "val.bin", tokens[:300]))
    return {**files, "match_shards": 2, "sequences_per_step": 4}


def tokens_of(folder: Path, *shards: int) -> list[int]:
    return [token for i in shards for token in read_shard(folder / f"train_{i:02}.bin").tolist()]


def known_row(folder: Path, i: int) -> Batch:
    """A shard as one sequence, without its last few tokens, so that its length is a multiple of
    16."""
    tokens = torch.tensor(tokens_of(folder, i))
    tokens = tokens[: (len(tokens) - 1) // 16 * 16 + 1]
    starts = (tokens[:-1] == START_TOKEN).nonzero().flatten().tolist()
    ends = torch.tensor(sorted({0, *starts, len(tokens) - 1}), dtype=torch.int32)
    return Batch(tokens[:-1].int(), tokens[1:], ends, len(tokens))


def test_inserted_shards_are_the_last_ones(tmp_path, runtime):
    """Each a call of its own, whole but for less than 16 tokens; also where one begins within a
    document, of which it does not know the begin."""
    model, memory = note_taker(**write_known_shards(tmp_path)), Memory(ORDERS)
    insert_shards(model, runtime)
    rows = [known_row(tmp_path, i) for i in (2, 3)]
    for row in rows:
        memory.note([row])
    for row in (*rows, known_row(tmp_path, 0), few_tokens(1, [64])):
        assert find(model.matches, row) == memory.find(row)
    assert (model.matches > 0).sum(1).tolist() == [len(held) for held in memory.held.values()]
    before, model.config = model.matches.clone(), dataclasses.replace(model.config, match_shards=0)
    insert_shards(model, runtime)
    assert torch.equal(model.matches, before)


def test_long_shards_are_inserted_in_pieces(tmp_path, runtime):
    size = 2**18
    tokens = random_documents(0, [1000] * 300, num_ids=4)[: size + 105]
    write_shard(tmp_path / "train_0.bin", tokens)
    write_shard(tmp_path / "train_1.bin", tokens)
    model = note_taker(train_files=str(tmp_path / "train_*.bin"), match_shards=1)
    tables = empty_tables()
    insert_shards(model, runtime)
    tokens, begins = torch.tensor(tokens), torch.arange(0, size + 105, 1000).int()
    for begin, end in (0, size), (size, size + 96):
        row, targets = tokens[begin:end].int(), tokens[begin + 1 : end + 1]
        starts = begins[(begins >= begin) & (begins < end)] - begin
        ends = torch.cat([torch.zeros(1).int(), starts, torch.tensor([end - begin]).int()])
        starts = document_starts(ends.unique(), len(row))
        insert_matches_(tables, row, starts, targets, ORDERS)
    assert torch.equal(model.matches, tables) and tables.any(1).all()


def test_training_with_inserted_shards(tmp_path, runtime, monkeypatch):
    """The preparation leaves the tables empty; when the clock runs, before the first step, they get
    the inserted shards and nothing else, which this step finds; steps read the other shards."""
    config = matching_config(
        **write_known_shards(tmp_path), num_steps=3, extension_steps=1, val_every=0
    )
    memory, events, micro_step = Memory(ORDERS), [], Trainer.micro_step
    prepared = []  # what the tables held before the known shards were entered
    start, started = Clock.start, []

    def start_and_tell(self: Clock) -> None:
        start(self)
        started.append(self)

    def enter_and_look(model: GPT, runtime: Runtime) -> None:
        prepared.append(model.matches.any().item())
        assert events, "the preparation finds nothing"
        assert started, "the clock stands still"
        insert_shards(model, runtime)
        for i in (2, 3):
            memory.note([known_row(tmp_path, i)])
        filled = [len(held) for held in memory.held.values()]
        assert (model.matches > 0).sum(1).tolist() == filled
        events.clear()

    def find_and_keep(*args: Tensor) -> tuple[Tensor, Tensor]:
        events.append(find_matches(*args))
        return events[-1]

    def compute_and_keep(self: Trainer, batch: Batch, step: int) -> Tensor:
        loss = micro_step(self, batch, step)
        events.append((batch, *(x.tolist() for x in events.pop())))
        return loss

    monkeypatch.setattr(Clock, "start", start_and_tell)
    monkeypatch.setattr(Trainer, "micro_step", compute_and_keep)
    monkeypatch.setattr(train_gpt, "find_matches", find_and_keep)
    monkeypatch.setattr(train_gpt, "insert_shards", enter_and_look)
    monkeypatch.setattr(train_gpt, "validate", lambda *arguments: 1.0)
    monkeypatch.setattr(train_gpt, "draw_curve", lambda log: "not drawn")
    train(config, runtime)

    assert prepared == [False]
    shapes = [(64, 48)] * 12 + [(64, 64)] * 4
    expected, ignorant = reference_rows(tokens_of(tmp_path, 0, 1), shapes), Memory(ORDERS)
    for _ in range(4):
        found, events = events[:4], events[4:]
        for batch, *of_batch in found:
            assert row_of(batch) == next(expected)[0]
            assert tuple(of_batch) == memory.find(batch) != ignorant.find(batch)
            assert all(of_batch[1])  # over four ids every token alone is known
        for notes in memory, ignorant:
            notes.note([batch for batch, *_ in found])
    assert not events and next(expected, None) is None


@pytest.mark.parametrize("count", [4, 5])
def test_match_shards_leave_some_to_train_on(tmp_path, count):
    options = write_known_shards(tmp_path)
    config = matching_config(**options | {"match_shards": count})
    message = rf"--match_shards {count}: --train_files .* has 4 shards, .*: add shards or take less"
    for refuse in (find_train_files, lambda config: check_data(config, [])):
        with pytest.raises(UserError, match=message):
            refuse(config)
    for known in range(4):
        config = matching_config(**options | {"match_shards": known})
        train_files, known_files = find_train_files(config)
        assert [*train_files, *known_files] == sorted(map(str, tmp_path.glob("train_*.bin")))
        assert len(known_files) == known


def test_check_data_reads_the_headers_of_inserted_shards(tmp_path):
    """Before anything is prepared, not when the clock runs."""
    config, path = matching_config(**write_known_shards(tmp_path)), tmp_path / "train_03.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train_03\.bin: .* bytes, expected"):
        check_data(config, [])


def test_training_ends_with_the_shards_to_train_on(tmp_path):
    config = matching_config(**write_known_shards(tmp_path) | {"sequences_per_step": 1})
    expected = list(reference_rows(tokens_of(tmp_path, 0, 1), [(64, 48)] * 25))
    rows = training_batches(config, cpu_runtime(), [(64, 48)] * 25)
    for row, _ in expected:
        assert [row_of(batch) for batch in next(rows)] == [row]
    with pytest.raises(UserError, match=f"ran out after {len(expected)} sequences"):
        next(rows)
    assert check_data(config, [(64, 48)] * 16) == 200
    with pytest.raises(UserError, match="--train_files .*: 1600 tokens, but the schedule reads at"):
        check_data(config, [(64, 48)] * 25)


# Ranks -------------------------------------------------------------------------------------------

STEPS = [(64, 48), (64, 48), (96, 64)]  # tokens and longest documents of the rows of a step


def read_stream(folder: str, rank: int, world_size: int) -> Tensor:
    """The tables after three steps of four sequences."""
    model = note_taker(train_files=f"{folder}/train.bin", match_slots=64, tokens_per_pass=128)
    runtime = cpu_runtime(rank, world_size)
    for rows in training_batches(model.config, runtime, STEPS):
        insert_sequences(model, rows, runtime)
    return model.matches


def validation_loss(folder: str, rank: int, world_size: int) -> float:
    """Of five sequences of which two are scored at a time."""
    files = {"train_files": f"{folder}/train.bin", "val_file": f"{folder}/val.bin"}
    config, runtime = matching_config(**files, sequences_per_step=2), cpu_runtime(rank, world_size)
    return validate(trained_like(config, runtime), config, runtime, 280, WINDOWS)


def trained_tables(folder: str, rank: int, world_size: int) -> Tensor:
    """The tables at the end of a run that inserts shards first."""
    files = {"train_files": f"{folder}/known/train_*.bin", "val_file": f"{folder}/val.bin"}
    steps = {"num_steps": 2, "extension_steps": 1, "val_every": 0, "match_slots": 1024}
    config, tables = matching_config(**files, **steps, match_shards=2), []

    def keep(model: GPT, *arguments: object) -> float:
        tables.append(model.matches.clone())
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "validate", keep)
        patch.setattr(train_gpt, "draw_curve", lambda log: "not drawn")
        train(config, cpu_runtime(rank, world_size))
    return tables[0]


def known_tables(folder: str, rank: int, world_size: int) -> dict[str, object]:
    """The tables of two inserted shards, and the orders that were inserted here."""
    files, entered = {"train_files": f"{folder}/known/train_*.bin"}, set()
    model = note_taker(**files, match_shards=2, match_slots=64)

    def note_and_keep(*arguments: object) -> None:
        orders, own = arguments[-2:]
        entered.update(orders[own])
        insert_matches_(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "insert_matches_", note_and_keep)
        insert_shards(model, cpu_runtime(rank, world_size))
    return {"tables": model.matches, "entered": sorted(entered)}


FUNCTIONS = read_stream, validation_loss, trained_tables, known_tables


def seen_by(
    folder: str, rank: int, world_size: int, functions: tuple[Callable, ...] = FUNCTIONS
) -> dict[str, object]:
    return {function.__name__: function(folder, rank, world_size) for function in functions}


def seen_by_rank(functions: tuple[Callable, ...], runtime: Runtime, folder: Path) -> dict:
    return seen_by(str(folder), runtime.rank, runtime.world_size, functions)


def seen_by_ranks(folder: Path, world_size: int, *functions: Callable) -> list[dict]:
    return on_ranks(functools.partial(seen_by_rank, functions), world_size, folder)


@pytest.fixture(scope="module")
def rank_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_few_tokens(folder)
    (folder / "known").mkdir()
    write_known_shards(folder / "known")
    return folder


@pytest.fixture(scope="module")
def alone_and_ranks(rank_data: Path) -> list[dict]:
    """The results of one process, and of each of two ranks."""
    return [seen_by(str(rank_data), 0, 1), *seen_by_ranks(rank_data, 2, *FUNCTIONS)]


def test_ranks_have_the_tables_of_one_process(alone_and_ranks):
    """Of the sequences in the order of the stream, in slots that many contexts share. And the same
    loss in validation, where the last group has a sequence on one rank alone."""
    alone, *ranks = alone_and_ranks
    assert alone["read_stream"].count_nonzero() > 60
    for seen in ranks:
        assert torch.equal(seen["read_stream"], alone["read_stream"])
        assert seen["validation_loss"] == pytest.approx(alone["validation_loss"], rel=1e-6)


def test_ranks_insert_the_shards_of_one_process(alone_and_ranks):
    """And have read the same steps since."""
    alone, *ranks = alone_and_ranks
    assert alone["trained_tables"].count_nonzero() > 60
    for seen in ranks:
        assert torch.equal(seen["trained_tables"], alone["trained_tables"])


def check_known(alone: dict, ranks: list[dict]) -> None:
    """To the bit, in slots that many contexts share; a rank has inserted into its own tables
    alone."""
    assert alone["tables"].any(1).all() and alone["tables"][-1].count_nonzero() > 60
    assert alone["entered"] == list(ORDERS)
    for rank, seen in enumerate(ranks):
        assert torch.equal(seen["tables"], alone["tables"]), rank
        assert seen["entered"] == list(ORDERS[rank :: len(ranks)]), rank


def test_two_ranks_divide_the_tables_of_inserted_shards(alone_and_ranks):
    alone, *ranks = (seen["known_tables"] for seen in alone_and_ranks)
    check_known(alone, ranks)


def test_more_ranks_than_tables_divide_them(alone_and_ranks, rank_data):
    """One of four has none to insert into, and reads no shard."""
    ranks = [seen["known_tables"] for seen in seen_by_ranks(rank_data, 4, known_tables)]
    check_known(alone_and_ranks[0]["known_tables"], ranks)


# Lookups and their gradients ---------------------------------------------------------------------


def match_gains(model: GPT, vector: Tensor) -> Tensor:
    return dict(zip(model.small_layout, model.cut_small(vector)))["match"]


@pytest.mark.parametrize("read", [True, False], ids=["matches", "none"])
def test_lookup_embedding_and_its_gradients(runtime, read):
    """The row of the last table of values for what is found, by the gain of its order and votes;
    where nothing is, of the token itself, by the first gain."""
    config = matching_config()
    model = trained_like(config, runtime)
    memory, vocab = Memory(ORDERS), config.padded_vocab_size
    for seeds in ((0, 1, 2), (0, 1), (0,)) if read else ():
        memory.note(fill(model, seeds))
    batch = random_batch(7, [30, 2, 32], num_ids=7)
    batch.tokens[10:12] = torch.tensor([1, 5])  # read in two documents
    batch.tokens[29:31] = torch.tensor([1, 2])  # and the other way round
    found, which = memory.find(batch)
    numbers = [-(-number // MAX_VOTES) for number in which]  # of the orders, from 1
    assert [numbers[11], numbers[30]] == [int(read)] * 2
    assert set(numbers) == ({0, 1, 2, 3} if read else {0})
    assert len(set(which)) > 8 or not read  # several leads of an order
    grad = torch.randn(64, 32, generator=torch.manual_seed(0), dtype=torch.float64)
    for param in model.parameters():
        param.grad.fill_(2.0)
    lookups = model.look_up(batch)
    (lookups.ngrams * grad).sum().backward()

    table = model.value_embed.detach()[2 * vocab :].double().requires_grad_()
    gains = match_gains(model, model.small).detach().double().requires_grad_()
    assert len(table) == vocab and len(lookups.values) == 2 and gains.shape == (1 + MAX_VOTES * 3,)
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
    assert model.ngrams.pending[0].tolist() == rows
    torch.testing.assert_close(model.ngrams.pending[1].double(), expected[2], rtol=1e-4, atol=1e-5)
    assert (model.value_embed.grad[: 2 * vocab] == 2).all()
    touched = (grads[0] != 2).any(1).nonzero().flatten().tolist()
    assert touched == sorted(set(found))


def test_gain_without_a_match_starts_at_zero(runtime):
    """So that the model begins as one without lookups."""
    model = GPT(matching_config(), runtime)
    assert match_gains(model, model.small).tolist() == [0] + [1] * MAX_VOTES * 3
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
        ({"match_shards": -1}, "--match_shards -1 must not be negative"),
        ({"match_shards": 2, "match_orders": ()}, "--match_shards 2 .* --match_orders: give some"),
    ],
)
def test_check_config_names_bad_lookup_options(changes, message):
    for orders in ((), (1,), (1, 31), (3, 4, 5)):
        shards = 5 if orders else 0
        check_config(matching_config(match_orders=orders, match_slots=1, match_shards=shards), 1)
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


def test_check_data_refuses_lookups_in_repeated_data(tmp_path):
    """Which would predict it."""
    write_shard(tmp_path / "train.bin", [START_TOKEN] * 1000)
    write_shard(tmp_path / "val.bin", [START_TOKEN] * 50)
    files = {"train_files": str(tmp_path / "train.bin"), "val_file": str(tmp_path / "val.bin")}
    config = matching_config(**files, repeat_data=True)
    assert check_data(config, [(999, 1000)]) == 49
    with pytest.raises(UserError, match="--match_orders: the schedule reads 1000 tokens"):
        check_data(config, [(1000, 1000)])
    assert check_data(dataclasses.replace(config, match_orders=()), [(1000, 1000)]) == 49


# A whole run -------------------------------------------------------------------------------------


def test_run_with_lookups(tmp_path):
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
    model.matches.zero_()
    assert validate(*scored) != pytest.approx(losses[-1], abs=1e-3)


class Filled(check.Judge):
    """A judge whose model has read every token, and has seen the judge's own documents."""

    def __init__(self, script: object, folder: Path, **changes: object):
        super().__init__(script, folder, **changes)
        vocab, orders = self.config.vocab_size, self.config.match_orders
        tokens = torch.arange(vocab, dtype=torch.int32)
        targets = torch.randperm(vocab, generator=torch.manual_seed(0))
        insert_matches_(self.model.matches, tokens, torch.zeros_like(tokens), targets, orders)
        for seed in (1, 2, 3, 4):
            known = torch.from_numpy(check.random_tokens(script, seed, 33)) % vocab
            starts = torch.zeros(32, dtype=torch.int32)
            row = known[:-1].int(), starts, known[1:]
            insert_matches_(self.model.matches, *row, orders)


@pytest.mark.parametrize("name", check.CHECKS)
def test_model_with_lookups_passes_the_check(name, tmp_path, monkeypatch):
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
