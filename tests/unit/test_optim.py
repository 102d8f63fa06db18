"""Parameter groups and optimizers: weight decay, learning rates and frozen parameters."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddp_trainer.config import NetworkConfig, OptimConfig
from ddp_trainer.engine.optim import LearningRates, build_optimizer, parameter_groups, zero_momentum
from ddp_trainer.models.custom_resnet import BatchNorm, CustomResNet
from ddp_trainer.models.small_map_conv import Conv3x3
from ddp_trainer.models.spec import ModelSpec, build_model, build_network, count_parameters


def test_weight_decay_applies_only_to_weights_of_convolutions_and_linear_layers() -> None:
    model = CustomResNet()
    groups = parameter_groups(model, OptimConfig(weight_decay=5e-4))
    assert sum(p.numel() for group in groups for p in group["params"]) == 6_573_130
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in weights}


def test_head_and_biases_of_batchnorm_have_their_own_learning_rates() -> None:
    model = CustomResNet(widths=(8, 8, 16, 16))
    optimizer = build_optimizer(model, OptimConfig(peak_lr=0.5, head_lr=1.0, bias_lr=32.0))
    LearningRates(optimizer).set(0.25)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            is_bn_bias = isinstance(layer, BatchNorm) and parameter is layer.bias
            peak = 32.0 if is_bn_bias else {Conv3x3: 0.5, nn.Linear: 1.0, BatchNorm: 0.5}[type(layer)]
            assert rates[id(parameter)] == 0.25 * peak


def test_the_last_convolution_is_the_head_of_a_network_without_a_linear_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 10, 1))
    groups = parameter_groups(model, OptimConfig(peak_lr=0.5, head_lr=1.0))
    rates = {id(parameter): group["peak_lr"] for group in groups for parameter in group["params"]}
    assert [rates[id(layer.weight)] for layer in model] == [0.5, 1.0]


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_learning_rate_reaches_every_group(device: torch.device, name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(device)
    optimizer = build_optimizer(model, OptimConfig(optimizer=name, peak_lr=0.1))  # type: ignore[arg-type]
    before = [p.detach().clone() for p in model.parameters()]
    LearningRates(optimizer).set(0.0)
    model(torch.randn(8, 4, device=device)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_learning_rates_on_a_device_keep_their_address(name: str) -> None:
    """A CUDA graph reads the rates at fixed addresses, but load_state_dict puts other tensors into the groups.

    `set` must then put the rates back into the old memory. The device meta, whose tensors have no data, replaces a GPU.
    """
    with torch.device("meta"):
        model = CustomResNet(widths=(8, 8, 16, 16))
    optimizer = build_optimizer(model, OptimConfig(optimizer=name, bias_lr=32.0))  # type: ignore[arg-type]
    rates = LearningRates(optimizer)
    rates.set(0.5)
    first = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(optimizer.state_dict())
    rates.set(0.25)
    for rate, group in zip(first, optimizer.param_groups, strict=True):
        assert (group["lr"].shape, group["lr"].device.type) == ((), "meta")
        # Every data_ptr is 0 on this device, so compare the addresses of the C++ objects that manage the memory.
        assert group["lr"].untyped_storage()._cdata == rate.untyped_storage()._cdata
        assert group["lr"].storage_offset() == rate.storage_offset()


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_learning_rate_may_be_a_tensor(name: str) -> None:
    def weights_after_a_step(rate: float | torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 5)
        model = nn.Sequential(*layers)
        optimizer = build_optimizer(model, OptimConfig(optimizer=name))  # type: ignore[arg-type]
        for group in optimizer.param_groups:
            group["lr"] = rate
        model(torch.randn(8, 3, 6, 6)).square().sum().backward()
        optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    torch.testing.assert_close(weights_after_a_step(torch.tensor(0.25)), weights_after_a_step(0.25))


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
    bn_momenta = {layer.momentum for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)}
    assert bn_momenta == {0.4}
    assert count_parameters(model) == count_parameters(build_model(spec))


def test_rmsprop_can_take_its_first_step_after_zero_momentum() -> None:
    weights = nn.Parameter(torch.ones(3))
    weights.grad = torch.ones(3)
    optimizer = torch.optim.RMSprop([weights], lr=0.1, momentum=0.9)
    zero_momentum(optimizer)
    optimizer.step()
    assert bool((weights < 1).all())
