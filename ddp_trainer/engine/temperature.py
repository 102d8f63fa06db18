"""Temperature scaling: calibrates the probabilities of a trained network by dividing its logits by one number."""

import math

from torch import Tensor

from ddp_trainer.engine.evaluation import finite_rows
from ddp_trainer.models.spec import TEMPERATURES

NUM_HALVINGS = 60  # of the search interval, so that the result has all digits of float64


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T for which softmax(logits / T) gives `labels` (N,) the highest likelihood; logits are (N, C).

    The predicted classes stay the same (Guo et al., arXiv 1706.04599). The mean negative log-likelihood is a convex
    function of 1 / T, so its slope is zero at one point, which is found by bisection. The result is deterministic and
    the same on every rank.

    Images with a logit that is not finite are ignored. Returns 1 if all other images are classified correctly: the
    likelihood then has no maximum, but rises as T falls to 0. If the likelihood would be higher beyond one of the two
    limits in TEMPERATURES, the result is that limit.
    """
    is_finite = finite_rows(logits)
    logits, labels = logits[is_finite].double().cpu(), labels[is_finite].cpu()
    if bool((logits.argmax(dim=1) == labels).all()):
        return 1.0
    true = logits.gather(1, labels[:, None])[:, 0]

    def slope(temperature: float) -> float:
        """Derivative of the negative log-likelihood with respect to 1 / T."""
        expected = ((logits / temperature).softmax(dim=1) * logits).sum(dim=1)
        return (expected - true).mean().item()

    low, high = map(math.log, TEMPERATURES)
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        if slope(math.exp(middle)) > 0:  # the network is overconfident at this temperature
            low = middle
        else:
            high = middle
    smallest, largest = TEMPERATURES
    return min(max(math.exp((low + high) / 2), smallest), largest)
