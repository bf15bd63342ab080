"""What the PEFT folder that a recipe continues says of its adapter, for the keys that the recipe leaves out."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from dist_cpt.config.schema import RunConfig
from dist_cpt.run_folder.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dist_cpt.storage import open_regular, patiently, read_bytes

VOCABULARY_NAMES = {  # what models call their embedding and head -> the recipe's word
    **dict.fromkeys(("embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings"), "embed_tokens"),
    **dict.fromkeys(("lm_head", "embed_out"), "lm_head"),
}
_CHUNK_BYTES = 1 << 20
_MAX_HEADER_BYTES = 100_000_000  # Source: safetensors, MAX_HEADER_SIZE
_Tensors = dict[str, dict[str, Any]]  # a safetensors header: dtype, shape, data_offsets by key


def settings_of_adapter(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Values by section for the keys that follow the folder of `adapter.continue_from` and are not set.

    Empty for what is no LoRA folder of PEFT: who opens it says what is wrong with it.

    Raises:
        StorageError: the file system does not answer.
    """
    prior = config.adapter.continue_from
    if prior is None:
        return {}
    folder = Path(prior.path).expanduser()
    try:
        theirs = json.loads(read_bytes(folder / ADAPTER_CONFIG))
        weights = folder / ADAPTER_WEIGHTS
        tensors, start = patiently(weights, lambda: _read_header(weights))
        adapter = {
            "rank": theirs["r"],
            "alpha": theirs["lora_alpha"],
            "rslora": bool(theirs.get("use_rslora")),
            "targets": _targets(theirs, tensors),
        }
        if prior.mode == "train":  # fold and stack put a new adapter on plain LoRA only
            adapter["dora"] = bool(theirs.get("use_dora"))
        whole = _whole_matrices(tensors)
        tied = bool(theirs.get("ensure_weight_tying")) or not _is_apart(weights, tensors, start, whole)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    embeddings: dict[str, Any] = {} if prior.freeze_embeddings else {"train": sorted(whole)}
    if config.task == "classify":  # which has no head of the vocabulary
        embeddings["train"] = [name for name in embeddings.get("train", []) if name != "lm_head"]
    elif not tied:
        embeddings["tie"] = "untie"
    sections: dict[str, tuple[dict[str, Any], Any]] = {
        "adapter": (adapter, config.adapter),
        "embeddings": (embeddings, config.embeddings),
    }
    if prior.mode == "train" and any(re.search(r"\.(gate|router)\.weight$", key) for key in tensors):
        sections["model"] = ({"router": "train"}, config.model)
    return {
        name: {key: value for key, value in values.items() if key not in given.model_fields_set}
        for name, (values, given) in sections.items()
    }


def _read_header(path: Path) -> tuple[_Tensors, int]:
    """(the tensors of a safetensors file by key, where their data begins)."""
    with os.fdopen(open_regular(path), "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(os.fstat(file.fileno()).st_size, _MAX_HEADER_BYTES):
            raise ValueError("not a safetensors file")
        tensors = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    return tensors, 8 + length


def _targets(theirs: dict[str, Any], tensors: _Tensors) -> list[str]:
    """Names as PEFT lists them; the full names of the modules where it chose them by a pattern or by their layer."""
    named = theirs["target_modules"]
    chosen = any(theirs.get(key) for key in ("layers_to_transform", "exclude_modules"))
    if isinstance(named, list) and not chosen:
        return sorted(named)
    keys = (re.fullmatch(r"base_model\.model\.(.+)\.lora_A(\.[^.]+)?\.weight", key) for key in tensors)
    return sorted(match[1] for match in keys if match)


def _whole_matrices(tensors: _Tensors) -> dict[str, str]:
    """The recipe's name of each vocabulary matrix that was trained in full -> its key."""
    whole = {}
    for key in tensors:
        module = re.sub(r"(\.modules_to_save(\.[^.]+)?)?\.weight$", "", key).rpartition(".")[2]
        if module in VOCABULARY_NAMES and ".lora_" not in key:
            whole[VOCABULARY_NAMES[module]] = key
    return whole


def _is_apart(path: Path, tensors: _Tensors, start: int, whole: dict[str, str]) -> bool:
    """Whether one of embedding and head was trained without the other, or to other values."""
    if len(whole) < 2:
        return bool(whole)
    left, right = (tensors[key] for key in whole.values())
    if (left["dtype"], left["shape"]) != (right["dtype"], right["shape"]):
        return True
    (begin, end), (other, _) = left["data_offsets"], right["data_offsets"]

    def differ() -> bool:
        with os.fdopen(open_regular(path), "rb") as file:
            chunks = ((at, min(_CHUNK_BYTES, end - at)) for at in range(begin, end, _CHUNK_BYTES))
            return any(
                os.pread(file.fileno(), size, start + at) != os.pread(file.fileno(), size, start + at - begin + other)
                for at, size in chunks
            )

    return patiently(path, differ)
