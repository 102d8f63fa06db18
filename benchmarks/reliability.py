"""What safety costs the step loop: a save, the agreement on a stop, the guard against numbers that are not finite.

    {python | accelerate launch ...} -m benchmarks.reliability [--batch-size N] [--rounds N] [--result FILE]

save:   seconds that `Trainer.save` holds the loop up, the state being copied and written in the background; beside it
        the seconds until the checkpoint is on the disk.
stop:   seconds of announce and answer with nothing between them. In the loop a step lies between, so this is the most
        that it can cost. Of interest under several processes only.
guard:  seconds of what the guard adds to a step: remember, judge and put back, send the count.

Medians over the rounds, with a step of the trainer beside them.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.results import write_result
from data_prep.augment import Augmenter
from data_prep.loader import Batch
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import StopRequest
from ddp_trainer.engine.data import RunData
from ddp_trainer.engine.evaluation import Evaluator
from ddp_trainer.engine.observer import SilentObserver
from ddp_trainer.engine.optim import build_optimizer
from ddp_trainer.engine.train_state import capture_state
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.models.spec import ModelSpec, build_model
from ddp_trainer.recipes import baseline
from ddp_trainer.run.checkpoint_saver import CheckpointSaver, size_in_bytes


class SavingObserver(SilentObserver):
    """Saves, and does nothing else."""

    def __init__(self, checkpoint_saver: CheckpointSaver | None) -> None:
        super().__init__()
        self.checkpoint_saver = checkpoint_saver

    def save(self, state: dict[str, Any], *, step: int, epoch: int) -> None:
        if self.checkpoint_saver is not None:
            self.checkpoint_saver.save(state, step=step)


def build_trainer(runtime: Runtime, batch_size: int, observer: SavingObserver) -> tuple[Trainer, Batch]:
    """With an average of the weights, as the largest state has it; the images are noise."""
    config = baseline()
    config = replace(
        config,
        schedule=replace(config.schedule, batch_size=batch_size),
        optim=replace(config.optim, ema_decay=0.99),
    )
    spec = ModelSpec(classes=tuple("abcdefghij"), mean=(0.5,) * 3, std=(0.25,) * 3, image_size=32)  # type: ignore[arg-type]
    share = batch_size // runtime.world_size
    images = torch.randint(0, 256, (share, 3, 32, 32), dtype=torch.uint8, device=runtime.device)
    batch = Batch(
        images.contiguous(memory_format=torch.channels_last),
        torch.randint(0, 10, (share,), device=runtime.device),
        torch.arange(share, device=runtime.device),
    )
    augmenter = Augmenter(config.augment, mean=spec.mean, std=spec.std, seed=0)
    model = build_model(spec)
    evaluator = Evaluator(SimpleNamespace(batch_size=500), np.arange(10_000), spec, runtime)  # type: ignore[arg-type]
    data = RunData(loader=None, samples=np.arange(50_000), augmenter=augmenter, evaluator=evaluator)  # type: ignore[arg-type]
    return Trainer(config, runtime, model, build_optimizer(model, config.optim), data, observer), batch


def seconds_of(work: Callable[[], object], runtime: Runtime) -> float:
    runtime.synchronize()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def one_round(
    trainer: Trainer, batch: Batch, runtime: Runtime, checkpoint_saver: CheckpointSaver | None
) -> dict[str, float]:
    def step() -> None:
        trainer.train_step(batch, epoch=0)
        trainer.guard.after_step(trainer.step - 1)
        runtime.synchronize()

    def stop() -> None:
        runtime.stop.announce()
        runtime.stop.agreed()

    def guard() -> None:
        trainer.guard.begin()
        trainer.guard.judge()
        trainer.guard.after_step(trainer.step)
        runtime.synchronize()

    found = {"step": seconds_of(step, runtime), "save_stall": seconds_of(trainer.save, runtime)}
    found["save_until_on_disk"] = found["save_stall"] + seconds_of(
        checkpoint_saver.wait if checkpoint_saver else lambda: None, runtime
    )
    found["stop"] = statistics.median(seconds_of(stop, runtime) for _ in range(100))
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found["guard"] = statistics.median(seconds_of(guard, runtime) for _ in range(10))
    trainer.bare_optimizer.zero_grad(set_to_none=False)  # DDP's buckets keep their gradients
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--result", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    runtime = Runtime(baseline().runtime, stop=StopRequest())
    with tempfile.TemporaryDirectory() as folder:
        checkpoint_saver = CheckpointSaver(Path(folder) / "checkpoints", keep=2) if runtime.is_main else None
        trainer, batch = build_trainer(runtime, options.batch_size, SavingObserver(checkpoint_saver))
        rounds = [one_round(trainer, batch, runtime, checkpoint_saver) for _ in range(options.rounds + 1)][1:]
        state_bytes = size_in_bytes(capture_state(trainer))
        if checkpoint_saver is not None:
            checkpoint_saver.close()
    figures = {f"{name}_milliseconds": 1000 * statistics.median(r[name] for r in rounds) for name in rounds[0]}
    figures["state_megabytes"] = state_bytes / 1e6
    if runtime.is_main:
        for name, value in figures.items():
            print(f"{name:32} {value:12.3f}")
        if options.result:
            write_result(
                options.result,
                figures,
                batch_size=options.batch_size,
                rounds=len(rounds),
                precision=runtime.precision,
                world_size=runtime.world_size,
            )
    runtime.close()


if __name__ == "__main__":
    main()
