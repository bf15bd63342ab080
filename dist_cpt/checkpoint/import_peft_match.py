"""Whether this run trains exactly the tensors of a PEFT adapter, and if not, which recipe keys would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dist_cpt.adapters.peft_folder import BASE_PREFIX, refusal
from dist_cpt.adapters.prior_adapter import MERGE_FIRST, require_plain_lora
from dist_cpt.errors import ConfigError
from dist_cpt.model.classify import read_labels
from dist_cpt.model.load import TrainableModel
from dist_cpt.training_state import TensorSpec


class PeftFolder(Protocol):
    """The adapter_config.json of a folder, and the shapes of its tensors by canonical name."""

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def require_match(adapter: PeftFolder, specs: Sequence[TensorSpec], model: TrainableModel) -> None:
    """Refuse an adapter of another kind, rank, scale, targets or shapes than this run trains.

    The base is compared by shapes: adapter_config.json may name another copy of it.

    Raises:
        ConfigError: names every difference that recipe keys can resolve, or the first one that none can.
    """
    assert model.adapter_config is not None
    require_plain_lora(adapter.folder, adapter.config, model.adapter_config)
    theirs, here = (bool(c.get("fan_in_fan_out")) for c in (adapter.config, model.adapter_config))
    if theirs != here:
        raise refusal(adapter.folder, f"has fan_in_fan_out {theirs}, here {here}", MERGE_FIRST)
    _require_same_classes(adapter.folder, model)
    shapes = {spec.name: tuple(spec.shape) for spec in specs}
    vocabulary = vocabulary_keys(model)
    differences = _scale_differences(adapter.config, model.adapter_config)
    differences += _target_differences(adapter, shapes, vocabulary)
    differences += _vocabulary_differences(adapter, shapes, vocabulary, model.aliases)
    if differences:
        theirs, settings = zip(*differences, strict=True)
        raise refusal(adapter.folder, f"has {'; '.join(theirs)}", f"set {', '.join(settings)}")
    for name in sorted((adapter.shapes.keys() - model.aliases.keys()) ^ shapes.keys()):
        problem = f"has {name}, which does not train here" if name in adapter.shapes else f"lacks {name}"
        remedy = "name the same modules in adapter.targets, on the same base" if ".lora_" in name else MERGE_FIRST
        raise refusal(adapter.folder, problem, remedy)
    for name, shape in shapes.items():
        if adapter.shapes[name] != shape:
            problem, remedy = f"has {name} of shape {list(adapter.shapes[name])}, here {list(shape)}", "base"
            if name in vocabulary and adapter.shapes[name][1:] == shape[1:]:
                problem = f"has a vocabulary of {adapter.shapes[name][0]}, here {shape[0]}: it {problem}"
                remedy = "base and tokenizer"
            raise refusal(adapter.folder, problem, f"use the {remedy} that the adapter was trained on")
    for alias, name in model.aliases.items():
        if alias not in adapter.shapes:
            raise trained_apart(adapter.folder, name, alias)


def _require_same_classes(folder: Path, model: TrainableModel) -> None:
    """Refuse a head whose outputs are other classes here; a folder that records no classes passes."""
    theirs, here = read_labels(folder), tuple(model.hf_config.id2label.values())
    if theirs is not None and model.class_head is not None and theirs != here:
        problem = f"was trained on the classes {list(theirs)}, here {list(here)}"
        raise refusal(folder, problem, "name them in that order in classify.labels")


def _scale_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(difference, recipe key to set) for the numbers that scale B A x."""
    differences = []
    for key, recipe_key in (("r", "rank"), ("lora_alpha", "alpha"), ("use_rslora", "rslora")):
        value = theirs.get(key, False if key == "use_rslora" else None)
        if value != ours[key]:
            differences.append(
                (f"{recipe_key} {value} (here {ours[key]})", f"adapter.{recipe_key}: {str(value).lower()}")
            )
    return differences


def _target_differences(
    adapter: PeftFolder, shapes: Mapping[str, tuple[int, ...]], vocabulary: Mapping[str, str]
) -> list[tuple[str, str]]:
    theirs, ours = _lora_modules(adapter.shapes), _lora_modules(shapes)
    for name, matrix in vocabulary.items():
        if name.removesuffix(".weight") in theirs:
            raise refusal(adapter.folder, f"has LoRA on {matrix}, which trains in full or not at all here", MERGE_FIRST)
    left, right = ({module.rpartition(".")[2] for module in modules} for modules in (theirs, ours))
    if left == right:
        return []  # a difference in layers is reported tensor by tensor
    more = [f"not on {', '.join(sorted(right - left))}"] if right - left else []
    more = [f"on {', '.join(sorted(left - right))}", *more] if left - right else more
    return [(f"LoRA {' and '.join(more)} (unlike here)", f"adapter.targets: [{', '.join(sorted(left))}]")]


def _vocabulary_differences(
    adapter: PeftFolder,
    shapes: Mapping[str, tuple[int, ...]],
    vocabulary: Mapping[str, str],
    aliases: Mapping[str, str],
) -> list[tuple[str, str]]:
    theirs = {matrix for name, matrix in vocabulary.items() if name in adapter.shapes}
    ours = {matrix for name, matrix in vocabulary.items() if name in shapes or aliases.get(name) in shapes}
    if theirs == ours or (aliases and theirs and ours):  # of a tied pair both keys are compared later
        return []
    trained = f"trained {' and '.join(sorted(theirs))}" if theirs else "no trained embeddings"
    difference = f"{trained} (here {', '.join(sorted(ours)) or 'none'})"
    return [(difference, f"embeddings.train: [{', '.join(sorted(theirs))}]")]


def _lora_modules(names: Mapping[str, Any]) -> set[str]:
    return {name.rpartition(".lora_A.")[0] for name in names if ".lora_A." in name}


def vocabulary_keys(model: TrainableModel) -> dict[str, str]:
    """Canonical name -> `embed_tokens` or `lm_head`, as the recipe calls them; a classifier has no `lm_head`."""
    hf_model = model.module.hf_model
    names = {id(module): name for name, module in hf_model.named_modules()}
    pair = ((hf_model.get_input_embeddings(), "embed_tokens"), (hf_model.get_output_embeddings(), "lm_head"))
    return {f"{BASE_PREFIX}{names[id(module)]}.weight": key for module, key in pair if module is not None}


def trained_apart(folder: Path, name: str, alias: str) -> ConfigError:
    """The error for an adapter whose embedding and head differ on a base that ties them."""
    return refusal(
        folder,
        f"trained {name} and {alias} apart, but this base ties them",
        "set embeddings.tie: untie, or leave it out",
    )
