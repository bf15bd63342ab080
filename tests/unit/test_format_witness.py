"""Runs of formats 1 and 2, each made once by tests/fixtures/make_run.py: every reader opens them, and they resume.

A failure here means that a file format has changed. To change one, add a new fixture beside these and keep reading
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
from dist_cpt.data.store import TokenStore
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

FIXTURES = Path(__file__).parents[1] / "fixtures"
MADE_IN = "/tmp/dist-cpt-fixture"
STEP = "checkpoints/step-00000006"
# peft 0.21.2 reads a name that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(params=["run_v1", "run_v2"])
def run(request: pytest.FixtureRequest) -> Path:
    """The run folder of one format."""
    return FIXTURES / request.param / "tiny"


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of the fixture whose recipe names the copied base and corpus; returns the run folder."""
    folder = tmp_path / "run"
    shutil.copytree(run.parent, folder)
    recipe = folder / "tiny" / RECIPE
    recipe.write_text(recipe.read_text().replace(MADE_IN, str(folder)))
    return folder / "tiny"


def state_sha256(run: Path) -> str:
    return json.loads((run / STEP / MANIFEST).read_bytes())["content"]["state_sha256"]


def test_every_byte_and_the_record_are_valid(run: Path) -> None:
    assert verify_run(run) == {"step-00000006": [], "step-00000003": []}
    assert record_problems(run) == []
    assert command("verify", run).code == 0
    assert command("verify", run / STEP).code == 0
    assert newest_valid(run) == (run / STEP, [])


def test_state_and_manifest_are_written_as_they_were(run: Path) -> None:
    for path in published(run):
        assert manifest_to_bytes(read_manifest(path)) == (path / MANIFEST).read_bytes()
        assert state_to_bytes(read_state(path)) == (path / STATE).read_bytes()
    state = read_state(run / STEP)
    assert (state.step, state.position, state.tokens, state.attempt, state.optimizer_steps) == (6, 48, 3023, 1, 6)
    assert state.parent == read_manifest(run / "checkpoints" / "step-00000003").state_sha256


def test_the_tensors_are_those_of_the_manifest(run: Path) -> None:
    with load(run / STEP) as checkpoint:
        for tensor in checkpoint.manifest.tensors:
            for kind in STATE_KINDS:
                values = checkpoint.read(kind, tensor.name, 0, math.prod(tensor.shape))
                assert hashlib.sha256(values.numpy().tobytes()).hexdigest() == tensor.sha256[kind]


def test_a_token_store_of_format_2_is_valid() -> None:
    stores = [TokenStore.open(folder, verify=True) for folder in sorted((FIXTURES / "run_v2/cache").iterdir())]
    assert [(store.manifest.format_version, len(store.chunks())) for store in stores] == [(2, 2), (2, 2)]


def test_inspect_shows_the_lineage(run: Path) -> None:
    newest = inspect_path(run)["newest"]
    assert (newest["state_sha256"], newest["problem"], newest["certificate"]["verdict"]) == (
        state_sha256(run),
        None,
        "pass",
    )
    assert ([link["step"] for link in newest["lineage"]], newest["origin"]) == ([6, 3], "start")
    assert command("inspect", run).code == 0


def test_rows_and_objects_have_their_keys(run: Path) -> None:
    rows = read_rows(run / METRICS)
    assert [(row["step"], row["attempt"]) for row in rows] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    assert rows[0].keys() <= {field.name for field in fields(StepRecord)}  # a column may be added, not renamed
    assert [(row["step"], row["name"]) for row in read_rows(run / EVALUATIONS)] == [(0, "held-out")]
    kinds = [row["kind"] for row in read_rows(run / EVENTS)]
    assert kinds == ["start", "checkpoint", "message", "end", "resume", "checkpoint", "message", "end"]
    assert read_object(run / EXIT)["code"] == 75
    run = read_object(run / RUN)
    assert (run["attempts"], run["host"], [end["code"] for end in run["ends"]]) == (2, "node-1", [75])


def test_report_and_status_read_it(run: Path, copied: Path) -> None:
    from dist_cpt_launch.status import read_status

    files = read_run(run)
    assert (files.problems, files.checkpoints) == ([], ["step-00000003", "step-00000006"])
    assert [len(rows) for rows in (files.steps, files.rewound, files.evaluations, files.events)] == [6, 0, 1, 8]
    assert all((files.contract, files.certificate, files.exit, files.recipe))
    status = read_status(run)
    assert (status.step, status.num_steps, status.attempt, status.exit_code) == (6, 12, 1, 75)
    assert (status.checkpoint, status.problems) == ("step-00000006", [])
    assert command("report", copied).code == 0


def test_peft_opens_the_adapter(run: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(12).view(1, 12)
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        without = base(ids).logits
        adapted = PeftModel.from_pretrained(base, run / STEP).eval()(ids).logits
    assert not torch.equal(adapted, without)


@pytest.mark.parametrize("run", ["run_v1", pytest.param("run_v2", marks=pytest.mark.matrix)], indirect=True)
def test_it_resumes_to_its_end(run: Path, copied: Path) -> None:
    """Certified against what was saved then, and with the same data from there on."""
    train = [sys.executable, "-m", "dist_cpt.cli", "train", str(copied / RECIPE)]
    done = subprocess.run(train, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    certificate = read_object(copied / CERTIFICATE)
    assert (certificate["verdict"], certificate["state_sha256"], certificate["attempt"]) == (
        "pass",
        state_sha256(run),
        2,
    )
    rows = read_rows(copied / METRICS)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[:6] == read_rows(run / METRICS)
    assert read_state(copied / "checkpoints" / "step-00000009").parent == state_sha256(run)
    assert set(verify_run(copied)) == {"step-00000012", "step-00000009", "step-00000006"}
    assert not any(verify_run(copied).values())
