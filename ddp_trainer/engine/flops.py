"""How many floating-point operations a run takes, counted on the real layers."""

from collections import Counter

import torch
from torch import nn

from ddp_trainer.config import TrainConfig
from ddp_trainer.models.blank_pass import blank_passes
from ddp_trainer.models.spec import ModelSpec, build_network


def training_flops(config: TrainConfig, spec: ModelSpec, *, steps: int, num_images: int) -> float:
    """Forward and backward operations of the first `steps` steps of a run on `num_images` training images."""
    schedule = config.schedule
    steps_per_epoch = schedule.steps_per_epoch(num_images)
    epochs = (step // steps_per_epoch for step in range(steps))
    sides = Counter(schedule.crop_side(spec.image_size, epoch=epoch) for epoch in epochs)
    model = build_network(config.network, spec)
    per_image = sum(count * training_flops_per_image(model, side) for side, count in sides.items())
    return schedule.batch_size * per_image


def training_flops_per_image(model: nn.Module, image_size: int) -> float:
    """Forward and backward operations for one image of `image_size` pixels a side, by torch's FlopCounterMode."""
    from torch.utils.flop_counter import FlopCounterMode

    was_training, count = model.training, 2
    parameter = next(model.parameters())
    images = torch.zeros(count, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    with blank_passes(model), FlopCounterMode(display=False) as counter:
        model.train()(images).sum().backward()
    model.train(was_training)
    return counter.get_total_flops() / count
