"""scripts/setup.sh with a recorder in the place of apt-get, pip and venv: what it asks for, when, and what it says.

That the real set-up works on a bare machine is shown by .ci/run on one, not here.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "dirname", "uname", "cat", "sha256sum", "rm", "mkdir", "cp", "awk", "env", "grep")
EVERYTHING = ("gcc", "g++", "pkg-config")

# A Python that is really one for what is asked of it, but only writes down what would change the machine.
RECORDING_PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  "-m venv") echo "venv $3 $4" >>"$CALLS"; mkdir -p .venv/bin
             cp "$0" .venv/bin/python; echo "$0" >.venv/made-by; echo "$PWD/.venv" >.venv/bin/activate ;;
  "-m pip") echo "pip ${*:3}" >>"$CALLS"; exit "${PIP_STATUS:-0}" ;;
  "-c import sys; print(sys._base_executable)"*) cat .venv/made-by ;;
  "-c import torch"*) echo imports >>"$CALLS" ;;
  "-c import ensurepip"* | "-c import os, sysconfig"*) exit "${HEADERS_STATUS:-0}" ;;
  *) exec REAL "$@" ;;
esac
"""


class Machine(NamedTuple):
    """A pretended machine: a project folder, and a PATH with nothing on it but what the test put there."""

    project: Path
    path: Path
    calls: Path

    def add(self, name: str, script: str) -> None:
        (self.path / name).write_text(script)
        (self.path / name).chmod(0o755)

    def set_up(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.project / "scripts" / "setup.sh")],
            env={"PATH": str(self.path), "CALLS": str(self.calls), **environment},
            text=True,
            capture_output=True,
            timeout=60,
        )

    def recorded(self) -> list[str]:
        """What was called since the last time this was asked."""
        lines = self.calls.read_text().splitlines()
        self.calls.write_text("")
        return lines


@pytest.fixture
def build_machine(tmp_path: Path) -> Callable[..., Machine]:
    def build(*present: str, user_id: int = 0, apt: bool = True) -> Machine:
        machine = Machine(tmp_path / "a project", tmp_path / "bin", tmp_path / "calls")
        for folder in (machine.project / "scripts", machine.path):
            folder.mkdir(parents=True)
        machine.calls.touch()
        for name in ("pyproject.toml", "constraints.txt", "scripts/setup.sh"):
            shutil.copy(REPOSITORY / name, machine.project / name)
        for tool in TOOLS:
            (machine.path / tool).symlink_to(shutil.which(tool) or pytest.fail(f"this machine has no {tool}"))
        for name in present:
            machine.add(name, "#!/usr/bin/env bash\n")
        machine.add("id", f"#!/usr/bin/env bash\necho {user_id}\n")
        machine.add("python3", RECORDING_PYTHON.replace("REAL", sys.executable))
        if apt:
            machine.add("apt-get", '#!/usr/bin/env bash\necho "apt-get $*" >>"$CALLS"\n')
        return machine

    return build


def test_first_call_does_all_second_call_nothing(build_machine: Callable[..., Machine]) -> None:
    machine = build_machine(*EVERYTHING)
    assert machine.set_up().returncode == 0
    calls = machine.recorded()
    assert [call.split()[0] for call in calls] == ["venv", "pip", "pip", "imports"]
    assert "-c constraints.txt" in calls[2]
    second = machine.set_up()
    assert (second.returncode, second.stdout, machine.recorded()) == (0, "setup: .venv is up to date\n", [])


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt", "scripts/setup.sh"])
def test_a_changed_requirement_is_installed(file: str, build_machine: Callable[..., Machine]) -> None:
    machine = build_machine(*EVERYTHING)
    machine.set_up()
    machine.recorded()
    with (machine.project / file).open("a") as stream:
        stream.write("# changed\n")
    assert machine.set_up().returncode == 0
    assert [call.split()[0] for call in machine.recorded()] == ["pip", "pip", "imports"]  # into the same .venv


def test_a_failed_install_is_tried_again(build_machine: Callable[..., Machine]) -> None:
    machine = build_machine(*EVERYTHING)
    assert machine.set_up(PIP_STATUS="7").returncode == 7
    assert machine.set_up().returncode == 0
    constraints = machine.project / "constraints.txt"
    text = constraints.read_text()
    constraints.write_text(text + "# changed\n")
    assert machine.set_up(PIP_STATUS="7").returncode == 7
    constraints.write_text(text)  # what is installed is unknown now, though this was installed once
    machine.recorded()
    assert machine.set_up().returncode == 0
    assert machine.recorded()[-1] == "imports"


def test_a_moved_project_is_set_up_anew(build_machine: Callable[..., Machine]) -> None:
    machine = build_machine(*EVERYTHING)
    machine.set_up()
    machine.recorded()
    moved = machine._replace(project=machine.project.rename(machine.project.parent / "moved"))
    assert moved.set_up().returncode == 0
    assert [call.split()[0] for call in moved.recorded()] == ["venv", "pip", "pip", "imports"]


def test_root_installs_what_is_missing_before_pip(build_machine: Callable[..., Machine]) -> None:
    machine = build_machine()
    assert machine.set_up(HEADERS_STATUS="1").returncode == 0
    update, install, *rest = machine.recorded()
    assert update.startswith("apt-get update")
    assert "--no-install-recommends g++ pkg-config libopencv-dev libturbojpeg0-dev python3." in install
    assert {"-venv", "-dev"} <= {word[len("python3.11") :] for word in install.split() if word.startswith("python3.")}
    assert rest[0].startswith("venv")


def test_passwordless_sudo_will_do(build_machine: Callable[..., Machine]) -> None:
    machine = build_machine(user_id=1000)
    machine.add("sudo", '#!/usr/bin/env bash\necho "sudo $*" >>"$CALLS"\n[[ $2 == true ]] || exec "${@:2}"\n')
    assert machine.set_up().returncode == 0
    calls = machine.recorded()
    assert calls[0] == "sudo -n true"
    assert sum(call.startswith("apt-get install") for call in calls) == 1


def test_an_ordinary_user_gets_one_line(build_machine: Callable[..., Machine]) -> None:
    machine = build_machine("gcc", "g++", user_id=1000)
    done = machine.set_up()
    assert done.returncode == 2
    assert done.stderr == (
        "error: missing system packages; install them as root with: "
        "apt-get install --no-install-recommends pkg-config libopencv-dev libturbojpeg0-dev\n"
    )
    assert machine.recorded() == []  # and gets it before anything long begins


def test_a_system_without_apt_gets_one_line(build_machine: Callable[..., Machine]) -> None:
    machine = build_machine("gcc", "g++", apt=False)
    done = machine.set_up()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "libopencv-dev" in done.stderr


@pytest.mark.parametrize("version", ["3.10", "3.14", ""])
def test_an_unfit_python_is_named(version: str, build_machine: Callable[..., Machine]) -> None:
    machine = build_machine(*EVERYTHING)
    machine.add("python3", f"#!/usr/bin/env bash\necho {version}\n")
    done = machine.set_up()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"python3 is {version or 'not there'}:" in done.stderr


def test_a_fit_python_is_found_beside_an_unfit_default(build_machine: Callable[..., Machine]) -> None:
    machine = build_machine(*EVERYTHING)
    machine.add("python3.12", (machine.path / "python3").read_text())
    machine.add("python3", "#!/usr/bin/env bash\necho 3.10\n")
    assert machine.set_up().returncode == 0
    asked = machine.set_up(PYTHON=str(machine.path / "python3"))  # but one that was named is taken at the word
    assert asked.returncode == 2


def test_an_interpreter_that_was_named_is_kept(build_machine: Callable[..., Machine]) -> None:
    """Also where the default is unfit."""
    machine = build_machine(*EVERYTHING)
    named = machine.path / "elsewhere python"
    machine.add(named.name, (machine.path / "python3").read_text())
    machine.add("python3", "#!/usr/bin/env bash\necho 3.10\n")
    assert machine.set_up(PYTHON=str(named)).returncode == 0
    machine.recorded()
    again = machine.set_up(PYTHON="python3")  # as the Makefile has it by default
    assert (again.returncode, again.stdout, machine.recorded()) == (0, "setup: .venv is up to date\n", [])


def test_ci_runs_make_test_with_real_images_only_where_they_are(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / ".ci").mkdir(parents=True)
    shutil.copy(REPOSITORY / ".ci" / "run", project / ".ci" / "run")
    (project / "Makefile").write_text("test:\n\t@ls $${CIFAR10_JPEG_ROOT:-/dev/null}\n")
    unwanted = ("CIFAR10_JPEG_ROOT", "MAKE", "MFLAGS")  # make sets the last two for its tests
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
