"""Training states compared bit for bit."""

from __future__ import annotations

import torch

State = dict[str, torch.Tensor]  # "kind.name" -> full fp32 tensor


def assert_same(got: State, want: State) -> None:
    assert got.keys() == want.keys()
    different = [key for key in want if not torch.equal(got[key], want[key])]
    assert not different, f"{len(different)} of {len(want)} tensors differ, the first is {different[0]}"
