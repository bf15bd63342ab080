"""PEFT LoRA on a causal LM, with vocabulary matrices that train in full without a second copy.

PEFT's `modules_to_save` wraps an embedding or head and keeps the frozen original beside the trained copy. Here the
original itself trains; the saved names and `adapter_config.json` are those of PEFT's wrapper, so that
`PeftModel.from_pretrained` opens the folder.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from dist_cpt.adapters.placeholders import converted
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError


def apply_lora(
    model: Any, config: RunConfig, *, head: nn.Linear, embeddings: nn.Embedding
) -> tuple[nn.Module, dict[str, Any]]:
    """(a PeftModel around `model`, its adapter_config.json): LoRA on the recipe's targets, the rest frozen except for
    its vocabulary matrices.

    The head of a classifier always trains. Under `embeddings.kind: lora` the vocabulary matrices stay frozen and are
    targets too. A is drawn from the recipe's seed, the same on every rank. Trainable tensors become fp32.

    Raises:
        ConfigError: a target is not a linear layer, or is the head; low rank for a tied pair.
    """
    peft, adapter, classifies = import_peft(), config.adapter, config.classify is not None
    targets = target_modules(model, adapter.targets, head)
    transposed = _stores_transposed(model, targets)
    tied = head.weight is embeddings.weight
    trained = _vocabulary_modules(model, head, embeddings, config.embeddings.train)
    low_rank = list(trained.values()) if config.embeddings.kind == "lora" else []
    if low_rank:
        if tied or transposed:
            raise ConfigError(
                "embeddings.kind: lora: this base ties head and embedding, or stores its layers transposed",
                remedy="use embeddings.kind: full",
            )
        targets += [name for name, module in model.named_modules() if any(module is matrix for matrix in low_rank)]
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
        # With SEQ_CLS PEFT would wrap the classifier's head in a second copy; adapter_config.json has it all the same.
        task_type=None if classifies else peft.TaskType.CAUSAL_LM,
    )
    if classifies:
        trained[next(name for name, module in model.named_modules() if module is head)] = head
    with torch.random.fork_rng(devices=[]), without_peft_deprecations():
        torch.manual_seed(config.seed)
        peft_model = peft.get_peft_model(model, lora)
    for module in trained.values():
        module.weight.requires_grad_(True)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = converted(parameter.data, torch.float32)
    for module in peft_model.modules():
        is_dora = adapter.dora and len(getattr(module, "lora_magnitude_vector", ()))
        if is_dora or (low_rank and getattr(module, "base_layer", None) is head):
            module.gathers_at_once = True  # its forward reads weights of submodules without calling these
    adapter_config = {key: _plain(value) for key, value in lora.to_dict().items()}
    adapter_config |= {
        "base_model_name_or_path": config.model.path,
        "revision": config.model.revision,
        "inference_mode": True,
        "modules_to_save": sorted(trained) or None,
        "ensure_weight_tying": bool(tied and trained),
        "task_type": "SEQ_CLS" if classifies else adapter_config["task_type"],
    }
    if adapter.init == "pissa":
        adapter_config["init_lora_weights"] = "pissa"  # PEFT then subtracts the same part from the base it loads
    return peft_model, adapter_config


def import_peft() -> Any:
    """The module peft, imported without the warnings that its dependencies print on every rank."""
    # bitsandbytes warns if Hugging Face's `kernels` is missing, which serves 4-bit inference on a CPU only.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed logs its search for one
    import peft

    return peft


@contextlib.contextmanager
def without_peft_deprecations() -> Iterator[None]:
    """Silence a deprecation that PEFT 0.21 triggers in transformers 5.23 and no user can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def target_modules(model: Any, targets: str | tuple[str, ...], head: nn.Linear) -> list[str]:
    """The names for PEFT's `target_modules`, as short as possible: last components, or full names.

    Raises:
        ConfigError: a target is not a linear layer, or is the head.
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
        matching = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matching:
            raise ConfigError(f"adapter.targets: no linear layer is called {target!r}", remedy=_nearest(target, linear))
        wanted += matching
    return _shortest(model, sorted(set(wanted)))


def _vocabulary_modules(
    model: Any, head: nn.Linear, embeddings: nn.Embedding, train: Collection[str]
) -> dict[str, nn.Linear | nn.Embedding]:
    """Last name component -> module for each vocabulary matrix that trains; a tied pair trains together."""
    tied = head.weight is embeddings.weight
    pair: tuple[tuple[str, Any], ...] = (("embed_tokens", embeddings), ("lm_head", head))
    names = {module: name for name, module in model.named_modules()}
    return {names[module].rpartition(".")[2]: module for key, module in pair if key in train or (tied and train)}


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer to PEFT's LoRA."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _stores_transposed(model: Any, targets: list[str]) -> bool:
    """Whether the targets are GPT-2's Conv1D, which stores [in, out]: PEFT's `fan_in_fan_out`."""
    matched = [m for name, m in model.named_modules() if any(name == t or name.endswith(f".{t}") for t in targets)]
    # A quantised layer stores [out, in], but the saved adapter must fit the base on disk.
    transposed = {not issubclass(getattr(module, "source_cls", type(module)), nn.Linear) for module in matched}
    if len(transposed) > 1:
        raise ConfigError("adapter.targets mixes nn.Linear and Conv1D layers", remedy="name one kind only")
    return transposed == {True}


def _shortest(model: Any, names: list[str]) -> list[str]:
    """Last components if these match no other module of the model than `names`, else the full names."""
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
