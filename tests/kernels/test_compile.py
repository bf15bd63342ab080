"""Every kernel compiles for three generations of GPUs without one: no spills, shared memory that fits, wide loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from dist_cpt_kernels.signatures import signatures

ARCHITECTURES = (80, 90, 100)
SHARED_KIB = {80: 164, 90: 228, 100: 228}  # of one multiprocessor


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_all"],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_signature_was_compiled(compiled):
    names = [signature.name for signature in signatures()]
    assert len(set(names)) == len(names)
    expected = {(name, architecture) for name in names for architecture in ARCHITECTURES}
    assert {(one["name"], one["architecture"]) for one in compiled} == expected


def test_nothing_spills_and_everything_fits(compiled):
    for one in compiled:
        assert one["spilled_bytes"] == 0, one
        assert one["registers"] * 32 * one["num_warps"] <= 65536, one
        assert one["shared_bytes"] <= SHARED_KIB[one["architecture"]] * 1024, one


def test_global_loads_are_wide(compiled):
    for one in compiled:
        assert one["load_bits"] >= one["min_vector_bits"], one


def test_what_must_have_given_bits_has_no_product_left_to_the_assembler(compiled):
    """`mul.f32` may be fused with an addition, `mul.rn.f32` may not."""
    exact = {signature.name for signature in signatures() if not signature.fp_fusion}
    assert any(name.startswith("nf4") for name in exact)
    for one in compiled:
        if one["name"].startswith("nf4"):
            assert one["fused_multiply_adds"] == 0, one
        if one["name"] in exact:
            assert one["uncertain_products"] == 0, one
