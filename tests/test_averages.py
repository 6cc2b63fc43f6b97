"""Averages of the weights: against float64, and the choice among blends in whole runs."""

import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import test_world
import torch
from conftest import (
    MOMENTUM,
    ROOT,
    cpu_runtime,
    on_ranks,
    random_batch,
    random_documents,
    split_sequences,
    tiny_config,
    trained_like,
    write_shard,
)
from test_compiled import COMPILED, OPTIONS
from test_data import reference_rows, row_of
from test_kernels import relative_error
from test_optimizer import model_with_copies
from test_train import command, fork, load, log_of, read_shard, write_data
from torch import Tensor
from torch._dynamo.utils import counters

import train_gpt
from train_gpt import (
    GPT,
    Log,
    Optimizer,
    Runtime,
    Trainer,
    UserError,
    Windows,
    check_config,
    choose_weights,
    nothing_changes,
    parse_args,
    rank_batches,
)

AVERAGED = "value_embed", "mlp_bank", "head", "attention_bank"
SHARES, BLENDS = (0.05, 0.2), (0.25, 0.5, 1.0)
RATES = {"lr_end": 1.0, "muon_lr": 0.1}  # so high at the end that averages are better
CHANGES = {**RATES, "average_shares": "0.05:0.2", "average_blends": "0.25:0.5:1"}


def optimizer_of(**changes: object) -> Optimizer:
    config = tiny_config(average_shares=SHARES, average_blends=BLENDS, **changes)
    return Optimizer(trained_like(config, cpu_runtime()), config, cpu_runtime())


def random_steps(optimizer: Optimizer, steps: range) -> list[dict[str, Tensor]]:
    """Steps on random gradients; the weights behind each, by group."""
    history = []
    for step in steps:
        for i, param in enumerate(optimizer.model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + i)
            param.grad += torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step(step, 1.0, MOMENTUM)
        history.append({state.group.name: state.weights.clone() for state in optimizer.states})
    return history


# Averages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "extension_steps"), [(20, 3), (4, 1), (2, 0)])
def test_averages_are_those_of_the_weights_behind_each_update(num_steps, extension_steps):
    """Over the last three time constants; where these are shorter than the time from update to
    update, of the last update alone, and where they are longer than the run, from its start."""
    total = num_steps + extension_steps
    optimizer = optimizer_of(num_steps=num_steps, extension_steps=extension_steps, dtype="bfloat16")
    history = random_steps(optimizer, range(total))
    for state in optimizer.states:
        name, every = state.group.name, state.group.every
        assert len(state.averages) == (len(SHARES) if name in AVERAGED else 0)
        for average, share in zip(state.averages, SHARES):
            steps, expected = share * num_steps, None
            updates = range(every - 1, total, every)
            counted = [step for step in updates if step >= total - 3 * steps] or updates[-1:]
            for step in counted:
                weights = history[step][name].double()
                if expected is None:
                    expected = weights
                expected = expected + (1 - math.exp(-every / steps)) * (weights - expected)
            torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-6)
            if len(counted) > 1:
                assert (average - state.weights).norm() > 1e-3 * state.weights.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blends_have_the_norms_of_the_last_weights(dtype):
    """Entry by entry and table by table, and the parameter is the fp32 weights, rounded."""
    optimizer = optimizer_of(dtype=dtype, adam_lr=0.5)
    last = random_steps(optimizer, range(10))[-1]
    small = optimizer.model.small.detach().clone()
    optimizer.keep_last_weights()
    for number, blend in itertools.product(range(len(SHARES)), (*BLENDS, 0.0)):
        optimizer.write_blend(number, blend)
        for state in optimizer.states[:-1]:
            name, w = state.group.name, last[state.group.name].double()
            mixed = w + blend * (state.averages[number].double() - w)
            tables = optimizer.config.padded_vocab_size if name in ("head", "value_embed") else 1
            of_each, w_each = (x.unflatten(0, (-1, tables)).flatten(1) for x in (mixed, w))
            norms, w_norms = (x.norm(dim=1, keepdim=True) for x in (of_each, w_each))
            assert torch.equal(norms > 0, w_norms > 0)
            expected = (of_each * w_norms / norms.clamp_min(1e-30)).view_as(w)
            torch.testing.assert_close(state.weights.double(), expected, rtol=2e-6, atol=1e-6)
            assert torch.equal(state.param.detach(), state.weights.to(state.param.dtype))
            if blend == 0:
                assert torch.equal(state.weights.double(), w), "not a bit of them differs"
            elif number == 1:
                assert ((norms - w_norms).abs() > 1e-4 * w_norms).any(), "or the norms show little"
    assert torch.equal(optimizer.model.small, small)


def test_blends_are_in_the_fp8_copies(monkeypatch):
    config = tiny_config(vocab_size=300, average_shares=SHARES)
    model, optimizer = model_with_copies(config, cpu_runtime(), monkeypatch)
    random_steps(optimizer, range(10))
    before = [bank.clone() for bank, _ in model.fp8.banks]
    optimizer.keep_last_weights()
    optimizer.write_blend(1, 1.0)
    for (bank, (rows, _, scale)), old in zip(model.fp8.banks, before, strict=True):
        assert relative_error(old, bank) > 1e-3, "or this test shows nothing"
        assert relative_error(rows * scale[:, :1, None], bank) < 1e-6


def test_nothing_changes_puts_averages_back():
    optimizer = optimizer_of()
    random_steps(optimizer, range(10))
    averages = [average for state in optimizer.states for average in state.averages]
    before = [average.clone() for average in averages]
    with nothing_changes(optimizer.model, optimizer):
        random_steps(optimizer, range(8, 10))
        assert not any(map(torch.equal, averages, before)), "or this test shows nothing"
    assert len(before) == 8 and all(map(torch.equal, averages, before))


def test_warm_up_leaves_weights_and_averages_as_they_are(monkeypatch):
    """Though it averages, as these time constants are longer than the run, and chooses."""
    config = tiny_config(average_shares=(0.5, 1.0), average_blends=BLENDS, val_sequence_tokens=32)
    trainer = Trainer(GPT(config, cpu_runtime()), cpu_runtime())
    called = []
    for name in "average", "write_blend":
        kind = train_gpt.ParamState if name == "average" else Optimizer
        original = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda *args, f=original, name=name: (called.append(name), f(*args))
        )
    tensors = [*trainer.model.state_dict().values(), *trainer.optimizer.tensors()]
    before = [tensor.clone() for tensor in tensors]
    trainer.prepare()
    assert called.count("average") >= 4 and called.count("write_blend") == 2 + 3 + 1
    assert all(map(torch.equal, tensors, before))
    assert trainer.passes == 0  # those of the warm-up are no part of the run


def test_choosing_compiles_nothing(monkeypatch, tmp_path):
    """As tests/test_compiled.py has it: what choose_weights runs, prepare() has run."""
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    source = source.replace("first.is_cuda and not inlined", "not inlined")
    traced = source.replace(OPTIONS, OPTIONS.replace("function,", "function, backend='eager',"))
    assert COMPILED not in traced and OPTIONS not in traced
    (path := tmp_path / "averages_traced.py").write_text(traced, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("averages_traced", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "averages_traced", module)
    spec.loader.exec_module(module)
    config = module.Config(**vars(tiny_config(num_steps=2, average_shares=SHARES)))
    trainer = module.Trainer(module.GPT(config, cpu_runtime()), cpu_runtime())
    trainer.prepare()
    compiled = counters["stats"]["unique_graphs"]
    for step in range(4):
        trainer.run_step(step, [random_batch(4 * step + i, [20, 44]) for i in range(4)])
    batches = [random_batch(i, [30, 34]) for i in range(2)]
    module.choose_weights(trainer, batches, module.Windows(8, 24), Log(None))
    assert counters["stats"]["unique_graphs"] == compiled > 0


# The choice --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ({(0, 0.0): 3.0, (1, 0.5): 2.9, (1, 1.0): 2.8}, (1, 1.0)),
        ({(0, 0.0): 3.0, (0, 0.5): 2.9, (1, 1.0): 2.8}, (0, 0.5)),  # only the better one goes on
        ({(0, 0.25): 2.9, (0, 0.5): 3.05}, (0, 0.25)),
        ({(0, 0.0): 3.0, (1, 0.5): 3.0}, (0, 0.0)),  # a tie
        ({(0, 0.0): 3.0, (1, 0.5): math.nan}, (0, 0.0)),
    ],
)
def test_the_least_loss_is_taken(monkeypatch, losses, chosen):
    """A loss that is not given is 3.1; on two sequences of 16 tokens."""
    config = tiny_config(average_shares=SHARES, average_blends=BLENDS)
    trainer, written, log = Trainer(GPT(config, cpu_runtime()), cpu_runtime()), [], Log(None)

    def loss(batch: train_gpt.Batch, windows: Windows) -> Tensor:
        assert batch.sequences == 1 and windows == Windows(8, 24)
        return torch.tensor(losses.get(written[-1], 3.1) * len(batch.tokens))

    monkeypatch.setattr(Optimizer, "write_blend", lambda self, *given: written.append(given))
    monkeypatch.setattr(trainer.model, "validation_loss", loss)
    choose_weights(trainer, [random_batch(i, [16]) for i in range(2)], Windows(8, 24), log)
    found = log.data["averages"]
    assert written[-1] == chosen and found["tokens"] == 32
    best = 1 if losses.get((1, 0.5), 3.1) < losses.get((0, 0.5), 3.1) else 0
    tried = [(0, 0.0), (0, 0.5), (1, 0.5), (best, 0.25), (best, 1.0)]
    assert written[:-1] == tried
    for row, candidate in zip(found["blends"], tried, strict=True):
        assert (row["share"], row["blend"]) == (SHARES[candidate[0]], candidate[1])
        expected = losses.get(candidate, 3.1)
        assert row["loss"] == pytest.approx(expected, abs=1e-5, nan_ok=True)
        assert row["chosen"] == (candidate == chosen)


def choose_masked(runtime: Runtime, folder: Path) -> tuple[dict, str, list[Tensor]]:
    """Of a choice by four sequences, of which the mask calls some tokens impossible: what the log
    has as data and as text, and the targets that were scored."""
    config = tiny_config(average_shares=(0.2,), canonical_mask=True, ngram_rows=64)
    log, scored = Log(str(folder), f"choice{runtime.rank}_of_{runtime.world_size}"), []
    trainer = Trainer(trained_like(config, runtime), runtime)
    sequences = [(random_documents(i, [30, 35]), np.array([0, 30])) for i in range(4)]
    for tokens, _ in sequences[1:3]:  # 4 is impossible behind the first tokens of both
        tokens[[3, 4, 50]] = 3, 4, 4
        trainer.model.impossible[tokens[[3, 49]], 0] = 1 << 4
    batches = rank_batches(sequences, 1, 64, config, runtime)
    given, loss = [batch.targets.clone() for batch in batches], trainer.model.validation_loss

    def note(batch: train_gpt.Batch, windows: Windows) -> Tensor:
        scored.append(batch.targets)
        return loss(batch, windows)

    trainer.model.validation_loss = note
    choose_weights(trainer, batches, Windows(8, 24), log)
    assert all(map(torch.equal, given, [batch.targets for batch in batches]))
    return log.data["averages"], log.path.read_text(), scored[: len(batches)]


def test_impossible_tokens_of_training_text_are_left_out_of_the_choice(tmp_path):
    """Their infinite losses would have every candidate lose to the last weights. The log says so,
    with the number of all ranks."""
    (first, text, of_first), (second, _, of_second) = on_ranks(choose_masked, 2, tmp_path)
    alone, text_alone, scored = choose_masked(cpu_runtime(), tmp_path)
    assert [int((targets < 0).sum()) for targets in scored] == [0, 2, 2, 0]
    for targets in scored[1:3]:
        assert (targets < 0).nonzero()[:, 0].tolist() == [3, 49]
    assert all(map(torch.equal, [of_first[0], of_second[0], of_first[1], of_second[1]], scored))
    assert alone["tokens"] == first["tokens"] == second["tokens"] == 256 - 4
    assert all(math.isfinite(row["loss"]) for row in alone["blends"])
    for x, y in zip(first["blends"], alone["blends"], strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=2e-3)
    for log in text, text_alone:
        (line,) = [line for line in log.splitlines() if line.startswith("warning: ")]
        assert line.startswith("warning: 4 of 256 tokens of unread training text are not scored")
        assert "--train_files" in line and "loss on 252 tokens of unread training text: " in log


def choose_after_noise(runtime: Runtime, folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """Of a choice by four sequences, after steps on random gradients, which averages undo in part:
    what the log has, and the weights."""
    config = tiny_config(average_shares=(0.2, 1.0), dtype="bfloat16", ngram_rows=64, muon_lr=0.3)
    log = Log(None)
    trainer = Trainer(trained_like(config, runtime), runtime)
    for step in range(10):
        for i, param in enumerate(trainer.model.parameters()):
            # whose sum is exact, in whatever order
            for part in range(4)[runtime.rank :: runtime.world_size]:
                generator = torch.Generator().manual_seed(1000 * step + 10 * i + part)
                grad = torch.randint(-8, 9, param.shape, generator=generator)
                param.grad += grad.to(param.dtype)
        trainer.optimizer.step(step, 1.0, MOMENTUM)
    sequences = [(random_documents(i, [30, 35]), np.array([0, 30])) for i in range(4)]
    batches = rank_batches(sequences, 1, 64, config, runtime)
    choose_weights(trainer, batches, Windows(8, 24), log)
    weights = {state.group.name: state.param.detach() for state in trainer.optimizer.states}
    return log.data["averages"], weights


def test_two_ranks_choose_what_one_process_does(tmp_path):
    """Norms and losses are of all ranks' rows and sequences."""
    (first, weights), (second, of_second) = on_ranks(choose_after_noise, 2, tmp_path)
    alone, expected = choose_after_noise(cpu_runtime(), tmp_path)
    assert first == second and first["tokens"] == alone["tokens"] == 256
    for x, y in zip(first["blends"], alone["blends"], strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=2e-3)
        assert {**x, "loss": 0} == {**y, "loss": 0}
    (chosen,) = [row for row in alone["blends"] if row["chosen"]]
    assert chosen["blend"] > 0, "or this test shows little"
    for name, value in weights.items():
        assert torch.equal(value, of_second[name])
        used = value[: len(expected[name])]  # behind it banks are padded
        error = (used.double() - expected[name].double()).norm() / expected[name].double().norm()
        assert error < 1e-3, name


# Whole runs --------------------------------------------------------------------------------------


def train_here(folder: Path, **changes: object) -> tuple[dict, str]:
    """Train in this process; what the log has, as data and as text."""
    arguments = command(folder, 1, **changes)[2:]
    log = Log(str(folder / "logs"), "run")
    train_gpt.train(parse_args(arguments), Runtime(0, 1, torch.device("cpu"), log))
    return log.data, (folder / "logs" / "run.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str, list, list]:
    """The folder, log.data and text of a run with averages; the batches that it trained on, and
    those that it chose by."""
    trained, chosen_by = [], []
    run_step, choose = Trainer.run_step, train_gpt.choose_weights

    def step(
        self, number: int, batches: list, update: int | None = None, following: list | None = None
    ) -> Tensor:
        if update is None:  # else of the warm-up
            trained.extend(batches)
        return run_step(self, number, batches, update, following)

    def note(trainer, batches: list, windows: Windows, log: Log) -> None:
        if log.path is not None:
            assert windows == Windows(16, 2), "those of the last step"
            chosen_by.extend(batches)
        choose(trainer, batches, windows, log)

    folder = write_data(tmp_path_factory.mktemp("averaged"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run_step", step)
        patch.setattr(train_gpt, "choose_weights", note)
        data, text = train_here(folder, checkpoint=folder / "weights.pt", **CHANGES)
    return folder, data, text, trained, chosen_by


def test_text_of_the_choice_is_the_next_that_would_be_read(averaged):
    """Two sequences of 64 tokens behind those of the steps, of whole documents."""
    folder, data, _, trained, chosen_by = averaged
    shards = [read_shard(path) for path in sorted(folder.glob("train_*.bin"))]
    lengths = [(64, 48)] * 12 + [(128, 64)] * 14 + [(64, 64)]  # of a step's two sequences
    shapes = [shape for shape in lengths for _ in range(2)]
    expected = [row for row, _ in reference_rows(np.concatenate(shards).tolist(), shapes)]
    assert len(expected) == len(shapes)
    read = [row_of(part) for batch in trained for part in split_sequences(batch)]
    unread = [row_of(batch) for batch in chosen_by]  # each alone, as in validation
    assert read == expected[:-2] and unread == expected[-2:]
    assert data["averages"]["tokens"] == 128
    # as long as in validation: for more documents attention would compile another kernel
    assert {len(batch.cu_seqlens) for batch in chosen_by} == {64 // 4 + 2}


def test_choice_is_the_best_of_the_table_and_is_what_is_kept(averaged):
    """The saved weights have the loss that the table gives the chosen ones."""
    folder, data, text, _, chosen_by = averaged
    rows = data["averages"]["blends"]
    first = [(row["share"], row["blend"]) for row in rows[:3]]
    assert first == [(0.05, 0), (0.05, 0.5), (0.2, 0.5)]
    assert len(rows) == 5 and len({row["loss"] for row in rows}) == 5
    (chosen,) = [row for row in rows if row["chosen"]]
    assert chosen["loss"] == min(row["loss"] for row in rows)
    assert chosen["blend"] > 0, "or this test shows little"
    _, saved = load(folder / "weights.pt")
    with torch.no_grad():
        loss = sum(saved.validation_loss(row, Windows(16, 2)).item() for row in chosen_by) / 128
    assert loss == pytest.approx(chosen["loss"], abs=1e-6)
    (line,) = [line for line in text.splitlines() if line.startswith("loss on 128 tokens of")]
    name = f"{chosen['blend']:g} of the {chosen['share']:g} average {chosen['loss']:.4f} (chosen)"
    assert f"last weights {rows[0]['loss']:.4f}, " in line and name in line
    assert data["summary"]["val_loss"] == data["validations"][-1]["val_loss"]


def test_averages_leave_training_as_it_is(averaged, tmp_path):
    """Losses of all steps are the same to the bit without them, and so is an earlier validation."""
    _, data, *_ = averaged
    without, text = train_here(write_data(tmp_path), **RATES, average_shares="none")
    for x, y in zip(data["steps"], without["steps"], strict=True):
        assert x["train_loss"] == y["train_loss"]
    first, last = ([x["validations"][i]["val_loss"] for x in (data, without)] for i in (0, -1))
    assert first[0] == first[1] and last[0] != last[1]
    assert "averages" not in without and "unread" not in text.split("=" * 100)[-1]


def test_stopped_run_keeps_its_last_weights(tmp_path):
    folder = write_data(tmp_path)
    data, _ = train_here(folder, stop_step=13, **CHANGES)
    assert "averages" not in data and len(data["steps"]) == 13


def test_two_ranks_end_with_the_same_weights(tmp_path):
    """To the bit; tests/test_world.py notes these, and what each rank has read."""
    folder = write_data(tmp_path)
    result = fork(folder, 2, script=test_world, **CHANGES, num_steps=8, val_every=4)
    assert result.returncode == 0, result.stderr
    _, data = log_of(folder)
    rows = data["averages"]["blends"]
    assert data["averages"]["tokens"] == 128 and len(rows) == 5
    assert [row["chosen"] for row in rows].index(True) == np.argmin([row["loss"] for row in rows])
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["val_losses"] == ranks[1]["val_losses"]
    assert [len(rank["rows"]) for rank in ranks] == [8 + 2 + 1] * 2


def test_data_must_last_for_the_choice(monkeypatch, tmp_path):
    """A shard of just what the steps read is enough without averages, and not with them, which is
    told before a model is made."""
    folder = write_data(tmp_path)
    tokens = np.concatenate([read_shard(path) for path in sorted(folder.glob("train_*.bin"))])
    shapes = [shape for shape in [(64, 48)] * 12 + [(128, 64)] * 14 for _ in range(2)]
    starts = np.flatnonzero(tokens == train_gpt.START_TOKEN)
    documents = sum(len(row_starts) for _, row_starts in reference_rows(tokens.tolist(), shapes))
    for path in folder.glob("train_*.bin"):
        path.unlink()
    write_shard(folder / "train_0.bin", tokens[: starts[documents]])
    config = parse_args(command(folder, 1, **CHANGES)[2:])
    assert train_gpt.check_data(config, shapes) > 0
    monkeypatch.setattr(train_gpt, "GPT", None)
    with pytest.raises(UserError, match="ran out"):
        train_here(folder, **CHANGES)


# Options -----------------------------------------------------------------------------------------


def test_shares_and_blends_are_read():
    config = parse_args(["--preset", "tiny", "--average_shares", "0.02:1/20:1e-1"])
    assert config.average_shares == (0.02, 0.05, 0.1)
    assert config.average_blends == (0.25, 0.5)
    assert parse_args(["--preset", "tiny", "--average_shares", "none"]).average_shares == ()
    text = train_gpt.config_as_text(config)
    assert text["average_shares"] == "0.02:0.05:0.1"
    assert train_gpt.config_from_text(text) == config
    with pytest.raises(SystemExit):
        parse_args(["--average_shares", "0.1:x"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average_shares": (0.2, 0.1)}, "--average_shares 0.2:0.1: give"),
        ({"average_shares": (0.1, 0.1)}, "--average_shares 0.1:0.1: give"),
        ({"average_shares": (0.0,)}, "--average_shares 0.0: give"),
        ({"average_blends": (0.5, 1.5)}, "--average_blends 0.5:1.5: give"),
        ({"average_shares": (0.1,), "average_blends": ()}, "--average_blends none goes with"),
        ({"average_shares": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)}, "more than 9 numbers"),
    ],
)
def test_shares_and_blends_that_make_no_sense_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        check_config(tiny_config(**changes), 1)
    check_config(tiny_config(average_shares=(0.1, 0.2), average_blends=(1.0,)), 1)
