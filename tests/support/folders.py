"""Lists and compares what commands have written: names in a folder, checksums of files, and the models of two runs."""

import filecmp
import hashlib
from pathlib import Path

DATASET_FILES = {"train.beton", "test.beton", "dataset.json"}


def names_in(folder: Path) -> set[str]:
    """Returns the names of the files and folders in `folder`, or an empty set if `folder` does not exist."""
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def checksums(folder: Path) -> dict[Path, str]:
    """Returns the sha256 of each file in `folder` and its subfolders.

    A failed assertion on the bytes themselves would take hours, because pytest shows the differences.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def same_model(one: Path, other: Path) -> bool:
    """Returns whether the weights of two runs are equal, bit for bit."""
    return filecmp.cmp(one / "model.safetensors", other / "model.safetensors", shallow=False)
