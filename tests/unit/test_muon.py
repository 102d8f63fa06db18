"""Muon's step equals its formula in singular values, and other parameters take the step of torch's SGD."""

import pytest
import torch
from torch import Tensor, nn

from ddp_trainer.engine.muon import COEFFICIENTS, Muon, orthogonalize


def reference(matrix: Tensor, steps: int) -> Tensor:
    """Applies the polynomial of `orthogonalize` to the singular values."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / s.norm()
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ s.diag() @ vh


@pytest.mark.parametrize("shape", [(6, 6), (5, 40), (40, 5)])
def test_orthogonalize_applies_the_polynomial_to_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalize(matrix, steps=3), reference(matrix, 3), rtol=0, atol=1e-12)


def test_zero_gradient_gives_a_zero_step() -> None:
    assert orthogonalize(torch.zeros(3, 9), steps=3).tolist() == [[0.0] * 9] * 3


def filters_and_gradients(count: int = 3) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(8, 4, 3, 3, dtype=torch.float64, generator=generator) for _ in range(count + 1)]
    return draw[0], draw[1:]


def filters_after(start: Tensor, gradients: list[Tensor]) -> Tensor:
    """Returns the filters after one step of Muon for each gradient."""
    filters = nn.Parameter(start.clone(memory_format=torch.preserve_format))
    optimizer = Muon([{"params": [filters], "muon": "filters"}], lr=0.24)
    for gradient in gradients:
        filters.grad = torch.empty_like(filters).copy_(gradient)
        optimizer.step()
    return filters.detach()


def test_filters_take_the_step_of_airbench() -> None:
    start, gradients = filters_and_gradients()
    expected, average = start.clone(), torch.zeros_like(start)
    for gradient in gradients:
        average = 0.6 * average + gradient
        direction = reference((gradient + 0.6 * average).flatten(1), 3).view_as(start)
        expected = expected * (8**0.5 / expected.norm()) - 0.24 * direction
    torch.testing.assert_close(filters_after(start, gradients), expected, rtol=0, atol=1e-12)


def test_memory_format_of_the_filters_does_not_matter() -> None:
    start, gradients = filters_and_gradients()
    channels_last = start.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(
        filters_after(channels_last, gradients), filters_after(start, gradients), rtol=0, atol=1e-12
    )


def test_gradient_scale_is_divided_out() -> None:
    """The gradients are scaled as by a gradient scaler, with a scale that changes from step to step."""
    start, gradients = filters_and_gradients()

    def state(scales: list[float]) -> list[Tensor]:
        filters, bias = nn.Parameter(start.float()), nn.Parameter(torch.zeros(4))
        optimizer = Muon([{"params": [filters], "muon": "filters"}, {"params": [bias]}], lr=0.24)
        for gradient, scale in zip(gradients, scales, strict=True):
            filters.grad, bias.grad = scale * gradient.float(), scale * gradient[0, :, 0, 0].float()
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)  # type: ignore[attr-defined]
            optimizer.step()
        return [filters.detach(), bias.detach(), *(slot["momentum_buffer"] for slot in optimizer.state.values())]

    unscaled = state([1.0, 1.0, 1.0])
    assert all(torch.equal(one, other) for one, other in zip(state([1024.0, 512.0, 2048.0]), unscaled, strict=True))


def test_other_parameters_take_the_step_of_sgd() -> None:
    start = torch.randn(5, 7, generator=torch.Generator().manual_seed(2))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        Muon([{"params": [ours], "weight_decay": 0.1}], lr=0.5),
        torch.optim.SGD([theirs], lr=0.5, momentum=0.85, nesterov=True, weight_decay=0.1, fused=True),
    ]
    for seed in range(4):
        gradient = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(ours, theirs)
