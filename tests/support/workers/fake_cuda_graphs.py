"""Trains with and without CUDA graphs on the imitation of CUDA, and prints as JSON what was launched on the device.

Run it with the environment variables of `tests.support.fake_cuda.library`, as one process or as several ranks.
Argument: DATA_DIR.
"""

import itertools
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.parallel.distributed as ddp
from torch import Tensor

from data_prep.loader import Batch
from ddp_trainer.distributed.process_settings import restored_settings
from ddp_trainer.engine.graph import GraphedStep
from ddp_trainer.engine.host_copy import HostCopy
from ddp_trainer.engine.trainer import Trainer
from tests.support.fake_cuda.library import end_process, logged
from tests.support.workers.fake_cuda_cases import CAPTURED, CARELESS, EAGER, NOT_CAPTURED, RANKS
from tests.support.workers.fake_cuda_steps import Steps, careless


def train(trainer: Trainer, epochs: int = 3) -> dict[str, Any]:
    """Trains for some epochs. Returns what was launched and captured, and the lines printed for the user."""
    said: list[str] = []
    if trainer.device_step._graphed is not None:
        trainer.device_step._say = said.append
    with logged() as calls, counted_captures() as captures:
        for epoch in range(epochs):
            trainer.train_epoch(epoch)  # not `fit`: its evaluation needs values, and the imitation computes none
    return {
        "steps": trainer.state.step,
        "graphs": calls.graphs,
        "captures": len(captures),
        "collectives": sum(call.kind == "NCCL" for call in calls),
        "illegal": calls.illegal,
        "said": said,
        "next random number": torch.rand(()).item(),  # drawn on the host
    }


@contextmanager
def counted_captures() -> Iterator[list[Any]]:
    """Yields a list that gets one element for each capture that begins in the block."""
    captures: list[Any] = []
    original = torch.cuda.graph.__enter__
    torch.cuda.graph.__enter__ = lambda self: (captures.append(None), original(self))[1]  # type: ignore[method-assign]
    try:
        yield captures
    finally:
        torch.cuda.graph.__enter__ = original  # type: ignore[method-assign]


def step_of(trainer: Trainer) -> Callable[[], None]:
    batches = itertools.chain.from_iterable(trainer.data.batches(epoch, slice(None)) for epoch in itertools.count())

    def step() -> None:
        batch, draws = next(batches)
        trainer.train_step(batch, 0, draws)

    return step


def cost(trainer: Trainer) -> dict[str, Any]:
    """The operations and waits of one step, and its CPU time in milliseconds (median of 20 steps)."""
    step = step_of(trainer)
    for _ in range(3):
        step()
    with logged() as calls:
        step()
    times = []
    for _ in range(20):
        start = time.thread_time()
        step()
        times.append(1e3 * (time.thread_time() - start))
    return {"operations": calls.operations, "waits": calls.waits, "host_ms": sorted(times)[10]}


def second_copy(trainer: Trainer) -> dict[str, Any]:
    """The waits and copies of the second `HostCopy` of the state."""
    state = {"model": trainer.model.state_dict(), "optimizer": trainer.state.optimizer.state_dict()}
    HostCopy(state).read()
    with logged() as calls:
        HostCopy(state)
    return {"waits": calls.waits, "copies": sum(call.kind == "COPY_PINNED" for call in calls)}


@contextmanager
def another_thread_waits(trainer: Trainer) -> Iterator[None]:
    """Makes another thread wait for the device during `DeviceStep.without_graph`, as a checkpoint thread may do."""
    event, work = torch.cuda.Event(), trainer.device_step.without_graph

    def slow_work(batch: Batch, draws: Tensor, side: int) -> Tensor:
        thread = threading.Thread(target=event.synchronize)
        thread.start()
        thread.join()
        return work(batch, draws, side)

    trainer.device_step._graphed._work = slow_work  # type: ignore[union-attr]
    yield


def failure_of_another_rank(trainer: Trainer) -> dict[str, Any]:
    """What is printed if the capture succeeds here, but not on another rank, and whether the graph is then freed."""
    take = trainer.device_step._graphed
    assert isinstance(take, GraphedStep)
    capture, give_up = take._capture, take._give_up
    graphs: list[weakref.ref[torch.cuda.CUDAGraph]] = []
    alive: list[bool] = []

    def remember(batch: Batch, draws: Tensor, side: int) -> None:
        assert capture(batch, draws, side) is None
        assert take._captured is not None
        graphs.append(weakref.ref(take._captured.graph))
        trainer.runtime.all_agree = lambda agrees: False  # type: ignore[method-assign]

    def look(reason: str) -> None:
        alive.extend(graph() is not None for graph in graphs)
        del trainer.runtime.all_agree  # the method of the class again
        give_up(reason)

    take._capture, take._give_up = remember, look  # type: ignore[method-assign]
    return {**train(trainer, epochs=1), "alive": alive}


def main(data_dir: Path) -> None:
    steps = Steps(data_dir)
    for name, config in {**CAPTURED, **NOT_CAPTURED, **EAGER}.items():
        with restored_settings():
            trainer = steps.trainer(config)
            print(json.dumps({"case": name, **train(trainer), "cost": cost(trainer)}), flush=True)
    with restored_settings(), careless(CARELESS["item"]):
        print(json.dumps({"case": "waiting", **train(steps.trainer(CAPTURED["sgd"]))}), flush=True)
    with restored_settings():
        trainer = steps.trainer(CAPTURED["sgd"])
        with another_thread_waits(trainer):
            print(json.dumps({"case": "thread", **train(trainer, epochs=1)}), flush=True)
        print(json.dumps({"case": "second copy", **second_copy(trainer)}), flush=True)
    with restored_settings():
        found = failure_of_another_rank(steps.trainer(CAPTURED["sgd"]))
        print(json.dumps({"case": "failure of another rank", **found}), flush=True)


def ranks(data_dir: Path) -> None:
    """Trains with several ranks, once for each case in RANKS and NOT_CAPTURED. The collectives differ between cases."""
    # Replaced, because the original compares all ranks' shapes on the device, which computes nothing here.
    ddp._verify_param_shape_across_processes = lambda *_: True  # type: ignore[attr-defined]
    for name, config in {**RANKS, **NOT_CAPTURED}.items():
        with restored_settings():
            trainer = Steps(data_dir).trainer(config)
            found = train(trainer, epochs=1)
            with logged() as calls:
                trainer.runtime.close()
        found["illegal"] += calls.illegal
        found["left"] = sum(call.name == "ncclCommDestroy" for call in calls)
        if trainer.runtime.is_main:
            print(json.dumps({"case": name, **found}), flush=True)


if __name__ == "__main__":
    ranks(Path(sys.argv[1])) if "RANK" in os.environ else main(Path(sys.argv[1]))
    end_process()
