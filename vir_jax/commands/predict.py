"""Classify images: vir-predict --workdir=runs/vir_b image.jpg folder/ [--stream] [--json] [--top=5].

A line for each file, errors on the standard error; with --json an object a line for all of them. Exit codes:
0 done; 1 a file that could not be read, or an error, of which --traceback shows where it arose; 141 the reader of the
output went away.
"""

import json
import sys

from absl import app, flags

from vir_jax import command_line
from vir_jax.inference.predict import predict_files
from vir_jax.paths import PathError, check_path, define_path

WORKDIR = define_path("workdir", None, "folder of the run, local or gs://bucket/folder", bucket=True)
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
JSON = flags.DEFINE_bool("json", False, "one JSON object a line")


def main(argv: list[str]) -> int:
    """Turn the flags into one call of vir_jax."""
    if len(argv) < 2:
        raise app.UsageError("name image files or folders")
    try:
        files = [check_path(file, "an image file") for file in argv[1:]]
    except PathError as error:
        raise app.UsageError(str(error)) from error
    predictions = predict_files(
        WORKDIR.value,
        files,
        checkpoint=CHECKPOINT.value,
        weights=WEIGHTS.value,
        top=TOP.value,
        streamed=STREAM.value,
        window=_window(WINDOW.value),
    )
    failed = False
    for prediction in predictions:
        failed |= prediction.error is not None
        if JSON.value:
            classes = [{"class": name, "probability": p} for name, p in prediction.classes]
            found = {"classes": classes} if prediction.error is None else {"error": prediction.error}
            command_line.write_line(json.dumps({"file": prediction.file, **found}))
        else:
            command_line.write_line(str(prediction), sys.stdout if prediction.error is None else sys.stderr)
    return int(failed)


def _window(numbers: list[str] | None) -> tuple[int, int, int, int] | None:
    if numbers is None:
        return None
    if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
        raise app.UsageError(f"--window={','.join(numbers)}: expected x,y,width,height in pixels")
    x, y, width, height = map(int, numbers)
    return x, y, width, height


def run() -> None:
    """Run the command."""
    command_line.run(main, required=("workdir",))
