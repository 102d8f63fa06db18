"""The settings of a run, as frozen dataclasses that check the range of each value when they are created.

The docstring of a field is the help text of its flag. `recipes` contains named configurations, and `command_line`
parses flags into a configuration.
"""

import dataclasses
import importlib.util
import math
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_prep.augment_config import AugmentConfig
from data_prep.data_config import DataConfig
from data_prep.errors import require, require_printable
from ddp_trainer.schedule import ScheduleConfig, split_names

# Settings that may change when a run is resumed: they decide where and how it runs, not what it learns.
CHANGEABLE_ON_RESUME = frozenset(
    {"out", "resume", "data_dir", "num_workers", "data_mode", "verify", "device", "compile", "graph", "max_steps"}
) | {
    *("checkpoint_every_steps", "keep_checkpoints", "log_every_steps", "profile"),
    *("trackers", "wandb", "process_group_timeout"),
}

# Two runs that differ only in these settings learn the same weights, up to rounding, if their `data_dir` has the same
# images. `max_steps` is not one of these settings, because it can end a run early.
NO_DIFFERENCE = CHANGEABLE_ON_RESUME - {"max_steps"}

# The report leaves these settings out when it compares runs. They decide, for example, where a run is stored, how it is
# tracked and how fast it runs. The command for repeating a run leaves out the same settings, except `data_dir` and
# `out`. The report shows `device` and `compile`, because they change the last digits of a result.
LEFT_OUT = NO_DIFFERENCE - {"device", "compile"}

# The --network whose module is being imported. While it is set, starting a run is an error: the run would import the
# module again, which would start another run, and so on.
importing_network: ContextVar[str] = ContextVar("importing_network", default="")

DEFAULT_WIDTHS = (64, 128, 256, 512)
MAX_WIDTH = 8192
WEEK_SECONDS = 7 * 86400
SEED_LIMIT = 2**63


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    network: str = "custom_resnet"
    """custom_resnet, torchvision:NAME, timm:NAME, or your own MODULE:FUNCTION, called as FUNCTION(num_classes=N)."""
    widths: tuple[int, int, int, int] = DEFAULT_WIDTHS
    """Channels of the stem and of the three stages of custom_resnet."""
    activation: Literal["relu", "gelu", "celu"] = "relu"
    """Activation of custom_resnet after each BatchNorm; celu has alpha 0.3."""
    freeze_bn_scale: bool = False
    """Keep the scales of BatchNorm at their initial values, usually 1, and train only its biases. If any scale of a
    layer starts at 0, the scales of that layer are trained, too."""
    bn_momentum: float | None = None
    """Weight of a new batch in the running statistics of BatchNorm; default: the network's own, usually 0.1."""
    init_from: Path | None = None
    """Start from the weights in this run directory or file (.safetensors, .pt, .pth). Weights that the file lacks or
    has in another shape, such as those of a head for other classes, are initialized at random and listed."""
    freeze: str = ""
    """Do not train the parameters whose names match these comma-separated patterns, such as 'features.*'."""

    def __post_init__(self) -> None:
        applies = self.network == "custom_resnet" or self.widths == DEFAULT_WIDTHS
        require(applies, f"--widths is for --network custom_resnet, got --network {self.network}")
        require(
            min(self.widths) >= 1 and max(self.widths) <= MAX_WIDTH,
            f"--widths must be from 1 to {MAX_WIDTH}, got {' '.join(map(str, self.widths))}",
        )
        momentum = self.bn_momentum
        require(momentum is None or 0 < momentum <= 1, f"--bn-momentum must be in (0, 1], got {momentum}")

    @property
    def frozen(self) -> tuple[str, ...]:
        return split_names(self.freeze)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    """sgd: Nesterov momentum 0.9; adamw: betas 0.9 and 0.99; muon: Muon with momentum 0.6 for convolutions and hidden
    linear layers, sgd with momentum 0.85 for all other parameters."""
    peak_lr: float = 0.4
    """Highest learning rate of the one-cycle schedule."""
    head_lr: float | None = None
    """Highest learning rate of the last linear layer, or of the last convolution if the network has no linear layer;
    default: the value of --peak-lr."""
    bias_lr: float | None = None
    """Highest learning rate of the biases of BatchNorm; default: the value of --peak-lr."""
    weight_decay: float = 5e-4
    """Weight decay of all parameters with two or more dimensions, such as the weights of convolutions and linear
    layers. With muon, ungrouped convolutions without a bias are not decayed."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes."""
    clip_norm: float = 0.0
    """Scale gradients down to this global norm; 0: off."""
    ema_decay: float = 0.0
    """Evaluate and save an exponential moving average of the weights with this decay per step; 0: off."""

    def __post_init__(self) -> None:
        for flag, rate in (("peak", self.peak_lr), ("head", self.head_lr), ("bias", self.bias_lr)):
            require(rate is None or 0 < rate < math.inf, f"--{flag}-lr must be positive, got {rate}")
        require(0 <= self.weight_decay < math.inf, f"--weight-decay must be at least 0, got {self.weight_decay}")
        require(0 <= self.label_smoothing < 1, f"--label-smoothing must be in [0, 1), got {self.label_smoothing}")
        require(0 <= self.clip_norm < math.inf, f"--clip-norm must be at least 0, got {self.clip_norm}")
        require(0 <= self.ema_decay < 1, f"--ema-decay must be in [0, 1), got {self.ema_decay}")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if torch finds a usable GPU, else cpu. Several processes can train on the CPU, too."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 if the hardware supports it, else fp16 on CUDA, else fp32. fp32 never uses TF32."""
    compile: bool = False
    """Compile the network with torch.compile."""
    graph: Literal["auto", "off"] = "auto"
    """auto: on a GPU, capture the steps into CUDA graphs if possible; off: never."""
    channels_last: bool = True
    """Store activations and filters in NHWC order."""
    sync_bn: bool = False
    """Compute the statistics of BatchNorm over the global batch instead of each process's share."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """bf16: processes exchange their gradients in bf16, which halves the amount of data but rounds the gradients."""
    deterministic: bool = False
    """Make a repeated run bit-identical, on the same machine with the same number of processes."""
    seed: int = 0
    """Seed of the initial weights, the order and augmentation of the images, and the choice of held-out images."""
    process_group_timeout: float = 120.0
    """Fail if another process does not answer for this many seconds."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < SEED_LIMIT, f"--seed must be in [0, 2^63 - 1], got {self.seed}")
        timeout = self.process_group_timeout
        require(
            0 < timeout <= WEEK_SECONDS,
            f"--process-group-timeout must be in (0, {WEEK_SECONDS}] seconds, got {timeout}",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    out: Path | None = None
    """Run directory; default: runs/RECIPE-TIMESTAMP."""
    resume: bool = False
    """Resume from the newest good checkpoint in --out, or start from the beginning if none was saved yet."""
    checkpoint_every_steps: int = 0
    """Number of steps between checkpoints within an epoch; 0: save only at the end of each epoch. On a GPU, an epoch
    that ends less than 5 s after the previous save gets no checkpoint, unless it is the last epoch, --validation is
    set, or this flag asks for a checkpoint."""
    keep_checkpoints: int = 2
    """Number of recent checkpoints to keep."""
    log_every_steps: int = 50
    """Number of steps between records in steps.jsonl; 0: no records."""
    profile: int = 0
    """Trace this many steps of the main process with torch's profiler, after a few warm-up steps; 0: off."""

    def __post_init__(self) -> None:
        for name, least in (
            ("checkpoint_every_steps", 0),
            ("keep_checkpoints", 1),
            ("log_every_steps", 0),
            ("profile", 0),
        ):
            value = getattr(self, name)
            require(value >= least, f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        require(not self.resume or self.out is not None, "--resume needs --out DIR, the directory of the run")
        require_printable("out", self.out)
        require(self.out != Path(), "--out must name a folder other than the current one")


def is_installed(package: str) -> bool:
    """Whether `package` can be imported. A folder without code, such as the wandb/ that W&B writes, does not count."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    trackers: str = "wandb"
    """wandb, tensorboard, or both separated by a comma. metrics.jsonl and steps.jsonl are always written."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: the mode in WANDB_MODE or W&B's settings files, else online if there is an API key, else offline. W&B's own
    environment variables apply, such as WANDB_PROJECT (default: ddp-trainer), WANDB_NAME (default: the name of the run
    directory), WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_JOB_TYPE and WANDB_TAGS."""

    def __post_init__(self) -> None:
        unknown = ", ".join(sorted(set(self.tracker_names) - {"wandb", "tensorboard"}))
        require(not unknown, f"--trackers must be wandb, tensorboard or both, got {unknown}")
        require(
            "tensorboard" not in self.tracker_names or is_installed("tensorboard"),
            "--trackers tensorboard needs the package tensorboard; run `pip install tensorboard`",
        )
        require(
            self.wandb == "auto" or not self.uses_wandb or is_installed("wandb"),
            f"--wandb {self.wandb} needs the package wandb; run `pip install wandb`",
        )

    @property
    def tracker_names(self) -> tuple[str, ...]:
        return split_names(self.trackers)

    @property
    def uses_wandb(self) -> bool:
        return "wandb" in self.tracker_names and self.wandb != "disabled"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a run, grouped into sections. Each field of a section has a flag of the same name."""

    recipe: Annotated[str, tyro.conf.Suppress] = "custom"
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def flat(self) -> dict[str, Any]:
        """{name: value} of all settings, with values that JSON can represent."""
        sections = [part for part in dataclasses.asdict(self).values() if isinstance(part, dict)]
        return {name: _json_value(value) for section in sections for name, value in section.items()}

    def fixed_on_resume(self) -> dict[str, Any]:
        """The settings that must not change when a run is resumed."""
        return {name: value for name, value in self.flat().items() if name not in CHANGEABLE_ON_RESUME}


def _json_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
