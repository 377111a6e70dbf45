"""Which way a model reads, and what it then knows of each pixel: `python -m benchmarks.segmentation`.

Models of one size are trained by configs/vir_digits_segmentation.py, on scenes of digits, and differ in which patches a
patch sees: those before it ("causal", which streams), those before or after it from block to block ("flips"), all of
them in a second pass ("bidirectional"), in one pass by heads that read forwards or backwards ("two_directions") or from
the four corners, in 2-D ("four_directions"), or all of them by attention ("vit"); attention to those before it
("causal_vit") tells what is the mixer's and what is the order's. Besides mIoU, how many of the digits'
pixels are right in each row of the canvas, and in each row of a digit: at its top a causal model has not seen what it
is.

    python -m benchmarks.segmentation --folder=runs/segmentation

Runs that are finished there are not trained again. Writes benchmarks/results/segmentation.{md,json}, the table in
docs/dense.md and docs/figures/segmentation.png; with --quick, after a few steps of each, the figure alone, to
FOLDER/segmentation.png.
"""

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure, SubFigure

from benchmarks.timing import markdown_table, replace_between_markers, write_results
from vir_jax.data import Source
from vir_jax.data.digits_scenes import DIGIT, SIDE, DigitsScenesSource
from vir_jax.inspection.figures.style import line, new_figure
from vir_jax.label_maps import palette
from vir_jax.runs.load import Run, load_run
from vir_jax.runs.recipes import load_recipe
from vir_jax.training.loop import train
from vir_jax.training.summary import count_parameters

DOCS = Path(__file__).parents[1] / "docs"
FIGURE, PAGE = DOCS / "figures" / "segmentation.png", DOCS / "dense.md"
EPOCHS, SEEDS, SHOWN, BATCH = 6.0, 3, 6, 50
QUICK_EPOCHS, QUICK_SCENES = 1.0, 100
BAND = 4  # Rows of the canvas that are told together.

VARIANTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "flips": {"flips": True},
    "bidirectional": {"bidirectional": True},
    "two_directions": {"directions": 2},
    "four_directions": {"directions": 4, "retention": "2d"},
    "causal_vit": {"name": "vit_pico4", "stem": "conv", "mixer": "causal_softmax"},
    "vit": {"name": "vit_pico4", "stem": "conv"},
}
"""By name, what of config.model differs from the recipe's."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        variant: of `VARIANTS`.
        seed: of the run.
        epochs: it was trained for.
        scenes: of the test split that were predicted.
        parameters: it has.
        miou: of the test scenes, a fraction.
        pixel_accuracy: of all their pixels.
        canvas_rows: of the digits' pixels in each row of the canvas, the fraction that is right.
        digit_rows: the same in each row of a digit.
    """

    variant: str
    seed: int
    epochs: float
    scenes: int
    parameters: int
    miou: float
    pixel_accuracy: float
    canvas_rows: list[float]
    digit_rows: list[float]


class FirstScenes:
    """The first scenes of a split."""

    per_pixel = True

    def __init__(self, split: str, count: int) -> None:
        self._source, self._count = DigitsScenesSource(split), count
        self.class_names, self.num_classes = self._source.class_names, self._source.num_classes
        self.scene, self.name = self._source.scene, self._source.name

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._source[index]


def variant_config(variant: str, seed: int, epochs: float) -> ml_collections.ConfigDict:
    """The recipe with what a variant changes, evaluated at the end alone."""
    config = load_recipe("vir_digits_segmentation")
    config.seed, config.epochs, config.eval_every = seed, epochs, 0
    config.optim.warmup_epochs = min(config.optim.warmup_epochs, epochs / 5)
    config.model.update(VARIANTS[variant])
    return config


def rows_right(
    scenes: DigitsScenesSource | FirstScenes, predicted: UInt8[np.ndarray, "n y x"]
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Of the digits' pixels, the fraction that is right in each row of the canvas, and in each row of a digit."""
    canvas, digit = np.zeros((2, SIDE)), np.zeros((2, DIGIT))
    for index, labels in enumerate(predicted):
        scene = scenes.scene(index)
        of_digits = scene.mask > 0
        right = of_digits & (scene.mask == labels)
        canvas += right.sum(axis=1), of_digits.sum(axis=1)
        for top, left, _ in scene.places:
            there = slice(top, top + DIGIT), slice(left, left + DIGIT)
            digit += right[there].sum(axis=1), of_digits[there].sum(axis=1)
    return canvas[0] / np.maximum(canvas[1], 1), digit[0] / np.maximum(digit[1], 1)


def predict(run: Run, scenes: Source) -> UInt8[np.ndarray, "n y x"]:
    """The predicted masks of all scenes."""

    @jax.jit
    def labels(params: Any, images: jax.Array) -> jax.Array:
        outputs = run.functions.apply(params, run.task.inputs({"image": images}))
        return jnp.argmax(outputs, axis=-1).astype(jnp.uint8)

    images = np.stack([np.asarray(scenes[index]["image"]) for index in range(len(scenes))])
    return np.concatenate([labels(run.params, part) for part in np.split(images, len(images) // BATCH)])


def measure(
    folder: Path, variant: str, seed: int, epochs: float, count: int | None
) -> tuple[Record, UInt8[np.ndarray, "n y x"]]:
    """Train a variant, unless it was, and look at what it makes of the test scenes."""
    scenes = DigitsScenesSource("test") if count is None else FirstScenes("test", count)
    seen = DigitsScenesSource("train") if count is None else FirstScenes("train", count)
    workdir = folder / f"{variant}_{seed}"
    metrics = train(variant_config(variant, seed, epochs), workdir, train_source=seen, eval_source=scenes)
    run = load_run(workdir, "last")
    predicted = predict(run, scenes)
    canvas, digit = rows_right(scenes, predicted)
    record = Record(
        variant=variant,
        seed=seed,
        epochs=epochs,
        scenes=len(scenes),
        parameters=count_parameters(run.functions.parameters),
        miou=metrics["miou"],
        pixel_accuracy=metrics["pixel_accuracy"],
        canvas_rows=canvas.tolist(),
        digit_rows=digit.tolist(),
    )
    return record, predicted[:SHOWN]


def markdown(records: Sequence[Record]) -> str:
    """The page."""
    by_variant: dict[str, list[Record]] = {}
    for record in records:
        by_variant.setdefault(record.variant, []).append(record)

    def mean(of: Sequence[Record], name: str) -> str:
        values = [100 * getattr(record, name) for record in of]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    def rows(of: Sequence[Record], name: str, parts: int) -> list[str]:
        whole = np.mean([getattr(record, name) for record in of], axis=0)
        return [f"{100 * part.mean():.1f}" for part in np.split(whole, parts)]

    table = markdown_table(
        ["variant", "mIoU, %", "pixels right, %", "parameters", "seeds"],
        [
            [
                variant,
                mean(of, "miou"),
                mean(of, "pixel_accuracy"),
                f"{of[0].parameters:,}",
                str(len(of)),
            ]
            for variant, of in by_variant.items()
        ],
    )
    of_digits = markdown_table(
        ["digits' pixels right, %, by row of the digit", *map(str, range(DIGIT))],
        [[variant, *rows(of, "digit_rows", DIGIT)] for variant, of in by_variant.items()],
    )
    of_canvas = markdown_table(
        ["by rows of the canvas", *(f"{top} to {top + BAND - 1}" for top in range(0, SIDE, BAND))],
        [[variant, *rows(of, "canvas_rows", SIDE // BAND)] for variant, of in by_variant.items()],
    )
    return (
        f"`configs/vir_digits_segmentation.py`, {records[0].epochs:g} epochs; {records[0].scenes} test scenes, after"
        f" the last step, of the moving average.{closed_gap(by_variant)}\n"
        f"Written by `python -m benchmarks.segmentation`.\n\n"
        f"{table}\n{of_digits}\n{of_canvas}"
    )


def closed_gap(by_variant: Mapping[str, Sequence[Record]]) -> str:
    """How much of the difference between "causal" and "vit" those that read both ways make up for, in words."""
    miou = {name: statistics.mean(record.miou for record in of) for name, of in by_variant.items()}
    if not {"causal", "vit"} <= miou.keys() or miou["vit"] <= miou["causal"]:
        return ""
    shares = [
        f"{name} {(miou[name] - miou['causal']) / (miou['vit'] - miou['causal']):.0%}"
        for name in miou
        if name not in ("causal", "causal_vit", "vit")
    ]
    return f" Of the gap in mIoU between causal and vit is closed: {', '.join(shares)}." if shares else ""


def draw(
    scenes: DigitsScenesSource,
    masks: Mapping[str, UInt8[np.ndarray, "n y x"]],
    records: Sequence[Record],
) -> Figure:
    """Scenes in columns, below each its mask and those predicted; under them how much is right in which rows."""
    shown = [scenes.scene(index) for index in range(SHOWN)]
    lines = {
        "scene": np.stack([scene.image for scene in shown]),
        "mask": palette()[np.stack([scene.mask for scene in shown])],
        **{name: palette()[predicted] for name, predicted in masks.items()},
    }
    height, curves = 1.1 * len(lines), 2.6
    figure = new_figure(1.1 * SHOWN + 1.6, height + curves + 0.5, "Scenes of digits, a class for each pixel")
    above, below = figure.subfigures(2, 1, height_ratios=[height, curves])
    _draw_rows(below, records)
    for axes, (name, images) in zip(above.subplots(len(lines), 1), lines.items(), strict=True):
        gap = np.full((len(images), SIDE, 2, 3), 255, np.uint8)
        axes.imshow(
            np.concatenate(list(np.concatenate([images, gap], axis=2)), axis=1), interpolation="nearest"
        )
        axes.set(xticks=[], yticks=[], anchor="E")  # The names stand to the left.
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axes.spines[:].set_visible(False)
    return figure


def _draw_rows(figure: SubFigure, records: Sequence[Record]) -> None:
    """The fractions by row of a digit and of the canvas, means over seeds; the canvas' in bands of four rows."""
    by_digit, by_canvas = figure.subplots(1, 2, sharey=True)
    for index, variant in enumerate(dict.fromkeys(record.variant for record in records)):
        of = [record for record in records if record.variant == variant]
        digit, canvas = (
            100 * np.mean([getattr(record, name) for record in of], axis=0)
            for name in ("digit_rows", "canvas_rows")
        )
        style = line(index) | ({"marker": "o", "markersize": 4} if variant == "vit" else {})
        by_digit.plot(np.arange(DIGIT), digit, label=variant, **style)
        bands = canvas.reshape(-1, BAND).mean(axis=1)
        by_canvas.plot(BAND * np.arange(len(bands)) + (BAND - 1) / 2, bands, **style)
    by_digit.set_ylabel("digits' pixels right, %", fontsize=9)
    for axes, what in ((by_digit, "digit"), (by_canvas, "canvas")):
        axes.set_xlabel(f"row of the {what}, from its top", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, and write it down."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.segmentation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", help="of the runs; default: one that is removed again")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="of each run")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each variant")
    parser.add_argument("--quick", action="store_true", help="a few steps, and only the figure, to FOLDER")
    given = parser.parse_args(arguments)
    if given.seeds < 1:
        parser.error(f"--seeds is {given.seeds}; expected at least 1")
    epochs, count = (QUICK_EPOCHS, QUICK_SCENES) if given.quick else (given.epochs, None)
    records, masks = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.folder or temporary)
        for variant in given.variants:
            for seed in range(given.seeds):
                record, predicted = measure(folder, variant, seed, epochs, count)
                records.append(record)
                masks.setdefault(variant, predicted)
        page = markdown(records)
        print(page)
        figure = draw(DigitsScenesSource("test"), masks, records)
        figure.savefig(folder / FIGURE.name if given.quick else FIGURE, dpi=130)
    if not given.quick:
        write_results("segmentation", page, records)
        PAGE.write_text(replace_between_markers(PAGE.read_text(), "segmentation", page))


if __name__ == "__main__":
    main()
