"""A run that has nothing to resume: from the base, or from an adapter, with evidence that it is in effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dist_cpt.checkpoint.import_peft import start_from
from dist_cpt.config.schema import ContinueFromConfig, EngineConfig
from dist_cpt.data.concerns import concerns
from dist_cpt.errors import CheckpointError
from dist_cpt.model.attention import describe
from dist_cpt.model.base_model import WEIGHTS_DTYPE
from dist_cpt.model.continue_from import PriorInUse, first_document
from dist_cpt.run_folder.names import CONTINUED
from dist_cpt.run_folder.records import RunStart, SourceSize
from dist_cpt.runtime.collectives import on_rank_zero
from dist_cpt.runtime.log import LOGGER
from dist_cpt.train.build import Run
from dist_cpt.train.console import Console
from dist_cpt.train.contract import Contract
from dist_cpt.train.probe import PROBE_BLOCKS
from dist_cpt.train.progress import Progress
from dist_cpt.train.queued import QueuedObserver
from dist_cpt.train.restore import REPLAY_TOLERANCE, recorded_windows
from dist_cpt.train.tensorboard import tensorboard_observer
from dist_cpt.train.wandb import wandb_observer

WANDB_INIT_SECONDS = 30.0


def start(run: Run) -> Progress:
    """The progress of a run from its beginning. Collective.

    Raises:
        CheckpointError: the adapter that the run starts from changes nothing, or the engine does not compute with it.
        WriteError: checkpoint.trial is set and the file system does not take a checkpoint.
    """
    config = run.context.config
    progress = Progress(skipped_windows=recorded_windows(run))
    prior = config.adapter.continue_from
    if run.model.prior is not None:
        _require_prior_adapter(run, run.model.prior)
    elif prior is not None:
        progress = Progress(skipped_windows=progress.skipped_windows, optimizer_steps=_import_adapter(run, prior))
    if config.checkpoint.trial:
        run.saver.trial(progress)
    return progress


def open_contract(run: Run) -> Contract:
    """The trainability contract over the state as it is before the first update. Collective."""
    context, model = run.context, run.model
    compute_dtype = WEIGHTS_DTYPE[context.config.model.compute_dtype]
    attention = describe(model.module.attention, context.device, model.hf_config.get_text_config(), compute_dtype)
    model_facts = {
        "ties": [list(pair) for pair in model.ties],
        "kernels": model.fusion.as_json() | {"attention": attention},
        "expert_rank": (model.adapter_config or {}).get("rank_pattern") or None,
        "left_out": model.left_out,
        "router_losses": None if (routing := model.module.routing) is None else routing.coefficients,
    }
    return Contract(context, run.engine, run.groups, run.specs, model_facts)


def announce(run: Run, contract: Contract, progress: Progress) -> None:
    """Add the observers, on rank 0, and tell them how this attempt starts. Collective."""
    context = run.context
    context.watchdog.tick("starting", progress.step)
    if context.env.rank == 0:
        console = Console()
        wandb = wandb_observer(
            context.config.track.wandb,
            context.folder,
            context.wandb_run_id,
            console.on_message,
            init_timeout_seconds=WANDB_INIT_SECONDS,
        )
        tracked = tensorboard_observer(context.folder) if context.config.track.tensorboard else None
        context.observers.add(run.metrics)
        context.observers.add(console, display=True)
        if tracked is not None:
            queued = QueuedObserver("TensorBoard", tracked, lambda: None, context.observers.on_message)
            context.observers.add(queued, display=True)
        if wandb is not None:
            queued = QueuedObserver("W&B", wandb, wandb.abandon, context.observers.on_message)
            context.observers.add(queued, display=True)
    record = RunStart(
        config=context.config,
        folder=context.folder,
        engine=run.engine.kind,
        world_size=context.env.world_size,
        device=str(context.device),
        num_steps=context.shape.num_steps,
        first_step=progress.step,
        resumed_from=progress.resumed_from,
        wandb_run_id=context.wandb_run_id,
        contract=contract.content,
        attempt=context.attempt,
        sources=_source_sizes(run),
    )
    on_rank_zero("observers", lambda: context.observers.on_start(record))
    for setting in _without_effect(context.config.engine) if context.device.type == "cpu" else ():
        context.observers.on_message(f"{setting} saves no memory on a CPU")
    if context.env.rank == 0 and progress.resumed_from is None:
        num_blocks = context.shape.num_steps * context.shape.blocks_per_step
        for concern in concerns(run.data.prepared, run.data.loader, num_blocks):
            run.metrics.on_message(concern)  # the terminal has them already


def _without_effect(engine: EngineConfig) -> Iterator[str]:
    if engine.offload != "none":
        yield f"engine.offload: {engine.offload}"
    if engine.activation_checkpointing == "offload":
        yield "engine.activation_checkpointing: offload"


def _source_sizes(run: Run) -> tuple[SourceSize, ...]:
    shape, data = run.context.shape, run.data
    planned = data.loader.epochs(shape.num_steps * shape.blocks_per_step).items()
    sizes = zip(planned, data.loader.sizes, strict=True)
    return tuple(SourceSize(name, blocks, tokens, epochs) for (name, epochs), (blocks, tokens) in sizes)


def _import_adapter(run: Run, prior: ContinueFromConfig) -> int:
    """Train an existing adapter further: its optimizer's steps so far. The loss with and without it is the evidence."""
    probed = range(PROBE_BLOCKS)
    without = run.stream.probe_loss(probed)  # a new adapter adds zero
    started = start_from(run.engine, prior, run.specs, run.model, run.context.config.optim)
    evidence = {"description": started.description, "sha256": started.sha256, "optimizer_steps": started.step}
    losses = {"loss_without": without, "loss_with": run.stream.probe_loss(probed)}
    _record_evidence(run, prior, evidence | losses)
    return started.step


def _require_prior_adapter(run: Run, prior: PriorInUse) -> None:
    """A prior adapter under a new one, which still adds zero: the engine's loss must be that of their sum."""
    config, adapter = run.context.config, prior.adapter
    evidence: dict[str, Any] = on_rank_zero("prior adapter", lambda: prior.evidence)
    loss, expected = run.stream.probe_loss(range(PROBE_BLOCKS)), evidence.get("class_loss", evidence["loss_with"])
    if not abs(loss - expected) <= REPLAY_TOLERANCE[config.model.weights] * max(1.0, abs(expected)):
        raise CheckpointError(
            f"{prior.settings.path}: the loss with this adapter is {expected:.6f}, the engine's is {loss:.6f}",
            remedy="this is a defect: the engine does not compute with the adapter",
        )
    if config.task != "classify":  # whose new head has no logits without the adapter
        evidence |= {"share_in_effect": _require_share(run, prior)}
    done = {"fold": "folded into the base", "stack": "frozen under the new adapter"}[prior.settings.mode]
    if (gap := evidence.get("logit_gap_mean")) is not None:
        done += f" (logits off by {gap:.2e} on average through storing the sum in {config.model.weights})"
        if gap > evidence["logit_effect_mean"]:
            LOGGER.warning("folding into %s moves logits by more than the adapter does", config.model.weights)
    matrices = f"{len(adapter.lora)} LoRA pairs and {len(adapter.vocabulary)} whole matrices"
    facts = {
        "description": f"{adapter.folder}: {matrices} {done}",
        "sha256": adapter.sha256,
        "mode": prior.settings.mode,
        "optimizer_steps": 0,
    }
    _record_evidence(run, prior.settings, facts | evidence | {"loss_of_the_engine": loss})


def _require_share(run: Run, prior: PriorInUse) -> float | None:
    """The share of the adapter's effect on logits that the engine shows; None if the effect is below rounding."""
    blocks = [run.data.loader.batch([position]) for position in range(PROBE_BLOCKS)]
    logits = [run.engine.logits(first_document(block.input_ids, block.cu_seqlens)) for block in blocks]
    share: float | None = on_rank_zero("prior adapter", lambda: prior.share_in_effect(torch.cat(logits)))
    if share is None:
        LOGGER.warning("%s moves logits by less than rounding: its effect cannot be shown", prior.settings.path)
    elif not 0.5 < share < 1.5:
        raise CheckpointError(
            f"{prior.settings.path}: the engine's logits show {share:.2f} of this adapter's effect, not 1",
            remedy="this is a defect: the engine does not compute with the adapter",
        )
    return share


def _record_evidence(run: Run, prior: ContinueFromConfig, evidence: dict[str, Any]) -> None:
    """Print and write to continued.json what shows that the adapter is in effect."""
    without, with_it = evidence["loss_without"], evidence["loss_with"]
    if with_it == without:
        raise CheckpointError(
            f"{prior.path}: the loss is {without:.6f} with and without this adapter",
            remedy="its matrices are those of an untrained adapter; use a later checkpoint of it",
        )
    losses = f"loss on {PROBE_BLOCKS} blocks without it {without:.4f}, with it {with_it:.4f}"
    LOGGER.info("%s; %s", evidence["description"], losses)  # rank 0's lines reach the terminal
    on_rank_zero("continued", lambda: run.context.claim.write(CONTINUED, evidence))
