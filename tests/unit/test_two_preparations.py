"""Two commands may prepare a dataset in the same folder at the same time."""

import fcntl
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from data_prep.dataset import read_dataset, verify_dataset, write_dataset
from data_prep.output import MANIFEST_START, files_locked, remove_left_behind, temporary_folder
from data_prep.sources.synthetic import draw_synthetic
from tests.support.folders import DATASET_FILES, names_in


def test_a_command_does_not_remove_files_that_another_one_is_moving(tmp_path: Path) -> None:
    (tmp_path / ".writing-x").mkdir()
    (tmp_path / ".writing-x" / "dataset.json").write_bytes(MANIFEST_START)
    (tmp_path / "train.beton").touch()
    source = draw_synthetic(train_count=20, test_count=10, seed=0, size=8)
    with files_locked(tmp_path):  # the other command has moved train.beton, but not yet dataset.json
        command = threading.Thread(target=write_dataset, args=(source, tmp_path))
        command.start()
        command.join(timeout=0.5)
        assert (tmp_path / "train.beton").exists()
        (tmp_path / "dataset.json").write_bytes(MANIFEST_START)
    command.join()
    verify_dataset(tmp_path, read_dataset(tmp_path), full=True)


def test_the_temporary_folder_of_a_live_process_is_kept(tmp_path: Path) -> None:
    """The process may be on another machine or in another container, so its ID says nothing."""
    with temporary_folder(tmp_path) as temporary:
        write_dataset(draw_synthetic(train_count=20, test_count=10, seed=0, size=8), tmp_path)
        assert temporary.exists()
    assert names_in(tmp_path) == DATASET_FILES


@pytest.mark.parametrize("moment", ["before its lock is created", "before it is locked"])
def test_a_command_that_starts_at_the_same_time_does_not_remove_the_temporary_folder(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, lock = tempfile.mkdtemp, fcntl.flock

    def make_while_another_starts(**options: Any) -> str:
        folder = make(**options)
        remove_left_behind(tmp_path)
        return folder

    def lock_while_another_starts(file: Any, operation: int) -> None:
        monkeypatch.undo()
        remove_left_behind(tmp_path)
        lock(file, operation)

    if moment == "before it is locked":
        monkeypatch.setattr("fcntl.flock", lock_while_another_starts)
    else:
        monkeypatch.setattr("tempfile.mkdtemp", make_while_another_starts)
    with temporary_folder(tmp_path) as temporary:
        (temporary / "train.beton").touch()
        remove_left_behind(tmp_path)
        assert (temporary / "train.beton").exists()


def test_a_temporary_folder_stays_locked_while_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, a command that has just made the folder could lock it, and the folder would then be removed."""
    folder = tmp_path / ".writing-abc"
    folder.mkdir()
    (folder / "lock").touch()

    def try_to_lock(path: Path) -> None:
        with open(path, "rb") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        removed.append(path)

    removed: list[Path] = []
    monkeypatch.setattr(Path, "unlink", try_to_lock)
    remove_left_behind(tmp_path)
    assert removed == [folder / "lock"]
