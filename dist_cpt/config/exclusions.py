"""Settings that exclude each other: one table, read when a recipe is validated and when docs/recipe.md is generated.

To refuse another combination, add a row to `EXCLUSIONS`. What can only be known from the model, the data or the
number of ranks is checked where these are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dist_cpt.errors import printable

Recipe = Any  # a RunConfig, whose module imports this one

Settings = list[tuple[str, Any]]  # dotted keys and their values


@dataclass(frozen=True)
class Condition:
    """A condition on a recipe: its text for the documentation, and the settings that meet it (none: it is false)."""

    keys: tuple[str, ...]
    text: str
    matches: Callable[[Recipe], Settings]


@dataclass(frozen=True)
class Exclusion:
    """A recipe that meets all `conditions` is refused."""

    conditions: tuple[Condition, ...]
    why: str
    remedy: str

    def message(self, config: Recipe) -> str | None:
        """The refusal, naming keys and values; None if the recipe is fine."""
        matches = [condition.matches(config) for condition in self.conditions]
        if not all(matches):
            return None
        named = dict.fromkeys(f"{key}: {shown(value)}" for settings in matches for key, value in settings)
        return f"{', '.join(named)}: {self.why} -- {self.remedy}"


def refusals(config: Recipe) -> list[str]:
    """One line for each row of the table that the recipe violates."""
    return [message for row in EXCLUSIONS if (message := row.message(config)) is not None]


def is_(key: str, *values: Any) -> Condition:
    """`key` has one of `values`."""
    text = " or ".join(f"`{key}: {shown(value)}`" for value in values)
    return Condition((key,), text, lambda config: [(k, v) for k, v, _ in _read(config, key) if v in values])


def is_not(key: str, value: Any) -> Condition:
    """`key` has another value than `value`."""
    text = f"`{key}` other than `{shown(value)}`"
    return Condition((key,), text, lambda config: [(k, v) for k, v, _ in _read(config, key) if v != value])


def given(key: str) -> Condition:
    """`key` differs from its default."""
    return Condition(
        (key,), f"`{key}`", lambda config: [(k, v) for k, v, default in _read(config, key) if v != default]
    )


def absent(key: str) -> Condition:
    """`key` is left at its default."""
    return Condition((key,), f"no `{key}`", lambda config: [] if given(key).matches(config) else [(key, None)])


def contains(key: str, item: str) -> Condition:
    """The list `key` names `item`."""
    text = f"`{item}` in `{key}`"
    return Condition((key,), text, lambda config: [(k, v) for k, v, _ in _read(config, key) if item in v])


def either(*conditions: Condition) -> Condition:
    """At least one of `conditions` is met."""
    return Condition(
        tuple(key for condition in conditions for key in condition.keys),
        " or ".join(condition.text for condition in conditions),
        lambda config: [setting for condition in conditions for setting in condition.matches(config)],
    )


def above(left: str, right: str) -> Condition:
    """The number `left` is given and larger than the number `right`."""

    def test(config: Recipe) -> bool:
        ((_, small, _),), ((_, large, _),) = _read(config, right), _read(config, left)
        return large is not None and large > small

    return when(f"`{left}` above `{right}`", (left, right), test)


def when(text: str, keys: tuple[str, ...], test: Callable[[Recipe], bool]) -> Condition:
    """A test of the whole recipe that depends on `keys`."""
    return Condition(
        keys, text, lambda config: [(k, v) for key in keys for k, v, _ in _read(config, key)] if test(config) else []
    )


def _read(config: Recipe, key: str) -> Iterator[tuple[str, Any, Any]]:
    """(key, value, default) of each place `key` names: `a[].b` is b of every item of a; an absent section has none."""
    *sections, last = key.split(".")
    places: list[tuple[str, Any]] = [("", config)]
    for section in sections:
        name = section.removesuffix("[]")
        items = [(f"{path}{name}", getattr(place, name)) for path, place in places]
        if section != name:
            items = [(f"{path}.{i}", item) for path, values in items for i, item in enumerate(values)]
        places = [(f"{path}.", item) for path, item in items if item is not None]
    return ((path + last, getattr(place, last), type(place).model_fields[last].default) for path, place in places)


def shown(value: Any) -> str:
    """A value as a recipe spells it, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict | BaseModel):
        return "{...}" if value else "{}"
    text = printable(str(value))
    return text if len(text) <= 80 else f"{text[:80]}..."


def _unpinned(config: Recipe) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", config.model.revision or "") is None


def _reads_other_tokens(config: Recipe) -> bool:
    named = (config.data.tokenizer, config.embeddings.new_tokens)
    return None not in named and len({Path(str(path)).expanduser().absolute() for path in named}) == 2


def _rows_do_not_train(config: Recipe) -> bool:
    needed = {"embed_tokens"} if config.task == "classify" else {"embed_tokens", "lm_head"}
    return not needed <= set(config.embeddings.train)


def _never_thaws(config: Recipe) -> bool:
    return 0 < num_steps(config) <= config.embeddings.freeze_rest_steps


def _stages_end_early(config: Recipe) -> bool:
    lengths = [stage.tokens for stage in config.data.stages]
    return None not in (config.train.tokens, *lengths) and 0 < sum(lengths) < config.train.tokens


def _stage_never_begins(config: Recipe) -> bool:
    tokens = config.train.tokens
    return tokens is not None and sum(stage.tokens or 0 for stage in config.data.stages[:-1]) >= tokens


def _limits_without_effect(config: Recipe) -> Settings:
    return [
        (f"data.sources.{number}.{key}", limit)
        for number, source in enumerate(config.data.sources)
        for key, limit in (("max_tokens", source.max_tokens), ("max_epochs", source.max_epochs))
        if limit is not None and source.on_exhausted == "repeat"
    ]


def _limits_below_a_sequence(config: Recipe) -> Settings:
    return [
        (f"data.sources.{number}.max_tokens", source.max_tokens)
        for number, source in enumerate(config.data.sources)
        if source.max_tokens is not None and source.max_tokens < config.data.seq_len
    ]


def _no_retention_set(config: Recipe) -> bool:
    return not any(held_out.role == "retention" for held_out in config.data.validation)


def _best_of_nothing(config: Recipe) -> bool:
    best = config.evaluate.best
    tasks = config.evaluate.tasks  # lm-eval knows the subtasks of their groups
    names = {held_out.name for held_out in config.data.validation}
    return best is not None and tasks is None and best.name_and_key[0] not in names


def _half_a_pair(config: Recipe) -> bool:
    texts = (*config.data.sources, *config.data.validation)
    return any((text.prompt is None) != (text.response is None) for text in texts)


def num_steps(config: Recipe) -> int:
    """Optimizer steps of the whole run; 0 while the data has yet to say what `train.epochs` are."""
    return -(-(config.train.tokens or 0) // config.batch.global_tokens)


def _shapes(config: Recipe) -> tuple[Any, ...]:
    """The schedule of every group."""
    return (config.schedule, *config.schedule.per_group.values())


def _length_twice(phase: str) -> Callable[[Recipe], bool]:
    def test(config: Recipe) -> bool:
        fraction = f"{phase}_fraction"
        return any(
            getattr(shape, f"{phase}_steps") is not None
            and getattr(shape, fraction) != type(shape).model_fields[fraction].default
            for shape in _shapes(config)
        )

    return test


def _idle_length(phase: str, *kinds: str) -> Callable[[Recipe], bool]:
    return lambda config: any(
        getattr(shape, f"{phase}_steps") is not None and shape.kind not in kinds for shape in _shapes(config)
    )


def _longer_than_the_run(config: Recipe) -> bool:
    steps = num_steps(config) - max(config.schedule.start_step, config.embeddings.freeze_rest_steps)
    return any(
        0 < steps < sum(length or 0 for length in (shape.warmup_steps, shape.cooldown_steps, shape.decay_steps))
        for shape in _shapes(config)
    )


def _profiles_nothing(config: Recipe) -> bool:
    return config.track.profile is not None and 0 < num_steps(config) < config.track.profile[1]


def _part_of_a_sequence(config: Recipe) -> bool:
    return config.batch.global_tokens % config.data.seq_len != 0


def _hub_keys_elsewhere(config: Recipe) -> bool:
    texts = (*config.data.sources, *config.data.validation)
    return any((text.revision or text.subset) and not text.place.startswith("hf://") for text in texts)


def _filtered_store(config: Recipe) -> bool:
    return any(text.filter and text.store for text in (*config.data.sources, *config.data.validation))


_TEXTS = ("data.sources[]", "data.validation[]")
_LIMITS = tuple(f"data.sources[].{key}" for key in ("max_tokens", "max_epochs", "on_exhausted"))
_PAIR = tuple(f"{text}.{field}" for text in _TEXTS for field in ("prompt", "response"))
_HUB_KEYS = tuple(f"{text}.{field}" for text in _TEXTS for field in ("revision", "subset"))
_FILTERS = tuple(f"{text}.filter" for text in _TEXTS)
_STREAMING = is_("data.streaming", True)
_QUANTISED = is_("model.weights", "fp8", "nf4", "int8")
_SCRATCH = given("model.config")
_FULL = is_("adapter.kind", "none")
_OFFLOADED_BASE = is_("engine.offload", "base", "both")
_LORA = is_("adapter.kind", "lora")
_DORA = is_("adapter.dora", True)
_PISSA = is_("adapter.init", "pissa")
_CONTINUED = given("adapter.continue_from")
_NO_MATRIX = absent("embeddings.train")
_NONE_TRAINED = Condition(
    ("embeddings.train", "adapter.continue_from"),
    "neither `embeddings.train` nor `adapter.continue_from`",
    lambda config: [] if _CONTINUED.matches(config) else _NO_MATRIX.matches(config),
)
_NEW_TOKENS = given("embeddings.new_tokens")
_UNTIED = is_("embeddings.tie", "untie")
_LOW_RANK = is_("embeddings.kind", "lora")
_NEW_ROWS = is_("embeddings.rows", "new")
_CLASSIFY = is_("task", "classify")
_LIMITED = Condition(
    ("evaluate.forgetting",),
    "`evaluate.forgetting`",
    lambda config: given("evaluate.forgetting").matches(config) if config.evaluate.forgetting else [],
)
_MESSAGES = either(*(given(key) for key in (*(f"{text}.messages" for text in _TEXTS), *_PAIR)))

# fmt: off
EXCLUSIONS = (
    # where the model comes from
    Exclusion((given("model.path"), _SCRATCH),
              "a model is either loaded or initialised from scratch", "give one of them"),
    Exclusion((absent("model.path"), absent("model.config")),
              "there is no model to train",
              "give model.path (a folder or hub id), or model.config to initialise from scratch"),
    Exclusion((is_("model.trust_remote_code", True),
               when("`model.revision` other than a 40-digit commit hash", ("model.revision",), _unpinned)),
              "only the code of one commit may run", "set model.revision to the commit's 40-digit hash"),
    Exclusion((_SCRATCH, absent("data.tokenizer")),
              "a model from scratch brings no tokenizer", "set data.tokenizer"),
    Exclusion((_SCRATCH, _LORA),
              "an adapter on random weights learns nothing useful", "use adapter.kind: none"),
    Exclusion((_SCRATCH, either(_NEW_TOKENS, _UNTIED)),
              "these change a pretrained base", "set data.tokenizer, and tie_word_embeddings in model.config"),
    Exclusion((_SCRATCH, given("model.rope_scaling")),
              "a model from scratch has no rotation to rescale", "set rope_parameters in model.config"),
    # quantised bases
    Exclusion((_QUANTISED, _SCRATCH),
              "only pretrained weights can be quantised", "use model.weights: bf16"),
    Exclusion((_QUANTISED, _FULL),
              "quantised weights cannot train", "use adapter.kind: lora, or model.weights: bf16"),
    Exclusion((_QUANTISED, _PISSA),
              "PiSSA takes the principal part out of 16-bit weights",
              "use model.weights: bf16, or adapter.init: default"),
    Exclusion((_QUANTISED, _DORA),
              "DoRA needs the norms of whole weights at every step", "use model.weights: bf16, or adapter.dora: false"),
    # variants of the adapter, and the adapter a run starts from
    Exclusion((_FULL, either(_DORA, _PISSA, *map(given, ("adapter.lora_plus_ratio", "adapter.expert_rank")),
                             is_("adapter.experts", "frozen"))),
              "there is no adapter", "use adapter.kind: lora"),
    Exclusion((_FULL, is_("model.router", "frozen")),
              "every parameter trains", "leave model.router out"),
    Exclusion((_FULL, given("optim.router_lr")),
              "routers train with the other matrices, at optim.lr", "leave optim.router_lr out"),
    Exclusion((_LORA, is_not("model.router", "train"), either(given("model.router_z_loss"), given("optim.router_lr"))),
              "routers are frozen under an adapter", "set model.router: train"),
    Exclusion((is_("adapter.experts", "frozen"), given("adapter.expert_rank")),
              "frozen experts have no matrices", "leave adapter.expert_rank out"),
    Exclusion((_FULL, _CONTINUED),
              "there is no adapter to continue", "use adapter.kind: lora, or name the full model in model.path"),
    Exclusion((_DORA, _PISSA),
              "DoRA's magnitudes are those of whole weights, and PiSSA leaves a residual in the base",
              "use one of them"),
    Exclusion((_PISSA, _CONTINUED),
              "PiSSA starts from the base's own weights",
              "merge that adapter first (dist-cpt merge) and set model.path to the result"),
    Exclusion((_DORA, is_("adapter.continue_from.mode", "stack")),
              "DoRA's magnitudes would be those of the base without the stacked adapter",
              "use adapter.continue_from.mode: fold"),
    Exclusion((is_("adapter.continue_from.optimizer", True), is_("adapter.continue_from.mode", "fold", "stack")),
              "a new adapter has no optimizer state to take over",
              "use adapter.continue_from.mode: train, or optimizer: false"),
    Exclusion((is_("adapter.continue_from.freeze_embeddings", True), is_("adapter.continue_from.mode", "train")),
              "mode train continues everything the adapter trained",
              "use adapter.continue_from.mode: fold or stack, or freeze_embeddings: false"),
    Exclusion((is_("data.bos", "always", "never"), is_("task", "instruct", "classify")),
              "the chat template, or the tokenizer itself, begins these texts", "leave data.bos out"),
    # vocabulary
    Exclusion((_FULL, given("embeddings.train")),
              "every parameter trains already", "leave embeddings.train out, or use adapter.kind: lora"),
    Exclusion((_CLASSIFY, contains("embeddings.train", "lm_head")),
              "a classifier has no lm_head", "use embeddings.train: [embed_tokens]"),
    Exclusion((absent("embeddings.new_tokens"),
               either(_NEW_ROWS, given("embeddings.pad_rows_to"), is_("embeddings.init", "focus"))),
              "without new tokens no row is added", "set embeddings.new_tokens to the extended tokenizer"),
    Exclusion((_NEW_TOKENS,
               when("`data.tokenizer` other than `embeddings.new_tokens`", ("data.tokenizer",), _reads_other_tokens)),
              "the text is read with the extended tokenizer", "leave data.tokenizer out"),
    Exclusion((_NEW_TOKENS, _LORA,
               when("`embeddings.train` without a matrix that gets rows", ("embeddings.train",), _rows_do_not_train),
               either(absent("adapter.continue_from"), is_("adapter.continue_from.mode", "train"))),
              "the new rows would be in no file of the run",
              "use embeddings.train: [embed_tokens, lm_head] (task: classify: [embed_tokens])"),
    Exclusion((_UNTIED, _CLASSIFY),
              "a classifier drops the head that untie would make", "use embeddings.tie: keep"),
    Exclusion((_UNTIED, _LORA, _NONE_TRAINED),
              "matrices that do not train stay equal", "set embeddings.train, or embeddings.tie: keep"),
    Exclusion((_LOW_RANK, either(_FULL, _NO_MATRIX, _CLASSIFY)),
              "low-rank updates belong to an adapter, to matrices in embeddings.train and to a language model",
              "use embeddings.kind: full"),
    Exclusion((_LOW_RANK, either(_NEW_TOKENS, _UNTIED)),
              "a low-rank update cannot hold new rows or a second matrix", "use embeddings.kind: full"),
    Exclusion((_LOW_RANK, either(_DORA, _PISSA, given("adapter.dropout"), _CONTINUED)),
              "low-rank embeddings are implemented for new, plain LoRA only", "use embeddings.kind: full"),
    Exclusion((_NEW_ROWS, given("optim.embedding_weight_decay")),
              "weight decay would move the old rows", "use optim.embedding_weight_decay: 0"),
    Exclusion((_NEW_ROWS, is_("adapter.continue_from.optimizer", True)),
              "the moments taken over would move the old rows", "use adapter.continue_from.optimizer: false"),
    Exclusion((given("embeddings.freeze_rest_steps"), _LORA, _NO_MATRIX),
              "nothing would train in those steps", "set embeddings.train"),
    Exclusion((given("embeddings.freeze_rest_steps"),
               when("`train.tokens` for no more steps", ("train.tokens", "batch.global_tokens"), _never_thaws)),
              "nothing else would ever train", "use fewer steps, or more tokens"),
    # the length of the run, and what is read in it
    Exclusion((given("train.tokens"), given("train.epochs")),
              "the length is given twice", "give one of them (the other as null)"),
    Exclusion((absent("train.tokens"), absent("train.epochs")),
              "the run has no length", "give train.tokens, or train.epochs"),
    Exclusion((Condition(_LIMITS, "`data.sources[].max_tokens` or `max_epochs`, and `on_exhausted: repeat` there",
                         _limits_without_effect),),
              "a source that repeats has no limit", "set on_exhausted: drop or error there, or leave the limit out"),
    Exclusion((Condition(_LIMITS, "`data.sources[].max_tokens` below `data.seq_len`", _limits_below_a_sequence),),
              "not one sequence would be read", "use data.seq_len or more, or leave the source out"),
    Exclusion((given("data.stages"), given("data.sources[].weight")),
              "the stages give the weights", "leave the weights of the sources out"),
    Exclusion((when("`data.stages` shorter than `train.tokens`", ("data.stages[].tokens", "train.tokens"),
                    _stages_end_early),),
              "the stages end before the run", "leave tokens out of the last stage"),
    Exclusion((when("a stage after `train.tokens`", ("data.stages[].tokens", "train.tokens"), _stage_never_begins),),
              "the last stage would never begin", "use more tokens, or shorter stages"),
    # text that is read while training
    Exclusion((_STREAMING, given("train.epochs")),
              "how much text there is shows only while it is read", "give train.tokens"),
    Exclusion((_STREAMING, given("data.sources[].store")),
              "a finished store needs no streaming", "give the text in path, or leave data.streaming out"),
    Exclusion((_STREAMING, either(*(given(key) for key in _LIMITS), is_("data.share_of", "tokens"))),
              "how many sequences a source has shows only while it is read",
              "leave these out, or prepare the text (data.streaming: false)"),
    Exclusion((_STREAMING, is_("data.packing", "windows")),
              "a stream packs whole documents and pieces", "use data.packing: best_fit, or data.streaming: false"),
    Exclusion((_STREAMING, either(is_not("data.deduplicate", "none"), is_("data.decontaminate", "drop"))),
              "documents can be compared only once all are read",
              "leave these out, or prepare the text (data.streaming: false)"),
    # tasks and their data
    Exclusion((_CLASSIFY, absent("classify")),
              "the classes are unknown", "add a section classify with labels or num_labels"),
    Exclusion((is_not("task", "classify"), given("classify")),
              "the section is for classification", "use task: classify, or leave it out"),
    Exclusion((given("classify.labels"), given("classify.num_labels")),
              "the number of classes is given twice", "give labels (names), or num_labels if records hold numbers"),
    Exclusion((given("classify"), absent("classify.labels"), absent("classify.num_labels")),
              "the classes are unknown", "give labels (names), or num_labels if records hold numbers"),
    Exclusion((is_not("task", "classify"), given("optim.head_lr")),
              "there is no classification head", "leave optim.head_lr out, or use task: classify"),
    Exclusion((is_not("task", "cpt"), is_("data.packing", "windows")),
              "this task keeps every record whole", "use data.packing: best_fit"),
    Exclusion((is_not("task", "instruct"), given("data.chat_template")),
              "only conversations are rendered by a template", "leave data.chat_template out, or use task: instruct"),
    Exclusion((is_not("task", "instruct"), _MESSAGES),
              "only conversations have these fields", "leave them out, or use task: instruct"),
    Exclusion((when("`prompt` without `response`, or the reverse", _PAIR, _half_a_pair),),
              "a question and its answer are read together", "give both, or neither"),
    Exclusion((when("`revision` or `subset` of a source that is not on the hub", _HUB_KEYS, _hub_keys_elsewhere),),
              "only a data set of the hub has them", "leave them out, or use path: hf://datasets/ORG/NAME"),
    Exclusion((when("`filter` of a `store`", _FILTERS, _filtered_store),),
              "a finished store is not filtered", "give the text in path"),
    Exclusion((is_("data.decontaminate", "drop"), absent("data.validation")),
              "there is no held-out set to compare with", "give data.validation, or leave it out"),
    Exclusion((is_not("data.packing", "windows"), either(given("data.stride"), is_not("data.overlap", "train"))),
              "only windows overlap", "use data.packing: windows, or leave them out"),
    Exclusion((above("data.stride", "data.seq_len"),),
              "the tokens between two windows would be left out", "use a stride of at most data.seq_len"),
    Exclusion((when("`batch.global_tokens` not a multiple of `data.seq_len`", ("batch.global_tokens", "data.seq_len"),
                    _part_of_a_sequence),),
              "a step is a whole number of sequences", "use a multiple of data.seq_len"),
    # forgetting
    Exclusion((_LIMITED, when("no held-out set of `role: retention`", ("data.validation",), _no_retention_set)),
              "there is nothing that could be forgotten",
              "give data.validation a set with role: retention, or leave evaluate.forgetting out"),
    Exclusion((_LIMITED, either(_SCRATCH, _CLASSIFY, is_("evaluate.against", None))),
              "there is no base to compare with", "leave evaluate.forgetting out"),
    Exclusion((when("`evaluate.best.of` that names no held-out set", ("evaluate.best.of", "data.validation"),
                    _best_of_nothing),),
              "there is nothing to compare", "use the name of a held-out set, or NAME/NUMBER such as answers/accuracy"),
    Exclusion((given("evaluate.best"), absent("evaluate.every_steps")),
              "only the last step would be evaluated", "give evaluate.every_steps"),
    Exclusion((given("evaluate.tasks"), either(_CLASSIFY, given("engine.context_parallel"))),
              "questions are answered by a language model that sees them whole",
              "leave evaluate.tasks out, and use dist-cpt evaluate --tasks afterwards"),
    # schedules; also those of `schedule.per_group`
    *(Exclusion((when(f"`{phase}_steps` and `{phase}_fraction` in one schedule",
                      (f"schedule.{phase}_steps", f"schedule.{phase}_fraction"), _length_twice(phase)),),
                "the length of one phase is given twice", "leave one of them out")
      for phase in ("warmup", "cooldown", "decay")),
    Exclusion((when("`decay_steps` in a schedule other than `wsd` or `infinite`",
                    ("schedule.decay_steps", "schedule.kind"), _idle_length("decay", "wsd", "infinite")),),
              "only these end with a decay of their own", "use kind: wsd or infinite, or leave decay_steps out"),
    Exclusion((when("`cooldown_steps` in a schedule other than `infinite`",
                    ("schedule.cooldown_steps", "schedule.kind"), _idle_length("cooldown", "infinite")),),
              "only an infinite schedule cools down", "use kind: infinite, or leave cooldown_steps out"),
    Exclusion((when("`decay` in a schedule other than `wsd` or `infinite`", ("schedule.decay", "schedule.kind"),
                    lambda config: any(shape.decay != "linear" and shape.kind not in ("wsd", "infinite")
                                       for shape in _shapes(config))),),
              "only these end with a decay of their own", "use kind: wsd or infinite, or leave decay out"),
    Exclusion((when("phases in steps that are longer than the run",
                    ("schedule.warmup_steps", "schedule.cooldown_steps", "schedule.decay_steps", "schedule.start_step",
                     "train.tokens"), _longer_than_the_run),),
              "the run ends within them", "use fewer steps, or more tokens"),
    Exclusion((when("`schedule.start_step` at or after the last step", ("schedule.start_step", "train.tokens"),
                    lambda config: 0 < num_steps(config) <= config.schedule.start_step),),
              "the schedule would never begin", "use more tokens"),
    # engines, checkpoints, health
    Exclusion((given("engine.stage"), is_not("engine.kind", "zero")),
              "stages are ZeRO's", "use engine.kind: zero, or leave engine.stage out"),
    Exclusion((given("engine.shard"), is_not("engine.kind", "fsdp")),
              "this is FSDP's choice of what is sharded", "use engine.kind: fsdp, or leave engine.shard out"),
    Exclusion((given("engine.dp_shard"), is_not("engine.shard", "hybrid")),
              "only hybrid sharding has shard groups",
              "use engine: {kind: fsdp, shard: hybrid}, or leave engine.dp_shard out"),
    Exclusion((is_("engine.reshard_after_forward", False), is_not("engine.kind", "fsdp")),
              "only FSDP can keep gathered weights",
              "use engine.kind: fsdp, or leave engine.reshard_after_forward out"),
    Exclusion((is_("engine.reduce", "step"), is_not("engine.kind", "fsdp")),
              "only FSDP can put off the sum of gradients", "use engine.kind: fsdp, or leave engine.reduce out"),
    Exclusion((_OFFLOADED_BASE, _FULL),
              "nothing is frozen", "use engine.offload: optimizer"),
    Exclusion((_OFFLOADED_BASE, either(is_("engine.kind", "single"), is_("engine.shard", "trainable"),
                                       is_("engine.stage", 1, 2))),
              "this engine keeps the base whole on the device",
              "use engine: {kind: fsdp, shard: full}, which runs on one rank too, or {kind: zero, stage: 3}"),
    Exclusion((is_("engine.offload", "optimizer"), is_("engine.stage", 1, 2)),
              "deepspeed then sums the micro-batches in bf16", "use stage: 3, or engine.kind: fsdp"),
    Exclusion((_OFFLOADED_BASE, is_("engine.reshard_after_forward", False)),
              "the whole base would be on the device from forward to backward",
              "leave engine.reshard_after_forward out"),
    Exclusion((given("engine.context_parallel"), is_("engine.kind", "single")),
              "a single rank has nobody to share a sequence with", "use engine.kind: fsdp or zero"),
    Exclusion((when("`data.seq_len` not a multiple of `engine.context_parallel`",
                    ("data.seq_len", "engine.context_parallel"),
                    lambda config: config.data.seq_len % config.engine.context_parallel != 0),),
              "the ranks that share a sequence have equal parts of it", "use a multiple"),
    Exclusion((given("engine.context_parallel"), is_("model.attention", "flash_attention_2")),
              "transformers calls it with the tokens of one rank", "use model.attention: auto"),
    Exclusion((when("`track.profile` after the last step", ("track.profile", "train.tokens"), _profiles_nothing),),
              "no such step is trained", "profile earlier steps"),
    Exclusion((above("health.spike.min_history", "health.spike.window"),),
              "the window never holds enough steps, so no spike would be seen",
              "use a window of at least min_history steps"),
    Exclusion((is_("health.spike.policy", "rollback"), is_("checkpoint.every_minutes", None),
               is_("checkpoint.every_steps", None)),
              "there is no checkpoint to roll back to", "set checkpoint.every_minutes or checkpoint.every_steps"),
)
# fmt: on
