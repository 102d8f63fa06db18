"""The report's sentence on the probabilities is right even if errors in both directions cancel on average."""

from pathlib import Path

import numpy as np
import pytest

from ddp_trainer.report.results import reliability
from ddp_trainer.tracking.predictions import Predictions
from ddp_trainer.tracking.run_record import load_run
from tests.support.run_directories import make_run


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    ("halves", "verdict"),
    [  # (probability of the prediction, share of correct predictions) in each half of the images
        (((0.55, 0.55), (0.9, 0.9)), "its probabilities can be taken at face value"),
        (((0.55, 0.85), (0.9, 0.6)), "it is overconfident for some images and underconfident for others"),
        (((0.55, 0.85), (0.9, 0.9)), "it is underconfident"),
        (((0.55, 0.55), (0.9, 0.6)), "it is overconfident"),
    ],
)
def test_the_verdict_sees_errors_that_cancel(
    halves: tuple[tuple[float, float], ...], verdict: str, tmp_path: Path
) -> None:
    make_run(tmp_path / "run", num_classes=2)
    confidence = np.repeat([probability for probability, _ in halves], 1000)
    wrong = np.concatenate([np.arange(1000) >= round(1000 * accuracy) for _, accuracy in halves])
    found = Predictions(
        indices=np.arange(2000),
        labels=wrong.astype(np.int64),  # class 0 is always predicted
        probabilities=np.stack((confidence, 1 - confidence), axis=1),
        wrong_indices=np.zeros(0, np.int64),
        wrong_images=np.zeros((0, 8, 8, 3), np.uint8),
    )
    text = " ".join(str(reliability(load_run(tmp_path / "run"), found)).split())
    assert f"correct: {verdict}." in text
    assert ("--calibrate 1000" in text) == (verdict in ("it is underconfident", "it is overconfident"))
