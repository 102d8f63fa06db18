"""Runs commands in stages and records the outcomes. There is a time limit for each stage and one for all of them.

A stage whose time limit exceeds the remaining time is left out. A stage that fails does not stop later ones.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

REPOSITORY = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL for a command that exceeds the time limit of its stage


@dataclass(frozen=True)
class Stage:
    """Commands that run one after another, or all at once if `together`."""

    name: str
    seconds: float  # time limit; the stage starts only if this much time is left
    commands: Sequence[Sequence[str | Path]]
    together: bool = False


@dataclass(frozen=True)
class Outcome:
    """The result of a stage. `detail` names the commands that failed, or says why the stage was left out."""

    name: str
    state: Literal["passed", "failed", "out of time", "left out"]
    seconds: float = 0.0
    detail: str = ""

    def line(self) -> str:
        return f"{self.name:24} {self.state:12} {self.seconds:6.1f} s  {self.detail}".rstrip()


def run_stages(
    stages: Sequence[Stage], logs: Path, *, seconds: float, report: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Runs each stage whose time limit does not exceed what is left of `seconds`.

    After each stage, even if it was left out, calls `report` with all outcomes so far. The output of a stage goes to a
    file in the folder `logs`.
    """
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for stage in stages:
        if deadline - time.monotonic() < stage.seconds:
            outcome = Outcome(stage.name, "left out", detail=f"needs up to {stage.seconds:.0f} s")
        else:
            outcome = run_stage(stage, logs / f"{stage.name.replace(' ', '-')}.log")
        outcomes.append(outcome)
        print(outcome.line(), flush=True)
        report(outcomes)
    return outcomes


def run_stage(stage: Stage, log: Path) -> Outcome:
    """Runs the commands of one stage. Commands that exceed its time limit are killed."""
    started = time.monotonic()
    deadline = started + stage.seconds
    codes: list[int | None] = []
    with log.open("wb") as output:
        groups = [stage.commands] if stage.together else [[command] for command in stage.commands]
        for group in groups:
            if time.monotonic() >= deadline:
                codes += [None] * len(group)
                continue
            running = [_start(command, output) for command in group]
            try:
                codes += [_wait(process, deadline) for process in running]
            finally:
                for process in running:
                    _end(process)
    results = zip(stage.commands, codes, strict=True)
    failures = [
        f"{_short(command)}: {'out of time' if code is None else f'exit status {code}'}"
        for command, code in results
        if code != 0
    ]
    state = "out of time" if None in codes else "failed" if failures else "passed"
    return Outcome(stage.name, state, time.monotonic() - started, detail=", ".join(failures))


def _start(command: Sequence[str | Path], output: BinaryIO) -> subprocess.Popen:
    words = [str(word) for word in command]
    output.write(f"\n$ {' '.join(words)}\n".encode())
    output.flush()
    return subprocess.Popen(
        words, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )


def _wait(process: subprocess.Popen, deadline: float) -> int | None:
    """Exit status of the process, or None if it is still running at the deadline."""
    try:
        return process.wait(max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen) -> None:
    """Ends the process and its children. SIGTERM comes first, so that a launcher can end the processes it started."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _short(command: Sequence[str | Path]) -> str:
    """The module or program of a command, and the word after it."""
    words = [str(word) for word in command]
    start = len(words) - words[::-1].index("-m") if "-m" in words else 0
    return " ".join(words[start : start + 2])
