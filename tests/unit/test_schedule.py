"""Learning rates as pure functions of the step."""

from __future__ import annotations

import itertools
import math

import pytest

from dist_cpt.config.schema import OptimConfig, ScheduleConfig, ScheduleShape
from dist_cpt.optim.groups import ParamGroup, param_groups
from dist_cpt.optim.schedule import fraction, learning_rates


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "infinite", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 100, 1000])
def test_every_shape_starts_above_zero_and_stays_within_the_peak(kind, num_steps):
    shape = ScheduleShape(kind=kind, warmup_fraction=0.1)
    values = [fraction(shape, step, num_steps) for step in range(1, num_steps + 1)]
    assert all(0.0 < value <= 1.0 for value in values)


def test_cosine_by_hand():
    shape = ScheduleShape(kind="cosine", warmup_fraction=0.1, end_fraction=0.2)
    assert fraction(shape, 1, 100) == pytest.approx(0.1)
    assert fraction(shape, 10, 100) == 1.0
    assert fraction(shape, 55, 100) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert fraction(shape, 100, 100) == pytest.approx(0.2)


def test_wsd_and_infinite_phases():
    wsd = ScheduleShape(kind="wsd", warmup_fraction=0.1, decay_fraction=0.2, end_fraction=0.0)
    assert [fraction(wsd, s, 100) for s in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert fraction(wsd, 90, 100) == pytest.approx(0.5)
    assert fraction(wsd, 100, 100) == 0.0
    infinite = ScheduleShape(kind="infinite", warmup_fraction=0.1, cooldown_fraction=0.2, constant_fraction=0.5)
    assert fraction(infinite, 30, 100) == pytest.approx(0.5)
    assert fraction(infinite, 60, 100) == 0.5
    assert fraction(infinite, 100, 100) == pytest.approx(0.1)
    falling = [fraction(infinite, s, 100) for s in range(10, 101)]
    assert all(a >= b for a, b in itertools.pairwise(falling))


def test_linear_and_one_minus_root_by_hand():
    linear = ScheduleShape(kind="linear", warmup_steps=20, end_fraction=0.2)
    assert [fraction(linear, s, 100) for s in (10, 20, 100)] == [0.5, 1.0, pytest.approx(0.2)]
    assert fraction(linear, 60, 100) == pytest.approx(0.6)
    wsd = ScheduleShape(kind="wsd", warmup_steps=0, decay_steps=40, decay="1-sqrt", end_fraction=0.0)
    assert [fraction(wsd, s, 100) for s in (1, 60, 100)] == [1.0, 1.0, 0.0]
    assert fraction(wsd, 70, 100) == pytest.approx(1 - math.sqrt(10 / 40))
    infinite = ScheduleShape(kind="infinite", decay_steps=16, decay="1-sqrt", end_fraction=0.1)
    assert fraction(infinite, 88, 100) == pytest.approx(0.5 - 0.4 * math.sqrt(4 / 16))


def test_a_length_in_steps_is_the_same_as_a_fraction():
    of_run = ScheduleShape(kind="infinite", warmup_fraction=0.1, cooldown_fraction=0.25, decay_fraction=0.15)
    in_steps = ScheduleShape(kind="infinite", warmup_steps=10, cooldown_steps=25, decay_steps=15)
    assert all(fraction(of_run, step, 100) == fraction(in_steps, step, 100) for step in range(1, 101))
    # and does not change with the length of the run
    assert all(fraction(in_steps, step, 100) == fraction(in_steps, step, 300) for step in range(1, 86))


def test_a_warm_up_may_start_above_zero_and_a_schedule_later():
    schedule = ScheduleConfig(kind="linear", warmup_steps=4, start_fraction=0.2, end_fraction=0.0, start_step=100)
    group = ParamGroup("weights", (), 1e-3, 0.0)
    rates = [learning_rates(schedule, [group], step, 120)["weights"] for step in (100, 101, 104, 112, 120)]
    assert rates == pytest.approx([0.0, 0.4e-3, 1e-3, 0.5e-3, 0.0])
    later = ParamGroup("adapter", (), 1e-3, 0.0, frozen_steps=110)
    assert [learning_rates(schedule, [later], step, 120)["adapter"] for step in (110, 114)] == [0.0, 1e-3]


def test_groups_have_their_own_peak_and_shape():
    import torch

    trainable = {
        "base_model.model.model.layers.0.q.lora_A.weight": torch.zeros(2, 2),
        "base_model.model.lm_head.weight": torch.zeros(4, 2),
    }
    groups = param_groups(trainable, OptimConfig(lr=1e-4, embedding_lr=1e-5, weight_decay=0.1), adapter=True)
    assert [(g.name, g.peak_lr, g.weight_decay) for g in groups] == [("adapter", 1e-4, 0.1), ("embeddings", 1e-5, 0.0)]
    schedule = ScheduleConfig(
        kind="constant", warmup_fraction=0.0, per_group={"embeddings": ScheduleShape(kind="cosine", end_fraction=0.0)}
    )
    last = learning_rates(schedule, groups, 100, 100)
    assert last["adapter"] == 1e-4
    assert last["embeddings"] == pytest.approx(0.0)


def test_full_parameter_groups_spare_vectors_from_decay():
    import torch

    trainable = {
        "model.embed_tokens.weight": torch.zeros(4, 2),
        "model.q.weight": torch.zeros(2, 2),
        "n": torch.zeros(2),
    }
    groups = {g.name: g for g in param_groups(trainable, OptimConfig(weight_decay=0.1), adapter=False)}
    assert {name: g.weight_decay for name, g in groups.items()} == {"weights": 0.1, "embeddings": 0.0, "no_decay": 0.0}
    assert all(isinstance(g, ParamGroup) and g.peak_lr == 1e-4 for g in groups.values())
