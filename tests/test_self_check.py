"""The check of kernels before training: it passes them as they are, and names one that is wrong."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, cpu_runtime, tiny_config

from train_gpt import UserError

GPU = torch.cuda.is_available()
NAMES = ["fp8 copies", "QKV", "MLP", "head and loss", "sums of streams", "rows of tables"]
NAMES += ["updates of n-grams"]

# What is planted, in the source: the kernels' names in messages, the line, and what takes its place.
PLANTED = {
    "transposed copies zeroed": ("fp8 copies", "_transposed(values), mask=tl.trans(inside)", "0.0 * {}"),
}


def load(path: Path, text: str) -> ModuleType:
    """train_gpt.py with another text; Triton reads the source of kernels from the file."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
