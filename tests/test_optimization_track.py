"""The optimization track: the fixed script, the optimizers, submissions, rules and records."""

import dataclasses
import importlib.util
import itertools
import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT, write_shard
from test_records import keep_figures
from test_run_sh import Copy

HERE = ROOT / "records" / "optimization"
sys.path[:0] = [str(HERE), str(ROOT / "tools")]
import report
import rules
import submission
import train_gpt_simple
from rules import Result, pairwise_statistic, passes, stop, target_statistic
from train_gpt_simple import GPT, IGNORED_TARGET, PRESETS, Batch, Log, Runtime, Tokens

NAMES = sorted(path.stem for path in submission.OPTIMIZERS.glob("*.py"))
VOCAB = 64
SMALL = dataclasses.replace(
    PRESETS["tiny"],
    vocab_size=VOCAB,
    sequence_tokens=32,
    micro_batch_tokens=64,
    val_tokens=500,
    val_every=5,
)
RUNTIME = Runtime(0, 1, torch.device("cpu"), Log(None))


def load(path: Path, name: str) -> ModuleType:
    """A script as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleType]:
    """Every optimizer as a whole script."""
    folder, modules = tmp_path_factory.mktemp("submissions"), {}
    for name in NAMES:
        path = folder / f"{name}.py"
        assert submission.main([name, str(path)]) == 0
        modules[name] = load(path, f"submission_{name}")
    return modules


def walk(seed: int, count: int) -> np.ndarray:
    """Tokens below VOCAB: four in five times the last one plus 5, else any. A model that knows this
    has a loss of 1.3 nats, one that knows the frequencies alone ln 64 = 4.2."""
    random = np.random.default_rng(seed)
    jumps = np.where(random.random(count) < 0.8, 5, random.integers(0, VOCAB, count))
    return np.cumsum(jumps) % VOCAB


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training shards and one for validation."""
    folder = tmp_path_factory.mktemp("data")
    tokens = walk(1, 30_000)
    write_shard(folder / "proxy_train_1.bin", tokens[:1001])
    write_shard(folder / "proxy_train_2.bin", tokens[1001:])
    write_shard(folder / "proxy_val_0.bin", walk(2, 2000))
    return folder


def files(data: Path) -> dict[str, str]:
    return {
        "train_files": str(data / "proxy_train_*.bin"),
        "val_file": str(data / "proxy_val_0.bin"),
    }


def run(script: ModuleType, data: Path, folder: Path, **changes: object) -> dict:
    """Train SMALL, with these changes, by this script: the log's JSON."""
    changes = files(data) | {"log_dir": str(folder)} | changes
    config = script.Config(**(vars(SMALL) | changes))
    before = set(folder.glob("*.json"))
    runtime = Runtime(0, 1, torch.device("cpu"), script.Log(config.log_dir))
    script.check_config(config, 1)
    script.train(config, runtime)
    (path,) = set(folder.glob("*.json")) - before
    return json.loads(path.read_text())


# --- The fixed script -----------------------------------------------------------------------------


def test_script_is_short_and_its_section_is_the_muon_file():
    source = submission.SCRIPT.read_text()
    assert len(source.splitlines()) <= 500
    assert submission.make_submission(submission.OPTIMIZERS / "muon.py") == source


def test_sizes_are_those_of_the_rules():
    speedrun, proxy = PRESETS["speedrun"], PRESETS["proxy"]
    assert speedrun.sequences_per_step * speedrun.sequence_tokens == 524_288
    assert proxy.sequences_per_step * proxy.sequence_tokens == 131_072
    assert (speedrun.val_tokens, speedrun.val_every, speedrun.num_steps) == (10_485_760, 25, 3250)
    counts = {}
    for name in ("speedrun", "proxy"):
        with torch.device("meta"):
            model = GPT(PRESETS[name], Runtime(0, 1, torch.device("meta"), Log(None)))
        counts[name] = sum(param.numel() for param in model.parameters())
        assert model.embedding.weight.dtype == torch.bfloat16
        assert all(p.dtype == torch.float32 for p in list(model.parameters())[1:])
    assert counts == {"speedrun": 162_357_888, "proxy": 76_775_552}


def fresh_model(config: train_gpt_simple.Config = SMALL, seed: int = 1) -> GPT:
    torch.manual_seed(seed)
    model = GPT(config, RUNTIME)
    train_gpt_simple.initialize(model)
    return model


def random_batch(count: int, seed: int = 0) -> Batch:
    tokens = torch.randint(VOCAB, (count + 1,), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:-1], tokens[1:])


def test_loss_at_the_start_is_that_of_a_uniform_guess():
    config = dataclasses.replace(SMALL, vocab_size=50_304)
    batch = random_batch(64)
    loss = fresh_model(config)(batch).item() / 64
    assert loss == pytest.approx(math.log(50_304), abs=0.02)


def trained_like(model: GPT) -> GPT:
    """No matrix is zero, no gain 1: every part matters."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name != "embedding.weight":
                param.add_(0.1 * torch.randn_like(param))
    return model


def test_gradients_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model, batch, h = trained_like(fresh_model()).double(), random_batch(64), 1e-4
    model(batch).backward()
    for name, param in model.named_parameters():
        direction = torch.randn_like(param) + param.grad / param.grad.norm()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                param.add_(sign * h * direction)
                losses.append(model(batch).item())
                param.sub_(sign * h * direction)
        slope, expected = (losses[0] - losses[1]) / (2 * h), (param.grad * direction).sum().item()
        assert slope == pytest.approx(expected, rel=1e-3, abs=1e-3), name
        assert param.grad.norm() > 0 or name.endswith(".k.bias"), name


def test_model_is_the_one_of_the_readme():
    """The forward pass once more, with explicit sums in place of torch's functions."""
    model, batch = trained_like(fresh_model()), random_batch(64)

    def norm(x, layer):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight

    def linear(x, layer):
        return x @ layer.weight.T + layer.bias

    length, width, quarter = 32, SMALL.head_dim, SMALL.head_dim // 4
    t = torch.arange(length).float()[:, None]
    angle = t * torch.tensor([1024.0 ** (-i / (quarter - 1)) for i in range(quarter)])
    turn = torch.polar(torch.ones_like(angle), angle)
    total = 0.0
    with torch.no_grad():
        for tokens, targets in zip(batch.tokens.view(2, -1), batch.targets.view(2, -1)):
            x = norm(model.embedding.weight[tokens], model.embedding_norm)
            for block in model.blocks:
                y, outputs = norm(x, block.attention_norm), []
                for head in range(SMALL.model_dim // width):
                    part = slice(head * width, (head + 1) * width)
                    q, k, v = (linear(y, m)[:, part] for m in (block.q, block.k, block.v))
                    rotated = []
                    for z in (norm(q, block.q_norm), norm(k, block.k_norm)):
                        pairs = torch.complex(z[:, :quarter], z[:, quarter : 2 * quarter]) * turn
                        rotated.append(torch.cat([pairs.real, pairs.imag, z[:, 2 * quarter :]], 1))
                    scores = 0.12 * rotated[0] @ rotated[1].T
                    scores[torch.ones(length, length).triu(1).bool()] = -math.inf
                    outputs.append(scores.softmax(-1) @ v)
                x = x + linear(torch.cat(outputs, 1), block.out)
                hidden = linear(norm(x, block.mlp_norm), block.up).clamp_min(0) ** 2
                x = x + linear(hidden, block.down)
            z = linear(norm(x, model.head_norm), model.head)
            logits = 15 * z / (z**2 + 15**2).sqrt()
            total -= logits.log_softmax(-1)[torch.arange(length), targets].sum().item()
        assert model(batch).item() == pytest.approx(total, rel=1e-5)


def test_stream_crosses_shards_and_ignores_what_is_behind_the_end(data):
    stream = Tokens("train_files", files(data)["train_files"], VOCAB)
    tokens = walk(1, 30_000)
    assert stream.size == 30_000
    assert stream.read(990, 1010).tolist() == tokens[990:1010].tolist()
    batches = list(stream.batches(995, 1005, 4, 4))
    assert [b.tokens[0].item() for b in batches] == tokens[[995, 999, 1003]].tolist()
    assert torch.cat([b.targets for b in batches])[:10].tolist() == tokens[996:1006].tolist()
    assert batches[-1].targets.tolist() == [*tokens[1004:1006], IGNORED_TARGET, IGNORED_TARGET]


def test_steps_read_the_stream_once_in_order(data, tmp_path, monkeypatch):
    seen = []
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, b: (seen.append(b), forward(self, b))[1])
    run(train_gpt_simple, data, tmp_path, num_steps=3)
    size = SMALL.sequences_per_step * SMALL.sequence_tokens
    count = 3 * size // SMALL.micro_batch_tokens
    tokens = walk(1, 30_000)[: 3 * size + 1].tolist()
    assert torch.cat([batch.tokens for batch in seen[:count]]).tolist() == tokens[:-1]
    assert torch.cat([batch.targets for batch in seen[:count]]).tolist() == tokens[1:]


def test_validation_is_the_mean_over_all_targets(data):
    config = dataclasses.replace(SMALL, **files(data))
    model, tokens = trained_like(fresh_model()), torch.from_numpy(walk(2, 2000)[:481])
    whole = model(Batch(tokens[:-1], tokens[1:])).item() / 480
    assert train_gpt_simple.validate(model, config, RUNTIME, 480) == pytest.approx(whole, rel=1e-5)
    some = torch.where(torch.arange(480) < 470, tokens[1:], IGNORED_TARGET)
    expected = model(Batch(tokens[:-1], some)).item() / 470
    assert train_gpt_simple.validate(model, config, RUNTIME, 470) == pytest.approx(expected)


def test_a_pass_of_validation_is_no_larger_than_a_step(data, monkeypatch):
    sizes, forward = set(), GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda self, b: (sizes.add(len(b.tokens)), forward(self, b))[1]
    )
    config = dataclasses.replace(SMALL, **files(data), micro_batch_tokens=2**20)
    train_gpt_simple.validate(fresh_model(), config, RUNTIME, 480)
    assert sizes == {SMALL.sequences_per_step * SMALL.sequence_tokens}


def test_validation_is_rare_first_and_often_near_the_end(data, tmp_path):
    log = run(train_gpt_simple, data, tmp_path, num_steps=45, val_every=2)
    steps = [row["step"] for row in log["validations"]]
    assert steps == [20, *range(26, 46, 2), 45]
    source = submission.SCRIPT.read_text()
    assert PRESETS["speedrun"].val_every == 25 and "10 * config.val_every" in source


def test_log_is_that_of_a_record(data, tmp_path):
    """The tools read it; it begins with the script; a seed gives the same losses again."""
    first, second, other = (
        run(train_gpt_simple, data, tmp_path, num_steps=6, seed=seed) for seed in (1, 1, 2)
    )
    losses = [[row["train_loss"] for row in log["steps"]] for log in (first, second, other)]
    assert losses[0] == losses[1] != losses[2]
    path = tmp_path / f"{first['run_id']}.json"
    read = report.read_run(path)
    assert read.source == submission.SCRIPT.read_text()
    assert (read.num_steps, read.finished, read.seed, read.data_name) == (6, True, 1, "proxy")
    assert (read.num_targets, read.gpus) == (500, 0)
    assert read.tokens == 6 * SMALL.sequences_per_step * SMALL.sequence_tokens
    assert path.with_suffix(".png").stat().st_size > 1000


def test_checkpoint_has_the_validated_weights(data, tmp_path, scripts):
    path = tmp_path / "weights.pt"
    changes = {"num_steps": 20, "checkpoint": str(path)}
    log = run(scripts["muon_tail_average"], data, tmp_path, **changes)
    saved = torch.load(path, weights_only=True)
    assert saved["byte_tokens"] is True
    model = GPT(train_gpt_simple.Config(**saved["config"]), RUNTIME)
    model.load_state_dict(saved["weights"])
    config = dataclasses.replace(SMALL, **files(data))
    loss = train_gpt_simple.validate(model, config, RUNTIME, 500)
    assert loss == pytest.approx(log["summary"]["val_loss"], abs=1e-6)


# --- What goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "found"),
    [
        ("--nix 3", 2, "--nix"),
        ("--num_steps many", 2, "--num_steps"),
        ("--preset nix", 2, "--preset"),
        ("--num_steps 0", 1, "--num_steps 0"),
        ("--seed -1", 1, "--seed -1"),
        ("--dtype float16", 1, "float32"),
        ("--head_dim 12", 1, "--head_dim 12"),
        ("--micro_batch_tokens 100", 1, "multiple of 64 that divides 256"),
        ("--train_files nix_*.bin", 1, "--train_files nix_*.bin: no such file"),
        ("--val_file {data}/short.bin", 1, "short.bin: no whole shard"),
        ("--num_steps 120", 1, "lower --num_steps"),
        ("--vocab_size 60", 1, "outside the vocabulary of 60"),
        ("--log_dir {data}/short.bin", 1, "short.bin"),
        ("--checkpoint {data}/gone/weights.pt", 1, "weights.pt: give a file in a folder that"),
        ("--checkpoint {data}", 1, ": give a file in a folder that exists"),
    ],
)
def test_bad_options_end_in_one_line(data, tmp_path, capsys, options, code, found):
    (data / "short.bin").write_bytes(b"\0" * 1000)
    words = ["--preset", "tiny", "--log_dir", str(tmp_path), "--val_tokens", "100"]
    words += ["--num_steps", "3"]
    words += [f"--{name}={value}" for name, value in files(data).items()]
    try:
        result = train_gpt_simple.main(words + options.format(data=data).split())
    except SystemExit as stopped:
        result = stopped.code
    captured = capsys.readouterr()
    assert (result, len(captured.err.splitlines())) == (code, 1), captured.err
    assert captured.err.startswith("error: ") and found in captured.err


def test_loss_that_is_not_finite_ends_the_run(data, tmp_path, monkeypatch):
    def spoil(model):
        torch.nn.init.constant_(model.head.weight, math.nan)

    monkeypatch.setattr(train_gpt_simple, "initialize", spoil)
    with pytest.raises(train_gpt_simple.UserError, match="nan at step 1: lower the learning rates"):
        run(train_gpt_simple, data, tmp_path, num_steps=2)


def test_validation_loss_that_is_not_finite_ends_the_run(data, tmp_path, scripts, monkeypatch):
    """Where the last step spoils the weights, no training loss tells it."""
    step = train_gpt_simple.Optimizer.step

    def spoil(self, number):
        step(self, number)
        if number == 1:
            torch.nn.init.constant_(self.rules[0].param, math.nan)

    monkeypatch.setattr(train_gpt_simple.Optimizer, "step", spoil)
    with pytest.raises(train_gpt_simple.UserError, match="val_loss is nan at step 2: lower the"):
        run(train_gpt_simple, data, tmp_path, num_steps=2)


def test_a_checkpoint_that_cannot_be_written_leaves_the_log(data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    words = ["--preset", "tiny", "--log_dir", str(tmp_path), "--val_tokens", "100"]
    words += ["--num_steps", "2", "--checkpoint", str(tmp_path / "weights.pt")]
    words += [f"--{name}={value}" for name, value in files(data).items()]
    assert train_gpt_simple.main(words) == 1
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["summary"]["steps"] == 2


def test_ctrl_c_ends_with_its_code_and_no_traceback(data, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_gpt_simple, "train", interrupt)
    assert train_gpt_simple.main(["--preset", "tiny", "--log_dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_log_has_the_script_that_runs(data, tmp_path):
    """Not what has taken its place on the disk since."""
    path = tmp_path / "changing.py"
    path.write_text(before := submission.SCRIPT.read_text())
    spec = importlib.util.spec_from_file_location("changing", path)
    script = sys.modules["changing"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path.write_text(before.replace("MUON_LR, ", "# "))
    log = run(script, data, tmp_path, num_steps=1)
    assert (tmp_path / f"{log['run_id']}.txt").read_text().startswith(before + "=" * 100)


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        train_gpt_simple.main(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for field in dataclasses.fields(train_gpt_simple.Config):
        assert f"--{field.name} X {field.metadata['help']}" in text


# --- Optimizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_lowers_the_loss(data, tmp_path, scripts, name):
    log = run(scripts[name], data, tmp_path, num_steps=100)
    first, last = log["steps"][0]["train_loss"], log["summary"]["val_loss"]
    assert first == pytest.approx(math.log(VOCAB), abs=0.1)
    assert last < 2.0, "the walk has an entropy of 1.3 nats, the frequencies alone give 4.2"
    written = (tmp_path / f"{log['run_id']}.txt").read_text().split("=" * 100)[0]
    assert written == Path(scripts[name].__file__).read_text(), "the whole script is in the log"


def test_bf16_trains_like_fp32(data, tmp_path, scripts):
    """As on a GPU: activations and embedding in bf16, all other weights in fp32."""
    logs = [
        run(scripts["best"], data, tmp_path, num_steps=60, dtype=dtype)
        for dtype in ("bfloat16", "float32")
    ]
    losses = [log["summary"]["val_loss"] for log in logs]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_the_fixed_part_of_a_submission_is_unchanged(scripts, name):
    ours = submission.split(submission.SCRIPT.read_text(), "ours")
    theirs = submission.split(Path(scripts[name].__file__).read_text(), name)
    assert (theirs[0], theirs[2]) == (ours[0], ours[2])
    assert (theirs[1] == ours[1]) == (name == "muon")
    rules.check_script(Path(scripts[name].__file__).read_text())


def test_every_optimizer_says_its_source():
    for name in NAMES:
        section = (submission.OPTIMIZERS / f"{name}.py").read_text().split(submission.BEGIN)[1]
        comment = "".join(itertools.takewhile(lambda x: x[0] == "#", section.splitlines(True)))
        assert re.search(r"\b(19|20)\d\d\b", comment), name
        assert "import" not in re.sub(r"#.*", "", section), name


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_orthogonalize_brings_singular_values_to_one(shape):
    x = matrix(*shape)
    y = train_gpt_simple.orthogonalize(1e-3 * x)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert torch.allclose(y, u @ v, atol=0.02)


def stepped(rule: object, grads: list[torch.Tensor], lr_factor: float = 1.0) -> torch.Tensor:
    """The parameter after steps with these gradients."""
    with torch.no_grad():
        for step, grad in enumerate(grads):
            rule.param.grad = grad
            rule.step(step, lr_factor)
    return rule.param.detach()


def test_adamw_is_torchs():
    start, grads = matrix(5, 7), [matrix(5, 7, seed) for seed in range(1, 5)]
    rule = train_gpt_simple.AdamW(torch.nn.Parameter(start.clone()), 0.1)
    param = torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([param], 0.1, (0.8, 0.95), 1e-10, 0.001)
    for grad in grads:
        param.grad = grad
        theirs.step()
    assert torch.allclose(stepped(rule, grads), param.detach(), atol=1e-5)


def test_muon_step_by_hand():
    start, grads = matrix(24, 8), [matrix(24, 8, seed) for seed in (1, 2)]
    rule = train_gpt_simple.Muon(torch.nn.Parameter(start.clone()))
    momentum, expected = torch.zeros(24, 8), start.clone()
    for grad in grads:
        momentum = 0.95 * momentum + 0.05 * grad
        u, _, v = torch.linalg.svd(0.05 * grad + 0.95 * momentum, full_matrices=False)
        expected = expected * (1 - 0.5 * 0.025 * 0.05) - 0.5 * 0.025 * math.sqrt(3) * u @ v
    assert torch.allclose(stepped(rule, grads, 0.5), expected, atol=1e-3)


def test_normuon_keeps_the_norm_and_evens_out_neurons(scripts):
    rule = scripts["normuon"].NorMuon(torch.nn.Parameter(torch.zeros(48, 8)))
    grad = matrix(48, 8) * torch.linspace(0.1, 3, 48)[:, None]
    update = stepped(rule, [grad]) / (0.025 * math.sqrt(6))
    assert update.norm().item() == pytest.approx(math.sqrt(8), rel=0.02), (
        "that of 8 orthogonal ones"
    )
    rows = update.norm(dim=1)
    assert (rows.std() / rows.mean()).item() < 1e-3
    before = train_gpt_simple.orthogonalize(0.05 * grad).norm(dim=1)
    assert (before.std() / before.mean()).item() > 0.3


@pytest.mark.parametrize(("name", "rule"), [("soap", "Soap"), ("best", "SoapMuon")])
def test_soap_turns_with_the_problem(scripts, name, rule):
    """A rotation of rows and columns of all gradients rotates the updates: no other basis than that
    of the gradients counts. (The row floor is of the rows as they are, so it is left out.)"""
    make = getattr(scripts[name], rule)
    left, right = (torch.linalg.qr(matrix(8, 8, seed))[0] for seed in (50, 51))
    grads = [matrix(8, 8, seed) for seed in range(12)]
    results = []
    for turned in (grads, [left @ grad @ right for grad in grads]):
        param = torch.nn.Parameter(torch.zeros(8, 8))
        with pytest.MonkeyPatch.context() as patch:
            if name == "best":
                patch.setattr(scripts[name], "ROW_FLOOR", 0.0)
                patch.setattr(scripts[name], "MUON_WEIGHT_DECAY", 0.0)
            results.append(stepped(make(param), turned))
    assert torch.allclose(left @ results[0] @ right, results[1], atol=0.02 * results[1].abs().max())
    assert results[0].abs().max() > 1e-3


def test_soap_is_adam_where_the_gradients_have_the_standard_basis(scripts):
    """Gradients with one entry a row and a column: the products are diagonal."""
    rule = scripts["soap"].Soap(torch.nn.Parameter(torch.zeros(4, 4)))
    grads = [torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]) * scale) for scale in (1.0, 0.5, -0.2)]
    mean = square = torch.zeros(4)
    expected = torch.zeros(4)
    for step, grad in enumerate(grads[1:], 1):  # the first one gives the basis alone
        mean, square = 0.95 * mean + 0.05 * grad.diag(), 0.95 * square + 0.05 * grad.diag() ** 2
        bias = 1 - 0.95**step
        expected = expected * (1 - 0.002 * 0.1) - 0.002 * (mean / bias) / (square / bias).sqrt()
    assert torch.allclose(stepped(rule, grads).diag(), expected, rtol=1e-3)


def test_best_has_a_row_floor_and_cautious_decay(scripts):
    best = scripts["best"]
    rows = []
    for floor in (0.0, best.ROW_FLOOR):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(best, "ROW_FLOOR", floor)
            rule = best.SoapMuon(torch.nn.Parameter(torch.zeros(400, 4)))
            grads = [matrix(400, 4, seed) for seed in (1, 2)]
            update = stepped(rule, grads) / (best.MUON_LR * 10)
        rows.append(update.norm(dim=1))
    floor = best.ROW_FLOOR * math.sqrt(4 / 400)
    short = rows[0] < 0.99 * floor
    assert 2 <= short.sum() < 200
    assert torch.allclose(rows[1][short], torch.tensor(floor), rtol=0.02)
    assert torch.allclose(rows[1][~short], rows[0][~short], rtol=0.02)
    param = torch.tensor([1.0, 1.0, -1.0, -1.0])
    best.decay_and_step_(param, torch.tensor([0.1, -0.1, 0.1, -0.1]), 0.5, 0.2)
    assert torch.allclose(param, torch.tensor([0.8, 1.1, -1.1, -0.8]))


def test_learning_rate_is_constant_and_falls_to_zero(scripts):
    """By the factor that the rules are given."""
    for name, floor in (("muon", 0.0), ("best", 0.1)):
        seen = []
        optimizer = scripts[name].Optimizer(fresh_model(), 100)

        class Rule:
            def step(self, step, lr_factor, seen=seen):
                seen.append(lr_factor)

        optimizer.rules = [Rule()]
        for step in range(100):
            optimizer.step(step)
        assert seen[:31] == [1.0] * 31
        steps = np.diff(seen[31:])
        assert np.allclose(steps, -(1 - floor) / 70)
        assert seen[-1] == pytest.approx(floor + (1 - floor) / 70)


def test_tail_average_is_validated_and_the_weights_come_back(scripts):
    script = scripts["muon_tail_average"]
    model = fresh_model()
    optimizer, weight = script.Optimizer(model, 100), model.head.weight
    optimizer.rules = []
    share, average = 1 / 3, None
    for step in range(100):
        with torch.no_grad():
            weight.fill_(step)
        optimizer.step(step)
        if step >= 80:
            average = step if average is None else average + share * (step - average)
        with optimizer.validation_weights():
            expected = step if average is None else average
            assert weight[0, 0].item() == pytest.approx(expected, rel=1e-5)
        assert weight[0, 0].item() == step


# --- Submissions ----------------------------------------------------------------------------------


def test_a_file_of_ones_own_becomes_a_script(tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text((submission.OPTIMIZERS / "muon.py").read_text().replace("0.025", "0.03"))
    target = tmp_path / "new" / "script.py"
    assert submission.main([str(mine), str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    expected = submission.SCRIPT.read_text().replace("0.025", "0.03")
    assert target.read_text() == expected


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda text: text.replace("begin of the", "start of the"), "it needs this line once"),
        (lambda text: text.replace("import math", "import scipy"), "does not import scipy"),
        (lambda text: text + "    def (\n", "mine.py, line"),
        (lambda text: text.replace("NUM_STEPS =", "STEPS ="), "its section has no NUM_STEPS"),
        (lambda text: text.replace("def initialize(", "def begin("), "has no initialize"),
        (lambda text: text.replace("class Optimizer:", "class Mine:"), "has no Optimizer"),
        (lambda text: text.replace("def validation_weights(", "def rest("), "validation_weights()"),
        (lambda text: text.replace('"proxy": 1000, ', ""), "NUM_STEPS needs a number for each"),
        (lambda text: text.replace("1000", "1e3"), "NUM_STEPS needs a number for each preset"),
        (
            lambda _: submission.SCRIPT.read_text().replace("scale=0.12", "scale=0.13"),
            "differs from train_gpt_simple.py outside the Optimizer section",
        ),
    ],
)
def test_a_file_that_is_no_section_is_refused_in_words(tmp_path, capsys, change, found):
    mine = tmp_path / "mine.py"
    mine.write_text(change((submission.OPTIMIZERS / "muon.py").read_text()))
    assert submission.main([str(mine), str(tmp_path / "script.py")]) == 1
    assert found in capsys.readouterr().err
    assert not (tmp_path / "script.py").exists()


def test_a_script_that_a_run_may_be_about_to_read_is_not_replaced(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(submission, "ROOT", tmp_path)
    mine, texts = tmp_path / "mine.py", []
    for rate in "0.025", "0.03", "0.03", "0.025":
        mine.write_text((submission.OPTIMIZERS / "muon.py").read_text().replace("0.025", rate))
        assert submission.main([str(mine)]) == 0
        path = Path(capsys.readouterr().out.strip())
        texts.append((path, f"MUON_WEIGHT_DECAY = {rate}," in path.read_text()))
    assert [good for _, good in texts] == [True] * 4
    assert texts[0] == texts[3] == (tmp_path / "logs" / "optimization_mine.py", True)
    assert texts[1] == texts[2] != texts[0]


def test_records_have_the_fixed_part_as_it_is_or_was():
    """An earlier one is listed with a record that has it; its section goes into today's script."""
    source = submission.SCRIPT.read_text()
    parts = {path: rules.script_parts(path.read_text())[0] for path in submission.EARLIER}
    assert all(part != rules.our_parts()[0] for part in parts.values())
    for path in submission.EARLIER:
        rules.check_script(path.read_text())
    muon = submission.HERE / "2026-11-30_muon" / "train_gpt.py"
    assert rules.script_parts(submission.make_submission(muon)) == rules.script_parts(source)


def test_an_unknown_name_is_told_the_known_ones(capsys):
    assert submission.main(["nix"]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(name in error for name in NAMES)


def test_the_fixed_part_is_compared_as_code():
    source = submission.SCRIPT.read_text()
    fixed = submission.fixed_part(source, "ours")
    for old, new, same in (
        ("0.025", "0.5", True),  # in the Optimizer section
        ("# RMS", "# rms", True),
        ('"""Train a fixed GPT', '"""Claim', True),
        ("scale=0.12", "scale=0.13", False),
        ('512, "sequences', '256, "sequences', False),
        ('reduction="sum"', 'reduction="mean"', False),
    ):
        assert (submission.fixed_part(source.replace(old, new), "theirs") == fixed) == same, old


# --- Rules and records ----------------------------------------------------------------------------


def test_rules_on_numbers_computed_by_hand():
    # (3.28 - 3.277) * sqrt(4) = 0.006; (3.28 - 3.2785) * 2 = 0.003
    assert target_statistic([3.276, 3.278, 3.277, 3.277], 3.28) == pytest.approx(0.006)
    assert passes([3.276, 3.278, 3.277, 3.277], 3.28)
    assert not passes([3.2785] * 4, 3.28)
    # 100 steps fewer at the same loss, 1 / sqrt(1/4 + 1/4) = sqrt(2): 0.0045 * 1.41421 = 0.0063640
    old, new = Result(3250, [3.277] * 4, True), Result(3150, [3.277] * 4, True)
    assert pairwise_statistic(old, new) == pytest.approx(0.0063640, abs=1e-6)
    assert pairwise_statistic(new, old) == pytest.approx(-0.0063640, abs=1e-6)
    # 50 steps fewer, 0.001 worse, n 1 and 3: (0.00225 - 0.001) / sqrt(4 / 3) = 0.0010825
    old, new = Result(3000, [3.278], True), Result(2950, [3.279] * 3, True)
    assert pairwise_statistic(old, new) == pytest.approx(0.0010825, abs=1e-6)


def test_all_runs_stop_at_one_step():
    curves = [
        {100: 3.29, 125: 3.279, 150: 3.276, 175: 3.27},
        {100: 3.28, 125: 3.279, 150: 3.276, 200: 3.27},
    ]
    result = stop(curves, 3.28)  # at 125: 0.001 * sqrt(2) is too little
    assert (result.step, result.losses, result.reached) == (150, [3.276, 3.276], True)
    assert [rules.first_below(curve, 3.28) for curve in curves] == [125, 100]
    result = stop(curves, 3.2)
    assert (result.step, result.reached) == (150, False)
    assert rules.first_below(curves[0], 3.2) is None


@pytest.fixture(scope="module")
def logs(data, scripts, tmp_path_factory) -> dict[str, Path]:
    """A proxy race of small models: the logs of three runs each of the baseline and of AdamW."""
    folders = {}
    for name, num_steps in (("muon", 30), ("adamw", 60)):
        folders[name] = tmp_path_factory.mktemp(name)
        for seed in (1, 2, 3):
            changes = {"num_steps": num_steps, "seed": seed, "val_every": 5}
            run(scripts[name], data, folders[name], **changes)
    return folders


@pytest.fixture
def race(logs, tmp_path, monkeypatch, capsys):
    """The tool in a repository of its own, where the small model is that of the proxy race. Returns
    what was printed; errors if it is to fail with code 1."""
    monkeypatch.setattr(train_gpt_simple, "PRESETS", {"proxy": SMALL})
    monkeypatch.setattr(train_gpt_simple, "NUM_STEPS", {"proxy": 30})
    for name, path in (("ROOT", "."), ("RECORDS", "records"), ("LOGS", "logs")):
        monkeypatch.setattr(report, name, tmp_path / path)
    monkeypatch.setattr(report, "options_of", lambda run, script: ["--preset", "proxy"])
    monkeypatch.chdir(tmp_path)
    shutil.copytree(logs["muon"], "new/muon")
    shutil.copytree(logs["adamw"], "new/adamw")
    page = Path("records/optimization/README.md")
    page.parent.mkdir(parents=True)
    page.write_text(f"Above\n{report.TABLE}\nold\n{report.TABLE_END}\nBelow\n")

    def call(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        found = report.main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        assert found == code, out + err
        return err if code else out

    return call


def record(race, name: str, code: int = 0) -> str:
    return race("record", name, "--logs", *sorted(Path("new", name).glob("*.txt")), code=code)


def cells(page: str) -> dict[str, str]:
    """The first table of a record's page."""
    return dict(re.findall(r"^\| ([a-z -]+) \| (.*) \|$", page, re.MULTILINE))


def test_records_and_their_table(race):
    """The steps, and the tests of the rules, from the logs themselves."""
    assert "which this record sets" in record(race, "muon")
    out = record(race, "adamw")
    races = Path("records/optimization")
    muon, adamw = next(races.glob("2*_muon")), next(races.glob("2*_adamw"))
    race("history")
    results = {
        path.name[11:]: [json.loads(log.read_text()) for log in sorted(path.glob("*.json"))]
        for path in (muon, adamw)
    }
    target = sum(log["summary"]["val_loss"] for log in results["muon"]) / 3
    curves = [
        {row["step"]: row["val_loss"] for row in log["validations"]} for log in results["adamw"]
    ]
    means = {step: sum(curve[step] for curve in curves) / 3 for step in curves[0]}
    steps = [step for step, mean in means.items() if (target - mean) * math.sqrt(3) >= 0.004]
    assert steps, "the race is too short for AdamW to reach the target"
    gain = target - means[steps[0]] + (30 - steps[0]) * 0.0045 / 100
    number = f"{gain / math.sqrt(2 / 3):+.4f}".replace("-", "−")

    page = (races / "README.md").read_text()
    assert page.startswith("Above\n") and page.endswith("Below\n") and "old" not in page
    whole = Path("records/README.md").read_text()
    for text, prefix in ((page, ""), (whole, "optimization/")):
        assert "### The proxy race, 131,072 tokens a step, proxy corpus\n" in text
        assert f"Target: {target:.4f}." in text
        baseline = rf"\[muon\]\({prefix}{muon.name}\) \(baseline\) \| 30 \|.*sets the target"
        assert re.search(baseline, text)
        assert f"| [adamw]({prefix}{adamw.name}) | {steps[0]} |" in text
        assert re.search(rf"\| adamw \| muon \| {re.escape(number)} \|", text)
    assert re.search(r"^\| optimization \| fewest .* \| 2 \|$", whole, re.MULTILINE)
    assert "## Main track" not in whole
    assert Path("records/history_optimization.png").stat().st_size > 1000
    assert not Path("records/history.png").exists()

    table = cells((adamw / "README.md").read_text())
    assert table["track"] == "optimization" and table["schedule"] == "60 steps"
    assert table["runs"].endswith(" 1, 2, 3 (proxy data, not FineWeb; preset proxy: no claim)")
    assert table["steps to the target"].startswith(f"{steps[0]}, loss {means[steps[0]]:.4f}")
    assert f": {'yes' if gain / math.sqrt(2 / 3) >= 0.004 else 'no'} (" in table["pairwise test"]
    assert f"steps to the target: {steps[0]}, loss " in out and "](" not in out
    assert re.fullmatch(r"all steps [\d.]+ ± [\d.]+", table["ms a step"])
    text = (adamw / "README.md").read_text()
    assert f"## Against the baseline of its race\n\n[muon](../{muon.name}): " in text
    assert "This is the baseline." in (muon / "README.md").read_text()


def test_compare_has_the_test_of_two_methods(race):
    record(race, "muon")
    record(race, "adamw")
    folders = [next(Path("records/optimization").glob(f"2*_{name}")) for name in ("muon", "adamw")]
    losses = [[run.loss for run in report.Record(folder).runs] for folder in folders]
    gain = sum(losses[0]) / 3 - sum(losses[1]) / 3 - 30 * 0.0045 / 100
    value = gain / math.sqrt(2 / 3)
    better = "better" if value >= 0.004 else "not better"
    out = race("compare", *folders, "--logs")
    assert f"at the ends of their runs: {value:+.4f}, B is {better} than A (at least 0.004)" in out
    assert re.search(r"^steps +30 ± 0 +60 ± 0 +2\.0000$", out, re.MULTILINE)


def rewrite(path: Path, change) -> None:
    """Change the config in both files of a run."""
    for each in (path, path.with_suffix(".txt")):
        each.write_text(change(each.read_text()))


def test_runs_against_the_rules_are_refused(race, monkeypatch):
    path = min(Path("new/adamw").glob("*.json"))
    files = [path, path.with_suffix(".txt")]
    before = [each.read_text() for each in files]

    def refused(found: str) -> None:
        assert found in record(race, "adamw", code=1)
        for each, text in zip(files, before):
            each.write_text(text)

    def everywhere(old: str, new: str) -> None:
        for each in Path("new/adamw").glob("*.*[tn]"):
            each.write_text(each.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")

    rewrite(path, lambda text: text.replace('"val_every": "5"', '"val_every": "6"'))
    refused("have different options")
    seed = json.loads(before[0])["config"]["seed"]
    other = "2" if seed != "2" else "3"
    rewrite(path, lambda text: text.replace(f'"seed": "{seed}"', f'"seed": "{other}"'))
    refused("has the seed of")
    files[1].write_text(before[1].replace("HIDDEN_LR, EMB", "HIDDEN_LR, EMB  ", 1))
    refused("it begins with another script")
    for old, new, found in (
        ("on 500 targets", "on 499 targets", "validated on 499 targets"),
        ('"num_steps": "60"', '"num_steps": "90"', "the run is not finished"),
        ('"layers": "2"', '"layers": "3"', "its fixed options are those of no preset"),
        ('"val_every": "5"', '"val_every": "4"', "--val_every 4 gives more chances to pass"),
        ("scale=0.12", "scale=0.13", "differs from train_gpt_simple.py outside the Optimizer sec"),
    ):
        everywhere(old, new)
        refused(found)
        everywhere(new, old)
    assert race("record", "a", "--track", "main", "--logs", path, code=1) == (
        f"\nerror: {path}: a log of the optimization track: give --track optimization, or other "
        "logs\n"
    )
    assert not list(Path("records/optimization").glob("2*"))
    assert "steps to the target: no target: the Muon baseline" in record(race, "adamw")
    race("history")
    assert "No target yet" in Path("records/README.md").read_text()
    Path("records/optimization/README.md").write_text("no table")
    assert "needs the lines" in race("history", code=1)


def test_the_race_on_fineweb_has_the_target_of_the_track(race):
    """A claim there needs three runs and the test of the rules."""
    presets = train_gpt_simple.PRESETS
    presets["speedrun"] = presets.pop("proxy")
    for path in Path("new/adamw").glob("*.*[tn]"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("proxy_", "fineweb_"), encoding="utf-8")
    train_gpt_simple.NUM_STEPS["speedrun"] = 30
    record(race, "adamw")
    (folder,) = Path("records/optimization").glob("2*")
    method = report.Record(folder)
    assert method.target == 3.28 and method.kind == "the race, 524,288 tokens a step, FineWeb"
    first = next(
        step
        for step in method.curves[0]
        if (3.28 - sum(curve[step] for curve in method.curves) / 3) * math.sqrt(3) >= 0.004
    )
    assert method.stop(3.28).step == first and method.shortfalls == []
    for run in method.runs:
        run.validations = [{**row, "val_loss": row["val_loss"] + 3} for row in run.validations]
    assert method.shortfalls == ["mean loss not below 3.28 by the rules"]
    method.runs = method.runs[:2]
    assert method.shortfalls == ["fewer than 3 runs"]


def test_a_record_is_repeated_by_its_own_options(tmp_path, data, logs):
    """The script itself is asked for its presets."""
    run = report.read_run(next(logs["muon"].glob("*.json")))
    shutil.copy(submission.SCRIPT, tmp_path / "train_gpt.py")
    options = report.options_of(run, tmp_path / "train_gpt.py")
    config = train_gpt_simple.parse_args([*options, f"--seed={run.seed}"])  # which knows them all
    again = train_gpt_simple.config_as_text(config) | {"log_dir": run.config["log_dir"]}
    tools = {name: run.config[name] for name in run.config.keys() - again.keys()}
    assert again | tools == run.config and options[:2] == ["--preset", "tiny"]
    assert tools.pop("track") == "optimization" and len(tools) == 3


def test_table_of_the_readme_is_that_of_the_logs():
    page = (HERE / "README.md").read_text()
    records = [record for record in report.all_records() if record.in_steps]
    text = report.race_tables(records, HERE)
    assert report.with_table(page, text) == page
    assert (text == f"{report.NO_RUNS}\n") == (not any(HERE.glob("*/*.json")))


# --- run.sh ---------------------------------------------------------------------------------------


def test_run_sh_starts_the_script_and_submissions(tmp_path):
    copy = Copy(tmp_path)
    script = f"{copy.root}/records/optimization/train_gpt_simple.py"
    calls, _, _ = copy.run("optimization", "--num_steps", "3")
    assert calls[-1][-1] == f"{script} --num_steps 3"
    made = f"{copy.root}/logs/optimization_soap.py"
    (copy.notes / "does").write_text(f"[[ $* != *submission.py* ]] || echo '{made}'\n")
    calls, _, _ = copy.run("optimization", "soap", "--num_steps", "3")
    assert calls[0][-1] == f"{copy.root}/records/optimization/submission.py soap"
    assert calls[-1][-1] == f"{made} --num_steps 3"
    (copy.notes / "does").write_text("[[ $* != *submission.py* ]] || exit 1\n")
    calls, _, _ = copy.run("optimization", "nix", code=1)
    assert len(calls) == 1


# --- Runs of one record ---------------------------------------------------------------------------


def set_option(path: Path, name: str, value: str) -> None:
    """Of one run, in both of its files."""
    before = json.loads(path.read_text())["config"][name]
    rewrite(path, lambda text: text.replace(f'"{name}": "{before}"', f'"{name}": "{value}"'))


def test_runs_of_one_record_may_differ_in_what_the_rules_leave_free(race):
    """In the size of a micro-batch, the checkpoint, and where the same shards lie."""
    path = sorted(Path("new/adamw").glob("*.json"))[1]
    old = json.loads(path.read_text())["config"]
    changes = {
        "micro_batch_tokens": "128",
        "checkpoint": "weights.pt",
        "train_files": f"elsewhere/{Path(old['train_files']).name}",
    }
    for name, new in changes.items():
        set_option(path, name, new)
    assert json.loads(path.read_text())["config"] == old | changes
    record(race, "adamw")
    (folder,) = Path("records/optimization").glob("2*_adamw")
    assert cells((folder / "README.md").read_text())["runs"].startswith("3, seeds ")
    before = path.read_text(), path.with_suffix(".txt").read_text()
    for name, new in (
        ("train_files", "proxy_train_0*.bin"),
        ("val_file", "proxy_val_1.bin"),
        ("val_every", "10"),
        ("num_steps", "61"),
    ):
        set_option(path, name, new)
        error = race("record", "other", "--logs", *Path("new/adamw").glob("*.txt"), code=1)
        assert f"  {name}: " in error
        path.write_text(before[0])
        path.with_suffix(".txt").write_text(before[1])


def no_launch(*_: object) -> None:
    pytest.fail("it has trained")


def test_rules_are_applied_before_anything_is_run(race, monkeypatch, capsys):
    """To the script, the options and the seeds; and the track is told by the script."""
    monkeypatch.setattr(report, "clean_copy", no_launch)
    source = submission.SCRIPT.read_text()
    Path("ours.py").write_text(source)
    Path("other.py").write_text(source.replace("scale=0.12", "scale=0.13"))
    Path("plain.py").write_text("x = 1\n")
    ours, three = ("record", "a", "--script", "ours.py"), ("--runs", 3)
    error = race("record", "a", "--script", "other.py", *three, "--", "--preset", "proxy", code=1)
    assert "other.py: its script differs from train_gpt_simple.py outside the Optim" in error
    error = race("record", "a", "--script", "plain.py", "--track", "optimization", *three, code=1)
    assert "plain.py: its script is no submission" in error
    error = race(*ours, "--track", "main", *three, code=1)
    assert "ours.py: a script of the optimization track: give --track optimization" in error
    error = race(*ours, *three, "--", "--preset", "proxy", "--layers", "3", code=2)
    assert "options after --: its fixed options are those of no preset" in error
    for words in (["--preset", "nix"], ["--preset", "proxy", "--nix", "3"]):
        with pytest.raises(SystemExit) as stopped:
            report.main(["record", "a", "--script", "ours.py", "--runs", "3", "--", *words])
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and err.count("\n") == 1 and "nix" in err
    record(race, "adamw")
    options = "--", "--preset", "proxy", "--seed", "2"
    error = race("record", "adamw", "--runs", 1, *options, code=2)
    assert "--seed after --: the record has seed 2: give another" in error
    with pytest.raises(pytest.fail.Exception, match="it has trained"):  # what the rules allow
        race(*ours, *three, "--", "--preset", "proxy", "--micro_batch_tokens", "32")


def test_more_runs_of_a_record_are_of_its_own_script(race, monkeypatch):
    """Which is not that of the track."""
    record(race, "adamw")
    started = []

    def launch(folder: Path, options: list[str], seed: int) -> None:
        started.append(((folder / "train_gpt.py").read_text(), options, seed))
        raise report.ReportError("no more")

    monkeypatch.setattr(report, "launch", launch)
    Path("run.sh").write_text("")
    assert "no more" in race("record", "adamw", "--runs", 1, code=1)
    (folder,) = Path("records/optimization").glob("2*_adamw")
    own = folder / "train_gpt.py"
    assert started == [(own.read_text(), ["--preset", "proxy"], 4)]
    error = race("record", "adamw", "--runs", 1, "--script", submission.SCRIPT, code=1)
    assert f"has another script than {submission.SCRIPT}: choose another name" in error
    assert f", or give --script {own}\n" in error


def test_a_section_alone_is_no_script(race, monkeypatch):
    monkeypatch.setattr(report, "clean_copy", no_launch)
    shutil.copy(submission.OPTIMIZERS / "soap.py", "mine.py")
    shutil.copy(submission.SCRIPT, "whole.py")
    message = (
        "\nerror: mine.py: is the Optimizer section of a submission alone: make the script by "
        "python records/optimization/submission.py mine.py, which prints its path\n"
    )
    assert race("record", "a", "--script", "mine.py", "--runs", 1, code=1) == message
    assert race("compare", "whole.py", "mine.py", code=1) == message
    assert race("compare", "mine.py", "whole.py", "--logs", code=1) == message


def test_the_command_of_a_page_makes_the_records_script_and_trains_it(race, tmp_path):
    """From the root of the repository: run.sh makes the script of the section that is in it."""
    record(race, "adamw")
    (folder,) = Path("records/optimization").glob("2*_adamw")
    page = (folder / "README.md").read_text()
    command = re.search(r"1, 2, 3\), in the root of the repository:\n\n```bash\n(.*)\n```", page)[1]
    launcher, track, script, *options = shlex.split(command)
    assert (launcher, track, script) == ("./run.sh", "optimization", f"{folder}/train_gpt.py")
    made = tmp_path / "made.py"
    assert submission.main([script, str(made)]) == 0
    assert made.read_text() == (folder / "train_gpt.py").read_text()
    assert options == ["--preset", "proxy", "--seed", "SEED"]
    assert train_gpt_simple.parse_args([*options[:-1], "3"]) == dataclasses.replace(SMALL, seed=3)


def baseline_record(name: str, seeds: list[int]) -> Path:
    """A folder with these runs of the Muon baseline, as `record` leaves it."""
    folder = report.RECORDS / "optimization" / name
    folder.mkdir()
    for path in Path("new/muon").glob("*.json"):
        if json.loads(path.read_text())["config"]["seed"] in map(str, seeds):
            for each in (path, path.with_suffix(".txt")):
                shutil.copy(each, folder)
    shutil.copy(submission.SCRIPT, folder / "train_gpt.py")
    return folder


def test_target_is_that_of_the_first_baseline_with_three_runs(race):
    """A target of fewer runs is called provisional; no seed of the baseline is counted by it."""
    one, two, three = (
        report.Record(baseline_record(f"2026-01-0{len(seeds)}_muon_{len(seeds)}", seeds))
        for seeds in ([1], [1, 2], [1, 2, 3])
    )
    for records, setter, text in (
        ([one], one, ", provisional: 1 run."),
        ([two, one], two, ", provisional: 2 runs."),
        ([one, two, three], three, "."),
    ):
        found = report.Race(records)
        assert found.target_setter is found.baseline is setter
        target = sum(run.loss for run in setter.runs) / len(setter.runs)
        table = report.race_table(found, Path("records/optimization"))
        assert table.startswith(f"Target: {target:.4f}{text}\n")
        (row,) = (line for line in table.splitlines() if "(baseline) |" in line)
        assert setter.folder.name in row and "(baseline) | 30 | – |" in row
    shutil.rmtree(two.folder)
    shutil.rmtree(three.folder)
    page = report.write_page(one.folder).readme
    steps = cells(page)["steps to the target"]
    assert steps.endswith(", which this record sets, provisional: 1 run")


def test_toys_that_history_leaves_out_are_named(race, monkeypatch):
    record(race, "muon")
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt_simple, "PRESETS", {"tiny": SMALL})
        patch.setattr(train_gpt_simple, "NUM_STEPS", {"tiny": 30})
        record(race, "adamw")
        toys = sorted(map(str, Path("records/optimization").glob("2*")))
        assert race("history").endswith(f": 0 records, 2 toy runs left out: {', '.join(toys)}\n")
    monkeypatch.setattr(report.Record, "is_toy", property(lambda of: "adamw" in str(of.folder)))
    (toy,) = Path("records/optimization").glob("2*_adamw")
    assert race("history").endswith(f": 1 record, 1 toy run left out: {toy}\n")


def test_curves_of_the_race_have_a_marker_at_each_validation(race, monkeypatch):
    """So that the line between two of them is not taken for measured."""
    record(race, "adamw")
    figures = keep_figures(monkeypatch)
    race("history")
    (axes,) = figures[-1].axes
    (line,) = (line for line in axes.get_lines() if len(line.get_xdata()) > 1)
    (folder,) = Path("records/optimization").glob("2*_adamw")
    assert list(line.get_xdata()) == [*report.Record(folder).curves[0]]
    assert line.get_marker() == "o" and line.get_markersize() < 5
