"""tools/memory.py: what it counts is what lives, and grows as it should; nothing has memory."""

import dataclasses
import sys

import pytest
import torch
from conftest import ROOT, cpu_runtime, tiny_config

from train_gpt import GPT, Optimizer, unreadable

sys.path.insert(0, str(ROOT / "tools"))
import memory

# What a layer of tiny_config keeps of a token: two sums and what they add, in bf16, and the norm of
# each in fp8, both ways round; QKV, queries, keys, values and what attention makes of them, with
# its log-sum-exp; the square of ReLU in fp8, both ways round.
DIM, WIDTH, HIDDEN, HEADS = 32, 16, 64, 2
LAYER_BYTES = 12 * DIM + 14 * WIDTH + 4 * HEADS + 2 * HIDDEN


def config(**changes: object):
    return tiny_config(dtype="bfloat16", **changes)  # with kernels in fp8


def test_what_lives_is_counted_once():
    """A view has no memory of its own; what is dropped is no longer counted, but was the most."""
    with memory.without_memory() as live:
        x = torch.zeros(10**12, dtype=torch.float32)  # more than a machine has
        view = x.view(-1, 10)[:5].mT
        assert live.now == 4 * 10**12
        y = x[:100] + 1
        assert live.now == 4 * 10**12 + 400
        del x
        assert live.now == 4 * 10**12 + 400 and view.shape == (10, 5)
        del view, y
        assert (live.now, live.most) == (0, 4 * 10**12 + 400)


@pytest.mark.parametrize("world_size", [1, 4])
def test_weights_and_state_are_those_of_training(world_size):
    """As large as the tensors of a model that has memory, but for its fp8 copies and buffers."""
    own = memory.memory_of(config(), world_size)
    runtime = cpu_runtime(0, world_size)
    model = GPT(config(), runtime)
    params = sum(param.nbytes for param in model.parameters())
    state = sum(tensor.nbytes for tensor in Optimizer(model, config(), runtime).tensors())
    assert own.warm_up == params + state
    assert params > 2 * 50_304 * (DIM + 2 * WIDTH)  # head and two value tables
    rest = own.weights - 2 * params - state
    assert 0 < rest < 0.1 * params
    more = memory.memory_of(config(ngram_rows=4512), world_size).ngrams - own.ngrams
    rows = 4000 * len(config().ngram_orders) // world_size
    assert more == rows * (2 * DIM + 4)  # with the sums of Adagrad


def test_memory_of_a_pass_goes_by_its_tokens():
    """Of all layers and of the candidates; and nothing stays behind."""
    layers, stage = config().layers, config().stages[0]
    stages = [dataclasses.replace(stage, tokens_per_step=4 * 2048 * n) for n in (1, 2, 3)]
    one, two, three = (memory.pass_memory(config(), stage, 1) for stage in stages)
    assert three - two == pytest.approx(two - one, rel=0.02)
    last = dataclasses.replace(layers[4], attend_from=4)
    deeper = config(layers=(*layers[:3], *layers[2:4], last))  # one more, without a value table
    more = memory.pass_memory(deeper, stages[0], 1) - one
    assert more == pytest.approx(2048 * LAYER_BYTES, rel=0.02)
    candidates = dataclasses.replace(stages[0], candidates=1024)
    assert memory.pass_memory(config(), candidates, 1) < one / 4
    assert unreadable.cache_info().currsize == 0


def test_report_and_its_errors(capsys):
    options = ["--preset", "tiny", "--tokens_per_pass", "1024"]
    options += ["--stages", "1:1024:256:64:128:1:0:0"]
    assert memory.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["GiB a GPU, on", "n-grams", "weights", "warm-up", "pass", "sum"]
    assert [line[: len(name)] for line, name in zip(lines, names)] == names
    assert lines[0].split()[-2:] == ["1", "2"]  # sequences of a step
    assert lines[6:] == [
        "largest pass on 1: 2 of 512 tokens, all tokens",
        "largest pass on 2: 1 of 512 tokens, all tokens",
    ]
    assert memory.main(["--preset", "tiny", "--num_heads", "3"]) == 1
    assert "--num_heads 3 must be even" in capsys.readouterr().err
