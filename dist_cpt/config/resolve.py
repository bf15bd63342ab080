"""What follows from a recipe: explicit paths and defaults, the fingerprint, and the shape of a step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError

# what may change between two attempts of a run
_PLACEMENT = ("engine", "track", "checkpoint", "output_dir", "evaluate")


@dataclass(frozen=True)
class StepShape:
    """How the blocks (sequences) of an optimizer step are divided over `world_size` ranks."""

    blocks_per_step: int
    micro_batch: int
    accumulation: int
    num_steps: int
    world_size: int


def resolve_paths(config: RunConfig) -> RunConfig:
    """Make local paths absolute and derived defaults explicit, so that a resume works from any directory.

    Raises:
        ConfigError: two training sources have the same name.
    """
    values = config.model_dump(mode="json")
    values["output_dir"] = _absolute(config.output_dir)
    values["data"]["cache_dir"] = _absolute(config.data.cache_dir or str(Path(config.output_dir) / "data"))
    for source in values["data"]["sources"]:
        source["path"] = _absolute(source["path"])
        source["name"] = source["name"] or _source_name(source["path"])
    for held_out in values["data"]["validation"]:
        held_out["path"] = _absolute(held_out["path"])
    if config.adapter.continue_from is not None:
        values["adapter"]["continue_from"]["path"] = _absolute(config.adapter.continue_from.path)
    values["model"]["path"] = _folder_or_hub_id(config.model.path)
    new_tokens = config.embeddings.new_tokens
    values["embeddings"]["new_tokens"] = _folder_or_hub_id(new_tokens)
    values["data"]["tokenizer"] = _folder_or_hub_id(new_tokens or config.data.tokenizer or config.model.path)
    if values["optim"]["embedding_lr"] is None:
        values["optim"]["embedding_lr"] = config.optim.lr / (1 if config.embeddings.kind == "lora" else 10)
    if config.task == "classify":
        values["optim"]["head_lr"] = config.optim.head_lr or config.optim.lr
    template = config.data.chat_template
    if template is not None and not is_template_text(template):
        values["data"]["chat_template"] = _absolute(template)
    names = [source["name"] for source in values["data"]["sources"]]
    if len(set(names)) != len(names):
        raise ConfigError(f"data.sources: names must differ, got {names}", remedy="give each source a name")
    return RunConfig.model_validate(values)


def is_template_text(template: str) -> bool:
    """Whether `data.chat_template` is a jinja template rather than the path of one."""
    return "{%" in template or "{{" in template


def step_shape(config: RunConfig, world_size: int) -> StepShape:
    """The shape of a step on `world_size` ranks.

    Raises:
        ConfigError: the blocks of a step are not a multiple of world_size x micro_batch.
    """
    blocks = config.batch.global_tokens // config.data.seq_len
    per_forward = world_size * config.batch.micro_batch
    if blocks % per_forward:
        raise ConfigError(
            f"batch.global_tokens {config.batch.global_tokens} is {blocks} sequences of {config.data.seq_len}, "
            f"which does not divide by {world_size} ranks x micro_batch {config.batch.micro_batch}",
            remedy=f"use a multiple of {per_forward * config.data.seq_len} tokens, or another micro_batch",
        )
    num_steps = -(-config.train.tokens // config.batch.global_tokens)
    return StepShape(blocks, config.batch.micro_batch, blocks // per_forward, num_steps, world_size)


def fingerprint(config: RunConfig) -> str:
    """sha256 of the settings that decide what is learned: not of engine, placement and tracking."""
    return hashlib.sha256(json.dumps(_identity(config), sort_keys=True).encode()).hexdigest()


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """`key: old -> new` for each setting of the fingerprint in which two recipes differ."""
    left, right = _flatten(_identity(old)), _flatten(_identity(new))
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def run_folder(config: RunConfig) -> Path:
    """`<output_dir>/<name>`."""
    return Path(config.output_dir) / config.name


def to_yaml(config: RunConfig) -> str:
    """The recipe as YAML, with its fingerprint as a comment; it loads back to the same RunConfig."""
    body = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return f"# resolved by dist-cpt; fingerprint {fingerprint(config)}\n{body}"


def _identity(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    for key in _PLACEMENT:
        values.pop(key)
    values["batch"].pop("micro_batch")
    values["data"].pop("cache_dir")
    values["model"].pop("kernels")
    values["model"].pop("attention")
    values["health"].pop("hang")
    values["health"].pop("straggler")
    return values


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = [(f"{prefix}.{k}" if prefix else str(k), v) for k, v in value.items()]
    elif isinstance(value, list):
        items = [(f"{prefix}.{i}", v) for i, v in enumerate(value)]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, child in items:
        flat |= _flatten(child, key)
    return flat


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _folder_or_hub_id(path: str | None) -> str | None:
    if path is None:
        return None
    looks_local = path.startswith((".", "/", "~")) or Path(path).expanduser().exists()
    return _absolute(path) if looks_local else path


def _source_name(path: str) -> str:
    stem = Path(path).name.split(".")[0].strip("*?[]")
    return stem or Path(path).parent.name or "source"
