"""Matrices whose rows e4m3 with a scale per row has trouble with."""

from __future__ import annotations

import torch

from tests.kernel_inputs.lora_linear import random


def adversarial(seed, rows, columns):
    """Random rows, and rows of zeros, with one element, with an outlier, and of very different sizes."""
    x = random(seed, rows, columns)
    x[0] = 0.0
    x[1] = 0.0
    x[1, 5] = -3.0
    x[2, 7] = 1e4
    x[3, 1:] *= 1e-4
    x[4] *= 1e-30
    x[5] *= 1e30
    x[6] *= torch.logspace(-8, 0, columns)
    return x
