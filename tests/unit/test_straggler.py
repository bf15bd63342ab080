"""The rank that is slow by itself is named, not those that wait for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from dist_cpt.config.load import build
from dist_cpt.config.resolve import fingerprint
from dist_cpt.config.schema import StragglerConfig
from dist_cpt.engines.activation_checkpoint import checkpoint_layers
from dist_cpt.health.stragglers import (
    ComputeClock,
    RankPace,
    StragglerWatch,
    straggler_line,
    stragglers,
    timed_modules,
)
from dist_cpt.runtime.collectives import rank
from tests import tiny
from tests.ranks import RankPool

HERE = "tests.unit.test_straggler"


def paces(*own: float, step: float = 10.0) -> list[RankPace]:
    return [RankPace(number, f"n{number}", seconds, step) for number, seconds in enumerate(own)]


@pytest.mark.parametrize(
    ("own", "slow"),
    [
        ((1.0, 1.0, 1.0, 1.0), []),
        ((1.0, 1.9, 1.0, 1.0), []),  # under the factor
        ((1.0, 2.1, 1.0, 5.0), [3, 1]),
        ((1.0, 2.5), [1]),  # of two, the faster one is the reference
        ((5.0,), []),
    ],
)
def test_more_than_factor_times_the_median(own, slow):
    assert [pace.rank for pace in stragglers(paces(*own), 2.0)] == slow


def test_a_rank_that_costs_the_step_nothing_is_not_named():
    assert stragglers(paces(0.1, 0.5, step=10.0), 2.0) == []


def test_the_line_names_rank_and_host_and_not_a_thousand_of_them():
    line = straggler_line(paces(9.0)[:1], paces(9.0, 1.0, 1.0))
    assert line.startswith("straggler: rank 0 (host n0) ")
    for seconds in ("9 s", "1 s", "10 s"):  # its own, the median, a step
        assert f" {seconds}" in line
    assert "and 92 more" in straggler_line(paces(*[9.0] * 100), paces(*[9.0] * 100))
    assert straggler_line([], paces(1.0)).startswith("straggler: no rank ")


class Layer(nn.Module):
    """A layer whose forward takes `base` seconds, and `seconds` more on rank 1."""

    base = 0.0

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.base + (self.seconds if rank() == 1 else 0.0))
        return self.linear(x)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(2, timeout_seconds=60)
    yield pool
    pool.close()


def sharded_case(slow: float) -> dict[str, Any]:
    """Ten steps under FSDP, where a fast rank waits for the slow one at every layer."""
    from torch.distributed.fsdp import fully_shard

    layers = nn.ModuleList(Layer(slow) for _ in range(2))
    for layer in layers:
        layer.base = 0.02  # without it, a rank that a busy machine holds up for a moment is slow
    model = nn.Sequential(*layers)
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    clock, lines = ComputeClock(timed_modules(list(layers), "fsdp-full"), torch.device("cpu")), []
    watch = StragglerWatch(StragglerConfig(window=4), clock, lines.append)
    steps = []
    for step in range(10):
        watch.boundary()
        began = time.perf_counter()
        if step >= 5:
            for layer in layers:
                layer.seconds = 0.0
        model(torch.ones(4, 8)).sum().backward()
        with torch.no_grad():
            model(torch.ones(4, 8))  # an evaluation, which is not counted
        steps.append(time.perf_counter() - began)
    return {"lines": lines, "fastest_slow_step": min(steps[1:5])}


def test_under_a_sharding_engine_only_the_slow_rank_is_named(pool):
    results = pool.run(f"{HERE}:sharded_case", slow=0.08)
    # Both ranks' steps were as long as the slow one's.
    assert all(result["fastest_slow_step"] > 0.09 for result in results)
    assert results[0]["lines"] == results[1]["lines"]
    first, second = results[0]["lines"]
    assert first.startswith("straggler: rank 1 (host ")
    assert "rank 0" not in first
    assert second.startswith("straggler: no rank ")


def test_under_zero_3_modules_with_parameters_are_timed():
    layer = Layer(0.0)
    assert timed_modules([layer], "zero-3") == [layer.linear]
    assert timed_modules([layer], "zero-2") == [layer]


def test_nested_modules_count_once():
    outer = nn.Sequential(nn.Linear(2, 2))
    clock = ComputeClock([outer, outer[0]], torch.device("cpu"))
    began = time.perf_counter()
    outer(torch.ones(1, 2))
    whole = time.perf_counter() - began
    with clock.also():
        time.sleep(0.02)
    assert clock.take() == 0.0  # this step's events may not have been reached
    assert 0.02 < clock.take() < 0.02 + whole + 0.02
    assert clock.take() == 0.0


def test_recomputation_that_ends_early_does_not_stop_the_clock():
    layer = Layer(0.0)
    checkpoint_layers([layer], "full", torch.device("cpu"))
    clock = ComputeClock(timed_modules([layer], "zero-3"), torch.device("cpu"))
    for _ in range(3):  # the backward pass leaves the module inside through an exception
        layer(torch.ones(4, 8, requires_grad=True)).sum().backward()
        clock.take()
        assert clock.take() > 0.0


def test_the_setting_may_change_between_two_starts(tmp_path):
    values = tiny.recipe(tmp_path / "base", tmp_path / "corpus.jsonl", tmp_path)
    prints = [fingerprint(build(values | {"health": health}, "r")) for health in ({}, {"straggler": None})]
    assert prints[0] == prints[1]
