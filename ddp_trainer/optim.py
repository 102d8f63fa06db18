"""Parameter groups and optimizers."""

from typing import Any

import torch
from torch import nn

from ddp_trainer.config import OptimConfig
from ddp_trainer.muon import Muon


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """What is trained, in groups of one learning rate and decay; `lr_factor` is the former as a multiple of --peak-lr.

    Linear weights are decayed, and filters unless Muon moves them; biases and BatchNorm's parameters are not.
    """
    head_factor, bias_factor = ((rate or config.peak_lr) / config.peak_lr for rate in (config.head_lr, config.bias_lr))
    parts: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for layer in model.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            factor = head_factor if isinstance(layer, nn.Linear) else bias_factor if name == "bias" else 1.0
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            if parameter.requires_grad:
                parts.setdefault((factor, decay, parameter.ndim == 4), []).append(parameter)
    return [
        {"params": part, "lr_factor": factor, "weight_decay": decay, "filters": filters}
        for (factor, decay, filters), part in parts.items()
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """A fused optimizer: one kernel for all parameters, on the CPU too; of muon that is true of all but the filters."""
    groups = parameter_groups(model, config)
    if config.optimizer == "muon":
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
    """Gives SGD and Muon the momentum of a first step now. Call it when the parameters are where they will stay.

    torch's fused SGD takes uninitialised memory for momentum where the very first step is skipped.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
