"""A folder of images per class: `data_dir/split/class name/image.jpg`."""

import os
from pathlib import Path

from vir_jax.data.source import Example

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")))


class FolderSource:
    """The images below `data_dir/split`, sorted by class and file name.

    The classes are the folders of `data_dir/train` where that exists, else those of the split itself, so a
    class without test images does not shift the labels of the others.
    """

    def __init__(self, data_dir: str | os.PathLike[str], split: str):
        root = Path(data_dir)
        folder = root / split
        if not folder.is_dir():
            found = ", ".join(_subfolders(root)) if root.is_dir() else "nothing, the folder does not exist"
            raise FileNotFoundError(
                f"no split {split!r} in {root} (found: {found}). Expected {folder}/<class name>/<image>.jpg: "
                "one folder per split, in it one folder per class"
            )
        reference = root / "train" if (root / "train").is_dir() else folder
        self.class_names = _subfolders(reference)
        if not self.class_names:
            raise FileNotFoundError(
                f"no class folders in {reference}: expected {reference}/<class name>/<image>.jpg"
            )
        unknown = sorted(set(_subfolders(folder)) - set(self.class_names))
        if unknown:
            raise ValueError(f"{folder} has classes that {reference} lacks: {', '.join(unknown)}")
        self._paths: list[str] = []
        self._labels: list[int] = []
        for label, name in enumerate(self.class_names):
            if not (folder / name).is_dir():
                continue
            files = sorted(e.path for e in os.scandir(folder / name) if e.name.lower().endswith(EXTENSIONS))
            self._paths += files
            self._labels += [label] * len(files)
        if not self._paths:
            raise FileNotFoundError(
                f"no images in {folder}: looked for {', '.join(EXTENSIONS)} in each class folder"
            )

    @property
    def num_classes(self) -> int:
        """Number of class folders."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        return {"image": Path(self._paths[index]).read_bytes(), "label": self._labels[index]}

    def name(self, index: int) -> str:
        """The file's path."""
        return self._paths[index]
