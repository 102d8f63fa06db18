"""The run directory and the small JSON files in it. Only the main process writes to it."""

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import InputError, warn
from data_prep.files import DISK_FULL, read_json, write_json
from ddp_trainer.config import TrainConfig
from ddp_trainer.run.files import list_checkpoints, refuse_existing_run, refuse_links, step_of
from ddp_trainer.run.lock import locked_folder

if TYPE_CHECKING:
    from data_prep.dataset import DatasetInfo

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")  # names of the temporary files of `replace_file`
PACKAGES = ("torch", "torchvision", "accelerate", "ffcv", "numpy", "wandb")


@dataclass
class RunDirectory:
    """The folder of one run. `claim_run_directory` locks it."""

    path: Path
    has_status: bool = False  # whether this process has written status.json

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> dict[str, Any] | None:
        """Content of summary.json; None unless the run is finished."""
        return read_json(self.path / "summary.json")

    def is_finished(self, last_step: int) -> bool:
        """Whether the run has done `last_step` steps and has written its results and its model."""
        steps = (self.summary or {}).get("steps")
        has_model = all((self.path / name).exists() for name in ("model.safetensors", "model.json"))
        return has_model and isinstance(steps, int) and steps >= last_step  # untrusted JSON may contain anything

    @property
    def status(self) -> dict[str, Any]:
        """Content of status.json; empty if there is no such file."""
        return read_json(self.path / "status.json") or {}

    def epoch_of(self, step: int) -> int:
        """The epoch of the checkpoint saved after `step`, from status.json. 0 if that file lacks it or is damaged."""
        with contextlib.suppress(InputError):
            status = self.status
            if status.get("saved_step") == step and isinstance(status.get("epoch"), int):
                return status["epoch"]
        return 0

    def write_status(self, state: str, *, step: int = 0, epoch: int = 0, message: str = "") -> None:
        """Writes status.json. `state`: running, preempted or done. `step`: the step of the newest checkpoint, or 0."""
        self.has_status = True
        write_json(self.path / "status.json", _status(state, step, epoch, message, saved_step=step))

    def write_failure(self, error: BaseException, *, step: int, epoch: int, saved_step: int) -> None:
        """Records in status.json why the run failed. Never raises, because that would hide the original error.

        `saved_step`: the step of the newest checkpoint; 0 if there is none.
        """
        self.has_status = True
        message = f"{type(error).__name__}: {error}"
        try:
            _replace_or_overwrite(
                self.path / "status.json", _status("failed", step, epoch, message, saved_step=saved_step)
            )
        except OSError as other:
            warn(str(other))


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
    it cannot be written. Raises OSError if the disk is full. If the block fails before it has written status.json, the
    failure is recorded there. This does not apply to wrong input, or to a run that has a summary.json.
    """
    if not is_main:
        yield None
        return
    with locked_folder(config.run.out, config.recipe) as path:
        refuse_links(path)
        refuse_existing_run(path, resume=config.run.resume)
        remove_temporaries(path)
        run_dir = RunDirectory(path)
        try:
            yield run_dir
        except BaseException as error:
            keeps_status = run_dir.has_status or (path / "summary.json").exists()  # a finished run stays finished
            if not keeps_status and not isinstance(error, InputError):
                newest = list_checkpoints(run_dir.checkpoints)[:1]
                step = step_of(newest[0]) if newest else 0
                run_dir.write_failure(error, step=step, epoch=run_dir.epoch_of(step), saved_step=step)
            raise


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
