"""Every way to run a recipe on a machine that exists and fits: memory of a rank and tokens/s, by the model.

A way is an engine with what it shards, a micro-batch, what is recomputed, and how the base is stored. The fastest comes
first. New settings of a recipe become new ways here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dist_cpt.config.exclusions import refusals
from dist_cpt.config.resolve import step_shape
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError
from dist_cpt.plan.devices import Machine
from dist_cpt.plan.loading import why_whole
from dist_cpt.plan.memory import (
    OFFLOADS,
    Memory,
    Placement,
    RankStep,
    StateBytes,
    host_gradient_bytes,
    host_state,
    loading_bytes,
    peak_memory,
    state_bytes,
)
from dist_cpt.plan.model_check import refusals as unsupported
from dist_cpt.plan.recomputation import POLICIES, Policy, host_bytes
from dist_cpt.plan.shapes import ModelShapes, find_config, shapes_of
from dist_cpt.plan.step_model import StepTime, step_time, token_work
from dist_cpt.plan.tensors import Training, training_of

USABLE_FRACTION = 0.95  # of a device's memory; the rest is fragments between blocks of the allocator
_ENGINES: dict[str, dict[str, Any]] = {
    "single": {"kind": "single"},
    "fsdp-trainable": {"kind": "fsdp", "shard": "trainable"},
    "fsdp-full": {"kind": "fsdp", "shard": "full"},
    "fsdp-hybrid": {"kind": "fsdp", "shard": "hybrid"},
    "zero-1": {"kind": "zero", "stage": 1},
    "zero-2": {"kind": "zero", "stage": 2},
    "zero-3": {"kind": "zero", "stage": 3},
}


@dataclass(frozen=True)
class Way:
    """One way to run, with the model's prediction."""

    engine: str  # as Engine.kind
    reduce: str  # as engine.reduce
    offload: str  # as engine.offload
    ranks: int
    weights: str
    checkpointing: str
    micro_batch: int
    accumulation: int
    memory: Memory
    host_bytes: int  # of a rank in host memory: what engine.offload and recomputation keep there
    loading_bytes: int
    time: StepTime
    tokens_per_second: float  # of the whole machine
    mfu: float
    fits: bool

    @property
    def peak_bytes(self) -> int:
        """Of the step or of loading, whichever is larger."""
        return max(self.memory.total, self.loading_bytes)

    @property
    def options(self) -> str:
        """What is recomputed, when gradients are summed, what is offloaded, unless as usual: the end of its name."""
        recomputed = "" if self.checkpointing == "none" else f", recompute {self.checkpointing}"
        once = "" if self.reduce == "micro_batch" else ", reduce once per step"
        return recomputed + once + ("" if self.offload == "none" else f", offload {self.offload}")


@dataclass(frozen=True)
class Plan:
    """The ways that fit, fastest first, those that do not, and the recipe's own."""

    shapes: ModelShapes
    training: Training  # under the recipe's own weights
    machine: Machine
    ways: tuple[Way, ...]
    too_large: tuple[Way, ...]
    own: Way | None  # None: it does not divide, or its engine does not exist here or keeps what is sharded whole


def make_plan(config: RunConfig, values: Mapping[str, Any], machine: Machine) -> Plan:
    """Predict every way to run `config` on `machine`; `values` are the content of its model's config.json.

    Raises:
        ConfigError: the model is not known or refused, or a step's sequences do not divide by the ranks.
    """
    shapes = shapes_of(values)
    for line in unsupported(values):
        raise ConfigError(f"model type {shapes.model_type}: {line}", remedy="dist-cpt model-check shows the rest")
    if config.model.weights == "fp8" and not machine.device.e4m3:
        raise ConfigError(
            f"model.weights: fp8: {machine.device.name} has no e4m3 products", remedy="use bf16, nf4 or int8"
        )
    own = training_of(config, shapes)
    candidates = _candidates(config, values, machine, dict.fromkeys(("none", config.engine.offload)))
    useful = [way for way, is_useful in candidates if is_useful]
    if not any(way.fits for way in useful):  # what is offloaded is slower, so it is a way if nothing else is
        others = [offload for offload in OFFLOADS if offload not in ("none", config.engine.offload)]
        useful += [way for way, is_useful in _candidates(config, values, machine, others) if is_useful]
    fitting = sorted((way for way in useful if way.fits), key=lambda way: -way.tokens_per_second)
    too_large = sorted((way for way in useful if not way.fits), key=lambda way: way.peak_bytes)
    mine = _own(config, machine)
    here = [way for way, _ in candidates if (way.engine, *_settings(way)) == mine]
    here = here if config.engine.reshard_after_forward else []
    return Plan(shapes, own, machine, tuple(fitting), tuple(too_large), here[0] if here else None)


def predict(config: RunConfig, shapes: ModelShapes, machine: Machine) -> Way:
    """The prediction for a recipe with a concrete engine, on all of `machine`.

    Raises:
        ConfigError: a step's sequences do not divide by the ranks.
    """
    training, placement = training_of(config, shapes), placement_of(config, machine)
    state, checkpointing = state_bytes(training, placement), config.engine.activation_checkpointing
    step_shape(config, machine.ranks)
    assert checkpointing != "auto"
    return _predict(config, training, placement, state, machine, config.batch.micro_batch, checkpointing)


def model_config(config: RunConfig) -> dict[str, Any]:
    """The content of the config.json of the recipe's model, from its folder or the Hugging Face cache.

    Raises:
        ConfigError: it is in neither.
    """
    if config.model.config is not None:
        return config.model.config
    return find_config(str(config.model.path), config.model.revision)


def recipe_patch(config: RunConfig, way: Way) -> dict[str, Any]:
    """The settings of `way` that `config` does not have, by dotted key."""
    engine = _ENGINES[way.engine] | {"activation_checkpointing": way.checkpointing, "offload": way.offload}
    wanted = {f"engine.{key}": value for key, value in engine.items()}
    for key in ("stage", "shard", "dp_shard"):  # of another kind of engine
        wanted.setdefault(f"engine.{key}", engine.get(key))
    wanted |= {"engine.reshard_after_forward": True, "engine.reduce": way.reduce}  # no way keeps all weights gathered
    wanted |= {"model.weights": way.weights, "batch.micro_batch": way.micro_batch}
    return {key: value for key, value in wanted.items() if _read(config, key) != value}


def _read(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _candidates(
    config: RunConfig, values: Mapping[str, Any], machine: Machine, offloads: Iterable[str]
) -> list[tuple[Way, bool]]:
    """Every way with one of `offloads`, and whether it is worth its memory."""
    shapes = shapes_of(values)
    variants = (variant for offload in offloads for variant in _variants(config, values, machine, offload))
    return [way for variant in variants for way in _ways(variant, shapes, machine)]


def _variants(
    config: RunConfig, values: Mapping[str, Any], machine: Machine, offload: str
) -> Iterator[tuple[RunConfig, str]]:
    """The recipe under each engine and storage of the base that it allows: (recipe, Engine.kind)."""
    stored_quantised = values.get("quantization_config") is not None
    changes = ("bf16", "nf4", "int8") if config.model.weights != "fp32" and not stored_quantised else ()
    for weights in dict.fromkeys((config.model.weights, *changes)):
        for name, engine in _ENGINES.items():
            alone = ("fsdp-full", "zero-3") if offload in ("base", "both") else ("single",)
            if (name in alone) < (machine.ranks == 1) or (name == "single") > (machine.ranks == 1):
                continue
            if name == "fsdp-hybrid" and machine.nodes == 1:
                continue
            variant = config.model_copy(
                update={
                    "model": config.model.model_copy(update={"weights": weights}),
                    "engine": type(config.engine).model_validate(
                        engine | {"context_parallel": config.engine.context_parallel, "offload": offload}
                    ),
                }
            )
            same_as_full = name == "fsdp-trainable" and config.adapter.kind == "none"
            if not refusals(variant) and not same_as_full:
                yield variant, name


def _ways(variant: tuple[RunConfig, str], shapes: ModelShapes, machine: Machine) -> Iterator[tuple[Way, bool]]:
    """Each way, and whether it is worth its memory: whole gradients are if they are faster."""
    config, engine = variant
    training = training_of(config, shapes)
    placement = replace(_placement(engine, machine), offload=config.engine.offload)
    once = replace(placement, reduce="step") if engine.startswith("fsdp") else None
    state = state_bytes(training, placement)
    for micro_batch in _micro_batches(config, machine):
        for checkpointing in POLICIES:
            if checkpointing == "selective" and not shapes.has_mlp_everywhere:
                continue
            way = _predict(config, training, placement, state, machine, micro_batch, checkpointing)
            yield way, True
            if once is not None:
                other = _predict(config, training, once, state, machine, micro_batch, checkpointing)
                yield other, other.time.total < way.time.total


def placement_of(config: RunConfig, machine: Machine) -> Placement:
    """The recipe's engine on all of `machine`."""
    engine = config.engine
    return replace(_placement(_engine_name(config, machine), machine), reduce=engine.reduce, offload=engine.offload)


def _placement(engine: str, machine: Machine) -> Placement:
    shard_ranks = machine.node_devices if engine == "fsdp-hybrid" else machine.ranks
    return Placement(engine, machine.ranks, shard_ranks, machine.node_devices)  # type: ignore[arg-type]


def _predict(
    config: RunConfig,
    training: Training,
    placement: Placement,
    state: StateBytes,
    machine: Machine,
    micro_batch: int,
    checkpointing: Policy,
) -> Way:
    blocks = config.batch.global_tokens // config.data.seq_len
    parts = config.engine.context_parallel
    accumulation = blocks // (machine.ranks // parts * micro_batch)
    step = RankStep(config.data.seq_len, micro_batch, accumulation, checkpointing, parts)
    memory = peak_memory(training, placement, state, step)
    time = step_time(training, placement, machine.device, machine.network, step)
    rate = config.batch.global_tokens / time.total
    work = token_work(training, step.seq_len)
    waiting = _host_bytes(training, placement, state, step)
    by_slices = why_whole(config, placement.kind) is None
    host = host_state(training, placement, state)
    loading = (
        loading_bytes(training, placement.shard_ranks, host.frozen + host.trainable)
        if by_slices
        else (loading_bytes(training, 1))
    )
    return Way(
        engine=placement.kind,
        reduce=placement.reduce,
        offload=placement.offload,
        ranks=placement.ranks,
        weights=training.weights,
        checkpointing=checkpointing,
        micro_batch=micro_batch,
        accumulation=accumulation,
        memory=memory,
        host_bytes=waiting,
        loading_bytes=loading,
        time=time,
        tokens_per_second=rate,
        mfu=rate / machine.ranks * work.model_flops / machine.device.peak,
        fits=_fits(machine, max(memory.total, loading), waiting),
    )


def _fits(machine: Machine, device_bytes: int, host_bytes: int) -> bool:
    """Whether a rank's bytes fit its device, and those of a node's ranks its host, where its memory is known."""
    if machine.host_bytes == 0:
        device_bytes += host_bytes
    elif machine.host_bytes and machine.node_devices * host_bytes > USABLE_FRACTION * machine.host_bytes:
        return False
    return device_bytes <= USABLE_FRACTION * machine.device.memory_bytes


def _host_bytes(training: Training, placement: Placement, state: StateBytes, step: RankStep) -> int:
    kept = sum(vars(host_state(training, placement, state)).values())
    kept += host_gradient_bytes(training, placement, step.accumulation)
    return kept + host_bytes(training, step.recompute) * step.micro_batch_tokens


def _micro_batches(config: RunConfig, machine: Machine) -> list[int]:
    """The divisors of a rank's sequences per step."""
    blocks = config.batch.global_tokens // config.data.seq_len
    parts = config.engine.context_parallel
    if machine.ranks % parts:
        raise ConfigError(
            f"engine.context_parallel {parts} does not divide {machine.ranks} ranks",
            remedy="use a divisor of the number of ranks",
        )
    readers = machine.ranks // parts
    if blocks % readers:
        multiple = readers * config.data.seq_len
        nearest = max(1, round(config.batch.global_tokens / multiple)) * multiple
        raise ConfigError(
            f"batch.global_tokens {config.batch.global_tokens} is {blocks} sequences of {config.data.seq_len}, "
            f"which do not divide by {machine.ranks} ranks{f' / context_parallel {parts}' if parts > 1 else ''}",
            remedy=f"use a multiple of {multiple}, such as --set batch.global_tokens={nearest}",
        )
    share = blocks // readers
    return [number for number in range(1, share + 1) if share % number == 0]


def _own(config: RunConfig, machine: Machine) -> tuple[str, str, str, str, str, int]:
    """(engine, `_settings`) of the recipe as it is."""
    engine = config.engine
    how = engine.reduce, engine.offload, config.model.weights, engine.activation_checkpointing
    return _engine_name(config, machine), *how, config.batch.micro_batch


def _settings(way: Way) -> tuple[str, str, str, str, int]:
    return way.reduce, way.offload, way.weights, way.checkpointing, way.micro_batch


def _engine_name(config: RunConfig, machine: Machine) -> str:
    """As `Engine.kind`."""
    engine = config.engine
    kind: str = engine.kind
    if kind == "auto":
        kind = "single" if machine.ranks == 1 and not engine.offloads("base") else "fsdp"
    if kind == "single":
        return kind
    return f"zero-{engine.stage or 3}" if kind == "zero" else f"fsdp-{engine.shard or 'full'}"
