"""The whitened stem, filters that pass their input through, and what stays frozen."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data_prep.errors import InputError
from ddp_trainer.config import NetworkConfig, OptimConfig
from ddp_trainer.initialisation import initialise, pass_through_, whiten_, whiten_stem
from ddp_trainer.model import CustomResNet, count_parameters
from ddp_trainer.optim import build_optimizer


def smooth_images(count: int = 60) -> torch.Tensor:
    """Neighbouring pixels are alike, as in photographs."""
    noise = torch.randn(count, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(noise, 5, stride=1) * 5 + 0.3 * noise[:, :, 2:-2, 2:-2]


def test_the_answers_of_the_whitened_filters_are_uncorrelated_and_of_variance_one() -> None:
    images = smooth_images()
    filters = torch.randn(64, 3, 3, 3)
    before = filters.clone()
    whiten_(filters, images.split(25), epsilon=0.0)
    answers = F.conv2d(images.double(), filters[:27].double()).transpose(0, 1).flatten(1)
    covariance = answers @ answers.T / answers.size(1)
    torch.testing.assert_close(covariance, torch.eye(27, dtype=torch.float64), rtol=0, atol=1e-4)
    assert torch.equal(filters[27:54], -filters[:27])
    assert torch.equal(filters[54:], before[54:])


def test_a_narrow_stem_keeps_the_components_of_the_largest_variance() -> None:
    images = smooth_images()
    narrow, wide = torch.zeros(8, 3, 3, 3), torch.zeros(64, 3, 3, 3)
    whiten_(narrow, [images])
    whiten_(wide, [images])
    assert torch.equal(narrow[:4], wide[:4])
    norms = wide[:27].flatten(1).norm(dim=1)  # of a component with less variance the filter is larger
    assert torch.equal(norms, norms.sort().values)


@pytest.mark.parametrize("shape", [(8, 8), (8, 5)])
def test_filters_pass_their_input_through(shape: tuple[int, int]) -> None:
    filters = torch.randn(*shape, 3, 3)
    before = filters.clone()
    pass_through_(filters)
    images = torch.randn(2, shape[1], 6, 6)
    torch.testing.assert_close(F.conv2d(images, filters, padding=1)[:, : shape[1]], images)
    assert torch.equal(filters[shape[1] :], before[shape[1] :])


def test_what_is_frozen_stays_and_the_rest_is_learned() -> None:
    torch.manual_seed(0)
    model = CustomResNet(widths=(8, 8, 16, 16))
    total = count_parameters(model)
    initialise(model, NetworkConfig(whiten_stem=True, dirac_init=True, freeze_bn_scale=True, bn_momentum=0.4))
    whiten_stem(model, [smooth_images()])
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", peak_lr=0.2, head_lr=1.0, bias_lr=10.0))
    for _ in range(2):
        F.cross_entropy(model(torch.randn(16, 3, 32, 32)), torch.arange(16) % 10).backward()
        optimizer.step()
        optimizer.zero_grad()
    same = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    norms = [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert same == {"features.0.0.weight", *(f"{name}.weight" for name in norms)}
    assert all(layer.momentum == 0.4 for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    assert count_parameters(model) == total


@pytest.mark.parametrize("momentum", [0.0, 1.5, -0.1, np.nan])
def test_a_momentum_that_cannot_be_is_refused(momentum: float) -> None:
    with pytest.raises(InputError, match="--bn-momentum"):
        NetworkConfig(bn_momentum=momentum)
