"""tools/slim.py: short logs are restored to the byte, those of the ablations too."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import slim
from slim import SEPARATOR

ABLATIONS = sorted((ROOT / "records" / "ablations").glob("*.txt"))
BASE = "".join(f"line {i}\n" for i in range(60))
BODY = (
    '{\n "seed": "1337"\n}\n2 rows\n'
    "step 1 train_loss 10.7898 train_time 0.090 s step 89.6 ms\n"
    "step 2 train_loss nan train_time 0.133 s step 43.7 ms\n"
    "step 2 val_loss 3.6414 train_time 0.133 s\n"
    "step 3 train_loss 9.5 train_time 1,000.1 s step 42.0 ms\n"
    "step 3 train_loss is half a line\n"
    "no end of line"
)


def shorten(path: Path, source: str, bases: list[Path], body: str = BODY) -> str:
    """The short text of a log that lies at this path, which then has it."""
    path.write_bytes((source + SEPARATOR + body).encode())
    path.write_bytes((short := slim.slim(path, bases)).encode())
    return short


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (path := tmp_path / "script.py").write_text(BASE)
    return path


def edited(source: str, edits: int, seed: int) -> str:
    """With lines added, taken out and changed where chance has it, both ends included."""
    chance, lines = random.Random(seed), source.splitlines(keepends=True)
    for _ in range(edits):
        at = chance.choice((0, len(lines), chance.randrange(len(lines) + 1)))
        new = ["\n", "--- a\n", "+++ b\r\n", "@@ -1,2 +3 @@\n", "\x0cé\u2028\n"]
        lines[at : at + chance.randrange(4)] = chance.choices(new, k=chance.randrange(3))
    return "".join(lines)


@pytest.mark.parametrize("seed", range(40))
def test_a_log_is_restored_to_the_byte(tmp_path: Path, script: Path, seed: int) -> None:
    source, log = edited(BASE, seed % 8, seed), tmp_path / "log.txt"
    short = shorten(log, source, [script])
    assert slim.restore(short, log) == source + SEPARATOR + BODY
    if source == BASE:
        head, _, body = short.partition(SEPARATOR)
        assert head.count("\n") == 1 and head.startswith("script: script.py sha256: ")
        table = "step train_loss train_time_s step_ms\n"
        assert f"2 rows\n{table}1 10.7898 0.090 89.6\n2 nan 0.133 43.7\nstep 2 val_loss" in body


def test_the_closest_of_scripts_and_short_logs_is_taken(tmp_path: Path, script: Path) -> None:
    first, second = (tmp_path / f"{name}.txt" for name in ("first", "second"))
    source = BASE.replace("line 7\n", "seven\n")
    shorten(first, source, [script])
    short = shorten(second, source.replace("line 9\n", "nine\n"), [script, first])
    assert short.startswith("script: first.txt ") and "+nine" in short and "+seven" not in short
    # A log that others lead to is no base while it is full: it would be shortened against itself.
    first.write_text(source + SEPARATOR + BODY)
    assert [slim.is_base(path) for path in (script, first, second)] == [True, False, False]


def test_a_head_that_is_no_script_stays(tmp_path: Path, script: Path) -> None:
    short = shorten(log := tmp_path / "log.txt", "The script is that of base.txt.\n", [script])
    assert short.startswith("script: none ") and "\nThe script is that of base.txt.\n===" in short
    assert slim.restore(short, log).startswith("The script") and not slim.is_base(log)


def test_a_log_that_cannot_be_restored_is_an_error(tmp_path: Path, script: Path) -> None:
    log = tmp_path / "log.txt"
    with pytest.raises(slim.SlimError, match="would not come back to the byte"):
        shorten(log, BASE, [script], f"{slim.COLUMNS}1 2 3 4\n")  # what stands for steps
    assert log.read_text() == f"{BASE}{SEPARATOR}{slim.COLUMNS}1 2 3 4\n"
    log.write_text(BASE)
    with pytest.raises(slim.SlimError, match="does not begin with a script"):
        slim.slim(log, [script])
    short = shorten(log, BASE, [script])
    with pytest.raises(slim.SlimError, match="does not begin with a script"):
        slim.slim(log, [script])  # again
    script.write_text(BASE + "\n")
    changed = rf"{log}: .* it or {script} has changed since: put both back as they were$"
    with pytest.raises(slim.SlimError, match=changed):
        slim.restore(short, log)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seven", "eight", "{log}: this short log cannot be restored: it or {script} has changed"),
        ("0.090", "0.080", "{log}: this short log cannot be restored: it or {script} has changed"),
        ("=" * 100, "=" * 99, "{log}: this short log cannot be restored: it or {script} has ch"),
        ("sha256: ", "sha256: x", "{log}: the first line of a short log, but damaged: put it back"),
        ("\n", "\r\n", "{log}: a short log whose lines end in CRLF: check it out again with core"),
    ],
)
def test_a_damaged_short_log_is_named(tmp_path, script, old, new, message) -> None:
    """By itself, and where the script of another log is taken from it."""
    shorten(log := tmp_path / "log.txt", BASE.replace("line 7\n", "seven\n"), [script])
    shorten(other := tmp_path / "other.txt", BASE.replace("line 7\n", "seven\n"), [log])
    text = slim.read(other)
    assert text.startswith("script: log.txt ")
    log.write_bytes(slim.read(log).replace(old, new).encode())
    for damaged, path in ((slim.read(log), log), (text, other)):
        with pytest.raises(slim.SlimError) as error:
            slim.restore(damaged, path)
        assert str(error.value).startswith(message.format(log=log, script=script))


def test_the_command(tmp_path: Path, script: Path) -> None:
    def call(*args: object) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "tools" / "slim.py", *args]
        return subprocess.run([*map(str, command)], check=False, capture_output=True, text=True)

    (log := tmp_path / "log.txt").write_text(full := BASE + "more\n" + SEPARATOR + BODY)
    assert call("slim", log, "--base", script).returncode == 0
    assert len(log.read_text()) < len(full) and call("restore", log).stdout == full
    failed = call("slim", log)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and str(log) in failed.stderr
    assert call("restore", tmp_path / "none.txt").returncode == 1
    (fresh := tmp_path / "fresh.txt").write_text(full)
    for wrong in (fresh, ROOT / "README.md"):  # a full log, and no log
        failed = call("slim", fresh, "--base", script, wrong)
        assert failed.returncode == 1 and fresh.read_text() == full
        expected = f"error: --base {wrong}: is no script (.py), and no short log that leads to one"
        assert failed.stderr == f"{expected}: shorten it first, or leave it out\n"
    log.write_text(f"script: {log.name} sha256: {'0' * 64}\n")
    failed = call("restore", log)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"error: {log}: short logs lead to one another: ")
    log.write_bytes(b"\xff")
    assert call("restore", log).stderr.startswith(f"error: {log}: no text in UTF-8: ")
    assert call("mend", log).returncode == 2


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablation_keeps_a_short_log(path: Path) -> None:
    text = slim.read(path)
    full = slim.restore(text, path)  # compares it with the digest
    assert SEPARATOR not in text or (slim.HEAD.match(text) and full != text)


def tracked_bytes(folder: str) -> int:
    command = ["git", "-C", str(ROOT), "ls-files", "-z", folder]
    names = subprocess.run(command, check=False, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a clone")
    return sum((ROOT / name).stat().st_size for name in names.stdout.split("\0") if name)


@pytest.mark.parametrize(("folder", "mebibytes"), [("records/ablations", 3), (".", 25)])
def test_a_clone_stays_small(folder: str, mebibytes: int) -> None:
    assert tracked_bytes(folder) < mebibytes * 2**20
