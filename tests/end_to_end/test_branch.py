"""Branches and extensions of real runs, against runs that were so from their first step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_cpt.checkpoint.verify import verify_run
from dist_cpt.config.load import load_recipe
from dist_cpt.data.loader import BlockLoader
from dist_cpt.data.prepared import open_prepared
from dist_cpt.errors import CheckpointError, ConfigError
from dist_cpt.optim.schedule import rates_at
from dist_cpt.run_folder.audit import record_problems
from dist_cpt.run_folder.checkpoints import published, read_manifest, read_state, step_of
from dist_cpt.run_folder.claim import Occupied, claim
from dist_cpt.run_folder.lineage import group_of, read_lineage
from dist_cpt.train.branch import branch, branch_lines
from dist_cpt.train.extend import extend
from tests import tiny
from tests.command import command
from tests.whole_run import StopAfter, built, rows, train

STEP_TOKENS = 8 * tiny.SEQ_LEN
INFINITE = {"kind": "infinite", "warmup_fraction": 0.1, "cooldown_fraction": 0.2, "decay_fraction": 0.2}


def recipe(place: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """12 steps of an infinite schedule, a checkpoint every second one."""
    values = tiny.recipe(place / "base", place / "corpus" / "corpus.jsonl", output_dir, schedule=INFINITE)
    checkpoint = {"every_steps": 2, "keep": 9, "asynchronous": False, "trial": False}
    values["data"] = values["data"] | {"cache_dir": str(place / "data")}
    return values | {"embeddings": {}, "checkpoint": checkpoint} | changes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("branches")
    corpus = tiny.write_corpus(folder / "corpus")
    tiny.write_base(folder / "base", tiny.write_tokenizer(folder / "tokenizer", corpus))
    assert train(recipe(folder, folder / "runs")) == 0
    return folder


@pytest.fixture
def run(place, tmp_path) -> Path:
    """A copy of the finished straight run, which thinks that it has always been there."""
    return copied(place / "runs" / "tiny", tmp_path / "runs" / "tiny")


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    values = yaml.safe_load((target / "recipe.yaml").read_text())
    values["output_dir"] = str(target.parent)
    (target / "recipe.yaml").write_text(yaml.safe_dump(values))
    return target


def resume(folder: Path, **changes: Any) -> int:
    return train(yaml.safe_load((folder / "recipe.yaml").read_text()) | changes)


def state_of(folder: Path, step: int) -> str:
    return read_manifest(folder / "checkpoints" / f"step-{step:08d}").state_sha256


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def require_whole(folder: Path) -> None:
    """Every byte of every checkpoint, every step and block once, one W&B run."""
    assert not any(verify_run(folder).values())
    assert record_problems(folder) == []
    positions = [row["position"] for row in rows(folder / "metrics.jsonl")]
    assert positions == [[8 * step, 8 * step + 8] for step in range(len(positions))]


@pytest.mark.parametrize("step", [pytest.param(4, marks=pytest.mark.matrix), 8])
def test_an_annealed_branch_is_the_run_that_would_have_annealed_there(place, run, tmp_path, step):
    before = content(run)
    total = (step + 3) * STEP_TOKENS
    made = branch(run, step, "annealed", [f"train.tokens={total}", "schedule.decay_steps=3"])
    assert content(run) == before
    assert made.folder == run.parent / "annealed"
    require_whole(made.folder)
    assert state_of(made.folder, step) == state_of(run, step) == made.lineage.state_sha256
    before_branch, recorded = rows(run / "metrics.jsonl"), rows(made.folder / "metrics.jsonl")
    assert recorded == before_branch[:step]
    assert [rates_at(made.config, s) for s in range(1, step + 1)] == [row["lr"] for row in recorded]

    assert resume(made.folder) == 0
    require_whole(made.folder)
    assert content(run) == before
    certificate = json.loads((made.folder / "certificate.json").read_text())
    assert (certificate["verdict"], certificate["step"]) == ("pass", step)
    straight = yaml.safe_load((made.folder / "recipe.yaml").read_text()) | {"output_dir": str(tmp_path / "straight")}
    assert train(straight) == 0
    assert state_of(made.folder, step + 3) == state_of(tmp_path / "straight" / "annealed", step + 3)
    ids = [json.loads((folder / "run.json").read_text())["wandb_run_id"] for folder in (run, made.folder)]
    assert ids[0] != ids[1]
    assert group_of(made.folder, "annealed") == group_of(run, "tiny") == "tiny"


@pytest.mark.matrix
def test_a_branch_of_a_branch_and_a_kill_before_its_first_checkpoint(run):
    first = branch(run, 6, "first", [f"train.tokens={20 * STEP_TOKENS}"])
    assert resume(first.folder, checkpoint={"every_steps": 2, "trial": False} | {"asynchronous": False}) == 0
    second = branch(first.folder, 16, "second", ["optim.lr=1e-3", "schedule={kind: linear, warmup_steps: 2}"])
    assert second.config.schedule.start_step == 16
    assert [entry["kind"] for entry in read_lineage(second.folder)] == ["branch", "branch"]
    assert group_of(second.folder, "second") == "tiny"
    rates = [rates_at(second.config, step)["adapter"] for step in (17, 18, 20)]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-4])
    values = yaml.safe_load((second.folder / "recipe.yaml").read_text()) | {"checkpoint": {"trial": False}}
    stop = StopAfter(17)
    assert train(values, stop) == 75
    shutil.rmtree(published(second.folder)[0])  # what a kill leaves: rows beyond the newest checkpoint
    assert train(values) == 0
    require_whole(second.folder)
    last = rows(second.folder / "metrics.jsonl")[-4:]
    assert [row["lr"]["adapter"] for row in last] == [rates_at(second.config, s)["adapter"] for s in range(17, 21)]


@pytest.mark.matrix
def test_a_full_parameter_run_branches(place, tmp_path):
    values = recipe(place, tmp_path, adapter={"kind": "none"}, model={"path": str(place / "base"), "weights": "fp32"})
    values["optim"] = {"lr": 1e-3}
    assert train(values | {"train": {"tokens": 4 * STEP_TOKENS}}) == 0
    made = branch(tmp_path / "tiny", 2, "other", ["optim.lr=1e-4", "optim.betas=[0.8, 0.9]"])
    assert resume(made.folder) == 0
    require_whole(made.folder)
    assert state_of(made.folder, 2) == state_of(tmp_path / "tiny", 2)
    assert state_of(made.folder, 4) != state_of(tmp_path / "tiny", 4)


@pytest.mark.matrix
def test_an_extension_before_the_decay_is_the_run_that_would_have_been_longer(place, tmp_path):
    values = recipe(place, tmp_path)
    values["schedule"] = INFINITE | {"decay_fraction": 0.0}
    assert train(values | {"train": {"tokens": 6 * STEP_TOKENS}}) == 0
    extended = extend(tmp_path / "tiny", 10 * STEP_TOKENS)
    assert (extended.step, extended.begun) == (6, None)
    require_whole(tmp_path / "tiny")
    assert resume(tmp_path / "tiny") == 0
    require_whole(tmp_path / "tiny")
    straight = yaml.safe_load((tmp_path / "tiny" / "recipe.yaml").read_text()) | {"output_dir": str(tmp_path / "s")}
    assert train(straight) == 0
    assert state_of(tmp_path / "tiny", 10) == state_of(tmp_path / "s" / "tiny", 10)


def test_an_extension_goes_back_to_before_the_decay(run):
    """The decay of 12 steps begins after step 10; a run that ended continues from there, in the phases it has had."""
    old = rows(run / "metrics.jsonl")
    extended = extend(run, 20 * STEP_TOKENS)
    assert (extended.step, extended.begun) == (10, 10)
    assert step_of(published(run)[0]) == 10
    require_whole(run)
    assert [rates_at(extended.config, row["step"]) for row in old[:10]] == [row["lr"] for row in old[:10]]
    assert rates_at(extended.config, 16)["adapter"] == old[9]["lr"]["adapter"]
    assert resume(run) == 0
    require_whole(run)
    assert read_state(published(run)[0]).step == 20
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    with pytest.raises(ConfigError, match="are not more"):
        extend(run, 20 * STEP_TOKENS)


@pytest.mark.matrix
def test_the_checkpoint_before_the_decay_is_kept(place, tmp_path):
    checkpoint = {"every_steps": 1, "keep": 1, "asynchronous": False, "trial": False}
    assert train(recipe(place, tmp_path, checkpoint=checkpoint)) == 0
    assert [step_of(path) for path in published(tmp_path / "tiny")] == [12, 10]
    assert extend(tmp_path / "tiny", 14 * STEP_TOKENS).step == 10


def blocks(config, num_blocks: int) -> list[tuple[str, int, int]]:
    """(source, epoch, block) at the first positions of a recipe's stream."""
    loader = BlockLoader(open_prepared(config), config.data.seq_len, config.seed, 0)
    return [loader.describe(position) for position in range(num_blocks)]


@pytest.fixture(scope="module")
def mixed(place) -> Path:
    """4 steps of two sources."""
    lines = (place / "corpus" / "corpus.jsonl").read_text().splitlines(keepends=True)
    for name, part in {"one": lines[:25], "two": lines[25:45], "best": lines[45:]}.items():
        (place / f"{name}.jsonl").write_text("".join(part))
    values = recipe(place, place / "mixed", train={"tokens": 4 * STEP_TOKENS})
    sources = [{"path": str(place / "one.jsonl"), "weight": 3}, {"path": str(place / "two.jsonl")}]
    values["data"] = values["data"] | {"sources": sources}
    assert train(values) == 0
    return place / "mixed" / "tiny"


def test_other_weights_and_sources_follow_what_was_read(place, mixed, tmp_path):
    run = copied(mixed, tmp_path / "tiny")
    step, total = 2, 6
    best = f"data.sources=[{{path: {place}/one.jsonl, weight: 1}}, {{path: {place}/two.jsonl, weight: 1}}, "
    best += f"{{path: {place}/best.jsonl, weight: 6}}]"
    made = branch(run, step, "best", [f"train.tokens={total * STEP_TOKENS}", best])
    past, following = made.config.data.stages
    assert (past.tokens, past.weights) == (step * STEP_TOKENS, {"one": 3.0, "two": 1.0})
    assert (following.tokens, following.weights) == (None, {"one": 1.0, "two": 1.0, "best": 6.0})
    assert resume(made.folder) == 0
    require_whole(made.folder)
    assert json.loads((made.folder / "certificate.json").read_text())["verdict"] == "pass"
    source = built(yaml.safe_load((run / "recipe.yaml").read_text()))
    before, after = blocks(source, 8 * step), blocks(made.config, 8 * total)
    assert after[: 8 * step] == before
    assert len(set(after)) == len(after)
    assert [name for name, _, _ in after[8 * step :]].count("best") == 24
    assert read_state(published(made.folder)[0]).blocks_by_source == {"one": 16, "two": 8, "best": 24}
    # a branch of it: stages are what follows
    again = branch(made.folder, 4, "again", ["data.stages=[{weights: {two: 1}}]"])
    assert [stage.tokens for stage in again.config.data.stages] == [2 * STEP_TOKENS, 2 * STEP_TOKENS, None]
    assert blocks(again.config, 8 * 4) == after[: 8 * 4]


def test_a_mixture_that_would_read_blocks_again_is_refused(mixed, tmp_path):
    """Stages whose beginning is not what was read: the command never writes such, a hand may."""
    run = copied(mixed, tmp_path / "tiny")
    made = branch(run, 2, "new", ["data.sources.1.weight=9"])
    values = yaml.safe_load((made.folder / "recipe.yaml").read_text())
    values["data"]["stages"][0]["tokens"] //= 2
    lineage = json.loads((made.folder / "lineage.json").read_text())
    text = lineage["entries"][0]["changed"]["data.stages.0.tokens"].replace(str(2 * STEP_TOKENS), str(STEP_TOKENS))
    lineage["entries"][0]["changed"]["data.stages.0.tokens"] = text
    (made.folder / "lineage.json").write_text(json.dumps(lineage))
    (made.folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert train(values) == 74
    assert "data.stages begin with" in json.loads((made.folder / "exit.json").read_text())["reason"]


def test_what_cannot_be_continued_is_refused_by_name(run, place):
    before = content(run)
    other = {"seed": "1", "data.seq_len": "32", "adapter.rank": "8", "batch.global_tokens": "1024"}
    for key, value in other.items():
        with pytest.raises(ConfigError, match=rf"a branch cannot change .*{key}: "):
            branch(run, 4, "new", [f"{key}={value}"])
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.text: text -> body"):
        branch(run, 4, "new", ["data.sources.0.text=body"])
    with pytest.raises(CheckpointError, match="no checkpoint of step 5 -- its checkpoints are of steps: 2, 4, 6"):
        branch(run, 5, "new")
    with pytest.raises(ConfigError, match="exists"):
        branch(run, 4, "tiny")
    with pytest.raises(ConfigError, match="the branch begins at step 12"):
        branch(run, 12, "new")
    damaged = run / "checkpoints" / "step-00000004" / "adapter_model.safetensors"
    raw = damaged.read_bytes()
    damaged.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="branch from another"):
        branch(run, 4, "new")
    damaged.write_bytes(raw)
    assert {path.name for path in run.parent.iterdir()} == {"tiny"}
    assert content(run).keys() == before.keys()


@pytest.mark.matrix
def test_a_schedule_over_the_whole_run_is_not_extended(place, tmp_path):
    values = recipe(place, tmp_path) | {"schedule": {"kind": "cosine"}, "train": {"tokens": 2 * STEP_TOKENS}}
    assert train(values) == 0
    run = tmp_path / "tiny"
    with pytest.raises(ConfigError, match=r"schedule\.kind cosine decays over the whole run.*dist-cpt branch"):
        extend(run, 4 * STEP_TOKENS)
    made = branch(run, 2, "more", [f"train.tokens={4 * STEP_TOKENS}", "schedule={kind: wsd, warmup_steps: 1}"])
    assert made.config.schedule.start_step == 2
    assert resume(made.folder) == 0
    require_whole(made.folder)


def test_a_run_that_trains_is_branched_and_not_extended(run, place):
    config = built(yaml.safe_load((run / "recipe.yaml").read_text()))
    held = claim(run, config, "run7")
    try:
        made = branch(run, 6, "beside", ["optim.lr=1e-3"])
        require_whole(made.folder)
        with pytest.raises(Occupied):
            extend(run, 20 * STEP_TOKENS)
    finally:
        held.close()


def test_the_commands_say_what_happens_next(run):
    ended = command("branch", run, "--at", 8, "--name", "new", "--set", f"train.tokens={16 * STEP_TOKENS}")
    assert ended.code == 0, ended.err
    assert f"dist-cpt resume {run.parent / 'new'} trains steps 9 to 16" in ended.out
    assert "rates of steps 8 and 9: adapter 0.005 -> 0.005" in ended.out
    assert f"train.tokens: {12 * STEP_TOKENS} -> {16 * STEP_TOKENS}" in ended.out
    assert load_recipe(run.parent / "new" / "recipe.yaml").name == "new"
    ended = command("extend", run, "--tokens", 16 * STEP_TOKENS)
    assert ended.code == 0, ended.err
    assert "it continues from step 10, since its decay began after step 10" in ended.out
    assert command("branch", run, "--at", 3, "--name", "x").code == 74
    assert command("extend", run, "--tokens", 1).code == 64
    assert branch_lines(branch(run, 8, "same"))[0].startswith(str(run.parent / "same"))
