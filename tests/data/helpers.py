"""Small TFDS sets made by hand, and code run in a fresh interpreter."""

import io
import json
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorboard.summary.writer.record_writer import RecordWriter

ROOT = Path(__file__).parents[2]

# Put in front of code, hides TensorFlow as if it were not installed.
HIDE_TENSORFLOW = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "tensorflow" else find_spec(name, *rest)
"""


def png(color: tuple[int, int, int], size: tuple[int, int] = (4, 3)) -> bytes:
    """A small PNG of one colour; `size` is (width, height)."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def write_tfds(
    data_dir: Path,
    name: str,
    splits: dict[str, list[tuple[Any, ...]]],
    *,
    class_names: Sequence[str] = ("cat", "dog"),
    file_format: str = "array_record",
    mask: tfds.features.Image | None = None,
) -> Path:
    """Write a set of (image, label, file name) as TFDS would, without TensorFlow; returns its folder.

    Where `mask` is a feature, examples end with a PNG of it.
    """
    folder = data_dir / name / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=list(class_names)),
            "file_name": tfds.features.Text(),
            **({} if mask is None else {"segmentation_mask": mask}),
        }
    )
    features.save_config(str(folder))
    for split, examples in splits.items():
        path = str(folder / f"{name}-{split}.{file_format}-00000-of-00001")
        records = [
            features.serialize_example(
                features.encode_example(
                    {
                        "image": io.BytesIO(image),
                        "label": label,
                        "file_name": file_name,
                        **dict(zip(("segmentation_mask",), map(io.BytesIO, masks), strict=False)),
                    }
                )
            )
            for image, label, file_name, *masks in examples
        ]
        if file_format == "array_record":
            array_record = ArrayRecordWriter(path, "group_size:1")
            for record in records:
                array_record.write(record)
            array_record.close()
        else:
            with open(path, "wb") as file:
                tfrecord = RecordWriter(file)
                for record in records:
                    tfrecord.write(record)
    info = {
        "name": name,
        "version": "1.0.0",
        "fileFormat": file_format,
        "splits": [
            {
                "name": split,
                "shardLengths": [str(len(examples))],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
            for split, examples in splits.items()
        ],
        "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter at the repository's root; fails with its output."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result
