"""TFDS image classification sets, read from ArrayRecord without TensorFlow."""

import os

import tensorflow_datasets as tfds

from vir_jax.data.source import Example


def prepare_command(dataset: str, data_dir: str | None) -> str:
    """The command that prepares `dataset` where `open_source` looks for it."""
    command = f"python -m vir_jax.data.prepare --dataset={dataset}"
    if data_dir is not None:
        command += f" --data_dir={data_dir}"
    if dataset.split(":")[0] == "imagenet2012":
        command += " --manual_dir=<folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar>"
    return command


class TfdsSource:
    """One split, or slice of a split, of a prepared TFDS set; images stay encoded."""

    def __init__(self, dataset: str, split: str, *, data_dir: str | None = None):
        builder = tfds.builder(dataset, data_dir=data_dir)
        image_key, label_key = builder.info.supervised_keys
        self._dataset, self._split = dataset, split
        self._keys = image_key, label_key
        self._records = builder.as_data_source(split=split, decoders={image_key: tfds.decode.SkipDecoding()})
        self.class_names = tuple(builder.info.features[label_key].names)

    @property
    def num_classes(self) -> int:
        """Number of classes in TFDS's label feature."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        image_key, label_key = self._keys
        return {"image": record[image_key], "label": int(record[label_key])}

    def name(self, index: int) -> str:
        """Set, split and number, with the file name or id where the set stores one."""
        return f"{self._dataset} {self._split}[{index}]"
