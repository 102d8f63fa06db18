"""A folder of photographs, from the image files to a model trained on random resized crops of them."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_prep.__main__ as preparation
from ddp_trainer import evaluate, export, predict
from ddp_trainer.models.spec import ModelSpec
from ddp_trainer.run.checkpoint import list_checkpoints
from tests.support.folders import same_model
from tests.support.photos import save
from tests.support.processes import processes_with, wait_until
from tests.support.trainer import NARROW, Finished, fork, read_lines, start

PHOTOS = (
    *("photos", "--device", "cpu", "--network", "custom_resnet", "--widths", "8", "8", "16", "16"),
    *("--train-size", "48", "--batch-size", "12", "--wandb", "disabled", "--deterministic"),
)
SHORT = ("--epochs", "1", "--peak-lr", "0.1")
LONG = ("--epochs", "8", "--peak-lr", "0.1", "--small-crops", "24:0.25,36:0.5", "--checkpoint-every-steps", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files of various sizes, in place of photographs. The three classes have stripes of different widths."""
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 5)):
        for label, kind in enumerate(("fine", "medium", "wide")):
            for number in range(count):
                height, width = generator.integers(70, 110, size=2)
                waves = np.sin(np.arange(width) * (0.9 / 2**label) + generator.uniform(0, 6))
                values = 120 + 80 * waves[None, :, None] + generator.normal(0, 20, size=(height, width, 3))
                picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
                save(root / split / kind / f"{number}.jpg", picture, quality=90)
    return root


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "photos"
    assert preparation.main(["--source", "folder", "--root", str(folder), "--out", str(out), "--size", "64"]) == 0
    return out


@pytest.fixture(scope="module")
def resident(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a finished run with --data-mode resident."""
    out = tmp_path_factory.mktemp("run") / "resident"
    check_success(fork(*PHOTOS, *SHORT, "--data-dir", data, "--out", out, "--data-mode", "resident"))
    return out


def check_success(finished: Finished) -> None:
    assert finished.returncode == 0, finished.stderr


def test_killed_and_resumed_run_equals_the_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    """The runs take 32 steps in 8 epochs, on crops of 24, 36 and 48 pixels."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    check_success(fork(*PHOTOS, *LONG, "--data-dir", data, "--out", whole, processes=2))
    arguments = (*PHOTOS, *LONG, "--data-dir", data, "--out", parts)
    process, saved = start(NARROW, *arguments, processes=2), parts / "checkpoints"
    wait_until(lambda: list_checkpoints(saved) or process.poll() is not None, "no checkpoint was saved", pause=0.01)
    for rank in processes_with(NARROW, str(parts), "RANK="):
        os.kill(rank, signal.SIGKILL)
    process.communicate(timeout=90)
    assert process.returncode != 0
    assert not (parts / "summary.json").exists()
    resumed = fork(*arguments, "--resume", processes=2)
    check_success(resumed)
    assert "after step" in resumed.stderr, "the run started over"
    assert same_model(whole, parts)
    losses = [[line["test_loss"] for line in read_lines(path / "metrics.jsonl")] for path in (whole, parts)]
    assert losses[0] == losses[1]


def test_streamed_images_train_the_same_model_as_images_in_memory(data: Path, resident: Path, tmp_path: Path) -> None:
    out = tmp_path / "stream"
    check_success(fork(*PHOTOS, *SHORT, "--data-dir", data, "--out", out, "--data-mode", "stream"))
    assert same_model(resident, out)


def test_commands_use_the_center_crop(folder: Path, resident: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """evaluate and predict reproduce the run's results, export succeeds, and the model card gives the crop size."""
    spec, summary = ModelSpec.read(resident / "model.json"), json.loads((resident / "summary.json").read_text())
    assert (spec.image_size, spec.train_size) == (64, 48)
    assert evaluate.main([str(resident), "--device", "cpu", "--precision", "fp32"]) == 0
    assert json.loads(capsys.readouterr().out)["test_correct"] == summary["test_correct"]
    assert predict.main([str(resident), str(folder / "test"), "--json"]) == 0
    predicted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stored = np.load(resident / "predictions.npz")["probabilities"].max(axis=1)
    assert sorted(line["probability"] for line in predicted) == pytest.approx(sorted(stored), abs=1e-4)
    assert export.main([str(resident), "--format", "torch"]) == 0
    assert (
        "RGB images of 48x48 pixels, center-cropped from images of 64x64 pixels" in (resident / "model.md").read_text()
    )
