"""Trains six steps with each value of --gradient-compression, once without a break and once resumed after three steps.

Each rank writes its weights (at the start, after the first step and at the end) to OUT/RANK.pt.
Arguments: DATA_DIR OUT.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddp_trainer.config import RuntimeConfig, TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.trainer import Trainer
from tests.support.narrow import narrow_settings, narrow_trainer

STEPS = 6


def build(config: TrainConfig, runtime: Runtime) -> Trainer:
    torch.manual_seed(0)  # the same initial weights for each trainer
    return narrow_trainer(config, runtime)


def train(trainer: Trainer, until: int) -> None:
    for step in trainer.steps(0):
        if step == until:
            break


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def main(argv: Sequence[str]) -> None:
    data_dir, out = map(Path, argv)
    found: dict[str, Tensor] = {}
    for compression in ("none", "bf16"):
        runtime = Runtime(RuntimeConfig(device="cpu", precision="fp32", gradient_compression=compression))  # type: ignore[arg-type]
        config = narrow_settings(data_dir, schedule={"batch_size": 16, "epochs": 1})
        whole, first, second = (build(config, runtime) for _ in range(3))
        found["start"] = weights(whole)
        train(whole, 1)
        found[f"{compression}, first step"] = weights(whole)
        train(whole, STEPS)
        train(first, STEPS // 2)
        second.state.load_state_dict(first.state.state_dict())
        train(second, STEPS)
        found |= {compression: weights(whole), f"{compression}, resumed": weights(second)}
    torch.save(found, out / f"{runtime.rank}.pt")
    runtime.close()
