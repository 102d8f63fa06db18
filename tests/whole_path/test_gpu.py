"""Whole runs on a GPU: with every precision, a resumed run equals the uninterrupted one."""

import filecmp
import json
from pathlib import Path

import pytest
import torch

from tests.support.trainer import NARROW, read_lines, run

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
        ("--precision", "bf16", "--compile", "--small-crop-fraction", "0.5"),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(tiny_dir: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*flags, "--data-dir", tiny_dir, "--out", whole, "--max-steps", "12")
    for steps in ("7", "12"):  # in the middle of the second epoch
        train(*flags, "--data-dir", tiny_dir, "--out", parts, "--max-steps", steps, "--resume")
    assert filecmp.cmp(whole / "model.safetensors", parts / "model.safetensors", shallow=False)
    assert read_lines(whole / "steps.jsonl") == read_lines(parts / "steps.jsonl")
    assert json.loads((parts / "config.json").read_text())["device"] == "cuda"


def test_stream_and_resident_train_the_same_model(tiny_dir: Path, tmp_path: Path) -> None:
    for mode in ("stream", "resident"):
        train("--data-dir", tiny_dir, "--out", tmp_path / mode, "--data-mode", mode, "--max-steps", "4")
    stream, resident = (tmp_path / mode / "model.safetensors" for mode in ("stream", "resident"))
    assert filecmp.cmp(stream, resident, shallow=False)
