"""Operations whose sums have a random order on a GPU are replaced, or refused by name."""

from __future__ import annotations

import pytest
import torch

from dist_cpt.errors import ConfigError
from dist_cpt.runtime.seed import deterministic


def test_an_operation_without_a_deterministic_form_is_refused_by_name() -> None:
    target, index, values = torch.zeros(3), torch.tensor([0, 0]), torch.tensor([1.0, 2.0])
    with pytest.raises(ConfigError, match=r"train\.deterministic: put_"), deterministic(True):
        target.put_(index, values)
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        target.put_(index, values)
    with pytest.raises(RuntimeError, match="unrelated"), deterministic(True):
        raise RuntimeError("unrelated")
