"""AdamW's moments in 8 bit between steps: codes of bitsandbytes' dynamic maps, one scale per block.

The map of exp_avg is signed, that of exp_avg_sq is not. bitsandbytes' signed map ranges from -0.993 to 1; here from -1,
so that a block keeps its largest element of either sign, and requantising dequantised values gives the same codes and
scales. Codes are looked up in plain torch: bitsandbytes' CPU routine misses the nearest entry for about one value in
10,000, so a resume would not be exact.
Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861).
"""

from __future__ import annotations

import functools

import torch
from dist_cpt_kernels import reference

from dist_cpt.errors import MissingExtraError

BLOCK = reference.QUANTISATION_BLOCK  # elements that share a scale
# AdamW adds eps, about 1e-8, to the root of exp_avg_sq, so blocks this small have no effect.
SMALLEST_SCALE = reference.SMALLEST_SCALE


class EightBit:
    """A flat fp32 vector, initially zero, as uint8 codes and an fp32 scale per BLOCK elements."""

    def __init__(self, num_elements: int, *, signed: bool, device: torch.device) -> None:
        self._signed = signed
        self._map, self._borders = (part.to(device) for part in dynamic_map(signed))
        zero = int(torch.searchsorted(self._map, torch.zeros((), device=device)))
        self.codes = torch.full((num_elements,), zero, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(-(-num_elements // BLOCK), device=device)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """fp32 [stop - start]; `start` is a multiple of BLOCK."""
        codes = self.codes[start:stop]
        return reference.dequantize_8bit(codes, self._scales_of(start, codes.numel()), self._map)

    def write(self, values: torch.Tensor, start: int = 0) -> None:
        """Replace the elements from `start`, a multiple of BLOCK, by fp32 `values`: whole blocks, or up to the end."""
        number = values.numel()
        codes, scales = self.codes[start : start + number], self._scales_of(start, number)
        reference.quantize_8bit_(values, codes, scales, self._borders)

    def _scales_of(self, start: int, number: int) -> torch.Tensor:
        assert start % BLOCK == 0
        return self.scales[start // BLOCK : -(-(start + number) // BLOCK)]


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
        # A positive exp_avg_sq never becomes 0: the next update would divide exp_avg by almost nothing and move the
        # element by hundreds of learning rates.
        borders[0] = 0.0
    return entries, borders


@functools.cache
def tables(device: torch.device) -> torch.Tensor:
    """fp32 [4, 256] on `device`: the entries of the signed and of the unsigned map, then the borders of each."""
    (signed, signed_borders), (unsigned, unsigned_borders) = dynamic_map(True), dynamic_map(False)
    end = torch.full((1,), torch.inf)
    rows = signed, unsigned, torch.cat([signed_borders, end]), torch.cat([unsigned_borders, end])
    return torch.stack(rows).to(device)


def half_step(signed: bool) -> float:
    """The largest error of one quantisation, relative to the largest magnitude of the block."""
    entries, _ = dynamic_map(signed)
    return float((entries[1:] - entries[:-1]).max()) / 2


def within_half_step(kind: str, restored: torch.Tensor, saved: torch.Tensor) -> bool:
    """Whether `restored` can be `saved` after one more quantisation with other blocks; flat fp32 on the CPU."""
    # Any block around an element extends at most BLOCK - 1 elements to either side.
    largest = _largest_near(saved.abs(), BLOCK - 1)
    # 2^-22: the rounding of the division and the product in fp32.
    allowed = largest * (half_step(kind == "exp_avg") + 2.0**-22) + SMALLEST_SCALE
    return bool(((restored - saved).abs() <= allowed).all())


def _largest_near(magnitudes: torch.Tensor, distance: int) -> torch.Tensor:
    """The sliding maximum of a flat tensor over `distance` elements to either side; 4 times as fast as max pooling.

    Source: van Herk 1992, Pattern Recognition Letters 13: a window is the end of one segment and the start of the next,
    so running maxima within segments from both sides suffice.
    """
    window, number = 2 * distance + 1, magnitudes.numel()
    behind = distance + -(number + 2 * distance) % window
    segments = torch.nn.functional.pad(magnitudes, (distance, behind)).view(-1, window)
    from_left = segments.cummax(1).values.view(-1)
    from_right = segments.flip(1).cummax(1).values.flip(1).view(-1)
    return torch.maximum(from_right[:number], from_left[window - 1 : window - 1 + number])
