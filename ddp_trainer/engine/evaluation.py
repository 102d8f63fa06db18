"""Exact evaluation: every image counts once, with any number of processes.

Each rank fills its own rows of tables that have a row for every image. The tables are then summed over the ranks, so
every rank computes the same loss, accuracy and probabilities.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.batch_ops import batch_normalize, center_crop
from data_prep.loader import ResidentLoader, StreamLoader
from data_prep.order import evaluation_batches
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.models.spec import ModelSpec
from ddp_trainer.models.trial_pass import image_dtype

# Images whose best two logits differ by at least this much skip test-time augmentation. For a model with 77 % accuracy,
# all 5,000 predictions were the same as if every image had been evaluated in six views, even with a margin of 1.
CERTAIN_MARGIN = 2.0
UNCERTAIN_STEP = 100  # the number of uncertain images is rounded up to a multiple of this


@dataclass(frozen=True)
class Evaluation:
    """What the model predicts for every evaluated image, in the order of `samples`."""

    samples: np.ndarray  # (N,) positions in the beton file
    labels: Tensor  # (N,) int64
    logits: Tensor  # (N, num_classes) float32
    logits_tta: Tensor | None = None  # logits with test-time augmentation: see `averaged_over_views`

    @property
    def total(self) -> int:
        return len(self.labels)

    @property
    def loss(self) -> float:
        return F.cross_entropy(self.logits.double(), self.labels).item()

    @property
    def num_finite(self) -> int:
        """Number of images whose logits are all finite."""
        return int(finite_rows(self.logits).sum())

    @property
    def correct(self) -> int:
        return int(hits(self.logits, self.labels).sum())

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the accuracies of all classes that have images."""
        totals = self._class_sizes()
        correct = self.labels[hits(self.logits, self.labels)].bincount(minlength=len(totals))
        return (correct[totals > 0].double() / totals[totals > 0]).mean().item()

    @property
    def largest_class_share(self) -> float:
        """Share of the images that belong to the largest class: the accuracy if this class is always predicted."""
        return self._class_sizes().max().item() / self.total

    def _class_sizes(self) -> Tensor:
        return self.labels.bincount(minlength=self.logits.size(1))

    @property
    def correct_tta(self) -> int | None:
        return None if self.logits_tta is None else int(hits(self.logits_tta, self.labels).sum())


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: whether the prediction is correct. Logits (N, C) that are not finite predict nothing."""
    return (logits.argmax(dim=1) == labels) & finite_rows(logits)


def finite_rows(logits: Tensor) -> Tensor:
    """(N,) bool: whether all logits (N, C) of an image are finite."""
    return logits.isfinite().all(dim=1)


class Evaluator:
    """Evaluates a model on fixed samples of one beton file, which are divided among all ranks."""

    def __init__(
        self,
        loader: StreamLoader | ResidentLoader,
        samples: np.ndarray,
        spec: ModelSpec,
        runtime: Runtime,
    ) -> None:
        self.loader, self.samples, self.spec, self.runtime = loader, samples, spec, runtime
        self.plan = evaluation_batches(
            samples, batch_size=loader.batch_size, rank=runtime.rank, world_size=runtime.world_size
        )

    @torch.no_grad()  # not inference_mode: a training step could not use tensors that a network keeps from it
    def run(self, model: nn.Module, *, tta: bool = False, poll: Callable[[], None] = lambda: None) -> Evaluation:
        """Evaluates every sample once. A collective operation.

        `model`: the network without its DDP wrapper. `poll` is called before each batch, and an exception in it ends
        the evaluation. All ranks call `poll` equally often if their batch sizes are equal.
        """
        was_training, device = model.training, self.runtime.device
        total, num_classes = len(self.samples), len(self.spec.classes)
        tables = [torch.zeros(total, num_classes, device=device) for _ in range(2 if tta else 1)]  # see `_logits`
        labels, seen = (torch.zeros(total, dtype=torch.int64, device=device) for _ in range(2))
        rows = torch.arange(self.runtime.rank, total, self.runtime.world_size, device=device)
        done = 0
        try:
            model.eval()
            for batch in self.loader.batches(self.plan):
                poll()
                own = rows[done : done + len(batch.labels)]
                if len(own):
                    # A batch may be too large to evaluate at once if it comes from the loader of the training images.
                    parts = batch.images.split(self.spec.evaluation_batch)
                    columns = zip(*(self._logits(model, part, tta=tta) for part in parts), strict=True)
                    for table, column in zip(tables, columns, strict=True):
                        table[own] = torch.cat(column).to(table.dtype)
                    labels[own] = batch.labels
                    seen[own] += 1
                    done += len(own)
        finally:
            model.train(was_training)
        for table in (labels, seen, *tables):
            self.runtime.sum_over_ranks(table)
        assert bool((seen == 1).all()), "an image was evaluated twice or not at all"
        return Evaluation(self.samples, labels, *tables)

    def _logits(self, model: nn.Module, images: Tensor, *, tta: bool) -> list[Tensor]:
        """(N, 3, H, W) uint8 -> (N, num_classes) logits and, if `tta`, those with test-time augmentation."""
        images = center_crop(images, self.spec.input_size)
        images = batch_normalize(images, self.spec.mean, self.spec.std, image_dtype(model))
        images = self.runtime.laid_out(images)
        with self.runtime.autocast():
            # Runs the model with its hooks, but not compiled, because torch.compile would compile for each batch size.
            forward: Callable[[Tensor], Tensor] = model._call_impl  # type: ignore[assignment]
            plain = forward(images).to(torch.promote_types(images.dtype, torch.float32))  # at least float32
            if not tta:
                return [plain]
            mirror, shift = self.spec.flip != "none", self.spec.shift
            return [plain, averaged_over_views(forward, images, plain, mirror=mirror, shift=shift)]


def averaged_over_views(
    model: Callable[[Tensor], Tensor], images: Tensor, plain: Tensor, *, mirror: bool, shift: bool
) -> Tensor:
    """(N, C) logits of images (N, 3, H, W), averaged over up to six views where `plain` (N, C) is uncertain.

    One view is the image itself. With `shift`, two more are the image moved diagonally by one pixel (up-left and
    down-right). With `mirror`, the mirror image of each is a view, too. The unmoved views together count as much as the
    moved ones together (airbench, arXiv 2404.00498: multi-crop).

    An image whose best two `plain` logits differ by CERTAIN_MARGIN or more keeps its `plain` logits, since views rarely
    change such a prediction. The idea is from hiverge/cifar10-speedrun, but that project selects a fixed share of the
    images. With a fixed share, the prediction for an image would depend on the rest of its batch.
    """
    best = plain.topk(min(2, plain.size(1)), dim=1).values
    margins = best[:, 0] - best[:, -1]
    count = int((margins < CERTAIN_MARGIN).sum())
    if count == 0:
        return plain
    # Convolutions are tuned for each new batch size, which takes time. So the count is rounded up, and the results for
    # the extra images are dropped.
    size = min(-(-count // UNCERTAIN_STEP) * UNCERTAIN_STEP, len(images))
    uncertain = margins.argsort(stable=True)[:size]

    def with_mirror_image(view: Tensor, logits: Tensor) -> Tensor:
        return (logits + model(view.flip(3)).to(plain)) / 2 if mirror else logits

    chosen = images[uncertain]
    views = with_mirror_image(chosen, plain[uncertain])
    if shift:
        padded = F.pad(chosen, (1, 1, 1, 1), mode="reflect")
        # The slices are copied, because a network that reshapes its input may need images without gaps in memory.
        moved = (padded[:, :, :-2, :-2].clone(), padded[:, :, 2:, 2:].clone())
        up_left, down_right = (with_mirror_image(view, model(view).to(plain)) for view in moved)
        views = views / 2 + (up_left + down_right) / 4
    return plain.index_copy(0, uncertain[:count], views[:count])
