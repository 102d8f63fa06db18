"""Valid and faulty networks as a user could write them, for `--network tests.support.networks:NAME`."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def plain(num_classes: int) -> nn.Module:
    """A network without normalization."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, num_classes))


def small(num_classes: int) -> nn.Sequential:
    """A network with two kinds of BatchNorm, dropout and a hidden linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Linear(16, num_classes),
    )


partial = functools.partial(small)


def in_evaluation_mode(num_classes: int) -> nn.Module:
    return small(num_classes).eval()


class Buffers(nn.Module):
    """Has unused parameters, frozen parameters, and two buffers that change in training mode (one is an integer)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body, self.norm = nn.Conv2d(3, 8, 3, stride=4), nn.GroupNorm(2, 8)
        self.frozen = nn.Conv2d(8, 8, 1).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(8, num_classes)
        self.steps: Tensor
        self.average: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(F.relu(self.norm(self.body(x)))).mean(dim=(2, 3))
        if self.training:
            self.steps += 1
            self.average.lerp_(x.detach().mean(dim=0).float(), 0.1)
        return self.head(x + self.average)


class Tied(nn.Module):
    """Two layers share one weight."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)
        self.second.weight = self.first.weight
        self.head = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x, 8)
        x = pooled.reshape(len(x), 48)
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


class OnlyContiguous(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.view(x.size(0), -1))


def other_shape(num_classes: int) -> nn.Module:
    return plain(num_classes + 1)


class Endless(nn.Module):
    """Returns logits that are not finite."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = plain(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * torch.inf


class TwoOutputs(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = plain(num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.body(x)
        return logits, logits


class TwoOutputsInEvaluation(TwoOutputs):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.body(x) if self.training else super().forward(x)


class Squeezes(nn.Module):
    """Squeezes out height and width and, if there is only one image, the batch dimension as well."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(x, 1).squeeze())


class ReplacesBuffer(nn.Module):
    """Assigns a new tensor to a buffer instead of changing the buffer in place."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = plain(num_classes)
        self.level: Tensor
        self.register_buffer("level", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.level = 0.9 * self.level + 0.1 * x.detach().mean()
        return self.head(x - self.level)


class ReplacesBufferInEvaluation(ReplacesBuffer):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) if self.training else super().forward(x)


class FailsInBackward(nn.Module):
    """Changes in place a tensor that the backward pass needs."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = plain(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x).sigmoid()
        return logits + logits.mul_(2)


def with_depth(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv3d(3, 4, 1), nn.Flatten(), nn.Linear(4096, num_classes))


def lazy(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


class CreatesBuffer(nn.Module):
    """Creates a buffer in its first forward pass."""

    ramp: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = plain(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "ramp"):
            self.register_buffer("ramp", torch.linspace(0, 1, x.size(3)))
        return self.head(x + self.ramp)


class SavesNumber(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = plain(num_classes)

    def get_extra_state(self) -> int:
        return 7

    def set_extra_state(self, state: object) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def with_buffer(num_classes: int, buffer: Tensor, *, persistent: bool = True) -> nn.Module:
    """A network with a buffer that it does not use."""
    network = plain(num_classes)
    network.register_buffer("extra", buffer, persistent=persistent)
    return network


with_complex_buffer = functools.partial(with_buffer, buffer=torch.zeros(3, dtype=torch.complex128))
with_complex_buffer_that_is_not_saved = functools.partial(with_complex_buffer, persistent=False)
with_sparse_buffer = functools.partial(with_buffer, buffer=torch.eye(3).to_sparse())
with_sparse_buffer_that_is_not_saved = functools.partial(with_sparse_buffer, persistent=False)


class Hooked(nn.Module):
    """A hook doubles the input of the whole network."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = small(num_classes)
        self.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Fails(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(7, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def cannot_be_built(num_classes: int) -> nn.Module:
    raise ValueError(f"no weights for {num_classes} classes")


def frozen(num_classes: int) -> nn.Module:
    return plain(num_classes).requires_grad_(False)


def half(num_classes: int) -> nn.Module:
    return plain(num_classes).half()


def double(num_classes: int) -> nn.Module:
    return plain(num_classes).double()


def no_module(num_classes: int) -> str:
    return f"{num_classes} classes"


def on_another_device(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes, device="meta"))
