"""The pointer against its definition in float64, by kernels (in Triton's interpreter without a GPU)
and in plain PyTorch; and what training and validation make of it."""

import math
from functools import partial

import numpy as np
import pytest
import test_self_check
import torch
import torch.nn.functional as F
from conftest import fp32_for_fp8, random_batch, tiny_config, trained_like, write_shard
from test_kernels import cases, head_inputs, in_fp8, interpreted, relative_error, scale_of
from test_train import fork, validation_losses
from torch import Tensor

import train_gpt
from train_gpt import (
    IGNORED_TARGET,
    POINTER_DIM,
    START_TOKEN,
    Batch,
    ExtraKeys,
    HeadFp8,
    PointerShares,
    Windows,
    document_bounds,
    head_loss,
    pointer_shares,
    rms_norm,
    softcap,
)

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
WINDOWS = Windows(8, 24)
by_kernels = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def exact_shares(
    q: Tensor,
    k: Tensor,
    sink: Tensor,
    batch: Batch,
    reach: int,
    mask: Tensor | None = None,
    extra: ExtraKeys | None = None,
) -> Tensor:
    """(2, T): of the target and of the sink, document by document. mask: (vocab, vocab) bool, what
    cannot follow each token, of which there are no extra keys."""
    shares = []
    for begin, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:]):
        distance = torch.arange(end - begin, device=q.device)
        distance = distance[:, None] - distance[None, :]
        own = slice(begin, end)
        unseen = (distance <= 0) | (distance > reach)
        if mask is not None:
            of_document = batch.tokens[own].long()
            unseen |= mask[of_document][:, of_document]
        scores = (q[own] @ k[own].T).masked_fill(unseen, -math.inf)
        scores = torch.cat([scores, (q[own] @ sink)[:, None]], 1) / math.sqrt(q.size(1))
        hits = batch.tokens[own][None, :] == batch.targets[own][:, None]
        hits = F.pad(hits, (0, 1))  # the sink
        if extra is not None:
            scores = torch.cat([scores, extra.scores[own]], 1)
            hits = torch.cat([hits, extra.tokens[own] == batch.targets[own][:, None]], 1)
        attention = scores.softmax(1)
        shares.append(torch.stack([(attention * hits).sum(1), attention[:, end - begin]]))
    return torch.cat(shares, 1)


def on_device(batch: Batch) -> Batch:
    return Batch(*(x.to(DEVICE) for x in batch[:3]), *batch[3:])


LENGTHS = {
    "several": [70, 1, 130, 2, 59],
    "one": [200],
    "short": [3] * 30,
    "of a token": [1] * 67,
    "whole tiles": [64, 128, 64],
}


@by_kernels
@pytest.mark.parametrize(
    ("documents", "ids", "reach", "dim"),
    cases(
        [
            ("several", 3, 1000, 32),
            ("several", 3, 65, 16),
            ("one", 5, 40, POINTER_DIM),
            ("short", 2, 1000, 16),
            ("of a token", 2, 1000, 16),
            ("whole tiles", 1, 1000, 16),  # every earlier token is a hit
            ("whole tiles", 0, 100, 16),  # none is
        ],
        [([2048, 1, 900, 1147] * 4, 50, 2048, POINTER_DIM), ([9000, 3000], 50, 8192, POINTER_DIM)],
    ),
)
def test_shares_and_their_gradients(monkeypatch, kernels, documents, ids, reach, dim):
    monkeypatch.setattr(train_gpt, "has_kernels", lambda device: kernels)
    lengths = LENGTHS[documents] if isinstance(documents, str) else documents
    batch = on_device(random_batch(1, lengths, num_ids=max(ids, 1)))
    tokens = batch.tokens % START_TOKEN
    targets = batch.targets % START_TOKEN if ids else batch.targets + START_TOKEN
    targets[::7] = IGNORED_TARGET
    batch = batch._replace(tokens=tokens, targets=targets)
    count, dtype = len(tokens), torch.bfloat16 if GPU else torch.float32
    both = 2 * rms_norm(torch.randn(count, 2, dim, device=DEVICE))
    q, k = (x.requires_grad_() for x in both.to(dtype).unbind(1))  # columns of both, as in a run
    sink = torch.randn(dim, device=DEVICE).requires_grad_()
    grads = torch.randn(2, count, device=DEVICE)
    starts, ends = document_bounds(batch.cu_seqlens, count)
    shares = torch.stack(pointer_shares(q, k, sink, tokens, targets, starts, ends, reach))
    found = torch.autograd.grad(shares, (q, k, sink), grads)
    doubles = [x.detach().double().requires_grad_() for x in (q, k, sink)]
    exact = exact_shares(*doubles, batch, reach)
    expected = torch.autograd.grad(exact, doubles, grads.double())
    assert relative_error(shares, exact) < (2e-2 if GPU else 1e-6)
    for value, reference in zip(found, expected, strict=True):
        assert relative_error(value, reference) < (2e-2 if GPU else 1e-5)
    alone = starts == torch.arange(count, device=DEVICE)
    assert (shares[:, alone] == torch.tensor([[0.0], [1.0]], device=DEVICE)).all()
    if ids == 0:
        assert (shares[0] == 0).all()
    if ids == 1:
        scored = targets >= 0
        torch.testing.assert_close(shares[0, scored], 1 - shares[1, scored])


def random_mask(vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    """What cannot follow each token, (vocab, vocab) bool, and the same in bits. The last token, the
    copy entry, always can."""
    mask = np.random.default_rng(seed).random((vocab, vocab)) < 0.4
    mask[:, -1] = False
    bits = np.packbits(mask, axis=1, bitorder="little")
    return torch.from_numpy(mask).to(DEVICE), torch.from_numpy(bits).to(DEVICE)


@by_kernels
@pytest.mark.parametrize(
    ("documents", "ids", "reach", "dim"),
    cases(
        [("several", 30, 65, 16), ("short", 2, 1000, 16), ("whole tiles", 1, 1000, 16)],
        [([2048, 1, 900, 1147] * 4, 50, 2048, POINTER_DIM)],
    ),
)
def test_shares_of_what_can_follow(monkeypatch, kernels, documents, ids, reach, dim):
    """Keys whose token cannot follow are not seen; with one token that cannot follow itself the
    sink is all that is."""
    monkeypatch.setattr(train_gpt, "has_kernels", lambda device: kernels)
    lengths = LENGTHS[documents] if isinstance(documents, str) else documents
    batch = on_device(random_batch(1, lengths, num_ids=ids))
    batch = batch._replace(tokens=batch.tokens % START_TOKEN, targets=batch.targets % START_TOKEN)
    mask, bits = random_mask(64, 0)
    mask[0, 0], bits[0, 0] = True, bits[0, 0] | 1
    count, dtype = len(batch.tokens), torch.bfloat16 if GPU else torch.float32
    q, k = (2 * rms_norm(torch.randn(count, 2, dim, device=DEVICE))).to(dtype).unbind(1)
    sink = torch.randn(dim, device=DEVICE)
    inputs = q, k, sink, batch.tokens, batch.targets, *document_bounds(batch.cu_seqlens, count)
    found = torch.stack(pointer_shares(*inputs, reach, bits))
    exact = exact_shares(q.double(), k.double(), sink.double(), batch, reach, mask)
    assert relative_error(found, exact) < (1e-2 if GPU else 1e-6)
    without = torch.stack(pointer_shares(*inputs, reach))
    impossible = mask[batch.tokens.long(), batch.targets]
    assert (found[0, impossible] == 0).all()
    assert ids > 1 or (found[1] == 1).all()
    assert (found[1] >= without[1] - 1e-6).all() and (found[1] > without[1] + 0.01).any()


@by_kernels
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "canonical mask"])
@pytest.mark.parametrize(
    ("documents", "ids", "reach", "dim"),
    cases(
        [("several", 3, 65, 16), ("of a token", 2, 1000, 32), ("whole tiles", 30, 1000, 16)],
        [([2048, 1, 900, 1147] * 4, 50, 2048, POINTER_DIM)],
    ),
)
def test_shares_with_extra_keys(monkeypatch, kernels, masked, documents, ids, reach, dim):
    """And the gradients of their scores. Every third is missing, and in every fifth row all are;
    there the shares are those without."""
    monkeypatch.setattr(train_gpt, "has_kernels", lambda device: kernels)
    lengths = LENGTHS[documents] if isinstance(documents, str) else documents
    batch = on_device(random_batch(1, lengths, num_ids=ids))
    batch = batch._replace(tokens=batch.tokens % START_TOKEN, targets=batch.targets % START_TOKEN)
    mask, bits = random_mask(64, 0) if masked else (None, None)
    count, dtype = len(batch.tokens), torch.bfloat16 if GPU else torch.float32
    q, k = (2 * rms_norm(torch.randn(count, 2, dim, device=DEVICE))).to(dtype).unbind(1)
    sink, scores = torch.randn(dim, device=DEVICE), 2 * torch.randn(count, 6, device=DEVICE)
    leaves = [x.requires_grad_() for x in (q, k, sink, scores)]
    stand_for = torch.randint(0, ids, (count, 6), device=DEVICE)
    missing = torch.rand(count, 6, device=DEVICE) < 1 / 3
    missing[::5] = True

    def extra_keys(scores: Tensor) -> ExtraKeys:
        return ExtraKeys(scores.masked_fill(missing, -math.inf), stand_for)

    bounds = document_bounds(batch.cu_seqlens, count)
    inputs = q, k, sink, batch.tokens, batch.targets, *bounds, reach, bits
    found = torch.stack(pointer_shares(*inputs, extra_keys(scores)))
    without = torch.stack(pointer_shares(*inputs))
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact = exact_shares(*doubles[:3], batch, reach, mask, extra_keys(doubles[3]))
    assert relative_error(found, exact) < (2e-2 if GPU else 1e-6)
    torch.testing.assert_close(found[:, ::5], without[:, ::5], rtol=1e-5, atol=1e-6)
    assert (found[1] <= without[1] + 1e-6).all() and (found[1] < without[1] - 0.01).any()
    if masked:  # in validation, without gradients
        return
    grads = torch.randn(2, count, device=DEVICE)
    values = torch.autograd.grad(found, leaves, grads)
    expected = torch.autograd.grad(exact, doubles, grads.double())
    for value, reference in zip(values, expected, strict=True):
        assert value.isfinite().all()
        assert relative_error(value, reference) < (2e-2 if GPU else 1e-5)
    assert (values[3][missing] == 0).all()


@interpreted
def test_shares_of_what_can_follow_have_no_gradient(monkeypatch):
    """By kernels, whose backward pass does not know the mask."""
    monkeypatch.setattr(train_gpt, "has_kernels", lambda device: True)
    batch = random_batch(1, [30], num_ids=3)
    inputs = [torch.randn(30, 16).requires_grad_() for _ in range(2)]
    inputs += [torch.randn(16).requires_grad_(), batch.tokens % 64, batch.targets % 64]
    inputs += [*document_bounds(batch.cu_seqlens, 30), 30]
    _, bits = random_mask(64, 0)
    assert not any(x.requires_grad for x in train_gpt.Pointer.apply(*inputs, bits))
    assert all(x.requires_grad for x in train_gpt.Pointer.apply(*inputs, None))


# The mixture -------------------------------------------------------------------------------------


@interpreted
@by_kernels
def test_a_pointer_to_the_sink_alone_leaves_the_other_entries(monkeypatch, kernels):
    """The loss and its gradients are those of the vocabulary without the copy entry."""
    fp32_for_fp8(monkeypatch)
    monkeypatch.setattr(train_gpt, "has_kernels", lambda device: kernels)
    x, head, targets, weights, _ = head_inputs(30, 80, 16, 1.0)
    targets[:, 1:3] = IGNORED_TARGET  # the other terms have the copy entry among the others
    leaves = x.requires_grad_(), head.requires_grad_()
    fp8 = HeadFp8(in_fp8(head.detach(), scale_of(0.5)), scale_of(2), scale_of(0.25))
    sink_alone = PointerShares(torch.zeros(30), torch.ones(30))
    losses = head_loss(*leaves, targets, weights, fp8 if kernels else None, None, sink_alone)
    logits = softcap(x @ head[:-1].T)
    plain = F.cross_entropy(logits, targets[:, 0], ignore_index=IGNORED_TARGET, reduction="sum")
    assert [loss.item() for loss in losses] == pytest.approx([plain.item()] * 2, rel=1e-6)
    grads = (torch.autograd.grad(loss, leaves) for loss in (losses[0], plain))
    for value, expected in zip(*grads, strict=True):
        assert relative_error(value, expected) < 1e-5


@pytest.mark.parametrize("few", [False, True], ids=["many tokens", "few tokens"])
def test_losses_where_copying_is_all_but_certain(few):
    """Finite, also where 1 - copy is less than fp32 tells from 0, and as in fp64; with gradients.
    Few: all other tokens but two are left out."""
    logits = 3 * torch.randn(12, 80, dtype=torch.float64)
    logits[:, -1] = torch.linspace(20, 100, 12)  # of 23 when it is capped
    logits[::2, :-1] -= 60
    targets = F.pad(torch.randint(0, 79, (12, 1)), (0, 1), value=79)
    targets[3, 0] = IGNORED_TARGET
    attention = torch.rand(3, 12, dtype=torch.float64).softmax(0)
    attention[:, ::3] = torch.tensor([0.0, 1.0, 0.0])[:, None]  # to the sink
    attention[:, 1::3] = torch.tensor([0.0, 0.0, 1.0])[:, None]  # to other tokens
    left_out = None
    if few:
        left_out = torch.ones(12, 80, dtype=torch.bool)
        left_out[:, [5, -1]] = False
        left_out.scatter_(1, targets.clamp_min(0), False)

    def losses(logits: Tensor, to_target: Tensor, to_sink: Tensor) -> Tensor:
        shares = PointerShares(to_target, to_sink)
        return train_gpt.token_losses(logits, targets, None, shares, left_out)[:, 0]

    exact = [x.clone().requires_grad_() for x in (logits, *attention[:2])]
    capped = softcap(exact[0])
    if few:
        capped = capped.masked_fill(left_out, -math.inf)
    copy, rest = capped.softmax(1)[:, -1], capped[:, :-1].softmax(1)
    of_target = rest.gather(1, targets[:, :1].clamp_min(0))[:, 0]
    mixture = of_target * (1 - copy * (1 - exact[2])) + copy * exact[1]
    expected = -mixture.log() * (targets[:, 0] >= 0)
    assert ((1 - copy).float() < 1e-7).any() and expected.max() > 15
    single = [x.detach().float().requires_grad_() for x in exact]
    found = losses(*single)
    assert found.isfinite().all() and found[3] == 0
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    grads = (torch.autograd.grad(x.sum(), own) for x, own in ((found, single), (expected, exact)))
    for value, reference in zip(*grads, strict=True):
        assert relative_error(value, reference) < 1e-4


LOOKUPS = {"match_orders": (1, 2), "match_slots": 2**12}


@pytest.mark.parametrize("lookups", [{}, LOOKUPS], ids=["document", "lookups"])
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "canonical mask"])
def test_the_mixture_of_all_tokens_sums_to_one(runtime, masked, lookups):
    """By the loss of each of them, and as GPT.probabilities has them. With the mask they are those
    that can follow."""
    config = tiny_config(vocab_size=127, canonical_mask=masked, **lookups)
    model, batch = trained_like(config, runtime), random_batch(1, [9, 14], num_ids=20)
    batch = batch._replace(tokens=batch.tokens % 127, targets=batch.targets % 127)
    for seed in range(3) if lookups else ():
        known = random_batch(seed, [9, 14], num_ids=20)
        known = known._replace(tokens=known.tokens % 127, targets=known.targets % 127)
        model.matches.insert(train_gpt.gather_sequences([known], runtime))
    zero = torch.zeros(128, 128, dtype=torch.bool)
    zero[:, 127] = True
    if masked:
        mask, bits = random_mask(128, 1)
        zero |= mask.cpu()
        model.impossible.copy_(bits)
    for position in (0, 5, 9, 22):
        own = slice(position, position + 1)
        p = model.probabilities(batch, WINDOWS, own)[0].detach()
        assert not lookups or model.with_matches(batch).matched[position].any()
        assert p.sum().item() == pytest.approx(1, abs=1e-5)
        assert torch.equal(p == 0, zero[batch.tokens[position]])
        for token in range(127):
            targets = torch.full_like(batch.targets, IGNORED_TARGET)
            targets[position] = token
            loss = model.validation_loss(batch._replace(targets=targets), WINDOWS)
            assert -loss.item() == pytest.approx(p[token].log().item(), abs=1e-4)


def test_a_vocabulary_has_an_unused_entry():
    sizes = {size: tiny_config(vocab_size=size).padded_vocab_size for size in (127, 128, 50_257)}
    assert sizes == {127: 128, 128: 256, 50_257: 50_304}


# What a position sees ----------------------------------------------------------------------------


@interpreted
@by_kernels
def test_a_position_sees_earlier_tokens_of_its_document_alone(runtime, monkeypatch, kernels):
    """Another token with its stream changes the shares of later positions of its document; what
    follows is 66 tokens, more than a tile."""
    monkeypatch.setattr(train_gpt, "has_kernels", lambda device: kernels)
    model = trained_like(tiny_config(), runtime)
    batch = random_batch(1, [20, 70, 12], num_ids=2)
    x = rms_norm(torch.randn(102, 32))
    before = torch.stack(model.point(x, batch)).detach()
    for position, last in ((3, 20), (23, 90), (89, 90), (90, 102)):
        tokens, other = batch.tokens.clone(), x.clone()
        tokens[position], other[position] = 7, torch.randn(32)
        after = torch.stack(model.point(other, batch._replace(tokens=tokens))).detach()
        changed = (before != after).any(0).nonzero().flatten().tolist()
        at_start = position in (0, 20, 90)  # whose query has no key
        expected = [*range(position + at_start, last)]
        assert changed == expected


def test_later_tokens_change_no_earlier_loss(runtime):
    model = trained_like(tiny_config(), runtime)
    batch = random_batch(1, [40, 24], num_ids=3)

    def losses(batch: Batch) -> list[float]:
        values = []
        for position in range(0, 30, 3):
            targets = torch.full_like(batch.targets, IGNORED_TARGET)
            targets[position] = 1
            batch = batch._replace(targets=targets)
            values.append(model.validation_loss(batch, WINDOWS).item())
        return values

    before = losses(batch)
    for position in (4, 16, 25):
        tokens = batch.tokens.clone()
        tokens[position:] = (tokens[position:] + 1) % 3
        after = losses(batch._replace(tokens=tokens))
        same = [a == b for a, b in zip(before, after)]
        assert same == [t < position for t in range(0, 30, 3)]


# Training ----------------------------------------------------------------------------------------


def repeating(seed: int, num_tokens: int) -> np.ndarray:
    """Documents of 48 tokens, all of which are one of four that the document has."""
    random, documents = np.random.default_rng(seed), []
    for _ in range(num_tokens // 49 + 1):
        documents.append([START_TOKEN, *random.choice(random.integers(0, 5000, 4), 48)])
    return np.concatenate(documents)[:num_tokens]


REPEATS = {
    "vocab_size": START_TOKEN + 1,
    "num_steps": 40,
    "stages": "1:512:49:48:48:1:0:512",
    "extension_steps": 2,
    "extension": "1:512:49:48:48:1:0:0",
    "final_window_long": 48,
    "val_every": 0,
    "adam_lr": 0.035,
}


def trained(folder) -> float:
    """The last validation loss."""
    folder.mkdir()
    write_shard(folder / "train_0.bin", repeating(1, 60_000))
    write_shard(folder / "train_1.bin", repeating(2, 1000))
    write_shard(folder / "val.bin", repeating(3, 1001))
    result = fork(folder, **REPEATS)
    assert result.returncode == 0, result.stderr
    return validation_losses(folder)[-1]


def test_documents_that_repeat_themselves_are_copied(tmp_path):
    """Without its document a token is any of 5,000."""
    assert trained(tmp_path / "run") < math.log(5000) - 2


# Self-check --------------------------------------------------------------------------------------


PLANTED = {
    "later keys": ("pointer", "return (key < query) &", "return (key <= query) &"),
    "the sink left out": ("pointer", "(TILE,), 1.0, tl.float32)", "(TILE,), 0.0, tl.float32)"),
    "the gradient's mean": ("pointer", "d_target, 0.0) - mean)", "d_target, 0.0) - 0 * mean)"),
    "a query left out": ("pointer", "in range(begin, tl.min", "in range(begin + 8, tl.min"),
    "impossible keys": ("pointer", "visible &= (bits & 1) == 0", "visible &= (bits & 2) == 0"),
    "the gradient by extra keys": ("pointer", "d_sink * sink_share - d_lse", "d_sink * sink_share"),
    "the sum over keys": ("pointer", "sink_share, lse / LOG2_E.value", "sink_share, lse"),
    "extra keys left out": ("pointer", "* target_share + on_target", "* target_share"),
    "the sink among extra keys": ("pointer", "of_document * sink_share", "sink_share"),
    "the copy entry": ("head and loss", "copy * to_target + p * odds", "0 * to_target + p * odds"),
    "the gradient of shares": ("head and loss", "-by_mixture * copy", "by_mixture * copy"),
}  # fmt: skip


@pytest.mark.parametrize("fault", [None, *PLANTED])
def test_self_check_names_a_wrong_kernel(tmp_path, monkeypatch, fault):
    small = partial(test_self_check.small_config, canonical_mask=True, **LOOKUPS)
    monkeypatch.setattr(test_self_check, "small_config", small)
    names, text = ["pointer", "head and loss"], test_self_check.SOURCE
    if fault is not None:
        name, line, planted = PLANTED[fault]
        names = [name]
        assert line in text
        text = text.replace(line, planted)
    module = test_self_check.load(tmp_path / "planted.py", text, monkeypatch)
    model = test_self_check.make_model(module)
    problems = [problem for name in names for problem in module.self_check(model, name)]
    assert bool(problems) == (fault is not None), problems
    assert all(problem.startswith(names[0]) for problem in problems)
