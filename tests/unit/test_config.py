"""The recipe: what is accepted, what is refused and how it says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dist_cpt.config.load import apply_overrides, build, load_recipe, parse_yaml
from dist_cpt.config.resolve import differences, fingerprint, resolve_paths, step_shape, to_yaml
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
        ({"optim": {"learning_rate": 1e-4}}, "unknown key optim.learning_rate"),
        ({"optim": {"embeding_lr": 1e-4}}, "did you mean optim.embedding_lr?"),
        ({"modle": {}}, "did you mean model?"),
        ({"data": {"seq_len": 128, "sources": [{"path": "a", "wieght": 1}]}}, "did you mean data.sources.0.weight?"),
        ({"train": {"tokens": 0}}, "train.tokens"),
        ({"batch": {"global_tokens": 1000}}, "not a multiple of data.seq_len 128"),
        ({"engine": {"kind": "deepspeed"}}, "engine.kind"),
        ({"engine": {"kind": "fsdp", "stage": 3}}, "stage belongs to kind: zero"),
        ({"engine": {"kind": "zero", "stage": 4}}, "engine.stage"),
        ({"model": {}}, "give either path"),
        ({"model": {"path": "a", "weights": "fp16"}}, "model.weights: Input should be 'fp32', 'bf16', 'nf4' or 'int8'"),
        ({"model": {"path": "a", "trust_remote_code": True}}, "revision must be its 40-digit hash, not None"),
        ({"model": {"path": "a", "trust_remote_code": True, "revision": "main"}}, "40-digit hash, not 'main'"),
        ({"optim": {"lr": float("nan")}}, "optim.lr"),
        ({"name": "../escape"}, "name"),
        ({"adapter": {"kind": "none"}, "embeddings": {"train": ["lm_head"]}}, "embeddings.train belongs to"),
        ({"adapter": {"kind": "none", "continue_from": "a"}}, "continue_from belongs to kind: lora"),
        ({"adapter": {"continue_from": {"path": "a", "optimiser": True}}}, "adapter.continue_from.optimizer?"),
        ({"adapter": {"continue_from": {"optimizer": True}}}, "adapter.continue_from.path is required"),
        ({"adapter": {"continue_from": {"path": "a", "mode": "merge"}}}, "'train', 'fold' or 'stack'"),
        ({"adapter": {"continue_from": {"path": "a", "mode": "fold", "optimizer": True}}}, "optimizer belongs to mode"),
        ({"adapter": {"continue_from": {"path": "a", "freeze_embeddings": True}}}, "belongs to mode: fold or stack"),
        ({"schedule": {"kind": "wsd", "warmup_fraction": 0.6, "decay_fraction": 0.6}}, "sum to 1.2"),
        ({"schedule": {"per_group": {"adpater": {}}}}, "unknown group 'adpater'"),
    ],
)
def test_refusals_name_the_key(change, expected):
    assert expected in refused(recipe(**change))


def test_overrides_are_yaml_and_reach_lists():
    values = apply_overrides(recipe(), ["optim.lr=1e-5", "engine={kind: fsdp, shard: full}", "data.sources.0.weight=2"])
    config = build(values, "x")
    assert config.optim.lr == 1e-5
    assert (config.engine.kind, config.engine.shard) == ("fsdp", "full")
    assert config.data.sources[0].weight == 2


@pytest.mark.parametrize("bad", ["optim.lr", "=3", "optim..lr=1", "data.sources.7.weight=1", "name.x=1"])
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
    assert differences(config, other) == ["seed: 0 -> 1"]


def test_continue_from_takes_a_path_alone_or_with_the_optimizer():
    bare = resolve_paths(build(recipe(adapter={"continue_from": "old"}), "x"))
    assert bare.adapter.continue_from is not None
    assert (bare.adapter.continue_from.path, bare.adapter.continue_from.optimizer) == (str(Path.cwd() / "old"), False)
    assert build(yaml.safe_load(to_yaml(bare)), "again") == bare
    whole = resolve_paths(build(recipe(adapter={"continue_from": {"path": "old", "optimizer": True}}), "x"))
    fresh = resolve_paths(build(recipe(), "x"))
    assert len({fingerprint(fresh), fingerprint(bare), fingerprint(whole)}) == 3
    assert differences(bare, whole) == ["adapter.continue_from.optimizer: False -> True"]


def test_step_shape_divides_or_says_why():
    config = build(recipe(), "x")
    shape = step_shape(config, 2)
    assert (shape.blocks_per_step, shape.accumulation, shape.num_steps) == (8, 2, 10)
    with pytest.raises(ConfigError, match="does not divide by 3 ranks x micro_batch 2"):
        step_shape(config, 3)


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
