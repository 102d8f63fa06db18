"""BatchNorm across processes: statistics over the images of all ranks, in training and in evaluation."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddp_trainer.models.custom_resnet import BatchNorm


class _SumOverRanks(torch.autograd.Function):
    """A differentiable sum over all ranks. In the backward pass, each rank gets the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm(_BatchNorm):
    """BatchNorm with statistics over the images of all ranks in training. (N, C, ...) -> (N, C, ...).

    Ranks may have different numbers of images. torch's own SyncBatchNorm accepts no CPU tensors and, on a GPU, makes
    the host wait in its forward pass, except during CUDA graph capture.

    The variance is computed from centered values. E[x^2] - E[x]^2 would be less accurate, so the result would depend
    more on the number of processes.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        values = input.to(torch.promote_types(input.dtype, torch.float32))  # as in torch's BatchNorm
        over, spread = (0, *range(2, input.ndim)), (-1, *[1] * (input.ndim - 2))
        own_count = values.new_full((1,), input.numel() / input.shape[1])
        sums = _sum_over_ranks(torch.cat((values.sum(dim=over), own_count)))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centered = values - mean.view(spread)
        variance = _sum_over_ranks(centered.square().sum(dim=over)) / count
        self._update_running(mean.detach(), variance.detach(), count)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is None:  # affine=False
            return (centered * scale.view(spread)).to(input.dtype)
        return (centered * (self.weight * scale).view(spread) + self.bias.view(spread)).to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return  # track_running_stats=False
        self.num_batches_tracked += 1
        unbiased = variance * count / (count - 1).clamp_min(1)
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            # Without momentum, the running statistics are means over all batches.
            share = 1 / self.num_batches_tracked.to(running.dtype) if self.momentum is None else self.momentum
            running.lerp_(new.to(running.dtype), share)

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # inputs of any number of dimensions are accepted


def _sum_over_ranks(values: Tensor) -> Tensor:
    total = _SumOverRanks.apply(values)
    assert isinstance(total, Tensor)
    return total


# Other subclasses of _BatchNorm are not replaced, because they may do more: those of timm add an activation.
REPLACED_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm)


def not_synchronized(model: nn.Module) -> list[str]:
    """The types of the BatchNorm layers that `synchronize_batchnorm` leaves as they are."""
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and type(layer) not in REPLACED_TYPES]
    return sorted({type(layer).__name__ for layer in layers})


def synchronize_batchnorm(model: nn.Module) -> nn.Module:
    """`model` with its BatchNorm layers replaced by synchronized ones with the same parameters and buffers.

    Only layers of the types in REPLACED_TYPES are replaced. A layer that the model keeps in evaluation mode while it is
    trained stays as it is, because it uses no statistics of the batch. Leaves the model in training mode.
    """
    model.train()
    for layer in list(model.modules()):
        for name, child in layer._modules.items():  # named_children() would list a shared layer only once
            if isinstance(child, _BatchNorm) and type(child) in REPLACED_TYPES and child.training:
                replacement = SyncBatchNorm(child.num_features, child.eps, child.momentum)
                replacement._parameters, replacement._buffers = child._parameters, child._buffers
                setattr(layer, name, replacement)
    return model


@contextlib.contextmanager
def averaged_batchnorm(
    model: nn.Module, sum_over_ranks: Callable[[Tensor], Tensor], world_size: int, weight: float
) -> Iterator[None]:
    """Within the context, the running statistics of BatchNorm are computed over the images of all ranks.

    The variance is that of all images together: average(var + mean^2) - average(mean)^2, where the average is taken
    over the ranks. Floating-point buffers of other layers are averaged, too. `weight`: the number of images on this
    rank, divided by the mean number per rank. Each rank's own buffers are restored afterwards, so an evaluation does
    not change the training state.
    """
    if world_size == 1:
        yield
        return

    def average(values: Tensor) -> Tensor:
        return sum_over_ranks(values.double() * weight) / world_size

    own = [(layer, name, buffer) for layer in model.modules() for name, buffer in layer.named_buffers(recurse=False)]
    own = [(layer, name, buffer) for layer, name, buffer in own if buffer.is_floating_point()]
    try:
        for layer, name, buffer in own:
            if not isinstance(layer, _BatchNorm):
                setattr(layer, name, average(buffer).to(buffer.dtype))
            elif name == "running_mean":
                mean, variance = buffer.double(), layer.get_buffer("running_var").double()
                moments = average(torch.stack((mean, variance + mean**2)))
                layer.running_mean = moments[0].to(buffer.dtype)
                layer.running_var = (moments[1] - moments[0] ** 2).to(buffer.dtype)
        yield
    finally:
        for layer, name, buffer in own:
            setattr(layer, name, buffer)
