"""model.json: what is needed, in addition to the weights, to rebuild and use a trained model."""

import dataclasses
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data_prep.dataset import DatasetInfo
from data_prep.errors import InputError, quoted, require, shell_path
from data_prep.files import read_json, write_json
from data_prep.json_fields import Fields
from data_prep.machine_limits import lacks_memory
from ddp_trainer.config import DEFAULT_WIDTHS, MAX_WIDTH, NetworkConfig, TrainConfig
from ddp_trainer.models import registry
from ddp_trainer.models.custom_resnet import ACTIVATIONS
from ddp_trainer.models.initial_weights import freeze, load_tensors
from ddp_trainer.models.trial_pass import trial_images, trial_passes

# Limits for a model.json that comes from somebody else. Three poolings reduce MIN_SIDE to one pixel. With
# MAX_SIDE, the first activation of one image takes 4 GB.
MIN_SIDE, MAX_SIDE = 8, 4096
TEMPERATURES = (1e-3, 1e3)
FLIPS = ("none", "random", "alternating")
# Limits for all images of an evaluation batch together: before they are cropped, and as input of the network.
MAX_STORED_PIXELS, MAX_INPUT_PIXELS = 8_000_000, 1_000_000


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a network was built from, and how its input must be normalized."""

    classes: tuple[str, ...]
    mean: tuple[float, float, float]  # of the training images, on a scale of 0-1
    std: tuple[float, float, float]
    image_size: int  # side of a prepared image, in pixels
    train_size: int | None = None  # side of the center crop that the network sees, in pixels; None: the whole image
    widths: tuple[int, int, int, int] = DEFAULT_WIDTHS
    activation: str = "relu"
    architecture: str = registry.BUILT_IN  # as in --network
    flip: str = "random"  # --flip of the run; if it is "none", test-time augmentation must not mirror images either
    shift: bool = True  # whether crops were at random positions; if not, test-time augmentation must not shift images
    temperature: float = 1.0  # logits are divided by it before softmax: see --calibrate

    @classmethod
    def of(cls, dataset: DatasetInfo, config: TrainConfig) -> "ModelSpec":
        network, augment, schedule = config.network, config.augment, config.schedule
        small_crops = min(schedule.crop_sides(dataset.image_size)) < dataset.image_size
        return cls(
            classes=tuple(dataset.classes),
            mean=dataset.mean,
            std=dataset.std,
            image_size=dataset.image_size,
            train_size=schedule.train_size,
            widths=network.widths,
            activation=network.activation,
            architecture=network.network,
            flip=augment.flip,
            shift=augment.crop == "random-resized" or augment.crop_padding > 0 or small_crops,
        )

    @property
    def input_size(self) -> int:
        """Side of the network's input in pixels."""
        return self.train_size or self.image_size

    @property
    def evaluation_batch(self) -> int:
        """Images per evaluation batch: at most 500, and fewer if they are large, to limit memory."""
        return max(1, min(500, MAX_STORED_PIXELS // self.image_size**2, MAX_INPUT_PIXELS // self.input_size**2))

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "ModelSpec":
        """Reads a model.json. Raises InputError if the file is missing or does not describe a model."""
        fields = Fields.read(path)
        if fields is None:
            raise InputError(f"{path} is missing: {_why_unfinished(path.parent)}")
        spec = cls(
            classes=fields.texts("classes", exact=True),
            mean=_colors(fields, "mean"),
            std=_colors(fields, "std"),
            image_size=fields.integer("image_size", minimum=MIN_SIDE, maximum=MAX_SIDE) or 0,
            train_size=fields.integer("train_size", minimum=MIN_SIDE, maximum=MAX_SIDE),
            widths=fields.integers("widths", minimum=1, maximum=MAX_WIDTH) or DEFAULT_WIDTHS,  # type: ignore[arg-type]
            activation=fields.text("activation", "relu"),
            architecture=fields.text("architecture", registry.BUILT_IN),
            flip=fields.text("flip", "random"),
            shift=fields.flag("shift", True),
            # A number that is not finite becomes 0, which is refused below.
            temperature=(fields.number("temperature") or 0.0) if "temperature" in fields else 1.0,
        )
        lowest, highest = TEMPERATURES
        unknown = set(fields.names()) - {field.name for field in dataclasses.fields(cls)}
        for problem, found in (
            ("it has no classes", not spec.classes),
            ("two classes have the same name", len(set(spec.classes)) < len(spec.classes)),
            ("it has no image_size", not spec.image_size),
            ("train_size must be at most image_size", spec.input_size > spec.image_size),
            ("std must be positive", min(spec.std) <= 0),
            (f"temperature must be from {lowest:g} to {highest:g}", not lowest <= spec.temperature <= highest),
            ("widths must be four numbers", len(spec.widths) != 4),
            (f"activation must be one of {', '.join(ACTIVATIONS)}", spec.activation not in ACTIVATIONS),
            (f"flip must be one of {', '.join(FLIPS)}", spec.flip not in FLIPS),
            (f"this release does not know the field {quoted(min(unknown, default=''))}", unknown),
        ):
            require(not found, f"{path} cannot be used as a model description: {problem}")
        return spec


def _colors(fields: Fields, name: str) -> tuple[float, float, float]:
    values = fields.numbers(name)
    require(len(values) == 3, f"{fields.path}: {name} must be three numbers, got {len(values)}")
    return values[0], values[1], values[2]


def build_model(spec: ModelSpec) -> nn.Module:
    """The network of `spec` with random weights. Raises InputError if it cannot be built here."""
    return registry.build(
        spec.architecture, num_classes=len(spec.classes), widths=spec.widths, activation=spec.activation
    )


def build_network(config: NetworkConfig, spec: ModelSpec) -> nn.Module:
    """A new network to train.

    Parameters are frozen before DDP wraps the network. Otherwise, DDP would wait for their gradients.
    """
    network = build_model(spec)
    for norm in (layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)):
        if config.bn_momentum is not None:
            norm.momentum = config.bn_momentum
        if config.freeze_bn_scale and norm.weight is not None and not _has_zeros(norm.weight):
            norm.weight.requires_grad_(False)
    freeze(network, config.frozen)
    return network


def _has_zeros(scale: Tensor) -> bool:
    """Whether a scale of BatchNorm is 0, as in the last layer of each residual branch of timm's ResNets.

    If it were frozen, the layers before it would get no gradient. False on the meta device, where tensors have no
    values.
    """
    return not scale.is_meta and not bool(scale.all())


def require_same_widths_and_activation(spec: ModelSpec, source: Path) -> None:
    """Raises InputError if `source` and `spec` both have the built-in network, but different widths or activations.

    `source`: a run directory, or the file model.safetensors in it.

    Loading the weights would not fail if only the activation differed, because activations have no weights.
    """
    description = (source.parent if source.name == "model.safetensors" else source) / "model.json"
    if not os.path.isfile(description):  # `Path.is_file` raises PermissionError if the folder cannot be read
        return
    trained = ModelSpec.read(description)
    is_built_in = trained.architecture == spec.architecture == registry.BUILT_IN
    require(
        not is_built_in or (trained.activation, trained.widths) == (spec.activation, spec.widths),
        f"--init-from {source} has other widths or another activation; add --activation {trained.activation} --widths "
        f"{' '.join(map(str, trained.widths))}",
    )


def load_model(run_dir: Path | str) -> tuple[nn.Module, ModelSpec]:
    """The trained model of a finished run, in evaluation mode, on the CPU.

    Raises InputError if the run directory has no readable model, or if the model cannot process images of its size.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    run_dir = Path(run_dir)
    spec, weights = ModelSpec.read(run_dir / "model.json"), run_dir / "model.safetensors"
    if not weights.is_file():
        raise InputError(f"{weights} is missing: {_why_unfinished(run_dir)}")
    try:
        if not registry.is_user_function(spec.architecture):
            _check_shapes(weights, spec)
        model = build_model(spec).eval()
        load_tensors(model, load_file(weights))
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        fix = "" if spec.architecture == registry.BUILT_IN else "; restore the code with which the run was trained"
        raise InputError(f"{weights} cannot be loaded: {reason}{fix}") from None
    if spec.architecture != registry.BUILT_IN:  # it can process images of any size from MIN_SIDE
        check_input_size(model, spec, run_dir / "model.json")
    return model, spec


def _check_shapes(weights: Path, spec: ModelSpec) -> None:
    """Raises InputError unless the file's header has the tensors that `spec` describes.

    Allocates no memory for weights: those that somebody else's model.json describes could take many gigabytes.
    """
    from safetensors import safe_open

    try:
        with _WeightsWithoutMemory():
            expected = {name: list(value.shape) for name, value in build_model(spec).state_dict().items()}
    except InputError:  # some networks of timm pass an image through their layers while they are built
        return
    with safe_open(weights, framework="pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            wanted, present = (shapes.get(name, "missing") for shapes in (expected, found))
            raise InputError(f"{weights} does not fit model.json: {quoted(name)} is {present}, expected {wanted}")


class _WeightsWithoutMemory(TorchFunctionMode):
    """Creates weights on the meta device. Other tensors have values, from which RegNets compute their widths."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        options = kwargs or {}
        return func(*args, **({**options, "device": "meta"} if func is torch.empty else options))


def check_input_size(model: nn.Module, spec: ModelSpec, description: Path) -> None:
    """Raises InputError if `model` fails on an image of the size in `description`. Leaves `model` unchanged."""
    try:
        with trial_passes(model), torch.no_grad():  # not inference_mode: see `Evaluator.run`
            model(trial_images(model, 1, spec.input_size).contiguous())
    except Exception as error:
        if lacks_memory(error):
            raise
        raise InputError(
            f"{description}: {spec.architecture} cannot process images of {spec.input_size} pixels a side "
            f"({registry.describe_error(error)}); restore the size or the code with which the run was trained"
        ) from None


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _why_unfinished(run_dir: Path) -> str:
    """Why the run in `run_dir` has no model, and what to do, as the end of a message."""
    status = read_json(run_dir / "status.json") or {}
    if status.get("state") == "preempted":
        resume = f"--out {shell_path(run_dir)} --resume"
        return f"the run stopped after step {status.get('step')}; continue it with {resume}"
    return f"{shell_path(run_dir)} is not a finished run; train it first"
