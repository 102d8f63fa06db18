"""The run directory: who holds it, and the small JSON files in it. Only the main process writes there."""

import contextlib
import fcntl
import itertools
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import InputError
from data_prep.files import read_json, write_json
from ddp_trainer.config import TrainConfig

if TYPE_CHECKING:
    from data_prep.dataset import DatasetInfo

PACKAGES = ("torch", "torchvision", "accelerate", "ffcv", "numpy", "wandb")


class RunDirectory:
    """One run's folder, locked by this process so that no two runs write into it.

    Raises InputError if another run holds it, if it has a run that is not to be resumed, or if it cannot be written.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a")
        except OSError as error:
            raise InputError(f"--out {path} cannot be written ({error.strerror}); choose another folder") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InputError(f"--out {path}: another run holds this folder; choose another, or wait for it") from None
        try:
            refuse_present_run(path, resume=resume)
        except InputError:
            self._lock.close()
            raise

    def release(self) -> None:
        self._lock.close()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> dict[str, Any] | None:
        """summary.json of a finished run, else None."""
        return read_json(self.path / "summary.json")

    @property
    def status(self) -> dict[str, Any]:
        """status.json; empty if there is none."""
        return read_json(self.path / "status.json") or {}

    def write_status(self, state: str, *, step: int = 0, epoch: int = 0, message: str = "") -> None:
        """`state`: running, preempted, done or failed."""
        write_json(self.path / "status.json", {"state": state, "step": step, "epoch": epoch, "message": message})


@contextlib.contextmanager
def claim_run_directory(config: TrainConfig, *, is_main: bool) -> Iterator[RunDirectory | None]:
    """The run directory, locked within the block; None on every rank but the main one. Raises InputError."""
    if not is_main:
        yield None
        return
    run_dir = RunDirectory(config.run.out or new_folder(config.recipe), resume=config.run.resume)
    try:
        yield run_dir
    finally:
        run_dir.release()


def new_folder(name: str) -> Path:
    """Creates runs/NAME-TIMESTAMP, with a number behind it if another run of the same second has that name."""
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        path = Path("runs") / (f"{name}-{stamp}" + (f"-{number}" if number > 1 else ""))
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"{path} cannot be created ({error.strerror}); name a folder with --out") from None
        return path
    raise AssertionError("itertools.count is endless")


def refuse_present_run(out: Path, *, resume: bool) -> None:
    """Raises InputError if `out` has a run that is not to be resumed."""
    if not resume and (out / "config.json").exists():
        raise InputError(f"--out {out} has a run already; add --resume to continue it, or choose another folder")


def describe_run(config: TrainConfig, dataset: "DatasetInfo", machine: Mapping[str, Any]) -> dict[str, Any]:
    """Content of config.json. Without the environment and the raw command line, which may hold secrets."""
    # slurm/node.sh removes its copy of the data at the end of the job, so the original folder is recorded.
    data_dir = Path(os.environ.get("DDP_STAGED_FROM") or config.data.data_dir)
    return {
        "recipe": config.recipe,
        "data_dir": str(data_dir.resolve()),
        "settings": {**config.flat(), "data_dir": str(data_dir)},
        **machine,
        "versions": package_versions(),
        "git_commit": git_commit(),
        "dataset": asdict(dataset),
    }


def recorded_settings(run_dir: Path) -> dict[str, Any]:
    """The settings in config.json, with the precision that `auto` became, and the training images.

    Raises InputError if config.json does not have them.
    """
    config = read_json(run_dir / "config.json") or {}
    try:
        images = config["dataset"]["splits"]["train"]["sha256"]
        return {**config["settings"], "precision": config["precision"], "training images": images}
    except (KeyError, TypeError):
        raise InputError(f"{run_dir / 'config.json'} has no settings of a run; choose another --out") from None


def changed_settings(recorded: Mapping[str, Any], requested: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings whose requested value differs from the recorded one, as (name, recorded, requested).

    `precision=auto` matches anything.
    """
    names = [name for name, value in requested.items() if (name, value) != ("precision", "auto")]
    return [(name, recorded.get(name), requested[name]) for name in names if recorded.get(name) != requested[name]]


def package_versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """Commit of the running code, with a `+` if the working tree differs from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    folder = Path(__file__).parent
    try:
        described = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
