"""Where a run goes on, and whether it is still the same training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from ddp_trainer.checkpoint import (
    CheckpointError,
    clean_up,
    list_checkpoints,
    newest_good_checkpoint,
    place_of,
    read_checkpoint,
    step_of,
)
from ddp_trainer.rundir import RunDirectory, changed_settings
from ddp_trainer.training_state import KEYS

COMPLETE, FRESH = -2, -1  # beside the number of a step to resume from
REQUIRED = KEYS | {"settings", "tracker"}


def find_start(run_dir: RunDirectory, last_step: int) -> int:
    """Where --resume starts: COMPLETE, FRESH or the step of the newest good checkpoint.

    Raises InputError where checkpoints exist but none is good.
    """
    summary = run_dir.summary
    if summary is not None and summary.get("steps", 0) >= last_step:
        return COMPLETE
    clean_up(run_dir.checkpoints)
    newest = newest_good_checkpoint(run_dir.checkpoints, REQUIRED)
    if newest is not None:
        return step_of(newest)
    if list_checkpoints(run_dir.checkpoints):
        raise InputError(f"--resume: every checkpoint in {run_dir.checkpoints} is damaged; start anew in another --out")
    return FRESH


def load_state(run_dir: Path, step: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state to go on from. Raises InputError where it belongs to other `settings`, and names them."""
    try:
        state = read_checkpoint(place_of(run_dir / "checkpoints", step), REQUIRED)
    except CheckpointError as error:  # the main process has read it: this machine does not see the same files
        raise InputError(f"--resume: {error}; every machine must see the same --out") from None
    refuse_other_training(state["settings"], settings)
    return state


def refuse_other_training(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises InputError, which names what differs, unless every one of `settings` is as it was saved."""
    changed = changed_settings(saved, settings)
    if changed:
        detail = ", ".join(f"{name} {old} -> {new}" for name, old, new in changed)
        raise InputError(f"--resume: this would not be the same training ({detail}); use the settings it began with")
