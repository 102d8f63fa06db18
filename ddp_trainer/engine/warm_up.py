"""Takes warm-up steps, which change nothing: once before training, and again after parameters were frozen.

After this warm-up, the next step takes no longer than others, and a resumed run computes exactly what an uninterrupted
run computes.

DDP reorders its gradient buckets after the first passes. With three or more ranks, the position of a gradient in its
bucket affects the order of summation. Without a warm-up, a resumed run would take its first step with the initial
order, but the uninterrupted run took the same step with the final order.
"""

import torch

from data_prep.augment import NUM_DRAWS
from data_prep.loader import Batch
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.data import images_in_step
from ddp_trainer.engine.graph import Work
from ddp_trainer.engine.train_state import TrainState

# DDP records the order of the gradients in one backward pass, and sorts its buckets accordingly at the start of the
# next pass. With a static graph, the first pass only records the graph, and the second pass records the order.
STEPS_ON_CPU = 2

# In its first 10 steps, DDP waits for the device to measure how long they take. Such a step cannot become a CUDA graph.
STEPS_ON_GPU = 11


def warm_up(state: TrainState, work: Work, config: TrainConfig, image_size: int, sides: list[int]) -> None:
    """Takes steps on crops of `sides` pixels.

    The caller must make the gradients NaN. The guard then skips every step, and `state` does not change.
    On a GPU, this also chooses and loads all kernels, and allocates all memory. A single process on the CPU takes no
    steps.
    """
    runtime = state.runtime
    on_gpu = runtime.device.type == "cuda"
    if on_gpu or runtime.world_size > 1:
        batch, steps = _trial_batch(config, runtime, image_size), STEPS_ON_GPU if on_gpu else STEPS_ON_CPU
        # Without `fork_rng`, dropout would draw different numbers in a resumed run.
        # The gradients are NaN, which anomaly detection reports as an error.
        with (
            torch.random.fork_rng(devices=[runtime.device] if on_gpu else []),
            torch.autograd.set_detect_anomaly(False),
        ):
            take_skipped_steps(work, state, batch, sides, steps=steps)


def take_skipped_steps(work: Work, state: TrainState, batch: Batch, sides: list[int], *, steps: int) -> None:
    """Takes `steps` steps at each crop size in `sides`.

    The caller must make the guard skip them, to keep `state` unchanged.
    """
    scaler = state.runtime.scaler
    scale, counts = None if scaler is None else scaler.state_dict(), state.guard.skipped_steps()
    draws = torch.zeros((NUM_DRAWS, len(batch.indices)), dtype=torch.int64, device=batch.indices.device)
    for side in sides:
        for _ in range(steps):
            work(batch, draws, side)
    state.guard.restore(counts)
    if scaler is not None and scale is not None:
        scaler.load_state_dict(scale)
    state.runtime.synchronize()


def _trial_batch(config: TrainConfig, runtime: Runtime, image_size: int) -> Batch:
    """A batch of random images with the shape and memory format of the batches that this rank loads."""
    count, device = images_in_step(config, runtime.rank, runtime.world_size), runtime.device
    shape, generator = (count, image_size, image_size, 3), torch.Generator().manual_seed(0)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(device)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    return Batch(images.permute(0, 3, 1, 2), labels, torch.zeros_like(labels))
