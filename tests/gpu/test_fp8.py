"""e4m3 on a GPU: the bits of the specification, and products within one rounding of it."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import dispatch, fp8_linear, quantize_rows, reference
from dist_cpt_kernels.fp8 import why_not
from dist_cpt_kernels.self_test import ALLOWED, self_test_fp8

from tests.kernel_inputs.fp8 import adversarial

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def e4m3():
    assert not dispatch.INTERPRETED, "run with TRITON_INTERPRET=0"
    if reason := why_not(torch.device("cuda")):
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [16, 4096, 14336])
def test_bits_are_those_of_the_specification(columns, dtype):
    x, factor = adversarial(0, 67, columns).to(dtype), adversarial(1, 8, columns)[7]
    for given in (None, factor):
        codes, scales = quantize_rows(x.cuda(), None if given is None else given.cuda())
        spec = reference.quantize_rows(x, given)
        assert torch.equal(codes.cpu(), spec.codes)
        assert torch.equal(scales.cpu(), spec.scales)


@pytest.mark.parametrize("tokens", [1, 67, 8192])
@pytest.mark.parametrize(("out", "width"), [(16, 16), (1024, 4096), (4096, 14336)])
def test_products_are_those_of_the_specification(tokens, out, width):
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight, grad = (
        torch.randn(shape, generator=generator, device="cuda").bfloat16()
        for shape in ((tokens, width), (out, width), (tokens, out))
    )
    stored, results = quantize_rows(weight), []
    for linear in (fp8_linear, reference.fp8_linear):
        leaf = x.detach().requires_grad_()
        y = linear(leaf, *stored)
        results.append((y.detach().double(), torch.autograd.grad(y, leaf, grad)[0].double()))
    for ours, spec in zip(*results, strict=True):
        assert float((ours - spec).norm() / spec.norm()) <= 2.0**-8


def test_the_self_check_passes():
    assert self_test_fp8(torch.device("cuda")) <= ALLOWED[torch.bfloat16]
