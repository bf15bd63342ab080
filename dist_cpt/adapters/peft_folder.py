"""A PEFT adapter folder: its two files, the names of its tensors, and the checkpoint manifest beside them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dist_cpt.errors import CheckpointError, ConfigError, printable
from dist_cpt.run_folder.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHECKPOINTS, MANIFEST, MODEL_CONFIG
from dist_cpt.runtime.liveness import made_progress
from dist_cpt.storage import PatientFile, patiently, read_bytes

BASE_PREFIX = "base_model.model."  # precedes a base module's name in the keys of an adapter file
PRIOR_KEY = "stands_on"  # key of adapter_config.json: the prior adapter without which this one is meaningless
ROPE_KEY = "dist_cpt_rope"  # the scaled rotation of the base, and the base's name
_CHUNK_BYTES = 16 * 2**20
_WRAPPER_PREFIX = "causal_lm."  # the attribute of CausalLMForLoss that holds the model


def canonical_name(parameter_name: str) -> str:
    """The key of a parameter in adapter_model.safetensors, or its Hugging Face name without an adapter.

    `causal_lm.base_model.model.x.lora_A.default.weight` -> `base_model.model.x.lora_A.weight`.
    """
    name = parameter_name.removeprefix(_WRAPPER_PREFIX)
    if not name.startswith(BASE_PREFIX):
        return name
    name = re.sub(r"(\.lora_[A-Za-z_]+)\.default(?=\.|$)", r"\1", name)
    return re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", name)


def canonical_key(key: str) -> str | None:
    """The canonical name of a key of an adapter file, in any PEFT spelling; None for a frozen original."""
    if ".original_module." in key or (".base_layer." in key and ".lora_" not in key):  # experts are wrapped twice
        return None
    key = re.sub(r"\.modules_to_save(\.[^.]+)?\.(weight|bias)$", r".\2", key)
    key = re.sub(r"(\.lora_magnitude_vector)(\.[^.]+)*$", r"\1", key)
    return re.sub(r"(\.lora_[A-Za-z_]+)\.[^.]+\.weight$", r"\1.weight", key)


def whole_matrices(keys: Iterable[str]) -> dict[str, str]:
    """Module of the base -> key of its matrix, for every matrix of an adapter file that was trained in full."""
    whole = whole_tensors(keys).items()
    return {name.removesuffix(".weight"): key for name, key in whole if name.endswith(".weight")}


def whole_tensors(keys: Iterable[str]) -> dict[str, str]:
    """Parameter of the base -> key, for every tensor of an adapter file that was trained in full."""
    names = {key: canonical_key(key) for key in sorted(keys)}
    return {
        name.removeprefix(BASE_PREFIX): key
        for key, name in names.items()
        if name is not None and ".lora_" not in name and name.endswith((".weight", ".bias"))
    }


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an adapter file, by key.

    Raises:
        CheckpointError: not a valid safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    def read() -> dict[str, tuple[int, ...]]:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt", device="cpu") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118

    try:
        return patiently(folder / ADAPTER_WEIGHTS, read)
    except (OSError, SafetensorError) as error:
        line = str(error).partition("\n")[0]
        raise CheckpointError(f"{folder}: {ADAPTER_WEIGHTS} is not a valid safetensors file ({line})") from None


def read_tensor(folder: Path, key: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """A tensor of an adapter file as fp32 on `device`.

    Raises:
        CheckpointError: a value is not finite.
    """
    from safetensors import safe_open

    def read() -> torch.Tensor:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt", device="cpu") as file:
            return file.get_tensor(key).float().to(device)

    values = patiently(folder / ADAPTER_WEIGHTS, read)
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{folder}: {key} has non-finite values")
    return values


@torch.no_grad()
def copy_whole_tensors(folder: Path, model: Any, tensors: Mapping[str, str]) -> None:
    """Copy `whole_tensors` into `model`, in the dtype stored there; a parameter that it lacks is skipped."""
    parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    for name, key in tensors.items():
        if (parameter := parameters.get(name)) is not None:  # a classifier has no language head
            parameter.data.copy_(read_tensor(folder, key, parameter.device))


def file_sha256(path: Path) -> str:
    """The sha256 of a file.

    Raises:
        CheckpointError: it is missing or not a file.
        StorageError: the file system does not answer.
    """
    try:
        digest = hashlib.sha256()
        with PatientFile(path, expected=True) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                made_progress()
        return digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The object in a folder's adapter_config.json.

    Raises:
        CheckpointError: unreadable, or not a JSON object.
    """
    return _json_object(folder / ADAPTER_CONFIG)


def write_adapter_config(folder: str | Path, adapter_config: Mapping[str, Any]) -> None:
    """Write `adapter_config.json`; equal configurations give equal bytes."""
    text = json.dumps(adapter_config, indent=2, sort_keys=True) + "\n"
    (Path(folder) / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def manifest_content(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint's manifest.json records, not verified; None for a folder of another program.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = _json_object(path)
    content = manifest.get("content", manifest)
    if not isinstance(content, dict) or "adapter" not in content or "sha256" not in (content.get("base") or ()):
        raise CheckpointError(f"{path} is damaged", remedy="dist-cpt verify lists every problem")
    return content


def require_adapter_folder(folder: Path) -> None:
    """Refuse a folder without the two files of an adapter.

    Raises:
        ConfigError: says what the folder seems to be.
    """
    if not folder.is_dir():
        raise refusal(folder, "is not a folder", "give a local folder; download an adapter from the hub first")
    if not (folder / ADAPTER_CONFIG).is_file():
        inside = sorted([*folder.glob(f"{CHECKPOINTS}/step-????????"), *folder.glob("checkpoint-*")])
        if inside:
            problem = f"is a run, not one of its {len(inside)} checkpoints"
            raise refusal(folder, problem, f"name one, for example {inside[-1]}")
        if (folder / MODEL_CONFIG).is_file():
            raise refusal(folder, "is a full model, not an adapter", "use it as model.path")
        raise refusal(folder, f"has no {ADAPTER_CONFIG}", "give a folder that PEFT's save_pretrained wrote")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise refusal(
            folder,
            "has only a pickled adapter_model.bin, which is never opened" if pickled else f"has no {ADAPTER_WEIGHTS}",
            "if you trust it, load it with PEFT and save it again with save_pretrained (safetensors)",
        )


def refusal(folder: Path, problem: str, remedy: str) -> ConfigError:
    """The error for an adapter that this run cannot start from; names and values of its files are made printable."""
    return ConfigError(printable(f"adapter.continue_from: {folder} {problem}"), remedy=printable(remedy))


def _json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({str(error).partition(chr(10))[0]})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return values
