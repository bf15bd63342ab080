"""The loss over a handful of classes, where a vocabulary has thousands: the same kernel, most of its block empty."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import linear_cross_entropy, reference


@pytest.mark.parametrize("classes", [2, 3, 17])
def test_a_few_classes(classes):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 16, generator=generator), torch.randn(classes, 16, generator=generator)
    labels = torch.tensor([0, -100, 1, -100, -100, classes - 1, 0, 1, -100])
    results = []
    for loss, dtype in ((linear_cross_entropy, torch.float32), (reference.linear_cross_entropy, torch.float64)):
        given = [x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        scaled, loss_sum = loss(*given, labels, scale=0.25)
        scaled.backward()
        results.append([loss_sum.double(), *(x.grad.double() for x in given)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
