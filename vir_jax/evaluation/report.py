"""Where a classifier errs, and whether it knows: accuracy class by class, confusion, calibration."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from vir_jax.evaluation.predictions import Predictions

BINS = 15
"""Of probabilities, in the calibration error; Guo et al. 2017 (arXiv 1706.04599) have as many."""

SHOWN = 20
"""Classes whose confusion is shown in a table, at most."""


def confusion(
    labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], classes: int
) -> Int[np.ndarray, "classes classes"]:
    """Count the images of each class (row) that were taken for each (column)."""
    pairs = classes * np.asarray(labels, np.int64) + predicted
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def class_accuracy(counts: Int[np.ndarray, "classes classes"]) -> Float[np.ndarray, " classes"]:
    """Return the part of each class's images that was taken for it; NaN where there are none."""
    images = counts.sum(axis=1)
    return np.divide(np.diag(counts), images, out=np.full(len(counts), np.nan), where=images > 0)


def calibration_error(
    probability: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], *, bins: int = BINS
) -> float:
    """Return the expected calibration error: how far the probability of the predicted class is from how often it is
    right, in bins of equal width, mean over the images.

    ECE = sum over bins B of |B| / n |mean of correct - mean of probability|, with bins (i / m, (i + 1) / m].
    """
    which = np.clip(np.ceil(probability * bins).astype(int) - 1, 0, bins - 1)
    difference = correct.astype(np.float64) - probability
    return float(np.abs(np.bincount(which, difference, bins)).sum() / len(probability))


def report(predictions: Predictions) -> dict[str, Any]:
    """Return accuracy, calibration error, and the images and accuracy of each class with their confusion: JSON data."""
    names = predictions.source.class_names
    counts = confusion(predictions.labels, predictions.predicted, len(names))
    correct = predictions.labels == predictions.predicted
    return {
        "images": len(correct),
        "top1": float(correct.mean()),
        "calibration_error": calibration_error(predictions.probability, correct),
        "calibration_bins": BINS,
        "classes": list(names),
        "class_images": counts.sum(axis=1).tolist(),
        "class_accuracy": [None if np.isnan(value) else float(value) for value in class_accuracy(counts)],
        "confusion": counts.tolist(),
    }


def write_report(path: str | os.PathLike[str], found: dict[str, Any]) -> None:
    """Write a report as a JSON file."""
    Path(path).write_text(json.dumps(found, indent=2) + "\n")


def format_report(found: dict[str, Any]) -> str:
    """Return a line for each class that has images, the confusion where there are few, and the calibration error."""
    names, counts = found["classes"], found["confusion"]
    few = len(names) <= SHOWN
    rows: list[Sequence[str]] = [("class", "images", "top-1", *(names if few else ["most often taken for"]))]
    for name, images, accuracy, taken in zip(
        names, found["class_images"], found["class_accuracy"], counts, strict=True
    ):
        if images:
            rows.append(
                (
                    name,
                    f"{images:,}",
                    f"{accuracy:.2%}",
                    *((str(count or ".") for count in taken) if few else [_mistaken(name, names, taken)]),
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [f"{row[0]:<{widths[0]}}", *(f"{text:>{w}}" for text, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    error = f"expected calibration error {found['calibration_error']:.4f} ({found['calibration_bins']} bins)"
    return "\n".join([*lines, error])


def _mistaken(name: str, names: Sequence[str], taken: Sequence[int]) -> str:
    others = {other: count for other, count in zip(names, taken, strict=True) if other != name and count}
    if not others:
        return "-"
    worst = max(others, key=lambda other: others[other])
    return f"{worst} ({others[worst]})"
