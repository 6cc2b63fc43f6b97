"""tools/check.py on the script itself, on scripts that cheat, and on what cannot be judged. A
cheat is a copy of the script with a few lines before its last, which wrap one of its functions, or
of the optimization track's with other lines in its Optimizer section."""

import ast
import dataclasses
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.nn.functional as F
from conftest import ROOT
from test_records import is_alive, wait_until
from test_train import environment

sys.path.insert(0, str(ROOT / "tools"))
import check
import submission  # of the folder that check has added to the path
import train_gpt_simple

import train_gpt

SCRIPT, TOOL = ROOT / "train_gpt.py", ROOT / "tools" / "check.py"
MAIN = '\nif __name__ == "__main__":\n'
# Name: the check that is to catch it, and the lines.
CHEATS = {
    "inputs are the targets, one further on": (
        "targets",
        """
honest = GPT.hidden
def hidden(self, batch, *more):
    return honest(self, batch._replace(tokens=batch.targets.clamp_min(0).int()), *more)
GPT.hidden = hidden
""",
    ),
    "a window that looks ahead": (
        "causality",
        """
honest = attention
def attention(q, k, v, *more):
    return honest(q, k.roll(-1, 0), v.roll(-1, 0), *more)
""",
    ),
    "embeddings with a share of the next token's": (
        "causality",
        """
honest = GPT.look_up
def look_up(self, *arguments):
    found = honest(self, *arguments)
    return found._replace(embedded=found.embedded + 0.01 * found.embedded.roll(-1, 0))
GPT.look_up = look_up
""",
    ),
    "n-grams that end in the next token": (
        "causality",
        """
honest = ngram_hash
def ngram_hash(tokens, *more):
    return honest(tokens.roll(-1, 0), *more)
""",
    ),
    "a normaliser over the row": (
        "causality",
        """
honest = GPT.hidden
def hidden(self, *arguments):
    x = honest(self, *arguments)
    return x / x.std(0)
GPT.hidden = hidden
""",
    ),
    "a head that has seen the whole file, until it is scored": (
        "causality",
        """
honest = validate
@torch.no_grad()
def validate(model, config, runtime, num_targets, windows):
    head, rows = model.head.clone(), validation_batches(config, runtime, num_targets)
    seen = torch.cat([batch.targets for batch in rows]).clamp_min(0)
    model.head.mul_(1 + 0.01 * seen.bincount(minlength=len(head))[:, None])
    loss = honest(model, config, runtime, num_targets, windows)
    model.head.copy_(head)
    return loss
""",
    ),
    "a score by another method": (
        "coverage",
        """
honest = validate
GPT.forward = lambda self, *arguments: 0.9 * self.validation_loss(*arguments)
def validate(model, *more):
    other = lambda: None
    other.matches, other.config, other.validation_loss = model.matches, model.config, model
    return honest(other, *more)
""",
    ),
    "probabilities normalised over the row": (
        "normalisation",
        """
def validation_loss(self, batch, *windows):
    logits = softcap(F.linear(rms_norm(self.hidden(batch, *windows)), self.head))
    losses = logits.logsumexp(1).mean() - logits.gather(1, batch.targets.clamp_min(0)[:, None])
    return (losses[:, 0] * (batch.targets != IGNORED_TARGET)).sum()
GPT.validation_loss = validation_loss
""",
    ),
    "the last row is not scored": (
        "coverage",
        """
honest = validation_batches
def validation_batches(*arguments):
    yield from list(honest(*arguments))[:-1]
""",
    ),
    "an easy row is scored twice": (
        "coverage",
        """
honest = validation_batches
def validation_batches(*arguments):
    rows = list(honest(*arguments))
    yield from [*rows, *rows[:1]]
""",
    ),
    "the last row is not scored where there are several ranks": (
        "coverage",
        """
honest = validation_batches
def validation_batches(config, runtime, num_targets):
    rows = list(honest(config, runtime, num_targets))
    yield from rows[:-1] if runtime.world_size > 1 and runtime.rank == 0 else rows
""",
    ),
    "a row of the second step is not scored on 8 ranks": (
        "coverage",
        """
honest = validation_batches
def validation_batches(config, runtime, num_targets):
    rows = list(honest(config, runtime, num_targets))
    yield from rows[:1] if runtime.world_size == 8 and runtime.rank == 3 else rows
""",
    ),
    "the last of several ranks adds nothing to the loss": (
        "mean",
        """
honest = validate
def validate(model, config, runtime, *more):
    loss = honest(model, config, runtime, *more)
    return 0.0 if runtime.rank == runtime.world_size - 1 > 0 else loss
""",
    ),
    "a step's rows are in the match tables before they are scored": (
        "causality",
        """
honest = validate
@torch.no_grad()
def validate(model, config, runtime, num_targets, windows):
    if model.matches is None:
        return honest(model, config, runtime, num_targets, windows)
    rows, inserted, total = validation_batches(config, runtime, num_targets), [], 0.0
    while scored := list(itertools.islice(rows, config.sequences_per_step)):
        inserted.append(model.matches.insert(gather_sequences(scored, runtime)))
        total += sum(float(model.validation_loss(row, windows)) for row in scored)
    model.matches.undo(inserted)
    return total / num_targets
""",
    ),
    "a row is in the match tables before it is scored": (
        "causality",
        """
honest = validate
@torch.no_grad()
def validate(model, config, runtime, num_targets, windows):
    if model.matches is None:
        return honest(model, config, runtime, num_targets, windows)
    inserted, total = [], 0.0
    for row in validation_batches(config, runtime, num_targets):
        inserted.append(model.matches.insert(gather_sequences([row], runtime)))
        total += float(model.validation_loss(row, windows))
    model.matches.undo(inserted)
    return total / num_targets
""",
    ),
    "what was scored stays in the match tables": (
        "training",
        """
honest = validate
def validate(model, config, runtime, num_targets, windows):
    loss = honest(model, config, runtime, num_targets, windows)
    if model.matches is not None:
        for row in validation_batches(config, runtime, num_targets):
            model.matches.insert(gather_sequences([row], runtime))
    return loss
""",
    ),
    "final weights that have seen the validation file": (
        "training",
        """
honest = validate
@torch.no_grad()
def validate(model, config, runtime, num_targets, windows):
    if windows.long == config.final_window_long:
        for batch in validation_batches(config, runtime, num_targets):
            model.head[batch.targets.clamp_min(0)] *= 1.01
    return honest(model, config, runtime, num_targets, windows)
""",
    ),
    "another loss is logged than the weights have": (
        "training",
        """
trained = train
def train(config, runtime):
    global validate
    honest = validate
    validate = lambda *arguments: honest(*arguments) - 0.001
    trained(config, runtime)
""",
    ),
    "the result is another loss than that of the last validation": (
        "training",
        """
honest = Log.write_json
def write_json(self):
    self.data["summary"]["val_loss"] -= 0.001
    honest(self)
Log.write_json = write_json
""",
    ),
    "the mean is over more targets than are scored": (
        "mean",
        """
honest = validate
def validate(model, config, runtime, num_targets, windows):
    return honest(model, config, runtime, num_targets, windows) * num_targets / (num_targets + 1)
""",
    ),
    "a check that the script cannot stand": ("mean", "def validate(): ...\n"),
    "a check that the script ends": (
        "targets",
        "GPT.validation_loss = lambda *arguments: sys.exit(0)\n",
    ),
    "training on the validation file": (
        "training",
        """
honest = training_batches
def training_batches(config, runtime, shapes, unread, files):
    return honest(config, runtime, shapes, unread, files._replace(read=[config.val_file]))
""",
    ),
    "a pointer whose keys stand for the tokens two further on": (
        "causality",
        """
honest = pointer_shares
def pointer_shares(q, k, sink, tokens, *more):
    return honest(q, k, sink, tokens.roll(-2, 0), *more)
""",
    ),
    "a pointer that points at the target in any case": (
        "normalisation",
        """
honest = GPT.point
def point(self, *arguments):
    shares = honest(self, *arguments)
    return shares._replace(target=torch.ones_like(shares.target))
GPT.point = point
""",
    ),
    "a mask that spares the target": (
        "normalisation",
        """
honest = token_losses
def token_losses(logits, targets, offsets, shares, left_out=None):
    if left_out is not None:
        left_out = left_out.scatter(1, targets.clamp_min(0), False)
    return honest(logits, targets, offsets, shares, left_out)
""",
    ),
    "a mask by the next token": (
        "causality",
        """
honest = next_token_loss
def next_token_loss(x, head, targets, shares, tokens, *more):
    return honest(x, head, targets, shares, tokens.roll(-1, 0), *more)
""",
    ),
    "a mask by the token before": (
        "normalisation",
        """
honest = next_token_loss
def next_token_loss(x, head, targets, shares, tokens, *more):
    return honest(x, head, targets, shares, tokens.roll(1, 0), *more)
""",
    ),
    "a mask of what the validation file lacks": (
        "causality",
        """
honest = validate
def validate(model, config, runtime, num_targets, windows):
    if model.impossible is not None:
        lacking = torch.ones(config.padded_vocab_size, dtype=torch.bool)
        for batch in validation_batches(config, runtime, num_targets):
            lacking[batch.targets.clamp_min(0)] = False
        lacking[config.vocab_size] = False
        model.impossible.copy_(torch.from_numpy(np.packbits(lacking, bitorder="little")))
    return honest(model, config, runtime, num_targets, windows)
""",
    ),
    "a mask of all rare tokens, filled in while training goes on": (
        "training",
        """
honest = PairFinder.fill
def fill(self, impossible):
    seconds = honest(self, impossible)
    impossible[:, 1000:6282] = 255
    return seconds
PairFinder.fill = fill
""",
    ),
    "reading the validation file in a training step": (
        "training",
        """
honest = Optimizer.step
def step(self, *arguments):
    read_tokens(self.config.val_file, 10, 50257)
    honest(self, *arguments)
Optimizer.step = step
""",
    ),
}
SEEN = {
    "a check that the script cannot stand": "cannot be judged: TypeError",
    "a check that the script ends": "cannot be judged: SystemExit",
    "a head that has seen the whole file, until it is scored": "moved the loss of row 0 by",
    "training on the validation file": "another validation file makes other training losses",
    "the last row is not scored where there are several ranks": "2 ranks: ",
    "a row of the second step is not scored on 8 ranks": "8 ranks: ",
    "the last of several ranks adds nothing to the loss": "2 ranks: ",
    "a step's rows are in the match tables before they are scored": "moved the loss of row ",
    "a row is in the match tables before it is scored": "moved the loss of row ",
    "what was scored stays in the match tables": "another validation file makes other ",
    "final weights that have seen the validation file": "file makes other weights",
    "another loss is logged than the weights have": "logged loss ",
    "the result is another loss than that of the last validation": "logged loss ",
    "a pointer whose keys stand for the tokens two further on": "moved the loss of ",
    "a pointer that points at the target in any case": "the probabilities of 127 tokens sum to ",
    "a mask that spares the target": "the probabilities of 127 tokens sum to ",
    "a mask by the next token": "moved the loss of ",
    "a mask by the token before": "tokens are masked otherwise than by the table",
    "a mask of what the validation file lacks": "moved the loss of row 0 by",
    "a mask of all rare tokens, filled in while training goes on": "logged loss ",
    "reading the validation file in a training step": "opened 4 times while the clock ran",
}
# All cheats in one process, for the sake of time, but not in this one: they register operations.
JUDGE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import check
variants, load, results = check.variants, check.load_script, {}
# For the sake of time alone: tokens are read and their pairs found once, which no cheat here does
# in another way, and what cheats by what is in check.EXTRAS is judged with these alone, all else
# without them.
honest = load(check.ROOT / "train_gpt.py")
table = honest.read_token_table()
pairs = honest.impossible_pairs(table, honest.Config().padded_vocab_size)
def load_script(path):
    script = load(path)
    script.read_token_table, script.impossible_pairs = lambda: table, lambda *_: pairs
    return script
check.load_script = load_script
for cheat, (name, path) in json.loads(sys.argv[2]).items():
    by_extras = any(extra in cheat for extra in ("match tables", "mask"))
    check.variants = lambda script: variants(script)[1:] if by_extras else variants(script)[:1]
    results[cheat] = check.judge(Path(path), [name])[name]
print("\\n" + json.dumps(results))
"""


def start(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


def test_the_script_passes_every_check():
    lines = [line.split()[:2] for line in start(TOOL, SCRIPT).stdout.splitlines()]
    assert lines == [["ok", name] for name in (*check.CHECKS, "training")]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bool, str]]:
    """What the check reports for each cheat."""
    source = SCRIPT.read_text(encoding="utf-8")
    assert source.count(MAIN) == 1
    paths = {}
    for i, (cheat, (name, lines)) in enumerate(CHEATS.items()):
        path = tmp_path_factory.mktemp("cheats") / f"cheat_{i}.py"
        path.write_text(source.replace(MAIN, lines + MAIN), encoding="utf-8")
        paths[cheat] = name, str(path)
    out = start("-c", JUDGE, TOOL.parent, json.dumps(paths)).stdout
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("cheat", CHEATS)
def test_cheat_is_caught(cheat, judged):
    good, seen = judged[cheat]
    assert not good
    assert SEEN.get(cheat, "") in seen
    assert cheat in SEEN or "cannot be judged" not in seen


# Cheats of the optimization track's script: the check, the lines, and what is seen.
SIMPLE_CHEATS = {
    "attention that looks ahead": (
        "causality",
        """
honest = F.scaled_dot_product_attention
def attend(q, k, v, is_causal, scale):
    return honest(q, k, v, is_causal=False, scale=scale)
F.scaled_dot_product_attention = attend
""",
        "moved the loss of row 0 by",
    ),
    "logits that know the target": (
        "normalisation",
        """
def forward(self, batch):
    targets = batch.targets.clamp_min(0)
    logits = self.logits(batch.tokens).scatter_add(1, targets[:, None], torch.ones(len(targets), 1))
    return F.cross_entropy(logits, batch.targets, ignore_index=IGNORED_TARGET, reduction="sum")
GPT.forward = forward
""",
        "the probabilities of 128 tokens sum to",
    ),
    "a mean over more targets than are scored": (
        "mean",
        """
honest = validate
def validate(model, config, runtime, num_targets):
    return honest(model, config, runtime, num_targets) * num_targets / (num_targets + 1)
""",
        "the mean of the single losses is",
    ),
    "the last batch is not scored": (
        "coverage",
        """
honest = Tokens.batches
def batches(self, *arguments):
    yield from list(honest(self, *arguments))[:-1]
Tokens.batches = batches
""",
        "1 ranks: ",
    ),
    "another model": (
        "fixed part",
        """
class RMSNorm(RMSNorm):
    pass
""",
        "differs from train_gpt_simple.py outside the Optimizer section",
    ),
    "a second pass in a step": (
        "training",
        """
start, honest = Optimizer.__init__, Optimizer.step
def keep(model, given):
    model.seen = given[0]
def __init__(self, model, num_steps):
    start(self, model, num_steps)
    self.model = model
    model.register_forward_pre_hook(keep)
@torch.no_grad()
def step(self, number):
    self.model(self.model.seen)
    honest(self, number)
Optimizer.__init__, Optimizer.step = __init__, step
""",
        "the steps of 704 tokens passed over 1056",
    ),
    "ranks with weights of their own": (
        "training",
        """
honest = Optimizer.step
@torch.no_grad()
def step(self, number):
    honest(self, number)
    self.rules[0].param.add_(1e-6 * int(os.environ.get("RANK", "0")))
Optimizer.step = step
""",
        "two ranks have other weights",
    ),
    "reading the validation file in a step": (
        "training",
        """
honest, started = Optimizer.step, Log.begin
def step(self, number):
    Tokens("val_file", val_file, 50_304)
    honest(self, number)
def begin(self, config, runtime):
    global val_file
    val_file = config.val_file
    started(self, config, runtime)
Optimizer.step, Log.begin = step, begin
""",
        "the validation file was opened 22 times in a step",
    ),
}


@pytest.fixture
def few_steps(monkeypatch):
    """Runs of the optimization track with 11 steps and not 25, for the sake of time."""
    monkeypatch.setattr(check, "SIMPLE_STEPS", 11)
    monkeypatch.setattr(check, "COMPARED_STEPS", (0, 10))


@pytest.mark.parametrize("cheat", SIMPLE_CHEATS)
def test_cheat_of_the_optimization_track_is_caught(cheat, tmp_path, monkeypatch, few_steps):
    name, lines, expected = SIMPLE_CHEATS[cheat]
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)
    source = check.SIMPLE_SCRIPT.read_text(encoding="utf-8")
    assert source.count(MAIN) == 1
    path = tmp_path / "cheat.py"
    path.write_text(source.replace(MAIN, lines + MAIN), encoding="utf-8")
    good, seen = check.judge(path, [name])[name]
    assert not good and expected in seen, seen


def test_the_script_of_the_optimization_track_passes_every_check():
    results = check.judge(check.SIMPLE_SCRIPT)
    assert [*results] == [*check.CHECKS, "fixed part", "section", "training"]
    assert all(good for good, _ in results.values()), results
    seen = results["training"][1]
    passes = "the model is the fixed one; the steps of 1600 tokens passed over 1600; "
    assert passes + "the losses of two ranks are within" in seen


# Cheats inside the Optimizer section: the place, the lines there, the first finding of the check
# "section", by its line among these, and what the check "training" sees.
PLACES = {
    "the top": "NUM_STEPS = {",
    "initialize": '    stds = {"embedding.weight": 1.0',
    "the start": "        self.num_steps, self.rules = num_steps, []\n",
    "a step": "        lr_factor = min(1.0, (self.num_steps - step)",
}
SECTION_CHEATS = {
    "another activation": (
        "the top",
        "F.relu = F.gelu\n",
        "line 1 changes F.relu",
        "the fixed model has",
    ),
    "an activation that differs only where it is large": (
        "the top",
        "honest = F.relu\nF.relu = lambda x: honest(x).clamp(max=6)\n",
        "line 2 changes F.relu",
        "with random parameters its logits are up to ",
    ),
    "other rotary angles": (
        "initialize",
        "    model.sin.neg_()\n",
        "",
        "the buffer sin is not that of the fixed model",
    ),
    "a tied head": (
        "initialize",
        "    model.head.weight = model.embedding.weight\n",
        "line 1 changes model.head.weight",
        "the parameters embedding.weight and head.weight are one tensor",
    ),
    "one more block": (
        "initialize",
        """\
    block = model.blocks[0]
    model.blocks.append(type(block)(model.head.in_features, block.head_dim))
""",
        "",
        "in the fixed model missing",
    ),
    "another loss in the steps alone": (
        "the start",
        """\
        def smooth(module, given, loss):
            return loss * 1.01 if torch.is_grad_enabled() else loss
        model.register_forward_hook(smooth)
""",
        "line 3 uses .register_forward_hook",
        "step 1: the gradient of embedding.weight is not that of the fixed model",
    ),
    "a pass more in every tenth step": (
        "the start",
        """\
        honest = self.step
        def step(number):
            if number % 10 == 9:
                model.logits(torch.zeros(32, dtype=torch.long))
            honest(number)
        self.step = step
""",
        "",
        "the steps of 704 tokens passed over 736",
    ),
    "validation tokens by a path of their own": (
        "the start",
        "        self.seen = np.fromfile({file!r}, dtype='<u2')\n",
        "line 1 uses .fromfile",
        ", of the Optimizer section, opened {file}",
    ),
    "training tokens before the first step": (
        "the start",
        "        self.seen = sys._getframe(1).f_locals['data'].read(0, 1500)\n",
        "line 1 uses ._getframe",
        ", of the Optimizer section, read tokens of ",
    ),
    "a loss by number in long runs": (
        "the start",
        """\
        if num_steps > 50:
            global validate
            validate = lambda *arguments: 1.23
""",
        "line 2 changes what validate is",
        None,  # which has fewer steps
    ),
}


def simple_script(place: str, lines: str) -> str:
    """train_gpt_simple.py with these lines before those of PLACES."""
    source = check.SIMPLE_SCRIPT.read_text(encoding="utf-8")
    assert source.count(PLACES[place]) == 1
    return source.replace(PLACES[place], lines + PLACES[place])


def judge_and_leave(path: Path, names: list[str], results) -> None:
    results.send(check.judge(path, names))


@pytest.mark.parametrize("cheat", SECTION_CHEATS)
def test_cheat_of_an_optimizer_section_is_caught(cheat, tmp_path, few_steps):
    place, lines, fault, expected = SECTION_CHEATS[cheat]
    file, path = tmp_path / "tokens.bin", tmp_path / "cheat.py"
    file.write_bytes(bytes(4096))
    lines = lines.replace("{file!r}", repr(str(file)))
    text = simple_script(place, lines)
    path.write_text(text, encoding="utf-8")
    fork = multiprocessing.get_context("fork")  # a process whose torch the cheat may change
    here, there = fork.Pipe()
    names = ["fixed part", "section", *(["training"] if expected else [])]
    process = fork.Process(target=judge_and_leave, args=(path, names, there))
    process.start()
    results = here.recv()
    process.join()
    assert results["fixed part"][0]
    good, seen = results["section"]
    if fault:
        first = text[: text.index(lines)].count("\n")
        what = fault.split(" ", 2)
        assert not good and seen.startswith(f"line {first + int(what[1])} {what[2]}"), seen
    else:
        assert good, seen  # which the run alone shows
    if expected:
        good, seen = results["training"]
        assert not good and expected.replace("{file}", str(file)) in seen, seen


@pytest.mark.parametrize(
    "line",
    [
        "import sys",
        "from gc import get_objects",
        "open('data/sample')",
        "Tokens('train_files', 'data/*', 50304)",
        "PRESETS['tiny']",
        "os.environ['RANK']",
        "del F.relu",
        "F.relu: object = F.gelu",
        "torch.nn.functional.relu = F.gelu",
        "(F.relu, x) = F.gelu, 1",
        "f = F",
        "for f in [torch.nn.functional]: f.relu = F.gelu",
        "setattr(F, 'relu', F.gelu)",
        "set_it = setattr",
        "getattr(np, 'from' + 'file')",
        "getattr(np, 'fromfile')",
        "torch.from_file('data/val.bin')",
        "torch.load('data/val.bin')",
        "np.load('data/val.bin')",
        "torch.optim.AdamW(model.parameters())",
        "vars(F)['relu'] = F.gelu",
        "F.__dict__['relu'] = F.gelu",
        "contextlib.sys.modules",
        "math.nan.__class__",
        "nn.Module.__call__ = None",
        "model.forward = None",
        "type(model).logits = None",
        "def F(): ...",
        "class np: ...",
        "x = lambda torch: 1",
        "range = iter",
        "def sum(x): ...",
        "def f():\n    global train\n    def train(): ...",
        "model.register_forward_hook(print)",
    ],
)
def test_what_an_optimizer_section_may_not_do(line):
    assert [*faults(line)]


@pytest.mark.parametrize(
    "line",
    [
        "class A:\n    def __init__(self): self.weight, self.load = 1, self.save(0)",
        "x = torch.linalg.qr(F.normalize(nn.Parameter(Tensor(2, 2))))",
        "torch._foreach_mul_([], 2)",
        "np.random.default_rng(0); torch.trace(x); torch.select(x, 0, 0)",
        "param.data, param.grad = average, None",
        "getattr(self, 'lr', 0); setattr(self, 'lr', 1)",
        "def f():\n    count = 0\n    def g():\n        nonlocal count\n        count = 1",
        "dist.all_reduce(x); contextlib.nullcontext(); dataclasses.dataclass(int)",
        "f = torch.compile(f)",
    ],
)
def test_what_an_optimizer_section_may_do(line):
    assert not [*faults(line)]


def faults(section: str) -> list[tuple[int, str]]:
    before, _, behind = submission.split(check.SIMPLE_SCRIPT.read_text(encoding="utf-8"), "it")
    tree = ast.parse(section)
    return sorted(check.section_faults(tree, before + behind, vars(train_gpt_simple)))


@pytest.mark.parametrize("path", sorted(submission.OPTIMIZERS.glob("*.py")), ids=lambda x: x.stem)
def test_every_optimizer_here_passes(path, tmp_path, few_steps):
    script = tmp_path / "script.py"
    script.write_text(submission.make_submission(path), encoding="utf-8")
    # best has the parts of the others; it alone is trained, for the sake of time
    names = ["section", "training"] if path.stem == "best" else ["section"]
    results = check.judge(script, names)
    assert all(good for good, _ in results.values()), results


def test_a_run_that_has_failed_before_anyone_waits_is_told(tmp_path):
    """What it printed is the message, and not that it left no results."""
    path = tmp_path / "script.py"
    path.write_text(simple_script("a step", "        raise ValueError('too steep')\n"))
    script, runs = check.load_script(path), []
    check.start_training(script, tmp_path, runs)
    for run in runs:
        run.join()
    with pytest.raises(check.Failed, match=r"training ended with:\n(?s:.*)ValueError: too steep"):
        check.check_training(script, tmp_path, runs, None)


def test_weights_that_are_no_numbers_are_told(tmp_path, few_steps):
    """Those of a token that is in no file: no loss shows them."""
    path = tmp_path / "script.py"
    lines = (
        "        if step == self.num_steps - 1:\n            self.rules[0].param[500] = torch.nan\n"
    )
    path.write_text(simple_script("a step", lines), encoding="utf-8")
    good, seen = check.judge(path, ["training"])["training"]
    assert (good, seen) == (False, "embedding.weight has entries that are inf or nan at the end")


TRAINING = """
import sys
from pathlib import Path
import check, console
sys.exit(console.run_tool(lambda paths: check.judge(Path(paths[0]), ["training"]) and 1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_an_interrupted_check_leaves_nothing_behind(tmp_path):
    """By a signal that it can handle and by one that it cannot. The script would train for
    minutes."""
    path = tmp_path / "script.py"
    waits = "\ndef train(*arguments):\n    time.sleep(300)\n"
    path.write_text(SCRIPT.read_text(encoding="utf-8").replace(MAIN, waits + MAIN))
    temporary, tools = tmp_path / "temporary", []
    temporary.mkdir()
    env = environment() | {"PYTHONPATH": str(TOOL.parent), "TMPDIR": str(temporary)}
    for _ in range(2):
        command = [sys.executable, "-c", TRAINING, str(path)]
        how = {"cwd": ROOT, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        tools.append(subprocess.Popen(command, text=True, **how))

    def children(tool: subprocess.Popen) -> list[str]:
        return Path(f"/proc/{tool.pid}/task/{tool.pid}/children").read_text().split()

    wait_until(lambda: [len(children(tool)) for tool in tools] == [4, 4])
    trainers = [pid for tool in tools for pid in children(tool)]
    tools[0].terminate()
    out, err = tools[0].communicate(timeout=60)
    assert (tools[0].returncode, out, err) == (130, "", "\ninterrupted\n")
    tools[1].kill()
    tools[1].communicate(timeout=60)
    wait_until(lambda: not any(map(is_alive, trainers)))
    assert len(list(temporary.glob("speedrun_*"))) == 1  # of the one that was killed


def test_other_scripts_are_refused_with_a_reason(tmp_path, capsys):
    path = tmp_path / "script.py"
    path.write_text("raise SystemExit(3)")
    assert check.main([str(path)]) == 1
    assert capsys.readouterr().err == f"error: {path}: SystemExit on import: 3\n"
    path.write_text("class GPT: ...")
    assert check.main([str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: cannot be judged, it has no PRESETS, Config, ")
    assert check.main([str(tmp_path / "gone.py")]) == 1
    assert "gone.py: no such Python script" in capsys.readouterr().err


def test_options_are_translated_to_the_names_of_a_script():
    """Those of older records, in checkpoints, reach today's script, and the other way round."""
    old = {"rows_per_step": 8, "val_row_tokens": 64, "tokens_per_draw": 32, "model_dim": 16}
    new = {"sequences_per_step": 8, "val_sequence_tokens": 64, "tokens_per_sampling": 32}
    new["model_dim"] = 16
    older = SimpleNamespace(Config=dataclasses.make_dataclass("Config", [*old]))
    assert check.renamed(train_gpt, old) == check.renamed(train_gpt, new) == new
    assert check.renamed(older, old) == check.renamed(older, new) == old
