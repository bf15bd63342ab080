"""Every test here runs the kernels themselves, in Triton's interpreter."""

from __future__ import annotations

import pytest
from dist_cpt_kernels import dispatch


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    assert dispatch.INTERPRETED, "TRITON_INTERPRET=1 must be set before triton is imported: tests/conftest.py does so"
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", True)


@pytest.fixture
def number_programs_from(monkeypatch):
    """Run only the last programs of a huge grid: a launch numbers its programs from `first`."""
    from triton.runtime.interpreter import interpreter_builder

    def set_first(first):
        def set_grid_idx(x, y, z):
            interpreter_builder.grid_idx = (first + x, y, z)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)

    return set_first
