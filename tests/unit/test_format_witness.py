"""A run folder of format 1, made once by tests/fixtures/make_run.py: every reader still opens it, and it resumes.

A failure here means that a file format has changed. To change one, add a new fixture beside this one and keep reading
this one, or refuse it with the reason.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from dist_cpt.checkpoint.inspect import inspect_path
from dist_cpt.checkpoint.load import load, newest_valid
from dist_cpt.checkpoint.verify import verify_run
from dist_cpt.run_folder.audit import record_problems
from dist_cpt.run_folder.checkpoints import published, read_manifest, read_state
from dist_cpt.run_folder.contents import read_run
from dist_cpt.run_folder.json_files import read_object, read_rows
from dist_cpt.run_folder.manifest import manifest_to_bytes
from dist_cpt.run_folder.names import CERTIFICATE, EVALUATIONS, EVENTS, EXIT, MANIFEST, METRICS, RECIPE, RUN, STATE
from dist_cpt.run_folder.records import StepRecord
from dist_cpt.run_folder.train_state import state_to_bytes
from dist_cpt.training_state import STATE_KINDS
from tests.command import command

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_v1"
RUN_FOLDER = FIXTURE / "tiny"
MADE_IN = "/tmp/dist-cpt-fixture"
NEWEST = RUN_FOLDER / "checkpoints" / "step-00000006"
STATE_SHA256 = json.loads((NEWEST / MANIFEST).read_bytes())["content"]["state_sha256"]
# peft 0.21.2 reads a name that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the fixture whose recipe names the copied base and corpus; returns the run folder."""
    folder = tmp_path / "run_v1"
    shutil.copytree(FIXTURE, folder)
    recipe = folder / "tiny" / RECIPE
    recipe.write_text(recipe.read_text().replace(MADE_IN, str(folder)))
    return folder / "tiny"


def test_every_byte_and_the_record_are_valid() -> None:
    assert verify_run(RUN_FOLDER) == {"step-00000006": [], "step-00000003": []}
    assert record_problems(RUN_FOLDER) == []
    assert command("verify", RUN_FOLDER).code == 0
    assert command("verify", NEWEST).code == 0
    assert newest_valid(RUN_FOLDER) == (NEWEST, [])


def test_state_and_manifest_are_written_as_they_were() -> None:
    for path in published(RUN_FOLDER):
        assert manifest_to_bytes(read_manifest(path)) == (path / MANIFEST).read_bytes()
        assert state_to_bytes(read_state(path)) == (path / STATE).read_bytes()
    state = read_state(NEWEST)
    assert (state.step, state.position, state.tokens, state.attempt, state.optimizer_steps) == (6, 48, 3023, 1, 6)
    assert state.parent == read_manifest(RUN_FOLDER / "checkpoints" / "step-00000003").state_sha256


def test_the_tensors_are_those_of_the_manifest() -> None:
    with load(NEWEST) as checkpoint:
        for tensor in checkpoint.manifest.tensors:
            for kind in STATE_KINDS:
                values = checkpoint.read(kind, tensor.name, 0, math.prod(tensor.shape))
                assert hashlib.sha256(values.numpy().tobytes()).hexdigest() == tensor.sha256[kind]


def test_inspect_shows_the_lineage() -> None:
    newest = inspect_path(RUN_FOLDER)["newest"]
    assert (newest["state_sha256"], newest["problem"], newest["certificate"]["verdict"]) == (STATE_SHA256, None, "pass")
    assert ([link["step"] for link in newest["lineage"]], newest["origin"]) == ([6, 3], "start")
    assert command("inspect", RUN_FOLDER).code == 0


def test_rows_and_objects_have_their_keys() -> None:
    rows = read_rows(RUN_FOLDER / METRICS)
    assert [(row["step"], row["attempt"]) for row in rows] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    assert rows[0].keys() <= {field.name for field in fields(StepRecord)}  # a column may be added, not renamed
    assert [(row["step"], row["name"]) for row in read_rows(RUN_FOLDER / EVALUATIONS)] == [(0, "held-out")]
    kinds = [row["kind"] for row in read_rows(RUN_FOLDER / EVENTS)]
    assert kinds == ["start", "checkpoint", "message", "end", "resume", "checkpoint", "message", "end"]
    assert read_object(RUN_FOLDER / EXIT)["code"] == 75
    run = read_object(RUN_FOLDER / RUN)
    assert (run["attempts"], run["host"], [end["code"] for end in run["ends"]]) == (2, "node-1", [75])


def test_report_and_status_read_it(copied: Path) -> None:
    from dist_cpt_launch.status import read_status

    files = read_run(RUN_FOLDER)
    assert (files.problems, files.checkpoints) == ([], ["step-00000003", "step-00000006"])
    assert [len(rows) for rows in (files.steps, files.rewound, files.evaluations, files.events)] == [6, 0, 1, 8]
    assert all((files.contract, files.certificate, files.exit, files.recipe))
    status = read_status(RUN_FOLDER)
    assert (status.step, status.num_steps, status.attempt, status.exit_code) == (6, 12, 1, 75)
    assert (status.checkpoint, status.problems) == ("step-00000006", [])
    assert command("report", copied).code == 0


def test_peft_opens_the_adapter() -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(12).view(1, 12)
    base = AutoModelForCausalLM.from_pretrained(FIXTURE / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        without = base(ids).logits
        adapted = PeftModel.from_pretrained(base, NEWEST).eval()(ids).logits
    assert not torch.equal(adapted, without)


def test_it_resumes_to_its_end(copied: Path) -> None:
    """Certified against what was saved then, and with the same data from there on."""
    train = [sys.executable, "-m", "dist_cpt.cli", "train", str(copied / RECIPE)]
    done = subprocess.run(train, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    certificate = read_object(copied / CERTIFICATE)
    assert (certificate["verdict"], certificate["state_sha256"], certificate["attempt"]) == ("pass", STATE_SHA256, 2)
    rows = read_rows(copied / METRICS)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[:6] == read_rows(RUN_FOLDER / METRICS)
    assert read_state(copied / "checkpoints" / "step-00000009").parent == STATE_SHA256
    assert set(verify_run(copied)) == {"step-00000012", "step-00000009", "step-00000006"}
    assert not any(verify_run(copied).values())
