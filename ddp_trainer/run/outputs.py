"""Writes the results of a finished run: weights, predictions, summary, model card and report."""

import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_prep.errors import warn
from data_prep.files import read_json, replace_file, write_json
from data_prep.loader import ResidentLoader, StreamLoader, read_images
from ddp_trainer.config import TrainConfig
from ddp_trainer.engine.evaluation import Evaluation
from ddp_trainer.engine.flops import training_flops
from ddp_trainer.engine.temperature import fit_temperature
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.models.spec import TEMPERATURES, ModelSpec, count_parameters
from ddp_trainer.report.scores import calibration
from ddp_trainer.run.directory import RunDirectory
from ddp_trainer.run.files import EXPORTS
from ddp_trainer.run.recorder import Recorder, SilentRecorder
from ddp_trainer.tracking.metric_files import read_records
from ddp_trainer.tracking.predictions import MAX_MISTAKES, exceeded_limit
from ddp_trainer.tracking.tracker import build_tracker


def write_results(trainer: Trainer, evaluation: Evaluation, recorder: SilentRecorder) -> None:
    """Writes all results of a finished run. Every rank must call it, but only the main process writes."""
    model = trainer.evaluated_model
    spec = replace(trainer.data.spec, temperature=_fitted_temperature(trainer))
    with trainer.averaged_batchnorm():
        if isinstance(recorder, Recorder):
            # The checkpoint must be on disk before the model: --resume refuses a run with a model but no checkpoint.
            recorder.checkpoints.close()
            write_model(recorder.run_dir.path, model, spec)
    if not isinstance(recorder, Recorder):
        return
    path = recorder.run_dir.path
    calibrated = replace(evaluation, logits=evaluation.logits / spec.temperature)
    write_predictions(path, calibrated, trainer.data.evaluator.loader)
    summary = summarize(trainer, evaluation) | describe_calibration(evaluation, calibrated, spec.temperature)
    # JSON has no NaN, so figures that are not finite are left out.
    summary = {name: value for name, value in summary.items() if isinstance(value, str) or math.isfinite(value)}
    recorder.tracker.sync()  # the records must be on disk before summary.json, which marks the run as finished
    write_json(path / "summary.json", summary)
    write_model_card_or_warn(path)
    recorder.tracker.finish(summary)
    report = write_report_or_warn(path)
    recorder.run_dir.write_status("done", step=trainer.state.step, epoch=len(trainer.state.history))
    plain, tta = (f"{summary[name]:.2%}" for name in ("test_accuracy", "test_accuracy_tta"))
    counts = f"{evaluation.correct}/{evaluation.total} ({plain})"
    recorder.say(f"{summary['evaluation_split']} accuracy {counts}, {tta} with test-time augmentation")
    recorder.say(f"run directory: {path}" + (f"\nreport: {report}" if report else ""))


def _fitted_temperature(trainer: Trainer) -> float:
    """The temperature fitted to the logits of the final model; 1 without --calibrate. A collective operation."""
    if trainer.data.calibrator is None:
        return 1.0
    with trainer.averaged_batchnorm():
        found = trainer.data.calibrator.run(trainer.evaluated_model)
    temperature, problem = fit_temperature(found.logits, found.labels), ""
    ignored = found.total - found.num_finite
    if ignored:
        problem = f"{ignored} of {found.total} images are ignored, because their logits are not finite"
    elif found.correct == found.total:
        problem = f"all {found.total} images are classified correctly, so no temperature can be fitted; hold out more"
    elif any(math.isclose(temperature, limit) for limit in TEMPERATURES):
        problem = f"the fitted temperature is at its limit, {temperature:g}; the probabilities may be poorly calibrated"
    if problem and trainer.runtime.is_main:
        warn(f"--calibrate: {problem}")
    return temperature


def complete_results(run_dir: RunDirectory | None, config: TrainConfig) -> None:
    """Completes the results of a finished run that was killed after it had written summary.json.

    Writes the model card and the report, and sends the summary to the trackers. If nothing is missing, it only prints
    a line.
    """
    if run_dir is None:
        return
    is_complete = run_dir.status.get("state") == "done"
    then = "nothing to do" if is_complete else "completing its results"
    print(f"the run in {run_dir.path} is finished already: {then}", file=sys.stderr, flush=True)
    if is_complete:
        return
    path, summary = run_dir.path, run_dir.summary or {}
    write_model_card_or_warn(path)
    history = read_records(path / "metrics.jsonl", last_step=sys.maxsize)
    settings, step = read_json(path / "config.json") or {}, summary.get("steps", 0)
    build_tracker(config.tracking, run_dir=path, config=settings, history=history, step=step).finish(summary)
    write_report_or_warn(path)
    run_dir.write_status("done", step=summary.get("steps", 0), epoch=summary.get("epochs", 0))


def summarize(trainer: Trainer, evaluation: Evaluation) -> dict[str, Any]:
    """Content of summary.json."""
    config, state, spec = trainer.config, trainer.state, trainer.data.spec
    flops = training_flops(config, spec, steps=state.step, num_images=len(trainer.data.samples))
    # Seconds of an unfinished epoch, which has no record. There is such an epoch only if the run was resumed with
    # --max-steps below the step of its checkpoint.
    unfinished = state.watch.read()
    seconds = sum(float(record["seconds"]) for record in state.history) + unfinished
    assert evaluation.correct_tta is not None
    return {
        "test_accuracy": evaluation.correct / evaluation.total,
        "test_correct": evaluation.correct,
        "test_total": evaluation.total,
        "test_accuracy_tta": evaluation.correct_tta / evaluation.total,
        "test_balanced_accuracy": evaluation.balanced_accuracy,
        "largest_class_share": evaluation.largest_class_share,
        "test_loss": evaluation.loss,
        "evaluation_split": config.data.evaluation_split,
        "epochs": len(state.history),
        "steps": state.step,
        "world_size": trainer.runtime.world_size,
        "device": trainer.runtime.device_name,
        "precision": trainer.runtime.precision,
        "train_seconds": seconds,
        "train_pflops": flops.total / 1e15,
        "optimizer_pflops": flops.optimizer / 1e15,
        "parameters": count_parameters(trainer.model),
        "images_per_second": state.step * config.schedule.batch_size / seconds,
    }


def describe_calibration(evaluation: Evaluation, calibrated: Evaluation, temperature: float) -> dict[str, float]:
    """Entries of summary.json: the calibration error of the results.

    If a temperature was fitted, also the temperature and the error before calibration.
    """
    entries = {"calibration_error": _calibration_error(calibrated)}
    if temperature != 1.0:
        entries |= {"calibration_error_before": _calibration_error(evaluation), "temperature": temperature}
    return entries


def _calibration_error(evaluation: Evaluation) -> float:
    if evaluation.num_finite < evaluation.total:
        return math.nan
    confidence, predicted = (values.cpu().numpy() for values in evaluation.logits.double().softmax(dim=1).max(dim=1))
    return calibration(evaluation.labels.cpu().numpy(), predicted, confidence).error


def write_model(run_dir: Path, model: nn.Module, spec: ModelSpec) -> None:
    """Writes model.safetensors and model.json. First removes the exports of the previous weights."""
    from safetensors.torch import save

    for name in EXPORTS.values():
        (run_dir / name).unlink(missing_ok=True)
    # Tensors are copied, because safetensors rejects tensors that share memory, such as those of tied layers.
    weights = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}
    replace_file(run_dir / "model.safetensors", save(weights))  # `save_file` would make it readable by its owner only
    spec.write(run_dir / "model.json")


def write_predictions(run_dir: Path, evaluation: Evaluation, loader: StreamLoader | ResidentLoader) -> None:
    """Writes predictions.npz: label and probabilities of each evaluated image.

    The file also contains the pixels of the most confident mistakes. If it would exceed a limit of `predictions`,
    or if a logit is not finite, the file could not be read back. Then it is not written, and a warning is printed
    instead.
    """
    if evaluation.num_finite < evaluation.total:
        warn("predictions.npz is not written: the network gives values that are not finite")
        return
    probabilities = evaluation.logits.double().softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    wrong = torch.nonzero(predicted != evaluation.labels).flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MAX_MISTAKES].cpu().numpy()
    samples = evaluation.samples[worst]
    pixels = read_images(loader, samples).permute(0, 2, 3, 1).cpu().numpy() if len(samples) else np.zeros((0, 1, 1, 3))
    arrays = {
        "indices": evaluation.samples,
        "labels": evaluation.labels.cpu().numpy(),
        "probabilities": probabilities.float().cpu().numpy(),
        "wrong_indices": samples,
        "wrong_images": pixels.astype(np.uint8),
    }
    if excess := exceeded_limit(arrays):
        warn(f"predictions.npz is not written: it would have {excess}")
        return
    content = BytesIO()
    np.savez_compressed(content, **arrays)
    replace_file(run_dir / "predictions.npz", content.getvalue())


def write_model_card_or_warn(run_dir: Path) -> None:
    from ddp_trainer.report.model_card import write_model_card

    _write_or_warn(write_model_card, run_dir, "model card", "ddp_trainer.model_card")


def write_report_or_warn(run_dir: Path) -> Path | None:
    from ddp_trainer.report.write import write_report

    return _write_or_warn(lambda path: write_report([path]), run_dir, "report", "ddp_trainer.report")


def _write_or_warn(write: Callable[[Path], Path], run_dir: Path, what: str, module: str) -> Path | None:
    """The path that `write` returns. If `write` fails, prints a warning and returns None.

    The run is finished already, so a missing model card or report must not make the run fail.
    """
    try:
        return write(run_dir)
    except Exception as error:
        again = f"python -m {module} {shlex.quote(str(run_dir))}"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warn(f"the run is finished, but writing its {what} failed ({reason}); try: {again}")
        return None
