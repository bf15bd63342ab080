"""What a run asks of its sources: how many blocks `train.epochs` are, and whether limits end it early."""

from __future__ import annotations

from fractions import Fraction

from dist_cpt.data.prepared import Prepared
from dist_cpt.data.stream_loader import Loader
from dist_cpt.errors import DataError


def blocks_of_epochs(prepared: Prepared, loader: Loader, epochs: float) -> int:
    """The least number of blocks in which the sources of role domain, taken together, are read `epochs` times.

    Without such a source, all of them count.

    Raises:
        DataError: they are dropped, or in no stage any more, before that.
    """
    domain = [number for number, source in enumerate(prepared.sources) if source.role == "domain"]
    domain = domain or list(range(len(prepared.sources)))
    wanted = Fraction(repr(float(epochs))) * sum(loader.available[number] for number in domain)
    last = loader.mixture.segments[-1]
    read = int(last.counts[domain].sum())
    if read < wanted and not set(domain).intersection(last.sources):
        raise DataError(
            f"train.epochs: {epochs:g} is never reached: of {float(wanted):,.0f} blocks of the sources of role domain "
            f"the mixture has {read:,}",
            remedy="use fewer epochs, or a larger limit of these sources",
        )
    up_to = last.start + 1
    while loader.mixture.counts_before(up_to)[domain].sum() < wanted:
        up_to *= 2
    return loader.mixture.first_position(lambda counts: counts[domain].sum() >= wanted, up_to)


def require_enough(prepared: Prepared, loader: Loader, num_blocks: int) -> None:
    """Refuse a run of `num_blocks` for which a source with `on_exhausted: error`, or the whole mixture, is too short.

    Raises:
        DataError: names the source, and where it ends.
    """
    counts, run = loader.mixture.counts_before(num_blocks), f"{num_blocks * prepared.seq_len:,}"
    for number, (source, available) in enumerate(zip(prepared.sources, loader.available, strict=True)):
        limit = source.limit.num_blocks(available, prepared.seq_len)
        if source.limit.on_exhausted == "error" and limit is not None and counts[number] > limit:
            at = loader.mixture.first_position(lambda c, n=number, most=limit: c[n] > most, num_blocks) - 1
            raise DataError(
                f"source {source.name} is used up at token {at * prepared.seq_len:,} of {run}, after "
                f"{limit * prepared.seq_len:,} of its own ({limit / available:.4g} epochs)",
                remedy="lower the run's length or its weight, raise its limit, or set on_exhausted: drop or repeat",
            )
    if (end := loader.mixture.end) is not None and end < num_blocks:
        raise DataError(
            f"nothing is left to read at token {end * prepared.seq_len:,} of {run}: every source is used up, or the "
            "last stage is over",
            remedy="lower the run's length, raise a limit, or let a source repeat",
        )
