"""Where the time of a step goes: `./run.sh profile [--steps N] [--out DIR] [--option value ...]`.

At every stage of the schedule the trainer's own step (its model, optimizer, graphs and sequences)
runs a few times under torch.profiler, on every rank. Rank 0's trace, which Perfetto and Chrome
show, goes to DIR; a table a stage goes to the screen and to the log in DIR. Further options are
those of train_gpt.py. Runs under torchrun too; without a GPU it profiles the operators on the CPU.
`python tools/profiler.py --volumes [--option value ...]` runs nothing: it computes what the ranks
send and update in a step.

A kernel counts to the range of train_gpt.py that launched it and, in forward and backward pass, by
its name. A CUDA graph is one launch for a thousand kernels, so a pass of every stage runs once
under the profiler without its graph, and what a graph replays is told from that pass.
"""

import argparse
import bisect
import collections
import dataclasses
import functools
import gzip
import itertools
import json
import math
import operator
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import console

if __name__ == "__main__":
    console.end_on_signals()

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt
from train_gpt import (
    PARAM_GROUPS,
    START_TOKEN,
    Batch,
    Config,
    Log,
    ParamGroup,
    Runtime,
    TrainFiles,
)

# The ranges that train_gpt.py records: the two of a pass, those of what an update does, and others,
# which are a group each.
PASS = "forward", "backward"
UPDATES = *(f"update {group.name}" for group in PARAM_GROUPS), "update ngrams"
OTHERS = "hashing", "lookups", "candidates", "pointer", "n-gram gather", "n-gram exchange"
OTHERS = *OTHERS, "matches", "optimizer", "fp8 refresh"
RANGES = {*PASS, *UPDATES, *OTHERS, "reductions"}

# Group of a pass: what the names of its kernels, or of operators on the CPU, hold. The first that
# fits takes it.
KINDS = {
    "attention": r"flash|fmha|softmax",
    "head": r"_lse_kernel|_logits_gradient|_targets_kernel|_mixture_kernel|_pointer_|logsumexp",
    "matmuls": r"nvjet|gemm|gemv|cutlass|cublas|splitK|mlp|linear|matmul|einsum|mm(Backward|$)",
    "tables": r"_match_|sort|cub::|gather|scatter|index|embedding|(add_?|table|ngram)rows|cumsum",
    "element-wise": r"^triton_|elementwise|reduce|combine|prepare_qkv|quantize|Rowwise"
    r"|CatArray|aten::|autograd::",
    "other": r"",
}
COMMUNICATION, UNASSIGNED = "communication", "unassigned"  # the latter: no range is known
GROUPS = COMMUNICATION, *OTHERS[:4], *KINDS, *OTHERS[4:], UNASSIGNED
TOTAL, OVERLAP, IDLE = "step", "less what overlaps", "idle"
BETWEEN, EXPOSED = "idle between steps", "communication exposed"

Interval = tuple[float, float]  # start and end in ms
Times = dict[str, tuple[float, float]]  # name: ms, and kernels or operators


Shape = tuple[str, ...]  # what tells a kernel from others: its name, grid, block, and bytes copied


class Event(NamedTuple):
    """A kernel or copy on the GPU or, without one, an operator."""

    name: str
    start: float
    end: float
    launched: float  # when the host asked for it; -inf where that is not known
    range: str | None = ""  # the innermost one; "" outside of all, None where that is not known


def group_of(name: str, range_name: str | None = "") -> str:
    if re.search(r"nccl|c10d::|gloo", name, re.IGNORECASE):
        return COMMUNICATION
    if range_name is None:
        return UNASSIGNED
    if range_name in OTHERS:
        return range_name
    if range_name in RANGES.difference(PASS):
        return "optimizer"
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))


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


class Ranges:
    """What was the innermost recorded range when."""

    def __init__(self, recorded: Iterable[tuple[int, float, float, str]]):
        """recorded: thread, start, end, and name of each."""
        self.edges: dict[int, list[tuple[float, str]]] = {}  # from when on it is which
        of_thread = operator.itemgetter(0)
        for thread, ranges in itertools.groupby(sorted(recorded), of_thread):
            edges, around = self.edges.setdefault(thread, []), [(math.inf, "")]
            ranges = sorted(ranges, key=lambda item: (item[1], -item[2]))
            for _, start, end, name in [*ranges, (thread, math.inf, math.inf, "")]:
                while around[-1][0] <= start and len(around) > 1:
                    closed, _ = around.pop()
                    edges.append((closed, around[-1][1]))
                around.append((end, name))
                edges.append((start, name))

    def at(self, thread: int, moment: float) -> str:
        """Of this thread or, as autograd's own thread has none, of another one then; "" in none."""
        for edges in [self.edges.get(thread, []), *self.edges.values()]:
            place = bisect.bisect_right(edges, moment, key=operator.itemgetter(0))
            if place and edges[place - 1][1]:
                return edges[place - 1][1]
        return ""


def outermost(operators: Iterable[Event]) -> list[Event]:
    """Of operators in the order of their starts those that are in no other one of their range; what
    is around another range is cut in two."""
    found: list[Event] = []
    for event in operators:
        if not found or event.start >= found[-1].end:
            found.append(event)
        elif event.start >= found[-1].start and event.range != found[-1].range:
            around = found.pop()
            found += around._replace(end=event.start), event, around._replace(start=event.end)
    return found


class Trace(NamedTuple):
    """What ran, and when the host was in each of its steps."""

    events: list[Event]
    steps: list[Interval]
    shapes: list[Shape]  # of the events
    graphs: list[object]  # the launch that replayed each event; None for others


def read_trace(path: str | Path) -> Trace:
    """Of a gzipped Chrome trace."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        records = [record for record in json.load(file)["traceEvents"] if record.get("ph") == "X"]
    launches, callers, recorded, steps, kernels, operators = {}, {}, [], [], [], []
    for record in sorted(records, key=lambda record: (record["ts"], -record["dur"])):
        kind, name, args = record.get("cat"), record.get("name"), record.get("args", {})
        start, end = record["ts"] / 1000, (record["ts"] + record["dur"]) / 1000
        thread = record.get("tid")
        if kind in ("cuda_runtime", "cuda_driver"):
            launches[args.get("correlation", name)] = name, thread, start
        elif kind == "user_annotation" and re.match(r"step \d+$", name):
            steps.append((start, end))
        elif kind == "user_annotation" and name in RANGES:
            recorded.append((thread, start, end, name))
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append((name, start, end, args))
        elif kind == "cpu_op":
            operators.append((name, start, end, thread))
            callers.setdefault(args.get("External id", name), (name, thread, start))
    ranges, trace = Ranges(recorded), Trace([], steps, [], [])
    for name, start, end, args in kernels:
        correlation = args.get("correlation")
        launch = launches.get(correlation) or callers.get(args.get("External id"))
        by, thread, launched = launch or ("", None, -math.inf)
        replayed = "GraphLaunch" in by
        known = ranges.at(thread, launched) if launch and not replayed else None
        trace.events.append(Event(name, start, end, launched, known))
        trace.shapes.append((name, *(str(args.get(key)) for key in ("grid", "block", "bytes"))))
        trace.graphs.append(correlation if replayed else None)
    if not kernels:
        events = (
            Event(name, start, end, start, ranges.at(thread, start))
            for name, start, end, thread in operators
        )
        trace.events.extend(outermost(events))
    return trace


def name_replayed(trace: Trace, eager: Trace | None) -> tuple[list[Event], str]:
    """The events with ranges for what graphs replayed, from the trace of such a pass without its
    graph, and a line about what the two do not share, or an empty one.

    Both run the same kernels, but side streams may interleave in another order: the k-th kernel of
    a name and shape belongs where the k-th in the eager pass does. Where they are not as many,
    those that come in one range alone belong there, and others stay unassigned.
    """
    ranges, of_name = collections.defaultdict(list), collections.defaultdict(set)
    for event, shape in zip(eager.events, eager.shapes) if eager else ():
        if event.range:  # what is outside of all, such as copies of inputs, is not in the graph
            ranges[shape].append(event.range)
            of_name[event.name].add(event.range)
    events, differences = [*trace.events], {}
    replays = collections.defaultdict(lambda: collections.defaultdict(list))
    for i, (shape, graph) in enumerate(zip(trace.shapes, trace.graphs)):
        if graph is not None:
            replays[graph][shape].append(i)
    for replay in replays.values():
        for shape in {**ranges, **replay}:
            places, known = replay.get(shape, []), ranges.get(shape, [])
            if len(places) != len(known):
                differences[shape] = f"{shape[0][:60]} {len(places)} for {len(known)} times"
                only = {*known} or of_name.get(shape[0], set())
                known = [*only] * len(places) if len(only) == 1 else [None] * len(places)
            for place, range_name in zip(places, known):
                events[place] = events[place]._replace(range=range_name)
    if replays and eager is None:
        return events, "no pass without its graph was profiled"
    shown = [*differences.values()][:3]
    shown += [f"{len(differences) - 3} more"] if len(differences) > 3 else []
    line = "graphs replay other kernels than the pass without one: " + ", ".join(shown)
    return events, line if differences else ""


def break_down(events: list[Event], steps: list[Interval]) -> Times:
    """Times a step by group, those of the lines behind the groups, and those of PASS and UPDATES.

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
    parts: dict[str, list[Interval]] = {name: [] for name in (*PASS, *UPDATES)}
    for event in events:
        if event.end > begin and event.start < end:
            span = max(event.start, begin), min(event.end, end)
            groups[group_of(event.name, event.range)].append(span)
            if event.range in parts:
                parts[event.range].append(span)
    spans = list(itertools.chain.from_iterable(groups.values()))
    sums = {TOTAL: (end - begin, len(spans))}
    sums |= {name: (sum(b - a for a, b in own), len(own)) for name, own in groups.items()}
    busy, computing = covered(spans), set(groups) - {COMMUNICATION}
    gaps = sum(max(0.0, start - last) for last, start in zip(ends[1:-1], starts[2:]))
    sums[OVERLAP] = busy - sum(b - a for a, b in spans), 0
    sums |= {IDLE: (end - begin - busy, 0), BETWEEN: (gaps, 0)}
    sums[EXPOSED] = busy - covered(span for name in computing for span in groups[name]), 0
    sums |= {name: (sum(b - a for a, b in own), len(own)) for name, own in parts.items()}
    return {name: (ms / count, events / count) for name, (ms, events) in sums.items()}


def write_trace(run: Callable[[], object], device: torch.device, path: str | Path) -> None:
    """Of what run does, as a .json.gz."""
    kinds, cuda = [torch.profiler.ProfilerActivity.CPU], device.type == "cuda"
    kinds += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    # acc_events: of one cycle nothing is cleared, but torch would warn that it is
    with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(path))


def eager_trace(trainer: train_gpt.Trainer, batch: Batch, stage: train_gpt.Stage) -> Trace | None:
    """Of a pass without its graph, for name_replayed; None where there are no graphs. It needs the
    memory of one: call it before there are any."""
    if not trainer.uses_graphs:
        return None
    run = functools.partial(trainer.warm_up, batch, stage)
    run()  # compiles
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "eager.json.gz")
        write_trace(run, trainer.runtime.device, path)
        return read_trace(path)


def profile(
    step: Callable[[], object], count: int, device: torch.device, path: str | Path,
    eager: Trace | None = None,
) -> tuple[Times, str]:  # fmt: skip
    """break_down of `count` calls of step, and one before and behind, and a line about kernels that
    no range is known of, or an empty one. The trace goes to path, a .json.gz; eager: as
    name_replayed takes it."""

    def run() -> None:
        for i in range(count + 2):
            with torch.profiler.record_function(f"step {i}"):
                step()

    write_trace(run, device, path)
    trace = read_trace(path)
    events, line = name_replayed(trace, eager)
    times = break_down(events, trace.steps)
    unassigned = times[UNASSIGNED][1]
    if unassigned:
        line = f"{unassigned:.0f} kernels a step unassigned: {line or 'their launch is not known'}"
    return times, line


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
        if name in (*PASS, *UPDATES):
            continue
        share = f"{ms / times[TOTAL][0]:.1%}"
        events = f"{count:.0f}" if count else ""
        lines.append([name, f"{ms:.3f}", share, events, f"{low:.3f}", f"{high:.3f}"])
    return table([line[:columns] for line in lines])


def ranges_line(times: Times) -> str:
    """What stands behind the groups: of a pass without lookups, hashing and candidates."""
    shown = (f"{name} {times[name][0]:.3f}" for name in (*PASS, *UPDATES) if times[name][1])
    return f"by range, ms: {', '.join(shown)}"


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


def exchanged_bytes(model: train_gpt.GPT, world_size: int, num_tokens: int) -> int:
    """What a rank sends of n-grams in a step of num_tokens, rows and gradients, if no n-gram comes
    twice and all ranks own as many; of those that come again less. Row numbers are not sent."""
    ngrams = model.ngrams
    rows = num_tokens // world_size * len(ngrams.orders)
    return 2 * rows * ngrams.table[0].nbytes * (world_size - 1) // world_size


def share(group: ParamGroup, amount: int, world_size: int) -> int:
    """What one rank updates of `amount` rows or weights."""
    return amount // world_size if group.sharded else amount


def communication_line(
    model: train_gpt.GPT, world_size: int, num_tokens: int, exposed_ms: float
) -> str:
    even, odd = (sent_bytes(model, world_size, i) / 1e9 for i in (0, 1))
    ngrams = exchanged_bytes(model, world_size, num_tokens) / 1e9
    sent = f"{even:.3f} GB a rank on even steps, {odd:.3f} GB on odd ones"
    sent += f" and at most {ngrams:.3f} GB of n-grams"
    return f"communication: {sent}, sent and received; {exposed_ms:.3f} ms a step exposed"


def volumes(config: Config) -> str:
    """What a rank updates and sends in a step, for every number of ranks that divides the rows.

    Rows are those of a table, matrices of a bank, or the single numbers of `small`.
    """
    train_gpt.check_config(config, 1)
    models = {}
    for world_size in range(1, config.sequences_per_step + 1):
        if config.sequences_per_step % world_size == 0:
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
        sent = (exchanged_bytes(model, n, count) / 1e9 for n, model in models.items())
        kind = f"n-grams of {count:,} tokens at most"
        lines.append([f"GB sent, {kind}", "", "", *(f"{size:.3f}" for size in sent)])
    tables = [model.ngrams for model in models.values()]
    gib = (f"{(x.table.nbytes + x.sum_squares.nbytes) / 2**30:.2f}" for x in tables)
    lines.append(["GiB of n-grams", "", "", *gib])
    gib = (f"{(x.pulled.nbytes + x.grads.nbytes + x.rows.nbytes) / 2**30:.2f}" for x in tables)
    lines.append(["GiB of a step's n-grams", "", "", *gib])
    return table(lines)


def random_batch(
    random: np.random.Generator, num_tokens: int, max_seq_len: int, count: int, config: Config,
    runtime: Runtime,
) -> Batch:  # fmt: skip
    """`count` sequences a rank of random documents of a few hundred tokens; a token is as rare as
    its id is high. All ranks give generators in one state."""
    longest, sequences = min(max_seq_len, 1024), []
    for _ in range(count * runtime.world_size):
        tokens = train_gpt.random_tokens(random, num_tokens + 1)
        lengths = random.integers(longest // 4, longest + 1, 4 * num_tokens // longest + 4)
        starts = np.concatenate([[0], lengths.cumsum()])
        tokens[starts[starts <= num_tokens]] = START_TOKEN
        sequences.append((tokens, starts))
    return train_gpt.rank_batches(sequences, count, max_seq_len, config, runtime)[0]


def find_train_files(config: Config, log: Log) -> TrainFiles | None:
    """The shards to profile with; None if no file matches, which the log then says."""
    try:
        train_gpt.find_files("--train_files", config.train_files)
    except train_gpt.UserError:
        looked_up = ", and none is looked up" if config.match_shards else ""
        random = f"the text is random{looked_up}"
        log.line(f"no file matches --train_files {config.train_files}: {random}")
        return None
    return train_gpt.find_train_files(config)


def batches_like(
    config: Config, runtime: Runtime, shapes: Iterable[tuple[int, int]], files: TrainFiles | None
) -> Iterator[list[Batch]]:
    """Batches of steps from the training files or, where there are none, random ones."""
    if files is not None:
        return train_gpt.training_batches(config, runtime, shapes, files=files)
    random = np.random.default_rng(0)

    def step(shape: tuple[int, int]) -> list[Batch]:
        count = config.sequences_per_pass(shape[0], runtime.world_size)
        passes = range(config.sequences_per_step // (runtime.world_size * count))
        return [random_batch(random, *shape, count, config, runtime) for _ in passes]

    return map(step, shapes)


def profile_stages(config: Config, runtime: Runtime, count: int) -> None:
    """Build what train() builds and profile `count` steps at the beginning of every stage. Beside
    those of stage 1 shards that are only looked up are inserted, as in training, while there are
    any."""
    files = find_train_files(config, runtime.log)
    trainer = train_gpt.Trainer(train_gpt.GPT(config, runtime), runtime)
    log, schedule, random = runtime.log, trainer.schedule, np.random.default_rng(0)
    begins = [step for step in sorted({0, *schedule.stage_ends}) if step < schedule.end_step]
    own, eager = config.sequences_per_step // runtime.world_size, []
    for begin in begins:
        shape = schedule.sequence_shape(begin)
        at_once = config.sequences_per_pass(shape[0], runtime.world_size)
        batch = trainer.with_matches(random_batch(random, *shape, at_once, config, runtime))
        eager.append(eager_trace(trainer, batch, schedule.stage(begin)))
    trainer.prepare()
    if files is not None and files.looked_up:
        trainer.begin_insertion(files.looked_up)

    warm_up = 2
    steps = warm_up + count + count + 2
    shapes = (schedule.sequence_shape(begin) for begin in begins for _ in range(steps))
    batches = train_gpt.prefetch(batches_like(config, runtime, shapes, files), depth=2)
    updates, ahead = itertools.count(), next(batches)

    def run(begin: int) -> None:
        nonlocal ahead
        of_step, ahead = ahead, next(batches, None)
        trainer.run_step(begin, of_step, next(updates), ahead)

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
        step = functools.partial(run, begin)
        times, line = profile(step, count, runtime.device, path, eager[number - 1])
        if not runtime.is_main:
            path.unlink()
        length = schedule.sequence_shape(begin)[0]
        at_once = config.sequences_per_pass(length, runtime.world_size)
        sequences = f"sequences of {length:,} tokens, {own} a process and {at_once} a pass"
        sequences += f", {schedule.describe(begin)}"
        if trainer.pieces_per_step:
            pieces = f"{trainer.pieces_per_step} of {train_gpt.PIECE_TOKENS:,} tokens"
            sequences += f", pieces inserted beside a step, while there are any: {pieces}"
            trainer.pieces, trainer.pieces_per_step = iter(()), 0  # in stage 1 alone
        log.line(f"\nstage {number} of {len(begins)}: {sequences}; {path}")
        log.line(stage_table(times, bare_ms, runtime))
        log.line(ranges_line(times))
        if line:
            log.line(line)
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
    train_gpt.open_streams()
    config = train_gpt.parse_args(others)
    config = dataclasses.replace(config, log_dir=args.out or config.log_dir, repeat_data=True)
    store = None
    try:
        if args.volumes:
            print(volumes(config))
            return 0
        train_gpt.end_with_launcher()
        store = train_gpt.connect()
        profile_stages(config, train_gpt.start_runtime(config, store), args.steps)
        if store is not None:
            dist.destroy_process_group()
        return 0
    except train_gpt.UserError as error:
        message = f"error: {error}"
    except Exception:  # noqa: BLE001 (reported with its traceback)
        message = traceback.format_exc()
    if train_gpt.first_error(store, message)[0]:
        print("\n" + message, file=sys.stderr, flush=True)
    os._exit(1)  # at once: other ranks may be waiting for this one in a collective


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    os._exit(exit_code)  # at once: torch's own threads have aborted a process that wound itself up
