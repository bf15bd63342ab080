"""The finished stores of a recipe, opened: what training and evaluation read, and the identity of the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dist_cpt.config.schema import DataConfig, RunConfig, SourceConfig, StageConfig
from dist_cpt.data.block_plan import BlockPlan, PlanKey, block_plan
from dist_cpt.data.encode import Encoder
from dist_cpt.data.hub import with_commits
from dist_cpt.data.mixture import UNLIMITED, Limit
from dist_cpt.data.quality import SourceQuality, examine, excluded_hash
from dist_cpt.data.store import TokenStore
from dist_cpt.data.store_plan import PlannedStore, StorePlan, plan_stores
from dist_cpt.data.streamed import StreamedSource, open_streamed
from dist_cpt.errors import DataError


@dataclass(frozen=True)
class PreparedSource:
    """One training source or held-out set with its finished store."""

    name: str
    weight: float
    role: str  # domain | replay | retention
    store: TokenStore
    stride: int | None = None  # tokens between the starts of two windows; None: best-fit packing
    overlap_trains: bool = True  # whether a token is a target in every window, or only in the first that has it
    blocks: BlockPlan | None = None  # None: packed in memory by who reads it
    limit: Limit = UNLIMITED
    quality: SourceQuality | None = None  # of a training source: what was found in it

    @property
    def excluded(self) -> np.ndarray | None:
        """The documents that get no block, int64 in ascending order; None: all do."""
        return None if self.quality is None or not len(self.quality.excluded) else self.quality.excluded


@dataclass(frozen=True)
class Prepared:
    """All stores of a recipe; `identity` changes when any token that is read, or the tokenizer, does."""

    sources: list[PreparedSource]
    validation: list[PreparedSource]
    tokenizer_hash: str
    vocab_size: int
    identity: str
    seq_len: int  # of the recipe, for the report
    stages: tuple[StageConfig, ...] = ()
    share_of: Literal["blocks", "tokens"] = "blocks"
    streamed: list[StreamedSource] = field(default_factory=list)  # in place of `sources`

    @property
    def all_sources(self) -> list[PreparedSource]:
        """Training sources, then held-out sets."""
        return [*self.sources, *self.validation]

    def shared_ngrams(self, held_out: str) -> dict[str, float]:
        """By training source: the fraction of a held-out set's n-grams (`overlap.NGRAM` tokens) that the source has;
        empty where it was not measured."""
        found = [(source.name, source.quality) for source in self.sources if source.quality is not None]
        return {name: quality.shared_ngrams[held_out] for name, quality in found if held_out in quality.shared_ngrams}


def open_prepared(config: RunConfig, folders: Sequence[str] | None = None) -> Prepared:
    """Open the stores that `prepare` made for this resolved recipe, in `folders` if this host has them.

    Raises:
        DataError: a store is missing, damaged, or made from other text or another tokenizer.
    """
    config = with_commits(config)
    return open_stores(plan_stores(config, folders), config)


def open_stores(plan: StorePlan, config: RunConfig, verify: bool = False) -> Prepared:
    """Open finished stores with their block plans, which are made where they are missing.

    Raises:
        DataError: as `open_prepared`.
    """
    data = config.data
    stride = (data.stride or data.seq_len) if data.packing == "windows" else None
    opened = []
    for planned in plan.stores:
        store = TokenStore.open(planned.folder)
        if (store.manifest.tokenizer_hash, store.manifest.vocab_size) != (plan.tokenizer_hash, plan.vocab_size):
            raise DataError(
                f"token store: {planned.folder} was made with another tokenizer",
                remedy="delete the store's folder and prepare again",
            )
        if planned.source.store is not None:
            _check_given_store(planned, store, plan.encoder, data.seq_len)
        weight, overlap_trains, limit = 1.0, False, UNLIMITED  # of a held-out set every token is evaluated once
        if (source := planned.source) and isinstance(source, SourceConfig):
            weight, overlap_trains = source.weight, data.overlap == "train"
            limit = Limit(source.max_tokens, source.max_epochs, source.on_exhausted)
        opened.append(PreparedSource(planned.name, weight, source.role, store, stride, overlap_trains, limit=limit))
    num_sources = len(opened) - len(data.validation)
    sources, validation = opened[:num_sources], opened[num_sources:]
    examined = _examine(sources, validation, config)
    sources = [replace(source, quality=quality) for source, quality in zip(sources, examined, strict=True)]
    sources, validation = ([_with_blocks(source, data, verify) for source in part] for part in (sources, validation))
    streamed = open_streamed(plan, config)
    return Prepared(
        sources,
        validation,
        plan.tokenizer_hash,
        plan.vocab_size,
        _identity(plan.tokenizer_hash, (sources, validation, streamed), data),
        data.seq_len,
        stages=data.stages,
        share_of=data.share_of,
        streamed=streamed,
    )


def of_earlier_recipe(prepared: Prepared, data: DataConfig) -> Prepared:
    """The data as a recipe had it to whose sources and held-out sets others were added, and whose weights differed."""
    weights = [source.weight for source in data.sources]
    sources = [replace(source, weight=weight) for source, weight in zip(prepared.sources, weights, strict=False)]
    streamed = [replace(source, weight=weight) for source, weight in zip(prepared.streamed, weights, strict=False)]
    validation = prepared.validation[: len(data.validation)]
    identity = _identity(prepared.tokenizer_hash, (sources, validation, streamed), data)
    earlier = replace(prepared, sources=sources, streamed=streamed, validation=validation)
    return replace(earlier, identity=identity, stages=data.stages)


def _identity(
    tokenizer_sha256: str,
    parts: tuple[Sequence[PreparedSource], Sequence[PreparedSource], Sequence[StreamedSource]],
    data: DataConfig,
) -> str:
    sources, validation, streamed = parts
    content: list[Any] = [tokenizer_sha256]
    content += [[[s.name, s.store.manifest.content_hash] for s in part] for part in (sources, validation)]
    if data.packing == "windows":  # which tokens a block has
        content.append(["windows", data.stride or data.seq_len, data.overlap])
    if (lists := excluded_hash([s.quality for s in sources if s.quality is not None])) is not None:
        content.append(["excluded", lists])
    if streamed:
        content.append(["streamed", [[s.name, s.identity] for s in streamed]])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _with_blocks(source: PreparedSource, data: DataConfig, verify: bool) -> PreparedSource:
    assert data.cache_dir is not None  # as _plan_store
    key = PlanKey(data.seq_len, source.stride, source.excluded)
    return replace(source, blocks=block_plan(source.store, key, Path(data.cache_dir), verify=verify))


def _examine(
    sources: Sequence[PreparedSource], validation: Sequence[PreparedSource], config: RunConfig
) -> list[SourceQuality]:
    """What the stores of the sources have twice, or of held-out sets.

    Raises:
        DataError: no document of a source is left.
    """
    held_out = {source.name: source.store for source in validation}
    examined = examine(config.data, [source.store for source in sources], held_out)
    for source, quality in zip(sources, examined, strict=True):
        if len(quality.excluded) == source.store.num_documents:
            raise DataError(
                f"source {source.name!r}: all {source.store.num_documents} documents are excluded "
                f"({len(quality.duplicates)} duplicates, {len(quality.overlapping)} with text of a held-out set)",
                remedy="leave the source out, or change data.deduplicate or data.decontaminate",
            )
    return examined


def _check_given_store(planned: PlannedStore, store: TokenStore, encoder: Encoder, seq_len: int) -> None:
    """Refuse a store, given in place of text, that this recipe would have made otherwise.

    Raises:
        DataError: its documents begin otherwise, or have other labels.
    """
    manifest, expected = store.manifest, encoder.describe(planned.source)
    problem = None
    if manifest.label_kind != encoder.label_kind:
        problem = f"its labels are {manifest.label_kind}, the task's {encoder.label_kind}"
    elif manifest.source.get("bos") != expected.get("bos"):
        problem = (
            f"its documents begin with token {manifest.source.get('bos')}, the recipe's with {expected.get('bos')}"
        )
    elif encoder.label_kind is not None and int(store.lengths.max()) > seq_len:
        problem = f"it has records of {int(store.lengths.max())} tokens, more than data.seq_len {seq_len}"
    if problem is not None:
        raise DataError(
            f"source {planned.name!r}: {planned.folder}: {problem}",
            remedy="give the text in path, or a store made for this recipe",
        )


def check_vocabulary(prepared: Prepared, model_vocab_size: int) -> None:
    """Refuse token ids without a row in the model's embedding.

    Raises:
        DataError: names the first such id, its document and its source.
    """
    if prepared.streamed and prepared.vocab_size > model_vocab_size:
        raise DataError(
            f"data.streaming: the tokenizer has {prepared.vocab_size} ids, the model {model_vocab_size} rows: text not "
            "yet read may have an id without a row",
            remedy="use the model's own tokenizer (data.tokenizer), or prepare the text",
        )
    for source in prepared.all_sources:
        first = source.store.find_token_at_least(model_vocab_size)
        if first is not None:
            document, token_id = first
            raise DataError(
                f"source {source.name!r}, document {document}: token id {token_id} is beyond the model's "
                f"vocabulary of {model_vocab_size}",
                remedy="use the model's own tokenizer (data.tokenizer)",
            )
