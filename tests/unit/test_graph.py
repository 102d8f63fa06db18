"""Inputs and outputs of a step's CUDA graph, tested on the CPU. Here, replaying a graph calls the step's code again.

The test shows three things: the step's code gets each batch with the random bits that augment it; capturing a graph
does not train the model; and a step does not overwrite the losses of the previous step.
`tests/whole_path/test_fake_cuda.py` tests captures, and `tests/whole_path/test_gpu.py` compares the weights of runs
with and without graphs.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.loader import Batch
from ddp_trainer.config import TrainConfig
from ddp_trainer.engine.graph import GraphedStep
from ddp_trainer.engine.trainer import Trainer
from tests.support.narrow import narrow_settings, narrow_trainer, single_runtime
from tests.support.stepping import differences


class FakeGraph:
    """Replaces a CUDA graph: a capture only records the arguments, and `replay` runs the step on the same tensors."""

    capturing: "FakeGraph | None" = None

    def record(self, trainer: Trainer, arguments: tuple[Batch, Any, int]) -> Tensor:
        self.trainer = trainer
        self.arguments = arguments
        self.losses = torch.empty(len(arguments[0].labels))
        return self.losses

    def replay(self) -> None:
        self.losses.copy_(self.trainer.device_step.without_graph(*self.arguments))


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def capture(graph: FakeGraph, *_: Any) -> Iterator[None]:
        FakeGraph.capturing = graph
        yield
        FakeGraph.capturing = None

    monkeypatch.setattr("torch.cuda.CUDAGraph", FakeGraph)
    monkeypatch.setattr("torch.cuda.graph", capture)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: None)


def use_graphs(trainer: Trainer) -> Trainer:
    """Makes the trainer take its steps through a `GraphedStep`, and returns the trainer."""

    def work(*arguments: Any) -> Tensor:
        graph = FakeGraph.capturing
        return trainer.device_step.without_graph(*arguments) if graph is None else graph.record(trainer, arguments)

    trainer.device_step._graphed = GraphedStep(work, trainer.state.optimizer, trainer.runtime, give_up=pytest.fail)
    return trainer


def train(trainer: Trainer) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Trains for three epochs. Returns the weights, and the losses of the last two steps, which `guard` keeps."""
    for epoch in range(3):
        trainer.train_epoch(epoch)
    return trainer.model.state_dict(), [attempt.losses for attempt in trainer.guard._recent]


@pytest.fixture
def settings(tiny_dir: Path) -> TrainConfig:
    """Settings of a run of nine steps, on crops of three sizes."""
    return narrow_settings(
        tiny_dir,
        augment={"flip": "alternating"},
        schedule={"epochs": 3, "small_crops": "16:0.35,24:0.6"},
        optim={"ema_decay": 0.9},
    )


@pytest.mark.usefixtures("fake_graphs")
def test_steps_with_and_without_graphs_train_the_same_model(settings: TrainConfig) -> None:
    weights, losses = train(narrow_trainer(settings, single_runtime()))
    trainer = use_graphs(narrow_trainer(settings, single_runtime()))
    weights_with_graphs, losses_with_graphs = train(trainer)
    assert trainer.state.step == 9  # three epochs of three steps; the captures do not count
    # Each step had its own batch and random bits, and the captures did not train the model.
    assert differences(weights, weights_with_graphs) == []
    assert torch.equal(torch.stack(losses), torch.stack(losses_with_graphs))
    assert not torch.equal(*losses_with_graphs)  # the last step did not overwrite the losses of the step before
