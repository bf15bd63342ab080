"""A short continuation of held-out text by the trained model, for the report."""

from __future__ import annotations

from typing import Any

import torch

from dist_cpt.run_folder.json_files import read_object
from dist_cpt.run_folder.names import SAMPLE
from dist_cpt.runtime.collectives import broadcast_json, on_rank_zero
from dist_cpt.train.build import Run
from dist_cpt.train.progress import Progress

PROMPT_TOKENS = 24
NEW_TOKENS = 48
TEMPERATURE = 0.8
TOP_K = 40
INTERVALS = 5  # between samples in a run, at most


def write_sample(run: Run, progress: Progress) -> None:
    """Continue the first held-out text and add that to sample.json, if the last one is long ago. Collective.

    Every rank runs the forward passes.

    The model sees at most its training length, beyond which it may have no positions. Rank 0 draws each token from
    its TOP_K likeliest at TEMPERATURE, since greedy text of a small model only repeats itself.
    """
    config, tokenizer = run.context.config, run.data.tokenizer
    if not run.data.held_out or config.task == "classify":
        return
    kept: list[dict[str, Any]] = on_rank_zero("sample", lambda: _kept(run, progress.step))
    if kept and progress.step < run.context.shape.num_steps and not _is_due(run, kept[-1], progress.step):
        return
    prompt = min(PROMPT_TOKENS, config.data.seq_len // 2)
    ids = run.data.held_out[0].batch([0]).input_ids[0, :prompt].tolist()
    generator = torch.Generator().manual_seed(progress.step)
    for _ in range(NEW_TOKENS):
        logits = run.engine.logits(torch.tensor([ids[-config.data.seq_len :]], dtype=torch.int64))
        top = (logits[0].float().cpu() / TEMPERATURE).topk(min(TOP_K, logits.shape[-1]))
        token = top.indices[torch.multinomial(top.values.softmax(-1), 1, generator=generator)]
        ids.append(broadcast_json(int(token)))
        if ids[-1] == tokenizer.eos_token_id:
            break
    before, after = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:prompt], ids[prompt:]))
    sample = {"prompt": before, "text": after, "step": progress.step}
    on_rank_zero("sample", lambda: run.context.claim.write(SAMPLE, sample | {"samples": [*kept, sample]}))


def _kept(run: Run, step: int) -> list[dict[str, Any]]:
    """The samples of earlier steps; those of later ones were rewound."""
    samples = read_object(run.context.folder / SAMPLE).get("samples")
    listed = samples if isinstance(samples, list) else []
    return [one for one in listed if isinstance(one, dict) and one.get("step", step) < step]


def _is_due(run: Run, last: dict[str, Any], step: int) -> bool:
    return (step - last["step"]) * INTERVALS >= run.context.shape.num_steps
