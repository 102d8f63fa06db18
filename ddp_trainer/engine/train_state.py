"""The content of a checkpoint: everything on which the rest of a run depends.

The order of the images, their augmentation and the learning rate are pure functions of seed and step, so they need no
state. Dropout draws its numbers from torch's generators, so the states of these generators are saved.

The entries `buffers` (running statistics of BatchNorm), `sums` (of the current epoch) and `generators` differ between
ranks, so they have one row for each rank.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import require
from data_prep.sources import name_some
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.ema import Ema
from ddp_trainer.engine.metrics import RunningSums, Stopwatch
from ddp_trainer.engine.random_state import random_state, restore_random_state
from ddp_trainer.engine.step_guard import SkippedSteps, StepGuard
from ddp_trainer.models.initial_weights import load_tensors
from ddp_trainer.tracking.metric_files import Record

KEYS = frozenset(
    {
        "step",
        "history",
        "epoch_seconds",
        "skipped_steps",
        "model",
        "optimizer",
        "scaler",
        "ema",
        "buffers",
        "sums",
        "logged_sums",
        "generators",
    }
)


def require_fitting(network: nn.Module, state: Mapping[str, Any]) -> None:
    """Raises InputError if the tensors in `state` do not fit `network`, whose code may have changed since the save."""
    own, saved = (
        {name: getattr(value, "shape", None) for name, value in tensors.items()}
        for tensors in (network.state_dict(), state["model"])
    )
    names = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
    trainable = sum(parameter.requires_grad for parameter in network.parameters())
    if trainable != sum(len(group["params"]) for group in state["optimizer"]["param_groups"]):
        names.append("which parameters are trained")
    require(
        not names,
        f"--resume: the checkpoint does not fit the network (different: {name_some(names)}); restore the code with "
        "which the run was started, or use another --out",
    )


class TrainState:
    """Model, optimizer and position of one run on one rank."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: Ema | None,
        runtime: Runtime,
        *,
        clip: Callable[[], None],
    ) -> None:
        """`optimizer`: as `Runtime.prepare` returned it. `clip`: see `StepGuard`."""
        self.model, self.optimizer, self.ema, self.runtime = model, optimizer, ema, runtime
        self.step = 0  # optimizer steps done
        self.history: list[Record] = []  # one record per finished epoch
        self.sums = RunningSums(runtime.device)  # of the current epoch, over this rank's images
        self.logged_sums = torch.zeros_like(self.sums.values)  # `sums` over all ranks, as of the last step record
        self.watch = Stopwatch()  # of the current epoch, evaluation excluded
        self.guard = StepGuard(
            model, optimizer, [self.sums.values], scaler=runtime.scaler, clip=clip, timeout=runtime.timeout
        )

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint, with the entries KEYS. A collective operation: call it on every rank.

        Raises NonFinite if the run cannot continue because of skipped steps: see `StepGuard`.
        """
        skipped = self.guard.skipped_steps()
        scaler = self.runtime.scaler
        return {
            "step": self.step,
            "history": self.history,
            "epoch_seconds": self.watch.read(),
            "skipped_steps": list(skipped),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "buffers": gather_named(self.runtime, self._buffers()),  # {name: (world_size, ...)}
            "sums": self.runtime.gather(self.sums.values),  # (world_size, 3)
            "logged_sums": self.logged_sums,
            "generators": self.runtime.gather(random_state(self.runtime.device)),  # (world_size, L)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned. The number of processes may have changed since then.

        In that case, running statistics are combined, sums are divided equally among the ranks, and the states of
        torch's generators are not restored.
        """
        self._check_buffers(state["buffers"])
        self.step, self.history = state["step"], list(state["history"])
        self.watch.seconds = state["epoch_seconds"]
        self.guard.restore(SkippedSteps(*state["skipped_steps"]))
        load_tensors(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.runtime.scaler is not None and state["scaler"]:
            self.runtime.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            load_tensors(self.ema, state["ema"])
        self._load_buffers(state["buffers"])
        rank, world_size, sums = self.runtime.rank, self.runtime.world_size, state["sums"]
        self.sums.values.copy_(sums[rank] if len(sums) == world_size else sums.sum(dim=0) / world_size)
        self.logged_sums.copy_(state["logged_sums"])
        if len(state["generators"]) == world_size:
            restore_random_state(state["generators"][rank], self.runtime.device)

    def start_epoch(self, sums: Tensor) -> None:
        """Resets what is counted per epoch: loss, correct predictions, images, seconds and skipped steps.

        `sums`: the sums of the finished epoch over all ranks.
        """
        self.watch = Stopwatch()
        self.sums.reset()
        # A step record is computed from `self.sums`, added up over all ranks, minus `self.logged_sums`. The reset has
        # lowered the former by `sums`, so the latter is lowered by `sums`, too. The next record then also covers the
        # end of the finished epoch.
        self.logged_sums -= sums
        self.guard.start_epoch()

    def _buffers(self) -> dict[str, Tensor]:
        """This rank's floating-point buffers: those of the model and those of its moving average."""
        models = {"model": self.model} if self.ema is None else {"model": self.model, "ema": self.ema}
        return {
            f"{owner}.{name}": buffer
            for owner, module in models.items()
            for name, buffer in module.named_buffers()
            if buffer.is_floating_point()
        }

    def _check_buffers(self, saved: dict[str, Tensor]) -> None:
        """Raises InputError unless the buffers in `saved` have the names and shapes of this network's buffers."""
        ours = {(name, tuple(buffer.shape)) for name, buffer in self._buffers().items()}
        theirs = {(name, tuple(rows.shape[1:])) for name, rows in saved.items()}
        names = ", ".join(sorted({name for name, _ in ours ^ theirs}))
        require(not names, f"--resume: the buffers in the checkpoint differ from those of the network ({names})")

    def _load_buffers(self, saved: dict[str, Tensor]) -> None:
        for name, buffer in self._buffers().items():
            rows = saved[name]
            same_ranks = len(rows) == self.runtime.world_size
            buffer.copy_(rows[self.runtime.rank] if same_ranks else _merged(saved, name))


def _merged(saved: dict[str, Tensor], name: str) -> Tensor:
    """The average of a buffer over all ranks. A variance becomes that of the images of all ranks together."""
    rows, means = saved[name].double(), saved.get(f"{name.removesuffix('running_var')}running_mean")
    if not name.endswith("running_var") or means is None:
        return rows.mean(dim=0)
    return (rows + means.double() ** 2).mean(dim=0) - means.double().mean(dim=0) ** 2


def gather_named(runtime: Runtime, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gathers named tensors of shape (...) into float64 tensors of shape (world_size, ...), in one collective."""
    if not tensors:
        return {}
    flat = runtime.gather(torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()]))
    columns = flat.split([tensor.numel() for tensor in tensors.values()], dim=1)
    return {
        name: column.reshape(runtime.world_size, *tensor.shape)
        for (name, tensor), column in zip(tensors.items(), columns, strict=True)
    }
