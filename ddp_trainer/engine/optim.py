"""Builds the parameter groups and the optimizer from the settings, and sets its learning rates."""

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ddp_trainer.config import OptimConfig
from ddp_trainer.engine.muon import Muon


class Kind(NamedTuple):
    """How a parameter is updated. All parameters of the same kind form one parameter group."""

    peak_lr: float
    weight_decay: float
    muon: Literal["filters", "matrix"] | None  # see `Muon`
    late: bool  # whether --freeze-late names the parameter, so that its learning rate falls to 0


def parameter_groups(
    model: nn.Module, config: OptimConfig, frozen_late: Collection[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Trainable parameters, grouped by `Kind`.

    Weight decay applies to parameters with at least two dimensions, such as the weights of linear layers. It does not
    apply to filters that Muon rescales, to biases or to normalization layers. `frozen_late`: the parameters that
    --freeze-late names.
    """
    head, late = _head_of(model), set(frozen_late)
    kinds: dict[Kind, list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()  # a parameter that two layers share is updated once
    for layer in model.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                kind = _kind_of(layer, name, parameter, head, config, late=parameter in late)
                kinds.setdefault(kind, []).append(parameter)
    return [{"params": parameters, **kind._asdict()} for kind, parameters in kinds.items()]


def _head_of(model: nn.Module) -> nn.Module | None:
    """The layer that computes the logits: the last linear layer or, if there is none, the last convolution."""
    for kind in (nn.Linear, nn.Conv2d):
        layers = [layer for layer in model.modules() if isinstance(layer, kind)]
        if layers:
            return layers[-1]
    return None


def _kind_of(
    layer: nn.Module, name: str, parameter: nn.Parameter, head: nn.Module | None, config: OptimConfig, *, late: bool
) -> Kind:
    is_bn_bias = name == "bias" and isinstance(layer, nn.modules.batchnorm._BatchNorm)
    own_rate = config.head_lr if layer is head else config.bias_lr if is_bn_bias else None
    muon: Literal["filters", "matrix"] | None = None
    if config.optimizer == "muon" and name == "weight" and layer is not head:
        # A convolution without a bias is usually followed by a normalization layer, whose output does not depend on the
        # norm of the filters.
        if isinstance(layer, nn.Conv2d) and layer.bias is None and layer.groups == 1:
            muon = "filters"
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            muon = "matrix"
    decay = config.weight_decay if parameter.ndim >= 2 and muon != "filters" else 0.0
    return Kind(config.peak_lr if own_rate is None else own_rate, decay, muon, late)


def build_optimizer(
    model: nn.Module, config: OptimConfig, frozen_late: Collection[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimizer that --optimizer names. Its updates are fused, also on the CPU."""
    groups = parameter_groups(model, config, frozen_late)
    if config.optimizer == "muon":
        return Muon(groups, lr=config.peak_lr)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.99), fused=True)
    return torch.optim.SGD(groups, lr=config.peak_lr, momentum=0.9, nesterov=True, fused=True)


class LearningRates:
    """The learning rates of an optimizer's groups, set before each step.

    On a GPU, they are scalars at fixed addresses in device memory, so that a CUDA graph reads the current values.
    Create the object when the parameters are on their final device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        groups = optimizer.param_groups
        device = groups[0]["params"][0].device
        self._on_device = device.type != "cpu"
        peaks = [[group["peak_lr"] * (group["late"] == late) for group in groups] for late in (False, True)]
        self._peaks, self._late_peaks = torch.tensor(peaks, dtype=torch.float64).to(device)
        self._has_late = any(group["late"] for group in groups)
        self._rates = torch.zeros(len(groups), device=device)  # one tensor, so no group needs a kernel of its own

    def set(self, share_of_peak: float, *, late: float | None = None) -> None:
        """Sets each rate to a share of its peak.

        `late`: the share for the parameters that --freeze-late names; default: `share_of_peak`.
        """
        late = share_of_peak if late is None else late
        groups = self._optimizer.param_groups  # read at each call, because load_state_dict replaces the list
        if self._on_device:
            torch.mul(self._peaks, share_of_peak, out=self._rates)
            if self._has_late:
                self._rates.add_(self._late_peaks, alpha=late)
            for group, rate in zip(groups, self._rates.unbind(), strict=True):
                group["lr"] = rate
        else:
            for group in groups:
                group["lr"] = (late if group["late"] else share_of_peak) * group["peak_lr"]


def zero_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Creates the momentum buffers of SGD and Muon. Call it when the parameters are on their final device.

    Without these buffers, torch's fused SGD would use uninitialized memory as momentum if the first step is skipped.
    Other optimizers, such as RMSprop, would take these buffers for a complete state.
    """
    if not isinstance(optimizer, torch.optim.SGD | Muon):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
