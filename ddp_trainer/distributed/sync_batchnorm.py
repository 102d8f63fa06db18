"""BatchNorm across processes: statistics over the global batch in training, and averaged statistics for evaluation.

torch's SyncBatchNorm does not accept CPU tensors, so CPU processes use `CpuSyncBatchNorm2d`; `synchronize_batchnorm`
chooses.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddp_trainer.models.custom_resnet import BatchNorm


class _SumOverRanks(torch.autograd.Function):
    """A sum over all ranks that gradients flow back through: each summand gets the sum of all ranks' gradients."""

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


class CpuSyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of all ranks' images together. (N, C, H, W) -> same shape.

    The mean is computed before the variance: E[x^2] - E[x]^2 would lose the digits that make 1 and 4 processes agree.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        values = input.to(torch.promote_types(input.dtype, torch.float32))  # torch sums bf16 in float32, too
        count = torch.tensor(input.numel() / input.shape[1], dtype=torch.float64)
        dist.all_reduce(count)
        mean = _sum_over_ranks(values.sum(dim=(0, 2, 3))) / count.item()
        centered = values - mean[:, None, None]
        variance = _sum_over_ranks(centered.square().sum(dim=(0, 2, 3))) / count.item()
        self._update_running(mean.detach(), variance.detach(), count.item())
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, count: float) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        unbiased = variance * count / max(count - 1, 1)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked += 1


def _sum_over_ranks(values: Tensor) -> Tensor:
    total = _SumOverRanks.apply(values)
    assert isinstance(total, Tensor)
    return total


def synchronize_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with every BatchNorm2d replaced by a synchronized one with the same parameters and buffers."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for layer in list(model.modules()):
        for name, child in layer.named_children():
            if isinstance(child, nn.BatchNorm2d) and type(child) in (nn.BatchNorm2d, BatchNorm):
                replacement = CpuSyncBatchNorm2d(child.num_features, child.eps, child.momentum or 0.1)
                replacement._parameters, replacement._buffers = child._parameters, child._buffers
                setattr(layer, name, replacement)
    return model


@contextlib.contextmanager
def averaged_batchnorm(model: nn.Module, sum_over_ranks: Callable[[Tensor], Tensor], world_size: int) -> Iterator[None]:
    """Within the context, the running statistics are those over all ranks' images; after it, each rank's own again.

    The variance is that of the ranks' images together: mean(var + mean^2) - mean(mean)^2. The context restores the
    running statistics, so evaluation does not change the state of training.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    if world_size == 1 or not layers:
        yield
        return
    own = [(layer.running_mean, layer.running_var) for layer in layers]
    for layer, (mean, variance) in zip(layers, own, strict=True):
        assert mean is not None and variance is not None
        moments = sum_over_ranks(torch.stack((mean, variance + mean**2)).double()) / world_size
        layer.running_mean = moments[0].to(mean.dtype)
        layer.running_var = (moments[1] - moments[0] ** 2).to(variance.dtype)
    try:
        yield
    finally:
        for layer, (mean, variance) in zip(layers, own, strict=True):
            layer.running_mean, layer.running_var = mean, variance
