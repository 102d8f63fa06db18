"""The warm-up before the first step changes neither the training state nor the random state.

It takes whole steps, and the step guard skips all of them.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.engine.warm_up import take_skipped_steps, warm_up
from tests.support.narrow import narrow_settings, narrow_trainer, single_runtime
from tests.support.stepping import differences, snapshot


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Returns copies of everything that a step changes, except optimizer state that is all zero.

    AdamW creates its state in the first step, even if that is skipped.
    """
    found = snapshot(trainer)
    kept = {name: value for name, value in found.items() if value.any() or not name.startswith("optimizer ")}
    return {**kept, "counts": torch.tensor(trainer.guard.skipped_steps())}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_skipped_steps_do_not_change_the_state(tiny_dir: Path, optimizer: str) -> None:
    config = narrow_settings(tiny_dir, optim={"optimizer": optimizer, "ema_decay": 0.9})
    plain, warmed = (narrow_trainer(config, single_runtime()) for _ in range(2))
    batch = next(iter(warmed.data.loader.batches(warmed.data.plan(0).samples)))
    before = state_of(warmed)
    warmed.device_step.loss_weight = math.nan  # makes the gradients NaN, so that the guard skips the steps
    take_skipped_steps(warmed.device_step.without_graph, warmed.state, batch, [16, 32], steps=2)
    warmed.device_step.loss_weight = 1 / config.schedule.batch_size
    assert differences(state_of(warmed), before) == []
    for trainer in (plain, warmed):
        trainer.train_step(batch, epoch=0)
    assert differences(state_of(warmed), state_of(plain)) == []
    assert not torch.equal(state_of(warmed)["head.weight"], before["head.weight"])


def test_warm_up_with_dropout_does_not_change_the_random_state(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = narrow_settings(tiny_dir)
    trainer = narrow_trainer(config, single_runtime())
    monkeypatch.setattr(trainer.runtime, "world_size", 2)  # a single process on the CPU does not warm up
    trainer.device_step.wrapped = nn.Sequential(trainer.model, nn.Dropout()).train()
    trainer.device_step.loss_weight = math.nan
    before, deviations = torch.get_rng_state(), []
    trainer.device_step.wrapped.register_forward_hook(lambda _, inputs, output: deviations.append(inputs[0].std()))
    warm_up(trainer.state, trainer.device_step.without_graph, config, 32, [16, 32])
    assert torch.equal(torch.get_rng_state(), before)
    assert len(deviations) == 2 * 2
    assert min(deviations) > 0  # some networks fail on blank images
