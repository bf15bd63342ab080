"""The files of a run folder, and of a checkpoint inside it. Every name is written here and nowhere else."""

from __future__ import annotations

from pathlib import Path

# -- the run folder ---------------------------------------------------------------------------------------------------
RECIPE = "recipe.yaml"  # resolved, with every default
RUN = "run.json"  # the current claim: attempt, token, host, W&B run id; how earlier attempts ended
LOCK = ".lock"
EXIT = "exit.json"  # code and reason of the last ending
CONTRACT = "contract.json"  # what trains, and the checks that it does
CERTIFICATE = "certificate.json"  # of the last resume
CONTINUED = "continued.json"  # evidence that the adapter this run starts from is in effect
LINEAGE = "lineage.json"  # what the run was branched from, and how it was extended
ROLLBACKS = "rollbacks.json"  # blocks that rollbacks left out
PLAN = "plan.json"  # memory and speed as predicted, and as measured
BASE_LOSSES = "base_losses.json"  # of the held-out sets under the base, each computed once
STREAM = "stream.json"  # the files of streamed sources as they were when the run began
SAMPLE = "sample.json"  # a continuation by the trained model
METRICS = "metrics.jsonl"  # one row per optimizer step
EVALUATIONS = "evaluations.jsonl"  # one row per held-out set and evaluation
EVALUATED = "evaluated.jsonl"  # what dist-cpt evaluate has measured; no attempt changes it
EVENTS = "events.jsonl"  # starts, resumes, checkpoints, messages, ends
METRICS_REWOUND = "metrics.rewound.jsonl"  # rows of steps that were trained again
EVALUATIONS_REWOUND = "evaluations.rewound.jsonl"
LAUNCHES = "launches.jsonl"  # a batch job's starts of the ranks and what it decided after each
BAD_NODES = "bad_nodes.json"  # failures by node
PREFLIGHT = "preflight"  # folder: node checks before a start
REPORT = "report.html"
UNTRAINED = "untrained"  # folder: what another recipe left here that never trained a step
LOGS = "logs"
WANDB = "wandb"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
SUPERSEDED = "superseded"  # inside `checkpoints`: what a later attempt replaced

# -- a checkpoint -----------------------------------------------------------------------------------------------------
MANIFEST = "manifest.json"  # every other file with its bytes and sha256; written last
STATE = "state.json"  # step, position, tokens, ...: the training state beside its tensors
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
INITIAL_ADAPTER = "initial_adapter.safetensors"  # what PiSSA took out of the base
MODEL_CONFIG = "config.json"
MODEL_INDEX = "model.safetensors.index.json"
MODEL_BUFFERS = "model-buffers.safetensors"  # weights of a full model that never train
NOT_TRAINED = (INITIAL_ADAPTER, MODEL_BUFFERS)  # tensor files that are no part of the training state

# What an attempt replaces whole, and what it appends to, in the run folder itself.
APPENDED = (METRICS, EVALUATIONS, EVENTS)
REPLACED = (
    *(CONTRACT, CERTIFICATE, CONTINUED, LINEAGE, ROLLBACKS, BASE_LOSSES, PLAN, STREAM, SAMPLE, EXIT),
    INITIAL_ADAPTER,
    *(*APPENDED, METRICS_REWOUND, EVALUATIONS_REWOUND),  # in a rewind
)


def rewound_name(name: str) -> str:
    """`metrics.jsonl` -> `metrics.rewound.jsonl`."""
    return f"{Path(name).stem}.rewound.jsonl"


def log_file(run_folder: Path, rank: int) -> Path:
    """The log of one rank."""
    return run_folder / LOGS / f"rank-{rank}.log"


def heartbeat_file(run_folder: Path, first_rank: int) -> Path:
    """The latest heartbeats of a node's ranks, by the first of them."""
    return run_folder / LOGS / f"heartbeats-from-rank-{first_rank}.jsonl"


def hang_file(run_folder: Path, rank: int) -> Path:
    """The stacks of a rank that ended a run as hung."""
    return run_folder / LOGS / f"hang-rank-{rank}.txt"


def stack_file(run_folder: Path, rank: int) -> Path:
    """The stacks of a rank that received a request for them."""
    return run_folder / LOGS / f"stack-rank-{rank}.txt"


def flight_file(run_folder: Path, rank: int) -> Path:
    """The last collectives of a rank that ended a run as hung."""
    return run_folder / LOGS / f"flight-rank-{rank}.json"


def trace_file(run_folder: Path, rank: int, first: int, last: int) -> Path:
    """The trace of a rank's steps, as torch's profiler writes it."""
    return run_folder / LOGS / f"profile-rank-{rank}-steps-{first}-{last}.json.gz"


def nccl_trace_prefix(run_folder: Path) -> Path:
    """The path of torch's dump on a collective's timeout, without the rank's number."""
    return run_folder / LOGS / "nccl-trace-rank-"
