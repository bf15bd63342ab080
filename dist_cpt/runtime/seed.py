"""What makes a run repeat: random numbers as a function of integers, and operations without a random order of sums."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from dist_cpt.errors import ConfigError


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


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within it torch uses the deterministic form of every operation, if `wanted`. The package's kernels have no other.

    Raises:
        ConfigError: an operation has no such form; names it.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first product on a GPU
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # a pass over each new tensor, only for debugging
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise ConfigError(
            f"train.deterministic: {str(error).split('. ')[0]}", remedy="use another implementation, or set it to false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
