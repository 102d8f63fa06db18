"""The evaluate command counts every test image once with any number of processes, and reports errors in one line."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.beton import read_samples
from data_prep.dataset import read_dataset, write_dataset
from data_prep.loader import Batch
from data_prep.sources.folder import FolderImages
from data_prep.sources.synthetic import draw_synthetic
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import Preempted
from ddp_trainer.engine.evaluation import SURE_MARGIN, Evaluator, averaged_over_views
from ddp_trainer.evaluate import main
from ddp_trainer.models.custom_resnet import CustomResNet
from ddp_trainer.models.spec import ModelSpec, build_model
from ddp_trainer.tracking.predictions import read_predictions
from ddp_trainer.train import main as train_main
from tests.support.photos import save
from tests.support.trainer import NARROW, fork, train


def test_three_processes_count_every_image_once(smoke_run: Path) -> None:
    """40 images on 3 ranks give shards of different sizes."""
    summary = json.loads((smoke_run / "summary.json").read_text())
    finished = fork(smoke_run, "--device", "cpu", "--tta", program="ddp_trainer.evaluate:main", processes=3)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert sum(line.startswith("{") for line in lines) == 1, "only one rank prints"
    figures = json.loads(lines[-1])
    assert figures["test_total"] == 40
    assert figures["test_accuracy"] == figures["test_correct"] / 40 == summary["test_accuracy_tta"]


def with_manifest(data_dir: Path, target: Path, **changes: object) -> Path:
    """Copies a dataset and changes values in its dataset.json."""
    shutil.copytree(data_dir, target)
    manifest = json.loads((target / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps(manifest | changes))
    return target


def test_a_dataset_with_other_classes_or_another_image_size_is_refused(
    smoke_run: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = read_dataset(tiny_dir).classes
    faults = {
        "not trained on: 'a', 'b', and lacks 'bow tie', 'checkerboard'": {"classes": ["a", "b", *classes[2:]]},
        "64 pixels": {"image_size": 64},
    }
    for number, (expected, change) in enumerate(faults.items()):
        data = with_manifest(tiny_dir, tmp_path / str(number), **change)
        assert main([str(smoke_run), "--data-dir", str(data)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line
        assert "--data-dir" in line


def test_classes_are_matched_by_name_and_training_images_are_not_needed(
    smoke_run: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dataset lists the classes in another order than the run, so each label stands for another class."""
    info = read_dataset(tiny_dir)
    found = read_predictions(smoke_run / "predictions.npz")
    assert found is not None
    order = np.random.default_rng(0).permutation(10)
    data = with_manifest(
        tiny_dir,
        tmp_path / "data",
        classes=[info.classes[label] for label in order],
        splits={"test": asdict(info.splits["test"])},
    )
    assert main([str(smoke_run), "--data-dir", str(data), "--device", "cpu"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["test_correct"] == (found.predicted == order[found.labels]).sum() != found.num_correct
    assert train_main(["smoke", "--data-dir", str(data), "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no training images" in line
    assert not (tmp_path / "run").exists()


def test_a_dataset_with_only_test_images_of_two_classes_can_be_evaluated(
    smoke_run: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The images are from the run's own test split, so the run's predictions show how many must be correct."""
    info, found = read_dataset(tiny_dir), read_predictions(smoke_run / "predictions.npz")
    assert found is not None
    drawn = draw_synthetic(train_count=10, test_count=40, seed=1).test
    for number, (image, label) in enumerate(zip(drawn.images, drawn.labels.tolist(), strict=True)):
        if label in (2, 5):
            save(tmp_path / "root" / "test" / info.classes[label] / f"{number}.png", Image.fromarray(image))
    data = shutil.copytree(tiny_dir, tmp_path / "data")
    write_dataset(FolderImages(tmp_path / "root", size=32), data)
    assert {path.name for path in data.iterdir()} == {"test.beton", "dataset.json"}, "older training images are removed"
    assert main([str(smoke_run), "--data-dir", str(data), "--device", "cpu"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    chosen = np.isin(found.labels, (2, 5))
    assert figures["test_total"] == chosen.sum() == 8
    assert figures["test_correct"] == (found.predicted == found.labels)[chosen].sum()


def test_a_damaged_image_is_reported_in_one_line(
    smoke_run: Path,
    tiny_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Files of large datasets are not hashed at the start, so the damage is found when the image is read."""
    monkeypatch.setattr("data_prep.dataset.HASHED_BYTES", 0)
    data = shutil.copytree(tiny_dir, tmp_path / "data")
    content = bytearray((data / "test.beton").read_bytes())
    content[int(read_samples(data / "test.beton")["image"]["ptr"][3]) + 100] ^= 1
    (data / "test.beton").write_bytes(content)
    assert main([str(smoke_run), "--data-dir", str(data), "--device", "cpu"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "test.beton: image 3 is damaged" in line


def mean_of_views(model: nn.Module, image: Tensor, *, mirror: bool) -> Tensor:
    """Returns the logits (classes,) of one image (C, H, W), averaged over views that are computed one by one."""
    padded = F.pad(image[None], (1, 1, 1, 1), mode="reflect")[0]
    height, width = image.shape[1:]
    weights = {(1, 1): 0.5, (0, 0): 0.25, (2, 2): 0.25}
    views = []
    for (top, left), weight in weights.items():
        view = padded[:, top : top + height, left : left + width]
        copies = [view, view.flip(2)] if mirror else [view]
        views += [weight / len(copies) * model(copy[None])[0] for copy in copies]
    return torch.stack(views).sum(dim=0)


@pytest.mark.parametrize("mirror", [True, False])
@torch.no_grad()
def test_only_uncertain_predictions_are_averaged_over_views(device: torch.device, mirror: bool) -> None:
    torch.manual_seed(0)
    model = CustomResNet(num_classes=3, widths=(8, 8, 16, 16)).double().eval().to(device)
    images = torch.randn(12, 3, 32, 32, dtype=torch.float64).to(device)
    plain = model(images)
    best = plain.topk(2, dim=1).values
    margins = best[:, 0] - best[:, 1]
    # Half of the predictions are certain. No margin is so close to the threshold that rounding matters.
    factor = SURE_MARGIN / margins.sort().values[5:7].mean()
    model.head.weight *= factor
    model.head.bias *= factor
    sure = factor * margins >= SURE_MARGIN
    assert sure.sum() == 6
    expected = torch.stack([mean_of_views(model, image, mirror=mirror) for image in images])
    expected[sure] = factor * plain[sure]
    averaged = averaged_over_views(model, images, model(images), mirror=mirror)
    torch.testing.assert_close(averaged, expected, rtol=0, atol=1e-9)


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


def test_model_json_records_whether_the_run_mirrored_images(tiny_dir: Path, tmp_path: Path) -> None:
    train("--data-dir", tiny_dir, "--out", tmp_path / "run", "--flip", "none", "--max-steps", "1", module=NARROW)
    assert ModelSpec.read(tmp_path / "run" / "model.json").flip == "none"


def test_request_to_stop_ends_the_evaluation_between_two_batches() -> None:
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    batch = Batch(images, torch.zeros(4, dtype=torch.long), torch.arange(4))
    runtime = SimpleNamespace(rank=0, world_size=1, device=images.device, autocast=nullcontext, laid_out=lambda x: x)
    loader = SimpleNamespace(batches=lambda plan: iter([batch] * len(plan)), batch_size=4)
    spec = ModelSpec(classes=("a", "b"), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), image_size=32, widths=(4, 4, 4, 4))
    evaluator = Evaluator(loader, np.arange(12), spec, runtime)  # type: ignore[arg-type]
    model, calls = build_model(spec).train(), []

    def poll() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Preempted

    with pytest.raises(Preempted):
        evaluator.run(model, poll=poll)
    assert model.training
