"""How a run ends: what it leaves, and what becomes of it when a disk is full, a screen is gone, a
signal comes or its launcher dies. Most runs are forks of the tests, which spares them the imports.
"""

import dataclasses
import functools
import gc
import importlib.util
import io
import json
import multiprocessing
import os
import pty
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, tiny_config
from matplotlib.figure import Figure
from test_train import command, environment, fork_main, free_port, log_of, write_data

import train_gpt
from train_gpt import Config, Log, UserError, check_output, check_ranks, replacing, show

SMALL = {
    "model_dim": 16,
    "head_dim": 8,
    "mlp_dim": 32,
    "ngram_rows": 512,
    "stages": "1:64:48:8:16:1:.25:0",
    "val_every": 0,
    "val_tokens": 64,
}
SHORT = {**SMALL, "stop_step": 3}
ENDLESS = {**SMALL, "num_steps": 50_000, "extension_steps": 0, "repeat_data": "true"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path)


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


def end_of(process: multiprocessing.Process, timeout: float = 60) -> int:
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"no end after {timeout} s")
    return process.exitcode


def has_steps(folder: Path) -> bool:
    return any("step 3 train_loss" in path.read_text() for path in folder.glob("logs/*.txt"))


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


# Outputs -----------------------------------------------------------------------------------------


def test_outputs_are_checked(tmp_path):
    """Kind of file, folder, room; what is there stays as it is, and nothing else comes."""
    (old := tmp_path / "old.pt").write_text("kept")
    (tmp_path / "link.pt").symlink_to(old)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    before = files_of(tmp_path)
    for name in ("old.pt", "link.pt", "new.pt", "new [v1].pt"):
        check_output("--checkpoint", f"{tmp_path}/{name}", 100)
    for name, num_bytes, message in (
        ("folder", 0, "no file that can be replaced"),
        ("folder/", 0, "no file that can be replaced"),
        ("new/", 0, "no file that can be replaced"),
        ("pipe", 0, "no file that can be replaced"),
        ("null", 0, "no file that can be replaced"),
        ("none/new.pt", 0, r"cannot be written \(No such file or directory\)"),
        ("old.pt/new.pt", 0, r"cannot be written \(Not a directory\)"),
        ("x" * 254, 0, r"cannot be written \(File name too long\)"),
        ("new.pt", 2**70, r"1,125,899,906,842,624.0 MiB will be written, [\d,.]+ MiB are free"),
    ):
        with pytest.raises(UserError, match=f"^--checkpoint {tmp_path}/{name}: {message}") as error:
            check_output("--checkpoint", f"{tmp_path}/{name}", num_bytes)
        assert "choose another" in str(error.value)
    assert files_of(tmp_path) == before
    assert old.read_text() == "kept"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    (old := tmp_path / "old.pt").write_text("old")
    (link := tmp_path / "link.pt").symlink_to(old)
    with pytest.raises(KeyboardInterrupt), replacing(link) as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert (files_of(tmp_path), old.read_text()) == (["link.pt", "old.pt"], "old")
    with replacing(link) as path:
        path.write_text("new")
        assert old.read_text() == "old"
    assert (files_of(tmp_path), old.read_text()) == (["link.pt", "old.pt"], "new")
    assert link.is_symlink()


@pytest.mark.parametrize("name", ["folder", "/dev/full"])
def test_bad_checkpoint_is_reported_before_training(data, name):
    (data / "folder").mkdir()

    def prepare() -> None:
        train_gpt.GPT = None

    assert end_of(fork_main(data, prepare, checkpoint=name)) == 1
    error = f"error: --checkpoint {name}: no file that can be replaced: choose another name"
    assert (data / "err").read_text() == f"\n{error}\n"
    assert log_of(data)[0] == error + "\n"


def test_disk_space_for_weights_is_checked_before_training(data):
    """As soon as there is a model: of this one the n-grams alone take more than any disk has."""

    def prepare() -> None:
        train_gpt.Trainer = lambda *_: None
        model = train_gpt.GPT

        def large(*arguments: object) -> torch.nn.Module:
            made = model(*arguments)
            made.ngrams.table = torch.empty(2**50, 1, device="meta")
            return made

        train_gpt.GPT = large

    assert end_of(fork_main(data, prepare, checkpoint="w.pt")) == 1
    (error,) = re.findall(r"^error: .*", (data / "err").read_text(), re.MULTILINE)
    pattern = r"error: --checkpoint w\.pt: 4,294,96\d,\d+\.\d MiB will be written, .* MiB are free"
    assert re.match(pattern, error), error


def test_weights_that_cannot_be_saved_end_in_an_error(data):
    """The file that was there stays, nothing else is left, and the log has the result."""
    (data / "w.pt").write_text("old")

    def prepare() -> None:  # a disk that takes no more than 1 MB of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))

    assert end_of(fork_main(data, prepare, checkpoint="w.pt", **SHORT)) == 1
    error = (
        "error: --checkpoint w.pt: cannot be written ([Errno 27] File too large): choose another"
    )
    assert (data / "err").read_text() == f"\n{error}\n"
    text, record = log_of(data)
    assert text.splitlines()[-1] == error
    assert len(record["steps"]) == record["summary"]["steps"] == 3
    assert (data / "w.pt").read_text() == "old"
    assert not list(data.rglob("*.part"))


def test_a_full_log_disk_does_not_end_a_run(data):
    """One line says so, and the exit code; weights, result and .json are there."""

    def prepare() -> None:
        step = Log.step

        def full(self: Log, number: int, *others: object) -> None:
            if number == 2:
                self.file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
            step(self, number, *others)

        Log.step = full

    assert end_of(fork_main(data, prepare, checkpoint="w.pt", **SHORT)) == 1
    (line,) = (data / "err").read_text().splitlines()
    found = r"cannot be written \(No space left on device\): the run goes on, its log has gaps"
    assert re.fullmatch(rf"error: logs/\S+\.txt: {found}".replace("logs", ".*logs"), line), line
    text, record = log_of(data)
    assert "step 1 train_loss" in text and "step 2 train_loss" not in text
    assert [row["step"] for row in record["steps"]] == [1, 2, 3]
    assert "val loss" in (data / "out").read_text()
    assert torch.load(data / "w.pt", weights_only=True)["weights"]


def test_json_is_whole_or_not_there(tmp_path, capfd):
    log = Log(str(tmp_path), "run")
    log.data["steps"] = list(range(1000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for _ in range(2):
            log.write_json()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.failed and files_of(tmp_path) == ["run.txt"]
    (line,) = capfd.readouterr().err.splitlines()
    assert "run.txt: cannot be written (File too large)" in line
    log.write_json()  # there is room again
    assert json.loads((tmp_path / "run.json").read_text()) == log.data


# Screens -----------------------------------------------------------------------------------------


def test_a_closed_stdout_and_an_ascii_stderr(data):
    """A closed pipe as stdout, a terminal without the bar's characters as stderr, a picture that
    cannot be drawn: all is in the log, the weights are saved, the exit code is 0."""

    def prepare() -> None:
        def fail(*arguments: object, **options: object) -> None:
            Path(arguments[1]).write_text("half")
            raise OSError("no room for a picture")

        Figure.savefig = fail

    reader, writer = os.pipe()
    os.close(reader)
    terminal, screen = pty.openpty()
    termios.tcsetwinsize(screen, (24, 80))
    process = fork_main(
        data,
        prepare,
        "ascii",
        writer,
        screen,
        checkpoint="w.pt",
        log_dir=data / "logs · é",
        **SHORT,
    )
    os.close(writer)
    assert end_of(process) == 0
    shown = os.read(terminal, 2**16).decode("ascii")
    for descriptor in (terminal, screen):
        os.close(descriptor)
    assert re.search(r"\r#+ step 3/3, loss \d+\.\d+ \? \d+\.\d ms/step \? 00:00 left", shown), shown
    assert "Traceback" not in shown
    (data / "logs · é").rename(data / "logs")
    lines = log_of(data)[0].splitlines()
    assert lines[-2] == "weights saved in w.pt"
    warning = (
        r"log .*/logs · é/\S+\.txt; warning: no curve, drawing it failed: no room for a picture"
    )
    assert re.fullmatch(warning, lines[-1])
    assert sorted(path.suffix for path in (data / "logs").iterdir()) == [".json", ".txt"]
    assert torch.load(data / "w.pt", weights_only=True)["weights"]


def test_writing_to_a_closed_stream_is_no_error(capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        for _ in range(3):
            show("nobody reads this", stream)
    show("this is read")
    assert capfd.readouterr() == ("this is read\n", "")


def test_a_slow_reader_gets_every_line(monkeypatch):
    """Of more than a pipe holds, and from a stream that whoever started the run made non-blocking:
    terminals and pipes are shared with it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    lines = [f"line {i}".ljust(99) for i in range(2000)]
    with os.fdopen(writer, "w") as stream, os.fdopen(reader) as pipe:
        monkeypatch.setattr(sys, "stdout", stream)
        train_gpt.open_streams()
        writing = threading.Thread(target=lambda: [*map(show, lines)])
        writing.start()
        writing.join(0.2)
        assert writing.is_alive(), "the pipe must be full, or this shows little"
        assert [pipe.readline().rstrip("\n") for _ in lines] == lines
        writing.join()


def test_missing_streams_and_narrow_encodings_lose_no_run(monkeypatch, tmp_path):
    (poor := tmp_path / "poor").touch()
    with poor.open("w", encoding="latin-1") as stream:
        monkeypatch.setattr(sys, "stdout", None)
        monkeypatch.setattr(sys, "stderr", stream)
        train_gpt.open_streams()
        show("into nothing")
        show("ms · lr² − \udcff", sys.stderr)
        monkeypatch.setattr(sys, "stdout", io.StringIO())  # cannot be made other
        train_gpt.open_streams()
    assert poor.read_bytes() == "ms · lr² ? ?\n".encode("latin-1")


# Ranks -------------------------------------------------------------------------------------------


def variables_of_two_ranks(store: dist.TCPStore | None = None) -> list[dict[str, str]]:
    """What a launcher tells each of them. store: of the launcher, as torchrun has one; without it
    rank 0 hosts one, and what the other asks it later fails with a warning of torch."""
    port = store.port if store is not None else free_port()
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if store is not None:
        world["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return [world | {"RANK": str(rank)} for rank in range(2)]


def errors_of_ranks(*configs: Config) -> list[str]:
    """What check_ranks says on each rank: here they are threads."""
    store = dist.HashStore()

    def check(rank: int, config: Config) -> str:
        try:
            check_ranks(config, store, rank, len(configs))
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(configs)) as ranks:
        return [*ranks.map(check, *zip(*enumerate(configs)))]


@pytest.fixture
def agreed(data) -> Config:
    """The first rank's config."""
    files = {"train_files": f"{data}/train_*.bin", "val_file": f"{data}/val.bin"}
    return tiny_config(**files, log_dir=str(data))


def test_ranks_may_differ_in_folders(agreed, data):
    """And data that no rank has is the business of those that read it."""
    (elsewhere := data / "elsewhere").mkdir()
    for path in data.glob("*.bin"):
        shutil.copy(path, elsewhere)
    files = {"train_files": f"{elsewhere}/*_?.bin", "val_file": f"{elsewhere}/v*.bin"}
    other = dataclasses.replace(agreed, **files, log_dir=str(elsewhere))
    assert errors_of_ranks(agreed, other, agreed) == ["", "", ""]
    agreed, other = (
        dataclasses.replace(config, checkpoint=folder + "/w.pt", val_file="gone.bin")
        for config, folder in ((agreed, "a"), (other, "b"))
    )
    assert errors_of_ranks(agreed, other) == ["", ""]
    assert errors_of_ranks(agreed) == [""]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, "--seed is 1337 on rank 0, but 7 on rank 2"),
        ({"checkpoint": "w.pt"}, "--checkpoint is missing on rank 0, but w.pt on rank 2"),
        ({"stages": train_gpt.TINY_STAGES}, "--stages is 1.0:256:48:8:24:1.0:0.5:0 on rank 0, but"),
        (
            {"val_file": "{}/train_0.bin"},
            "shard 0 of the data is val.bin with 1,001 tokens on rank",
        ),
        ({"train_files": "{}/train_0.bin"}, "train_1.bin with 4,499 tokens on rank 0, but missing"),
        ({"train_files": "{}/*.bin"}, "shard 3 of the data is missing on rank 0, but val.bin with"),
        ({"val_file": "gone.bin"}, "1,001 tokens on rank 0, but --val_file gone.bin: no such file"),
    ],
)
def test_what_differs_between_ranks_is_named_on_all(agreed, data, changes, message):
    changes = {
        name: value.format(data) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    error, *others = errors_of_ranks(agreed, agreed, dataclasses.replace(agreed, **changes))
    assert message in error and others == [error, error]
    assert error.endswith(" on rank 2: start all ranks with the same options, script and data")


def test_ranks_have_one_script(agreed, data, monkeypatch):
    store = dist.HashStore()
    rank_1 = ThreadPoolExecutor(1).submit(check_ranks, agreed, store, 1, 2)
    wait_until(lambda: store.check(["speedrun/rank 1"]))
    monkeypatch.setattr(train_gpt, "SOURCE", "changed")
    message = "the script is SHA-256 [0-9a-f]{64} on rank 0, but SHA-256 [0-9a-f]{64} on rank 1: st"
    for check in functools.partial(check_ranks, agreed, store, 0, 2), rank_1.result:
        with pytest.raises(UserError, match=message):
            check()


def test_ranks_with_two_seeds_end_before_training(data):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = variables_of_two_ranks(store)
    ranks = [fork_main(data, variables=own, seed=r, **SHORT) for r, own in enumerate(variables)]
    assert [*map(end_of, ranks)] == [1, 1]
    (error,) = (data / "err").read_text().splitlines()[1:]
    assert error.startswith("error: --seed is 0 on rank 0, but 1 on rank 1: start all ranks with ")
    assert not (data / "logs").exists()


@pytest.mark.parametrize("told", [False, True])
def test_the_log_has_the_error_of_another_rank(data, told):
    """Of rank 1, which fails alone. Rank 0 finds out when it waits for that rank, or is told by
    SIGTERM, as torchrun does."""

    def begin(*arguments: object) -> int:  # on rank 0, with its log
        Path("begun").touch()
        time.sleep(60 * told)
        return 64  # targets of validation

    def fail(*arguments: object) -> None:
        wait_until(Path("begun").exists)
        raise UserError("of rank 1 alone \udcff")

    def prepare(rank: int) -> None:
        train_gpt.check_data = [begin, fail][rank]

    ranks = [
        fork_main(data, functools.partial(prepare, rank), variables=own, **SHORT)
        for rank, own in enumerate(variables_of_two_ranks())
    ]
    assert end_of(ranks[1]) == 1
    if told:
        os.kill(ranks[0].pid, signal.SIGTERM)
    assert end_of(ranks[0], 10) == (143 if told else 1)
    assert (data / "err").read_text() == "\nerror: of rank 1 alone ?\n"
    assert log_of(data)[0].splitlines()[-1] == "error: of rank 1 alone ?"


def test_the_log_has_the_script_that_runs(data):
    """Not what has taken its place on the disk since."""
    path = data / "changing.py"
    path.write_text(before := Path(train_gpt.__file__).read_text(encoding="utf-8"))
    spec = importlib.util.spec_from_file_location("changing", path)
    script = sys.modules["changing"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path.write_text("changed")
    assert end_of(fork_main(data, script=script, **SHORT)) == 0
    assert log_of(data)[0].startswith(before + "=" * 100)


# Signals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_with_its_log(data, number):
    """One that the caller has ignored, as nohup and a shell's background jobs ask, does not."""

    def prepare() -> None:
        if number != signal.SIGHUP:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = fork_main(data, prepare, checkpoint="w.pt", **ENDLESS)
    wait_until(lambda: has_steps(data))
    os.kill(process.pid, signal.SIGHUP)
    if number != signal.SIGHUP:
        process.join(0.5)
        assert process.exitcode is None
        os.kill(process.pid, number)
    assert end_of(process, 5) == 128 + number
    (line,) = (data / "err").read_text().split("\n")[1:-1]
    pattern = rf"interrupted by {number.name}; the log so far is \S+/logs/\S+\.txt"
    assert re.fullmatch(pattern, line)
    text, record = log_of(data)
    assert text.splitlines()[-1] == line
    assert len(record["steps"]) >= 3
    assert not (data / "w.pt").exists() and not list(data.rglob("*.part"))


def test_nothing_holds_stdout_after_an_interruption(data):
    """Nor does the process that finds the impossible pairs, which may take minutes: a pipe to tee
    ends with the run."""

    def prepare() -> None:
        def find(*_: object) -> None:
            Path("finding").touch()
            time.sleep(60)

        train_gpt.impossible_pairs = find

    reader, writer = os.pipe()
    process = fork_main(data, prepare, stdout=writer, canonical_mask="true", **ENDLESS)
    os.close(writer)
    wait_until((data / "finding").exists)
    os.kill(process.pid, signal.SIGINT)
    assert end_of(process, 5) == 130
    with os.fdopen(reader, "rb", 0) as pipe:
        while select.select([pipe], [], [], 5)[0] and (text := pipe.read(2**16)):
            pass
    assert text == b"", "somebody still has the other end"


def test_ignored_signals_of_children_hide_no_exit_code(data):
    """Whoever started the run ignores SIGCHLD, so that nobody would have to wait for a child."""

    def prepare() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        train_gpt.impossible_pairs = lambda _, vocab: np.zeros((vocab, vocab // 8), np.uint8)

    assert end_of(fork_main(data, prepare, canonical_mask="true", **SHORT)) == 0
    assert (data / "err").read_text() == ""


def test_a_rank_that_waits_for_another_ends_too(data):
    """The main thread waits in a collective, where no exception can be raised."""
    ranks = [fork_main(data, variables=own, **ENDLESS) for own in variables_of_two_ranks()]
    try:
        wait_until(lambda: has_steps(data))
        os.kill(ranks[1].pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(ranks[0].pid, signal.SIGTERM)
        assert end_of(ranks[0], 10) == 143
    finally:
        ranks[1].kill()
    assert (data / "err").read_text().count("interrupted by SIGTERM; the log so far is") == 1
    assert len(log_of(data)[1]["steps"]) >= 3


def processes_of(folder: Path) -> list[int]:
    """Those that have the folder on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(folder) in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it is gone
            pass
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_ranks_end_with_a_launcher_that_is_killed(data):
    with subprocess.Popen(
        command(data, 2, **ENDLESS),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as launcher:
        try:
            wait_until(lambda: has_steps(data))
            assert len(processes_of(data)) == 3
            launcher.kill()
            wait_until(lambda: not processes_of(data), 10)
        finally:
            if processes_of(data):
                os.killpg(launcher.pid, signal.SIGKILL)
        error = launcher.stderr.read()
    assert error.count("interrupted by SIGTERM; the log so far is") == 1, error
    assert "Traceback" not in error
    assert len(log_of(data)[1]["steps"]) >= 3


def test_ctrl_c_during_the_imports_is_silent(data):
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train_gpt.py"), "--help"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        wait_until(lambda: "numpy" in maps.read_text())
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == -signal.SIGINT


# Forks -------------------------------------------------------------------------------------------


class Cycle:
    """Refers to itself, so that only a collector destroys it and what else it has."""

    def __init__(self, content: object):
        self.cycle, self.content = self, content


def test_forks_destroy_no_garbage_of_the_tests():
    """Here it is a server with a thread, as torchrun leaves one in a process that has called it. A
    fork that forks, as a run does for the impossible pairs, spares it too; the tests do not."""

    def child() -> None:
        if (process := os.fork()) == 0:
            os._exit(0)
        os.waitpid(process, 0)
        # takes the server's thread's place in memory, without which nothing would be wrong
        threading.Thread(target=time.sleep, args=[60], daemon=True).start()
        gc.collect()

    gc.disable()
    try:
        garbage = weakref.ref(Cycle(dist.TCPStore("127.0.0.1", 0, is_master=True)))
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        assert end_of(process) == 0
        assert garbage() is not None
        gc.collect()
        assert garbage() is None
    finally:
        gc.enable()
