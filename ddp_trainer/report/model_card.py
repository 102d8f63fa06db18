"""The model card: model.md beside the weights, written from the files of a complete run. Also a command.

Owned here: what a person who is handed the weights has to know, and the lines that load them without this package.
Sections after Mitchell et al., "Model Cards for Model Reporting" (arXiv 1810.03993).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.errors import InputError
from data_prep.files import replace_file
from ddp_trainer.models.custom_resnet import LOGIT_SCALE
from ddp_trainer.report.reproduce import data_command, train_command
from ddp_trainer.report.scores import calibration, confusion_counts, precision_and_recall, wilson_interval
from ddp_trainer.tracking.run_record import Run, load_run, mapping

CARD = "model.md"

# The network of `model.py` once more, in as few lines as can be read; a test holds the two together.
LOADING = f"""\
import json, pathlib, torch, torch.nn.functional as F
from safetensors.torch import load_file

spec, w = json.loads(pathlib.Path("model.json").read_text()), load_file("model.safetensors")
activation = dict(relu=F.relu, gelu=F.gelu, celu=lambda x: F.celu(x, 0.3))[spec["activation"]]
def block(x, name, pool=1):  # convolution, pooling, BatchNorm (entry 1, or 2 where there is a pooling), activation
    x = F.max_pool2d(F.conv2d(x, w[f"{{name}}.0.weight"], padding=1), pool)
    return activation(F.batch_norm(x, *(w[f"{{name}}.{{pool}}.{{k}}"] for k in ("running_mean", "running_var", "weight", "bias"))))
def residual(x, name):
    return x + block(block(x, f"{{name}}.branch.0"), f"{{name}}.branch.1")
def logits(images):  # uint8 (N, 3, height, width), values 0-255 -> float32 (N, classes)
    mean, std = torch.tensor([spec["mean"], spec["std"]])[..., None, None]
    x = block(block((images / 255 - mean) / std, "features.0"), "features.1", pool=2)
    x = block(block(residual(x, "features.2"), "features.3", pool=2), "features.4", pool=2)
    return F.linear(residual(x, "features.5").amax((2, 3)), w["head.weight"], w["head.bias"]) * {LOGIT_SCALE}
"""  # noqa: E501


def write_model_card(run_dir: Path) -> Path:
    """Writes RUN_DIR/model.md. Raises InputError where the run is not complete or a file of it cannot be used."""
    run = load_run(run_dir)
    if run.summary is None or run.counts is None:
        raise InputError(f"{run_dir / 'summary.json'} is missing: {run_dir} is not a completed run; train it first")
    replace_file(run_dir / CARD, card(run).encode())
    return run_dir / CARD


def card(run: Run) -> str:
    sections = {
        "Data": data(run),
        "Recipe": recipe(run),
        "Limits": limits(run),
        "Load it without this package": loading(),
    }
    text = f"# {plain(run.name)}: an image classifier\n\n" + "\n".join(headline(run)) + "\n"
    return text + "".join(f"\n## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in sections.items())


def plain(value: object) -> str:
    """On one line, and with nothing in it that ends a piece of code."""
    return " ".join(str(value).split()).replace("`", "'")


def headline(run: Run) -> Iterator[str]:
    assert run.counts is not None
    correct, total = run.counts
    low, high = wilson_interval(correct, total)
    yield (
        f"- Accuracy: {correct / total:.2%}, {correct:,} of {total:,} {run.split} images; 95% interval "
        f"{low:.2%} to {high:.2%} (Wilson)."
    )
    averaged = run.number("test_accuracy_tta")
    if averaged is not None:
        yield f"- With six views of each image that is not clear-cut averaged: {averaged:.2%}."
    size = mapping(run.config.get("dataset")).get("image_size", "?")
    yield f"- Input: RGB images of {size}x{size} pixels. Output: a logit for each of {len(run.classes)} classes."
    yield f"- Classes, in order: {', '.join(f'`{plain(name)}`' for name in run.classes)}."
    yield f"- Network: the custom ResNet of ddp-trainer, {run.number('parameters') or 0:,.0f} parameters, float32."


def data(run: Run) -> Iterator[str]:
    dataset = mapping(run.config.get("dataset"))
    splits = {name: mapping(split) for name, split in mapping(dataset.get("splits")).items()}
    counts = ", ".join(f"{split.get('count', '?')} {plain(name)} images" for name, split in splits.items())
    yield f"- Source: {plain(dataset.get('source', 'unknown'))}; {counts}."
    held_out = run.settings.get("validation")
    if held_out:
        yield f"- {held_out} of the training images were held out, and the accuracy is on them."
    mean, std = (", ".join(f"{value:.4f}" for value in dataset.get(name) or ()) for name in ("mean", "std"))
    yield f"- Colours over the training images, 0-1 scale: mean {mean}; standard deviation {std}."
    for name, split in splits.items():
        yield f"- sha256 of {plain(split.get('file', name))}: `{plain(split.get('sha256', 'unknown'))}`"


def recipe(run: Run) -> Iterator[str]:
    settings, number = run.settings, run.number
    batch = settings.get("batch_size", "?")
    yield f"- `{plain(run.config.get('recipe'))}`: {number('steps') or 0:,.0f} steps of {batch} images."
    chosen = (
        "optimizer",
        "peak_lr",
        "head_lr",
        "bias_lr",
        "weight_decay",
        "label_smoothing",
        "ema_decay",
        "activation",
        "freeze_bn_scale",
        "bn_momentum",
        "crop_padding",
        "small_crop_fraction",
        "flip",
        "cutout",
        "mixup",
        "cutmix",
        "seed",
    )
    yield "- " + ", ".join(f"{name} {plain(settings[name])}" for name in chosen if name in settings) + "."
    yield (
        f"- Trained in {number('train_seconds') or 0:,.0f} s on {run.config.get('world_size')} x "
        f"{plain(run.config.get('device_name'))}, {plain(run.config.get('precision'))}: "
        f"{number('train_pflops') or 0:.3g} PFLOP."
    )
    versions = mapping(run.config.get("versions"))
    yield f"- Versions: {', '.join(f'{plain(name)} {plain(version)}' for name, version in versions.items())}."
    yield f"- Code: commit {plain(run.config.get('git_commit') or 'unknown')} (`+`: with changes beside it)."
    yield from ("", "The same training again:", "", "```bash", *data_command(run), train_command(run), "```")


def limits(run: Run) -> Iterator[str]:
    yield f"- The interval covers the choice of the {run.split} images alone: it is one run, with one seed."
    if run.split == "test":
        yield "- Where settings were chosen by this very figure, it flatters; `--validation N` is there to choose by."
    if run.number("steps") == run.settings.get("max_steps"):
        yield f"- `--max-steps {run.settings['max_steps']}` ended the training: the full recipe may do better."
    if run.predictions is not None:
        labels, probabilities = run.predictions.labels, run.predictions.probabilities
        counts = confusion_counts(labels, run.predictions.predicted, len(run.classes))
        recall = precision_and_recall(counts)[1]
        worst = int(np.nanargmin(recall))
        name, images = plain(run.classes[worst]), counts[worst].sum()
        yield f"- Weakest class: `{name}`, of whose {images} images {recall[worst]:.1%} were recognised."
        error = calibration(labels, probabilities).error
        yield f"- Its probabilities are off by {error:.1%} on average (expected calibration error, 15 bins)."
    yield "- Every image is given one of the classes above, whatever it shows, and perhaps with a high probability."
    yield "- Images of another size or origin than the training images were not evaluated; nor were corrupted images,"
    yield "  attacks, and differences between groups of people or places."


def loading() -> Iterator[str]:
    yield from ("In this folder, with torch and safetensors installed:", "", "```python", LOADING.rstrip(), "```", "")
    yield '`logits(images).softmax(1)` gives probabilities in the order of `spec["classes"]`. For graphs that need no'
    yield "such code, `python -m ddp_trainer.export` writes ONNX and torch.export files."
