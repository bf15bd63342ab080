"""What the cases of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Two ranks."""
    with closing(RankPool(2, timeout_seconds=60)) as pool:
        yield pool


@pytest.fixture(scope="module")
def four() -> Iterator[RankPool]:
    """Four ranks."""
    with closing(RankPool(4, timeout_seconds=60)) as pool:
        yield pool
