"""The LoRA functions where an engine cuts their matrices over the ranks: gradients as on one process, eagerly.

The functions keep parameters from forward to backward. FSDP2 empties the storage of those in between and fills it
again, ZeRO-3 exchanges what lies behind them; both need them to be kept themselves, not a view or a copy.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from dist_cpt_kernels import Projection, lora_linear, lora_mlp, quantize_rows, reference
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.ranks import RankPool

HERE = "tests.distributed.test_lora_linear_ranks"
WIDTH, FFN, RANK = 24, 52, 3  # the rows of no matrix but A's divide evenly in all ways


class Adapted(nn.Module):
    """A frozen linear, of 16 bits or packed, and its adapter; its parents read the parameters."""

    def __init__(self, width: int, out: int, weights: str, trains: bool = False) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(out), requires_grad=trains)
        self.weight: Any = nn.Parameter(torch.randn(out, width) / width**0.5, requires_grad=trains)
        self.in_features, self.out_features = width, out
        if weights == "fp8":
            codes, self.row_scales = quantize_rows(self.weight.detach())
            self.weight = nn.Parameter(codes, requires_grad=False)
        if weights == "nf4":
            from bitsandbytes.functional import quantize_4bit

            how = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"}
            codes, self.quant_state = quantize_4bit(self.weight.detach().bfloat16(), **how)
            self.weight = nn.Parameter(codes, requires_grad=False)
        self.A = nn.Parameter(torch.randn(RANK, width) / width**0.5)
        self.B = nn.Parameter(torch.randn(out, RANK) / RANK**0.5)

    def projection(self) -> Projection:
        from dist_cpt.adapters.quantize import kernel_scales

        scales = kernel_scales(self)
        return Projection(self.weight, self.bias, self.A, self.B, 2.0, scales=scales)


class Block(nn.Module):
    def __init__(self, weights: str) -> None:
        super().__init__()
        self.q, self.k, self.v = (Adapted(WIDTH, out, weights) for out in (WIDTH, WIDTH, WIDTH))
        self.gate, self.up = (Adapted(WIDTH, FFN, weights, trains=weights == "plain") for _ in range(2))
        self.down = Adapted(FFN, WIDTH, weights)
        self.ops: Any = (lora_linear, lora_mlp)
        self.holds = True
        self.gathered: list[tuple[Any, StorageWeakRef]] = []  # of each parameter that the forward pass read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear, mlp = self.ops
        storages = [parameter.untyped_storage() for parameter in self.parameters()]
        assert min(storage.size() for storage in storages) > 0
        self.gathered = [(storage if self.holds else None, StorageWeakRef(storage)) for storage in storages]
        q, k, v = linear(x, *(layer.projection() for layer in (self.q, self.k, self.v)))
        x = x + q * torch.sigmoid(k) + v
        return x + mlp(x, *(layer.projection() for layer in (self.gate, self.up, self.down)))


def _model(weights: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, WIDTH), Block(weights), Block(weights))


def _inputs() -> torch.Tensor:
    return torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1))


def _loss(model: Any, x: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(model(x), torch.ones(()).expand(*x.shape[:-1], WIDTH))


def _assert_equal(found: dict[str, torch.Tensor], weights: str) -> None:
    """Against the mean over the ranks of the eager composition, in one process."""
    model = _model(weights)
    for block in list(model)[1:]:
        block.ops = (reference.lora_linear, reference.lora_mlp)
    torch.stack([_loss(model, x) for x in _inputs()]).mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad is not None
        assert float(grad.abs().max()) > 0.0, name
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=name)


def fsdp2_case(weights: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _model(weights)
    blocks: list[Any] = list(model)[1:]
    mesh = init_device_mesh("cpu", (2,))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    loss = _loss(model, _inputs()[dist.get_rank()])
    assert all(storage.size() == 0 for block in blocks for storage, _ in block.gathered)
    loss.backward()
    grads: dict[str, Any] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    _assert_equal({name: grad.full_tensor() for name, grad in grads.items()}, weights)


def zero3_case(weights: str) -> None:
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    import deepspeed
    from deepspeed.utils import safe_get_full_grad, set_z3_leaf_modules

    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = _model(weights)
    blocks: list[Any] = list(model)[1:]
    set_z3_leaf_modules(model, [Block])
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**31,
        # no parameter is so small that it stays whole
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10_000},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained), config=settings)
    for block in blocks:
        block.holds = False
    loss = _loss(engine, _inputs()[dist.get_rank()])
    assert all(p.numel() == 0 for block in blocks for p in block.parameters())
    assert all(weak.expired() for block in blocks for _, weak in block.gathered), "the function keeps a gathered tensor"
    engine.backward(loss)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: safe_get_full_grad(p) for name, p in named.items()}
    engine.destroy()
    _assert_equal(found, weights)


@pytest.mark.parametrize("weights", ["plain", "nf4", "fp8"])
@pytest.mark.parametrize("case", ["fsdp2", "zero3"])
def test_gradients_are_those_of_one_process(pool: RankPool, case: str, weights: str) -> None:
    pool.run(f"{HERE}:{case}_case", weights=weights)
