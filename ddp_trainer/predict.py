"""Predict: `python -m ddp_trainer.predict RUN_DIR IMAGE...` classifies image files with the model of a finished run.

This module finds the files and prints the predictions. `data_prep` decodes and resizes the images, and `models` loads
the network.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import nn

from data_prep.batch_ops import batch_normalize, center_crop
from data_prep.errors import InputError, printable, require, shell_path, warn
from data_prep.machine_limits import due_to_machine
from data_prep.sources.decoder_messages import DecoderMessages, collected_messages
from data_prep.sources.folder import dark_note
from data_prep.sources.listing import MAX_DEPTH, Visited, looks_like_image
from data_prep.sources.picture import Picture, read_picture, require_valid_limit, why_unreadable
from ddp_trainer.command_line import parse_flags, program_name, require_output, run_command
from ddp_trainer.models.spec import ModelSpec, load_model


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Classify image files with the model of a finished run. For each image, print its path, the most probable class,
    the second most probable class, and the probabilities of both.

    Files that cannot be read are reported on stderr, and the exit status is then 1. All other files are classified.
    """

    run_dir: tyro.conf.Positional[Path]
    """Run directory with model.safetensors and model.json."""
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE ...")]
    """PNG, JPEG, WebP, BMP, GIF, TIFF or PPM files, or folders that contain them. Subfolders are searched too; hidden
    files and folders are left out."""
    json: bool = False
    """Print one JSON object per image instead of tab-separated text."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The most probable class of an image and, if the model has more than one class, the second most probable."""

    path: Path
    class_name: str
    probability: float
    next_class: str | None
    next_probability: float | None

    def as_json(self) -> str:
        return json.dumps(
            {
                "path": str(self.path),
                "class": self.class_name,
                "probability": self.probability,
                "next_class": self.next_class,
                "next_probability": self.next_probability,
            }
        )

    def as_text(self) -> str:
        """One line of tab-separated columns. Tabs and line breaks in names are escaped."""
        columns = [printable(str(self.path)), printable(self.class_name), f"{self.probability:.2%}"]
        if self.next_class is not None:
            columns.append(f"next: {printable(self.next_class)} {self.next_probability:.2%}")
        return "\t".join(columns)


def list_files(path: Path, problems: list[str], visited: Visited, depth: int = 0) -> Iterator[Path]:
    """Yields `path` itself if it is not a folder, otherwise the files in it and in its subfolders.

    The entries of each folder are sorted by name. Hidden files and folders are left out. Follows links to folders,
    but skips a folder that it has already visited. Adds a line to `problems` for each folder that cannot be read or is
    nested too deeply.
    """
    if not os.path.isdir(path):
        yield path
        return
    try:
        names, status = sorted(os.listdir(path)), path.stat()
    except OSError as error:
        problems.append(f"{shell_path(path)}: {error.strerror}")
        return
    if visited.setdefault((status.st_dev, status.st_ino), path) != path:
        return
    if depth >= MAX_DEPTH:
        problems.append(
            f"{shell_path(path)}: nested more than {MAX_DEPTH} folders deep; move its images to a higher one"
        )
    else:
        for name in names:
            if not name.startswith("."):
                yield from list_files(path / name, problems, visited, depth + 1)


def find_images(given: Path) -> tuple[list[Path], list[str]]:
    """Returns the files to classify for the path `given`, and a line for each problem.

    A folder gives all images in it and in its subfolders. A broken link counts as an image, so that `read_images`
    reports it. Any other path is returned unchanged, even if it does not exist or is not an image.
    """
    if not os.path.isdir(given):
        return [given], []
    problems: list[str] = []
    files = list_files(given, problems, visited={})
    images = [path for path in files if looks_like_image(path) or not os.path.exists(path)]
    if not images and not problems:
        problems.append(f"{shell_path(given)}: no image files in this folder")
    return images, problems


def read_images(paths: Sequence[Path], size: int) -> tuple[list[Path], list[Picture], list[str]]:
    """The readable paths, their pictures of `size` x `size` pixels, and a line for each unreadable path."""
    readable, pictures, problems = [], [], []
    for path in paths:
        try:
            pictures.append(read_picture(path, size))
            readable.append(path)
        except Exception as error:  # decoders raise many types of exceptions for damaged files
            if due_to_machine(error):
                raise  # for example, too little memory; the file may be fine
            problems.append(f"{shell_path(path)}: {why_unreadable(error)}")
    return readable, pictures, problems


@torch.inference_mode()
def predict(model: nn.Module, spec: ModelSpec, paths: Sequence[Path], pixels: np.ndarray) -> Iterator[Prediction]:
    """Yields a prediction for the center crop of each image.

    `pixels`: (N, H, W, 3) uint8 RGB; `paths`: the files of these N images. Raises InputError if a logit is not finite.
    """
    images = center_crop(torch.from_numpy(pixels).permute(0, 3, 1, 2), spec.input_size)
    # Contiguous NCHW, because not every network accepts channels_last.
    normalized = batch_normalize(images, spec.mean, spec.std, torch.float32).contiguous()
    logits = model(normalized).double() / spec.temperature
    require(bool(logits.isfinite().all()), "the model gives values that are not finite; train a new model")
    best = logits.softmax(dim=1).topk(min(2, len(spec.classes)))
    for path, values, labels in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True):
        names = [spec.classes[label] for label in labels]
        next_class, next_probability = (names[1], values[1]) if len(names) > 1 else (None, None)
        yield Prediction(
            path=path,
            class_name=names[0],
            probability=values[0],
            next_class=next_class,
            next_probability=next_probability,
        )


def predict_files(config: PredictConfig) -> int:
    """Prints a line for each image, a line on stderr for each path that cannot be used, and warnings on stderr.

    Returns the exit status: 1 if a path cannot be used, else 0. Raises InputError if the run has no usable model, if a
    logit is not finite, or if the limit on the number of pixels is invalid. Raises ExplainedError if stdout could not
    be written.
    """
    require_valid_limit()
    model, spec = load_model(config.run_dir)
    found = [find_images(given) for given in config.images]
    paths = [path for images, _ in found for path in images]
    problems = [problem for _, problems in found for problem in problems]
    report_problems(problems)
    messages = DecoderMessages()
    brightest = -1  # the largest value of all 16-bit images; -1 if there are none
    for start in range(0, len(paths), spec.evaluation_batch):
        with collected_messages(messages):
            readable, pictures, unreadable = read_images(paths[start : start + spec.evaluation_batch], spec.image_size)
        report_problems(unreadable)
        problems += unreadable
        if readable:
            brightest = max(brightest, *(picture.brightest for picture in pictures))
            for prediction in predict(model, spec, readable, np.stack([picture.pixels for picture in pictures])):
                print(prediction.as_json() if config.json else prediction.as_text())
    for note in filter(None, (messages.note(), dark_note(brightest))):
        warn(note)
    require_output()
    return 1 if problems else 0


def report_problems(problems: Sequence[str]) -> None:
    for problem in problems:
        print(f"error: {printable(problem)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if every image was classified, 2 for wrong input.

    It is 1 if a path cannot be used, if the output cannot be written, or if there is not enough memory.
    """

    def work() -> int:
        words = sys.argv[1:] if argv is None else argv
        require("" not in words, "a path is empty; name the run directory, and image files or folders")
        config = parse_flags(PredictConfig, words, prog=program_name("ddp_trainer.predict"))
        if not config.images:
            raise InputError("no image given; after the run directory, add image files or folders")
        return predict_files(config)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
