"""The recipe as frozen values. It imports no torch, so that a login node can load it.

Every key has an attribute docstring, which docs/recipe.md shows. A validator here looks at one key, or compares the
numbers of one section; settings that exclude each other are rows of `exclusions.py`.
"""

from __future__ import annotations

import re
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from dist_cpt.config.exclusions import refusals


def _text_template(value: str) -> str:
    """Refuse what is neither a field nor a template of fields."""
    for _, name, spec, conversion in Formatter().parse(value):
        if name == "" or spec or conversion:
            raise ValueError("name a field in each pair of braces, without a format; {{ is a brace")
    return value


HUB_PREFIX = "hf://datasets/"  # as huggingface_hub's file system names data sets


def _local_or_hub(value: str) -> str:
    """Refuse a place that would be taken for a local path."""
    if "://" in value and not re.fullmatch(HUB_PREFIX + r"([\w.-]+/)?[\w.-]+", value):
        raise ValueError(
            "give a local path or hf://datasets/ORG/NAME (revision, subset and split are keys of their own); "
            "copy or mount what lies elsewhere"
        )
    return value


TextPath = Annotated[str, AfterValidator(_local_or_hub)]


def _function_name(value: str) -> str:
    """Refuse what cannot be imported."""
    if not re.fullmatch(r"[\w.]+:[\w.]+", value):
        raise ValueError("name a function as package.module:function")
    return value


FunctionName = Annotated[str, AfterValidator(_function_name)]
TextField = Annotated[str, AfterValidator(_text_template)]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class RopeScalingConfig(Frozen):
    """Rescaled rotary positions for sequences longer than the base's, in the words of transformers' `rope_parameters`;
    null keeps the base's own. A merged or exported model has them in its config.json."""

    rope_type: Literal["linear", "dynamic", "yarn", "llama3"]
    """How the angles are scaled."""
    factor: float = Field(gt=1.0)
    """The new length as a multiple of the original one."""
    rope_theta: PositiveFloat | None = None
    """The base of the angles' frequencies; null keeps the model's."""
    original_max_position_embeddings: PositiveInt | None = None
    """The length that `yarn` and `llama3` scale from; null means the model's, before any scaling of its own."""
    attention_factor: PositiveFloat | None = None
    """`yarn`: a factor on queries and keys; null computes it from `factor`."""
    beta_fast: PositiveFloat | None = None
    """`yarn`: rotations per original length above which a frequency is kept; null means 32."""
    beta_slow: PositiveFloat | None = None
    """`yarn`: rotations per original length below which a frequency is divided by `factor`; null means 1."""
    low_freq_factor: PositiveFloat | None = None
    """`llama3`: wavelengths above the original length over this one are multiplied by `factor`; null means 1."""
    high_freq_factor: PositiveFloat | None = None
    """`llama3`: wavelengths below the original length over this one are kept; null means 4."""

    @model_validator(mode="after")
    def _keys_of_the_type(self) -> RopeScalingConfig:
        own = {
            "yarn": {"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"},
            "llama3": {"original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
        }.get(self.rope_type, set())
        for key, value in self:
            if value is not None and key not in {"rope_type", "factor", "rope_theta"} | own:
                raise ValueError(f"{key} does nothing with rope_type: {self.rope_type}; leave it out")
        return self


class ModelConfig(Frozen):
    """The causal language model that is trained: a pretrained one, or one initialised from scratch."""

    path: str | None = None
    """A local folder with a Hugging Face model, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of the hub id; null means the default branch."""
    config: dict[str, Any] | None = None
    """A transformers config, with its `model_type`, for a model with random weights drawn from `seed`."""
    weights: Literal["fp32", "bf16", "fp8", "nf4", "int8"] = "bf16"
    """Storage type of the frozen weights; trainable tensors always have fp32 master weights."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Which operations are fused: `auto` fuses what it can, with `triton` anything left unfused is an error, and
    `reference` fuses nothing."""
    attention: Literal["auto", "flash_attention_2", "varlen", "flex", "mask", "documents"] = "auto"
    """How attention keeps packed documents apart; `auto` takes the fastest way that can run this model here."""
    router: Literal["frozen", "train"] | None = None
    """Train the routers of a mixture of experts, with the balancing loss of its config; null means `train` with
    `adapter.kind: none` and `frozen` under an adapter."""
    router_z_loss: float = Field(default=0.0, ge=0.0)
    """The coefficient of the mean square of the routers' log-sum-exp (z-loss), in addition to the balancing loss."""
    rope_scaling: RopeScalingConfig | None = None
    trust_remote_code: bool = False
    """Run the Python code in the model's folder, for an architecture that transformers does not have."""
    allow_instruct: bool = False
    """Allow `task: cpt` on a model that looks like an instruct checkpoint."""

    @field_validator("config")
    @classmethod
    def _has_model_type(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and "model_type" not in value:
            raise ValueError("needs model_type, for example llama")
        return value

    @property
    def compute_dtype(self) -> Literal["fp32", "bf16"]:
        """The dtype of activations and of the copies of trainable tensors used in forward and backward."""
        return "fp32" if self.weights == "fp32" else "bf16"


class ContinueFromConfig(Frozen):
    """An adapter that the run starts from; a bare path stands for `{path: PATH}`, null starts a new adapter. What the
    recipe leaves out of rank, alpha, rslora, targets and dora, of `embeddings.train` and `embeddings.tie` is the
    folder's."""

    path: str
    """A PEFT folder, a `checkpoint-N` of the Hugging Face Trainer, or a checkpoint of dist-cpt."""
    mode: Literal["train", "fold", "stack"] = "train"
    """`train` continues that adapter, `fold` merges it into the base under a new adapter, and `stack` keeps it active
    and frozen beside a new one."""
    optimizer: bool = False
    """Also take over AdamW's moments and step count."""
    freeze_embeddings: bool = False
    """Keep the vocabulary matrices frozen that the adapter trained in full, instead of training them further."""
    other_base: bool = False
    """Accept a checkpoint of dist-cpt that was trained on other base weights."""


class AdapterConfig(Frozen):
    """The LoRA adapter, in PEFT's format."""

    kind: Literal["lora", "none"] = "lora"
    """`lora` trains an adapter on a frozen base; `none` trains every parameter."""
    rank: PositiveInt = 128
    """The rank of the two LoRA matrices of each layer."""
    alpha: PositiveFloat = 128
    """The numerator of the adapter's scale."""
    rslora: bool = True
    """Scale the adapter by alpha / sqrt(rank) (rsLoRA) instead of alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability with which an input value of the adapter is zeroed in training."""
    targets: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers to adapt; `all-linear` means all of them but the output head."""
    experts: Literal["lora", "frozen"] = "lora"
    """Adapt the experts of a mixture where `targets` includes them, or leave them `frozen`."""
    expert_rank: PositiveInt | None = None
    """The rank of each expert's matrices; null means `rank` divided by the experts that a token visits, at least 1."""
    lora_plus_ratio: float | None = Field(default=None, gt=1.0)
    """LoRA+: the B matrices train at this multiple of `optim.lr`."""
    dora: bool = False
    """DoRA: also train the magnitude of each row of the adapted weights."""
    init: Literal["default", "pissa"] = "default"
    """How A and B start: `default` as a product of zero, `pissa` as the principal singular part of each weight."""
    continue_from: ContinueFromConfig | None = None

    @field_validator("continue_from", mode="before")
    @classmethod
    def _bare_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class EmbeddingsConfig(Frozen):
    """Training of the vocabulary matrices beside the adapter, and new tokens."""

    train: tuple[Literal["embed_tokens", "lm_head"], ...] = ()
    """The vocabulary matrices that train beside the adapter, at `optim.embedding_lr`."""
    kind: Literal["full", "lora"] = "full"
    """Train these matrices in `full`, or by low-rank updates of the adapter's rank (`lora`)."""
    new_tokens: str | None = None
    """A folder or hub id (`ORG/NAME@REVISION`) of a tokenizer that extends the base's, as `dist-cpt tokenizer extend`
    writes it."""
    init: Literal["mean_of_subtokens", "focus"] = "mean_of_subtokens"
    """How the row of a new token starts: as the mean of its old tokens' rows, or as a FOCUS mixture of old rows."""
    rows: Literal["all", "new"] = "all"
    """Train all rows of these matrices, or only those of new tokens."""
    pad_rows_to: PositiveInt = 64
    """A matrix that grows gets a multiple of this many rows."""
    freeze_rest_steps: int = Field(default=0, ge=0)
    """Number of first optimizer steps in which only the vocabulary matrices train."""
    tie: Literal["keep", "untie"] = "keep"
    """`untie` makes the head of a tied base a separate copy of its embedding."""


MAX_RECORD_BYTES = 2_000_000_000  # a store counts the tokens of a document in 31 bits


class TextConfig(Frozen):
    """Where text comes from, and which fields of its records are read."""

    path: TextPath | None = None
    """A file, a folder, a glob pattern, a data set that `datasets` saved to disk, or one of the hub as
    `hf://datasets/ORG/NAME`; docs/data.md lists the formats."""
    store: str | None = None
    """A finished token store in place of `path`: its text is not needed."""
    text: TextField = "text"
    """The document: a field, a dotted path (`meta.text`) or a template (`"{title}\\n\\n{body}"`)."""
    split: str | None = None
    """The split of a saved data set, or of one of the hub, that has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; null means the default branch. The commit is resolved once."""
    subset: str | None = None
    """The subset (configuration) of a hub data set that has several."""
    filter: FunctionName | None = None
    """A function of yours, `package.module:function`: it gets each record as a dict and returns whether it is kept."""
    ignore: tuple[str, ...] = ()
    """Patterns of files in the folder or archive that are not read, such as `"*.png"`; any other is an error."""
    messages: str = "messages"
    """The field with the conversation, a list of `{role, content}`."""
    prompt: str | None = None
    """The field with the question, where records have no `messages`."""
    response: str | None = None
    """The field with the answer to `prompt`."""

    @model_validator(mode="after")
    def _one_place(self) -> TextConfig:
        if (self.path is None) == (self.store is None):
            raise ValueError("give either path, where the text is, or store, a folder that prepare made")
        return self

    @property
    def place(self) -> str:
        """The text's path, or the store's."""
        place = self.path or self.store
        assert place is not None
        return place


class SourceConfig(TextConfig):
    """A training source; a recipe has at least one."""

    name: str | None = None
    """The source's name in stores, metrics and the report; null means the stem of the path."""
    weight: PositiveFloat = 1.0
    """Share relative to the other sources, of what `data.share_of` names."""
    role: Literal["domain", "replay"] = "domain"
    """Whether the source is new text or a replay of what the base knows."""
    max_tokens: PositiveInt | None = None
    """Most tokens that are read of the source, counted as `train.tokens` and rounded down to whole sequences."""
    max_epochs: PositiveFloat | None = None
    """Most times that the source is read; fractions are rounded down to whole sequences."""
    on_exhausted: Literal["repeat", "error", "drop"] = "repeat"
    """What follows the source's last sequence: `repeat` reads it again, `error` refuses the run before its first step,
    `drop` leaves it out and gives its share to the others. The last one is where a limit is reached; without one, where
    all of the source has been read once."""


class ValidationConfig(TextConfig):
    """A held-out set; by default there is none."""

    name: str
    """The set's name in metrics and the report."""
    role: Literal["domain", "retention"] = "domain"
    """Whether the set measures what is learned (`domain`) or what the base must not forget (`retention`)."""


class StageConfig(Frozen):
    """A part of the run with weights of its own."""

    tokens: PositiveInt | None = None
    """Length, counted as `train.tokens`, rounded up to whole sequences; without it the last stage runs to the end."""
    weights: dict[str, PositiveFloat] = Field(min_length=1)
    """Weight by the source's name; a source that is not named is not read in this stage."""


class DataConfig(Frozen):
    """The text, and how it becomes sequences."""

    seq_len: PositiveInt = 4096
    """Length of a sequence in tokens."""
    packing: Literal["best_fit", "windows"] = "best_fit"
    """`best_fit` packs whole documents and pieces into sequences; `windows` slides a window over each document."""
    stride: PositiveInt | None = None
    """Tokens from the start of one window to the next; null means `seq_len`, without overlap."""
    overlap: Literal["train", "context"] = "train"
    """Whether tokens that an earlier window had are targets again (`train`) or only `context`."""
    chat_template: str | None = None
    """A jinja template or the path of one; null means the tokenizer's own."""
    tokenizer: str | None = None
    """A tokenizer's folder or hub id (`ORG/NAME@REVISION`); null means `embeddings.new_tokens`, else `model.path`."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether a document begins with the BOS token; with `auto` it does if the tokenizer begins texts with it."""
    on_bad_record: Literal["error", "skip", "quarantine"] = "error"
    """What an unreadable record does: end the run with exit code 65, be left out, or be left out and kept in a file."""
    max_record_bytes: int = Field(default=MAX_RECORD_BYTES, ge=1, le=MAX_RECORD_BYTES)
    """Bytes of the largest record; a larger one is a bad record."""
    bad_record_budget_fraction: float = Field(default=0.001, ge=0.0, le=1.0)
    """Fraction of a source's records that may be left out before the run ends with exit code 65."""
    deduplicate: Literal["none", "exact", "near"] = "none"
    """Leave out documents that repeat an earlier one of any source: with the same tokens (`exact`), or with nearly the
    same by MinHash (`near`)."""
    decontaminate: Literal["report", "drop"] = "report"
    """What becomes of training documents with text of a held-out set: they are counted, or also left out (`drop`)."""
    cache_dir: str | None = None
    """Folder of the prepared token stores; null means `<output_dir>/data`."""
    streaming: bool = False
    """Whether the sources are read from their text while training, in an order of its own, instead of prepared before;
    held-out sets are prepared in any case."""
    share_of: Literal["blocks", "tokens"] = "blocks"
    """What weights are shares of: sequences with their padding (`blocks`), or `tokens` of text, padding aside."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    stages: tuple[StageConfig, ...] = ()
    validation: tuple[ValidationConfig, ...] = ()

    @field_validator("stages")
    @classmethod
    def _only_the_last_is_open(cls, value: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        for number, stage in enumerate(value[:-1]):
            if stage.tokens is None:
                raise ValueError(f"stage {number} needs tokens: only the last one runs to the end")
        return value

    @field_validator("validation")
    @classmethod
    def _distinct_names(cls, value: tuple[ValidationConfig, ...]) -> tuple[ValidationConfig, ...]:
        names = [held_out.name for held_out in value]
        if len(set(names)) != len(names):
            raise ValueError(f"names must differ, got {names}")
        return value


class ClassifyConfig(Frozen):
    """The classes of `task: classify`, and the fields of its records."""

    labels: tuple[str, ...] = ()
    """The names of the classes, in the order of the logits."""
    num_labels: int | None = Field(default=None, ge=2)
    """The number of classes, where records hold numbers from 0 to `num_labels` - 1."""
    label: str = "label"
    """The field with the class."""
    text_fields: tuple[str, ...] = ()
    """The fields that make up the text; none means the source's `text`."""
    separator: str = "\n"
    """The text between two of the fields."""
    truncate: bool = False
    """Cut longer texts to `data.seq_len` tokens instead of treating them as bad records."""

    @field_validator("labels")
    @classmethod
    def _distinct_labels(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value and len(set(value)) != max(len(value), 2):
            raise ValueError(f"must be two or more different names, got {list(value)}")
        return value

    @property
    def num_classes(self) -> int:
        return self.num_labels or len(self.labels)


class BatchConfig(Frozen):
    """The size of a step; the number of accumulated micro-batches follows from it."""

    global_tokens: PositiveInt
    """Tokens of one optimizer step over all ranks, padding included."""
    micro_batch: PositiveInt = 1
    """Sequences per rank and forward pass."""


class TrainConfig(Frozen):
    """The length of the run."""

    tokens: PositiveInt | None = None
    """Tokens of the whole run, rounded up to whole steps. They are batch tokens, `batch.global_tokens` a step: padding
    and tokens without a target count."""
    epochs: PositiveFloat | None = None
    """In place of `tokens`: how often the sources of `role: domain` are read, taken together; the rest of the mixture
    comes on top."""
    deterministic: bool = False
    """Whether every sum has a fixed order, so that a GPU repeats a run bit for bit; may be slower."""


class OptimConfig(Frozen):
    """AdamW."""

    lr: PositiveFloat = 1.0e-4
    """Peak learning rate of the adapter, or of every weight with `adapter.kind: none`."""
    embedding_lr: PositiveFloat | None = None
    """Peak learning rate of `embeddings.train`; null means `lr` / 10, or `lr` with `embeddings.kind: lora`."""
    head_lr: PositiveFloat | None = None
    """Peak learning rate of the classification head; null means `lr`."""
    router_lr: PositiveFloat | None = None
    """Peak learning rate of routers that train beside an adapter; null means `lr` / 10."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay of matrices; norms and biases have none, nor have routers beside an adapter."""
    embedding_weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay of the vocabulary matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: PositiveFloat = 1.0e-8
    """Added to the root of the second moment."""
    max_grad_norm: PositiveFloat = 1.0
    """The gradient is scaled down to this norm, taken over all trainable tensors."""
    max_skipped_steps: PositiveInt = 10
    """Consecutive non-finite steps that end the run with exit code 71."""
    state: Literal["fp32", "8bit"] = "fp32"
    """Storage of the moments of matrices between steps; those of the vocabulary matrices stay in fp32."""

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0.0 <= beta < 1.0 for beta in value):
            raise ValueError(f"must lie in [0, 1), got {value}")
        return value


class ScheduleShape(Frozen):
    """The learning rate as a fraction of its peak. The length of a phase is a fraction of all optimizer steps, or a
    number of steps."""

    kind: Literal["cosine", "linear", "wsd", "infinite", "constant"] = "cosine"
    """After the warm-up: `cosine` and `linear` decay to the end, `wsd` stays and then decays, `infinite` cools down to
    `constant_fraction`, stays and then decays, `constant` stays."""
    warmup_fraction: float = Field(default=0.02, ge=0.0, le=1.0)
    """Length of the linear warm-up."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """The same in steps, in place of the fraction."""
    start_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    """Fraction of the peak that the warm-up starts from."""
    end_fraction: float = Field(default=0.1, ge=0.0, le=1.0)
    """Fraction of the peak that the decay ends at."""
    decay: Literal["linear", "1-sqrt"] = "linear"
    """The last decay of `wsd` and `infinite`: in a line, or as one minus the root of its progress, fast at first."""
    decay_fraction: float = Field(default=0.1, ge=0.0, le=1.0)
    """Length of the last decay of `wsd` and `infinite`."""
    decay_steps: int | None = Field(default=None, ge=0)
    """The same in steps, in place of the fraction."""
    cooldown_fraction: float = Field(default=0.2, ge=0.0, le=1.0)
    """Length of the cool-down of `infinite`."""
    cooldown_steps: int | None = Field(default=None, ge=0)
    """The same in steps, in place of the fraction."""
    constant_fraction: float = Field(default=0.5, gt=0.0, le=1.0)
    """Fraction of the peak that `infinite` stays at."""

    @model_validator(mode="after")
    def _phases_fit(self) -> ScheduleShape:
        used = 0.0 if self.warmup_steps is not None else self.warmup_fraction
        if self.kind in ("wsd", "infinite") and self.decay_steps is None:
            used += self.decay_fraction
        if self.kind == "infinite" and self.cooldown_steps is None:
            used += self.cooldown_fraction
        if used > 1.0:
            raise ValueError(f"the phases of {self.kind} sum to {used:g} of the run; at most 1")
        return self


class ScheduleConfig(ScheduleShape):
    """The learning-rate schedule of every group, and of single groups."""

    start_step: int = Field(default=0, ge=0)
    """Step after which the schedule begins, warm-up included: where a branch with another schedule left its source."""
    per_group: dict[str, ScheduleShape] = {}
    """Another schedule for a group: adapter, adapter_b (LoRA+; by default that of adapter), embeddings, router,
    weights, no_decay or head."""

    @field_validator("per_group")
    @classmethod
    def _known_groups(cls, value: dict[str, ScheduleShape]) -> dict[str, ScheduleShape]:
        known = {"adapter", "adapter_b", "embeddings", "router", "weights", "no_decay", "head"}
        for name in value:
            if name not in known:
                raise ValueError(f"unknown group {name!r}; groups are {', '.join(sorted(known))}")
        return value


class EngineConfig(Frozen):
    """How the training state is sharded; a bare word stands for `{kind: WORD}`."""

    kind: Literal["auto", "single", "fsdp", "zero"] = "auto"
    """`auto` is `single` on one rank and `fsdp` on several, which then shards only what trains if the base fits on
    every rank by the plan; `zero` is DeepSpeed's ZeRO."""
    stage: Literal[1, 2, 3] | None = None
    """ZeRO's stage; null means 3."""
    shard: Literal["full", "hybrid", "trainable"] | None = None
    """What FSDP shards: everything (`full`), everything within groups of ranks (`hybrid`), or only what trains
    (`trainable`); null means `full`."""
    dp_shard: PositiveInt | None = None
    """Ranks per shard group of `hybrid`; null means the ranks of one node."""
    context_parallel: PositiveInt = 1
    """Ranks that each sequence is cut over, which need as much less memory for its activations."""
    reshard_after_forward: bool = True
    """Free gathered weights between forward and backward under FSDP, and gather them again."""
    reduce: Literal["micro_batch", "step"] = "micro_batch"
    """When FSDP sums gradients over the ranks: after each `micro_batch`, or once per `step`, which sends less and keeps
    4 bytes per trainable element on every rank."""
    offload: Literal["none", "base", "optimizer", "both"] = "none"
    """What waits in host memory: the frozen `base`, which is fetched layer by layer, the `optimizer` (fp32 masters and
    moments, updated there), or `both`. `kind: auto` takes it if nothing else fits by the plan."""
    activation_checkpointing: Literal["none", "selective", "full", "offload", "auto"] = "none"
    """What backward computes again instead of keeping it: `selective` the MLP's first maps and the norms, `full` each
    decoder layer from its input, `offload` the same with the inputs in host memory; `auto` takes the fastest that fits
    by the plan."""

    @model_validator(mode="before")
    @classmethod
    def _bare_word(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    def offloads(self, part: Literal["base", "optimizer"]) -> bool:
        """Whether `part` waits in host memory."""
        return self.offload in (part, "both")


class CheckpointConfig(Frozen):
    """When checkpoints are written, and how many are kept."""

    every_minutes: PositiveFloat | None = 30.0
    """Minutes between two checkpoints; null: not by time."""
    every_steps: PositiveInt | None = None
    """Optimizer steps between two checkpoints; null: not by steps."""
    keep: PositiveInt = 3
    """Number of newest checkpoints that are kept."""
    asynchronous: bool = True
    """Write beside training, from a copy in host memory."""
    trial: bool = True
    """Write one checkpoint before the first step, without publishing it, to learn early whether it can be written."""
    retry_minutes: float = Field(default=30.0, ge=0.0)
    """Minutes of failing writes after which the run ends with exit code 73."""


class HangConfig(Frozen):
    """A rank hangs if a step takes longer than max(`min_seconds`, `factor` x its median step); null: no watchdog."""

    factor: float = Field(default=50.0, gt=1.0)
    """Multiple of the rank's median step."""
    min_seconds: PositiveFloat = 300.0
    """Least seconds of a step that count as a hang."""
    grace_seconds: PositiveFloat = 10.0
    """Seconds from the first stack dump to the end, in which the other ranks write theirs."""
    other_phase_seconds: PositiveFloat = 3600.0
    """Limit in seconds for the first step, and for one piece (a block, a tensor, a chunk of a file) of other phases."""


class StragglerConfig(Frozen):
    """A rank is named if its own work per step exceeds `factor` x the median of all ranks; null: no comparison."""

    factor: float = Field(default=2.0, gt=1.0)
    """Multiple of the median over all ranks."""
    window: PositiveInt = 50
    """Optimizer steps between two comparisons."""


class SpikeConfig(Frozen):
    """What happens after a loss above mean + `sigmas` x standard deviation of the last `window` good ones."""

    policy: Literal["off", "skip", "stop", "rollback"] = "off"
    """`off` counts spikes, `stop` also ends the run after `max_bad_steps`, `skip` drops their updates besides, and
    `rollback` returns to an earlier checkpoint instead of ending and leaves that data out."""
    sigmas: PositiveFloat = 6.0
    """Standard deviations above the mean at which a loss is a spike."""
    window: PositiveInt = 128
    """Number of good steps that mean and standard deviation are taken over."""
    min_history: PositiveInt = 32
    """Good steps before anything counts as a spike."""
    max_bad_steps: PositiveInt = 10
    """Consecutive spikes or non-finite steps that end the run with exit code 71 or roll it back."""
    max_rollbacks: PositiveInt = 2
    """Rollbacks after which the next one ends the run with exit code 71."""

    @field_validator("policy", mode="before")
    @classmethod
    def _policy(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false


class HealthConfig(Frozen):
    """Watching a run."""

    hang: HangConfig | None = HangConfig()
    straggler: StragglerConfig | None = StragglerConfig()
    spike: SpikeConfig = SpikeConfig()


class ForgettingConfig(Frozen):
    """What happens when the loss on a held-out set of `role: retention` rises above that under the base; null: no
    limit."""

    policy: Literal["warn", "stop", "keep_best"] = "warn"
    """`warn` says so once, `stop` also saves and ends the run with exit code 0, and `keep_best` keeps, besides the
    newest checkpoints, that of the evaluation with the lowest mean loss over the domain sets within the limit, or
    the best by `evaluate.best`."""
    loss_rise: float = Field(default=0.05, ge=0.0)
    """The limit of every set, in nats per token over the base."""


class BestConfig(Frozen):
    """Which evaluation is the best; its checkpoint is kept besides the newest ones, and `merge --best` takes it."""

    of: str
    """What is compared: a held-out set (its loss), or `NAME/NUMBER` for another number of a set or a task, such as
    `answers/accuracy`, `legal/bits_per_byte` or `hellaswag/acc_norm,none`."""
    better: Literal["lower", "higher"] | None = None
    """Which values are better; null: lower ones of a loss, a perplexity and bits per byte, higher ones of a score."""
    patience: PositiveInt | None = None
    """Evaluations in a row without a better value that end the run, saved, with exit code 0; null: none do."""

    @property
    def name_and_key(self) -> tuple[str, str]:
        """The `name` of the rows, and the key of their number."""
        name, _, key = self.of.partition("/")
        return name, key or "loss"

    @property
    def less_is_better(self) -> bool:
        """Whether a lower number is a better one."""
        if self.better is not None:
            return self.better == "lower"
        return self.name_and_key[1] in ("loss", "perplexity", "bits_per_byte")


class TasksConfig(Frozen):
    """Multiple-choice tasks of lm-eval (extra `eval`), evaluated with the held-out sets."""

    names: tuple[str, ...] = Field(min_length=1)
    """Tasks or groups by lm-eval's names."""
    path: str | None = None
    """A folder with further tasks as lm-eval's YAML."""
    limit: PositiveInt | None = None
    """Questions that are read of each task; null means all."""


class EvaluateConfig(Frozen):
    """Evaluation on the held-out sets, which always takes place before the first step and after the last."""

    every_steps: PositiveInt | None = None
    """Optimizer steps between two evaluations; null: only at the start and the end."""
    max_blocks: PositiveInt | None = None
    """Sequences that are read of each held-out set; null means all."""
    against: Literal["base"] | None = "base"
    """What losses are compared with: the weights before this run's own adapter (`base`), computed once; null: with
    nothing. A model from scratch and a new classifier have no base."""
    forgetting: ForgettingConfig | None = ForgettingConfig()
    best: BestConfig | None = None
    tasks: TasksConfig | None = None


class WandbConfig(Frozen):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is `online` if an API key is found, else `offline`."""
    project: str = "dist-cpt"
    """The project's name."""
    entity: str | None = None
    """The user or team; null means the API key's default."""
    checkpoints: bool = False
    """Record each checkpoint as an artifact that refers to its folder; no file of it is uploaded."""
    alerts: bool = True
    """Send an alert when the run stops or fails, when a step is dropped, and when a retention set exceeds its limit."""


MAX_PROFILED_STEPS = 20  # a trace is held in host memory until it is written


class TrackConfig(Frozen):
    """Experiment trackers."""

    wandb: WandbConfig = WandbConfig()
    tensorboard: bool = False
    """Write TensorBoard's event files into the run folder, beside W&B."""
    profile: tuple[int, int] | None = None
    """The first and the last step, both included, of which rank 0 writes a trace and says where the time went; the
    option `--profile A:B` of `train`, `launch` and `resume` sets it."""

    @field_validator("profile")
    @classmethod
    def _a_few_steps(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 1 <= value[0] <= value[1] < value[0] + MAX_PROFILED_STEPS:
            raise ValueError(f"give the first and the last of at most {MAX_PROFILED_STEPS} steps, such as [10, 12]")
        return value


class RunConfig(Frozen):
    """A whole recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """The run's name and that of its folder in `output_dir`."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the data order, of dropout and of initial weights."""
    output_dir: str = "runs"
    """The folder that holds the run folders."""
    task: Literal["cpt", "instruct", "classify"] = "cpt"
    """What is trained on: plain text, the answers in conversations, or the classes of texts."""
    accept_changes: tuple[str, ...] = ()
    """Settings that this start may change against the run's checkpoints; the option `--accept-changes KEY,...` sets it,
    and the run's recorded recipe forgets it."""
    classify: ClassifyConfig | None = None
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    data: DataConfig
    batch: BatchConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    health: HealthConfig = HealthConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _settings_fit_together(self) -> RunConfig:
        if lines := refusals(self):
            raise ValueError("; ".join(lines))
        return self
