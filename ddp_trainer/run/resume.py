"""Decides where a run starts, and refuses to resume a run with other settings."""

import sys
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.dataset import DatasetInfo
from data_prep.errors import InputError, require
from data_prep.files import read_json
from data_prep.sources import name_some
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.train_state import KEYS
from ddp_trainer.run.checkpoint import (
    CheckpointError,
    OtherRelease,
    checkpoint_path,
    clean_up,
    newest_good_checkpoint,
    read_checkpoint,
)
from ddp_trainer.run.directory import RunDirectory
from ddp_trainer.run.files import list_checkpoints, step_of
from ddp_trainer.run.settings import changed_settings, recorded_settings, settings_of
from ddp_trainer.tracking.metric_files import read_records

REQUIRED = KEYS | {"settings", "tracker"}


class StartKind(IntEnum):
    FRESH = 0
    RESUME = 1
    FINISHED = 2


class Start(NamedTuple):
    """Where a run starts: two integers, which the main process sends to the other ranks."""

    kind: StartKind = StartKind.FRESH
    step: int = 0  # the step of the checkpoint to resume from


def find_start(run_dir: RunDirectory | None, config: TrainConfig, *, last_step: int) -> Start:
    """Where the run in `run_dir` starts. Without --resume, this is always the beginning.

    On ranks other than the main one, `run_dir` is None, and the result is the beginning too. Raises InputError if the
    run's checkpoints are gone, are all damaged, or were written by another release.
    """
    if run_dir is None or not config.run.resume:
        return Start()
    if run_dir.is_finished(last_step):
        return Start(StartKind.FINISHED)
    clean_up(run_dir.checkpoints)
    try:
        newest = newest_good_checkpoint(run_dir.checkpoints, REQUIRED)
    except OtherRelease as error:
        raise InputError(f"--resume: {error}; resume with the release that started the run{_commit(run_dir)}") from None
    if newest is not None:
        return Start(StartKind.RESUME, step_of(newest))
    if list_checkpoints(run_dir.checkpoints):
        raise InputError(f"--resume: every checkpoint in {run_dir.checkpoints} is damaged; restore one from a backup")
    _refuse_lost_checkpoints(run_dir)
    print(f"nothing to resume in {run_dir.path}: starting from the beginning", file=sys.stderr, flush=True)
    return Start()


def _commit(run_dir: RunDirectory) -> str:
    commit = (read_json(run_dir.path / "config.json") or {}).get("git_commit")
    return f", commit {commit}" if isinstance(commit, str) else ""


def _count(value: object) -> int:
    """`value` if it is an integer, otherwise 0. The value comes from an untrusted JSON file."""
    return value if isinstance(value, int) else 0


def _refuse_lost_checkpoints(run_dir: RunDirectory) -> None:
    """Raises InputError if the run's checkpoints were lost, because starting again would delete the run's records.

    A run without saved steps or results, and with at most one finished epoch, may start again: it was killed before its
    first checkpoint.
    """
    path = run_dir.path
    epochs = read_records(path / "metrics.jsonl", last_step=sys.maxsize)
    status = run_dir.status  # after a failure, its `step` may be later than the last checkpoint
    saved = _count(status.get("saved_step" if status.get("state") == "failed" else "step"))
    if len(epochs) > 1 or saved or any((path / name).exists() for name in ("summary.json", "model.safetensors")):
        steps = max([saved, *(_count(record["step"]) for record in epochs)])
        raise InputError(
            f"--resume: the run in {path} has done {steps} steps, but its checkpoints are gone; restore them, or "
            "choose another --out"
        )


def load_state(start: Start, config: TrainConfig, dataset: DatasetInfo, *, precision: str) -> dict[str, Any] | None:
    """The state to resume from; None for a fresh start or a finished run.

    Raises InputError, which lists the differences, if the run was started with other settings.
    """
    out, is_finished = config.run.out, start.kind == StartKind.FINISHED
    if out is None or not config.run.resume:
        return None
    # In a finished run nothing is computed, so --precision auto need not be resolved.
    requested = settings_of(config, dataset, precision=config.runtime.precision if is_finished else precision)
    # A checkpoint of an older release says less about the dataset than config.json.
    recorded = recorded_settings(out) if is_finished or (out / "config.json").exists() else {}
    state = _read_state(out, start.step) if start.kind == StartKind.RESUME else None
    if state is not None:
        recorded |= state["settings"]
    if recorded:  # empty if the run was killed before it wrote config.json
        refuse_other_settings(recorded, requested)
    unknown = sorted(state["settings"].keys() - requested.keys() - config.flat().keys()) if state is not None else []
    require(
        not unknown,
        f"--resume: the checkpoint has settings that this release does not know ({name_some(unknown)}); resume with "
        "the release that started the run",
    )
    return state


def _read_state(out: Path, step: int) -> dict[str, Any]:
    try:
        return read_checkpoint(checkpoint_path(out / "checkpoints", step), REQUIRED)
    except CheckpointError as error:  # the main process has read this checkpoint, so this machine sees different files
        raise InputError(f"--resume: {error}; every machine must see the same --out") from None


def thread_warnings(config: TrainConfig, runtime: Runtime) -> list[str]:
    """A list with a warning if the run in --out last used another number of threads on a CPU; otherwise an empty list.

    Call it before the run overwrites config.json.
    """
    assert config.run.out is not None, "--resume needs --out"
    before, now = read_json(config.run.out / "config.json") or {}, runtime.describe()
    same_processes = all(before.get(name) == now[name] for name in ("device", "world_size"))
    threads = before.get("threads")
    if now["device"] != "cpu" or not same_processes or threads in (None, now["threads"]):
        return []
    return [
        f"warning: the number of threads per process was {threads} before and is {now['threads']} now, so the run may "
        f"not equal an uninterrupted run bit for bit; to avoid this, set OMP_NUM_THREADS={threads}"
    ]


def refuse_other_settings(saved: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Raises InputError, which lists the differences, if a requested setting differs from the saved one."""
    changed = changed_settings(saved, requested)
    if changed:
        detail = ", ".join(f"{name} {old} -> {new}" for name, old, new in changed)
        raise InputError(f"--resume: the run was started with other settings ({detail}); use the original settings")
