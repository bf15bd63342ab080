"""Which ranks block a run, from the heartbeats of all of them."""

from __future__ import annotations

from collections.abc import Sequence

from dist_cpt.health.heartbeats import Heartbeat, process_state

NAMED_RANKS = 8  # in one line


def frozen_ranks(beats: Sequence[Heartbeat], stale_seconds: float) -> list[Heartbeat]:
    """Ranks whose file is more than `stale_seconds` older than the newest, by the clock of the file system."""
    newest = max((beat.written for beat in beats), default=0.0)
    return [beat for beat in beats if not beat.ended and newest - beat.written > stale_seconds]


def culprits(beats: Sequence[Heartbeat], frozen: Sequence[Heartbeat], world_size: int) -> str:
    """The ranks that block the rest, in one line: frozen or silent, else cut off, else behind, else where all wait."""
    newest = max((beat.written for beat in beats), default=0.0)
    silent = sorted(set(range(world_size)) - {beat.rank for beat in beats})
    dead = [f"{_named([beat])} is {_condition(beat)}, silent for {newest - beat.written:.0f} s" for beat in frozen]
    if silent:
        dead.append(f"no heartbeat from rank {_short([str(rank) for rank in silent])}")
    if dead:
        return _short(dead)
    cut_off = [beat for beat in beats if beat.network]
    if cut_off:
        return "the network is cut: " + _short([f"{_named([beat])} {beat.network}" for beat in cut_off])
    last = max(beat.step for beat in beats)
    behind = [beat for beat in beats if beat.step < last]
    if behind:
        return f"behind the others, which are at step {last}: {_places(behind)}"
    return f"all ranks wait in the same step {last}: {_places(beats)}"


def _places(beats: Sequence[Heartbeat]) -> str:
    """Ranks by where their main thread is, the rarest place first: it is usually the cause."""
    places: dict[str, list[Heartbeat]] = {}
    for beat in beats:
        places.setdefault(f"{beat.phase} at step {beat.step}, in {beat.at}", []).append(beat)
    rarest_first = sorted(places.items(), key=lambda item: len(item[1]))
    return _short([f"{_named(there)} {place}" for place, there in rarest_first])


def _condition(beat: Heartbeat) -> str:
    state = process_state(beat)
    return f"frozen or dead{'' if state is None else f' ({state})'} at step {beat.step} ({beat.phase})"


def _named(beats: Sequence[Heartbeat]) -> str:
    return "rank " + _short([f"{beat.rank} (host {beat.host}, pid {beat.pid})" for beat in beats])


def _short(parts: Sequence[str]) -> str:
    rest = len(parts) - NAMED_RANKS
    return "; ".join(parts[:NAMED_RANKS]) + (f" and {rest} more" if rest > 0 else "")
