"""A recipe of ten steps for tests of what displays and records them."""

from __future__ import annotations

from dist_cpt.config.schema import RunConfig


def config() -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "run",
            "model": {"path": "base"},
            "data": {"seq_len": 64, "sources": [{"path": "a.jsonl"}]},
            "batch": {"global_tokens": 128},
            "train": {"tokens": 1280},
        }
    )
