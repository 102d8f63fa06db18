"""Runs this rank's share of a batch through synchronized BatchNorm, forward and backward, in float64.

Arguments: OUT DEVICE. Saves the outputs, gradients and running statistics in OUT/RANK.pt.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.runtime import Runtime


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns images (11, 3, 5, 5) with a mean of 100, and for each output of the layer, its weight in the loss."""
    generator = torch.Generator().manual_seed(0)
    shape = (11, 3, 5, 5)
    return 100 + 3 * torch.randn(shape, generator=generator).double(), torch.randn(shape, generator=generator).double()


def main(argv: Sequence[str]) -> None:
    out, device = Path(argv[0]), argv[1]
    runtime = Runtime(RuntimeConfig(device=device, precision="fp32", sync_bn=True))  # type: ignore[arg-type]
    torch.manual_seed(0)
    layer = runtime.place(nn.Sequential(nn.BatchNorm2d(3)).double())
    images, weights = (part.chunk(runtime.world_size)[runtime.rank].to(runtime.device) for part in inputs())
    images.requires_grad_()
    outputs = layer(images)
    (outputs * weights).sum().backward()
    gradients = torch.cat([parameter.grad for parameter in layer.parameters() if parameter.grad is not None])
    found = {
        "outputs": outputs.detach(),
        "images": images.grad,
        "parameters": runtime.sum_over_ranks(gradients),
        **{name: value for name, value in layer.state_dict().items() if "running" in name},
    }
    torch.save({name: value.cpu() for name, value in found.items() if value is not None}, out / f"{runtime.rank}.pt")
    runtime.close()
