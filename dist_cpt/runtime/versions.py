"""The versions of the packages that compute a run. Torch-free."""

from __future__ import annotations

import importlib.metadata
import platform
from functools import cache

_PACKAGES = ("dist-cpt", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "triton")


def package_versions() -> dict[str, str]:
    """Version by name, Python's included; `absent` for a package that is not installed."""
    return {"python": platform.python_version()} | {name: installed(name) or "absent" for name in _PACKAGES}


@cache  # a save asks, and reading the metadata of packages takes as long as saving a small adapter
def installed(package: str) -> str | None:
    """The version of a package when this process first asked for it; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
