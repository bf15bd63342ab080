"""The engine that `auto` is on this machine, and at the end what the plan predicted beside what was measured."""

from __future__ import annotations

import statistics
from dataclasses import asdict, replace
from typing import Any

import torch

from dist_cpt.config.schema import EngineConfig, RunConfig
from dist_cpt.errors import ConfigError
from dist_cpt.model.base_model import with_vocabulary_size
from dist_cpt.plan.calibrate import calibrated
from dist_cpt.plan.choose import chosen_engine, is_concrete, plain_engine, predicted
from dist_cpt.plan.devices import Machine, machine_here
from dist_cpt.plan.plan import Way, model_config
from dist_cpt.run_folder.json_files import rows_or_problem
from dist_cpt.run_folder.names import METRICS, PLAN
from dist_cpt.runtime.collectives import on_rank_zero
from dist_cpt.runtime.log import LOGGER
from dist_cpt.train.attempt import RunContext
from dist_cpt.train.build import Run, TrainingData

TAIL_BYTES = 1 << 20  # of metrics.jsonl: a thousand steps or more
WARM_STEPS = 2  # of an attempt, not measured


def settle_engine(context: RunContext, data: TrainingData) -> RunContext:
    """The context with a concrete engine, the same on all ranks; recipe.yaml keeps `auto` for the next start.

    Collective.
    """
    if is_concrete(context.config.engine):
        return context
    config = with_vocabulary_size(context.config, data.prepared.vocab_size)

    def choose() -> dict[str, Any]:
        try:
            engine = chosen_engine(config, model_config(config), _machine(context))
        except ConfigError as error:
            LOGGER.info("engine: no plan for this model (%s)", error.message)
            engine = plain_engine(config.engine, context.env.world_size)
        return engine.model_dump(mode="json")

    engine = EngineConfig.model_validate(on_rank_zero("engine", choose))
    LOGGER.info(
        "engine: %s", ", ".join(f"{key} {value}" for key, value in engine.model_dump(exclude_none=True).items())
    )
    return replace(context, config=context.config.model_copy(update={"engine": engine}))


def write_prediction(run: Run) -> None:
    """Write plan.json: memory and speed of this attempt, predicted and measured. Collective."""
    context, state_bytes = run.context, run.engine.sharded_bytes()

    def write() -> None:
        config = with_vocabulary_size(context.config, run.data.prepared.vocab_size)
        measured = _measured(context) | {"state_bytes": state_bytes}
        content = {"attempt": context.attempt, "engine": run.engine.kind, "measured": measured}
        context.claim.write(PLAN, content | _prediction(config, _machine(context)))

    on_rank_zero("plan", write)


def _prediction(config: RunConfig, machine: Machine) -> dict[str, Any]:
    device = {"device": machine.device.name, "source": machine.device.source, "ranks": machine.ranks}
    try:
        way: Way = predicted(config, model_config(config), machine)
    except Exception as error:  # an odd config.json must not fail a run that is done
        return {"machine": device, "predicted": None, "why_not": str(error)}
    values = {"tokens_per_second": way.tokens_per_second, "step_seconds": way.time.total, "mfu": way.mfu}
    memory = asdict(way.memory) | {"total": way.memory.total}
    return {"machine": device, "predicted": values | {"memory_bytes": memory, "loading_bytes": way.loading_bytes}}


def _measured(context: RunContext) -> dict[str, Any]:
    rows = rows_or_problem(context.folder / METRICS, [], TAIL_BYTES)
    rows = [row for row in rows if row.get("attempt") == context.attempt]
    timed = [row for row in rows[WARM_STEPS:] or rows if not row.get("skipped")]
    if not timed:
        return {"steps": 0}
    seconds = statistics.median(row["step_seconds"] for row in timed)
    return {
        "steps": len(timed),
        "step_seconds": seconds,
        "tokens_per_second": context.config.batch.global_tokens / seconds,
        "peak_bytes": round(max(row["memory_gib"] for row in rows) * 2**30),
        "peak_of": "CUDA allocated" if context.device.type == "cuda" else "resident set, libraries included",
    }


def _machine(context: RunContext) -> Machine:
    env, name, memory = context.env, None, 0
    if context.device.type == "cuda":
        device = torch.cuda.get_device_properties(context.device)
        name, memory = device.name, device.total_memory
    machine = machine_here(name, memory, env.world_size, env.local_world_size)
    return replace(machine, device=calibrated(machine.device))
