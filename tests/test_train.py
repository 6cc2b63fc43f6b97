"""Section 9 end to end: the script as a user starts it, on small streams and on the sample."""

import contextlib
import dataclasses
import itertools
import json
import math
import multiprocessing.connection
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    cpu_runtime,
    random_batch,
    random_documents,
    tiny_config,
    trained_like,
    write_shard,
)
from transcription import target_losses

import train_gpt
from train_gpt import (
    GPT,
    START_TOKEN,
    Batch,
    Clock,
    Config,
    Optimizer,
    Progress,
    Schedule,
    Stage,
    Trainer,
    UserError,
    Windows,
    config_from_text,
    training_batches,
    validate,
)

sys.path.insert(0, str(ROOT / "data"))
from shards import BYTE_TO_ID

SCRIPT = ROOT / "train_gpt.py"
OPTIONS = {
    "preset": "tiny",
    "val_tokens": 1000,
    "repeat_data": "false",
    "min_mean_doc_len": 4,
    "model_dim": 32,
    "head_dim": 16,
    "mlp_dim": 64,
    "gate_dim": 8,
    "ngram_rows": 4096,
    "num_steps": 24,
    "stages": "1/2:128:48:8:16:1:.25:0,1/2:256:64:16:32:1.2:.15:0",
    "extension_steps": 2,
    "extension": "1:256:64:16:2:1:0:0",  # a window unlike that of the final validation
    "final_window_long": 64,
    "sequences_per_step": 2,
    "momentum_warmup_steps": 5,
    "momentum_cooldown_steps": 2,
    "dtype": "float32",
    "muon_lr": 0.023,
    "adam_lr": 0.05,  # so that a few steps are enough
    "val_every": 12,
    "val_sequence_tokens": 64,
    "lr_decay_start": 0.4,
    "seed": 2,  # one with which the long window comes to matter
}
ALPHABET = "abcdefghijklmnop"


def letters(seed: int, num_tokens: int) -> list[int]:
    """Documents of byte tokens over 16 letters: nine in ten times the letter five further on is
    next."""
    random = np.random.default_rng(seed)
    ids = [int(BYTE_TO_ID[ord(letter)]) for letter in ALPHABET]
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        tokens.append(START_TOKEN)
        letter = int(random.integers(16))
        for _ in range(random.integers(20, 60)):
            tokens.append(ids[letter])
            letter = (letter + 5) % 16 if random.random() < 0.9 else int(random.integers(16))
    return tokens[:num_tokens]


def unigram_entropy(tokens: np.ndarray | list[int]) -> float:
    """Nats per token that a model pays which knows nothing but how frequent each token is."""
    counts = np.array(list(Counter(map(int, tokens)).values()), dtype=np.float64)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def read_shard(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes()[1024:], dtype="<u2")


def write_data(folder: Path) -> Path:
    """Two training shards, and one for validation."""
    tokens = letters(1, 8000)
    write_shard(folder / "train_0.bin", tokens[:3501])
    write_shard(folder / "train_1.bin", tokens[3501:])
    write_shard(folder / "val.bin", letters(2, 1001))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path)


def command(folder: Path, ranks: int, script: Path = SCRIPT, **changes: object) -> list[str]:
    options = {
        **OPTIONS,
        "train_files": folder / "train_*.bin",
        "val_file": folder / "val.bin",
        "log_dir": folder / "logs",
        **changes,
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, *(launcher if ranks > 1 else []), str(script), *arguments]


def environment() -> dict[str, str]:
    """Few threads, no process group of whoever runs the tests, no GPU."""
    taken = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in taken}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}


def run(
    folder: Path, ranks: int = 1, timeout: float = 120, **changes: object
) -> subprocess.CompletedProcess:
    """Run to the end; killed with all its processes when it hangs."""
    with subprocess.Popen(
        command(folder, ranks, **changes),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"no end after {timeout} s\n{out}\n{err}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def fork_main(
    folder: Path,
    prepare: Callable[[], object] = lambda: None,
    encoding: str = "utf-8",
    stdout: int | None = None,
    stderr: int | None = None,
    variables: dict[str, str] | None = None,
    script: ModuleType = train_gpt,
    **changes: object,
) -> multiprocessing.Process:
    """main() of the script in a fork of this process, after `prepare`. What it prints goes to the
    files out and err of the folder, or to these descriptors."""

    def child() -> None:
        for number, name, given in ((1, "out", stdout), (2, "err", stderr)):
            if given is None:
                given = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
            os.dup2(given, number)
            setattr(sys, f"std{name}", open(number, "w", encoding=encoding, closefd=False))  # noqa: SIM115
        os.chdir(folder)
        os.environ.update(variables or {})
        try:
            prepare()
            arguments = command(folder, 1, **{"val_file": "val.bin", **changes})[2:]
            code = script.main(arguments)
            sys.stdout.flush()
        except BaseException:  # noqa: BLE001 (what main lets through)
            traceback.print_exc()
            code = 99
        with contextlib.suppress(OSError):  # whoever reads it may be gone
            sys.stderr.flush()
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def fork(
    folder: Path,
    ranks: int = 1,
    timeout: float = 120,
    script: ModuleType = train_gpt,
    prepare: Callable[[], object] = lambda: None,
    **changes: object,
) -> subprocess.CompletedProcess:
    """Run to the end like run(), by forks of this process, which spares them the imports; where
    there is a GPU by run(), for a fork cannot use one. When a rank fails, the others are killed.
    What prepare() does in the forks must be for speed alone."""
    if torch.cuda.is_available():
        return run(folder, ranks, timeout, script=Path(script.__file__), **changes)
    variables = environment()
    if ranks > 1:
        port = str(free_port())
        variables |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    deadline, processes = time.monotonic() + timeout, []
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        how = {"stdout": out.fileno(), "stderr": err.fileno(), "script": script}
        how |= {"prepare": prepare, "val_file": folder / "val.bin", **changes}
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            processes.append(fork_main(folder, variables=variables | place, **how))
        codes: list[int | None] = [None] * ranks
        while None in codes and not any(codes) and time.monotonic() < deadline:
            multiprocessing.connection.wait(
                [process.sentinel for process, code in zip(processes, codes) if code is None], 1
            )
            codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        texts = [file.seek(0) or file.read() for file in (out, err)]
    code = next(filter(None, codes), 0)
    if None in codes and code == 0:
        pytest.fail("\n".join([f"no end after {timeout} s", *texts]))
    return subprocess.CompletedProcess(command(folder, ranks, **changes), code, *texts)


def log_of(folder: Path) -> tuple[str, dict]:
    """The text and the JSON of the only run."""
    (text,) = (folder / "logs").glob("*.txt")
    return text.read_text(encoding="utf-8"), json.loads(text.with_suffix(".json").read_text())


# A whole run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that went well, with its weights in weights.pt."""
    folder = write_data(tmp_path_factory.mktemp("trained"))
    result = run(folder, checkpoint=folder / "weights.pt")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert len(list((folder / "logs").iterdir())) == 3
    return folder


def test_log_has_the_script_the_config_and_a_line_for_every_step(trained):
    text, record = log_of(trained)
    script = SCRIPT.read_text(encoding="utf-8")
    assert text.startswith(script)
    rest = text[len(script) :]
    assert '"extension": "1.0:256:64:16:2:1.0:0.0:0"' in rest
    number = r"(\d+\.\d+)"
    step_line = rf"^step (\d+) train_loss {number} train_time {number} s step {number} ms$"
    lines = re.findall(step_line, rest, re.MULTILINE)
    assert [int(step) for step, *_ in lines] == list(range(1, 27))
    val_line = rf"^step (\d+) val_loss {number} train_time {number} s$"
    validations = re.findall(val_line, rest, re.MULTILINE)
    assert [int(step) for step, *_ in validations] == [12, 24, 26]
    for line, row in zip(lines, record["steps"], strict=True):
        assert float(line[1]) == pytest.approx(row["train_loss"], abs=1e-4)
    for line, row in zip(validations, record["validations"], strict=True):
        assert float(line[1]) == pytest.approx(row["val_loss"], abs=1e-4)


def test_json_has_steps_validations_and_summary(trained):
    _, record = log_of(trained)
    assert [row["step"] for row in record["steps"]] == list(range(1, 27))
    assert all(row["step_ms"] > 0 for row in record["steps"])
    times = [row["train_time_s"] for row in record["steps"]]
    assert times == sorted(times)
    assert [row["step"] for row in record["validations"]] == [12, 24, 26]
    assert record["config"]["model_dim"] == "32"
    assert record["environment"]["world_size"] == 1
    summary = record["summary"]
    assert summary["steps"] == 26
    assert summary["val_loss"] == record["validations"][-1]["val_loss"]
    assert summary["train_time_s"] >= times[-1]
    tokens = 12 * 128 + 14 * 256
    assert summary["tokens_per_s"] == pytest.approx(tokens / summary["train_time_s"], rel=1e-6)
    assert 0.1 < summary["peak_memory_gib"] < 8


def test_times_are_of_one_clock(trained):
    """A step's ms are the time since the step before, the mean is of all steps, a validation takes
    none and its time is that of the clock as it stood; the text says the same."""
    text, record = log_of(trained)
    steps, summary = record["steps"], record["summary"]
    times = [0.0, *(row["train_time_s"] for row in steps)]
    expected = [1000 * (now - before) for before, now in itertools.pairwise(times)]
    assert [row["step_ms"] for row in steps] == pytest.approx(expected, rel=1e-9)
    assert summary["mean_step_ms"] == 1000 * summary["train_time_s"] / 26
    assert summary["train_time_s"] == record["validations"][-1]["train_time_s"]
    for row in record["validations"]:
        done = row["step"]
        assert times[done] <= row["train_time_s"] <= (times[done + 1] if done < 26 else math.inf)
    lines = re.findall(r"train_time (\S+) s step (\S+) ms$", text, re.MULTILINE)
    shown = [(f"{row['train_time_s']:.3f}", f"{row['step_ms']:.1f}") for row in steps]
    assert lines == shown
    time_s, mean = summary["train_time_s"], summary["mean_step_ms"]
    assert f"trained {time_s:.2f} s, {mean:.1f} ms a step, " in text


def test_clock_counts_what_runs_between_start_and_stop(monkeypatch):
    """Validation after the second of three steps takes 100 s, and no step has them."""
    now = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    runtime = cpu_runtime()
    clock = Clock(runtime)
    progress = Progress(GPT(tiny_config(), runtime), runtime, clock, 3)
    now[0] += 7  # preparation
    clock.start()
    now[0] += 1  # before the first step
    for step, seconds in enumerate((2.0, 3.0, 4.0)):
        now[0] += seconds
        progress.launched(step, torch.tensor(float(step)))
        if step == 1:
            now[0] += 0.5
            clock.stop()
            now[0] += 100
            clock.start()
    clock.stop()
    assert clock.total == 10.5
    rows = [list(row.values()) for row in runtime.log.data["steps"]]  # nothing is written
    assert rows == [[1, 0.0, 3.0, 3000.0], [2, 1.0, 6.0, 3000.0], [3, 2.0, 10.5, 4500.0]]


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
def test_losses_that_are_no_finite_number_end_a_run(runtime, monkeypatch, loss):
    clock = Clock(runtime)
    clock.start()
    model = GPT(tiny_config(), runtime)
    progress = Progress(model, runtime, clock, 3)
    progress.launched(0, torch.tensor(7.0))
    with pytest.raises(UserError, match=f"training loss is {loss} at step 2 "):
        progress.launched(1, torch.tensor(loss))
    monkeypatch.setattr("train_gpt.validation_batches", lambda *_: iter([random_batch(1, [64])]))
    monkeypatch.setattr(model, "validation_loss", lambda *_: torch.tensor(loss))
    with pytest.raises(UserError, match=f"validation loss is {loss}"):
        validate(model, model.config, runtime, 64, Windows(8, 16))


def test_picture_is_one(trained):
    (picture,) = (trained / "logs").glob("*.png")
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content[12:16] == b"IHDR"
    assert content.endswith(b"IEND\xaeB`\x82")
    assert len(content) > 10_000


def test_run_learns(trained):
    """The first loss is that of no knowledge, the last one is better than token frequencies."""
    _, record = log_of(trained)
    assert record["steps"][0]["train_loss"] == pytest.approx(math.log(50_304), abs=0.3)
    entropy = unigram_entropy(read_shard(trained / "val.bin"))
    assert record["summary"]["val_loss"] < entropy - 0.5


def load(checkpoint: Path) -> tuple[Config, GPT]:
    saved = torch.load(checkpoint, weights_only=True)
    config = config_from_text(saved["config"])
    model = GPT(config, cpu_runtime())
    model.load_state_dict(saved["weights"])
    return config, model


def validation_loss(folder: Path, window_short: int, window_long: int) -> float:
    """That of the saved weights, from the shard in float64: sequences of 64 tokens, documents
    apart."""
    _, model = load(folder / "weights.pt")
    tokens, total = read_shard(folder / "val.bin").astype(np.int64), 0.0
    for begin in range(0, 1000, 64):
        row = torch.from_numpy(tokens[begin : begin + 65])
        inputs, targets = row[:-1], row[1:]
        starts = {0, *(inputs == START_TOKEN).nonzero().flatten().tolist(), len(inputs)}
        batch = Batch(inputs.int(), targets, torch.tensor(sorted(starts), dtype=torch.int32), 64)
        with torch.no_grad():
            hidden = model.hidden(batch, Windows(window_short, window_long))
            total += target_losses(model, batch, hidden)[:, 0].sum().item()
    return total / 1000


def test_final_validation_loss_is_that_of_the_saved_weights(trained):
    """Scored with the final long window, not with that of the last step."""
    loss = log_of(trained)[1]["summary"]["val_loss"]
    # fp32 loses 5e-6 in the sum of 50,000 exponentials
    assert loss == pytest.approx(validation_loss(trained, 16, 64), abs=2e-5)
    assert loss != pytest.approx(validation_loss(trained, 16, 2), abs=2e-4)


@pytest.mark.parametrize(
    ("steps", "windows", "others"), [(13, (16, 32), (16, 2)), (12, (8, 16), (16, 32))]
)
def test_stopped_run_is_the_beginning_of_the_whole_one(trained, data, steps, windows, others):
    """Its validation has the windows of its last step, not that of the final validation, here one
    that no training step has, nor those of the next stage, which begins
    after step 12."""
    result = fork(data, stop_step=steps, final_window_long=2, checkpoint=data / "weights.pt")
    assert result.returncode == 0, result.stderr
    (_, whole), (_, record) = log_of(trained), log_of(data)
    losses = [row["train_loss"] for row in whole["steps"]][:steps]
    assert [row["train_loss"] for row in record["steps"]] == pytest.approx(losses, abs=1e-3)
    assert [row["step"] for row in record["validations"]] == sorted({12, steps})
    summary = record["summary"]
    assert summary["mean_step_ms"] == 1000 * summary["train_time_s"] / steps
    loss = summary["val_loss"]
    assert loss == pytest.approx(validation_loss(data, *windows), abs=1e-5)
    assert loss != pytest.approx(validation_loss(data, *others), abs=2e-4)


def test_run_is_the_plain_loop(trained):
    """Losses and weights are those of the loop without warm-up, prefetching and logging: every step
    has its own sequences, windows, loss weights, learning rate and momentum."""
    config, saved = load(trained / "weights.pt")
    model = GPT(config, cpu_runtime())
    optimizer = Optimizer(model, config, cpu_runtime())
    first, second, last = *config.stages, config.extension[0]
    stages = [first] * 12 + [second] * 12 + [last] * 2
    shapes = [(stage.tokens_per_step // 2, stage.max_seq_len) for stage in stages]
    rows = training_batches(dataclasses.replace(config, tokens_per_pass=1), cpu_runtime(), shapes)
    schedule, losses = Schedule(config), []
    for step, stage in enumerate(stages):
        weights = torch.tensor([[1, 0.25], [1, 0.15], [1.0, 0]][step // 12])
        windows = Windows(stage.window_short, stage.window_long)
        losses.append(0.0)
        for row in next(rows):  # computed at once there
            loss, next_token_loss = model.training_loss(row, windows, weights)
            (loss / 2).backward()
            model.ngrams.gather(*model.ngrams.pending)
            losses[-1] += next_token_loss.item() / stage.tokens_per_step
        optimizer.step(step, schedule.lr_scale(step), schedule.momentum(step))
    record = log_of(trained)[1]
    assert [row["train_loss"] for row in record["steps"]] == pytest.approx(losses, abs=2e-3)
    for name, value in saved.state_dict().items():
        error = (model.state_dict()[name] - value).norm() / value.norm()
        assert error < 0.005, name


def validation_losses(folder: Path) -> list[float]:
    return [row["val_loss"] for row in log_of(folder)[1]["validations"]]


@pytest.mark.parametrize(
    ("step", "windows", "weights"),
    [(0, Windows(8, 24), [1, 0.5]), (8, Windows(12, 32), [1, 0.0])],
)
def test_micro_step_adds_its_share_of_the_gradient(runtime, step, windows, weights):
    """That of the loss in nats per sequence, by the windows and weights of its stage, over the
    sequences of a step; on a CPU without any graph."""
    config = tiny_config(sequences_per_step=4)
    model, batch = trained_like(config, runtime), random_batch(1, [20, 44])
    trainer = Trainer(model, runtime)
    loss, plain = model.training_loss(batch, windows, torch.tensor(weights))
    loss.backward()
    expected = {name: param.grad.clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad.zero_()
    assert not trainer.uses_graphs
    for rows in (1, 2, 3):
        assert trainer.micro_step(batch, trainer.schedule.stage(step)).item() == plain.item()
        for name, param in model.named_parameters():
            torch.testing.assert_close(param.grad, rows / 4 * expected[name], rtol=1e-4, atol=1e-4)


def test_candidates_of_the_stage_reach_the_model(runtime):
    """As many as the stage has; with 0 the loss is that of the whole vocabulary."""
    stages = (Stage(1.0, 256, 48, 8, 24, 1.0, 0.5, 512),)
    model, batch = trained_like(tiny_config(stages=stages), runtime), random_batch(1, [20, 44])
    trainer, weights, losses = Trainer(model, runtime), torch.tensor([1, 0.5]), {}
    for columns in (0, 256, 512):
        losses[columns] = model.training_loss(batch, Windows(8, 24), weights, columns)[1].item()
    assert len({round(loss, 2) for loss in losses.values()}) == 3, "columns must show"
    assert trainer.micro_step(batch, trainer.schedule.stage(0)).item() == losses[512]
    whole = model.training_loss(batch, Windows(12, 32), torch.tensor([1.0, 0]), 0)[1].item()
    assert trainer.micro_step(batch, trainer.schedule.stage(8)).item() == whole  # the extension


def test_loss_of_a_step_is_the_mean_of_its_passes(runtime):
    config = tiny_config(num_steps=100)
    model = trained_like(config, runtime)
    rows = [random_batch(seed, [20, 44]) for seed in range(3)]
    with torch.no_grad():
        losses = [model.validation_loss(row, Windows(8, 24)).item() / 64 for row in rows]
    assert max(losses) - min(losses) > 0.01, "the rows must differ, or this shows little"
    loss = Trainer(model, runtime).run_step(0, rows)
    assert loss.shape == () and loss.item() == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_a_micro_batch_equals_its_sequences_one_by_one(tmp_path, runtime):
    """A pass of several sequences, with candidates sampled for each and keys that come from the
    token before, has the loss, the gradients and the n-grams of passes of one sequence: none
    depends on another."""
    tokens = random_documents(1, [5, 40, 90, 61, 8, 33, 70, 48] * 2, num_ids=300)
    files = {"train_files": str(write_shard(tmp_path / "train.bin", tokens))}
    stages = (Stage(1.0, 256, 48, 8, 24, 1.0, 0.5, 512),)
    kinds = {"ngram_orders": (2, 3), "stages": stages, "tokens_per_sampling": 48}
    results = []
    for tokens_per_pass, count in ((64, 4), (128, 2), (191, 2), (10_000, 1)):
        config = tiny_config(**files, **kinds, tokens_per_pass=tokens_per_pass)
        model = trained_like(config, runtime)
        trainer = Trainer(model, runtime)
        (rows,) = training_batches(config, runtime, [(64, 48)])
        assert [batch.sequences for batch in rows] == [4 // count] * count
        loss = sum(trainer.micro_step(batch, trainer.schedule.stage(0)) for batch in rows)
        found = model.ngrams.rows[:256], model.ngrams.grads[:256]
        results.append([loss, *found, *(param.grad for param in model.parameters())])
    for result in results[1:]:
        for value, expected in zip(result, results[0], strict=True):
            assert expected.any()
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


# Failures ----------------------------------------------------------------------------------------

FEW_CANDIDATES = "1:128:48:8:16:1:.5:16"  # for 16 letters and the start token


def truncate(folder: Path) -> None:
    path = folder / "train_1.bin"
    path.write_bytes(path.read_bytes()[:-2])


def spoil_magic(folder: Path) -> None:
    path = folder / "train_0.bin"
    path.write_bytes(b"\x00" + path.read_bytes()[1:])


def spoil_token(folder: Path) -> None:
    tokens = read_shard(folder / "train_1.bin").copy()
    tokens[-1] = 60_000
    write_shard(folder / "train_1.bin", tokens)


def spoil_val_token(folder: Path) -> None:
    tokens = read_shard(folder / "val.bin").copy()
    tokens[900] = 60_000
    write_shard(folder / "val.bin", tokens)


def remove_shards(folder: Path) -> None:
    for path in folder.glob("train_*.bin"):
        path.unlink()


def check_message(result: subprocess.CompletedProcess, folder: Path, message: str) -> None:
    """A run has failed with one line; a log that was begun tells it too."""
    assert result.returncode == 1
    assert re.fullmatch(rf"\nerror: .*{message}[^\n]*\n", result.stderr), result.stderr
    for text in (folder / "logs").glob("*.txt"):
        assert text.read_text(encoding="utf-8").splitlines()[-1] == result.stderr.strip()
        assert "steps" in json.loads(text.with_suffix(".json").read_text())


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (remove_shards, {}, r"--train_files .*train_\*\.bin: no such file"),
        (None, {"val_file": "gone.bin"}, r"--val_file gone\.bin: no such file"),
        (truncate, {}, r"train_1\.bin: 10020 bytes, expected 10022"),
        (spoil_magic, {}, r"train_0\.bin: not a token shard"),
        (spoil_token, {}, r"train_1\.bin: token 60000 at position 4498"),
        (spoil_val_token, {}, r"val\.bin: token 60000 at position 900"),
        (
            None,
            {"num_steps": 400},
            r"--train_files .*8000 tokens to train on, but .* reads at least 77440",
        ),
        (None, {"sequences_per_step": 5}, r"--stages: 128 tokens a step do not make 5 sequences"),
        (None, {"checkpoint": "none/w.pt"}, r"--checkpoint none/w\.pt: cannot be written"),
    ],
)
def test_one_message_names_what_to_fix(data, spoil, changes, message):
    if spoil is not None:
        spoil(data)
    check_message(fork(data, **changes), data, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adam_lr": "1e30"}, r"loss is nan.*not finite by now: .*lower --muon_lr 0\.023"),
        ({"stages": FEW_CANDIDATES}, r"loss is nan at step 1 .*; more candidates in --stages"),
    ],
)
def test_one_message_says_how_losses_stay_finite(data, changes, message):
    check_message(run(data, **changes), data, message)


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (
            None,
            {"sequences_per_step": 5},
            "--sequences_per_step 5 is not divisible by the 2 processes",
        ),
        (spoil_token, {}, r"token 60000 at position 4498"),
    ],
)
def test_two_ranks_end_quickly_with_one_message(data, spoil, changes, message):
    if spoil is not None:
        spoil(data)
    result = run(data, 2, timeout=60, **changes)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert re.search(message, lines[0])
    assert result.stderr.count("Traceback (most recent call last)") <= 1  # the launcher's own


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)


OUT_OF_MEMORY = """
import sys
sys.path.insert(0, ROOT)
import torch
import train_gpt
def compute(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB. GPU 0 has")
train_gpt.Trainer.compute = compute
sys.exit(train_gpt.main())
"""


def test_too_little_memory_has_a_remedy(data, tmp_path):
    (script := tmp_path / "script.py").write_text(OUT_OF_MEMORY.replace("ROOT", repr(str(ROOT))))
    result = run(data, script=script, tokens_per_pass=512)
    assert result.returncode == 1
    found = "CUDA out of memory, for the passes of a step: lower --tokens_per_pass 512, to 128"
    found += " at the least"
    assert result.stderr.splitlines()[-1] == f"error: {found}"
    assert found in log_of(data)[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_interrupt_keeps_the_log(data, ranks):
    """Ctrl-C goes to every process of the terminal's group, the launcher included."""

    def has_steps() -> bool:
        return any("step 3 train_loss" in path.read_text() for path in data.glob("logs/*.txt"))

    process = subprocess.Popen(
        command(data, ranks, num_steps=5000, repeat_data="true"),
        cwd=data,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until(has_steps, process, 60)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=45)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text, record = log_of(data)
    assert err.count("interrupted; the log so far is") == 1, err
    if ranks == 1:
        assert process.returncode == 130
        assert re.fullmatch(r"\ninterrupted; the log so far is .*\.txt\n", err)
    else:
        assert process.returncode != 0
    assert text.splitlines()[-1].startswith("interrupted")
    assert len(record["steps"]) >= 3
    assert record["steps"][2]["step"] == 3


# The preset for a look at it ---------------------------------------------------------------------

MARGIN = 0.3  # nats below the unigram entropy


def test_tiny_preset_learns_the_built_in_sample(tmp_path):
    """As a user without a GPU starts it, with fewer steps of each stage."""
    sample = [sys.executable, str(ROOT / "data" / "sample.py"), "sample", "--tokenizer", "bytes"]
    subprocess.run(sample, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    (val_file,) = (tmp_path / "sample").glob("sample_val_*.bin")
    arguments = ["--preset", "tiny", "--num_steps", "32", "--extension_steps", "1"]
    arguments += ["--val_tokens", "4096"]
    arguments += ["--train_files", "sample/sample_train_*.bin"]
    arguments += ["--val_file", str(val_file)]
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    _, record = log_of(tmp_path)
    entropy = unigram_entropy(read_shard(val_file))
    print(f"{entropy:.3f} {record['summary']} {time.monotonic() - started:.0f} s")
    assert 2 < entropy < math.log(257)
    assert record["summary"]["val_loss"] < entropy - MARGIN
