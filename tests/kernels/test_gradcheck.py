"""Every gradient against finite differences: of the reference in fp64, and of the kernel in fp32."""

from __future__ import annotations

import pytest
import torch
from dist_cpt_kernels import (
    add_rms_norm,
    dispatch,
    embedding,
    gated,
    linear_cross_entropy,
    rms_norm,
    rope,
    rope_tables,
)

LABELS = torch.tensor([2, -100, 4, 0])
TERMS = {"scale": 0.7, "softcap": 3.0}
IDS = torch.tensor([[3, 0], [3, 2]])


def _rope(q, k):
    cos, sin = (table.to(torch.promote_types(q.dtype, torch.float32)) for table in rope_tables(torch.ones(2) / 3, 9))
    return rope(q, k, cos, sin, torch.tensor([[7, 0, 1]]))


# name -> (op, the shapes of its inputs)
OPS = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-2), [(3, 5), (5,)]),
    "rms_norm_gemma": (lambda x, w: rms_norm(x, w, 1e-2, casting="gemma"), [(3, 5), (5,)]),
    "add_rms_norm": (lambda x, r, w: add_rms_norm(x, r, w, 1e-2), [(3, 5), (3, 5), (5,)]),
    "rope": (_rope, [(1, 3, 2, 6), (1, 3, 1, 6)]),
    "gated_silu": (lambda gate, up: gated(gate, up, "silu"), [(2, 5), (2, 5)]),
    "gated_gelu_tanh": (lambda gate, up: gated(gate, up, "gelu_tanh"), [(2, 5), (2, 5)]),
    "gated_gelu_exact": (lambda gate, up: gated(gate, up, "gelu_exact"), [(2, 5), (2, 5)]),
    "linear_cross_entropy": (
        lambda h, w: linear_cross_entropy(h, w, LABELS, chunk_tokens=3, **TERMS)[0],
        [(4, 3), (7, 3)],
    ),
    "embedding": (lambda weight: embedding(IDS, weight), [(5, 3)]),
}


def _inputs(shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("name", OPS)
def test_gradient_in_fp64(name, monkeypatch):
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", False)
    op, shapes = OPS[name]
    torch.autograd.gradcheck(op, _inputs(shapes))


@pytest.mark.matrix
@pytest.mark.parametrize("name", OPS)
def test_gradient_of_the_kernel(name):
    """A step of 0.01 leaves fp32 five digits of a difference, and an error of its square."""
    op, shapes = OPS[name]

    def in_fp32(*inputs):
        outs = op(*(tensor.float() for tensor in inputs))
        return outs.double() if isinstance(outs, torch.Tensor) else tuple(out.double() for out in outs)

    torch.autograd.gradcheck(in_fp32, _inputs(shapes), eps=1e-2, atol=1e-3, rtol=1e-3)
