"""What engine.activation_checkpointing keeps of a layer for backward, and what backward computes again.

The one table that memory, time and ranking read. `benchmarks/counts.py` counts the same from a layer's own operations,
and a test holds both equal.

D model, F ffn, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dist_cpt.plan.tensors import Training
from dist_cpt.plan.widths import LayerWidths, Maps

Policy = Literal["none", "selective", "full", "offload"]
TILE_TOKENS = 8192  # of an MLP at a time, where it recomputes: products of as many rows run at full speed
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True)
class Again:
    """What backward repeats of one layer's forward, per token."""

    gemm: float  # FLOPs of products with weights
    lora: float  # FLOPs of products with adapters
    lora_elements: float  # of rows that these read and write
    attention: bool
    elementwise: float  # elements moved by everything else


def kept_bytes(layer: LayerWidths, training: Training, policy: Policy) -> int:
    """Bytes on the device from forward to backward, per token."""
    size, heads = training.compute_bytes, training.shapes.num_heads
    if policy == "offload":
        return 0
    if policy == "full":
        return layer.hidden * size
    # both norms' inputs, attention's inputs and output, a convolution's and a scan's; LoRA's x A; statistics
    kept = 2 * layer.hidden + layer.query + layer.key + layer.value + layer.output + 2 * layer.recurrent
    lora, statistics = training.rank * layer.adapted_maps, 4 * (2 + heads)
    if policy == "none":  # and both norms' outputs, the MLP's two halves
        kept += 2 * layer.hidden + layer.up
        if not training.shapes.fused:  # norms in fp32, the activation and the product of the MLP
            kept += 2 * layer.hidden + 2 * layer.ffn
            statistics += 2 * 4 * layer.hidden
    return (kept + lora) * size + statistics


def working_bytes(layers: list[LayerWidths], training: Training, policy: Policy) -> int:
    """Bytes of backward's own in one layer, what it has computed again included, per token."""
    size = training.compute_bytes
    gradients = max(2 * layer.hidden + layer.ffn for layer in layers) * size
    if policy == "none":
        return gradients
    whole = max(kept_bytes(layer, training, "none") for layer in layers)
    if policy == "selective":
        return gradients + whole - min(kept_bytes(layer, training, "selective") for layer in layers)
    # offload: two inputs are on their way to the host, or back
    return gradients + whole + (2 * training.shapes.hidden_size * size if policy == "offload" else 0)


def spared_by_tiles(layers: list[LayerWidths], training: Training, policy: Policy, tokens: int) -> int:
    """Bytes of `working_bytes` for a forward of `tokens` that MLPs in tiles never have at once; experts have none."""
    if policy == "none" or tokens <= TILE_TOKENS or training.shapes.num_experts > 1:
        return 0
    inner = 1 if training.shapes.fused else 3  # gradient of the product; unfused also the activation and the product
    per_token = min(layer.up + inner * layer.ffn for layer in layers) * training.compute_bytes
    return (tokens - TILE_TOKENS) * per_token


def host_bytes(training: Training, policy: Policy) -> int:
    """Bytes of layer inputs in host memory, per token."""
    if policy != "offload":
        return 0
    return training.shapes.num_layers * training.shapes.hidden_size * training.compute_bytes


def again(layer: LayerWidths, training: Training, policy: Policy) -> Again:
    """Of the layer's last map the product is left out: backward needs what forward saved, not its result."""
    if policy == "none":
        return Again(0.0, 0.0, 0.0, False, 0.0)
    last = layer.last
    if policy == "selective":
        up, fused = layer.first, training.shapes.fused
        inputs = 0 if fused else up.adapted_inputs + last.adapted_inputs  # fused, x A is kept
        norms = 4 * layer.hidden  # both outputs are rebuilt
        return Again(
            gemm=2.0 * up.parameters,
            lora=2.0 * training.rank * (inputs + up.adapted_outputs),
            lora_elements=inputs + 2.0 * up.adapted_outputs,
            attention=False,
            elementwise=norms if fused else norms + layer.up + layer.ffn,
        )
    if layer.norms > 2:  # a norm of the MLP's output saves it
        last = Maps(0.0, 0, 0)
    outputs = layer.adapted_outputs - last.adapted_outputs
    return Again(
        gemm=2.0 * (layer.parameters - last.parameters),
        lora=2.0 * training.rank * (layer.adapted_map_inputs + outputs),
        lora_elements=layer.adapted_inputs + 2.0 * outputs,
        attention=True,
        elementwise=layer.moved_forward,
    )
