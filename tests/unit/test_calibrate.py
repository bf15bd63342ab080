"""Rates of this machine: measured, kept, and used for the device that they are of and no other."""

from __future__ import annotations

import json
from dataclasses import replace

from benchmarks.scaling import LLAMA_8B
from dist_cpt.plan.calibrate import RATES, calibrated, rates_file
from dist_cpt.plan.devices import DEVICES, machine_here, machine_of
from tests.command import command
from tests.plan_cases import model_folder, recipe
from tests.tiny import write_recipe


def test_rates_are_used_for_their_own_device_alone(tmp_path):
    path = tmp_path / "rates.json"
    assert calibrated(DEVICES["h100"], path) is DEVICES["h100"]  # nothing was measured
    path.write_text(json.dumps({"name": "NVIDIA H100 80GB HBM3", **dict.fromkeys(RATES, 1e12)}))
    found = calibrated(DEVICES["h100"], path)
    assert {getattr(found, rate) for rate in RATES} == {1e12}
    assert (found.memory_bytes, found.link, found.peak) == (80 * 10**9, 370e9, 989e12)  # not measured
    assert "measured on this machine" in found.source
    assert calibrated(DEVICES["a100"], path) is DEVICES["a100"]
    assert calibrated(replace(found, name="NVIDIA A100"), path).name == "NVIDIA A100"
    assert calibrated(machine_here("NVIDIA H100 80GB HBM3", 1, 1, 1).device, path).gemm == 1e12
    for damaged in ("", "{}", '{"name": "NVIDIA H100 80GB HBM3", "gemm": "?"}'):
        path.write_text(damaged)
        assert calibrated(DEVICES["h100"], path) is DEVICES["h100"]


def test_the_command_measures_and_plans_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_recipe(tmp_path / "recipe.yaml", recipe(model_folder(tmp_path / "model", LLAMA_8B)))
    guessed = json.loads(command("plan", path, "--gpu", "cpu", "--json").out)["machine"]["device"]
    ended = command("plan", path, "--gpu", "cpu", "--calibrate", "--json")
    assert ended.code == 0
    measured = json.loads(rates_file().read_text())
    device = json.loads(ended.out)["machine"]["device"]
    assert {rate: device[rate] for rate in RATES} == {rate: measured[rate] for rate in RATES}
    assert device["gemm"] != guessed["gemm"]
    again = json.loads(command("plan", path, "--gpu", "cpu", "--json").out)["machine"]["device"]
    assert again == device
    assert calibrated(machine_of("cpu", 1, 2, "1GBps").device).gemm == device["gemm"]
