"""Hosts with file systems of their own: each prepares its data, and all of them need one run folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_cpt.errors import ConfigError
from dist_cpt.runtime.collectives import rank
from dist_cpt.runtime.shared_folder import first_that_sees, require_shared
from tests.ranks import RankPool

HERE = "tests.distributed.test_shared_folder"


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(3, timeout_seconds=60)
    yield pool
    pool.close()


def first_case(folders: list[str], marks: list[bool]) -> int | None:
    return first_that_sees(Path(folders[rank()]), 0.3, marks=marks[rank()])


@pytest.mark.parametrize(
    ("folders", "marks", "expected"),
    [
        ("aaa", [True, True, True], [0, 0, 0]),
        ("aaa", [True, False, True], [0, 0, 0]),
        ("abb", [True, True, True], [0, 1, 1]),
        ("abb", [True, False, True], [0, 2, 2]),
        ("abb", [True, False, False], [0, None, None]),
        ("-bb", [True, True, False], [None, 1, 1]),  # rank 0 cannot make its folder
    ],
)
def test_ranks_know_with_whom_they_share(
    pool: RankPool, tmp_path: Path, folders: str, marks: list[bool], expected: list[int | None]
) -> None:
    paths = [str(tmp_path / name) if name != "-" else "/proc/none" for name in folders]
    assert pool.run(f"{HERE}:first_case", folders=paths, marks=marks) == expected
    assert not list(tmp_path.rglob(".seen*"))


def shared_case(folders: list[str]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIST_CPT_STORAGE_SECONDS", "0.3")
        try:
            require_shared(Path(folders[rank()]), "output_dir", remedy="share it")
        except ConfigError as error:
            return f"{error} {error.agreed}"
    return "shared"


def test_a_folder_that_only_rank_0_sees_is_refused_on_all(pool: RankPool, tmp_path: Path) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert pool.run(f"{HERE}:shared_case", folders=[a, a, a]) == ["shared"] * 3
    refused = [
        f"output_dir: ranks 1-2 cannot see the folder {folder} of rank 0 -- share it True" for folder in (a, b, b)
    ]
    assert pool.run(f"{HERE}:shared_case", folders=[a, b, b]) == refused
