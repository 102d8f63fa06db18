"""One optimizer: Muon for filters and matrices, SGD for all other parameters. It never waits for the device.

torch.optim.Muon accepts only matrices. All other parameters would need a second optimizer, and its gradient scaler,
checkpoint and learning rate would have to be kept consistent with the first one's.
"""

# pyright: reportPrivateImportUsage=false
# torch has no public names for operations on lists of tensors (_foreach_mul_ and others).

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from ddp_trainer.engine.newton_schulz import orthogonalize

# Both values are those of airbench94_muon (github.com/KellerJordan/cifar10-airbench).
SGD_MOMENTUM = 0.85
MUON_MOMENTUM = 0.6


class Muon(torch.optim.Optimizer):
    """An optimizer with three kinds of updates. The entry `muon` of a parameter group selects one of them.

    "filters": for filters (O, I, H, W) of a convolution before a normalization layer. They are treated as a matrix with
    O rows and rescaled to norm sqrt(O) before each step, so that `lr` sets the relative size of the change. There is no
    weight decay, because the output of the normalization does not depend on the norm of the filters. The method is that
    of airbench94_muon (github.com/KellerJordan/cifar10-airbench).

    "matrix": for the weights of linear layers and other convolutions, treated as a matrix with one row for each output.
    They are not rescaled, and weight decay applies. For tall matrices, a step is longer by a factor of
    sqrt(rows / columns). The method is that of Jordan et al. (see `newton_schulz`).

    None: SGD with Nesterov momentum.
    """

    # Because of this flag, gradient scalers and `step_guard.step_unless` store a tensor in the attribute `found_inf` of
    # the optimizer and do not wait for its value.
    _step_supports_amp_scaling = True

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": SGD_MOMENTUM, "weight_decay": 0.0, "muon": None})
        for group in self.param_groups:
            if group["muon"]:
                group["momentum"] = MUON_MOMENTUM

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the parameters, unless `self.found_inf` is a nonzero tensor."""
        self._update_filters([group for group in self.param_groups if group["muon"] == "filters"])
        for group in self.param_groups:
            if group["muon"] == "matrix":
                self._update_matrices(group)
            elif group["muon"] is None:
                weights = _with_gradients(group)
                self._nesterov_sgd(
                    weights, weights, group["momentum"], lr=group["lr"], weight_decay=group["weight_decay"]
                )

    def _update_matrices(self, group: dict[str, Any]) -> None:
        weights = _with_gradients(group)
        if weights:
            directions = self._directions(weights, group["momentum"])
            # sqrt(rows / columns) for tall matrices, otherwise 1. rows: len(one), columns: one.numel() / len(one).
            torch._foreach_mul_(directions, [max(1.0, len(one) ** 2 / one.numel()) ** 0.5 for one in weights])
            self._fused_sgd(weights, directions, lr=group["lr"], weight_decay=group["weight_decay"])

    def _update_filters(self, groups: list[dict[str, Any]]) -> None:
        """Updates the filters of all groups together. The groups differ only in their learning rates."""
        parts = [(_with_gradients(group), group["lr"]) for group in groups]
        weights = [one for part, _ in parts for one in part]
        if not weights:
            return
        directions = self._directions(weights, groups[0]["momentum"])
        rest = iter(directions)
        for part, lr in parts:
            if part:
                torch._foreach_mul_(list(itertools.islice(rest, len(part))), lr)
        # The new weights are weights * sqrt(O) / norm - lr * direction. The first term is computed as
        # weights - weights * (norm - sqrt(O)) / norm.
        norms = torch._foreach_norm(weights)
        torch._foreach_clamp_min_(norms, 1e-7)  # filters may start at zero
        excess = torch._foreach_sub(norms, [len(one) ** 0.5 for one in weights])
        torch._foreach_div_(excess, norms)
        torch._foreach_addcmul_(directions, weights, excess)
        self._fused_sgd(weights, directions, lr=1.0)

    def _directions(self, weights: list[Tensor], momentum: float) -> list[Tensor]:
        """The orthogonalized Nesterov momentum of each of `weights`."""
        momenta = [torch.empty_like(one) for one in weights]
        torch._foreach_zero_(momenta)
        # Starting from zeros, an update with learning rate -1 gives the Nesterov momentum itself.
        self._nesterov_sgd(momenta, weights, momentum, lr=-1.0, weight_decay=0.0)
        matrices = orthogonalize([_as_matrix(one) for one in momenta])
        return [_as_weights(matrix, one) for matrix, one in zip(matrices, weights, strict=True)]

    def _nesterov_sgd(self, moved: list[Tensor], weights: list[Tensor], momentum: float, **options: Any) -> None:
        """Moves `moved` as SGD with Nesterov momentum would move `weights`."""
        for one in weights:
            if "momentum_buffer" not in self.state[one]:
                self.state[one]["momentum_buffer"] = torch.zeros_like(one)
        self._fused_sgd(
            moved,
            [one.grad for one in weights if one.grad is not None],
            [self.state[one]["momentum_buffer"] for one in weights],
            momentum=momentum,
            grad_scale=getattr(self, "grad_scale", None),
            **options,
        )

    def _fused_sgd(
        self, moved: list[Tensor], gradients: list[Tensor], momenta: list[Tensor] | None = None, **options: Any
    ) -> None:
        """Calls torch's fused SGD: one kernel for all tensors, which changes nothing if `found_inf` is nonzero."""
        sgd(
            moved,
            gradients,
            [*momenta] if momenta else [None] * len(moved),
            **{"momentum": 0.0, "weight_decay": 0.0, **options},
            nesterov=True,
            dampening=0.0,
            maximize=False,
            fused=True,
            found_inf=getattr(self, "found_inf", None),
        )


def _with_gradients(group: dict[str, Any]) -> list[Tensor]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _as_matrix(weights: Tensor) -> Tensor:
    """(O, ...) -> (O, columns) without a copy. The columns are in memory order, which does not affect the update."""
    return (weights if weights.is_contiguous() or weights.ndim != 4 else weights.permute(0, 2, 3, 1)).flatten(1)


def _as_weights(matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_as_matrix`, with the strides of `like`, which fused kernels need."""
    if like.is_contiguous() or like.ndim != 4:
        weights = matrix.view(like.shape)
    else:
        out, channels, height, width = like.shape
        weights = matrix.view(out, height, width, channels).permute(0, 3, 1, 2)
    return weights if weights.stride() == like.stride() else torch.empty_like(like).copy_(weights)
