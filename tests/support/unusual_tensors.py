"""Networks with parameters and buffers of unusual types, values or layouts."""

import functools
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class FrozenInHalf(nn.Module):
    """Its first layer is frozen and in bf16. `converts`: whether the network converts the images to bf16."""

    def __init__(self, *, converts: bool) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 32).to(torch.bfloat16).requires_grad_(False)
        self.head = nn.Linear(4, 5)
        self.converts = converts

    def forward(self, x: Tensor) -> Tensor:
        images = x.to(torch.bfloat16) if self.converts else x
        return self.head(self.backbone(images).flatten(start_dim=1).float())


class DrawsInEvaluation(nn.Module):
    """Multiplies the logits by random numbers, in evaluation too."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(start_dim=1)) * random.random() * np.random.random() * torch.rand(())


class Counting(nn.Module):
    """Counts its forward passes in training, in a buffer that is not saved."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, num_classes)
        self.passes: Tensor
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        return self.head(x.flatten(start_dim=1))


class Centering(nn.Module):
    """Subtracts a buffer that is not saved. `moves`: whether training changes the buffer."""

    def __init__(self, num_classes: int, *, moves: bool) -> None:
        super().__init__()
        self.head, self.moves = nn.Linear(3 * 32 * 32, num_classes), moves
        self.center: Tensor
        self.register_buffer("center", torch.zeros(1) if moves else torch.randn(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.moves:
            self.center.lerp_(x.detach().mean(), 0.1)
        return self.head(x.flatten(start_dim=1) - self.center)


with_random_constant = functools.partial(Centering, moves=False)


class SavesHead(nn.Module):
    """Its state_dict lacks a frozen layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 32).requires_grad_(False)
        self.head = nn.Linear(4, num_classes)

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Tensor]:
        whole = super().state_dict(*arguments, **options)
        return {name: value for name, value in whole.items() if not name.startswith("backbone")}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).flatten(start_dim=1))


ONLY = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))


def always_the_same(num_classes: int) -> nn.Module:
    return ONLY


def with_shared_backbone(num_classes: int) -> nn.Module:
    return nn.Sequential(ONLY, nn.Linear(10, num_classes))


MEAN = torch.full((1, 3, 1, 1), 0.5)


def with_shared_constant(num_classes: int) -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))
    network.register_buffer("mean", MEAN, persistent=False)
    return network


class KeepsLoss(nn.Module):
    """Keeps a tensor that it has computed in training."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, num_classes)
        self.loss = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x.flatten(start_dim=1))
        if self.training:
            self.loss = logits.square().mean()
        return logits


def with_repeated_buffer(num_classes: int) -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))
    network.register_buffer("mask", torch.ones(1).expand(32), persistent=False)
    return network


def starts_at_zero(num_classes: int) -> nn.Module:
    """The scale of its second BatchNorm is 0 at first."""
    first, last = nn.Conv2d(3, 8, 8, stride=8), nn.BatchNorm2d(8)
    nn.init.zeros_(last.weight)
    return nn.Sequential(first, nn.BatchNorm2d(8), last, nn.Flatten(), nn.Linear(128, num_classes))
