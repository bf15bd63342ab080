"""What `inspect` shows of a checkpoint against what was saved, and where a lineage ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_cpt.checkpoint.inspect import inspect_path
from dist_cpt.run_folder.checkpoints import read_manifest
from dist_cpt.run_folder.manifest import Manifest, manifest_to_bytes
from dist_cpt.run_folder.names import MANIFEST, RECIPE, STATE
from dist_cpt.run_folder.train_state import state_to_bytes
from tests.checkpoint_state import save_step, train_state
from tests.command import command

NUM_PARAMETERS = 4 * 32 + 33 * 4 + 61 * 32


def save_line(run: Path, *steps: int, attempt: int = 0, parent: str | None = None, keep: int = 9) -> list[str]:
    """Checkpoints of which each came from the one before; their state_sha256."""
    made = []
    for step in steps:
        state = train_state(step, attempt).model_copy(update={"parent": parent})
        parent = save_step(run, step, attempt=attempt, state=state, keep=keep).state_sha256
        made.append(parent)
    return made


def rewrite(checkpoint: Path, **changes: object) -> Manifest:
    """Another manifest with a valid hash of itself, as somebody with intent would write it."""
    manifest = Manifest.model_validate(read_manifest(checkpoint).model_dump() | changes)
    (checkpoint / MANIFEST).write_bytes(manifest_to_bytes(manifest))
    return manifest


def test_it_shows_what_was_saved(tmp_path: Path) -> None:
    states = save_line(tmp_path, 4, 8)
    content = inspect_path(tmp_path)
    assert [(row["name"], row["parent_step"], row["problem"]) for row in content["checkpoints"]] == [
        ("step-00000008", 4, None),
        ("step-00000004", None, None),
    ]
    newest = content["newest"]
    assert newest == inspect_path(tmp_path / "checkpoints" / "step-00000008")
    on_disk = sum(path.stat().st_size for path in (tmp_path / "checkpoints" / "step-00000008").iterdir())
    assert (newest["num_parameters"], newest["num_bytes"]) == (NUM_PARAMETERS, on_disk)
    assert newest["bytes_per_parameter"] == on_disk / NUM_PARAMETERS
    assert (newest["step"], newest["position"], newest["tokens"]) == (8, 64, 8000)
    assert newest["tokens_by_source"] == {"law": 7200, "web": 800}
    assert newest["groups"] == [
        {
            "name": "adapter",
            "num_tensors": 2,
            "num_parameters": 4 * 32 + 33 * 4,
            "compute_dtypes": ["bfloat16"],
            "shapes": {"4x32": 1, "33x4": 1},
            "master_bytes": 4 * (4 * 32 + 33 * 4),
            "moment_bytes": 8 * (4 * 32 + 33 * 4),
        },
        {
            "name": "embeddings",
            "num_tensors": 1,
            "num_parameters": 61 * 32,
            "compute_dtypes": ["bfloat16"],
            "shapes": {"61x32": 1},
            "master_bytes": 4 * 61 * 32,
            "moment_bytes": 8 * 61 * 32,
        },
    ]
    assert newest["saved_by"]["engine"] == "fsdp-full"
    assert (newest["wandb_run_id"], newest["probe_loss"], newest["recipe"]) == ("run7", 1 / 3, "f" * 64)
    assert {file["name"]: file["num_bytes"] for file in newest["files"]} == {
        path.name: path.stat().st_size
        for path in (tmp_path / "checkpoints" / "step-00000008").iterdir()
        if path.name != MANIFEST
    }
    assert (newest["state_sha256"], newest["parent"]) == (states[1], states[0])
    assert ([link["step"] for link in newest["lineage"]], newest["origin"]) == ([8, 4], "start")
    assert newest["certificate"] is None


def test_the_certificate_of_the_run_is_shown(tmp_path: Path) -> None:
    save_line(tmp_path, 4)
    certificate = tmp_path / "certificate.json"
    certificate.write_text(json.dumps({"verdict": "fail", "failed": ["exp_avg"], "step": 4, "attempt": 2}))
    assert inspect_path(tmp_path)["newest"]["certificate"]["failed"] == ["exp_avg"]
    (line,) = [line for line in command("inspect", tmp_path).out.splitlines() if line.startswith("  certificate")]
    assert all(part in line for part in ("fail", "exp_avg", "step 4", "attempt 2"))
    certificate.write_text("[]")
    assert inspect_path(tmp_path)["newest"]["certificate"] == {"verdict": "unreadable"}


def test_a_lineage_goes_through_checkpoints_moved_aside_and_ends_where_one_was_pruned(tmp_path: Path) -> None:
    first, _, third = save_line(tmp_path, 2, 4, 6)
    save_step(tmp_path, 6, attempt=1, seed=77, keep=9, state=train_state(6, 1).model_copy(update={"parent": first}))
    save_line(tmp_path, 8, attempt=2, parent=third)
    content = inspect_path(tmp_path)
    assert [(row["name"][:13], row["superseded"]) for row in content["checkpoints"]] == [
        ("step-00000008", False),
        ("step-00000006", False),
        ("step-00000004", False),
        ("step-00000002", False),
        ("step-00000006", True),
    ]
    newest = content["newest"]
    assert [link["step"] for link in newest["lineage"]] == [8, 6, 4, 2]
    assert newest["lineage"][1]["name"].startswith("step-00000006.")  # the one that was moved aside
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    newest = inspect_path(tmp_path)["newest"]
    assert ([link["step"] for link in newest["lineage"]], newest["origin"]) == ([8, 6, 4], "parent pruned")
    lines = command("inspect", tmp_path).out.splitlines()
    assert any(line.split()[-2:] == ["pruned", "valid"] for line in lines)
    assert any("<- step 4 (attempt 0) <- " in line for line in lines)


def test_a_lineage_that_goes_round_in_circles_ends(tmp_path: Path) -> None:
    (own,) = save_line(tmp_path, 4)
    path = tmp_path / "checkpoints" / "step-00000004"
    (path / STATE).write_bytes(state_to_bytes(train_state(4).model_copy(update={"parent": own})))
    content = inspect_path(path)
    assert content["origin"].startswith("broken: its parent step-00000004 ")
    assert [link["step"] for link in content["lineage"]] == [4]
    assert content["problem"] is not None


def test_a_state_without_a_parent_is_not_taken_for_a_start(tmp_path: Path) -> None:
    save_line(tmp_path, 4)
    path = tmp_path / "checkpoints" / "step-00000004"
    values = json.loads((path / STATE).read_text())
    del values["parent"]
    (path / STATE).write_text(json.dumps(values))
    assert inspect_path(path)["origin"] == "parent not recorded"


def test_a_damaged_newest_is_listed_and_the_next_one_shown(tmp_path: Path) -> None:
    save_line(tmp_path, 4, 8)
    (tmp_path / "checkpoints/step-00000008/manifest.json").write_text("{}")
    (tmp_path / "checkpoints/step-00000004/stray.bin").write_text("")
    content = command("inspect", tmp_path)
    assert content.code == 74
    assert f"step-00000008: {MANIFEST} " in content.error_lines[0]
    assert "step-00000004: stray.bin " in content.error_lines[0]
    (tmp_path / "checkpoints/step-00000004/stray.bin").unlink()
    ended = command("inspect", tmp_path, "--json")
    content = json.loads(ended.out)
    assert (ended.code, ended.err) == (0, "")
    assert content["newest"]["step"] == 4
    assert content["checkpoints"][0]["problem"].startswith(MANIFEST)
    assert content["checkpoints"][0]["step"] is None


def test_a_damaged_one_is_shown_and_ends_with_74(tmp_path: Path) -> None:
    save_line(tmp_path, 4)
    path = tmp_path / "checkpoints" / "step-00000004"
    (path / "extra\n\x1b[31mred").write_text("")
    ended = command("inspect", path)
    assert ended.code == 74
    assert "DAMAGED: extra\\n\\x1b[31mred " in ended.out
    assert "\x1b" not in ended.out + ended.err
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("made", "code", "named"),
    [("nothing", 64, ""), ("folder", 64, ""), ("run", 74, ""), ("step-00000004", 74, MANIFEST)],
)
def test_bad_input_is_one_line(tmp_path: Path, made: str, code: int, named: str) -> None:
    path = tmp_path / made
    if made != "nothing":
        path.mkdir()
    if made == "run":
        (path / RECIPE).write_text("")
    ended = command("inspect", path)
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (code, "", 1)
    assert str(path) in ended.err
    assert named in ended.err


def test_what_a_forged_manifest_says_cannot_break_the_output(tmp_path: Path) -> None:
    save_line(tmp_path, 4)
    path = tmp_path / "checkpoints" / "step-00000004"
    rewrite(path, base={"path": "x\n\x1b]0;owned\x07", "revision": None}, tensors=())
    ended = command("inspect", path)
    assert ended.code == 74
    assert "tensors" in ended.error_lines[0]
    assert "\x1b" not in ended.out
    assert json.loads(command("inspect", path, "--json").out)["bytes_per_parameter"] is None


def test_it_loads_no_torch_and_understands_a_dot(tmp_path: Path) -> None:
    save_line(tmp_path, 4)
    code = (
        "import sys; from dist_cpt.cli import main\n"
        "sys.argv = ['dist-cpt', 'inspect', '.']\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()\n"
    )
    folder = tmp_path / "checkpoints" / "step-00000004"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "step 4 (attempt 0) <- start" in done.stdout
