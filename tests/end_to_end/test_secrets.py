"""Secret values of the environment appear in nothing that a run, its tracker or a launcher writes or prints."""

from __future__ import annotations

from pathlib import Path

from tests import tiny
from tests.command import command
from tests.run_ranks import run_ranks

SENTINEL = "sentinel0123456789abcdef0123456789abcdef"
NAMES = ("WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD", "AWS_SECRET_ACCESS_KEY")
CLUSTER = """
image: registry.example.org/dist-cpt:0.1.0
volumes: [{claim: training, path: /data}]
accelerator: null
secrets: {WANDB_API_KEY: {name: wandb, key: api-key}}
"""


def test_secrets_of_the_environment_are_written_nowhere(made, tmp_path, monkeypatch):
    values = tiny.recipe(*made, tmp_path, name="watched", track={"wandb": {"mode": "offline"}}, train={"tokens": 2048})
    values["data"]["cache_dir"] = str(tmp_path / "data")
    path = tiny.write_recipe(tmp_path / "recipe.yaml", values)
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(CLUSTER)
    secrets = dict.fromkeys(NAMES, SENTINEL)
    log, run = tmp_path / "log", tmp_path / "watched"
    assert run_ranks(path, 1, log=log, **secrets) == [0], log.read_text()
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    kubernetes = ["launch", path, "--on=kubernetes", "--cluster", cluster, "--set=output_dir=runs", "--dry-run"]
    commands = [
        ["launch", path, "--dry-run"],
        ["launch", path, "--on=slurm", "--nodes=2", "--set=engine=auto", "--dry-run"],
        kubernetes,
        [*kubernetes, "--kind=jobset"],
        ["status", run],
        ["status", run, "--json"],
        ["inspect", run],
        ["report", run],
    ]
    for arguments in commands:
        ended = command(*arguments)
        assert ended.code == 0, (arguments, ended.err)
        assert SENTINEL not in ended.out + ended.err, arguments
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in written if SENTINEL.encode() in file.read_bytes()]
    # W&B's payload can be searched as plain bytes, and every kind of file that could contain a secret exists.
    (payload,) = [file for file in written if file.suffix == ".wandb"]
    assert b"watched" in payload.read_bytes()
    kinds = {file.suffix for file in written} | {file.name for file in written}
    assert {".log", ".html", ".safetensors", "recipe.yaml", "run.json", "events.jsonl", "log"} <= kinds


def test_an_error_message_names_the_variable_only(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SENTINEL)
    recipe = tiny.recipe(tmp_path / "base", tmp_path / "corpus.jsonl", tmp_path)
    path = tiny.write_recipe(tmp_path / "recipe.yaml", recipe)
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(CLUSTER)
    arguments = ["launch", path, "--on=kubernetes", "--cluster", cluster, "--set=output_dir=runs", "--dry-run"]
    ended = command(*arguments, f"--set=data.cache_dir={SENTINEL}")
    assert ended.code == 64
    assert "HF_TOKEN" in ended.error_lines[0]
    assert SENTINEL not in ended.out + ended.err
