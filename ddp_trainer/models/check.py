"""Checks that a network can be trained: before the first step, takes a forward and backward pass at each crop size.

Most problems with a network of your own are reported here in one line. Without these checks, you would see a traceback
from the middle of a step.
"""

import torch
from torch import Tensor, nn

from data_prep.errors import InputError, require
from ddp_trainer.models.blank_pass import blank_passes

NUM_IMAGES = 2  # BatchNorm may need two to compute a variance


def check_network(
    network: nn.Module, name: str, *, num_classes: int, sides: list[int], channels_last: bool = True
) -> list[str]:
    """Names of the trainable parameters that get no gradient; usually none.

    `sides`: sides of the square images that the network will see. Raises InputError if no parameter is trainable, if a
    trainable parameter has a wrong type, if a tensor is not on the CPU, if the forward pass fails, or if the output is
    not (N, num_classes) finite logits. Leaves the network and torch's generators unchanged.
    """
    _check_parameters(network, name)
    with torch.random.fork_rng(devices=[]), blank_passes(network):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed the GPUs
        for side in sides:
            images = torch.randn(NUM_IMAGES, 3, side, side).to(next(network.parameters()).dtype)
            output = _run(network, name, images, channels_last=channels_last)
            _logits_of(output, name, num_classes=num_classes, side=side).sum().backward()
        return [key for key, value in network.named_parameters() if value.requires_grad and value.grad is None]


def _check_parameters(network: nn.Module, name: str) -> None:
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    require(bool(trainable), f"--network {name} has no trainable parameter")
    devices = {str(tensor.device) for tensor in (*network.parameters(), *network.buffers())}
    require(
        devices == {"cpu"},
        f"--network {name} must be built on the CPU (the trainer moves it to the device), "
        f"got {', '.join(sorted(devices))}",
    )
    types = {parameter.dtype for parameter in trainable}
    require(
        types == {torch.float32},
        f"--network {name} must have float32 parameters, got {', '.join(sorted(map(str, types)))}",
    )


def _run(network: nn.Module, name: str, images: Tensor, *, channels_last: bool) -> object:
    """The output in training mode. If the network fails only in channels-last order, the error message says so."""
    was_training = network.training
    order = torch.channels_last if channels_last else torch.contiguous_format
    try:
        return network.train()(images.contiguous(memory_format=order))
    except Exception as error:
        shape = "x".join(map(str, images.shape))
        try:
            network(images)
        except Exception:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(f"--network {name} fails on images of shape {shape}: {reason}") from error
        raise InputError(f"--network {name} does not work in channels-last order; add --no-channels-last") from error
    finally:
        network.train(was_training)


def _logits_of(logits: object, name: str, *, num_classes: int, side: int) -> Tensor:
    """`logits`, if a loss can be computed from them. Raises InputError otherwise."""
    if not isinstance(logits, Tensor):
        raise InputError(f"--network {name} must return a tensor of logits while training, got {type(logits).__name__}")
    expected, found = (NUM_IMAGES, num_classes), tuple(logits.shape)
    require(
        found == expected,
        f"--network {name} must return logits of shape {expected} for {num_classes} classes and "
        f"{NUM_IMAGES} images of {side} pixels, got {found}",
    )
    require(logits.requires_grad, f"--network {name} returns logits without a gradient")
    require(bool(logits.isfinite().all()), f"--network {name} returns logits that are not finite before the first step")
    return logits
