"""Seconds of one optimizer step by part: arithmetic on a model's shapes, a device's rates and named assumptions.

Nothing here is measured. A token is one of a full sequence: documents packed into it attend to less, so attention is an
upper bound.

D model, V vocab, F ffn, Q query features, K key features, R rank.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from dist_cpt.plan import recomputation
from dist_cpt.plan.devices import Device
from dist_cpt.plan.exchange import rank_heads
from dist_cpt.plan.memory import LOSS_CHUNK_TOKENS, PERSISTENT_ELEMENTS, Placement, RankStep, shard_elements
from dist_cpt.plan.tensors import Frozen, Training
from dist_cpt.plan.widths import LayerWidths


@dataclass(frozen=True)
class Assumptions:
    """Fractions and costs that are the same on every device. Source: a review of the kernels, counted on a CPU."""

    elementwise_fraction: float = 0.85  # of copy bandwidth, in kernels that only move bytes
    skinny_fraction: float = 0.72  # of copy bandwidth, in products with an adapter's matrices
    unfused_passes: float = 2.5  # bytes moved by transformers' own modules, for each byte of the fused ones
    loss_passes: int = 4  # over the logits: written, read for the softmax, read and overwritten by the gradient
    nf4_elements_per_second: float = 0.75e12  # dequantised; fitted to the review of the kernels
    nf4_copy: float = 3.0e12  # the copy bandwidth from which on that holds
    gradient_bytes: int = 10  # per trained element and micro-batch: a bf16 gradient added to an fp32 sum
    update_bytes: int = 24  # per trained element: the fp32 master and both moments, read and written
    update_bytes_zero: int = 46  # deepspeed's passes for norm, clip, torch's AdamW and the bf16 copy
    update_launches: int = 43  # of an optimizer step. Source: benchmarks/counts.py
    update_launches_per_tensor: int = 0
    launch_seconds: float = 5.6e-6  # of a kernel that nothing hides
    step_seconds: float = 0.0  # in which the device waits for the host to read; our reads come a step late
    step_seconds_zero: float = 3.6e-3  # deepspeed's do not
    host_update_rate: float = 25e9  # bytes/s of a rank's update in host memory, of which a node's ranks share the bus
    layer_launches_forward: int = 29
    layer_launches_backward: int = 40
    host_seconds_per_launch: float = 46e-6  # Python and autograd included


ASSUMED = Assumptions()


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one rank; `communication`, `host` and `offload` are what the device waits for."""

    gemm: float
    attention: float
    lora: float
    elementwise: float
    loss: float
    recomputation: float
    dequantise: float
    gradients: float
    communication: float
    optimizer: float
    host: float
    offload: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class TokenWork:
    """FLOPs and bytes of one token through all layers and the loss."""

    gemm_forward: float
    gemm_backward: float
    attention_forward: float
    attention_backward: float
    attention_bytes: float  # of its backward, outside of the products
    lora: float  # FLOPs, forward and backward
    lora_bytes_forward: float
    lora_bytes_backward: float
    elementwise_forward: float  # bytes
    elementwise_backward: float
    loss: float
    loss_bytes: float

    @property
    def model_flops(self) -> float:
        """What the model needs: the numerator of MFU, without recomputation."""
        products = self.gemm_forward + self.gemm_backward + self.attention_forward + self.attention_backward
        return products + self.lora + self.loss


@lru_cache(maxsize=64)
def token_work(training: Training, seq_len: int, assumed: Assumptions = ASSUMED) -> TokenWork:
    """The work of one token. In full, a map's weight gradient costs another product."""
    widths = training.widths
    passes = 1.0 if training.shapes.fused else assumed.unfused_passes
    size = training.compute_bytes
    forward = 2.0 * sum(layer.parameters for layer in widths)
    attention = sum(_attention(layer, seq_len) for layer in widths)
    inputs, outputs = (sum(getattr(layer, name) for layer in widths) for name in ("adapted_inputs", "adapted_outputs"))
    loss, loss_bytes = _loss(training, assumed)
    return TokenWork(
        gemm_forward=forward,
        gemm_backward=forward * (2.0 if training.full else 1.0),
        attention_forward=attention,
        attention_backward=2.5 * attention,  # five products for two
        attention_bytes=sum(4.0 * layer.output + 10.0 * layer.query for layer in widths),  # dQ is summed in fp32
        lora=6.0 * sum(tensor.elements for tensor in training.trained if tensor.group == "adapter"),
        lora_bytes_forward=size * passes * (inputs + 2.0 * outputs),
        lora_bytes_backward=size * passes * (3.0 * inputs + 2.0 * outputs),
        elementwise_forward=size * passes * sum(layer.moved_forward for layer in widths),
        elementwise_backward=size * passes * sum(map(_elementwise_backward, widths)),
        loss=loss,
        loss_bytes=loss_bytes,
    )


def step_time(
    training: Training,
    placement: Placement,
    device: Device,
    network: float,
    step: RankStep,
    assumed: Assumptions = ASSUMED,
) -> StepTime:
    """Seconds of a step by part; `network`: a rank's bytes/s to other nodes."""
    accumulation = step.accumulation
    work = token_work(training, step.seq_len, assumed)
    tokens = step.micro_batch_tokens * accumulation
    moved = device.copy * assumed.elementwise_fraction
    skinny = device.copy * assumed.skinny_fraction
    lora_forward = max(work.lora_bytes_forward / skinny, work.lora / 3 / device.gemm)
    lora_backward = max(work.lora_bytes_backward / skinny, work.lora * 2 / 3 / device.gemm)
    attention = work.attention_forward / device.attention_forward + work.attention_backward / device.attention_backward
    per_token = {
        "gemm": (work.gemm_forward + work.gemm_backward) / _gemm_rate(training, device),
        "attention": attention + work.attention_bytes / moved,
        "lora": lora_forward + lora_backward,
        "elementwise": (work.elementwise_forward + work.elementwise_backward) / moved,
        "loss": work.loss / device.gemm + work.loss_bytes / moved,
        "recomputation": _recomputation(training, step, device, work, assumed),
    }
    parts = {name: seconds * tokens for name, seconds in per_token.items()}
    again = [recomputation.again(layer, training, step.recompute) for layer in training.widths]
    repeated = sum(layer.gemm for layer in again) / work.gemm_forward
    parts["dequantise"] = _dequantise(training, device, step, repeated, assumed) * accumulation
    parts["gradients"] = _gradients(training, accumulation, assumed) / moved
    compute = sum(parts.values()) / accumulation
    forwards = 2 if any(layer.attention for layer in again) else 1
    launches = assumed.layer_launches_forward * forwards + assumed.layer_launches_backward
    host = launches * training.shapes.num_layers * assumed.host_seconds_per_launch
    parts["communication"] = communication(
        training, placement, device, network, compute=compute, accumulation=accumulation
    )
    parts["communication"] += _exchange(training, placement, device, network, step) * accumulation
    parts["optimizer"] = _optimizer(training, placement, device, accumulation, assumed)
    # layer inputs leave beside the forward pass, a third of the time, and return beside the backward
    copies = recomputation.host_bytes(training, step.recompute) * step.micro_batch_tokens / device.host
    waits = max(0.0, host - compute) + max(0.0, copies - compute / 3) + max(0.0, copies - compute * 2 / 3)
    reads = assumed.step_seconds_zero if placement.kind.startswith("zero") else assumed.step_seconds
    parts["host"] = reads + waits * accumulation
    parts["offload"] = _offload(training, placement, device, compute=compute, accumulation=accumulation)
    return StepTime(**parts)


def _attention(layer: LayerWidths, seq_len: int) -> float:
    """Forward FLOPs per token: scores and their product with the values, over the keys that causality leaves; of a
    recurrence three products with its state, which decays, takes up the token and is read."""
    keys = seq_len / 2
    if layer.window is not None and layer.window < seq_len:
        keys = layer.window - layer.window**2 / (2 * seq_len)
    return 2.0 * keys * (layer.query + layer.output) + 6.0 * layer.state


def _elementwise_backward(layer: LayerWidths) -> float:
    """Both norms, the sum of residual gradients, the sums of three maps' input gradients; RoPE; gate and up."""
    norms = (16 + 3 * (layer.norms - 2)) * layer.hidden
    rotated = layer.query + layer.key
    return norms + 2 * rotated + (3 * rotated if layer.head_norms else 0) + 2 * layer.up + 2 * layer.ffn


def _loss(training: Training, assumed: Assumptions) -> tuple[float, float]:
    """(FLOPs, bytes) per token: logits, their gradient's product with the head, and with the hidden states."""
    if training.is_classifier:
        return 0.0, 0.0
    products = 6.0 if training.trains_head else 4.0
    passes = assumed.loss_passes * training.compute_bytes * training.shapes.vocab_size
    head = 8.0 * training.shapes.head_elements / LOSS_CHUNK_TOKENS if training.trains_head else 0.0
    return products * training.shapes.head_elements, passes + head


def _recomputation(training: Training, step: RankStep, device: Device, work: TokenWork, assumed: Assumptions) -> float:
    """Seconds per token of what backward computes again."""
    layers = [recomputation.again(layer, training, step.recompute) for layer in training.widths]
    passes = training.compute_bytes * (1.0 if training.shapes.fused else assumed.unfused_passes)
    skinny = passes * sum(layer.lora_elements for layer in layers) / (device.copy * assumed.skinny_fraction)
    elementwise = passes * sum(layer.elementwise for layer in layers) / (device.copy * assumed.elementwise_fraction)
    attention = work.attention_forward / device.attention_forward if any(layer.attention for layer in layers) else 0.0
    lora = max(skinny, sum(layer.lora for layer in layers) / device.gemm)
    return sum(layer.gemm for layer in layers) / _gemm_rate(training, device) + attention + lora + elementwise


def _gemm_rate(training: Training, device: Device) -> float:
    """FLOP/s of the maps' products, of which those with e4m3 weights are faster."""
    if training.weights != "fp8":
        return device.gemm
    multiplied = training.num_quantised - training.num_quantised_experts
    share = min(1.0, multiplied / sum(layer.parameters for layer in training.widths))
    return device.gemm / (1.0 - share + share / device.e4m3)


def _dequantise(training: Training, device: Device, step: RankStep, repeated: float, assumed: Assumptions) -> float:
    """Seconds per micro-batch to make 16-bit weights in forward, backward and recomputation; fp8: to quantise what they
    multiply, bf16 read and codes written, and to transpose codes in backward, experts as int8."""
    experts = training.num_quantised_experts
    elements = (2 + repeated) * training.num_quantised
    moved = device.copy * assumed.elementwise_fraction
    if training.weights == "fp8":
        rows = sum((1 + repeated) * layer.adapted_inputs + layer.adapted_outputs for layer in training.widths)
        linear = 3.0 * rows * step.micro_batch_tokens + 2.0 * (training.num_quantised - experts)
        return (linear + 3.0 * (2 + repeated) * experts) / moved
    if training.weights == "int8":  # codes read, bf16 written
        return 3.0 * elements / moved
    return elements / (assumed.nf4_elements_per_second * min(1.0, device.copy / assumed.nf4_copy))


def _gradients(training: Training, accumulation: int, assumed: Assumptions) -> float:
    """Bytes per step: each micro-batch adds its gradient to a sum in fp32, and clears that of the embedding."""
    sums = training.num_trained * assumed.gradient_bytes * (accumulation if accumulation > 1 else 0)
    zeros = training.shapes.head_elements * training.compute_bytes if training.trains_embedding else 0
    return float(sums + zeros * accumulation)


def _optimizer(
    training: Training, placement: Placement, device: Device, accumulation: int, assumed: Assumptions
) -> float:
    """Traffic of the rank's part, or its launches if these take longer: nothing runs beside them."""
    ranks = 1 if placement.kind == "single" else placement.shard_ranks
    if placement.offloads("optimizer"):
        return training.num_trained / ranks * (assumed.update_bytes + 4) / assumed.host_update_rate
    per_element = _update_bytes(training, placement, accumulation, assumed)
    traffic = training.num_trained / ranks * per_element / (device.copy * assumed.elementwise_fraction)
    launches = assumed.update_launches + assumed.update_launches_per_tensor * len(training.trained)
    return max(traffic, launches * assumed.launch_seconds)


def _offload(training: Training, placement: Placement, device: Device, *, compute: float, accumulation: int) -> float:
    """Seconds per step for what passes between host and device; `compute` of a micro-batch hides what FSDP and ZeRO-3
    fetch ahead, which on one rank FSDP does not."""
    ranks, up, per_step = placement.shard_ranks, 0.0, 0.0
    if placement.offloads("base"):  # for forward and backward; what is outside of the layers stays gathered
        up += sum(t.bytes * (1 if t.layer is None else 2) for t in training.frozen if not t.scales) / ranks
    if placement.offloads("optimizer"):
        if placement.kind.startswith("fsdp"):  # fp32 shards up, their gradients down
            up += 4 * sum(t.elements * (1 if t.layer is None else 2) for t in training.trained) / ranks
            per_step = 4 * training.num_trained / ranks * accumulation
        else:  # gradients down, rounded copies up; deepspeed fetches its sum to add to it
            down = training.compute_bytes if placement.kind == "single" and accumulation == 1 else 4
            times = 2 * accumulation - 1 if placement.kind == "zero-3" else 1
            per_step = training.num_trained / ranks * (times * down + training.compute_bytes)
    fetched = up / device.host
    exposed = fetched if ranks == 1 else max(0.0, fetched - compute)
    return exposed * accumulation + per_step / device.host


def _update_bytes(training: Training, placement: Placement, accumulation: int, assumed: Assumptions) -> int:
    """Per trained element: the state; the gradient, read for the norm and for the update; a compute copy, written."""
    if placement.kind.startswith("zero"):
        return assumed.update_bytes_zero
    if placement.kind != "single":
        return assumed.update_bytes + 2 * 4  # the shards are the masters, and are rounded where they are gathered
    gradient = training.compute_bytes if accumulation == 1 else 4
    copy = training.compute_bytes if training.compute_bytes < 4 else 0
    return assumed.update_bytes + 2 * gradient + copy


def communication(
    training: Training, placement: Placement, device: Device, network: float, *, compute: float, accumulation: int
) -> float:
    """Seconds per step that a rank waits for others; `compute` seconds of one micro-batch hide what most units send."""
    if placement.ranks == 1:
        return 0.0
    inner, outer = _rate(placement.shard_ranks, placement, device, network), network
    if placement.kind in ("zero-1", "zero-2"):
        return _zero12(training, placement, inner, accumulation)
    gathered, reduced = moved_bytes(training, placement)
    share = (placement.shard_ranks - 1) / placement.shard_ranks

    def waits(hidden: float, exposed: float) -> float:
        return max(0.0, hidden * share / inner - compute) + exposed * share / inner

    reductions = 1 if placement.reduce == "step" else accumulation
    seconds = waits(gathered.hidden + reduced.hidden, gathered.exposed + reduced.exposed) * reductions
    seconds += waits(gathered.hidden, gathered.exposed) * (accumulation - reductions)
    replicas = placement.ranks // placement.shard_ranks
    if replicas > 1:  # hybrid: the shards' gradients once per step, after the last micro-batch
        sent = 2 * 4 * training.num_trained / placement.shard_ranks * (replicas - 1) / replicas
        seconds += max(0.0, sent / outer - compute / 2)
    return seconds


def _exchange(training: Training, placement: Placement, device: Device, network: float, step: RankStep) -> float:
    """Seconds of a micro-batch in the all-to-alls around attention, which nothing hides."""
    ranks, shapes = step.context_parallel, training.shapes
    if ranks == 1:
        return 0.0
    head_dim = shapes.query_features // shapes.num_heads
    part = rank_heads(shapes.num_heads, max(1, shapes.key_features // head_dim), ranks)
    passes = 3 if step.recompute in ("full", "offload") else 2
    sent = sum(part.numbers_per_token(head_dim)) * step.micro_batch_tokens * ranks * training.compute_bytes
    leaving = sent * (ranks - 1) / ranks  # the rest is the rank's own
    return passes * shapes.num_layers * leaving / _rate(ranks, placement, device, network)


def _rate(ranks: int, placement: Placement, device: Device, network: float) -> float:
    return device.link if ranks <= placement.node_ranks else min(device.link, network)


class Moved(NamedTuple):
    """Bytes of whole tensors; a rank sends its share of them."""

    hidden: int  # behind computation
    exposed: int


@lru_cache(maxsize=64)
def moved_bytes(training: Training, placement: Placement) -> tuple[Moved, Moved]:
    """(gathered by a micro-batch for forward and backward, reduced in fp32 by each or by the last).

    Nothing runs before the embeddings are gathered nor after their gradient, and a tied head waits with them. What is
    outside of the layers stays gathered from forward to backward.
    """
    size = training.compute_bytes
    trained = [t for t in training.trained if placement.kind != "zero-3" or t.elements >= PERSISTENT_ELEMENTS]
    frozen = [t for t in training.frozen if placement.kind != "fsdp-trainable" and not t.scales]
    moved = Counter[tuple[str, bool]]()
    for tensor in (*trained, *frozen):
        exposed = tensor.layer is None and (training.shapes.tied or tensor.role == "embedding")
        elements = tensor.elements
        if placement.kind.startswith("fsdp"):
            elements = placement.shard_ranks * shard_elements(tensor.shape, placement.shard_ranks)
        once = elements * (tensor.element_bytes if isinstance(tensor, Frozen) else size)
        moved["gathered", exposed] += once * (1 if tensor.layer is None else 2)
        moved["reduced", exposed] += 0 if isinstance(tensor, Frozen) else 4 * elements
    gathered, reduced = (Moved(moved[what, False], moved[what, True]) for what in ("gathered", "reduced"))
    return gathered, reduced


def _zero12(training: Training, placement: Placement, rate: float, accumulation: int) -> float:
    """Gradients are reduced in fp32, by stage 2 in every micro-batch, and the updated copies gathered once."""
    share = (placement.ranks - 1) / placement.ranks
    times = accumulation if placement.kind == "zero-2" else 1
    return training.num_trained * share * (4 * times + training.compute_bytes) / rate
