"""All ranks train the same base, tokenizer, adapter and data, wherever each of them reads it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.run_ranks import RunningRanks, run_ranks

NAME = "models--org--tiny"


def two_ranks(made: tuple[Path, Path], tmp_path: Path, **changes: Any) -> Path:
    values = tiny.recipe(*made, tmp_path, engine={"kind": "fsdp"}, train={"tokens": 2 * 8 * tiny.SEQ_LEN}, **changes)
    return tiny.write_recipe(tmp_path / "recipe.yaml", values)


def end(recipe: Path, log: Path, *of_rank_1: str) -> list[int]:
    """The exit codes of two ranks that end each by itself."""
    return RunningRanks(recipe, 2, log=log, of_rank={1: of_rank_1}).finish(grace_seconds=30.0)


def changed_copy(base: Path, target: Path) -> Path:
    """A copy of a base in which one weight differs."""
    shutil.copytree(base, target)
    weights = load_file(target / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_another_base_on_one_rank_is_refused_on_all(made, tmp_path):
    other = changed_copy(made[0], tmp_path / "other")
    log = tmp_path / "log"
    codes = end(two_ranks(made, tmp_path), log, f"model.path={other}")
    assert codes == [64, 64], log.read_text()
    reason = json.loads((tmp_path / "tiny/exit.json").read_text())["reason"]
    assert "sha256 of model.safetensors" in reason
    assert "on rank 0" in reason
    assert "on rank 1" in reason
    assert not (tmp_path / "tiny/metrics.jsonl").exists()


@pytest.mark.matrix
def test_two_copies_of_one_base_are_one_base(made, tmp_path):
    copy = shutil.copytree(made[0], tmp_path / "copy")
    log = tmp_path / "log"
    codes = end(two_ranks(made, tmp_path), log, f"model.path={copy}")
    assert codes == [0, 0], log.read_text()


@pytest.mark.matrix
def test_another_setting_on_one_rank_is_refused_on_all(made, tmp_path):
    log = tmp_path / "log"
    codes = end(two_ranks(made, tmp_path), log, "optim.eps=1.0e-6")
    assert codes == [64, 64], log.read_text()
    assert "optim.eps is 1e-08 on rank 0, 1e-06 on rank 1" in log.read_text()


def hub_cache(folder: Path, main: str, commits: dict[str, Path]) -> Path:
    """A cache of huggingface_hub with `commits`; its branch main is at commit `main`."""
    repository = folder / NAME
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(main)
    for commit, base in commits.items():
        (repository / "snapshots" / commit).mkdir(parents=True)
        for file in base.iterdir():
            blob = repository / "blobs" / f"{commit[:8]}-{file.name}"
            blob.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, blob)
            (repository / "snapshots" / commit / file.name).symlink_to(os.path.relpath(blob, repository / "x/y"))
    return folder


def run_with_caches(recipe: Path, *caches: Path) -> list[tuple[int, str]]:
    """(exit code, stderr) of ranks that are processes of their own: the hub's cache is read from the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank, cache in enumerate(caches):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        given = {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        given |= {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "dist_cpt.cli", "train", str(recipe)]
        with (recipe.parent / f"rank-{rank}.txt").open("w") as log:
            children.append(subprocess.Popen(command, env=os.environ | given, stderr=log))
    try:
        codes = [child.wait(timeout=240) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(code, (recipe.parent / f"rank-{rank}.txt").read_text()) for rank, code in enumerate(codes)]


@pytest.fixture
def caches(made, tmp_path) -> tuple[Path, Path]:
    """Two caches with the same two commits, whose branches main differ."""
    commits = {"a" * 40: made[0], "b" * 40: changed_copy(made[0], tmp_path / "other")}
    return tuple(hub_cache(tmp_path / f"cache-{main}", main * 40, commits) for main in "ab")


@pytest.mark.matrix
def test_a_hub_id_is_one_commit_for_all_ranks(made, caches, tmp_path):
    from dist_cpt.run_folder.checkpoints import read_manifest

    recipe = two_ranks(made, tmp_path, model={"path": "org/tiny"})
    ended = run_with_caches(recipe, *caches)
    assert [code for code, _ in ended] == [0, 0], ended
    manifest = read_manifest(tmp_path / "tiny/checkpoints/step-00000002")
    assert manifest.base["revision"] == "a" * 40
    alone = run_ranks(recipe, 2, f"model.path={made[0]}", "name=alone", log=tmp_path / "log")
    assert alone == [0, 0]
    trained = read_manifest(tmp_path / "alone/checkpoints/step-00000002")
    assert (manifest.base["sha256"], manifest.state_sha256) == (trained.base["sha256"], trained.state_sha256)


@pytest.mark.matrix
def test_other_bytes_under_the_same_commit_are_refused_on_all(made, caches, tmp_path):
    shutil.copyfile(tmp_path / "other/model.safetensors", caches[1] / NAME / "blobs/aaaaaaaa-model.safetensors")
    ended = run_with_caches(two_ranks(made, tmp_path, model={"path": "org/tiny"}), *caches)
    assert [code for code, _ in ended] == [64, 64], ended
    assert "sha256 of model.safetensors" in ended[0][1]


@pytest.mark.matrix
def test_a_cache_without_the_commit_is_refused_on_all(made, caches, tmp_path):
    shutil.rmtree(caches[1] / NAME / "snapshots" / ("a" * 40))
    ended = run_with_caches(two_ranks(made, tmp_path, model={"path": "org/tiny"}), *caches)
    assert [code for code, _ in ended] == [64, 64], ended
    assert "rank 1" in ended[0][1]


def with_more_tokens(base: Path, target: Path) -> Path:
    """A copy of a base whose tokenizer has one token more."""
    from transformers import AutoTokenizer

    shutil.copytree(base, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.add_tokens(["court"]) == 1
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture
def tokenizers(made, tmp_path) -> tuple[Path, Path]:
    """Two caches with the same two commits of a tokenizer, whose branches main differ."""
    commits = {"a" * 40: made[0], "b" * 40: with_more_tokens(made[0], tmp_path / "longer")}
    return tuple(hub_cache(tmp_path / f"cache-{main}", main * 40, commits) for main in "ab")


def test_a_tokenizers_hub_id_stands_for_one_commit(tokenizers, made, monkeypatch):
    from huggingface_hub import constants

    from dist_cpt.data.tokenizer import at_commit, load_tokenizer, tokenizer_commit
    from dist_cpt.errors import DataError

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tokenizers[1]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    old, new = "a" * 40, "b" * 40
    assert tokenizer_commit("org/tiny") == new
    assert tokenizer_commit(f"org/tiny@{old}") == old
    assert tokenizer_commit(str(made[0])) is None
    with pytest.raises(DataError, match="org/none"):
        tokenizer_commit("org/none")
    assert at_commit("org/tiny@main", old) == at_commit("org/tiny", old) == f"org/tiny@{old}"
    assert at_commit(str(made[0]), old) == str(made[0])  # a host may have its own copy
    assert "court" not in load_tokenizer(f"org/tiny@{old}").get_vocab()
    assert "court" in load_tokenizer("org/tiny").get_vocab()


@pytest.mark.matrix
def test_a_tokenizers_hub_id_is_one_commit_for_all_ranks(made, tokenizers, tmp_path):
    values = tiny.recipe(*made, tmp_path)
    recipe = two_ranks(made, tmp_path, data=values["data"] | {"tokenizer": "org/tiny"})
    ended = run_with_caches(recipe, *tokenizers)
    assert [code for code, _ in ended] == [0, 0], ended
