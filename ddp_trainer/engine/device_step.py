"""The part of a step that runs on the device. Only this module computes the gradients of a step.

A step waits for the device only while it captures a graph, or if the network or an optimizer that is not fused waits.
Apart from the crop size, all values that differ between steps are on the device, so that a GPU can replay each step as
a graph.
"""

import contextlib
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from data_prep.augment import AugmentedBatch, split_batch
from data_prep.loader import Batch
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.backend import explained_determinism
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.data import RunData
from ddp_trainer.engine.graph import GraphedStep, reason_against_graphs
from ddp_trainer.engine.loss import losses_per_image
from ddp_trainer.engine.step_guard import weights_if_finite
from ddp_trainer.engine.train_state import TrainState
from ddp_trainer.engine.warm_up import warm_up


class DeviceStep:
    """Augments a batch, computes its gradients, and updates the model, the running sums and the moving average."""

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        state: TrainState,
        wrapped: nn.Module,
        data: RunData,
        *,
        say: Callable[[str], object],
    ) -> None:
        """`wrapped`: the network of `state`, in DDP if there are several processes.

        `say`: called with one line if the steps cannot be captured.
        """
        self.config, self.runtime, self.state, self.wrapped, self.data = config, runtime, state, wrapped, data
        self.no_graph_reason = reason_against_graphs(config, runtime)
        self._say = say
        self._graphed: GraphedStep | None = None
        runtime.before_close.append(self.release_graph)
        self._prepare(config.schedule.crop_sides(data.spec.image_size))

    def __call__(self, batch: Batch, draws: Tensor, side: int) -> Tensor:
        """Takes or skips a step on crops of `side` pixels. Returns the losses, (N,). `draws`: see `Augmenter.draw`."""
        return (self._graphed or self.without_graph)(batch, draws, side)

    def freeze(self, parameters: Iterable[nn.Parameter], sides: list[int]) -> None:
        """Excludes `parameters` from all following backward passes. A collective operation that waits for the device.

        DDP and the graphs are rebuilt: the old DDP instance would wait for the gradients of `parameters`, and the old
        graphs would still compute these gradients. `sides`: crop sizes of the following steps.
        """
        for parameter in parameters:
            parameter.requires_grad_(False)
        self.runtime.synchronize()
        self.release_graph()  # the warm-up needs the memory of the old graph
        self.wrapped = self.runtime.wrap_again(self.wrapped)
        self._prepare(sides)

    def release_graph(self) -> None:
        """Frees the captured graph, if any. Later steps run without graphs.

        NCCL closes a process group only after all graphs that use it are freed.
        """
        self._graphed = None

    def _give_up_graphs(self, reason: str) -> None:
        """Makes all following steps run without graphs, after a failed capture. A collective operation."""
        self.no_graph_reason = reason
        self._say(f"steps run without CUDA graphs, because a step cannot be captured: {reason}")
        self.state.optimizer.zero_grad(set_to_none=True)
        self.wrapped = self.runtime.wrap_again(self.wrapped)  # DDP is in the middle of a step
        self._prepare(self._sides)

    def _prepare(self, sides: list[int]) -> None:
        """Warms up, so that the first step takes no longer than others, and prepares the capture of graphs."""
        self._sides = sides
        self.loss_weight = math.nan  # makes the gradients NaN, so that the guard skips the warm-up steps
        with explained_determinism():
            warm_up(self.state, self.without_graph, self.config, self.data.spec.image_size, sides)
        self.loss_weight = self.runtime.world_size / self.config.schedule.batch_size  # 1 / the mean images per rank
        graphed = GraphedStep(self.without_graph, self.state.optimizer, self.runtime, give_up=self._give_up_graphs)
        self._graphed = None if self.no_graph_reason else graphed

    def without_graph(self, batch: Batch, draws: Tensor, side: int) -> Tensor:
        """Takes a step as `__call__` does, but never with a graph.

        Changes nothing on the host that later steps read: see `GraphedStep`.
        """
        state = self.state
        augmented = self.data.augmenter.augment(batch, draws, side)
        losses = []
        with state.guard.attempt() as decision:  # the optimizer's step is taken when this block ends
            parts = list(split_batch(augmented, self.config.schedule.passes))
            for part in parts:  # only the last backward pass averages the gradients over the ranks
                with contextlib.nullcontext() if part is parts[-1] else self.runtime.no_sync(self.wrapped):
                    losses.append(self._backward(part))
        if state.ema is not None:
            state.ema.update(state.model, skip=decision.skipped)
        return torch.cat(losses) if len(losses) > 1 else losses[0]

    def _backward(self, part: AugmentedBatch) -> Tensor:
        """Adds the gradients of `part`, updates the running sums, and returns the losses, (N,)."""
        logits = self.wrapped(self.runtime.laid_out(part.images))
        losses = losses_per_image(
            logits,
            part.labels,
            part.partner_labels,
            part.label_weights,
            label_smoothing=self.config.optim.label_smoothing,
            class_weights=self.data.class_weights,
        )
        # With this weight, DDP's average is the mean gradient of the global batch, even if some ranks have more images.
        self.runtime.backward(losses, weights_if_finite(self.loss_weight, losses))
        self.state.sums.add(losses.detach(), logits.detach().argmax(dim=1) == part.labels)
        return losses.detach()
