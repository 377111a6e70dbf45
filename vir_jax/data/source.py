"""What the loaders read from: numbered examples with random access."""

from typing import Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import UInt8


class Example(TypedDict):
    """One labelled image as its source stores it."""

    image: bytes | UInt8[np.ndarray, "y x 3"]  # encoded file, or RGB pixels
    label: int


@runtime_checkable
class Source(Protocol):
    """A finite data set with random access; `source[i]` is safe to call from several threads.

    It hands out *encoded* images (the bytes of a file) or small uint8 arrays; decoding belongs to the loaders,
    which do it in threads.
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
