"""Imports and compiles everything that trainer processes need, before they are forked. This takes seven seconds.

This module must not compute anything with torch, because torch's threads would not survive the fork. It must not call
torch.set_num_threads(N) either: MKL would then compute different weights than with OMP_NUM_THREADS=N.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # optimizers import it

import tests.support.workers.narrow_train  # noqa: F401
from data_prep.dataset import write_dataset
from data_prep.loader import StreamLoader
from data_prep.sources.synthetic import draw_synthetic


def compile_readers() -> None:
    """Reads one batch, because FFCV compiles its readers at the first read in each process."""
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(draw_synthetic(train_count=10, test_count=10, seed=0), Path(folder))
        beton = Path(folder) / "train.beton"
        loader = StreamLoader(beton, device=torch.device("cpu"), batch_size=2, num_workers=1)
        list(loader.batches([np.arange(2)]))


compile_readers()
