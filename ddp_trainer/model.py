"""The custom ResNet: torch only. It knows no rank, device, optimizer or logger; it is wrapped from outside.

Structure (conv-pool-BN-activation, two residual pairs) after David Page's ResNet-9 of "How to train your ResNet"
(github.com/davidcpage/cifar10-fast); 6,573,130 parameters for ten classes.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import InputError

WIDTHS = (64, 128, 256, 512)

# The head sees 512 maxima of several units each, so its logits are steep: unscaled, learning rates that suit the
# convolutions make it diverge. The value is Page's.
LOGIT_SCALE = 1 / 8

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "gelu": nn.GELU,
    "celu": partial(nn.CELU, alpha=0.3, inplace=True),  # Page's choice for this network, and his alpha
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What is needed beside the weights to rebuild and use a model: the content of model.json."""

    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    widths: tuple[int, int, int, int] = WIDTHS
    activation: str = "relu"
    architecture: str = "custom_resnet"

    @property
    def evaluation_batch(self) -> int:
        """How many images are evaluated at a time: their activations take the memory of 500 of 32x32 at the most."""
        return max(1, min(500, 500 * 32**2 // self.image_size**2))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "ModelSpec":
        """Raises InputError where the file is missing or not a model.json of this project."""
        try:
            fields: dict[str, Any] = json.loads(path.read_text())
            values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
            spec = cls(**values)
            if spec.architecture != cls.architecture or spec.activation not in ACTIVATIONS:
                raise ValueError(f"unknown architecture {spec.architecture} with {spec.activation}")
            return spec
        except FileNotFoundError:
            raise InputError(f"{path} is missing: {path.parent} is not a completed run; train it first") from None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} cannot be read as a model description: {error}") from None


class ConvBlock(nn.Sequential):
    """3x3 convolution -> optional 2x2 max-pooling -> BatchNorm -> activation."""

    def __init__(self, in_channels: int, out_channels: int, activation: str, *, pool: bool = False) -> None:
        layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)]
        if pool:
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.BatchNorm2d(out_channels), ACTIVATIONS[activation]())


class Residual(nn.Module):
    """x + block(block(x)), both blocks keeping the width."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            ConvBlock(channels, channels, activation), ConvBlock(channels, channels, activation)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class CustomResNet(nn.Module):
    """(N, 3, H, W) normalised images -> (N, num_classes) raw logits. H and W: at least 8.

    The last pooling takes the maximum over the whole remaining map (4x4 for 32x32 images), so larger images work too.
    """

    def __init__(self, num_classes: int = 10, widths: Sequence[int] = WIDTHS, activation: str = "relu") -> None:
        super().__init__()
        stem, first, second, third = widths
        self.features = nn.Sequential(
            ConvBlock(3, stem, activation),
            ConvBlock(stem, first, activation, pool=True),
            Residual(first, activation),
            ConvBlock(first, second, activation, pool=True),
            ConvBlock(second, third, activation, pool=True),
            Residual(third, activation),
        )
        self.head = nn.Linear(third, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).amax(dim=(2, 3))) * LOGIT_SCALE


def build_model(spec: ModelSpec) -> CustomResNet:
    return CustomResNet(num_classes=len(spec.classes), widths=spec.widths, activation=spec.activation)


def load_model(run_dir: Path) -> tuple[CustomResNet, ModelSpec]:
    """The trained model of a completed run, in evaluation mode, on the CPU.

    Raises InputError where the run directory lacks a readable model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    spec = ModelSpec.read(run_dir / "model.json")
    model = build_model(spec)
    weights = run_dir / "model.safetensors"
    try:
        model.load_state_dict(load_file(weights))
    except FileNotFoundError:
        raise InputError(f"{weights} is missing: {run_dir} is not a completed run; train it first") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{weights} cannot be loaded: {str(error).splitlines()[0]}") from None
    return model.eval(), spec


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def without_a_trace(model: nn.Module) -> Iterator[None]:
    """Passes over blank images within the context leave neither gradients nor BatchNorm statistics behind."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    model.zero_grad(set_to_none=True)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def training_flops_per_image(model: nn.Module, image_size: int) -> float:
    """Forward and backward operations for one image, counted on the real layers by torch's FlopCounterMode."""
    from torch.utils.flop_counter import FlopCounterMode

    was_training, count = model.training, 2
    parameter = next(model.parameters())
    images = torch.zeros(count, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    with without_a_trace(model), FlopCounterMode(display=False) as counter:
        model.train()(images).sum().backward()
    model.train(was_training)
    return counter.get_total_flops() / count
