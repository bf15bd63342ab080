"""What a resume may change: one table, read where recipes are compared and when docs/recipe.md is generated.

What is in no row may not change: it would be another run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Change = Literal["freely", "same content", "accepted", "branched"]


@dataclass(frozen=True)
class Changeable:
    """Keys that may change, with everything below them; `a[].b` is b of every item of a."""

    keys: tuple[str, ...]
    how: Change
    why: str


# fmt: off
RESUME_CHANGES = (
    Changeable(("name", "output_dir", "data.cache_dir"), "freely", "where the run and its token stores are"),
    Changeable(("engine", "batch.micro_batch", "model.kernels", "model.attention", "train.deterministic"), "freely",
               "where, and in which pieces and order the same step is computed; the number of ranks may change too"),
    Changeable(("checkpoint", "evaluate", "track", "health.hang", "health.straggler"), "freely",
               "when states are saved, and what is watched"),
    Changeable(("model.trust_remote_code", "model.allow_instruct", "accept_changes"), "freely", "permissions"),
    Changeable(("model.revision",), "freely", "a name of a commit; the sha256 of the base is compared"),
    Changeable(("data.sources[].path", "data.sources[].store", "data.sources[].revision",
                "data.validation[].path", "data.validation[].store", "data.validation[].revision"), "freely",
               "the text or its tokens; the sha256 of the tokens is compared"),
    Changeable(("model.path", "embeddings.new_tokens", "adapter.continue_from.path", "data.tokenizer",
                "data.chat_template"), "same content",
               "a place; what is there is compared by its sha256"),
    Changeable(("optim.lr", "optim.embedding_lr", "optim.head_lr", "optim.router_lr", "model.router_z_loss",
                "optim.weight_decay", "optim.embedding_weight_decay", "optim.betas", "optim.eps", "optim.max_grad_norm",
                "optim.max_skipped_steps", "schedule",
                "train.tokens", "train.epochs", "embeddings.freeze_rest_steps", "health.spike"), "accepted",
               "what is learned from here on; named by `--accept-changes KEY,...`"),
    Changeable(("adapter.dropout", "data.sources[].weight", "data.stages"), "branched",
               "what is learned from here on, beside the run that goes on as it was; `dist-cpt branch` sets it, and "
               "may add sources and held-out sets"),
)
# fmt: on


# Each host may have its own; what is there is compared by its content.
OF_A_HOST = (
    "data.cache_dir",
    *(f"data.{part}[].{key}" for part in ("sources", "validation") for key in ("path", "store")),
)


def differs_by_host(key: str) -> bool:
    """Whether ranks of one run may have different values of a dotted key."""
    return re.sub(r"\.\d+(?=\.|$)", "[]", key) in OF_A_HOST


def how_may_change(key: str) -> Change | None:
    """How a resume may change a dotted key such as `data.sources.0.path`; None: not at all."""
    plain = re.sub(r"\.\d+(?=\.|$)", "[]", key)
    for row in RESUME_CHANGES:
        if any(is_below(plain, name) for name in row.keys):
            return row.how
    return None


def is_below(key: str, section: str) -> bool:
    """Whether `key` is `section` or inside it."""
    return key == section or key.startswith((f"{section}.", f"{section}[]"))
