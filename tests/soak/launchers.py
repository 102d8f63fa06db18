"""Sends a signal to a real launcher or to one of its workers: a checkpoint must be saved and all processes must end."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ddp_trainer.distributed.launch import ONE_MACHINE
from ddp_trainer.distributed.signals import SIGNALS
from tests.soak.nursery import GRACE_SECONDS
from tests.soak.outcome import Outcome
from tests.soak.stops import PLAN, saved_at_the_end
from tests.support.processes import becomes_true, processes_with, read
from tests.support.trainer import NARROW, REPOSITORY, SEVERAL, environment

ALONE = ("--num_processes", "1", "--cpu", *ONE_MACHINE)
LAUNCHERS = {
    "accelerate launch with one process": ("accelerate.commands.launch", *ALONE, "-m"),
    "accelerate launch with two processes": ("accelerate.commands.launch", *SEVERAL, "--num_processes", "2", "-m"),
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"),
}


def launch(launcher: str, data: Path, out: Path) -> subprocess.Popen:
    with out.with_name(f"{out.name}.log").open("a") as log:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                *LAUNCHERS[launcher],
                NARROW,
                "smoke",
                "--device",
                "cpu",
                "--data-dir",
                str(data),
                "--out",
                str(out),
                "--resume",
                *PLAN,
            ],
            cwd=REPOSITORY,
            env=environment(OMP_NUM_THREADS="1"),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def workers(out: Path) -> list[int]:
    """Returns the process ids of the training processes of the run in `out`, without the launcher."""
    launchers = [module.encode() for module, *_ in LAUNCHERS.values()]
    found = processes_with(f"-m\0{NARROW}\0", f"\0{out}\0")  # whole words, because run-1 must not match run-10
    commands = {pid: read(pid, "cmdline") for pid in found}
    return [pid for pid, command in commands.items() if command and not any(module in command for module in launchers)]


def signalled_launchers(data: Path, folder: Path, times: int, rng: random.Random) -> Outcome:
    outcome = Outcome(
        "a stop signal to a launcher or its worker", promise="a checkpoint is saved, and all processes end within 30 s"
    )
    names = list(LAUNCHERS)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for number in range(times):
            out = Path(scratch) / f"run-{number}"
            problem = signal_launcher(names[number % len(names)], data, out, rng, outcome)
            outcome.count(not problem, problem)
    return outcome


def signal_launcher(launcher: str, data: Path, out: Path, rng: random.Random, outcome: Outcome) -> str:
    """Starts a run with `launcher`, sends one signal, and returns the problem, or "" if there is none."""
    process = launch(launcher, data, out)
    try:
        saved = out / "checkpoints" / "step-00000002"
        if not becomes_true(saved.exists, 240, running=lambda: process.poll() is None):
            return f"{launcher}: no checkpoint\n{_tail(out)}"
        number = rng.choice(SIGNALS)
        target, victim = rng.choice([("the launcher", process.pid), ("a worker", rng.choice(workers(out)))])
        os.kill(victim, number)
        outcome.note(f"{number.name} to {target} ({launcher})")
        started = time.monotonic()
        gone = becomes_true(lambda: process.poll() is not None and not workers(out), GRACE_SECONDS)
        outcome.took(time.monotonic() - started)
        status = json.loads((out / "status.json").read_text())
        if not gone or status["state"] not in ("preempted", "done"):
            return f"{number.name} to {target} ({launcher}): ended in time: {gone}, status: {status}\n{_tail(out)}"
        return saved_at_the_end(out)
    finally:
        for pid in [*workers(out), process.pid]:
            if pid != process.pid or process.poll() is None:
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _tail(out: Path) -> str:
    return out.with_name(f"{out.name}.log").read_text()[-2000:]
