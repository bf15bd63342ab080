"""Features per token of a decoder layer: the widths that its activations, FLOPs and traffic are made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from dist_cpt.plan.families import ATTENTION_LAYERS, RECURRENT_LAYERS
from dist_cpt.plan.shapes import ATTENTION_MODULES, ModelShapes, Weight

_PRODUCTS = ("linear", "experts", "router")
_FFN = ("F", "M", "S")  # symbols of the features that a down projection reads


@dataclass(frozen=True)
class Maps:
    """Some maps of a layer: their parameters, and the features that those of them with LoRA read and write."""

    parameters: float
    adapted_inputs: int
    adapted_outputs: int


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
    recurrent: int  # features that a recurrence reads, after its convolution as before
    state: int  # elements of the state that it carries from token to token
    norms: int  # over the hidden features; at least two
    head_norms: bool  # on queries and keys
    parameters: float  # of the maps that a token passes
    adapted_maps: int
    adapted_inputs: int  # of activations, each counted once, that adapted maps read
    adapted_map_inputs: int  # counted for each map
    adapted_outputs: int
    first: Maps  # of the MLP: gate and up
    last: Maps  # of the MLP: down, where it is one map that every token passes
    window: int | None

    @property
    def moved_forward(self) -> int:
        """Elements that forward moves outside of products: norms, the second with its residual sum, the last sum; RoPE;
        the gated product."""
        norms = (9 + 2 * (self.norms - 2)) * self.hidden
        rotated = self.query + self.key
        recurrence = 4 * self.recurrent  # its convolution and its scan, each in and out
        return norms + 2 * rotated + (2 * rotated if self.head_norms else 0) + self.up + self.ffn + recurrence


def layer_widths(shapes: ModelShapes, adapted: Iterable[Weight]) -> list[LayerWidths]:
    """The widths of each layer, of which `adapted` carry LoRA."""
    by_layer: dict[int, list[Weight]] = defaultdict(list)
    for weight in shapes.weights:
        if weight.layer is not None:
            by_layer[weight.layer].append(weight)
    carriers: dict[int | None, list[Weight]] = defaultdict(list)
    for weight in adapted:
        carriers[weight.layer].append(weight)
    return [_widths(shapes, by_layer[n], carriers[n], n) for n in range(shapes.num_layers)]


def _widths(shapes: ModelShapes, weights: list[Weight], adapted: list[Weight], layer: int) -> LayerWidths:
    kind = shapes.layer_types[layer]
    attends, recurs = kind in (*ATTENTION_LAYERS, "hybrid"), kind in RECURRENT_LAYERS
    scanned = [w for w in weights if w.in_mixer and w.role == "linear" and w.module not in ATTENTION_MODULES]
    visited = shapes.experts_per_token
    up = ffn = 0
    first: list[Weight] = []
    last: list[Weight] = []
    for weight in weights:
        times = visited if weight.role == "experts" else 1
        if weight.symbol in _FFN:
            ffn += times * weight.inputs
            last += [weight] if weight.role == "linear" else []
        elif weight.role in ("linear", "experts") and not weight.in_mixer and weight.outputs > 1:
            up += times * weight.outputs
            first.append(weight)
    # A fused layer reads the input of several maps once.
    carried = [(weight, visited if weight.role == "experts" else 1) for weight in adapted]
    inputs = {weight.reads: times * weight.inputs for weight, times in carried}
    read = inputs.values() if shapes.fused else [times * weight.inputs for weight, times in carried]
    return LayerWidths(
        hidden=shapes.hidden_size,
        query=shapes.query_features if attends else 0,
        key=shapes.key_features if attends else 0,
        value=shapes.value_features if attends else 0,
        output=shapes.output_features if attends else 0,
        up=up,
        ffn=ffn,
        recurrent=sum(w.outputs for w in scanned if not w.name.endswith("out_proj.weight")) if recurs else 0,
        state=shapes.state_elements if recurs else 0,
        norms=max(2, sum(w.role == "norm" and not w.in_mixer for w in weights)),
        head_norms=any(w.role == "norm" and w.name.endswith("q_norm.weight") for w in weights),
        parameters=_parameters(shapes, [w for w in weights if w.role in _PRODUCTS or len(w.shape) == 3]),
        adapted_maps=len(adapted),
        adapted_inputs=sum(read),
        adapted_map_inputs=sum(times * weight.inputs for weight, times in carried),
        adapted_outputs=sum(times * weight.outputs for weight, times in carried),
        first=_maps(shapes, first, adapted),
        last=_maps(shapes, last if len(last) == 1 else [], adapted),
        window=shapes.windows[layer],
    )


def _maps(shapes: ModelShapes, weights: list[Weight], adapted: list[Weight]) -> Maps:
    carriers = [weight for weight in weights if weight in adapted]
    inputs, outputs = (sum(getattr(weight, name) for weight in carriers) for name in ("inputs", "outputs"))
    return Maps(_parameters(shapes, weights), inputs, outputs)


def _parameters(shapes: ModelShapes, weights: list[Weight]) -> float:
    """What one token passes of them."""
    return sum(weight.elements * shapes.active_share(weight) for weight in weights)
