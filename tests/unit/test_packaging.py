"""The wheel holds exactly our three packages and works without the checkout; the floors of pyproject are true."""

from __future__ import annotations

import json
import os
import re
import site
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# transformers 5.10.1 accepts no newer ones of the first two; Triton 3.6's interpreter fails under numpy 2.4
# ("only 0-dimensional arrays can be converted to Python scalars").
BESIDE_THE_OLDEST = ("tokenizers==0.22.0", "huggingface-hub==1.5.0", "numpy==2.0.2")


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    """The standard output of a command that must succeed, with nothing of the caller's Python path."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def new_environment(folder: Path, *packages: object, offline: bool = True) -> Path:
    """The interpreter of a virtual environment with `packages`, and below them all that is installed here.

    The editable install of the checkout is not among these: its .pth file is not read through another one.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "installed-here.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    options = ["--quiet", "--no-deps", "--ignore-installed", *(["--no-index"] if offline else [])]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *packages)
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment with the wheel."""
    return new_environment(tmp_path_factory.mktemp("installed") / "venv", wheel)


def test_transformers_survives_a_bare_kernels_folder():
    code = "from transformers.utils.import_utils import is_kernels_available as f; print(f())"
    run(sys.executable, "-c", code)


def test_the_wheel_holds_three_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
        for script in ("train", "prepare"):  # what `launch --on slurm` submits
            assert f"dist_cpt_launch/sbatch/{script}.sbatch" in archive.namelist()
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "dist_cpt",
        "dist_cpt_kernels",
        "dist_cpt_launch",
    }


def test_the_wheel_is_what_its_environment_imports(installed, tmp_path):
    code = "import dist_cpt, dist_cpt_kernels, dist_cpt_launch as l; print(dist_cpt.__file__, l.__file__, sep='\\n')"
    for line in run(installed, "-P", "-c", code, cwd=tmp_path).splitlines():
        assert Path(line).is_relative_to(installed.parents[1])
    assert "resume" in run(installed.parent / "dist-cpt", "--help", cwd=tmp_path)


@pytest.mark.matrix  # a minute
def test_the_wheel_runs_the_demo_outside_of_the_checkout(installed, tmp_path):
    """At a small size; `.ci/run` runs the whole demo from the checkout."""
    code = """if True:
        from pathlib import Path
        from dist_cpt.demo import GLOBAL_TOKENS, run_demo
        run_demo(Path("demo"), base_tokens=40 * GLOBAL_TOKENS, cpt_tokens=30 * GLOBAL_TOKENS)
    """
    run(installed, "-P", "-c", code, cwd=tmp_path, OMP_NUM_THREADS="1", PYTHONSAFEPATH="1")
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    assert (summary["steps"], summary["certificate"]) == (30, "pass")
    assert (tmp_path / "demo/report.html").stat().st_size > 10_000


def oldest_supported(name: str) -> str:
    """`name==version`, from the first version that pyproject.toml admits."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    (version,) = [found[1] for text in requirements if (found := re.fullmatch(rf"{name}>=([\d.]+)", text))]
    return f"{name}=={version}"


@pytest.mark.matrix  # downloads, then the contract part without its matrix
@pytest.mark.timeout(3600)
def test_the_contract_passes_with_the_oldest_supported_versions(tmp_path):
    oldest = [oldest_supported(name) for name in ("transformers", "peft", "triton")]
    python = new_environment(tmp_path / "venv", *oldest, *BESIDE_THE_OLDEST, offline=False)
    sources = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "launch"))
    arguments = ("tests/contract", "-q", "-p", "no:cacheprovider", "-m", "not matrix and not gpu")
    output = run(python, "-m", "pytest", *arguments, PYTHONPATH=sources, SHARD="")
    assert re.search(r"\d+ passed", output), output
