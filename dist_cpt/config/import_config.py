"""An Axolotl or LLaMA-Factory YAML as a recipe, with every key that the recipe cannot say named.

A key is a row of a table, or read by a function where several keys belong together; all others are dropped and named.
The other program's defaults are written out, since ours differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dist_cpt.config.load import build, parse_yaml
from dist_cpt.config.schema import HUB_PREFIX
from dist_cpt.errors import ConfigError, printable
from dist_cpt.storage import read_bytes

Values = dict[str, Any]

# Their key -> ours; first those that both programs have.
_BOTH = {
    "trust_remote_code": "model.trust_remote_code",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "loraplus_lr_ratio": "adapter.lora_plus_ratio",
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.max_grad_norm",
    "adam_epsilon": "optim.eps",
    "warmup_steps": "schedule.warmup_steps",
    "warmup_ratio": "schedule.warmup_fraction",
    "save_total_limit": "checkpoint.keep",
    "seed": "seed",
}
_AXOLOTL = _BOTH | {
    "base_model": "model.path",
    "revision_of_model": "model.revision",
    "lora_r": "adapter.rank",
    "peft_use_rslora": "adapter.rslora",
    "peft_use_dora": "adapter.dora",
    "lora_model_dir": "adapter.continue_from",
    "embedding_lr": "optim.embedding_lr",
    "sequence_len": "data.seq_len",
    "micro_batch_size": "batch.micro_batch",
    "num_epochs": "train.epochs",
    "wandb_project": "track.wandb.project",
    "wandb_entity": "track.wandb.entity",
    "use_tensorboard": "track.tensorboard",
}
_LLAMA_FACTORY = _BOTH | {
    "model_name_or_path": "model.path",
    "model_revision": "model.revision",
    "lora_rank": "adapter.rank",
    "use_rslora": "adapter.rslora",
    "use_dora": "adapter.dora",
    "adapter_name_or_path": "adapter.continue_from",
    "cutoff_len": "data.seq_len",
    "per_device_train_batch_size": "batch.micro_batch",
    "num_train_epochs": "train.epochs",
}
# The other program's defaults.
_AXOLOTL_DEFAULTS = {"optim.weight_decay": 0.0, "optim.betas": [0.9, 0.999], "adapter.rslora": False}
_LLAMA_FACTORY_DEFAULTS = _AXOLOTL_DEFAULTS | {
    "adapter.rank": 8,
    "schedule.kind": "linear",
    "schedule.warmup_fraction": 0.0,
    "data.seq_len": 2048,
    "optim.lr": 5e-5,
    "train.epochs": 3.0,
}
_SCHEDULES = {
    "cosine": {"kind": "cosine", "end_fraction": 0.0},
    "linear": {"kind": "linear", "end_fraction": 0.0},
    "constant": {"kind": "constant", "warmup_fraction": 0.0},
    "constant_with_warmup": {"kind": "constant"},
    "warmup_stable_decay": {"kind": "wsd", "end_fraction": 0.0},
}
# Keys that need no counterpart, and why.
_ALREADY = {
    "sample_packing": "text is always packed",
    "packing": "text is always packed",
    "eval_sample_packing": "text is always packed",
    "pad_to_sequence_len": "text is always packed",
    "flash_attention": "model.attention: auto takes the fastest way that runs here",
    "flash_attn": "model.attention: auto takes the fastest way that runs here",
    "bf16": "compute is in bf16",
    "bfloat16": "compute is in bf16",
    "model_type": "known from the model",
    "tokenizer_type": "known from the model",
    "output_dir": "runs/<name>",
    "overwrite_output_dir": "a run folder is resumed, never overwritten",
    "dataset_prepared_path": "data.cache_dir",
    "preprocessing_num_workers": "dist-cpt prepare --workers N",
    "do_train": "train is the command",
    "logging_steps": "every step is recorded",
    "plot_loss": "dist-cpt report",
    "wandb_name": "name",
    "report_to": "track.wandb.mode: auto",
    "run_name": "name",
}


@dataclass
class Imported:
    """A recipe in the making: what was read, assumed and dropped of another program's file."""

    program: str
    given: Values
    recipe: Values = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    dropped: dict[str, str] = field(default_factory=dict)  # key -> why
    assumed: list[str] = field(default_factory=list)

    def take(self, key: str, default: Any = None) -> Any:
        """A value that is read; null counts as absent."""
        self.read.add(key)
        value = self.given.get(key)
        return default if value is None else value

    def set(self, key: str, value: Any) -> None:
        *sections, last = key.split(".")
        node = self.recipe
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value

    def has(self, key: str) -> bool:
        node: Any = self.recipe
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return True

    def drop(self, key: str, why: str) -> None:
        self.read.add(key)
        self.dropped[key] = why


def import_config(path: Path, gpus: int, name: str | None = None) -> Imported:
    """The recipe of another program's file for `gpus` GPUs, valid as a recipe.

    Raises:
        ConfigError: the file belongs to neither program, or its values make no valid recipe.
    """
    try:
        given = parse_yaml(read_bytes(path).decode("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: not a mapping of keys")
    if "base_model" in given:
        made = Imported("Axolotl", given)
        table, defaults, parts = _AXOLOTL, _AXOLOTL_DEFAULTS, (_axolotl_adapter, _axolotl_data)
    elif "model_name_or_path" in given:
        made = Imported("LLaMA-Factory", given)
        table, defaults = _LLAMA_FACTORY, _LLAMA_FACTORY_DEFAULTS
        parts = (_llama_factory_adapter, _llama_factory_data)
    else:
        raise ConfigError(f"{path}: neither base_model (Axolotl) nor model_name_or_path (LLaMA-Factory) in it")
    made.set("name", re.sub(r"[^A-Za-z0-9._-]+", "-", name or path.stem).strip("-._") or "imported")
    for theirs, ours in table.items():
        if (value := made.take(theirs)) is not None:
            made.set(ours, value)
    steps: tuple[Callable[[Imported], None], ...] = (*parts, _schedule, _optimizer, _engine, _evaluate)
    for part in steps:
        part(made)
    for ours, value in defaults.items():
        lora_only = ours.startswith("adapter.") and made.recipe.get("adapter", {}).get("kind") == "none"
        if not made.has(ours) and not lora_only:
            made.set(ours, value)
    _length(made, gpus)
    for key in given:
        if key in _ALREADY:
            made.drop(key, _ALREADY[key])
        elif key not in made.read:
            made.dropped[key] = "no counterpart"
    build(made.recipe, f"{path} as a recipe")
    return made


def recipe_text(made: Imported, path: Path) -> str:
    """The recipe as YAML, with what was assumed and dropped as comments."""
    lines = [f"# From {path}, a file of {made.program}, by dist-cpt import-config. Every key: docs/recipe.md."]
    lines += [f"# assumed: {printable(text)}" for text in made.assumed]
    lines += [f"# not taken over: {line}" for line in dropped_lines(made)]
    body = yaml.safe_dump(made.recipe, sort_keys=False, allow_unicode=True)
    return "\n".join(lines) + "\n" + body


def dropped_lines(made: Imported) -> Iterator[str]:
    """`key: value (why)` of every key that the recipe does not say."""
    for key, why in made.dropped.items():
        value = made.given.get(key)
        shown = "" if value is None else printable(f": {str(value)[:60]}")
        yield f"{printable(str(key))}{shown} ({why})"


# -- adapters ---------------------------------------------------------------------------------------------------------


def _axolotl_adapter(made: Imported) -> None:
    kind = made.take("adapter")
    four, eight = made.take("load_in_4bit", False), made.take("load_in_8bit", False)
    targets, linear = made.take("lora_target_modules"), made.take("lora_target_linear", False)
    if kind is None:
        made.recipe.pop("adapter", None)
        made.set("adapter.kind", "none")
        return
    made.set("model.weights", "nf4" if kind == "qlora" or four else "int8" if eight else "bf16")
    made.set("adapter.targets", "all-linear" if linear or targets is None else targets)
    _whole_matrices(made, "lora_modules_to_save")


def _llama_factory_adapter(made: Imported) -> None:
    kind, bits = made.take("finetuning_type", "lora"), made.take("quantization_bit")
    targets = made.take("lora_target", "all")
    if kind == "full":
        made.recipe.pop("adapter", None)
        made.set("adapter.kind", "none")
        return
    if kind != "lora":
        raise ConfigError(f"finetuning_type: {kind}: only lora and full have a counterpart")
    made.set("model.weights", {4: "nf4", 8: "int8"}.get(bits, "bf16"))
    made.set("adapter.targets", "all-linear" if targets == "all" else _names(targets))
    if not made.has("adapter.alpha"):
        made.set("adapter.alpha", 2 * made.recipe.get("adapter", {}).get("rank", 8))
    if made.take("pissa_init", False):
        made.set("adapter.init", "pissa")
    _whole_matrices(made, "additional_target")


def _whole_matrices(made: Imported, key: str) -> None:
    names = _names(made.take(key, []))
    known = [name for name in ("embed_tokens", "lm_head") if name in names]
    if known:
        made.set("embeddings.train", known)
    if others := [name for name in names if name not in known]:
        made.drop(key, f"only embed_tokens and lm_head train beside an adapter, not {', '.join(others)}")


# -- data -------------------------------------------------------------------------------------------------------------


def _axolotl_data(made: Imported) -> None:
    sources, kinds = [], set()
    for key in ("datasets", "pretraining_dataset"):
        listed = made.take(key, [])
        for number, entry in enumerate(listed if isinstance(listed, list) else [listed]):
            one = entry if isinstance(entry, Mapping) else {"path": entry}
            kind = str(one.get("type") or "completion")
            if kind not in ("completion", "pretrain", "chat_template"):
                made.dropped[f"{key}.{number}"] = f"type {kind}: only completion and chat_template have a counterpart"
                continue
            kinds.add("instruct" if kind == "chat_template" else "cpt")
            sources.append(_axolotl_source(one, kind))
    _set_sources(made, sources, kinds)
    held_out = [one for one in made.take("test_datasets", []) if isinstance(one, Mapping)]
    if held_out:
        named = [{"name": f"held-out-{number}"} | _axolotl_source(one, "") for number, one in enumerate(held_out)]
        made.set("data.validation", named)
    if made.take("val_set_size"):
        made.drop("val_set_size", "held-out text is a file of its own: data.validation")


def _axolotl_source(one: Mapping[str, Any], kind: str) -> Values:
    files = one.get("data_files")
    path = files[0] if isinstance(files, list) and files else files or one.get("path")
    source: Values = {"path": _place(str(path))}
    if one.get("field"):
        source["text"] = one["field"]
    if kind == "chat_template" and one.get("field_messages"):
        source["messages"] = one["field_messages"]
    hub = source["path"].startswith(HUB_PREFIX)
    return source | {ours: one[key] for key, ours in (("split", "split"), ("name", "subset")) if hub and one.get(key)}


def _llama_factory_data(made: Imported) -> None:
    stage = made.take("stage", "pt")
    if stage not in ("pt", "sft"):
        raise ConfigError(f"stage: {stage}: only pt and sft have a counterpart")
    folder = str(made.take("dataset_dir", "data"))
    sources = [{"path": f"{folder}/{name}.json"} for name in _names(made.take("dataset", []))]
    if sources:
        made.assumed.append(f"each data set is {folder}/NAME.json; dataset_info.json may say otherwise")
    _set_sources(made, sources, {"cpt" if stage == "pt" else "instruct"})
    if made.take("eval_dataset"):
        names = _names(made.given["eval_dataset"])
        made.set("data.validation", [{"name": name, "path": f"{folder}/{name}.json"} for name in names])
    for key in ("val_size", "template", "max_samples"):
        if made.take(key):
            why = {"val_size": "held-out text is a file of its own: data.validation", "template": "the tokenizer's own"}
            made.drop(key, why.get(key, "data.sources[].max_tokens counts tokens"))


def _set_sources(made: Imported, sources: list[Values], kinds: set[str]) -> None:
    if not sources:
        raise ConfigError("no data set in it that a recipe can read: give one of plain text or conversations")
    if len(kinds) > 1:
        raise ConfigError("plain text and conversations in one file: a recipe has one task")
    made.set("data.sources", sources)
    if "instruct" in kinds:
        made.set("task", "instruct")
        made.set("model.allow_instruct", True)


def _place(path: str) -> str:
    """ORG/NAME is a data set of the hub, unless a local path has that name."""
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists() and not Path(path).suffix
    return HUB_PREFIX + path if on_hub else path


# -- the rest ---------------------------------------------------------------------------------------------------------


def _schedule(made: Imported) -> None:
    for key in ("lr_scheduler", "lr_scheduler_type"):
        kind = made.take(key)
        if kind in _SCHEDULES:
            made.recipe["schedule"] = _SCHEDULES[kind] | made.recipe.get("schedule", {})
        elif kind is not None:
            made.drop(key, f"schedules are {', '.join(_SCHEDULES)}")


def _optimizer(made: Imported) -> None:
    for key in ("optimizer", "optim"):
        kind = str(made.take(key, "adamw_torch"))
        if "adamw" not in kind:
            made.drop(key, "the optimizer is AdamW")
        elif "8bit" in kind:
            made.set("optim.state", "8bit")
    first, second = made.take("adam_beta1"), made.take("adam_beta2")
    if first is not None or second is not None:
        made.set("optim.betas", [0.9 if first is None else first, 0.999 if second is None else second])


def _engine(made: Imported) -> None:
    deepspeed, fsdp = made.take("deepspeed"), made.take("fsdp")
    made.take("fsdp_config")
    stage = re.search(r"(?:zero|z)_?-?([123])", str(deepspeed)) if deepspeed else None
    if stage:
        made.set("engine", {"kind": "zero", "stage": int(stage[1])})
    elif fsdp or made.given.get("fsdp_config"):
        made.set("engine", {"kind": "fsdp", "shard": "full"})
    elif deepspeed:
        made.drop("deepspeed", "its name has no stage; engine: auto")
    recompute = made.take("gradient_checkpointing", made.program == "LLaMA-Factory")
    if recompute and not made.take("disable_gradient_checkpointing", False):
        made.recipe.setdefault("engine", {"kind": "auto"})["activation_checkpointing"] = "full"


def _evaluate(made: Imported) -> None:
    """There, an interval below 1 is a fraction of the run."""
    for theirs, ours in (("eval_steps", "evaluate.every_steps"), ("save_steps", "checkpoint.every_steps")):
        value = made.take(theirs)
        if isinstance(value, int) and value >= 1:
            made.set(ours, value)
        elif value is not None:
            made.drop(theirs, f"{ours} counts optimizer steps")


def _length(made: Imported, gpus: int) -> None:
    accumulation = made.take("gradient_accumulation_steps", 1)
    sequences = made.recipe.setdefault("batch", {}).setdefault("micro_batch", 1) * accumulation * gpus
    seq_len = made.recipe["data"].get("seq_len")
    if not isinstance(sequences, int) or not isinstance(seq_len, int):
        raise ConfigError("sequence length, micro-batch and accumulation must be whole numbers")
    made.set("batch.global_tokens", sequences * seq_len)
    made.assumed.append(f"{gpus} GPUs: a step is {sequences} sequences of {seq_len} tokens")
    steps = made.take("max_steps")
    if isinstance(steps, int) and steps > 0:
        made.set("train", {"tokens": steps * sequences * seq_len})
    elif not made.has("train.epochs"):
        made.set("train.epochs", 1.0)


def _names(value: Any) -> list[str]:
    listed = value if isinstance(value, list) else str(value).split(",")
    return [str(name).strip() for name in listed if str(name).strip()]
