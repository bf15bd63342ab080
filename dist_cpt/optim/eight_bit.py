"""A moment of AdamW in 8 bit between two steps: codes into bitsandbytes' dynamic maps, one scale per block.

The map of exp_avg is signed, that of exp_avg_sq is not. bitsandbytes' signed map ends at -0.993 and +1; here its
lowest entry is -1, so that a block keeps its largest element whatever its sign, and quantising what was dequantised
gives the same codes and scales. Codes are looked up in plain torch: bitsandbytes' own CPU routine misses the
nearest entry for about one value in 10,000, which would make a resume inexact.
Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861).
"""

from __future__ import annotations

import functools

import torch

from dist_cpt.errors import MissingExtraError

BLOCK = 256  # elements that share a scale
# A block below it is kept as zeros: its smaller elements would be subnormal and not come back as they went in. AdamW
# adds eps, 1e-8 or so, to the root of exp_avg_sq, so nothing this small has an effect.
SMALLEST_SCALE = 2.0**-100


class EightBit:
    """A flat fp32 vector of zeros at first; uint8 codes and an fp32 scale per BLOCK elements on its device."""

    def __init__(self, num_elements: int, *, signed: bool, device: torch.device) -> None:
        self._signed = signed
        self._map, self._borders = (part.to(device) for part in dynamic_map(signed))
        zero = int(torch.searchsorted(self._map, torch.zeros((), device=device)))
        self.codes = torch.full((num_elements,), zero, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(-(-num_elements // BLOCK), device=device)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """fp32 [stop - start]; `start` is a multiple of BLOCK."""
        codes = self.codes[start:stop]
        return self._map[codes.int()].mul_(self._spread(self._scales_of(start, codes.numel()), codes.numel()))

    def write(self, values: torch.Tensor, start: int = 0) -> None:
        """Replace the elements from `start`, a multiple of BLOCK, by fp32 `values` that fill whole blocks or end it."""
        number = values.numel()
        scales = self._scales_of(start, number)
        full = number // BLOCK * BLOCK
        magnitude = values.abs()
        scales[: full // BLOCK] = magnitude[:full].view(-1, BLOCK).amax(1)
        if full < number:
            scales[full // BLOCK] = magnitude[full:].amax()
        scales[scales < SMALLEST_SCALE] = 0.0
        spread = self._spread(scales, number)
        normal = torch.where(spread > 0, values / spread, torch.zeros((), device=values.device))
        self.codes[start : start + number] = torch.bucketize(normal, self._borders, out_int32=True).to(torch.uint8)

    def _scales_of(self, start: int, number: int) -> torch.Tensor:
        assert start % BLOCK == 0
        return self.scales[start // BLOCK : -(-(start + number) // BLOCK)]

    def _spread(self, scales: torch.Tensor, number: int) -> torch.Tensor:
        return scales.repeat_interleave(BLOCK)[:number]


@functools.cache
def dynamic_map(signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(256 sorted entries in [-1, 1] or [0, 1], the 255 borders between their codes), fp32 on the CPU.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.functional import create_dynamic_map
    except ImportError:
        raise MissingExtraError("optim.state: 8bit", "qlora") from None
    entries = create_dynamic_map(signed=signed).float()
    if signed:
        entries[0] = -1.0
    borders = (entries[1:] + entries[:-1]) / 2
    if not signed:
        # A positive exp_avg_sq never becomes 0: at the next small gradient exp_avg would be divided by almost nothing
        # and the element would move by hundreds of learning rates.
        borders[0] = 0.0
    return entries, borders


def half_step(signed: bool) -> float:
    """The largest error of one quantisation, relative to the largest magnitude of the block."""
    entries, _ = dynamic_map(signed)
    return float((entries[1:] - entries[:-1]).max()) / 2


def within_half_step(kind: str, restored: torch.Tensor, saved: torch.Tensor) -> bool:
    """Whether `restored` can be `saved` quantised once more in blocks with other borders; flat fp32 on the CPU."""
    # A block of any borders lies within BLOCK - 1 elements to either side of each of its own.
    reach = _largest_near(saved.abs(), BLOCK - 1)
    # The second rounding is that of the division and the product in fp32.
    allowed = reach * (half_step(kind == "exp_avg") + 2.0**-22) + SMALLEST_SCALE
    return bool(((restored - saved).abs() <= allowed).all())


def _largest_near(magnitudes: torch.Tensor, distance: int) -> torch.Tensor:
    """For each element of a flat tensor the largest within `distance` to either side; four times as fast as a pool.

    Source: van Herk 1992, Pattern Recognition Letters 13: every window is the end of one stretch and the start of the
    next, so running maxima within stretches, from both sides, are enough.
    """
    window, number = 2 * distance + 1, magnitudes.numel()
    behind = distance + -(number + 2 * distance) % window
    stretches = torch.nn.functional.pad(magnitudes, (distance, behind)).view(-1, window)
    from_left = stretches.cummax(1).values.view(-1)
    from_right = stretches.flip(1).cummax(1).values.flip(1).view(-1)
    return torch.maximum(from_right[:number], from_left[window - 1 : window - 1 + number])
