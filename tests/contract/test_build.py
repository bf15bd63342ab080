"""Which engine a recipe means, and the one line a user gets when it cannot be built."""

from __future__ import annotations

from typing import Any

import pytest

REFUSALS = [
    ({"kind": "single"}, {}, "ConfigError: engine.kind: single runs on 1 rank, not on 2 -- use fsdp or zero"),
    (
        {"kind": "fsdp", "shard": "hybrid", "dp_shard": 3},
        {},
        "ConfigError: engine.dp_shard 3 does not divide 2 ranks -- set engine.dp_shard to a divisor",
    ),
    (
        {"kind": "zero", "stage": 3},
        {"deepspeed_version": None},
        "MissingExtraError: engine.kind: zero needs the extra 'zero', which is not installed -- pip install",
    ),
    (
        {"kind": "zero", "stage": 1},
        {"deepspeed_version": "0.20.0"},
        "ConfigError: engine.kind: zero needs deepspeed 0.19.8, found 0.20.0 -- pip install deepspeed==0.19.8",
    ),
]


@pytest.mark.parametrize(("engine", "options", "line"), REFUSALS)
def test_refusals_are_one_line(
    engine: dict[str, Any], options: dict[str, Any], line: str, pool: Any, base: Any
) -> None:
    for message in pool(2).run("tests.contract.cases:refusal", base=base("lora"), engine=engine, **options):
        assert message.startswith(line)
        assert "\n" not in message


@pytest.mark.parametrize(("ranks", "kind"), [(1, "single"), (2, "fsdp-full")])
def test_auto(ranks: int, kind: str, pool: Any, base: Any) -> None:
    assert set(pool(ranks).run("tests.contract.cases:kind_of_auto", base=base("lora"))) == {kind}
