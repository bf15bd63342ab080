"""Rank pools and base models, made once for the whole suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankPool

FP8_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
}  # multiples of 16, each layer in e4m3


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], RankPool]]:
    """`pool(world_size)`: started at first use."""
    pools: dict[int, RankPool] = {}
    yield lambda ranks: pools.setdefault(ranks, RankPool(ranks))
    for started in pools.values():
        started.close()


@pytest.fixture(scope="session")
def base(pool: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`base(variant)`: the folder of a tiny Llama, tied for the tied variant; sizes can be given."""
    root: Path = tmp_path_factory.mktemp("bases")

    def folder(variant: str, **sizes: Any) -> str:
        sizes = sizes or (FP8_SIZES if variant == "fp8" else {})
        sizes = sizes | {"tie_word_embeddings": variant == "lora-tied"}
        name = "-".join(f"{key}={value}" for key, value in sorted(sizes.items()))
        pool(1).run("tests.contract.model:save_base", folder=str(root / name), sizes=sizes)
        return str(root / name)

    return folder
