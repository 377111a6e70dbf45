"""A folder of images per class: `data_dir/split/class name/image.jpg`."""

import os
from pathlib import Path

from vir_jax.data.source import Example

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class FolderSource:
    """The images below `data_dir/split`, sorted by class and file name.

    The classes are the folders of the split itself: another split may have others, and labels of two splits are
    compared by name alone (`match_classes`). Files with other extensions than `EXTENSIONS` are left out; hidden
    folders too.
    """

    def __init__(self, data_dir: str | os.PathLike[str], split: str):
        root = Path(data_dir).expanduser()
        folder = root / split
        if not folder.is_dir():
            found = ", ".join(_subfolders(root)) if root.is_dir() else "no such folder"
            raise FileNotFoundError(
                f"no split {split!r} in {root} (there: {found}). Expected images as "
                f"{folder}/<class name>/<name>.jpg"
            )
        self.class_names = _subfolders(folder)
        if not self.class_names:
            raise FileNotFoundError(
                f"no class folders in {folder}: expected {folder}/<class name>/<name>.jpg"
            )
        self._examples: list[tuple[str, int]] = []
        for label, name in enumerate(self.class_names):
            files = (e.path for e in os.scandir(folder / name) if e.name.lower().endswith(EXTENSIONS))
            self._examples += [(file, label) for file in sorted(files)]
        if not self._examples:
            raise FileNotFoundError(f"no images in {folder}/*/: looked for {', '.join(EXTENSIONS)}")

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
        """The file's path."""
        return self._examples[index][0]


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")))
