"""Crops and resizing: deterministic for evaluation, at a given box for training."""

import math

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

# The loaders run one thread per core; OpenCV's own pool on top of that only gets in the way.
cv2.setNumThreads(0)


def eval_transform(
    image: UInt8[np.ndarray, "y x 3"], image_size: int | tuple[int, int], crop_fraction: float = 0.875
) -> UInt8[np.ndarray, "_y _x 3"]:
    """Return the central crop, resized in one step with Pillow's antialiased bicubic filter.

    The crop is the largest central box of the target's aspect ratio, its sides times `crop_fraction`: for a
    square target the usual "resize the shorter side to size / crop_fraction, cut out the centre", without
    its rounding. An image that already has the target's size comes back unchanged for a fraction of 1.

    Args:
      image: RGB pixels.
      image_size: side, or (height, width), of the result.
      crop_fraction: in (0, 1].
    """
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction is {crop_fraction}: expected 0 < crop_fraction <= 1")
    size = size_pair(image_size)
    if image.shape[:2] == size and crop_fraction == 1:
        return image
    box = central_box(image.shape[:2], size, crop_fraction)
    resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized)


def central_box(
    shape: tuple[int, ...], size: tuple[int, int], crop_fraction: float
) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) in pixels of the box that `eval_transform` cuts out.

    Args:
      shape: (height, width) of the image.
      size: (height, width) of the result.
      crop_fraction: in (0, 1].
    """
    (height, width), (out_height, out_width) = shape, size
    scale = crop_fraction * min(height / out_height, width / out_width)
    half_width, half_height = scale * out_width / 2, scale * out_height / 2
    return width / 2 - half_width, height / 2 - half_height, width / 2 + half_width, height / 2 + half_height


def resize(
    image: UInt8[np.ndarray, "y x 3"], size: tuple[int, int], interpolation: int
) -> UInt8[np.ndarray, "_y _x 3"]:
    """Resize with OpenCV, for training: interpolated at k x k points per pixel of the result, then averaged.

    k is the rounded factor of shrinking (1 when enlarging), so that the points lie no further apart than the
    image's pixels by much and none of them is left out: an approximation to the antialiased filter of
    `eval_transform` at a third of the cost of OpenCV's own average over areas.

    Args:
      image: RGB pixels.
      size: (height, width) of the result.
      interpolation: `cv2.INTER_LINEAR` or `cv2.INTER_CUBIC`.
    """
    height, width = size
    k = max(1, round(math.sqrt(image.shape[0] * image.shape[1] / (height * width))))
    fine = cv2.resize(image, (k * width, k * height), interpolation=interpolation)
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA) if k > 1 else fine


def size_pair(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of an image size given as one side or as a pair."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size
