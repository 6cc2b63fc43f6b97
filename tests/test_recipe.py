"""Every named technique of the recipe alone, against straightforward reference code."""

import importlib.util
import math
import os
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT, random_batch, tiny_config, trained_like
from torch import Tensor
from transcription import (
    EPS,
    bigram_rows,
    gate_outputs,
    rms,
    rotary_and_scale,
    small_slices,
    target_losses,
    transcribed_hidden,
)

import train_gpt
from train_gpt import (
    GPT,
    IGNORED_TARGET,
    PRESETS,
    SPEEDRUN_LAYERS,
    START_TOKEN,
    Config,
    Optimizer,
    UserError,
    Windows,
    apply_rotary,
    bigram_hash,
    enter_last_layer,
    gate_layouts,
    gate_mlp,
    head_loss,
    leave_layers,
    mix_heads,
    pair_heads,
    plain_attention,
    read_prefixes,
    remove_own_value,
    rotary_frequencies,
    rotary_tables,
    shift,
    small_params,
    start_stream,
    target_logits,
    unpair_heads,
    yarn,
)

CPU = torch.device("cpu")
WINDOWS = Windows(8, 24)
SHRUNK_SPEEDRUN = {"layers": SPEEDRUN_LAYERS, "model_dim": 48}  # six heads


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(value: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=atol)


# Embedding, smear, bigram ------------------------------------------------------------------------


def test_smear_takes_a_gated_share_of_the_previous_embedding():
    """The previous embedding as it was, not as it has been smeared; the first one stays."""
    embedded, smear, gate = gaussian(9, 16), torch.tensor([0.7]), gaussian(1, 12, seed=1)
    expected = embedded.clone()
    for t in range(1, 9):
        share = 0.7 / (1 + math.exp(-(embedded[t, :12] * gate[0]).sum().item()))
        expected[t] += share * embedded[t - 1]
    signs, sign = torch.ones(8192, 16), torch.zeros(9, dtype=torch.int32)
    bigram = gaussian(9, 16, seed=2).float()
    x0, e = start_stream(embedded.float(), smear, gate.float(), bigram, signs, sign)
    close(x0, expected / expected.square().mean(dim=1, keepdim=True).sqrt())
    assert torch.equal(e, bigram)


@pytest.mark.parametrize("num_rows", [512, 4096, 377_280])
def test_bigram_hash_of_every_size_of_token(num_rows):
    """In int32 as in exact integers, for the largest ids too; the row's first token has the last
    row, which no pair gets."""
    random = np.random.default_rng(num_rows)
    tokens = [50_256, 50_256, 50_255, 0, 0, 1, 50_256, 1, 50_303, 50_303]
    tokens += random.integers(0, 50_257, 3000).tolist()
    rows, sign = bigram_hash(torch.tensor(tokens, dtype=torch.int32), num_rows)
    expected_rows, expected_signs = bigram_rows(tokens, num_rows)
    assert rows.tolist() == expected_rows
    assert sign.tolist() == expected_signs
    assert rows.tolist().count(num_rows - 1) == 1
    # what Python computes is what 32 bits hold
    previous, token = np.int32(tokens[:-1]), np.int32(tokens[1:])
    hashed = (np.int32(36_313) * token) ^ (np.int32(27_191) * previous)
    assert hashed.min() >= 0
    assert (hashed % (num_rows - 1)).tolist() == expected_rows[1:]


def test_bigram_hash_spreads_pairs_over_the_rows():
    """Which it would not if one of the two tokens were left out."""
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 300, 4000)).int()
    rows, sign = bigram_hash(tokens, 377_280)
    pairs = len(set(zip(tokens.tolist()[1:], tokens.tolist()[:-1])))
    assert len(rows.unique()) > 0.95 * pairs
    assert len(sign.unique()) > 300


def test_bigram_embedding_has_the_signs_of_its_pair(runtime):
    """Two pairs that share a row of the table get unlike vectors from it."""
    config = tiny_config()
    model = trained_like(config, runtime)
    batch = random_batch(1, [64])
    lookups = model.look_up(batch.tokens)
    small = model.unpack_small()
    x0, e = model.start_stream(
        lookups.embedded,
        small["smear"],
        small["smear_gate"],
        lookups.bigram,
        model.bigram_signs,
        lookups.sign,
    )
    rows, signs = bigram_rows(batch.tokens.tolist(), config.bigram_rows)
    for t in range(64):
        assert torch.equal(e[t], model.bigram[rows[t]] * model.bigram_signs[signs[t]])
    assert x0.square().mean(dim=1).sqrt().sub(1).abs().max() < 1e-3
    assert not torch.equal(model.bigram_signs[signs[1]], model.bigram_signs[signs[2]])


# Rotary, YaRN, key offset ------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(384, 896), (896, 1408), (1664, 2560), (64, 64)])
def test_yarn_is_its_formula(old, new):
    frequencies = torch.tensor([1 / 1024 ** (i / 31) for i in range(32)], dtype=torch.float64)
    stretched, scale = yarn(frequencies, 0.1, old, new)
    for before, after in zip(frequencies.tolist(), stretched.tolist()):
        turns = old * before / (2 * math.pi)
        ramp = 0.0 if turns < 1 else 1.0 if turns > 32 else (turns - 1) / 31
        assert after == pytest.approx(before * (old / new + ramp * (1 - old / new)), rel=1e-12)
    assert scale == pytest.approx(0.1 + 0.1 * 0.2 * (math.log(new) - math.log(old)))
    if new > old:  # the slowest stretches whole, the fastest not at all
        assert stretched[-1] == pytest.approx(frequencies[-1].item() * old / new)
        assert stretched[0] == pytest.approx(1) or old < 64 * math.pi


def test_rotary_of_every_stage_chains_the_window_changes(runtime):
    """Tables and scale for each long window, as long as paired heads need them."""
    shrunk = {"model_dim": 48, "head_dim": 8, "mlp_dim": 16, "gate_dim": 8, "bigram_rows": 512}
    stages = PRESETS["speedrun"].stages
    config = tiny_config(**shrunk, stages=stages, final_window_long=2560, rows_per_step=512)
    config = Config(**{**vars(config), "extension": PRESETS["speedrun"].extension})
    model = GPT(config, runtime)
    assert list(model.rotary) == [384, 896, 1408, 1664, 2560]
    scales = []
    for long, (cos, sin, scale) in model.rotary.items():
        frequencies, expected_scale = rotary_and_scale(model, long)
        angles = torch.arange(len(cos))[:, None] * frequencies
        assert len(cos) == 2 * 393_216 // 512
        close(cos[:, 0], angles.cos(), atol=1e-6)
        close(sin[:, 0], angles.sin(), atol=1e-6)
        assert scale == pytest.approx(expected_scale)
        scales.append(scale)
    assert scales[0] == 0.1
    product = math.prod(
        1 + 0.2 * math.log(ratio) for ratio in (7 / 3, 11 / 7, 13 / 11, 20 / 13)
    )  # of the windows in blocks of 128
    assert scales[-1] == pytest.approx(0.1 * product)


def before_attention_of(
    model: GPT, x: Tensor, layer: int, **changes: object
) -> tuple[Tensor, Tensor, Tensor]:
    """model.before_attention for a layer of the tiny plan, without embeddings unless given."""
    bank_row = model.attention_layers.index(layer)
    row = model.config.layers[layer]
    positions = len(x) * (2 if row.paired else 1)
    cos, sin, _ = model.rotary[24]
    arguments = {
        "x": x,
        "weights": model.attention_bank[bank_row],
        "scale": model.unpack_small()["attention_in"][layer],
        "cos": cos[:positions],
        "sin": sin[:positions],
        "value": None,
        "value_gate": None,
        "value_share": None,
        "extra_value": None,
        "paired": row.paired,
        "key_offset": row.window == "long",
        "head_dim": model.config.head_dim,
    }
    return model.before_attention(**{**arguments, **changes})


def test_key_offset_moves_the_unturned_half_of_keys_only(runtime):
    """One position back, the first key keeps its own; queries, values, turned halves stay."""
    model, x = trained_like(tiny_config(), runtime), gaussian(20, 32).float()
    q, k, v = before_attention_of(model, x, 1, key_offset=False)
    offset_q, offset_k, offset_v = before_attention_of(model, x, 1, key_offset=True)
    assert torch.equal(offset_q, q)
    assert torch.equal(offset_v, v)
    assert torch.equal(offset_k[..., :4], k[..., :4])
    assert torch.equal(offset_k[0, :, 4:], k[0, :, 4:])
    for t in range(1, 20):
        assert torch.equal(offset_k[t, :, 4:], k[t - 1, :, 4:])
    assert not torch.equal(k[1, :, 4:], k[0, :, 4:])
    close(shift(x)[1:], x[:-1])


def test_queries_keys_values_head_by_head(runtime):
    """Scale, norm a head, rotary on the first half with its own position."""
    model, x = trained_like(tiny_config(), runtime), gaussian(20, 32).float()
    q, k, v = before_attention_of(model, x, 3)
    scale = model.unpack_small()["attention_in"][3].item()
    n, weights = rms(x.double()), model.attention_bank[2].double()
    for h in range(4):
        rows = slice(8 * h, 8 * h + 8)
        for z, part in (q, 0), (k, 32):
            expected = rms(n @ weights[part : part + 32][rows].T)
            for t in range(20):
                for i, frequency in enumerate((1.0, 1 / 1024)):
                    c, s = math.cos(t * frequency), math.sin(t * frequency)
                    a, b = expected[t, 2 * i : 2 * i + 2].tolist()
                    expected[t, 2 * i], expected[t, 2 * i + 1] = a * c - b * s, a * s + b * c
            close(z[:, h], expected)
        close(v[:, h], scale * n @ weights[64:96][rows].T)


# Paired heads ------------------------------------------------------------------------------------


def test_pairing_takes_turns_and_is_undone():
    x = gaussian(10, 6, 8)
    paired = pair_heads(x)
    assert paired.shape == (20, 3, 8)
    for t in range(10):
        for h in range(6):
            assert torch.equal(paired[2 * t + h % 2, h // 2], x[t, h])
    assert torch.equal(unpair_heads(paired), x)


@pytest.mark.parametrize("window", [0, 1, 2, 7, 8, 100])
def test_paired_heads_are_attention_over_an_interleaved_stream(window):
    """Query by query: head h at token t is position 2t + h mod 2; it sees `window` positions back
    of both heads, in its own document, and turns by its own position."""
    lengths, heads, head_dim = [1, 13, 2, 14], 4, 8
    num_tokens, starts = sum(lengths), np.cumsum([0, *lengths])
    q, k, v = (gaussian(num_tokens, heads, head_dim, seed=seed) for seed in range(3))
    cos, sin = rotary_tables(rotary_frequencies(head_dim), 2 * num_tokens, CPU)
    turned = [apply_rotary(pair_heads(z.float()), cos, sin) for z in (q, k)]
    cu_seqlens = torch.tensor([*starts, num_tokens], dtype=torch.int32) * 2
    value = plain_attention(*turned, pair_heads(v.float()), cu_seqlens, window, 0.5)
    value = unpair_heads(value)

    def turn(x: Tensor, position: int) -> Tensor:
        x = x.clone()
        for i, frequency in enumerate((1.0, 1 / 1024)):
            c, s = math.cos(position * frequency), math.sin(position * frequency)
            a, b = x[2 * i].item(), x[2 * i + 1].item()
            x[2 * i], x[2 * i + 1] = a * c - b * s, a * s + b * c
        return x

    for t in range(num_tokens):
        first = max(start for start in starts if start <= t)
        for h in range(heads):
            own = 2 * t + h % 2
            scores, seen = [], []
            for s in range(first, t + 1):
                for g in (h - h % 2, h - h % 2 + 1):
                    position = 2 * s + g % 2
                    if own - window <= position <= own:
                        scores.append(0.5 * (turn(q[t, h], own) @ turn(k[s, g], position)))
                        seen.append(v[s, g])
            weights = torch.stack(scores).softmax(dim=0)
            close(value[t, h], weights @ torch.stack(seen))


def test_paired_layer_turns_by_twice_the_position(runtime):
    model, x = trained_like(tiny_config(), runtime), gaussian(12, 32).float()
    q, k, v = before_attention_of(model, x, 0)
    cos, sin, _ = model.rotary[24]
    plain = before_attention_of(
        model, x, 0, paired=False, cos=torch.ones(12, 1, 2), sin=torch.zeros(12, 1, 2)
    )
    for z, unturned in (q, plain[0]), (k, plain[1]):
        assert torch.equal(z, apply_rotary(pair_heads(unturned), cos[:24], sin[:24]))
    assert torch.equal(v, pair_heads(plain[2]))


# Value embeddings --------------------------------------------------------------------------------


def test_value_embedding_with_a_gate_from_twelve_features(runtime):
    """Twice the sigmoid of six features of the normed stream and six of the embedding, a head."""
    model, x = trained_like(tiny_config(), runtime), gaussian(20, 32).float()
    value, weights = gaussian(20, 32, seed=1).float(), gaussian(4, 12, seed=2).float()
    *_, without = before_attention_of(model, x, 3)
    *_, v = before_attention_of(model, x, 3, value=value, value_gate=weights)
    n = rms(x.double())
    for t in range(20):
        for h in range(4):
            dot = (n[t, :6] * weights[h, :6]).sum() + (value[t, :6] * weights[h, 6:]).sum()
            gate = 2 / (1 + math.exp(-dot.item()))
            close(v[t, h] - without[t, h], gate * value[t, 8 * h : 8 * h + 8].double())


def test_value_embedding_of_the_last_layer_has_a_gate_for_each_half_of_the_heads(runtime):
    """Read from the model: only the first half of the heads changes with the first gate."""
    config = tiny_config()
    model = trained_like(config, runtime)
    batch = random_batch(1, [64])
    calls = []
    record = model.before_attention
    model.before_attention = lambda *args: calls.append(args) or record(*args)
    with torch.no_grad():
        model.hidden(batch, WINDOWS)
    *_, (x, weights, scale, cos, sin, value, _, share, extra, *flags) = calls
    assert len(calls) == 4
    vocab = config.padded_vocab_size
    assert torch.equal(value, model.value_embed[vocab + batch.tokens.long()])
    assert share.shape == (64, 4)
    assert torch.equal(share[:, 0], share[:, 1])
    assert torch.equal(share[:, 2], share[:, 3])
    assert not torch.equal(share[:, 0], share[:, 2])
    v = record(x, weights, scale, cos, sin, value, None, share, extra, *flags)[2]
    plain = record(x, weights, scale, cos, sin, None, None, None, None, *flags)[2]
    added = share[:, :, None] * value.view(64, 4, 8) + extra.view(64, 4, 8)
    close(v - plain, added)
    assert calls[0][7] is None  # the others make their gate of twelve features
    assert calls[0][6].shape == (4, 12)


def test_extra_value_is_added_as_it_is(runtime):
    model, x = trained_like(tiny_config(), runtime), gaussian(20, 32).float()
    extra = gaussian(20, 32, seed=1).float()
    q, k, v = before_attention_of(model, x, 3, extra_value=extra)
    plain_q, plain_k, plain_v = before_attention_of(model, x, 3)
    assert torch.equal(q, plain_q)
    assert torch.equal(k, plain_k)
    close(v - plain_v, extra.view(20, 4, 8))


# XSA, head gates, head mixing --------------------------------------------------------------------


def test_xsa_takes_out_what_lies_along_the_own_value():
    y, v, alpha = gaussian(7, 3, 8), gaussian(7, 3, 8, seed=1), gaussian(7, 3, seed=2)
    value = remove_own_value(y.float(), v.float(), alpha.float())
    for t in range(7):
        for h in range(3):
            along = (y[t, h] @ v[t, h]) / (v[t, h] @ v[t, h])
            close(value[t, h], y[t, h] - math.tanh(alpha[t, h]) * along * v[t, h])
    large = remove_own_value(y.float(), v.float(), torch.full((7, 3), 20.0))
    assert (large.double() * v).sum(-1).abs().max() < 1e-4  # orthogonal
    assert torch.equal(remove_own_value(y.float(), v.float(), torch.zeros(7, 3)), y.float())
    assert (remove_own_value(y.float(), v.float(), -alpha.float()) - value).abs().max() > 0.1
    zero = remove_own_value(y.float(), torch.zeros(7, 3, 8), alpha.float())
    assert torch.equal(zero, y.float())  # and no division by zero


def after_attention_of(model: GPT, x: Tensor, y: Tensor, **changes: object) -> Tensor:
    """model.after_attention of layer 1, without its MLP and without any extra unless given."""
    arguments = {
        "x": x,
        "y": y,
        "weights": model.attention_bank[1],
        "scale": torch.tensor(1.0),
        "mixed": None,
        "own_value": None,
        "head_gate": None,
        "paired": False,
        "injections": [],
        "scales": (torch.tensor(0.0), torch.tensor(1.0)),
        "w_1": model.mlp_bank[1],
        "w_2": model.mlp_bank[6],
        "mlp_scales": (torch.tensor(1.0), torch.tensor(0.0)),
    }
    return model.after_attention(**{**arguments, **changes})


def test_behind_attention_step_by_step(runtime):
    """Mixing, XSA, head gate, projection, residual scalings, injections, in this order."""
    model = trained_like(tiny_config(), runtime)
    x, y, v, mixed = (gaussian(10, 32, seed=seed).float() for seed in range(4))
    y, v, mixed = (z.view(10, 4, 8) for z in (y, v, mixed))
    w_o = model.attention_bank[1, 96:].double()
    close(after_attention_of(model, x, y), y.double().flatten(1) @ w_o.T)

    gate, alpha, write = (gaussian(10, 4, seed=seed).float() for seed in (5, 6, 7))
    expected = y.double().clone()
    for t in range(10):
        for h in range(4):
            expected[t, h] += write[t, h] * mixed[t, h].double()
            along = (expected[t, h] @ v[t, h].double()) / v[t, h].double().square().sum()
            expected[t, h] -= math.tanh(alpha[t, h]) * along * v[t, h].double()
            expected[t, h] *= gate[t, h].double()
    projected = 0.3 * expected.flatten(1) @ w_o.T
    extras = {"mixed": (mixed, write), "own_value": (v, alpha), "head_gate": gate}
    value = after_attention_of(model, x, y, scale=torch.tensor(0.3), **extras)
    close(value, projected)

    coefficients = gaussian(10, 2, seed=8).float()
    sources = gaussian(10, 32, seed=9).float(), gaussian(10, 32, seed=10).float()
    injections = [(coefficients[:, [i]], sources[i]) for i in range(2)]
    scalings = {"scales": (torch.tensor(0.9), torch.tensor(0.6))}
    value = after_attention_of(
        model, x, y, scale=torch.tensor(0.3), injections=injections, **scalings, **extras
    )
    expected = 0.9 * x.double() + 0.6 * projected
    for t in range(10):
        for i in range(2):
            expected[t] += coefficients[t, i].double() * sources[i][t].double()
    close(value, expected)

    # the MLP behind it reads the new stream
    mlp_scales = torch.tensor(1.2), torch.tensor(0.7)
    value = after_attention_of(
        model,
        x,
        y,
        scale=torch.tensor(0.3),
        injections=injections,
        mlp_scales=mlp_scales,
        **scalings,
        **extras,
    )
    w_1, w_2 = model.mlp_bank[1].double(), model.mlp_bank[6].double()
    hidden = torch.relu(rms(expected) @ w_1.T) ** 2
    close(value, 1.2 * expected + 0.7 * hidden @ w_2, atol=1e-4)


def test_residual_factors_that_are_one_a_token(runtime):
    """Those of the last layer: four columns of coefficients in place of four scalars."""
    model = trained_like(tiny_config(), runtime)
    x, y = gaussian(10, 32).float(), gaussian(10, 4, 8, seed=1).float()
    r, p, r_mlp, p_mlp = (gaussian(10, 1, seed=seed).float() for seed in range(2, 6))
    value = after_attention_of(model, x, y, scales=(r, p), mlp_scales=(r_mlp, p_mlp))
    for t in range(10):
        a = y[t].double().flatten() @ model.attention_bank[1, 96:].double().T
        row = r[t].double() * x[t].double() + p[t].double() * a
        hidden = torch.relu(rms(row) @ model.mlp_bank[1].double().T) ** 2
        row = r_mlp[t].double() * row + p_mlp[t].double() * (hidden @ model.mlp_bank[6].double())
        close(value[t], row, atol=1e-4)


MIXING = [
    # lengths, window, heads: T = 64 is half a block, 300 is ragged, 256 whole blocks
    ([1, 20, 2, 41], 12, 4),
    ([300], 112, 2),
    ([130, 126], 128, 2),
    ([100, 1, 99, 100], 16, 6),
    ([200], 1, 2),
    ([310, 30], 150, 1),  # a window that makes blocks of 160
]


@pytest.mark.parametrize(("lengths", "window", "heads"), MIXING)
def test_head_mixing_query_by_query_and_its_gradients(lengths, window, heads):
    """sum_s (sum_j w_j p_j[t, s]) v_h[s] with weights of root mean square 1 over the heads."""
    num_tokens, starts = sum(lengths), np.cumsum([0, *lengths]).tolist()
    inputs = [gaussian(num_tokens, heads, 8, seed=seed) for seed in range(3)]
    inputs.append(gaussian(num_tokens, heads, seed=3))
    for tensor in inputs:
        tensor.requires_grad_()
    q, k, v, weights = inputs
    rows = []
    for t in range(num_tokens):
        first = max([start for start in starts if start <= t] + [t - window])
        read = weights[t] / (weights[t].square().mean() + EPS).sqrt()
        scores = 0.7 * torch.einsum("hd,shd->hs", q[t], k[first : t + 1])
        mixed = read @ scores.softmax(dim=1)
        rows.append(torch.einsum("s,shd->hd", mixed, v[first : t + 1]))
    expected = torch.stack(rows)
    grad = gaussian(num_tokens, heads, 8, seed=4)
    expected_grads = torch.autograd.grad(expected, inputs, grad)

    singles = [tensor.detach().float().requires_grad_() for tensor in inputs]
    cu_seqlens = torch.tensor([*starts, num_tokens, num_tokens], dtype=torch.int32)
    value = mix_heads(*singles[:3], cu_seqlens, window, 0.7, singles[3])
    close(value, expected, atol=1e-4)
    grads = torch.autograd.grad(value, singles, grad.float())
    for single, double in zip(grads, expected_grads):
        assert (single.double() - double).norm() < 1e-4 * double.norm() + 1e-6
        assert double.norm() > 0.1 or heads == 1


# Gates and their starts --------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [True, False])
def test_gate_mlp(learned):
    """GELU MLP times a scale, which is learned or 0.1."""
    x, w_1, b_1 = gaussian(9, 16), gaussian(8, 16, seed=1), gaussian(8, seed=2)
    w_2, b_2 = gaussian(5, 8, seed=3), gaussian(5, seed=4)
    scale = torch.tensor([0.37]) if learned else None
    value = gate_mlp(*(z.float() for z in (x, w_1, b_1, w_2, b_2)), scale)
    for t in range(9):
        hidden = w_1 @ x[t] + b_1
        hidden = torch.tensor([h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden.tolist()])
        close(value[t], (0.37 if learned else 0.1) * (w_2 @ hidden.double() + b_2), atol=1e-4)


def test_gate_layouts_of_the_speedrun():
    """Names, widths, starts: 26 and 41 outputs for the layers, 14 and 5 for the dynamic skips."""
    layouts = gate_layouts(PRESETS["speedrun"])
    assert list(layouts) == ["early", "late", "last", "output"]
    expected = {"early": {}, "late": {}}
    for i in range(4):
        expected["early"] |= {f"first {i}": (1, 0.0), f"bigram {i}": (1, 0.05)}
    for i in (1, 3):
        expected["early"][f"xsa {i}"] = (6, 0.0)
    expected["early"]["head 3"] = (6, 0.25)
    for i in (4, 5, 7, 8, 9):
        expected["late"] |= {f"first {i}": (1, 0.0), f"bigram {i}": (1, 0.05)}
    for i in (4, 7):
        expected["late"][f"xsa {i}"] = (6, 0.0)
    expected["late"] |= {"skip 6": (1, 0.5), "head 10": (6, 0.25)}
    expected["late"] |= {"mix_in 10": (6, 1.0), "mix_out 10": (6, 0.0)}
    root = math.sqrt(1.1)
    zeros = ("value_first", "value_attend", "value_last", "x_first", "x_attend", "x_last", "first")
    expected["last"] = dict.fromkeys(zeros, (1, 0.0))
    expected["last"] |= {"value_gate": (2, 2.0), "residual": (1, root), "mlp_residual": (1, root)}
    expected["last"] |= {"project": (1, 1.0), "mlp_project": (1, 1.0), "bigram": (1, 0.05)}
    expected["output"] = dict.fromkeys(("first", "last", "value", "skip"), (1, 0.0))
    expected["output"]["attend"] = (1, -0.5)
    assert layouts == expected
    widths = {name: sum(width for width, _ in layout.values()) for name, layout in layouts.items()}
    assert widths == {"early": 26, "late": 41, "last": 14, "output": 5}


@pytest.mark.parametrize("changes", [{}, SHRUNK_SPEEDRUN], ids=["tiny", "speedrun"])
def test_gates_of_an_untrained_model_are_their_starts_whatever_the_stream(runtime, changes):
    model = GPT(tiny_config(**changes), runtime)
    x = gaussian(7, model.config.model_dim).float()
    small = model.unpack_small()
    for name, layout in model.gate_layouts.items():
        weights = [small[f"{name} {part}"] for part in ("w_1", "b_1", "w_2", "b_2")]
        scale = small.get(f"{name} scale")
        assert (scale is None) == (name in ("last", "output"))
        value = model.gate_mlp(x, *weights, scale)
        starts = [start for width, start in layout.values() for _ in range(width)]
        torch.testing.assert_close(value, torch.tensor(starts).expand(7, -1), rtol=1e-6, atol=0)
        close(torch.cat([*gate_outputs(model, name, x.double()).values()], dim=1), value)


def test_small_parameters_start_as_written(runtime):
    """Every slice of the one vector, in its shape; the biases are the gates' starts over 0.1."""
    config = tiny_config(**SHRUNK_SPEEDRUN)
    small = small_slices(GPT(config, runtime))
    root = math.sqrt(1.1)
    shapes = {"smear": (1,), "smear_gate": (1, 12), "skip": (1,), "value_gate": (5, 6, 12)}
    names = "attention_in attention_out residual mlp_residual project mlp_project"
    shapes |= dict.fromkeys(names.split(), (11,))
    starts = {"attention_in": 0.5, "attention_out": 1.0, "residual": root, "mlp_residual": root}
    starts |= {"project": 1.0, "mlp_project": 1.0, "skip": -1.5}
    for name, outputs in ("early", 26), ("late", 41), ("last", 14), ("output", 5):
        shapes |= {f"{name} w_1": (8, 48), f"{name} b_1": (8,)}
        shapes |= {f"{name} w_2": (outputs, 8), f"{name} b_2": (outputs,)}
    shapes |= {"early scale": (1,), "late scale": (1,)}
    starts |= {"early scale": 0.1, "late scale": 0.1}
    assert {name: tuple(weights.shape) for name, weights in small.items()} == shapes
    for name, weights in small.items():
        if name.endswith("w_1"):
            assert weights.std() > 0.05  # checked with the other uniform ones
        elif not name.endswith("b_2"):
            assert torch.equal(weights, torch.full_like(weights, starts.get(name, 0.0)).float()), (
                name
            )
    assert small["output b_2"].tolist() == pytest.approx([0, -5, 0, 0, 0])
    decayed = {name for name, row in small_params(config).items() if row.weight_decay != 0}
    assert decayed == {name for name in small if name[-3:] in ("w_1", "w_2")} | {"value_gate"}


# The way through the layers ----------------------------------------------------------------------


def test_skips_into_the_last_layer():
    x, first, attend = (gaussian(8, 16, seed=seed).float() for seed in range(3))
    names = ("value_first", "value_attend", "value_last", "x_first", "x_attend", "x_last")
    gates = {name: gaussian(8, 1, seed=10 + i).float() for i, name in enumerate(names)}
    stream, value = enter_last_layer(x, first, attend, gates)
    m = {name: gate[:, 0].tolist() for name, gate in gates.items()}
    for t in range(8):
        c0, c7, row = first[t].double(), attend[t].double(), x[t].double()
        extra = m["value_first"][t] * c0 + m["value_attend"][t] * c7 + m["value_last"][t] * row
        close(value[t], extra)
        row = (1 + m["x_last"][t]) * row + m["x_first"][t] * c0 + m["x_attend"][t] * c7
        close(stream[t], row)


def test_skips_to_the_end():
    x = gaussian(8, 16).float()
    pairs = [(gaussian(8, 1, seed=i).float(), gaussian(8, 16, seed=9 + i).float()) for i in (1, 2)]
    value = leave_layers(x, pairs)
    for t in range(8):
        close(value[t], x[t] + sum(gate[t] * tensor[t] for gate, tensor in pairs))


def test_layer_without_attention_takes_in_the_skip(runtime):
    model = trained_like(tiny_config(), runtime)
    x, skipped = gaussian(8, 32).float(), gaussian(8, 32, seed=1).float()
    gate, scale = gaussian(8, 1, seed=2).float(), torch.tensor([-1.5])
    w_1, w_2, scales = model.mlp_bank[2], model.mlp_bank[7], (torch.tensor(0.9), torch.tensor(0.4))
    value = model.skip_mlp(x, skipped, scale, gate, w_1, w_2, *scales)
    expected = x.double() + gate.double() / (1 + math.exp(1.5)) * skipped.double()
    hidden = torch.relu(rms(expected) @ w_1.double().T) ** 2
    close(value, 0.9 * expected + 0.4 * hidden @ w_2.double(), atol=1e-4)


@pytest.mark.parametrize("changes", [{}, SHRUNK_SPEEDRUN], ids=["tiny", "speedrun"])
def test_every_gate_changes_the_output(runtime, changes):
    """One bias after the other: no output of the gate MLPs goes nowhere."""
    model = trained_like(tiny_config(attention_scale=0.7, **changes), runtime)
    batch = random_batch(3, [10, 22])
    with torch.no_grad():
        before = model.hidden(batch, WINDOWS)
        small = model.unpack_small()
        for name, layout in model.gate_layouts.items():
            outputs = [f"{gate}, {i}" for gate, (width, _) in layout.items() for i in range(width)]
            for index, output in enumerate(outputs):
                small[f"{name} b_2"][index] += 3
                difference = model.hidden(batch, WINDOWS) - before
                assert difference.abs().max() > 1e-3, f"{name}: {output}"
                small[f"{name} b_2"][index] -= 3


# Losses ------------------------------------------------------------------------------------------


def reference_loss(
    model: GPT, hidden: Tensor, targets: list[int], weights: list[float], prefixes: list[int]
) -> tuple[float, float]:
    """Weighted sum of the terms, and the next-token term, from a loop over the targets."""
    num_tokens, total = len(targets), 0.0
    terms = [targets, [], [], []]
    for t, target in enumerate(targets):
        terms[1].append(targets[t + 1] if t + 1 < num_tokens else -1)
        terms[2].append(targets[t + 2] if t + 2 < num_tokens else -1)
        terms[3].append(-1 if target < 0 else prefixes[target])
    losses = [sum(target_losses(model, hidden, term)) for term in terms]
    total = sum(weight * loss for weight, loss in zip(weights, losses))
    assert all(loss > 0 for loss in losses)
    return total, losses[0]


@pytest.mark.parametrize(
    "weights", [[1, 0.5, 0.25, 0.25], [1, 0, 0, 0], [0.3, 0, 2, 0], [0, 0, 0, 1]]
)
def test_training_loss_term_by_term(runtime, weights):
    """The row's last targets have no second or third next token, many have no prefix."""
    config = tiny_config()
    model = trained_like(config, runtime)
    prefixes = read_prefixes(config, CPU)
    batch = random_batch(2, [20, 12])
    targets = batch.targets.clone()
    targets[[5, 31]] = IGNORED_TARGET
    hidden = gaussian(32, 32).float()
    loss, next_token = head_loss(
        hidden, model.head, targets, torch.tensor(weights, dtype=torch.float32), prefixes
    )
    expected = reference_loss(model, hidden, targets.tolist(), weights, prefixes.tolist())
    assert (prefixes[batch.targets] == -1).any()
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    assert next_token.item() == pytest.approx(expected[1], rel=1e-5)
    assert not next_token.requires_grad
    plain = head_loss(hidden, model.head, targets)
    assert plain.item() == pytest.approx(expected[1], rel=1e-5)


def test_forward_gives_both_losses(runtime):
    config = tiny_config()
    model, prefixes = trained_like(config, runtime), read_prefixes(config, CPU)
    batch, weights = random_batch(2, [40, 24]), [1.0, 0.5, 0.25, 0.25]
    loss, next_token = model(batch, WINDOWS, torch.tensor(weights), prefixes)
    hidden = transcribed_hidden(model, batch, *WINDOWS)
    expected = reference_loss(model, hidden, batch.targets.tolist(), weights, prefixes.tolist())
    assert loss.item() == pytest.approx(expected[0], rel=1e-4)
    assert next_token.item() == pytest.approx(expected[1], rel=1e-4)


def test_gradient_of_the_loss_is_that_of_its_definition(runtime):
    """By autograd through a softmax in float64."""
    config = tiny_config()
    prefixes = read_prefixes(config, CPU)
    head = gaussian(50_304, 16).float().mul(0.5).requires_grad_()
    x = gaussian(6, 16, seed=1).float().requires_grad_()
    targets, weights = random_batch(1, [6]).targets, torch.tensor([1, 0.5, 0.25, 0.125])
    loss, _ = head_loss(x, head, targets, weights, prefixes)
    value = torch.autograd.grad(loss, (x, head))
    x64, head64 = (z.detach().double().requires_grad_() for z in (x, head))
    logits = 23 * torch.sigmoid((rms(x64) @ head64.T + 5) / 7.5)
    logs = logits.log_softmax(dim=1)
    total = 0
    for t in range(6):
        for weight, later in (1, t), (0.5, t + 1), (0.25, t + 2):
            if later < 6:
                total = total - weight * logs[t, targets[later]]
        if prefixes[targets[t]] >= 0:
            total = total - 0.125 * logs[t, prefixes[targets[t]]]
    for single, double in zip(value, torch.autograd.grad(total, (x64, head64))):
        assert (single - double).norm() < 1e-5 * double.norm()


def test_targets_picked_by_comparison_are_those_gathered():
    """The GPU's way to pick the target's logit, written here, gives the CPU's, with gradients."""
    logits = gaussian(12, 300).float().requires_grad_()
    targets = torch.randint(0, 300, (12, 4), generator=torch.manual_seed(0))
    targets[::3, 1] = targets[5] = IGNORED_TARGET
    value = target_logits(logits, targets)
    compared = torch.stack(
        [
            torch.where(torch.arange(300) == targets[:, n, None], logits, 0.0).sum(1)
            for n in range(4)
        ],
        dim=1,
    )
    assert torch.equal(value, compared)
    assert torch.count_nonzero(value[5]) == 0
    for t in range(12):
        for n in range(4):
            expected = 0.0 if targets[t, n] < 0 else logits[t, targets[t, n]].item()
            assert value[t, n].item() == expected
    weights = gaussian(12, 4, seed=1).float()
    gradients = [torch.autograd.grad((z * weights).sum(), logits)[0] for z in (value, compared)]
    close(*gradients)


# Prefix tokens -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefix_tool() -> ModuleType:
    path = ROOT / "data" / "prefix_tokens.py"
    spec = importlib.util.spec_from_file_location("prefix_tokens", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(3))
def test_prefix_tokens_by_brute_force(prefix_tool, seed):
    """A vocabulary of random byte strings over two letters, in random order: many prefixes."""
    random = np.random.default_rng(seed)
    words = {
        bytes(random.integers(0, 2, random.integers(1, 7)).astype(np.uint8)) for _ in range(60)
    }
    words = sorted(words)
    random.shuffle(words)
    vocabulary = {word: index for index, word in enumerate(words)}
    table = prefix_tool.prefix_tokens(vocabulary)
    assert table.dtype == np.int32
    assert table.shape == (len(words),)
    found = 0
    for index, word in enumerate(words):
        longest = -1
        for other, candidate in enumerate(words):
            begins = len(candidate) < len(word) and word[: len(candidate)] == candidate
            if begins and (longest < 0 or len(candidate) > len(words[longest])):
                longest = other
        assert table[index] == longest
        found += longest >= 0
    assert found > 10


def shipped_table() -> np.ndarray:
    return np.load(ROOT / "data" / "gpt2_prefix_tokens.npy")


def test_shipped_prefix_table():
    """What is true of it without the vocabulary: single bytes are the ids below 256 and begin
    with nothing; every other token begins with its first byte, so the way there ends with one."""
    table = shipped_table()
    assert table.shape == (50_257,)
    assert table.dtype == np.int32
    assert table.min() == -1
    assert table.max() < START_TOKEN
    assert (table[:256] == -1).all()
    assert table[START_TOKEN] == -1
    assert (table[256:START_TOKEN] >= 0).all()
    ends, hops = np.arange(256, START_TOKEN), 0
    while (ends >= 256).any():
        ends = np.where(ends >= 256, table[ends], ends)
        hops += 1
        assert hops < 130  # no token is longer than 128 bytes
    assert (ends >= 0).all()
    assert hops > 10
    assert len(np.unique(table)) > 5000


def test_shipped_prefix_table_for_tokens_known_by_heart():
    """Some of GPT-2's first merges: 256 is a space and t, 257 a space and a, 258 he, 262 a space
    and the, 284 a space and to, 294 a space and th."""
    table = shipped_table()
    space, h = 220, 71
    assert table[[256, 257, 258, 262, 284, 294]].tolist() == [space, space, h, 294, 256, 256]


def test_shipped_prefix_table_is_that_of_the_vocabulary(prefix_tool, tmp_path, monkeypatch):
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary")
    monkeypatch.setattr(sys, "argv", ["prefix_tokens.py", str(tmp_path / "fresh.npy")])
    if prefix_tool.main() != 0:
        pytest.skip("tiktoken cannot load GPT-2's vocabulary")
    assert np.array_equal(np.load(tmp_path / "fresh.npy"), shipped_table())


def test_prefixes_are_padded_to_the_rows_of_the_head():
    config = tiny_config()
    prefixes = read_prefixes(config, CPU)
    assert prefixes.dtype == torch.int64
    assert len(prefixes) == config.padded_vocab_size == 50_304
    assert prefixes[:50_257].tolist() == shipped_table().tolist()
    assert (prefixes[50_257:] == IGNORED_TARGET).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"no array", "cannot be read"),
        (np.zeros((2, 3), dtype=np.int32), r"int32 \(2, 3\) is no such table"),
        (np.zeros(50_257, dtype=np.int64), "int64 .* is no such table"),
        (np.zeros(50_305, dtype=np.int32), r"\(50305,\) is no such table"),
        (np.int32([0, 3, 1]), "ids outside the vocabulary"),
        (np.int32([0, -2, 1]), "ids outside the vocabulary"),
    ],
    ids=["missing", "text", "shape", "dtype", "long", "large", "negative"],
)
def test_broken_prefix_file_is_named(tmp_path, content, message):
    path = tmp_path / "prefixes.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(UserError, match=f"--prefix_file {path}: .*{message}.*prefix_tokens.py"):
        read_prefixes(tiny_config(prefix_file=str(path)), CPU)


# Tied head and embedding -------------------------------------------------------------------------


def test_gradient_of_the_tied_matrix_is_the_sum_of_both_uses(runtime):
    config = tiny_config()
    model = trained_like(config, runtime)
    with torch.no_grad():
        model.embed.copy_(model.head)
    batch = random_batch(1, [64])
    model(batch, WINDOWS).backward()
    as_embedding, as_head = model.embed.grad.clone(), model.head.grad.clone()
    assert as_embedding.norm() > 0.1
    assert as_head.norm() > 0.1
    model.zero_grad()
    model.tied = True
    model(batch, WINDOWS).backward()
    assert model.embed.grad is None
    torch.testing.assert_close(model.head.grad, as_embedding + as_head, rtol=1e-4, atol=1e-5)


def fill_grads(model: GPT, seed: int) -> dict[str, Tensor]:
    """Add random gradients to head and embedding as backward() would; returns them."""
    grads = {}
    for name in ("head",) if model.tied else ("head", "embed"):
        param = getattr(model, name)
        grad = gaussian(*param.shape, seed=seed + len(name)).to(param.dtype)
        param.grad = grad if param.grad is None else param.grad + grad
        grads[name] = grad
    return grads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_split_copies_weights_low_bits_and_adam_state(runtime, dtype):
    """And from then on each goes its own way, while the tied embedding has stood still."""
    model = GPT(tiny_config(dtype=dtype), runtime)
    optimizer = Optimizer(model, model.config, runtime)
    head, embed = (
        next(state for state in optimizer.states if state.group.name == name)
        for name in ("head", "embed")
    )
    untouched = model.embed.detach().clone()
    for step in range(4):
        fill_grads(model, step)
        optimizer.step(step, 1.0, 0.9)
    assert torch.equal(model.embed, untouched)
    optimizer.split_embedding()
    assert not model.tied
    assert not torch.equal(model.embed, untouched)
    assert torch.equal(model.embed, model.head)
    for mine, heads in zip(embed.tensors(), head.tensors(), strict=True):
        assert torch.count_nonzero(mine) > 0
        assert torch.equal(mine, heads)
        assert mine.data_ptr() != heads.data_ptr()
    assert len(embed.tensors()) == (3 if dtype == "bfloat16" else 2)
    # the same gradients move both alike; unlike ones do not
    grad = gaussian(*model.head.shape, seed=9).to(model.head.dtype)
    model.head.grad, model.embed.grad = grad.clone(), grad.clone()
    optimizer.step(5, 1.0, 0.9)
    assert torch.equal(model.embed, model.head)
    before = model.head.detach().clone()
    model.embed.grad = grad.clone()
    optimizer.step(7, 1.0, 0.9)
    assert torch.equal(model.head, before)
    assert not torch.equal(model.embed, before)


def test_split_between_two_steps_of_an_update_loses_no_gradient(runtime):
    """Steps 0 and 1 make an update, the split comes between them: the gradient of step 0 counts for
    both matrices, that of step 1 for each its own. By Adam in float64."""
    model = GPT(tiny_config(), runtime)
    config, start = model.config, model.head.detach().double().clone()
    optimizer = Optimizer(model, config, runtime)
    common = fill_grads(model, 0)["head"].double()
    optimizer.step(0, 1.0, 0.9)
    optimizer.split_embedding()
    own = fill_grads(model, 1)
    optimizer.step(1, 1.0, 0.9)
    for name in ("head", "embed"):
        grad = common + own[name].double()
        # at the first update both moments, corrected, are the gradient and its square
        direction = grad / (grad.abs() + config.adam_eps)
        lr = config.adam_lr
        decay = lr * lr * config.adam_weight_decay * 150 * (direction * start > 0)
        expected = start - lr * direction - decay * start
        close(getattr(model, name).detach(), expected, atol=1e-6)
    assert model.head.grad is None
    assert model.embed.grad is None


def test_tied_model_looks_up_the_head(runtime):
    model = trained_like(tiny_config(), runtime)
    tokens = random_batch(1, [64]).tokens
    assert torch.equal(model.look_up(tokens).embedded, model.embed[tokens.long()])
    model.tied = True
    assert torch.equal(model.look_up(tokens).embedded, model.head[tokens.long()])


# Sparse gradient of the bigram table -------------------------------------------------------------


def test_rows_are_summed_in_place_of_a_table():
    """Rows outside are left out, rows that come twice add up."""
    rows = torch.tensor([3, -2, 0, 3, 7, 5, 3, 100], dtype=torch.int32)
    values = gaussian(8, 4).float()
    table = train_gpt.sum_rows(rows, values, 6)
    expected = torch.zeros(6, 4)
    for row, value in zip(rows.tolist(), values):
        if 0 <= row < 6:
            expected[row] += value
    close(table, expected, atol=1e-6)


def test_bigram_gradient_is_that_of_a_dense_table(runtime):
    config = tiny_config()
    model = trained_like(config, runtime)
    batch = random_batch(1, [30, 34], num_ids=20)  # pairs that occur more than once
    lookups = model.look_up(batch.tokens)
    grad = gaussian(64, 32).float()
    (lookups.bigram * grad).sum().backward()
    rows, _ = bigram_rows(batch.tokens.tolist(), config.bigram_rows)
    expected = torch.zeros(512, 32)
    for row, value in zip(rows, grad):
        expected[row] += value
    assert len(set(rows)) < 64
    close(model.bigram.grad.to_dense(), expected)
