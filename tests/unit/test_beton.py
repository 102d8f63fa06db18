"""Beton files: valid ones are read back, damaged ones are refused, and the writer never hangs."""

import filecmp
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep import beton_writer
from data_prep.beton import ALLOCATION, FIELD, HEADER, SAMPLE, SAMPLES_START, Expected, check_beton, read_labels
from data_prep.errors import InputError
from data_prep.sources import Split
from data_prep.sources.synthetic import draw_synthetic
from data_prep.spool import open_spool
from tests.support.betons import write_splits
from tests.support.processes import processes_with, wait_until
from tests.support.trainer import REPOSITORY, environment

WANTED = Expected(count=60, image_size=32, num_classes=10)


@pytest.fixture(scope="module")
def split() -> Split:
    return draw_synthetic(train_count=60, test_count=10, seed=2).train


@pytest.fixture(scope="module")
def whole(split: Split, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("beton")
    written: list[tuple[str, int]] = []
    write_splits(folder, {"one": split, "two": split}, progress=lambda name, count: written.append((name, count)))
    assert written[-1] == ("two", 60)
    one, two = (folder / f"{name}.beton" for name in ("one", "two"))
    assert filecmp.cmp(one, two, shallow=False), "the same input gave different bytes"
    return one.read_bytes()


def edit(part: str, dtype: np.dtype, offset: int, row: int, value: int) -> Callable[[bytearray], None]:
    """Returns a function that replaces one number in a table of the file."""

    def harm(content: bytearray) -> None:
        place = len(content) + offset if offset < 0 else offset
        table = np.frombuffer(content, dtype=dtype, offset=place, count=row + 1)
        target = table[row : row + 1]
        for name in part.split("."):
            target = target[name]
        target[...] = value

    return harm


def keep(share: float) -> Callable[[bytearray], None]:
    return lambda content: content.__delitem__(slice(int(len(content) * share), None))


def place_all_at(content: bytearray, address: int, step: int = 0) -> None:
    """Changes the addresses of all images, in the samples and in the allocation table."""
    addresses = address + step * np.arange(60, dtype=np.uint64)
    np.frombuffer(content, SAMPLE, 60, SAMPLES_START)["image"]["ptr"][:] = addresses
    np.frombuffer(content, ALLOCATION, 60, len(content) + TABLE_AT)["ptr"][:] = addresses


TABLE_AT = -60 * ALLOCATION.itemsize
DAMAGES: dict[str, Callable[[bytearray], None]] = {
    "empty": lambda content: content.clear(),
    "only 10 bytes": lambda content: content.__delitem__(slice(10, None)),
    "only the first half": keep(0.5),
    "half of the allocation table": lambda content: content.__delitem__(slice(len(content) + TABLE_AT // 2, None)),
    "one byte short": lambda content: content.__delitem__(-1),
    "one byte more": lambda content: content.append(0),
    "not a beton file": lambda content: content.__setitem__(slice(None), b"\xff\xd8 a JPEG, perhaps" * 10_000),
    "written without the allocation table": edit("table", HEADER, 0, 0, 0),
    "another version": edit("version", HEADER, 0, 0, 3),
    "too many samples": edit("num_samples", HEADER, 0, 0, 2**40),
    "another field type": edit("type_id", FIELD, HEADER.itemsize, 1, 2),
    "another width": edit("image.width", SAMPLE, SAMPLES_START, 7, 64),
    "a JPEG": edit("image.mode", SAMPLE, SAMPLES_START, 7, 0),
    "an address outside the file": edit("image.ptr", SAMPLE, SAMPLES_START, 7, 2**40),
    "a label too high": edit("label", SAMPLE, SAMPLES_START, 7, 10),
    "a label below zero": edit("label", SAMPLE, SAMPLES_START, 7, -1),
    "out of order": edit("index", SAMPLE, SAMPLES_START, 7, 8),
    "an allocation too large": edit("size", ALLOCATION, TABLE_AT, 7, 3072 * 500),
    "another sample in the table": edit("sample_id", ALLOCATION, TABLE_AT, 7, 8),
    "another page size": edit("page_size", HEADER, 0, 0, 2**22),
    "another field argument": edit("arguments", FIELD, HEADER.itemsize, 1, 1),
    "nonzero padding of a field": lambda content: content.__setitem__(HEADER.itemsize + FIELD.itemsize - 1, 1),
    "nonzero padding of a sample": lambda content: content.__setitem__(SAMPLES_START + 13, 1),
    "data before the first image": lambda content: content.__setitem__(2**23 - 1, 1),
    "data after the last image": lambda content: content.__setitem__(2**23 + 60 * 3072, 1),
    "overlapping images": lambda content: place_all_at(content, 2**23),
    "moved images": lambda content: place_all_at(content, 2**23 + 1, step=3072),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(whole: bytes, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "train.beton"
    path.write_bytes(whole)
    check_beton(path, WANTED)
    content = bytearray(whole)
    DAMAGES[damage](content)
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        check_beton(path, WANTED)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert "prepare the data again" in str(caught.value)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[1:])
def test_fields_in_another_order_are_refused(whole: bytes, tmp_path: Path, order: tuple[int, ...]) -> None:
    """FFCV trusts the order of the fields in the file, and would read labels as addresses."""
    content = bytearray(whole)
    fields = np.frombuffer(content, FIELD, 4, HEADER.itemsize)
    fields[:] = fields[list(order)]
    (tmp_path / "train.beton").write_bytes(content)
    with pytest.raises(InputError, match="description of the fields"):
        check_beton(tmp_path / "train.beton", WANTED)


def test_only_a_regular_file_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.beton")
    with pytest.raises(InputError, match="not a regular file"):
        check_beton(tmp_path / "train.beton", WANTED)


def test_images_that_fill_several_pages_pass_the_check(tmp_path: Path) -> None:
    """A page of 8 MiB is not a multiple of the size of an image."""
    images = np.random.default_rng(0).integers(0, 256, (7, 1000, 1000, 3), dtype=np.uint8)
    write_splits(tmp_path, {"train": Split(images, np.zeros(7, np.int64))})
    check_beton(tmp_path / "train.beton", Expected(count=7, image_size=1000, num_classes=1))


def test_read_labels_returns_the_written_labels(whole: bytes, split: Split, tmp_path: Path) -> None:
    (tmp_path / "train.beton").write_bytes(whole)
    assert np.array_equal(read_labels(tmp_path / "train.beton"), split.labels)


def test_table_layouts_equal_those_of_ffcv() -> None:
    from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType

    for ours, theirs in ((HEADER, HeaderType), (FIELD, FieldDescType), (ALLOCATION, ALLOC_TABLE_TYPE)):
        assert [ours.fields[name][1] for name in ours.names] == [theirs.fields[name][1] for name in theirs.names]  # type: ignore[index, union-attr]
        assert ours.itemsize == theirs.itemsize


@pytest.mark.parametrize(
    "bad",
    [
        Split(np.zeros((4, 32, 32), np.uint8), np.zeros(4, np.int64)),
        Split(np.zeros((4, 32, 32, 3), np.float32), np.zeros(4, np.int64)),
        Split(np.zeros((0, 32, 32, 3), np.uint8), np.zeros(0, np.int64)),
        Split(np.zeros((4, 32, 32, 3), np.uint8), np.zeros(3, np.int64)),
        Split(np.zeros((4, 32, 32, 3), np.uint8), np.array([0, 1, 2, -1])),
        Split(np.zeros((4, 32, 32, 3), np.uint8), np.array([0, 1, 2, 3])),
        Split(np.zeros((4, 16, 16, 3), np.uint8), np.zeros(4, np.int64)),
        Split(np.zeros((4, 32, 16, 3), np.uint8), np.zeros(4, np.int64)),
    ],
)
def test_invalid_images_or_labels_are_refused(bad: Split, tmp_path: Path) -> None:
    with open_spool(tmp_path, "train", "raw", side=32, num_classes=3) as spool:
        with pytest.raises(ValueError, match=r"images|labels"):
            spool.add(bad, [image.tobytes() for image in bad.images])
        assert spool.count == 0


def test_a_failed_writer_ends(tmp_path: Path) -> None:
    """The images are larger than a page, so FFCV's worker raises an error. FFCV itself would then wait forever."""
    huge = Split(np.zeros((2, 3000, 3000, 3), np.uint8), np.zeros(2, np.int64))
    with pytest.raises(ChildProcessError, match=r"FFCV's writer failed: .*Tried allocating"):
        write_splits(tmp_path, {"train": huge})
    wait_until_no_writer_is_left(tmp_path)


def test_a_writer_that_stalls_is_killed(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beton_writer, "START_SECONDS", 0.5)  # importing FFCV takes longer
    with pytest.raises(ChildProcessError, match="no progress"):
        write_splits(tmp_path, {"train": split})
    wait_until_no_writer_is_left(tmp_path)


SLOW_PARENT = """
import sys, numpy as np
from pathlib import Path
from tests.support.betons import write_splits
from data_prep.sources import Split
split = Split(np.zeros((20_000, 32, 32, 3), np.uint8), np.zeros(20_000, np.int64))
write_splits(Path(sys.argv[1]), {"train": split}, progress=lambda *_: print("writing", flush=True))
"""


def test_the_writer_dies_with_its_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", SLOW_PARENT, str(tmp_path)],
        env=environment(),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "writing\n"
        assert writers_for(tmp_path)
        parent.kill()
    wait_until_no_writer_is_left(tmp_path)


def writers_for(folder: Path) -> list[int]:
    return processes_with("data_prep.ffcv_writer", str(folder))


def wait_until_no_writer_is_left(folder: Path) -> None:
    wait_until(lambda: not writers_for(folder), "a writer is left", seconds=120)
