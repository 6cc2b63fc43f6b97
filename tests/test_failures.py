"""What a run reports when its numbers or its memory fail, and what it logs of its machine."""

import dataclasses
import math
import os
import re

import pytest
import torch
from conftest import cpu_runtime, fp32_for_fp8, random_batch, tiny_config, trained_like

import train_gpt
from train_gpt import (
    DELAYED_SCALES,
    FP8_MAX,
    Clock,
    Config,
    Fp8Copies,
    Log,
    Progress,
    Runtime,
    Trainer,
    UserError,
    check_config,
    describe_environment,
    gpu_facts,
    memory_for,
    not_finite_error,
    passes_remedy,
    tables_remedy,
)

SPEEDRUN = Config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 24}, r"--head_dim 24 is no power of two.*--fp8 false"),
        ({"mlp_dim": 3000}, r"--mlp_dim 3000.*no multiple of 16.*take 3008"),
        ({"model_dim": 776}, r"--model_dim 776.*no multiple of 16.*take 784"),
        ({"num_heads": 2, "head_dim": 4}, r"--head_dim 4 is no multiple of 8"),
        ({"muon_lr": -0.1}, r"--muon_lr -0.1 must not be negative"),
        ({"momentum_peak": 1.5}, r"--momentum_peak 1.5 must be from 0 to below 1"),
        ({"num_steps": 10**12}, r"--num_steps 1000000000000 .* a million steps"),
        ({"tokens_per_pass": 2**22, "sequences_per_step": 1}, None),
        (
            {"tokens_per_pass": 2**22, "val_sequence_tokens": 2**20},
            r"a pass of 1048576 tokens, 3840 numbers wide.*2\^31.*--tokens_per_pass",
        ),
    ],
)
def test_sizes_that_kernels_cannot_take(changes, message):
    """They are refused with kernels alone; in bf16 only what cannot be addressed is."""
    config = dataclasses.replace(SPEEDRUN, **changes)
    if message is None:
        return check_config(config, 1, kernels=True)
    with pytest.raises(UserError, match=message):
        check_config(config, 1, kernels=True)
    if "no power" in message or "multiple of 16" in message:
        check_config(config, 1)
        check_config(dataclasses.replace(config, fp8=False), 1, kernels=True)


@pytest.fixture
def model(runtime, monkeypatch):
    """With fp8 copies, for which fp16 stands in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU kernels take no tensors of the CPU")
    fp32_for_fp8(monkeypatch)
    monkeypatch.setattr(train_gpt, "E4M3", torch.float16)
    model = trained_like(tiny_config(vocab_size=300), runtime)
    banks = model.mlp_bank, model.attention_bank, model.head
    model.fp8 = Fp8Copies(*banks, len(model.config.layers))
    return model


def test_values_beyond_fp8_are_counted(model, runtime):
    """Of the head's numbers each time it is copied, and scales of the step before."""
    copies, limit = model.fp8, torch.finfo(torch.float16).max * 1.6 / FP8_MAX
    with torch.no_grad():
        model.head[3, :5], model.head[7, 2] = 1.1 * limit, -1.1 * limit
    copies.head(torch.tensor([1, 3, 7, 9]))
    assert list(copies.count_clipped(runtime).values()) == [6, 0, 0]
    copies.head()
    assert list(copies.count_clipped(runtime).values()) == [12, 0, 0]
    scale = copies.scales[:, :, 0]
    copies.largest.copy_(FP8_MAX * scale * 0.99)
    copies.largest[1, 2] = FP8_MAX * scale[1, 2] * 1.01
    copies.refresh()
    assert list(copies.count_clipped(runtime).values()) == [12, 0, 1]
    copies.reset()
    assert list(copies.count_clipped(runtime).values()) == [0, 0, 0]


def test_scales_fit_normed_rows_of_any_width():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dim in (768, 1024, 1536):
        shapes = (2, 16, dim), (1, 64, dim), (16, dim)
        zeros = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
        copies = Fp8Copies(*zeros, 1)
        assert copies.scale_x[0] * FP8_MAX >= math.sqrt(dim)
        assert copies.head_input_scale[0] * FP8_MAX >= math.sqrt(dim)
    assert (copies.scale_x.stride(), copies.scale_x.shape) == ((1,), (4,))


def test_what_is_not_finite_is_named(model):
    """By layer, of weights and of what has a scale of the step before."""
    layers = model.fp8.num_layers
    with torch.no_grad():
        model.mlp_bank[layers + 2, 0, 0] = math.nan
        model.attention_bank[1, 0, 0] = math.inf
    model.fp8.largest[3, 1] = math.inf
    model.fp8.refresh()
    expected = ["W_2 of layer 2", "the attention weights of layer 1"]
    expected.append(f"{[*DELAYED_SCALES][1]} in layer 3")
    assert model.fp8.not_finite(model.fp8.health) == expected


def progress_of(model, log: Log) -> Progress:
    runtime = Runtime(0, 1, torch.device("cpu"), log)
    clock = Clock(runtime)
    clock.start()
    return Progress(model, runtime, clock, 100)


def test_the_first_step_that_is_not_finite_is_reported(model, tmp_path):
    """A scale, three steps before the loss."""
    progress = progress_of(model, Log(str(tmp_path), "run"))
    for step in range(5):
        model.fp8.health.fill_(math.inf if step > 1 else 1.0)
        loss = math.nan if step == 4 else 3.0
        if step < 4:
            progress.launched(step, torch.tensor(loss))
            continue
        with pytest.raises(UserError) as error:
            progress.launched(step, torch.tensor(loss))
    assert "the training loss is nan at step 5 (rank 0); not finite behind step 3: W_1 of" in str(
        error.value
    )
    tries = re.search(r"Try in this order: (.*)", str(error.value))[1].split("; ")
    assert [word.split()[0] for word in tries] == ["--fp8", "lower", "the"]


def test_weights_that_are_not_finite_are_reported(runtime):
    model = trained_like(tiny_config(self_check=False), runtime)
    assert "nothing else was seen" in str(not_finite_error(model, "the loss is nan"))
    with torch.no_grad():
        model.value_embed[0, 0] = math.inf
    message = str(not_finite_error(model, "the loss is nan"))
    assert "not finite by now: value_embed. Try in this order: --self_check true; lower" in message


@pytest.mark.parametrize(("last", "warns"), [(10.4, True), (9.0, False)])
def test_a_run_that_does_not_learn_is_warned_of_once(runtime, tmp_path, last, warns):
    progress = progress_of(trained_like(tiny_config(), runtime), log := Log(str(tmp_path), "run"))
    for step in range(60):
        progress.launched(step, torch.tensor(10.8 + (last - 10.8) * step / 60))
    lines = log.path.read_text().splitlines()
    assert sum("does not learn" in line for line in lines) == warns


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({}, r"lower --ngram_rows 16777216, which take 72\.2 GiB a process, or start more"),
        (
            {"match_orders": (*range(1, 9),), "ngram_rows": 999},
            r"lower --match_slots .* 8\.0 GiB a",
        ),
        ({"ngram_rows": 2**10}, r"lower --model_dim 768, --mlp_dim 3840 or --layers"),
    ],
)
def test_memory_of_tables_has_a_remedy(changes, remedy):
    config = dataclasses.replace(SPEEDRUN, **changes)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB. GPU 0")
    found = pytest.raises(UserError, match=f"CUDA out of memory, for the tables: {remedy}")
    with found, memory_for("the tables", tables_remedy(config)):
        raise error


def test_memory_of_a_cpu_has_a_remedy_and_other_errors_are_left_alone():
    remedy = tables_remedy(SPEEDRUN)
    size = r"tried to allocate 4611686018427387904 bytes, for the tables: lower --ngram_rows"
    with pytest.raises(UserError, match=size), memory_for("the tables", remedy):
        torch.empty(2**62, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="of another kind"), memory_for("the tables", remedy):
        raise RuntimeError("an error of another kind")


def test_memory_of_passes_has_a_remedy():
    """Fewer sequences at once as long as there are several."""
    assert passes_remedy(SPEEDRUN, 8).startswith("pass --sequences_per_step 16")
    assert passes_remedy(SPEEDRUN, 1) == "lower --tokens_per_pass 131072, to 32768 at the least"
    single = dataclasses.replace(SPEEDRUN, tokens_per_pass=8192)
    assert passes_remedy(single, 1).startswith("pass --sequences_per_step 16, which are half")


FAKE = """#!/bin/sh
case "$*" in *--query-gpu=driver_version,power.limit,*--id=GPU-1234*) ;; *) exit 9 ;; esac
echo '580.1, 700.00 W, 345 MHz, 1980 MHz, 3201 MHz'
"""


def test_the_log_says_what_it_ran_on(runtime, monkeypatch, tmp_path):
    class Properties:
        uuid = "1234"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = gpu_facts(torch.device("cuda", 0))
    assert [*facts] == ["driver", "power_limit", "sm_clock", "max_sm_clock", "memory_clock"]
    assert set(facts.values()) == {None}  # no nvidia-smi
    (tool := tmp_path / "nvidia-smi").write_text(FAKE)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin:/usr/bin")
    facts = gpu_facts(torch.device("cuda", 0))
    assert [*facts.values()] == ["580.1", "700.00 W", "345 MHz", "1980 MHz", "3201 MHz"]
    environment = describe_environment(runtime)
    assert environment["cuda"] is None and environment["torch"] == torch.__version__
    assert environment["triton"] and environment["flash_attn"] == "4.0.0b36"
    assert train_gpt.package_version("no-such-package") is None


def test_lookups_are_done_before_the_passes(monkeypatch):
    """So that no gradient waits for them: those of the first step, and then, when this one is
    inserted, those of the next step, which has nothing to look up any more."""
    config = tiny_config(match_orders=(2,), match_slots=2**10, vocab_size=50_257)
    runtime = cpu_runtime()
    trainer, done = Trainer(trained_like(config, runtime), runtime), []
    for owner, name in (
        (train_gpt, "gather_sequences"),
        (train_gpt, "find_matches"),
        (trainer, "micro_step"),
        (train_gpt, "insert_matches_"),
        (trainer.optimizer, "step"),
    ):
        original = getattr(owner, name)

        def recorded(*args, name=name, original=original) -> object:
            done.append(name)
            return original(*args)

        monkeypatch.setattr(owner, name, recorded)
    steps = [[random_batch(2 * step + i, [40, 24]) for i in range(2)] for step in range(2)]
    look_up, passes = ["gather_sequences", "find_matches"], ["micro_step"] * 2 + ["step"]
    trainer.run_step(0, steps[0], following=steps[1])
    assert done == [*look_up, "insert_matches_", *look_up, *passes]
    done.clear()
    trainer.run_step(1, steps[1])
    assert done == ["insert_matches_", *passes]
