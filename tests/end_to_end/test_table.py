"""Every architecture under every method and engine: five steps, and what was saved is the model that was trained.

One cell trains a whole run on its ranks. Then transformers and PEFT alone open the last checkpoint and repeat the
trainer's own held-out loss, document by document without packing, and the merged folder gives their logits.

The rules: fp32 logits agree to 1e-5 of the largest one, fp32 losses to 1e-5 of themselves. Over NF4 the trainer
computes in bf16, whose eight bits leave each logit a relative error of 2**-8; the mean loss over a set may be off
by as much.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dist_cpt.data.loader import ValidationLoader
from dist_cpt.data.prepared import open_prepared
from dist_cpt.data.tokenizer_extend import extend_tokenizer
from dist_cpt.data.tokenizer_train import corpus_texts
from dist_cpt.export.merge import merge
from tests import tiny
from tests.run_ranks import run_ranks
from tests.whole_run import built, rows

SEQ_LEN = 32
ROWS = 576  # 512 + 40, as a multiple of 64
ENGINES: dict[str, tuple[Any, int]] = {
    "single": ("single", 1),
    "fsdp": ({"kind": "fsdp", "shard": "full"}, 2),
    "zero-3": ({"kind": "zero", "stage": 3}, 2),
}
BOTH = {"train": ["embed_tokens", "lm_head"]}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"embeddings": {}},
    "qlora": {"embeddings": {}, "weights": "nf4"},
    "full": {"adapter": {"kind": "none"}, "embeddings": {}},
    "lora+embeddings": {"embeddings": BOTH},
    "tied": {"embeddings": BOTH},
    "extended": {"embeddings": BOTH},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"adapter": {"dora": True}, "embeddings": BOTH},
    "lora+": {"adapter": {"lora_plus_ratio": 4.0}, "embeddings": {}},
    "pissa": {"adapter": {"init": "pissa"}, "embeddings": {}},
    "dora+lora+": {"adapter": {"dora": True, "lora_plus_ratio": 4.0, "rslora": False}, "embeddings": {}},
}
_SIZES = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 64,  # rows of whole NF4 blocks: transformers' own 4-bit layer fails on others on a CPU
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"} | _SIZES,
    "mistral": {"model_type": "mistral", "sliding_window": 16} | _SIZES,
    "qwen2": {"model_type": "qwen2"} | _SIZES,
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16} | _SIZES,
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 512},
}
FAST = {("gpt2", "tied", "fsdp"), ("llama", "dora+lora+", "zero-3"), ("qwen2", "pissa", "single")}


@dataclass(frozen=True)
class Place:
    """What all cells share, made when first asked for."""

    folder: Path
    corpus: Path
    tokenizer: Path

    def base(self, model: str, tied: bool) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = self.folder / f"{model}{'-tied' * tied}"
        if not folder.exists():
            torch.manual_seed(0)
            ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
            config = AutoConfig.for_model(**(MODELS[model] | ends), tie_word_embeddings=tied)
            AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
            shutil.copyfile(self.tokenizer / "tokenizer.json", folder / "tokenizer.json")
            settings = json.loads((self.tokenizer / "tokenizer_config.json").read_text())
            settings |= {"unk_token": "<eos>"}  # Qwen2's class would add a token of its own
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    def extended(self, base: Path) -> Path:
        folder = self.folder / f"{base.name}-extended"
        if not folder.exists():
            extend_tokenizer(str(base), folder, lambda: corpus_texts([str(self.corpus)]), num_new=40)
        return folder

    def recipe(self, model: str, method: str, engine: Any) -> dict[str, Any]:
        cell = (METHODS | VARIANTS)[method]
        base = self.base(model, tied=method == "tied")
        extra = {"new_tokens": str(self.extended(base))} if method == "extended" else {}
        values = tiny.recipe(
            base,
            self.corpus,
            self.folder / "runs",
            name=f"{model}-{method}".replace("+", "_"),
            model={"path": str(base), "weights": cell.get("weights", "fp32")},
            adapter={"rank": 4, "alpha": 4} | cell.get("adapter", {}),
            embeddings=cell["embeddings"] | extra,
            batch={"global_tokens": 4 * SEQ_LEN, "micro_batch": 2},
            train={"tokens": 5 * 4 * SEQ_LEN},
            optim={"lr": 1.0e-2, "embedding_lr": 1.0e-3},
            engine=engine,
            checkpoint={"every_steps": 5, "trial": False},
            evaluate={"max_blocks": 8},
            health={"hang": None, "straggler": None},
        )
        values["data"] |= {"seq_len": SEQ_LEN, "cache_dir": str(self.folder / "cache")}
        return values


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("table")
    corpus = tiny.write_corpus(folder / "corpus")
    return Place(folder, corpus, tiny.write_tokenizer(folder / "tokenizer", corpus))


def cells() -> list[Any]:
    plain = [(m, method, e) for m in MODELS for method in METHODS for e in ENGINES]
    variants = [(m, method, e) for m in ("llama", "qwen2", "gpt2") for method in VARIANTS for e in ENGINES]
    assert {*plain, *variants} >= FAST
    return [
        pytest.param(*cell, id="-".join(cell), marks=() if cell in FAST else pytest.mark.matrix)
        for cell in (*plain, *variants)
    ]


@pytest.mark.parametrize(("model", "method", "engine"), cells())
def test_what_was_saved_is_what_was_trained(place: Place, tmp_path: Path, model: str, method: str, engine: str) -> None:
    kind, ranks = ENGINES[engine]
    values: dict[str, Any] = place.recipe(model, method, kind) | {"output_dir": str(tmp_path)}
    base, weights = Path(values["model"]["path"]), values["model"]["weights"]
    log = tmp_path / "log.txt"
    codes = run_ranks(tiny.write_recipe(tmp_path / "recipe.yaml", values), ranks, log=log)
    assert codes == [0] * ranks, log.read_text()[-2000:]
    run = tmp_path / values["name"]
    checkpoint = run / "checkpoints" / "step-00000005"
    before, after = (row["loss"] for row in rows(run / "evaluations.jsonl"))
    assert after != before

    opened = open_with_peft(checkpoint, base, weights, method)
    expected = held_out_loss(opened, values)
    allowed = 2**-8 if method == "qlora" else 1e-5
    assert abs(after - expected) <= allowed * expected, (after, expected)

    if method == "qlora":
        opened = open_with_peft(checkpoint, base, "fp32", method)
    assert merge(checkpoint, tmp_path / "merged", "fp32") < 1e-4
    merged = load(tmp_path / "merged")
    ids = torch.randint(0, merged.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted, found = opened(input_ids=ids).logits, merged(input_ids=ids).logits
    assert float((found - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert tied == (method == "tied")


def load(folder: Path, **how: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | how)).eval()


def open_with_peft(checkpoint: Path, base: Path, weights: str, method: str) -> Any:
    """The checkpoint as a user without this program would open it."""
    import peft
    from transformers import BitsAndBytesConfig

    if method == "full":
        return load(checkpoint)
    how: dict[str, Any] = {}
    if weights == "nf4":
        quantise = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        how = {"quantization_config": quantise, "dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer")
        model = load(base, **how)
        if method == "extended":
            model.resize_token_embeddings(ROWS, mean_resizing=False)
        return peft.PeftModel.from_pretrained(model, str(checkpoint)).eval()


@torch.no_grad()
def held_out_loss(model: Any, values: dict[str, Any]) -> float:
    """Mean loss over the blocks that the trainer evaluated, each document on its own."""
    config = built(values)
    (source,) = open_prepared(config).validation
    loader = ValidationLoader(source, SEQ_LEN, 1, config.evaluate.max_blocks)
    total, targets = 0.0, 0
    for index in range(loader.num_blocks):
        batch = loader.batch([index])
        borders = batch.cu_seqlens.tolist()
        for start, stop in pairwise(borders):
            labels = batch.labels[0, start:stop]
            if bool((labels != -100).any()):
                logits = model(input_ids=batch.input_ids[:, start:stop]).logits[0].float()
                total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
                targets += int((labels != -100).sum())
    return total / targets
