"""Bytes of one rank, by part: exact between steps, and a model of the peak within a step.

D model, V vocab, F ffn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

from dist_cpt.plan.recomputation import Policy, kept_bytes, spared_by_tiles, working_bytes
from dist_cpt.plan.tensors import EIGHT_BIT_GROUPS, Frozen, Trained, Training
from dist_cpt.plan.widths import LayerWidths

EngineKind = Literal[
    "single", "fsdp-full", "fsdp-hybrid", "fsdp-trainable", "zero-1", "zero-2", "zero-3"
]  # as `Engine.kind`
EIGHT_BIT_BLOCK = 256  # elements that share a scale
PERSISTENT_ELEMENTS = 100_000  # ZeRO-3 keeps smaller parameters gathered. Source: deepspeed 0.19, zero config
BUCKET_ELEMENTS = 200_000_000  # of a reduction under ZeRO
LOSS_CHUNK_TOKENS = 2048
Offload = Literal["none", "base", "optimizer", "both"]  # as engine.offload
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
GATHERED_LAYERS = 2  # the one that computes and the one that is fetched ahead
RESERVE_BYTES = 1_000_000_000  # CUDA's context, the communicator's buffers, what the allocator cannot use


@dataclass(frozen=True)
class Placement:
    """An engine on its ranks."""

    kind: EngineKind
    ranks: int
    shard_ranks: int  # ranks that share one copy of what is sharded
    node_ranks: int
    reduce: Literal["micro_batch", "step"] = "micro_batch"  # engine.reduce, of FSDP
    offload: Offload = "none"

    def offloads(self, part: Literal["base", "optimizer"]) -> bool:
        """Whether `part` waits in host memory."""
        return self.offload in (part, "both")


@dataclass(frozen=True)
class RankStep:
    """What one rank computes in a step."""

    seq_len: int
    micro_batch: int  # sequences
    accumulation: int  # micro-batches
    recompute: Policy = "none"  # engine.activation_checkpointing
    context_parallel: int = 1  # ranks that each sequence is cut over

    @property
    def micro_batch_tokens(self) -> int:
        return self.micro_batch * self.seq_len // self.context_parallel


@dataclass(frozen=True)
class StateBytes:
    """Bytes of this rank's storages between steps: as `InspectableEngine.sharded_bytes`."""

    trainable: int
    frozen: int
    optimizer: int


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one rank."""

    frozen: int
    trainable: int
    optimizer: int
    gradients: int
    gathered: int  # weights and gradients whole for a moment
    activations: int
    loss: int
    reserve: int = RESERVE_BYTES

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def state_bytes(training: Training, placement: Placement) -> StateBytes:
    """What the first rank holds between steps; FSDP's first rank has the largest shards."""
    if placement.kind == "single":
        return _single(training)
    if placement.kind.startswith("fsdp"):
        return _fsdp(training, placement)
    return _zero3(training, placement) if placement.kind == "zero-3" else _zero12(training, placement)


def host_state(training: Training, placement: Placement, state: StateBytes) -> StateBytes:
    """The part of `state` in host memory; quantisation scales stay on the device."""
    scales = sum(tensor.bytes for tensor in training.frozen if tensor.scales)
    optimizer = placement.offloads("optimizer")
    return StateBytes(
        trainable=state.trainable if optimizer and placement.kind.startswith("fsdp") else 0,  # they are the masters
        frozen=state.frozen - scales if placement.offloads("base") else 0,
        optimizer=state.optimizer if optimizer else 0,
    )


def host_gradient_bytes(training: Training, placement: Placement, accumulation: int) -> int:
    """What a rank keeps of its gradients in host memory: shards that are updated there."""
    if not placement.offloads("optimizer") or placement.kind == "single":
        return 0
    return gradient_bytes(training, replace(placement, reduce="micro_batch"), accumulation)


def peak_memory(training: Training, placement: Placement, state: StateBytes, step: RankStep) -> Memory:
    """The peak of a step on the device, in the backward pass of the last layers."""
    tokens = step.micro_batch_tokens
    widths = training.widths
    host, gradients = host_state(training, placement, state), gradient_bytes(training, placement, step.accumulation)
    if placement.reduce == "micro_batch" or step.accumulation == 1:
        gradients -= host_gradient_bytes(training, placement, step.accumulation)
    return Memory(
        frozen=state.frozen - host.frozen,
        trainable=state.trainable - host.trainable,
        optimizer=state.optimizer - host.optimizer,
        gradients=gradients,
        gathered=_gathered(training, placement) + _dequantised(training, tokens),
        activations=tokens * activation_bytes_per_token(training, widths, step.recompute)
        - spared_by_tiles(widths, training, step.recompute, tokens),
        loss=_loss(training, tokens),
    )


def activation_bytes_per_token(training: Training, widths: Iterable[LayerWidths], recompute: Policy) -> int:
    """Bytes that forward keeps for backward, and backward's own in one layer, per token."""
    layers = list(widths)
    kept = sum(kept_bytes(layer, training, recompute) for layer in layers)
    return kept + working_bytes(layers, training, recompute)


def _loss(training: Training, tokens: int) -> int:
    """A chunk of logits, the hidden states' gradient, and a trained head's gradient in fp32."""
    shapes = training.shapes
    if training.is_classifier:
        return tokens * shapes.hidden_size * training.compute_bytes
    logits = min(tokens, LOSS_CHUNK_TOKENS) * shapes.vocab_size * training.compute_bytes
    hidden = tokens * shapes.hidden_size * training.compute_bytes
    return logits + hidden + (4 * shapes.head_elements if training.trains_head else 0)


def _dequantised(training: Training, tokens: int) -> int:
    """The largest weight in 16 bits, of experts all in a parameter; int8 scales its product in fp32 besides; fp8: its
    codes transposed, and those of its input, if it is of no experts."""
    if not training.num_quantised:
        return 0
    largest = max(training.shapes.of("linear", "experts"), key=lambda weight: weight.elements)
    tokens *= training.shapes.experts_per_token if largest.role == "experts" else 1
    if training.weights == "fp8" and largest.role == "linear":
        return largest.elements + tokens * max(largest.inputs, largest.outputs)
    return 2 * largest.elements + (0 if training.weights == "nf4" else 4 * tokens * largest.outputs)


@lru_cache(maxsize=64)
def gradient_bytes(training: Training, placement: Placement, accumulation: int) -> int:
    """What a rank keeps of its gradients from one micro-batch to the next; a single one stays in the compute dtype."""
    elements, kind = training.num_trained, placement.kind
    if kind == "single":
        return elements * (4 if accumulation > 1 else training.compute_bytes)
    if kind == "zero-1" or (placement.reduce == "step" and accumulation > 1):  # whole until the last micro-batch
        return 4 * elements
    if kind.startswith("fsdp"):
        return 4 * sum(shard_elements(tensor.shape, placement.shard_ranks) for tensor in training.trained)
    return 4 * -(-elements // placement.shard_ranks)


@lru_cache(maxsize=64)
def _gathered(training: Training, placement: Placement) -> int:
    """Weights that are whole for a moment, and gradients before they are summed or reduced."""
    if placement.kind == "single":
        return training.compute_bytes * max(tensor.elements for tensor in training.trained)
    root = sum(t.elements for t in training.trained if t.layer is None)  # stays gathered until its backward
    layer = max((_layer_elements(training.trained, n) for n in (0, training.shapes.num_layers - 1)), default=0)
    if placement.kind in ("zero-1", "zero-2"):
        return 4 * min(BUCKET_ELEMENTS, training.num_trained)
    matrices = [t.elements for t in training.trained if t.layer is None]
    unit = root if training.shapes.tied else max(matrices, default=0)  # embeddings and head are units unless tied
    # the compute copy and its gradient, and the fp32 gradient that is reduced
    gradients = max(unit, layer) * (training.compute_bytes + 4)
    copies = (root + GATHERED_LAYERS * layer) * training.compute_bytes
    if placement.kind == "fsdp-trainable":
        return gradients + copies
    frozen_layer = sum(t.bytes for t in training.frozen if t.layer == training.shapes.num_layers - 1 and not t.scales)
    frozen_root = sum(t.bytes for t in training.frozen if t.layer is None)
    bucket = 4 * min(BUCKET_ELEMENTS, training.num_trained) if placement.kind == "zero-3" else 0
    arriving = frozen_layer // placement.shard_ranks if placement.offloads("base") else 0  # a shard, to be gathered
    return gradients + copies + frozen_root + GATHERED_LAYERS * frozen_layer + bucket + arriving


def _layer_elements(tensors: Iterable[Trained], layer: int) -> int:
    return sum(tensor.elements for tensor in tensors if tensor.layer == layer)


def _moments(tensor: Trained, elements: int, training: Training) -> int:
    """Both moments of `elements` of a tensor."""
    if training.eight_bit and tensor.group in EIGHT_BIT_GROUPS:
        return 2 * (elements + 4 * -(-elements // EIGHT_BIT_BLOCK))
    return 8 * elements


def _single(training: Training) -> StateBytes:
    elements = training.num_trained
    moments = sum(_moments(tensor, tensor.elements, training) for tensor in training.trained)
    masters = 4 * elements if training.compute_bytes == 2 else 0  # in fp32 the copies are the masters
    frozen = sum(tensor.bytes for tensor in training.frozen)
    return StateBytes(elements * training.compute_bytes, frozen, masters + moments)


def shard_elements(shape: tuple[int, ...], ranks: int) -> int:
    """Elements of FSDP's first and largest shard: ceil(rows / ranks) rows; the others are padded to it on their way."""
    return -(-shape[0] // ranks) * (math.prod(shape) // max(1, shape[0]))


def _fsdp(training: Training, placement: Placement) -> StateBytes:
    ranks = placement.shard_ranks
    shards = [(tensor, shard_elements(tensor.shape, ranks)) for tensor in training.trained]
    whole = placement.kind == "fsdp-trainable"

    def frozen(tensor: Frozen) -> int:
        return tensor.bytes if whole or tensor.scales else shard_elements(tensor.shape, ranks) * tensor.element_bytes

    return StateBytes(
        trainable=4 * sum(elements for _, elements in shards),
        frozen=sum(map(frozen, training.frozen)),
        optimizer=sum(_moments(tensor, elements, training) for tensor, elements in shards),
    )


def _zero12(training: Training, placement: Placement) -> StateBytes:
    elements, ranks = training.num_trained, placement.ranks
    moments = sum(_moments(tensor, tensor.elements, training) for tensor in training.trained)
    return StateBytes(
        trainable=elements * training.compute_bytes,
        frozen=sum(tensor.bytes for tensor in training.frozen),
        optimizer=(4 * elements + moments) // ranks,
    )


def _zero3(training: Training, placement: Placement) -> StateBytes:
    def stored(elements: int, element_bytes: int) -> int:
        kept = elements if elements < PERSISTENT_ELEMENTS and placement.ranks > 1 else 0
        return element_bytes * (-(-elements // placement.ranks) + kept)

    parts = [(tensor, -(-tensor.elements // placement.ranks)) for tensor in training.trained]
    frozen = (t.bytes if t.scales else stored(t.elements, t.element_bytes) for t in training.frozen)
    return StateBytes(
        trainable=sum(stored(tensor.elements, training.compute_bytes) for tensor in training.trained),
        frozen=sum(frozen),
        optimizer=sum(4 * elements + _moments(tensor, elements, training) for tensor, elements in parts),
    )


@lru_cache(maxsize=64)
def loading_bytes(training: Training, ranks: int, on_host: int = 0) -> int:
    """What every rank has on its device while the model is loaded, trainable tensors in fp32.

    By slices: its part of one that `ranks` share, `on_host` of which is in host memory, and a layer or matrix that is
    being sent, twice. Else all of it.
    """
    whole = sum(tensor.bytes for tensor in training.frozen) + 4 * training.num_trained
    if ranks == 1 and not on_host:
        return whole + RESERVE_BYTES
    largest = max(
        4 * max((t.elements for t in training.trained), default=0), max((t.bytes for t in training.frozen), default=0)
    )
    return whole // ranks - on_host + 2 * max(largest, whole // len(training.widths)) + RESERVE_BYTES
