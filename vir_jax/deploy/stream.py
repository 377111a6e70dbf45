"""A ViR that reads an image row of patches by row of patches, as StableHLO: state in, state out.

Two programs: `step(state, pixels) -> state` reads a row of patches, `read(state) -> logits` says what was read so far.
A state is a list of arrays, all zero before the first row.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export
from jaxtyping import Array, Float, UInt8

from vir_jax.deploy.program import (
    CARD,
    COMPARED,
    DeployError,
    check_same,
    constants,
    image_shape,
    new_folder,
    random_images,
    write_card,
)
from vir_jax.inference.recurrent import initial_state, read_out, read_rows, stream
from vir_jax.models.stem import patch_grid
from vir_jax.weights import PretrainedModel
from vir_jax.weights.exchange import normalisation

STEP, READ = "step.stablehlo", "read.stablehlo"

State = list[Array]


@dataclasses.dataclass(frozen=True)
class StreamProgram:
    """The programs that `write_stream` wrote.

    Attributes:
        step_program: what `jax.export` reads of them.
        read_program: likewise.
        card: what they take and give, and of which model they are.
    """

    step_program: export.Exported
    read_program: export.Exported
    card: dict[str, Any]

    def start(self, batch: int = 1) -> State:
        """Return the state before the first row of so many images."""
        return [
            jnp.zeros([batch if side == "b" else side for side in leaf["shape"]], leaf["dtype"])
            for leaf in self.card["state"]
        ]

    def step(self, state: State, pixels: UInt8[np.ndarray | Array, "b p width colours"]) -> State:
        """Return the state after the next row of patches."""
        return list(self.step_program.call(state, pixels))

    def read(self, state: State) -> Float[Array, "b classes"]:
        """Return the logits of what was read so far, as if the image ended there."""
        return self.read_program.call(state)


def write_stream(
    folder: str | os.PathLike[str],
    pretrained: PretrainedModel,
    *,
    width: int | None = None,
    height: int | None = None,
    platforms: Sequence[str] = ("cpu",),
) -> float:
    """Write the streaming step of a model, for images of one width and height and any batch; read and compare it.

    Args:
        folder: made where it is absent.
        pretrained: the model, which reads the image once.
        width: pixels; None: that it was made for.
        height: pixels, which learned position embeddings are resampled for; None: that it was made for.
        platforms: see `write_stablehlo`.

    Returns:
        The relative RMS difference from the model's logits after the last row.

    Raises:
        FileExistsError: the folder holds a program.
        ValueError: the model cannot be streamed, or sides that its patch does not divide.
        DeployError: the programs give something else.
    """
    own_height, own_width, colours = image_shape(pretrained)
    width, height = width or own_width, height or own_height
    model, patch = pretrained.model, pretrained.model.patch
    model.check_streamable()
    rows, cols = patch_grid((height, width), patch)
    path = new_folder(folder)
    normalization = normalisation(pretrained.card)
    graph, variables = nnx.split(constants(pretrained).model.apart())
    variables = jax.tree.map(np.asarray, variables)
    (batch,) = export.symbolic_shape("b")
    state = jax.eval_shape(lambda: initial_state(model.apart(), 1, width))
    leaves, structure = jax.tree.flatten(state)
    if any(np.any(leaf) for leaf in jax.tree.leaves(initial_state(model.apart(), 1, width))):
        raise DeployError(f"a state of {pretrained.card.model['name']} does not begin as zeros")

    def step(leaves: State, pixels: UInt8[Array, "b p width colours"]) -> State:
        before = jax.tree.unflatten(structure, leaves)
        after = read_rows(nnx.merge(graph, variables), before, pixels, rows=rows, normalization=normalization)
        return jax.tree.leaves(after)

    def read(leaves: State) -> Float[Array, "b classes"]:
        return read_out(nnx.merge(graph, variables), jax.tree.unflatten(structure, leaves), cols=cols)

    # All but a count begin with the batch.
    shapes = [(batch, *leaf.shape[1:]) if leaf.shape else () for leaf in leaves]
    taken = [jax.ShapeDtypeStruct(shape, leaf.dtype) for shape, leaf in zip(shapes, leaves, strict=True)]
    strip = jax.ShapeDtypeStruct((batch, patch, width, colours), "uint8")
    written: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]
    written = {STEP: (step, (taken, strip)), READ: (read, (taken,))}
    for name, (function, arguments) in written.items():
        exported = export.export(jax.jit(function), platforms=list(platforms))(*arguments)
        (path / name).write_bytes(exported.serialize())
    found = {
        "format": "stablehlo",
        "files": {"step": STEP, "read": READ},
        "input": {"dtype": "uint8", "shape": ["b", patch, width, colours]},
        "output": {"dtype": "float32", "shape": ["b", pretrained.card.num_classes], "is": "logits"},
        "state": [
            {"dtype": str(leaf.dtype), "shape": ["b", *leaf.shape[1:]] if leaf.shape else []}
            for leaf in leaves
        ],
        "image": [height, width],
        "platforms": list(platforms),
    }
    write_card(path, pretrained, found)
    images = random_images((COMPARED, height, width, colours))
    expected = stream(model, images, normalization=normalization)
    return check_same(_stream(load_stream(path), images, patch), expected, str(path))


def _stream(program: StreamProgram, images: UInt8[np.ndarray, "b y x colours"], patch: int) -> Array:
    state = program.start(len(images))
    for top in range(0, images.shape[1], patch):
        state = program.step(state, images[:, top : top + patch])
    return program.read(state)


def load_stream(folder: str | os.PathLike[str]) -> StreamProgram:
    """Read what `write_stream` wrote.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(folder)
    step, read = (export.deserialize(bytearray((path / name).read_bytes())) for name in (STEP, READ))
    return StreamProgram(step, read, json.loads((path / CARD).read_text()))
