"""Tests that need a GPU: steps that do not wait for the device, runs in every precision, and agreement with the CPU."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.augment import Augmenter
from data_prep.augment_config import AugmentConfig
from data_prep.dataset import read_dataset
from data_prep.loader import build_loader
from ddp_trainer.distributed.process_settings import restored_settings
from ddp_trainer.engine.host_copy import HostCopy
from ddp_trainer.recipes import RECIPES
from tests.support.folders import same_model
from tests.support.stepping import batches, build_for, differences, snapshot, take
from tests.support.trainer import NARROW, read_lines, run

CPU, GPU = torch.device("cpu"), torch.device("cuda")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# Two epochs of 6 steps.
PLAN = ("smoke", "--device", "cuda", "--deterministic", "--epochs", "2", "--batch-size", "16", "--log-every-steps", "3")


def train(*arguments: str | Path) -> None:
    finished = run(NARROW, *PLAN, *arguments)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "fp32"),
        ("--precision", "bf16", "--ema-decay", "0.9"),
        ("--precision", "fp16", "--optimizer", "muon", "--peak-lr", "0.1"),
        ("--precision", "fp16", "--data-mode", "stream", "--clip-norm", "1", "--accumulate", "2"),
        ("--precision", "bf16", "--compile", "--small-crops", "24:0.5"),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(tiny_dir: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*flags, "--data-dir", tiny_dir, "--out", whole, "--max-steps", "12")
    for steps in ("7", "12"):  # the first part ends within the second epoch
        train(*flags, "--data-dir", tiny_dir, "--out", parts, "--max-steps", steps, "--resume")
    assert same_model(whole, parts)
    assert read_lines(whole / "steps.jsonl") == read_lines(parts / "steps.jsonl")
    assert json.loads((parts / "config.json").read_text())["device"] == "cuda"


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "fp32"),
        ("--precision", "bf16", "--optimizer", "muon", "--peak-lr", "0.1", "--ema-decay", "0.9"),
        ("--precision", "bf16", "--optimizer", "adamw", "--peak-lr", "0.001", "--clip-norm", "1", "--cutmix", "1"),
        ("--precision", "bf16", "--small-crops", "24:0.5", "--flip", "alternating"),
    ],
)
def test_runs_with_and_without_cuda_graphs_train_the_same_model(
    tiny_dir: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    for graph in ("auto", "off"):
        train(*flags, "--data-dir", tiny_dir, "--out", tmp_path / graph, "--graph", graph)
    assert same_model(tmp_path / "auto", tmp_path / "off")
    assert read_lines(tmp_path / "auto" / "steps.jsonl") == read_lines(tmp_path / "off" / "steps.jsonl")


def test_stream_and_resident_train_the_same_model(tiny_dir: Path, tmp_path: Path) -> None:
    for mode in ("stream", "resident"):
        train("--data-dir", tiny_dir, "--out", tmp_path / mode, "--data-mode", mode, "--max-steps", "4")
    assert same_model(tmp_path / "stream", tmp_path / "resident")


@pytest.mark.parametrize(
    "config",
    [
        *(RECIPES[name].augment for name in ("fast", "long", "baseline")),
        AugmentConfig(brightness=0.1, contrast=0.1),
        AugmentConfig(cutmix=1.0),
        AugmentConfig(mixup=0.5),
    ],
)
@pytest.mark.parametrize("side", [16, 24, 32])
def test_augmentation_on_a_gpu_equals_that_on_the_cpu(tiny_dir: Path, config: AugmentConfig, side: int) -> None:
    """The results are bit-identical, except that a GPU rounds once instead of twice when mixup blends two images."""
    info = read_dataset(tiny_dir)
    found = []
    for device in (CPU, GPU):
        loader = build_loader(tiny_dir / "train.beton", mode="resident", device=device, batch_size=96, num_workers=1)
        batch = next(iter(loader.batches([np.arange(96)])))
        augmented = Augmenter(config, mean=info.mean, std=info.std, seed=3)(batch, epoch=5, side=side)
        found.append((augmented.images.cpu(), augmented.labels.cpu()))
    (expected, labels), (images, labels_on_gpu) = found
    assert torch.equal(labels, labels_on_gpu)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5 if config.mixup else 0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "fp16"},
        {"precision": "fp32"},
        {"deterministic": True},
        {"ema_decay": 0.9},
        {"clip_norm": 1.0},
        {"accumulate": 2},
        {"cutmix": 1.0},
        {"mixup": 0.5, "brightness": 0.1},
        {"recipe": "baseline"},
        {"recipe": "baseline", "optimizer": "adamw", "peak_lr": 1e-3},
        {"recipe": "long"},
    ],
)
def test_step_does_not_wait_for_the_device(tiny_dir: Path, changes: dict[str, Any]) -> None:
    with restored_settings():
        trainer = build_for(tiny_dir, GPU)(freeze_late="", **changes)  # the step that freezes parameters waits
        take(trainer, range(4))
        held = batches(trainer, 4)
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            for epoch, batch in enumerate(held):
                trainer.train_step(batch, epoch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        trainer.guard.skipped_steps()


def test_later_steps_do_not_change_a_host_copy_that_is_still_queued(tiny_dir: Path) -> None:
    with restored_settings():
        trainer = build_for(tiny_dir, GPU)(small_crops="", freeze_late="")  # freezing and a new graph both wait
        take(trainer, range(3))
        expected, held = snapshot(trainer), batches(trainer, 6)
        # Keep the GPU busy for about 0.3 s, so that the copies are still queued when the steps below are launched.
        torch.cuda._sleep(500_000_000)
        waiting = HostCopy({"model": trainer.model.state_dict()})
        for step in range(3, 6):
            trainer.train_step(held[step], epoch=step)
        copied = waiting.read()["model"]
        assert [name for name in copied if not torch.equal(copied[name], expected[name])] == []
        assert differences(snapshot(trainer), expected)
