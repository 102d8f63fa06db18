"""W&B receives all records of a run: the tests read the files that wandb writes in offline mode."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.tracked_runs import KEY, MARKER, holds, record, step_record, track
from tests.support.trainer import NARROW, REPOSITORY, environment, read_lines, run
from tests.support.wandb_file import of_kind, read_history, read_records, read_summary


def epochs_in(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the epoch records in W&B's history. The values of a step record in the same row are left out."""
    rows = [row for row in read_history(run_dir) if "epoch" in row]
    return [{name: value for name, value in row.items() if not name.startswith("step/")} for row in rows]


def steps_in(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the step records in W&B's history, with the prefix `step/` removed from the keys."""
    rows = [row for row in read_history(run_dir) if "step/step" in row]
    return [{name[5:]: value for name, value in row.items() if name.startswith("step/")} for row in rows]


def expected_steps(*epochs: int) -> list[dict[str, Any]]:
    return [step_record(step) for epoch in epochs for step in (3 * epoch - 1, 3 * epoch)]


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "offline"
    env = {"WANDB_JOB_TYPE": "trial", "WANDB_RUN_GROUP": "five seeds", "WANDB_TAGS": "jpeg,quick"}
    secrets = {"SOME_TOKEN": MARKER, "WANDB_API_KEY": KEY}
    state, said, code = track(run_dir, [1, 2, 3], env=env | secrets)
    assert code == 0
    assert "warning" not in said
    assert state["wandb_run_id"]
    return run_dir


def test_every_step_and_epoch_is_recorded_once_in_json_lines_and_in_wandb(offline_run: Path) -> None:
    expected = [record(epoch) for epoch in (1, 2, 3)]
    assert read_lines(offline_run / "metrics.jsonl") == expected
    assert epochs_in(offline_run) == expected
    assert read_lines(offline_run / "steps.jsonl") == expected_steps(1, 2, 3)
    assert steps_in(offline_run) == expected_steps(1, 2, 3)


def test_wandb_receives_axes_names_settings_and_the_exit_status(offline_run: Path) -> None:
    entries = read_records(offline_run)
    metrics = {metric.name: metric for metric in of_kind(entries, "metric")}
    assert metrics["test_accuracy"].summary.max
    assert {name for name, metric in metrics.items() if metric.step_metric == "epoch"} >= {"test_accuracy", "test_loss"}
    assert {"epoch", "step", "step/step", "train_loss", "learning_rate"} <= set(metrics)
    globs = {metric.glob_name: metric.step_metric for metric in of_kind(entries, "metric") if metric.glob_name}
    assert globs == {"step/*": "step/step"}, "the axis of step charts is not the optimizer step"
    run = of_kind(entries, "run")[0]
    assert (run.project, run.display_name, run.run_group) == ("ddp-trainer", "offline", "five seeds")
    assert (run.job_type, list(run.tags)) == ("trial", ["jpeg", "quick"])
    text = b"".join(entry.SerializeToString() for entry in entries)
    assert b'"seed": 7' in text or b'"seed":7' in text
    assert [end.exit_code for end in of_kind(entries, "exit")] == [0]


TWO_RUNS = """
import os, sys, wandb
mine = wandb.init(project="mine", mode="offline", dir=sys.argv[2])
mine.log({"a": 1}, step=500)
import ddp_trainer
for name in ("first", "second"):
    os.environ["WANDB_NAME"] = name
    settings = {"data_dir": sys.argv[1], "wandb": "offline", "device": "cpu", "widths": (4, 4, 4, 4), "max_steps": 1}
    ddp_trainer.train("smoke", out=f"{sys.argv[2]}/run-{name}", **settings)
mine.log({"a": 2})
mine.finish()
"""


def test_a_wandb_run_of_the_caller_stays_open_and_each_run_has_its_own_name(tiny_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWO_RUNS, tiny_dir, tmp_path]
    done = subprocess.run(command, env=environment(), text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for name in ("first", "second"):
        (named,) = of_kind(read_records(tmp_path / f"run-{name}"), "run")
        assert named.display_name == name
        assert [row["step"] for row in read_history(tmp_path / f"run-{name}") if "epoch" in row] == [1]


def test_the_summary_has_the_best_and_the_final_accuracy(offline_run: Path) -> None:
    summary = read_summary(offline_run)
    assert summary["test_accuracy"] == {"max": 0.9}
    assert (summary["best_test_accuracy"], summary["best_epoch"]) == (0.9, 2)
    assert summary["final/test_accuracy"] == 0.5


def test_confusion_matrix_mistakes_and_model_match_the_files_of_the_run(offline_run: Path) -> None:
    (results,) = [row for row in read_history(offline_run) if not {"epoch", "step/epoch"} & set(row)]
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
    assert all(Path(image.local_path).is_relative_to(offline_run) for image in images), "an image is in another folder"
    (model,) = [one for one in artifacts if one.type == "model"]
    assert {file.path: file.local_path for file in model.manifest.contents} == {
        name: str(offline_run / name) for name in ("model.safetensors", "model.json")
    }
    assert set(model.aliases) == {"latest", "final"}


def test_a_real_run_sends_the_records_in_its_files_to_wandb(smoke_run: Path) -> None:
    assert epochs_in(smoke_run) == read_lines(smoke_run / "metrics.jsonl")
    assert steps_in(smoke_run) == read_lines(smoke_run / "steps.jsonl")
    summary = read_summary(smoke_run)
    complete = json.loads((smoke_run / "summary.json").read_text())
    assert {name: summary[f"final/{name}"] for name in complete} == complete
    assert summary["misclassified._type"] == "table-file"
    artifacts = [artifact.type for artifact in of_kind(read_records(smoke_run), "artifact")]
    assert sorted(artifacts) == ["model", "run_table", "run_table"]


@pytest.mark.parametrize("end", ["crash", "complete", "stopped"])
def test_a_resumed_run_continues_in_the_same_wandb_run(tmp_path: Path, end: str) -> None:
    """Epoch 2 was logged but is not in the checkpoint, so it is trained and logged again."""
    run_dir = tmp_path / "run"
    state, _, _ = track(run_dir, [1, 2], end=end)
    again, _, code = track(run_dir, [2, 3], history=[1], state=state)
    assert (again, code) == (state, 0)
    expected = [record(epoch) for epoch in (1, 2, 3)]
    assert read_lines(run_dir / "metrics.jsonl") == expected
    assert epochs_in(run_dir) == expected
    assert read_lines(run_dir / "steps.jsonl") == steps_in(run_dir) == expected_steps(1, 2, 3)
    artifacts = [artifact.type for artifact in of_kind(read_records(run_dir), "artifact")]
    assert sorted(artifacts) == ["model", "run_table", "run_table"]


def test_a_run_that_died_before_its_first_checkpoint_keeps_its_wandb_id(tmp_path: Path) -> None:
    state, _, _ = track(tmp_path / "run", [1], end="crash")
    again, _, _ = track(tmp_path / "run", [1, 2])
    assert again == state
    assert epochs_in(tmp_path / "run") == [record(1), record(2)]


@pytest.mark.parametrize("end", ["stopped", "failed"])
def test_a_run_that_ends_within_an_epoch_records_every_step_once(tmp_path: Path, end: str) -> None:
    """Step 3 and epoch 1 share a row of W&B's history. Here, the run ends when only the step has been logged."""
    run_dir = tmp_path / "run"
    state, _, _ = track(run_dir, [], records=[([step_record(2), step_record(3)], None)], end=end)
    assert steps_in(run_dir) == [step_record(2)]
    track(run_dir, [], records=[([], record(1)), ([step_record(5)], record(2))], step=3, state=state)
    assert steps_in(run_dir) == [step_record(2), step_record(3), step_record(5)]
    assert epochs_in(run_dir) == [record(1), record(2)]


def test_wandb_run_id_belongs_to_one_run_directory(tmp_path: Path) -> None:
    env = {"WANDB_RUN_ID": "abcd9999"}
    first, _, _ = track(tmp_path / "a", [1], env=env)
    second, said, _ = track(tmp_path / "b", [1], env=env)
    again, _, _ = track(tmp_path / "a", [2], history=[1], state=first, env=env)
    assert first == again == {"wandb_run_id": "abcd9999"}
    assert second["wandb_run_id"] != "abcd9999"
    assert said == f"warning: WANDB_RUN_ID=abcd9999 belongs to {tmp_path / 'a'}; using a new id\n"


def test_an_id_that_wandb_refuses_is_reported_and_discarded(tmp_path: Path) -> None:
    state, said, code = track(tmp_path / "run", [1], env={"WANDB_RUN_ID": "a/b"})
    assert (state, code, said.count("\n")) == ({}, 0, 1)
    assert "Run ID cannot contain" in said
    resumed, said, _ = track(tmp_path / "run", [2], history=[1])
    assert (said, bool(resumed["wandb_run_id"])) == ("", True)
    assert epochs_in(tmp_path / "run") == [record(1), record(2)]


def test_mode_auto_reads_wandbs_own_settings_file(tmp_path: Path) -> None:
    """`wandb offline` and `wandb init` write this file in the working directory."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\nproject = flowers\n")
    env = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    _, said, code = track(tmp_path / "run", [1], env=env, settings={"wandb": "auto"}, cwd=tmp_path)
    assert (code, "warning" in said) == (0, False)
    assert epochs_in(tmp_path / "run") == [record(1)]
    assert of_kind(read_records(tmp_path / "run"), "run")[0].project == "flowers"


def test_without_wandb_a_run_is_recorded_and_one_line_names_the_missing_package(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['wandb'] = None")
    path = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    for settings, lines in (({"wandb": "auto"}, 1), ({"wandb": "disabled"}, 0)):
        run_dir = tmp_path / settings["wandb"]
        state, said, code = track(run_dir, [1], env=path, settings=settings)
        assert (state, code, said.count("\n")) == ({}, 0, lines), said
        assert "wandb is not installed" in said or not lines
        assert read_lines(run_dir / "metrics.jsonl") == [record(1)]


NOT_INSTALLED = """
import sys
from importlib import metadata

sys.modules["wandb"] = None
version = metadata.version

def version_of(name):
    if name == "wandb":
        raise metadata.PackageNotFoundError(name)
    return version(name)

metadata.version = version_of
"""


def test_a_run_does_not_need_wandb(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOT_INSTALLED)
    words = ("smoke", "--device", "cpu", "--data-dir", tiny_dir, "--out", tmp_path / "run", "--wandb", "auto")
    finished = run(NARROW, *words, env={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"})
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("wandb is not installed") == 1
    assert (tmp_path / "run" / "summary.json").exists()
    assert "wandb" not in json.loads((tmp_path / "run" / "config.json").read_text())["versions"]


def test_no_file_contains_the_api_key_the_environment_or_the_command_line(offline_run: Path) -> None:
    assert holds(offline_run, KEY) + holds(offline_run, MARKER) == []
