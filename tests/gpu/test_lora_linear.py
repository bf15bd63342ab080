"""LoRA linears and the gated MLP on a GPU: right by the rule, less memory than eager, no host sync."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dist_cpt_kernels import dispatch, lora_linear, lora_mlp, reference

from tests.kernel_inputs import lora_linear as case

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def compiled():
    assert not dispatch.INTERPRETED, "run with TRITON_INTERPRET=0"


def _layers(*shapes, **settings):
    """As on the CPU, then moved."""
    made = [case.projection_of(*shape, seed=10 * i, **settings) for i, shape in enumerate(shapes)]
    return [case.moved(projection, "cuda") for projection in made]


def _x(dtype, *shape):
    return case.random(50, *shape, dtype=dtype).cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("nf4", [False, True])
def test_error_is_at_most_twice_that_of_the_eager_composition(monkeypatch, dtype, dropout, nf4):
    settings = {"dtype": dtype, "rank": 16, "dropout": dropout, "nf4": nf4}
    x = _x(dtype, 2, 507, 1024)
    heads = _layers((1024, 1024), (256, 1024), (256, 1024), bias=True, **settings)
    mlp = _layers((2816, 1024), (2816, 1024), (1024, 2816), **settings)
    # A GPU draws another mask for another dtype: fp64 gets that of `dtype`.
    monkeypatch.setattr(reference.F, "dropout", partial(_dropped_as, dtype))
    case.assert_lora_right(lora_linear, reference.lora_linear, x, heads)
    case.assert_lora_right(lora_mlp, reference.lora_mlp, x, mlp)


def _dropped_as(dtype, x, dropout, training):
    assert training
    if not dropout:
        return x
    dropped, mask = torch.native_dropout(x.to(dtype), dropout, True)
    return dropped if x.dtype == dtype else x * mask / (1.0 - dropout)


@pytest.mark.parametrize("trains", [("weight",), case.FIELDS])
def test_whatever_trains(trains):
    layers = _layers((507, 1024), (123, 1024), dtype=torch.bfloat16, bias=True)
    case.assert_lora_right(lora_linear, reference.lora_linear, _x(torch.bfloat16, 507, 1024), layers, trains=trains)


@pytest.mark.parametrize("nf4", [False, True])
def test_no_host_sync_and_less_memory_than_the_eager_composition(nf4):
    shapes = ((11264, 4096), (11264, 4096), (4096, 11264))
    layers = _layers(*shapes, dtype=torch.bfloat16, rank=64, nf4=nf4)
    x = _x(torch.bfloat16, 4096, 4096)
    peaks = []
    for op in (lora_mlp, reference.lora_mlp):
        step = partial(case.run, op, x, layers)
        step()  # compiles, and loads cuBLAS
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] < peaks[1]
    leaf, grad = x.clone().requires_grad_(), torch.ones_like(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        lora_mlp(leaf, *layers).backward(grad)
        lora_linear(leaf, *layers[:2])[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
