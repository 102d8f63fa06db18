"""The run directory: who holds it, and the small JSON files in it. Only the main process writes there."""

import fcntl
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import InputError
from ddp_trainer.config import TrainConfig

if TYPE_CHECKING:
    from data_prep.dataset import DatasetInfo

PACKAGES = ("torch", "torchvision", "accelerate", "ffcv", "numpy", "wandb")


def replace_file(path: Path, content: bytes) -> None:
    """Readers see the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file. Raises InputError for one that is not a JSON object."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} cannot be read: not a JSON object")
    return content


def describe_run(config: TrainConfig, dataset: "DatasetInfo", machine: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json: no environment and no raw command line, which may hold secrets."""
    # Where the data will still be when slurm/node.sh has removed the copy that it staged for this job.
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
    """What config.json says a run was trained with, what `auto` precision came to, and on which images.

    Raises InputError where it says nothing.
    """
    config = read_json(run_dir / "config.json") or {}
    try:
        images = config["dataset"]["splits"]["train"]["sha256"]
        return {**config["settings"], "precision": config["precision"], "training images": images}
    except (KeyError, TypeError):
        raise InputError(f"{run_dir / 'config.json'} does not say what was trained: name another --out") from None


def changed_settings(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, recorded, asked) of what is asked to be otherwise. `auto` precision is what it came to."""
    names = [name for name, value in asked.items() if (name, value) != ("precision", "auto")]
    return [(name, recorded.get(name), asked[name]) for name in names if recorded.get(name) != asked[name]]


def refuse_present_run(out: Path, *, resume: bool) -> None:
    """Raises InputError where a run is in `out` that is not to be resumed."""
    if not resume and (out / "config.json").exists():
        raise InputError(f"--out {out}: a run is there already; add --resume to go on with it, or name another")


class RunDirectory:
    """One run's folder, held by this process until it ends, so that no two runs write into it.

    Raises InputError where another run holds it, where a run is there already that is not to be resumed, and where
    the folder cannot be written.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a")
        except OSError as error:
            raise InputError(f"--out {path}: cannot be written ({error.strerror}); name another folder") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InputError(f"--out {path}: another run holds this folder; name another, or wait for it") from None
        try:
            refuse_present_run(path, resume=resume)
        except InputError:
            self._lock.close()
            raise

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> dict[str, Any] | None:
        """summary.json of a run that is complete, else None."""
        return read_json(self.path / "summary.json")

    @property
    def status(self) -> dict[str, Any]:
        """status.json; empty where there is none."""
        return read_json(self.path / "status.json") or {}

    def write_status(self, state: str, *, step: int = 0, epoch: int = 0, message: str = "") -> None:
        """state: running, preempted, done or failed."""
        write_json(self.path / "status.json", {"state": state, "step": step, "epoch": epoch, "message": message})


def package_versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """The commit of the code that runs, with a `+` where the tree differs from it; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
