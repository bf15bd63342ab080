from __future__ import annotations

from typing import Any

import pytest

from dist_cpt.errors import ConfigError, DistCptError, NumericsError
from dist_cpt.runtime import collectives
from tests.ranks import RankPool

HERE = "tests.distributed.test_runtime_ranks"


def exchange_case() -> list[Any]:
    me = collectives.rank()
    long = {"text": "é" * (1 + 3000 * me), "rank": me}
    collectives.barrier()
    return [
        collectives.all_reduce_ints([me, 2**53 + me]),
        collectives.all_reduce_max_int(-5 * me),
        collectives.broadcast_json(long, src=1)["rank"],
        collectives.broadcast_json(None),
        [len(found["text"]) for found in collectives.gather_json(long)],
        [len(found["text"]) for found in collectives.gather_json_to_rank_zero(long) or ()],
    ]


def test_all_ranks_get_the_same_exact_answers(pool: RankPool) -> None:
    expected = [[1, 2**54 + 1], 0, 1, None, [1, 3001]]
    assert pool.run(f"{HERE}:exchange_case") == [[*expected, [1, 3001]], [*expected, []]]


ERRORS = {
    "none": lambda me: None,
    "one": lambda me: NumericsError("nan", remedy="lower lr") if me == 1 else None,
    "same": lambda me: ConfigError("both"),
    "different": lambda me: ConfigError("zero") if me == 0 else NumericsError("one"),
    "foreign": lambda me: MemoryError() if me == 1 else None,
}


def agree_case(which: str) -> tuple[str, str]:
    try:
        collectives.agree(ERRORS[which](collectives.rank()), "save")
    except DistCptError as error:
        return type(error).__name__, str(error)
    return "agreed", ""


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("none", ("agreed", "")),
        ("one", ("NumericsError", "save: rank 1: nan -- lower lr")),
        ("same", ("ConfigError", "both")),
        ("different", ("ConfigError", "save: rank 0: zero")),
        ("foreign", ("DistCptError", "save: rank 1: MemoryError")),
    ],
)
def test_an_error_of_any_rank_is_raised_by_all(pool: RankPool, which: str, expected: tuple[str, str]) -> None:
    assert pool.run(f"{HERE}:agree_case", which=which) == [expected, expected]


def facts_case() -> list[Any]:
    me = collectives.rank()
    collectives.require_equal({"base": "a" * 64, "none": None})
    refusals = []
    for facts in ({"torch": f"2.{me}", "same": 1}, {"only here": 0} if me else {}):
        try:
            collectives.require_equal(facts)
        except ConfigError as error:
            refusals.append((str(error), error.agreed))
    return [refusals, collectives.ranks_that_see(me), collectives.ranks_that_see("same")]


def test_facts_in_which_ranks_differ_are_named_with_the_ranks(pool: RankPool) -> None:
    (refusals, own, both), other = pool.run(f"{HERE}:facts_case")
    assert ["torch is 2.0 on rank 0, 2.1 on rank 1" in refusals[0][0], refusals[0][1]] == [True, True]
    assert "only here is absent on rank 0, 0 on rank 1" in refusals[1][0]
    assert (own, both, other) == ([0], [0, 1], [refusals, [1], [0, 1]])
