"""A short form of `make soak` (fault injection, in tests/soak), and faults that `make soak` does not inject."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.trainer import (
    NARROW,
    OF_SMOKE_RUN,
    REPOSITORY,
    environment,
    fork,
    read_lines,
    start,
    train,
    wait_for_epochs,
)

PLAN = ("--epochs", "2", "--max-steps", "12", "--batch-size", "16", "--checkpoint-every-steps", "2")


def test_faults_of_every_kind_break_no_documented_guarantee(tmp_path: Path) -> None:
    seed = str(random.randrange(10**6))
    sizes = ("--kills", "1", "--signals", "1", "--launched", "1", "--damages", "27", "--ranks", "1")
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", *sizes, "--mutations", "20", "--world-sizes", "1", "3", "--seed", seed],
        cwd=REPOSITORY,
        env=environment(TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"--seed {seed}\n{done.stdout}{done.stderr}"
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][-13:]
    assert all(int(row[3]) == 0 and int(row[2]) > 0 for row in rows)
    assert len({row[0] for row in rows}) == 13


def test_full_disk_ends_the_run_with_one_line_and_keeps_earlier_checkpoints(tiny_dir: Path, tmp_path: Path) -> None:
    """A run of 4 steps is resumed with a file size limit that is too small for its next checkpoint."""
    out = tmp_path / "run"
    arguments = ("smoke", "--device", "cpu", *PLAN, "--data-dir", str(tiny_dir), "--out", str(out))
    train(*arguments[3:], "--max-steps", "4", module=NARROW)
    before = sorted(path.name for path in (out / "checkpoints").iterdir())

    def full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = subprocess.run(
        [sys.executable, "-m", NARROW, *arguments, "--resume"],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=full_disk,
    )
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "bytes are needed" in errors[0]
    assert str(out / "checkpoints" / "step-0000000") in errors[0]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == before
    assert '"failed"' in (out / "status.json").read_text()


def test_run_resumed_with_more_processes_trains_on_the_remaining_images(tiny_dir: Path, tmp_path: Path) -> None:
    """With --sync-bn, the losses equal those of one process up to rounding.

    This shows that no image is missed or repeated. The learning rate is low, because a high one amplifies rounding.
    """
    same = (*PLAN, "--data-dir", tiny_dir, "--sync-bn", "--precision", "fp32", "--peak-lr", "0.001")
    train(*same, "--out", tmp_path / "alone", module=NARROW)
    train(*same, "--out", tmp_path / "moved", "--max-steps", "4", module=NARROW)
    train(*same, "--out", tmp_path / "moved", "--resume", module=NARROW, processes=2)
    alone, moved = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("alone", "moved"))
    for ours, theirs in zip(alone, moved, strict=True):
        for name in ("step", "learning_rate", "test_total"):
            assert ours[name] == theirs[name]
        assert abs(ours["train_loss"] - theirs["train_loss"]) < 1e-4 * ours["train_loss"]


def test_run_ends_if_its_beton_file_is_removed_or_truncated(tiny_dir: Path, tmp_path: Path) -> None:
    """A truncated file may kill the process (SIGBUS); a removed file is reported as an error. The run never hangs."""
    children = []
    for harm in ("remove", "truncate"):
        data, out = tmp_path / f"{harm}-data", tmp_path / harm
        shutil.copytree(tiny_dir, data)
        arguments = (
            "--data-dir",
            data,
            "--out",
            out,
            "--epochs",
            "5000",
            "--batch-size",
            "16",
            "--max-steps",
            "30000",
            "--data-mode",
            "stream",
        )
        process = start(NARROW, "smoke", "--device", "cpu", *arguments)
        wait_for_epochs(out, process)
        if harm == "remove":
            (data / "train.beton").unlink()
        else:
            os.truncate(data / "train.beton", 4096 * 3)
        children.append((harm, out, process))
    for harm, out, process in children:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode != 0, stderr
        if process.returncode == 1:
            assert "train.beton was removed, replaced or changed" in stderr
            assert '"failed"' in (out / "status.json").read_text()
        else:
            assert (harm, process.returncode) == ("truncate", -signal.SIGBUS), stderr


def test_resume_writes_the_report_that_a_kill_prevented(tiny_dir: Path, smoke_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(smoke_run, out)
    shutil.rmtree(out / "report")
    (out / "model.md").unlink()
    (out / "status.json").write_text('{"state": "running", "step": 6, "epoch": 2, "message": ""}')
    words = ("smoke", "--device", "cpu", "--data-dir", tiny_dir, "--out", out, "--resume", *OF_SMOKE_RUN)
    finished = fork(*words, program="ddp_trainer.train:main")
    assert finished.returncode == 0
    assert (out / "report" / "index.html").exists()
    assert (out / "model.md").exists()
    assert '"done"' in (out / "status.json").read_text()
