"""What can be counted of a training step without a GPU: exact, the same at every run, and held by tests.

`optimizer_launches`: launches of one optimizer step on a GPU, from gradients to refreshed compute copies, under the
single engine with the LoRA matrices of LAYERS layers: the package's kernels are counted instead of run, and every other
ATen call that is no view and no allocation counts as one launch; `optimizer_launches_8bit` with moments in 8 bit.
`optimizer_calls_cpu`: such calls of the same step on a CPU.

    python benchmarks/counts.py --json
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported: interpreted kernels have no `run` to count
# Beside this file lies kernels.py: on the path it would be taken for Hugging Face's package of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

import dist_cpt_kernels  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from dist_cpt_kernels import dispatch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from dist_cpt.config.schema import RunConfig  # noqa: E402
from dist_cpt.engines.single import SingleEngine  # noqa: E402
from dist_cpt.optim.groups import param_groups  # noqa: E402

LAYERS = 32  # with seven linear maps each, a pair of LoRA matrices on every one
WIDTH, RANK = 64, 8
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
    arguments = parser.parse_args()
    counts = {
        "optimizer_launches": optimizer_calls(on_a_gpu=True),
        "optimizer_launches_8bit": optimizer_calls(on_a_gpu=True, state="8bit"),
        "optimizer_calls_cpu": optimizer_calls(on_a_gpu=False),
    }
    print(json.dumps(counts) if arguments.json else "\n".join(f"{name}: {count}" for name, count in counts.items()))


def optimizer_calls(*, on_a_gpu: bool, state: str = "fp32") -> int:
    """Kernel launches, or ATen calls on the CPU, of one step of the single engine."""
    dispatch.interpret_cpu_tensors = on_a_gpu
    module, config = lora_matrices(), recipe(state)
    trainable = {f"base_model.model.{name}": parameter for name, parameter in module.named_parameters()}
    groups = param_groups(trainable, config.optim, adapter=True)
    engine = SingleEngine(module, trainable, groups, config, torch.device("cpu"))
    rates = {group.name: group.peak_lr for group in groups}
    calls = AtenCalls()
    with counted_kernels() as launches:
        for _ in range(2):  # tables that are made once are no part of a step
            torch.stack([parameter.float().sum() for parameter in trainable.values()]).sum().backward()
            launches.clear()
            calls.counts.clear()
            with calls:
                engine.step(rates)
    return sum(launches.values()) + sum(calls.counts.values())


def lora_matrices() -> nn.Module:
    """The trainable tensors of a LoRA run, by the names that the optimizer's groups know."""
    module = nn.Module()
    for layer in range(LAYERS):
        for place in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            parent = nn.Module()
            module.add_module(f"layers_{layer}_{place}", parent)
            parent.lora_A, parent.lora_B = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)
    return module


def recipe(state: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "counts",
            "model": {"path": "base", "weights": "bf16"},
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
