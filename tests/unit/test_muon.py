"""Muon's step equals that of a plain implementation; parameters without Muon take the step of torch's SGD."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddp_trainer.config import OptimConfig
from ddp_trainer.engine.flops import optimizer_flops_per_step
from ddp_trainer.engine.muon import Muon
from ddp_trainer.engine.newton_schulz import COEFFICIENTS, orthogonalize
from ddp_trainer.models.custom_resnet import CustomResNet


def reference(matrix: Tensor, steps: int) -> Tensor:
    """Applies the polynomial of `orthogonalize` to the singular values of `matrix`, `steps` times."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / s.norm()
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ s.diag() @ vh


def test_orthogonalize_applies_the_polynomial_to_the_singular_values() -> None:
    """The matrices are square, wide and tall. Two have the same shape, and a third has the transposed shape."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 6), (5, 40), (5, 7), (40, 5), (5, 40)]
    matrices = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    for matrix, result in zip(matrices, orthogonalize(matrices, steps=3), strict=True):
        assert result.is_contiguous()
        torch.testing.assert_close(result, reference(matrix, 3), rtol=0, atol=1e-12)


def test_orthogonalize_keeps_a_zero_matrix() -> None:
    assert orthogonalize([torch.zeros(3, 9)], steps=3)[0].tolist() == [[0.0] * 9] * 3


def plain_newton_schulz(x: Tensor, steps: int) -> Tensor:
    """The published Newton-Schulz iteration, on one matrix."""
    a, b, c = COEFFICIENTS
    tall = x.size(0) > x.size(1)
    x = x.mT if tall else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def plain_step(weights: Tensor, average: Tensor, gradient: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Weights and momentum of one parameter after a step of a plain implementation of Muon."""
    average = 0.6 * average + gradient
    matrix = (gradient + 0.6 * average).flatten(1)
    direction, (rows, columns) = plain_newton_schulz(matrix, 3).view_as(weights), matrix.shape
    if group["muon"] == "filters":
        return weights * (rows**0.5 / weights.norm()) - group["lr"] * direction, average
    kept = weights * (1 - group["lr"] * group["weight_decay"])
    return kept - group["lr"] * max(1.0, rows / columns) ** 0.5 * direction, average


@pytest.mark.parametrize("kind", ["filters", "matrix"])
def test_100_steps_equal_those_of_a_plain_implementation(kind: str) -> None:
    """Each gradient is a matrix of rank 6 plus noise, so many singular values are small, as in training."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(16, 8, 3, 3), (16, 8, 3, 3), (32, 3, 3, 3), (24, 2, 1, 1), (12, 12), (40, 10), (10, 40)]
    shapes = shapes[:4] if kind == "filters" else shapes
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    plain = [parameter.detach().clone() for parameter in ours]
    averages = [torch.zeros_like(one) for one in plain]
    optimizer = Muon([{"params": ours, "muon": kind, "weight_decay": 0.01}], lr=0.1)
    for _ in range(100):
        for place, parameter in enumerate(ours):
            rows, columns = parameter.flatten(1).shape
            left, right, noise = (
                torch.randn(*shape, generator=generator) for shape in ((rows, 6), (6, columns), (rows, columns))
            )
            parameter.grad = (left @ right + 0.01 * noise).view(parameter.shape)
            plain[place], averages[place] = plain_step(
                plain[place], averages[place], parameter.grad, optimizer.param_groups[0]
            )
        optimizer.step()
    for parameter, expected in zip(ours, plain, strict=True):
        assert (parameter - expected).norm() <= 1e-5 * expected.norm()


def test_operations_of_a_step_are_those_of_its_matrix_products() -> None:
    """With n > 1.5 m, 3 iterations on an (m, n) matrix take 2 products with it and 9 products of (m, m) matrices."""
    model = CustomResNet()
    shapes = [sorted(weights.flatten(1).shape) for weights in model.parameters() if weights.ndim == 4]
    expected = sum(2 * 2 * m * m * n + 9 * 2 * m**3 for m, n in shapes)
    assert optimizer_flops_per_step(model, OptimConfig(optimizer="muon")) == expected
    assert optimizer_flops_per_step(model, OptimConfig(optimizer="sgd")) == 0


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
    """The reference is the update of filters in airbench94_muon (see `Muon`)."""
    start, gradients = filters_and_gradients()
    expected, average = start.clone(), torch.zeros_like(start)
    for gradient in gradients:
        average = 0.6 * average + gradient
        direction = reference((gradient + 0.6 * average).flatten(1), 3).view_as(start)
        expected = expected * (8**0.5 / expected.norm()) - 0.24 * direction
    torch.testing.assert_close(filters_after(start, gradients), expected, rtol=0, atol=1e-12)


def test_filters_that_start_at_zero_are_trained() -> None:
    filters = torch.zeros(8, 4, 3, 3, requires_grad=True)
    optimizer = Muon([{"params": [filters], "muon": "filters"}], lr=0.1)
    filters.grad = torch.randn(filters.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert filters.isfinite().all() and filters.abs().max() > 0


def test_memory_format_of_the_filters_does_not_matter() -> None:
    start, gradients = filters_and_gradients()
    channels_last = start.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(
        filters_after(channels_last, gradients), filters_after(start, gradients), rtol=0, atol=1e-12
    )


def test_gradient_scale_is_divided_out() -> None:
    """Like a gradient scaler, the test multiplies the gradients by a scale that changes from step to step."""
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
