"""Export: `python -m ddp_trainer.export RUN_DIR --format {onnx,torch}` writes the model as one file for other programs.

The input of the exported model is uint8 (N, 3, H, W) with values 0-255, as image decoders return them. The output is
float32 (N, num_classes) logits. The model normalizes its input and, after a run with --calibrate, divides the logits by
the temperature. Float input is rejected, because values in [0, 1] could be mistaken for values in [0, 255]. The file
gets its final name only after it has been checked.
"""

import contextlib
import functools
import importlib
import io
import json
import logging
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from torch import Tensor, nn

from data_prep.batch_ops import batch_normalize
from data_prep.errors import ExplainedError, InputError, require
from data_prep.files import DISK_FULL, replace_file
from data_prep.machine_limits import lacks_memory
from ddp_trainer.command_line import parse_flags, program_name, run_command
from ddp_trainer.models.spec import ModelSpec, load_model
from ddp_trainer.run.files import EXPORTS

Classifier = Callable[[Tensor], Tensor]  # (N, 3, H, W) uint8 -> (N, num_classes) float32

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
OPSET = 18  # the lowest opset that torch's exporter writes without converting the file
CHECKED_BATCHES = (1, 2, 33)  # batch sizes; a model that was exported with a fixed batch size fails on at least two
TOLERANCE = 1e-4  # relative to the largest logit; rounding errors are smaller


class ExportError(ExplainedError):
    """The network cannot be exported, the disk is full, or the file does not compute what the network computes."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the model of a finished run as RUN_DIR/model.onnx or RUN_DIR/model.pt2.

    The model's input is uint8 (N, 3, H, W) with values 0-255, for any N. Its output is float32 (N, classes) logits. The
    command prints the versions that a program must support to read the file: for ONNX, the IR version and the opset.
    """

    run_dir: tyro.conf.Positional[Path]
    """Run directory with model.safetensors and model.json."""
    format: Literal["onnx", "torch"]
    """onnx: for onnxruntime and other ONNX runtimes; torch: for torch.export.load."""
    opset: int | None = None
    """For --format onnx: version of the ONNX operator set that the file uses; default: 18."""

    def __post_init__(self) -> None:
        require(self.opset is None or self.format == "onnx", "--opset works only with --format onnx; leave it out")
        require(self.opset is None or self.opset >= 1, f"--opset must be at least 1, got {self.opset}")


class Exported(NamedTuple):
    """An exported model that was loaded again from its file."""

    classify: Classifier
    versions: str  # the format versions that a program must support to read the file


class Result(NamedTuple):
    """The exported file, after it has been checked and renamed."""

    path: Path
    versions: str
    difference: float  # largest difference between its logits and the model's own, relative to the largest logit


class NormalizingModel(nn.Module):
    """The network, including the normalization of its input and the division of its logits by the temperature.

    Programs that use the file need not know mean and std. The softmax of the output gives the probabilities that
    `predict` prints.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.network, self.temperature = network, spec.temperature
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in spec.std]).view(3, 1, 1))
        self.register_buffer(
            "shift", torch.tensor([-m / s for m, s in zip(spec.mean, spec.std, strict=True)]).view(3, 1, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images.to(torch.float32) * self.scale + self.shift)
        return logits if self.temperature == 1 else logits / self.temperature


def write_onnx(model: nn.Module, example: Tensor, spec: ModelSpec, path: Path, *, opset: int = OPSET) -> Exported:
    """Writes an ONNX file that contains the weights, and the class names as JSON in the metadata entry `classes`.

    Raises InputError if torch cannot write the network with version `opset` of the operator set.
    """
    import onnxruntime

    program = torch.onnx.export(
        model,
        (example,),
        input_names=["images"],
        output_names=["logits"],
        opset_version=opset,
        verbose=False,
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )
    assert program is not None
    written = program.model.opset_imports[""]  # differs from `opset` if the exporter cannot write that version
    require(
        written == opset,
        f"--opset {opset}: torch {torch.__version__} cannot write this network with that opset; try {written}",
    )
    program.model.metadata_props["classes"] = json.dumps(spec.classes)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return Exported(
        classify=lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]),
        versions=f"ONNX IR {program.model.ir_version}, opset {written}",
    )


@contextlib.contextmanager
def silent_exporters() -> Iterator[None]:
    """Within the block, hides the output of the exporters: warnings if they succeed, whole graphs if they fail."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def write_torch(model: nn.Module, example: Tensor, spec: ModelSpec, path: Path) -> Exported:
    """Writes a torch.export file that contains the class names as JSON in the extra file `classes.json`.

    The exported program runs on the CPU; `torch.export.passes.move_to_device_pass` converts it for a GPU.
    """
    program = torch.export.export(model, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    content = io.BytesIO()  # torch aborts the process if it writes to a file and the disk is full
    torch.export.save(program, content, extra_files={"classes.json": json.dumps(spec.classes)})
    replace_file(path, content.getvalue())
    return Exported(classify=torch.export.load(path).module(), versions=f"torch {torch.__version__}")


@torch.inference_mode()
def largest_difference(exported: Classifier, model: nn.Module, spec: ModelSpec) -> float:
    """The largest difference between the logits of `exported` and `model`, relative to the largest logit.

    Both classify images of random noise. Raises ExportError if the difference is too large to be a rounding error, or
    if the logits of `exported` have the wrong shape or are not finite.
    """
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for count in CHECKED_BATCHES:
        shape = (count, 3, spec.input_size, spec.input_size)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        # `contiguous` converts channels_last to NCHW, because every network accepts NCHW.
        normalized = batch_normalize(images, spec.mean, spec.std, torch.float32).contiguous()
        expected = model(normalized) / spec.temperature
        found = exported(images)
        wanted, got = tuple(expected.shape), tuple(found.shape)
        if got != wanted:
            raise ExportError(f"the exported model must return logits of shape {wanted}, got {got}")
        if not bool(found.isfinite().all()):
            raise ExportError("the exported model returns logits that are not finite")
        worst = max(worst, ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item())
    if worst > TOLERANCE:
        raise ExportError(f"the exported model's logits are wrong by {worst:.1e}, relative to the largest logit")
    return worst


def check_packages(format: str) -> None:
    """Raises InputError if packages that the format needs are missing. The message has the command to install them."""
    missing = []
    for name in PACKAGES[format]:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        install = f"{sys.executable} -m pip install {' '.join(missing)}"
        raise InputError(f"--format {format} needs {', '.join(missing)}; install with: {install}")


def export_run(config: ExportConfig) -> Result:
    """Writes the file in a temporary folder, checks it there, and then moves it to the run directory.

    Raises InputError if the run has no usable model, a package is missing, the opset is not supported, or the file
    cannot be written. Raises ExportError if the network cannot be exported, the disk is full, or the check fails.
    """
    check_packages(config.format)
    model, spec = load_model(config.run_dir)
    example = torch.zeros(2, 3, spec.input_size, spec.input_size, dtype=torch.uint8)
    normalizing, target = NormalizingModel(model, spec).eval(), config.run_dir / EXPORTS[config.format]
    write = functools.partial(write_onnx, opset=config.opset or OPSET) if config.format == "onnx" else write_torch
    try:
        for left in config.run_dir.glob(".export-????????"):  # a killed export leaves its folder
            with contextlib.suppress(OSError):  # `rmtree` refuses links
                is_ours = all(path.name.lstrip(".").startswith(tuple(EXPORTS.values())) for path in left.iterdir())
                if is_ours and left.stat().st_mtime < time.time() - 24 * 3600:  # a newer folder may be in use
                    shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=config.run_dir) as folder:
            path = Path(folder) / target.name
            with silent_exporters():
                exported = write(normalizing, example, spec, path)
            difference = largest_difference(exported.classify, model, spec)
            path.replace(target)
    except OSError as error:
        kind = ExportError if error.errno in DISK_FULL else InputError
        raise kind(f"{target} cannot be written ({error.strerror}); check permissions and free space") from None
    except Exception as error:  # the exporters raise many types of exceptions for unsupported networks
        if isinstance(error, InputError | ExportError) or lacks_memory(error):
            raise
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch's own message may only say in which step the export failed
            cause = cause.__cause__
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(cause)).strip().partition("\n")[0]
        raise ExportError(f"--format {config.format}: torch cannot export {spec.architecture}: {reason}") from None
    return Result(target, exported.versions, difference)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if the file was written, 1 after ExportError, 2 for wrong input."""

    def work() -> None:
        done = export_run(parse_flags(ExportConfig, argv, prog=program_name("ddp_trainer.export")))
        checked = f"checked: logits have a relative error of at most {done.difference:.1e}"
        print(f"{done.path}: input uint8 (N, 3, H, W), output float32 logits; {done.versions}; {checked}")

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
