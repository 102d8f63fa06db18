#!/usr/bin/env bash
# Creates .venv and installs FFCV, this project, and the packages of constraints.txt.
# It needs Python with venv, but neither root nor a compiler. A second call changes nothing and takes a moment.
# `make setup` calls this script; the variable PYTHON names the interpreter to use.
# Exit status: 0 if .venv is ready; 2 if something is missing that this script cannot install (one line names it);
# otherwise the status of the command that failed.
set -euo pipefail
shopt -s globstar
unset CDPATH # with it, cd might change to another folder
cd -P "$(dirname "${BASH_SOURCE[0]}")/.." # -P: .venv contains this path, which must not depend on symbolic links

stamp=.venv/.setup-done
# Some clusters and containers set these variables. pip would then fail, or install to another folder. PIP_CONSTRAINT
# names an empty file and is not only unset, because pip's configuration file may also name constraints, which may
# contradict constraints.txt. The packages of constraints.txt are installed with --require-hashes, but a folder, such as
# that of this project, has no hash.
export PIP_USER=0 PIP_CONSTRAINT=/dev/null PIP_REQUIRE_HASHES=0
unset PIP_BUILD_CONSTRAINT PIP_TARGET PIP_PREFIX
unset PYTHONPATH # pip does not install a package that it finds there, so .venv would lack it

say() { echo "setup: $*"; }
stop() { echo "error: $*" >&2; exit 2; }

# Prints a version: 3.11, or 3.13t for a free-threaded build, which FFCV does not support.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2] + sys.abiflags)' 2>/dev/null || true; }
is_supported() { [[ $1 == 3.11 || $1 == 3.12 || $1 == 3.13 ]]; }

# Sets `python` and `version`. If PYTHON is set to anything but python3, only that interpreter is tried. Otherwise,
# these are tried in order, and the first supported one is used: the interpreter that created .venv, python3,
# python3.12, python3.13, python3.11. The first of them may have been chosen with PYTHON in an earlier call.
find_python() {
  local wanted=${PYTHON:-python3} candidate candidates present
  candidates=("$wanted")
  if [[ $wanted == python3 ]]; then
    present=$(.venv/bin/python -c 'import sys; print(sys._base_executable)' 2>/dev/null || true)
    candidates=(${present:+"$present"} python3 python3.12 python3.13 python3.11)
  fi
  for candidate in "${candidates[@]}"; do
    python=$candidate version=$(version_of "$candidate")
    if is_supported "$version"; then return; fi
  done
  version=$(version_of "$wanted")
  stop "Python 3.11, 3.12 or 3.13 is needed, and $wanted is ${version:-not there}:" \
    "install one and name it, as in make setup PYTHON=python3.12"
}

# Prints a hash of everything that the set-up depends on. If the hash changes, the set-up runs again.
fingerprint() {
  local LC_ALL=C # the order of the files must not depend on the locale
  { cat pyproject.toml constraints.txt scripts/setup.sh scripts/ffcv/**/*.* scripts/ffcv/bin/*; echo "$PWD $version"; } | sha256sum
}

# Only one set-up may change .venv at a time. The lock on descriptor 9 ends with this process. There is no lock if
# `flock` is missing or the file system does not support locks.
wait_for_other_setups() {
  local status=0
  flock --nonblock --conflict-exit-code 75 9 2>/dev/null || status=$?
  if [[ $status == 75 ]]; then
    say "waiting for another set-up of this folder"
    flock 9
  fi
}

# On Debian and Ubuntu, ensurepip, which venv needs, is a separate package.
check_venv() {
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    stop "$python cannot make virtual environments; as root, run: apt-get install python$version-venv"
}

# Downloads only files with a known hash. constraints.txt is complete, so pip never has to look for dependencies.
install() {
  local pip=(.venv/bin/python -m pip --disable-pip-version-check)
  # A virtual environment contains its own path, so it has to be created again after it was moved or copied. It lacks
  # pip if the system's Python was replaced by a newer version.
  if [[ $(version_of .venv/bin/python) != "$version" ]] || ! grep -qsF "$PWD/.venv" .venv/bin/activate ||
    ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    say "making .venv with Python $version"
    "$python" -m venv --clear .venv
  fi
  say "installing the Python packages (6.5 GB with torch and its CUDA libraries: 2-3 minutes, or more on a slow connection)"
  "${pip[@]}" install --require-hashes --only-binary :all: --no-deps --requirement constraints.txt
  say "building FFCV"
  bash scripts/ffcv/build.sh .venv
  "${pip[@]}" install -qq --no-deps --no-build-isolation --editable .
  say "checking that torch and ffcv can be imported"
  .venv/bin/python -c 'import torch, torchvision, ffcv, accelerate'
}

[[ $(uname -s) == Linux ]] || stop "FFCV runs on Linux only, and this is $(uname -s): use a Linux machine or container"
{ exec 9<>pyproject.toml; } 2>/dev/null || exec 9<pyproject.toml # NFS locks only files that are open for writing
wait_for_other_setups
find_python
if [[ -f $stamp && $(<"$stamp") == "$(fingerprint)" && $(version_of .venv/bin/python) == "$version" ]]; then
  say ".venv is up to date"
  exit 0
fi
rm -f "$stamp"
check_venv
install
fingerprint >"$stamp"
say "done; .venv/bin has python and accelerate"
