"""Tests of data/: shards, tokenizers, the FineWeb download, text to shards, the sample."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))

import cached_fineweb
import shards
import tokenize_text

MB = 1 << 20


def start(script: str, *args: object, new_session: bool = False, **env: str) -> subprocess.Popen:
    """Start a data tool as a user would, `env` added to the environment."""
    command = [sys.executable, str(DATA / script), *map(str, args)]
    pipe = subprocess.PIPE
    environment = {**os.environ, "NO_PROXY": "127.0.0.1,localhost", **env}
    return subprocess.Popen(
        command,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=environment,
        start_new_session=new_session,
    )


def run(script: str, *args: object, **env: str) -> subprocess.CompletedProcess:
    """Run a data tool to its end."""
    process = start(script, *args, **env)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def write_shard(path: Path, tokens: np.ndarray) -> None:
    with shards.ShardWriter(path) as writer:
        writer.write(tokens)


def shard_bytes(num_tokens: int, seed: int, tmp_path: Path) -> bytes:
    """A valid shard of random tokens."""
    path = tmp_path / f"seed{seed}"
    tokens = np.random.default_rng(seed).integers(0, 50257, num_tokens)
    write_shard(path, tokens.astype(np.uint16))
    return path.read_bytes()


def read_tokens(path: Path) -> np.ndarray:
    shards.verify_shard(path)
    return np.fromfile(path, "<u2", offset=shards.HEADER_BYTES)


def read_documents(*paths: Path) -> list[str]:
    """The texts in a run of byte-token shards."""
    id_to_byte = np.argsort(shards.BYTE_TO_ID).astype(np.uint8)
    tokens = np.concatenate([read_tokens(path) for path in paths])
    assert tokens[0] == shards.START_TOKEN
    pieces = np.split(tokens, np.flatnonzero(tokens == shards.START_TOKEN)[1:])
    return [id_to_byte[piece[1:]].tobytes().decode() for piece in pieces]


def is_one_error_line(text: str) -> bool:
    return text.startswith("error: ") and text.count("\n") == 1


# ---- Shards and tokenizers ----


def test_shard_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    tokens = np.arange(50257, dtype=np.uint16)
    with shards.ShardWriter(path) as writer:
        writer.write(tokens[:20000])
        writer.write(tokens[20000:])
        assert not path.exists()
    assert list(tmp_path.iterdir()) == [path]
    assert shards.verify_shard(path) == 50257
    assert np.fromfile(path, "<i4", count=256).tolist() == [20240520, 1, 50257] + [0] * 253
    np.testing.assert_array_equal(read_tokens(path), tokens)


def test_failed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, np.array([1, 2], np.uint16))
    with pytest.raises(TypeError, match="expected uint16"), shards.ShardWriter(path) as writer:
        writer.write(np.array([3], np.int64))
    assert list(tmp_path.iterdir()) == [path]
    assert read_tokens(path).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("change", "found", "expected"),
    [
        (lambda data: data[:100], "100 bytes", "1024"),
        (lambda data: b"\0" * 4 + data[4:], "magic number 0", "20240520"),
        (lambda data: data[:4] + b"\7\0\0\0" + data[8:], "version 7", "1"),
        (lambda data: data[:-2], "1042 bytes", "1044 for the header's 10 tokens"),
        (lambda data: data + b"\0", "1045 bytes", "1044"),
    ],
)
def test_broken_shard(tmp_path: Path, change, found: str, expected: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(change(shard_bytes(10, 0, tmp_path)))
    message = f"{re.escape(str(path))}: found {found}, expected .*{expected}.*; fetch or make"
    with pytest.raises(shards.DataError, match=message):
        shards.verify_shard(path)


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(shards.DataError, match="no such file"):
        shards.verify_shard(tmp_path / "a.bin")


def test_byte_tokens() -> None:
    assert sorted(shards.BYTE_TO_ID) == list(range(256))
    samples = {33: 0, 126: 93, 161: 94, 172: 105, 174: 106, 255: 187}
    samples |= {0: 188, 32: 220, 127: 221, 160: 254, 173: 255}
    assert {byte: shards.BYTE_TO_ID[byte] for byte in samples} == samples
    tokens = shards.encode_document(shards.get_encoder("bytes"), "A é")
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [50256, 32, 220, shards.BYTE_TO_ID[0xC3], shards.BYTE_TO_ID[0xA9]]


def gpt2():
    """tiktoken's GPT-2 encoding, or a skip where it can't be had."""
    try:
        shards.get_encoder("gpt2", 5)
    except shards.DataError as error:
        pytest.skip(str(error))
    import tiktoken

    return tiktoken.get_encoding("gpt2")


def test_byte_tokens_are_those_of_gpt2() -> None:
    encoding = gpt2()
    for byte in range(256):
        assert encoding.decode_single_token_bytes(int(shards.BYTE_TO_ID[byte])) == bytes([byte])
    assert encoding.eot_token == shards.START_TOKEN


def test_gpt2_takes_special_tokens_as_text() -> None:
    encoding = gpt2()
    tokens = shards.encode_document(shards.get_encoder("gpt2"), "a <|endoftext|> b")
    assert tokens[0] == 50256
    assert 50256 not in tokens[1:]
    assert encoding.decode(tokens[1:].tolist()) == "a <|endoftext|> b"


# ---- The FineWeb download, against a hub on the loopback interface ----


class Hub(ThreadingHTTPServer):
    """Answers what the hub client asks: file versions, redirects to a store, ranges, listings.

    `stop_at` cuts answers off at that byte of the file: for good ("stall") or once ("cut").
    `refusals` are statuses instead of answers, and `pages` pages, by the first part of the path.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.ranges: list[tuple[str, str | None]] = []  # (file, Range header) of every GET
        self.stop_at: int | None = None
        self.stop_kind = "cut"
        self.refusals: dict[str, int] = {}
        self.pages: dict[str, bytes] = {}

    @property
    def env(self) -> dict[str, str]:
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}"}

    def fetched(self) -> list[str]:
        return [name for name, _ in self.ranges]


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, headers: dict[str, object], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        kind = path.split("/")[1]
        if kind in self.server.refusals:
            self.reply(self.server.refusals[kind], {})
        elif kind in self.server.pages:
            self.reply(200, {"Content-Type": "text/html", "ETag": '"1"'}, self.server.pages[kind])
        elif match := re.fullmatch(
            r"/api/datasets/([^/]+/[^/]+)(/tree/main|/revision/main)?", path
        ):
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in self.server.files.items()
            ]
            info = {"id": match[1], "siblings": [], "tags": [], "private": False}
            body = json.dumps(files if match[2] == "/tree/main" else info).encode()
            self.reply(200, {"Content-Type": "application/json"}, body)
        elif match := re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/[^/]+/(.+)", path):
            self.resolve(match[1])
        elif match := re.fullmatch(r"/store/(.+)", path):
            self.store(match[1])
        else:
            self.reply(404, {})

    do_HEAD = do_GET

    def resolve(self, name: str) -> None:
        """The hub's own answer: version and size of a large file, and where it is stored."""
        data = self.server.files.get(name)
        if data is None:
            self.reply(404, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {
            "X-Repo-Commit": "c" * 40,
            "X-Linked-Size": len(data),
            "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
            # Another host, as with the hub: the client takes version and size from here.
            "Location": f"http://localhost:{self.server.server_port}/store/{name}",
        }
        self.reply(302, headers)

    def store(self, name: str) -> None:
        """The store's answer, which may break off."""
        data, first, status, headers = self.server.files[name], 0, 200, {}
        wanted = self.headers.get("Range")
        if self.command == "GET":
            self.server.ranges.append((name, wanted))
        if wanted:
            first, status = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]), 206
            headers = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
        stop = self.server.stop_at
        if stop is None or self.command == "HEAD":
            self.reply(status, headers, data[first:])
            return
        self.reply(status, {**headers, "Content-Length": len(data) - first}, data[first:stop])
        self.wfile.flush()
        if self.server.stop_kind == "cut":
            self.server.stop_at = None
        else:
            while self.server.stop_at is not None:
                time.sleep(0.05)
        self.close_connection = True


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with a validation shard and two training shards."""
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    files = {name: shard_bytes(1000 + i, i, tmp_path) for i, name in enumerate(names)}
    server = Hub(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.stop_at = None
    server.shutdown()
    server.server_close()


def folder_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_fetch_complete_skip_and_repair(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("cached_fineweb.py", "fineweb10B", 2, "--out", out, **hub.env)
    assert (result.returncode, result.stderr) == (0, "")
    assert "3 shards, 3 of them fetched now" in result.stdout
    assert folder_files(out) == hub.files
    assert sorted(hub.fetched()) == sorted(hub.files)

    hub.ranges.clear()
    broken = out / "fineweb_train_000002.bin"
    broken.write_bytes(hub.files[broken.name][:-10])
    result = run("cached_fineweb.py", "fineweb10B", 2, "--out", out, **hub.env)
    assert result.returncode == 0
    assert f"{broken}: found 3018 bytes, expected 3028" in result.stderr
    assert folder_files(out) == hub.files
    assert hub.fetched() == [broken.name]


@pytest.mark.parametrize("kind", ["cut", "stall"])
def test_fetch_resumes(hub: Hub, tmp_path: Path, kind: str) -> None:
    name = "fineweb_val_000000.bin"
    hub.files[name] = shard_bytes(6 * MB, 9, tmp_path)
    hub.stop_at, hub.stop_kind = 11 * MB, kind  # the client writes pieces of 10 MB
    out = tmp_path / "out"
    process = start("cached_fineweb.py", "fineweb10B", 0, "--out", out, **hub.env)
    if kind == "stall":  # interrupt it by hand and start it again
        deadline = time.monotonic() + 30
        # a piece is on disk bit by bit: wait for the whole of it
        while not any(path.stat().st_size >= 10 * MB for path in out.glob(".parts/*")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert "run this again" in process.communicate(timeout=20)[1]
        assert process.returncode == 130
        assert not list(out.glob("*.bin"))
        hub.stop_at = None
        process = start("cached_fineweb.py", "fineweb10B", 0, "--out", out, **hub.env)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert folder_files(out) == {name: hub.files[name]}
    assert hub.fetched() == [name, name]
    first, second = (wanted for _, wanted in hub.ranges)
    assert first is None
    assert int(re.fullmatch(r"bytes=(\d+)-", second)[1]) >= 10 * MB


def test_fetch_starts_over_from_a_broken_part(hub: Hub, tmp_path: Path) -> None:
    out, (name, data) = tmp_path / "out", next(iter(hub.files.items()))
    part = out / ".parts" / f"{name}.{hashlib.sha256(data).hexdigest()}"
    part.parent.mkdir(parents=True)
    part.write_bytes(data + b"more")
    result = run("cached_fineweb.py", "fineweb10B", 0, "--out", out, **hub.env)
    assert (result.returncode, result.stderr) == (0, "")
    assert folder_files(out) == {name: data}

    part.parent.mkdir()
    (out / name).unlink()
    part.write_bytes(b"<html>a page that a run of long ago has left")
    old = part.with_name(f"{name}.{'0' * 64}")
    old.write_bytes(data[:1500])  # of another version
    result = run("cached_fineweb.py", "fineweb10B", 0, "--out", out, **hub.env)
    assert (result.returncode, result.stderr) == (0, "")
    assert folder_files(out) == {name: data}

    part.parent.mkdir()
    (out / name).unlink()
    spoilt = data[:1500] + b"wrong"  # going on from here gives the right length, but not the file
    part.write_bytes(spoilt)
    result = run("cached_fineweb.py", "fineweb10B", 0, "--out", out, **hub.env)
    assert result.returncode == 1
    assert is_one_error_line(result.stderr)
    assert "SHA-256" in result.stderr
    assert list(out.iterdir()) == []


def test_fetch_rejects_a_broken_file(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = hub.files["fineweb_train_000001.bin"]
    hub.files["fineweb_train_000001.bin"] = b"\1" + data[1:]
    result = run("cached_fineweb.py", "fineweb10B", 1, "--out", out, **hub.env)
    assert result.returncode == 1
    assert is_one_error_line(result.stderr)
    assert "magic number" in result.stderr
    assert not (out / "fineweb_train_000001.bin").exists()


@pytest.mark.parametrize(
    ("kind", "status", "remedy"),
    [
        ("datasets", 401, "HF_TOKEN"),
        ("datasets", 503, "run this again later"),
        ("store", 403, "log in by"),
    ],
)
def test_fetch_refused(hub: Hub, tmp_path: Path, kind: str, status: int, remedy: str) -> None:
    hub.refusals[kind] = status
    result = run("cached_fineweb.py", "fineweb10B", 0, "--out", tmp_path / "out", **hub.env)
    assert result.returncode == 1
    assert is_one_error_line(result.stderr)
    assert f"HTTP status {status}; " in result.stderr
    assert remedy in result.stderr
    assert "network" not in result.stderr
    assert not list(tmp_path.rglob("fineweb*"))
    assert not list(tmp_path.rglob(".parts"))


@pytest.mark.parametrize(("kind", "length"), [("datasets", 100), ("store", 100), ("store", 10_000)])
def test_fetch_meets_a_login_page(hub: Hub, tmp_path: Path, kind: str, length: int) -> None:
    out, (name, data) = tmp_path / "out", next(iter(hub.files.items()))
    hub.pages[kind] = b"<!DOCTYPE html>Log in".ljust(length)
    if kind == "store":  # in the middle of a file
        part = out / ".parts" / f"{name}.{hashlib.sha256(data).hexdigest()}"
        part.parent.mkdir(parents=True)
        part.write_bytes(data[:1500])
    result = run("cached_fineweb.py", "fineweb10B", 0, "--out", out, **hub.env)
    assert result.returncode == 1
    assert is_one_error_line(result.stderr)
    assert "a login page" in result.stderr
    assert not list(tmp_path.rglob("fineweb_*"))
    assert not list(tmp_path.rglob(".parts"))
    hub.pages.clear()
    result = run("cached_fineweb.py", "fineweb10B", 0, "--out", out, **hub.env)
    assert (result.returncode, result.stderr) == (0, "")
    assert folder_files(out) == {name: data}


def test_fetch_needs_no_network_for_existing_files(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    names = sorted(hub.files)
    for name in names[::2]:
        (out / name).write_bytes(hub.files[name])
    result = run("cached_fineweb.py", "fineweb10B", 2, "--out", out, **hub.env)
    assert "3 shards, 1 of them fetched now" in result.stdout
    assert folder_files(out) == hub.files
    assert hub.fetched() == [names[1]]

    hub.ranges.clear()
    code = "import sys, cached_fineweb as c; print(c.main(), 'huggingface_hub' in sys.modules)"
    command = [sys.executable, "-c", code, "fineweb10B", "2", "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(DATA), "HF_ENDPOINT": "http://127.0.0.1:9"}
    lines = subprocess.check_output(command, env=env, text=True, timeout=60).splitlines()
    assert lines == [f"{out}: 3 shards, 0 of them fetched now", "0 False"]


def test_fetch_replaces_no_link(hub: Hub, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere.bin"
    out.mkdir()
    link = out / "fineweb_val_000000.bin"
    link.symlink_to(elsewhere)
    for content in (None, b"broken"):
        if content is not None:
            elsewhere.write_bytes(content)
        result = run("cached_fineweb.py", "fineweb10B", 0, "--out", out, **hub.env)
        assert result.returncode == 1
        assert f"error: {link}: is no regular file" in result.stderr
        assert link.is_symlink()
    elsewhere.write_bytes(hub.files[link.name])
    result = run("cached_fineweb.py", "fineweb10B", 0, "--out", out, **hub.env)
    assert "1 shards, 0 of them fetched now" in result.stdout


def test_fetch_needs_room(tmp_path: Path, monkeypatch) -> None:
    remote = cached_fineweb.RemoteFile("a.bin", "http://127.0.0.1:9/a.bin", "0", 10**18)
    monkeypatch.setattr(cached_fineweb, "look_up", lambda repo, name: remote)
    with pytest.raises(OSError, match="1,000,000,000,000.0 MB are to be written"):
        cached_fineweb.download("a/b", ["a.bin"], tmp_path / "in" / "out")
    assert list(tmp_path.iterdir()) == []


def test_fetch_asked_for_too_much(hub: Hub, tmp_path: Path) -> None:
    result = run("cached_fineweb.py", "fineweb10B", 3, "--out", tmp_path / "out", **hub.env)
    assert result.returncode == 1
    assert is_one_error_line(result.stderr)
    assert "has no file fineweb_train_000003.bin; ask for fewer" in result.stderr
    assert hub.ranges == []


def test_fetch_without_network(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{port}"}
    result = run("cached_fineweb.py", "--out", tmp_path / "out", **env)
    assert time.monotonic() - began < 10
    assert result.returncode == 1
    assert is_one_error_line(result.stderr)
    assert "check the network" in result.stderr
    assert not list(tmp_path.rglob("*.bin*"))


@pytest.mark.parametrize(
    "args",
    [
        ["fineweb"],
        ["fineweb10B", "-1"],
        ["fineweb10B", "some"],
        ["fineweb10B", "1000000"],
        ["--out", ""],
    ],
)
def test_fetch_bad_arguments(args: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cached_fineweb.main(args)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert is_one_error_line(error)
    assert args[-1] in error


# ---- Text to shards ----

TEXTS = [f"document {i}: " + "äbc\n" * (i % 7) for i in range(200)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts))
    return path


def tokenize(out: Path, *args: object, **env: str) -> subprocess.CompletedProcess:
    return run("tokenize_text.py", *args, "--tokenizer", "bytes", "--out", out, **env)


def test_tokenize_order_split_and_borders(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "books"
    result = tokenize(out, source, "--shard-tokens", 1000, "--val-every", 10)
    assert result.returncode == 0, result.stderr
    train, val = sorted(out.glob("books_train_*")), sorted(out.glob("books_val_*"))
    assert sorted(out.iterdir()) == train + val
    assert [path.name for path in val] == ["books_val_000000.bin"]
    assert [path.name for path in train] == [
        f"books_train_{i:06d}.bin" for i in range(1, len(train) + 1)
    ]
    assert len(train) > 2
    assert {shards.verify_shard(path) for path in train[:-1]} == {1000}
    assert read_documents(*val) == TEXTS[::10]
    assert read_documents(*train) == [text for i, text in enumerate(TEXTS) if i % 10]
    assert "200 documents" in result.stdout

    again = tokenize(out, source)
    assert again.returncode == 2
    assert is_one_error_line(again.stderr)
    assert "already has shards" in again.stderr


def test_tokenize_folder_of_all_kinds(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"plain\r\ntext")
    (folder / "b.md").write_text("# Title")
    write_jsonl(folder / "c.jsonl", ["one", "", "two"], "body")
    (folder / "picture.png").write_bytes(b"\0")
    table = pa.table({"n": range(3000), "body": [f"row {i}" for i in range(3000)]})
    pq.write_table(table, folder / "sub" / "d.parquet", row_group_size=700)
    out = tmp_path / "out"
    args = ["--field", "body", "--prefix", "mix", "--val-every", 0]
    result = tokenize(out, folder, *args)
    assert result.returncode == 0, result.stderr
    assert "leaving out 1 files" in result.stderr
    rows = [f"row {i}" for i in range(3000)]
    expected = ["plain\r\ntext", "# Title", "one", "", "two", *rows]
    assert read_documents(out / "mix_train_000001.bin") == expected
    assert len(list(out.iterdir())) == 1


def test_tokenize_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.files.clear()
    for name in ("data/b", "data/a", "other/c"):
        path = write_jsonl(tmp_path / "file.jsonl", [f"{name} {i}" for i in range(3)])
        hub.files[f"{name}.jsonl"] = path.read_bytes()
    hub.files["README.md"] = b"not data"
    pq.write_table(pa.table({"text": ["row"]}), tmp_path / "d.parquet")
    hub.files["data/d.parquet"] = (tmp_path / "d.parquet").read_bytes()
    hub.files["data/c.jsonl"] = b"\n"
    hub.files["data/b.jsonl"] += b"no json\n"
    out = tmp_path / "out"
    env = {**hub.env, "HF_HOME": str(tmp_path / "home")}
    args = ["user/set", "--match", "data/*", "--val-every", 0]
    result = tokenize(out, *args, "--skip_bad", **env)
    assert result.returncode == 0, result.stderr
    assert "left out 1 bad rows, the first: user/set: data/b.jsonl, line 4: is no" in result.stderr
    assert "left out 1 empty files" in result.stderr
    expected = [f"data/{name} {i}" for name in "ab" for i in range(3)] + ["row"]
    assert read_documents(out / "out_train_000001.bin") == expected
    names = ["data/a.jsonl", "data/b.jsonl", "data/c.jsonl", "data/d.parquet"]
    assert hub.fetched() == names

    result = tokenize(tmp_path / "no", "user/set", "--match", "x*", **env)
    assert result.returncode == 2
    assert "none of its 5 .parquet and .jsonl files fits --match 'x*'" in result.stderr

    for kind, status in (("api", 401), ("store", 403)):
        hub.refusals = {kind: status}
        result = tokenize(tmp_path / "no", *args, **env)
        assert result.returncode == 2
        assert result.stderr.count("error: ") == 1
        assert f"HTTP status {status}; " in result.stderr
        assert "check the network" not in result.stderr
        assert not (tmp_path / "no").exists()


def test_tokenize_gpt2(tmp_path: Path) -> None:
    encoding = gpt2()
    source, out = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    result = run("tokenize_text.py", source, "--out", out, "--val-every", 0)
    assert result.returncode == 0, result.stderr
    text = encoding.decode(read_tokens(out / "out_train_000001.bin").tolist())
    assert text.split("<|endoftext|>")[1:] == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "no such file or folder"),
        ("gone", None, "no such file or folder"),
        ("a.pdf", b"x", "unknown ending, expected one of .txt"),
        ("a.txt", b"", "has no documents"),
        ("a.jsonl", b"\n", "has no documents"),
        ("a.txt", b"\xff", "is no valid UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: is no valid UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: is no valid Unicode"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: is no JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"line 2: no field 'text' \(found body\)"),
        ("a.jsonl", b"[1]\n", r"line 1: no field 'text' \(found list\)"),
        ("a.jsonl", b'{"text": null}\n', "line 1: 'text' is NoneType"),
        ("a.jsonl", b'{"text": "only one"}\n', "the input is a single document"),
        ("a.parquet", b"PAR1", "can't be read as parquet"),
        ("a.parquet", {"body": ["a"]}, r"no column 'text' \(found body\)"),
        ("a.parquet", {"text": ["a", None]}, "row 2: 'text' is NoneType"),
        ("a.parquet", {"text": [1]}, "row 1: 'text' is int"),
        ("a.parquet", {"text": []}, "has no documents"),
    ],
)
def test_tokenize_bad_input(tmp_path: Path, capsys, name: str, content, message: str) -> None:
    path, out = tmp_path / name, tmp_path / "out"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        pq.write_table(pa.table(content), path)
    args = [str(path), "--out", str(out), "--tokenizer", "bytes", "--workers", "1"]
    assert tokenize_text.main(args) == 2
    error = capsys.readouterr().err
    assert is_one_error_line(error)
    assert "single" in message or str(path) in error
    assert re.search(message, error)
    assert not out.exists() or not list(out.iterdir())


def test_tokenize_bad_utf8_in_parquet(tmp_path: Path, capsys) -> None:
    path = tmp_path / "a.parquet"
    column = pa.array([b"fine", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), path)
    args = [str(path), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert tokenize_text.main(args) == 2
    assert "row 2: is no valid UTF-8" in capsys.readouterr().err


def test_tokenize_names_a_file_twice(tmp_path: Path, capsys) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert tokenize_text.main([str(path), str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "given 2 times" in capsys.readouterr().err


def test_tokenize_failing_late_leaves_nothing(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", ["x" * 100_000] * 60), tmp_path / "out"
    with open(source, "a") as file:
        file.write("no json\n")
    result = tokenize(out, source, "--shard-tokens", 100_000)
    assert result.returncode == 2
    assert is_one_error_line(result.stderr)
    assert "line 61" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("option", [["--val-every", "1"], ["--shard-tokens", "0"], ["--workers=0"]])
def test_tokenize_bad_arguments(tmp_path: Path, capsys, option: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        tokenize_text.main([str(tmp_path), "--out", str(tmp_path / "out"), *option])
    assert exit_info.value.code == 2
    assert "expected" in capsys.readouterr().err


def test_few_documents_are_read_ahead_of_writing() -> None:
    num_read = 0

    def documents() -> Iterator[tokenize_text.Document]:
        nonlocal num_read
        for _ in range(200):
            num_read += 1
            yield tokenize_text.Document("x" * 100_000, 0.0)

    num_written = 0
    for batch, _ in tokenize_text.encode_in_order(documents(), "bytes", 1):
        # Two batches of ten documents under way, and the one in hand.
        assert num_read - num_written <= 30
        num_written += len(batch)
    assert num_written == 200


# Linux's own mark: getrusage's would start from that of the process that runs the tests.
PEAK = """
import re, sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
import tokenize_text
code = tokenize_text.main()
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1], file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_tokenize_memory_does_not_grow(tmp_path: Path, ending: str) -> None:
    peaks = []
    for num_documents in (4000, 16000):  # 16 and 64 MB of text
        source, out = tmp_path / f"{num_documents}.{ending}", tmp_path / str(num_documents)
        texts = (f"{i} " + "x" * 4000 for i in range(num_documents))
        if ending == "jsonl":
            with open(source, "w") as file:
                file.writelines(f'{{"text": "{text}"}}\n' for text in texts)
        else:
            table = pa.table({"text": list(texts)})
            pq.write_table(table, source, row_group_size=500, compression="none")
        command = [sys.executable, "-c", PEAK, str(DATA), str(source), "--out", str(out)]
        command += ["--tokenizer", "bytes", "--workers", "1"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(result.stderr.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 20, f"MB at the peak: {peaks}"


# ---- The sample ----


@pytest.fixture(scope="module")
def sample_folders(tmp_path_factory) -> list[Path]:
    """The byte-token sample, made twice."""
    folders = [tmp_path_factory.mktemp("sample") for _ in range(2)]
    processes = [
        start("sample.py", folder, "--tokenizer", "bytes", PYTHONHASHSEED=str(seed))
        for seed, folder in enumerate(folders)
    ]
    for process, folder in zip(processes, folders, strict=True):
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        assert re.fullmatch(
            rf"{folder}: \d+ documents, [\d,]+ train and [\d,]+ val tokens, tokenizer bytes\n", out
        )
    return folders


def test_sample_is_deterministic(sample_folders: list[Path]) -> None:
    first, second = map(folder_files, sample_folders)
    assert sorted(first) == ["sample_train_000001.bin", "sample_val_000000.bin"]
    assert first == second


def test_sample_content(sample_folders: list[Path]) -> None:
    train_path, val_path = sorted(sample_folders[0].iterdir())
    train, val = read_tokens(train_path), read_tokens(val_path)
    assert len(train) > 500_000
    assert 0.05 < len(val) / (len(train) + len(val)) < 0.10
    assert max(train.max(), val.max()) == shards.START_TOKEN
    train_texts, val_texts = read_documents(train_path), read_documents(val_path)
    assert len(val_texts) > 10
    assert not set(train_texts) & set(val_texts)
    assert any("PYTHON SOFTWARE FOUNDATION LICENSE" in text for text in train_texts + val_texts)


def test_sample_without_the_vocabulary(tmp_path: Path) -> None:
    """By default it is of bytes, with and without a network, and so the small model's losses are
    those of bytes everywhere."""
    # A proxy that nobody serves: tiktoken finds no network, whatever the machine has.
    env = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "none"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    explicit = start("sample.py", tmp_path / "a", "--tokenizer", "gpt2", **env)
    default = start("sample.py", tmp_path / "b", **env)
    out, err = explicit.communicate(timeout=60)
    assert (explicit.returncode, out) == (1, "")
    assert is_one_error_line(err)
    assert "--tokenizer bytes" in err
    assert not (tmp_path / "a").exists()
    out, err = default.communicate(timeout=60)
    assert (default.returncode, err) == (0, "")
    assert out.endswith("tokenizer bytes\n")
    small = read_tokens(tmp_path / "b" / "sample_train_000001.bin")
    assert {*np.unique(small)} <= {*shards.BYTE_TO_ID.tolist(), shards.START_TOKEN}
