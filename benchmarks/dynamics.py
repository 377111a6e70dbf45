"""How training moves a model at every recipe's optimiser and schedule: `python -m benchmarks.dynamics`, minutes.

A dry run of each recipe in configs/: its loss, mixing, drop path, optimiser and schedule, with the model's size, image
and batch cut down to what a CPU does in seconds, real images (scikit-learn's digits, not augmented), and all epochs
squeezed into a few hundred steps. It shows whether every kind of parameter moves, and by which share of its size; it
does not foretell accuracy, and measures no time. Writes benchmarks/results/dynamics.{md,json}; --recipes chooses some,
beside which those written before stay.
"""

import argparse
import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from benchmarks.timing import RESULTS, markdown_table, write_results
from vir_jax.data import open_source
from vir_jax.inspection.movement import kind_of, movement, norms_by_block
from vir_jax.models.pyramid_variants import PYRAMID_SIZES
from vir_jax.runs.model import model_functions
from vir_jax.runs.state import create_train_state
from vir_jax.tasks import make_task
from vir_jax.tasks.task import Batch
from vir_jax.training.optimizer import learning_rate_schedule, make_optimizer, optimizer_options
from vir_jax.training.plan import step_config
from vir_jax.training.step import make_train_step

# Those that classify: models of pixels have no other size to be run at, and the images here no masks.
CONFIGS = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("vi[rt]_*.py"))
OTHERS = re.compile(r".*_pixels|.*_segmentation")
RECIPES = tuple(name for name in CONFIGS if not OTHERS.fullmatch(name))
DATA, CLASSES = "digits", 10
STEPS, BATCH_SIZE = 320, 128


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a dry run.

    Attributes:
        learning_rate: applied.
        loss: before the step.
        gradient_norms: before clipping, by block; see `norms_by_block`.
        size: RMS of the parameters before the step, by group.
        moved: RMS of what the step added to them.
    """

    learning_rate: float
    loss: float
    gradient_norms: dict[str, Any]
    size: dict[str, float]
    moved: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Record:
    """The dry run of one recipe: `model` is the one that ran, `losses` are all, `steps` those of the table."""

    recipe: str
    model: str
    optimizer: str
    losses: list[float]
    steps: dict[int, Step]  # By number, from 0.


def load(recipe: str) -> ml_collections.ConfigDict:
    """The recipe at the size of a dry run, but for its name the same."""
    config = import_module(f"configs.{recipe}").get_config()
    if config.model.name in PYRAMID_SIZES:
        config.model.name, config.model.stem_stride = "vir_h_nano", 1
    else:
        config.model.name = config.model.name.partition("_")[0] + "_pico2"
    config.model.image_size = (8, 8)
    config.batch_size = BATCH_SIZE
    return config


def dry_run(
    config: ml_collections.ConfigDict, *, steps: int, stop: int | None = None, group_of: Any = kind_of
) -> Iterator[Step]:
    """Runs a config's own training step on one device.

    Args:
        config: of `load`.
        steps: that the whole schedule, cool-down included, is squeezed into.
        stop: the last step to run, where not all of them are wanted.
        group_of: of `movement`.
    """
    task = make_task(config, [str(number) for number in range(CLASSES)])
    model = model_functions(config.model, task.num_outputs)
    epochs = config.epochs + config.optim.cooldown_epochs
    schedule = learning_rate_schedule(config, steps_per_epoch=steps / epochs)
    optimizer = optax.chain(
        optax.snapshot("gradient_norms", norms_by_block),
        make_optimizer(**optimizer_options(config.optim)),
    )
    train_step = make_train_step(model.train, task, optimizer, schedule, step_config(config))

    @jax.jit
    def step(state: Any, batch: Batch) -> Any:
        stepped, metrics = train_step(state, batch)
        moved = movement(state.params, stepped.params, group_of)
        return stepped, (metrics, optax.tree.get(stepped.opt_state, "gradient_norms"), moved)

    state = create_train_state(model.init(jax.random.key(config.seed)), optimizer, ema=False)
    for batch in _batches(config.batch_size, steps if stop is None else stop):
        state, (metrics, norms, moved) = jax.device_get(step(state, batch))
        yield Step(
            learning_rate=float(metrics["learning_rate"]),
            loss=float(metrics["loss"]),
            gradient_norms={name: norm.tolist() for name, norm in norms.items()},
            size={group: float(each.size) for group, each in moved.items()},
            moved={group: float(each.moved) for group, each in moved.items()},
        )


@functools.cache
def _images() -> tuple[np.ndarray, np.ndarray]:
    source = open_source(DATA, "train")
    examples = [source[index] for index in range(len(source))]
    images = np.stack([example["image"] for example in examples])
    return images, np.array([example["label"] for example in examples], np.int32)


def _batches(batch_size: int, steps: int) -> Iterator[Batch]:
    images, labels = _images()
    rng = np.random.default_rng(0)
    for _ in range(steps):
        chosen = rng.choice(len(labels), batch_size, replace=False)
        yield {"image": images[chosen], "label": labels[chosen]}


def measure(recipe: str, *, steps: int) -> Record:
    """The dry run of a recipe."""
    config = load(recipe)
    run = list(dry_run(config, steps=steps))
    peak, last = int(np.argmax([step.learning_rate for step in run])), len(run) - 1
    numbers = (0, peak, (peak + last) // 2, (peak + 3 * last) // 4, last)
    return Record(
        recipe,
        config.model.name,
        config.optim.name,
        [step.loss for step in run],
        {number: run[number] for number in numbers},
    )


def table(record: Record) -> str:
    """A recipe's moves by kind of parameter, its loss and its gradients, at five steps."""
    chosen = list(record.steps.values())
    rows = [
        ["learning rate", *(f"{step.learning_rate:.1e}" for step in chosen)],
        ["loss", *(f"{step.loss:.3f}" for step in chosen)],
    ]
    rows += [
        [kind, *(f"{step.size[kind]:.0e}, {_share(step, kind)}" for step in chosen)]
        for kind in sorted(chosen[0].size)
    ]
    for group, norms in chosen[0].gradient_norms.items():
        for block in range(len(norms)) if isinstance(norms, list) else [None]:
            values = [step.gradient_norms[group] for step in chosen]
            values = values if block is None else [value[block] for value in values]
            name = group if block is None else f"{group}, {block}"
            rows.append([f"gradient norm, {name}", *(f"{value:.1e}" for value in values)])
    title = f"`{record.recipe}` by `{record.optimizer}`, run as `{record.model}`"
    return markdown_table([title, *(f"step {number}" for number in record.steps)], rows)


def _share(step: Step, kind: str) -> str:
    """What a step added, in per cent of the size before it."""
    return f"{100 * step.moved[kind] / step.size[kind]:.2g} %" if step.size[kind] else "from 0"


def markdown(records: list[Record]) -> str:
    """The page of all recipes."""
    return (
        f"The dry run of every recipe: {len(records[0].losses)} steps of {BATCH_SIZE} of scikit-learn's digits, the"
        " recipe's own loss, mixing,\ndrop path, optimiser and schedule. Of each kind of parameter its RMS before the"
        " step, and the RMS of what the step adds in\nper cent of it. Gradient norms are before clipping; blocks count"
        " from the first. Written by `python -m benchmarks.dynamics`.\n\n" + "\n".join(map(table, records))
    )


def _written() -> dict[str, Record]:
    """What was written before, by recipe."""
    path = RESULTS / "dynamics.json"
    found = json.loads(path.read_text())["records"] if path.exists() else []
    return {
        record["recipe"]: Record(
            **record | {"steps": {int(number): Step(**step) for number, step in record["steps"].items()}}
        )
        for record in found
    }


def main() -> None:
    """Runs, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    records = _written()
    for recipe in arguments.recipes:
        records[recipe] = measure(recipe, steps=arguments.steps)
        print(table(records[recipe]), flush=True)
    known = [records[recipe] for recipe in RECIPES if recipe in records]
    write_results("dynamics", markdown(known), known)


if __name__ == "__main__":
    main()
