"""PEFT LoRA on a causal LM, with vocabulary matrices that train in full without a second copy.

PEFT's `modules_to_save` wraps an embedding or head and keeps the frozen original beside the trained copy. Here the
original itself trains; the saved names and `adapter_config.json` are those of PEFT's wrapper, so that
`PeftModel.from_pretrained` opens the folder.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import nn

from dist_cpt.adapters.experts import expert_parameters, install_expert_lora, routers_of
from dist_cpt.adapters.language_model import decoder_of, recurrent_mixers
from dist_cpt.adapters.placeholders import converted
from dist_cpt.adapters.quantised_experts import as_declared, stacks_of
from dist_cpt.config.schema import AdapterConfig, RunConfig
from dist_cpt.errors import ConfigError

# Model types whose out_proj PEFT 0.21 refuses: mamba_ssm's training kernel reads its weight past an adapter.
_WITHOUT_OUT_PROJ = ("falcon_h1", "nemotron_h")
_CONVERSION = "peft.utils.transformers_weight_conversion"  # of PEFT 0.21


def apply_lora(
    model: Any, config: RunConfig, *, head: nn.Linear, embeddings: nn.Embedding
) -> tuple[nn.Module, dict[str, Any]]:
    """(a PeftModel around `model`, its adapter_config.json): LoRA on the recipe's targets, the rest frozen except for
    its vocabulary matrices and, if the recipe says so, its routers.

    The head of a classifier always trains. Under `embeddings.kind: lora` the vocabulary matrices stay frozen and are
    targets too. A is drawn from the recipe's seed, the same on every rank. Trainable tensors become fp32.

    Raises:
        ConfigError: a target is not a linear layer, or is the head; low rank for a tied pair.
    """
    peft, adapter, classifies = import_peft(), config.adapter, config.classify is not None
    targets, experts = target_modules(model, adapter.targets, head), target_experts(model, adapter)
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
    if experts and (unfit := _unfit_for_experts(adapter)):
        raise ConfigError(f"{unfit}: experts are adapted by plain LoRA", remedy="set adapter.experts: frozen")
    lora = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        rank_pattern=dict.fromkeys(experts, expert_rank(model, adapter)),
        target_parameters=experts or None,
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
    routers = routers_of(decoder_of(model)) if config.model.router == "train" else []
    renamed = _renamed_by_peft(peft, model, targets)
    with torch.random.fork_rng(devices=[]), without_peft_deprecations(), _targets_as_given(), as_declared(model):
        torch.manual_seed(config.seed)
        peft_model = peft.get_peft_model(model, lora)
    install_expert_lora(peft_model)
    for module in trained.values():
        module.weight.requires_grad_(True)
    for _, router in routers:  # with a bias, where it has one: PEFT reads a saved module whole
        router.requires_grad_(True)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = converted(parameter.data, torch.float32)
    for module in peft_model.modules():
        is_dora = adapter.dora and len(getattr(module, "lora_magnitude_vector", ()))
        if is_dora or (low_rank and getattr(module, "base_layer", None) is head):
            module.gathers_at_once = True  # its forward reads weights of submodules without calling these
    adapter_config = {key: _plain(value) for key, value in lora.to_dict().items()}
    adapter_config |= {
        "target_modules": sorted(set(targets) - set(renamed)),
        "target_parameters": sorted([*experts, *(f"{name}.weight" for name in renamed)]) or None,
        "base_model_name_or_path": config.model.path,
        "revision": config.model.revision,
        "inference_mode": True,
        # Not by the last component alone: Qwen2-MoE's shared_expert_gate ends with gate.
        "modules_to_save": sorted({*trained, *(_within_layer(name) for name, _ in routers)}) or None,
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
    """Silence what PEFT 0.21 warns of and no user can change: a deprecation that it triggers in transformers 5.23, and
    ranks of experts, which it says to ignore, looking for them among modules only, but does not ignore."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The following rank_pattern keys did not match", category=RuntimeWarning
        )
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def _renamed_by_peft(peft: Any, model: Any, targets: list[str]) -> list[str]:
    """Those of `targets` that PEFT would read as names of experts in files of transformers 4, as DeepSeek's gate_proj.

    In adapter_config.json they are parameters: PEFT then finds these layers, and the keys of the file are the same.
    """
    probe = peft.LoraConfig(target_modules=targets)
    import_module(_CONVERSION).convert_peft_config_for_transformers(probe, model, None)
    return [name for name in targets if name not in probe.target_modules]


@contextlib.contextmanager
def _targets_as_given() -> Iterator[None]:
    """PEFT adapts the targets that it is given: all of them are layers of this model."""
    conversion: Any = import_module(_CONVERSION)
    convert = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_args, **_options: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = convert


def target_modules(model: Any, targets: str | tuple[str, ...], head: nn.Linear) -> list[str]:
    """The names for PEFT's `target_modules`, as short as possible: last components, or full names.

    Raises:
        ConfigError: a target is not a linear layer, or is the head.
    """
    decoder = {id(module) for module in decoder_of(model).modules()}  # not the towers of a multimodal model
    linear = [
        name
        for name, module in model.named_modules()
        if id(module) in decoder and is_linear(module) and module is not head
    ]
    head_name = next(name for name, module in model.named_modules() if module is head)
    refused = (
        {name for name in linear if name.endswith(".out_proj")}
        if model.config.model_type in _WITHOUT_OUT_PROJ
        else set()
    )
    if targets == "all-linear":
        return _shortest(model, [name for name in linear if name not in refused])
    wanted: list[str] = []
    for target in (targets,) if isinstance(targets, str) else targets:
        if head_name == target or head_name.endswith(f".{target}"):
            raise ConfigError(
                f"adapter.targets: {target} is the output head", remedy="train it in full: embeddings.train: [lm_head]"
            )
        matching = [name for name in linear if name == target or name.endswith(f".{target}")]
        if refused.intersection(matching):
            raise ConfigError(
                f"adapter.targets: {target}: PEFT does not open adapters on it in {model.config.model_type} models",
                remedy="leave it out, as all-linear does",
            )
        if not matching and not any(name.endswith(f".{target}") for name in expert_parameters(decoder_of(model))):
            raise ConfigError(f"adapter.targets: no linear layer is called {target!r}", remedy=_nearest(target, linear))
        wanted += matching
    return _shortest(model, sorted(set(wanted)))


def target_experts(model: Any, adapter: AdapterConfig) -> list[str]:
    """The names for PEFT's `target_parameters`: experts' matrices within their layer.

    Raises:
        ConfigError: a setting of experts that changes nothing.
    """
    experts = expert_parameters(decoder_of(model))
    if adapter.experts == "frozen":
        if not experts:
            raise ConfigError("adapter.experts: frozen: this model has no experts", remedy="leave it out")
        return []
    named = (adapter.targets,) if isinstance(adapter.targets, str) else adapter.targets
    wanted = [
        name
        for name in experts
        if named == ("all-linear",) or any(name == target or name.endswith(f".{target}") for target in named)
    ]
    if adapter.expert_rank is not None and not wanted:
        raise ConfigError(f"adapter.expert_rank: {adapter.expert_rank}: no expert is adapted", remedy="leave it out")
    return sorted({_within_layer(name) for name in wanted})


def _within_layer(name: str) -> str:
    return re.sub(r"^.*\.\d+\.", "", name)


def expert_rank(model: Any, adapter: AdapterConfig) -> int:
    """The rank of each expert; by default a token passes as many ranks in its experts as in a dense map."""
    config = model.config.get_text_config()
    per_token = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 1
    return adapter.expert_rank or max(1, adapter.rank // per_token)


def _unfit_for_experts(adapter: AdapterConfig) -> str | None:
    """A setting that LoRA on parameters does not have."""
    if adapter.dropout:
        return f"adapter.dropout: {adapter.dropout}"
    if adapter.dora:
        return "adapter.dora: true"
    return f"adapter.init: {adapter.init}" if adapter.init != "default" else None


def left_out(layers: Iterable[nn.Module]) -> dict[str, int]:
    """Parameters by name within the layer of all that neither train nor are under an adapter: matrices, and what a
    recurrence has of its own."""
    sizes: dict[str, int] = {}
    for layer in layers:
        own = {id(p) for mixer in recurrent_mixers(layer) for p in mixer.parameters(recurse=False)}
        quantised = {name: math.prod(stack.shape) for name, _, _, stack in stacks_of(layer)}
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad or ".base_layer." in name:
                continue
            if id(parameter) not in own and (parameter.ndim < 2 or name.endswith("bias")):
                continue
            short = name.removesuffix(".weight")
            sizes[short] = sizes.get(short, 0) + quantised.get(name, parameter.numel())
    return sizes


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
