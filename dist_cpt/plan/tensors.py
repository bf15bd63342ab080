"""What a recipe makes of a model: the tensors that train, by group, and those that stay frozen, as stored.

D model, V vocab, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError
from dist_cpt.plan.families import Role
from dist_cpt.plan.shapes import ModelShapes, Weight
from dist_cpt.plan.widths import LayerWidths, layer_widths

Group = Literal["adapter", "weights", "embeddings", "no_decay", "head", "router"]
EIGHT_BIT_GROUPS = ("adapter", "weights")  # optim/groups.py; `adapter` includes LoRA+'s B
BYTES = {"fp32": 4, "bf16": 2}
_NF4_BLOCK, _NF4_NESTED = 64, 256  # elements that share a scale, scales that share one
_NF4_TABLES = 4 * (16 + 256)  # of each layer or parameter of experts: two maps; each matrix has an offset
_FP8_MULTIPLE = 16  # dist_cpt_kernels.fp8.MULTIPLE, which needs torch


@dataclass(frozen=True)
class Trained:
    """A trainable tensor; `layer` None: outside the decoder layers."""

    shape: tuple[int, ...]
    group: Group
    layer: int | None
    role: Role = "linear"  # of the weight that it is or adapts

    @cached_property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Frozen:
    """A frozen tensor as stored; `scales`: quantisation scales, which every rank has whole."""

    shape: tuple[int, ...]
    element_bytes: int
    layer: int | None
    role: Role = "linear"
    scales: bool = False

    @cached_property
    def elements(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def bytes(self) -> int:
        return self.elements * self.element_bytes


@dataclass(frozen=True, eq=False)
class Training:
    """A model under a recipe; equal to itself alone, so that functions of it can be cached."""

    shapes: ModelShapes
    trained: tuple[Trained, ...]
    frozen: tuple[Frozen, ...]
    adapted: tuple[Weight, ...]  # the maps that carry LoRA
    rank: int  # of the adapter; 0 without one
    weights: Literal["fp32", "bf16", "fp8", "nf4", "int8"]
    eight_bit: bool  # moments of matrices
    trains_head: bool  # the matrix that the loss reads, in full
    trains_embedding: bool
    is_classifier: bool

    @property
    def full(self) -> bool:
        """Whether every parameter trains."""
        return not self.rank

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element of activations and of the copies that compute."""
        return 4 if self.weights == "fp32" else 2

    @cached_property
    def widths(self) -> list[LayerWidths]:
        """Of each layer."""
        return layer_widths(self.shapes, self.adapted)

    @cached_property
    def num_trained(self) -> int:
        return sum(tensor.elements for tensor in self.trained)

    @cached_property
    def num_quantised_experts(self) -> int:
        """Those of `num_quantised` that are experts': multiplied in 16 bits in every format."""
        weights = self.shapes.of("experts")
        return sum(weight.elements for weight in weights if _is_quantised(self.shapes, weight, self.weights))

    @cached_property
    def num_quantised(self) -> int:
        """Elements of the quantised weights."""
        weights = self.shapes.weights
        return sum(weight.elements for weight in weights if _is_quantised(self.shapes, weight, self.weights))


def training_of(config: RunConfig, shapes: ModelShapes) -> Training:
    """The tensors of a run of `config` on the model of `shapes`. New tokens' rows are not counted.

    Raises:
        ConfigError: a target is no linear map of the model.
    """
    full, classes = config.adapter.kind == "none", config.classify.num_classes if config.classify else 0
    weights = [w for w in shapes.weights if not (classes and w.role == "head")]
    trained_names = _trained_vocabulary(config, shapes)
    low_rank = config.embeddings.kind == "lora"
    adapted = () if full else tuple(_adapted(config, shapes))
    whole_roles = set() if low_rank else trained_names
    routers: tuple[str, ...] = ()  # beginnings of the names of their matrices and biases
    if config.model.router == "train" and not full:
        routers = tuple(w.name.removesuffix("weight") for w in shapes.of("router"))
    is_whole = {w.name for w in weights if full or w.role in whole_roles or w.name.startswith(routers)}
    trained = [
        Trained(w.shape, "router" if w.name.startswith(routers) else _group(w), w.layer, w.role)
        for w in weights
        if w.name in is_whole
    ]
    if not full:
        low_rank_vocabulary = [w for w in weights if w.role in trained_names and low_rank]
        trained += _adapter_tensors(config, shapes, adapted, low_rank_vocabulary)
    if classes:
        trained.append(Trained((classes, shapes.hidden_size), "head", None, "head"))
    loss_matrix = "embedding" if shapes.tied else "head"
    return Training(
        shapes=shapes,
        trained=tuple(trained),
        frozen=tuple(t for w in weights if w.name not in is_whole for t in _stored(shapes, w, config.model.weights)),
        adapted=adapted,
        rank=0 if full else config.adapter.rank,
        weights=config.model.weights,
        eight_bit=config.optim.state == "8bit",
        trains_head=not classes and (full or (loss_matrix in trained_names and not low_rank)),
        trains_embedding=full or ("embedding" in trained_names and not low_rank),
        is_classifier=bool(classes),
    )


def _trained_vocabulary(config: RunConfig, shapes: ModelShapes) -> set[str]:
    """Roles of the vocabulary matrices that `embeddings.train` names; a tied pair is the embedding."""
    roles = {{"embed_tokens": "embedding", "lm_head": "head"}[name] for name in config.embeddings.train}
    return {"embedding"} if roles and shapes.tied else roles


def _group(weight: Weight) -> Group:
    if weight.role in ("embedding", "head"):
        return "embeddings"
    return "weights" if len(weight.shape) > 1 else "no_decay"


def _adapted(config: RunConfig, shapes: ModelShapes) -> Iterator[Weight]:
    """As PEFT matches names: `all-linear`, or whole last components."""
    targets = config.adapter.targets
    wanted = (targets,) if isinstance(targets, str) else targets
    roles: tuple[Role, ...] = ("linear", "experts") if config.adapter.experts == "lora" else ("linear",)
    names = {weight.name.removesuffix(".weight"): weight for weight in shapes.adaptable(*roles)}
    for target in wanted if targets != "all-linear" else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            leaves = sorted({name.rpartition(".")[2] for name in names})
            raise ConfigError(
                f"adapter.targets: no linear layer is called {target!r}", remedy=f"linear layers: {', '.join(leaves)}"
            )
    for name, weight in names.items():
        if targets == "all-linear" or any(name == target or name.endswith(f".{target}") for target in wanted):
            yield weight


def _adapter_tensors(
    config: RunConfig, shapes: ModelShapes, adapted: tuple[Weight, ...], vocabulary: list[Weight]
) -> Iterator[Trained]:
    """A [R, in] and B [out, R] of each map, of experts with the ranks of all; an embedding has [R, V] and [D, R]."""
    expert_rank = config.adapter.expert_rank or max(1, config.adapter.rank // shapes.experts_per_token)
    for weight in adapted:
        rank = expert_rank * shapes.num_experts if weight.role == "experts" else config.adapter.rank
        yield Trained((rank, weight.inputs), "adapter", weight.layer)
        yield Trained((weight.outputs, rank), "adapter", weight.layer)
        if config.adapter.dora:
            yield Trained((weight.outputs,), "no_decay", weight.layer)
    rank = config.adapter.rank
    for weight in vocabulary:
        rows, columns = weight.shape
        inputs, outputs = (rows, columns) if weight.role == "embedding" else (columns, rows)
        yield Trained((rank, inputs), "embeddings", None, weight.role)
        yield Trained((outputs, rank), "embeddings", None, weight.role)


def _stored(shapes: ModelShapes, weight: Weight, weights: str) -> Iterator[Frozen]:
    """Source: bitsandbytes' NF4 with double quantisation, int8 and e4m3 rows (adapters/quantize.py), each expert by
    itself."""
    if not _is_quantised(shapes, weight, weights):
        yield Frozen(weight.shape, BYTES.get(weights, 2), weight.layer, weight.role)
        return
    matrices = weight.shape[:-2]  # (experts,)
    if weights in ("int8", "fp8"):
        yield Frozen((*matrices, weight.outputs, weight.inputs), 1, weight.layer, weight.role)
        yield Frozen((*matrices, weight.outputs), 4, weight.layer, scales=True)
        return
    elements, count = weight.outputs * weight.inputs, math.prod(matrices)
    blocks = -(-elements // _NF4_BLOCK)
    yield Frozen((*matrices, -(-elements // 2), 1), 1, weight.layer, weight.role)
    scales = count * (blocks + 4 * -(-blocks // _NF4_NESTED) + 4) + _NF4_TABLES
    yield Frozen((scales,), 1, weight.layer, scales=True)


def _is_quantised(shapes: ModelShapes, weight: Weight, weights: str) -> bool:
    roles = ("linear",) if shapes.is_quantised else ("linear", "experts")
    if weight.role not in roles or weights not in ("nf4", "int8", "fp8"):
        return False
    if weights == "fp8":
        return weight.outputs % _FP8_MULTIPLE == 0 == weight.inputs % _FP8_MULTIPLE
    return weights == "int8" or weight.role == "linear" or weight.outputs * weight.inputs % _NF4_BLOCK == 0
