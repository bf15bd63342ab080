"""The order of blocks in an epoch: a keyed permutation, computed and never stored.

A balanced Feistel network permutes [0, 4^k) for any round function; repeating it until the value is below n (cycle
walking) restricts it to [0, n).
Source: Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains.
"""

from __future__ import annotations

import hashlib

import numpy as np

_NUM_ROUNDS = 6


class FeistelOrder:
    """A permutation of [0, num_blocks) keyed by (seed, source, epoch); O(1) memory, O(1) seek."""

    def __init__(self, num_blocks: int, seed: int, source: str = "", epoch: int = 0) -> None:
        if num_blocks < 1:
            raise ValueError(f"an order needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        half_bits = max(1, ((num_blocks - 1).bit_length() + 1) // 2)
        self._shift = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        key = f"{seed}\x00{source}\x00{epoch}".encode()
        digests = [hashlib.sha256(key + bytes([r])).digest() for r in range(_NUM_ROUNDS)]
        self._keys = [np.uint64(int.from_bytes(d[:8], "little")) for d in digests]

    def __call__(self, position: np.ndarray | int) -> np.ndarray:
        """Blocks, int64, of the shape of `position`.

        Raises:
            IndexError: a position outside of [0, num_blocks).
        """
        positions = np.asarray(position, dtype=np.int64)
        if positions.size and not (positions.min() >= 0 and positions.max() < self.num_blocks):
            raise IndexError(f"positions must be in [0, {self.num_blocks})")
        values = self._permute(positions.reshape(-1).astype(np.uint64))
        # The domain is at most 4 num_blocks, so a walk takes at most four steps on average.
        while (outside := np.flatnonzero(values >= self.num_blocks)).size:
            values[outside] = self._permute(values[outside])
        return values.astype(np.int64).reshape(positions.shape)

    def _permute(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._shift, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right, key) & self._mask)
        return (left << self._shift) | right


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 64-bit hash of (value, key); uint64 arrays wrap around on every platform.

    Source: Steele et al. 2014, Fast Splittable Pseudorandom Number Generators (the SplitMix64 finaliser).
    """
    z = values + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
