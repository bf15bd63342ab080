"""Match the numbered AdamW state of a Trainer's optimizer.pt to tensor names.

Hugging Face's Trainer numbers the trainable tensors in the order of its parameter groups, each in the module's
order. Two layouts are read: all tensors in one group (a second one, without decay, is empty for LoRA), and the
LoRA matrices in one group with the vocabulary matrices in another (with their own learning rate).

Assumed: the module's order is that of the same module here. Checked: the number of tensors, every shape, and, where
several matrices share a shape, that the moments agree with the weights (`require_agreement`). Two of many matrices
of one shape that changed places would not be noticed; a wrong order of a whole kind is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dist_cpt.errors import CheckpointError, ConfigError
from dist_cpt.run_folder.train_state import first_line
from dist_cpt.training_state import StateKind

OPTIMIZER = "optimizer.pt"
WEIGHTS_ONLY = "use continue_from: PATH for the weights only"
_ADAMW = {"step", "exp_avg", "exp_avg_sq"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # widen to fp32 exactly
_SUM_ELEMENTS = 1 << 22
# The mean cosine over n matrices of one shape and rank R was 0.2 to 0.97 after two steps of training and above 0.95
# after sixty; in a wrong order it is 0 with a standard deviation of 1 / (R sqrt(n)), of which it must be three away.
_DEVIATIONS = 3.0

ReadMaster = Callable[[str], torch.Tensor]  # name -> fp32 CPU values in full shape


class TrainerMoments:
    """The moments of an optimizer.pt by canonical name, after `step` updates with `betas`."""

    def __init__(self, path: Path, order: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Open the file; `order` are the trainable names in the module's order.

        Raises:
            CheckpointError: damaged, not loadable without running code, or not matched to names.
        """
        content = _load(path)
        try:
            groups, state = list(content["param_groups"]), dict(content["state"])
            numbers = [number for group in groups for number in group["params"]]
            sizes = [len(group["params"]) for group in groups if group["params"]]
            self.betas = tuple(float(beta) for beta in groups[0]["betas"])
            amsgrad = any(group.get("amsgrad") for group in groups)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise unmatched("it is not the state of an AdamW") from None
        if amsgrad or numbers != list(range(len(numbers))):
            raise unmatched("it is the state of an amsgrad" if amsgrad else "its parameter groups are not in order")
        names = _names_by_number(sizes, order)
        self._state = {name: _moments(state.get(i), name, shapes[name]) for i, name in enumerate(names)}
        if len(state) != len(names):
            raise unmatched(f"it has the state of {len(state)} tensors, {len(names)} train here")
        steps = {_step_count(entry["step"]) for entry in self._state.values()}
        if len(steps) != 1:
            raise unmatched(f"its tensors made different numbers of steps ({min(steps)} to {max(steps)})")
        self.step = steps.pop()

    def read(self, kind: StateKind, name: str, start: int, stop: int) -> torch.Tensor:
        """Flat fp32 CPU [stop - start] of one moment."""
        return self._state[name][kind].reshape(-1)[start:stop].float()

    def require_agreement(self, weights: ReadMaster, head: str | None) -> None:
        """Refuse moments that do not belong to the weights they were matched to.

        With y = W x + s B A x and g the gradient of y, that of B is s g (A x)^T and that of A is s B^T g x^T, so in
        every step B^T dB = dA A^T [R, R], whatever the loss, the dropout and the clipping. exp_avg is a sum of such
        gradients, over few enough steps that A and B hardly moved. The gradient of the `head` sums to zero over the
        vocabulary, for softmax less the target does; that of an embedding of the same shape does not.

        Raises:
            CheckpointError: the moments of one shape do not agree with the weights, or are too few to tell.
        """
        by_shape: dict[tuple[torch.Size, ...], list[str]] = {}
        for name in self._state:
            if name.endswith(".lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                both = (self._full(name).shape, self._full(f"{module}.lora_B.weight").shape)
                by_shape.setdefault(both, []).append(module)
        for (shape, _), modules in by_shape.items():
            if len(modules) == 1:
                continue  # the only one of this shape
            cosine = sum(self._agreement(module, weights) for module in modules) / len(modules)
            needed = _DEVIATIONS / (shape[0] * math.sqrt(len(modules)))
            if not cosine >= needed:
                raise unmatched(
                    f"the moments of {len(modules)} matrices like {modules[0]} agree with the weights by "
                    f"{cosine:.2f}, below the {needed:.2f} that shows they belong together"
                )
        vocabulary = [name for name in self._state if ".lora_" not in name]
        if head in vocabulary and len({self._full(name).shape for name in vocabulary}) < len(vocabulary):
            sums = {name: self._vocabulary_sum(name) for name in vocabulary}
            if not all(4 * sums[head] < value for name, value in sums.items() if name != head):
                raise unmatched("the moments of embedding and head may have changed places")

    def _full(self, name: str) -> torch.Tensor:
        return self._state[name]["exp_avg"]

    def _agreement(self, module: str, weights: ReadMaster) -> float:
        """Cosine of B^T exp_avg(B) and exp_avg(A) A^T."""
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        left, right = weights(b).T @ self._full(b).float(), self._full(a).float() @ weights(a).T
        return float(F.cosine_similarity(left.flatten().double(), right.flatten().double(), dim=0))

    def _vocabulary_sum(self, name: str) -> float:
        """Norm of the sum of exp_avg [V, D] over the vocabulary, relative to the norm of all of it."""
        full = self._full(name)
        total, square = torch.zeros(full.shape[1], dtype=torch.float64), 0.0
        for rows in full.split(max(1, _SUM_ELEMENTS // full.shape[1])):
            total += rows.float().sum(0)
            square += float(rows.float().square().sum())
        return float(total.norm()) / math.sqrt(square) if square else 0.0


def unmatched(why: str) -> CheckpointError:
    """The error for an optimizer file that cannot be imported."""
    return CheckpointError(f"adapter.continue_from: {OPTIMIZER} cannot be matched to names: {why}", remedy=WEIGHTS_ONLY)


def require_betas(theirs: Sequence[float], ours: Sequence[float]) -> None:
    """Refuse moments of other betas: their bias correction would use the wrong factors.

    Raises:
        ConfigError: they differ.
    """
    if tuple(theirs) != tuple(ours):
        raise ConfigError(
            f"adapter.continue_from: the optimizer has betas {list(theirs)}, this run {list(ours)}",
            remedy=f"set optim.betas: {list(theirs)}, or {WEIGHTS_ONLY}",
        )


def _load(path: Path) -> Any:
    try:
        # Only tensors and plain containers; a memory map, so that the values are read when they are asked for.
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged or hostile archive may provoke anything
        reason = first_line(error).split(". ")[0]
        raise unmatched(f"it is damaged, or opening it would run code ({reason})") from None


def _names_by_number(sizes: list[int], order: Sequence[str]) -> list[str]:
    lora = [name for name in order if ".lora_" in name]
    vocabulary = [name for name in order if ".lora_" not in name]
    if sizes == [len(order)]:
        return list(order)
    if vocabulary and sizes == [len(lora), len(vocabulary)]:
        return lora + vocabulary
    expected = f"{len(order)}" + (f", or {len(lora)} and {len(vocabulary)}" if vocabulary else "")
    raise unmatched(f"its parameter groups have {sizes} tensors, expected {expected}")


def _moments(entry: Any, name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    if not isinstance(entry, dict):
        raise unmatched(f"it has no state of {name}")
    if entry.keys() != _ADAMW:
        kind = "bitsandbytes' quantised or paged" if "state1" in entry else "another optimizer's"
        raise unmatched(f"it has {kind} state ({', '.join(sorted(map(str, entry)))}), not AdamW's")
    for key in ("exp_avg", "exp_avg_sq"):
        value = entry[key]
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.dtype not in _FLOATS:
            raise unmatched(f"{key} of {name} is not a plain floating-point tensor")
        if tuple(value.shape) != shape:
            raise unmatched(f"{key} of {name} has shape {list(value.shape)}, expected {list(shape)}")
    return entry


def _step_count(step: Any) -> int:
    try:
        number = float(step)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not (number >= 0 and number.is_integer()):
        raise unmatched(f"its step counter is {number}")
    return int(number)
