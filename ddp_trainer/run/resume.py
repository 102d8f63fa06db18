"""Where a run starts, and whether a resumed run is still the same run."""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple

from data_prep.dataset import DatasetInfo
from data_prep.errors import InputError
from ddp_trainer.config import TrainConfig
from ddp_trainer.engine.train_state import KEYS
from ddp_trainer.run.checkpoint import (
    CheckpointError,
    checkpoint_path,
    clean_up,
    list_checkpoints,
    newest_good_checkpoint,
    read_checkpoint,
    step_of,
)
from ddp_trainer.run.directory import RunDirectory, changed_settings, recorded_settings

REQUIRED = KEYS | {"settings", "tracker"}


class StartKind(IntEnum):
    FRESH = 0
    RESUME = 1
    FINISHED = 2


class Start(NamedTuple):
    """Where a run starts. As plain integers it travels between the ranks."""

    kind: StartKind = StartKind.FRESH
    step: int = 0  # of the checkpoint to resume from


def find_start(run_dir: RunDirectory | None, config: TrainConfig, *, last_step: int) -> Start:
    """Looks at what is in the run directory; on ranks without one, and without --resume, it is a fresh start.

    Raises InputError if checkpoints exist but none is good.
    """
    if run_dir is None or not config.run.resume:
        return Start()
    summary = run_dir.summary
    if summary is not None and summary.get("steps", 0) >= last_step:
        return Start(StartKind.FINISHED)
    clean_up(run_dir.checkpoints)
    newest = newest_good_checkpoint(run_dir.checkpoints, REQUIRED)
    if newest is not None:
        return Start(StartKind.RESUME, step_of(newest))
    if list_checkpoints(run_dir.checkpoints):
        raise InputError(f"--resume: every checkpoint in {run_dir.checkpoints} is damaged; start over in another --out")
    return Start()


def settings_of(config: TrainConfig, dataset: DatasetInfo, *, precision: str) -> dict[str, Any]:
    """What a resumed run must share with the run it continues, the training images and the precision included."""
    images = dataset.splits["train"].sha256
    return {**config.fixed_on_resume(), "precision": precision, "training images": images}


def load_state(start: Start, config: TrainConfig, dataset: DatasetInfo, *, precision: str) -> dict[str, Any] | None:
    """The state to resume from; None for a fresh start or a finished run.

    Raises InputError, naming the settings, if the run was started with other ones.
    """
    out = config.run.out
    if start.kind == StartKind.FRESH:
        return None
    assert out is not None, "--resume comes with --out"
    if start.kind == StartKind.FINISHED:  # nothing is computed, so it does not matter what `auto` is on this machine
        requested = settings_of(config, dataset, precision=config.runtime.precision)
        refuse_other_settings(recorded_settings(out), requested)
        return None
    try:
        state = read_checkpoint(checkpoint_path(out / "checkpoints", start.step), REQUIRED)
    except CheckpointError as error:  # the main process has read it, so this machine sees other files
        raise InputError(f"--resume: {error}; every machine must see the same --out") from None
    refuse_other_settings(state["settings"], settings_of(config, dataset, precision=precision))
    return state


def refuse_other_settings(saved: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Raises InputError, naming what differs, unless all of `requested` is as it was saved."""
    changed = changed_settings(saved, requested)
    if changed:
        detail = ", ".join(f"{name} {old} -> {new}" for name, old, new in changed)
        raise InputError(f"--resume: this would not be the same run ({detail}); use the settings it began with")
