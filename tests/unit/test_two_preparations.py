"""Two commands may prepare a dataset in the same folder at the same time."""

import threading
from pathlib import Path

from data_prep.dataset import read_dataset, verify_dataset, write_dataset
from data_prep.output import MANIFEST_START, files_locked
from data_prep.sources.synthetic import draw_synthetic


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
