"""`--calibrate` stores a temperature in model.json. The final evaluation, exported models and predict use it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.batch_ops import batch_normalize
from data_prep.dataset import read_dataset
from data_prep.loader import build_loader, read_images
from ddp_trainer.export import NormalizingModel
from ddp_trainer.models.spec import load_model
from ddp_trainer.predict import predict
from ddp_trainer.report.results import reliability
from ddp_trainer.tracking.run_record import load_run
from tests.support.trainer import NARROW, read_lines, train


@pytest.fixture(scope="module")
def calibrated(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "run"
    flags = ("--calibrate", "30", "--label-smoothing", "0.3", "--batch-size", "16")
    train("--data-dir", tiny_dir, "--out", out, *flags, module=NARROW)
    return out


def test_final_evaluation_export_and_predict_use_the_stored_temperature(calibrated: Path, tiny_dir: Path) -> None:
    model, spec = load_model(calibrated)
    summary = json.loads((calibrated / "summary.json").read_text())
    assert summary["temperature"] == spec.temperature != 1
    test = tiny_dir / read_dataset(tiny_dir).splits["test"].file
    loader = build_loader(test, mode="resident", device=torch.device("cpu"), batch_size=40, num_workers=1)
    images = read_images(loader, np.arange(40))
    with torch.inference_mode():
        logits = model(batch_normalize(images, spec.mean, spec.std, torch.float32)).double()
        exported = NormalizingModel(model, spec).eval()(images).double()
    probabilities = (logits / spec.temperature).softmax(dim=1)
    found = load_run(calibrated).predictions
    assert found is not None
    np.testing.assert_allclose(found.probabilities, probabilities, atol=1e-5)
    np.testing.assert_allclose(exported.softmax(dim=1), probabilities, atol=1e-5)
    pixels = images.permute(0, 2, 3, 1).numpy()
    answers = list(predict(model, spec, [Path(str(number)) for number in range(40)], pixels))
    np.testing.assert_allclose([answer.probability for answer in answers], probabilities.max(dim=1).values, atol=1e-5)


def test_recorded_losses_are_computed_without_the_temperature(calibrated: Path) -> None:
    summary = json.loads((calibrated / "summary.json").read_text())
    assert summary["test_loss"] == read_lines(calibrated / "metrics.jsonl")[-1]["test_loss"]


def test_report_and_model_card_show_the_temperature(calibrated: Path) -> None:
    run = load_run(calibrated)
    assert run.predictions is not None
    before, temperature = run.number("calibration_error_before"), run.number("temperature")
    page = reliability(run, run.predictions)
    assert f"temperature of {temperature:.3f}, which was fitted on 30" in " ".join(page.split())
    assert f"the error would be {before:.2%}" in page
    assert f"a temperature of {temperature:.3f}" in (calibrated / "model.md").read_text()
    without = reliability(replace(run, summary={}), run.predictions)
    assert "temperature of" not in without


def test_report_of_a_poorly_calibrated_run_recommends_calibrate(calibrated: Path) -> None:
    run = load_run(calibrated)
    assert run.predictions is not None
    many = replace(
        run.predictions,
        labels=np.tile(run.predictions.labels, 30),
        # with the fourth power, the confidence no longer matches the accuracy
        probabilities=np.tile(run.predictions.probabilities, (30, 1)) ** 4,
    )
    assert "--calibrate 1000" in reliability(replace(run, summary={}), many)
