"""W&B as its users expect it: real offline runs, read back from their files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.tracked_runs import KEY, MARKER, holds, record, track
from tests.support.trainer import read_lines
from tests.support.wandb_file import of_kind, read_history, read_records, read_summary


def epochs_in(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of W&B's history that are epochs; the results of a complete run are in a row of their own."""
    return [row for row in read_history(run_dir) if "epoch" in row]


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "offline"
    settings = {"wandb": "offline", "wandb_group": "five seeds", "wandb_tags": "jpeg, quick,"}
    env = {"WANDB_JOB_TYPE": "trial", "SOME_TOKEN": MARKER, "WANDB_API_KEY": KEY}
    state, said, code = track(run_dir, [1, 2, 3], env=env, settings=settings)
    assert code == 0
    assert "warning" not in said
    assert state["wandb_run_id"]
    return run_dir


def test_every_epoch_is_in_the_lines_and_in_wandb_once(offline_run: Path) -> None:
    expected = [record(epoch) for epoch in (1, 2, 3)]
    assert read_lines(offline_run / "metrics.jsonl") == expected
    assert epochs_in(offline_run) == expected


def test_wandb_knows_axes_names_settings_and_the_end(offline_run: Path) -> None:
    entries = read_records(offline_run)
    metrics = {metric.name: metric for metric in of_kind(entries, "metric")}
    assert metrics["test_accuracy"].summary.max
    assert {name for name, metric in metrics.items() if metric.step_metric == "epoch"} >= {"test_accuracy", "test_loss"}
    assert {"epoch", "step", "train_loss", "learning_rate"} <= set(metrics)
    run = of_kind(entries, "run")[0]
    assert (run.project, run.display_name, run.run_group) == ("ddp-trainer", "offline", "five seeds")
    assert (run.job_type, list(run.tags)) == ("trial", ["jpeg", "quick"])
    text = b"".join(entry.SerializeToString() for entry in entries)
    assert b'"seed": 7' in text or b'"seed":7' in text
    assert [end.exit_code for end in of_kind(entries, "exit")] == [0]


def test_the_summary_has_the_best_and_the_final_accuracy(offline_run: Path) -> None:
    summary = read_summary(offline_run)
    assert summary["test_accuracy"] == {"max": 0.9}
    assert (summary["best_test_accuracy"], summary["best_epoch"]) == (0.9, 2)
    assert summary["final/test_accuracy"] == 0.5


def test_confusion_matrix_table_and_model_are_those_of_the_files(offline_run: Path) -> None:
    (results,) = [row for row in read_history(offline_run) if "epoch" not in row]
    assert {name.split(".")[0] for name in results} == {"confusion_matrix_table", "misclassified"}
    with np.load(offline_run / "predictions.npz") as found:
        labels, predicted = found["labels"], found["probabilities"].argmax(axis=1)
        wrong = found["wrong_indices"].tolist()
    matrix, table = (
        json.loads(next(offline_run.rglob(f"media/table/{name}_*.table.json")).read_text())
        for name in ("confusion_matrix_table", "misclassified")
    )
    cells = {(true, other): images for true, other, images in matrix["data"]}
    assert cells["kind-3", "kind-5"] == ((labels == 3) & (predicted == 5)).sum()
    assert sum(cells.values()) == len(labels)
    assert table["columns"] == ["image", "true", "predicted", "probability", "sample"]
    assert [row[4] for row in table["data"]] == wrong
    artifacts = of_kind(read_records(offline_run), "artifact")
    files = {one.name.split("-")[-1]: one.manifest.contents for one in artifacts if one.type == "run_table"}
    images = [file for file in files["misclassified"] if file.path.startswith("media/images/")]
    assert len(images) == len(wrong)
    assert all(Path(image.local_path).is_relative_to(offline_run) for image in images), "not in the home folder"
    (model,) = [one for one in artifacts if one.type == "model"]
    assert {file.path: file.local_path for file in model.manifest.contents} == {
        name: str(offline_run / name) for name in ("model.safetensors", "model.json")
    }
    assert set(model.aliases) == {"latest", "final"}


def test_a_real_training_leaves_the_same(smoke_run: Path) -> None:
    assert epochs_in(smoke_run) == read_lines(smoke_run / "metrics.jsonl")
    summary = read_summary(smoke_run)
    complete = json.loads((smoke_run / "summary.json").read_text())
    assert {name: summary[f"final/{name}"] for name in complete} == complete
    assert summary["misclassified._type"] == "table-file"
    artifacts = [artifact.type for artifact in of_kind(read_records(smoke_run), "artifact")]
    assert sorted(artifacts) == ["model", "run_table", "run_table"]


@pytest.mark.parametrize("end", ["crash", "complete"])
def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path, end: str) -> None:
    """Epoch 2 was logged before the end but is not in the checkpoint: it is trained and logged again."""
    run_dir = tmp_path / "run"
    state, _, _ = track(run_dir, [1, 2], end=end)
    again, _, code = track(run_dir, [2, 3], history=[1], state=state)
    assert (again, code) == (state, 0)
    expected = [record(epoch) for epoch in (1, 2, 3)]
    assert read_lines(run_dir / "metrics.jsonl") == expected
    assert epochs_in(run_dir) == expected
    artifacts = [artifact.type for artifact in of_kind(read_records(run_dir), "artifact")]
    assert sorted(artifacts) == ["model", "run_table", "run_table"]


def test_a_run_that_died_before_its_first_checkpoint_keeps_its_id(tmp_path: Path) -> None:
    state, _, _ = track(tmp_path / "run", [1], end="crash")
    again, _, _ = track(tmp_path / "run", [1, 2])
    assert again == state
    assert epochs_in(tmp_path / "run") == [record(1), record(2)]


def test_no_file_holds_a_key_the_environment_or_the_command_line(offline_run: Path) -> None:
    assert holds(offline_run, KEY) + holds(offline_run, MARKER) == []
