"""PEFT LoRA on a causal LM, and trained vocabulary matrices beside it without a second copy of them.

PEFT's own way to train an embedding or head in full wraps it and keeps the frozen original next to the
trained copy. Here the original itself trains; the saved names and `adapter_config.json` are those that
PEFT's wrapper would have written, so vanilla `PeftModel.from_pretrained` opens the folder.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_cpt.config.schema import AdapterConfig
from dist_cpt.errors import ConfigError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What models call their embedding and head; groups of learning rates and decay go by these names.
VOCABULARY_NAMES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
_WRAPPER_PREFIX = "causal_lm."  # the attribute of CausalLMForLoss that holds the model
_ADAPTER_NAME = ".default."


@dataclass(frozen=True)
class Adapted:
    """A model under LoRA and the content of its adapter_config.json."""

    model: nn.Module  # a PeftModel around the same base module
    adapter_config: dict[str, Any]


def apply_lora(
    model: Any,
    adapter: AdapterConfig,
    *,
    head: nn.Linear,
    embeddings: nn.Embedding,
    train: Iterable[str],
    base_path: str | None,
    revision: str | None,
    seed: int,
    classifies: bool = False,
    low_rank_vocabulary: bool = False,
) -> Adapted:
    """Freeze `model`, put LoRA on the adapter's targets and let the vocabulary matrices in `train` train.

    `train` names `embed_tokens` (the input embedding, whatever the model calls it) and `lm_head`; the head of a model
    that `classifies` always trains. With `low_rank_vocabulary` they stay frozen under LoRA as well. LoRA's
    random half is drawn from `seed`, the same on every rank. Trainable tensors become fp32.

    Raises:
        ConfigError: a target is not a linear layer of the model, or is the head; low rank for a tied pair.
    """
    peft = import_peft()
    targets = target_modules(model, adapter.targets, head)
    transposed = _stores_transposed(model, targets)
    trained = _vocabulary_modules(model, head, embeddings, set(train))
    low_rank = list(trained.values()) if low_rank_vocabulary else []
    if low_rank:
        if head.weight is embeddings.weight or transposed:
            raise ConfigError(
                "embeddings.kind: lora: this base ties head and embedding, or stores its layers transposed",
                remedy="use embeddings.kind: full",
            )
        targets += [name for name, module in model.named_modules() if any(module is chosen for chosen in low_rank)]
        trained = {}
    lora = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        fan_in_fan_out=transposed,
        bias="none",
        # PEFT would wrap a classifier's head in a second copy; the folder says SEQ_CLS all the same.
        task_type=None if classifies else peft.TaskType.CAUSAL_LM,
    )
    if classifies:
        trained[next(name for name, module in model.named_modules() if module is head)] = head
    with torch.random.fork_rng(devices=[]), without_peft_deprecations():
        torch.manual_seed(seed)
        peft_model = peft.get_peft_model(model, lora)
    for module in trained.values():
        module.weight.requires_grad_(True)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in peft_model.modules() if adapter.dora else ():
        if len(getattr(module, "lora_magnitude_vector", ())):
            module.gathers_at_once = True  # DoRA reads the base's matrix beside the module that owns it
    for module in peft_model.modules() if low_rank else ():
        if getattr(module, "base_layer", None) is head:
            module.gathers_at_once = True  # it reads its matrices past the modules that own them
    tied = head.weight is embeddings.weight
    adapter_config = _adapter_config(lora, sorted(trained), tied, base_path, revision)
    if adapter.init == "pissa":
        adapter_config["init_lora_weights"] = "pissa"  # PEFT then takes the same part out of the base it loads
    return Adapted(peft_model, adapter_config)


def import_peft() -> Any:
    """The module peft, without the lines that what it imports would print on every rank."""
    # bitsandbytes warns when Hugging Face's `kernels` is absent or a folder of that name is on the path; the
    # kernel it would fetch there serves 4-bit inference on a CPU only.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed says that it looked for one
    import peft

    return peft


@contextlib.contextmanager
def without_peft_deprecations() -> Iterator[None]:
    """Silence what PEFT 0.21 does wrong towards transformers 5.23 and no user can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def target_modules(model: Any, targets: str | tuple[str, ...], head: nn.Linear) -> list[str]:
    """The module names PEFT shall match, as short as they can be: last components, or full names.

    Raises:
        ConfigError: a target names no linear layer, or the head.
    """
    linear = [name for name, module in model.named_modules() if is_linear(module) and module is not head]
    head_name = next(name for name, module in model.named_modules() if module is head)
    if targets == "all-linear":
        return _shortest(model, linear)
    wanted: list[str] = []
    for target in (targets,) if isinstance(targets, str) else targets:
        if head_name == target or head_name.endswith(f".{target}"):
            raise ConfigError(
                f"adapter.targets: {target} is the output head", remedy="train it in full: embeddings.train: [lm_head]"
            )
        found = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not found:
            raise ConfigError(f"adapter.targets: no linear layer is called {target!r}", remedy=_nearest(target, linear))
        wanted += found
    return _shortest(model, sorted(set(wanted)))


def canonical_name(parameter_name: str) -> str:
    """The key of a parameter in adapter_model.safetensors, or its Hugging Face name without an adapter.

    `causal_lm.base_model.model.x.lora_A.default.weight` -> `base_model.model.x.lora_A.weight`.
    """
    name = parameter_name.removeprefix(_WRAPPER_PREFIX)
    if not name.startswith("base_model.model."):
        return name
    name = re.sub(r"(\.lora_[A-Za-z_]+)\.default(?=\.|$)", r"\1", name)
    return re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", name)


def canonical_key(key: str) -> str | None:
    """The canonical name behind a key of an adapter file, in any spelling; None for a frozen original."""
    if ".original_module." in key or ".base_layer." in key:
        return None
    key = re.sub(r"\.modules_to_save(\.[^.]+)?\.weight$", ".weight", key)
    key = re.sub(r"(\.lora_magnitude_vector)(\.[^.]+)*$", r"\1", key)
    return re.sub(r"(\.lora_[A-Za-z_]+)\.[^.]+\.weight$", r"\1.weight", key)


def adapter_aliases(names: Iterable[str], ties: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Second keys to write into adapter_model.safetensors: {alias: name it copies}.

    PEFT restores a tied pair of matrices only if both keys are in the file.
    """
    present = set(names)
    return {alias: name for name, alias in ties if name in present}


def write_adapter_config(folder: str | Path, adapter_config: Mapping[str, Any]) -> Path:
    """Write `adapter_config.json` (from `Adapted`) into `folder`; the same bytes for the same run."""
    path = Path(folder) / ADAPTER_CONFIG
    path.write_text(json.dumps(adapter_config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _adapter_config(
    lora: Any, modules_to_save: list[str], tied: bool, base_path: str | None, revision: str | None
) -> dict[str, Any]:
    values = {key: _plain(value) for key, value in lora.to_dict().items()}
    values |= {
        "base_model_name_or_path": base_path,
        "revision": revision,
        "inference_mode": True,
        "modules_to_save": modules_to_save or None,
        "ensure_weight_tying": bool(tied and modules_to_save),
        "task_type": values["task_type"] or "SEQ_CLS",
    }
    return values


def _vocabulary_modules(
    model: Any, head: nn.Linear, embeddings: nn.Embedding, train: set[str]
) -> dict[str, nn.Linear | nn.Embedding]:
    """Last name component -> module for each vocabulary matrix that trains; a tied pair trains together."""
    tied = head.weight is embeddings.weight
    chosen: list[nn.Linear | nn.Embedding] = []
    if "embed_tokens" in train or (tied and train):
        chosen.append(embeddings)
    if "lm_head" in train or (tied and train):
        chosen.append(head)
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(module)].rpartition(".")[2]: module for module in chosen}


def is_linear(module: nn.Module) -> bool:
    """Whether PEFT's LoRA goes on `module` as on a matrix."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _stores_transposed(model: Any, targets: list[str]) -> bool:
    """Whether the targets are GPT-2's Conv1D, which stores [in, out]; PEFT wants to be told."""
    matched = [m for name, m in model.named_modules() if any(name == t or name.endswith(f".{t}") for t in targets)]
    # A quantised layer has turned its weight around, but the saved adapter shall fit the base as it lies on the disk.
    transposed = {not issubclass(getattr(module, "source_cls", type(module)), nn.Linear) for module in matched}
    if len(transposed) > 1:
        raise ConfigError("adapter.targets mixes linear layers of two storage orders", remedy="name one kind only")
    return transposed == {True}


def _shortest(model: Any, names: list[str]) -> list[str]:
    """Last components if they match exactly `names` among all modules of the model, else the full names."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    matched = {
        name for name, _ in model.named_modules() if any(name == leaf or name.endswith(f".{leaf}") for leaf in leaves)
    }
    return leaves if matched == set(names) else sorted(names)


def _nearest(target: str, names: list[str]) -> str:
    leaves = sorted({name.rpartition(".")[2] for name in names})
    close = difflib.get_close_matches(target.rpartition(".")[2], leaves, n=3, cutoff=0.4)
    return f"did you mean {', '.join(close)}?" if close else f"linear layers: {', '.join(leaves)}"


def _plain(value: Any) -> Any:
    """JSON value of a PEFT config field; sets in a fixed order."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return getattr(value, "value", value)
