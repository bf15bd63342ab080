"""A checkpoint folder is an ordinary PEFT or transformers folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_cpt.training_state import STATE_KINDS, ExportedTensor, TensorSpec
from tests.checkpoint_state import save_step

# peft 0.21.2 reads a name that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = torch.arange(12).view(1, 12)


def export_of(state: Mapping[str, torch.Tensor]) -> Any:
    def export(owner_of: Any) -> Iterator[ExportedTensor]:
        for name, tensor in state.items():
            for kind in STATE_KINDS:
                yield ExportedTensor(
                    kind, name, tensor.detach().float() if kind == "master" else torch.zeros(tensor.shape)
                )

    return export


def specs_of(state: Mapping[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tuple(tensor.shape), "float32", "weights") for name, tensor in state.items())


@pytest.fixture
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def test_an_adapter_opens_in_peft(tmp_path: Path, llama: Any) -> None:
    import copy

    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

    base = copy.deepcopy(llama)
    model = get_peft_model(llama, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    state = get_peft_model_state_dict(model)
    path = save_step(
        tmp_path,
        1,
        specs=specs_of(state),
        export=export_of(state),
        sidecars=[lambda folder: model.peft_config["default"].save_pretrained(folder)],
    ).path
    with torch.no_grad():
        trained = model.eval()(IDS).logits
        assert not torch.equal(trained, base(IDS).logits)
        assert torch.equal(PeftModel.from_pretrained(base, path).eval()(IDS).logits, trained)


def test_a_full_parameter_checkpoint_opens_in_transformers(tmp_path: Path, llama: Any) -> None:
    from transformers import AutoModelForCausalLM

    state = dict(llama.named_parameters())
    path = save_step(
        tmp_path,
        1,
        adapter=False,
        specs=specs_of(state),
        export=export_of(state),
        sidecars=[lambda folder: llama.config.save_pretrained(folder)],
    ).path
    opened, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(opened.eval()(IDS).logits, llama(IDS).logits)
