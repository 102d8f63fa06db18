"""The --out folder is checked before any image is read, and lists of image files are written beside that folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from data_prep.__main__ import describe, main
from data_prep.dataset import write_dataset
from data_prep.errors import InputError
from data_prep.files import MAX_JSON_BYTES
from data_prep.manifest import DatasetInfo
from data_prep.output import remove_left_behind, remove_lists, write_list
from data_prep.sources.synthetic import draw_synthetic
from tests.support.folders import DATASET_FILES, names_in
from tests.support.photos import draw_photos
from tests.support.trainer import environment


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return draw_photos(tmp_path / "photos")


def refused(photos: Path, out: Path | str, capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the line with which the command refuses `out`. The command must not change any folder."""
    before = sorted(photos.parent.rglob("*"))
    assert main(["--source", "folder", "--root", str(photos), "--out", str(out), "--size", "8"]) == 2
    assert sorted(photos.parent.rglob("*")) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "a\udcff"])
def test_a_name_with_unprintable_characters_is_refused(
    name: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--out must have no line breaks" in refused(photos, photos.parent / name, capsys)


def test_an_empty_name_is_refused(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos.parent / "here").mkdir()
    monkeypatch.chdir(photos.parent / "here")
    assert "--out must not be empty" in refused(photos, "", capsys)


@pytest.mark.parametrize("value", ["1e3", "0"])
def test_a_pixel_limit_that_is_not_a_positive_whole_number_is_refused(value: str, photos: Path) -> None:
    command = [sys.executable, "-m", "data_prep", "--source", "folder", "--root", photos, "--out", photos / "out"]
    env = environment(DATA_PREP_MAX_PIXELS=value)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    line = f"error: DATA_PREP_MAX_PIXELS must be a positive whole number such as 200000000, got {value}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_a_name_that_is_too_long_is_refused(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "File name too long" in refused(photos, photos.parent / ("a" * 300), capsys)
    assert "no such folder" in refused(photos / ("a" * 300), photos.parent / "out", capsys)


def test_leftovers_of_a_killed_command_are_removed_before_the_free_space_is_checked(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = photos.parent / "out"
    # In a new container, this process may have the same ID as the killed one.
    leftovers = [out / f".writing-{number}" for number in (10**9, os.getpid())]
    for folder in leftovers:
        folder.mkdir(parents=True)

    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=0 if any(folder.exists() for folder in leftovers) else 2**40)

    monkeypatch.setattr("shutil.disk_usage", usage)
    assert main(["--source", "folder", "--root", str(photos), "--out", str(out), "--size", "8"]) == 0
    assert names_in(out) == DATASET_FILES


def test_all_files_of_a_killed_command_are_removed(tmp_path: Path) -> None:
    def keep_a_copy(*_: object) -> None:
        for folder in (tmp_path / "set").glob(".writing-*"):
            shutil.copytree(folder, tmp_path / "other" / folder.name, dirs_exist_ok=True)

    (tmp_path / "other").mkdir()
    source = draw_synthetic(train_count=10, test_count=10, seed=0, size=8)
    write_dataset(source, tmp_path / "set", progress=keep_a_copy)
    (folder,) = (tmp_path / "other").iterdir()
    assert names_in(folder) >= {"lock", "train.beton", "test.records"}
    remove_left_behind(tmp_path / "other")
    assert names_in(tmp_path / "other") == set()


@pytest.mark.parametrize("content", ["notes.txt", "lock/notes.txt", "train.json/notes.txt"])
def test_folders_and_links_of_the_user_are_kept(content: str, tmp_path: Path) -> None:
    """Their names start like that of a temporary folder."""
    for folder in (tmp_path / ".writing-mine", tmp_path / "linked"):
        (folder / content).parent.mkdir(parents=True)
        (folder / content).touch()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "train.beton").touch()
    (tmp_path / ".writing-a").symlink_to("linked")
    (tmp_path / ".writing-b").symlink_to("ours")
    (tmp_path / ".writing-c").mkdir()
    (tmp_path / ".writing-c" / "lock").symlink_to("../made")
    before = sorted(tmp_path.rglob("*"))
    remove_left_behind(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("names", [["dataset.json", "train.beton"], ["dataset.json"], ["test.beton"]], ids=" ".join)
def test_files_that_data_prep_did_not_write_are_not_replaced(
    names: list[str], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names:
        (photos / name).write_text('{"coco": 1}')
    words = f"contains {', '.join(names)}, but no dataset.json that data_prep wrote; use another folder, or remove"
    assert words in refused(photos, photos, capsys)
    with pytest.raises(InputError, match=words):
        write_dataset(draw_synthetic(train_count=10, test_count=10, seed=0, size=8), photos)
    assert {(photos / name).read_text() for name in names} == {'{"coco": 1}'}


def test_a_large_dataset_json_of_another_program_is_kept(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = photos / "dataset.json"
    annotations.write_text(json.dumps({"coco": "0" * MAX_JSON_BYTES}))
    assert "no dataset.json that data_prep wrote" in refused(photos, photos, capsys)
    assert annotations.stat().st_size > MAX_JSON_BYTES


@pytest.mark.parametrize(
    "content",
    [b'{"file_name": "a.png"}\n{"file_name": "b.png"}\n', b'// a comment\n{"format_version": 1}', b"\xff\xfe{\0}\0"],
)
def test_another_file_named_dataset_json_is_kept_if_it_is_not_valid_json(
    content: bytes, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "dataset.json").write_bytes(content)
    assert "no dataset.json that data_prep wrote" in refused(photos, photos, capsys)
    assert (photos / "dataset.json").read_bytes() == content


@pytest.mark.parametrize("damage", ["cut off", "filled with zeros", "interrupted"])
def test_a_damaged_dataset_or_one_whose_preparation_was_killed_is_replaced(damage: str, photos: Path) -> None:
    out = photos.parent / "out"
    words = ["--source", "folder", "--root", str(photos), "--out", str(out), "--size", "8"]
    assert main(words) == 0
    if damage == "cut off":
        (out / "dataset.json").write_text('{\n  "format_ver')
    elif damage == "filled with zeros":
        (out / "dataset.json").write_bytes(bytes(500))
    else:
        (out / ".writing-abc").mkdir()
        (out / "dataset.json").rename(out / ".writing-abc" / "dataset.json")
    assert main(words) == 0
    assert names_in(out) == DATASET_FILES


@pytest.mark.parametrize("name", ["train.beton", "test.beton", "dataset.json"])
def test_a_folder_where_a_file_must_go_is_refused(name: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos.parent / "out" / name).mkdir(parents=True)
    assert f"{name} is a folder; use another folder" in refused(photos, photos.parent / "out", capsys)


@pytest.mark.parametrize("name", ["train", "train/cat", "test/new", "Val"])
def test_a_folder_among_the_images_is_refused(name: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is among the images of --root" in refused(photos, photos / name, capsys)


@pytest.mark.parametrize("out", [".", "new/data", "../work/data"])
def test_lists_are_written_beside_the_folder(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    message = write_list(Path(out), "unreadable", ["a", "b"])
    path = Path(f"{(tmp_path / 'work' / out).resolve()}.unreadable.txt")
    assert path.read_text() == "# written by python -m data_prep\na\nb\n"
    assert Path(message.removeprefix("all are listed in ")).resolve() == path
    remove_lists(Path(out), "unreadable")
    assert not path.exists()


def test_a_list_that_data_prep_did_not_write_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "data.unreadable.txt"
    path.write_text("mine")
    assert (
        write_list(tmp_path / "data", "unreadable", ["a"])
        == f"not listed, because {path} exists and was not written by data_prep; rename that file"
    )
    remove_lists(tmp_path / "data", "unreadable", "duplicates")
    assert path.read_text() == "mine"


def test_a_list_that_cannot_be_written_is_reported_and_raises_no_error(tmp_path: Path) -> None:
    (tmp_path / "data.unreadable.txt").mkdir()
    assert write_list(tmp_path / "data", "unreadable", ["a"]) == (
        f"not listed, because {tmp_path}/data.unreadable.txt cannot be written (Is a directory)"
    )


@pytest.mark.parametrize(
    ("side", "count", "command"),
    [
        (32, 50_000, "train --data-dir out"),
        (64, 100, "train --data-dir out --batch-size 16 --peak-lr 0.0125"),
        (160, 5000, "train photos --data-dir out --train-size 140"),
        (256, 5000, "train photos --data-dir out"),
        (256, 100, "train photos --data-dir out --batch-size 16 --peak-lr 0.03125"),
    ],
)
def test_the_suggested_command_suits_the_images(side: int, count: int, command: str) -> None:
    splits = {"train": SimpleNamespace(count=count, bytes=10**6)}
    info = SimpleNamespace(classes=("a", "b"), image_size=side, splits=splits)
    assert describe(cast(DatasetInfo, info), Path("out")).splitlines()[-1] == f"next: python -m ddp_trainer.{command}"
