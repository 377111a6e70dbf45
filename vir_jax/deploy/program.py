"""What is exported: uint8 pixels in, logits out, weights and normalisation inside; and the card beside it."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from vir_jax.models.pixels import normalize
from vir_jax.weights import PretrainedModel
from vir_jax.weights.exchange import normalisation

CARD = "program.json"

TOLERANCE = 1e-4
"""Relative RMS difference of logits from the model's that rounding may make, in float32."""

COMPARED = 3
"""Images, of random pixels."""


class DeployError(RuntimeError):
    """What was written does not give what the model gives."""


def image_shape(pretrained: PretrainedModel) -> tuple[int, int, int]:
    """Return height, width and colours of what a model's program takes: RGB of a grey model, too.

    Raises:
        ValueError: the model gives logits to each pixel, for which no program is written.
    """
    if pretrained.model.dense:
        raise ValueError(
            f"a model with readout={pretrained.model.readout.reads!r} gives logits to each pixel; programs are written "
            "of models that give one set of logits to an image"
        )
    size = pretrained.card.model["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return height, width, max(pretrained.model.channels, 3)


def forward(
    pretrained: PretrainedModel, *, mode: str
) -> Callable[[UInt8[Array, "b y x colours"]], Float[Array, "b classes"]]:
    """Return the function that is exported."""
    mean, std = normalisation(pretrained.card)

    def classify(images: UInt8[Array, "b y x colours"]) -> Float[Array, "b classes"]:
        return pretrained.functions.apply(pretrained.params, normalize(images, mean, std), mode=mode)

    return classify


def random_images(shape: tuple[int, ...]) -> UInt8[np.ndarray, "b y x colours"]:
    """Return pixels to compare outputs on."""
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def check_same(actual: Any, expected: Any, what: str) -> float:
    """Return the relative RMS difference of two outputs.

    Raises:
        DeployError: it is above `TOLERANCE`.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    difference = float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)))
    if not difference <= TOLERANCE:  # NaN is none.
        raise DeployError(
            f"{what} gives logits that differ from the model's by a relative RMS of {difference:.1e};"
            f" expected at most {TOLERANCE:.0e}"
        )
    return difference


def write_card(folder: Path, pretrained: PretrainedModel, found: Mapping[str, Any]) -> None:
    """Write what a program takes and gives, and of which model it is."""
    content = {**found, "jax": jax.__version__, "model": pretrained.card.to_json()}
    (folder / CARD).write_text(json.dumps(content, indent=2) + "\n")


def new_folder(folder: str | os.PathLike[str]) -> Path:
    """Make a folder for a program.

    Raises:
        FileExistsError: it holds one.
    """
    folder = Path(folder)
    if (folder / CARD).exists():
        raise FileExistsError(f"{folder} holds a program; name another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def constants(pretrained: PretrainedModel) -> PretrainedModel:
    """Return a model whose weights are host arrays, which become constants of the program."""
    return dataclasses.replace(pretrained, params=jax.tree.map(np.asarray, pretrained.params))
