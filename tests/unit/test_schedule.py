"""The learning rate equals that of torch's OneCycleLR, and crops grow during a run."""

import pytest
import torch
from torch import nn

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
        ours = schedule.one_cycle(step, steps_per_epoch=total)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        if step < total - 1:
            theirs.step()


@pytest.mark.parametrize("total", [1, 2, 5, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 1.0])
def test_learning_rate_stays_between_its_initial_value_and_its_peak(total: int, warmup: float) -> None:
    schedule = ScheduleConfig(epochs=1, warmup_fraction=warmup, final_lr_fraction=0.1)
    curve = [schedule.one_cycle(step, steps_per_epoch=total) for step in range(total)]
    assert all(INITIAL_LR_FRACTION <= value <= 1.0 for value in curve)
    if total == 1000:
        assert max(curve) == pytest.approx(1.0)
        assert curve[-1] == pytest.approx(0.1 if warmup < 1 else 1.0)


@pytest.mark.parametrize(
    ("fraction", "epochs", "sides"),
    [
        (0.75, 7, [16] * 2 + [24] * 3 + [32] * 2),
        (0.75, 4, [16] + [24] * 2 + [32]),
        (0.75, 2, [24, 32]),
        (0.99, 1, [32]),
        (0.58, 50, [16] * 14 + [24] * 15 + [32] * 21),
        (0.0, 3, [32] * 3),
    ],
)
def test_crops_grow_from_half_the_side_to_the_whole(fraction: float, epochs: int, sides: list[int]) -> None:
    schedule = ScheduleConfig(small_crop_fraction=fraction, epochs=epochs)
    assert [schedule.crop_side(32, epoch=epoch) for epoch in range(epochs)] == sides
    assert schedule.crop_sides(32) == sorted(set(sides))
    smaller = ScheduleConfig(small_crop_fraction=fraction, epochs=epochs, train_size=32)
    assert [smaller.crop_side(40, epoch=epoch) for epoch in range(epochs)] == sides
