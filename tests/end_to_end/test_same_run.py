"""A resume continues the same run: its recipe's meaning is compared, its places are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dist_cpt.run_folder.checkpoints import read_manifest
from tests import tiny
from tests.command import command
from tests.whole_run import StopAfter, rows, train


def stopped(made: tuple[Path, Path], tmp_path: Path, **changes: Any) -> Path:
    """A run of 12 steps that was stopped after 4."""
    run = tmp_path / "tiny"
    assert train(tiny.recipe(*made, tmp_path, **changes), StopAfter(4)) == 75
    return run


def test_another_recipe_is_refused_though_the_recorded_one_is_gone(made, tmp_path, capfd):
    run = stopped(made, tmp_path)
    hotter = tiny.recipe(*made, tmp_path, optim={"lr": 0.3, "embedding_lr": 1e-3, "betas": [0.5, 0.5]})
    (run / "recipe.yaml").unlink()
    capfd.readouterr()
    assert train(hotter) == 64
    refusal = capfd.readouterr().err
    assert all(part in refusal for part in ("optim.lr: 0.01 -> 0.3", "optim.betas.0: 0.9 -> 0.5", "--accept-changes"))
    assert not (run / "recipe.yaml").exists()  # a refused start does not make the run another recipe's

    assert train(hotter | {"accept_changes": ["optim.lr", "optim.betas"]}) == 0
    certificate = json.loads((run / "certificate.json").read_text())
    assert certificate["verdict"] == "pass"
    assert next(c for c in certificate["checks"] if c["name"] == "recipe")["detail"].count("->") == 3
    assert json.loads((run / "run.json").read_text())["accepted_changes"] == [
        "optim.betas.0",
        "optim.betas.1",
        "optim.lr",
    ]
    first = next(row for row in rows(run / "metrics.jsonl") if row["attempt"] == 1)
    assert first["lr"]["adapter"] > 0.01
    assert train(hotter) == 0  # its checkpoints are of this recipe by now


@pytest.mark.matrix
def test_an_edited_record_does_not_change_the_run(made, tmp_path, capfd):
    run = stopped(made, tmp_path)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("weight_decay: 0.01", "weight_decay: 0.5"))
    assert train(tiny.recipe(*made, tmp_path, optim={"lr": 1e-2, "embedding_lr": 1e-3, "weight_decay": 0.5})) == 64
    assert "optim.weight_decay: 0.01 -> 0.5" in capfd.readouterr().err


def moved(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """The folder to which a stopped run, its base, text and token stores were copied, with other times."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(made[0], old / "base")
    shutil.copytree(made[1].parent, old / "corpus")
    stopped((old / "base", old / "corpus/corpus.jsonl"), old)
    shutil.copytree(old, new, copy_function=shutil.copy)
    shutil.rmtree(old)
    return new


def end_of(run: Path) -> str:
    return read_manifest(run / "checkpoints/step-00000012").state_sha256


def test_a_moved_run_ends_as_it_would_have(made, tmp_path):
    new = moved(made, tmp_path)
    values = tiny.recipe(new / "base", new / "corpus/corpus.jsonl", new)
    assert train(values) == 0
    assert train(tiny.recipe(*made, tmp_path / "unbroken")) == 0
    assert end_of(new / "tiny") == end_of(tmp_path / "unbroken/tiny")
    stores = [path.parent for path in (new / "data").glob("*/manifest.json") if not path.parent.is_symlink()]
    assert sorted(path.name.split("-")[0] for path in stores) == ["corpus", "held"]  # nothing is tokenised twice
    ended = command("verify", new / "tiny")
    assert ended.code == 0
    assert {line for line in ended.out.splitlines() if line.startswith("token store")} == {
        f"token store {path.name}: valid" for path in stores
    }


def test_a_run_resumes_from_token_stores_alone(made, tmp_path):
    new = moved(made, tmp_path)
    stores = {path.name.split("-")[0]: str(path) for path in (new / "data").iterdir()}
    shutil.rmtree(new / "corpus")
    values = tiny.recipe(new / "base", new / "corpus/corpus.jsonl", new)
    values["data"]["sources"] = [{"store": stores["corpus"]}]
    values["data"]["validation"] = [{"name": "held-out", "store": stores["held"]}]
    assert train(values) == 0
    assert train(tiny.recipe(*made, tmp_path / "unbroken")) == 0
    assert end_of(new / "tiny") == end_of(tmp_path / "unbroken/tiny")


@pytest.mark.matrix
def test_resume_follows_a_moved_run(made, tmp_path):
    new = moved(made, tmp_path)
    renamed = (new / "tiny").rename(new / "renamed")
    places = {"model.path": "base", "data.sources.0.path": "corpus/corpus.jsonl"}
    places["data.validation.0.path"] = "corpus/held-out.jsonl"
    overrides = [f"--set={key}={new / place}" for key, place in places.items()]
    ended = command("resume", renamed, *overrides)
    assert ended.code == 0, ended.err
    assert train(tiny.recipe(*made, tmp_path / "unbroken")) == 0
    assert end_of(renamed) == end_of(tmp_path / "unbroken/tiny")


def test_tokens_that_changed_on_the_disk_are_not_trained(made, tmp_path):
    run = stopped(made, tmp_path)
    for store in [path.parent for path in (tmp_path / "data").glob("*/manifest.json")]:
        content = bytearray((store / "tokens.bin").read_bytes())
        content[len(content) // 2 : len(content) * 2 // 3] = bytes(len(content) * 2 // 3 - len(content) // 2)
        (store / "tokens.bin").write_bytes(content)
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny.recipe(*made, tmp_path))
    assert train(tiny.recipe(*made, tmp_path)) == 65
    reason = json.loads((run / "exit.json").read_text())["reason"]
    assert all(part in reason for part in ("tokens.bin", "chunk 0", "dist-cpt prepare"))
    ended = command("verify", run)
    assert (ended.code, ended.out.count("DAMAGED")) == (65, 2)
    assert command("prepare", recipe).code == 0
    assert len(list((tmp_path / "data").glob("*.damaged-*"))) == 2
    assert train(tiny.recipe(*made, tmp_path)) == 0
