"""What a run trains, and on what: its data and its fresh network, built from the configuration."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data_prep.augment import Augmenter
from data_prep.batch_ops import batch_normalise
from data_prep.beton import read_labels
from data_prep.dataset import DatasetInfo
from data_prep.loader import ResidentLoader, StreamLoader, build_loader, read_images
from data_prep.order import hold_out
from ddp_trainer.config import TrainConfig
from ddp_trainer.evaluate import Evaluator
from ddp_trainer.initialisation import initialise, whiten_stem
from ddp_trainer.model import ModelSpec, build_model, training_flops_per_image
from ddp_trainer.run_data import RunData
from ddp_trainer.runtime import Runtime

WHITENING_IMAGES = 2000  # each has hundreds of patches, whose covariance has 27 x 27 entries
WHITENING_CHUNK = 100  # of them at a time: their patches take nine times their memory
NARROWER = 4  # times: the network that chooses hard images


def build_data(config: TrainConfig, runtime: Runtime, dataset: DatasetInfo, spec: ModelSpec) -> RunData:
    """Loaders over the training images and over those that are evaluated: the test split, or what is held out."""
    train_beton, test_beton = (config.data.data_dir / dataset.splits[name].file for name in ("train", "test"))
    samples = np.arange(dataset.splits["train"].count)
    evaluated, evaluated_beton = np.arange(dataset.splits["test"].count), test_beton
    if config.data.validation:
        labels = read_labels(train_beton)
        samples, evaluated = hold_out(labels, count=config.data.validation, seed=config.runtime.seed)
        evaluated_beton = train_beton
    augmenter = Augmenter(config.augment, mean=spec.mean, std=spec.std, seed=config.runtime.seed)

    def loader(beton: Path, batch_size: int) -> StreamLoader | ResidentLoader:
        return build_loader(beton, mode=config.data.data_mode, device=runtime.device, batch_size=batch_size,
                            num_workers=config.data.num_workers)  # fmt: skip

    share = config.schedule.batch_size // runtime.world_size
    evaluator = Evaluator(loader(evaluated_beton, spec.evaluation_batch), evaluated, spec, runtime)
    return RunData(loader=loader(train_beton, share), samples=samples, augmenter=augmenter, evaluator=evaluator)


def build_network(config: TrainConfig, data: RunData, spec: ModelSpec, *, fresh: bool = True) -> nn.Module:
    """A network to train. Where it is not `fresh`, its values are about to be overwritten by those of a checkpoint."""
    model = build_model(spec)
    initialise(model, config.network)
    if config.network.whiten_stem and fresh:
        evenly = np.linspace(0, len(data.samples) - 1, min(WHITENING_IMAGES, len(data.samples))).astype(int)
        images = read_images(data.loader, data.samples[evenly]).split(WHITENING_CHUNK)
        whiten_stem(model, (batch_normalise(part, spec.mean, spec.std, torch.float32) for part in images))
    return model


def small_network(spec: ModelSpec) -> ModelSpec:
    """The network whose losses tell which images are hard (`hard_examples`)."""
    stem, first, second, third = (width // NARROWER for width in spec.widths)
    return replace(spec, widths=(stem, first, second, third))


def training_flops(config: TrainConfig, spec: ModelSpec, *, steps: int, num_images: int) -> float:
    """Forward and backward operations of `steps` steps of a run on `num_images`, and of choosing its hard images."""
    schedule = config.schedule
    steps_per_epoch = schedule.steps_per_epoch(num_images)

    def per_image_and_step(network: ModelSpec, steps: int) -> float:
        model = build_model(network)
        initialise(model, config.network)  # what is frozen costs less
        epochs = (step // steps_per_epoch for step in range(steps))
        sides = Counter(schedule.crop_side(network.image_size, epoch=epoch) for epoch in epochs)
        return sum(count * training_flops_per_image(model, side) for side, count in sides.items())

    flops = schedule.batch_size * per_image_and_step(spec, steps)
    if schedule.candidates > 1:
        all_steps = schedule.epochs * steps_per_epoch
        flops += schedule.candidates_per_step * per_image_and_step(small_network(spec), all_steps)
    return flops
