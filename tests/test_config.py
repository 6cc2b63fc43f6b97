"""Sections 2 and 10: options, tables, their errors; and that importing the script does nothing."""

import dataclasses
import json
import re
import subprocess
import sys
import time
import typing
from datetime import datetime
from pathlib import Path

import pytest
import torch
from conftest import ROOT, cpu_runtime, tiny_config
from torch._subclasses import FakeTensorMode

import train_gpt
from train_gpt import (
    GPT,
    METAVARS,
    PRESETS,
    TINY_LAYERS,
    Config,
    Layer,
    Optimizer,
    Schedule,
    Stage,
    UserError,
    check_config,
    config_as_text,
    config_from_text,
    option_groups,
    parse_args,
    start_runtime,
)

FIELDS = [field.name for field in dataclasses.fields(Config)]
LAST = Layer("long", 0, True, 3)


def other_value(name: str) -> object:
    """A value of the field's type that no preset has."""
    kind = typing.get_type_hints(Config)[name]
    if kind is bool:
        return not getattr(PRESETS["speedrun"], name)
    if kind == tuple[Layer, ...]:
        return (LAST, dataclasses.replace(LAST, window="short", ngrams=False))
    if kind == tuple[Stage, ...]:
        return (Stage(1 / 3, 64, *range(3, 9)), Stage(2 / 3, 8, 1, 2, 3, 1e-3, 0.1, 0))
    if kind == tuple[int, ...]:
        return (2, 3, 7)
    if kind == tuple[float, ...]:
        return (0.1 + 0.2, 0.5)
    return {int: 12_345, float: 0.1 + 0.2, str: "some where/*, a:b = 50%.bin"}[kind]


# Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_an_option_and_survives_its_text(name):
    value = other_value(name)
    config = dataclasses.replace(PRESETS["speedrun"], **{name: value})
    assert config != PRESETS["speedrun"]
    text = config_as_text(config)
    assert set(text) == set(FIELDS)
    assert all(isinstance(part, str) for part in text.values())
    assert config_from_text(text) == config
    assert parse_args(["--preset", "speedrun", f"--{name}", text[name]]) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_their_text_and_fit_together(preset):
    assert config_from_text(config_as_text(PRESETS[preset])) == PRESETS[preset]
    assert parse_args(["--preset", preset]) == PRESETS[preset]
    check_config(PRESETS[preset], 1)


def test_medium_preset_is_that_of_its_page():
    """Its weights and tokens; the kernels take it on as many GPUs as share its sequences."""
    page = (ROOT / "records" / "medium.md").read_text(encoding="utf-8")
    medium = PRESETS["medium"]
    with FakeTensorMode():  # shapes without memory
        model = GPT(medium, cpu_runtime())
        millions = sum(param.numel() for param in model.parameters()) / 1e6
    assert f"{millions:.1f} M" in page and 590 < millions < 620
    schedule = Schedule(medium)
    stages = map(schedule.stage, range(schedule.total_steps))
    tokens = sum(stage.tokens_per_step for stage in stages) / 1e6
    assert f"| {tokens:,.0f} M |" in page
    for world_size in (1, 2, 4, 8, 16):
        check_config(medium, world_size, kernels=True)


def test_the_largest_pass_of_any_stage_must_fit_the_kernels():
    """A stage of shorter sequences may compute more tokens at once than that of the longest."""
    longest, shorter = (stage(tokens_per_step=n, share=0.5)[0] for n in (3_200_000, 2_400_000))
    config = tiny_config(
        stages=(longest, shorter), sequences_per_step=8, mlp_dim=3840, tokens_per_pass=600_000
    )
    assert [config.sequences_per_pass(n, 1) * n for n in (400_000, 300_000)] == [400_000, 600_000]
    with pytest.raises(UserError, match="a pass of 600000 tokens, 3840 numbers wide"):
        check_config(config, 1, kernels=True)
    check_config(dataclasses.replace(config, tokens_per_pass=500_000), 1, kernels=True)


def test_half_preset_is_the_schedule_of_the_claim():
    """Of the record that the script's first lines name, in each of its runs."""
    folder = re.search(r"\(--preset half\).*?(records/[\w-]+)", train_gpt.__doc__, re.DOTALL)[1]
    runs = sorted((ROOT / folder).glob("*.json"))
    half = config_as_text(PRESETS["half"])
    others = {"train_files", "val_file", "val_every", "seed", "log_dir"}
    others.add("match_slots")  # of lookups, which these runs do not have
    for run in runs:
        recorded = json.loads(run.read_text(encoding="utf-8"))["config"]
        assert recorded.keys() == half.keys()
        assert {name for name in recorded if recorded[name] != half[name]} <= others
    assert len(runs) == 3


def test_default_preset_follows_the_device(monkeypatch):
    for available, preset in ((False, "tiny"), (True, "speedrun")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=available: answer)
        assert parse_args([]) == PRESETS[preset]
        assert parse_args(["--seed", "7"]) == dataclasses.replace(PRESETS[preset], seed=7)


def test_tables_parse():
    arguments = [
        "--stages",
        "1/3:96:10:8:9:0.5:1:5, 2/3:192:20:16:18:1e-1:1/2:0",
    ]
    arguments += ["--layers", "short:none:TRUE:2,long:0:False:none"]
    config = parse_args(arguments)
    assert config.stages == (
        Stage(1 / 3, 96, 10, 8, 9, 0.5, 1.0, 5),
        Stage(2 / 3, 192, 20, 16, 18, 0.1, 0.5, 0),
    )
    assert config.layers == (
        Layer("short", None, True, 2),
        Layer("long", 0, False, None),
    )
    assert type(config.stages[0].tokens_per_step) is int
    assert type(config.stages[0].second) is float
    assert type(config.layers[0].ngrams) is bool
    assert type(config.layers[0].attend_from) is int


def test_field_names_are_those_of_the_tables():
    """Positions count on the command line, so their order is part of the interface."""
    sizes = ["share", "tokens_per_step", "max_seq_len", "window_short", "window_long", "lr"]
    names = [field.name for field in dataclasses.fields(Stage)]
    assert names == [*sizes, "second", "candidates"]
    names = [field.name for field in dataclasses.fields(Layer)]
    assert names == ["window", "value_table", "ngrams", "attend_from"]


def test_scalars_parse():
    arguments = [
        "--adam_eps",
        "1e-12",
        "--lr_decay_start",
        "2/5",
        "--repeat_data",
        "TRUE",
        "--num_steps",
        "-3",
    ]
    config = parse_args(arguments)
    assert (config.adam_eps, config.lr_decay_start) == (1e-12, 0.4)
    assert config.repeat_data is True
    assert config.num_steps == -3
    assert parse_args(["--preset", "tiny", "--repeat_data", "false"]).repeat_data is False


def test_help_shows_every_fields_comment(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(["--help"])
    assert ended.value.code == 0
    shown = "".join(capsys.readouterr().out.split())  # argparse breaks lines where it likes
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    fields = source[source.index("class Config:") : source.index("PRESETS = {")]
    for name in FIELDS:
        (comment,) = re.findall(rf"^    {name}: .*?  # (.+)$", fields, re.MULTILINE)
        kind = METAVARS.get(typing.get_type_hints(Config)[name], "TABLE")
        assert f"--{name}{kind}" + "".join(comment.split()) in shown
    groups = re.findall(r"^    # (\w+)$", fields, re.MULTILINE)
    assert all(f"{group.lower()}:" in shown for group in groups) and len(groups) == 5
    assert "[1560;tiny:80;medium:6000]" in shown  # of --num_steps
    (rows,) = re.findall(r"astageis(\S+),alayer(\S+)$", shown)  # these examples can be read
    parse_args([f"--{name}={row}" for name, row in zip(("stages", "layers"), rows, strict=True)])


def test_a_field_without_a_comment_is_an_option_too(monkeypatch, capsys):
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    bare = re.sub(r"(    seed: int = 1337)  # .*", r"\1", source)
    assert bare != source
    monkeypatch.setattr(train_gpt, "SOURCE", bare)
    assert option_groups()["Run"]["seed"] == ""
    assert parse_args(["--seed", "3"]).seed == 3
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    assert "--seed N" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--nonsense 1", "--nonsense"),
        ("--num_step 1", "--num_step"),  # abbreviations are not taken
        ("--preset fast", "--preset"),
        ("--num_steps", "--num_steps"),
        ("--num_steps many", "--num_steps"),
        ("--num_steps 1.5", "--num_steps"),
        ("--muon_lr nan", "--muon_lr"),
        ("--muon_lr 1/0", "--muon_lr"),
        ("--muon_lr inf", "--muon_lr"),
        ("--muon_lr -infinity", "--muon_lr"),
        ("--adam_eps 1e999999999", "--adam_eps"),  # at once: as a fraction it would take hours
        ("--stages 1:128:32:8:16:nan:0:0", "--stages"),
        ("--seed 18446744073709551616", "--seed"),
        ("--seed 9223372036854775808", "--seed"),
        ("--seed -9223372036854775809", "--seed"),
        ("--num_steps 99999999999999999999", "--num_steps"),
        ("--ngram_orders 2:99999999999999999999", "--ngram_orders"),
        ("--layers short:99999999999999999999:false:none", "--layers"),
        ("--repeat_data yes", "--repeat_data"),
        ("--layers short", "--layers"),
        ("--layers short:false:x:false:false:none:none", "--layers"),
        ("--layers short:0:none:false:false:none:none", "--layers"),
        ("--layers short:false:None:false:false:none:none", "--layers"),
        ("--layers short:false:0:false:false:none", "--layers"),
        ("--layers short:false:0:false:false:none:none:none", "--layers"),
        ("--stages 1:2:3:4:5:6", "--stages"),
        ("--stages 1:2:3:4:5:6:7:x", "--stages"),
        ("--stages 1:2.5:3:4:5:6:7:0", "--stages"),
        ("--stages 1:2:3:4:5:6:7:8:0", "--stages"),
        ("--extension 1:16:16:16:16:1:0:0,", "--extension"),
    ],
)
def test_what_cannot_be_read_ends_with_code_2_and_the_options_name(arguments, named, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(arguments.split())
    assert ended.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert named in errors[-1]
    assert "error:" in errors[-1]
    assert "--help lists the options" in errors[-1]
    if not arguments.startswith(("--non", "--num_step ")):
        assert f"argument {named}:" in errors[-1]


def test_numbers_of_64_bits_are_read(runtime):
    for seed in (2**63 - 1, -(2**63), 0):
        config = parse_args(["--seed", str(seed)])
        assert config.seed == seed
        GPT(tiny_config(seed=seed), runtime)
    assert parse_args(["--adam_eps", "1e-300"]).adam_eps == 1e-300


def test_number_beyond_float_cannot_be_read(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(["--muon_lr", "1e400"])
    assert ended.value.code == 2


def test_only_the_first_process_prints_the_message(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        parse_args(["--nonsense"])
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "")


# Values that do not fit together -----------------------------------------------------------------

STAGE = tiny_config().stages[0]


def stage(**changes: object) -> tuple[Stage, ...]:
    return (dataclasses.replace(STAGE, **changes),)


def layers(index: int, **changes: object) -> tuple[Layer, ...]:
    """The tiny layer plan with one row changed."""
    rows = list(TINY_LAYERS)
    rows[index] = dataclasses.replace(rows[index], **changes)
    return tuple(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ()}, "--stages has no row"),
        ({"stages": stage(share=0.9)}, "--stages.*shares add up to 0.9"),
        ({"stages": stage(share=0.5) * 3}, "--stages.*shares add up to 1.5"),
        ({"extension": stage(share=0.5)}, "--extension.*shares add up to 0.5"),
        ({"extension": stage(share=0.5) * 2}, "--extension takes one row, found 2"),
        ({"stages": stage(tokens_per_step=255)}, "--stages: 255 tokens.*--sequences_per_step"),
        ({"sequences_per_step": 32}, "--stages: 256 tokens.*32 sequences"),
        ({"stages": stage(max_seq_len=0)}, "--stages.*max_seq_len, windows and lr"),
        ({"stages": stage(window_short=0)}, "--stages.*max_seq_len, windows and lr"),
        ({"extension": stage(window_long=-1)}, "--extension.*max_seq_len, windows and lr"),
        (
            {
                "stages": stage(share=0.5, window_long=16) + stage(share=0.5, window_long=32),
                "extension": stage(window_long=16),
            },
            "long windows 16:32:16 one comes twice, with another between: change one",
        ),
        (
            {
                "stages": stage(window_long=16),
                "extension": stage(window_long=32),
                "final_window_long": 16,
            },
            "--final_window_long 16 is the long window of an earlier stage: give 32 or more",
        ),
        ({"adam_eps": 0.0}, r"--adam_eps 0.0 must be positive"),
        ({"stages": stage(lr=0.0)}, "--stages.*max_seq_len, windows and lr"),
        ({"head_dim": 4}, "--head_dim 4 is no multiple of 8"),
        ({"num_heads": 3}, "--num_heads 3 must be even"),
        ({"layers": ()}, "--layers has no row"),
        ({"layers": layers(3, window="middle")}, "--layers: window 'middle'"),
        ({"layers": layers(2, window="none")}, "--layers: window 'none'"),
        ({"layers": layers(4, value_table=2)}, r"--layers: value tables \[0, 2\]"),
        ({"layers": layers(0, value_table=-1)}, r"--layers: value tables \[-1, 1\]"),
        ({"layers": layers(4, attend_from=-1)}, "--layers: attend_from of layer 4 names -1, no"),
        ({"layers": layers(4, attend_from=None)}, "--layers: attend_from names 0 layers"),
        ({"layers": layers(4, attend_from=4)}, "--layers: attend_from of layer 4 names 4, no"),
        ({"layers": layers(3, attend_from=1)}, "--layers: attend_from names 2 layers"),
        ({"layers": layers(4, window="short")}, "--layers: the last one must be long"),
        ({"layers": layers(4, ngrams=False)}, "--layers: the last one must be long"),
        ({"layers": layers(4, value_table=None)}, "--layers: the last one must be long"),
        ({"vocab_size": 50_256}, "--vocab_size 50256 .*start token 50256"),
        ({"dtype": "float16"}, "--dtype 'float16' is not one of bfloat16, float32"),
        ({"num_steps": 0}, "--num_steps 0 must be positive"),
        ({"val_tokens": -1}, "--val_tokens -1 must be positive"),
        ({"min_mean_doc_len": 0}, "--min_mean_doc_len 0 must be positive"),
        ({"momentum_warmup_steps": 0}, "--momentum_warmup_steps 0 must be positive"),
        ({"extension_steps": -1}, "--extension_steps -1 must not be negative"),
        ({"stop_step": -5}, "--stop_step -5 must not be negative"),
        ({"val_every": -1}, "--val_every -1 must not be negative"),
        ({"val_sequence_tokens": 40}, "--val_sequence_tokens must be a multiple of 16"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_check_config_names_the_option(changes, message):
    check_config(tiny_config(), 1)
    with pytest.raises(UserError, match=message):
        check_config(tiny_config(**changes), 1)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"sequences_per_step": 0}, "--sequences_per_step"),
        ({"sequences_per_step": -4}, "--sequences_per_step"),
        ({"tokens_per_pass": 0}, "--tokens_per_pass 0 must be positive"),
        ({"tokens_per_sampling": -1}, "--tokens_per_sampling -1 must be positive"),
        ({"head_dim": 0}, "--head_dim"),
        ({"num_heads": 0}, "--num_heads"),
        ({"model_dim": 0}, "--model_dim"),
        ({"mlp_dim": 0}, "--mlp_dim"),
        ({"gate_dim": 0}, "--gate_dim"),
        ({"ngram_rows": 0}, "--ngram_rows"),
        ({"lr_decay_start": 1.0}, "--lr_decay_start"),
        ({"stages": stage(tokens_per_step=0)}, "--stages"),
        ({"stages": stage(share=1.5) + stage(share=-0.5)}, "--stages"),
        ({"final_window_long": -1}, "--final_window_long"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_check_config_names_the_option_of_other_bad_values(changes, option):
    with pytest.raises(UserError, match=option):
        check_config(tiny_config(**changes), 1)


def test_world_size_must_divide_the_sequences():
    config = tiny_config(sequences_per_step=4)
    for world_size in (1, 2, 4):
        check_config(config, world_size)
    for world_size, advice in (3, 6), (8, 8):
        message = f"--sequences_per_step 4 .*{world_size} processes.*--sequences_per_step {advice}"
        with pytest.raises(UserError, match=message):
            check_config(config, world_size)
    check_config(tiny_config(sequences_per_step=16, stages=stage(), extension=stage()), 16)


def test_world_size_must_divide_the_tables():
    """50304 rows, or two tables of as many, divide by 1, 2, 3, 4 and 8 processes, not by 5 or 7."""
    for world_size in (2, 3, 4, 8):
        runtime = cpu_runtime(world_size - 1, world_size)
        Optimizer(GPT(tiny_config(), runtime), tiny_config(), runtime)
    for world_size in (5, 7):
        runtime = cpu_runtime(0, world_size)
        message = f"value_embed has 100608 rows, which {world_size} processes cannot share"
        with pytest.raises(UserError, match=message):
            Optimizer(GPT(tiny_config(), runtime), tiny_config(), runtime)


def test_log_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    config = tiny_config(log_dir=str(tmp_path / "file" / "logs"))
    with pytest.raises(UserError, match="--log_dir .*file/logs: cannot write"):
        start_runtime(config, None)


def test_run_ids_are_in_utc(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")  # 14 hours ahead
    time.tzset()
    try:
        before = time.time()
        run_id = start_runtime(tiny_config(log_dir=str(tmp_path)), None).log.data["run_id"]
    finally:
        monkeypatch.undo()
        time.tzset()
    date, begun, rest = run_id.split("_")
    moment = datetime.strptime(f"{date} {begun} +0000", "%Y-%m-%d %H%M%S %z")
    assert moment.timestamp() == pytest.approx(before, abs=5)
    assert re.fullmatch("[0-9a-f]{8}", rest)
    assert [path.name for path in tmp_path.iterdir()] == [f"{run_id}.txt"]


# Import ------------------------------------------------------------------------------------------

IMPORT = """
import os, threading
before = dict(os.environ)
import torch, torch.distributed
calls = []
torch.compile = lambda *a, **k: calls.append("compile")
torch.distributed.init_process_group = lambda *a, **k: calls.append("init_process_group")
rng, threads = torch.get_rng_state(), torch.get_num_threads()
import train_gpt
assert calls == [], calls
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
assert torch.equal(torch.get_rng_state(), rng) and torch.get_num_threads() == threads
assert torch.get_default_dtype() == torch.float32 and not torch.is_inference_mode_enabled()
assert threading.active_count() == 1, threading.enumerate()
assert {k: v for k, v in os.environ.items() if k not in before} == {}
assert os.listdir() == [], os.listdir()
import sys
assert not {"matplotlib", "tiktoken", "flash_attn"} & set(sys.modules) - AT_START
"""


def test_import_does_nothing(tmp_path):
    """No device, process group, compilation, thread, file, environment variable or output."""
    at_start = "import sys, torch, torch.distributed, numpy\nAT_START = set(sys.modules)\n"
    path = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nsys.dont_write_bytecode = True\n"
    result = subprocess.run(
        [sys.executable, "-c", path + at_start + IMPORT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(Path(tmp_path).iterdir()) == []
