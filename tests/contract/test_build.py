"""Which engine a recipe selects, and the error when it cannot be built."""

from __future__ import annotations

from typing import Any

import pytest

REFUSALS = [
    ({"kind": "single"}, {}, ("ConfigError: ", "engine.kind: single", "2")),
    (
        {"kind": "fsdp", "shard": "hybrid", "dp_shard": 3},
        {},
        ("ConfigError: ", "engine.dp_shard 3", "2 ranks"),
    ),
    (
        {"kind": "zero", "stage": 3},
        {"deepspeed_version": None},
        ("MissingExtraError: ", "engine.kind: zero", "dist-cpt[zero]"),
    ),
    (
        {"kind": "zero", "stage": 1},
        {"deepspeed_version": "0.20.0"},
        ("ConfigError: ", "engine.kind: zero", "0.20.0", "deepspeed==0.19.8"),
    ),
]


@pytest.mark.parametrize(("engine", "options", "parts"), REFUSALS)
def test_refusals_are_one_line(
    engine: dict[str, Any], options: dict[str, Any], parts: tuple[str, ...], pool: Any, base: Any
) -> None:
    for message in pool(2).run("tests.contract.cases:refusal", base=base("lora"), engine=engine, **options):
        assert message.startswith(parts[0])
        assert all(part in message for part in parts), message
        assert "\n" not in message


@pytest.mark.parametrize(("ranks", "kind"), [(1, "single"), (2, "fsdp-full")])
def test_auto(ranks: int, kind: str, pool: Any, base: Any) -> None:
    assert set(pool(ranks).run("tests.contract.cases:kind_of_auto", base=base("lora"))) == {kind}
