"""Preparing a folder of images: memory does not grow with their number, and the same files give the same bytes."""

import filecmp
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import dataset
from data_prep.color_statistics import ColorCounts
from data_prep.dataset import write_dataset
from data_prep.sources.folder import FolderImages
from tests.support.memory import PEAK_MEMORY
from tests.support.photos import draw_photos, save
from tests.support.trainer import environment

READ = """
import sys, tempfile
from pathlib import Path
from data_prep import dataset
from data_prep.sources.folder import FolderImages
with tempfile.TemporaryDirectory() as folder:
    dataset._spool(FolderImages(Path(sys.argv[1]), size=256), Path(folder), lambda *_: None)
print(peak_memory())
"""


def test_the_memory_of_reading_does_not_depend_on_the_number_of_images(tmp_path: Path) -> None:
    """200 more images of 256x256 pixels would take 39 MB."""
    peaks = []
    for count in (60, 260):
        root = tmp_path / str(count)
        photo = save(root / "photo.jpg", Image.effect_noise((300, 270), 60))
        for path in (root / "train" / "cat", root / "test" / "cat"):
            path.mkdir(parents=True)
            for number in range(count if path.parent.name == "train" else 1):
                (path / f"{number}.jpg").hardlink_to(photo)
        code = [sys.executable, "-c", PEAK_MEMORY + READ, str(root)]
        done = subprocess.run(code, env=environment(), check=True, timeout=120, capture_output=True, text=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 15, peaks


def test_the_number_of_threads_does_not_change_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_photos(tmp_path / "photos")
    monkeypatch.setattr("data_prep.sources.CHUNK_BYTES", 1000)  # a few images at a time
    for threads in (1, 3):
        monkeypatch.setattr("data_prep.sources.folder.num_threads", lambda threads=threads: threads)
        write_dataset(FolderImages(tmp_path / "photos", size=8), tmp_path / str(threads))
    for name in ("train.beton", "test.beton", "dataset.json"):
        assert filecmp.cmp(tmp_path / "1" / name, tmp_path / "3" / name, shallow=False)


def test_progress_covers_reading_and_writing(tmp_path: Path) -> None:
    draw_photos(tmp_path / "photos")
    seen: list[tuple[str, int, int]] = []
    write_dataset(FolderImages(tmp_path / "photos", size=8), tmp_path / "out", progress=lambda *step: seen.append(step))
    works = [work for work, _, _ in seen]
    assert works == sorted(works)  # reading, then writing
    for work in ("reading", "writing"):
        done = [count for each, count, _ in seen if each == work]
        assert done == sorted(done)
        assert done[-1] == 16
    assert {total for _, _, total in seen} == {16}


def test_a_failure_removes_the_folders_that_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_photos(tmp_path / "photos")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the writer has ended")

    monkeypatch.setattr(dataset, "write_betons", fail)
    with pytest.raises(RuntimeError):
        write_dataset(FolderImages(tmp_path / "photos", size=8), tmp_path / "new" / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_color_statistics_equal_those_of_all_pixels_at_once() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    colors = ColorCounts()
    for start in range(0, 50, 7):
        colors.add(images[start : start + 7])
    mean, std = colors.mean_and_std()
    assert np.allclose(mean, (images / 255).mean(axis=(0, 1, 2)))
    assert np.allclose(std, (images / 255).std(axis=(0, 1, 2)))
