"""One short job on a real Slurm in every test run: hostile names stay inert, a secret is not written anywhere."""

from __future__ import annotations

import os

import pytest

from tests import tiny
from tests.slurm.case import BLOCKS, case

pytestmark = pytest.mark.slurm
SENTINEL = "sentinel-0123456789"


def test_hostile_names_and_a_secret_on_the_way_through_slurm(cluster, made, tmp_path):
    folder = tmp_path / "a b $(touch owned) ü%j;'"
    folder.mkdir()
    one = case(cluster, made, folder, steps=4, engine="single")
    recipe = one.recipe.rename(folder / "re $(touch owned)`touch owned` ';.yaml")
    one.recipe = recipe
    override = f"train={{tokens: {4 * BLOCKS * tiny.SEQ_LEN}}} # $(touch owned)\n"
    one.launch("--nodes=1", "--time=5", "--set", override, WANDB_API_KEY=SENTINEL, HF_TOKEN=SENTINEL)
    one.finish()
    one.complete()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if path.name == "owned"]
    assert [path for path in files if path.suffix == ".wandb"]
    assert [path for path in files if SENTINEL.encode() in path.read_bytes()] == []
    shown = cluster.run("scontrol", "show", "job", one.job).stdout
    assert SENTINEL not in shown
    assert f"Command={os.fspath(tmp_path)}" not in shown  # the batch script is the project's own
