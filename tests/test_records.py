"""tools/report.py in a small copy of the repository: one real run of a few steps that is recorded
and reproduced, and logs made up where the figures must be known."""

import functools
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from test_train import environment, write_data

sys.path.insert(0, str(ROOT / "tools"))
import console
import report
import slim

STEPS, EXTENSION = 4, 2
TRAINING = {
    "preset": "tiny",
    "train_files": "data/sample_train_*.bin",
    "val_file": "data/sample_val_0.bin",
    "val_tokens": 200,
    "val_sequence_tokens": 64,
    "val_every": 2,
    "model_dim": 16,
    "head_dim": 8,
    "mlp_dim": 32,
    "gate_dim": 8,
    "ngram_rows": 256,
    "num_steps": STEPS,
    "stages": "1/2:128:48:8:16:1:.25:0,1/2:128:64:16:32:1.2:.15:0",
    "extension_steps": EXTENSION,
    "extension": "1:128:64:16:2:1:0:0",
    "seed": 5,
}
PROXY = {"train_files": "data/proxy/proxy_train_*.bin", "val_file": "proxy_val_0.bin"}
WORDS = "Two seeds of nothing new. With | bars,\n\n- a list\n- and `code`."
SCRIPT = '''"""Train."""

import math

TABLE = (1, 2)


def kept(x):
    return x


class Model:
    width = 3

    def forward(self, x):
        return x + 1
'''
CHANGED = SCRIPT.replace("x + 1", "x + 2").replace("def kept(x):\n    return x\n", "").replace(
    "(1, 2)", "(1, 3)"
) + "\n\ndef added(y):\n    return y\n"  # fmt: skip


class Repository:
    """A folder like the repository with the tool in it, called as a user does or in this process,
    which is faster."""

    def __init__(self, folder: Path):
        self.folder, self.records = folder, folder / "records"

    def start(self, *arguments: object) -> str:
        result = subprocess.run(
            ["./run.sh", *map(str, arguments)],
            cwd=self.folder,
            env=environment() | {"PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository with an older record and one of a real run, made by the command."""
    folder = tmp_path_factory.mktemp("recorded") / "repository"
    (folder / "records").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "tools").mkdir()
    tools = (f"tools/{name}.py" for name in ("report", "console", "slim"))
    for name in ("train_gpt.py", "run.sh", *tools):
        shutil.copy(ROOT / name, folder / name)
    write_data(folder / "data")
    for i in range(2):
        (folder / "data" / f"train_{i}.bin").rename(folder / "data" / f"sample_train_{i}.bin")
    (folder / "data" / "val.bin").rename(folder / "data" / "sample_val_0.bin")
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    older = source.replace("def rms_norm", "def old_norm", 1)
    assert older != source
    sample = {name: TRAINING[name] for name in ("train_files", "val_file")}
    like = {"devices": f"CPU {platform.machine()}", "cuda": None, "world_size": 1, **sample}
    made_up_record(folder / "records" / "2026-01-01_older", [3.3], source=older, **like)
    repository = Repository(folder)
    options = [f"--{name}={value}" for name, value in TRAINING.items()]
    out = repository.start("record", "real", "--", *options)
    assert "1 run, 1 × CPU" in out
    return repository


OPTIONS_OF = report.options_of  # which `call` replaces


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The tool in a repository without records or data. Its script is SCRIPT, the logs of two runs
    of it are in new/. Returns what was printed; errors if it is to fail with this exit code."""
    root = tmp_path / "no [v1] pattern"
    root.mkdir()
    for name, path in (("ROOT", "."), ("RECORDS", "records"), ("LOGS", "logs")):
        monkeypatch.setattr(report, name, root / path)
    monkeypatch.setattr(report, "options_of", lambda run, script: ["--of", script.parent.name])
    monkeypatch.chdir(root)
    Path("records").mkdir()
    Path("train_gpt.py").write_text(SCRIPT, encoding="utf-8")
    Path("run.sh").write_text("exit 1\n")
    for number, loss in ((1, 3.2781), (2, 3.2779)):
        made_up_run(Path("new"), number, loss)

    def run(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        found = report.main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        assert found == code, out + err
        return err if code else out

    return run


def made_up_run(folder: Path, number: int, loss: float = 3.3, **changes: object) -> Path:
    """The files of a run on 8 GPUs and FineWeb of 6 + 2 steps; changes name a field of the
    environment or the config, `time` (s), `source`, the targets scored, or the steps made. Returns
    the .json."""
    num_steps = int(changes.get("steps", 8))
    environment = {
        "date": f"2026-01-{number:02d} 12:00:00 +0000",
        "python": "3.12.3",
        "torch": "2.11.0",
        "cuda": "13.0",
        "devices": "NVIDIA H100 80GB HBM3",
        "world_size": 8,
    }
    config = {
        "train_files": "data/fineweb10B/fineweb_train_*.bin",
        "val_file": "data/fineweb10B/fineweb_val_000000.bin",
        "val_tokens": "10485760",
        "num_steps": "6",
        "match_orders": "none",
        "match_shards": "0",
        "checkpoint": "",
        "model_dim": "768",
        "stages": "0.5:33554432:1.0, 0.5:67108864:1.0",
        "extension_steps": "2",
        "extension": "1.0:67108864:1.0",
        "seed": str(number),
        "log_dir": "logs",
    }
    environment |= {name: changes[name] for name in environment if name in changes}
    config |= {name: changes[name] for name in (*config, "pointer") if name in changes}
    time, source = float(changes.get("time", 80)), str(changes.get("source", SCRIPT))
    # the first stage takes half the time of the second, the extension what is left
    times = [number / 10] * 3 + [number / 5] * 3 + [time / 2 - 0.45 * number] * 2
    ends = list(itertools.accumulate(times))
    steps = [
        {"step": i + 1, "train_loss": 9.0 - i, "train_time_s": ends[i], "step_ms": 1000 * times[i]}
        for i in range(num_steps)
    ]
    time = ends[num_steps - 1]
    validations = [
        {"step": 4, "val_loss": loss + 1, "train_time_s": ends[3]},
        {"step": num_steps, "val_loss": loss, "train_time_s": time},
    ]
    tables = {"environment": environment, "config": config}
    run_id = f"{environment['date'][:10]}_{number:06d}"
    summary = {"val_loss": loss, "steps": num_steps, "train_time_s": time}
    summary["mean_step_ms"] = 1000 * time / num_steps
    record = {"run_id": run_id, "steps": steps, "validations": validations, **tables}
    lines = [source + "=" * 100, json.dumps(tables, indent=1), "attention by flash-attn-4"]
    for kind, rows in (("train_loss", steps), ("val_loss", validations)):
        for row in rows:
            took = f" step {row['step_ms']:.1f} ms" if "step_ms" in row else ""
            line = f"step {row['step']} {kind} {row[kind]:.4f} train_time "
            lines.append(f"{line}{row['train_time_s']:.3f} s{took}")
    targets = int(changes.get("targets", config["val_tokens"]))
    lines.append(f"val loss {loss:.4f} after {num_steps} steps, on {targets:,} targets")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{run_id}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = folder / f"{run_id}.json"
    path.write_text(json.dumps(record | {"summary": summary}), encoding="utf-8")
    return path


def made_up_record(
    folder: Path, losses: list[float], first: int = 1, source: str = SCRIPT, **changes: object
) -> Path:
    for i, loss in enumerate(losses):
        made_up_run(folder, first + i, loss, source=source, **changes)
    (folder / "train_gpt.py").write_text(source, encoding="utf-8")
    return folder


def cells(page: str) -> dict[str, str]:
    """The first table of a record's README."""
    return dict(re.findall(r"^\| ([a-z -]+) \| (.*) \|$", page, re.MULTILINE))


# Tests of significance ----------------------------------------------------------------------------


def student_tail(t: float, dof: float) -> float:
    """Probability of a value above t >= 0, from the density of Student's t."""
    scale = math.gamma((dof + 1) / 2) / (math.sqrt(dof * math.pi) * math.gamma(dof / 2))
    x = np.linspace(0, t, 200_001)
    density = scale * (1 + x**2 / dof) ** (-(dof + 1) / 2)
    return 0.5 - float(np.trapezoid(density, x))


@pytest.mark.parametrize(
    "losses", [[3.2791, 3.2784], [3.279, 3.2771, 3.2785], [3.27, 3.28, 3.26, 3.275, 3.281]]
)
def test_p_that_the_mean_is_at_most_the_target(losses):
    n = len(losses)
    t = (3.28 - statistics.mean(losses)) / (statistics.stdev(losses) / math.sqrt(n))
    assert report.p_at_most(losses, 3.28) == pytest.approx(student_tail(t, n - 1), abs=1e-8)
    assert report.p_at_most([2 * 3.28 - loss for loss in losses], 3.28) > 0.5


def test_p_of_two_means_is_welchs():
    a, b = [3.279, 3.2771, 3.2785, 3.281], [3.2751, 3.2766, 3.2693]
    parts = [statistics.variance(values) / len(values) for values in (a, b)]
    t = abs(statistics.mean(a) - statistics.mean(b)) / math.sqrt(sum(parts))
    dof = sum(parts) ** 2 / (parts[0] ** 2 / 3 + parts[1] ** 2 / 2)
    assert report.p_different(a, b) == pytest.approx(2 * student_tail(t, dof), abs=1e-8)


def test_no_test_without_several_different_losses():
    assert report.p_at_most([3.2], 3.28) is None
    assert report.p_at_most([3.2, 3.2], 3.28) is None
    assert report.p_different([3.2], [3.3, 3.4]) is None
    # where nothing varies any difference would be certain
    assert report.p_different([3.2, 3.2], [3.3, 3.3]) is None
    assert report.p_different([3.2, 3.3], [3.4, 3.4]) is None
    assert report.p_at_most([3.2, 3.2 + 1e-15, 3.2], 3.28) is None
    assert "one run allows no test" in report.target_test([3.2], 3.28)
    assert "equal losses allow no test" in report.target_test([3.2, 3.2], 3.28)


# A real record ------------------------------------------------------------------------------------


def test_record_of_a_real_run(recorded):
    (folder,) = recorded.records.glob("*_real")
    script = (recorded.folder / "train_gpt.py").read_bytes()
    assert (folder / "train_gpt.py").read_bytes() == script
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    log = json.loads(next(folder.glob("*.json")).read_text())
    assert folder.name == f"{log['environment']['date'][:10]}_real"
    files = {f"{log['run_id']}{suffix}" for suffix in (".txt", ".json")}  # loss.png has the curve
    assert {path.name for path in folder.iterdir()} - files == {
        "train_gpt.py",
        "README.md",
        "loss.png",
    }
    page, summary = (folder / "README.md").read_text(encoding="utf-8"), log["summary"]
    table = cells(page)
    assert table["validation loss"] == f"{summary['val_loss']:.4f}"
    assert table["time"] == f"{summary['train_time_s']:.2f} s"
    assert table["test"].endswith("one run allows no test")
    assert table["runs"] == "1, seed 5 (sample data, not FineWeb; no GPU, not 8; one run: no claim)"
    assert table["data"].endswith("validation on 200 targets")
    assert table["non-parametric memory"] == "document"
    assert table["speed-up"] == "no baseline in its session"
    assert "attention by plain" in table["versions"]
    means = [
        statistics.mean(row["step_ms"] for row in log["steps"][begin:end])
        for begin, end in ((0, 2), (2, 4), (4, 6))
    ]
    names = "stage 1", "stage 2", "extension"
    expected = ", ".join(f"{name} {mean:.1f}" for name, mean in zip(names, means, strict=True))
    assert table["ms a step"] == expected
    (command,) = re.findall(r"^\./run\.sh .*$", page, re.MULTILINE)
    assert command.startswith("./run.sh --preset tiny --train_files 'data/sample_train_*.bin' ")
    assert f" --num_steps {STEPS} " in command
    assert command.endswith(" --seed SEED")
    assert "log_dir" not in command
    assert "[older](../2026-01-01_older): 1 lines added, 1 removed." in page
    assert "- new: `rms_norm` +" in page
    assert "- gone: `old_norm` −" in page


def test_reproduce_runs_the_records_own_script(recorded, tmp_path):
    repository = Repository(Path(shutil.copytree(recorded.folder, tmp_path / "repository")))
    (folder,) = repository.records.glob("*_real")
    (repository.folder / "train_gpt.py").write_text("raise SystemExit('not this one')")
    launcher = repository.folder / "run.sh"  # does without asking for the number of GPUs
    launch = "[ $1 = reproduce ] && script=tools/report.py || script=train_gpt.py\n"
    launcher.write_text(f'#!/bin/bash\n{launch}exec "$PYTHON" $script "$@"\n')
    shutil.rmtree(repository.folder / "logs")
    out = repository.start("reproduce", folder)
    (path,) = (repository.folder / "logs").glob("*.json")
    old, new = (json.loads(p.read_text()) for p in (next(folder.glob("*.json")), path))
    assert new["summary"]["val_loss"] == pytest.approx(old["summary"]["val_loss"], abs=2e-3)
    found = re.search(r"^time \(s\) +(\S+) +(\S+) +(\S+)$", out, re.MULTILINE)
    times = [log["summary"]["train_time_s"] for log in (old, new)]
    expected = [*times, times[1] / times[0]]
    assert list(map(float, found.groups())) == pytest.approx(expected, abs=6e-4)
    assert "recorded (1)" in out
    assert f"log logs/{path.stem}.txt" in out


# Records from made-up logs ------------------------------------------------------------------------


def test_record_from_logs_and_more_logs(call):
    out = call("record", "claim", "--logs", *Path("new").glob("*.txt"))
    folder = Path("records/2026-01-01_claim")
    table = cells((folder / "README.md").read_text(encoding="utf-8"))
    assert table["runs"] == "2, seeds 1, 2 (p not below 0.01: no claim)"
    assert table["machine"] == "8 × H100 80GB HBM3"
    assert table["non-parametric memory"] == "none"
    assert table["time"] == "80.00 ± 0.00 s (mean ± standard deviation)"
    stages = "stage 1 150.0 ± 70.7, stage 2 300.0 ± 141.4, extension 39325.0 ± 318.2"
    assert table["ms a step"] == stages
    assert "validation loss 3.2780 ± 0.0001" in out
    Path("train_gpt.py").write_text("# the next idea\n")
    third = made_up_run(Path("new"), 3, 3.2780)
    call("record", "claim", "--logs", third)
    table = cells((folder / "README.md").read_text(encoding="utf-8"))
    assert table["runs"] == "3, seeds 1, 2, 3"
    assert table["test"].endswith("p = 0.00042, under 0.01")
    error = call("record", "claim", "--runs", 1, code=1)
    assert "claim has another script than train_gpt.py" in error
    assert "gone: `TABLE` −" in error


def test_more_runs_have_the_next_seeds_and_the_record_before_is_named(call):
    for day, name in ((1, "first"), (3, "second"), (9, "later")):
        made_up_record(Path(f"records/2026-01-0{day}_{name}"), [3.3], day)
    folder = made_up_record(Path("records/2026-01-05_more"), [3.3, 3.2], 5)
    for seed in (7, 8):
        made_up_run(Path("made/a"), seed)
    write_launcher(LAUNCHER)
    assert "4 runs, 8 × H100" in call("record", "more", "--runs", 2)
    called = Path("called").read_text().splitlines()
    assert called == [f"--of 2026-01-05_more --seed {seed} --log_dir logs" for seed in (7, 8)]
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert "[second](../2026-01-03_second): The scripts are the same.\n" in page
    assert cells(page)["runs"].startswith("4, seeds 5, 6, 7, 8")


PRESETS = """
PRESETS = {"small": {"num_steps": "5", "seed": "1"}, "large": {"num_steps": "60", "seed": "1"}}
config_as_text = dict
print("a line of something else")
"""


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (PRESETS, ["--preset", "small", "--num_steps", "6"]),
        (PRESETS.replace('"5"', '"6"'), ["--preset", "small"]),
        ("raise SystemExit(1)", ["--num_steps", "6"]),
        ("print(1)", ["--num_steps", "6"]),
    ],
)
def test_options_that_repeat_a_run(tmp_path, source, options):
    """Those of the nearest preset, without the seed and what the run wrote besides its log."""
    run = report.read_run(made_up_run(tmp_path, 1))
    run.config = {"num_steps": "6", "seed": "3", "log_dir": "there", "checkpoint": "weights.pt"}
    script = tmp_path / "train_gpt.py"
    script.write_text(source)
    assert report.options_of(run, script) == options


def test_files_of_the_repository_are_named_from_its_root(call):
    """On a page and in its command, though run.sh gave their whole paths from another folder."""
    files = {
        "train_files": f"{Path.cwd()}/data/proxy_train_*.bin",
        "val_file": "/a/proxy_val_0.bin",
    }
    folder = made_up_record(Path("records/2026-01-01_a"), [3.3], **files)
    assert "proxy corpus: `data/proxy_train_*.bin`; " in report.write_page(folder).readme
    options = OPTIONS_OF(report.Record(folder).first, folder / "train_gpt.py")
    at = options.index("--train_files")
    assert options[at + 1] == "data/proxy_train_*.bin"
    assert options[options.index("--val_file") + 1] == "/a/proxy_val_0.bin"


def test_rewriting_keeps_title_words_and_memory(call):
    call("record", "claim", "--memory", "document", "--logs", *Path("new").glob("*.txt"))
    path = Path("records/2026-01-01_claim/README.md")
    page = path.read_text(encoding="utf-8")
    edited = page.replace(report.PLACEHOLDER, WORDS).replace("# claim", "# A claim")
    path.write_text(edited.replace("| time |", "| nonsense |"), encoding="utf-8")
    assert cells(edited)["non-parametric memory"] == "document"
    call("record", "claim", "--runs", 0)
    assert path.read_text(encoding="utf-8") == edited
    path.write_text(edited.replace(report.AUTHOR, ""), encoding="utf-8")
    assert "README.md: was not written by this tool" in call("record", "claim", code=1)


@pytest.mark.parametrize(
    ("suffix", "old", "new", "message"),
    [
        (
            ".txt",
            "x + 1",
            "x + 9",
            r"02\.txt was not made by train_gpt\.py[^\n]*\n---(.*\n)*\+ .*9",
        ),
        (".json", '"val_loss": 3.2779', '"val_loss": 3.2', r"02\.json: does not say what"),
        (".txt", "val_loss 3.2779", "val_loss 3.2", r"02\.json: does not say what"),
        (".json", '"summary": {"val_loss": 3.2', '"summary": {"val_loss": 3.1', "does not say"),
        (".txt", '"num_steps": "6"', '"num_steps": "7"', r"02\.json: does not say what"),
        (".json", '"summary"', '"sum"', r"02\.json: not the log of a whole run \(KeyError: 'summ"),
        (".json", '{"run_id"', '"run_id"', r"02\.json: not the log of a whole run \(JSONDec"),
        (".txt", "=" * 100, "=" * 99, r"02\.txt: no line of 100 '='"),
        (".txt", "step 200.0 ms", "step 100.0 ms", r"02\.json: does not say what"),
        (".txt", "train_loss 5.0000", "train_loss 4.0000", r"02\.json: does not say what"),
        (".json", '"train_loss": 9.0', '"train_loss": 8.0', r"02\.json: does not say what"),
        (".json", '"train_loss": 9.0', '"train_loss": NaN', r"02\.json: .*a loss is not finite"),
        (".json", '"step_ms": 200.0', '"step_ms": 100.0', r"02\.json: .* 200\.00 ms .* 100\.00 "),
        (".json", '"step": 2,', '"step": 3,', r"02\.json: .*its steps are not 1 to 8"),
        (".json", '"mean_step_ms": 10000', '"mean_step_ms": 1000', r"02\.json: .*mean_step_ms is"),
        (".json", '"train_time_s": 0.4', '"train_time_s": 0.3', r"02\.json: .*step 2 took"),
        (".json", '"run_id": "2026', '"run_id": "2025', r"02\.json: does not say what"),
        (".json", '"environment": {', '"environment": [' * 9999, r"02\.json: not the log of a who"),
    ],
)
def test_doctored_log_is_refused(call, suffix, old, new, message):
    path = Path(f"new/2026-01-02_000002{suffix}")
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    error = call("record", "claim", "--logs", *Path("new").glob("*.txt"), code=1)
    assert re.search(r"^error: .*" + message, error, re.MULTILINE), error
    assert not list(Path("records").iterdir())


def test_a_short_log_counts_like_the_full_one(call):
    """And comes back in full where it is copied to; with another script it is refused."""
    call("record", "a", "--logs", *Path("new").glob("*.txt"))
    (folder,) = Path("records").iterdir()
    page = (folder / "README.md").read_text(encoding="utf-8")
    script, logs = folder / "train_gpt.py", sorted(folder.glob("*.txt"))
    full = [log.read_text(encoding="utf-8") for log in logs]
    for log, text in zip(logs, full, strict=True):
        log.write_text(slim.slim(log, [script]), encoding="utf-8")
        assert len(log.read_text(encoding="utf-8")) < len(text) - len(SCRIPT) / 2
    call("record", "a", "--logs", *Path("new").glob("*.txt"))  # the same runs
    assert (folder / "README.md").read_text(encoding="utf-8") == page
    assert slim.HEAD.match(logs[0].read_text(encoding="utf-8"))
    folder = folder.rename("a")  # whose runs can be those of another record now
    script, logs = folder / script.name, [folder / log.name for log in logs]
    call("record", "b", "--logs", *logs)
    copies = sorted(Path("records").glob("*_b/*.txt"))
    assert [copy.read_text(encoding="utf-8") for copy in copies] == full

    short = logs[0].read_bytes()
    logs[0].write_bytes(short.replace(b"\n", b"\r\n"))
    error = call("record", "c", "--logs", *logs, code=1)
    assert f"error: {logs[0]}: is a short log and not restored: " in error and "CRLF" in error
    logs[0].write_bytes(short)

    script.write_text(CHANGED, encoding="utf-8")
    error = call("record", "c", "--logs", *logs, code=1)
    assert f"error: {logs[0]}: is a short log and not restored: " in error
    assert "put both back as they were" in error
    script.write_bytes(b"\xff")
    error = call("record", "c", "--logs", *logs, code=1)
    found = f"error: {logs[0]}: is a short log and not restored: {script}: no text in UTF-8"
    assert found in error
    script.unlink()
    logs[0].write_text(f"script: {logs[0].name} sha256: {'0' * 64}\n", encoding="utf-8")
    assert "is a short log, and what it names" in call("record", "c", "--logs", logs[0], code=1)
    assert "put the script back beside it" in call("record", "c", "--logs", logs[1], code=1)


def test_a_run_counts_in_one_record(call):
    """A copy, short or full, is refused with both names; runs of other content that have its name
    are other ones."""
    logs = sorted(Path("new").glob("*.txt"))
    call("record", "a", "--logs", *logs)
    call("record", "a", "--logs", *logs)  # again is no copy
    (folder,) = Path("records").iterdir()
    made_up_run(Path("other"), 1, 3.2)
    call("record", "b", "--logs", *Path("other").glob("*.txt"))
    call("history")
    found = "are one run, and would count twice: leave it out of one record"
    for copy in (logs[1], Path("short", logs[1].name)):
        if copy != logs[1]:
            shutil.copytree(folder, copy.parent)
            copy.write_text(slim.slim(copy, [folder / "train_gpt.py"]), encoding="utf-8")
        both = f"{folder / copy.stem}.json and {copy.with_suffix('.json')}"
        assert call("record", "c", "--logs", copy, code=1) == f"\nerror: {both}: {found}\n"
        assert not list(Path("records").glob("*_c"))
    second = Path("records/2026-01-02_second")
    shutil.copytree(folder, second)
    both = f"{folder / logs[0].stem}.json and {second / logs[0].stem}.json"
    page = Path("records/README.md").read_text(encoding="utf-8")
    assert call("history", code=1) == f"\nerror: {both}: {found}\n"
    assert Path("records/README.md").read_text(encoding="utf-8") == page


def test_what_is_on_the_clock_behind_a_step_may_take_time(call):
    """As long as the log says; in older logs, which do not say it, a quarter of a second for each
    average that was scored in the end."""
    newer = ({"behind_step_s": 0.7}, 80.9, 0), ({"behind_step_s": 0.6}, 80.9, 1)
    cheat = ({"behind_step_s": 9.9}, 79.1, 1)
    older = ({"blends": [{}] * 3}, 80.9, 0), ({"blends": [{}] * 2}, 80.9, 1)
    for i, (fields, end, code) in enumerate((*newer, cheat, *older)):
        path = made_up_run(Path("new"), 3)
        text, data = path.with_suffix(".txt").read_text(), json.loads(path.read_text())
        if "blends" in fields:
            data["averages"] = fields
        else:
            data["validations"][-1] |= fields
        for row in data["validations"][-1], data["summary"]:
            row["train_time_s"] = end
        data["summary"]["mean_step_ms"] = 1000 * end / 8
        path.write_text(json.dumps(data))
        changed = text.replace("3.3000 train_time 80.000", f"3.3000 train_time {end:.3f}")
        path.with_suffix(".txt").write_text(changed)
        said = call("record", f"a{i}", "--logs", path, code=code)
        assert ("step_ms add up" in said) == (code == 1)


@pytest.mark.parametrize(("step", "late"), [(4, 1.0), (8, 79.0)])
def test_steps_that_do_not_add_up_to_the_time_are_refused(call, step, late):
    """Also where both files agree. The clock stops a little after the step."""
    path = made_up_run(Path("new"), 3)
    text, data = path.with_suffix(".txt").read_text(), json.loads(path.read_text())
    (row,) = (row for row in data["validations"] if row["step"] == step)
    end = data["steps"][step - 1]["train_time_s"]

    def shift(time: float) -> None:
        old, row["train_time_s"] = f"{row['val_loss']:.4f} train_time {end:.3f}", time
        if step == 8:
            data["summary"] |= {"train_time_s": time, "mean_step_ms": 125 * time}
        path.write_text(json.dumps(data))
        new = f"{row['val_loss']:.4f} train_time {time:.3f}"
        path.with_suffix(".txt").write_text(text.replace(old, new))

    shift(late)
    error = call("record", "a", "--logs", path, code=1)
    found = f"step_ms add up to {end:.3f} s by step {step}, the train_time_s of its val_loss is"
    assert f"error: {path}: not the log of a whole run (ValueError: {found} {late:.3f})" in error
    assert not list(Path("records").iterdir())
    shift(end + 0.002)
    assert "1 run, " in call("record", "a", "--logs", path)


def test_logs_of_different_options_are_refused(call):
    other = made_up_run(Path("new"), 3, val_tokens="99")
    error = call("record", "claim", "--logs", "new/2026-01-01_000001.txt", other, code=1)
    assert "have different options" in error
    assert "val_tokens: '10485760' and '99'" in error
    assert not list(Path("records").iterdir())


def test_runs_of_one_record_may_name_their_data_and_outputs_differently(call):
    """The checkpoint changes nothing, and the folder of the same shards neither."""
    files = {"train_files": "/else/where/fineweb_train_*.bin", "checkpoint": "weights.pt"}
    other = made_up_run(Path("new"), 3, 3.2772, **files)
    assert '"checkpoint": "weights.pt"' in other.with_suffix(".txt").read_text(encoding="utf-8")
    assert "3 runs" in call("record", "claim", "--logs", *Path("new").glob("*.txt"))
    made_up_run(Path("new"), 5, 3.2773, val_file="data/fineweb10B/fineweb_val_*.bin")
    assert "4 runs" in call("record", "claim", "--logs", *Path("new").glob("*.txt"))
    other = made_up_run(Path("new"), 4, train_files="data/fineweb10B/fineweb_train_000001.bin")
    error = call("record", "other", "--logs", *Path("new").glob("*.txt"), code=1)
    assert "  train_files: " in error and other.name in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["record", "a", "--logs", "gone.txt"], r"gone\.txt: no such file"),
        (["reproduce", "records/gone"], "records/gone: no record, it has no log"),
        (["compare", "train_gpt.py", "gone.py"], r"No such file or directory: 'gone\.py'"),
        (["compare", "train_gpt.py", "train_gpt.py", "--logs"], "logs/ has no log of it"),
        (["history"], "has no record"),
    ],
)
def test_one_message_names_what_to_fix(call, arguments, message):
    error = call(*arguments, code=1)
    assert re.fullmatch(rf"\nerror: .*{message}[^\n]*\n", error), error


LAUNCHER = """#!/usr/bin/env bash
grep -q 'x + 2' train_gpt.py && side=b || side=a
seed=$(sed 's/.*--seed //; s/ .*//' <<< "$*")
echo "$@" >> "ROOT/called"
mkdir -p logs
cp "ROOT"/made/$side/*_00000$seed.* logs
"""


def test_a_run_without_a_log_is_named(call):
    """Though its exit code is 0."""
    Path("run.sh").write_text("#!/bin/sh\n")
    Path("run.sh").chmod(0o755)
    error = call("record", "a", "--runs", 1, code=1)
    assert error.startswith("\nerror: the run left no log, not one: is its script one that trains?")
    assert error.endswith(" ./run.sh --seed 1 --log_dir logs\n")


def write_launcher(text: str) -> None:
    """run.sh in the current folder, for which ROOT stands."""
    Path("run.sh").write_text(text.replace("ROOT", str(Path.cwd())))
    Path("run.sh").chmod(0o755)


def test_compare_interleaves_runs_with_the_options_and_seeds(call):
    losses = [3.279, 3.2771, 3.2785], [3.2751, 3.2766, 3.2693]
    for side, source, values in zip("ab", (SCRIPT, CHANGED), losses, strict=True):
        for seed, loss in enumerate(values, 7):
            time = seed * (10 if side == "a" else 9)
            made_up_run(Path("made") / side, seed, loss, source=source, time=time)
        Path(f"{side}.py").write_text(source, encoding="utf-8")
    write_launcher(LAUNCHER)
    out = call("compare", "a.py", "b.py", "--runs", 3, "--", "--num_steps", "6", "--seed", "7")
    order = re.findall(r"^run (\d)(\w), seed (\d)$", out, re.MULTILINE)
    assert ["".join(run) for run in order] == ["1A7", "1B7", "2A8", "2B8", "3A9", "3B9"]
    called = Path("called").read_text().splitlines()
    assert called == [f"--num_steps 6 --seed {seed} --log_dir logs" for seed in (7, 7, 8, 8, 9, 9)]
    for pair, (seed, a, b) in enumerate(zip((7, 8, 9), *losses, strict=True), 1):
        times = f"{10 * seed}.000 s +{9 * seed}.000 s +0.9000"
        assert re.search(rf"^{pair} +{seed} +{seed} +{times} +{a:.4f} +{b:.4f}$", out, re.MULTILINE)
    assert "time B / A, pair by pair: 0.9000 ± 0.0000" in out
    assert f"p = {report.p_different(*losses):.2g}: not significant at 0.01 (n = 3)" in out
    # a record is run with its own command and seed, the script beside it with the same
    made_up_record(Path("records/2026-01-07_a"), losses[0][:1], 7)
    Path("called").unlink()
    call("compare", "records/2026-01-07_a", "b.py")
    called = Path("called").read_text().splitlines()
    assert called == ["--of 2026-01-07_a --seed 7 --log_dir logs"] * 2
    Path("called").unlink()
    call("compare", "b.py", "records/2026-01-07_a", "--", "--num_steps", "6")
    called = Path("called").read_text().splitlines()
    assert called == ["--of 2026-01-07_a --num_steps 6 --seed 7 --log_dir logs"] * 2


@pytest.fixture
def proxy_record(call, monkeypatch) -> Path:
    """A record whose corpus is not here; its script can be run on what was made in made/."""

    def options_of(run: report.Run, script: Path) -> list[str]:
        files = [f"--{name}={run.config[name]}" for name in ("train_files", "val_file")]
        return ["--preset", "small", *files]

    monkeypatch.setattr(report, "options_of", options_of)
    write_launcher(LAUNCHER)
    lookup = {"match_orders": "3:4", "match_shards": "3"}
    return made_up_record(Path("records/2026-01-01_a"), [3.3], **PROXY, **lookup)


def test_a_record_of_the_proxy_corpus_offers_fineweb_in_its_place(call, proxy_record):
    message = (
        "\nerror: data/proxy/proxy_train_*.bin: this machine has no such shards, and the proxy "
        "corpus cannot be downloaded: add --fineweb to run on FineWeb in its place (times then "
        "compare with the record's, losses do not)\n"
    )
    assert call("reproduce", proxy_record, code=1) == message
    for paths in ((proxy_record, "train_gpt.py"), ("train_gpt.py", proxy_record)):
        assert call("compare", *paths, code=1) == message
    assert not Path("called").exists()
    made_up_run(Path("made/a"), 1, 3.2)  # on FineWeb
    out = call("reproduce", proxy_record, "--fineweb")
    # run.sh fetches it for whoever names no data
    assert Path("called").read_text() == "--preset small --seed 1 --log_dir logs\n"
    assert "reading some ahead takes longer than recorded" in out
    assert re.search(r"^data +proxy corpus +FineWeb$", out, re.MULTILINE)
    assert re.search(r"^validation loss +3\.3000 +3\.2000$", out, re.MULTILINE)  # without a ratio
    assert re.search(r"^time \(s\) +80\.000 +80\.000 +1\.0000$", out, re.MULTILINE)
    assert "losses on different data: the times compare, the losses do not" in out
    assert "it ran on" not in out
    made_up_run(Path("made/a"), 1, 3.2, torch="2.13.0+cu130", **PROXY)
    shutil.rmtree("logs")
    for name in ("proxy_train_1.bin", "proxy_val_0.bin"):
        folder = Path("data/proxy") if "train" in name else Path()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    out = call("reproduce", proxy_record)
    assert "losses do not" not in out  # it is here
    assert "it ran on torch 2.11.0, and here on 2.13.0+cu130: if losses differ, install" in out
    fineweb = made_up_record(Path("records/2026-01-02_b"), [3.3], 2)
    assert "--fineweb: the record's own data is fineweb" in call(
        "reproduce", fineweb, "--fineweb", code=2
    )


def test_the_tiny_preset_is_not_moved_to_fineweb(call, monkeypatch):
    """Its data is the built-in sample, with which run.sh would train it."""
    files = {"train_files": "data/sample/sample_train_*.bin", "val_file": "data/sample/sample_val_"}
    monkeypatch.setattr(report, "options_of", lambda run, script: ["--preset", "tiny", "--a=b"])
    for day, end in ((1, "*.bin"), (2, "000000.bin")):
        made = files | {"val_file": files["val_file"] + end}
        sample = made_up_record(Path(f"records/2026-01-0{day}_a"), [3.3], day, **made)
        error = call("reproduce", sample, "--fineweb", code=2)
        assert "--fineweb: the record's own data is sample, which is there: leave it out" in error
    mine = made_up_record(Path("records/2026-01-03_b"), [3.3], 3, train_files="mine_*.bin")
    for command in (("reproduce", mine), ("compare", mine, sample)):
        error = call(*command, "--fineweb", code=2)
        assert f"{mine} has the tiny preset, whose data is the built-in sample: leave it" in error
    assert not Path("logs").exists()


def test_compare_on_fineweb_in_place_of_the_proxy_corpus(call, proxy_record):
    """Of a record and a script, in both orders, and of two records of which one is on FineWeb."""
    for side in "ab":
        made_up_run(Path("made") / side, 1, 3.2)
    fineweb = made_up_record(Path("records/2026-01-02_b"), [3.3], 2)
    for paths in (
        (proxy_record, "train_gpt.py"),
        ("train_gpt.py", proxy_record),
        (proxy_record, proxy_record),
    ):
        shutil.rmtree("logs", ignore_errors=True)
        out = call("compare", *paths, "--fineweb", "--", "--num_steps", "6")
        # run.sh fetches it for whoever names no data
        called = Path("called").read_text().splitlines()
        assert called == ["--preset small --num_steps 6 --seed 1 --log_dir logs"] * 2
        Path("called").unlink()
        assert "times compare with the record's, losses do not" in out
        assert "reading some ahead takes longer than recorded" in out
        assert re.search(r"^data +FineWeb +FineWeb$", out, re.MULTILINE)
        assert re.search(r"^validation loss +3\.2000 +3\.2000 +1\.0000$", out, re.MULTILINE)
    shard = Path("data/fineweb10B/fineweb_train_000001.bin")
    shard.parent.mkdir(parents=True)
    for path in (shard, shard.with_name("fineweb_val_000000.bin")):
        path.write_text("")
    shutil.rmtree("logs")
    call("compare", proxy_record, fineweb, "--fineweb")
    first, second = Path("called").read_text().splitlines()
    assert "train_files" not in first and "--train_files=data/fineweb10B/" in second


def test_compare_refuses_fineweb_where_it_changes_nothing(call):
    a = made_up_record(Path("records/2026-01-01_a"), [3.3])
    b = made_up_record(Path("records/2026-01-02_b"), [3.3], 2, source=CHANGED)
    out = call("compare", a, b, "--fineweb", code=2)
    assert out == (
        "\nerror: compare: --fineweb: the record's own data is fineweb, which is there: "
        "leave it out\n"
    )
    out = call("compare", "train_gpt.py", "train_gpt.py", "--fineweb", code=2)
    assert "--fineweb: scripts that are no records have no data of their own: leave it out" in out
    assert "leave out --runs, --fineweb and" in call("compare", a, b, "--logs", "--fineweb", code=2)
    assert not Path("logs").exists()


def test_data_given_after_the_dashes_replaces_the_records(call, proxy_record):
    Path("mine_1.bin").write_text("")
    made_up_run(Path("made/a"), 1)
    files = ["--train_files", "mine_*.bin", "--val_file", "mine_1.bin"]
    call("reproduce", proxy_record, "--", *files)
    assert Path("called").read_text().split()[-8:-4] == files
    others = "give others behind --, as --train_files and --val_file\n"
    for command in (("reproduce", proxy_record), ("compare", proxy_record, "train_gpt.py")):
        gone = call(*command, "--", "--train_files", "gone.bin", code=1)
        assert gone == f"\nerror: gone.bin: this machine has no such shards: {others}"


def test_compare_writes_a_page_with_long_parts_folded(call):
    a = made_up_record(Path("records/2026-01-01_a"), [3.3, 3.4], stages="0:8:1, " * 19 + "1:9:1")
    b = made_up_record(Path("records/2026-01-05_b"), [3.2, 3.3], 5, source=CHANGED)
    out = call("compare", a, b, "--logs", "--page", "compare.md")
    assert out.endswith("compare.md has this as a page\n")
    (line,) = re.findall(r"^  stages: .*$", out, re.MULTILINE)
    assert len(line) == report.SCREEN + 1 and line.endswith("…")
    page = Path("compare.md").read_text(encoding="utf-8")
    tables = re.findall(r"^(\|.*)\n(\|---.*)$", page, re.MULTILINE)
    assert [header for header, _ in tables] == [
        "| figure | A (2) | B (2) | ratio |",
        "| pair | seed A | seed B | time A | time B | B / A | loss A | loss B |",
    ]
    open_part, *dumps = re.split(r"<details>\n<summary>(.+)</summary>", page)
    assert "validation loss | 3.3500" in open_part and "stages: " not in open_part
    assert dumps[::2] == [
        "versions",
        "options that differ, in A and in B",
        "what changed from A to B, by function",
        "the diff",
    ]
    assert "0:8:1, " * 19 + "1:9:1' and" in dumps[3]
    assert "+        return x + 2\n" in dumps[7]
    assert page.count("</details>") == 4
    Path("folder.md").mkdir()
    assert "folder.md: is no file" in call("compare", a, b, "--logs", "--page", "folder.md", code=1)


def test_compare_existing_logs(call):
    losses = [3.279, 3.2771, 3.2785], [3.2751, 3.2766, 3.2693]
    a = made_up_record(Path("records/2026-01-01_a"), losses[0], time=80)
    for i, loss in enumerate(losses[1]):  # of a bare script: those in logs/ that it made
        made_up_run(Path("logs"), 11 + i, loss, source=CHANGED, time=60, num_steps="5")
    made_up_run(Path("logs"), 20, source=SCRIPT)
    Path("b.py").write_text(CHANGED, encoding="utf-8")
    out = call("compare", a, "b.py", "--logs")
    rows = re.findall(r"^(\d) +(\d+) +(\d+) +80\.000 s  60\.000 s  0\.7500 ", out, re.MULTILINE)
    assert rows == [(str(i), str(i), str(10 + i)) for i in (1, 2, 3)]  # by seed
    difference = statistics.mean(losses[1]) - statistics.mean(losses[0])
    form = rf"^loss B - A: {difference:+.4f}; .*: p = (\S+): not significant at 0\.01 \(n = 3\)$"
    p = re.search(form, out, re.MULTILINE)
    assert float(p[1]) == pytest.approx(report.p_different(*losses), rel=0.05)
    assert "  num_steps: '6' and '5'\n" in out
    assert re.search(r"^new: added \+\d\ngone: kept −\d$", out, re.MULTILINE)
    assert re.search(r"^changed: TABLE \+1 −1, Model.forward \+\d −1$", out, re.MULTILINE)
    assert "-        return x + 1\n+        return x + 2\n" in out


def test_compare_leaves_out_logs_that_are_not_whole(call, capsys):
    made_up_record(Path("records/2026-01-01_a"), [3.3, 3.4])
    for number, loss in ((11, 3.2), (12, 3.1), (13, 3.0), (14, 3.0)):
        path = made_up_run(Path("logs"), number, loss, source=CHANGED)
    path.unlink()  # of an interrupted run
    torn = Path("logs/2026-01-13_000013.json")
    torn.write_text(torn.read_text()[:-30])
    Path("logs/stray.txt").write_bytes(b"\xff")
    Path("logs/._2026-01-11_000011.txt").write_bytes(b"Mac \xb0")
    Path("b.py").write_text(CHANGED, encoding="utf-8")
    assert report.main(["compare", "records/2026-01-01_a", "b.py", "--logs"]) == 0
    out, err = capsys.readouterr()
    assert "not significant at 0.01 (n = 2)" in out
    for row in (
        r"validation loss +3\.3500 ± 0\.0707 +3\.1500 ± 0\.0707 +0\.9403",
        r"ms a step, stage 1 +150\.00 ± 70\.71 +1150\.00 ± 70\.71 +7\.6667",
        r"ms a step, stage 2 +300\.00 ± 141\.42 +2300\.00 ± 141\.42 +7\.6667",
    ):
        assert re.search(f"^{row}$", out, re.MULTILINE), out
    names = "2026-01-13_000013.json", "2026-01-14_000014.json", "stray.txt"
    lines = err.splitlines()
    assert all(line.startswith(f"left out: logs/{name}: ") for line, name in zip(lines, names))
    assert len(lines) == 3


def test_compare_finds_a_significant_difference(call):
    a = made_up_record(Path("records/2026-01-01_a"), [3.3, 3.3001, 3.3002])
    b = made_up_record(Path("records/2026-01-05_b"), [3.2, 3.2001], 5)
    assert "p = 2e-09: significant at 0.01 (n = 3 and 2)\n" in call("compare", a, b, "--logs")
    made_up_record(Path("records/2026-01-05_c"), [3.2, 3.2], 5)
    assert "equal losses: no test\n" in call("compare", a, "records/2026-01-05_c", "--logs")


# What ends early ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["record", "a/b"], "the name 'a/b' makes no folder"),
        (["record", "a", "--runs", "0"], "a new record needs runs"),
        (["record", "a", "--", "test"], "'test' is none"),
        (["record", "a", "--runs", "-1"], "'-1' is no whole number from 0 to"),
        (["record", "a", "--runs", "1_0"], "'1_0' is no whole number"),
        (["record", "a", "--runs", "abc"], "'abc' is no whole number"),
        (["reproduce", "a", "--runs", "0"], "'0' is no whole number from 1 to"),
        (["compare", "train_gpt.py", "train_gpt.py", "--runs", "0"], "'0' is no whole number"),
        (["compare", "train_gpt.py", "train_gpt.py", "--runs", "9" * 5000], "is no whole number"),
        (["compare", "a", "b", "--logs", "--", "--num_steps", "6"], "leave out --runs, --fineweb"),
        (["compare", "a", "b", "--logs", "--runs", "1"], "leave out --runs, --fineweb and options"),
        (["record", "a", "--logs", "x.txt", "--runs", "1"], "leave out --runs and options"),
        (["record", "a", "--", "--seed", "9" * 20], "--seed: '9+' is no whole number from 0 to"),
        (["record", "a", "--", "--seed", "-1"], "--seed: '-1' is no whole number"),
        (["record", "a", "--", "--checkpoint", "m.pt"], "--checkpoint after --: "),
        (["record", "a", "--", "--log_dir=x"], "--log_dir after --: "),
        (["record", "a", "--memory", "hashed"], "--memory: invalid choice: 'hashed'"),
        (["history", "--", "--seed", "1"], "history: takes no options, found --seed 1"),
    ],
)
def test_wrong_command_line(call, capsys, arguments, message):
    try:
        code = report.main(arguments)
    except SystemExit as stop:
        code = stop.code
    *_, line = capsys.readouterr().err.splitlines()
    assert code == 2 and re.search(f"error: .*{message}", line), line
    assert not list(Path("records").iterdir()) and not Path("logs").exists()


def test_outputs_are_checked_before_anything_runs(call, monkeypatch):
    write_launcher('#!/bin/sh\ntouch "ROOT/ran"\n')
    Path("logs").write_text("")
    message = r"\nerror: logs: cannot be written to \(.*\): make it a folder that can\n"
    for arguments in (["record", "a"], ["compare", "train_gpt.py", "train_gpt.py"]):
        assert re.fullmatch(message, call(*arguments, code=1))
    Path("logs").unlink()
    (made_up_record(Path("records/2026-01-02_a"), [3.3], 2) / "README.md").mkdir()
    Path("records/2026-01-02_a/README.md/mine").write_text("")
    assert "README.md" in call("record", "a", code=1)
    shutil.rmtree("records")
    Path("records").write_text("")
    assert "error: records: cannot be written to" in call("record", "a", code=1)
    Path("records").unlink()
    usage = shutil.disk_usage(".")._replace(free=3 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "error: records: 3.0 MiB are free, not 8 MiB" in call("record", "a", "--runs", 3, code=1)
    assert not Path("ran").exists()


def test_a_failed_write_leaves_the_old_file(call):
    path = Path("records/page.md")
    report.write_text(path, "old")

    def fail(part: Path) -> None:
        part.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        report.replace(path, fail)
    assert path.read_text() == "old" and [*Path("records").iterdir()] == [path]


def test_a_picture_that_fails_is_a_warning(call, capsys):
    folder = made_up_record(Path("records/2026-01-01_a"), [3.3])
    (folder / "loss.png").mkdir()
    assert report.main(["record", "a", "--runs", "0"]) == 0
    assert capsys.readouterr().err.startswith("warning: records/2026-01-01_a/loss.png is not drawn")
    assert (folder / "README.md").is_file() and (folder / "loss.png").is_dir()


def test_finished_runs_are_kept_when_a_later_one_fails(call, tmp_path, monkeypatch):
    """And so is the log of the one that failed; nothing else stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for seed in (1, 2):
        made_up_run(Path("made/a"), seed)
    next(Path("made/a").glob("*02.json")).unlink()
    stop = '[ "$seed" = 1 ] || exit 3\n'
    write_launcher(LAUNCHER + stop)
    error = call("record", "a", "--runs", 3, "--", "--seed", "1", code=1)
    first = "logs/2026-01-01_000001.txt"
    command = "./run.sh --seed 2 --log_dir logs"
    kept = f"the runs before it are kept, for --logs: {first}"
    assert error == f"\nerror: the run ended with exit code 3: {command}; {kept}\n"
    assert Path("logs/2026-01-02_000002.txt").exists()
    assert "1 run, 8 × H100" in call("record", "a", "--logs", first)
    write_launcher(LAUNCHER + stop.replace("3", "130"))
    with pytest.raises(KeyboardInterrupt, match=f"^; {kept}$"):
        report.main(["record", "b", "--runs", "2", "--", "--seed", "1"])
    assert not list(tmp_path.glob("speedrun_*"))


def test_logs_that_cannot_be_copied_stay(call, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made_up_run(Path("made/a"), 1)
    write_launcher(LAUNCHER + 'rmdir "ROOT/logs"; touch "ROOT/logs"\n')
    assert report.main(["record", "a"]) == 1
    (folder,) = tmp_path.glob("speedrun_*")
    assert f"stay in {folder / 'logs'}\n" in capsys.readouterr().err
    assert len(list(folder.glob("logs/*.json"))) == 1


def test_two_logs_of_one_run_are_no_two_runs(call):
    made_up_run(Path("other"), 1, 3.1)
    logs = [next(Path(name).glob("*01.txt")) for name in ("new", "new", "other")]
    assert "1 run, 8 × H100" in call("record", "a", "--logs", *logs[:2])
    assert "are two logs of one run" in call("record", "b", "--logs", *logs, code=1)
    assert "are two logs of one run" in call("record", "a", "--logs", logs[2], code=1)


# The last runs until it is told to end.
WAITS = """#!/usr/bin/env bash
mkdir -p logs
cp "ROOT"/new/*_000001.txt logs
trap 'echo told >> "ROOT/told"; exit 130' INT
sleep 300 &
echo $$ $! > "ROOT/pids.part"
mv "ROOT/pids.part" "ROOT/pids"
wait
"""


def started(*arguments: str, **how: object) -> subprocess.Popen:
    """The tool in the current folder, in the background."""
    Path("tools").mkdir(exist_ok=True)
    for name in ("report.py", "console.py", "slim.py"):
        shutil.copy(ROOT / "tools" / name, Path("tools") / name)
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    command = [sys.executable, "tools/report.py", *arguments]
    return subprocess.Popen(command, text=True, env=environment(), **how)


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_the_tool_and_the_run(call, number):
    write_launcher(WAITS)
    ignore = functools.partial(
        signal.signal, signal.SIGINT, signal.SIG_IGN
    )  # as shells do behind &
    how = {} if number == signal.SIGINT else {"preexec_fn": ignore}
    tool = started("record", "a", "--runs", "2", **how)
    wait_until(Path("pids").exists)
    tool.send_signal(number)
    first, below = Path("pids").read_text().split()
    if number == signal.SIGKILL:  # the system ends the run
        tool.wait(30)
        wait_until(lambda: not is_alive(first))
        os.kill(int(below), signal.SIGKILL)
        return
    _, err = tool.communicate(timeout=30)
    assert (tool.returncode, err) == (130, "\ninterrupted\n")
    assert Path("told").read_text() == "told\n"
    assert not is_alive(first) and not is_alive(below)
    assert Path("logs/2026-01-01_000001.txt").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_run_that_will_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "GRACE", ((signal.SIGINT, 0.1), (signal.SIGTERM, 0.1)))
    monkeypatch.chdir(tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(KeyboardInterrupt):
            console.call(
                ["bash", "-c", "trap '' INT TERM; echo $$ > pid; while :; do sleep 1; done"]
            )
    finally:
        signal.signal(signal.SIGALRM, before)
    wait_until(lambda: not is_alive(Path("pid").read_text().strip()))


# Interrupted in a hook around a fork, whose exceptions Python only reports.
FORKS = """
import os, signal, sys, time, console

def interrupted():
    os.kill(os.getpid(), signal.SIGTERM)

def main(arguments):
    os.register_at_fork(after_in_parent=interrupted)
    if os.fork() == 0:
        os._exit(0)
    time.sleep(60)
    return 1

sys.exit(console.run_tool(main))
"""


def test_no_interruption_is_lost(tmp_path):
    env = environment() | {"PYTHONPATH": str(ROOT / "tools")}
    command = [sys.executable, "-c", FORKS]
    how = {"cwd": tmp_path, "env": env, "capture_output": True, "timeout": 30}
    done = subprocess.run(command, check=False, **how)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"\ninterrupted\n")


# With PYTHONIOENCODING=ascii: says "·", waits to be read no more, and goes on.
SAYS = """
import sys, console
from pathlib import Path

def main(arguments):
    print("1 · 2", flush=True)
    sys.stdin.read()
    print("more\\n" * 9999, "·", flush=True)
    print("more", file=sys.stderr)
    Path("done").write_text("±", encoding="utf-8")
    return 7

sys.exit(console.run_tool(main))
"""


def test_characters_that_the_screen_lacks_and_a_closed_pipe_end_nothing(tmp_path):
    env = environment() | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT / "tools")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    tool = subprocess.Popen([sys.executable, "-c", SAYS], cwd=tmp_path, env=env, **pipes)
    assert tool.stdout.readline() == b"1 ? 2\n"
    for pipe in (tool.stdout, tool.stderr, tool.stdin):
        pipe.close()
    assert tool.wait(30) == 7 and (tmp_path / "done").read_text(encoding="utf-8") == "±"


def test_a_record_is_written_without_a_terminal(call):
    read, write = os.pipe()
    os.close(read)
    command = "record", "a", "--logs", *map(str, Path("new").glob("*.txt"))
    tool = started(*command, stdout=write, stderr=write)
    os.close(write)
    assert tool.wait(60) == 0
    assert "±" in Path("records/2026-01-01_a/README.md").read_text(encoding="utf-8")


# History ------------------------------------------------------------------------------------------


CLAIM = [3.2781, 3.2779, 3.278]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"devices": "NVIDIA H200"}, "runs of different machines"),
        ({"world_size": 16}, "runs of different machines"),
        ({"world_size": 7}, "runs of different machines; 7 GPUs, not 8"),
        ({"targets": 10_485_759}, "scored on 10,485,759 targets, not 10,485,760"),
        ({"targets": 10_485_761}, "scored on 10,485,761 targets, not 10,485,760"),
        ({"steps": 7}, "schedule not finished"),
        ({"loss": 3.2798}, "p not below 0.01"),
        ({"loss": 3.29}, "p not below 0.01"),
    ],
)
def test_a_claim_needs_equal_conditions_of_all_runs(call, changes, reason):
    """The last of three runs differs from the others."""
    folder = made_up_record(Path("records/2026-01-01_a"), CLAIM[:2])
    made_up_run(folder, 3, changes.pop("loss", CLAIM[2]), **changes)
    assert "; ".join(report.Record(folder).shortfalls) == reason
    page = report.history_page(report.all_records())
    assert page.count(f"\nNo claim: {reason}.\n" if reason else "| p = 0.00042 |") == 1
    assert ("| p = " in page) is not bool(reason)


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ([3.2, 3.2, 3.2], "p not below 0.01"),  # equal losses allow no test
        ([3.2, 3.2000000001, 3.2], "p not below 0.01"),
        ([3.2], "one run"),
        ([3.2, 3.2001], ""),
    ],
)
def test_equal_losses_are_no_claim(call, losses, reason):
    record = report.Record(made_up_record(Path("records/2026-01-01_a"), losses))
    assert "; ".join(record.shortfalls) == reason


def test_options_of_all_runs_of_a_record_are_the_same(call):
    folder = made_up_record(Path("records/2026-01-01_a"), CLAIM[:2])
    made_up_run(folder, 3, 3.278, num_steps="5")
    error = call("history", code=1)
    assert "have different options" in error and "num_steps: '6' and '5'" in error


@pytest.mark.parametrize("missing", ["2026-01-02_000002.json", "2026-01-02_000002.txt", "both"])
def test_a_run_that_has_lost_a_file_is_an_error(call, missing):
    """With neither of them the README that was written tells."""
    folder = made_up_record(Path("records/2026-01-01_a"), CLAIM)
    call("record", "a", "--runs", 0)
    (folder / "._2026-01-02_000002.json").write_bytes(b"Mac \xb0")
    (folder / "notes.txt").write_text("mine")
    call("history")
    for path in folder.glob("2026-01-02*" if missing == "both" else missing):
        path.unlink()
    for arguments in (["history"], ["record", "a", "--runs", 0], ["reproduce", folder]):
        error = call(*arguments, code=1)
        assert re.search(r"error: records/2026-01-01_a/2026-01-02_000002\.(json|txt): no s", error)


def test_a_record_without_its_script_is_an_error(call, capsys):
    folder = made_up_record(Path("records/2026-01-01_a"), CLAIM)
    made_up_record(Path("records/2026-01-05_b"), CLAIM, 5)
    (folder / "train_gpt.py").unlink()
    missed = "records/2026-01-01_a/train_gpt.py: no such file: put back the script that ran"
    assert call("history", code=1) == f"\nerror: {missed}\n"
    # what is finished is recorded all the same
    assert report.main(["record", "b", "--runs", "0"]) == 0
    assert capsys.readouterr().err == f"left out: {missed}\n"
    page = Path("records/2026-01-05_b/README.md").read_text(encoding="utf-8")
    assert "This is the first of its class." in page
    for path in folder.iterdir():
        path.unlink()
    assert "records/2026-01-01_a: no record" in call("history", code=1)


def test_dates_are_those_of_utc(call):
    """Of runs in the evening in New York and in the morning in Tokyo."""
    paths = [made_up_run(Path("new"), 3, date="2026-03-01 22:30:00 -0500")]
    call("record", "late", "--logs", *paths)
    paths = [made_up_run(Path("new"), 4, date="2026-03-01 02:30:00 +0900")]
    call("record", "early", "--logs", *paths)
    names = sorted(path.name for path in Path("records").iterdir())
    assert names == ["2026-02-28_early", "2026-03-02_late"]
    call("history")
    page = Path("records/README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \d \| (\S+) \|", page, re.MULTILINE) == [
        "2026-02-28",
        "2026-03-02",
    ]


def sections(page: str) -> dict[str, list[dict[str, str]]]:
    """The rows of every section of records/README.md, by its heading; columns by their name."""
    found = {}
    for text in re.split(r"^### ", page, flags=re.MULTILINE)[1:]:
        heading, *lines = text.splitlines()
        header, _, *rows = ([*line.strip("| ").split(" | ")] for line in lines if line[:1] == "|")
        found[heading] = [dict(zip(header, row, strict=True)) for row in rows]
    return found


def test_history_lists_records_by_class(call):
    """Classes are sections, the newest first; runs on a CPU and toys stay out."""
    records, claim = Path("records"), [3.2781, 3.2779, 3.278]
    made_up_record(records / "2026-01-01_first", claim, 1, time=90)
    made_up_record(records / "2026-01-05_second", claim, 5, time=80)
    made_up_record(records / "2026-01-09_high", [3.29, 3.281], 9)
    made_up_record(records / "2026-01-12_four", [3.3], 12, world_size=4)
    made_up_record(records / "2026-01-13_proxy", [3.3], 13, **PROXY)
    edu = {"train_files": "data/finewebedu10B/finewebedu_train_*.bin"}
    made_up_record(records / "2026-01-14_edu", [3.3], 14, **edu)
    part = {"val_file": "data/fineweb10B/fineweb_val_part.bin"}  # no whole validation shard
    made_up_record(records / "2026-01-14_part", [3.3], 14, **part)
    made_up_record(records / "2026-01-15_long", [3.3], 15, num_steps="1000")
    made_up_record(records / "2026-01-16_lookup", [3.3], 16, match_orders="3:4")
    made_up_record(records / "2026-01-17_cpu", [3.3], 17, cuda=None, devices="CPU", world_size=1)
    made_up_record(
        records / "2026-01-18_toy", [3.3], 18, stages="0.5:128:1.0, 0.5:256:1.0", extension="1:9:1"
    )
    short = {"stages": "0.5:8388608:1.0, 0.5:16777216:1.0", "extension": "1:8388608:1"}
    made_up_record(records / "2026-01-19_short", [3.3], 19, **short)
    by_hand = "# By | hand\n\nWords.\n\n| | |\n|---|---|\n| memory | hashed |\n"
    (records / "2026-01-01_first" / "README.md").write_text(by_hand)
    assert "10 records, 2 toy runs left out" in call("history")
    assert (records / "2026-01-01_first" / "README.md").read_text() == by_hand
    assert (records / "history.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    page = (records / "README.md").read_text(encoding="utf-8").replace("\\|", "¦")
    found, machine = sections(page), "8 × H100 80GB HBM3"
    whole = f"{machine}, FineWeb, whole schedule, non-parametric memory"
    names = {
        kind: [re.sub(r".*_(\w+)\)", r"\1", row["record"]) for row in rows]
        for kind, rows in found.items()
    }
    assert list(names.items()) == [
        (f"{machine}, FineWeb, short schedule, non-parametric memory: none", ["short"]),
        (f"{whole}: n-gram lookup", ["lookup"]),
        (f"{machine}, FineWeb, stopped early, non-parametric memory: none", ["long"]),
        (f"{machine}, other data, whole schedule, non-parametric memory: none", ["edu", "part"]),
        (f"{machine}, proxy corpus, whole schedule, non-parametric memory: none", ["proxy"]),
        ("4 × H100 80GB HBM3, FineWeb, whole schedule, non-parametric memory: none", ["four"]),
        (f"{whole}: none", ["first", "second", "high"]),
    ]
    first, second, high = found[list(found)[-1]]
    assert first["record"] == "[By ¦ hand](2026-01-01_first)"
    assert (first["#"], first["date"], first["steps"]) == ("1", "2026-01-01", "8")
    assert (first["time (s)"], first["loss"]) == ("90.00 ± 0.00", "3.2780 ± 0.0001")
    assert (first["runs"], high["runs"]) == ("3", "2")
    assert ".txt" not in page  # a record's own page links to its logs
    claims = [row["claim"] for row in (first, second, high)]
    assert claims == ["p = 0.00042", "p = 0.00042", "no: p not below 0.01"]
    assert found[list(found)[2]][0]["steps"] == "8 of 1002"
    assert re.findall(r"^No claim: (.+)\.$", page, re.MULTILINE) == [
        "one run",
        "one run",
        "schedule not finished; one run",
        "other data, not FineWeb; one run",
        "proxy data, not FineWeb; one run",
        "4 GPUs, not 8; one run",
    ]
    assert page.count("proxy corpus that is not public") == 1
    assert "**The data.** 1 of these records use" in page


def test_history_without_the_proxy_corpus_does_not_mention_it(call):
    made_up_record(Path("records/2026-01-01_a"), CLAIM)
    call("history")
    assert "proxy" not in Path("records/README.md").read_text(encoding="utf-8")
    assert not Path("records/loss_against_seconds.png").exists()  # of no session


MEDIUM = {"model_dim": "1024", "stages": "1:67108864:1", "extension": "1:67108864:1"}


def test_a_record_of_the_medium_track(call, monkeypatch):
    """Known by its width; its target is 2.92, and its schedule is shortened below 1,000 M tokens.
    It has a part and a picture of its own."""
    made_up_record(Path("records/2026-01-01_main"), CLAIM)
    losses = [2.9181, 2.9179, 2.918]
    for i, loss in enumerate(losses):
        made_up_run(Path("made"), 5 + i, loss, **MEDIUM)
    out = call("record", "wide", "--logs", *Path("made").glob("*.txt"))
    assert "at most 2.92: p = 0.00042, under 0.01" in out
    table = cells(Path("records/2026-01-05_wide/README.md").read_text(encoding="utf-8"))
    assert (table["track"], table["schedule"]) == ("medium", "6 + 2 steps")
    assert table["runs"] == "3, seeds 5, 6, 7"  # a claim
    figures = keep_figures(monkeypatch)
    assert "README.md, history.png, history_medium.png: 2 records" in call("history")
    page = Path("records/README.md").read_text(encoding="utf-8")
    assert [*re.findall(r"^## (\w+) track: ", page, re.MULTILINE)] == ["Main", "Medium"]
    heading = "shortened schedule, non-parametric memory: none"
    assert sections(page)[f"8 × H100 80GB HBM3, FineWeb, {heading}"][0]["#"] == "1"
    assert "at most 2.92 (p < 0.01)" in page and "one of fewer than\n1,000 M tokens" in page
    (axes,) = figures[-1].axes
    assert [2.92, 2.92] in [list(line.get_ydata()) for line in axes.get_lines()]
    drawn = [
        line for line in axes.get_lines() if list(line.get_ydata()) == [losses[0] + 1, losses[0]]
    ]
    assert list(drawn[0].get_xdata()) == pytest.approx([2.5, 80.0])
    made_up_record(Path("records/2026-01-09_whole"), losses, 9, **MEDIUM | {"num_steps": "14"})
    assert report.Record(Path("records/2026-01-09_whole")).length == "stopped early"


def test_the_track_that_was_stated_counts_and_is_kept(call):
    path = made_up_run(Path("made"), 5, 3.2, **MEDIUM)
    call("record", "a", "--track", "main", "--logs", path)
    page = Path("records/2026-01-05_a/README.md")
    assert cells(page.read_text(encoding="utf-8"))["track"] == "main"
    call("record", "a", "--runs", 0)
    assert cells(page.read_text(encoding="utf-8"))["track"] == "main"
    assert "at most 3.28: one run allows" in cells(page.read_text(encoding="utf-8"))["test"]
    error = call("record", "b", "--track", "optimization", "--logs", path, code=1)
    assert (
        error == f"\nerror: {path}: a log of the medium track: give --track medium, or other logs\n"
    )
    other = made_up_run(Path("made"), 6)
    for each in (other, other.with_suffix(".txt")):
        text = each.read_text(encoding="utf-8")
        each.write_text(text.replace('"seed": "6"', '"seed": "6", "track": "new"'))
    assert "'new' is no track" in call("record", "b", "--logs", other, code=1)
    with pytest.raises(SystemExit):
        call("record", "b", "--track", "new", "--logs", path)


def test_a_track_is_trained_with_its_preset_and_script(call):
    """By --track, and by the script that --script names."""
    write_launcher(LAUNCHER)
    made_up_run(Path("made/a"), 1, **MEDIUM)
    call("record", "a", "--track", "medium", "--runs", 1, "--", "--num_steps", "6")
    assert Path("called").read_text().startswith("--preset medium --num_steps 6 --seed 1 ")
    Path("b.py").write_text(CHANGED, encoding="utf-8")
    made_up_run(Path("made/b"), 1, source=CHANGED)
    shutil.rmtree("logs")
    call("record", "b", "--script", "b.py", "--runs", 1)
    script = Path("records/2026-01-01_b/train_gpt.py")
    assert script.read_text(encoding="utf-8") == CHANGED
    error = call("record", "c", "--track", "optimization", "--runs", 1, code=1)
    assert "records/optimization/train_gpt_simple.py" in error


def a_session(name: str, day: int, dated: int | None = None, **changes: object) -> None:
    """A baseline, a record in half of its time, and one with n-gram lookup in a third."""
    lookup = {"match_orders": "3:4"}
    rows = ("_reference", 3.38, 90, {}), ("", 3.37, 45, {}), ("_matching", 3.39, 30, lookup)
    for i, (suffix, loss, seconds, own) in enumerate(rows):
        folder = Path(f"records/2026-01-{dated or day:02d}_{name}{suffix}")
        losses = [loss, loss + 0.002]
        made_up_record(folder, losses, day + 3 * i, time=seconds, **PROXY, **own, **changes)


def test_speed_up_is_over_the_baseline_of_the_same_session(call):
    a_session("a", 1)
    a_session("a_later", 11, dated=1)  # its name begins like the other's
    other = made_up_record(Path("records/2026-01-01_a_later_one"), [3.3], 21, world_size=4, **PROXY)
    lone = made_up_record(Path("records/2026-01-22_lone"), [3.3], 22, **PROXY)
    records = report.all_records()
    bases = {r.folder.name: report.baseline_of(r, records) for r in records}
    assert {name: base and base.folder.name for name, base in bases.items()} == {
        "2026-01-01_a_reference": None,
        "2026-01-01_a": "2026-01-01_a_reference",
        "2026-01-01_a_matching": "2026-01-01_a_reference",
        "2026-01-01_a_later_reference": None,
        "2026-01-01_a_later": "2026-01-01_a_later_reference",
        "2026-01-01_a_later_matching": "2026-01-01_a_later_reference",
        other.name: None,  # another machine
        lone.name: None,
    }
    assert [r.folder.name[11:] for r in report.newest_session(records)] == [
        "a_later_reference",
        "a_later",
        "a_later_matching",
    ]
    assert "loss_against_seconds.png" in call("history")
    for name in ("history", "loss_against_seconds"):
        assert Path(f"records/{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    page = Path("records/README.md").read_text(encoding="utf-8")
    rows = [row for rows in sections(page).values() for row in rows]
    links = (f"[{n.replace('_', ' ')}](2026-01-01_{n})" for n in ("a_later_reference", "a_later"))
    assert f"The newest session with a baseline: {'; '.join(links)}; [a later matching](" in page
    assert page.index("](history.png)") < page.index("The two sides have other machines")
    speeds = {row["record"]: (row.get("speed-up"), row.get("Δ loss")) for row in rows}
    assert speeds["[a](2026-01-01_a)"] == ("2.00×", "−0.0100")
    assert speeds["[a matching](2026-01-01_a_matching)"] == ("3.00×", "+0.0100")
    assert speeds["[a reference](2026-01-01_a_reference)"] == ("baseline", "")
    call("record", "a_matching", "--runs", 0)
    table = cells(Path("records/2026-01-01_a_matching/README.md").read_text(encoding="utf-8"))
    link = "[the baseline of its session](../2026-01-01_a_reference)"
    assert table["speed-up"].startswith(f"3.00× over {link}, loss +0.0100 (Welch's two-")
    assert table["non-parametric memory"] == "n-gram lookup"


def test_classes_of_memory_are_explained_before_the_first_section(call):
    made_up_record(Path("records/2026-01-01_a"), [3.3])
    call("history")
    intro = Path("records/README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    for memory in ("none", "document", "n-gram lookup"):
        assert re.search(rf"^\| {memory} \| .{{20,}} \|$", intro, re.MULTILINE)


def test_a_script_with_a_pointer_has_the_document_as_memory(tmp_path):
    """For a while the pointer was an option."""
    pointer = "def pointer_shares():\n    ...\n"
    for source, changes, memory in (
        (SCRIPT, {}, "none"),
        (pointer, {}, "document"),
        (pointer, {"pointer": "true"}, "document"),
        (pointer, {"pointer": "false"}, "none"),
        (pointer, {"match_orders": "3:4"}, "n-gram lookup"),
    ):
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        made_up_record(folder, [3.3], source=source, **changes)
        assert report.Record(folder).memory == memory


def test_the_diff_is_against_the_last_record_of_the_class_and_folded(call):
    a_session("a", 1)
    a_session("b", 11, source=CHANGED)
    for name, before in (("b_reference", "a_reference"), ("b", "a"), ("b_matching", "a_matching")):
        call("record", name, "--runs", 0)
        page = Path(f"records/2026-01-11_{name}/README.md").read_text(encoding="utf-8")
        assert f"](../2026-01-01_{before}): " in page
        shown, *hidden = re.split(r"</?details>", page[page.index("## Against the last") :])[:4]
        assert "lines added" in shown and "added" not in hidden[1]
        assert "- gone: `kept` −" in hidden[0] and "````diff\n--- records/" in hidden[2]
        assert "-        return x + 1\n+        return x + 2\n" in hidden[2]
    call("record", "a", "--runs", 0)
    page = Path("records/2026-01-01_a/README.md").read_text(encoding="utf-8")
    assert "This is the first of its class." in page and "<details>" not in page


def points(axes) -> dict[tuple[float, ...], str]:
    """Colors of the lines of a picture, by what they draw."""
    return {tuple(line.get_ydata()): line.get_color() for line in axes.get_lines()}


@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_records_picture_distinguishes_all_seeds(call, monkeypatch, count):
    figures = keep_figures(monkeypatch)
    losses = [3.3 + i / 1000 for i in range(count)]
    record = report.Record(made_up_record(Path("records/2026-01-01_a"), losses))
    report.draw_losses(record, Path("loss.png"))
    (axes,) = figures[0].axes
    assert axes.get_xlabel().startswith("training time (s)")
    scored = {
        tuple(line.get_ydata()): line for line in axes.get_lines() if len(line.get_ydata()) == 2
    }
    mine = [scored[loss + 1, loss] for loss in losses]
    looks = {(str(line.get_color()), line.get_marker()) for line in mine}
    assert len(looks) == count
    assert [list(line.get_xdata()) for line in mine] == [
        [row["train_time_s"] for row in run.validations] for run in record.runs
    ]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == [f"seed {r.seed}: {r.loss:.4f} in {r.time:.2f} s" for r in record.runs] + [
        "target 3.28"
    ]
    assert len(axes.child_axes) == (count > 1)  # the end once more, larger


def keep_figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that are saved from now on."""
    kept, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **how: (kept.append(self), save(self, *a, **how))
    )
    return kept


def test_pictures_show_ratios_and_the_newest_session(call, monkeypatch):
    figures = keep_figures(monkeypatch)
    a_session("a", 1)
    a_session("b", 11)
    call("history")
    public, own = figures[0].axes
    drawn = sorted(
        y for line in own.get_lines() for y in line.get_ydata() if len(line.get_ydata()) == 2
    )
    frontier = 73.889 / 39.914
    assert drawn == pytest.approx(sorted([frontier] * 2 + [2.0] * 2 + [3.0] * 2), rel=1e-9)
    ratios = {line.get_ydata()[0] for line in public.get_lines() if len(line.get_ydata()) == 1}
    assert sorted(ratios) == pytest.approx([frontier, 73.889 / 36.009, 73.889 / 21.555])
    hollow = [line for line in own.get_lines() if line.get_markerfacecolor() == "white"]
    assert [line.get_ydata()[0] for line in hollow] == [3.0, 3.0]  # of a loss above the baseline's
    (race,) = figures[1].axes
    in_history = {line.get_label(): line.get_color() for line in own.get_lines()}
    in_race = {line.get_label().split(":")[0]: line.get_color() for line in race.get_lines()}
    for memory, label in (("none", "project"), ("n-gram lookup", "project, n-gram lookup")):
        kind = f"8 × H100 80GB HBM3, proxy corpus, whole schedule, non-parametric memory: {memory}"
        assert in_race[f"this {label}"] == in_history[kind]
    texts = [text.get_text() for text in race.get_legend().get_texts()]
    assert texts == [
        "baseline (record-89 recipe): loss 3.381 in 90.0 s",
        "this project: loss 3.371 in 45.0 s",
        "this project, n-gram lookup: loss 3.391 in 30.0 s",
    ]
    where = "8 × H100 80GB HBM3, proxy corpus, whole schedule, 2 seeds each"
    marks = [text.get_text() for text in race.texts if text.get_text() != where]
    assert len(marks) == len(race.texts) - 1 and marks == [
        "90.0 s",
        "45.0 s\n2.00×",
        "30.0 s\n3.00×",
    ]


def test_series_of_one_class_of_memory_have_several_colors():
    colors = report.series_colors(["none", "n-gram lookup", "none", "none", "document"])
    assert len({*colors, report.BASELINE_COLOR}) == 6
    assert colors[:2] == report.series_colors(["none", "n-gram lookup"])


def test_labels_hide_neither_each_other_nor_points():
    from matplotlib.text import Text

    figure, axes = report.new_figure(5, 4)
    points = [(0.5 + i % 3 / 100, 0.5 + i / 100) for i in range(7)]  # a marker apart and less
    axes.plot(*zip(*points), "o")
    labels = [report.label_point(axes, point, f"a label, {i}") for i, point in enumerate(points)]
    report.part_labels(figure, labels)
    boxes = [Text.get_window_extent(label) for label in labels]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not any(box.contains(*axes.transData.transform(point)) for point in points)
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1


def test_history_of_the_repository(call):
    """The records that are there; the folder of the baseline script is none."""
    folders = [path.parent for path in (ROOT / "records").glob("*/train_gpt.py")]
    for folder in folders:
        shutil.copytree(folder, Path("records") / folder.name)
    left_out = {"2026-11-22_two_gpus_every_stage", "reference"}  # the former a toy of 97 steps
    names = {folder.name for folder in folders} - left_out
    toy = "records/2026-11-22_two_gpus_every_stage"
    assert f"{len(names)} records, 1 toy run left out: {toy}\n" in call("history")
    page = Path("records/README.md").read_text(encoding="utf-8")
    listed = [row for rows in sections(page).values() for row in rows]
    assert {re.search(r"\]\((.+)\)$", row["record"])[1] for row in listed} == names
    assert len(listed) == len(names) and not any(f"]({name})" in page for name in left_out)
    assert max(len(row["record"].split("](")[0]) for row in listed) < 70


@pytest.mark.parametrize(("height", "place"), [(0.5, 1), (0.05, 0)])
def test_the_inset_hides_as_little_as_it_can(height, place):
    """A line across the picture, through one of the two places or below both."""
    axes = Figure().subplots()
    axes.set(xlim=(0, 10), ylim=(2, 4))
    axes.plot([i / 10 for i in range(100)], [2 + 2 * height] * 100)
    assert report.free_place(axes) == report.INSETS[place]
