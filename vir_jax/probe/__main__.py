"""What a run's features are worth: python -m vir_jax.probe --workdir=runs/vir_b --layers=features,blocks.5.tokens.

Prints the top-1 of nearest neighbours and of a linear probe by layer, both fitted to the training split and scored on
the evaluation split, of the run's own data or of others. With --out the features are written, for each layer and split
one .npz file of values, labels and class names.
"""

from pathlib import Path

from absl import app, flags

from vir_jax import command_line
from vir_jax.data import open_source
from vir_jax.data.classes import match_classes
from vir_jax.paths import define_path
from vir_jax.probe import extract, linear_probe, nearest_neighbours
from vir_jax.runs.load import load_run
from vir_jax.runs.log import quiet_libraries

WORKDIR = define_path("workdir", None, "folder of the run, local or gs://bucket/folder", bucket=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "'last', 'best' or the number of a step")
WEIGHTS = flags.DEFINE_enum("weights", None, ["raw", "ema"], "default: the moving average where there is one")
LAYERS = flags.DEFINE_list(
    "layers", ["features"], "tokens of the model: features, blocks.3.tokens, tokens, ..."
)
POOL = flags.DEFINE_enum("pool", None, ["class_token", "average"], "default: what the head reads")
DATASET = flags.DEFINE_string("dataset", None, "default: the run's")
DATA_DIR = define_path("data_dir", None, "default: the run's")
TRAIN_SPLIT = flags.DEFINE_string("train_split", None, "default: the run's")
EVAL_SPLIT = flags.DEFINE_string("eval_split", None, "default: the run's")
NEIGHBOURS = flags.DEFINE_integer("neighbours", 20, "nearest ones that vote", lower_bound=1)
STRENGTH = flags.DEFINE_float("strength", 1.0, "C of the linear probe's logistic regression", lower_bound=0)
OUT = define_path("out", None, "folder for the features; made if absent")


def main(argv: list[str]) -> None:
    """Print a line for each layer."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every option begins with --")
    quiet_libraries()
    run = load_run(WORKDIR.value, CHECKPOINT.value, weights=WEIGHTS.value)
    data = run.config.data
    folder = data.data_dir if DATA_DIR.value is None else DATA_DIR.value
    dataset = DATASET.value or data.dataset
    train_source = open_source(dataset, TRAIN_SPLIT.value or data.train_split, data_dir=folder)
    test_source = open_source(dataset, EVAL_SPLIT.value or data.eval_split, data_dir=folder)
    test_source = match_classes(test_source, train_source.class_names, "the evaluation split")
    train, test = (
        extract(run, source, LAYERS.value, pool=POOL.value) for source in (train_source, test_source)
    )
    if OUT.value is not None:
        Path(OUT.value).mkdir(parents=True, exist_ok=True)
        for split, features in (("train", train), ("eval", test)):
            for layer, found in features.items():
                found.save(Path(OUT.value) / f"{split}.{layer}.npz")
    width = max(len("layer"), *map(len, LAYERS.value))
    command_line.write_line(f"{'layer':<{width}}  neighbours  linear probe")
    for layer in LAYERS.value:
        near = nearest_neighbours(train[layer], test[layer], neighbours=NEIGHBOURS.value)
        linear = linear_probe(train[layer], test[layer], strength=STRENGTH.value)
        command_line.write_line(f"{layer:<{width}}  {near:>10.2%}  {linear:>12.2%}")


if __name__ == "__main__":
    command_line.run(main, required=("workdir",))
