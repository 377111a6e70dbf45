"""What the loaders read from: numbered examples with random access.

A source hands out *encoded* images (the bytes of a JPEG or PNG file) or small uint8 arrays; decoding belongs
to the loaders, which do it in threads. Three kinds exist: scikit-learn's digits, a folder of images per
class, and any TFDS image classification set that was prepared as ArrayRecord.
"""

from typing import Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from vir_jax.paths import check_path


class CorruptExampleError(ValueError):
    """One example cannot be used: unreadable record, undecodable image, label out of range."""


class Example(TypedDict):
    """One labelled image as its source stores it."""

    image: bytes | UInt8[np.ndarray, "y x 3"]  # encoded file, or RGB pixels
    label: int


@runtime_checkable
class Source(Protocol):
    """A finite data set with random access; `source[i]` is safe to call from several threads."""

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are in [0, num_classes)."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of every class, in the order of the labels."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> Example:
        """Example number `index`, 0 <= index < len(self). Its image is not to be written to."""

    def name(self, index: int) -> str:
        """What a person needs to find example `index`: a path, or split, number and file name."""


def open_source(dataset: str, split: str, *, data_dir: str | None = None) -> Source:
    """Open one split of a data set for reading.

    Args:
      dataset: "digits" (scikit-learn's handwritten digits, shipped inside that package), "folder"
        (`data_dir/split/class name/*.jpg`), or the name of a TFDS image classification set such as
        "imagenet2012" or "cifar10", prepared with `python -m vir_jax.data.prepare`.
      split: "train" or "test" for digits; a folder's name for "folder"; for TFDS any of its split strings,
        slices included ("train[:90%]").
      data_dir: where the data lie, a local folder. None: TFDS's default folder. Required by "folder", not used by
        "digits".

    Raises:
      PathError: data_dir is blank or no local folder (a `ValueError`).
      ValueError: an unknown data set or split, or a set that is not for image classification.
      FileNotFoundError: the data are not there, or not in a form that can be read; the message says which
        command puts that right.
    """
    if data_dir is not None:
        data_dir = check_path(data_dir, "data_dir")
    # Imported here so that each kind of source costs only its own libraries.
    if dataset == "digits":
        from vir_jax.data.digits import DigitsSource

        return DigitsSource(split)
    if dataset == "folder":
        from vir_jax.data.folder import FolderSource

        if data_dir is None:
            raise ValueError("dataset 'folder' needs data_dir: the folder that holds <split>/<class name>/")
        return FolderSource(data_dir, split)
    from vir_jax.data.tfds_source import TfdsSource

    return TfdsSource(dataset, split, data_dir=data_dir)
