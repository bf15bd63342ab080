"""`dist-cpt plan`: which ways exist, that they are recipes, and what it says when something is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from benchmarks.scaling import LLAMA_8B, LLAMA_70B
from dist_cpt.cli import app
from dist_cpt.config.load import build, load_recipe
from dist_cpt.config.resolve import fingerprint, step_shape
from dist_cpt.errors import ConfigError
from dist_cpt.optim import groups
from dist_cpt.plan import tensors
from dist_cpt.plan.choose import chosen_engine, is_concrete
from dist_cpt.plan.devices import DEVICES, machine_here, machine_of
from dist_cpt.plan.plan import Plan, make_plan, model_config, recipe_patch
from dist_cpt.plan.plan_text import as_json, as_text, launch_line
from dist_cpt.plan.recomputation import TILE_TOKENS
from tests.plan_cases import model_folder, recipe


def planned(tmp_path: Any, model: dict[str, Any] = LLAMA_8B, machine: Any = None, **values: Any) -> tuple[Any, Plan]:
    config = build(recipe(model_folder(tmp_path / "model", model), **values), "recipe")
    return config, make_plan(config, model_config(config), machine or machine_of("h100", 1, 8, "50GBps"))


def test_every_way_is_a_recipe_that_divides(tmp_path):
    """Its patch, applied as --set would, gives a valid recipe of that engine, micro-batch and storage."""
    config, plan = planned(tmp_path)
    assert len({(w.engine, w.weights, w.checkpointing) for w in plan.ways}) == 5 * 3 * 4
    for way in plan.ways[:: len(plan.ways) // 20]:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(config.model.path)))
        changed = load_recipe(path, [f"{key}={json.dumps(value)}" for key, value in recipe_patch(config, way).items()])
        assert step_shape(changed, 8).accumulation == way.accumulation
        assert changed.model.weights == way.weights
        assert changed.engine.activation_checkpointing == way.checkpointing
        stated = changed.engine.shard if changed.engine.kind == "fsdp" else changed.engine.stage
        assert f"{changed.engine.kind}-{stated}" == way.engine
        assert recipe_patch(changed, way) == {}


def test_the_fastest_comes_first_and_nothing_exceeds_the_memory(tmp_path):
    _, plan = planned(tmp_path)
    rates = [way.tokens_per_second for way in plan.ways]
    assert rates == sorted(rates, reverse=True)
    limit = DEVICES["h100"].memory_bytes
    assert all(way.peak_bytes < limit for way in plan.ways)
    assert plan.too_large
    assert all(way.peak_bytes > 0.95 * limit for way in plan.too_large)


def test_a_base_that_fits_is_not_recomputed(tmp_path):
    _, plan = planned(tmp_path)
    assert (plan.ways[0].checkpointing, plan.ways[0].weights) == ("none", "bf16")


def test_the_recipes_own_way_is_predicted_though_its_micro_batch_need_not_divide(tmp_path):
    _, plan = planned(tmp_path, batch={"global_tokens": 262144, "micro_batch": 3})
    assert plan.own is None
    _, plan = planned(tmp_path, engine={"kind": "zero", "stage": 2})
    assert plan.own is not None
    assert (plan.own.engine, plan.own.micro_batch) == ("zero-2", 1)


def test_a_patch_takes_back_what_belongs_to_another_engine(tmp_path):
    engine = {"kind": "fsdp", "shard": "hybrid", "dp_shard": 2, "reshard_after_forward": False, "reduce": "step"}
    config, plan = planned(tmp_path, engine=engine)
    assert plan.own is None  # it keeps all weights gathered
    for name in ("zero-2", "fsdp-trainable"):
        way = next(way for way in plan.ways if way.engine == name)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(config.model.path, engine=engine)))
        changed = load_recipe(path, [f"{key}={json.dumps(value)}" for key, value in recipe_patch(config, way).items()])
        assert changed.engine.reshard_after_forward
        assert changed.engine.reduce == way.reduce
        assert recipe_patch(changed, way) == {}


@pytest.mark.parametrize(
    ("machine", "values", "engines"),
    [
        (("h200", 1, 1), {}, {"single"}),
        (("h200", 1, 2), {}, {"fsdp-trainable", "fsdp-full", "zero-1", "zero-2", "zero-3"}),
        (("h200", 2, 2), {}, {"fsdp-trainable", "fsdp-full", "fsdp-hybrid", "zero-1", "zero-2", "zero-3"}),
        (("h200", 1, 8), {"adapter": {"kind": "none"}}, {"fsdp-full", "zero-1", "zero-2", "zero-3"}),
    ],
)
def test_engines_that_exist_are_ways(tmp_path, machine, values, engines):
    gpu, nodes, gpus = machine
    _, plan = planned(tmp_path, machine=machine_of(gpu, nodes, gpus, "50GBps"), **values)
    assert {way.engine for way in (*plan.ways, *plan.too_large)} == engines


def test_weights_that_cannot_train_are_no_way(tmp_path):
    _, plan = planned(tmp_path, adapter={"kind": "none"})
    assert {way.weights for way in (*plan.ways, *plan.too_large)} == {"bf16"}
    _, plan = planned(tmp_path, LLAMA_8B | {"quantization_config": {"load_in_4bit": True}}, weights="nf4")
    assert {way.weights for way in (*plan.ways, *plan.too_large)} == {"nf4"}


def test_fp8_is_a_way_where_the_recipe_asks_for_it_and_the_device_has_it(tmp_path):
    _, plan = planned(tmp_path)
    assert "fp8" not in {way.weights for way in (*plan.ways, *plan.too_large)}
    _, plan = planned(tmp_path, weights="fp8")
    assert plan.own is not None
    assert plan.own.weights == plan.ways[0].weights == "fp8"
    with pytest.raises(ConfigError, match=r"model\.weights: fp8: A100") as refused:
        planned(tmp_path, machine=machine_of("a100", 1, 8, "50GBps"), weights="fp8")
    assert refused.value.exit_code == 64


def test_what_does_not_fit_is_said(tmp_path):
    config, plan = planned(tmp_path, LLAMA_70B, machine_of("l40s", 1, 1, "50GBps"), adapter={"kind": "none"})
    assert plan.ways == ()
    lines = list(as_text(config, plan, "recipe.yaml"))
    assert any("nothing fits in 48.0 GB" in line for line in lines)
    assert as_json(config, plan, "recipe.yaml")["best"] is None


def test_engines_that_shard_the_base_load_it_by_slices(tmp_path):
    """So 70B in bf16 starts on 8 x 80 GB; where every rank reads all of it, it does not."""
    _, plan = planned(tmp_path, LLAMA_70B)
    bf16 = [way for way in plan.ways if way.weights == "bf16"]
    assert {way.engine for way in bf16} == {"fsdp-full", "zero-3"}
    assert max(way.loading_bytes for way in bf16) < 25e9
    _, plan = planned(tmp_path, LLAMA_70B, adapter={"kind": "lora", "rank": 16, "alpha": 16, "dora": True})
    assert min(way.loading_bytes for way in plan.too_large if way.weights == "bf16") > 140e9


def test_sequences_that_do_not_divide_are_refused_with_a_number_that_does(tmp_path):
    with pytest.raises(ConfigError, match=r"64 sequences of 4096.*7 ranks") as error:
        planned(tmp_path, machine=machine_of("h100", 1, 7, "50GBps"))
    number = int(str(error.value).rpartition("=")[2])
    planned(tmp_path, machine=machine_of("h100", 1, 7, "50GBps"), batch={"global_tokens": number})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h800"], "--gpu h800"),
        (["--network", "fast"], "--network fast"),
        (["--network", "0GBps"], "--network 0GBps"),
        (["--set", "model.path=nobody/nothing"], "hf download nobody/nothing config.json"),
        (["--set", "model.path=/does/not/exist"], "has no config.json"),
        (["--set", "adapter.targets=[w1]"], "no linear layer is called 'w1'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, arguments, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(model_folder(tmp_path / "model", LLAMA_8B))))
    with pytest.raises(ConfigError) as error:
        CliRunner().invoke(app, ["plan", str(path), *arguments], catch_exceptions=False)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_loads_no_torch_and_its_json_has_every_part(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(model_folder(tmp_path / "model", LLAMA_8B))))
    program = "import sys; from dist_cpt.cli import app; app(standalone_mode=False); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", program, "plan", str(path), "--nodes", "2", "--json"]
    values = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert values["measured"] is False
    assert values["parameters"] == 8_030_261_248
    for way in (*values["ways"], *values["too_large"], values["recipe"]):
        memory, seconds = way["memory_bytes"], way["seconds"]
        assert memory["total"] == sum(memory.values()) - memory["total"]
        assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"])
    assert values["best"]["launch"].startswith(f"dist-cpt launch {path} --procs-per-node 8 --on slurm --nodes 2 --set")


def test_text_names_the_patch_and_the_command(tmp_path):
    config, plan = planned(tmp_path)
    lines = list(as_text(config, plan, "my recipe.yaml"))
    assert any("not measured" in line for line in lines)
    assert lines[-1] == launch_line(config, plan.ways[0], plan.machine, "my recipe.yaml")
    assert lines[-1].startswith("dist-cpt launch 'my recipe.yaml' --procs-per-node 8 --set ")
    patched = [line.strip().removeprefix("--set ") for line in lines if line.startswith("  --set ")]
    assert patched == [f"{key}={value}" for key, value in recipe_patch(config, plan.ways[0]).items()]


def test_moments_in_8_bit_are_those_of_the_optimizer():
    """LoRA+'s B matrices count as the adapter here."""
    assert {*tensors.EIGHT_BIT_GROUPS, "adapter_b"} == set(groups.EIGHT_BIT_GROUPS)


FULL = {"kind": "auto"}  # and every parameter trains


@pytest.mark.parametrize(
    ("model", "machine", "engine", "expected"),
    [
        (LLAMA_8B, ("h100", 1, 8), "auto", "fsdp trainable none"),  # the base fits on each
        (LLAMA_70B, ("h200", 1, 8), "auto", "fsdp full none"),  # on all together
        (LLAMA_70B, ("h100", 1, 2), "auto", "fsdp full selective, offload base"),  # and in host memory
        (LLAMA_70B, ("l40s", 1, 1), FULL, "single None offload, offload optimizer"),  # nowhere: the smallest way
        (LLAMA_8B, ("h100", 1, 1), "auto", "single None none"),
        (LLAMA_8B, ("l40s", 1, 8), {"kind": "zero", "stage": 3}, "zero None none"),  # only what is left to choose
    ],
)
def test_auto_is_what_the_plan_takes(tmp_path, model, machine, engine, expected):
    kind = {"kind": engine} if isinstance(engine, str) else engine
    values = recipe(model_folder(tmp_path / "model", model), batch={"global_tokens": 262144, "micro_batch": 1})
    values |= {"adapter": {"kind": "none"}} if engine is FULL else {}
    config = build(values | {"engine": kind | {"activation_checkpointing": "auto"}}, "recipe")
    chosen = chosen_engine(config, model, machine_of(machine[0], machine[1], machine[2], "50GBps"))
    assert is_concrete(chosen)
    offload = "" if chosen.offload == "none" else f", offload {chosen.offload}"
    assert f"{chosen.kind} {chosen.shard} {chosen.activation_checkpointing}{offload}" == expected
    assert fingerprint(config.model_copy(update={"engine": chosen})) == fingerprint(config)


def test_a_job_is_planned_with_its_own_memory():
    machine = machine_here("NVIDIA H100 80GB HBM3", 79 * 10**9, 16, 8)
    assert (machine.nodes, machine.node_devices, machine.device.memory_bytes) == (2, 8, 79 * 10**9)
    assert machine.device.gemm == DEVICES["h100"].gemm
    one, two = (machine_here(None, 0, ranks, ranks).device.memory_bytes for ranks in (1, 2))
    assert two == one // 2  # the ranks of a host share it


def test_a_sequence_cut_over_ranks_costs_each_its_part(tmp_path):
    long = {"seq_len": 131072, "sources": [{"path": "text"}]}
    fsdp = {"kind": "fsdp", "shard": "full", "activation_checkpointing": "full"}
    _, whole = planned(tmp_path, data=long, batch={"global_tokens": 8 * 131072}, engine=fsdp)
    config, cut = planned(tmp_path, data=long, batch={"global_tokens": 131072}, engine=fsdp | {"context_parallel": 8})
    assert whole.own is not None
    assert cut.own is not None
    assert cut.own.accumulation == 1
    tile = TILE_TOKENS * 3 * 14336 * 2  # of an MLP, whatever the length
    assert cut.own.memory.activations - tile == pytest.approx((whole.own.memory.activations - tile) / 8)
    # 32 layers x 3 passes x 2,560 bytes per token of the block, 7/8 of which leave the rank, at 370 GB/s
    exchange = 32 * 3 * 2560 * 131072 * 7 / 8 / 370e9
    assert cut.own.time.communication >= exchange
    assert "engine.context_parallel" not in recipe_patch(config, cut.ways[0])
    assert recipe_patch(config, cut.own) == {}


def test_what_is_offloaded_is_a_way_where_nothing_else_fits(tmp_path):
    one = machine_of("h100", 1, 1, "50GBps")
    _, plan = planned(tmp_path, machine=one)
    assert {way.offload for way in (*plan.ways, *plan.too_large)} == {"none"}
    config, plan = planned(tmp_path, machine=one, adapter={"kind": "none"})
    assert {(way.engine, way.offload) for way in plan.ways} == {("single", "optimizer")}
    best = plan.ways[0]
    masters_and_moments = 12 * plan.training.num_trained
    assert (best.memory.optimizer, best.host_bytes) == (0, masters_and_moments)
    # an update reads and writes 28 bytes per parameter at 25 GB/s, and the gradients go down, the copies up at 51 GB/s
    assert best.time.optimizer == pytest.approx(28 / 25e9 * plan.training.num_trained)
    assert best.time.offload >= 4 / 51e9 * plan.training.num_trained
    assert recipe_patch(config, best)["engine.offload"] == "optimizer"
    assert any("in host memory" in line for line in as_text(config, plan, "recipe.yaml"))


@pytest.mark.parametrize("engine", [{"kind": "auto"}, {"kind": "fsdp"}, {"kind": "zero"}])
def test_an_offloaded_base_is_a_layer_on_the_device(tmp_path, engine):
    """On two ranks: the shards of 8B in bf16 are 7 GB, a layer 0.4 GB."""
    two = machine_of("h100", 1, 2, "50GBps")
    whole, offloaded = (
        planned(tmp_path, machine=two, engine=engine | {"offload": offload})[1].own for offload in ("none", "base")
    )
    assert whole is not None
    assert offloaded is not None
    assert whole.memory.frozen == offloaded.host_bytes > 7e9
    assert offloaded.memory.frozen == 0
    assert 0 < offloaded.memory.gathered - whole.memory.gathered < 0.25e9
    assert offloaded.loading_bytes == whole.loading_bytes - whole.memory.frozen


def test_345_thousand_tokens_of_context_fit_one_card(tmp_path):
    """8B over nf4 on 80 GB, with layer inputs in host memory."""
    long = {"data": {"seq_len": 345_000, "sources": [{"path": "text"}]}, "batch": {"global_tokens": 345_000}}
    for offload, kind in (("none", {"kind": "single"}), ("both", {"kind": "auto"})):
        engine = kind | {"activation_checkpointing": "offload", "offload": offload}
        _, plan = planned(tmp_path, machine=machine_of("h100", 1, 1, "50GBps"), weights="nf4", engine=engine, **long)
        assert plan.own is not None
        assert plan.own.fits


def test_a_host_that_is_too_small_is_no_place_to_wait(tmp_path):
    """8B in full keep 96 GB there; on a CPU host and device are one."""
    machine = machine_of("h100", 1, 1, "50GBps")
    assert planned(tmp_path, machine=replace(machine, host_bytes=128 * 10**9), adapter={"kind": "none"})[1].ways
    for other in (replace(machine, host_bytes=96 * 10**9), machine_here(None, 0, 1, 1)):
        device = replace(other.device, memory_bytes=80 * 10**9)
        assert not planned(tmp_path, machine=replace(other, device=device), adapter={"kind": "none"})[1].ways
