"""records/ablations/half_race.toml: its changes fit the script and each other, they train, and what
starts from zero weights leaves the loss as it was."""

import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import (
    ROOT,
    cpu_runtime,
    fp32_for_fp8,
    random_batch,
    tiny_config,
    trained_like,
)

from train_gpt import (
    Batch,
    Config,
    Windows,
    check_layers,
    config_as_text,
    head_loss,
    parse_value,
    rms_norm,
    rotary_tables,
)

sys.path.insert(0, str(next(ROOT.glob("*/ablate.py")).parent))
import ablate

FILE = ROOT / "records" / "ablations" / "half_race.toml"
VARIANTS = ablate.read_variants(FILE)
SPARE = ["yarn", "smear", "w_o_zero", "mlp3072", "third"]
FACTORS = [name for name in VARIANTS if name not in ("base", *SPARE)]
RUNS = re.findall(r"^#   ([a-z][\w+]*)$", FILE.read_text(encoding="utf-8"), re.MULTILINE)
GATES = {  # the changes whose new parameters start at zero, with these
    "xsa": ["xsa"],
    "head_gates": ["head_gate"],
    "smear": ["smear", "smear_gate"],
    "value_gates": ["value_gate"],
}
CONFIG = tiny_config(tokens_per_pass=128)  # two sequences
WEIGHTS = torch.tensor([1.0, 0.5])
MISSING = [name for name, option in {"classes": "ngram_classes", "pointer": "pointer"}.items()
           if option not in vars(Config())]  # fmt: skip


def trainable(name: str) -> str:
    """What of a run this script has the options for."""
    return "+".join(part for part in name.split("+") if part not in MISSING) or "base"


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], tuple[ModuleType, Config]]:
    """The script with some changes, and a tiny config with their options."""
    fields = config_as_text(CONFIG)
    options = ["--preset", "tiny", *itertools.chain(*((f"--{key}", fields[key]) for key in fields))]

    def run(name: str) -> tuple[ModuleType, Config]:
        return ablate.make(ROOT / "train_gpt.py", name, VARIANTS, options, tmp_path)

    return run


def two_sequences(seed: int) -> Batch:
    """128 tokens; the second sequence begins with a document."""
    return random_batch(seed, [20, 44, 30, 34])._replace(sequences=2)


def with_parameters_of(module: ModuleType, config: Config, base: torch.nn.Module) -> object:
    """A model of this module with the numbers of another one, and its own where that has none."""
    model = module.GPT(config, cpu_runtime())
    with torch.no_grad():
        for name in ("attention_bank", "mlp_bank", "head", "value_embed"):
            getattr(model, name).copy_(getattr(base, name))
        model.ngrams.table.copy_(base.ngrams.table)
        own = model.unpack_small()
        for name, numbers in base.unpack_small().items():
            own[name].copy_(numbers)
    return model


def randomize(model: torch.nn.Module, names: Iterable[str]) -> None:
    slices = model.unpack_small()
    with torch.no_grad():
        for i, name in enumerate(names):
            slices[name].normal_(0, 0.5, generator=torch.Generator().manual_seed(i))


def loss_of(model: torch.nn.Module, batch: Batch, weights: torch.Tensor = WEIGHTS) -> torch.Tensor:
    return model.training_loss(batch, Windows(8, 24), weights)[0]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The design --------------------------------------------------------------------------------------


def test_runs_are_a_screening_design():
    """Every factor in half of the runs, every pair of factors in a quarter, in the file's order."""
    parts = [run.split("+") for run in RUNS]
    assert len(RUNS) == len({*RUNS}) == 8 and len(FACTORS) == 9
    assert parts == [[name for name in FACTORS if name in part] for part in parts]
    signs = torch.tensor([[1 if name in part else -1 for name in FACTORS] for part in parts])
    attention = signs[:, [FACTORS.index(name) for name in ("xsa", "head_gates", "value_gates")]]
    assert (attention == attention[:, :1]).all()  # one factor
    signs = signs[:, [FACTORS.index(name) for name in FACTORS if name[:3] not in ("hea", "val")]]
    assert torch.equal(signs.T @ signs, 8 * torch.eye(7, dtype=torch.int64))
    assert not signs.sum(0).any()


def test_options_of_the_design():
    """Nine layers are a plan in which two short layers without tables follow the first long one."""
    options = {name: dict([VARIANTS[name].options]) for name in FACTORS if VARIANTS[name].options}
    layers = parse_value(Config.__annotations__["layers"], options["nine"].pop("--layers"))
    check_layers(layers)
    moved = [row.attend_from and row.attend_from - 2 for row in layers]
    kept = [*range(3), *range(5, 9)]
    plan = [(row.window, row.value_table, row.ngrams) for row in layers]
    base = [(row.window, row.value_table, row.ngrams) for row in Config().layers]
    assert [plan[i] for i in kept] == base
    assert [moved[i] for i in kept] == [row.attend_from for row in Config().layers]
    assert plan[3] == plan[4] == ("short", None, False) and moved[3] is moved[4] is None
    assert options == {
        "nine": {},
        "six_heads": {"--num_heads": "6"},
        "classes": {"--ngram_classes": "true"},
        "lr_end_high": {"--lr_end": "0.4"},
        "two_tables": {"--ngram_orders": "2:3"},
        "pointer": {"--pointer": "true"},
    }


@pytest.mark.parametrize("name", [*FACTORS, *SPARE, "+".join([*FACTORS, *SPARE])])
def test_changes_train_alone_and_together(make, name):
    """In four steps the loss is finite and every new parameter moves; the last two steps run with
    the windows of the extension."""
    if name in MISSING:
        pytest.skip("the script has no option for it")
    module, config = make(trainable(name))
    model = module.GPT(dataclasses.replace(config, num_steps=2), cpu_runtime())
    trainer = module.Trainer(model, model.ngrams.runtime)
    for step in range(4):
        loss = trainer.run_step(step, [two_sequences(step)])
        assert math.isfinite(loss.item())
    with torch.no_grad():
        windows = trainer.schedule.windows(step)
        for final in windows, windows._replace(long=config.final_window_long):
            assert math.isfinite(model.validation_loss(two_sequences(9), final).item())
    slices = model.unpack_small()
    for gate in itertools.chain(*(GATES.get(part, []) for part in name.split("+"))):
        assert slices[gate].any(), gate


# What they compute -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*GATES, "+".join(GATES)])
def test_zero_weights_leave_the_loss_as_it_was(make, name):
    """With all other parameters random. With other weights the loss is another one."""
    module, config = make(name)
    base = trained_like(CONFIG, cpu_runtime())
    model = with_parameters_of(module, config, base)
    batch = two_sequences(1)
    before, start = loss_of(base, batch), loss_of(model, batch)
    assert start.item() == pytest.approx(before.item(), rel=1e-6)
    start.backward()
    before.backward()
    torch.testing.assert_close(model.head.grad, base.head.grad, rtol=1e-4, atol=1e-4)
    randomize(model, itertools.chain(*(GATES[part] for part in name.split("+"))))
    assert abs(loss_of(model, batch) - before) > 1e-3


@pytest.mark.parametrize("name", [*GATES, "+".join(GATES)])
def test_gates_read_no_later_token(make, name):
    """A token changes neither what comes before it nor what is in the next sequence."""
    module, config = make(name)
    model = with_parameters_of(module, config, trained_like(CONFIG, cpu_runtime()))
    randomize(model, itertools.chain(*(GATES[part] for part in name.split("+"))))
    batch, at = two_sequences(1), 63  # the last one of the first sequence
    tokens = batch.tokens.clone()
    tokens[at] += 1
    with torch.no_grad():
        found = [
            model.hidden(batch._replace(tokens=which), Windows(8, 24))
            for which in (batch.tokens, tokens)
        ]
    changed = (found[0] != found[1]).any(1)
    assert changed[at] and changed.sum() == 1


def test_what_lies_along_the_own_value_is_taken_out(make):
    module, _ = make("xsa")
    y, v = random(5, 3, 8), random(5, 3, 8, seed=1)
    out = module.without_own_value(y, v, torch.tensor([0.0, 0.5, 50.0]))
    assert torch.equal(out[:, 0], y[:, 0])
    assert (out[:, 2] * v[:, 2]).sum(-1).abs().max() < 1e-5
    along = torch.einsum("td,td->t", y[:, 1], v[:, 1]) / v[:, 1].norm(dim=1) ** 2
    torch.testing.assert_close(out[:, 1], y[:, 1] - math.tanh(0.5) * along[:, None] * v[:, 1])


def test_own_values_are_taken_out_in_layers_1_and_3(make, monkeypatch):
    module, config = make("xsa")
    model, layers, called = module.GPT(config, cpu_runtime()), [], []
    attend = model.attend
    monkeypatch.setattr(model, "attend", lambda i, *rest: layers.append(i) or attend(i, *rest))
    without = module.without_own_value
    monkeypatch.setattr(
        module, "without_own_value", lambda *args: called.append(layers[-1]) or without(*args)
    )
    loss_of(model, two_sequences(1))
    assert layers == [0, 1, 2, 3, 4] and called == [1, 3]


def test_each_head_has_its_factor(make):
    """Of outputs and of values, by the sigmoid of a weighted sum of columns."""
    module, _ = make("head_gates+value_gates")
    y, start = random(5, 3, 8), random(5, 6, seed=1)
    weights = random(3, 6, seed=2)
    out = module.gated_heads(y, start, weights)
    values = module.gated_value(y.flatten(1), start, random(3, 12, seed=3))
    for t, head in itertools.product(range(5), range(3)):
        gate = 2 / (1 + math.exp(-(weights[head] @ start[t]).item()))
        torch.testing.assert_close(out[t, head], gate * y[t, head])
        features = torch.cat([start[t], y.flatten(1)[t, :6]])
        gate = 2 / (1 + math.exp(-(random(3, 12, seed=3)[head] @ features).item()))
        torch.testing.assert_close(values[t, 8 * head : 8 * head + 8], gate * y[t, head])


def test_first_columns_have_the_gradient_of_a_slice(make):
    """Also in a chain, as in a layer with both kinds of gates."""
    module, _ = make("head_gates+value_gates")
    x, weights, grad = random(5, 32), random(32, 7, seed=1), random(5, 18, seed=2)
    grads = []
    for chained in True, False:
        leaf = x.clone().requires_grad_()
        if chained:
            normed, short = module.FirstColumns.apply(1 * leaf, 6, None)
            normed, long = module.FirstColumns.apply(normed, 12, None)
        else:
            normed, short, long = leaf, leaf[:, :6], leaf[:, :12]
        assert torch.equal(normed, x) and torch.equal(long, x[:, :12])
        ((normed @ weights).sum() + (torch.cat([short, long], 1) * grad).sum()).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_smear_adds_a_share_of_the_token_before(make):
    module, _ = make("smear")
    x, strength, weights = random(8, 16), torch.tensor([0.7]), random(1, 12, seed=1)
    out = module.smeared_norm(x, strength, weights, 2)
    for t in range(8):
        total = x[t].clone()
        if t not in (0, 4):
            total += 0.7 / (1 + math.exp(-(weights[0] @ x[t, :12]).item())) * x[t - 1]
        torch.testing.assert_close(out[t], rms_norm(total))


def test_third_token_adds_its_loss(make):
    module, config = make("third")
    trainer = module.Trainer(module.GPT(config, cpu_runtime()), cpu_runtime())
    assert [w.tolist() for w in trainer.loss_weights.values()] == [
        [1.0, 0.5, 0.25],
        [1.0, 0.0, 0.0],
    ]
    model = with_parameters_of(module, config, trained_like(CONFIG, cpu_runtime()))
    batch = two_sequences(1)
    with torch.no_grad():
        found = loss_of(model, batch, torch.tensor([1.0, 0.5, 0.25]))
        without = loss_of(model, batch, torch.tensor([1.0, 0.5, 0.0]))
        targets = batch.targets.clone()
        targets[:-2] = batch.targets[2:]
        for begin in 0, 64:
            targets[begin + 62 : begin + 64] = -1
        x, one = model.hidden(batch, Windows(8, 24)), torch.ones(1)
        exact = head_loss(x, model.head, targets[:, None], one)[0]
    assert (found - without).item() == pytest.approx(0.25 * exact.item(), rel=1e-4)


def test_o_starts_at_zero_and_all_else_as_before(make):
    models = []
    for name in "base", "w_o_zero":
        module, config = make(name)
        models.append(module.GPT(config, cpu_runtime()))
    base, model = models
    qkv_rows = 3 * model.config.attention_dim
    assert base.attention_bank[:, qkv_rows:].any() and not model.attention_bank[:, qkv_rows:].any()
    with torch.no_grad():
        base.attention_bank[:, qkv_rows:] = 0
    for one, other in zip(base.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_frequencies_follow_the_windows(make):
    """Those of many turns stay, those of less than one shrink with the window; the speedrun's."""
    module, _ = make("yarn")
    config = module.Config()
    tables = module.stretched_rotary(config, 8, torch.device("cpu"))
    assert [*tables] == [384, 896, 1408, 1664, 2560]
    for stretched, plain in zip(tables[384], rotary_tables(128, 8, torch.device("cpu"))):
        assert torch.equal(stretched, plain)
    angle = {window: torch.atan2(sin, cos)[1, 0] for window, (cos, sin, _) in tables.items()}
    torch.testing.assert_close(angle[1664][0], angle[384][0])  # 61 turns
    torch.testing.assert_close(angle[1664][-1], angle[384][-1] * 384 / 1664)  # 0.06 turns
    scales = [scale for *_, scale in tables.values()]
    growth = math.prod(1 + 0.2 * math.log(x) for x in (896 / 384, 1408 / 896, 1664 / 1408))
    assert scales[0] == 0.1 and scales[-2] == scales[-1] == pytest.approx(0.1 * growth)


# As on a GPU -------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="small fp32 tiles are the interpreter's")
def test_kernels_compute_the_same_model(make, monkeypatch):
    """Loss and gradients by Triton's interpreter, with fp32 in place of fp8, where the norm is NaN
    and gates read its copy; with sampled candidates. The self-check of the head has three terms."""
    module, config = make("+".join([*GATES, "third", "yarn"]))
    config, small = (dataclasses.replace(c, vocab_size=150) for c in (config, CONFIG))
    base, results = trained_like(small, cpu_runtime()), []
    batch = random_batch(1, [7, 1, 12])
    batch = batch._replace(tokens=batch.tokens % 150, targets=batch.targets % 150)
    weights = torch.tensor([1.0, 0.5, 0.25])
    for kernels in False, True:
        monkeypatch.setattr(module, "has_kernels", lambda device, kernels=kernels: kernels)
        model = with_parameters_of(module, config, base)
        randomize(model, itertools.chain(*GATES.values()))
        if kernels:
            fp32_for_fp8(monkeypatch, module)
            banks = model.mlp_bank, model.attention_bank, model.head
            model.fp8 = module.Fp8Copies(*banks, len(config.layers))
        loss = model.training_loss(batch, module.Windows(12, 24), weights, 48)[0]
        loss.backward()
        results.append([loss.detach(), *(param.grad for param in model.parameters())])
    for exact, found in zip(*results):
        assert torch.isfinite(found).all()
        assert (found - exact).norm() < 1e-3 * exact.norm()
    for name, size in {"SEQUENCES": 2, "LENGTH": 10, "ROWS": 40}.items():
        monkeypatch.setattr(module, f"CHECK_{name}", size)
    assert module.self_check(model, "head and loss") == []


def test_torch_compiles_them_forward_and_backward(make, monkeypatch):
    """As whole graphs, on the CPU by a backend that traces both passes and compiles neither."""
    module, config = make("+".join(GATES))
    base = trained_like(CONFIG, cpu_runtime())
    model = with_parameters_of(module, config, base)
    randomize(model, itertools.chain(*GATES.values()))
    batch = two_sequences(1)
    exact = loss_of(model, batch)
    exact.backward()
    grads = [param.grad.clone() for param in model.parameters()]
    names = "without_own_value", "gated_heads", "smeared_norm", "gated_value"
    for name in names:
        options = {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}
        function = torch.compile(getattr(module, name).__wrapped__, **options)
        monkeypatch.setattr(module, name, function)
    for param in model.parameters():
        param.grad.zero_()
    loss = loss_of(model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    for param, grad in zip(model.parameters(), grads):
        torch.testing.assert_close(param.grad, grad, rtol=1e-4, atol=1e-5)
