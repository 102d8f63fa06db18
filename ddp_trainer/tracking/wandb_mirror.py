"""Mirrors the records to W&B, with one W&B run for each run directory. Only this file imports wandb.

`wandb_service` decides whether to go online and which id to use, and ends long waits. `tracker` handles W&B's failures.
"""

import contextlib
import math
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddp_trainer.tracking.metric_files import Record, replay
from ddp_trainer.tracking.run_record import Run, list_mistakes, load_run
from ddp_trainer.tracking.wandb_service import bounded

START_SECONDS = 15  # W&B waits this long for its server to answer
FINISH_SECONDS = 50  # W&B waits this long for the last upload to end
GIVE_UP_SECONDS = 60  # our limit, in case W&B's service waits longer
BEST = "test_accuracy"  # W&B's summary shows the maximum of this metric over the epochs
# W&B's summary shows the last value of these metrics.
LAST = ("train_loss", "train_accuracy", "test_loss", "learning_rate", "seconds", "images_per_second")
MAX_CONFUSION_CLASSES = 100  # W&B's table has a row for each cell of the matrix, and at most 10,000 rows
MODEL_FILES = ("model.safetensors", "model.json", "model.md")


class WandBMirror:
    """One W&B run. Its files are in RUN/wandb/.

    W&B's step is the optimizer step. Records that W&B's server already has are not sent again. A resumed offline run
    writes all of its records to a new file and removes the old one, so that `wandb sync` sends each record once.
    """

    def __init__(self, run_dir: Path, run_id: str, mode: str, config: Mapping[str, object]) -> None:
        self._run_dir, self._id = run_dir, run_id
        self._best = -math.inf
        self._waiting: Record | None = None
        self._run = run = self._start(mode)
        self._first_step = run.step  # for a resumed online run, the first step that W&B's server lacks
        run.config.update(dict(config), allow_val_change=True)
        for axis in ("epoch", "step", "step/step"):
            run.define_metric(axis, summary="last")
        run.define_metric("step/*", step_metric="step/step")
        for name in LAST:
            run.define_metric(name, step_metric="epoch", summary="last")
        run.define_metric(BEST, step_metric="epoch", summary="max")
        if mode == "online":
            print(f"W&B: {run.url}", file=sys.stderr, flush=True)

    def _start(self, mode: str) -> Any:
        import wandb

        user = load_settings(self._run_dir)
        ours = wandb.Settings(
            init_timeout=START_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            console="off",
            silent=True,
            x_disable_meta=True,  # the metadata would include the command line, which may contain secrets
            disable_git=True,
            disable_code=True,
        )
        return wandb.init(
            entity=user.entity,
            project=user.project or "ddp-trainer",
            dir=self._run_dir,
            id=self._id,
            name=user.run_name or self._run_dir.resolve().name,
            group=user.run_group,
            job_type=user.run_job_type or "train",
            tags=user.run_tags,
            notes=user.run_notes,
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            reinit="create_new",  # a W&B run that the caller has started stays open
            settings=ours,
        )

    def replay(self, steps: Sequence[Record], epochs: Sequence[Record]) -> None:
        """Logs the records that the W&B run lacks."""
        replay(self, steps, epochs)
        if self._run.settings.mode == "offline":
            current = Path(self._run.dir).resolve().parent
            for folder in (self._run_dir / "wandb").glob(f"offline-run-*-{self._id}"):
                if folder.resolve() != current:
                    shutil.rmtree(folder, ignore_errors=True)

    def log_step(self, record: Record) -> None:
        """Logs the record with step/ before each name, because epoch records use the same names.

        The record is held back until the next record arrives. If that is the record of an epoch that ends with the same
        step, both go into one row, because W&B accepts no additions to a row that was already sent.
        """
        self._log_waiting()
        self._waiting = record

    def log_epoch(self, record: Record) -> None:
        if self._waiting is not None and self._waiting["step"] == record["step"]:
            row, self._waiting = {**_step_values(self._waiting), **record}, None
        else:
            row = dict(record)
        self._log_waiting()
        self._log(row, int(record["step"]))
        self._note_best(record)

    def _log_waiting(self) -> None:
        if self._waiting is not None:
            self._log(_step_values(self._waiting), int(self._waiting["step"]))
            self._waiting = None

    def _log(self, row: Mapping[str, object], step: int) -> None:
        """Logs a row and closes it (`commit`), because W&B shows only closed rows."""
        if step >= self._first_step:
            bounded(lambda: self._run.log(dict(row), step=step, commit=True), GIVE_UP_SECONDS)

    def _note_best(self, record: Record) -> None:
        """Writes the best accuracy and its epoch to W&B's summary, as plain numbers that tables can be sorted by."""
        accuracy = record.get(BEST)
        if isinstance(accuracy, float) and accuracy > self._best:
            self._best = accuracy
            best = {f"best_{BEST}": accuracy, "best_epoch": record["epoch"]}
            bounded(lambda: self._run.summary.update(best), GIVE_UP_SECONDS)

    def finish(self, summary: Mapping[str, object] | None, *, failed: bool) -> None:
        """Closes the W&B run. If this takes too long, raises TimeoutError, which says how to upload the rest.

        Does not log the record that `log_step` holds back: a resumed run logs it, perhaps in one row with an epoch.
        """

        def close() -> None:
            try:
                if summary is not None:
                    self._finish_results(summary)
            finally:
                self._run.finish(exit_code=int(failed))
                release_environment(self._run_dir)

        try:
            bounded(close, GIVE_UP_SECONDS)
        except TimeoutError as error:
            command = f"wandb sync --include-online {shlex.quote(self._run.settings.sync_dir)}"
            raise TimeoutError(f"the upload took too long; to upload the rest, run {command}") from error

    def _finish_results(self, summary: Mapping[str, object]) -> None:
        run = self._run
        results = {f"final/{name}": value for name, value in summary.items()}
        # The run may have been killed after it had sent its results, and resumed to complete the report. The `final/`
        # values are sent last, so if the server has them, it probably has all results.
        if any(run.summary.get(name) != value for name, value in results.items()):
            try:
                log_results(run, load_run(self._run_dir))
            finally:
                run.summary.update(results)

    def abandon(self) -> None:
        forget_wandb(self._run_dir)


def _step_values(record: Record) -> dict[str, object]:
    return {f"step/{name}": value for name, value in record.items()}


def log_results(wandb_run: Any, found: Run) -> None:
    """Logs the results of a finished run (confusion matrix, most confident mistakes, model), read from its files."""
    import wandb

    media: dict[str, Any] = {}
    if found.predictions is not None and len(found.classes) <= MAX_CONFUSION_CLASSES:
        labels, predicted = found.predictions.labels.tolist(), found.predictions.predicted.tolist()
        media["confusion_matrix"] = wandb.plot.confusion_matrix(
            y_true=labels, preds=predicted, class_names=list(found.classes), title="Confusion matrix"
        )
    mistakes = list_mistakes(found)
    if mistakes:
        rows = [
            [wandb.Image(mistake.pixels), mistake.true, mistake.predicted, mistake.probability, mistake.sample]
            for mistake in mistakes
        ]
        media["misclassified"] = wandb.Table(["image", "true", "predicted", "probability", "sample"], rows)
    if media:
        wandb_run.log(media)
    files = [found.path / name for name in MODEL_FILES if (found.path / name).exists()]
    if files:
        artifact = wandb.Artifact(f"model-{wandb_run.id}", type="model", metadata=dict(found.summary or {}))
        for file in files:
            artifact.add_file(str(file), policy="immutable")  # uploaded directly, without a copy
        wandb_run.log_artifact(artifact, aliases=["final"])


def load_settings(run_dir: Path) -> Any:
    """`wandb.Settings` from the environment and W&B's settings files. Starts W&B's service."""
    import wandb

    # W&B copies files before it uploads them. The copies go to the run directory, because home folders may be small.
    os.environ.setdefault("WANDB_DATA_DIR", _data_dir(run_dir))
    settings = wandb.setup().settings.model_copy()
    settings.update_from_env_vars(dict(os.environ))  # wandb.setup reads the variables only once in a process
    return settings


def release_environment(run_dir: Path) -> None:
    """Removes from the environment what `load_settings` set there."""
    if os.environ.get("WANDB_DATA_DIR") == _data_dir(run_dir):
        del os.environ["WANDB_DATA_DIR"]


def _data_dir(run_dir: Path) -> str:
    return str((run_dir / "wandb").resolve())


def forget_wandb(run_dir: Path) -> None:
    """Ends W&B's service, which would otherwise keep the id of a run that failed to start, and complain at exit."""

    def teardown() -> None:
        import wandb

        if wandb.run is None:  # otherwise, the service also has a run that the caller has started
            wandb.teardown(exit_code=1)

    release_environment(run_dir)
    with contextlib.suppress(Exception):  # the failure of W&B was reported already
        bounded(teardown, START_SECONDS)
