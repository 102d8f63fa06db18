"""Decides which images a run trains on, in which order, and which images it evaluates."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.augment import Augmenter
from data_prep.beton import read_labels
from data_prep.dataset import DatasetInfo
from data_prep.loader import Batch, ResidentLoader, StreamLoader, build_loader
from data_prep.order import Order, balanced_order, class_weights, epoch_order, hold_out, share, train_batches
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.evaluation import Evaluator
from ddp_trainer.models.spec import ModelSpec

STEPS_PER_DRAW = 64  # random bits take 96 bytes per image, so 3 MB for 64 batches of 512 images


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a run: its loader, its augmentation, and the images for training and evaluation."""

    config: TrainConfig
    runtime: Runtime
    loader: StreamLoader | ResidentLoader
    samples: np.ndarray  # (N,) positions of the training images in the beton file; held-out images are excluded
    augmenter: Augmenter
    evaluator: Evaluator
    labels: np.ndarray | None = None  # (N,) classes of `samples`, only with --balance batches
    class_weights: Tensor | None = None  # (C,) float32 on the device, only with --balance weights
    missing_classes: tuple[str, ...] = ()  # classes of which --validation holds out no image
    # Evaluates the images that --calibrate holds out. Its batches are as large as the training batches of this rank, so
    # the number of batches may differ between ranks.
    calibrator: Evaluator | None = None

    @property
    def spec(self) -> ModelSpec:
        return self.evaluator.spec

    def plan(self, epoch: int) -> Order:
        """This rank's images in `epoch`, in arrays of shape (steps, images per step of this rank)."""
        config, rank, world_size = self.config, self.runtime.rank, self.runtime.world_size
        size, seed, pairs = config.schedule.batch_size, config.runtime.seed, config.augment.mixes_pairs

        def own(order: np.ndarray) -> np.ndarray:
            return train_batches(order, batch_size=size, rank=rank, world_size=world_size, pairs=pairs)

        if self.labels is None:
            return Order(own(epoch_order(self.samples, seed=seed, epoch=epoch)), None)
        count = config.schedule.steps_per_epoch(len(self.samples)) * size
        order = balanced_order(self.samples, self.labels, count=count, seed=seed, epoch=epoch)
        assert order.earlier_draws is not None
        return Order(own(order.samples), own(order.earlier_draws))

    def batches(self, epoch: int, rows: slice) -> Iterator[tuple[Batch, Tensor]]:
        """Yields this rank's batch and the random bits to augment it, for each step of `epoch` in the slice `rows`."""
        samples, earlier_draws = self.plan(epoch)
        indices = torch.from_numpy(samples[rows]).to(self.runtime.device)
        if earlier_draws is None:
            draws = torch.full_like(indices, epoch)
        else:  # an image that is drawn again within an epoch must get other random bits
            draws = torch.from_numpy(earlier_draws[rows]).to(self.runtime.device)
        yield from zip(self.loader.batches(samples[rows]), self._random_bits(indices, draws), strict=True)

    def _random_bits(self, indices: Tensor, draws: Tensor) -> Iterator[Tensor]:
        """Yields the random bits for each step. `indices` and `draws` have one row per step and one value per image.

        One call of `Augmenter.draw` computes the bits of many steps, which saves dozens of operations in each step.
        """
        for some in zip(indices.split(STEPS_PER_DRAW), draws.split(STEPS_PER_DRAW), strict=True):
            yield from self.augmenter.draw(*some)


def images_in_step(config: TrainConfig, rank: int, world_size: int) -> int:
    """Number of images that `rank` trains on in each step."""
    rows = share(config.schedule.batch_size, rank, world_size, pairs=config.augment.mixes_pairs)
    return rows.stop - rows.start


def split_training_images(labels: np.ndarray, config: TrainConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted positions of the images to train on, of those for --validation, and of those for --calibrate.

    `labels` (N,): the classes of all training images. Raises InputError if too few images are left to train on.
    """
    trained, held_out = np.arange(len(labels)), []
    for count in (config.data.validation, config.data.calibrate):
        part = trained[:0]
        if count:
            kept, own = hold_out(labels[trained], count=count, seed=config.runtime.seed)
            trained, part = trained[kept], trained[own]
        held_out.append(part)
    return trained, held_out[0], held_out[1]


def build_data(config: TrainConfig, runtime: Runtime, dataset: DatasetInfo) -> RunData:
    """The data of a run. Evaluation uses the test split, or the images that --validation holds out."""
    train_beton, test_beton = (config.data.data_dir / dataset.splits[name].file for name in ("train", "test"))
    splits = {config.data.data_dir / split.file: split for split in dataset.splits.values()}
    all_labels = read_labels(train_beton)
    samples, held_out, calibrated = split_training_images(all_labels, config)
    labels = all_labels[samples]
    evaluated, evaluated_beton = np.arange(dataset.splits["test"].count), test_beton
    if config.data.validation:
        evaluated, evaluated_beton = held_out, train_beton
    seen = np.unique(all_labels[held_out]) if config.data.validation else range(len(dataset.classes))
    spec = ModelSpec.of(dataset, config)

    def loader(beton: Path, batch_size: int) -> StreamLoader | ResidentLoader:
        return build_loader(
            beton,
            mode=config.data.data_mode,
            device=runtime.device,
            batch_size=batch_size,
            num_workers=config.data.num_workers,
            split=splits[beton],
        )

    weights = None
    if config.data.balance == "weights":
        numbers = class_weights(labels, len(spec.classes))
        weights = torch.tensor(numbers, dtype=torch.float32, device=runtime.device)
    train_loader = loader(train_beton, images_in_step(config, runtime.rank, runtime.world_size))
    return RunData(
        config=config,
        runtime=runtime,
        loader=train_loader,
        samples=samples,
        augmenter=Augmenter(config.augment, mean=spec.mean, std=spec.std, seed=config.runtime.seed),
        evaluator=Evaluator(loader(evaluated_beton, spec.evaluation_batch), evaluated, spec, runtime),
        labels=labels if config.data.balance == "batches" else None,
        class_weights=weights,
        missing_classes=tuple(name for label, name in enumerate(dataset.classes) if label not in seen),
        calibrator=Evaluator(train_loader, calibrated, spec, runtime) if len(calibrated) else None,
    )
