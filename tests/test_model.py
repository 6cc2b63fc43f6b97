"""Section 5: the model against a float64 transcription, what a position sees, and the first
weights."""

import dataclasses
import itertools
import math

import pytest
import torch
from conftest import cpu_runtime, random_batch, tiny_config, trained_like
from torch import Tensor
from transcription import (
    next_token_probabilities,
    ngram_rows,
    target_losses,
    transcribed_hidden,
)

import train_gpt
from train_gpt import (
    GPT,
    IGNORED_TARGET,
    SPEEDRUN_LAYERS,
    TINY_LAYERS,
    Batch,
    Config,
    Windows,
    combine,
)

WINDOWS = Windows(8, 24)


def changed(model: GPT, batch: Batch, position: int, windows: Windows) -> set[int]:
    """The positions whose hidden state depends on the token at `position`."""
    tokens = batch.tokens.clone()
    tokens[position] = (tokens[position] + 1) % 50_000
    with torch.no_grad():
        before = model.hidden(batch, windows)
        after = model.hidden(batch._replace(tokens=tokens), windows)
    return set((before != after).any(dim=1).nonzero().flatten().tolist())


# Against a transcription -------------------------------------------------------------------------

SHRUNK_SPEEDRUN = {"layers": SPEEDRUN_LAYERS, "model_dim": 48, "num_heads": 4}
SHRUNK_SPEEDRUN |= {"ngram_orders": (2, 3, 4)}
DOCUMENTS = [[64], [1, 20, 2, 41]]


@pytest.mark.parametrize("lengths", DOCUMENTS)
@pytest.mark.parametrize("changes", [{}, SHRUNK_SPEEDRUN], ids=["tiny", "speedrun"])
def test_hidden_is_the_written_down_forward_pass(runtime, changes, lengths):
    """With every parameter random, and scores peaked enough that keys matter."""
    config = tiny_config(attention_scale=0.7, **changes)
    model = trained_like(config, runtime)
    batch = random_batch(1, lengths)
    for windows in (WINDOWS, Windows(12, 64)):  # the first and the last long window
        with torch.no_grad():
            value = model.hidden(batch, windows)
            expected = transcribed_hidden(model, batch, *windows)
        assert value.dtype == torch.float32
        assert 0.9 < expected.std() < 1.1
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=2e-5)


def test_hidden_over_several_blocks_of_queries(runtime):
    """A sequence longer than the blocks of attention (256), not a multiple."""
    config = tiny_config(attention_scale=0.7, val_sequence_tokens=336)
    model = trained_like(config, runtime, seed=1)
    batch = random_batch(2, [150, 1, 185])
    windows = Windows(12, 64)
    with torch.no_grad():
        value = model.hidden(batch, windows)
        expected = transcribed_hidden(model, batch, *windows)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=2e-5)


def test_hidden_in_bfloat16_is_near(runtime):
    """The dtype of the weights goes through, and no step rounds more than bf16 must."""
    config = tiny_config(dtype="bfloat16", attention_scale=0.3)
    model = trained_like(config, runtime)
    batch = random_batch(1, [1, 20, 2, 41])
    with torch.no_grad():
        value = model.hidden(batch, WINDOWS)
        expected = transcribed_hidden(model, batch, *WINDOWS)
    assert value.dtype == torch.bfloat16
    error = (value.double() - expected).norm() / expected.norm()
    assert error < 0.04


def test_validation_loss_is_the_sum_of_cross_entropies(runtime):
    model = trained_like(tiny_config(), runtime)
    batch = random_batch(2, [30, 34], num_ids=20)
    with torch.no_grad():
        loss = model.validation_loss(batch, WINDOWS)
        hidden = transcribed_hidden(model, batch, *WINDOWS)
        expected = target_losses(model, batch, hidden)[:, 0]
        mixture, plain = next_token_probabilities(model, batch, hidden)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert expected.std() > 0.1  # the targets differ, so a wrong one would show
    assert (mixture / plain)[range(64), batch.targets].log().sum() > 1  # so would the pointer
    torch.testing.assert_close(loss.double(), expected.sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("changes", [{}, SHRUNK_SPEEDRUN], ids=["tiny", "speedrun"])
def test_training_loss_and_all_gradients(runtime, changes):
    """Of every parameter, and of every row of n-grams."""
    model = trained_like(tiny_config(attention_scale=0.7, **changes), runtime)
    batch, weights = random_batch(2, [1, 30, 33], num_ids=20), torch.tensor([1, 0.5])
    table = model.ngrams.table
    total, next_token = model.training_loss(batch, WINDOWS, weights)
    total.backward()
    found = {name: param.grad for name, param in model.named_parameters()}
    found["n-grams"] = torch.zeros_like(table)
    for rows in model.ngrams.pending[0].unbind(1):
        found["n-grams"].index_add_(0, rows, model.ngrams.pending[1])

    inputs = [*model.parameters(), table.requires_grad_()]
    losses = target_losses(model, batch, transcribed_hidden(model, batch, *WINDOWS)).sum(0)
    expected = torch.autograd.grad(losses @ weights.double(), inputs)
    assert total.item() == pytest.approx((losses @ weights.double()).item(), rel=1e-5)
    assert next_token.item() == pytest.approx(losses[0].item(), rel=1e-5)
    for (name, value), reference in zip(found.items(), expected, strict=True):
        assert (value - reference).norm() < 1e-3 * reference.norm(), name
    slices = zip(model.small_layout, *map(model.cut_small, (found["small"], expected[-2])))
    for name, value, reference in slices:
        assert (value - reference).norm() < 1e-3 * reference.norm(), name


def test_ignored_targets_count_nothing(runtime):
    model = trained_like(tiny_config(), runtime)
    batch = random_batch(3, [64], num_ids=20)
    targets = torch.where(torch.arange(64) % 3 == 1, IGNORED_TARGET, batch.targets)
    some, no = (
        batch._replace(targets=x) for x in (targets, torch.full_like(targets, IGNORED_TARGET))
    )
    with torch.no_grad():
        expected = target_losses(model, some, model.hidden(batch, WINDOWS))[:, 0].sum()
        loss, none = (model.validation_loss(x, WINDOWS) for x in (some, no))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert none.item() == 0


def test_gradient_reaches_every_weight_in_use(runtime):
    """And none of a bank's padding, nor rows of tokens and n-grams that do not occur."""
    config = tiny_config()
    model = trained_like(config, runtime)
    batch = random_batch(4, [64], num_ids=500)
    model.validation_loss(batch, WINDOWS).backward()
    used_of_bank = (model.attention_bank, 5), (model.mlp_bank, 10)
    for bank, used in used_of_bank:
        norms = bank.grad.flatten(1).norm(dim=1)
        assert (norms[:used] > 0).all()
        assert (norms[used:] == 0).all()
    tokens = set(batch.tokens.tolist())
    for table in model.value_embed.grad.unflatten(0, (2, -1)):
        assert set(table.norm(dim=1).nonzero().flatten().tolist()) == tokens
    assert (model.head.grad[: config.vocab_size + 1].norm(dim=1) > 0).all()  # the copy entry too
    rows, grads = model.ngrams.pending
    assert rows.tolist() == ngram_rows(batch.tokens.tolist(), (2,), config.ngram_rows)
    assert grads.shape == (64, 32) and (grads.norm(dim=1) > 0).all()

    assert (model.small.grad != 0).all()


# What a position sees ----------------------------------------------------------------------------

LENGTHS, STARTS = [10, 24, 1, 29], [0, 10, 34, 35, 64]


def without_key_offset(model: GPT) -> GPT:
    """The unturned halves of the keys of long layers are zero, so that taking them from the
    previous position changes nothing."""
    config = model.config
    with torch.no_grad():
        for row, weights in zip(config.layers, model.attention_bank):
            keys = weights.chunk(4)[1]
            if row.window == "long":
                keys.view(config.num_heads, 2, config.head_dim // 2, -1)[:, 1] = 0
    return model


@pytest.mark.parametrize("changes", [{}, SHRUNK_SPEEDRUN], ids=["tiny", "speedrun"])
def test_hidden_states_do_not_depend_on_later_tokens(runtime, changes):
    """Every technique on: a token changes its own hidden state and none before."""
    model = trained_like(tiny_config(**changes), runtime)
    batch = random_batch(5, LENGTHS)
    for position in range(0, 64, 3):
        assert min(changed(model, batch, position, WINDOWS)) == position


def test_documents_see_the_last_token_before_them_and_nothing_else(runtime):
    """N-grams look one token back, also from a document's first token; attention does not leave the
    document. So a document's last token reaches the next document, from its first
    position on, and no other token reaches any other document."""
    model = without_key_offset(trained_like(tiny_config(), runtime))
    batch = random_batch(5, LENGTHS)
    for document, (begin, end) in enumerate(itertools.pairwise(STARTS)):
        for position in {begin, (begin + end) // 2, end - 2, end - 1} & set(range(begin, end)):
            # five layers reach from one end of a document to the other
            expected = set(range(position, end))
            if position == end - 1 and document < 3:
                expected |= set(range(end, STARTS[document + 2]))
            assert changed(model, batch, position, Windows(8, 24)) == expected, position


def test_key_offset_reads_the_state_before_a_document_after_its_first_position(runtime):
    """A document's first key has the unturned half of the previous position's, which knows all of
    its own document. The first query sees only that key, so its output stays; later ones change.
    A document of one token passes nothing on."""
    model = trained_like(tiny_config(), runtime)
    batch = random_batch(5, LENGTHS)
    assert changed(model, batch, 3, WINDOWS) == set(range(3, 34)) - {10}
    assert changed(model, batch, 9, WINDOWS) == set(range(9, 34))
    assert changed(model, batch, 12, WINDOWS) == set(range(12, 34))
    assert changed(model, batch, 33, WINDOWS) == set(range(33, 64)) - {35}
    assert changed(model, batch, 34, WINDOWS) == set(range(34, 64))


@pytest.mark.parametrize(
    ("layer", "windows", "reach"),
    [
        (0, Windows(8, 270), 8),
        (2, Windows(5, 270), 5),
        (3, Windows(5, 270), 5),
        (1, Windows(5, 270), 271),  # the key offset adds one
        (4, Windows(5, 270), 271),
    ],
)
def test_window_reach(runtime, layer, windows, reach):
    """One layer alone: position t depends on t - reach and not on the token before that; over the
    256 positions that plain attention takes at a time, too."""
    config = tiny_config(final_window_long=windows.long, val_sequence_tokens=320)
    model = trained_like(config, runtime)
    with torch.no_grad():
        own = model.attention_bank[layer].clone()
        model.attention_bank[:, 3 * 16 :] = 0
        model.attention_bank[layer] = own
        model.ngrams.table.zero_()
    batch = random_batch(6, [320])
    for position in (0, 17, 49, 300):
        expected = set(range(position, min(320, position + reach + 1)))
        assert changed(model, batch, position, windows) == expected


# Weights -----------------------------------------------------------------------------------------


def test_untrained_network_follows_its_initial_values(runtime, monkeypatch):
    """Residual factors 1.1 a layer, n-grams and MLPs nothing."""
    config = tiny_config()
    model = GPT(config, runtime)
    batch = random_batch(7, [40, 24])
    with torch.no_grad():
        value = model.hidden(batch, WINDOWS)
        expected = transcribed_hidden(model, batch, *WINDOWS)
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=2e-5)
        # without the attention of the layers
        model.attention_bank[:, 3 * 16 :] = 0
        model.head *= 1000  # the norms' epsilon no longer shows
        x0 = model.head[batch.tokens.long()]
        x0 = x0 / x0.square().mean(dim=1, keepdim=True).sqrt()
        behind_3 = 1.1**4
        end = 1.1 * behind_3 - 0.5 * behind_3
        streams = []
        monkeypatch.setattr(
            train_gpt, "combine", lambda *args: streams.append(combine(*args)) or streams[-1]
        )
        torch.testing.assert_close(model.hidden(batch, WINDOWS), x0, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(streams[-1][0], end * x0, rtol=1e-5, atol=1e-5)


def test_sizes_of_the_first_weights(runtime):
    """Uniform with std 0.5/sqrt(dim) into and out of attention, into the MLPs, gates and pointer;
    the tables as documented; zero for W_2 and n-grams."""
    config = tiny_config(model_dim=64, gate_dim=128)
    model = GPT(config, runtime)
    std = 0.5 / math.sqrt(64)
    small = (model.unpack_small()[name] for name in ("gate_w_1", "pointer"))
    for weights in (*model.attention_bank.chunk(4, dim=1), model.mlp_bank[:5], *small):
        assert weights.abs().max() <= std * math.sqrt(3)
        assert weights.std().item() == pytest.approx(std, rel=0.03)
        assert abs(weights.mean().item()) < 0.03 * std
    assert torch.count_nonzero(model.mlp_bank[5:10]) == 0
    assert torch.count_nonzero(model.ngrams.table) == 0
    assert model.ngrams.table.shape == (512, 64)
    assert model.head.shape == (50_304, 64)
    assert model.head.std().item() == pytest.approx(0.005, rel=0.01)
    assert model.value_embed.shape == (2 * 50_304, 16)
    assert model.value_embed.std().item() == pytest.approx(0.01, rel=0.01)


def weights_of(config: Config, world_size: int, rank: int = 0) -> dict[str, Tensor]:
    return GPT(config, cpu_runtime(rank, world_size)).state_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_seed_same_weights_on_any_number_of_ranks(dtype):
    config = tiny_config(dtype=dtype)
    expected = weights_of(config, 1)
    for world_size in (1, 2, 4, 8):
        for rank in {0, world_size - 1}:
            weights = weights_of(config, world_size, rank)
            table = weights.pop("ngrams.table")  # a share of it, of zeros
            assert table.shape == (512 // world_size, 32) and not table.any()
            for name, value in weights.items():  # banks are padded to the number of ranks
                assert torch.equal(value[: len(expected[name])], expected[name])
    other = weights_of(dataclasses.replace(config, seed=config.seed + 1), 1)
    for name in ("attention_bank", "mlp_bank", "head", "value_embed", "small"):
        assert not torch.equal(other[name], expected[name])


@pytest.mark.parametrize("changes", [{}, SHRUNK_SPEEDRUN], ids=["tiny", "speedrun"])
def test_banks_divide_by_the_ranks_and_only_grow_by_zeros(changes):
    config = tiny_config(**changes)
    expected = weights_of(config, 1)
    num_layers = len(config.layers)
    for world_size in (2, 3, 12, 16):
        weights = weights_of(config, world_size)
        for name, used in ("attention_bank", num_layers), ("mlp_bank", 2 * num_layers):
            bank, alone = weights[name], expected[name]
            assert len(bank) % world_size == 0
            assert len(alone) == used <= len(bank)
            assert torch.equal(bank[:used], alone)
            assert torch.count_nonzero(bank[:used]) > 0
            assert torch.count_nonzero(bank[used:]) == 0
        for name in ("head", "value_embed", "small"):
            assert torch.equal(weights[name], expected[name])
        rows = len(config.ngram_orders) * config.ngram_rows
        assert rows <= world_size * len(weights["ngrams.table"]) < rows + world_size


def test_value_table_that_two_layers_share(runtime):
    rows = list(TINY_LAYERS)
    rows[0] = dataclasses.replace(rows[0], value_table=0)
    rows[3] = dataclasses.replace(rows[3], value_table=0)
    model = trained_like(tiny_config(layers=tuple(rows)), runtime)
    assert model.value_embed.shape == (2 * 50_304, 16)
    batch = random_batch(8, [64])
    with torch.no_grad():
        value = model.hidden(batch, WINDOWS)
        expected = transcribed_hidden(model, batch, *WINDOWS)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=2e-5)
