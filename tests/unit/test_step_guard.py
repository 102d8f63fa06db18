"""A step whose loss or gradient is not finite changes nothing.

The run ends after one such step or, if it uses a gradient scaler, after ten in a row.
"""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddp_trainer.config import OptimConfig
from ddp_trainer.distributed.signals import StopRequest
from ddp_trainer.engine.ema import Ema
from ddp_trainer.engine.metrics import RunningSums
from ddp_trainer.engine.observer import Observer
from ddp_trainer.engine.optim import build_optimizer, zero_momentum
from ddp_trainer.engine.step_guard import FP16_PATIENCE, Attempt, NonFinite, StepGuard, weights_if_finite
from ddp_trainer.models.custom_resnet import CustomResNet
from tests.support.narrow import WIDTHS, narrow_settings, narrow_trainer, single_runtime
from tests.support.stepping import differences


class ScaledOptimizer:
    """An optimizer whose `step` goes through a gradient scaler, as in an fp16 run."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        self.zero_grad = optimizer.zero_grad

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


class Step:
    """A small model with optimizer, moving average and step guard. Call the object to take a step."""

    def __init__(self, device: torch.device, optimizer: str = "sgd", *, fp16_like: bool = False) -> None:
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
        self.device, self.model = device, nn.Sequential(*layers).to(device)
        config = OptimConfig(optimizer=optimizer, peak_lr=0.01)  # type: ignore[arg-type]
        self.optimizer: Any = build_optimizer(self.model, config)
        zero_momentum(self.optimizer)
        self.scaler = torch.amp.GradScaler(device.type) if fp16_like else None
        wrapped = ScaledOptimizer(self.optimizer, self.scaler) if self.scaler else self.optimizer
        self.ema, self.sums = Ema(self.model, decay=0.9), RunningSums(device)
        self.guard = StepGuard(self.model, wrapped, [self.sums.values], scaler=self.scaler)  # type: ignore[arg-type]
        self.number = 0

    def __call__(self, images: Tensor, *, factor: float = 1.0, overflow: bool = False) -> None:
        """Takes a step. With `overflow`, one element of a gradient becomes infinite although the loss is finite."""
        labels = torch.zeros(len(images), dtype=torch.int64, device=self.device)
        with self.guard.attempt() as decision:
            losses = nn.functional.cross_entropy(self.model(images.to(self.device)), labels, reduction="none")
            weighted = factor * losses
            weights = weights_if_finite(1 / len(losses), weighted)
            (self.scaler.scale(weighted) if self.scaler else weighted).backward(weights)
            if overflow:
                gradient = next(self.model.parameters()).grad
                assert gradient is not None
                gradient[0, 0, 0, 0] = math.inf
            self.sums.add(losses.detach(), losses > 0)
        self.ema.update(self.model, skip=decision.skipped)
        self.guard.check_previous(Attempt(self.number, torch.arange(len(images), device=self.device), losses.detach()))
        self.number += 1

    def state(self) -> dict[str, Tensor]:
        found = {**self.model.state_dict(), **{f"ema {k}": v for k, v in self.ema.state_dict().items()}}
        for number, slot in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer {number} {name}": value for name, value in slot.items()}
        return {**copy.deepcopy(found), "sums": self.sums.values.clone()}


def images(seed: int) -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


NAN_IMAGE = images(3).index_fill(0, torch.tensor(2), math.nan)
BAD: dict[str, dict[str, Any]] = {
    "images": {"images": NAN_IMAGE},  # loss, gradients and the statistics of BatchNorm are NaN
    "loss": {"images": images(3), "factor": 1e40},  # finite for each image, infinite after multiplication by `factor`
    "gradient": {"images": images(3), "overflow": True},
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("at", [0, 2], ids=["first step", "later step"])
def test_run_with_a_skipped_step_equals_the_run_without_it(
    device: torch.device, optimizer: str, bad: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs are equal bit for bit. They use a gradient scaler, so that the skipped step does not end the run."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with_skip, without_skip = (Step(device, optimizer, fp16_like=True) for _ in range(2))
    for number in range(4):
        if number == at:
            with_skip(**BAD[bad])
        with_skip(images(number))
        without_skip(images(number))
    assert differences(with_skip.state(), without_skip.state()) == []
    assert with_skip.guard.skipped_steps() == (0, 1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("bad", BAD)
def test_skipped_step_changes_nothing(device: torch.device, optimizer: str, bad: str) -> None:
    step = Step(device, optimizer)
    step(images(0))
    before = step.state()
    step(**BAD[bad])
    assert differences(step.state(), before) == []
    with pytest.raises(NonFinite, match="step 2"):
        step.guard.skipped_steps()


def test_host_learns_of_a_skipped_step_one_step_later(device: torch.device) -> None:
    step = Step(device)
    step(images(0))
    step(**BAD["images"])
    with pytest.raises(NonFinite, match="step 2") as caught:
        step(images(1))
    assert caught.value.step == 1
    attempt = step.guard.attempt_of(caught.value)
    assert attempt.step == 1
    assert attempt.losses.isnan().any()


def test_fp16_run_ends_after_ten_skipped_steps_in_a_row(device: torch.device) -> None:
    """A good step resets the count."""
    step = Step(device, fp16_like=True)
    for _ in range(2):
        for _ in range(FP16_PATIENCE - 1):
            step(images(0), factor=math.inf)
        step(images(0))
    assert step.guard.skipped_steps() == (0, 2 * (FP16_PATIENCE - 1))
    for _ in range(FP16_PATIENCE):
        step(images(0), factor=math.inf)
    with pytest.raises(NonFinite, match="10 steps in a row"):
        step.guard.skipped_steps()


def test_infinite_loss_with_finite_gradients_gets_nan_gradients() -> None:
    """The all-reduce of gradients then passes the NaN to the other ranks."""
    value = torch.tensor(2.0, requires_grad=True)
    (value + math.inf).backward()
    assert value.grad == 1
    value.grad = None
    losses = value + torch.tensor([0.0, math.inf])
    losses.backward(weights_if_finite(0.5, losses))
    assert value.grad is not None
    assert value.grad.isnan()


def test_moving_average_follows_its_definition_and_ignores_skipped_steps(device: torch.device) -> None:
    model = nn.Linear(3, 2).to(device)
    mask = torch.tensor([0.0, -math.inf], device=device)
    model.register_buffer("mask", mask.clone())
    ema = Ema(model, decay=0.75)
    expected = None
    for number in range(4):
        with torch.no_grad():
            model.weight.fill_(float(number))
        ema.update(model, skip=torch.tensor(number == 2, device=device))
        if number != 2:
            expected = float(number) if expected is None else 0.75 * expected + 0.25 * number
    assert torch.allclose(ema.module.weight, torch.full((2, 3), expected or 0.0, device=device))  # type: ignore[arg-type]
    assert torch.equal(ema.module.mask, mask)  # type: ignore[arg-type]
    assert ema.updates == 3


class SettableStop(StopRequest):
    """A request to stop that needs no signal."""

    asked = False

    @property
    def pending(self) -> bool:
        return self.asked


class SpoiledNetwork(CustomResNet):
    """A network whose logits are NaN in forward pass `at` (1-based). A request to stop arrives in the same pass."""

    def __init__(self, stop: SettableStop, *, at: int) -> None:
        super().__init__(widths=WIDTHS)
        self.stop, self.at, self.passes = stop, at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.stop.asked = self.passes == self.at
        return super().forward(x) * (math.nan if self.stop.asked else 1.0)


class SkipReports(Observer):
    def __init__(self) -> None:
        super().__init__()
        self.reports: list[tuple[dict[str, Any], int]] = []
        self.saved: list[int] = []

    def save(self, state: dict[str, Any], *, step: int, epoch: int) -> None:
        self.saved.append(step)

    def skipped(self, report: dict[str, Any], *, step: int) -> None:
        self.reports.append((report, step))


def test_request_to_stop_does_not_hide_a_bad_batch_in_the_same_step(tiny_dir: Path) -> None:
    """No checkpoint is saved, and the images of the step are reported."""
    config, stop, observer = narrow_settings(tiny_dir, schedule={"batch_size": 8}), SettableStop(), SkipReports()
    network = SpoiledNetwork(stop, at=5)
    trainer = narrow_trainer(config, single_runtime(stop=stop), network=network, observer=observer)
    with pytest.raises(NonFinite, match="step 5"):
        trainer.fit()
    ((report, step),) = observer.reports
    assert (step, report["step"], report["epoch"]) == (5, 5, 1)
    assert len(report["ranks"][0]["samples"]) == 8
    assert report["ranks"][0]["losses"] == [None] * 8
    assert observer.saved == []


def test_the_record_of_an_epoch_counts_its_skipped_steps(tiny_dir: Path) -> None:
    trainer, passes = narrow_trainer(narrow_settings(tiny_dir), single_runtime()), itertools.count(1)
    trainer.model.register_forward_hook(lambda *called: called[2] * (math.nan if next(passes) in (2, 3) else 1.0))
    trainer.guard._patience = FP16_PATIENCE
    trainer.fit()  # two epochs of three steps
    assert [record["skipped_steps"] for record in trainer.state.history] == [2, 0]
