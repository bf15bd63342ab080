"""One attempt of a run on this rank: claim the folder, build everything, restore, train, end with a code."""

from __future__ import annotations

import math
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_cpt.adapters.quantize import require_bitsandbytes
from dist_cpt.checkpoint.foreign import start_from
from dist_cpt.checkpoint.manifest import Identity, StateKind, TensorSpec, owners
from dist_cpt.checkpoint.restore import LoadedCheckpoint, load, newest_valid, require_fit
from dist_cpt.checkpoint.retention import bring_back, remove_stale_staging, set_aside_after
from dist_cpt.checkpoint.state import Probe, Randomness, TrainState
from dist_cpt.checkpoint.store import SAVE_POINTS, CheckpointInfo
from dist_cpt.checkpoint.verify import certify
from dist_cpt.config.resolve import StepShape, fingerprint, run_folder, step_shape
from dist_cpt.config.schema import ContinueFromConfig, RunConfig
from dist_cpt.data.batch import Batch
from dist_cpt.data.loader import PADDING, BlockLoader, ValidationLoader, prefetch
from dist_cpt.data.prepare import check_vocabulary, open_prepared, prepare
from dist_cpt.data.tokenizer import load_tokenizer
from dist_cpt.engines.build import build_engine
from dist_cpt.engines.engine import Engine
from dist_cpt.errors import (
    EXIT_DONE,
    EXIT_INTERNAL,
    EXIT_STOPPED,
    CheckpointError,
    DistCptError,
    NumericsError,
    Stopped,
    Superseded,
)
from dist_cpt.model.load import TrainableModel, load_model, locate_base
from dist_cpt.optim.eight_bit import dynamic_map, within_half_step
from dist_cpt.optim.groups import ParamGroup, eight_bit_names, param_groups
from dist_cpt.runtime.collectives import agree, all_reduce_ints, gather_json, on_every_rank, on_rank_zero
from dist_cpt.runtime.env import ProcessEnv, process_env
from dist_cpt.runtime.fault import VARIABLE, Faults, planned_faults
from dist_cpt.runtime.log import LOGGER, close_log, open_log
from dist_cpt.runtime.mesh import init_distributed, shutdown
from dist_cpt.runtime.seed import first_draws
from dist_cpt.runtime.stop import StopRequest
from dist_cpt.train.console import Console
from dist_cpt.train.contract import Contract
from dist_cpt.train.evaluate import evaluate
from dist_cpt.train.folder import Claim, claim, read_json, write_exit, write_json
from dist_cpt.train.health import Watchdog
from dist_cpt.train.loop import Hooks, Outcome, Progress, past_windows, step_positions, step_starts, train_loop
from dist_cpt.train.metrics import MetricsFile, rewind
from dist_cpt.train.observers import (
    CheckpointRecord,
    EvaluationRecord,
    Observer,
    RunEnd,
    RunStart,
    StepRecord,
)
from dist_cpt.train.sample import write_sample
from dist_cpt.train.saver import Saver
from dist_cpt.train.wandb import new_run_id, wandb_observer

RENDEZVOUS_SECONDS = 1800.0
WANDB_INIT_SECONDS = 30.0
STALE_STAGING_SECONDS = 3600.0
PREPARE_SECONDS = 1.0  # between two meetings of the ranks while the corpus is prepared
PROBE_BLOCKS = 4
# The replayed loss is the same forward in another summation order: rounding of one token's loss, averaged.
REPLAY_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3, "nf4": 2e-3}
ROLLBACKS = "rollbacks.json"
FAULT_POINTS = ("step", "restore", *(f"{kind}.{point}" for kind in ("trial", "save") for point in SAVE_POINTS))


def train(config: RunConfig, stop: StopRequest) -> tuple[int, Path | None]:
    """Train, or resume, the run of `config` as one of its ranks. Collective.

    Returns the exit code, and on rank 0 the run folder, for the report. Every ending is written to exit.json,
    except where the folder belongs to another recipe or process: then there is no folder to return either.
    """
    env = process_env()
    folder = run_folder(config)
    held: Claim | None = None
    met, own_group = False, not torch.distributed.is_initialized()
    code, reason, superseded = EXIT_INTERNAL, "", False
    progress = Progress()
    observers: list[Observer] = []
    try:
        shape = step_shape(config, env.world_size)
        device = init_distributed(env, RENDEZVOUS_SECONDS)
        met = True
        faults = on_every_rank(VARIABLE, lambda: planned_faults(FAULT_POINTS))
        held, attempt, run_id = _claim(folder, config, env)
        open_log(folder, env.rank)
        fault = Faults(faults, env.rank, attempt)
        if fault:
            LOGGER.warning("%s is set: this run will be disturbed on purpose", VARIABLE)
        limits = config.health.hang
        first = env.rank - env.local_rank
        local = range(first, first + env.local_world_size)
        with Watchdog(
            folder, env.rank, limits, world_size=env.world_size, local_ranks=local, attempt=attempt
        ) as watchdog:
            pieces = (config, env, folder, shape, device, attempt, run_id, held, stop, fault, watchdog)
            code, reason = _Run(*pieces, observers, progress).go()
    except DistCptError as error:
        code, reason = error.exit_code, str(error)
        superseded = isinstance(error, Superseded)
        if code == EXIT_INTERNAL:
            traceback.print_exc()
        if env.rank == 0 or (met and not error.agreed):
            print(f"dist-cpt: {error}", file=sys.stderr, flush=True)
    except Exception as error:  # a defect of ours, or a rank that vanished in a collective
        code, reason = EXIT_INTERNAL, f"{type(error).__name__}: {error}".splitlines()[0]
        LOGGER.error("rank %d ends: %s\n%s", env.rank, reason, traceback.format_exc())
        print(f"dist-cpt: rank {env.rank}: {reason} -- see logs/rank-{env.rank}.log", file=sys.stderr, flush=True)
    finally:
        if held is not None:
            if not superseded:  # the folder is another attempt's by now
                _end(observers, folder, code, reason, progress.step)
            held.close()
        close_log()
        if own_group and code in (EXIT_DONE, EXIT_STOPPED):
            shutdown()  # after a failure another rank may be inside a collective: leave by the end of the process
    return code, None if held is None else folder


def _claim(folder: Path, config: RunConfig, env: ProcessEnv) -> tuple[Claim | None, int, str]:
    """Rank 0 takes the folder; all learn the attempt's number and the W&B run id."""
    held: list[Claim] = []

    def take() -> list[Any]:
        held.append(claim(folder, config, new_run_id()))
        return [held[0].attempt, held[0].wandb_run_id]

    attempt, run_id = on_rank_zero("run folder", take)
    return (held[0] if held else None), attempt, run_id


def _end(observers: Sequence[Observer], folder: Path, code: int, reason: str, step: int) -> None:
    """Tell everyone how it ended; a full disk must not hide the reason."""
    for observer in observers:
        try:
            observer.on_end(RunEnd(code, reason, step))
        except DistCptError as error:
            print(f"dist-cpt: {error}", file=sys.stderr, flush=True)
    try:
        write_exit(folder, code, reason, step)
    except DistCptError as error:
        print(f"dist-cpt: {error}", file=sys.stderr, flush=True)


@dataclass
class _Run:
    """The pieces of one attempt on this rank."""

    config: RunConfig
    env: ProcessEnv
    folder: Path
    shape: StepShape
    device: torch.device
    attempt: int
    wandb_run_id: str
    held: Claim | None  # rank 0's
    stop: StopRequest
    fault: Faults
    watchdog: Watchdog
    observers: list[Observer]
    progress: Progress

    def go(self) -> tuple[int, str]:
        """Build, restore, train, save; (exit code, reason)."""
        config, rank = self.config, self.env.rank
        path = config.model.path
        if path is not None:  # before the corpus is prepared: that may take hours
            on_rank_zero("model.path", lambda: str(locate_base(path, config.model.revision)))
        if config.model.weights == "nf4":
            on_every_rank("model.weights", require_bitsandbytes)
        if config.optim.state == "8bit":
            on_every_rank("optim.state", lambda: dynamic_map(True))
        self._prepare()
        self.prepared = on_every_rank("open data", lambda: open_prepared(config))
        self.tokenizer = on_every_rank("tokenizer", self._load_tokenizer)
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        self.loader = BlockLoader(self.prepared, config.data.seq_len, config.seed, pad_id)
        self.held_out = [
            ValidationLoader(source, config.data.seq_len, pad_id, config.evaluate.max_blocks)
            for source in self.prepared.validation
        ]
        self.model: TrainableModel = on_every_rank("load model", self._load_model)
        trainable = self.model.trainable
        self.groups = param_groups(trainable, config.optim, adapter=config.adapter.kind == "lora")
        declared = {name: tensor.shape for name, tensor in trainable.items()}
        self.specs = _specs(self.groups, declared, config.model.compute_dtype)
        self.engine: Engine = build_engine(
            self.model.module, trainable, self.groups, self.model.layers, config, self.device
        )
        self.identity = Identity(
            base=self.model.identity,
            data={"identity": self.prepared.identity, "seq_len": config.data.seq_len, "seed": config.seed},
            recipe=fingerprint(config),
            engine=self.engine.kind,
        )
        self.metrics = MetricsFile(self.folder, 60 * config.checkpoint.retry_minutes)
        self.saver = self._saver()
        known: list[list[int]] = on_rank_zero("rollbacks", self._known_windows)
        self.progress.skipped_windows = [(start, stop) for start, stop in known]
        resumed_from = self._restore()
        if resumed_from is None and config.adapter.continue_from is not None:
            self._start_from_adapter(config.adapter.continue_from)
        if resumed_from is None and config.checkpoint.trial:
            self.saver.trial(self._state())
        self.contract = Contract(
            self.engine,
            self.folder,
            self.groups,
            declared,
            ties=self.model.ties,
            compute_dtype=config.model.compute_dtype,
            optim=config.optim,
            rank=rank,
            world_size=self.env.world_size,
        )
        self._watch(resumed_from)
        with ExitStack() as stack:
            stack.callback(self.engine.close)
            if resumed_from is None:
                self.watchdog.tick("evaluating", 0)
                self._evaluate(0)
            while (outcome := self._train()) == "rollback":
                self._roll_back()
            self.contract.close(self.progress.step)
            if outcome == "stopped":
                reason = f"{self.stop.requested or 'another rank'}: stopped and saved at step {self.progress.step}"
                self._tell(lambda observer: observer.on_message(reason))
                return EXIT_STOPPED, reason
            self.watchdog.tick("ending", self.progress.step)
            self.saver.save_now(self.progress.step, self._state)
            self._sample()
        return EXIT_DONE, "done"

    # -- building ------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Rank 0 prepares the corpus, for hours if need be; all ranks meet meanwhile, and a stop is heard.

        Raises:
            Stopped: a rank was sent a stop signal; what was finished is kept.
        """
        failed: list[BaseException] = []

        def work() -> None:
            try:
                prepare(self.config, self._say_prepared)
            except BaseException as error:  # handed to all ranks below
                failed.append(error)

        worker = threading.Thread(target=work, name="prepare", daemon=True)
        if self.env.rank == 0:
            worker.start()
        while True:
            if self.env.rank == 0:
                worker.join(PREPARE_SECONDS)
            self.watchdog.tick("starting", 0)
            at_work, stop = all_reduce_ints([int(worker.is_alive()), int(self.stop.requested is not None)])
            if not at_work:
                agree(failed[0] if failed else None, "prepare data")
                return
            if stop:
                raise Stopped("stopped while the data was prepared; what was finished is kept")

    def _say_prepared(self, name: str, documents: int) -> None:
        LOGGER.info("preparing %s: %d documents", name, documents)

    def _load_tokenizer(self) -> Any:
        assert self.config.data.tokenizer is not None  # resolve_paths fills it in
        return load_tokenizer(self.config.data.tokenizer, self.config.model.revision)

    def _load_model(self) -> TrainableModel:
        model = load_model(self.config, device=self.device)
        check_vocabulary(self.prepared, model.identity["vocab_size"])
        return model

    def _watch(self, resumed_from: str | None) -> None:
        """Start the observers, on rank 0."""
        if self.env.rank == 0:
            console = Console()
            self.observers += [console, self.metrics]
            wandb = wandb_observer(
                self.config.track.wandb,
                self.folder,
                self.wandb_run_id,
                console.on_message,
                init_timeout_seconds=WANDB_INIT_SECONDS,
            )
            if wandb is not None:
                self.observers.append(wandb)
        start = RunStart(
            config=self.config,
            folder=self.folder,
            engine=self.engine.kind,
            world_size=self.env.world_size,
            device=str(self.device),
            num_steps=self.shape.num_steps,
            first_step=self.progress.step,
            resumed_from=resumed_from,
            wandb_run_id=self.wandb_run_id,
            contract=self.contract.content,
            attempt=self.attempt,
        )
        on_rank_zero("observers", lambda: self._tell(lambda observer: observer.on_start(start)))

    def _tell(self, what: Callable[[Observer], None]) -> None:
        for observer in self.observers:
            what(observer)

    # -- restoring -----------------------------------------------------------------------------------------

    def _restore(self, up_to_step: int | None = None) -> str | None:
        """The newest valid checkpoint into engine and progress, with its certificate; None for a fresh start.

        What the folder holds of later steps belongs to a past that is not this run's any more: it moves aside.
        """
        on_rank_zero("checkpoints", lambda: remove_stale_staging(self.folder, STALE_STAGING_SECONDS))
        found, skipped = newest_valid(self.folder, up_to_step)
        for name, why in skipped:
            LOGGER.warning("checkpoint %s does not hold and is skipped: %s", name, why)
        if found is None:
            if up_to_step is None:
                on_rank_zero("metrics", lambda: rewind(self.folder, -1))
            return None
        self.fault("restore", 0)
        with load(found, verified=True) as checkpoint:
            on_every_rank("checkpoint", lambda: require_fit(checkpoint.manifest, self.specs, self.identity))
            state = checkpoint.state
            self.engine.import_state(checkpoint.read, state.optimizer_steps)
            self._certify(checkpoint)
            self.saver.saved_step, self.saver.parent = state.step, checkpoint.manifest.state_sha256
        self.progress.restore(state)
        on_rank_zero("checkpoints", lambda: self._leave_behind(found, state.step))
        return found.name

    def _start_from_adapter(self, chosen: ContinueFromConfig) -> None:
        """Take over somebody's adapter, and prove that it is in effect: the loss with and without it.

        Raises:
            CheckpointError: it changes nothing.
        """
        probed = range(PROBE_BLOCKS)
        without = self._probe_loss(probed)  # a new adapter adds zero
        started = start_from(self.engine, chosen, self.specs, self.model, self.config.optim)
        self.progress.optimizer_steps = started.step
        with_it = self._probe_loss(probed)
        if with_it == without:
            raise CheckpointError(
                f"{chosen.path}: the loss is {without:.6f} with and without this adapter",
                remedy="its matrices are those of an untrained one; take a later checkpoint of it",
            )
        LOGGER.info("%s; loss on %d blocks without it %.4f, with it %.4f",
                    started.description, PROBE_BLOCKS, without, with_it)  # fmt: skip
        proof = {"description": started.description, "sha256": started.sha256, "optimizer_steps": started.step}
        proof |= {"loss_without": without, "loss_with": with_it}
        on_rank_zero("continued", lambda: write_json(self.folder / "continued.json", proof))

    def _roll_back(self) -> None:
        """Go back to the newest checkpoint from before the bad steps, and leave their data out from now on.

        Raises:
            NumericsError: there is none.
        """
        progress = self.progress
        assert progress.bad_since is not None
        bad_step, bad_position = progress.bad_since
        last_step = progress.step
        self.saver.finish()
        progress.skipped_windows = sorted([*progress.skipped_windows, (bad_position, progress.position)])
        windows = {"windows": progress.skipped_windows}
        on_rank_zero("rollback", lambda: write_json(self.folder / ROLLBACKS, windows))
        restored = self._restore(up_to_step=bad_step - 1)
        if restored is None:
            raise NumericsError(
                f"steps {bad_step} to {last_step} were bad, and no checkpoint from before them holds",
                remedy="save more often (checkpoint.every_steps), lower the learning rate, or look at that data",
            )
        text = (
            f"steps {bad_step} to {last_step} were bad: back to {restored}, "
            f"blocks {bad_position} to {progress.skipped_windows[-1][1] - 1} are left out"
        )
        LOGGER.warning("%s", text)
        self._tell(lambda observer: observer.on_message(text))

    def _leave_behind(self, restored: Path, step: int) -> None:
        for name in set_aside_after(self.folder, step):
            LOGGER.warning("%s is not in the line of %s and was moved to superseded/", name, restored.name)
        bring_back(self.folder, restored, step)
        self.metrics.close()
        rewind(self.folder, step)

    def _certify(self, checkpoint: LoadedCheckpoint) -> None:
        """Prove the restored state; certificate.json holds the proof or the named failure."""
        state, weights = checkpoint.state, self.config.model.weights
        placed = owners(self.specs, self.env.world_size, self.config.adapter.kind == "lora")
        seed, next_step = self.config.seed, state.step + 1
        certificate = certify(
            checkpoint.manifest,
            self.engine.export_state(lambda kind, name: placed[kind, name]),
            next_block_ids=self._next_block_ids(state.position, state.skipped_windows),
            recorded_block_ids=state.next_block_ids,
            replayed_loss=self._probe_loss(state.probe.block_ids),
            recorded_loss=state.probe.loss,
            tolerance=REPLAY_TOLERANCE[weights] * max(1.0, abs(state.probe.loss)),
            facts={
                "random": ([state.random.seed, state.random.step], [seed, state.step]),
                "random_of_every_rank": (
                    [list(draws) for draws in state.random.next_draws],
                    [first_draws(seed, next_step, rank) for rank in range(len(state.random.next_draws))],
                ),
                "schedule": (state.schedule, self._schedule()),
            },
            approximate=self._requantised(checkpoint),
        )
        certificate |= {
            "attempt": self.attempt,
            "restored_by": {"engine": self.engine.kind, "world_size": self.env.world_size},
        }
        on_rank_zero("certificate", lambda: write_json(self.folder / "certificate.json", certificate))
        if certificate["verdict"] != "pass":
            raise CheckpointError(
                f"{checkpoint.path.name} was not restored as it was saved: {', '.join(certificate['failed'])} failed",
                remedy="see certificate.json",
            )
        LOGGER.info("resumed from %s, certificate passes", checkpoint.path.name)

    def _requantised(self, checkpoint: LoadedCheckpoint) -> Callable[[StateKind, str, torch.Tensor], bool] | None:
        """Which restored moments may differ from the saved ones: 8-bit ones whose blocks have other borders here."""
        manifest = checkpoint.manifest
        same_place = (manifest.engine, manifest.world_size) == (self.engine.kind, self.env.world_size)
        eight_bit = eight_bit_names(self.groups, self.config.optim)
        if same_place or not eight_bit:
            return None

        def close(kind: StateKind, name: str, values: torch.Tensor) -> bool:
            if kind == "master" or name not in eight_bit:
                return False
            return within_half_step(kind, values.reshape(-1), checkpoint.read(kind, name, 0, values.numel()))

        return close

    def _schedule(self) -> dict[str, Any]:
        return {"num_steps": self.shape.num_steps, **self.config.schedule.model_dump(mode="json")}

    def _next_block_ids(self, position: int, windows: Sequence[tuple[int, int]]) -> list[int]:
        """(source, epoch, block) of the next step's blocks, flat: what the data order gives, not what was asked."""
        ids: list[int] = []
        start = past_windows(position, windows)
        for at in range(start, start + self.shape.blocks_per_step):
            source, epoch, block = self.loader.describe(at)
            ids += [self.loader.source_names.index(source), epoch, block]
        return ids

    def _probe_loss(self, positions: Sequence[int]) -> float:
        """Mean loss of a few blocks of the training stream, without a gradient."""
        return evaluate(
            self.engine,
            self.loader.batch,
            positions,
            PADDING,
            rank=self.env.rank,
            world_size=self.env.world_size,
            micro_batch=1,
        ).loss

    # -- training ------------------------------------------------------------------------------------------

    def _train(self) -> Outcome:
        return train_loop(
            self.config,
            self.shape,
            self.engine,
            self.groups,
            self.contract,
            self.progress,
            Hooks(
                batches=self._batches,
                at_boundary=self._at_boundary,
                phase=self.watchdog.tick,
                stop_requested=self._stop_requested,
                saver=self.saver,
                state=self._state,
                evaluation_due=self._evaluation_due,
                evaluate=self._evaluate,
                on_step=self._on_step,
            ),
            source_names=self.loader.source_names,
            rank=self.env.rank,
            attempt=self.attempt,
        )

    def _batches(self, position: int) -> Iterator[list[Batch]]:
        """The micro-batches of every remaining step, made ahead on a thread."""
        starts = step_starts(self.shape, position, self.progress.skipped_windows, self.progress.step)
        wanted = (positions for start in starts for positions in step_positions(self.shape, start, self.env.rank))
        ahead = prefetch(self.loader.batch, wanted, depth=2 * self.shape.accumulation)
        for _ in range(self.shape.num_steps - self.progress.step):
            yield [next(ahead) for _ in range(self.shape.accumulation)]

    def _at_boundary(self, step: int) -> None:
        self.watchdog.tick("training", step)
        self.fault("step", step + 1)

    def _stop_requested(self) -> bool:
        """A signal, or a later attempt that has taken the folder; the fence then names it."""
        return self.stop.requested is not None or (self.held is not None and not self.held.held())

    def _state(self) -> TrainState:
        """What the next checkpoint says beside its tensors. Collective."""
        progress = self.progress
        start = past_windows(progress.position, progress.skipped_windows)
        probed = tuple(range(start, start + PROBE_BLOCKS))
        probe_loss = self._probe_loss(probed)
        if not math.isfinite(probe_loss):
            raise NumericsError(
                f"the loss after step {progress.step} is {probe_loss}: this state is not saved",
                remedy="lower the learning rate; the last checkpoint is from before",
            )
        draws = gather_json(first_draws(self.config.seed, progress.step + 1, self.env.rank))
        return TrainState(
            step=progress.step,
            position=progress.position,
            tokens=progress.tokens,
            tokens_by_source=dict(progress.tokens_by_source),
            skipped_total=progress.skipped_total,
            skipped_in_a_row=progress.skipped_in_a_row,
            random=Randomness(seed=self.config.seed, step=progress.step, next_draws=tuple(map(tuple, draws))),
            schedule=self._schedule(),
            wandb_run_id=self.wandb_run_id,
            attempt=self.attempt,
            parent=self.saver.parent,
            optimizer_steps=progress.optimizer_steps,
            skipped_windows=tuple(progress.skipped_windows),
            bad_since=progress.bad_since,
            recent_losses=tuple(progress.recent_losses),
            next_block_ids=tuple(self._next_block_ids(progress.position, progress.skipped_windows)),
            probe=Probe(block_ids=probed, loss=probe_loss),
        )

    def _known_windows(self) -> list[list[int]]:
        """Windows that rollbacks of earlier attempts left out; the checkpoint they went back to is older."""
        path = self.folder / ROLLBACKS
        if not path.exists():
            return []
        try:
            return [[int(start), int(stop)] for start, stop in read_json(path)["windows"]]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{path} is damaged: the data that a rollback left out is not known",
                remedy="restore it from a copy, or remove it if the run may see that data again",
            ) from None

    def _saver(self) -> Saver:
        return Saver(
            self.folder,
            self.config.checkpoint,
            self.engine,
            self.specs,
            self.identity,
            adapter=self.config.adapter.kind == "lora",
            sidecars=[self.model.write_config, self.tokenizer.save_pretrained],
            aliases=self.model.aliases,
            before=self.metrics.sync,
            saved=self._on_saved,
            fence=self.held.require if self.held is not None else lambda: None,
            fault=self.fault,
        )

    def _on_saved(self, info: CheckpointInfo, step: int, stall_seconds: float) -> None:
        record = CheckpointRecord(step, info.path.name, info.seconds, info.num_bytes, stall_seconds)
        self._tell(lambda observer: observer.on_checkpoint(record))

    def _evaluation_due(self, step: int) -> bool:
        every = self.config.evaluate.every_steps
        return step == self.shape.num_steps or (every is not None and step % every == 0)

    def _evaluate(self, step: int) -> None:
        for loader in self.held_out:
            result = evaluate(
                self.engine,
                loader.batch,
                list(range(loader.num_blocks)),
                loader.num_blocks,
                rank=self.env.rank,
                world_size=self.env.world_size,
                micro_batch=self.shape.micro_batch,
            )
            record = EvaluationRecord(
                step, loader.name, loader.role, result.loss, result.perplexity, result.num_tokens, self.attempt
            )
            self._tell(lambda observer, record=record: observer.on_evaluation(record))

    def _on_step(self, record: StepRecord) -> None:
        self._tell(lambda observer: observer.on_step(record))

    def _sample(self) -> None:
        """A continuation of held-out text by the trained model, for the report."""
        if not self.held_out:
            return
        batch = self.held_out[0].batch([0])
        prompt = batch.input_ids[0, : min(24, self.config.data.seq_len // 2)].tolist()
        write_sample(self.engine, self.tokenizer, prompt, self.folder, self.progress.step, rank=self.env.rank)


def _specs(groups: Sequence[ParamGroup], declared: dict[str, torch.Size], dtype: str) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(declared[name]), dtype, group.name) for group in groups for name in group.names]
