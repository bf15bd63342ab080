"""What the doctor says of real parts, and of machines that lack or hang in one."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
from dist_cpt_launch.doctor import (
    ask,
    device_findings,
    extra_finding,
    folder_findings,
    is_broken,
    slurm_finding,
    wandb_finding,
)
from packaging.requirements import Requirement

from tests.command import command

TORCH = {"torch": "2.13.0", "cuda": "13.0", "nccl": "2.28.3"}


def states(findings) -> dict[str, str]:
    return {finding.what: finding.state for finding in findings}


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """A folder that is the whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_this_machine_can_run_and_says_so(tmp_path):
    ended = command("doctor", "--folder", tmp_path / "runs", "--json")
    found = json.loads(ended.out)
    assert ended.code == 0
    assert found["ok"]
    by_name = {one["what"]: one for one in found["findings"]}
    for needed in ("python", "packages", "torch", f"folder {tmp_path / 'runs'}", "flock", "extra zero"):
        assert by_name[needed]["state"] == "ok", by_name[needed]
    assert list(tmp_path.iterdir()) == []  # it leaves nothing


def test_a_folder_that_cannot_be_written_is_broken():
    (finding,) = folder_findings(Path("/proc/nope"), 30.0)
    assert is_broken(finding)
    assert "/proc/nope cannot be written" in finding.text


def test_what_does_not_answer_is_left_behind():
    began = time.monotonic()
    assert ask(["-c", "import time; time.sleep(60)"], 0.5) == {"failed": "no answer within 0.5 s"}
    assert time.monotonic() - began < 30
    assert ask(["-c", "raise OSError('libcuda is broken')"], 60) == {"failed": "OSError: libcuda is broken"}


def test_an_extra_that_is_missing_or_of_another_version_comes_with_its_command():
    required = [
        Requirement("torch>=2.11"),
        Requirement('torch==1.0; extra == "zero"'),
        Requirement('no-such-package; extra == "zero"'),
    ]
    finding = extra_finding("zero", required)
    assert finding.state == "note"
    assert finding.text.endswith(", not ==1.0; no-such-package is not installed")
    assert finding.fix == "pip install 'dist-cpt[zero]'"


def test_gpus_that_torch_does_not_see(path):
    tool(path, "nvidia-smi", 'echo "0, NVIDIA H100, 580.65, 81559, 4, 0"; echo "1, NVIDIA H100, 580.65, 81559, 4, 0"')
    agree = {"errors": {"rope": 1e-3}, "allowed": 1.6e-2}
    both = device_findings(TORCH | {"devices": ["H100", "H100"], "kernels": agree})
    assert states(both) == {"torch": "ok", "GPU": "ok", "NCCL": "ok", "kernels": "ok"}
    assert both[1].text == "2 x NVIDIA H100, driver 580.65"
    wrong = device_findings(TORCH | {"devices": ["H100", "H100"], "kernels": agree | {"errors": {"rope": 0.5}}})
    assert states(wrong)["kernels"] == "note"
    assert "model.kernels=reference" in wrong[-1].fix
    unseen = device_findings(TORCH | {"devices": []})
    assert is_broken(unseen[-1])
    assert "torch sees 0 of 2" in unseen[-1].text


@pytest.mark.parametrize("emulated", [True, False])
def test_a_cpu_without_bf16_is_told_to_use_fp32(path, emulated):
    _, gpu = device_findings(TORCH | {"devices": [], "emulates_bf16": emulated})
    assert (gpu.state, "model.weights: fp32" in gpu.fix) == ("note", emulated)


def test_slurm_that_is_absent_dead_or_there(path):
    assert "no sbatch here" in slurm_finding(5.0).text
    tool(path, "sbatch", "/bin/sleep 60")
    assert slurm_finding(0.3).text == "sbatch does not answer"
    tool(path, "sbatch", "echo slurm 24.05")
    tool(path, "sinfo", "echo gpu; echo cpu")
    assert slurm_finding(5.0).text == "slurm 24.05, partitions gpu, cpu"
    tool(path, "sinfo", "exit 1")
    assert slurm_finding(5.0).state == "note"


def test_a_login_is_worth_what_its_server_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        asked = {"installed": True, "credentials": True, "server": f"http://127.0.0.1:{port}"}
        assert wandb_finding(asked).state == "ok"
        assert wandb_finding(asked | {"credentials": False}).fix == "wandb login"
    assert "is not reached" in wandb_finding(asked).text
    assert wandb_finding({"installed": False}).fix == "pip install 'dist-cpt[wandb]'"
