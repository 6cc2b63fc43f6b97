"""run.sh: what it starts, where, with which data and how many threads, by an interpreter
that records how it is called; and how processes end, by the real one."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_train import environment

from train_gpt import UserError, connect

# Answers what run.sh asks; all else is noted, and then done what the file `does` says.
PYTHON = f"""#!/bin/bash
case "$*" in
  *version_info*) {sys.executable} -c "import sys; sys.version_info = (${{VERSION:-3, 11}}); $2" ;;
  --version) echo "Python 3.10.13" ;;
  *device_count*) echo "${{GPUS:-0}} ${{THREADS:-4}}" ;;
  *) echo "$PWD|${{OMP_NUM_THREADS:-}}|${{OMP_WAIT_POLICY:-}}|${{*//$'\\n'/ }}" >>"$NOTES/calls"
    [ ! -f "$NOTES/does" ] || . "$NOTES/does" ;;
esac
"""
REAL = f"""#!/bin/bash
case "$*" in *device_count*) echo "0 4" ;; *) exec {sys.executable} "$@" ;; esac
"""


class Copy:
    """run.sh in a folder of its own, another folder to call it from, and an interpreter."""

    def __init__(self, folder: Path, python: str = PYTHON):
        self.root, self.caller, self.notes = folder / "root", folder / "caller", folder / "notes"
        for path in (self.root, self.caller, self.notes):
            path.mkdir()
        shutil.copy(ROOT / "run.sh", self.root / "run.sh")
        shutil.copy(ROOT / "requirements.txt", self.root)
        self.python = folder / "python3"
        self.python.write_text(python)
        self.python.chmod(0o755)
        self.environment = {
            name: value for name, value in environment().items() if not name.startswith("OMP_")
        }
        self.environment |= {"PYTHON": str(self.python), "NOTES": str(self.notes)}

    def start(self, *arguments: object, cwd: Path | None = None, run: Path | None = None, **more):
        return subprocess.Popen(
            [str(word) for word in (run or self.root / "run.sh", *arguments)],
            cwd=cwd or self.root,
            env=self.environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, code: int = 0, **more) -> tuple[list[list[str]], str, str]:
        """The calls, each with folder, threads, policy and words, and what was printed."""
        (self.notes / "calls").unlink(missing_ok=True)
        process = self.start(*arguments, **more)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, out + err
        calls = self.notes / "calls"
        text = calls.read_text() if calls.exists() else ""
        return [line.split("|", 3) for line in text.splitlines()], out, err


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


# What it starts ----------------------------------------------------------------------------------

TRAIN = ("--num_steps", "3")


def test_paths_are_the_callers_from_any_folder_and_through_links(copy):
    """Scripts and data are those next to run.sh."""
    root = copy.root = copy.root.rename(copy.root.with_name("root [v1]"))
    (copy.caller / "link").symlink_to(root / "run.sh")
    (copy.caller / "link to link").symlink_to("link")
    data = f"--val_file {root}/data/sample/sample_val_000000.bin "
    data += f"--train_files {root}/data/sample/sample_train_*.bin"
    for run in (root / "run.sh", "../root [v1]/run.sh", "./link", copy.caller / "link to link"):
        calls, _, _ = copy.run(*TRAIN, cwd=copy.caller, run=run)
        assert [call[0] for call in calls] == [str(copy.caller)] * 2
        sample, train = (call[-1] for call in calls)
        assert sample == f"{root}/data/sample.py"
        assert train == f"{root}/train_gpt.py --num_steps 3 {data}"
        calls, _, _ = copy.run("generate", "mine.pt", "a text", cwd=copy.caller, run=run)
        assert calls[0][::3] == [str(copy.caller), f"{root}/tools/generate.py mine.pt a text"]
    calls, _, _ = copy.run(*TRAIN)
    assert calls[-1][-1] == f"{root}/train_gpt.py --num_steps 3", "as in the records' commands"
    calls, _, _ = copy.run("test", "-x", cwd=copy.caller)
    assert {call[0] for call in calls} == {str(root)}
    assert calls[-1][-1].endswith("pytest -n 2 --dist loadfile --no-loadscope-reorder tests -x")


@pytest.mark.parametrize(("program", "code"), [("ruff", 1), ("pytest", 1), ("pytest", 5)])
def test_lint_and_tests_fail_with_their_exit_code(copy, program, code):
    """Also when pytest has found no test, which is 5."""
    (copy.notes / "does").write_text(f"[[ $* != *{program}* ]] || exit {code}\n")
    calls, _, _ = copy.run("test", code=code)
    assert len(calls) == (1 if program == "ruff" else 3)


SAMPLE, FINEWEB = "sample.py", "cached_fineweb.py"


@pytest.mark.parametrize(
    ("gpus", "arguments", "prepared"),
    [
        (0, "", SAMPLE),
        (0, "--preset tiny", SAMPLE),
        (0, "--preset speedrun", FINEWEB),
        (0, "--preset=matching --num_steps 3", FINEWEB),
        (8, "", FINEWEB),
        (8, "--preset=tiny", SAMPLE),
        (8, "--preset tiny --preset speedrun", FINEWEB),
        (8, "--checkpoint tiny", FINEWEB),
        (8, "--train_files mine.bin --val_file val.bin", None),
        (0, "--train_files=mine.bin", None),
        (0, "--val_file mine.bin", None),
        (0, "--help", None),
    ],
)
def test_data_is_that_of_the_preset(copy, gpus, arguments, prepared):
    calls, out, err = copy.run(*arguments.split(), GPUS=str(gpus), NPROC="1")
    assert [call[-1].split("/")[-1] for call in calls[:-1]] == ([prepared] if prepared else [])
    assert calls[-1][-1] == f"{copy.root}/train_gpt.py {arguments}".strip()
    says = gpus == 0 and arguments == ""
    line = "no GPU: training the small preset on the built-in sample, on the CPU\n"
    assert out == line * says
    assert err == ""


def test_the_downloader_is_always_asked_and_the_sample_made_once(copy):
    (fineweb := copy.root / "data" / "fineweb10B").mkdir(parents=True)
    (fineweb / "fineweb_train_000001.bin").write_bytes(b"")
    calls, _, _ = copy.run(GPUS="1")
    assert calls[0][-1] == f"{copy.root}/data/cached_fineweb.py"
    (sample := copy.root / "data" / "sample").mkdir()
    (sample / "sample_train_000001.bin").write_bytes(b"")
    assert len(copy.run()[0]) == 1


def test_a_failed_download_ends_it(copy):
    (copy.notes / "does").write_text("exit 7\n")
    calls, _, _ = copy.run("--preset", "speedrun", code=7)
    assert len(calls) == 1


def test_options_are_read_before_data_are_fetched(tmp_path):
    """By the script that is to run, as a submission of the optimization track."""
    copy = Copy(tmp_path, f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    folder = copy.root / "records" / "optimization"
    folder.mkdir(parents=True)
    (copy.root / "data").mkdir()
    (copy.root / "data" / "cached_fineweb.py").write_text("raise SystemExit(9)\n")
    shutil.copy(ROOT / "train_gpt.py", copy.root)
    for name in ("train_gpt_simple.py", "submission.py", "optimizers/muon.py"):
        shutil.copy(ROOT / "records" / "optimization" / name, folder)
    (folder / "muon.py").rename(copy.root / "mine.py")
    for command in ((), ("optimization", "mine.py")):
        for words in (("--preset", "nix"), ("--preset", "speedrun", "--nix", "3")):
            _, out, err = copy.run(*command, *words, code=2)
            assert (out, err.count("\n")) == ("", 1) and "error: " in err and "nix" in err
        copy.run(*command, "--preset", "speedrun", code=9)
    assert not list(copy.root.rglob("__pycache__/*train_gpt*"))


@pytest.mark.parametrize(
    ("gpus", "settings", "nproc", "threads"),
    [
        (0, {}, 1, 8),
        (0, {"NPROC": "2"}, 2, 4),
        (0, {"NPROC": "3"}, 3, 2),
        (0, {"NPROC": "16"}, 16, 1),
        (2, {}, 2, 4),
        (8, {"NPROC": "1"}, 1, 8),
        (0, {"NPROC": "2", "OMP_NUM_THREADS": "7"}, 2, 7),
    ],
)
def test_the_processes_share_the_cores(copy, gpus, settings, nproc, threads):
    """A user's own setting wins."""
    calls, _, _ = copy.run("--train_files", "x", GPUS=str(gpus), THREADS="8", **settings)
    ((_, found, policy, words),) = calls
    assert (int(found), policy) == (threads, "passive")
    assert (f"--nproc-per-node {nproc} " in words) == (nproc > 1)
    calls, _, _ = copy.run("--train_files", "x", OMP_WAIT_POLICY="active")
    assert calls[0][2] == "active"


@pytest.mark.parametrize("command", [(), ("optimization",), ("reference",)])
def test_buffers_stay_mapped_without_a_gpu(copy, command):
    """A user's own setting wins."""
    names = "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"
    values = " ".join(f"${{{name}:-none}}" for name in names)
    (copy.notes / "does").write_text(f'echo "{values}" >>"$NOTES/malloc"\n')
    for settings in ({"GPUS": "0"}, {"GPUS": "1"}, {"GPUS": "0", names[0]: "9", names[1]: "8"}):
        copy.run(*command, "--train_files", "x", **settings)
    expected = ["0 2147483647", "none none", "9 8"]
    assert (copy.notes / "malloc").read_text().splitlines() == expected


def test_nodes_get_their_rank(copy):
    nodes = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "host"}
    where = "--nnodes 3 --node-rank 2 --master-addr host --master-port {} --nproc-per-node 1 {} "
    for port, more in ((29500, {}), (1234, {"MASTER_PORT": "1234"})):
        ((*_, words),), _, _ = copy.run("--train_files", "x", **nodes, **more)
        assert where.format(port, f"{copy.root}/train_gpt.py") in words


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"NPROC": "abc"}, "NPROC=abc: give a whole number from 1 to 9999"),
        ({"NPROC": "0"}, "NPROC=0: give a whole number from 1 to 9999"),
        ({"NPROC": "-1"}, "NPROC=-1: give a whole number from 1 to 9999"),
        ({"NPROC": "2.5"}, "NPROC=2.5: give a whole number from 1 to 9999"),
        ({"NPROC": "1" * 30}, f"NPROC={'1' * 30}: give a whole number from 1 to 9999"),
        ({"NNODES": "two"}, "NNODES=two: give a whole number from 1 to 9999"),
        ({"NNODES": "2"}, "NODE_RANK=: give a whole number from 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2: give a whole number from 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is missing: give the address of node 0"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "65536"},
            "MASTER_PORT=65536: give a whole number from 1 to 65535",
        ),
    ],
)
def test_numbers_of_the_environment_are_read_first(copy, settings, message):
    """Before anything is installed or fetched; for the profile too."""
    for arguments in ((), ("profile", "--steps", "1")):
        calls, out, err = copy.run(*arguments, code=2, **settings)
        assert (calls, out, err) == ([], "", f"run.sh: {message}\n")


def test_what_is_not_understood(copy):
    _, _, err = copy.run("trian", code=2)
    assert err == "run.sh: 'trian' is not understood; ./run.sh help lists the commands\n"


# Setting up ---------------------------------------------------------------------------------------


def with_path(copy: Copy) -> dict[str, str]:
    """Where python3 is the interpreter and PYTHON is not set."""
    return {"PYTHON": "", "PATH": f"{copy.python.parent}:{os.environ['PATH']}"}


def test_an_old_python_is_named_before_pip_is_called(copy):
    calls, out, err = copy.run("history", code=1, VERSION="3, 10, 13", **with_path(copy))
    assert calls == [] and out == ""
    found = "Python 3.11 or later is needed, python3 is Python 3.10.13: name a later one as PYTHON"
    assert err.startswith(f"run.sh: {found}, or make .venv ") and err.count("\n") == 1
    _, _, err = copy.run("history", code=1, VERSION="3, 10, 13")
    assert err.startswith(f"run.sh: Python 3.11 or later is needed, {copy.python} is Python 3.10.")


def test_requirements_are_installed_once_and_when_they_change(copy):
    """In .venv, which has the interpreter from then on; from another folder too."""
    venv, requirements = copy.root / ".venv", copy.root / "requirements.txt"
    made = f"mkdir -p '{venv}/bin' && cp '{copy.python}' '{venv}/bin/python'"
    (copy.notes / "does").write_text(f"[[ $* != *'-m venv'* ]] || {{ {made}; }}\n")

    def installs() -> list[str]:
        calls, _, _ = copy.run("history", cwd=copy.caller, **with_path(copy))
        assert calls[-1][-1] == f"{copy.root}/tools/report.py history"
        return [call[-1] for call in calls[:-1]]

    pip = "-m pip install --quiet --disable-pip-version-check -r"
    expected = [f"-m venv {venv}", f"{pip} {requirements}"]
    assert installs() == expected
    assert installs() == []
    requirements.write_text("torch==99\n")
    assert installs() == expected
    assert installs() == []
    (copy.notes / "does").write_text("exit 9\n")
    requirements.write_text("torch==98\n")
    copy.run("history", code=9, **with_path(copy))
    (copy.notes / "does").unlink()
    assert installs() == expected, "what failed is done again"


def test_an_interpreter_without_torch_is_named(tmp_path):
    copy = Copy(tmp_path, f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')
    _, _, err = copy.run(code=1)
    assert err.startswith("run.sh: No module named 'torch': install requirements.txt for ")
    assert err.count("\n") == 1


# How it ends --------------------------------------------------------------------------------------


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
    return path.read_text()


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_what_it_waits_for_ends_with_it(copy, number):
    does = 'echo $$ >"$NOTES/new" && mv "$NOTES/new" "$NOTES/pid" && exec sleep 60\n'
    (copy.notes / "does").write_text(does)
    process = copy.start("--preset", "speedrun")
    pid = int(wait_for(copy.notes / "pid"))
    assert not is_gone(pid)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (128 + number, "", "run.sh: interrupted\n")
    assert is_gone(pid)


RANK = """
import os, signal, sys, time
rank, how = os.environ["RANK"], os.environ.get("HOW")
notes = os.environ["NOTES"] + "/rank" + rank
def note(text):
    with open(notes + ".new", "w") as file:
        file.write(text)
    os.rename(notes + ".new", notes)
if how == "code":
    if rank == "0":
        time.sleep(60)
    print("error: said by the rank", file=sys.stderr)
    sys.exit(2)
if how == "kill" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if rank == "1":  # as one that waits in a collective
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
note(str(os.getpid()))
time.sleep(90)
"""


@pytest.fixture
def ranks(tmp_path) -> Copy:
    """Two processes, of a script that imports nothing, under the real torchrun."""
    copy = Copy(tmp_path, REAL)
    (copy.root / "train_gpt.py").write_text(RANK)
    copy.environment["NPROC"] = "2"
    return copy


def test_sigterm_ends_all_ranks_within_seconds(ranks):
    """One that ignores it, too. Before that a SIGHUP that is ignored, as by nohup, is."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = ranks.start("--train_files", "x")
    signal.signal(signal.SIGHUP, before)
    pids = [int(wait_for(ranks.notes / f"rank{rank}")) for rank in range(2)]
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None and not any(map(is_gone, pids))
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 12
    assert (process.returncode, out, err) == (143, "", "")
    assert all(map(is_gone, pids))


@pytest.fixture
def torchrun(ranks, monkeypatch, capfd):
    """What run.sh has the interpreter do, with these options, in this process, which has imported
    torch: gives what it exits with and what it and the ranks say."""
    program = (ROOT / "run.sh").read_text().split("\ntorchrun='\n")[1].split("'\n")[0]

    def call(*options: object, **settings: str) -> tuple[object, str]:
        for name, value in (ranks.environment | settings).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["", *map(str, options), f"{ranks.root}/train_gpt.py"])
        with pytest.raises(SystemExit) as stop:
            exec(program, {"__name__": "__main__"})  # noqa: S102
        return stop.value.code, capfd.readouterr().err

    numbers = signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT
    handlers, variables = [(number, signal.getsignal(number)) for number in numbers], {**os.environ}
    yield call
    logging.disable(logging.NOTSET)
    for number, handler in handlers:
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(variables)


def test_a_ranks_exit_code_is_that_of_all(torchrun):
    """torchrun's report is left out: the rank has spoken, or could not."""
    local = "--standalone", "--nproc-per-node", 2
    assert torchrun(*local, HOW="code") == (2, "error: said by the rank\n")
    killed = "run.sh: process 1 ended with SIGKILL"
    assert torchrun(*local, HOW="kill") == (killed, "")


def test_a_port_in_use_is_one_line(torchrun):
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        node = "--nnodes", 2, "--node-rank", 0, "--master-addr", "127.0.0.1", "--master-port", port
        code, err = torchrun(*node)
    assert code == 1 and err.count("\n") == 1
    assert err.startswith("run.sh: the nodes cannot meet (") and "address already in use" in err
    assert f"port: {port}" in err and "MASTER_PORT a free port there" in err


WORLD = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"WORLD_SIZE": "1"},
            "has RANK=, WORLD_SIZE=1, MASTER_ADDR=, MASTER_PORT=: start several ",
        ),
        ({"WORLD_SIZE": ""}, "has RANK=, WORLD_SIZE=, MASTER_ADDR=, MASTER_PORT=: start several "),
        ({"RANK": "1"}, "has RANK=1, WORLD_SIZE=, MASTER_ADDR=, MASTER_PORT=: start several "),
        ({**WORLD, "MASTER_ADDR": ""}, "has RANK=0, WORLD_SIZE=2, MASTER_ADDR=, MASTER_PORT=29500"),
        ({**WORLD, "MASTER_PORT": "TAKEN", "GPUS": "2"}, r"PORT=\d+, LOCAL_RANK=: start several "),
        ({**WORLD, "RANK": "first"}, "cannot meet by RANK=first, WORLD_SIZE=2, "),
        (
            {**WORLD, "MASTER_PORT": "TAKEN"},
            r"\(.*address already in use\): give a port of MASTER_ADD",
        ),
    ],
)
def test_an_environment_of_no_launcher_is_one_line(monkeypatch, given, message):
    """With GPUS and no LOCAL_RANK all processes would take the first one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: "GPUS" in given)
    for name in (*WORLD, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert connect() is None
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in given.items():
            monkeypatch.setenv(name, value.replace("TAKEN", port))
        with pytest.raises(UserError, match=message) as error:
            connect()
    assert str(error.value).count("\n") == 0
    assert "unset RANK WORLD_SIZE" in str(error.value)
