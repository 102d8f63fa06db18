"""The training loss, per image, with label smoothing, mixed images and weights of the classes."""

from torch import Tensor
from torch.nn import functional as F


def losses_per_image(
    logits: Tensor,
    labels: Tensor,
    partners: Tensor | None,
    weights: Tensor | None,
    *,
    label_smoothing: float,
    class_weights: Tensor | None = None,
) -> Tensor:
    """(N,) cross-entropy of logits (N, C) with labels (N,), not averaged.

    For mixed images (mixup, cutmix) `partners` (N,) are the labels of the second image and `weights` (N,) the share
    of the first; the loss is the weighted sum over both labels. `class_weights` (C,) multiply the loss of each label.
    A mean of these losses is taken over the images, not over the weights, so it does not depend on how a batch is
    split.
    """

    def loss_with(targets: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
        return losses if class_weights is None else losses * class_weights.to(losses.dtype)[targets]

    losses = loss_with(labels)
    if partners is None or weights is None:
        return losses
    return weights * losses + (1 - weights) * loss_with(partners)
