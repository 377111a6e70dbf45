"""TFDS sets with a mask for each image, read from ArrayRecord without TensorFlow."""

import numpy as np
import tensorflow_datasets as tfds

from vir_jax.data.masks import decode_mask
from vir_jax.data.source import Example
from vir_jax.data.tfds_source import TfdsSource
from vir_jax.label_maps import IGNORED

MASK = "segmentation_mask"
"""The feature that TFDS calls masks by."""

NAMES = {"oxford_iiit_pet": ("pet", "background", "border")}
"""Of sets whose masks count from 1 and whose features do not say what: names of the numbers 1, 2, ..."""


class TfdsMaskSource(TfdsSource):
    """One split, or slice of a split, of a prepared TFDS set with the features image and segmentation_mask.

    The classes are those that the feature names (`tfds.features.LabeledImage`), or those of `NAMES`.
    """

    per_pixel = True

    def _keys(self, builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
        features = builder.info.features
        images = [key for key in ("image", MASK) if isinstance(dict(features).get(key), tfds.features.Image)]
        if images != ["image", MASK]:
            raise ValueError(
                f"{builder.info.full_name} has no masks: expected the features image and {MASK}, images, it has"
                f" {features}"
            )
        return "image", MASK

    def _class_names(self, builder: tfds.core.DatasetBuilder) -> tuple[str, ...]:
        feature, name = builder.info.features[MASK], builder.info.name
        self._first = int(name in NAMES)
        if name in NAMES:
            return NAMES[name]
        names = getattr(feature, "names", None)
        if not names:
            raise ValueError(
                f"{builder.info.full_name} does not say what the numbers in its masks mean: expected {MASK} to be a"
                " tfds.features.LabeledImage with names. Write images and masks into folders and read them as 'folder'"
            )
        return tuple(names)

    def _encoded(self) -> tuple[str, ...]:
        return self._image_key, self._label_key

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        mask = decode_mask(record[self._label_key])
        if self._first:  # Bytes: 0, which is no class there, becomes 255, `IGNORED`.
            mask = np.where(mask == IGNORED, IGNORED, mask - np.uint8(1))
        return {"image": record[self._image_key], "label": mask}
