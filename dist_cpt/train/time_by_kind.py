"""What a trace's events are, and where the time between the first and the last of its steps went."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["GEMM", "attention", "memory-bound", "communication", "host", "idle"]
# Of what runs at once, the first has the time: communication counts where nothing hides it.
WORK: tuple[Kind, ...] = ("attention", "GEMM", "memory-bound", "communication")
KINDS: tuple[Kind, ...] = ("GEMM", "attention", "memory-bound", "communication", "host", "idle")

# By name, since nothing else tells a product from an addition; the first that matches.
_KERNELS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("communication", re.compile(r"nccl|nvshmem|symm_mem|multimem|all_?(gather|reduce|to_?all)|reduce_?scatter", re.I)),
    ("attention", re.compile(r"flash|fmha|sdpa|attention|attn", re.I)),
    ("GEMM", re.compile(r"gemm|gemv|cutlass|nvjet|xmma|cublas|split_?k(?!er)", re.I)),
    ("memory-bound", re.compile("")),
)
_OPERATIONS: tuple[tuple[Kind | None, re.Pattern[str]], ...] = (
    ("communication", re.compile(r"^(gloo:|c10d::)")),
    (None, re.compile(r"^(?!\w+::)|^(torch::)?autograd::")),  # autograd's nodes, annotations
    (None, re.compile(r"^aten::(new_)?empty|_?(view|as_strided|transpose|t|detach|alias|expand|permute|resolve_\w+)$")),
    ("attention", re.compile(r"flash|flex_attention|scaled_dot_product|attention")),
    ("GEMM", re.compile(r"^aten::_?(addmm|mm|bmm|baddbmm|addbmm|mv|addmv|dot|matmul|linear|scaled_mm|int_mm)_?$")),
    ("memory-bound", re.compile("")),
)


class Event(NamedTuple):
    """A kernel, or an operation of the host, and when it ran, in microseconds."""

    name: str
    begin: float
    end: float
    own: float  # without the operations inside it


@dataclass(frozen=True)
class Breakdown:
    """Microseconds from the begin of the first step to the end of the last, each counted once."""

    by_kind: dict[Kind, float]
    communication: float  # with what computation hides
    longest: Sequence[tuple[str, Kind, float, int]]  # name, kind, total, calls; of kernels, or of a CPU's operations

    @property
    def total(self) -> float:
        return sum(self.by_kind.values())


def kind_of(name: str, *, on_gpu: bool) -> Kind | None:
    """The kind of a kernel, or of an operation of a CPU; None: it computes nothing, and its time is the host's."""
    return next(kind for kind, pattern in (_KERNELS if on_gpu else _OPERATIONS) if pattern.search(name))


def breakdown(events: Iterable[Event], steps: Sequence[tuple[float, float]], *, on_gpu: bool) -> Breakdown:
    """The time by kind; `steps` are the (begin, end) in which the host gives the device a step.

    Where nothing runs, the time is the host's inside a step, and idle between steps. Nested events of a CPU are
    counted once, as the first of `WORK` among them.
    """
    first, last = steps[0][0], steps[-1][1]
    kinds: list[tuple[Event, Kind | None]] = [(event, kind_of(event.name, on_gpu=on_gpu)) for event in events]
    known: Sequence[tuple[Event, Kind]] = [(event, kind) for event, kind in kinds if kind and event.end > first]
    if on_gpu:
        last = max([last, *(event.end for event, _ in known)])  # the device is behind the host
    known = [(event, kind) for event, kind in known if event.begin < last]
    changes: list[tuple[float, int, str]] = [(first, 0, ""), (last, 0, "")]
    for begin, end, what in [(e.begin, e.end, kind) for e, kind in known] + [(*step, "host") for step in steps]:
        changes += [(max(begin, first), 1, what), (min(end, last), -1, what)]
    running: Counter[str] = Counter()
    by_kind: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
    communication, before = 0.0, first
    for at, change, what in sorted(changes):
        kind = next((kind for kind in (*WORK, "host") if running[kind] > 0), "idle")
        by_kind[kind] += at - before  # type: ignore[index]
        communication += at - before if running["communication"] > 0 else 0.0
        running[what] += change
        before = at
    return Breakdown(by_kind, communication, _longest(known))


def _longest(known: Sequence[tuple[Event, Kind]], count: int = 5) -> list[tuple[str, Kind, float, int]]:
    seconds: Counter[tuple[str, Kind]] = Counter()
    calls: Counter[tuple[str, Kind]] = Counter()
    for event, kind in known:
        seconds[event.name, kind] += event.own  # type: ignore[assignment]
        calls[event.name, kind] += 1
    return [(name, kind, total, calls[name, kind]) for (name, kind), total in seconds.most_common(count)]


def summary_lines(found: Breakdown, num_steps: int) -> list[str]:
    """The breakdown as a table of one screen, in milliseconds per step."""
    per_step = 1000.0 * num_steps
    lines = [f"  {'':14}   share   ms a step"]
    for kind, time in found.by_kind.items():
        hidden = found.communication - time
        note = f"   and {hidden / per_step:,.1f} behind the rest" if kind == "communication" and hidden > 0 else ""
        lines.append(f"  {kind:14} {100 * time / found.total:6.1f}%  {time / per_step:10,.1f}{note}")
    lines.append(f"  {'together':14} {100:6.1f}%  {found.total / per_step:10,.1f}")
    lines.append("  longest:")
    for name, kind, total, calls in found.longest:
        short = name if len(name) <= 60 else f"{name[:57]}..."
        lines.append(f"  {total / per_step:10,.2f} ms in {calls / num_steps:5.4g} calls a step  {kind:13} {short}")
    return lines
