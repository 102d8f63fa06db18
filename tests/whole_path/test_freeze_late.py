"""--freeze-late: the first layers learn more and more slowly, then stop. Runs can still be resumed exactly."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from data_prep.dataset import read_dataset
from data_prep.errors import InputError
from ddp_trainer.engine.build import prepare_network
from ddp_trainer.engine.flops import training_flops
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.models.spec import ModelSpec
from tests.support.narrow import narrow_settings, narrow_trainer, single_runtime
from tests.support.stepping import differences

# The run has nine steps. The learning rates of the first two blocks fall after step 3, and both blocks are frozen after
# step 6.
FREEZE: dict[str, Any] = {"epochs": 3, "freeze_late": "features.0.*, features.1.*", "freeze_late_between": (0.3, 0.65)}
FROZEN_AFTER = 6


def trainer_of(data_dir: Path, optimizer: str = "muon") -> Trainer:
    optim = {"optimizer": optimizer, "peak_lr": 0.02, "ema_decay": 0.9, "clip_norm": 1.0}
    return narrow_trainer(narrow_settings(data_dir, schedule=FREEZE, optim=optim), single_runtime())


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def finish(trainer: Trainer) -> None:
    for epoch in range(trainer.state.step // trainer.steps_per_epoch, 3):
        trainer.train_epoch(epoch)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_frozen_layers_keep_their_weights_and_the_others_learn(tiny_dir: Path, optimizer: str) -> None:
    trainer = trainer_of(tiny_dir, optimizer)
    history = [weights(trainer)]
    for epoch in range(3):
        for _ in trainer.steps(epoch):
            history.append(weights(trainer))
    moves = [
        {name: float((after[name] - before[name]).norm()) for name in after}
        for before, after in itertools.pairwise(history)
    ]
    first = [step["features.0.0.weight"] for step in moves]
    assert all(move > 0 for move in first[:FROZEN_AFTER])
    assert first[FROZEN_AFTER:] == [0, 0, 0]
    assert first[FROZEN_AFTER - 1] < first[2] / 2, "the last update before the layers are frozen is not small"
    assert all(step["head.weight"] > 0 for step in moves[:-1])  # the learning rate of the last step is 0
    frozen = {name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in history[0] if name.startswith(("features.0.", "features.1."))}


@pytest.mark.parametrize("step", [2, FROZEN_AFTER - 1, FROZEN_AFTER, FROZEN_AFTER + 1])
def test_resumed_run_equals_the_uninterrupted_one(tiny_dir: Path, step: int) -> None:
    whole = trainer_of(tiny_dir)
    finish(whole)
    stopped, resumed = trainer_of(tiny_dir), trainer_of(tiny_dir)
    for epoch in range(3):
        for done in stopped.steps(epoch, until=step):
            assert done <= step
    resumed.state.load_state_dict(copy.deepcopy(stopped.state.state_dict()))
    assert resumed.state.step == step
    finish(resumed)
    assert differences(weights(resumed), weights(whole)) == []


def test_steps_after_freezing_take_fewer_operations(tiny_dir: Path) -> None:
    """The frozen blocks only compute their outputs. The block after them computes no gradient of its input."""
    config = trainer_of(tiny_dir).config
    spec = ModelSpec.of(read_dataset(tiny_dir), config)
    before, after, whole = (
        training_flops(config, spec, steps=steps, num_images=96) for steps in (FROZEN_AFTER, FROZEN_AFTER + 1, 9)
    )
    one_step = before.network / FROZEN_AFTER
    assert 0.3 * one_step < after.network - before.network < 0.8 * one_step
    assert whole.network == pytest.approx(before.network + 3 * (after.network - before.network))
    assert 0 < after.optimizer - before.optimizer < before.optimizer / FROZEN_AFTER


@pytest.mark.parametrize(
    ("names", "expected"),
    [("head.wight", "--freeze-late head.wight matches no parameter"), ("*", "--freeze-late * leaves nothing to train")],
)
def test_patterns_that_match_no_parameter_or_every_parameter_are_refused(
    tiny_dir: Path, names: str, expected: str
) -> None:
    config = narrow_settings(tiny_dir, schedule={"freeze_late": names})
    with pytest.raises(InputError) as caught:
        prepare_network(config, read_dataset(tiny_dir), world_size=1, load_weights=True)
    assert expected in str(caught.value)
