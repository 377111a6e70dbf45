"""What the loaders read from: numbered examples with random access."""

from typing import Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import UInt8


class Example(TypedDict):
    """One labelled image as its source stores it."""

    image: bytes | UInt8[np.ndarray, "y x 3"]  # encoded file, or RGB pixels
    label: (
        int | UInt8[np.ndarray, "y x"]
    )  # the class; of a source that is `per_pixel` one for each pixel, or 255


@runtime_checkable
class Source(Protocol):
    """A finite data set with random access; `source[i]` is safe to call from several threads.

    It hands out *encoded* images (the bytes of a file) or small uint8 arrays; decoding belongs to the loaders,
    which do it in threads. Where it has an attribute `per_pixel`, True, labels are masks of the images' upright size,
    with `vir_jax.label_maps.IGNORED` where a pixel has none; num_classes is at most that.
    """

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are in [0, num_classes)."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of every class, in the order of the labels."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def __getitem__(self, index: int) -> Example:
        """Return example number `index`, 0 <= index < len(self). Its image is not to be written to."""

    def name(self, index: int) -> str:
        """Return what a person needs to find example `index`: a path, or split, number and file name."""


def is_per_pixel(source: Source) -> bool:
    """Return whether a source has a class for each pixel, in place of each image."""
    return bool(getattr(source, "per_pixel", False))


def check_labels(source: Source, per_pixel: bool, what: str) -> None:
    """Check that a source has a class for each pixel, or for each image, as is wanted.

    Args:
      source: the examples.
      per_pixel: whether a class for each pixel is wanted.
      what: the source is called in messages.

    Raises:
      ValueError: it has the other.
    """
    kinds = {True: "pixel", False: "image"}
    if is_per_pixel(source) != per_pixel:
        raise ValueError(
            f"{what} has a class for each {kinds[not per_pixel]}; expected one for each {kinds[per_pixel]}, as the task"
            " wants"
        )
