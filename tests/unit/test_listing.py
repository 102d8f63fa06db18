"""Listing the image files of a folder: names of splits and classes, links, and files that are not images."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.sources import UnreadableImagesError
from data_prep.sources.folder import FolderImages
from tests.support.photos import draw_photos, fails, load_folder, save

WHITE = (255, 255, 255)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return draw_photos(tmp_path)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_other_common_names_of_the_test_split_are_accepted(name: str, photos: Path) -> None:
    before = load_folder(photos, size=8)
    (photos / "test").rename(photos / name)
    after = load_folder(photos, size=8)
    assert np.array_equal(after.test.images, before.test.images)
    assert f"test split: {photos / name}" in after.notes


def test_val_is_the_test_split_if_the_test_folder_has_no_classes(photos: Path) -> None:
    (photos / "test").rename(photos / "val")
    (photos / "test").mkdir()
    save(photos / "test" / "0.png", Image.new("RGB", (8, 8)))
    assert any(f"ignored {photos}/test" in note for note in load_folder(photos, size=8).notes)


def test_files_that_are_not_images_are_counted(photos: Path) -> None:
    (photos / "train" / ".cache").mkdir()
    (photos / "train" / "README.md").write_text("about")
    for name in (".DS_Store", "._0.png", "Thumbs.db", "notes.txt", "more.txt"):
        (photos / "train" / "cat" / name).write_bytes(b"no image")
    found = load_folder(photos, size=8)
    assert (found.classes, len(found.train.labels)) == (("cat", "dog"), 12)
    (line,) = found.notes
    assert line.startswith(f"ignored in {photos}/train: 4 other files (.txt 2, ")
    assert ".md 1" in line
    assert ".db 1" in line
    assert line.endswith("3 hidden")


def test_images_are_recognized_by_content_and_subfolders_are_read(photos: Path) -> None:
    cat = photos / "train" / "cat"
    names = {"a.webp": "WEBP", "b.bmp": "BMP", "c.tif": "TIFF", "d.gif": "GIF", "e.jfif": "JPEG", "f.jpg?w=1": "JPEG"}
    for number, (name, kind) in enumerate({**names, "g": "JPEG", "LOUD.JPG": "JPEG", "h.png": "JPEG"}.items()):
        save(cat / name, Image.new("RGB", (8, 8), (number, 9, 9)), format=kind)
    save(cat / "2024" / "may" / "0.png", Image.new("RGB", (8, 8), (50, 50, 50)))
    (cat / "linked").symlink_to(save(photos / "elsewhere" / "0.png", Image.new("RGB", (8, 8), WHITE)).parent)
    found = load_folder(photos, size=8)
    assert len(found.train.labels) == 12 + 9 + 2
    assert found.notes == ()


def test_error_names_a_broken_link(photos: Path) -> None:
    (photos / "train" / "bird").symlink_to("/nowhere/bird")
    assert f"{photos}/train/bird: a link to something that does not exist" in fails(photos)


def test_one_error_names_all_broken_links_and_all_images_that_cannot_be_read(photos: Path) -> None:
    for split in ("train", "test"):
        for path in (photos / split / "cat").iterdir():
            path.unlink()
            path.symlink_to("/nowhere")
    (photos / "train" / "dog" / "empty.png").touch()
    with pytest.raises(UnreadableImagesError) as caught:
        load_folder(photos, size=8)
    problems = "\n".join(caught.value.problems)
    assert problems.count("a link to something that does not exist") == 6 + 2
    assert f"{photos}/train/dog/empty.png (" in problems


def test_broken_links_are_left_out_on_request(photos: Path) -> None:
    (photos / "train" / "cat" / "gone.png").symlink_to("/nowhere")
    found = load_folder(photos, size=8, skip_unreadable=True)
    assert len(found.train.labels) == 12
    assert found.skipped == ("train/cat/gone.png",)


def test_error_names_a_link_to_a_parent_folder_or_to_itself(photos: Path) -> None:
    cat = photos / "train" / "cat"
    (cat / "again").symlink_to(cat)
    assert f"{cat}/again is the same folder as {cat}; remove the link" in fails(photos)
    (cat / "again").unlink()
    (cat / "loop").symlink_to("loop")
    assert f"{cat}/loop" in fails(photos)


def test_a_folder_that_is_twice_in_a_class_is_refused(photos: Path) -> None:
    """With two links to the next folder in each folder, the image would be in the class thousands of times."""
    for level in range(12):
        (photos / f"{level}").mkdir()
        for name in ("a", "b"):
            (photos / f"{level}" / name).symlink_to(photos / f"{level + 1}")
    save(photos / "12" / "0.png", Image.new("RGB", (8, 8), WHITE))
    (photos / "train" / "cat" / "more").symlink_to(photos / "0")
    deepest = f"{photos}/train/cat/more{'/a' * 11}"
    assert f"{deepest}/b is the same folder as {deepest}/a; remove the link" in fails(photos)


def test_a_folder_may_be_linked_from_several_classes_and_splits(photos: Path) -> None:
    save(photos / "more" / "0.png", Image.new("RGB", (8, 8), WHITE))
    for place in ("train/cat", "train/dog", "test/cat"):
        (photos / place / "more").symlink_to(photos / "more")
    found = load_folder(photos, size=8)
    assert (len(found.train.labels), len(found.test.labels)) == (12 + 2, 4 + 1)


def test_error_names_a_root_that_is_not_a_folder_and_a_missing_test_split(photos: Path) -> None:
    assert f"--root {photos}/absent: no such folder; " in fails(photos / "absent")
    (photos / "file").touch()
    assert f"--root {photos}/file: a file, not a folder; " in fails(photos / "file")
    (photos / "test").rename(photos / "held-out")
    assert "no test folder (test or testing or val or" in fails(photos)


def test_error_names_classes_that_exist_in_only_one_split(photos: Path) -> None:
    (photos / "test" / "dog").rename(photos / "test" / "hound")
    line = fails(photos)
    assert f"dog only in {photos}/train" in line
    assert f"hound only in {photos}/test" in line


@pytest.mark.parametrize("other", ["Dog", "dog ", " dog", "\uff44og"])
def test_class_names_that_look_alike_are_shown_with_the_difference(other: str, photos: Path) -> None:
    (photos / "test" / "dog").rename(photos / "test" / other)
    assert f"'dog' and {other!a} only look alike" in fails(photos)


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


def test_error_names_an_empty_class_or_split(photos: Path) -> None:
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
    assert "only one class folder" in fails(photos)


def test_a_root_without_train_gives_only_the_test_split(photos: Path) -> None:
    """One class is enough: the dataset is only for evaluation, and the model has its own list of classes."""
    shutil.rmtree(photos / "train")
    shutil.rmtree(photos / "test" / "dog")
    source = FolderImages(photos, size=8)
    assert (source.classes, source.count("train"), source.count("test")) == (("cat",), 0, 2)
    assert [len(chunk.labels) for split in ("train", "test") for chunk in source.chunks(split)] == [2]
    assert any("has no train folder, so the dataset is only for evaluation" in note for note in source.findings().notes)


@pytest.mark.parametrize(("train", "test"), [("Train", "TEST"), ("training", "Testing"), ("TRAIN", "dev")])
def test_splits_are_found_by_their_common_names(train: str, test: str, photos: Path) -> None:
    (photos / "train").rename(photos / train)
    (photos / "test").rename(photos / test)
    found = load_folder(photos, size=8)
    assert (len(found.train.labels), len(found.test.labels)) == (12, 4)
    assert found.notes == (f"train split: {photos / train}", f"test split: {photos / test}")


def test_folder_named_train_is_preferred_to_other_training_folders(photos: Path) -> None:
    (photos / "Train" / "ant").mkdir(parents=True)
    assert load_folder(photos, size=8).notes == (f"ignored {photos}/Train, because {photos}/train is the train split",)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_that_is_a_file_or_a_broken_link_is_an_error(split: str, photos: Path) -> None:
    (photos / split).rename(photos / "kept")
    (photos / split).write_text("text")
    assert f"{photos}/{split} is a file, not a folder of classes" in fails(photos)
    (photos / split).unlink()
    (photos / split).symlink_to("nowhere")
    assert f"{photos}/{split}: a link to something that does not exist" in fails(photos)


@pytest.mark.parametrize("other", ["dog ", "d\u200bog", "\u202edog"])
def test_two_classes_of_a_split_that_look_alike_are_refused(other: str, photos: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(photos / split / "dog", photos / split / other)
    line = fails(photos)
    assert repr("dog") in line
    assert f"{other!a}" in line
    assert "look alike; rename one" in line


def test_classes_that_differ_only_in_case_are_kept(photos: Path) -> None:
    for split in ("train", "test"):
        (photos / split / "cat").rename(photos / split / "Dog")
    assert load_folder(photos, size=8).classes == ("Dog", "dog")


def test_text_and_audio_files_that_begin_like_images_are_ignored(photos: Path) -> None:
    for name, content in {
        "a.txt": b"BMW is a car maker",
        "b.txt": b"P5 is a label",
        "c.wav": b"RIFF\1\0\0\0WAVE",
    }.items():
        (photos / "train" / "cat" / name).write_bytes(content)
    (line,) = load_folder(photos, size=8).notes
    assert "3 other files (.txt 2, .wav 1)" in line


def test_images_without_a_suffix_are_read_in_every_format(photos: Path) -> None:
    cat, red = photos / "train" / "cat", Image.new("RGB", (8, 8), "red")
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        save(cat / kind, red, format=kind)
    save(cat / "big", red, format="TIFF", big_tiff=True)
    for number, text in enumerate((b"P1\n1 1\n0\n", b"P2\n1 1\n255\n9\n", b"P3 1 1 255 9 9 9 ", b"P4 8 1 \0")):
        (cat / f"text {number}").write_bytes(text)
        (cat / f"{number}.pnm").write_bytes(text)
    found = load_folder(photos, size=8)
    assert (len(found.train.labels), found.notes) == (12 + 8 + 8, ())


def test_folders_nested_too_deep_are_refused(photos: Path) -> None:
    deep = photos / "train" / "cat" / "/".join("a" * 100)
    deep.mkdir(parents=True)
    assert "nested more than 100 folders deep" in fails(photos)
    deep.rmdir()
    assert len(load_folder(photos, size=8).train.labels) == 12
