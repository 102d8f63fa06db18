"""The training loss of each image, with label smoothing, mixed images and class weights."""

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

    For mixed images (mixup, cutmix), `partners` (N,) are the labels of the second image and `weights` (N,) is the share
    of the first; the loss is the weighted sum over both labels. `class_weights` (C,) multiply the loss of each label.
    The caller divides the sum of these losses by the number of images. With reduction="mean", torch would divide it
    by the sum of the images' class weights, so the loss would depend on which images a rank gets.
    """

    def loss_with(targets: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
        return losses if class_weights is None else losses * class_weights.to(losses.dtype)[targets]

    losses = loss_with(labels)
    if partners is None or weights is None:
        return losses
    return weights * losses + (1 - weights) * loss_with(partners)
