"""What runs on every rank of the contract suite. Each function returns plain numbers or CPU tensors."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from dist_cpt.config.schema import RunConfig
from dist_cpt.engines.build import build_engine
from dist_cpt.engines.engine import STATE_KINDS, Engine
from dist_cpt.optim.groups import ParamGroup, param_groups
from tests.contract.model import Model, batches, build_model, num_tokens, recipe
from tests.contract.reference import learning_rates, reference_run

State = dict[str, torch.Tensor]  # "kind.name" -> full fp32 tensor
CPU = torch.device("cpu")


def make(variant: str, config: RunConfig, **options: Any) -> tuple[Model, list[ParamGroup]]:
    """The tiny model of a variant and its groups."""
    model = build_model(config, tied=variant == "lora-tied", **options)
    return model, param_groups(model.trainable, config.optim, config.adapter.kind == "lora")


@contextmanager
def running(engine: Any, variant: str, weights: str, **options: Any) -> Iterator[tuple[Engine, list[ParamGroup], Model]]:
    """An engine of this rank, closed afterwards."""
    config = recipe(engine, variant, weights, **options.pop("engine_options", {}))
    model, groups = make(variant, config, **options)
    built = build_engine(model.module, model.trainable, groups, model.layers, config, CPU)
    try:
        yield built, groups, model
    finally:
        built.close()
        del built, model
        gc.collect()


def train_step(engine: Engine, groups: list[ParamGroup], step: int, poison: int | None = None) -> tuple[float, Any]:
    """(global loss sum, GradStats) of one step; `poison` is the rank whose last micro-batch turns to NaN."""
    local = torch.zeros(())
    mine = batches(step, dist.get_rank(), dist.get_world_size())
    for number, batch in enumerate(mine):
        last = number == len(mine) - 1
        tokens = float("nan") if last and poison == dist.get_rank() else num_tokens(step)
        local += engine.accumulate(batch, tokens, last)  # type: ignore[arg-type]
    stats = engine.step(learning_rates(groups, step))
    dist.all_reduce(local)
    return float(local), stats


def snapshot(engine: Engine) -> State:
    """The whole training state on rank 0, owners rotating so that every rank has to send; {} elsewhere."""
    names: list[str] = []
    ranks = dist.get_world_size()

    def owner(kind: str, name: str) -> int:
        if f"{kind}.{name}" not in names:
            names.append(f"{kind}.{name}")
        return names.index(f"{kind}.{name}") % ranks

    mine = {f"{e.kind}.{e.name}": e.values for e in engine.export_state(owner) if e.values is not None}
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def restore(engine: Engine, state: State, step: int) -> None:
    """Import, checking that no rank reads outside a tensor."""

    def read(kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        flat = state[f"{kind}.{name}"].reshape(-1)
        assert 0 <= start < stop <= flat.numel()
        return flat[start:stop]

    engine.import_state(read, step)


def reference(variant: str, steps: int) -> Any:
    config = recipe({"kind": "single"}, variant)
    model, groups = make(variant, config)
    return reference_run(model, groups, config, steps)


def losses_and_gradients(engine: Any, variant: str, steps: int, **engine_options: Any) -> Any:
    """(loss sums, gradient norms, the probe before each step) of an fp32 run."""
    losses, norms, probes = [], [], []
    with running(engine, variant, "fp32", engine_options=engine_options) as (built, groups, _):
        for step in range(1, steps + 1):
            mine = batches(step, dist.get_rank(), dist.get_world_size())
            local = torch.zeros(())
            for number, batch in enumerate(mine):
                local += built.accumulate(batch, num_tokens(step), number == len(mine) - 1)
            probes.append(built.gradient_probe())
            stats = built.step(learning_rates(groups, step))
            assert not stats.skipped
            dist.all_reduce(local)
            losses.append(float(local))
            norms.append(stats.grad_norm)
    return losses, norms, probes


def train_and_export(
    engine: Any, variant: str, weights: str, first: int, last: int, state: State | None, read_back: bool = False
) -> Any:
    """Import `state` (of step first - 1) if given, train steps first..last, return losses, norms and the state.

    `read_back` returns the state as exported right after the import.
    """
    with running(engine, variant, weights) as (built, groups, _):
        if state is not None:
            restore(built, state, first - 1)
        if read_back:
            return snapshot(built) if dist.get_rank() == 0 else snapshot(built) and None
        record = [train_step(built, groups, step) for step in range(first, last + 1)]
        assert not any(stats.skipped for _, stats in record)
        whole = snapshot(built)
        return [loss for loss, _ in record], [s.grad_norm for _, s in record], whole if dist.get_rank() == 0 else None


assert STATE_KINDS == ("master", "exp_avg", "exp_avg_sq")
