"""Runs and times one part of a run. The last line of its output is the number of seconds.

    python -m benchmarks.scaling.work {start,epoch,evaluation,checkpoint,run} DATA_DIR RUN_DIR

`benchmarks.scaling` starts this module for each measurement, and explains the parts. `start` and `run` are timed from
the start of the process. The time of the other parts does not include imports and the construction of the trainer.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.arguments import argument_parser
from data_prep.dataset import read_dataset
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import StopRequest
from ddp_trainer.engine.build import build_trainer
from ddp_trainer.engine.observer import Observer
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.recipes import smoke
from ddp_trainer.run.checkpoint_saver import CheckpointSaver
from ddp_trainer.train import train_here

BATCH_SIZE = 32


def settings(data_dir: Path, run_dir: Path) -> TrainConfig:
    """`smoke` for one whole epoch, with a cheap network and with images that are streamed from the file."""
    config = smoke()
    return replace(
        config,
        data=replace(config.data, data_dir=data_dir, data_mode="stream"),
        network=replace(config.network, network="benchmarks.scaling.network:cheap"),
        schedule=replace(config.schedule, epochs=1, batch_size=BATCH_SIZE, max_steps=None),
        run=replace(config.run, out=run_dir),
    )


class FirstStep(Observer):
    """After the first step, prints the seconds since the process was started, and ends the process."""

    def step_done(self, step: int) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the trainer does not wait for the device before it reports a step
        print(seconds_since_start(), flush=True)
        os._exit(0)


def seconds_since_start() -> float:
    """Seconds since this process was started, imports included."""
    # The start time is field 22. The fields after the program's name, which ends with ")", start with field 3.
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[22 - 3])  # since the start of the system
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


def run_whole(config: TrainConfig, *, only_start: bool) -> None:
    """Trains for one step, evaluates, writes the results and the report, and prints `seconds_since_start`.

    With `only_start`, ends the process after the step.
    """
    config = replace(config, schedule=replace(config.schedule, max_steps=1))
    train_here(config, observer=FirstStep() if only_start else None)
    print(seconds_since_start(), flush=True)


def measure_part(config: TrainConfig, part: Callable[[Trainer], object]) -> None:
    """Builds a trainer, calls `part` with it, and prints the seconds that this call took."""
    runtime = Runtime(config.runtime, stop=StopRequest())
    trainer = build_trainer(config, runtime, read_dataset(config.data.data_dir))
    started = time.perf_counter()
    part(trainer)
    runtime.synchronize()
    print(time.perf_counter() - started, flush=True)


def save(trainer: Trainer) -> None:
    """Saves a checkpoint and waits until it is on the disk."""
    assert trainer.config.run.out is not None
    saver = CheckpointSaver(trainer.config.run.out / "checkpoints", keep=1)
    saver.save(trainer.state.state_dict(), step=0)
    saver.close()


PARTS: dict[str, Callable[[Trainer], object]] = {
    "epoch": lambda trainer: trainer.train_epoch(0),
    "evaluation": lambda trainer: trainer.evaluate(tta=True),
    "checkpoint": save,
}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("part", choices=("start", *PARTS, "run"))
    parser.add_argument("data_dir", type=Path, metavar="DATA_DIR", help="folder of the prepared dataset")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="new folder for the files of the run")
    options = parser.parse_args()
    config = settings(options.data_dir, options.run_dir)
    if options.part in PARTS:
        measure_part(config, PARTS[options.part])
    else:
        run_whole(config, only_start=options.part == "start")


if __name__ == "__main__":
    main()
