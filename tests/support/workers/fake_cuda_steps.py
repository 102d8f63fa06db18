"""Takes steps on the imitation of CUDA. Prints as JSON how many operations each step launched and why the host waited.

Run it with the environment variables that `tests.support.fake_cuda.library.variables` returns.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import ddp_trainer.engine.device_step as device_step
from data_prep.dataset import read_dataset
from data_prep.loader import Batch
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.process_settings import restored_settings
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import StopRequest
from ddp_trainer.engine.build import build_trainer, prepare_network
from ddp_trainer.engine.passes import resolve_passes
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.recipes import RECIPES
from tests.support.fake_cuda.library import Calls, end_process, logged
from tests.support.narrow import changed
from tests.support.workers.fake_cuda_cases import CARELESS, OPTIONS

WARM_STEPS = 3  # the first steps allocate memory and create constants


class Steps:
    """Builds trainers on the dataset in one folder, and logs the CUDA calls of single steps."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir, self.dataset = data_dir, read_dataset(data_dir)

    def trainer(self, config: TrainConfig) -> Trainer:
        config = changed(config, {"data": {"data_dir": self.data_dir, "data_mode": "resident"}})
        runtime = Runtime(config.runtime, stop=StopRequest())
        return build_trainer(config, runtime, self.dataset)

    def calls(self, config: TrainConfig) -> Calls:
        """The calls of one step that uses whole images and no CUDA graph, after WARM_STEPS other steps."""
        config = changed(config, {"runtime": {"graph": "off"}, "schedule": {"small_crops": ""}})
        trainer = self.trainer(config)
        batch, draws = first_batch(trainer)
        for _ in range(WARM_STEPS):
            trainer.train_step(batch, 0, draws)
        with logged() as calls:
            trainer.train_step(batch, 0, draws)
        return calls

    def passes(self, most: int) -> int:
        """The number of passes that --accumulate auto chooses for 64 images if memory holds at most `most` of them."""

        def forward(network: nn.Module, inputs: tuple[Tensor]) -> None:
            if len(inputs[0]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")

        schedule = {"batch_size": 64, "accumulate": "auto"}
        config = changed(RECIPES["smoke"], {"schedule": schedule, "data": {"data_dir": self.data_dir}})
        network, _ = prepare_network(config, self.dataset, world_size=1, load_weights=False)
        network.register_forward_pre_hook(forward)
        runtime = Runtime(config.runtime, stop=StopRequest())
        return resolve_passes(config, runtime, self.dataset, network).schedule.passes


def first_batch(trainer: Trainer) -> tuple[Batch, Tensor]:
    return next(trainer.data.batches(0, slice(None)))


@contextmanager
def careless(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Applies `change` to the losses of all steps in the block."""
    original = device_step.losses_per_image
    device_step.losses_per_image = lambda *args, **options: change(original(*args, **options))
    try:
        yield
    finally:
        device_step.losses_per_image = original


def main(data_dir: Path) -> None:
    steps = Steps(data_dir)

    def report(case: str, config: TrainConfig, change: Callable[[Tensor], Tensor] = lambda losses: losses) -> None:
        with restored_settings(), careless(change):
            calls = steps.calls(config)
        print(json.dumps({"case": case, "operations": calls.operations, "waits": calls.waits}), flush=True)

    for name, recipe in RECIPES.items():
        report(name, recipe)
    for name, sections in OPTIONS.items():
        report(name, changed(RECIPES["fast"], sections))
    for name, change in CARELESS.items():
        report(name, RECIPES["smoke"], change)
    with restored_settings():
        print(json.dumps({"case": "passes", "chosen": {most: steps.passes(most) for most in (64, 16)}}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process()
