"""Parameter groups, and optimizers."""

import pytest
import torch
from torch import nn

from ddp_trainer.config import OptimConfig
from ddp_trainer.engine.optim import build_optimizer, parameter_groups, set_learning_rate
from ddp_trainer.models.custom_resnet import CustomResNet


def test_only_weights_are_decayed() -> None:
    model = CustomResNet()
    groups = parameter_groups(model, OptimConfig(weight_decay=5e-4))
    assert sum(p.numel() for group in groups for p in group["params"]) == 6_573_130
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in weights}


def test_head_and_biases_have_learning_rates_of_their_own() -> None:
    model = CustomResNet(widths=(8, 8, 16, 16))
    optimizer = build_optimizer(model, OptimConfig(peak_lr=0.5, head_lr=1.0, bias_lr=32.0))
    set_learning_rate(optimizer, 0.25)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            of_norm = 16.0 if parameter is layer.bias else 0.25
            assert rates[id(parameter)] == {nn.Conv2d: 0.25, nn.Linear: 0.5, nn.BatchNorm2d: of_norm}[type(layer)]


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_the_learning_rate_reaches_every_group(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = build_optimizer(model, OptimConfig(optimizer=name, peak_lr=0.1))  # type: ignore[arg-type]
    before = [p.detach().clone() for p in model.parameters()]
    set_learning_rate(optimizer, 0.0)
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
