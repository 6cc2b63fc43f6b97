"""What only a GPU can show: the attention backends agree, full-graph compilation takes them."""

import pytest
import torch
import torch.nn.functional as F

import train_gpt
from train_gpt import attention, attention_backend, plain_attention

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
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [tensor.bfloat16().to(dtype).requires_grad_() for tensor in (q, k, v)]
        if dtype == torch.float32:
            out = plain_attention(*inputs, cu_seqlens, window, 0.1)
        else:
            out = attention(*inputs, cu_seqlens, max_seq_len, window, 0.1, backend)
        gradients = torch.autograd.grad(out, inputs, grad.bfloat16().to(dtype))
        results.append((out, *gradients))
    for name, reference, value in zip(("out", "dq", "dk", "dv"), *results):
        assert torch.isfinite(value).all(), name
        assert relative_error(value, reference) < 1e-2, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_graph_compilation_takes_the_backend(backend):
    skip_unless_available(backend)
    cu_seqlens = packed_documents(2048, 512, 256)
    inputs = [torch.randn(2048, 6, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def function(q, k, v):
        return attention(q * 2, k, v, cu_seqlens, 512, 128, 0.1, backend).float().square().sum()

    expected = torch.autograd.grad(function(*inputs), inputs)
    compiled = torch.compile(function, fullgraph=True)
    for value, reference in zip(torch.autograd.grad(compiled(*inputs), inputs), expected):
        assert relative_error(value, reference) < 1e-2


def loss_and_gradients(compile: str) -> list[torch.Tensor]:
    """Of the whole model on one row of 1024 tokens, every weight moved away from its start."""
    stage = train_gpt.Stage(1.0, 8192, 512, 128, 256, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25)
    config = train_gpt.Config(
        compile=compile, stages=(stage,), extension=(stage,), val_row_tokens=1024, bigram_rows=4096
    )
    runtime = train_gpt.Runtime(0, 1, torch.device("cuda"), train_gpt.Log(None))
    model = train_gpt.GPT(config, runtime)
    generator = torch.Generator("cuda").manual_seed(1)
    for param in model.parameters():
        noise = torch.randn(param.shape, generator=generator, device="cuda")
        param.data.add_(0.02 * noise)
    tokens = torch.randint(0, 50256, (1025,), generator=generator, device="cuda").int()
    cu_seqlens = torch.tensor([0, 300, 301, 800] + 60 * [1024], dtype=torch.int32, device="cuda")
    batch = train_gpt.Batch(tokens[:-1], tokens[1:].long(), cu_seqlens, 512)
    prefixes = torch.arange(config.padded_vocab_size, device="cuda") - 1
    weights = torch.tensor([1.0, 0.5, 0.25, 0.25], device="cuda")
    loss, next_token_loss = model(batch, train_gpt.Windows(128, 256), weights, prefixes)
    loss.backward()
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    gradients = [grad.to_dense() if grad.is_sparse else grad for grad in gradients]
    return [loss.detach(), next_token_loss, *gradients]


@pytest.mark.parametrize("compile", ["block", "full"])
def test_compiled_model_matches_eager(compile):
    """Losses and gradients of the bf16 model, compiled both ways, against eager."""
    for reference, value in zip(loss_and_gradients("none"), loss_and_gradients(compile)):
        assert torch.isfinite(value).all()
        assert relative_error(value, reference) < 4e-2


def test_update_keeps_the_low_mantissa_bits():
    """A hundred compiled updates of bf16 weights with their low bits are those of fp32 weights."""
    update = train_gpt.compiler(True)(train_gpt.apply_update_)
    exact = torch.randn(64, 768, device="cuda")
    high, low = torch.empty(64, 768, device="cuda", dtype=torch.bfloat16), None
    low = torch.empty(64, 768, device="cuda", dtype=torch.int16)
    train_gpt.split_mantissa_(high, low, exact)
    for _ in range(100):
        direction = torch.randn(64, 768, device="cuda")
        numbers = torch.tensor(1e-3), torch.tensor(1e-4)
        update(high, low, direction, *numbers)
        update(exact, None, direction, *numbers)
    assert torch.equal(train_gpt.join_mantissa(high, low), exact)
