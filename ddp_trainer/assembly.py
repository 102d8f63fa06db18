"""What a run trains, and on what: its data and its fresh network, built from the configuration."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from data_prep.augment import Augmenter
from data_prep.beton import read_labels
from data_prep.dataset import DatasetInfo
from data_prep.loader import ResidentLoader, StreamLoader, build_loader
from data_prep.order import hold_out
from ddp_trainer.config import NetworkConfig, TrainConfig
from ddp_trainer.evaluate import Evaluator
from ddp_trainer.model import ModelSpec, build_model, training_flops_per_image
from ddp_trainer.run_data import RunData
from ddp_trainer.runtime import Runtime

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


def build_network(config: NetworkConfig, spec: ModelSpec) -> nn.Module:
    """A network to train. What is frozen is frozen here: DDP would wait for gradients of what is frozen later."""
    model = build_model(spec)
    for norm in (layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)):
        norm.momentum = config.bn_momentum
        norm.weight.requires_grad_(not config.freeze_bn_scale)
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
        epochs = (step // steps_per_epoch for step in range(steps))
        sides = Counter(schedule.crop_side(network.image_size, epoch=epoch) for epoch in epochs)
        return sum(count * training_flops_per_image(model, side) for side, count in sides.items())

    flops = schedule.batch_size * per_image_and_step(spec, steps)
    if schedule.candidates > 1:
        all_steps = schedule.epochs * steps_per_epoch
        flops += schedule.candidates_per_step * per_image_and_step(small_network(spec), all_steps)
    return flops
