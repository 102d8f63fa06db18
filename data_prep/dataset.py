"""A prepared dataset: a folder with train.beton, test.beton and dataset.json, which describes them."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.beton import check_beton
from data_prep.beton_writer import write_betons
from data_prep.errors import InputError, quoted, shell_path
from data_prep.files import open_regular, read_json, sync_file, sync_folder
from data_prep.manifest import FORMAT_VERSION, MANIFEST, SPLITS, DatasetInfo, SplitInfo, parse_manifest
from data_prep.sources import SOURCES, ImageSet, Split

Progress = Callable[[str, int], object]  # split, number of its images written so far


def write_dataset(image_set: ImageSet, out: Path, *, progress: Progress = lambda split, written: None) -> DatasetInfo:
    """Writes the three files of a dataset to `out`. They get their final names only when all are complete and checked.

    An older dataset in `out` stays intact until then. Raises InputError if `out` is not writable or the disk is full.
    """
    _check_space(image_set, out)
    temporary = out / f".writing-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(out)
        temporary.mkdir()
    except OSError as error:
        raise InputError(f"--out {shell_path(out)} is not writable ({error.strerror}); use another folder") from None
    try:
        write_betons(temporary, {name: getattr(image_set, name) for name in SPLITS}, progress=progress)
        splits = {name: _check_split(image_set, name, temporary) for name in SPLITS}
        info = _describe(image_set, splits)
        (temporary / MANIFEST).write_text(json.dumps(info.as_json(), indent=2) + "\n")
        names = (*(split.file for split in splits.values()), MANIFEST)
        for name in names:  # the slow part comes first, while the older dataset is still intact
            sync_file(temporary / name)
        # A folder without a manifest is not a dataset, so no reader can combine the old manifest with the new pixels.
        (out / MANIFEST).unlink(missing_ok=True)
        for name in names:
            (temporary / name).replace(out / name)
        sync_folder(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return info


def _check_space(image_set: ImageSet, out: Path) -> None:
    existing = next((folder for folder in (out, *out.absolute().parents) if folder.is_dir()), Path("/"))
    # While they are written, the images are on the disk twice: in the writer's input and in the beton file.
    needed = 2 * (image_set.train.images.nbytes + image_set.test.images.nbytes) + 2**24
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"--out {shell_path(out)} needs {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; free some space"
        )


def _remove_left_behind(out: Path) -> None:
    """Removes what killed runs left in `out`; the folder of a process that is still alive stays."""
    for folder in out.glob(".writing-*"):
        if not Path("/proc", folder.name.removeprefix(".writing-")).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _check_split(image_set: ImageSet, name: str, folder: Path) -> SplitInfo:
    split: Split = getattr(image_set, name)
    path = folder / f"{name}.beton"
    size = split.images.shape[1]
    check_beton(path, count=len(split.labels), image_size=size, num_classes=len(image_set.classes))
    return SplitInfo(file=path.name, count=len(split.labels), bytes=path.stat().st_size, sha256=file_sha256(path))


def _describe(image_set: ImageSet, splits: Mapping[str, SplitInfo]) -> DatasetInfo:
    mean, std = color_statistics(image_set.train.images)
    return DatasetInfo(
        format_version=FORMAT_VERSION,
        source=image_set.source,
        classes=image_set.classes,
        image_size=image_set.train.images.shape[1],
        channels=3,
        splits=splits,
        mean=mean,
        std=std,
        ffcv_version=metadata.version("ffcv"),
        skipped=image_set.skipped,
    )


def color_statistics(images: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each color channel of (N, H, W, 3) uint8, 0-1 scale, from the counts of values."""
    values = np.arange(256) / 255
    means, deviations = [], []
    for counts in _value_counts(images):
        mean = float(counts @ values / counts.sum())
        means.append(mean)
        # Images of a single color have a deviation of 0, and normalization divides by it.
        deviations.append(max(float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum())), 1 / 255))
    return tuple(means), tuple(deviations)  # type: ignore[return-value]


def _value_counts(images: np.ndarray) -> np.ndarray:
    """(3, 256) counts of each value in each channel. Bincount copies to int64, so it gets a few megabytes at a time."""
    counts = np.zeros((3, 256), dtype=np.int64)
    step = max(2**22 // images[0].size, 1)
    for start in range(0, len(images), step):
        part = images[start : start + step]
        for channel in range(3):
            counts[channel] += np.bincount(part[..., channel].reshape(-1), minlength=256)
    return counts


def read_dataset(directory: Path, *, needed: Sequence[str] = SPLITS) -> DatasetInfo:
    """The description of a prepared dataset.

    Raises InputError if there is none, or one that this code cannot read, or if it lacks a split in `needed`.
    """
    path, prepare = directory / MANIFEST, preparation(directory, {})
    try:
        fields = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; prepare the data again: {prepare}") from None
    if fields is None:
        raise InputError(f"{directory} holds no prepared dataset; make one: {prepare}")
    version = fields.get("format_version")
    if version != FORMAT_VERSION:
        problem = f"has format version {quoted(version)}, not {FORMAT_VERSION}"
        raise InputError(f"{path} {problem}; prepare the data again: {prepare}")
    try:
        info = parse_manifest(fields)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path} cannot be used: {problem}; prepare the data again: {prepare}") from None
    if not info.splits.keys() >= set(needed):
        raise InputError(
            f"{directory} has no training images, so it can only be evaluated; prepare ROOT/train together with "
            f"ROOT/test: {preparation(directory, asdict(info))}"
        )
    return info


def preparation(directory: Path, dataset: Mapping[str, Any]) -> str:
    """The command that prepares the dataset with these fields of dataset.json again.

    Without fields, the source is guessed from the folder's name. The seed of drawn images is not recorded, so the
    command uses the default seed.
    """
    source = dataset.get("source") or directory.name
    source = source if source in SOURCES else "SOURCE"
    words = ["python", "-m", "data_prep", "--source", source, "--out", str(directory)]
    if source == "folder":
        words += ["--root", "FOLDER", *(["--skip-unreadable"] if dataset.get("skipped") else [])]
    if source in ("folder", "synthetic") and "image_size" in dataset:
        words += ["--size", str(dataset["image_size"])]
    if source == "synthetic":
        for name, split in dataset.get("splits", {}).items():
            words += [f"--{name}-count", str(split.get("count"))]
    return " ".join(map(shell_path, words))


def verify_dataset(directory: Path, info: DatasetInfo) -> None:
    """Raises InputError unless both beton files are complete and match dataset.json, structure and sha256."""
    try:
        for split in info.splits.values():
            path = directory / split.file
            check_beton(path, count=split.count, image_size=info.image_size, num_classes=len(info.classes))
            if path.stat().st_size != split.bytes or file_sha256(path) != split.sha256:
                raise InputError(f"{path} is damaged (sha256 differs from {MANIFEST}); prepare the data again")
    except InputError as error:
        raise InputError(f"{error}: {preparation(directory, asdict(info))}") from None


def file_sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
