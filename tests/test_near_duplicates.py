"""Tests of data/near_duplicates.py: counts compared with a set of tuples, the new shard."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, START_TOKEN, random_documents, write_shard
from test_data_tools import is_one_error_line, read_tokens

sys.path.insert(0, str(ROOT / "data"))

import near_duplicates

import train_gpt

RUN = 4  # of most tests


def tool(tmp_path: Path, *options: object, **files: object) -> int:
    """The exit code with the shards train*.bin and val.bin of the folder."""
    files = {"train_files": tmp_path / "train*.bin", "val_file": tmp_path / "val.bin", **files}
    given = [f"--{name}={value}" for name, value in files.items()]
    return near_duplicates.main([*given, *map(str, options)])


def error_line(capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr, an error."""
    text = capsys.readouterr().err
    assert is_one_error_line(text)
    return text


def split(tokens: np.ndarray) -> list[np.ndarray]:
    """The documents, each from its start token on."""
    starts = np.flatnonzero(tokens == START_TOKEN)
    return np.split(tokens, starts[starts > 0])


def runs_of(document: np.ndarray, run: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Each run of a document and its position."""
    tokens = document.tolist()
    for i in range(len(tokens) - run + 1):
        if START_TOKEN not in tokens[i : i + run]:
            yield i, tuple(tokens[i : i + run])


def reference(train: np.ndarray, val: np.ndarray, run: int) -> tuple[list[int], list[int]]:
    """By a set of tuples: positions of all runs that occur, and for each document how many of these
    do not overlap."""
    known = {tokens for document in split(train) for _, tokens in runs_of(document, run)}
    hits, counts, first = [], [], 0
    for document in split(val):
        count = behind = 0
        for i, tokens in runs_of(document, run):
            if tokens in known:
                hits.append(first + i)
                if i >= behind:
                    count, behind = count + 1, i + run
        counts.append(count)
        first += len(document)
    return hits, counts


def planted(seed: int, num_ids: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation tokens; pieces of 1 to 60 tokens of the first are in the second."""
    random = np.random.default_rng(seed)
    train = random_documents(seed, random.integers(1, 90, 60).tolist(), num_ids)
    val = random_documents(seed + 1, random.integers(1, 120, 50).tolist(), num_ids)
    for length in random.integers(1, 60, 40):
        source = random.integers(0, len(train) - length)
        place = random.integers(0, len(val) - length)
        val[place : place + length] = train[source : source + length]
    val[0] = START_TOKEN
    return train, val


def found(train: list[np.ndarray], val: np.ndarray, run: int) -> tuple[list[int], list[int]]:
    """What the tool finds, like `reference`; train: parts of the training tokens."""
    hits = near_duplicates.find_hits(val, train, run)
    begins = np.union1d([0], np.flatnonzero(val == START_TOKEN))
    ends = np.append(begins[1:], len(val))
    return hits.tolist(), near_duplicates.count_runs(hits, begins, ends, run, len(val)).tolist()


# ---- Counts ----


@pytest.mark.parametrize("run", [1, 2, 5, 16])
@pytest.mark.parametrize("num_ids", [6, 3000])
def test_counts_are_those_of_a_set_of_tuples(run: int, num_ids: int) -> None:
    for seed in range(4):
        train, val = planted(10 * seed, num_ids)
        hits, counts = reference(train, val, run)
        assert hits and max(counts) > 1 and len(hits) < len(val)
        assert found([train], val, run) == (hits, counts)


@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_runs_across_the_borders_of_chunks_and_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    train, val = planted(1)
    monkeypatch.setattr(near_duplicates, "CHUNK_TOKENS", chunk)
    # The documents run on from shard to shard, some of which are shorter than a run.
    parts = np.split(train, [3, 4, 5, 200, 202, 203, 204, 1000])
    sizes = [len(part) for part in parts]
    paths = [write_shard(tmp_path / f"{i}.bin", part) for i, part in enumerate(parts)]
    for run in (1, 2, 7):
        with near_duplicates.tqdm(total=len(train), file=io.StringIO()) as bar:
            stream = list(near_duplicates.read_stream(paths, sizes, run - 1, bar))
            assert max(map(len, stream)) == chunk + run - 1
            assert found(stream, val, run) == reference(train, val, run)
            assert bar.n == len(train)


def test_no_run_crosses_the_border_of_a_document() -> None:
    whole = np.array([START_TOKEN, *range(1, 9)], np.uint16)
    halves = np.array([START_TOKEN, 1, 2, 3, 4, START_TOKEN, 5, 6, 7, 8], np.uint16)
    assert found([halves], whole, 4) == ([1, 5], [2])  # not 2 3 4 5
    assert found([whole], halves, 4) == ([1, 6], [1, 1])
    assert found([halves], halves, 3) == ([1, 2, 6, 7], [1, 1])  # none with the start token


def test_hits_that_overlap_count_once() -> None:
    begins, ends = np.array([0, 20, 30]), np.array([20, 30, 41])
    hits = np.array([1, 2, 3, 5, 8, 9, 31, 36])
    counts = [near_duplicates.count_runs(hits, begins, ends, 4, most) for most in (1, 2, 9)]
    assert np.array(counts).tolist() == [[1, 0, 1], [2, 0, 2], [3, 0, 2]]
    none = near_duplicates.count_runs(hits[:0], begins, ends, 4, 2)
    assert none.tolist() == [0, 0, 0]


def test_hash_is_the_polynomial() -> None:
    tokens = np.array([7, 65535, 0, 7], np.uint16)
    begins, hashes = near_duplicates.hash_runs(tokens, 3)
    h, m = near_duplicates.TOKEN_HASHES.tolist(), int(near_duplicates.MULTIPLIER)
    expected = [
        (h[a] * m * m + h[b] * m + h[c]) % 2**64 for a, b, c in ((7, 65535, 0), (65535, 0, 7))
    ]
    assert begins.tolist() == [0, 1] and hashes.tolist() == expected
    assert hashes.dtype == np.uint64 and len(set(h)) == 1 << 16


# ---- The tool ----


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = np.arange(1, 101)
    documents = [text[:40], text[47:51], np.arange(200, 220), text[60:72], text[90:97]]
    val = np.concatenate([[START_TOKEN, *document] for document in documents])
    write_shard(tmp_path / "train_1.bin", [START_TOKEN, *text[:50]])
    write_shard(tmp_path / "train_2.bin", text[50:])
    write_shard(tmp_path / "val.bin", val)
    assert tool(tmp_path, "--run", RUN, "--runs", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/val.bin, compared with 101 tokens of 2 training shards"
    assert [" ".join(line.split()) for line in lines[1:-1]] == [
        "runs of 4 that occur documents share tokens share",
        "0 or more 5 100.00% 88 100.00%",
        "1 or more 4 80.00% 67 76.14%",
        "2 or more 2 40.00% 54 61.36%",
        "3 or more, near-duplicates 2 40.00% 54 61.36%",
        "4 or more 1 20.00% 41 46.59%",
        "8 or more 1 20.00% 41 46.59%",
    ]
    assert lines[-1] == "positions that end a run that occurs, overlaps counted: 51 of 88, 57.95%"
    assert len({len(line) for line in lines[1:-1]}) == 1


def test_first_tokens_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train, val = planted(2)
    write_shard(tmp_path / "train.bin", train)
    write_shard(tmp_path / "val.bin", val)
    cut = int(np.flatnonzero(val == START_TOKEN)[20]) - 3  # inside a document
    assert tool(tmp_path, "--run", RUN, "--val_tokens", cut, f"--out={tmp_path}/new.bin") == 0
    first = capsys.readouterr().out
    hits, counts = reference(train, val[:cut], RUN)
    assert f"overlaps counted: {len(hits):,} of {cut:,}, {len(hits) / cut:.2%}" in first
    kept = [d for d, count in zip(split(val[:cut]), counts, strict=True) if count < 2]
    np.testing.assert_array_equal(read_tokens(tmp_path / "new.bin"), np.concatenate(kept))

    write_shard(tmp_path / "val.bin", val[:cut])
    assert tool(tmp_path, "--run", RUN) == 0
    assert capsys.readouterr().out.splitlines() == first.splitlines()[:-1]


@pytest.mark.parametrize("runs", [1, 2, 9])
@pytest.mark.parametrize("headless", [False, True])
def test_new_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture, runs: int, headless: bool
) -> None:
    train, val = planted(3)
    if headless:  # it begins inside a document, which is none of training
        val = np.concatenate([np.arange(4000, 4020), val])
    write_shard(tmp_path / "train.bin", train)
    write_shard(tmp_path / "val.bin", val)
    out = tmp_path / "made" / "new.bin"
    assert tool(tmp_path, "--run", RUN, "--runs", runs, "--out", out) == 0
    _, counts = reference(train, val, RUN)
    documents = split(val)
    kept = [d for d, count in zip(documents, counts, strict=True) if count < runs]
    assert 0 < len(kept) < len(documents)
    new = read_tokens(out)
    np.testing.assert_array_equal(new, np.concatenate(kept))
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{out}: {len(kept)} documents, {len(new):,} tokens; {len(documents) - len(kept)} "
        f"near-duplicates, {len(val) - len(new):,} tokens, left out"
    )
    assert list(out.parent.iterdir()) == [out]
    tokens, starts = train_gpt.load_shard(str(out), START_TOKEN + 1)
    np.testing.assert_array_equal(tokens, new)
    assert len(starts) == sum(document[0] == START_TOKEN for document in kept)

    # The new shard has none.
    assert tool(tmp_path, "--run", RUN, "--runs", runs, val_file=out) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "near-duplicates" in x)
    assert line.split()[-4:] == ["0", "0.00%", "0", "0.00%"]


def test_every_document_is_a_near_duplicate(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokens = random_documents(0, [40, 50])
    write_shard(tmp_path / "train.bin", tokens)
    write_shard(tmp_path / "val.bin", tokens)
    out = tmp_path / "made" / "new.bin"
    assert tool(tmp_path, "--out", out) == 2
    expected = (
        f"val.bin: all of its 2 documents are near-duplicates, so {out} would be empty; raise"
    )
    assert expected in error_line(capsys)
    assert not out.parent.exists()
    assert tool(tmp_path, "--runs", 3, "--out", out) == 0  # 39 tokens hold two runs of 16, 49 three
    np.testing.assert_array_equal(read_tokens(out), tokens[:40])


def test_what_is_there_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = planted(4)
    write_shard(tmp_path / "train.bin", train)
    write_shard(tmp_path / "val.bin", val)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "link.bin").symlink_to("nowhere")
    for name in ("train.bin", "val.bin", "link.bin", "."):
        assert tool(tmp_path, "--out", tmp_path / name) == 2
        assert "is there already; move it away, or choose another" in error_line(capsys)

    def meanwhile(*args: object) -> np.ndarray:  # another program makes the file
        (tmp_path / "new.bin").write_text("mine")
        return counted(*args)

    counted = near_duplicates.count_runs
    monkeypatch.setattr(near_duplicates, "count_runs", meanwhile)
    assert tool(tmp_path, "--run", RUN, "--out", tmp_path / "new.bin") == 2
    assert "new.bin: is there already" in error_line(capsys)
    assert (tmp_path / "new.bin").read_text() == "mine"
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(tmp_path.iterdir())) == len(before) + 2  # nothing unfinished


def test_out_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = planted(5)
    write_shard(tmp_path / "train.bin", train)
    write_shard(tmp_path / "val.bin", val)
    monkeypatch.setattr(near_duplicates, "find_hits", None)  # it is found before the work
    assert tool(tmp_path, "--out", tmp_path / "val.bin" / "new.bin") == 1
    assert "val.bin: cannot be written (" in error_line(capsys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("val.bin", None, "val.bin: found no such file, expected a shard; fetch or make it first"),
        ("train_2.bin", b"", "train_2.bin: found 0 bytes, expected a header of 1024 bytes"),
        ("train_2.bin", b"text" * 300, "train_2.bin: found magic number 1954047348, expected"),
        ("val.bin", b"text" * 300, "val.bin: found magic number 1954047348, expected"),
        ("train_2.bin", -1, "train_2.bin: found 1163 bytes, expected 1164 for the header's 70 tok"),
        ("val.bin", -2, "val.bin: found 1162 bytes, expected 1164 for the header's 70 tokens"),
        ("val.bin", [], "val.bin: no document begins in its first 0 tokens (start token 50256)"),
        ("val.bin", [1, 2, 3], "val.bin: no document begins in its first 3 tokens (start token"),
    ],
)
def test_bad_files(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str, content: object, message: str
) -> None:
    tokens = random_documents(0, [30, 40])
    for good in ("train_1.bin", "train_2.bin", "val.bin"):
        write_shard(tmp_path / good, tokens)
    path = tmp_path / name
    if content is None:
        path.unlink()
    elif isinstance(content, int):  # torn
        path.write_bytes(path.read_bytes()[:content])
    elif isinstance(content, list):
        write_shard(path, content)
    else:
        path.write_bytes(content)
    assert tool(tmp_path, "--out", tmp_path / "made" / "new.bin") == 2
    assert message in error_line(capsys)
    assert not (tmp_path / "made").exists()


def test_bad_choices(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_shard(tmp_path / "train.bin", random_documents(0, [30, 40]))
    write_shard(tmp_path / "val.bin", random_documents(1, [20, 17, 1]))
    write_shard(tmp_path / "empty.bin", [])
    empty = {"train_files": tmp_path / "empty.bin"}
    for options, files, message in (
        ([], {"train_files": tmp_path / "gone*.bin"}, "gone*.bin: no such file; fetch or make"),
        ([], empty, "empty.bin: no tokens; choose other shards"),
        ([], {"train_files": tmp_path / "*.bin"}, "val.bin, the validation shard, is among them"),
        (["--val_tokens", 39], {}, "--val_tokens 39: more than the 38 tokens of"),
        (["--out", tmp_path / "train_2.bin"], {}, "train*.bin has this name too"),
        (["--run", 20], {}, "--run 20: every validation document is shorter; lower it"),
        (["--run", 17, "--val_tokens", 17], {}, "--run 17: every validation document is shorter"),
    ):
        assert tool(tmp_path, *options, **files) == 2
        assert message in error_line(capsys)
    assert tool(tmp_path, "--run", 19) == 0  # the longest has just one
    assert "overlaps counted: 0 of 38, 0.00%" in capsys.readouterr().out

    for option, message in (
        ("--run=0", "--run 0: expected 1 to 1024"),
        ("--run=1025", "--run 1025: expected 1 to 1024"),
        ("--runs=0", "--runs 0: expected at least 1"),
        ("--val_tokens=0", "--val_tokens 0: expected at least 1"),
        ("--out=", "an empty name: expected a file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            tool(tmp_path, option)
        assert message in error_line(capsys)


def test_names_with_brackets(tmp_path: Path) -> None:
    folder = tmp_path / "my [1]"
    folder.mkdir()
    for name in ("b_2.bin", "b_1.bin", "c[1].bin"):
        (folder / name).write_bytes(b"")
    expected = [folder / "b_1.bin", folder / "b_2.bin"]
    assert near_duplicates.find_shards(f"{folder}/b_?.bin") == expected
    assert near_duplicates.find_shards(f"{folder}/c[1].bin") == [folder / "c[1].bin"]


def test_as_a_program(tmp_path: Path) -> None:
    train, val = planted(6)
    write_shard(tmp_path / "train.bin", train)
    write_shard(tmp_path / "val.bin", val)
    script = ROOT / "data" / "near_duplicates.py"
    command = [sys.executable, script, "--train_files", "train*.bin", "--val_file", "val.bin"]
    command += ["--out", "new.bin"]
    results = [
        subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        for _ in range(2)
    ]
    assert [result.returncode for result in results] == [0, 2]
    assert results[0].stderr == "" and results[0].stdout.count("\n") == 9
    expected = "error: new.bin: is there already; move it away, or choose another --out\n"
    assert results[1].stderr == expected and results[1].stdout == ""
    assert sorted(os.listdir(tmp_path)) == ["new.bin", "train.bin", "val.bin"]
