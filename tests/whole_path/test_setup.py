"""scripts/setup.sh makes the right calls and prints the right messages. pip, venv and the FFCV build are faked.

These tests do not run the real set-up; .ci/run does, on a bare machine.
"""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.trainer import REPOSITORY

TOOLS = ("bash", "dirname", "uname", "cat", "sha256sum", "rm", "mkdir", "cp", "env", "grep")
STEPS = ["venv", "pip", "ffcv", "pip", "imports"]
STEPS_IN_EXISTING_VENV = STEPS[1:]

# A Python that answers queries like the real one. Commands that would change the machine are recorded, but not run.
RECORDING_PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  "-m venv") echo "venv $3 $4" >>"$CALLS"; mkdir -p .venv/bin
             cp "$0" .venv/bin/python; echo "$0" >.venv/made-by; echo "$(pwd -P)/.venv" >.venv/bin/activate ;;
  "-m pip") echo "pip ${*:3}" >>"$CALLS"; exit "${PIP_STATUS:-0}" ;;
  "-c import pip") ;;
  "-c import sys; print(sys._base_executable)"*) cat .venv/made-by ;;
  "-c import torch"*) echo imports >>"$CALLS" ;;
  "-c import ensurepip"*) exit "${VENV_STATUS:-0}" ;;
  *) exec REAL "$@" ;;
esac
"""


class Machine(NamedTuple):
    """An emulated machine: a project folder, and a PATH with only the programs that the test adds."""

    project: Path
    path: Path
    calls: Path

    def add(self, name: str, script: str) -> None:
        (self.path / name).write_text(script)
        (self.path / name).chmod(0o755)

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "scripts/setup.sh"],
            cwd=self.project,
            env={"PATH": str(self.path), "CALLS": str(self.calls), "PWD": str(self.project), **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def set_up(self, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(**environment)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def recorded(self) -> list[str]:
        """Returns the calls that were recorded since this method was last called."""
        lines = self.calls.read_text().splitlines()
        self.calls.write_text("")
        return lines

    def recorded_steps(self) -> list[str]:
        return [call.split()[0] for call in self.recorded()]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine with Python and coreutils, but without a compiler, apt-get or sudo."""
    machine = Machine(tmp_path / "a project", tmp_path / "bin", tmp_path / "calls")
    machine.path.mkdir()
    machine.calls.touch()
    shutil.copytree(REPOSITORY / "scripts", machine.project / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, machine.project)
    (machine.project / "scripts/ffcv/build.sh").write_text('#!/usr/bin/env bash\necho "ffcv $*" >>"$CALLS"\n')
    for tool in TOOLS:
        (machine.path / tool).symlink_to(shutil.which(tool) or pytest.fail(f"this machine has no {tool}"))
    machine.add("python3", RECORDING_PYTHON.replace("REAL", sys.executable))
    return machine


def test_first_call_installs_everything_and_second_call_nothing(machine: Machine) -> None:
    first = machine.set_up()
    assert first.returncode == 0, first.stderr
    calls = machine.recorded()
    assert [call.split()[0] for call in calls] == STEPS
    assert "--require-hashes" in calls[1]
    assert all("--no-deps" in call for call in calls if call.startswith("pip"))
    second = machine.set_up()
    assert (second.returncode, second.stdout, machine.recorded()) == (0, "setup: .venv is up to date\n", [])


@pytest.mark.parametrize(
    "file",
    ["pyproject.toml", "constraints.txt", "scripts/setup.sh", "scripts/ffcv/build.sh", "scripts/ffcv/source.txt"],
)
def test_a_changed_requirement_or_build_script_causes_an_installation(file: str, machine: Machine) -> None:
    machine.set_up()
    machine.recorded()
    with (machine.project / file).open("a") as stream:
        stream.write("# changed\n")
    assert machine.set_up().returncode == 0
    assert machine.recorded_steps() == STEPS_IN_EXISTING_VENV


def test_a_failed_install_is_tried_again(machine: Machine) -> None:
    assert machine.set_up(PIP_STATUS="7").returncode == 7
    assert machine.set_up().returncode == 0
    constraints = machine.project / "constraints.txt"
    text = constraints.read_text()
    constraints.write_text(text + "# changed\n")
    assert machine.set_up(PIP_STATUS="7").returncode == 7
    constraints.write_text(text)  # these versions were installed before, but the failed call may have changed packages
    machine.recorded()
    assert machine.set_up().returncode == 0
    assert machine.recorded_steps()[-1] == "imports"


def test_a_moved_project_gets_a_new_venv(machine: Machine) -> None:
    machine.set_up()
    machine.recorded()
    moved = machine._replace(project=machine.project.rename(machine.project.parent / "moved"))
    assert moved.set_up().returncode == 0
    assert moved.recorded_steps() == STEPS


def test_neither_a_symbolic_link_nor_the_locale_nor_cdpath_causes_an_installation(machine: Machine) -> None:
    machine.set_up()
    machine.recorded()
    (machine.project.parent / "link").symlink_to(machine.project)
    linked = machine._replace(project=machine.project.parent / "link")
    elsewhere = machine.project.parent / "elsewhere"
    (elsewhere / "scripts").mkdir(parents=True)
    for call in (linked.set_up(), machine.set_up(LC_ALL="en_US.UTF-8"), machine.set_up(CDPATH=str(elsewhere))):
        assert (call.returncode, call.stdout, machine.recorded()) == (0, "setup: .venv is up to date\n", [])


def test_a_venv_without_pip_is_made_again(machine: Machine) -> None:
    """The system's Python was replaced by a newer version, which does not see the packages of the older one."""
    machine.set_up()
    (machine.project / ".venv/.setup-done").unlink()
    machine.recorded()
    without = RECORDING_PYTHON.replace('"-c import pip") ;;', '"-c import pip") exit 1 ;;')
    (machine.project / ".venv/bin/python").write_text(without.replace("REAL", sys.executable))
    assert machine.set_up().returncode == 0
    assert machine.recorded_steps() == STEPS


def test_a_second_set_up_waits_for_the_first(machine: Machine) -> None:
    (machine.path / "flock").symlink_to(shutil.which("flock") or pytest.skip("needs flock"))
    with (machine.project / "pyproject.toml").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = machine.start()
        assert second.stdout is not None
        assert second.stdout.readline() == "setup: waiting for another set-up of this folder\n"
        assert machine.recorded() == []
    second.communicate(timeout=60)
    assert second.returncode == 0
    assert machine.recorded_steps() == STEPS


def test_error_for_a_python_without_venv_names_the_missing_package(machine: Machine) -> None:
    finished = machine.set_up(VENV_STATUS="1")
    package = f"python3.{sys.version_info.minor}-venv"
    assert (finished.returncode, machine.recorded()) == (2, [])
    assert finished.stderr == (
        f"error: python3 cannot make virtual environments; as root, run: apt-get install {package}\n"
    )


@pytest.mark.parametrize("version", ["3.10", "3.13t", "3.14", ""])
def test_error_names_an_unsupported_python(version: str, machine: Machine) -> None:
    machine.add("python3", f"#!/usr/bin/env bash\necho {version}\n")
    done = machine.set_up()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"python3 is {version or 'not there'}:" in done.stderr


def test_a_supported_python_is_found_if_the_default_is_not_supported(machine: Machine) -> None:
    machine.add("python3.12", (machine.path / "python3").read_text())
    machine.add("python3", "#!/usr/bin/env bash\necho 3.10\n")
    assert machine.set_up().returncode == 0
    asked = machine.set_up(PYTHON=str(machine.path / "python3"))  # a named interpreter is never replaced
    assert asked.returncode == 2


def test_an_interpreter_that_the_user_named_once_is_kept(machine: Machine) -> None:
    """A later call that names no interpreter succeeds, although the default one is not supported."""
    named = machine.path / "elsewhere python"
    machine.add(named.name, (machine.path / "python3").read_text())
    machine.add("python3", "#!/usr/bin/env bash\necho 3.10\n")
    assert machine.set_up(PYTHON=str(named)).returncode == 0
    machine.recorded()
    again = machine.set_up(PYTHON="python3")  # what the Makefile passes by default
    assert (again.returncode, again.stdout, machine.recorded()) == (0, "setup: .venv is up to date\n", [])
