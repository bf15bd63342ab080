"""What of a model would be trained, fused, quantised and sharded, and what is refused, from its config.json alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dist_cpt.errors import printable
from dist_cpt.plan.families import ATTENTION_LAYERS, RECURRENT_LAYERS, Role
from dist_cpt.plan.shapes import ModelShapes, Weight, shapes_of, text_config, unpackable_layers

# config keys whose effect is not implemented, and what they do; null is neutral
NEUTRAL = {
    "logits_soft_cap": "is not implemented by the loss",
    "altup_coef_clip": "clamps frozen weights, and reads them past an adapter",  # Gemma 3n
}
_LEFT_OUT: tuple[Role, ...] = ("router", "recurrence")


@dataclass(frozen=True)
class Part:
    """Weights of all layers with the same name within their layer."""

    name: str
    layers: int
    parameters: int


@dataclass(frozen=True)
class ModelCheck:
    """The answer for one model."""

    shapes: ModelShapes
    active_parameters: int  # that a token passes
    trained: tuple[Part, ...]  # by LoRA on all-linear
    not_trained: tuple[Part, ...]  # matrices of the layers that LoRA leaves out: routers, recurrences
    refused: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        shapes = self.shapes
        return {
            "model_type": shapes.model_type,
            "parameters": shapes.num_parameters,
            "active_parameters": self.active_parameters,
            "layers": shapes.num_layers,
            "tied": shapes.tied,
            "fused": shapes.fused,
            "trained": [vars(part) for part in self.trained],
            "not_trained": [vars(part) for part in self.not_trained],
            "refused": list(self.refused),
        }


def check_model(config: Mapping[str, Any]) -> ModelCheck:
    """What a run on the model of this config.json would do.

    Raises:
        ConfigError: a model type that is not in the table, or sizes that make no model.
    """
    shapes = shapes_of(config)
    active = sum(weight.elements * shapes.active_share(weight) for weight in shapes.weights)
    return ModelCheck(
        shapes=shapes,
        active_parameters=round(active),
        trained=tuple(_parts(shapes.adaptable("linear", "experts"))),
        not_trained=tuple(_parts(w for w in shapes.of("linear", *_LEFT_OUT) if w.role in _LEFT_OUT or not w.adaptable)),
        refused=tuple(refusals(config)),
    )


def refusals(config: Mapping[str, Any]) -> Iterator[str]:
    """What the loss or packing would compute incorrectly, one line each."""
    config = text_config(config)
    for key, why in NEUTRAL.items():
        if (value := config.get(key)) is not None:
            yield printable(f"{key} = {value!r} {why}")
    listed = config.get("layer_types") or config.get("layers_block_type")
    if others := unpackable_layers(str(config.get("model_type")), map(str, listed or ())):
        yield printable(f"layers of type {', '.join(others)} cannot separate packed documents")


def as_text(check: ModelCheck) -> Iterator[str]:
    """One line per question."""
    shapes = check.shapes
    active = f", {count(check.active_parameters)} active per token" if shapes.num_experts > 1 else ""
    yield f"{shapes.model_type}: {count(shapes.num_parameters)} parameters{active}, {shapes.num_layers} layers"
    yield f"LoRA on all-linear trains: {_listed(check.trained)}"
    if check.not_trained:
        router = ", or model.router: train" if any(shapes.of("router")) else ""
        yield f"LoRA leaves out: {_listed(check.not_trained)}; adapter.kind: none trains them{router}"
    pair = "one tied matrix" if shapes.tied else "two matrices"
    rows = f"{shapes.vocab_size:,} x {shapes.hidden_size:,}, {count(shapes.head_elements)} each"
    yield f"embeddings.train: {pair} of {rows}"
    yield f"nf4, int8 and fp8 store the linear maps: {_listed(_parts(shapes.of('linear', 'experts')))}"
    yield "fused on a GPU: " + ("layers, embeddings and loss" if shapes.fused else "embeddings and loss; no layers")
    attending = sum(kind in (*ATTENTION_LAYERS, "hybrid") for kind in shapes.layer_types)
    windows = sorted({window for window in shapes.windows if window is not None})
    sliding = sum(window is not None for window in shapes.windows)
    layers = "all" if attending == shapes.num_layers else f"{attending} of {shapes.num_layers}"
    back = f"{sliding} of {shapes.num_layers} layers look back {windows[-1]:,} tokens" if windows else ""
    seen = back or f"{layers} layers see all"
    yield f"attention: {seen}"
    yield from _recurrence(shapes)
    yield f"sharded by: {shapes.num_layers} decoder layers of {count(_largest_layer(shapes))} parameters"
    yield from (f"refused: {line}" for line in check.refused)


def _recurrence(shapes: ModelShapes) -> Iterator[str]:
    layers = [kind for kind in shapes.layer_types if kind in RECURRENT_LAYERS]
    if layers:
        state = f", each with a state of {count(shapes.state_elements)} numbers" if shapes.state_elements else ""
        kinds = ", ".join(dict.fromkeys(layers))
        yield f"recurrence: {len(layers)} of {shapes.num_layers} layers ({kinds}){state}, anew in each packed document"


def _parts(weights: Iterable[Weight]) -> Iterator[Part]:
    """By name within the layer, in the model's order."""
    found: dict[str, list[Weight]] = defaultdict(list)
    for weight in weights:
        found[weight.name.partition(f".{weight.layer}.")[2].removesuffix(".weight")].append(weight)
    for name, members in found.items():
        yield Part(name, len(members), sum(weight.elements for weight in members))


def _largest_layer(shapes: ModelShapes) -> int:
    layers: dict[int | None, int] = defaultdict(int)
    for weight in shapes.weights:
        layers[weight.layer] += weight.elements
    return max(size for layer, size in layers.items() if layer is not None)


def _listed(parts: Iterable[Part]) -> str:
    parts = tuple(parts)
    return f"{', '.join(part.name for part in parts)} ({count(sum(part.parameters for part in parts))})"


def count(number: int) -> str:
    """Three digits and a unit."""
    for size, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
