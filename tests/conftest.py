"""Fixtures that several test files share: a small real dataset, and the trainer as a real process."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import forked
import pytest

# A script that runs the tests in the background has SIGINT ignored, here and in all that is started from here.
signal.signal(signal.SIGINT, signal.default_int_handler)
REPOSITORY = Path(__file__).resolve().parent.parent
# Many processes share the cores: threads that spin while they wait would take them from one another. Before torch.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
# The files that take longest, which are started first: at the end they would keep one of the workers alone.
LONGEST = ("test_slurm", "test_faults", "test_resume", "test_two_ranks", "test_readme", "test_smoke", "test_bad_input",
           "test_sweep")  # fmt: skip
# What `accelerate launch` needs to start several CPU processes.
SEVERAL = ("--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
           "--main_process_port", "0")  # fmt: skip


# The trainer with a network so narrow that a step takes milliseconds: for tests of what surrounds the network.
NARROW = "tests.workers.narrow_train"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


class Finished(NamedTuple):
    """A process that has ended."""

    returncode: int
    stdout: str
    stderr: str


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


SECRET = "of-the-environment-and-not-to-be-recorded"


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what a launcher or W&B would take from it."""
    unwanted = ("WANDB_", "ACCELERATE_", "TORCHELASTIC_", "SLURM_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "SOME_TOKEN": SECRET, **changes}


def start(
    module: str, *arguments: str | Path, processes: int = 1, env: Mapping[str, str] = {}, cwd: Path | None = None
) -> subprocess.Popen:
    """A module of ours as a real process, or as several under the real launcher."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["accelerate.commands.launch", *SEVERAL, "--num_processes", str(processes), "-m"]
    return subprocess.Popen(
        [*launcher, module, *map(str, arguments)], env=environment(**env), cwd=cwd or REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(module: str, *arguments: str | Path, processes: int = 1, timeout: float = 240, **options: Any) -> Finished:
    """`start`, and wait for its end."""
    process = start(module, *arguments, processes=processes, **options)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        pytest.fail(f"{module} did not end in {timeout} s:\n{stdout}\n{stderr}")
    return Finished(process.returncode, stdout, stderr)


def train(*arguments: str | Path, module: str = "ddp_trainer.train", processes: int = 1) -> Finished:
    """`ddp_trainer.train smoke ...` on the CPU; it must succeed."""
    words = ("smoke", "--device", "cpu", *arguments)
    finished = fork(*words) if (module, processes) == (NARROW, 1) else run(module, *words, processes=processes)
    assert finished.returncode == 0, finished.stderr
    return finished


def fork(*arguments: str | Path, timeout: float = 240) -> Finished:
    """`run` of the narrow trainer in one process, which need not import everything anew."""
    with tempfile.TemporaryDirectory() as folder:
        code = forked.train([*map(str, arguments)], Path(folder), env=environment(), timeout=timeout)
        stdout, stderr = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
    if code is None:
        pytest.fail(f"the training did not end in {timeout} s:\n{stdout}\n{stderr}")
    return Finished(code, stdout, stderr)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def smoke_run(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one completed smoke run, for tests that only look at it: all test processes share it."""
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke run"
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            train("--data-dir", tiny_dir, "--out", out, "--wandb", "offline")
    return out
