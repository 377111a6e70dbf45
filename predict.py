"""Classify images: python predict.py --workdir=runs/vir_b image.jpg folder/ [--stream] [--json] [--top=5].

Or by a model that is no run: --model=FOLDER_OF_WEIGHTS, or the name of one that comes with vir_jax, --model=vir_digits.

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
    predictions = predict_files(
        WORKDIR.value if MODEL.value is None else load(MODEL.value).classifier(),
        files,
        checkpoint=CHECKPOINT.value,
        weights=WEIGHTS.value,
        top=TOP.value,
        streamed=STREAM.value,
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


if __name__ == "__main__":
    command_line.run(main)
