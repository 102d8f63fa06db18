"""`python -m ddp_trainer.export RUN_DIR --format {onnx,torch}`: the trained model as one file for other programs.

Owned here: what goes into the file, and that it is checked before it gets its name. The input is uint8 (N, 3, H, W)
with values 0-255, as every decoder gives them, the output float32 (N, num_classes) logits; normalization is inside. A
float input could mean 0-255 or 0-1, and the wrong one of them would go unnoticed; an exported file refuses any type
but uint8.
"""

import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

from data_prep.batch_ops import batch_normalize
from data_prep.errors import InputError
from ddp_trainer.command_line import parse_flags, program_name
from ddp_trainer.models.spec import ModelSpec, load_model

Classifier = Callable[[Tensor], Tensor]  # (N, 3, H, W) uint8 -> (N, num_classes) float32

FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
CHECKED_BATCHES = (1, 2, 33)  # sizes that a graph with a fixed batch could not all take
TOLERANCE = 1e-4  # of the largest logit: orders of summation differ, nothing else may


class ExportError(Exception):
    """The exported file does not compute what the model computes."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the model of a completed run as RUN_DIR/model.onnx or RUN_DIR/model.pt2.

    Input: uint8 (N, 3, H, W) with values 0-255, for any N. Output: float32 (N, classes) logits.
    """

    run_dir: tyro.conf.Positional[Path]
    """Run directory with model.safetensors and model.json."""
    format: Literal["onnx", "torch"]
    """onnx: for onnxruntime and others; torch: for torch.export.load."""


class NormalisingModel(nn.Module):
    """The network behind its normalization, so that users need not know mean and std."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in spec.std]).view(3, 1, 1))
        self.register_buffer(
            "shift", torch.tensor([-m / s for m, s in zip(spec.mean, spec.std, strict=True)]).view(3, 1, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.to(torch.float32) * self.scale + self.shift)


def write_onnx(model: nn.Module, example: Tensor, spec: ModelSpec, path: Path) -> Classifier:
    """By torch's dynamo exporter, weights inside the file; class names as JSON in the metadata entry `classes`."""
    import onnxruntime

    program = torch.onnx.export(
        model,
        (example,),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )
    assert program is not None
    program.model.metadata_props["classes"] = json.dumps(spec.classes)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def write_torch(model: nn.Module, example: Tensor, spec: ModelSpec, path: Path) -> Classifier:
    """By torch.export; class names as JSON in the extra file `classes.json`.

    The program is one for the CPU; `torch.export.passes.move_to_device_pass` makes it one for a GPU.
    """
    program = torch.export.export(model, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    torch.export.save(program, path, extra_files={"classes.json": json.dumps(spec.classes)})
    return torch.export.load(path).module()


WRITERS = {"onnx": write_onnx, "torch": write_torch}


@torch.inference_mode()
def largest_difference(exported: Classifier, model: nn.Module, spec: ModelSpec) -> float:
    """Between the logits of the reloaded file and the model's own, on noise, as a share of the largest logit.

    Raises ExportError where it is more than rounding explains.
    """
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for count in CHECKED_BATCHES:
        images = torch.randint(
            256, (count, 3, spec.image_size, spec.image_size), dtype=torch.uint8, generator=generator
        )
        expected = model(batch_normalize(images, spec.mean, spec.std, torch.float32))
        found = exported(images)
        if found.shape != expected.shape or not bool(found.isfinite().all()):
            raise ExportError(f"the exported model gives {tuple(found.shape)} for {count} images, not finite logits")
        worst = max(worst, ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item())
    if worst > TOLERANCE:
        raise ExportError(f"the logits of the exported model differ from the model's own by {worst:.1e} of the largest")
    return worst


def check_packages(format: str) -> None:
    """Raises InputError, with the command that installs them, where an optional package cannot be imported."""
    missing = []
    for name in PACKAGES[format]:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        install = f"{sys.executable} -m pip install -c constraints.txt -e '.[export]'"
        raise InputError(f"--format {format} needs {', '.join(missing)}; install with: {install}")


def export_run(run_dir: Path, format: Literal["onnx", "torch"]) -> tuple[Path, float]:
    """(the file, the largest relative difference found): written beside its place, checked, then given its name.

    Raises InputError where the run has no usable model or a package is missing, ExportError where the check fails.
    """
    check_packages(format)
    model, spec = load_model(run_dir)
    example = torch.zeros(2, 3, spec.image_size, spec.image_size, dtype=torch.uint8)
    target = run_dir / FILES[format]
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=run_dir) as folder:
            path = Path(folder) / target.name
            exported = WRITERS[format](NormalisingModel(model, spec).eval(), example, spec, path)
            difference = largest_difference(exported, model, spec)
            path.replace(target)
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}): check permissions and free space") from None
    return target, difference


def main(argv: Sequence[str] | None = None) -> int:
    try:
        config = parse_flags(ExportConfig, argv, prog=program_name("ddp_trainer.export"))
        path, difference = export_run(config.run_dir, config.format)
    except (InputError, ExportError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, InputError) else 1
    print(f"{path}: uint8 images (N, 3, H, W) in, logits out; checked, largest difference {difference:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
