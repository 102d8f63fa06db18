"""images/s of the trainer's step beside a bare PyTorch loop and beside the loop a newcomer would write.

    python -m benchmarks.training_step [--data-dir DIR] [--batch-size N] [--rounds N] [--result FILE]

ours:     Trainer.train_step with everything in it: augmentation, schedule, sums, the stop flag's poll.
bare:     the same model, precision and memory format; nothing but forward, backward and step on a ready batch.
newcomer: fp32, NCHW, not fused, `.item()` in each step: the loop of most tutorials.

The three take turns, a few steps each, over several rounds; the figures are medians of the rounds' rates and of the
round-by-round ratios, so that a machine whose speed drifts does not favour any of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.results import write_result
from data_prep.augment import Augmenter
from data_prep.batch_ops import batch_normalise
from data_prep.dataset import read_dataset
from data_prep.loader import Batch, build_loader
from ddp_trainer.engine import RunData, Trainer
from ddp_trainer.evaluate import Evaluator
from ddp_trainer.model import ModelSpec, build_model
from ddp_trainer.observer import SilentObserver
from ddp_trainer.optim import build_optimizer
from ddp_trainer.recipes import baseline
from ddp_trainer.runtime import Runtime

Step = Callable[[], object]


def our_step(runtime: Runtime, spec: ModelSpec, data_dir: Path, batch: Batch) -> Step:
    config = baseline()
    config = replace(config, schedule=replace(config.schedule, batch_size=len(batch.labels)))
    dataset = read_dataset(data_dir)
    loader = build_loader(
        data_dir / dataset.splits["train"].file, mode="resident", device=runtime.device, batch_size=500, num_workers=1
    )
    samples = np.arange(dataset.splits["train"].count)
    augmenter = Augmenter(config.augment, mean=spec.mean, std=spec.std, seed=0)
    model = build_model(spec)
    evaluator = Evaluator(loader, samples[:500], spec, runtime, batch_size=500)
    data = RunData(loader=loader, samples=samples, augmenter=augmenter, evaluator=evaluator)
    trainer = Trainer(config, runtime, model, build_optimizer(model, config.optim), data, SilentObserver())

    def step() -> None:
        runtime.announce_stop()
        trainer.train_step(batch, epoch=0)
        runtime.stop_agreed()

    return step


def bare_step(runtime: Runtime, spec: ModelSpec, images: torch.Tensor, labels: torch.Tensor) -> Step:
    model = runtime.place(build_model(spec))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)

    def step() -> None:
        with runtime.autocast():
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def newcomer_step(runtime: Runtime, spec: ModelSpec, images: torch.Tensor, labels: torch.Tensor) -> Step:
    model = build_model(spec).to(runtime.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    images = images.contiguous()

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def rate(step: Step, runtime: Runtime, batch_size: int, steps: int) -> float:
    """images/s over `steps` steps."""
    runtime.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    runtime.synchronize()
    return steps * batch_size / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/synthetic"))
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of each loop in a round")
    parser.add_argument("--result", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()

    dataset = read_dataset(options.data_dir)
    spec = ModelSpec(classes=dataset.classes, mean=dataset.mean, std=dataset.std, image_size=dataset.image_size)
    runtime = Runtime(baseline().runtime)
    beton = options.data_dir / dataset.splits["train"].file
    loader = build_loader(beton, mode="resident", device=runtime.device, batch_size=options.batch_size, num_workers=1)
    batch = next(iter(loader.batches([np.arange(options.batch_size)])))
    images = batch_normalise(batch.images, spec.mean, spec.std, torch.float32)

    steps = {
        "ours": our_step(runtime, spec, options.data_dir, batch),
        "bare": bare_step(runtime, spec, images, batch.labels),
        "newcomer": newcomer_step(runtime, spec, images, batch.labels),
    }
    for step in steps.values():
        rate(step, runtime, options.batch_size, 1)  # warm-up
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds):
        rounds.append({name: rate(step, runtime, options.batch_size, options.steps) for name, step in steps.items()})
        print(
            f"round {number + 1}: " + "  ".join(f"{name} {value:8.1f}" for name, value in rounds[-1].items()),
            flush=True,
        )
    figures = {f"{name}_images_per_second": statistics.median(r[name] for r in rounds) for name in steps}
    figures["ours_beside_bare"] = statistics.median(r["ours"] / r["bare"] for r in rounds)
    figures["ours_beside_newcomer"] = statistics.median(r["ours"] / r["newcomer"] for r in rounds)
    for name, value in figures.items():
        print(f"{name:32} {value:10.3f}")
    if options.result:
        write_result(
            options.result, figures, batch_size=options.batch_size, rounds=len(rounds), precision=runtime.precision
        )


if __name__ == "__main__":
    main()
