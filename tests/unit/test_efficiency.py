"""MFU and memory by part: stated denominators, and nothing where there is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.scaling import LLAMA_8B
from dist_cpt.config.load import build
from dist_cpt.plan.devices import DEVICES, known_device
from dist_cpt.plan.shapes import shapes_of
from dist_cpt.plan.step_model import token_work
from dist_cpt.plan.tensors import training_of
from dist_cpt.train import efficiency
from dist_cpt.train.efficiency import Efficiency, open_efficiency
from tests.plan_cases import model_folder, recipe


def test_a_device_is_known_by_its_drivers_name():
    assert known_device("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert known_device("NVIDIA GeForce RTX 4090") is None


def test_the_numerator_counts_no_gradient_of_a_frozen_weight():
    """Under LoRA 4 FLOPs per base parameter and token, 6 per adapter's; in full 6 each."""
    shapes = shapes_of(LLAMA_8B)
    lora = training_of(build(recipe("llama"), "r"), shapes)
    full = training_of(build(recipe("llama") | {"adapter": {"kind": "none"}}, "r"), shapes)
    layers = sum(weight.elements for weight in shapes.of("linear"))
    adapters = sum(tensor.elements for tensor in lora.trained if tensor.group == "adapter")
    frozen, trained = token_work(lora, 4096), token_work(full, 4096)
    attention = frozen.attention_forward + frozen.attention_backward
    assert frozen.model_flops == pytest.approx(4 * layers + 6 * adapters + attention + 4 * shapes.head_elements)
    assert trained.model_flops == pytest.approx(6 * layers + attention + 6 * shapes.head_elements)


@pytest.mark.parametrize(("gpu", "weights", "known"), [
    ("NVIDIA H100 80GB HBM3", "bf16", True), ("NVIDIA T4", "bf16", False), ("NVIDIA H100", "fp32", False),
    (None, "bf16", False),
])  # fmt: skip
def test_without_a_denominator_there_is_no_mfu(gpu, weights, known, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name=gpu))
    config = build(recipe(model_folder(tmp_path / "model", LLAMA_8B), weights), "recipe")
    context: Any = SimpleNamespace(
        device=torch.device("cpu" if gpu is None else "cuda"),
        env=SimpleNamespace(world_size=2, local_world_size=2),
        shape=SimpleNamespace(accumulation=2),
    )
    engine: Any = SimpleNamespace(sharded_bytes=lambda: {"frozen": 10, "trainable": 2, "optimizer": 4})
    measured = open_efficiency(context, config, engine)
    flops = token_work(training_of(config, shapes_of(LLAMA_8B)), config.data.seq_len).model_flops
    expected = flops * config.batch.global_tokens / (2 * 989e12 * 3.0)
    assert measured.mfu(3.0) == (pytest.approx(expected) if known else None)
    assert ("gradients" in measured.state_bytes) == (gpu is not None)
    assert measured.memory_bytes() is None  # no GPU here


def test_the_parts_add_up_to_the_allocators_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(efficiency.torch.cuda, "max_memory_allocated", lambda: 100)
    parts = Efficiency(None, {"frozen": 60, "gradients": 10}).memory_bytes()
    assert parts == {"frozen": 60, "gradients": 10, "activations and buffers": 30}
