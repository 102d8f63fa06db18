"""Compares the speed of our loaders on photographs with that of torchvision's ImageFolder.

    python -m benchmarks.photo_loading [--images N] [--batch-size N] [--rounds N] [--work DIR] [--result FILE]

jpeg, raw:   StreamLoader for a dataset prepared with `--size 256` and either `--encoding jpeg` (quality 90) or
             `--encoding raw`.
imagefolder: a DataLoader over ImageFolder with RandomResizedCrop, RandomHorizontalFlip and PILToTensor.

These loaders produce uint8 batches. For each of them, there is a second loader, NAME_augmented, which produces
normalized float32 images of 224x224 pixels. jpeg_augmented and raw_augmented use Augmenter with the settings of the
recipe `photos`; imagefolder_augmented uses ToTensor and Normalize instead of PILToTensor. All data come from the same
generated JPEG files, of 500x375 pixels and quality 90. Each loader has one worker (ours: one thread) per core.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.arguments import argument_parser
from benchmarks.photographs import Photographs
from benchmarks.results import write_result
from benchmarks.rounds import WORKERS, Epoch, OurEpochs, compare, torchvision_epochs
from benchmarks.scaling.images import Shape, write_images
from data_prep.augment import Augmenter
from data_prep.dataset import write_dataset
from data_prep.encoding import RAW, Encoding
from data_prep.loader import StreamLoader
from data_prep.sources.folder import FolderImages
from ddp_trainer.command_line import run_command
from ddp_trainer.distributed.hardware import resolve_device
from ddp_trainer.recipes import photos

STORED_SIDE, TRAIN_SIDE = 256, 224
ENCODINGS = {"jpeg": Encoding("jpeg", 90), "raw": RAW}
BESIDE = {  # each of our loaders -> the loader that it is compared with
    "jpeg": "imagefolder",
    "raw": "imagefolder",
    "jpeg_augmented": "imagefolder_augmented",
    "raw_augmented": "imagefolder_augmented",
}


class Setup(NamedTuple):
    """What all loaders have in common."""

    root: Path  # has the photographs in train/CLASS and test/CLASS
    batch_size: int
    device: torch.device


def our_loaders(setup: Setup, work: Path) -> dict[str, Epoch]:
    """Our loader for each encoding, with and without augmentation. Prepares the datasets in `work`."""
    loaders: dict[str, Epoch] = {}
    for name, encoding in ENCODINGS.items():
        info = write_dataset(FolderImages(setup.root, size=STORED_SIDE), work / name, encoding=encoding)
        split = info.splits["train"]
        beton, samples = work / name / split.file, np.arange(split.count)
        loader = StreamLoader(beton, device=setup.device, batch_size=setup.batch_size, num_workers=WORKERS)
        augmenter = Augmenter(photos().augment, mean=info.mean, std=info.std, seed=0)
        loaders[name] = OurEpochs(loader, samples)
        loaders[f"{name}_augmented"] = OurEpochs(loader, samples, augmenter, TRAIN_SIDE)
    return loaders


def their_loaders(setup: Setup) -> dict[str, Epoch]:
    """torchvision's loader, for uint8 images and for normalized float32 images."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    config = photos().augment
    crop = transforms.RandomResizedCrop(TRAIN_SIDE, scale=config.crop_scale, ratio=config.crop_ratio)
    flip, normalize = transforms.RandomHorizontalFlip(), transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

    def epochs(*to_tensor: Any) -> Epoch:
        images = ImageFolder(str(setup.root / "train"), transforms.Compose([crop, flip, *to_tensor]))
        return torchvision_epochs(images, batch_size=setup.batch_size, device=setup.device)

    return {
        "imagefolder": epochs(transforms.PILToTensor()),
        "imagefolder_augmented": epochs(transforms.ToTensor(), normalize),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=2000, help="photographs per epoch; each needs 0.3 MB on disk")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for the data; default: the system's temporary folder")
    parser.add_argument("--result", type=Path, help="write the figures here as JSON")
    options = parser.parse_args(argv)

    device = torch.device(resolve_device(photos().runtime))
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        setup = Setup(Path(work, "photos"), options.batch_size, device)
        write_images(setup.root, Shape(options.images, classes=10, side=STORED_SIDE), Photographs())
        sizes = [path.stat().st_size for path in setup.root.glob("train/*/*")]
        loaders = our_loaders(setup, Path(work)) | their_loaders(setup)
        figures = compare(loaders, BESIDE, rounds=options.rounds, device=device)
    if options.result:
        write_result(
            options.result,
            figures,
            batch_size=options.batch_size,
            rounds=options.rounds,
            images=len(sizes),
            kilobytes_per_photograph=round(sum(sizes) / len(sizes) / 1000, 1),
            device=device.type,
            workers=WORKERS,
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
