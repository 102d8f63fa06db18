"""A training step never waits for its own results and never mixes devices, in any recipe or with any of `OPTIONS`.

The steps run on the meta device (see `MetaRuntime`), so no GPU is needed. Autocast and cuDNN do not exist there and are
not covered. The wait for the previous step is left out (see `NoHostCopy`).
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddp_trainer.engine import device_step, step_guard
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.recipes import RECIPES
from tests.support.blank_steps import MetaRuntime, blank_batch, blank_trainer
from tests.support.narrow import Sections, changed

META = torch.device("meta")


class NoHostCopy:
    """Replaces HostCopy, which copies values to the host. `read` returns zeros, as meta tensors have no values."""

    def __init__(self, values: Tensor) -> None:
        self._values = torch.zeros(values.shape, dtype=values.dtype)

    def read(self, **options: float) -> Tensor:
        return self._values


@pytest.fixture(autouse=True)
def _no_host_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_guard, "HostCopy", NoHostCopy)


OPTIONS: list[Sections] = [
    {"optim": {"optimizer": "sgd"}},
    {"optim": {"optimizer": "adamw"}},
    {"optim": {"optimizer": "muon"}},
    {"optim": {"ema_decay": 0.9}},
    {"optim": {"clip_norm": 1.0}},
    {"schedule": {"accumulate": 2}},
    {"schedule": {"freeze_late": "features.0.*"}},
    {"augment": {"mixup": 1.0}},
    {"augment": {"cutmix": 1.0}},
    {"augment": {"brightness": 0.1, "contrast": 0.1}},
    {"augment": {"cutout": 0, "flip": "none", "crop_padding": 0}},
    {"optim": {"optimizer": "muon", "ema_decay": 0.9, "clip_norm": 1.0}, "schedule": {"accumulate": 2}},
]


def trainer_of(recipe: str, *changes: Sections) -> Trainer:
    config = changed(RECIPES[recipe], *changes)
    return blank_trainer(config, MetaRuntime(config.runtime))


def take_steps(trainer: Trainer) -> None:
    """Takes one step at each crop size and, with --freeze-late, the step that freezes parameters."""
    schedule, total = trainer.config.schedule, trainer.total_steps
    first_steps = {0, *(round(share * total) for _, share in schedule.crop_phases)}
    for step in sorted(first_steps | ({int(trainer.freeze_step)} if schedule.freeze_late else set())):
        trainer.state.step = step
        trainer.train_step(blank_batch(schedule.batch_size, META), epoch=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_step_of_a_recipe_does_not_wait(recipe: str) -> None:
    take_steps(trainer_of(recipe))


@pytest.mark.parametrize("settings", OPTIONS, ids=str)
def test_step_with_an_option_does_not_wait(settings: Sections) -> None:
    take_steps(trainer_of("baseline", settings))


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda loss: loss.item(),
    "bool": lambda loss: bool(loss > 0),
    "nonzero": lambda loss: loss.nonzero(),
    "boolean index": lambda loss: loss.expand(2)[loss.expand(2) > 0],
    "copy to the host": lambda loss: loss.cpu(),
    "two devices": lambda loss: loss + torch.zeros(1),
}


@pytest.mark.parametrize("wait", WAITS)
def test_waiting_or_mixing_devices_within_a_step_raises_an_error(monkeypatch: pytest.MonkeyPatch, wait: str) -> None:
    trainer, plain = trainer_of("smoke"), device_step.weights_if_finite

    def waiting(weight: float, losses: Tensor) -> Tensor:
        WAITS[wait](losses.detach().sum())
        return plain(weight, losses)

    monkeypatch.setattr(device_step, "weights_if_finite", waiting)
    with pytest.raises((RuntimeError, NotImplementedError)):
        take_steps(trainer)
