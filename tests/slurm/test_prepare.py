"""Data that the tasks of a Slurm array prepare together: the same bytes as from one process."""

from __future__ import annotations

import json
import re
import sys
import time

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


def test_a_task_at_its_time_limit_is_requeued_and_continues(cluster, tmp_path):
    """Its last source waits at a gate, so that the warning comes while a unit is made, and others are finished."""
    write_input(tmp_path)
    (tmp_path / "gate.py").write_text(
        "import time\nfrom pathlib import Path\n\n"
        "def passes(text):\n"
        "    while not (Path(__file__).parent / 'open').exists():\n"
        "        time.sleep(0.1)\n"
        "    return True\n"
    )
    names = ("lines.jsonl", "rows.parquet", "texts")
    sources = [{"path": str(tmp_path / name)} for name in names]
    sources[-1]["filter"] = "gate:passes"
    config = recipe(tmp_path, tmp_path / "cache", sources=sources)
    path = write_recipe(tmp_path / "recipe.yaml", config.model_dump(mode="json", exclude_defaults=True))
    dist_cpt = (sys.executable, "-m", "dist_cpt.cli")
    how = ("--on", "slurm", "--prepare", "--tasks", "1", "--time", "30")
    done = cluster.run(*dist_cpt, "launch", str(path), *how, PYTHONPATH=str(tmp_path))
    job = re.findall(r"^job (\d+),", done.stdout, re.MULTILINE)[0]
    logs = tmp_path / "cache/logs"

    def until(what, seconds):
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "".join(log.read_text() for log in logs.glob("*.log"))
            time.sleep(0.2)

    made = tmp_path / "cache"
    until(lambda: len(list(made.glob("*/manifest.json"))) == 2 and list(made.glob("texts-*/*.claim")), 200)
    cluster.run("scancel", "--signal=USR1", "--batch", f"{job}_0")
    (log,) = logs.glob("*.log")
    until(lambda: "the time limit is near: requeued" in log.read_text(), 60)
    assert "stopped while data was prepared; finished units are kept" in log.read_text()
    finished = {path: path.stat().st_mtime_ns for path in made.glob("*/manifest.json")}
    (tmp_path / "open").touch()
    until(lambda: cluster.job(job)["JobState"] == "COMPLETED", 300)
    assert cluster.job(job)["Restarts"] == "1"
    assert len(list(made.glob("*/manifest.json"))) == 3
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
