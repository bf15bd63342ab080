"""What `launch --on slurm` renders: the same as the golden files, inert whatever the names, and no secret."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dist_cpt_launch.launch_options import LaunchOptions
from dist_cpt_launch.launch_plan import LaunchPlan, local_plan
from dist_cpt_launch.slurm import batch_script, prepare_plan, ranks_per_node, slurm_plan, submit

from dist_cpt.config.load import build
from dist_cpt.config.resolve import resolve_paths
from dist_cpt.errors import ConfigError
from tests import tiny
from tests.command import command

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/slurm"
ALL = LaunchOptions(
    nodes=4,
    min_nodes=2,
    procs_per_node=2,
    time="1-00:00:00",
    partition="gpu,backup",
    account="lab_7",
    qos="normal",
    gres="gpu:a100:2",
    cpus_per_task=8,
    save_before_limit=240,
    max_restarts=5,
    preflight=False,
    sbatch=["--constraint=a100&nvlink", "--exclude=n7"],
    srun=["--container-image=/images/a b.sqsh"],
)
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


def config(folder: Path, **changes: object):
    return resolve_paths(build(tiny.recipe(folder / "base", folder / "c.jsonl", folder / "runs", **changes), "x"))


def plans(folder: Path) -> dict[str, LaunchPlan]:
    fsdp = config(folder, engine="fsdp")
    other = config(folder, engine="fsdp", name="other")
    first, second = folder / "recipe.yaml", folder / "other.yaml"
    chained = LaunchOptions(nodes=2, procs_per_node=2, time="02:00:00", requeue_by="chain")
    joined = LaunchOptions(nodes=2, rdzv="head:29500", procs_per_node=2)
    many = LaunchOptions(tasks=64, max_running=8, cpus_per_task=4, time="60", partition="cpu")
    return {
        "prepare": prepare_plan((fsdp, first), ["seed=1"], many, folder=folder),
        "two-nodes": slurm_plan([(fsdp, first)], ["seed=1"], LaunchOptions(nodes=2, procs_per_node=2), folder=folder),
        "all-options": slurm_plan([(fsdp, first)], [], ALL, folder=folder),
        "array": slurm_plan([(fsdp, first), (other, second)], [], LaunchOptions(max_running=1), folder=folder),
        "chain": slurm_plan([(fsdp, first)], [], chained, folder=folder),
        "exit": slurm_plan([(fsdp, first)], [], LaunchOptions(requeue_by="exit", time="60"), folder=folder),
        "several-hosts": local_plan(fsdp, first, [], joined, threads_per_rank=1),
    }


@pytest.mark.parametrize("name", ["prepare", "two-nodes", "all-options", "array", "chain", "exit", "several-hosts"])
def test_plans_match_the_golden_files(tmp_path, name):
    shown = plans(tmp_path)[name].shell_line()
    for text, place in (
        (str(tmp_path), "/FOLDER"),
        (str(batch_script()), "/train.sbatch"),
        (str(batch_script("prepare.sbatch")), "/prepare.sbatch"),
        (sys.executable, "/PYTHON"),
    ):
        shown = shown.replace(text, place)
    path = GOLDEN / f"{name}.sh"
    if os.environ.get("WRITE_GOLDEN"):
        path.write_text(shown + "\n")
    assert shown + "\n" == path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize(
    ("gpus", "gres", "ranks"),
    [(None, None, 1), ("8", None, 8), ("h100:4", None, 4), ("a100:2,h100:4", None, 6), (None, "gpu:8", 8),
     (None, "gpu:h100:2,nvme:1", 2), (None, "nvme:4", 1), (None, "gpu", 1)],
)  # fmt: skip
def test_every_gpu_that_is_asked_for_gets_a_rank(gpus, gres, ranks):
    assert ranks_per_node(gpus, gres) == ranks


def test_the_command_starts_one_rank_per_gpu(tmp_path):
    values = tiny.recipe(tmp_path / "base", tmp_path / "c.jsonl", tmp_path / "runs", engine="fsdp")
    recipe = tiny.write_recipe(tmp_path / "r.yaml", values)
    ended = command("launch", recipe, "--on", "slurm", "--gpus-per-node", "h100:2", "--dry-run")
    assert "--ntasks-per-node=2" in ended.out
    assert "--procs-per-node=2" in ended.out


def test_hostile_names_are_words_and_nothing_else(tmp_path):
    folder = tmp_path / "a b $(touch owned) ü%j;'\""
    folder.mkdir()
    recipe = folder / "re $(touch owned)`touch owned` ;'.yaml"
    hostile = ["data={x: '$(touch owned)'}", "name=a\nb"]
    plan = slurm_plan([(config(folder, engine="fsdp"), recipe)], hostile, LaunchOptions(), folder=folder)
    assert plan.argv[-1] == str(recipe)
    assert [item for item in plan.argv if item.startswith("--set=")] == [f"--set={item}" for item in hostile]
    (output,) = [item for item in plan.argv if item.startswith("--output=")]
    assert output == f"--output={folder}/runs/tiny/logs/slurm.log".replace("%", "%%")
    words = shlex.split(plan.shell_line())
    assert tuple(words[words.index("&&") + 1 :]) == plan.argv
    run = plan.shell_line().replace("sbatch ", "printf '%s\\0' ", 1)
    done = subprocess.run(["bash", "-c", run], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert tuple(done.stdout.split("\0")[:-1]) == plan.argv[1:]
    assert not list(tmp_path.rglob("owned"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"partition": "gpu; rm -rf"}, "--partition"),
        ({"account": "-x"}, "--account"),
        ({"gres": "$(id)"}, "--gres"),
        ({"qos": "a\nb"}, "--qos"),
        ({"time": "tomorrow"}, "--time"),
        ({"nodes": 2, "min_nodes": 3}, "--min-nodes 3"),
        ({"sbatch": ("rm",)}, "'rm'"),
        ({"sbatch": ("--comment=a\nb",)}, "--comment"),
        ({"sbatch": ("--export=ALL,HF_TOKEN=x",)}, "--export"),
        ({"nodes": 3}, "3 ranks"),
    ],
)
def test_what_slurm_cannot_take_is_refused_before_it_is_asked(tmp_path, options, named):
    with pytest.raises(ConfigError, match=re.escape(named)):
        slurm_plan(
            [(config(tmp_path, engine="fsdp"), tmp_path / "r.yaml")], [], LaunchOptions(**options), folder=tmp_path
        )
    with pytest.raises(ConfigError, match=r"a\\nb\.yaml"):
        slurm_plan([(config(tmp_path), tmp_path / "a\nb.yaml")], [], LaunchOptions(), folder=tmp_path)


def test_no_value_of_a_secret_is_rendered(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "sentinel-0123456789")
    assert all("sentinel-0123456789" not in plan.shell_line() for plan in plans(tmp_path).values())
    with pytest.raises(ConfigError, match="WANDB_API_KEY") as refused:
        slurm_plan(
            [(config(tmp_path), tmp_path / "r.yaml")], ["name=sentinel-0123456789"], LaunchOptions(), folder=tmp_path
        )
    assert "sentinel" not in str(refused.value)


def test_a_dry_run_loads_no_torch_and_writes_nothing(tmp_path):
    recipe = tiny.write_recipe(tmp_path / "r.yaml", tiny.recipe(tmp_path / "base", tmp_path / "c", tmp_path / "runs"))
    code = "import sys; from dist_cpt.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    argv = [sys.executable, "-c", code, "launch", str(recipe), "--on", "slurm", "--dry-run"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    line, torch = done.stdout.splitlines()
    assert line.startswith(f"mkdir -p {tmp_path}/runs/tiny/logs && sbatch --parsable")
    assert torch == "False"
    assert not (tmp_path / "runs").exists()


def test_local_refuses_what_only_slurm_can_honour(tmp_path):
    recipe = tiny.write_recipe(tmp_path / "r.yaml", tiny.recipe(tmp_path / "base", tmp_path / "c", tmp_path / "runs"))
    for options, named in (
        (["--time", "1"], "--time"),
        ([str(recipe)], "2 recipes"),
        (["--nodes", "2"], "engine.kind: single"),
        (["--nodes", "2", "--set", "engine=fsdp"], "--rdzv HOST:PORT"),
        (["--on", "slurm", "--rdzv", "a:1"], "--rdzv"),
        (["--max-restarts", "3"], "--max-restarts"),
        (["--requeue-by", "requeue"], "--requeue-by"),
        (["--no-preflight"], "--preflight"),
        (["--on", "slurm", "--max-running", "1"], "--max-running"),
        (["--prepare"], "--prepare"),
        (["--on", "slurm", "--tasks", "2"], "--tasks"),
        (["--on", "slurm", "--prepare", "--nodes", "2"], "--tasks 2"),
        (["--on", "slurm", "--prepare", "--gres", "gpu:1"], "--gres"),
        (["--on", "slurm", "--requeue-by", "magic"], "requeue, chain, exit"),
    ):
        ended = command("launch", recipe, "--dry-run", *options)
        assert ended.code == 64
        assert named in ended.error_lines[0]


def test_sbatch_that_is_missing_or_refuses_is_one_line(tmp_path, monkeypatch):
    plan = slurm_plan([(config(tmp_path), tmp_path / "r.yaml")], [], LaunchOptions(), folder=tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch"):
        submit(plan)
    fake = tmp_path / "sbatch"
    fake.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    fake.chmod(0o755)
    with pytest.raises(ConfigError, match="invalid partition"):
        submit(plan)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_batch_scripts_are_clean(script):
    assert len(SCRIPTS) == 3
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("SHELLCHECK DID NOT RUN: it is not installed (tests/slurm/install.sh)")
    subprocess.run(["shellcheck", str(script), str(ROOT / "tests/slurm/install.sh")], check=True)
