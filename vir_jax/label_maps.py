"""Maps of labels, a class for each pixel: the number that stands for none, and the colours of classes."""

from typing import Any

import numpy as np
from jaxtyping import UInt8

IGNORED = 255
"""The label of a pixel that has none: it is neither learned nor counted."""

MAX_CLASSES = IGNORED
"""Labels are bytes."""


WITHOUT_MASKS = ("randaugment_ops", "erase", "transform")
"""Fields of an augmentation that switch on what changes an image and not its mask."""


def check_masks_follow(augment: Any) -> None:
    """Check that nothing happens to images that does not happen to their masks.

    Args:
        augment: `vir_jax.data.AugmentConfig`, or the section of a run's config.

    Raises:
        ValueError: naming the field.
    """
    for field in WITHOUT_MASKS:
        value = getattr(augment, field)
        if value:
            raise ValueError(
                f"augment.{field} is {value!r}, which changes images and not their masks; expected it to be off where"
                " each pixel has a class. Crops and flips are done to both"
            )


def palette() -> UInt8[np.ndarray, "256 3"]:
    """Return a colour for every label: that of PASCAL VOC, black for 0, in which neighbours in number differ much.

    Bit 3 i + j of a label is bit 7 - i of its colour j.
    """
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= bits[:, bit] << (7 - bit // 3)
    return colours
