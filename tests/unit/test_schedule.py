"""The learning rate equals that of torch's OneCycleLR, crops grow during a run, and --freeze-late freezes layers."""

import math

import pytest
import torch
from torch import nn

from data_prep.errors import InputError
from ddp_trainer.schedule import INITIAL_LR_FRACTION, ScheduleConfig


@pytest.mark.parametrize(("total", "warmup"), [(97 * 24, 5 / 24), (6, 5 / 24), (100, 0.3), (7, 0.5)])
def test_learning_rate_equals_torch_one_cycle(total: int, warmup: float) -> None:
    schedule = ScheduleConfig(epochs=1, warmup_fraction=warmup, final_lr_fraction=INITIAL_LR_FRACTION / 1e4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=1.0,
        total_steps=total,
        pct_start=warmup,
        anneal_strategy="linear",
        cycle_momentum=False,
        div_factor=1 / INITIAL_LR_FRACTION,
        final_div_factor=1e4,
    )
    for step in range(total):
        ours = schedule.one_cycle(step, total_steps=total)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        if step < total - 1:
            theirs.step()


@pytest.mark.parametrize("total", [1, 2, 5, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 1.0])
def test_learning_rate_stays_in_its_range_and_reaches_its_peak(total: int, warmup: float) -> None:
    schedule = ScheduleConfig(epochs=1, warmup_fraction=warmup, final_lr_fraction=0.1)
    curve = [schedule.one_cycle(step, total_steps=total) for step in range(total)]
    assert all(INITIAL_LR_FRACTION <= value <= 1.0 for value in curve)
    if total == 1000:
        assert max(curve) == pytest.approx(1.0)
        assert curve[-1] == pytest.approx(0.1 if warmup < 1 else 1.0)


@pytest.mark.parametrize(
    ("small_crops", "total", "sides"),
    [
        ("16:0.286,24:0.714", 7, [16] * 2 + [24] * 3 + [32] * 2),
        ("16:0.25,24:0.75", 4, [16] + [24] * 2 + [32]),
        ("16:0.1,24:0.4", 3, [24] + [32] * 2),
        ("24:0.99", 1, [24]),
        (" 16 : 0.28, 24:0.58", 50, [16] * 14 + [24] * 15 + [32] * 21),
        ("", 3, [32] * 3),
    ],
)
def test_crops_grow_at_the_given_shares_of_the_steps(small_crops: str, total: int, sides: list[int]) -> None:
    schedule = ScheduleConfig(small_crops=small_crops)
    assert [schedule.crop_side(32, step=step, total_steps=total) for step in range(total)] == sides
    assert set(schedule.crop_sides(32)) >= set(sides)
    smaller = ScheduleConfig(small_crops=small_crops, train_size=32)
    assert [smaller.crop_side(40, step=step, total_steps=total) for step in range(total)] == sides


def test_the_work_of_a_step_is_the_area_of_its_crops() -> None:
    schedule, total = ScheduleConfig(small_crops="16:0.2,24:0.5"), 10
    areas = [schedule.crop_side(32, step=step, total_steps=total) ** 2 for step in range(total)]
    for last_step in (1, 4, total):
        for step in range(last_step):
            left = schedule.work_left(32, step=step, last_step=last_step, total_steps=total)
            assert left == sum(areas[step:last_step])


@pytest.mark.parametrize(
    "wrong",
    [
        "16",
        "16:",
        ":0.5",
        "16:0",
        "16:0.0",
        "16:1",
        "9" * 5000 + ":0.5",
        "16:nan",
        "16:0.5,",
        "24:0.3,16:0.5",
        "16:0.5,24:0.3",
        "-16:0.5",
        "²:0.5",
    ],
)
def test_invalid_small_crops_are_refused(wrong: str) -> None:
    with pytest.raises(InputError, match="--small-crops"):
        ScheduleConfig(small_crops=wrong)


def test_learning_rates_reach_zero_when_parameters_are_frozen() -> None:
    schedule = ScheduleConfig(freeze_late="features.0.*", freeze_late_between=(0.5, 0.8))
    factors = [schedule.late_lr_factor(step, total_steps=10) for step in range(10)]
    assert factors == pytest.approx([1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3, 0, 0])
    assert schedule.freeze_step(10) == 8
    assert ScheduleConfig(freeze_late="a", freeze_late_between=(0.5, 0.5)).late_lr_factor(5, total_steps=10) == 0
    assert ScheduleConfig().freeze_step(10) == math.inf


@pytest.mark.parametrize("between", [(0.8, 0.6), (-0.1, 0.5), (0.5, 1.0), (math.nan, 0.5)])
def test_invalid_bounds_of_late_freezing_are_refused(between: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="--freeze-late-between"):
        ScheduleConfig(freeze_late_between=between)


@pytest.mark.parametrize(("epochs", "total", "last"), [(2.5, 250, 250), (0.01, 1, 1), (7, 700, 300), (0.001, 1, 1)])
def test_epochs_may_be_a_fraction(epochs: float, total: int, last: int) -> None:
    schedule = ScheduleConfig(epochs=epochs, batch_size=10, max_steps=300)
    assert (schedule.total_steps(1009), schedule.last_step(1009)) == (total, last)


@pytest.mark.parametrize("epochs", [0, -1, math.inf, math.nan])
def test_number_of_epochs_must_be_positive_and_finite(epochs: float) -> None:
    with pytest.raises(InputError, match="--epochs must be above 0"):
        ScheduleConfig(epochs=epochs)
