"""Rewrites constraints.txt with the newest versions that pyproject.toml allows.

Run it with .venv/bin/python scripts/lock.py. It needs uv (pip install uv), which resolves versions for all Python
versions and platforms together and lists the files of each package. This script keeps the wheels that `make setup`
can install: those for Python 3.11 to 3.13 on Linux with glibc, x86_64 and aarch64.
"""

import re
import subprocess
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.markers import Marker

REPOSITORY = Path(__file__).resolve().parents[1]
HEAD = """\
# The packages that the tests run with, and the sha256 of all their wheels for Python 3.11 to 3.13 on Linux (x86_64 and
# aarch64). `make setup` installs these files and no others. FFCV is not among them: scripts/ffcv builds it.
# pyproject.toml has the allowed versions. To get newer versions, run scripts/lock.py, then make test.
"""
WHEEL = re.compile(
    r"-none-any\.whl$|-(cp311-cp311|cp312-cp312|cp313-cp313|cp3\d+-abi3|py3-none|py2\.py3-none)-\S*manylinux\S*(x86_64|aarch64)\.whl$"
)
MACHINES = [
    {
        "sys_platform": "linux",
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": f"{python}.0",
    }
    for machine in ("x86_64", "aarch64")
    for python in ("3.11", "3.12", "3.13")
]


def resolve(folder: Path) -> list[dict[str, Any]]:
    """Resolves the versions with uv. Returns uv's list of packages, which includes FFCV's dependencies but not FFCV."""
    override = folder / "override.txt"
    override.write_text(f"ffcv @ {(REPOSITORY / 'scripts' / 'ffcv').as_uri()}\n")
    extra = folder / "extra.in"
    extra.write_text("pip\nsetuptools\n")
    locked = folder / "pylock.toml"
    extras = [f"--extra={name}" for name in ("dev", "export", "tensorboard", "timm")]
    options = ["--universal", "--python-version=3.11", "--no-emit-package=ffcv", f"--override={override}", *extras]
    command = ["uv", "pip", "compile", "--quiet", *options, "pyproject.toml", extra, "--output-file", locked]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    return tomllib.loads(locked.read_text())["packages"]


def entry(package: dict[str, Any]) -> str | None:
    """Returns the lines of constraints.txt for one package, or None if no supported machine needs it."""
    marker = Marker(package.get("marker", "python_version > '0'"))
    needed = [marker.evaluate(machine) for machine in MACHINES]
    if not any(needed):
        return None
    wheels = [wheel for wheel in package.get("wheels", []) if WHEEL.search(wheel["url"])]
    if not wheels:
        raise SystemExit(f"error: {package['name']} {package['version']} has no wheel for Linux")
    hashes = sorted(f"--hash=sha256:{wheel['hashes']['sha256']}" for wheel in wheels)
    condition = "" if all(needed) else f" ; {marker}"
    return " \\\n    ".join([f"{package['name']}=={package['version']}{condition}", *hashes])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        entries = [lines for package in resolve(Path(folder)) if (lines := entry(package))]
    (REPOSITORY / "constraints.txt").write_text(HEAD + "\n".join(entries) + "\n")
