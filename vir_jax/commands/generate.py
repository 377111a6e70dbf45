"""Draw images: vir-generate --workdir=runs/digits --num=64 --out=grid.png [--prompt=image.png --rows=4].

A prompt is an image file, or the number of an example of the run's evaluation data; all images begin with its first
rows. Prints what was drawn, with --json an object a line for each image. Exit codes: 0 done; 1 anything else. An
expected error is told in a sentence; --traceback shows where it arose.
"""

import json
import time

import numpy as np
from absl import app, flags

from vir_jax import command_line
from vir_jax.generation.workdir import generate_images, save_grid
from vir_jax.paths import PathError, check_path, define_path

WORKDIR = define_path("workdir", None, "folder of the run, local or gs://bucket/folder", bucket=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "'last', 'best' or the number of a step")
WEIGHTS = flags.DEFINE_enum("weights", None, ["raw", "ema"], "default: the moving average where there is one")
NUM = flags.DEFINE_integer("num", 64, "images", lower_bound=1)
OUT = define_path("out", None, "image file that they are written to, side by side")
SEED = flags.DEFINE_integer("seed", 0, "of all images", lower_bound=0, upper_bound=2**32 - 1)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "above 1 more varied, towards 0 the most probable")
TOP_K = flags.DEFINE_integer("top_k", None, "draw one of the so many most probable levels; default: of all")
TOP_P = flags.DEFINE_float("top_p", None, "draw one of the most probable levels of this probability together")
PROMPT = flags.DEFINE_string("prompt", None, "image file, or number of an evaluation example, to complete")
ROWS = flags.DEFINE_integer("rows", None, "of the prompt that are kept; default: half of them")
JSON = flags.DEFINE_bool("json", False, "one JSON object a line")


def main(argv: list[str]) -> None:
    """Turn the flags into one call of vir_jax."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every option begins with --")
    try:
        prompt = PROMPT.value and check_path(PROMPT.value, "--prompt")
    except PathError as error:
        raise app.UsageError(str(error)) from error
    started = time.perf_counter()
    images, bits = generate_images(
        WORKDIR.value,
        NUM.value,
        checkpoint=CHECKPOINT.value,
        weights=WEIGHTS.value,
        seed=SEED.value,
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        prompt=prompt,
        rows=ROWS.value,
    )
    seconds = time.perf_counter() - started
    save_grid(images, OUT.value)
    if JSON.value:
        for number, value in enumerate(bits):
            command_line.write_line(json.dumps({"image": number, "bits_per_dim": float(value)}))
        return
    num, height, width, _ = images.shape
    command_line.write_line(
        f"{OUT.value}: {num:,} images of {height} x {width} pixels in {seconds:.1f} s, {np.mean(bits):.4f} bits/dim"
    )


def run() -> None:
    """Run the command."""
    command_line.run(main, required=("workdir", "out"))
