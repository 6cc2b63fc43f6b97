"""Operations of train_gpt.py beside what this GPU can do: `./run.sh bench [--tokens LIST]`.

Those of the pointer and of n-gram lookup are left out. The others get what training gives them on
one GPU, at every stage: a pass of as many sequences as --tokens_per_pass allows and, for the loss,
parts of --tokens_per_sampling tokens with candidates sampled for them and both loss terms. A time
is the median of some runs on random data, each behind a read of more than the L2 holds. Operations
replay from a CUDA graph; their reference implementations run eagerly. Rates count what must be
computed or moved, each input and output once. The share is of a peak measured in the same run: the
library's matmul of the same shape and dtype, for attention the large bf16 matmul, else a copy. The
head's backward is part of its forward.
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

import console

if __name__ == "__main__":
    console.end_on_signals()

import numpy as np
import torch
import torch.nn.functional as F
from profiler import GROUPS, IDLE, eager_trace, profile, random_batch, table
from torch import Tensor

import train_gpt
from train_gpt import E4M3, IGNORED_TARGET, Config, Log, PointerShares, Runtime, Stage

CONFIG = Config()
DIM, HIDDEN = CONFIG.model_dim, CONFIG.mlp_dim
HEADS, HEAD_DIM, WIDTH = CONFIG.num_heads, CONFIG.head_dim, CONFIG.attention_dim
VOCAB, BF16, FP32 = CONFIG.padded_vocab_size, torch.bfloat16, torch.float32
STAGES = CONFIG.all_stages
# NorMuon's on one GPU: entries of a bank, matrices of an entry, their rows
LAYERS = len(CONFIG.layers)
BLOCKS = {"q, k": (LAYERS, HEADS, 2 * HEAD_DIM), "v, o": (LAYERS, 2, WIDTH)}
BLOCKS["mlp"] = 2 * LAYERS, 1, HIDDEN
OF_A_STEP = "communication", "matches", "optimizer", "fp8 refresh"  # groups, not of a pass


@dataclass
class Need:
    """What an operation cannot do without."""

    bytes: float = 0
    flops: float = 0  # 0: those of the matmuls
    matmuls: Sequence[tuple[int, int, int, int]] = ()  # batch, rows, columns, inner
    dtype: torch.dtype = BF16  # of their factors

    def __post_init__(self):
        self.library_flops = sum(2 * math.prod(sizes) for sizes in self.matmuls)
        self.flops = self.flops or self.library_flops


class Case:
    """An operation on some inputs. Those that require gradients get one in the backward.

    name: of the function in train_gpt, a comma, and what else tells the case from others. call:
    how the function, or its reference, takes the inputs. needs: a Need, or bytes, for each
    direction: forward, backward, or both at once.
    """

    def __init__(self, name: str, inputs: list[Tensor], call=None, **needs):
        self.op = getattr(train_gpt, name.split(",")[0])
        self.reference = self.op  # without kernels, and not compiled; None: it has none
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
    """Operations are their reference implementations, and nothing is compiled."""
    kept, train_gpt.has_kernels = train_gpt.has_kernels, lambda device: False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        train_gpt.has_kernels = kept


def with_copy_entry(targets: Tensor) -> Tensor:
    """And a column of the pointer's copy entry."""
    return F.pad(targets, (0, 1), value=CONFIG.vocab_size)


def figures(need: Need, ms: float, floor_ms: float) -> list[str]:
    """Time, rate, and share of the peak."""
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
        """triton.testing.do_bench empties the L2 by writing to it instead, and what it has written
        travels to memory while a short operation runs."""

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
            a, b, scale = a.to(E4M3), b.to(E4M3), torch.ones(4, device=self.device)
            a, b = train_gpt.Fp8(a, None, scale), train_gpt.Fp8(b, None, scale)
            return self.captured_ms(lambda: lambda: train_gpt.fp8_matmul(a, b))
        return self.captured_ms(lambda: lambda: a @ b.mT)

    def measure_peaks(self) -> None:
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
                self.line(f"{name} matmul of 8192^3: {self.bf16_rate / 1e12:.0f} TFLOP/s")

    def reference_ms(self, case: Case, direction: str) -> str:
        """'-' where there is none, or it is too large for the memory."""
        if case.reference is None:
            return "-"
        try:
            with without_kernels():
                return f"{self.median_ms(case.prepare(case.reference, direction)):.3f}"
        except torch.OutOfMemoryError:
            return "-"

    def row(self, case: Case, direction: str) -> list[str]:
        """A line of the table. References come last: some change their inputs."""
        need, prepare = case.needs[direction], functools.partial(case.prepare, case.op, direction)
        ms = self.captured_ms(prepare)
        floor_ms = 1000 * max(need.bytes / self.copy_rate, need.flops / self.bf16_rate)
        if need.matmuls:
            library_ms = sum(self.library_ms(*sizes, need.dtype) for sizes in need.matmuls)
            floor_ms = library_ms * need.flops / need.library_flops
        reference_ms = "failed"
        with self.attempt(f"reference of {case.name} {direction}"):
            reference_ms = self.reference_ms(case, direction)
        return [case.name, direction, *figures(need, ms, floor_ms), reference_ms]

    def section(self, title: str, makers: list[Callable[[], Iterator[Case]]]) -> None:
        rows = [["", "direction", "ms", "rate", "share", "reference ms"]]
        for maker in makers:
            with self.attempt(getattr(maker, "__name__", title)):
                for case in maker():
                    for direction in case.needs:
                        with self.attempt(f"{case.name} {direction}"):
                            rows.append(self.row(case, direction))
                    torch.cuda.empty_cache()
        self.line(f"\n{title}\n{table(rows)}")


# Operations of a pass -----------------------------------------------------------------------------


class Pass:
    """Random sequences that one GPU computes at once at a stage, and the operations on them."""

    def __init__(self, bench: Bench, stage: Stage):
        self.device, self.random, self.stage = bench.device, bench.random, stage
        self.length = stage.tokens_per_step // CONFIG.sequences_per_step  # of a sequence
        self.sequences = CONFIG.sequences_per_pass(self.length, 1)
        self.T = self.sequences * self.length
        self.num_drawn = min(CONFIG.tokens_per_sampling, self.length)  # tokens, for whose loss
        self.candidates = stage.candidates or VOCAB
        random = np.random.default_rng(self.T)
        runtime = Runtime(0, 1, bench.device, Log(None))
        sizes = self.length, stage.max_seq_len, self.sequences
        batch = random_batch(random, *sizes, CONFIG, runtime)
        self.batch = train_gpt.to_device(batch, bench.device)
        self.stream = 2 * self.T * DIM  # bytes in bf16

    def __str__(self) -> str:
        windows = f"windows {self.stage.window_short} and {self.stage.window_long}"
        sequences = f"{self.sequences} sequences of {self.length:,} tokens a pass, {windows}"
        return f"{sequences}, {self.candidates:,} candidates for {self.num_drawn:,} tokens"

    def makers(self) -> dict[Callable[[], Iterator[Case]], tuple]:
        """With the sizes that the cases depend on."""
        passes = dict.fromkeys((self.combine, self.prepare_qkv, self.mlp, self.quantize), (self.T,))
        passes |= {self.attention: (self.T, self.stage.window_short, self.stage.window_long)}
        passes |= {self.head: (self.num_drawn, self.candidates), self.tables: (self.T,)}
        return passes | {self.ngrams: (self.T, self.stage.tokens_per_step)}

    def wide(self, columns: int = 0, dtype: torch.dtype = BF16) -> Tensor:
        """As the stream, or with so many columns."""
        return self.random(self.T, columns or DIM, dtype=dtype, grad=True)

    def own(self, make: Callable[[], tuple]) -> Callable[[], tuple | None]:
        """Gives what an operation takes beside its inputs, made here; its reference takes None."""
        fp8 = make() if train_gpt.has_kernels(self.device) else None
        return lambda: fp8 if train_gpt.has_kernels(self.device) else None

    def copies(self, bank: Tensor, x: Tensor, what: str) -> tuple:
        """As training has them for the weights of one layer."""
        copies = train_gpt.Fp8Copies(bank, bank, bank[0], 1)
        copy = train_gpt.quantize(x, train_gpt.fp8_empty(x.shape, copies.scale_x))
        return getattr(copies, what)(0, copy)

    def combine(self) -> Iterator[Case]:
        inputs = [self.wide() for _ in range(4)]
        inputs += [self.random(dtype=FP32, grad=True) for _ in range(2)]
        inputs += [self.wide(1, FP32) for _ in range(2)]

        scale = torch.full((4,), 28 / 448, device=self.device)

        def call(op, *x):
            stream, normed, *sources = op(
                x[:4], x[4:], True, train_gpt.fp8_empty(x[0].shape, scale)
            )
            return stream, normed, *sources[2:]  # as in a layer, two are read again

        moved = {"forward": 6 * self.stream, "backward": 12 * self.stream}
        yield Case("combine, 4 terms", inputs, call, **moved)

    def prepare_qkv(self) -> Iterator[Case]:
        tables = train_gpt.rotary_tables(
            train_gpt.rotary_frequencies(HEAD_DIM), self.T, self.device
        )
        w_qkv = self.random(3 * WIDTH, DIM, std=0.02, grad=True)
        inputs, value = [self.wide(), w_qkv], [self.wide(WIDTH)]
        bank = torch.cat([w_qkv, w_qkv[:WIDTH]]).detach()  # rows of O behind
        bank = bank.repeat(2, 1, 1)  # as many entries as the MLPs of a layer have
        fp8 = self.own(lambda: self.copies(bank, inputs[0], "qkv"))
        forward = [(1, self.T, 3 * WIDTH, DIM)]
        backward = [(1, self.T, DIM, 3 * WIDTH), (1, 3 * WIDTH, DIM, self.T)]
        needs = {"forward": Need(matmuls=forward, dtype=E4M3)}
        needs["backward"] = Need(matmuls=backward, dtype=E4M3)
        for kind, more in ("plain", []), ("value", value), ("key offset", []):

            def call(op, *x, kind=kind):
                value, offset = x[2] if kind == "value" else None, self.length * ("key" in kind)
                return op(*x[:2], *tables, value, fp8(), offset, HEAD_DIM)

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
            case.op, case.reference = train_gpt.attention_backend(self.device, BF16), "plain"
            yield case

    def mlp(self) -> Iterator[Case]:
        bank = self.random(2, HIDDEN, DIM, std=0.02)
        inputs = [self.wide(), *(w.requires_grad_() for w in bank.unbind())]
        fp8 = self.own(lambda: self.copies(bank, inputs[0], "mlp"))
        forward = [(1, self.T, HIDDEN, DIM), (1, self.T, DIM, HIDDEN)]
        backward = [*forward, (1, HIDDEN, DIM, self.T), (1, HIDDEN, DIM, self.T)]
        needs = {"forward": Need(matmuls=forward, dtype=E4M3)}
        needs["backward"] = Need(matmuls=backward, dtype=E4M3)
        yield Case("mlp", inputs, lambda op, *x: op(*x, fp8()), **needs)

    def head(self) -> Iterator[Case]:
        """The loss of a part of a sequence, on the next token and the one after it."""
        count, size = self.candidates, self.num_drawn
        targets = self.batch.targets[: self.length]
        second = F.pad(targets[1:], (0, 1), value=IGNORED_TARGET)
        targets, offsets = with_copy_entry(torch.stack([targets, second], dim=1)[:size]), None
        if self.stage.candidates:
            counts = torch.bincount(self.batch.targets, minlength=VOCAB)
            proposal = (counts + 2).float().sqrt()

            def draw(op, *x):
                return op(*x, count)

            moved = 2 * targets.nbytes + proposal.nbytes + 12 * count
            case = Case("sample_candidates", [targets, proposal], draw, forward=moved)
            case.reference = None  # it is plain itself
            yield case
            _, offsets, targets = train_gpt.sample_candidates(targets, proposal, count)
        weights = torch.tensor([1.0, self.stage.second], device=self.device)
        x, head = self.random(size, DIM, grad=True), self.random(count, DIM, std=0.02, grad=True)
        bank = self.random(2, 128, DIM)
        shares = self.random(3, size, dtype=FP32).softmax(0)[:2].requires_grad_()
        fp8 = self.own(lambda: train_gpt.Fp8Copies(bank, bank, head, 1).head())

        def call(op, x, head, shares):
            return op(x, head, targets, weights, fp8(), offsets, PointerShares(*shares))[0]

        matmuls = [(1, size, count, DIM), (1, size, DIM, count), (1, count, DIM, size)]
        yield Case("head_loss", [x, head, shares], call, both=Need(matmuls=matmuls, dtype=E4M3))

    def quantize(self) -> Iterator[Case]:
        def plain_quantize(x: Tensor, out: train_gpt.Fp8) -> tuple[Tensor, Tensor]:
            out = (x.float() / out.scale[0]).clamp(-448, 448).to(E4M3)
            return out, out.mT.contiguous()

        inputs = [self.wide(), torch.full((4,), 28 / 448, device=self.device)]

        def call(op, x, scale):
            return op(x, train_gpt.fp8_empty(x.shape, scale))

        case = Case("quantize", inputs, call, forward=2 * self.stream)
        case.reference = plain_quantize
        yield case

    def tables(self) -> Iterator[Case]:
        """Gradients of rows that were read: of tokens, and of the head's candidates."""
        case = Case("sort_rows", [self.batch.tokens], forward=28 * self.T)
        case.reference = None  # it is plain itself
        yield case
        rows = train_gpt.sort_rows(self.batch.tokens)
        drawn = torch.randperm(VOCAB, device=self.device)[: self.candidates]
        place = torch.arange(len(drawn) + 1, device=self.device)
        each_once = train_gpt.SortedRows.of_distinct(drawn, place)
        kinds = {"embedding": (rows, 1, DIM, self.T)}
        kinds["value tables"] = rows, CONFIG.num_value_tables, WIDTH, self.T
        kinds["candidates"] = each_once, 1, DIM, len(drawn)
        for kind, (rows, count, width, num_values) in kinds.items():
            inputs = [self.random(n, width) for n in (VOCAB, num_values) for _ in range(count)]
            moved = 2 * count * width * (num_values + 2 * int(rows.num_runs))

            def call(op, *x, count=count, rows=rows):
                return op(x[:count], rows, x[count:])

            yield Case(f"add_rows_, {kind}", inputs, call, forward=moved)

    def ngrams(self) -> Iterator[Case]:
        """Their rows in a pass, and the update with those of a step."""
        orders, num_rows, dim = CONFIG.ngram_orders, CONFIG.ngram_rows, CONFIG.model_dim

        def call(op, tokens):
            return op(tokens, orders, num_rows, self.sequences)

        yield Case("ngram_hash", [self.batch.tokens], call, forward=4 * self.T * (1 + len(orders)))
        random = np.random.default_rng(self.T)
        tokens = train_gpt.random_tokens(random, self.stage.tokens_per_step).astype(np.int32)
        tokens = torch.from_numpy(tokens).to(self.device)
        rows = train_gpt.sort_ngrams(train_gpt.ngram_hash(tokens, orders, num_rows))
        table = self.random(len(orders) * num_rows, dim)
        inputs = [table, self.random(len(table), dtype=FP32).abs()]
        inputs.append(self.random(len(tokens), dim))

        def update(op, table, squares, grads):
            return op(table, squares, rows, grads, 1e-3, CONFIG.adam_eps)

        moved = 2 * dim * len(rows.order) + (4 * dim + 8) * int(rows.num_runs)
        yield Case("update_ngrams_, a step", inputs, update, forward=moved)


def validation(bench: Bench) -> Iterator[Case]:
    """The loss of a validation sequence, on the whole vocabulary."""
    size = CONFIG.val_sequence_tokens
    inputs = [bench.random(size, DIM), bench.random(VOCAB, DIM, std=0.02)]
    targets = torch.randint(0, CONFIG.vocab_size, (size, 1), device=bench.device)
    inputs += [with_copy_entry(targets), bench.random(3, size, dtype=FP32).softmax(0)[:2]]

    def call(op, x, head, targets, shares):
        return op(x, head, targets, PointerShares(*shares))

    yield Case("next_token_loss", inputs, call, forward=Need(matmuls=[(1, size, VOCAB, DIM)]))


# Operations of the optimizer ----------------------------------------------------------------------


def numbers(bench: Bench, *values: float) -> list[Tensor]:
    return [torch.tensor(value, device=bench.device) for value in values]


def normuon(bench: Bench) -> Iterator[Case]:
    for name, (entries, per_entry, height) in BLOCKS.items():
        bank, count, size = (entries, per_entry, height, DIM), entries * per_entry, min(height, DIM)
        products = [(count, size, size, max(height, DIM)), (count, size, size, size)]
        products.append((count, height, DIM, size))
        kept = (height, 1) if height >= DIM else (1, DIM)
        inputs = [bench.random(*bank, dtype=dtype) for dtype in (FP32, BF16, BF16, FP32, FP32)]
        inputs += [bench.random(count, *kept, dtype=FP32).abs(), bench.random(entries, dtype=FP32)]
        *momentum, lr, decay = numbers(bench, 0.85, 0.56, 0.95, 1e-3, 1e-6)
        momentum = train_gpt.Momentum(*momentum)

        def call(op, *x, rest=(momentum, CONFIG.slow_decay, CONFIG.muon_beta2, lr, decay)):
            return op(*x, *rest)

        need = Need(matmuls=products * len(train_gpt.POLAR_EXPRESS))
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


# Passes -------------------------------------------------------------------------------------------


def passes(bench: Bench, chosen: list[int]) -> None:
    """Forward and backward pass at each stage, as training replays it, and the optimizer's step
    behind it."""
    runtime, random = Runtime(0, 1, bench.device, Log(None)), np.random.default_rng(0)
    trainer = train_gpt.Trainer(train_gpt.GPT(CONFIG, runtime), runtime)
    schedule, stages = trainer.schedule, []
    for first in (0, *schedule.stage_ends):
        sizes = schedule.sequence_shape(first)
        if sizes[0] not in chosen:
            continue
        with bench.attempt(f"first pass of sequences of {sizes[0]:,} tokens"):
            count = CONFIG.sequences_per_pass(sizes[0], 1)
            batches = [random_batch(random, *sizes, count, CONFIG, runtime) for _ in range(4)]
            batches = [train_gpt.to_device(batch, bench.device) for batch in batches]
            # before there are graphs, whose memory it would need beside them
            eager = eager_trace(trainer, batches[0], schedule.stage(first))
            stages.append((first, sizes[0], batches, eager))
    groups = [group for group in GROUPS if group not in OF_A_STEP]
    lines = [["tokens a sequence", "sequences a pass", "candidates", "pass", *groups, IDLE]]
    lines[0] += ["optimizer, even", "odd"]
    for first, length, batches, eager in stages:
        with bench.attempt(f"pass of sequences of {length:,} tokens"):
            per_pass, updates, following = batches[0].sequences, [], itertools.cycle(batches)
            stage = schedule.stage(first)
            trainer.capture(batches[0], stage)

            def run(following=following, stage=stage, count=1) -> None:
                trainer.model.ngrams.filled = 0  # it holds those of one step
                for _ in range(count):
                    trainer.micro_step(next(following), stage)

            ms = bench.median_ms(run, 300)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "trace.json.gz")
                times, unassigned = profile(run, 4, bench.device, path, eager)
            if unassigned:
                bench.line(f"sequences of {length:,} tokens: {unassigned}")
            rates = schedule.lr_scale(first), schedule.momentum(first)
            for step in range(8):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                # a whole step, in which the host gets ahead, as in training
                run(count=CONFIG.sequences_per_step // per_pass)
                begin.record()
                trainer.optimizer.step(step, *rates)
                end.record()
                torch.cuda.synchronize()
                updates.append(begin.elapsed_time(end))
            parts = [times[name][0] for name in (*groups, IDLE)]
            parts = [ms, *parts, np.median(updates[2::2]), np.median(updates[3::2])]
            candidates = stage.candidates or VOCAB
            cells = [f"{length:,}", str(per_pass), f"{candidates:,}"]
            lines.append(cells + [f"{part:.2f}" for part in parts])
    bench.line(f"\npasses and optimizer, ms\n{table(lines)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./run.sh bench", description=__doc__.split("\n")[0])
    lengths = dict.fromkeys(stage.tokens_per_step // CONFIG.sequences_per_step for stage in STAGES)
    sizes = ",".join(map(str, lengths))
    text = f"stages to measure, by the tokens of one sequence [{sizes}]"
    parser.add_argument("--tokens", default=sizes, metavar="LIST", help=text)
    parser.add_argument("--log", type=Path, metavar="FILE", help="write the lines here too")
    args = parser.parse_args(arguments)
    for size in args.tokens.split(","):
        if size not in sizes.split(","):
            parser.error(f"--tokens: {size!r} is no sequence of a stage; those are {sizes}")
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
    bench.measure_peaks()
    chosen, measured = [int(size) for size in args.tokens.split(",")], set()
    for number, stage in enumerate(STAGES, 1):
        if stage.tokens_per_step // CONFIG.sequences_per_step not in chosen:
            continue
        with bench.attempt(f"stage {number}"):
            own = Pass(bench, stage)
            keys = {(maker.__name__, sizes): maker for maker, sizes in own.makers().items()}
            makers = [maker for key, maker in keys.items() if key not in measured]
            measured |= keys.keys()
            same = ", where it is not as before" if len(makers) < len(keys) else ""
            bench.section(f"stage {number}: {own}{same}", makers)
    makers = (functools.partial(maker, bench) for maker in (normuon, adam, validation))
    bench.section("optimizer, and the loss of a validation sequence", list(makers))
    with bench.attempt("passes"):
        passes(bench, chosen)
    if bench.failures:
        bench.line(f"\n{bench.failures} measurements failed")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
