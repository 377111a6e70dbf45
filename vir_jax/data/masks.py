"""Masks: images of labels, a class for each pixel, in the geometry of the images that they belong to."""

import io
from typing import TypeGuard

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vir_jax.data.errors import CorruptExampleError, CorruptImageError
from vir_jax.data.image_file import as_corrupt, check_pixels
from vir_jax.data.resize import central_box, size_pair
from vir_jax.label_maps import IGNORED

Mask = UInt8[np.ndarray, "_y _x"]
"""Labels: numbers of classes, or `IGNORED`."""

Box = tuple[int | float, int | float, int | float, int | float]
"""(left, top, right, bottom) in pixels."""

# Of Pillow, with a number for each pixel: grey, palette (its numbers, not its colours), black and white.
_MODES = ("L", "P", "1")


def is_mask(label: object) -> TypeGuard[Mask]:
    """Return whether a label is one for each pixel, not a number."""
    return isinstance(label, np.ndarray) and label.ndim > 0


def decode_mask(data: bytes) -> Mask:
    """Decode a PNG whose pixels are numbers of classes: grey of 8 bits or fewer, or with a palette.

    Raises:
      CorruptImageError: no such PNG; the message says what it is.
    """
    if not data:
        raise CorruptImageError("the mask is empty (0 bytes)")
    with as_corrupt():
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        check_pixels(image.height, image.width)
        if image.mode not in _MODES:
            raise CorruptImageError(
                f"a mask of Pillow's mode {image.mode}: expected a PNG of one number a pixel, the class, in 8 bits"
            )
        return np.asarray(image).astype(np.uint8)


def check_mask(mask: object, num_classes: int) -> None:
    """Check that a mask is one: uint8 [height, width], each a class or `IGNORED`.

    Raises:
      CorruptExampleError: it is none, or has a number that is no class.
    """
    if not isinstance(mask, np.ndarray) or mask.dtype != np.uint8 or mask.ndim != 2 or not mask.size:
        described = f"{getattr(mask, 'shape', type(mask).__name__)} of {getattr(mask, 'dtype', 'no dtype')}"
        raise CorruptExampleError(f"mask {described}: expected uint8 [height, width]")
    wrong = mask[(mask >= num_classes) & (mask != IGNORED)]
    if wrong.size:
        raise CorruptExampleError(
            f"the mask has the number {wrong[0]}, not one of {num_classes} classes, nor {IGNORED} for none"
        )


def check_same_size(image: UInt8[np.ndarray, "y x 3"], mask: Mask) -> None:
    """Check that each pixel has a label.

    Raises:
      CorruptExampleError: image and mask differ in size.
    """
    if image.shape[:2] != mask.shape:
        (height, width), (rows, cols) = image.shape[:2], mask.shape
        raise CorruptExampleError(
            f"an image of {width} x {height} pixels, upright, with a mask of {cols} x {rows}: expected the same"
        )


def resize_mask(mask: Mask, size: tuple[int, int], box: Box | None = None) -> Mask:
    """Return the labels at the centres of the new pixels.

    Args:
      mask: labels.
      size: (height, width) of the result.
      box: the part that is resized; None: all.
    """
    height, width = size
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST, box=box))


def eval_mask(mask: Mask, image_size: int | tuple[int, int], crop_fraction: float) -> Mask:
    """Return what `eval_transform` makes of the image, of its mask."""
    size = size_pair(image_size)
    if mask.shape == size and crop_fraction == 1:
        return mask
    return resize_mask(mask, size, central_box(mask.shape, size, crop_fraction))
