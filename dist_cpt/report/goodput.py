"""Where the wall time of a run went."""

from __future__ import annotations

from dataclasses import dataclass

from dist_cpt.report.values import real, unix_time
from dist_cpt.run_folder.contents import RunFiles
from dist_cpt.run_folder.lineage import inherited_step


@dataclass(frozen=True)
class Goodput:
    """Where the wall time went, in seconds."""

    productive: float  # applied steps
    redone: float  # steps before a resume that were trained again
    saving: float  # training waited for a checkpoint
    wall: float  # from the first start to the end, or to now

    @property
    def fraction(self) -> float:
        return self.productive / self.wall if self.wall > 0 else 0.0

    @property
    def other(self) -> float:
        """Starting, evaluating, queueing and idling."""
        return max(self.wall - self.productive - self.redone - self.saving, 0.0)


def goodput_of(run: RunFiles) -> Goodput | None:
    """From the first event to the last; None without events."""
    times = [written for event in run.events if (written := unix_time(event.get("time"))) is not None]
    if not times:
        return None
    own = run.steps[inherited_step(run.folder) :]
    applied = sum(real(row.get("step_seconds")) or 0.0 for row in own if row.get("skipped") is not True)
    redone = sum(real(row.get("step_seconds")) or 0.0 for row in run.rewound)
    saving = sum(real(event.get("stall_seconds")) or 0.0 for event in run.events if event.get("kind") == "checkpoint")
    return Goodput(applied, redone, saving, max(times) - min(times))
