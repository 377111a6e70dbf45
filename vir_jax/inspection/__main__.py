"""Figures of a trained ViR: python -m vir_jax.inspection --workdir=runs/vir_digits --image=7 --out=figures."""

from pathlib import Path

from absl import app, flags

from vir_jax import command_line
from vir_jax.inspection.workdir import load_image, load_model
from vir_jax.paths import PathError, check_path, define_path
from vir_jax.runs.log import quiet_libraries

WORKDIR = define_path("workdir", None, "folder of the run, local or gs://bucket/folder", bucket=True)
IMAGE = flags.DEFINE_string(
    "image", None, "an image file, or the number of an example of the run's evaluation data"
)
OUT = define_path("out", None, "folder for the figures; made if absent")
CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "'last', 'best' or the number of a step")
WEIGHTS = flags.DEFINE_enum("weights", None, ["raw", "ema"], "default: the moving average where there is one")
COMPARE = flags.DEFINE_list("compare", [], "more workdirs, whose training curves are drawn beside the run's")


def main(argv: list[str]) -> None:
    """Draw the figures that the flags ask for."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every option begins with --")
    try:
        compared = [check_path(workdir, "--compare", bucket=True) for workdir in COMPARE.value]
        picture = IMAGE.value or ""
        picture = picture if picture.isdigit() else check_path(picture, "--image")
    except PathError as error:
        raise app.UsageError(str(error)) from error
    from vir_jax.inspection.report import draw_report  # Where matplotlib is missing, one sentence says so.

    quiet_libraries()
    trained = load_model(WORKDIR.value, checkpoint=CHECKPOINT.value, weights=WEIGHTS.value)
    image = load_image(trained, picture)
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in draw_report(trained, image, [WORKDIR.value, *compared]):
        figure.savefig(out / f"{name}.png")
        command_line.write_line(str(out / f"{name}.png"))


if __name__ == "__main__":
    command_line.run(main, required=("workdir", "image", "out"))
