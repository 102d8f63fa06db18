"""scripts/kit.sh makes a kit (a folder of packages). use_kit.sh makes .venv from it and the machine's packages.

Here, kit.sh calls fake commands that record their arguments, so no wheel is downloaded and FFCV is not compiled.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.trainer import REPOSITORY

RECORD = '#!/usr/bin/env bash\necho "${0##*/} $*" >>"$CALLS"\n'
# Copies the requirements file, because kit.sh removes it.
KEEP_REQUIREMENTS = 'while [[ $# -gt 0 ]]; do [[ $1 == --requirement ]] && cp "$2" "$CALLS.txt"; shift; done\n'
DOCTOR = "import sys, tyro, torch\nprint('tyro', tyro.origin)\nsys.exit(3)\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(REPOSITORY / "scripts", folder / "scripts")
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


def call(project: Path, script: str, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(project / "scripts" / script), *map(str, arguments)]
    environment = {**os.environ, "CALLS": str(project / "calls"), **variables}
    return subprocess.run(command, cwd=project.parent, env=environment, text=True, capture_output=True, timeout=60)


def test_kit_has_the_given_files_and_the_wheels_for_the_target_python(project: Path, tmp_path: Path) -> None:
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(RECORD + KEEP_REQUIREMENTS)
    python.chmod(0o755)
    (project / "scripts" / "ffcv" / "build.sh").write_text(RECORD)
    (tmp_path / "photos.tar").write_text("photos")
    kit = tmp_path / "a kit"
    finished = call(project, "kit.sh", "a kit", "photos.tar", TARGET="3.12", PACKAGES="tyro typeguard")
    assert finished.returncode == 0, finished.stderr
    download, build = (project / "calls").read_text().splitlines()
    assert "--require-hashes --python-version 3.12" in download
    assert build == f"build.sh .venv {kit}/wheels"
    requirements = (project / "calls.txt").read_text()
    assert [line.split("==")[0] for line in requirements.splitlines() if line[0] != " "] == ["typeguard", "tyro"]
    assert requirements.count("--hash=sha256:") >= 2
    assert (kit / "photos.tar").read_text() == "photos"


def test_packages_of_the_kit_take_precedence_over_those_of_the_machine(project: Path, tmp_path: Path) -> None:
    (project / "ddp_trainer").mkdir()
    (project / "ddp_trainer" / "doctor.py").write_text(DOCTOR)
    (tmp_path / "kit" / "wheels").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "kit" / "wheels" / "tyro-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tyro/__init__.py", "origin = 'kit'")
    with zipfile.ZipFile(tmp_path / "kit" / "wheels" / "accelerate-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("accelerate/__init__.py", "")
        wheel.writestr("accelerate/commands/__init__.py", "")
        wheel.writestr("accelerate/commands/accelerate_cli.py", "import sys\ndef main(): return print(sys.argv[1:])")
    finished = call(project, "use_kit.sh", "kit", PYTHON=sys.executable)
    assert (finished.returncode, finished.stderr) == (3, ""), "the exit status is not that of doctor"
    assert finished.stdout.splitlines()[-1] == "tyro kit"
    launcher = subprocess.run([project / ".venv/bin/accelerate", "launch", "a b"], text=True, capture_output=True)
    assert launcher.stdout == "['launch', 'a b']\n", launcher.stderr
    again = call(project, "use_kit.sh", "kit", PYTHON=sys.executable)
    assert (again.returncode, again.stderr) == (
        2,
        "error: .venv exists already; remove it to make another from the kit\n",
    )


def test_kit_for_another_python_is_refused(project: Path, tmp_path: Path) -> None:
    (tmp_path / "kit" / "wheels").mkdir(parents=True)
    for name in ("any-1-py3-none-any", "stable-1-cp39-abi3-linux", "xxhash-1-cp39-cp39-linux"):
        (tmp_path / "kit" / "wheels" / f"{name}.whl").touch()
    finished = call(project, "use_kit.sh", "kit", PYTHON=sys.executable)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    line = f"error: the kit is not for Python {version}: it has xxhash-1-cp39-cp39-linux.whl; make it again: "
    assert (finished.returncode, finished.stderr) == (2, f"{line}TARGET={version} bash scripts/kit.sh KIT\n")
    assert not (project / ".venv").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("kit.sh", [], "name the folder to make"),
        ("kit.sh", ["kit"], "run make setup first"),
        ("use_kit.sh", [], "name the folder that scripts/kit.sh made"),
        ("use_kit.sh", ["nothing"], "name the folder that scripts/kit.sh made, got 'nothing'"),
    ],
)
def test_invalid_arguments_or_a_missing_venv_are_refused_in_one_line(
    project: Path, script: str, arguments: list[str], message: str
) -> None:
    finished = call(project, script, *arguments)
    assert finished.returncode == 2
    assert message in finished.stderr
    assert len(finished.stderr.splitlines()) == 1
