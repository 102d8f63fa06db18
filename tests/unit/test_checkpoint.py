"""Checkpoints are saved completely or not at all, and a damaged one is never loaded."""

import errno
import hashlib
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from ddp_trainer.run.checkpoint import (
    MANIFEST,
    STATE,
    CheckpointError,
    OtherRelease,
    clean_up,
    list_checkpoints,
    newest_good_checkpoint,
    read_checkpoint,
    remove_old,
    step_of,
    write_checkpoint,
)
from ddp_trainer.run.checkpoint_saver import CheckpointSaver
from tests.soak.damage import DAMAGES, FILES, harm
from tests.support.full_disk import file_size_limit
from tests.support.trainer import REPOSITORY, environment


def state(value: float) -> dict[str, object]:
    return {"step": int(value), "model": {"weight": torch.full((100, 100), value)}, "history": [{"loss": 0.5}]}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_loaded_state_equals_the_saved_one_and_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoint_saver = CheckpointSaver(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoint_saver.save(state(step), step=step)
    checkpoint_saver.close()
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    newest = newest_good_checkpoint(tmp_path)
    assert newest is not None
    loaded = read_checkpoint(newest)
    assert torch.equal(loaded["model"]["weight"], torch.full((100, 100), 3.0))
    assert loaded["history"] == [{"loss": 0.5}]


def test_best_checkpoint_is_kept_in_addition_to_the_newest(tmp_path: Path) -> None:
    for step, score in enumerate((0.5, 0.9, None, 0.9, 0.7, None), start=1):
        checkpoint_saver = CheckpointSaver(tmp_path, keep=1)  # a new saver must find the best checkpoint on disk
        checkpoint_saver.save(state(step), step=step, score=score)
        checkpoint_saver.close()
    assert names(tmp_path) == ["step-00000002", "step-00000006"]


def test_a_checkpoint_whose_score_cannot_be_read_is_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / f"step-{step:08d}", state(step), step=step, score=1 / step)
    (tmp_path / "step-00000001" / MANIFEST).unlink()
    (tmp_path / "step-00000001" / MANIFEST).symlink_to("/proc/self/mem")  # reading it fails with EIO
    remove_old(tmp_path, keep=1, step=3)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]


def test_save_removes_checkpoints_of_later_steps(tmp_path: Path) -> None:
    """This happens if the checkpoint of step 30 is damaged: the run resumes from step 20 and then saves step 25."""
    for step, score in ((10, 0.9), (20, 0.5), (30, 0.5)):
        write_checkpoint(tmp_path / f"step-{step:08d}", state(step), step=step, score=score)
    checkpoint_saver = CheckpointSaver(tmp_path, keep=1)
    checkpoint_saver.save(state(25), step=25)
    checkpoint_saver.close()
    assert names(tmp_path) == ["step-00000010", "step-00000025"], "the kept checkpoints are not the best and the newest"


def test_later_steps_do_not_change_the_state_that_is_being_saved(tmp_path: Path, device: torch.device) -> None:
    weight = torch.zeros(1000, 1000, device=device)
    checkpoint_saver = CheckpointSaver(tmp_path, keep=1)
    checkpoint_saver.save({"weight": weight}, step=1)
    weight += 1
    checkpoint_saver.close()
    assert read_checkpoint(tmp_path / "step-00000001")["weight"].sum() == 0


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_and_the_previous_one_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, file: str
) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path / f"step-{step:08d}", state(step), step=step)
    harm(tmp_path / "step-00000002" / file, damage, random.Random(0))
    assert newest_good_checkpoint(tmp_path) == tmp_path / "step-00000001"
    assert "step-00000002" in capsys.readouterr().err


def test_a_checkpoint_with_a_pipe_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reading a pipe would block."""
    for step in (1, 2):
        write_checkpoint(tmp_path / f"step-{step:08d}", state(step), step=step)
    manifest = tmp_path / "step-00000002" / MANIFEST
    manifest.unlink()
    os.mkfifo(manifest)
    assert newest_good_checkpoint(tmp_path) == tmp_path / "step-00000001"
    assert "not a regular file" in capsys.readouterr().err
    remove_old(tmp_path, keep=1, step=2)  # reads the scores


def test_renamed_checkpoint_is_not_used_and_a_missing_key_means_another_release(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step-00000001", state(1), step=1)
    with pytest.raises(OtherRelease, match="has no optimizer"):
        read_checkpoint(tmp_path / "step-00000001", {"step", "optimizer"})
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="contains the checkpoint of step 1, so the folder was renamed"):
        read_checkpoint(tmp_path / "step-00000002")


# Forks a writer for each folder. In the folder STEP-FUNCTION-COUNT, the writer saves a checkpoint of step STEP, but
# exits at call number COUNT of FUNCTION.
KILLED_WRITERS = """
import os, shutil, sys, torch
from pathlib import Path
from ddp_trainer.run.checkpoint import write_checkpoint
from ddp_trainer.run.checkpoint_saver import CheckpointSaver

def die_at(name, count):
    owner = {"fsync": os, "rmtree": shutil, "save": torch}.get(name, Path)
    real, calls = getattr(owner, name), []
    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == count:
            os._exit(9)
        return real(*arguments, **options)
    setattr(owner, name, dying)

for folder in map(Path, sys.argv[1:]):
    step, name, count = folder.name.split("-")
    write_checkpoint(folder / "step-00000001", {"step": 1, "weight": torch.ones(100)}, step=1)
    child = os.fork()
    if child == 0:
        checkpoint_saver = CheckpointSaver(folder, keep=1)
        die_at(name, int(count))
        checkpoint_saver.save({"step": int(step), "weight": torch.full((100,), float(step))}, step=int(step))
        checkpoint_saver.close()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
MOMENTS = [
    "mkdir-1",
    "save-1",
    "fsync-1",
    "fsync-2",
    "fsync-3",
    "fsync-4",
    "rename-1",
    "rename-2",
    "rmtree-1",
    "rmtree-2",
]


def test_save_killed_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    """Each writer saves step 2, or step 1 again. It is killed right before one of the changes to the disk."""
    folders = [tmp_path / f"{step}-{moment}" for step in (1, 2) for moment in MOMENTS]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WRITERS, *map(str, folders)],
        env=environment(OMP_NUM_THREADS="1"),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["9"] * len(folders), "a writer was not killed"
    for folder in folders:
        clean_up(folder)  # as a resumed run does
        newest = newest_good_checkpoint(folder)
        assert newest is not None, folder.name
        assert read_checkpoint(newest)["weight"][0] == step_of(newest)
        assert set(names(folder)) <= {"step-00000001", "step-00000002"}, folder.name


def test_failed_save_raises_an_error_and_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    """With a limit on the size of files, torch.save fails halfway, as on a full disk."""
    checkpoint_saver = CheckpointSaver(tmp_path, keep=1)
    checkpoint_saver.save(state(1), step=1)
    checkpoint_saver.wait()
    with file_size_limit(10_000):
        checkpoint_saver.save(state(2), step=2)
        with pytest.raises(CheckpointError, match=r"step-00000002: 80,000 bytes are needed, [0-9,]+ are free"):
            checkpoint_saver.wait()
    checkpoint_saver.check()
    checkpoint_saver.close()
    assert names(tmp_path) == ["step-00000001"]


def test_checkpoint_that_the_disk_cannot_read_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(file: BinaryIO, _: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), file.name)

    write_checkpoint(tmp_path / "step-00000001", state(1), step=1)
    monkeypatch.setattr(hashlib, "file_digest", fail)
    assert newest_good_checkpoint(tmp_path) is None
    assert "skipping a damaged checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("place", [(hashlib, "file_digest"), (torch, "load")])
def test_a_checkpoint_is_not_called_damaged_if_memory_ran_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[object, str]
) -> None:
    """Otherwise, the run would resume from an older checkpoint and then delete this one."""

    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    write_checkpoint(tmp_path / "step-00000001", state(1), step=1)
    monkeypatch.setattr(*place, fail)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        newest_good_checkpoint(tmp_path)


def test_checkpoint_with_code_in_its_pickle_is_not_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("touch " + str(tmp_path / "ran"),)

    write_checkpoint(tmp_path / "step-00000001", {"evil": Evil()}, step=1)
    assert newest_good_checkpoint(tmp_path) is None
    assert not (tmp_path / "ran").exists()
    assert list_checkpoints(tmp_path)[0].joinpath(STATE).exists()
    assert list_checkpoints(tmp_path)[0].joinpath(MANIFEST).exists()


def test_a_save_that_takes_long_is_waited_for_only_for_the_given_time(tmp_path: Path) -> None:
    saver, release = CheckpointSaver(tmp_path / "checkpoints", keep=1), threading.Event()
    saver.save(state(1.0), step=1, when_saved=release.wait)
    assert not saver.wait(seconds=0.01)
    release.set()
    assert saver.wait(seconds=60)
    saver.close()
