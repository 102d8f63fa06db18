"""The training state: a saved state is restored exactly, and the state of another network is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.errors import InputError
from ddp_trainer.engine.train_state import KEYS, require_fitting
from ddp_trainer.engine.trainer import Trainer
from tests.support.narrow import narrow_settings, narrow_trainer, single_runtime
from tests.support.stepping import differences

BUFFER = "model.features.0.1.running_mean"


def trainer_with_average(data_dir: Path) -> Trainer:
    """Returns a trainer with a narrow network and a moving average of its weights, which has its own buffers."""
    return narrow_trainer(narrow_settings(data_dir, optim={"ema_decay": 0.9}), single_runtime())


@pytest.fixture(scope="module")
def saved(tiny_dir: Path) -> dict[str, Any]:
    trainer = trainer_with_average(tiny_dir)
    next(trainer.steps(0))
    return trainer.state.state_dict()


def test_state_has_the_keys_that_a_checkpoint_needs(saved: dict[str, Any]) -> None:
    assert saved.keys() == KEYS


def test_restored_state_equals_the_saved_one(saved: dict[str, Any], tiny_dir: Path) -> None:
    trainer = trainer_with_average(tiny_dir)
    trainer.state.load_state_dict(saved)
    again = trainer.state.state_dict()
    assert again["step"] == 1
    for part in ("model", "ema", "buffers"):
        assert differences(saved[part], again[part]) == []
    assert torch.equal(again["sums"], saved["sums"])


def rename(buffers: dict[str, torch.Tensor]) -> None:
    """Renames a buffer but keeps the order, so loading by position would still succeed."""
    renamed = {name.replace(BUFFER, "model.features.0.1.other"): rows for name, rows in buffers.items()}
    buffers.clear()
    buffers.update(renamed)


def reshape(buffers: dict[str, torch.Tensor]) -> None:
    """Keeps only one value of a buffer. A plain copy into the network would broadcast this value to every channel."""
    buffers[BUFFER] = buffers[BUFFER][:, :1]


DAMAGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "renamed": rename,
    "missing": lambda buffers: buffers.pop(BUFFER),
    "another shape": reshape,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoint_with_other_buffers_is_refused(saved: dict[str, Any], tiny_dir: Path, damage: str) -> None:
    state, trainer = {**saved, "buffers": dict(saved["buffers"])}, trainer_with_average(tiny_dir)
    DAMAGES[damage](state["buffers"])
    before = copy.deepcopy(trainer.state.state_dict()["model"])
    with pytest.raises(InputError, match=r"differ from those of the network \(.*features\.0\.1\.") as caught:
        trainer.state.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert trainer.state.step == 0
    after = trainer.state.state_dict()["model"]
    assert differences(after, before) == [], "some weights were loaded"


def test_checkpoint_with_other_trained_parameters_is_refused(saved: dict[str, Any], tiny_dir: Path) -> None:
    network = trainer_with_average(tiny_dir).model
    require_fitting(network, saved)
    next(network.parameters()).requires_grad_(False)
    with pytest.raises(InputError, match="different: which parameters are trained"):
        require_fitting(network, saved)


def test_the_state_of_two_ranks_can_be_restored_on_one(saved: dict[str, Any], tiny_dir: Path) -> None:
    state = {**saved, "generators": saved["generators"].repeat(2, 1)}
    state["sums"] = torch.cat([saved["sums"], 3 * saved["sums"]])
    state["buffers"] = {name: torch.cat([rows, rows + 2]) for name, rows in saved["buffers"].items()}
    trainer = trainer_with_average(tiny_dir)
    trainer.state.load_state_dict(state)
    assert torch.equal(trainer.state.sums.values, state["sums"].sum(dim=0))
    for name, rows in trainer.state.state_dict()["buffers"].items():
        # The variance over the images of both ranks is the average of the two variances plus that of the two means.
        between = 1 if name.endswith("running_var") else 0
        torch.testing.assert_close(rows, saved["buffers"][name] + 1 + between, rtol=1e-6, atol=1e-6)
