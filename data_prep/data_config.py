"""Settings of the data of a run: which images are read, how they are read, and which are evaluated."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.errors import require, require_printable


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    data_dir: Path = Path("data/cifar10")
    """Folder that data_prep wrote."""
    validation: int = 0
    """Hold out this many training images (stratified, fixed by the seed) and evaluate on them instead of the test
    split. Use this flag when you compare settings."""
    calibrate: int = 0
    """Hold out this many training images besides those of --validation (stratified, fixed by the seed) and fit a
    temperature on them when the run ends, so that the model's probabilities say how often it is right."""
    balance: Literal["none", "batches", "weights"] = "none"
    """For classes of unequal size. batches: draw images of each class equally often, so those of small classes are
    repeated in an epoch; weights: weight the loss of an image by the inverse of its class's size (mean weight: 1)."""
    data_mode: Literal["auto", "stream", "resident"] = "auto"
    """stream: read every epoch from the file; resident: keep all images in device memory; auto: resident if they are
    small compared with that memory. All three give the same batches."""
    verify: Literal["auto", "full"] = "auto"
    """full: compare train.beton and test.beton with their sha256 before the first step; auto: do so only for files of
    up to 0.5 GB. With either, each image is compared with its own checksum when it is read."""
    num_workers: int = 1
    """Data-loading threads of each process."""

    def __post_init__(self) -> None:
        require_printable("data-dir", self.data_dir)
        require(self.validation >= 0, f"--validation must be at least 0, got {self.validation}")
        require(self.calibrate >= 0, f"--calibrate must be at least 0, got {self.calibrate}")
        require(self.num_workers >= 1, f"--num-workers must be at least 1, got {self.num_workers}")

    @property
    def held_out(self) -> int:
        """Number of training images that the run does not train on."""
        return self.validation + self.calibrate

    @property
    def evaluation_split(self) -> Literal["validation", "test"]:
        """Name of the split that is evaluated."""
        return "validation" if self.validation else "test"
