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


def built_in_inference_mode(num_classes: int) -> nn.Module:
    with torch.inference_mode():
        return Plain(num_classes)
