"""Layers, outputs and gradients for the tests of LoRA linears and MLPs, on a CPU and on a GPU."""

from __future__ import annotations

from dataclasses import replace

import torch
from bitsandbytes.functional import quantize_4bit
from dist_cpt_kernels import NestedScales, Nf4Scales, Projection, RowScales, quantize_rows

from tests.kernels.error_rule import assert_right

FIELDS = ("weight", "bias", "lora_A", "lora_B")


def random(seed, *shape, size=1.0, dtype=torch.float32):
    return (size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def projection_of(out, width, dtype, *, rank=8, bias=False, nf4=False, fp8=False, seed=0, **settings):
    """A layer with the magnitudes of a trained one: outputs near 1, a tenth of them from the adapter."""
    weight, scales = random(seed, out, width, size=width**-0.5, dtype=dtype), None
    if nf4:
        weight, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        nested = NestedScales(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
        scales = Nf4Scales(state.absmax, (out, width), nested)
    if fp8:
        weight, rows = quantize_rows(weight)
        scales = RowScales(rows, (out, width))
    return Projection(
        weight,
        random(seed + 1, out, dtype=dtype) if bias else None,
        random(seed + 2, rank, width, size=width**-0.5, dtype=dtype) if rank else None,
        random(seed + 3, out, rank, size=0.1, dtype=dtype) if rank else None,
        **{"scaling": 2.0, "scales": scales} | settings,
    )


def moved(projection, device):
    """The projection on `device`, for the tests on a GPU."""
    changed = {f: t.to(device) for f in FIELDS if (t := getattr(projection, f)) is not None}
    if isinstance(scales := projection.scales, RowScales):
        changed["scales"] = replace(scales, scales=scales.scales.to(device))
    elif scales is not None:
        nested = NestedScales(*(t.to(device) for t in scales.nested[:3]), scales.nested.block)
        changed["scales"] = replace(scales, absmax=scales.absmax.to(device), nested=nested)
    return replace(projection, **changed)


def cast(projection, dtype, trains):
    """(the projection in `dtype` with leaves, the leaves that train)."""
    changed = {}
    for field in FIELDS:
        tensor = getattr(projection, field)
        if tensor is not None and tensor.is_floating_point():
            changed[field] = tensor.detach().to(dtype, copy=True).requires_grad_(field in trains)
    return replace(projection, **changed), [tensor for tensor in changed.values() if tensor.requires_grad]


def run(op, x, projections, dtype=None, trains=("lora_A", "lora_B"), seed=5):
    """Outputs and the gradients of x and of all that trains, computed in `dtype`."""
    dtype = dtype or x.dtype
    x = x.detach().to(dtype).requires_grad_()
    pairs = [cast(projection, dtype, trains) for projection in projections]
    torch.manual_seed(seed)
    outs = op(x, *(projection for projection, _ in pairs))
    outs = outs if isinstance(outs, tuple) else (outs,)
    # rounded to bf16, so that all dtypes get the same
    grads = [random(9 + i, *out.shape, dtype=torch.bfloat16).to(out) for i, out in enumerate(outs)]
    gradients = torch.autograd.grad(outs, [x, *(leaf for _, leaves in pairs for leaf in leaves)], grads)
    return [*(out.detach() for out in outs), *gradients]


def assert_lora_right(op, plain, x, projections, **how):
    """The error rule for `op` beside its eager composition `plain`."""
    truth = run(plain, x, projections, torch.float64, **how)
    assert_right(run(op, x, projections, **how), run(plain, x, projections, **how), truth)
