from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from dist_cpt.checkpoint.plan_files import model_index, owners, plan_files
from dist_cpt.checkpoint.quick_check import manifest_problems, quick_check
from dist_cpt.errors import CheckpointError
from dist_cpt.run_folder.checkpoints import read_manifest
from dist_cpt.run_folder.json_files import canonical_json
from dist_cpt.run_folder.manifest import Manifest, manifest_from_bytes, manifest_to_bytes
from dist_cpt.run_folder.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST
from dist_cpt.run_folder.train_state import state_from_bytes, state_to_bytes
from dist_cpt.training_state import STATE_KINDS, TensorSpec
from tests.checkpoint_state import EMBED, FULL_SPECS, HEAD, SPECS, save_step, train_state


def bytes_by_rank(specs: tuple[TensorSpec, ...], world_size: int, adapter: bool) -> list[int]:
    load = [0] * world_size
    sizes = {spec.name: 4 * math.prod(spec.shape) for spec in specs}
    for (_, name), rank in owners(specs, world_size, adapter).items():
        load[rank] += sizes[name]
    return load


def test_owners_cover_everything_and_balance_by_bytes() -> None:
    specs = tuple(TensorSpec(f"w{i}", (64 + i, 32), "bfloat16", "weights") for i in range(24))
    for world_size in (1, 2, 4, 8):
        assert len(owners(specs, world_size, False)) == 72
        load = bytes_by_rank(specs, world_size, False)
        assert max(load) - min(load) <= 4 * 88 * 32  # one tensor


def test_an_adapter_lies_on_rank_0_and_its_moments_fill_up_the_others() -> None:
    specs = tuple(TensorSpec(f"w{i}", (64, 32), "bfloat16", "adapter") for i in range(12))
    placed = owners(specs, 3, True)
    assert {rank for (kind, _), rank in placed.items() if kind == "master"} == {0}
    assert bytes_by_rank(specs, 3, True) == [12 * 64 * 32 * 4] * 3
    assert placed == owners(specs, 3, True)


def test_files_are_numbered_over_the_ranks_that_own_any() -> None:
    files = plan_files(FULL_SPECS, {}, owners(FULL_SPECS, 4, False), False)
    assert [file.name for file in files] == sorted(file.name for file in files)
    written = {tensor for file in files for tensor in file.tensors.values()}
    assert written == {(kind, spec.name) for spec in FULL_SPECS for kind in STATE_KINDS}
    weight_map = json.loads(model_index(files, FULL_SPECS, {}))["weight_map"]
    assert weight_map.keys() == {spec.name for spec in FULL_SPECS}
    assert all(name.startswith("model-0000") and name.endswith(".safetensors") for name in weight_map.values())


def test_an_alias_is_a_second_key_in_the_adapter_file_only() -> None:
    files = plan_files(SPECS, {HEAD: EMBED}, owners(SPECS, 2, True), True)
    holding = [file.name for file in files if HEAD in file.tensors]
    assert holding == [ADAPTER_WEIGHTS]
    assert files[0].tensors[HEAD] == files[0].tensors[EMBED] == ("master", EMBED)


def test_any_changed_byte_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    raw = (save_step(tmp_path, 3).path / MANIFEST).read_bytes()
    assert manifest_to_bytes(manifest_from_bytes(raw)) == raw
    for index in range(0, len(raw), 7):
        changed = bytearray(raw)
        changed[index] ^= 1 << (index % 8)
        with pytest.raises(CheckpointError, match=MANIFEST):
            manifest_from_bytes(bytes(changed))
    for cut in (0, 1, len(raw) // 2, len(raw) - 1):
        with pytest.raises(CheckpointError, match=MANIFEST):
            manifest_from_bytes(raw[:cut])


def rewrite_manifest(path: Path, **changes: object) -> None:
    """A manifest with other content whose own sha256 is right."""
    import hashlib

    content = json.loads((path / MANIFEST).read_bytes())["content"] | changes
    outer = {"content": content, "sha256": hashlib.sha256(canonical_json(content)).hexdigest()}
    (path / MANIFEST).write_bytes(canonical_json(outer))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "a\\b", "", "./a", "a//b"])
def test_file_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    path = save_step(tmp_path, 3).path
    entry = {"num_bytes": 1, "sha256": "0" * 64}
    rewrite_manifest(path, files={name: entry})
    assert repr(name) in quick_check(path)[0]


def test_an_unknown_format_is_refused_by_number(tmp_path: Path) -> None:
    path = save_step(tmp_path, 3).path
    rewrite_manifest(path, format_version=3)
    with pytest.raises(CheckpointError, match=r"format 3\b.*\b1 and 2\b"):
        read_manifest(path)


def test_an_incomplete_manifest_is_named_part_by_part(tmp_path: Path) -> None:
    path = save_step(tmp_path, 3).path
    content = json.loads((path / MANIFEST).read_bytes())["content"]
    rewrite_manifest(path, tensors=content["tensors"] + content["tensors"][:1])
    assert any(content["tensors"][0]["name"] in problem for problem in quick_check(path))
    del content["tensors"][0]["file"]["exp_avg"]
    del content["files"][ADAPTER_CONFIG]
    rewrite_manifest(path, tensors=content["tensors"], files=content["files"])
    problems = "\n".join(quick_check(path))
    assert f"exp_avg.{content['tensors'][0]['name']}" in problems
    assert ADAPTER_CONFIG in problems
    rewrite_manifest(path, tensors=[])
    assert any(problem.endswith("tensors") for problem in quick_check(path))


def test_the_state_is_the_same_after_a_round_trip() -> None:
    state = train_state(100, attempt=2)
    assert state_from_bytes(state_to_bytes(state)) == state
    for raw in (b"", b"[]", b'{"step": 1}', state_to_bytes(state).replace(b'"step": 100', b'"step": -1')):
        with pytest.raises(CheckpointError, match=r"state\.json"):
            state_from_bytes(raw)


def lines_run(function: Callable[[], object]) -> int:
    """Lines of Python that a call executes: the work it does, whatever the machine."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


class Compared(str):
    """A name whose comparisons run a line of Python."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_the_checks_of_a_manifest_grow_no_faster_than_it(tmp_path: Path) -> None:
    manifest = read_manifest(save_step(tmp_path, 1).path)

    def with_tensors(count: int) -> Manifest:
        names = [Compared(f"w{i}") for i in range(count)]
        tensors = tuple(manifest.tensors[0].model_copy(update={"name": name}) for name in names)
        aliases = {f"alias{i}": Compared(f"w{i}") for i in range(count)}
        return manifest.model_copy(update={"tensors": tensors, "aliases": aliases})

    few, many = (lines_run(lambda n=n: manifest_problems(with_tensors(n))) for n in (100, 400))
    assert many < 5 * few
