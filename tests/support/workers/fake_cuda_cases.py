"""Settings of the steps and runs that `test_fake_cuda.py` tests on a library that imitates CUDA."""

from collections.abc import Callable

import torch
from torch import Tensor

from ddp_trainer.recipes import RECIPES
from tests.support.narrow import WIDTHS, Sections, changed

# Changes to the recipe `fast`. With each change, the test counts the operations in one step without a graph, and the
# waits of the host during that step.
OPTIONS: dict[str, Sections] = {
    "deterministic": {"runtime": {"deterministic": True}},
    "fp16": {"runtime": {"precision": "fp16"}},
    "fp32": {"runtime": {"precision": "fp32", "channels_last": False}},
    "accumulate": {"schedule": {"accumulate": 2}},
    "ema and clip": {"optim": {"ema_decay": 0.9, "clip_norm": 1.0}},
    "adamw": {"optim": {"optimizer": "adamw", "head_lr": None, "bias_lr": None}},
    "mixup and jitter": {"augment": {"mixup": 1.0, "brightness": 0.1, "contrast": 0.1}},
    "cutmix": {"augment": {"cutmix": 1.0}},
}

# Careless changes to a step. Each one makes the host wait.
CARELESS: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda losses: losses * losses.sum().item(),
    "tensor from the host": lambda losses: losses * torch.tensor(1.0, device=losses.device),
    "copy to the host": lambda losses: losses.cpu().to(losses.device),
}


# Three epochs of ten steps (640 images), on crops of 16, 24 and 32 pixels.
PLAN: Sections = {"schedule": {"batch_size": 64, "epochs": 3, "small_crops": "16:0.35,24:0.7", "freeze_late": ""}}
NARROW: Sections = {"network": {"widths": WIDTHS}}
FAST, BASELINE = (changed(RECIPES[name], PLAN, NARROW) for name in ("fast", "baseline"))
FREEZE_LATE: Sections = {"schedule": {"freeze_late": "features.0.*,features.1.*", "freeze_late_between": (0.6, 0.8)}}

# Whole runs whose steps are captured in CUDA graphs.
CAPTURED = {
    "muon": FAST,
    "sgd": BASELINE,
    "adamw": changed(BASELINE, {"optim": {"optimizer": "adamw", "peak_lr": 1e-3}}),
    "ema and clip": changed(FAST, {"optim": {"ema_decay": 0.9, "clip_norm": 1.0}}),
    "mixup and jitter": changed(BASELINE, {"augment": {"mixup": 1.0, "brightness": 0.1, "contrast": 0.1}}),
    "cutmix": changed(BASELINE, {"augment": {"cutmix": 1.0}}),
    "balanced batches": changed(FAST, {"data": {"balance": "batches"}}),
    "balanced loss": changed(FAST, {"data": {"balance": "weights"}}),
    "deterministic": changed(FAST, {"runtime": {"deterministic": True}}),
    "freeze late": changed(FAST, FREEZE_LATE),
    "torchvision": changed(
        RECIPES["baseline"],
        PLAN,
        {"network": {"network": "torchvision:resnet18"}, "schedule": {"small_crops": ""}},
    ),
}

OWN: Sections = {"network": {"widths": (64, 128, 256, 512), "activation": "relu"}, "schedule": {"small_crops": ""}}

# Whole runs whose first capture fails. There is no second attempt.
NOT_CAPTURED = {
    name: changed(BASELINE, OWN, {"network": {"network": f"tests.support.graph_networks:{network}"}})
    for name, network in (("random numbers on the host", "StochasticDepth"), ("wait in backward", "WaitsInBackward"))
}

# Whole runs whose steps are not captured.
EAGER = {
    "fp16": changed(FAST, {"runtime": {"precision": "fp16"}}),
    "accumulate": changed(FAST, {"schedule": {"accumulate": 2}}),
    "graph off": changed(FAST, {"runtime": {"graph": "off"}}),
    "random numbers without graphs": changed(NOT_CAPTURED["random numbers on the host"], {"runtime": {"graph": "off"}}),
}

# Runs of several ranks, which end after the first of three epochs.
RANKS = {
    "ranks": FAST,
    "freeze late": changed(FAST, FREEZE_LATE, {"schedule": {"freeze_late_between": (0.1, 0.2)}}),
    "synchronized batchnorm": changed(FAST, {"runtime": {"sync_bn": True}}),
    "compressed gradients": changed(FAST, {"runtime": {"gradient_compression": "bf16"}}),
}
