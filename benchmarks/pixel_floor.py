"""What a model of pixels must beat on the digits: `python -m benchmarks.pixel_floor`, a minute of one CPU core.

A softmax regression for each of the 64 positions, of the pixel's 17 levels on the values of its NEIGHBOURS nearest
earlier pixels, in bits per dimension of the digits' test split: no state, no depth, no shared weights. The strength of
its regularisation, and the share of a uniform distribution that is mixed in lest a level that was never seen at a
position has no probability, are chosen on every fifth training image, and then all training images are fitted.
Histograms stand beside it.

Writes benchmarks/results/pixel_floor.{md,json}.
"""

import argparse
import dataclasses
import itertools
import warnings
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression

from benchmarks.timing import markdown_table, write_results
from vir_jax.data import open_source
from vir_jax.models.pixels import to_levels

LEVELS, SIDE = 17, 8
NEIGHBOURS = ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-1, -2), (-1, 2), (-2, -1))
"""(rows, columns) from a pixel; zero where one would be outside of the image."""

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
UNIFORM = (0.003, 0.01, 0.03, 0.1)


@dataclasses.dataclass(frozen=True)
class Record:
    """A model and what it needs for a dimension."""

    model: str
    bits_per_dim: float
    standard_error: float


Probabilities = Float[np.ndarray, "n levels"]


def levels_of(split: str) -> Int[np.ndarray, "n y x"]:
    """Return the levels of the digits of a split."""
    source = open_source("digits", split)
    images = np.stack([source[index]["image"] for index in range(len(source))])
    return np.asarray(to_levels(jnp.asarray(images), LEVELS, 1))[..., 0]


def neighbours(levels: Int[np.ndarray, "n y x"], y: int, x: int) -> Float[np.ndarray, "n neighbours"]:
    """Return the values, 0 to 1, of the earlier pixels around one."""
    padded = np.pad(levels, ((0, 0), (2, 0), (2, 2)))
    return np.stack([padded[:, y + dy + 2, x + dx + 2] for dy, dx in NEIGHBOURS], axis=1) / (LEVELS - 1)


def histogram(train: Int[np.ndarray, " n"], count: int) -> Probabilities:
    """Return the frequencies of the levels, `count` times."""
    return np.tile(np.bincount(train, minlength=LEVELS) / len(train), (count, 1))


def regression(
    train: Int[np.ndarray, "n y x"], test: Int[np.ndarray, "m y x"], y: int, x: int, strength: float
) -> Probabilities:
    """Return the probabilities of a pixel's levels in each test image, by a softmax regression."""
    target = train[:, y, x]
    if len(np.unique(target)) == 1:
        return histogram(target, len(test))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What has not converged after 300 steps is scored as it is.
        model = LogisticRegression(C=strength, max_iter=300).fit(neighbours(train, y, x), target)
    found = np.zeros((len(test), LEVELS))
    found[:, model.classes_] = model.predict_proba(neighbours(test, y, x))
    return found


def regressions(
    train: Int[np.ndarray, "n y x"], test: Int[np.ndarray, "m y x"], strength: float
) -> Float[np.ndarray, "m y x"]:
    """Return the probability of every pixel of the test images."""
    pixels = itertools.product(range(SIDE), repeat=2)
    found = [_of(regression(train, test, y, x, strength), test[:, y, x]) for y, x in pixels]
    return np.stack(found, axis=1).reshape(test.shape)


def _of(probabilities: Probabilities, levels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return probabilities[np.arange(len(levels)), levels]


def bits(probabilities: Float[np.ndarray, "n y x"], uniform: float) -> Float[np.ndarray, " n"]:
    """Return the bits per dimension of each image, with a uniform distribution mixed in."""
    return -np.mean(np.log2((1 - uniform) * probabilities + uniform / LEVELS), axis=(1, 2))


def measure() -> list[Record]:
    """Fit all models, and score them on the test images."""
    train, test = levels_of("train"), levels_of("test")
    held_out = np.arange(len(train)) % 5 == 4
    scores = {
        (strength, uniform): float(bits(found, uniform).mean())
        for strength in STRENGTHS
        for found in [regressions(train[~held_out], train[held_out], strength)]
        for uniform in UNIFORM
    }
    strength, uniform = min(scores, key=scores.__getitem__)
    pixels = list(itertools.product(range(SIDE), repeat=2))
    by_position = np.stack(
        [_of(histogram(train[:, y, x], len(test)), test[:, y, x]) for y, x in pixels], axis=1
    ).reshape(test.shape)
    one = _of(histogram(train.ravel(), test.size), test.ravel()).reshape(test.shape)
    models = {
        "uniform": np.full(len(test), np.log2(LEVELS)),
        "one histogram": bits(one, 0.0),
        "a histogram for each position": bits(by_position, uniform),
        f"softmax regression on {len(NEIGHBOURS)} neighbours for each position (C = {strength:g}, {uniform:.1%}"
        " uniform)": bits(regressions(train, test, strength), uniform),
    }
    return [
        Record(name, float(values.mean()), float(values.std() / np.sqrt(len(values))))
        for name, values in models.items()
    ]


def report(records: Sequence[Record]) -> str:
    """Return the table."""
    rows = [[record.model, f"{record.bits_per_dim:.3f} ± {record.standard_error:.3f}"] for record in records]
    return (
        f"Bits per dimension of the digits' test split, {LEVELS} levels, with the standard error over its images.\n"
        "Written by `python -m benchmarks.pixel_floor`.\n\n"
        + markdown_table(["model", "bits/dim, lower is better"], rows)
    )


def main() -> None:
    """Measure, and write it down."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    records = measure()
    markdown = report(records)
    print(markdown)
    write_results("pixel_floor", markdown, records)


if __name__ == "__main__":
    main()
