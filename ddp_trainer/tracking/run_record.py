"""Reads and checks the files of a run directory. What comes out of here fits together and may be drawn without care.

Not owned here: who writes these files (`outputs`, `rundir`, `tracking`).
"""

import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.errors import InputError
from data_prep.files import read_json

Record = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The evaluated images. Every label is a class; every probability is finite."""

    indices: np.ndarray  # (N,) int64, positions in the evaluated file
    labels: np.ndarray  # (N,) int64
    probabilities: np.ndarray  # (N, C) float
    wrong_indices: np.ndarray  # (K,) int64, most confident mistake first
    wrong_images: np.ndarray  # (K, H, W, 3) uint8

    @property
    def predicted(self) -> np.ndarray:
        return self.probabilities.argmax(axis=1)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory. An interrupted run lacks summary and predictions, perhaps epochs too."""

    path: Path
    name: str  # the folder's, for the reader
    config: Mapping[str, Any]
    metrics: tuple[Record, ...]  # by epoch, each once
    summary: Mapping[str, Any] | None
    classes: tuple[str, ...]
    predictions: Predictions | None
    status: Mapping[str, Any]

    @property
    def settings(self) -> Mapping[str, Any]:
        return mapping(self.config.get("settings"))

    @property
    def split(self) -> str:
        """Which images were evaluated: test or validation."""
        if self.summary is not None and "evaluation_split" in self.summary:
            return str(self.summary["evaluation_split"])
        return "validation" if self.settings.get("validation") else "test"

    @property
    def counts(self) -> tuple[int, int] | None:
        """(correct, evaluated) of the final model, else of the last finished epoch where it says so."""
        correct, total = self.number("test_correct"), self.number("test_total")
        if correct is not None and total is not None:
            return int(correct), int(total)
        if self.predictions is not None:
            labels = self.predictions.labels
            return int((self.predictions.predicted == labels).sum()), len(labels)
        last = self.metrics[-1] if self.metrics else {}
        if 0 <= last.get("test_correct", -1) <= last.get("test_total", -1):
            return int(last["test_correct"]), int(last["test_total"])
        return None

    @property
    def accuracy(self) -> float | None:
        """0 to 1."""
        if self.counts is not None and self.counts[1]:
            return self.counts[0] / self.counts[1]
        return self.metrics[-1].get("test_accuracy") if self.metrics else None

    def number(self, name: str) -> float | None:
        """A finite number of summary.json, else None."""
        value = (self.summary or {}).get(name)
        return float(value) if isinstance(value, int | float) and np.isfinite(value) else None

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, values) of the epochs whose record has this figure."""
        points = [(record["epoch"], record[name]) for record in self.metrics if name in record]
        table = np.array(points, dtype=float).reshape(-1, 2)
        return table[:, 0], table[:, 1]


def mapping(value: object) -> Mapping[str, Any]:
    """`value` where it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


class Mistake(NamedTuple):
    """One picture of the gallery: what it is and what it was taken for."""

    sample: int  # its position in the evaluated file
    true: str
    predicted: str
    probability: float
    pixels: np.ndarray  # (H, W, 3) uint8


def list_mistakes(run: Run) -> list[Mistake]:
    """The most confident ones, in the order of the run's wrong_images; none where there are no predictions."""
    found = run.predictions
    if found is None:
        return []
    rows = {int(index): row for row, index in enumerate(found.indices)}
    predicted = found.predicted
    mistakes = []
    for sample, pixels in zip(found.wrong_indices.tolist(), found.wrong_images, strict=True):
        row = rows[sample]
        true, taken_for = run.classes[found.labels[row]], run.classes[predicted[row]]
        mistakes.append(Mistake(sample, true, taken_for, float(found.probabilities[row].max()), pixels))
    return mistakes


def load_run(path: Path) -> Run:
    """Raises InputError, naming the file, where the folder is not a run directory or a file in it is unusable."""
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: name a run directory, such as runs/NAME")
    config = read_json(path / "config.json")
    if config is None:
        raise InputError(f"{path / 'config.json'} is missing: {path} is not a run directory")
    model, summary = read_json(path / "model.json"), read_json(path / "summary.json")
    predictions = read_predictions(path / "predictions.npz")
    classes = mapping(model).get("classes") or mapping(config.get("dataset")).get("classes") or []
    num_classes = predictions.probabilities.shape[1] if predictions else len(classes)
    if classes and len(classes) != num_classes:
        raise InputError(
            f"{path}: predictions.npz has {num_classes} classes, model.json {len(classes)}; "
            "they are of two runs: train again or remove predictions.npz"
        )
    counts = [(summary or {}).get(name, 0) for name in ("test_correct", "test_total")]
    if not (all(isinstance(count, int) for count in counts) and 0 <= counts[0] <= counts[1]):
        raise InputError(
            f"{path / 'summary.json'}: test_correct {counts[0]} of test_total {counts[1]} cannot be; "
            "train again or remove it"
        )
    return Run(
        path=path.resolve(),
        name=path.resolve().name,
        config=config,
        metrics=read_metrics(path / "metrics.jsonl"),
        summary=summary,
        classes=tuple(map(str, classes)) or tuple(f"class {i}" for i in range(num_classes)),
        predictions=predictions,
        status=read_json(path / "status.json") or {},
    )


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """`load_run` of each, once; folders of the same name get their parent's name before it."""
    runs = list({run.path: run for run in map(load_run, paths)}.values())
    names = Counter(run.name for run in runs)
    return [replace(run, name=f"{run.path.parent.name}/{run.name}") if names[run.name] > 1 else run for run in runs]


def read_metrics(path: Path) -> tuple[Record, ...]:
    """One record per epoch, in order. A last line that a crash cut off does not count."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    records: dict[float, Record] = {}
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            record = {str(name): float(value) for name, value in fields.items() if isinstance(value, int | float)}
            records[record["epoch"]] = record
        except (ValueError, AttributeError, KeyError):
            if number == len(lines):  # the file does not end in a newline
                break
            raise InputError(f"{path}, line {number}: not the JSON record of an epoch; remove the line") from None
    return tuple(records[epoch] for epoch in sorted(records))


def read_predictions(path: Path) -> Predictions | None:
    """None where there is no such file. Raises InputError for arrays that are missing, of wrong shape or range."""
    names = ("indices", "labels", "probabilities", "wrong_indices", "wrong_images")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = Predictions(**{name: arrays[name] for name in names})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); train again or remove it") from None
    wrong = _mistake(found)
    if wrong:
        raise InputError(f"{path}: {wrong}; train again or remove it")
    return found


def _mistake(found: Predictions) -> str | None:
    """What does not fit together, in words."""
    images, probabilities, labels = found.wrong_images, found.probabilities, found.labels
    if probabilities.ndim != 2 or 0 in probabilities.shape or labels.shape != probabilities.shape[:1]:
        return f"labels {labels.shape} and probabilities {probabilities.shape} do not fit"
    if found.indices.shape != labels.shape:
        return f"indices {found.indices.shape} and labels {labels.shape} do not fit"
    if not (np.issubdtype(labels.dtype, np.integer) and 0 <= labels.min() <= labels.max() < probabilities.shape[1]):
        return f"labels are not whole numbers from 0 to {probabilities.shape[1] - 1}"
    if not np.isfinite(probabilities).all():
        return "probabilities are not all finite"
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or len(images) != len(found.wrong_indices):
        return f"wrong_images {images.shape} {images.dtype} are not one RGB picture for each wrong index"
    if not np.isin(found.wrong_indices, found.indices).all():
        return "wrong_indices name images that were not evaluated"
    return None
