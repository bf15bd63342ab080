"""A run continues what a Hugging Face Trainer began: its weights, and AdamW's moments by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_cpt.checkpoint.import_peft import canonical_key
from dist_cpt.engines.single import SingleEngine
from dist_cpt.errors import CheckpointError, ConfigError
from tests.contract.model import SEQ_LEN, VOCAB, block, save_base
from tests.peft_adapter import BOTH, peft_model, recipe, started, state_of
from tests.ranks import RankPool

STEPS = 4
HEAD = "base_model.model.lm_head.weight"


@dataclass(frozen=True)
class Trained:
    """A Trainer's run of four steps, saved at the second, and its optimizer's live state at that moment."""

    base: str
    folder: Path  # checkpoint-2
    live: dict[str, torch.Tensor]  # kind.name -> values
    lora: dict[str, Any]

    def recipe(self, optimizer: bool = True, **changes: Any) -> Any:
        trained = {"train": list(self.lora.get("modules_to_save") or ())}
        adapter = {"rslora": bool(self.lora.get("use_rslora"))}
        return recipe(self.base, self.folder, optimizer, embeddings=trained, adapter=adapter, **changes)


def run_trainer(
    base: str, out: Path, optimizer: Callable[[Any], torch.optim.Optimizer] | None = None, **lora: Any
) -> Trained:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = peft_model(base, scatter=False, **lora)
    rows = [torch.arange(start, start + SEQ_LEN) % 23 for start in range(32)]  # something to learn
    live: dict[str, torch.Tensor] = {}

    class Watch(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step != 2:
                return
            inner = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    known = canonical_key(name)
                    live[f"master.{known}"] = parameter.detach().clone()
                    for kind in ("exp_avg", "exp_avg_sq"):
                        live[f"{kind}.{known}"] = inner.state[parameter][kind].clone()

    trainer = Trainer(
        model,
        TrainingArguments(
            str(out),
            max_steps=STEPS,
            save_strategy="steps",
            save_steps=2,
            learning_rate=5e-3,
            per_device_train_batch_size=4,
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_strategy="no",
            disable_tqdm=True,
            seed=1,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[Watch()],
        optimizers=(None if optimizer is None else optimizer(model), None),
    )
    trainer.train()
    return Trained(base, out / "checkpoint-2", live, lora)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("base"))
    save_base(folder, {})
    return folder


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Both vocabulary matrices beside LoRA, all in one parameter group."""
    return run_trainer(base, tmp_path_factory.mktemp("trained"), modules_to_save=BOTH)


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Trained:
    folder = Path(shutil.copytree(trained.folder, tmp_path / "checkpoint-2"))
    return Trained(trained.base, folder, trained.live, trained.lora)


def require_taken_over(trained: Trained) -> None:
    engine, _, begun = started(trained.recipe())
    state = state_of(engine)
    assert begun.step == 2
    assert "AdamW's moments after 2 steps" in begun.description
    assert state.keys() == trained.live.keys()
    for key, value in trained.live.items():
        assert torch.equal(state[key], value), key
    assert all(state[key].any() for key in state)


def test_moments_come_over_by_name(trained: Trained) -> None:
    require_taken_over(trained)


def test_a_tensor_that_does_not_arrive_is_found(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of many: the loss with and without the adapter differs all the same."""
    whole = SingleEngine.import_state

    def without_the_head(engine: SingleEngine, read: Any, step: int) -> None:
        whole(engine, lambda kind, name, a, b: read(kind, name, a, b) * (name != HEAD), step)

    monkeypatch.setattr(SingleEngine, "import_state", without_the_head)
    with pytest.raises(CheckpointError, match=rf"1 of \d+ tensors .*{HEAD}"):
        started(trained.recipe())


def test_the_weights_alone_come_with_a_fresh_optimizer(trained: Trained) -> None:
    engine, _, begun = started(trained.recipe(optimizer=False))
    state = state_of(engine)
    assert begun.step == 0
    assert torch.equal(state[f"master.{HEAD}"], trained.live[f"master.{HEAD}"])
    assert not any(value.any() for key, value in state.items() if not key.startswith("master."))


def test_lora_alone_with_rslora(base: str, tmp_path: Path) -> None:
    require_taken_over(run_trainer(base, tmp_path, use_rslora=True))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_base(tmp_path: Path) -> None:
    save_base(str(tmp_path / "base"), {"tie_word_embeddings": True})
    tied = run_trainer(str(tmp_path / "base"), tmp_path / "out", modules_to_save=BOTH, ensure_weight_tying=True)
    assert f"master.{HEAD}" not in tied.live, "one tensor"
    require_taken_over(tied)


def test_a_group_of_its_own_for_the_vocabulary(base: str, tmp_path: Path) -> None:
    """As where the embeddings have their own learning rate: names that end in modules_to_save.default.weight."""

    def two_groups(model: Any) -> torch.optim.Optimizer:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        apart = [name.endswith("modules_to_save.default.weight") for name, _ in named]
        return torch.optim.AdamW(
            [
                {"params": [p for (_, p), own in zip(named, apart, strict=True) if not own], "lr": 5e-3},
                {"params": [p for (_, p), own in zip(named, apart, strict=True) if own], "lr": 5e-4},
            ],
            weight_decay=0.0,
        )

    require_taken_over(run_trainer(base, tmp_path, two_groups, modules_to_save=BOTH))


@pytest.mark.parametrize(
    "engine", [{"kind": "fsdp", "shard": "full"}, {"kind": "zero", "stage": 3}], ids=["fsdp", "zero"]
)
def test_every_rank_reads_its_part(trained: Trained, engine: dict[str, Any], ranks: RankPool) -> None:
    answers = ranks.run("tests.peft_adapter:on_ranks", base=trained.base, path=str(trained.folder), engine=engine)
    assert [step for step, _ in answers] == [2, 2]
    for key, value in trained.live.items():
        assert torch.equal(answers[0][1][key], value), key


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


# -- refusals --------------------------------------------------------------------------------------------------------


def refused(trained: Trained, **changes: Any) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        started(trained.recipe(**changes))
    line = str(caught.value)
    print(line)
    assert "\n" not in line
    assert "continue_from: PATH" in line
    return line


def change_optimizer(trained: Trained, change: Callable[[dict[str, Any]], object]) -> None:
    path = trained.folder / "optimizer.pt"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def test_a_hostile_optimizer_is_not_executed(copied: Trained, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    change_optimizer(copied, lambda content: content.update(state=Payload(marker)))
    assert "optimizer.pt" in refused(copied)
    assert not marker.exists()
    torch.load(copied.folder / "optimizer.pt", weights_only=False)
    assert marker.exists(), "the payload works"


def test_other_pickles_of_the_folder_are_never_opened(copied: Trained) -> None:
    for name in ("training_args.bin", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        assert (copied.folder / name).exists()
        (copied.folder / name).write_bytes(b"\x80\x04 not a pickle")
    require_taken_over(copied)


def exchange(content: dict[str, Any], pairs: list[tuple[int, int]]) -> None:
    state = content["state"]
    for left, right in pairs:
        state[left], state[right] = state[right], state[left]


LAYER = 14  # LoRA matrices of one layer: A and B of q, k, v, o, gate, up, down
FIRST = 1  # behind the embedding


@pytest.mark.parametrize(
    ("pairs", "shape"),
    [
        pytest.param(
            [(FIRST + LAYER * i + 2 + j, FIRST + LAYER * i + 4 + j) for i in (0, 1) for j in (0, 1)], "k_proj", id="kv"
        ),
        pytest.param([(FIRST + j, FIRST + LAYER + j) for j in range(LAYER)], "", id="layers"),
    ],
)
def test_moments_in_another_order_are_seen(copied: Trained, pairs: list[tuple[int, int]], shape: str) -> None:
    change_optimizer(copied, lambda content: exchange(content, pairs))
    line = refused(copied)
    assert shape in line


def test_embedding_and_head_that_changed_places_are_seen(copied: Trained) -> None:
    change_optimizer(copied, lambda content: exchange(content, [(0, FIRST + 2 * LAYER)]))
    assert "the moments of embedding and head may have changed places" in refused(copied)


def eight_bit(content: dict[str, Any]) -> None:
    for entry in content["state"].values():
        entry.clear()
        entry.update(step=2, state1=torch.zeros(3, dtype=torch.uint8), absmax1=torch.ones(1))


def without_decay(content: dict[str, Any]) -> None:
    first, second = content["param_groups"][:2]
    second["params"], first["params"] = first["params"][20:], first["params"][:20]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (eight_bit, "(absmax1, state1, step)"),
        (without_decay, "[20, 10] tensors, expected 30, or 28 and 2"),
        (lambda c: c["state"].pop(3), "base_model.model.model.layers.0.self_attn.k_proj.lora_A"),
        (lambda c: exchange(c, [(1, 2)]), "q_proj.lora_A.weight has shape [30, 8], expected [8, 30]"),
        (lambda c: c["state"][3].update(step=torch.tensor(7.0)), "(2 to 7)"),
        (lambda c: c["state"][3].update(step=torch.tensor(1.5)), "1.5"),
        (lambda c: c["state"][3].update(exp_avg="x"), "exp_avg of base_model"),
        (lambda c: c["state"][3].pop("exp_avg_sq"), "(exp_avg, step)"),
        (lambda c: c["param_groups"][0].update(amsgrad=True), "amsgrad"),
        (lambda c: c["param_groups"].clear(), "AdamW"),
        (lambda c: c["state"].update({99: {}}), "31 tensors, 30 "),
    ],
)
def test_an_optimizer_that_does_not_fit(copied: Trained, change: Any, expected: str) -> None:
    change_optimizer(copied, change)
    assert expected in refused(copied)


def test_moments_that_are_not_finite(copied: Trained) -> None:
    change_optimizer(copied, lambda c: c["state"][0]["exp_avg_sq"].fill_(float("inf")))
    with pytest.raises(CheckpointError, match=r"exp_avg_sq of .*embed_tokens\.weight "):
        started(copied.recipe())


def test_a_cut_optimizer_and_other_betas(copied: Trained) -> None:
    assert "optim.betas: [0.9, 0.999]" in refused(copied, optim={"betas": [0.9, 0.95]})
    path = copied.folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-500])
    assert "optimizer.pt" in refused(copied)


def test_the_first_step_uses_the_moments(trained: Trained) -> None:
    """One step with zero gradients of LoRA would stand still without momentum: AdamW moves by the imported one."""
    engine, _, _ = started(trained.recipe(optim={"weight_decay": 0.0, "max_grad_norm": 1e-12}))
    before = state_of(engine)
    batch = block(1, 0)
    engine.accumulate(batch, batch.num_targets, True)
    engine.step({"adapter": 1e-3, "embeddings": 1e-3})
    after = state_of(engine)
    for name in (key.removeprefix("master.") for key in before if key.startswith("master.")):
        first, second = (before[f"{kind}.{name}"].double() for kind in ("exp_avg", "exp_avg_sq"))
        mean, square = 0.9 * first / (1 - 0.9**3), 0.999 * second / (1 - 0.999**3)
        expected = before[f"master.{name}"].double() - 1e-3 * mean / (square.sqrt() + 1e-8)
        torch.testing.assert_close(after[f"master.{name}"].double(), expected, rtol=0, atol=2e-7)
    assert before[f"master.{HEAD}"].shape[0] == VOCAB
