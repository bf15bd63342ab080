"""What a user should know about the data before step 0; none of it stops a run."""

from __future__ import annotations

import numpy as np

from dist_cpt.data.prepared import Prepared
from dist_cpt.data.stream_loader import Loader

MAX_EPOCHS = 4  # Muennighoff et al. 2023, arXiv:2305.16264: up to here repeated text is about as good as new text


def concerns(prepared: Prepared, loader: Loader, num_blocks: int) -> list[str]:
    """One line each, for a run of `num_blocks`: sources read more than `MAX_EPOCHS` times, more tokens than the
    sources have, a source of one block, duplicates, text of held-out sets, and held-out sets whose documents are those
    of a source."""
    lines = [
        f"source {name} is read {epochs:.1f} times; beyond {MAX_EPOCHS} it adds little: lower train.tokens or weight"
        for name, epochs in loader.epochs(num_blocks).items()
        if epochs > MAX_EPOCHS
    ]
    asked, available = num_blocks * prepared.seq_len, sum(loader.available) * prepared.seq_len
    if loader.available and asked > available:
        lines.append(f"the run takes {asked:,} tokens, its sources have {available:,}: text is read more than once")
    lines += [
        f"source {source.name} is one block of {tokens:,} tokens: each of its steps reads the same text"
        for source, (blocks, tokens) in zip(prepared.sources, loader.sizes, strict=True)
        if blocks == 1
    ]
    lines += _findings(prepared)
    trained = {source.store.manifest.content_hash: source.name for source in prepared.sources}
    return lines + [
        f"held-out set {held_out.name} has the documents of source {source}: its loss says nothing about new text"
        for held_out in prepared.validation
        if (source := trained.get(held_out.store.manifest.content_hash)) is not None
    ]


def _findings(prepared: Prepared) -> list[str]:
    """One line for each source that has duplicates to leave out, or text of a held-out set."""
    lines = []
    for source in prepared.sources:
        quality = source.quality
        if quality is None or not (len(quality.duplicates) or len(quality.overlapping)):
            continue
        shared = [f"{share:.2%} of {name}" for name, share in quality.shared_ngrams.items() if share]
        found = [f"{len(quality.duplicates):,} of {source.store.num_documents:,} documents are duplicates"]
        found += [f"{len(quality.overlapping):,} have text of a held-out set ({', '.join(shared)})"]
        found += [f"{len(quality.excluded):,} are left out"]
        kept = len(np.setdiff1d(quality.overlapping, quality.excluded))
        remedy = f"; {kept:,} with held-out text train: see data.decontaminate" if kept else ""
        lines.append(f"source {source.name}: {', '.join(found)}{remedy}")
    return lines
