"""Runs the trainer in one process, in several with the real launcher, or in forked processes. Returns its output."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ddp_trainer.distributed.launch import ONE_MACHINE
from tests.support import forked
from tests.support.processes import wait_until
from tests.support.source import REPOSITORY

# Flags with which `accelerate launch` starts several CPU processes.
SEVERAL = ("--multi_gpu", *ONE_MACHINE)

# A module that runs the trainer with a network so narrow that a step takes milliseconds.
NARROW = "tests.support.workers.narrow_train"

# A flag of the fixture `smoke_run`. Otherwise, BatchNorm would still have nearly its initial statistics after the few
# steps of `smoke`, and the logits would be near 0 in evaluation.
OF_SMOKE_RUN = ("--bn-momentum", "0.9")


class Finished(NamedTuple):
    """A process that has ended."""

    returncode: int
    stdout: str
    stderr: str


SECRET = "environment-value-that-must-not-be-recorded"


def environment(**changes: str) -> dict[str, str]:
    """Returns this process's environment with `changes` and a secret, but without variables of launchers and W&B."""
    unwanted = ("WANDB_", "ACCELERATE_", "TORCHELASTIC_", "SLURM_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "SOME_TOKEN": SECRET, **changes}


def start(
    module: str, *arguments: str | Path, processes: int = 1, env: Mapping[str, str] = {}, cwd: Path | None = None
) -> subprocess.Popen:
    """Starts a module as a real process, or as several processes with the real launcher."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["accelerate.commands.launch", *SEVERAL, "--num_processes", str(processes), "-m"]
    return subprocess.Popen(
        [*launcher, module, *map(str, arguments)],
        env=environment(**env),
        cwd=cwd or REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_epochs(out: Path, process: subprocess.Popen, count: int = 1) -> None:
    """Waits until the run in `out` has recorded `count` epochs, so that the run is no longer starting."""
    record = out / "metrics.jsonl"

    def is_recorded() -> bool:
        assert process.poll() is None, process.communicate()
        return record.exists() and len(record.read_text().splitlines()) >= count

    try:
        wait_until(is_recorded, f"{out} has recorded fewer than {count} epochs", seconds=240, pause=0.005)
    except TimeoutError:
        process.kill()  # otherwise, it would slow the tests that follow
        raise


def run(module: str, *arguments: str | Path, processes: int = 1, timeout: float = 240, **options: Any) -> Finished:
    """Starts a module as `start` does, and waits until it has ended."""
    process = start(module, *arguments, processes=processes, **options)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        pytest.fail(f"{module} did not end within {timeout} s:\n{stdout}\n{stderr}")
    return Finished(process.returncode, stdout, stderr)


def train(*arguments: str | Path, module: str = "ddp_trainer.train", processes: int = 1) -> Finished:
    """Runs `python -m MODULE smoke ...` on the CPU, and asserts that it succeeds.

    If MODULE is NARROW, `fork` runs it.
    """
    words = ("smoke", "--device", "cpu", *arguments)
    finished = fork(*words, processes=processes) if module == NARROW else run(module, *words, processes=processes)
    assert finished.returncode == 0, finished.stderr
    return finished


def fork(*arguments: str | Path, program: str = f"{NARROW}:narrow_main", processes: int = 1) -> Finished:
    """Runs `program` (MODULE:FUNCTION, default: the narrow trainer) in forked processes, which start quickly."""
    with tempfile.TemporaryDirectory() as folder:
        code = forked.run(
            program, [*map(str, arguments)], Path(folder), env=environment(), processes=processes, timeout=240
        )
        stdout, stderr = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
    if code is None:
        pytest.fail(f"{program} did not end within 240 s:\n{stdout}\n{stderr}")
    return Finished(code, stdout, stderr)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
