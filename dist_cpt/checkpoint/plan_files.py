"""Which rank writes which tensor into which file, and which one reads it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dist_cpt.run_folder.json_files import canonical_json
from dist_cpt.run_folder.manifest import Manifest
from dist_cpt.run_folder.names import ADAPTER_WEIGHTS, MODEL_BUFFERS
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
    free.sort(key=lambda item: (-item[0], item[1]))
    ranks = _balanced([size for size, _, _ in free], [in_one_file] + [0] * (world_size - 1))
    return placed | {key: rank for (_, _, key), rank in zip(free, ranks, strict=True)}


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
    """The files that each rank reads, each file on one rank, balanced by bytes."""
    largest_first = sorted(manifest.files, key=lambda name: (-manifest.files[name].num_bytes, name))
    files: list[list[str]] = [[] for _ in range(world_size)]
    ranks = _balanced([manifest.files[name].num_bytes for name in largest_first], [0] * world_size)
    for name, rank in zip(largest_first, ranks, strict=True):
        files[rank].append(name)
    return files


def reading_order(manifest: Manifest, world_size: int) -> list[tuple[int, StateKind, str]]:
    """(reader, kind, name) of every tensor: each rank goes through its files, all at one pace in bytes."""
    tensors: dict[str, list[tuple[TensorKey, int]]] = {name: [] for name in manifest.files}
    for tensor in manifest.tensors:
        for kind in STATE_KINDS:
            tensors[tensor.file[kind]].append(((kind, tensor.name), math.prod(tensor.shape)))
    turns: list[tuple[int, int, TensorKey]] = []
    for rank, files in enumerate(files_by_rank(manifest, world_size)):
        elements_before = 0
        for key, elements in (one for name in files for one in tensors[name]):
            turns.append((elements_before, rank, key))
            elements_before += elements
    return [(rank, kind, name) for _, rank, (kind, name) in sorted(turns, key=lambda turn: turn[:2])]


def model_index(files: Iterable[PlannedFile], specs: Sequence[TensorSpec], buffers: Mapping[str, int]) -> bytes:
    """model.safetensors.index.json as transformers reads it; `buffers` has the bytes of those in MODEL_BUFFERS."""
    weight_map = {key: file.name for file in files for key, (kind, _) in file.tensors.items() if kind == "master"}
    total = sum(math.prod(spec.shape) for spec in specs)
    metadata = {"total_parameters": total, "total_size": 4 * total + sum(buffers.values())}
    return canonical_json({"metadata": metadata, "weight_map": weight_map | dict.fromkeys(buffers, MODEL_BUFFERS)})


def _balanced(sizes: Iterable[int], loads: Sequence[int]) -> list[int]:
    """The rank of each size, largest first: greedily that with the least load so far, beginning with `loads`."""
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    ranks = []
    for size in sizes:
        load, rank = heap[0]
        ranks.append(rank)
        heapq.heapreplace(heap, (load + size, rank))
    return ranks


def _numbered(stem: str, by_rank: dict[int, dict[str, TensorKey]]) -> list[PlannedFile]:
    return [
        PlannedFile(f"{stem}-{number:05d}-of-{len(by_rank):05d}.safetensors", rank, by_rank[rank])
        for number, rank in enumerate(sorted(by_rank), start=1)
    ]
