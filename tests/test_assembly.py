"""The network as it is trained: what stays frozen, BatchNorm's momentum, and what a training costs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data_prep.errors import InputError
from ddp_trainer.assembly import build_network, training_flops
from ddp_trainer.config import NetworkConfig, OptimConfig
from ddp_trainer.model import ModelSpec, build_model, count_parameters
from ddp_trainer.optim import build_optimizer
from ddp_trainer.recipes import RECIPES

CLASSES = tuple("0123456789")


def test_what_is_frozen_stays_and_the_rest_is_learned() -> None:
    torch.manual_seed(0)
    spec = ModelSpec(classes=CLASSES, mean=(0.5,) * 3, std=(0.2,) * 3, image_size=32, widths=(8, 8, 16, 16))
    model = build_network(NetworkConfig(freeze_bn_scale=True, bn_momentum=0.4), spec)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", peak_lr=0.2, head_lr=1.0, bias_lr=10.0))
    for _ in range(2):
        F.cross_entropy(model(torch.randn(16, 3, 32, 32)), torch.arange(16) % 10).backward()
        optimizer.step()
        optimizer.zero_grad()
    same = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    norms = [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert same == {f"{name}.weight" for name in norms}
    assert all(layer.momentum == 0.4 for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    assert count_parameters(model) == count_parameters(build_model(spec))


def test_operations_at_low_resolution_are_counted_as_such() -> None:
    """Three quarters of the side: nine sixteenths of the pixels. The last layer is too small to be seen."""
    config, spec = RECIPES["fast"], ModelSpec(classes=CLASSES, mean=(0.5,) * 3, std=(0.2,) * 3, image_size=32)
    full = replace(config, augment=replace(config.augment, low_resolution_epochs=0))
    for steps, share in ((100, 9 / 16), (200, 9 / 16), (300, (2 * 9 / 16 + 1) / 3), (500, (2 * 9 / 16 + 3) / 5)):
        shrunk, whole = (training_flops(each, spec, steps=steps, num_images=50_000) for each in (config, full))
        assert shrunk / whole == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 1.5, -0.1, np.nan])
def test_a_momentum_that_cannot_be_is_refused(momentum: float) -> None:
    with pytest.raises(InputError, match="--bn-momentum"):
        NetworkConfig(bn_momentum=momentum)
