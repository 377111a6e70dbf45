"""A folder of images per class: `data_dir/split/class name/image.jpg`."""

import os
from collections import Counter
from pathlib import Path

from absl import logging

from vir_jax.data.source import Example
from vir_jax.data.walk import EXTENSIONS, UNREADABLE, describe, find_folders, find_images, find_loose_files


class FolderSource:
    """The images in and below the class folders of `data_dir/split`, sorted by class and name.

    The classes are the folders of the split itself that hold images: another split may have others, and labels of two
    splits are compared by name alone (`match_classes`). What counts as an image is said in `vir_jax.data.walk`; what
    else is there is counted and logged.
    """

    def __init__(self, data_dir: str | os.PathLike[str], split: str):
        root = Path(data_dir).expanduser()
        folder = root / split
        if not folder.is_dir():
            found = ", ".join(find_folders(root)) if root.is_dir() else "no such folder"
            raise FileNotFoundError(
                f"no split {split!r} in {root} (there: {found}). Expected images as "
                f"{folder}/<class name>/<name>.jpg"
            )
        images, left_out = _images_by_class(folder)
        if left_out:
            logging.warning("left out in %s: %s", folder, describe(left_out))
        if left_out[UNREADABLE]:
            raise PermissionError(
                f"{left_out[UNREADABLE]} folders in or below {folder} cannot be read: labels would be wrong"
            )
        self.class_names = tuple(images)
        if not find_folders(folder):
            raise FileNotFoundError(
                f"no class folders in {folder}: expected {folder}/<class name>/<name>.jpg"
            )
        if not images:
            raise FileNotFoundError(f"no images in {folder}/*/: looked for {', '.join(EXTENSIONS)}")
        labels = {name: label for label, name in enumerate(self.class_names)}
        self._examples = [(file, labels[name]) for name, files in images.items() for file in files]

    @property
    def labels(self) -> list[int]:
        """Label of every example."""
        return [label for _, label in self._examples]

    @property
    def num_classes(self) -> int:
        """Number of class folders."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        path, label = self._examples[index]
        return {"image": Path(path).read_bytes(), "label": label}

    def name(self, index: int) -> str:
        """Return the file's path."""
        return self._examples[index][0]


def _images_by_class(folder: Path) -> tuple[dict[str, list[str]], Counter[str]]:
    """Return the images of each class folder that has any, and what was left out, by kind."""
    left_out = find_loose_files(folder)
    images = {name: list(find_images(folder / name, left_out)) for name in find_folders(folder)}
    left_out["folders without images"] += sum(not files for files in images.values())
    return {name: files for name, files in images.items() if files}, +left_out
