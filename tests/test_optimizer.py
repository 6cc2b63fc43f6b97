"""Section 6: every rule against a float64 transcription, and sharding against one process."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    MOMENTUM,
    cpu_runtime,
    fp32_for_fp8,
    on_ranks,
    random_batch,
    random_documents,
    tiny_config,
    trained_like,
)
from test_kernels import relative_error
from torch import Tensor
from torch.utils._pytree import tree_leaves

import train_gpt
from train_gpt import (
    GPT,
    PARAM_GROUPS,
    POLAR_EXPRESS,
    TINY_LAYERS,
    Config,
    Fp8Copies,
    Momentum,
    Optimizer,
    Runtime,
    Schedule,
    Windows,
    adam_update_,
    apply_update_,
    normuon_update_,
    nothing_changes,
    polar_express,
    rank_batches,
)

GROUPS = {group.name: group for group in PARAM_GROUPS}
# Tall, wide and square; the last two are those of one pair of heads and one W_1 in tiny_config.
SHAPES = [(3, 24, 10), (3, 10, 24), (2, 16, 16), (1, 16, 32), (1, 64, 32)]


def gaussian(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def used_entries(name: str, config: Config) -> int:
    """Entries of a bank that are no padding."""
    return {"attention_bank": 1, "mlp_bank": 2}[name] * len(config.layers)


# Polar factor ------------------------------------------------------------------------------------


def reference_polar(x: Tensor) -> Tensor:
    """What the maps make of each singular value, between the SVD's factors, in float64."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = mapped(s / (1.05 * s.square().sum(dim=-1, keepdim=True).sqrt()))
    return u * s[:, None, :] @ v


def mapped(s: Tensor) -> Tensor:
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return s


def test_maps_take_singular_values_to_one():
    s = mapped(torch.logspace(math.log10(0.003), math.log10(1 / 1.05), 100_000).double())
    assert 0.995 < s.min() < s.max() < 1.0005


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_express_maps_singular_values_by_its_polynomials(shape):
    x = gaussian(shape, 1).double()
    torch.testing.assert_close(polar_express(x), reference_polar(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_polar_express_is_nearly_the_polar_factor(shape, dtype, slack):
    """Singular values above 0.3 % of the Frobenius norm end near 1, the singular vectors stay."""
    u, _, v = torch.linalg.svd(gaussian(shape, 2).double(), full_matrices=False)
    spread = torch.logspace(0, -2, u.size(-1), dtype=torch.float64)
    x = 50 * u * spread @ v
    y = polar_express(x.to(dtype)).double()
    assert y.shape == x.shape
    singular_values = torch.linalg.svdvals(y)
    assert singular_values.min() > 0.995 - slack
    assert singular_values.max() < 1.0005 + slack
    factor = u @ v
    cosine = (y * factor).sum() / (y.norm() * factor.norm())
    assert cosine > 0.999


def test_polar_express_leaves_zero_matrices_zero():
    x = torch.cat([torch.zeros(1, 8, 6), gaussian((1, 8, 6), 3)])
    y = polar_express(x)
    assert torch.count_nonzero(y[0]) == 0
    torch.testing.assert_close(y[1:], polar_express(x[1:]))


# NorMuon -----------------------------------------------------------------------------------------


class ReferenceNorMuon:
    """NorMuon for one matrix in float64: two means, polar factor, evened rows, old norm."""

    def __init__(self, rows: int, cols: int):
        self.mean, self.slow = torch.zeros(2, rows, cols, dtype=torch.float64)
        self.mean_square = torch.zeros(max(rows, cols), dtype=torch.float64)
        self.by_row = rows >= cols

    def direction(self, grad: Tensor, momentum: Momentum, beta2: float) -> Tensor:
        grad = grad.double()
        self.mean = momentum.decay * self.mean + (1 - momentum.decay) * grad
        self.slow = 0.98 * self.slow + 0.02 * grad
        mixed = (1 - momentum.slow_share) * self.mean + momentum.slow_share * self.slow
        nesterov = momentum.look_ahead * mixed + (1 - momentum.look_ahead) * grad
        polar = reference_polar(nesterov[None])[0]
        squares = (polar**2).mean(dim=1 if self.by_row else 0)
        self.mean_square = beta2 * self.mean_square + (1 - beta2) * squares
        root = self.mean_square.sqrt()
        evened = polar / (root[:, None] if self.by_row else root[None, :])
        return evened * (polar.norm() / evened.norm())


@pytest.mark.parametrize("per_entry", [False, True], ids=["entries", "matrices of an entry"])
@pytest.mark.parametrize("shape", SHAPES)
def test_normuon_update_over_steps(shape, per_entry):
    """Direction and state by a learning rate of one on weights of zero, then a step that decays."""
    batch, rows, cols = shape
    bank = (1, batch, rows, cols) if per_entry else (batch, 1, rows, cols)
    step_scale = torch.linspace(1, 2, bank[0])
    references = [ReferenceNorMuon(rows, cols) for _ in range(batch)]
    mean, slow_mean, weights = torch.zeros(3, *bank)
    mean_square = torch.zeros((batch, rows, 1) if rows >= cols else (batch, 1, cols))
    for step, numbers in enumerate(
        ((0.85, 0.0, 0.85), (0.9, 0.0, 0.9), (0.85, 0.6, 0.95), (0.85, 0.6, 0.9))
    ):
        # rows and columns of unlike size, so that evening them out does something
        grad = gaussian(shape, 10 + step) * torch.linspace(0.2, 3, rows)[:, None]
        grad = grad * torch.linspace(2, 0.3, cols)
        tensors = Momentum(*map(torch.tensor, numbers))
        rates = torch.tensor(1.0), torch.tensor(0.125)
        start = gaussian(bank, 20) if step == 3 else torch.zeros(bank)
        weights.copy_(start)
        state = mean, slow_mean, mean_square, step_scale
        normuon_update_(weights, None, grad.view(bank), *state, tensors, 0.98, 0.9, *rates)
        momentum = Momentum(*numbers)
        expected = torch.stack([r.direction(g, momentum, 0.9) for r, g in zip(references, grad)])
        expected = expected.view(bank) * step_scale[:, None, None, None].double()
        expected = start - expected - 0.125 * start * (expected * start > 0)
        torch.testing.assert_close(weights.double(), expected, rtol=0, atol=4e-4)
        for found, name in (mean, "mean"), (slow_mean, "slow"):
            kept = torch.stack([getattr(reference, name) for reference in references])
            torch.testing.assert_close(found.double(), kept.view(bank), rtol=1e-5, atol=1e-6)
        squares = torch.stack([reference.mean_square for reference in references])
        torch.testing.assert_close(mean_square.flatten(1).double(), squares, rtol=2e-3, atol=1e-6)


# Adam --------------------------------------------------------------------------------------------


def test_small_steps_of_bf16_weights_add_up():
    """They would be lost in bf16; the model's copy is the weights rounded."""
    weights, copy = gaussian((64, 33), 1), torch.zeros(64, 33, dtype=torch.bfloat16)
    start, decay = weights.clone(), torch.tensor(0.0)
    for step in range(100):
        apply_update_(weights, copy, torch.ones(64, 33), torch.tensor(1e-5), decay)
        assert torch.equal(copy, weights.bfloat16()), step
    torch.testing.assert_close(start - weights, torch.full((64, 33), 1e-3), rtol=0, atol=1e-5)


def test_cautious_decay_by_hand():
    """Only entries that the step shrinks anyway decay; a zero weight or a zero step does not."""
    weights = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0, 0.0])
    direction = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 1.0])
    apply_update_(weights, None, direction, torch.tensor(0.5), torch.tensor(0.25))
    torch.testing.assert_close(weights, torch.tensor([0.25, 1.5, -1.5, -0.25, 2.0, -0.5]))


class ReferenceAdam:
    """Kingma & Ba's algorithm 1 with cautious decay, in float64."""

    def __init__(self, weights: Tensor):
        self.weights = weights.double().clone()
        self.m, self.v = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.t = 0

    def step(
        self, grad: Tensor, betas: tuple[float, float], eps: float, lr: float, decay: float
    ) -> None:
        self.t += 1
        self.m = betas[0] * self.m + (1 - betas[0]) * grad.double()
        self.v = betas[1] * self.v + (1 - betas[1]) * grad.double() ** 2
        m_hat, v_hat = self.m / (1 - betas[0] ** self.t), self.v / (1 - betas[1] ** self.t)
        update = m_hat / (v_hat.sqrt() + eps)
        mask = (update * self.weights > 0).double()
        self.weights = self.weights - lr * update - decay * mask * self.weights


def test_adam_update_over_steps():
    weights = gaussian((50, 7), 1)
    reference = ReferenceAdam(weights)
    mean, mean_square = torch.zeros_like(weights), torch.zeros_like(weights)
    betas, eps, lr, decay = (0.8, 0.95), 1e-3, 0.05, 0.01
    for t in range(1, 9):
        grad = gaussian(weights.shape, 20 + t, 0.1**t)  # falling, so that eps comes to matter
        numbers = torch.tensor(t), eps, torch.tensor(lr), torch.tensor(decay)
        adam_update_(weights, None, grad, mean, mean_square, betas, *numbers)
        reference.step(grad, betas, eps, lr, decay)
        torch.testing.assert_close(weights.double(), reference.weights, rtol=1e-5, atol=1e-6)


# Optimizer.step ----------------------------------------------------------------------------------


# Betas, lr and decay multipliers of everything that Adam updates; of GPT.small by the slice's name.
ADAM = {
    "head": ((0.5, 0.95), 1, 150),
    "value_embed": ((0.75, 0.95), 75, 5),
    "residual": ((0.9, 0.95), 5, 0),
    "project": ((0.9, 0.99), 2.5, 0),
    "mlp_residual": ((0.9, 0.95), 5, 0),
    "mlp_project": ((0.9, 0.95), 1, 0),
    "ngrams": ((0.9, 0.99), 1, 0),
    "attended": ((0.9, 0.99), 1, 0),
    "gate_w_1": ((0.9, 0.99), 0.25, 1),
    "gate_b_1": ((0.9, 0.99), 0.25, 0),
    "gate_w_2": ((0.9, 0.99), 0.25, 1),
    "gate_b_2": ((0.9, 0.99), 0.25, 0),
    "pointer": ((0.9, 0.99), 1, 0),
    "pointer_sink": ((0.9, 0.99), 1, 0),
    "pointer_gain": ((0.9, 0.99), 1, 0),
}


def test_adam_changes_on_odd_steps_with_summed_gradients(runtime):
    """Every table and every slice of GPT.small by a separate Adam with its own numbers."""
    config = tiny_config(adam_weight_decay=0.02)  # strong enough that a missing decay shows
    model = trained_like(config, runtime)
    optimizer = Optimizer(model, config, runtime)
    params = {name: getattr(model, name) for name in ("head", "value_embed")}
    params["small"] = model.small
    assert {name: GROUPS[name].every for name in params} == dict.fromkeys(params, 2)

    def pieces(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        sizes = [math.prod(row.shape) for row in model.small_layout.values()]
        cut = dict(zip(model.small_layout, tensors["small"].split(sizes), strict=True))
        return {name: t for name, t in tensors.items() if name != "small"} | cut

    detached = {name: param.detach() for name, param in params.items()}
    references = {name: ReferenceAdam(piece) for name, piece in pieces(detached).items()}
    assert references.keys() == ADAM.keys()
    sums = {}
    for step in range(6):
        lr_scale = 1.0 - 0.1 * step
        before = {name: param.detach().clone() for name, param in params.items()}
        for index, (name, param) in enumerate(params.items()):
            grad = gaussian(param.shape, 10 * step + index, 0.01)
            sums[name] = sums.get(name, 0) + grad.double()
            param.grad += grad  # as backward() does
        optimizer.step(step, lr_scale, MOMENTUM)
        if step % 2 == 0:
            assert all(torch.equal(param, before[name]) for name, param in params.items())
            assert all(param.grad.norm() > 0 for param in params.values())
            continue
        assert all(torch.count_nonzero(param.grad) == 0 for param in params.values())
        grads, sums, values = pieces(sums), {}, pieces(params)
        for name, (betas, multiplier, weight_decay) in ADAM.items():
            lr = config.adam_lr * multiplier * lr_scale
            decay = lr * lr * config.adam_weight_decay * weight_decay
            references[name].step(grads[name], betas, config.adam_eps, lr, decay)
            moved = values[name].double() - references[name].weights
            # in float32: of a step, and of the weight
            assert moved.abs().max() < 1e-3 * lr + 3e-7 * values[name].abs().max(), name


def blocks_of(name: str, config: Config) -> list[tuple[int, int, int, float]]:
    """(entry, first row, rows, multiplier of the step) of every matrix NorMuon takes whole."""
    dim, num_layers = config.model_dim, len(config.layers)
    if name == "mlp_bank":
        factor = max(1.0, config.mlp_dim / dim) ** 0.5
        return [
            (entry, 0, config.mlp_dim, factor * (1 if entry < num_layers else 2))
            for entry in range(2 * num_layers)
        ]
    width, pair = config.attention_dim, 2 * config.head_dim
    blocks = []
    for entry in range(used_entries(name, config)):
        blocks += [(entry, first, pair, 1.0) for first in range(0, 2 * width, pair)]  # q, then k
        blocks += [(entry, 2 * width, width, 1.0), (entry, 3 * width, width, 1.0)]  # v, o
    return blocks


@pytest.mark.parametrize("name", ["attention_bank", "mlp_bank"])
def test_normuon_step_block_by_block(runtime, name):
    """Pairs of q and k heads, v, o, W_1 and W_2 are each orthogonalised by themselves, the padding
    of the bank stays zero, and step sizes and decay are those of the recipe."""
    config = tiny_config(muon_weight_decay=50.0)  # strong enough that a missing decay shows
    model = trained_like(config, runtime)
    optimizer = Optimizer(model, config, runtime)
    optimizer.states = [state for state in optimizer.states if state.group.name == name]
    bank = getattr(model, name)
    blocks = blocks_of(name, config)
    references = [ReferenceNorMuon(rows, config.model_dim) for _, _, rows, _ in blocks]
    expected = bank.detach().double().clone()
    used = used_entries(name, config)
    for step, (lr_scale, momentum) in enumerate(
        [(1.0, Momentum(0.85, 0.0, 0.85)), (1.5, MOMENTUM), (0.5, Momentum(0.85, 0.6, 0.95))]
    ):
        assert torch.count_nonzero(bank.grad) == 0  # the step before has left it so
        bank.grad[:used] = gaussian(bank[:used].shape, 30 + step)
        lr = config.muon_lr * lr_scale
        for reference, (entry, first, rows, factor) in zip(references, blocks):
            part = expected[entry, first : first + rows]
            grad = bank.grad[entry, first : first + rows]
            direction = factor * reference.direction(grad, momentum, config.muon_beta2)
            decay = lr * lr * config.muon_weight_decay * (direction * part > 0)
            expected[entry, first : first + rows] = part - lr * direction - decay * part
        optimizer.step(step, lr_scale, momentum)
        torch.testing.assert_close(bank.double(), expected, rtol=0, atol=2e-5)
    assert torch.count_nonzero(bank[used:]) == 0


def test_all_weights_belong_to_a_group_and_the_tables_agree(runtime, monkeypatch):
    config = tiny_config()
    model = GPT(config, runtime)
    Optimizer(model, config, runtime)
    monkeypatch.setattr(train_gpt, "PARAM_GROUPS", PARAM_GROUPS[1:])
    with pytest.raises(AssertionError, match="disagree"):
        Optimizer(model, config, runtime)


def test_gradients_stay_where_they_are(runtime):
    """The parts of a parameter that the model computes with write into the parameter's gradient,
    whatever has happened to it."""
    config = tiny_config()
    model = trained_like(config, runtime)
    optimizer = Optimizer(model, config, runtime)
    places = {name: param.grad.data_ptr() for name, param in model.named_parameters()}
    batch, gradients = random_batch(1, [30, 34]), []
    for step in (0, 1, 2):
        gradients.append({name: param.grad.clone() for name, param in model.named_parameters()})
        with nothing_changes(model, optimizer):
            model.validation_loss(batch, Windows(8, 24)).backward()
            optimizer.step(step, 1.0, MOMENTUM)
        model.validation_loss(batch, Windows(8, 24)).backward()
    assert {name: param.grad.data_ptr() for name, param in model.named_parameters()} == places
    for name, once in gradients[1].items():
        # nothing_changes leaves them zero, so they do not add up
        torch.testing.assert_close(gradients[2][name], once, rtol=0, atol=0)
        assert torch.equal(dict(model.named_parameters())[name].grad, once)
        assert once.norm() > 0
    model.validation_loss(batch, Windows(8, 24)).backward()
    for name, param in model.named_parameters():
        twice = 2 * gradients[1][name]
        assert (param.grad - twice).norm() < 1e-5 * twice.norm(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_changes_restores_every_bit(runtime, dtype):
    """Of n-grams nothing is left."""
    config = tiny_config(dtype=dtype)
    model = trained_like(config, runtime)
    optimizer = Optimizer(model, config, runtime)
    batch, ngrams = random_batch(1, [30, 34]), model.ngrams

    def steps(numbers: range) -> None:
        for step in numbers:
            model.validation_loss(batch, Windows(8, 24)).backward()
            ngrams.gather(*ngrams.pending)
            optimizer.step(step, 1.0, MOMENTUM)

    steps(range(4))  # so that moments are not zero
    tensors = [*model.parameters()]
    for state in optimizer.states:
        tensors += [state.weights, state.mean, *state.mean_squares]
        assert (state.copy is None) == (state.param.dtype == torch.float32)
    # five parameters, weights and two moments each, but three for attention
    assert len(tensors) == 5 + 5 + 11
    before = [tensor.detach().clone() for tensor in tensors]
    table, sums = ngrams.table.clone(), ngrams.sum_squares.clone()
    with pytest.raises(KeyError), nothing_changes(model, optimizer):
        steps(range(3))
        changed = [not torch.equal(tensor, copy) for tensor, copy in zip(tensors, before)]
        changed += [not torch.equal(ngrams.table, table), not torch.equal(ngrams.sum_squares, sums)]
        assert all(changed), "the steps must touch everything, or this test shows nothing"
        ngrams.gather(*ngrams.pending)
        raise KeyError("an error on the way out")
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before))
    assert all(torch.count_nonzero(param.grad) == 0 for param in model.parameters())
    assert torch.count_nonzero(ngrams.table) == torch.count_nonzero(ngrams.sum_squares) == 0
    assert ngrams.filled == 0


# Copies in fp8 -----------------------------------------------------------------------------------


def model_with_copies(
    config: Config, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> tuple[GPT, Optimizer]:
    """A model that computes by kernels, in Triton's interpreter and with fp32 in place of fp8."""
    model = trained_like(config, runtime)
    fp32_for_fp8(monkeypatch)
    monkeypatch.setattr(train_gpt, "has_kernels", lambda device: True)
    model.fp8 = Fp8Copies(model.mlp_bank, model.attention_bank, model.head, len(config.layers))
    return model, Optimizer(model, config, runtime)


def test_step_refreshes_the_fp8_copies(runtime, monkeypatch):
    """Of both banks, both ways round and each matrix with its own scale; in odd steps too, in which
    the head stays as it is."""
    model, optimizer = model_with_copies(tiny_config(vocab_size=300), runtime, monkeypatch)
    for step in (1, 2):
        before = [bank.clone() for bank, _ in model.fp8.banks]
        for param in model.parameters():
            param.grad.normal_()
        optimizer.step(step, 1.0, MOMENTUM)
        for (bank, (rows, columns, scale)), old in zip(model.fp8.banks, before, strict=True):
            assert relative_error(old, bank) > 1e-2, "the step must move what is copied"
            assert relative_error(rows * scale[:, :1, None], bank) < 1e-6
            assert torch.equal(columns, rows.mT) and columns.is_contiguous()
            torch.testing.assert_close(scale[:, 0], bank.abs().amax((1, 2)) / 448)


def test_nothing_changes_resets_the_fp8_copies(runtime, monkeypatch):
    """Copies, scales and the largest numbers seen are those of the first step, bit for bit."""
    layers = TINY_LAYERS[0], dataclasses.replace(TINY_LAYERS[-1], attend_from=0)
    config = tiny_config(vocab_size=300, layers=layers)
    model, optimizer = model_with_copies(config, runtime, monkeypatch)
    batch = random_batch(1, [5, 3])
    batch = batch._replace(tokens=batch.tokens % 300, targets=batch.targets % 300)
    copies = [x for x in tree_leaves(vars(model.fp8)) if isinstance(x, Tensor)]
    before = [x.clone() for x in copies]
    (_, mlp_copy), (_, qkv_copy) = model.fp8.banks
    moving = [*mlp_copy, *qkv_copy, model.fp8.scales]
    starts = [x.clone() for x in moving]
    with nothing_changes(model, optimizer):
        loss, _ = model.training_loss(batch, Windows(8, 24), torch.tensor([1.0, 0.5]))
        loss.backward()
        largest = model.fp8.largest.clone()
        assert (largest > 0).all(), "a pass sees numbers of every kind"
        model.ngrams.gather(*model.ngrams.pending)
        optimizer.step(1, 1.0, MOMENTUM)
        assert not any(map(torch.equal, moving, starts)), "or this test shows nothing"
        model.fp8.largest.copy_(largest)  # as a pass behind the last step leaves them
    assert all(map(torch.equal, copies, before))


# Several processes -------------------------------------------------------------------------------


def train_on_four_rows(rank: int, world_size: int) -> dict[str, Tensor]:
    """The weights and rows of n-grams after 7 real steps on the same four sequences, float32."""
    config = tiny_config(sequences_per_step=4, ngram_rows=4096)  # more than the steps touch
    runtime = cpu_runtime(rank, world_size)
    model, schedule = GPT(config, runtime), Schedule(config)
    optimizer = Optimizer(model, config, runtime)
    for step in range(7):
        stage = schedule.stage(step)
        weights = torch.tensor([1.0, stage.second])
        seeds = range(2000 + 10 * step, 2004 + 10 * step)  # few gradients of rows are all rounding
        starts = np.array([0, 20])
        sequences = [(random_documents(seed, [20, 44, 1]), starts) for seed in seeds]
        for batch in rank_batches(sequences, 1, 64, config, runtime):
            model.ngrams.pull(batch.exchange)
            model.ngrams.wait()
            loss, _ = model.training_loss(batch, schedule.windows(step), weights)
            (loss / config.sequences_per_step).backward()
            model.ngrams.gather(*model.ngrams.pending)
        optimizer.step(step, schedule.lr_scale(step), schedule.momentum(step))
    table = model.ngrams.whole_table()
    assert rank or 512 < table.any(1).sum() < 4096
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    return weights if table is None else weights | {"ngrams.table": table.clone()}


def train_on_exact_gradients(rank: int, world_size: int) -> dict[str, Tensor]:
    """Weights in bf16 and fp32 after steps with gradients whose sum over the ranks is exact.

    A gradient is a sum of four of small integers, so the order of adding them cannot matter."""
    config = tiny_config(dtype="bfloat16")
    runtime = cpu_runtime(rank, world_size)
    model = GPT(config, runtime)
    optimizer = Optimizer(model, config, runtime)
    for step in range(4):
        for index, param in enumerate(model.parameters()):
            for row in range(4)[rank::world_size]:
                generator = torch.Generator().manual_seed(1000 * step + 10 * index + row)
                grad = torch.randint(-8, 9, param.shape, generator=generator)
                param.grad += grad.to(param.dtype)
        optimizer.step(step, 1.0, MOMENTUM)
    results = {name: param.detach().clone() for name, param in model.named_parameters()}
    for state in optimizer.states:  # this rank's rows
        results[f"{state.group.name}.weights"] = state.weights
    return results


def train_both_ways(runtime: Runtime, folder: Path) -> tuple[dict, dict]:
    place = runtime.rank, runtime.world_size
    return train_on_four_rows(*place), train_on_exact_gradients(*place)


@pytest.fixture(scope="module")
def single_process() -> tuple[dict, dict]:
    return train_on_four_rows(0, 1), train_on_exact_gradients(0, 1)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_end_with_the_weights_of_one_process(world_size, single_process, tmp_path):
    real, exact = single_process
    ranks = on_ranks(train_both_ways, world_size, tmp_path)
    for name in real:
        for rank in range(1, world_size if name != "ngrams.table" else 1):  # rank 0 has it whole
            assert torch.equal(ranks[rank][0][name], ranks[0][0][name]), f"ranks differ in {name}"
            assert torch.equal(ranks[rank][1][name], ranks[0][1][name]), f"ranks differ in {name}"
        used = slice(len(real[name]))  # behind it banks are padded
        compare_real(name, ranks[0][0][name][used], real[name])
    for name in ("head", "value_embed"):  # elementwise: not a bit differs
        joined = torch.cat([rank[1][f"{name}.weights"] for rank in ranks])
        assert torch.equal(joined, exact[f"{name}.weights"]), name
    assert torch.equal(ranks[0][1]["small"], exact["small"])
    for name in ("attention_bank.weights", "mlp_bank.weights"):  # products of matrices: rounding
        joined = torch.cat([rank[1][name] for rank in ranks])[: len(exact[name])]
        torch.testing.assert_close(joined, exact[name], rtol=0, atol=1e-5)


def compare_real(name: str, value: Tensor, expected: Tensor) -> None:
    """Equal to rounding. Adam divides by the root of the gradient's own square, so where a gradient
    is all rounding (a handful of entries of millions) a step may go the other way; and a weight
    decays or not by the sign of its step."""
    config, group = tiny_config(), GROUPS.get(name)
    if group is None:
        lr = config.ngram_lr
    else:
        lr = group.lr * (config.adam_lr if group.rule == "adam" else config.muon_lr)
    difference = (value - expected).abs() / lr  # in steps
    assert difference.max() < 2, name
    assert (difference > 2e-3).sum() <= 3 + 2e-5 * value.numel(), name
    assert difference.mean() < 1e-4, name  # rounding has given 2.2e-5
