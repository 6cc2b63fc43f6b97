"""Every operation of train_gpt.py beside what this GPU can do: `./run.sh bench [--tokens LIST]`.

A time is the median of some runs on random data, each behind a read of more than the L2 holds.
Operations replay from a CUDA graph; their plain twins run eagerly. Rates count what must be
computed or moved, each input and output once. The share is of a ceiling measured in the same run:
the library's product of the same shape and dtype, for attention the large bf16 product, else a
copy. The head's backward is part of its forward.
"""

import argparse
import contextlib
import functools
import itertools
import math
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from profiler import GROUPS, IDLE, profile, random_batch, table
from torch import Tensor

import train_gpt
from train_gpt import E4M3, Config, Log, Runtime, Stage

CONFIG = Config()
DIM, HIDDEN = CONFIG.model_dim, CONFIG.mlp_dim
HEADS, HEAD_DIM, WIDTH = CONFIG.num_heads, CONFIG.head_dim, CONFIG.attention_dim
VOCAB, BF16, FP32 = CONFIG.padded_vocab_size, torch.bfloat16, torch.float32
STAGES = {stage.tokens_per_step // CONFIG.rows_per_step: stage for stage in CONFIG.stages}
# NorMuon's on one GPU: entries of a bank, matrices of an entry, their rows
LAYERS = len(CONFIG.layers)
BLOCKS = {"q, k": (LAYERS, HEADS, 2 * HEAD_DIM), "v, o": (LAYERS, 2, WIDTH)}
BLOCKS["mlp"] = 2 * LAYERS, 1, HIDDEN


@dataclass
class Need:
    """What an operation cannot do without."""

    bytes: float = 0
    flops: float = 0  # 0: those of the products
    products: Sequence[tuple[int, int, int, int]] = ()  # batch, rows, columns, inner
    dtype: torch.dtype = BF16  # of their factors

    def __post_init__(self):
        self.library_flops = sum(2 * math.prod(product) for product in self.products)
        self.flops = self.flops or self.library_flops


class Case:
    """An operation on some inputs. Those that require gradients get one in the backward.

    name: of the function in train_gpt, a comma, and what else tells the case from others. call:
    how the function, or its twin, takes the inputs. needs: a Need, or bytes, for each direction:
    forward, backward, or both at once.
    """

    def __init__(self, name: str, inputs: list[Tensor], call=None, **needs):
        self.op = getattr(train_gpt, name.split(",")[0])
        # without kernels, and not compiled; None: it has none
        self.twin = getattr(self.op, "__wrapped__", self.op)
        self.name, self.inputs = name, inputs
        self.call = call or (lambda op, *inputs: op(*inputs))
        self.needs = {key: n if isinstance(n, Need) else Need(n) for key, n in needs.items()}

    def prepare(self, op: Callable, direction: str) -> Callable[[], object]:
        """What is to be timed; for a backward the forward runs here."""
        wanted = [x for x in self.inputs if x.requires_grad]
        forward = functools.partial(self.call, op, *self.inputs)
        if direction == "forward":
            return torch.no_grad()(forward)
        if direction == "both":
            return lambda: torch.autograd.grad(forward(), wanted)
        outputs = forward()
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        grads = [1e-3 * torch.randn_like(output) for output in outputs]  # as fp8 expects them
        how = {"retain_graph": True, "allow_unused": True}
        return lambda: torch.autograd.grad(outputs, wanted, grads, **how)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Operations are their plain twins."""
    kept, train_gpt.has_kernels = train_gpt.has_kernels, lambda device: False
    try:
        yield
    finally:
        train_gpt.has_kernels = kept


def figures(need: Need, ms: float, floor_ms: float) -> list[str]:
    """Time, rate, and share of the ceiling."""
    amount, unit = (need.flops, "TFLOP/s") if need.flops else (1000 * need.bytes, "GB/s")
    return [f"{ms:.3f}", f"{amount / ms / 1e9:.0f} {unit}", f"{floor_ms / ms:.0%}"]


class Bench:
    """Measures cases, prints and keeps the lines, and goes on behind what fails."""

    def __init__(self, device: torch.device, log: Path | None = None):
        self.device, self.log, self.failures = device, log, 0
        self.copy_rate, self.bf16_rate = math.nan, math.nan  # bytes and operations a second
        self.more_than_l2 = torch.zeros(2**26, device=device)  # 256 MiB

    def line(self, text: str) -> None:
        print(text, flush=True)
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 (whatever it is, the rest goes on)
            self.failures += 1
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
            self.line(f"{what}: {type(error).__name__} in {places}: {str(error)[:500]}")

    def random(self, *shape: int, dtype=BF16, std: float = 1.0, grad: bool = False) -> Tensor:
        drawn = dtype if dtype.is_floating_point else FP32
        values = torch.randn(shape, dtype=drawn, device=self.device).mul_(std)
        return values.to(dtype).requires_grad_(grad)

    def median_ms(self, run: Callable[[], object], budget_ms: float = 20) -> float:
        def times(count: int) -> list[float]:
            events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(count)]
            for begin, end in events:
                self.more_than_l2.sum()
                begin.record()
                run()
                end.record()
            torch.cuda.synchronize()
            return [begin.elapsed_time(end) for begin, end in events]

        count = budget_ms / max(min(times(2)), 0.01)
        return float(np.median(times(max(3, min(50, int(count))))))

    def captured_ms(self, prepare: Callable[[], Callable[[], object]]) -> float:
        """Of what prepare gives, replayed from a graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a backward runs on the stream of its forward
            run = prepare()
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
        return self.median_ms(graph.replay)

    @functools.cache  # noqa: B019 (as long as the bench)
    def library_ms(self, batch: int, rows: int, columns: int, inner: int, dtype) -> float:
        a, b = self.random(batch, rows, inner), self.random(batch, columns, inner)
        if batch == 1:
            a, b = a[0], b[0]
        if dtype == E4M3:
            a, b, unit = a.to(E4M3), b.to(E4M3), torch.ones(4, device=self.device)
            a, b = train_gpt.Fp8(a, None, unit), train_gpt.Fp8(b, None, unit)
            return self.captured_ms(lambda: lambda: train_gpt.fp8_product(a, b))
        return self.captured_ms(lambda: lambda: a @ b.mT)

    def measure_ceilings(self) -> None:
        with self.attempt("copy"):
            a = self.random(2**28, dtype=FP32)
            b = torch.empty_like(a)
            # by the driver and by a kernel: now the one is faster, now the other
            copies = (lambda: b.copy_(a)), (lambda: torch.neg(a, out=b))
            fastest_ms = min(self.captured_ms(lambda copy=copy: copy) for copy in copies)
            self.copy_rate = 2000 * a.nbytes / fastest_ms
            self.line(f"copy of 1 GiB, read and written: {self.copy_rate / 1e12:.2f} TB/s")
        for name, dtype in ("fp8", E4M3), ("bf16", BF16):
            with self.attempt(name):
                self.bf16_rate = 2000 * 8192**3 / self.library_ms(1, 8192, 8192, 8192, dtype)
                self.line(f"{name} product of 8192^3: {self.bf16_rate / 1e12:.0f} TFLOP/s")

    def twin_ms(self, case: Case, direction: str) -> str:
        """'-' where there is none, or it is too large for the memory."""
        if case.twin is None:
            return "-"
        try:
            with without_kernels():
                return f"{self.median_ms(case.prepare(case.twin, direction)):.3f}"
        except torch.OutOfMemoryError:
            return "-"

    def row(self, case: Case, direction: str) -> list[str]:
        """A line of the table. Twins come last: some change their inputs."""
        need, prepare = case.needs[direction], functools.partial(case.prepare, case.op, direction)
        ms = self.captured_ms(prepare)
        floor_ms = 1000 * max(need.bytes / self.copy_rate, need.flops / self.bf16_rate)
        if need.products:
            library_ms = sum(self.library_ms(*product, need.dtype) for product in need.products)
            floor_ms = library_ms * need.flops / need.library_flops
        twin_ms = "failed"
        with self.attempt(f"twin of {case.name} {direction}"):
            twin_ms = self.twin_ms(case, direction)
        return [case.name, direction, *figures(need, ms, floor_ms), twin_ms]

    def section(self, title: str, makers: list[Callable[[], Iterator[Case]]]) -> None:
        rows = [["", "direction", "ms", "rate", "share", "twin ms"]]
        for maker in makers:
            with self.attempt(getattr(maker, "__name__", title)):
                for case in maker():
                    for direction in case.needs:
                        with self.attempt(f"{case.name} {direction}"):
                            rows.append(self.row(case, direction))
                    torch.cuda.empty_cache()
        self.line(f"\n{title}\n{table(rows)}")


# Operations on a row of tokens --------------------------------------------------------------------


class Row:
    """A random row of a stage and the operations on it."""

    def __init__(self, bench: Bench, stage: Stage, num_tokens: int):
        self.device, self.random, self.stage, self.T = bench.device, bench.random, stage, num_tokens
        random = np.random.default_rng(num_tokens)
        batch = random_batch(random, num_tokens, stage.max_seq_len, 1, CONFIG, False)
        self.batch = train_gpt.to_device(batch, bench.device)
        self.stream = 2 * num_tokens * DIM  # bytes in bf16

    def makers(self) -> list[Callable[[], Iterator[Case]]]:
        around = self.combine, self.prepare_qkv, self.attention
        return [*around, self.mlp, self.head, self.quantize, self.tables]

    def wide(self, columns: int = DIM, dtype: torch.dtype = BF16) -> Tensor:
        return self.random(self.T, columns, dtype=dtype, grad=True)

    def own(self, fp8: tuple) -> tuple | None:
        """What an operation takes; its twin takes nothing."""
        return fp8 if train_gpt.has_kernels(self.device) else None

    def combine(self) -> Iterator[Case]:
        inputs = [self.wide() for _ in range(4)]
        inputs += [self.random(dtype=FP32, grad=True) for _ in range(2)]
        inputs += [self.wide(1, FP32) for _ in range(2)]

        unit = torch.full((4,), 28 / 448, device=self.device)

        def call(op, *x):
            stream, normed, *sources = op(x[:4], x[4:], True, train_gpt.fp8_empty(x[0].shape, unit))
            return stream, normed, *sources[2:]  # as in a layer, two are read again

        moved = {"forward": 6 * self.stream, "backward": 12 * self.stream}
        yield Case("combine, 4 terms", inputs, call, **moved)

    def prepare_qkv(self) -> Iterator[Case]:
        tables = train_gpt.rotary_tables(HEAD_DIM, self.T, self.device)
        w_qkv = self.random(3 * WIDTH, DIM, std=0.02, grad=True)
        inputs, value = [self.wide(), w_qkv], [self.wide(WIDTH)]
        bank = torch.cat([w_qkv, w_qkv[:WIDTH]]).detach()[None]  # rows of O behind
        copies = train_gpt.Fp8Copies(bank, bank, bank[0], 1)
        room = train_gpt.fp8_empty(inputs[0].shape, copies.unit_x)
        fp8 = copies.qkv(0, train_gpt.quantize(inputs[0], room))
        forward = [(1, self.T, 3 * WIDTH, DIM)]
        backward = [(1, self.T, DIM, 3 * WIDTH), (1, 3 * WIDTH, DIM, self.T)]
        needs = {"forward": Need(products=forward, dtype=E4M3)}
        needs["backward"] = Need(products=backward, dtype=E4M3)
        for kind, more in ("plain", []), ("value", value), ("key offset", []):

            def call(op, *x, kind=kind):
                value, offset = x[2] if kind == "value" else None, self.T * ("key" in kind)
                return op(*x[:2], *tables, value, self.own(fp8), offset, HEAD_DIM)

            yield Case(f"prepare_qkv, {kind}", inputs + more, call, **needs)

    def heads(self, window: int) -> tuple[list[Tensor], dict[str, Need]]:
        """Queries, keys and values, and what attention to them needs."""
        shape = self.T, HEADS, HEAD_DIM
        inputs = [F.rms_norm(self.random(*shape), (HEAD_DIM,)).requires_grad_() for _ in range(3)]
        ends = torch.cat([self.batch.cu_seqlens.cpu().long(), torch.tensor([self.T])])
        position = torch.cat([torch.arange(n) for n in ends.diff().tolist()])
        pairs = int(position.clamp_max(window).sum()) + self.T  # of a head
        flops, size = 4 * pairs * WIDTH, inputs[0].nbytes
        needs = {"forward": Need(4 * size, flops)}
        return inputs, needs | {"backward": Need(8 * size, 2.5 * flops)}

    def attention(self) -> Iterator[Case]:
        documents = self.batch.cu_seqlens, self.batch.max_seq_len
        for kind, window in ("short", self.stage.window_short), ("long", self.stage.window_long):
            inputs, needs = self.heads(window)
            numbers = *documents, window, CONFIG.attention_scale

            def call(backend, *x, numbers=numbers):
                return train_gpt.attention(*x, *numbers, backend)

            case = Case(f"attention, {kind} {window}", inputs, call, **needs)
            case.op, case.twin = train_gpt.attention_backend(self.device, BF16), "plain"
            yield case

    def mlp(self) -> Iterator[Case]:
        bank = self.random(2, HIDDEN, DIM, std=0.02)
        inputs = [self.wide(), *(w.requires_grad_() for w in bank.unbind())]
        forward = [(1, self.T, HIDDEN, DIM), (1, self.T, DIM, HIDDEN)]
        backward = [*forward, (1, HIDDEN, DIM, self.T), (1, HIDDEN, DIM, self.T)]
        copies = train_gpt.Fp8Copies(bank, bank, bank[0], 1)
        room = train_gpt.fp8_empty(inputs[0].shape, copies.unit_x)
        fp8 = copies.mlp(0, train_gpt.quantize(inputs[0], room))
        needs = {"forward": Need(products=forward, dtype=E4M3)}
        needs["backward"] = Need(products=backward, dtype=E4M3)
        yield Case("mlp", inputs, lambda op, *x: op(*x, self.own(fp8)), **needs)

    def head(self) -> Iterator[Case]:
        targets, weights = self.batch.targets, torch.tensor([1.0, 0.5, 0.25])
        second = F.pad(targets[1:], (0, 1), value=train_gpt.IGNORED_TARGET)
        terms = torch.stack([targets, second, targets], dim=1), weights.to(self.device)
        inputs = [self.wide(), self.random(VOCAB, DIM, std=0.02, grad=True)]
        products = [(1, self.T, VOCAB, DIM), (1, self.T, DIM, VOCAB), (1, VOCAB, DIM, self.T)]
        needs = {"forward": Need(products=products[:1])}
        yield Case("next_token_loss", inputs, lambda op, *x: op(*x, targets), **needs)
        bank = self.random(2, 128, DIM)
        fp8 = train_gpt.Fp8Copies(bank, bank, inputs[1], 1).head()  # not timed
        need = Need(products=products, dtype=E4M3)
        yield Case("head_loss", inputs, lambda op, *x: op(*x, *terms, self.own(fp8))[0], both=need)

    def quantize(self) -> Iterator[Case]:
        def plain_quantize(x: Tensor, out: train_gpt.Fp8) -> tuple[Tensor, Tensor]:
            out = (x.float() / out.unit[0]).clamp(-448, 448).to(E4M3)
            return out, out.mT.contiguous()

        inputs = [self.wide(), torch.full((4,), 28 / 448, device=self.device)]

        def call(op, x, unit):
            return op(x, train_gpt.fp8_empty(x.shape, unit))

        case = Case("quantize", inputs, call, forward=2 * self.stream)
        case.twin = plain_quantize
        yield case

    def tables(self) -> Iterator[Case]:
        case = Case("sort_rows", [self.batch.tokens], forward=28 * self.T)
        case.twin = None  # it is plain itself
        yield case
        rows = train_gpt.sort_rows(self.batch.tokens)
        count = CONFIG.num_value_tables
        inputs = [self.random(size, WIDTH) for size in (VOCAB, self.T) for _ in range(count)]
        moved = 2 * count * WIDTH * (self.T + 2 * int(rows.count))

        def call(op, *x):
            return op(x[:count], rows, x[count:])

        yield Case("add_rows_, value tables", inputs, call, forward=moved)


# Operations of the optimizer ----------------------------------------------------------------------


def numbers(bench: Bench, *values: float) -> list[Tensor]:
    return [torch.tensor(value, device=bench.device) for value in values]


def normuon(bench: Bench) -> Iterator[Case]:
    for name, (entries, per_entry, height) in BLOCKS.items():
        bank, count, size = (entries, per_entry, height, DIM), entries * per_entry, min(height, DIM)
        products = [(count, size, size, max(height, DIM)), (count, size, size, size)]
        products.append((count, height, DIM, size))
        kept = (height, 1) if height >= DIM else (1, DIM)
        inputs = [bench.random(*bank, dtype=dtype) for dtype in (FP32, BF16, BF16, FP32)]
        inputs += [bench.random(count, *kept, dtype=FP32).abs(), bench.random(entries, dtype=FP32)]
        mu, *rates = numbers(bench, 0.95, 1e-3, 1e-6)

        def call(op, *x, mu=mu, rates=rates):
            return op(*x, mu, CONFIG.muon_beta2, *rates)

        need = Need(products=products * len(train_gpt.POLAR_EXPRESS))
        yield Case(f"normuon_update_, {name}", inputs, call, forward=need)


def adam(bench: Bench) -> Iterator[Case]:
    updates, *rates = numbers(bench, 5.0, 1e-4, 1e-8)
    tables = {"head": (VOCAB, DIM), "value_embed": (CONFIG.num_value_tables * VOCAB, WIDTH)}
    for name, shape in tables.items():
        dtypes = FP32, BF16, BF16, FP32, FP32
        inputs = [bench.random(*shape, dtype=dtype, std=100) for dtype in dtypes]
        inputs[-1].abs_()

        def call(op, *x):
            return op(*x, (0.5, 0.95), updates, CONFIG.adam_eps, *rates)

        yield Case(f"adam_update_, {name}", inputs, call, forward=28 * math.prod(shape))


def ngrams(bench: Bench) -> Iterator[Case]:
    """Of one length in a step of the last stage; they are random, so few come twice."""
    count, num_rows, dim = CONFIG.stages[-1].tokens_per_step, CONFIG.ngram_rows, CONFIG.ngram_dim
    rows = torch.randint(0, num_rows, (count,), dtype=torch.int32, device=bench.device)
    order = train_gpt.sort_rows(rows)
    inputs = [bench.random(num_rows, dim), bench.random(num_rows, dtype=FP32).abs()]

    def call(op, table, squares, grads):
        return op(table, squares, order, grads, 1e-3, CONFIG.adam_eps)

    moved = 2 * dim * count + (4 * dim + 8) * int(order.count)
    yield Case("update_ngrams_", [*inputs, bench.random(count, dim)], call, forward=moved)


# Micro-steps --------------------------------------------------------------------------------------


def micro_steps(bench: Bench, chosen: list[int]) -> None:
    """A row's forward and backward pass at each stage, as training replays it, and the optimizer's
    step behind it."""
    runtime, random = Runtime(0, 1, bench.device, Log(None)), np.random.default_rng(0)
    trainer = train_gpt.Trainer(train_gpt.GPT(CONFIG, runtime), runtime)
    schedule = trainer.schedule
    groups = [group for group in GROUPS if group not in ("communication", "optimizer")]
    lines = [["tokens", "columns", "micro-step", *groups, IDLE, "optimizer, even", "odd"]]
    for first in (0, *schedule.stage_ends[:-1]):
        num_tokens, _ = sizes = schedule.row_shape(first)
        if num_tokens not in chosen:
            continue
        with bench.attempt(f"micro-step of {num_tokens:,} tokens"):
            updates = []
            rows = [random_batch(random, *sizes, 1, CONFIG, False) for _ in range(4)]
            rows = itertools.cycle([train_gpt.to_device(row, bench.device) for row in rows])
            trainer.rehearse(next(rows), first)
            trainer.capture(next(rows), first)

            def run(rows=rows, first=first, count=1) -> None:
                trainer.model.ngrams.filled = 0  # there is room for those of one step
                for _ in range(count):
                    trainer.micro_step(next(rows), first)

            ms = bench.median_ms(run, 300)
            with tempfile.TemporaryDirectory() as folder:
                times = profile(run, 4, bench.device, Path(folder, "trace.json.gz"))
            rates = schedule.lr_scale(first), schedule.momentum(first)
            for step in range(8):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                run(count=CONFIG.rows_per_step)  # behind which the host gets ahead, as in training
                begin.record()
                trainer.optimizer.step(step, *rates)
                end.record()
                torch.cuda.synchronize()
                updates.append(begin.elapsed_time(end))
            parts = [times[name][0] for name in (*groups, IDLE)]
            parts = [ms, *parts, np.median(updates[2::2]), np.median(updates[3::2])]
            columns = schedule.stage(first).columns or CONFIG.padded_vocab_size
            cells = [f"{num_tokens:,}", f"{columns:,}"]
            lines.append(cells + [f"{part:.2f}" for part in parts])
    bench.line(f"\nmicro-steps and optimizer, ms\n{table(lines)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./run.sh bench", description=__doc__.split("\n")[0])
    sizes = ",".join(map(str, STAGES))
    parser.add_argument("--tokens", default=sizes, metavar="LIST", help=f"rows [{sizes}]")
    parser.add_argument("--log", type=Path, metavar="FILE", help="write the lines here too")
    args = parser.parse_args(arguments)
    for size in args.tokens.split(","):
        if size not in sizes.split(","):
            parser.error(f"--tokens: {size!r} is no row of a stage; those are {sizes}")
    if not torch.cuda.is_available() or not train_gpt.has_kernels(torch.device("cuda", 0)):
        print("error: bench needs a GPU of the Hopper generation or later", file=sys.stderr)
        return 1
    try:
        if args.log is not None:
            args.log.write_text("")
    except OSError as error:
        parser.error(f"--log {args.log}: cannot be written: {error}")
    warnings.filterwarnings("ignore", message="Argument aux_data")  # from flash-attn-4
    bench = Bench(torch.device("cuda", 0), args.log)
    bench.line(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    bench.measure_ceilings()
    chosen = [int(size) for size in args.tokens.split(",")]
    for size in chosen:
        stage = STAGES[size]
        title = f"{size:,} tokens, windows {stage.window_short} and {stage.window_long}"
        with bench.attempt(title):
            bench.section(title, Row(bench, stage, size).makers())
    makers = (functools.partial(maker, bench) for maker in (normuon, adam, ngrams))
    bench.section("optimizer", list(makers))
    with bench.attempt("micro-steps"):
        micro_steps(bench, chosen)
    if bench.failures:
        bench.line(f"\n{bench.failures} measurements failed")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
