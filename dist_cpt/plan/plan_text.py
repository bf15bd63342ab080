"""A plan as text and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from dist_cpt.config.exclusions import shown
from dist_cpt.config.schema import RunConfig
from dist_cpt.plan.devices import Machine
from dist_cpt.plan.model_check import count
from dist_cpt.plan.plan import Plan, Way, recipe_patch

SHOWN = 12  # ways in the table
_HEAD = f"{'tokens/s':>10} {'per GPU':>8} {'MFU':>5} {'step':>9} {'memory':>8}  way"


def as_json(config: RunConfig, plan: Plan, recipe: str) -> dict[str, Any]:
    """Everything: each way with its memory and time by part; `best` with its patch and command."""
    best = plan.ways[0] if plan.ways else None
    return {
        "measured": False,
        "model_type": plan.shapes.model_type,
        "parameters": plan.shapes.num_parameters,
        "trainable": plan.training.num_trained,
        "machine": {
            "device": asdict(plan.machine.device),
            "nodes": plan.machine.nodes,
            "gpus_per_node": plan.machine.node_devices,
            "network_bytes_per_second": plan.machine.network,
        },
        "ways": [_way_json(way) for way in plan.ways],
        "too_large": [_way_json(way) for way in plan.too_large],
        "recipe": None if plan.own is None else _way_json(plan.own),
        "best": None
        if best is None
        else {"set": recipe_patch(config, best), "launch": launch_line(config, best, plan.machine, recipe)},
    }


def as_text(config: RunConfig, plan: Plan, recipe: str) -> Iterator[str]:
    """Lines: the machine, the fastest micro-batch of each way, the recipe's own, the patch and the command."""
    machine, shapes = plan.machine, plan.shapes
    gpus = f"{machine.nodes} x {machine.node_devices}" if machine.nodes > 1 else str(machine.node_devices)
    yield (
        f"{config.name}: {shapes.model_type}, {count(shapes.num_parameters)} parameters, "
        f"{count(plan.training.num_trained)} trainable, on {gpus} x {machine.device.name}"
    )
    yield "by the model of a step (docs/performance.md), not measured; " + machine.device.source
    yield f"a step is {config.batch.global_tokens:,} tokens: {_blocks(config)} sequences of {config.data.seq_len:,}"
    if not plan.ways:
        yield f"nothing fits in {_gb(machine.device.memory_bytes)}; the smallest:"
        yield _HEAD
        yield from map(_row, list(_best_micro_batches(plan.too_large))[:SHOWN])
        yield "use more GPUs, larger ones, --set model.weights=nf4, or a shorter data.seq_len"
        return
    shown_ways = list(_best_micro_batches(plan.ways))
    yield _HEAD
    yield from map(_row, shown_ways[:SHOWN])
    more = [f"{len(shown_ways) - SHOWN} slower ways"] if len(shown_ways) > SHOWN else []
    more += [f"{len(plan.ways) - len(shown_ways)} other micro-batches"] if len(plan.ways) > len(shown_ways) else []
    if more:
        yield f"and {' and '.join(more)} that fit: --json"
    best = plan.ways[0]
    yield f"memory of the fastest: {_parts(best)}"
    yield f"step of the fastest: {_times(best)}"
    yield f"the recipe as it is: {_own(config, plan)}"
    yield from _settings(config, best)
    yield launch_line(config, best, machine, recipe)


def launch_line(config: RunConfig, way: Way, machine: Machine, recipe: str) -> str:
    """The command that runs the recipe that way."""
    words = ["dist-cpt", "launch", recipe, "--procs-per-node", str(machine.node_devices)]
    if machine.nodes > 1:
        words += ["--on", "slurm", "--nodes", str(machine.nodes)]
    for key, value in recipe_patch(config, way).items():
        words += ["--set", f"{key}={shown(value)}"]
    return shlex.join(words)


def _settings(config: RunConfig, way: Way) -> Iterator[str]:
    patch = recipe_patch(config, way)
    yield "the fastest, as changes of the recipe:" if patch else "the recipe is the fastest as it is"
    yield from (f"  --set {key}={shown(value)}" for key, value in patch.items())


def _best_micro_batches(ways: Iterable[Way]) -> Iterator[Way]:
    """The first micro-batch of each engine, reduction, storage and checkpointing."""
    seen = set()
    for way in ways:
        key = (way.engine, way.reduce, way.offload, way.weights, way.checkpointing)
        if key not in seen:
            seen.add(key)
            yield way


def _row(way: Way) -> str:
    rate = f"{way.tokens_per_second:10,.0f} {way.tokens_per_second / way.ranks:8,.0f} {way.mfu:5.0%}"
    return f"{rate} {_seconds(way.time.total):>9} {_gb(way.peak_bytes):>8}  {_name(way)}"


def _name(way: Way) -> str:
    return f"{way.engine}, {way.weights}, micro-batch {way.micro_batch} x {way.accumulation}{way.options}"


def _own(config: RunConfig, plan: Plan) -> str:
    if plan.own is None:
        named = f"its engine, or micro_batch {config.batch.micro_batch}"
        return f"not predicted: {named} is no way on {plan.machine.ranks} ranks"
    if not plan.own.fits:
        return f"does not fit, {_gb(plan.own.peak_bytes)} ({_name(plan.own)})"
    return f"{plan.own.tokens_per_second:,.0f} tokens/s, {_gb(plan.own.peak_bytes)} ({_name(plan.own)})"


def _parts(way: Way) -> str:
    parts = {name: size for name, size in vars(way.memory).items() if size}
    text = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    host = f"; in host memory {way.host_bytes / 1e9:.1f}" if way.host_bytes else ""
    return f"{text} GB; while loading {way.loading_bytes / 1e9:.1f}{host}"


def _times(way: Way) -> str:
    return ", ".join(f"{name} {seconds / way.time.total:.1%}" for name, seconds in vars(way.time).items() if seconds)


def _way_json(way: Way) -> dict[str, Any]:
    values = asdict(way)
    values["memory_bytes"] = {**values.pop("memory"), "total": way.memory.total}
    values["seconds"] = {**values.pop("time"), "total": way.time.total}
    return values


def _blocks(config: RunConfig) -> int:
    return config.batch.global_tokens // config.data.seq_len


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
