"""Weights in and out of runs, as folders that hubs and other libraries know.

    python -m vir_jax.weights export runs/vir_b vir_b_weights [--layout=vir|timm|hf|release]
    python -m vir_jax.weights import vit_b_weights runs/vit_b [--layout=...] [--image_size=384] [--classes=names.txt]

The second makes a run of one checkpoint: eval.py, predict.py and config.init_from take it as any other.
"""

from pathlib import Path

from absl import app, flags

from vir_jax import command_line
from vir_jax.paths import PathError, check_path
from vir_jax.runs.load import load_run
from vir_jax.runs.log import quiet_libraries
from vir_jax.weights import LAYOUTS, load, save, save_run

LAYOUT = flags.DEFINE_enum(
    "layout", None, list(LAYOUTS), "export: vir by default; import: seen from the names"
)
CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "export: 'last', 'best' or the number of a step")
WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["raw", "ema"], "export; default: the average where there is one"
)
IMAGE_SIZE = flags.DEFINE_list("image_size", None, "import: pixels, a square's side or height,width")
PATCH = flags.DEFINE_integer("patch", None, "import: pixels; default: as stored", lower_bound=1)
CLASSES = flags.DEFINE_string("classes", None, "import: text file of class names, one a line, in their order")
MEAN = flags.DEFINE_list("mean", None, "import: of the colours in [0, 1], where no file says it")
STD = flags.DEFINE_list("std", None, "import: of the colours in [0, 1], where no file says it")


def main(argv: list[str]) -> None:
    """Export or import."""
    if len(argv) != 4 or argv[1] not in ("export", "import"):
        raise app.UsageError("expected: export WORKDIR FOLDER, or: import FOLDER_OR_FILE WORKDIR")
    quiet_libraries()
    try:
        exports = argv[1] == "export"
        source = check_path(argv[2], "the source", bucket=exports)
        target = check_path(argv[3], "the target", bucket=not exports)
    except PathError as error:
        raise app.UsageError(str(error)) from error
    if exports:
        save(target, load_run(source, CHECKPOINT.value, weights=WEIGHTS.value), layout=LAYOUT.value or "vir")
        return
    sides = [int(side) for side in IMAGE_SIZE.value or ()]
    loaded = load(
        source,
        layout=LAYOUT.value,
        image_size=(sides[0] if len(sides) == 1 else sides) if sides else None,
        patch=PATCH.value,
        class_names=CLASSES.value and Path(CLASSES.value).read_text().splitlines(),
        mean=[float(value) for value in MEAN.value] if MEAN.value else None,
        std=[float(value) for value in STD.value] if STD.value else None,
    )
    save_run(target, loaded)
    command_line.write_line(f"{target}: {loaded.card.model['name']}, {loaded.card.num_classes} classes")


if __name__ == "__main__":
    command_line.run(main)
