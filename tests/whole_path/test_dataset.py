"""Writing and verifying a dataset: bounded memory, reproducible files, and detection of damage."""

import filecmp
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import dataset
from data_prep.beton import SAMPLE, SAMPLES_START, read_samples
from data_prep.beton_writer import write_betons
from data_prep.color_statistics import ColorCounts
from data_prep.dataset import read_dataset, verify_dataset, write_dataset
from data_prep.errors import InputError
from data_prep.loader import StreamLoader
from data_prep.output import check_out
from data_prep.sources import ImageSet, Split
from data_prep.sources.folder import FolderImages
from data_prep.sources.synthetic import draw_synthetic
from data_prep.watched_file import DamagedImage
from tests.support.folders import DATASET_FILES, names_in
from tests.support.memory import PEAK_MEMORY
from tests.support.photos import draw_photos, save
from tests.support.trainer import environment

READ = """
import sys, tempfile
from pathlib import Path
from data_prep import dataset
from data_prep.sources.folder import FolderImages
with tempfile.TemporaryDirectory() as folder:
    dataset._spool(FolderImages(Path(sys.argv[1]), size=256), Path(folder), dataset.RAW, lambda *_: None)
print(peak_memory())
"""


def test_the_memory_for_reading_does_not_depend_on_the_number_of_images(tmp_path: Path) -> None:
    """If all images were kept in memory, 200 more images (256x256 pixels) would take 39 MB more."""
    peaks = []
    for count in (60, 260):
        root = tmp_path / str(count)
        photo = save(root / "photo.jpg", Image.effect_noise((300, 270), 60))
        for split, number_of_each in (("train", count // 2), ("test", 1)):
            for kind in ("cat", "dog"):
                (root / split / kind).mkdir(parents=True)
                for number in range(number_of_each):
                    (root / split / kind / f"{number}.jpg").hardlink_to(photo)
        code = [sys.executable, "-c", PEAK_MEMORY + READ, str(root)]
        done = subprocess.run(code, env=environment(), timeout=120, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 15, peaks


def image_set(side: int = 16, **changes: Any) -> ImageSet:
    split = Split(np.zeros((2, side, side, 3), np.uint8), np.array([0, 1]))
    return ImageSet(**{"source": "own", "classes": ("a", "b"), "train": split, "test": split, **changes})


NO_IMAGES = Split(np.zeros((0, 16, 16, 3), np.uint8), np.zeros(0, int))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (image_set(1025), "sides of 1 to 1024 pixels, got 1025"),
        (image_set(test=NO_IMAGES), "needs test images"),
        (image_set(classes=()), "a dataset needs classes, got none"),
        (image_set(classes=(0, 1)), "classes must be strings"),
        (image_set(classes=("a",)), "training needs at least two classes"),
        (image_set(classes=("a", "b", "a")), "classes must have different names, got 'a' 2 times"),
        (image_set(classes=("a", "b", "c", "d")), "no training images for c, d"),
        (
            image_set(test=Split(np.zeros((2, 16, 16, 3), np.uint8), np.array([0, 2]))),
            r"labels must be positions of classes, 0 to 1; got 0 to 2",
        ),
        (
            image_set(test=Split(np.zeros((1, 16, 20, 3), np.uint8), np.zeros(1, int))),
            r"must be \(N, 16, 16, 3\) uint8",
        ),
    ],
)
def test_a_source_that_gives_no_valid_dataset_is_refused_and_the_older_dataset_stays(
    source: ImageSet, expected: str, tmp_path: Path
) -> None:
    write_dataset(image_set(), tmp_path / "set")
    before = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    with pytest.raises(ValueError, match=expected):
        write_dataset(source, tmp_path / "set")
    assert {path: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before


def test_the_number_of_threads_does_not_change_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_photos(tmp_path / "photos")
    monkeypatch.setattr("data_prep.sources.CHUNK_BYTES", 1000)  # a few images at a time
    for threads in (1, 3):
        monkeypatch.setattr("data_prep.sources.folder.num_threads", lambda threads=threads: threads)
        write_dataset(FolderImages(tmp_path / "photos", size=8), tmp_path / str(threads))
    for name in DATASET_FILES:
        assert filecmp.cmp(tmp_path / "1" / name, tmp_path / "3" / name, shallow=False)


def test_progress_covers_reading_and_writing(tmp_path: Path) -> None:
    draw_photos(tmp_path / "photos")
    seen: list[tuple[str, int, int]] = []
    write_dataset(FolderImages(tmp_path / "photos", size=8), tmp_path / "out", progress=lambda *step: seen.append(step))
    phases = [phase for phase, _, _ in seen]
    assert phases == sorted(phases)  # reading, then writing
    for phase in ("reading", "writing"):
        counts = [count for each, count, _ in seen if each == phase]
        assert counts == sorted(counts)
        assert counts[-1] == 16
    assert {total for _, _, total in seen} == {16}


def test_a_failure_removes_the_folders_that_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_photos(tmp_path / "photos")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the writer has ended")

    monkeypatch.setattr(dataset, "write_betons", fail)
    with pytest.raises(RuntimeError):
        write_dataset(FolderImages(tmp_path / "photos", size=8), tmp_path / "new" / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_closing_a_file_may_take_longer_than_the_limit_for_a_stalled_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one image, so the limit never applies: the child reports that image, and then closes the file."""
    monkeypatch.setattr("data_prep.beton_writer.STALL_SECONDS", 0)
    split = Split(np.zeros((1, 16, 16, 3), np.uint8), np.zeros(1, int))
    info = write_dataset(image_set(train=NO_IMAGES, test=split), tmp_path)
    verify_dataset(tmp_path, info, full=True)


def test_lines_that_the_writer_prints_together_are_all_read_before_it_may_count_as_stalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script in place of the writer prints two lines at once, and takes longer to end than the limit allows."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nprintf '1 2 train\\n2 2 train\\n'\nsleep 0.5\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr("data_prep.beton_writer.STALL_SECONDS", 0.1)
    reported: list[tuple[str, int]] = []
    write_betons(tmp_path, ["train"], progress=lambda *progress: reported.append(progress))
    assert reported == [("train", 1), ("train", 2)]


def test_a_signal_while_the_files_are_moved_leaves_the_new_dataset_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, before = Path.replace, signal.signal(signal.SIGINT, signal.default_int_handler)

    def replace_then_signal(path: Path, target: Path) -> None:
        replace(path, target)
        if target.name == "train.beton":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Path, "replace", replace_then_signal)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_dataset(image_set(), tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    verify_dataset(tmp_path, read_dataset(tmp_path), full=True)
    assert names_in(tmp_path) == DATASET_FILES


def test_a_partly_moved_dataset_can_be_prepared_again(tmp_path: Path) -> None:
    def block(*_: object) -> None:
        (tmp_path / "test.beton").mkdir(exist_ok=True)

    with pytest.raises(IsADirectoryError):
        write_dataset(image_set(), tmp_path, progress=block)
    (tmp_path / "test.beton").rmdir()
    assert (tmp_path / "train.beton").exists()

    def fail(*_: object) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_dataset(image_set(), tmp_path, progress=fail)
    check_out(tmp_path)


def test_color_statistics_of_chunks_match_those_of_all_images() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    colors = ColorCounts()
    for start in range(0, 50, 7):
        colors.add(images[start : start + 7])
    mean, std = colors.mean_and_std()
    assert np.allclose(mean, (images / 255).mean(axis=(0, 1, 2)))
    assert np.allclose(std, (images / 255).std(axis=(0, 1, 2)))


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_only_the_tables_of_a_large_dataset_are_verified_at_the_start_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = write_dataset(draw_synthetic(train_count=40, test_count=10, seed=0, size=16), tmp_path)
    monkeypatch.setattr(dataset, "HASHED_BYTES", 0)  # every file counts as large
    beton = tmp_path / "train.beton"
    verify_dataset(tmp_path, info, full=True)
    flip_bit(beton, int(read_samples(beton)["image"]["ptr"][7]) + 100)
    verify_dataset(tmp_path, info, full=False)
    with pytest.raises(InputError, match="sha256 differs"):
        verify_dataset(tmp_path, info, full=True)
    loader = StreamLoader(beton, device=torch.device("cpu"), batch_size=8, num_workers=1)
    with pytest.raises(DamagedImage, match="image 7 is damaged"):
        list(loader.batches([np.arange(8)]))


@pytest.mark.parametrize("column", ["label", "checksum"])
def test_a_changed_label_or_checksum_is_found_at_the_start_of_a_run(column: str, tmp_path: Path) -> None:
    info = write_dataset(draw_synthetic(train_count=40, test_count=10, seed=0, size=16), tmp_path)
    flip_bit(tmp_path / "train.beton", SAMPLES_START + 7 * SAMPLE.itemsize + SAMPLE.fields[column][1])  # type: ignore[index]
    with pytest.raises(InputError, match=r"train\.beton is damaged \(its tables differ"):
        verify_dataset(tmp_path, info, full=False)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"format_version": 2', '"format_version": 1', "has format version 1, not 2"),
        ('"b"', '"a"', "cannot be used: classes must have different names, got 'a' 2 times"),
    ],
)
def test_a_dataset_json_that_cannot_be_used_is_refused(old: str, new: str, expected: str, tmp_path: Path) -> None:
    write_dataset(image_set(), tmp_path)
    path = tmp_path / "dataset.json"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=f"{expected}; prepare the data again: python -m data_prep"):
        read_dataset(tmp_path)
