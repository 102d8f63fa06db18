"""Compares the speed of the trainer's step with that of two plain PyTorch loops.

    python -m benchmarks.training_step [--data-dir DIR] [--batch-size N] [--rounds N] [--steps N] [--result FILE]

ours:     Trainer.train_step with all its parts: augmentation, schedule, metrics, guard, and the agreement on a stop.
bare:     the same model, precision and memory format, but only forward, backward and optimizer step on a fixed batch.
newcomer: the loop of most tutorials: fp32, NCHW, an optimizer that is not fused, and `.item()` in each step.

Each loop runs in its own process, so that they do not share settings of the memory allocator. In each round, every loop
runs a few steps. The results are images/s and ratios of images/s, each as the median over rounds, so that a change in
the machine's speed does not favor one of the loops.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.results import write_result
from data_prep.batch_ops import batch_normalize
from data_prep.dataset import read_dataset
from data_prep.loader import Batch, ResidentLoader, StreamLoader, build_loader
from ddp_trainer.distributed.backend import set_backend_flags
from ddp_trainer.distributed.hardware import resolve_device, resolve_precision
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import StopRequest
from ddp_trainer.engine.build import build_trainer
from ddp_trainer.models.spec import ModelSpec, build_model
from ddp_trainer.recipes import baseline

Step = Callable[[], object]


def our_step(data_dir: Path, batch_size: int) -> Step:
    config = baseline()
    config = replace(
        config,
        data=replace(config.data, data_dir=data_dir, data_mode="resident"),
        schedule=replace(config.schedule, batch_size=batch_size),
    )
    runtime = Runtime(config.runtime, stop=StopRequest())
    trainer = build_trainer(config, runtime, read_dataset(data_dir))
    batch = first_batch(trainer.data.loader)

    def step() -> None:
        runtime.stop.announce()
        trainer.train_step(batch, epoch=0)
        runtime.stop.agreed()

    return step


def bare_step(data_dir: Path, batch_size: int) -> Step:
    set_backend_flags(baseline().runtime)
    model, images, labels = ready(data_dir, batch_size)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    precision = resolve_precision(baseline().runtime)
    amp_type = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def step() -> None:
        with torch.autocast(images.device.type, amp_type, enabled=amp_type is not None):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def newcomer_step(data_dir: Path, batch_size: int) -> Step:
    model, images, labels = ready(data_dir, batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    images = images.contiguous()

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


LOOPS = {"ours": our_step, "bare": bare_step, "newcomer": newcomer_step}


def load(data_dir: Path, batch_size: int) -> tuple[ModelSpec, ResidentLoader | StreamLoader]:
    """Returns the model's specification for the dataset, and a loader of its training images on the device."""
    dataset = read_dataset(data_dir)
    spec = ModelSpec(classes=dataset.classes, mean=dataset.mean, std=dataset.std, image_size=dataset.image_size)
    beton = data_dir / dataset.splits["train"].file
    device = torch.device(resolve_device(baseline().runtime))
    return spec, build_loader(beton, mode="resident", device=device, batch_size=batch_size, num_workers=1)


def first_batch(loader: ResidentLoader | StreamLoader) -> Batch:
    return next(iter(loader.batches([np.arange(loader.batch_size)])))


def ready(data_dir: Path, batch_size: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Returns the model, normalized images and labels, all on the device."""
    spec, loader = load(data_dir, batch_size)
    batch = first_batch(loader)
    images = batch_normalize(batch.images, spec.mean, spec.std, torch.float32)
    return build_model(spec).to(images.device), images, batch.labels


def serve(name: str, data_dir: Path, batch_size: int, requests: Connection) -> None:
    """Runs in its own process: receives numbers of steps, sends back images/s for each, and ends at 0."""
    step = LOOPS[name](data_dir, batch_size)
    while steps := requests.recv():
        requests.send(rate(step, batch_size, steps))


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


def measure(data_dir: Path, batch_size: int, *, rounds: int, steps: int) -> list[dict[str, float]]:
    """Returns the images/s of each loop, by name, for each round."""
    context = get_context("spawn")
    loops: dict[str, Connection] = {}
    for name in LOOPS:
        loops[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, data_dir, batch_size, theirs), daemon=True).start()
        theirs.close()  # so that `recv` raises if the process of a loop dies
    measured: list[dict[str, float]] = []
    for number in range(rounds + 1):
        rates = {}
        for name, loop in loops.items():
            loop.send(steps)
            rates[name] = loop.recv()
        if number > 0:  # round 0 is the warm-up
            measured.append(rates)
            print(f"round {number}: " + "  ".join(f"{name} {value:8.1f}" for name, value in rates.items()), flush=True)
    for loop in loops.values():
        loop.send(0)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/synthetic"))
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    steps = 100 if torch.cuda.is_available() else 2  # a GPU needs many queued steps for a meaningful rate
    parser.add_argument("--steps", type=int, default=steps, help="steps of each loop in a round")
    parser.add_argument("--result", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    rounds = measure(options.data_dir, options.batch_size, rounds=options.rounds, steps=options.steps)
    figures = {f"{name}_images_per_second": statistics.median(r[name] for r in rounds) for name in LOOPS}
    figures["ours_beside_bare"] = statistics.median(r["ours"] / r["bare"] for r in rounds)
    figures["ours_beside_newcomer"] = statistics.median(r["ours"] / r["newcomer"] for r in rounds)
    for name, value in figures.items():
        print(f"{name:32} {value:10.3f}")
    if options.result:
        precision = resolve_precision(baseline().runtime)
        write_result(options.result, figures, batch_size=options.batch_size, rounds=len(rounds), precision=precision)


if __name__ == "__main__":
    main()
