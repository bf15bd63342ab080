"""Whether a base is read by slices or whole; torch-free, for the plan and for the run alike."""

from __future__ import annotations

from dist_cpt.config.schema import RunConfig

SLICED = ("fsdp-full", "fsdp-hybrid", "zero-3")


def why_whole(config: RunConfig, engine: str) -> str | None:
    """Why every rank reads the whole base before `engine` (as `Engine.kind`) shards it; None: it is read by slices."""
    prior = config.adapter.continue_from
    reasons = {
        f"{engine} keeps it whole": engine not in SLICED,
        "it is drawn from a seed": config.model.config is not None,
        "adapter.init: pissa decomposes it": config.adapter.init == "pissa",
        "adapter.dora needs the norms of its rows": config.adapter.dora,
        "the effect of the prior adapter is measured on it": prior is not None and prior.mode != "train",
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
