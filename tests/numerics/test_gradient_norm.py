"""The norm that decides about clipping, and the update that bounds its own memory."""

from __future__ import annotations

import math

import pytest
import torch

from dist_cpt.engines.gradients import StepLoss, judge
from dist_cpt.runtime.stop import StopRequest
from tests import tiny
from tests.whole_run import rows, train


@pytest.mark.parametrize("numel", [0, 1, 65_537, 5_000_000])
def test_the_norm_of_a_large_tensor_is_right_to_fp32(numel):
    """5e6 elements in one fp32 sum on the CPU read 1e-4 low; the rounding of 2**16 terms stays below 1e-5."""
    grad = torch.randn(numel, generator=torch.Generator().manual_seed(0)) + 1.0
    exact = float(grad.double().norm())
    loss = StepLoss()
    loss.add(torch.tensor(3.0), 2)
    means, norm, _ = judge(loss, [grad], max_norm=1.0, spike_limit=math.inf)
    assert float(means.loss) == 1.5
    assert float(norm) == pytest.approx(exact, rel=1e-5)


def test_updating_in_slices_changes_no_bit(tmp_path, monkeypatch):
    """The embedding of 32768 elements in slices of 2**13, clipped, against one piece."""
    corpus = tiny.write_corpus(tmp_path / "corpus")
    base = tiny.write_base(tmp_path / "base", tiny.write_tokenizer(tmp_path / "tokenizer", corpus))
    optim = {"lr": 1e-2, "embedding_lr": 1e-3, "max_grad_norm": 0.5}
    assert train(tiny.recipe(base, corpus, tmp_path / "whole", optim=optim), StopRequest()) == 0
    monkeypatch.setattr("dist_cpt.optim.optimizer.SLICE_ELEMENTS", 1 << 13)
    assert train(tiny.recipe(base, corpus, tmp_path / "slices", optim=optim), StopRequest()) == 0
    losses = [[row["loss"] for row in rows(tmp_path / how / "tiny/metrics.jsonl")] for how in ("whole", "slices")]
    assert losses[0] == losses[1]

    from dist_cpt.run_folder.checkpoints import read_manifest

    states = [read_manifest(tmp_path / how / "tiny/checkpoints/step-00000012") for how in ("whole", "slices")]
    assert states[0].tensors == states[1].tensors
