"""Every kernel compiles for three generations of GPUs without one: no spills, shared memory that fits, wide loads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import dist_cpt_kernels
import pytest
from dist_cpt_kernels.signatures import signatures

from tests.kernels.compile_all import ARCHITECTURES, REPRESENTATIVE

SHARED_KIB = {80: 164, 90: 228, 100: 228}  # of one multiprocessor


@pytest.fixture(scope="module", params=["representative", pytest.param("all", marks=pytest.mark.matrix)])
def compiled(request, tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_all", *([] if request.param == "all" else [request.param])],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_kernel_was_compiled_for_every_architecture(compiled):
    names = [one["name"] for one in compiled if one["architecture"] == 90]
    assert len(set(names)) == len(names)
    assert len(compiled) == len(ARCHITECTURES) * len(names)
    by_name = {signature.name: signature.kernel for signature in signatures()}
    assert len(by_name) == len(signatures())
    assert {id(by_name[name]) for name in names} == {id(kernel) for kernel in by_name.values()}
    if len(names) > len(REPRESENTATIVE):
        assert set(names) == set(by_name)


def test_no_kernel_is_left_out():
    """Every function under @jit that is launched, not only called by another."""
    listed = {signature.kernel.__name__ for signature in signatures()}
    sources = "".join(path.read_text() for path in Path(dist_cpt_kernels.__file__).parent.glob("*.py"))
    launched = set(re.findall(r"(\w+)\[(?:grid|\()", sources)) & set(re.findall(r"@jit\ndef (\w+)\(", sources))
    assert listed == launched


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
