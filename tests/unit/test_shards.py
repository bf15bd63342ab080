"""SHARD=1/4: the shards of the suite are disjoint, complete and even."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import pytest_collection_modifyitems


def item(number: int, is_matrix: bool) -> Any:
    return SimpleNamespace(number=number, get_closest_marker=lambda name: is_matrix or None)


def shard(monkeypatch: pytest.MonkeyPatch, text: str, num_items: int = 103) -> list[Any]:
    monkeypatch.setenv("SHARD", text)
    config: Any = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    items = [item(number, number % 3 == 0) for number in range(num_items)]
    pytest_collection_modifyitems(config, items)
    return items


def test_shards_are_a_partition_with_equal_parts_of_the_matrix(monkeypatch):
    shards = [shard(monkeypatch, f"{index}/4") for index in (1, 2, 3, 4)]
    assert sorted(kept.number for items in shards for kept in items) == list(range(103))
    heavy = [sum(kept.number % 3 == 0 for kept in items) for items in shards]
    light = [len(items) - count for items, count in zip(shards, heavy, strict=True)]
    assert max(heavy) - min(heavy) <= 1
    assert max(light) - min(light) <= 1


def test_without_a_shard_everything_runs(monkeypatch):
    assert len(shard(monkeypatch, "")) == 103


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/", "a/b", "1/4/2"])
def test_an_invalid_shard_is_named(monkeypatch, text):
    with pytest.raises(pytest.UsageError, match=f"SHARD={text}"):
        shard(monkeypatch, text)
