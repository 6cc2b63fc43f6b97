"""What torch.compile makes is made before the clock starts: on a CPU by its eager backend, which
traces functions as on a GPU and compiles nothing."""

import importlib.util
import sys

import torch
from conftest import ROOT, cpu_runtime, random_batch, random_documents, tiny_config, write_shard
from torch._dynamo.utils import counters

COMPILED = "run = compile_once() if first.is_cuda and not inlined else function"
OPTIONS = "torch.compile(function, **options)"


def test_nothing_is_compiled_on_the_clock(monkeypatch, tmp_path):
    """Shards inserted for lookups, steps and validation find what prepare() made."""
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    assert COMPILED in source and OPTIONS in source
    source = source.replace("first.is_cuda and not inlined", "not inlined")
    source = source.replace(OPTIONS, OPTIONS.replace("function,", "function, backend='eager',"))
    (path := tmp_path / "traced.py").write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("traced", path)
    traced = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "traced", traced)
    spec.loader.exec_module(traced)

    for i, length in enumerate((4000, 30_000)):
        write_shard(tmp_path / f"train_{i}.bin", random_documents(i, [length - 1]))
    lookups = {"match_orders": (2, 3), "match_slots": 2**12, "match_shards": 1}
    config = tiny_config(train_files=str(tmp_path / "train_*.bin"), num_steps=2, **lookups)
    runtime, before = cpu_runtime(), counters["stats"]["unique_graphs"]
    trainer = traced.Trainer(traced.GPT(traced.Config(**vars(config)), runtime), runtime)
    trainer.prepare()
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > before
    trainer.begin_insertion([str(tmp_path / "train_1.bin")])
    steps = [[random_batch(4 * step + i, [20, 44]) for i in range(4)] for step in range(2)]
    for step, batches in enumerate(steps):
        trainer.run_step(step, batches, following=steps[1] if step == 0 else None)
    assert trainer.model.matches.table.any() and next(trainer.pieces, None) is None
    scored = [random_batch(9, [20, 44])]
    matched, read = trainer.model.matches.look_up(scored)
    with torch.no_grad():
        for batch in (*scored, *matched):
            trainer.model.validation_loss(batch, traced.Windows(8, 24))
    trainer.model.matches.undo([trainer.model.matches.insert(read)])
    assert counters["stats"]["unique_graphs"] == compiled
