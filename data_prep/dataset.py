"""A prepared dataset: a folder with train.beton, test.beton and, written last, dataset.json, which describes them."""

import hashlib
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.beton import check_beton, write_betons
from data_prep.errors import InputError
from data_prep.sources import SOURCES, ImageSet, Split

FORMAT_VERSION = 1
MANIFEST = "dataset.json"
SPLITS = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """One beton file."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The content of dataset.json. mean and std: of each colour over the training images, 0-1 scale."""

    format_version: int
    source: str
    classes: tuple[str, ...]
    image_size: int
    channels: int
    splits: Mapping[str, SplitInfo]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    ffcv_version: str


Progress = Callable[[str, int], object]  # split, images of it written so far


def write_dataset(image_set: ImageSet, out: Path, *, progress: Progress = lambda split, written: None) -> DatasetInfo:
    """Writes the three files of a dataset to `out`, each under its final name only when all are complete and checked.

    An older dataset in `out` stays whole until then. Raises InputError where `out` cannot be written or lacks space.
    """
    _check_space(image_set, out)
    temporary = out / f".writing-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(out)
        temporary.mkdir()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from None
    try:
        write_betons(temporary, {name: getattr(image_set, name) for name in SPLITS}, progress=progress)
        splits = {name: _check_split(image_set, name, temporary) for name in SPLITS}
        info = _describe(image_set, splits)
        (temporary / MANIFEST).write_text(json.dumps(asdict(info), indent=2) + "\n")
        names = (*(split.file for split in splits.values()), MANIFEST)
        for name in names:  # what takes long, while the older dataset is still whole
            _sync(temporary / name)
        # Without its manifest a folder is no dataset, so no reader can take the old description for the new pixels.
        (out / MANIFEST).unlink(missing_ok=True)
        for name in names:
            (temporary / name).replace(out / name)
        _sync(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return info


def _check_space(image_set: ImageSet, out: Path) -> None:
    existing = next((folder for folder in (out, *out.absolute().parents) if folder.is_dir()), Path("/"))
    # Each image lies on the disk twice while it is written: in the writer's input and in the beton file.
    needed = 2 * (image_set.train.images.nbytes + image_set.test.images.nbytes) + 2**24
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(f"--out {out}: {needed / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free; make room")


def _remove_left_behind(out: Path) -> None:
    """What a killed run left in `out`; that of a run still alive is let be."""
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
    mean, std = colour_statistics(image_set.train.images)
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
    )


def colour_statistics(images: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each colour of (N, H, W, 3) uint8, 0-1 scale, from the counts of all values."""
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(3):
        counts = np.bincount(images[..., channel].reshape(-1), minlength=256)
        mean = float(counts @ values / counts.sum())
        means.append(mean)
        # A dataset of one single colour still has to be divided by something.
        deviations.append(max(float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum())), 1 / 255))
    return tuple(means), tuple(deviations)  # type: ignore[return-value]


def read_dataset(directory: Path) -> DatasetInfo:
    """The description of a prepared dataset. Raises InputError where there is none, or one this code cannot read."""
    path = directory / MANIFEST
    prepare = preparation(directory, {})
    try:
        fields = json.loads(path.read_text())
        version = fields["format_version"]
    except FileNotFoundError:
        raise InputError(f"{directory} holds no prepared dataset; make one: {prepare}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); write the data anew: {prepare}") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format version {version}, not {FORMAT_VERSION}; write the data anew: {prepare}")
    try:
        return _parse(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is incomplete ({error!r}); write the data anew: {prepare}") from None


def preparation(directory: Path, dataset: Mapping[str, Any]) -> str:
    """The command for images like those that these fields of dataset.json describe; without any, the folder's name may
    say which they are. It has no seed, so drawn images are those of the default one."""
    source = str(dataset.get("source") or (directory.name if directory.name in SOURCES else "SOURCE"))
    words = ["python", "-m", "data_prep", "--source", source, "--out", str(directory)]
    if source == "folder":
        words += ["--root", "FOLDER"]
    if source in ("folder", "synthetic") and "image_size" in dataset:
        words += ["--size", str(dataset["image_size"])]
    if source == "synthetic":
        for name, split in dataset.get("splits", {}).items():
            words += [f"--{name}-count", str(split.get("count"))]
    return shlex.join(words)


def _parse(fields: dict) -> DatasetInfo:
    splits = {name: SplitInfo(**fields["splits"][name]) for name in SPLITS}
    for split in splits.values():
        _must_be(str, file=split.file, sha256=split.sha256)
        _must_be(int, count=split.count, bytes=split.bytes)
        if Path(split.file).name != split.file:
            raise ValueError("a beton file lies outside the folder")
    _must_be(str, source=fields["source"], ffcv_version=fields["ffcv_version"])
    _must_be(int, image_size=fields["image_size"], channels=fields["channels"])
    _must_be(list, classes=fields["classes"], mean=fields["mean"], std=fields["std"])
    for name in fields["classes"]:
        _must_be(str, classes=name)
    mean, std = (tuple(float(value) for value in fields[name]) for name in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3 or not min(std) > 0 or not all(map(math.isfinite, mean + std)):
        raise ValueError("mean or std are not what they should be")
    if not fields["classes"]:
        raise ValueError("there are no classes")
    return DatasetInfo(**{**fields, "splits": splits, "mean": mean, "std": std, "classes": tuple(fields["classes"])})


def _must_be(kind: type, **values: object) -> None:
    """JSON holds anything, and NumPy, asked whether a number differs from a list, has no answer."""
    for name, value in values.items():
        if type(value) is not kind:
            raise TypeError(f"{name} is {value!r}")


def verify_dataset(directory: Path, info: DatasetInfo) -> None:
    """Raises InputError unless both beton files are whole and hold, bit for bit, what dataset.json says."""
    try:
        for split in info.splits.values():
            path = directory / split.file
            check_beton(path, count=split.count, image_size=info.image_size, num_classes=len(info.classes))
            if path.stat().st_size != split.bytes or file_sha256(path) != split.sha256:
                problem = f"is not the file that {MANIFEST} describes (its sha256 differs)"
                raise InputError(f"{path} {problem}; write the data anew")
    except InputError as error:
        raise InputError(f"{error}: {preparation(directory, asdict(info))}") from None


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
