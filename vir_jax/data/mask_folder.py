"""A folder of images and one of their masks: `data_dir/split/images/NAME.jpg` and `data_dir/split/masks/NAME.png`."""

import os
from collections import Counter
from pathlib import Path

from absl import logging

from vir_jax.data.masks import decode_mask
from vir_jax.data.source import Example
from vir_jax.data.walk import EXTENSIONS, UNREADABLE, describe, find_images

CLASSES = "classes.txt"
"""Beside the splits: a name on each line, that of class 0 first."""

_NAMED = 3  # Files that a message names, at most.


class MaskFolderSource:
    """The images in and below `data_dir/split/images`, each with the mask of the same path in `masks`.

    A mask is a PNG of one number a pixel, the class, or 255 for none. What counts as an image is said in
    `vir_jax.data.walk`.
    """

    per_pixel = True

    def __init__(self, data_dir: str | os.PathLike[str], split: str):
        root = Path(data_dir).expanduser()
        images, masks = root / split / "images", root / split / "masks"
        for folder in (images, masks):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"no folder {folder}. Expected images as {images}/NAME.jpg, their masks as {masks}/NAME.png and the"
                    f" names of the classes in {root / CLASSES}"
                )
        self.class_names = _read_class_names(root / CLASSES)
        left_out: Counter[str] = Counter()
        found = [Path(path) for path in find_images(images, left_out)]
        if left_out:
            logging.warning("left out in %s: %s", images, describe(left_out))
        if left_out[UNREADABLE]:
            raise PermissionError(f"{left_out[UNREADABLE]} folders in or below {images} cannot be read")
        if not found:
            raise FileNotFoundError(f"no images in {images}: looked for {', '.join(EXTENSIONS)}")
        self._examples = [(path, (masks / path.relative_to(images)).with_suffix(".png")) for path in found]
        _check_masks([mask for _, mask in self._examples], masks)

    @property
    def num_classes(self) -> int:
        """Number of names."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        image, mask = self._examples[index]
        return {"image": image.read_bytes(), "label": decode_mask(mask.read_bytes())}

    def name(self, index: int) -> str:
        """Return the image's path."""
        return str(self._examples[index][0])


def _read_class_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: expected the names of the classes, one on each line, in the order of their numbers"
        )
    return tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())


def _check_masks(wanted: list[Path], folder: Path) -> None:
    """Check that each image has a mask of its own."""
    missing = [path for path in wanted if not path.is_file()]
    twice = [path for path, count in Counter(wanted).items() if count > 1]
    for paths, what in ((missing, "that are not there"), (twice, "that several images would share")):
        if paths:
            named = ", ".join(str(path.relative_to(folder)) for path in paths[:_NAMED])
            raise FileNotFoundError(
                f"{len(paths)} masks {what} in {folder}: {named}{', ...' if len(paths) > _NAMED else ''}. Expected for"
                " each image a PNG of its name"
            )
