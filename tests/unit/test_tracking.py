"""TensorBoard's files, and what W&B is told of endings, dropped steps, forgetting and checkpoints."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest

from dist_cpt.config.schema import WandbConfig
from dist_cpt.errors import MissingExtraError
from dist_cpt.run_folder.records import CheckpointRecord, EvaluationRecord, RunEnd
from dist_cpt.train.tensorboard import tensorboard_observer
from dist_cpt.train.wandb import wandb_observer
from tests.wandb_session import record, start

EVALUATED = EvaluationRecord(3, "law", "domain", 2.0, 7.39, 100, 0)


def test_tensorboard_reads_the_rows_and_a_resume_hides_what_it_trains_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, resumed_from in ((0, None), (2, "step-00000002")):
        observer = tensorboard_observer(tmp_path)
        observer.on_start(start(tmp_path, first_step=first_step, resumed_from=resumed_from))
        for step in range(first_step + 1, first_step + 4):
            observer.on_step(record(step, math.nan if step == 1 else 10.0 * first_step + step))
        observer.on_evaluation(replace(EVALUATED, step=first_step + 3))
        observer.on_end(RunEnd(0, "done", first_step + 3))
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    losses = {event.step: event.value for event in found.Scalars("train/loss")}
    assert losses == {2: 2.0, 3: 23.0, 4: 24.0, 5: 25.0}  # step 1 is not a number, step 3 is of the resume
    assert [event.step for event in found.Scalars("lr/adapter")] == [1, 2, 3, 4, 5]
    assert [event.step for event in found.Scalars("eval/law/perplexity")] == [5]


def test_tensorboard_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"track\.tensorboard .*pip install 'dist-cpt\[tensorboard\]'"):
        tensorboard_observer(tmp_path)


def told(folder: Path, *, checkpoints: bool = False, alerts: bool = True) -> bytes:
    """What an offline run of W&B kept of a run that drops two steps, forgets, saves, and stops."""
    (folder / "checkpoints/step-00000003").mkdir(parents=True)
    (folder / "checkpoints/step-00000003/adapter_model.safetensors").write_bytes(b"weights of our own")
    said: list[str] = []
    config = WandbConfig(mode="offline", checkpoints=checkpoints, alerts=alerts)
    observer = wandb_observer(config, folder, "0a1b2c3d", said.append)
    assert observer is not None
    observer.on_start(start(folder))
    for step in (1, 2):
        observer.on_step(record(step, math.nan))
    for loss in (2.01, 2.5, 2.6):
        observer.on_evaluation(replace(EVALUATED, name="general", role="retention", loss=loss, base_loss=2.0))
    observer.on_checkpoint(CheckpointRecord(3, "step-00000003", 0.1, 10, 0.1))
    observer.on_end(RunEnd(75, "SIGTERM: stopped and saved at step 3", 3))
    assert len(said) == 1, said  # where the offline run is
    (log,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    return log.read_bytes()


def test_wandb_is_told_once_of_each_kind_of_trouble_and_where_checkpoints_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    folder = tmp_path / "told"
    content = told(folder, checkpoints=True)
    assert content.count(b"step dropped") == 1
    assert b"step 1: loss nan" in content
    assert content.count(b"forgetting general") == 1
    assert b"is 0.500 nats above that under the base" in content
    assert b"stopped and saved" in content
    assert f"file://{folder}/checkpoints/step-00000003".encode() in content
    kept = (path for path in (folder / "wandb").rglob("*") if path.is_file())
    assert not any(b"weights of our own" in path.read_bytes() for path in kept)
    silent = told(tmp_path / "silent", alerts=False)
    assert not any(text in silent for text in (b"step dropped", b"forgetting general", b"0a1b2c3d-checkpoint"))
