"""Prepare a TFDS set for training: `python -m vir_jax.data.prepare --dataset=cifar10`.

Writes ArrayRecord files, which can be read at random, and checks them. This is the only module that needs
TensorFlow (`pip install "vir-jax[prepare]"`), for TFDS's builders; nothing that reads the result does.

ImageNet cannot be downloaded without an account. Put its own two archives into a folder and say

    python -m vir_jax.data.prepare --dataset=imagenet2012 --manual_dir=<folder>

TFDS gives the validation images their labels by position in the sorted list of the archive's names, so that
one stray entry or one missing file would shift every label after it without a word. Therefore the archives'
names are checked before, and stored labels against file names after.

A set that is already there as TFRecord is converted, which needs no TensorFlow:

    python -m vir_jax.data.prepare --dataset=imagenet2012 --convert_from=<its data_dir> --data_dir=<new one>
"""

import argparse
import collections
import functools
import importlib.util
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from vir_jax.data.corrupt import spread
from vir_jax.data.decode import decode_image
from vir_jax.data.tfds_source import ARRAY_RECORD, TfdsSource, open_prepared
from vir_jax.paths import check_path

IMAGENET = "imagenet2012"
IMAGENET_COUNTS = {"train": 1_281_167, "validation": 50_000, "test": 100_000}
CHECKED_PER_SPLIT = 500  # spread evenly over the split


class PreparationError(RuntimeError):
    """The archives or the prepared set are not what they should be; the message says what to do."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m vir_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", required=True, help="name of the TFDS set, such as cifar10")
    parser.add_argument("--data_dir", help="where prepared sets lie; default: TFDS's folder")
    parser.add_argument("--manual_dir", help="folder with archives that cannot be downloaded")
    parser.add_argument("--convert_from", help="data_dir that holds the set as TFRecord, to be converted")
    parser.add_argument(
        "--allow_partial",
        action="store_true",
        help="imagenet2012: accept archives with a part of the images; counts are reported, not required",
    )
    args = parser.parse_args(argv)
    try:
        for name in ("data_dir", "manual_dir", "convert_from"):
            if getattr(args, name) is not None:
                setattr(args, name, check_path(getattr(args, name), f"--{name}"))
        if args.convert_from:
            convert(args.dataset, args.convert_from, args.data_dir)
        else:
            prepare(args.dataset, args.data_dir, args.manual_dir, allow_partial=args.allow_partial)
        for split, count in check(args.dataset, args.data_dir, allow_partial=args.allow_partial).items():
            print(
                f"{args.dataset} {split}: {count:,} examples, {min(count, CHECKED_PER_SPLIT)} of them checked"
            )
    except (PreparationError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


def prepare(dataset: str, data_dir: str | None, manual_dir: str | None, *, allow_partial: bool) -> None:
    """Run the set's own TFDS builder, unless the set is there already.

    Raises:
      PreparationError: TensorFlow is missing, or ImageNet's archives are not as they were published.
    """
    try:
        print(f"{dataset} is there already: {open_prepared(dataset, data_dir).data_dir}. Checking it")
        return
    except FileNotFoundError:
        if importlib.util.find_spec("tensorflow") is None:
            raise PreparationError(
                "preparing a TFDS set needs TensorFlow, which training does not: "
                'pip install "vir-jax[prepare]", or, in a checkout, pip install -r requirements-prepare.txt'
            ) from None
    if dataset.split(":")[0] == IMAGENET:
        if manual_dir is None:
            raise PreparationError(f"{IMAGENET} needs --manual_dir: the folder with its two archives")
        check_imagenet_archives(Path(manual_dir), allow_partial=allow_partial)
    builder = tfds.builder(dataset, data_dir=data_dir, file_format=ARRAY_RECORD)
    # The copies that TFDS could fetch from its bucket are TFRecord: build from the original files.
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    builder.download_and_prepare(download_config=config)


def convert(dataset: str, convert_from: str, data_dir: str | None) -> None:
    """Rewrite a set prepared as TFRecord below `convert_from` as ArrayRecord below `data_dir`, file by file.

    Raises:
      PreparationError: no new folder is given, or the set is not TFRecord, or is damaged.
    """
    builder = open_prepared(dataset, convert_from)
    if builder.info.file_format.value != "tfrecord":
        raise PreparationError(f"{builder.data_dir} holds {builder.info.file_format.value}, not tfrecord")
    if data_dir is None:
        raise PreparationError("--convert_from needs --data_dir: a new folder, for the converted set")
    target = Path(data_dir) / builder.info.full_name  # name[/config]/version
    if target.exists():
        raise PreparationError(f"{target} exists: remove it, or give another --data_dir")
    # Written under another name and renamed at the end: a conversion that was interrupted is not found.
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for file in sorted(Path(builder.data_dir).iterdir()):
        if ".tfrecord" in file.name:
            name = file.name.replace(".tfrecord", f".{ARRAY_RECORD}")
            writer = ArrayRecordWriter(str(unfinished / name), "group_size:1")  # one record: random access
            for record in _tfrecords(file):
                writer.write(record)
            writer.close()
        elif file.name != "dataset_info.json":
            shutil.copy(file, unfinished)
    info = json.loads((Path(builder.data_dir) / "dataset_info.json").read_text())
    (unfinished / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": ARRAY_RECORD}, indent=2))
    unfinished.rename(target)


def _tfrecords(path: Path) -> Iterator[bytes]:
    """Return the records of a TFRecord file: each is its length (8 bytes), a checksum (4), the data, a checksum (4)."""
    with open(path, "rb") as file:
        while head := file.read(12):
            length = int.from_bytes(head[:8], "little")
            record = file.read(length)
            if len(record) + len(file.read(4)) != length + 4:
                raise PreparationError(f"{path} ends in the middle of a record: it is damaged")
            yield record


def check(dataset: str, data_dir: str | None, *, allow_partial: bool) -> dict[str, int]:
    """Check a prepared set and return the number of examples of each split.

    The files hold as many records as the metadata say (for ImageNet, as were published); a spread of the
    examples can be decoded, with labels in range (for ImageNet, with the labels that the file names imply).

    Raises:
      PreparationError: what is wrong, and where.
    """
    builder = open_prepared(dataset, data_dir)
    is_imagenet = builder.info.name == IMAGENET
    counts = {}
    for split, info in builder.info.splits.items():
        stored = sum(ArrayRecordReader(str(path)).num_records() for path in info.filepaths)
        expected = IMAGENET_COUNTS[split] if is_imagenet and not allow_partial else info.num_examples
        if not stored == info.num_examples == expected:
            raise PreparationError(
                f"{split}: {stored:,} records in the files, {info.num_examples:,} in the metadata, expected "
                f"{expected:,}. Remove {builder.data_dir} and prepare it again"
            )
        counts[split] = stored
        source = TfdsSource(dataset, split, data_dir=data_dir)
        has_labels = not (is_imagenet and split == "test")  # those were never published
        for index in spread(stored, CHECKED_PER_SPLIT):
            try:
                _check_example(source, index, has_labels=has_labels, is_imagenet=is_imagenet)
            except ValueError as error:
                raise PreparationError(
                    f"{source.name(index)}: {error}. Remove {builder.data_dir} and prepare it again"
                ) from error
    return counts


def _check_example(source: TfdsSource, index: int, *, has_labels: bool, is_imagenet: bool) -> None:
    """Raise ValueError if the image cannot be decoded or the label is not what it should be."""
    example = source[index]
    if isinstance(example["image"], bytes):
        decode_image(example["image"])
    if not has_labels:
        return
    if not 0 <= example["label"] < source.num_classes:
        raise ValueError(f"label {example['label']} is not one of {source.num_classes} classes")
    if is_imagenet:
        wordnet_id = imagenet_wordnet_id(source.file_name(index))
        if wordnet_id != source.class_names[example["label"]]:
            raise ValueError(
                f"the label is {example['label']} ({source.class_names[example['label']]}), the file name says "
                f"{wordnet_id}"
            )


def imagenet_wordnet_id(file_name: str) -> str:
    """Return the class that a file's name implies.

    "n01440764_10026.JPEG" of the training set says it; "ILSVRC2012_val_00000123.JPEG" is number 123 of the
    published list of validation labels, which TFDS ships.
    """
    prefix, _, number = file_name.removesuffix(".JPEG").rpartition("_")
    return imagenet_validation_labels()[int(number) - 1] if prefix == "ILSVRC2012_val" else prefix


@functools.cache
def imagenet_validation_labels() -> list[str]:
    """Return the 50,000 WordNet ids of the validation images, in the order of their numbers."""
    return Path(tfds.core.tfds_path(f"datasets/{IMAGENET}/validation_labels.txt")).read_text().split()


def check_imagenet_archives(folder: Path, *, allow_partial: bool) -> None:
    """Check the names inside ImageNet's training and validation archive.

    Raises:
      PreparationError: an archive is missing, has entries it should not have, or lacks some.
    """
    wordnet_ids = Path(tfds.core.tfds_path(f"datasets/{IMAGENET}/labels.txt")).read_text().split()
    train, validation = folder / "ILSVRC2012_img_train.tar", folder / "ILSVRC2012_img_val.tar"
    for archive in (train, validation):
        if not archive.is_file():
            raise PreparationError(f"{archive} is missing: get it from https://image-net.org/download-images")

    names = _file_names(train)
    expected = [f"{wordnet_id}.tar" for wordnet_id in wordnet_ids]
    if allow_partial:
        expected = [name for name in expected if name in names]
    _check_names(train, names, expected)

    # By number, without gaps: what TFDS counts on when it labels by position.
    names = _file_names(validation)
    count = len(names) if allow_partial else IMAGENET_COUNTS["validation"]
    _check_names(validation, names, [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, count + 1)])


def _file_names(archive: Path) -> list[str]:
    """Return the names of all entries; folders and other strays show by a trailing slash."""
    with tarfile.open(archive, "r:") as tar:
        return [member.name if member.isfile() else f"{member.name}/" for member in tar]


def _check_names(archive: Path, names: Sequence[str], expected: Sequence[str]) -> None:
    if sorted(names) == sorted(expected):
        return
    strays = sorted(set(names) - set(expected))
    missing = sorted(set(expected) - set(names))
    twice = sorted(name for name, count in collections.Counter(names).items() if count > 1)
    found = [
        f"{len(which):,} {what} ({', '.join(which[:5])}{', ...' if len(which) > 5 else ''})"
        for what, which in (("not expected", strays), ("missing", missing), ("more than once", twice))
        if which
    ]
    raise PreparationError(
        f"{archive} has {len(names):,} entries, expected {len(expected):,}: {'; '.join(found)}. Labels would "
        "be wrong. Use the archive as published (--allow_partial accepts the first images without gaps)"
    )


if __name__ == "__main__":
    main()
