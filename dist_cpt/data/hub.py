"""Data sets of the Hugging Face hub, streamed: `path: hf://datasets/org/name` with `revision`, `subset` and `split`.

A revision is resolved to a commit once. The commit is kept beside the stores, so that the next start reads the same
text, and needs no network where its store is finished.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dist_cpt.config.schema import HUB_PREFIX, RunConfig, TextConfig
from dist_cpt.errors import DataError, StorageError, brief
from dist_cpt.run_folder.json_files import read_object, write_object

REVISIONS = "hub_revisions.json"  # path@revision -> commit
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubDataset:
    """One split of a data set at one commit."""

    path: str  # hf://datasets/org/name
    commit: str
    subset: str | None
    split: str | None  # None: the only one

    def __str__(self) -> str:
        return "/".join([f"{self.path}@{self.commit}", *filter(None, (self.subset, self.split))])

    @property
    def repository(self) -> str:
        """`org/name`."""
        return self.path.removeprefix(HUB_PREFIX)


def is_on_hub(source: TextConfig) -> bool:
    """Whether the text of `source` is a data set of the hub."""
    return source.path is not None and source.path.startswith(HUB_PREFIX)


def dataset_of(source: TextConfig) -> HubDataset:
    """What a source whose revision is a commit reads."""
    assert source.path is not None
    assert source.revision is not None
    return HubDataset(source.path, source.revision, source.subset, source.split)


def with_commits(config: RunConfig) -> RunConfig:
    """A resolved recipe with the commit of every hub data set as its revision; errors as `commits`."""
    return with_revisions(config, commits(config))


def with_revisions(config: RunConfig, revisions: Sequence[str | None]) -> RunConfig:
    """The recipe with these revisions of its sources and held-out sets, in their order."""
    given = iter(revisions)
    sources, validation = (
        tuple(text.model_copy(update={"revision": next(given)}) for text in part)
        for part in (config.data.sources, config.data.validation)
    )
    data = config.data.model_copy(update={"sources": sources, "validation": validation})
    return config.model_copy(update={"data": data})


def commits(config: RunConfig) -> list[str | None]:
    """The commit of each source and held-out set of a resolved recipe, null where it is not on the hub.

    A branch or tag that data.cache_dir has a commit of keeps that commit.

    Raises:
        DataError: no such data set or revision, or the hub does not answer.
    """
    assert config.data.cache_dir is not None
    path = Path(config.data.cache_dir) / REVISIONS
    known = read_object(path)
    found = dict(known)

    def commit(source: TextConfig) -> str | None:
        if not is_on_hub(source) or _COMMIT.fullmatch(source.revision or ""):
            return source.revision
        name = f"{source.path}@{source.revision or 'main'}"
        found[name] = found.get(name) or _commit(source)
        return found[name]

    resolved = [commit(text) for text in (*config.data.sources, *config.data.validation)]
    if found != known:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_object(path, found)
    return resolved


def _commit(source: TextConfig) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    assert source.path is not None
    place = f"{source.path} at revision {source.revision or 'main'}"
    try:
        commit = HfApi().dataset_info(source.path.removeprefix(HUB_PREFIX), revision=source.revision).sha
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise DataError(
            f"{place} is not on the hub, or not for this user: {brief(error)}",
            remedy="check the name, or log in with hf auth login",
        ) from error
    except Exception as error:
        if not is_network_error(error):
            raise
        raise DataError(
            f"{place}: the hub does not answer: {brief(error)}",
            remedy="run dist-cpt prepare where there is a network, with the same data.cache_dir, or set revision to a "
            "commit that is prepared there",
        ) from error
    assert commit is not None
    return commit


def is_network_error(error: Exception) -> bool:
    """Whether a library says that nothing, or nothing useful, has answered."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, ConnectionError | TimeoutError) or status == 429 or status >= 500:
        return True
    # Which of two HTTP libraries raises depends on the version of huggingface_hub.
    return type(error).__module__.startswith("httpx")


@lru_cache(maxsize=8)  # one question for all shards that a process reads
def open_stream(dataset: HubDataset) -> Any:
    """The data set as `datasets` streams it.

    Raises:
        DataError: no such subset or split, or several and none is named.
        StorageError: the hub does not answer.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        builder = datasets.load_dataset_builder(dataset.repository, dataset.subset, revision=dataset.commit)
        if builder.hash != dataset.commit:  # datasets falls back to what it downloaded before
            raise ConnectionError("only another commit of it is cached")
        splits: Any = builder.as_streaming_dataset()
    except Exception as error:
        if is_network_error(error):
            raise _no_answer(dataset, error) from error
        if not isinstance(error, OSError | ValueError | DatasetsError):
            raise
        raise DataError(
            f"{dataset} cannot be opened: {brief(error)}", remedy="check the source's path, revision and subset"
        ) from error
    split = dataset.split or (next(iter(splits)) if len(splits) == 1 else None)
    if split not in splits:
        listed = ", ".join(map(str, splits))
        raise DataError(f"{dataset}: split {split!r} is none of {listed}", remedy="set the source's split")
    stream = splits[split]
    return stream.decode(False) if stream.features else stream


def rows(dataset: HubDataset, stream: Any, shard: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of one of the `stream.num_shards` files of a data set, in order.

    Raises:
        StorageError: the hub does not answer any more.
        ValueError: the rest of the file cannot be read.
    """
    from datasets.exceptions import DatasetsError

    try:
        for number, row in enumerate(stream.shard(stream.num_shards, shard), start=1):
            yield f"{dataset}/{shard}:{number}", dict(row)
    except DatasetsError as error:  # rows that do not fit the columns of those before
        raise ValueError(brief(error)) from error
    except Exception as error:
        if is_network_error(error):
            raise _no_answer(dataset, error) from error
        raise


def _no_answer(dataset: HubDataset, error: Exception) -> StorageError:
    return StorageError(dataset, OSError(0, f"the hub does not answer: {brief(error)}"))
