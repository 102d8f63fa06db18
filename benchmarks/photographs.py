"""Draws pictures with statistics like those of photographs, so that their JPEG files have a realistic size."""

import numpy as np
from PIL import Image

SIZE = (500, 375)  # width and height in pixels
NUM_SCENES, SCENE_SIDE = 8, 1024
EXPONENT = 1.4  # amplitude ~ 1 / frequency^EXPONENT; JPEG files of quality 90 are then 46 to 63 KB large
CONTRASTS = (52.0, 16.0, 16.0)  # standard deviations of brightness and of the two color differences


class Photographs:
    """Each call picks one of a few large scenes and returns a random part. About half of these parts are mirrored."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self._scenes = [_draw_scene(generator) for _ in range(NUM_SCENES)]

    def __call__(self, generator: np.random.Generator) -> Image.Image:
        scene = self._scenes[generator.integers(NUM_SCENES)]
        left, top = (int(generator.integers(SCENE_SIDE - side + 1)) for side in SIZE)
        picture = scene.crop((left, top, left + SIZE[0], top + SIZE[1]))
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.integers(2) else picture


def _draw_scene(generator: np.random.Generator) -> Image.Image:
    """Noise in which large structures are stronger than small ones, in brightness and color."""
    vertical, horizontal = np.fft.fftfreq(SCENE_SIDE)[:, None], np.fft.rfftfreq(SCENE_SIDE)
    frequency = np.hypot(vertical, horizontal)
    frequency[0, 0] = np.inf  # sets the constant component of the noise to 0
    planes = []
    for contrast in CONTRASTS:
        noise = np.fft.rfft2(generator.standard_normal((SCENE_SIDE, SCENE_SIDE)))
        plane = np.fft.irfft2(noise / frequency**EXPONENT, s=(SCENE_SIDE, SCENE_SIDE))
        values = 128 + contrast * plane / plane.std()
        planes.append(Image.fromarray(values.clip(0, 255).astype(np.uint8)))
    return Image.merge("YCbCr", planes).convert("RGB")
