"""Tiny things that tests train on, made on the spot: a corpus, a tokenizer, base models, recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

VOCAB_SIZE = 512
SEQ_LEN = 64


def write_corpus(folder: Path, num_documents: int = 60) -> Path:
    """Python's documentation topics in pieces, as jsonl; returns the file. A held-out file lies beside it."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    pieces = [text[i * 700 : (i + 1) * 700 - 130 * (i % 4)] for i in range(num_documents + 8)]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": piece}) + "\n" for piece in pieces]
    (folder / "held-out.jsonl").write_text("".join(lines[num_documents:]), encoding="utf-8")
    path = folder / "corpus.jsonl"
    path.write_text("".join(lines[:num_documents]), encoding="utf-8")
    return path


def write_tokenizer(folder: Path, corpus: Path, vocab_size: int = VOCAB_SIZE) -> Path:
    """A byte-level BPE with <eos> and <pad>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([json.loads(line)["text"] for line in corpus.read_text().splitlines()], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def llama(**changes: Any) -> dict[str, Any]:
    """A Llama configuration of about 100 thousand parameters."""
    return {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    } | changes


def write_base(folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """A random base model with its tokenizer, as a Hugging Face folder in fp32."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = llama(**changes)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


def recipe(base: Path, corpus: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """LoRA and both matrices on `base`, 12 steps of 8 blocks of 64 tokens; `changes` replace whole sections.

    In fp32: many CPUs have no bf16 instructions, and emulate them at a fraction of the speed.
    """
    return {
        "name": "tiny",
        "output_dir": str(output_dir),
        "model": {"path": str(base), "weights": "fp32"},
        "adapter": {"rank": 4, "alpha": 4},
        "embeddings": {"train": ["embed_tokens", "lm_head"]},
        "data": {
            "seq_len": SEQ_LEN,
            "sources": [{"path": str(corpus)}],
            "validation": [{"name": "held-out", "path": str(corpus.parent / "held-out.jsonl")}],
        },
        "batch": {"global_tokens": 8 * SEQ_LEN, "micro_batch": 2},
        "train": {"tokens": 12 * 8 * SEQ_LEN},
        "optim": {"lr": 1.0e-2, "embedding_lr": 1.0e-3},
        "engine": "single",
        "checkpoint": {"every_steps": 4},
        "track": {"wandb": {"mode": "disabled"}},
    } | changes


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    """`values` as a recipe file."""
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path
