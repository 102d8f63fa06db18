"""The runs of a sweep, and a runner that trains each of them in its own process."""

import math
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from data_prep.errors import InputError
from data_prep.files import read_json
from ddp_trainer.distributed.launch import Launch
from ddp_trainer.distributed.signals import SAME_REQUEST_SECONDS, on_request_to_stop
from ddp_trainer.run.lock import wait_until_unlocked


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep, finished or not."""

    arguments: list[str]  # the trainer's arguments, without --out and --resume
    out: Path  # its run directory
    label: str  # its settings that the sweep varies, without the seed

    @property
    def is_finished(self) -> bool:
        """Raises InputError if the run directory cannot be read."""
        try:
            return (self.out / "summary.json").exists()
        except OSError as error:
            raise InputError(f"{self.out} cannot be read ({error.strerror}); choose another --out") from None

    @property
    def is_complete(self) -> bool:
        """Whether the run is finished and its status is `done`, so nothing is left to write."""
        return self.is_finished and (read_json(self.out / "status.json") or {}).get("state") == "done"


class Runner:
    """Trains runs until it is asked to stop.

    Signals to this process are passed on to the launcher of the current run. While no launcher runs, a second signal
    ends this process at once.
    """

    def __init__(self, launcher: list[str]) -> None:
        self.launcher, self.stopped, self._stopped_at = launcher, False, math.inf
        self._process: subprocess.Popen | None = None
        on_request_to_stop(self._pass_on)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        if not self.stopped:
            self.stopped, self._stopped_at = True, time.monotonic()
        if self._process is not None:
            self._process.send_signal(number)
        elif time.monotonic() - self._stopped_at > SAME_REQUEST_SECONDS:
            sys.exit(128 + number)

    def train(self, run: PlannedRun, *, group: str) -> None:
        """Trains `run`, and returns when it is finished, has failed or was stopped. Sets `stopped` if it was stopped.

        `group`: the W&B group of the run, unless the environment variable WANDB_RUN_GROUP names another one.
        """
        environment = {"WANDB_RUN_GROUP": group, **os.environ}
        environment.pop("WANDB_RUN_ID", None)  # each run needs an id of its own
        command = [*self.launcher, "ddp_trainer.train", *run.arguments, "--out", str(run.out), "--resume"]
        process = self._process = subprocess.Popen(command, env=environment)
        if self.stopped:  # the signal arrived before the process was started
            process.terminate()
        status = process.wait()
        self._process = None
        if self.stopped:  # the launcher may have ended before the run has saved a checkpoint
            wait_until_unlocked(run.out)
        if status == 0 and not run.is_finished:  # the run itself received a signal and stopped
            self.stopped = True


def count_processes(launcher: list[str]) -> int:
    """Starts this module with the launcher, and returns the number of processes that the launcher starts.

    Raises InputError if it does not start any.
    """
    try:
        started = subprocess.run(
            [*launcher, "ddp_trainer.run.sweep_runs"], text=True, errors="replace", capture_output=True
        )
    except OSError as error:
        raise InputError(f"--launcher {shlex.join(launcher)} cannot be started: {error.strerror}") from None
    world_size = re.search(r"^world_size=(\d+)$", started.stdout, flags=re.MULTILINE)
    if world_size is None:
        reason = (started.stderr.strip().splitlines() or [f"exit status {started.returncode}"])[-1]
        raise InputError(f"--launcher {shlex.join(launcher)} does not start a process: {reason}")
    return int(world_size[1])


if __name__ == "__main__":  # `count_processes` starts this through the launcher
    print(f"world_size={Launch.from_environment().world_size}")
