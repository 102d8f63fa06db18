"""StreamLoader and ResidentLoader read JPEG images back in any order, and damage is reported."""

import filecmp
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.beton import (
    ALLOCATION,
    IMAGE_MODES,
    SAMPLE,
    SAMPLES_START,
    Expected,
    check_beton,
    read_samples,
    read_sizes,
)
from data_prep.dataset import preparation, read_dataset, verify_dataset, write_dataset
from data_prep.encoding import Encoding, decode_into
from data_prep.errors import InputError
from data_prep.loader import ResidentLoader, StreamLoader
from data_prep.sources import ImageSet
from data_prep.watched_file import DamagedImage
from ddp_trainer.report.reproduce import data_command
from ddp_trainer.tracking.run_record import load_run
from tests.support.betons import photographs
from tests.support.folders import DATASET_FILES
from tests.support.run_directories import make_run

CPU, COUNT, SIZE = torch.device("cpu"), 75, 64
JPEG = Encoding("jpeg", 90)
IMAGES = ImageSet(
    source="made", classes=("a", "b", "c"), train=photographs(COUNT, SIZE), test=photographs(5, SIZE, seed=1)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("jpeg")
    write_dataset(IMAGES, out, encoding=JPEG)
    return out


def stream(folder: Path, workers: int = 1) -> StreamLoader:
    return StreamLoader(folder / "train.beton", device=CPU, batch_size=16, num_workers=workers)


def expected_pixels() -> np.ndarray:
    pixels = np.empty((COUNT, SIZE, SIZE, 3), np.uint8)
    for target, image in zip(pixels, IMAGES.train.images, strict=True):
        decode_into(target, JPEG.encode(image))
    return pixels


def test_streamed_and_resident_images_are_decoded_in_the_requested_order_with_one_or_three_threads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4))
    order, pixels = np.random.default_rng(0).permutation(COUNT), expected_pixels()
    plan = [order[start : start + 16] for start in range(0, COUNT, 16)]
    for loader in (stream(folder), stream(folder, workers=3), ResidentLoader(stream(folder))):
        batches = list(loader.batches(plan))
        for batch, indices in zip(batches, plan, strict=True):
            assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), pixels[indices])
            assert np.array_equal(batch.labels.numpy(), IMAGES.train.labels[indices])
            assert np.array_equal(batch.indices.numpy(), indices)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_jpeg_images_are_smaller_and_close_to_the_originals(folder: Path) -> None:
    assert read_sizes(folder / "train.beton").sum() < IMAGES.train.images.nbytes / 2
    assert np.abs(expected_pixels().astype(int) - IMAGES.train.images).mean() < 8


def test_the_same_images_give_the_same_files(folder: Path, tmp_path: Path) -> None:
    write_dataset(IMAGES, tmp_path, encoding=JPEG)
    for name in DATASET_FILES:
        assert filecmp.cmp(folder / name, tmp_path / name, shallow=False)


def test_dataset_json_records_the_encoding(folder: Path) -> None:
    info = read_dataset(folder)
    verify_dataset(folder, info, full=True)
    assert (info.encoding, info.quality) == ("jpeg", 90)
    assert preparation(folder, info.to_dict()).endswith("--encoding jpeg --quality 90")


def test_an_abandoned_epoch_leaves_no_thread(folder: Path) -> None:
    before, loader = threading.active_count(), stream(folder)
    batches = loader.batches(np.arange(64).reshape(4, 16))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


@pytest.mark.parametrize("encoding", [Encoding(), JPEG], ids=["raw", "jpeg"])
def test_a_flipped_bit_is_found_when_the_image_is_read(encoding: Encoding, tmp_path: Path) -> None:
    write_dataset(IMAGES, tmp_path, encoding=encoding)
    beton = tmp_path / "train.beton"
    address, size = int(read_samples(beton)["image"]["ptr"][37]), int(read_sizes(beton)[37])
    content = bytearray(beton.read_bytes())
    content[address + size // 2] ^= 4
    beton.write_bytes(content)
    loader = stream(tmp_path)
    assert len(list(loader.batches([np.arange(16)]))) == 1  # none of these images is damaged
    with pytest.raises(DamagedImage, match=r"train\.beton: image 37 is damaged \(its checksum differs\)"):
        list(loader.batches(np.arange(32, 64).reshape(2, 16)))
    with pytest.raises(DamagedImage):
        ResidentLoader(loader)


@pytest.mark.parametrize("cut", [slice(0), slice(100), slice(-200), slice(20, None)])
def test_an_incomplete_jpeg_is_an_error(cut: slice) -> None:
    """libjpeg itself would fill the missing pixels with gray."""
    content = JPEG.encode(IMAGES.train.images[0])
    with pytest.raises(ValueError, match=r".+"):
        decode_into(np.empty((SIZE, SIZE, 3), np.uint8), content[cut])


def test_a_jpeg_of_another_size_is_an_error() -> None:
    content = JPEG.encode(IMAGES.train.images[0])
    with pytest.raises(ValueError, match="64x64 pixels instead of 32x32"):
        decode_into(np.empty((32, 32, 3), np.uint8), content)


def test_byte_counts_and_addresses_that_do_not_fit_the_file_are_refused(folder: Path, tmp_path: Path) -> None:
    content = (folder / "train.beton").read_bytes()
    wanted = Expected(COUNT, SIZE, 3, "jpeg")
    path = tmp_path / "train.beton"

    def spoil(name: str, value: int) -> None:
        copy = bytearray(content)
        table = np.frombuffer(copy, ALLOCATION, COUNT, len(copy) - COUNT * ALLOCATION.itemsize)
        table[name][7] = value
        path.write_bytes(copy)
        with pytest.raises(InputError, match="prepare the data again"):
            check_beton(path, wanted)

    path.write_bytes(content)
    check_beton(path, wanted)
    size = int(read_sizes(path)[7])
    for value in (0, size - 1, size + 1, 2**23 + 1, 2**40, 2**64 - 1):
        spoil("size", value)
    spoil("ptr", 2**23)


def test_an_image_of_another_encoding_is_refused(folder: Path, tmp_path: Path) -> None:
    content = bytearray((folder / "train.beton").read_bytes())
    np.frombuffer(content, SAMPLE, COUNT, SAMPLES_START)["image"]["mode"][3] = IMAGE_MODES["raw"]
    (tmp_path / "train.beton").write_bytes(content)
    with pytest.raises(InputError, match="list of images"):
        check_beton(tmp_path / "train.beton", Expected(COUNT, SIZE, 3, "jpeg"))


@pytest.mark.parametrize(("name", "quality"), [("raw", 90), ("jpeg", 0), ("jpeg", 101), ("jpeg", None)])
def test_an_invalid_quality_is_refused(name: str, quality: int | None) -> None:
    with pytest.raises(InputError, match="--quality"):
        Encoding(name, quality)  # type: ignore[arg-type]


def test_the_command_that_repeats_a_run_names_the_encoding(folder: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["dataset"] = json.loads((folder / "dataset.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (command,) = data_command(load_run(tmp_path / "run"))
    assert "--encoding jpeg --quality 90" in command
