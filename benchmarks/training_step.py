"""Compares the speed of the trainer's step with that of plain PyTorch loops.

    python -m benchmarks.training_step [--recipe NAME] [--side N] [--loops NAME ...] [--rounds N] [--steps N]
                                       [--result FILE] [flags of the trainer, such as --network or --batch-size]

ours:          Trainer.train_step with all that a real step does: augmentation, schedule, metrics, step guard, and the
               check whether any process was asked to stop.
ours_no_graph: the same as `ours`, but with `--graph off`; on a GPU only.
bare:          only forward, backward and a step of SGD (even if the recipe has another optimizer), on a fixed batch;
               the model, precision and memory format are those of `ours`.
bare_graph:    a step of `bare`, replayed as one CUDA graph; on a GPU only.
newcomer:      the loop of most tutorials: fp32, NCHW, an optimizer that is not fused, and `.item()` in each step.

Each loop runs in its own process, so that the trainer's settings, such as those of the memory allocator, do not affect
the other loops. In each round, every loop runs `--steps` steps, so that a change in the machine's speed affects all
loops. The results are images/s and their ratios, as medians over rounds. On a GPU, the output also has, for one step of
each loop, the milliseconds on the host and on the GPU, and the number of GPU operations.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import argument_parser
from benchmarks.gpu_cost import gpu_cost
from benchmarks.loops import LOOPS, Step, available_loops
from benchmarks.results import write_result
from data_prep.dataset import read_dataset
from data_prep.errors import InputError, require
from ddp_trainer.command_line import parse_flags, run_command, take_recipe
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.hardware import resolve_device, resolve_precision
from ddp_trainer.recipes import RECIPES
from ddp_trainer.run.checks import SMALLEST_SIDE, check_batch


def serve(name: str, config: TrainConfig, side: int, requests: Connection) -> None:
    """Runs in its own process. For each number that it receives, it takes that many steps and sends back images/s.

    If the number is 0, it sends back the costs of a step (an empty dict without a GPU) and ends.
    """
    step = LOOPS[name](config, side)
    while steps := requests.recv():
        requests.send(rate(step, config.schedule.batch_size, steps))
    requests.send(gpu_cost(step) if resolve_device(config.runtime) == "cuda" else {})


def rate(step: Step, batch_size: int, steps: int) -> float:
    """Returns images/s over `steps` steps."""
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    return steps * batch_size / (time.perf_counter() - start)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(
    config: TrainConfig, side: int, *, loops: Sequence[str], rounds: int, steps: int
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Returns the images/s of each loop, as one dict per round, and a dict of the costs of a step.

    Without a GPU, the dict of costs is empty. Costs have names such as ours_host_milliseconds. Raises InputError if a
    loop fails.
    """
    context = get_context("spawn")
    running: dict[str, Connection] = {}
    for name in loops:
        running[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, config, side, theirs), daemon=True).start()
        theirs.close()  # so that `recv` raises if the process of a loop dies
    measured: list[dict[str, float]] = []
    for number in range(rounds + 1):
        rates = {name: ask(name, loop, steps) for name, loop in running.items()}
        if number > 0:  # round 0 is the warm-up
            measured.append(rates)
            print(f"round {number}: " + "  ".join(f"{name} {value:8.1f}" for name, value in rates.items()), flush=True)
    costs = {}
    for name, loop in running.items():
        costs |= {f"{name}_{kind}": value for kind, value in ask(name, loop, 0).items()}
    return measured, costs


def ask(name: str, loop: Connection, steps: int) -> Any:
    """Sends `steps` to the process of a loop and returns its answer. Raises InputError if the process has ended."""
    try:
        loop.send(steps)
        return loop.recv()
    except (EOFError, OSError):
        raise InputError(f"the loop {name} has failed; its error is above") from None


def summarize(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians over rounds: images/s of each loop, and the ratio of `ours` to every other loop."""
    names = list(rounds[0])
    figures = {f"{name}_images_per_second": statistics.median(r[name] for r in rounds) for name in names}
    for other in names if "ours" in names else []:
        if other != "ours":
            figures[f"ours_beside_{other}"] = statistics.median(r["ours"] / r[other] for r in rounds)
    return figures


def parse_options(argv: Sequence[str] | None) -> tuple[argparse.Namespace, TrainConfig]:
    """The options of this benchmark, and the recipe with the trainer's flags applied."""
    epilog = "All other flags are those of the trainer, such as --network, --batch-size, --data-dir or --precision."
    parser = argument_parser(__doc__, epilog)
    parser.add_argument("--recipe", choices=RECIPES, default="baseline")
    parser.add_argument(
        "--side",
        type=int,
        help="side of the crops in pixels; default: --train-size if set, else the side of the images",
    )
    parser.add_argument("--loops", nargs="+", choices=LOOPS, help="loops to run; default: all that this device can run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps of each loop in a round; default: 100 on a GPU, 2 on a CPU")
    parser.add_argument("--result", type=Path, help="write the figures here as JSON")
    options, flags = parser.parse_known_args(argv)
    recipe, flags = take_recipe([options.recipe, *flags])
    recipe = replace(recipe, data=replace(recipe.data, data_dir=Path("data/synthetic"), data_mode="resident"))
    config = parse_flags(TrainConfig, flags, prog="python -m benchmarks.training_step", default=recipe)
    # On a GPU, the rate is meaningful only if many steps are queued.
    if options.steps is None:
        options.steps = 100 if resolve_device(config.runtime) == "cuda" else 2
    return options, config


def main(argv: Sequence[str] | None = None) -> None:
    options, config = parse_options(argv)
    dataset = read_dataset(config.data.data_dir)
    side = options.side or config.schedule.train_size or dataset.image_size
    require(
        SMALLEST_SIDE <= side <= dataset.image_size,
        f"--side must be {SMALLEST_SIDE} to {dataset.image_size} pixels, got {side}",
    )
    check_batch(config, num_images=dataset.splits["train"].count, world_size=1)
    loops = options.loops or available_loops(config)
    rounds, costs = measure(config, side, loops=loops, rounds=options.rounds, steps=options.steps)
    figures = summarize(rounds) | costs
    for name, value in figures.items():
        print(f"{name:32} {value:10.3f}")
    if options.result:
        write_result(
            options.result,
            figures,
            recipe=config.recipe,
            network=config.network.network,
            batch_size=config.schedule.batch_size,
            side=side,
            rounds=len(rounds),
            precision=resolve_precision(config.runtime),
            device=resolve_device(config.runtime),
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
