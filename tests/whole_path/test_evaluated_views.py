"""Evaluation uses only center crops.

Test-time augmentation adds mirrored or shifted views only if the run trained on such images.
"""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.loader import Batch
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.evaluation import CERTAIN_MARGIN, Evaluation, Evaluator, averaged_over_views, hits
from ddp_trainer.models.custom_resnet import CustomResNet
from ddp_trainer.models.spec import ModelSpec
from tests.support.networks import Hooked
from tests.support.trainer import NARROW, train


def mean_of_views(model: nn.Module, image: Tensor, *, mirror: bool, shift: bool) -> Tensor:
    """Returns the logits (classes,) of one image (C, H, W), averaged over views that are computed one by one."""
    padded = F.pad(image[None], (1, 1, 1, 1), mode="reflect")[0]
    height, width = image.shape[1:]
    weights = {(1, 1): 0.5, (0, 0): 0.25, (2, 2): 0.25} if shift else {(1, 1): 1.0}
    views = []
    for (top, left), weight in weights.items():
        view = padded[:, top : top + height, left : left + width]
        copies = [view, view.flip(2)] if mirror else [view]
        views += [weight / len(copies) * model(copy[None])[0] for copy in copies]
    return torch.stack(views).sum(dim=0)


@pytest.mark.parametrize(("mirror", "shift"), [(True, True), (False, True), (True, False), (False, False)])
@torch.no_grad()
def test_only_uncertain_predictions_are_averaged_over_views(device: torch.device, mirror: bool, shift: bool) -> None:
    torch.manual_seed(0)
    model = CustomResNet(num_classes=3, widths=(8, 8, 16, 16)).double().eval().to(device)
    images = torch.randn(12, 3, 32, 32, dtype=torch.float64).to(device)
    plain = model(images)
    best = plain.topk(2, dim=1).values
    margins = best[:, 0] - best[:, 1]
    # This factor makes half of the predictions certain. No margin is so close to the threshold that rounding matters.
    factor = CERTAIN_MARGIN / margins.sort().values[5:7].mean()
    model.head.weight *= factor
    model.head.bias *= factor
    sure = factor * margins >= CERTAIN_MARGIN
    assert sure.sum() == 6
    expected = torch.stack([mean_of_views(model, image, mirror=mirror, shift=shift) for image in images])
    expected[sure] = factor * plain[sure]
    averaged = averaged_over_views(model, images, model(images), mirror=mirror, shift=shift)
    torch.testing.assert_close(averaged, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_views_may_have_another_precision_than_the_logits(dtype: torch.dtype) -> None:
    images, logits = torch.rand(5, 3, 8, 8), torch.zeros(5, 4)
    averaged = averaged_over_views(
        lambda images: torch.ones(len(images), 4, dtype=dtype), images, logits, mirror=True, shift=True
    )
    torch.testing.assert_close(averaged, torch.full((5, 4), 0.75))


def test_logits_that_are_not_finite_do_not_count_as_correct_predictions() -> None:
    logits = torch.tensor([[math.nan, math.nan], [1.0, 0.0], [math.inf, 0.0]])
    assert hits(logits, torch.zeros(3, dtype=torch.int64)).tolist() == [False, True, False]


def evaluate(model: nn.Module, images: Tensor) -> Evaluation:
    """Evaluates `model`, which has three classes, on uint8 `images` (N, 3, 32, 32) of class 0."""
    count = len(images)
    batch = Batch(images, torch.zeros(count, dtype=torch.int64), torch.arange(count))
    loader = SimpleNamespace(batches=lambda plan: iter([batch]), batch_size=count)
    spec = ModelSpec(classes=tuple("abc"), mean=(0.5,) * 3, std=(0.25,) * 3, image_size=32)  # type: ignore[arg-type]
    runtime = Runtime(RuntimeConfig(device="cpu", precision="fp32"))
    return Evaluator(loader, np.arange(count), spec, runtime).run(model)  # type: ignore[arg-type]


def test_evaluation_runs_the_hooks_of_the_network() -> None:
    torch.manual_seed(0)
    model, images = Hooked(3), torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    evaluation = evaluate(model, images)
    expected = model.eval()((images / 255 - 0.5) / 0.25)
    torch.testing.assert_close(evaluation.logits, expected, rtol=0, atol=1e-5)


class KeepsGrid(nn.Module):
    """Computes a tensor in its first forward pass, keeps it in an attribute, and multiplies it by a parameter."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head, self.scale = nn.Linear(3 * 32 * 32, num_classes), nn.Parameter(torch.ones(()))
        self.grid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = torch.linspace(0, 1, x.size(3))
        return self.head((x + self.scale * self.grid).flatten(1))


def test_a_tensor_that_the_network_keeps_from_an_evaluation_can_be_used_in_training() -> None:
    model = KeepsGrid(3)
    evaluate(model, torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    model(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert model.scale.grad is not None


class SideDetector(nn.Module):
    """Classifies images by their brighter side, left or right. All predictions are uncertain."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.4))

    def forward(self, images: Tensor) -> Tensor:
        halves = images.mean(dim=(1, 2)).unflatten(1, (2, -1)).mean(dim=2)  # (N, left and right)
        return self.scale * halves / halves.abs().max()


@pytest.mark.parametrize(("flip", "accuracy"), [("none", 1.0), ("random", 0.5), ("alternating", 0.5)])
def test_a_model_trained_without_flips_is_not_evaluated_on_mirrored_images(flip: str, accuracy: float) -> None:
    """The classes differ only in which side is bright, so averaging with the mirrored image would give a tie."""
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    images[:2, :, :, :16] = images[2:, :, :, 16:] = 255
    batch = Batch(images, torch.tensor([0, 0, 1, 1]), torch.arange(4))
    loader = SimpleNamespace(batches=lambda plan: iter([batch]), batch_size=4)
    spec = ModelSpec(classes=("left", "right"), mean=(0.5,) * 3, std=(0.5,) * 3, image_size=32, flip=flip)  # type: ignore[arg-type]
    runtime = Runtime(RuntimeConfig(device="cpu", precision="fp32"))
    evaluation = Evaluator(loader, np.arange(4), spec, runtime).run(SideDetector(), tta=True)  # type: ignore[arg-type]
    assert evaluation.correct == 4
    assert evaluation.correct_tta == 4 * accuracy


def test_only_the_center_of_each_image_is_evaluated() -> None:
    """The class is the brighter side of the center crop. Outside the crop, the other side is brighter."""
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    images[:2, :, :, 16:] = images[2:, :, :, :16] = 255
    center = images[:, :, 8:24, 8:24]
    center.copy_(255 - center)
    batch = Batch(images, torch.tensor([0, 0, 1, 1]), torch.arange(4))
    loader = SimpleNamespace(batches=lambda plan: iter([batch]), batch_size=4)
    spec = ModelSpec(classes=("left", "right"), mean=(0.5,) * 3, std=(0.5,) * 3, image_size=32)  # type: ignore[arg-type]
    runtime = Runtime(RuntimeConfig(device="cpu", precision="fp32"))
    for train_size, correct in ((16, 4), (None, 0)):
        chosen = replace(spec, train_size=train_size)
        evaluation = Evaluator(loader, np.arange(4), chosen, runtime).run(SideDetector())  # type: ignore[arg-type]
        assert evaluation.correct == correct


class CornerDetector(nn.Module):
    """Predicts class 1 if the pixel in the top left corner is bright, else class 0. All predictions are uncertain."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.4))

    def forward(self, images: Tensor) -> Tensor:
        corner = images[:, 0, 0, 0].sign()
        return self.scale * torch.stack((-corner, corner), dim=1)


@pytest.mark.parametrize(("shift", "accuracy"), [(False, 1.0), (True, 0.5)])
def test_a_model_trained_without_shifts_is_not_evaluated_on_shifted_images(shift: bool, accuracy: float) -> None:
    """Shifting moves the decisive pixel out of the corner, so averaging would give a tie."""
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    images[2:, :, 0, 0] = 255
    batch = Batch(images, torch.tensor([0, 0, 1, 1]), torch.arange(4))
    loader = SimpleNamespace(batches=lambda plan: iter([batch]), batch_size=4)
    half = (0.5, 0.5, 0.5)
    spec = ModelSpec(classes=("dark", "bright"), mean=half, std=half, image_size=32, flip="none", shift=shift)
    runtime = Runtime(RuntimeConfig(device="cpu", precision="fp32"))
    evaluation = Evaluator(loader, np.arange(4), spec, runtime).run(CornerDetector(), tta=True)  # type: ignore[arg-type]
    assert evaluation.correct == 4
    assert evaluation.correct_tta == 4 * accuracy


@pytest.mark.parametrize(
    ("flags", "shift"), [(("--crop-padding", "0"), False), (("--crop-padding", "0", "--train-size", "24"), True)]
)
def test_model_json_records_whether_the_run_mirrored_and_shifted_images(
    tiny_dir: Path, tmp_path: Path, flags: tuple[str, ...], shift: bool
) -> None:
    words = ("--data-dir", tiny_dir, "--out", tmp_path / "run", "--flip", "none", *flags, "--max-steps", "1")
    train(*words, module=NARROW)
    spec = ModelSpec.read(tmp_path / "run" / "model.json")
    assert (spec.flip, spec.shift) == ("none", shift)
