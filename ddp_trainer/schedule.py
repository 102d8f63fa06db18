"""When a training does what: its steps, learning rate and size of crops, as pure functions of step and epoch."""

from dataclasses import dataclass

from data_prep.errors import require


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    epochs: int = 24
    """Passes over the training images."""
    batch_size: int = 512
    """Images in one optimizer step, over all processes together."""
    candidates: int = 1
    """Look at this many batches of images in each step, and train on one batch of the hardest; 1: on all images."""
    accumulate: int = 1
    """Split each process's share of the batch into this many forward and backward passes."""
    warmup_fraction: float = 5 / 24
    """Share of all steps in which the learning rate climbs to its peak."""
    initial_lr_fraction: float = 0.04
    """First learning rate, as a share of the peak."""
    final_lr_fraction: float = 0.0
    """Learning rate that the last step comes down to, as a share of the peak."""
    small_crop_fraction: float = 0.0
    """Share of the epochs, at the beginning, that train on crops: half of them of half the side, the others of
    three quarters."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; the schedule stays that of the full run."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"--epochs {self.epochs}: give at least 1")
        require(self.batch_size >= 1, f"--batch-size {self.batch_size}: give at least 1")
        require(self.candidates >= 1, f"--candidates {self.candidates}: give at least 1")
        require(self.accumulate >= 1, f"--accumulate {self.accumulate}: give at least 1")
        require(self.max_steps is None or self.max_steps >= 1, f"--max-steps {self.max_steps}: give at least 1")
        for name in ("warmup_fraction", "initial_lr_fraction", "final_lr_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"--{name.replace('_', '-')} {value}: give a number from 0 to 1")
        small = self.small_crop_fraction
        require(0 <= small < 1, f"--small-crop-fraction {small}: give 0 up to below 1")

    @property
    def candidates_per_step(self) -> int:
        """Images of an epoch's order that a step uses up."""
        return self.batch_size * self.candidates

    def steps_per_epoch(self, num_images: int) -> int:
        """Full batches only: the images that do not fill a last batch are others in each epoch."""
        return num_images // self.candidates_per_step

    def last_step(self, num_images: int) -> int:
        """Steps after which the run is complete."""
        total = self.steps_per_epoch(num_images) * self.epochs
        return min(total, self.max_steps or total)

    def one_cycle(self, step: int, *, steps_per_epoch: int) -> float:
        """Share of the peak learning rate at `step` (from 0): a linear climb, then a linear descent.

        Same curve as torch's OneCycleLR with anneal_strategy="linear" (Smith & Topin, arXiv 1708.07120). As a pure
        function it needs no state in a checkpoint, cannot run past its end and is the same at every world size.
        """
        start, end = self.initial_lr_fraction, self.final_lr_fraction
        total = steps_per_epoch * self.epochs
        last, peak = max(total - 1, 1), self.warmup_fraction * total - 1
        if step <= peak:
            return start + (1 - start) * step / peak if peak > 0 else 1.0
        peak = max(peak, 0.0)
        return 1 + (end - 1) * min((step - peak) / max(last - peak, 1e-9), 1.0)

    @property
    def small_crop_epochs(self) -> int:
        return int(self.small_crop_fraction * self.epochs + 1e-9)  # 0.58 * 50 is a little less than 29

    def crop_side(self, side: int, *, epoch: int) -> int:
        """Of images of `side` pixels, what the network sees in `epoch` (from 0).

        Progressive resizing, which small images want done by cropping (github.com/mosaicml/composer).
        """
        if epoch >= self.small_crop_epochs:
            return side
        return side // 2 if epoch < self.small_crop_epochs // 2 else side * 3 // 4

    def crop_sides(self, side: int) -> list[int]:
        """All that `crop_side` gives for images of `side` pixels, from small to large."""
        first_of_each = (0, self.small_crop_epochs // 2, self.small_crop_epochs)
        return sorted({self.crop_side(side, epoch=epoch) for epoch in first_of_each})
