"""What leaves the house gives the trainer's logits: the adapter under vanilla PEFT, and the merged folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_cpt.errors import CheckpointError, ConfigError
from dist_cpt.export.generate import generate
from dist_cpt.export.merge import merge
from tests.tiny import VOCAB_SIZE, llama, write_base
from tests.trained_checkpoint import IDS, plain_logits, trained, trainer_logits, write_checkpoint

# PEFT 0.21.2 still asks for a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizer) -> Path:
    root = tmp_path_factory.mktemp("bases")
    write_base(root / "untied", tokenizer)
    write_base(root / "tied", tokenizer, tie_word_embeddings=True)
    _write_gpt2(root / "gpt2", tokenizer)
    return root


@pytest.mark.parametrize("train", [[], ["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="+".join)
@pytest.mark.parametrize("base", ["untied", "tied", "gpt2"])
def test_vanilla_peft_and_the_merged_folder_give_the_trainers_logits(bases, tokenizer, tmp_path, base, train):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = trained({"path": str(bases / base), "weights": "fp32"}, embeddings={"train": train})
    checkpoint = write_checkpoint(tmp_path / "step-1", model, tokenizer)
    expected = trainer_logits(model, IDS)

    vanilla = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / base), str(checkpoint))
    torch.testing.assert_close(plain_logits(vanilla, IDS), expected, rtol=0, atol=1e-5)
    without = plain_logits(AutoModelForCausalLM.from_pretrained(bases / base), IDS)
    assert float((without - expected).abs().max()) > 1e-2

    difference = merge(checkpoint, tmp_path / "merged", "fp32")
    assert difference <= 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain_logits(merged, IDS), expected, rtol=0, atol=1e-5)
    is_tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert is_tied == merged.config.tie_word_embeddings == (base != "untied")
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    assert not [path for path in (tmp_path / "merged").iterdir() if path.suffix in (".bin", ".pt")]


def test_adapter_keys_are_those_of_peft(bases, tokenizer, tmp_path):
    """PEFT reads every key of the file and writes the same ones itself."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = trained({"path": str(bases / "tied"), "weights": "fp32"})
    checkpoint = write_checkpoint(tmp_path / "step-1", model, tokenizer)
    vanilla = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / "tied"), str(checkpoint))
    vanilla.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (checkpoint, tmp_path / "again"))
    assert set(theirs) == set(ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_adapter_config_is_the_same_bytes_each_time(bases, tmp_path):
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        trained({"path": str(bases / "untied")}).write_config(tmp_path / name)
        written.append((tmp_path / name / "adapter_config.json").read_bytes())
    assert written[0] == written[1]


def test_bf16_merge_is_stored_in_bf16_and_states_its_rounding(bases, tokenizer, tmp_path):
    checkpoint = write_checkpoint(
        tmp_path / "step-1", trained({"path": str(bases / "untied"), "weights": "bf16"}), tokenizer
    )
    difference = merge(checkpoint, tmp_path / "merged", "bf16")
    assert 0 < difference < 0.1
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("tied", [False, True])
def test_full_parameter_checkpoint_is_copied(tokenizer, tmp_path, tied):
    from transformers import AutoModelForCausalLM

    model = trained({"config": llama(tie_word_embeddings=tied)}, adapter={"kind": "none"}, embeddings={})
    checkpoint = write_checkpoint(tmp_path / "step-1", model, tokenizer)
    assert merge(checkpoint, tmp_path / "merged", "fp32") == 0.0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain_logits(merged, IDS), trainer_logits(model, IDS), rtol=0, atol=1e-5)


def test_another_base_is_refused(bases, tokenizer, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "step-1", trained({"path": str(bases / "untied")}), tokenizer)
    other = write_base(tmp_path / "other", tokenizer, initializer_range=0.03)
    with pytest.raises(CheckpointError, match="sha256"):
        merge(checkpoint, tmp_path / "merged", "fp32", base=str(other))
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged*"))


def test_a_merge_that_changes_the_model_is_refused(bases, tokenizer, tmp_path, monkeypatch):
    from peft.tuners.lora import Linear

    checkpoint = write_checkpoint(tmp_path / "step-1", trained({"path": str(bases / "untied")}), tokenizer)
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: torch.zeros_like(self.weight))
    with pytest.raises(CheckpointError, match="logits differ"):
        merge(checkpoint, tmp_path / "merged", "fp32")
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged*"))


def test_mistakes_are_named(bases, tokenizer, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "step-1", trained({"path": str(bases / "untied")}), tokenizer)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        merge(checkpoint, checkpoint, "fp32")
    with pytest.raises(ConfigError, match="fp32, bf16, fp16"):
        merge(checkpoint, tmp_path / "merged", "int8")
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        merge(bases, tmp_path / "merged", "fp32")
    (checkpoint / "adapter_model.safetensors").rename(checkpoint / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        merge(checkpoint, tmp_path / "merged", "fp32")


def test_generate_is_the_same_from_checkpoint_adapter_and_merged_folder(bases, tokenizer, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "step-1", trained({"path": str(bases / "untied")}), tokenizer)
    merge(checkpoint, tmp_path / "merged", "fp32")
    adapter = tmp_path / "adapter"
    shutil.copytree(checkpoint, adapter)
    (adapter / "manifest.json").unlink()
    texts = [generate(folder, "The for statement", 12) for folder in (checkpoint, adapter, tmp_path / "merged")]
    assert texts[0].startswith("The for statement")
    assert len(texts[0]) > len("The for statement")
    assert texts[1:] == texts[:1] * 2


TURNS = "{% for m in messages %}<s>{{ m['content'] }}<end>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (TURNS, [0, VOCAB_SIZE + 1]),
        (TURNS.replace("m['content']", "'<think></think>' + m['content']"), [0, VOCAB_SIZE + 1]),
        (TURNS.replace("<end>", " and so on"), 0),
        ("{{ raise_exception('tools are missing') }}", 0),
        (None, 0),
    ],
)
def test_a_merged_model_stops_where_a_turn_ends(bases, tmp_path, template, ends):
    from transformers import AutoTokenizer, GenerationConfig

    from dist_cpt.export.checkpoint_model import plain_model
    from dist_cpt.export.model_folder import write_model

    tokenizer = AutoTokenizer.from_pretrained(bases / "untied")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "<end>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = plain_model(bases / "untied")
    model.generation_config.eos_token_id = 0
    (tmp_path / "out").mkdir()
    write_model(model, tmp_path / "out", [tmp_path / "tokenizer"])
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == ends


def test_sampling_follows_its_seed(bases):
    def sample(seed: int, top_k: int = 0) -> str:
        return generate(bases / "untied", "import", 16, temperature=1.0, top_k=top_k, seed=seed)

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)
    greedy = generate(bases / "untied", "import", 16)
    assert sample(0, top_k=1) == greedy
    assert generate(bases / "untied", "", 4)
    with pytest.raises(ConfigError, match="max_new_tokens 0"):
        generate(bases / "untied", "x", 0)
    with pytest.raises(ConfigError, match="nowhere"):
        generate(bases / "nowhere", "x")
    with pytest.raises(ConfigError, match=r"config\.json"):
        generate(bases, "x")


def _write_gpt2(folder: Path, tokenizer: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
