"""Checks before the first step that a network works in the precision and on the device of the run."""

import torch
from torch import Tensor, nn

from data_prep.errors import InputError
from ddp_trainer.models.blank_pass import blank_passes
from ddp_trainer.models.registry import describe_error


def check_autocast(network: nn.Module, name: str, images: Tensor, *, precision: str) -> None:
    """Raises InputError if `network` cannot be trained and evaluated on `images` in autocast.

    `images`: in the memory order of the run. They and the network must be on the device of the run, because autocast
    differs between devices. `precision`: bf16 or fp16. Leaves the network and torch's generators unchanged.
    """
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []), blank_passes(network):
        try:
            _try_passes(network, images, precision)
        except Exception as error:
            reason = describe_error(error)
            try:
                _try_passes(network, images, "fp32")
            except Exception:
                raise InputError(f"--network {name} fails on the device {images.device}: {reason}") from error
            fix = "use --precision fp32"
            raise InputError(f"--network {name} fails with --precision {precision} ({reason}); {fix}") from error


def _try_passes(network: nn.Module, images: Tensor, precision: str) -> None:
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(images.device.type, dtype, enabled=precision != "fp32"):
        network.eval()(images)
        logits = network.train()(images)
    logits.float().sum().backward()
