"""Which rank writes which tensor into which file, and which one reads it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from dist_cpt.run_folder.json_files import canonical_json
from dist_cpt.run_folder.manifest import Manifest
from dist_cpt.run_folder.names import ADAPTER_WEIGHTS
from dist_cpt.training_state import STATE_KINDS, StateKind, TensorKey, TensorSpec

Owners = dict[TensorKey, int]


@dataclass(frozen=True)
class PlannedFile:
    """A tensor file, the rank that writes it, and the tensor under each key of the file."""

    name: str
    owner: int
    tensors: dict[str, TensorKey]


def owners(specs: Sequence[TensorSpec], world_size: int, adapter: bool) -> Owners:
    """The rank that writes each tensor: rank 0 for an adapter's masters (one file), the rest balanced by bytes.

    Greedy, largest first to the least loaded rank; the same result on every rank.
    """
    placed: Owners = {}
    in_one_file = 0  # elements
    free: list[tuple[int, int, TensorKey]] = []
    for index, spec in enumerate(specs):
        for kind in STATE_KINDS:
            if adapter and kind == "master":
                placed[kind, spec.name] = 0
                in_one_file += math.prod(spec.shape)
            else:
                free.append((math.prod(spec.shape), index, (kind, spec.name)))
    load = [(in_one_file if rank == 0 else 0, rank) for rank in range(world_size)]
    heapq.heapify(load)
    for size, _, key in sorted(free, key=lambda item: (-item[0], item[1])):
        elements, rank = load[0]
        placed[key] = rank
        heapq.heapreplace(load, (elements + size, rank))
    return placed


def plan_files(
    specs: Sequence[TensorSpec], aliases: Mapping[str, str], placed: Owners, adapter: bool
) -> list[PlannedFile]:
    """The tensor files of a checkpoint: one model file and one optimizer file per rank that owns any."""
    second_keys: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        second_keys.setdefault(name, []).append(alias)
    model: dict[int, dict[str, TensorKey]] = {}
    optimizer: dict[int, dict[str, TensorKey]] = {}
    for spec in specs:
        for kind in STATE_KINDS:
            rank = placed[kind, spec.name]
            if kind == "master":
                for key in (spec.name, *second_keys.get(spec.name, [])):
                    model.setdefault(rank, {})[key] = (kind, spec.name)
            else:
                optimizer.setdefault(rank, {})[f"{kind}.{spec.name}"] = (kind, spec.name)
    if adapter:
        return [PlannedFile(ADAPTER_WEIGHTS, 0, model[0]), *_numbered("optimizer", optimizer)]
    return [*_numbered("model", model), *_numbered("optimizer", optimizer)]


def files_by_rank(manifest: Manifest, world_size: int) -> list[list[str]]:
    """The files that each rank reads, each file on one rank, the largest spread first."""
    largest_first = sorted(manifest.files, key=lambda name: (-manifest.files[name].num_bytes, name))
    return [largest_first[rank::world_size] for rank in range(world_size)]


def reading_order(manifest: Manifest, world_size: int) -> list[tuple[int, StateKind, str]]:
    """(reader, kind, name) of every tensor: each rank goes through its files one by one, and the ranks take turns."""
    tensors: dict[str, list[TensorKey]] = {name: [] for name in manifest.files}
    for tensor in manifest.tensors:
        for kind in STATE_KINDS:
            tensors[tensor.file[kind]].append((kind, tensor.name))
    queues = [[key for name in files for key in tensors[name]] for files in files_by_rank(manifest, world_size)]
    turns = zip_longest(*queues)
    return [(rank, key[0], key[1]) for turn in turns for rank, key in enumerate(turn) if key is not None]


def model_index(files: Iterable[PlannedFile], specs: Sequence[TensorSpec]) -> bytes:
    """model.safetensors.index.json as transformers reads it."""
    weight_map = {key: file.name for file in files for key, (kind, _) in file.tensors.items() if kind == "master"}
    total = sum(math.prod(spec.shape) for spec in specs)
    metadata = {"total_parameters": total, "total_size": 4 * total}
    return canonical_json({"metadata": metadata, "weight_map": weight_map})


def _numbered(stem: str, by_rank: dict[int, dict[str, TensorKey]]) -> list[PlannedFile]:
    return [
        PlannedFile(f"{stem}-{number:05d}-of-{len(by_rank):05d}.safetensors", rank, by_rank[rank])
        for number, rank in enumerate(sorted(by_rank), start=1)
    ]
