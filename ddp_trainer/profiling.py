"""`--profile N`: N training steps under torch's profiler, as a trace file and a table. On the main rank only.

The other ranks do the same work at the same time, so their traces would say the same. Without the flag nothing of this
is in the loop.
"""

import os
import sys
from pathlib import Path
from typing import Any

from data_prep.loader import Batch
from ddp_trainer.engine import Trainer
from ddp_trainer.rundir import RunDirectory

WARM_UP_STEPS = 3  # the first steps allocate and choose kernels: they are not what a training spends its time on
TRACE = "trace.json.gz"  # for ui.perfetto.dev or chrome://tracing
ROWS = 15


def profile_steps(trainer: Trainer, steps: int, run_dir: RunDirectory | None) -> None:
    """Lets the trainer's next steps, after a few that warm up, leave trace.json.gz in `run_dir` and a table on stderr.

    Fewer than `steps` where the rest of the run is shorter, as it may be after a resume; none where only one is left.
    An evaluation that falls between them is traced too.
    Without a run directory, which only the main rank has, nothing is traced.
    """
    left = trainer.last_step - trainer.step
    active = min(steps, left - 1)
    if run_dir is None or active < 1:
        return
    from torch.profiler import profile, schedule

    place = run_dir.path
    warm_up = min(WARM_UP_STEPS, left - active)
    profiler = profile(
        schedule=schedule(wait=0, warmup=warm_up, active=active, repeat=1),
        on_trace_ready=lambda finished: write_profile(finished, active, place),
    )
    train_step, until = trainer.train_step, trainer.step + warm_up + active

    def profiled_step(batch: Batch, epoch: int) -> None:
        train_step(batch, epoch)
        profiler.step()
        if trainer.step == until:
            profiler.stop()
            trainer.train_step = train_step

    profiler.start()
    trainer.train_step = profiled_step


def write_profile(profiler: Any, steps: int, run_dir: Path) -> None:
    """A profile that cannot be written is told and never ends the training."""
    temporary = run_dir / f".{os.getpid()}-{TRACE}"
    try:
        profiler.export_chrome_trace(str(temporary))
        temporary.replace(run_dir / TRACE)
        print(f"profile of {steps} steps: {run_dir / TRACE}\n{table(profiler)}", file=sys.stderr, flush=True)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        print(f"warning: the profile could not be written ({error})", file=sys.stderr, flush=True)


def table(profiler: Any) -> str:
    """The operations with the most time of their own, on the device where it is not the CPU."""
    # Those of the host: each has the device's time of its kernels, which are listed a second time by themselves.
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
