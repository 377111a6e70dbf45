"""Weights in and out of runs, as folders that hubs and other libraries know.

    python -m vir_jax.weights export runs/vir_b vir_b_weights [--layout=vir|timm|hf|release]
    python -m vir_jax.weights import vit_b_weights runs/vit_b [--layout=...] [--image_size=384] [--classes=names.txt]
    python -m vir_jax.weights align runs/vit_b runs/vir_b_start [--steps=1000] [--retention=2d]

The second makes a run of one checkpoint: eval.py, predict.py and config.init_from take it as any other. The third makes
one of a ViR with the weights of a ViT, whose mixers were brought near to its attention on the training data of the
ViT's run.
"""

import contextlib
from pathlib import Path

from absl import app, flags

from vir_jax import command_line
from vir_jax.data import AugmentConfig, open_source, train_loader
from vir_jax.paths import PathError, check_path
from vir_jax.runs.load import Run, load_run
from vir_jax.runs.log import quiet_libraries
from vir_jax.runs.model import image_size
from vir_jax.weights import LAYOUTS, PretrainedModel, load, save, save_run
from vir_jax.weights.align import align, to_vir
from vir_jax.weights.exchange import of_run

LAYOUT = flags.DEFINE_enum(
    "layout", None, list(LAYOUTS), "export: vir by default; import: seen from the names"
)
CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "export: 'last', 'best' or the number of a step")
WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["raw", "ema"], "export; default: the average where there is one"
)
IMAGE_SIZE = flags.DEFINE_list("image_size", None, "import: pixels, a square's side or height,width")
PATCH = flags.DEFINE_integer("patch", None, "import: pixels; default: as stored", lower_bound=1)
CHANNELS = flags.DEFINE_integer("channels", None, "import: 1 (grey) or 3; default: 3", lower_bound=1)
CLASSES = flags.DEFINE_string("classes", None, "import: text file of class names, one a line, in their order")
MEAN = flags.DEFINE_list("mean", None, "import: of the colours in [0, 1], where no file says it")
STD = flags.DEFINE_list("std", None, "import: of the colours in [0, 1], where no file says it")
STEPS = flags.DEFINE_integer(
    "steps", 1000, "align: batches of training data; 0 leaves the weights as they are", 0
)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-3, "align: the highest")
RETENTION = flags.DEFINE_enum("retention", None, ["1d", "2d"], "align: of the ViR; default: 1d")


def main(argv: list[str]) -> None:
    """Export or import."""
    if len(argv) != 4 or argv[1] not in ("export", "import", "align"):
        raise app.UsageError(
            "expected: export WORKDIR FOLDER, or: import FOLDER_OR_FILE WORKDIR, or: align WORKDIR_OF_A_VIT WORKDIR"
        )
    quiet_libraries()
    try:
        source = check_path(argv[2], "the source", bucket=argv[1] != "import")
        target = check_path(argv[3], "the target", bucket=argv[1] != "export")
    except PathError as error:
        raise app.UsageError(str(error)) from error
    if argv[1] == "align":
        save_run(target, _aligned(load_run(source, CHECKPOINT.value, weights=WEIGHTS.value)))
        return
    if argv[1] == "export":
        save(target, load_run(source, CHECKPOINT.value, weights=WEIGHTS.value), layout=LAYOUT.value or "vir")
        return
    sides = [int(side) for side in IMAGE_SIZE.value or ()]
    loaded = load(
        source,
        layout=LAYOUT.value,
        image_size=(sides[0] if len(sides) == 1 else sides) if sides else None,
        patch=PATCH.value,
        channels=CHANNELS.value,
        class_names=CLASSES.value and Path(CLASSES.value).read_text().splitlines(),
        mean=[float(value) for value in MEAN.value] if MEAN.value else None,
        std=[float(value) for value in STD.value] if STD.value else None,
    )
    save_run(target, loaded)
    command_line.write_line(f"{target}: {loaded.card.model['name']}, {loaded.card.num_classes} classes")


def _aligned(run: Run) -> PretrainedModel:
    """Return the ViR of a ViT's run."""
    vit = of_run(run)
    vir = to_vir(vit, retention=RETENTION.value)
    config, data = run.config, run.config.data
    batches = train_loader(
        open_source(data.dataset, data.train_split, data_dir=data.data_dir),
        batch_size=config.batch_size,
        image_size=image_size(config.model),
        augment=AugmentConfig(**config.augment, mean=data.mean, std=data.std),
        seed=config.seed,
        num_threads=data.threads,
        max_corrupt_fraction=data.max_corrupt_fraction,
        background=tuple(data.background),
    )
    with contextlib.closing(batches):
        return align(vit, vir, batches, steps=STEPS.value, learning_rate=LEARNING_RATE.value)


if __name__ == "__main__":
    command_line.run(main)
