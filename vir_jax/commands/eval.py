"""Evaluate a checkpoint: vir-eval --workdir=runs/vir_b [--checkpoint=best] [--mode=all] [--image_size=384].

Exit codes: 0 done; 1 anything else. An expected error is told in a sentence; --traceback shows where it arose.
"""

import jax
from absl import app, flags

from vir_jax import command_line
from vir_jax.evaluation import evaluate_workdir, format_results
from vir_jax.parallel.processes import initialize_from_flags
from vir_jax.paths import define_path
from vir_jax.runs.log import quiet_libraries

WORKDIR = define_path("workdir", None, "folder of the run, local or gs://bucket/folder", bucket=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "'last', 'best' or the number of a step")
WEIGHTS = flags.DEFINE_enum("weights", None, ["raw", "ema"], "default: the moving average where there is one")
MODE = flags.DEFINE_string(
    "mode", "auto", "auto, parallel, recurrent, chunkwise, or all: side by side, must agree"
)
IMAGE_SIZE = flags.DEFINE_list(
    "image_size", None, "pixels, a square's side or height,width; default: as trained"
)
DATASET = flags.DEFINE_string("dataset", None, "default: the run's")
SPLIT = flags.DEFINE_string("split", None, "default: the run's evaluation split")
DATA_DIR = define_path("data_dir", None, "default: the run's")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "over all devices; default: the run's", lower_bound=1)


def main(argv: list[str]) -> None:
    """Turn the flags into one call of vir_jax."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every option begins with --")
    quiet_libraries()
    initialize_from_flags()
    results = evaluate_workdir(
        WORKDIR.value,
        checkpoint=CHECKPOINT.value,
        weights=WEIGHTS.value,
        image_size=_image_size(IMAGE_SIZE.value),
        mode=MODE.value,
        dataset=DATASET.value,
        split=SPLIT.value,
        data_dir=DATA_DIR.value,
        batch_size=BATCH_SIZE.value,
    )
    if jax.process_index() == 0:
        command_line.write_line(format_results(results))


def _image_size(sides: list[str] | None) -> int | tuple[int, int] | None:
    if sides is None:
        return None
    if len(sides) not in (1, 2) or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise app.UsageError(f"--image_size={','.join(sides)}: expected a positive number, or height,width")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def run() -> None:
    """Run the command."""
    command_line.run(main, required=("workdir",))
