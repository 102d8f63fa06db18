"""The runtime reuses freed memory, fp32 does not use TF32, and bf16 is chosen only if the CPU has bf16 instructions."""

import contextlib
import functools
import os
import platform
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data_prep.errors import InputError
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed import hardware
from ddp_trainer.distributed.backend import set_backend_flags, use_share_of_cores
from ddp_trainer.distributed.home import FOLDERS
from ddp_trainer.distributed.launch import Launch
from ddp_trainer.distributed.process_settings import restored_settings
from ddp_trainer.distributed.runtime import Runtime
from tests.support.trainer import environment, run


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="concerns glibc's allocator")
def test_freed_memory_is_reused_without_page_faults() -> None:
    finished = run("tests.support.workers.page_faults")
    assert finished.returncode == 0, finished.stderr
    # With glibc's defaults, all 40 allocations of the worker cause page faults. With the runtime's settings, only a few
    # of the first ones do. These make the heap grow, because small objects occupy parts of the freed blocks.
    assert int(finished.stdout) <= 20


def test_accelerate_use_cpu_selects_the_cpu_even_if_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with restored_settings():
        runtime = Runtime(RuntimeConfig(precision="fp32"))
        assert runtime.device.type == "cpu"
        runtime.close()


def test_a_gpu_that_only_another_process_cannot_use_is_reported_here_too() -> None:
    with pytest.raises(
        InputError, match="cannot compute on the GPU of another process; leave that GPU out, use --device cpu"
    ):
        hardware.require_usable(torch.device("cpu"), lambda usable: False)


def test_each_process_uses_an_equal_share_of_the_cores_of_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four processes, two run on this machine."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    with restored_settings():
        use_share_of_cores(Launch(world_size=4, local_world_size=2))
        assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("bf16", True)])
def test_fp32_does_not_use_tf32(precision: str, allowed: bool) -> None:
    with restored_settings():
        set_backend_flags(RuntimeConfig(device="cpu", precision=precision))  # type: ignore[arg-type]
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed


def test_separate_generators_gives_each_rank_different_random_numbers() -> None:
    with restored_settings():
        runtime = Runtime(RuntimeConfig(device="cpu", precision="fp32", seed=3))
        runtime.separate_generators()
        assert torch.initial_seed() == 3
        runtime.rank = 1
        runtime.separate_generators()
        assert torch.initial_seed() == 4


def test_deterministic_sets_torchs_flags() -> None:
    with restored_settings():
        set_backend_flags(RuntimeConfig(device="cpu", precision="bf16", deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"]


def test_a_process_that_uses_torchs_newer_tf32_settings_can_train_and_keeps_them() -> None:
    code = """if True:
        import torch
        from ddp_trainer.config import RuntimeConfig
        from ddp_trainer.distributed.backend import set_backend_flags
        from ddp_trainer.distributed.process_settings import restored_settings
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
        with restored_settings():
            set_backend_flags(RuntimeConfig(device="cpu", precision="fp32"))
        print(torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), text=True, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "tf32 tf32\n"), done.stderr


@pytest.mark.parametrize(
    ("flag", "limit", "precision"),
    [
        ("avx2", None, "fp32"),
        ("amx_bf16", None, "bf16"),
        ("avx512_bf16", "AVX512_CORE_BF16", "bf16"),
        ("amx_bf16", "avx512_core", "fp32"),
    ],
)
def test_precision_auto_is_bf16_only_if_the_cpu_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, flag: str, limit: str | None, precision: str
) -> None:
    monkeypatch.setattr(hardware, "_cpu_info", lambda: f"flags : fpu {flag}")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert hardware.resolve_precision(RuntimeConfig(device="cpu")) == precision


@pytest.mark.parametrize("has_temporary_folder", [True, False])
def test_a_user_without_a_home_directory_gets_a_temporary_folder_if_possible(
    has_temporary_folder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("uid not found")

    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", fail)
    if not has_temporary_folder:
        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    for name in FOLDERS:
        monkeypatch.delenv(name, raising=False)
    with restored_settings():
        assert [os.path.isdir(os.environ.get(name, "")) for name in FOLDERS] == [has_temporary_folder] * len(FOLDERS)


def doubled(forward: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    return functools.wraps(forward)(lambda network, x: 2 * forward(network, x))


class Decorated(nn.Linear):
    forward = doubled(nn.Linear.forward)  # type: ignore[assignment, arg-type]


def with_assigned_forward(width: int, num_classes: int) -> nn.Module:
    network = nn.Linear(width, num_classes)
    network.forward = lambda x: 2 * nn.Linear.forward(network, x)  # type: ignore[method-assign, assignment]
    return network


@pytest.mark.parametrize("build", [Decorated, with_assigned_forward])
def test_a_network_with_its_own_forward_computes_the_same_in_a_new_ddp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[[int, int], nn.Module]
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.MULTI_CPU)  # so Accelerate uses DDP
    config = RuntimeConfig(device="cpu", precision="bf16")  # in fp32, Accelerate does not replace `forward`
    with restored_settings(), contextlib.closing(Runtime(config)) as runtime:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        network, images = build(4, 2), torch.randn(3, 4)
        wrapped, _ = runtime.prepare(network, torch.optim.SGD(network.parameters(), lr=0.1), passes=1)
        before, again = wrapped(images), runtime.wrap_again(wrapped)
        assert isinstance(again, DistributedDataParallel) and again is not wrapped
        assert torch.equal(again(images), before)


def test_a_run_with_many_shapes_compiles_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.fx.GraphModule] = []
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda model, **options: compile_in_place(
            model, backend=lambda graph, _: compiled.append(graph) or graph, **options
        ),
    )
    with restored_settings():
        runtime = Runtime(RuntimeConfig(device="cpu", precision="fp32", compile=True))
        network = torch.nn.Linear(4, 2)
        model, _ = runtime.prepare(network, torch.optim.SGD(network.parameters(), lr=0.1), passes=1)
        for size in range(2, 14):
            model(torch.ones(size, 4))
        runtime.close()
    assert len(compiled) == 12


@pytest.mark.parametrize(("device", "name"), [("cpu", "DNNL_DEFAULT_FPMATH_MODE"), ("cuda", "NVIDIA_TF32_OVERRIDE")])
def test_a_variable_that_lowers_the_precision_on_the_device_is_refused(
    device: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(InputError, match=f"{name}=1 makes fp32 less precise"):
        hardware.require_exact_fp32(device)
    hardware.require_exact_fp32({"cpu": "cuda", "cuda": "cpu"}[device])
