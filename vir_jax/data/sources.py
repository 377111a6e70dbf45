"""Data sets by name: digits, scenes of them, folders of images, a table of files and labels, Hugging Face, and TFDS."""

from vir_jax.data.source import Source, check_labels
from vir_jax.paths import check_path


def open_source(dataset: str, split: str, *, data_dir: str | None = None, per_pixel: bool = False) -> Source:
    """Open one split of a data set for reading.

    Args:
      dataset: "digits" (scikit-learn's handwritten digits, shipped inside that package), "folder"
        (`data_dir/split/class name/*.jpg`), "table" (`data_dir/split.csv` or `.parquet`, columns file and label),
        "hf:user/set" (Hugging Face `datasets`; "hf" alone for a folder that `save_to_disk` wrote), or the name of a
        TFDS image classification set such as "imagenet2012" or "cifar10", prepared with
        `python -m vir_jax.data.prepare`. With a class for each pixel "digits_scenes" (composed of those digits),
        "folder" (`data_dir/split/images/*.jpg`, `masks/*.png` and `data_dir/classes.txt`), or the name of a TFDS set
        with masks, such as "oxford_iiit_pet".
      split: "train" or "test" for digits; a folder's name for "folder"; for TFDS any of its split strings,
        slices included ("train[:90%]").
      data_dir: where the data lie, a local folder. None: TFDS's or `datasets`' default folder. Required by "folder",
        "table" and "hf", not used by "digits" and "digits_scenes".
      per_pixel: whether labels are masks, a class for each pixel, in place of one for each image.

    Raises:
      PathError: data_dir is blank or no local folder (a `ValueError`).
      ValueError: an unknown data set or split, or a set that has no such labels.
      FileNotFoundError: the data are not there, or not in a form that can be read; the message says which
        command puts that right.
    """
    if data_dir is not None:
        data_dir = check_path(data_dir, "data_dir")
    source = _open(dataset, split, data_dir, per_pixel)
    check_labels(source, per_pixel, f"the data set {dataset!r}")
    return source


def _open(dataset: str, split: str, data_dir: str | None, per_pixel: bool) -> Source:
    # Imported here so that each kind of source costs only its own libraries.
    if dataset == "digits":
        from vir_jax.data.digits import DigitsSource

        return DigitsSource(split)
    if dataset == "digits_scenes":
        from vir_jax.data.digits_scenes import DigitsScenesSource

        return DigitsScenesSource(split)
    if dataset == "folder":
        from vir_jax.data.folder import FolderSource
        from vir_jax.data.mask_folder import MaskFolderSource

        if data_dir is None and per_pixel:
            raise ValueError(
                "dataset 'folder' needs data_dir: the folder that holds classes.txt, <split>/images/ and <split>/masks/"
            )
        if data_dir is None:
            raise ValueError("dataset 'folder' needs data_dir: the folder that holds <split>/<class name>/")
        return MaskFolderSource(data_dir, split) if per_pixel else FolderSource(data_dir, split)
    if dataset == "table":
        from vir_jax.data.table import TableSource

        if data_dir is None:
            raise ValueError("dataset 'table' needs data_dir: the folder that holds <split>.csv or .parquet")
        return TableSource(data_dir, split)
    if dataset.partition(":")[0] == "hf":
        from vir_jax.data.hf_source import HuggingFaceSource

        return HuggingFaceSource(dataset, split, data_dir=data_dir)
    from vir_jax.data.tfds_source import TfdsSource

    if per_pixel:
        from vir_jax.data.tfds_masks import TfdsMaskSource

        return TfdsMaskSource(dataset, split, data_dir=data_dir)
    return TfdsSource(dataset, split, data_dir=data_dir)
