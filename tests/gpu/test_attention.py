"""Each way of attention against the dense mask, on a GPU, in bf16: outputs and gradients of packed documents."""

from __future__ import annotations

import pytest
import torch

from dist_cpt.model.attention import Packing, _ways, choose, packed_attention, packing_arguments

pytestmark = pytest.mark.gpu
SIZES = (700, 1, 323, 1024)  # two blocks of 1024
LENGTH = 1024


def _run(choice: str, window: int | None, softcap: float | None, dtype: torch.dtype, heads: int, width: int):
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(2, heads, LENGTH, width, device="cuda", generator=generator).to(dtype).requires_grad_()
    key, value = (
        torch.randn(2, heads // 4, LENGTH, width, device="cuda", generator=generator).to(dtype).requires_grad_()
        for _ in range(2)
    )
    positions = torch.cat([torch.arange(size) for size in SIZES]).view(2, LENGTH).cuda()
    borders = torch.tensor([0, *SIZES]).cumsum(0).to("cuda", torch.int32)
    packing: Packing = packing_arguments(choice, positions, borders, max(SIZES))["packing"]
    out, _ = packed_attention(
        torch.nn.Identity(), query, key, value, None, packing=packing, sliding_window=window, softcap=softcap
    )
    weights = torch.randn(out.shape, device="cuda", generator=generator).to(dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), (query, key, value))]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 100, 5000])
@pytest.mark.parametrize("choice", ["varlen", "flex", "documents", "mask"])
def test_against_fp32(choice, window, softcap):
    if choice == "varlen" and softcap is not None:
        assert choose(torch.device("cuda"), _Capped()) != "varlen"
        return
    assert _ways(torch.device("cuda"), None, torch.bfloat16)[choice] is None
    truth = _run("mask", window, softcap, torch.float32, 8, 128)
    eager = _run("mask", window, softcap, torch.bfloat16, 8, 128)
    for found, same_dtype, true in zip(
        _run(choice, window, softcap, torch.bfloat16, 8, 128), eager, truth, strict=True
    ):
        error = torch.linalg.vector_norm(found.float() - true)
        assert error <= 2 * torch.linalg.vector_norm(same_dtype.float() - true)


class _Capped:
    attn_logit_softcapping = 50.0
    head_dim = 128
