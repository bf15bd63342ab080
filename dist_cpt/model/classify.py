"""A causal LM as transformers' sequence classifier of the same architecture: same backbone, new head.

B batch, L sequence, T = B * L tokens, D model, C classes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dist_cpt.config.schema import ClassifyConfig
from dist_cpt.errors import CheckpointError, ConfigError
from dist_cpt.model.architectures import Parts
from dist_cpt.model.loss import IGNORE_INDEX, LossHead
from dist_cpt.run_folder.names import MODEL_CONFIG
from dist_cpt.storage import read_bytes

HEAD = "score"  # what transformers' classifiers over causal backbones call it
LABELS = "labels.json"  # beside a classifier's adapter: {class name: index}
_LOADER_ATTRIBUTES = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method")


class ClassHead(LossHead):
    """Hidden states -> loss over classes at the labelled tokens; in eval mode it also counts its predictions."""

    confusion: torch.Tensor | None = (
        None  # int64 [C * C + 1]: true class x predicted class; the last counts unlabelled tokens
    )

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, labels: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As LossHead: logits [..., C] of hidden states; or, with `labels` [T], (scale * loss_sum, loss_sum)."""
        if labels is not None and not self.training:
            self._count(F.linear(input.detach(), self.weight.detach()), labels)
        return super().forward(input, labels, scale)

    def take_confusion(self) -> list[int]:
        """Counts [C * C] of (true class, predicted class) since the last call, in C order; host sync."""
        counts, self.confusion = self.confusion, None
        return [0] * self.out_features**2 if counts is None else counts[:-1].tolist()

    def _count(self, logits_TC: torch.Tensor, labels: torch.Tensor) -> None:
        classes = self.out_features
        cell = torch.where(labels == IGNORE_INDEX, classes**2, labels * classes + logits_TC.argmax(-1))
        if self.confusion is None:
            self.confusion = torch.zeros(classes**2 + 1, dtype=torch.int64, device=labels.device)
        self.confusion.scatter_add_(0, cell, torch.ones_like(cell))  # without a host sync


def as_classifier(model: Any, parts: Parts, classify: ClassifyConfig, seed: int) -> tuple[Any, Parts]:
    """The `...ForSequenceClassification` around the backbone of a causal LM, with a new head drawn from `seed`.

    The language head is dropped. All other parameters keep their names and their storage, and the model its
    attributes about quantisation.

    Raises:
        ConfigError: transformers has no such classifier for this model type.
    """
    from transformers import AutoModelForSequenceClassification

    kind = model.config.model_type
    config = model.config
    config.num_labels = classify.num_classes  # makes the names label_0, label_1 ...
    if classify.labels:
        config.id2label = dict(enumerate(classify.labels))
        config.label2id = {name: number for number, name in enumerate(classify.labels)}
    try:
        with torch.device("meta"):  # a shell: its backbone and head are replaced
            shell: Any = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except ValueError:
        raise _no_classifier(kind, "transformers has none") from None
    prefix = model.base_model_prefix
    score = getattr(shell, HEAD, None)
    if shell.base_model_prefix != prefix or type(getattr(shell, prefix, None)) is not type(model.base_model):
        raise _no_classifier(kind, "its backbone is another one")
    if not isinstance(score, nn.Linear) or score.bias is not None:
        raise _no_classifier(kind, f"it has no linear head {HEAD} without bias")
    setattr(shell, prefix, model.base_model)
    setattr(shell, HEAD, _new_head(parts, classify.num_classes, config, seed))
    shell.config = config
    config.architectures = [type(shell).__name__]  # in a full model's config.json
    for name in _LOADER_ATTRIBUTES:
        if name in vars(model):
            setattr(shell, name, vars(model)[name])
    return shell, replace(parts, head=getattr(shell, HEAD))


def write_labels(folder: str | Path, hf_config: Any) -> None:
    """Write the classes of a classifier beside its adapter, whose folder has no config.json."""
    text = json.dumps(hf_config.label2id, indent=1) + "\n"
    (Path(folder) / LABELS).write_text(text, encoding="utf-8")


def read_labels(folder: Path) -> tuple[str, ...] | None:
    """The classes of an adapter folder in the order of the logits; None if it is not a classifier's.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / LABELS
    if not path.is_file():
        return None
    try:
        numbers = {str(name): int(number) for name, number in json.loads(read_bytes(path)).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if sorted(numbers.values()) != list(range(len(numbers))) or len(numbers) < 2:
        raise CheckpointError(f"{path} does not number its classes from 0")
    return tuple(sorted(numbers, key=lambda name: numbers[name]))


def is_classifier(folder: Path) -> bool:
    """Whether the model of a folder with a config.json is a sequence classifier."""
    config = json.loads(read_bytes(folder / MODEL_CONFIG))
    return str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification")


def _new_head(parts: Parts, num_classes: int, config: Any, seed: int) -> ClassHead:
    old = parts.head
    std = getattr(config, "initializer_range", None) or 0.02
    values = torch.empty(num_classes, config.hidden_size).normal_(0, std, generator=torch.Generator().manual_seed(seed))
    head = ClassHead(config.hidden_size, num_classes, bias=False, device="meta")
    head.weight = nn.Parameter(values.to(old.weight.device))
    head.use_reference = bool(getattr(old, "use_reference", False))
    return head


def _no_classifier(kind: str, why: str) -> ConfigError:
    return ConfigError(f"task classify: no sequence classifier for model type {kind}: {why}", remedy="use another base")
