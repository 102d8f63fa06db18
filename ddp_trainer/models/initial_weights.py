"""--init-from and --freeze: the weights from which a run starts, and the parameters that stay fixed."""

import os
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from data_prep.errors import InputError, require
from data_prep.files import require_readable
from data_prep.sources import name_some


@dataclass(frozen=True)
class Loaded:
    """Names of the tensors that were loaded from a file, and of those that did not fit."""

    fitting: tuple[str, ...]
    fresh: tuple[str, ...]  # tensors that the file lacks or has in another shape; they keep their initial values
    unused: tuple[str, ...]  # tensors of the file that the network lacks

    def describe(self, source: Path) -> str:
        line = f"starting from {source}: loaded {len(self.fitting)} of {len(self.fitting) + len(self.fresh)} tensors"
        if self.fresh:
            line += f"; randomly initialized: {', '.join(self.fresh)}"
        if self.unused:
            line += f"; not used: {', '.join(self.unused)}"
        return line


def load_initial_weights(network: nn.Module, source: Path) -> Loaded:
    """Copies into `network` every tensor of `source` that fits by name and shape.

    `source`: a run directory, a .safetensors file, or a .pt or .pth file, which is read with weights_only. Raises
    InputError if the file cannot be read, or if no tensor in it fits a weight of the network.
    """
    own, weights = network.state_dict(), read_weights(source)
    parameters = dict(network.named_parameters(remove_duplicate=False))  # layers may share a parameter
    unprefixed = {name.removeprefix("module."): value for name, value in weights.items()}  # DDP adds this prefix
    # The network's own names may have this prefix, too, so it is removed only if more names match without it.
    weights = max(weights, unprefixed, key=lambda named: len(named.keys() & own.keys()))
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    # A bias that fits is not enough: any network for the same number of classes may have a bias of that shape.
    has_weight = any(name in fitting and value.ndim >= 2 for name, value in parameters.items())
    require(
        has_weight,
        f"--init-from {source}: none of its tensors has the name and shape of a weight of this network; "
        "set --network to the network to which these weights belong",
    )
    for name, value in fitting.items():
        # A tensor of the network, such as a mask, may itself contain infinity.
        usable = value.to(own[name].dtype).isfinite() | ~own[name].isfinite()
        require(bool(usable.all()), f"--init-from {source}: {name} has values that are not finite; use other weights")
    load_tensors(network, {**own, **fitting})
    loaded = {parameters[name] for name in fitting.keys() & parameters.keys()}
    return Loaded(
        fitting=tuple(fitting),
        fresh=tuple(name for name in own if name not in fitting and parameters.get(name) not in loaded),
        unused=tuple(name for name in weights if name not in own),
    )


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads `tensors`, which come from a file without the versions of the layers.

    The versions of `module` are used, because some layers, such as those of torchvision's MNASNet, cannot be loaded
    without them.
    """
    named: OrderedDict[str, Tensor] = OrderedDict(tensors)
    named._metadata = getattr(module.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    module.load_state_dict(named)


def read_weights(source: Path) -> dict[str, Tensor]:
    """{name: tensor} in host memory. Raises InputError if `source` cannot be read or contains no tensors."""
    require_readable(source)
    file = source / "model.safetensors" if os.path.isdir(source) else source
    fix = f"; use {source / 'state.pt'}" if (source / "state.pt").is_file() else ""
    if (source / "status.json").is_file():
        fix = "; the run is not finished, so finish it first, or use state.pt of a checkpoint"
    require(os.path.isfile(file), f"--init-from {source}: there is no file {file}{fix}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        _require_uncompressed(file)
        with warnings.catch_warnings(action="ignore"):  # torch warns about sparse tensors, which are refused below
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the two loaders raise exceptions of many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if type(error).__name__ == "UnpicklingError":  # torch's message advises turning weights_only off
            reason = "it is damaged, or contains more than tensors and plain Python values; save model.state_dict()"
        raise InputError(f"--init-from {source} cannot be read: {reason}") from None
    for key in ("state_dict", "model_state_dict", "model"):  # keys under which training scripts store their weights
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    entries = content if isinstance(content, dict) else {}
    weights = {name: value for name, value in entries.items() if isinstance(name, str) and isinstance(value, Tensor)}
    found = f" (it has the keys {name_some(list(map(str, entries)))})" if entries else ""
    require(bool(weights), f"--init-from {source} must contain a dictionary of named tensors{found}")
    for name, value in weights.items():
        is_dense = value.layout == torch.strided and not value.is_meta
        require(is_dense, f"--init-from {source}: {name} is a sparse or meta tensor; save dense tensors")
    return weights


def _require_uncompressed(file: Path) -> None:
    """Raises ValueError for a zip file that is larger when unpacked: a small file could then fill the memory."""
    if not zipfile.is_zipfile(file):  # torch's older format, which is never compressed
        return
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
    if unpacked > file.stat().st_size:
        raise ValueError("it is compressed; save it again with torch.save, which does not compress")


def freeze(network: nn.Module, patterns: tuple[str, ...]) -> None:
    """Excludes from training every parameter whose name matches one of `patterns`, such as `features.*`.

    Raises the same errors as `parameters_named`.
    """
    for parameter in parameters_named(network, patterns, flag="--freeze"):
        parameter.requires_grad_(False)


def parameters_named(network: nn.Module, patterns: tuple[str, ...], *, flag: str) -> set[nn.Parameter]:
    """The parameters whose names match one of `patterns`. `flag`: where the patterns come from, for error messages.

    Raises InputError for a pattern that matches nothing, or if the patterns leave no parameter to train.
    """
    parameters, found = dict(network.named_parameters(remove_duplicate=False)), set[nn.Parameter]()
    for pattern in patterns:
        matching = [parameter for name, parameter in parameters.items() if fnmatchcase(name, pattern)]
        some = ", ".join(list(parameters)[:3])
        require(bool(matching), f"{flag} {pattern} matches no parameter; the first parameters are {some}, ...")
        found.update(matching)
    trains = any(parameter.requires_grad and parameter not in found for parameter in parameters.values())
    require(not patterns or trains, f"{flag} {','.join(patterns)} leaves nothing to train")
    return found
