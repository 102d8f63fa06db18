"""A run respects what its caller has set in the same process, or refuses it, and restores what the run changes."""

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


def test_a_deterministic_run_turns_off_warn_only_and_restores_it_afterwards() -> None:
    with restored_settings():
        torch.use_deterministic_algorithms(True, warn_only=True)
        with restored_settings():
            set_backend_flags(RuntimeConfig(device="cpu", precision="fp32", deterministic=True))
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()


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
