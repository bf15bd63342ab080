"""What a run would train of a model, which transformers builds from its config.json on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dist_cpt.adapters.experts import expert_parameters
from dist_cpt.adapters.language_model import auto_class, is_multimodal
from dist_cpt.adapters.lora import left_out, target_modules
from dist_cpt.errors import ConfigError
from dist_cpt.model.architectures import check_config, logit_scale, one_line, parts_of
from dist_cpt.plan.model_check import count


@dataclass(frozen=True)
class BuildCheck:
    """What LoRA on all-linear would reach: parameters by name within the layer."""

    model_class: str
    text_type: str
    multimodal: bool
    layers: int
    trained: dict[str, int]
    left_out: dict[str, int]
    logit_scale: float

    def as_text(self) -> Iterator[str]:
        """One line per question."""
        inside = f", the text model {self.text_type} inside it trains" if self.multimodal else ""
        yield f"built: {self.model_class}{inside}; {self.layers} decoder layers"
        yield f"built: LoRA on all-linear trains {_listed(self.trained)}"
        if self.left_out:
            yield f"built: LoRA leaves out {_listed(self.left_out)}"
        if self.logit_scale != 1.0:
            yield f"built: logits are scaled by {self.logit_scale:.6g}"


def check_build(path: str, revision: str | None = None) -> BuildCheck:
    """Build the model of a folder or hub id on the meta device, and find in it what a run would train.

    Its forward is not tried: packing is checked when a run loads the weights.

    Raises:
        ConfigError: what a run would raise before it reads a weight.
    """
    from transformers import AutoConfig

    with one_line(f"{path}: its config.json"):
        hf_config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    kind = hf_config.model_type
    with one_line(f"model type {kind}: transformers cannot build it"), torch.device("meta"):
        check_config(hf_config)
        model: Any = auto_class(hf_config).from_config(hf_config, trust_remote_code=False)
    with one_line(f"model type {kind}: its parts are not found"):
        parts = parts_of(model)
        targets = target_modules(model, "all-linear", parts.head)
    if not targets:
        raise ConfigError(f"model type {kind} has no linear layer to adapt", remedy="use adapter.kind: none")
    trained: dict[str, int] = {}
    for layer in parts.layers:
        for name in expert_parameters(layer):
            trained[name] = trained.get(name, 0) + layer.get_parameter(name).numel()
    for layer in parts.layers:
        prefix = next(name for name, module in model.named_modules() if module is layer)
        for name, module in layer.named_modules():
            full = f"{prefix}.{name}"
            if any(full == target or full.endswith(f".{target}") for target in targets):
                trained[name] = trained.get(name, 0) + module.get_parameter("weight").numel()
    rest = {name: size for name, size in left_out(parts.layers).items() if name not in trained}
    return BuildCheck(
        model_class=type(model).__name__,
        text_type=hf_config.get_text_config().model_type,
        multimodal=is_multimodal(hf_config),
        layers=len(parts.layers),
        trained=trained,
        left_out=rest,
        logit_scale=logit_scale(hf_config.get_text_config()),
    )


def _listed(names: dict[str, int]) -> str:
    return f"{', '.join(names)} ({count(sum(names.values()))})"
