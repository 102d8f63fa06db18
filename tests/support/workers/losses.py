"""Writes the loss of the global batch at each step: `DATA_DIR OUT DTYPE=STEPS ...`, alone or under the launcher.

BatchNorm is synchronised. A narrow network, so that float64 on a CPU takes seconds.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data_prep.augment import Augmenter
from data_prep.dataset import read_dataset
from data_prep.loader import build_loader
from ddp_trainer.config import RuntimeConfig, TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.data import RunData
from ddp_trainer.engine.evaluation import Evaluator
from ddp_trainer.engine.metrics import averages
from ddp_trainer.engine.observer import SilentObserver
from ddp_trainer.engine.optim import build_optimizer
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.models.custom_resnet import CustomResNet
from ddp_trainer.models.spec import ModelSpec
from ddp_trainer.recipes import smoke


def settings(dtype: torch.dtype) -> TrainConfig:
    config = smoke()
    # In float32 rounding sometimes turns the maximum of a pooling window into another one: a jump that a high rate
    # carries on from step to step. In float64 it does not, and the recipe's rate is kept.
    peak_lr = config.optim.peak_lr if dtype == torch.float64 else 0.001
    return replace(
        config,
        schedule=replace(config.schedule, epochs=20, batch_size=32, max_steps=None),
        optim=replace(config.optim, peak_lr=peak_lr),
    )


def build_trainer(config: TrainConfig, data_dir: Path, dtype: torch.dtype, runtime: Runtime) -> Trainer:
    dataset = read_dataset(data_dir)
    spec = ModelSpec(classes=dataset.classes, mean=dataset.mean, std=dataset.std, image_size=32)
    share = 32 // runtime.world_size
    beton = data_dir / dataset.splits["train"].file
    loader = build_loader(beton, mode="resident", device=runtime.device, batch_size=share, num_workers=1)
    model = CustomResNet(widths=(8, 8, 16, 16)).to(dtype)
    augmenter = Augmenter(config.augment, mean=spec.mean, std=spec.std, seed=0, dtype=dtype)
    samples = np.arange(dataset.splits["train"].count)
    evaluator = Evaluator(loader, samples, spec, runtime)
    data = RunData(loader=loader, samples=samples, augmenter=augmenter, evaluator=evaluator)
    return Trainer(config, runtime, model, build_optimizer(model, config.optim), data, SilentObserver())


def losses_of(trainer: Trainer, steps: int) -> list[float]:
    losses: list[float] = []
    for epoch in range(trainer.config.schedule.epochs):
        for batch in trainer.data.loader.batches(
            trainer.data.plan(epoch, config=trainer.config, runtime=trainer.runtime)
        ):
            trainer.state.sums.reset()
            trainer.train_step(batch, epoch)
            losses.append(averages(trainer.runtime.sum_over_ranks(trainer.state.sums.values.clone())).loss)
            if len(losses) == steps:
                return losses
    raise ValueError(f"{steps} steps are more than the training has")


def main(data_dir: Path, out: Path, parts: dict[str, int]) -> None:
    runtime = Runtime(RuntimeConfig(device="cpu", precision="fp32", sync_bn=True))
    for dtype, steps in parts.items():
        kind = getattr(torch, dtype)
        losses = losses_of(build_trainer(settings(kind), data_dir, kind, runtime), steps)
        if runtime.is_main:
            (out / f"{dtype}-{runtime.world_size}.json").write_text(json.dumps(losses))
    runtime.close()


if __name__ == "__main__":
    steps_of = dict(part.split("=") for part in sys.argv[3:])
    main(Path(sys.argv[1]), Path(sys.argv[2]), {dtype: int(steps) for dtype, steps in steps_of.items()})
