"""The state of a training run as plain tensors and values, and back: what a checkpoint holds.

The order, the augmentation and the learning rate are pure functions of seed and step. torch's generators, from which
nothing of ours draws after the first weights, are kept for a model with dropout. What differs between the ranks is
stacked: running statistics of BatchNorm and sums of the epoch in `rank_state`, the generators in `generators`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddp_trainer.metrics import RunningSums

if TYPE_CHECKING:
    from ddp_trainer.engine import Trainer


KEYS = frozenset({
    "step", "history", "epoch_seconds", "model", "optimizer", "scaler", "ema", "skipped",
    "rank_state", "generators", "hard",
})  # fmt: skip


def capture_state(trainer: Trainer) -> dict[str, Any]:
    """Everything that the rest of the run depends on. A collective operation: call it on every rank.

    Raises NonFinite instead where the steps up to now must not be saved.
    """
    skipped = trainer.guard.settle()
    own = torch.cat([part.detach().double().flatten() for part in _rank_parts(trainer)])
    scaler, ema, hard = trainer.runtime.scaler, trainer.ema, trainer.data.hard
    return {
        "step": trainer.step,
        "history": trainer.history,
        "epoch_seconds": trainer.watch.read(),
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "ema": None if ema is None else ema.state_dict(),
        "skipped": skipped,
        "hard": None if hard is None else hard._asdict(),
        "rank_state": trainer.runtime.gather(own),  # (world_size, K)
        "generators": trainer.runtime.gather(trainer.runtime.generator_state()),  # (world_size, L)
    }


def restore_state(trainer: Trainer, state: dict[str, Any]) -> None:
    """Puts the trainer where `state` was captured, at this or another number of processes."""
    trainer.step, trainer.history = state["step"], list(state["history"])
    trainer.watch.seconds = state["epoch_seconds"]
    trainer.model.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.runtime.scaler is not None and state["scaler"]:
        trainer.runtime.scaler.load_state_dict(state["scaler"])
    if trainer.ema is not None:
        trainer.ema.load_state_dict(state["ema"])
    trainer.guard.restore(state["skipped"])
    _load_rank_state(trainer, state["rank_state"])
    if len(state["generators"]) == trainer.runtime.world_size:
        trainer.runtime.set_generator_state(state["generators"][trainer.runtime.rank])


def _rank_parts(trainer: Trainer) -> list[Tensor]:
    """This rank's own tensors: the sums first, then every floating-point buffer of the model and of its average."""
    models = [trainer.model] if trainer.ema is None else [trainer.model, trainer.ema]
    buffers = [buffer for model in models for buffer in model.buffers() if buffer.is_floating_point()]
    return [trainer.sums.values, *buffers]


def _load_rank_state(trainer: Trainer, stacked: Tensor) -> None:
    """stacked: (world size of the saved run, K)."""
    world_size = trainer.runtime.world_size
    if len(stacked) == world_size:
        row = stacked[trainer.runtime.rank]
    else:  # another number of processes: statistics averaged, sums shared out
        row = stacked.mean(dim=0)
        row[: RunningSums.SIZE] = stacked[:, : RunningSums.SIZE].sum(dim=0) / world_size
    offset = 0
    for part in _rank_parts(trainer):
        part.copy_(row[offset : offset + part.numel()].reshape(part.shape))
        offset += part.numel()
