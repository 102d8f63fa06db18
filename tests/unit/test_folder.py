"""Folders of real image files: all of them are read, or one clear line says what was not and why."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import InputError
from data_prep.sources import folder
from data_prep.sources.folder import UnreadableImagesError, load_folder
from data_prep.sources.picture import read_image

WHITE = (255, 255, 255)


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
                color = (100 * label + 10 * number, count, 0)
                save(tmp_path / split / kind / f"{number}.png", Image.new("RGB", (8, 8), color))
    return tmp_path


def fails(root: Path, **options: Any) -> str:
    """The one line that `load_folder` refuses `root` with."""
    with pytest.raises(InputError) as caught:
        load_folder(root, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_images_and_labels_belong_together_and_classes_mix(photos: Path) -> None:
    found = load_folder(photos, size=8)
    assert (found.source, found.classes) == ("folder", ("cat", "dog"))
    assert (found.train.images.shape, found.test.images.shape) == ((12, 8, 8, 3), (4, 8, 8, 3))
    assert found.train.labels.dtype == np.int64
    assert np.array_equal(found.train.images[:, 0, 0, 0] >= 100, found.train.labels == 1)
    assert sorted(found.train.images[:, 0, 0, 0]) == [*range(0, 60, 10), *range(100, 160, 10)]
    assert sorted(set(found.train.labels[:5])) == [0, 1]  # the classes are mixed


def test_the_order_depends_on_names_alone(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    for path in sorted(photos.rglob("*.png"), reverse=True):
        save(other / path.relative_to(photos), Image.open(path))
    first, second = load_folder(photos, size=8), load_folder(other, size=8)
    assert np.array_equal(first.train.images, second.train.images)
    assert np.array_equal(first.test.labels, second.test.labels)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_other_common_names_of_the_test_split_are_accepted(name: str, photos: Path) -> None:
    before = load_folder(photos, size=8)
    (photos / "test").rename(photos / name)
    after = load_folder(photos, size=8)
    assert np.array_equal(after.test.images, before.test.images)
    assert f"test split: {photos / name}" in after.notes


def test_a_test_folder_without_classes_is_passed_over_for_val(photos: Path) -> None:
    (photos / "test").rename(photos / "val")
    (photos / "test").mkdir()
    save(photos / "test" / "0.png", Image.new("RGB", (8, 8)))
    assert any(f"passed over: {photos}/test" in note for note in load_folder(photos, size=8).notes)


def test_what_is_not_an_image_is_counted(photos: Path) -> None:
    (photos / "train" / ".cache").mkdir()
    (photos / "train" / "README.md").write_text("about")
    for name in (".DS_Store", "._0.png", "Thumbs.db", "notes.txt", "more.txt"):
        (photos / "train" / "cat" / name).write_bytes(b"no image")
    found = load_folder(photos, size=8)
    assert (found.classes, len(found.train.labels)) == (("cat", "dog"), 12)
    (line,) = found.notes
    assert line.startswith(f"passed over in {photos}/train: 4 files that are not images (.txt 2, ")
    assert ".md 1" in line
    assert ".db 1" in line
    assert line.endswith("3 hidden")


def test_kinds_are_told_by_content_and_subfolders_are_read(photos: Path) -> None:
    cat = photos / "train" / "cat"
    names = {"a.webp": "WEBP", "b.bmp": "BMP", "c.tif": "TIFF", "d.gif": "GIF", "e.jfif": "JPEG", "f.jpg?w=1": "JPEG"}
    for number, (name, kind) in enumerate({**names, "g": "JPEG", "LOUD.JPG": "JPEG", "h.png": "JPEG"}.items()):
        save(cat / name, Image.new("RGB", (8, 8), (number, 9, 9)), format=kind)
    save(cat / "2024" / "may" / "0.png", Image.new("RGB", (8, 8), (50, 50, 50)))
    (cat / "linked").symlink_to(save(photos / "elsewhere" / "0.png", Image.new("RGB", (8, 8), WHITE)).parent)
    found = load_folder(photos, size=8)
    assert len(found.train.labels) == 12 + 9 + 2
    assert found.notes == ()


def test_a_dead_link_is_named(photos: Path) -> None:
    (photos / "train" / "bird").symlink_to("/nowhere/bird")
    assert f"{photos}/train/bird is a link to something that is not there" in fails(photos)


def test_a_link_back_to_a_folder_above_is_named(photos: Path) -> None:
    (photos / "train" / "cat" / "again").symlink_to(photos / "train" / "cat")
    assert f"{photos}/train/cat/again: this link leads back" in fails(photos)
    (photos / "train" / "cat" / "again").unlink()
    (photos / "train" / "cat" / "loop").symlink_to("loop")
    assert f"{photos}/train/cat/loop" in fails(photos)


def test_a_pipe_is_refused_at_once(photos: Path) -> None:
    os.mkfifo(photos / "train" / "cat" / "x.jpg")
    assert f"{photos}/train/cat/x.jpg is not a regular file" in fails(photos)
    with pytest.raises(OSError, match="not a regular file"):
        read_image(photos / "train" / "cat" / "x.jpg", 8)


def test_progress_ends_at_the_number_of_images(photos: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_folder(photos, size=8, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (16, 16)


def spoil(photos: Path) -> None:
    """Eight damaged files: cut, empty, or only a signature."""
    good = save(photos / "a.jpg", Image.fromarray(gradient(64))).read_bytes()
    (photos / "train" / "cat" / "cut.jpg").write_bytes(good[: len(good) // 2])
    (photos / "test" / "dog" / "two  spaces\n.png").write_bytes(b"")
    for number in range(100, 106):
        (photos / "train" / "cat" / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")


def test_all_damaged_files_are_found_in_one_reading(photos: Path) -> None:
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


def test_a_class_that_loses_all_its_images_is_named(photos: Path) -> None:
    for path in (photos / "test" / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="test/cat: no image in it can be read"):
        load_folder(photos, size=8, skip_unreadable=True)


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
    assert "test (or val, valid, validation)" in fails(photos)
    (photos / "train").rename(photos / "training")
    assert "train" in fails(photos)


def test_classes_that_differ_are_named(photos: Path) -> None:
    (photos / "test" / "dog").rename(photos / "test" / "hound")
    line = fails(photos)
    assert f"dog only in {photos}/train" in line
    assert f"hound only in {photos}/test" in line


@pytest.mark.parametrize("other", ["Dog", "dog ", " dog", "\uff44og"])
def test_class_names_that_look_alike_are_shown_with_the_difference(other: str, photos: Path) -> None:
    (photos / "test" / "dog").rename(photos / "test" / other)
    assert f"'dog' and {other!a} look alike" in fails(photos)


def test_the_unicode_form_of_a_class_name_does_not_matter(photos: Path) -> None:
    (photos / "train" / "cat").rename(photos / "train" / "caf\xe9")
    (photos / "test" / "cat").rename(photos / "test" / "cafe\u0301")
    assert load_folder(photos, size=8).classes == ("caf\xe9", "dog")
    (photos / "train" / "cafe\u0301").mkdir()
    assert r"'cafe\u0301' and 'caf\xe9' look alike" in fails(photos)


def test_a_class_name_that_is_not_utf_8_is_refused(photos: Path) -> None:
    for split in ("train", "test"):
        (photos / split / "dog").rename(photos / split / os.fsdecode(b"d\xf6g"))
    assert "'d\\udcf6g' is not UTF-8" in fails(photos)


def test_an_empty_class_or_split_is_named(photos: Path) -> None:
    (photos / "train" / "ant").mkdir()
    (photos / "test" / "ant").mkdir()
    assert f"{photos}/train/ant" in fails(photos)
    for split in ("train", "test"):
        (photos / split).rename(photos / f"old-{split}")
        (photos / split).mkdir()
    assert f"{photos}/train" in fails(photos)


def test_a_single_class_is_refused(photos: Path) -> None:
    for split in ("train", "test"):
        (photos / split / "dog").rename(photos / f"{split} dogs")
    assert "one class" in fails(photos)


def test_duplicates_are_counted(photos: Path) -> None:
    for name in ("train/cat/twin.png", "train/dog/twin.png", "test/dog/twin.png"):
        save(photos / name, Image.new("RGB", (8, 8), WHITE))
    assert load_folder(photos, size=8).notes == (
        "warning: 1 images are in both train and test, so the test accuracy is too high",
        "warning: 1 images are in more than one class",
    )


@pytest.mark.parametrize("size", [0, -1, 7, 100_000])
def test_a_size_out_of_range_is_refused(size: int, photos: Path) -> None:
    assert f"--size must be 8 to 1024, got {size}" in fails(photos, size=size)


def test_what_the_machine_lacks_is_not_blamed_on_the_files(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(folder, "read_picture", lack)
    with pytest.raises(MemoryError):
        load_folder(photos, size=8, skip_unreadable=True)


def test_five_thousand_real_images_take_seconds(jpeg_cifar_dir: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).symlink_to(jpeg_cifar_dir / "test")
    start = time.perf_counter()
    assert load_folder(tmp_path).train.images.shape == (5000, 32, 32, 3)
    assert time.perf_counter() - start < 30
