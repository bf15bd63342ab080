"""From the recipe's engine section to an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dist_cpt.config.schema import EngineConfig, RunConfig
from dist_cpt.engines.activation_checkpoint import checkpoint_layers
from dist_cpt.engines.engine import InspectableEngine
from dist_cpt.model.base_weights import UnreadBase
from dist_cpt.model.context_parallel import HeadExchange
from dist_cpt.model.loss import CausalLMForLoss
from dist_cpt.optim.groups import ParamGroup
from dist_cpt.plan.choose import plain_engine
from dist_cpt.runtime.collectives import world_size
from dist_cpt.runtime.mesh import context_group


def build_engine(
    module: CausalLMForLoss,
    trainable: Mapping[str, nn.Parameter],
    groups: Sequence[ParamGroup],
    layers: Sequence[nn.Module],
    config: RunConfig,
    device: torch.device,
    unread: UnreadBase | None = None,
) -> InspectableEngine:
    """The engine of `config.engine` around `module`, which it takes over. Collective.

    `trainable` are the module's trainable fp32 parameters by canonical name; `groups` list each of them once; `layers`
    are the decoder layers, the units of sharding and of recomputation. `unread` are the placeholders of `module`, which
    the engine reads.

    Raises:
        MissingExtraError: engine.kind is zero and deepspeed is not installed.
        ConfigError: the engine does not fit the world size or the installed deepspeed, or its
            activation_checkpointing the model.
    """
    if config.engine.context_parallel > 1:
        module.exchange = HeadExchange(context_group(config.engine.context_parallel))
    config = config.model_copy(update={"engine": resolve_auto(config.engine, world_size())})
    if config.engine.activation_checkpointing not in ("none", "auto"):
        tokens = config.batch.micro_batch * config.data.seq_len // config.engine.context_parallel
        checkpoint_layers(layers, config.engine.activation_checkpointing, device, tokens)
    if config.engine.kind == "single":
        from dist_cpt.engines.single import SingleEngine

        return SingleEngine(module, trainable, groups, config, device)
    if config.engine.kind == "fsdp":
        from dist_cpt.engines.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(module, trainable, groups, layers, config, device, unread)
    from dist_cpt.engines.zero import ZeroEngine

    return ZeroEngine(module, trainable, groups, config, device, unread)


def kind_of(engine: EngineConfig, ranks: int) -> str:
    """The kind, as `Engine.kind`, of the engine that `build_engine` builds on `ranks`."""
    engine = resolve_auto(engine, ranks)
    return engine.kind if engine.kind == "single" else f"{engine.kind}-{engine.shard or engine.stage}"


def resolve_auto(engine: EngineConfig, ranks: int) -> EngineConfig:
    """`engine` with kind, stage and shard set, where no plan has chosen them."""
    engine = plain_engine(engine, ranks)
    if engine.kind == "fsdp" and engine.shard is None:
        return engine.model_copy(update={"shard": "full"})
    if engine.kind == "zero" and engine.stage is None:
        return engine.model_copy(update={"stage": 3})
    return engine
