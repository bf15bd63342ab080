"""Continue a prompt with a checkpoint, an adapter folder or any Hugging Face model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dist_cpt.adapters.lora import ADAPTER_CONFIG
from dist_cpt.errors import CheckpointError, ConfigError
from dist_cpt.model.export import TOKENIZER_FILES, load_fp32, verified_base
from dist_cpt.model.load import locate_base


def generate(
    folder: str | Path,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> str:
    """The prompt and its continuation; temperature 0 is greedy, top_k 0 samples from the whole vocabulary.

    The same folder, prompt and seed give the same text. An empty prompt starts a new document.

    Raises:
        ConfigError: no model or tokenizer there, or numbers out of range.
        CheckpointError: the base is not the one the run had, or weights are pickled.
    """
    if temperature < 0 or top_k < 0 or max_new_tokens < 1:
        raise ConfigError(
            f"temperature {temperature} and top_k {top_k} must be at least 0, "
            f"max_new_tokens {max_new_tokens} at least 1"
        )
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"model folder not found: {folder}", remedy="give a run, a checkpoint or a model folder")
    base = _base_of(folder)
    tokenizer = _tokenizer(folder, base)
    model = load_fp32(folder, base)
    if torch.cuda.is_available():
        model = model.to(device="cuda", dtype=torch.bfloat16)
    input_ids = _prompt_ids(tokenizer, prompt).to(model.device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": 1.0}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def _base_of(folder: Path) -> Path | None:
    """The base of an adapter folder (a checkpoint's is verified, any other's taken at its word), else None."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    if (folder / "manifest.json").is_file():
        return verified_base(folder)
    try:
        values = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        path = values.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}") from None
    if not path:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} names no base model", remedy="merge it, or name the base there"
        )
    return locate_base(path, values.get("revision"))


def _tokenizer(folder: Path, base: Path | None) -> Any:
    from transformers import AutoTokenizer

    for place in (folder, base):
        if place is not None and any((place / name).is_file() for name in TOKENIZER_FILES):
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    raise ConfigError(f"{folder} has no tokenizer", remedy="put the tokenizer's files into the folder")


def _prompt_ids(tokenizer: Any, prompt: str) -> torch.Tensor:
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    if not ids:  # what stands before a document in training is the end of another one
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ConfigError("an empty prompt needs a tokenizer with a bos or eos token", remedy="give a prompt")
        ids = [start]
    return torch.tensor([ids])
