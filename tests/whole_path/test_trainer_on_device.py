"""A trainer's steps are accurate, repeatable and resumable, on the CPU and on a GPU if there is one."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_prep.loader import build_loader
from ddp_trainer.distributed.process_settings import restored_settings
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import StopRequest
from ddp_trainer.engine.host_copy import HostCopy
from ddp_trainer.engine.trainer import Trainer
from tests.support.narrow import narrow_trainer
from tests.support.stepping import Build, build_for, differences, settings, snapshot, take


@pytest.fixture
def build(tiny_dir: Path, device: torch.device) -> Build:
    return build_for(tiny_dir, device)


def updates(trainer: Trainer) -> list[Tensor]:
    """Returns the change of each parameter in three steps."""
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    take(trainer, range(3))
    return [(after - start).double().cpu() for start, after in zip(before, trainer.model.parameters(), strict=True)]


@pytest.mark.parametrize("recipe", ["fast", "baseline"])
def test_steps_in_fp32_agree_with_float64_on_the_cpu(
    tiny_dir: Path, device: torch.device, build: Build, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Muon computes in bf16 on a GPU, so its updates agree less closely."""
    rates = {"peak_lr": 0.02, "head_lr": 0.02, "bias_lr": 0.02}
    exact: dict[str, Any] = {"precision": "fp32", "deterministic": True, **rates}
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with restored_settings():
        config = settings(tiny_dir, torch.device("cpu"), recipe, **exact)
        expected = updates(narrow_trainer(config, Runtime(config.runtime, stop=StopRequest()), dtype=torch.float64))
    with restored_settings():
        found = updates(build(recipe, **exact))
    tolerance = 0.05 if device.type == "cuda" and recipe == "fast" else 2e-3
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@contextmanager
def infinite_logits(trainer: Trainer) -> Iterator[None]:
    def spoil(_module: nn.Module, _inputs: Any, logits: Tensor) -> Tensor:
        return logits * math.inf

    hook = trainer.model.register_forward_hook(spoil)
    yield
    hook.remove()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_step_with_infinite_logits_changes_nothing(
    device: torch.device, build: Build, optimizer: str, precision: str
) -> None:
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("fp16 works on CUDA only")
    with restored_settings():
        rates = {"peak_lr": 1e-3, "head_lr": None, "bias_lr": None}  # higher rates make fp16 overflow with AdamW
        settings = {"optimizer": optimizer, "precision": precision, "ema_decay": 0.9, **rates}
        trainer = build(**settings, graph="off")  # a replayed graph would not call the hook of infinite_logits
        take(trainer, range(2))
        before, scaler = snapshot(trainer), trainer.runtime.scaler
        scale = scaler.get_scale() if scaler else None
        with infinite_logits(trainer):
            take(trainer, range(2, 3))
        assert differences(snapshot(trainer), before) == []
        if scaler is not None and scale is not None:
            assert scaler.get_scale() == scale / 2
            take(trainer, range(3, 4))
            assert differences(snapshot(trainer), before)


def test_deterministic_steps_repeat_bit_for_bit(build: Build) -> None:
    found = []
    for _ in range(2):
        with restored_settings():
            trainer = build(deterministic=True, ema_decay=0.9)
            take(trainer, range(6))
            found.append(snapshot(trainer))
    assert differences(*found) == []


@pytest.mark.parametrize(
    "changes", [{}, {"precision": "fp16"}, {"recipe": "baseline", "precision": "bf16", "optimizer": "adamw"}]
)
def test_restored_trainer_continues_like_the_saved_one(
    device: torch.device, build: Build, changes: dict[str, Any]
) -> None:
    if changes.get("precision") == "fp16" and device.type == "cpu":
        pytest.skip("fp16 works on CUDA only")
    with restored_settings():
        saved = build(deterministic=True, ema_decay=0.9, **changes)
        take(saved, range(3))
        state = HostCopy(saved.state.state_dict())
        take(saved, range(3, 6))
        expected = snapshot(saved)
    with restored_settings():
        restored = build(deterministic=True, ema_decay=0.9, **changes)
        restored.state.load_state_dict(copy.deepcopy(state.read()))
        take(restored, range(3, 6))
        assert differences(snapshot(restored), expected) == []


def test_streamed_batches_equal_resident_ones(tiny_dir: Path, device: torch.device) -> None:
    """All batches are kept until the end, to notice if the stream overwrites the memory of earlier ones."""
    order = np.random.default_rng(0).permutation(96).reshape(12, 8)
    plan = [row for _ in range(4) for row in order]
    modes = [
        list(
            build_loader(tiny_dir / "train.beton", mode=mode, device=device, batch_size=8, num_workers=1).batches(plan)
        )
        for mode in ("stream", "resident")
    ]
    for streamed, resident in zip(*modes, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(streamed, resident, strict=True))
