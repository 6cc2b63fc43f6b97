"""The groups of tools/profiler.py: ranges that train_gpt.py records, in traces of a GPU's form
and in a profile of real steps on the CPU."""

import ast
import contextlib
import dataclasses
import gzip
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, cpu_runtime, random_documents, tiny_config, write_shard

from train_gpt import (
    GPT,
    PARAM_GROUPS,
    TINY_LAYERS,
    Config,
    Log,
    Runtime,
    Stage,
    Trainer,
    recorded,
)

sys.path.insert(0, str(ROOT / "tools"))
import profiler

MAIN, AUTOGRAD = 4321, 4322  # threads of the host
FILL = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>"
SORT = "void at_cuda_detail::cub::detail::radix_sort::DeviceRadixSortOnesweepKernel<>"
FUSED = "triton_poi_fused_add_bitwise_and_0"
# Kernels of a pass, and where they belong: the range, what launches, the stream, the kernel, its
# first grid size. Streams are 7 and, beside it, 13.
PASS = [
    ("candidates", MAIN, 13, FILL, 9),
    ("candidates", MAIN, 13, SORT, 4),
    ("lookups", MAIN, 13, SORT, 4),
    ("lookups", MAIN, 7, "void at::native::vectorized_gather_kernel<16, int>", 1),
    ("hashing", MAIN, 7, FUSED, 2),
    ("forward", MAIN, 7, FILL, 1),
    ("forward", MAIN, 7, "nvjet_sm90_qqtst_128x160", 1),
    ("forward", MAIN, 7, "kernel_cutlass_flash_attncute_fwd_sm90", 1),
    ("forward", MAIN, 7, "_lse_kernel", 1),
    ("backward", AUTOGRAD, 7, FILL, 1),
    ("backward", AUTOGRAD, 7, "nvjet_sm90_qqtst_128x160", 1),
    ("backward", AUTOGRAD, 7, "_add_rows_kernel", 1),
]


class Host:
    """Makes the records of a trace as Kineto writes them; a kernel lasts 10 µs on the GPU."""

    def __init__(self):
        self.records, self.now, self.gpu, self.ids = [], 1000.0, 5000.0, itertools.count(1)

    def add(self, cat: str, name: str, ts: float, dur: float, thread: int, **args: object) -> None:
        record = {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": thread}
        self.records.append(record | {"args": args})

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        start = self.now
        self.now += 1
        yield
        self.add("user_annotation", name, start, self.now - start, MAIN)
        self.now += 1

    def call(self, name: str, thread: int, correlation: int, kind: str = "cuda_runtime") -> None:
        self.add(kind, name, self.now, 1.5, thread, correlation=correlation)
        self.now += 2

    def kernel(self, name: str, stream: int, grid: int, correlation: int, cat="kernel") -> None:
        args = {"correlation": correlation, "stream": stream, "External id": 7}
        args |= {"grid": [grid, 1, 1], "block": [128, 1, 1]}
        self.add(cat, name, self.gpu, 10, stream, **args)
        self.gpu += 10

    def launch(self, name: str, thread: int = MAIN, stream: int = 7, grid: int = 1, **more) -> None:
        correlation = next(self.ids)
        is_triton = name.startswith(("triton", "_"))
        how = ("cuLaunchKernelEx", "cuda_driver") if is_triton else ("cudaLaunchKernel",)
        self.call(how[0], thread, correlation, *how[1:])
        self.kernel(name, stream, grid, correlation, **more)

    def eager_pass(self, kernels: list[tuple] = PASS) -> None:
        parts = {part: [*own] for part, own in itertools.groupby(kernels, lambda kernel: kernel[0])}
        self.launch("Memcpy HtoD (Pinned -> Device)", cat="gpu_memcpy")
        with self.range("forward"):
            for part in ("candidates", "lookups"):
                with self.range(part):
                    for _, *kernel in parts[part]:
                        self.launch(kernel[2], *kernel[:2], kernel[3])
                    if part == "lookups":
                        with self.range("hashing"):
                            for _, *kernel in parts["hashing"]:
                                self.launch(kernel[2], *kernel[:2], kernel[3])
            for _, *kernel in parts["forward"]:
                self.launch(kernel[2], *kernel[:2], kernel[3])
        with self.range("backward"):
            for _, *kernel in parts["backward"]:
                self.launch(kernel[2], *kernel[:2], kernel[3])

    def replay(self, kernels: list[tuple]) -> None:
        correlation = next(self.ids)
        self.call("cudaGraphLaunch", MAIN, correlation)
        for _, _, stream, name, grid in kernels:
            self.kernel(name, stream, grid, correlation)

    def trace(self, folder: Path) -> profiler.Trace:
        path = folder / f"{next(self.ids)}.json.gz"
        with gzip.open(path, "wt", encoding="utf-8") as file:
            json.dump({"traceEvents": [{"ph": "M", "name": "process_name"}, *self.records]}, file)
        return profiler.read_trace(path)


def by_range(events: list[profiler.Event]) -> Counter:
    return Counter((event.range, event.name) for event in events)


def interleaved(kernels: list[tuple]) -> list[tuple]:
    """In another order: the side stream's kernels as late as they can be."""
    aside = iter([kernel for kernel in kernels if kernel[2] == 13])
    others = [kernel for kernel in kernels if kernel[2] != 13]
    return [kernel for pair in zip(others, aside) for kernel in pair] + others[3:]


EXPECTED = Counter((part, name) for part, _, _, name, _ in PASS)


def test_kernels_launched_one_by_one_belong_to_the_range_around(tmp_path):
    """Those of autograd's thread to the one around the call of backward()."""
    host = Host()
    host.eager_pass()
    found = by_range(host.trace(tmp_path).events)
    assert found == EXPECTED + Counter([("", "Memcpy HtoD (Pinned -> Device)")])


@pytest.fixture
def eager(tmp_path) -> profiler.Trace:
    host = Host()
    host.eager_pass()
    return host.trace(tmp_path)


def test_replayed_kernels_get_the_ranges_of_the_eager_pass(tmp_path, eager):
    """In a step of two passes and an update, whose own kernels know their launch."""
    host = Host()
    for i in range(4):
        with host.range(f"step {i}"):
            for _ in range(2):
                host.replay(interleaved(PASS))
                with host.range("n-gram gather"):
                    host.launch("Memcpy DtoD (Device -> Device)", cat="gpu_memcpy")
            with host.range("optimizer"):
                with host.range("reductions"):
                    host.launch("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", stream=20)
                with host.range("update mlp_bank"):
                    host.launch(FUSED)
                    host.launch("nvjet_sm90_tst_64x8")
                with host.range("fp8 refresh"):
                    host.launch("_quantize_kernel")
                host.launch(FILL)
    trace = host.trace(tmp_path)
    assert {event.range for event, graph in zip(trace.events, trace.graphs) if graph} == {None}
    events, line = profiler.name_replayed(trace, eager)
    assert line == ""
    assert by_range(events)["update mlp_bank", FUSED] == 4
    replayed = [event for event, graph in zip(events, trace.graphs) if graph]
    assert by_range(replayed) == Counter({key: 8 * n for key, n in EXPECTED.items()})
    matmuls = [event.range for event in replayed if event.name == "nvjet_sm90_qqtst_128x160"]
    assert matmuls == 8 * ["forward", "backward"]  # in the order in which they ran
    rows = profiler.break_down(events, trace.steps)
    counts = {name: rows[name][1] for name in profiler.GROUPS if rows[name][1]}
    assert counts == {
        "communication": 1, "hashing": 2, "lookups": 4, "candidates": 4, "attention": 2, "head": 2,
        "matmuls": 4, "tables": 2, "element-wise": 4, "n-gram gather": 2, "optimizer": 3,
        "fp8 refresh": 1,
    }  # fmt: skip
    assert rows["forward"][1] == 8 and rows["update mlp_bank"] == pytest.approx((0.02, 2))
    assert sum(rows[name][0] for name in profiler.GROUPS) == pytest.approx(31 * 0.01)


def replay_of(tmp_path: Path, kernels: list[tuple]) -> profiler.Trace:
    host = Host()
    for i in range(3):
        with host.range(f"step {i}"):
            host.replay(kernels)
    return host.trace(tmp_path)


def test_differences_between_the_passes_are_reported(tmp_path, eager, monkeypatch):
    """A kernel that only the graph has, and one fewer of a shape that has come in two ranges."""
    kernels = [kernel for kernel in PASS if kernel[:4] != ("backward", AUTOGRAD, 7, FILL)]
    kernels.append(("backward", AUTOGRAD, 7, "memset_kernel", 1))
    trace = replay_of(tmp_path, kernels)
    events, line = profiler.name_replayed(trace, eager)
    unassigned = Counter(event.name for event in events if event.range is None)
    assert unassigned == {FILL: 3, "memset_kernel": 3}
    assert f"{FILL[:60]} 1 for 2 times" in line and "memset_kernel 1 for 0 times" in line
    assert profiler.break_down(events, trace.steps)["unassigned"] == pytest.approx((0.02, 2))
    monkeypatch.setattr(profiler, "write_trace", lambda *_: None)
    monkeypatch.setattr(profiler, "read_trace", lambda path: trace)
    _, said = profiler.profile(print, 1, torch.device("cpu"), "", eager)
    assert said == f"2 kernels a step unassigned: {line}"


def test_a_kernel_of_one_range_belongs_there_however_often_it_comes(tmp_path, eager):
    """Of another grid too; the line says that the passes are not the same."""
    kernels = [kernel if kernel[3] != FUSED else (*kernel[:4], 5) for kernel in PASS]
    events, line = profiler.name_replayed(replay_of(tmp_path, kernels), eager)
    assert by_range(events)["hashing", FUSED] == 3 and by_range(events)[None, FUSED] == 0
    assert f"{FUSED} 0 for 1 times" in line and f"{FUSED} 1 for 0 times" in line


def test_without_an_eager_pass_replayed_kernels_are_unassigned(tmp_path):
    trace = replay_of(tmp_path, PASS)
    events, line = profiler.name_replayed(trace, None)
    assert {event.range for event in events} == {None}
    assert line == "no pass without its graph was profiled"


def test_a_kernel_without_a_launch_goes_by_the_operator_that_called_it(tmp_path):
    host = Host()
    with host.range("update head"):
        host.add("cpu_op", "adam", host.now, 5, MAIN, **{"External id": 7})
        host.now += 6
    host.kernel("known by its operator", 7, 1, correlation=99)
    host.add("kernel", "not known", host.gpu, 10, 7)
    ranges = {event.name: event.range for event in host.trace(tmp_path).events}
    assert ranges == {"known by its operator": "update head", "not known": None}


def test_operators_of_an_inner_range_are_cut_out_of_those_around():
    """Times as if on a CPU, where an operator of lookups calls the hashing."""
    operators = [
        ("NgramRows", 0, 10, "lookups"),
        ("aten::empty", 1, 2, "lookups"),
        ("aten::mul", 3, 5, "hashing"),
        ("aten::copy_", 4, 5, "hashing"),
        ("aten::embedding", 6, 9, "lookups"),
        ("aten::add", 10, 11, "forward"),
    ]
    events = [profiler.Event(name, a, b, a, where) for name, a, b, where in operators]
    found = [(e.name, e.start, e.end) for e in profiler.outermost(events)]
    assert found == [
        ("NgramRows", 0, 3),
        ("aten::mul", 3, 5),
        ("NgramRows", 5, 10),
        ("aten::add", 10, 11),
    ]


@pytest.mark.parametrize(
    ("range_name", "group"),
    [
        ("hashing", "hashing"),
        ("lookups", "lookups"),
        ("candidates", "candidates"),
        ("pointer", "pointer"),
        ("matches", "matches"),
        ("update mlp_bank", "optimizer"),
        ("optimizer", "optimizer"),
        ("forward", "element-wise"),
        (None, "unassigned"),
    ],
)
def test_a_compiled_kernel_counts_as_its_range(range_name, group):
    assert profiler.group_of(FUSED, range_name) == group
    assert profiler.group_of("ncclDevKernel_AllGather", range_name) == "communication"


@pytest.mark.parametrize(
    "kernel", ["_mixture_kernel", "_pointer_queries_kernel", "_pointer_keys_kernel", "_lse_kernel"]
)
def test_kernels_of_the_head_outside_of_a_range_of_their_own(kernel):
    assert profiler.group_of(kernel, "backward") == profiler.group_of(kernel, "forward") == "head"


# Ranges of train_gpt.py ---------------------------------------------------------------------------


def test_every_recorded_range_has_a_group():
    names = set()
    for node in ast.walk(ast.parse((ROOT / "train_gpt.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "recorded":
            (name,) = node.args
            text = name.value if isinstance(name, ast.Constant) else name.values[0].value
            names |= {text} if text != "update " else {text + group.name for group in PARAM_GROUPS}
    assert names == profiler.RANGES


def test_ranges_are_recorded_for_a_profiler_alone():
    @recorded("hashing")
    def call(x: int) -> int:
        return x + 1

    assert call(1) == 2
    with torch.profiler.profile() as trace:
        assert [call(1), call(x=2)] == [2, 3]
    counts = {row.key: row.count for row in trace.key_averages()}
    assert counts["hashing"] == 2
    with pytest.raises(IndexError), recorded("hashing"):
        [].pop()


def test_a_profile_of_real_steps_names_what_they_do(tmp_path):
    """Two passes of two sequences a step, with candidates and lookups, on the CPU. The
    step that counts is the second, an odd one, with every update."""
    stages = (Stage(1.0, 256, 48, 8, 24, 1.0, 0.5, 300),)
    changes = {"stages": stages, "match_orders": (2, 3), "match_slots": 2**10}
    config, runtime = tiny_config(**changes, tokens_per_pass=128), cpu_runtime()
    trainer, random = Trainer(GPT(config, runtime), runtime), np.random.default_rng(0)
    assert profiler.eager_trace(trainer, None, 0) is None  # no graphs
    batches = [profiler.random_batch(random, 64, 48, 2, config, runtime) for _ in range(2)]
    updates = itertools.count()

    def step() -> None:
        trainer.run_step(0, batches, next(updates))

    path = tmp_path / "trace.json.gz"
    times, line = profiler.profile(step, 1, runtime.device, path)
    assert line == ""
    used = {name for name in profiler.GROUPS if times[name][1]}
    of_ranks = {"communication", "n-gram exchange"}
    assert used == {*profiler.GROUPS} - {"fp8 refresh", "other", "unassigned"} - of_ranks
    assert all(times[name][0] > 0 for name in (*profiler.PASS, *profiler.UPDATES))
    parts = sum(times[name][0] for name in [*profiler.GROUPS, "less what overlaps", "idle"])
    assert parts == pytest.approx(times["step"][0])

    events = profiler.read_trace(path).events
    names = {where: {e.name for e in events if e.range == where} for where in profiler.RANGES}
    assert "aten::sort" in names["candidates"] & names["lookups"]
    assert "aten::logsumexp" in names["forward"]
    assert {name.split("::")[0] for name in names["backward"]} >= {"autograd"}
    assert "aten::scatter_reduce_" in names["matches"]
    assert {where for where, own in names.items() if "aten::__rshift__" in own} == {
        "hashing", "lookups", "candidates", "matches", "pointer",
    }  # fmt: skip


def test_shards_are_inserted_beside_stage_1_alone(tmp_path, monkeypatch):
    """As many pieces a step as in training, which inserts all of them before the second stage."""
    for i, count in enumerate((200, 300)):
        write_shard(tmp_path / f"train_{i}.bin", random_documents(i, [40] * count))
    config = tiny_config(
        train_files=str(tmp_path / "train_*.bin"), match_orders=(2, 3), match_slots=2**10,
        match_shards=1, num_steps=160, tokens_per_pass=256, log_dir=str(tmp_path),
    )  # fmt: skip
    monkeypatch.setattr(profiler.train_gpt, "PIECE_TOKENS", 256)
    inserted, read, run = Counter(), profiler.train_gpt.read_piece, Trainer.run_step
    steps, at_once = [], 5  # 47 pieces beside 10 steps

    def read_and_count(piece: torch.Tensor) -> torch.Tensor:
        inserted[steps[-1]] += 1
        return read(piece)

    def run_and_note(self: Trainer, step: int, *arguments: object) -> torch.Tensor:
        steps.append(step)
        return run(self, step, *arguments)

    def only_run(step: Callable[[], None], count: int, *arguments: object) -> tuple:
        for _ in range(count + 2):
            step()
        return dict.fromkeys([profiler.TOTAL, *profiler.PASS, *profiler.UPDATES], (1.0, 0)), ""

    # what takes time and is tested elsewhere
    monkeypatch.setattr(profiler, "profile", only_run)
    monkeypatch.setattr(Trainer, "prepare", lambda self: None)
    monkeypatch.setattr(Trainer, "micro_step", lambda self, *arguments: torch.tensor(0.0))
    monkeypatch.setattr(profiler.train_gpt, "read_piece", read_and_count)
    monkeypatch.setattr(Trainer, "run_step", run_and_note)
    log = Log(str(tmp_path), "run")
    profiler.profile_stages(config, dataclasses.replace(cpu_runtime(), log=log), 1)
    assert steps.count(0) == steps.count(160) == 6
    assert inserted == {0: 6 * at_once}
    text = f"pieces inserted beside a step, while there are any: {at_once} of 256 tokens"
    assert log.path.read_text().count(text) == 1


def test_without_files_nothing_is_looked_up(tmp_path):
    """A profile goes on with random text."""
    options = {"match_orders": (2, 3), "match_slots": 2**10, "match_shards": 1}
    config, log = tiny_config(train_files=str(tmp_path / "*.bin"), **options), Log(str(tmp_path))
    assert profiler.find_train_files(config, log) is None
    assert "the text is random, and none is looked up" in log.path.read_text()
    shape = (64, 48)
    (batches,) = profiler.batches_like(config, cpu_runtime(), [shape], None)
    assert [len(batch.tokens) for batch in batches] == [64] * 4


@pytest.mark.gpu
def test_a_profile_of_replayed_graphs_leaves_nothing_unassigned(tmp_path):
    """Widths as small as kernels take; every range of a step but those between ranks."""
    stage = Stage(1.0, 4096, 512, 128, 256, 1.0, 0.5, 2048)
    config = Config(
        stages=(stage,), extension=(stage,), num_steps=4, extension_steps=0, sequences_per_step=2,
        tokens_per_pass=2048, ngram_rows=2**12, match_orders=(2, 3), match_slots=2**12,
        layers=TINY_LAYERS, val_sequence_tokens=2048,
    )  # fmt: skip
    runtime = Runtime(0, 1, torch.device("cuda", 0), Log(None))
    trainer, random = Trainer(GPT(config, runtime), runtime), np.random.default_rng(0)
    batches = [profiler.random_batch(random, 2048, 512, 1, config, runtime) for _ in range(2)]
    eager = profiler.eager_trace(trainer, batches[0], stage)
    trainer.prepare()
    updates = itertools.count()

    def step() -> None:
        trainer.run_step(0, batches, next(updates))

    times, line = profiler.profile(step, 2, runtime.device, tmp_path / "trace.json.gz", eager)
    assert line == "" and times["unassigned"] == (0, 0)
    wanted = "hashing", "lookups", "candidates", "pointer", "attention", "head", "matmuls"
    for name in (*wanted, "matches", "optimizer", *(["fp8 refresh"] if trainer.model.fp8 else [])):
        assert times[name][0] > 0, name
    assert all(times[name][0] > 0 for name in (*profiler.PASS, *profiler.UPDATES))


def test_no_module_hides_one_of_the_standard_library():
    """Tools run as scripts have their folder in front of it; `profiling` is new in Python 3.15."""
    taken = {*sys.stdlib_module_names, "profiling"}
    files = (
        path for place in ("", "data", "tools", "tests") for path in (ROOT / place).glob("*.py")
    )
    assert {path.stem for path in files} & taken == set()
