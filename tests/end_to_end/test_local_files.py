"""Two hosts without a common file system, but for the run folder: each has its own base, text and token stores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import tiny
from tests.run_ranks import RunningRanks

ALONE = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # each rank is on a host of its own


def two_hosts(made: tuple[Path, Path], output_dir: Path, tmp_path: Path) -> Path:
    values = tiny.recipe(*made, output_dir, engine={"kind": "fsdp"}, train={"tokens": 2 * 8 * tiny.SEQ_LEN})
    return tiny.write_recipe(tmp_path / "recipe.yaml", values)


def second_host(made: tuple[Path, Path], folder: Path) -> list[str]:
    """The overrides of a host with copies of everything."""
    base, corpus = made
    shutil.copytree(base, folder / "base")
    shutil.copytree(corpus.parent, folder / "corpus")
    text, held_out = folder / "corpus" / corpus.name, folder / "corpus/held-out.jsonl"
    places = {"model.path": folder / "base", "data.cache_dir": folder / "cache"}
    places |= {"data.sources.0.path": text, "data.validation.0.path": held_out}
    return [f"{key}={place}" for key, place in places.items()]


@pytest.mark.matrix
def test_each_host_prepares_its_own_copy(made, tmp_path):
    log, own = tmp_path / "log", second_host(made, tmp_path / "second")
    recipe = two_hosts(made, tmp_path / "runs", tmp_path)
    codes = RunningRanks(recipe, 2, log=log, of_rank={1: own}, **ALONE).finish()
    assert codes == [0, 0], log.read_text()
    caches = [tmp_path / "runs/data", tmp_path / "second/cache"]
    assert [len(list(cache.glob("*/tokens.bin"))) for cache in caches] == [2, 2]
    assert len((tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()) == 2
    again = RunningRanks(
        recipe, 2, "train.tokens=2048", "accept_changes=[train.tokens]", log=log, of_rank={1: own}, **ALONE
    )
    assert again.finish() == [0, 0], log.read_text()


@pytest.mark.matrix
def test_another_text_on_one_host_is_refused_on_all(made, tmp_path):
    log, own = tmp_path / "log", second_host(made, tmp_path / "second")
    with (tmp_path / "second/corpus" / made[1].name).open("a") as file:
        file.write('{"text": "one more"}\n')
    codes = RunningRanks(two_hosts(made, tmp_path / "runs", tmp_path), 2, log=log, of_rank={1: own}, **ALONE).finish(
        grace_seconds=30.0
    )
    assert codes == [64, 64], log.read_text()
    reason = json.loads((tmp_path / "runs/tiny/exit.json").read_text())["reason"]
    assert "token store of corpus is" in reason
    assert "on rank 0" in reason
    assert "on rank 1" in reason


def test_a_run_folder_of_one_host_is_refused_on_all(made, tmp_path):
    """The path is the same on both, and is another folder on each."""
    hosts = {number: tmp_path / f"host-{number}" for number in range(2)}
    for host in hosts.values():
        host.mkdir()
    log, recipe = tmp_path / "log", two_hosts(made, Path("/proc/self/cwd/runs"), tmp_path)
    ranks = RunningRanks(recipe, 2, log=log, folder_of_rank=hosts, DIST_CPT_STORAGE_SECONDS="1", **ALONE)
    assert ranks.finish(grace_seconds=30.0) == [64, 64], log.read_text()
    ended = json.loads((hosts[0] / "runs/tiny/exit.json").read_text())
    assert ended["code"] == 64
    assert (
        "rank 1 cannot see the folder /proc/self/cwd/runs/tiny of rank 0 -- put output_dir on a file system"
        in ended["reason"]
    )
    assert not (hosts[1] / "runs/tiny").exists()
