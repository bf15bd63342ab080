"""Without Triton the package still imports, its references still work, and a launch says what is missing."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import torch
from dist_cpt_kernels import dispatch
from torch._subclasses.fake_tensor import FakeTensorMode

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import dist_cpt_kernels as kernels
from dist_cpt_kernels import dispatch
from dist_cpt_kernels.nf4 import dequantize_nf4_kernel
dispatch.interpret_cpu_tensors = True
assert not dispatch.available(torch.ones(1))
kernels.linear_cross_entropy(torch.ones(3, 4, requires_grad=True), torch.ones(5, 4), torch.arange(3))[0].backward()
try:
    dequantize_nf4_kernel[(1,)](None)
except ImportError as error:
    print(error)
"""


def test_without_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "the kernel dequantize_nf4_kernel needs Triton, which is not installed: pip install triton"
    )


def test_the_cpu_takes_torch_unless_a_test_asks(monkeypatch):
    assert dispatch.available(torch.ones(1))
    assert not dispatch.available(torch.ones(1, device="meta"))
    monkeypatch.setattr(dispatch, "interpret_cpu_tensors", False)
    assert not dispatch.available(torch.ones(1))


def test_a_kernel_runs_where_its_tensors_are(monkeypatch):
    """Triton itself would take the current device and its stream."""
    current = [0]

    @contextmanager
    def device(wanted):
        current.append(wanted.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    run = dispatch._on_their_device(lambda *args, grid: current[-1])
    with FakeTensorMode():
        assert [run(None, torch.empty(1, device=f"cuda:{i}"), 3, grid=(1,)) for i in (0, 1)] == [0, 1]
    assert current == [0]
    assert run(3, grid=(1,)) == 0
