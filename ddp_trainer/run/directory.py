"""The run directory and the small JSON files in it. Only the main process writes to it."""

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import InputError
from data_prep.files import DISK_FULL, read_json, write_json
from ddp_trainer.config import TrainConfig
from ddp_trainer.run.files import refuse_existing_run, refuse_links
from ddp_trainer.run.lock import LOCK, lock_folder, srun_mistake

if TYPE_CHECKING:
    from data_prep.dataset import DatasetInfo

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")  # names of the temporary files of `replace_file`
RESOLVED = ("precision", "accumulate")  # if one of these settings is `auto`, the run records the value that it chose
IMAGES = {"train": "training images", "test": "test images"}  # what error messages call the splits
PACKAGES = ("torch", "torchvision", "accelerate", "ffcv", "numpy", "wandb")


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run. `claim_run_directory` locks it."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> dict[str, Any] | None:
        """Content of summary.json; None unless the run is finished."""
        return read_json(self.path / "summary.json")

    def is_finished(self, last_step: int) -> bool:
        """Whether the run is finished and has done `last_step` steps, so that nothing is left to train."""
        steps = (self.summary or {}).get("steps")
        return isinstance(steps, int) and steps >= last_step  # an untrusted JSON file may contain anything

    @property
    def status(self) -> dict[str, Any]:
        """Content of status.json; empty if there is no such file."""
        return read_json(self.path / "status.json") or {}

    def write_status(self, state: str, *, step: int = 0, epoch: int = 0, message: str = "") -> None:
        """Writes status.json. `state`: running, preempted or done. `step`: the step of the newest checkpoint, or 0."""
        write_json(self.path / "status.json", _status(state, step, epoch, message, saved_step=step))

    def write_failure(self, error: BaseException, *, step: int, epoch: int, saved_step: int) -> None:
        """Records in status.json why the run failed. Never raises, because that would hide the original error.

        `saved_step`: the step of the newest checkpoint; 0 if there is none.
        """
        message = f"{type(error).__name__}: {error}"
        try:
            _replace_or_overwrite(
                self.path / "status.json", _status("failed", step, epoch, message, saved_step=saved_step)
            )
        except OSError as other:
            print(f"warning: {other}", file=sys.stderr, flush=True)


def _status(state: str, step: int, epoch: int, message: str, *, saved_step: int) -> dict[str, Any]:
    """Content of status.json."""
    return {"state": state, "step": step, "epoch": epoch, "message": message, "saved_step": saved_step}


def _replace_or_overwrite(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a JSON file atomically or, if the disk is full, overwrites it in place.

    If the old content is longer, its end is overwritten with spaces.
    """
    try:
        write_json(path, content)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        with open(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "wb") as file:
            file.write((json.dumps(content) + "\n").encode().ljust(path.stat().st_size))


def remove_temporaries(path: Path) -> None:
    """Removes the temporary files of `replace_file` that a killed run left. `path` must be locked by this process."""
    for folder in (path, path / "report", path / "crash"):
        for file in folder.glob(".*"):
            if TEMPORARY.fullmatch(file.name):
                with contextlib.suppress(OSError):
                    file.unlink()


@contextlib.contextmanager
def claim_run_directory(config: TrainConfig, *, is_main: bool) -> Iterator[RunDirectory | None]:
    """The run directory, locked within the block so that no other run writes to it; None on all ranks but the main one.

    Raises InputError if another run is using the folder, if `refuse_existing_run` or `refuse_links` refuses it, or if
    it cannot be written. Raises OSError if the disk is full.
    """
    if not is_main:
        yield None
        return
    is_new = config.run.out is None or not os.path.lexists(config.run.out)
    path = config.run.out or new_folder(config.recipe)
    with lock_folder(path):
        refuse_links(path)
        refuse_existing_run(path, resume=config.run.resume)
        remove_temporaries(path)
        try:
            yield RunDirectory(path)
        except InputError:
            if is_new and os.listdir(path) == [LOCK]:  # nothing has been recorded
                shutil.rmtree(path, ignore_errors=True)
            raise


def new_folder(name: str) -> Path:
    """Creates runs/NAME-TIMESTAMP and returns its path. If the folder exists already, adds a number to the name.

    Raises InputError if the folder cannot be created, or if srun started several copies of this program. Without this
    check, each copy would train alone, in a folder of its own.
    """
    if mistake := srun_mistake():
        raise InputError(f"{mistake}, or give each copy its own folder with --out")
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    path = Path("runs") / f"{name}-{stamp}"
    try:
        path.parent.mkdir(exist_ok=True)  # raises FileExistsError if `runs` is a link that leads nowhere
        for number in itertools.count(1):
            numbered = path.with_name(f"{path.name}-{number}") if number > 1 else path
            with contextlib.suppress(FileExistsError):
                numbered.mkdir()
                return numbered
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise InputError(f"{path} cannot be created ({error.strerror}); name a folder with --out") from None
    raise AssertionError("itertools.count is endless")


def describe_run(config: TrainConfig, dataset: "DatasetInfo", machine: Mapping[str, Any]) -> dict[str, Any]:
    """Content of config.json. Environment variables and the raw command line are left out: they may contain secrets."""
    # slurm/node.sh removes its copy of the dataset at the end of the job, so the original folder is recorded.
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
    """The settings in config.json, the precision that the run used, and the entries of `dataset_settings`.

    Raises InputError if config.json does not contain them.
    """
    config = read_json(run_dir / "config.json") or {}
    try:
        return {**config["settings"], "precision": config["precision"], **_dataset_properties(config["dataset"])}
    except (KeyError, TypeError):
        raise InputError(f"{run_dir / 'config.json'} has no settings of a run; choose another --out") from None


def dataset_settings(config: TrainConfig, dataset: "DatasetInfo") -> dict[str, Any]:
    """The properties of the dataset that must not change: its images (their sha256), and how colors are normalized.

    With --validation, the test images may change.
    """
    properties = _dataset_properties(asdict(dataset))
    if config.data.validation:
        del properties["test images"]
    return properties


def _dataset_properties(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """`dataset`: a DatasetInfo as a dict, as in config.json."""
    images = {name: dataset["splits"][split]["sha256"] for split, name in IMAGES.items()}
    return {**images, "mean and std": [*dataset["mean"], *dataset["std"]]}


def changed_settings(recorded: Mapping[str, Any], requested: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings whose requested value differs from the recorded one, as (name, recorded, requested).

    A setting that is not recorded did not exist in the release that started the run. That release behaved as if the
    setting had its default value, so the requested value is compared with the default. A requested `auto` for a setting
    in RESOLVED equals any recorded value.
    """
    recorded = {**TrainConfig().flat(), **recorded}
    names = [name for name, value in requested.items() if not (name in RESOLVED and value == "auto")]
    return [(name, recorded.get(name), requested[name]) for name in names if recorded.get(name) != requested[name]]


def package_versions() -> dict[str, str]:
    """Versions of those PACKAGES that are installed."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def git_commit() -> str | None:
    """Commit of the running code, with a `+` if the working tree differs from it; None if git cannot tell."""
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        described = subprocess.run(command, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.decode().strip()
