"""Every ending of an attempt leaves exit.json: a raised error of any kind, and a kill, which the launcher records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dist_cpt_launch.launch_plan import LaunchPlan
from dist_cpt_launch.local import run_local

from dist_cpt.errors import CheckpointError, DataError, DistCptError, NumericsError, WriteError
from dist_cpt.run_folder.claim import record_killed
from dist_cpt.runtime.stop import StopRequest
from dist_cpt.train.attempt import run_attempt
from tests import tiny
from tests.whole_run import built

ENDINGS: list[tuple[BaseException, int]] = [
    (DataError("no text"), 65),
    (DistCptError("a defect"), 70),
    (NumericsError("NaN"), 71),
    (WriteError("full"), 73),
    (CheckpointError("damaged"), 74),
    (RuntimeError("a peer is gone"), 70),
    (MemoryError(), 70),
    (SystemExit(3), 70),
    (KeyboardInterrupt(), 70),
]


def recipe(folder: Path) -> dict[str, Any]:
    return tiny.recipe(folder / "base", folder / "corpus.jsonl", folder, health={"hang": None})


@pytest.mark.parametrize(("error", "code"), ENDINGS, ids=lambda value: type(value).__name__)
def test_an_error_in_any_phase_is_recorded(tmp_path: Path, error: BaseException, code: int) -> None:
    def body(_context: object) -> tuple[int, str]:
        raise error

    if isinstance(error, Exception):
        assert run_attempt(built(recipe(tmp_path)), StopRequest(), body)[0] == code
    else:
        with pytest.raises(type(error)):
            run_attempt(built(recipe(tmp_path)), StopRequest(), body)
    recorded = json.loads((tmp_path / "tiny/exit.json").read_text())
    assert recorded["code"] == code
    assert recorded["reason"]


KILLED = """
import os, signal, sys
from pathlib import Path
from dist_cpt.config.load import load_recipe
from dist_cpt.config.resolve import resolve_paths, run_folder
from dist_cpt.run_folder.claim import claim
config = resolve_paths(load_recipe(Path(sys.argv[1])))
claimed = claim(run_folder(config), config, "0a1b2c3d")
(run_folder(config) / "metrics.jsonl").write_text('{"step": 7}\\n')
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_whose_ranks_were_all_killed_is_recorded_by_its_launcher(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path))
    run = tmp_path / "tiny"
    assert run_local(LaunchPlan((sys.executable, "-c", KILLED, str(path)), {}, run)) == 70
    recorded = json.loads((run / "exit.json").read_text())
    assert (recorded["code"], recorded["step"]) == (70, 7)


def test_the_launcher_records_nothing_of_an_attempt_that_lives_or_has_recorded_its_end(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path))
    run = tmp_path / "tiny"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    started = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(started | {"pid": os.getpid()}))
    record_killed(run, 70, "killed")
    assert not (run / "exit.json").exists()
    (run / "run.json").write_text(json.dumps(started))
    (run / "exit.json").write_text("{}")
    record_killed(run, 70, "killed")
    assert (run / "exit.json").read_text() == "{}"
