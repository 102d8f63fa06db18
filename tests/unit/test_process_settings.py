"""A run respects what its caller has set in the same process, or refuses it, and restores what the run changes."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data_prep.errors import InputError
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.backend import set_backend_flags
from ddp_trainer.distributed.process_settings import require_usual_modes, restored_settings
from ddp_trainer.distributed.runtime import Runtime
from tests.support.trainer import environment


def test_a_deterministic_run_turns_off_warn_only_and_restores_it_afterwards() -> None:
    with restored_settings():
        torch.use_deterministic_algorithms(True, warn_only=True)
        with restored_settings():
            set_backend_flags(RuntimeConfig(device="cpu", precision="fp32", deterministic=True))
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_a_run_restores_the_limit_of_torchs_compiler() -> None:
    """Also if torch.compile was not used before the run, which needs a new process."""
    code = """if True:
        import torch
        from ddp_trainer.config import RuntimeConfig
        from ddp_trainer.distributed.backend import set_backend_flags
        from ddp_trainer.distributed.process_settings import restored_settings
        for _ in range(2):
            with restored_settings():
                set_backend_flags(RuntimeConfig(device="cpu", precision="fp32", compile=True))
                print(torch.compiler.config.recompile_limit)
            print(torch.compiler.config.recompile_limit)"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), text=True, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "64\n8\n" * 2), done.stderr


def test_a_run_leaves_a_process_group_of_its_caller_alone(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with restored_settings():
            Runtime(RuntimeConfig(device="cpu", precision="fp32")).close()
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("enter", "name"),
    [
        (lambda: torch.autocast("cpu"), "torch.autocast"),
        (torch.no_grad, "torch.no_grad or torch.inference_mode"),
        (lambda: torch.device("meta"), "the default device meta"),
    ],
)
def test_a_run_inside_another_mode_of_torch_is_refused(enter: Callable[[], AbstractContextManager], name: str) -> None:
    require_usual_modes()
    with enter(), pytest.raises(InputError, match=f"the run does not work with {name}, which your program has set"):
        require_usual_modes()


def test_a_second_thread_is_refused_while_a_run_is_active() -> None:
    """The thread of the run itself is not refused, because an observer may evaluate another run."""

    def use() -> bool:
        with restored_settings():
            return True

    with ThreadPoolExecutor(1) as pool:
        with restored_settings():
            assert use()
            refused = pool.submit(use).exception()
        assert isinstance(refused, InputError)
        assert "another thread of this process is training or evaluating" in str(refused)
        assert pool.submit(use).result()
