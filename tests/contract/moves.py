"""One training state through a checkpoint on the disk from any engine and world size to any other."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_cpt.checkpoint.certificate import ReplayedLoss, certify
from dist_cpt.checkpoint.load import load, newest_valid, require_fit
from dist_cpt.checkpoint.plan_files import owners
from dist_cpt.checkpoint.save import RunCheckpoints, save
from dist_cpt.engines.engine import Engine
from dist_cpt.optim.eight_bit import within_half_step
from dist_cpt.optim.groups import ParamGroup
from dist_cpt.run_folder.manifest import Identity
from dist_cpt.run_folder.train_state import Probe, Randomness, TrainState
from dist_cpt.runtime.collectives import broadcast_json
from dist_cpt.training_state import StateKind, TensorSpec
from tests.claimed import claimed
from tests.contract.cases import on_rank_0, running, train
from tests.contract.engines import ENGINES, WORLDS
from tests.contract.model import FULL

BEFORE, AFTER = 3, 5  # steps before the move and after it
Cell = tuple[str, int]
CELLS: list[Cell] = [(engine, ranks) for engine in ENGINES for ranks in WORLDS[engine]]
# and what limits how far a loss may be off: the order of fp32 sums, bf16 products, 8-bit moments in other blocks
VARIANTS = {"lora-only": "fp32", "lora": "fp32", "nf4": "nf4", "full": "fp32", "8bit": "8bit"}
IDENTITY = Identity({"path": "base"}, {"sha256": "0" * 64}, "0" * 64, "engine")


def name_of(cell: Cell) -> str:
    """`zero-3 x 4`."""
    return f"{cell[0]} x {cell[1]}"


def move_all(pool: Callable[[int], Any], base: str, variant: str, cells: list[Cell], folder: Path) -> dict[Any, Any]:
    """{(origin, target): (failed checks, relative loss difference, relative norm difference, master drift)}."""
    options = {"base": base, "variant": variant, "weights": "nf4" if variant == "nf4" else "fp32"}
    unbroken = {
        (engine, ranks): pool(ranks).run(
            "tests.contract.moves:leave", engine=ENGINES[engine], folder=str(folder / f"{engine}-{ranks}"), **options
        )[0]
        for engine, ranks in cells
    }
    folders = {f"{engine} {ranks}": str(folder / f"{engine}-{ranks}") for engine, ranks in cells}
    results: dict[Any, Any] = {}
    for engine, ranks in cells:
        [arrived, *_] = pool(ranks).run(
            "tests.contract.moves:arrive", engine=ENGINES[engine], folders=folders, **options
        )
        for origin in cells:
            failed, numbers, drift = arrived[f"{origin[0]} {origin[1]}"]
            loss, norm = (difference(numbers[i::2], unbroken[origin][i::2]) for i in (0, 1))
            results[origin, (engine, ranks)] = failed, loss, norm, drift
    return results


def difference(got: list[float], want: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))


def leave(base: str, engine: dict[str, Any], variant: str, weights: str, folder: str) -> Any:
    """Train, save, train on and save the end: the losses and gradient norms of the later steps."""
    with running(base, engine, variant, weights) as (built, groups):
        train(built, groups, 1, BEFORE)
        _save(built, groups, variant, Path(folder), BEFORE)
        numbers = train(built, groups, BEFORE + 1, BEFORE + AFTER)
        _save(built, groups, variant, Path(folder) / "end", BEFORE + AFTER)
        return on_rank_0(numbers)


def arrive(base: str, engine: dict[str, Any], variant: str, weights: str, folders: dict[str, str]) -> Any:
    """For every origin: (checks that failed, later losses and norms, largest master difference at the end over the
    largest change of that tensor in these steps)."""
    arrived: dict[str, Any] = {}
    with running(base, engine, variant, weights) as (built, groups):
        specs = _specs(built, groups)
        for origin, folder in folders.items():
            path, skipped = newest_valid(Path(folder))
            assert path is not None
            assert not skipped
            with load(path, verified=True) as checkpoint:
                require_fit(checkpoint.manifest, specs, IDENTITY)
                built.import_state(checkpoint.read, checkpoint.state.optimizer_steps, checkpoint.reading_order())
                same_place = origin == f"{built.kind} {dist.get_world_size()}"
                certificate = _certify(built, specs, variant, checkpoint, same_place)
            numbers = train(built, groups, BEFORE + 1, BEFORE + AFTER)
            drift = _drift(built, Path(folder))
            arrived[origin] = certificate["failed"], numbers, drift
    return on_rank_0(arrived)


def _specs(engine: Engine, groups: list[ParamGroup]) -> list[TensorSpec]:
    exported = engine.export_state(lambda kind, name: 0, ("master",))
    sizes = broadcast_json(
        [[tensor.name, tuple(tensor.values.shape)] for tensor in exported if tensor.values is not None]
    )
    shapes = {name: tuple(shape) for name, shape in sizes}
    return [TensorSpec(name, shapes[name], "bf16", group.name) for group in groups for name in group.names]


def _save(engine: Engine, groups: list[ParamGroup], variant: str, folder: Path, step: int) -> None:
    adapter = variant not in FULL
    run = RunCheckpoints(
        claimed(folder),
        _specs(engine, groups),
        IDENTITY,
        adapter,
        sidecars=[lambda path: (path / ("adapter_config.json" if adapter else "config.json")).write_text("{}")],
    )
    state = TrainState(
        step=step,
        position=8 * step,
        tokens=step,
        tokens_by_source={},
        skipped_total=0,
        random=Randomness(seed=0, step=step),
        schedule={},
        wandb_run_id="moves",
        attempt=0,
        optimizer_steps=step,
        next_block_ids=(),
        probe=Probe(block_ids=(), loss=0.0),
    )
    save(run, engine.export_state, state)


def _certify(
    engine: Engine, specs: list[TensorSpec], variant: str, checkpoint: Any, same_place: bool
) -> dict[str, Any]:
    def close(kind: StateKind, name: str, values: torch.Tensor) -> bool:
        return kind != "master" and within_half_step(
            kind, values.reshape(-1), checkpoint.read(kind, name, 0, values.numel())
        )

    placed = owners(specs, dist.get_world_size(), variant not in FULL)
    return certify(
        checkpoint.manifest,
        engine.export_state(lambda kind, name: placed[kind, name]),
        facts={},
        loss=ReplayedLoss(recorded=0.0, replayed=0.0, tolerance=0.0),
        tolerates=close if variant == "8bit" and not same_place else None,
    )


def _drift(engine: Engine, folder: Path) -> float:
    """Largest |master - master of the unbroken run|, over the largest change of that tensor since the move."""
    worst = 0.0
    start, _ = newest_valid(folder)
    end, _ = newest_valid(folder / "end")
    assert start is not None
    assert end is not None
    with load(start, verified=True) as before, load(end, verified=True) as after:
        for tensor in engine.export_state(lambda kind, name: 0, ("master",)):
            if tensor.values is None:
                continue
            size = tensor.values.numel()
            flat = tensor.values.reshape(-1)
            unbroken = after.read("master", tensor.name, 0, size)
            moved = float((unbroken - before.read("master", tensor.name, 0, size)).abs().max())
            worst = max(worst, float((flat - unbroken).abs().max()) / moved if moved else math.inf)
    over_ranks = torch.tensor([worst], dtype=torch.float64)
    dist.all_reduce(over_ranks, op=dist.ReduceOp.MAX)
    return float(over_ranks)
