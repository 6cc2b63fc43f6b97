"""Every named technique of the recipe alone, against straightforward reference code."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_batch, tiny_config, trained_like, write_shard
from torch import Tensor
from transcription import (
    last_gates,
    ngram_rows,
    rms,
    small_slices,
    target_losses,
    transcribed_hidden,
)

import train_gpt
from train_gpt import (
    GPT,
    IGNORED_TARGET,
    LAST_LAYER_GATES,
    MEDIUM_LAYERS,
    SPEEDRUN_LAYERS,
    START_TOKEN,
    Batch,
    PointerShares,
    Windows,
    combine,
    head_loss,
    next_token_loss,
    prepare_qkv,
    read_proposal,
    rotary_frequencies,
    rotary_tables,
    sample_candidates,
    shift,
    small_params,
    stretch_rotary,
)

WINDOWS = Windows(8, 24)
SHRUNK_SPEEDRUN = {"layers": SPEEDRUN_LAYERS, "model_dim": 48}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(value: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=atol)


def recorded(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[tuple, object]]:
    """Arguments and results of every call of one of train_gpt's functions from now on."""
    calls, function = [], getattr(train_gpt, name)

    def record(*args: object) -> object:
        calls.append((args, function(*args)))
        return calls[-1][1]

    monkeypatch.setattr(train_gpt, name, record)
    return calls


def streams_of(
    model: GPT, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[tuple, tuple[Tensor, Tensor]]]:
    """What goes into and comes out of every sum of streams, by its layer."""
    calls = recorded(monkeypatch, "combine")
    with torch.no_grad():
        model.hidden(batch, WINDOWS)
    last = len(model.config.layers) - 1
    names = [f"{part} {i}" for i in range(last) for part in ("attention", "mlp")]
    names += [f"{part} {last}" for part in ("value", "enter", "attention", "mlp")]
    return dict(zip(["first", *names, "output"], calls, strict=True))


# Sums of streams ---------------------------------------------------------------------------------


def test_sum_of_streams():
    """With coefficients for all tokens and for each one; its norm only where it is asked for."""
    sources = [gaussian(9, 16, seed=seed) for seed in range(3)]
    coefficients = [gaussian(1, seed=3), gaussian(9, 1, seed=4), gaussian(9, 2, seed=5)[:, 1:]]
    singles = [x.float() for x in sources], [c.float() for c in coefficients]
    expected = torch.zeros(9, 16, dtype=torch.float64)
    for t in range(9):
        for source, c in zip(sources, coefficients):
            expected[t] += c.flatten()[t if c.numel() > 1 else 0] * source[t]
    stream, normed, *sources = combine(*singles, True)
    assert all(x is y for x, y in zip(sources, singles[0], strict=True))
    close(stream, expected)
    close(normed, rms(expected))
    stream, normed, *_ = combine(*singles)
    close(stream, expected)
    assert normed is None


# Queries, keys, values ---------------------------------------------------------------------------


def test_rotary_tables_cover_the_longest_sequence(runtime):
    """Of the stages, the extension or the validation, or what a GPU computes at once."""
    for changes, longest in (
        ({}, 64),
        ({"val_sequence_tokens": 96}, 96),
        ({"sequences_per_step": 2}, 128),
        ({"tokens_per_pass": 200}, 128),  # two sequences
    ):
        for table in GPT(tiny_config(**changes), runtime).rotary:
            assert table.shape == (longest, 1, 2)
    extension = dataclasses.replace(tiny_config().extension[0], tokens_per_step=448)
    cos, _ = GPT(tiny_config(extension=(extension,)), runtime).rotary
    assert len(cos) == 112


def test_long_layers_stretch_their_rotary_with_the_window(runtime, monkeypatch):
    """From window to window of the stages, in their order; short layers never do. The final
    validation has a longer window, with frequencies and scale of the extension."""
    first = tiny_config().stages[0]
    stages = [dataclasses.replace(first, share=1 / 3, window_long=w) for w in (16, 16, 32)]
    extension = dataclasses.replace(first, window_long=48)
    model = trained_like(tiny_config(stages=tuple(stages), extension=(extension,)), runtime)
    batch = random_batch(1, [40, 24])
    expected, scale = rotary_frequencies(8), 0.1
    for old, new, final in ((16, 16, 16), (16, 32, 32), (32, 48, 48), (48, 48, 64)):
        expected, factor = stretch_rotary(expected, old, new)
        scale *= factor
        tables = rotary_tables(expected, 64, runtime.device)
        monkeypatch.undo()
        turns, scales = recorded(monkeypatch, "prepare_qkv"), recorded(monkeypatch, "attention")
        model.validation_loss(batch, Windows(8, final))
        for layer, (args, _), (attended, _) in zip(model.config.layers, turns, scales, strict=True):
            is_long = layer.window == "long"
            for found, table in zip(args[2:4], tables if is_long else model.rotary, strict=True):
                assert torch.equal(found, table)
            assert attended[-2] == pytest.approx(scale if is_long else 0.1)
    assert scale > 0.12
    assert (expected < rotary_frequencies(8)).any()


def prepared(model: GPT, n: Tensor, layer: int, **changes: object) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a layer of the tiny plan from its normed input, without a value
    to add unless given."""
    arguments = {
        "x": n,
        "w_qkv": model.attention_weights[layer][0],
        "cos": model.rotary[0],
        "sin": model.rotary[1],
        "value": None,
        "fp8": None,
        "key_offset": len(n) if model.config.layers[layer].window == "long" else 0,
        "head_dim": model.config.head_dim,
    }
    return prepare_qkv(*{**arguments, **changes}.values())


def test_key_offset_moves_the_unrotated_half_of_keys_only(runtime):
    """One position back, the first key of a sequence keeps its own; queries, values, rotated halves
    stay. Two sequences of ten tokens."""
    model, n = trained_like(tiny_config(), runtime), rms(gaussian(20, 32)).float()
    q, k, v = prepared(model, n, 1, key_offset=0)
    offset_q, offset_k, offset_v = prepared(model, n, 1, key_offset=10)
    assert torch.equal(offset_q, q)
    assert torch.equal(offset_v, v)
    assert torch.equal(offset_k[..., :4], k[..., :4])
    for t in range(20):
        assert torch.equal(offset_k[t, :, 4:], k[t - (t % 10 > 0), :, 4:])
    assert not torch.equal(k[1, :, 4:], k[0, :, 4:])
    assert not torch.equal(k[10, :, 4:], k[9, :, 4:])
    assert torch.equal(shift(n, 20)[1:], n[:-1])
    assert torch.equal(shift(n, 20)[0], n[0])


def test_queries_keys_values_head_by_head(runtime):
    """Norm a head, rotary on the first half with its own position."""
    model, n = trained_like(tiny_config(), runtime), rms(gaussian(20, 32))
    q, k, v = prepared(model, n.float(), 3)
    weights = model.attention_bank[3].double()
    for h in range(2):
        rows = slice(8 * h, 8 * h + 8)
        for z, part in (q, 0), (k, 16):
            expected = rms(n @ weights[part : part + 16][rows].T)
            for t in range(20):
                for i, frequency in enumerate((1.0, 1 / 1024)):
                    c, s = math.cos(t * frequency), math.sin(t * frequency)
                    a, b = expected[t, 2 * i : 2 * i + 2].tolist()
                    expected[t, 2 * i], expected[t, 2 * i + 1] = a * c - b * s, a * s + b * c
            close(z[:, h], expected)
        close(v[:, h], n @ weights[32:48][rows].T)


def test_value_is_added_to_the_values_alone(runtime):
    model, n = trained_like(tiny_config(), runtime), rms(gaussian(20, 32)).float()
    value = gaussian(20, 16, seed=1).float()
    q, k, v = prepared(model, n, 3, value=value)
    plain_q, plain_k, plain_v = prepared(model, n, 3)
    assert torch.equal(q, plain_q)
    assert torch.equal(k, plain_k)
    close(v - plain_v, value.view(20, 2, 8))


def test_what_is_added_to_the_values(runtime, monkeypatch):
    """A layer's value embedding as it is, in the last layer by its gate."""
    model, batch = trained_like(tiny_config(), runtime), random_batch(1, [40, 24])
    calls = recorded(monkeypatch, "prepare_qkv")
    of_last = streams_of(model, batch, monkeypatch)["value 4"][1][0]
    added = [args[4] for args, _ in calls]
    assert torch.equal(added[0], model.value_embed[batch.tokens.long()])
    assert added[1] is added[2] is added[3] is None
    assert added[4] is of_last


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 5e-3)])
def test_layer_projects_its_heads(runtime, monkeypatch, dtype, error):
    """Next to each other, by its own O; and their gradient."""
    model, batch = trained_like(tiny_config(dtype=dtype), runtime), random_batch(1, [40, 24])
    n, grad = (gaussian(64, 32, seed=seed).to(model.head.dtype) for seed in range(2))
    for layer in range(5):
        y = gaussian(64, 2, 8, seed=10 + layer).to(model.head.dtype).requires_grad_()
        monkeypatch.setattr(train_gpt, "attention", lambda *_, y=y: y)
        value = model.attend(layer, n, None, batch, WINDOWS, None)
        exact = y.detach().double().requires_grad_()
        expected = exact.flatten(1) @ model.attention_bank[layer, 48:].detach().double()
        found = value, *torch.autograd.grad(value, y, grad)
        references = expected, *torch.autograd.grad(expected, exact, grad.double())
        for result, reference in zip(found, references, strict=True):
            assert (result.double() - reference).norm() < error * reference.norm()


def test_attention_of_every_layer_has_its_window_and_the_scale(runtime, monkeypatch):
    model, batch = trained_like(tiny_config(attention_scale=0.3), runtime), random_batch(1, [64])
    calls = recorded(monkeypatch, "attention")
    with torch.no_grad():
        model.hidden(batch, WINDOWS)
    options = [args[3:] for args, _ in calls]
    lengths = batch.cu_seqlens, batch.max_seq_len
    assert options == [(*lengths, window, 0.3, "plain") for window in (8, 24, 8, 8, 24)]


# Gates and their starts --------------------------------------------------------------------------


def test_gates_of_the_last_layer(runtime):
    """A GELU MLP times 0.1, one output after the other, in fp32."""
    for dtype, atol in (("float32", 1e-5), ("bfloat16", 3e-2)):
        model = trained_like(tiny_config(dtype=dtype), runtime)
        x, small = gaussian(9, 32), model.unpack_small()
        weights = (small[f"gate_{part}"].double() for part in ("w_1", "b_1", "w_2", "b_2"))
        w_1, b_1, w_2, b_2 = weights
        gates = model.last_gates(x.to(model.head.dtype))
        assert list(gates) == list(LAST_LAYER_GATES)
        for t in range(9):
            hidden = w_1 @ x[t] + b_1
            hidden = [h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden.tolist()]
            for i, gate in enumerate(gates.values()):
                assert gate.shape == (9,) and gate.dtype == torch.float32
                expected = 0.1 * (sum(w * h for w, h in zip(w_2[i], hidden)) + b_2[i])
                close(gate[t], expected, atol)


def test_small_parameters_have_their_initial_values(runtime):
    """Every slice of the one vector, in its shape."""
    config = tiny_config(**SHRUNK_SPEEDRUN)
    small = small_slices(GPT(config, runtime))
    scalars = "residual", "project", "mlp_residual", "mlp_project", "ngrams"
    shapes = dict(zip(scalars, [(8,), (8,), (8,), (8,), (3,)]))  # the last layer has gates
    shapes |= {"attended": (1,), "gate_w_1": (8, 48), "gate_b_1": (8,)}
    shapes |= {"gate_w_2": (10, 8), "gate_b_2": (10,)}
    shapes |= {"pointer": (256, 48), "pointer_sink": (128,), "pointer_gain": (1,)}
    assert {name: tuple(weights.shape) for name, weights in small.items()} == shapes
    root = math.sqrt(1.1)
    starts = {"residual": root, "mlp_residual": root, "project": 0.5, "mlp_project": 1.0}
    starts |= {"ngrams": 0.05, "attended": -0.5, "gate_b_1": 0.0, "gate_w_2": 0.0}
    starts |= {"pointer_sink": 0.0, "pointer_gain": 1.0}
    for name, start in starts.items():
        assert torch.equal(small[name], torch.full_like(small[name], start).float()), name
    assert small["gate_w_1"].std() > 0.05  # checked with the other uniform ones
    decayed = {name for name, row in small_params(config).items() if row.weight_decay != 0}
    assert decayed == {"gate_w_1", "gate_w_2"}


def test_gates_of_an_untrained_model_do_not_depend_on_the_stream(runtime):
    model, x, root = GPT(tiny_config(), runtime), gaussian(7, 32), math.sqrt(1.1)
    starts = {"value": 2.0, "x_last": 1.0, "project": 0.5, "ngrams": 0.05, "mlp_project": 1.0}
    starts |= {"residual": root, "mlp_residual": root}
    value, expected = model.last_gates(x.float()), last_gates(model, x)
    assert value.keys() == expected.keys() > starts.keys()
    for name, gate in value.items():
        start = torch.full((7, 1), starts.get(name, 0.0))
        torch.testing.assert_close(gate[:, None], start, rtol=1e-6, atol=0)
        close(expected[name], start)


# The way through the layers ----------------------------------------------------------------------


def test_sums_of_streams_through_the_tiny_plan(runtime, monkeypatch):
    """Each from the ones before it: n-grams, residual scalings, the gates of the last layer, and
    what is added after it."""
    model, batch = trained_like(tiny_config(), runtime), random_batch(1, [40, 24])
    calls = streams_of(model, batch, monkeypatch)
    out = {name: stream.double() for name, (_, (stream, *_)) in calls.items()}
    added = {name: args[0][1:2] for name, (args, _) in calls.items()}
    layer = {name: y.double() for name, sources in added.items() for y in sources}
    small, tokens = small_slices(model), batch.tokens.long()
    e = model.look_up(batch).ngrams.double()
    values = model.value_embed.double().unflatten(0, (2, -1))[:, tokens]
    own = last_gates(model, out["mlp 3"])

    def check(name: str, expected: Tensor) -> None:
        close(out[name], expected, atol=1e-4)

    x0 = rms(model.head[tokens].double())
    close(calls["first"][0][0][0], x0)
    first, attend = out["first"], out["mlp 3"]
    check("first", x0 + small["ngrams"][0] * e)
    x, gains = first, (0, small["ngrams"][1], 0, small["ngrams"][2])
    for i, gain in enumerate(gains):
        r, p = small["residual"][i], small["project"][i]
        check(f"attention {i}", r * x + p * layer[f"attention {i}"] + gain * e)
        r, p, x = small["mlp_residual"][i], small["mlp_project"][i], out[f"attention {i}"]
        check(f"mlp {i}", r * x + p * layer[f"mlp {i}"])
        x = out[f"mlp {i}"]

    # x enters the last layer, in the tiny plan it is also what that attends from
    check("value 4", own["value"] * values[1])
    check("enter 4", own["x_first"] * first + own["x_attend"] * attend + own["x_last"] * x)
    x = own["residual"] * out["enter 4"] + own["project"] * layer["attention 4"]
    check("attention 4", x + own["first"] * first + own["ngrams"] * e)
    x = own["mlp_residual"] * out["attention 4"] + own["mlp_project"] * layer["mlp 4"]
    check("mlp 4", x)
    check("output", x + small["attended"] * attend)


def test_forward_pass_of_the_medium_plan(runtime):
    """Sixteen layers, the attention as wide as the stream."""
    config = tiny_config(layers=MEDIUM_LAYERS, model_dim=64, num_heads=8, mlp_dim=256)
    model, batch = trained_like(config, runtime), random_batch(1, [40, 24])
    with torch.no_grad():
        value = model.hidden(batch, WINDOWS)
        expected = transcribed_hidden(model, batch, *WINDOWS)
    assert 0.9 < expected.std() < 1.1
    torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-4)


def test_mlp_reads_the_normed_stream(runtime, monkeypatch):
    """relu² between W_1 and W_2 of its own layer."""
    model, batch = trained_like(tiny_config(), runtime), random_batch(1, [40, 24])
    mlps = recorded(monkeypatch, "mlp")
    streams = streams_of(model, batch, monkeypatch)
    assert len(mlps) == 5
    for i, ((x, _, _, fp8), y) in enumerate(mlps):
        assert fp8 is None
        close(x, rms(streams[f"attention {i}"][1][0].double()))
        w_1, w_2 = model.mlp_bank[i].double(), model.mlp_bank[5 + i].double()
        close(y, torch.relu(x.double() @ w_1.T) ** 2 @ w_2, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, SHRUNK_SPEEDRUN], ids=["tiny", "speedrun"])
def test_every_scalar_and_gate_changes_the_output(runtime, changes):
    """One after the other."""
    model = trained_like(tiny_config(attention_scale=0.7, **changes), runtime)
    batch = random_batch(3, [10, 22])
    names = ("residual", "project", "mlp_residual", "mlp_project", "ngrams", "attended", "gate_b_2")
    with torch.no_grad():
        before = model.hidden(batch, WINDOWS)
        small = model.unpack_small()
        for name in names:
            for i in range(len(small[name])):
                start = small[name][i].item()
                small[name][i] += 3 if name == "gate_b_2" else 0.5
                difference = (model.hidden(batch, WINDOWS) - before).abs().max()
                small[name][i] = start
                assert difference > 1e-3, (name, i)


# Losses ------------------------------------------------------------------------------------------


def reference_loss(
    model: GPT, hidden: Tensor, batch: Batch, weights: list[float]
) -> tuple[float, float]:
    """Weighted sum of the terms, and the next-token term."""
    losses = target_losses(model, batch, hidden).sum(0)
    assert (losses > 0).all()
    return (losses @ torch.tensor(weights).double()).item(), losses[0].item()


@pytest.mark.parametrize("weights", [[1, 0.5], [1, 0], [0.3, 2], [0, 1]])
def test_training_loss_term_by_term(runtime, weights):
    """The last target of a sequence has no second next token."""
    config = tiny_config()
    model = trained_like(config, runtime)
    batch = random_batch(2, [20, 12], num_ids=9)
    targets = batch.targets.clone()
    targets[[5, 31]] = IGNORED_TARGET
    batch, hidden = batch._replace(targets=targets), gaussian(32, 32).float()
    model.hidden = lambda *_: hidden
    loss, next_token = model.training_loss(
        batch, WINDOWS, torch.tensor(weights, dtype=torch.float32)
    )
    expected = reference_loss(model, hidden, batch, weights)
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    assert next_token.item() == pytest.approx(expected[1], rel=1e-5)
    assert loss.dtype == next_token.dtype == torch.float32
    assert not next_token.requires_grad
    assert model.validation_loss(batch, WINDOWS).item() == pytest.approx(expected[1], rel=1e-5)


def test_forward_gives_both_losses(runtime):
    model = trained_like(tiny_config(), runtime)
    batch, weights = random_batch(2, [40, 24], num_ids=20), [1.0, 0.5]
    loss, next_token = model.training_loss(batch, WINDOWS, torch.tensor(weights))
    hidden = transcribed_hidden(model, batch, *WINDOWS)
    expected = reference_loss(model, hidden, batch, weights)
    assert loss.item() == pytest.approx(expected[0], rel=1e-4)
    assert next_token.item() == pytest.approx(expected[1], rel=1e-4)


def test_gradient_of_the_loss_is_that_of_its_definition():
    """By autograd through a softmax in float64, with a pointer that has two thirds of the
    attention of every second token on the sink, and a third on the target."""
    head = gaussian(50_304, 16).float().mul(0.5).requires_grad_()
    x = gaussian(6, 16, seed=1).float().requires_grad_()
    targets = torch.randint(0, 50_257, (6, 4), generator=torch.manual_seed(0))
    targets[5, 1] = targets[4, 2] = targets[1, 3] = IGNORED_TARGET
    targets[2, 3] = targets[2, 0]  # the same one twice
    weights = torch.tensor([1, 0.5, 0.25, 0.125])
    points = torch.tensor([1.0, 0, 1, 0, 1, 0])
    shares = PointerShares(points / 3, 1 - points / 3)
    columns = F.pad(targets, (0, 1), value=50_257)
    losses = head_loss(x, head, columns, weights, None, None, shares)
    value = torch.autograd.grad(losses[0], (x, head))
    x64, head64 = (z.detach().double().requires_grad_() for z in (x, head))
    logits = 23 * torch.sigmoid((x64 @ head64.T + 5) / 7.5)
    p = logits.softmax(dim=1)
    rest, copy = p.index_fill(1, torch.tensor(50_257), 0), p[:, 50_257:50_258]
    copied = torch.zeros_like(p).scatter(1, targets[:, :1], points[:, None].double() / 3)
    mixture = rest / rest.sum(1, keepdim=True) * (1 - copy * points[:, None] / 3) + copy * copied
    terms = [
        -weight * (p if term else mixture)[t, target].log()
        for t, row in enumerate(targets.tolist())
        for term, (weight, target) in enumerate(zip(weights.tolist(), row))
        if target >= 0
    ]
    assert len(terms) == 21
    assert losses[0].item() == pytest.approx(sum(terms).item(), rel=1e-5)
    for single, double in zip(value, torch.autograd.grad(sum(terms), (x64, head64))):
        assert (single - double).norm() < 1e-5 * double.norm()


# Sampled softmax ---------------------------------------------------------------------------------


def random_targets(seed: int, tokens: int, vocab: int) -> Tensor:
    """Of four terms; some occur twice or not at all."""
    targets = torch.randint(0, vocab, (tokens, 4), generator=torch.manual_seed(seed))
    targets[::3, 2] = targets[1::4, 3] = IGNORED_TARGET
    targets[2, 1] = targets[3, 0] = targets[2, 0]
    return targets


def uneven(vocab: int) -> Tensor:
    """A proposal, from 0.1 to 10."""
    return 10 ** torch.empty(vocab).uniform_(-1, 1, generator=torch.manual_seed(3))


@pytest.mark.parametrize(("vocab", "count"), [(300, 112), (50_304, 12_288), (50_304, 96)])
def test_candidates_are_the_targets_and_sampled_tokens(vocab, count):
    """What a drawn one stands for follows from one threshold for all of them."""
    targets, proposal = random_targets(1, 20, vocab), uneven(vocab)
    columns = sample_candidates(targets, proposal, count)
    tokens, kinds = columns.tokens.tolist(), set(targets.flatten().tolist()) - {IGNORED_TARGET}
    assert len(set(tokens)) == len(tokens) == count
    assert 0 <= min(tokens) and max(tokens) < vocab
    assert kinds < set(tokens)
    assert columns.offsets.dtype == torch.float32
    drawn = [(token, x) for token, x in zip(tokens, columns.offsets.tolist()) if token not in kinds]
    assert sum(x == 0 for x in columns.offsets.tolist()) >= len(kinds)
    thresholds = [math.exp(x) * proposal[token].item() for token, x in drawn if x > 0]
    assert len(thresholds) > 10
    assert thresholds == pytest.approx([thresholds[0]] * len(thresholds), rel=1e-4)
    for token, x in drawn:
        assert (x == 0) == (proposal[token].item() >= thresholds[0] * (1 - 1e-6)), token
    assert columns.targets.shape == targets.shape
    ignored = targets == IGNORED_TARGET
    assert ignored.any() and (columns.targets[ignored] == IGNORED_TARGET).all()
    assert torch.equal(columns.tokens[columns.targets[~ignored]], targets[~ignored])


def test_candidates_depend_on_the_targets_alone():
    """The same for the same targets; for other targets the sampled tokens differ too."""
    targets, proposal = random_targets(1, 20, 5000), torch.ones(5000)
    first, again = (sample_candidates(targets, proposal, 1024) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, again))
    kinds = targets.unique()
    for other in (targets.flip(0), random_targets(2, 20, 5000)):
        tokens = sample_candidates(other, proposal, 1024).tokens
        common = set(first.tokens.tolist()) & set(tokens.tolist()) - set(kinds.tolist())
        expected = (1024 - len(kinds)) ** 2 / (5000 - len(kinds))  # of two independent draws
        assert abs(len(common) - expected) < len(kinds) + 4 * math.sqrt(expected)


def test_tokens_are_sampled_as_often_as_proposed():
    """Where few of many are drawn."""
    proposal, times = uneven(2000), torch.zeros(2000)
    for row in range(500):
        times[sample_candidates(torch.tensor([[row]]), proposal, 81).tokens] += 1
    large = proposal > proposal.median()
    assert times[large].sum() / times[~large].sum() == pytest.approx(
        (proposal[large].sum() / proposal[~large].sum()).item(), rel=0.2
    )


def test_candidates_estimate_the_denominator_without_bias():
    """Each sequence has its own targets, and its own candidates. Logits go up with the ids, so that
    draws that are not accounted for would show. A proposal like the terms is better than an even
    one, and an opposite one is worse, but as right."""
    vocab, count, errors = 400, 208, []
    logits = gaussian(vocab) + torch.linspace(0, 2, vocab)
    exact = logits.exp().sum().item()
    for proposal in ((logits / 2).exp(), torch.ones(vocab), (-logits / 4).exp()):
        estimates = []
        for row in range(400):
            columns = sample_candidates(random_targets(row, 20, vocab), proposal, count)
            estimates.append((logits[columns.tokens] + columns.offsets).exp().sum().item())
        errors.append(np.std(estimates) / math.sqrt(len(estimates)))
        assert 0 < errors[-1] < 0.01 * exact
        assert abs(np.mean(estimates) - exact) < 2 * errors[-1]
    assert 1.2 * errors[0] < errors[1] and 1.1 * errors[1] < errors[2]


@pytest.mark.parametrize("vocab", [48, 320])
def test_all_candidates_are_the_whole_vocabulary(vocab):
    """Also where every token is a target."""
    targets = random_targets(1, 100, vocab)
    columns = sample_candidates(targets, uneven(vocab), vocab)
    assert (len(targets.unique()) == vocab + 1) == (vocab == 48)
    assert sorted(columns.tokens.tolist()) == list(range(vocab))
    assert columns.offsets.tolist() == [0.0] * vocab
    ignored = targets == IGNORED_TARGET
    assert (columns.targets[ignored] == IGNORED_TARGET).all()
    assert torch.equal(columns.tokens[columns.targets[~ignored]], targets[~ignored])


def test_proposal_is_the_root_of_what_training_reads_first(tmp_path):
    write_shard(tmp_path / "t_1.bin", [START_TOKEN, 7, 7, 7, 7, 7, 7, 7, 9])
    write_shard(tmp_path / "t_2.bin", [START_TOKEN, 8])
    proposal = read_proposal(tiny_config(), str(tmp_path / "t_1.bin"))
    assert proposal.dtype == torch.float32 and proposal.shape == (50_304,)
    assert [proposal[i].item() ** 2 for i in (7, 9, START_TOKEN, 8, 50_303)] == pytest.approx(
        [9, 3, 3, 2, 2]
    )


def test_training_samples_by_the_proposal(tmp_path, runtime, monkeypatch):
    """From the first step on, which the preparation does not."""
    for name in ("train", "val"):
        write_shard(tmp_path / f"{name}.bin", [START_TOKEN, 5, 5, 6] * 100)
    files = {"train_files": str(tmp_path / "train.bin"), "val_file": str(tmp_path / "val.bin")}
    config = tiny_config(**files, val_every=0, num_steps=1, extension_steps=0)
    seen, compute = [], train_gpt.Trainer.compute

    def compute_and_keep(self: train_gpt.Trainer, *arguments: object) -> Tensor:
        seen.append(self.model.proposal.clone())
        return compute(self, *arguments)

    monkeypatch.setattr(train_gpt.Trainer, "compute", compute_and_keep)
    monkeypatch.setattr(train_gpt, "draw_curve", lambda log: "not drawn")
    train_gpt.train(config, runtime)
    count = config.sequences_per_step
    assert len(seen) > count
    for proposal in seen[-count:]:
        assert torch.equal(proposal, read_proposal(config, config.train_files))
    for proposal in seen[:-count]:
        assert (proposal == 1).all()


@pytest.mark.parametrize(("kinds", "finite"), [(15, True), (16, False), (17, False), (40, False)])
def test_too_few_candidates_give_nan(kinds, finite):
    """The copy entry is one of the kinds."""
    targets = F.pad(torch.arange(3 * 40).view(40, 3) % (kinds - 1), (0, 1), value=299)
    columns = sample_candidates(targets, torch.ones(300), 16)
    x, head = gaussian(40, 16).float(), gaussian(300, 16, seed=1).float()
    weights, shares = torch.tensor([1, 0.5, 0.25]), PointerShares(*torch.full((2, 40), 0.25))
    inputs = x, head[columns.tokens], columns.targets, weights, None, columns.offsets
    losses = torch.stack(head_loss(*inputs, shares))
    assert torch.isfinite(losses).all() if finite else torch.isnan(losses).all()


@pytest.mark.parametrize("tokens_per_sampling", [64, 25])
def test_forward_on_candidates_and_its_gradients(runtime, tokens_per_sampling):
    """Those of the loss written down in float64 after the model's hidden states and the pointer's
    shares, on candidates sampled for the whole sequence or for 25, 25 and 14 tokens of it; what the
    gradients contain already stays."""
    config, count = tiny_config(tokens_per_sampling=tokens_per_sampling), 256
    batch = random_batch(2, [40, 24], num_ids=20)
    weights = [1.0, 0.5]
    models = [trained_like(config, runtime) for _ in range(2)]
    for model in models:
        for param in model.parameters():
            param.grad.fill_(2.0)
    model, other = models
    for each in models:
        each.proposal.copy_(uneven(50_304))
    place = model.head.grad.data_ptr()
    loss, next_token = model.training_loss(batch, WINDOWS, torch.tensor(weights), count)
    loss.backward()

    targets, copy = batch.targets.tolist(), config.vocab_size
    terms = [*zip(targets, [*targets[1:], -1], [copy] * 64, strict=True)]
    head = other.head.detach().double().requires_grad_()
    hidden = other.hidden(batch, WINDOWS)
    shares = [*zip(*(share.double() for share in other.point(hidden, batch)))]
    logits = 23 * torch.sigmoid((hidden.double() @ head.T + 5) / 7.5)
    losses, drawn = [0.0] * 2, set()
    for part in torch.arange(64).split(tokens_per_sampling):
        columns = sample_candidates(torch.tensor(terms)[part], uneven(50_304), count)
        weighted = logits[part][:, columns.tokens].exp() * columns.offsets.double().exp()
        for t, estimate in zip(part.tolist(), weighted.sum(1)):
            first, second, alpha = (logits[t, terms[t]].exp() / estimate).unbind()
            to_target, to_sink = shares[t]
            first = first / (1 - alpha) * (1 - alpha * (1 - to_sink)) + alpha * to_target
            losses[0] -= first.log()
            losses[1] -= second.log() if terms[t][1] >= 0 else 0.0
        drawn |= set(columns.tokens.tolist())
    total = sum(weight * term for weight, term in zip(weights, losses))
    total.backward()
    other.head.grad += head.grad
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert next_token.item() == pytest.approx(losses[0].item(), rel=1e-5)
    assert not next_token.requires_grad
    assert model.head.grad.data_ptr() == place
    for (name, param), reference in zip(model.named_parameters(), other.parameters()):
        value, expected = param.grad - 2.0, reference.grad - 2.0
        assert (value - expected).norm() < 1e-4 * expected.norm(), name
    touched = (model.head.grad != 2.0).any(1).nonzero().flatten().tolist()
    assert set(touched) == drawn | set(batch.tokens.tolist())


def test_forward_on_all_candidates_is_forward_without(runtime):
    config, batch = tiny_config(), random_batch(2, [40, 24])
    model, weights = trained_like(config, runtime), torch.tensor([1, 0.5])
    losses = [model.training_loss(batch, WINDOWS, weights, count) for count in (0, 50_304)]
    for value, expected in zip(*losses):
        assert torch.equal(value, expected)


# Head and embedding ------------------------------------------------------------------------------


def test_head_is_the_embedding_and_its_gradient_the_sum_of_both_uses(runtime):
    model, batch = trained_like(tiny_config(), runtime), random_batch(1, [64])
    assert torch.equal(model.look_up(batch).embedded, model.head[batch.tokens.long()])
    head, hidden = model.head.detach().clone().requires_grad_(), model.hidden(batch, WINDOWS)
    targets = model.with_copy_entry(batch.targets[:, None])
    next_token_loss(hidden, head, targets, model.point(hidden, batch)).backward()
    as_embedding, as_head = model.head.grad.clone(), head.grad
    read = as_embedding.norm(dim=1).nonzero().flatten().tolist()
    assert set(read) == set(batch.tokens.tolist())
    assert as_embedding.norm() > 0.1
    assert as_head.norm() > 0.1
    model.head.grad.zero_()
    model.validation_loss(batch, WINDOWS).backward()
    torch.testing.assert_close(model.head.grad, as_embedding + as_head, rtol=1e-4, atol=1e-5)


# Gradients of the tables -------------------------------------------------------------------------


def test_gradients_of_tables_are_added_row_by_row(runtime):
    """To what they contain already, those of a row that is read more than once included. Rows of
    n-grams leave theirs one by one."""
    config = tiny_config()
    model = trained_like(config, runtime)
    batch = random_batch(1, [30, 34], num_ids=20)  # pairs that occur more than once
    lookups, grad = model.look_up(batch), gaussian(64, 32).float()
    tables = model.value_embed, model.head
    for table in tables:
        table.grad.fill_(2.0)
    for read, factor in ((lookups.ngrams, 1), (lookups.values[1], 3), (lookups.embedded, 5)):
        (factor * read * grad[:, : read.size(1)]).sum().backward()
    expected = [torch.full_like(table, 2.0) for table in tables]
    assert len(set(batch.tokens.tolist())) < 64
    for token, piece in zip(batch.tokens.tolist(), grad):
        expected[0][config.padded_vocab_size + token] += 3 * piece[:16]
        expected[1][token] += 5 * piece
    for table, reference in zip(tables, expected):
        close(table.grad, reference)
    rows = ngram_rows(batch.tokens.tolist(), (2,), config.ngram_rows)
    assert len({row for (row,) in rows}) < 64
    assert model.ngrams.pending[0].tolist() == rows
    assert torch.equal(model.ngrams.pending[1], grad)


def test_offsets_are_in_the_denominator_alone():
    """Of every entry, the copy entry too; also where a row lacks a target."""
    generator = torch.Generator().manual_seed(0)
    shapes = (12, 9), (9,), (3, 12)
    logits, offsets, shares = (torch.randn(x, generator=generator).double() for x in shapes)
    shares = shares.softmax(0)
    targets = torch.randint(0, 8, (12, 3), generator=generator)
    targets[:, 2], targets[3, 0], targets[4, 1], targets[5, :2] = 8, -1, -1, -1
    found = train_gpt.token_losses(logits, targets, offsets, PointerShares(*shares[:2]))
    capped = train_gpt.softcap(logits)
    for t in range(12):
        total, (first, second, copy) = (capped[t] + offsets).exp().sum(), targets[t]
        alpha = capped[t, copy].exp() / total
        rest = total - (capped[t, copy] + offsets[copy]).exp()
        p = capped[t, first].exp() / rest * (rest / total + alpha * shares[1, t])
        losses = -(p + alpha * shares[0, t]).log(), total.log() - capped[t, second]
        expected = [float(x) * bool(target >= 0) for x, target in zip(losses, targets[t])]
        assert found[t].tolist() == pytest.approx(expected, rel=1e-9)
