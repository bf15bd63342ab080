"""Learning rates as pure functions of the step."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from dist_cpt.config.load import build
from dist_cpt.config.schema import OptimConfig, RunConfig, ScheduleConfig, ScheduleShape
from dist_cpt.errors import ConfigError
from dist_cpt.optim.continued_schedule import last_step_before_decay, pinned, require_extendable
from dist_cpt.optim.groups import ParamGroup, expected_groups, param_groups
from dist_cpt.optim.rate_plot import rate_plot
from dist_cpt.optim.schedule import fraction, learning_rates, rates_at


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


def recipe(steps: int, schedule: dict, freeze: int = 0, **changes) -> RunConfig:
    values = {
        "name": "run",
        "model": {"path": "base"},
        "embeddings": {"train": ["embed_tokens"], "freeze_rest_steps": freeze},
        "data": {"seq_len": 8, "sources": [{"path": "text.jsonl"}]},
        "batch": {"global_tokens": 8},
        "train": {"tokens": 8 * steps},
        "optim": {"lr": 1e-3, "embedding_lr": 1e-4},
        "schedule": schedule,
    }
    return build(values | changes, "recipe.yaml")


def test_a_longer_run_has_the_rates_that_it_has_had():
    """Of every group, bit for bit, up to the step that it continues from, which is before the decay."""
    dice = random.Random(0)
    for _ in range(300):
        shapes = [
            {
                "kind": dice.choice(["wsd", "infinite", "constant"]),
                "warmup_fraction": dice.random() / 3,
                "cooldown_fraction": dice.random() / 3,
                "decay_fraction": dice.random() / 3,
                "start_fraction": dice.choice([0.0, 0.3]),
            }
            for _ in range(2)
        ]
        schedule = {**shapes[0], "per_group": dice.choice([{}, {"adapter": shapes[1]}, {"embeddings": shapes[1]}])}
        steps = dice.randrange(20, 200)
        config = recipe(steps, schedule, dice.choice([0, 7]))
        require_extendable(config)
        step = dice.randrange((last_step_before_decay(config, steps) or steps) + 1)
        longer = recipe(steps + dice.randrange(1, 300), schedule, config.embeddings.freeze_rest_steps)
        longer = longer.model_copy(update={"schedule": pinned(config, step)})
        assert [rates_at(longer, s) for s in range(1, step + 1)] == [rates_at(config, s) for s in range(1, step + 1)]
        build(longer.model_dump(mode="json"), "a recipe")


def test_a_decay_over_the_whole_run_is_named_by_its_key():
    with pytest.raises(ConfigError, match=r"schedule\.per_group\.embeddings\.kind linear"):
        require_extendable(recipe(20, {"kind": "wsd", "per_group": {"embeddings": {"kind": "linear"}}}))
    assert last_step_before_decay(recipe(20, {"kind": "wsd", "decay_steps": 4}), 20) == 16
    assert last_step_before_decay(recipe(20, {"kind": "wsd", "decay_steps": 4}, 10), 20) == 16
    assert last_step_before_decay(recipe(20, {"kind": "constant"}), 20) is None
    assert last_step_before_decay(recipe(20, {}), 20) is None


def test_groups_are_expected_as_they_are_built():
    import torch

    lora = {
        "base_model.model.q.lora_A.weight": torch.zeros(2, 2),
        "base_model.model.q.lora_B.weight": torch.zeros(2, 2),
    }
    trained = lora | {"base_model.model.model.embed_tokens.weight": torch.zeros(4, 2)}
    trained["base_model.model.model.layers.0.mlp.gate.weight"] = torch.zeros(4, 2)
    config = recipe(20, {}, 3, adapter={"lora_plus_ratio": 4.0}, model={"path": "base", "router": "train"})
    built = param_groups(trained, config.optim, True, 3, 4.0)
    plain = [ParamGroup(g.name, (), g.peak_lr, g.weight_decay, g.frozen_steps) for g in built]
    assert sorted(expected_groups(config), key=lambda g: g.name) == sorted(plain, key=lambda g: g.name)


def test_the_plot_shows_every_group_once_and_its_rates():
    plot = rate_plot(recipe(100, {"kind": "wsd", "warmup_steps": 10}), width=50)
    assert all(line.isascii() for line in plot)
    assert sum("embeddings" in line for line in plot) == sum("adapter" in line for line in plot) == 1
    heights = [line.partition("|")[2] for line in plot if "|" in line]
    assert max(map(len, heights)) <= 50
    assert heights[0].strip() == "*" * len(heights[0].strip())  # the plateau at the top
    peak = 1e-3
    assert any(f"{peak:.2e}" in line for line in plot)
