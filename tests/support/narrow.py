"""Builds a real trainer in this process, with a network so narrow that a step takes milliseconds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.augment import Augmenter
from data_prep.dataset import read_dataset
from ddp_trainer.config import RuntimeConfig, TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import StopRequest
from ddp_trainer.engine.build import build_trainer
from ddp_trainer.engine.data import build_data
from ddp_trainer.engine.observer import Observer
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.models.spec import ModelSpec, build_network
from ddp_trainer.recipes import smoke

WIDTHS = (8, 8, 16, 16)
Sections = dict[str, dict[str, Any]]  # section of TrainConfig -> setting -> value


def changed(config: TrainConfig, *changes: Sections) -> TrainConfig:
    """Returns `config` with some settings changed: `changed(config, {"optim": {"clip_norm": 1.0}})`."""
    for sections in changes:
        parts = {name: replace(getattr(config, name), **values) for name, values in sections.items()}
        config = replace(config, **parts)
    return config


def narrow_settings(data_dir: Path, **sections: dict[str, Any]) -> TrainConfig:
    """Returns the recipe `smoke` with a narrow network and without a limit on the number of steps.

    `sections`: other settings, by section: `narrow_settings(data_dir, optim={"clip_norm": 1.0})`.
    """
    narrow: Sections = {"data": {"data_dir": data_dir}, "network": {"widths": WIDTHS}, "schedule": {"max_steps": None}}
    return changed(smoke(), narrow, sections)


def single_runtime(*, device: str = "cpu", graph: str = "auto", stop: StopRequest | None = None) -> Runtime:
    """Returns an fp32 runtime of one process, without signal handlers."""
    config = RuntimeConfig(device=device, precision="fp32", graph=graph)  # type: ignore[arg-type]
    return Runtime(config, stop=stop or StopRequest())


def narrow_trainer(
    config: TrainConfig,
    runtime: Runtime,
    *,
    dtype: torch.dtype = torch.float32,
    network: nn.Module | None = None,
    observer: Observer | None = None,
) -> Trainer:
    """Calls `build_trainer` with weights and images of type `dtype`."""
    dataset = read_dataset(config.data.data_dir)
    spec, data = ModelSpec.of(dataset, config), build_data(config, runtime, dataset)
    augmenter = Augmenter(config.augment, mean=spec.mean, std=spec.std, seed=config.runtime.seed, dtype=dtype)
    network = network or build_network(config.network, spec)
    data = replace(data, augmenter=augmenter)
    return build_trainer(config, runtime, dataset, network=network.to(dtype), data=data, observer=observer)
