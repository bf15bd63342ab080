"""A run starts from an adapter that PEFT wrote: what is imported, and what is refused in one line."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_cpt.adapters.peft_folder import canonical_key
from dist_cpt.checkpoint.import_peft import PeftAdapter
from dist_cpt.checkpoint.load import load
from dist_cpt.config.load import build
from dist_cpt.config.resolve import resolve_paths
from dist_cpt.errors import CheckpointError, ConfigError, DistCptError
from dist_cpt.run_folder.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHECKPOINTS, RECIPE
from dist_cpt.training_state import TensorSpec
from tests.checkpoint_state import save_step
from tests.contract.model import VOCAB, save_base
from tests.peft_adapter import (
    BOTH,
    edit_config,
    edit_tensors,
    flat_slices,
    recipe,
    started,
    state_of,
    write_peft,
)

IDS = torch.arange(3, 15).view(1, 12)
EMBED, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
TRAINS_BOTH: dict[str, Any] = {"embeddings": {"train": BOTH}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("base"))
    save_base(folder, {"tie_word_embeddings": False})
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tied"))
    save_base(folder, {"tie_word_embeddings": True})
    return folder


@pytest.fixture(scope="module")
def written(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "lora": write_peft(root / "lora", base),
        "both": write_peft(root / "both", base, modules_to_save=BOTH),
    }


@pytest.fixture
def lora(written: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written["lora"], tmp_path / "lora"))


@pytest.fixture
def both(written: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written["both"], tmp_path / "both"))


def peft_logits(base: str, folder: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    with torch.no_grad():
        return model.eval()(IDS).logits[:, -1]


def refused(base: str, folder: Path, optimizer: bool = False, **changes: Any) -> str:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        started(recipe(base, folder, optimizer, **changes))
    line = str(caught.value)
    assert "\n" not in line
    assert caught.value.remedy
    print(line)
    return line


# -- what is imported -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("train", [(), ("lm_head",), BOTH], ids=["lora", "head", "both"])
def test_a_peft_folder_is_the_same_model_here(base: str, tmp_path: Path, rslora: bool, train: Sequence[str]) -> None:
    folder = write_peft(tmp_path / "adapter", base, use_rslora=rslora, modules_to_save=train or None)
    engine, _, begun = started(recipe(base, folder, adapter={"rslora": rslora}, embeddings={"train": train}))
    from safetensors.torch import load_file

    state, saved = state_of(engine), load_file(folder / ADAPTER_WEIGHTS)
    assert {f"master.{key}" for key in saved} == {key for key in state if key.startswith("master.")}
    assert all(torch.equal(state[f"master.{key}"], value) for key, value in saved.items())
    assert all(not value.any() for key, value in state.items() if not key.startswith("master."))
    assert begun.step == 0
    assert str(folder) in begun.description
    assert len(begun.sha256) == 64
    torch.testing.assert_close(engine.logits(IDS), peft_logits(base, folder), rtol=0, atol=2e-6)
    plain, _, _ = started(recipe(base, write_peft(tmp_path / "zero", base, scatter=False)))
    assert (plain.logits(IDS) - engine.logits(IDS)).abs().max() > 1e-2, "the adapter would show"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"use_rslora": True, "modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": BOTH},
        {"modules_to_save": BOTH, "ensure_weight_tying": True},
        {"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
)
def test_the_folder_alone_says_what_to_continue(base: str, tied: str, tmp_path: Path, lora: Any, tie: bool) -> None:
    if lora.get("ensure_weight_tying") and not tie:
        lora = lora | {"ensure_weight_tying": False}
    path = tied if tie else base
    folder = write_peft(tmp_path / "adapter", path, **lora)
    values = recipe(path, folder).model_dump(exclude={"embeddings"})
    values["adapter"] = {"continue_from": str(folder)}
    engine, _, _ = started(resolve_paths(build(values, "recipe.yaml")))
    torch.testing.assert_close(engine.logits(IDS), peft_logits(path, folder), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_widened_exactly(base: str, lora: Path, dtype: torch.dtype) -> None:
    edit_tensors(lora, lambda tensors: {key: value.to(dtype) for key, value in tensors.items()})
    adapter = PeftAdapter(lora)
    from safetensors.torch import load_file

    for name, value in load_file(lora / ADAPTER_WEIGHTS).items():
        assert torch.equal(adapter.master(name), value.float())


def test_any_slice_is_that_of_the_flat_tensor(both: Path) -> None:
    adapter = PeftAdapter(both)
    for name, shape in adapter.shapes.items():
        whole = adapter.master(name).reshape(-1)
        for start, stop in flat_slices(shape):
            assert torch.equal(adapter.read("master", name, start, stop), whole[start:stop])
            assert torch.equal(adapter.read("exp_avg", name, start, stop), torch.zeros(stop - start))


SPELLINGS = {
    "base_model.model.lm_head.weight": HEAD,
    "base_model.model.lm_head.modules_to_save.weight": HEAD,
    "base_model.model.lm_head.modules_to_save.default.weight": HEAD,
    "base_model.model.lm_head.original_module.weight": None,
    "base_model.model.model.embed_tokens.base_layer.weight": None,
    Q_A: Q_A,
    Q_A.replace(".weight", ".default.weight"): Q_A,
}


@pytest.mark.parametrize("key", SPELLINGS)
def test_every_spelling_has_one_name(key: str) -> None:
    assert canonical_key(key) == SPELLINGS[key]


def test_an_adapter_of_unsloth(base: str, both: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another repository as base, keys PEFT does not know, wrapped names with the frozen original beside them."""
    edit_config(
        both,
        base_model_name_or_path="unsloth/llama-3-8b-bnb-4bit",
        auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": "unsloth.models.llama"},
        unsloth_fixed=True,
        unsloth_version="2024.6",
        lora_dropout=0.1,
    )

    def spell(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        spelled = {key: value for key, value in tensors.items() if ".lora_" in key}
        for name in (EMBED, HEAD):
            stem = name.removesuffix(".weight")
            spelled[f"{stem}.modules_to_save.default.weight"] = tensors[name].bfloat16()
            spelled[f"{stem}.original_module.weight"] = torch.zeros_like(tensors[name])
        return spelled

    expected = PeftAdapter(both).master(HEAD).bfloat16().float()
    edit_tensors(both, spell)
    with caplog.at_level(logging.WARNING, logger="dist_cpt"):
        engine, _, _ = started(recipe(base, both, **TRAINS_BOTH))
    assert torch.equal(state_of(engine)[f"master.{HEAD}"], expected)
    assert any("unsloth/llama-3-8b-bnb-4bit" in message and base in message for message in caplog.messages)


def test_an_embedding_that_peft_saved_beside_its_wrapped_copy(base: str, both: Path) -> None:
    """save_embedding_layers leaves the matrix under two names."""

    def double(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {EMBED.replace(".weight", ".modules_to_save.weight"): tensors[EMBED].clone()}

    edit_tensors(both, double)
    started(recipe(base, both, **TRAINS_BOTH))
    edit_tensors(both, lambda tensors: tensors | {EMBED: tensors[EMBED] + 1})
    with pytest.raises(CheckpointError, match=rf"{EMBED} .*differ"):
        started(recipe(base, both, **TRAINS_BOTH))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_pair_is_taken_only_as_one(tied: str, tmp_path: Path) -> None:
    one = write_peft(tmp_path / "one", tied, modules_to_save=BOTH, ensure_weight_tying=True)
    engine, model, _ = started(recipe(tied, one, **TRAINS_BOTH))
    assert list(model.aliases) == [HEAD]
    torch.testing.assert_close(engine.logits(IDS), peft_logits(tied, one), rtol=0, atol=2e-6)
    apart = write_peft(tmp_path / "apart", tied, modules_to_save=BOTH)
    assert f"{EMBED} and {HEAD} " in refused(tied, apart, **TRAINS_BOTH)
    edit_tensors(one, lambda tensors: {key: value for key, value in tensors.items() if key != HEAD})
    assert f"{EMBED} and {HEAD} " in refused(tied, one, **TRAINS_BOTH)


# -- a checkpoint of this program ------------------------------------------------------------------------------------


@pytest.fixture
def own(base: str, both: Path, tmp_path: Path) -> Path:
    """Step 5 of a run: random moments."""
    engine, model, _ = started(recipe(base, both, **TRAINS_BOTH))
    generator = torch.Generator().manual_seed(3)
    engine.import_state(lambda kind, name, start, stop: torch.rand(stop - start, generator=generator) + 0.1, 5)
    run = tmp_path / "run"
    (run / CHECKPOINTS).mkdir(parents=True)
    (run / RECIPE).write_text("optim: {betas: [0.9, 0.999]}\n")
    sidecars = [model.write_config]
    return save_step(
        run, 5, specs=_specs(model), export=engine.export_state, sidecars=sidecars, aliases=model.aliases
    ).path


def _specs(model: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(n, tuple(p.shape), "float32", "adapter") for n, p in model.trainable.items())


def test_an_own_checkpoint_with_and_without_its_optimizer(base: str, own: Path) -> None:
    whole, _, begun = started(recipe(base, own, True, **TRAINS_BOTH))
    assert begun.step == 5
    with load(own) as checkpoint:
        for key, value in state_of(whole).items():
            kind, _, name = key.partition(".")
            assert torch.equal(checkpoint.read(kind, name, 0, value.numel()), value.reshape(-1))  # type: ignore[arg-type]
    weights, _, fresh = started(recipe(base, own, **TRAINS_BOTH))
    assert fresh.step == 0
    state = state_of(weights)
    assert torch.equal(state[f"master.{HEAD}"], state_of(whole)[f"master.{HEAD}"])
    assert not state[f"exp_avg.{HEAD}"].any()


def test_an_own_checkpoint_is_verified_first(base: str, own: Path) -> None:
    file = next(own.glob("optimizer-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert "sha256" in refused(base, own, **TRAINS_BOTH)


def test_moments_of_other_betas_are_refused(base: str, own: Path) -> None:
    line = refused(base, own, True, optim={"betas": [0.9, 0.95]}, **TRAINS_BOTH)
    assert "optim.betas: [0.9, 0.999]" in line
    assert "[0.9, 0.95]" in line


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adapter": {"rank": 4}}, "adapter.rank: 8"),
        ({"adapter": {"alpha": 8}}, "adapter.alpha: 16"),
        ({"adapter": {"rslora": True}}, "adapter.rslora: false"),
        ({"adapter": {"rank": 4, "rslora": True}}, "adapter.rank: 8, adapter.rslora: false"),
        (
            {"adapter": {"targets": ["q_proj", "v_proj"]}},
            "adapter.targets: [down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj]",
        ),
        ({"embeddings": {"train": ["lm_head"]}}, "embeddings.train: []"),
    ],
)
def test_another_recipe_is_refused_with_what_to_set(base: str, lora: Path, changes: Any, expected: str) -> None:
    assert expected in refused(base, lora, **changes)


@pytest.mark.parametrize("train", [[], ["lm_head"]])
def test_trained_matrices_that_do_not_train_here(base: str, both: Path, train: list[str]) -> None:
    assert "embeddings.train: [embed_tokens, lm_head]" in refused(base, both, embeddings={"train": train})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern {'q_proj': 4}"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_another_method_is_refused(base: str, lora: Path, changes: Any, expected: str) -> None:
    edit_config(lora, **changes)
    line = refused(base, lora)
    assert expected in line
    assert "model.path" in line


def test_tensors_that_fit_nothing(base: str, lora: Path) -> None:
    edit_tensors(lora, lambda t: t | {HEAD.replace(".weight", ".lora_A.weight"): torch.ones(8, 30)})
    assert "LoRA on lm_head" in refused(base, lora)
    edit_tensors(lora, lambda t: {k: v for k, v in t.items() if "lm_head" not in k} | {"x\n.weight": torch.ones(1)})
    assert "x\\n.weight" in refused(base, lora)
    edit_tensors(lora, lambda t: {k: v for k, v in t.items() if k not in ("x\n.weight", Q_A)})
    line = refused(base, lora)
    assert Q_A in line
    assert "adapter.targets" in line
    edit_tensors(lora, lambda t: t | {Q_A: torch.ones(8, 31)})
    line = refused(base, lora)
    assert Q_A in line
    assert "[8, 31]" in line
    assert "[8, 30]" in line
    edit_tensors(lora, lambda t: t | {Q_A: torch.full((8, 30), float("nan"))})
    with pytest.raises(CheckpointError, match=f"master of {Q_A} "):
        started(recipe(base, lora))
    edit_tensors(lora, lambda t: t | {Q_A: torch.ones(8, 30, dtype=torch.float64)})
    assert f"{Q_A} is F64" in refused(base, lora)


def test_another_vocabulary_size_is_named(base: str, both: Path) -> None:
    edit_tensors(both, lambda t: t | {HEAD: torch.ones(VOCAB + 2, 30)})
    line = refused(base, both, **TRAINS_BOTH)
    assert f"vocabulary of {VOCAB + 2}, here {VOCAB}" in line
    assert HEAD in line


def test_folders_that_are_not_adapters(base: str, lora: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refused(base, tmp_path / "nowhere")
    assert "model.path" in refused(base, Path(base))
    (tmp_path / "out" / "checkpoint-20").mkdir(parents=True)
    assert str(tmp_path / "out" / "checkpoint-20") in refused(base, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert ADAPTER_CONFIG in refused(base, tmp_path / "empty")
    assert "optimizer.pt" in refused(base, lora, True)
    weights = lora / ADAPTER_WEIGHTS
    os.truncate(weights, weights.stat().st_size - 8)
    with pytest.raises(CheckpointError, match=ADAPTER_WEIGHTS):
        started(recipe(base, lora))
    weights.rename(lora / "adapter_model.bin")
    assert "adapter_model.bin" in refused(base, lora)
    (lora / ADAPTER_CONFIG).write_text("{")
    weights.write_bytes(b"")
    with pytest.raises(DistCptError, match=ADAPTER_CONFIG):
        started(recipe(base, lora))
    (lora / ADAPTER_CONFIG).write_text(json.dumps([]))
    with pytest.raises(DistCptError, match=ADAPTER_CONFIG):
        started(recipe(base, lora))
