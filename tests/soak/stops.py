"""Kills runs or sends them signals at random moments, resumes them, and compares them with an uninterrupted run."""

import json
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddp_trainer.distributed.signals import SIGNALS
from tests.soak.nursery import GRACE_SECONDS, Job
from tests.soak.outcome import Outcome
from tests.support.trainer import read_lines

# Four epochs of 4 steps, with an evaluation after each epoch and a checkpoint after every second step.
# --max-steps replaces the limit of the recipe `smoke`, 6 steps, which is too low.
PLAN = (
    "--epochs",
    "4",
    "--max-steps",
    "24",
    "--batch-size",
    "16",
    "--checkpoint-every-steps",
    "2",
    "--ema-decay",
    "0.9",
    "--log-every-steps",
    "3",
    "--validation",
    "24",
)
STOPS_PER_RUN = 5
TOO_LATE = "after the end of the run"
VOLATILE = {"seconds", "images_per_second", "train_seconds", "epoch_seconds"}


class Scene:
    """Starts runs with the same dataset and number of processes. Each must equal `whole`, the uninterrupted run."""

    def __init__(self, data: Path, folder: Path, processes: int, device: str = "cpu") -> None:
        self.data, self.folder, self.processes, self.device = data, folder, processes, device
        self.whole = folder / f"whole-{processes}"
        codes = self.start(self.whole).wait()
        if codes != [0] * processes:
            raise RuntimeError(f"the uninterrupted run failed: {codes}\n{self.log(self.whole).read_text()}")

    def start(self, out: Path) -> Job:
        exact = ("--deterministic",) if self.device == "cuda" else ()
        arguments = ("--data-dir", self.data, "--out", out, "--resume", *PLAN, *exact)
        return Job(arguments, self.log(out), processes=self.processes, device=self.device)

    def log(self, out: Path) -> Path:
        return out.with_name(f"{out.name}.log")


def differences(one: Path, other: Path) -> list[str]:
    """Returns the names of files and parts of the state that differ between two finished runs."""
    ours, theirs = contents(one), contents(other)
    common = ours.keys() & theirs.keys()
    return sorted({*(ours.keys() ^ theirs.keys()), *(name for name in common if _differs(ours[name], theirs[name]))})


def contents(run: Path) -> dict[str, Any]:
    """Returns everything that must be equal in two finished runs, by name."""
    from ddp_trainer.run.checkpoint import list_checkpoints, read_checkpoint

    state = read_checkpoint(list_checkpoints(run / "checkpoints")[0])
    return {
        "model.safetensors": (run / "model.safetensors").read_bytes(),
        "summary.json": json.loads((run / "summary.json").read_text()),
        **{name: read_lines(run / name) for name in ("metrics.jsonl", "steps.jsonl")},
        **{f"state {name}": value for name, value in state.items() if name not in VOLATILE},
    }


def _differs(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        return one.dtype != other.dtype or not torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() != other.keys() or any(_differs(one[k], other[k]) for k in one if k not in VOLATILE)
    if isinstance(one, list):
        return len(one) != len(other) or any(_differs(*pair) for pair in zip(one, other, strict=True))
    return one != other


# A function that starts or resumes a run in a folder and interrupts it once. It returns the kind of interruption, and
# the problem ("" if there is none).
Interruption = Callable[[Scene, Path, random.Random, Outcome], tuple[str, str]]


def killed_runs(scene: Scene, kills: int, rng: random.Random) -> Outcome:
    """Sends SIGKILL to all ranks or to one. About a third of the kills come while a checkpoint is being written."""
    size = "one process" if scene.processes == 1 else f"{scene.processes} processes"
    outcome = Outcome(f"SIGKILL, {size}", promise="the resumed run equals the uninterrupted run")
    return _interrupted_runs(scene, _kill, kills, rng, outcome)


def signalled_runs(scene: Scene, signals: int, rng: random.Random) -> Outcome:
    """Sends the stop signals in turn, each to one random rank."""
    size = "the process" if scene.processes == 1 else f"one of {scene.processes} ranks"
    outcome = Outcome(
        f"a stop signal to {size}",
        promise="a checkpoint is saved, all processes end within 30 s, the resumed run equals the uninterrupted run",
    )
    return _interrupted_runs(scene, _signal, signals, rng, outcome)


def _interrupted_runs(
    scene: Scene, interrupt: Interruption, times: int, rng: random.Random, outcome: Outcome
) -> Outcome:
    """Interrupts each run up to STOPS_PER_RUN times, lets it finish, and compares it with the uninterrupted run.

    An interruption that comes after the end of the run is counted only if a problem is found.
    """
    with tempfile.TemporaryDirectory(dir=scene.folder) as scratch:
        while outcome.tried < times:
            out = Path(scratch) / "run"
            wanted = min(STOPS_PER_RUN, times - outcome.tried)
            stories: list[tuple[str, str]] = []
            while len(stories) < wanted and (not stories or stories[-1][0] != TOO_LATE):
                stories.append(interrupt(scene, out, rng, outcome))
            codes = scene.start(out).wait()
            lost = differences(scene.whole, out) if codes == [0] * scene.processes else [f"exit statuses {codes}"]
            log = scene.log(out).read_text()[-2000:] if lost else ""
            for story, problem in stories:
                if story != TOO_LATE or lost or problem:
                    outcome.count(not lost and not problem, f"{story}: {problem} {lost}; {log}")
            shutil.rmtree(out)
    return outcome


def _kill(scene: Scene, out: Path, rng: random.Random, outcome: Outcome) -> tuple[str, str]:
    job = scene.start(out)
    checkpoints = out / "checkpoints"
    kind = rng.choice(["while a checkpoint is written", "within 1 s of the first output", "within 8 s of the start"])
    if kind == "while a checkpoint is written":
        job.wait_until(lambda: any(checkpoints.glob(".*")))
        time.sleep(rng.uniform(0, 0.01))
    elif kind == "within 1 s of the first output":
        size_before = scene.log(out).stat().st_size if scene.log(out).exists() else 0
        job.wait_until(lambda: scene.log(out).stat().st_size > size_before)
        time.sleep(rng.uniform(0, 1.0))
    else:
        time.sleep(rng.uniform(0, 8.0))
    if not job.running():
        return TOO_LATE, _ended_by_itself(scene, out, job)
    victims = job.ranks if rng.random() < 0.7 else [rng.choice(job.ranks)]  # a whole job, or one rank
    for victim in victims:
        victim.send(signal.SIGKILL)
    started = time.monotonic()
    job.wait(60.0)
    outcome.took(time.monotonic() - started)
    outcome.note(kind)
    return kind, ""


def _signal(scene: Scene, out: Path, rng: random.Random, outcome: Outcome) -> tuple[str, str]:
    """Sends one signal: half of the time shortly after a new checkpoint, half of the time within 4 s of the start."""
    sent = sum(outcome.notes.get(number.name, 0) for number in SIGNALS)
    number, in_the_middle = SIGNALS[sent % len(SIGNALS)], sent % 4 < 2
    before = set(out.glob("checkpoints/step-*"))
    job = scene.start(out)
    if in_the_middle:
        job.wait_until(lambda: bool(set(out.glob("checkpoints/step-*")) - before))
    time.sleep(rng.uniform(0, 0.2 if in_the_middle else 4.0))
    if not job.running():
        return TOO_LATE, _ended_by_itself(scene, out, job)
    rng.choice(job.ranks).send(number)
    started = time.monotonic()
    codes = job.wait(GRACE_SECONDS)
    outcome.took(time.monotonic() - started)
    outcome.note(number.name)
    if codes != [0] * scene.processes:
        return number.name, f"exit statuses {codes}: {scene.log(out).read_text()[-2000:]}"
    state = json.loads((out / "status.json").read_text())["state"]
    if state == "preempted":
        outcome.note("preempted")
        return number.name, saved_at_the_end(out)
    return number.name, "" if state == "done" else f"status {state}"


def _ended_by_itself(scene: Scene, out: Path, job: Job) -> str:
    """Returns the end of the log of a job that has failed without being interrupted; otherwise, ""."""
    return "" if job.wait() == [0] * scene.processes else scene.log(out).read_text()[-2000:]


def saved_at_the_end(out: Path) -> str:
    """Returns "" if the last step before the stop was saved, or if no step was taken; otherwise, the problem."""
    from ddp_trainer.run.checkpoint import list_checkpoints, read_checkpoint

    step = json.loads((out / "status.json").read_text())["step"]
    newest = list_checkpoints(out / "checkpoints")[:1]
    saved = read_checkpoint(newest[0])["step"] if newest else None
    return "" if saved == step or (step == 0 and saved is None) else f"stopped at step {step}, but saved step {saved}"
