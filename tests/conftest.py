"""What the tests share: a small config, shards and rows of random documents, one CPU process."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train_gpt import START_TOKEN, Batch, Config, Layer, Log, Runtime, Stage


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def cpu_runtime(rank: int = 0, world_size: int = 1) -> Runtime:
    """A process that computes on the CPU and logs nothing; no process group is needed to make it."""
    return Runtime(rank, world_size, torch.device("cpu"), Log(None))


@pytest.fixture
def runtime() -> Runtime:
    return cpu_runtime()


def tiny_config(**changes: object) -> Config:
    """Three layers, two value tables, both windows, rows of 64 tokens."""
    fields = {
        "val_tokens": 200,
        "min_mean_doc_len": 4,
        "layers": (Layer("short", 0), Layer("long", None), Layer("short", 1)),
        "model_dim": 32,
        "head_dim": 8,
        "mlp_dim": 64,
        "dtype": "float32",
        "num_steps": 8,
        "stages": (Stage(1.0, 256, 48, 8, 24, 1.0),),
        "extension_steps": 2,
        "extension": (Stage(1.0, 256, 64, 12, 32, 1.0),),
        "final_window_long": 64,
        "rows_per_step": 4,
        "momentum_warmup_steps": 4,
        "momentum_cooldown_steps": 2,
        "val_row_tokens": 64,
        "compile": "none",
    }
    return Config(**{**fields, **changes})


def write_shard(path: Path, tokens: np.ndarray | list[int]) -> Path:
    """256 int32 (magic, version, number of tokens, zeros), then the tokens as uint16."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def random_documents(seed: int, lengths: list[int], num_ids: int = START_TOKEN) -> np.ndarray:
    """Documents of these lengths behind one another: the start token, then random ids below num_ids."""
    tokens = np.random.default_rng(seed).integers(0, num_ids, sum(lengths))
    tokens[np.cumsum([0, *lengths[:-1]])] = START_TOKEN
    return tokens


def random_batch(
    seed: int, lengths: list[int], padding: int = 2, num_ids: int = START_TOKEN
) -> Batch:
    """A row of documents of these lengths; its cu_seqlens ends in `padding` more entries of T."""
    num_tokens = sum(lengths)
    tokens = torch.from_numpy(random_documents(seed, [*lengths, 1], num_ids))
    cu_seqlens = np.cumsum([0, *lengths, *([0] * padding)])
    return Batch(
        tokens[:-1].int(),
        tokens[1:].long(),
        torch.tensor(cu_seqlens, dtype=torch.int32),
        num_tokens,
    )
