"""What one attempt builds on this rank, and its way from restoring through training to the last checkpoint."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_cpt.adapters.pissa import PISSA, begin_with_pissa, copy_initial
from dist_cpt.adapters.prior_adapter import open_earlier
from dist_cpt.adapters.quantize import QUANTISED, require_bitsandbytes
from dist_cpt.checkpoint.save import CheckpointInfo
from dist_cpt.config.resolve import StepShape, fingerprint
from dist_cpt.config.schema import RunConfig
from dist_cpt.data.batch import Batch
from dist_cpt.data.chat import chat_template
from dist_cpt.data.loader import BlockLoader, ValidationLoader, prefetch
from dist_cpt.data.prepare import check_vocabulary, open_prepared, prepare
from dist_cpt.data.tokenizer import load_new_vocabulary, load_tokenizer
from dist_cpt.engines.build import build_engine
from dist_cpt.engines.engine import Engine
from dist_cpt.errors import (
    EXIT_DONE,
    EXIT_STOPPED,
    DistCptError,
    NumericsError,
    Stopped,
)
from dist_cpt.health.stragglers import ComputeClock, StragglerWatch, timed_modules
from dist_cpt.health.watchdog import Watchdog
from dist_cpt.model.attention import describe
from dist_cpt.model.continue_from import ProbeBlock
from dist_cpt.model.load import WEIGHTS_DTYPE, TrainableModel, check_base, load_model
from dist_cpt.model.safety_checks import require_base_checkpoint
from dist_cpt.optim.eight_bit import dynamic_map
from dist_cpt.optim.groups import ParamGroup, param_groups
from dist_cpt.run_folder.claim import Claim
from dist_cpt.run_folder.manifest import Identity
from dist_cpt.run_folder.metrics import MetricsFile
from dist_cpt.run_folder.records import CheckpointRecord, EvaluationRecord, RunStart, StepRecord
from dist_cpt.run_folder.train_state import Probe, Randomness, TrainState
from dist_cpt.runtime.collectives import agree, all_reduce_ints, gather_json, on_every_rank, on_rank_zero
from dist_cpt.runtime.env import ProcessEnv
from dist_cpt.runtime.faults import Faults
from dist_cpt.runtime.log import LOGGER
from dist_cpt.runtime.seed import first_draws
from dist_cpt.runtime.stop import StopRequest
from dist_cpt.train.class_scores import class_scores
from dist_cpt.train.console import Console
from dist_cpt.train.contract import Contract
from dist_cpt.train.evaluate import evaluate
from dist_cpt.train.loop import Hooks, Outcome, Progress, past_windows, step_positions, step_starts, train_loop
from dist_cpt.train.observers import Observer
from dist_cpt.train.probe import PROBE_BLOCKS, Stream
from dist_cpt.train.restore import Restorer
from dist_cpt.train.sample import write_sample
from dist_cpt.train.saver import Saver
from dist_cpt.train.wandb import wandb_observer
from dist_cpt.training_state import TensorSpec

WANDB_INIT_SECONDS = 30.0
PREPARE_SECONDS = 1.0  # between two meetings of the ranks while the corpus is prepared


@dataclass
class Session:
    """The pieces of one attempt on this rank; `go` runs it."""

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
        self._check_in_advance()
        self._open_data()
        self._build_model()
        self._build_record()
        restorer = self._restorer()
        resumed_from = self._begin(restorer)
        with ExitStack() as stack:
            stack.callback(self.engine.close)
            if resumed_from is None:
                self.watchdog.tick("evaluating", 0)
                self._evaluate(0)
            try:
                while (outcome := self._train()) == "rollback":
                    restorer.roll_back()
            except NumericsError:  # of all ranks alike: the checkpoint in the making is from before
                with contextlib.suppress(DistCptError):
                    self.saver.finish()
                raise
            self._require_held()
            self.contract.close(self.progress.step)
            if outcome == "stopped":
                reason = f"{self.stop.requested or 'another rank'}: stopped and saved at step {self.progress.step}"
                self._tell(lambda observer: observer.on_message(reason))
                return EXIT_STOPPED, reason
            self.watchdog.tick("ending", self.progress.step)
            self.saver.save_now(self.progress.step, self._state)
            self._require_held()
            self._sample()
        return EXIT_DONE, "done"

    # -- building ------------------------------------------------------------------------------------------

    def _check_in_advance(self) -> None:
        """What needs neither the corpus nor a weight to be refused: preparing may take hours."""
        config = self.config
        path = config.model.path
        if path is not None:
            on_rank_zero("model.path", self._check_starting_point)
        if config.model.weights in QUANTISED:
            on_every_rank("model.weights", lambda: require_bitsandbytes(config.model.weights))
        if config.optim.state == "8bit":
            on_every_rank("optim.state", lambda: dynamic_map(True))
        self.vocabulary = on_every_rank("embeddings.new_tokens", lambda: load_new_vocabulary(config))

    def _open_data(self) -> None:
        config = self.config
        self._prepare()
        self.prepared = on_every_rank("open data", lambda: open_prepared(config))
        self.tokenizer = on_every_rank("tokenizer", self._load_tokenizer)
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        self.loader = BlockLoader(self.prepared, config.data.seq_len, config.seed, pad_id)
        self.held_out = [
            ValidationLoader(source, config.data.seq_len, pad_id, config.evaluate.max_blocks)
            for source in self.prepared.validation
        ]

    def _build_model(self) -> None:
        """The model, its parameter groups and the engine that owns them."""
        config = self.config
        self.model: TrainableModel = on_every_rank("load model", self._load_model)
        if config.adapter.init == "pissa":
            self.model.identity[PISSA] = begin_with_pissa(self.model.module, self.folder)
        trainable = self.model.trainable
        lora = config.adapter.kind == "lora"
        self.groups = param_groups(
            trainable, config.optim, lora, config.embeddings.alone_steps, config.adapter.lora_plus_ratio
        )
        self.declared = {name: tensor.shape for name, tensor in trainable.items()}  # the engine may shard them
        self.specs = _specs(self.groups, self.declared, config.model.compute_dtype)
        self.engine: Engine = build_engine(
            self.model.module, trainable, self.groups, self.model.layers, config, self.device
        )

    def _build_record(self) -> None:
        """What says which run this is, and what writes it down."""
        config = self.config
        self.identity = Identity(
            base=self.model.identity,
            data={"identity": self.prepared.identity, "seq_len": config.data.seq_len, "seed": config.seed},
            recipe=fingerprint(config),
            engine=self.engine.kind,
        )
        self.metrics = MetricsFile(self.folder, 60 * config.checkpoint.retry_minutes)
        self.stream = Stream(self.engine, self.loader, self.shape, self.env)
        self.schedule = {"num_steps": self.shape.num_steps, **config.schedule.model_dump(mode="json")}
        self.saver = self._saver()

    def _begin(self, restorer: Restorer) -> str | None:
        """Restore the newest checkpoint or start afresh, and open the record; what it resumed from."""
        config = self.config
        restorer.know_windows()
        resumed_from = restorer.restore()
        if resumed_from is None and config.adapter.continue_from is not None:
            restorer.start_from_adapter(config.adapter.continue_from)
        if resumed_from is None and config.checkpoint.trial:
            self.saver.trial(self._state())
        self.contract = Contract(
            self.engine,
            self.folder,
            self.groups,
            self.declared,
            ties=self.model.ties,
            compute_dtype=config.model.compute_dtype,
            optim=config.optim,
            kernels=self.model.fusion.as_json() | {"attention": self._attention()},
            rank=self.env.rank,
            world_size=self.env.world_size,
        )
        self._watch(resumed_from)
        self.clock = self.stragglers = None
        if config.health.straggler is not None and self.env.world_size > 1:
            self.clock = ComputeClock(timed_modules(self.model.layers, self.engine.kind), self.device)
            self.stragglers = StragglerWatch(
                config.health.straggler, self.clock, lambda text: self._tell(lambda to: to.on_message(text))
            )
        return resumed_from

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

    def _check_starting_point(self) -> None:
        """What a base, its tokenizer and an earlier adapter would be refused for, without loading a weight."""
        chosen = self.config.adapter.continue_from
        check_base(self.config.model)
        load_new_vocabulary(self.config)
        if self.config.task == "cpt":
            require_base_checkpoint(self.config.model, self._load_tokenizer())
        if chosen is not None and chosen.mode != "train":
            open_earlier(Path(chosen.path))

    def _load_tokenizer(self) -> Any:
        path, base = self.config.data.tokenizer, self.config.model
        assert path is not None  # resolve_paths fills it in
        tokenizer = load_tokenizer(path, base.revision if path == base.path else None)
        if self.config.task == "instruct":  # saved with the model: it answers only under the template it was taught
            tokenizer.chat_template = chat_template(tokenizer, self.config.data.chat_template)
        return tokenizer

    def _initial_adapter(self) -> list[Callable[[str | Path], None]]:
        return [partial(copy_initial, self.folder)] if self.config.adapter.init == "pissa" else []

    def _attention(self) -> str:
        dtype = WEIGHTS_DTYPE[self.config.model.compute_dtype]
        return describe(self.model.module.attention, self.device, self.model.hf_config, dtype)

    def _load_model(self) -> TrainableModel:
        probe = None
        if self.env.rank == 0:
            blocks = [self.loader.batch([at]) for at in range(PROBE_BLOCKS)]
            probe = [ProbeBlock(b.input_ids, b.labels, b.position_ids, b.cu_seqlens, b.max_seqlen) for b in blocks]
        model = load_model(self.config, device=self.device, vocabulary=self.vocabulary, probe=probe)
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

    def _require_held(self) -> None:
        """End here, on all ranks, if a later attempt has taken the folder."""
        on_rank_zero("run folder", lambda: None if self.held is None else self.held.require_current())

    def _tell(self, what: Callable[[Observer], None]) -> None:
        if self.held is not None and not self.held.is_current():
            return  # a later attempt keeps the record now; the next boundary ends this one
        for observer in self.observers:
            what(observer)

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
            with self._own_work():
                micro_batches = [next(ahead) for _ in range(self.shape.accumulation)]
            yield micro_batches

    def _at_boundary(self, step: int) -> None:
        self.watchdog.tick("training", step)
        with self._own_work():
            self.fault("step", step + 1)
        if self.stragglers is not None:
            self.stragglers.boundary()

    def _own_work(self) -> contextlib.AbstractContextManager[None]:
        """Time here is this rank's own: no other rank is waited for."""
        return contextlib.nullcontext() if self.clock is None else self.clock.also()

    def _stop_requested(self) -> bool:
        """A signal, or a later attempt that has taken the folder; the fence then names it."""
        return self.stop.requested is not None or (self.held is not None and not self.held.is_current())

    def _state(self) -> TrainState:
        """What the next checkpoint says beside its tensors. Collective."""
        progress = self.progress
        start = past_windows(progress.position, progress.skipped_windows)
        probed = tuple(range(start, start + PROBE_BLOCKS))
        probe_loss = self.stream.probe_loss(probed)
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
            schedule=self.schedule,
            wandb_run_id=self.wandb_run_id,
            attempt=self.attempt,
            parent=self.saver.parent,
            optimizer_steps=progress.optimizer_steps,
            skipped_windows=tuple(progress.skipped_windows),
            bad_since=progress.bad_since,
            recent_losses=tuple(progress.recent_losses),
            next_block_ids=tuple(self.stream.next_block_ids(progress.position, progress.skipped_windows)),
            probe=Probe(block_ids=probed, loss=probe_loss),
        )

    def _restorer(self) -> Restorer:
        return Restorer(
            self.config,
            self.env,
            self.folder,
            self.attempt,
            self.engine,
            self.groups,
            self.specs,
            self.identity,
            self.model,
            self.schedule,
            self.stream,
            self.saver,
            self.metrics,
            self.progress,
            self.fault,
            say=lambda text: self._tell(lambda observer: observer.on_message(text)),
        )

    def _saver(self) -> Saver:
        return Saver(
            self.folder,
            self.config.checkpoint,
            self.engine,
            self.specs,
            self.identity,
            adapter=self.config.adapter.kind == "lora",
            sidecars=[self.model.write_config, self.tokenizer.save_pretrained, *self._initial_adapter()],
            aliases=self.model.aliases,
            before=self.metrics.sync,
            saved=self._on_saved,
            fence=self.held.require_current if self.held is not None else lambda: None,
            fault=self.fault,
        )

    def _on_saved(self, info: CheckpointInfo, step: int, stall_seconds: float) -> None:
        record = CheckpointRecord(step, info.path.name, info.seconds, info.num_bytes, stall_seconds)
        self._tell(lambda observer: observer.on_checkpoint(record))

    def _evaluation_due(self, step: int) -> bool:
        every = self.config.evaluate.every_steps
        return step == self.shape.num_steps or (every is not None and step % every == 0)

    def _evaluate(self, step: int) -> None:
        head = self.model.class_head
        for loader in self.held_out:
            if head is not None:
                head.take_confusion()  # of probes since the last evaluation
            result = evaluate(
                self.engine,
                loader.batch,
                list(range(loader.num_blocks)),
                loader.num_blocks,
                rank=self.env.rank,
                world_size=self.env.world_size,
                micro_batch=self.shape.micro_batch,
            )
            scores = {} if head is None else class_scores(all_reduce_ints(head.take_confusion()))
            numbers = (result.loss, result.perplexity, result.num_tokens)
            record = EvaluationRecord(step, loader.name, loader.role, *numbers, self.attempt, scores)
            self._tell(lambda observer, record=record: observer.on_evaluation(record))

    def _on_step(self, record: StepRecord) -> None:
        self._tell(lambda observer: observer.on_step(record))

    def _sample(self) -> None:
        """A continuation of held-out text by the trained model, for the report."""
        if not self.held_out or self.config.task == "classify":
            return
        batch = self.held_out[0].batch([0])
        prompt = batch.input_ids[0, : min(24, self.config.data.seq_len // 2)].tolist()
        where = (self.folder, self.progress.step)
        context = self.config.data.seq_len
        write_sample(self.engine, self.tokenizer, prompt, *where, rank=self.env.rank, context=context)


def _specs(groups: Sequence[ParamGroup], declared: dict[str, torch.Size], dtype: str) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(declared[name]), dtype, group.name) for group in groups for name in group.names]
