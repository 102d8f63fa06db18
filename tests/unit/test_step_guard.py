"""A step whose loss or gradient is not finite leaves no trace, on any rank, and the run ends or goes on as promised."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from ddp_trainer.config import OptimConfig
from ddp_trainer.distributed.signals import Preempted
from ddp_trainer.engine.ema import Ema
from ddp_trainer.engine.metrics import RunningSums
from ddp_trainer.engine.optim import build_optimizer, zero_momentum
from ddp_trainer.engine.step_guard import NonFinite, StepGuard, felt_by_all, step_unless
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.tracking.console import SilentProgress
from tests.support.trainer import NARROW, run, train

FP16_LIKE = 10


class Step:
    """A small model with all that a step may change, trained by the engine's parts."""

    def __init__(self, optimizer: str = "sgd", patience: int = 1) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
        self.optimizer = build_optimizer(self.model, OptimConfig(optimizer=optimizer, peak_lr=0.01))  # type: ignore[arg-type]
        zero_momentum(self.optimizer)
        self.ema = Ema(self.model, decay=0.9)
        self.sums = RunningSums(torch.device("cpu"))
        self.guard = StepGuard(self.model, [self.sums.values], patience=patience)
        self.number = 0

    def __call__(self, images: torch.Tensor, *, factor: float = 1.0, spoil: bool = False) -> None:
        self.guard.begin()
        losses = nn.functional.cross_entropy(self.model(images), torch.zeros(len(images)).long(), reduction="none")
        felt_by_all(factor * losses.mean()).backward()
        if spoil:  # as fp16 overflows: one number of one gradient, with a good loss
            next(parameter.grad for parameter in self.model.parameters())[0, 0, 0, 0] = math.inf  # type: ignore[index]
        self.sums.add(losses.detach(), losses > 0)
        refused = self.guard.judge()
        step_unless(refused, self.optimizer, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model, skip=refused)
        self.number += 1
        self.guard.after_step(self.number - 1)

    def state(self) -> dict[str, torch.Tensor]:
        found = {**self.model.state_dict(), **{f"ema {k}": v for k, v in self.ema.state_dict().items()}}
        for number, slot in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer {number} {name}": value for name, value in slot.items()}
        return {**copy.deepcopy(found), "sums": self.sums.values.clone()}


def images(seed: int) -> torch.Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


BAD = {
    "images": (images(3).index_fill(0, torch.tensor(2), math.nan), 1.0),  # loss, gradients and BatchNorm's statistics
    "loss": (images(3), 1e38 * 100),  # finite for each image, infinite after the factor
    "gradient": (images(3), 1.0),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("at", [0, 2], ids=["the first step", "a later step"])
def test_a_refused_step_leaves_no_trace(optimizer: str, bad: str, at: int) -> None:
    """The run with the bad batch in it is, bit for bit, the run without it."""
    with_it, without = Step(optimizer, FP16_LIKE), Step(optimizer, FP16_LIKE)
    for number in range(4):
        if number == at:
            before = with_it.state()
            with_it(BAD[bad][0], factor=BAD[bad][1], spoil=bad == "gradient")
            assert number == 0 or same(with_it.state(), before) == []
        with_it(images(number))
        without(images(number))
    assert same(with_it.state(), without.state()) == []
    assert with_it.guard.settle() == [0, 1]


def test_the_host_learns_of_it_a_step_later_and_at_once_if_it_asks() -> None:
    step = Step()
    step(images(0))
    step(BAD["images"][0])
    with pytest.raises(NonFinite, match="step 2") as caught:
        step(images(1))
    assert caught.value.step == 1
    asked = Step()
    asked(BAD["images"][0])
    with pytest.raises(NonFinite):
        asked.guard.settle()


def test_ten_refusals_in_a_row_are_too_many_and_one_good_step_starts_anew() -> None:
    step = Step(patience=FP16_LIKE)
    for _ in range(2):
        for _ in range(FP16_LIKE - 1):
            step(BAD["loss"][0], factor=math.inf)
        step(images(0))
    assert step.guard.settle() == [0, 2 * (FP16_LIKE - 1)]
    for _ in range(FP16_LIKE):
        step(BAD["loss"][0], factor=math.inf)
    with pytest.raises(NonFinite, match="10 steps in a row"):
        step.guard.settle()


def test_an_infinite_loss_with_finite_gradients_is_told_to_the_others() -> None:
    value = torch.tensor(2.0, requires_grad=True)
    loss = value + math.inf
    loss.backward()
    assert value.grad == 1
    value.grad = None
    felt_by_all(value + math.inf).backward()
    assert value.grad is not None and value.grad.isnan()


def test_the_average_follows_its_definition() -> None:
    model = nn.Linear(3, 2)
    ema = Ema(model, decay=0.75)
    expected = None
    for number in range(4):
        with torch.no_grad():
            model.weight.copy_(torch.full((2, 3), float(number)))
        ema.update(model, skip=torch.tensor(number == 2))
        if number != 2:
            expected = float(number) if expected is None else 0.75 * expected + 0.25 * number
    assert torch.allclose(ema.module.weight, torch.full((2, 3), expected or 0.0))  # type: ignore[arg-type]
    assert ema.updates == 3


def test_a_stop_in_the_step_of_a_poisoned_batch_does_not_hide_it() -> None:
    """The state cannot be saved then; what was wrong is told of as without the stop."""
    told = []

    class Stopped(Trainer):
        def __init__(self) -> None:
            self.runtime = self.observer = self.recent = self  # type: ignore[assignment]
            self.progress = SilentProgress()

        def stop_if_asked(self) -> None:
            raise Preempted

        def save(self) -> None:
            raise NonFinite(4, patience=1)

        def describe(self, step: int, runtime: object) -> str:
            return f"images of step {step + 1}"

        def crashed(self, report: object, *, step: int) -> None:
            told.append((report, step))

    with pytest.raises(NonFinite):
        Stopped().fit()
    assert told == [("images of step 5", 5)]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_poisoned_batch_ends_the_run_and_is_told_of(tiny_dir: Path, tmp_path: Path, processes: int) -> None:
    """In the last rank only: the loss of one image is NaN in step 5, right after the checkpoint of step 4."""
    out = tmp_path / "run"
    arguments = (
        "--data-dir",
        tiny_dir,
        "--out",
        out,
        "--batch-size",
        "16",
        "--epochs",
        "2",
        "--max-steps",
        "12",
        "--checkpoint-every-steps",
        "2",
    )
    finished = run(
        "tests.support.workers.poisoned_train", "5", "smoke", "--device", "cpu", *arguments, processes=processes
    )
    assert finished.returncode == 1, finished.stderr
    assert "not finite in step 5" in finished.stderr
    assert json.loads((out / "status.json").read_text())["state"] == "failed"
    report = json.loads((out / "crash" / "step-00000005.json").read_text())
    assert [len(rank["samples"]) for rank in report["ranks"]] == [16 // processes] * processes
    bad = [
        (rank, place)
        for rank, ours in enumerate(report["ranks"])
        for place, loss in enumerate(ours["losses"])
        if loss is None
    ]
    assert bad == [(processes - 1, 1)]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    train(*arguments, "--resume", processes=processes, module=NARROW)
