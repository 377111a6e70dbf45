"""A model as StableHLO, for any number of images; what `jax.export` writes stays readable for six months at least."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from jaxtyping import Array, Float, UInt8

from vir_jax.deploy.program import (
    CARD,
    COMPARED,
    check_same,
    constants,
    forward,
    image_shape,
    new_folder,
    random_images,
    write_card,
)
from vir_jax.weights import PretrainedModel

FILE = "model.stablehlo"


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that `write_stablehlo` wrote.

    Attributes:
        exported: what `jax.export` reads of it.
        card: what it takes and gives, and of which model it is.
    """

    exported: export.Exported
    card: dict[str, Any]

    def __call__(self, images: UInt8[np.ndarray | Array, "b y x colours"]) -> Float[Array, "b classes"]:
        """Return the logits of images in colours of 0 to 255."""
        return self.exported.call(images)


def write_stablehlo(
    folder: str | os.PathLike[str],
    pretrained: PretrainedModel,
    *,
    mode: str = "auto",
    platforms: Sequence[str] = ("cpu",),
) -> float:
    """Write a model as a program of uint8 images [b, y, x, colours], b free, to float32 logits; read and compare it.

    Args:
        folder: made where it is absent.
        pretrained: the model.
        mode: form of its mixer.
        platforms: that it may run on, "cpu", "cuda", "tpu"; this machine's is compared.

    Returns:
        The relative RMS difference from the model's logits.

    Raises:
        FileExistsError: the folder holds a program.
        DeployError: the program gives something else.
    """
    shape = image_shape(pretrained)
    path = new_folder(folder)
    (batch,) = export.symbolic_shape("b")
    taken = jax.ShapeDtypeStruct((batch, *shape), "uint8")
    classify = jax.jit(forward(constants(pretrained), mode=mode))
    exported = export.export(classify, platforms=list(platforms))(taken)
    (path / FILE).write_bytes(exported.serialize())
    found = {
        "format": "stablehlo",
        "files": {"model": FILE},
        "input": {"dtype": "uint8", "shape": ["b", *shape]},
        "output": {"dtype": "float32", "shape": ["b", pretrained.card.num_classes], "is": "logits"},
        "platforms": list(platforms),
        "mode": mode,
    }
    write_card(path, pretrained, found)
    images = random_images((COMPARED, *shape))
    return check_same(load_program(path)(images), classify(images), str(path / FILE))


def load_program(folder: str | os.PathLike[str]) -> Program:
    """Read what `write_stablehlo` wrote.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(folder)
    card = json.loads((path / CARD).read_text())
    return Program(export.deserialize(bytearray((path / FILE).read_bytes())), card)
