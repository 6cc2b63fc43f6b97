"""Room 4: the model against a float64 transcription, what each position can see, and its weights."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import cpu_runtime, random_batch, tiny_config
from torch import Tensor

from train_gpt import GPT, IGNORED_TARGET, Batch, Config, Layer, Runtime


def trained_like(config: Config, runtime: Runtime, seed: int = 0) -> GPT:
    """A model whose projections and gates are not zero, as if it had been trained."""
    model = GPT(config, runtime)
    generator = torch.Generator().manual_seed(seed)
    num_layers, dim = len(config.layers), config.model_dim
    with torch.no_grad():
        model.attention_bank[:num_layers, 3 * dim :].normal_(0, 0.2, generator=generator)
        model.mlp_bank[num_layers : 2 * num_layers].normal_(0, 0.2, generator=generator)
        model.value_gate.normal_(0, 1, generator=generator)
        for table in (model.embed, model.value_embed):
            table.normal_(0, 0.5, generator=generator)
    return model


def changed(model: GPT, batch: Batch, position: int, windows: tuple[int, int]) -> set[int]:
    """The positions whose hidden state depends on the token at `position`."""
    tokens = batch.tokens.clone()
    tokens[position] = (tokens[position] + 1) % 50_000
    with torch.no_grad():
        before = model.hidden(batch, *windows)
        after = model.hidden(batch._replace(tokens=tokens), *windows)
    return set((before != after).any(dim=1).nonzero().flatten().tolist())


# Against a transcription -------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def reference_hidden(model: GPT, batch: Batch, windows: dict[str, int]) -> Tensor:
    """The forward pass layer by layer and head by head in float64, with dense masks."""
    config = model.config
    dim, head_dim, num_layers = config.model_dim, config.head_dim, len(config.layers)
    vocab = config.padded_vocab_size
    tokens, num_tokens = batch.tokens.long(), len(batch.tokens)
    position = torch.arange(num_tokens)
    document = torch.zeros(num_tokens, dtype=torch.long)
    for start in batch.cu_seqlens.tolist()[1:]:
        document[start:] += 1
    distance = position[:, None] - position[None, :]
    frequencies = 1024.0 ** -torch.linspace(0, 1, head_dim // 4, dtype=torch.float64)
    angles = position[:, None].double() * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotate(heads: Tensor) -> Tensor:
        half = head_dim // 2
        turned = torch.view_as_complex(heads[:, :half].reshape(num_tokens, -1, 2)) * turn
        return torch.cat([torch.view_as_real(turned).reshape(num_tokens, half), heads[:, half:]], 1)

    x = rms(model.embed.double()[tokens])
    for i, layer in enumerate(config.layers):
        weights = model.attention_bank[i].double()
        w_q, w_k, w_v, w_o = weights.split(dim)
        n = rms(x)
        visible = (distance >= 0) & (distance <= windows[layer.window])
        visible &= document[:, None] == document[None, :]
        heads = []
        for h in range(dim // head_dim):
            rows = slice(h * head_dim, (h + 1) * head_dim)
            q, k, v = rotate(rms(n @ w_q[rows].T)), rotate(rms(n @ w_k[rows].T)), n @ w_v[rows].T
            if layer.value_table is not None:
                table = layer.value_table
                value = model.value_embed.double()[table * vocab + tokens]
                features = torch.cat([n[:, :6], value[:, :6]], 1)
                gate = 2 * torch.sigmoid(features @ model.value_gate[table, h].double())
                v = v + gate[:, None] * value[:, rows]
            scores = (q @ k.T * config.attention_scale).masked_fill(~visible, -math.inf)
            heads.append(scores.softmax(dim=1) @ v)
        x = x + torch.cat(heads, 1) @ w_o.T
        w_1, w_2 = model.mlp_bank[i].double(), model.mlp_bank[num_layers + i].double()
        x = x + torch.relu(rms(x) @ w_1.T) ** 2 @ w_2
    return x


@pytest.mark.parametrize("lengths", [[64], [1, 20, 2, 41]])
def test_hidden_is_the_written_down_forward_pass(runtime, lengths):
    config = tiny_config(attention_scale=0.7)  # peaked enough that keys matter
    model = trained_like(config, runtime)
    batch = random_batch(1, lengths)
    with torch.no_grad():
        value = model.hidden(batch, 8, 24)
        expected = reference_hidden(model, batch, {"short": 8, "long": 24})
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)


def reference_losses(model: GPT, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every target, nats, in float64."""
    logits = 23 / (1 + torch.exp(-(rms(hidden.double()) @ model.embed.double().T + 5) / 7.5))
    return logits.exp().sum(dim=1).log() - logits[torch.arange(len(targets)), targets]


def test_forward_is_the_sum_of_cross_entropies(runtime):
    model = trained_like(tiny_config(), runtime)
    batch = random_batch(2, [30, 34])
    with torch.no_grad():
        loss = model(batch, 8, 24)
        expected = reference_losses(model, model.hidden(batch, 8, 24), batch.targets)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert expected.std() > 0.1  # the targets differ, so a wrong one would show
    torch.testing.assert_close(loss.double(), expected.sum(), rtol=1e-5, atol=0)


def test_ignored_targets_count_nothing(runtime):
    model = trained_like(tiny_config(), runtime)
    batch = random_batch(3, [64])
    targets = batch.targets.clone()
    ignored = torch.arange(64) % 3 == 1
    targets[ignored] = IGNORED_TARGET
    with torch.no_grad():
        losses = reference_losses(model, model.hidden(batch, 8, 24), batch.targets)
        loss = model(batch._replace(targets=targets), 8, 24)
        none = model(batch._replace(targets=torch.full_like(targets, IGNORED_TARGET)), 8, 24)
    torch.testing.assert_close(loss.double(), losses[~ignored].sum(), rtol=1e-5, atol=0)
    assert none.item() == 0


def test_gradient_reaches_every_weight_in_use(runtime):
    """And none of a bank's padding, nor value table rows of tokens that do not occur."""
    config = tiny_config()
    model = trained_like(config, runtime)
    batch = random_batch(4, [64], num_ids=500)
    model(batch, 8, 24).backward()
    num_layers = len(config.layers)
    for bank, used in (model.attention_bank, num_layers), (model.mlp_bank, 2 * num_layers):
        norms = bank.grad.flatten(1).norm(dim=1)
        assert (norms[:used] > 0).all()
        assert (norms[used:] == 0).all()
    assert (model.value_gate.grad.flatten(1).norm(dim=1) > 0).all()
    touched = model.value_embed.grad.view(2, -1, config.model_dim).norm(dim=2) > 0
    for table in touched:
        assert set(table.nonzero().flatten().tolist()) == set(batch.tokens.tolist())


# What a position sees ----------------------------------------------------------------------------


def test_causal_within_documents(runtime):
    """A token changes hidden states from its own position to the end of its document, no others."""
    model = trained_like(tiny_config(), runtime)
    batch = random_batch(5, [10, 24, 1, 29])
    for position, end in ((0, 10), (9, 10), (10, 34), (20, 34), (34, 35), (35, 64), (63, 64)):
        seen = changed(model, batch, position, (8, 64))
        assert position in seen
        assert seen <= set(range(position, end))
        assert max(seen) == end - 1  # three layers of windows of 8 and more reach that far


@pytest.mark.parametrize("window", ["short", "long"])
def test_window_reach(runtime, window):
    """One layer: position t depends on t - window and not on the token before that; over the 256
    positions that plain attention takes at a time, too."""
    config = tiny_config(
        layers=(Layer(window, 0),), stages=tiny_config().stages, val_row_tokens=320
    )
    model = trained_like(config, runtime)
    batch = random_batch(6, [320])
    windows = (5, 270) if window == "short" else (3, 270)
    reach = windows[0] if window == "short" else windows[1]
    for position in (0, 17, 300) if window == "short" else (0, 17, 49, 300):
        expected = set(range(position, min(320, position + reach + 1)))
        assert changed(model, batch, position, windows) == expected


# Weights -----------------------------------------------------------------------------------------


def test_blocks_of_an_untrained_network_do_nothing(runtime):
    model = GPT(tiny_config(), runtime)
    batch = random_batch(7, [40, 24])
    with torch.no_grad():
        expected = F.rms_norm(model.embed[batch.tokens.long()], (32,))
        assert torch.equal(model.hidden(batch, 8, 24), expected)
    # ... only because the projections back are zero
    assert (model.attention_bank[:3, : 3 * 32].flatten(1).std(dim=1) > 0).all()
    assert (model.mlp_bank[:3].flatten(1).std(dim=1) > 0).all()
    assert torch.count_nonzero(model.attention_bank[:3, 3 * 32 :]) == 0
    assert torch.count_nonzero(model.mlp_bank[3:6]) == 0


def test_sizes_of_the_first_weights(runtime):
    """Uniform with std 0.5/sqrt(dim) into the blocks; the tables as documented."""
    config = tiny_config(model_dim=64, head_dim=8)
    model = GPT(config, runtime)
    std = 0.5 / math.sqrt(64)
    for weights in (*model.attention_bank[:3, : 3 * 64], *model.mlp_bank[:3]):
        assert weights.abs().max() <= std * math.sqrt(3)
    for weights in (model.attention_bank[:3, : 3 * 64], model.mlp_bank[:3]):
        assert weights.std().item() == pytest.approx(std, rel=0.03)
        assert abs(weights.mean().item()) < 0.03 * std
    assert model.embed.std().item() == pytest.approx(0.005, rel=0.01)
    assert model.value_embed.std().item() == pytest.approx(0.01, rel=0.01)
    assert torch.count_nonzero(model.value_gate) == 0


def weights_of(config: Config, world_size: int, rank: int = 0) -> dict[str, Tensor]:
    return dict(GPT(config, cpu_runtime(rank, world_size)).named_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_seed_same_weights_on_any_number_of_ranks(dtype):
    config = tiny_config(dtype=dtype)
    expected = weights_of(config, 1)
    for world_size in (1, 2, 4, 8):
        for rank in {0, world_size - 1}:
            weights = weights_of(config, world_size, rank)
            assert all(torch.equal(weights[name], expected[name]) for name in expected)
    other = weights_of(dataclasses.replace(config, seed=config.seed + 1), 1)
    for name in ("attention_bank", "mlp_bank", "embed", "value_embed"):
        assert not torch.equal(other[name], expected[name])


@pytest.mark.parametrize("num_layers", [1, 3, 5])
def test_banks_divide_by_the_ranks_and_only_grow_by_zeros(num_layers):
    config = tiny_config(layers=(Layer("short", 0),) * num_layers)
    expected = weights_of(config, 1)
    for world_size in (2, 3, 4, 8, 12, 16):
        weights = weights_of(config, world_size)
        for name in ("attention_bank", "mlp_bank"):
            bank, small = weights[name], expected[name]
            used = num_layers * (2 if name == "mlp_bank" else 1)
            assert len(bank) % world_size == 0
            assert used <= len(bank)
            assert torch.equal(bank[:used], small[:used])
            assert torch.count_nonzero(bank[used:]) == 0
        for name in ("embed", "value_embed", "value_gate"):
            assert torch.equal(weights[name], expected[name])


def test_any_number_of_value_tables(runtime):
    """None, and one that two layers share."""
    batch = random_batch(8, [64])
    shared = (Layer("short", 0), Layer("long", 0))
    for layers, tables in ((Layer("short", None),), 0), (shared, 1):
        model = trained_like(tiny_config(layers=layers), runtime)
        assert model.value_gate.shape == (tables, 4, 12)
        assert model.value_embed.shape == (tables * 50_304, 32)
        with torch.no_grad():
            value = model.hidden(batch, 8, 24)
            expected = reference_hidden(model, batch, {"short": 8, "long": 24})
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)
