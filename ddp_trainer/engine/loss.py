"""The training loss, per image, with label smoothing and mixed images."""

from torch import Tensor
from torch.nn import functional as F


def losses_per_image(
    logits: Tensor, labels: Tensor, partners: Tensor | None, weights: Tensor | None, *, label_smoothing: float
) -> Tensor:
    """(N,) cross-entropy of logits (N, C) with labels (N,), not averaged.

    For mixed images (mixup, cutmix) `partners` (N,) are the labels of the second image and `weights` (N,) the share
    of the first; the loss is the weighted sum over both labels.
    """
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    if partners is None or weights is None:
        return losses
    other = F.cross_entropy(logits, partners, reduction="none", label_smoothing=label_smoothing)
    return weights * losses + (1 - weights) * other
