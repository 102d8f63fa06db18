"""Kills or freezes one of two ranks, or makes it raise an error: all processes must end in time.

Also tests that an evaluation counts each test image once.
"""

import json
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.soak.nursery import GRACE_SECONDS, RAISES, Job
from tests.soak.outcome import Outcome

TIMEOUT = 10.0  # --process-group-timeout of these runs
LONG = ("--epochs", "2000", "--max-steps", "12000", "--batch-size", "16", "--process-group-timeout", str(TIMEOUT))
HARM = {"killed": signal.SIGKILL, "raises": RAISES, "frozen": signal.SIGSTOP}
PROMISED = {"killed": 40.0, "raises": 40.0, "frozen": TIMEOUT + GRACE_SECONDS + 10}


def broken_ranks(data: Path, folder: Path, times: int, rng: random.Random) -> list[Outcome]:
    return [_broken(fault, data, folder, times, rng) for fault in PROMISED]


def _broken(fault: str, data: Path, folder: Path, times: int, rng: random.Random) -> Outcome:
    promise = f"all processes end within {PROMISED[fault]:.0f} s, with an exit status other than 0"
    outcome = Outcome(f"one of two ranks {'raises an error' if fault == 'raises' else f'is {fault}'}", promise=promise)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for number in range(times):
            out = Path(scratch) / f"run-{number}"
            job = Job(("--data-dir", data, "--out", out, *LONG), out.with_name(f"{out.name}.log"), processes=2)
            metrics = out / "metrics.jsonl"
            training = job.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)  # noqa: B023
            time.sleep(rng.uniform(0, 2))
            victim, survivor = number % 2, 1 - number % 2
            job.ranks[victim].send(HARM[fault])
            started = time.monotonic()
            # A frozen rank cannot end by itself, so nothing is gained by waiting for it.
            codes = job.wait(PROMISED[fault], grace=0.0 if fault == "frozen" else GRACE_SECONDS)
            outcome.took(time.monotonic() - started)
            # The exit status is None if `Job.wait` had to kill the rank. This is acceptable only for the frozen rank,
            # which a real launcher would also have to kill.
            good = training and all(code != 0 for code in codes) and codes[survivor] is not None
            good &= fault == "frozen" or codes[victim] is not None
            outcome.count(good, f"rank {victim} {fault}: {codes}")
    return outcome


def exact_counts(data: Path, folder: Path, world_sizes: Sequence[int]) -> Outcome:
    """Evaluates 40 test images with each number of ranks. By default, these include 3 and 7, which do not divide 40."""
    sizes = ", ".join(map(str, world_sizes))
    outcome = Outcome(f"evaluation with these numbers of ranks: {sizes}", promise="each test image is counted once")
    for size in world_sizes:
        out = folder / f"counted-{size}"
        steps = ("--max-steps", "1", "--batch-size", "84", "--peak-lr", "1e-9")
        codes = Job(("--data-dir", data, "--out", out, *steps), folder / f"counted-{size}.log", processes=size).wait()
        if codes != [0] * size:
            outcome.count(
                False, f"{size} ranks: exit statuses {codes}: {(folder / f'counted-{size}.log').read_text()[-2000:]}"
            )
            continue
        summary = json.loads((out / "summary.json").read_text())
        good = summary["test_total"] == 40 and summary["test_accuracy"] == summary["test_correct"] / 40
        outcome.count(good, f"{size} ranks: {summary}")
    return outcome
