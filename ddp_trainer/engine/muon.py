"""Muon for the filters and SGD for everything else, as one optimizer whose steps never wait for the device.

torch.optim.Muon takes matrices only and knows no other update, so filters would need a second optimizer beside it, and
with it a second gradient scaler, checkpoint and learning rate to keep in step.
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


def orthogonalise(matrix: Tensor, *, steps: int) -> Tensor:
    """(M, N) -> (M, N) with the same singular vectors and singular values drawn towards one, by Newton-Schulz steps.

    Computed in bfloat16 on a GPU that has it, whatever the precision of the training, else in the type of `matrix`.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda and _gpu_has_bf16() else matrix
    tall = x.size(0) > x.size(1)
    x = x.mT if tall else x
    x = x / x.norm().clamp_min(1e-7)  # the largest singular value is now 1 at most, as the iteration needs it
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


@functools.cache
def _gpu_has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


class Muon(torch.optim.Optimizer):
    """Groups with `filters=True` are (O, I, H, W) filters and take Muon's step, the others Nesterov SGD.

    A filter bank is a matrix of O rows. It is rescaled to norm sqrt(O) before each step, so that `lr` is the share by
    which it turns, whatever its size: right where a BatchNorm follows, which takes no notice of the norm. Filters have
    no weight decay for that reason. After airbench94_muon (github.com/KellerJordan/cifar10-airbench).
    """

    # A gradient scaler and `nonfinite.step_unless` then leave `found_inf` here, instead of asking the device for it.
    _step_supports_amp_scaling = True

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, filter_momentum: float = 0.6, momentum: float = 0.85
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "filters": False})
        for group in self.param_groups:
            if group["filters"]:
                group["momentum"] = filter_momentum

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Nothing changes where `self.found_inf` is a tensor that is not zero."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            update = self._turn_filters if group["filters"] else self._descend
            update([p for p in group["params"] if p.grad is not None], group, found_inf, grad_scale)

    def _momenta(self, parameters: list[Tensor]) -> list[Tensor]:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return [self.state[parameter]["momentum_buffer"] for parameter in parameters]

    def _turn_filters(
        self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None
    ) -> None:
        momentum, refused = group["momentum"], None if found_inf is None else found_inf != 0
        for filters, average in zip(parameters, self._momenta(parameters), strict=True):
            assert filters.grad is not None
            gradient = filters.grad if grad_scale is None else filters.grad / grad_scale
            new_average = momentum * average + gradient
            direction = _as_filters(
                orthogonalise(_as_matrix(gradient + momentum * new_average), steps=3), filters.shape
            )
            turned = filters * (len(filters) ** 0.5 / filters.norm()) - group["lr"] * direction
            average.copy_(new_average if refused is None else torch.where(refused, average, new_average))
            filters.copy_(turned if refused is None else torch.where(refused, filters, turned))

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


def _as_matrix(filters: Tensor) -> Tensor:
    """(O, I, H, W) -> (O, H * W * I): without a copy where the filters are kept in channels-last order."""
    return filters.permute(0, 2, 3, 1).flatten(1)


def _as_filters(matrix: Tensor, shape: torch.Size) -> Tensor:
    out, channels, height, width = shape
    return matrix.view(out, height, width, channels).permute(0, 3, 1, 2)
