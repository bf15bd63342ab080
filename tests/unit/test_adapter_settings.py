"""What a recipe leaves out about the adapter it continues is read from that adapter's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dist_cpt.config.load import apply_overrides, build, load_recipe
from dist_cpt.config.resolve import fingerprint, resolve_paths, to_yaml
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import EXIT_STORAGE, ConfigError, StorageError
from dist_cpt.run_folder.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests import tiny

EMBED, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
WRAPPED = [EMBED.replace("weight", f"{part}.weight") for part in ("modules_to_save.default", "original_module")]
MODULES = [f"model.layers.{layer}.self_attn.{name}" for layer in (1, 10) for name in ("q_proj", "v_proj")]
LONG = np.zeros((3 << 10, 1 << 8), np.float32)  # longer than one comparison
LATE = np.concatenate([LONG[:-1], np.ones((1, 1 << 8), np.float32)])


def write(folder: Path, matrices: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """A folder as PEFT writes it; `config` replaces keys of its configuration, None removes one."""
    values: dict[str, Any] = {
        "peft_type": "LORA", "r": 6, "lora_alpha": 12, "use_rslora": False, "use_dora": False,
        "target_modules": ["v_proj", "q_proj"], "layers_to_transform": None, "exclude_modules": None,
    } | config  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / ADAPTER_CONFIG).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    tensors = {f"base_model.model.{name}.lora_{half}.weight": np.ones((2, 2)) for name in MODULES for half in "AB"}
    save_file(tensors | (matrices or {}), folder / ADAPTER_WEIGHTS)
    return folder


def recipe(folder: Path, *overrides: str, **changes: Any) -> dict[str, Any]:
    values = tiny.recipe(Path("/base"), Path("/corpus.jsonl"), folder.parent / "runs")
    values |= {"adapter": {"continue_from": str(folder)}, "embeddings": {}} | changes
    return apply_overrides(values, overrides)


def resolved(folder: Path, *overrides: str, **changes: Any) -> RunConfig:
    return resolve_paths(build(recipe(folder, *overrides, **changes), "recipe.yaml"))


@pytest.mark.parametrize("mode", ["train", "fold", "stack"])
def test_what_is_left_out_is_the_folders(tmp_path, mode):
    folder = write(tmp_path / "a", {EMBED: LONG}, use_rslora=True)
    one = resolved(folder, f"adapter.continue_from={{path: {folder}, mode: {mode}}}")
    assert (one.adapter.rank, one.adapter.alpha, one.adapter.rslora) == (6, 12, True)
    assert (one.adapter.targets, one.adapter.dora) == (("q_proj", "v_proj"), False)
    assert (one.embeddings.train, one.embeddings.tie) == (("embed_tokens",), "untie")


def test_what_is_set_stays_even_at_its_default(tmp_path):
    folder = write(tmp_path / "a", {EMBED: LONG})
    one = resolved(folder, "adapter.rslora=true", "adapter.rank=128", "embeddings.tie=keep", "embeddings.train=[]")
    assert (one.adapter.rslora, one.adapter.rank, one.adapter.alpha) == (True, 128, 12)
    assert (one.embeddings.tie, one.embeddings.train) == ("keep", ())


def test_the_resolved_recipe_has_the_values_and_no_longer_needs_the_folder(tmp_path):
    folder = write(tmp_path / "a", {EMBED: LONG})
    one = resolved(folder)
    (tmp_path / "recipe.yaml").write_text(to_yaml(one))
    assert fingerprint(resolved(folder)) == fingerprint(one)
    (folder / ADAPTER_CONFIG).unlink()
    assert resolve_paths(load_recipe(tmp_path / "recipe.yaml")) == one
    assert resolve_paths(one) == one


@pytest.mark.parametrize(
    ("matrices", "config", "train", "tie"),
    [
        ({}, {}, (), "keep"),
        ({HEAD: LONG}, {}, ("lm_head",), "untie"),
        ({EMBED: LONG, HEAD: LONG}, {}, ("embed_tokens", "lm_head"), "keep"),
        ({EMBED: LONG, HEAD: LATE}, {}, ("embed_tokens", "lm_head"), "untie"),
        ({EMBED: LATE, HEAD: LONG.astype(np.float16)}, {}, ("embed_tokens", "lm_head"), "untie"),
        ({EMBED: LONG, HEAD: LONG}, {"ensure_weight_tying": True}, ("embed_tokens", "lm_head"), "keep"),
        (dict.fromkeys(WRAPPED, LONG), {}, ("embed_tokens",), "untie"),
        ({"base_model.model.gpt_neox.embed_in.weight": LONG}, {}, ("embed_tokens",), "untie"),
    ],
)  # fmt: skip
def test_matrices_that_were_trained_apart_are_two(tmp_path, matrices, config, train, tie):
    one = resolved(write(tmp_path / "a", matrices, **config))
    assert (one.embeddings.train, one.embeddings.tie) == (train, tie)


def test_a_classifier_has_no_head_to_train_or_untie(tmp_path):
    folder = write(tmp_path / "a", {EMBED: LONG, HEAD: LATE, "base_model.model.score.weight": LONG})
    one = resolved(folder, task="classify", classify={"num_labels": 2})
    assert (one.embeddings.train, one.embeddings.tie) == (("embed_tokens",), "keep")


def test_frozen_matrices_are_not_named(tmp_path):
    folder = write(tmp_path / "a", {EMBED: LONG})
    settings = f"adapter.continue_from={{path: {folder}, mode: fold, freeze_embeddings: true}}"
    assert resolved(folder, settings).embeddings.model_dump(include={"train", "tie"}) == {"train": (), "tie": "untie"}


@pytest.mark.parametrize(
    "config", [{"target_modules": r".*\.(q|v)_proj"}, {"layers_to_transform": [1, 10]}, {"exclude_modules": ["x"]}]
)
def test_modules_that_a_pattern_chose_are_named_in_full(tmp_path, config):
    assert resolved(write(tmp_path / "a", **config)).adapter.targets == tuple(sorted(MODULES))


def test_dora_is_continued_where_it_can_be(tmp_path):
    folder = write(tmp_path / "a", use_dora=True)
    assert resolved(folder).adapter.dora
    assert not resolved(folder, f"adapter.continue_from={{path: {folder}, mode: fold}}").adapter.dora
    with pytest.raises(ConfigError, match=r"adapter\.continue_from.*adapter\.dora: true"):
        resolved(folder, "model.weights=nf4")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / ADAPTER_CONFIG).unlink(),
        lambda folder: (folder / ADAPTER_CONFIG).write_text("{"),
        lambda folder: (folder / ADAPTER_CONFIG).write_text("[]"),
        lambda folder: (folder / ADAPTER_CONFIG).write_text('{"peft_type": "IA3"}'),
        lambda folder: (folder / ADAPTER_WEIGHTS).unlink(),
        lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b"\xff" * 99),
        lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b"\x02" + b"\0" * 7 + b"[]"),
    ],
)
def test_what_is_no_adapter_is_left_to_who_opens_it(tmp_path, damage):
    folder = write(tmp_path / "a", {EMBED: LONG})
    damage(folder)
    one = resolved(folder)
    assert (one.adapter.rank, one.embeddings.train) == (128, ())


def test_values_of_the_folder_that_no_recipe_may_have_name_their_key(tmp_path):
    with pytest.raises(ConfigError, match=r"adapter\.rank"):
        resolved(write(tmp_path / "a", r=-1))


def test_a_file_system_that_does_not_answer_is_no_missing_adapter(tmp_path, monkeypatch):
    folder = write(tmp_path / "a")
    monkeypatch.setenv("DIST_CPT_STORAGE_SECONDS", "0")
    (folder / ADAPTER_CONFIG).unlink()
    (folder / ADAPTER_CONFIG).symlink_to("/proc/self/mem")  # EIO
    with pytest.raises(StorageError) as caught:
        resolved(folder)
    assert caught.value.exit_code == EXIT_STORAGE
