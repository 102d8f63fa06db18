"""The schedule of a run: number of steps, learning rate and crop size, as pure functions of step and epoch."""

from dataclasses import dataclass
from typing import Literal

from data_prep.errors import require

INITIAL_LR_FRACTION = 0.04  # first learning rate of a warm-up, as a share of the peak; 1/25 is OneCycleLR's default


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    epochs: int = 24
    """Passes over the training images."""
    batch_size: int = 512
    """Images per optimizer step, over all processes together."""
    accumulate: int | Literal["auto"] = 1
    """Split each process's share of the batch into this many forward and backward passes, to save memory. auto: the
    fewest passes that fit into memory on every process."""
    warmup_fraction: float = 5 / 24
    """Share of all steps, from the first one, in which the learning rate rises to its peak."""
    final_lr_fraction: float = 0.0
    """Learning rate of the last step, as a share of the peak."""
    train_size: int | None = None
    """Side of the training crops in pixels. Evaluation uses a center crop of the same size. Default: the side of the
    images."""
    small_crop_fraction: float = 0.0
    """Share of the epochs, from the first one, that train on small crops. In the first half of these epochs, the side
    of the crops is half the full side; in the second half, it is three quarters of the full side."""
    max_steps: int | None = None
    """Stop after this many optimizer steps. Learning rate and crop size still follow the schedule of the full run."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "train_size", "max_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}")
        accumulate = self.accumulate
        require(accumulate == "auto" or accumulate >= 1, f"--accumulate must be auto or at least 1, got {accumulate}")
        for name in ("warmup_fraction", "final_lr_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"--{name.replace('_', '-')} must be in [0, 1], got {value}")
        small = self.small_crop_fraction
        require(0 <= small < 1, f"--small-crop-fraction must be in [0, 1), got {small}")

    @property
    def passes(self) -> int:
        """Forward and backward passes of a process in a step. Only known once `auto` is replaced by a number."""
        assert self.accumulate != "auto", "resolve_passes has not been called"
        return self.accumulate

    def steps_per_epoch(self, num_images: int) -> int:
        """Number of full batches in an epoch. Leftover images are not used; they are different ones in each epoch."""
        return num_images // self.batch_size

    def last_step(self, num_images: int) -> int:
        """Number of steps after which the run is finished."""
        total = self.steps_per_epoch(num_images) * self.epochs
        return min(total, self.max_steps or total)

    def one_cycle(self, step: int, *, steps_per_epoch: int) -> float:
        """Learning rate at `step` (0-based), as a share of the peak.

        Linear warm-up, then linear decay; identical to torch's OneCycleLR with anneal_strategy="linear" (Smith &
        Topin, arXiv 1708.07120). As a pure function, it needs no state in a checkpoint, is defined for any step, and is
        the same at every world size.
        """
        start, end = INITIAL_LR_FRACTION, self.final_lr_fraction
        total = steps_per_epoch * self.epochs
        last, peak = max(total - 1, 1), self.warmup_fraction * total - 1
        if step <= peak:
            return start + (1 - start) * step / peak if peak > 0 else 1.0
        peak = max(peak, 0.0)
        return 1 + (end - 1) * min((step - peak) / max(last - peak, 1e-9), 1.0)

    @property
    def small_crop_epochs(self) -> int:
        return int(self.small_crop_fraction * self.epochs + 1e-9)  # 1e-9, because 0.58 * 50 is slightly less than 29

    def crop_side(self, side: int, *, epoch: int) -> int:
        """Side in pixels of the training crops in `epoch` (0-based); `side`: the side of the images.

        Progressive resizing, after github.com/mosaicml/composer. With --crop random-resized, a small crop shows the
        same area as a large one, at a lower resolution. With --crop padded, which is for small images, it shows a
        smaller part of the image at full resolution.
        """
        side = self.train_size or side
        if epoch >= self.small_crop_epochs:
            return side
        return side // 2 if epoch < self.small_crop_epochs // 2 else side * 3 // 4

    def crop_sides(self, side: int) -> list[int]:
        """All values of `crop_side` over the epochs of the run, in ascending order."""
        first_of_each = (0, self.small_crop_epochs // 2, self.small_crop_epochs)
        return sorted({self.crop_side(side, epoch=epoch) for epoch in first_of_each})
