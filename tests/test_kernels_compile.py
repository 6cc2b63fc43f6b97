"""Every kernel that training launches, compiled for an H100, which need not be there. The
interpreter that runs kernels in the other tests takes some that Triton's compiler refuses.

TRITON_INTERPRET is read at import, so a process of its own does it, which is this file run as a
script. It prepares trainers as train() does, at the real sizes, on tensors that have a shape and no
memory. What a launch would compile is recorded, and nothing is launched. What was recorded is then
compiled, down to the machine code."""

import ast
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
MAX_SHARED = 227 * 1024  # bytes that a program may have on an H100
NOT_CONSTANT = "an argument"  # in place of a constant's value

PLANTED = "_add_rows_kernel"
# A line of its helper _add_run, and the same in a way that the interpreter takes and the compiler
# does not: a variable changes its type in a loop.
ONE_TYPE = "        at += ROWS\n"
TWO_TYPES = "        at = (at + ROWS).to(tl.int32)\n"

# --- The script -----------------------------------------------------------------------------------


class NoGpu:
    """Stands for Triton's driver: an H100 that compiles and cannot launch."""

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    sys.modules["train_gpt"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record_launches(module: ModuleType) -> list[dict]:
    """What the launches of a run compile, each variant of a kernel once: its name, the value of
    every parameter that is a constant, and what Triton's preload takes.

    The runs are the speedrun, the n-gram lookup with the canonical mask, one without fp8, and the
    medium preset, with a sequence a micro-batch. Each has its first stage, the first one the
    extension too: the stages between them differ only in sizes that are multiples of 16, for which
    Triton compiles nothing anew.
    """
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    launches: dict[tuple[str, str], dict] = {}

    def record(*, fn: object, compile: dict, **_: object) -> bool:
        kernel, data = fn.jit_function, compile["specialization_data"]
        constants = dict.fromkeys(kernel.arg_names, NOT_CONSTANT)
        for (place, *inner), value in compile["constants"].items():
            if not inner:  # no part of a tuple
                constants[kernel.arg_names[place]] = value
        launch = {"kernel": fn.name, "constants": constants, "data": data}
        launches.setdefault((fn.name, data), launch)
        return True  # neither compile nor launch

    triton.knobs.runtime.jit_cache_hook = record
    # These tensors begin at multiples of 16 bytes, as torch's allocator places them, and say that
    # they are on a GPU; in truth they are on the CPU, for autograd takes no other without a GPU.
    FakeTensor.data_ptr = lambda x: x.storage_offset() * x.element_size()
    torch.Tensor.is_cuda = property(lambda x: True)
    torch.compile = lambda function, **options: function
    module.has_kernels = lambda device: True
    module.attention = lambda q, k, v, *options: q + k + v  # the kernels of a library
    module.Trainer.compile_side_by_side = lambda trainer, report: None  # threads and a GPU

    speedrun, matching, medium = (
        module.PRESETS[name] for name in ("speedrun", "matching", "medium")
    )
    configs = (
        speedrun,
        dataclasses.replace(matching, canonical_mask=True, extension_steps=0),
        dataclasses.replace(speedrun, fp8=False, extension_steps=0),
        dataclasses.replace(medium, extension_steps=0),
    )
    runtime = module.Runtime(0, 1, torch.device("cpu"), module.Log(None))
    # The lengths of a few results depend on numbers, which are not there: they have symbols.
    with FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True):
        for config in configs:
            # to choose among averages losses would have to be numbers; it launches nothing else
            stages = (dataclasses.replace(config.stages[0], share=1.0),)
            short = {"stages": stages, "tokens_per_pass": 1, "average_shares": ()}
            config = dataclasses.replace(config, **short)
            module.Trainer(module.GPT(config, runtime), runtime).prepare()
    triton.knobs.runtime.jit_cache_hook = None
    return list(launches.values())


def with_causes(error: BaseException | None) -> Iterator[str]:
    """An error and what it was raised from: the place in the kernel, then that in a helper."""
    while error is not None:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__


def compile_launch(module: ModuleType, launch: dict) -> dict:
    """The launch, with the error of its compilation or, of its machine code, what it uses."""
    try:
        compiled = getattr(module, launch["kernel"]).preload(launch["data"])
    except Exception as error:  # noqa: BLE001 (whatever a compiler raises)
        return {**launch, "error": "\n".join(with_causes(error))}
    (cubin,) = (path for name, path in compiled.metadata_group.items() if name.endswith(".cubin"))
    tool = triton.knobs.nvidia.cuobjdump.path
    command = [tool, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(rf"Function {launch['kernel']}:\s+REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    registers, stack, local = map(int, found.groups())
    return {
        **launch,
        "error": None,
        "warps": compiled.metadata.num_warps,
        "registers": registers,  # of a thread
        "spilled": stack + local,  # bytes a thread
        "shared": compiled.metadata.shared,  # bytes a program
        "has_matmul": "tt.dot " in compiled.asm["ttir"],
        "tensor_cores": sorted({*re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"])}),
        "other_matmuls": compiled.asm["ttgir"].count("tt.dot "),
    }


def main(planted: str, output: str) -> None:
    """Record the launches of the script and compile them, two at a time; then those of PLANTED once
    more, from a script with what the compiler refuses."""
    triton.runtime.driver.set_active(NoGpu())
    module = load(ROOT / "train_gpt.py")
    launches = record_launches(module)
    with ThreadPoolExecutor(2) as pool:
        compiled = [*pool.map(lambda launch: compile_launch(module, launch), launches)]
    module, again = load(Path(planted)), [x for x in launches if x["kernel"] == PLANTED]
    results = {"variants": compiled, "planted": [compile_launch(module, x) for x in again]}
    for launch in itertools.chain(*results.values()):
        del launch["data"]
    Path(output).write_text(json.dumps(results), encoding="utf-8")


# --- The tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    try:
        _ = triton.knobs.nvidia.ptxas.path, triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        pytest.skip(f"this Triton compiles nothing for NVIDIA GPUs: {error}")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """What main() finds out; all that it leaves on the disk is in the folder."""
    folder = tmp_path_factory.mktemp("triton")
    assert SOURCE.count(ONE_TYPE) == 1
    text = SOURCE.replace(ONE_TYPE, TWO_TYPES)
    (planted := folder / "planted.py").write_text(text, encoding="utf-8")
    places = {name: str(folder) for name in ("TRITON_HOME", "TRITON_CACHE_DIR")}
    others = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(planted), str(folder / "kernels.json")]
    environment = {**os.environ, **places, **others}
    options = {"capture_output": True, "text": True, "timeout": 600}
    run = subprocess.run(command, env=environment, check=False, **options)
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "kernels.json").read_text(encoding="utf-8"))


@pytest.fixture
def variants(results: dict[str, list[dict]]) -> list[dict]:
    """All variants of kernels that training launches, compiled or with an error."""
    return results["variants"]


@pytest.fixture
def programs(variants: list[dict]) -> list[dict]:
    """Those that compile."""
    return [variant for variant in variants if variant["error"] is None]


def describe(variant: dict) -> str:
    constants = {k: v for k, v in variant["constants"].items() if v != NOT_CONSTANT}
    return f"{variant['kernel']} {constants}"


def kernels() -> dict[str, ast.FunctionDef]:
    """The functions with @triton.jit that no other one calls, by name."""
    functions = {
        node.name: node
        for node in ast.parse(SOURCE).body
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    called = {call for function in functions.values() for call in calls(function)}
    return {name: node for name, node in functions.items() if name not in called}


def calls(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def conditions(kernel: ast.FunctionDef) -> Iterator[str]:
    """The parameters of a kernel on which a branch in it depends, be it by their value or by
    whether they are None."""
    names = {arg.arg for arg in kernel.args.args}
    for node in ast.walk(kernel):
        if not isinstance(node, ast.If | ast.IfExp):
            continue
        test = node.test
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Is | ast.IsNot):
            test = test.left
        if isinstance(test, ast.UnaryOp):
            test = test.operand
        if isinstance(test, ast.Name) and test.id in names:
            yield test.id


def test_every_variant_compiles(variants):
    assert [f"{describe(x)}: {x['error']}" for x in variants if x["error"]] == []


def test_every_kernel_is_compiled(variants):
    """A kernel that is missing here is launched by no run of record_launches."""
    assert {variant["kernel"] for variant in variants} == kernels().keys()


def test_every_branch_is_compiled_both_ways(variants):
    branches = [(name, arg) for name, node in kernels().items() for arg in conditions(node)]
    assert {("_quantize_kernel", "clipped"), ("_mlp_matmul_kernel", "BACKWARD")} <= {*branches}
    for name, argument in branches:
        values = [x["constants"][argument] for x in variants if x["kernel"] == name]
        assert {bool(value) for value in values} == {True, False}, f"{name}: {argument}"


def test_programs_fit_in_registers_and_shared_memory(programs):
    for program in programs:
        assert program["shared"] <= MAX_SHARED, describe(program)
        assert program["spilled"] == 0, describe(program)


def test_two_programs_of_the_mlp_fit_on_a_multiprocessor(programs):
    """An H100's has 64 Ki registers and 228 KiB of shared memory, of which 1 KiB a program is
    reserved; a warp takes its registers in units of 256."""
    found = [program for program in programs if program["kernel"] == "_mlp_matmul_kernel"]
    assert len(found) == 2  # forward and backward
    for program in found:
        a_warp = -(-32 * program["registers"] // 256) * 256
        assert 2 * program["warps"] * a_warp <= 2**16, describe(program)
        assert 2 * (program["shared"] + 1024) <= 228 * 1024, describe(program)


def test_matmuls_run_on_tensor_cores(programs):
    """As Hopper's instructions: none is left to multiply-adds or to those of earlier GPUs."""
    matmuls = [program for program in programs if program["has_matmul"]]
    assert len(matmuls) >= 5  # two of the MLP, three of the pointer
    for program in matmuls:
        assert program["tensor_cores"] == ["wgmma.mma_async"], describe(program)
        assert program["other_matmuls"] == 0, describe(program)


def test_a_kernel_that_the_compiler_refuses_is_named(results):
    errors = [launch["error"] for launch in results["planted"]]
    assert errors
    for error in errors:
        assert "CompilationError" in str(error) and "def _add_run(" in error


if __name__ == "__main__":
    main(*sys.argv[1:])
