"""Chooses the number of parts into which --accumulate auto splits each process's share of a batch.

In this file, a pass is a forward and a backward pass over one part. The memory that an image needs is measured during
passes over a few images, with the real network on its device. Trying large passes instead is not possible on the CPU,
where Linux kills a process that needs too much memory. On a GPU, a pass of the chosen size is tried after the
measurement, but not with --sync-bn.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_prep.dataset import DatasetInfo
from data_prep.errors import require
from data_prep.free_memory import free_memory
from data_prep.loader import resident_bytes
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.backend import explained_determinism
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.data import images_in_step
from ddp_trainer.engine.peak_memory import PeakMemory
from ddp_trainer.models.trial_pass import trial_images, trial_passes

# Share of the free memory that tensors may take up; the rest is for fragmentation and the workspaces of operations. On
# the CPU, a process used up to 1.5 times as much memory as its tensors (measured with resnet18 and 64 images of 224
# pixels). On a GPU, this ratio was not measured; a pass is tried instead.
MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.8}
FEW_IMAGES, MORE_IMAGES = 4, 8  # images in the two measured passes
# Upper bound on the copies of the weights that are allocated after the measurement: one for the gradients, two for the
# optimizer, one for the moving average, and four more while a checkpoint is written.
STATE_COPIES = 8
# Bytes for each value of a batch: uint8 copies in the loader, and float32 copies during the augmentation.
BATCH_BYTES = 16


class MemoryNeed(NamedTuple):
    """Bytes of memory that training allocates."""

    fixed: float  # the same for any number of passes
    per_image: float  # for each image of a pass

    def images_that_fit(self, available: float) -> int:
        """The largest number of images in a pass, if `available` bytes may be allocated; 0 if none fits."""
        return max(0, math.floor((available - self.fixed) / self.per_image))


def passes_to_try(images: int, *, fitting: int, smallest_share: int) -> range:
    """The numbers of passes to try on this rank, in ascending order.

    `images`: number of images that this rank divides among the passes. `fitting`: number of images that fit into memory
    in one pass. `smallest_share`: number of images on the rank that has the fewest.
    """
    return range(-(-images // fitting), most_passes(smallest_share) + 1) if fitting > 0 else range(0)


def most_passes(share: int) -> int:
    """The largest allowed number of passes over `share` images. BatchNorm may need two images in each pass."""
    return max(share // 2, 1)


def resolve_passes(
    config: TrainConfig,
    runtime: Runtime,
    dataset: DatasetInfo,
    network: nn.Module,
    *,
    saved: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """`config` with a number in place of --accumulate auto, the same on every rank. A collective operation.

    `saved`: the checkpoint to resume from. Its number of passes is kept if the number of processes is the same.
    May move `network` to its device, but does not change its values or any random state. Raises InputError if not even
    the smallest pass fits.
    """
    if config.schedule.accumulate != "auto":
        return config
    if saved is not None and len(saved["sums"]) == runtime.world_size:
        passes = saved["settings"]["accumulate"]
    else:
        passes = _fewest_passes(config, runtime, dataset, runtime.place(network))
    return replace(config, schedule=replace(config.schedule, accumulate=passes))


def _fewest_passes(config: TrainConfig, runtime: Runtime, dataset: DatasetInfo, model: nn.Module) -> int:
    """The smallest number of passes that fit into memory on every rank. `model`: on its device."""
    side, world_size = max(config.schedule.crop_sides(dataset.image_size)), runtime.world_size
    available = MEMORY_SHARE[runtime.device.type] * free_memory(runtime.device)
    need = _need(config, runtime, dataset, model, side=side)
    images, smallest = (images_in_step(config, rank, world_size) for rank in (runtime.rank, 0))
    numbers = passes_to_try(images, fitting=need.images_that_fit(available), smallest_share=smallest)
    # With --sync-bn, a rank that runs out of memory in a pass would leave the other ranks waiting.
    is_tried = runtime.device.type == "cuda" and not config.runtime.sync_bn
    sizes = ((number, (-(-images // number), side)) for number in numbers)
    own = (number for number, size in sizes if not is_tried or has_room(model, runtime, size, need.fixed))
    least = need.fixed + need.per_image * math.ceil(images / most_passes(smallest))  # bytes for the smallest pass
    answer = torch.tensor([next(own, math.inf), least, available], dtype=torch.float64)
    answers = runtime.gather(answer.to(runtime.device)).cpu()
    rank = int(answers[:, 0].argmax())
    passes, needed, available = answers[rank].tolist()
    require(
        passes < math.inf,
        f"--accumulate auto: on rank {rank}, even the smallest passes over images of {side} pixels do not fit into "
        f"memory (they need about {needed / 1e9:.2f} GB, and this rank may use {available / 1e9:.2f} GB); "
        "use a smaller --batch-size or --train-size",
    )
    return int(passes)


def _need(config: TrainConfig, runtime: Runtime, dataset: DatasetInfo, model: nn.Module, *, side: int) -> MemoryNeed:
    few, more = (peak_of_pass(model, runtime, (count, side)) for count in (FEW_IMAGES, MORE_IMAGES))
    per_image = max((more - few) / (MORE_IMAGES - FEW_IMAGES), 1)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    batch = images_in_step(config, runtime.rank, runtime.world_size) * 3 * dataset.image_size**2
    splits = ("train", "train" if config.data.validation else "test")
    resident = sum(
        resident_bytes(dataset.splits[name].count, dataset.image_size, config.data.data_mode, runtime.device)
        for name in splits
    )
    constant = max(more - MORE_IMAGES * per_image, 0)
    return MemoryNeed(constant + STATE_COPIES * weights + BATCH_BYTES * batch + resident, per_image)


def peak_of_pass(model: nn.Module, runtime: Runtime, shape: tuple[int, int]) -> int:
    """Largest number of bytes that the tensors of a pass take up at one time, without the gradients of the weights.

    `shape`: number and side of the images.
    """
    with PeakMemory() as memory:
        _take_pass(model, runtime, shape)
    return memory.peak


def has_room(model: nn.Module, runtime: Runtime, shape: tuple[int, int], reserved: float) -> bool:
    """Whether a pass succeeds while `reserved` more bytes are allocated. `shape`: number and side of the images."""
    try:
        room = torch.empty(int(reserved), dtype=torch.uint8, device=runtime.device)
        _take_pass(model, runtime, shape)
        runtime.synchronize()
        del room
    except torch.OutOfMemoryError:
        return False
    finally:
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _take_pass(model: nn.Module, runtime: Runtime, shape: tuple[int, int]) -> None:
    """Takes a trial pass and undoes its effects on the model. Waits for other ranks only with --sync-bn."""
    count, side = shape
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    with explained_determinism(), torch.random.fork_rng(devices=devices), trial_passes(model), _freed_gradients(model):
        images = runtime.laid_out(trial_images(model, count, side))
        with runtime.autocast():
            logits = model(images)
        logits.sum().backward()


@contextlib.contextmanager
def _freed_gradients(model: nn.Module) -> Iterator[None]:
    """Frees the gradient of each parameter as soon as it is computed.

    Otherwise, memory could peak at the end of the backward pass, when all gradients are stored. That peak would not
    show how much memory an image needs.
    """

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(free) for parameter in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
