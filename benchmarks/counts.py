"""What can be counted of a training step without a GPU: exact, the same at every run, and held by tests.

`optimizer_launches`: launches of one optimizer step on a GPU, from gradients to refreshed compute copies, under the
single engine with the LoRA matrices of LAYERS layers: the package's kernels are counted instead of run, and every other
ATen call that is no view and no allocation counts as one launch; `optimizer_launches_8bit` with moments in 8 bit.
`optimizer_calls_cpu`: such calls of the same step on a CPU.
`host_reads_per_step`: how often a step of a whole run makes the host wait for the device (`host_reads.py`), under the
single engine; `..._fsdp` and `..._zero` on two ranks, and `deepspeed_reads_per_step` what deepspeed adds to the latter.

Per token and layer of a Llama in the proportions of the 8B, fused, LoRA on all maps, bf16, as a layer more adds them:
`kept_bytes_by_policy`: on the device from forward to backward, for each engine.activation_checkpointing;
`recomputed_gemm_flops_by_policy`: of products in backward beyond those of `none`; `recomputed_attention_by_policy`:
forward passes of attention in backward. `lora_kb_per_token_layer`: what products with the adapters' matrices read and
write of tensors with a row per token, their own few columns aside, in KB at the 8B's widths.

    python benchmarks/counts.py --json [--engines single fsdp zero]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import host_reads  # beside this file

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported: interpreted kernels have no `run` to count
# Beside this file lies kernels.py: on the path it would be taken for Hugging Face's package of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

import dist_cpt_kernels  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from dist_cpt_kernels import dispatch  # noqa: E402
from torch import nn  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from dist_cpt.config.schema import RunConfig  # noqa: E402
from dist_cpt.data.batch import Batch  # noqa: E402
from dist_cpt.engines import host_copies  # noqa: E402
from dist_cpt.engines.activation_checkpoint import checkpoint_layers  # noqa: E402
from dist_cpt.engines.single import SingleEngine  # noqa: E402
from dist_cpt.model.architectures import Parts  # noqa: E402
from dist_cpt.model.fuse import fuse  # noqa: E402
from dist_cpt.model.load import load_model  # noqa: E402
from dist_cpt.optim.groups import param_groups  # noqa: E402
from dist_cpt.plan.recomputation import POLICIES, Policy  # noqa: E402

LAYERS = 32  # with seven linear maps each, a pair of LoRA matrices on every one
WIDTH, RANK = 64, 8
SCALE = 32  # of Llama-3.1-8B's widths, and its LoRA rank of 64
LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 4096 // SCALE,
    "intermediate_size": 14336 // SCALE,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
}
TOKENS, LORA_RANK = 48, 64 // SCALE
RANKS = {LORA_RANK, 2 * LORA_RANK, 3 * LORA_RANK}  # of adapters with one input
MATRICES = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2)}  # places of the two that are multiplied
ENGINES = {"single": ({"kind": "single"}, 1), "fsdp": ({"kind": "fsdp"}, 2), "zero": ({"kind": "zero"}, 2)}
# Views and allocations: no kernel runs for them.
FREE = {
    *(
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "detach",
        "alias",
        "as_strided",
        "_reshape_alias",
        "reshape",
    ),
    *("split", "split_with_sizes", "slice", "select", "narrow", "unbind", "unsqueeze", "squeeze", "expand"),
    *("empty", "empty_like", "empty_strided", "new_empty"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES), help="whose reads are counted")
    arguments = parser.parse_args()
    counts: dict[str, float] = {
        "optimizer_launches": optimizer_calls(on_a_gpu=True),
        "optimizer_launches_8bit": optimizer_calls(on_a_gpu=True, state="8bit"),
        "optimizer_calls_cpu": optimizer_calls(on_a_gpu=False),
    }
    counts |= layer_counts()
    for name in arguments.engines:
        reads = host_reads.count(*ENGINES[name])
        counts["host_reads_per_step" if name == "single" else f"host_reads_per_step_{name}"] = reads.pop("dist_cpt")
        counts |= {f"{owner}_reads_per_step": number for owner, number in reads.items()}
    print(json.dumps(counts) if arguments.json else "\n".join(f"{name}: {count}" for name, count in counts.items()))


def optimizer_calls(*, on_a_gpu: bool, state: str = "fp32") -> int:
    """Kernel launches, or ATen calls on the CPU, of one step of the single engine."""
    dispatch.interpret_cpu_tensors = on_a_gpu
    module, config = LoraMatrices(), recipe(state)
    trainable = {f"base_model.model.{name}": parameter for name, parameter in module.named_parameters()}
    groups = param_groups(trainable, config.optim, adapter=True)
    engine = SingleEngine(module, trainable, groups, config, torch.device("cpu"))
    rates = {group.name: group.peak_lr for group in groups}
    ids, borders = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    nothing = Batch(ids, ids, ids, borders, 1, 1, np.ones((1, 3), dtype=np.int64), (0,))
    calls = AtenCalls()
    with counted_kernels() as launches:
        for _ in range(2):  # tables that are made once are no part of a step
            engine.accumulate(nothing, 1, last=True)
            launches.clear()
            calls.counts.clear()
            with calls:
                engine.step(rates)
    return sum(launches.values()) + sum(calls.counts.values())


def layer_counts() -> dict[str, Any]:
    """What one layer more keeps, computes again and moves for its adapters, per token."""
    dispatch.interpret_cpu_tensors = True
    with tempfile.TemporaryDirectory() as folder, counted_kernels():
        from transformers import LlamaConfig, LlamaForCausalLM

        LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
        differences = {policy: two_and_three_layers(folder, policy) for policy in POLICIES}
    base = differences["none"]
    return {
        "kept_bytes_by_policy": {policy: counts["kept"] // TOKENS for policy, counts in differences.items()},
        "recomputed_gemm_flops_by_policy": {
            policy: (counts["gemm"] - base["gemm"]) // TOKENS for policy, counts in differences.items()
        },
        "recomputed_attention_by_policy": {
            policy: counts["attention"] - base["attention"] for policy, counts in differences.items()
        },
        "lora_kb_per_token_layer": base["lora"] * SCALE / TOKENS / 1000,
    }


def two_and_three_layers(folder: str, policy: Policy) -> Counter[str]:
    """The counts of three layers less those of two."""
    more, fewer = (one_pass(folder, policy, layers) for layers in (3, 2))
    more.subtract(fewer)
    return more


def one_pass(folder: str, policy: Policy, num_layers: int) -> Counter[str]:
    """Counts of a forward and backward pass of the first layers."""
    device = torch.device("cpu")
    config = recipe("fp32", path=folder, kernels="reference")
    module = load_model(config, device=device).module
    causal_lm = module.hf_model
    layers = list(causal_lm.model.layers[:num_layers])
    causal_lm.model.layers = nn.ModuleList(layers)
    parts = Parts(causal_lm.model, layers, causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings(), None)
    fuse(causal_lm, parts, "auto", device)
    module.to(torch.bfloat16).train()
    checkpoint_layers(layers, policy, device)
    ids = torch.zeros((1, TOKENS), dtype=torch.int64)
    borders = torch.tensor([0, TOKENS], dtype=torch.int32)
    products = Products()
    with products:
        with Storages() as storages, counted_host_copies() as copies:
            loss, _ = module(ids, torch.arange(TOKENS)[None], borders, TOKENS, ids)
        kept = storages.alive() - sum(copy._host.nbytes for copy in copies)
        products.attention = 0
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as flops:
            loss.backward()
    gemm = sum(count for op, count in flops.get_flop_counts()["Global"].items() if "mm" in str(op))
    return Counter(kept=kept, gemm=gemm, attention=products.attention, lora=products.lora_bytes)


def _addmm_flops(self_shape: Any, a_shape: Any, b_shape: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


class Storages(TorchDispatchMode):
    """The memory that operations allocate."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self._bytes[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self) -> int:
        return sum(size for reference, size in self._bytes.values() if not reference.expired())


class Products(TorchDispatchMode):
    """Bytes of rows of tokens that products with LoRA's matrices move, and attention's forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_bytes = self.attention = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.attention += name.startswith("_scaled_dot_product") and "backward" not in name
        if name in MATRICES:
            left, right = (args[place] for place in MATRICES[name])
            if RANKS & {*left.shape, *right.shape}:
                added = name != "mm" and (kwargs or {}).get("beta", 1) != 0
                wide = [left, right, out, *([out] if added else [])]
                self.lora_bytes += sum(t.nbytes for t in wide if TOKENS in t.shape and not RANKS & {*t.shape})
        return out


class counted_host_copies:
    """Within it, the copies of layer inputs in host memory are listed."""

    def __enter__(self) -> list[Any]:
        copies: list[Any] = []
        self._before = host_copies.HostCopy

        class Listed(host_copies.HostCopy):
            def __init__(self, *given: Any) -> None:
                super().__init__(*given)
                copies.append(self)

        host_copies.HostCopy = Listed
        return copies

    def __exit__(self, *_: object) -> None:
        host_copies.HostCopy = self._before


class LoraMatrices(nn.Module):
    """The trainable tensors of a LoRA run, by the names that the optimizer's groups know; their sum is the loss."""

    routing = None  # no mixture of experts

    def __init__(self) -> None:
        super().__init__()
        for layer in range(LAYERS):
            for place in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
                parent = nn.Module()
                self.add_module(f"layers_{layer}_{place}", parent)
                parent.lora_A, parent.lora_B = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss = torch.stack([parameter.float().sum() for parameter in self.parameters()]).sum()
        return loss, loss.detach()


def recipe(state: str, **model: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "counts",
            "model": {"path": "base", "weights": "bf16"} | model,
            "adapter": {"rank": LORA_RANK, "alpha": LORA_RANK},
            "data": {"seq_len": 32, "sources": [{"path": "text.jsonl"}]},
            "batch": {"global_tokens": 64},
            "train": {"tokens": 64},
            "optim": {"state": state},
        }
    )


class counted_kernels:
    """Within it, launches of the package's kernels are counted by name instead of run."""

    def __enter__(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        self._before: list[tuple[Any, Callable[..., Any]]] = []
        for module in pkgutil.iter_modules(dist_cpt_kernels.__path__):
            for value in vars(importlib.import_module(f"dist_cpt_kernels.{module.name}")).values():
                if isinstance(value, triton.JITFunction):
                    self._before.append((value, value.run))
                    value.run = lambda *_, _name=value.__name__, **__: counts.update([_name])
        return counts

    def __exit__(self, *_: object) -> None:
        for kernel, run in self._before:
            kernel.run = run


class AtenCalls(TorchDispatchMode):
    """Counts ATen calls that are no views and no allocations, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


if __name__ == "__main__":
    main()
