"""StreamLoader and ResidentLoader deliver exactly the requested samples, and handle known defects of FFCV."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.dataset import write_dataset
from data_prep.loader import Batch, ResidentLoader, StreamLoader, build_loader
from data_prep.sources.synthetic import draw_synthetic
from data_prep.watched_file import DatasetChanged
from tests.support.trainer import environment

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def image_set_and_beton(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray, Path]:
    image_set = draw_synthetic(train_count=230, test_count=10, seed=3)
    out = tmp_path_factory.mktemp("loader")
    write_dataset(image_set, out)
    return image_set.train.images, image_set.train.labels, out / "train.beton"


@pytest.fixture(scope="module")
def stream(image_set_and_beton: tuple[np.ndarray, np.ndarray, Path]) -> StreamLoader:
    return StreamLoader(image_set_and_beton[2], device=CPU, batch_size=32, num_workers=1)


@pytest.fixture(scope="module")
def resident(stream: StreamLoader) -> ResidentLoader:
    return ResidentLoader(stream)


def plans() -> dict[str, list[np.ndarray]]:
    """Named lists of batches to request. Each batch is an array of positions in the file."""
    shuffled = np.random.default_rng(0).permutation(230)
    batches = [shuffled[start : start + 32] for start in range(0, 230, 32)]
    empty = np.empty(0, dtype=np.int64)
    return {
        "whole epoch, partial last batch": batches,
        "full batches": batches[:7],
        "one image": [shuffled[:1]],
        "partial, then empty": [*batches, empty, empty],
        "no batches": [],
        "one empty batch": [empty],
        "repeated images": [np.repeat(shuffled[:4], 8)] * 3,
    }


@pytest.mark.parametrize("name", plans())
def test_both_loaders_give_the_written_images_in_the_requested_order(
    image_set_and_beton: tuple[np.ndarray, np.ndarray, Path], stream: StreamLoader, resident: ResidentLoader, name: str
) -> None:
    images, labels, _ = image_set_and_beton
    plan = plans()[name]
    for loader in (stream, resident):
        batches = list(loader.batches(plan))  # keeps every batch, so that a shared buffer would be noticed
        assert len(batches) == len(plan)
        for batch, indices in zip(batches, plan, strict=True):
            assert np.array_equal(batch.indices.numpy(), indices)
            assert np.array_equal(batch.labels.numpy(), labels[indices])
            assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), images[indices])
            assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_an_abandoned_epoch_leaves_no_thread(stream: StreamLoader) -> None:
    before = threading.active_count()
    for _ in range(5):
        batches = stream.batches(plans()["whole epoch, partial last batch"])
        next(batches)
        batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_the_iterator_ends_after_the_last_batch(stream: StreamLoader) -> None:
    batches: Iterator[Batch] = stream.batches(plans()["one image"])
    next(batches)
    for _ in range(3):
        assert next(batches, None) is None


def test_ffcv_is_imported_without_compiling_a_dictionary() -> None:
    """Compiling Numba's typed dictionary would take seconds at every start."""
    code = """
from data_prep.ffcv_import import import_ffcv
import_ffcv()
from ffcv.fields import rgb_image
assert type(rgb_image.IMAGE_MODES) is dict
"""
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=120)


def test_loaders_share_compiled_code_but_not_data(stream: StreamLoader, tmp_path: Path) -> None:
    """Two loaders with different image sizes, labels and numbers of threads are read alternately."""
    from ffcv.pipeline.compiler import Compiler

    image_set = draw_synthetic(train_count=60, test_count=10, seed=4, size=48)
    write_dataset(image_set, tmp_path)
    other = StreamLoader(tmp_path / "train.beton", device=CPU, batch_size=16, num_workers=2)
    order, other_order = np.arange(64).reshape(2, 32), np.arange(48)[::-1].reshape(3, 16)
    for batch, other_batch in zip(stream.batches(order), other.batches(other_order), strict=False):
        assert batch.images.shape[2:] == (32, 32)
        rows = other_batch.indices.numpy()
        assert np.array_equal(other_batch.images.permute(0, 2, 3, 1).numpy(), image_set.train.images[rows])
        assert np.array_equal(other_batch.labels.numpy(), image_set.train.labels[rows])

    def returning(size: int) -> Callable[[], int]:
        return lambda: size

    compiled = [Compiler.compile(returning(size)) for size in (32, 48, 32)]
    assert compiled[0] is compiled[2] is not compiled[1]
    assert [function() for function in compiled] == [32, 48, 32]


def test_the_thread_count_of_torch_is_unchanged(image_set_and_beton: tuple[np.ndarray, np.ndarray, Path]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        loader = StreamLoader(image_set_and_beton[2], device=CPU, batch_size=32, num_workers=1)
        for _ in loader.batches(plans()["full batches"]):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_file_that_was_replaced_after_its_dataset_was_read_is_refused(tmp_path: Path) -> None:
    info = write_dataset(draw_synthetic(train_count=20, test_count=10, seed=0, size=16), tmp_path)
    make = partial(StreamLoader, tmp_path / "train.beton", device=CPU, batch_size=10, num_workers=1)
    make(split=info.splits["train"])
    write_dataset(draw_synthetic(train_count=20, test_count=10, seed=1, size=16), tmp_path)
    with pytest.raises(DatasetChanged, match=r"train\.beton was replaced while this program started"):
        make(split=info.splits["train"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_ffcv_thread_raises_an_error(stream: StreamLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    from ffcv.loader.epoch_iterator import EpochIterator

    def broken(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(EpochIterator, "run_pipeline", broken)
    with pytest.raises(RuntimeError, match="FFCV's thread has ended"):
        list(stream.batches(plans()["full batches"]))


def test_a_stalled_ffcv_thread_raises_an_error(stream: StreamLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    from ffcv.loader.epoch_iterator import EpochIterator

    monkeypatch.setattr("data_prep.ffcv_reader.STALL_SECONDS", 1.0)
    monkeypatch.setattr("data_prep.ffcv_reader.CLOSE_SECONDS", 0.1)
    storage = threading.Event()  # stands for storage that does not answer, so FFCV's thread stays blocked
    monkeypatch.setattr(EpochIterator, "run_pipeline", lambda self, *_: storage.wait(60))
    with pytest.raises(RuntimeError, match="no progress"):
        list(stream.batches(plans()["full batches"]))
    storage.set()


def test_num_workers_may_exceed_the_number_of_numba_threads(
    image_set_and_beton: tuple[np.ndarray, np.ndarray, Path],
) -> None:
    program = """if True:
        import sys, numpy as np, torch
        from pathlib import Path
        from data_prep.loader import StreamLoader
        loader = StreamLoader(Path(sys.argv[1]), device=torch.device("cpu"), batch_size=8, num_workers=2)
        print(sum(len(batch.images) for batch in loader.batches([np.arange(8)])))"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(image_set_and_beton[2])],
        env=environment(NUMBA_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr


def test_samples_other_than_the_requested_ones_raise_an_error(
    stream: StreamLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = stream._reader.read
    monkeypatch.setattr(stream._reader, "read", lambda order: read(order[::-1].copy()))
    with pytest.raises(RuntimeError, match="the wrong samples"):
        list(stream.batches(plans()["full batches"]))


@pytest.mark.parametrize("change", ["removed", "replaced", "truncated"])
def test_a_file_that_changes_between_epochs_raises_an_error(
    image_set_and_beton: tuple[np.ndarray, np.ndarray, Path], tmp_path: Path, change: str
) -> None:
    path = tmp_path / "train.beton"
    shutil.copy(image_set_and_beton[2], path)
    loader = StreamLoader(path, device=CPU, batch_size=32, num_workers=1)
    list(loader.batches(plans()["full batches"]))
    if change == "removed":
        path.unlink()
    elif change == "replaced":
        shutil.copy(path, tmp_path / "new")
        (tmp_path / "new").replace(path)
    else:
        os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises((RuntimeError, OSError), match=r"train\.beton"):
        list(loader.batches(plans()["full batches"]))


@pytest.mark.parametrize("positions", [[-1], [230], [0, 10**9]])
def test_positions_outside_the_file_are_refused(
    stream: StreamLoader, resident: ResidentLoader, positions: list[int]
) -> None:
    for loader in (stream, resident):
        with pytest.raises(IndexError, match="230 samples"):
            list(loader.batches([np.array(positions)]))


@pytest.mark.parametrize("sizes", [(31, 32), (33, 32), (32, 33), (33,), (31, 1, 0)])
def test_only_the_last_batch_of_a_stream_may_have_another_size_and_it_may_only_be_smaller(
    stream: StreamLoader, sizes: tuple[int, ...]
) -> None:
    wrong = next(size for size in sizes if size != 32)
    with pytest.raises(ValueError, match=f"must have 32 samples, or fewer if it is the last; got {wrong}"):
        list(stream.batches([np.arange(size) for size in sizes]))


def test_auto_mode_is_resident_if_the_images_take_a_small_share_of_memory(
    image_set_and_beton: tuple[np.ndarray, np.ndarray, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen() -> type:
        return type(build_loader(image_set_and_beton[2], mode="auto", device=CPU, batch_size=32, num_workers=1))

    assert chosen() is ResidentLoader
    monkeypatch.setattr("data_prep.loader.free_memory", lambda device: 1e6)
    assert chosen() is StreamLoader
