"""Builds a trainer, in the same way for runs, the learning rate range test, the benchmarks and the tests."""

import torch
from torch import nn

from data_prep.dataset import DatasetInfo
from data_prep.errors import require
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.backend import explained_determinism
from ddp_trainer.distributed.hardware import resolve_device, resolve_precision
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.sync_batchnorm import not_synchronized
from ddp_trainer.engine.data import RunData, build_data, images_in_step
from ddp_trainer.engine.ema import frozen_copy
from ddp_trainer.engine.observer import Observer
from ddp_trainer.engine.optim import build_optimizer
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.models.autocast_check import check_autocast
from ddp_trainer.models.check import MAX_IMAGES, check_network, check_rebuilt
from ddp_trainer.models.host_generators import kept_host_generators
from ddp_trainer.models.initial_weights import load_initial_weights, parameters_named
from ddp_trainer.models.registry import is_user_function, require_unchanged
from ddp_trainer.models.spec import ModelSpec, build_model, build_network, require_same_widths_and_activation
from ddp_trainer.models.trial_pass import trial_images


def prepare_network(
    config: TrainConfig, dataset: DatasetInfo, *, world_size: int, load_weights: bool
) -> tuple[nn.Module, list[str]]:
    """The network that the settings describe, and lines to print about it.

    `load_weights`: whether to apply --init-from; False for a resumed run, whose weights are in its checkpoint. Raises
    InputError if the network cannot be built or trained.
    """
    spec, name = ModelSpec.of(dataset, config), config.network.network
    require_unchanged(name)
    network, lines = build_network(config.network, spec), []
    sides = config.schedule.crop_sides(spec.image_size)
    own_statistics = not_synchronized(network)
    smallest = images_per_pass(config, world_size, synchronized=not own_statistics)
    unused = check_network(
        network,
        name,
        num_classes=len(spec.classes),
        sides=sides,
        images_per_pass=smallest,
        channels_last=config.runtime.channels_last,
    )
    if is_user_function(name):
        _check_user_function(network, config, spec, count=min(smallest, MAX_IMAGES))
    if config.optim.ema_decay:
        frozen_copy(network)  # raises InputError if the network cannot be copied, before anything is written
    if unused:
        names = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        require(
            config.schedule.accumulate == 1,
            f"--accumulate needs a network that uses all its parameters, but {name} does not use {names}; freeze them "
            "with --freeze",
        )
        lines.append(f"{len(unused)} parameters of {name} get no gradient and do not change: {names}")
    parameters_named(network, config.schedule.frozen_late, flag="--freeze-late")  # raises InputError for wrong names
    if config.runtime.sync_bn and own_statistics:
        lines.append(f"--sync-bn has no effect on the {', '.join(own_statistics)} layers of {name}")
    if load_weights and config.network.init_from is not None:
        require_same_widths_and_activation(spec, config.network.init_from)
        loaded = load_initial_weights(network, config.network.init_from)
        lines.append(loaded.describe(config.network.init_from))
    return network, lines


def _check_user_function(network: nn.Module, config: TrainConfig, spec: ModelSpec, *, count: int) -> None:
    """Raises InputError if the user's function gives other networks in later calls, or if autocast fails.

    Tries autocast with another network, so that `network` need not be moved to the device yet. `count`: number of
    images to try it with.
    """
    sides, runtime, name = config.schedule.crop_sides(spec.image_size), config.runtime, spec.architecture
    precision = resolve_precision(runtime)
    with kept_host_generators():
        torch.default_generator.manual_seed(runtime.seed + 1)  # so that other random weights are drawn
        rebuilt = build_model(spec)
        check_rebuilt(network, rebuilt, name, side=max(sides))
    if precision != "fp32":
        images = trial_images(rebuilt.to(resolve_device(runtime)), count, min(sides))
        images = images if runtime.channels_last else images.contiguous()
        with explained_determinism():
            check_autocast(rebuilt, name, images, precision=precision)


def images_per_pass(config: TrainConfig, world_size: int, *, synchronized: bool = True) -> int:
    """The smallest number of images that a BatchNorm layer sees at once.

    `synchronized`: whether --sync-bn has an effect on all BatchNorm layers.
    """
    accumulate = 1 if config.schedule.accumulate == "auto" else config.schedule.accumulate
    ranks = range(world_size) if config.runtime.sync_bn and synchronized else (0,)  # rank 0 has the fewest images
    return sum(images_in_step(config, rank, world_size) // accumulate for rank in ranks)


def build_trainer(
    config: TrainConfig,
    runtime: Runtime,
    dataset: DatasetInfo,
    *,
    network: nn.Module | None = None,
    data: RunData | None = None,
    observer: Observer | None = None,
) -> Trainer:
    """A trainer at step 0, on this rank's device.

    `network`: maps normalized (N, 3, H, W) images to (N, num_classes) logits; default: the network of the settings.
    `data`: the images of the run; default: those of `dataset`, as the settings select them.
    """
    data = data or build_data(config, runtime, dataset)
    if network is None:
        network, _ = prepare_network(config, dataset, world_size=runtime.world_size, load_weights=True)
    late = parameters_named(network, config.schedule.frozen_late, flag="--freeze-late")
    optimizer = build_optimizer(network, config.optim, late)
    return Trainer(config, runtime, network, optimizer, data, observer or Observer())
