"""The status of a run for a terminal."""

from __future__ import annotations

from dist_cpt.errors import printable
from dist_cpt.report.values import duration, epochs, percent
from dist_cpt.run_folder.names import BAD_NODES
from dist_cpt_launch.status import Status, outcome

MAX_RANKS = 8
MAX_RESTARTS = 5


def as_text(status: Status) -> str:
    """One line per fact; control characters in the files' content are escaped."""
    rows = [("run", f"{status.name}  {status.folder}"), ("state", status.summary)]
    if status.queue:
        rows.append(("queue", status.queue))
    if status.scheduler:
        rows.append(("scheduler", status.scheduler))
    if status.bad_nodes:
        rows.append(("excluded", f"nodes {', '.join(status.bad_nodes)} ({BAD_NODES})"))
    if status.step is not None:
        total = f" of {status.num_steps}" if status.num_steps else ""
        loss = f", loss {status.loss:.4f}" if status.loss is not None else ""
        rows.append(("step", f"{status.step}{total}{loss}"))
    for ledger in status.sources:
        of = "" if ledger.planned_epochs is None else f" of {epochs(ledger.planned_epochs)}"
        read = "" if ledger.epochs is None else f", {epochs(ledger.epochs)}{of} epochs"
        share = f"{percent(ledger.given)} ({percent(ledger.asked)} asked)"
        rows.append((f"source {ledger.name}", f"{share}{read}, {ledger.tokens:,} tokens"))
    if status.tokens_per_second is not None:
        eta = f", {duration(status.eta_seconds)} of steps left" if status.eta_seconds is not None else ""
        rows.append(("speed", f"{status.tokens_per_second:,.0f} tokens/s{eta}"))
    if (goodput := status.goodput) is not None:
        parts = f"{duration(goodput.redone)} redone, {duration(goodput.saving)} waiting for saves"
        steps = f"{duration(goodput.productive)} of steps in {duration(goodput.wall)}"
        rows.append(("goodput", f"{goodput.fraction:.1%}: {steps} ({parts})"))
    rows.append(("restarts", str(len(status.restarts))))
    for end in status.restarts[-MAX_RESTARTS:]:
        rows.append(("", f"attempt {end.attempt}: {outcome(end.code)}{f', {end.reason}' if end.reason else ''}"))
    rows.append(("checkpoint", f"{status.checkpoint or 'none'}: {status.checkpoint_check}"))
    rows.append(("certificate", status.certificate))
    if status.straggler:
        rows.append(("straggler", status.straggler.removeprefix("straggler: ")))
    rows += _rank_rows(status)
    rows += [("problem", problem) for problem in status.problems]
    width = max(len(head) for head, _ in rows)
    return "\n".join(f"{head:<{width}}  {printable(text)}" for head, text in rows)


def _rank_rows(status: Status) -> list[tuple[str, str]]:
    """All ranks, or of many those with the oldest heartbeats."""
    ranks, rows = status.ranks, []
    if len(ranks) > MAX_RANKS:
        ranks = sorted(ranks, key=lambda rank: -rank.age_seconds)[:MAX_RANKS]
    for rank in ranks:
        heartbeat = "ended" if rank.ended else f"heartbeat {rank.age_seconds:.0f} s ago"
        rows.append((f"rank {rank.rank}", f"{rank.host}: step {rank.step}, {rank.phase}, {heartbeat}"))
    num_hidden = len(status.ranks) - len(ranks)
    return [*rows, ("", f"and {num_hidden} ranks with newer heartbeats")] if num_hidden else rows
