"""Adapters that PEFT wrote, as other trainers leave them, and an engine to start from one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_cpt.checkpoint.import_peft import StartedFrom, start_from
from dist_cpt.config.load import build
from dist_cpt.config.schema import RunConfig
from dist_cpt.engines.build import build_engine
from dist_cpt.engines.engine import Engine
from dist_cpt.model.load import TrainableModel, load_model
from dist_cpt.optim.groups import param_groups
from dist_cpt.training_state import TensorSpec
from tests.contract.model import SEQ_LEN

CPU = torch.device("cpu")
BOTH = ("embed_tokens", "lm_head")
RANK, ALPHA = 8, 16
State = dict[str, torch.Tensor]


def peft_model(base: str, *, scatter: bool = True, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """`base` under PEFT's own LoRA; with `scatter` every trained value is random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    if lora.get("modules_to_save"):
        settings["modules_to_save"] = list(lora["modules_to_save"])  # PEFT appends to the list it is given
    torch.manual_seed(7)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), LoraConfig(**settings))
    for parameter in model.parameters():
        if scatter and parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    return model


def write_peft(folder: Path, base: str, **lora: Any) -> Path:
    """A folder that PEFT's save_pretrained wrote."""
    peft_model(base, **lora).save_pretrained(folder)
    return folder


def recipe(base: str, path: Path | None, optimizer: bool = False, **changes: Any) -> RunConfig:
    """Continue `path` at PEFT's default scaling; `changes` replace keys inside sections."""
    values: dict[str, Any] = {
        "name": "continued",
        "model": {"path": base, "weights": "fp32"},
        "adapter": {"rank": RANK, "alpha": ALPHA, "rslora": False},
        "data": {"seq_len": SEQ_LEN, "sources": [{"path": "none.jsonl"}]},
        "batch": {"global_tokens": SEQ_LEN},
        "train": {"tokens": 10_000},
        "optim": {"betas": [0.9, 0.999]},
        "engine": {"kind": "single"},
    }
    if path is not None:
        # other_base: the checkpoints of these tests are made up, and so is the hash of their base
        values["adapter"]["continue_from"] = {"path": str(path), "optimizer": optimizer, "other_base": True}
    for section, keys in changes.items():
        values[section] = values.get(section, {}) | keys
    return build(values, "recipe.yaml")


def engine_of(config: RunConfig) -> tuple[Engine, TrainableModel, list[TensorSpec]]:
    """The recipe's engine before its first step."""
    model = load_model(config, device=CPU)
    groups = param_groups(model.trainable, config.optim, adapter=True)
    specs = [
        TensorSpec(name, tuple(model.trainable[name].shape), "float32", group.name)
        for group in groups
        for name in group.names
    ]
    return build_engine(model.module, model.trainable, groups, model.layers, config, CPU), model, specs


def started(config: RunConfig) -> tuple[Engine, TrainableModel, StartedFrom]:
    """The recipe's engine after `start_from`."""
    engine, model, specs = engine_of(config)
    assert config.adapter.continue_from is not None
    return engine, model, start_from(engine, config.adapter.continue_from, specs, model, config.optim)


def state_of(engine: Engine) -> State:
    """`kind.name` -> full tensor, on rank 0."""
    exported = engine.export_state(lambda kind, name: 0)
    return {f"{t.kind}.{t.name}": t.values.clone() for t in exported if t.values is not None}


def on_ranks(base: str, path: str, engine: dict[str, Any]) -> tuple[int, State]:
    """`started` as one of several ranks: AdamW's counter and the state."""
    built, _, begun = started(recipe(base, Path(path), True, engine=engine, embeddings={"train": BOTH}))
    try:
        return begun.step, state_of(built)
    finally:
        built.close()


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[State], State]) -> None:
    """Rewrite adapter_model.safetensors."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(path)).items()}, path)


def flat_slices(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Slices of a flattened tensor that begin and end inside its rows."""
    size = math.prod(shape)
    return [(0, size), (0, 1), (size - 1, size), (1, size - 1), (size // 3, size // 2), (5, 5)]
