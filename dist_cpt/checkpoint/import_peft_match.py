"""Whether this run trains exactly what a foreign adapter holds, and if not, which recipe key would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dist_cpt.adapters.prior_adapter import MERGE, refusal, require_plain_lora
from dist_cpt.errors import ConfigError
from dist_cpt.model.classify import read_labels
from dist_cpt.model.load import TrainableModel
from dist_cpt.training_state import TensorSpec

_PREFIX = "base_model.model."


class PeftFolder(Protocol):
    """The adapter_config.json of a folder, and the shapes of its tensors by canonical name."""

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def require_match(adapter: PeftFolder, specs: Sequence[TensorSpec], model: TrainableModel) -> None:
    """Refuse an adapter of another kind, rank, scale, targets or shapes than this run trains.

    The base is compared by its shapes: the name in adapter_config.json is that of whatever copy it was trained on.

    Raises:
        ConfigError: names every difference that the recipe can follow, or the first one that it cannot.
    """
    assert model.adapter_config is not None
    require_plain_lora(adapter.folder, adapter.config, model.adapter_config)
    theirs, here = (bool(c.get("fan_in_fan_out")) for c in (adapter.config, model.adapter_config))
    if theirs != here:
        raise refusal(adapter.folder, f"has fan_in_fan_out {theirs}, here {here}", MERGE)
    _require_same_classes(adapter.folder, model)
    shapes = {spec.name: tuple(spec.shape) for spec in specs}
    words = vocabulary_words(model)
    differences = _scale_differences(adapter.config, model.adapter_config)
    differences += _target_differences(adapter, shapes, words)
    differences += _vocabulary_differences(adapter, shapes, words, model.aliases)
    if differences:
        said, settings = zip(*differences, strict=True)
        raise refusal(adapter.folder, f"has {'; '.join(said)}", f"set {', '.join(settings)}")
    for name in sorted((adapter.shapes.keys() - model.aliases.keys()) ^ shapes.keys()):
        said = f"has {name}, which does not train here" if name in adapter.shapes else f"lacks {name}"
        remedy = "name the same modules in adapter.targets, on the same base" if ".lora_" in name else MERGE
        raise refusal(adapter.folder, said, remedy)
    for name, shape in shapes.items():
        if adapter.shapes[name] != shape:
            vocabulary = name in words and adapter.shapes[name][1:] == shape[1:]
            said = f"has {name} of shape {list(adapter.shapes[name])}, here {list(shape)}"
            raise refusal(
                adapter.folder,
                f"has a vocabulary of {adapter.shapes[name][0]}, here {shape[0]}: it {said}" if vocabulary else said,
                f"use the {'base and tokenizer' if vocabulary else 'base'} that the adapter was trained on",
            )
    for alias, name in model.aliases.items():
        if alias not in adapter.shapes:
            raise trained_apart(adapter.folder, name, alias)


def _require_same_classes(folder: Path, model: TrainableModel) -> None:
    """Refuse a head whose outputs mean other classes here; a folder that names none is taken at its word."""
    theirs, here = read_labels(folder), tuple(model.hf_config.id2label.values())
    if theirs is not None and model.class_head is not None and theirs != here:
        said = f"was trained on the classes {list(theirs)}, here {list(here)}"
        raise refusal(folder, said, "name them in that order in classify.labels")


def _scale_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what differs, what to set) for the numbers that scale B A x."""
    found = []
    for key, word in (("r", "rank"), ("lora_alpha", "alpha"), ("use_rslora", "rslora")):
        value = theirs.get(key, False if key == "use_rslora" else None)
        if value != ours[key]:
            found.append((f"{word} {value} (here {ours[key]})", f"adapter.{word}: {str(value).lower()}"))
    return found


def _target_differences(
    adapter: PeftFolder, shapes: Mapping[str, tuple[int, ...]], words: Mapping[str, str]
) -> list[tuple[str, str]]:
    theirs, ours = _lora_modules(adapter.shapes), _lora_modules(shapes)
    for name, word in words.items():
        if name.removesuffix(".weight") in theirs:
            raise refusal(adapter.folder, f"has LoRA on {word}, which trains in full or not at all here", MERGE)
    left, right = ({module.rpartition(".")[2] for module in modules} for modules in (theirs, ours))
    if left == right:
        return []  # other layers than here show as single tensors
    more = [f"not on {', '.join(sorted(right - left))}"] if right - left else []
    more = [f"on {', '.join(sorted(left - right))}", *more] if left - right else more
    return [(f"LoRA {' and '.join(more)} (unlike here)", f"adapter.targets: [{', '.join(sorted(left))}]")]


def _vocabulary_differences(
    adapter: PeftFolder,
    shapes: Mapping[str, tuple[int, ...]],
    words: Mapping[str, str],
    aliases: Mapping[str, str],
) -> list[tuple[str, str]]:
    theirs = {word for name, word in words.items() if name in adapter.shapes}
    ours = {word for name, word in words.items() if name in shapes or aliases.get(name) in shapes}
    if aliases and theirs and ours:
        return []  # a tied pair: whether both are there and equal is looked at next
    if theirs == ours:
        return []
    said = f"trained {' and '.join(sorted(theirs))}" if theirs else "no trained embeddings"
    return [(f"{said} (here {', '.join(sorted(ours)) or 'none'})", f"embeddings.train: [{', '.join(sorted(theirs))}]")]


def _lora_modules(names: Mapping[str, Any]) -> set[str]:
    return {name.rpartition(".lora_A.")[0] for name in names if ".lora_A." in name}


def vocabulary_words(model: TrainableModel) -> dict[str, str]:
    """Canonical name -> the recipe's word, for embedding and head, whatever the model calls them; a classifier has
    no head of text."""
    hf_model = model.module.hf_model
    names = {id(module): name for name, module in hf_model.named_modules()}
    pair = ((hf_model.get_input_embeddings(), "embed_tokens"), (hf_model.get_output_embeddings(), "lm_head"))
    return {f"{_PREFIX}{names[id(module)]}.weight": word for module, word in pair if module is not None}


def trained_apart(folder: Path, name: str, alias: str) -> ConfigError:
    """The refusal of an adapter that unties what the base ties."""
    return refusal(
        folder,
        f"trained {name} and {alias} apart, but this base ties them",
        "merge that adapter into an untied copy of the base and start from there (model.path)",
    )
