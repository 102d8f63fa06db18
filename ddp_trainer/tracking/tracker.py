"""What is recorded of a run: JSON lines always, W&B and TensorBoard as their mirrors.

Built and called on the main process; the other ranks hold a NullTracker. A mirror that fails is dropped with one line
on stderr and never stops the training. Environment and command line, where secrets live, are not recorded.
"""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ddp_trainer.config import TrackingConfig
from ddp_trainer.tracking.metric_files import JsonLines, Record, TensorBoardMirror, read_step_records
from ddp_trainer.tracking.wandb_mirror import WandBMirror, forget_wandb
from ddp_trainer.tracking.wandb_service import choose_run_id, resolve_mode


class Tracker(Protocol):
    def log_step(self, record: Record) -> None: ...

    def log_epoch(self, record: Record) -> None: ...

    def finish(self, summary: Mapping[str, object] | None, *, failed: bool = False) -> None:
        """Closes everything in bounded time. `summary`: of a complete run."""
        ...

    def state(self) -> dict[str, str]:
        """What a resumed run needs in order to go on in the same place."""
        ...


class Mirror(Protocol):
    """A second place for the same records; it may raise."""

    def log_step(self, record: Record) -> None: ...

    def log_epoch(self, record: Record) -> None: ...

    def finish(self, summary: Mapping[str, object] | None, *, failed: bool) -> None: ...


class RunTracker:
    """The JSON lines, and the mirrors for as long as they work."""

    def __init__(self, steps: JsonLines, epochs: JsonLines, mirrors: dict[str, Mirror], state: dict[str, str]) -> None:
        self._steps, self._epochs, self._mirrors, self._state = steps, epochs, mirrors, state

    def log_step(self, record: Record) -> None:
        self._steps.write(record)
        self._in_mirrors(lambda mirror: mirror.log_step(record))

    def log_epoch(self, record: Record) -> None:
        self._epochs.write(record)
        self._in_mirrors(lambda mirror: mirror.log_epoch(record))

    def _in_mirrors(self, log: Callable[[Mirror], None]) -> None:
        for name, mirror in list(self._mirrors.items()):
            try:
                log(mirror)
            except Exception as error:
                warn(f"{name} disabled for the rest of this run; metrics.jsonl is unaffected ({one_line(error)})")
                del self._mirrors[name]

    def finish(self, summary: Mapping[str, object] | None, *, failed: bool = False) -> None:
        self._steps.close()
        self._epochs.close()
        for name, mirror in self._mirrors.items():
            try:
                mirror.finish(summary, failed=failed)
            except Exception as error:
                warn(f"{name} was not closed properly, metrics.jsonl is complete ({one_line(error)})")
        self._mirrors = {}

    def state(self) -> dict[str, str]:
        return dict(self._state)


def build_tracker(
    settings: TrackingConfig,
    *,
    run_dir: Path,
    config: Mapping[str, object],
    history: Sequence[Record] = (),
    step: int = 0,
    state: Mapping[str, str] = {},
) -> Tracker:
    """Call it on the main process only.

    A run that is resumed after `step` keeps the records up to there: `history` in metrics.jsonl, and the steps in
    steps.jsonl. `state`: what `Tracker.state` returned when the run was saved.
    """
    recorded = read_step_records(run_dir / "steps.jsonl", last_step=step)
    steps = JsonLines(run_dir / "steps.jsonl", recorded)
    epochs = JsonLines(run_dir / "metrics.jsonl", history)
    mirrors: dict[str, Mirror] = {}
    kept: dict[str, str] = dict(state)
    if "tensorboard" in settings.tracker_names:
        try:
            mirrors["TensorBoard"] = TensorBoardMirror(run_dir, recorded, history)
        except Exception as error:  # also of an installation that cannot be imported
            warn(f"TensorBoard does not work, going on without it: {one_line(error)}")
    mode = resolve_mode(settings.wandb) if "wandb" in settings.tracker_names else "disabled"
    if mode != "disabled":
        kept["wandb_run_id"] = choose_run_id(run_dir / "wandb" / "run-id", state.get("wandb_run_id"))
        mirror = start_wandb(run_dir, kept["wandb_run_id"], mode, settings, config, history)
        if mirror is not None:
            mirrors["W&B"] = mirror
    return RunTracker(steps, epochs, mirrors, kept)


def start_wandb(
    run_dir: Path,
    run_id: str,
    mode: str,
    settings: TrackingConfig,
    config: Mapping[str, object],
    history: Sequence[Record],
) -> WandBMirror | None:
    """Online if that is wanted and works, else offline, else not at all; a line says why."""
    for attempt in dict.fromkeys((mode, "offline")):
        before = set(run_dir.glob("wandb/run-*"))
        try:
            mirror = WandBMirror(run_dir, run_id, attempt, settings, config)
            mirror.replay(history)
            return mirror
        except Exception as error:
            then = "recording offline" if attempt != "offline" else "going on without it"
            warn(f"W&B {attempt} does not work, {then}: {one_line(error)}")
            for folder in set(run_dir.glob("wandb/run-*")) - before:
                shutil.rmtree(folder, ignore_errors=True)
            try:
                forget_wandb()
            except Exception as failure:
                warn(f"W&B's service did not end: {one_line(failure)}")
    return None


def warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
