from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_cpt.checkpoint.certificate import ReplayedLoss, certify
from dist_cpt.checkpoint.load import load
from dist_cpt.checkpoint.verify import verify_run
from dist_cpt.errors import CheckpointError
from dist_cpt.run_folder.manifest import Manifest
from dist_cpt.run_folder.names import STATE
from dist_cpt.training_state import STATE_KINDS
from tests.checkpoint_state import LORA_A, SPECS, ShardedState, save_step


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    with load(save_step(tmp_path, 5).path) as checkpoint:
        return checkpoint.manifest


def certificate(manifest: Manifest, state: ShardedState, **changes: Any) -> dict[str, Any]:
    facts = {"next_block_ids": ([40, 41], [40, 41]), "schedule": ({"kind": "cosine"}, {"kind": "cosine"})}
    arguments: dict[str, Any] = {
        "facts": facts | {"random": ([7, 5], [7, 5])} | changes.pop("facts", {}),
        "loss": ReplayedLoss(2.0, changes.pop("replayed_loss", 2.0), tolerance=1e-5),
    }
    return certify(manifest, state.export_state(lambda kind, name: 0), **(arguments | changes))


def test_the_same_state_passes_every_check(manifest: Manifest) -> None:
    result = certificate(manifest, ShardedState(5))
    assert (result["verdict"], result["failed"], result["step"]) == ("pass", [], 5)
    assert [check["name"] for check in result["checks"]] == [
        "trainable_names",
        *STATE_KINDS,
        "next_block_ids",
        "schedule",
        "random",
        "replayed_loss",
    ]
    assert result["checks"][1]["detail"].startswith("3 of 3 ")


@pytest.mark.parametrize("kind", STATE_KINDS)
def test_one_bit_of_one_tensor_fails_its_check(manifest: Manifest, kind: Any) -> None:
    state = ShardedState(5)
    tensor = state.parts[kind, LORA_A]
    tensor[1, 2] = torch.nextafter(tensor[1, 2], torch.tensor(9.0))
    result = certificate(manifest, state)
    assert (result["verdict"], result["failed"]) == ("fail", [kind])
    detail = next(check["detail"] for check in result["checks"] if check["name"] == kind)
    assert LORA_A in detail


def test_a_tensor_that_may_differ_is_counted(manifest: Manifest) -> None:
    """`tolerates` is called only where the hash differs; a tensor it does not tolerate fails."""
    state = ShardedState(5)
    differing: list[tuple[str, str]] = []
    for kind, name in (("exp_avg", LORA_A), ("exp_avg_sq", LORA_A), ("master", LORA_A)):
        state.parts[kind, name][0, 0] += 1.0

    def tolerates(kind: str, name: str, values: torch.Tensor) -> bool:
        assert torch.equal(values, state.parts[kind, name])
        differing.append((kind, name))
        return kind == "exp_avg"

    result = certificate(manifest, state, tolerates=tolerates)
    details = {check["name"]: check["detail"] for check in result["checks"]}
    assert sorted(differing) == [("exp_avg", LORA_A), ("exp_avg_sq", LORA_A), ("master", LORA_A)]
    assert result["failed"] == ["master", "exp_avg_sq"]
    assert details["exp_avg"].startswith("2 of 3 ")
    assert LORA_A in details["exp_avg_sq"]


def test_lost_moments_fail_though_the_loss_agrees(manifest: Manifest) -> None:
    state = ShardedState(5)
    for spec in SPECS:
        for kind in ("exp_avg", "exp_avg_sq"):
            state.parts[kind, spec.name].zero_()
    assert certificate(manifest, state)["failed"] == ["exp_avg", "exp_avg_sq"]


def test_a_missing_or_reordered_tensor_fails_by_name(manifest: Manifest) -> None:
    result = certificate(manifest, ShardedState(5, SPECS[:2]))
    assert result["failed"] == ["trainable_names", *STATE_KINDS]
    assert SPECS[2].name in result["checks"][0]["detail"]
    assert certificate(manifest, ShardedState(5, SPECS[::-1]))["failed"] == ["trainable_names"]


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"facts": {"next_block_ids": ([40, 41], [40, 42])}}, "next_block_ids"),
        ({"facts": {"next_block_ids": ([40, 41], [41, 40])}}, "next_block_ids"),
        ({"facts": {"next_block_ids": (list(range(20)), list(range(1, 21)))}}, "next_block_ids"),
        ({"replayed_loss": 2.0001}, "replayed_loss"),
        ({"replayed_loss": float("nan")}, "replayed_loss"),
        ({"facts": {"random": ([7, 5], [7, 6])}}, "random"),
    ],
)
def test_other_data_another_loss_or_other_facts_fail(manifest: Manifest, changes: dict[str, Any], failed: str) -> None:
    assert certificate(manifest, ShardedState(5), **changes)["failed"] == [failed]


def test_a_run_is_verified_checkpoint_by_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        verify_run(tmp_path)
    good, bad = (save_step(tmp_path, step).path for step in (1, 2))
    (bad / STATE).unlink()
    problems = verify_run(tmp_path)
    assert list(problems) == [bad.name, good.name]
    assert problems[good.name] == []
    assert [problem.split()[0] for problem in problems[bad.name]] == [STATE]
