"""Ranks, devices, precision, seeds and collectives of a run. This is the only file that uses Accelerator."""

import contextlib
import hashlib
import math
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data_prep.errors import require
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.accelerate_settings import environment_of
from ddp_trainer.distributed.backend import set_backend_flags, use_share_of_cores
from ddp_trainer.distributed.device_wait import wait_for
from ddp_trainer.distributed.gloo_interface import choose_interface
from ddp_trainer.distributed.hardware import cpu_name, require_usable, resolve_device, resolve_precision
from ddp_trainer.distributed.host_memory import keep_freed_memory
from ddp_trainer.distributed.launch import check_machine
from ddp_trainer.distributed.meeting import control_group, explained_port, meeting, set_timeout
from ddp_trainer.distributed.signals import StopRequest
from ddp_trainer.distributed.stop_agreement import StopAgreement
from ddp_trainer.distributed.sync_batchnorm import synchronize_batchnorm

# Before training starts, processes may be minutes apart: one may read a dataset or wait for a service.
STARTUP_SECONDS = 300.0

# gloo's timeout raises an exception, so files and W&B are still closed. NCCL's is longer, because it kills the process.
NCCL_MARGIN = 60.0  # seconds by which NCCL's timeout is longer than gloo's


class Runtime:
    """Device, precision and collectives of this process. Create one Runtime per run, after the input was checked.

    Raises InputError if this machine does not have the device or the precision that `config` asks for.
    """

    def __init__(self, config: RuntimeConfig, *, stop: StopRequest | None = None) -> None:
        """`stop`: records signals that ask the run to stop. Without it, such a signal ends the process."""
        launch = check_machine(config)
        require(
            config.gradient_compression == "none" or dist.is_nccl_available(),
            "--gradient-compression bf16 needs a build of torch for CUDA; leave out this flag",
        )
        self.config = config
        self.precision = resolve_precision(config)
        set_backend_flags(config)
        choose_interface()
        timeout = timedelta(seconds=max(config.process_group_timeout, STARTUP_SECONDS))
        on_cpu = resolve_device(config) == "cpu"  # before environment_of hides ACCELERATE_USE_CPU
        stop = stop or StopRequest()
        with meeting(launch, stop) as self._owns_group:
            with environment_of(launch.variables()), explained_port(launch):
                self._accelerator = self._build_accelerator(timeout, on_cpu=on_cpu)
            # Control messages are sent with gloo, between CPUs, so that they never wait for a device.
            self._control = control_group(timeout) if launch.world_size > 1 else None
            problem = f"the processes would use different precisions ({self.precision} in this one); set --precision"
            self.require_agreement(self.precision, problem)
        self.device: torch.device = self._accelerator.device
        require_usable(self.device, self.all_agree)
        self.rank, self.world_size, self.is_main = launch.rank, launch.world_size, launch.is_main
        found = self._accelerator.process_index, self._accelerator.num_processes
        require(
            found == (self.rank, self.world_size),
            f"launched as rank {self.rank} of {self.world_size}, but Accelerate found rank {found[0]} of {found[1]}",
        )
        if self.device.type == "cpu":
            use_share_of_cores(launch)
            keep_freed_memory()
        elif config.graph == "auto":
            # The default stream cannot be captured, so everything that a graph will contain must use another stream
            # from the start, including the construction of DDP.
            torch.cuda.set_stream(torch.cuda.Stream(self.device))
        self.stop = StopAgreement(stop, self._control)
        self.before_close: list[Callable[[], object]] = []  # called before the process leaves the process group
        torch.manual_seed(config.seed)

    def _build_accelerator(self, timeout: timedelta, *, on_cpu: bool) -> Accelerator:
        """Joins the other processes. Every setting that affects the weights is passed to Accelerate as an argument."""
        compressed = self.config.gradient_compression == "bf16"
        # BatchNorm's buffers are averaged before each evaluation, so DDP need not broadcast them in each step.
        # With buckets of 4 MiB, the first all-reduce starts early in the backward pass of a 26 MB network.
        self._ddp = DistributedDataParallelKwargs(
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=4,
            comm_hook=DDPCommunicationHookType.BF16 if compressed else DDPCommunicationHookType.NO,
        )
        return Accelerator(
            cpu=on_cpu,
            mixed_precision="no" if self.precision == "fp32" else self.precision,
            dynamo_backend="no",
            gradient_accumulation_steps=1,  # the trainer itself accumulates gradients
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout), self._ddp],
        )

    @property
    def timeout(self) -> float:
        """Seconds within which the GPU must finish a step; otherwise, another process is assumed to have died."""
        return self.config.process_group_timeout if self.world_size > 1 else math.inf

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()

    def describe(self) -> dict[str, str | int]:
        """Entries of config.json that describe the machine."""
        return {
            "precision": self.precision,
            "world_size": self.world_size,
            "device": self.device.type,
            "device_name": self.device_name,
            "threads": torch.get_num_threads(),
        }

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, passes: int
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model (in DDP if there are several processes) and the optimizer, as Accelerate wraps them.

        Call `place` first. `passes`: the number of backward passes in a step.
        """
        self._ddp.static_graph = passes == 1  # a static graph allows only one backward pass in a step
        self._accelerator.free_memory()  # otherwise, Accelerate would also unscale the gradients of an earlier model
        if self.config.compile:  # in place, so that the names in the state dict do not change
            model.compile(dynamic=False)  # one compilation for each batch size and crop size
        return self._wrap(model), self._accelerator.prepare(optimizer)

    def wrap_again(self, wrapped: nn.Module) -> nn.Module:
        """Wraps the model in a new DDP, after some parameters were frozen or a step of the old DDP has failed."""
        if not isinstance(wrapped, DistributedDataParallel):
            return wrapped
        model = wrapped.module
        if "_original_forward" in model.__dict__:  # in bf16 and fp16, Accelerate replaces `forward`
            # Accelerate's own `unwrap_model` would also remove the decorators of the original `forward`.
            model.forward = model.__dict__.pop("_original_forward")
        self._accelerator._models.clear()
        return self._wrap(model)

    def _wrap(self, model: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            # torch 2.15 renames broadcast_buffers, but Accelerate still uses the old name.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            wrapped = self._accelerator.prepare(model, device_placement=[False])  # a move to "cpu:0" copies buffers
        if isinstance(wrapped, DistributedDataParallel) and self.device.type == "cuda":
            wrapped._set_ddp_runtime_logging_sample_rate(2**30)  # DDP's time measurements wait for the device
        return wrapped

    def place(self, model: nn.Module) -> nn.Module:
        """Moves the model to the device in the memory format of --channels-last, and applies --sync-bn.

        Call it before `prepare`, because DDP's buckets copy the strides of the parameters.
        """
        if self.config.sync_bn and self.world_size > 1:
            model = synchronize_batchnorm(model)
        memory_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return model.to(device=self.device, memory_format=memory_format)  # type: ignore[call-overload]

    def laid_out(self, images: Tensor) -> Tensor:
        """Converts `images`, which are channels_last, to the model's memory format. Each layer keeps that format."""
        return images if self.config.channels_last else images.contiguous()

    def backward(self, losses: Tensor, weights: Tensor) -> None:
        # Accelerate's `backward` would add a useless operation: it divides the losses by 1.
        (losses if self.scaler is None else self.scaler.scale(losses)).backward(weights)

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """Context in which a backward pass does not average gradients: for all parts of a batch but the last."""
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
        """Gathers a (K,) tensor of each rank into a (world_size, K) tensor on every rank."""
        if self.world_size == 1:
            return tensor.unsqueeze(0)
        rows = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(rows, tensor.contiguous())
        return torch.stack(rows)

    def separate_generators(self) -> None:
        """From now on, each rank draws its own numbers for dropout. Call it after the weights are initialized."""
        if self.rank:
            torch.manual_seed(self.config.seed + self.rank)

    def require_agreement(self, text: str, message: str) -> None:
        """Raises InputError(message) on every rank unless all ranks pass the same `text`. A collective operation."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        require(self.all_agree(self.agree_on(number) == [number]), message)

    def all_agree(self, agrees: bool) -> bool:
        """Whether `agrees` is True on every rank. A collective operation that involves no device."""
        answer = torch.tensor(agrees, dtype=torch.int32)
        if self._control is not None:
            dist.all_reduce(answer, dist.ReduceOp.MIN, group=self._control)
        return bool(answer)

    def agree_on(self, *numbers: int) -> list[int]:
        """Returns the numbers of the main rank on every rank."""
        if self._control is None:
            return list(numbers)
        box = torch.tensor(numbers, dtype=torch.int64)
        dist.broadcast(box, src=0, group=self._control)
        return box.tolist()

    def end_of_startup(self) -> None:
        """Waits for the other processes. After this call, waiting longer than --process-group-timeout is an error."""
        if self._control is not None:
            dist.barrier(group=self._control)
            for group in (self._control, None) if self._owns_group else (self._control,):
                margin = NCCL_MARGIN if group is None and self.device.type == "cuda" else 0.0
                set_timeout(timedelta(seconds=self.config.process_group_timeout + margin), group)

    def synchronize(self) -> None:
        """Waits for all work on the device, for example to measure times. Raises TimeoutError after `timeout`."""
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()  # in the current stream, which may be waiting for another process
            wait_for(event, seconds=self.timeout)
            torch.cuda.synchronize(self.device)  # the other streams; this wait has no time limit

    def close(self) -> None:
        """Leaves the process group. Call it only after every rank has done its last collective operation."""
        self.synchronize()
        while self.before_close:
            self.before_close.pop()()
        if dist.is_initialized() and (self._owns_group or self._control is not None):
            dist.destroy_process_group(None if self._owns_group else self._control)
