"""How the network stands before its first step, and which of its parameters stay as they are."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddp_trainer.config import NetworkConfig


def initialise(model: nn.Module, config: NetworkConfig) -> None:
    """Changes `model` in place, before it is wrapped: DDP would wait for the gradients of what is frozen later."""
    if config.dirac_init:
        for convolution in _convolutions(model):
            pass_through_(convolution.weight)
    if config.whiten_stem:
        _convolutions(model)[0].weight.requires_grad_(False)
    for norm in (layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)):
        norm.momentum = config.bn_momentum
        norm.weight.requires_grad_(not config.freeze_bn_scale)


def whiten_stem(model: nn.Module, images: Iterable[Tensor]) -> None:
    """Sets the first convolution by normalised training images, in batches of (N, 3, H, W)."""
    whiten_(_convolutions(model)[0].weight, images)


def _convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]


@torch.no_grad()
def pass_through_(filters: Tensor) -> None:
    """The first I of (O, I, H, W) filters become the identity, the others stay random.

    Zagoruyko & Komodakis, "DiracNets" (arXiv 1706.00388), in the form of airbench (arXiv 2404.00498, section 3.3).
    """
    nn.init.dirac_(filters[: filters.size(1)])


@torch.no_grad()
def whiten_(filters: Tensor, images: Iterable[Tensor], *, epsilon: float = 5e-4) -> None:
    """The filters (O, C, H, W) become the principal components of the images' patches, each scaled to variance one.

    Each comes with its negative, since an activation follows; those of the largest variance first. As many as fit: 54
    of 64 for 3x3 patches of three colours. The others stay as they are. After Page, "How to train your ResNet 8: Bag
    of tricks" (myrtle.ai, 2019), with signs and epsilon of airbench (arXiv 2404.00498, section 3.2).
    """
    out, channels, height, width = filters.shape
    size = channels * height * width
    covariance, count = torch.zeros(size, size, dtype=torch.float64), 0
    for part in images:
        patches = F.unfold(part, (height, width)).double().transpose(0, 1).flatten(1).cpu()  # (size, patches)
        covariance += patches @ patches.T
        count += patches.size(1)
    variances, components = torch.linalg.eigh(covariance / count)
    kept = min(out // 2, size)
    order = variances.argsort(descending=True)[:kept]
    whitening = (components[:, order] / (variances[order] + epsilon).sqrt()).T.reshape(kept, channels, height, width)
    filters[: 2 * kept] = torch.cat((whitening, -whitening)).to(filters)
