"""Measures how much time the training loop spends on checkpoints, stop requests and the NaN guard.

    {python | accelerate launch ...} -m benchmarks.reliability [--data-dir DIR] [--batch-size N] [--rounds N]
                                                               [--result FILE]

save:   the time for which `Trainer.save` blocks the loop to copy the state, and the time until a background thread
        has written the checkpoint to the disk.
stop:   the time that the ranks need to agree whether to stop: `runtime.stop.announce` starts the exchange, and
        `runtime.stop.agreed` waits for its result. In the training loop, a step runs between the two calls and hides
        part of that time, so the result is an upper bound. With one process, there is no exchange.
guard:  how much longer an optimizer step takes with `StepGuard`, which skips steps with non-finite gradients, than with
        `PlainGuard`, which checks nothing. The gradients are zeros, so no forward or backward pass is needed.

The results are medians over rounds, in milliseconds. For comparison, the time of a whole step and the size of the state
are printed as well.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.arguments import argument_parser
from benchmarks.loops import first_batch
from benchmarks.results import write_result
from data_prep.dataset import read_dataset
from data_prep.loader import Batch
from ddp_trainer.command_line import run_command
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import StopRequest
from ddp_trainer.engine.build import build_trainer
from ddp_trainer.engine.observer import Observer
from ddp_trainer.engine.step_guard import Decision
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.recipes import baseline
from ddp_trainer.run.checkpoint_saver import CheckpointSaver, size_in_bytes


class SavingObserver(Observer):
    """Saves checkpoints and ignores everything else."""

    def __init__(self, saver: CheckpointSaver) -> None:
        super().__init__()
        self.saver = saver

    def save(self, state: dict[str, Any], *, step: int, epoch: int) -> None:
        self.saver.save(state, step=step)


class Guard(Protocol):
    def attempt(self) -> contextlib.AbstractContextManager[Decision]: ...


class PlainGuard:
    """A guard that checks nothing and takes every optimizer step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @contextlib.contextmanager
    def attempt(self) -> Iterator[Decision]:
        yield Decision()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def settings(data_dir: Path, batch_size: int) -> TrainConfig:
    """Returns `baseline` with a moving average of the weights, which makes the checkpoint larger."""
    config = baseline()
    return replace(
        config,
        data=replace(config.data, data_dir=data_dir, data_mode="resident"),
        schedule=replace(config.schedule, batch_size=batch_size),
        optim=replace(config.optim, ema_decay=0.99),
    )


def seconds_of(work: Callable[[], object], runtime: Runtime) -> float:
    runtime.synchronize()
    start = time.perf_counter()
    work()
    runtime.synchronize()
    return time.perf_counter() - start


def measure_round(trainer: Trainer, batch: Batch, saver: CheckpointSaver | None) -> dict[str, float]:
    """Returns the seconds of each measured part, by name."""
    runtime = trainer.runtime

    def stop() -> None:
        runtime.stop.announce()
        runtime.stop.agreed()

    def step_without_passes(guard: Guard) -> None:
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with guard.attempt():
            pass

    step = seconds_of(lambda: trainer.train_step(batch, epoch=0), runtime)
    stall = seconds_of(trainer.save, runtime)
    on_disk = stall + seconds_of(saver.wait if saver else lambda: None, runtime)
    guarded, plain = (
        statistics.median(seconds_of(lambda: step_without_passes(guard), runtime) for _ in range(10))  # noqa: B023
        for guard in (trainer.guard, PlainGuard(trainer.state.optimizer))
    )
    return {
        "step": step,
        "save_stall": stall,
        "save_until_on_disk": on_disk,
        "stop": statistics.median(seconds_of(stop, runtime) for _ in range(100)),
        "guard": guarded - plain,
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data/synthetic"))
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--result", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    config = settings(options.data_dir, options.batch_size)
    runtime = Runtime(config.runtime, stop=StopRequest())
    with tempfile.TemporaryDirectory() as folder:
        saver = CheckpointSaver(Path(folder) / "checkpoints", keep=2) if runtime.is_main else None
        observer = Observer() if saver is None else SavingObserver(saver)
        trainer = build_trainer(config, runtime, read_dataset(options.data_dir), observer=observer)
        batch = first_batch(trainer.data.loader)
        rounds = [measure_round(trainer, batch, saver) for _ in range(options.rounds + 1)][1:]
        state_bytes = size_in_bytes(trainer.state.state_dict())
        if saver is not None:
            saver.close()
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
                device=runtime.device.type,
            )
    runtime.close()


if __name__ == "__main__":
    sys.exit(run_command(main))
