"""TFDS image classification sets, read from ArrayRecord without TensorFlow."""

import difflib
import re

from vir_jax.extras import require

require("tfds", "array_record", "tensorflow_datasets")

import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants, read_only_builder, registered

from vir_jax.data.source import Example
from vir_jax.paths import check_path

ARRAY_RECORD = "array_record"


class TfdsSource:
    """One split, or slice of a split, of a prepared TFDS set; images stay encoded."""

    def __init__(self, dataset: str, split: str, *, data_dir: str | None = None):
        builder = open_prepared(dataset, data_dir)
        if builder.info.file_format.value != ARRAY_RECORD:
            raise FileNotFoundError(_wrong_format_message(dataset, data_dir, builder))
        self._image_key, self._label_key = self._keys(builder)
        self.class_names = self._class_names(builder)
        decoders = {key: tfds.decode.SkipDecoding() for key in self._encoded()}
        try:
            self._records = builder.as_data_source(split=split, decoders=decoders)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{dataset}: {error}") from error
        self._dataset, self._split = dataset, split

    def _keys(self, builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
        """Return the features that are image and label."""
        return _image_and_label_keys(builder)

    def _class_names(self, builder: tfds.core.DatasetBuilder) -> tuple[str, ...]:
        return tuple(builder.info.features[self._label_key].names)

    def _encoded(self) -> tuple[str, ...]:
        """Return the features that come as the bytes of a file."""
        return (self._image_key,)

    @property
    def num_classes(self) -> int:
        """Number of classes of TFDS's label feature."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        return {"image": record[self._image_key], "label": int(record[self._label_key])}

    def name(self, index: int) -> str:
        """Return set, split and number, with the file name or id where the set stores one."""
        name = f"{self._dataset} {self._split}[{index}]"
        stored = self.file_name(index)
        return f"{name} ({stored})" if stored else name

    def file_name(self, index: int) -> str:
        """Return the file name or id that is stored with example `index`; empty where there is none."""
        try:
            record = self._records[index]
        except Exception:  # it is asked for where an example is reported as unreadable
            return ""
        stored = record.get("file_name", record.get("id", b""))
        return stored.decode(errors="replace") if isinstance(stored, bytes) else str(stored)


def open_prepared(dataset: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """Return the builder of a set that is already on disk, made from the files there: no builder's code runs.

    Raises:
      ValueError: TFDS knows no such set; its default folder is in the environment, and no local one.
      FileNotFoundError: the set is not prepared.
    """
    if data_dir is None:
        check_path(constants.DATA_DIR, "TFDS_DATA_DIR, TFDS's default folder,")
    try:
        return read_only_builder.builder_from_files(dataset, data_dir=data_dir)
    except registered.DatasetNotFoundError as error:
        name, known = re.split("[/:]", dataset)[0], tfds.list_builders(with_community_datasets=False)
        if name not in known:
            close = difflib.get_close_matches(name, [*known, "digits", "digits_scenes", "folder", "table"])
            hint = f"did you mean {' or '.join(close)}?" if close else "see tfds.list_builders()"
            raise ValueError(
                f"no data set {name!r}: expected digits, digits_scenes, folder, table, hf:user/set or a TFDS name;"
                f" {hint}"
            ) from error
        place = data_dir or constants.DATA_DIR
        raise FileNotFoundError(
            f"{dataset} is not prepared in {place}. Prepare it with\n  {prepare_command(dataset, data_dir)}"
        ) from error


def prepare_command(dataset: str, data_dir: str | None) -> str:
    """Return the command that prepares `dataset` where `open_source` looks for it."""
    command = f"python -m vir_jax.data.prepare --dataset={dataset}"
    if data_dir is not None:
        command += f" --data_dir={data_dir}"
    if re.split("[/:]", dataset)[0] == "imagenet2012":
        command += " --manual_dir=<folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar>"
    return command


def _wrong_format_message(dataset: str, data_dir: str | None, builder: tfds.core.DatasetBuilder) -> str:
    source_dir = data_dir or constants.DATA_DIR
    target_dir = f"{str(source_dir).rstrip('/')}_array_record"
    return (
        f"{dataset} is prepared in {builder.data_dir} as {builder.info.file_format.value}, which has no "
        f"random access: expected {ARRAY_RECORD}. Convert it with\n"
        f"  python -m vir_jax.data.prepare --dataset={dataset} --convert_from={source_dir} "
        f"--data_dir={target_dir}\nand read it with data_dir={target_dir}"
    )


def _image_and_label_keys(builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
    keys, features = builder.info.supervised_keys, builder.info.features
    if keys is not None and [type(features[key]) for key in keys] == [
        tfds.features.Image,
        tfds.features.ClassLabel,
    ]:
        return keys[0], keys[1]
    raise ValueError(
        f"{builder.info.full_name} is not an image classification set: expected supervised keys (Image, "
        f"ClassLabel), it has {keys} of {features}"
    )
