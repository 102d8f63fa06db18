"""A run of one process and a run of several train on the same images and have the same losses."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.trainer import fork

DUMP_BATCHES, LOSSES = (f"tests.support.workers.{name}:main" for name in ("dump_batches", "losses"))


def global_batches(folder: Path, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images and indices, each (steps, batch, ...), concatenated from the files of all ranks in rank order."""
    ranks = [np.load(folder / f"rank-{rank}-of-{world_size}.npz") for rank in range(world_size)]
    return tuple(np.concatenate([rank[name] for rank in ranks], axis=1) for name in ("images", "indices"))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def batches_of_one_process(
    synthetic_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[np.ndarray, np.ndarray]:
    folder = tmp_path_factory.mktemp("one")
    assert fork(synthetic_dir, folder, "resident", "3", program=DUMP_BATCHES).returncode == 0
    return global_batches(folder, 1)


@pytest.mark.parametrize(("world_size", "mode"), [(2, "resident"), (3, "stream")])
def test_any_number_of_ranks_sees_the_same_augmented_images(
    synthetic_dir: Path,
    tmp_path: Path,
    batches_of_one_process: tuple[np.ndarray, np.ndarray],
    world_size: int,
    mode: str,
) -> None:
    finished = fork(synthetic_dir, tmp_path, mode, "3", program=DUMP_BATCHES, processes=world_size)
    assert finished.returncode == 0, finished.stderr
    images, indices = global_batches(tmp_path, world_size)
    assert np.array_equal(indices, batches_of_one_process[1])
    assert np.array_equal(images.view(np.int32), batches_of_one_process[0].view(np.int32)), (
        "the images are not bit-identical"
    )


def test_no_image_is_repeated_within_an_epoch_and_epochs_differ(
    batches_of_one_process: tuple[np.ndarray, np.ndarray],
) -> None:
    epochs = batches_of_one_process[1].reshape(3, -1)
    assert all(len(set(epoch)) == 640 for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


STEPS = {"float64": 30, "float32": 12, "balanced": 20, "accumulated": 20}


@pytest.fixture(scope="module")
def losses(synthetic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files NAME-PROCESSES.json, which contain the loss of each step.

    NAME is a key of STEPS; see tests.support.workers.losses. A batch has 32 images, so three processes get different
    numbers of images.
    """
    folder = tmp_path_factory.mktemp("losses")
    for world_size in (1, 2, 3):
        parts = [f"{name}={steps}" for name, steps in STEPS.items()]
        finished = fork(synthetic_dir, folder, *parts, program=LOSSES, processes=world_size)
        assert finished.returncode == 0, finished.stderr
    return folder


TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "balanced": 1e-9, "accumulated": 1e-9}


@pytest.mark.parametrize(("name", "tolerance"), TOLERANCES.items())
def test_losses_do_not_depend_on_the_number_of_ranks(losses: Path, name: str, tolerance: float) -> None:
    one, two, three = (json.loads((losses / f"{name}-{size}.json").read_text()) for size in (1, 2, 3))
    assert len(one) == STEPS[name]
    assert len(set(one)) == len(one), "two steps have the same loss"
    if name == "float64":  # not float32, whose learning rate is so low that the loss hardly falls in 12 steps
        assert np.mean(one[-10:]) < np.mean(one[:10])
    assert two == pytest.approx(one, rel=tolerance)
    assert three == pytest.approx(one, rel=tolerance)
