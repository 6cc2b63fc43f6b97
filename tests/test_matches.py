"""N-gram lookup in what was read before: against dictionaries, and what a sequence may depend
on."""

import copy
import dataclasses
import functools
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

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
from test_kernels import relative_error
from test_train import log_of, read_shard, run, write_data
from torch import Tensor
from transcription import (
    Entry,
    best,
    cell,
    kinds_and_tokens,
    ngram_rows,
    target_losses,
    transcribed_hidden,
)

import train_gpt
from train_gpt import (
    CELLS,
    GPT,
    MAX_COUNT,
    SPARE_PLACES,
    START_TOKEN,
    Batch,
    Clock,
    Config,
    Log,
    Matches,
    Optimizer,
    Runtime,
    Stage,
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
    gather_sequences,
    insert_matches_,
    nothing_changes,
    parse_args,
    read_matches,
    read_piece,
    read_proposal,
    shard_pieces,
    train,
    training_batches,
    validate,
    validation_batches,
)

ORDERS, SLOTS = (1, 2, 4), 2**20  # slots for few collisions
WINDOWS = Windows(8, 24)

NOTHING = (0, 0, 0, 0)


def count(held: Entry, token: int) -> Entry:
    """An entry after this token. One that it does not have takes away from the second one's count
    or, when that is used up, its place."""
    count_1, token_1, count_2, token_2 = held
    if count_1 and token == token_1:
        count_1 = min(count_1 + 1, MAX_COUNT)
    elif count_2 and token == token_2:
        count_2 = min(count_2 + 1, MAX_COUNT)
    elif count_2 > 1:
        count_2 -= 1
    else:
        count_2, token_2 = 1, token
    if count_2 > count_1:
        return count_2, token_2, count_1, token_1
    return count_1, token_1, count_2, token_2


class Memory:
    """The two tokens that followed each context, and how often, as dictionaries, one for each
    order."""

    def __init__(self, orders: tuple[int, ...]):
        self.held: dict[int, dict[tuple, Entry]] = {order: {} for order in orders}

    def contexts(self, batch: Batch, order: int) -> list[tuple | None]:
        """Of each position, the last tokens of its document; None where it has not as many yet."""
        tokens, ends, contexts = batch.tokens.tolist(), batch.cu_seqlens.tolist(), []
        for t in range(len(tokens)):
            start = max(end for end in ends if end <= t)
            first = t - order + 1
            contexts.append(tuple(tokens[first : t + 1]) if first >= start else None)
        return contexts

    def note(self, rows: Iterable[Batch]) -> None:
        """Sequences of one call: each position counts on the entry before the call, and of the
        entries of one context the largest stays: by the first one's count, then its token, and
        likewise the second one's."""
        for order, held in self.held.items():
            entries: dict[tuple | None, list[Entry]] = {}
            for batch in rows:
                for context, target in zip(self.contexts(batch, order), batch.targets.tolist()):
                    entry = count(held.get(context, NOTHING), target)
                    entries.setdefault(context, []).append(entry)
            entries.pop(None, None)
            held |= {context: max(each) for context, each in entries.items()}

    def find(self, batch: Batch) -> list[tuple[Entry, ...]]:
        """Of each position, what every order has of its context."""
        found = []
        for order, held in self.held.items():
            found.append([held.get(x, NOTHING) for x in self.contexts(batch, order)])
        return [*zip(*found)]

    def sizes(self) -> list[int]:
        return [len(held) for held in self.held.values()]


def few_tokens(seed: int, lengths: list[int]) -> Batch:
    """A sequence over four ids and the start token, so that contexts occur again."""
    return random_batch(seed, lengths, num_ids=4)


def starts_of(batch: Batch) -> Tensor:
    return document_starts(batch.cu_seqlens, len(batch.tokens))


def matching_config(**changes: object) -> Config:
    return tiny_config(**{"match_orders": ORDERS, "match_slots": SLOTS, **changes})


def empty_matches(runtime: Runtime | None = None, **changes: object) -> Matches:
    return Matches(matching_config(**changes), runtime or cpu_runtime())


def slots_of(matches: Matches) -> Tensor:
    """The table without the spare places, a row for each order."""
    return matches.table[:-SPARE_PLACES].unflatten(0, (len(matches.orders), -1))


def unpacked(half: int) -> tuple[int, int, int]:
    """Count, check and token of a half."""
    return half // 2**27, half // 2**16 % 2**11, half % 2**16


def decoded(matched: Tensor, batch: Batch, orders: tuple[int, ...] = ORDERS) -> list:
    """What was found, as Memory has it; every token there is behind the position's context."""
    assert matched.dtype == torch.int64 and matched.shape == (len(batch.tokens), len(orders))
    checks, found = context_keys(batch.tokens, starts_of(batch), orders, 1)[1].mT.tolist(), []
    for entries, own in zip(matched.tolist(), checks):
        found.append([])
        for entry, check_bits in zip(entries, own):
            parts = [unpacked(half) for half in divmod(entry, 2**31)]
            assert {parts[0][:2], parts[1][:2]} <= {(0, 0)} | {
                (most, check_bits) for most in range(1, MAX_COUNT + 1)
            }
            found[-1].append(tuple(x for most, _, token in parts for x in (most, token)))
        found[-1] = tuple(found[-1])
    return found


def find(matches: Matches, batch: Batch) -> list[tuple[Entry, ...]]:
    return decoded(matches.find(batch.tokens, starts_of(batch)), batch, matches.orders)


def note(matches: Matches, rows: list[Batch]) -> None:
    """As sequences of one step."""
    matches.insert(gather_sequences(rows, matches.runtime))


def fill(model: GPT, seeds: Iterable[int]) -> list[Batch]:
    """Let a model have read a step of one sequence for every seed; the second document has but one
    token, a 5."""
    rows = [few_tokens(seed, [40, 1, 23]) for seed in seeds]
    for batch in rows:
        batch.tokens[39:41] = torch.tensor([1, 5])
    note(model.matches, rows)
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
    """Of every order, with every count, and no context that crosses the start of a document; also
    for a sequence that begins within a document, as in validation."""
    matches, memory, seen = empty_matches(), Memory(ORDERS), set()
    assert find(matches, few_tokens(0, [9])) == [(NOTHING,) * 3] * 9
    rows = [few_tokens(seed, lengths) for seed, lengths in enumerate(STREAM) for _ in range(20)]
    for batch in rows:
        reader = few_tokens(100 + len(batch.tokens), [30, 1, 33])
        reader.tokens[0] = 2
        for reads in (batch, reader):
            found = find(matches, reads)
            assert found == memory.find(reads)
            seen |= {(entry[0], entry[2]) for entries in found for entry in entries}
        note(matches, [batch])
        memory.note([batch])
        assert find(matches, batch) == memory.find(batch)
    assert all({pair[i] for pair in seen} == {*range(MAX_COUNT + 1)} for i in range(2))
    assert slots_of(matches).count_nonzero(1).tolist() == memory.sizes()


def pair(token: int, target: int = 0) -> Batch:
    """A sequence of one token."""
    ends = torch.tensor([0, 1], dtype=torch.int32)
    return Batch(torch.tensor([token]).int(), torch.tensor([target]), ends, 1)


def after(matches: Matches, targets: Iterable[int], token: int = 3) -> list[Entry]:
    """What is found behind a token when each of these has followed it once more."""
    found = []
    for target in targets:
        note(matches, [pair(token, target)])
        ((entry,),) = find(matches, pair(token))
        found.append(entry)
    return found


def test_two_tokens_are_counted_and_others_take_away_from_the_second():
    matches = empty_matches(match_orders=(1,))
    assert after(matches, [9, 9, 6, 6, 6, 5, 5, 9, 9]) == [
        (1, 9, 0, 0),
        (2, 9, 0, 0),
        (2, 9, 1, 6),
        (2, 9, 2, 6),  # of equals the first stays
        (3, 6, 2, 9),
        (3, 6, 1, 9),
        (3, 6, 1, 5),
        (3, 6, 1, 9),
        (3, 6, 2, 9),
    ]
    assert after(matches, [6] * 20)[10:] == [(14, 6, 2, 9)] + [(15, 6, 2, 9)] * 9
    assert after(matches, [9] * 20)[11:] == [(15, 6, 14, 9)] + [(15, 6, 15, 9)] * 8


def test_contexts_share_a_slot():
    """One for all of them: it has two tokens, of one context or of two, and those that come again
    are safe from a third."""
    matches = empty_matches(match_orders=(1,), match_slots=1)

    def held() -> list[Entry]:
        return [find(matches, pair(token))[0][0] for token in (3, 4, 5)]

    assert after(matches, [9, 9, 9]) == [(1, 9, 0, 0), (2, 9, 0, 0), (3, 9, 0, 0)]
    assert held() == [(3, 9, 0, 0), NOTHING, NOTHING]
    assert after(matches, [9, 9], 4) == [(1, 9, 0, 0), (2, 9, 0, 0)]  # the same token, another half
    assert held() == [(3, 9, 0, 0), (2, 9, 0, 0), NOTHING]
    assert after(matches, [8], 5) == [NOTHING]
    assert held() == [(3, 9, 0, 0), (1, 9, 0, 0), NOTHING]
    assert after(matches, [8, 8, 8], 5) == [(1, 8, 0, 0), (2, 8, 0, 0), (3, 8, 0, 0)]
    assert held() == [(3, 9, 0, 0), NOTHING, (3, 8, 0, 0)]
    assert after(matches, [8], 5) == [(4, 8, 0, 0)]  # now it is the first
    assert after(matches, [7, 7, 7, 7], 5)[1:] == [(4, 8, 0, 0), (4, 8, 1, 7), (4, 8, 2, 7)]
    assert held() == [NOTHING, NOTHING, (4, 8, 2, 7)]


def test_entries_of_slots_that_contexts_share():
    """To the bit: all of a call read what was there before it, and of what writes to one slot the
    largest entry counts. What is no context yet is in no slot."""
    matches, counts = empty_matches(match_slots=16), set()
    expected = [[NOTHING] * 16 for _ in ORDERS]
    for seed in range(60):
        batch = few_tokens(seed // 4, [30, 1, 33])
        slots, checks, _ = context_keys(batch.tokens, starts_of(batch), ORDERS, 16)
        for i, order in enumerate(ORDERS):
            contexts, written = Memory((order,)).contexts(batch, order), defaultdict(list)
            for t, target in enumerate(batch.targets.tolist()):
                if contexts[t] is not None:
                    fact = checks[i, t].item() << 16 | target
                    slot = slots[i, t].item()
                    written[slot].append(count(expected[i][slot], fact))
            for slot, entries in written.items():
                expected[i][slot] = max(entries)
                counts |= {*expected[i][slot][::2]}
        note(matches, [batch])
        packed = [
            [(a << 27 | x) << 31 | b << 27 | y for a, x, b, y in entries] for entries in expected
        ]
        assert slots_of(matches).tolist() == packed
    assert counts >= {0, 1, 2, 3, 7, 15}


def test_insertion_gives_what_undoes_it():
    """Bit for bit, the spare places too; what was inserted last is undone first."""
    matches, states = empty_matches(match_slots=16), []
    steps = [[few_tokens(4 * step + i, [20, 1, 43]) for i in range(4)] for step in range(3)]
    note(matches, steps[0])
    inserted = []
    for rows in steps[1:]:
        states.append(matches.table.clone())
        read = gather_sequences(rows, cpu_runtime())
        place, before = insert_matches_(matches.table, *read, ORDERS, 16)
        assert torch.equal(before, states[-1][place])
        changed = (matches.table != states[-1]).nonzero().flatten()
        assert len(changed) > 20 and torch.isin(changed, place).all()
        inserted.append((place, before))
    matches.undo(inserted[1:])
    assert torch.equal(matches.table, states[1])
    inserted[1] = matches.insert(gather_sequences(steps[2], cpu_runtime()))
    matches.undo(inserted)
    assert torch.equal(matches.table, states[0])


def test_shared_slots_lose_contexts_but_do_not_confuse_them():
    """What is found has followed this very context, in at least as many sequences as are counted,
    but for one in hundreds: of the contexts of a slot one in 2048 has the check of another."""
    matches, memory, followed = empty_matches(match_slots=16), Memory(ORDERS), Counter()
    rows, counts, forgotten, confused, found = [], set(), 0, 0, 0
    for i in range(80):
        rows.append(random_batch(i // 4, [30, 34], num_ids=50))
        note(matches, rows[-1:])
        memory.note(rows[-1:])
        for order in ORDERS:
            contexts = memory.contexts(rows[-1], order)
            followed.update({*zip(contexts, rows[-1].targets.tolist())})
    for batch in rows[::4]:
        contexts = zip(*(memory.contexts(batch, order) for order in ORDERS))
        for own, entries, known in zip(contexts, find(matches, batch), memory.find(batch)):
            for context, entry in zip(own, entries):
                for most, token in (entry[:2], entry[2:]):
                    assert most == 0 or context is not None
                    found += most > 0
                    confused += most > followed[context, token]
                    counts.add(most)
            forgotten += entries == (NOTHING,) * 3 != known
    assert forgotten > 100 and counts >= {1, 4, 8}
    assert found > 400 > 100 * confused
    assert (slots_of(matches).count_nonzero(1) > 10).all()


def test_sequences_of_a_step_count_on_earlier_entries(runtime):
    """Not on one another: a step changes a count by one, and up if any of its sequences does."""
    matches = empty_matches(match_orders=(1,))
    for targets, entry in (
        ((9, 9, 9, 9), (1, 9, 0, 0)),
        ((6, 9, 6, 6), (2, 9, 0, 0)),
        ((6, 6, 6, 6), (2, 9, 1, 6)),
        ((6, 6, 7, 6), (2, 9, 2, 6)),
        ((7, 7, 7, 7), (2, 9, 1, 6)),
        ((7, 8, 7, 5), (2, 9, 1, 8)),
        ((6, 9, 7, 8), (3, 9, 1, 8)),
        ((8, 6, 8, 6), (3, 9, 2, 8)),
    ):
        note(matches, [pair(3, target) for target in targets])
        assert find(matches, pair(3)) == [(entry,)]


def test_insertion_by_steps_agrees_with_dictionaries(runtime):
    """And not with those of the same sequences one after the other."""
    matches, memory, alone = empty_matches(), Memory(ORDERS), Memory(ORDERS)
    for step in range(5):
        rows = [few_tokens(10 * step + i, [20, 1, 43]) for i in range(4)]
        note(matches, rows)
        memory.note(rows)
        for batch in rows:
            alone.note([batch])
        for batch in (*rows, few_tokens(100 + step, [64])):
            assert find(matches, batch) == memory.find(batch) != alone.find(batch)
    assert slots_of(matches).count_nonzero(1).tolist() == memory.sizes()


def test_an_entry_holds_counts_checks_and_tokens():
    """As the script's comment has it."""
    count, check_bits, token = (torch.tensor(x) for x in (2, 5, 1234))
    half = train_gpt.pack_half(count, check_bits, token)
    assert half == 268_764_370
    parts = train_gpt.count_of(half), train_gpt.check_of(half), train_gpt.token_of(half)
    assert parts == (count, check_bits, token)
    largest = torch.tensor(2**31 - 1)
    entry = train_gpt.pack_entry(largest, half)
    assert entry > 0 and train_gpt.halves_of(entry) == (largest, half)
    assert unpacked(largest.item()) == (MAX_COUNT, train_gpt.CHECKS - 1, 2**16 - 1)


# What a row may see ------------------------------------------------------------------------------


def test_later_tokens_change_no_earlier_prediction(runtime):
    """With tables of earlier sequences, in which most contexts are found; targets change none at
    all."""
    config = matching_config()
    model = trained_like(config, runtime)
    fill(model, range(5))
    before, batch = model.matches.table.clone(), few_tokens(9, [1, 30, 2, 31])

    @torch.no_grad()
    def probabilities(batch: Batch) -> Tensor:
        return model.probabilities(batch, WINDOWS, slice(None))

    of_filled, found = probabilities(batch), find(model.matches, batch)
    model.matches.table.zero_()
    assert (probabilities(batch) != of_filled).any(1).all()
    model.matches.table.copy_(before)
    assert all(any(entries[0]) for entries in found)
    changes = 0
    for t in range(0, 64, 3):
        tokens = batch.tokens.clone()
        tokens[t] = (tokens[t] + 1) % 4
        other = batch._replace(tokens=tokens, targets=batch.targets.flip(0))
        assert torch.equal(probabilities(other)[:t], of_filled[:t])
        changes += find(model.matches, other)[t + 1 :] != found[t + 1 :]
    assert changes > 5
    assert torch.equal(model.matches.table, before)


def write_few_tokens(folder: Path) -> dict[str, str]:
    """Shards of documents over four ids, and the options that name them."""
    lengths = np.random.default_rng(0).integers(2, 30, 100).tolist()
    write_shard(folder / "train.bin", random_documents(1, lengths, num_ids=4))
    write_shard(folder / "val.bin", random_documents(2, lengths[:20], num_ids=4))
    return {"train_files": str(folder / "train.bin"), "val_file": str(folder / "val.bin")}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the passes of a model make use of: a list that grows with everything that they take from
    the lookup."""
    taken = []

    def take(matched: Tensor, *more: object) -> tuple[Tensor, ...]:
        taken.append(matched)
        return read_matches(matched, *more)

    monkeypatch.setattr(train_gpt, "read_matches", take)
    return taken


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch, used: list[Tensor]) -> list[tuple[Batch, list]]:
    """The passes of training, a list that grows: the batch and what was found for it."""
    seen, compute = [], Trainer.micro_step

    def compute_and_keep(self: Trainer, batch: Batch, *more: object) -> Tensor:
        used.clear()
        loss = compute(self, batch, *more)
        assert len(used) > 1 and all(torch.equal(matched, used[0]) for matched in used)
        seen.append((batch, decoded(used[0], batch)))
        return loss

    monkeypatch.setattr(Trainer, "micro_step", compute_and_keep)
    monkeypatch.setattr(train_gpt, "draw_curve", lambda log: "not drawn")
    return seen


def test_training_looks_up_earlier_steps_only(tmp_path, runtime, passes):
    """Of every row of a run what it matched is what dictionaries of the rows of earlier steps have:
    nothing of the preparation, of validations, of itself and of the rows beside it."""
    config = matching_config(
        **write_few_tokens(tmp_path),
        num_steps=4,
        extension_steps=1,
        sequences_per_step=4,
        val_every=1,
    )
    train(config, runtime)
    assert all(math.isfinite(row["train_loss"]) for row in runtime.log.data["steps"])
    assert len(runtime.log.data["validations"]) == 5
    stream = itertools.chain(*training_batches(config, cpu_runtime(), [(64, 48)] * 4 + [(64, 64)]))
    memory, others = Memory(ORDERS), 0
    for step in range(5):
        rows = passes[len(passes) - 20 + 4 * step :][:4]
        for batch, found in rows:
            assert torch.equal(batch.tokens, next(stream).tokens)
            assert found == memory.find(batch)
            assert any(map(any, itertools.chain(*found))) == (step > 0)
        beside = copy.deepcopy(memory)
        beside.note([batch for batch, _ in rows[:-1]])
        batch, found = rows[-1]
        others += beside.find(batch) != found
        memory.note([batch for batch, _ in rows])
    assert others == 5  # had rows seen those beside them, it would show


def test_validation_looks_up_what_it_has_scored(tmp_path, runtime, used):
    """And what training had read: of every sequence what dictionaries have of earlier groups."""
    config = matching_config(**write_few_tokens(tmp_path), sequences_per_step=2)
    model, memory = trained_like(config, runtime), Memory(ORDERS)
    memory.note(fill(model, range(2)))
    validate(model, config, runtime, 280, WINDOWS)
    rows, differ = list(validation_batches(config, runtime, 280)), 0
    each = len(used) // len(rows)  # how often a pass takes what was found
    assert len(rows) == 5 and each > 1
    for i, batch in enumerate(rows):
        expected = memory.find(batch)
        for matched in used[each * i : each * (i + 1)]:
            assert decoded(matched, batch) == expected
        if i % 2:
            memory.note(rows[i - 1 : i + 1])
            differ += memory.find(batch) != expected
    assert differ == 2


def test_validation_leaves_the_tables_as_they_were(tmp_path, runtime):
    """Bit for bit, also where slots are few."""
    for slots in SLOTS, 16:
        files = write_few_tokens(tmp_path)
        config = matching_config(**files, sequences_per_step=1, match_slots=slots)
        model = trained_like(config, runtime)
        empty = validate(model, config, runtime, 200, WINDOWS)
        assert not model.matches.table.any()
        fill(model, range(3))
        before = model.matches.table.clone()
        assert validate(model, config, runtime, 200, WINDOWS) != pytest.approx(empty, abs=1e-4)
        assert torch.equal(model.matches.table, before)


def test_nothing_changes_restores_the_tables(runtime):
    config = matching_config()
    model = GPT(config, runtime)
    assert not model.matches.table.any()
    with nothing_changes(model, Optimizer(model, config, runtime)):
        rows = fill(model, range(2))
        model.matches.look_up_ahead(rows)
        assert slots_of(model.matches).any(1).all() and model.matches.ahead is not None
    assert not model.matches.table.any() and model.matches.ahead is None
    assert GPT(tiny_config(), runtime).matches is None


def test_what_was_looked_up_ahead_is_for_these_batches_alone(runtime):
    """Of others it is looked up when they come."""
    matches = empty_matches()
    rows = [few_tokens(seed, [20, 1, 43]) for seed in range(4)]
    note(matches, rows)
    ahead, others = rows[:2], rows[:2]
    matches.look_up_ahead(ahead)
    old, _ = matches.look_up(others)
    note(matches, rows[2:])
    (found, read), (new, _) = matches.look_up(ahead), matches.look_up(others)
    assert torch.equal(read, gather_sequences(ahead, runtime))
    for batch, of_batch, before, later in zip(rows, found, old, new):
        assert torch.equal(of_batch.tokens, batch.tokens)
        assert torch.equal(of_batch.matched, before.matched)
        assert not torch.equal(of_batch.matched, later.matched)
        assert torch.equal(later.matched, matches.find(batch.tokens, starts_of(batch)))
    matches.look_up_ahead(None)
    assert matches.ahead is None


# Known shards ------------------------------------------------------------------------------------


def write_known_shards(folder: Path) -> dict[str, object]:
    """Two shards to train on and two that are only looked up, all of them cut within documents, and
    the options that name them; a step reads 256 tokens."""
    lengths = np.random.default_rng(0).integers(2, 30, 170).tolist()
    tokens = random_documents(3, lengths, num_ids=4)
    files = {"train_files": write_shards(folder, tokens, [1000, 1600, 1900])}
    files["val_file"] = str(write_shard(folder / "val.bin", tokens[:300]))
    return {**files, "match_shards": 2, "sequences_per_step": 4}


def tokens_of(folder: Path, *shards: int) -> list[int]:
    return [token for i in shards for token in read_shard(folder / f"train_{i:02}.bin").tolist()]


def known_rows(folder: Path, size: int) -> list[Batch]:
    """The two shards in pieces of this many tokens, each a sequence, without their last few tokens,
    so that all lengths are multiples of 16."""
    rows = []
    for shard in (2, 3):
        tokens = torch.tensor(tokens_of(folder, shard))
        end = (len(tokens) - 1) // 16 * 16
        for begin in range(0, end, size):
            piece = tokens[begin : min(begin + size, end) + 1]
            starts = (piece[:-1] == START_TOKEN).nonzero().flatten().tolist()
            ends = torch.tensor(sorted({0, *starts, len(piece) - 1}), dtype=torch.int32)
            rows.append(Batch(piece[:-1].int(), piece[1:], ends, len(piece)))
    return rows


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 256 tokens, inserted beside all steps of a run and not only beside the first ones."""
    monkeypatch.setattr(train_gpt, "PIECE_TOKENS", 256)
    monkeypatch.setattr(train_gpt, "INSERTION_SHARE", 1.0)


@pytest.mark.parametrize("size", [256, 2**20])
def test_pieces_are_those_of_the_last_shards(tmp_path, runtime, monkeypatch, size):
    """As a step is gathered, in order, whole but for less than 16 tokens at the end of a shard;
    where one begins within a document it does not know the begin."""
    monkeypatch.setattr(train_gpt, "PIECE_TOKENS", size)
    config = matching_config(**write_known_shards(tmp_path))
    paths, rows = find_train_files(config).looked_up, known_rows(tmp_path, size)
    pieces = list(shard_pieces(paths, config.vocab_size, pin=False))
    assert len(pieces) == len(rows) == (6 if size == 256 else 2)
    matches, memory = empty_matches(), Memory(ORDERS)
    for piece, row in zip(pieces, rows):
        assert piece.dtype == torch.uint16
        read = read_piece(piece)
        assert read.dtype == torch.int32  # of another kind functions would be compiled anew
        assert torch.equal(read, gather_sequences([row], runtime))
        matches.insert(read)
        memory.note([row])
    for row in (*rows, few_tokens(1, [64])):
        assert find(matches, row) == memory.find(row)
    assert slots_of(matches).count_nonzero(1).tolist() == memory.sizes()


@pytest.mark.parametrize("length", [16, 17, 32, 33, 272, 273, 288, 289])
def test_last_piece_of_a_shard(tmp_path, monkeypatch, length):
    """Sixteen tokens that have targets are read, fewer are not; ids take all of 16 bits."""
    monkeypatch.setattr(train_gpt, "PIECE_TOKENS", 256)
    tokens = random_documents(length, [length])
    tokens[-1] = START_TOKEN - 1
    pieces = shard_pieces([str(write_shard(tmp_path / "shard.bin", tokens))], 50_257, pin=False)
    read = [read_piece(piece) for piece in pieces]
    count = (length - 1) // 16 * 16
    sizes = [min(256, count - begin) for begin in range(0, count, 256)]
    assert [part.size(1) for part in read] == sizes
    expected = torch.from_numpy(tokens[: count + 1].astype(np.int32))
    if read:
        assert torch.equal(torch.cat([part[0] for part in read]), expected[:-1])
        assert torch.equal(torch.cat([part[2] for part in read]), expected[1:])


def test_training_with_shards_that_are_only_looked_up(tmp_path, runtime, passes, small_pieces):
    """Two pieces of six are inserted beside each step, from the first one on, behind what it reads:
    the next step finds them. Steps read the other shards."""
    options = write_known_shards(tmp_path) | {"match_shards": 2}
    config = matching_config(**options, num_steps=3, extension_steps=1, val_every=0)
    started, start = [], Clock.start

    def start_and_tell(self: Clock) -> None:
        start(self)
        started.append(len(passes))  # those of the preparation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clock, "start", start_and_tell)
        patch.setattr(train_gpt, "validate", lambda *arguments: 1.0)
        train(config, runtime)
    of_training = passes[started[0] :]
    shapes = [(64, 48)] * 12 + [(64, 64)] * 4
    expected, ignorant = reference_rows(tokens_of(tmp_path, 0, 1), shapes), Memory(ORDERS)
    memory, pieces = Memory(ORDERS), iter(known_rows(tmp_path, 256))
    for step in range(4):
        rows, of_training = of_training[:4], of_training[4:]
        for batch, found in rows:
            assert row_of(batch) == next(expected)[0]
            assert found == memory.find(batch)
            assert (found == ignorant.find(batch)) == (step == 0)
        for notes in memory, ignorant:
            notes.note([batch for batch, _ in rows])
        for piece in itertools.islice(pieces, 2):
            memory.note([piece])
    assert not of_training and next(expected, None) is None and next(pieces, None) is None


def test_pieces_are_inserted_beside_the_first_steps(tmp_path, runtime, monkeypatch):
    """A sixteenth of them, or the first one; as many beside each, wherever the run stops."""
    monkeypatch.setattr(train_gpt, "PIECE_TOKENS", 256)
    files = write_known_shards(tmp_path)
    count = len(known_rows(tmp_path, 256))
    for num_steps, stop_step in (3, 0), (15, 0), (46, 0), (46, 2), (160, 0):
        steps = {"num_steps": num_steps, "extension_steps": 2, "stop_step": stop_step}
        config = matching_config(**files, **steps, match_slots=64)
        trainer = Trainer(GPT(config, runtime), runtime)
        trainer.begin_insertion(find_train_files(config).looked_up)
        assert trainer.pieces_per_step == math.ceil(count / max(1, (num_steps + 2) // 16))
        assert len([*trainer.pieces]) == count == 6


@pytest.mark.parametrize("averages", [(), (0.5,)], ids=["last weights", "averages"])
def test_all_pieces_are_inserted_in_the_end(tmp_path, runtime, monkeypatch, averages):
    """Those that are left behind the last step, in order: validation finds them, and so do the
    sequences that a blend of weights is chosen by. Two runs have the same tables."""
    config = matching_config(
        **write_known_shards(tmp_path),
        num_steps=1,
        extension_steps=1,
        val_every=1,
        val_sequence_tokens=48,
        average_shares=averages,
        match_slots=64,
    )
    tables, begin = [], Trainer.begin_insertion

    def keep(model: GPT, *arguments: object) -> float:
        tables.append(model.matches.table.clone())
        return 1.0

    def begin_with_too_few(self: Trainer, paths: list[str]) -> None:
        begin(self, paths)
        self.pieces_per_step = 1

    monkeypatch.setattr(train_gpt, "PIECE_TOKENS", 256)
    monkeypatch.setattr(Trainer, "begin_insertion", begin_with_too_few)
    monkeypatch.setattr(train_gpt, "validate", keep)
    monkeypatch.setattr(train_gpt, "draw_curve", lambda log: "not drawn")
    for _ in range(2):
        train(config, runtime)
    matches, rows = empty_matches(match_slots=64), iter(known_rows(tmp_path, 256))
    steps, expected = training_batches(config, runtime, [(64, 48), (64, 64)]), []
    for batches, number in zip(steps, (1, None)):
        note(matches, batches)
        for row in itertools.islice(rows, number):
            note(matches, [row])
        expected.append(slots_of(matches).clone())
    assert len(tables) == 4
    for found, table in zip(tables, expected * 2):
        assert torch.equal(found[:-SPARE_PLACES], table.flatten())


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


def test_the_validation_file_is_no_shard_to_train_on_or_look_up(tmp_path):
    """Under whatever name: of a pattern for both it would be the last one."""
    files = write_known_shards(tmp_path)
    (tmp_path / "val_link.bin").symlink_to(files["val_file"])
    for val_file in files["val_file"], str(tmp_path / "val_link.bin"):
        for known in range(2):
            both = files | {"train_files": str(tmp_path / "*[0-9l].bin"), "val_file": val_file}
            config = matching_config(**both | {"match_shards": known})
            with pytest.raises(UserError, match=r"--train_files .* the validation file .*val\.bin"):
                check_data(config, [])


def test_a_shard_that_goes_away_makes_no_other_one_looked_up(tmp_path, runtime, monkeypatch):
    """The run ends, and names it."""
    config = matching_config(**write_known_shards(tmp_path), num_steps=2, extension_steps=0)

    def read_and_lose(config: Config, path: str) -> Tensor:
        (tmp_path / "train_03.bin").unlink()
        return read_proposal(config, path)

    monkeypatch.setattr(train_gpt, "read_proposal", read_and_lose)
    with pytest.raises(UserError, match=r"train_03\.bin: cannot be read .No such file"):
        train(config, runtime)


def test_memory_for_saving_is_said_to_lack_there(tmp_path, runtime, monkeypatch):
    files = write_few_tokens(tmp_path)
    steps = {"num_steps": 1, "extension_steps": 0, "checkpoint": str(tmp_path / "model.pt")}

    def fail(self: Matches) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    monkeypatch.setattr(Matches, "whole_table", fail)
    with pytest.raises(UserError, match=r"^CUDA out of memory, for the checkpoint: lower"):
        train(matching_config(**files, **steps), runtime)


def test_training_ends_with_the_shards_to_train_on(tmp_path):
    config = matching_config(**write_known_shards(tmp_path) | {"sequences_per_step": 1})
    expected = list(reference_rows(tokens_of(tmp_path, 0, 1), [(64, 48)] * 25))
    rows = training_batches(config, cpu_runtime(), [(64, 48)] * 25)
    for row, _ in expected:
        assert [row_of(batch) for batch in next(rows)] == [row]
    with pytest.raises(UserError, match=f"ran out after {len(expected)} sequences"):
        next(rows)
    assert check_data(config, [(64, 48)] * 16) == 200
    with pytest.raises(UserError, match="--train_files .*: 1600 tokens to train on, but the sche"):
        check_data(config, [(64, 48)] * 25)


# Ranks -------------------------------------------------------------------------------------------

STEPS = [(64, 48), (64, 48), (96, 64)]  # tokens and longest documents of the rows of a step


def read_stream(folder: str, rank: int, world_size: int) -> dict[str, object]:
    """The slots here after three steps of four sequences, the table of one process, and what was
    found for each sequence before its step was inserted."""
    sizes = {"match_slots": 64, "tokens_per_pass": 128}
    config = matching_config(train_files=f"{folder}/train.bin", **sizes)
    runtime, found = cpu_runtime(rank, world_size), {}
    matches = Matches(config, runtime)
    for batches in training_batches(config, runtime, STEPS):
        matched, read = matches.look_up(batches)
        for batch in matched:
            parts = (x.unflatten(0, (batch.sequences, -1)) for x in (batch.tokens, batch.matched))
            found |= {tuple(tokens.tolist()): own.tolist() for tokens, own in zip(*parts)}
        matches.insert(read)
    return {"slots": slots_of(matches), "whole": matches.whole_table(), "found": found}


def validation_loss(folder: str, rank: int, world_size: int) -> float:
    """Of five sequences of which two are scored at a time."""
    files = {"train_files": f"{folder}/train.bin", "val_file": f"{folder}/val.bin"}
    config, runtime = matching_config(**files, sequences_per_step=2), cpu_runtime(rank, world_size)
    model = trained_like(config, runtime)
    loss = validate(model, config, runtime, 280, WINDOWS)
    assert not model.matches.table.any()
    return loss


def trained(folder: str, rank: int, world_size: int) -> list[float]:
    """The losses of a run with shards that are only looked up, which leaves a checkpoint."""
    files = {"train_files": f"{folder}/known/train_*.bin", "val_file": f"{folder}/val.bin"}
    steps = {"num_steps": 3, "extension_steps": 1, "val_every": 0, "match_slots": 1024}
    files["checkpoint"] = f"{folder}/of_{world_size}.pt"
    config = matching_config(**files, **steps, match_shards=2)
    runtime = cpu_runtime(rank, world_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "PIECE_TOKENS", 256)
        patch.setattr(train_gpt, "INSERTION_SHARE", 0.5)
        patch.setattr(train_gpt, "draw_curve", lambda log: "not drawn")
        train(config, runtime)
    return [row["val_loss"] for row in runtime.log.data["validations"]]


FUNCTIONS = read_stream, validation_loss, trained


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


def check_stream(alone: dict, ranks: list[dict]) -> None:
    """To the bit, in slots that many contexts share. Every rank has slots of its own, and is told
    what it finds in those of the others."""
    slots = alone["slots"]
    assert slots.count_nonzero() > 60 and len(alone["found"]) == 12
    assert any(any(map(any, found)) for found in alone["found"].values())
    assert torch.equal(torch.cat([seen["slots"] for seen in ranks], 1), slots)
    assert all(seen["slots"].any() for seen in ranks)
    assert torch.equal(ranks[0]["whole"], alone["whole"])
    assert torch.equal(alone["whole"], F.pad(slots.flatten(), (0, SPARE_PLACES)))
    assert [seen["whole"] for seen in ranks[1:]] == [None] * (len(ranks) - 1)
    assert [len(seen["found"]) for seen in ranks] == [12 // len(ranks)] * len(ranks)
    for seen in ranks:
        assert seen["found"].items() <= alone["found"].items()
    assert set().union(*(seen["found"] for seen in ranks)) == {*alone["found"]}


def test_two_ranks_share_the_table_of_one_process(alone_and_ranks):
    alone, *ranks = (seen["read_stream"] for seen in alone_and_ranks)
    check_stream(alone, ranks)


def test_four_ranks_share_the_table_of_one_process(alone_and_ranks, rank_data):
    ranks = [seen["read_stream"] for seen in seen_by_ranks(rank_data, 4, read_stream)]
    check_stream(alone_and_ranks[0]["read_stream"], ranks)


def test_ranks_have_the_validation_loss_of_one_process(alone_and_ranks):
    """The last group has a sequence on one rank alone."""
    alone, *ranks = (seen["validation_loss"] for seen in alone_and_ranks)
    assert ranks == [pytest.approx(alone, rel=1e-6)] * 2


def test_ranks_train_as_one_process_does(alone_and_ranks, rank_data):
    """And the checkpoint of two ranks is one of one process: its tables are the same, and it scores
    what the run has scored."""
    alone, *ranks = (seen["trained"] for seen in alone_and_ranks)
    assert len(alone) == 1 and ranks == [pytest.approx(alone, rel=1e-4)] * 2
    tables = []
    for world_size, loss in ((1, alone), (2, ranks[0])):
        path = str(rank_data / f"of_{world_size}.pt")
        model, config, _ = check.load_checkpoint(train_gpt, path, "cpu")
        tables.append(model.matches.table.clone())
        windows = Windows(config.extension[-1].window_short, config.final_window_long)
        scored = validate(model, config, cpu_runtime(), check_data(config, []), windows)
        assert [scored] == pytest.approx(loss, rel=1e-5)
        model.matches.table.zero_()
        empty = validate(model, config, cpu_runtime(), check_data(config, []), windows)
        assert [empty] != pytest.approx(loss, rel=1e-3)
    assert tables[0][:-SPARE_PLACES].count_nonzero() > 100
    assert torch.equal(*tables)


def test_a_checkpoint_needs_room_for_the_tables_of_all_ranks(tmp_path, monkeypatch):
    """Which the disk must have before training begins."""
    config = matching_config(checkpoint=str(tmp_path / "model.pt"), **write_few_tokens(tmp_path))
    model, sizes = GPT(config, cpu_runtime(0, 2)), {}
    monkeypatch.setattr(
        train_gpt, "check_output", lambda option, path, size: sizes.update({option: size})
    )
    train_gpt.check_outputs(config, Log(str(tmp_path)), 4, model)
    whole = GPT(config, cpu_runtime()).state_dict().values()
    assert sizes["--checkpoint"] >= sum(tensor.nbytes for tensor in whole)


# Lookups and their gradients ---------------------------------------------------------------------


def test_every_kind_of_token_is_told_apart():
    """By order, count, and what the other token of the entry counts."""
    pairs = [(most, less) for most in range(MAX_COUNT + 1) for less in range(most + 1)]
    entries = [(most, 7 * bool(most), less, 8 * bool(less)) for most, less in pairs]
    packed = torch.tensor([(a << 27 | x) << 31 | b << 27 | y for a, x, b, y in entries])
    own = torch.full((len(packed),), 9, dtype=torch.int32)
    tokens, cells, found = read_matches(torch.stack([packed, packed.flip(0)], 1), own)
    kinds = set()
    for order, of_order in enumerate((entries, entries[::-1])):
        for t, entry in enumerate(of_order):
            for place in range(2):
                most = entry[2 * place]
                assert found[t, order, place] == bool(most)
                assert tokens[t, order, place] == (7 + place if most else 9)
                if most:
                    assert cells[t, order, place] == cell(order, entry, place)
                    kinds.add(cells[t, order, place].item())
    assert cells.amin() >= 0 and cells.amax() < 2 * CELLS and CELLS == 25
    assert len(kinds) > 40


def lookups_of(model: GPT, batch: Batch) -> train_gpt.Lookups:
    return model.look_up(model.with_matches(batch))


def small_slices(model: GPT, vector: Tensor) -> dict[str, Tensor]:
    return dict(zip(model.small_layout, model.cut_small(vector)))


@pytest.mark.parametrize("read", [True, False], ids=["matches", "none"])
def test_lookup_embedding_and_its_gradients(runtime, read):
    """The rows of the last table of values for the two tokens of the best order, by the gains of
    their kinds; where nothing is found, none."""
    config = matching_config()
    model = trained_like(config, runtime)
    memory, vocab = Memory(ORDERS), config.padded_vocab_size
    for seeds in ((0, 1, 2), (0, 1), (0,), *[(0, 3)] * 6) if read else ():
        memory.note(fill(model, seeds))
    batch = random_batch(7, [30, 2, 32], num_ids=7)
    batch.tokens[10:12] = torch.tensor([1, 5])  # read in two documents
    batch.tokens[29:31] = torch.tensor([1, 2])  # and the other way round
    found = memory.find(batch)
    numbers = [best(entries) for entries in found]
    chosen = [kinds_and_tokens(*own) for own in zip(found, numbers)]
    assert [numbers[11], numbers[30]] == [0, 0]
    assert {*map(len, chosen)} == ({0, 1, 2} if read else {0})
    kinds = {kind for own in chosen for kind, _ in own}
    assert not read or ({*numbers} == {0, 1, 2} and len(kinds) > 9)
    grad = torch.randn(64, 32, generator=torch.manual_seed(0), dtype=torch.float64)
    for param in model.parameters():
        param.grad.fill_(2.0)
    lookups = lookups_of(model, batch)
    (lookups.ngrams * grad).sum().backward()

    table = model.value_embed.detach()[2 * vocab :].double().requires_grad_()
    gains = small_slices(model, model.small)["match"].detach().double().requires_grad_()
    assert len(table) == vocab and len(lookups.values) == 2 and gains.shape == (25 * 3,)
    rows = ngram_rows(batch.tokens.tolist(), (2,), config.ngram_rows)
    ngrams = model.ngrams.table[torch.tensor(rows)[:, 0]].double().requires_grad_()
    none, sums = 0 * gains[0] * table[0], []
    for own in chosen:
        sums.append(sum((gains[kind] * table[token] for kind, token in own), none))
    expected = ngrams + F.pad(torch.stack(sums), (0, 16))  # as wide as values are
    torch.testing.assert_close(lookups.ngrams.double(), expected, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad((expected * grad).sum(), (table, gains, ngrams))
    grads = model.value_embed.grad[2 * vocab :], small_slices(model, model.small.grad)["match"]
    for value, reference in zip(grads, expected):
        torch.testing.assert_close(value.double() - 2, reference, rtol=1e-4, atol=1e-5)
    assert model.ngrams.pending[0].tolist() == rows
    torch.testing.assert_close(model.ngrams.pending[1].double(), expected[2], rtol=1e-4, atol=1e-5)
    assert (model.value_embed.grad[: 2 * vocab] == 2).all()
    touched = (grads[0] != 2).any(1).nonzero().flatten().tolist()
    assert touched == sorted({token for own in chosen for _, token in own})
    assert (grads[1] != 2).nonzero().flatten().tolist() == sorted(kinds)


def test_start_of_what_the_lookup_has(runtime):
    """Half a row of a predicted token is added, whatever its kind, and its keys weigh as much as
    the sink; without a match the stream is that of a model without lookups."""
    model = GPT(matching_config(), runtime)
    starts = small_slices(model, model.small.detach())
    assert starts["match"].tolist() == [0.5] * 75 and starts["match_keys"].shape == (75, 128)
    assert not starts["match_keys"].any() and starts["match_bias"].tolist() == [0.0] * 75
    assert len(model.value_embed) == 3 * model.config.padded_vocab_size
    with torch.no_grad():
        table = model.ngrams.table.normal_(generator=torch.manual_seed(0))
        batch = few_tokens(3, [64])
        ngrams = lookups_of(model, batch).ngrams
        rows = ngram_rows(batch.tokens.tolist(), (2,), model.config.ngram_rows)
        assert torch.equal(ngrams, table[torch.tensor(rows)[:, 0]])
        fill(model, [3])  # the same tokens
        difference = lookups_of(model, batch).ngrams - ngrams
    assert (difference != 0).any(1).all()


def test_losses_with_lookups_are_the_definition(runtime):
    """In training and in validation, with the gradients of every parameter."""
    model, memory = trained_like(matching_config(), runtime), Memory(ORDERS)
    for seeds in ((0, 1, 2), (0, 1), *[(0, 3)] * 6):
        memory.note(fill(model, seeds))
    batch = random_batch(7, [30, 2, 32], num_ids=7)
    found, gradients = memory.find(batch), []
    hidden = transcribed_hidden(model, batch, *WINDOWS, found)
    expected = target_losses(model, batch, hidden, found).sum(0)
    with torch.no_grad():
        loss = model.validation_loss(batch, WINDOWS)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    weighted, loss = model.training_loss(batch, WINDOWS, torch.tensor([1.0, 0.5]))
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    for total in (weighted, expected @ torch.tensor([1.0, 0.5]).double()):
        for param in model.parameters():
            param.grad.zero_()
        total.backward()
        gradients.append({name: param.grad.clone() for name, param in model.named_parameters()})
    for name, reference in gradients[1].items():
        assert reference.any()
        assert relative_error(gradients[0][name], reference) < 1e-4, name
    of_small, reference = (small_slices(model, own["small"]) for own in gradients)
    for name in of_small:
        assert relative_error(of_small[name], reference[name]) < 1e-3, name


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "canonical mask"])
def test_keys_of_what_is_found_and_their_gradients(runtime, masked):
    """Every token of every order is a key of the pointer, by its kind; with the mask those that can
    follow."""
    model, memory = trained_like(matching_config(), runtime), Memory(ORDERS)
    for seeds in ((0, 1, 2), (0, 1), *[(0, 3)] * 6):
        memory.note(fill(model, seeds))
    batch, random = random_batch(7, [30, 2, 32], num_ids=7), torch.manual_seed(0)
    vocab = model.config.padded_vocab_size
    mask = np.random.default_rng(0).random((8, vocab)) < 0.4 * masked
    bits = torch.from_numpy(np.packbits(mask, axis=1, bitorder="little"))
    batch.tokens[:] %= 8
    impossible = bits if masked else None
    batch, found = model.with_matches(batch), memory.find(batch)
    q = torch.randn(64, 128, generator=random, requires_grad=True)
    extra = model.match_keys(q, batch, impossible)
    names = "match_keys", "match_bias"
    own = small_slices(model, model.small)
    keys, bias = (own[name].detach().double().requires_grad_() for name in names)
    query, number, scores, expected = q.detach().double().requires_grad_(), 0, [], []
    for t, entries in enumerate(found):
        for i, entry in enumerate(entries):
            for place in range(2):
                score, column = extra.scores[t, 2 * i + place], 2 * i + place
                token = entry[2 * place + 1]
                if not entry[2 * place] or mask[batch.tokens[t], token]:
                    assert score == -math.inf
                    continue
                assert extra.tokens[t, column] == token
                kind = cell(i, entry, place)
                scores.append(score)
                expected.append(query[t] @ keys[kind] / math.sqrt(128) + bias[kind])
                number += 1
    assert extra.scores.shape == extra.tokens.shape == (64, 6) and number > 40
    scores, expected = torch.stack(scores), torch.stack(expected)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(number, generator=random)
    model.small.grad.zero_()
    (scores * grad).sum().backward()
    grads = small_slices(model, model.small.grad)
    wanted = torch.autograd.grad((expected * grad).sum(), (query, keys, bias))
    for value, reference in zip((q.grad, *(grads[name] for name in names)), wanted):
        torch.testing.assert_close(value.double(), reference, rtol=1e-4, atol=1e-5)


def test_several_ranks_look_up_together():
    """A batch that comes without what matches it is a mistake there."""
    model = trained_like(matching_config(), cpu_runtime(0, 2))
    with pytest.raises(AssertionError, match="look up together"):
        model.with_matches(few_tokens(0, [64]))


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


@pytest.mark.parametrize(("slots", "world_size"), [(64, 3), (2, 4)])
def test_check_config_names_slots_that_the_processes_cannot_share(slots, world_size):
    """Each has as many of them, at least one."""
    stage = Stage(1.0, 768, 48, 8, 24, 1.0, 0.5, 0)
    sizes = {"sequences_per_step": 12, "stages": (stage,), "extension": (stage,)}
    check_config(matching_config(**sizes, match_orders=()), world_size)
    check_config(matching_config(**sizes, match_slots=4), 4)
    with pytest.raises(UserError, match=f"--match_slots {slots} "):
        check_config(matching_config(**sizes, match_slots=slots), world_size)


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
    model.matches.table.zero_()
    assert validate(*scored) != pytest.approx(losses[-1], abs=1e-3)


class Filled(check.Judge):
    """A judge whose model has read every token, and has seen the judge's own documents."""

    def __init__(self, script: object, folder: Path, **changes: object):
        super().__init__(script, folder, **changes)
        vocab = self.config.vocab_size
        tokens = torch.arange(vocab, dtype=torch.int32)
        targets = torch.randperm(vocab, generator=torch.manual_seed(0)).int()
        self.model.matches.insert(torch.stack([tokens, torch.zeros_like(tokens), targets]))
        for seed in (1, 2, 3, 4):
            known = torch.from_numpy(check.random_tokens(script, seed, 33)).int() % vocab
            starts = torch.zeros(32, dtype=torch.int32)
            self.model.matches.insert(torch.stack([known[:-1], starts, known[1:]]))


@pytest.mark.parametrize("name", check.CHECKS)
def test_model_with_lookups_passes_the_check(name, tmp_path, monkeypatch):
    sizes = check.SIZES | {"match_orders": (1, 2, 3), "match_slots": 2**20}
    monkeypatch.setattr(check, "SIZES", sizes)
    monkeypatch.setattr(check, "Judge", Filled)
    matched = []

    def find_and_keep(*args: object) -> Tensor:
        matched.append(find_matches(*args))
        return matched[-1]

    monkeypatch.setattr(train_gpt, "find_matches", find_and_keep)
    check.CHECKS[name](train_gpt, tmp_path)
    if name != "coverage":  # which runs no model
        share = torch.cat([found.any(1) for found in matched]).float().mean()
        assert share > 0.4


@pytest.mark.parametrize("largest_bias", [1.0, 10.0])
def test_keys_of_what_is_found_in_bfloat16(runtime, largest_bias):
    """Scores come in fp32, each rounded once to bf16 with its bias; gradients are near."""
    model = trained_like(matching_config(), runtime)
    for seeds in ((0, 1, 2), (0, 1), *[(0, 3)] * 6):
        fill(model, seeds)
    own = small_slices(model, model.small.detach())
    own["match_bias"].uniform_(-largest_bias, largest_bias)
    own["match_keys"].normal_(0, 0.5)
    batch = model.with_matches(random_batch(7, [30, 2, 32], num_ids=7))
    q, grad, found = torch.randn(64, 128).bfloat16(), torch.randn(64, 6), []
    for dtype in torch.bfloat16, torch.float64:
        query = q.detach().to(dtype).requires_grad_()
        model.small.grad.zero_()
        scores = model.match_keys(query, batch, None).scores
        assert scores.dtype == torch.promote_types(dtype, torch.float32)
        scores.masked_fill(scores == -math.inf, 0.0).backward(grad.to(scores.dtype))
        grads = small_slices(model, model.small.grad.clone())
        found.append((scores.detach(), query.grad, grads["match_keys"], grads["match_bias"]))
    (value, *gradients), (expected, *references) = found
    known = expected.isfinite()
    assert torch.equal(value.isfinite(), known) and known.sum() > 40
    # half a unit in the last place of bias and sum, and the keys' own rounding
    most = (expected[known].abs().max() + largest_bias) * 2**-8 + 0.02
    assert (value.double() - expected)[known].abs().max() < most
    for gradient, reference in zip(gradients, references):
        assert relative_error(gradient, reference) < 0.01
    unscaled = value[known] * math.sqrt(128)  # as it was in bf16, and not rounded once more
    torch.testing.assert_close(unscaled.bfloat16().float(), unscaled, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("shards", "tokens", "depth"), [(2, 64, 4), (1, 4096, 2)])
def test_pieces_are_read_ahead(tmp_path, runtime, monkeypatch, shards, tokens, depth):
    """Those of two steps, but no more than MOST_PIECES."""
    monkeypatch.setattr(train_gpt, "PIECE_TOKENS", tokens)
    monkeypatch.setattr(train_gpt, "MOST_PIECES", 4)
    options = write_known_shards(tmp_path) | {"match_shards": shards, "match_slots": 64}
    config, depths = matching_config(**options), []
    monkeypatch.setattr(train_gpt, "prefetch", lambda items, depth: depths.append(depth))
    Trainer(GPT(config, runtime), runtime).begin_insertion(find_train_files(config).looked_up)
    assert depths == [depth]
