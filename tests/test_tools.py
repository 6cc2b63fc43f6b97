"""tools/profiler.py and tools/bench.py: what they make of made-up events and times, what they
say to wrong arguments, and the profile of a few steps on the CPU."""

import dataclasses
import gzip
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import MOMENTUM, ROOT, cpu_runtime, tiny_config, write_shard
from test_train import OPTIONS, environment

from train_gpt import (
    GPT,
    START_TOKEN,
    TINY_LAYERS,
    HeadFp8,
    MlpFp8,
    Optimizer,
    QkvFp8,
    Stage,
    plan_exchange,
)

sys.path.insert(0, str(ROOT / "tools"))
import bench
import profiler

KERNELS = {
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
    "triton_red_fused_mul_pow_sum_3": "element-wise",
    "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90": "attention",
    "_logits_gradient_kernel": "head",
    "nvjet_sm90_qqtst_128x160_128x5_2x1_v_bz_coopA_algo2_TNT": "matmuls",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>": "matmuls",
    "_mlp_matmul_kernel": "matmuls",
    "void at_cuda_detail::cub::detail::radix_sort::DeviceRadixSortOnesweepKernel<>": "tables",
    "_add_rows_kernel": "tables",
    "_combine_backward_kernel": "element-wise",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": "element-wise",
    "Memset (Device)": "other",
    # operators on the CPU
    "aten::mm": "matmuls",
    "autograd::engine::evaluate_function: MmBackward0": "matmuls",
    "aten::logsumexp": "head",
    "NgramRowsBackward": "tables",
    "aten::mul": "element-wise",
}


@pytest.mark.parametrize(("name", "group"), KERNELS.items())
def test_kernels_of_a_pass_are_grouped_by_name(name, group):
    for range_name in ("forward", "backward", ""):
        assert profiler.group_of(name, range_name) == group


def test_a_union_counts_what_overlaps_once():
    assert profiler.union([]) == []
    intervals = [(4, 5), (0, 2), (1, 3), (3, 3.5), (6, 6), (4.2, 4.8)]
    assert profiler.union(intervals) == [(0, 3.5), (4, 5)]
    assert profiler.covered(intervals) == 4.5


def made_up_step(launched: float, start: float) -> list[profiler.Event]:
    """4 ms of a matmul, 1 of nothing, a copy; nccl from within the matmul until after the copy's
    beginning: 1.5 ms of it alone."""
    times = {"nvjet_sm90": (0, 4), "nccl": (3.5, 7), "_combine_kernel": (5.5, 8)}
    return [profiler.Event(name, start + a, start + b, launched) for name, (a, b) in times.items()]


def test_a_step_is_broken_down_with_the_gap_behind_it():
    """Of four steps the first and the last are lead-in and end. The host runs far ahead."""
    hosts = [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 4.0)]
    begins = [5.0, 20.0, 30.0, 41.0]  # behind steps of 8 ms: gaps of 2 and 3 ms from 20 on
    events = [e for (a, _), begin in zip(hosts, begins) for e in made_up_step(a, begin)]
    events.append(profiler.Event("Memset (Device)", 28.5, 29.0, float("-inf")))  # launch not known
    rows = profiler.break_down(events, hosts)
    expected = {"step": 10.5, "matmuls": 4, "communication": 3.5, "element-wise": 2.5}
    expected |= {"other": 0.25, "attention": 0, "less what overlaps": -2, "idle": 2.25}
    expected |= {"idle between steps": 2.5, "communication exposed": 1.5}
    for name, ms in expected.items():
        assert rows[name][0] == pytest.approx(ms), name
    assert rows["matmuls"][1] == 1 and rows["other"][1] == 0.5
    parts = sum(rows[name][0] for name in [*profiler.GROUPS, "less what overlaps", "idle"])
    assert parts == pytest.approx(rows["step"][0])
    assert rows["unassigned"] == (0, 0)


def test_a_profile_without_events_is_refused():
    with pytest.raises(RuntimeError, match="2 steps with events"):
        profiler.break_down(made_up_step(0, 0) + made_up_step(1, 9), [(0, 1), (1, 2), (2, 3)])


def write_trace(path: Path, *records: dict) -> Path:
    records = [{"ph": "X", "args": {}} | record for record in records]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump({"traceEvents": [{"ph": "M", "name": "process_name"}, *records]}, file)
    return path


def test_a_trace_gives_kernels_with_their_launches_or_outermost_operators(tmp_path):
    """Times are microseconds there and milliseconds here."""
    host = [
        {"cat": "user_annotation", "name": "step 0", "ts": 0, "dur": 500},
        {"cat": "user_annotation", "name": "something else", "ts": 0, "dur": 500},
        {"cat": "cpu_op", "name": "aten::linear", "ts": 100, "dur": 50},
        {"cat": "cpu_op", "name": "aten::addmm", "ts": 110, "dur": 30},
        {"cat": "cpu_op", "name": "aten::mul", "ts": 150, "dur": 10},
    ]
    names = {"name": "cudaGraphLaunch", "args": {"correlation": 7}}
    gpu = [
        {"cat": "kernel", "name": "k", "ts": 2000, "dur": 500, "args": {"correlation": 7}},
        {"cat": "gpu_memset", "name": "m", "ts": 3000, "dur": 100, "args": {"correlation": 8}},
        {"cat": "cuda_runtime", "ts": 120, "dur": 5, **names},
    ]
    events, steps, *_ = profiler.read_trace(write_trace(tmp_path / "cpu.json.gz", *host))
    assert steps == [(0, 0.5)]
    assert [(e.name, e.start, e.end) for e in events] == [
        ("aten::linear", 0.1, 0.15),
        ("aten::mul", 0.15, 0.16),
    ]
    events = profiler.read_trace(write_trace(tmp_path / "gpu.json.gz", *host, *gpu)).events
    assert events == [("k", 2.0, 2.5, 0.12, None), ("m", 3.0, 3.1, float("-inf"), None)]


@pytest.mark.parametrize("max_seq_len", [48, 896, 4096])
def test_random_sequences_are_whole_documents(max_seq_len):
    random, config = np.random.default_rng(0), tiny_config()
    batch = profiler.random_batch(random, 4096, max_seq_len, 1, config, cpu_runtime())
    lengths = batch.cu_seqlens.diff()
    assert batch.cu_seqlens[-1] == len(batch.tokens) == 4096 and lengths.max() <= max_seq_len
    starts = batch.cu_seqlens[:-1][lengths > 0].long()
    assert (batch.tokens[starts] == START_TOKEN).all()
    assert 0 <= batch.tokens.min() and batch.tokens.max() <= START_TOKEN
    assert torch.equal(batch.tokens[1:].long(), batch.targets[:-1])


# Communication ------------------------------------------------------------------------------------


class CountingRing:
    """In place of torch's collectives: counts what a ring of ranks sends for each of them, chunk by
    chunk, and moves nothing."""

    def __init__(self, world_size: int, monkeypatch: pytest.MonkeyPatch):
        self.world_size, self.sent = world_size, 0
        own = "reduce_scatter_tensor", "all_gather_into_tensor", "all_reduce", "all_to_all_single"
        for name in own:
            monkeypatch.setattr(dist, name, getattr(self, name))

    def pass_on(self, chunk_bytes: float) -> "CountingRing":
        """Every rank hands a chunk to the next one until each has been everywhere."""
        self.sent += (self.world_size - 1) * chunk_bytes
        return self

    def reduce_scatter_tensor(self, output, input, async_op):
        assert input.nbytes == self.world_size * output.nbytes
        return self.pass_on(output.nbytes)

    def all_gather_into_tensor(self, output, input, async_op=False):
        assert output.nbytes == self.world_size * input.nbytes
        return self.pass_on(input.nbytes)

    def all_reduce(self, tensor, async_op):
        """As a reduce-scatter and an all-gather."""
        return self.pass_on(tensor.nbytes / self.world_size).pass_on(
            tensor.nbytes / self.world_size
        )

    def all_to_all_single(self, output, input, from_each, to_each, async_op):
        """Not round the ring; what every rank keeps for itself is as much."""
        assert (sum(from_each), sum(to_each)) == (len(output), len(input))
        self.sent += (len(input) - to_each[0]) * input[0].nbytes
        return self

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_what_a_step_sends_is_computed(world_size, monkeypatch):
    """As much as the optimizer's own collectives do, on even and odd steps."""
    ring = CountingRing(world_size, monkeypatch)
    config, runtime = tiny_config(dtype="bfloat16"), cpu_runtime(world_size - 1, world_size)
    model = GPT(config, runtime)
    optimizer, sent = Optimizer(model, config, runtime), []
    for step in range(2):
        ring.sent = 0
        optimizer.step(step, 1.0, MOMENTUM)
        assert profiler.sent_bytes(model, world_size, step) == pytest.approx(ring.sent)
        sent.append(ring.sent)
    assert 0 < sent[0] < sent[1]


def test_what_ngrams_send_is_computed(monkeypatch):
    """As much as exchanging a step's rows and gradients, when each rank reads every row once."""
    ring = CountingRing(4, monkeypatch)
    config, runtime = tiny_config(ngram_orders=(2, 3), ngram_rows=64), cpu_runtime(1, 4)
    model = GPT(config, runtime)
    rows = np.tile(np.arange(2 * 64, dtype=np.int32), (4, 1))
    exchange, places = plan_exchange(rows, 1, config.ngram_rows_per_rank(4))
    model.ngrams.pull(exchange)
    model.ngrams.gather(torch.from_numpy(places).view(64, 2), torch.zeros(64, 32))
    model.ngrams.send_gradients()
    sent = 2 * (3 * 32) * 128  # of three other ranks 32 rows each, and their gradients
    assert profiler.exchanged_bytes(model, 4, num_tokens=4 * 64) == ring.sent == sent
    assert profiler.exchanged_bytes(model, 1, num_tokens=4 * 64) == 0


def test_nothing_is_sent_by_one_rank(runtime):
    model = GPT(tiny_config(), runtime)
    assert [profiler.sent_bytes(model, 1, step) for step in range(2)] == [0, 0]


TABLES = "GiB of n-grams", "GiB of a step's n-grams"


def test_volumes_by_hand(runtime, capsys):
    """Of a small model in numbers of 4 bytes, with 5 layers."""
    changes = {"sequences_per_step": 4, "model_dim": 32, "mlp_dim": 64}
    model = GPT(tiny_config(**changes, head_dim=16, gate_dim=16, layers=TINY_LAYERS), runtime)
    changes["ngram_orders"] = 2
    words = [word for name, value in changes.items() for word in (f"--{name}", str(value))]

    def printed(*more: str) -> dict[str, list[str]]:
        assert profiler.main(["--volumes", "--preset", "tiny", *words, *more]) == 0
        lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
        return {first: [cell.strip() for cell in others if cell] for first, *others in lines}

    rows = printed()
    assert rows["ranks"] == ["every", "MB", "1", "2", "4"]
    assert rows["rows of head"] == ["2", "6.4", "50,304", "25,152", "12,576"]
    assert rows["rows of mlp_bank"] == ["1", "0.1", "10", "5", "3"]  # of 12
    assert rows["rows of value_embed"] == ["2", "12.9", "100,608", "50,304", "25,152"]
    step = "GB sent, n-grams of 1,024 tokens at most"
    assert [name for name in rows if "n-grams" in name] == [step, *TABLES]
    assert rows["rows of small"][2:] == [f"{model.small.numel():,}"] * 3
    tables, small = model.head.numel() + model.value_embed.numel(), model.small.numel()
    padded = {1: (10, 5), 2: (10, 6), 4: (12, 8)}  # entries of the two banks
    banks = {n: mlp * 64 * 32 + attention * 128 * 32 for n, (mlp, attention) in padded.items()}
    for kind, more, here in (("even step", 0, 0), ("odd step", tables, small)):
        sizes = {n: bank + more for n, bank in banks.items()}  # shared out, unlike `here`
        sent = [f"{4 * (size + here) * 2 * (n - 1) / n / 1e9:.3f}" for n, size in sizes.items()]
        assert rows[f"GB sent, {kind}"] == sent
        updated = [f"{(size / n + here) / 1e6:.1f}" for n, size in sizes.items()]
        assert rows[f"M weights updated, {kind}"] == updated
    stage = "1:1000000:64:8:16:1:0:0"
    many = printed("--stages", stage, "--ngram_rows", "100000001")
    # a token has a row of 32 numbers, which travels and comes back as a gradient
    assert many["GB sent, n-grams of 1,000,000 tokens at most"] == ["0.000", "0.064", "0.048"]
    # 132 bytes a row of the table; and 132 + 128 a token of a rank, but 132 of a single one
    assert [many[name] for name in TABLES] == [["12.29", "6.15", "3.07"], ["0.12", "0.12", "0.06"]]


# Command lines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        (profiler, ["--steps", "0"], "--steps 0 must be positive"),
        (profiler, ["--step", "2"], "unrecognized arguments"),
        (profiler, ["--num_steps", "many"], "'many' cannot be read"),
        (
            bench,
            ["--tokens", "16384,5"],
            "'5' is no sequence of a stage; those are 8192,16384,24576,32768",
        ),
        (bench, ["--steps", "2"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments(tool, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_needs_a_gpu(capsys):
    assert bench.main([]) == 1
    assert "needs a GPU" in capsys.readouterr().err


def profile_run(folder: Path, ranks: int = 1, **changes: object) -> subprocess.CompletedProcess:
    """One step at each of two stages."""
    options = OPTIONS | {
        "stop_step": 13,
        "train_files": folder / "train.bin",
        "sequences_per_step": 1,
    }
    options |= {"model_dim": 16, "head_dim": 8, "ngram_rows": 256}
    options |= {"stages": "1/2:64:48:8:16:1:.25:0,1/2:64:64:16:32:1:0:0"} | changes
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else [])]
    command += [ROOT / "tools" / "profiler.py", "--steps", "1", "--out", folder]
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    command = list(map(str, command))
    how = {"capture_output": True, "text": True, "timeout": 120}
    return subprocess.run(command, check=False, cwd=folder, env=environment(), **how)


def test_profile_on_the_cpu(tmp_path):
    """Real sequences; a table and a trace for each stage, and the tables in the log too."""
    tokens = np.random.default_rng(0).integers(0, 1000, 3000)
    tokens[::30] = START_TOKEN
    write_shard(tmp_path / "train.bin", tokens)
    result = profile_run(tmp_path)
    assert result.returncode == 0, result.stderr
    tables = result.stdout.split("\nstage ")[1:]
    assert [text.split(";")[0] for text in tables] == [
        "1 of 2: sequences of 64 tokens, 1 a process and 1 a pass, windows 8 and 16",
        "2 of 2: sequences of 64 tokens, 1 a process and 1 a pass, windows 16 and 32",
    ]
    for number, text in enumerate(tables, 1):
        lines = (line.rsplit("  ", 1)[0].strip() for line in text.splitlines()[2:-1])
        rows = {line[:22].strip(): line[22:].split() for line in lines}
        ms = {name: float(cells[0]) for name, cells in rows.items()}
        assert list(ms)[1:] == [*(["step", *profiler.GROUPS]), *list(ms)[-4:]]
        assert ms["matmuls"] > 0 and ms["head"] > 0 and ms["communication"] == 0
        parts = sum(ms[name] for name in [*profiler.GROUPS, "less what overlaps", "idle"])
        assert parts == pytest.approx(ms["step"], abs=0.01)
        (path,) = tmp_path.glob(f"*_stage{number}.json.gz")
        assert profiler.read_trace(path).events
        for name in ("lookups", "hashing", "n-gram gather", "optimizer"):
            assert ms[name] > 0, name
        assert ms["unassigned"] == 0
        names = "forward", "backward", "update mlp_bank", "update attention_bank", "update ngrams"
        line = ", ".join(rf"{name} [\d.]+" for name in names)  # an even step
        assert re.search(rf"^by range, ms: {line}$", text, re.MULTILINE)
    (log,) = tmp_path.glob("*.txt")
    assert tables[0].splitlines()[-1] in log.read_text()


def test_profile_of_two_ranks_reports_what_they_send(tmp_path):
    """Next to how long they wait for it. One stage; the sequences are random, and few n-grams."""
    changes = {"sequences_per_step": 2, "stop_step": 1, "mlp_dim": 4096}
    result = profile_run(tmp_path, ranks=2, **changes)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    numbers = r"([\d.]+) GB a rank on even steps, ([\d.]+) GB on odd ones and at most ([\d.]+) GB "
    numbers += r"of n-grams, sent and received; ([\d.]+) ms a step exposed"
    (found,) = re.findall(rf"^communication: {numbers}$", lines[-1])
    even, odd, ngrams, exposed = map(float, found)
    assert ngrams < 0.001  # of 128 tokens
    banks = 10 * 4096 * 16 + 6 * 64 * 16  # 2 n (W - 1)/W of n numbers of 4 bytes are n
    assert even == round(banks * 4e-9, 3)
    assert odd > even + 50_304 * 16 * 4e-9
    (row,) = (line.split() for line in lines if line.startswith("communication exposed"))
    assert float(row[2]) == exposed
    (row,) = (line.split() for line in lines if line.startswith("communication  "))
    assert float(row[1]) > 0


def test_profile_says_what_is_wrong(tmp_path):
    result = profile_run(tmp_path, sequences_per_step=3)
    assert result.returncode == 1
    assert "error: " in result.stderr and "Traceback" not in result.stderr


# Bench --------------------------------------------------------------------------------------------


def test_columns_are_as_wide_as_their_widest_entry():
    rows = [["", "ms", "share"], ["combine", "0.123", "95%"], ["mlp", "11.0", "-"]]
    assert profiler.table(rows) == (
        "            ms  share\ncombine  0.123    95%\nmlp       11.0      -"
    )


def test_figures_count_operations_where_there_are_any():
    matmuls = [(1, 1000, 1000, 500), (2, 10, 10, 10)]
    need = bench.Need(matmuls=matmuls)
    assert need.flops == need.library_flops == 1e9 + 4000
    half = bench.Need(bytes=1, flops=5e8, matmuls=matmuls)  # where half is computed
    assert bench.figures(half, ms=0.002, floor_ms=0.001) == ["0.002", "250 TFLOP/s", "50%"]
    moved = bench.Need(3e9)
    assert bench.figures(moved, ms=1.5, floor_ms=1.0) == ["1.500", "2000 GB/s", "67%"]


@pytest.fixture
def cpu_bench(monkeypatch, tmp_path) -> bench.Bench:
    """Takes everything to last as long, and computes it once."""

    def median_ms(self, run, budget_ms=0):
        run()
        return 2.0

    monkeypatch.setattr(bench.Bench, "median_ms", median_ms)
    monkeypatch.setattr(
        bench.Bench, "captured_ms", lambda self, prepare: median_ms(self, prepare())
    )
    made = bench.Bench(torch.device("cpu"), log=tmp_path / "log.txt")
    made.copy_rate, made.bf16_rate = 1e9, 1e12
    return made


def measured(cpu_bench: bench.Bench, makers: list, capsys: pytest.CaptureFixture) -> list[str]:
    """The lines of a section without failures, all of them with times."""
    cpu_bench.section("title", makers)
    printed = capsys.readouterr().out
    assert cpu_bench.failures == 0, printed
    assert printed == cpu_bench.log.read_text()
    lines = printed.splitlines()[3:]
    assert all(line.split()[-1] in ("2.000", "-") for line in lines)
    return lines


STAGE = Stage(1.0, 512, 48, 8, 24, 1.0, 0.5, 640)  # 8 sequences of 64 tokens, which fit in a pass


@pytest.fixture
def small(monkeypatch) -> pytest.MonkeyPatch:
    """Widths at which the library's fp8 matmul, which is slow on a CPU, does not matter."""
    widths = {"DIM": 64, "HIDDEN": 128, "HEADS": 2, "HEAD_DIM": 16, "WIDTH": 32}
    changes = {"ngram_rows": 64, "tokens_per_sampling": 32}
    widths["CONFIG"] = dataclasses.replace(bench.CONFIG, **changes)
    for name, value in widths.items():
        monkeypatch.setattr(bench, name, value)
    return monkeypatch


def test_operations_of_a_pass_are_measured(cpu_bench, small, capsys):
    """On several short sequences at once, and for the loss on candidates of a part of one;
    quantizing runs in kernels alone, which are too slow here."""
    own = bench.Pass(cpu_bench, STAGE)
    assert (own.sequences, own.T, len(own.batch.tokens), own.batch.sequences) == (8, 512, 512, 8)
    assert str(own) == (
        "8 sequences of 64 tokens a pass, windows 8 and 24, 640 candidates for 32 tokens"
    )
    makers = [maker for maker in own.makers() if maker != own.quantize]
    lines = measured(cpu_bench, makers, capsys)
    names = [line.split("  ")[0] for line in lines]
    assert Counter(names) == {
        "combine, 4 terms": 2, "prepare_qkv, plain": 2, "prepare_qkv, value": 2,
        "prepare_qkv, key offset": 2, "mlp": 2, "attention, short 8": 2, "attention, long 24": 2,
        "sample_candidates": 1, "head_loss": 1, "sort_rows": 1, "add_rows_, embedding": 1,
        "add_rows_, value tables": 1, "add_rows_, candidates": 1, "ngram_hash": 1,
        "update_ngrams_, a step": 1,
    }  # fmt: skip


def test_the_loss_is_that_of_training(cpu_bench, small):
    """Both terms on the candidates of a part of a sequence; in the last stage on all tokens."""
    taken = {}

    def head_loss(x, head, targets, weights, fp8, offsets, shares):
        taken.update(x=x, head=head, targets=targets, weights=weights, offsets=offsets)
        assert (0 < sum(shares)).all() and (sum(shares) < 1).all()
        return [x.sum()]

    for columns, count in ((640, 640), (0, bench.VOCAB)):
        own = bench.Pass(cpu_bench, dataclasses.replace(STAGE, candidates=columns))
        *drawn, loss = own.head()
        assert [case.name for case in drawn] == ["sample_candidates"] * bool(columns)
        loss.call(head_loss, *loss.inputs)
        assert taken["x"].shape == (32, 64) and taken["head"].shape == (count, 64)
        assert taken["weights"].tolist() == [1.0, 0.5]
        targets, given = taken["targets"], own.batch.targets
        assert targets.shape == (32, 3) and 0 <= targets.min() and targets.max() < count
        assert torch.equal(targets[1:, 0], targets[:-1, 1])
        assert (targets[:, 2] == targets[0, 2]).all()  # the copy entry
        if columns:
            assert taken["offsets"].shape == (640,) and taken["offsets"].isfinite().all()
        else:
            assert taken["offsets"] is None and torch.equal(targets[:, 0], given[:32])
        assert loss.needs["both"].flops == 3 * 2 * 32 * count * 64


def test_operations_with_kernels_get_their_fp8_copies(cpu_bench, small):
    """Made once and not when they are timed; those of the inputs and of the weights."""
    own = bench.Pass(cpu_bench, STAGE)
    small.setattr(own, "T", 128)
    with torch.no_grad():
        small.setattr(profiler.train_gpt, "has_kernels", lambda device: True)
        cases = [next(own.prepare_qkv()), next(own.mlp()), [*own.head()][-1]]
    taken = []

    def op(*arguments):
        taken.extend(x for x in arguments if isinstance(x, (QkvFp8, MlpFp8, HeadFp8)))
        return [torch.zeros(1)]

    for case in 2 * cases:
        case.call(op, *case.inputs)
    assert [type(fp8) for fp8 in taken] == 2 * [QkvFp8, MlpFp8, HeadFp8]
    assert all(a is b for a, b in zip(taken, taken[3:]))
    assert taken[0].x[0].shape == taken[1].x[0].shape == (128, 64)
    assert taken[2].weight[0].shape == (640, 64)
    small.setattr(profiler.train_gpt, "has_kernels", lambda device: False)
    cases[0].call(op, *cases[0].inputs)
    assert len(taken) == 6  # a reference takes none


def test_the_key_offset_is_of_a_sequence(cpu_bench, small):
    """And not of a pass, where keys would come from the sequence before."""
    offsets = {}

    def op(x, w_qkv, cos, sin, value, fp8, offset, head_dim):
        offsets[case.name] = offset

    for case in bench.Pass(cpu_bench, STAGE).prepare_qkv():
        case.call(op, *case.inputs)
    assert [*offsets.values()] == [0, 0, 64]


def test_no_operation_of_a_stage_is_measured_twice(cpu_bench):
    """The stages before last differ in their candidates alone, the last one in its windows too."""
    sizes = [bench.Pass(cpu_bench, stage).makers() for stage in bench.STAGES[-3:]]
    named = [{maker.__name__: value for maker, value in own.items()} for own in sizes]
    differ = [{key for key in a if a[key] != b[key]} for a, b in itertools.pairwise(named)]
    assert differ == [{"head"}, {"head", "attention"}]


def test_operations_of_the_optimizer_and_of_validation_are_measured(
    cpu_bench, small, capsys
):  # fmt: skip
    small.setattr(bench, "BLOCKS", {"q, k": (1, 2, 16), "mlp": (2, 1, 80)})
    small.setattr(bench, "CONFIG", tiny_config())
    makers = [partial(maker, cpu_bench) for maker in (bench.normuon, bench.adam, bench.validation)]
    lines = measured(cpu_bench, makers, capsys)
    assert len(lines) == 2 + 2 + 1


def test_bench_continues_after_a_failure(cpu_bench, capsys):
    def broken():
        raise ValueError("no input")
        yield

    def partly():
        x = torch.ones(4)
        yield bench.Case("rms_norm, short", [x], lambda op, x: op(x, 1, 2), forward=8)
        case = bench.Case("rms_norm", [x], forward=8e6)
        case.reference = lambda x: x.no_such_method()
        yield case

    cpu_bench.section("title", [broken, partly])
    printed = capsys.readouterr().out
    assert cpu_bench.failures == 3
    assert "broken: ValueError in" in printed and "no input" in printed
    assert "rms_norm, short forward: TypeError" in printed
    last = printed.splitlines()[-1].split()
    assert last == ["rms_norm", "forward", "2.000", "4", "GB/s", "400%", "failed"]


@pytest.mark.gpu
def test_bench_on_a_gpu(tmp_path):
    assert bench.main(["--tokens", "16384", "--log", str(tmp_path / "log.txt")]) == 0
    assert "passes and optimizer" in (tmp_path / "log.txt").read_text()
