"""A run keeps the newest checkpoints. With --validation, it also keeps the most accurate one."""

import json
from pathlib import Path

import pytest

from ddp_trainer.run.checkpoint import list_checkpoints
from tests.support.trainer import NARROW, read_lines, train


@pytest.mark.parametrize(("validation", "keep"), [("0", 1), ("0", 2), ("24", 1)])
def test_the_newest_checkpoints_and_with_validation_the_best_one_are_kept(
    validation: str, keep: int, tiny_dir: Path, tmp_path: Path
) -> None:
    plan = ("--epochs", "5", "--max-steps", "40", "--batch-size", "12", "--bn-momentum", "0.9")
    kept = ("--validation", validation, "--keep-checkpoints", str(keep))
    train("--data-dir", tiny_dir, "--out", tmp_path, *plan, *kept, module=NARROW)
    # With --validation, these are accuracies on the validation images.
    accuracies = {record["step"]: record["test_accuracy"] for record in read_lines(tmp_path / "metrics.jsonl")}
    assert len(accuracies) == 5
    scores = {}
    for checkpoint in list_checkpoints(tmp_path / "checkpoints"):
        facts = json.loads((checkpoint / "manifest.json").read_text())
        scores[facts["step"]] = facts["score"]
    newest = sorted(accuracies)[-keep:]
    if validation == "0":
        assert scores == dict.fromkeys(newest), "accuracy on the test images may decide which checkpoints are kept"
    else:
        best = max(accuracies.values())
        assert best > accuracies[newest[-1]], "the last epoch is the best one, so this test shows nothing"
        assert best in scores.values()
        assert scores == {step: accuracies[step] for step in scores}
        assert newest == sorted(scores)[-keep:]
        assert len(scores) <= keep + 1
