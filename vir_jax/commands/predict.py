"""Classify images: vir-predict --workdir=runs/vir_b image.jpg folder/ [--stream] [--json] [--top=5].

Of a run of the task segmentation --segment=FOLDER writes masks into a folder, NAME.png of the classes' numbers and
NAME.overlay.png, in which they are laid over the image; with --stream at the image's own size, row by row.

Or by a model that is no run: --model=FOLDER_OF_WEIGHTS, or the name of one that comes with vir_jax, --model=vir_digits.

A line for each file, errors on the standard error; with --json an object a line for all of them. Exit codes:
0 done; 1 a file that could not be read, or an error, of which --traceback shows where it arose; 141 the reader of the
output went away.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from absl import app, flags

from vir_jax import command_line
from vir_jax.inference.predict import Prediction, predict_files
from vir_jax.inference.segment import Segments, segment_files
from vir_jax.paths import PathError, check_path, define_path
from vir_jax.weights import load

FLAGS = flags.FLAGS

WORKDIR = define_path("workdir", None, "folder of the run, local or gs://bucket/folder", bucket=True)
MODEL = flags.DEFINE_string("model", None, "folder of weights, or a name of the zoo, in place of a run")
CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "'last', 'best' or the number of a step")
WEIGHTS = flags.DEFINE_enum("weights", None, ["raw", "ema"], "default: the moving average where there is one")
TOP = flags.DEFINE_integer("top", 5, "classes named for each file", lower_bound=1)
STREAM = flags.DEFINE_bool(
    "stream",
    False,
    "read images at their own size in constant memory; TIFF and .npy may be larger than memory",
)
WINDOW = flags.DEFINE_list(
    "window", None, "x,y,width,height in pixels: the part of each image that is read; default: all of it"
)
SEGMENT = define_path("segment", None, "folder to write masks into, of a run of the task segmentation")
JSON = flags.DEFINE_bool("json", False, "one JSON object a line")


def main(argv: list[str]) -> int:
    """Turn the flags into one call of vir_jax."""
    if len(argv) < 2:
        raise app.UsageError("name image files or folders")
    try:
        files = [check_path(file, "an image file") for file in argv[1:]]
    except PathError as error:
        raise app.UsageError(str(error)) from error
    if (WORKDIR.value is None) == (MODEL.value is None):
        raise app.UsageError("expected one of --workdir and --model")
    if MODEL.value is not None and (FLAGS["checkpoint"].present or FLAGS["weights"].present):
        raise app.UsageError("--checkpoint and --weights are of --workdir; a --model has one set of weights")
    options: dict[str, Any] = {
        "checkpoint": CHECKPOINT.value,
        "weights": WEIGHTS.value,
        "top": TOP.value,
        "streamed": STREAM.value,
        "window": _window(WINDOW.value),
    }
    results: Iterator[Prediction | Segments]
    if SEGMENT.value is not None:
        if WORKDIR.value is None:
            raise app.UsageError("--segment is of a --workdir; the models of --model classify images")
        results = segment_files(WORKDIR.value, files, SEGMENT.value, **options)
    else:
        source = WORKDIR.value if MODEL.value is None else load(MODEL.value).classifier()
        results = predict_files(source, files, **options)
    failed = False
    for result in results:
        failed |= result.error is not None
        if JSON.value:
            command_line.write_line(json.dumps({"file": result.file, **_found(result)}))
        else:
            command_line.write_line(str(result), sys.stdout if result.error is None else sys.stderr)
    return int(failed)


def _found(result: Prediction | Segments) -> dict[str, Any]:
    if result.error is not None:
        return {"error": result.error}
    if isinstance(result, Segments):
        shares = [{"class": name, "share": share} for name, share in result.classes]
        return {"mask": result.mask, "overlay": result.overlay, "classes": shares}
    return {"classes": [{"class": name, "probability": p} for name, p in result.classes]}


def _window(numbers: list[str] | None) -> tuple[int, int, int, int] | None:
    if numbers is None:
        return None
    if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
        raise app.UsageError(f"--window={','.join(numbers)}: expected x,y,width,height in pixels")
    x, y, width, height = map(int, numbers)
    return x, y, width, height


def run() -> None:
    """Run the command."""
    command_line.run(main)
