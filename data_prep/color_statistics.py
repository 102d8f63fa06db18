"""Mean and standard deviation of the color channels of images, computed from counts of the pixel values."""

import numpy as np

Statistics = tuple[float, float, float]  # one number for each channel, on a scale of 0-1


class ColorCounts:
    """Counts how often each value occurs in each channel. The result does not depend on the order of the images."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), dtype=np.int64)

    def add(self, images: np.ndarray) -> None:
        """Counts `images`, (N, H, W, 3) uint8. Add a few images at a time, because bincount copies them to int64."""
        for channel in range(3):
            self._counts[channel] += np.bincount(images[..., channel].reshape(-1), minlength=256)

    def mean_and_std(self) -> tuple[Statistics, Statistics]:
        values = np.arange(256) / 255
        means, deviations = [], []
        for counts in self._counts:
            mean = float(counts @ values / counts.sum())
            means.append(mean)
            # Images of a single color have a deviation of 0, but normalization divides by the deviation.
            deviations.append(max(float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum())), 1 / 255))
        return tuple(means), tuple(deviations)  # type: ignore[return-value]
