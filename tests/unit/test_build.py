"""The network as it is trained, and what its training costs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data_prep.errors import InputError
from ddp_trainer.config import NetworkConfig, OptimConfig
from ddp_trainer.engine.build import build_network
from ddp_trainer.engine.flops import training_flops
from ddp_trainer.engine.optim import build_optimizer
from ddp_trainer.models.spec import ModelSpec, build_model, count_parameters
from ddp_trainer.recipes import RECIPES

SPEC = ModelSpec(classes=tuple("0123456789"), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), image_size=32)


def test_what_is_frozen_stays_and_the_rest_is_learned() -> None:
    torch.manual_seed(0)
    spec = replace(SPEC, widths=(8, 8, 16, 16))
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


@pytest.mark.parametrize("momentum", [0.0, 1.5, -0.1, np.nan])
def test_a_momentum_that_cannot_be_is_refused(momentum: float) -> None:
    with pytest.raises(InputError, match="--bn-momentum"):
        NetworkConfig(bn_momentum=momentum)


@pytest.mark.parametrize(
    ("steps", "share"),
    [(30, 1 / 4), (200, 1 / 4), (400, (2 / 4 + 2 * 9 / 16) / 4), (700, (2 / 4 + 3 * 9 / 16 + 2) / 7)],
)
def test_operations_of_small_crops_are_counted_as_such(steps: int, share: float) -> None:
    """Half of the side is a quarter of the pixels. The last layer, which always has one, is too small to be seen."""
    large = replace(RECIPES["baseline"], schedule=replace(RECIPES["baseline"].schedule, epochs=7, batch_size=500))
    small = replace(large, schedule=replace(large.schedule, small_crop_fraction=0.75))
    counted, whole = (training_flops(config, SPEC, steps=steps, num_images=50_000) for config in (small, large))
    assert counted / whole == pytest.approx(share, rel=1e-3)
