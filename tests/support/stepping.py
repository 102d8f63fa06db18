"""Takes single steps in this process, with a real trainer and a recipe with a narrow network and small batches."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.dataset import read_dataset
from data_prep.loader import Batch
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import StopRequest
from ddp_trainer.engine.build import build_trainer
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.recipes import RECIPES
from tests.support.narrow import WIDTHS, changed

BATCH = 16
Build = Callable[..., Trainer]


def settings(data_dir: Path, device: torch.device, recipe: str = "fast", **changes: Any) -> TrainConfig:
    """Returns a recipe with a narrow network and small batches.

    `changes`: fields by name, from any section except `run` and `tracking`.
    """
    narrow = {"data_dir": data_dir, "device": device.type, "widths": WIDTHS, "batch_size": BATCH, "epochs": 1}
    changes = narrow | changes
    config = RECIPES[recipe]
    for section in ("data", "augment", "network", "schedule", "optim", "runtime"):
        part = getattr(config, section)
        own = {name: changes.pop(name) for name in list(changes) if hasattr(part, name)}
        config = changed(config, {section: own})
    assert not changes
    return config


def build_for(data_dir: Path, device: torch.device) -> Build:
    """Returns a function that builds a trainer from `settings`. Call that function within `restored_settings`."""

    def build(recipe: str = "fast", **changes: Any) -> Trainer:
        config = settings(data_dir, device, recipe, **changes)
        runtime = Runtime(config.runtime, stop=StopRequest())
        return build_trainer(config, runtime, read_dataset(data_dir))

    return build


def batches(trainer: Trainer, count: int) -> list[Batch]:
    order = np.random.default_rng(0).permutation(96)[: count * BATCH].reshape(count, BATCH)
    return list(trainer.data.loader.batches(order))


def take(trainer: Trainer, steps: range) -> None:
    """Takes `steps` (numbered from 0). Step N augments its images as in epoch N. Steps 0 to 5 use every crop size."""
    held = batches(trainer, 6)
    for step in steps:
        trainer.train_step(held[step % 6], epoch=step)


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    """Returns copies of the weights, buffers, running sums of the metrics, EMA and optimizer state."""
    found = {**trainer.model.state_dict(), "sums": trainer.state.sums.values}
    if trainer.state.ema is not None:
        found |= {f"ema {name}": value for name, value in trainer.state.ema.state_dict().items()}
    for number, slot in trainer.state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer {number} {name}": value for name, value in slot.items()}
    return {name: torch.as_tensor(value).detach().cpu().clone() for name, value in found.items()}


def differences(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the tensors that differ. Both mappings must have the same names."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]
