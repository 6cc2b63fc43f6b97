"""Where the time of a step goes: `./run.sh profile [--steps N] [--out DIR] [--option value ...]`.

At every stage of the schedule the trainer's own step (its model, optimizer, graphs and rows) runs a
few times under torch.profiler, on every rank. Rank 0's trace, which Perfetto and Chrome show, goes
to DIR; a table a stage goes to the screen and to the log in DIR. Further options are those of
train_gpt.py. Runs under torchrun too; without a GPU it profiles the operators on the CPU.
`python records/trace.py --volumes [--option value ...]` runs nothing: it computes what the ranks
send and update in a step.
"""

import argparse
import dataclasses
import functools
import glob
import gzip
import itertools
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt
from train_gpt import PARAM_GROUPS, START_TOKEN, Batch, Config, Log, ParamGroup, Runtime

# Group: what the names of its kernels, or of operators on the CPU, hold. The first that fits takes
# it. The library's products for head and optimizer look like all others and count as products.
GROUPS = {
    "communication": r"nccl|c10d::|gloo",
    "optimizer": r"^triton_|_update_ngrams",  # torch.compile's kernels are the optimizer's
    "attention": r"flash|fmha|softmax",
    "head": r"_lse_kernel|_logits_gradient|_targets_kernel|logsumexp",
    "products": r"nvjet|gemm|gemv|cutlass|cublas|splitK|mlp|linear|matmul|einsum|mm(Backward|$)",
    "tables": r"_match_|sort|cub::|gather|scatter|index|embedding|(add_?|table|ngram)rows|cumsum",
    "element-wise": r"elementwise|reduce|combine|prepare_qkv|quantize|Rowwise"
    r"|CatArray|aten::|autograd::",
    "other": r"",
}
TOTAL, OVERLAP, IDLE = "step", "less what overlaps", "idle"
BETWEEN, EXPOSED = "idle between steps", "communication exposed"

Interval = tuple[float, float]  # start and end in ms
Times = dict[str, tuple[float, float]]  # name: ms, and kernels or operators


class Event(NamedTuple):
    """A kernel or copy on the GPU or, without one, an operator."""

    name: str
    start: float
    end: float
    launched: float  # when the host asked for it; -inf where that is not known


def group_of(name: str) -> str:
    return next(g for g, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE))


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """What any of them covers, as separate intervals in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif end > start:
            merged.append((start, end))
    return merged


def covered(intervals: Iterable[Interval]) -> float:
    """How long at least one of them lasts."""
    return sum(end - start for start, end in union(intervals))


def read_trace(path: str | Path) -> tuple[list[Event], list[Interval]]:
    """What ran, of a gzipped Chrome trace, and when the host was in each of its steps."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        records = [record for record in json.load(file)["traceEvents"] if record.get("ph") == "X"]
    launches, steps, kernels, operators = {}, [], [], []
    for record in sorted(records, key=lambda record: record["ts"]):
        kind, correlation = record.get("cat"), record.get("args", {}).get("correlation")
        start, end = record["ts"] / 1000, (record["ts"] + record["dur"]) / 1000
        if kind in ("cuda_runtime", "cuda_driver"):
            launches[correlation] = start
        elif kind == "user_annotation" and re.match(r"step \d+$", record["name"]):
            steps.append((start, end))
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append((record["name"], start, end, correlation))
        elif kind == "cpu_op" and (not operators or start >= operators[-1].end):  # outermost
            operators.append(Event(record["name"], start, end, start))
    found = [Event(*kernel, launches.get(id, -np.inf)) for *kernel, id in kernels]
    return found or operators, steps


def break_down(events: list[Event], steps: list[Interval]) -> Times:
    """Times a step by group, and those of the rows behind the groups.

    steps: when the host was in them. What counts goes from the first event of the second step to
    the first event of the last: steps in full swing, each with the gap behind it.
    """
    own = [[event for event in events if begin <= event.launched < end] for begin, end in steps]
    if len(own) < 3 or not all(own):
        raise RuntimeError(f"the profile shows {sum(map(bool, own))} steps with events, not 3")
    starts = [min(event.start for event in step) for step in own]
    ends = [max(event.end for event in step) for step in own]
    begin, end, count = starts[1], starts[-1], len(steps) - 2
    groups: dict[str, list[Interval]] = {group: [] for group in GROUPS}
    for event in events:
        if event.end > begin and event.start < end:
            span = max(event.start, begin), min(event.end, end)
            groups[group_of(event.name)].append(span)
    spans = list(itertools.chain.from_iterable(groups.values()))
    sums = {TOTAL: (end - begin, len(spans))}
    sums |= {name: (sum(b - a for a, b in own), len(own)) for name, own in groups.items()}
    busy, computing = covered(spans), set(groups) - {"communication"}
    gaps = sum(max(0.0, start - last) for last, start in zip(ends[1:-1], starts[2:]))
    sums[OVERLAP] = busy - sum(b - a for a, b in spans), 0
    sums |= {IDLE: (end - begin - busy, 0), BETWEEN: (gaps, 0)}
    sums[EXPOSED] = busy - covered(span for name in computing for span in groups[name]), 0
    return {name: (ms / count, events / count) for name, (ms, events) in sums.items()}


def profile(
    step: Callable[[], object], count: int, device: torch.device, path: str | Path
) -> Times:
    """break_down of `count` calls of step, and one before and behind; the trace goes to path, a
    .json.gz."""
    kinds, cuda = [torch.profiler.ProfilerActivity.CPU], device.type == "cuda"
    kinds += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    # acc_events: of one cycle nothing is cleared, but torch would warn that it is
    with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:
        for i in range(count + 2):
            with torch.profiler.record_function(f"step {i}"):
                step()
        if cuda:
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(path))
    return break_down(*read_trace(path))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry, the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def stage_table(times: Times, bare_ms: float, runtime: Runtime) -> str:
    """Of rank 0's times and, with more than one rank, the least and the most of all ranks."""
    times = {"step, not profiled": (bare_ms, 0)} | times
    ranks = torch.zeros(runtime.world_size, len(times), dtype=torch.float64)
    ranks[runtime.rank] = torch.tensor([ms for ms, _ in times.values()])
    ranks = runtime.all_reduce(ranks.to(runtime.device)).cpu()
    least, most = ranks.amin(0).tolist(), ranks.amax(0).tolist()
    columns = 6 if runtime.world_size > 1 else 4
    lines = [["", "ms", "share", "count", "least ms", "most ms"]]
    for (name, (ms, count)), low, high in zip(times.items(), least, most):
        share = f"{ms / times[TOTAL][0]:.1%}"
        events = f"{count:.0f}" if count else ""
        lines.append([name, f"{ms:.3f}", share, events, f"{low:.3f}", f"{high:.3f}"])
    return table([line[:columns] for line in lines])


def due(model: train_gpt.GPT, step: int) -> list[tuple[ParamGroup, torch.Tensor]]:
    """What Optimizer.step updates: with the gradient summed over the ranks."""
    groups = [group for group in PARAM_GROUPS if group.is_due(step)]
    return [(group, getattr(model, group.name)) for group in groups]


def sent_bytes(model: train_gpt.GPT, world_size: int, step: int) -> int:
    """What a rank sends in a step, and receives, when its collectives go round a ring.

    Of n bytes on W ranks it sends n (W - 1)/W to reduce-scatter the gradient of a sharded parameter
    and as much to all-gather its new rows, or twice that to all-reduce another one's gradient.
    """
    total = sum(param.nbytes for _, param in due(model, step))
    return 2 * total * (world_size - 1) // world_size


def gathered_bytes(model: train_gpt.GPT, world_size: int, num_tokens: int) -> int:
    """What a rank sends round that ring of n-grams, rows and gradients, in a step of num_tokens."""
    count = num_tokens * len(model.ngrams.orders)
    total = model.ngrams.rows[:count].nbytes + model.ngrams.grads[:count].nbytes
    return total * (world_size - 1) // world_size


def share(group: ParamGroup, amount: int, world_size: int) -> int:
    """What one rank updates of `amount` rows or weights."""
    return amount // world_size if group.sharded else amount


def communication_line(
    model: train_gpt.GPT, world_size: int, num_tokens: int, exposed_ms: float
) -> str:
    ngrams = gathered_bytes(model, world_size, num_tokens)
    even, odd = ((sent_bytes(model, world_size, i) + ngrams) / 1e9 for i in (0, 1))
    sent = f"{even:.3f} GB a rank on even steps, {odd:.3f} GB on odd ones"
    return f"communication: {sent}, sent and received; {exposed_ms:.3f} ms a step exposed"


def volumes(config: Config) -> str:
    """What a rank updates and sends in a step, for every number of ranks that divides the rows.

    Rows are those of a table, matrices of a bank, or the single numbers of `small`.
    """
    train_gpt.check_config(config, 1)
    models = {}
    for world_size in range(1, config.rows_per_step + 1):
        if config.rows_per_step % world_size == 0:
            with FakeTensorMode():  # shapes without memory
                runtime = Runtime(0, world_size, torch.device("cpu"), Log(None))
                models[world_size] = train_gpt.GPT(config, runtime)  # pads its banks for them
    lines = [["ranks", "every", "MB", *map(str, models)]]
    for group in PARAM_GROUPS:
        params = {n: getattr(model, group.name) for n, model in models.items()}
        rows = (f"{share(group, param.size(0), n):,}" for n, param in params.items())
        megabytes = f"{params[1].nbytes / 1e6:,.1f}"
        lines.append([f"rows of {group.name}", str(group.every), megabytes, *rows])
    kinds = "even step", "odd step"
    for step, kind in enumerate(kinds):
        updated = (
            sum(share(group, param.numel(), n) for group, param in due(model, step))
            for n, model in models.items()
        )
        lines.append([f"M weights updated, {kind}", "", "", *(f"{n / 1e6:.1f}" for n in updated)])
    for step, kind in enumerate(kinds):
        sent = (sent_bytes(model, n, step) / 1e9 for n, model in models.items())
        lines.append([f"GB sent, {kind}", "", "", *(f"{size:.3f}" for size in sent)])
    for count in sorted({stage.tokens_per_step for stage in config.stages}):
        sent = (gathered_bytes(model, n, count) / 1e9 for n, model in models.items())
        kind = f"n-grams of {count:,} tokens"
        lines.append([f"GB sent, {kind}", "", "", *(f"{size:.3f}" for size in sent)])
    return table(lines)


def random_batch(
    random: np.random.Generator, num_tokens: int, max_seq_len: int, count: int, config: Config,
    pin: bool,
) -> Batch:  # fmt: skip
    """Rows of random documents of a few hundred tokens; a token is as rare as its id is high."""
    longest, rows = min(max_seq_len, 1024), []
    for _ in range(count):
        tokens = train_gpt.random_tokens(random, num_tokens + 1)
        lengths = random.integers(longest // 4, longest + 1, 4 * num_tokens // longest + 4)
        starts = np.concatenate([[0], lengths.cumsum()])
        tokens[starts[starts <= num_tokens]] = START_TOKEN
        rows.append((tokens, starts))
    return train_gpt.make_batch(rows, max_seq_len, config.min_mean_doc_len, pin)


def rows_like(config: Config, runtime: Runtime, shapes: Iterable[tuple[int, int]]) -> Iterator:
    """Rows of steps from the training files or, where there are none, random ones."""
    pin, random = runtime.device.type == "cuda", np.random.default_rng(runtime.rank)
    if glob.glob(config.train_files):
        return train_gpt.training_rows(config, runtime, shapes)
    runtime.log.line(f"no file matches --train_files {config.train_files}: the rows are random")

    def step(shape: tuple[int, int]) -> list[Batch]:
        count = config.rows_per_pass(shape[0], runtime.world_size)
        passes = range(config.rows_per_step // (runtime.world_size * count))
        return [random_batch(random, *shape, count, config, pin) for _ in passes]

    return map(step, shapes)


def profile_stages(config: Config, runtime: Runtime, count: int) -> None:
    """Build what train() builds and profile `count` steps at the beginning of every stage."""
    trainer = train_gpt.Trainer(train_gpt.GPT(config, runtime), runtime)
    trainer.prepare()
    log, schedule = runtime.log, trainer.schedule

    begins = [step for step in sorted({0, *schedule.stage_ends}) if step < schedule.end_step]
    warm_up = 2
    shapes = (
        schedule.row_shape(begin) for begin in begins for _ in range(warm_up + count + count + 2)
    )
    rows, updates = train_gpt.ahead(rows_like(config, runtime, shapes), depth=2), itertools.count()

    def run(begin: int) -> None:
        trainer.run_step(begin, next(rows), next(updates))

    for number, begin in enumerate(begins, 1):
        for _ in range(warm_up):
            run(begin)
        runtime.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            run(begin)
        runtime.synchronize()
        bare_ms = 1000 * (time.perf_counter() - started) / count
        path = Path(config.log_dir, f"{log.data['run_id']}_stage{number}.json.gz")
        times = profile(functools.partial(run, begin), count, runtime.device, path)
        if not runtime.is_main:
            path.unlink()
        length, own = schedule.row_shape(begin)[0], config.rows_per_step // runtime.world_size
        at_once = config.rows_per_pass(length, runtime.world_size)
        rows_are = f"{own} x {length:,} tokens a process, {at_once} at once"
        rows_are += f", {schedule.describe(begin)}"
        log.line(f"\nstage {number} of {len(begins)}: {rows_are}; {path}")
        log.line(stage_table(times, bare_ms, runtime))
        if runtime.world_size > 1:
            sizes = runtime.world_size, schedule.stage(begin).tokens_per_step
            log.line(communication_line(trainer.model, *sizes, times[EXPOSED][0]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="./run.sh profile",
        description=__doc__.split("\n")[0],
        epilog="All other options are those of train_gpt.py.",
        allow_abbrev=False,
    )
    text = "steps profiled at every stage [4]; even, as every other one updates the embeddings too"
    parser.add_argument("--steps", type=int, default=4, metavar="N", help=text)
    parser.add_argument("--out", metavar="DIR", help="folder of traces and log [logs]")
    text = "compute what a rank updates and sends in a step, by their number; runs nothing"
    parser.add_argument("--volumes", action="store_true", help=text)
    args, others = parser.parse_known_args(arguments)
    if args.steps < 1:
        parser.error(f"--steps {args.steps} must be positive")
    config = train_gpt.parse_args(others)
    config = dataclasses.replace(config, log_dir=args.out or config.log_dir, repeat_data=True)
    store = None
    try:
        if args.volumes:
            print(volumes(config))
            return 0
        store = train_gpt.connect()
        profile_stages(config, train_gpt.start_runtime(config, store), args.steps)
        if store is not None:
            dist.destroy_process_group()
        return 0
    except train_gpt.UserError as error:
        message = f"error: {error}"
    except Exception:  # noqa: BLE001 (reported with its traceback)
        message = traceback.format_exc()
    if train_gpt.speaks_for_error(store):
        print("\n" + message, file=sys.stderr, flush=True)
    os._exit(1)  # at once: other ranks may be waiting for this one in a collective


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    os._exit(exit_code)  # at once: torch's own threads have aborted a process that wound itself up
