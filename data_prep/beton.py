"""The format of FFCV's beton files, and the check of a file before FFCV reads it.

Each sample has four fields: `image` (raw RGB or JPEG), `label`, `index` (its position in the file) and `checksum` (of
the stored image). With the last two, a reader can verify that it got the right image, undamaged. FFCV trusts the
content of a file, and some damaged files make it overwrite its own memory. Therefore `check_beton` checks every file
before FFCV reads it.

dataset.json, which lies beside the file, describes the dataset. Together with the sizes of the stored images, it
determines every byte that our writer puts outside the images, labels and checksums. The check computes these bytes and
refuses the file if any of them differs, even harmlessly. The check takes milliseconds and does not import FFCV. Below,
"a checked file" is one that has passed this check.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np

from data_prep.errors import InputError, shell_path
from data_prep.files import open_regular

# Our own copies of FFCV's types: importing ffcv.types takes seconds.
HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table", "<u8")],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8"), ("index", "<i8"), ("checksum", "<i8")], align=True)
FIELDS = {"image": 2, "label": 1, "index": 1, "checksum": 1}  # name -> FFCV's type number, in the order of the file
IMAGE_MODES = {"jpeg": 0, "raw": 1}  # encoding -> FFCV's number for it
VERSION, PAGE_SIZE = 2, 2**23
SAMPLES_START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize


@dataclass(frozen=True)
class Expected:
    """What dataset.json says about a beton file."""

    count: int
    image_size: int
    num_classes: int
    encoding: str = "raw"


def check_beton(path: Path, expected: Expected) -> None:
    """Raises InputError unless `path` has exactly the structure that our writer produces for `expected`."""
    fix = "prepare the data again"
    try:
        with open_regular(path) as file:
            problem = _find_problem(_Content(file), expected)
    except FileNotFoundError:
        problem = "is missing"
    except PermissionError as error:
        problem, fix = f"cannot be read ({error.strerror})", "change its permissions"
    except (OSError, ValueError) as error:  # ValueError: the file was truncated during the check
        problem = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if problem:
        raise InputError(f"{shell_path(path)} {problem}; {fix}")


def read_samples(path: Path) -> np.ndarray:
    """(N,) of dtype SAMPLE: address, label, index and checksum of each image in a checked file."""
    count = int(np.fromfile(path, dtype=HEADER, count=1)["num_samples"][0])
    return np.fromfile(path, dtype=SAMPLE, count=count, offset=SAMPLES_START)


def tables_sha256(path: Path) -> str:
    """sha256 of the header, fields, samples (with labels and checksums) and allocation table, but not of the images."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        header = np.frombuffer(file.read(HEADER.itemsize), HEADER)[0]
        count = int(header["num_samples"])
        file.seek(0)
        digest.update(file.read(SAMPLES_START + count * SAMPLE.itemsize))
        file.seek(int(header["table"]))
        digest.update(file.read(count * ALLOCATION.itemsize))
    return digest.hexdigest()


def holds_jpegs(path: Path) -> bool:
    """Whether the images of a checked file are JPEGs. If not, they are raw."""
    first = np.fromfile(path, dtype=SAMPLE, count=1, offset=SAMPLES_START)
    return int(first["image"]["mode"][0]) == IMAGE_MODES["jpeg"]


def read_labels(path: Path) -> np.ndarray:
    """(N,) int64 labels of a checked file."""
    return read_samples(path)["label"].astype(np.int64)


def read_sizes(path: Path) -> np.ndarray:
    """(N,) int64: size in bytes of each image in a checked file."""
    header = np.fromfile(path, dtype=HEADER, count=1)[0]
    table = np.fromfile(path, dtype=ALLOCATION, count=int(header["num_samples"]), offset=int(header["table"]))
    return table["size"].astype(np.int64)


class _Content:
    """The bytes of a file. Only requested slices are read; a memory map would load megabytes around each slice."""

    def __init__(self, file: BufferedReader) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self._size)
        found = np.empty(max(stop - start, 0), dtype=np.uint8)
        self._file.seek(start)
        return found[: self._file.readinto(found.data)]


def _find_problem(content: _Content, expected: Expected) -> str | None:
    """What is wrong with the bytes of a beton file, or None."""
    if len(content) < SAMPLES_START:
        return "is truncated, or is not a beton file"
    header, count = content[: HEADER.itemsize].view(HEADER)[0], expected.count
    if (header["version"], header["num_fields"], header["page_size"]) != (VERSION, len(FIELDS), PAGE_SIZE):
        return "is not a beton file of this project"
    if header["num_samples"] != count:
        return f"has {header['num_samples']} images instead of {count}"
    sizes, table = _sizes(content, expected), len(content) - count * ALLOCATION.itemsize
    addresses, end = (None, 0) if sizes is None else _addresses(sizes)
    if sizes is None or addresses is None or not header["table"] == table == end:
        return "is incomplete: it was truncated, or writing it was interrupted"
    samples = content[SAMPLES_START : SAMPLES_START + count * SAMPLE.itemsize].view(SAMPLE)
    if not np.all((samples["label"] >= 0) & (samples["label"] < expected.num_classes)):
        return f"has labels outside the range 0 to {expected.num_classes - 1}"
    for what, start, wanted in (
        ("header", 0, _header(count, table)),
        ("description of the fields", HEADER.itemsize, _fields()),
        ("list of images", SAMPLES_START, _samples(addresses, samples, expected)),
        ("allocation table", table, _allocations(addresses, sizes)),
    ):
        raw = wanted.view(np.uint8).reshape(-1)
        if not np.array_equal(content[start : start + len(raw)], raw):
            return f"has an unexpected {what}"
    if any(content[start:stop].any() for start, stop in _gaps(addresses, sizes)):
        return "has unexpected data between its images"
    return None


def _sizes(content: _Content, expected: Expected) -> np.ndarray | None:
    """(N,) int64: size in bytes of each image, or None if the number of images or a size is impossible.

    `expected` comes from dataset.json, which may be wrong. So no array of `expected.count` elements is created before
    that count is known to fit into the file.
    """
    count, size = expected.count, expected.image_size**2 * 3
    table = len(content) - count * ALLOCATION.itemsize
    if not 0 < count <= table // SAMPLE.itemsize:
        return None
    if expected.encoding == "raw":
        return np.full(count, size, dtype=np.int64) if size <= PAGE_SIZE else None
    sizes = content[table:].view(ALLOCATION)["size"]
    return sizes.astype(np.int64) if np.all((sizes > 0) & (sizes <= PAGE_SIZE)) else None


def _addresses(sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """(N,) int64 addresses of images of these sizes, and the address of the allocation table after them.

    FFCV fills pages of PAGE_SIZE bytes one after another. An image never crosses the end of a page.
    """
    count, ends = len(sizes), np.cumsum(sizes)
    page = -(-(SAMPLES_START + count * SAMPLE.itemsize) // PAGE_SIZE) * PAGE_SIZE
    addresses, start = ends - sizes, 0
    while start < count:
        before = int(addresses[start])  # bytes of all images on earlier pages
        stop = int(np.searchsorted(ends, before + PAGE_SIZE, side="right"))
        addresses[start:stop] += page - before
        start, page = stop, page + PAGE_SIZE
    return addresses, page


def _gaps(addresses: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of each unused range: before the first image, and at the end of each page."""
    yield SAMPLES_START + len(addresses) * SAMPLE.itemsize, int(addresses[0])
    pages = addresses // PAGE_SIZE
    last = np.flatnonzero(np.diff(pages, append=pages[-1] + 1))  # the last image of each page
    for position in last:
        yield int(addresses[position] + sizes[position]), int(pages[position] + 1) * PAGE_SIZE


def _header(count: int, table: int) -> np.ndarray:
    header = np.zeros(1, HEADER)
    header["version"], header["num_fields"], header["page_size"] = VERSION, len(FIELDS), PAGE_SIZE
    header["num_samples"], header["table"] = count, table
    return header


def _fields() -> np.ndarray:
    fields = np.zeros(len(FIELDS), FIELD)
    for field, (name, type_id) in zip(fields, FIELDS.items(), strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = list(name.encode())
    return fields


def _samples(addresses: np.ndarray, found: np.ndarray, expected: Expected) -> np.ndarray:
    """The expected samples of the file. Labels and checksums are copied from `found`, the actual samples."""
    samples = np.zeros(len(addresses), SAMPLE)
    samples["image"]["mode"], samples["image"]["ptr"] = IMAGE_MODES[expected.encoding], addresses
    samples["image"]["width"] = samples["image"]["height"] = expected.image_size
    samples["label"], samples["index"] = found["label"], np.arange(len(addresses))
    samples["checksum"] = found["checksum"]
    return samples


def _allocations(addresses: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    table = np.zeros(len(addresses), ALLOCATION)
    table["sample_id"], table["ptr"], table["size"] = np.arange(len(addresses)), addresses, sizes
    return table
