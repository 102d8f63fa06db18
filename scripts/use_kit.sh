#!/usr/bin/env bash
# Makes .venv from the packages of this machine and the wheels of a kit, a folder that scripts/kit.sh made.
# This needs no network, compiler or root access:
#   bash scripts/use_kit.sh KIT
# PYTHON (default: python3) is the interpreter that has torch. The kit's packages take precedence over this machine's,
# except over those in PYTHONPATH.
# Finally, the script runs doctor, which prints what is still missing. The exit status is that of doctor.
set -euo pipefail
unset CDPATH # with it, cd might change to another folder
kit=$(realpath -- "${1:-}" 2>/dev/null || true)  # KIT may be relative to the current folder
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stop() { echo "error: $*" >&2; exit 2; }

python=${PYTHON:-python3}
compgen -G "$kit/wheels/*.whl" >/dev/null || stop "name the folder that scripts/kit.sh made, got '${1:-}'"
[[ ! -e .venv ]] || stop ".venv exists already; remove it to make another from the kit"
torch=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").origin)' 2>/dev/null) ||
  stop "$python has no torch; set PYTHON to an interpreter that has it"

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[[ $version =~ ^3\.1[123]$ ]] || stop "$python is Python $version; set PYTHON to Python 3.11, 3.12 or 3.13"
for wheel in "$kit"/wheels/*-cp3*-cp3*-*.whl; do
  [[ ! -e $wheel || ${wheel##*/} == *-cp"${version/./}"-* ]] ||
    stop "the kit is not for Python $version: it has ${wheel##*/}; make it again: TARGET=$version bash scripts/kit.sh KIT"
done

# The content of machine.pth. addsitedir adds a folder with packages to sys.path, and processes the .pth files in that
# folder, which would be ignored if machine.pth contained only the path of the folder. torch's folder comes first; the
# packages that torch needs may be in other folders. PYTHONPATH may name a folder of .venv, which does not exist yet.
machine=$("$python" - "$(dirname "$(dirname "$torch")")" <<'END'
import pathlib, sys
others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages")) and pathlib.Path(path).is_dir()]
for folder in dict.fromkeys([sys.argv[1], *others]):
    print(f"import site; site.addsitedir({folder!r})")
END
)

"$python" -m venv --without-pip .venv
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for wheel in "$kit"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$site"; done
echo "$machine" >"$site/machine.pth"
echo "$PWD" >"$site/project.pth"
# The program `accelerate`, as pip would write it. The first lines start Python even if its path contains spaces.
cat >.venv/bin/accelerate <<END
#!/bin/sh
'''exec' "$PWD/.venv/bin/python" "\$0" "\$@"
' '''
import sys
from accelerate.commands.accelerate_cli import main
sys.exit(main())
END
chmod +x .venv/bin/accelerate
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
