"""Rotary positions rescaled for longer sequences than the base's, and their record beside an adapter.

A transformers config has them as `rope_parameters`, flat or by type of layer; layers with a sliding window keep theirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_cpt.adapters.peft_folder import ROPE_KEY, read_adapter_config
from dist_cpt.config.schema import ModelConfig, RopeScalingConfig
from dist_cpt.errors import ConfigError
from dist_cpt.run_folder.names import ADAPTER_CONFIG

_GLOBAL = "full_attention"
_KEPT = ("rope_theta", "partial_rotary_factor")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # Source: Llama 3.1's config.json


def scale_rope(hf_config: Any, scaling: RopeScalingConfig) -> None:
    """Replace the rotation of a transformers config, in place.

    Raises:
        ConfigError: the model has no rotary positions.
    """
    hf_config = hf_config.get_text_config()
    rope = getattr(hf_config, "rope_parameters", None) or {}
    by_layer = _GLOBAL in rope
    old = rope[_GLOBAL] if by_layer else rope
    if "rope_theta" not in old:
        raise ConfigError(
            f"model.rope_scaling: model type {hf_config.model_type} has no rotary positions to rescale",
            remedy="leave it out, or use a model with rotary positions",
        )
    new = {key: old[key] for key in _KEPT if key in old} | scaling.model_dump(exclude_none=True)
    if scaling.rope_type in ("yarn", "llama3"):
        original = new.setdefault(
            "original_max_position_embeddings",
            old.get("original_max_position_embeddings") or hf_config.max_position_embeddings,
        )
        hf_config.max_position_embeddings = int(original * scaling.factor)
    if scaling.rope_type == "llama3":
        new = _LLAMA3 | new
    hf_config.rope_parameters = rope | {_GLOBAL: new} if by_layer else new


def require_length(hf_config: Any, scaling: RopeScalingConfig, seq_len: int) -> None:
    """Refuse sequences beyond the scaled positions of `hf_config`.

    Raises:
        ConfigError: both lengths.
    """
    if scaling.rope_type == "dynamic":  # grows with the sequence
        return
    longest = hf_config.max_position_embeddings
    if scaling.rope_type == "linear":  # readers of config.json multiply it themselves
        longest = int(longest * scaling.factor)
    if seq_len > longest:
        raise ConfigError(
            f"data.seq_len {seq_len} exceeds the {longest} positions of model.rope_scaling with factor "
            f"{scaling.factor:g}",
            remedy="use a larger factor, or shorter sequences",
        )


def rope_record(adapter_config: dict[str, Any], settings: ModelConfig) -> dict[str, Any]:
    """Keys of adapter_config.json: the rotation, and a base name that no loader takes for the base as it is."""
    assert settings.rope_scaling is not None
    scaling = settings.rope_scaling.model_dump(exclude_none=True)
    phrase = f"with rope_scaling {scaling['rope_type']} x {scaling['factor']:g}"
    return {
        "base_model_name_or_path": f"{adapter_config['base_model_name_or_path']} {phrase}",
        ROPE_KEY: {"base": settings.path, "scaling": scaling},
    }


def rope_of(adapter: Path) -> RopeScalingConfig | None:
    """The rotation that an adapter was trained with; None for the base's own, and for a whole model."""
    if not (adapter / ADAPTER_CONFIG).is_file():
        return None
    record = read_adapter_config(adapter).get(ROPE_KEY)
    return None if record is None else RopeScalingConfig.model_validate(record["scaling"])


def require_plain_rope(adapter: Path) -> None:
    """Refuse a prior adapter that was trained with another rotation than the base's.

    Raises:
        ConfigError: names it.
    """
    if (scaling := rope_of(adapter)) is not None:
        raise ConfigError(
            f"adapter.continue_from: {adapter} was trained with model.rope_scaling "
            f"{{rope_type: {scaling.rope_type}, factor: {scaling.factor:g}}}, the recipe has none",
            remedy="set model.rope_scaling, the same or a larger factor",
        )


def scaled_config(folder: Path, scaling: RopeScalingConfig | None) -> Any:
    """The transformers config of a model folder with `scaling`; None, which means the folder's own, without."""
    if scaling is None:
        return None
    from transformers import AutoConfig

    hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    scale_rope(hf_config, scaling)
    return hf_config
