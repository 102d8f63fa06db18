"""The record of a run, and what happens to it where a mirror fails. W&B itself is tested in test_wandb."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.errors import InputError
from ddp_trainer.config import TrackingConfig
from ddp_trainer.tracking.tracker import RunTracker, build_tracker
from tests.support.tracked_runs import record
from tests.support.trainer import environment, read_lines


def test_disabled_leaves_the_lines_alone(tmp_path: Path) -> None:
    tracker = build_tracker(TrackingConfig(wandb="disabled"), run_dir=tmp_path, config={}, history=[record(1)])
    tracker.log_epoch(record(2))
    assert read_lines(tmp_path / "metrics.jsonl") == [record(1), record(2)], "each line is flushed"
    tracker.finish(None)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert tracker.state() == {}


def test_a_mirror_that_fails_is_dropped_and_training_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Broken:
        calls = 0

        def log_epoch(self, record: object) -> None:
            self.calls += 1
            raise ConnectionResetError("Connection lost")

        def finish(self, summary: object, *, failed: bool) -> None:
            raise AssertionError("it is gone")

    from ddp_trainer.tracking.metric_files import JsonLines

    broken = Broken()
    tracker = RunTracker(JsonLines(tmp_path / "metrics.jsonl", ()), {"W&B": broken}, {})
    tracker.log_epoch(record(1))
    tracker.log_epoch(record(2))
    tracker.finish({})
    assert broken.calls == 1
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2
    assert capfd.readouterr().err.count("Connection lost") == 1


def test_tensorboard_shows_each_epoch_once_after_a_resume(tmp_path: Path) -> None:
    code = (
        "import sys, json; from pathlib import Path\n"
        "from ddp_trainer.config import TrackingConfig; from ddp_trainer.tracking.tracker import build_tracker\n"
        "settings = TrackingConfig(trackers='tensorboard')\n"
        "jobs = json.loads(sys.argv[2])\n"
        "for history, records in jobs:\n"
        "    t = build_tracker(settings, run_dir=Path(sys.argv[1]), config={}, history=history)\n"
        "    [t.log_epoch(r) for r in records]; t.finish(None)\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "events = EventAccumulator(sys.argv[1] + '/tensorboard'); events.Reload()\n"
        "print([(e.step, round(e.value, 4)) for e in events.Scalars('train_loss')])\n"
    )
    pytest.importorskip("tensorboard")
    jobs = json.dumps([[[], [record(1), record(2)]], [[record(1)], [record(2)]]])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), jobs], capture_output=True, text=True, env=environment(), timeout=60
    )
    assert done.stdout.splitlines()[-1:] == ["[(3, 2.0), (6, 1.0)]"], done.stderr


def test_a_tensorboard_that_does_not_start_is_left_out(
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


def test_missing_tensorboard_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        TrackingConfig(trackers="tensorboard")
