"""Whether the local places that a recipe names are there, so that a mistyped path ends a start in its first second."""

from __future__ import annotations

import glob
from pathlib import Path

from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError, DataError
from dist_cpt.storage import is_there


def require_places(config: RunConfig) -> None:
    """Refuse a resolved recipe with a local path where nothing is; names of the hub, and patterns, are left to a start.

    Raises:
        ConfigError: the model, a tokenizer or an adapter.
        DataError: a source or a held-out set, unless there are prepared stores, which may replace its text.
        StorageError: the file system does not answer.
    """
    prior = config.adapter.continue_from
    folders = {
        "model.path": config.model.path,
        "data.tokenizer": config.data.tokenizer,
        "embeddings.new_tokens": config.embeddings.new_tokens,
        "adapter.continue_from": prior and prior.path,
        "evaluate.tasks.path": config.evaluate.tasks and config.evaluate.tasks.path,
    }
    for key, path in folders.items():
        if path is not None and path.startswith("/") and not is_there(Path(path)):
            raise ConfigError(f"{key}: folder not found: {path}", remedy="check the path in the recipe")
    has_stores = config.data.cache_dir is not None and is_there(Path(config.data.cache_dir))
    for source in (*config.data.sources, *config.data.validation):
        path = source.store or (None if has_stores else source.path)
        if path is not None and path.startswith("/") and not glob.has_magic(path) and not is_there(Path(path)):
            raise DataError(f"source {source.name!r}: {path} does not exist", remedy="check the path in the recipe")
