"""The training loops that the program `training_step.py` describes and compares.

A `*_step` function returns a function that takes one step. All loops train the network of
`config`, with the batch size of `config`, on crops of `side` pixels.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.batch_ops import batch_normalize
from data_prep.dataset import read_dataset
from data_prep.loader import Batch, ResidentLoader, StreamLoader, build_loader
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.backend import set_backend_flags
from ddp_trainer.distributed.hardware import resolve_device, resolve_precision
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import StopRequest
from ddp_trainer.engine.build import build_trainer
from ddp_trainer.models.spec import ModelSpec, build_network

Step = Callable[[], object]
AMP_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def our_step(config: TrainConfig, side: int) -> Step:
    schedule = replace(config.schedule, train_size=side, small_crops="", freeze_late="")
    config, runtime = replace(config, schedule=schedule), Runtime(config.runtime, stop=StopRequest())
    trainer = build_trainer(config, runtime, read_dataset(config.data.data_dir))
    batch = first_batch(trainer.data.loader)
    # A run draws the random bits for augmentation once per 64 steps, so they are drawn here, outside the measured step.
    draws = trainer.data.augmenter.draw(batch.indices, 0)

    def step() -> None:
        runtime.stop.announce()
        trainer.train_step(batch, 0, draws)
        runtime.stop.agreed()

    return step


def our_step_without_graph(config: TrainConfig, side: int) -> Step:
    return our_step(replace(config, runtime=replace(config.runtime, graph="off")), side)


def bare_step(config: TrainConfig, side: int) -> Step:
    set_backend_flags(config.runtime)
    model, images, labels = ready(config, side)
    if config.runtime.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    else:
        images = images.contiguous()
    if config.runtime.compile:
        model.compile(dynamic=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    amp_type = AMP_TYPES[resolve_precision(config.runtime)]

    def step() -> None:
        with torch.autocast(images.device.type, amp_type, enabled=amp_type is not None):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bare_graph_step(config: TrainConfig, side: int) -> Step:
    step = bare_step(config, side)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels must be loaded and selected before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(_keeps_tensors: Step = step) -> None:  # keeps alive what the graph uses: model, images, optimizer
        graph.replay()

    return replay


def newcomer_step(config: TrainConfig, side: int) -> Step:
    model, images, labels = ready(config, side)
    images = images.contiguous()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


LOOPS = {
    "ours": our_step,
    "ours_no_graph": our_step_without_graph,
    "bare": bare_step,
    "bare_graph": bare_graph_step,
    "newcomer": newcomer_step,
}
ON_GPUS_ONLY = ("ours_no_graph", "bare_graph")


def available_loops(config: TrainConfig) -> list[str]:
    return [name for name in LOOPS if name not in ON_GPUS_ONLY or resolve_device(config.runtime) == "cuda"]


def first_batch(loader: ResidentLoader | StreamLoader) -> Batch:
    return next(iter(loader.batches([np.arange(loader.batch_size)])))


def ready(config: TrainConfig, side: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, normalized images and labels, all on the device. The images are channels-last."""
    dataset = read_dataset(config.data.data_dir)
    spec = ModelSpec.of(dataset, config)
    batch = first_batch(
        build_loader(
            config.data.data_dir / dataset.splits["train"].file,
            mode="resident",
            device=torch.device(resolve_device(config.runtime)),
            batch_size=config.schedule.batch_size,
            num_workers=1,
        )
    )
    images = batch_normalize(batch.images[:, :, :side, :side], spec.mean, spec.std, torch.float32)
    network = build_network(config.network, spec).to(images.device)
    return network, images.contiguous(memory_format=torch.channels_last), batch.labels
