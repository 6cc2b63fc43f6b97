"""The check of kernels before training: it passes them as they are, and names one that is wrong."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, fp32_for_fp8, tiny_config

from train_gpt import TINY_LAYERS, Config, Stage

GPU = torch.cuda.is_available()
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
ZEROS, TILE_ZEROS = (f"_transposed(({x}.to(tl.float32) * 0.0)" for x in ("values", "tile"))

# A fault: what the self-check calls the kernel, a line of it, and what stands there instead.
COPIES, HEAD, SUMS, TABLES = "fp8 copies", "head and loss", "sums of streams", "rows of tables"
NGRAMS, LOOKUP = "updates of n-grams", "n-gram lookup"
PLANTED = {
    "copies zeroed": (COPIES, "out_t + at_t, _transposed(values)", f"out_t + at_t, {ZEROS})"),
    "copies scaled": (COPIES, "values *= 1 / tl.load(scale", "values *= 2 / tl.load(scale"),
    "copies not counted": (COPIES, "mask=count > 0)", "mask=count < 0)"),
    "largest forgotten": (COPIES, "(largest, _largest(values", "(largest, _largest(0.5 * values"),
    "QKV zeroed": ("QKV", "dqkv_t + at_t, _transposed(values)", f"dqkv_t + at_t, {ZEROS})"),
    "QKV row dropped": ("QKV", "column = row < num_tokens,", "column = row < num_tokens - 1,"),
    "key not offset": ("QKV", "tl.where(row % length == 0, row, row - 1)", "row"),
    "offset gradient": ("QKV", "tl.where(still & (row % length > 0), 0.0, grad)", "grad"),
    "value rows left out": ("QKV", "tile += _load_head(value", "tile += 0 * _load_head(value"),
    "MLP zeroed": (
        "MLP", "[column, row], tl.trans(values)", f"[column, row], {ZEROS}.to(out.dtype))",
    ),
    "MLP scaled": ("MLP", "to_out = scale / tl.load(", "to_out = 2 * scale / tl.load("),
    "head zeroed": (
        HEAD, "grad_t + at_t, _transposed(tile)", f"grad_t + at_t, {TILE_ZEROS})",
    ),
    "offsets left out": (HEAD, "tile += tl.load(offsets", "tile += 0 * tl.load(offsets"),
    "target left out": (HEAD, "values -= tl.where(same", "values -= 0 * tl.where(same"),
    "sum's row dropped": (SUMS, "squares = t < num_tokens,", "squares = t < num_tokens - 1,"),
    "later gradient": (SUMS, "if (later >> i) & 1:", "if (later >> i) & 2:"),
    "norm zeroed": (
        SUMS, "normed_t + at_t, _transposed(tile)",
        f"normed_t + at_t, {TILE_ZEROS})",
    ),
    "end of a run": (TABLES, "while at < end:", "while at + 1 < end:"),
    "short runs": (TABLES, "if end - at < LONG:", "if end - at < LONG - 31:"),
    "squares not kept": (NGRAMS, "tl.store(sum_squares + row, total)", "pass"),
    "smallest entry": (LOOKUP, "tl.atomic_max(", "tl.atomic_min("),
    "not emptied": (LOOKUP, "tl.store(table + place, tl.zeros_like(place), mask=written)", "pass"),
    "entries rounded": (LOOKUP, "table + place, entry, mask", "table + place, entry & -2048, mask"),
    "spare places written": (LOOKUP, "written = place < slots", "written = i < count"),
    "step doubled": (NGRAMS, "value - lr * grad", "value - 2 * lr * grad"),
}  # fmt: skip


def small_config(**changes: object) -> Config:
    """Sizes of the speedrun on a GPU, and of a few numbers in the interpreter."""
    changes = {"match_orders": (2,), "match_slots": 2**10, **changes}
    if GPU:
        return Config(ngram_rows=4096, **changes)
    stage = Stage(1.0, 256, 48, 8, 24, 1.0, 0.5, 64)
    return tiny_config(vocab_size=150, layers=TINY_LAYERS, stages=(stage,), **changes)


def load(path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """train_gpt.py with another text, from a file, where Triton reads the source of kernels."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    if not GPU:
        monkeypatch.setattr(module, "has_kernels", lambda device: True)
        for name, size in {"SEQUENCES": 2, "LENGTH": 10, "ROWS": 40}.items():
            monkeypatch.setattr(module, f"CHECK_{name}", size)
        fp32_for_fp8(monkeypatch, module)
    return module


def make_model(module: ModuleType, **changes: object) -> torch.nn.Module:
    device = torch.device("cuda", 0) if GPU else torch.device("cpu")
    config = module.Config(**vars(small_config(**changes)))
    model = module.GPT(config, module.Runtime(0, 1, device, module.Log(None)))
    if not GPU:
        banks = model.mlp_bank, model.attention_bank, model.head
        model.fp8 = module.Fp8Copies(*banks, len(config.layers))
    return model


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """What the self-check finds wrong with kernels of a source, by their names or all."""

    def run(text: str, *names: str) -> list[str]:
        model = make_model(module := load(tmp_path / "planted.py", text, monkeypatch))
        names = names or tuple(module.SelfCheck(model).methods())
        return [problem for name in names for problem in module.self_check(model, name)]

    return run


def test_kernels_as_they_are_pass(check):
    assert check(SOURCE) == []


@pytest.mark.parametrize("fault", PLANTED)
def test_a_wrong_kernel_is_named(check, fault):
    name, line, planted = PLANTED[fault]
    assert line in SOURCE
    if fault == "copies not counted" and not GPU:
        pytest.skip("every number fits in fp32, which stands for fp8 in the interpreter")
    problems = check(SOURCE.replace(line, planted), name)
    assert problems and all(problem.startswith(f"{name}, ") for problem in problems)


def test_a_kernel_that_does_not_run_is_named(check):
    (problem,) = check(SOURCE.replace("(tl.sqrt(total) + eps)", "(tl.root(total) + eps)"), NGRAMS)
    assert problem.startswith(f"{NGRAMS} do not run: ")


@pytest.mark.skipif(GPU, reason="test_gpu.py prepares whole trainers")
@pytest.mark.parametrize("fault", [None, "step doubled"])
def test_preparing_checks_kernels_while_torch_compiles(monkeypatch, tmp_path, fault):
    """All of its jobs run, and a kernel that is wrong stops it with one error; by one check, as the
    interpreter has no threads."""
    text = SOURCE
    if fault is not None:
        text = SOURCE.replace(*PLANTED[fault][1:])
    module = load(tmp_path / "prepared.py", text, monkeypatch)
    # without lookup, which another job warms up by its own kernel
    model, log = make_model(module, match_orders=()), module.Log(str(tmp_path), "run")
    methods = module.SelfCheck.methods
    only = lambda check: {NGRAMS: methods(check)[NGRAMS]}
    monkeypatch.setattr(module.SelfCheck, "methods", only)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    trainer = module.Trainer(model, module.Runtime(0, 1, torch.device("cpu"), log))
    reported: list[str] = []
    if fault is None:
        trainer.compile_side_by_side(reported.append)
        assert reported == ["compiled functions and checked kernels"]
    else:
        with pytest.raises(module.UserError, match="updates of n-grams, table: off by .*torch 2"):
            trainer.compile_side_by_side(reported.append)
        assert reported == []
    took = log.path.read_text(encoding="utf-8").splitlines()[-1]
    groups = [f"update of {group.name} " for group in module.PARAM_GROUPS]
    for job in (*groups, "validation's loss ", "hashing ", f"check of {NGRAMS} "):
        assert job in took
