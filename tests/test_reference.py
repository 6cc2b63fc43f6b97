"""The baseline in records/reference: it runs, computes what the records computed, moves fp8 tiles
as fp16, and its README and docstring say what is in it."""

import ast
import importlib.util
import operator
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conftest import ROOT
from test_run_sh import Copy

RECORDS = ROOT / "records"
FOLDER = RECORDS / "reference"
SCRIPT, README = FOLDER / "train_gpt.py", (FOLDER / "README.md").read_text(encoding="utf-8")
AS_IT_RAN = RECORDS / "2026-11-28_three_runs_two_gpus_reference" / "train_gpt.py"
TABLE = "gpt2_prefix_tokens.npy"
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tiles on the CPU")


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return load(SCRIPT, "reference_script")


@pytest.fixture(scope="module")
def as_it_ran(tmp_path_factory) -> ModuleType:
    """The record's script, its ops under another name so that one process can have both."""
    text = AS_IT_RAN.read_text(encoding="utf-8")
    text, count = re.subn(r'"speedrun(?=::|", "FRAGMENT")', '"as_it_ran', text)
    assert count == 4
    path = tmp_path_factory.mktemp("as_it_ran") / "train_gpt.py"
    path.write_text(text, encoding="utf-8")
    return load(path, "script_as_it_ran")


# What it computes ---------------------------------------------------------------------------------


def write_shard(module: ModuleType, path: Path, num_tokens: int, seed: int) -> None:
    """Documents of about 20 tokens of every kind, so that many have prefix tokens."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, module.START_TOKEN, num_tokens).astype(np.uint16)
    tokens[random.random(num_tokens) < 0.05] = module.START_TOKEN
    tokens[0] = module.START_TOKEN
    header = np.zeros(module.SHARD_HEADER_INTS, dtype=np.int32)
    header[:3] = module.SHARD_MAGIC, module.SHARD_VERSION, num_tokens
    path.write_bytes(header.tobytes() + tokens.tobytes())


def losses(module: ModuleType, folder: Path, **changes: object) -> tuple[list[float], list[float]]:
    """Of every step, and of the validations, of a short run of the tiny preset, half as wide."""
    if not (folder / "train.bin").exists():
        write_shard(module, folder / "train.bin", 3000, 0)
        write_shard(module, folder / "val.bin", 500, 1)
    stages = (module.Stage(1 / 2, 128, 32, 8, 16, 1.0, 0.5, 0.3, 0.2, 0.1, 0.25, 0.2, 0),)
    stages += (module.Stage(1 / 2, 128, 64, 16, 32, 1.2, 0.2, 0.0, 0.1, 0.0, 0.1, 0.0, 0),)
    config = module.dataclasses.replace(
        module.PRESETS["tiny"],
        train_files=str(folder / "train.bin"),
        val_file=str(folder / "val.bin"),
        model_dim=32,
        head_dim=8,
        mlp_dim=64,
        val_tokens=128,
        val_row_tokens=64,
        num_steps=4,
        stages=stages,
        extension_steps=1,
        extension=(module.Stage(1.0, 128, 64, 24, 48, 1.2, *6 * (0.0,), 0),),
        final_window_long=64,
        momentum_warmup_steps=2,
        momentum_cooldown_steps=1,
        val_every=2,
        **changes,
    )
    log = module.Log(str(folder), module.__name__)
    module.train(config, module.Runtime(0, 1, torch.device("cpu"), log))
    return tuple([row[key] for row in log.data[f"{name}s"]] for name, key in (
        ("step", "train_loss"), ("validation", "val_loss"),
    ))  # fmt: skip


def test_losses_are_those_of_the_records_to_the_bit(
    reference, as_it_ran, tmp_path, monkeypatch
) -> None:
    """With every loss term, both halves of the embedding's life, and all windows."""
    for module in (reference, as_it_ran):
        monkeypatch.setattr(module, "draw_curve", lambda log: None)  # a second each
    monkeypatch.chdir(ROOT)  # where the record's script finds its table, by the link in data/
    found, expected = losses(reference, tmp_path), losses(as_it_ran, tmp_path)
    assert len(found[0]) == 5 and len(found[1]) == 3
    assert found == expected
    assert len(set(found[0])) == 5
    assert all(0 < loss < 40 for loss in (*found[0], *found[1]))


# fp8 ----------------------------------------------------------------------------------------------


transposed = None  # the script's


@triton.jit
def _transpose_kernel(x, out):
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    tl.store(out + row * 16 + column, transposed(tl.load(x + row * 16 + column)))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_numbers_survive_a_transpose(reference, monkeypatch, dtype) -> None:
    """All that fp8 has: the tile goes through fp16 and comes back the same."""
    monkeypatch.setattr(sys.modules[__name__], "transposed", reference._transposed)
    bits = torch.arange(256).to(torch.uint8).view(16, 16)
    bits[~torch.isfinite(bits.view(dtype).float())] = 0
    numbers, out = bits.view(dtype), torch.full_like(bits, 255).view(dtype)
    _transpose_kernel[(1,)](numbers, out)
    assert_same(out, numbers.mT)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To the bit, but for the six subnormal numbers of e5m2, of which the interpreter's casts from
    fp32 lose a bit."""
    numbers = expected.float().abs()
    lost = (numbers < 2**-14) & (numbers > 0) & (expected.dtype == torch.float8_e5m2)
    bits, expected_bits = (x.contiguous().view(torch.uint8) for x in (found, expected))
    assert torch.equal(bits[~lost], expected_bits[~lost])
    assert ((found.float() - expected.float()).abs()[lost] <= 2**-15).all()


def assert_transposed(out_t: torch.Tensor, out: torch.Tensor, exact: torch.Tensor) -> None:
    """The numbers themselves are torch's but for a few, as the interpreter rounds."""
    assert_same(out_t, out.mT)
    assert len(out.view(torch.uint8).unique()) > 20
    expected = exact.to(out.dtype).view(torch.uint8)
    assert (out.view(torch.uint8) == expected).float().mean() > 0.9


@interpreted
def test_quantize_writes_both_layouts_alike(reference) -> None:
    """No tile is full."""
    torch.manual_seed(0)
    x, unit = 30 * torch.randn(3, 70, 150), torch.tensor([[0.1], [0.2], [1.0]]).repeat(1, 4)
    largest = torch.zeros(1)
    for dtype in (reference.E4M3, reference.E5M2):
        out, out_t = reference.quantize(x, unit, dtype, largest)
        limit = torch.finfo(dtype).max
        assert_transposed(out_t, out, (x / unit[:, :1, None]).clamp(-limit, limit))
    assert largest == x.abs().max()


@interpreted
def test_gradient_of_logits_in_both_layouts(reference) -> None:
    """Of the softcapped cross-entropy, but for the targets' own part; against autograd."""
    torch.manual_seed(0)
    rows, vocab, weights = 70, 150, torch.tensor([1.0, 0.5])
    logits = 5 * torch.randn(rows, vocab, requires_grad=True)
    targets = torch.randint(0, vocab, (rows, 2))
    targets[-3:, 1] = reference.IGNORED_TARGET
    lse = reference.softcap(logits).logsumexp(1)
    scale = ((targets >= 0) * weights).sum(1)
    (exact,) = torch.autograd.grad(lse @ scale, logits)
    grad, grad_t = (torch.zeros(s, dtype=reference.E5M2) for s in ((rows, vocab), (vocab, rows)))
    unit = torch.tensor([2.0**-14])
    reference._logits_gradient_kernel[(1, 3)](
        logits.detach(), None, lse.detach(), targets, weights, unit, grad, grad_t, rows, vocab,
        rows, TERMS=2, APPROXIMATE=False, TRANSPOSED=True, ROWS=128, COLUMNS=64,
    )  # fmt: skip
    assert_transposed(grad_t, grad, exact / unit)


@interpreted
@pytest.mark.parametrize("backward", [False, True])
def test_mlp_matmul_in_both_layouts(reference, backward) -> None:
    """relu(a bᵀ)² and its gradient, of whole numbers, which every order of summation gives
    alike."""
    torch.manual_seed(0)
    a, b = (torch.randint(-2, 3, (size, 128)).to(reference.E4M3) for size in (64, 80))
    product, units = a.float() @ b.float().mT, [torch.full((4,), u) for u in (1.0, 1.0, 4.0, 8.0)]
    square = torch.randint(0, 9, (64, 80)).to(reference.E4M3) if backward else None
    exact = product * 2 * (4 * square.float()).sqrt() if backward else product.relu().square()
    largest = torch.zeros(1) if backward else None
    out, out_t, largest = reference.mlp_product(a, b, units, square, largest)
    assert_transposed(out_t, out, (exact / 8).clamp(-448, 448))
    torch.testing.assert_close(largest.max(), exact.abs().max())


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_no_fp8_tile_is_transposed_as_bytes() -> None:
    """Kernels transpose masks, fp8 tiles by _transposed, and bf16 ones; `.T` is for factors."""
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    kernels = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    kernels = [k for k in kernels if "triton.jit" in map(ast.unparse, k.decorator_list)]
    assert len(kernels) > 20
    directly, safely = {}, set()
    for kernel in kernels:
        for call in calls(kernel):
            name = ast.unparse(call.func)
            if name in ("tl.trans", "tl.permute"):
                directly.setdefault(kernel.name, set()).add(ast.unparse(call.args[0]))
            if name == "_transposed":
                safely.add(kernel.name)
            if name.split(".")[-1] == "store":  # of a tile or by a descriptor
                assert not any(ast.unparse(argument).endswith(".T") for argument in call.args)
    assert directly == {
        "_transposed": {"tile", "tile.to(tl.float16)"},
        "_quantize_kernel": {"inside"},
        "_logits_gradient_kernel": {"inside"},
        "_symmetric_kernel": {"total", "mask"},  # Muon's, in bf16
    }
    assert safely == {"_quantize_kernel", "_mlp_product_kernel", "_logits_gradient_kernel"}


# What it finds on a machine -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interface", "backend"),
    [
        (None, "varlen"),
        ("", "flash-attn-4"),
        ("import library_that_is_missing", "varlen"),
        ("raise OSError('libcuda.so.1: cannot open shared object file')", "varlen"),
    ],
)
def test_attention_without_flash_attn(reference, tmp_path, monkeypatch, interface, backend) -> None:
    """Not installed, installed, and installed without what it needs."""
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    if interface is None:
        monkeypatch.setitem(sys.modules, "flash_attn", None)  # what an import then fails with
    else:
        (package := tmp_path / "flash_attn" / "cute").mkdir(parents=True)
        (package / "interface.py").write_text(interface)
        for folder in (package, package.parent):
            (folder / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
    device = torch.device("cuda")
    for capability, expected in (((9, 0), backend), ((8, 0), "varlen")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert reference.attention_backend(device, torch.bfloat16) == expected
    assert reference.attention_backend(device, torch.float32) == "plain"
    assert reference.attention_backend(torch.device("cpu"), torch.bfloat16) == "plain"
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)


def test_table_of_prefix_tokens_beside_the_script(reference, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # wherever it is started
    config, device = reference.PRESETS["tiny"], torch.device("cpu")
    prefixes = reference.read_prefixes(config, device)
    table = np.load(FOLDER / TABLE)
    assert prefixes[: len(table)].tolist() == table.tolist()
    assert prefixes[len(table) :].tolist() == [-1] * (config.padded_vocab_size - len(table))
    mine = reference.dataclasses.replace(config, prefix_file="mine.npy")
    with pytest.raises(reference.UserError, match="--prefix_file mine.npy: cannot be read") as info:
        reference.read_prefixes(mine, device)
    assert (ROOT / info.value.args[0].rsplit(maxsplit=1)[1]).is_file()  # what makes it


def test_table_where_copies_of_scripts_look_for_it(reference, tmp_path, monkeypatch) -> None:
    """record, reproduce and compare run a copy of a script next to a link to data/."""
    shutil.copy(SCRIPT, tmp_path / "train_gpt.py")
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reference, "__file__", str(tmp_path / "train_gpt.py"))
    assert reference.prefix_table() == f"data/{TABLE}"
    assert os.path.samefile(reference.prefix_table(), FOLDER / TABLE)
    scripts = [path.read_text(encoding="utf-8") for path in RECORDS.glob("2*/train_gpt.py")]
    readers = [text for text in scripts if "prefix_file: str = " in text]
    assert len(readers) > 5
    found = f'prefix_file: str = "data/{TABLE}"', 'prefix_file: str = ""'  # the latter as above
    assert all(any(default in text for default in found) for text in readers)


@pytest.mark.parametrize(
    ("gpus", "arguments", "prepared"),
    [
        (0, "", "sample.py"),
        (0, "--preset tiny --num_steps 3", "sample.py"),
        (1, "", "cached_fineweb.py"),
        (1, "--train_files mine.bin", None),
    ],
)
def test_run_sh_reference(tmp_path, gpus, arguments, prepared) -> None:
    copy = Copy(tmp_path)
    calls, out, err = copy.run("reference", *arguments.split(), GPUS=str(gpus))
    assert [call[-1].split("/")[-1] for call in calls[:-1]] == ([prepared] if prepared else [])
    assert calls[-1][-1] == f"{copy.root}/records/reference/train_gpt.py {arguments}".strip()
    assert ("training the small preset" in out) == (gpus == 0 and not arguments)
    assert err == ""


# What is said of it -------------------------------------------------------------------------------


def parts(path: Path) -> dict[str, str]:
    """Functions, classes, constants, and fields and methods of classes, by name."""
    found, text = {}, path.read_text(encoding="utf-8")
    lines = text.split("\n")

    def read(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            name = getattr(node, "name", None) or getattr(targets[0], "id", None)
            if isinstance(node, ast.ClassDef):
                read(node.body, f"{prefix}{name}.")
            elif name:
                found[prefix + name] = "\n".join(lines[node.lineno - 1 : node.end_lineno])

    read(ast.parse(text).body, "")
    return found


def test_docstring_names_all_that_was_changed(reference) -> None:
    text = reference.__doc__
    records = re.findall(r"\d{4}-\d\d-\d\d_\w+", text)
    assert len(records) == 5
    assert {(RECORDS / name / "train_gpt.py").read_bytes() for name in records} == {
        AS_IT_RAN.read_bytes()
    }
    before, after = parts(AS_IT_RAN), parts(SCRIPT)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    said = text[text.index("Changed since") : text.index("Sections:")]
    assert changed == set(re.findall(r"[\w.]*\w", said)) & (before.keys() | after.keys())


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)[1]


def test_readme_names_the_code_of_each_technique(reference) -> None:
    rows = re.findall(r"^\| (.+) \| (.+) \|$", section("Techniques"), re.MULTILINE)[2:]
    assert len(rows) >= 20
    for technique, where in rows:
        names = re.findall(r"`([\w.]+)`", where)
        assert names, technique
        for name in names:
            assert operator.attrgetter(name)(reference) is not None


def test_readme_gives_figures_of_the_records() -> None:
    rows = re.findall(r"^\| \[(2\S+)\]\((\S+)\) \|(.*)\|$", section("Measured"), re.MULTILINE)
    assert {name for name, *_ in rows} == set(
        re.findall(r"\d{4}-\d\d-\d\d_\w+", ast.get_docstring(ast.parse(SCRIPT.read_text())))
    )
    for name, link, figures in rows:
        assert Path(link).name == name
        text = (FOLDER / link / "README.md").read_text(encoding="utf-8")
        theirs = dict(re.findall(r"^\| ([a-z ]+) \| (.*) \|$", text, re.MULTILINE))
        machine, runs, *times_and_losses = (figure.strip() for figure in figures.split("|"))
        assert theirs["machine"].startswith(machine)
        assert theirs["runs"].split(",")[0] == runs
        wanted = [theirs[key].split(" (")[0] for key in ("time", "validation loss")]
        assert times_and_losses == wanted


def test_links_and_commands_of_the_readme() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (FOLDER / link).exists(), link
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    commands = re.findall(r"\./run\.sh (\S+)", "".join(blocks))
    assert {"reference", "compare"} <= set(commands)
