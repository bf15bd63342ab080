"""The recipe: what a run is, as frozen values. Torch-free, so that it loads on a login node.

A field exists here only if something reads it. Values whose feature does not exist yet are refused by
name instead of being accepted and ignored.
"""

from __future__ import annotations

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


def _not_yet(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{key}: {value!r} is not available in this version; use {allowed}")


class ModelConfig(Frozen):
    """A causal LM: `path` (folder or hub id), or `config` to initialise one from scratch."""

    path: str | None = None
    revision: str | None = None
    config: dict[str, Any] | None = None  # a transformers config with its model_type; random weights from the seed
    weights: str = "bf16"  # storage of the frozen weights: fp32 | bf16 | nf4
    kernels: Literal["auto", "triton", "reference"] = "auto"  # triton: what cannot run fused is an error

    @field_validator("weights")
    @classmethod
    def _weights(cls, value: str) -> str:
        if value == "int8":
            raise _not_yet("weights", value, "nf4, bf16 or fp32")
        if value not in ("fp32", "bf16", "nf4"):
            raise ValueError(f"weights must be fp32, bf16 or nf4, not {value!r}")
        return value

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
    """The adapter a run starts from; `optimizer` takes over AdamW's moments and step count as well."""

    path: str  # a PEFT folder, a Trainer's checkpoint-N or a checkpoint of this program
    optimizer: bool = False


class AdapterConfig(Frozen):
    """PEFT LoRA on `targets`, or `none`: every parameter trains."""

    kind: Literal["lora", "none"] = "lora"
    rank: PositiveInt = 128
    alpha: PositiveFloat = 128
    rslora: bool = True
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: str | tuple[str, ...] = "all-linear"
    continue_from: ContinueFromConfig | None = None  # a bare path: its weights, with a fresh optimizer

    @field_validator("continue_from", mode="before")
    @classmethod
    def _bare_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _continues_an_adapter(self) -> AdapterConfig:
        if self.kind == "none" and self.continue_from is not None:
            raise ValueError("continue_from belongs to kind: lora; a full model is continued with model.path")
        return self


class EmbeddingsConfig(Frozen):
    """Which vocabulary matrices train in full beside the adapter, at `optim.embedding_lr`."""

    train: tuple[Literal["embed_tokens", "lm_head"], ...] = ()
    new_tokens: str | None = None
    init: Literal["mean_of_subtokens"] = "mean_of_subtokens"
    tie: str = "keep"

    @field_validator("new_tokens")
    @classmethod
    def _new_tokens(cls, value: str | None) -> str | None:
        if value is not None:
            raise _not_yet("new_tokens", value, "null")
        return value

    @field_validator("tie")
    @classmethod
    def _tie(cls, value: str) -> str:
        if value != "keep":
            raise _not_yet("tie", value, "keep")
        return value


class SourceConfig(Frozen):
    """One training source: files or folders of jsonl, txt or md (glob patterns allowed)."""

    path: str
    name: str | None = None  # default: the stem of the path
    text: str = "text"  # the jsonl field that holds the document
    weight: PositiveFloat = 1.0  # share of the blocks, relative to the other sources
    role: Literal["domain", "replay"] = "domain"


class ValidationConfig(Frozen):
    """One held-out set; `retention` marks what the base knew and must not lose."""

    name: str
    path: str
    text: str = "text"
    role: Literal["domain", "retention"] = "domain"


class DataConfig(Frozen):
    seq_len: PositiveInt = 4096
    packing: Literal["best_fit"] = "best_fit"
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


class BatchConfig(Frozen):
    """`global_tokens` per optimizer step over all ranks; accumulation is derived."""

    global_tokens: PositiveInt
    micro_batch: PositiveInt = 1  # sequences per rank and forward


class TrainConfig(Frozen):
    tokens: PositiveInt


class OptimConfig(Frozen):
    lr: PositiveFloat = 1.0e-4
    embedding_lr: PositiveFloat | None = None  # default: lr / 10
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
    """The shape for every group, and other shapes for single groups (adapter, embeddings, weights)."""

    per_group: dict[str, ScheduleShape] = {}

    @field_validator("per_group")
    @classmethod
    def _known_groups(cls, value: dict[str, ScheduleShape]) -> dict[str, ScheduleShape]:
        known = {"adapter", "embeddings", "weights", "no_decay"}
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
        if self.model.weights == "nf4" and self.model.config is not None:
            raise ValueError("model.weights nf4 quantises a pretrained base, and model.config has none; use bf16")
        if self.model.weights == "nf4" and self.adapter.kind == "none":
            raise ValueError("a base in nf4 cannot train in full; use adapter.kind lora, or model.weights bf16")
        if self.model.config is not None and self.adapter.kind == "lora":
            raise ValueError("an adapter on random weights learns nothing useful; use adapter.kind: none")
        if self.adapter.kind == "none" and self.embeddings.train:
            raise ValueError("embeddings.train belongs to adapter.kind: lora; kind none trains every parameter")
        saves = self.checkpoint.every_minutes or self.checkpoint.every_steps
        if self.health.spike.policy == "rollback" and saves is None:
            raise ValueError("health.spike.policy rollback needs checkpoint.every_steps or every_minutes")
        return self
