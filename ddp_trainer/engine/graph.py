"""The work of a step on a GPU as one CUDA graph: captured once, then started with one call instead of hundreds.

A graph repeats the same kernels on the same memory. What differs from step to step must therefore be in device memory
and keep its place there: the batch and the epoch are copied in before each step, `LearningRates` keeps the learning
rates, and everything that a step changes is updated in place. What the host does stays in `Trainer.train_step`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from data_prep.loader import Batch
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.runtime import Runtime

Work = Callable[[Batch, int | Tensor, int], Tensor]  # batch, epoch and side of the crops -> losses


def why_not(config: TrainConfig, runtime: Runtime) -> str | None:
    """Why the steps of a run are not captured into graphs; None if they are."""
    obstacles = {
        "the CPU has no graphs": runtime.device.type != "cuda",
        "--graph off": config.runtime.graph == "off",
        "fp16": runtime.precision == "fp16",
        "--accumulate": config.schedule.accumulate > 1,
        "--compile": config.runtime.compile,
        "--profile": config.run.profile > 0,
    }
    return next((name for name, applies in obstacles.items() if applies), None)


class GraphedStep:
    """Does `work` by replaying a graph of it. There is one graph for each crop size, captured when it is needed.

    A step of each size must have been taken before, because kernels are chosen and states created in a first step.
    If a capture fails, for instance because a network waits for the device, steps are taken without graphs from then
    on, and `say` is called with one line about it.
    """

    def __init__(self, work: Work, optimizer: torch.optim.Optimizer, say: Callable[[str], object]) -> None:
        """`work`: all that a step does on the device; it keeps nothing on the host."""
        self._work, self._optimizer, self._say = work, optimizer, say
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._batch: Batch | None = None
        self._failed = False

    def __call__(self, batch: Batch, epoch: int | Tensor, side: int) -> Tensor:
        """Losses of the batch, (N,)."""
        if side not in self._graphs and not self._failed:
            self._capture(batch, epoch, side)
        if self._failed:
            return self._work(batch, epoch, side)
        self._fill(batch, epoch)
        graph, losses = self._graphs[side]
        graph.replay()
        return losses.clone()  # the next replay overwrites them

    def _fill(self, batch: Batch, epoch: int | Tensor) -> None:
        assert self._batch is not None
        for place, values in zip(self._batch, batch, strict=True):
            place.copy_(values)
        if isinstance(epoch, Tensor):
            self._epoch.copy_(epoch)
        else:
            self._epoch.fill_(epoch)

    def _capture(self, batch: Batch, epoch: int | Tensor, side: int) -> None:
        """Records a step without taking it: nothing is computed during a capture."""
        if self._batch is None:
            self._batch = Batch(*(column.clone() for column in batch))
            self._epoch = torch.as_tensor(epoch).to(batch.indices, copy=True)
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        mode = "thread_local"  # meanwhile, the thread that writes checkpoints may wait for the device
        try:
            with _capturable(self._optimizer), torch.cuda.graph(graph, self._pool, stream, mode):
                losses = self._work(self._batch, self._epoch, side)
        except RuntimeError as error:
            self._failed = True
            self._optimizer.zero_grad(set_to_none=True)
            reason = str(error).partition("\n")[0]
            self._say(f"steps run without CUDA graphs, because one of them cannot be captured: {reason}")
        else:
            self._graphs[side] = graph, losses


@contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Tells AdamW that its step is being captured. Its fused form needs nothing else."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
