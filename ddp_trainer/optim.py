"""Parameter groups, optimizers and the OneCycle schedule, which is a pure function of the step."""

import torch
from torch import nn

from ddp_trainer.config import OptimConfig, ScheduleConfig


def one_cycle(step: int, *, total_steps: int, schedule: ScheduleConfig) -> float:
    """Share of the peak learning rate at `step` (from 0): a linear climb, then a linear descent.

    Same curve as torch's OneCycleLR with anneal_strategy="linear" (Smith & Topin, arXiv 1708.07120). As a pure function
    it needs no state in a checkpoint, cannot run past its end and is the same at every world size.
    """
    start, end = schedule.initial_lr_fraction, schedule.final_lr_fraction
    last = max(total_steps - 1, 1)
    peak = schedule.warmup_fraction * total_steps - 1
    if step <= peak:
        return start + (1 - start) * step / peak if peak > 0 else 1.0
    peak = max(peak, 0.0)
    return 1 + (end - 1) * min((step - peak) / max(last - peak, 1e-9), 1.0)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weights of two or more dimensions are decayed; biases and BatchNorm parameters are not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """A fused optimizer: one kernel for all parameters, on the CPU too."""
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.99), fused=True)
    return torch.optim.SGD(groups, lr=config.peak_lr, momentum=0.9, nesterov=True, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def zero_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Gives SGD the momentum of a first step now. Call it when the parameters are where they will stay.

    torch's fused SGD takes uninitialised memory for momentum where the very first step is skipped.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
