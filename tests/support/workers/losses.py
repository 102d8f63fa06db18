"""Writes the loss of the global batch at each step. Arguments: DATA_DIR OUT NAME=STEPS ...

NAME is float32, float64, balanced or accumulated. `balanced` uses float64, mixup, `--balance batches` and classes of
unequal size, and freezes the first layers after 11 steps. `accumulated` uses float64, `--accumulate 2`, and a network
without BatchNorm: the number of ranks determines which images are in the same pass, so BatchNorm would compute other
values for each number of ranks. The other cases synchronize BatchNorm. The networks are narrow, so that float64 on a
CPU takes only seconds.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ddp_trainer.config import RuntimeConfig, TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.metrics import averages
from ddp_trainer.engine.trainer import Trainer
from tests.support.narrow import Sections, changed, narrow_settings, narrow_trainer


def settings(data_dir: Path, name: str) -> TrainConfig:
    """Returns the settings, with a low learning rate for float32.

    In float32, rounding sometimes changes which element is the maximum of a pooling window. A high learning rate would
    amplify that difference from step to step. In float64 this does not happen, so the recipe's learning rate is kept.
    """
    changes: dict[str, Sections] = {
        "float32": {"optim": {"peak_lr": 0.001}},
        "balanced": {
            "data": {"balance": "batches", "validation": 37},
            "augment": {"mixup": 0.5},
            "schedule": {"freeze_late": "features.0.*", "freeze_late_between": (0.01, 0.03)},
        },
        "accumulated": {"schedule": {"accumulate": 2}},
    }
    return changed(narrow_settings(data_dir, schedule={"epochs": 20}), changes.get(name, {}))


def network_of(name: str) -> nn.Module | None:
    """Returns the network of a case; None stands for the narrow network of the settings."""
    if name != "accumulated":
        return None
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 10))


def losses_of(trainer: Trainer, steps: int) -> list[float]:
    """Returns the loss of each of the first `steps` steps, averaged over the images of all ranks."""
    losses: list[float] = []
    for _ in itertools.chain.from_iterable(map(trainer.steps, itertools.count())):
        losses.append(averages(trainer.runtime.sum_over_ranks(trainer.state.sums.values.clone())).loss)
        trainer.state.sums.reset()
        if len(losses) == steps:
            break
    return losses


def main(argv: Sequence[str]) -> None:
    data_dir, out, *parts = argv
    steps_of = dict(part.split("=") for part in parts)
    runtime = Runtime(RuntimeConfig(device="cpu", precision="fp32", sync_bn=True))
    for name, steps in steps_of.items():
        dtype = torch.float32 if name == "float32" else torch.float64
        config = settings(Path(data_dir), name)
        losses = losses_of(narrow_trainer(config, runtime, dtype=dtype, network=network_of(name)), int(steps))
        if runtime.is_main:
            (Path(out) / f"{name}-{runtime.world_size}.json").write_text(json.dumps(losses))
    runtime.close()
