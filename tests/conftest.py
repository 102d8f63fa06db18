"""Fixtures that several test files share: a small real dataset and a finished run."""

import fcntl
import os
import signal
from pathlib import Path

import pytest

# A script that runs the tests in the background has SIGINT ignored, here and in all that is started from here.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Many processes share the cores: threads that spin while they wait would take them from one another. Before torch.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
# The files that take longest, which are started first: at the end they would keep one of the workers alone.
LONGEST = (
    "test_slurm",
    "test_faults",
    "test_resume",
    "test_two_ranks",
    "test_docs",
    "test_smoke",
    "test_bad_input",
    "test_sweep",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def synthetic_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """640 training and 200 test images of ten drawn classes."""
    from data_prep.dataset import write_dataset
    from data_prep.sources.synthetic import draw_synthetic

    out = tmp_path_factory.mktemp("synthetic")
    write_dataset(draw_synthetic(train_count=640, test_count=200, seed=0), out)
    return out


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 training and 40 test images, for whole trainings of seconds."""
    from data_prep.dataset import write_dataset
    from data_prep.sources.synthetic import draw_synthetic

    out = tmp_path_factory.mktemp("tiny")
    write_dataset(draw_synthetic(train_count=96, test_count=40, seed=1), out)
    return out


@pytest.fixture(scope="session")
def jpeg_cifar_dir() -> Path:
    """The real images as JPEG files, where the machine has them."""
    root = os.environ.get("CIFAR10_JPEG_ROOT")
    if not root:
        pytest.skip("CIFAR10_JPEG_ROOT names no folder of real images")
    return Path(root)


@pytest.fixture(scope="session")
def smoke_run(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one completed smoke run, for tests that only look at it: all test processes share it."""
    from tests.support.trainer import train

    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke run"
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            train("--data-dir", tiny_dir, "--out", out, "--wandb", "offline")
    return out
