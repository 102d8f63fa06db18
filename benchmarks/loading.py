"""Compares the speed of our loaders and augmentation with that of a DataLoader and torchvision's transforms.

    python -m benchmarks.loading [--data-dir DIR] [--batch-size N] [--images N] [--rounds N] [--result FILE]

stream:      StreamLoader and Augmenter with the settings of `baseline`. FFCV reads each batch from the file.
resident:    ResidentLoader and Augmenter with the settings of `baseline`. All images are in memory.
torchvision: a DataLoader over an in-memory dataset of PIL images, like torchvision's CIFAR10, with RandomCrop,
             RandomHorizontalFlip, ToTensor, Normalize and RandomErasing as an 8x8 cutout, and one worker per core.

All three produce normalized float32 batches of the same images. They take turns for several rounds. The results are
images/s and ratios of images/s, each as the median over rounds. The first round, in which the workers start, does not
count.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.results import write_result
from data_prep.augment import Augmenter
from data_prep.dataset import DatasetInfo, read_dataset
from data_prep.loader import ResidentLoader, StreamLoader, build_loader
from data_prep.order import epoch_order, train_batches
from ddp_trainer.distributed.hardware import resolve_device
from ddp_trainer.recipes import baseline


class PilImages(Dataset):
    """A dataset of (image, label) from arrays in memory, with torchvision's transforms."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, info: DatasetInfo) -> None:
        from torchvision import transforms

        config = baseline().augment
        share = (config.cutout / info.image_size) ** 2
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(info.image_size, padding=config.crop_padding, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(info.mean, info.std),
                transforms.RandomErasing(p=1.0, scale=(share, share), ratio=(1.0, 1.0), value=0),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        image = self.transform(Image.fromarray(self.images[position]))
        assert isinstance(image, torch.Tensor)
        return image, int(self.labels[position])


class OurEpochs:
    """Produces one epoch of augmented batches per call, in the trainer's global order."""

    def __init__(self, loader: StreamLoader | ResidentLoader, augmenter: Augmenter, samples: np.ndarray) -> None:
        self.loader, self.augmenter, self.samples, self.epoch = loader, augmenter, samples, 0

    def __call__(self, batch_size: int) -> Iterable[torch.Tensor]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        order = epoch_order(self.samples, seed=0, epoch=epoch)
        for batch in self.loader.batches(train_batches(order, batch_size=batch_size, rank=0, world_size=1)):
            yield self.augmenter(batch, epoch=epoch).images


def rate(batches: Iterable[torch.Tensor], device: torch.device) -> float:
    """Returns images/s, measured from the request for the first batch until the last batch is on the device."""
    start, count = time.perf_counter(), 0
    for images in batches:
        count += len(images.to(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/synthetic"))
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--images", type=int, default=20_000, help="images per epoch; at most the whole dataset")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--result", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()

    info = read_dataset(options.data_dir)
    beton = options.data_dir / info.splits["train"].file
    device = torch.device(resolve_device(baseline().runtime))
    samples = np.arange(min(options.images, info.splits["train"].count))
    augmenter = Augmenter(baseline().augment, mean=info.mean, std=info.std, seed=0)
    stream = StreamLoader(beton, device=device, batch_size=options.batch_size, num_workers=1)
    resident = build_loader(beton, mode="resident", device=device, batch_size=options.batch_size, num_workers=1)
    everything = next(iter(resident.batches([samples])))
    images = everything.images.permute(0, 2, 3, 1).cpu().numpy()
    theirs = DataLoader(
        PilImages(images, everything.labels.cpu().numpy(), info),
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=len(os.sched_getaffinity(0)),
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    ours = {"stream": OurEpochs(stream, augmenter, samples), "resident": OurEpochs(resident, augmenter, samples)}

    rounds: list[dict[str, float]] = []
    for number in range(options.rounds + 1):
        rates = {name: rate(epochs(options.batch_size), device) for name, epochs in ours.items()}
        rates["torchvision"] = rate((batch for batch, _ in theirs), device)
        if number:  # round 0 is the warm-up
            rounds.append(rates)
            print(f"round {number}: " + "  ".join(f"{name} {value:9.0f}" for name, value in rates.items()), flush=True)
    figures = {f"{name}_images_per_second": statistics.median(r[name] for r in rounds) for name in rounds[0]}
    for name in ours:
        figures[f"{name}_beside_torchvision"] = statistics.median(r[name] / r["torchvision"] for r in rounds)
    for name, value in figures.items():
        print(f"{name:32} {value:12.2f}")
    if options.result:
        write_result(
            options.result,
            figures,
            batch_size=options.batch_size,
            rounds=len(rounds),
            images=len(samples),
            device=device.type,
            torchvision_workers=theirs.num_workers,
        )


if __name__ == "__main__":
    main()
