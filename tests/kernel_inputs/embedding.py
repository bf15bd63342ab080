"""Inputs for the tests of the embedding gradient, in the interpreter and on a GPU."""

from __future__ import annotations

import torch


def inputs(num_tokens, vocab, dim, dtype=torch.float32, device="cpu"):
    """(gradient of the gathered rows, ids)."""
    generator = torch.Generator().manual_seed(num_tokens + vocab)
    ids = torch.randint(0, vocab, (num_tokens,), generator=generator)
    return torch.randn(num_tokens, dim, generator=generator).to(device, dtype), ids.to(device)
