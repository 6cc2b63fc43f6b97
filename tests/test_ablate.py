"""tools/ablate.py on a script of a few lines, and once on the real one."""

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_train import command, write_data

sys.path.insert(0, str(ROOT / "tools"))
import ablate

SCRIPT = """
import json, sys, types

START = 4.0


class UserError(Exception):
    pass


def parse_args(options):
    if "--none" in options:
        raise SystemExit(2)
    return types.SimpleNamespace(lr=float(options[-1]) if options else 1.0)


def check_config(config, world_size):
    if config.lr < 0:
        raise UserError("--lr must be positive")


class Schedule:
    def __init__(self, config):
        pass

    def stage(self, step):
        return step // 2


class Log:
    def __init__(self):
        self.data = {}

    def write_json(self):
        with open("log.json", "w") as file:
            json.dump(self.data, file)


def start_runtime(config, store):
    return types.SimpleNamespace(log=Log())


def train(config, runtime):
    runtime.log.data["lr"] = config.lr
    if config.lr == 0.25:
        raise KeyboardInterrupt
    if config.lr == 0.125:
        sys.exit(3)
    if config.lr > 5:
        raise ValueError(f"the loss at {config.lr} is nan\\nmore")
    losses = [START - config.lr * step / 4 for step in range(4)]
    rows = [
        {"step": step + 1, "train_loss": loss, "step_ms": 10.0 * (step // 2 + 1)}
        for step, loss in enumerate(losses)
    ]
    score = {"step": 4, "val_loss": losses[-1], "train_time_s": 1.5}
    end = {"preparation_s": 2.4, "peak_memory_gib": 1.0}
    runtime.log.data |= {"steps": rows, "validations": [score], "summary": end}
"""
VARIANTS = """
[slow]
options = ["--lr", "0.5"]
[low]
replace = [["START = 4.0", "START = 3.0"]]
[wild]
options = ["--lr", "9"]
[negative]
options = ["--lr", "-1"]
[unread]
options = ["--none", "0"]
[twice]
replace = [["lr", "rate"]]
[broken]
replace = [["import json, sys, types", "import no_such_module"]]
[stop]
options = ["--lr", "0.25"]
[ends]
options = ["--lr", "0.125"]
[ends_on_import]
replace = [["START = 4.0", "sys.exit(4)"]]
"""


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The tool on SCRIPT and VARIANTS; gives what was printed, errors if it is to fail."""
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(SCRIPT, encoding="utf-8")
    Path("variants.toml").write_text(VARIANTS, encoding="utf-8")

    def run(*arguments: object, code: int = 0) -> str:
        found = ablate.main(["--script", "script.py", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert found == code, out + err
        return err or out

    return run


def test_variants_are_trained_one_after_the_other(call):
    """Base, an option, a text, both, and one that fails, after which the next one runs."""
    printed = call("variants.toml", "base", "slow", "low", "wild", "slow+low", code=1)
    end = "| 10.0/20.0 ms | prep 2 s, 1.0 GiB"
    assert printed.splitlines() == [
        f"base     4:3.2500@1.50s | train 4.0000 3.5000 3.5000 3.2500 {end}",
        f"slow     4:3.6250@1.50s | train 4.0000 3.7500 3.7500 3.6250 {end}",
        f"low      4:2.2500@1.50s | train 3.0000 2.5000 2.5000 2.2500 {end}",
        "wild     failed: ValueError: the loss at 9.0 is nan",
        f"slow+low 4:2.6250@1.50s | train 3.0000 2.7500 2.7500 2.6250 {end}",
        "5 variants, 1 failed; logs/ablate/variants.txt keeps the lines",
    ]
    kept = Path("logs/ablate/variants.txt").read_text()
    assert kept.splitlines() == printed.splitlines()[:-1]
    assert Path("logs/ablate/low.py").read_text() == SCRIPT.replace("4.0", "3.0")


def test_options_after_the_dashes_go_to_every_run(call):
    printed = call("variants.toml", "base", "low", "base", "--", "--lr", "2").splitlines()
    scores = ["4:2.5000@1.50s", "4:1.5000@1.50s", "4:2.5000@1.50s"]
    assert [line.split()[1] for line in printed[:3]] == scores


def test_options_may_stand_between_file_and_names(call, capsys):
    assert ablate.main(["variants.toml", "--script", "script.py", "low"]) == 0
    assert capsys.readouterr().out.startswith("low 4:2.2500@1.50s")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["base", "hot"], "hot: no such variant: there are base, slow, low"),
        (["negative"], "[negative]: --lr must be positive"),
        (["unread"], "[unread]: these options cannot be read"),
        (["twice"], "[twice]: 'lr' occurs"),
        (["broken"], "[broken]: ModuleNotFoundError on import"),
        (["ends_on_import"], "[ends_on_import]: SystemExit on import: 4"),
        (["base", "low+low"], "occurs 0 times"),
    ],
)
def test_nothing_is_trained_when_a_variant_cannot_be(call, names, message):
    assert message in call("variants.toml", *names, code=1)
    assert not Path("logs/ablate/variants.txt").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read as TOML"),
        ("[slow", "cannot be read as TOML"),
        ("[base]", "'base'"),
        ('["a+b"]', "'a+b'"),
        ('["a/b"]', "'a/b': call a table of options and replace otherwise, by letters"),
        ('["../a"]', "'../a'"),
        ('[""]', "''"),
        ("slow = 1", "'slow'"),
        ("[slow]\nlr = 1", "[slow] has lr, not options or replace"),
        ('[slow]\noptions = "--lr 1"', "[slow] is not of the form"),
        ("[slow]\noptions = [1]", "[slow] is not of the form"),
        ('[slow]\nreplace = ["a", "b"]', "[slow] is not of the form"),
        ('[slow]\nreplace = [["a"]]', "[slow] is not of the form"),
        ("[slow]\nreplace = 5", "[slow] is not of the form"),
    ],
)
def test_broken_file_is_named(call, text, message):
    if text is not None:
        Path("broken.toml").write_text(text, encoding="utf-8")
    error = call("broken.toml", code=1)
    assert error.startswith("error: broken.toml: ") and message in error


def test_ms_a_step_are_a_median_that_slow_steps_do_not_move(call):
    call("variants.toml", "base")
    module = sys.modules["variant_base"]
    steps = [
        {"step": step, "train_loss": 4.0, "step_ms": ms}
        for step, ms in enumerate([10.0, 990.0, 12.0, 20.0], 1)
    ]
    module.Schedule.stage = lambda self, step: step // 3
    data = {"steps": steps, "validations": []}
    data["summary"] = {"preparation_s": 2.4, "peak_memory_gib": 1.0}
    assert "| 12.0/20.0 ms |" in ablate.summary(module, None, data)


def test_an_interruption_keeps_the_lines_and_the_log(call):
    with pytest.raises(KeyboardInterrupt) as stop:
        call("variants.toml", "base", "stop", "low")
    table = "logs/ablate/variants.txt"
    assert str(stop.value) == f"; {table} keeps the lines of the 1 variants before it"
    assert Path(table).read_text().startswith("base 4:3.2500@1.50s")
    assert json.loads(Path("log.json").read_text()) == {"lr": 0.25}


def test_a_variant_that_ends_the_process_ends_itself_alone(call):
    printed = call("variants.toml", "ends", "base", code=1).splitlines()
    assert printed[0] == "ends failed: SystemExit: 3"
    assert json.loads(Path("log.json").read_text()) == {"lr": 0.125}
    assert printed[1].startswith("base 4:3.2500@1.50s")


@pytest.mark.parametrize("place", ["logs", "logs/ablate", "logs/ablate/base.py"])
def test_outputs_are_checked_before_training(call, place):
    """Each of them is something else already."""
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).mkdir() if place.endswith("py") else Path(place).touch()
    error = call("variants.toml", "base", "stop", code=1)
    assert re.fullmatch(r"error: logs/ablate/base\.py: cannot be written: [^\n]*\n", error), error


def test_a_table_that_cannot_be_written_is_an_error_or_goes_to_the_screen(
    call, capsys, monkeypatch
):
    table = Path("logs/ablate/variants.txt")
    table.mkdir(parents=True)
    assert f"error: {table}: cannot be written" in call("variants.toml", "stop", code=1)
    table.rmdir()
    train = ablate.run

    def run(*arguments: object) -> str:  # the disk is full from the second variant on
        table.touch()
        line = train(*arguments)
        if line.startswith("4:2"):
            table.unlink()
            table.mkdir()
        return line

    monkeypatch.setattr(ablate, "run", run)
    command = ["--script", "script.py", "variants.toml", "base", "low"]
    assert ablate.main(command) == 1
    out, err = capsys.readouterr()
    assert "low  4:2.2500@1.50s" in out
    assert out.endswith(f"2 variants, 0 failed; {table} does not keep all lines\n")
    assert err.startswith(f"warning: {table}: cannot be written: ")


def test_what_cannot_be_read_is_named(call, tmp_path):
    Path("script.py").write_bytes(b"\xff")
    assert call("variants.toml", "base", code=1).startswith("error: script.py: cannot be read: ")
    Path("script.py").unlink()
    assert call("variants.toml", "base", code=1).startswith("error: script.py: cannot be read: ")


def test_byte_order_mark_and_brackets_in_names_are_accepted(call):
    Path("[v1]").mkdir()
    Path("[v1]/more [2].toml").write_text("\ufeff" + VARIANTS, encoding="utf-8")
    assert call("[v1]/more [2].toml", "low").startswith("low 4:2.2500@1.50s")
    assert Path("logs/ablate/more [2].txt").exists()


def test_variants_of_the_real_script(tmp_path, monkeypatch, capsys):
    """A change of the text and one of an option reach the training; the script is not touched."""
    monkeypatch.chdir(tmp_path)
    options = command(write_data(tmp_path), 1, val_every=0, stop_step=4)[2:]
    Path("two.toml").write_text(
        """[flat]
options = ["--muon_lr", "0.1"]
[silent]
replace = [["(rms_norm(lookups.embedded), ", "(rms_norm(lookups.embedded).detach(), "]]
"""
    )
    assert ablate.main(["two.toml", "base", "flat", "silent", "--", *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "| train" in line]
    assert len({line.split()[1].split("@")[0] for line in lines}) == 3


def test_the_example_of_the_help_fits_this_script(tmp_path):
    """The TOML in the docstring can be read, and its texts are in the script."""
    lines = [line[4:] for line in ablate.__doc__.splitlines() if line.startswith("    ")]
    (tmp_path / "example.toml").write_text("\n".join(lines))
    variants = ablate.read_variants(tmp_path / "example.toml")
    assert len(variants) > 2
    for name in variants:
        ablate.make(ROOT / "train_gpt.py", name, variants, ["--preset", "tiny"], tmp_path)


@pytest.mark.parametrize(
    ("file", "script"),
    [
        ("tools/variants.toml", "train_gpt.py"),
        *(
            (f"records/ablations/{name}", "records/2026-11-30_half_race_one_gpu/train_gpt.py")
            for name in ("four_grams_and_mask.toml", "eleven_changes.toml")
        ),
    ],
)
def test_kept_variants_fit_their_script(tmp_path, file, script):
    """Each changes the text or an option, and gives a config that can be run, as do the changes
    together that the file lists."""
    variants = ablate.read_variants(ROOT / file)
    script, options = ROOT / script, ["--preset", "speedrun"]
    base = ablate.make(script, "base", variants, options, tmp_path)[1]
    listed = re.findall(r"^#   (\w+\+[\w+]+)$", (ROOT / file).read_text(), re.MULTILINE)
    for name in [*[*variants][1:], *listed]:
        config = ablate.make(script, name, variants, options, tmp_path)[1]
        changed = (tmp_path / f"{name}.py").read_text() != script.read_text()
        assert changed or vars(config) != vars(base), name
