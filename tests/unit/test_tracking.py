"""Tests the records in JSON lines and TensorBoard, and failures of a tracker. whole_path/test_wandb.py tests W&B."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from data_prep.errors import InputError
from ddp_trainer.command_line import run_command
from ddp_trainer.config import TrackingConfig, is_installed
from ddp_trainer.tracking.metric_files import JsonLines
from ddp_trainer.tracking.tracker import Tracker, build_tracker
from tests.support.full_disk import file_size_limit
from tests.support.tracked_runs import record, step_record
from tests.support.trainer import environment, read_lines

DISABLED = TrackingConfig(wandb="disabled")


def test_without_trackers_only_the_json_lines_are_written(tmp_path: Path) -> None:
    tracker = build_tracker(DISABLED, run_dir=tmp_path, config={}, history=[record(1)])
    tracker.log_epoch(record(2))
    assert read_lines(tmp_path / "metrics.jsonl") == [record(1), record(2)], "a line is not flushed"
    tracker.finish(None)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "steps.jsonl"]
    assert tracker.state() == {}


def test_a_resumed_run_records_every_step_once(tmp_path: Path) -> None:
    tracker = build_tracker(DISABLED, run_dir=tmp_path, config={})
    for step in (1, 2, 3):
        tracker.log_step(step_record(step))
    tracker.finish(None)
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"epoch": 2, "st')  # the run was killed while it wrote this line
    resumed = build_tracker(DISABLED, run_dir=tmp_path, config={}, step=2)
    resumed.log_step(step_record(3))
    resumed.finish(None)
    assert read_lines(tmp_path / "steps.jsonl") == [step_record(step) for step in (1, 2, 3)]


def test_a_pipe_in_place_of_the_step_records_is_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "steps.jsonl")
    resumed = build_tracker(DISABLED, run_dir=tmp_path, config={}, step=2)
    resumed.log_step(step_record(3))
    resumed.finish(None)
    assert read_lines(tmp_path / "steps.jsonl") == [step_record(3)]


def test_numbers_that_are_not_finite_are_left_out_because_json_has_no_nan(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl", [{"step": 1, "test_loss": math.nan, "split": "test"}])
    log.write({"step": 2, "test_loss": -math.inf, "train_loss": 0.5})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "split": "test"}\n{"step": 2, "train_loss": 0.5}\n'


def test_error_for_a_record_that_cannot_be_written_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a limit on the size of files, a line is written only in part, as on a full disk."""
    log = JsonLines(tmp_path / "metrics.jsonl", [record(1)])
    with file_size_limit((tmp_path / "metrics.jsonl").stat().st_size + 10):
        with pytest.raises(OSError, match="File too large") as caught:
            log.write(record(2))
        log.close()

    def work() -> None:
        raise caught.value

    assert run_command(work) == 1
    assert capsys.readouterr().err == f"error: cannot write {tmp_path / 'metrics.jsonl'}: File too large\n"


def test_a_failing_tracker_is_disabled_with_one_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Broken:
        calls: ClassVar[list[str]] = []

        def log_step(self, record: object) -> None:
            self.calls.append("step")
            raise ConnectionResetError("Connection\nlost")

        def log_epoch(self, record: object) -> None:
            self.calls.append("epoch")

        def finish(self, summary: object, *, failed: bool) -> None:
            self.calls.append("finish")

        def abandon(self) -> None:
            self.calls.append("abandon")

    files = {name: JsonLines(tmp_path / f"{name}.jsonl", ()) for name in ("steps", "metrics")}
    tracker = Tracker(files["steps"], files["metrics"], {"W&B": Broken()}, {})
    tracker.log_step(step_record(1))
    tracker.log_step(step_record(2))
    tracker.log_epoch(record(1))
    tracker.finish({})
    assert Broken.calls == ["step", "abandon"]
    assert len(read_lines(tmp_path / "steps.jsonl")) == 2
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1
    assert capfd.readouterr().err == (
        "warning: W&B failed and is disabled for the rest of this run; metrics.jsonl is unaffected (Connection lost)\n"
    )


def test_tensorboard_has_each_step_and_epoch_once_after_a_resume(tmp_path: Path) -> None:
    code = (
        "import sys, json; from pathlib import Path\n"
        "from ddp_trainer.config import TrackingConfig; from ddp_trainer.tracking.tracker import build_tracker\n"
        "settings = TrackingConfig(trackers='tensorboard')\n"
        "parts = json.loads(sys.argv[2])\n"
        "for history, steps, epoch in parts:\n"
        "    resumed = {'history': history, 'step': 3 * len(history)}\n"
        "    t = build_tracker(settings, run_dir=Path(sys.argv[1]), config={}, **resumed)\n"
        "    [t.log_step(r) for r in steps]; t.log_epoch(epoch); t.finish(None)\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "events = EventAccumulator(sys.argv[1] + '/tensorboard'); events.Reload()\n"
        "print([[(e.step, round(e.value, 4)) for e in events.Scalars(n)] for n in ('train_loss', 'step/train_loss')])\n"
    )
    pytest.importorskip("tensorboard")
    steps = [step_record(step) for step in range(1, 7)]
    before, after = [[], steps[:5], record(1)], [[record(1)], steps[3:], record(2)]
    parts = json.dumps([before, after])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), parts],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert done.stdout.splitlines()[-1:] == [
        "[[(3, 2.0), (6, 1.0)], [(1, 1.0), (2, 0.5), (3, 0.3333), (4, 0.25), (5, 0.2), (6, 0.1667)]]"
    ], done.stderr


def test_tensorboard_that_fails_to_start_causes_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ImportError("numpy has another version")

    monkeypatch.setattr("ddp_trainer.tracking.tracker.TensorBoardMirror", broken)
    tracker = build_tracker(TrackingConfig(trackers="tensorboard"), run_dir=tmp_path, config={})
    tracker.log_epoch(record(1))
    tracker.finish(None)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1
    assert capfd.readouterr().err.count("numpy has another version") == 1


def test_a_wandb_id_that_cannot_be_stored_causes_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """There is a folder where the file should be."""

    class Working:
        def finish(self, summary: object, *, failed: bool) -> None:
            pass

    (tmp_path / "wandb" / "run-id").mkdir(parents=True)
    monkeypatch.setattr("ddp_trainer.tracking.tracker.start_wandb", lambda *_: Working())
    tracker = build_tracker(TrackingConfig(wandb="offline"), run_dir=tmp_path, config={})
    tracker.finish(None)
    assert tracker.state().keys() == {"wandb_run_id"}
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: the id of the W&B run cannot be stored: ")


def test_error_for_missing_tensorboard_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        TrackingConfig(trackers="tensorboard")


def test_missing_wandb_is_an_error_only_if_it_was_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert TrackingConfig().wandb == "auto"
    assert TrackingConfig(wandb="online", trackers="").tracker_names == ()
    with pytest.raises(InputError, match="--wandb offline needs the package wandb; run `pip install wandb`"):
        TrackingConfig(wandb="offline")


def test_a_folder_named_like_a_package_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("no_such_package")
    assert is_installed("torch")
