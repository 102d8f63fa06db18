"""Where the run runs: ranks, devices, precision, seeds, collectives. The only file that sees Accelerator.

Not owned here: what is computed, and what is logged or saved.
"""

import contextlib
import warnings
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.backend import set_backend_flags, use_all_cores
from ddp_trainer.distributed.gloo_interface import avoid_loopback
from ddp_trainer.distributed.hardware import cpu_name, resolve_device, resolve_precision
from ddp_trainer.distributed.host_memory import keep_freed_memory
from ddp_trainer.distributed.launch import check_machine
from ddp_trainer.distributed.signals import Preempted, StopRequest
from ddp_trainer.distributed.sync_batchnorm import averaged_batchnorm, synchronise_batchnorm
from ddp_trainer.models.blank_pass import blank_passes

# Until training begins the processes may be minutes apart: one has a dataset to read or a service to wait for.
STARTUP_SECONDS = 300.0

# NCCL's watchdog kills the process: gloo's exception is to come first, with time for what is pending and for W&B.
NCCL_MARGIN = 60.0

# DDP notes in one backward pass in which order the gradients come, and orders its buckets by it as the next pass
# begins. With a static graph the first pass only learns the graph, and the second is the one noted.
WARM_UP_PASSES = 2


class Runtime:
    """One process among `world_size`. Build it once, after the input was checked and before anything is trained.

    Raises InputError where the device or the precision asked for is not to be had on this machine.
    """

    def __init__(self, config: RuntimeConfig, *, accumulate: int = 1, stop: StopRequest | None = None) -> None:
        """`stop`: one that is installed already, or that shall not be; by default a new one is installed."""
        check_machine(config)
        self.config = config
        self.precision = resolve_precision(config)
        set_backend_flags(config)
        avoid_loopback()
        patience = timedelta(seconds=max(config.process_group_timeout, STARTUP_SECONDS))
        self._accelerator = Accelerator(
            cpu=resolve_device(config) == "cpu",
            mixed_precision="no" if self.precision == "fp32" else self.precision,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=patience),
                # Buffers are averaged once before an evaluation instead of being sent before every forward pass.
                # Buckets of 4 MiB let the first all-reduce start early in the backward pass of this 26 MB network.
                DistributedDataParallelKwargs(
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                    static_graph=accumulate == 1,
                    bucket_cap_mb=4,
                ),
            ],
        )
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.is_main = self.rank == 0
        # Control messages travel between the hosts over gloo, so that they never wait for a device.
        self._control = _control_group(patience) if self.world_size > 1 else None
        if self.device.type == "cpu":
            use_all_cores()
            keep_freed_memory()
        self._stop = stop or StopRequest()
        if stop is None:
            self._stop.install()
        self._stop_flag = torch.zeros(1, dtype=torch.int32)
        self._stop_work: dist.Work | None = None
        torch.manual_seed(config.seed)

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()

    def describe(self) -> dict[str, str | int]:
        """What config.json says of the machine."""
        return {
            "precision": self.precision,
            "world_size": self.world_size,
            "device": self.device.type,
            "device_name": self.device_name,
        }

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model on its device under DDP, and the optimizer behind the gradient scaler. Call `place` first."""
        self._accelerator.free_memory()  # of what was prepared before, whose gradients it would unscale too
        if self.config.compile:  # in place, inside DDP: names in the state dict stay as they are
            model.compile(dynamic=False)  # for each size of batches and crops by itself
        with warnings.catch_warnings():
            # torch 2.15 renames broadcast_buffers, which Accelerate's settings do not know yet.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return self._accelerator.prepare(model, optimizer)

    def warm_up(self, model: nn.Module, images: Tensor) -> None:
        """Passes of the model over blank `images`: as many as in a step, lest it be compiled for them too.

        DDP orders its buckets anew after its first passes, and from three ranks on another order of the elements is
        another order of summation. A resumed run would begin with the first order, in a step that the uninterrupted
        run took with the second. On a GPU kernels are loaded and chosen here, ahead of the clock.
        """
        if self.world_size == 1 and self.device.type == "cpu":
            return
        with blank_passes(model):
            for _ in range(WARM_UP_PASSES):
                model(images).sum().backward()
        self.synchronize()

    def place(self, model: nn.Module) -> nn.Module:
        """Moves the model to the device in the chosen memory format; before DDP, whose buckets copy the strides."""
        if self.config.sync_bn and self.world_size > 1:
            model = synchronise_batchnorm(model, self.device)
        memory_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return model.to(device=self.device, memory_format=memory_format)  # type: ignore[call-overload]

    def laid_out(self, images: Tensor) -> Tensor:
        """channels_last images in the model's memory format: every layer takes on that of its input."""
        return images if self.config.channels_last else images.contiguous()

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """Gradients of this backward pass stay on this rank: all but the last of an accumulated batch."""
        return self._accelerator.no_sync(model)

    def autocast(self) -> contextlib.AbstractContextManager:
        return self._accelerator.autocast()

    def clip_gradients(self, model: nn.Module, max_norm: float) -> None:
        self._accelerator.clip_grad_norm_(model.parameters(), max_norm)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        return self._accelerator.scaler

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The elementwise sum over all ranks, on every rank; `tensor` itself may be overwritten."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """(K,) on each rank -> (world_size, K) on every rank."""
        if self.world_size == 1:
            return tensor.unsqueeze(0)
        rows = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(rows, tensor.contiguous())
        return torch.stack(rows)

    def gather_named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name: (...)} on each rank -> {name: (world_size, ...)} in float64 on every rank, in one collective."""
        if not tensors:
            return {}
        flat = self.gather(torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()]))
        columns = flat.split([tensor.numel() for tensor in tensors.values()], dim=1)
        return {
            name: column.reshape(self.world_size, *tensor.shape)
            for (name, tensor), column in zip(tensors.items(), columns, strict=True)
        }

    def agree_on(self, *numbers: int) -> list[int]:
        """The main rank's numbers, on every rank."""
        if self._control is None:
            return list(numbers)
        box = torch.tensor(numbers, dtype=torch.int64)
        dist.broadcast(box, src=0, group=self._control)
        return box.tolist()

    def end_of_startup(self) -> None:
        """Waits for the other processes; one that hangs from here on is given up after --process-group-timeout."""
        if self._control is not None:
            dist.barrier(group=self._control)
            for group, margin in ((self._control, 0.0), (None, NCCL_MARGIN if self.device.type == "cuda" else 0.0)):
                _set_timeout(timedelta(seconds=self.config.process_group_timeout + margin), group)

    def generator_state(self) -> Tensor:
        """Of torch's generators for the CPU and this process's GPU, (L,) uint8 on the device."""
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return torch.cat(states).to(self.device)

    def set_generator_state(self, state: Tensor) -> None:
        """Of the same kind of device; that of another is left alone."""
        sizes = [len(torch.get_rng_state())]
        if self.device.type == "cuda":
            sizes.append(len(torch.cuda.get_rng_state(self.device)))
        if len(state) == sum(sizes):
            own = [part.cpu().clone() for part in state.split(sizes)]  # torch reads from the start of the storage
            torch.set_rng_state(own[0])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(own[1], self.device)

    def announce_stop(self) -> None:
        """Starts telling the other ranks whether this one was asked to stop; overlaps with the step that follows."""
        if self._control is not None:
            self._stop_flag.fill_(int(self._stop.pending))
            self._stop_work = dist.all_reduce(self._stop_flag, op=dist.ReduceOp.MAX, group=self._control, async_op=True)

    def stop_agreed(self) -> bool:
        """Whether any rank had been asked to stop at the last `announce_stop`: the same answer on every rank."""
        if self._control is None:
            return self._stop.pending
        assert self._stop_work is not None, "announce_stop comes first"
        self._stop_work.wait()
        return bool(self._stop_flag.item())

    def stop_if_asked(self) -> None:
        """Raises Preempted on every rank where any was asked to stop. A collective operation."""
        self.announce_stop()
        if self.stop_agreed():
            raise Preempted

    def synchronize(self) -> None:
        """Waits for the device, for honest clocks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Leaves the process group; only after every rank has done its last collective operation."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def averaged_batchnorm(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """Within the context the running statistics are those over all ranks' images; then each rank's own again."""
        return averaged_batchnorm(model, self.sum_over_ranks, self.world_size)


def _set_timeout(timeout: timedelta, group: dist.ProcessGroup | None) -> None:
    """torch 2.15 made this function a public one."""
    from torch.distributed import distributed_c10d

    name = "set_timeout" if hasattr(distributed_c10d, "set_timeout") else "_set_pg_timeout"
    getattr(distributed_c10d, name)(timeout, group)


def _control_group(patience: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=patience)
    assert isinstance(group, dist.ProcessGroup)
    return group
