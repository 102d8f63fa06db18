"""`--profile N`: N training steps under torch's profiler, as a trace file and a table. On the main rank only.

The other ranks do the same work at the same time, so their traces would look the same. Without the flag, the loop
contains none of this.
"""

import os
import sys
from pathlib import Path
from typing import Any, Self

WARM_UP_STEPS = 3  # the first steps allocate memory and choose kernels, which is not what a run spends its time on
TRACE = "trace.json.gz"  # for ui.perfetto.dev or chrome://tracing
ROWS = 15


class StepProfiler:
    """Traces steps after a few that warm up. Call `step` after each step."""

    def __init__(self, profiler: Any, *, steps: int) -> None:
        self._profiler, self._steps_left = profiler, steps

    @classmethod
    def start(cls, steps: int, *, steps_left: int, folder: Path) -> Self | None:
        """Writes trace.json.gz to `folder` and prints a table on stderr when the last traced step is done.

        Traces fewer than `steps` if the run has fewer left, and returns None if only one is left or `steps` is 0. An
        evaluation between two traced steps is traced too.
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


def write_profile(profiler: Any, steps: int, folder: Path) -> None:
    """Writes the trace and prints the table. A profile that cannot be written is reported and never ends the run."""
    temporary = folder / f".{os.getpid()}-{TRACE}"
    try:
        profiler.export_chrome_trace(str(temporary))
        temporary.replace(folder / TRACE)
        print(f"profile of {steps} steps: {folder / TRACE}\n{table(profiler)}", file=sys.stderr, flush=True)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        print(f"warning: the profile could not be written ({error})", file=sys.stderr, flush=True)


def table(profiler: Any) -> str:
    """The operations that take the most time themselves, on the device if that is not the CPU."""
    # Host events: each has the device time of its kernels, which are listed a second time by themselves.
    averages = [event for event in profiler.key_averages() if event.device_type.name == "CPU"]
    on_device = any(event.self_device_time_total for event in averages)
    times = {
        event.key: (event.self_device_time_total if on_device else event.self_cpu_time_total, event.count)
        for event in averages
        if not event.key.startswith("ProfilerStep")
    }
    total = max(sum(time for time, _ in times.values()), 1e-9)
    costliest = sorted(times.items(), key=lambda item: -item[1][0])[:ROWS]
    lines = [f"{'share':>7} {'own ms':>10} {'calls':>7}  operation ({'device' if on_device else 'CPU'} time)"]
    lines += [f"{time / total:7.1%} {time / 1e3:10.1f} {calls:7}  {key[:70]}" for key, (time, calls) in costliest]
    return "\n".join(lines)
