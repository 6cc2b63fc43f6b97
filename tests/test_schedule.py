"""Section 8: stages, learning rate, momentum and loss weights against the formulas."""

import pytest
import torch
from conftest import cpu_runtime, tiny_config

from train_gpt import GPT, PRESETS, Schedule, Stage, Trainer

A, B, C = (
    Stage(1 / 3, 128, 32, 8, 16, 1.0, 0.5, 0),
    Stage(1 / 3, 256, 48, 12, 24, 1.52, 0.1, 0),
    Stage(1 / 3, 384, 64, 16, 32, 1.73, 0.0, 0),
)
LAST = Stage(1.0, 512, 64, 20, 40, 9.0, 0.5, 0)


def schedule(**changes: object) -> Schedule:
    fields = {
        "stages": (A, B, C),
        "num_steps": 100,
        "extension": (LAST,),
        "extension_steps": 10,
        "momentum_warmup_steps": 20,
        "momentum_cooldown_steps": 5,
    }
    return Schedule(tiny_config(**{**fields, **changes}))


def test_stage_edges():
    """A third of 100 steps each, to the nearest step; then the extension."""
    plan = schedule()
    stages = [plan.stage(step) for step in range(110)]
    assert stages == [A] * 33 + [B] * 34 + [C] * 33 + [LAST] * 10
    assert plan.stage(110) is LAST  # asked for before the final validation
    assert (plan.total_steps, plan.end_step) == (110, 110)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 1270])
def test_every_step_has_a_stage_whatever_the_length(num_steps):
    plan = schedule(num_steps=num_steps, extension_steps=3)
    stages = [plan.stage(step) for step in range(num_steps + 3)]
    assert stages[num_steps:] == [LAST] * 3
    assert LAST not in stages[:num_steps]
    for stage in (A, B, C):
        assert abs(stages.count(stage) - num_steps / 3) < 1


def test_edges_of_a_long_schedule():
    plan = schedule(num_steps=1270, extension_steps=15)
    edges = [s for s in range(1, plan.total_steps) if plan.stage(s) != plan.stage(s - 1)]
    assert edges == [423, 847, 1270]
    assert plan.total_steps == 1285


def test_learning_rate():
    """From 40 % of the steps on, linear from the stage's multiplier down to 0.15."""
    plan = schedule(lr_decay_start=0.4, lr_end=0.15)
    for step in range(110):
        multiplier = 1.0 if step < 33 else 1.52 if step < 67 else 1.73
        passed = min(1.0, max(0.0, (step - 40) / 60))  # of the decay
        expected = multiplier + passed * (0.15 - multiplier)
        if step >= 100:
            expected = 0.15  # whatever multiplier the extension's row has
        assert plan.lr_scale(step) == pytest.approx(expected, abs=1e-12), step
    assert schedule(lr_decay_start=0.0, lr_end=0.0).lr_scale(50) == pytest.approx(1.52 / 2)


def test_momentum():
    """Linear from start to peak, flat, and back to start over the last steps of all; the decay of
    the mean is that of the start again when the slow mean comes in."""
    plan = schedule(momentum_start=0.85, momentum_peak=0.95, slow_start=0.4, slow_share=0.6)
    for step in range(110):
        look_ahead = 0.95
        if step < 20:
            look_ahead = 0.85 + 0.1 * step / 20
        if step > 105:
            look_ahead = 0.85 + 0.1 * (110 - step) / 5
        expected = (look_ahead, 0, look_ahead) if step < 40 else (0.85, 0.6, look_ahead)
        assert plan.momentum(step) == pytest.approx(expected, abs=1e-12), step
    assert schedule(momentum_cooldown_steps=0).momentum(109).look_ahead == 0.95


def test_tokens():
    plan = schedule()
    assert [plan.sequence_shape(step)[0] for step in (0, 32, 33, 67, 100)] == [32, 32, 64, 96, 128]
    assert [plan.sequence_shape(step)[1] for step in (0, 33, 100)] == [32, 48, 64]


def test_stop_step_cuts_and_changes_nothing_else():
    whole, cut = schedule(), schedule(stop_step=40)
    assert (cut.end_step, cut.total_steps) == (40, 110)
    for step in range(40):
        assert cut.stage(step) == whole.stage(step)
        assert cut.lr_scale(step) == whole.lr_scale(step)
        assert cut.momentum(step) == whole.momentum(step)
    assert schedule(stop_step=1000).end_step == 110


def test_windows_are_those_of_the_stage():
    plan = schedule()
    for step in range(110):
        stage = plan.stage(step)
        assert plan.windows(step) == (stage.window_short, stage.window_long)


def loss_weights(plan: Schedule) -> list[list[float]]:
    """What a trainer has for every step."""
    trainer = Trainer(GPT(plan.config, cpu_runtime()), cpu_runtime())
    rows = [trainer.loss_weights[plan.stage(step)] for step in range(plan.total_steps)]
    assert all(row.dtype == torch.float32 for row in rows)
    return [row.tolist() for row in rows]


def test_loss_weights():
    """Of the next token and the one after it, the same in every step of a stage."""
    first, second, third = [1.0, 0.5], pytest.approx([1.0, 0.1]), [1.0, 0.0]
    rows = loss_weights(schedule())
    assert rows == [first] * 33 + [second] * 34 + [third] * 33 + [first] * 10


def test_loss_weights_of_the_speedrun():
    """The token after the next one counts less from stage to stage, and in the end not at all."""
    config = PRESETS["speedrun"]
    plan = Schedule(config)
    weights = [plan.stage(step).second for step in range(plan.total_steps)]
    assert plan.total_steps == config.num_steps + config.extension_steps
    assert weights == sorted(weights, reverse=True)
    assert 0 < weights[0] < 1 and weights[-1] == 0
    assert {*weights} == {stage.second for stage in config.all_stages}


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_every_step_has_loss_weights_whatever_the_length(num_steps):
    rows = loss_weights(schedule(num_steps=num_steps, extension_steps=3))
    assert len(rows) == num_steps + 3
    assert all(len(row) == 2 and row[0] == 1 for row in rows)
    assert rows[num_steps:] == [[1.0, 0.5]] * 3
