"""Starts a process that logs steps and epochs like a run, but does not train."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.run_directories import make_run
from tests.support.trainer import environment

KEY = "0123456789" * 4  # an API key of the length that W&B expects
MARKER = "marker-5e7d1c"  # a secret on the command line of the process


def record(epoch: int) -> dict[str, float | int]:
    return {
        "epoch": epoch,
        "step": 3 * epoch,
        "train_loss": 2.0 / epoch,
        "train_accuracy": 0.1 * epoch,
        "test_loss": 1.5 / epoch,
        "test_accuracy": 0.9 if epoch == 2 else 0.5,
        "test_correct": 5,
        "test_total": 10,
        "learning_rate": 0.1,
        "seconds": 1.5,
        "images_per_second": 100.0,
    }


def step_record(step: int) -> dict[str, float | int]:
    return {"epoch": (step + 2) // 3, "step": step, "learning_rate": 0.1, "train_loss": 1 / step, "train_accuracy": 0.5}


# `records`: for each epoch, the records of its steps and of the epoch itself. `history`: the epochs that were logged
# before a resume.
RUN = """
import json, os, sys
from pathlib import Path
from ddp_trainer.config import TrackingConfig
from ddp_trainer.tracking.tracker import build_tracker
given = json.loads(sys.argv[1])
tracker = build_tracker(
    TrackingConfig(**given["settings"]), run_dir=Path(given["run_dir"]), config={"settings": {"seed": 7}},
    history=given["history"], step=given["step"], state=given["state"])
for steps, record in given["records"]:
    for step in steps:
        tracker.log_step(step)
    if record:
        tracker.log_epoch(record)
print(json.dumps(tracker.state()), flush=True)
if given["end"] == "crash":
    os._exit(9)
tracker.finish({"test_accuracy": 0.5} if given["end"] == "complete" else None, failed=given["end"] == "failed")
"""


def track(run_dir: Path, epochs: list[int], **given: Any) -> tuple[dict[str, str], str, int]:
    """Runs `RUN` in a new process. Returns (state of the tracker, stderr, exit status).

    Each epoch has three steps, with a step record after the second and the third. `given`: `env` and `cwd` of the
    process, and inputs of `RUN` that replace the defaults below.
    """
    if not run_dir.exists():
        make_run(run_dir)
        (run_dir / "model.safetensors").write_bytes(b"weights")
    cwd = given.pop("cwd", None)
    env = {"NETRC": "/nonexistent", **given.pop("env", {})}
    history = [record(epoch) for epoch in given.pop("history", [])]
    job = {
        "run_dir": str(run_dir),
        "settings": {"wandb": "offline"},
        "state": {},
        "end": "complete",
        "history": history,
        "step": 3 * len(history),
        "records": [([step_record(3 * epoch - 1), step_record(3 * epoch)], record(epoch)) for epoch in epochs],
        **given,
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(job), f"--secret={MARKER}"],
        capture_output=True,
        text=True,
        env=environment(**env),
        cwd=cwd,
        timeout=120,
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stderr, done.returncode


def holds(folder: Path, secret: str) -> list[Path]:
    """Returns the files below `folder` that contain `secret`."""
    return [file for file in folder.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]
