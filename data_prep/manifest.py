"""Defines the fields of dataset.json, which describes a prepared dataset, and checks their values.

`check_description` checks a source before a dataset is made from it.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
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

    def to_dict(self) -> dict[str, Any]:
        """The fields of dataset.json."""
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
    if not source.classes:
        raise ValueError("a dataset needs classes, got none")
    if not all(isinstance(name, str) for name in source.classes):
        raise ValueError(f"classes must be strings, got {source.classes}")
    _check_different(source.classes)
    if source.count("train") and len(source.classes) < 2:
        raise ValueError(f"training needs at least two classes, got {source.classes}")


def parse_manifest(fields: dict[str, Any]) -> DatasetInfo:
    """The dataset that `fields` describe. Raises TypeError or ValueError if they are wrong."""
    _check_names("it", fields, DatasetInfo, optional=("quality", "skipped"))
    _check_type(dict, splits=fields["splits"])
    if "test" not in fields["splits"]:
        raise ValueError("splits lacks the split test")
    splits = {name: _parse_split(name, fields["splits"][name]) for name in SPLITS if name in fields["splits"]}
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
    is_valid = (type(quality) is int and 1 <= quality <= 100) if fields["encoding"] == "jpeg" else quality is None
    if not is_valid:
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


def _parse_split(name: str, fields: Any) -> SplitInfo:
    place = f"splits.{name}"
    _check_type(dict, **{place: fields})
    _check_names(place, fields, SplitInfo)
    split = SplitInfo(**fields)
    for kind, names in ((str, ("file", "sha256", "tables_sha256")), (int, ("count", "bytes"))):
        _check_type(kind, **{f"{place}.{field}": fields[field] for field in names})
    if Path(split.file).name != split.file or "\0" in split.file:
        raise ValueError(f"{place}.file must be the name of a file in the same folder, got {quoted(split.file)}")
    if split.count < 1:
        raise ValueError(f"{place}.count must be positive, got {split.count}")
    return split


def _three_numbers(name: str, values: list[Any]) -> tuple[float, float, float]:
    for value in values:
        if type(value) not in (int, float) or not abs(value) < MAX_STATISTIC:
            limits = f"-{MAX_STATISTIC:,.0f} and {MAX_STATISTIC:,.0f}"
            raise ValueError(f"{name} must have 3 numbers between {limits}, got {quoted(value)}")
    if len(values) != 3:
        raise ValueError(f"{name} must have 3 numbers, got {len(values)}")
    red, green, blue = map(float, values)
    return red, green, blue


def _check_names(owner: str, found: Mapping[str, Any], kind: type, optional: Collection[str] = ()) -> None:
    """Raises ValueError unless `found` has the fields of the dataclass `kind` and no others.

    Fields in `optional` may be missing. `owner`: what has these fields, as the subject of the message.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    for name in names:
        if name not in found and name not in optional:
            raise ValueError(f"{owner} lacks the field {name}")
    for name in found:
        if name not in names:
            raise ValueError(f"{owner} has an unknown field, {quoted(name)}")


def _check_type(kind: type, **values: object) -> None:
    """Raises TypeError unless each value has exactly the type `kind`, so that True does not count as a number."""
    for name, value in values.items():
        if type(value) is not kind:
            raise TypeError(f"{name} must be {KINDS[kind]}, got {quoted(value)}")


def _check_different(classes: Sequence[str]) -> None:
    """Raises ValueError if two classes have the same name. There must be at least one class."""
    name, count = Counter(classes).most_common(1)[0]
    if count > 1:
        raise ValueError(f"classes must have different names, got {quoted(name)} {count} times")


def _check_strings(name: str, values: Any) -> None:
    """Raises TypeError unless `values`, the value of the field `name`, is a list of strings."""
    _check_type(list, **{name: values})
    for value in values:
        if type(value) is not str:
            raise TypeError(f"{name} must contain only strings, got {quoted(value)}")
