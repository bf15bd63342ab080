"""Code that a model brings along, and instruct checkpoints: only where the recipe says so."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_cpt.config.schema import ModelConfig
from dist_cpt.errors import ConfigError
from dist_cpt.export.checkpoint_model import load_fp32
from dist_cpt.model.load import load_model
from dist_cpt.model.safety_checks import require_base_checkpoint, require_trusted_code
from tests import tiny
from tests.whole_run import built

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class {name}Config(LlamaConfig):
    model_type = "{kind}"


class {name}ForCausalLM(LlamaForCausalLM):
    config_class = {name}Config
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama that calls itself otherwise and brings its classes in a file."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    tokenizer = tiny.write_tokenizer(tmp_path / "tokenizer", tiny.write_corpus(tmp_path / "corpus"))
    folder = tiny.write_base(tmp_path / "base", tokenizer)
    (folder / "own_llama.py").write_text(CODE.format(name="Own", kind="own-llama"))
    values = json.loads((folder / "config.json").read_text()) | {"model_type": "own-llama"}
    values |= {"auto_map": {"AutoConfig": "own_llama.OwnConfig", "AutoModelForCausalLM": "own_llama.OwnForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def recipe(base: Path, **model: Any) -> Any:
    corpus = base.parent / "corpus" / "corpus.jsonl"
    return built(tiny.recipe(base, corpus, base.parent / "runs", model={"path": str(base)} | model))


def test_a_models_own_code_needs_trust_remote_code(own_code: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path: .*own_llama\.OwnConfig.* set model\.trust_remote_code: true"):
        load_model(recipe(own_code), device=torch.device("cpu"))
    assert not (own_code.parent / "modules").exists(), "it ran"
    model = load_model(recipe(own_code, trust_remote_code=True, revision=COMMIT), device=torch.device("cpu"))
    assert type(model.module.hf_model).__name__.endswith("OwnForCausalLM")
    assert list(model.identity["code"]) == ["own_llama.py"]
    assert model.identity["revision"] == COMMIT
    with pytest.raises(ConfigError, match=r"own_llama\.OwnConfig"):  # no later command runs it
        load_fp32(own_code, None)


def test_code_from_another_repository_is_refused(own_code: Path) -> None:
    values = json.loads((own_code / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "someone/else--own_llama.OwnConfig"}
    (own_code / "config.json").write_text(json.dumps(values))
    settings = ModelConfig(path=str(own_code), trust_remote_code=True, revision=COMMIT)
    with pytest.raises(ConfigError, match="someone/else--own_llama"):
        require_trusted_code(own_code, settings)
    values["model_type"] = "llama"  # transformers has it: the code beside it is not needed, and not run
    (own_code / "config.json").write_text(json.dumps(values))
    assert require_trusted_code(own_code, settings) is False


TEMPLATE = SimpleNamespace(chat_template="{{ messages }}")
PLAIN = SimpleNamespace(chat_template=None)


@pytest.mark.parametrize(
    ("path", "tokenizer", "outcome"),
    [
        ("google/gemma-2-9b-it", TEMPLATE, "refused"),
        ("/models/gemma-2-9b-it-4bit/", TEMPLATE, "refused"),
        ("meta-llama/Llama-3.1-8B-Instruct", TEMPLATE, "refused"),
        ("someone/llama-2-7b-chat.q", TEMPLATE, "refused"),
        ("Qwen/Qwen2.5-7B", TEMPLATE, "warned"),
        ("google/gemma-2-9b-it", PLAIN, "warned"),
        ("meta-llama/Llama-3.1-8B", PLAIN, "silent"),
        ("someone/bitnet-italian-chatty", PLAIN, "silent"),
    ],
)
def test_an_instruct_checkpoint_needs_allow_instruct(
    path: str, tokenizer: Any, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="dist_cpt"):
        if outcome == "refused":
            with pytest.raises(ConfigError, match=r"model\.path: .* set model\.allow_instruct: true"):
                require_base_checkpoint(ModelConfig(path=path), tokenizer)
            require_base_checkpoint(ModelConfig(path=path, allow_instruct=True), tokenizer)
        else:
            require_base_checkpoint(ModelConfig(path=path), tokenizer)
    assert bool(caplog.records) == (outcome != "silent")
