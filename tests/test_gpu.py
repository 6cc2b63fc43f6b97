"""What only a GPU can show: the attention backends agree, fp8 is near bf16, graphs replay what they
captured, streams wait for one another, warm-up leaves nothing behind, nothing waits for n-grams,
lookups are those of a CPU, and nothing is compiled too late."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MOMENTUM, cpu_runtime, random_documents, write_shard
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import train_gpt
from train_gpt import (
    GPT,
    HALF_BITS,
    Batch,
    Clock,
    Config,
    Log,
    Matches,
    Optimizer,
    Runtime,
    Stage,
    Trainer,
    Windows,
    attention,
    attention_backend,
    count_of,
    ngram_hash,
    to_device,
)

pytestmark = pytest.mark.gpu

BACKENDS = ["varlen", "flash-attn-4"]
SHAPES = [(1024, 128, 512), (16384, 128, 896), (16384, 384, 896), (32768, 896, 2048)]


def packed_documents(num_tokens: int, max_seq_len: int, slots: int) -> torch.Tensor:
    """cu_seqlens of random documents of at most max_seq_len tokens, padded to slots + 1 entries."""
    ends = [0]
    while ends[-1] < num_tokens:
        ends.append(min(num_tokens, ends[-1] + int(torch.randint(32, max_seq_len + 1, ()))))
    assert len(ends) <= slots + 1
    ends += [num_tokens] * (slots + 1 - len(ends))
    return torch.tensor(ends, dtype=torch.int32, device="cuda")


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def skip_unless_available(backend: str) -> None:
    best = attention_backend(torch.device("cuda"), torch.bfloat16)
    if backend == "flash-attn-4" and best != "flash-attn-4":
        pytest.skip("flash-attn-4 needs a Hopper GPU and the package")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_tokens", "window", "max_seq_len"), SHAPES)
def test_backends_agree_with_the_definition(backend, num_tokens, window, max_seq_len):
    """Output and gradients against the plain version in float32, to bf16 accuracy."""
    skip_unless_available(backend)
    cu_seqlens = packed_documents(num_tokens, max_seq_len, num_tokens // 16)
    q, k, v, grad = (torch.randn(num_tokens, 6, 128, device="cuda") for _ in range(4))
    q, k = F.rms_norm(q, (128,)), F.rms_norm(k, (128,))
    results = []
    for dtype, kind in ((torch.float32, "plain"), (torch.bfloat16, backend)):
        inputs = [tensor.bfloat16().to(dtype).requires_grad_() for tensor in (q, k, v)]
        out = attention(*inputs, cu_seqlens, max_seq_len, window, 0.1, kind)
        gradients = torch.autograd.grad(out, inputs, grad.bfloat16().to(dtype))
        results.append((out, *gradients))
    for name, reference, value in zip(("out", "dq", "dk", "dv"), *results):
        assert torch.isfinite(value).all(), name
        assert relative_error(value, reference) < 1e-2, name


# The whole model ---------------------------------------------------------------------------------

STAGE = Stage(1.0, 8192, 512, 128, 256, 1.0, 0.5, 0)
WINDOWS = Windows(128, 256)
WEIGHTS = 1.0, 0.5


def make_config(**changes: object) -> Config:
    """The speedrun's model with sequences of 1024 tokens and a small table of n-grams."""
    changes = {"stages": (STAGE,), "extension": (STAGE,), "ngram_rows": 4096} | changes
    return Config(val_sequence_tokens=1024, **{"tokens_per_pass": 1024, **changes})


def make_model(config: Config, device: str = "cuda") -> GPT:
    """Every weight moved away from its start, to the same place on any device."""
    model = GPT(config, Runtime(0, 1, torch.device(device), Log(None)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name != "small":  # whose starts are the same everywhere but in the MLP of gates
                param.copy_(0.02 * torch.randn(param.shape, generator=generator))
        for name, weights in model.unpack_small().items():
            start = weights if model.small_layout[name].start is not None else 0
            weights.copy_(start + 0.02 * torch.randn(weights.shape, generator=generator).to(device))
        table = model.ngrams.table
        table.copy_(0.02 * torch.randn(table.shape, generator=generator))
    return model


def make_row(seed: int, starts: list[int]) -> Batch:
    """On the CPU, as the loader makes it."""
    tokens = torch.randint(0, 50256, (1025,), generator=torch.Generator().manual_seed(seed))
    padded = starts + max(1, 64 - len(starts)) * [1024]
    cu_seqlens = torch.tensor(padded, dtype=torch.int32)
    return Batch(tokens[:-1].int(), tokens[1:].long(), cu_seqlens, 512)


def settle(model: GPT) -> None:
    """Give fp8 its scales as in the middle of a run, and no gradient."""
    if model.fp8 is not None:
        model.fp8.refresh()
    for param in model.parameters():
        param.grad.zero_()


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: param.grad.clone() for name, param in model.named_parameters()}


def outcome(model: GPT, row: Batch) -> dict[str, torch.Tensor]:
    """Losses and gradients of a sequence, also of its n-grams, the second time it is read."""
    device = model.head.device
    row, weights = to_device(row, device), torch.tensor(WEIGHTS, device=device)
    for _ in range(2):
        settle(model)
        loss, plain = model.training_loss(row, WINDOWS, weights)
        (loss / 8).backward()
    losses = {"loss": loss.detach(), "plain": plain}
    return {**losses, **gradients(model), "ngrams": model.ngrams.pending[1]}


ROW = make_row(1, [0, 300, 301, 800])


def assert_near(values: dict, references: dict, loss_error: float, error: float) -> None:
    for name, reference in references.items():
        assert torch.isfinite(values[name]).all(), name
        limit = loss_error if name in ("loss", "plain") else error
        assert relative_error(values[name].to(reference.device), reference) < limit, name


def test_model_in_bf16_is_the_model_in_fp32():
    """The kernels of sums and tables, flash-attn-4 and plain PyTorch in bf16 on the GPU against
    plain PyTorch in fp32 on the CPU."""
    expected = outcome(make_model(make_config(dtype="float32"), "cpu"), ROW)
    model = make_model(make_config(fp8=False))
    assert_near(outcome(model, ROW), expected, 5e-3, 1e-1)
    with torch.no_grad():
        plain = model.validation_loss(to_device(ROW, model.head.device), WINDOWS)
    assert relative_error(plain, expected["plain"].cuda()) < 5e-3


def test_fp8_is_near_bf16():
    expected = outcome(make_model(make_config(fp8=False)), ROW)
    model = make_model(make_config(fp8=True))
    assert model.fp8 is not None
    assert_near(outcome(model, ROW), expected, 2e-2, 0.25)


@pytest.mark.parametrize("fp8", [False, True])
def test_replayed_graph_is_what_it_captured(fp8):
    """For other tokens, documents and parameters than those captured, with the loss weights of its
    own stage; gradients add up; a row of more documents than a graph has room for runs without it.
    """
    # steps 0 and 1 differ in loss weights alone, step 2 in its windows
    first = dataclasses.replace(STAGE, share=0.25)
    faded = dataclasses.replace(STAGE, share=0.25, second=0.25)
    wide = dataclasses.replace(STAGE, share=0.5, window_long=512)
    stages = {"num_steps": 4, "stages": (first, faded, wide), "extension": (wide,)}
    model = make_model(make_config(fp8=fp8, **stages))
    trainer = Trainer(model, Runtime(0, 1, torch.device("cuda"), Log(None)))
    assert trainer.uses_graphs
    weights = [trainer.loss_weights[stage].tolist() for stage in (first, faded)]
    assert weights == [list(WEIGHTS), [1.0, 0.25]]
    for step in range(2):
        trainer.warm_up(ROW, trainer.schedule.stage(step))
        trainer.capture(ROW, trainer.schedule.stage(step))
    rows = ROW, make_row(2, [0, 17, 400, 401, 402, 900]), make_row(3, [0, 512])
    many = make_row(4, [*range(0, 1024, 14)])
    assert len(many.cu_seqlens) > len(ROW.cu_seqlens)
    losses = []
    for row, step in zip((*rows, many), (0, 1, 0, 0)):
        settle(model)
        loss = trainer.compute(to_device(row, model.head.device), trainer.schedule.stage(step))
        expected = {"loss": loss.clone(), **gradients(model)}
        for param in model.parameters():
            param.grad.zero_()
        value = {
            "loss": trainer.micro_step(row, trainer.schedule.stage(step)).clone(),
            **gradients(model),
        }
        assert_near(value, expected, 1e-3, 1e-2)
        trainer.micro_step(row, trainer.schedule.stage(step))
        twice = {name: 2 * grad for name, grad in expected.items() if name != "loss"}
        assert_near(gradients(model), twice, 0, 1e-2)
        losses.append(value["loss"].item())
        with torch.no_grad():
            model.attention_bank.mul_(1.1)
            model.head.mul_(1.1)
    assert len(set(losses)) == 4
    with pytest.raises(KeyError):  # that stage has no graph
        trainer.micro_step(ROW, trainer.schedule.stage(2))


NGRAMS = {"ngram_orders": (3, 4), "ngram_rows": 2**16, "fp8": False}


def test_replays_leave_the_gradients_of_their_ngrams():
    """Graphs of two kinds, whose memory is shared, replayed alternately on other sequences than
    those they were captured on: a step has what eager passes leave, one sequence after another."""
    stages = [dataclasses.replace(STAGE, share=0.5, window_short=short) for short in (128, 64)]
    model = make_model(make_config(**NGRAMS, num_steps=2, stages=tuple(stages)))
    trainer = Trainer(model, Runtime(0, 1, torch.device("cuda"), Log(None)))
    ngrams = model.ngrams
    ngrams.table.normal_(0, 0.02)
    for step in range(2):
        trainer.warm_up(ROW, trainer.schedule.stage(step))
        trainer.capture(ROW, trainer.schedule.stage(step))
    rows, expected = [make_row(seed, [0, 17, 400, 900]) for seed in range(4)], []
    for i, row in enumerate(rows):
        settle(model)
        trainer.compute(to_device(row, ngrams.table.device), trainer.schedule.stage(i % 2))
        expected.append(ngrams.pending)
    settle(model)
    for i, row in enumerate(rows):
        trainer.micro_step(row, trainer.schedule.stage(i % 2))
    assert ngrams.filled == 4 * 1024
    for i, (row, (numbers, grads)) in enumerate(zip(rows, expected)):
        part = slice(1024 * i, 1024 * (i + 1))
        assert torch.equal(ngrams.rows[part], numbers)
        assert torch.equal(numbers, ngram_hash(row.tokens.cuda(), (3, 4), 2**16))
        assert relative_error(ngrams.grads[part], grads) < 2e-2


@pytest.mark.parametrize("fp8", [False, True])
def test_a_micro_batch_equals_its_sequences_one_by_one(fp8):
    """By graphs and kernels: four sequences in one pass, or each in its own."""
    rows, results = [make_row(seed, [0, 17, 400, 900]) for seed in range(4)], []
    whole = [torch.cat(parts) for parts in zip(*(row[:2] for row in rows))]
    starts = torch.cat([row.cu_seqlens[:4] + 1024 * i for i, row in enumerate(rows)])
    whole = Batch(*whole, torch.cat([starts, torch.full((48,), 4096)]).int(), 512, sequences=4)
    stage = dataclasses.replace(STAGE, candidates=6144)
    for batches in rows, [whole]:
        model = make_model(make_config(fp8=fp8, stages=(stage,), tokens_per_pass=4096))
        trainer = Trainer(model, Runtime(0, 1, torch.device("cuda"), Log(None)))
        for batch in batches:  # so that fp8 takes the same scales for both
            trainer.warm_up(batch, trainer.schedule.stage(0))
        trainer.capture(batches[0], trainer.schedule.stage(0))
        settle(model)
        loss = sum(
            trainer.micro_step(batch, trainer.schedule.stage(0)).clone() for batch in batches
        )
        found = {"ngrams": model.ngrams.grads[:4096].clone()}
        results.append({"loss": loss, **gradients(model), **found})
    assert_near(*results[::-1], 1e-3, 0.1 if fp8 else 3e-2)


def test_steps_insert_their_sequences_into_the_lookup():
    """During the optimizer's work and with graphs: to the bit what a CPU inserts, and then
    finds."""
    orders = (2, 3, 5)
    config = make_config(match_orders=orders, match_slots=2**12, num_steps=4, fp8=False)
    model = make_model(config)
    trainer = Trainer(model, Runtime(0, 1, torch.device("cuda"), Log(None)))
    trainer.warm_up(ROW, trainer.schedule.stage(0))
    trainer.capture(ROW, trainer.schedule.stage(0))
    cpu = Matches(config, cpu_runtime())
    for step in range(3):
        rows = [make_row(8 * step + i, [0, 17, 400, 900]) for i in range(8)]
        rows = [row._replace(tokens=row.tokens % 9, targets=row.targets % 9) for row in rows]
        found, _ = model.matches.look_up(rows)
        expected, read = cpu.look_up(rows)
        for own, reference in zip(found, expected):
            assert torch.equal(own.matched.cpu(), reference.matched)
        assert expected[0].matched.any() == (step > 0)
        trainer.run_step(0, rows, step)
        cpu.insert(read)
        assert torch.equal(model.matches.table.cpu(), cpu.table)
    assert count_of(cpu.table >> HALF_BITS).amax() > 1, "no context came twice"


def test_nothing_is_compiled_on_the_clock(tmp_path):
    """Shards inserted at the start, steps and scored sequences find what prepare() made."""
    for i, length in enumerate((40_000, 300_000)):
        write_shard(tmp_path / f"train_{i}.bin", random_documents(i, [length - 1]))
    files = {"train_files": str(tmp_path / "train_*.bin"), "match_shards": 1}
    config = make_config(match_orders=(2, 3), match_slots=2**12, num_steps=2, fp8=False, **files)
    runtime = Runtime(0, 1, torch.device("cuda"), Log(None))
    trainer = Trainer(make_model(config), runtime)
    trainer.prepare()
    compiled = counters["stats"]["unique_graphs"]
    trainer.begin_insertion([str(tmp_path / "train_1.bin")])
    steps = [[make_row(8 * step + i, [0, 17, 400, 900]) for i in range(8)] for step in range(2)]
    for step, rows in enumerate(steps):
        trainer.run_step(step, rows, following=steps[step + 1] if step == 0 else None)
    assert trainer.model.matches.table.any() and next(trainer.pieces, None) is None
    with torch.no_grad():
        trainer.model.validation_loss(to_device(ROW, runtime.device), WINDOWS)
    assert counters["stats"]["unique_graphs"] == compiled


def test_pieces_of_shards_on_the_gpu(tmp_path, monkeypatch):
    """Read from memory that later pieces take over, they make the tables that a CPU makes of the
    whole shard."""
    monkeypatch.setattr(train_gpt, "PIECE_TOKENS", 4096)
    lengths = np.random.default_rng(0).integers(2, 400, 2000).tolist()
    path = str(write_shard(tmp_path / "train.bin", random_documents(0, lengths, num_ids=50)))
    config = make_config(match_orders=(2, 3), match_slots=2**16, num_steps=16)
    trainer = Trainer(make_model(config), Runtime(0, 1, torch.device("cuda"), Log(None)))
    trainer.begin_insertion([path])
    trainer.insert_pieces(is_last=True)
    cpu, count = Matches(config, cpu_runtime()), 0
    for piece in train_gpt.shard_pieces([path], config.vocab_size, pin=False):
        cpu.insert(train_gpt.read_piece(piece))
        count += 1
    assert count > 2 * train_gpt.MOST_PIECES
    slots = slice(None, -train_gpt.SPARE_PLACES)
    assert torch.equal(trainer.model.matches.table[slots].cpu(), cpu.table[slots])


def test_no_step_waits_for_its_ngrams():
    """Neither gathering nor updating lets the host wait for the device."""
    config = make_config(**NGRAMS)
    model = make_model(config)
    model.ngrams.reset()
    optimizer = Optimizer(model, config, Runtime(0, 1, torch.device("cuda"), Log(None)))
    rows = torch.randint(0, 2**17, (1024, 2), device="cuda", dtype=torch.int32)
    grads = torch.randn(1024, config.model_dim, device="cuda", dtype=torch.bfloat16)
    for mode in ("default", "error"):  # the first time compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for _ in range(8):
                model.ngrams.gather(rows, grads)
            model.ngrams.update(0.1, 1e-10)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert model.ngrams.table.any(1).sum() == len(rows.unique())
    model.ngrams.gather(rows, grads)
    optimizer.step(1, 1.0, MOMENTUM)
    assert model.ngrams.filled == 0


# What a step changes ------------------------------------------------------------------------------


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that training moves, as it is: weights, tables, gradients, the optimizer's tensors, and
    fp8's copies, scales and largest numbers."""
    model = trainer.model
    tensors = dict(model.state_dict())  # with the rows of n-grams and matches
    tensors |= {f"{name}.grad": param.grad for name, param in model.named_parameters()}
    tensors |= {f"optimizer.{i}": x for i, x in enumerate(trainer.optimizer.tensors())}
    tensors["ngrams.sum_squares"] = model.ngrams.sum_squares
    for name, value in (vars(model.fp8) if model.fp8 else {}).items():
        leaves = [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
        tensors |= {f"fp8.{name}.{i}": x for i, x in enumerate(leaves)}
    return tensors


def copy_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in tensors.items()}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().flatten().view(torch.uint8)


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """The names of what is not the same bit for bit."""
    assert found.keys() == expected.keys()
    return [name for name, x in found.items() if not torch.equal(bits(x), bits(expected[name]))]


def test_steps_refresh_the_fp8_copies():
    """Of both banks and both ways round; to the 2.6 % that rounding to three bits of a mantissa
    comes to, where the weights move by more than 10 %."""
    model = make_model(make_config(fp8=True))
    optimizer = Optimizer(model, model.config, Runtime(0, 1, torch.device("cuda", 0), Log(None)))
    for step in (1, 2):
        before = [bank.clone() for bank, _ in model.fp8.banks]
        for param in model.parameters():
            param.grad.normal_()
        optimizer.step(step, 10.0, MOMENTUM)
        for (bank, (rows, columns, scale)), old in zip(model.fp8.banks, before, strict=True):
            assert relative_error(old, bank) > 0.1
            assert relative_error(rows.float() * scale[:, :1, None], bank) < 0.04
            assert torch.equal(columns.view(torch.uint8), rows.view(torch.uint8).mT)
            expected = bank.float().abs().amax((1, 2)) / 448
            torch.testing.assert_close(scale[:, 0], expected, rtol=1e-5, atol=0)


def test_preparing_leaves_nothing_behind(monkeypatch):
    """Not a bit of it, though its steps move all that training moves."""
    stage = dataclasses.replace(STAGE, candidates=2048)
    config = make_config(
        match_orders=(2, 3),
        match_slots=2**12,
        num_steps=2,
        extension_steps=1,
        stages=(stage,),
        extension=(stage,),
        average_shares=(1.0,),  # from the first step on
    )
    runtime = Runtime(0, 1, torch.device("cuda", 0), Log(None))
    trainer = Trainer(GPT(config, runtime), runtime)
    before, moved, run_step = copy_of(state(trainer)), set(), Trainer.run_step

    def running(*args: object) -> torch.Tensor:
        loss = run_step(*args)
        moved.update(differing(state(trainer), before))
        return loss

    monkeypatch.setattr(Trainer, "run_step", running)
    trainer.prepare()
    # gradients may be zero again behind a step, and some scales are fixed
    kept = [name for name in before if name not in moved and not name.endswith(".grad")]
    assert all(name.startswith("fp8.") and ".banks." not in name for name in kept), kept
    assert moved & {"fp8.scales.0"}
    assert differing(state(trainer), before) == []
    assert trainer.model.ngrams.filled == 0
    trainer.run_step(0, [make_row(i, [0, 17, 400, 900]) for i in range(8)])
    assert differing(state(trainer), before) != []


# Streams ------------------------------------------------------------------------------------------


def slow_down(monkeypatch: pytest.MonkeyPatch, side: bool, entry: bool) -> list:
    """Let the side stream, or the one that it branches off from, sleep for about 20 ms whenever the
    host enters it, or leaves it. Gives a list that grows with every entry."""
    name = "on_side_stream"
    enter, entries = getattr(GPT, name), []

    def sleep(on_side: bool, on_entry: bool) -> None:
        if (on_side, on_entry) == (side, entry):
            torch.cuda._sleep(40_000_000)  # cycles

    @contextlib.contextmanager
    def slowed(*args: object) -> Iterator[None]:
        sleep(False, True)
        with enter(*args):
            entries.append(torch.cuda.current_stream())
            sleep(True, True)
            yield
            sleep(True, False)
        sleep(False, False)

    monkeypatch.setattr(GPT, name, slowed)
    return entries


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_slow_streams_change_nothing(graphs):
    """Losses, gradients and whole steps, bit for bit: whoever reads what another stream writes, or
    takes memory that another stream reads, waits for it. Attention is the plain one, as others add
    up gradients in any order."""
    stage = dataclasses.replace(STAGE, candidates=2048)
    matches = {"match_orders": (2, 3), "match_slots": 2**12}
    changes = {"num_steps": 4, "stages": (stage,), "extension": (stage,), "cuda_graphs": graphs}
    model = make_model(make_config(**matches, **changes))
    model.backend = "plain"
    main = torch.cuda.current_stream()
    trainer = Trainer(model, Runtime(0, 1, torch.device("cuda", 0), Log(None)))
    rows = [make_row(seed, [0, 17, 400, 900]) for seed in range(3)]
    rows = [row._replace(tokens=row.tokens % 997, targets=row.targets % 997) for row in rows]
    rows = [Batch(*(x.pin_memory() for x in row[:3]), *row[3:]) for row in rows]
    settle(model)
    if graphs:
        trainer.warm_up(rows[0], trainer.schedule.stage(0))
        trainer.capture(rows[0], trainer.schedule.stage(0))
    trainer.run_step(0, rows, 1)  # so that no state is zero, and fp8 has its scales
    live = state(trainer)
    start = copy_of(live)

    def outcome() -> dict[str, torch.Tensor]:
        if graphs:
            trainer.capture(rows[0], trainer.schedule.stage(0))
        for name, tensor in live.items():
            tensor.detach().copy_(start[name])
        looked_up, _ = model.matches.look_up(rows)
        losses = [trainer.micro_step(row, trainer.schedule.stage(0)).clone() for row in looked_up]
        found = {f"passes.{name}": grad for name, grad in gradients(model).items()}
        filled = slice(model.ngrams.filled)
        found["passes.rows"] = model.ngrams.rows[filled].clone()
        found["passes.ngrams"] = model.ngrams.grads[filled].clone()
        settle(model)
        model.ngrams.filled = 0
        losses += [trainer.run_step(0, rows, step) for step in range(2)]
        found["losses"] = torch.stack(losses)
        assert not found.keys() & live.keys()
        return found | copy_of(live)

    expected = outcome()
    assert torch.isfinite(expected["losses"]).all() and expected["matches.table"].any()
    assert all(x.any() for name, x in expected.items() if name.startswith("passes."))
    assert differing(outcome(), expected) == [], "they must be the same twice to show anything"
    for side, entry in itertools.product((True, False), repeat=2):
        with pytest.MonkeyPatch.context() as patch:
            entries = slow_down(patch, side, entry)
            begin = time.perf_counter()
            found = outcome()
            torch.cuda.synchronize()
            assert time.perf_counter() - begin > 0.1 and len(entries) >= 3
            assert main not in entries
            assert differing(found, expected) == [], f"side {side}, entry {entry}"


# Updates ------------------------------------------------------------------------------------------


# Entries, matrices of an entry, rows: an MLP bank, pairs of q and k heads, v and o.
@pytest.mark.parametrize("shape", [(3, 1, 4224), (2, 4, 256), (2, 2, 512)])
def test_compiled_normuon_is_the_plain_one(shape):
    """In a part of a bank, whose rest stays as it is. Compiled, the norm is not rounded to bf16,
    which moves every singular value a little."""
    torch.manual_seed(0)
    bank, results = (shape[0], 4224, 768), []
    start = torch.randn(3, *bank, device="cuda")
    grad = torch.randn(bank, device="cuda", dtype=torch.bfloat16)
    count, by_row = shape[0] * shape[1], shape[2] >= 768
    squares = torch.rand(count, *((shape[2], 1) if by_row else (1, 768)), device="cuda") / 768
    scale = torch.linspace(1, 2, shape[0], device="cuda")
    numbers = (torch.tensor(x, device="cuda") for x in (0.85, 0.5, 0.9, 0.02, 1e-3))
    *momentum, lr, decay = numbers
    momentum = train_gpt.Momentum(*momentum)
    for update in (train_gpt.normuon_update_, train_gpt.normuon_update_.__wrapped__):
        weights, mean, slow_mean = (x.clone() for x in start)
        copy = weights.bfloat16()
        parts = [
            x[:, : shape[1] * shape[2]].unflatten(1, (-1, shape[2]))
            for x in (weights, copy, grad, mean, slow_mean)
        ]
        mean_square = squares.clone()
        update(*parts, mean_square, scale, momentum, 0.98, 0.95, lr, decay)
        moved = weights - start[0]
        assert torch.equal(copy, weights.bfloat16())
        assert torch.count_nonzero(moved[:, shape[1] * shape[2] :]) == 0
        results.append((moved, mean, slow_mean, mean_square))
    for value, reference, error in zip(*results, (0.1, 1e-6, 1e-6, 2e-2), strict=True):
        assert relative_error(value, reference) < error


def test_compiled_adam_is_the_plain_one():
    """Weights and moments after two updates of changing numbers, compiled once for both."""
    results, shape = [], (6288, 768)
    for update in (train_gpt.adam_update_, train_gpt.adam_update_.__wrapped__):
        torch.manual_seed(1)
        start, mean = torch.randn(2, *shape, device="cuda")
        mean_square = torch.rand(shape, device="cuda")
        weights, copy = start.clone(), start.bfloat16()
        for step in (1, 3):
            grad = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            numbers = [torch.tensor(x, device="cuda") for x in (step, 0.02 / step, 0.1 / step)]
            rates = (0.9, 0.99), numbers[0], 1e-10, *numbers[1:]
            with torch.compiler.set_stance("default" if step == 1 else "fail_on_recompile"):
                update(weights, copy, grad, mean, mean_square, *rates)
        assert torch.equal(copy, weights.bfloat16())
        results.append((weights - start, mean, mean_square))
    for value, reference, error in zip(*results, (1e-3, 1e-6, 1e-6), strict=True):
        assert relative_error(value, reference) < error  # some turn their sign and decay or not


def test_steps_are_timed_on_the_device():
    """Whenever the host asks; a second start goes on from the total."""
    clock, marks = Clock(Runtime(0, 1, torch.device("cuda"), Log(None))), []
    torch.cuda._sleep(1000)
    clock.start()
    for _ in range(4):
        torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
        marks.append(clock.mark())
    time.sleep(0.5)
    times = [clock.at(mark) for mark in marks]
    steps = [b - a for a, b in zip([0.0, *times], times)]
    assert 0.005 < min(steps) and max(steps) < 1.5 * min(steps)
    clock.stop()
    assert times == [clock.at(mark) for mark in marks]
    assert clock.total > 0.5 > times[-1]
    clock.start()
    assert 0 <= clock.at(clock.mark()) - clock.total < 0.1
