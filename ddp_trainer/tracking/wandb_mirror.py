"""W&B as a mirror of the record: one W&B run for each training. The only file that knows wandb.

Not owned here: whether to go online, under which id, and how long to wait (`wandb_service`), and what happens when W&B
fails (`tracking`).
"""

import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddp_trainer.config import TrackingConfig
from ddp_trainer.tracking.metric_files import Record
from ddp_trainer.tracking.run_record import Run, list_mistakes, load_run
from ddp_trainer.tracking.wandb_service import bounded

START_SECONDS = 15  # W&B's own limit for a server to answer
FINISH_SECONDS = 50  # W&B's own limit for the last upload
GIVE_UP_SECONDS = 60  # ours, for a W&B service that does not keep its limits
BEST = "test_accuracy"  # the summary shows its maximum over the epochs
LAST = ("train_loss", "train_accuracy", "test_loss", "learning_rate", "seconds", "images_per_second")
MAX_CONFUSION_CLASSES = 100  # W&B draws tables of up to 10,000 rows, one for each cell of the matrix
MODEL_FILES = ("model.safetensors", "model.json", "model.md")


class WandBMirror:
    """One W&B run through Accelerate's tracker; its files are in RUN/wandb/.

    W&B's own step is the optimizer step, so a resumed online run drops the steps that its server has already. A
    resumed offline run is written anew from `history`; the file it replaces goes, so that `wandb sync` sends each
    epoch once.
    """

    def __init__(
        self, run_dir: Path, run_id: str, mode: str, settings: TrackingConfig, config: Mapping[str, object]
    ) -> None:
        self._run_dir, self._id = run_dir, run_id
        self._best = -math.inf
        self._tracker = self._start(mode, settings)
        run = self._tracker.run
        self._tracker.store_init_configuration(dict(config))
        for axis in ("epoch", "step"):
            run.define_metric(axis, summary="last")
        for name in LAST:
            run.define_metric(name, step_metric="epoch", summary="last")
        run.define_metric(BEST, step_metric="epoch", summary="max")
        if mode == "online":
            print(f"W&B: {run.url}", file=sys.stderr, flush=True)

    def _start(self, mode: str, settings: TrackingConfig) -> Any:
        import wandb
        from accelerate.tracking import WandBTracker

        # Copies of what is uploaded stay in the run directory: a home folder on a cluster is small.
        os.environ.setdefault("WANDB_DATA_DIR", str((self._run_dir / "wandb").resolve()))
        quiet = wandb.Settings(
            init_timeout=START_SECONDS,
            finish_timeout=FINISH_SECONDS,
            console="off",
            silent=True,
            x_disable_meta=True,
            disable_git=True,
            disable_code=True,  # they record the command line and remotes
        )
        own = {
            "name": os.environ.get("WANDB_NAME", self._run_dir.resolve().name),
            "job_type": os.environ.get("WANDB_JOB_TYPE", "train"),
            "resume": "allow" if mode == "online" else None,
        }
        tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", "ddp-trainer"),
            dir=str(self._run_dir),
            id=self._id,
            mode=mode,
            settings=quiet,
            **own,
        )
        tracker.start()
        return tracker

    def replay(self, history: Sequence[Record]) -> None:
        """Records the epochs of `history` that the run lacks."""
        run = self._tracker.run
        for record in history:
            if record["step"] >= run.step:
                self.log_epoch(record)
            else:
                self._note_best(record)
        if run.settings.mode == "offline":
            current = Path(run.dir).resolve().parent
            for folder in (self._run_dir / "wandb").glob(f"offline-run-*-{self._id}"):
                if folder.resolve() != current:
                    shutil.rmtree(folder, ignore_errors=True)

    def log_step(self, record: Record) -> None:
        """Under names of their own: a chart has one axis, and those of the epochs have theirs."""
        values = {f"step/{name}": value for name, value in record.items()}
        self._tracker.log(values, step=int(record["step"]), commit=False)

    def log_epoch(self, record: Record) -> None:
        """`commit`: else W&B would show an epoch only when the next one comes."""
        self._tracker.log(dict(record), step=int(record["step"]), commit=True)
        self._note_best(record)

    def _note_best(self, record: Record) -> None:
        """As plain figures, by which tables of runs can be sorted."""
        if record.get(BEST, -math.inf) > self._best:
            self._best = record[BEST]
            self._tracker.run.summary.update({f"best_{BEST}": self._best, "best_epoch": record["epoch"]})

    def finish(self, summary: Mapping[str, object] | None, *, failed: bool) -> None:
        def close() -> None:
            run = self._tracker.run
            try:
                if summary is not None:
                    run.summary.update({f"final/{name}": value for name, value in summary.items()})
                    log_results(run, load_run(self._run_dir))
            finally:
                run.finish(exit_code=int(failed))

        bounded(close, GIVE_UP_SECONDS)


def log_results(wandb_run: Any, found: Run) -> None:
    """What a complete run found, from the files it left: confusion matrix, surest mistakes and the model."""
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
            artifact.add_file(str(file), policy="immutable")  # uploaded from where it is, not from a copy
        wandb_run.log_artifact(artifact, aliases=["final"])


def forget_wandb() -> None:
    """Ends W&B's service process, which else holds on to the id of a run that failed to start."""

    def teardown() -> None:
        import wandb

        wandb.teardown(exit_code=1)

    bounded(teardown, START_SECONDS)
