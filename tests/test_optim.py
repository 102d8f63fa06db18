"""The schedule against torch's own, parameter groups, and optimizers."""

import pytest
import torch
from torch import nn

from ddp_trainer.config import OptimConfig, ScheduleConfig
from ddp_trainer.model import CustomResNet
from ddp_trainer.optim import build_optimizer, one_cycle, parameter_groups, set_learning_rate


@pytest.mark.parametrize(("total", "warmup"), [(97 * 24, 5 / 24), (6, 5 / 24), (100, 0.3), (7, 0.5)])
def test_the_curve_is_that_of_torch(total: int, warmup: float) -> None:
    schedule = ScheduleConfig(warmup_fraction=warmup, initial_lr_fraction=0.04, final_lr_fraction=0.04 / 1e4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=total, pct_start=warmup, anneal_strategy="linear", cycle_momentum=False,
        div_factor=1 / 0.04, final_div_factor=1e4,
    )  # fmt: skip
    for step in range(total):
        ours = one_cycle(step, total_steps=total, schedule=schedule)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        if step < total - 1:
            theirs.step()


@pytest.mark.parametrize("total", [1, 2, 5, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 1.0])
def test_the_curve_stays_between_its_ends(total: int, warmup: float) -> None:
    schedule = ScheduleConfig(warmup_fraction=warmup, final_lr_fraction=0.1)
    curve = [one_cycle(step, total_steps=total, schedule=schedule) for step in range(total)]
    assert all(0.04 <= value <= 1.0 for value in curve)
    if total == 1000:
        assert max(curve) == pytest.approx(1.0)
        assert curve[-1] == pytest.approx(0.1 if warmup < 1 else 1.0)


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
