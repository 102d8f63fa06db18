"""images/s of the trainer's step beside a bare PyTorch loop and beside the loop a newcomer would write.

    python -m benchmarks.training_step [--data-dir DIR] [--batch-size N] [--rounds N] [--steps N] [--result FILE]

ours:     Trainer.train_step with everything around it: augmentation, schedule, sums, guard, the stop flag's poll.
bare:     the same model, precision and memory format; nothing but forward, backward and step on a ready batch.
newcomer: fp32, NCHW, not fused, `.item()` in each step: the loop of most tutorials.

Each has a process of its own, so that none has another's settings of the memory allocator. They take turns, a few steps
each, over several rounds; the figures are medians of the rounds' rates and of the round-by-round ratios, so that a
machine whose speed drifts does not favour any of them.
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
from torch import Tensor
from torch.nn import functional as F

from benchmarks.results import write_result
from data_prep.augment import Augmenter
from data_prep.batch_ops import batch_normalize
from data_prep.dataset import read_dataset
from data_prep.loader import Batch, ResidentLoader, StreamLoader, build_loader
from ddp_trainer.distributed.hardware import resolve_device, resolve_precision
from ddp_trainer.distributed.runtime import Runtime, set_backend_flags
from ddp_trainer.distributed.signals import StopRequest
from ddp_trainer.engine.data import RunData
from ddp_trainer.engine.evaluation import Evaluator
from ddp_trainer.engine.observer import SilentObserver
from ddp_trainer.engine.optim import build_optimizer
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.models.custom_resnet import CustomResNet
from ddp_trainer.models.spec import ModelSpec, build_model
from ddp_trainer.recipes import baseline

Step = Callable[[], object]


def our_step(data_dir: Path, batch_size: int) -> Step:
    config = baseline()
    config = replace(config, schedule=replace(config.schedule, batch_size=batch_size))
    runtime = Runtime(config.runtime, stop=StopRequest())
    spec, loader = load(data_dir, batch_size)
    batch, samples = first_batch(loader), np.arange(batch_size)
    augmenter = Augmenter(config.augment, mean=spec.mean, std=spec.std, seed=0)
    model = build_model(spec)
    evaluator = Evaluator(loader, samples, spec, runtime)
    data = RunData(loader=loader, samples=samples, augmenter=augmenter, evaluator=evaluator)
    trainer = Trainer(config, runtime, model, build_optimizer(model, config.optim), data, SilentObserver())

    def step() -> None:
        runtime.stop.announce()
        trainer.train_step(batch, epoch=0)
        trainer.guard.after_step(trainer.step - 1)
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
    """What the model must know of the dataset, and its training images on the device."""
    dataset = read_dataset(data_dir)
    spec = ModelSpec(classes=dataset.classes, mean=dataset.mean, std=dataset.std, image_size=dataset.image_size)
    beton = data_dir / dataset.splits["train"].file
    device = torch.device(resolve_device(baseline().runtime))
    return spec, build_loader(beton, mode="resident", device=device, batch_size=batch_size, num_workers=1)


def first_batch(loader: ResidentLoader | StreamLoader) -> Batch:
    return next(iter(loader.batches([np.arange(loader.batch_size)])))


def ready(data_dir: Path, batch_size: int) -> tuple[CustomResNet, Tensor, Tensor]:
    """The model, normalized images and labels, on the device."""
    spec, loader = load(data_dir, batch_size)
    batch = first_batch(loader)
    images = batch_normalize(batch.images, spec.mean, spec.std, torch.float32)
    return build_model(spec).to(images.device), images, batch.labels


def serve(name: str, data_dir: Path, batch_size: int, requests: Connection) -> None:
    """In a process of its own: answers each number of steps with their images/s, and 0 with its end."""
    step = LOOPS[name](data_dir, batch_size)
    while steps := requests.recv():
        requests.send(rate(step, batch_size, steps))


def rate(step: Step, batch_size: int, steps: int) -> float:
    """images/s over `steps` steps."""
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
    """The loops' images/s, round by round."""
    context = get_context("spawn")
    loops: dict[str, Connection] = {}
    for name in LOOPS:
        loops[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, data_dir, batch_size, theirs), daemon=True).start()
        theirs.close()  # lest a loop that dies is waited for
    measured: list[dict[str, float]] = []
    for number in range(rounds + 1):
        rates = {}
        for name, loop in loops.items():
            loop.send(steps)
            rates[name] = loop.recv()
        if number > 0:  # the first warms up
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
    steps = 100 if torch.cuda.is_available() else 2  # a GPU has to run full before its rate means anything
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
