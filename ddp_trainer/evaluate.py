"""Evaluate: `python -m ddp_trainer.evaluate RUN_DIR [--tta]` counts correct predictions on the test images.

With `accelerate launch` instead of `python`, several processes share the images.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from data_prep.dataset import DatasetInfo, read_dataset, verify_dataset
from data_prep.errors import InputError, quoted, require, shell_path
from data_prep.json_fields import Fields
from data_prep.loader import build_loader
from data_prep.sources import name_some
from ddp_trainer.command_line import parse_flags, program_name, require_output, run_command
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.launch import Launch
from ddp_trainer.distributed.process_settings import restored_settings
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.evaluation import Evaluator
from ddp_trainer.models.spec import ModelSpec, load_model


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate a finished run on test images. Each image is counted exactly once, on any number of processes."""

    run_dir: tyro.conf.Positional[Path]
    """Run directory with model.safetensors and model.json."""
    data_dir: Path | None = None
    """Evaluate the test images of this dataset, a folder that data_prep wrote; default: the dataset of the run. Each
    class of the dataset must have the name of a class of the run. The dataset needs no training images."""
    tta: bool = False
    """Test-time augmentation: for uncertain images, average the logits of shifted and mirrored copies. Copies are
    shifted only if the run cropped at random positions. They are mirrored unless the run used --flip none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if torch finds a usable GPU, else cpu."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 if the hardware supports it, else fp16 on CUDA, else fp32."""


@restored_settings()
def evaluate_run(config: EvaluateConfig) -> dict[str, float | int]:
    """The figures that the command prints; every rank returns them.

    Raises InputError if the run or the dataset cannot be used, or if a logit is not finite.
    """
    model, spec = load_model(config.run_dir)
    trained = Fields.read(config.run_dir / "config.json")
    recorded = trained.text("data_dir", exact=True) if trained else ""
    data_dir = config.data_dir or Path(recorded or "data/cifar10")
    dataset = read_dataset(data_dir, needed=("test",))
    if config.data_dir is None and trained:
        recorded_images = trained.part("dataset").part("splits").part("test").text("sha256")
        require(
            recorded_images in ("", dataset.splits["test"].sha256),
            f"{data_dir} no longer has the test images of the run; to use its current test images, add --data-dir "
            f"{shell_path(data_dir)}",
        )
    labels = labels_of_the_run(spec, dataset, data_dir)
    verify_dataset(data_dir, dataset, full=False)
    # No signal handlers are installed: a signal may end the process at once, because there is nothing to save.
    channels_last = trained.part("settings").flag("channels_last", True) if trained else True
    runtime = Runtime(RuntimeConfig(device=config.device, precision=config.precision, channels_last=channels_last))
    split = dataset.splits["test"]
    batch_size, file = spec.evaluation_batch, data_dir / split.file
    loader = build_loader(file, mode="auto", device=runtime.device, batch_size=batch_size, num_workers=1, split=split)
    evaluator = Evaluator(loader, np.arange(split.count), spec, runtime)
    result = evaluator.run(runtime.place(model), tta=config.tta)
    runtime.close()
    own = torch.tensor(labels, device=result.labels.device)
    logits = result.logits if result.logits_tta is None else result.logits_tta
    fix = "train a new model, or use --precision fp32"
    require(bool(logits.isfinite().all()), f"{config.run_dir}: the model gives values that are not finite; {fix}")
    averaged = replace(result, labels=own[result.labels], logits=logits)
    return {
        "test_accuracy": averaged.correct / averaged.total,
        "test_correct": averaged.correct,
        "test_total": averaged.total,
        "test_balanced_accuracy": averaged.balanced_accuracy,
        "test_loss": averaged.loss,
    }


def labels_of_the_run(spec: ModelSpec, dataset: DatasetInfo, data_dir: Path) -> list[int]:
    """For each class of the dataset, the label of the run's class with the same name.

    Raises InputError if the run has no such class, or if it was trained on images of another size.
    """
    label_of = {name: label for label, name in enumerate(spec.classes)}
    unknown = [quoted(name) for name in dataset.classes if name not in label_of]
    if unknown:
        missing = [quoted(name) for name in spec.classes if name not in dataset.classes]
        only = f" (and lacks {name_some(missing)})" if missing else ""
        raise InputError(
            f"{data_dir} has classes that the run was not trained on: {name_some(unknown)}{only}; "
            "pass another dataset as --data-dir"
        )
    if dataset.image_size != spec.image_size:
        raise InputError(
            f"{data_dir} has images of {dataset.image_size} pixels a side, but the run was trained on images of "
            f"{spec.image_size} pixels; pass a dataset of this size as --data-dir"
        )
    return [label_of[name] for name in dataset.classes]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 for success, 2 for wrong input.

    It is 1 if an image is damaged, the dataset changes, or stdout could not be written.
    """

    def evaluate() -> None:
        figures = evaluate_run(parse_flags(EvaluateConfig, argv, prog=program_name("ddp_trainer.evaluate")))
        if Launch.from_environment().is_main:
            print(json.dumps(figures))
            require_output()

    return run_command(evaluate, launched=True)


if __name__ == "__main__":
    sys.exit(main())
