"""Every test here runs the kernels themselves, in Triton's interpreter."""

from __future__ import annotations

import pytest
from dist_cpt_kernels import dispatch


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    assert dispatch.INTERPRETED, "TRITON_INTERPRET=1 must be set before triton is imported: tests/conftest.py does so"
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", True)
