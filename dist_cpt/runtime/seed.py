"""Random numbers as a function of integers, so that no generator state has to be saved."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def first_draws(seed: int, step: int, rank: int) -> list[int]:
    """[derived seed, first draw of torch, numpy and Python] of a step; the generators keep their state."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        derived = seed_step(seed, step, rank)
        draws = [derived, int(torch.randint(2**62, ())), int(np.random.randint(2**31)), random.getrandbits(62)]
    np.random.set_state(numpy_state)
    random.setstate(python_state)
    return draws


def seed_step(seed: int, step: int, rank: int) -> int:
    """Seed torch (CPU and CUDA), numpy and Python for one step of one rank; returns the derived 64-bit seed.

    Different (seed, step, rank) give independent streams, the same triple the same stream.
    """
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    derived = int.from_bytes(digest, "little")
    torch.manual_seed(derived)  # seeds every CUDA device too
    np.random.seed(derived % 2**32)
    random.seed(derived)
    return derived
