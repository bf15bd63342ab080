"""Features per token of a decoder layer: the widths that its activations, FLOPs and traffic are made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from dist_cpt.plan.shapes import ModelShapes, Weight

_FFN = ("F", "M", "S")  # symbols of the features that a down projection reads


@dataclass(frozen=True)
class LayerWidths:
    """Of one layer; of experts those that a token visits."""

    hidden: int
    query: int
    key: int
    value: int
    output: int
    up: int  # outputs of the MLP's first maps: gate and up, or one
    ffn: int  # inputs of its last map
    norms: int  # over the hidden features; at least two
    head_norms: bool  # on queries and keys
    parameters: float  # of the maps that a token passes
    adapted_maps: int
    adapted_inputs: int  # of activations, each counted once, that adapted maps read
    adapted_outputs: int
    window: int | None


def layer_widths(shapes: ModelShapes, adapted: Iterable[Weight]) -> list[LayerWidths]:
    """The widths of each layer, of which `adapted` carry LoRA."""
    by_layer: dict[int, list[Weight]] = defaultdict(list)
    for weight in shapes.weights:
        if weight.layer is not None:
            by_layer[weight.layer].append(weight)
    carriers: dict[int | None, list[Weight]] = defaultdict(list)
    for weight in adapted:
        carriers[weight.layer].append(weight)
    return [_widths(shapes, by_layer[n], carriers[n], shapes.windows[n]) for n in range(shapes.num_layers)]


def _widths(shapes: ModelShapes, weights: list[Weight], adapted: list[Weight], window: int | None) -> LayerWidths:
    visited = shapes.experts_per_token
    up = ffn = 0
    for weight in weights:
        times = visited if weight.role == "experts" else 1
        if weight.symbol in _FFN:
            ffn += times * weight.inputs
        elif weight.role in ("linear", "experts") and not weight.in_attention and weight.outputs > 1:
            up += times * weight.outputs
    # A fused layer reads the input of several maps once.
    inputs = {weight.reads: weight.inputs for weight in adapted}
    return LayerWidths(
        hidden=shapes.hidden_size,
        query=shapes.query_features,
        key=shapes.key_features,
        value=shapes.value_features,
        output=shapes.output_features,
        up=up,
        ffn=ffn,
        norms=max(2, sum(w.role == "norm" and not w.in_attention for w in weights)),
        head_norms=any(w.role == "norm" and w.name.endswith("q_norm.weight") for w in weights),
        parameters=sum(
            w.elements * shapes.active_share(w) for w in weights if w.role in ("linear", "experts", "router")
        ),
        adapted_maps=len(adapted),
        adapted_inputs=sum(inputs.values()) if shapes.fused else sum(weight.inputs for weight in adapted),
        adapted_outputs=sum(weight.outputs for weight in adapted),
        window=window,
    )
