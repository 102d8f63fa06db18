"""Exported files give the model's predictions in a process that cannot import this package."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_prep.batch_ops import batch_normalize
from data_prep.loader import StreamLoader
from ddp_trainer import export
from ddp_trainer.models.spec import ModelSpec, build_model, load_model
from ddp_trainer.run.outputs import write_model
from tests.support.full_disk import file_size_limit
from tests.support.trainer import environment, start

# A program that reads both exported files and cannot import this package.
WITHOUT_THIS_PACKAGE = """
import sys
sys.modules["ddp_trainer"] = sys.modules["data_prep"] = None
import numpy as np, onnxruntime, torch
run, images_file, out = sys.argv[1:]
images = np.load(images_file)
session = onnxruntime.InferenceSession(f"{run}/model.onnx", providers=["CPUExecutionProvider"])
extra = {"classes.json": ""}
module = torch.export.load(f"{run}/model.pt2", extra_files=extra).module()
refusals = []
for feed in (lambda x: session.run(None, {"images": x}), lambda x: module(torch.from_numpy(x))):
    try:
        feed((images[:2] / 255).astype(np.float32))
    except Exception as error:
        refusals.append(type(error).__name__)
pieces = [images[:1], images[1:8], images[8:]]
np.savez(
    out,
    onnx=np.concatenate([session.run(None, {"images": piece})[0] for piece in pieces]),
    torch=torch.cat([module(torch.from_numpy(piece)) for piece in pieces]).detach().numpy(),
    refusals=refusals,
    classes=[session.get_modelmeta().custom_metadata_map["classes"], extra["classes.json"]],
)
"""


@pytest.fixture(scope="module")
def test_images(tiny_dir: Path) -> Tensor:
    """The whole test split, (40, 3, 32, 32) uint8."""
    loader = StreamLoader(tiny_dir / "test.beton", device=torch.device("cpu"), batch_size=40, num_workers=1)
    return next(iter(loader.batches([np.arange(40)]))).images.contiguous()


@pytest.fixture(scope="module")
def exported_run(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ignored = shutil.ignore_patterns("wandb", "checkpoints")
    return Path(shutil.copytree(smoke_run, tmp_path_factory.mktemp("exported") / "run", ignore=ignored))


@pytest.fixture(scope="module")
def results(exported_run: Path, test_images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The results of model.onnx and model.pt2 in a process that cannot import this package."""
    folder = tmp_path_factory.mktemp("results")
    np.save(folder / "images.npy", test_images.numpy())
    formats = {"onnx": "; ONNX IR 10, opset 18; checked", "torch": f"; torch {torch.__version__}; checked"}
    commands = [start("ddp_trainer.export", exported_run, "--format", name) for name in formats]
    for command, versions in zip(commands, formats.values(), strict=True):
        stdout, stderr = command.communicate(timeout=240)
        assert command.returncode == 0, stderr
        assert versions in stdout
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THIS_PACKAGE, exported_run, folder / "images.npy", folder / "out.npz"],
        env=environment(),
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / "out.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_process_without_this_package_predicts_the_same(
    format: str, results: dict[str, np.ndarray], exported_run: Path, test_images: Tensor
) -> None:
    model, spec = load_model(exported_run)
    with torch.inference_mode():
        own = model(batch_normalize(test_images, spec.mean, spec.std, torch.float32)).numpy()
    assert np.array_equal(results[format].argmax(axis=1), own.argmax(axis=1))
    assert np.abs(results[format] - own).max() < 1e-4 * np.abs(own).max()
    assert len(np.unique(own.argmax(axis=1))) > 1, "one class is predicted for all images, so this proves nothing"


def test_exported_files_refuse_float_images_and_contain_the_class_names(
    results: dict[str, np.ndarray], exported_run: Path
) -> None:
    assert len(results["refusals"]) == 2
    assert [json.loads(text) for text in results["classes"]] == 2 * [list(load_model(exported_run)[1].classes)]


def test_no_temporary_export_files_are_left(results: dict[str, np.ndarray], exported_run: Path) -> None:
    assert {path.name for path in exported_run.glob("*model*")} >= {"model.onnx", "model.pt2"}
    assert list(exported_run.glob(".export-*")) == []


@pytest.fixture
def small_run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    spec = ModelSpec(
        classes=("a", "b"),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.3),
        image_size=32,
        widths=(4, 4, 8, 8),
        activation="celu",
    )
    write_model(tmp_path, build_model(spec), spec)
    return tmp_path


def test_a_network_with_another_activation_can_be_exported(small_run: Path) -> None:
    """The export command itself compares the logits of the file with those of the model. The next test covers ONNX."""
    assert export.main([str(small_run), "--format", "torch"]) == 0


@pytest.mark.parametrize("opset", [17, 21])
def test_the_file_has_the_requested_opset(small_run: Path, opset: int, capfd: pytest.CaptureFixture[str]) -> None:
    """For opset 17, torch's exporter converts the file and logs a warning, which the command does not show."""
    import onnx

    assert export.main([str(small_run), "--format", "onnx", "--opset", str(opset)]) == 0
    printed = capfd.readouterr()
    model = onnx.load(small_run / "model.onnx")
    assert [entry.version for entry in model.opset_import if not entry.domain] == [opset]
    assert f"; ONNX IR {model.ir_version}, opset {opset}; checked" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--format", "onnx", "--opset", "13"),
            f"--opset 13: torch {torch.__version__} cannot write this network with that opset",
        ),
        (("--format", "onnx", "--opset", "0"), "--opset must be at least 1, got 0"),
        (("--format", "torch", "--opset", "18"), "--opset works only with --format onnx"),
    ],
)
def test_an_unsupported_opset_is_refused_in_one_line(
    small_run: Path, flags: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """For opset 13, torch's exporter writes opset 18 and logs a traceback. The command hides this traceback."""
    assert export.main([str(small_run), *flags]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert list(small_run.glob("*.onnx")) == []


class Unexportable(nn.Module):
    """A network whose control flow depends on the pixels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        pooled = images.mean(dim=(2, 3))
        return self.head(pooled if pooled.sum() > 0 else -pooled)


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_network_that_torch_cannot_export_is_reported_in_one_line(
    tmp_path: Path, format: str, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = ModelSpec(
        classes=("a", "b"),
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        image_size=32,
        architecture=f"{__name__}:{Unexportable.__name__}",
    )
    write_model(tmp_path, build_model(spec), spec)
    assert export.main([str(tmp_path), "--format", format]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: --format {format}: torch cannot export {spec.architecture}: ")
    assert {path.name for path in tmp_path.iterdir()} == {"model.json", "model.safetensors"}


def test_error_for_a_missing_package_says_how_to_install_it(
    small_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export.main([str(small_run), "--format", "onnx"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs onnxruntime; install with:" in line
    assert "-m pip install onnxruntime" in line
    assert not (small_run / "model.onnx").exists()


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_full_disk_is_reported_in_one_line(small_run: Path, format: str, capfd: pytest.CaptureFixture[str]) -> None:
    with file_size_limit(5000):
        assert export.main([str(small_run), "--format", format]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {small_run / export.EXPORTS[format]} cannot be written (File too large")
    assert {path.name for path in small_run.iterdir()} == {"model.json", "model.safetensors"}


def test_an_export_removes_the_old_folder_of_a_killed_export(small_run: Path) -> None:
    """A new folder may be in use by an export that runs at the same time. Other folders and links are the user's."""
    old, new = (Path(tempfile.mkdtemp(prefix=".export-", dir=small_run)) for _ in range(2))
    mine, link = small_run / ".export-my_notes", small_run / ".export-the_link"
    for file in (old / "model.onnx", old / ".model.pt2.0123", new / "model.pt2", mine / "notes.txt"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    link.symlink_to(mine)
    for folder in (old, mine):
        os.utime(folder, (0, 0))
    assert export.main([str(small_run), "--format", "torch"]) == 0
    assert {*small_run.glob(".export-*"), *mine.iterdir()} == {new, mine, link, mine / "notes.txt"}


def test_the_export_extra_lists_exactly_the_packages_that_an_onnx_export_needs() -> None:
    declared = tomllib.loads((Path(export.__file__).parents[1] / "pyproject.toml").read_text())
    extra = declared["project"]["optional-dependencies"]["export"]
    assert {line.split(">=")[0] for line in extra} == set(export.PACKAGES["onnx"])
    for name in export.PACKAGES["onnx"]:
        importlib.import_module(name)


def test_an_exported_file_whose_logits_differ_from_those_of_the_model_is_not_kept(
    small_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The logits differ as if the exporter had lost the normalization."""
    monkeypatch.setattr(export.NormalizingModel, "forward", lambda self, images: self.network(images / 255))
    (small_run / "model.pt2").write_text("an older export")
    assert export.main([str(small_run), "--format", "torch"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the exported model's logits are wrong by" in line
    assert (small_run / "model.pt2").read_text() == "an older export"
    assert list(small_run.glob(".export-*")) == []
