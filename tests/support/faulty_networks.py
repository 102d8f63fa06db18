"""Faulty networks, for `--network tests.support.faulty_networks:NAME`. Each works in some forward passes."""

import torch
from torch import Tensor, nn

from tests.support.networks import plain


class Plain(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = plain(num_classes)
        self.highest: Tensor
        self.register_buffer("highest", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class HasNoModes(Plain):
    """Like the programs that torch.export returns."""

    def train(self, mode: bool = True) -> nn.Module:
        raise NotImplementedError("Calling train() is not supported yet.")


class ForgetsToReturn(Plain):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


class ChangesInput(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2).add_(1))


class ResizesBuffer(Plain):
    """Like the observers of torch.ao.quantization."""

    def forward(self, x: Tensor) -> Tensor:
        self.highest.resize_(3).copy_(x.detach().amax(dim=(0, 2, 3)))
        return super().forward(x)


class NeedsFloat32(Plain):
    """Assigns logits, which are in bf16 or fp16 under autocast, to elements of a float32 tensor."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        chosen = torch.zeros(logits.shape, device=x.device)
        chosen[torch.arange(len(x)) >= 0] = logits
        return chosen


class ClampsInEvaluation(Plain):
    """Has no fault: an evaluation computes no gradients."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            next(self.parameters()).clamp_(-9, 9)
        return super().forward(x)


class Whitens(Plain):
    """Has no fault, but fails on images whose pixels are all equal."""

    def forward(self, x: Tensor) -> Tensor:
        colors = x.detach().float().transpose(0, 1).flatten(1)
        return super().forward(x / torch.linalg.cholesky(colors.cov()).trace())


class KeepsGradientOfMean(Plain):
    """Has no fault, but keeps the gradient history of its running mean, because it does not use `detach`."""

    mean: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("mean", torch.zeros(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * logits.mean(dim=0).float())
        return logits


class KeepsTensor(Plain):
    """Has no fault, but would if its first pass ran in inference mode."""

    grid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = torch.ones_like(x[:1])
        return super().forward(x * self.grid)


class Raises(Plain):
    def __init__(self, error: Exception) -> None:
        super().__init__(5)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def built_in_inference_mode(num_classes: int) -> nn.Module:
    with torch.inference_mode():
        return Plain(num_classes)
