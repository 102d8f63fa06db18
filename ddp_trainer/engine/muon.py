"""Muon for filters and matrices and SGD for everything else, as one optimizer whose steps never wait for the device.

torch.optim.Muon takes matrices only and has no other update, so everything else would need a second optimizer, and with
it a second gradient scaler, checkpoint and learning rate to keep in step.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

# Quintic with the steepest slope at zero that still keeps singular values near one: Jordan et al., "Muon: An optimizer
# for hidden layers in neural networks" (kellerjordan.github.io/posts/muon, 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, *, steps: int) -> Tensor:
    """(M, N) -> (M, N) with the same singular vectors and singular values close to one, by Newton-Schulz iteration.

    Computed in bfloat16 on a GPU that has it, whatever the precision of the run, else in the dtype of `matrix`.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda and _gpu_has_bf16() else matrix
    tall = x.size(0) > x.size(1)
    x = x.mT if tall else x
    x = x / x.norm().clamp_min(1e-7)  # the iteration needs the largest singular value to be 1 at most
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


@functools.cache
def _gpu_has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


class Muon(torch.optim.Optimizer):
    """Updates the parameters of a group as the group's entry `muon` says.

    "filters": (O, I, H, W) filters that a normalization follows. Taken as a matrix of O rows, they are rescaled to norm
    sqrt(O) before each step, so that `lr` is the share by which they turn, whatever their size. The normalization
    cancels the norm, so there is no weight decay. After airbench94_muon (github.com/KellerJordan/cifar10-airbench).

    "matrix": any other weights of at least two dimensions, as a matrix of as many rows as outputs. They keep their norm
    and are decayed; a step is longer by sqrt(rows / columns) for tall matrices. After Jordan et al. (see COEFFICIENTS).

    None: SGD with Nesterov momentum.
    """

    # A gradient scaler and `step_guard.step_unless` then leave `found_inf` here, instead of asking the device for it.
    _step_supports_amp_scaling = True

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, muon_momentum: float = 0.6, momentum: float = 0.85
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "muon": None})
        for group in self.param_groups:
            if group["muon"]:
                group["momentum"] = muon_momentum

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Changes nothing if `self.found_inf` is a tensor that is not zero."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            update = self._turn if group["muon"] else self._descend
            update([p for p in group["params"] if p.grad is not None], group, found_inf, grad_scale)

    def _momenta(self, parameters: list[Tensor]) -> list[Tensor]:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return [self.state[parameter]["momentum_buffer"] for parameter in parameters]

    def _turn(
        self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None
    ) -> None:
        momentum, skip = group["momentum"], None if found_inf is None else found_inf != 0
        for weights, average in zip(parameters, self._momenta(parameters), strict=True):
            assert weights.grad is not None
            gradient = weights.grad if grad_scale is None else weights.grad / grad_scale
            new_average = momentum * average + gradient
            matrix = _as_matrix(gradient + momentum * new_average)
            direction = _as_weights(orthogonalize(matrix, steps=3), weights.shape)
            rows, columns = matrix.shape
            if group["muon"] == "filters":
                turned = weights * (rows**0.5 / weights.norm()) - group["lr"] * direction
            else:
                decayed = weights * (1 - group["lr"] * group["weight_decay"])
                turned = decayed - group["lr"] * max(1.0, rows / columns) ** 0.5 * direction
            average.copy_(new_average if skip is None else torch.where(skip, average, new_average))
            weights.copy_(turned if skip is None else torch.where(skip, weights, turned))

    def _descend(
        self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None
    ) -> None:
        momenta: list[Tensor | None] = [*self._momenta(parameters)]
        sgd(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            momenta,
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=True,
            dampening=0.0,
            maximize=False,
            fused=True,
            found_inf=found_inf,
            grad_scale=grad_scale,
        )


def _as_matrix(weights: Tensor) -> Tensor:
    """(O, I, H, W) -> (O, H * W * I), without a copy for channels-last filters; (O, I) as it is."""
    return weights.permute(0, 2, 3, 1).flatten(1) if weights.ndim == 4 else weights


def _as_weights(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_as_matrix`."""
    if len(shape) == 2:
        return matrix
    out, channels, height, width = shape
    return matrix.view(out, height, width, channels).permute(0, 3, 1, 2)
