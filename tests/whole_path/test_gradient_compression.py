"""`--gradient-compression bf16` rounds the gradients that processes exchange; all ranks keep equal weights."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data_prep.errors import InputError
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.runtime import Runtime
from tests.support.trainer import fork


@pytest.mark.skipif(not dist.is_nccl_available(), reason="torch refuses bf16 compression in builds without CUDA")
def test_compression_rounds_gradients_and_ranks_keep_equal_weights(tiny_dir: Path, tmp_path: Path) -> None:
    finished = fork(tiny_dir, tmp_path, program="tests.support.workers.compression:main", processes=2)
    assert finished.returncode == 0, finished.stderr
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, weights in one.items():
        assert torch.equal(weights, other[name]), name
    for name in ("none", "bf16"):
        assert torch.equal(one[name], one[f"{name}, resumed"])
    exact, rounded = (one[f"{name}, first step"] - one["start"] for name in ("none", "bf16"))
    assert 2**-12 < (rounded - exact).norm() / exact.norm() < 2**-7, "the rounding error is not that of bf16"


def test_compression_is_refused_if_torch_was_built_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    with pytest.raises(InputError, match="--gradient-compression bf16 needs a build of torch for CUDA"):
        Runtime(RuntimeConfig(device="cpu", gradient_compression="bf16"))
