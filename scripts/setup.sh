#!/usr/bin/env bash
# Makes .venv ready: system libraries for FFCV, a virtual environment, the package with the pinned versions.
# A second call changes nothing and takes a moment. Called by `make setup`; PYTHON names the interpreter.
# Exit status: 0 ready; 2 something is missing that only the user can provide, named in one line; else the failed command's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=dev,export,tensorboard
stamp=.venv/.setup-done

say() { echo "setup: $*"; }
stop() { echo "error: $*" >&2; exit 2; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
is_supported() { [[ $1 == 3.11 || $1 == 3.12 || $1 == 3.13 ]]; }

# The interpreter asked for. Without one: that of .venv, which somebody may have chosen, else the default or, where that is
# of another version, one that Debian and Ubuntu name by version.
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

# What the set-up depends on: when any of it changes, the set-up runs again.
fingerprint() {
  { cat pyproject.toml constraints.txt scripts/setup.sh; echo "$PWD $version"; } | sha256sum
}

# The Debian packages whose content is not there. FFCV comes as source: it asks pkg-config for both libraries.
missing_packages() {
  command -v gcc >/dev/null && command -v g++ >/dev/null || echo g++
  command -v pkg-config >/dev/null || echo pkg-config
  pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
  pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
  "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "python$version-venv"
  "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
    echo "python$version-dev"
}

install_system_packages() {
  local packages become=()
  mapfile -t packages < <(missing_packages)
  if ((${#packages[@]} == 0)); then return; fi
  local command=(apt-get install --no-install-recommends "${packages[@]}")
  command -v apt-get >/dev/null ||
    stop "missing system packages, by their Debian names: ${packages[*]}; install what your system calls them"
  if (($(id -u) != 0)); then
    if ! sudo -n true 2>/dev/null; then stop "missing system packages; install them as root with: ${command[*]}"; fi
    become=(sudo -n)
  fi
  say "installing ${packages[*]} with apt-get (half a minute)"
  "${become[@]}" apt-get update -qq
  "${become[@]}" env DEBIAN_FRONTEND=noninteractive "${command[@]}" -y -qq -o Dpkg::Use-Pty=0 | show_progress
}

# One line for every 250 that arrive: a sign of life in a log that is still read afterwards.
show_progress() { awk 'NR % 250 == 0 { print "setup:   " NR " steps done"; fflush() }'; }

install_python_packages() {
  # A virtual environment holds its own path: one that was moved or copied has to be made anew.
  if [[ $(version_of .venv/bin/python) != "$version" ]] || ! grep -qsF "$PWD/.venv" .venv/bin/activate; then
    say "making .venv with Python $version"
    "$python" -m venv --clear .venv
  fi
  say "installing the Python packages (5.7 GB with torch and its CUDA libraries: 2-3 minutes and more on a slow line)"
  .venv/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt pip
  .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt --editable ".[$extras]"
  say "importing torch and ffcv once"
  .venv/bin/python -c 'import torch, torchvision, ffcv, accelerate'
}

[[ $(uname -s) == Linux ]] || stop "FFCV runs on Linux only, and this is $(uname -s): use a Linux machine or container"
find_python
if [[ -f $stamp && $(<"$stamp") == "$(fingerprint)" && $(version_of .venv/bin/python) == "$version" ]]; then
  say ".venv is up to date"
  exit 0
fi
rm -f "$stamp"
install_system_packages
install_python_packages
fingerprint >"$stamp"
say "done; .venv/bin holds python and accelerate"
