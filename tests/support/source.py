"""Lists and parses the repository's own source files."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("data_prep", "ddp_trainer")
MODULES = sorted(file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py"))
OTHER_FOLDERS = ("benchmarks", "slurm", "scripts", "tests")
SOURCES = sorted([*MODULES, *(file for folder in OTHER_FOLDERS for file in (REPOSITORY / folder).rglob("*.py"))])


def name_of(file: Path) -> str:
    """Returns the path relative to the repository's root, such as data_prep/order.py."""
    return file.relative_to(REPOSITORY).as_posix()


def module_name(file: Path) -> str:
    """Returns the dotted name, such as data_prep.order; for an __init__.py, the name of the package."""
    return name_of(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@functools.cache
def imports_of(file: Path) -> set[str]:
    """Returns the dotted names of all imports in `file`, including those in functions.

    `from a.b import c` gives a.b and a.b.c.
    """
    found: set[str] = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno}: use an absolute import"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def functions_of(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
