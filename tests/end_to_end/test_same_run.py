"""A resume continues the same run: its recipe's meaning is compared, its places are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import tiny
from tests.whole_run import StopAfter, rows, train


def stopped(made: tuple[Path, Path], tmp_path: Path, **changes: Any) -> Path:
    """A run of 12 steps that was stopped after 4."""
    run = tmp_path / "tiny"
    assert train(tiny.recipe(*made, tmp_path, **changes), StopAfter(run / "metrics.jsonl", 4)) == 75
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


def test_an_edited_record_does_not_change_the_run(made, tmp_path, capfd):
    run = stopped(made, tmp_path)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("weight_decay: 0.01", "weight_decay: 0.5"))
    assert train(tiny.recipe(*made, tmp_path, optim={"lr": 1e-2, "embedding_lr": 1e-3, "weight_decay": 0.5})) == 64
    assert "optim.weight_decay: 0.01 -> 0.5" in capfd.readouterr().err
