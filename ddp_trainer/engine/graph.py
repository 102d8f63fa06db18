"""Captures the work of a step on a GPU into a CUDA graph, so that one call launches all its kernels.

A graph repeats the same kernels at the same memory addresses. All values that differ between replays must therefore be
at fixed addresses in device memory: the batch and the random bits for its augmentation are copied there before each
step, `LearningRates` keeps the learning rates there, and everything that a step changes is updated in place. The host's
part of a step is in `Trainer.train_step`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from data_prep.loader import Batch
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.models.host_generators import HostGenerators

Work = Callable[[Batch, Tensor, int], Tensor]  # batch, random bits for its augmentation, side of the crops -> losses


def reason_against_graphs(config: TrainConfig, runtime: Runtime) -> str | None:
    """The reason why the steps of a run are not captured into graphs, or None if they are captured."""
    obstacles = {
        "the CPU has no graphs": runtime.device.type != "cuda",
        "--graph off": config.runtime.graph == "off",
        "fp16": runtime.precision == "fp16",
        "--accumulate": config.schedule.passes > 1,
        "--compile": config.runtime.compile,
        "--profile": config.run.profile > 0,
    }
    return next((name for name, applies in obstacles.items() if applies), None)


class CapturedStep(NamedTuple):
    side: int  # of the crops
    graph: torch.cuda.CUDAGraph
    losses: Tensor  # (N,) written by each replay


class GraphedStep:
    """Replays a graph of `work`. A graph is captured when a crop size is first used.

    Crops only grow during a run, so only the newest graph is kept. Call `warm_up` with all crop sizes first: it chooses
    the kernels, creates the optimizer's state, and takes the first steps of DDP, which cannot be captured.

    If a capture fails on any rank, for example because the network waits for the device, `give_up` is called on every
    rank with the reason. `give_up` must make later steps run without graphs.
    """

    def __init__(
        self, work: Work, optimizer: torch.optim.Optimizer, runtime: Runtime, *, give_up: Callable[[str], object]
    ) -> None:
        """`work`: everything that a step does on the device.

        A replay repeats the kernels that `work` launched, but runs none of its Python code. `work` must therefore not
        change anything on the host that later steps read.
        """
        self._work, self._optimizer, self._runtime, self._give_up = work, optimizer, runtime, give_up
        self._captured: CapturedStep | None = None
        self._batch: Batch | None = None

    def __call__(self, batch: Batch, draws: Tensor, side: int) -> Tensor:
        """Takes one step and returns the losses of the batch, (N,)."""
        if self._captured is None or self._captured.side != side:
            self._captured = None  # frees the memory of the graph of smaller crops
            failure = self._capture(batch, draws, side)
            if not self._runtime.all_agree(failure is None):
                self._captured = None  # frees the memory of the graph, which `give_up` needs
                self._give_up(failure or "the capture failed in another process")
        if self._captured is None:
            return self._work(batch, draws, side)
        self._fill(batch, draws)
        self._captured.graph.replay()
        return self._captured.losses.clone()  # the next replay overwrites them

    def _fill(self, batch: Batch, draws: Tensor) -> None:
        assert self._batch is not None
        for place, values in zip((*self._batch, self._draws), (*batch, draws), strict=True):
            place.copy_(values)

    def _capture(self, batch: Batch, draws: Tensor, side: int) -> str | None:
        """Captures a step into a graph. Returns None, or the reason why the capture failed.

        The step is not taken, because kernels do not run during a capture. If the capture fails, restores the host's
        random generators: the network may have drawn numbers on the host, and will draw them again when the step is
        taken.
        """
        if self._batch is None:
            self._batch = Batch(*(column.clone() for column in batch))
            self._draws = draws.clone()
        self._runtime.synchronize()  # has a time limit, unlike the wait for the device at the start of the capture
        before = HostGenerators.read()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        mode = "thread_local"  # the thread that writes checkpoints may wait for the device during the capture
        try:
            with _capturable(self._optimizer), torch.cuda.graph(graph, pool, stream, mode):
                losses = self._work(self._batch, self._draws, side)
        except RuntimeError as error:
            before.restore()
            # If a forbidden call ended the capture, `error` says only that the capture failed. The cause is the
            # context of `error`.
            cause = error.__context__ or error
            return str(cause).strip().partition("\n")[0] or type(cause).__name__
        if not HostGenerators.read().equals(before):  # a replay would repeat the values that were drawn just now
            before.restore()
            return "the network draws random numbers on the host"
        self._captured = CapturedStep(side, graph, losses)
        return None


@contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Marks AdamW's parameter groups as capturable within the block. A capture of fused AdamW needs nothing else.

    Outside a capture, torch would warn about the mark, and checkpoints would contain it.
    """
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
