"""Section 7: the loader against a walk over the documents in plain Python."""

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cpu_runtime, random_documents, tiny_config, write_shard

from train_gpt import (
    IGNORED_TARGET,
    PRESETS,
    START_TOKEN,
    Batch,
    TokenStream,
    UserError,
    check_data,
    find_files,
    find_val_file,
    make_batch,
    parse_args,
    prefetch,
    read_shard_header,
    read_tokens,
    sort_rows,
    training_batches,
    validation_batches,
)

Row = tuple[list[int], list[int]]  # its T + 1 tokens, and where documents start in it


def reference_rows(tokens: list[int], shapes: list[tuple[int, int]]) -> Iterator[Row]:
    """Every sequence of the stream: documents cut at max_seq_len, the last one at its end."""
    documents: list[list[int]] = []
    for token in tokens:
        if token == START_TOKEN:
            documents.append([])
        if documents:  # what stands before the first start token belongs to no document
            documents[-1].append(token)
    unread = iter(documents)
    for num_tokens, max_seq_len in shapes:
        row, starts = [], []
        while len(row) < num_tokens + 1:
            document = next(unread, None)
            if document is None:
                return
            starts.append(len(row))
            row += document[: min(max_seq_len, num_tokens + 1 - len(row))]
        yield row, starts


def row_of(batch: Batch) -> list[int]:
    """The sequence's T + 1 tokens, after checking that inputs and targets are the same, one
    apart."""
    tokens, targets = batch.tokens.tolist(), batch.targets.tolist()
    assert tokens[1:] == targets[:-1]
    return [*tokens, targets[-1]]


def starts_of(batch: Batch) -> list[int]:
    """Document starts, after checking that cu_seqlens is padded with T."""
    ends = batch.cu_seqlens.tolist()
    num_tokens = len(batch.tokens)
    starts = [end for end in ends if end < num_tokens]
    assert len(starts) < len(ends), "no closing T"
    assert ends == starts + [num_tokens] * (len(ends) - len(starts))
    assert starts == sorted(set(starts))
    return starts


def skewed_lengths(seed: int, total: int) -> list[int]:
    """Document lengths from 1 to a few hundred, `total` tokens or a little more."""
    random, lengths = np.random.default_rng(seed), []
    while sum(lengths) < total:
        lengths.append(int(1 + min(300, random.exponential(25))))
    return lengths


def write_shards(folder: Path, tokens: np.ndarray, borders: list[int]) -> str:
    """Cut the stream in shards; returns the glob pattern for them."""
    for index, part in enumerate(np.split(tokens, borders)):
        write_shard(folder / f"train_{index:02}.bin", part)
    return str(folder / "train_*.bin")


# Rows --------------------------------------------------------------------------------------------

# T and max_seq_len of successive rounds of the ranks; they grow on the way as they do in training
SHAPES = [(64, 48)] * 8 + [(128, 48)] * 8 + [(96, 1000)] * 8


def split(batch: Batch) -> list[Batch]:
    """Its sequences, without the padding of cu_seqlens."""
    length = len(batch.tokens) // batch.sequences
    parts = zip(batch.tokens.split(length), batch.targets.split(length))
    starts, rows = np.array(starts_of(batch)), []
    for i, part in enumerate(parts):
        own = starts[starts // length == i] - i * length
        rows.append(Batch(*part, torch.tensor([*own, length]), batch.max_seq_len))
    return rows


@pytest.mark.parametrize("tokens_per_pass", [1, 128, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("borders", [[], [700, 5400, 5450, 9600]])
def test_sequences_of_all_ranks_cover_the_documents_once(
    tmp_path, world_size, borders, tokens_per_pass
):
    tokens = random_documents(1, skewed_lengths(1, 20_000), num_ids=1000)
    pattern = write_shards(tmp_path, tokens, borders)
    config = tiny_config(train_files=pattern, min_mean_doc_len=2, tokens_per_pass=tokens_per_pass)
    expected = list(reference_rows(tokens.tolist(), [shape for shape in SHAPES for _ in range(4)]))
    assert len(expected) == 4 * len(SHAPES)
    ranks = [
        list(training_batches(config, cpu_runtime(rank, world_size), SHAPES))
        for rank in range(world_size)
    ]
    passes = [together for step in zip(*ranks, strict=True) for together in zip(*step, strict=True)]
    for batch in itertools.chain(*passes):
        length, own = len(batch.tokens) // batch.sequences, 4 // world_size
        most = max(1, tokens_per_pass // length)
        assert batch.sequences == max(n for n in (1, 2, 4) if n <= min(own, most))
        assert len(batch.cu_seqlens) == len(batch.tokens) // 2 + 2
        assert [str(t.dtype) for t in batch[:3]] == ["torch.int32", "torch.int64", "torch.int32"]
    rows = [row for together in passes for batch in together for row in split(batch)]
    assert len(rows) == len(expected)
    for batch, (row, starts), shape in zip(
        rows, expected, np.repeat(SHAPES, 4, axis=0), strict=True
    ):
        num_tokens, max_seq_len = shape.tolist()
        assert (len(batch.tokens), batch.max_seq_len) == (num_tokens, max_seq_len)
        assert row_of(batch) == row
        assert row[0] == START_TOKEN
        assert starts_of(batch) == [start for start in starts if start < num_tokens]
        assert np.diff(batch.cu_seqlens.numpy()).max() <= max_seq_len


def test_documents_across_shard_borders_are_whole(tmp_path):
    """Borders within documents, right before and right after a start token; three shards."""
    lengths = [20, 31, 17, 40, 25, 30, 22, 19]
    tokens = random_documents(2, lengths, num_ids=1000)
    edges = np.cumsum([0, *lengths])
    borders = [
        int(edges[1]) + 30,  # the second shard begins with the last token of document 1
        int(edges[3]) + 1,  # document 3's start token is the last of its shard
        int(edges[5]),  # a border between documents
        int(edges[6]) + 11,
    ]
    pattern = write_shards(tmp_path, tokens, borders)
    assert read_tokens(f"{tmp_path}/train_01.bin", 1, 50257)[0] != START_TOKEN
    stream = TokenStream(find_files("--train_files", pattern), 50257, repeat=False)
    for length, document in zip(lengths[:-1], np.split(tokens, edges[1:-1])):
        (only,) = stream.next_sequence(length - 1, 1000)
        assert only.tolist() == document.tolist()


def test_tokens_before_the_first_document_are_left_out(tmp_path):
    tokens = np.concatenate([[5, 6, 7], random_documents(3, [40, 40], num_ids=1000)])
    pattern = write_shards(tmp_path, tokens, [])
    stream = TokenStream(find_files("--train_files", pattern), 50257, repeat=False)
    assert np.concatenate(stream.next_sequence(63, 64)).tolist() == tokens[3:67].tolist()


def test_last_sequence_ends_with_the_data(tmp_path):
    """The last token of the data is the last target; one token less is too little."""
    tokens = random_documents(4, [30, 20, 15], num_ids=1000)
    for missing in (0, 1):
        pattern = write_shards(tmp_path, tokens[: len(tokens) - missing], [45])
        config = tiny_config(train_files=pattern, sequences_per_step=1)
        rows = training_batches(config, cpu_runtime(), [(64, 64)])
        if missing:
            with pytest.raises(UserError, match="--train_files.*ran out.*--repeat_data"):
                next(rows)
        else:
            assert [row_of(row) for row in next(rows)] == [tokens.tolist()]


def test_end_of_data_and_repetition(tmp_path):
    tokens = random_documents(5, skewed_lengths(5, 900), num_ids=1000)
    pattern = write_shards(tmp_path, tokens, [301, 640])
    shapes = [(48, 40)] * 60
    once = list(reference_rows(tokens.tolist(), shapes))
    assert 5 < len(once) < 60
    config = tiny_config(train_files=pattern, sequences_per_step=1)
    rows = training_batches(config, cpu_runtime(), shapes)
    for row, _ in once:
        assert [row_of(batch) for batch in next(rows)] == [row]
    with pytest.raises(UserError, match="--train_files.*ran out.*--repeat_data"):
        next(rows)

    config = tiny_config(train_files=pattern, repeat_data=True, sequences_per_step=1)
    endless = list(reference_rows(tokens.tolist() * 10, shapes))
    assert len(endless) == 60
    rows = itertools.chain(*training_batches(config, cpu_runtime(), shapes))
    assert [row_of(batch) for batch in rows] == [row for row, _ in endless]


def test_check_data_counts_before_training(tmp_path):
    tokens = random_documents(6, [50] * 20, num_ids=1000)
    pattern = write_shards(tmp_path, tokens, [333])
    val_file = write_shard(tmp_path / "val.bin", tokens[:101])
    config = tiny_config(train_files=pattern, val_file=str(val_file))
    assert check_data(config, [(99, 64)] * 10) == 100  # fewer than the 200 of val_tokens
    with pytest.raises(UserError, match="--train_files.*1000 tokens.*1000"):
        check_data(config, [(100, 64)] * 10)
    endless = tiny_config(**{**vars(config), "repeat_data": True})
    assert check_data(endless, [(10**9, 64)]) == 100
    # enough tokens, but a row leaves unread what is behind its end and max_seq_len: three documents
    with pytest.raises(UserError, match="--train_files.*ran out after 6 sequences"):
        check_data(config, [(110, 64)] * 9)
    with pytest.raises(UserError, match="--train_files.*ran out after 6 sequences"):
        check_data(config, [(99, 40)] * 9)
    matching = tiny_config(**{**vars(endless), "match_orders": (3,)})  # takes no text twice
    with pytest.raises(UserError, match="--train_files.*ran out after 6 sequences"):
        check_data(matching, [(110, 64)] * 9)
    assert check_data(endless, [(110, 64)] * 9) == 100
    assert check_data(config, [(110, 64)] * 6) == check_data(config, [(99, 40)] * 6) == 100
    write_shard(val_file, tokens[:1])
    with pytest.raises(UserError, match=r"val\.bin.*too short"):
        check_data(config, [(99, 64)])


def test_check_data_reads_what_training_will_read(tmp_path):
    """Ids of the validation targets, of the shards that the schedule comes to, also when it repeats
    them, and of those that matches hold; what is behind them may be anything."""
    good = random_documents(6, [50] * 20, num_ids=1000)
    pattern = write_shards(tmp_path, np.concatenate([good, good, good]), [1000, 2000])
    val_file, last = tmp_path / "val.bin", tmp_path / "train_02.bin"
    write_shard(val_file, [*good[:201], 60_000])
    files = {"train_files": pattern, "val_file": str(val_file), "sequences_per_step": 1}
    config = tiny_config(**files)
    few, many, endless = ([(49, 64)] * count for count in (12, 58, 100))
    assert check_data(config, many) == 200
    write_shard(val_file, [*good[:200], 60_000])
    with pytest.raises(UserError, match=r"val\.bin: token 60000 at position 200"):
        check_data(config, few)
    write_shard(val_file, good)
    for tokens, message in (
        ([*good[:-1], 60_000], "token 60000 at position 999"),
        ([5] * 1000, "no document begins in it"),
    ):
        write_shard(last, tokens)
        message = rf"train_02\.bin: {message}"
        assert check_data(config, few) == 200
        with pytest.raises(UserError, match=message):
            check_data(config, many)
        with pytest.raises(UserError, match=message):
            check_data(tiny_config(**files, repeat_data=True), endless)
        with pytest.raises(UserError, match=message):
            check_data(tiny_config(**files, match_orders=(3,), match_shards=1), few)


def test_own_data_goes_with_own_data(capsys):
    """Each is given alone for the folder of the other's default, and both for any two folders."""
    for preset, config in PRESETS.items():
        folder = Path(config.val_file).parent
        for name, other in (("train_files", "val_file"), ("val_file", "train_files")):
            with pytest.raises(SystemExit) as end:
                parse_args(["--preset", preset, f"--{name}", "own.bin"], to_train=True)
            assert end.value.code == 2
            found = (
                f"error: --{name} own.bin is given without --{other}, whose default is elsewhere"
            )
            assert f"{found}: give both" in capsys.readouterr().err
            for own in (folder / "own.bin", folder.resolve() / "own.bin"):
                given = parse_args(["--preset", preset, f"--{name}", str(own)], to_train=True)
                assert given == dataclasses.replace(config, **{name: str(own)})
            both = ["--preset", preset, "--train_files", "own.bin", "--val_file", "own/val.bin"]
            assert parse_args(both, to_train=True).val_file == "own/val.bin"
            with_default = [f"--{other}={getattr(config, other)}", f"--{name}=own.bin"]
            given = parse_args(["--preset", preset, *with_default], to_train=True)
            assert getattr(given, name) == "own.bin"


def test_cu_seqlens_grow_beyond_the_expected_documents():
    """T // min_mean_doc_len + 1 documents leave cu_seqlens as long as it is, one more does not."""
    tokens = np.arange(65, dtype=np.uint16)
    for count in (1, 9, 10):
        batch = make_batch([(tokens, np.arange(count))], 64, min_mean_doc_len=8, pin=False)
        assert starts_of(batch) == list(range(count))
        assert batch.cu_seqlens[count:].tolist() == [64] * (max(10, count + 1) - count)
    # a start token that is only the last target starts no document of the row
    row = tokens, np.array([0, 64])
    batch = make_batch([row, row], 64, min_mean_doc_len=8, pin=False)
    assert starts_of(batch) == [0, 64]
    assert len(batch.tokens) == len(batch.targets) == 128 and len(batch.cu_seqlens) == 18


# Validation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_targets", [64, 320, 321, 383, 399])
def test_validation_scores_every_target_once(tmp_path, world_size, num_targets):
    lengths = [10, 60, 5, 49, 4, 130, 62, 1, 79]  # a row begins with a document, one ends with one
    tokens = random_documents(7, lengths, num_ids=1000)
    assert len(tokens) == 400
    path = write_shard(tmp_path / "val.bin", tokens)
    config = tiny_config(val_file=str(path))
    ranks = [
        list(validation_batches(config, cpu_runtime(rank, world_size), num_targets))
        for rank in range(world_size)
    ]
    num_rows = -(-num_targets // 64)
    assert [*map(len, ranks)] == [-(-num_rows // world_size)] * world_size
    rows = [batch for together in zip(*ranks) for batch in together]
    assert all((batch.targets == IGNORED_TARGET).all() for batch in rows[num_rows:])
    rows = rows[:num_rows]
    inputs, targets = [], []
    for index, batch in enumerate(rows):
        assert len(batch.tokens) == len(batch.targets) == 64
        scored = min(64, num_targets - 64 * index)
        assert batch.targets[scored:].tolist() == [IGNORED_TARGET] * (64 - scored)
        assert (batch.targets[:scored] >= 0).all()
        inputs += batch.tokens[:scored].tolist()
        targets += batch.targets[:scored].tolist()
        # masked apart: documents are those of the stream, cut by the row's start
        own = batch.tokens[:scored].tolist()
        expected = sorted({0, *[i for i in range(scored) if own[i] == START_TOKEN]})
        assert [start for start in starts_of(batch) if start < scored] == expected
        assert batch.max_seq_len >= np.diff(batch.cu_seqlens.numpy()).max()
    assert inputs == tokens[:num_targets].tolist()
    assert targets == tokens[1 : num_targets + 1].tolist()


# Broken files ------------------------------------------------------------------------------------


def test_file_format_is_the_documented_one(tmp_path):
    path = write_shard(tmp_path / "a.bin", [START_TOKEN, 1, 65535 - 40000])
    assert read_shard_header(str(path)) == 3
    assert read_tokens(str(path), 3, 50257).tolist() == [START_TOKEN, 1, 25535]
    assert read_tokens(str(path), 2, 50257).tolist() == [START_TOKEN, 1]


def with_header(position: int, value: int) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 10
    header[position] = value
    return header.tobytes() + bytes(20)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "0 bytes, shorter than a shard's header"),
        (b"x" * 1000, "1000 bytes, shorter"),
        (with_header(0, 20240519), "magic 20240519, expected 20240520"),
        (with_header(0, 0), "magic 0"),
        (b"\x89PNG and some other file" * 100, "not a token shard"),
        (with_header(1, 2), "version 2, expected 1"),
        (with_header(2, 11), "1044 bytes, expected 1046"),
        (with_header(2, 9), "1044 bytes, expected 1042"),
        (with_header(2, -1), "1044 bytes, expected"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_broken_header(tmp_path, content, message):
    path = tmp_path / "broken.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_shard_header(str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert any(remedy in str(error.value) for remedy in ("cached_fineweb.py", "--train_files"))


def test_tokens_outside_the_vocabulary(tmp_path):
    path = write_shard(tmp_path / "big.bin", [START_TOKEN, 5, 50257, 7])
    assert read_tokens(str(path), 2, 50257).tolist() == [START_TOKEN, 5]
    with pytest.raises(UserError, match=r"big\.bin: token 50257 at position 2.*tokenize_text"):
        read_tokens(str(path), 4, 50257)


def test_broken_shard_after_a_good_one_is_named(tmp_path):
    """Shards load in a thread; what it raises is raised again where the sequences are read."""
    good = write_shard(tmp_path / "train_0.bin", random_documents(8, [40] * 5, 1000))
    for tokens, message in (
        ([5] * 100, r"train_1\.bin: no document begins in it.*50256.*tokenize_text"),
        ([START_TOKEN, 60_000], r"train_1\.bin: token 60000"),
    ):
        bad = write_shard(tmp_path / "train_1.bin", tokens)
        stream = TokenStream([str(good), str(bad)], 50257, repeat=False)
        with pytest.raises(UserError, match=message):
            for _ in range(10):
                stream.next_sequence(39, 64)


def test_missing_files_name_the_option(tmp_path):
    with pytest.raises(UserError, match=r"--val_file .*none_\*\.bin: no such file.*sample\.py"):
        find_files("--val_file", str(tmp_path / "none_*.bin"))


def test_validation_file_is_one(tmp_path):
    """A pattern that two files match is refused, in place of scoring the first."""
    for name in ("val_0.bin", "val_1.bin"):
        write_shard(tmp_path / name, [START_TOKEN, 5])
    assert find_val_file(tiny_config(val_file=f"{tmp_path}/*_1.bin")) == f"{tmp_path}/val_1.bin"
    found = r"--val_file .*val_\*\.bin: 2 files have such a name: give"
    with pytest.raises(UserError, match=found):
        find_val_file(tiny_config(val_file=f"{tmp_path}/val_*.bin"))


def test_files_come_in_the_order_of_their_names(tmp_path):
    for name in ("b", "c", "a"):
        write_shard(tmp_path / f"{name}.bin", [START_TOKEN])
    files = find_files("--train_files", str(tmp_path / "*.bin"))
    assert [Path(path).stem for path in files] == ["a", "b", "c"]


def test_existing_names_are_not_patterns(tmp_path):
    """Neither a file nor the folders in front of a pattern; a pattern may be of folders too."""
    for name in ("run [v1]/a_0.bin", "run [v1]/a_1.bin", "run [v1]/a_[01].bin", "run v/a_0.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_shard(tmp_path / name, [START_TOKEN])

    def found(pattern: str) -> list[str]:
        files = find_files("--train_files", f"{tmp_path}/{pattern}")
        return [str(Path(path).relative_to(tmp_path)) for path in files]

    assert found("run [v1]/a_0.bin") == ["run [v1]/a_0.bin"]
    assert found("run [v1]/a_[01].bin") == ["run [v1]/a_[01].bin"]
    assert found("run [v1]/a_?.bin") == ["run [v1]/a_0.bin", "run [v1]/a_1.bin"]
    assert found("run [uv]/a_*.bin") == ["run v/a_0.bin"]
    assert found("run*/a_0.bin") == ["run [v1]/a_0.bin", "run v/a_0.bin"]


def test_paths_are_as_they_were_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a [1]").mkdir()
    write_shard(Path("a [1]/0.bin"), [START_TOKEN])
    assert find_files("--train_files", "a [1]/*.bin") == ["a [1]/0.bin"]
    for pattern in ("", "."):  # a folder is none of shards
        with pytest.raises(UserError, match="cannot be read .*--train_files"):
            read_shard_header(find_files("--train_files", pattern)[0])


# Ahead -------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)


def test_items_come_in_order_and_a_few_are_prefetched():
    made = []

    def count() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    items = prefetch(count(), depth=3)
    wait_until(lambda: len(made) == 3)  # before any is asked for
    assert next(items) == 0
    wait_until(lambda: len(made) == 4)
    time.sleep(0.1)
    assert len(made) == 4
    assert list(items) == list(range(1, 100))


def test_an_error_comes_after_the_items_before_it():
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise UserError("the third is bad")

    items = prefetch(broken(), depth=8)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(UserError, match="the third is bad"):
        next(items)


@pytest.mark.parametrize("taken", [0, 5])
def test_the_thread_ends_with_its_items(taken):
    before = set(threading.enumerate())
    items = prefetch(itertools.count(), depth=2)
    for _ in range(taken):
        next(items)
    (thread,) = set(threading.enumerate()) - before
    assert thread.is_alive()
    del items
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_examples_of_the_docstrings(tmp_path):
    """Of TokenStream, make_batch and SortedRows."""
    s, (a, b, c, d, e, f, g, h, i) = START_TOKEN, range(1, 10)
    path = write_shard(tmp_path / "train.bin", [s, a, b, s, c, d, e, s, f, g, h, s, i])
    stream = TokenStream([str(path)], 50_257, repeat=False)
    found = [[x.tolist() for x in stream.next_sequence(4, 3)] for _ in range(2)]
    assert found == [[[s, a, b], [s, c]], [[s, f, g], [s, i]]]

    tokens = np.arange(5, dtype=np.uint16)
    sequences = [(tokens, np.array([0, 3])), (tokens, np.array([0, 1]))]
    batch = make_batch(sequences, 4, min_mean_doc_len=2, pin=False)
    assert batch.tokens.tolist() == [0, 1, 2, 3] * 2
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 5, 8, 8]

    rows = sort_rows(torch.tensor([7, 2, 7, 9, 7]))
    assert [x.tolist() for x in rows] == [
        [2, 7, 7, 7, 9], [1, 0, 2, 4, 3], [0, 1, 4, 5, 5, 5], [0, 1, 1, 1, 2], [3],
    ]  # fmt: skip
