"""dataset.json, the description of a prepared dataset: its fields, and the code that checks them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.beton import Expected
from data_prep.encoding import ENCODINGS
from data_prep.errors import quoted
from data_prep.sources import Source

FORMAT_VERSION = 2
MANIFEST = "dataset.json"
SPLITS = ("train", "test")
MAX_IMAGE_SIZE = 1024
MAX_STATISTIC = 1e6  # far above any mean or standard deviation on a 0-1 scale
KINDS = {str: "a string", int: "a whole number", list: "a list", dict: "a JSON object"}


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """The beton file (FFCV's format) of one split."""

    file: str
    count: int
    bytes: int
    sha256: str
    tables_sha256: str  # of the file's tables, which contain the labels and the checksums of the images


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The content of dataset.json. `mean` and `std` are those of the training images, per channel, on a 0-1 scale.

    `splits` may lack "train". Such a dataset can only be used for evaluation, and its `mean` and `std` are those of the
    test images.
    """

    format_version: int
    source: str
    classes: tuple[str, ...]
    image_size: int
    channels: int
    encoding: Literal["raw", "jpeg"]  # of the images in the beton files
    quality: int | None  # of the JPEGs, 1 to 100; absent from dataset.json for raw images
    splits: Mapping[str, SplitInfo]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    ffcv_version: str
    skipped: tuple[str, ...] = ()  # files that --skip-unreadable left out; absent from dataset.json if there are none

    def expected(self, split: SplitInfo) -> Expected:
        """What the beton file of `split` must contain."""
        return Expected(split.count, self.image_size, len(self.classes), self.encoding)

    def as_json(self) -> dict[str, Any]:
        fields = asdict(self)
        if not self.skipped:
            del fields["skipped"]
        if self.quality is None:
            del fields["quality"]
        return fields


def check_description(source: Source) -> None:
    """Raises ValueError if no dataset can be made from `source`. Reads none of its images."""
    if not 1 <= source.image_size <= MAX_IMAGE_SIZE:
        raise ValueError(f"images must have sides of 1 to {MAX_IMAGE_SIZE} pixels, got {source.image_size}")
    if not source.count("test"):
        raise ValueError("a dataset needs test images, got none")
    if not source.classes or not all(isinstance(name, str) for name in source.classes):
        raise ValueError(f"classes must be strings, got {source.classes}")
    _check_different(source.classes)
    if source.count("train") and len(source.classes) < 2:
        raise ValueError(f"training needs at least two classes, got {source.classes}")


def parse_manifest(fields: dict[str, Any]) -> DatasetInfo:
    """The dataset that `fields` describe. Raises KeyError, TypeError or ValueError if they are wrong."""
    _check_type(dict, splits=fields["splits"])
    present = [name for name in SPLITS if name == "test" or name in fields["splits"]]
    splits = {name: _parse_split(name, fields["splits"][name]) for name in present}
    _check_type(str, source=fields["source"], ffcv_version=fields["ffcv_version"])
    _check_type(int, image_size=fields["image_size"], channels=fields["channels"])
    _check_type(list, mean=fields["mean"], std=fields["std"])
    if not 1 <= fields["image_size"] <= MAX_IMAGE_SIZE:
        raise ValueError(f"image_size must be 1 to {MAX_IMAGE_SIZE}, got {quoted(fields['image_size'])}")
    if fields["channels"] != 3:
        raise ValueError(f"channels must be 3, got {quoted(fields['channels'])}")
    if fields["encoding"] not in ENCODINGS:
        raise ValueError(f"encoding must be {' or '.join(ENCODINGS)}, got {quoted(fields['encoding'])}")
    quality = fields.get("quality")
    if (type(quality) is not int or not 1 <= quality <= 100) if fields["encoding"] == "jpeg" else quality is not None:
        raise ValueError(f"quality must be 1 to 100 for jpeg and absent for raw, got {quoted(quality)}")
    skipped = fields.get("skipped", [])
    _check_strings("classes", fields["classes"])
    _check_strings("skipped", skipped)
    if not fields["classes"]:
        raise ValueError("classes must not be empty")
    _check_different(fields["classes"])
    mean, std = (_three_numbers(name, fields[name]) for name in ("mean", "std"))
    if min(std) <= 0:
        raise ValueError(f"std must be positive, got {list(std)}")
    classes = tuple(fields["classes"])
    parsed = {
        "splits": splits,
        "mean": mean,
        "std": std,
        "classes": classes,
        "quality": quality,
        "skipped": tuple(skipped),
    }
    return DatasetInfo(**{**fields, **parsed})


def _parse_split(name: str, fields: object) -> SplitInfo:
    if not isinstance(fields, dict):
        raise TypeError(f"splits: {name} must be a JSON object, got {quoted(fields)}")
    split = SplitInfo(**fields)
    _check_type(str, file=split.file, sha256=split.sha256, tables_sha256=split.tables_sha256)
    _check_type(int, count=split.count, bytes=split.bytes)
    if Path(split.file).name != split.file or "\0" in split.file:
        raise ValueError(f"file must be the name of a file in the same folder, got {quoted(split.file)}")
    if split.count < 1:
        raise ValueError(f"count must be positive, got {split.count}")
    return split


def _three_numbers(name: str, values: list[Any]) -> tuple[float, float, float]:
    for value in values:
        if type(value) not in (int, float) or not abs(value) < MAX_STATISTIC:
            raise ValueError(f"{name} must have 3 numbers below {MAX_STATISTIC:,.0f}, got {quoted(value)}")
    if len(values) != 3:
        raise ValueError(f"{name} must have 3 numbers, got {len(values)}")
    red, green, blue = map(float, values)
    return red, green, blue


def _check_type(kind: type, **values: object) -> None:
    """Raises TypeError unless each value has exactly the type `kind`, so that True does not count as a number."""
    for name, value in values.items():
        if type(value) is not kind:
            raise TypeError(f"{name} must be {KINDS[kind]}, got {quoted(value)}")


def _check_different(classes: Sequence[str]) -> None:
    """Raises ValueError if two classes have the same name."""
    name, count = Counter(classes).most_common(1)[0]
    if count > 1:
        raise ValueError(f"classes must have different names, got {quoted(name)} {count} times")


def _check_strings(name: str, values: list[Any]) -> None:
    """Raises TypeError unless `values` is a list of strings."""
    _check_type(list, **{name: values})
    for value in values:
        if type(value) is not str:
            raise TypeError(f"{name} must contain only strings, got {quoted(value)}")
