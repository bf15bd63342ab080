"""Data that the tasks of a Slurm array prepare together: the same bytes as from one process."""

from __future__ import annotations

import json
import re
import sys

import pytest

from tests.prepared_by_many import content, recipe, write_input
from tests.tiny import write_recipe

pytestmark = [pytest.mark.slurm, pytest.mark.matrix]


def test_tasks_of_an_array_share_the_units_and_one_makes_the_store(cluster, tmp_path):
    write_input(tmp_path)
    stores = {}
    for cache in ("by-one", "by-array"):
        config = recipe(tmp_path, tmp_path / cache)
        path = write_recipe(tmp_path / f"{cache}.yaml", config.model_dump(mode="json", exclude_defaults=True))
        dist_cpt = (sys.executable, "-m", "dist_cpt.cli")
        if cache == "by-array":
            how = ("--on", "slurm", "--prepare", "--tasks", "3", "--time", "5")
            done = cluster.run(*dist_cpt, "launch", str(path), *how, check=False)
            assert done.returncode == 0, done.stderr
            job = re.findall(r"^job (\d+),", done.stdout, re.MULTILINE)[0]
            logs = tmp_path / cache / "logs"
            ended = cluster.wait_for(job, ("COMPLETED", "FAILED", "TIMEOUT"), 200)
            text = "".join(log.read_text() for log in logs.glob("*.log"))
            assert ended["JobState"] == "COMPLETED", text
            while cluster.jobs():  # the other tasks
                cluster.wait_for(cluster.jobs()[0], ("COMPLETED", "FAILED"), 200)
            assert len(list(logs.glob("*.log"))) == 3
        shown = cluster.run(*dist_cpt, "prepare", str(path), "--json")
        stores[cache] = (json.loads(shown.stdout)["identity"], content(tmp_path / cache))
    (one, files), (many, made) = stores.values()
    assert one == many
    tokens = {name: data for name, data in files.items() if name.endswith(("tokens.bin", "tokens.idx", ".jsonl"))}
    assert len(tokens) == 9
    assert {name: made[name] for name in tokens} == tokens
