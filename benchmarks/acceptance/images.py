"""Prepares the dataset for `benchmarks.acceptance`, unless it exists already.

    python -m benchmarks.acceptance.images --out DIR [--images PATH] [--train-count N] [--test-count N]

The images come from --images (a folder with train/CLASS and test/CLASS, or a tar archive of such a folder). Without
--images, they come from CIFAR-10's archive in data/raw. If there is no such archive, synthetic images are generated
(default: as many as CIFAR-10 has). Nothing is downloaded.
"""

import argparse
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.arguments import argument_parser
from data_prep.errors import require
from ddp_trainer.command_line import run_command

CIFAR10_ARCHIVE = Path("data/raw/cifar-10-python.tar.gz")


def unpacked(images: Path, into: Path) -> Path:
    """The folder with train/ and test/. If `images` is an archive, it is unpacked into `into`.

    Raises InputError if there is no train/.
    """
    folder = images
    if images.is_file():
        with tarfile.open(images) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later have it
            archive.extractall(into)
        folder = next((path.parent for path in (*into.glob("train"), *into.glob("*/train"))), into)
    require((folder / "train").is_dir(), f"--images {images} has no train folder")
    return folder


def source_flags(options: argparse.Namespace) -> list[str | Path]:
    if options.images is not None:
        return ["--source", "folder", "--root", unpacked(options.images, options.out.with_name("images"))]
    if CIFAR10_ARCHIVE.exists():
        return ["--source", "cifar10", "--root", CIFAR10_ARCHIVE.parent]
    counts = ["--train-count", str(options.train_count), "--test-count", str(options.test_count)]
    return ["--source", "synthetic", *counts]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--train-count", type=int, default=50_000)
    parser.add_argument("--test-count", type=int, default=10_000)
    options = parser.parse_args(argv)
    if (options.out / "dataset.json").exists():
        print(f"{options.out} has been prepared already")
        return 0
    command = [sys.executable, "-m", "data_prep", *source_flags(options), "--out", options.out]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(run_command(main))
