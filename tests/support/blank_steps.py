"""Builds trainers that need no dataset, for steps on blank images or on meta tensors."""

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.augment import Augmenter
from data_prep.loader import Batch
from ddp_trainer.config import RuntimeConfig, TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import StopRequest
from ddp_trainer.engine.build import build_trainer
from ddp_trainer.engine.data import RunData
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.models.spec import ModelSpec, build_network


def _step_on_meta(*arguments: Any, **options: Any) -> None:
    """Replaces the fused optimizer steps for meta tensors. Only checks that all tensors are on the meta device."""
    values = [*arguments, *options.values()]
    tensors = [one for value in values for one in (value if isinstance(value, list) else [value])]
    if {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)} != {"meta"}:
        raise RuntimeError("the tensors of a fused step are on different devices")


_META = torch.library.Library("aten", "IMPL", "Meta")
for _name in ("_fused_sgd_", "_fused_sgd_.tensor_lr", "_fused_adamw_.tensor_lr"):  # torch has no meta kernels for these
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_name}", "Meta"):
        _META.impl(_name, _step_on_meta)


class MetaRuntime(Runtime):
    """A single-process runtime on the meta device, whose tensors have shapes but no values.

    Anything that would wait for a GPU raises an error here, because there is no value to wait for. An operation on
    tensors of different devices raises an error, too.
    """

    def __init__(self, config: RuntimeConfig) -> None:
        super().__init__(replace(config, device="cpu", precision="fp32"), stop=StopRequest())
        self.device = torch.device("meta")

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: int
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        optimizer._need_device_dtype_check_for_fused = False  # type: ignore[attr-defined]  # the check rejects "meta"
        return model, optimizer

    def backward(self, losses: Tensor, weights: Tensor) -> None:
        losses.backward(weights)

    def clip_gradients(self, model: nn.Module, max_norm: float) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


def blank_trainer(config: TrainConfig, runtime: Runtime) -> Trainer:
    """A trainer for ten classes of 32x32 images, without a dataset."""
    spec = ModelSpec(
        classes=tuple("0123456789"),
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        image_size=32,
        widths=config.network.widths,
        activation=config.network.activation,
        architecture=config.network.network,
    )
    data = RunData(
        config=config,
        runtime=runtime,
        loader=None,  # type: ignore[arg-type]
        samples=np.arange(50_000),
        augmenter=Augmenter(config.augment, mean=spec.mean, std=spec.std, seed=0),
        evaluator=type("Evaluator", (), {"spec": spec})(),  # type: ignore[arg-type]
    )
    network = build_network(config.network, spec)
    return build_trainer(config, runtime, None, network=network, data=data)  # type: ignore[arg-type]


def blank_batch(count: int, device: torch.device) -> Batch:
    """`count` black images of class 0 in channels-last order. `count` must be even, because CutMix pairs images."""
    images = torch.zeros(count, 32, 32, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    labels, indices = (torch.zeros(count, dtype=torch.int64, device=device) for _ in range(2))
    return Batch(images, labels, indices)
