"""The runtime keeps freed memory for the next allocation, and fp32 does not use TF32."""

import platform

import pytest
import torch

from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.backend import set_backend_flags
from ddp_trainer.distributed.process_settings import restored_settings
from tests.support.trainer import run


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="concerns glibc's allocator")
def test_freed_memory_is_reused_without_page_faults() -> None:
    finished = run("tests.support.workers.page_faults")
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) < 5 * 16384  # ten blocks have 163,840 pages; fewer than half may cause a page fault


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("bf16", True)])
def test_fp32_does_not_use_tf32(precision: str, allowed: bool) -> None:
    with restored_settings():
        set_backend_flags(RuntimeConfig(device="cpu", precision=precision))  # type: ignore[arg-type]
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed
