"""Every launch compiles for three GPU generations without a GPU: no spills, shared memory that fits, wide loads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import dist_cpt_kernels
import pytest

SHARED_KIB = {80: 164, 90: 228, 100: 228}  # of one multiprocessor, by architecture


@pytest.fixture(scope="module", params=["representative", pytest.param("all", marks=pytest.mark.matrix)])
def report(request, tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_all", *([] if request.param == "all" else [request.param])],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout) | {"all": request.param == "all"}


def test_every_kernel_was_compiled_for_every_architecture(report):
    names = [one["name"] for one in report["compiled"] if one["architecture"] == 90]
    assert len(set(names)) == len(names)
    assert len(report["compiled"]) == len(SHARED_KIB) * len(names)
    assert {one["kernel"] for one in report["compiled"]} == set(report["recorded"].values())
    if report["all"]:
        assert set(names) == set(report["recorded"])


def test_no_kernel_is_left_out(report):
    """The operations launch every @jit function that has a launch in the sources."""
    sources = "".join(path.read_text() for path in Path(dist_cpt_kernels.__file__).parent.glob("*.py"))
    launched = set(re.findall(r"(\w+)\[(?:grid|\()", sources)) & set(re.findall(r"@jit\ndef (\w+)\(", sources))
    assert set(report["recorded"].values()) == launched


def test_nothing_spills_and_everything_fits(report):
    for one in report["compiled"]:
        assert one["spilled_bytes"] == 0, one
        assert one["registers"] * 32 * one["num_warps"] <= 65536, one
        assert one["shared_bytes"] <= SHARED_KIB[one["architecture"]] * 1024, one


def test_global_loads_are_wide(report):
    for one in report["compiled"]:
        assert one["load_bits"] >= one["min_load_bits"], one


def test_exact_kernels_leave_no_product_to_the_assembler(report):
    """`mul.f32` may be fused with an addition, `mul.rn.f32` may not."""
    exact = [one for one in report["compiled"] if one["exact"]]
    names = {"adamw_kernel", "adamw_8bit_kernel", "dequantize_nf4_kernel", "quantize_rows_kernel"}
    assert {one["kernel"] for one in exact} == names
    for one in exact:
        assert one["uncertain_products"] == 0, one
        assert one["kernel"].startswith("adamw") or one["fused_multiply_adds"] == 0, one
