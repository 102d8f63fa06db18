"""Networks by name: the built-in one, those of torchvision and timm, and functions of your own.

An unknown name is reported in one line.
"""

import contextlib
import difflib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from data_prep.errors import InputError, require, shell_path
from data_prep.files import file_sha256
from ddp_trainer.config import importing_network, is_installed
from ddp_trainer.models.custom_resnet import CustomResNet

BUILT_IN = "custom_resnet"
# By default, these networks of torchvision also return the logits of auxiliary classifiers, which are not trained here.
WITH_AUXILIARY = ("googlenet", "inception_v3")
# For each module of a network: its `__spec__` (a reload creates a new one), and the sha256 of its source file.
_sources: dict[str, tuple[object, str]] = {}


def build(name: str, *, num_classes: int, widths: tuple[int, int, int, int], activation: str) -> nn.Module:
    """A new network with random weights, which maps normalized (N, 3, H, W) images to (N, num_classes) logits.

    It is in training mode. `name`: custom_resnet, torchvision:NAME, timm:NAME or MODULE:FUNCTION. `widths` and
    `activation` apply only to custom_resnet. Raises InputError if there is no such network, or if its function fails.
    """
    if name == BUILT_IN:
        return CustomResNet(num_classes=num_classes, widths=widths, activation=activation)
    source, _, rest = name.partition(":")
    require(bool(rest), f"--network must be {BUILT_IN}, torchvision:NAME, timm:NAME or MODULE:FUNCTION, got {name!r}")
    create = {"torchvision": _from_torchvision, "timm": _from_timm}.get(source, _from_function)(name, rest)
    try:
        with _kept_folder():
            network = create(num_classes=num_classes)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # whatever the function raises
        call = f"{name.rpartition(':')[2]}(num_classes={num_classes})"
        raise InputError(f"--network {name} cannot be built with {call}: {describe_error(error)}") from error
    require(
        isinstance(network, nn.Module), f"--network {name} must return a torch.nn.Module, got {type(network).__name__}"
    )
    require(
        not any(is_lazy(value) for value in (*network.parameters(), *network.buffers())),
        f"--network {name} has lazy layers; pass a batch of images through the network before you return it",
    )
    try:
        returned = network.train()
    except Exception as error:  # torch's exported programs have no modes
        fix = "return a module whose train() and eval() work"
        raise InputError(f"--network {name} has no training mode ({describe_error(error)}); {fix}") from error
    require(returned is network, f"--network {name}: the method train() must return the network; add return self")
    if is_user_function(name):
        _remember(source)  # also the modules that the function itself has imported
    return network


def is_user_function(name: str) -> bool:
    """Whether `name` is a MODULE:FUNCTION, and not a network of this project, torchvision or timm."""
    return name.partition(":")[0] not in (BUILT_IN, "torchvision", "timm")


def _from_torchvision(name: str, model: str) -> Callable[..., nn.Module]:
    from torchvision import models

    known = models.list_models(module=models)  # classification only
    require(model in known, f"--network {name}: torchvision has no such classification model{_similar(model, known)}")
    settings = {"aux_logits": False, "init_weights": True} if model in WITH_AUXILIARY else {}
    return lambda num_classes: models.get_model(model, weights=None, num_classes=num_classes, **settings)


def _from_timm(name: str, model: str) -> Callable[..., nn.Module]:
    require(is_installed("timm"), f"--network {name} needs the package timm; run `pip install timm`")
    timm = importlib.import_module("timm")
    known = timm.list_models()
    require(model in known, f"--network {name}: timm has no such model{_similar(model, known)}")
    return lambda num_classes: timm.create_model(model, pretrained=False, num_classes=num_classes)


def _from_function(name: str, function: str) -> Callable[..., nn.Module]:
    """The function or class that MODULE:FUNCTION names.

    Functions of Python's standard library are refused. Otherwise, a run directory from somebody else could make this
    process call os:system, for example.
    """
    module_name = name.partition(":")[0]
    in_stdlib = module_name.split(".")[0] in sys.stdlib_module_names
    fix = "use a function of your own, and rename its module if it has the same name"
    require(not in_stdlib, f"--network {name}: {module_name} is a module of Python's standard library; {fix}")
    if "/" in module_name or module_name.endswith(".py"):
        named = f"{_as_module(module_name)}:{function}"
        raise InputError(f"--network needs the name of a module, not of a file, got {name}; use {named}")
    require(
        module_name != "__main__",
        f"--network {name}: other commands cannot import {function}; put it into a file, such as net.py, and use "
        f"net:{function}",
    )
    if os.getcwd() not in sys.path:  # `python -m` adds it to sys.path, but commands such as ddp-train do not
        sys.path.append(os.getcwd())
    token = importing_network.set(name)
    try:
        # So that neither a seed nor a working directory that the module sets has an effect on the run.
        with torch.random.fork_rng(devices=_devices()), _kept_folder():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"--network {name} cannot be imported: {describe_error(error)}") from error
        raise InputError(
            f"--network {name}: there is no module {error.name} here; run the command in the module's folder, or "
            "add that folder to PYTHONPATH"
        ) from None
    except SystemExit as error:
        said = f" ({describe_error(error)})" if isinstance(error.code, str) else ""
        fix = "move its main code into an if __name__ == '__main__' block"
        raise InputError(f"--network {name} cannot be used: importing {module_name} ends Python{said}; {fix}") from None
    except Exception as error:
        raise InputError(f"--network {name} cannot be imported: {describe_error(error)}") from error
    finally:
        importing_network.reset(token)
    _remember(module_name)
    created: Any = getattr(module, function, None)
    require(callable(created), f"--network {name}: {module_name} has no function {function}")
    origin = created
    while isinstance(origin, functools.partial):  # partial itself belongs to the standard library
        origin = origin.func
    home = str(getattr(origin, "__module__", None) or module_name)
    require(
        home.split(".")[0] not in sys.stdlib_module_names,
        f"--network {name}: {function} comes from Python's standard library; use a function of your own",
    )
    return created


@contextlib.contextmanager
def _kept_folder() -> Iterator[None]:
    """Restores the working directory, unless it has not changed: this user may lack permission to enter it again."""
    before = os.getcwd()
    try:
        yield
    finally:
        if os.getcwd() != before:
            os.chdir(before)


def _devices() -> list[int]:
    """The current GPU, if CUDA is initialized."""
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []


def _as_module(path: str) -> str:
    """How to name the module in the file `path`: networks/mine.py -> networks.mine."""
    names = os.path.relpath(path).removesuffix(".py").split("/")
    if all(name.isidentifier() for name in names):
        return ".".join(names)
    return f"PYTHONPATH={shell_path(Path(path).parent)} and {names[-1]}"


def _loaded_sources(module_name: str) -> Iterator[tuple[str, object, Path]]:
    """(name, `__spec__`, source file) of the module and of all loaded modules in the same top-level package."""
    package = module_name.partition(".")[0]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package:
            file = str(getattr(module, "__file__", None))
            if file.endswith(".py") and os.path.isfile(file):  # not in a zip file
                yield name, getattr(module, "__spec__", None), Path(file)


def _remember(module_name: str) -> None:
    """Stores the sha256 of each source file, unless it is already stored for the same import or reload."""
    for name, spec, file in _loaded_sources(module_name):
        if _sources.get(name, ("", ""))[0] is not spec:
            _sources[name] = spec, file_sha256(file)


def require_unchanged(name: str) -> None:
    """Raises InputError if `name` is a MODULE:FUNCTION whose code was edited after this process had imported it.

    Without this check, a run in a notebook would train the old network, and other commands would build the new one.
    """
    for module, spec, file in _loaded_sources(name.partition(":")[0]):
        known, sha256 = _sources.get(module, ("", ""))
        require(
            known is not spec or file_sha256(file) == sha256,
            f"--network {name}: {file} has changed since it was imported; restart Python",
        )


def _similar(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; similar: {', '.join(close)}" if close else ""


def describe_error(error: BaseException) -> str:
    """The type and the message of an error that a user's code raised, on one line and shortened."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
