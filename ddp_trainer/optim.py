"""Parameter groups, optimizers and the OneCycle schedule, which is a pure function of the step."""

from typing import Any

import torch
from torch import nn

from ddp_trainer.config import OptimConfig, ScheduleConfig
from ddp_trainer.muon import Muon


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


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Filters, weights and bias of linear layers, and the rest, which is BatchNorm's; frozen parameters are left out.

    Filters and weights are decayed, biases and BatchNorm parameters are not. `lr_factor` is a group's learning rate as
    a multiple of the schedule's.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head = {id(p) for layer in model.modules() if isinstance(layer, nn.Linear) for p in layer.parameters()}
    head_factor, bias_factor = ((rate or config.peak_lr) / config.peak_lr for rate in (config.head_lr, config.bias_lr))
    in_head, others = ([p for p in trained if (id(p) in head) is wanted] for wanted in (True, False))
    parts = [
        ([p for p in others if p.ndim >= 2], 1.0, config.weight_decay),
        ([p for p in in_head if p.ndim >= 2], head_factor, config.weight_decay),
        ([p for p in in_head if p.ndim < 2], head_factor, 0.0),
        ([p for p in others if p.ndim < 2], bias_factor, 0.0),
    ]
    return [{"params": part, "lr_factor": factor, "weight_decay": decay} for part, factor, decay in parts if part]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """A fused optimizer: one kernel for all parameters, on the CPU too; of muon that is true of all but the filters."""
    groups = parameter_groups(model, config)
    if config.optimizer == "muon":
        groups = [{**group, "filters": group["params"][0].ndim == 4} for group in groups]
        optimizer: torch.optim.Optimizer = Muon(groups, lr=config.peak_lr)
    elif config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.99), fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=config.peak_lr, momentum=0.9, nesterov=True, fused=True)
    set_learning_rate(optimizer, config.peak_lr)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_factor"]


def zero_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Gives SGD the momentum of a first step now. Call it when the parameters are where they will stay.

    torch's fused SGD takes uninitialised memory for momentum where the very first step is skipped.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
