"""Held-out loss at several scales of what a run trained, to choose the scale of a merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dist_cpt.export.checkpoint_model import find_base
from dist_cpt.export.held_out_loss import held_out_sets, recipe_of_run, with_loss
from dist_cpt.export.merge import Blend, averaged_model, untrained_model


def sweep(
    checkpoint: Path,
    scales: Sequence[float],
    *,
    base: str | None = None,
    layers: range | None = None,
    others: Sequence[Path] = (),
) -> Iterator[tuple[float, dict[str, float]]]:
    """(scale, {validation set: mean loss in nats per target token}) for W = base + scale x (trained - base), in fp32.

    The sets are those of the recipe in the checkpoint's run folder. `layers` and `others` as for `merge`.

    Raises:
        ConfigError: no recipe beside it, no validation set, a classifier, or a run from scratch.
        CheckpointError: another base than the run had.
        DataError: a validation set cannot be read.
    """
    sets = held_out_sets(recipe_of_run(checkpoint, "--sweep"))
    folder = find_base(checkpoint, base)
    model, _ = averaged_model([checkpoint, *others], folder)
    blend = Blend(model, untrained_model(checkpoint, folder, base), layers)
    module = with_loss(model)
    for scale in scales:
        blend.set(scale)
        yield scale, {name: result.loss for name, result in sets.losses(module).items()}
