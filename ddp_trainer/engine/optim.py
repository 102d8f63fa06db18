"""Parameter groups, and the optimizer that the settings name."""

from typing import Any

import torch
from torch import nn

from ddp_trainer.config import OptimConfig
from ddp_trainer.engine.muon import Muon


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters, grouped by peak learning rate and weight decay.

    Linear weights are decayed, and so are filters unless Muon updates them; biases and BatchNorm parameters are not.
    """
    parts: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for layer in model.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            if parameter.requires_grad:
                key = (_peak_lr(layer, name, config), decay, parameter.ndim == 4)
                parts.setdefault(key, []).append(parameter)
    return [
        {"params": part, "peak_lr": peak_lr, "weight_decay": decay, "filters": filters}
        for (peak_lr, decay, filters), part in parts.items()
    ]


def _peak_lr(layer: nn.Module, name: str, config: OptimConfig) -> float:
    """Highest learning rate of the parameter `name` of `layer`."""
    if isinstance(layer, nn.Linear):
        return config.peak_lr if config.head_lr is None else config.head_lr
    if name == "bias":
        return config.peak_lr if config.bias_lr is None else config.bias_lr
    return config.peak_lr


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """A fused optimizer: one kernel for all parameters, on the CPU too. Muon's filters have a few kernels each."""
    groups = parameter_groups(model, config)
    if config.optimizer == "muon":
        return Muon(groups, lr=config.peak_lr)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.99), fused=True)
    return torch.optim.SGD(groups, lr=config.peak_lr, momentum=0.9, nesterov=True, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, share_of_peak: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = share_of_peak * group["peak_lr"]


def zero_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Creates the momentum of SGD and Muon now. Call it when the parameters are on their final device.

    torch's fused SGD would use uninitialized memory for momentum if the very first step is skipped.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
