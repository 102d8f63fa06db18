"""Fixtures that several test files share: devices, small datasets and a finished run."""

import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

# If a shell has started pytest in the background, pytest and its child processes ignore SIGINT. Some tests send SIGINT,
# so this line restores Python's default handler.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Many processes share the cores, so each uses one thread unless the caller sets another number, and waiting threads do
# not spin. Both variables must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["OMP_WAIT_POLICY"] = "passive"
# The slowest test files start first, so that all workers finish at about the same time.
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
    def start_order(item: pytest.Item) -> tuple[int, bool]:
        stem = item.path.stem
        return LONGEST.index(stem) if stem in LONGEST else len(LONGEST), "unit" in item.path.parts

    items.sort(key=start_order)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> "Iterator[torch.device]":
    """The CPU, and a GPU if the machine has one.

    Accelerate chooses a device only once per process, so the fixture clears Accelerate's state for each test.
    """
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from ddp_trainer.distributed.process_settings import restored_settings

    with restored_settings():
        yield torch.device(request.param)


@pytest.fixture(scope="session")
def synthetic_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic dataset of 640 training and 200 test images."""
    from data_prep.dataset import write_dataset
    from data_prep.sources.synthetic import draw_synthetic

    out = tmp_path_factory.mktemp("synthetic")
    write_dataset(draw_synthetic(train_count=640, test_count=200, seed=0), out)
    return out


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic dataset of 96 training and 40 test images, for runs that take seconds."""
    from data_prep.dataset import write_dataset
    from data_prep.sources.synthetic import draw_synthetic

    out = tmp_path_factory.mktemp("tiny")
    write_dataset(draw_synthetic(train_count=96, test_count=40, seed=1), out)
    return out


@pytest.fixture(scope="session")
def jpeg_cifar_dir() -> Path:
    """A folder of real CIFAR-10 images as JPEG files. Tests that use it are skipped unless CIFAR10_JPEG_ROOT is set."""
    root = os.environ.get("CIFAR10_JPEG_ROOT")
    if not root:
        pytest.skip("CIFAR10_JPEG_ROOT (the folder of real images) is not set")
    return Path(root)


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the pictures out of reports, because drawing takes most of the time that a report needs."""
    monkeypatch.setattr("ddp_trainer.report.html.to_svg", lambda figure: "<svg></svg>")
    monkeypatch.setattr("ddp_trainer.report.write.draw_pictures", lambda runs: {})


@pytest.fixture(scope="session")
def smoke_run(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of one finished smoke run, for tests that only read it. All test processes share it."""
    from tests.support.trainer import OF_SMOKE_RUN, train

    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke run"
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            train("--data-dir", tiny_dir, "--out", out, "--wandb", "offline", *OF_SMOKE_RUN)
    return out
