"""The recipe: what is accepted, and refusals that name the key."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dist_cpt.config.exclusions import EXCLUSIONS
from dist_cpt.config.load import apply_overrides, build, load_recipe, parse_yaml
from dist_cpt.config.reference import sections
from dist_cpt.config.resolve import (
    differences,
    fingerprint,
    require_same_recipe,
    resolve_paths,
    run_folder,
    settings,
    settings_of_place,
    step_shape,
    to_yaml,
    with_tokens,
)
from dist_cpt.config.resume_changes import RESUME_CHANGES, how_may_change
from dist_cpt.errors import ConfigError


def recipe(**changes):
    values = {
        "name": "run",
        "model": {"path": "base"},
        "data": {"seq_len": 128, "sources": [{"path": "corpus.jsonl"}]},
        "batch": {"global_tokens": 1024, "micro_batch": 2},
        "train": {"tokens": 10_000},
    }
    return values | changes


def refused(values) -> str:
    with pytest.raises(ConfigError) as caught:
        build(values, "recipe.yaml")
    assert caught.value.exit_code == 64
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"optim": {"learning_rate": 1e-4}}, "unknown key optim.learning_rate; did you mean optim.lr?"),
        ({"optim": {"embeding_lr": 1e-4}}, "did you mean optim.embedding_lr?"),
        ({"modle": {}}, "did you mean model?"),
        ({"data": {"seq_len": 128, "sources": [{"path": "a", "wieght": 1}]}}, "did you mean data.sources.0.weight?"),
        ({"train": {"tokens": 0}}, "train.tokens"),
        ({"engine": {"kind": "deepspeed"}}, "engine.kind"),
        ({"engine": {"kind": "zero", "stage": 4}}, "engine.stage"),
        ({"model": {"config": {"vocab_size": 8}}}, "model.config"),
        (
            {"model": {"path": "a", "weights": "fp16"}},
            "model.weights: Input should be 'fp32', 'bf16', 'fp8', 'nf4' or 'int8'",
        ),
        ({"optim": {"lr": float("nan")}}, "optim.lr"),
        ({"name": "../escape"}, "name"),
        ({"adapter": {"continue_from": {"path": "a", "optimiser": True}}}, "adapter.continue_from.optimizer?"),
        ({"adapter": {"continue_from": {"optimizer": True}}}, "adapter.continue_from.path is required"),
        ({"adapter": {"continue_from": {"path": "a", "mode": "merge"}}}, "'train', 'fold' or 'stack'"),
        ({"schedule": {"kind": "wsd", "warmup_fraction": 0.6, "decay_fraction": 0.6}}, "schedule"),
        ({"data": {"sources": [{"path": "a"}], "validation": [{"name": "v", "path": "b"}] * 2}}, "data.validation"),
        ({"task": "classify", "classify": {"labels": ["a", "a"]}}, "classify.labels"),
        ({"schedule": {"per_group": {"adpater": {}}}}, "unknown group 'adpater'"),
        ({"schedule": {"warmup_steps": 5, "warmup_fraction": 0.1}}, "given twice"),
        ({"schedule": {"per_group": {"adapter": {"warmup_steps": 1, "warmup_fraction": 0.1}}}}, "given twice"),
        ({"schedule": {"decay_steps": 5}}, "kind: wsd or infinite"),
        ({"schedule": {"kind": "wsd", "cooldown_steps": 5}}, "kind: infinite"),
        ({"schedule": {"decay": "1-sqrt"}}, "leave decay out"),
        ({"schedule": {"kind": "wsd", "decay_steps": 10**9}}, "the run ends within them"),
        ({"schedule": {"start_step": 10**9}}, "never begin"),
    ],
)
def test_refusals_name_the_key(change, expected):
    assert expected in refused(recipe(**change))


MATRICES = ["embed_tokens", "lm_head"]
SCRATCH = {"path": None, "config": {"model_type": "llama"}}
PRIOR = {"path": "a"}
CLASSES = {"task": "classify", "classify.num_labels": 2}

EXCLUDED = [  # a recipe for each row of the table, in its order, and what the refusal names
    ({"model.config": {"model_type": "llama"}}, "model.path: base, model.config: {...}"),
    ({"model.path": None}, "model.path: null, model.config: null"),
    (
        {"model.trust_remote_code": True, "model.revision": "main"},
        "model.trust_remote_code: true, model.revision: main",
    ),
    ({"model": SCRATCH, "adapter.kind": "none"}, "model.config: {...}, data.tokenizer: null"),
    ({"model": SCRATCH}, "model.config: {...}, adapter.kind: lora"),
    ({"model": SCRATCH, "embeddings.tie": "untie"}, "model.config: {...}, embeddings.tie: untie"),
    (
        {"model": {**SCRATCH, "rope_scaling": {"rope_type": "linear", "factor": 2}}},
        "model.config: {...}, model.rope_scaling: {...}",
    ),
    ({"model": {**SCRATCH, "weights": "nf4"}}, "model.weights: nf4, model.config: {...}"),
    ({"model.weights": "int8", "adapter.kind": "none"}, "model.weights: int8, adapter.kind: none"),
    ({"model.weights": "nf4", "adapter.init": "pissa"}, "model.weights: nf4, adapter.init: pissa"),
    ({"model.weights": "fp8", "adapter.dora": True}, "model.weights: fp8, adapter.dora: true"),
    ({"adapter.kind": "none", "adapter.lora_plus_ratio": 4}, "adapter.kind: none, adapter.lora_plus_ratio: 4.0"),
    ({"adapter.kind": "none", "model.router": "frozen"}, "adapter.kind: none, model.router: frozen"),
    ({"adapter.kind": "none", "optim.router_lr": 1e-5}, "adapter.kind: none, optim.router_lr: 1e-05"),
    (
        {"model.router": "frozen", "model.router_z_loss": 1e-3},
        "adapter.kind: lora, model.router: frozen, model.router_z_loss: 0.001",
    ),
    ({"adapter.experts": "frozen", "adapter.expert_rank": 4}, "adapter.experts: frozen, adapter.expert_rank: 4"),
    ({"adapter.kind": "none", "adapter.continue_from": PRIOR}, "adapter.kind: none, adapter.continue_from: {...}"),
    ({"adapter.dora": True, "adapter.init": "pissa"}, "adapter.dora: true, adapter.init: pissa"),
    ({"adapter.init": "pissa", "adapter.continue_from": PRIOR}, "adapter.init: pissa, adapter.continue_from: {...}"),
    (
        {"adapter.dora": True, "adapter.continue_from": {**PRIOR, "mode": "stack"}},
        "adapter.dora: true, adapter.continue_from.mode: stack",
    ),
    (
        {"adapter.continue_from": {**PRIOR, "mode": "fold", "optimizer": True}},
        "adapter.continue_from.optimizer: true, adapter.continue_from.mode: fold",
    ),
    (
        {"adapter.continue_from": {**PRIOR, "freeze_embeddings": True}},
        "adapter.continue_from.freeze_embeddings: true, adapter.continue_from.mode: train",
    ),
    ({**CLASSES, "data.bos": "never"}, "data.bos: never, task: classify"),
    ({"adapter.kind": "none", "embeddings.train": ["lm_head"]}, "adapter.kind: none, embeddings.train: [lm_head]"),
    ({**CLASSES, "embeddings.train": ["lm_head"]}, "task: classify, embeddings.train: [lm_head]"),
    ({"embeddings.pad_rows_to": 8}, "embeddings.new_tokens: null, embeddings.pad_rows_to: 8"),
    (
        {"embeddings": {"new_tokens": "x", "train": MATRICES}, "data.tokenizer": "y"},
        "embeddings.new_tokens: x, data.tokenizer: y",
    ),
    ({"embeddings.new_tokens": "x"}, "embeddings.train: [], adapter.continue_from: null"),
    ({**CLASSES, "embeddings.tie": "untie"}, "embeddings.tie: untie, task: classify"),
    ({"embeddings.tie": "untie"}, "embeddings.tie: untie, adapter.kind: lora, embeddings.train: null"),
    (
        {"embeddings.kind": "lora", "adapter.kind": "none"},
        "embeddings.kind: lora, adapter.kind: none, embeddings.train: null",
    ),
    (
        {"embeddings": {"kind": "lora", "train": MATRICES, "tie": "untie"}},
        "embeddings.kind: lora, embeddings.tie: untie",
    ),
    (
        {"embeddings": {"kind": "lora", "train": MATRICES}, "adapter.dora": True},
        "embeddings.kind: lora, adapter.dora: true",
    ),
    (
        {"embeddings": {"rows": "new", "new_tokens": "x", "train": MATRICES}, "optim.embedding_weight_decay": 0.1},
        "embeddings.rows: new, optim.embedding_weight_decay: 0.1",
    ),
    (
        {
            "embeddings": {"rows": "new", "new_tokens": "x", "train": MATRICES},
            "adapter.continue_from": {**PRIOR, "optimizer": True},
        },
        "embeddings.rows: new, adapter.continue_from.optimizer: true",
    ),
    (
        {"embeddings.freeze_rest_steps": 2},
        "embeddings.freeze_rest_steps: 2, adapter.kind: lora, embeddings.train: null",
    ),
    (
        {"embeddings": {"freeze_rest_steps": 10, "train": MATRICES}},
        "embeddings.freeze_rest_steps: 10, train.tokens: 10000, batch.global_tokens: 1024",
    ),
    ({"train.epochs": 2}, "train.tokens: 10000, train.epochs: 2.0"),
    ({"train": {}}, "train.tokens: null, train.epochs: null"),
    ({"data.sources.0.max_epochs": 2}, "data.sources.0.max_epochs: 2.0"),
    (
        {"data.sources.0.max_tokens": 127, "data.sources.0.on_exhausted": "drop"},
        "data.sources.0.max_tokens: 127",
    ),
    (
        {"data.stages": [{"weights": {"corpus": 1}}], "data.sources.0.weight": 2},
        "data.stages: [{...}], data.sources.0.weight: 2.0",
    ),
    (
        {"data.stages": [{"tokens": 5000, "weights": {"corpus": 1}}]},
        "data.stages.0.tokens: 5000, train.tokens: 10000",
    ),
    (
        {"data.stages": [{"tokens": 10_000, "weights": {"corpus": 1}}, {"weights": {"corpus": 1}}]},
        "data.stages.0.tokens: 10000, data.stages.1.tokens: null, train.tokens: 10000",
    ),
    (
        {"data.streaming": True, "train": {"epochs": 2}},
        "data.streaming: true, train.epochs: 2.0",
    ),
    (
        {"data.streaming": True, "data.sources": [{"store": "a"}]},
        "data.streaming: true, data.sources.0.store: a",
    ),
    ({"data.streaming": True, "data.share_of": "tokens"}, "data.streaming: true, data.share_of: tokens"),
    ({"data.streaming": True, "data.packing": "windows"}, "data.streaming: true, data.packing: windows"),
    ({"data.streaming": True, "data.deduplicate": "exact"}, "data.streaming: true, data.deduplicate: exact"),
    ({"task": "classify"}, "task: classify, classify: null"),
    ({"classify.num_labels": 2}, "task: cpt, classify: {...}"),
    ({**CLASSES, "classify.labels": ["a", "b"]}, "classify.labels: [a, b], classify.num_labels: 2"),
    ({"task": "classify", "classify": {}}, "classify: {...}, classify.labels: null, classify.num_labels: null"),
    ({"optim.head_lr": 1e-3}, "task: cpt, optim.head_lr: 0.001"),
    ({"task": "instruct", "data.packing": "windows"}, "task: instruct, data.packing: windows"),
    ({"data.chat_template": "a.jinja"}, "task: cpt, data.chat_template: a.jinja"),
    ({"data.sources.0.messages": "m"}, "task: cpt, data.sources.0.messages: m"),
    (
        {"task": "instruct", "data.sources.0.prompt": "q"},
        "data.sources.0.prompt: q, data.sources.0.response: null",
    ),
    ({"data.sources.0.revision": "main"}, "data.sources.0.revision: main, data.sources.0.subset: null"),
    (
        {"data.sources": [{"store": "a", "filter": "m:f"}, {"path": "b"}]},
        "data.sources.0.filter: m:f, data.sources.1.filter: null",
    ),
    ({"data.decontaminate": "drop"}, "data.decontaminate: drop, data.validation: null"),
    ({"data.overlap": "context"}, "data.packing: best_fit, data.overlap: context"),
    ({"data.packing": "windows", "data.stride": 129}, "data.stride: 129, data.seq_len: 128"),
    ({"batch.global_tokens": 1000}, "batch.global_tokens: 1000, data.seq_len: 128"),
    ({"evaluate.forgetting": {"policy": "stop"}}, "evaluate.forgetting: {...}, data.validation: []"),
    (
        {
            "evaluate": {"forgetting": {"policy": "stop"}, "against": None},
            "data.validation": [{"name": "v", "path": "b", "role": "retention"}],
        },
        "evaluate.forgetting: {...}, evaluate.against: null",
    ),
    (
        {"evaluate": {"best": {"of": "legal"}, "every_steps": 5}},
        "evaluate.best.of: legal, data.validation: []",
    ),
    (
        {"evaluate": {"best": {"of": "v"}}, "data.validation": [{"name": "v", "path": "b"}]},
        "evaluate.best: {...}, evaluate.every_steps: null",
    ),
    (
        {"evaluate.tasks": {"names": ["arc_easy"]}, "engine": {"kind": "fsdp", "context_parallel": 2}},
        "evaluate.tasks: {...}, engine.context_parallel: 2",
    ),
    (
        {"schedule.warmup_steps": 5, "schedule.warmup_fraction": 0.1},
        "schedule.warmup_steps: 5, schedule.warmup_fraction: 0.1",
    ),
    (
        {"schedule": {"kind": "infinite", "cooldown_steps": 5, "cooldown_fraction": 0.1}},
        "schedule.cooldown_steps: 5, schedule.cooldown_fraction: 0.1",
    ),
    (
        {"schedule": {"kind": "wsd", "decay_steps": 5, "decay_fraction": 0.2}},
        "schedule.decay_steps: 5, schedule.decay_fraction: 0.2",
    ),
    ({"schedule.decay_steps": 1}, "schedule.decay_steps: 1, schedule.kind: cosine"),
    ({"schedule.cooldown_steps": 1}, "schedule.cooldown_steps: 1, schedule.kind: cosine"),
    ({"schedule.decay": "1-sqrt"}, "schedule.decay: 1-sqrt, schedule.kind: cosine"),
    (
        {"schedule.warmup_steps": 11},
        "schedule.warmup_steps: 11, schedule.cooldown_steps: null, schedule.decay_steps: null, "
        "schedule.start_step: 0, train.tokens: 10000",
    ),
    ({"schedule.start_step": 10}, "schedule.start_step: 10, train.tokens: 10000"),
    ({"engine": {"kind": "fsdp", "stage": 3}}, "engine.stage: 3, engine.kind: fsdp"),
    ({"engine": {"kind": "zero", "shard": "full"}}, "engine.shard: full, engine.kind: zero"),
    ({"engine": {"kind": "fsdp", "dp_shard": 2}}, "engine.dp_shard: 2, engine.shard: null"),
    ({"engine.reshard_after_forward": False}, "engine.reshard_after_forward: false, engine.kind: auto"),
    ({"engine": {"kind": "zero", "reduce": "step"}}, "engine.reduce: step, engine.kind: zero"),
    (
        {"engine.offload": "both", "adapter": {"kind": "none"}, "embeddings.train": []},
        "engine.offload: both, adapter.kind: none",
    ),
    ({"engine": {"kind": "single", "offload": "base"}}, "engine.offload: base, engine.kind: single"),
    ({"engine": {"kind": "zero", "stage": 2, "offload": "optimizer"}}, "engine.offload: optimizer, engine.stage: 2"),
    (
        {"engine": {"kind": "fsdp", "offload": "base", "reshard_after_forward": False}},
        "engine.offload: base, engine.reshard_after_forward: false",
    ),
    (
        {"engine": {"kind": "single", "context_parallel": 2}},
        "engine.context_parallel: 2, engine.kind: single",
    ),
    ({"engine.context_parallel": 3}, "data.seq_len: 128, engine.context_parallel: 3"),
    (
        {"engine.context_parallel": 2, "model.attention": "flash_attention_2"},
        "engine.context_parallel: 2, model.attention: flash_attention_2",
    ),
    ({"track.profile": [9, 11]}, "track.profile: [9, 11], train.tokens: 10000"),
    ({"health.spike.window": 16}, "health.spike.min_history: 32, health.spike.window: 16"),
    (
        {"health.spike.policy": "rollback", "checkpoint.every_minutes": None},
        "health.spike.policy: rollback, checkpoint.every_minutes: null, checkpoint.every_steps: null",
    ),
]


@pytest.mark.parametrize(("row", "changes", "settings"), [(i, *case) for i, case in enumerate(EXCLUDED)])
def test_settings_that_exclude_each_other_are_named(row, changes, settings):
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in changes.items()]
    line = refused(apply_overrides(recipe(), overrides))
    assert f"{settings}: {EXCLUSIONS[row].why} -- {EXCLUSIONS[row].remedy}" in line


def test_every_row_of_the_table_has_a_recipe_above():
    assert len(EXCLUDED) == len(EXCLUSIONS)


def test_all_exclusions_of_a_recipe_are_named_at_once():
    line = refused(recipe(engine={"kind": "auto", "stage": 3}, optim={"head_lr": 1.0}))
    assert "engine.stage: 3" in line
    assert "optim.head_lr: 1.0" in line


def test_overrides_are_yaml_and_reach_lists():
    values = apply_overrides(recipe(), ["optim.lr=1e-5", "engine={kind: fsdp, shard: full}", "data.sources.0.weight=2"])
    config = build(values, "x")
    assert config.optim.lr == 1e-5
    assert (config.engine.kind, config.engine.shard) == ("fsdp", "full")
    assert config.data.sources[0].weight == 2


@pytest.mark.parametrize(
    "bad", ["optim.lr", "=3", "optim..lr=1", "data.sources.7.weight=1", "name.x=1", "data.sources.0.path.x=1"]
)
def test_bad_overrides_are_refused(bad):
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides(recipe(), [bad])


def test_yaml_refuses_a_key_given_twice_and_reads_exponents():
    with pytest.raises(ConfigError, match="given twice"):
        parse_yaml("a: 1\na: 2\n", "x")
    assert parse_yaml("lr: 1e-5", "x") == {"lr": 1e-5}
    with pytest.raises(ConfigError, match="line 1"):
        parse_yaml("a: [1", "x")


def test_a_missing_recipe_says_which(tmp_path):
    with pytest.raises(ConfigError, match=r"recipe not found: .*nope\.yaml"):
        load_recipe(tmp_path / "nope.yaml")


def test_resolved_recipe_loads_back_the_same():
    config = resolve_paths(build(recipe(), "x"))
    again = build(yaml.safe_load(to_yaml(config)), "again")
    assert again == config
    assert resolve_paths(again) == config
    assert config.optim.embedding_lr == config.optim.lr / 10


def test_fingerprint_ignores_placement_only():
    config = resolve_paths(build(recipe(), "x"))
    moved = resolve_paths(build(recipe(engine={"kind": "zero", "stage": 2}, checkpoint={"keep": 1}), "x"))
    assert fingerprint(config) == fingerprint(moved)
    other = resolve_paths(build(recipe(seed=1), "x"))
    assert fingerprint(config) != fingerprint(other)
    assert differences(config, other) == {"seed": "0 -> 1"}


def test_continue_from_takes_a_path_alone_or_with_the_optimizer():
    bare = resolve_paths(build(recipe(adapter={"continue_from": "old"}), "x"))
    assert bare.adapter.continue_from is not None
    assert (bare.adapter.continue_from.path, bare.adapter.continue_from.optimizer) == (str(Path.cwd() / "old"), False)
    assert build(yaml.safe_load(to_yaml(bare)), "again") == bare
    whole = resolve_paths(build(recipe(adapter={"continue_from": {"path": "old", "optimizer": True}}), "x"))
    fresh = resolve_paths(build(recipe(), "x"))
    assert len({fingerprint(fresh), fingerprint(bare), fingerprint(whole)}) == 3
    assert differences(bare, whole) == {"adapter.continue_from.optimizer": "false -> true"}


def test_step_shape_divides_or_says_why():
    config = build(recipe(), "x")
    shape = step_shape(config, 2)
    assert (shape.blocks_per_step, shape.accumulation, shape.num_steps) == (8, 2, 10)
    with pytest.raises(ConfigError, match="does not divide by 3 ranks x micro_batch 2"):
        step_shape(config, 3)
    in_pairs = build(recipe(engine={"context_parallel": 2}), "x")
    assert step_shape(in_pairs, 4) == replace(shape, world_size=4, context_parallel=2)
    assert [step_shape(in_pairs, 4).share(rank).group for rank in range(4)] == [0, 0, 1, 1]
    with pytest.raises(ConfigError, match=r"engine\.context_parallel 2 does not divide 3 ranks"):
        step_shape(in_pairs, 3)


def test_configuration_and_help_load_no_torch():
    code = (
        "import sys; import dist_cpt.cli, dist_cpt.config.resolve, dist_cpt.config.load, dist_cpt_launch.local\n"
        "sys.argv = ['dist-cpt', '--help']\n"
        "try: dist_cpt.cli.main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_aliases_and_huge_documents_are_refused_at_once():
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
    with pytest.raises(ConfigError, match=r"\*a"):
        parse_yaml(bomb, "recipe.yaml")
    with pytest.raises(ConfigError, match="10,000"):
        parse_yaml("a: [" + "x, " * 20_000 + "x]", "recipe.yaml")


def test_the_table_of_changes_names_keys_of_the_schema():
    known = {f"{path}{key}" for path, section in sections() for key in section["properties"]}
    assert {key for row in RESUME_CHANGES for key in row.keys} <= known
    assert how_may_change("data.sources.1.path") == "freely"
    assert how_may_change("optim.betas.0") == "accepted"
    assert how_may_change("data.sources.0.weight") == "branched"
    assert how_may_change("data.sources.0.text") is None
    assert how_may_change("optim.state") is None


def test_places_are_no_part_of_the_fingerprint_and_their_presence_is():
    config = resolve_paths(build(recipe(adapter={"continue_from": "old"}), "x"))
    moved = config.model_dump(mode="json")
    moved |= {"output_dir": "/elsewhere", "model": moved["model"] | {"path": "/elsewhere/base", "revision": "v2"}}
    moved["adapter"]["continue_from"]["path"] = "/elsewhere/old"
    moved["data"] |= {"cache_dir": "/elsewhere/data", "tokenizer": "/elsewhere/base"}
    moved["data"]["sources"][0]["path"] = "/elsewhere/text.jsonl"
    assert fingerprint(build(moved, "moved")) == fingerprint(config)
    moved["adapter"]["continue_from"] = None
    assert fingerprint(build(moved, "moved")) != fingerprint(config)


def test_a_change_is_accepted_by_name_or_refused_by_name():
    config = resolve_paths(build(recipe(), "x"))
    hotter = resolve_paths(build(recipe(optim={"lr": 3e-3, "betas": [0.5, 0.5]}), "x"))
    with pytest.raises(ConfigError, match=r"step-1 .*optim\.lr: .*--accept-changes optim\.betas,optim\.") as raised:
        require_same_recipe(config, hotter, "step-1")
    assert "optim.betas.0: 0.9 -> 0.5" in str(raised.value)
    accepted = hotter.model_copy(update={"accept_changes": ("optim.lr", "optim.embedding_lr", "optim.betas")})
    assert set(require_same_recipe(config, accepted, "x")) == {
        "optim.lr",
        "optim.embedding_lr",
        "optim.betas.0",
        "optim.betas.1",
    }
    other = config.model_copy(update={"seed": 1, "accept_changes": ("seed", "optim")})
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1\) -- give this run another name, or undo the change$"):
        require_same_recipe(config, other, "x")  # which no flag allows


def test_a_run_folder_is_where_it_is(tmp_path):
    config = resolve_paths(build(recipe(output_dir=str(tmp_path / "old")), "x"))
    moved = tmp_path / "new" / "renamed"
    moved.mkdir(parents=True)
    overrides = settings_of_place(config, moved)
    again = build(apply_overrides(config.model_dump(mode="json"), overrides), "x")
    assert run_folder(again) == moved
    assert again.data.cache_dir == str(tmp_path / "new/data")
    assert settings_of_place(again, moved) == []


def test_a_pipe_is_not_a_recipe(tmp_path):
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError, match="not a regular file"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_key_that_a_later_version_adds_changes_no_fingerprint():
    config = build(recipe(), "recipe.yaml")
    spelled_out = build(config.model_dump(mode="json"), "recipe.yaml")
    assert fingerprint(spelled_out) == fingerprint(config)
    assert "data.bos" in settings(config)
    assert "data.bos" not in settings(config, defaults=False)


STAGES = [{"tokens": 5000, "weights": {"law": 1}}, {"weights": {"law": 1, "corpus": 3}}]


def staged(stages) -> dict:
    data = {"seq_len": 128, "sources": [{"path": "corpus.jsonl"}, {"path": "b.jsonl", "name": "law"}], "stages": stages}
    return recipe(data=data)


def test_stages_name_sources_that_exist_and_every_source_is_read():
    assert resolve_paths(build(staged(STAGES), "recipe.yaml")).data.stages[1].weights == {"law": 1, "corpus": 3}
    with pytest.raises(ConfigError, match=r"data.stages.1.weights: there is no source 'lwa'; sources are corpus, law"):
        resolve_paths(build(staged([STAGES[0], {"weights": {"lwa": 1}}]), "recipe.yaml"))
    with pytest.raises(ConfigError, match=r"data.stages: no stage reads corpus"):
        resolve_paths(build(staged([{"weights": {"law": 1}}]), "recipe.yaml"))
    assert "stage 0 needs tokens" in refused(staged([{"weights": {"law": 1}}, *STAGES]))


def test_epochs_are_a_length_once_the_data_is_known():
    config = build(recipe(train={"epochs": 1.5}, embeddings={"freeze_rest_steps": 3, "train": MATRICES}), "recipe.yaml")
    assert step_shape(config, 2).num_steps == 0
    assert step_shape(with_tokens(config, 4097), 2).num_steps == 5
    with pytest.raises(
        ConfigError, match=r"train.epochs: 1.5, which are 3,072 tokens .*embeddings.freeze_rest_steps: 3"
    ):
        with_tokens(config, 3072)


FINGERPRINT = "2ee134b78fad05e516b791661236bd1ef894bd3d566d4afa8f16dbae6596d05d"


def test_new_settings_at_their_defaults_are_not_in_the_fingerprint():
    assert fingerprint(build(recipe(), "recipe.yaml")) == FINGERPRINT
