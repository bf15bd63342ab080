"""The environment of every test process, set before any heavy library is imported; and the shards of the suite."""

from __future__ import annotations

import os
from collections import Counter

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIST_CPT_STORAGE_SECONDS", "2")  # a minute for everybody else
os.environ.setdefault("WANDB_MODE", "offline")
# Before any import of triton; on a GPU: TRITON_INTERPRET=0 pytest -m gpu
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the rank pools are CPU; gpu tests set their own


def shard_of_environment() -> tuple[int, int] | None:
    """(index from 0, number of shards) of SHARD=index/number, which counts from 1; None without it.

    Raises:
        pytest.UsageError: SHARD is not such a pair.
    """
    text = os.environ.get("SHARD", "")
    if not text:
        return None
    index, _, number = text.partition("/")
    if not (index.isdecimal() and number.isdecimal() and 1 <= int(index) <= int(number)):
        raise pytest.UsageError(f"SHARD={text}: give a shard and their number, such as 1/4")
    return int(index) - 1, int(number)


@pytest.hookimpl(trylast=True)  # after -m and -k have left some out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep this shard's tests: dealt out in turn, heavy and light ones apart.

    Neighbours are cells of one matrix and take about the same time, so that all shards do, on any machine.
    """
    shard = shard_of_environment()
    if shard is None:
        return
    index, number = shard
    dealt: Counter[bool] = Counter()
    kept, left_out = [], []
    for item in items:
        heavy = item.get_closest_marker("matrix") is not None
        (kept if dealt[heavy] % number == index else left_out).append(item)
        dealt[heavy] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
