"""Saves and restores the states of torch's random generators, from which dropout draws its numbers."""

import torch
from torch import Tensor


def random_state(device: torch.device) -> Tensor:
    """State of the generators for the CPU and, if `device` is a GPU, for that GPU: (L,) uint8 on `device`."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states).to(device)


def restore_random_state(state: Tensor, device: torch.device) -> None:
    """Restores what `random_state` returned. Does nothing if the state is from another kind of device."""
    sizes = [len(torch.get_rng_state())]
    if device.type == "cuda":
        sizes.append(len(torch.cuda.get_rng_state(device)))
    if len(state) == sum(sizes):
        own = [part.cpu().clone() for part in state.split(sizes)]  # clones, because torch ignores a view's offset
        torch.set_rng_state(own[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(own[1], device)
