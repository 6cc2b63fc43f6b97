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


@pytest.mark.parametrize("compile", ["block", "full"])
def test_compiled_model_matches_eager(compile):
    """Loss and gradients of a small bf16 model, compiled per block and whole, against eager."""
    layers = (train_gpt.Layer("short", 0), train_gpt.Layer("long", None))
    stage = train_gpt.Stage(1.0, 8192, 512, 128, 256, 1.0)
    common = {"layers": layers, "stages": (stage,), "extension": (stage,), "val_row_tokens": 1024}
    runtime = train_gpt.Runtime(0, 1, torch.device("cuda"), train_gpt.Log(None))
    tokens = torch.randint(0, 50256, (1025,), device="cuda", dtype=torch.int32)
    cu_seqlens = packed_documents(1024, 512, 64)
    batch = train_gpt.Batch(tokens[:-1], tokens[1:].long(), cu_seqlens, 512)
    results = []
    for mode in ("none", compile):
        model = train_gpt.GPT(train_gpt.Config(compile=mode, **common), runtime)
        with torch.no_grad():
            model.attention_bank.normal_(0, 0.02, generator=torch.Generator("cuda").manual_seed(1))
            model.mlp_bank.normal_(0, 0.02, generator=torch.Generator("cuda").manual_seed(2))
        forward = torch.compile(model, fullgraph=True) if mode == "full" else model
        loss = forward(batch, 128, 256)
        loss.backward()
        results.append([loss.detach()] + [param.grad for param in model.parameters()])
    for reference, value in zip(*results):
        assert relative_error(value, reference) < 2e-2
