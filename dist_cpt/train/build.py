"""What one attempt builds before it restores or starts: data, model, engine, and the run around them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_cpt.adapters.pissa import PISSA, copy_initial, init_pissa
from dist_cpt.adapters.prior_adapter import open_prior_adapter
from dist_cpt.adapters.quantize import QUANTISED, require_format
from dist_cpt.adapters.vocabulary import NewVocabulary
from dist_cpt.checkpoint.save import RunCheckpoints
from dist_cpt.config.resolve import settings, step_shape, with_tokens
from dist_cpt.config.resume_changes import differs_by_host
from dist_cpt.config.schema import ContinueFromConfig
from dist_cpt.data.batch import Batch
from dist_cpt.data.budget import blocks_of_epochs, require_enough
from dist_cpt.data.chat import chat_template
from dist_cpt.data.concerns import concerns
from dist_cpt.data.hub import commits, with_revisions
from dist_cpt.data.loader import BlockLoader, ValidationLoader
from dist_cpt.data.prefetch import prefetch
from dist_cpt.data.prepare import prepare
from dist_cpt.data.prepared import Prepared, check_vocabulary, open_prepared
from dist_cpt.data.progress_line import LOG_SECONDS, ProgressLine
from dist_cpt.data.store import check_chunks
from dist_cpt.data.stream_loader import Loader
from dist_cpt.data.text_bytes import TextBytes
from dist_cpt.data.tokenizer import (
    at_commit,
    load_new_vocabulary,
    load_run_tokenizer,
    padding_id,
    tokenizer_commit,
    tokenizer_hash,
)
from dist_cpt.engines.build import build_engine, kind_of
from dist_cpt.engines.engine import InspectableEngine
from dist_cpt.errors import ConfigError, Stopped
from dist_cpt.health.stragglers import ComputeClock, StragglerWatch, timed_modules
from dist_cpt.health.watchdog import collective_seconds
from dist_cpt.model.base_model import base_sha256s, check_base, commit_of, sha256s_together, with_vocabulary_size
from dist_cpt.model.continue_from import ProbeBlock
from dist_cpt.model.load import TrainableModel, load_model, why_base_is_whole
from dist_cpt.model.safety_checks import require_base_checkpoint
from dist_cpt.optim.continued_schedule import last_step_before_decay
from dist_cpt.optim.eight_bit import dynamic_map
from dist_cpt.optim.groups import ParamGroup, param_groups
from dist_cpt.run_folder.checkpoints import published
from dist_cpt.run_folder.evaluations import recorded_best
from dist_cpt.run_folder.json_files import read_object
from dist_cpt.run_folder.manifest import Identity
from dist_cpt.run_folder.metrics import MetricsFile
from dist_cpt.run_folder.names import ADAPTER_WEIGHTS, CONTINUED
from dist_cpt.run_folder.records import HeldOut
from dist_cpt.runtime.collectives import (
    agree,
    all_reduce_ints,
    gather_json,
    on_every_rank,
    on_rank_zero,
    over_group,
    rank,
    ranks_that_see,
    require_equal,
)
from dist_cpt.runtime.device_check import emulates_bf16
from dist_cpt.runtime.log import LOGGER
from dist_cpt.runtime.mesh import host_group
from dist_cpt.runtime.shared_folder import MARK_SECONDS, first_that_sees
from dist_cpt.runtime.versions import package_versions
from dist_cpt.train.attempt import RunContext
from dist_cpt.train.divide import Division, layer_windows
from dist_cpt.train.efficiency import Efficiency, open_efficiency
from dist_cpt.train.open_stream import open_stream
from dist_cpt.train.probe import PROBE_BLOCKS, Stream
from dist_cpt.train.profiling import Profile
from dist_cpt.train.progress import Progress, step_starts
from dist_cpt.train.saver import Saver
from dist_cpt.train.tasks import RunTasks, open_tasks
from dist_cpt.training_state import TensorSpec

PREPARE_SECONDS = 1.0  # between two collectives while the corpus is prepared


@dataclass(frozen=True)
class StartingPoint:
    """What a run starts from, the same on all ranks."""

    base_sha256: str | None  # of its weights; None: from scratch
    tokenizer: Any
    vocabulary: NewVocabulary | None
    tasks: RunTasks | None


@dataclass(frozen=True)
class TrainingData:
    """The token stores, and what reads them."""

    prepared: Prepared
    tokenizer: Any
    loader: Loader
    held_out: list[ValidationLoader]
    text_bytes: TextBytes | None  # None: the bytes of the targets' text cannot be told
    tasks: RunTasks | None

    @property
    def source_names(self) -> Sequence[str]:
        """The training sources in the order in which batches count their tokens."""
        return self.loader.source_names


@dataclass(frozen=True)
class Run:
    """Everything that trains, on this rank."""

    context: RunContext
    data: TrainingData
    model: TrainableModel
    groups: list[ParamGroup]
    specs: list[TensorSpec]  # every trainable tensor with its full shape; the engine may shard it
    engine: InspectableEngine
    stream: Stream
    division: Division
    schedule: dict[str, Any]  # as checkpoints record it
    identity: Identity
    metrics: MetricsFile
    saver: Saver
    host_group: dist.ProcessGroup | None  # for what the ranks agree on while the device works; None: the default group
    efficiency: Efficiency
    profile: Profile
    clock: ComputeClock | None  # with stragglers, on more than one rank
    stragglers: StragglerWatch | None
    base_losses: Mapping[str, HeldOut] = field(default_factory=dict)  # by held-out set, under the base

    def steps(self, progress: Progress) -> Iterator[list[Batch]]:
        """The micro-batches of every remaining step, made ahead on a thread, in pinned memory for a GPU."""
        shape = self.context.shape
        share, starts = shape.share(self.context.env.rank), list(step_starts(shape, progress))
        wanted = ((start, number) for start in starts for number in range(shape.accumulation))
        on_gpu = self.context.device.type == "cuda"

        def batch_of(place: tuple[int, int]) -> Batch:
            start, number = place
            positions = self.division.positions(start, share.group)[number]
            batch = self.data.loader.batch(positions).cut(share.part, share.num_parts)
            return batch.pinned() if on_gpu else batch

        ahead = prefetch(batch_of, wanted, depth=2 * shape.accumulation)
        for start in starts:
            self.data.loader.forget_before(start)
            with self._own_work():
                micro_batches = [next(ahead) for _ in range(shape.accumulation)]
            yield micro_batches

    def at_boundary(self, step: int) -> None:
        """What belongs to no step, before `step`: planned faults, and the comparison of the ranks' pace."""
        with self._own_work():
            self.context.fault("step", step)
        if self.stragglers is not None:
            with over_group(self.host_group):
                self.stragglers.boundary()

    def evaluation_due(self, step: int) -> bool:
        """Whether the held-out sets are evaluated after `step`; after the last one once it is saved."""
        every = self.context.config.evaluate.every_steps
        return every is not None and step % every == 0 and step < self.context.shape.num_steps

    def _own_work(self) -> contextlib.AbstractContextManager[None]:
        """Time here is this rank's own: it waits for no other rank."""
        return contextlib.nullcontext() if self.clock is None else self.clock.also()


def agree_on_recipe(context: RunContext) -> RunContext:
    """Refuse ranks with another recipe or other packages; the context with the commits of what is on the hub, resolved
    once for all.

    Collective.
    """
    config = context.config
    recipe = {f"recipe: {key}": value for key, value in settings(config).items() if not differs_by_host(key)}
    require_equal(recipe | {f"version of {name}": version for name, version in package_versions().items()})
    config = with_revisions(config, on_rank_zero("data.sources", partial(commits, config)))
    named = (config.embeddings.new_tokens, config.data.tokenizer)
    elsewhere = [path if path != config.model.path else None for path in named]  # else model.revision says which
    commits_of = on_rank_zero("tokenizer", lambda: [path and tokenizer_commit(path) for path in elsewhere])
    new_tokens, tokenizer = (path and at_commit(path, commit) for path, commit in zip(named, commits_of, strict=True))
    embeddings = config.embeddings.model_copy(update={"new_tokens": new_tokens})
    data = config.data.model_copy(update={"tokenizer": tokenizer})
    config = config.model_copy(update={"embeddings": embeddings, "data": data})
    if config.model.path is None:
        return replace(context, config=config)
    commit = on_rank_zero("model.path", lambda: commit_of(check_base(config.model)[0], config.model.revision))
    model = config.model.model_copy(update={"revision": commit})
    return replace(context, config=config.model_copy(update={"model": model}))


def check_before_hours_of_work(context: RunContext) -> StartingPoint:
    """Refuse what needs neither the corpus nor training to be refused: preparing may take hours. Collective.

    Every rank reads the same base, tokenizer and prior adapter.
    """
    config = context.config
    base_sha256, base = base_sha256s(config.model) if config.model.path is not None else (None, {})
    if config.model.weights in QUANTISED:
        on_every_rank("model.weights", lambda: require_format(config.model.weights, context.device))
    if config.model.weights != "fp32" and emulates_bf16(context.device):
        LOGGER.warning(
            "model.weights: %s: this CPU has no bf16 instructions and emulates them; fp32 is many times faster",
            config.model.weights,
        )
    if config.optim.state == "8bit":
        on_every_rank("optim.state", lambda: dynamic_map(True))
    vocabulary = on_every_rank("embeddings.new_tokens", lambda: load_new_vocabulary(config))
    tokenizer = on_every_rank("tokenizer", lambda: _load_tokenizer(context))
    if config.model.path is not None and config.task == "cpt":
        on_rank_zero("model.path", lambda: require_base_checkpoint(config.model, tokenizer))
    adapter = sha256s_together(_adapter_files(config.adapter.continue_from))
    on_rank_zero("adapter.continue_from", lambda: _check_prior_adapter(context, adapter))
    facts: dict[str, Any] = {f"sha256 of {name} in model.path": sha256 for name, sha256 in base.items()}
    facts |= {f"sha256 of {name} in adapter.continue_from": sha256 for name, sha256 in adapter.items()}
    facts |= {"sha256 of the tokenizer": tokenizer_hash(tokenizer), "its padding": tokenizer.pad_token_id}
    facts |= {"its chat template": tokenizer.chat_template}
    facts |= {} if vocabulary is None else {"embeddings.new_tokens": vocabulary.content}
    require_equal(facts)
    return StartingPoint(base_sha256, tokenizer, vocabulary, open_tasks(config, tokenizer))


def open_data(context: RunContext, start_point: StartingPoint) -> TrainingData:
    """Prepare the token stores if they are not there yet, and open them. Collective.

    Raises:
        Stopped: a rank was sent a stop signal while rank 0 prepared; finished sources are kept.
    """
    config, tokenizer = context.config, start_point.tokenizer
    folders = _prepare(context)  # other ranks need its stores, not the text
    prepared = on_every_rank("open data", lambda: open_prepared(config, folders))
    facts = {f"token store of {s.name}": s.store.manifest.content_hash for s in prepared.all_sources}
    require_equal(facts | {"identity of the data": prepared.identity})
    _check_stores(prepared)
    pad_id = padding_id(tokenizer)
    if prepared.streamed:
        loader: Loader = open_stream(context, prepared, pad_id)
    else:
        loader = BlockLoader(prepared, config.data.seq_len, config.seed, pad_id)
    held_out = [
        ValidationLoader(source, config.data.seq_len, pad_id, config.evaluate.max_blocks)
        for source in prepared.validation
    ]
    text_bytes = None if config.task == "classify" else TextBytes.of(tokenizer)
    return TrainingData(prepared, tokenizer, loader, held_out, text_bytes, start_point.tasks)


def settle_length(context: RunContext, data: TrainingData) -> RunContext:
    """The context with the steps that `train.epochs` are on this data, which suffices for them. Collective.

    Raises:
        ConfigError: settings exclude each other for a run of this length.
        DataError: a source that may not repeat ends before the run.
    """
    config, loader = context.config, data.loader
    if (epochs := config.train.epochs) is not None:
        blocks = on_rank_zero("train.epochs", lambda: blocks_of_epochs(data.prepared, loader, epochs))
        settled = on_every_rank("train.epochs", lambda: with_tokens(config, blocks * config.data.seq_len))
        context = replace(context, shape=step_shape(settled, context.env.world_size))
        LOGGER.info("train.epochs: %g are %d steps", epochs, context.shape.num_steps)
    blocks = context.shape.num_steps * context.shape.blocks_per_step
    on_rank_zero("data", lambda: require_enough(data.prepared, loader, blocks))
    if context.env.rank == 0:
        for concern in concerns(data.prepared, loader, blocks):
            LOGGER.warning("%s", concern)
    return context


def build_model(context: RunContext, start: StartingPoint, data: TrainingData) -> TrainableModel:
    """The base, its adapter and what trains of it, self-checked on blocks of the corpus. Collective."""
    config = with_vocabulary_size(context.config, data.prepared.vocab_size)
    engine = kind_of(config.engine, context.env.world_size)
    whole = on_every_rank("model.path", lambda: why_base_is_whole(config, engine))
    if whole is not None:
        LOGGER.info("model.path: every rank reads the whole base: %s", whole)

    def load() -> TrainableModel:
        probe = None
        if context.env.rank == 0:
            first = data.loader.first_position
            blocks = [data.loader.batch([position]) for position in range(first, first + PROBE_BLOCKS)]
            probe = [ProbeBlock(b.input_ids, b.labels, b.position_ids, b.cu_seqlens, b.max_seqlen) for b in blocks]
        model = load_model(
            config,
            device=context.device,
            vocabulary=start.vocabulary,
            probe=probe,
            base_sha256=start.base_sha256,
            by_slices=whole is None,
        )
        check_vocabulary(data.prepared, model.identity["vocab_size"])
        return model

    model: TrainableModel = on_every_rank("load model", load)
    if (experts := (model.adapter_config or {}).get("rank_pattern")) and context.env.rank == 0:
        names = ", ".join(f"{name}: rank {rank} for each" for name, rank in experts.items())
        LOGGER.info("adapter.experts: lora (%s)", names)
    if model.left_out and context.env.rank == 0:
        names = ", ".join(f"{name} ({size:,} parameters)" for name, size in model.left_out.items())
        LOGGER.warning("adapter.targets: all-linear does not reach %s: they stay frozen", names)
    if config.adapter.init == "pissa":
        model.identity[PISSA] = init_pissa(model.module, context.claim)
    return model


def open_run(context: RunContext, data: TrainingData, model: TrainableModel) -> Run:
    """The engine around the model, and what identifies, saves and records the run. Collective."""
    config = context.config
    groups = param_groups(
        model.trainable,
        config.optim,
        config.adapter.kind == "lora",
        config.embeddings.freeze_rest_steps,
        config.adapter.lora_plus_ratio,
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.trainable.items()}  # the engine may shard them
    dtype = config.model.compute_dtype
    specs = [TensorSpec(name, shapes[name], dtype, group.name) for group in groups for name in group.names]
    engine = build_engine(model.module, model.trainable, groups, model.layers, config, context.device, model.unread)
    identity = Identity(
        base=model.identity,
        data={
            "identity": data.prepared.identity,
            "seq_len": config.data.seq_len,
            "seed": config.seed,
            "stores": [str(source.store.folder.resolve()) for source in data.prepared.all_sources],
            "tokens": {source.name: source.store.num_tokens for source in data.prepared.all_sources},
        },
        recipe=config.model_dump(mode="json"),
        engine=engine.kind,
    )
    schedule = {"num_steps": context.shape.num_steps, **config.schedule.model_dump(mode="json")}
    stream = Stream(engine, data.loader, context.shape, context.env)
    metrics = MetricsFile(context.claim, 60 * config.checkpoint.retry_minutes)
    checkpoints = RunCheckpoints(
        claim=context.claim,
        specs=specs,
        identity=identity,
        adapter=config.adapter.kind == "lora",
        sidecars=_sidecars(context, data, model),
        aliases=model.aliases,
        buffers=model.buffers,
        keep=config.checkpoint.keep,
        landmark_step=last_step_before_decay(config, context.shape.num_steps),
        best_step=partial(recorded_best, context.folder, config.evaluate),
        fault=context.fault,
    )
    saver = Saver(context, engine, stream, schedule, metrics, checkpoints)
    host = host_group(context.device, collective_seconds(config.health.hang))
    clock = stragglers = None
    if config.health.straggler is not None and context.env.world_size > 1:
        clock = ComputeClock(timed_modules(model.layers, engine.kind, config.engine.context_parallel), context.device)
        stragglers = StragglerWatch(config.health.straggler, clock, context.observers.on_message)
    return Run(
        context=context,
        data=data,
        model=model,
        groups=groups,
        specs=specs,
        engine=engine,
        stream=stream,
        division=Division(data.loader, context.shape, layer_windows(config)),
        schedule=schedule,
        identity=identity,
        metrics=metrics,
        saver=saver,
        host_group=host,
        efficiency=open_efficiency(context, with_vocabulary_size(config, data.prepared.vocab_size), engine),
        profile=Profile(context),
        clock=clock,
        stragglers=stragglers,
    )


def _sidecars(context: RunContext, data: TrainingData, model: TrainableModel) -> list[Callable[[Path], object]]:
    """What makes a checkpoint folder usable elsewhere: the model's or adapter's config, the tokenizer."""
    sidecars: list[Callable[[Path], object]] = [model.write_config, data.tokenizer.save_pretrained]
    if context.config.adapter.init == "pissa":
        sidecars.append(partial(copy_initial, context.folder))
    return sidecars


def _adapter_files(prior: ContinueFromConfig | None) -> list[Path]:
    """The files of a prior adapter that a start may read; the optimizer's only if it is taken over."""
    if prior is None:
        return []
    kept = [path for path in Path(prior.path).glob("*") if path.suffix in (".safetensors", ".json", ".pt")]
    return sorted(path for path in kept if prior.optimizer or not path.name.startswith("optimizer"))


def _check_prior_adapter(context: RunContext, hashes: Mapping[str, str]) -> None:
    """Refuse a prior adapter without loading a weight: one that cannot be used, or another one than the run began with.

    Raises:
        ConfigError: both.
    """
    prior = context.config.adapter.continue_from
    if prior is None:
        return
    if prior.mode != "train":
        open_prior_adapter(Path(prior.path))
    here, began = hashes.get(ADAPTER_WEIGHTS), read_object(context.folder / CONTINUED).get("sha256")
    if here is not None and began not in (None, here) and published(context.folder):
        raise ConfigError(
            f"adapter.continue_from: {prior.path} has sha256 {here[:12]}, the run began with {str(began)[:12]}",
            remedy="give this run another name, or the path of the adapter that it began with",
        )


def _prepare(context: RunContext) -> list[str]:
    """Rank 0, and the first rank of every host with a cache of its own, prepare the corpus, for hours if need be.

    Meanwhile all ranks meet every second and notice a stop. The folders of the stores that this rank sees.
    """
    failed: list[BaseException] = []
    folders: list[str] = []

    def work() -> None:
        try:
            prepared = prepare(context.config, ProgressLine(LOGGER.info, LOG_SECONDS))
            folders.extend(str(source.store.folder) for source in prepared.all_sources)
        except BaseException as error:  # handed to all ranks below
            failed.append(error)

    context.watchdog.tick("preparing", 0)
    worker = threading.Thread(target=work, name="prepare", daemon=True)
    preparer = _preparer(context)
    prepares = context.env.rank in (0, preparer)
    if prepares:
        worker.start()
    while True:
        if prepares:
            worker.join(PREPARE_SECONDS)
        at_work, stop = all_reduce_ints([int(worker.is_alive()), int(context.stop.requested is not None)])
        if not at_work:
            context.watchdog.tick("starting", 0)
            agree(failed[0] if failed else None, "prepare data")
            return gather_json(folders)[preparer]
        if stop:
            raise Stopped("stopped while the data was prepared; finished sources are kept")


def _preparer(context: RunContext) -> int:
    """The rank that prepares what this rank reads: the first of those that see its cache folder. Collective."""
    env, cache_dir = context.env, context.config.data.cache_dir
    assert cache_dir is not None  # resolve_paths fills it in
    if env.world_size == 1:
        return env.rank
    first = first_that_sees(Path(cache_dir), MARK_SECONDS, marks=env.local_rank == 0)
    if first is None:  # nobody can write there: finished stores are opened
        return env.rank if env.local_rank == 0 else 0
    return first


def _check_stores(prepared: Prepared) -> None:
    """Compare every byte of tokens and plans with its hash, each read by one of the ranks that see the same files.

    Collective.

    Raises:
        DataError: a chunk differs.
    """
    hashed = [part for source in prepared.all_sources for part in (source.store, source.blocks) if part is not None]
    chunks = on_every_rank("token stores", lambda: [chunk for part in hashed for chunk in part.chunks()])
    ranks = ranks_that_see(on_every_rank("token stores", lambda: [part.place for part in hashed]))
    on_every_rank("token stores", lambda: check_chunks(chunks[ranks.index(rank()) :: len(ranks)]))


def _load_tokenizer(context: RunContext) -> Any:
    config = context.config
    tokenizer: Any = load_run_tokenizer(config)
    if config.task == "instruct":  # saved with the model, which answers only under the template it was taught
        tokenizer.chat_template = chat_template(tokenizer, config.data.chat_template)
    return tokenizer
