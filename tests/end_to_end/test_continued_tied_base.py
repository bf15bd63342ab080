"""A 4-bit Gemma 2, which ties embedding and head, under an adapter of PEFT's own that trained the embedding alone.

PEFT leaves the head at the base's values. The recipe names nothing of the adapter but its folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_cpt.config.load import load_recipe
from dist_cpt.export.checkpoint_model import plain_model
from dist_cpt.export.merge import merge
from tests import tiny
from tests.run_ranks import run_ranks
from tests.whole_run import rows, train

IDS = torch.randint(0, tiny.VOCAB_SIZE, (1, 32), generator=torch.Generator().manual_seed(0))
MATRIX = pytest.mark.matrix
PEFT_WARNS = pytest.mark.filterwarnings(
    "ignore:Unexpected keyword arguments \\['stands_on'\\]",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:Input and output embeddings are no longer tied:UserWarning",
)
GEMMA = {
    "model_type": "gemma2",
    "head_dim": 16,
    "intermediate_size": 128,  # bitsandbytes on a CPU unpacks rows of 96 wrongly
    "sliding_window": 32,
    "query_pre_attn_scalar": 16,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(4-bit base, adapter, corpus)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("gemma")
    corpus = tiny.write_corpus(folder / "corpus")
    tokenizer = tiny.write_tokenizer(folder / "tokenizer", corpus)
    whole, base, adapter = tiny.write_base(folder / "whole", tokenizer, **GEMMA), folder / "base", folder / "adapter"
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(
        whole, dtype=torch.bfloat16, quantization_config=nf4, device_map={"": "cpu"}
    )
    model.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, base / name)
    lora = LoraConfig(
        r=6, lora_alpha=12, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
    )
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        trained = get_peft_model(model, lora)
    torch.manual_seed(7)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    trained.save_pretrained(adapter)
    return base, adapter, corpus


def recipe(made: tuple[Path, Path, Path], out: Path, mode: str) -> dict[str, Any]:
    base, adapter, corpus = made
    values = tiny.recipe(base, corpus, out, train={"tokens": 6 * 512}, batch={"global_tokens": 512, "micro_batch": 1})
    values |= {"model": {"path": str(base), "weights": "nf4"}}
    values["adapter"] = {"continue_from": str(adapter) if mode == "train" else {"path": str(adapter), "mode": mode}}
    del values["embeddings"]
    return values


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def under_peft(model: Any, *adapters: Path) -> Any:
    """`model` with all adapters but the last merged in, by PEFT."""
    from peft import PeftModel

    for folder in adapters[:-1]:
        model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return PeftModel.from_pretrained(model, str(adapters[-1]))


def check(made: tuple[Path, Path, Path], folder: Path, mode: str, out: Path) -> None:
    """The run has what the adapter's folder says, and its checkpoint is what PEFT makes of the same files."""
    base, adapter, _ = made
    config = load_recipe(folder / "recipe.yaml")
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.rslora) == (6, 12, False)
    assert config.adapter.targets == ("q_proj", "v_proj")
    assert (config.embeddings.train, config.embeddings.tie) == (("embed_tokens",), "untie")
    evidence = json.loads((folder / "continued.json").read_text())
    assert evidence["loss_with"] != evidence["loss_without"]
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    merge(newest, out / "merged", "fp32")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    adapters = [newest] if mode == "train" else [adapter, newest]
    with_peft, without = logits(under_peft(plain_model(base), *adapters)), logits(plain_model(base))
    torch.testing.assert_close(logits(merged), with_peft, rtol=0, atol=1e-4)
    assert float((with_peft - without).abs().max()) > 0.1


@PEFT_WARNS
@pytest.mark.parametrize("mode", ["train", pytest.param("fold", marks=MATRIX), pytest.param("stack", marks=MATRIX)])
def test_a_recipe_that_names_nothing_but_the_folder(
    made: tuple[Path, Path, Path], tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values, folder = recipe(made, tmp_path / "runs", mode), tmp_path / "runs/tiny"
    assert train(values) == 0
    assert "embeddings.tie: untie" in capsys.readouterr().err
    check(made, folder, mode, tmp_path)
    losses = [row["loss"] for row in rows(folder / "metrics.jsonl")]
    shutil.rmtree(folder / "checkpoints/step-00000006")
    assert train(values) == 0, "the same recipe is the same run"
    assert json.loads((folder / "certificate.json").read_text())["verdict"] == "pass"
    assert [row["loss"] for row in rows(folder / "metrics.jsonl")] == losses


@MATRIX
@PEFT_WARNS
@pytest.mark.parametrize("engine", ["{kind: fsdp, shard: full}", "{kind: zero, stage: 3}"])
@pytest.mark.parametrize("mode", ["train", "fold", "stack"])
def test_on_two_ranks(made: tuple[Path, Path, Path], tmp_path: Path, mode: str, engine: str) -> None:
    path = tiny.write_recipe(tmp_path / "recipe.yaml", recipe(made, tmp_path / "runs", mode))
    log = tmp_path / "log"
    assert run_ranks(path, 2, f"engine={engine}", log=log) == [0, 0], log.read_text()[-3000:]
    check(made, tmp_path / "runs/tiny", mode, tmp_path)


@pytest.mark.parametrize(
    ("section", "changes", "named"),
    [
        ("adapter", {"rank": 8}, "adapter.rank: 6"),
        ("adapter", {"targets": ["q_proj"]}, "adapter.targets: [q_proj, v_proj]"),
        ("embeddings", {"tie": "keep"}, "embeddings.tie: untie"),
        ("embeddings", {"train": ["lm_head"]}, "embeddings.train: [embed_tokens]"),
    ],
)
def test_what_is_set_and_differs_is_refused(
    made: tuple[Path, Path, Path], tmp_path: Path, section: str, changes: dict[str, Any], named: str
) -> None:
    values = recipe(made, tmp_path / "runs", "train")
    values[section] = values.get(section, {}) | changes
    assert train(values) == 64
    assert named in json.loads((tmp_path / "runs/tiny/exit.json").read_text())["reason"]
