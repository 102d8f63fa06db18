"""The arrows of the house hold, and importing a module does nothing."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("data_prep", "ddp_trainer")
MODULES = sorted(file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py"))
SOURCES = sorted(
    [
        *MODULES,
        *(REPOSITORY / "benchmarks").rglob("*.py"),
        *(REPOSITORY / "slurm").glob("*.py"),
        *(REPOSITORY / "tests").rglob("*.py"),
    ]
)
MAX_LINES = 250
MAX_PARAMETERS = 6


def name_of(file: Path) -> str:
    """data_prep/order.py, whatever the machine."""
    return file.relative_to(REPOSITORY).as_posix()


def imports_of(file: Path) -> set[str]:
    """Dotted names of all that `file` imports, inside functions too: `from a.b import c` gives a.b and a.b.c."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno}: imports are absolute here"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def importers_of(package: str) -> set[str]:
    """The modules of both packages that import `package` or something in it."""
    return {
        name_of(file)
        for file in MODULES
        if any(name == package or name.startswith(package + ".") for name in imports_of(file))
    }


def functions_of(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_both_packages_are_here() -> None:
    assert {file.relative_to(REPOSITORY).parts[0] for file in MODULES} == set(PACKAGES)


def test_pixels_know_nothing_of_learning() -> None:
    assert not {name for name in importers_of("ddp_trainer") if name.startswith("data_prep/")}


@pytest.mark.parametrize("outsider", ["benchmarks", "tests", "conftest", "pytest"])
def test_packages_do_not_lean_on_what_is_around_them(outsider: str) -> None:
    assert importers_of(outsider) == set()


def test_one_file_sees_the_accelerator() -> None:
    assert importers_of("accelerate.Accelerator") == {"ddp_trainer/distributed/runtime.py"}


def test_one_file_knows_wandb() -> None:
    assert importers_of("wandb") <= {"ddp_trainer/tracking/wandb_mirror.py"}


def test_only_data_prep_knows_ffcv() -> None:
    assert {name.split("/")[0] for name in importers_of("ffcv")} == {"data_prep"}


def test_backward_is_called_from_the_engine_only() -> None:
    """Through the runtime, which hands it to Accelerate. The model does it once, without data, to count operations."""
    callers = {
        name_of(file)
        for file in MODULES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward"
    }
    assert callers == {
        "ddp_trainer/engine/trainer.py",
        "ddp_trainer/distributed/runtime.py",
        "ddp_trainer/models/custom_resnet.py",
    }


def test_nothing_of_ours_unpickles() -> None:
    """Tensors load with weights_only=True, arrays without pickles. One file reads the pickles of CIFAR, arrays only."""
    for file in MODULES:
        if name_of(file) == "data_prep/sources/array_pickle.py":
            continue
        assert not imports_of(file) & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, name_of(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if (owner, node.func.attr) == ("torch", "load"):
                assert options.get("weights_only") == "True", f"{name_of(file)}:{node.lineno}"
            if (owner, node.func.attr) == ("np", "load"):
                assert options.get("allow_pickle", "False") == "False", f"{name_of(file)}:{node.lineno}"


@pytest.mark.parametrize("module", ["model", "optim", "muon", "metrics"])
def test_leaves_import_torch_and_little_else(module: str) -> None:
    """Of ours only the configuration, the error that a user's mistake is reported with, and an optimizer."""
    allowed = {"ddp_trainer.config", "data_prep.errors", "ddp_trainer.engine.muon"}
    roots = {*sys.stdlib_module_names, "torch", "safetensors"}
    strangers = {
        name
        for name in imports_of(REPOSITORY / "ddp_trainer" / f"{module}.py")
        if name.split(".")[0] not in roots and name not in allowed and name.rpartition(".")[0] not in allowed
    }
    assert strangers == set()


def test_the_report_needs_neither_device_nor_tracker() -> None:
    files = [file for file in MODULES if name_of(file).startswith("ddp_trainer/report")]
    assert files
    for file in files:
        assert not {name.split(".")[0] for name in imports_of(file)} & {"accelerate", "ffcv", "torchvision", "wandb"}
        attributes = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert "cuda" not in attributes, name_of(file)


IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys, threading
import torch
before = {"threads": torch.get_num_threads(), "seed": torch.initial_seed()}
names = []
for package in PACKAGES:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        names.append(module.name)
        importlib.import_module(module.name)
print(json.dumps({
    "names": names,
    "loaded": sorted(sys.modules),
    "alive": threading.active_count(),
    "before": before,
    "after": {"threads": torch.get_num_threads(), "seed": torch.initial_seed()},
    "cuda": torch.cuda.is_initialized(),
    "joined": torch.distributed.is_initialized(),
}))
"""


def test_importing_does_nothing(tmp_path: Path) -> None:
    """No heavy library loaded, nothing printed, written, started or set."""
    code = IMPORT_EVERYTHING.replace("PACKAGES", repr(PACKAGES))
    found = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=found, text=True, capture_output=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    seen = json.loads(done.stdout)  # nothing else was printed
    assert set(seen["names"]) >= {"data_prep.__main__", "ddp_trainer.train", "ddp_trainer.tracking.tracker"}
    heavy = {"ffcv", "numba", "cv2", "wandb", "matplotlib", "torchvision", "tensorboard"}
    assert heavy.isdisjoint(name.split(".")[0] for name in seen["loaded"])
    assert seen["after"] == seen["before"]
    assert (seen["alive"], seen["cuda"], seen["joined"]) == (1, False, False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["ddp_trainer.train", "ddp_trainer.sweep", "ddp_trainer.report", "slurm.preflight"])
def test_a_wrong_command_line_is_refused_before_torch_is_imported(module: str, tmp_path: Path) -> None:
    """Torch takes seconds."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    found = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    done = subprocess.run(
        [sys.executable, "-m", module, "nothing-of-this-name"], env=found, text=True, capture_output=True, timeout=60
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "nothing-of-this-name" in done.stderr


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_a_file_says_what_it_is_and_stays_small(file: Path) -> None:
    text = file.read_text()
    assert ast.get_docstring(ast.parse(text)), "the first docstring says what is owned here"
    assert len(text.splitlines()) <= MAX_LINES, "a concern in it wants a room of its own"
    assert file.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_functions_take_few_parameters(file: Path) -> None:
    def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
        arguments = function.args
        return [
            argument.arg
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            if argument.arg not in {"self", "cls"}
        ]

    assert not {
        function.name: parameters(function)
        for function in functions_of(file)
        if len(parameters(function)) > MAX_PARAMETERS
    }
