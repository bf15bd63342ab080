"""Where the time of a few steps goes: torch's trace of them on rank 0, and a summary of one screen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from dist_cpt.run_folder.names import trace_file
from dist_cpt.train.attempt import RunContext
from dist_cpt.train.time_by_kind import Breakdown, Event, breakdown, summary_lines

_STEP = "dist_cpt step "  # the annotation of a step in the trace


class Profile:
    """Records the steps of `track.profile` on rank 0; does nothing on other ranks, nor at other steps."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._first, self._last = context.config.track.profile or (0, 0)
        if context.env.rank:
            self._last = 0
        self._begun = 0  # the first step that is recorded, later than asked for in a run that resumes among them
        self._torch: profile | None = None

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """While the host gives the device `step`; waits for the device before the first step and after the last."""
        if step > self._last > 0:
            asked = f"steps {self._first} to {self._last}"
            self._context.observers.on_message(f"track.profile: {asked} were trained before this start")
            self._last = 0
        if not self._first <= step <= self._last:
            yield
            return
        if self._torch is None:
            self._torch, self._begun = self._started(), step
        with record_function(f"{_STEP}{step}"):
            yield
        if step == self._last:
            self._finish(self._torch)
            self._torch, self._last = None, 0

    def close(self) -> None:
        """Drop what a run has recorded that ends among the steps."""
        if self._torch is not None:
            self._torch.stop()

    def _started(self) -> profile:
        on_gpu = self._context.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        started = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
        started.start()
        return started

    def _finish(self, recorded: profile) -> None:
        self._context.watchdog.tick("saving", self._last)  # of a trace, which may be large
        try:
            lines = self._summary(recorded)
        except Exception as error:
            lines = [f"track.profile failed: {type(error).__name__}: {error}"]  # it ends no run
        for line in lines:
            self._context.observers.on_message(line)
        self._context.watchdog.tick("training", self._last)

    def _summary(self, recorded: profile) -> list[str]:
        """Write the trace; the lines that say where it is and what is in it."""
        recorded.stop()  # host sync
        target = trace_file(self._context.folder, self._context.env.rank, self._begun, self._last)
        recorded.export_chrome_trace(str(target))
        found = time_of(recorded, on_gpu=self._context.device.type == "cuda")
        steps = f"step {self._last}" if self._begun == self._last else f"steps {self._begun} to {self._last}"
        first = f"profile of {steps} on rank 0: {target} (open it in ui.perfetto.dev)"
        return [first, *summary_lines(found, self._last - self._begun + 1)]


def time_of(recorded: profile, *, on_gpu: bool) -> Breakdown:
    """The time of a trace by kind: of the device, or of the thread that trains on a CPU and of what it waits for."""
    events = list(recorded.events() or ())
    annotations = sorted(
        (event.time_range.start, event.time_range.end, event.thread)
        for event in events
        if event.name.startswith(_STEP) and event.device_type == DeviceType.CPU
    )
    thread, found = annotations[0][2], []
    for event in events:
        if on_gpu:
            wanted = event.device_type != DeviceType.CPU and not event.is_user_annotation
        else:  # gloo's threads annotate what they send
            wanted = event.name.startswith("gloo:") or (event.thread == thread and not event.is_user_annotation)
        if wanted:
            begin, end = event.time_range.start, event.time_range.end
            own = end - begin if on_gpu else event.self_cpu_time_total
            found.append(Event(event.name, begin, end, own))
    return breakdown(found, [(begin, end) for begin, end, _ in annotations], on_gpu=on_gpu)
