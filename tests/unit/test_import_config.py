"""Files of Axolotl and LLaMA-Factory as recipes: what is taken over, what is assumed, and every key that is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dist_cpt.config.import_config import import_config
from dist_cpt.config.load import load_recipe
from dist_cpt.errors import ConfigError
from tests.command import command

AXOLOTL = """
base_model: NousResearch/Meta-Llama-3-8B
model_type: LlamaForCausalLM
load_in_4bit: true
strict: false
datasets:
  - {path: corpus/law.jsonl, type: completion, field: body}
  - {path: allenai/c4, name: en, type: completion, split: train}
  - {path: mhenrichsen/alpaca_2k_test, type: alpaca}
val_set_size: 0.05
output_dir: ./outputs/law
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_modules_to_save: [embed_tokens, lm_head, norm]
sequence_len: 4096
sample_packing: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
warmup_steps: 10
bf16: auto
gradient_checkpointing: true
neftune_noise_alpha: 5
eval_steps: 0.1
save_steps: 500
deepspeed: deepspeed_configs/zero3_bf16.json
wandb_project: law
"""
LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B
stage: pt
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj, v_proj
dataset: c4_demo, law
cutoff_len: 2048
max_steps: 300
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
galore_rank: 8
"""


def imported(folder: Path, text: str, gpus: int = 2) -> tuple[dict, dict[str, str], list[str]]:
    path = folder / "theirs.yaml"
    path.write_text(text)
    made = import_config(path, gpus)
    return made.recipe, made.dropped, made.assumed


def test_an_axolotl_file(tmp_path):
    recipe, dropped, assumed = imported(tmp_path, AXOLOTL)
    assert recipe["model"] == {"path": "NousResearch/Meta-Llama-3-8B", "weights": "nf4"}
    assert recipe["adapter"] == {"rank": 32, "alpha": 16, "dropout": 0.05, "targets": "all-linear", "rslora": False}
    assert recipe["embeddings"] == {"train": ["embed_tokens", "lm_head"]}
    assert recipe["data"]["sources"] == [
        {"path": "corpus/law.jsonl", "text": "body"},
        {"path": "hf://datasets/allenai/c4", "split": "train", "subset": "en"},
    ]
    assert recipe["batch"] == {"micro_batch": 2, "global_tokens": 2 * 4 * 2 * 4096}
    assert recipe["schedule"] == {"kind": "cosine", "end_fraction": 0.0, "warmup_steps": 10}
    assert recipe["optim"] == {"lr": 2e-4, "state": "8bit", "weight_decay": 0.0, "betas": [0.9, 0.999]}
    assert recipe["engine"] == {"kind": "zero", "stage": 3, "activation_checkpointing": "full"}
    assert recipe["checkpoint"] == {"every_steps": 500}
    assert assumed == ["2 GPUs: a step is 16 sequences of 4096 tokens"]
    expected = "datasets.2 val_set_size lora_modules_to_save strict neftune_noise_alpha eval_steps"
    same = "model_type output_dir sample_packing bf16"
    assert dropped.keys() == {*expected.split(), *same.split()}
    assert "alpaca" in dropped["datasets.2"]
    assert dropped["neftune_noise_alpha"] == "no counterpart"


def test_a_llama_factory_file(tmp_path):
    recipe, dropped, assumed = imported(tmp_path, LLAMA_FACTORY)
    adapter = {"rank": 16, "targets": ["q_proj", "v_proj"], "alpha": 32, "rslora": False}
    assert recipe["adapter"] == adapter
    assert recipe["data"]["sources"] == [{"path": "data/c4_demo.json"}, {"path": "data/law.json"}]
    assert recipe["train"] == {"tokens": 300 * 2 * 8 * 2048}
    assert recipe["schedule"] == {"kind": "cosine", "end_fraction": 0.0, "warmup_fraction": 0.1}
    assert recipe["engine"] == {"kind": "auto", "activation_checkpointing": "full"}  # its default
    assert dropped.keys() == {"do_train", "bf16", "ddp_timeout", "val_size", "galore_rank"}
    assert "dataset_info.json" in assumed[0]


def test_full_training_and_conversations(tmp_path):
    text = "base_model: gpt2\nsequence_len: 512\nlearning_rate: 1e-5\ndatasets: [{path: d.jsonl, type: chat_template}]"
    recipe, _, _ = imported(tmp_path, text, gpus=1)
    assert (recipe["adapter"], recipe["task"], recipe["train"]) == ({"kind": "none"}, "instruct", {"epochs": 1.0})


def test_every_key_is_taken_over_or_named(tmp_path):
    """Whatever is added to a file is named: nothing is dropped without a word."""
    for text in (AXOLOTL, LLAMA_FACTORY):
        plain = imported(tmp_path, text)[1]
        more = imported(tmp_path, text + "never_heard_of: 1\n")[1]
        assert more.keys() - plain.keys() == {"never_heard_of"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", "neither base_model"),
        ("- 1", "not a mapping"),
        ("base_model: gpt2\nsequence_len: 8", "no data set"),
        ("model_name_or_path: gpt2\nstage: dpo\ndataset: d", "only pt and sft"),
        ("model_name_or_path: gpt2\nfinetuning_type: freeze\ndataset: d", "only lora and full"),
        ("base_model: gpt2\nsequence_len: 8\nlearning_rate: -1\ndatasets: [{path: d}]", "optim.lr"),
    ],
)
def test_what_cannot_be_a_recipe_is_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        imported(tmp_path, text)


def test_the_command_writes_a_recipe_and_lists_what_it_dropped(tmp_path):
    (tmp_path / "law.yaml").write_text(AXOLOTL)
    out = tmp_path / "recipe.yaml"
    ended = command("import-config", tmp_path / "law.yaml", "--gpus", 8, "--out", out)
    assert ended.code == 0
    assert "neftune_noise_alpha: 5 (no counterpart)" in ended.out
    config = load_recipe(out)
    assert (config.name, config.batch.global_tokens) == ("law", 64 * 4096)
    assert yaml.safe_load(out.read_text())["name"] == "law"
    assert "# not taken over: strict: False (no counterpart)" in out.read_text()
    assert command("import-config", tmp_path / "law.yaml", "--out", out).code == 64  # it exists
