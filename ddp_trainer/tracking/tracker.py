"""Records a run as JSON lines, and sends the same records to mirrors: W&B and TensorBoard.

Only the main process does this. A mirror that fails is dropped with one line on stderr, and the run continues. The
environment and the command line are not recorded, because they may contain secrets.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from data_prep.errors import warn
from data_prep.files import sync
from ddp_trainer.config import TrackingConfig, is_installed
from ddp_trainer.tracking.metric_files import JsonLines, Log, Record, TensorBoardMirror, read_records
from ddp_trainer.tracking.wandb_mirror import WandBMirror, forget_wandb, load_settings
from ddp_trainer.tracking.wandb_service import choose_run_id, keep_run_id, mode_from_environment, resolve_mode


class Mirror(Log, Protocol):
    """A place for the records besides the JSON lines. All methods except `abandon` may raise exceptions."""

    def finish(self, summary: Mapping[str, object] | None, *, failed: bool) -> None: ...

    def abandon(self) -> None:
        """Called once, after another method raised an exception."""
        ...


class Tracker:
    """Writes each record to the JSON lines, and to each mirror until that mirror fails."""

    def __init__(self, steps: JsonLines, epochs: JsonLines, mirrors: dict[str, Mirror], state: dict[str, str]) -> None:
        self._steps, self._epochs, self._mirrors, self._state = steps, epochs, mirrors, state

    def log_step(self, record: Record) -> None:
        self._steps.write(record)
        self._in_mirrors(lambda mirror: mirror.log_step(record), "failed and is disabled for the rest of this run")

    def log_epoch(self, record: Record) -> None:
        self._epochs.write(record)
        self._in_mirrors(lambda mirror: mirror.log_epoch(record), "failed and is disabled for the rest of this run")

    def sync(self) -> None:
        """Flushes the JSON lines to the disk, so that they survive a power cut. Any thread may call it."""
        sync(self._steps.path)
        sync(self._epochs.path)

    def finish(self, summary: Mapping[str, object] | None, *, failed: bool = False) -> None:
        """Closes the files and mirrors within a limited time. `summary` is None unless the run is finished."""
        self._steps.close()
        self._epochs.close()
        self._in_mirrors(lambda mirror: mirror.finish(summary, failed=failed), "was not closed properly")
        self._mirrors = {}

    def state(self) -> dict[str, str]:
        """What a resumed run needs to continue in the same W&B run."""
        return dict(self._state)

    def _in_mirrors(self, call: Callable[[Mirror], None], consequence: str) -> None:
        for name, mirror in list(self._mirrors.items()):
            try:
                call(mirror)
            except Exception as error:
                warn(f"{name} {consequence}; metrics.jsonl is unaffected ({one_line(error)})")
                del self._mirrors[name]
                mirror.abandon()


def build_tracker(
    settings: TrackingConfig,
    *,
    run_dir: Path,
    config: Mapping[str, object],
    history: Sequence[Record] = (),
    step: int = 0,
    state: Mapping[str, str] = {},
) -> Tracker:
    """Opens the files and starts the mirrors. Call it on the main process only.

    A run that is resumed after `step` keeps `history` in metrics.jsonl, and the records up to that step in
    steps.jsonl. `state`: what `Tracker.state` returned when the run was saved.
    """
    kept = read_records(run_dir / "steps.jsonl", last_step=step)
    steps = JsonLines(run_dir / "steps.jsonl", kept)
    epochs = JsonLines(run_dir / "metrics.jsonl", history)
    mirrors: dict[str, Mirror] = {}
    new_state = dict(state)
    if "tensorboard" in settings.tracker_names:
        try:
            mirrors["TensorBoard"] = TensorBoardMirror(run_dir, kept, history)
        except Exception as error:  # for example, a broken installation cannot be imported
            warn(f"TensorBoard does not work, continuing without it: {one_line(error)}")
    mode = choose_wandb_mode(settings, run_dir)
    if mode != "disabled":
        run_id = choose_run_id(run_dir, state.get("wandb_run_id"))
        mirror = start_wandb(run_dir, run_id, mode, config, kept, history)
        if mirror is not None:
            try:
                keep_run_id(run_dir, run_id)
            except OSError as error:
                warn(f"the id of the W&B run cannot be stored: {one_line(error)}")
            new_state["wandb_run_id"] = run_id
            mirrors["W&B"] = mirror
    return Tracker(steps, epochs, mirrors, new_state)


def choose_wandb_mode(settings: TrackingConfig, run_dir: Path) -> str:
    """The W&B mode: online, offline or disabled. Prints a line on stderr if W&B is missing or does not work."""
    if not settings.uses_wandb:
        return "disabled"
    if not is_installed("wandb"):
        if mode_from_environment() != "disabled":
            warn("wandb is not installed, continuing without it; metrics.jsonl is unaffected")
        return "disabled"
    try:
        return resolve_mode(settings.wandb, lambda: load_settings(run_dir))
    except Exception as error:
        warn(f"W&B does not work, continuing without it: {one_line(error)}")
        forget_wandb(run_dir)
        return "disabled"


def start_wandb(
    run_dir: Path,
    run_id: str,
    mode: str,
    config: Mapping[str, object],
    steps: Sequence[Record],
    epochs: Sequence[Record],
) -> WandBMirror | None:
    """A W&B run in `mode`; if that fails, an offline run; if both fail, None. A line on stderr reports each failure."""
    for attempt in dict.fromkeys((mode, "offline")):
        before = set(run_dir.glob("wandb/run-*"))
        try:
            mirror = WandBMirror(run_dir, run_id, attempt, config)
            mirror.replay(steps, epochs)
            return mirror
        except Exception as error:
            then = "recording offline" if attempt != "offline" else "continuing without it"
            warn(f"W&B does not work in {attempt} mode, {then}: {one_line(error)}")
            for folder in set(run_dir.glob("wandb/run-*")) - before:
                shutil.rmtree(folder, ignore_errors=True)
            forget_wandb(run_dir)
    return None


def one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:1000]
