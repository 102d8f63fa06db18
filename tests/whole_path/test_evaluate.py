"""The evaluate command counts every test image once with any number of processes, and reports errors in one line."""

import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data_prep.beton import read_samples
from data_prep.dataset import read_dataset, write_dataset
from data_prep.loader import Batch
from data_prep.sources.folder import FolderImages
from data_prep.sources.synthetic import draw_synthetic
from ddp_trainer import predict
from ddp_trainer.distributed.signals import Preempted
from ddp_trainer.engine.evaluation import Evaluator
from ddp_trainer.evaluate import main
from ddp_trainer.models.spec import ModelSpec, build_model, load_model
from ddp_trainer.run.checkpoint import list_checkpoints, read_checkpoint
from ddp_trainer.run.outputs import write_model
from ddp_trainer.tracking.predictions import read_predictions
from ddp_trainer.train import main as train_main
from tests.support.photos import save
from tests.support.trainer import NARROW, OF_SMOKE_RUN, fork, train


def test_three_processes_count_every_image_once(smoke_run: Path) -> None:
    """40 images on 3 ranks give shards of different sizes."""
    summary = json.loads((smoke_run / "summary.json").read_text())
    finished = fork(smoke_run, "--device", "cpu", "--tta", program="ddp_trainer.evaluate:main", processes=3)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert sum(line.startswith("{") for line in lines) == 1, "the JSON object is not printed exactly once"
    figures = json.loads(lines[-1])
    assert figures["test_total"] == 40
    assert figures["test_accuracy"] == figures["test_correct"] / 40 == summary["test_accuracy_tta"]
    alone = fork(smoke_run, "--device", "cpu", "--tta", program="ddp_trainer.evaluate:main", processes=1)
    assert figures["test_loss"] == pytest.approx(json.loads(alone.stdout.splitlines()[-1])["test_loss"], rel=1e-5)


def with_manifest(data_dir: Path, target: Path, **changes: object) -> Path:
    """Copies a dataset and changes values in dataset.json of the copy."""
    shutil.copytree(data_dir, target)
    manifest = json.loads((target / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps(manifest | changes))
    return target


def test_a_dataset_with_other_classes_or_another_image_size_is_refused(
    smoke_run: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = read_dataset(tiny_dir).classes
    faults = {
        "not trained on: 'a', 'b' (and lacks 'bow tie', 'checkerboard')": {"classes": ["a", "b", *classes[2:]]},
        "64 pixels": {"image_size": 64},
    }
    for number, (expected, change) in enumerate(faults.items()):
        data = with_manifest(tiny_dir, tmp_path / str(number), **change)
        assert main([str(smoke_run), "--data-dir", str(data)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line
        assert "--data-dir" in line


def test_the_dataset_of_the_run_must_still_have_the_same_test_images(
    smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(smoke_run, tmp_path / "run"))
    write_dataset(draw_synthetic(train_count=96, test_count=41, seed=1), tmp_path / "data")
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config | {"data_dir": str(tmp_path / "data")}))
    assert main([str(run_dir)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        f"{tmp_path / 'data'} no longer has the test images of the run; to use its current test images, add --data-dir"
        in line
    )
    assert main([str(run_dir), "--data-dir", str(tmp_path / "data")]) == 0


def test_classes_are_matched_by_name_and_training_images_are_not_needed(
    smoke_run: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dataset lists the classes in another order than the run, so the same label stands for different classes."""
    info = read_dataset(tiny_dir)
    found = read_predictions(smoke_run / "predictions.npz")
    assert found is not None
    orders = [np.roll(np.arange(10), shift) for shift in range(1, 10)]
    counts = [int((found.predicted == order[found.labels]).sum()) for order in orders]
    order, count = next(pair for pair in zip(orders, counts, strict=True) if pair[1] != found.num_correct)
    data = with_manifest(
        tiny_dir,
        tmp_path / "data",
        classes=[info.classes[label] for label in order],
        splits={"test": asdict(info.splits["test"])},
    )
    assert main([str(smoke_run), "--data-dir", str(data), "--device", "cpu"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["test_correct"] == count
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
    assert {path.name for path in data.iterdir()} == {"test.beton", "dataset.json"}, (
        "train.beton of the older dataset is still there"
    )
    assert main([str(smoke_run), "--data-dir", str(data), "--device", "cpu"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    chosen = np.isin(found.labels, (2, 5))
    assert figures["test_total"] == chosen.sum() == 8
    assert figures["test_correct"] == (found.predicted == found.labels)[chosen].sum()


def test_a_full_disk_is_reported_in_one_line(
    smoke_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([str(smoke_run), "--device", "cpu"]) == 1
    assert capsys.readouterr().err == "error: cannot write the output: No space left on device\n"


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


@pytest.mark.parametrize("damage", ["weights", "std"])
def test_a_model_whose_values_are_not_finite_is_refused(
    smoke_run: Path, tiny_dir: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, spec = load_model(smoke_run)
    if damage == "weights":
        torch.nn.init.constant_(next(model.parameters()), torch.nan)
    write_model(tmp_path, model, replace(spec, std=(1e-300,) * 3) if damage == "std" else spec)
    save(tmp_path / "x.png", Image.new("RGB", (32, 32)))
    assert main([str(tmp_path), "--data-dir", str(tiny_dir), "--device", "cpu"]) == 2
    assert predict.main([str(tmp_path), str(tmp_path / "x.png"), "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 2
    assert all("the model gives values that are not finite; train a new model" in line for line in lines)


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


def test_a_run_of_two_processes_is_evaluated_with_the_averaged_batchnorm_statistics_in_its_model_file(
    tiny_dir: Path, tmp_path: Path
) -> None:
    """Rank 0 has 7 images of each batch and rank 1 has 8, so the average has the weights 7/15 and 8/15."""
    out = tmp_path / "run"
    train(
        "--data-dir",
        tiny_dir,
        "--out",
        out,
        "--batch-size",
        "15",
        "--precision",
        "fp32",
        *OF_SMOKE_RUN,
        module=NARROW,
        processes=2,
    )
    ranks = read_checkpoint(list_checkpoints(out / "checkpoints")[0])["buffers"]["model.features.0.1.running_mean"]
    saved = load_file(out / "model.safetensors")["features.0.1.running_mean"]
    assert not torch.allclose(ranks[0], ranks[1])
    torch.testing.assert_close(saved, ((7 * ranks[0] + 8 * ranks[1]) / 15).float())
    finished = fork(out, "--device", "cpu", "--precision", "fp32", program="ddp_trainer.evaluate:main")
    summary = json.loads((out / "summary.json").read_text())
    assert json.loads(finished.stdout.splitlines()[-1])["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
