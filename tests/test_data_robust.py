"""Nothing lost, nothing silent, nothing left behind: what can happen to the data tools from
outside."""

import codecs
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from test_data_tools import (
    DATA,
    is_one_error_line,
    read_documents,
    read_tokens,
    start,
    write_jsonl,
    write_shard,
)
from tiktoken_ext.openai_public import r50k_pat_str

sys.path.insert(0, str(DATA))

import cached_fineweb
import command
import sample
import shards
import tokenize_text


def tokenize(*args: object) -> int:
    """The tokenizer in this process, on byte tokens and one thread."""
    return tokenize_text.main([*map(str, args), "--tokenizer", "bytes", "--workers", "1"])


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Writing fails beyond so many bytes of a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---- Signals ----


@pytest.fixture
def handlers() -> Iterator[None]:
    """Signals that this process may have been started to ignore are not, and all are put back."""
    before = {number: signal.getsignal(number) for number in command.SIGNALS}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_end_the_tokenizer(tmp_path: Path, handlers) -> None:
    """One line, an exit code, nothing unfinished, and no process lives on; SIGKILL leaves files."""
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "some text that takes a while"}\n' * 1_500_000)
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]
    running = []
    for number in signals:
        out = tmp_path / number.name
        args = [source, "--out", out, "--tokenizer", "bytes", "--workers", "2"]
        running.append((number, out, start("tokenize_text.py", *args, new_session=True)))
    for number, out, process in running:
        while not any(path.stat().st_size for path in out.glob(".unfinished-*/*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(number)
        began = time.monotonic()
        err = process.communicate(timeout=20)[1]  # the pipes end with the last process
        assert time.monotonic() - began < 5
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
        if number == signal.SIGKILL:
            assert process.returncode == -9
        else:
            name = "Ctrl-C" if number == signal.SIGINT else number.name
            assert err == f"stopped by {name}; nothing unfinished is left\n"
            assert process.returncode == 128 + number
            assert not out.exists()


@pytest.mark.parametrize(
    "script",
    ["tokenize_text.py", "cached_fineweb.py", "sample.py", "../records/reference/prefix_tokens.py"],
)
def test_ctrl_c_during_imports(tmp_path: Path, handlers, script: str) -> None:
    """A module that numpy imports sends the signal and takes its time."""
    text = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n"
    (tmp_path / "secrets.py").write_text(text)
    (tmp_path / "numpy.py").write_text("import secrets")
    process = start(script, tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert process.communicate(timeout=15) == ("", "stopped by Ctrl-C; before it began\n")
    assert process.returncode == 130


def test_signals_that_the_parent_ignores_stay_ignored(handlers) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    command.listen(command.interrupt)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is command.interrupt
    with pytest.raises(KeyboardInterrupt) as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.args == (signal.SIGTERM,)
    signal.raise_signal(signal.SIGINT)  # must not disturb what the first one set going


def test_shards_move_together_although_a_signal_comes(
    handlers, tmp_path: Path, monkeypatch
) -> None:
    replace = os.replace

    def signal_and_replace(*paths: Path) -> None:
        signal.raise_signal(signal.SIGTERM)
        replace(*paths)

    command.listen(command.interrupt)
    monkeypatch.setattr(os, "replace", signal_and_replace)
    with pytest.raises(KeyboardInterrupt), shards.staging(tmp_path / "out") as folder:
        for name in ("a", "b"):
            (folder / name).write_text(name)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]


def test_busy_threads_are_not_waited_for() -> None:
    """A text of a gigabyte takes a minute, a download longer."""
    free, began = threading.Event(), time.monotonic()
    with pytest.raises(KeyboardInterrupt), command.thread_pool(1) as pool:
        futures = [pool.submit(free.wait, 10) for _ in range(2)]
        raise KeyboardInterrupt
    assert time.monotonic() - began < 5
    assert futures[1].cancelled()
    free.set()

    code = "import command, threading, time\n"
    code += (
        "def main():\n    threading.Thread(target=time.sleep, args=[20]).start()\n    return 1\n"
    )
    code += "command.run(main, '')"
    env = {**os.environ, "PYTHONPATH": str(DATA)}
    ended = subprocess.run([sys.executable, "-c", code], env=env, timeout=15, check=False)
    assert ended.returncode == 1


# ---- The screen ----


def test_closed_and_narrow_screens(tmp_path: Path) -> None:
    """A pipe that nobody reads, no screen at all, one without the letters of a path."""
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    (tmp_path / "empty.txt").touch()  # for a line on stderr
    script = DATA / "tokenize_text.py"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
    folders = [tmp_path / name for name in ("pipe", "none", "ä·")]
    lines = [
        f"set -o pipefail; {{ sleep 0.3; COMMAND {folders[0]}; }} 2>&1 | true",
        f"COMMAND {folders[1]} >&- 2>&-",
        f"COMMAND {folders[2]}",
    ]
    run = f"{sys.executable} {script} {tmp_path} --tokenizer bytes --val-every 0 --out"
    processes = [
        subprocess.Popen(
            ["bash", "-c", line.replace("COMMAND", run)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        for line in lines
    ]
    results = [(*process.communicate(timeout=60), process.returncode) for process in processes]
    assert [code for _, _, code in results] == [0, 0, 0], results
    assert results[0][:2] == results[1][:2] == (b"", b"")
    assert b"??: 2 documents" in results[2][0]
    for folder in folders:
        (shard,) = folder.iterdir()
        assert read_documents(shard) == ["one", "two"]
    assert source.exists()


# ---- Outputs ----


@pytest.mark.parametrize("kind", ["folder", "link", "fifo"])
def test_only_regular_files_are_replaced(tmp_path: Path, kind: str) -> None:
    path, behind = tmp_path / "a.bin", tmp_path / "behind"
    behind.write_text("keep")
    make = {"folder": Path.mkdir, "link": lambda p: p.symlink_to(behind), "fifo": os.mkfifo}[kind]
    make(path)
    with pytest.raises(OSError, match=r"a\.bin: is no regular file"):
        shards.ShardWriter(path)
    with (
        pytest.raises(OSError, match=r"a\.bin: is no regular file"),
        shards.staging(tmp_path) as folder,
    ):
        (folder / "0.bin").write_text("comes before")
        (folder / path.name).write_text("new")
    temporary = tmp_path / "b.bin.tmp"
    make(temporary)
    with pytest.raises(OSError, match=r"b\.bin\.tmp: is no regular file"):
        shards.ShardWriter(tmp_path / "b.bin")
    assert sorted(tmp_path.iterdir()) == sorted([path, temporary, behind])
    assert behind.read_text() == "keep"


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x" * 100_000] * 3)
    path = tmp_path / "a.bin"
    tokens = np.zeros(2000, np.uint16)
    with full_disk(3000):
        with pytest.raises(OSError), shards.ShardWriter(path) as writer:
            writer.write(tokens)
        writer = shards.ShardWriter(path)
        with pytest.raises(OSError):  # on the way to disk at last, as files have buffers
            writer.write(tokens)
            writer.close()
        assert list(tmp_path.iterdir()) == [source]

        monkeypatch.setattr(sample, "modules", list)
        made = tmp_path / "new" / "sample"
        assert sample.main([str(made), "--tokenizer", "bytes"]) == 1
        assert tokenize(source, "--out", made) == 1
    errors = capsys.readouterr().err.splitlines(keepends=True)
    assert len(errors) == 2
    for error in errors:
        assert is_one_error_line(error)
        assert f"{made}: cannot be written (File too large); make room" in error
    assert list(tmp_path.iterdir()) == [source]


def test_both_shards_of_the_sample_or_none(tmp_path: Path, monkeypatch, capsys) -> None:
    """The second shard cannot be completed: the first is that of before, too."""
    texts = [f"text {i} " * 50 for i in range(30)]
    monkeypatch.setattr(sample, "modules", list)
    monkeypatch.setattr(sample, "topics", lambda: texts)
    monkeypatch.setattr(sample, "licences", list)
    assert sample.main([str(tmp_path), "--tokenizer", "bytes"]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["sample_train_000001.bin", "sample_val_000000.bin"]
    monkeypatch.setattr(sample, "topics", lambda: [text.upper() for text in texts])
    with full_disk(10_000):  # enough for validation alone
        assert sample.main([str(tmp_path), "--tokenizer", "bytes"]) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    (tmp_path / "sample_val_000000.bin").unlink()
    (tmp_path / "sample_val_000000.bin").mkdir()
    monkeypatch.setattr(sample, "get_encoder", None)  # the output is tried before any work
    assert sample.main([str(tmp_path), "--tokenizer", "bytes"]) == 1
    assert "is no regular file" in capsys.readouterr().err
    monkeypatch.undo()


def test_sample_has_a_text_once(tmp_path: Path, monkeypatch) -> None:
    texts = [f"text {i} " * 50 for i in range(30)]
    monkeypatch.setattr(sample, "topics", lambda: texts)
    monkeypatch.setattr(sample, "licences", lambda: texts[:10])
    monkeypatch.setattr(sample, "modules", lambda: texts[5:])
    assert sample.main([str(tmp_path), "--tokenizer", "bytes"]) == 0
    assert sorted(read_documents(*tmp_path.iterdir())) == sorted(texts)


def test_sample_reads_what_a_library_holds(tmp_path: Path, monkeypatch) -> None:
    """Docstrings in source order; installed packages, tests and what is no Python left out."""
    files = {
        "a.py": b'"""A."""\nclass B:\n    """B."""\n    def c(self):\n        """C."""\n',
        "broken.py": b"def",
        "deep.py": b"(" * 10_000 + b")" * 10_000,
        "null.py": b'"""Null."""\0',
        "silent.py": b"x = 1",
        "sub/d.py": b'"""D."""',
        "sub/tests/e.py": b'"""Of tests."""',
        "site-packages/f.py": b'"""Installed."""',
        "surrogate.py": b'"""\\ud800."""',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.py").mkdir()
    monkeypatch.setattr(sample.sysconfig, "get_path", lambda name: str(tmp_path))
    assert sample.modules() == ["A.\n\nB.\n\nC.", "D.", "?."]


def test_outputs_are_checked_before_work(tmp_path: Path, monkeypatch, capsys) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    monkeypatch.setattr(tokenize_text, "encode_in_order", None)
    for out in (source, source / "below"):
        assert tokenize(source, "--out", out) == 1
        error = capsys.readouterr().err
        assert is_one_error_line(error)
        assert f"{out}: cannot be written (" in error

    text = tmp_path / "b.txt"
    with open(text, "wb") as file:
        file.truncate(1000)
    free = shards.shutil.disk_usage(tmp_path)._replace(free=1999)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: free)
    assert tokenize(text, "--out", tmp_path / "out") == 1
    assert "0.0 MB are to be written, 0.0 MB are free" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [source, text]


def test_folder_names_are_no_patterns(tmp_path: Path, capsys) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    out = tmp_path / "run [v1]"
    assert tokenize(source, "--out", out, "--val-every", 0) == 0
    (shard,) = out.iterdir()
    assert shard.name == "run [v1]_train_000001.bin"
    before = shard.read_bytes()
    write_jsonl(source, ["three"])
    assert tokenize(source, "--out", out, "--val-every", 0) == 2
    assert "already has shards named run [v1]_*.bin" in capsys.readouterr().err
    assert shard.read_bytes() == before
    assert tokenize(source, "--out", out, "--val-every", 0, "--prefix", "run ?") == 0
    link = tmp_path / "link"
    link.symlink_to(out)
    assert tokenize(source, "--out", link, "--val-every", 0) == 0  # called after the link
    assert len(list(out.iterdir())) == 3


def test_shards_made_in_the_meantime_are_kept(tmp_path: Path, monkeypatch, capsys) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", ["one", "two"]), tmp_path / "out"
    other = out / "out_train_000001.bin"

    def read_sources(*args: object) -> Iterator[tokenize_text.Document]:
        write_shard(other, np.array([shards.START_TOKEN, 1], np.uint16))
        yield from read(*args)

    read = tokenize_text.read_sources
    monkeypatch.setattr(tokenize_text, "read_sources", read_sources)
    assert tokenize(source, "--out", out, "--val-every", 0) == 2
    assert "already has shards" in capsys.readouterr().err
    assert read_tokens(other).tolist() == [shards.START_TOKEN, 1]
    assert list(out.iterdir()) == [other]


@pytest.mark.parametrize(
    "options",
    [
        ["--prefix", "../x"],
        ["--prefix", ".."],
        ["--prefix", ""],
        ["--out", ""],
        ["--out", "/"],
        ["--workers", "1025"],
        ["--workers", "many"],
        ["--shard-tokens", "2147483648"],
        ["--shard-tokens", "9" * 5000],
        ["--val-every", "-1"],
        ["--tokenizer", "gpt3"],
        [""],
    ],
)
def test_options_out_of_range(tmp_path: Path, capsys, options: list[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(SystemExit) as exit_info:
        tokenize_text.main([str(source), "--out", str(tmp_path / "out"), *options])
    assert exit_info.value.code == 2
    assert is_one_error_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [source]


def test_sample_options(capsys) -> None:
    for arguments in ([""], ["a", "b"], ["--tokenizer", "none"]):
        with pytest.raises(SystemExit) as exit_info:
            sample.main(arguments)
        assert exit_info.value.code == 2
        assert is_one_error_line(capsys.readouterr().err)


def test_file_names_have_six_digits(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tokenize_text, "MAX_SHARDS", 3)
    source = write_jsonl(tmp_path / "a.jsonl", ["12345", "678"])
    args = [source, "--val-every", 0, "--shard-tokens"]
    assert tokenize(*args, 3, "--out", tmp_path / "four") == 2
    assert "more than 3 shards; raise --shard-tokens" in capsys.readouterr().err
    assert not (tmp_path / "four").exists()
    assert tokenize(*args, 4, "--out", tmp_path / "three") == 0
    assert len(list((tmp_path / "three").iterdir())) == 3


# ---- Defaults and order ----


def test_defaults(tmp_path: Path, monkeypatch) -> None:
    given = []
    monkeypatch.setattr(tokenize_text, "tokenize", lambda args: given.append(args) or "done")
    assert tokenize_text.main(["a.txt", "--out", "b"]) == 0
    (args,) = given
    assert (args.shard_tokens, args.val_every) == (100_000_000, 100)
    assert (args.tokenizer, args.field, args.match, args.skip_bad) == ("gpt2", "text", "*", False)
    assert args.workers == os.cpu_count()


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("fineweb10B", "fineweb"), ("fineweb100B", "fineweb"), ("finewebedu10B", "finewebedu")],
)
def test_fetched_by_default(monkeypatch, name: str, prefix: str) -> None:
    given = []
    monkeypatch.setattr(cached_fineweb, "download", lambda *args: given.append(args) or 0)
    assert cached_fineweb.main([name]) == 0
    names = [f"{prefix}_val_000000.bin"]
    names += [f"{prefix}_train_00000{i}.bin" for i in range(1, 10)]
    assert given == [(f"kjj0/{name}-gpt2", names, DATA / name)]


@pytest.mark.parametrize("workers", [1, 3])
def test_many_batches_keep_their_order(tmp_path: Path, monkeypatch, workers: int) -> None:
    monkeypatch.setattr(tokenize_text, "BATCH_CHARS", 300)
    texts = ["x" * (i * 37 % 500) for i in range(200)]
    sizes = [
        [len(document.text) for document in batch]
        for batch in tokenize_text.make_batches(tokenize_text.Document(t, 0.0) for t in texts)
    ]
    assert [size for batch in sizes for size in batch] == [len(text) for text in texts]
    assert all(sum(batch[:-1]) + len(batch) - 1 < 300 for batch in sizes)
    assert all(sum(batch) + len(batch) >= 300 for batch in sizes[:-1])

    source, out = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out"
    args = [source, "--out", out, "--tokenizer", "bytes", "--workers", workers]
    assert tokenize_text.main([*map(str, args)]) == 0
    assert read_documents(out / "out_val_000000.bin") == texts[::100]
    assert read_documents(out / "out_train_000001.bin") == [
        text for i, text in enumerate(texts) if i % 100
    ]


def test_workers_work_at_once() -> None:
    """As many batches as workers meet at a barrier, which fewer threads would never pass."""
    barrier = threading.Barrier(3, timeout=10)

    def encoder(text: str) -> np.ndarray:
        barrier.wait()
        return np.zeros(len(text), np.uint16)

    with command.thread_pool(1) as pool:
        assert pool.submit(int, "7").result() == 7
    shards.get_encoder.cache_clear()
    documents = [tokenize_text.Document("x" * tokenize_text.BATCH_CHARS, 0.0)] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_text, "get_encoder", lambda tokenizer: encoder)
        results = list(tokenize_text.encode_in_order(documents, "bytes", 3))
    assert [len(tokens) for (tokens,), _ in results] == [tokenize_text.BATCH_CHARS + 1] * 3


# ---- The vocabulary ----


@pytest.mark.parametrize(
    ("load", "message"),
    [(lambda name: time.sleep(3), "no answer within 0.2 s"), (lambda name: {}[name], "KeyError")],
)
def test_vocabulary_that_does_not_load(monkeypatch, load, message: str) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", load)
    began = time.monotonic()
    with pytest.raises(shards.DataError, match=message):
        shards.load_gpt2(0.2)
    assert time.monotonic() - began < 2


# ---- Members of a folder ----


def test_folder_with_links_and_hidden_files(tmp_path: Path, capsys) -> None:
    """Hidden files left out, links followed, nothing twice, empty files counted."""
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for name in (".git", ".ipynb_checkpoints", "sub/.cache"):
        (folder / name).mkdir(parents=True)
        (folder / name / "hidden.txt").write_text("hidden")
    (folder / "._a.txt").write_bytes(b"\0\5\26\7Mac\260")
    elsewhere.mkdir()
    (elsewhere / "b.txt").write_text("behind a link of its folder")
    (elsewhere / ".c.txt").write_text("behind a link of its own")
    (folder / "a.txt").write_text("plain")
    (folder / "z").mkdir()
    (folder / "z" / "K.TXT").write_text("capitals")
    (folder / "b").symlink_to(elsewhere)
    (folder / "c.txt").symlink_to(elsewhere / ".c.txt")
    (folder / "d.txt").symlink_to(folder / "a.txt")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "gone.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(folder / "fifo.txt")
    (folder / "e.txt").touch()
    (folder / "e.parquet").touch()
    (folder / "f.md").write_bytes(codecs.BOM_UTF8)
    (folder / "g.jsonl").write_bytes(codecs.BOM_UTF8 + b"\n \r\n\n")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "sub" / "h.parquet")
    (folder / "picture.png").touch()
    out = folder / ".out"
    assert tokenize(folder, "--out", out, "--val-every", 0, "--prefix", "x") == 0
    texts = ["plain", "behind a link of its folder", "behind a link of its own", "capitals"]
    assert read_documents(out / "x_train_000001.bin") == texts
    assert capsys.readouterr().err.splitlines() == [
        f"{folder}: leaving out 1 files with other endings",
        f"{folder}: leaving out 5 empty files",
    ]

    (folder / ".out" / "x.txt").touch()
    assert tokenize(folder / ".out", "--out", tmp_path / "out") == 2
    assert "its 1 files have no documents" in capsys.readouterr().err
    assert tokenize(folder / "fifo.txt", "--out", tmp_path / "out") == 2
    assert "is no regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("z.txt", b""),
        ("z.md", codecs.BOM_UTF8),
        ("z.txt", b"\xff"),
        ("z.jsonl", b"\n\n"),
        ("z.jsonl", b"no json"),
        ("z.parquet", b"PAR1"),
        ("z.parquet", b""),
    ],
)
def test_bad_files_are_found_before_work(
    tmp_path: Path, monkeypatch, capsys, name: str, content: bytes
) -> None:
    good, bad = write_jsonl(tmp_path / "a.jsonl", ["one", "two"]), tmp_path / name
    bad.write_bytes(content)
    monkeypatch.setattr(tokenize_text, "encode_in_order", None)
    assert tokenize(good, bad, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert is_one_error_line(error)
    assert str(bad) in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_folder_that_cannot_be_read(tmp_path: Path, capsys) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    (tmp_path / "sub").mkdir(mode=0)
    assert tokenize(tmp_path, "--out", tmp_path / "out") == 2
    assert f"{tmp_path / 'sub'}: can't be read" in capsys.readouterr().err


BAD_LINES = [
    b"no json",
    b'{"text": null}',
    b'{"body": "x"}',
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
    b"[" * 200_000,
]


def test_rows_are_counted_through_the_file(tmp_path: Path, capsys) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"] * 2500 + [None]}), path, row_group_size=700)
    assert tokenize(path, "--out", tmp_path / "out") == 2
    assert f"{path}, row 2501: 'text' is NoneType" in capsys.readouterr().err


def test_skip_bad(tmp_path: Path, capsys) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    lines = [line for bad in BAD_LINES for line in (b'{"text": "good"}', bad)]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    table = {"text": pa.array([b"one", None, b"\xff", b"two"]).view(pa.string())}
    pq.write_table(pa.table(table), folder / "b.parquet")
    (folder / "c.txt").write_bytes(b"\xff")
    args = [folder, "--out", out, "--val-every", 2]
    assert tokenize(*args) == 2
    error = capsys.readouterr().err
    assert is_one_error_line(error)
    assert "leave such rows out by --skip_bad" in error
    assert tokenize(*args, "--skip_bad") == 0
    assert read_documents(out / "out_val_000000.bin") == ["good", "good", "good", "one"]
    assert read_documents(out / "out_train_000001.bin") == ["good", "good", "good", "two"]
    screen = capsys.readouterr()
    assert "8 documents" in screen.out
    note = f"left out 9 bad rows, the first: {folder / 'a.jsonl'}, line 2: is no JSON"
    assert screen.err.startswith(note)
    assert screen.err.count("\n") == 1

    bad = folder / "c.txt"
    assert tokenize(bad, "--out", tmp_path / "none", "--skip_bad") == 2
    assert "error: the input has no documents" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# ---- Text at its edges ----


def test_jsonl_at_its_edges(tmp_path: Path) -> None:
    """Byte order marks, blank lines and both ends of a line; what ends lines elsewhere is text."""
    texts = ["one", "two\u2028three\u2029four\x85five\x0b\x0c\x1c six", "\ufeffinside", " \n ", ""]
    line = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    mark, path = codecs.BOM_UTF8, tmp_path / "a.jsonl"
    content = mark + line[0] + b"\r\n\r\n" + line[1] + b"\n \t\n" + mark + line[2] + b"\n"
    path.write_bytes(content + "\u3000\n".encode() + line[3] + b"\n\n" + line[4])
    assert tokenize(path, "--out", tmp_path / "out", "--val-every", 0) == 0
    assert read_documents(tmp_path / "out" / "out_train_000001.bin") == texts


def test_texts_with_byte_order_marks(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.md"
    first.write_bytes(codecs.BOM_UTF8 + b"hello\r\n")
    second.write_bytes(codecs.BOM_UTF8 * 2 + b"two")
    assert tokenize(first, second, "--out", tmp_path / "out", "--val-every", 0) == 0
    documents = read_documents(tmp_path / "out" / "out_train_000001.bin")
    assert documents == ["hello\r\n", "\ufefftwo"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[" * 200_000, "JSON nested too deep"),
        (b'{"a": ' * 200_000, "JSON nested too deep"),
        (b'{"text": ' + b"9" * 5000 + b"}", "is no JSON"),
        (b'{"line\\nbreak": 1}', "found line break"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, capsys, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line)
    assert tokenize(path, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert is_one_error_line(error)
    assert error.startswith(f"error: {path}, line 3: ")
    assert message in error


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    """GPT-2's pattern over a small vocabulary: all bytes, and merges within white space."""
    merges = [b"  ", b"    ", b"  \n", b"\n\n", b" a", b"ab", "\u3000".encode()[:2], b"\t "]
    ranks = {token: i for i, token in enumerate([bytes([i]) for i in range(256)] + merges)}
    return tiktoken.Encoding(
        "small", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300}
    )


@pytest.mark.parametrize("seed", range(3))
def test_cuts_change_no_token(encoding, monkeypatch, seed: int) -> None:
    monkeypatch.setattr(shards, "LONG_RUN", 3)
    chance = random.Random(seed)
    letters = "      \n\t\u3000\x1c\x85ab1.'sé"
    num_cut = 0
    for _ in range(500):
        text = "".join(chance.choices(letters, k=chance.randrange(40)))
        pieces = shards.cut_long_runs(text)
        assert "".join(pieces) == text
        assert shards.encode_gpt2(encoding, text).tolist() == encoding.encode_ordinary(text)
        num_cut += len(pieces) > 1
    assert num_cut > 100


def test_a_million_blanks(encoding) -> None:
    blanks = 1_000_100
    for text in ("head" + " " * blanks + "tail", " " * blanks):
        tokens = shards.encode_gpt2(encoding, text)
        assert tokens.dtype == np.uint16
        assert encoding.decode(tokens.tolist()) == text
    start = shards.encode_gpt2(encoding, "head" + " " * blanks + "tail")
    # All blanks but one are a piece, of merges of four; that one is with the word behind it.
    four = encoding.encode_single_token(b"    ")
    assert (start[4 : 4 + (blanks - 1) // 4] == four).all()
    assert shards.encode_gpt2(encoding, "a <|endoftext|> b").max() < 300


def test_panics_are_errors_with_a_place(encoding) -> None:
    def encoder(text: str) -> np.ndarray:
        return np.array(encoding.encode_ordinary(text), np.uint16)

    texts = ["one", "a" + " " * 1_000_100 + "b", "two"]
    batch = [tokenize_text.Document(text, 0.1, f"a.txt, line {i}") for i, text in enumerate(texts)]
    first, error, last = tokenize_text.encode_batch(encoder, batch)
    assert "a.txt, line 1: the tokenizer fails on this text (PanicException" in str(error)
    assert encoding.decode(first[1:].tolist()) == "one"
    assert encoding.decode(last[1:].tolist()) == "two"


def test_text_that_the_tokenizer_cannot_take(encoding, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(shards, "LONG_RUN", 1 << 40)  # so that it panics
    monkeypatch.setattr(shards, "load_gpt2", lambda timeout: encoding)
    shards.get_encoder.cache_clear()
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "a" + " " * 1_000_100 + "b", "two"])
    args = [str(path), "--out", str(tmp_path / "out"), "--workers", "1", "--val-every", "0"]
    try:
        assert tokenize_text.main(args) == 2
        error = capsys.readouterr().err
        assert is_one_error_line(error)
        assert f"{path}, line 2: the tokenizer fails on this text (" in error
        assert not (tmp_path / "out").exists()
        assert tokenize_text.main([*args, "--skip_bad"]) == 0
        assert "left out 1 bad rows" in capsys.readouterr().err
    finally:
        shards.get_encoder.cache_clear()
    tokens = read_tokens(tmp_path / "out" / "out_train_000001.bin")
    assert encoding.decode(tokens[tokens != shards.START_TOKEN].tolist()) == "onetwo"
