"""Except with fp16, a non-finite loss ends the run. The images of the step are listed; earlier checkpoints are kept."""

import json
from pathlib import Path

import pytest

from tests.support.trainer import NARROW, fork, train

POISONED = "tests.support.workers.poisoned_train:main"


@pytest.mark.parametrize("processes", [1, 2])
def test_nan_loss_of_one_image_ends_the_run_and_is_reported(tiny_dir: Path, tmp_path: Path, processes: int) -> None:
    """The NaN occurs only on the last rank, in step 5, right after the checkpoint of step 4."""
    out = tmp_path / "run"
    plan = ("--batch-size", "15", "--epochs", "2", "--max-steps", "12", "--checkpoint-every-steps", "2")
    arguments = (*plan, "--data-dir", tiny_dir, "--out", out)
    finished = fork("5", "smoke", "--device", "cpu", *arguments, program=POISONED, processes=processes)
    assert finished.returncode == 1, finished.stderr
    assert "not finite at step 5" in finished.stderr
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["saved_step"]) == ("failed", 4)
    report = json.loads((out / "crash" / "step-00000005.json").read_text())
    assert [len(rank["samples"]) for rank in report["ranks"]] == ([15] if processes == 1 else [7, 8])
    bad = [
        (rank, place)
        for rank, images in enumerate(report["ranks"])
        for place, loss in enumerate(images["losses"])
        if loss is None
    ]
    assert bad == [(processes - 1, 1)]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    train(*arguments, "--resume", processes=processes, module=NARROW)
