"""Networks whose steps cannot be captured into a CUDA graph, for `--network tests.support.graph_networks:NAME`."""

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StochasticDepth(nn.Module):
    """Decides on the host whether to use a layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Linear(8, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = x + (max(random.random(), torch.rand(()).item()) < 0.7) * F.relu(self.second(x))
        return self.head(x.mean(dim=(2, 3)))


class WaitsInBackward(nn.Module):
    """Waits for the device in its backward pass."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * gradient.sum().isfinite().item())
        return self.head(F.relu(self.second(x)).mean(dim=(2, 3)))
