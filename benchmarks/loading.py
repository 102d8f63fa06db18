"""Compares the speed of our loaders and augmentation with that of a DataLoader and torchvision's transforms.

    python -m benchmarks.loading [--data-dir DIR] [--batch-size N] [--images N] [--rounds N] [--result FILE]

stream:      StreamLoader and Augmenter with the settings of `baseline`. Each batch is read from the file.
resident:    ResidentLoader and Augmenter with the settings of `baseline`. All images are in device memory.
torchvision: a DataLoader over images that are arrays in memory. Like torchvision's CIFAR10, it converts each image to
             PIL when the image is read. The transforms are RandomCrop, RandomHorizontalFlip, ToTensor, Normalize and
             RandomErasing (an 8x8 cutout).

torchvision has one worker process per core. stream has one thread that reads, and resident reads the file only once,
before the measurement; both augment whole batches in the main process, with torch's threads.

All three produce normalized float32 batches of the same images. After a warm-up round, in which the workers start, they
take turns for --rounds rounds. The results are the images/s of each loader, and the ratios of ours to torchvision's, as
medians over the rounds after the warm-up.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from benchmarks.arguments import argument_parser
from benchmarks.results import write_result
from benchmarks.rounds import WORKERS, OurEpochs, compare, torchvision_epochs
from data_prep.augment import Augmenter
from data_prep.dataset import DatasetInfo, read_dataset
from data_prep.loader import StreamLoader, build_loader
from ddp_trainer.command_line import run_command
from ddp_trainer.distributed.hardware import resolve_device
from ddp_trainer.recipes import baseline


class PilImages(Dataset):
    """A dataset of (image, label). Converts arrays to PIL images, which torchvision's transforms turn into tensors."""

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


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data/synthetic"), help="folder of the prepared dataset")
    parser.add_argument("--batch-size", type=int, default=512, help="images per batch; default: 512")
    parser.add_argument(
        "--images", type=int, default=20_000, help="images per epoch, at most all training images; default: 20000"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up round; default: 5")
    parser.add_argument("--result", type=Path, help="write the figures to this JSON file")
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
    theirs = PilImages(images, everything.labels.cpu().numpy(), info)
    loaders = {
        "stream": OurEpochs(stream, samples, augmenter),
        "resident": OurEpochs(resident, samples, augmenter),
        "torchvision": torchvision_epochs(theirs, batch_size=options.batch_size, device=device),
    }
    compared_with = {"stream": "torchvision", "resident": "torchvision"}
    figures = compare(loaders, compared_with, rounds=options.rounds, device=device)
    if options.result:
        write_result(
            options.result,
            figures,
            batch_size=options.batch_size,
            rounds=options.rounds,
            images=len(samples),
            device=device.type,
            torchvision_workers=WORKERS,
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
