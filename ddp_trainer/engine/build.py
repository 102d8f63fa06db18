"""One way to put a trainer together, for a run, the range test, the benchmarks and the tests."""

from torch import nn

from data_prep.dataset import DatasetInfo
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.data import RunData, build_data
from ddp_trainer.engine.observer import Observer, SilentObserver
from ddp_trainer.engine.optim import build_optimizer
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.models.spec import ModelSpec, build_network


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

    `network`: maps normalized (N, 3, H, W) images to (N, num_classes) logits; by default the network of the settings.
    `data`: by default the training images of `dataset` and its evaluated split.
    """
    data = data or build_data(config, runtime, dataset)
    network = network or build_network(config.network, ModelSpec.of(dataset, config.network))
    optimizer = build_optimizer(network, config.optim)
    return Trainer(config, runtime, network, optimizer, data, observer or SilentObserver())
