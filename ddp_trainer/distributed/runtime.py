"""Ranks, devices, precision, seeds and collectives of a run. The only file that uses Accelerator.

Elsewhere: what is computed (`engine`), and what is logged or saved (`run`, `tracking`).
"""

import contextlib
import math
import warnings
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data_prep.errors import require
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.accelerate_settings import environment_of
from ddp_trainer.distributed.backend import set_backend_flags, use_all_cores
from ddp_trainer.distributed.device_wait import wait_for
from ddp_trainer.distributed.gloo_interface import choose_interface
from ddp_trainer.distributed.hardware import cpu_name, resolve_device, resolve_precision
from ddp_trainer.distributed.host_memory import keep_freed_memory
from ddp_trainer.distributed.launch import Launch, check_machine
from ddp_trainer.distributed.meeting import meeting
from ddp_trainer.distributed.signals import StopRequest
from ddp_trainer.distributed.stop_agreement import StopAgreement
from ddp_trainer.distributed.sync_batchnorm import averaged_batchnorm, synchronize_batchnorm

# Until training begins the processes may be minutes apart: one may read a dataset or wait for a service.
STARTUP_SECONDS = 300.0

# NCCL's watchdog kills the process. gloo must raise its exception before that, so that files and W&B can be closed.
NCCL_MARGIN = 60.0


class Runtime:
    """One process among `world_size`. Build it once, after the input was checked and before anything is trained.

    Raises InputError if this machine does not have the device or the precision that `config` asks for.
    """

    def __init__(self, config: RuntimeConfig, *, accumulate: int = 1, stop: StopRequest | None = None) -> None:
        """`stop`: the request that this process listens for; default: none, so that a signal ends the process."""
        check_machine(config)
        self.config = config
        self.precision = resolve_precision(config)
        stop = stop or StopRequest()
        set_backend_flags(config)
        choose_interface()
        patience = timedelta(seconds=max(config.process_group_timeout, STARTUP_SECONDS))
        launch = Launch.from_environment()
        with meeting(launch, stop):
            with environment_of(launch.variables()):
                self._accelerator = self._build_accelerator(patience, accumulate=accumulate)
            # Control messages travel between the hosts over gloo, so that they never wait for a device.
            self._control = _control_group(patience) if launch.world_size > 1 else None
        self.device: torch.device = self._accelerator.device
        self.rank, self.world_size = launch.rank, launch.world_size
        self.is_main = launch.is_main
        found = self._accelerator.process_index, self._accelerator.num_processes
        require(found == (self.rank, self.world_size), f"launched as {launch}, but Accelerate found rank {found}")
        if self.device.type == "cpu":
            use_all_cores(launch)
            keep_freed_memory()
        elif config.graph == "auto":
            # The default stream cannot be captured, so everything that a graph will contain must use another stream
            # from the start, including the construction of DDP.
            torch.cuda.set_stream(torch.cuda.Stream(self.device))
        self.stop = StopAgreement(stop, self._control)
        torch.manual_seed(config.seed)

    def _build_accelerator(self, patience: timedelta, *, accumulate: int) -> Accelerator:
        """Joins the other processes. Whatever changes the training is passed here, and never read by Accelerate."""
        return Accelerator(
            cpu=resolve_device(self.config) == "cpu",
            mixed_precision="no" if self.precision == "fp32" else self.precision,
            dynamo_backend="no",
            gradient_accumulation_steps=1,  # the trainer accumulates by itself
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

    @property
    def timeout(self) -> float:
        """Seconds to wait for the GPU to finish a step; after that, another process is assumed to have died."""
        return self.config.process_group_timeout if self.world_size > 1 else math.inf

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()

    def describe(self) -> dict[str, str | int]:
        """What config.json says about the machine."""
        return {
            "precision": self.precision,
            "world_size": self.world_size,
            "device": self.device.type,
            "device_name": self.device_name,
            "threads": torch.get_num_threads(),
        }

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model on its device under DDP, and the optimizer behind the gradient scaler. Call `place` first."""
        self._accelerator.free_memory()  # else it would also unscale the gradients of an earlier model
        if self.config.compile:  # in place, inside DDP: names in the state dict stay as they are
            model.compile(dynamic=False)  # one compilation for each size of batches and crops
        with warnings.catch_warnings():
            # torch 2.15 renames broadcast_buffers, which Accelerate's settings do not know yet.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            model, optimizer = self._accelerator.prepare(model, optimizer)
        if isinstance(model, DistributedDataParallel) and self.device.type == "cuda":
            model._set_ddp_runtime_logging_sample_rate(2**30)  # its time measurements wait for the device
        return model, optimizer

    def place(self, model: nn.Module) -> nn.Module:
        """Moves the model to the device in the chosen memory format. Call it before DDP, whose buckets copy strides."""
        if self.config.sync_bn and self.world_size > 1:
            model = synchronize_batchnorm(model)
        memory_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return model.to(device=self.device, memory_format=memory_format)  # type: ignore[call-overload]

    def laid_out(self, images: Tensor) -> Tensor:
        """channels_last images in the model's memory format, which each layer takes over from its input."""
        return images if self.config.channels_last else images.contiguous()

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """Keeps the gradients of a backward pass on this rank; for all parts of an accumulated batch but the last."""
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
        """Waits for the other processes. From here on, one that hangs is an error after --process-group-timeout."""
        if self._control is not None:
            dist.barrier(group=self._control)
            for group, margin in ((self._control, 0.0), (None, NCCL_MARGIN if self.device.type == "cuda" else 0.0)):
                _set_timeout(timedelta(seconds=self.config.process_group_timeout + margin), group)

    def generator_state(self) -> Tensor:
        """State of torch's generators for the CPU and this process's GPU, (L,) uint8 on the device."""
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return torch.cat(states).to(self.device)

    def set_generator_state(self, state: Tensor) -> None:
        """Restores what `generator_state` returned; the state of another kind of device is ignored."""
        sizes = [len(torch.get_rng_state())]
        if self.device.type == "cuda":
            sizes.append(len(torch.cuda.get_rng_state(self.device)))
        if len(state) == sum(sizes):
            own = [part.cpu().clone() for part in state.split(sizes)]  # torch reads from the start of the storage
            torch.set_rng_state(own[0])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(own[1], self.device)

    def synchronize(self) -> None:
        """Waits for the device, so that measured times include its work."""
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            wait_for(event, seconds=self.timeout)
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Leaves the process group. Call it only after every rank has done its last collective operation."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def averaged_batchnorm(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """Within the context the running statistics are those over all ranks' images; after it, each rank's own."""
        return averaged_batchnorm(model, self.sum_over_ranks, self.world_size)


def _set_timeout(timeout: timedelta, group: dist.ProcessGroup | None) -> None:
    """torch 2.15 made this function public."""
    from torch.distributed import distributed_c10d

    name = "set_timeout" if hasattr(distributed_c10d, "set_timeout") else "_set_pg_timeout"
    getattr(distributed_c10d, name)(timeout, group)


def _control_group(patience: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=patience)
    assert isinstance(group, dist.ProcessGroup)
    return group
