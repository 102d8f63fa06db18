"""The model card: model.md in the run directory, written from the files of a finished run.

The card is for people who receive the weights: it describes the model and its limits, and shows how to load it. Its
sections follow Mitchell et al., "Model Cards for Model Reporting" (arXiv 1810.03993).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.errors import InputError, printable
from data_prep.files import replace_file
from ddp_trainer.report.reproduce import data_command, train_command
from ddp_trainer.report.scores import calibration, class_counts, precision_and_recall, wilson_interval
from ddp_trainer.report.sections import operations
from ddp_trainer.report.wording import NOTHING, duration, percent, plain, quantity
from ddp_trainer.tracking.predictions import Predictions
from ddp_trainer.tracking.run_record import Run, load_run

CARD = "model.md"

WITH_THIS_PACKAGE = """\
import ddp_trainer, torch
model, spec = ddp_trainer.load_model(".")  # in evaluation mode, on the CPU
mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
logits = model((images / 255 - mean) / std) / spec.temperature
"""
EXPORT = "python -m ddp_trainer.export . --format torch  # or: --format onnx"
WITHOUT_THIS_PACKAGE = """\
import torch
model = torch.export.load("model.pt2").module()
logits = model(images)
"""
# The card lists these settings in this order. It leaves out settings that the run does not have.
RECIPE_SETTINGS = (
    *("network", "init_from", "freeze"),
    *("optimizer", "peak_lr", "head_lr", "bias_lr", "weight_decay", "label_smoothing", "ema_decay"),
    *(
        "widths",
        "activation",
        "freeze_bn_scale",
        "bn_momentum",
        "crop",
        "crop_padding",
        "crop_scale",
        "crop_ratio",
        "train_size",
        "small_crops",
        "freeze_late",
        "flip",
        "cutout",
    ),
    *("mixup", "cutmix", "balance", "calibrate", "seed"),
)


def write_model_card(run_dir: Path) -> Path:
    """Writes RUN_DIR/model.md. Raises InputError if the run is not finished or a file in it cannot be used."""
    run = load_run(run_dir)
    if run.summary is None or run.counts is None:
        raise InputError(f"{run_dir / 'summary.json'} is missing: {run_dir} is not a finished run; train it first")
    path = run_dir / CARD
    try:
        replace_file(path, card(run).encode())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): check permissions and free space") from None
    return path


def card(run: Run) -> str:
    sections = {"Data": data(run), "Recipe": recipe(run), "Limits": limits(run), "Use": usage(run)}
    text = f"# {code(run.name)}: an image classifier\n\n" + "\n".join(headline(run)) + "\n"
    return text + "".join(f"\n## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in sections.items())


def code(text: str) -> str:
    """`text` as inline code on one line. It comes from a file, so Markdown and HTML in it must have no effect."""
    return "`" + printable(text).replace("`", "'") + "`" if text.strip() else "unknown"


def headline(run: Run) -> Iterator[str]:
    assert run.counts is not None
    correct, total = run.counts
    low, high = wilson_interval(correct, total)
    yield (
        f"- Accuracy: {correct / total:.2%}, {correct:,} of {total:,} {run.split} images; 95% interval "
        f"{low:.2%} to {high:.2%} (Wilson)."
    )
    balanced, largest = run.number("test_balanced_accuracy"), run.number("largest_class_share")
    if balanced is not None and largest is not None:
        yield (
            f"- Balanced accuracy: {balanced:.2%} (mean recall of the classes); the largest class has {largest:.2%} of "
            "the images."
        )
    averaged = run.number("test_accuracy_tta")
    if averaged is not None:
        yield f"- Accuracy with test-time augmentation of uncertain images: {percent(averaged)}."
    yield f"- Input: {input_images(run)}. Output: a logit for each of {len(run.classes)} classes."
    yield f"- Classes, in order: {', '.join(map(code, run.classes))}."
    network = code(plain(run.settings.get("network", "custom_resnet")))
    yield f"- Network: {network}, {quantity(run.number('parameters'))} parameters, float32."


def input_images(run: Run) -> str:
    whole, center = run.dataset.image_size or "?", run.settings.get("train_size")
    if not isinstance(center, int) or center == whole:
        return f"RGB images of {whole}x{whole} pixels"
    return f"RGB images of {center}x{center} pixels, center-cropped from images of {whole}x{whole} pixels"


def data(run: Run) -> Iterator[str]:
    dataset = run.dataset
    counts = ", ".join(f"{quantity(split.count)} {code(name)} images" for name, split in dataset.splits.items())
    yield f"- Source: {code(dataset.source)}; {counts or 'number of images unknown'}."
    held_out = run.settings.get("validation")
    if held_out:
        yield f"- {code(plain(held_out))} of the training images were held out to measure the accuracy."
    calibrated = run.settings.get("calibrate")
    if calibrated:
        yield f"- {code(plain(calibrated))} of the training images were held out for calibration."
    mean, std = (", ".join(f"{value:.4f}" for value in values) or NOTHING for values in (dataset.mean, dataset.std))
    yield f"- Colors of the training images on a scale of 0-1: mean {mean}; standard deviation {std}."
    for split in dataset.splits.values():
        yield f"- sha256 of {code(split.file)}: {code(split.sha256)}"


def recipe(run: Run) -> Iterator[str]:
    settings = run.settings
    left_out = {name for name in ("init_from", "freeze") if not settings.get(name)}
    if settings.get("network", "custom_resnet") != "custom_resnet":
        left_out |= {"widths", "activation"}  # they apply only to the built-in network
    names = [name for name in RECIPE_SETTINGS if name in settings and name not in left_out]
    batch = plain(settings.get("batch_size", "?"))
    yield f"- Recipe {code(run.recipe)}: {quantity(run.number('steps'))} steps of {code(batch)} images."
    yield "- " + ", ".join(f"{name} {code(plain(settings[name]))}" for name in names) + "."
    yield (
        f"- Trained in {duration(run.number('train_seconds'))} on {run.world_size} x {code(run.device)}, "
        f"{code(run.precision)}: {operations(run)}."
    )
    versions = ", ".join(f"{code(name)} {code(version)}" for name, version in run.versions.items())
    yield f"- Versions: {versions or 'unknown'}."
    changed = ", with uncommitted changes" if run.git_commit.endswith("+") else ""
    yield f"- Code: commit {code(run.git_commit.rstrip('+'))}{changed}."
    yield from ("", "To repeat the run:", "", "```bash", *data_command(run), train_command(run), "```")


def limits(run: Run) -> Iterator[str]:
    yield f"- The interval accounts for the choice of the {run.split} images, but not for the seed: this is one run."
    if run.split == "test":
        yield "- If settings were tuned on the test images, the accuracy is too optimistic; `--validation N` holds out"
        yield "  training images to tune on."
    if run.number("steps") == run.settings.get("max_steps"):
        yield "- The run ended at `--max-steps`. If the recipe has more steps, a full run may be more accurate."
    if run.predictions is not None:
        yield from measured_limits(run, run.predictions)
    yield "- Every image gets one of the classes above, whatever it shows, and possibly with a high probability."
    yield "- Not evaluated: images of a different size or origin than in training, corrupted images, attacks, and"
    yield "  differences between groups of people or places."


def measured_limits(run: Run, found: Predictions) -> Iterator[str]:
    recall = precision_and_recall(found.labels, found.predicted, len(run.classes))[1]
    worst = int(np.nanargmin(recall))
    images = int(class_counts(found.labels, len(run.classes))[worst])
    weakest = f"- Weakest class: {code(run.classes[worst])}; "
    yield weakest + f"{recall[worst]:.1%} of its {images:,} images are classified correctly."
    error = calibration(found.labels, found.predicted, found.confidence).error
    yield f"- The probabilities are off by {error:.1%} on average (expected calibration error, 15 bins)."
    before, temperature = run.number("calibration_error_before"), run.number("temperature")
    if before is not None and temperature is not None:
        yield (
            f"- The softmax has a temperature of {temperature:.3f}; without it, the calibration error would be "
            f"{before:.1%}."
        )


def usage(run: Run) -> Iterator[str]:
    network = str(run.settings.get("network", ""))
    yield "`images` is a uint8 tensor (N, 3, height, width) with values 0-255; `logits.softmax(1)` gives probabilities"
    yield "in the order of the classes above. In this folder, with ddp-trainer installed:"
    yield from ("", "```python", WITH_THIS_PACKAGE.rstrip(), "```", "")
    if ":" in network and not network.startswith(("torchvision:", "timm:")):
        yield from (f"{code(network)} builds the network, so add the folder of its module to PYTHONPATH first.", "")
    yield from ("To use the model without ddp-trainer, export it once:", "", "```bash", EXPORT, "```", "")
    yield from ("```python", WITHOUT_THIS_PACKAGE.rstrip(), "```")
