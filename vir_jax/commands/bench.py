"""Measure a model: images/s and memory by batch size, until it no longer fits.

    vir-bench --model=vir_s16 --size=512
    vir-bench --model=vit_s16 --size=512 --training --dtype=bfloat16

In a checkout `python -m vir_jax.commands.bench` is the same. One device; compilation and reading data are not counted.
With --training gradients are computed, but no optimiser's step. What a whole step needs is told by vir-compile, and
before its first step by vir-train.
"""

import jax
from absl import app, flags

from vir_jax import command_line
from vir_jax.parallel.hardware import GIB
from vir_jax.runs.config import default_config
from vir_jax.runs.log import quiet_libraries
from vir_jax.throughput import Throughput, device_capacity, measure

MODEL = flags.DEFINE_string("model", None, "name, such as vir_s16; see vir_jax.models")
SIZE = flags.DEFINE_integer("size", 224, "pixels of the image's side", lower_bound=1)
MODE = flags.DEFINE_string("mode", "auto", "auto, parallel, recurrent or chunkwise")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the computation")
TRAINING = flags.DEFINE_bool("training", False, "measure gradients, too")
FIRST = flags.DEFINE_integer(
    "first", 1, "batch size to begin with; each next one is twice as large", lower_bound=1
)
LIMIT = flags.DEFINE_integer(
    "limit", None, "largest batch size; default: until one does not fit", lower_bound=1
)


def main(argv: list[str]) -> None:
    """Print a line for each batch size."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every option begins with --")
    quiet_libraries()
    options = default_config().model
    options.name, options.image_size = MODEL.value, SIZE.value
    options.mode, options.dtype = MODE.value, DTYPE.value
    capacity = device_capacity()
    device = jax.devices()[0]
    has = "" if capacity is None else f", {capacity / GIB:,.1f} GiB"
    doing = "training (gradients)" if TRAINING.value else "inference"
    command_line.write_line(
        f"{MODEL.value}, {SIZE.value} px, {DTYPE.value}, {doing}, {device.device_kind}{has}"
    )
    command_line.write_line(f"{'batch':>7}{'images/s':>14}{'memory, GiB':>14}")
    for found in measure(
        options, training=TRAINING.value, first=FIRST.value, limit=LIMIT.value, capacity=capacity
    ):
        command_line.write_line(described(found))


def described(found: Throughput) -> str:
    """Return a line of the table."""
    memory = "" if found.memory is None else f"{found.memory / GIB:,.2f}"
    if found.images_per_second is None:
        return f"{found.batch:>7,}{'does not fit':>14}{memory:>14}"
    return f"{found.batch:>7,}{found.images_per_second:>14,.1f}{memory:>14}"


def run() -> None:
    """Run the command."""
    command_line.run(main, required=("model",))


if __name__ == "__main__":
    run()
