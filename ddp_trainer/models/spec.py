"""model.json: everything needed besides the weights to rebuild and use a trained model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from data_prep.dataset import DatasetInfo
from data_prep.errors import InputError
from data_prep.files import write_json
from ddp_trainer.config import NetworkConfig
from ddp_trainer.models import registry
from ddp_trainer.models.custom_resnet import ACTIVATIONS, WIDTHS
from ddp_trainer.models.initial_weights import freeze

FLIPS = ("none", "random", "alternating")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a network was built from, and how its input must be normalized."""

    classes: tuple[str, ...]
    mean: tuple[float, float, float]  # of the training images, 0-1 scale
    std: tuple[float, float, float]
    image_size: int  # pixels a side
    widths: tuple[int, int, int, int] = WIDTHS
    activation: str = "relu"
    architecture: str = registry.BUILT_IN  # as in --network
    flip: str = "random"  # --flip of the run: after "none", test-time augmentation must not mirror images either

    @classmethod
    def of(cls, dataset: DatasetInfo, network: NetworkConfig, *, flip: str = "random") -> "ModelSpec":
        return cls(
            classes=tuple(dataset.classes),
            mean=dataset.mean,
            std=dataset.std,
            image_size=dataset.image_size,
            widths=network.widths,
            activation=network.activation,
            architecture=network.network,
            flip=flip,
        )

    @property
    def evaluation_batch(self) -> int:
        """Images per evaluation batch: 500 of 32x32 pixels, fewer if larger, so that memory stays bounded."""
        return max(1, min(500, 500 * 32**2 // self.image_size**2))

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "ModelSpec":
        """Raises InputError if the file is missing or is not a model.json of this project."""
        try:
            fields: dict[str, Any] = json.loads(path.read_text())
            values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
            spec = cls(**values)
            if spec.activation not in ACTIVATIONS:
                raise ValueError(f"unknown activation {spec.activation}")
            if spec.flip not in FLIPS:
                raise ValueError(f"flip must be one of {', '.join(FLIPS)}, got {spec.flip}")
            return spec
        except FileNotFoundError:
            raise InputError(f"{path} is missing: {path.parent} is not a finished run; train it first") from None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} cannot be read as a model description: {error}") from None


def build_model(spec: ModelSpec) -> nn.Module:
    """The network of `spec` with random weights. Raises InputError if it cannot be built here."""
    return registry.build(
        spec.architecture, num_classes=len(spec.classes), widths=spec.widths, activation=spec.activation
    )


def build_network(config: NetworkConfig, spec: ModelSpec) -> nn.Module:
    """A fresh network to train. Parameters are frozen before DDP sees them, or it would wait for their gradients."""
    network = build_model(spec)
    for norm in (layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)):
        if config.bn_momentum is not None:
            norm.momentum = config.bn_momentum
        if config.freeze_bn_scale and norm.weight is not None:
            norm.weight.requires_grad_(False)
    freeze(network, config.frozen)
    return network


def load_model(run_dir: Path | str) -> tuple[nn.Module, ModelSpec]:
    """The trained model of a finished run, in evaluation mode, on the CPU.

    Raises InputError if the run directory has no readable model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    run_dir = Path(run_dir)
    spec = ModelSpec.read(run_dir / "model.json")
    model = build_model(spec)
    weights = run_dir / "model.safetensors"
    try:
        model.load_state_dict(load_file(weights))
    except FileNotFoundError:
        raise InputError(f"{weights} is missing: {run_dir} is not a finished run; train it first") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{weights} cannot be loaded: {str(error).splitlines()[0]}") from None
    return model.eval(), spec


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
