"""What a training costs, counted on the network as it is trained."""

from dataclasses import replace

import pytest

from ddp_trainer.assembly import training_flops
from ddp_trainer.model import ModelSpec
from ddp_trainer.recipes import RECIPES


@pytest.mark.parametrize(
    ("steps", "share"),
    [(30, 1 / 4), (200, 1 / 4), (400, (2 / 4 + 2 * 9 / 16) / 4), (700, (2 / 4 + 3 * 9 / 16 + 2) / 7)],
)
def test_operations_of_small_crops_are_counted_as_such(steps: int, share: float) -> None:
    """Half of the side is a quarter of the pixels. The last layer, which always has one, is too small to be seen."""
    spec = ModelSpec(classes=tuple("0123456789"), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), image_size=32)
    large = replace(RECIPES["baseline"], schedule=replace(RECIPES["baseline"].schedule, epochs=7, batch_size=500))
    small = replace(large, schedule=replace(large.schedule, small_crop_fraction=0.75))
    counted, whole = (training_flops(config, spec, steps=steps, num_images=50_000) for config in (small, large))
    assert counted / whole == pytest.approx(share, rel=1e-3)
