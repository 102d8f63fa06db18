#!/usr/bin/env bash
# Makes a kit: a folder for a machine that has Python and torch, but neither a network nor a compiler.
#   bash scripts/kit.sh OUT [FILE ...]
# OUT/wheels gets FFCV and the packages that such a machine usually lacks. The versions of these packages are those in
# constraints.txt. Each FILE, such as an archive of images, is copied to OUT. Run `make setup` first.
# Environment: TARGET, the other machine's Python version (default: that of .venv); PACKAGES, the packages to include
# besides FFCV.
# On the other machine, scripts/use_kit.sh makes .venv from the kit.
set -euo pipefail

stop() { echo "error: $*" >&2; exit 2; }

[[ $# -ge 1 ]] || stop "name the folder to make, as in bash scripts/kit.sh kit"
out=$(realpath -m -- "$1")
shift
export PIP_REQUIRE_HASHES=0 # FFCV is built from a folder, which has no hash
export PIP_CONSTRAINT=/dev/null # some containers name other versions in this variable or in pip's configuration file
unset CDPATH PIP_BUILD_CONSTRAINT
files=()
for file; do files+=("$(realpath -m -- "$file")"); done  # they may be relative to the current folder
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[[ -x $python ]] || stop "there is no .venv; run make setup first"
packages=${PACKAGES:-tyro typeguard docstring-parser simplejpeg xxhash pytest pytest-xdist execnet iniconfig pluggy}
target=${TARGET:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}

for name in $packages; do
  grep -q "^$name==" constraints.txt || stop "constraints.txt has no package $name; correct PACKAGES"
done

mkdir -p "$out/wheels"
rm -f "$out"/wheels/*.whl # of an older kit
machine=$(uname -m)
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
# Copies the entries of $packages from constraints.txt, with their hashes, to the requirements file.
awk -v names=" $packages " '/^[^ #]/ { keep = index(names, " " substr($1, 1, index($1, "==") - 1) " ") } keep' \
  constraints.txt >"$requirements"
"$python" -m pip --disable-pip-version-check --quiet download --no-deps --only-binary :all: --require-hashes \
  --python-version "$target" --platform "manylinux2014_$machine" --platform "manylinux_2_28_$machine" \
  --requirement "$requirements" --dest "$out/wheels"
bash scripts/ffcv/build.sh .venv "$out/wheels"
if [[ ${#files[@]} -gt 0 ]]; then cp "${files[@]}" "$out"; fi
echo "kit: $(du -sh "$out" | cut -f1) in $out for Python $target on $machine; next," \
  "on the other machine: bash scripts/use_kit.sh KIT"
