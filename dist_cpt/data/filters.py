"""A function of the user's that decides which records become documents: `filter: package.module:function`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from dist_cpt.data.store import sha256_of
from dist_cpt.errors import ConfigError, DataError

Filter = Callable[[dict[str, Any]], Any]  # a bool, which `keeps` checks


@cache
def load_filter(name: str) -> Filter:
    """The function `package.module:function`, imported from where Python finds it.

    Raises:
        ConfigError: there is no such module or function, or importing it fails.
    """
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # the module's own code runs
        raise ConfigError(
            f"filter: cannot import {name}: {type(error).__name__}: {' '.join(str(error).split())}",
            remedy="install its package, or name its folder in PYTHONPATH",
        ) from error
    if not callable(found):
        raise ConfigError(f"filter: {name} is a {type(found).__name__}, not a function", remedy="name a function")
    return found


def describe_filter(name: str) -> dict[str, Any]:
    """JSON-able: the function's name and the sha256 of the file that defines it, null where there is none.

    Raises:
        ConfigError: as `load_filter`.
    """
    try:
        path = Path(inspect.getsourcefile(load_filter(name)) or "")
        return {"filter": name, "filter_sha256": sha256_of(path, 0, path.stat().st_size)}
    except (TypeError, OSError):  # built in, or without a file
        return {"filter": name, "filter_sha256": None}


def keeps(name: str, record: dict[str, Any], where: str) -> bool:
    """Whether the function keeps a record.

    Raises:
        DataError: it raises, or returns anything but a bool: a forgotten return would leave out everything.
    """
    try:
        kept = load_filter(name)(record)
    except ConfigError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise DataError(
            f"{where}: filter {name} raises {type(error).__name__}: {text}",
            remedy="make it return True or False for every record",
        ) from error
    if type(kept).__name__ not in ("bool", "bool_"):  # numpy's too
        raise DataError(
            f"{where}: filter {name} returns {type(kept).__name__}, not bool",
            remedy="make it return True or False for every record",
        )
    return bool(kept)
