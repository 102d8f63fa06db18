"""Runs passes or steps that change nothing: before the first step, and again after parameters were frozen.

After this warm-up, the next step takes no longer than others, and a resumed run computes exactly what an uninterrupted
run computes.

DDP reorders its gradient buckets after the first passes. With three or more ranks, the position of a gradient in its
bucket affects the order of summation. Without a warm-up, a resumed run would take its first step with the initial
order, but the uninterrupted run took the same step with the final order.
"""

import torch
from torch import nn

from data_prep.augment import NUM_DRAWS
from data_prep.loader import Batch
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.data import images_in_step
from ddp_trainer.engine.graph import Work
from ddp_trainer.engine.train_state import TrainState
from ddp_trainer.models.blank_pass import blank_images, blank_passes

# DDP records the order of the gradients in one backward pass, and sorts its buckets accordingly at the start of the
# next pass. With a static graph, the first pass only records the graph, and the second pass records the order.
PASSES = 2

# DDP waits for the device in its first 10 steps to measure times. A step that waits cannot become a CUDA graph.
STEPS = 11


def warm_up(
    wrapped: nn.Module, state: TrainState, work: Work, config: TrainConfig, image_size: int, sides: list[int]
) -> None:
    """Warms up on crops of `sides` pixels. `state` does not change, provided that the guard skips every step.

    On a GPU, this runs whole steps, so that all kernels are chosen and loaded and all memory is allocated. On the CPU,
    several processes run only forward and backward passes, and a single process runs nothing. `wrapped`: the network,
    in DDP if there are several processes.
    """
    runtime = state.runtime
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # dropout would otherwise draw other numbers in a resumed run
        if runtime.device.type == "cuda":
            take_skipped_steps(work, state, _blank_batch(config, runtime, image_size), sides)
        elif runtime.world_size > 1:
            _run_passes(wrapped, runtime, config, sides)


def _run_passes(wrapped: nn.Module, runtime: Runtime, config: TrainConfig, sides: list[int]) -> None:
    count = images_in_step(config, runtime.rank, runtime.world_size) // config.schedule.passes
    for side in sides:
        images = runtime.laid_out(blank_images(wrapped, count, side))
        with blank_passes(wrapped):
            for _ in range(PASSES):
                wrapped(images).sum().backward()


def take_skipped_steps(work: Work, state: TrainState, batch: Batch, sides: list[int]) -> None:
    """Takes steps at each crop size in `sides`. The caller must make the guard skip them, to keep `state` unchanged."""
    scaler = state.runtime.scaler
    scale, counts = None if scaler is None else scaler.state_dict(), state.guard.skipped_steps()
    draws = torch.zeros((NUM_DRAWS, len(batch.indices)), dtype=torch.int64, device=batch.indices.device)
    for side in sides:
        for _ in range(STEPS):
            work(batch, draws, side)
    state.guard.restore(counts)
    if scaler is not None and scale is not None:
        scaler.load_state_dict(scale)
    state.runtime.synchronize()


def _blank_batch(config: TrainConfig, runtime: Runtime, image_size: int) -> Batch:
    """A batch of black images with the shape and memory format of the batches that this rank loads."""
    count, device = images_in_step(config, runtime.rank, runtime.world_size), runtime.device
    images = torch.zeros(count, image_size, image_size, 3, dtype=torch.uint8, device=device)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    return Batch(images.permute(0, 3, 1, 2), labels, torch.zeros_like(labels))
