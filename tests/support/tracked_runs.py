"""A training as far as tracking is concerned, in a process of its own: epochs are logged, nothing is trained."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.run_directories import make_run
from tests.support.trainer import environment

KEY = "0123456789" * 4
MARKER = "marker-5e7d1c"


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


# A training as far as tracking is concerned: some epochs, after others where it is resumed.
TRAINING = """
import json, os, sys
from pathlib import Path
from accelerate import PartialState
PartialState(cpu=True)
from ddp_trainer.config import TrackingConfig
from ddp_trainer.tracking.tracker import build_tracker
given = json.loads(sys.argv[1])
tracker = build_tracker(
    TrackingConfig(**given["settings"]), run_dir=Path(given["run_dir"]), config={"settings": {"seed": 7}},
    history=given["history"], state=given["state"])
for record in given["records"]:
    tracker.log_epoch(record)
print(json.dumps(tracker.state()), flush=True)
if given["end"] == "crash":
    os._exit(9)
tracker.finish({"test_accuracy": 0.5} if given["end"] == "complete" else None, failed=given["end"] == "failed")
"""


def track(run_dir: Path, epochs: list[int], **given: Any) -> tuple[dict[str, str], str, int]:
    """-> (tracker's state, stderr, exit code) of a process of its own."""
    if not run_dir.exists():
        make_run(run_dir)
        (run_dir / "model.safetensors").write_bytes(b"weights")
    env = {"NETRC": "/nonexistent", **given.pop("env", {})}
    history = [record(epoch) for epoch in given.pop("history", [])]
    job = {
        "run_dir": str(run_dir),
        "settings": {"wandb": "offline"},
        "state": {},
        "end": "complete",
        "history": history,
        "records": [record(epoch) for epoch in epochs],
        **given,
    }
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, json.dumps(job), f"--secret={MARKER}"],
        capture_output=True,
        text=True,
        env=environment(**env),
        timeout=120,
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stderr, done.returncode


def holds(folder: Path, secret: str) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]
