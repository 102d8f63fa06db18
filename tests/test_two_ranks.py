"""One process or several, through the real launcher: the same images, the same schedule, the same counts."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import NARROW, read_lines, run, train


def global_batches(folder: Path, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(steps, batch, ...) images and indices, put together from the ranks' files in rank order."""
    ranks = [np.load(folder / f"rank-{rank}-of-{world_size}.npz") for rank in range(world_size)]
    return tuple(np.concatenate([rank[name] for rank in ranks], axis=1) for name in ("images", "indices"))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def batches_of_one(synthetic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    folder = tmp_path_factory.mktemp("one")
    assert run("tests.workers.dump_batches", synthetic_dir, folder, "resident", "3").returncode == 0
    return global_batches(folder, 1)


@pytest.mark.parametrize(("world_size", "mode"), [(2, "stream"), (4, "resident")])
def test_every_rank_count_sees_the_same_augmented_images(
    synthetic_dir: Path, tmp_path: Path, batches_of_one: tuple[np.ndarray, np.ndarray], world_size: int, mode: str
) -> None:
    finished = run("tests.workers.dump_batches", synthetic_dir, tmp_path, mode, "3", processes=world_size)
    assert finished.returncode == 0, finished.stderr
    images, indices = global_batches(tmp_path, world_size)
    assert np.array_equal(indices, batches_of_one[1])
    assert np.array_equal(images.view(np.int32), batches_of_one[0].view(np.int32)), "not bit for bit"


def test_no_image_is_repeated_within_an_epoch_and_epochs_differ(batches_of_one: tuple[np.ndarray, np.ndarray]) -> None:
    epochs = batches_of_one[1].reshape(3, -1)
    assert all(len(set(epoch)) == 640 for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


def test_two_processes_keep_the_schedule_and_the_counts(smoke_run: Path, tiny_dir: Path, tmp_path: Path) -> None:
    train("--data-dir", tiny_dir, "--out", tmp_path / "two", processes=2)
    one, two = (read_lines(folder / "metrics.jsonl") for folder in (smoke_run, tmp_path / "two"))
    for ours, theirs in zip(one, two, strict=True):
        assert ours["learning_rate"] == theirs["learning_rate"]
        assert (ours["step"], ours["test_total"]) == (theirs["step"], theirs["test_total"])
    assert (tmp_path / "two" / "summary.json").exists()


def test_with_plain_batchnorm_two_ranks_start_from_the_same_loss(
    smoke_run: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    """Only the statistics of BatchNorm differ between 1 and 2 ranks, so the first epoch's loss is near, not equal."""
    train("--data-dir", tiny_dir, "--out", tmp_path / "two", "--max-steps", "1", processes=2, module=NARROW)
    train("--data-dir", tiny_dir, "--out", tmp_path / "one", "--max-steps", "1", module=NARROW)
    one, two = (read_lines(tmp_path / name / "metrics.jsonl")[0]["train_loss"] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=0.15)


@pytest.mark.parametrize(("dtype", "steps", "tolerance"), [("float64", 50, 1e-9), ("float32", 20, 1e-4)])
def test_with_synchronised_batchnorm_the_training_is_the_same(
    synthetic_dir: Path, tmp_path: Path, dtype: str, steps: int, tolerance: float
) -> None:
    for world_size in (1, 2, 4):
        worker = ("tests.workers.losses", synthetic_dir, tmp_path, dtype, str(steps), "sync")
        finished = run(*worker, processes=world_size)
        assert finished.returncode == 0, finished.stderr
    one, two, four = (json.loads((tmp_path / f"losses-{size}.json").read_text()) for size in (1, 2, 4))
    assert len(one) == steps
    assert len(set(one)) == steps, "every step has its own images and weights"
    if dtype == "float64":  # 20 steps of float32 at its low rate are too few for that
        assert one[-1] < one[0]
    assert two == pytest.approx(one, rel=tolerance)
    assert four == pytest.approx(one, rel=tolerance)
