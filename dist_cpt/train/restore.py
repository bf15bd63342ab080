"""How an attempt gets its state: from the newest valid checkpoint, with proof, or from somebody's adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_cpt.checkpoint.import_peft import start_from
from dist_cpt.checkpoint.load import LoadedCheckpoint, load, newest_valid, require_fit
from dist_cpt.checkpoint.plan_files import owners
from dist_cpt.checkpoint.retention import bring_back, remove_stale_staging, set_aside_after
from dist_cpt.checkpoint.verify import certify
from dist_cpt.config.schema import ContinueFromConfig, RunConfig
from dist_cpt.engines.engine import Engine
from dist_cpt.errors import CheckpointError, NumericsError
from dist_cpt.model.continue_from import Standing, first_document
from dist_cpt.model.load import TrainableModel
from dist_cpt.optim.eight_bit import within_half_step
from dist_cpt.optim.groups import ParamGroup, eight_bit_names
from dist_cpt.run_folder.json_files import read_object, write_object
from dist_cpt.run_folder.manifest import Identity
from dist_cpt.run_folder.metrics import MetricsFile, rewind
from dist_cpt.runtime.collectives import on_every_rank, on_rank_zero
from dist_cpt.runtime.env import ProcessEnv
from dist_cpt.runtime.faults import Faults
from dist_cpt.runtime.log import LOGGER
from dist_cpt.runtime.seed import first_draws
from dist_cpt.train.loop import Progress
from dist_cpt.train.probe import PROBE_BLOCKS, Stream
from dist_cpt.train.saver import Saver
from dist_cpt.training_state import StateKind, TensorSpec

STALE_STAGING_SECONDS = 3600.0
# The replayed loss is the same forward in another summation order: rounding of one token's loss, averaged.
REPLAY_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3, "nf4": 2e-3, "int8": 2e-3}
ROLLBACKS = "rollbacks.json"


@dataclass
class Restorer:
    """Writes into engine, progress and saver what a checkpoint holds. Every method is collective."""

    config: RunConfig
    env: ProcessEnv
    folder: Path
    attempt: int
    engine: Engine
    groups: Sequence[ParamGroup]
    specs: Sequence[TensorSpec]
    identity: Identity
    model: TrainableModel
    schedule: dict[str, Any]
    stream: Stream
    saver: Saver
    metrics: MetricsFile
    progress: Progress
    fault: Faults
    say: Callable[[str], None]

    def restore(self, up_to_step: int | None = None) -> str | None:
        """The newest valid checkpoint into engine and progress, with its certificate; None for a fresh start.

        What the folder holds of later steps belongs to a past that is not this run's any more: it moves aside.
        """
        on_rank_zero("checkpoints", lambda: remove_stale_staging(self.folder, STALE_STAGING_SECONDS))
        found, skipped = newest_valid(self.folder, up_to_step)
        for name, why in skipped:
            LOGGER.warning("checkpoint %s does not hold and is skipped: %s", name, why)
        if found is None:
            if up_to_step is None:
                on_rank_zero("metrics", lambda: rewind(self.folder, -1))
            return None
        self.fault("restore", 0)
        with load(found, verified=True) as checkpoint:
            on_every_rank("checkpoint", lambda: require_fit(checkpoint.manifest, self.specs, self.identity))
            state = checkpoint.state
            self.engine.import_state(checkpoint.read, state.optimizer_steps)
            self._certify(checkpoint)
            self.saver.saved_step, self.saver.parent = state.step, checkpoint.manifest.state_sha256
        self.progress.restore(state)
        on_rank_zero("checkpoints", lambda: self._leave_behind(found, state.step))
        return found.name

    def start_from_adapter(self, chosen: ContinueFromConfig) -> None:
        """Take over somebody's adapter, and prove that it is in effect: the loss with and without it.

        Raises:
            CheckpointError: it changes nothing, or the engine does not compute with it.
        """
        if self.model.standing is not None:
            self._prove_standing(self.model.standing)
            return
        probed = range(PROBE_BLOCKS)
        without = self.stream.probe_loss(probed)  # a new adapter adds zero
        started = start_from(self.engine, chosen, self.specs, self.model, self.config.optim)
        self.progress.optimizer_steps = started.step
        with_it = self.stream.probe_loss(probed)
        proof = {"description": started.description, "sha256": started.sha256, "optimizer_steps": started.step}
        self._record_proof(chosen, proof | {"loss_without": without, "loss_with": with_it})

    def _prove_standing(self, standing: Standing) -> None:
        """An earlier adapter under a new one, which adds zero yet: the engine's loss must be that of their sum."""
        proof: dict[str, Any] = on_rank_zero("earlier adapter", lambda: standing.proof)
        here, expected = self.stream.probe_loss(range(PROBE_BLOCKS)), proof.get("class_loss", proof["loss_with"])
        if not abs(here - expected) <= REPLAY_TOLERANCE[self.config.model.weights] * max(1.0, abs(expected)):
            raise CheckpointError(
                f"{standing.chosen.path}: the loss with this adapter is {expected:.6f}, the engine's is {here:.6f}",
                remedy="this is a defect: the engine does not compute with it",
            )
        if self.config.task != "classify":  # whose new head has no logits without the adapter
            proof |= {"share_in_effect": self._require_share(standing)}
        done = {"fold": "folded into the base", "stack": "frozen under the new adapter"}[standing.chosen.mode]
        if (gap := proof.get("logit_gap_mean")) is not None:
            done += f" (logits off by {gap:.2e} on average through storing the sum in {self.config.model.weights})"
            if gap > proof["logit_effect_mean"]:
                LOGGER.warning("folding into %s moves logits by more than the adapter does", self.config.model.weights)
        said = {"description": f"{standing.earlier.folder}: {len(standing.earlier.lora)} LoRA pairs "
                f"and {len(standing.earlier.vocabulary)} whole matrices {done}"}  # fmt: skip
        said |= {"sha256": standing.earlier.sha256, "mode": standing.chosen.mode, "optimizer_steps": 0}
        self._record_proof(standing.chosen, said | proof | {"loss_of_the_engine": here})

    def _require_share(self, standing: Standing) -> float | None:
        """The share of the adapter's effect on logits that the engine shows; None if there is less than rounding."""
        blocks = [self.stream.loader.batch([at]) for at in range(PROBE_BLOCKS)]
        logits = [self.engine.logits(first_document(block.input_ids, block.cu_seqlens)) for block in blocks]
        share: float | None = on_rank_zero("earlier adapter", lambda: standing.share_in_effect(torch.cat(logits)))
        if share is None:
            LOGGER.warning("%s moves logits by less than rounding: nothing shows it in effect", standing.chosen.path)
        elif not 0.5 < share < 1.5:
            raise CheckpointError(
                f"{standing.chosen.path}: the engine's logits show {share:.2f} of what this adapter does, not 1",
                remedy="this is a defect: the engine does not compute with it",
            )
        return share

    def _record_proof(self, chosen: ContinueFromConfig, proof: dict[str, Any]) -> None:
        """Print and write to continued.json what shows that the adapter is in effect."""
        without, with_it = proof["loss_without"], proof["loss_with"]
        if with_it == without:
            raise CheckpointError(
                f"{chosen.path}: the loss is {without:.6f} with and without this adapter",
                remedy="its matrices are those of an untrained one; take a later checkpoint of it",
            )
        text = f"{proof['description']}; loss on {PROBE_BLOCKS} blocks without it {without:.4f}, with it {with_it:.4f}"
        LOGGER.info("%s", text)  # rank 0's go to the terminal
        on_rank_zero("continued", lambda: write_object(self.folder / "continued.json", proof))

    def roll_back(self) -> None:
        """Go back to the newest checkpoint from before the bad steps, and leave their data out from now on.

        Raises:
            NumericsError: there is none.
        """
        progress = self.progress
        assert progress.bad_since is not None
        bad_step, bad_position = progress.bad_since
        last_step = progress.step
        self.saver.finish()
        progress.skipped_windows = sorted([*progress.skipped_windows, (bad_position, progress.position)])
        windows = {"windows": progress.skipped_windows}
        on_rank_zero("rollback", lambda: write_object(self.folder / ROLLBACKS, windows))
        restored = self.restore(up_to_step=bad_step - 1)
        if restored is None:
            raise NumericsError(
                f"steps {bad_step} to {last_step} were bad, and no checkpoint from before them holds",
                remedy="save more often (checkpoint.every_steps), lower the learning rate, or look at that data",
            )
        text = (
            f"steps {bad_step} to {last_step} were bad: back to {restored}, "
            f"blocks {bad_position} to {progress.skipped_windows[-1][1] - 1} are left out"
        )
        LOGGER.warning("%s", text)
        self.say(text)

    def _leave_behind(self, restored: Path, step: int) -> None:
        for name in set_aside_after(self.folder, step):
            LOGGER.warning("%s is not in the line of %s and was moved to superseded/", name, restored.name)
        bring_back(self.folder, restored, step)
        self.metrics.close()
        rewind(self.folder, step)

    def know_windows(self) -> None:
        """Leave out what rollbacks of earlier attempts left out; the checkpoint they went back to is older.

        Raises:
            CheckpointError: the record of it is damaged.
        """
        known: list[list[int]] = on_rank_zero("rollbacks", self._known_windows)
        self.progress.skipped_windows = [(start, stop) for start, stop in known]

    def _known_windows(self) -> list[list[int]]:
        path = self.folder / ROLLBACKS
        if not path.exists():
            return []
        try:
            return [[int(start), int(stop)] for start, stop in read_object(path)["windows"]]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{path} is damaged: the data that a rollback left out is not known",
                remedy="restore it from a copy, or remove it if the run may see that data again",
            ) from None

    def _certify(self, checkpoint: LoadedCheckpoint) -> None:
        """Prove the restored state; certificate.json holds the proof or the named failure."""
        state, weights = checkpoint.state, self.config.model.weights
        placed = owners(self.specs, self.env.world_size, self.config.adapter.kind == "lora")
        seed, next_step = self.config.seed, state.step + 1
        certificate = certify(
            checkpoint.manifest,
            self.engine.export_state(lambda kind, name: placed[kind, name]),
            next_block_ids=self.stream.next_block_ids(state.position, state.skipped_windows),
            recorded_block_ids=state.next_block_ids,
            replayed_loss=self.stream.probe_loss(state.probe.block_ids),
            recorded_loss=state.probe.loss,
            tolerance=REPLAY_TOLERANCE[weights] * max(1.0, abs(state.probe.loss)),
            facts={
                "random": ([state.random.seed, state.random.step], [seed, state.step]),
                "random_of_every_rank": (
                    [list(draws) for draws in state.random.next_draws],
                    [first_draws(seed, next_step, rank) for rank in range(len(state.random.next_draws))],
                ),
                "schedule": (state.schedule, self.schedule),
            },
            approximate=self._requantised(checkpoint),
        )
        certificate |= {
            "attempt": self.attempt,
            "restored_by": {"engine": self.engine.kind, "world_size": self.env.world_size},
        }
        on_rank_zero("certificate", lambda: write_object(self.folder / "certificate.json", certificate))
        if certificate["verdict"] != "pass":
            raise CheckpointError(
                f"{checkpoint.path.name} was not restored as it was saved: {', '.join(certificate['failed'])} failed",
                remedy="see certificate.json",
            )
        LOGGER.info("resumed from %s, certificate passes", checkpoint.path.name)

    def _requantised(self, checkpoint: LoadedCheckpoint) -> Callable[[StateKind, str, torch.Tensor], bool] | None:
        """Which restored moments may differ from the saved ones: 8-bit ones whose blocks have other borders here."""
        manifest = checkpoint.manifest
        same_place = (manifest.engine, manifest.world_size) == (self.engine.kind, self.env.world_size)
        same_place = same_place and self.engine.kind != "fsdp-hybrid"  # its dp_shard may be another
        eight_bit = eight_bit_names(self.groups, self.config.optim)
        if same_place or not eight_bit:
            return None

        def close(kind: StateKind, name: str, values: torch.Tensor) -> bool:
            if kind == "master" or name not in eight_bit:
                return False
            return within_half_step(kind, values.reshape(-1), checkpoint.read(kind, name, 0, values.numel()))

        return close
