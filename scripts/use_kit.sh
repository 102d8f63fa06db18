#!/usr/bin/env bash
# Makes .venv from the packages of this machine and the wheels of a kit, which scripts/kit.sh made.
# This needs no network, compiler or root access:
#   bash scripts/use_kit.sh KIT
# PYTHON (default: python3) is the interpreter that has torch. The kit's packages take precedence over this machine's.
# Finally, the script runs doctor, which prints what is still missing. The exit status is that of doctor.
set -euo pipefail
kit=$(realpath -- "${1:-}" 2>/dev/null || true)  # KIT may be relative to the current folder
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stop() { echo "error: $*" >&2; exit 2; }

python=${PYTHON:-python3}
compgen -G "$kit/wheels/*.whl" >/dev/null || stop "name the folder that scripts/kit.sh made, got '${1:-}'"
[[ ! -e .venv ]] || stop ".venv exists already; remove it to make another from the kit"
torch=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").origin)' 2>/dev/null) ||
  stop "$python has no torch; set PYTHON to an interpreter that has it"

"$python" -m venv --without-pip .venv
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for wheel in "$kit"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$site"; done
# addsitedir adds the folder that has torch to sys.path, and processes the .pth files in it. If machine.pth contained
# only the path of that folder, those files would be ignored.
folder=$(dirname "$(dirname "$torch")")
"$python" -c 'import sys; print(f"import site; site.addsitedir({sys.argv[1]!r})")' "$folder" >"$site/machine.pth"
echo "$PWD" >"$site/project.pth"
# Writes the metadata of the project, as pip would. doctor reads the requirements from it.
"$python" - "$site" <<'END'
import pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
folder = pathlib.Path(sys.argv[1], f"ddp_trainer-{project['version']}.dist-info")
folder.mkdir()
required = [f"Requires-Dist: {one}" for one in project["dependencies"]]
(folder / "METADATA").write_text("\n".join([f"Name: {project['name']}", f"Version: {project['version']}", *required]) + "\n")
END
echo "use_kit: .venv is ready; checking it"
exec .venv/bin/python -m ddp_trainer.doctor
