"""The schedule of a run: its length, learning rates, crop sizes and late freezing, as pure functions of the step."""

import itertools
import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from data_prep.errors import InputError, require

MAX_EPOCHS = 1_000_000
INITIAL_LR_FRACTION = 0.04  # first learning rate of a warm-up, as a share of the peak; 1/25 is OneCycleLR's default


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    epochs: float = 24
    """Passes over the training images. With a fraction such as 6.5, the last pass ends early."""
    batch_size: int = 512
    """Images per optimizer step, over all processes together."""
    accumulate: int | Literal["auto"] = 1
    """Split each process's share of the batch into this many forward and backward passes, to save memory. auto: the
    fewest passes that fit into memory on every process."""
    warmup_fraction: float = 5 / 24
    """Share of all steps, at the start of the run, in which the learning rate rises to its peak."""
    final_lr_fraction: float = 0.0
    """Learning rate of the last step, as a share of the peak."""
    train_size: int | None = None
    """Side of the training crops in pixels. Evaluation uses a center crop of the same size. Default: the side of the
    images."""
    small_crops: str = ""
    """Train on small crops first, given as SIDE:SHARE,... For example, 16:0.3,24:0.7 means crops of 16 pixels a side
    until 0.3 of all steps are done, then crops of 24 pixels until 0.7, and crops of the full size after that."""
    freeze_late: str = ""
    """Parameters to freeze before the end of the run, as comma-separated patterns of their names, such as features.0.*.
    No gradients are computed for frozen parameters."""
    freeze_late_between: tuple[float, float] = (0.6, 0.8)
    """Two points in the run, as shares of all steps. From the first to the second, the learning rates of the parameters
    of --freeze-late are multiplied by a factor that falls linearly from 1 to 0. At the second, they are frozen."""
    max_steps: int | None = None
    """Stop after this many optimizer steps. Everything else still follows the schedule of the full run."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "train_size", "max_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}")
        require(
            0 < self.epochs <= MAX_EPOCHS, f"--epochs must be above 0 and at most {MAX_EPOCHS}, got {self.epochs:g}"
        )
        accumulate = self.accumulate
        require(accumulate == "auto" or accumulate >= 1, f"--accumulate must be auto or at least 1, got {accumulate}")
        for name in ("warmup_fraction", "final_lr_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"--{name.replace('_', '-')} must be in [0, 1], got {value}")
        self.crop_phases  # noqa: B018 - raises InputError if --small-crops cannot be read
        start, end = self.freeze_late_between
        require(
            0 <= start <= end < 1,
            f"--freeze-late-between must be two shares in [0, 1) in ascending order, got {start} {end}",
        )

    @property
    def frozen_late(self) -> tuple[str, ...]:
        return split_names(self.freeze_late)

    @property
    def passes(self) -> int:
        """Number of forward and backward passes of each process in a step. Unknown until `auto` is resolved."""
        assert self.accumulate != "auto", "resolve_passes has not been called"
        return self.accumulate

    def steps_per_epoch(self, num_images: int) -> int:
        """Number of full batches in an epoch. Leftover images are not used; they are different ones in each epoch."""
        return num_images // self.batch_size

    def total_steps(self, num_images: int) -> int:
        """Number of steps of the full run, which --max-steps may end early. At least 1 if there is a full batch."""
        return max(round(self.steps_per_epoch(num_images) * self.epochs), min(self.steps_per_epoch(num_images), 1))

    def last_step(self, num_images: int) -> int:
        """Number of steps after which the run is finished."""
        total = self.total_steps(num_images)
        return min(total, self.max_steps or total)

    def one_cycle(self, step: int, *, total_steps: int) -> float:
        """Learning rate at `step` (0-based), as a share of the peak.

        Linear warm-up, then linear decay; identical to torch's OneCycleLR with anneal_strategy="linear" (Smith &
        Topin, arXiv 1708.07120). As a pure function, it needs no state in a checkpoint, is defined for any step, and is
        the same at every world size.
        """
        start, end = INITIAL_LR_FRACTION, self.final_lr_fraction
        last, peak = max(total_steps - 1, 1), self.warmup_fraction * total_steps - 1
        if step <= peak:
            return start + (1 - start) * step / peak if peak > 0 else 1.0
        peak = max(peak, 0.0)
        return 1 + (end - 1) * min((step - peak) / max(last - peak, 1e-9), 1.0)

    def late_lr_factor(self, step: int, *, total_steps: int) -> float:
        """Factor at `step` (0-based) for the learning rates of the --freeze-late parameters: 1, then falling to 0.

        The method is from github.com/josephdviviano/iterate-hackathon-2026 (findings F-048 and F-049).
        """
        start, end = (share * total_steps for share in self.freeze_late_between)
        return 1.0 if step < start else max(end - step, 0.0) / max(end - start, 1e-9)

    def freeze_step(self, total_steps: int) -> float:
        """The first step (0-based) in which the parameters of --freeze-late are frozen; infinity if there are none."""
        return math.ceil(self.freeze_late_between[1] * total_steps) if self.frozen_late else math.inf

    def crop_side(self, side: int, *, step: int, total_steps: int) -> int:
        """Side in pixels of the training crops at `step` (0-based); `side`: the side of the images.

        This is progressive resizing, as in github.com/mosaicml/composer. With --crop random-resized, a small crop shows
        the same area as a large one, at a lower resolution. With --crop padded, a small crop shows a smaller part of
        the image at full resolution.
        """
        small = (own for own, until in self.crop_phases if step < round(until * total_steps))
        return next(small, self.train_size or side)

    def crop_sides(self, side: int) -> list[int]:
        """All values that `crop_side` can return, in ascending order."""
        return [*(own for own, _ in self.crop_phases), self.train_size or side]

    def work_left(self, side: int, *, step: int, last_step: int, total_steps: int) -> int:
        """The work after the first `step` steps, up to `last_step`, for estimates of the remaining time.

        The work of a step is the area of its crops in pixels. `side`: the side of the images.
        """
        work, done = 0, step
        ends = [*(round(until * total_steps) for _, until in self.crop_phases), total_steps]
        for own, end in zip(self.crop_sides(side), ends, strict=True):
            until = max(min(end, last_step), done)
            work, done = work + own**2 * (until - done), until
        return work

    @cached_property
    def crop_phases(self) -> tuple[tuple[int, float], ...]:
        """The entries of --small-crops as (side, share of all steps at which the next size begins)."""
        form = f"--small-crops must be SIDE:SHARE,... such as 16:0.3,24:0.7, got {self.small_crops}"
        phases = []
        for entry in self.small_crops.split(",") if self.small_crops else ():
            match = re.fullmatch(r"\s*([0-9]{1,6})\s*:\s*(0?\.[0-9]+)\s*", entry)
            if match is None:
                raise InputError(form)
            phases.append((int(match[1]), float(match[2])))
        for what, values in (("sides", [side for side, _ in phases]), ("shares", [share for _, share in phases])):
            rising = all(one < other for one, other in itertools.pairwise([0, *values]))
            require(rising, f"--small-crops: the {what} must be above 0 and increasing, got {self.small_crops}")
        return tuple(phases)


def split_names(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list, without surrounding whitespace and without empty names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
