"""The trainability contract stops a run that does not train what it says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dist_cpt.engines.single import SingleEngine
from tests import tiny
from tests.whole_run import StopAfter, rows, train


def broken(values, run, capfd) -> str:
    capfd.readouterr()
    assert train(values) == 71
    assert not list((run / "checkpoints").glob("step-*"))
    (check,) = [c for c in json.loads((run / "contract.json").read_text())["checks"] if c["passed"] is False]
    printed = capfd.readouterr().err
    assert check["step"] == 2
    assert check["name"] in printed
    assert check["detail"] in printed
    return check


def test_a_tensor_without_a_gradient_is_named(made, tmp_path, monkeypatch, capfd):
    keep = SingleEngine._keep

    def without_head(self, name):
        kept = keep(self, name)

        def zeroed(parameter):
            if name.endswith("lm_head.weight"):
                parameter.grad.zero_()
            kept(parameter)

        return zeroed

    monkeypatch.setattr(SingleEngine, "_keep", without_head)
    check = broken(tiny.recipe(*made, tmp_path), tmp_path / "tiny", capfd)
    assert "gradient" in check["name"]
    assert check["detail"] == "base_model.model.lm_head.weight"


def test_a_tensor_that_does_not_move_is_named(made, tmp_path, monkeypatch, capfd):
    from dist_cpt.optim.optimizer import AdamW

    update = AdamW.update

    def without_embeddings(self, parts, clip, copies):
        for part in parts:
            pairs = [
                (n, g) for n, g in zip(part.names, part.grads, strict=True) if not n.endswith("embed_tokens.weight")
            ]
            kept = replace(part, names=[name for name, _ in pairs], grads=[grad for _, grad in pairs])
            update(self, [kept], clip, copies)

    monkeypatch.setattr(AdamW, "update", without_embeddings)
    check = broken(tiny.recipe(*made, tmp_path), tmp_path / "tiny", capfd)
    assert "moment" in check["name"]
    assert check["detail"] == "base_model.model.model.embed_tokens.weight"


def test_a_frozen_tensor_that_changes_is_named(made, tmp_path, monkeypatch, capfd):
    step = SingleEngine.step

    def careless(self, lrs, spike_limit):
        _, tensor = next(item for item in self.frozen_tensors() if "down_proj" in item[0])
        tensor.view(-1)[7] += 1.0
        return step(self, lrs, spike_limit)

    monkeypatch.setattr(SingleEngine, "step", careless)
    check = broken(tiny.recipe(*made, tmp_path), tmp_path / "tiny", capfd)
    assert "frozen" in check["name"]
    assert "down_proj" in check["detail"]


def test_non_finite_steps_are_skipped_counted_and_end_the_run(made, tmp_path, monkeypatch, capfd):
    """Every gradient from step 5 on is NaN: three skips, then exit 71, with nothing non-finite saved."""
    keep = SingleEngine._keep

    def poisoned(self, name):
        kept = keep(self, name)

        def poison(parameter):
            if self._adam.steps >= 4:
                parameter.grad.fill_(float("nan"))
            kept(parameter)

        return poison

    monkeypatch.setattr(SingleEngine, "_keep", poisoned)
    values = tiny.recipe(*made, tmp_path, optim={"lr": 1e-2, "max_skipped_steps": 3})
    assert train(values) == 71
    run = tmp_path / "tiny"
    assert [(row["step"], row["skipped"], row["skipped_total"]) for row in rows(run / "metrics.jsonl")][3:] == [
        (4, False, 0),
        (5, True, 1),
        (6, True, 2),
        (7, True, 3),
    ]
    assert "3 bad steps in a row up to step 7 (3 of them skipped)" in capfd.readouterr().err
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000004"]
    monkeypatch.undo()
    assert train(values) == 0
    assert [row["skipped"] for row in rows(run / "metrics.jsonl")] == [False] * 12


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_tied_and_full_parameter_models_keep_the_contract(made, tmp_path, kind):
    base, corpus = made
    tied = tiny.write_base(tmp_path / "tied", base, tie_word_embeddings=True)
    changes = {"adapter": {"kind": "none"}, "embeddings": {}} if kind == "none" else {}
    assert train(tiny.recipe(tied, corpus, tmp_path, **changes)) == 0
    contract = json.loads((tmp_path / "tiny/contract.json").read_text())
    assert [check["passed"] for check in contract["checks"]] == [True] * 3
    assert len(contract["ties"]) == 1


def test_rates_below_an_ulp_and_decay_to_zero_end_no_healthy_run(made, tmp_path):
    """Norm weights of 1.0 at a rate of 1e-9 round to themselves; the last step of a cosine to zero has rate 0."""
    base, corpus = made
    schedule = {"kind": "cosine", "warmup_fraction": 0.0, "end_fraction": 0.0}
    full = tiny.recipe(base, corpus, tmp_path, adapter={"kind": "none"}, embeddings={}, schedule=schedule)
    full["optim"] = {"lr": 1e-9}
    assert train(full, StopAfter(10)) == 75
    assert train(full) == 0  # its first two updates are the last two of the schedule
    checks = json.loads((tmp_path / "tiny/contract.json").read_text())["checks"]
    assert [check["passed"] for check in checks if "moment" in check["name"]] == [True]


def test_rows_of_rare_tokens_are_watched_and_reported(made, tmp_path, monkeypatch):
    """No gradient of the embeddings in the first two updates: watched, reached later, recorded as such."""
    keep = SingleEngine._keep

    def late(self, name):
        kept = keep(self, name)

        def delayed(parameter):
            if name.endswith("embed_tokens.weight") and self._adam.steps < 4:
                parameter.grad.zero_()
            kept(parameter)

        return delayed

    monkeypatch.setattr(SingleEngine, "_keep", late)
    monkeypatch.setattr("dist_cpt.train.contract._may_wait", lambda name, groups, config: "embed_tokens" in name)
    assert train(tiny.recipe(*made, tmp_path)) == 0
    checks = json.loads((tmp_path / "tiny/contract.json").read_text())["checks"]
    assert [check["passed"] for check in checks if "reached by the data" in check["name"]] == [True]
