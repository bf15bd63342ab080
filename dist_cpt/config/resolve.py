"""What follows from a recipe: explicit paths and defaults, the fingerprint, and the shape of a step."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_cpt.config.adapter_settings import settings_of_adapter
from dist_cpt.config.exclusions import num_steps, shown
from dist_cpt.config.load import build
from dist_cpt.config.resume_changes import how_may_change, is_below
from dist_cpt.config.schema import HUB_PREFIX, RunConfig
from dist_cpt.errors import ConfigError

_SHOWN_DIFFERENCES = 5  # in one message


@dataclass(frozen=True)
class Share:
    """What one rank reads of a forward of all ranks: the blocks of its group, and of each its part of the tokens."""

    group: int = 0
    num_groups: int = 1
    part: int = 0
    num_parts: int = 1


@dataclass(frozen=True)
class StepShape:
    """How the blocks (sequences) of an optimizer step are divided over `world_size` ranks."""

    blocks_per_step: int
    micro_batch: int
    accumulation: int
    num_steps: int  # 0 while the data has yet to say what train.epochs are
    world_size: int
    context_parallel: int = 1  # neighbouring ranks, a group, that read the same blocks

    def share(self, rank: int) -> Share:
        """What `rank` reads of each forward."""
        parts = self.context_parallel
        return Share(rank // parts, self.world_size // parts, rank % parts, parts)


def resolve_paths(config: RunConfig) -> RunConfig:
    """Make local paths absolute and derived defaults explicit, so that a resume works from any directory.

    Raises:
        ConfigError: two training sources have the same name, or the adapter that the run continues has settings that
            the recipe's exclude.
    """
    values = config.model_dump(mode="json")
    values["output_dir"] = _absolute(config.output_dir)
    values["data"]["cache_dir"] = _absolute(config.data.cache_dir or str(Path(config.output_dir) / "data"))
    for text in (*values["data"]["sources"], *values["data"]["validation"]):
        text["name"] = text["name"] or source_name(text["path"] or text["store"])
        for key in ("path", "store"):
            text[key] = text[key] if (text[key] or "").startswith(HUB_PREFIX) else text[key] and _absolute(text[key])
    if config.evaluate.tasks is not None and config.evaluate.tasks.path is not None:
        values["evaluate"]["tasks"]["path"] = _absolute(config.evaluate.tasks.path)
    if config.adapter.continue_from is not None:
        values["adapter"]["continue_from"]["path"] = _absolute(config.adapter.continue_from.path)
    for section, followed in settings_of_adapter(config).items():
        values[section] |= followed
    values["model"]["path"] = _folder_or_hub_id(config.model.path)
    new_tokens = config.embeddings.new_tokens
    values["embeddings"]["new_tokens"] = _folder_or_hub_id(new_tokens)
    values["data"]["tokenizer"] = _folder_or_hub_id(new_tokens or config.data.tokenizer or config.model.path)
    if values["optim"]["embedding_lr"] is None:
        values["optim"]["embedding_lr"] = config.optim.lr / (1 if config.embeddings.kind == "lora" else 10)
    if config.model.router == "train" and config.adapter.kind == "lora":
        values["optim"]["router_lr"] = config.optim.router_lr or config.optim.lr / 10
    if config.task == "classify":
        values["optim"]["head_lr"] = config.optim.head_lr or config.optim.lr
    template = config.data.chat_template
    if template is not None and not is_template_text(template):
        values["data"]["chat_template"] = _absolute(template)
    names = [source["name"] for source in values["data"]["sources"]]
    if len(set(names)) != len(names):
        raise ConfigError(f"data.sources: names must differ, got {names}", remedy="give each source a name")
    _check_stages(config, names)
    return build(values, where="the recipe, with what adapter.continue_from sets")


def _check_stages(config: RunConfig, names: Sequence[str]) -> None:
    """Refuse stages that name a source that does not exist, or leave one out everywhere."""
    staged = [(number, name) for number, stage in enumerate(config.data.stages) for name in stage.weights]
    for number, name in staged:
        if name not in names:
            raise ConfigError(
                f"data.stages.{number}.weights: there is no source {name!r}; sources are {', '.join(names)}",
                remedy="use a source's name, which is the stem of its path unless it is given",
            )
    unread = [name for name in names if staged and name not in {name for _, name in staged}]
    if unread:
        raise ConfigError(
            f"data.stages: no stage reads {', '.join(unread)}", remedy="give it a weight in a stage, or leave it out"
        )


def is_template_text(template: str) -> bool:
    """Whether `data.chat_template` is a jinja template rather than the path of one."""
    return "{%" in template or "{{" in template


def step_shape(config: RunConfig, world_size: int) -> StepShape:
    """The shape of a step on `world_size` ranks.

    Raises:
        ConfigError: the blocks of a step are not a multiple of those of a forward, or the ranks of a group's.
    """
    parts = config.engine.context_parallel
    if world_size % parts:
        raise ConfigError(
            f"engine.context_parallel {parts} does not divide {world_size} ranks",
            remedy="use a divisor of the number of ranks",
        )
    blocks = config.batch.global_tokens // config.data.seq_len
    per_forward = world_size // parts * config.batch.micro_batch
    if blocks % per_forward:
        raise ConfigError(
            f"batch.global_tokens {config.batch.global_tokens} is {blocks} sequences of {config.data.seq_len}, "
            f"which does not divide by {world_size} ranks{f' / context_parallel {parts}' if parts > 1 else ''} "
            f"x micro_batch {config.batch.micro_batch}",
            remedy=f"use a multiple of {per_forward * config.data.seq_len} tokens, or another micro_batch",
        )
    return StepShape(blocks, config.batch.micro_batch, blocks // per_forward, num_steps(config), world_size, parts)


def with_tokens(config: RunConfig, tokens: int) -> RunConfig:
    """The recipe with `train.epochs` as the number of tokens that they are on this run's data.

    Raises:
        ConfigError: settings that exclude each other for a run of this length.
    """
    values = config.model_dump(mode="json")
    values["train"] |= {"tokens": tokens, "epochs": None}
    return build(values, where=f"train.epochs: {config.train.epochs:g}, which are {tokens:,} tokens of this data")


def settings(config: RunConfig, *, defaults: bool = True) -> dict[str, Any]:
    """Every setting by dotted key; of a place whose content is compared only whether there is one."""
    flat = _flatten(config.model_dump(mode="json", exclude_defaults=not defaults))
    places = (key for key, value in flat.items() if value is not None and how_may_change(key) == "same content")
    return flat | dict.fromkeys(places, "(given)")


def fingerprint(config: RunConfig) -> str:
    """sha256 of the settings that decide what is learned: not of places, engine and tracking.

    Defaults are left out: a key that a later version adds changes no recorded fingerprint.
    """
    return hashlib.sha256(json.dumps(_meaning(config, defaults=False), sort_keys=True).encode()).hexdigest()


def differences(old: RunConfig, new: RunConfig) -> dict[str, str]:
    """`old -> new` by dotted key, for each setting of the fingerprint in which two recipes differ."""
    left, right = _meaning(old), _meaning(new)
    return {
        key: f"{shown(left.get(key))} -> {shown(right.get(key))}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    }


def require_same_recipe(
    recorded: RunConfig, config: RunConfig, where: str, agreed: Collection[tuple[str, str]] = ()
) -> dict[str, str]:
    """The changes against the recorded recipe, as `differences` gives them: those that `accept_changes` names, and
    those that a branch or an extension of the run has `agreed` to.

    Raises:
        ConfigError: other changes; `where` is what has the recorded recipe.
    """
    changed = differences(recorded, config)
    accepted = {key for key in changed if any(is_below(key, name) for name in config.accept_changes)}
    accepted = {key for key in accepted if how_may_change(key) == "accepted"}
    refused = {key: text for key, text in changed.items() if key not in accepted and (key, text) not in agreed}
    if refused:
        listed = "; ".join(f"{key}: {text}" for key, text in list(refused.items())[:_SHOWN_DIFFERENCES])
        more = f" and {len(refused) - _SHOWN_DIFFERENCES} more" if len(refused) > _SHOWN_DIFFERENCES else ""
        remedy = "give this run another name, or undo the change"
        if all(how_may_change(key) == "accepted" for key in refused):
            keys = dict.fromkeys(re.sub(r"\.\d+(\.|$).*", "", key) for key in changed)
            remedy += f", or resume with --accept-changes {','.join(keys)}"
        elif all(how_may_change(key) in ("accepted", "branched") for key in refused):
            remedy += ", or make a branch (dist-cpt branch)"
        raise ConfigError(f"{where} has a run of another recipe ({listed}{more})", remedy=remedy)
    return changed


def run_folder(config: RunConfig) -> Path:
    """`<output_dir>/<name>`."""
    return Path(config.output_dir) / config.name


def settings_of_place(config: RunConfig, folder: Path, overrides: Sequence[str] = ()) -> list[str]:
    """What follows from a moved run folder and from moved parts, given as `overrides`, of its own recorded recipe."""
    folder, recorded = folder.absolute(), run_folder(config)
    places: dict[str, str | None] = {}
    if not (recorded.is_dir() and recorded.samefile(folder)):
        places |= {"output_dir": str(folder.parent), "name": folder.name}
        cache = Path(config.data.cache_dir or "")
        if cache.is_relative_to(config.output_dir):
            places["data.cache_dir"] = str(folder.parent / cache.relative_to(config.output_dir))
    moved = any(item.startswith(("model.path=", "embeddings.new_tokens=")) for item in overrides)
    if moved and config.data.tokenizer == (config.embeddings.new_tokens or config.model.path):
        places["data.tokenizer"] = None  # its default again
    return [f"{key}={json.dumps(value)}" for key, value in places.items()]


def to_yaml(config: RunConfig) -> str:
    """The recipe as YAML, with its fingerprint as a comment; it loads back to the same RunConfig."""
    body = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return f"# resolved by dist-cpt; fingerprint {fingerprint(config)}\n{body}"


def _meaning(config: RunConfig, *, defaults: bool = True) -> dict[str, Any]:
    flat = settings(config, defaults=defaults)
    return {key: value for key, value in flat.items() if how_may_change(key) != "freely"}


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


def source_name(path: str) -> str:
    """The name of a source that has none: the stem of its path, or of a store's folder."""
    stem = re.sub(r"-[0-9a-f]{12}$", "", Path(path).name).split(".")[0].strip("*?[]")  # of a store: without its key
    return stem or Path(path).parent.name or "source"
