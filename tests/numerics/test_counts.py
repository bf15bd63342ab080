"""What a step costs a GPU, as far as it can be counted without one; and that what measures it there still runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling import LLAMA_8B
from dist_cpt.config.load import build
from dist_cpt.plan.recomputation import POLICIES, Policy, again, kept_bytes
from dist_cpt.plan.shapes import shapes_of
from dist_cpt.plan.step_model import token_work
from dist_cpt.plan.tensors import training_of
from tests.plan_cases import recipe

ROOT = Path(__file__).parents[2]


def benchmark(*command: str) -> str:
    """What a file of benchmarks/ prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    arguments = [sys.executable, f"benchmarks/{command[0]}", *command[1:]]
    return subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.matrix
def test_the_benchmark_of_a_step_on_a_gpu_runs_on_a_cpu(tmp_path):
    sides = ["dist_cpt", "hf_peft"]
    benchmark("gpu_step.py", "--tiny", "--sides", *sides, "--out", str(tmp_path / "out.json"))
    cases: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(cases) == 5
    for name, measured in cases.items():
        here = sides if name != "fp8_4096" else sides[:1]  # no peer has it
        assert all(measured[side].get("flops_per_step", 0) > 0 for side in here), (name, measured)


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    return json.loads(benchmark("counts.py", "--json", "--engines", "single"))


def test_an_optimizer_step_is_a_few_launches(counted):
    """448 LoRA matrices. One launch per tensor and operation were 4,484."""
    assert counted["host_reads_per_step"] == 1
    assert 0 < counted["optimizer_launches"] <= 48
    assert 0 < counted["optimizer_launches_8bit"] <= 48
    assert 0 < counted["optimizer_calls_cpu"] <= 80


SCALE = 32  # of counts.py: Llama-3.1-8B's widths and LoRA's rank of 64, divided by it
SCALED = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "num_hidden_layers": 1,
}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_model_of_a_step_knows_what_each_policy_keeps_and_computes_again(policy: Policy, counted):
    training = training_of(build(recipe("llama", rank=64 // SCALE), "recipe"), shapes_of(SCALED))
    (layer,) = training.widths
    repeated = again(layer, training, policy)
    assert counted["kept_bytes_by_policy"][policy] == kept_bytes(layer, training, policy)
    assert counted["recomputed_gemm_flops_by_policy"][policy] == repeated.gemm + repeated.lora
    assert counted["recomputed_attention_by_policy"][policy] == repeated.attention


def test_an_adapter_moves_what_the_model_of_a_step_says(counted):
    training = training_of(build(recipe("llama", rank=64), "recipe"), shapes_of(LLAMA_8B))
    work = token_work(training, 4096)
    layers = LLAMA_8B["num_hidden_layers"]
    assert counted["lora_kb_per_token_layer"] == (work.lora_bytes_forward + work.lora_bytes_backward) / layers / 1000


@pytest.mark.matrix
def test_two_ranks_read_once_per_step_and_deepspeed_alone_reads_at_once():
    counted = json.loads(benchmark("counts.py", "--json", "--engines", "fsdp", "zero"))
    assert counted["host_reads_per_step_fsdp"] == 1
    assert counted["host_reads_per_step_zero"] == 1  # a step late
    assert counted["deepspeed_reads_per_step"] > 1
