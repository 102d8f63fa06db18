"""Measures the time and the peak memory of a command, including all its processes."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
INTERVAL = 0.05  # seconds between two measurements of memory


class Cost(NamedTuple):
    """The time and memory that a command took."""

    seconds: float  # the number in the last line of the command's output; if there is none, the command's running time
    megabytes: float  # peak of the sum over all its processes; shared memory is counted once


def cost_of(command: Sequence[str | Path], log: Path) -> Cost:
    """Runs `command` and writes its output to `log`. Raises InputError if it fails."""
    started, peak = time.perf_counter(), 0.0
    with log.open("wb") as output:
        words = [str(word) for word in command]
        process = subprocess.Popen(words, cwd=REPOSITORY, stdout=output, stderr=output, start_new_session=True)
        while process.poll() is None:
            peak = max(peak, _session_megabytes(process.pid))
            time.sleep(INTERVAL)
    seconds = time.perf_counter() - started
    lines = log.read_text(errors="replace").splitlines()
    if process.returncode != 0:
        raise InputError(f"{' '.join(words[1:])} failed: {lines[-1] if lines else 'no output'}")
    printed = _number(lines[-1]) if lines else None
    return Cost(seconds if printed is None else printed, peak)


def _session_megabytes(session: int) -> float:
    """Memory of all processes of the session. A page that n processes share counts 1/n for each of them."""
    kilobytes = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[3]) == session:
                kilobytes += _share(stat.parent)
        except (OSError, ValueError):  # the process has ended
            continue
    return kilobytes / 1024


def _share(process: Path) -> int:
    for line in (process / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def _number(line: str) -> float | None:
    try:
        return float(line)
    except ValueError:
        return None
