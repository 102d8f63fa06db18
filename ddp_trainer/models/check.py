"""Checks a network before the first step: tries to train it at each crop size, and to evaluate it.

Most problems with a network of your own are reported here in one line. Without these checks, you would see a traceback
from the middle of a step.
"""

import torch
from torch import Tensor, nn

from data_prep.errors import InputError, require
from data_prep.sources import name_some
from ddp_trainer.models.host_generators import kept_host_generators
from ddp_trainer.models.initial_weights import load_tensors
from ddp_trainer.models.registry import describe_error
from ddp_trainer.models.trial_pass import trial_passes

MAX_IMAGES = 2  # in a pass; BatchNorm may need two to compute a variance


def check_network(
    network: nn.Module,
    name: str,
    *,
    num_classes: int,
    sides: list[int],
    images_per_pass: int = MAX_IMAGES,
    channels_last: bool = True,
) -> list[str]:
    """Names of the trainable parameters that get no gradient; usually none.

    `sides`: sides in pixels of the square images that the network will see. `images_per_pass`: the smallest number of
    images that it will see at once in training. Raises InputError if the network cannot be trained, evaluated and
    saved: for example, if no parameter is trainable, or if the output is not (N, num_classes) finite logits. Leaves the
    network and the random generators on the host unchanged. The check uses float32 without autocast, as `predict` and
    exports do.
    """
    _check_tensors(network, name)
    require(
        not channels_last or all(value.ndim != 5 for value in (*network.parameters(), *network.buffers())),
        f"--network {name} has tensors with 5 dimensions, which torch.channels_last does not support; add "
        "--no-channels-last",
    )
    buffers, unsaved = _buffers_and_shapes(network), _unsaved_buffers(network)
    with kept_host_generators(), trial_passes(network):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed the GPUs
        for side in sides:
            images = torch.randn(min(images_per_pass, MAX_IMAGES), 3, side, side, dtype=torch.float32)
            output = _run(network.train(), name, images, channels_last=channels_last)
            _backward(_logits_of(output, name, images, num_classes), name)
            _check_buffers(network, name, buffers)
        _check_unsaved(network, name, unsaved)
        unused = [key for key, value in network.named_parameters() if value.requires_grad and value.grad is None]
        with torch.no_grad():
            for count in (1, MAX_IMAGES):  # the last batch of an evaluation may have a single image
                images = torch.randn(count, 3, max(sides), max(sides), dtype=torch.float32)
                output = _run(network.eval(), name, images, channels_last=channels_last)
                _logits_of(output, name, images, num_classes)
                _check_buffers(network, name, buffers)
        return unused


def check_rebuilt(network: nn.Module, rebuilt: nn.Module, name: str, *, side: int) -> None:
    """Raises InputError unless `rebuilt` can load the weights of `network` and then gives the same logits.

    The two networks must not share parameters. `rebuilt`: the same network, built again. Every command that loads the
    trained model builds the network in this way. Changes `rebuilt`, but neither `network` nor the random generators on
    the host.
    """
    own, others = (set(map(id, built.parameters())) for built in (network, rebuilt))
    reuses = "returns layers that its function has returned before; create all layers in each call"
    require(own.isdisjoint(others), f"--network {name} {reuses}")
    try:
        load_tensors(rebuilt, network.state_dict())
    except Exception as error:
        raise InputError(f"--network {name} cannot load its own state_dict: {describe_error(error)}") from error
    with kept_host_generators(), trial_passes(network), torch.no_grad():
        torch.default_generator.manual_seed(0)
        images = torch.randn(MAX_IMAGES, 3, side, side, dtype=torch.float32)
        logits, loaded = (_evaluate(each, name, images) for each in (network, rebuilt))
    require(
        torch.allclose(logits, loaded, rtol=1e-3, atol=1e-4),
        f"--network {name} gives other logits when it is built again and loads the same weights; save every tensor "
        "that differs between calls, for example random numbers in a buffer, with persistent=True",
    )


def _evaluate(network: nn.Module, name: str, images: Tensor) -> Tensor:
    """The logits for images in contiguous order, as in `predict`."""
    with kept_host_generators():  # if the network draws random numbers in evaluation, the next call draws the same ones
        logits = _run(network.eval(), name, images, channels_last=False)
    assert isinstance(logits, Tensor)
    return logits


def _check_tensors(network: nn.Module, name: str) -> None:
    others = [key for key, value in network.state_dict().items() if not isinstance(value, Tensor)]
    require(not others, f"--network {name} has a state_dict with values that are not tensors: {', '.join(others)}")
    tensors = dict([*network.named_parameters(), *network.named_buffers()])
    inference = [key for key, value in tensors.items() if value.is_inference()]
    fix = "build the network outside torch.inference_mode()"
    require(not inference, f"--network {name} has inference tensors, such as {', '.join(inference[:1])}; {fix}")
    _check_storage(network, name)
    _check_gaps(network, name)
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    require(bool(trainable), f"--network {name} has no trainable parameter")
    devices = {str(value.device) for value in tensors.values()}
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


def _check_storage(network: nn.Module, name: str) -> None:
    """Raises InputError if a tensor is not dense, if its elements share memory, or if safetensors cannot store it."""
    from safetensors.torch import save

    for key, value in (*network.state_dict().items(), *network.named_buffers()):
        is_dense = value.layout == torch.strided
        require(is_dense, f"--network {name}: {key} must be a dense tensor, got {value.layout}; use to_dense()")
        repeats = any(step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True))
        fix = "for example after expand(); add .clone()"
        require(not repeats, f"--network {name}: elements of {key} share memory, {fix}")
    for key, value in network.state_dict().items():
        try:
            save({key: torch.empty(0, dtype=value.dtype, device="cpu")})  # the default device may be another one
        except Exception:  # safetensors raises KeyError, and torch may raise other exceptions
            fix = "use another type, or register the buffer with persistent=False"
            raise InputError(
                f"--network {name}: {key} has the type {value.dtype}, which safetensors cannot store; {fix}"
            ) from None


def _check_gaps(network: nn.Module, name: str) -> None:
    """Raises InputError if a trainable parameter has gaps: on the CPU, torch's fused optimizers ignore strides."""
    for key, value in network.named_parameters():
        # `empty_like` keeps the strides of a tensor only if its elements have no gaps between them and do not overlap.
        fills_memory = value.stride() == torch.empty_like(value, device="meta").stride()
        require(
            fills_memory or not value.requires_grad,
            f"--network {name}: elements of {key} overlap or have gaps between them in memory, for example after "
            "slicing; add .clone()",
        )


def _buffers_and_shapes(network: nn.Module) -> dict[str, tuple[Tensor, torch.Size]]:
    return {key: (value, value.shape) for key, value in network.named_buffers()}


def _check_buffers(network: nn.Module, name: str, before: dict[str, tuple[Tensor, torch.Size]]) -> None:
    """Raises InputError if a forward pass has replaced or resized buffers: the trainer restores buffers in place."""
    after = _buffers_and_shapes(network)
    kept = {key for key in before.keys() & after.keys() if before[key][0] is after[key][0]}
    changed = [key for key in {**before, **after} if key not in kept or before[key][1] != after[key][1]]
    require(
        not changed,
        f"--network {name} creates, replaces or resizes buffers in its forward pass ({name_some(changed)}); create "
        "them in __init__ and update them in place, for example with copy_, or use another network",
    )


def _unsaved_buffers(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that are not in the state_dict."""
    saved = network.state_dict().keys()
    return {key: value.clone() for key, value in network.named_buffers() if key not in saved}


def _check_unsaved(network: nn.Module, name: str, before: dict[str, Tensor]) -> None:
    """Raises InputError if training has changed buffers that are not saved: see `_unsaved_buffers`."""
    after = _unsaved_buffers(network)
    # NaN differs from itself. So without `value == value`, a NaN that has not changed would count as changed.
    changed = [key for key, value in after.items() if ((value != before[key]) & (value == value)).any()]
    require(
        not changed,
        f"--network {name} changes unsaved buffers in training ({', '.join(changed)}); register them with "
        "persistent=True",
    )


def _run(network: nn.Module, name: str, images: Tensor, *, channels_last: bool) -> object:
    """The output. If the network fails only in channels-last order, the error message says so."""
    given = images.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    try:
        output = network(given)
    except Exception as error:
        shape = "x".join(map(str, images.shape))
        try:
            network(images.clone())
        except Exception:
            reason = describe_error(error)
            if "more than 1 value per channel" in reason:
                reason += "; some forward passes would get only one image, so raise --batch-size or lower --accumulate"
            raise InputError(f"--network {name} fails on images of shape {shape}: {reason}") from error
        raise InputError(f"--network {name} does not work in channels-last order; add --no-channels-last") from error
    fix = "start its forward pass with x = x.clone()"
    require(torch.equal(given, images), f"--network {name} changes its input in place; {fix}")
    return output


def _backward(logits: Tensor, name: str) -> None:
    try:
        logits.sum().backward()
    except Exception as error:
        raise InputError(f"--network {name} fails in its backward pass: {describe_error(error)}") from error


def _logits_of(logits: object, name: str, images: Tensor, num_classes: int) -> Tensor:
    """`logits`, if they are right for `images`. Raises InputError otherwise."""
    training = torch.is_grad_enabled()
    mode = "training" if training else "evaluation"
    if not isinstance(logits, Tensor):
        raise InputError(f"--network {name} must return a tensor of logits in {mode}, got {type(logits).__name__}")
    expected, found = (len(images), num_classes), tuple(logits.shape)
    require(
        found == expected,
        f"--network {name} must return logits of shape {expected} in {mode} ({num_classes} classes, images of shape "
        f"{'x'.join(map(str, images.shape))}), got {found}",
    )
    require(
        not training or logits.requires_grad,
        f"--network {name} returns logits that depend on no trainable parameter, for example because of detach()",
    )
    require(bool(logits.isfinite().all()), f"--network {name} returns NaN or infinity with its initial weights")
    return logits
