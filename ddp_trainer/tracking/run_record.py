"""Reads a run back from its directory, and checks that its files are consistent and safe to use.

`json_fields` checks single fields, `record_lines` reads the JSON lines, and `predictions` reads predictions.npz.
`metric_files` and the package `run` write these files.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.errors import InputError, printable
from data_prep.files import require_readable
from data_prep.json_fields import LARGEST_SETTING, Fields, Setting
from ddp_trainer.tracking.predictions import Mistake, Predictions, most_confident_mistakes, read_predictions
from ddp_trainer.tracking.record_lines import Record, columns, read_epochs, read_steps

FIGURES = (  # read from summary.json
    *("test_accuracy", "test_correct", "test_total", "test_accuracy_tta", "test_balanced_accuracy", "epochs", "steps"),
    *("largest_class_share", "test_loss", "calibration_error_before", "temperature"),
    *("train_seconds", "train_pflops", "optimizer_pflops", "parameters", "images_per_second"),
)


@dataclass(frozen=True, kw_only=True)
class RecordedSplit:
    count: int | None
    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class RecordedDataset:
    """What config.json says about the dataset. Every field may be missing."""

    source: str = ""
    image_size: int | None = None
    encoding: str = ""
    quality: int | None = None
    classes: tuple[str, ...] = ()
    splits: Mapping[str, RecordedSplit] = field(default_factory=dict)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    skipped: tuple[str, ...] = ()  # names of image files that could not be read


class EvaluatedImages(NamedTuple):
    """What determines the images on which a run was evaluated."""

    split: str
    sha256: str  # of the file that contains the images
    chosen_by: tuple[object, ...]  # with --validation: the number of held-out images, and the seed


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory. An interrupted run may lack epochs, predictions and the summary."""

    path: Path
    name: str  # of the folder; with parent folders if several loaded runs have the same name
    recipe: str
    data_dir: str
    settings: Mapping[str, Setting]
    versions: Mapping[str, str]
    git_commit: str  # hexadecimal digits, with a `+` if there were uncommitted changes; empty if unknown
    world_size: int
    device: str
    precision: str
    dataset: RecordedDataset
    metrics: tuple[Record, ...]  # one per epoch, in order
    steps: tuple[Record, ...]  # from steps.jsonl, in order
    summary: Mapping[str, float] | None  # the FIGURES in summary.json
    split: str  # which images were evaluated: test or validation
    classes: tuple[str, ...]
    predictions: Predictions | None
    state: str  # from status.json; empty if unknown
    message: str

    @property
    def evaluated_images(self) -> EvaluatedImages:
        held_out = self.split == "validation"
        recorded = self.dataset.splits.get("train" if held_out else self.split)
        chosen_by = (self.settings.get("validation"), self.settings.get("seed")) if held_out else ()
        return EvaluatedImages(self.split, recorded.sha256 if recorded else "", chosen_by)

    @property
    def counts(self) -> tuple[int, int] | None:
        """Numbers of (correct, evaluated) images for the final model or, if unknown, for the last finished epoch."""
        counts = _counts_in(self.summary or {})
        if counts is None and self.predictions is not None:
            return self.predictions.num_correct, len(self.predictions.labels)
        return counts or _counts_in(self.metrics[-1] if self.metrics else {})

    @property
    def accuracy(self) -> float | None:
        """Share of correct predictions, 0 to 1, or None if it is unknown."""
        if self.counts is not None:
            return self.counts[0] / self.counts[1]
        return self.metrics[-1].get("test_accuracy") if self.metrics else None

    def number(self, name: str) -> float | None:
        """One of the FIGURES; None if summary.json lacks it."""
        return (self.summary or {}).get(name)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, values), for all epochs whose record has a value called `name`."""
        return columns(self.metrics, "epoch", name)

    def step_series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, values) of the step records. Epochs are fractions: the middle of the second epoch is 1.5."""
        first = self.metrics[0] if self.metrics else {}
        steps_per_epoch = first.get("step", 0) / first["epoch"] if first else 0
        steps, values = columns(self.steps, "step", name)
        return (steps / steps_per_epoch, values) if steps_per_epoch > 0 else (steps[:0], values[:0])


def _counts_in(figures: Mapping[str, float]) -> tuple[int, int] | None:
    correct, total = figures.get("test_correct", -1), figures.get("test_total", -1)
    return (int(correct), int(total)) if 0 <= correct <= total and total >= 1 else None


def list_mistakes(run: Run) -> list[Mistake]:
    """The most confident mistakes; none if the run has no predictions."""
    return [] if run.predictions is None else most_confident_mistakes(run.predictions, run.classes)


def load_run(path: Path | str, *, with_predictions: bool = True) -> Run:
    """Reads the run in `path`. Raises InputError if this is not a run directory, or if a file in it cannot be used.

    Without predictions, a run takes little memory, and its predictions.npz may be damaged.
    """
    path = Path(path)
    require_readable(path)
    if not os.path.isdir(path):
        raise InputError(f"{path} is not a folder: name a run directory, such as runs/NAME")
    config = Fields.read(path / "config.json")
    if config is None:
        raise InputError(f"{path / 'config.json'} is missing: {path} is not a run directory")
    if "settings" not in config:
        raise InputError(f"{path / 'config.json'} has no settings of a run: {path} is not a run directory")
    summary, status = Fields.read(path / "summary.json"), Fields.read(path / "status.json") or Fields({}, path)
    predictions = read_predictions(path / "predictions.npz") if with_predictions else None
    dataset, settings = _read_dataset(config.part("dataset")), config.part("settings")
    for name in ("validation", "seed"):  # they decide which images are held out
        settings.integer(name, maximum=LARGEST_SETTING)
    return Run(
        path=path.resolve(),
        name=printable(path.resolve().name),
        recipe=config.text("recipe"),
        data_dir=config.text("data_dir"),
        settings={printable(name): settings.setting(name) for name in settings.names()},
        versions=_read_texts(config.part("versions")),
        git_commit=_read_commit(config),
        world_size=config.integer("world_size", minimum=1) or 1,
        device=config.text("device_name") or config.text("device", "unknown device"),
        precision=(summary.text("precision") if summary else "") or config.text("precision"),
        dataset=dataset,
        metrics=read_epochs(path / "metrics.jsonl"),
        steps=read_steps(path / "steps.jsonl"),
        summary=None if summary is None else _read_figures(summary, path / "summary.json"),
        split=_evaluated_split(summary, settings),
        classes=_read_classes(path, dataset, predictions),
        predictions=predictions,
        state=status.text("state"),
        message=status.text("message"),
    )


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Loads each run once. If several folders have the same name, the names of their runs begin with parent folders.

    Only the first run has its predictions: a report shows no others, and those of all runs might not fit into memory.
    """
    loaded: dict[Path, Run] = {}
    for path in paths:
        run = load_run(path, with_predictions=not loaded)
        loaded.setdefault(run.path, run)
    runs = list(loaded.values())
    return [replace(run, name=printable(_distinct_name(run.path, loaded))) for run in runs]


def _distinct_name(path: Path, paths: Iterable[Path]) -> str:
    """The shortest end of `path` that is not the end of another path in `paths`, such as FOLDER or PARENT/FOLDER."""
    others = [other.parts for other in paths if other != path]
    ends = (path.parts[-length:] for length in range(1, len(path.parts) + 1))
    return str(Path(*next(end for end in ends if all(other[-len(end) :] != end for other in others))))


def _read_dataset(fields: Fields) -> RecordedDataset:
    splits = fields.part("splits")
    parts = {name: splits.part(name) for name in splits.names()}
    return RecordedDataset(
        source=fields.text("source"),
        image_size=fields.integer("image_size", minimum=1),
        encoding=fields.text("encoding"),
        quality=fields.integer("quality", minimum=1),
        classes=fields.texts("classes"),
        splits={
            printable(name): RecordedSplit(
                count=part.integer("count"), file=part.text("file", printable(name)), sha256=part.text("sha256")
            )
            for name, part in parts.items()
        },
        mean=fields.numbers("mean"),
        std=fields.numbers("std"),
        skipped=fields.texts("skipped"),
    )


def _read_texts(fields: Fields) -> dict[str, str]:
    return {printable(name): fields.text(name) for name in fields.names()}


def _read_commit(config: Fields) -> str:
    """The commit, or "" if it is not a hash: the report prints it in a command, which must be safe to paste."""
    commit = config.text("git_commit")
    digits = commit.removesuffix("+")
    is_commit = 7 <= len(digits) <= 64 and set(digits) <= set("0123456789abcdef")
    return commit if is_commit else ""


def _read_figures(summary: Fields, path: Path) -> dict[str, float]:
    correct, total = (summary.integer(name) for name in ("test_correct", "test_total"))
    if correct is not None and correct > (total or 0):
        raise InputError(f"{path}: test_correct must be at most test_total, got {correct} of {total}")
    figures = {name: summary.number(name) for name in FIGURES}
    return {name: value for name, value in figures.items() if value is not None}


def _evaluated_split(summary: Fields | None, settings: Fields) -> str:
    if summary is not None and "evaluation_split" in summary:
        return "validation" if summary.text("evaluation_split") == "validation" else "test"
    return "validation" if settings.setting("validation") else "test"


def _read_classes(path: Path, dataset: RecordedDataset, predictions: Predictions | None) -> tuple[str, ...]:
    model = Fields.read(path / "model.json")
    classes = (model.texts("classes") if model else ()) or dataset.classes
    if predictions is None:
        return classes
    num_classes = predictions.probabilities.shape[1]
    if classes and len(classes) != num_classes:
        raise InputError(
            f"{path}: predictions.npz has {num_classes} classes, but model.json or config.json has {len(classes)}: "
            "they belong to different runs; train again or remove predictions.npz"
        )
    return classes or tuple(f"class {label}" for label in range(num_classes))
