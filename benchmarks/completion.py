"""Digits completed by a model of pixels, as a classifier of digits sees them: `python -m benchmarks.completion`.

Every image of the test split is cut after its first rows, and a run of the task `pixels` draws the rest, several times.
A run that classifies digits says how many of the completed images it takes for the digit that they were begun from,
beside how many of the real ones, and of the upper rows alone, with nothing below or with the lower rows of another test
image. And how probable the real lower rows are, given the upper ones.

    python train.py --config=configs/vir_digits_pixels.py --workdir=runs/vir_digits_pixels
    python train.py --config=configs/vir_digits.py --workdir=runs/vir_digits
    python -m benchmarks.completion --pixels=runs/vir_digits_pixels --classifier=runs/vir_digits

Writes benchmarks/results/completion.{md,json} and docs/figures/generated.png.
"""

import argparse
import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.timing import markdown_table, write_results
from vir_jax.data import open_source
from vir_jax.generation import generate, log_likelihood
from vir_jax.inspection.figures.style import new_figure
from vir_jax.models.pixels import to_colours
from vir_jax.runs.load import Run, load_run
from vir_jax.tasks.pixels import Pixels, check_predicts_pixels

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "generated.png"
ROWS, DRAWS = 4, 5
SAMPLES, COMPLETIONS = 8, 3  # Along a side of the figure's grid of samples; of each image beside it.

Levels = Int[np.ndarray, "n y x channels"]


@dataclasses.dataclass(frozen=True)
class Record:
    """What the classifier makes of some images; means over draws where there are several."""

    images: str
    top1: float
    spread: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Likelihoods:
    """Bits per dimension of the test images, and of parts of them given what comes before, with standard errors."""

    whole: tuple[float, float]
    upper: tuple[float, float]
    lower: tuple[float, float]


def read_images(run: Run) -> tuple[Levels, Int[np.ndarray, " n"]]:
    """Return the levels and classes of the evaluation split of a run of the task `pixels`."""
    data = run.config.data
    source = open_source(data.dataset, data.eval_split, data_dir=data.data_dir)
    examples = [source[index] for index in range(len(source))]
    images = np.stack([example["image"] for example in examples])
    return np.asarray(run.task.inputs({"image": jnp.asarray(images)})), np.array(
        [e["label"] for e in examples]
    )


def complete(run: Run, images: Levels, rows: int, seed: int) -> Levels:
    """Return images with their first rows, and the rest drawn by the model."""
    drawn, _ = generate(run.model, jax.random.key(seed, impl="threefry2x32"), len(images), images[:, :rows])
    return np.asarray(drawn)


def is_right(
    run: Run, colours: UInt8[np.ndarray, "n y x 3"], labels: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Return which images a classifier takes for what they are."""
    inputs = run.task.inputs({"image": jnp.asarray(colours)})
    return np.asarray(jnp.argmax(jax.jit(run.functions.apply)(run.params, inputs), axis=-1)) == labels


def likelihoods(run: Run, images: Levels, rows: int) -> Likelihoods:
    """Return the bits per dimension of the real images."""
    nats = np.asarray(log_likelihood(run.model, jnp.asarray(images)), np.float64)
    bits = -nats / (math.log(2) * images.shape[-1])

    def of(part: Float[np.ndarray, "n y x"]) -> tuple[float, float]:
        each = part.mean(axis=(1, 2))
        return float(each.mean()), float(each.std() / math.sqrt(len(each)))

    return Likelihoods(of(bits), of(bits[:, :rows]), of(bits[:, rows:]))


def measure(
    pixels: Run, classifier: Run, rows: int, draws: int
) -> tuple[list[Record], Likelihoods, dict[int, Levels]]:
    """Complete, classify and score all test images; and return the first few completions of each."""
    images, labels = read_images(pixels)
    assert isinstance(pixels.task, Pixels)
    colours_of = functools.partial(to_colours, levels=pixels.task.likelihood.levels)

    def top1(levels: Levels) -> float:
        return float(is_right(classifier, np.asarray(colours_of(jnp.asarray(levels))), labels).mean())

    completed = {seed: complete(pixels, images, rows, seed) for seed in range(draws)}
    scores = [top1(drawn) for drawn in completed.values()]
    empty, others = images.copy(), images.copy()
    empty[:, rows:] = 0
    others[:, rows:] = np.random.default_rng(0).permutation(images)[:, rows:]
    records = [
        Record("real", top1(images), None, len(images)),
        Record(
            f"first {rows} rows real, the rest drawn ({draws} times)",
            statistics.mean(scores),
            statistics.stdev(scores) if draws > 1 else None,
            len(images),
        ),
        Record(f"first {rows} rows real, the rest of another image", top1(others), None, len(images)),
        Record(f"first {rows} rows real, the rest black", top1(empty), None, len(images)),
    ]
    return records, likelihoods(pixels, images, rows), completed


def report(records: Sequence[Record], bits: Likelihoods, rows: int, runs: Mapping[str, Run]) -> str:
    """Return the page."""
    of = ", ".join(f"{name}: step {run.step}, {run.weights} weights" for name, run in runs.items())

    def percent(record: Record) -> str:
        error = math.sqrt(record.top1 * (1 - record.top1) / record.count)
        spread = "" if record.spread is None else f", {100 * record.spread:.1f} between draws"
        return f"{100 * record.top1:.1f} (± {100 * error:.1f}{spread})"

    table = markdown_table(
        ["images", "top-1 of the classifier, %"], [[record.images, percent(record)] for record in records]
    )
    likelihood = markdown_table(
        ["pixels", "bits/dim, lower is better"],
        [
            ["all", "{:.3f} ± {:.3f}".format(*bits.whole)],
            [f"first {rows} rows", "{:.3f} ± {:.3f}".format(*bits.upper)],
            ["the rest, given those", "{:.3f} ± {:.3f}".format(*bits.lower)],
        ],
    )
    return (
        f"{records[0].count} test images. {of}. ±: the standard error over images.\n"
        f"Written by `python -m benchmarks.completion`.\n\n{table}\n{likelihood}"
    )


def draw(pixels: Run, completed: Mapping[int, Levels], rows: int) -> Figure:
    """Return samples, and images beside their completions."""
    assert isinstance(pixels.task, Pixels)
    levels = pixels.task.likelihood.levels
    samples, _ = generate(pixels.model, jax.random.key(0, impl="threefry2x32"), SAMPLES**2)
    images, labels = read_images(pixels)
    # The first image of each class.
    chosen = np.array([np.flatnonzero(labels == label)[0] for label in np.unique(labels)])
    shown = [images, *list(completed.values())[:COMPLETIONS]]

    figure = new_figure(9.6, 3.1, f"Drawn pixel by pixel by ViR: step {pixels.step}, temperature 1")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.5))
    _tiles(left, np.asarray(samples), SAMPLES, levels)
    left.set_title(f"{SAMPLES**2} samples", fontsize=10)
    _tiles(right, np.concatenate([x[chosen] for x in shown]), len(chosen), levels, cut=rows)
    height = images.shape[1] + 1
    right.set_yticks([height * (i + 0.5) for i in range(len(shown))])
    right.set_yticklabels(["test image", *(f"completion {i + 1}" for i in range(len(shown) - 1))], fontsize=9)
    right.tick_params(length=0)
    right.set_title(f"first {rows} rows given, the rest drawn", fontsize=10)
    return figure


def _tiles(axes: Axes, images: Levels, cols: int, levels: int, *, cut: int | None = None) -> None:
    """Draw images side by side, white lines between them; in all rows but the first a line above what was drawn."""
    num, height, width, _ = images.shape
    grid = np.full((num // cols * (height + 1), cols * (width + 1), 3), 255, np.uint8)
    colours = np.asarray(to_colours(jnp.asarray(images), levels))
    for number, image in enumerate(colours):
        y, x = divmod(number, cols)
        grid[y * (height + 1) :, x * (width + 1) :][:height, :width] = image
    axes.imshow(grid, interpolation="nearest", extent=(0, grid.shape[1], grid.shape[0], 0))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if cut is not None:
        for row in range(1, num // cols):
            axes.axhline(row * (height + 1) + cut, color="tab:red", linewidth=0.8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read both runs, measure, and write it down."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.completion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pixels", required=True, help="workdir of a run that predicts pixels")
    parser.add_argument(
        "--classifier", required=True, help="workdir of a run that classifies the same images"
    )
    parser.add_argument("--rows", type=int, default=ROWS, help="that are kept of each image")
    parser.add_argument("--draws", type=int, default=DRAWS, help="completions of each image")
    given = parser.parse_args(arguments)
    try:
        pixels, classifier = (load_run(workdir, "last") for workdir in (given.pixels, given.classifier))
        check(pixels, classifier, given.rows, given.draws)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    records, bits, completed = measure(pixels, classifier, given.rows, given.draws)
    page = report(records, bits, given.rows, {"pixels": pixels, "classifier": classifier})
    print(page)
    write_results("completion", page, [*records, bits])
    draw(pixels, completed, given.rows).savefig(FIGURE, dpi=130)


def check(pixels: Run, classifier: Run, rows: int, draws: int) -> None:
    """Check that one run draws what the other classifies.

    Raises:
        ValueError: it does not, or there are not so many rows.
    """
    check_predicts_pixels(pixels.task)
    height = pixels.model.stem.image_size[0]
    if not 1 <= rows < height or draws < 1:
        raise ValueError(f"--rows is {rows} and --draws {draws}; expected 1 to {height - 1}, and at least 1")
    if classifier.config.task != "classification":
        raise ValueError(
            f"--classifier is a run of the task {classifier.config.task!r}; expected 'classification'"
        )
    ours, theirs = (run.config.data.dataset for run in (pixels, classifier))
    if ours != theirs:
        raise ValueError(
            f"--pixels was trained on {ours!r}, --classifier on {theirs!r}; expected the same data"
        )


if __name__ == "__main__":
    main()
