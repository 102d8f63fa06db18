"""Parameter groups and optimizers: weight decay, learning rates and frozen parameters."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddp_trainer.config import NetworkConfig, OptimConfig
from ddp_trainer.engine.optim import build_optimizer, parameter_groups, set_learning_rate
from ddp_trainer.models.custom_resnet import CustomResNet
from ddp_trainer.models.spec import ModelSpec, build_model, build_network, count_parameters


def test_only_weights_are_decayed() -> None:
    model = CustomResNet()
    groups = parameter_groups(model, OptimConfig(weight_decay=5e-4))
    assert sum(p.numel() for group in groups for p in group["params"]) == 6_573_130
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in weights}


def test_head_and_biases_have_their_own_learning_rates() -> None:
    model = CustomResNet(widths=(8, 8, 16, 16))
    optimizer = build_optimizer(model, OptimConfig(peak_lr=0.5, head_lr=1.0, bias_lr=32.0))
    set_learning_rate(optimizer, 0.25)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            peak_of_norm = 32.0 if parameter is layer.bias else 0.5
            peak = {nn.Conv2d: 0.5, nn.Linear: 1.0, nn.BatchNorm2d: peak_of_norm}[type(layer)]
            assert rates[id(parameter)] == 0.25 * peak


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_learning_rate_reaches_every_group(device: torch.device, name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(device)
    optimizer = build_optimizer(model, OptimConfig(optimizer=name, peak_lr=0.1))  # type: ignore[arg-type]
    before = [p.detach().clone() for p in model.parameters()]
    set_learning_rate(optimizer, 0.0)
    model(torch.randn(8, 4, device=device)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_frozen_parameters_stay_unchanged_and_all_others_are_trained() -> None:
    torch.manual_seed(0)
    spec = ModelSpec(
        classes=tuple("0123456789"), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), image_size=32, widths=(8, 8, 16, 16)
    )
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
    momenta = {layer.momentum for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)}
    assert momenta == {0.4}
    assert count_parameters(model) == count_parameters(build_model(spec))
