"""What `dist-cpt init` writes is a run: it trains as it is."""

from __future__ import annotations

import pytest

from dist_cpt.run_folder.names import METRICS
from tests.command import command
from tests.whole_run import rows


@pytest.mark.matrix
def test_the_new_recipe_trains_as_it_is(made, tmp_path, monkeypatch):
    base, corpus = made
    monkeypatch.chdir(tmp_path)
    assert command("init", "--model", base, "--data", corpus, "--gpu", "cpu").code == 0
    assert command("train", "recipe.yaml", "--set", "track.wandb.mode=disabled").code == 0
    (run,) = (tmp_path / "runs").glob("*-cpt")
    assert len(rows(run / METRICS)) > 20
