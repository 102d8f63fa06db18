"""The installation is complete, --compile needs a C++ compiler, and the CI script runs the tests."""

import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

from packaging.requirements import Requirement

from tests.support.trainer import REPOSITORY, run


def test_constraints_satisfy_every_requirement() -> None:
    """pip installs with --no-deps, so a package that is missing from constraints.txt would not be installed."""
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (REPOSITORY / "constraints.txt").read_text(), flags=re.MULTILINE))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    ffcv = tomllib.loads((REPOSITORY / "scripts/ffcv/pyproject.toml").read_text())["project"]
    pinned[ffcv["name"]] = ffcv["version"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    required = [Requirement(line) for line in [*project["dependencies"], *extras, *ffcv["dependencies"]]]
    assert [str(one) for one in required if pinned.get(one.name, "") not in one.specifier] == []
    assert f"ffcv=={ffcv['version']} " in (REPOSITORY / "scripts/ffcv/source.txt").read_text()


def test_every_command_can_be_called_by_name() -> None:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert all(callable(EntryPoint(name, target, "console_scripts").load()) for name, target in scripts.items())


def test_torch_compile_without_a_compiler_is_refused_in_one_line(tiny_dir: Path, tmp_path: Path) -> None:
    finished = run(
        "ddp_trainer.train",
        "smoke",
        "--compile",
        "--data-dir",
        tiny_dir,
        "--out",
        tmp_path / "run",
        env={"CXX": "no-compiler"},
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: --compile needs a C++ compiler")
    assert finished.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_ci_runs_make_test_with_real_images_only_if_they_exist(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / ".ci").mkdir(parents=True)
    shutil.copy(REPOSITORY / ".ci" / "run", project / ".ci" / "run")
    (project / "Makefile").write_text("test:\n\t@ls $${CIFAR10_JPEG_ROOT:-/dev/null}\n")
    unwanted = ("CIFAR10_JPEG_ROOT", "MAKE", "MFLAGS")  # make sets the last two when it runs the tests
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}

    def run_ci() -> str:
        done = subprocess.run([project / ".ci" / "run"], env=environment, text=True, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "/dev/null" in run_ci()
    images = tmp_path / "cifar10-jpeg"
    for split in ("train", "test"):
        (images / split).mkdir(parents=True)
    (tmp_path / "shared" / "data").mkdir(parents=True)
    shutil.make_archive(str(tmp_path / "shared" / "data" / "cifar10-jpeg"), "xztar", tmp_path, "cifar10-jpeg")
    assert run_ci().split() == ["test", "train"]
