"""What a Hugging Face model folder consists of: weights in one dtype, the tokenizer, the generation settings."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dist_cpt.adapters.language_model import decoder_of, is_multimodal
from dist_cpt.errors import CheckpointError, ConfigError
from dist_cpt.model.base_model import WEIGHTS_DTYPE
from dist_cpt.model.classify import is_classifier

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
DTYPES = WEIGHTS_DTYPE | {"fp16": torch.float16}


def require_dtype(dtype: str) -> None:
    """Refuse an unknown dtype.

    Raises:
        ConfigError: names those that can be written.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")


def round_to(model: Any, dtype: str, base_folder: Path | None = None) -> Any:
    """`model` stored in `dtype`, in place; what a multimodal one has beside its text model, as `base_folder` stores it.

    Raises:
        ConfigError: a weight overflows fp16.
    """
    beside, stored = set[int](), DTYPES[dtype]
    if base_folder is not None and is_multimodal(model.config):
        text = (decoder_of(model), model.get_output_embeddings())
        beside = {id(p) for p in model.parameters()} - {id(p) for part in text for p in part.parameters()}
        stored = _widest_dtype(base_folder)
    for name, parameter in model.named_parameters():  # not model.to(): rotary frequencies stay fp32 when loaded
        if id(parameter) in beside:
            parameter.data = parameter.data.to(stored)
            continue
        parameter.data = parameter.data.to(DTYPES[dtype])
        if dtype == "fp16" and not bool(torch.isfinite(parameter).all()):
            raise ConfigError(f"--dtype fp16: a weight of {name} exceeds 65504", remedy="use bf16")
    return model


def _widest_dtype(folder: Path) -> torch.dtype:
    """The floating-point dtype that represents every value of a model folder."""
    from safetensors import safe_open

    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    widest: torch.dtype | None = None
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt", device="cpu") as file:
            kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        for dtype in (names[kind] for kind in sorted(kinds) if kind in names):
            widest = dtype if widest is None else torch.promote_types(widest, dtype)
    return widest or torch.float32


def write_model(model: Any, out: Path, tokenizer_folders: Sequence[Path]) -> None:
    """Write `model` in shards of 5 GB, with the first tokenizer found; generation also stops at the end of a chat turn,
    which a base's generation_config.json does not know."""
    from transformers import AutoTokenizer

    model.save_pretrained(out, max_shard_size="5GB")
    copy_tokenizer(tokenizer_folders, out)
    generation = getattr(model, "generation_config", None)
    if generation is None or is_classifier(out):
        return
    ends = turn_ends(AutoTokenizer.from_pretrained(out, trust_remote_code=False))
    known = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    if not set(ends) <= set(known):
        extended = copy.deepcopy(generation)
        extended.eos_token_id = [*(end for end in known if end is not None), *(end for end in ends if end not in known)]
        extended.save_pretrained(out)


def turn_ends(tokenizer: Any) -> list[int]:
    """The special token that the chat template puts after an answer, if there is one."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return []
    answer = "forty-two"
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": answer}]
    try:
        _, separator, after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(answer)
    except TemplateError:  # the template needs more than a question and an answer
        return []
    first = tokenizer(after, add_special_tokens=False)["input_ids"][:1] if separator else []
    return [token for token in first if token in tokenizer.added_tokens_decoder]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has any of a tokenizer's files."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def tokenizer_folder(*folders: Path | None) -> Path:
    """The first of the folders that has a tokenizer.

    Raises:
        ConfigError: none has.
    """
    for folder in folders:
        if folder is not None and has_tokenizer(folder):
            return folder
    raise ConfigError(f"{folders[0]} has no tokenizer", remedy="put the tokenizer's files into the folder")


def copy_tokenizer(folders: Sequence[Path], out: Path) -> None:
    """Copy the tokenizer's files of the first of `folders` that has any, and the last one's image processor.

    Raises:
        CheckpointError: none has.
    """
    for name in PROCESSOR_FILES:
        if folders and (folders[-1] / name).is_file():
            shutil.copyfile(folders[-1] / name, out / name)
    for folder in filter(has_tokenizer, folders):
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
        return
    raise CheckpointError(
        f"no tokenizer in {' or '.join(map(str, folders))}",
        remedy="put the tokenizer's files into the checkpoint's base",
    )
