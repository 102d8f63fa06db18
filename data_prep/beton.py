"""The format of FFCV's beton files, and the check of a file before FFCV reads it.

Each sample has three fields: `image` (raw RGB), `label`, and `index` (its position in the file, by which a reader can
verify what it got). FFCV trusts the content of a file, and some damaged files make it overwrite its own memory. So
`check_beton` checks every file before FFCV reads it.

For a given number and size of images, our writer always writes the same bytes, except for pixels and labels. So the
check compares all other bytes with the expected ones, instead of judging which deviations are harmless. It takes
milliseconds and does not import FFCV.
"""

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
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8"), ("index", "<i8")], align=True)
FIELDS = {"image": 2, "label": 1, "index": 1}  # name -> FFCV's type number, in the order of the file
VERSION, RAW, PAGE_SIZE = 2, 1, 2**23
SAMPLES_START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize


def check_beton(path: Path, *, count: int, image_size: int, num_classes: int) -> None:
    """Raises InputError unless `path` has exactly the structure that our writer produces for these numbers."""
    try:
        with open_regular(path) as file:
            content = np.memmap(file, dtype=np.uint8, mode="r")
    except FileNotFoundError:
        problem = "is missing"
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        problem = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    else:
        problem = _find_problem(content, count=count, image_size=image_size, num_classes=num_classes)
    if problem:
        raise InputError(f"{shell_path(path)} {problem}; prepare the data again")


def read_labels(path: Path) -> np.ndarray:
    """(N,) int64 labels of a checked file, without ffcv."""
    count = int(np.fromfile(path, dtype=HEADER, count=1)["num_samples"][0])
    return np.fromfile(path, dtype=SAMPLE, count=count, offset=SAMPLES_START)["label"].astype(np.int64)


def _find_problem(content: np.ndarray, *, count: int, image_size: int, num_classes: int) -> str | None:
    """What is wrong with the bytes of a beton file, or None."""
    if len(content) < SAMPLES_START:
        return "is truncated, or is not a beton file"
    header = content[: HEADER.itemsize].view(HEADER)[0]
    if (header["version"], header["num_fields"], header["page_size"]) != (VERSION, len(FIELDS), PAGE_SIZE):
        return "is not a beton file of this project"
    if header["num_samples"] != count:
        return f"has {header['num_samples']} images instead of {count}"
    addresses, table = _layout(len(content), count, image_size)
    if addresses is None or header["table"] != table:
        return "is incomplete: it was truncated, or writing it was interrupted"
    samples_end = SAMPLES_START + count * SAMPLE.itemsize
    labels = content[SAMPLES_START:samples_end].view(SAMPLE)["label"]
    if not np.all((labels >= 0) & (labels < num_classes)):
        return f"has labels outside the range 0 to {num_classes - 1}"
    for what, start, expected in (
        ("header", 0, _header(count, table)),
        ("description of the fields", HEADER.itemsize, _fields()),
        ("list of images", SAMPLES_START, _samples(addresses, labels, image_size)),
        ("allocation table", table, _allocations(addresses, image_size)),
    ):
        wanted = expected.view(np.uint8).reshape(-1)
        if not np.array_equal(content[start : start + len(wanted)], wanted):
            return f"has an unexpected {what}"
    if any(gap.any() for gap in _gaps(content, addresses, table, image_size)):
        return "has unexpected data between its images"
    return None


def _layout(length: int, count: int, image_size: int) -> tuple[np.ndarray | None, int]:
    """(addresses of the `count` images (N,) uint64, address of the table after them).

    (None, 0) if a file with these images does not have `length` bytes. FFCV fills pages of PAGE_SIZE with whole images,
    one after the other. `count` and `image_size` come from dataset.json, so nothing is allocated until they are known
    to match the length of this file.
    """
    size = image_size**2 * 3
    if not (0 < size <= PAGE_SIZE and 0 < count <= length):
        return None, 0
    per_page = PAGE_SIZE // size
    first = -(-(SAMPLES_START + count * SAMPLE.itemsize) // PAGE_SIZE) * PAGE_SIZE
    table = first - (-count // per_page) * PAGE_SIZE
    if length != table + count * ALLOCATION.itemsize:
        return None, 0
    position = np.arange(count, dtype=np.uint64)
    page, place = position // np.uint64(per_page), position % np.uint64(per_page)
    return np.uint64(first) + page * np.uint64(PAGE_SIZE) + place * np.uint64(size), table


def _gaps(content: np.ndarray, addresses: np.ndarray, table: int, image_size: int) -> list[np.ndarray]:
    """The bytes that belong to no image: before the first image, and at the end of each page."""
    size, first = image_size**2 * 3, int(addresses[0])
    samples_end = SAMPLES_START + len(addresses) * SAMPLE.itemsize
    page_ends = content[first:table].reshape(-1, PAGE_SIZE)[:, PAGE_SIZE // size * size :]
    return [content[samples_end:first], page_ends, content[int(addresses[-1]) + size : table]]


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


def _samples(addresses: np.ndarray, labels: np.ndarray, image_size: int) -> np.ndarray:
    samples = np.zeros(len(addresses), SAMPLE)
    samples["image"]["mode"], samples["image"]["ptr"] = RAW, addresses
    samples["image"]["width"] = samples["image"]["height"] = image_size
    samples["label"], samples["index"] = labels, np.arange(len(addresses))
    return samples


def _allocations(addresses: np.ndarray, image_size: int) -> np.ndarray:
    table = np.zeros(len(addresses), ALLOCATION)
    table["sample_id"], table["ptr"], table["size"] = np.arange(len(addresses)), addresses, image_size**2 * 3
    return table
