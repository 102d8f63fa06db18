"""`python -m ddp_trainer.predict RUN_DIR IMAGE...`: what a trained model sees in image files.

Owned here: which files are meant, and how the answers are printed. Not owned here: how a picture of any size and
mode becomes the network's input (`data_prep`), and the model.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

import numpy as np
import torch
import tyro

from data_prep.batch_ops import batch_normalize
from data_prep.errors import InputError
from data_prep.sources.picture import SUFFIXES, read_image, why_unreadable
from ddp_trainer.command_line import parse_flags, program_name
from ddp_trainer.models.custom_resnet import CustomResNet
from ddp_trainer.models.spec import ModelSpec, load_model


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Classify image files with the model of a completed run: path, class, probability, next best.

    Exit code 1 where an image could not be read: it is named on stderr, and all the others are answered.
    """

    run_dir: tyro.conf.Positional[Path]
    """Run directory with model.safetensors and model.json."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """PNG, JPEG, WebP, BMP, GIF, TIFF or PPM files of any size and mode; of a folder, every one in it and below."""
    json: bool = False
    """Print a JSON object per image instead of tab-separated text."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The most probable class of one image and, where the model knows several, the one after it."""

    path: Path
    name: str
    probability: float
    next_name: str | None
    next_probability: float | None

    def as_json(self) -> str:
        return json.dumps(
            {
                "path": str(self.path),
                "class": self.name,
                "probability": self.probability,
                "next_class": self.next_name,
                "next_probability": self.next_probability,
            }
        )

    def as_text(self) -> str:
        columns = [str(self.path), self.name, f"{self.probability:.2%}"]
        if self.next_name is not None:
            columns.append(f"next: {self.next_name} {self.next_probability:.2%}")
        return "\t".join(columns)


def list_images(path: Path) -> list[Path]:
    """`path` itself, or the images below the folder `path`, sorted; hidden files and folders are passed over."""
    if not path.is_dir():
        return [path]
    found = (below for below in path.rglob("*") if below.suffix.lower() in SUFFIXES and not below.is_dir())
    return sorted(below for below in found if not any(part[0] == "." for part in below.relative_to(path).parts))


def read_images(paths: Sequence[Path], size: int) -> tuple[list[Path], list[np.ndarray], list[str]]:
    """(readable paths, their (size, size, 3) pixels, one line for each of the other paths)."""
    good, pixels, problems = [], [], []
    for path in paths:
        try:
            pixels.append(read_image(path, size))
            good.append(path)
        except Exception as error:  # decoders raise nearly anything for damaged files
            problems.append(f"{path}: {why_unreadable(error)}")
    return good, pixels, problems


@torch.inference_mode()
def predict(model: CustomResNet, spec: ModelSpec, paths: Sequence[Path], pixels: np.ndarray) -> Iterator[Prediction]:
    """One answer for each image of `pixels`, (N, H, W, 3) uint8."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    logits = model(batch_normalize(images, spec.mean, spec.std, torch.float32))
    best = logits.double().softmax(dim=1).topk(min(2, len(spec.classes)))
    for path, values, classes in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True):
        names = [spec.classes[label] for label in classes]
        after = (names[1], values[1]) if len(names) > 1 else (None, None)
        yield Prediction(path=path, name=names[0], probability=values[0], next_name=after[0], next_probability=after[1])


def predict_files(config: PredictConfig) -> bool:
    """Prints an answer for each image, and on stderr what cannot be read. True where all could be.

    Raises InputError where the run has no usable model.
    """
    model, spec = load_model(config.run_dir)
    paths, complete = [], True
    for given in config.images:
        found = list_images(given)
        paths += found
        if not found:
            complete = False
            print(f"error: {given}: no image files in this folder", file=sys.stderr)
    for start in range(0, len(paths), spec.evaluation_batch):
        good, pixels, problems = read_images(paths[start : start + spec.evaluation_batch], spec.image_size)
        for problem in problems:
            complete = False
            print(f"error: {problem}", file=sys.stderr)
        if good:
            for answer in predict(model, spec, good, np.stack(pixels)):
                print(answer.as_json() if config.json else answer.as_text())
    return complete


def main(argv: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a file's name may be no text, and is printed as it is
    try:
        config = parse_flags(PredictConfig, argv, prog=program_name("ddp_trainer.predict"))
        if not config.images:
            raise InputError("no image given: name image files, or a folder of them, after the run directory")
        return 0 if predict_files(config) else 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
