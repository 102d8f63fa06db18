"""Folders of image files: all images are read, or one line says which could not be read and why."""

import errno
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from PIL import Image

from data_prep.dataset import write_dataset
from data_prep.errors import InputError
from data_prep.sources import UnreadableImagesError
from data_prep.sources.folder import FolderImages
from data_prep.sources.picture import Picture, read_picture
from tests.support.photos import draw_photos, fails, gradient, load_folder, png_of, read_image, save

WHITE = (255, 255, 255)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return draw_photos(tmp_path)


def test_images_are_shuffled_and_keep_their_labels(photos: Path) -> None:
    found = load_folder(photos, size=8)
    assert found.classes == ("cat", "dog")
    assert (found.train.images.shape, found.test.images.shape) == ((12, 8, 8, 3), (4, 8, 8, 3))
    assert found.train.labels.dtype == np.int64
    assert np.array_equal(found.train.images[:, 0, 0, 0] >= 100, found.train.labels == 1)
    assert sorted(found.train.images[:, 0, 0, 0]) == [*range(0, 60, 10), *range(100, 160, 10)]
    assert sorted(set(found.train.labels[:5])) == [0, 1]  # the first images are not all of one class


def test_the_order_of_images_depends_only_on_file_names(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    for path in sorted(photos.rglob("*.png"), reverse=True):
        save(other / path.relative_to(photos), Image.open(path))
    first, second = load_folder(photos, size=8), load_folder(other, size=8)
    assert np.array_equal(first.train.images, second.train.images)
    assert np.array_equal(first.test.labels, second.test.labels)


def test_reading_ends_after_the_current_file_if_the_caller_stops_early(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, may_end, is_reading = [], Event(), Event()

    def read_slowly(path: Path, size: int) -> Picture:
        read.append(path)
        if len(read) == 7:  # the first file of the second chunk
            is_reading.set()
            may_end.wait()
        return read_picture(path, size)

    def shut_down(pool: ThreadPoolExecutor, **options: bool) -> None:
        may_end.set()
        shutdown(pool, **options)

    shutdown = ThreadPoolExecutor.shutdown
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shut_down)
    monkeypatch.setattr("data_prep.sources.folder.read_picture", read_slowly)
    monkeypatch.setattr("data_prep.sources.folder.num_threads", lambda: 1)
    monkeypatch.setattr("data_prep.sources.CHUNK_BYTES", 6 * 8 * 8 * 3)
    chunks = FolderImages(photos, size=8).chunks("train")
    assert len(next(chunks).labels) == 6
    is_reading.wait()
    chunks.close()
    assert len(read) == 7


def test_a_pipe_is_refused_at_once(photos: Path) -> None:
    os.mkfifo(photos / "train" / "cat" / "x.jpg")
    assert f"{photos}/train/cat/x.jpg (not a regular file)" in fails(photos)
    with pytest.raises(OSError, match="not a regular file"):
        read_image(photos / "train" / "cat" / "x.jpg", 8)


def spoil(photos: Path) -> None:
    """Writes eight damaged files: truncated, empty, or with a PNG signature but no image."""
    good = save(photos / "a.jpg", Image.fromarray(gradient(64))).read_bytes()
    (photos / "train" / "cat" / "cut.jpg").write_bytes(good[: len(good) // 2])
    (photos / "test" / "dog" / "two  spaces\n.png").write_bytes(b"")
    for number in range(100, 106):
        (photos / "train" / "cat" / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")


def test_all_damaged_files_are_reported_together(photos: Path) -> None:
    spoil(photos)
    with pytest.raises(UnreadableImagesError, match=r"8 image files cannot be read.* and 3 more; ") as caught:
        load_folder(photos)
    problems = sorted(caught.value.problems)
    assert len(problems) == 8
    assert f"$'{photos}/test/dog/two  spaces\\x0a.png' (the file is empty)" in problems
    assert any(f"{photos}/train/cat/cut.jpg" in line for line in problems)


def test_damaged_files_can_be_skipped_and_are_recorded(photos: Path) -> None:
    before = load_folder(photos, size=8)
    spoil(photos)
    found = load_folder(photos, size=8, skip_unreadable=True)
    assert (len(found.train.labels), len(found.test.labels)) == (12, 4)
    assert sorted(map(bytes, found.train.images)) == sorted(map(bytes, before.train.images))
    assert np.array_equal(found.train.images[:, 0, 0, 0] >= 100, found.train.labels == 1)
    assert sorted(found.skipped)[0] == "test/dog/two  spaces\\n.png"
    assert len(found.skipped) == 8
    assert found.notes == ("skipped 8 unreadable image files; dataset.json lists them",)


@pytest.mark.parametrize("split", ["train", "test"])
def test_error_names_a_class_in_which_no_image_can_be_read(split: str, photos: Path, tmp_path: Path) -> None:
    for path in (photos / split / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match=f"{split}/cat: no readable images"):
        write_dataset(FolderImages(photos, size=8, skip_unreadable=True), tmp_path / "set")


def test_a_png_with_one_wrong_byte_is_refused(photos: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    path = save(photos / "train" / "cat" / "flipped.png", Image.fromarray(noise))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert str(path) in fails(photos)


def test_duplicates_are_counted(photos: Path) -> None:
    for name in ("train/cat/twin.png", "train/dog/twin.png", "test/dog/twin.png"):
        save(photos / name, Image.new("RGB", (8, 8), WHITE))
    assert load_folder(photos, size=8).notes == (
        "warning: found 1 image in both train and test; the test accuracy will be too high",
        "warning: found 1 image in more than one class",
    )


def test_duplicates_are_listed_with_their_files(photos: Path) -> None:
    """Unreadable files are not listed, nor are images whose copies are all in one class of one split."""
    for name in ("train/cat/a b.png", "train/cat/c.png", "test/dog/twin.png"):
        save(photos / name, Image.new("RGB", (8, 8), WHITE))
    save(photos / "train/dog/0-again.png", Image.open(photos / "train/dog/0.png"))
    (photos / "train/cat/empty.png").touch()
    source = FolderImages(photos, size=8, skip_unreadable=True)
    for split in ("train", "test"):
        assert list(source.chunks(split))
    (line,) = source.findings().duplicates
    assert line == f"'{photos}/train/cat/a b.png' {photos}/test/dog/twin.png {photos}/train/cat/c.png"


@pytest.mark.parametrize("size", [0, -1, 7, 100_000])
def test_a_size_out_of_range_is_refused(size: int, photos: Path) -> None:
    assert f"--size must be 8 to 1024, got {size}" in fails(photos, size=size)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no memory"),
        OSError("out of memory when reading image file"),  # Pillow's message
        OSError(errno.EMFILE, "Too many open files"),
        ImportError("libtiff.so: failed to map segment from shared object"),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", ["data_prep.sources.folder.read_picture", "data_prep.sources.picture._finish"])
def test_a_lack_of_memory_or_file_handles_is_not_blamed_on_an_image(
    error: Exception, place: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(*_: object) -> None:
        raise error

    monkeypatch.setattr(place, lack)
    with pytest.raises(type(error), match=re.escape(str(error))):
        load_folder(photos, size=8, skip_unreadable=True)


def test_five_thousand_real_images_are_loaded(jpeg_cifar_dir: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).symlink_to(jpeg_cifar_dir / "test")
    assert load_folder(tmp_path).train.images.shape == (5000, 32, 32, 3)


@pytest.mark.parametrize(("color_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_dark_16_bit_images_in_color_or_with_transparency_are_reported(
    color_type: int, channels: int, photos: Path
) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (8, 8, channels)).astype(">u2")
    if channels != 3:
        values[..., -1] = 65535  # opaque
    (photos / "train" / "cat" / "12bit.png").write_bytes(png_of(values, color_type))
    (note,) = load_folder(photos, size=8).notes
    assert note.startswith("the 16-bit images are dark: their largest value is 3855")


def test_dark_16_bit_images_and_ignored_metadata_are_reported(photos: Path) -> None:
    """Images with 12-bit values in 16-bit files look almost black."""
    for split in ("train", "test"):
        values = np.random.default_rng(len(split)).integers(0, 4096, (8, 8)).astype(np.uint16)
        path = save(photos / split / "cat" / "12bit.png", Image.fromarray(values))
        content = path.read_bytes()
        path.write_bytes(content[:33] + b"\0\0\0\x04eXIfxxxx" + b"\0\0\0\0" + content[33:])
    dark, ignored = sorted(load_folder(photos, size=8).notes, reverse=True)
    assert dark.startswith("the 16-bit images are dark: their largest value is 40")
    assert ignored == "ignored unreadable metadata of 2 image files"
