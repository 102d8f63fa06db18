"""A run that was stopped and resumed equals the uninterrupted run, bit for bit."""

import errno
import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ddp_trainer
from ddp_trainer.run.checkpoint import CheckpointError, list_checkpoints, read_checkpoint, write_checkpoint
from tests.support.folders import checksums, same_model
from tests.support.processes import is_alive, processes_with
from tests.support.trainer import NARROW, OF_SMOKE_RUN, fork, read_lines, start, train, wait_for_epochs

# Ten epochs of 6 steps (96 training images in batches of 15), with a checkpoint after every second step. Three
# processes get 5 images each of each batch.
PLAN = (
    "--epochs",
    "10",
    "--max-steps",
    "60",
    "--batch-size",
    "15",
    "--checkpoint-every-steps",
    "2",
    "--log-every-steps",
    "4",
    "--ema-decay",
    "0.9",
)
# More settings for the runs with three processes, mostly those of `fast`. The runs with one process and those of
# tests/soak keep the settings of `smoke`.
OF_FAST = (
    "--optimizer",
    "muon",
    "--head-lr",
    "0.3",
    "--bias-lr",
    "3",
    "--activation",
    "celu",
    "--freeze-bn-scale",
    "--bn-momentum",
    "0.4",
    "--flip",
    "alternating",
    "--small-crops",
    "16:0.2,24:0.55",
    "--freeze-late",
    "features.0.*,features.1.*",
    "--freeze-late-between",
    "0.1",
    "0.3",  # frozen from step 18 on
    "--balance",
    "batches",
)
POISONED = "tests.support.workers.poisoned_train:main"
VOLATILE = ("seconds", "images_per_second")


def plan(processes: int) -> tuple[str, ...]:
    return (*PLAN, *OF_FAST) if processes == 3 else PLAN


def same_run(one: Path, other: Path) -> None:
    assert same_model(one, other)
    ours, theirs = (
        [
            {name: value for name, value in record.items() if name not in VOLATILE}
            for record in read_lines(path / "metrics.jsonl")
        ]
        for path in (one, other)
    )
    assert ours == theirs
    assert read_lines(one / "steps.jsonl") == read_lines(other / "steps.jsonl")
    assert [record["step"] for record in read_lines(one / "steps.jsonl")] == list(range(4, 61, 4)), (
        "a record is missing or occurs twice"
    )


@pytest.fixture(scope="module")
def uninterrupted(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A function that takes a number of processes and returns the directory of an uninterrupted run."""

    @functools.cache
    def run_directory(processes: int) -> Path:
        out = tmp_path_factory.mktemp("uninterrupted") / "run"
        train(*plan(processes), "--data-dir", tiny_dir, "--out", out, processes=processes, module=NARROW)
        return out

    return run_directory


# tests/soak makes the same comparison with other signals, at random times and with other numbers of processes, but
# without a launcher.
@pytest.mark.parametrize(
    ("processes", "number", "epochs"),
    [(1, signal.SIGINT, 1), (1, signal.SIGKILL, 1), (3, signal.SIGUSR2, 1), (3, signal.SIGTERM, 4)],
)
def test_run_stopped_by_a_signal_and_resumed_equals_the_uninterrupted_run(
    uninterrupted: Callable[[int], Path],
    tiny_dir: Path,
    tmp_path: Path,
    processes: int,
    number: signal.Signals,
    epochs: int,
) -> None:
    """With three processes, the run is stopped before and after layers are frozen and DDP is built again."""
    whole, out = uninterrupted(processes), tmp_path / "run"
    arguments = ("smoke", "--device", "cpu", *plan(processes), "--data-dir", tiny_dir, "--out", out)
    process = start(NARROW, *arguments, processes=processes)
    wait_for_epochs(out, process, epochs)
    victims = processes_with(NARROW, str(out), "RANK=") if processes > 1 else [process.pid]
    os.kill(victims[-1], number)  # only the last rank gets the signal
    process.communicate(timeout=90)
    status = json.loads((out / "status.json").read_text())
    if number != signal.SIGKILL:
        assert process.returncode == 0
        assert status["state"] == "preempted"
        assert 6 * epochs <= status["step"] < 60
        assert not (out / "summary.json").exists()
    assert not any(is_alive(pid) for pid in victims)
    resumed = (*plan(processes), "--data-dir", tiny_dir, "--out", out, "--resume")
    assert "after step" in train(*resumed, processes=processes, module=NARROW).stderr, "the run started over"
    same_run(whole, out)


def test_run_whose_first_save_fails_after_the_first_epoch_can_start_again(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first save takes longer than epoch 2. When it fails, two epochs are over, but only epoch 1 is recorded."""

    def fail(*_: object, **__: object) -> None:
        time.sleep(1)
        raise OSError(errno.ENOSPC, "No space left on device", "step-00000003")

    settings = {"data_dir": tiny_dir, "out": tmp_path / "run", "device": "cpu", "widths": (8, 8, 16, 16), "epochs": 3}
    settings |= {"max_steps": 9, "wandb": "disabled"}
    with monkeypatch.context() as patched:
        patched.setattr("ddp_trainer.run.checkpoint_saver.write_checkpoint", fail)
        with pytest.raises(CheckpointError):
            ddp_trainer.train("smoke", **settings)
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 1
    result = ddp_trainer.train("smoke", **settings, resume=True)
    assert result is not None and result.summary["steps"] == 9


def test_finished_run_is_left_unchanged(smoke_run: Path, tiny_dir: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(smoke_run, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    words = ("smoke", "--device", "cpu", "--data-dir", tiny_dir, "--out", out, "--resume", *OF_SMOKE_RUN)
    finished = fork(*words, program="ddp_trainer.train:main")
    assert finished.returncode == 0, finished.stderr
    assert "finished already" in finished.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_changed_setting_is_refused_and_shown(tiny_dir: Path, tmp_path: Path) -> None:
    """A changed --peak-lr is refused even if no steps are left. --max-steps and --data-mode may change."""
    out = tmp_path / "run"
    train("--data-dir", tiny_dir, "--out", out, "--max-steps", "2", module=NARROW)
    arguments = ("smoke", "--device", "cpu", "--data-dir", tiny_dir, "--out", out, "--resume")
    before = checksums(out)
    for steps in ("2", "3"):
        finished = fork(*arguments, "--peak-lr", "0.05", "--max-steps", steps)
        assert finished.returncode == 2
        assert "peak_lr 0.1 -> 0.05" in finished.stderr
        assert checksums(out) == before, "a file has changed"
    train("--data-dir", tiny_dir, "--out", out, "--resume", "--max-steps", "3", "--data-mode", "stream", module=NARROW)
    assert json.loads((out / "summary.json").read_text())["steps"] == 3


def test_resumed_run_has_no_results_until_it_is_finished_again(tiny_dir: Path, tmp_path: Path) -> None:
    """The run is resumed with a larger --max-steps, and fails in the next step."""
    arguments = ("--data-dir", tiny_dir, "--out", tmp_path / "run", "--max-steps")
    train(*arguments, "3", module=NARROW)
    results = [tmp_path / "run" / name for name in ("summary.json", "predictions.npz")]
    assert all(path.exists() for path in results)
    finished = fork("1", "smoke", "--device", "cpu", *arguments, "6", "--resume", program=POISONED)
    assert finished.returncode == 1
    assert not any(path.exists() for path in results)


def test_max_steps_below_the_reached_step_finishes_the_run(tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train("--data-dir", tiny_dir, "--out", out, "--max-steps", "5", module=NARROW)
    (out / "summary.json").unlink()  # as if the run had been stopped at step 5
    train("--data-dir", tiny_dir, "--out", out, "--max-steps", "4", "--resume", module=NARROW)
    assert json.loads((out / "summary.json").read_text())["steps"] == 5


def test_checkpoint_with_a_renamed_buffer_is_refused_in_one_line(tiny_dir: Path, tmp_path: Path) -> None:
    arguments = ("--data-dir", tiny_dir, "--out", tmp_path / "run", "--max-steps")
    train(*arguments, "2", module=NARROW)
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    state = read_checkpoint(checkpoint)
    name = next(iter(state["buffers"]))
    state["buffers"] = {f"{key}_of_old" if key == name else key: rows for key, rows in state["buffers"].items()}
    write_checkpoint(checkpoint, state, step=2)
    finished = fork("smoke", "--device", "cpu", *arguments, "4", "--resume")
    assert finished.returncode == 2
    assert [line for line in finished.stderr.splitlines() if line.startswith("error:") and name in line]
    assert "Traceback" not in finished.stderr
