"""Counts the floating-point operations of a run, based on its real layers and its real optimizer."""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn

from ddp_trainer.config import OptimConfig, TrainConfig
from ddp_trainer.engine.newton_schulz import orthogonalize
from ddp_trainer.engine.optim import parameter_groups
from ddp_trainer.models.initial_weights import freeze
from ddp_trainer.models.spec import ModelSpec, build_network
from ddp_trainer.models.trial_pass import trial_images, trial_passes


class TrainingFlops(NamedTuple):
    """Operations of convolutions and matrix products. A multiply-add counts as two operations."""

    network: float  # forward and backward, for all images
    optimizer: float  # on one process; every process does the same work

    @property
    def total(self) -> float:
        return self.network + self.optimizer


def training_flops(config: TrainConfig, spec: ModelSpec, *, steps: int, num_images: int) -> TrainingFlops:
    """Operations of the first `steps` steps of a run on `num_images` training images."""
    schedule = config.schedule
    total_steps = schedule.total_steps(num_images)
    freeze_step = schedule.freeze_step(total_steps)
    sides = (schedule.crop_side(spec.image_size, step=step, total_steps=total_steps) for step in range(steps))
    kinds = Counter((step >= freeze_step, side) for step, side in enumerate(sides))
    model, network, optimizer = build_network(config.network, spec), 0.0, 0.0
    for (frozen, side), count in sorted(kinds.items()):
        if frozen:
            freeze(model, schedule.frozen_late)
        network += count * schedule.batch_size * training_flops_per_image(model, side)
        optimizer += count * optimizer_flops_per_step(model, config.optim)
    return TrainingFlops(network, optimizer)


def training_flops_per_image(model: nn.Module, image_size: int) -> float:
    """Operations of the forward and backward pass for one image of `image_size` pixels a side.

    They are counted by torch's FlopCounterMode.
    """
    from torch.utils.flop_counter import FlopCounterMode

    count = 2
    backward = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    images = trial_images(model, count, image_size).contiguous()
    with trial_passes(model), FlopCounterMode(display=False, custom_mapping=backward) as counter:
        model.train()(images).sum().backward()
    return counter.get_total_flops() / count


def _convolution_backward_flops(
    out_gradient: list[int], images: list[int], filters: list[int], *rest: Any, out_shape: Any = None
) -> int:
    """Operations of the backward pass: each of the two gradients takes as many as the forward pass.

    This replaces torch's own formula. In torch 2.15, that formula counts too many operations for the gradient of the
    filters of a grouped convolution, by a factor of `groups`.
    """
    from torch.utils.flop_counter import conv_flop_count

    transposed, wanted = rest[4], rest[7]
    return conv_flop_count(images, filters, out_gradient, transposed=transposed) * (wanted[0] + wanted[1])


def optimizer_flops_per_step(model: nn.Module, config: OptimConfig) -> float:
    """Operations of the matrix products in one step of Muon; 0 for SGD and AdamW, which have none."""
    from torch.utils.flop_counter import FlopCounterMode

    with_muon = [weights for group in parameter_groups(model, config) if group["muon"] for weights in group["params"]]
    shapes = [(len(weights), weights.numel() // len(weights)) for weights in with_muon]
    with FlopCounterMode(display=False) as counter:
        orthogonalize([torch.empty(shape, device="meta") for shape in shapes])  # nothing is computed on the meta device
    return counter.get_total_flops()
