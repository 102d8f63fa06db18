"""What is recorded of a run: JSON lines always, W&B and TensorBoard as their mirrors. The only file that knows wandb.

Built and called on the main process; the other ranks hold a NullTracker. A mirror that fails is dropped with one line
on stderr and never stops the training. Environment and command line, where secrets live, are not recorded.
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ddp_trainer.metric_files import JsonLines, Record, TensorBoardMirror
from ddp_trainer.wandb_service import bounded, choose_run_id, resolve_mode

START_SECONDS = 15  # W&B's own limit for a server to answer
FINISH_SECONDS = 50  # W&B's own limit for the last upload
GIVE_UP_SECONDS = 60  # ours, for a W&B service that does not keep its limits
BEST = ("test_accuracy",)  # the W&B summary shows their maximum over the epochs
LAST = ("train_loss", "train_accuracy", "test_loss", "learning_rate", "seconds", "images_per_second")


class Tracker(Protocol):
    def log_epoch(self, record: Record) -> None: ...

    def finish(self, summary: Mapping[str, object] | None, *, failed: bool = False) -> None:
        """Closes everything in bounded time. `summary`: of a complete run."""
        ...

    def state(self) -> dict[str, str]:
        """What a resumed run needs in order to go on in the same place."""
        ...


class NullTracker:
    """For the silent ranks."""

    def log_epoch(self, record: Record) -> None:
        pass

    def finish(self, summary: Mapping[str, object] | None, *, failed: bool = False) -> None:
        pass

    def state(self) -> dict[str, str]:
        return {}


class Mirror(Protocol):
    """A second place for the same records; it may raise."""

    def log_epoch(self, record: Record) -> None: ...

    def finish(self, summary: Mapping[str, object] | None, *, failed: bool) -> None: ...


class RunTracker:
    """The JSON lines, and the mirrors for as long as they work."""

    def __init__(self, lines: JsonLines, mirrors: dict[str, Mirror], state: dict[str, str]) -> None:
        self._lines, self._mirrors, self._state = lines, mirrors, state

    def log_epoch(self, record: Record) -> None:
        self._lines.log_epoch(record)
        for name, mirror in list(self._mirrors.items()):
            try:
                mirror.log_epoch(record)
            except Exception as error:
                warn(f"{name} is left out from here on, metrics.jsonl goes on ({one_line(error)})")
                del self._mirrors[name]

    def finish(self, summary: Mapping[str, object] | None, *, failed: bool = False) -> None:
        self._lines.close()
        for name, mirror in self._mirrors.items():
            try:
                mirror.finish(summary, failed=failed)
            except Exception as error:
                warn(f"{name} was not closed properly, metrics.jsonl is complete ({one_line(error)})")
        self._mirrors = {}

    def state(self) -> dict[str, str]:
        return dict(self._state)


class WandBMirror:
    """One W&B run per training, through Accelerate's tracker; files in RUN/wandb/.

    W&B's own step is the optimizer step, so a resumed online run drops the steps that its server has already. A
    resumed offline run is written anew from `history`; the file it replaces goes, so that `wandb sync` sends each
    epoch once.
    """

    def __init__(self, run_dir: Path, run_id: str, mode: str, config: Mapping[str, object]) -> None:
        self._folder, self._id = run_dir / "wandb", run_id
        self._tracker = self._start(run_dir, mode)
        run = self._tracker.run
        self._tracker.store_init_configuration(dict(config))
        for axis in ("epoch", "step"):
            run.define_metric(axis, summary="last")
        for name in LAST:
            run.define_metric(name, step_metric="epoch", summary="last")
        for name in BEST:
            run.define_metric(name, step_metric="epoch", summary="max")
        if mode == "online":
            print(f"W&B: {run.url}", file=sys.stderr, flush=True)

    def _start(self, run_dir: Path, mode: str) -> Any:
        import wandb
        from accelerate.tracking import WandBTracker

        settings = wandb.Settings(
            init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS, console="off", silent=True,
            x_disable_meta=True, disable_git=True, disable_code=True,  # they record the command line and remotes
        )  # fmt: skip
        own = {"name": os.environ.get("WANDB_NAME", run_dir.resolve().name),
               "job_type": os.environ.get("WANDB_JOB_TYPE", "train"),
               "resume": "allow" if mode == "online" else None}  # fmt: skip
        tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", "ddp-trainer"),
            dir=str(run_dir), id=self._id, mode=mode, settings=settings, **own,
        )  # fmt: skip
        tracker.start()
        return tracker

    def replay(self, history: Sequence[Record]) -> None:
        """Records the epochs of `history` that the run lacks."""
        run = self._tracker.run
        for record in history:
            if record["step"] >= run.step:
                self.log_epoch(record)
        if run.settings.mode == "offline":
            current = Path(run.dir).resolve().parent
            for folder in self._folder.glob(f"offline-run-*-{self._id}"):
                if folder.resolve() != current:
                    shutil.rmtree(folder, ignore_errors=True)

    def log_epoch(self, record: Record) -> None:
        self._tracker.log(dict(record), step=int(record["step"]))

    def finish(self, summary: Mapping[str, object] | None, *, failed: bool) -> None:
        def close() -> None:
            run = self._tracker.run
            if summary is not None:
                run.summary.update({f"final/{name}": value for name, value in summary.items()})
            run.finish(exit_code=int(failed))

        bounded(close, GIVE_UP_SECONDS)


def build_tracker(
    names: Sequence[str],
    *,
    run_dir: Path,
    config: Mapping[str, object],
    wandb_mode: str,
    history: Sequence[Record] = (),
    state: Mapping[str, str] = {},
) -> Tracker:
    """Call it on the main process only. `history`: the epochs of a resumed run, to which metrics.jsonl is cut back.

    `state`: what `Tracker.state` gave when the run was saved. Raises InputError where a tracker is not installed.
    """
    lines = JsonLines(run_dir / "metrics.jsonl", history)
    mirrors: dict[str, Mirror] = {}
    kept: dict[str, str] = dict(state)
    if "tensorboard" in names:
        mirrors["TensorBoard"] = TensorBoardMirror(run_dir, history)
    mode = resolve_mode(wandb_mode) if "wandb" in names else "disabled"
    if mode != "disabled":
        kept["wandb_run_id"] = choose_run_id(run_dir / "wandb" / "run-id", state.get("wandb_run_id"))
        mirror = start_wandb(run_dir, kept["wandb_run_id"], mode, config, history)
        if mirror is not None:
            mirrors["W&B"] = mirror
    return RunTracker(lines, mirrors, kept)


def start_wandb(
    run_dir: Path, run_id: str, mode: str, config: Mapping[str, object], history: Sequence[Record]
) -> WandBMirror | None:
    """Online if that is wanted and works, else offline, else not at all; a line says why."""
    for attempt in dict.fromkeys((mode, "offline")):
        before = set(run_dir.glob("wandb/run-*"))
        try:
            mirror = WandBMirror(run_dir, run_id, attempt, config)
            mirror.replay(history)
            return mirror
        except Exception as error:
            then = "recording offline" if attempt != "offline" else "going on without it"
            warn(f"W&B {attempt} does not work, {then}: {one_line(error)}")
            for folder in set(run_dir.glob("wandb/run-*")) - before:
                shutil.rmtree(folder, ignore_errors=True)
            forget_wandb()
    return None


def forget_wandb() -> None:
    """Ends W&B's service process, which else holds on to the id of the run that failed to start."""

    def teardown() -> None:
        import wandb

        wandb.teardown(exit_code=1)

    try:
        bounded(teardown, START_SECONDS)
    except Exception as error:
        warn(f"W&B's service did not end: {one_line(error)}")


def warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
