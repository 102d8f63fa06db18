"""The images of one run: those to train on, in which order, and those to evaluate on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.augment import Augmenter
from data_prep.beton import read_labels
from data_prep.dataset import DatasetInfo
from data_prep.loader import ResidentLoader, StreamLoader, build_loader
from data_prep.order import epoch_order, hold_out, train_batches
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.evaluation import Evaluator
from ddp_trainer.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What is read, how it is augmented, and which images are trained and evaluated on."""

    loader: StreamLoader | ResidentLoader
    samples: np.ndarray  # (N,) positions in the beton file, held-out images excluded
    augmenter: Augmenter
    evaluator: Evaluator

    def plan(self, epoch: int, *, config: TrainConfig, runtime: Runtime) -> np.ndarray:
        """(steps, images per step and rank): this rank's positions in the beton file for each step of `epoch`."""
        order = epoch_order(self.samples, seed=config.runtime.seed, epoch=epoch)
        size = config.schedule.batch_size
        return train_batches(order, batch_size=size, rank=runtime.rank, world_size=runtime.world_size)


def build_data(config: TrainConfig, runtime: Runtime, dataset: DatasetInfo) -> RunData:
    """Loaders over the training images and over the evaluated ones: the test split, or what --validation holds out."""
    train_beton, test_beton = (config.data.data_dir / dataset.splits[name].file for name in ("train", "test"))
    checksums = {config.data.data_dir / split.file: split.sha256 for split in dataset.splits.values()}
    samples = np.arange(dataset.splits["train"].count)
    evaluated, evaluated_beton = np.arange(dataset.splits["test"].count), test_beton
    if config.data.validation:
        labels = read_labels(train_beton)
        samples, evaluated = hold_out(labels, count=config.data.validation, seed=config.runtime.seed)
        evaluated_beton = train_beton
    spec = ModelSpec.of(dataset, config.network, flip=config.augment.flip)

    def loader(beton: Path, batch_size: int) -> StreamLoader | ResidentLoader:
        return build_loader(
            beton,
            mode=config.data.data_mode,
            device=runtime.device,
            batch_size=batch_size,
            num_workers=config.data.num_workers,
            sha256=checksums[beton],
        )

    return RunData(
        loader=loader(train_beton, config.schedule.batch_size // runtime.world_size),
        samples=samples,
        augmenter=Augmenter(config.augment, mean=spec.mean, std=spec.std, seed=config.runtime.seed),
        evaluator=Evaluator(loader(evaluated_beton, spec.evaluation_batch), evaluated, spec, runtime),
    )
