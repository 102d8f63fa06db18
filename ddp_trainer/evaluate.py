"""Evaluate: `python -m ddp_trainer.evaluate RUN_DIR [--tta]`, or several processes with `accelerate launch`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from data_prep.dataset import DatasetInfo, read_dataset, verify_dataset
from data_prep.errors import InputError
from data_prep.json_fields import Fields
from data_prep.loader import build_loader
from ddp_trainer.command_line import parse_flags, program_name, run_command
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.launch import Launch
from ddp_trainer.distributed.process_settings import restored_settings
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.evaluation import Evaluator
from ddp_trainer.models.spec import ModelSpec, load_model


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate a finished run on its test split. Every image is counted exactly once, on any number of processes."""

    run_dir: tyro.conf.Positional[Path]
    """Run directory with model.safetensors and model.json."""
    data_dir: Path | None = None
    """A folder that data_prep wrote; default: the one the run was trained on."""
    tta: bool = False
    """Test-time augmentation: classify uncertain images by averaging shifted copies, and mirrored ones too unless
    the run was trained with --flip none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 if the hardware has it, else fp16 on CUDA, else fp32."""


@restored_settings()
def evaluate_run(config: EvaluateConfig) -> dict[str, float | int]:
    """The figures that the command prints, on every rank. Raises InputError if run or data cannot be used."""
    model, spec = load_model(config.run_dir)
    trained = Fields.read(config.run_dir / "config.json")
    recorded = trained.text("data_dir", exact=True) if trained else ""
    data_dir = config.data_dir or Path(recorded or "data/cifar10")
    dataset = read_dataset(data_dir)
    check_same_images(spec, dataset, data_dir)
    verify_dataset(data_dir, dataset)
    # Signals are not handled, because a signal may end the process at once: nothing is saved here.
    runtime = Runtime(RuntimeConfig(device=config.device, precision=config.precision))
    split = dataset.splits["test"]
    loader = build_loader(
        data_dir / split.file, mode="auto", device=runtime.device, batch_size=spec.evaluation_batch, num_workers=1
    )
    evaluator = Evaluator(loader, np.arange(split.count), spec, runtime)
    result = evaluator.run(runtime.place(model), tta=config.tta)
    runtime.close()
    averaged = result if result.logits_tta is None else replace(result, logits=result.logits_tta)
    return {
        "test_accuracy": averaged.correct / averaged.total,
        "test_correct": averaged.correct,
        "test_total": averaged.total,
        "test_loss": averaged.loss,
    }


def check_same_images(spec: ModelSpec, dataset: DatasetInfo, data_dir: Path) -> None:
    """Raises InputError if the dataset has other classes or another image size than the model was trained on."""
    if tuple(dataset.classes) != spec.classes:
        raise InputError(f"{data_dir} has other classes than the run was trained on; pass its dataset as --data-dir")
    if dataset.image_size != spec.image_size:
        raise InputError(
            f"{data_dir} has images of {dataset.image_size} pixels, but the run was trained on {spec.image_size}; "
            "pass its dataset as --data-dir"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status. 0: every image was counted; 2: the input is wrong."""

    def evaluate() -> None:
        figures = evaluate_run(parse_flags(EvaluateConfig, argv, prog=program_name("ddp_trainer.evaluate")))
        if Launch.from_environment().is_main:
            print(json.dumps(figures))

    return run_command(evaluate)


if __name__ == "__main__":
    sys.exit(main())
