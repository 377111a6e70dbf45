"""Evaluate a checkpoint: python eval.py --workdir=runs/vir_b [--checkpoint=best] [--mode=all] [--image_size=384].

Prints a line for each mode; where the config has further evaluation sets, for each of them, too. --predictions writes
what a classifier says of each image; --report where it errs and whether it knows, which is printed, too: accuracy class
by class, confusion, calibration error.

Exit codes: 0 done; 1 anything else. An error that is foreseen is told in a sentence; --traceback shows where it arose.
"""

import jax
from absl import app, flags

from vir_jax import command_line
from vir_jax.evaluation import (
    Predictions,
    evaluate_workdir,
    format_report,
    format_results,
    report,
    write_report,
)
from vir_jax.parallel.processes import initialize_from_flags
from vir_jax.paths import define_path

WORKDIR = define_path("workdir", None, "folder of the run, local or gs://bucket/folder", bucket=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "'last', 'best' or the number of a step")
WEIGHTS = flags.DEFINE_enum("weights", None, ["raw", "ema"], "default: the moving average where there is one")
MODE = flags.DEFINE_string(
    "mode", "auto", "auto, parallel, recurrent, chunkwise, or all: side by side, must agree"
)
IMAGE_SIZE = flags.DEFINE_list(
    "image_size", None, "pixels, a square's side or height,width; default: as trained"
)
EVALUATIONS = flags.DEFINE_string(
    "evaluations",
    None,
    "'all', 'default', or the name of one of config.evaluations; default: all, with the next two flags 'default'",
)
PREDICTIONS = define_path("predictions", None, "JSONL file to write: a line an image")
REPORT = define_path("report", None, "JSON file to write: accuracy by class, confusion, calibration error")
DATASET = flags.DEFINE_string("dataset", None, "default: the run's")
SPLIT = flags.DEFINE_string("split", None, "default: the run's evaluation split")
DATA_DIR = define_path("data_dir", None, "default: the run's")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "over all devices; default: the run's", lower_bound=1)


def main(argv: list[str]) -> None:
    """Turn the flags into one call of vir_jax."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every option begins with --")
    initialize_from_flags()
    collecting = PREDICTIONS.value is not None or REPORT.value is not None
    predictions = Predictions() if collecting else None
    results = evaluate_workdir(
        WORKDIR.value,
        checkpoint=CHECKPOINT.value,
        weights=WEIGHTS.value,
        image_size=_image_size(IMAGE_SIZE.value),
        mode=MODE.value,
        evaluations=EVALUATIONS.value or ("default" if collecting else None),
        dataset=DATASET.value,
        split=SPLIT.value,
        data_dir=DATA_DIR.value,
        batch_size=BATCH_SIZE.value,
        observe=predictions,
    )
    if jax.process_index() == 0:
        command_line.write_line(format_results(results))
    if predictions is not None and PREDICTIONS.value is not None:
        predictions.write(PREDICTIONS.value)
    if predictions is not None and REPORT.value is not None:
        found = report(predictions)
        write_report(REPORT.value, found)
        command_line.write_line(f"\n{format_report(found)}")


def _image_size(sides: list[str] | None) -> int | tuple[int, int] | None:
    if sides is None:
        return None
    if len(sides) not in (1, 2) or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise app.UsageError(f"--image_size={','.join(sides)}: expected a positive number, or height,width")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    command_line.run(main)
