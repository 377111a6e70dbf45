"""RandAugment (Cubuk et al. 2019) on uint8 RGB images.

Operations and ranges are timm's "increasing" set, which the recipe's "m9 mstd0.5 inc1" names (docs/method.md,
section 4): a higher magnitude always changes the image more. As there, the magnitude is drawn anew for every
operation, and a chosen operation acts with probability 1/2. What the operations compute is what Pillow's
ImageOps and ImageEnhance compute, as look-up tables where a pixel's result depends on that pixel alone.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import UInt8

RGBImage = UInt8[np.ndarray, "y x 3"]
Color = tuple[int, ...]

APPLY_PROBABILITY = 0.5
_LEVELS = np.arange(256)


def randaugment(
    image: RGBImage,
    rng: np.random.Generator,
    *,
    num_ops: int,
    magnitude: float,
    magnitude_std: float,
    interpolations: tuple[int, ...],
    fill: Color,
) -> RGBImage:
    """Apply `num_ops` operations drawn with replacement, each with probability 1/2.

    Args:
      image: RGB pixels; left as they are, the result is new or the image itself.
      rng: the example's own generator.
      num_ops: operations drawn.
      magnitude: mean strength, 0 to 10.
      magnitude_std: standard deviation of the strength, which is clipped to 0..10.
      interpolations: OpenCV's flags; geometric operations take one at random.
      fill: colour of what a geometric operation brings in from outside the image.
    """
    for _ in range(num_ops):
        operation = OPERATIONS[rng.integers(len(OPERATIONS))]
        if rng.random() >= APPLY_PROBABILITY:
            continue
        level = min(max(rng.normal(magnitude, magnitude_std), 0.0), 10.0) / 10
        sign = -1 if rng.random() < 0.5 else 1
        if operation in _GEOMETRIC:
            interpolation = interpolations[rng.integers(len(interpolations))]
            matrix = _GEOMETRIC[operation](sign * level, *image.shape[:2])
            image = affine(image, matrix, interpolation, fill)
        elif operation in _ENHANCING:
            image = _ENHANCING[operation](image, max(0.1, 1 + sign * 0.9 * level))
        else:
            image = _TABLES[operation](image, level)
    return image


# --- Look-up tables. `level` in [0, 1]. ---


def auto_contrast(image: RGBImage) -> RGBImage:
    """Stretch each channel to 0..255."""
    tables = np.empty((1, 256, 3), np.uint8)
    for channel in range(3):
        values = image[..., channel]
        low, high = int(values.min()), int(values.max())
        scale = 255 / (high - low) if high > low else 1
        offset = -low * scale if high > low else 0
        tables[0, :, channel] = np.clip(_LEVELS * scale + offset, 0, 255)
    return cv2.LUT(image, tables)


def equalize(image: RGBImage) -> RGBImage:
    """Spread each channel's values so that their histogram becomes flat."""
    tables = np.empty((1, 256, 3), np.uint8)
    for channel in range(3):
        histogram = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        # The brightest level present is left out, so that it maps to 255.
        step = (image[..., 0].size - histogram[np.flatnonzero(histogram)[-1]]) // 255
        below = np.cumsum(histogram) - histogram
        tables[0, :, channel] = np.minimum((below + step // 2) // step, 255) if step else _LEVELS
    return cv2.LUT(image, tables)


def invert(image: RGBImage) -> RGBImage:
    """Subtract every value from 255."""
    return cv2.bitwise_not(image)


def posterize(image: RGBImage, bits: int) -> RGBImage:
    """Keep the upper `bits` (0 to 8) of every value."""
    return cv2.LUT(image, (_LEVELS & ~(2 ** (8 - bits) - 1)).astype(np.uint8))


def solarize(image: RGBImage, threshold: int) -> RGBImage:
    """Invert the values at or above `threshold`."""
    return cv2.LUT(image, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS).astype(np.uint8))


def solarize_add(image: RGBImage, addend: int) -> RGBImage:
    """Add `addend` to the values below 128."""
    return cv2.LUT(
        image, np.where(_LEVELS < 128, np.minimum(_LEVELS + addend, 255), _LEVELS).astype(np.uint8)
    )


# --- Enhancing: blends with a degenerate image. Factor 0 gives that one, 1 the image, more exaggerates. ---


def brightness(image: RGBImage, factor: float) -> RGBImage:
    """Blend with black."""
    return cv2.LUT(image, np.clip(_LEVELS * factor, 0, 255).astype(np.uint8))


def contrast(image: RGBImage, factor: float) -> RGBImage:
    """Blend with the mean gray."""
    mean = math.floor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean() + 0.5)
    return cv2.LUT(image, np.clip(mean + factor * (_LEVELS - mean), 0, 255).astype(np.uint8))


def color(image: RGBImage, factor: float) -> RGBImage:
    """Blend with the gray image: saturation."""
    gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, gray, 1 - factor, 0)


def sharpness(image: RGBImage, factor: float) -> RGBImage:
    """Blend with a smoothed image; the outermost pixels, which have no full neighbourhood, stay."""
    if min(image.shape[:2]) < 3:
        return image
    smooth = cv2.filter2D(image, -1, _SMOOTHING)
    result = cv2.addWeighted(image, factor, smooth, 1 - factor, 0)
    result[[0, -1]] = image[[0, -1]]
    result[:, [0, -1]] = image[:, [0, -1]]
    return result


_SMOOTHING = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


# --- Geometry: 2x3 matrices from a point (x, y) of the result to the point of the image that it shows. ---


def affine(image: RGBImage, matrix: np.ndarray, interpolation: int, fill: Color) -> RGBImage:
    """Return the image as seen through `matrix`, whose coordinates have (0, 0) at the corner of the first pixel."""
    matrix = matrix.astype(np.float64)
    matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5  # OpenCV counts from the centre of the first pixel
    return cv2.warpAffine(
        image,
        matrix,
        (image.shape[1], image.shape[0]),
        flags=interpolation | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fill,
    )


def rotation(degrees: float, height: int, width: int) -> np.ndarray:
    """Turn the image about its centre, counter-clockwise by positive degrees."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return np.array([[c, -s, x - c * x + s * y], [s, c, y - s * x - c * y]])


def shear_x(slope: float) -> np.ndarray:
    """Move row y by -slope * y."""
    return np.array([[1, slope, 0], [0, 1, 0]])


def shear_y(slope: float) -> np.ndarray:
    """Move column x by -slope * x."""
    return np.array([[1, 0, 0], [slope, 1, 0]])


def translation(x: float, y: float) -> np.ndarray:
    """Move everything by (-x, -y) pixels."""
    return np.array([[1, 0, x], [0, 1, y]])


# --- What each operation makes of a level in [0, 1]. ---

_TABLES: dict[str, Callable[[RGBImage, float], RGBImage]] = {
    "auto_contrast": lambda image, level: auto_contrast(image),
    "equalize": lambda image, level: equalize(image),
    "invert": lambda image, level: invert(image),
    "posterize": lambda image, level: posterize(image, 4 - int(4 * level)),
    "solarize": lambda image, level: solarize(image, 256 - int(256 * level)),
    "solarize_add": lambda image, level: solarize_add(image, int(110 * level)),
}
_ENHANCING: dict[str, Callable[[RGBImage, float], RGBImage]] = {
    "color": color,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
}
_GEOMETRIC: dict[str, Callable[[float, int, int], np.ndarray]] = {  # signed level, height, width
    "rotate": lambda level, height, width: rotation(30 * level, height, width),
    "shear_x": lambda level, height, width: shear_x(0.3 * level),
    "shear_y": lambda level, height, width: shear_y(0.3 * level),
    "translate_x": lambda level, height, width: translation(0.45 * level * width, 0.0),
    "translate_y": lambda level, height, width: translation(0.0, 0.45 * level * height),
}
OPERATIONS = (*_TABLES, *_ENHANCING, *_GEOMETRIC)
