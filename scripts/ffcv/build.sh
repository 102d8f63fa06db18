#!/usr/bin/env bash
# Builds FFCV 1.0.2 from its source and installs it into a virtual environment, or writes a wheel to a folder instead:
#   bash scripts/ffcv/build.sh VENV [FOLDER]
#
# FFCV's setup.py requires OpenCV, TurboJPEG and pkg-config, which only root can install. FFCV's C++ library (150 lines)
# uses OpenCV to resize images and TurboJPEG to decode JPEG. Through FFCV, this project reads only raw images, which
# need neither. So the library is compiled with the headers in include/, which replace OpenCV and TurboJPEG. A library
# built this way prints one line and ends the process if it is asked to resize an image or decode a JPEG. These headers
# are used even if the real libraries are installed, so that every machine runs the same build.
# The script uses the machine's C++ compiler if there is one; this takes seconds. Otherwise, it downloads ziglang, a
# compiler in a wheel of 100 MB, and removes it after the build.
set -euo pipefail
unset CDPATH # with it, cd might change to another folder
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$(cd "$1" && pwd)
work=$(mktemp -d "$venv/ffcv-XXXXXX") # not in /tmp, where some clusters forbid running programs
trap 'rm -rf "$work"' EXIT

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

# pip runs setup.py to read the metadata of an archive, and setup.py runs pkg-config; bin/ has a replacement for it.
fetch_source() {
  PATH=$here/bin:$PATH pip download --no-deps --no-build-isolation --no-binary ffcv --require-hashes \
    --requirement "$here/source.txt" --dest "$work"
  tar -xzf "$work"/ffcv-*.tar.gz -C "$work" --strip-components 1
}

can_compile() { echo '#include <pthread.h>' | "$1" -x c++ -shared -fPIC -o "$work/probe.so" - 2>/dev/null; }

# Sets the arrays `compile` and `link`, each a command with its options. The C library is not linked, because Python
# has already loaded it. If it were linked, a kit could not be used on a machine with an older C library.
find_compiler() {
  local candidate
  for candidate in ${CXX:+"$CXX"} g++ clang++; do
    if can_compile "$candidate"; then compile=("$candidate") link=("$candidate" -nostdlib); return; fi
  done
  echo "setup: found no C++ compiler; downloading ziglang for this build (100 MB)"
  pip install --no-deps --only-binary :all: --require-hashes --requirement "$here/compiler.txt" --target "$work/zig"
  export ZIG_GLOBAL_CACHE_DIR=$work/zig-cache ZIG_LOCAL_CACHE_DIR=$work/zig-cache
  local zig=$work/zig/ziglang/zig target
  target=$(uname -m)-linux-gnu # for any CPU of this architecture; by default, zig compiles for the CPU of this machine
  compile=("$zig" c++ -target "$target")
  link=("$zig" cc -target "$target" -nostdlib) # otherwise, zig would take a minute to build a stub of the C library
}

fetch_source
find_compiler
"${compile[@]}" -std=c++17 -O2 -fPIC -fno-exceptions -fno-rtti -w -I "$here/include" \
  -c "$work/libffcv/libffcv.cpp" -o "$work/libffcv.o"
"${link[@]}" -shared "$work/libffcv.o" -o "$work/ffcv/_libffcv.abi3.so"
cp "$work/libffcv/libffcv.cpp" "$work/ffcv/" # a test compiles it again with the real libraries

# pyproject.toml replaces setup.py, which would compile again and requires a package that needs the system's libGL.
# FFCV's benchmarks are removed, because they import three packages that nothing else needs.
rm -r "$work"/{setup.py,setup.cfg,ffcv.egg-info,ffcv/benchmarks}
cp "$here/pyproject.toml" "$work/"
if [[ $# -gt 1 ]]; then
  pip wheel --no-deps --no-build-isolation --wheel-dir "$2" "$work"
else
  pip install --no-deps --no-build-isolation --force-reinstall "$work"
fi
