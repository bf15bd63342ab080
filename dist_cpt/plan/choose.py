"""What `auto` in a recipe's engine becomes on a machine, and what the model of a step predicts for the recipe as it is.

A base that fits is replicated and nothing is recomputed that fits: of the ways that fit, the fastest by the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dist_cpt.config.exclusions import refusals
from dist_cpt.config.schema import EngineConfig, RunConfig
from dist_cpt.plan.devices import Machine
from dist_cpt.plan.memory import OFFLOADS
from dist_cpt.plan.plan import Way, predict
from dist_cpt.plan.recomputation import POLICIES
from dist_cpt.plan.shapes import shapes_of

AUTO = "auto"
REDUCE = ("micro_batch", "step")  # engine.reduce


def is_concrete(engine: EngineConfig) -> bool:
    """Whether nothing is left to choose."""
    return AUTO not in (engine.kind, engine.activation_checkpointing)


def chosen_engine(config: RunConfig, values: Mapping[str, Any], machine: Machine) -> EngineConfig:
    """`config.engine` without `auto`: the fastest way that fits, else the smallest; `values` as in `make_plan`.

    Raises:
        ConfigError: the model is not known, or a step's sequences do not divide by the ranks.
    """
    shapes, ways = shapes_of(values), list[tuple[Way, EngineConfig]]()
    first = config.engine.offload
    others = OFFLOADS[1:] if config.engine.kind == AUTO and first == "none" else ()  # if nothing else fits
    for offloads in ((first,), others):
        engines = [engine for offload in offloads for engine in _candidates(config, machine.ranks, offload)]
        engines = [engine for engine in engines if not refusals(_with(config, engine))]
        found = [(predict(_with(config, engine), shapes, machine), engine) for engine in engines]
        if fitting := [way for way in found if way[0].fits]:
            return max(fitting, key=lambda way: way[0].tokens_per_second)[1]
        ways += found
    if not ways:  # the recipe excludes each of them, and is refused where it is built
        return plain_engine(config.engine, machine.ranks)
    return min(ways, key=lambda way: way[0].peak_bytes)[1]


def predicted(config: RunConfig, values: Mapping[str, Any], machine: Machine) -> Way:
    """The recipe as it is; errors as `chosen_engine`."""
    return predict(config, shapes_of(values), machine)


def plain_engine(engine: EngineConfig, ranks: int) -> EngineConfig:
    """`engine` without `auto` where no plan can be made: everything sharded, nothing recomputed."""
    update: dict[str, Any] = {}
    if engine.kind == AUTO:
        alone = ranks == 1 and not engine.offloads("base")
        update = {"kind": "single"} if alone else {"kind": "fsdp", "shard": "full"}
    if engine.activation_checkpointing == AUTO:
        update["activation_checkpointing"] = "none"
    return engine.model_copy(update=update)


def _candidates(config: RunConfig, ranks: int, offload: str) -> Iterator[EngineConfig]:
    """The first of equally fast ones is taken."""
    engine = config.engine
    kinds: list[dict[str, Any]] = [{}]
    if engine.kind == AUTO:
        shards = (["trainable"] if config.adapter.kind == "lora" else []) + ["full"]
        sharded = [{"kind": "fsdp", "shard": shard, "reduce": how} for shard in shards for how in REDUCE]
        alone = {"kind": "fsdp", "shard": "full"} if offload in ("base", "both") else {"kind": "single"}
        kinds = [alone] if ranks == 1 else sharded
    chosen = engine.activation_checkpointing
    for policy in POLICIES if chosen == AUTO else (chosen,):
        for kind in kinds:
            yield engine.model_copy(update=kind | {"activation_checkpointing": policy, "offload": offload})


def _with(config: RunConfig, engine: EngineConfig) -> RunConfig:
    return config.model_copy(update={"engine": engine})
