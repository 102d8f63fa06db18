#!/usr/bin/env bash
# Builds FFCV 1.0.2 from its source and installs it into the virtual environment named by the first argument.
#
# FFCV's own setup.py needs OpenCV, TurboJPEG and pkg-config, which only root can install. Its library of 150 lines calls
# OpenCV to resize and TurboJPEG to decode JPEG; raw images, the only ones this project stores, need neither. So it is
# compiled against the headers in include/, which declare those calls and end the program with a one-line message if one
# is ever made. The headers are used even if the real libraries are installed, so that every machine runs the same build.
# If there is a C++ compiler, it is used (seconds). Otherwise ziglang, a compiler in a wheel of 100 MB, is downloaded for
# the build and removed again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$(cd "$1" && pwd)
work=$(mktemp -d "$venv/ffcv-XXXXXX") # not in /tmp, where some clusters do not let programs run
trap 'rm -rf "$work"' EXIT

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

# pip runs setup.py to read the metadata of a source archive, and setup.py runs pkg-config: bin/ holds one without answers.
fetch_source() {
  PATH=$here/bin:$PATH pip download --no-deps --no-build-isolation --no-binary ffcv --require-hashes \
    --requirement "$here/source.txt" --dest "$work"
  tar -xzf "$work"/ffcv-*.tar.gz -C "$work" --strip-components 1
}

can_compile() { echo '#include <pthread.h>' | "$1" -x c++ -shared -fPIC -o "$work/probe.so" - 2>/dev/null; }

# Sets `compile` and `link`, each a command and its options.
find_compiler() {
  local candidate
  for candidate in ${CXX:+"$CXX"} g++ clang++; do
    if can_compile "$candidate"; then compile=("$candidate") link=("$candidate"); return; fi
  done
  echo "setup: no C++ compiler here, so ziglang is fetched for this build (100 MB)"
  pip install --no-deps --only-binary :all: --require-hashes --requirement "$here/compiler.txt" --target "$work/zig"
  export ZIG_GLOBAL_CACHE_DIR=$work/zig-cache ZIG_LOCAL_CACHE_DIR=$work/zig-cache
  local zig=$work/zig/ziglang/zig target
  target=$(uname -m)-linux-gnu # the architecture's baseline: by default zig compiles for exactly this CPU
  compile=("$zig" c++ -target "$target")
  # Python has the C library loaded already; to link it, zig would first build a stand-in for it, which takes a minute.
  link=("$zig" cc -target "$target" -nostdlib)
}

fetch_source
find_compiler
"${compile[@]}" -std=c++17 -O2 -fPIC -fno-exceptions -fno-rtti -w -I "$here/include" \
  -c "$work/libffcv/libffcv.cpp" -o "$work/libffcv.o"
"${link[@]}" -shared "$work/libffcv.o" -o "$work/ffcv/_libffcv.abi3.so"
cp "$work/libffcv/libffcv.cpp" "$work/ffcv/" # the tests compile it again, against the real libraries

# pyproject.toml takes the place of setup.py, which would compile and asks for a package that needs the system's libGL.
# FFCV's benchmarks are removed, and so are three dependencies that only they import.
rm -r "$work"/{setup.py,setup.cfg,ffcv.egg-info,ffcv/benchmarks}
cp "$here/pyproject.toml" "$work/"
pip install --no-deps --no-build-isolation --force-reinstall "$work"
