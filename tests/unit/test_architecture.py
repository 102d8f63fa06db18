"""The rules of the code base: allowed imports and calls, and limits on the size of files and parameter lists."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.source import MODULES, REPOSITORY, SOURCES, functions_of, imports_of, module_name, name_of, tree_of

MAX_LINES = 250
MAX_PARAMETERS = 6
MAX_NAMES = 18  # modules and folders at the top of ddp_trainer/

# The layers from low to high. A module may import from its own layer and from lower layers.
LAYERS = (
    ("data_prep",),
    ("schedule",),
    ("config",),
    ("recipes",),
    ("models",),
    ("distributed",),
    ("command_line",),
    ("tracking",),
    ("engine",),
    ("report",),
    ("run",),
    ("train", "evaluate", "predict", "export", "lr_find", "sweep", "doctor", "model_card", "__main__"),
    ("__init__",),  # of ddp_trainer: the Python API
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}


def layer_of(module: str) -> str:
    """Returns the name of a module's layer: `data_prep` for all of data_prep, `engine` for ddp_trainer.engine.loss."""
    package, _, rest = module.partition(".")
    return package if package == "data_prep" else rest.partition(".")[0] or "__init__"


def modules_imported_by(file: Path) -> set[str]:
    known = {module_name(module) for module in MODULES}
    return (imports_of(file) & known) - {module_name(file), "ddp_trainer", "data_prep"}


def importers_of(package: str) -> set[str]:
    """The modules of data_prep and ddp_trainer that import `package` or anything in it."""
    return {
        name_of(file)
        for file in MODULES
        if any(name == package or name.startswith(package + ".") for name in imports_of(file))
    }


def calls_in(file: Path) -> Iterator[tuple[ast.Call, str, str]]:
    """Yields (call, owner, name) of each call `owner.name(...)`; owner is "" if it is not a plain name."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            yield node, owner.id if isinstance(owner, ast.Name) else "", node.func.attr


def test_no_module_imports_from_a_higher_layer() -> None:
    upwards = {
        f"{name_of(file)} -> {target}"
        for file in MODULES
        for target in modules_imported_by(file)
        if LAYER_OF[layer_of(target)] > LAYER_OF[layer_of(module_name(file))]
    }
    assert upwards == set()


def test_no_imports_are_circular() -> None:
    arrows = {(module_name(file), target) for file in MODULES for target in modules_imported_by(file)}
    while True:
        starts, ends = ({arrow[end] for arrow in arrows} for end in (0, 1))
        inner = {(start, end) for start, end in arrows if start in ends and end in starts}
        if inner == arrows:
            break
        arrows = inner
    assert sorted(arrows) == [], "these imports are circular"


def test_the_top_of_the_package_has_few_names() -> None:
    top = REPOSITORY / "ddp_trainer"
    names = {file.relative_to(top).parts[0].removesuffix(".py") for file in top.rglob("*.py")} - {
        "__init__",
        "__main__",
    }
    assert names == LAYER_OF.keys() - {"data_prep", "__init__", "__main__"}, "LAYERS and the folder do not match"
    assert len(names) <= MAX_NAMES


def test_init_files_of_folders_import_only_the_standard_library() -> None:
    """Some modules are used before torch is imported, so the __init__.py of their folder must not import torch.

    data_prep/sources is exempt; it imports NumPy.
    """
    folders = [file for file in MODULES if file.name == "__init__.py" and file.parts[-3] != "data_prep"]
    imported = {name_of(file): names for file in folders if (names := top_imports_of(file) - sys.stdlib_module_names)}
    assert imported == {}


def top_imports_of(file: Path) -> set[str]:
    """Top-level names of the modules that `file` imports at module level, not inside functions."""
    body = tree_of(file).body
    plain = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[0] for name in (*plain, *(n.module or "" for n in body if isinstance(n, ast.ImportFrom)))}


def test_packages_do_not_import_benchmarks_slurm_or_tests() -> None:
    outsiders = ("benchmarks", "slurm", "tests", "conftest", "pytest")
    assert {outsider: importers_of(outsider) for outsider in outsiders} == {outsider: set() for outsider in outsiders}


def test_only_one_file_uses_accelerator() -> None:
    assert importers_of("accelerate.Accelerator") == {"ddp_trainer/distributed/runtime.py"}


def test_only_one_file_imports_wandb() -> None:
    assert importers_of("wandb") == {"ddp_trainer/tracking/wandb_mirror.py"}


def test_only_data_prep_imports_ffcv() -> None:
    assert {name.split("/")[0] for name in importers_of("ffcv")} == {"data_prep"}


def test_only_one_file_builds_trainers() -> None:
    users = {name_of(file) for file in SOURCES for call in ast.walk(tree_of(file)) if builds(call)}
    assert users == {"ddp_trainer/engine/build.py"}


def builds(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Trainer"


def test_backward_is_called_in_few_files() -> None:
    """The trainer calls `backward` through the runtime. Checks, measurements and warm-up steps call it directly."""
    callers = {name_of(file) for file in MODULES for _, _, name in calls_in(file) if name == "backward"}
    assert callers == {
        "ddp_trainer/engine/device_step.py",
        "ddp_trainer/distributed/runtime.py",
        "ddp_trainer/engine/flops.py",
        "ddp_trainer/engine/passes.py",
        "ddp_trainer/models/autocast_check.py",
        "ddp_trainer/models/check.py",
    }


def test_variables_of_the_launcher_are_read_in_one_folder() -> None:
    variables = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"}
    readers = {
        name_of(file)
        for file in MODULES
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Constant) and node.value in variables
    }
    # free_memory.py divides the free memory of this machine by the number of processes on it, LOCAL_WORLD_SIZE.
    outside = {name for name in readers if not name.startswith("ddp_trainer/distributed/")}
    assert outside == {"data_prep/free_memory.py"}


def test_only_one_file_reads_pickles() -> None:
    """`array_pickle.py` runs no code in the pickles it reads. Other files load nothing that can run code."""
    picklers = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    offenders = [name_of(file) for file in MODULES if imports_of(file) & picklers]
    for file in MODULES:
        for call, owner, name in calls_in(file):
            options = {word.arg: ast.unparse(word.value) for word in call.keywords}
            safe = {
                ("torch", "load"): options.get("weights_only") == "True",
                ("np", "load"): options.get("allow_pickle", "False") == "False",
            }
            if not safe.get((owner, name), True):
                offenders.append(f"{name_of(file)}:{call.lineno}")
    assert offenders == ["data_prep/sources/array_pickle.py"]


def test_report_needs_neither_device_nor_tracker() -> None:
    files = [file for file in MODULES if name_of(file).startswith("ddp_trainer/report")]
    assert files
    heavy = {"accelerate", "ffcv", "torchvision", "wandb"}
    importers = [name_of(file) for file in files if {name.split(".")[0] for name in imports_of(file)} & heavy]
    on_device = [
        name_of(file)
        for file in files
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Attribute) and node.attr == "cuda"
    ]
    assert (importers, on_device) == ([], [])


def test_every_file_has_a_docstring() -> None:
    assert [name_of(file) for file in SOURCES if not ast.get_docstring(tree_of(file))] == []


def test_files_stay_small() -> None:
    lines = {name_of(file): len(file.read_text().splitlines()) for file in SOURCES}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_file_names_are_not_vague() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [name_of(file) for file in SOURCES if file.stem in vague] == []


def test_functions_take_few_parameters() -> None:
    crowded = {
        f"{name_of(file)}:{function.lineno} {function.name}": count
        for file in MODULES
        for function in functions_of(file)
        if (count := number_of_parameters(function)) > MAX_PARAMETERS
    }
    assert crowded == {}


def number_of_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    return sum(argument.arg not in {"self", "cls"} for argument in arguments)
