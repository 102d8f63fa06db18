"""Temperature scaling: one number, fitted on held-out images, corrects the probabilities.

This file also tests which images --validation and --calibrate hold out, and what a run prints about its plan.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.beton import read_labels
from data_prep.dataset import read_dataset
from data_prep.errors import InputError
from ddp_trainer.engine.data import build_data
from ddp_trainer.engine.temperature import fit_temperature
from ddp_trainer.models.spec import TEMPERATURES, ModelSpec
from ddp_trainer.run.checks import check_settings
from ddp_trainer.run.recorder import describe_plan
from tests.support.narrow import narrow_settings, narrow_trainer, single_runtime


def draw(temperature: float, count: int = 20_000) -> tuple[Tensor, Tensor]:
    """Draws labels from the probabilities of random logits. Returns the logits times `temperature`, and the labels."""
    generator = torch.Generator().manual_seed(0)
    true_logits = 3 * torch.randn(count, 10, dtype=torch.float64, generator=generator)
    labels = torch.multinomial(true_logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return (true_logits * temperature).float(), labels


@pytest.mark.parametrize("temperature", [0.03, 0.3, 1.0, 2.5, 30.0])
def test_fit_recovers_the_temperature(temperature: float) -> None:
    assert fit_temperature(*draw(temperature)) == pytest.approx(temperature, rel=0.03)


def test_no_nearby_temperature_has_a_lower_loss() -> None:
    logits, labels = draw(1.7, count=500)
    best = fit_temperature(logits, labels)
    losses = [F.cross_entropy(logits.double() / (best * factor), labels).item() for factor in (1, 0.999, 1.001)]
    assert min(losses) == losses[0]


def test_temperature_stays_within_its_limits() -> None:
    labels, logits = torch.arange(9999) % 4, F.one_hot(torch.arange(9999) % 4, 4).float()
    labels[0] = 1  # only one image is misclassified
    assert fit_temperature(logits, labels) == pytest.approx(0.097, abs=0.001)
    assert fit_temperature(logits / 1000, labels) == pytest.approx(TEMPERATURES[0])
    labels = torch.arange(8) % 4
    assert fit_temperature(F.one_hot((labels + 1) % 4, 4).float(), labels) == pytest.approx(TEMPERATURES[1])


def test_images_with_logits_that_are_not_finite_are_ignored() -> None:
    logits, labels = draw(1.7, count=500)
    expected = fit_temperature(logits[2:], labels[2:])
    logits[0, 3], logits[1, 4] = math.inf, math.nan
    assert fit_temperature(logits, labels) == expected
    assert fit_temperature(logits[:2], labels[:2]) == 1.0


def test_no_temperature_is_fitted_if_all_images_are_classified_correctly() -> None:
    labels = torch.arange(8) % 4
    assert fit_temperature(F.one_hot(labels, 4).float(), labels) == 1.0


def test_training_validation_and_calibration_images_do_not_overlap(tiny_dir: Path) -> None:
    config = narrow_settings(tiny_dir, data={"validation": 20, "calibrate": 30})
    dataset = read_dataset(tiny_dir)
    assert check_settings(config, dataset, world_size=1) == 46
    data = build_data(config, single_runtime(), dataset)
    assert data.calibrator is not None
    parts = data.samples, data.evaluator.samples, data.calibrator.samples
    assert [len(part) for part in parts] == [46, 20, 30]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(96))
    plain = build_data(narrow_settings(tiny_dir), single_runtime(), dataset)
    assert (len(plain.samples), plain.calibrator) == (96, None)


def test_classes_without_a_validation_image_are_named(tiny_dir: Path) -> None:
    for count, num_unseen in ((0, 0), (4, 6), (40, 0)):
        trainer = narrow_trainer(narrow_settings(tiny_dir, data={"validation": count}), single_runtime())
        missing_classes = set(trainer.data.missing_classes)
        labels = read_labels(tiny_dir / "train.beton")[trainer.data.evaluator.samples] if count else range(10)
        classes = read_dataset(tiny_dir).classes
        assert missing_classes == set(classes) - {classes[label] for label in labels}
        assert len(missing_classes) == num_unseen
        assert ("warning: --validation holds out no image of some classes (" in describe_plan(trainer)) == bool(
            missing_classes
        )


@pytest.mark.parametrize(
    ("schedule", "balance", "expected"),
    [
        ({"max_steps": 5, "batch_size": 20}, "none", ["5 (--max-steps)", "16 leftover images"]),
        ({"max_steps": 500, "batch_size": 32}, "none", []),
        ({"batch_size": 20}, "batches", []),
    ],
)
def test_the_plan_mentions_max_steps_and_leftover_images_only_if_they_have_an_effect(
    schedule: dict[str, int], balance: str, expected: list[str], tiny_dir: Path
) -> None:
    config = narrow_settings(tiny_dir, schedule=schedule, data={"balance": balance})
    plan = describe_plan(narrow_trainer(config, single_runtime()))
    assert [words for words in ("5 (--max-steps)", "16 leftover images") if words in plan] == expected
    assert ("ends after" in plan, "leftover" in plan) == (bool(expected), bool(expected))


def test_too_many_held_out_images_are_refused(tiny_dir: Path) -> None:
    config = narrow_settings(tiny_dir, data={"validation": 60, "calibrate": 30})
    with pytest.raises(InputError, match=r"--validation and --calibrate must leave .* at most 86 of 96, got 90"):
        check_settings(config, read_dataset(tiny_dir), world_size=1)


def test_the_calibration_images_are_evaluated_in_batches_that_fit_into_memory(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training loader, which also reads the calibration images, yields larger batches."""
    trainer = narrow_trainer(narrow_settings(tiny_dir, data={"calibrate": 30}), single_runtime())
    monkeypatch.setattr(ModelSpec, "evaluation_batch", 7)
    sizes: list[int] = []
    next(trainer.model.children()).register_forward_hook(lambda *called: sizes.append(len(called[2])))
    assert trainer.data.calibrator is not None
    found = trainer.data.calibrator.run(trainer.model, tta=False)
    assert (max(sizes), sum(sizes), found.total) == (7, 30, 30)
