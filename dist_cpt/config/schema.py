"""The recipe: what a run is, as frozen values. Torch-free, so that it loads on a login node.

A field exists here only if something reads it. Values whose feature does not exist yet are refused by
name instead of being accepted and ignored.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Frozen):
    """A causal LM: `path` (folder or hub id), or `config` to initialise one from scratch."""

    path: str | None = None
    revision: str | None = None
    config: dict[str, Any] | None = None  # a transformers config with its model_type; random weights from the seed
    weights: Literal["fp32", "bf16", "nf4", "int8"] = "bf16"  # storage of the frozen weights
    kernels: Literal["auto", "triton", "reference"] = "auto"  # triton: what cannot run fused is an error
    attention: Literal["auto", "flash_attention_2", "varlen", "flex", "mask", "documents"] = "auto"
    trust_remote_code: bool = False  # run the Python code of a model that transformers does not have; needs revision
    allow_instruct: bool = False  # pretrain what looks like an instruct checkpoint

    @model_validator(mode="after")
    def _pinned_code(self) -> ModelConfig:
        if self.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                f"trust_remote_code runs the code of one commit: revision must be its 40-digit hash, not "
                f"{self.revision!r}"
            )
        return self

    @property
    def compute_dtype(self) -> Literal["fp32", "bf16"]:
        """What activations, and the copies of trainable tensors that compute, are in."""
        return "fp32" if self.weights == "fp32" else "bf16"

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.config is None):
            raise ValueError("give either path (a folder or hub id) or config (initialise from scratch)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs model_type, for example llama")
        return self


class ContinueFromConfig(Frozen):
    """The adapter a run starts from, and what becomes of it.

    train: it goes on training; with `optimizer` AdamW's moments and step count are taken over as well. fold: it is
    merged into the base, and a new adapter starts on top. stack: it stays active and frozen beside the new one.
    """

    path: str  # a PEFT folder, a Trainer's checkpoint-N or a checkpoint of this program
    mode: Literal["train", "fold", "stack"] = "train"
    optimizer: bool = False
    freeze_embeddings: bool = False  # fold, stack: matrices it trained in full may stay as they are
    other_base: bool = False  # a checkpoint of this program that was trained on other base weights

    @model_validator(mode="after")
    def _fields_of_mode(self) -> ContinueFromConfig:
        if self.optimizer and self.mode != "train":
            raise ValueError(f"optimizer belongs to mode: train; under mode: {self.mode} a new adapter starts")
        if self.freeze_embeddings and self.mode == "train":
            raise ValueError(
                "freeze_embeddings belongs to mode: fold or stack; mode train trains what the folder holds"
            )
        return self


class AdapterConfig(Frozen):
    """PEFT LoRA on `targets`, or `none`: every parameter trains."""

    kind: Literal["lora", "none"] = "lora"
    rank: PositiveInt = 128
    alpha: PositiveFloat = 128
    rslora: bool = True
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: str | tuple[str, ...] = "all-linear"
    lora_plus_ratio: float | None = Field(default=None, gt=1.0)  # LoRA+: the B matrices train at ratio x optim.lr
    dora: bool = False  # DoRA: a trained length for every row of a weight beside the direction LoRA gives it
    init: Literal["default", "pissa"] = "default"  # pissa: A and B begin as the strongest part of each weight
    continue_from: ContinueFromConfig | None = None  # a bare path: its weights, with a fresh optimizer

    @field_validator("continue_from", mode="before")
    @classmethod
    def _bare_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _continues_an_adapter(self) -> AdapterConfig:
        if self.kind == "none" and self.continue_from is not None:
            raise ValueError("continue_from belongs to kind: lora; a full model is continued with model.path")
        if self.kind == "none" and (self.dora or self.init == "pissa" or self.lora_plus_ratio is not None):
            raise ValueError("dora, init and lora_plus_ratio belong to kind: lora; kind none has no adapter")
        return self

    @model_validator(mode="after")
    def _variants(self) -> AdapterConfig:
        origin = self.continue_from
        if self.dora and self.init == "pissa":
            raise ValueError(
                "dora and init: pissa: DoRA's lengths are of whole weights, PiSSA leaves a rest; use one of them"
            )
        if self.init == "pissa" and origin is not None:
            raise ValueError(
                "init: pissa begins from the base's own weights, and continue_from brings others; merge that adapter "
                "first (dist-cpt merge) and set model.path to the result"
            )
        if self.dora and origin is not None and origin.mode == "stack":
            raise ValueError(
                "dora with continue_from.mode stack: DoRA's lengths would be of the base without the stacked adapter; "
                "use mode: fold"
            )
        return self


class EmbeddingsConfig(Frozen):
    """Which vocabulary matrices train in full beside the adapter, at `optim.embedding_lr`, and which rows they get."""

    train: tuple[Literal["embed_tokens", "lm_head"], ...] = ()
    kind: Literal["full", "lora"] = "full"  # lora: low-rank updates of them, of the adapter's rank
    new_tokens: str | None = None  # folder or hub id of a tokenizer that extends the base's
    init: Literal["mean_of_subtokens", "focus"] = "mean_of_subtokens"  # of a new row
    rows: Literal["all", "new"] = "all"  # new: only the rows of new tokens move
    pad_rows_to: PositiveInt = 64  # the number of rows of a matrix that grew is a multiple of it
    freeze_rest_steps: int = Field(default=0, ge=0)  # first steps in which everything else stands still
    tie: Literal["keep", "untie"] = "keep"  # untie: the head becomes a copy that trains apart

    @model_validator(mode="after")
    def _belongs_to_new_tokens(self) -> EmbeddingsConfig:
        if self.new_tokens is None and self.rows == "new":
            raise ValueError("rows: new needs new_tokens: without a longer tokenizer there is no new row")
        if self.new_tokens is None and self.pad_rows_to != 64:
            raise ValueError("pad_rows_to belongs to new_tokens: no other matrix grows")
        if self.new_tokens is None and self.init == "focus":
            raise ValueError("init: focus belongs to new_tokens: its file lies beside that tokenizer")
        return self


class SourceConfig(Frozen):
    """One training source: files or folders of jsonl, txt or md (glob patterns allowed)."""

    path: str
    name: str | None = None  # default: the stem of the path
    text: str = "text"  # the jsonl field that holds the document
    messages: str = "messages"  # task instruct: the field with [{role, content}, ...]
    prompt: str | None = None  # task instruct, instead of messages: the field with the question
    response: str | None = None  # and the one with its answer
    weight: PositiveFloat = 1.0  # share of the blocks, relative to the other sources
    role: Literal["domain", "replay"] = "domain"


class ValidationConfig(Frozen):
    """One held-out set; `retention` marks what the base knew and must not lose."""

    name: str
    path: str
    text: str = "text"
    messages: str = "messages"
    prompt: str | None = None
    response: str | None = None
    role: Literal["domain", "retention"] = "domain"


class DataConfig(Frozen):
    seq_len: PositiveInt = 4096
    packing: Literal["best_fit", "windows"] = "best_fit"
    stride: PositiveInt | None = None  # windows: tokens from one window of a document to the next; default: seq_len
    overlap: Literal["train", "context"] = "train"  # windows: what a token is that an earlier window had as well
    chat_template: str | None = None  # task instruct: jinja text or file; default: the tokenizer's own
    tokenizer: str | None = None  # folder or hub id; default: model.path
    on_bad_record: Literal["error", "skip", "quarantine"] = "error"
    bad_record_budget_fraction: float = Field(default=0.001, ge=0.0, le=1.0)  # of the records, for skip and quarantine
    cache_dir: str | None = None  # prepared token stores; default: <output_dir>/data
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    validation: tuple[ValidationConfig, ...] = ()

    @model_validator(mode="after")
    def _distinct_names(self) -> DataConfig:
        names = [v.name for v in self.validation]
        if len(set(names)) != len(names):
            raise ValueError(f"validation names must differ, got {names}")
        return self

    @model_validator(mode="after")
    def _windows(self) -> DataConfig:
        if self.packing != "windows" and (self.stride is not None or self.overlap != "train"):
            raise ValueError("stride and overlap belong to packing: windows")
        if self.stride is not None and self.stride > self.seq_len:
            raise ValueError(f"stride {self.stride} would leave out tokens between windows of seq_len {self.seq_len}")
        return self


class ClassifyConfig(Frozen):
    """The classes of task: classify, and where a record holds its text and its class."""

    labels: tuple[str, ...] = ()  # the names that records hold, in the order of the logits
    num_labels: int | None = Field(default=None, ge=2)  # or: records hold numbers from 0 to num_labels - 1
    label: str = "label"  # the jsonl field with the class
    text_fields: tuple[str, ...] = ()  # joined by `separator`; default: the field that the source's `text` names
    separator: str = "\n"
    truncate: bool = False  # cut longer examples to data.seq_len tokens; else they are bad records

    @model_validator(mode="after")
    def _classes(self) -> ClassifyConfig:
        if bool(self.labels) == (self.num_labels is not None):
            raise ValueError("give either labels (names) or num_labels (records hold numbers)")
        if self.labels and len(set(self.labels)) != max(len(self.labels), 2):
            raise ValueError(f"labels must be two or more different names, got {list(self.labels)}")
        return self

    @property
    def num_classes(self) -> int:
        return self.num_labels or len(self.labels)


class BatchConfig(Frozen):
    """`global_tokens` per optimizer step over all ranks; accumulation is derived."""

    global_tokens: PositiveInt
    micro_batch: PositiveInt = 1  # sequences per rank and forward


class TrainConfig(Frozen):
    tokens: PositiveInt


class OptimConfig(Frozen):
    lr: PositiveFloat = 1.0e-4
    embedding_lr: PositiveFloat | None = None  # default: lr / 10
    head_lr: PositiveFloat | None = None  # of the classification head; default: lr
    weight_decay: float = Field(default=0.01, ge=0.0)  # on matrices; norms and biases never decay
    embedding_weight_decay: float = Field(default=0.0, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1.0e-8
    max_grad_norm: PositiveFloat = 1.0
    max_skipped_steps: PositiveInt = 10  # consecutive non-finite steps before the run ends with 71
    state: Literal["fp32", "8bit"] = "fp32"  # moments of LoRA and other matrices between steps; embeddings stay fp32

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0.0 <= b < 1.0 for b in value):
            raise ValueError(f"betas must lie in [0, 1), got {value}")
        return value


class ScheduleShape(Frozen):
    """Learning rate as a fraction of its peak over the run; fractions are of all optimizer steps.

    cosine: warm up, then cosine to `end_fraction`. wsd: warm up, stay, decay linearly over the last
    `decay_fraction`. infinite: warm up, cool down to `constant_fraction` over `cooldown_fraction`, stay,
    then decay like wsd. constant: warm up, stay.
    """

    kind: Literal["cosine", "wsd", "infinite", "constant"] = "cosine"
    warmup_fraction: float = Field(default=0.02, ge=0.0, le=1.0)
    end_fraction: float = Field(default=0.1, ge=0.0, le=1.0)
    decay_fraction: float = Field(default=0.1, ge=0.0, le=1.0)
    cooldown_fraction: float = Field(default=0.2, ge=0.0, le=1.0)
    constant_fraction: float = Field(default=0.5, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _fits(self) -> ScheduleShape:
        used = self.warmup_fraction
        if self.kind in ("wsd", "infinite"):
            used += self.decay_fraction
        if self.kind == "infinite":
            used += self.cooldown_fraction
        if used > 1.0:
            raise ValueError(f"the phases of {self.kind} sum to {used:g} of the run; at most 1")
        return self


class ScheduleConfig(ScheduleShape):
    """The shape for every group, and other shapes for single groups (adapter, embeddings, weights, head).

    LoRA+ has a group adapter_b, which takes the shape of adapter unless it is named itself.
    """

    per_group: dict[str, ScheduleShape] = {}

    @field_validator("per_group")
    @classmethod
    def _known_groups(cls, value: dict[str, ScheduleShape]) -> dict[str, ScheduleShape]:
        known = {"adapter", "adapter_b", "embeddings", "weights", "no_decay", "head"}
        for name in value:
            if name not in known:
                raise ValueError(f"unknown group {name!r}; groups are {', '.join(sorted(known))}")
        return value


class EngineConfig(Frozen):
    """Who shards what. auto: single on one rank, fsdp full on several."""

    kind: Literal["auto", "single", "fsdp", "zero"] = "auto"
    stage: Literal[1, 2, 3] | None = None  # zero
    shard: Literal["full", "hybrid", "trainable"] | None = None  # fsdp
    dp_shard: PositiveInt | None = None  # fsdp hybrid: ranks per shard group; default: ranks per node
    reshard_after_forward: bool = True  # fsdp: free gathered weights between forward and backward
    activation_checkpointing: Literal["none", "full"] = "none"

    @model_validator(mode="before")
    @classmethod
    def _bare_word(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fields_of_kind(self) -> EngineConfig:
        if self.stage is not None and self.kind != "zero":
            raise ValueError(f"stage belongs to kind: zero, not to kind: {self.kind}")
        if self.shard is not None and self.kind != "fsdp":
            raise ValueError(f"shard belongs to kind: fsdp, not to kind: {self.kind}")
        if self.dp_shard is not None and self.shard != "hybrid":
            raise ValueError("dp_shard belongs to {kind: fsdp, shard: hybrid}")
        if not self.reshard_after_forward and self.kind != "fsdp":
            raise ValueError("reshard_after_forward belongs to kind: fsdp")
        return self


class CheckpointConfig(Frozen):
    every_minutes: PositiveFloat | None = 30.0
    every_steps: PositiveInt | None = None
    keep: PositiveInt = 3
    asynchronous: bool = True  # write beside training, from a copy in host memory
    trial: bool = True  # before the first step of a new run, save once without publishing
    retry_minutes: float = Field(default=30.0, ge=0.0)  # how long a disk may refuse before the run ends with 73


class HangConfig(Frozen):
    """When a rank counts as hung: a step longer than max(min_seconds, factor x its median step)."""

    factor: float = Field(default=50.0, gt=1.0)
    min_seconds: PositiveFloat = 300.0
    grace_seconds: PositiveFloat = 10.0  # from the first dump to the end, so that every rank dumps
    other_phase_seconds: PositiveFloat = 3600.0  # starting, the first step, saving, evaluating, ending


class StragglerConfig(Frozen):
    """A rank whose own work per step is more than `factor` x the median of all ranks is named."""

    factor: float = Field(default=2.0, gt=1.0)
    window: PositiveInt = 50  # steps between two comparisons


class SpikeConfig(Frozen):
    """What happens after a loss above mean + sigmas x std of the last `window` good ones."""

    policy: Literal["off", "skip", "stop", "rollback"] = "off"
    sigmas: PositiveFloat = 6.0
    window: PositiveInt = 128  # steps
    min_history: PositiveInt = 32  # steps before anything counts as a spike
    max_bad_steps: PositiveInt = 10  # spikes or non-finite steps in a row
    max_rollbacks: PositiveInt = 2

    @field_validator("policy", mode="before")
    @classmethod
    def _policy(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false

    @model_validator(mode="after")
    def _history_fits(self) -> SpikeConfig:
        if self.min_history > self.window:
            raise ValueError(f"min_history {self.min_history} is more than window {self.window}: no spike is ever seen")
        return self


class HealthConfig(Frozen):
    hang: HangConfig | None = HangConfig()  # null: nothing ends a run that stands still
    straggler: StragglerConfig | None = StragglerConfig()  # null: no rank's pace is measured
    spike: SpikeConfig = SpikeConfig()


class EvaluateConfig(Frozen):
    every_steps: PositiveInt | None = None  # besides the evaluations before the first and after the last step
    max_blocks: PositiveInt | None = None  # of each held-out set; default: all of it


class WandbConfig(Frozen):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online with a key, else offline
    project: str = "dist-cpt"
    entity: str | None = None


class TrackConfig(Frozen):
    wandb: WandbConfig = WandbConfig()


class RunConfig(Frozen):
    """A whole recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    output_dir: str = "runs"
    task: Literal["cpt", "instruct", "classify"] = "cpt"
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
    def _across_fields(self) -> RunConfig:
        if self.batch.global_tokens % self.data.seq_len:
            raise ValueError(
                f"batch.global_tokens {self.batch.global_tokens} is not a multiple of data.seq_len {self.data.seq_len}"
            )
        if self.model.config is not None and self.data.tokenizer is None:
            raise ValueError("model.config initialises from scratch, so data.tokenizer must name a tokenizer")
        weights = self.model.weights
        if weights in ("nf4", "int8") and self.model.config is not None:
            raise ValueError(
                f"model.weights {weights} quantises a pretrained base, and model.config has none; use bf16"
            )
        if weights in ("nf4", "int8") and self.adapter.kind == "none":
            raise ValueError(f"a base in {weights} cannot train in full; use adapter.kind lora, or model.weights bf16")
        if weights in ("nf4", "int8") and self.adapter.init == "pissa":
            raise ValueError(
                f"adapter.init pissa takes the strongest part out of 16-bit weights, but {weights} is all that is "
                "loaded of them; use model.weights bf16"
            )
        if weights in ("nf4", "int8") and self.adapter.dora:
            raise ValueError(
                f"adapter.dora measures whole weights at every step, which {weights} keeps packed; use "
                "model.weights bf16, or plain LoRA"
            )
        if self.model.config is not None and self.adapter.kind == "lora":
            raise ValueError("an adapter on random weights learns nothing useful; use adapter.kind: none")
        if self.adapter.kind == "none" and self.embeddings.train:
            raise ValueError("embeddings.train belongs to adapter.kind: lora; kind none trains every parameter")
        self._vocabulary()
        saves = self.checkpoint.every_minutes or self.checkpoint.every_steps
        if self.health.spike.policy == "rollback" and saves is None:
            raise ValueError("health.spike.policy rollback needs checkpoint.every_steps or every_minutes")
        return self

    @model_validator(mode="after")
    def _task(self) -> RunConfig:
        if (self.task == "classify") != (self.classify is not None):
            raise ValueError("task: classify and a section classify (labels, ...) belong together")
        if self.task == "classify" and "lm_head" in self.embeddings.train:
            raise ValueError("task: classify has no lm_head to train; embeddings.train may name embed_tokens")
        if self.task != "classify" and self.optim.head_lr is not None:
            raise ValueError("optim.head_lr belongs to task: classify")
        if self.task != "cpt" and self.data.packing == "windows":
            raise ValueError(f"data.packing windows belongs to task: cpt; {self.task} keeps every record whole")
        if self.task == "instruct":
            for given in (*self.data.sources, *self.data.validation):
                if (given.prompt is None) != (given.response is None):
                    raise ValueError(f"{given.path}: prompt and response are given together, or neither of them")
            return self
        if self.data.chat_template is not None:
            raise ValueError("data.chat_template belongs to task: instruct")
        for given in (*self.data.sources, *self.data.validation):
            if given.prompt is not None or given.response is not None or given.messages != "messages":
                raise ValueError(f"{given.path}: messages, prompt and response belong to task: instruct")
        return self

    def _vocabulary(self) -> None:
        embeddings, lora = self.embeddings, self.adapter.kind == "lora"
        if self.model.config is not None and (embeddings.new_tokens or embeddings.tie == "untie"):
            raise ValueError(
                "embeddings.new_tokens and tie change a pretrained base; from scratch set data.tokenizer, and "
                "tie_word_embeddings in model.config"
            )
        origin = self.adapter.continue_from
        inherits = origin is not None and origin.mode != "train"  # then the earlier adapter may hold the rows
        needed = ["embed_tokens"] if self.task == "classify" else ["embed_tokens", "lm_head"]
        if embeddings.new_tokens and lora and not inherits and not set(needed) <= set(embeddings.train):
            raise ValueError(
                f"embeddings.new_tokens needs embeddings.train: [{', '.join(needed)}]: else no file holds the new rows"
            )
        if embeddings.tie == "untie" and self.task == "classify":
            raise ValueError("embeddings.tie: untie makes a head of its own, which task: classify drops")
        if embeddings.tie == "untie" and lora and not embeddings.train:
            raise ValueError("embeddings.tie: untie needs embeddings.train: what does not train stays equal")
        if embeddings.kind == "lora":
            self._low_rank_vocabulary()
        if embeddings.rows == "new" and self.optim.embedding_weight_decay:
            raise ValueError("embeddings.rows: new needs optim.embedding_weight_decay 0: decay would move the old rows")
        if embeddings.rows == "new" and origin is not None and origin.optimizer:
            raise ValueError(
                "embeddings.rows: new needs adapter.continue_from.optimizer: false: old moments would move the old rows"
            )
        num_steps = -(-self.train.tokens // self.batch.global_tokens)
        if embeddings.freeze_rest_steps and lora and not embeddings.train:
            raise ValueError("embeddings.freeze_rest_steps needs embeddings.train: nothing would train in those steps")
        if embeddings.freeze_rest_steps and embeddings.freeze_rest_steps >= num_steps:
            raise ValueError(
                f"embeddings.freeze_rest_steps {embeddings.freeze_rest_steps} leaves nothing of the run's {num_steps} steps"
            )

    def _low_rank_vocabulary(self) -> None:
        adapter, embeddings = self.adapter, self.embeddings
        if adapter.kind == "none" or not embeddings.train or self.task == "classify":
            raise ValueError(
                "embeddings.kind: lora belongs to adapter.kind: lora, embeddings.train and a task with text"
            )
        if embeddings.new_tokens or embeddings.tie == "untie":
            raise ValueError("embeddings.kind: lora cannot hold new rows or a second matrix; use kind: full")
        if adapter.dora or adapter.init == "pissa" or adapter.dropout or adapter.continue_from is not None:
            raise ValueError(
                "embeddings.kind: lora is plain LoRA from its beginning, without dora, pissa, dropout and "
                "continue_from; use kind: full"
            )
