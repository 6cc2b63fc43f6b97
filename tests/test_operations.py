"""Section 4: attention, rotary and the softcap against their definitions in float64."""

import math

import pytest
import torch
from torch import Tensor

from train_gpt import (
    apply_rotary,
    attention,
    attention_backend,
    rms_norm,
    rotary_frequencies,
    rotary_tables,
    softcap,
    stretch_rotary,
)

CPU = torch.device("cpu")


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int, scale: float
) -> Tensor:
    """Document by document, query by query."""
    outputs, start = [], 0
    for length in lengths:
        for t in range(start, start + length):
            keys = slice(max(start, t - window), t + 1)
            scores = torch.einsum("hd,shd->hs", q[t], k[keys]) * scale
            weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
            outputs.append(torch.einsum("hs,shd->hd", weights, v[keys]))
        start += length
    return torch.stack(outputs)


def random_qkv(num_tokens: int, heads: int, head_dim: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = num_tokens, heads, head_dim
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def starts_of(lengths: list[int], padding: int) -> Tensor:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return torch.tensor(ends + [ends[-1]] * padding, dtype=torch.int32)


CASES = [
    # lengths, heads, head_dim, window, entries of T behind the last document
    ([16], 1, 8, 4, 0),
    ([16], 2, 8, 100, 3),
    ([1, 1, 30, 1, 15], 2, 8, 6, 2),
    ([5, 40, 19], 3, 16, 0, 1),
    ([200, 120], 2, 8, 70, 4),  # a document across the 256 queries of a block
    ([300, 1, 255], 1, 8, 256, 0),  # a window as wide as a block
    ([100, 412, 88], 1, 8, 511, 5),
]


@pytest.mark.parametrize(("lengths", "heads", "head_dim", "window", "padding"), CASES)
def test_plain_attention_and_its_gradients(lengths, heads, head_dim, window, padding):
    inputs = random_qkv(sum(lengths), heads, head_dim, seed=len(lengths))
    for tensor in inputs:
        tensor.requires_grad_()
    expected = reference_attention(*inputs, lengths, window, 0.3)
    grad = torch.randn(expected.shape, dtype=torch.float64, generator=torch.manual_seed(1))
    expected_grads = torch.autograd.grad(expected, inputs, grad)

    singles = [tensor.detach().float().requires_grad_() for tensor in inputs]
    cu_seqlens = starts_of(lengths, padding)
    backend = attention_backend(CPU, torch.float32)
    assert backend == "plain"
    value = attention(*singles, cu_seqlens, max(lengths), window, 0.3, backend)
    grads = torch.autograd.grad(value, singles, grad.float())
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    for name, single, double in zip("qkv", grads, expected_grads):
        torch.testing.assert_close(
            single.double(), double, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"d{n}: {m}"
        )


def test_plain_attention_in_bfloat16_keeps_its_dtype_and_sums_in_float32():
    lengths = [90, 38]
    inputs = [tensor.bfloat16() for tensor in random_qkv(128, 2, 16, seed=3)]
    value = attention(*inputs, starts_of(lengths, 1), 90, 50, 0.1, "plain")
    expected = reference_attention(*(tensor.double() for tensor in inputs), lengths, 50, 0.1)
    assert value.dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), expected, rtol=0.02, atol=0.02)


def test_rms_norm():
    x = torch.randn(5, 7, 12, dtype=torch.float64, generator=torch.manual_seed(0))
    eps = 2.0**-23  # fp32's, whatever the dtype
    expected = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(rms_norm(x), expected)


# Rotary ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [8, 32, 128])
def test_rotary_is_complex_multiplication(head_dim):
    """Adjacent pairs of the first half turn by t·f, f from 1 down to 1/1024; the rest stays."""
    num_tokens, heads = 50, 3
    x = random_qkv(num_tokens, heads, head_dim, seed=head_dim)[0]
    turned = apply_rotary(x.float(), *rotary_tables(rotary_frequencies(head_dim), num_tokens, CPU))
    count = head_dim // 4
    frequencies = [1024 ** (-i / (count - 1)) for i in range(count)]
    assert frequencies[0] == 1
    assert frequencies[-1] == pytest.approx(1 / 1024)
    for t in range(num_tokens):
        for i, frequency in enumerate(frequencies):
            pair = torch.complex(x[t, :, 2 * i], x[t, :, 2 * i + 1])
            pair = pair * complex(math.cos(t * frequency), math.sin(t * frequency))
            expected = torch.view_as_real(pair)
            torch.testing.assert_close(
                turned[t, :, 2 * i : 2 * i + 2].double(), expected, rtol=0, atol=1e-5
            )
    assert torch.equal(turned[..., head_dim // 2 :], x.float()[..., head_dim // 2 :])


def test_rotary_products_depend_on_the_distance_alone():
    """The same q and k everywhere: q_t · k_s is a function of t - s, and not a constant."""
    num_tokens, head_dim = 80, 32
    q, k = (
        x[:1].float().expand(num_tokens, 1, head_dim) for x in random_qkv(1, 1, head_dim, 5)[:2]
    )
    tables = rotary_tables(rotary_frequencies(head_dim), num_tokens, CPU)
    products = (apply_rotary(q, *tables) @ apply_rotary(k, *tables).permute(1, 2, 0)).squeeze()
    assert products.shape == (num_tokens, num_tokens)
    for distance in range(-40, 40):
        diagonal = products.diagonal(-distance)
        assert diagonal.max() - diagonal.min() < 1e-4
    assert products.diagonal(0)[0] - products.diagonal(-3)[0] != pytest.approx(0, abs=0.1)


def test_stretched_rotary():
    """From a window of 100 to one of 400: 32 turns or more in 100 tokens stay as fast, one or fewer
    become four times slower, 16.5 lie in the middle; the softmax scale grows by 0.2 ln 4."""
    turns = torch.tensor([1000.0, 32.0, 16.5, 1.0, 0.1], dtype=torch.float64)
    frequencies = turns * 2 * math.pi / 100
    stretched, factor = stretch_rotary(frequencies, 100, 400)
    expected = torch.tensor([1, 1, (1 + 1 / 4) / 2, 1 / 4, 1 / 4], dtype=torch.float64)
    torch.testing.assert_close(stretched / frequencies, expected)
    assert factor == pytest.approx(1 + 0.2 * math.log(4))
    same, one = stretch_rotary(frequencies, 300, 300)
    assert torch.equal(same, frequencies) and one == 1


def test_rotary_keeps_dtype_and_length():
    x = random_qkv(40, 2, 16, seed=9)[0]
    tables = rotary_tables(rotary_frequencies(16), 40, CPU)
    assert apply_rotary(x.bfloat16(), *tables).dtype == torch.bfloat16
    turned = apply_rotary(x.float(), *tables)
    torch.testing.assert_close(turned.norm(dim=-1).double(), x.norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_softcap():
    logits = torch.linspace(-200, 200, 401, dtype=torch.float64)
    expected = torch.tensor([23 / (1 + math.exp(-(z + 5) / 7.5)) for z in logits.tolist()])
    torch.testing.assert_close(softcap(logits.float()), expected, rtol=1e-5, atol=1e-6)
    assert softcap(logits.bfloat16()).dtype == torch.float32
    assert softcap(torch.tensor(-5.0)).item() == 11.5
    # The gradient goes through: z -> 23·s·(1 - s)/7.5
    z = torch.tensor([0.3], requires_grad=True)
    softcap(z).backward()
    s = 1 / (1 + math.exp(-5.3 / 7.5))
    assert z.grad.item() == pytest.approx(23 * s * (1 - s) / 7.5, rel=1e-5)
