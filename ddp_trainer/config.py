"""Every setting of a training run: frozen, typed sections that are checked once and never edited afterwards.

Owned here: names, types, help texts and ranges. Not owned here: the values of named configurations (`recipes.py`),
how a command line becomes one (`command_line.py`) and what the settings do.
"""

import dataclasses
import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_prep.augment_config import AugmentConfig
from data_prep.errors import require
from ddp_trainer.schedule import ScheduleConfig

# Settings that may differ between a run and its resumption: they change where and how it runs, not what it learns.
FREE_ON_RESUME = frozenset({
    "out", "resume", "data_dir", "num_workers", "data_mode", "max_steps", "checkpoint_every_steps",
    "keep_checkpoints", "trackers", "wandb", "wandb_group", "wandb_job_type", "wandb_tags", "process_group_timeout",
    "device", "compile", "profile",
})  # fmt: skip

WEEK = 7 * 86400  # seconds


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    data_dir: Path = Path("data/cifar10")
    """Folder that data_prep wrote."""
    validation: int = 0
    """Hold this many training images out (stratified, fixed by the seed) and evaluate on them instead of the
    test split."""
    data_mode: Literal["auto", "stream", "resident"] = "auto"
    """stream: read every epoch from the file; resident: keep the images in device memory. Same batches."""
    num_workers: int = 1
    """Data-loading threads for each process."""

    def __post_init__(self) -> None:
        require(self.validation >= 0, f"--validation {self.validation}: give a number of images, 0 or more")
        require(self.num_workers >= 1, f"--num-workers {self.num_workers}: give at least 1")

    @property
    def evaluation_split(self) -> Literal["validation", "test"]:
        """What is evaluated on."""
        return "validation" if self.validation else "test"


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    activation: Literal["relu", "gelu", "celu"] = "relu"
    """What follows each BatchNorm; celu: with alpha 0.3."""
    freeze_bn_scale: bool = False
    """Leave BatchNorm's scales at 1 and learn its biases only."""
    bn_momentum: float = 0.1
    """Weight of a new batch in BatchNorm's running statistics."""

    def __post_init__(self) -> None:
        require(0 < self.bn_momentum <= 1, f"--bn-momentum {self.bn_momentum}: give a number above 0, up to 1")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    """sgd: with Nesterov momentum 0.9; adamw: betas 0.9, 0.99; muon: with momentum 0.6 for the filters,
    and sgd with 0.85 for the rest."""
    peak_lr: float = 0.4
    """Highest learning rate of the OneCycle schedule."""
    head_lr: float = 0.0
    """The same for the linear layer; 0: as --peak-lr."""
    bias_lr: float = 0.0
    """The same for BatchNorm's biases; 0: as --peak-lr."""
    weight_decay: float = 5e-4
    """Decay of the convolution and linear weights (with muon: linear only); biases and BatchNorm are left alone."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes."""
    clip_norm: float = 0.0
    """Scale gradients down to this global norm; 0: never."""
    ema_decay: float = 0.0
    """Evaluate and save an exponential moving average of the weights with this decay per step; 0: none."""

    def __post_init__(self) -> None:
        require(0 < self.peak_lr < math.inf, f"--peak-lr {self.peak_lr}: give a number above 0")
        for name, value in (("head", self.head_lr), ("bias", self.bias_lr)):
            require(0 <= value < math.inf, f"--{name}-lr {value}: give 0 or more")
        require(0 <= self.weight_decay < math.inf, f"--weight-decay {self.weight_decay}: give 0 or more")
        require(0 <= self.label_smoothing < 1, f"--label-smoothing {self.label_smoothing}: give 0 up to below 1")
        require(0 <= self.clip_norm < math.inf, f"--clip-norm {self.clip_norm}: give 0 or more")
        require(0 <= self.ema_decay < 1, f"--ema-decay {self.ema_decay}: give 0 up to below 1")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cpu also works under several processes."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware has it, else fp16 on CUDA, else fp32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = True
    """Keep activations and filters in NHWC order."""
    sync_bn: bool = False
    """BatchNorm statistics over the global batch instead of each process's share."""
    deterministic: bool = False
    """Bit-exact repeatability on the same machine and number of processes."""
    seed: int = 0
    """Seed of the initial weights, the order, the augmentation and the validation split."""
    process_group_timeout: float = 120.0
    """Seconds after which a process that waits in vain for another one gives up."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"--seed {self.seed}: give a whole number from 0 to 2^63 - 1")
        timeout = self.process_group_timeout
        require(0 < timeout <= WEEK, f"--process-group-timeout {timeout}: give seconds above 0, up to {WEEK} (a week)")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    out: Path | None = None
    """Run directory; by default runs/RECIPE-TIMESTAMP."""
    resume: bool = False
    """Go on from the newest good checkpoint in --out; start anew where there is none."""
    checkpoint_every_steps: int = 0
    """Save the training state every so many steps; 0: at epoch ends only."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints that are kept."""
    profile: int = 0
    """Trace this many steps of the main process with torch's profiler, after a few that warm up; 0: none."""

    def __post_init__(self) -> None:
        require(self.checkpoint_every_steps >= 0, "--checkpoint-every-steps: give 0 or more")
        require(self.keep_checkpoints >= 1, f"--keep-checkpoints {self.keep_checkpoints}: give at least 1")
        require(self.profile >= 0, f"--profile {self.profile}: give a number of steps, 0 or more")
        require(not self.resume or self.out is not None, "--resume: name the run to go on with by --out DIR")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    trackers: str = "wandb"
    """Comma-separated: wandb, tensorboard. The JSON lines are always written."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: as WANDB_MODE says, else online with an API key, offline without one. WANDB_PROJECT, WANDB_ENTITY and
    WANDB_NAME are obeyed; without them the project is ddp-trainer, and the name that of the run directory."""
    wandb_group: str | None = None
    """Group of the W&B run, such as the experiment that several seeds belong to; by default WANDB_RUN_GROUP."""
    wandb_job_type: str | None = None
    """Job type of the W&B run; by default WANDB_JOB_TYPE, else train."""
    wandb_tags: str | None = None
    """Comma-separated tags of the W&B run; by default WANDB_TAGS."""

    def __post_init__(self) -> None:
        unknown = set(self.tracker_names) - {"wandb", "tensorboard"}
        require(not unknown, f"--trackers {self.trackers}: unknown {', '.join(sorted(unknown))}; "
                             "choose from wandb, tensorboard")  # fmt: skip
        require("tensorboard" not in self.tracker_names or importlib.util.find_spec("tensorboard") is not None,
                "--trackers tensorboard: not installed here; run `pip install tensorboard`")  # fmt: skip
        for tag in self.tags or ():
            require(len(tag) <= 64, f"--wandb-tags: {tag} is longer than the 64 characters that W&B takes")

    @property
    def tracker_names(self) -> tuple[str, ...]:
        return split_names(self.trackers)

    @property
    def tags(self) -> tuple[str, ...] | None:
        return None if self.wandb_tags is None else split_names(self.wandb_tags)


def split_names(text: str) -> tuple[str, ...]:
    """Comma-separated names, without blanks and empty ones."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One complete configuration. Flags on the command line are the fields of its sections, flat."""

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
        """All settings by flag name, with underscores, as JSON values."""
        values: dict[str, Any] = {}
        for section in dataclasses.fields(self):
            part = getattr(self, section.name)
            if dataclasses.is_dataclass(part) and not isinstance(part, type):
                values |= dataclasses.asdict(part)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def fixed_on_resume(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run it goes on with."""
        return {name: value for name, value in self.flat().items() if name not in FREE_ON_RESUME}
