"""Image classification sets of Hugging Face `datasets`: by name from the hub, or a folder that `save_to_disk` wrote."""

from pathlib import Path

from vir_jax.extras import require

require("datasets", "datasets")

import datasets

from vir_jax.data.source import Example

PREFIX = "hf"


class HuggingFaceSource:
    """One split of a set with one column of images and one of class labels; images stay encoded.

    Args:
      name: "hf:user/set" or "hf:user/set:config" of the hub; "hf" for what `save_to_disk` wrote to `data_dir`.
      split: as `datasets` names it, slices included ("train[:90%]") for sets of the hub.
      data_dir: cache for the hub's files; None: `datasets`' own. With "hf" the folder that was written.
    """

    def __init__(self, name: str, split: str, *, data_dir: str | None = None):
        self._name, self._split = name, split
        stored = _saved(data_dir, split) if name == PREFIX else _from_hub(name, split, data_dir)
        self._image, self._label = _columns(name, stored.features)
        self.class_names = tuple(stored.features[self._label].names)
        self._rows = stored.cast_column(self._image, datasets.Image(decode=False))

    @property
    def num_classes(self) -> int:
        """Number of classes of the label column."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        image = row[self._image]
        stored = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        return {"image": stored, "label": int(row[self._label])}

    def name(self, index: int) -> str:
        """Return set, split and number."""
        return f"{self._name} {self._split}[{index}]"


def _from_hub(name: str, split: str, cache: str | None) -> "datasets.Dataset":
    _, path, *config = name.split(":")
    try:
        return datasets.load_dataset(path, *config, split=split, cache_dir=cache)
    except (datasets.exceptions.DatasetsError, ValueError, ConnectionError) as error:
        raise ValueError(f"{name}, split {split!r}: {' '.join(str(error).split())}") from error


def _saved(folder: str | None, split: str) -> "datasets.Dataset":
    if folder is None:
        raise ValueError(
            "dataset 'hf' needs data_dir: the folder that save_to_disk wrote; or name a set, hf:user/set"
        )
    found = datasets.load_from_disk(folder)
    if not isinstance(found, datasets.DatasetDict) or split not in found:
        there = list(found) if isinstance(found, datasets.DatasetDict) else "one set without splits"
        raise ValueError(f"no split {split!r} in {folder} (there: {there}); expected a DatasetDict with it")
    return found[split]


def _columns(name: str, features: "datasets.Features") -> tuple[str, str]:
    found = [
        [column for column, feature in features.items() if isinstance(feature, kind)]
        for kind in (datasets.Image, datasets.ClassLabel)
    ]
    if [len(columns) for columns in found] != [1, 1]:
        raise ValueError(
            f"{name} has the columns {dict(features)}; expected one of images (Image) and one of classes (ClassLabel):"
            " cast or remove columns, and save it"
        )
    (image,), (label,) = found
    return image, label
