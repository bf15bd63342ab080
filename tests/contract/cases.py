"""What runs on every rank of the contract suite; every function returns plain numbers or CPU tensors."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib.metadata
import math
import resource
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from dist_cpt.data.batch import Batch
from dist_cpt.engines import activation_checkpoint
from dist_cpt.engines.build import build_engine, kind_of
from dist_cpt.engines.engine import InspectableEngine, StepStats
from dist_cpt.errors import DistCptError
from dist_cpt.model.context_parallel import HeadExchange
from dist_cpt.model.load import load_model, why_base_is_whole
from dist_cpt.optim.groups import ParamGroup, param_groups
from dist_cpt.runtime.collectives import over_group
from dist_cpt.runtime.mesh import context_group
from tests.contract.compare import State
from tests.contract.model import VOCAB, batches, block, num_tokens, recipe
from tests.contract.reference import gradients_of, learning_rates, reference_run
from tests.packed_models import LENGTHS, blocks, build

CPU = torch.device("cpu")
M_MMAP_THRESHOLD = -3  # malloc.h


@contextmanager
def running(
    base: str, engine: dict[str, Any], variant: str, weights: str, by_slices: bool = True
) -> Iterator[tuple[InspectableEngine, list[ParamGroup]]]:
    """An engine of this rank, closed afterwards; `by_slices` where that is possible."""
    config = recipe(base, engine, variant, weights)
    by_slices = by_slices and why_base_is_whole(config, kind_of(config.engine, dist.get_world_size())) is None
    model = load_model(config, device=CPU, by_slices=by_slices)
    groups = param_groups(model.trainable, config.optim, config.adapter.kind == "lora")
    built = build_engine(model.module, model.trainable, groups, model.layers, config, CPU, model.unread)
    del model
    try:
        yield built, groups
    finally:
        built.close()
        del built
        gc.collect()


def accumulate(engine: InspectableEngine, step: int, poisoned_rank: int | None = None, num_parts: int = 1) -> None:
    """A step's micro-batches; the last one of `poisoned_rank` gets a NaN scale."""
    mine = batches(step, dist.get_rank(), dist.get_world_size(), num_parts)
    for number, batch in enumerate(mine):
        last = number == len(mine) - 1
        poisoned = last and poisoned_rank == dist.get_rank()
        tokens: Any = float("nan") if poisoned else num_tokens(step)
        engine.accumulate(batch, tokens, last)


def train_step(
    engine: InspectableEngine,
    groups: list[ParamGroup],
    step: int,
    poisoned_rank: int | None = None,
    spike_limit: float = math.inf,
) -> StepStats:
    """One step, read."""
    accumulate(engine, step, poisoned_rank)
    return engine.step(learning_rates(groups, step), spike_limit).read()


def train(engine: InspectableEngine, groups: list[ParamGroup], first: int, last: int) -> list[float]:
    """Loss sums and gradient norms of the steps first..last, none of which may be skipped."""
    numbers: list[float] = []
    for step in range(first, last + 1):
        stats = train_step(engine, groups, step)
        assert not stats.skipped
        numbers += numbers_of(step, stats)
    return numbers


def numbers_of(step: int, stats: StepStats) -> list[float]:
    """The loss sum and the gradient norm."""
    return [stats.loss * num_tokens(step), stats.grad_norm]


def snapshot(engine: InspectableEngine) -> State:
    """The whole training state on every rank; owners rotate, so that every rank sends and owns."""
    ranks = dist.get_world_size()
    owners: dict[str, int] = {}

    def owner(kind: str, name: str) -> int:
        return owners.setdefault(f"{kind}.{name}", len(owners) % ranks)

    exported = list(engine.export_state(owner))
    mine = {f"{e.kind}.{e.name}": e.values for e in exported if e.values is not None}
    assert all((owners[f"{e.kind}.{e.name}"] == dist.get_rank()) == (e.values is not None) for e in exported)
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def restore(engine: InspectableEngine, state: State, step: int) -> None:
    """Import `state`, checking that no rank reads outside a tensor."""

    def read(kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        flat = state[f"{kind}.{name}"].reshape(-1)
        assert 0 <= start < stop <= flat.numel()
        return flat[start:stop]

    engine.import_state(read, step)


def on_rank_0(value: Any) -> Any:
    """The value on rank 0 only: it is the same on every rank."""
    return value if dist.get_rank() == 0 else None


def reference(base: str, variant: str, steps: int) -> Any:
    """The reference run and, after it, a loss sum and logits."""
    config = recipe(base, {"kind": "single"}, variant, "fp32", kernels="reference")
    model = load_model(config, device=CPU)
    groups = param_groups(model.trainable, config.optim, config.adapter.kind == "lora")
    record = reference_run(model.module, model.trainable, groups, config, steps)
    held_out = block(999, 0)
    with torch.no_grad():
        _, loss = model.module(
            held_out.input_ids, held_out.position_ids, held_out.cu_seqlens, held_out.max_seqlen, held_out.labels
        )
        one_document = (torch.arange(7)[None], torch.tensor([0, 7], dtype=torch.int32), 7)
        logits = model.module(held_out.input_ids[:, :7], *one_document)
    return record, float(loss), logits


def against_reference(base: str, engine: dict[str, Any], variant: str, steps: int) -> Any:
    """Loss sums, gradient norms, probes before each step, and a loss sum and logits after the last one."""
    losses, norms, probes = [], [], []
    with running(base, engine, variant, "fp32") as (built, groups):
        for step in range(1, steps + 1):
            accumulate(built, step, num_parts=engine.get("context_parallel", 1))
            probes.append(built.gradient_probe())
            stats = built.step(learning_rates(groups, step)).read()
            assert not stats.skipped
            losses.append(stats.loss * num_tokens(step))
            norms.append(stats.grad_norm)
        held_out = block(999, 0)
        return losses, norms, probes, float(built.evaluate(held_out)), built.logits(held_out.input_ids[:, :7])


def train_from(
    base: str, engine: dict[str, Any], variant: str, state: State | None, first: int, last: int, weights: str = "bf16"
) -> Any:
    """Import `state` of step first - 1 if given, read it back, train: (state as read back, numbers, state after)."""
    with running(base, engine, variant, weights) as (built, groups):
        if state is not None:
            restore(built, state, first - 1)
        before = snapshot(built)
        numbers = train(built, groups, first, last)
        return on_rank_0((before, numbers, snapshot(built)))


def resume_twice(base: str, engine: dict[str, Any], variant: str, half: int) -> Any:
    """2 x half steps in one go; half, export, import into a fresh engine, half; and the same import into the
    engine that has already trained on: (numbers and state of each)."""
    with running(base, engine, variant, "bf16") as (built, groups):
        train(built, groups, 1, half)
        middle = snapshot(built)
        loss_then = float(built.evaluate(block(999, 0)))
        unbroken = train(built, groups, half + 1, 2 * half), snapshot(built)
        built.evaluate(block(999, 0))  # may leave gathered copies behind
        restore(built, middle, half)
        assert float(built.evaluate(block(999, 0))) == loss_then, "compute copies are stale after an import"
        rewound = train(built, groups, half + 1, 2 * half), snapshot(built)
    with running(base, engine, variant, "bf16") as (built, groups):
        restore(built, middle, half)
        resumed = train(built, groups, half + 1, 2 * half), snapshot(built)
    return on_rank_0((unbroken, resumed, rewound))


def poisoned(base: str, engine: dict[str, Any], variant: str, weights: str) -> Any:
    """Two good steps, one with a NaN on the last rank alone, one good step; and the same without the bad one."""
    bad_rank = dist.get_world_size() - 1
    with running(base, engine, variant, weights) as (built, groups):
        train(built, groups, 1, 2)
        before = snapshot(built)
        stats = train_step(built, groups, 3, poisoned_rank=bad_rank)
        after = snapshot(built)
        with_bad = train(built, groups, 3, 4), snapshot(built)
    with running(base, engine, variant, weights) as (built, groups):
        train(built, groups, 1, 2)
        without = train(built, groups, 3, 4), snapshot(built)
    return stats, on_rank_0((before, after, with_bad, without))


def over_the_limit(base: str, engine: dict[str, Any], variant: str, weights: str) -> Any:
    """Two good steps, one whose loss is over its limit, two good ones whose losses are not; and the same without the
    dropped one and without limits."""
    with running(base, engine, variant, weights) as (built, groups):
        train(built, groups, 1, 2)
        before = snapshot(built)
        dropped = train_step(built, groups, 3, spike_limit=1.0)
        after = snapshot(built)
        kept = [train_step(built, groups, step, spike_limit=100.0) for step in (3, 4)]
        with_dropped = [n for s, one in zip((3, 4), kept, strict=True) for n in numbers_of(s, one)], snapshot(built)
    with running(base, engine, variant, weights) as (built, groups):
        train(built, groups, 1, 2)
        without = train(built, groups, 3, 4), snapshot(built)
    assert dropped.skipped
    assert dropped.loss == kept[0].loss  # read all the same
    return on_rank_0((before, after, with_dropped, without))


def snapshot_while_training(base: str, engine: dict[str, Any], variant: str) -> Any:
    """(state at the snapshot, the snapshot exported on another thread while two steps run; then the same again)."""
    group = dist.new_group(backend="gloo")
    results = []
    with running(base, engine, variant, "bf16") as (built, groups):
        train(built, groups, 1, 2)
        for step in (3, 5):
            direct = snapshot(built)
            export = built.snapshot()
            copied: list[Any] = []

            def work(export: Any = export, copied: list[Any] = copied) -> None:
                with over_group(group):
                    mine = export(lambda kind, name: hash_of(kind + name) % dist.get_world_size())
                    copied.append({f"{e.kind}.{e.name}": e.values for e in mine if e.values is not None})

            thread = threading.Thread(target=work)
            thread.start()
            train(built, groups, step, step + 1)
            thread.join()
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, copied[0])
            results.append((direct, {key: value for part in parts for key, value in part.items()}))
    return on_rank_0(results)


def hash_of(text: str) -> int:
    """The same number on every rank."""
    return zlib.crc32(text.encode())


def bytes_per_rank(base: str, engine: dict[str, Any], variant: str) -> dict[str, int]:
    """sharded_bytes after a step."""
    with running(base, engine, variant, "bf16") as (built, groups):
        train(built, groups, 1, 1)
        return built.sharded_bytes()


def elements_read(base: str, engine: dict[str, Any], variant: str) -> tuple[int, int]:
    """(elements that this rank asks for in an import, elements of the whole state)."""
    asked = 0

    def read(kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        nonlocal asked
        asked += stop - start
        return torch.zeros(stop - start)

    with running(base, engine, variant, "bf16") as (built, _):
        whole = sum(tensor.numel() for tensor in snapshot(built).values())
        built.import_state(read, 1)
    return asked, whole


def failing_import(base: str, engine: dict[str, Any], failing_rank: int) -> str:
    """The error each rank sees when one rank's read fails half way, as `class: message`."""
    calls = 0

    def read(kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if dist.get_rank() == failing_rank and calls == 3:
            raise OSError("disk went away")
        return torch.zeros(stop - start)

    with running(base, engine, "lora", "bf16") as (built, _):
        try:
            built.import_state(read, 1)
        except DistCptError as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def linear_after(base: str, engine: dict[str, Any]) -> str:
    """The module of `torch.nn.functional.linear` after an engine was closed."""
    with running(base, engine, "lora", "bf16"):
        pass
    return torch.nn.functional.linear.__module__


def frozen_is_untouched(base: str, engine: dict[str, Any], weights: str) -> tuple[int, list[str]]:
    """(frozen tensors, those whose local values five steps and two evaluations did not leave as they were)."""
    with running(base, engine, "lora", weights) as (built, groups):
        before = {name: tensor.clone() for name, tensor in built.frozen_tensors()}
        built.evaluate(block(999, 0))
        train(built, groups, 1, 5)
        built.evaluate(block(999, 0))
        after = dict(built.frozen_tensors())
        assert after.keys() == before.keys()
        return len(before), [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]


def reductions(base: str, engine: dict[str, Any], variant: str) -> tuple[int, int, list[float]]:
    """(reduce-scatters in a step, its micro-batches on this rank, loss sums and gradient norms of three steps)."""
    count = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal count
            count += function.overloadpacket.__name__ == "_reduce_scatter_base_"
            return function(*args, **(kwargs or {}))

    with running(base, engine, variant, "fp32") as (built, groups):
        with Count():
            numbers = train(built, groups, 1, 1)
        return count, len(batches(1, dist.get_rank(), dist.get_world_size())), numbers + train(built, groups, 2, 3)


def first_moments(base: str, engine: dict[str, Any], variant: str, weights: str = "fp32") -> Any:
    """By name, after one step."""
    with running(base, engine, variant, weights) as (built, groups):
        accumulate(built, 1, num_parts=engine.get("context_parallel", 1))
        assert not built.step(learning_rates(groups, 1), math.inf).read().skipped
        return on_rank_0({name: t for name, t in snapshot(built).items() if name.startswith("exp_avg.")})


def sums_of_magnitudes(base: str, variant: str) -> dict[str, torch.Tensor]:
    """By name, the sum of the blocks' |gradient| in the first step: what rounding errors are proportional to."""
    model = load_model(recipe(base, {"kind": "single"}, variant, "fp32", kernels="reference"), device=CPU)
    return gradients_of(model.module, model.trainable, 1)[2]


def in_tiles(base: str, engine: dict[str, Any], variant: str) -> Any:
    """(loss sums and gradient norms, state, collectives of a micro-batch by name) of three steps whose MLPs compute
    whole, and in tiles of 6 tokens."""
    runs = []
    for tile in (activation_checkpoint.TILE_TOKENS, 6):
        with mock.patch.object(activation_checkpoint, "TILE_TOKENS", tile):
            calls = collectives(base, engine, variant)
            with running(base, engine, variant, "fp32") as (built, groups):
                runs.append((train(built, groups, 1, 3), snapshot(built), calls))
    return on_rank_0(runs)


def collectives(base: str, engine: dict[str, Any], variant: str) -> dict[str, int]:
    """How often each collective of torch.distributed is called in a step's first micro-batch, by name."""
    calls = exchanged(base, engine, variant)
    return {name: len(sizes) for name, sizes in calls.items()}


def exchanged(base: str, engine: dict[str, Any], variant: str) -> dict[str, list[int]]:
    """The collectives of torch.distributed in a step's first micro-batch: by name the elements of each one's input."""
    calls: dict[str, list[int]] = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == "c10d":
                elements = args[1].numel() if isinstance(args[1], torch.Tensor) else 0
                calls.setdefault(function.overloadpacket.__name__, []).append(elements)
            return function(*args, **(kwargs or {}))

    with running(base, engine, variant, "bf16") as (built, _), Count():
        mine = batches(1, dist.get_rank(), dist.get_world_size(), engine.get("context_parallel", 1))
        built.accumulate(mine[0], num_tokens(1), False)
    return calls


def kept_of_a_long_block(base: str, engine: dict[str, Any], length: int) -> int:
    """Bytes that the forward of one block of `length` tokens in 8 documents keeps on this rank for the backward."""
    num_parts, size = engine.get("context_parallel", 1), length // 8
    ids = torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(0))
    borders = torch.arange(0, length + 1, size, dtype=torch.int32)
    counts = np.array([[1, length, length]])
    whole = Batch(ids, ids.roll(-1, 1), torch.arange(length)[None] % size, borders, size, length, counts, (0,))
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with running(base, engine, "lora", "fp32") as (built, _):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            built.accumulate(whole.cut(dist.get_rank() % num_parts, num_parts), length, False)
        return sum(storage.nbytes() for storage in kept.values())


def cut_and_whole(kind: str, choice: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(whole on one rank, sum of the parts on all) of the loss and of every gradient, for an architecture."""
    _, module = build(kind, choice)
    ids, position_ids, cu_seqlens, labels = blocks()
    sums = []
    for num_parts in (1, dist.get_world_size()):
        module.exchange = HeadExchange(context_group(num_parts)) if num_parts > 1 else None
        part = dist.get_rank() % num_parts
        my_ids, my_positions, my_labels = (x.chunk(num_parts, dim=1)[part] for x in (ids, position_ids, labels))
        module.zero_grad()
        borders = cu_seqlens, max(map(max, LENGTHS))
        scaled, loss = module(my_ids, my_positions, *borders, my_labels, num_parts=num_parts)
        scaled.backward()
        sums.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
        sums[-1]["loss"] = loss.detach().clone()
    for tensor in sums[1].values():
        dist.all_reduce(tensor)
    return {name: (whole, sums[1][name]) for name, whole in sums[0].items()}


def whole_weights(
    base: str, engine: dict[str, Any], variant: str, num_bytes: dict[str, int]
) -> tuple[dict[str, str], dict[str, int]]:
    """(sha256, bytes) of every master and every frozen tensor before a step, put together from the ranks' parts.

    What exceeds `num_bytes` is the padding of the last part.
    """
    with running(base, engine, variant, "bf16") as (built, _):
        whole = {n: as_bytes(tensor) for n, tensor in snapshot(built).items() if n.startswith("master.")}
        for name, local in built.frozen_tensors():
            parts: list[Any] = [as_bytes(local)]
            if name.endswith((".weight", ".bias", "_proj")) and built.kind in (
                "fsdp-full",
                "zero-3",
            ):  # scales are everywhere
                parts = [None] * dist.get_world_size()
                dist.all_gather_object(parts, as_bytes(local))
            whole[name] = torch.cat(parts)[: num_bytes.get(name)]
    digests = {name: hashlib.sha256(values.numpy().tobytes()).hexdigest() for name, values in whole.items()}
    return digests, {name: len(values) for name, values in whole.items()}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [bytes]."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def refusal(base: str, engine: dict[str, Any], deepspeed_version: str | None = "0.19.8") -> str:
    """Why an engine is not built, as `class: message`; `deepspeed_version` is the installed version to report."""

    def version(name: str) -> str:
        if name != "deepspeed":
            return real_version(name)
        if deepspeed_version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return deepspeed_version

    real_version = importlib.metadata.version
    importlib.metadata.version = version
    try:
        with running(base, engine, "lora", "bf16"):
            return "built"
    except DistCptError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        importlib.metadata.version = real_version


def on_host(base: str, engine: dict[str, Any]) -> dict[str, bool]:
    """Whether the sharding library keeps the frozen base, and what the optimizer has, in host memory."""
    with running(base, engine, "lora", "bf16") as (built, groups):
        train(built, groups, 1, 1)
        if engine["kind"] == "zero":
            zero: Any = getattr(built, "_zero")  # noqa: B009 - only checks read it
            assert {flat.device.type for flat in zero.fp32_partitioned_groups_flat} == {"cpu"}
            return {"base": zero.offload_param, "optimizer": zero.offload_optimizer}
        units: Any = getattr(built, "_units")  # noqa: B009
        groups_of_units = [group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups]
        found = {
            (parameter.sharded_param.requires_grad, parameter.offload_to_cpu)
            for group in groups_of_units
            for parameter in group.fsdp_params
        }
        assert len(found) == 2, found
        return {{True: "optimizer", False: "base"}[trains]: waits for trains, waits in found}


def kind_of_auto(base: str) -> str:
    """The engine that `auto` means at this world size."""
    with running(base, {"kind": "auto"}, "lora", "bf16") as (built, _):
        return built.kind


def first_step(base: str, engine: dict[str, Any], variant: str) -> Any:
    """In bf16: the state before any step, and the gradients of step 1."""
    with running(base, engine, variant, "bf16") as (built, _):
        before = snapshot(built)
        accumulate(built, 1)
        return on_rank_0((before, built.gradient_probe()))


def peak_of_building(base: str, engine: dict[str, Any], variant: str, by_slices: bool = True) -> int:
    """Bytes by which this process grew at most, over what it had before, while a model was loaded and sharded."""
    with running(base, engine, variant, "bf16", by_slices):  # what only the first time needs
        pass
    give_memory_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before = memory_of_process("VmRSS")
    with running(base, engine, variant, "bf16", by_slices):
        return memory_of_process("VmHWM") - before


def step_under_a_limit(base: str, engine: dict[str, Any], variant: str, room: int) -> str:
    """Load, shard and train on one block while this process may take `room` bytes (RLIMIT_DATA) more than it has.

    "trained", or the error of memory that is not given.
    """
    give_memory_back()
    unlimited = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_of_process("VmData") + room, unlimited[1]))
    try:
        with running(base, engine, variant, "fp32") as (built, groups):
            built.accumulate(batches(1, dist.get_rank(), dist.get_world_size())[0], num_tokens(1), True)
            assert math.isfinite(built.step(learning_rates(groups, 1)).read().loss)
        return "trained"
    except (MemoryError, RuntimeError, DistCptError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, unlimited)


def give_memory_back() -> None:
    """From now on malloc takes tensors from the system and gives them back, so that what is in use can be measured."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    libc.malloc_trim(0)


def memory_of_process(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024
