"""A rescaled rotation trains, and leaves with the merged and the exported model; without it an adapter is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_cpt.adapters.peft_folder import ROPE_KEY, read_adapter_config
from dist_cpt.errors import ConfigError
from dist_cpt.export.formats import export_peft, export_vllm
from dist_cpt.export.merge import merge
from tests.tiny import write_base, write_corpus, write_tokenizer
from tests.trained_checkpoint import IDS, plain_logits, trained, trainer_logits, write_checkpoint

# PEFT 0.21.2 still asks for a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
YARN = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rope")
    return write_base(root / "base", write_tokenizer(root / "tokenizer", write_corpus(root / "corpus")))


def checkpoint(base: Path, folder: Path, scaling: dict[str, Any] | None) -> tuple[Path, torch.Tensor]:
    model = trained({"path": str(base), "weights": "fp32", "rope_scaling": scaling})
    return write_checkpoint(folder, model, base), trainer_logits(model, IDS)


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        ({"rope_type": "linear", "factor": 4}, 256),
        ({"rope_type": "dynamic", "factor": 4, "rope_theta": 50.0}, 256),
        (YARN, 32),
        ({"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 8}, 64),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else None,
)
def test_the_merged_model_rotates_as_the_trainer(base, tmp_path, scaling, positions):
    from transformers import AutoModelForCausalLM

    _, plain = checkpoint(base, tmp_path / "plain", None)
    step, expected = checkpoint(base, tmp_path / "step-1", scaling)
    assert float((plain - expected).abs().max()) > 1e-3
    assert merge(step, tmp_path / "merged", "fp32") <= 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain_logits(merged, IDS), expected, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["max_position_embeddings"] == positions
    assert config["rope_parameters"].items() >= scaling.items()


def test_an_export_says_the_rotation_or_is_refused(base, tmp_path):
    step, _ = checkpoint(base, tmp_path / "step-1", YARN)
    assert export_vllm(step, tmp_path / "vllm", "fp32", base=str(base)) <= 1e-5
    assert json.loads((tmp_path / "vllm/base/config.json").read_text())["rope_parameters"]["rope_type"] == "yarn"
    assert ROPE_KEY not in read_adapter_config(tmp_path / "vllm/adapter")
    with pytest.raises(ConfigError, match=r"was trained with model\.rope_scaling"):
        export_peft(step, tmp_path / "peft", base=str(base))
    (step / "manifest.json").unlink()  # the record in adapter_config.json suffices
    assert merge(step, tmp_path / "merged", "fp32") <= 1e-5


def test_lengths_models_and_adapters_that_do_not_fit_are_refused(base, tmp_path):
    step, _ = checkpoint(base, tmp_path / "step-1", YARN)
    model = {"path": str(base), "weights": "fp32"}
    text = {"seq_len": 64, "tokenizer": "t", "sources": [{"path": "x"}]}
    with pytest.raises(ConfigError, match=r"data\.seq_len 64 exceeds the 32 positions of model\.rope_scaling"):
        trained(model | {"rope_scaling": YARN}, data=text, batch={"global_tokens": 64})
    with pytest.raises(ConfigError, match=r"trained with model\.rope_scaling \{rope_type: yarn, factor: 4\}"):
        trained(model, adapter={"continue_from": str(step)})
    with pytest.raises(ConfigError, match="low_freq_factor does nothing with rope_type: yarn"):
        trained(model | {"rope_scaling": YARN | {"low_freq_factor": 1.0}})
    positions = {"model_type": "gpt2", "num_key_value_heads": 4}
    gpt2 = write_base(tmp_path / "gpt2", base, **positions)
    with pytest.raises(ConfigError, match="model type gpt2 has no rotary positions"):
        trained({"path": str(gpt2), "weights": "fp32", "rope_scaling": YARN})
