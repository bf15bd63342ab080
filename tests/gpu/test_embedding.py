"""The sorted embedding gradient on a GPU: right by the rule, the same bits twice, no host sync."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dist_cpt_kernels import dispatch, embedding_gradient, reference

from tests.kernel_inputs import embedding as case
from tests.kernels.error_rule import assert_right

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "vocab", "dim"), [(1, 1, 1), (8192, 1, 512), (8192, 500, 600), (8192, 128_256, 512)]
)
def test_gradient(num_tokens, vocab, dim, dtype, out):
    assert not dispatch.INTERPRETED, "run with TRITON_INTERPRET=0"
    grad, ids = case.inputs(num_tokens, vocab, dim, dtype, "cuda")
    table = torch.zeros(vocab, dim, dtype=out, device="cuda", requires_grad=True)
    (torchs,) = torch.autograd.grad(F.embedding(ids, table), table, grad.to(out))
    embedding_gradient(grad, ids, vocab, dtype=out)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = embedding_gradient(grad, ids, vocab, dtype=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_right([actual], [torchs], [reference.embedding_gradient(grad.double(), ids, vocab, dtype=torch.float64)])
    assert torch.equal(actual, embedding_gradient(grad, ids, vocab, dtype=out))
