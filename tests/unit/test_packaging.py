"""The wheel holds exactly our three packages, and the source roots shadow nobody."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_transformers_survives_a_bare_kernels_folder():
    code = "from transformers.utils.import_utils import is_kernels_available as f; print(f())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_three_packages(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
        assert "dist_cpt_launch/sbatch/train.sbatch" in archive.namelist()  # what `launch --on slurm` submits
        templates = {path.name for path in (ROOT / "dist_cpt/report/templates").iterdir()}
        assert {f"dist_cpt/report/templates/{name}" for name in templates} <= set(archive.namelist())
        assert "report.html" in templates
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "dist_cpt",
        "dist_cpt_kernels",
        "dist_cpt_launch",
    }
