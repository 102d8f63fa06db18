"""Checks before the first step that a network works in the precision and on the device of the run."""

import torch
from torch import Tensor, nn

from data_prep.errors import InputError
from data_prep.machine_limits import lacks_memory
from ddp_trainer.models.host_generators import kept_host_generators
from ddp_trainer.models.registry import describe_error
from ddp_trainer.models.trial_pass import trial_passes

NOT_DETERMINISTIC = "does not have a deterministic implementation"  # in torch's message for such an operation


def check_autocast(network: nn.Module, name: str, images: Tensor, *, precision: str) -> None:
    """Raises InputError if `network` cannot be trained and evaluated on `images` in autocast.

    Two errors of the passes are raised as they are: too little memory, and an operation that is not deterministic.

    `images`: in the memory order of the run. They and the network must be on the device of the run, because autocast
    differs between devices. `precision`: bf16 or fp16. Leaves the network and the random generators unchanged.
    """
    devices = [images.device] if images.is_cuda else []
    with kept_host_generators(), torch.random.fork_rng(devices=devices), trial_passes(network):
        try:
            _try_passes(network, images, precision)
        except Exception as error:
            if lacks_memory(error) or NOT_DETERMINISTIC in str(error):
                raise
            reason = describe_error(error)
            try:
                _try_passes(network, images, "fp32")
            except Exception:
                raise InputError(f"--network {name} fails on the device {images.device}: {reason}") from error
            fix = "use --precision fp32"
            raise InputError(f"--network {name} fails with --precision {precision} ({reason}); {fix}") from error


def _try_passes(network: nn.Module, images: Tensor, precision: str) -> None:
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16

    def autocast() -> torch.autocast:  # a new one for each pass: autocast keeps the weights that it has converted
        return torch.autocast(images.device.type, dtype, enabled=precision != "fp32")

    with autocast(), torch.no_grad():
        network.eval()(images)
    with autocast():
        logits = network.train()(images)
    logits.float().sum().backward()
