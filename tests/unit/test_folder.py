"""Folders of real image files, of every kind that people have, become the pixels one expects, or one clear line."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import InputError
from data_prep.sources.folder import load_folder, read_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def gradient(size: int) -> np.ndarray:
    """(size, size) uint8: brighter from left to right."""
    return np.broadcast_to(np.linspace(0, 255, size).astype(np.uint8), (size, size))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve training and four test images of two classes; the red value tells which is which."""
    for split, count in (("train", 6), ("test", 2)):
        for label, kind in enumerate(("cat", "dog")):
            for number in range(count):
                colour = (100 * label + 10 * number, 0, 0)
                save(tmp_path / split / kind / f"{number}.png", Image.new("RGB", (8, 8), colour))
    return tmp_path


def fails(root: Path, **options: Any) -> str:
    """The one line that `load_folder` refuses `root` with."""
    with pytest.raises(InputError) as caught:
        load_folder(root, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_png_of_the_right_size_is_kept_bit_for_bit(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(read_image(save(tmp_path / "a.png", Image.fromarray(pixels)), 32), pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    """Left black, right white, whatever the file calls it."""
    halves = np.zeros((32, 32), dtype=np.uint8)
    halves[:, 16:] = 255
    if mode == "I;16":
        image = Image.fromarray(halves.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(halves).convert("RGB").convert(mode)
    found = read_image(save(tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png"), image), 32)
    assert (found.shape, found.dtype) == ((32, 32, 3), np.uint8)
    assert np.abs(found.astype(int) - halves[..., None]).max() <= 3


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    deep = (gradient(32).astype(np.uint16)) * 257
    found = read_image(save(tmp_path / "a.png", Image.fromarray(deep)), 32)
    assert np.array_equal(found[..., 1], gradient(32))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_pixels_lie_over_white(mode: str, tmp_path: Path) -> None:
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    if mode in ("P", "RGB"):  # one colour stands for transparent
        transparency = 0 if mode == "P" else (0, 0, 0)
        path = save(tmp_path / "a.png", Image.new(mode, (32, 32), 0), transparency=transparency)
    else:
        path = save(tmp_path / "a.png", clear.convert(mode))
    assert (read_image(path, 32) == 255).all()


def test_half_transparent_red_becomes_pink(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.new("RGBA", (32, 32), (255, 0, 0, 128)))
    assert np.abs(read_image(path, 32)[0, 0].astype(int) - (255, 127, 127)).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_orientation_is_applied(suffix: str, tmp_path: Path) -> None:
    """Orientation 6: the camera was turned, the left of the stored pixels is the top of the picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(gradient(32)).convert("RGB")
    found = read_image(save(tmp_path / f"a.{suffix}", stored, exif=exif), 32)[..., 0].astype(int)
    assert found[0].max() < 16
    assert found[-1].min() > 239


@pytest.mark.parametrize("shape", [(32, 96), (96, 32)])
def test_the_central_square_is_taken(shape: tuple[int, int], tmp_path: Path) -> None:
    pixels = np.zeros((*shape, 3), dtype=np.uint8)
    centre = tuple(slice((side - 32) // 2, (side + 32) // 2) for side in shape)
    pixels[centre] = RED
    assert (read_image(save(tmp_path / "a.png", Image.fromarray(pixels)), 32) == RED).all()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_shrinking_is_antialiased(suffix: str, tmp_path: Path) -> None:
    """A fine checkerboard becomes grey; picking single pixels would leave black and white."""
    board = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    found = read_image(save(tmp_path / f"a.{suffix}", Image.fromarray(board)), 32)
    assert np.abs(found.astype(int) - 127).max() <= 8


@pytest.mark.parametrize("side", [1, 5, 33, 500])
def test_any_size_is_brought_to_the_one_asked_for(side: int, tmp_path: Path) -> None:
    found = read_image(save(tmp_path / "a.jpeg", Image.new("RGB", (side, side), RED)), 24)
    assert found.shape == (24, 24, 3)
    assert np.abs(found.astype(int) - RED).max() <= 3


def test_images_and_labels_belong_together_and_classes_mix(photos: Path) -> None:
    found = load_folder(photos, size=8)
    assert (found.source, found.classes) == ("folder", ("cat", "dog"))
    assert (found.train.images.shape, found.test.images.shape) == ((12, 8, 8, 3), (4, 8, 8, 3))
    assert found.train.labels.dtype == np.int64
    assert np.array_equal(found.train.images[:, 0, 0, 0] >= 100, found.train.labels == 1)
    assert sorted(found.train.images[:, 0, 0, 0]) == [*range(0, 60, 10), *range(100, 160, 10)]
    assert sorted(set(found.train.labels[:5])) == [0, 1]  # not one class after the other


def test_the_order_depends_on_names_alone(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    for path in sorted(photos.rglob("*.png"), reverse=True):
        save(other / path.relative_to(photos), Image.open(path))
    first, second = load_folder(photos, size=8), load_folder(other, size=8)
    assert np.array_equal(first.train.images, second.train.images)
    assert np.array_equal(first.test.labels, second.test.labels)


def test_val_stands_for_test(photos: Path) -> None:
    before = load_folder(photos, size=8)
    (photos / "test").rename(photos / "val")
    assert np.array_equal(load_folder(photos, size=8).test.images, before.test.images)


def test_hidden_and_foreign_files_are_passed_over_and_suffixes_may_shout(photos: Path) -> None:
    (photos / "train" / ".cache").mkdir()
    for name in (".DS_Store", "._0.png", "Thumbs.db", "notes.txt"):
        (photos / "train" / "cat" / name).write_bytes(b"no image")
    save(photos / "train" / "cat" / "LOUD.JPG", Image.new("RGB", (8, 8), WHITE))
    found = load_folder(photos, size=8)
    assert found.classes == ("cat", "dog")
    assert len(found.train.labels) == 13


def test_progress_ends_at_the_number_of_images(photos: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_folder(photos, size=8, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (16, 16)


def test_damaged_files_are_named(photos: Path) -> None:
    good = save(photos / "a.jpg", Image.fromarray(gradient(64))).read_bytes()
    (photos / "train" / "cat" / "cut.jpg").write_bytes(good[: len(good) // 2])
    (photos / "train" / "dog" / "empty.png").write_bytes(b"")
    line = fails(photos)
    assert "2 image files cannot be read" in line
    assert f"{photos}/train/cat/cut.jpg" in line
    assert f"{photos}/train/dog/empty.png" in line


def test_of_many_damaged_files_five_are_named(photos: Path) -> None:
    for number in range(100, 108):
        (photos / "train" / "cat" / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    line = fails(photos)
    assert "8 image files" in line
    assert "104.png" in line
    assert "105.png" not in line
    assert "and 3 more" in line


def test_a_png_with_one_wrong_byte_is_damaged(photos: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    path = save(photos / "train" / "cat" / "flipped.png", Image.fromarray(noise))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert str(path) in fails(photos)


def test_a_missing_root_or_split_is_named(photos: Path) -> None:
    assert str(photos / "absent") in fails(photos / "absent")
    (photos / "test").rename(photos / "tests")
    assert "test (or val)" in fails(photos)
    (photos / "train").rename(photos / "training")
    assert "train" in fails(photos)


def test_classes_that_differ_are_named(photos: Path) -> None:
    (photos / "test" / "dog").rename(photos / "test" / "hound")
    line = fails(photos)
    assert f"dog only in {photos}/train" in line
    assert f"hound only in {photos}/test" in line


def test_a_class_that_no_page_can_name_is_refused(photos: Path) -> None:
    for split in ("train", "test"):
        (photos / split / "dog").rename(photos / split / os.fsdecode(b"d\xf6g"))
    assert "'d\\udcf6g' is not UTF-8" in fails(photos)


def test_an_empty_class_or_split_is_named(photos: Path) -> None:
    (photos / "train" / "ant").mkdir()
    (photos / "test" / "ant").mkdir()
    assert f"{photos}/train/ant" in fails(photos)
    (photos / "val").mkdir()
    for split in ("train", "test"):
        (photos / split).rename(photos / f"old-{split}")
        (photos / split).mkdir()
    assert f"{photos}/train" in fails(photos)


@pytest.mark.parametrize("size", [0, -1, 7, 100_000])
def test_an_absurd_size_is_refused(size: int, photos: Path) -> None:
    assert f"--size {size}" in fails(photos, size=size)


def test_five_thousand_real_images_take_seconds(jpeg_cifar_dir: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).symlink_to(jpeg_cifar_dir / "test")
    start = time.perf_counter()
    assert load_folder(tmp_path).train.images.shape == (5000, 32, 32, 3)
    assert time.perf_counter() - start < 30
