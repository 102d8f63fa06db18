"""Writes every augmented image of this rank to a file. Arguments: DATA_DIR OUT MODE EPOCHS."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.augment import Augmenter
from data_prep.augment_config import AugmentConfig
from data_prep.dataset import read_dataset
from data_prep.loader import build_loader
from data_prep.order import epoch_order, share, train_batches
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.runtime import Runtime

BATCH_SIZE = 64


def main(argv: Sequence[str]) -> None:
    data_dir, out, mode, epochs = Path(argv[0]), Path(argv[1]), argv[2], int(argv[3])
    dataset = read_dataset(data_dir)
    runtime = Runtime(RuntimeConfig(device="cpu"))
    split = dataset.splits["train"]
    rows = share(BATCH_SIZE, runtime.rank, runtime.world_size, pairs=True)
    size = rows.stop - rows.start
    loader = build_loader(data_dir / split.file, mode=mode, device=runtime.device, batch_size=size, num_workers=1)  # type: ignore[arg-type]
    config = AugmentConfig(crop_padding=4, flip="random", cutout=8, brightness=0.1, contrast=0.1, cutmix=1.0)
    augmenter = Augmenter(config, mean=dataset.mean, std=dataset.std, seed=7)
    images, indices = [], []
    for epoch in range(epochs):
        order = epoch_order(np.arange(split.count), seed=7, epoch=epoch)
        plan = train_batches(order, batch_size=BATCH_SIZE, rank=runtime.rank, world_size=runtime.world_size, pairs=True)
        for batch in loader.batches(plan):
            images.append(augmenter(batch, epoch=epoch).images.numpy().copy())
            indices.append(batch.indices.numpy().copy())
    np.savez(
        out / f"rank-{runtime.rank}-of-{runtime.world_size}.npz", images=np.stack(images), indices=np.stack(indices)
    )
    runtime.close()
