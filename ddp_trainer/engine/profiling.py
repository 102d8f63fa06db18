"""`--profile N`: traces N training steps with torch's profiler, on the main rank only.

The other ranks do the same work at the same time, so their traces would look the same.
"""

import os
import sys
from pathlib import Path
from typing import Any, Self

from data_prep.errors import warn

WARM_UP_STEPS = 3  # not traced: the first steps also allocate memory and choose kernels, so they are not typical
TRACE = "trace.json.gz"  # for ui.perfetto.dev or chrome://tracing
ROWS = 15


class StepProfiler:
    """Traces training steps after a few warm-up steps. Call `step` after each training step."""

    def __init__(self, profiler: Any, *, steps: int) -> None:
        self._profiler, self._steps_left = profiler, steps

    @classmethod
    def start(cls, steps: int, *, steps_left: int, folder: Path) -> Self | None:
        """Starts a profiler that traces `steps` steps, writes trace.json.gz to `folder` and prints a table on stderr.

        `steps_left`: number of steps that the run still takes. At least one of them is a warm-up step, so fewer than
        `steps` may be traced. Returns None if there is no step to trace. An evaluation between two traced steps is
        traced too.
        """
        active = min(steps, steps_left - 1)
        if active < 1:
            return None
        from torch.profiler import profile, schedule

        warm_up = min(WARM_UP_STEPS, steps_left - active)
        profiler = profile(
            schedule=schedule(wait=0, warmup=warm_up, active=active, repeat=1),
            on_trace_ready=lambda finished: write_profile(finished, active, folder),
        )
        profiler.start()
        return cls(profiler, steps=warm_up + active)

    def step(self) -> None:
        if self._steps_left:
            self._profiler.step()
            self._steps_left -= 1
            if not self._steps_left:
                self._profiler.stop()

    def close(self) -> None:
        """Ends an unfinished trace. Otherwise, torch could not start another trace in this process."""
        if self._steps_left:
            self._steps_left = 0
            self._profiler.stop()


def write_profile(profiler: Any, steps: int, folder: Path) -> None:
    """Writes the trace and prints the table. If this fails, prints a warning; the run continues."""
    temporary = folder / f".{os.getpid()}-{TRACE}"
    try:
        profiler.export_chrome_trace(str(temporary))
        temporary.replace(folder / TRACE)
        print(f"profile of {steps} steps: {folder / TRACE}\n{table(profiler)}", file=sys.stderr, flush=True)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        warn(f"the profile could not be written ({error})")


def table(profiler: Any) -> str:
    """A table of the operations with the largest self time, on the GPU if it was used, otherwise on the CPU."""
    # Host events include the device time of their kernels, so the separate events of these kernels are left out.
    averages = [event for event in profiler.key_averages() if event.device_type.name == "CPU"]
    on_device = any(event.self_device_time_total for event in averages)
    times = {
        event.key: (event.self_device_time_total if on_device else event.self_cpu_time_total, event.count)
        for event in averages
        if not event.key.startswith("ProfilerStep")
    }
    total = max(sum(time for time, _ in times.values()), 1e-9)
    costliest = sorted(times.items(), key=lambda item: -item[1][0])[:ROWS]
    lines = [f"{'share':>7} {'self ms':>10} {'calls':>7}  operation ({'device' if on_device else 'CPU'} time)"]
    lines += [f"{time / total:7.1%} {time / 1e3:10.1f} {calls:7}  {key[:70]}" for key, (time, calls) in costliest]
    return "\n".join(lines)
