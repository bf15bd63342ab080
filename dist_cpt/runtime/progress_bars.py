"""The progress bars of the libraries that fetch and read weights: what they count is progress of this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from huggingface_hub.utils import tqdm

from dist_cpt.runtime.liveness import made_progress


class PieceBar(tqdm):  # type: ignore[type-arg]
    """A progress bar of huggingface_hub whose every item or update is a piece of work."""

    def update(self, n: float | None = 1) -> bool | None:
        made_progress()
        return super().update(n)

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            made_progress()
            yield item


@contextlib.contextmanager
def loading_counts() -> Iterator[None]:
    """Within it, each weight that transformers loads is a piece of work, and no bar is drawn: there is one per rank."""
    from transformers.utils.logging import set_tqdm_hook

    before = set_tqdm_hook(lambda _, args, options: PieceBar(*args, **(options | {"disable": True})))
    try:
        yield
    finally:
        set_tqdm_hook(before)
