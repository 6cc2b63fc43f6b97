"""Every kernel against its definition in float64: without a GPU small shapes in fp32, by Triton's
interpreter; on a GPU the shapes of a run, in bf16 and fp8."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import fp32_for_fp8, random_batch, tiny_config, trained_like
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import train_gpt
from train_gpt import (
    E4M3,
    E5M2,
    IGNORED_TARGET,
    DelayedScale,
    Fp8,
    Fp8Copies,
    HeadFp8,
    MlpFp8,
    PointerShares,
    QkvFp8,
    TableRows,
    Windows,
    add_rows_,
    document_starts,
    fp8_empty,
    fp8_matmul,
    mlp_matmul,
    quantize,
    rms_norm,
    rotary_frequencies,
    rotary_tables,
    sort_rows,
    update_ngrams_,
)

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE, TOLERANCE = (torch.bfloat16, 1e-2) if GPU else (torch.float32, 1e-5)
interpreted = pytest.mark.skipif(GPU, reason="small fp32 tiles are the interpreter's")
gpu = pytest.mark.gpu


def cases(small: Iterable[tuple], real: Iterable[tuple]) -> list:
    """Parameters for the interpreter, and for a GPU."""
    small = [pytest.param(*case, marks=interpreted) for case in small]
    return small + [pytest.param(*case, marks=gpu) for case in real]


def reference_of(function: Callable) -> Callable:
    """The operation in plain PyTorch, without fp8."""

    def plain(*args: object) -> object:
        args = [None if isinstance(x, (QkvFp8, MlpFp8, HeadFp8)) else x for x in args]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_gpt, "has_kernels", lambda device: False)
            return function(*args)

    return plain


@pytest.fixture(autouse=True)
def kernels_and_poison(monkeypatch):
    """Kernels run on any device, and memory that they are to fill is NaN, in fp8 too."""
    torch.manual_seed(0)
    monkeypatch.setattr(train_gpt, "has_kernels", lambda device: True)

    def poisoned(make: Callable) -> Callable:
        def function(*args: object, **kwargs: object) -> Tensor:
            memory = make(*args, **kwargs)
            if memory.requires_grad:  # torch.compile's own
                return memory
            if memory.is_floating_point() and memory.element_size() == 1:
                memory.view(torch.uint8).fill_(0x7F)
            return memory.fill_(math.nan) if memory.is_floating_point() else memory

        return function

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def random(*shape: int, dtype: torch.dtype = DTYPE, std: float = 1.0) -> Tensor:
    return (std * torch.randn(shape, device=DEVICE)).to(dtype)


def single(*shape: int) -> Tensor:
    return random(*shape, dtype=torch.float32)


def relative_error(value: Tensor, reference: Tensor) -> float:
    assert value.shape == reference.shape
    assert torch.isfinite(value).all()
    value, reference = value.double(), reference.double()
    return ((value - reference).norm() / reference.norm().clamp_min(1e-30)).item()


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if x.is_floating_point() else x


def outcome(
    function: Callable, inputs: list, grads: list[Tensor], fixed: Iterable[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs that have a gradient in `grads`, and those of all inputs but `fixed`."""
    inputs = [x if i in fixed else tree_map_only(Tensor, leaf, x) for i, x in enumerate(inputs)]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else [outputs]
    outputs = [x for x in outputs if x is not None][: len(grads)]
    leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    return outputs, list(torch.autograd.grad(outputs, leaves, grads))


def agree(
    op: Callable, inputs: list, fixed: Iterable[int] = (), tolerance: float = TOLERANCE
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Compare the outputs of an operation and all gradients with those of its reference in float64.
    Returns the gradients that went in, and those that came out of both; an input of one element
    has a gradient that may cancel, which is left to the caller."""
    doubles = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)
    grads = [random(*x.shape) for x in tree_leaves(reference_of(op)(*doubles)) if x is not None]
    exact = outcome(reference_of(op), doubles, [grad.double() for grad in grads], fixed)
    found = outcome(op, inputs, grads, fixed)
    for value, reference in zip(tree_leaves(found), tree_leaves(exact), strict=True):
        if value.numel() > 1:
            assert relative_error(value, reference) < tolerance
    return grads, found[1], exact[1]


# Around the layers -------------------------------------------------------------------------------


def combine_inputs(tokens: int, dim: int, terms: int, norm: bool) -> list:
    """Every other source is a slice. Coefficients are one after the other a number, one a token,
    which is a column of several, and one a token in the same place of memory."""
    sources = [random(tokens, 2, dim)[:, 0] if i % 2 else random(tokens, dim) for i in range(terms)]
    gates = [single(tokens, 3)[:, 1:2] for _ in range(terms)]
    scalars = [2 + single(1) for _ in range(terms)]
    shared = [(2 + single(1)).expand(tokens) for _ in range(terms)]
    coefficients = [(scalars, gates, shared)[i % 3][i] for i in range(terms)]
    return [sources, coefficients, norm]


COMBINE = [(5, 64, 1, True), (7, 48, 4, True), (3, 32, 6, False), (2, 768, 2, True)]
COMBINE += [(4, 32, 3, True), (1, 40, 5, True), (3, 1024, 4, True)]
REAL_COMBINE = [(16384, 768, 2, True), (49152, 768, 6, True), (16391, 768, 3, False)]
REAL_COMBINE += [(49152, 1024, 4, True)]


@pytest.mark.parametrize(("tokens", "dim", "terms", "norm"), cases(COMBINE, REAL_COMBINE))
def test_combine(tokens, dim, terms, norm):
    inputs = combine_inputs(tokens, dim, terms, norm)
    _, found, exact = agree(train_gpt.combine, inputs)
    for value, reference in zip(found, exact, strict=True):
        if value.numel() == 1:  # of a coefficient for all tokens
            size = math.sqrt(tokens * dim)
            assert abs(value.item() - reference.item()) < 1e-5 * size + 1e-5 * abs(reference.item())


@pytest.mark.parametrize(
    ("tokens", "dim", "terms"),
    cases(
        [(70, 48, 2), (33, 768, 3), (9, 1024, 3)],
        [(16384, 768, 2), (49152, 768, 6), (16391, 768, 3), (49152, 1024, 4)],
    ),
)
def test_norm_of_a_sum_in_fp8(monkeypatch, tokens, dim, terms):
    """Both ways round, in its scale, with the gradients of one that is not in fp8; in the
    interpreter to fp32, as its casts to fp8 are not torch's."""
    if not GPU:
        fp32_for_fp8(monkeypatch)
    sources, *_ = inputs = combine_inputs(tokens, dim, terms, True)
    scale, grads = scale_of(28 / 448), [random(tokens, dim) for _ in range(2)]
    copy, results = fp8_empty(sources[0].shape, scale), []
    for room in (copy, None):
        results.append(outcome(train_gpt.combine, [*inputs, room], grads, (3,)))
    (stream, normed), (expected, plain) = (outputs for outputs, _ in results)
    assert torch.equal(stream, expected)
    assert normed.shape == plain.shape and normed.dtype == plain.dtype
    assert normed.isnan().all(), "who reads it would not notice"
    values = quantized(plain.detach(), scale) if GPU else plain.detach()
    # in fp8 3 % round otherwise, by a step of a tenth, as the plain norm has been rounded to bf16
    assert relative_error(copy.rows.float() * scale[0], values) < (3e-2 if GPU else 1e-6)
    assert torch.equal(copy.columns.mT.float(), copy.rows.float())
    assert copy.columns.is_contiguous()
    for value, reference in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(value, reference)


@pytest.mark.parametrize(("tokens", "dim"), cases([(5, 48)], [(16384, 768)]))
def test_gradients_add_up_along_a_chain_of_sums(tokens, dim):
    """Of two sources that several sums read, one a slice, one is not in every sum; the last sum of
    each passes it on to none."""

    def function(combine: Callable, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        stream, _, x, y = combine([x, y], [a, b], True)
        _, normed, stream, x, y = combine([stream, x, y], [b, a, a], True)
        other, _, _, y = combine([normed, y], [a, b])
        return combine([other, x, stream], [a, b, b], True)[1]

    inputs = [random(tokens, dim), random(tokens, 2, dim)[:, 1]]
    inputs += [2 + single(1), single(tokens, 1)]
    doubles, grad = [x.double() for x in inputs], random(tokens, dim)
    exact = outcome(
        partial(function, reference_of(train_gpt.combine)), doubles, [grad.double()], ()
    )
    found = outcome(partial(function, train_gpt.combine), inputs, [grad], ())
    for value, reference in zip(tree_leaves(found), tree_leaves(exact), strict=True):
        assert value.numel() == 1 or relative_error(value, reference) < 2 * TOLERANCE


def prepare_inputs(case: tuple) -> list:
    """With rotary tables longer than the sequences, and a slice as value. One sequence, or `rows`:
    three."""
    tokens, heads, head_dim, present = case
    dim = heads * head_dim
    value = random(tokens, 3, dim)[:, 1] if "value" in present else None
    inputs = [random(tokens, dim), random(3 * dim, dim, std=dim**-0.5)]
    inputs += [*rotary_tables(rotary_frequencies(head_dim), tokens + 3, DEVICE), value, None]
    length = tokens // (3 if "rows" in present else 1)
    return [*inputs, length if "offset" in present else 0, head_dim]


# tokens, heads, head_dim, what is there
PREPARE = [(37, 4, 16, ""), (33, 4, 16, "offset"), (21, 6, 32, "value")]
PREPARE += [(32, 6, 16, "value offset"), (1, 2, 8, "value offset")]
PREPARE += [(147, 2, 8, "offset rows")]  # more than a program takes
PREPARE += [(3, 8, 128, "value offset")]  # as wide as the medium preset
REAL_PREPARE = [(16384, 6, 128, ""), (32768, 6, 128, "value")]
REAL_PREPARE += [(49152, 6, 128, "offset rows"), (49152, 8, 128, "value offset")]
REAL_PREPARE += [(16391, 6, 128, "value offset")]


@interpreted
@pytest.mark.parametrize("case", PREPARE)
def test_prepare_qkv(monkeypatch, case):
    """With fp32 in place of fp8, whose casts in the interpreter are not torch's. Scales cancel."""
    fp32_for_fp8(monkeypatch)
    inputs, largest = prepare_inputs(case), torch.zeros(1)
    (x, w), scales = inputs[:2], [scale_of(value) for value in (0.5, 2.0, 0.25)]
    inputs[5] = QkvFp8(in_fp8(x, scales[0]), in_fp8(w, scales[1]), DelayedScale(scales[2], largest))
    grads, *_ = agree(train_gpt.prepare_qkv, inputs, (2, 3, 5))
    dqkv = exact_qkv_gradient(inputs, grads, x @ w.T)
    assert largest.item() == pytest.approx(dqkv.abs().max().item(), rel=1e-4)


# MLP and head ------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    ("tokens", "hidden", "dim"), [(128, 128, 64), (140, 200, 96), (4, 40, 32), (4, 128, 1024)]
)
def test_mlp(monkeypatch, tokens, hidden, dim):
    """As above; and the largest numbers are recorded."""
    fp32_for_fp8(monkeypatch)
    x, w_1, w_2 = random(tokens, dim), random(hidden, dim, std=0.1), random(hidden, dim, std=0.1)
    scales, largest = [scale_of(2.0**n) for n in (-1, 1, -2, -3, 2, 3)], torch.zeros(3)
    fp8 = MlpFp8(
        *map(in_fp8, (x, w_1, w_2), scales), *map(DelayedScale, scales[3:], largest.split(1))
    )
    ((grad,), *_) = agree(train_gpt.mlp, [x, w_1, w_2, fp8], (3,))
    hidden = (x @ w_1.T).relu()
    seen = hidden.square(), grad, 2 * hidden * (grad @ w_2.T)
    expected = torch.stack([z.abs().max() for z in seen])
    torch.testing.assert_close(largest, expected, rtol=1e-4, atol=0)


def head_inputs(
    tokens: int, vocab: int, dim: int, std: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, PointerShares]:
    """x, head, targets of three terms and the copy entry, which is the last one, their weights, and
    the pointer's shares. Some targets occur twice in a row or not at all; one position points at
    nothing but the sink."""
    targets = torch.randint(0, vocab - 1, (tokens, 3), device=DEVICE)
    targets[::3, 2] = targets[::5, 1] = targets[6::7, 0] = targets[5] = IGNORED_TARGET
    targets[3, 1] = targets[3, 0]
    targets[4, 2] = targets[4, 1] = targets[4, 0]
    targets = F.pad(targets, (0, 1), value=vocab - 1)
    weights = torch.tensor([1, 0.5, 0.25], device=DEVICE)
    x, head = rms_norm(single(tokens, dim)).to(DTYPE), random(vocab, dim, std=std)
    head[-1] *= 2  # so that copying is likely in some rows
    attention = single(3, tokens).softmax(0)
    attention[:, 1] = torch.tensor([0.0, 1.0, 0.0])
    return x, head, targets, weights, PointerShares(*attention[:2])


def random_offsets(vocab: int) -> Tensor:
    """Of either sign, every third zero, and the last one, which is the copy entry's."""
    offsets = single(vocab)
    offsets[::3] = offsets[-1] = 0
    return offsets


def exact_losses(
    logits: Tensor, targets: Tensor, offsets: Tensor | None, shares: Sequence[Tensor]
) -> Tensor:
    """Of every position and term, (T, terms), by the definition of the mixture."""
    capped = 23 * torch.sigmoid((logits + 5) / 7.5)
    estimate = capped.exp() * (1 if offsets is None else offsets.to(capped.dtype).exp())
    p = capped.gather(1, targets.clamp_min(0)).exp() / estimate.sum(1, keepdim=True)
    (first, *others, alpha), (to_target, to_sink) = p.unbind(1), shares
    mixture = first / (1 - alpha) * (1 - alpha * (1 - to_sink)) + alpha * to_target
    return -torch.stack([mixture, *others], 1).log() * (targets[:, :-1] >= 0)


def exact_head_loss(
    x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, offsets: Tensor | None,
    shares: PointerShares,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Both losses, and the gradients of x, head and both shares, in float64."""
    leaves = [z.detach().double().requires_grad_() for z in (x, head, *shares)]
    losses = exact_losses(leaves[0] @ leaves[1].T, targets, offsets, leaves[2:]).sum(0)
    total = losses @ weights.double()
    return torch.stack([total, losses[0]]).detach(), *torch.autograd.grad(total, leaves)


with_and_without_offsets = pytest.mark.parametrize(
    "with_offsets", [False, True], ids=["plain", "offsets"]
)


@interpreted
@pytest.mark.parametrize(
    ("tokens", "vocab", "dim", "std"), [(140, 300, 32, 0.5), (20, 2100, 16, 1.0), (7, 50, 8, 1.0)]
)
@with_and_without_offsets
def test_head_loss(monkeypatch, tokens, vocab, dim, std, with_offsets):
    """By kernels with fp32 in place of fp8, and in plain PyTorch."""
    fp32_for_fp8(monkeypatch)
    x, head, targets, weights, shares = head_inputs(tokens, vocab, dim, std)
    offsets = random_offsets(vocab) if with_offsets else None
    exact = exact_head_loss(x, head, targets, weights, offsets, shares)
    leaves = [z.requires_grad_() for z in (x, head, *shares)]
    fp8 = HeadFp8(in_fp8(head.detach(), scale_of(0.5)), scale_of(2.0), scale_of(0.25))
    for own in (fp8, None):
        losses = train_gpt.head_loss(x, head, targets, weights, own, offsets, shares)
        gradients = torch.autograd.grad(3 * losses[0], leaves)
        assert relative_error(torch.stack(losses), exact[0]) < 1e-6
        for value, reference in zip(gradients, exact[1:], strict=True):
            assert relative_error(value / 3, reference) < TOLERANCE
    if not with_offsets:
        plain = train_gpt.next_token_loss(x, head, targets[:, ::3], shares)
        assert plain.item() == pytest.approx(exact[0][1].item(), rel=1e-6)


@interpreted
@pytest.mark.parametrize("candidates", [0, 96])
def test_model_with_kernels_equals_the_reference(runtime, monkeypatch, candidates):
    """Losses and gradients of one sequence, on the whole vocabulary or on candidates for nine, nine
    and two tokens, and the tables' rows added by kernel; with fp32 in place of fp8."""
    config, results = tiny_config(vocab_size=300, tokens_per_sampling=9), {}
    batch = random_batch(1, [7, 1, 12], num_ids=9)
    batch = batch._replace(tokens=batch.tokens % 300, targets=batch.targets % 300)
    for kind in ("kernels", "references"):
        model = trained_like(config, runtime)
        if kind == "kernels":
            fp32_for_fp8(monkeypatch)
            banks = model.mlp_bank, model.attention_bank, model.head
            model.fp8 = Fp8Copies(*banks, len(config.layers))
        else:
            monkeypatch.undo()
        weights = torch.tensor([1, 0.5])
        loss, plain = model.training_loss(batch, Windows(8, 24), weights, candidates)
        loss.backward()
        results[kind] = {name: param.grad for name, param in model.named_parameters()}
        results[kind] |= {"loss": loss, "plain": plain}
    for name, reference in results["references"].items():
        assert relative_error(results["kernels"][name], reference) < 1e-3, name


# fp8 ---------------------------------------------------------------------------------------------


def quantized(x: Tensor, scale: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """What an fp8 tensor of x stands for, fp32."""
    limit, scale = torch.finfo(dtype).max, scale[..., :1, None] if x.dim() == 3 else scale[0]
    return (x.float() / scale).clamp(-limit, limit).to(dtype).float() * scale


def scale_of(value: float) -> Tensor:
    return torch.full((4,), value, device=DEVICE)


def in_fp8(x: Tensor, scale: Tensor) -> Fp8:
    return quantize(x, fp8_empty(x.shape, scale))


@pytest.mark.parametrize(
    "shape",
    cases(zip([(64, 128), (70, 150), (3, 33, 140), (1, 1)]), zip([(16384, 768), (16, 4224, 768)])),
)
@pytest.mark.parametrize("dtype", [E4M3, E5M2] if GPU else [torch.float32])
def test_quantize(monkeypatch, shape, dtype):
    """Both ways round, saturated, every matrix with its own scale; in the interpreter to fp32, as
    its casts to fp8 are not torch's."""
    monkeypatch.setattr(train_gpt, "E4M3", dtype)
    x, scales = random(*shape, std=100.0), torch.rand((*shape[:-2], 4), device=DEVICE) + 0.5
    x.view(-1)[0], largest = 3e4, torch.zeros(1, device=DEVICE)
    out, out_t, _ = copy = quantize(x, fp8_empty(x.shape, scales), largest)
    scale = scales[..., :1, None] if len(shape) == 3 else scales[0]
    values = x.float() / scale
    if dtype != torch.float32:
        values = values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).float()
    assert relative_error(out.float(), values) < (1e-3 if GPU else 1e-6)  # ties may differ
    assert torch.equal(out.mT.float(), out_t.float()) and out_t.is_contiguous()
    assert largest.item() == x.abs().max()
    quantize(x / 2, copy, largest)
    assert largest.item() == x.abs().max()  # it is raised only
    if len(shape) == 3:  # of larger matrices the first rows
        rows = shape[1] // 3
        first, first_t, _ = in_fp8(x[:, :rows], scales)
        assert torch.equal(first, in_fp8(x, scales).rows[:, :rows])
        assert torch.equal(first.mT.float(), first_t.float())


@interpreted
def test_scales_follow_the_largest_values(monkeypatch):
    """Of weights now, of squares and gradients in the step before; guesses before the first one."""
    monkeypatch.setattr(train_gpt, "quantize", lambda *call: calls.append(call))
    bank, attention, head, calls = random(8, 16, 8), random(8, 32, 8), random(32, 8), []
    fp8 = Fp8Copies(bank, attention, head, 3)
    assert [x.shape for x, _ in calls] == [(6, 16, 8), (3, 24, 8)]
    (x, w), (y, w_qkv) = calls
    for copied, source in (x, bank), (y, attention):
        assert copied.data_ptr() == source.data_ptr()
    torch.testing.assert_close(w.scale[:, 0], bank[:6].abs().amax((1, 2)) / 448)
    torch.testing.assert_close(w_qkv.scale[:, 0], attention[:3, :24].abs().amax((1, 2)) / 448)
    start = fp8.scales.clone()
    assert (start > 0).all()
    own, qkv = fp8.mlp(1, x), fp8.qkv(2, x)
    assert own.x is qkv.x is x
    for copy, bank_copy, entry in (own.w_1, w, 1), (own.w_2, w, 4), (qkv.w, w_qkv, 2):
        for tensor, of_all in zip(copy, bank_copy, strict=True):
            assert tensor.data_ptr() == of_all[entry].data_ptr()
            assert tensor.shape == of_all.shape[1:]
    assert qkv.grad.scale is not own.grad.scale
    qkv.grad.largest.fill_(0.5)
    for delayed, largest in zip((own.square, own.grad, own.grad_hidden), (3.0, 0.25, 0.125)):
        delayed.largest.fill_(largest)
    bank *= 2
    fp8.refresh()
    torch.testing.assert_close(w.scale[:, 0], bank[:6].abs().amax((1, 2)) / 448)
    factor = 1.8 / 448
    torch.testing.assert_close(fp8.scales[1, :3, 0], factor * torch.tensor([3.0, 0.25, 0.125]))
    torch.testing.assert_close(fp8.scales[2, 3], factor * torch.full((4,), 0.5))
    assert torch.equal(fp8.scales[0], start[0])  # nothing was seen
    scales = fp8.scales.clone()
    fp8.refresh()
    assert torch.equal(fp8.scales, scales)  # nothing since
    fp8.reset()
    assert torch.equal(fp8.scales, start)


def exact_qkv_gradient(inputs: list, grads: list[Tensor], qkv: Tensor) -> Tensor:
    """Of the matmul's result, given as it is, in float64."""
    doubles = [qkv, torch.eye(qkv.size(1), device=DEVICE), *inputs[2:5], None, *inputs[6:]]
    doubles, grads = tree_map_only(Tensor, Tensor.double, (doubles, grads))
    return outcome(reference_of(train_gpt.prepare_qkv), doubles, grads, (1, 2, 3))[1][0]


@gpu
@pytest.mark.parametrize("case", REAL_PREPARE[:4])
def test_prepare_qkv_in_fp8(monkeypatch, case):
    """Every matmul against that of its exact factors and that of its fp8 factors; the gradient of
    QKV's result both ways round."""
    inputs = prepare_inputs(case)
    inputs[0], inputs[1] = rms_norm(inputs[0]), random(*inputs[1].shape, std=0.02)
    x, w = inputs[:2]
    scale_x, scale_w = scale_of(28 / 448), scale_of(w.abs().max().item() / 448)
    scale_grad, largest = scale_of(1 / 448), torch.zeros(1, device=DEVICE)
    fp8 = QkvFp8(in_fp8(x, scale_x), in_fp8(w, scale_w), DelayedScale(scale_grad, largest))
    x8, w8 = quantized(x, scale_x), quantized(w, scale_w)
    inputs[5] = fp8
    qkv, factors = fp8_matmul(fp8.x, fp8.w), []
    monkeypatch.setattr(train_gpt, "fp8_matmul", lambda a, b: factors.append(a) or fp8_matmul(a, b))
    grads = [random(*x.shape, std=1e-3) for x in reference_of(train_gpt.prepare_qkv)(*inputs)]
    assert relative_error(qkv, x8 @ w8.T) < 1e-2
    assert relative_error(qkv, x.float() @ w.float().T) < 6e-2
    _, found = outcome(train_gpt.prepare_qkv, inputs, grads, (2, 3, 5))
    dqkv = exact_qkv_gradient(inputs, grads, qkv).float()
    assert largest.item() == pytest.approx(dqkv.abs().max().item(), rel=1e-2)
    rounded, (_, found8, _) = quantized(dqkv, scale_grad), factors
    assert relative_error(found8.rows.float() * scale_grad[0], rounded) < 1e-2
    assert torch.equal(found8.columns.mT.float(), found8.rows.float())
    for value, one, other in (
        (found[0], dqkv @ w.float(), rounded @ w8),
        (found[1], dqkv.T @ x.float(), rounded.T @ x8),
    ):
        assert relative_error(value, one) < 6e-2
        assert relative_error(value, other) < 2e-2  # some round otherwise


@gpu
@pytest.mark.parametrize("tokens", [16384, 49152, 16336])
def test_mlp_in_fp8(tokens):
    """Every matmul against that of its exact factors and that of its fp8 factors."""
    x, grad = rms_norm(random(tokens, 768)), random(tokens, 768, std=1e-3)
    w_1, w_2 = random(4224, 768, std=0.02), random(4224, 768, std=0.02)
    scales = [scale_of(28 / 448)] + [scale_of(w.abs().max().item() / 448) for w in (w_1, w_2)]
    scales += [scale_of(value / 448) for value in (20.0, 1e-2, 2e-2)]
    largest = torch.zeros(3, device=DEVICE)
    fp8 = MlpFp8(
        *map(in_fp8, (x, w_1, w_2), scales), *map(DelayedScale, scales[3:], largest.split(1))
    )
    x8, w_18, w_28 = map(quantized, (x, w_1, w_2), scales)
    grad8 = quantized(grad, scales[4])
    leaves = [z.requires_grad_() for z in (x, w_1, w_2)]
    out = train_gpt.mlp(*leaves, fp8)
    found = torch.autograd.grad(out, leaves, grad)
    x, w_1, w_2 = (z.detach().float() for z in leaves)

    square = mlp_matmul(fp8.x, fp8.w_1, DelayedScale(scales[3], torch.zeros_like(largest[:1])))
    own = square.rows.float() * scales[3][0]  # what the op multiplied with, in place of ours
    assert torch.equal(square.rows.mT.float(), square.columns.float())
    hidden = (x8 @ w_18.T).relu()
    assert largest[0].item() == pytest.approx(hidden.square().max().item(), rel=1e-2)
    assert relative_error(own, quantized(hidden.square(), scales[3])) < 2e-2  # some round otherwise
    assert relative_error(own.sqrt(), (x @ w_1.T).relu()) < 6e-2
    assert relative_error(out, own @ w_28) < 1e-2
    assert relative_error(out, own @ w_2) < 6e-2

    other = torch.zeros_like(largest[:1])
    hidden8, hidden8_t, _ = mlp_matmul(
        in_fp8(grad, scales[4]), fp8.w_2, DelayedScale(scales[5], other), square
    )
    assert torch.equal(hidden8.mT.float(), hidden8_t.float())
    d_hidden = grad8 @ w_28.T * 2 * own.sqrt()
    own_hidden = hidden8.float() * scales[5][0]
    assert largest[1] == grad.abs().max()
    assert largest[2].item() == pytest.approx(d_hidden.abs().max().item(), rel=1e-2)
    assert relative_error(own_hidden, quantized(d_hidden, scales[5])) < 2e-2
    assert relative_error(own_hidden, grad.float() @ w_2.T * 2 * own.sqrt()) < 6e-2
    exact = own_hidden @ w_1, own_hidden.T @ x, own.T @ grad.float()
    rounded = own_hidden @ w_18, own_hidden.T @ x8, own.T @ grad8
    for value, one, other in zip(found, exact, rounded, strict=True):
        assert relative_error(value, one) < 6e-2
        assert relative_error(value, other) < 1e-2


@gpu
@pytest.mark.parametrize("tokens", [5008, 8192])
@with_and_without_offsets
def test_head_loss_in_fp8(tokens, with_offsets):
    x, head, targets, weights, shares = head_inputs(tokens, 50304, 768, 0.05)
    scale_w, scale_x, scale_grad = (scale_of(value / 448) for value in (1.6, 100.0, 0.75))
    fp8 = HeadFp8(in_fp8(head, scale_w), scale_x, scale_grad)
    leaves = [z.requires_grad_() for z in (x, head, *shares)]
    offsets = random_offsets(50304) if with_offsets else None
    losses = train_gpt.head_loss(x, head, targets, weights, fp8, offsets, shares)
    d_x, d_head, *d_shares = torch.autograd.grad(losses[0], leaves)
    exact = exact_head_loss(x, head, targets, weights, offsets, shares)
    assert relative_error(torch.stack(losses), exact[0]) < 1e-2
    for value, reference in zip((d_x, d_head), exact[1:3], strict=True):
        assert relative_error(value, reference) < 7e-2  # two products, one of them with e5m2

    x8, head8 = quantized(x.detach(), scale_x), quantized(head.detach(), scale_w)
    logits = (x8 @ head8.T).bfloat16().float().requires_grad_()
    loss = exact_losses(logits, targets, offsets, shares).sum(0) @ weights
    grad, *expected = torch.autograd.grad(loss, (logits, *shares))
    grad8 = quantized(grad, scale_grad, E5M2)
    assert relative_error(losses[0], loss.detach()) < 1e-3
    expected = grad8 @ head8, grad8.T @ x8, *expected
    for value, reference in zip((d_x, d_head, *d_shares), expected, strict=True):
        assert relative_error(value, reference) < 2e-2  # some round otherwise


# Tables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "rows", "dim"),
    cases(
        [(50, 7, 32), (64, 64, 40), (1, 3, 16), (40, 1, 200), (5, 90, 130), (70, 2, 1024)],
        [(16384, 50304, 768), (49152, 200, 768), (16391, 377280, 768), (49152, 50304, 1024)],
    ),
)
def test_rows_are_added_in_place(monkeypatch, count, rows, dim):
    """By the kernel and without it, of slices too, to two tables at once; runs of equal rows are
    found."""
    index = torch.randint(0, rows, (count,), device=DEVICE, dtype=torch.int32)
    index[count // 2 :] = index[0]
    values, table = random(count, 2, dim)[:, 1], random(rows, dim)
    order = sort_rows(index)
    kinds, numbers = index.unique(return_counts=True)
    num_runs = order.num_runs.item()
    assert num_runs == len(kinds)
    assert torch.equal(order.rows, index[order.order])
    assert torch.equal(order.run_start[: num_runs + 1].diff(), numbers)
    assert (order.run_start[num_runs:] == count).all()
    assert torch.equal(kinds[order.run_of], order.rows)
    expected = table.double().index_add(0, index, values.double())
    for kernel in (True, False):
        mine, other = table.clone(), -table
        monkeypatch.setattr(train_gpt, "has_kernels", lambda device, kernel=kernel: kernel)
        add_rows_([mine, other], order, [values, -values.contiguous()])
        if kernel or not GPU:  # without it a GPU adds in any order, and rounds each time
            assert torch.equal(other, -mine)
            assert relative_error(mine, expected) < TOLERANCE
        untouched = torch.ones(rows, dtype=torch.bool, device=DEVICE)
        untouched[index] = False
        assert torch.equal(mine[untouched], table[untouched])


@pytest.mark.parametrize("lengths", [(31, 32, 33), (1, 64, 2, 63), (95, 97, 1), (5, 32, 32, 11)])
def test_runs_of_every_length_are_added_once(monkeypatch, lengths):
    """Those that one program adds and those that several share, wherever they begin."""
    monkeypatch.setattr(train_gpt, "has_kernels", lambda device: True)
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(DEVICE)
    values, table = single(len(index), 150), single(len(lengths), 150)
    expected = table.double().index_add(0, index, values.double())
    add_rows_([table], sort_rows(index), [values])
    assert relative_error(table, expected) < 1e-6


def test_rows_of_a_table_have_the_gradients_of_their_definition():
    """Added to what the table's gradient contains."""
    table, index = single(20, 16), torch.tensor([3, 7, 3, 19], device=DEVICE)
    table.requires_grad_()
    table.grad = torch.full_like(table, 2.0)
    place, weights = table.grad.data_ptr(), single(4, 16)
    (read,) = TableRows.apply(index, sort_rows(index), table)
    assert torch.equal(read, table.detach()[index])
    (read.square() * weights).sum().backward()
    other = table.detach().double().requires_grad_()
    (other[index].square() * weights).sum().backward()
    assert relative_error(table.grad - 2, other.grad) < 1e-6
    assert table.grad.data_ptr() == place


# Hashed n-grams ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "num_rows", "dim"),
    cases(
        [(1, 3, 8), (40, 9, 8), (64, 64, 40), (33, 1, 16), (17, 500, 24), (11, 2, 1024)],
        [(786_432, 2**23, 128), (262_144, 2**20, 768), (30_000, 200, 136), (98_304, 2**20, 1024)],
    ),
)
def test_ngrams_are_updated_in_place(monkeypatch, count, num_rows, dim):
    """By the kernel and without it, twice; by the kernel to the same bits on every rank. Half of
    the gradients are of one row; those without any stay as they are."""
    index = torch.randint(0, num_rows, (count,), device=DEVICE, dtype=torch.int32)
    index[count // 2 :] = index[0]
    order, grads = sort_rows(index), [random(count, dim) for _ in range(2)]
    start, sums = random(num_rows, dim), single(num_rows).square()
    touched, run = index.unique(return_inverse=True)
    expected, squares, rest = start[touched].double(), sums[touched].double(), sums.clone()
    for grad in grads:
        total = torch.zeros_like(expected).index_add(0, run, grad.double())
        squares += total.square().mean(1)
        expected -= 0.1 * total / (squares.sqrt() + 1e-3)[:, None]
    results = []
    for kernel in (True, True, False):
        monkeypatch.setattr(train_gpt, "has_kernels", lambda device, kernel=kernel: kernel)
        table, sum_squares = start.clone(), sums.clone()
        for grad in grads:
            update_ngrams_(table, sum_squares, order, grad, 0.1, 1e-3)
        results.append((table[touched], sum_squares[touched]))
        assert relative_error(table[touched], expected) < TOLERANCE
        assert relative_error(sum_squares[touched], squares) < 1e-4
        table[touched], rest[touched] = start[touched], sum_squares[touched]
        assert torch.equal(table, start) and torch.equal(sum_squares, rest)
    assert all(map(torch.equal, *results[:2]))


@pytest.mark.parametrize("kernel", [True, False])
def test_first_step_of_an_ngram_is_the_learning_rate(monkeypatch, kernel):
    """Whatever its gradient; none moves nothing."""
    monkeypatch.setattr(train_gpt, "has_kernels", lambda device: kernel)
    table, sum_squares = (torch.zeros(size, device=DEVICE) for size in ((4, 16), 4))
    scales = torch.tensor([1e-6, 1.0, 1e4, 0.0], device=DEVICE)
    order = sort_rows(torch.arange(4, device=DEVICE, dtype=torch.int32))
    update_ngrams_(table, sum_squares, order, single(4, 16) * scales[:, None], 0.3, 1e-10)
    rms = table.square().mean(1).sqrt().cpu()
    torch.testing.assert_close(rms, torch.tensor([0.3, 0.3, 0.3, 0.0]), rtol=1e-3, atol=0)


# Exact match -------------------------------------------------------------------------------------


def match_row(tokens: int, seed: int = 0) -> list[Tensor]:
    """Tokens, document starts and targets, of 20 ids and the start token; the first documents are
    of one token each."""
    lengths, left = [1], tokens - 1
    while left > 0:
        lengths.append(min(left, [1, 1, 90, 35, 7][len(lengths) % 5]))
        left -= lengths[-1]
    batch = random_batch(seed, lengths, num_ids=20)
    starts = document_starts(batch.cu_seqlens, tokens)
    return [x.to(DEVICE) for x in (batch.tokens, starts, batch.targets)]


@pytest.mark.parametrize("kernel", [True, False])
def test_largest_entry_of_a_place(monkeypatch, kernel):
    """It is written whatever was there; spare places stay 0."""
    monkeypatch.setattr(train_gpt, "has_kernels", lambda device: kernel)
    slots, spare = 500, train_gpt.SPARE_PLACES
    table, entries = (torch.randint(1, 2**61, (n,), device=DEVICE) for n in (slots + spare, 3000))
    table[slots:] = 0
    places = torch.randint(slots // 2, 2 * slots, (len(entries),), device=DEVICE)
    expected = table.tolist()
    largest = {place: 0 for place in places.tolist() if place < slots}
    for place, entry in zip(places.tolist(), entries.tolist()):
        if place < slots:
            largest[place] = max(largest[place], entry)
    for place, entry in largest.items():
        expected[place] = entry
    train_gpt.write_largest_(table, places, entries)
    assert table.tolist() == expected


@gpu
@pytest.mark.parametrize(
    ("lengths", "slots", "orders"),
    [((16384,) * 4, 2**20, (3, 4, 5, 6, 8, 12, 16, 24)), ((16347, 49152), 16, (1,))],
)
def test_lookup_on_the_gpu(monkeypatch, lengths, slots, orders):
    """Tables and what is found in them, as on the CPU, where nothing is compiled and no kernel
    runs, to the bit. Sequences are inserted again, so that counts rise and fall."""
    monkeypatch.setattr(train_gpt, "has_kernels", lambda device: device.type == "cuda")
    rows, tables = [match_row(tokens, seed) for seed, tokens in enumerate(lengths)], {}
    entered = [*rows, *rows[1:], *rows[1:], rows[0]]
    for device in "cpu", "cuda":
        size = len(orders) * slots + train_gpt.SPARE_PLACES
        tables[device] = torch.zeros(size, dtype=torch.int64, device=device)
        for row in entered:
            tokens, starts, targets = (x.to(device) for x in row)
            train_gpt.insert_matches_(tables[device], tokens, starts, targets.int(), orders, slots)
    assert torch.equal(tables["cuda"].cpu(), tables["cpu"])
    counts = set()
    for row in (*rows, match_row(lengths[-1] + 3, len(rows))):
        found = []
        for device, table in tables.items():
            tokens, starts = (x.to(device) for x in row[:2])
            matched = train_gpt.find_matches(tokens, starts, table, orders, slots)
            read = *train_gpt.read_matches(matched, tokens), train_gpt.best_match(matched)
            found.append([x.cpu() for x in (matched, *read)])
        assert all(map(torch.equal, *found))
        first, _ = train_gpt.halves_of(found[0][0][:, -1])
        counts |= set(train_gpt.count_of(first).tolist())
    assert min(counts) == 0 and max(counts) > 2  # of contexts of the last order
