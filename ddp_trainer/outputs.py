"""What a complete run leaves in its directory: weights, predictions, summary. Built on the main process."""

import shlex
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_prep.loader import ResidentLoader, StreamLoader, read_images
from ddp_trainer.evaluate import Evaluation
from ddp_trainer.model import ModelSpec
from ddp_trainer.rundir import replace_file, write_json

GALLERY_SIZE = 48


def write_model(run_dir: Path, model: nn.Module, spec: ModelSpec) -> None:
    """model.safetensors and model.json."""
    from safetensors.torch import save

    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    replace_file(run_dir / "model.safetensors", save(weights))  # `save_file` would let nobody but the owner read it
    spec.write(run_dir / "model.json")


def write_predictions(run_dir: Path, evaluation: Evaluation, loader: StreamLoader | ResidentLoader) -> None:
    """predictions.npz: every evaluated image's label and probabilities, and the pixels of the worst mistakes."""
    probabilities = evaluation.logits.double().softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    wrong = torch.nonzero(predicted != evaluation.labels).flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:GALLERY_SIZE].cpu().numpy()
    samples = evaluation.samples[worst]
    pixels = read_images(loader, samples).permute(0, 2, 3, 1).cpu().numpy() if len(samples) else np.zeros((0, 1, 1, 3))
    content = BytesIO()
    np.savez_compressed(
        content,
        indices=evaluation.samples,
        labels=evaluation.labels.cpu().numpy(),
        probabilities=probabilities.float().cpu().numpy(),
        wrong_indices=samples,
        wrong_images=pixels.astype(np.uint8),
    )
    replace_file(run_dir / "predictions.npz", content.getvalue())


def write_summary(run_dir: Path, evaluation: Evaluation, facts: dict[str, Any]) -> dict[str, Any]:
    """summary.json, whose presence says that the run is complete."""
    assert evaluation.correct_tta is not None
    summary = {
        "test_accuracy": evaluation.correct / evaluation.total,
        "test_correct": evaluation.correct,
        "test_total": evaluation.total,
        "test_accuracy_tta": evaluation.correct_tta / evaluation.total,
        "test_loss": evaluation.loss,
        **facts,
    }
    write_json(run_dir / "summary.json", summary)
    return summary


def write_report_or_say_why(run_dir: Path) -> Path | None:
    """The report is a picture of a finished run: failing to draw it must not fail the run."""
    from ddp_trainer.report import write_report

    try:
        return write_report([run_dir])
    except Exception as error:
        again = f"python -m ddp_trainer.report {shlex.quote(str(run_dir))}"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"warning: the run is complete, but its report failed ({reason}); try: {again}", file=sys.stderr)
        return None
